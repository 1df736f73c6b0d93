"""A function's ring accesses on their way to gate and requester, and the ends of them on their way back."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.queue import Queue
from ..tlp.layouts import Burst, BurstData, BurstDone, BurstStatus
from .layouts import ANSWER_BITS, RingAccess
from .ring_layouts import LineAccess

DEPTH = 32  # accesses that wait
FETCH_ROOM, USED_ROOM = 16, 10  # of them, kept free for who comes while there is room and after it fell: the used side may go further
READS = 64  # that may be under way: as many as the requester has space for
WRITES = 16  # that the requester takes in without holding up its port


class Lane(wiring.Component):
    """Carries the ring accesses of the fetch side and of the used side, those of each in order.

    The used side goes first; it cannot starve the other, since it has only that to write which was fetched.

    Latency: 3 cycles from an access to its burst. Throughput: 1 access per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    function, client : :class:`int`
        Identify the bursts at gate and requester.

    Members
    -------
    fetch : ``In(stream.Signature(LineAccess))``
        Accesses of the fetch side.
    used : ``In(stream.Signature(RingAccess(width)))``
        Accesses of the used side.
    room, used_room : ``Out(1)``
        A few more accesses of either are taken without a wait for memory.
    bursts, write_data, write_done, read_data
        Towards gate and requester.
    lines, answers : ``Out(stream.Signature(BurstData(width)))``
        Answers for the fetch side, and for the used side.
    stored : ``In(1)``
        Pulse: the fetch side has an answer.
    used_done : ``Out(stream.Signature(BurstDone))``
        Ends of the used side's writes.
    failed : ``Out(1)``
        Pulse: a write of the fetch side did not end OK.
    quiet : ``Out(1)``
        Nothing waits, nothing is under way.
    """

    def __init__(self, *, width, function, client):
        self.width, self.function, self.client = width, function, client
        beats = stream.Signature(BurstData(width))
        super().__init__({
            "fetch": In(stream.Signature(LineAccess)),
            "used": In(stream.Signature(RingAccess(width))),
            "room": Out(1),
            "used_room": Out(1),
            "bursts": Out(stream.Signature(Burst)),
            "write_data": Out(beats),
            "write_done": In(stream.Signature(BurstDone)),
            "read_data": In(beats),
            "lines": Out(beats),
            "answers": Out(beats),
            "stored": In(1),
            "used_done": Out(stream.Signature(BurstDone)),
            "failed": Out(1),
            "quiet": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        row_bytes = max(self.width, 128) // 8
        layout = data.StructLayout({
            "iova": 64, "length_bytes": 7, "is_write": 1, "cookie": ANSWER_BITS, "short": 32, "data": 8 * row_bytes, "is_used": 1,
            "crosses": 1,  # a write into the second beat of a row
        })
        place_bits, beats = (row_bytes - 1).bit_length(), 8 * row_bytes // self.width
        m.submodules.waiting = waiting = Queue(layout, DEPTH, in_block=True)
        m.submodules.rows = rows = Queue(BurstData(self.width), beats * WRITES, in_block=True)
        wiring.connect(m, rows.o, wiring.flipped(self.write_data))

        fetch, from_fetch, from_used = self.fetch.payload, Signal(layout), Signal(layout)
        m.d.comb += [
            waiting.i.valid.eq(self.fetch.valid | self.used.valid),
            waiting.i.payload.eq(Mux(self.used.valid, from_used, from_fetch)),
            self.fetch.ready.eq(waiting.i.ready & ~self.used.valid),
            self.used.ready.eq(waiting.i.ready),
            from_fetch.iova.eq(fetch.iova),
            from_fetch.length_bytes.eq(fetch.length_bytes),
            from_fetch.is_write.eq(fetch.is_write),
            from_fetch.cookie.eq(fetch.cookie),
            from_fetch.short.eq(fetch.data),
            from_fetch.data.eq(self.used.payload.data),  # there is no other
            from_fetch.is_used.eq(0),
            [from_used[name].eq(self.used.payload[name]) for name in ("iova", "length_bytes", "is_write", "cookie", "data")],
            from_used.short.eq(Cat(self.used.payload.index, fetch.data[16:])),
            from_used.is_used.eq(1),
        ]
        if beats == 2:  # what the fetch side writes, an event, lies at a multiple of its length
            at = from_used.iova[:place_bits]
            m.d.comb += from_used.crosses.eq(from_used.is_write & (at + from_used.length_bytes > self.width // 8) & ~at[-1])
        # What leaves: a burst, and the rows of a write behind it, in the cycle after.
        head = waiting.o.payload
        burst, done = self.bursts.payload, self.write_done
        reads, writes, level = Signal(range(2 * READS)), Signal(range(WRITES + 1)), Signal(range(DEPTH + 1))
        place, sent, second, may_leave = head.iova[:place_bits], Signal(), Signal(), Signal()
        keep = Signal(row_bytes)
        m.d.comb += [
            keep.eq(((1 << head.length_bytes) - 1)[:row_bytes] << place),
            may_leave.eq(Mux(head.is_write, writes != WRITES, reads < READS)),  # rows have room for as many
            self.bursts.valid.eq(waiting.o.valid & may_leave & ~second),
            burst.address.eq(head.iova),
            burst.length_bytes.eq(head.length_bytes),
            burst.is_write.eq(head.is_write),
            burst.function.eq(self.function),
            burst.client.eq(self.client),
            burst.cookie.eq(Cat(head.cookie, head.is_used)),
            sent.eq(self.bursts.valid & self.bursts.ready),
            waiting.o.ready.eq((sent & ~head.crosses) | second),
        ]
        upper = (second | place[-1]) if beats == 2 else Const(0, 1)
        is_short = ~head.is_used | head.length_bytes[1]
        short = Cat(head.short[:16], Mux(head.length_bytes[1], head.short[:16], head.short[16:]))
        m.d.sync += [
            rows.i.valid.eq((sent & head.is_write) | second),
            rows.i.payload.first.eq(~second),
            rows.i.payload.last.eq(second | ~head.crosses),
            rows.i.payload.data.eq(Mux(is_short, short.replicate(self.width // 32), head.data.word_select(upper, self.width))),
            rows.i.payload.keep.eq(keep.word_select(upper, self.width // 8)),
            second.eq(sent & head.crosses),
        ]

        # What comes back: the highest bit of the cookie says whose it is.
        beat, is_answer, is_used_done = self.read_data.payload, Signal(), Signal()
        m.d.comb += [
            is_answer.eq(beat.cookie[ANSWER_BITS]),
            self.lines.payload.eq(beat),
            self.answers.payload.eq(beat),
            self.lines.valid.eq(self.read_data.valid & ~is_answer),
            self.answers.valid.eq(self.read_data.valid & is_answer),
            self.read_data.ready.eq(Mux(is_answer, self.answers.ready, self.lines.ready)),
            is_used_done.eq(done.payload.cookie[ANSWER_BITS]),
            self.used_done.payload.eq(done.payload),
            self.used_done.valid.eq(done.valid & is_used_done),
            done.ready.eq(self.used_done.ready | ~is_used_done),
            self.failed.eq(done.valid & ~is_used_done & (done.payload.status != BurstStatus.OK)),
        ]

        answered = self.answers.valid & self.answers.ready & beat.last
        m.d.comb += [
            self.quiet.eq((level == 0) & (reads == 0) & (writes == 0)),
        ]
        m.d.sync += [
            self.room.eq(level < DEPTH - FETCH_ROOM),  # of the cycle before: one more may have come
            self.used_room.eq(level < DEPTH - USED_ROOM),
            level.eq(level + (waiting.i.valid & waiting.i.ready) - (waiting.o.valid & waiting.o.ready)),
            reads.eq(reads + (sent & ~head.is_write) - self.stored - answered),
            writes.eq(writes + (sent & head.is_write) - (done.valid & done.ready)),
        ]
        return m
