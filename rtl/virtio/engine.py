"""The ring engine: split virtqueues of all functions, served by one state machine with queue contexts in memory."""

from dataclasses import dataclass

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..dma.layouts import Segment, WriterDone
from ..dma.reader import WIDTHS
from ..spec import virtio_ring as spec
from ..stream.queue import Queue
from ..stream.transaction import TransactionQueue
from ..tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, Hint
from .layouts import Chain, Notification, QueueCommand, QueueOperation

BLOCK_BYTES = 64  # ring reads stay inside one aligned block
DESCRIPTORS = BLOCK_BYTES // spec.DESCRIPTOR_BYTES
HEADS = BLOCK_BYTES // 2
BURST_ROOM = 4  # bursts that one event may issue
HINTS = 16


@dataclass(frozen=True)
class QueueDescription:
    """One virtqueue of the card: its function (position in the engine's ``functions``), its index there, its largest size."""

    function: int
    index: int = 0
    max_size: int = 256


class Kind(enum.Enum, shape=2):
    """What a ring read is for."""

    INDEX = 0
    HEADS = 1
    DESCRIPTORS = 2
    FLAGS = 3


class ReadCookie(data.Struct):
    """Cookie of a ring read: whose, what for, and where its first row lies in the aligned block."""

    queue: 6
    kind: Kind
    row: 3


class Context(data.Struct):
    """What the engine knows of one queue."""

    size_log2: 4
    descriptors: 64
    driver: 64
    device: 64
    taken: 16  # available entries taken so far (free-running)
    seen: 16  # available index last read
    used: 16  # used index
    head_at: 5  # in the queue's row of fetched heads
    heads_left: 6
    head: 16  # of the chain at work
    next: 16  # its next descriptor
    count: 17  # its descriptors so far
    readable: 32
    writable: 32
    is_writing: 1  # it has reached its writable part
    held: Segment  # its newest segment, until it is known whether another follows
    held_valid: 1
    held_is_write: 1


class RingBlock(data.Struct):
    """The answer of a ring read, at its place in the aligned 64-byte block."""

    block: 8 * BLOCK_BYTES
    cookie: ReadCookie
    ok: 1


class BlockCollector(wiring.Component):
    """Assembles the beats of one ring read at their place in the aligned 64-byte block.

    Latency: 1 cycle after the last beat. Throughput: one block at a time.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(BurstData(width))), "o": Out(stream.Signature(RingBlock))})

    def elaborate(self, platform):
        m = Module()
        rows = 8 * BLOCK_BYTES // self.width
        beat, cookie = self.i.payload, ReadCookie(self.i.payload.cookie[: ReadCookie.as_shape().size])
        row, at = Signal(range(rows) if rows > 1 else 1), Signal(3)
        m.d.comb += [at.eq(Mux(beat.first, cookie.row, row)), self.i.ready.eq(~self.o.valid)]
        with m.If(self.i.valid & self.i.ready):
            for n in range(rows):
                with m.If(at == n):
                    m.d.sync += self.o.payload.block.word_select(n, self.width).eq(beat.data)
            m.d.sync += [
                row.eq(at + 1),
                self.o.payload.cookie.eq(cookie),
                self.o.payload.ok.eq(beat.status == BurstStatus.OK),
                self.o.valid.eq(beat.last),
            ]
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        return m


class Lane(wiring.Component):
    """What the engine keeps per function: its bursts on the way out, ring reads on the way in.

    ``room`` is 1 while one event's bursts fit. ``quiet`` is 1 when nothing of the ring traffic is in flight.
    """

    def __init__(self, *, width):
        self.width = width
        write = data.StructLayout({"burst": Burst, "data": 64})
        super().__init__({
            "push": In(stream.Signature(write)),  # never stalls while ``room``
            "bursts": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(BurstData(width))),
            "write_done": In(stream.Signature(BurstDone)),
            "read_data": In(stream.Signature(BurstData(width))),
            "block": Out(stream.Signature(RingBlock)),
            "write_failed": Out(1),
            "room": Out(1),
            "quiet": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        depth = 2 * BURST_ROOM
        m.submodules.collector = collector = BlockCollector(width=self.width)
        m.submodules.bursts = bursts = Queue(Burst, depth)
        m.submodules.rows = rows = Queue(BurstData(self.width), 2 * depth)
        wiring.connect(m, wiring.flipped(self.read_data), collector.i)
        wiring.connect(m, collector.o, wiring.flipped(self.block))
        wiring.connect(m, bursts.o, wiring.flipped(self.bursts))
        wiring.connect(m, rows.o, wiring.flipped(self.write_data))

        # A write of up to 8 bytes never crosses a row: the engine cuts it before.
        burst, lane = self.push.payload.burst, self.push.payload.burst.address[: (lanes - 1).bit_length()]
        m.d.comb += [
            self.push.ready.eq(1),
            bursts.i.valid.eq(self.push.valid),
            bursts.i.payload.eq(burst),
            rows.i.valid.eq(self.push.valid & burst.is_write),
            rows.i.payload.data.eq(self.push.payload.data << (lane << 3)),
            rows.i.payload.keep.eq(((1 << burst.length_bytes[:4]) - 1)[:8] << lane),
            rows.i.payload.first.eq(1),
            rows.i.payload.last.eq(1),
        ]

        queued, flying = Signal(range(depth + 1)), Signal(10)
        sent = self.bursts.valid & self.bursts.ready
        ended_read = self.block.valid & self.block.ready
        ended_write = self.write_done.valid & self.write_done.ready
        m.d.comb += [
            self.write_done.ready.eq(1),
            self.write_failed.eq(ended_write & (self.write_done.payload.status != BurstStatus.OK)),
            self.room.eq((queued <= depth - BURST_ROOM) & ~flying[-1]),
            self.quiet.eq(flying == 0),
        ]
        m.d.sync += [
            queued.eq(queued + self.push.valid - sent),
            flying.eq(flying + self.push.valid - ended_read - ended_write),
        ]
        return m


class RingEngine(wiring.Component):
    """Serves split virtqueues: turns available descriptor chains into scatter lists, and finished ones into used entries.

    Chains of one function are handed on in the order in which they were found; a chain becomes visible only when its walk
    ended well. The used element is written after the chain's data was, the used index behind it, and a notification
    follows when the driver's flags, read behind the index, ask for it. [VIRTIO1.4 2.7]

    A ring that breaks a rule (available index jumps by more than the queue size, a head or next index beyond the queue, more
    descriptors than the queue has, a readable descriptor behind a writable one, INDIRECT, a sum beyond 2^32-1 bytes), or
    whose access fails, or a chain whose ``finished`` is not OK, gives ``needs_reset`` for its function; nothing more is read of that
    function's rings until ``stop``, and nothing written.
    Work per chain is bounded by the queue size. No function waits for another's memory accesses.

    Latency: 4 cycles from kick or read answer to the next ring read. Throughput: 3 cycles per descriptor, about 30 per chain.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    functions : tuple of :class:`int`
        PCI function numbers.
    clients : tuple of :class:`int`
        Requester client of each function's ring accesses.
    queues : tuple of :class:`QueueDescription`
        Queue n of the card: at most 64.

    Members
    -------
    commands : ``In(stream.Signature(QueueCommand))``
        Queues to serve from now on, or no longer.
    kicks : ``In(stream.Signature(6))``
        Available buffer notifications; never stalled.
    notifications : ``Out(stream.Signature(Notification))``
        Used buffer notifications that are due.
    needs_reset : ``Out(1)``, one per function
        Pulse: the function's driver or its memory broke a ring.
    bursts, write_data, write_done, read_data : one per function
        Ring accesses: 2 to 64 bytes, answered in any order.
    chains : ``Out(stream.Signature(Chain))``, one per function
        For the back end.
    readable, writable : ``Out(stream.Signature(Segment))``, one per function
        Scatter lists of the chains, for reader and writer. A chain without readable bytes has no readable list; one
        without writable bytes has a writable list of length 0.
    finished : ``In(stream.Signature(WriterDone))``, one per function
        Chains whose answer is written, in order.
    hints : ``Out(stream.Signature(Hint))``
        The first two pages of each buffer, as soon as its descriptor is known; some are left out when they are not taken in time.
    ring_reads, used_writes : ``Out(1)``
        Pulses for counters.
    stop, stopped : one per function
        See "Stop" in rtl/README.md.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, functions, clients, queues):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        if not functions or len(functions) != len(clients):
            raise ValueError(f"Clients must be one for each of {len(functions)} functions (at least one), not {clients!r}")
        if not 1 <= len(queues) <= 64:
            raise ValueError(f"Queues must be between 1 and 64, not {len(queues)!r}")
        for queue in queues:
            if not 0 <= queue.function < len(functions):
                raise ValueError(f"Function of a queue must be a position in {functions!r}, not {queue.function!r}")
            if queue.max_size not in [1 << n for n in range(16)]:
                raise ValueError(f"Queue size must be a power of two up to 32768, not {queue.max_size!r}")
        self.width, self.functions, self.clients, self.queues = width, tuple(functions), tuple(clients), tuple(queues)
        count = len(functions)
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "kicks": In(stream.Signature(6)),
            "notifications": Out(stream.Signature(Notification)),
            "needs_reset": Out(1).array(count),
            "bursts": Out(stream.Signature(Burst)).array(count),
            "write_data": Out(stream.Signature(BurstData(width))).array(count),
            "write_done": In(stream.Signature(BurstDone)).array(count),
            "read_data": In(stream.Signature(BurstData(width))).array(count),
            "chains": Out(stream.Signature(Chain)).array(count),
            "readable": Out(stream.Signature(Segment)).array(count),
            "writable": Out(stream.Signature(Segment)).array(count),
            "finished": In(stream.Signature(WriterDone)).array(count),
            "hints": Out(stream.Signature(Hint)),
            "ring_reads": Out(1),
            "used_writes": Out(1),
            "stop": In(1).array(count),
            "stopped": Out(1).array(count),
        })

    def elaborate(self, platform):
        m = Module()
        queue_count, function_count = len(self.queues), len(self.functions)
        row_bits = (self.width // 8 - 1).bit_length()

        m.submodules.contexts = contexts = Memory(shape=Context, depth=max(queue_count, 2), init=[])
        m.submodules.heads = heads = Memory(shape=16, depth=max(queue_count, 2) * HEADS, init=[])
        read_context, write_context = contexts.read_port(), contexts.write_port()
        read_head, write_head = heads.read_port(), heads.write_port()

        # One bit per queue or function.
        enabled, kicked, fetching = Signal(queue_count), Signal(queue_count), Signal(queue_count)
        parked = Signal(queue_count)  # a chain waits for room, to be walked from its head on
        stuffed = Signal(queue_count)  # and not before all segments of its function are gone
        checking, check_again = Signal(queue_count), Signal(queue_count)  # the driver's flags are being read; once more
        due = Signal(queue_count)  # a notification
        broken = Signal(function_count)
        walking = Signal(function_count)  # a chain of the function is being walked
        members = [[q for q, queue in enumerate(self.queues) if queue.function == n] for n in range(function_count)]

        # The event at work.
        queue, function = Signal(range(max(queue_count, 2))), Signal(range(max(function_count, 2)))
        context = Signal(Context)
        block, cookie, block_ok = Signal(8 * BLOCK_BYTES), Signal(ReadCookie), Signal()
        used_head, written_bytes, has_failed = Signal(16), Signal(32), Signal()
        size, mask = Signal(17), Signal(16)
        m.d.comb += [size.eq(1 << context.size_log2), mask.eq(size - 1)]

        # What the event does to its function.
        push, push_cookie = Signal(), Signal(ReadCookie)
        push_iova, push_length, push_is_write, push_data = Signal(64), Signal(7), Signal(), Signal(64)
        segment, put_readable, put_writable = Signal(Segment), Signal(), Signal()
        commit, rollback = Signal(), Signal()
        segment_room, chain_room = Signal(), Signal()

        lanes, readables, writables, chain_queues, flights = [], [], [], [], []
        for n in range(function_count):
            depth = 2 * max([self.queues[q].max_size for q in members[n]], default=1)
            lanes.append(Lane(width=self.width))
            readables.append(TransactionQueue(Segment, depth))
            writables.append(TransactionQueue(Segment, depth))
            chain_queues.append(Queue(Chain, 16))
            flights.append(Queue(data.StructLayout({"queue": 6, "head": 16}), 32))
            m.submodules[f"lane_{n}"] = lane = lanes[n]
            for name, part in (("readable", readables[n]), ("writable", writables[n]), ("chains", chain_queues[n]),
                               ("flights", flights[n])):
                m.submodules[f"{name}_{n}"] = ResetInserter(self.stop[n])(part)
            for name in ("bursts", "write_data", "write_done", "read_data"):
                wiring.connect(m, getattr(lane, name), wiring.flipped(getattr(self, name)[n]))
            wiring.connect(m, readables[n].o, wiring.flipped(self.readable[n]))
            wiring.connect(m, writables[n].o, wiring.flipped(self.writable[n]))
            wiring.connect(m, chain_queues[n].o, wiring.flipped(self.chains[n]))
            here = function == n
            m.d.comb += [
                lane.push.valid.eq(push & here),
                lane.push.payload.burst.address.eq(push_iova),
                lane.push.payload.burst.length_bytes.eq(push_length),
                lane.push.payload.burst.is_write.eq(push_is_write),
                lane.push.payload.burst.function.eq(self.functions[n]),
                lane.push.payload.burst.client.eq(self.clients[n]),
                lane.push.payload.burst.cookie.eq(push_cookie),
                lane.push.payload.data.eq(push_data),
                readables[n].i.valid.eq(put_readable & here),
                readables[n].i.payload.eq(segment),
                readables[n].commit.eq(commit & here),
                readables[n].rollback.eq(rollback & here),
                writables[n].i.valid.eq(put_writable & here),
                writables[n].i.payload.eq(segment),
                writables[n].commit.eq(commit & here),
                writables[n].rollback.eq(rollback & here),
                chain_queues[n].i.valid.eq(commit & here),
                chain_queues[n].i.payload.readable_bytes.eq(context.readable),
                chain_queues[n].i.payload.writable_bytes.eq(context.writable),
                flights[n].i.valid.eq(commit & here),
                flights[n].i.payload.queue.eq(queue),
                flights[n].i.payload.head.eq(context.head),
            ]
            with m.Switch(queue):
                for q in members[n]:
                    with m.Case(q):
                        m.d.comb += chain_queues[n].i.payload.queue.eq(self.queues[q].index)
            with m.If(here):
                m.d.comb += [
                    segment_room.eq(Mux(put_writable, writables[n].i.ready, readables[n].i.ready)),
                    chain_room.eq(chain_queues[n].i.ready & flights[n].i.ready & ~walking[n]),
                ]

        # Kicks and commands from the transport.
        m.d.comb += self.kicks.ready.eq(1)
        clear_kick = Signal(queue_count)
        kick = Signal(queue_count)
        with m.If(self.kicks.valid):
            m.d.comb += kick.eq(1 << self.kicks.payload)
        m.d.sync += kicked.eq((kicked & ~clear_kick) | (kick & enabled))

        # Notifications, one queue after the other.
        notify_at = Signal(range(max(queue_count, 2)))
        m.d.comb += [
            self.notifications.valid.eq(due.bit_select(notify_at, 1)),
            self.notifications.payload.queue.eq(notify_at),
        ]
        with m.If(due.any() & (~self.notifications.valid | self.notifications.ready)):
            m.d.sync += notify_at.eq(Mux(notify_at == queue_count - 1, 0, notify_at + 1))
        told, becomes_due = Signal(queue_count), Signal(queue_count)
        m.d.comb += told.eq((self.notifications.valid & self.notifications.ready) << notify_at)
        m.d.sync += due.eq((due & ~told) | becomes_due)

        # Whose turn it is: one function and one queue are looked at in each cycle of rest. Turns wait until somebody wants something.
        function_turn, queue_turn = Signal(range(max(function_count, 2))), Signal(range(max(queue_count, 2)))
        has_block, has_finished, has_work = Signal(), Signal(), Signal()
        take_block, take_finished = Signal(), Signal()
        work_function = Signal(range(max(function_count, 2)))
        finished = Signal(WriterDone)
        flight = Signal(data.StructLayout({"queue": 6, "head": 16}))
        turn_block = Signal(RingBlock)
        with m.Switch(function_turn):
            for n in range(function_count):
                with m.Case(n):
                    usable = lanes[n].room & ~self.stop[n]
                    m.d.comb += [
                        has_block.eq(lanes[n].block.valid & usable),
                        has_finished.eq(self.finished[n].valid & flights[n].o.valid & usable),
                        turn_block.eq(lanes[n].block.payload),
                        finished.eq(self.finished[n].payload),
                        flight.eq(flights[n].o.payload),
                    ]
        with m.Switch(queue_turn):
            for q, description in enumerate(self.queues):
                n = description.function
                with m.Case(q):
                    m.d.comb += [
                        work_function.eq(n),
                        has_work.eq(
                            lanes[n].room & ~self.stop[n] & ~broken[n]
                            & ((kicked[q] & ~fetching[q])
                               | (parked[q] & ~walking[n] & chain_queues[n].i.ready & flights[n].i.ready
                                  & ~(stuffed[q] & (readables[n].o.valid | writables[n].o.valid))))),
                    ]
        for n in range(function_count):
            m.d.comb += [
                lanes[n].block.ready.eq((take_block & (function_turn == n)) | self.stop[n]),
                self.finished[n].ready.eq((take_finished & (function_turn == n)) | self.stop[n]),
                flights[n].o.ready.eq(take_finished & (function_turn == n)),
            ]

        # Ring addresses of the event.
        available_slot, used_slot = Signal(16), Signal(16)
        ring_iova, entry_count = Signal(64), Signal(range(HEADS + 1))
        descriptor_iova, descriptor_count = Signal(64), Signal(range(DESCRIPTORS + 1))
        used_iova = Signal(64)
        pending = Signal(16)
        to_block_end, to_ring_end = Signal(range(HEADS + 1)), Signal(17)
        rest = Signal(17)
        m.d.comb += [
            available_slot.eq(context.taken & mask),
            used_slot.eq(context.used & mask),
            ring_iova.eq(context.driver + spec.AVAIL_RING + (available_slot << 1)),
            pending.eq(context.seen - context.taken),
            to_block_end.eq(HEADS - ring_iova[1:6]),
            to_ring_end.eq(size - available_slot),
            descriptor_iova.eq(context.descriptors + (context.next << 4)),
            rest.eq(size - context.next),
            descriptor_count.eq(Mux(rest < DESCRIPTORS - descriptor_iova[4:6], rest, DESCRIPTORS - descriptor_iova[4:6])),
            used_iova.eq(context.device + spec.USED_RING + (used_slot << 3)),
        ]
        fewest = Signal(17)
        m.d.comb += [
            fewest.eq(Mux(to_ring_end < to_block_end, to_ring_end, to_block_end)),
            entry_count.eq(Mux(pending < fewest, pending, fewest)),
        ]

        def half_word(address):
            return block.word_select(address[1:6], 16)

        def read(address, length, kind):
            return [
                push.eq(1), push_iova.eq(address), push_length.eq(length), push_cookie.queue.eq(queue),
                push_cookie.kind.eq(kind), push_cookie.row.eq(address[row_bits:6] if row_bits < 6 else 0), self.ring_reads.eq(1),
            ]

        def write(address, length, value):
            return [push.eq(1), push_is_write.eq(1), push_iova.eq(address), push_length.eq(length), push_data.eq(value)]

        here = Signal(queue_count)  # the event's queue, one-hot
        m.d.comb += here.eq(1 << queue)
        index, jump = Signal(16), Signal(16)
        copied = Signal(range(HEADS + 1))
        window_first, window_count = Signal(16), Signal(range(DESCRIPTORS + 1))  # descriptors in ``block``
        in_window = Signal()
        descriptor = Signal(data.StructLayout({"address": 64, "length": 32, "flags": 16, "next": 16}))
        is_write, is_chained, is_bad = Signal(), Signal(), Signal()
        sum_readable, sum_writable = Signal(33), Signal(33)
        offset_in_window = Signal(17)
        m.d.comb += [
            index.eq(half_word(context.driver + spec.AVAIL_INDEX)),
            jump.eq(index - context.taken),
            offset_in_window.eq(context.next - window_first),
            in_window.eq((context.next >= window_first) & (offset_in_window < window_count)),
            is_write.eq(descriptor.flags[spec.F_WRITE]),
            is_chained.eq(descriptor.flags[spec.F_NEXT]),
            sum_readable.eq(context.readable + Mux(is_write, 0, descriptor.length)),
            sum_writable.eq(context.writable + Mux(is_write, descriptor.length, 0)),
            is_bad.eq(
                descriptor.flags[spec.F_INDIRECT] | (context.count >= size) | (context.is_writing & ~is_write)
                | (is_chained & (descriptor.next >= size)) | sum_readable[32] | sum_writable[32]),
            read_head.addr.eq(Cat(context.head_at, queue)),
            write_head.addr.eq(Cat(copied[:5], queue)),
            write_head.data.eq(half_word(ring_iova + (copied << 1))),
        ]

        has_buffer = Signal()  # pulse: ``descriptor`` is of one
        self._hint(m, function, descriptor, is_write, has_buffer)
        straddles = Signal()  # the used element crosses a row
        m.d.comb += straddles.eq(used_iova[:row_bits] > (1 << row_bits) - spec.USED_ELEMENT_BYTES)
        m.d.comb += [write_context.addr.eq(queue), write_context.data.eq(context)]

        breaking, at_rest = Signal(function_count), Signal()
        with m.FSM() as fsm:
            with m.State("CHOOSE"):
                m.d.sync += window_count.eq(0)
                with m.If(Cat(source.valid for n in range(function_count) for source in (lanes[n].block, self.finished[n])).any()):
                    m.d.sync += function_turn.eq(Mux(function_turn == function_count - 1, 0, function_turn + 1))
                with m.If((kicked | parked).any()):
                    m.d.sync += queue_turn.eq(Mux(queue_turn == queue_count - 1, 0, queue_turn + 1))
                with m.If(self.commands.valid):
                    m.d.sync += queue.eq(self.commands.payload.queue)
                    m.next = "ENABLE"
                with m.Elif(has_block):
                    m.d.comb += [take_block.eq(1), read_context.addr.eq(turn_block.cookie.queue)]
                    m.d.sync += [
                        function.eq(function_turn),
                        queue.eq(turn_block.cookie.queue),
                        block.eq(turn_block.block),
                        cookie.eq(turn_block.cookie),
                        block_ok.eq(turn_block.ok),
                    ]
                    m.next = "LOAD_FOR_BLOCK"
                with m.Elif(has_finished):
                    m.d.comb += [take_finished.eq(1), read_context.addr.eq(flight.queue)]
                    m.d.sync += [
                        function.eq(function_turn),
                        queue.eq(flight.queue),
                        used_head.eq(flight.head),
                        written_bytes.eq(finished.length_bytes),
                        has_failed.eq(finished.status != BurstStatus.OK),
                    ]
                    m.next = "LOAD_FOR_USED"
                with m.Elif(has_work):
                    m.d.comb += read_context.addr.eq(queue_turn)
                    m.d.sync += [function.eq(work_function), queue.eq(queue_turn)]
                    m.next = "LOAD_FOR_WORK"

            with m.State("ENABLE"):
                command = self.commands.payload
                m.d.comb += self.commands.ready.eq(1)
                fresh = Signal(Context)
                m.d.comb += [
                    write_context.en.eq(command.operation == QueueOperation.ENABLE),
                    write_context.data.eq(fresh),
                    fresh.descriptors.eq(Cat(Signal(4), command.descriptor_iova[4:])),  # alignment [VIRTIO1.4 2.7]
                    fresh.driver.eq(Cat(Signal(1), command.driver_iova[1:])),
                    fresh.device.eq(Cat(Signal(2), command.device_iova[2:])),
                ]
                for n in range(16):
                    with m.If(command.size[n]):
                        m.d.comb += fresh.size_log2.eq(n)
                with m.If(command.operation == QueueOperation.ENABLE):
                    m.d.sync += enabled.eq(enabled | here)
                with m.Else():
                    m.d.sync += enabled.eq(enabled & ~here)
                m.next = "CHOOSE"

            # Work that the driver announced, or a chain that waited for room.
            with m.State("LOAD_FOR_WORK"):
                m.d.sync += context.eq(read_context.data)
                with m.If((parked & here).any()):
                    m.d.sync += [parked.eq(parked & ~here), stuffed.eq(stuffed & ~here)]
                    m.next = "FETCH_HEAD"
                with m.Else():
                    m.d.sync += fetching.eq(fetching | here)
                    m.d.comb += clear_kick.eq(here)
                    m.next = "READ_INDEX"
            with m.State("READ_INDEX"):
                m.d.comb += read((context.driver + spec.AVAIL_INDEX)[:64], 2, Kind.INDEX)
                m.next = "CHOOSE"

            # The answer of a ring read.
            with m.State("LOAD_FOR_BLOCK"):
                m.d.sync += context.eq(read_context.data)
                with m.If((broken.bit_select(function, 1)) | ~(enabled & here).any()):
                    m.next = "CHOOSE"
                with m.Elif(~block_ok):
                    m.next = "BREAK"
                with m.Else():
                    with m.Switch(cookie.kind):
                        with m.Case(Kind.INDEX):
                            m.next = "TAKE_INDEX"
                        with m.Case(Kind.HEADS):
                            m.d.sync += copied.eq(0)
                            m.next = "TAKE_HEADS"
                        with m.Case(Kind.DESCRIPTORS):
                            m.next = "TAKE_BLOCK"
                        with m.Case(Kind.FLAGS):
                            m.next = "TAKE_FLAGS"
            with m.State("TAKE_INDEX"):
                m.d.sync += context.seen.eq(index)
                with m.If(jump > size):
                    m.next = "BREAK"
                with m.Elif(jump == 0):
                    m.d.sync += fetching.eq(fetching & ~here)
                    m.next = "CHOOSE"
                with m.Else():
                    m.next = "READ_HEADS"
            with m.State("READ_HEADS"):
                m.d.comb += read(ring_iova, entry_count << 1, Kind.HEADS)
                m.d.sync += [context.heads_left.eq(entry_count), context.head_at.eq(0)]
                m.next = "STORE"
            with m.State("TAKE_HEADS"):
                m.d.comb += write_head.en.eq(1)
                m.d.sync += copied.eq(copied + 1)
                with m.If(copied + 1 == context.heads_left):
                    m.next = "NEXT_CHAIN"
            with m.State("NEXT_CHAIN"):
                with m.If(context.heads_left != 0):
                    m.next = "FETCH_HEAD"
                with m.Elif(pending != 0):
                    m.next = "READ_HEADS"
                with m.Else():
                    m.d.sync += fetching.eq(fetching & ~here)
                    m.next = "STORE"
            with m.State("FETCH_HEAD"):
                m.next = "START_CHAIN"
            with m.State("START_CHAIN"):
                with m.If(~chain_room):
                    m.next = "PARK"
                with m.Elif(read_head.data >= size):
                    m.next = "BREAK"
                with m.Else():
                    m.d.sync += [
                        context.head.eq(read_head.data), context.next.eq(read_head.data), context.count.eq(0),
                        context.readable.eq(0), context.writable.eq(0), context.is_writing.eq(0), context.held_valid.eq(0),
                        walking.bit_select(function, 1).eq(1),
                    ]
                    m.next = "NEXT_DESCRIPTOR"
            with m.State("PARK"):
                m.d.sync += parked.eq(parked | here)
                m.next = "STORE"

            # The walk of one chain. [VIRTIO1.4 2.7.5]
            with m.State("NEXT_DESCRIPTOR"):
                m.d.sync += descriptor.eq(block.word_select(descriptor_iova[4:6], 8 * spec.DESCRIPTOR_BYTES))
                m.next = "READ_DESCRIPTORS"
                with m.If(in_window):
                    m.next = "CHECK_DESCRIPTOR"
            with m.State("READ_DESCRIPTORS"):
                m.d.comb += read(descriptor_iova, descriptor_count << 4, Kind.DESCRIPTORS)
                m.next = "STORE"
            with m.State("TAKE_BLOCK"):
                m.d.sync += [window_first.eq(context.next), window_count.eq(descriptor_count)]
                m.next = "NEXT_DESCRIPTOR"
            with m.State("CHECK_DESCRIPTOR"):
                m.next = "PUT_HELD"
                with m.If(is_bad):
                    m.next = "BREAK"
            with m.State("PUT_HELD"):  # the segment before this one, which now knows whether it is its list's last
                m.d.comb += [segment.eq(context.held), segment.last.eq(context.held_is_write != is_write)]
                with m.If(context.held_valid & (descriptor.length != 0)):
                    m.d.comb += [put_readable.eq(~context.held_is_write), put_writable.eq(context.held_is_write)]
                with m.If((put_readable | put_writable) & ~segment_room):
                    m.next = "RETRY"
                with m.Else():
                    m.d.sync += [
                        context.count.eq(context.count + 1),
                        context.readable.eq(sum_readable),
                        context.writable.eq(sum_writable),
                        context.is_writing.eq(is_write),
                        context.next.eq(descriptor.next),
                    ]
                    with m.If(descriptor.length != 0):
                        m.d.sync += [
                            context.held_valid.eq(1),
                            context.held_is_write.eq(is_write),
                            context.held.address.eq(descriptor.address),
                            context.held.length_bytes.eq(descriptor.length),
                        ]
                        m.d.comb += has_buffer.eq(1)
                    m.next = "PUT_LAST"
                    with m.If(is_chained):
                        m.next = "NEXT_DESCRIPTOR"
            with m.State("PUT_LAST"):
                m.d.comb += [segment.eq(context.held), segment.last.eq(1)]
                with m.If(context.held_valid):
                    m.d.comb += [put_readable.eq(~context.held_is_write), put_writable.eq(context.held_is_write)]
                m.next = "PUT_EMPTY"
                with m.If((put_readable | put_writable) & ~segment_room):
                    m.next = "RETRY"
            with m.State("PUT_EMPTY"):  # the writer wants a list for every chain
                m.d.comb += [segment.last.eq(1), put_writable.eq(context.writable == 0)]
                m.next = "COMMIT"
                with m.If(put_writable & ~segment_room):
                    m.next = "RETRY"
            with m.State("COMMIT"):
                m.d.comb += commit.eq(1)
                m.d.sync += [
                    context.taken.eq(context.taken + 1),
                    context.head_at.eq(context.head_at + 1),
                    context.heads_left.eq(context.heads_left - 1),
                    walking.bit_select(function, 1).eq(0),
                ]
                m.next = "NEXT_CHAIN"
            with m.State("RETRY"):
                m.d.comb += rollback.eq(1)
                m.d.sync += [walking.bit_select(function, 1).eq(0), stuffed.eq(stuffed | here)]
                m.next = "PARK"

            # A chain is finished: element, index, then the driver's flags. [VIRTIO1.4 2.7.8, 2.7.7]
            with m.State("LOAD_FOR_USED"):
                m.d.sync += context.eq(read_context.data)
                m.next = "WRITE_ID"
                with m.If(broken.bit_select(function, 1) | ~(enabled & here).any()):
                    m.next = "CHOOSE"
                with m.Elif(has_failed):
                    m.next = "BREAK"
            with m.State("WRITE_ID"):
                m.d.comb += write(used_iova, Mux(straddles, 4, 8), Cat(used_head, Signal(16), written_bytes))
                m.next = "WRITE_INDEX"
                with m.If(straddles):
                    m.next = "WRITE_LENGTH"
            with m.State("WRITE_LENGTH"):
                m.d.comb += write((used_iova + 4)[:64], 4, written_bytes)
                m.next = "WRITE_INDEX"
            with m.State("WRITE_INDEX"):
                m.d.comb += write((context.device + spec.USED_INDEX)[:64], 2, (context.used + 1)[:16])
                m.d.comb += self.used_writes.eq(1)
                m.d.sync += context.used.eq(context.used + 1)
                with m.If((checking & here).any()):
                    m.d.sync += check_again.eq(check_again | here)
                    m.next = "STORE"
                with m.Else():
                    m.next = "READ_FLAGS"
            with m.State("READ_FLAGS"):
                m.d.comb += read(context.driver, 2, Kind.FLAGS)
                m.d.sync += [checking.eq(checking | here), check_again.eq(check_again & ~here)]
                m.next = "STORE"
            with m.State("TAKE_FLAGS"):
                with m.If(~half_word(context.driver)[spec.AVAIL_F_NO_INTERRUPT]):
                    m.d.comb += becomes_due.eq(here)
                m.d.sync += checking.eq(checking & ~here)
                m.next = "CHOOSE"
                with m.If((check_again & here).any()):
                    m.next = "READ_FLAGS"

            with m.State("STORE"):
                m.d.comb += write_context.en.eq(1)
                m.next = "CHOOSE"
            with m.State("BREAK"):
                m.d.comb += [rollback.eq(walking.bit_select(function, 1)), breaking.eq(1 << function)]
                m.d.sync += walking.bit_select(function, 1).eq(0)
                m.next = "CHOOSE"

        # Breaking and stopping, per function.
        m.d.comb += at_rest.eq(fsm.ongoing("CHOOSE"))
        for n in range(function_count):
            hurt = breaking[n] | (lanes[n].write_failed & ~self.stop[n])
            m.d.comb += [
                self.needs_reset[n].eq(hurt & ~broken[n]),
                self.stopped[n].eq(
                    self.stop[n] & lanes[n].quiet & ~lanes[n].block.valid & ~self.finished[n].valid
                    & (at_rest | (function != n))),
            ]
            with m.If(hurt):
                m.d.sync += broken[n].eq(1)
            with m.If(self.stopped[n]):
                m.d.sync += [broken[n].eq(0), walking[n].eq(0)]
                m.d.sync += [
                    bits[q].eq(0)
                    for bits in (enabled, kicked, fetching, parked, stuffed, checking, check_again, due) for q in members[n]
                ]
        return m

    def _hint(self, m, function, descriptor, is_write, has_buffer):
        """Tell of the page of a buffer's first byte, and one cycle later of the page behind it."""
        m.submodules.hints = hints = Queue(Hint, HINTS)
        wiring.connect(m, hints.o, wiring.flipped(self.hints))
        first, second, is_longer = Signal(Hint), Signal(Hint), Signal()
        m.d.comb += [first.is_write.eq(is_write), first.page.eq(descriptor.address[12:])]
        with m.Switch(function):
            for n, number in enumerate(self.functions):
                with m.Case(n):
                    m.d.comb += first.function.eq(number)
        end = descriptor.address[:12] + descriptor.length[:13]
        m.d.sync += [
            second.eq(first), second.page.eq(first.page + 1),
            is_longer.eq(has_buffer & (descriptor.length[13:].any() | (end > 4096))),
        ]
        m.d.comb += [hints.i.valid.eq(has_buffer | is_longer), hints.i.payload.eq(Mux(is_longer, second, first))]
