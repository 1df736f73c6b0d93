"""TLPs over bytes, where there is no PCIe PHY: framed, checked, numbered, sent again when they are missed; see rtl/phy/README.md."""

from amaranth import Cat, Const, Module, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.transaction import TransactionQueue
from .layouts import RawBeat
from .tunnel_frames import VERSION, Deframer, Framer, Kind, Stuffer, TlpDword
from .tunnel_retry import Retry

WIDTHS = (64, 128, 256, 512)


class ToDwords(wiring.Component):
    """Cuts raw beats into dwords. Latency: 1 cycle. Throughput: 1 dword per cycle.

    Members
    -------
    i : ``In(stream.Signature(RawBeat(width)))``
        From the link adapter of the card.
    o : ``Out(stream.Signature(TlpDword))``
        Dwords.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(RawBeat(width))), "o": Out(stream.Signature(TlpDword))})

    def elaborate(self, platform):
        m = Module()
        beat = Signal(RawBeat(self.width))  # what of it is left is in the lowest lanes
        m.d.comb += [
            self.o.valid.eq(beat.keep[0]), self.o.payload.data.eq(beat.data[:32]), self.o.payload.last.eq(beat.last & ~beat.keep[1]),
            self.i.ready.eq(~beat.keep[0] | (self.o.ready & ~beat.keep[1])),
        ]  # fmt: skip
        with m.If(self.o.ready):
            m.d.sync += [beat.data.eq(beat.data >> 32), beat.keep.eq(beat.keep >> 1)]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += beat.eq(self.i.payload)
        return m


class ToBeats(wiring.Component):
    """Joins dwords to raw beats. Latency: 1 cycle from the dword that completes a beat. Throughput: 1 dword per cycle.

    Members
    -------
    i : ``In(stream.Signature(TlpDword))``
        Dwords.
    o : ``Out(stream.Signature(RawBeat(width)))``
        To the link adapter of the card.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(TlpDword)), "o": Out(stream.Signature(RawBeat(width)))})

    def elaborate(self, platform):
        m = Module()
        lanes, out = self.width // 32, self.o.payload
        lane, is_inside = Signal(range(lanes)), Signal()  # of a TLP, the first beat of which is over
        m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [lane.eq(lane + 1), out.first.eq(~is_inside), out.last.eq(self.i.payload.last)]
            with m.Switch(lane):
                for n in range(lanes):
                    with m.Case(n):
                        m.d.sync += [out.data.word_select(n, 32).eq(self.i.payload.data), out.keep.eq((2 << n) - 1)]
            with m.If(self.i.payload.last | (lane == lanes - 1)):
                m.d.sync += [self.o.valid.eq(1), lane.eq(0), is_inside.eq(~self.i.payload.last)]
        return m


class Tunnel(wiring.Component):
    """The card's end of a tunnel: raw TLP streams on one side, bytes on the other; "Tunnel" in rtl/phy/README.md is the protocol.

    Latency: a TLP leaves once its last dword is there; one from the line goes on once its CRC was right. Throughput: a byte per cycle each
    way.

    Parameters
    ----------
    width : :class:`int`
        Of the raw link: 64, 128, 256 or 512.
    room : :class:`int`
        Dwords of TLPs from the host that fit: a power of two, from 256 to 8192.
    depth, window, patience_cycles
        Of :class:`.tunnel_retry.Retry`.
    silence_cycles : :class:`int`
        The link is down when for so long no frame came.

    Members
    -------
    rx : ``In(stream.Signature(8))``
        Bytes from the host; always ready.
    tx : ``Out(stream.Signature(8))``
        Bytes to the host.
    i : ``In(stream.Signature(RawBeat(width)))``
        TLPs of the card.
    o : ``Out(stream.Signature(RawBeat(width)))``
        TLPs for the card.
    link_reset : ``Out(1)``
        The link is down, or begins anew.
    discarding : ``In(1)``
        From the cycle behind ``link_reset``: the card is not ready for TLPs yet.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is none of these.
    """

    def __init__(self, *, width, room=1024, depth=1024, window=31, patience_cycles=5_000_000, silence_cycles=1_000_000_000):
        if width not in WIDTHS:
            raise ValueError(f"Link width must be 64, 128, 256 or 512 bits, not {width!r}")
        if room not in [1 << n for n in range(8, 14)]:
            raise ValueError(f"Room for TLPs must be a power of two between 256 and 8192 dwords, not {room!r}")
        if silence_cycles not in range(10_000, 1 << 32):
            raise ValueError(f"Silence of a link that is down must be between 10,000 and 2 ** 32 - 1 cycles, not {silence_cycles!r}")
        self.width, self.room, self.window, self.silence_cycles = width, room, window, silence_cycles
        self._retry = Retry(depth=depth, window=window, patience_cycles=patience_cycles)
        super().__init__({
            "rx": In(stream.Signature(8)), "tx": Out(stream.Signature(8)), "i": In(stream.Signature(RawBeat(width))),
            "o": Out(stream.Signature(RawBeat(width))), "link_reset": Out(1), "discarding": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        is_up, restart = Signal(), ResetInserter({"sync": (is_down := Signal())})
        m.submodules.deframer = deframer = Deframer()
        m.submodules.queue = queue = restart(TransactionQueue(TlpDword, self.room))
        m.submodules.to_beats = to_beats = restart(ToBeats(width=self.width))
        m.submodules.to_dwords = to_dwords = restart(ToDwords(width=self.width))
        m.submodules.retry = retry = restart(self._retry)
        m.submodules.framer = framer = restart(Framer())
        m.submodules.stuffer = stuffer = Stuffer()
        m.d.comb += [is_down.eq(~is_up), deframer.i.valid.eq(self.rx.valid), deframer.i.payload.eq(self.rx.payload), self.rx.ready.eq(1)]
        for source, sink in ((deframer.o, queue.i), (queue.o, to_beats.i), (to_beats.o, wiring.flipped(self.o)), (to_dwords.o, retry.i),
                             (wiring.flipped(self.i), to_dwords.i), (retry.o, framer.tlps), (framer.o, stuffer.i),
                             (stuffer.o, wiring.flipped(self.tx))):  # fmt: skip
            wiring.connect(m, source, sink)

        # Frames.
        session, expected, freed = Signal(32), Signal(8), Signal(8)
        wants_hello, wants_nak, wants_ack, has_missed = Signal(), Signal(), Signal(), Signal()
        header, is_ours, is_data, is_next, is_new = deframer.header, Signal(), Signal(), Signal(), Signal()

        def comes(kind, length):
            return deframer.is_frame & (header.kind == kind) & (deframer.length == length)

        m.d.comb += [
            is_ours.eq(is_data | (is_up & (comes(Kind.ACK, 0) | comes(Kind.NAK, 0) | comes(Kind.PING, 0)))),
            is_data.eq(is_up & deframer.is_frame & (header.kind == Kind.DATA) & (deframer.length != 0)),
            is_next.eq(is_data & (header.seq == expected)), is_new.eq(comes(Kind.RESET, 1)),
            queue.commit.eq(is_next), queue.rollback.eq((deframer.is_frame | deframer.is_damaged) & ~is_next),
            retry.ack.valid.eq(is_ours), retry.ack.seq.eq(header.ack), retry.back.eq(comes(Kind.NAK, 0)),
            framer.seq.eq(retry.seq), framer.ack.eq(expected), framer.freed.eq(freed),
            framer.hello.eq(Cat(session, Const(VERSION, 8), Const(self.width // 32, 8), Const(self.window, 16), Const(self.room, 32))),
            framer.wants_hello.eq(wants_hello), framer.wants_nak.eq(wants_nak), framer.wants_ack.eq(wants_ack),
        ]  # fmt: skip
        with m.If(is_new):
            m.d.sync += session.eq(deframer.body)
        with m.If(framer.begins & is_up):
            m.d.sync += wants_ack.eq(0)
            with m.If(framer.kind == Kind.HELLO):
                m.d.sync += wants_hello.eq(0)
            with m.If(framer.kind == Kind.NAK):
                m.d.sync += wants_nak.eq(0)
        with m.If(is_next):
            m.d.sync += [expected.eq(expected + 1), has_missed.eq(0)]
        with m.Elif((is_data & ~(header.seq - expected)[7]) | deframer.is_damaged):
            m.d.sync += [has_missed.eq(1), wants_nak.eq(wants_nak | ~has_missed)]
        with m.Elif(is_data | comes(Kind.PING, 0)):
            m.d.sync += wants_ack.eq(1)
        with m.If(queue.o.valid & queue.o.ready & queue.o.payload.last):
            m.d.sync += [freed.eq(freed + 1), wants_ack.eq(1)]

        # The session.
        silence = Signal(range(self.silence_cycles), init=self.silence_cycles - 1)
        with m.If(is_ours | is_new):
            m.d.sync += silence.eq(self.silence_cycles - 1)
        with m.Elif(silence != 0):
            m.d.sync += silence.eq(silence - 1)
        with m.FSM():
            with m.State("DOWN"):
                m.d.comb += self.link_reset.eq(1)
                with m.If(is_new):
                    m.next = "BEGIN"
            with m.State("BEGIN"):
                m.d.comb += self.link_reset.eq(1)
                m.d.sync += [expected.eq(0), freed.eq(0), has_missed.eq(0), wants_nak.eq(0), wants_ack.eq(0), wants_hello.eq(1)]
                m.next = "SETTLE"
            with m.State("SETTLE"):
                with m.If(~self.discarding):
                    m.next = "UP"
            with m.State("UP"):
                m.d.comb += is_up.eq(1)
                with m.If(is_new & (deframer.body != session)):
                    m.next = "BEGIN"
                with m.Elif(is_new):
                    m.d.sync += wants_hello.eq(1)
                with m.Elif(silence == 0):
                    m.next = "DOWN"
        return m
