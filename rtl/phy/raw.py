"""The raw TLP link: headers in line, as soft cores and our own simulations have it."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..tlp.codec import decode, encode, is_completion, is_config, is_message
from ..tlp.layouts import Malformed, Pasid, TlpBeat
from .layouts import PasidBeat, RawBeat
from .pasid import PasidInserter, PasidRemover

WIDTHS = (64, 128, 256, 512)


class RawReceiver(wiring.Component):
    """Takes headers out of the line: raw beats in, TLP beats out.

    Malformed TLPs are dropped whole: of a reserved Fmt or Type, with a prefix, that end inside their header; with data beyond
    ``max_payload``; a memory request that crosses 4 KiB or has byte enables against the rules; an AtomicOp of a size or
    alignment that does not exist; a configuration or I/O request of other than one dword; one of these or a message of a
    standard with a traffic class. One with fewer or more dwords than its length says is passed on ``damaged``. Each gives a pulse of
    ``malformed``, if not two end at once. None disturbs the next TLP. [PCIe5 2.2.2, 2.2.5, 2.2.7, 2.2.8, 2.3]

    With ``has_pasid`` the PASID prefix comes beside the TLP; on a completion, a configuration or an I/O request it is malformed. Any other
    prefix is, as without, and so is a second one. [PCIe5 2.2.10, 6.20]

    Latency: 1 cycle from the beat that completes a beat of payload; 2 for the last. Throughput: one raw beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    has_pasid : :class:`bool`
        TLPs may have a PASID.

    Members
    -------
    i : ``In(stream.Signature(RawBeat(width)))``, or of ``PasidBeat(width)``
        From the link.
    o : ``Out(stream.Signature(TlpBeat(width, has_pasid)))``
        To the transaction layer.
    max_payload : ``In(3)``
        Code of the largest payload that the host may send: 128 bytes << this.
    malformed : ``Out(Malformed)``
        Pulse, and the header that goes with it.
    """

    def __init__(self, *, width, has_pasid=False):
        self.width, self.has_pasid = width, has_pasid
        super().__init__({
            "i": In(stream.Signature(PasidBeat(width) if has_pasid else RawBeat(width))),
            "o": Out(stream.Signature(TlpBeat(width, has_pasid))),
            "max_payload": In(3),
            "malformed": Out(Malformed),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, out = self.width // 32, self.o.payload
        header_at = 3 // lanes if lanes < 4 else 0  # the beat in which every header ends
        shifts = [size - header_at * lanes for size in (3, 4)]  # lanes of that beat that are header
        shifts = [shift % lanes for shift in shifts]

        # One beat behind the link, with the header dwords up to and with it.
        go = Signal()
        beat, beat_valid = Signal(self.i.p.shape()), Signal()
        position, index = Signal(range(header_at + 2)), Signal(range(header_at + 2))  # of the next beat, of ``beat``
        dwords = [Signal(32, name=f"dword_{n}") for n in range(4)]
        arriving = self.i.payload
        next_index = Mux(arriving.first, 0, position)
        m.d.comb += [go.eq(~self.o.valid | self.o.ready), self.i.ready.eq(go)]
        with m.If(go):
            m.d.sync += [beat_valid.eq(self.i.valid), beat.eq(arriving), index.eq(next_index)]
        with m.If(go & self.i.valid):
            m.d.sync += position.eq(Mux(next_index == header_at + 1, next_index, next_index + 1))
            for n, dword in enumerate(dwords):
                with m.If(next_index == n // lanes):
                    m.d.sync += dword.eq(arriving.data.word_select(n % lanes, 32))
        header = decode(m, "header", dwords)
        wide, has_data = header.fmt[pcie.FMT_4DW], header.fmt[pcie.FMT_DATA]
        kept = Signal(range(lanes + 1))
        m.d.comb += kept.eq(sum(beat.keep[n] for n in range(lanes)))
        known, whole = Signal(), Signal()
        m.d.comb += [
            known.eq(~header.fmt[pcie.FMT_PREFIX] & (
                (header.type == pcie.TYPE_MEMORY) | ((header.type == pcie.TYPE_MEMORY_LOCKED) & ~has_data) | (is_message(header) & wide)
                | (((header.type == pcie.TYPE_IO) | is_config(header) | is_completion(header)) & ~wide)
                | ((header.type[2:] == pcie.TYPE_FETCH_ADD >> 2) & (header.type[:2] != 3) & has_data))),
            whole.eq(kept + header_at * lanes >= Mux(wide, 4, 3)),
        ]
        breaks_rules = self._breaks_rules(m, header)
        if self.has_pasid:
            has_none = is_completion(header) | is_config(header) | (header.type == pcie.TYPE_IO)
            breaks_rules |= beat.pasid.valid & has_none
        raw, raw_held = Signal(128), Signal(128)  # the header as it came
        for n, dword in enumerate(dwords):
            with m.If((index * lanes + kept > n) & ((n < 3) | wide)):
                m.d.comb += raw.word_select(n, 32).eq(dword)

        # The TLP at work: its header, and the beat whose lanes from ``shift`` on wait for the next beat.
        held, shift = Signal.like(header), Signal(range(max(shifts) + 1))
        hold, stock, holding = Signal(self.width), Signal(range(lanes + 1)), Signal()
        left, begun, refused = Signal(11), Signal(), Signal()  # payload dwords to come; a beat has left; none must
        flush, dropping = Signal(), Signal()
        if self.has_pasid:
            held_pasid = Signal(Pasid)
        at_header, at_payload = Signal(), Signal()
        m.d.comb += [
            at_header.eq(beat_valid & (index == header_at)),
            at_payload.eq(beat_valid & (index > header_at) & ~dropping),
        ]
        moved, joined = Signal(self.width), Cat(hold, beat.data)
        with m.Switch(shift):
            for value in sorted(set(shifts)):
                with m.Case(value):
                    m.d.comb += moved.eq(joined[32 * value :][: self.width])
        borrowed, spare = Signal(range(lanes + 1)), Signal(range(lanes + 1))  # dwords of ``beat`` that go now, and later
        reach, give = Signal(range(lanes + 1)), Signal(range(lanes + 1))
        m.d.comb += [
            borrowed.eq(Mux(flush, 0, Mux(kept < shift, kept, shift))),
            spare.eq(kept - borrowed),
            reach.eq(stock + borrowed),
            give.eq(Mux(left < reach, left, reach)),
        ]
        ended = Signal()  # the length's last dword goes now
        m.d.comb += ended.eq(left == give)

        def send(last):
            return [
                self.o.valid.eq(~refused), out.header.eq(held), out.data.eq(moved), out.dword_count.eq(give), out.first.eq(~begun),
                out.last.eq(last), out.damaged.eq(0), begun.eq(1), left.eq(left - give),
                *([out.pasid.eq(held_pasid)] if self.has_pasid else []),
            ]

        def log(found, which):
            return [self.malformed.found.eq(found), *([] if header_at else [self.malformed.header.eq(which)])]

        def damage(is_damaged):
            return [out.damaged.eq(is_damaged), *log(is_damaged & ~refused, raw_held)]

        m.d.sync += self.malformed.found.eq(0)
        if header_at:  # no header ends in the cycle in which the TLP in front of it turns out to be damaged
            m.d.comb += self.malformed.header.eq(raw_held)
        with m.If(go):
            m.d.sync += [self.o.valid.eq(0), flush.eq(0)]
            with m.If(flush):
                m.d.sync += send(1)
                m.d.sync += [holding.eq(0), *damage((left != give) | (stock != give))]
            with m.If(at_payload):
                m.d.sync += [hold.eq(beat.data), stock.eq(spare), holding.eq(1)]
                with m.If(holding):
                    m.d.sync += send(ended | (beat.last & (spare == 0)))
                    with m.If(ended):
                        m.d.sync += [dropping.eq(1), *damage(~beat.last | (spare != 0))]
                    with m.Elif(beat.last):
                        m.d.sync += [flush.eq(spare != 0), *damage(spare == 0)]
                with m.Elif(beat.last):
                    m.d.sync += flush.eq(1)
            with m.If(at_header):
                m.d.sync += [
                    held.eq(header),
                    *([held_pasid.eq(beat.pasid)] if self.has_pasid else []),
                    raw_held.eq(raw),
                    refused.eq(breaks_rules),
                    shift.eq(Mux(wide, shifts[1], shifts[0])),
                    left.eq(Mux(has_data, header.length_dw, 0)),
                    begun.eq(0),
                    hold.eq(beat.data),
                    stock.eq(kept - Mux(wide, 4 - header_at * lanes, 3 - header_at * lanes)),
                    holding.eq(Mux(wide, shifts[1], shifts[0]) != 0),
                    flush.eq(beat.last & known & whole),
                    dropping.eq(~(known & whole)),
                ]
                with m.If(~(known & whole) | breaks_rules):
                    m.d.sync += log(1, raw)
            with m.Elif(beat_valid & beat.last & (index < header_at)):
                m.d.sync += [*log(1, raw), raw_held.eq(raw)]
        return m

    def _breaks_rules(self, m, header):
        """Return whether a TLP of a known type with this ``header`` is malformed."""
        first_be, last_be, length, offset = header.first_be, header.last_be, header.length_dw, header.address[:12]
        is_memory = (header.type == pcie.TYPE_MEMORY) | (header.type == pcie.TYPE_MEMORY_LOCKED)
        is_register = is_config(header) | (header.type == pcie.TYPE_IO)
        is_one, bad_enables, bad_atomic, found = Signal(), Signal(), Signal(), Signal()
        # Byte enables: without gaps unless all lies in one aligned 8 bytes. [PCIe5 2.2.5]
        runs_up = Cat(first_be == enables for enables in (0b1111, 0b1110, 0b1100, 0b1000)).any()
        runs_down = Cat(last_be == enables for enables in (0b1111, 0b0111, 0b0011, 0b0001)).any()
        has_gaps = ~(runs_up & runs_down) & ((length > 2) | offset[2])
        # AtomicOps: operands of 4 or 8 bytes, CAS of 16 as well and with two of them, naturally aligned. [PCIe5 2.2.7]
        is_cas = header.type == pcie.TYPE_CAS
        operand = Mux(is_cas, length[1:], length)  # dwords
        exists = (operand == 1) | (operand == 2) | (is_cas & (operand == 4))
        m.d.comb += [
            is_one.eq(length == 1),
            bad_enables.eq(Mux(is_one, last_be != 0, (first_be == 0) | (last_be == 0) | has_gaps)),
            bad_atomic.eq(~exists | (is_cas & length[0]) | (offset[2:4] & (operand - 1)[:2]).any()),
            found.eq(
                (header.fmt[pcie.FMT_DATA] & (length > (32 << self.max_payload)))
                | (is_memory & (bad_enables | (offset[2:] + length > 1024)))
                | (is_register & (~is_one | (last_be != 0) | (header.tc != 0)))
                | ((header.type[2:] == pcie.TYPE_FETCH_ADD >> 2) & bad_atomic)
                | (is_message(header) & ((header.message_code | 1) != pcie.MESSAGE_VENDOR_1) & (header.tc != 0))),
        ]  # fmt: skip
        return found


class RawTransmitter(wiring.Component):
    """Puts headers into the line: TLP beats in, raw beats out.

    Latency: 1 cycle. Throughput: one raw beat per cycle; a TLP of P payload and H header dwords takes ceil((P + H) / lanes) of them.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    has_pasid : :class:`bool`
        TLPs may have a PASID, which goes on beside them.

    Members
    -------
    i : ``In(stream.Signature(TlpBeat(width, has_pasid)))``
        From the transaction layer.
    o : ``Out(stream.Signature(RawBeat(width)))``, or of ``PasidBeat(width)``
        To the link.
    """

    def __init__(self, *, width, has_pasid=False):
        self.width, self.has_pasid = width, has_pasid
        super().__init__({
            "i": In(stream.Signature(TlpBeat(width, has_pasid))),
            "o": Out(stream.Signature(PasidBeat(width) if has_pasid else RawBeat(width))),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, beat, out = self.width // 32, self.i.payload, self.o.payload
        dwords = Cat(encode(m, "dword", beat.header))
        wide = beat.header.fmt[pcie.FMT_4DW]
        pure = [size // lanes for size in (3, 4)]  # beats of nothing but header
        shifts = [size % lanes for size in (3, 4)]

        sent = Signal(range(max(pure) + 1))  # pure header beats of this TLP that have left
        carry, shift, flush = Signal(128), Signal(range(max(shifts) + 1)), Signal()
        flush_count = Signal(range(lanes + 1))
        now_shift, pure_count = Signal.like(shift), Signal.like(sent)
        lead = Signal(128)  # dwords in front of this beat's
        m.d.comb += [
            now_shift.eq(Mux(beat.first, Mux(wide, shifts[1], shifts[0]), shift)),
            pure_count.eq(Mux(wide, pure[1], pure[0])),
            lead.eq(Mux(beat.first, Mux(wide, dwords[32 * lanes * pure[1] :], dwords[32 * lanes * pure[0] : 96]), carry)),
        ]
        merged = Signal(self.width + 128)
        with m.Switch(now_shift):
            for value in sorted(set(shifts)):
                with m.Case(value):
                    m.d.comb += merged.eq(Cat(lead[: 32 * value], beat.data))
        total = Signal(range(lanes + 5))
        m.d.comb += total.eq(now_shift + beat.dword_count)

        go, heading = Signal(), Signal()
        only = (shifts[0] == 0) if shifts[0] == shifts[1] else Mux(wide, shifts[1] == 0, shifts[0] == 0)
        headless = Signal()  # this pure header beat is the end of the TLP
        m.d.comb += [
            go.eq(~self.o.valid | self.o.ready),
            heading.eq(beat.first & (sent != pure_count)),
            headless.eq(only & beat.last & (beat.dword_count == 0) & (sent + 1 == pure_count)),
            self.i.ready.eq(go & ~flush & (~heading | headless)),
        ]

        def ones(count):
            return (1 << count) - 1

        with m.If(go):
            m.d.sync += self.o.valid.eq(0)
            if self.has_pasid:
                m.d.sync += out.pasid.eq(beat.pasid)
            with m.If(flush):
                m.d.sync += [
                    self.o.valid.eq(1), out.data.eq(carry), out.keep.eq(ones(flush_count)), out.first.eq(0), out.last.eq(1), flush.eq(0),
                ]
            with m.Elif(self.i.valid & heading):
                m.d.sync += [
                    self.o.valid.eq(1), out.keep.eq(ones(lanes)), out.first.eq(sent == 0),
                    out.last.eq(headless),
                    sent.eq(Mux(headless, 0, sent + 1)),
                ]
                with m.Switch(sent):
                    for n in range(max(pure)):
                        with m.Case(n):
                            m.d.sync += out.data.eq(dwords[32 * lanes * n :][: self.width])
            with m.Elif(self.i.valid):
                m.d.sync += [
                    self.o.valid.eq(1),
                    out.data.eq(merged), out.first.eq(beat.first & (pure_count == 0)), out.last.eq(beat.last & (total <= lanes)),
                    out.keep.eq(ones(Mux(total < lanes, total, lanes))),
                    carry.eq(merged[self.width :]), shift.eq(now_shift), sent.eq(0),
                    flush.eq(beat.last & (total > lanes)), flush_count.eq(total - lanes),
                ]
        return m


class RawPhy(wiring.Component):
    """Link adapter of the raw TLP link: :class:`RawReceiver` and :class:`RawTransmitter`.

    With ``has_pasid`` :class:`.pasid.PasidRemover` and :class:`.pasid.PasidInserter` stand between them and the link.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    has_pasid : :class:`bool`
        TLPs may have a PASID.

    Members
    -------
    i, o : raw streams
        From and to the link.
    received, to_send : TLP streams
        To and from the transaction layer.
    max_payload, malformed
        See :class:`RawReceiver`.

    Raises
    ------
    :exc:`ValueError`
        If the width is not one of these.
    """

    def __init__(self, *, width, has_pasid=False):
        if width not in WIDTHS:
            raise ValueError(f"Link width must be 64, 128, 256 or 512 bits, not {width!r}")
        self.width, self.has_pasid = width, has_pasid
        super().__init__({
            "i": In(stream.Signature(RawBeat(width))),
            "o": Out(stream.Signature(RawBeat(width))),
            "received": Out(stream.Signature(TlpBeat(width, has_pasid))),
            "to_send": In(stream.Signature(TlpBeat(width, has_pasid))),
            "max_payload": In(3),
            "malformed": Out(Malformed),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.receiver = receiver = RawReceiver(width=self.width, has_pasid=self.has_pasid)
        m.submodules.transmitter = transmitter = RawTransmitter(width=self.width, has_pasid=self.has_pasid)
        source, sink = wiring.flipped(self.i), wiring.flipped(self.o)
        if self.has_pasid:
            m.submodules.remover = remover = PasidRemover(width=self.width)
            m.submodules.inserter = inserter = PasidInserter(width=self.width)
            wiring.connect(m, source, remover.i)
            wiring.connect(m, inserter.o, sink)
            source, sink = remover.o, inserter.i
        wiring.connect(m, source, receiver.i)
        wiring.connect(m, receiver.o, wiring.flipped(self.received))
        wiring.connect(m, wiring.flipped(self.to_send), transmitter.i)
        wiring.connect(m, transmitter.o, sink)
        m.d.comb += [receiver.max_payload.eq(self.max_payload), self.malformed.eq(receiver.malformed)]
        return m
