"""Beats of the 7-series block's AXI4-Stream interfaces to and from those of a raw link."""

from amaranth import Cat, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..spec import series7 as spec
from .layouts import RawBeat
from .ultrascale_axis import AxisBeat
from .ultrascale_link import Ender, Starter
from .ultrascale_straddle import Destraddler

WIDTHS = (64, 128)
OFFSET_BITS = 28  # of an address inside a BAR
TAG_HIGH = (19, 23)  # bits of the first dword that are reserved in PCIe 2.1, and the highest of a tag later [PCIe5 2.2.6.2]


def bar_address(bar):
    """Return the address below 4 GiB at which BAR ``bar`` lies inside the card: the host's requests come with 3 or 4 dwords of header."""
    return bar + 1 << OFFSET_BITS


def _swapped(dword):
    """Return a dword with its bytes the other way round."""
    return Cat(dword[8 * n : 8 * n + 8] for n in reversed(range(4)))


def _is_payload(lane, index, wide, lanes):
    """Return whether a lane of beat ``index``, which saturates at 2, is payload; ``wide``: the header has 4 dwords."""
    return (index > 3 // lanes) | ((index == 3 // lanes) & ~wide if lane == 3 % lanes else 0)


class FromAxis(wiring.Component):
    """Receive interface to raw link: TLPs apart, payload in the order of the raw link, addresses those of :func:`bar_address`.

    The address of a memory request becomes that of the BAR that the block names, with the offset as far as the BAR reaches; one that
    hits none becomes an offset below 256 MiB, where the card has nothing. Reserved bits that are a long tag elsewhere become 0. While
    ``discarding`` what comes is dropped, and after that until a TLP begins. At 128 bits a TLP may begin in the upper half of a beat.

    Latency: 1 cycle at 64 bits, 2 at 128. Throughput: one beat per cycle; see :class:`.ultrascale_straddle.Destraddler`.

    Parameters
    ----------
    width : :class:`int`
        64 or 128.
    bar_bytes : mapping
        Size of each BAR, by index.

    Members
    -------
    tdata, tkeep, tlast, tuser, tvalid, tready : ports
        Of the block: ``m_axis_rx_*``.
    o : ``Out(stream.Signature(RawBeat(width)))``
        TLPs.
    discarding : ``In(1)``
        See above.

    Raises
    ------
    :exc:`ValueError`
        If a BAR is larger than 256 MiB.
    """

    def __init__(self, *, width, bar_bytes):
        self.width, self.bar_bytes = width, dict(bar_bytes)
        for size in self.bar_bytes.values():
            if size > 1 << OFFSET_BITS:
                raise ValueError(f"A BAR behind the block must have at most 256 MiB, not {size!r} bytes")
        super().__init__({
            "tdata": In(width), "tkeep": In(width // 8), "tlast": In(1), "tuser": In(spec.RX_USER), "tvalid": In(1), "tready": Out(1),
            "o": Out(stream.Signature(RawBeat(width))), "discarding": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes, out = self.width // 32, self.o.payload
        hits = self.tuser[spec.RX_BAR_HIT :][: spec.BAR_HIT_BITS]
        m.submodules.starter = starter = Starter()
        m.d.comb += [starter.discarding.eq(self.discarding), starter.valid.eq(self.tvalid), self.tready.eq(starter.ready)]

        # One TLP per beat; hits ride where other blocks have byte enables.
        beat, valid, go = Signal(AxisBeat(self.width)), Signal(), Signal()
        if lanes == 2:
            m.d.comb += [
                starter.goes_on.eq(~self.tlast), valid.eq(starter.passed_valid), starter.passed_ready.eq(go), beat.data.eq(self.tdata),
                beat.keep.eq(Cat(self.tkeep[4 * n] for n in range(lanes))), beat.last.eq(self.tlast),
                Cat(beat.first_be, beat.last_be).eq(hits),
            ]
        else:
            m.submodules.apart = apart = ResetInserter({"sync": self.discarding})(Destraddler(width=self.width))
            sof, eof = (self.tuser[at:][: spec.PLACE_BITS + 1] for at in (spec.RX_SOF, spec.RX_EOF))
            several = apart.i.payload
            m.d.comb += [
                apart.i.valid.eq(starter.passed_valid), starter.passed_ready.eq(apart.i.ready),
                starter.goes_on.eq(starter.inside + sof[-1] > eof[-1]), several.data.eq(self.tdata),
                several.starts[0].eq(sof[-1]), several.places[0].eq(sof[3]), several.ends[0].eq(eof[-1]), several.lanes[0].eq(eof[2:4]),
                Cat(several.first_be[0], several.last_be[0]).eq(hits),
                beat.eq(apart.o.payload), valid.eq(apart.o.valid), apart.o.ready.eq(go),
            ]

        index, is_wide, is_request = Signal(range(3)), Signal(), Signal()
        wide, request = Signal(), Signal()  # of the TLP of this beat
        first, tlp_type = index == 0, beat.data[24:29]
        of_memory = (tlp_type == pcie.TYPE_MEMORY) | (tlp_type == pcie.TYPE_MEMORY_LOCKED) | (tlp_type[2:] == pcie.TYPE_FETCH_ADD >> 2)
        m.d.comb += [
            wide.eq(Mux(first, beat.data[29 + pcie.FMT_4DW], is_wide)), request.eq(Mux(first, of_memory, is_request)),
            go.eq(~self.o.valid | self.o.ready),
        ]
        place = Signal(32)
        offset = Signal(32)  # address bits of the dword that has the offset
        which = Cat(beat.first_be, beat.last_be)
        low = [beat.data.word_select(n % lanes, 32) for n in (2, 3)]
        m.d.comb += offset.eq(Mux(wide, low[1], low[0]))
        m.d.comb += place.eq(offset & ((1 << OFFSET_BITS) - 1))
        for bar, size in self.bar_bytes.items():
            with m.If(which[bar]):
                m.d.comb += place.eq(bar_address(bar) | (offset & (size - 1)))
        changed = Signal(self.width)
        for lane in range(lanes):
            dword = beat.data.word_select(lane, 32)
            m.d.comb += changed.word_select(lane, 32).eq(Mux(_is_payload(lane, index, wide, lanes), _swapped(dword), dword))
        with m.If(first):
            m.d.comb += [changed[bit].eq(0) for bit in TAG_HIGH]
        with m.If(request & (index == 2 // lanes)):
            m.d.comb += changed.word_select(2 % lanes, 32).eq(Mux(wide, 0, place))
            with m.If(wide):
                m.d.comb += changed.word_select(3 % lanes, 32).eq(place)
        with m.If(go):
            m.d.sync += [
                self.o.valid.eq(valid), out.data.eq(changed), out.keep.eq(beat.keep), out.first.eq(first), out.last.eq(beat.last),
            ]
            with m.If(valid):
                m.d.sync += [index.eq(Mux(beat.last, 0, Mux(index == 2, 2, index + 1))), is_wide.eq(wide), is_request.eq(request)]
        with m.If(self.discarding):
            m.d.sync += [index.eq(0), self.o.valid.eq(0)]
        return m


class ToAxis(wiring.Component):
    """Raw link to transmit interface: payload in the order of the block. A TLP that ``discarding`` cuts ends as discontinued.

    Latency: 0 cycles. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        64 or 128.

    Members
    -------
    i : ``In(stream.Signature(RawBeat(width)))``
        TLPs.
    tdata, tkeep, tlast, tuser, tvalid, tready : ports
        Of the block: ``s_axis_tx_*``.
    discarding : ``In(1)``
        See above.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "i": In(stream.Signature(RawBeat(width))), "discarding": In(1),
            "tdata": Out(width), "tkeep": Out(width // 8), "tlast": Out(1), "tuser": Out(spec.TX_USER), "tvalid": Out(1), "tready": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes, beat = self.width // 32, self.i.payload
        m.submodules.ender = ender = Ender()
        index, is_wide, wide, now = Signal(range(3)), Signal(), Signal(), Signal(range(3))
        m.d.comb += [
            now.eq(Mux(beat.first, 0, index)), wide.eq(Mux(beat.first, beat.data[29 + pcie.FMT_4DW], is_wide)),
            ender.discarding.eq(self.discarding), ender.valid.eq(self.i.valid), ender.last.eq(beat.last), self.i.ready.eq(ender.ready),
            self.tvalid.eq(ender.passed_valid), ender.passed_ready.eq(self.tready), self.tlast.eq(ender.passed_last),
            self.tuser.eq(ender.discontinue << spec.TX_DISCONTINUE),
            self.tkeep.eq(Mux(ender.discontinue, Const(-1, self.width // 8), Cat(beat.keep[n].replicate(4) for n in range(lanes)))),
        ]
        for lane in range(lanes):
            dword = beat.data.word_select(lane, 32)
            m.d.comb += self.tdata.word_select(lane, 32).eq(Mux(_is_payload(lane, now, wide, lanes), _swapped(dword), dword))
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [index.eq(Mux(now == 2, 2, now + 1)), is_wide.eq(wide)]
        return m
