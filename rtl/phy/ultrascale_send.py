"""To the UltraScale+ hard block: headers to descriptors, and the order between its two ways out."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..spec import ultrascale as spec
from ..stream.queue import Queue
from ..tlp.codec import is_completion, is_message
from ..tlp.layouts import TlpBeat
from .ultrascale_axis import AxisBeat, Packer
from .ultrascale_receive import Origin

POSTED_IN_FLIGHT = 31  # posted requests of which the block has not yet said that they are on their way: 5 bits tell them apart
POSTED_MARK = 1 << spec.SEQ_BITS - 1  # this bit of a sequence number marks a posted request; others have number 0
PLACE_BITS = 12  # of a place in the order
REASON_DWORDS = 5  # behind the descriptor of a completion that says UR or CA


class SequenceReport(data.Struct):
    """The block says that this request can no longer be overtaken by a completion that is yet to come."""

    valid: 1
    number: spec.SEQ_BITS


class Sender(wiring.Component):
    """Our TLPs: one stream in transmit order in, requests to RQ and completions to CC.

    A completion does not leave before every posted request in front of it in ``i`` was reported sent, and posted requests do not wait for
    completions (as long as no more than ``completion_beats`` of them wait). At most 31 posted requests are on their way unreported. A
    report of a later one counts for those before it. When none comes for ``order_cycles`` all are taken as sent, with a pulse of ``lost``:
    the block drops requests of a function that is no bus master without a word. [PCIe5 2.4.1]

    Completions leave in the order of ``origins``, one for each. One that says UR or CA has the request behind its descriptor, for the
    block's error log. Messages go nowhere: errors are the block's to report, and its own requests know no other.

    Completions whose tag has bit 9 set are answers to :class:`.ultrascale_config.ConfigMirror`: they leave with a pulse of ``mirrored``.

    Latency: 2 cycles for requests, 4 for completions. Throughput: one beat per cycle. A TLP whose beats come without bubbles leaves
    without.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    completion_beats : :class:`int`
        Beats of completions that may wait.
    order_cycles : :class:`int`
        At least 64.

    Members
    -------
    i : ``In(stream.Signature(TlpBeat(width)))``
        Memory requests, AtomicOps, completions, messages.
    origins : ``In(stream.Signature(Origin))``
        What the completions answer; one that comes without has no request behind it.
    rq, cc : ``Out(stream.Signature(AxisBeat(width)))``
        Packets; ``rq`` with ``sequence``.
    reports : ``In(SequenceReport).array(2)``
        From the block; number 0 in front of number 1.
    answered, mirrored, lost : ``Out(1)``
        Pulses; ``answered``: a completion has left.

    Raises
    ------
    :exc:`ValueError`
        If ``order_cycles`` is below 64.
    """

    def __init__(self, *, width, completion_beats, order_cycles):
        if order_cycles < 64:
            raise ValueError(f"Patience with the block's reports must be at least 64 cycles, not {order_cycles!r}")
        self.width, self.completion_beats, self.order_cycles = width, completion_beats, order_cycles
        packets = stream.Signature(AxisBeat(width))
        super().__init__({
            "i": In(stream.Signature(TlpBeat(width))),
            "origins": In(stream.Signature(Origin)),
            "rq": Out(packets),
            "cc": Out(packets),
            "reports": In(SequenceReport).array(2),
            "answered": Out(1),
            "mirrored": Out(1),
            "lost": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.rq = rq = Packer(width=self.width, size=spec.RQ_DWORDS)
        m.submodules.cc = cc = Packer(width=self.width, size=spec.CC_DWORDS)
        waiting_layout = data.StructLayout({"beat": TlpBeat(self.width), "place": PLACE_BITS})
        m.submodules.waiting = waiting = Queue(waiting_layout, self.completion_beats)
        wiring.connect(m, rq.o, wiring.flipped(self.rq))
        wiring.connect(m, cc.o, wiring.flipped(self.cc))

        # The order: how many posted requests went in, and how many the block has reported.
        begun, sent = Signal(PLACE_BITS), Signal(PLACE_BITS)
        after, patience = [sent], Signal(range(self.order_cycles))
        for n, report in enumerate(self.reports):
            kept = Signal(SequenceReport, name=f"report_{n}")
            ahead, place = Signal(5, name=f"ahead_{n}"), Signal(PLACE_BITS, name=f"sent_{n}")
            m.d.sync += kept.eq(report)
            m.d.comb += [
                ahead.eq(kept.number[:5] - after[-1][:5]),
                place.eq(after[-1] + Mux(kept.valid & kept.number[5] & (ahead <= (begun - after[-1])[:PLACE_BITS]), ahead, 0)),
            ]
            after.append(place)
        m.d.sync += [sent.eq(after[-1]), patience.eq(patience + 1)]
        with m.If((after[-1] != sent) | (begun == sent)):
            m.d.sync += patience.eq(0)
        with m.Elif(patience == self.order_cycles - 1):
            m.d.comb += self.lost.eq(1)
            m.d.sync += [sent.eq(begun), patience.eq(0)]

        # Which way a TLP goes is decided by its first beat.
        beat = self.i.payload
        header = beat.header
        to_cc, to_nobody, held = Signal(), Signal(), Signal()
        kept_cc, kept_nobody = Signal(), Signal()
        posted, counted = Signal(), Signal()  # the posted request at ``i`` is in ``begun``
        m.d.comb += [
            to_cc.eq(Mux(beat.first, is_completion(header) & ~header.tag[9], kept_cc)),
            to_nobody.eq(Mux(beat.first, (is_completion(header) & header.tag[9]) | is_message(header), kept_nobody)),
            posted.eq(header.fmt[pcie.FMT_DATA] & (header.type == pcie.TYPE_MEMORY)),
            held.eq(beat.first & posted & ~counted & ((begun - sent)[:PLACE_BITS] >= POSTED_IN_FLIGHT)),
            rq.i.valid.eq(self.i.valid & ~to_cc & ~to_nobody & ~held),
            waiting.i.valid.eq(self.i.valid & to_cc),
            self.i.ready.eq(Mux(to_nobody, 1, Mux(to_cc, waiting.i.ready, rq.i.ready & ~held))),
            waiting.i.payload.beat.eq(beat),
            waiting.i.payload.place.eq(begun),
            self.mirrored.eq(self.i.valid & to_nobody & beat.first & is_completion(header)),
        ]
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [kept_cc.eq(to_cc), kept_nobody.eq(to_nobody)]

        # Requests. A packet's first beat may be offered for several cycles: it counts once, when its descriptor is begun.
        number = Signal(5)
        starts = rq.i.valid & beat.first & posted & ~counted
        m.d.comb += rq.sequence.eq(Mux(posted, POSTED_MARK | number, 0))
        m.d.comb += number.eq(begun + starts)
        with m.If(rq.i.valid & rq.i.ready):
            m.d.sync += counted.eq(0)
        with m.Elif(starts):
            m.d.sync += counted.eq(1)
        m.d.sync += begun.eq(begun + starts)

        q = rq.i.payload
        kind = Signal(4)
        with m.Switch(header.type):
            for tlp_type, code in ((pcie.TYPE_FETCH_ADD, spec.FETCH_ADD), (pcie.TYPE_SWAP, spec.SWAP), (pcie.TYPE_CAS, spec.CAS)):
                with m.Case(tlp_type):
                    m.d.comb += kind.eq(code)
            with m.Default():
                m.d.comb += kind.eq(Mux(header.fmt[pcie.FMT_DATA], spec.WRITE, spec.READ))
        attributes = Cat(header.tc, header.no_snoop, header.relaxed_ordering, header.id_based_ordering, Const(0, 1))
        m.d.comb += [
            # Requester ID Enable is 0: the block puts in its own bus number.
            q.descriptor.eq(Cat(
                header.at, header.address[2:], header.length_dw, kind, header.poisoned, header.requester_id, header.tag[:8],
                Const(0, 16), Const(0, 1), attributes)),
            q.first_be.eq(header.first_be), q.last_be.eq(header.last_be),
            q.data.eq(beat.data), q.dword_count.eq(beat.dword_count), q.first.eq(beat.first), q.last.eq(beat.last),
        ]

        # Completions.
        c, old = cc.i.payload, waiting.o.payload.beat
        h = old.header
        inside, due = Signal(), Signal()  # the first beat has left; it may leave
        # UR and CA: the request as it came, in as many beats as it takes.
        origin, is_reasoned = self.origins.payload, Signal()
        parts = -(-REASON_DWORDS * 32 // self.width)
        part = Signal(range(parts + 1))
        reason = Signal(parts * self.width)
        m.d.comb += [
            is_reasoned.eq(self.origins.valid & old.first & old.last & ((h.status == pcie.STATUS_UR) | (h.status == pcie.STATUS_CA))),
            reason.eq(Cat(origin.first_be, origin.last_be, Const(0, 24), origin.descriptor)),
            self.origins.ready.eq(waiting.o.valid & waiting.o.ready & old.last),
        ]
        m.d.comb += [
            due.eq(inside | ~(sent - waiting.o.payload.place)[PLACE_BITS - 1]),
            cc.i.valid.eq(waiting.o.valid & due),
            waiting.o.ready.eq(cc.i.ready & due & (~is_reasoned | (part == parts - 1))),
            self.answered.eq(cc.o.valid & cc.o.ready & cc.o.payload.last),
            c.descriptor.eq(Cat(
                h.lower_address, Const(0, 1), Mux(self.origins.valid, origin.descriptor[:2], 0), Const(0, 6), h.byte_count,
                h.type == pcie.TYPE_COMPLETION_LOCKED, Const(0, 2), h.length_dw, h.status, h.poisoned, Const(0, 1), h.requester_id,
                h.tag[:8], h.completer_id, Const(0, 1), h.tc, h.no_snoop, h.relaxed_ordering, h.id_based_ordering, Const(0, 1))),
            c.data.eq(old.data), c.dword_count.eq(old.dword_count), c.first.eq(old.first), c.last.eq(old.last),
        ]
        with m.If(is_reasoned):
            m.d.comb += [
                c.data.eq(reason.word_select(part, self.width)), c.first.eq(part == 0), c.last.eq(part == parts - 1),
                c.dword_count.eq(Mux(part == parts - 1, REASON_DWORDS - (parts - 1) * self.width // 32, self.width // 32)),
            ]
            with m.If(cc.i.valid & cc.i.ready):
                m.d.sync += part.eq(Mux(part == parts - 1, 0, part + 1))
        with m.If(cc.i.valid):  # once offered it stays
            m.d.sync += inside.eq(~(cc.i.ready & c.last))
        return m
