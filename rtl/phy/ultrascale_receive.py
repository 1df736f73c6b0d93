"""From the UltraScale+ hard block: descriptors to headers, broken packets to nothing."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..spec import ultrascale as spec
from ..stream.queue import Queue
from ..stream.transaction import TransactionQueue
from ..tlp.layouts import TlpBeat
from .ultrascale_axis import AxisBeat, Unpacker

OFFSET_BITS = 39  # of an address in :func:`bar_address`
ORIGINS = 8  # non-posted requests that may wait in the card; the block sends half of them


def bar_address(function, bar):
    """Return the address, a Python or an Amaranth value, at which BAR ``bar`` of ``function`` lies inside the card.

    The block owns the base addresses and names function and BAR instead; inside the card each BAR has this place.
    """
    return 1 << OFFSET_BITS | bar << OFFSET_BITS + 1 | function << OFFSET_BITS + 4


class Origin(data.Struct):
    """A request as the block gave it; its answer needs that again when it says UR or CA."""

    descriptor: 128
    first_be: 4
    last_be: 4


class CqReceiver(wiring.Component):
    """Requests of the host: packets of the completer request interface in, whole TLPs out.

    A memory or I/O request gets the address :func:`bar_address` plus its offset in the BAR, as far as the block says that the
    BAR reaches. A packet that was discontinued, whose type is none of the known, whose payload is not as long as its descriptor says or
    longer than ``max_payload``, and an I/O request of other than one dword, is dropped whole with a pulse of ``malformed``: nothing of it
    has left before. None disturbs the next.

    Non-posted requests: every one that goes on is in ``origins``, every one that is dropped sets ``refused`` for a cycle.

    Latency: 4 cycles from the last beat. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    max_payload : :class:`int`
        Bytes: the largest payload that the block can be configured for.

    Members
    -------
    i : ``In(stream.Signature(AxisBeat(width)))``
        Packets.
    o : ``Out(stream.Signature(TlpBeat(width)))``
        TLPs; one that has begun has no bubbles.
    origins : ``Out(stream.Signature(Origin))``
        The non-posted requests of ``o``, in their order. While 8 of them wait nothing is taken.
    refused, malformed : ``Out(1)``
        Pulses; ``discontinued``, beside ``malformed``: the block itself had said so.
    discontinued : ``Out(1)``
    """

    def __init__(self, *, width, max_payload):
        self.width, self.max_payload = width, max_payload
        super().__init__({
            "i": In(stream.Signature(AxisBeat(width))),
            "o": Out(stream.Signature(TlpBeat(width))),
            "origins": Out(stream.Signature(Origin)),
            "refused": Out(1),
            "malformed": Out(1),
            "discontinued": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        beats = self.max_payload * 8 // self.width
        m.submodules.unpacker = unpacker = Unpacker(width=self.width, size=spec.CQ_DWORDS)
        m.submodules.whole = whole = TransactionQueue(TlpBeat(self.width), 2 * max(beats, 8))
        wiring.connect(m, wiring.flipped(self.i), unpacker.i)
        m.submodules.waiting = waiting = Queue(Origin, ORIGINS)
        wiring.connect(m, whole.o, wiring.flipped(self.o))
        wiring.connect(m, waiting.o, wiring.flipped(self.origins))

        beat, d = unpacker.o.payload, unpacker.o.payload.descriptor
        out, header = whole.i.payload, whole.i.payload.header
        kind, length = d[75:79], d[64:75]
        known, has_data, is_message, is_io, posted = Signal(), Signal(), Signal(), Signal(), Signal()
        types = {
            spec.READ: (pcie.TYPE_MEMORY, 0), spec.WRITE: (pcie.TYPE_MEMORY, 1), spec.IO_READ: (pcie.TYPE_IO, 0),
            spec.IO_WRITE: (pcie.TYPE_IO, 1), spec.FETCH_ADD: (pcie.TYPE_FETCH_ADD, 1), spec.SWAP: (pcie.TYPE_SWAP, 1),
            spec.CAS: (pcie.TYPE_CAS, 1), spec.READ_LOCKED: (pcie.TYPE_MEMORY_LOCKED, 0),
        }  # fmt: skip
        with m.Switch(kind):
            for code, (tlp_type, with_data) in types.items():
                with m.Case(code):
                    m.d.comb += [known.eq(1), header.type.eq(tlp_type), has_data.eq(with_data), is_io.eq(tlp_type == pcie.TYPE_IO)]
            with m.Case(spec.MESSAGE, spec.MESSAGE_VENDOR, spec.MESSAGE_ATS):
                m.d.comb += [known.eq(1), header.type.eq(Cat(d[112:115], Const(0b10, 2))), has_data.eq(length != 0), is_message.eq(1)]
        reach = Signal(OFFSET_BITS)  # ones where the address is an offset in the BAR
        with m.Switch(d[115:121]):
            for bits in range(OFFSET_BITS):
                with m.Case(bits):
                    m.d.comb += reach.eq((1 << bits) - 1)
            with m.Default():
                m.d.comb += reach.eq(-1)
        m.d.comb += [
            posted.eq(is_message | (kind == spec.WRITE)),
            header.fmt.eq(Cat(~is_io, has_data)),
            header.tc.eq(d[121:124]),
            header.no_snoop.eq(d[124]), header.relaxed_ordering.eq(d[125]), header.id_based_ordering.eq(d[126]),
            header.requester_id.eq(d[80:96]), header.tag.eq(d[96:104]), header.length_dw.eq(length),
        ]
        with m.If(is_message):
            m.d.comb += header.message_code.eq(d[104:112])
        with m.Else():
            m.d.comb += [
                header.at.eq(d[0:2]), header.first_be.eq(beat.first_be), header.last_be.eq(beat.last_be),
                header.address.eq(bar_address(d[104:107], d[112:115]) | (Cat(Const(0, 2), d[2:OFFSET_BITS]) & reach)),
            ]

        # Dwords that came up to the beat in front of this one; saturates beyond what a TLP may have.
        came, now = Signal(12), Signal(12)
        limit = self.max_payload // 4
        dropping, bad, over, take = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            now.eq(Mux(beat.first, 0, came) + beat.dword_count),
            over.eq((now > limit) | (~beat.last & (beat.dword_count != self.width // 32))),
            bad.eq(
                ~known | beat.discontinue | over | dropping | (now != Mux(has_data, length, 0))
                | (is_io & ((length != 1) | (beat.last_be != 0)))
            ),
            out.data.eq(beat.data), out.dword_count.eq(beat.dword_count), out.first.eq(beat.first), out.last.eq(beat.last),
            # What is too long stops to fill the queue, so that it cannot fill it.
            whole.i.valid.eq(unpacker.o.valid & waiting.i.ready & ~over & ~dropping),
            unpacker.o.ready.eq((waiting.i.ready & whole.i.ready) | over | dropping),
            take.eq(unpacker.o.valid & unpacker.o.ready),
            whole.commit.eq(take & beat.last & ~bad),
            whole.rollback.eq(take & beat.last & bad),
            waiting.i.valid.eq(whole.commit & ~posted),
            waiting.i.payload.descriptor.eq(d),
            waiting.i.payload.first_be.eq(beat.first_be), waiting.i.payload.last_be.eq(beat.last_be),
            self.refused.eq(whole.rollback & ~posted),
            self.malformed.eq(whole.rollback | unpacker.malformed),
            self.discontinued.eq((whole.rollback & beat.discontinue) | (unpacker.malformed & self.i.payload.discontinue)),
        ]
        with m.If(take):
            m.d.sync += [came.eq(now), dropping.eq(~beat.last & (dropping | over))]
        return m


class RcReceiver(wiring.Component):
    """Completions for our requests: packets of the requester completion interface in, TLPs out.

    What the block found wrong with a completion is in its error code: a poisoned one, and one with a status that is an error, goes on as
    it came. Any other code (wrong length, wrong fields, wrong address, unknown tag; request timed out or ended by a reset, where
    there is no TLP at all) is dropped whole with a pulse of ``malformed``, so that a request that gets nothing else ends by the
    card's own completion timeout. A discontinued completion is dropped, or becomes one that ends before its length, which counts for
    nothing. None disturbs the next.

    Latency: 1 cycle from the beat that completes a beat of payload; 2 for the last. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.

    Members
    -------
    i : ``In(stream.Signature(AxisBeat(width)))``
        Packets.
    o : ``Out(stream.Signature(TlpBeat(width)))``
        Completions.
    malformed : ``Out(1)``
        Pulse; ``discontinued``, beside it: the block itself had found what is wrong.
    discontinued : ``Out(1)``
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "i": In(stream.Signature(AxisBeat(width))),
            "o": Out(stream.Signature(TlpBeat(width))),
            "malformed": Out(1),
            "discontinued": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.unpacker = unpacker = Unpacker(width=self.width, size=spec.RC_DWORDS)
        wiring.connect(m, wiring.flipped(self.i), unpacker.i)
        beat, d = unpacker.o.payload, unpacker.o.payload.descriptor
        out, header = self.o.payload, self.o.payload.header
        code, length = d[12:16], d[32:43]
        good, cut, gone, ends_badly = Signal(), Signal(), Signal(), Signal()
        with m.Switch(code):
            with m.Case(spec.ERROR_NONE, spec.ERROR_POISONED, spec.ERROR_STATUS):
                m.d.comb += good.eq(1)
        m.d.comb += [
            cut.eq(beat.last & beat.discontinue),
            gone.eq(~good | (cut & beat.first)),
            header.fmt.eq(Mux(length != 0, 1 << pcie.FMT_DATA, 0)),
            header.type.eq(Mux(d[29], pcie.TYPE_COMPLETION_LOCKED, pcie.TYPE_COMPLETION)),
            header.lower_address.eq(d[0:7]),
            header.byte_count.eq(d[16:29]),
            header.length_dw.eq(length),
            header.status.eq(d[43:46]),
            header.poisoned.eq(d[46] | (code == spec.ERROR_POISONED)),
            header.requester_id.eq(d[48:64]),
            header.tag.eq(d[64:72]),
            header.completer_id.eq(d[72:88]),
            header.tc.eq(d[89:92]),
            header.no_snoop.eq(d[92]), header.relaxed_ordering.eq(d[93]), header.id_based_ordering.eq(d[94]),
            out.data.eq(beat.data), out.first.eq(beat.first), out.last.eq(beat.last),
            out.dword_count.eq(Mux(cut, 0, beat.dword_count)),
            self.o.valid.eq(unpacker.o.valid & ~gone),
            unpacker.o.ready.eq(self.o.ready | gone),
            ends_badly.eq(unpacker.o.valid & unpacker.o.ready & beat.last & (cut | ~good)),
            self.malformed.eq(unpacker.malformed | ends_badly),
            self.discontinued.eq(ends_badly | (unpacker.malformed & self.i.payload.discontinue)),
        ]
        return m
