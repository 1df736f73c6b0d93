"""Asks for ring entries: knows how far each queue was asked for, and who may ask next."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import virtio_ring as spec
from .layouts import QueueCommand, QueueOperation
from .ring_layouts import LINE_DESCRIPTORS, SLOT_BITS, SLOTS, LineAccess, LineKind, Position, RingTable, Slot

FREE_SLOTS = LINE_DESCRIPTORS  # never taken: a line outlives its slot until those that share it are walked
FIRST_WINDOW = LINE_DESCRIPTORS  # entries of a packed ring that are asked for before one was found to be available


class Context(data.Struct):
    """How far a queue was asked for."""

    count: 16  # ring entries asked for (free-running)
    head: 16  # packed: the next entry, and its wrap counter
    wrap: 1
    running: 1  # packed: the last entry that came was available
    start: 16  # packed: ``count`` when that began
    seen: 16  # split: available index
    news: 1  # split: it changed since it was last asked for
    requested: 16  # split: heads asked for (free-running)
    half: 1  # split: which half of the heads is used now
    row: 3  # of the next head in it
    left: 6  # heads in it
    other: 6  # heads in the other half
    published: 18  # what the driver was told to notify at, and whether it was


class Dispatcher(wiring.Component):
    """Asks for available indices, heads and descriptors of all queues, gives each ring entry a slot, in ring order per queue.

    Split: index and heads are asked for while earlier entries are still on their way. Packed: entries are asked for ahead of those
    that are known to be available, in whole lines, at first one, then as many as were found and more; a ring entry that is not
    available ends that until the next kick. With EVENT_IDX the driver is told where that was, and the ring is looked at once more.
    [VIRTIO1.4 2.7.10, 2.7.13.3, 2.8.10] Entries that lie in one block share a read.

    Latency: 3 cycles from a kick to the first read. Throughput: 4 cycles per entry of a split ring, 3 of a packed one, about 8 per visit.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    functions, ports : :class:`int`
        How many.
    queue_functions, queue_ports : tuple of :class:`int`
        Of each queue.

    Members
    -------
    commands, kicks, suspend
        As the engine's.
    fresh : ``Out(stream.Signature(6))``
        A queue begins: its ``walked`` is to be as after reset.
    accesses : ``Out(stream.Signature(LineAccess))``
        Ring accesses.
    slot : ``Out``
        ``valid``, ``function``, ``number``, ``content``: a slot is taken.
    tails, walks : ``Out(7)``, ``In(7)``, one per function
        Free-running numbers of the next slot to be taken, and the oldest one.
    table : ``Out``
        ``valid``, ``queue``, ``content``: to be kept for all.
    queue : ``Out``
        Whose ``known`` and ``walked`` are wanted in the next cycle.
    known, walked : ``In(RingTable)``, ``In(Position)``
        What is kept of it, and how far it was walked.
    heads, head_row, index, index_came, heads_came
        See :class:`.lines.LineStore`.
    enabled : ``Out``, one bit per queue
        It is served.
    drained : ``Out``, one bit per queue
        It is not, and no read or slot of it is left.
    generations : ``In``, one bit per queue
        For its slots.
    flush, flush_ends, flush_parks : ``In``, one bit per queue
        Pulse: start again at ``walked``; not before a kick; not before its port has room.
    progress : ``In``, one bit per queue
        Pulse: a line of a packed ring was walked.
    midway, barred : ``In``, one bit per queue
        The function's chain at work is of this queue; of another one that needs all slots.
    lacks_entry : ``In``, one bit per queue
        The function's chain at work is a packed list of this queue that goes on with its next entry; other queues wait for its end.
    room : ``In(functions)``
        Reads of the function may be sent.
    alive : ``In(functions)``
        It is neither stopped nor broken.
    claim : ``Out(ports)``
        Pulse: a slot of the port is taken.
    port_free, port_roomy, port_ready : ``In(ports)``
        It may take one more; several; a whole chain's segments.
    forget : ``In(functions)``
        Its queues are not served any more.
    broken : ``Out(functions)``
        Pulse: the available ring breaks a rule.
    at_work : ``Out(functions)``
        The function that is served.
    """

    def __init__(self, *, width, functions, ports, queue_functions, queue_ports):
        self.width, self.functions, self.ports = width, functions, ports
        self.queue_functions, self.queue_ports, queues = tuple(queue_functions), tuple(queue_ports), len(queue_functions)
        function, queue = range(max(self.functions, 2)), range(max(queues, 2))
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "kicks": In(stream.Signature(6)),
            "suspend": In(self.functions),
            "fresh": Out(stream.Signature(6)),
            "accesses": Out(stream.Signature(LineAccess)),
            "slot": Out(data.StructLayout({"valid": 1, "function": function, "number": SLOT_BITS, "content": Slot})),
            "tails": Out(SLOT_BITS + 1).array(self.functions),
            "walks": In(SLOT_BITS + 1).array(self.functions),
            "table": Out(data.StructLayout({"valid": 1, "queue": queue, "content": RingTable})),
            "queue": Out(queue),
            "known": In(RingTable),
            "walked": In(Position),
            "heads": Out(data.StructLayout({"queue": queue, "half": 1, "row": 3})),
            "head_row": In(width),
            "index": In(16),
            "index_came": In(queues),
            "heads_came": In(2 * queues),
            "enabled": Out(queues),
            "drained": Out(queues),
            "generations": In(queues),
            "flush": In(queues),
            "flush_ends": In(queues),
            "flush_parks": In(queues),
            "progress": In(queues),
            "midway": In(queues),
            "barred": In(queues),
            "lacks_entry": In(queues),
            "room": In(self.functions),
            "alive": In(self.functions),
            "claim": Out(self.ports),
            "port_free": In(self.ports),
            "port_roomy": In(self.ports),
            "port_ready": In(self.ports),
            "forget": In(self.functions),
            "broken": Out(self.functions),
            "at_work": Out(self.functions),
        })

    def elaborate(self, platform):
        m = Module()
        count = len(self.queue_functions)
        depth = max(count, 2)
        areas_layout = data.StructLayout({"driver": 64, "device": 64})
        m.submodules.contexts = contexts = Memory(shape=Context, depth=count, init=[])
        m.submodules.areas = areas_memory = Memory(shape=areas_layout, depth=count, init=[])
        read_context, write_context = contexts.read_port(), contexts.write_port()
        read_areas, write_areas = areas_memory.read_port(), areas_memory.write_port()

        # One bit per queue; of what is one per half, two.
        work, hungry, kicked, parked = (Signal(count, name=name) for name in ("work", "hungry", "kicked", "parked"))
        flushed, ended = Signal(count), Signal(count)
        index_flies, index_here = Signal(count), Signal(count)
        heads_fly, heads_here = Signal(2 * count), Signal(2 * count)

        # The visit: its queue.
        queue, function, port = Signal(range(depth)), Signal(range(max(self.functions, 2))), Signal(range(max(self.ports, 2)))
        context, table, areas = Signal(Context), Signal(RingTable), Signal(areas_layout)
        owner = Signal(range(depth))  # whose ``context`` is
        here, is_short, generation = Signal(count), Signal(), Signal()
        m.d.comb += here.eq(1 << queue)
        with m.Switch(queue):
            for q in range(count):
                with m.Case(q):
                    m.d.comb += [function.eq(self.queue_functions[q]), port.eq(self.queue_ports[q])]

        def of_queue(bits):
            return bits.bit_select(queue, 1)

        # Room of function and port.
        taken = [tail - walk for tail, walk in zip(self.tails, self.walks)]
        slots_free, slots_roomy = Signal(self.functions), Signal(self.functions)
        m.d.comb += [
            bits[n].eq(taken[n][: SLOT_BITS + 1] < SLOTS - FREE_SLOTS - margin)
            for bits, margin in ((slots_free, 0), (slots_roomy, 2 * LINE_DESCRIPTORS)) for n in range(self.functions)
        ]
        may_ask, may_take = Signal(), Signal()
        m.d.comb += [
            may_ask.eq((self.room & self.alive).bit_select(function, 1) & ~of_queue(flushed)),
            may_take.eq(may_ask & slots_free.bit_select(function, 1) & self.port_free.bit_select(port, 1)),
        ]

        # Who wants a visit.
        wants = Signal(count)
        for q, (n, p) in enumerate(zip(self.queue_functions, self.queue_ports)):
            has_room = Mux(self.lacks_entry[q], slots_free[n] & self.port_free[p], slots_roomy[n] & self.port_roomy[p])
            m.d.comb += wants[q].eq(
                self.enabled[q] & self.alive[n] & ~self.suspend[n] & self.room[n] & ~self.barred[q]
                & ~(parked[q] & ~self.port_ready[p])
                & (work[q] | (hungry[q] & has_room)))
        turn = Signal(range(depth))

        # A split ring's heads, a packed one's entries.
        size, ring_mask = table.size, Signal(16)  # ``ring_mask``: ``size - 1``, of a split ring
        head, is_shared = Signal(16), Signal()
        in_flight, window, found = Signal(16), Signal(7), Signal(16)
        first, length, line, line_valid = Signal(16), Signal(3), Signal(SLOT_BITS), Signal()  # the newest line of this visit
        line_left, before = Signal(3), Signal(16)  # packed: entries of it that were not taken; place of ``head`` in it
        tail = Signal(SLOT_BITS + 1)
        with m.Switch(function):
            for n in range(self.functions):
                with m.Case(n):
                    m.d.comb += tail.eq(self.tails[n])
        row_entries = self.width // 16
        row_bits = (row_entries - 1).bit_length()
        head_place = (areas.driver[1 : 1 + row_bits] + spec.AVAIL_RING // 2 + (context.count & ring_mask)[:row_bits])[:row_bits]
        in_line = Signal()
        here_half = Signal(2 * count)
        m.d.comb += [
            in_flight.eq(context.count - self.walked.count),
            found.eq(self.walked.count - context.start),
            window.eq(Mux(found[4:].any(), SLOTS, FIRST_WINDOW + (found[:4] << 2))),
            before.eq(head - first),
            in_line.eq(line_valid & ~before[2:].any() & (before[:2] < length) & ((tail - Cat(line, Const(0, 1)))[:SLOT_BITS] < FREE_SLOTS)),
            here_half.eq(1 << Cat(context.half, queue)),
            self.heads.queue.eq(queue),
            self.heads.half.eq(context.half),
            self.heads.row.eq(context.row),
        ]
        packed = table.rules.packed
        has_entry = Signal()
        with m.If(packed):
            m.d.comb += has_entry.eq(
                context.running & (in_flight < size)
                & ((line_left != 0) | (~in_flight[7:].any() & (in_flight[:7] < window)) | of_queue(self.midway)))
        with m.Else():
            m.d.comb += has_entry.eq((context.left != 0) & (heads_here & here_half).any())
        iova = Signal(64)  # of the next access
        place, in_block, fresh_length = iova[4:6], Signal(3), Signal(3)  # ``fresh_length`` from ``TARGET`` on
        rest = Signal(17)
        m.d.comb += [rest.eq(size - head), in_block.eq(LINE_DESCRIPTORS - (table.base[:2] + head[:2])[:2])]
        m.d.sync += fresh_length.eq(Mux(~rest[2:].any() & (rest[:2] < in_block), rest[:2], in_block))

        # Heads that are to be asked for.
        ask_slot, pending, ask_count, ask_half = Signal(16), Signal(16), Signal(6), Signal()  # ``ask_count`` from ``ASK_HEADS`` on
        to_ring_end, to_block_end, fewest = Signal(16), Signal(5), Signal(5)  # each is one less than it says
        m.d.comb += [
            pending.eq(context.seen - context.requested),
            ask_slot.eq(context.requested & ring_mask),
            to_ring_end.eq(~context.requested & ring_mask),
            to_block_end.eq(~(areas.driver[1:6] + spec.AVAIL_RING // 2 + ask_slot[:5])),
            ask_half.eq(context.half ^ (context.left != 0)),
        ]
        m.d.sync += [
            fewest.eq(Mux(~to_ring_end[5:].any() & (to_ring_end[:5] < to_block_end), to_ring_end, to_block_end)),
            ask_count.eq(Mux(pending[6:].any() | (pending[:6] > fewest), fewest + 1, pending)),
        ]
        jump = Signal(18)
        m.d.comb += jump.eq((self.index - context.seen)[:16] + (context.seen - context.count)[:16])
        event = Signal(18)  # what the driver is to be told
        m.d.comb += event.eq(Cat(Mux(packed, Cat(context.head[:15], context.wrap), context.seen), Const(0, 1), Const(1, 1)))

        access = self.accesses.payload
        m.d.comb += [access.function.eq(function), access.iova.eq(iova)]
        set_work, clear_work, clear_kick = Signal(count), Signal(count), Signal(count)
        ask_index, take_index, ask_heads, end_half, restart, visited = (Signal() for _ in range(6))
        kick, begin, end = Signal(count), Signal(count), Signal(count)
        m.d.comb += [self.kicks.ready.eq(1), self.queue.eq(queue)]
        with m.If(self.kicks.valid):
            m.d.comb += kick.eq((1 << self.kicks.payload) & self.enabled)
        m.d.comb += [
            set_work.eq(kick | self.index_came | self.flush | self.progress
                        | Cat(self.heads_came[2 * q] | self.heads_came[2 * q + 1] for q in range(count))),
            read_context.addr.eq(queue), read_areas.addr.eq(queue),
            write_context.addr.eq(queue), write_context.data.eq(context),
        ]

        area, offset, aims, wants_index = Signal(64), Signal(20), Signal(), Signal()
        m.d.comb += wants_index.eq(of_queue(kicked) | context.news)
        with m.If(aims):
            m.d.sync += iova.eq(area + offset)
        with m.FSM() as fsm:
            with m.State("CHOOSE"):
                command = self.commands.payload
                m.d.sync += [queue.eq(turn), is_short.eq(0), line_valid.eq(0), line_left.eq(0)]
                m.d.comb += [each.addr.eq(turn) for each in (read_context, read_areas)] + [self.queue.eq(turn)]
                with m.If((work | hungry).any()):
                    m.d.sync += turn.eq(Mux(turn == count - 1, 0, turn + 1))
                with m.If(self.commands.valid):
                    m.d.sync += queue.eq(command.queue if count > 1 else 0)
                    m.next = "COMMAND"
                with m.Elif(wants.bit_select(turn, 1)):
                    m.d.comb += clear_work.eq(1 << turn)
                    m.next = "LOAD"
            with m.State("COMMAND"):
                fresh = Signal(Context)
                m.d.comb += [
                    self.fresh.valid.eq(command.operation == QueueOperation.ENABLE),
                    self.commands.ready.eq((command.operation == QueueOperation.RESET) | self.fresh.ready),
                    fresh.wrap.eq(1),
                    write_context.data.eq(fresh),
                ]
                with m.If(self.commands.ready):
                    m.d.sync += [context.eq(fresh), owner.eq(queue)]
                    m.d.comb += [
                        begin.eq(Mux(command.operation == QueueOperation.ENABLE, here, 0)),
                        end.eq(Mux(command.operation == QueueOperation.RESET, here, 0)),
                        write_context.en.eq(1), write_areas.en.eq(1), self.table.valid.eq(1),
                    ]
                    m.next = "CHOOSE"
            with m.State("LOAD"):
                m.d.sync += [owner.eq(queue), areas.eq(read_areas.data), table.eq(self.known), ring_mask.eq(self.known.size - 1)]
                with m.If((owner != queue) & (count > 1)):
                    m.d.sync += context.eq(read_context.data)
                m.next = "RESTART"
            with m.State("RESTART"):
                m.d.sync += generation.eq(of_queue(self.generations))
                m.next = "DECIDE"
                with m.If(of_queue(flushed)):
                    with m.If((heads_fly & (here_half | 1 << Cat(~context.half, queue))).any()):
                        m.next = "CHOOSE"  # until they have come
                    with m.Else():
                        m.d.comb += restart.eq(1)
                        m.d.sync += [
                            context.count.eq(self.walked.count),
                            context.head.eq(self.walked.head),
                            context.wrap.eq(self.walked.wrap),
                            context.start.eq(self.walked.count),
                            context.requested.eq(self.walked.count),
                            context.row.eq(0),
                            context.left.eq(0),
                            context.other.eq(0),
                        ]
                        with m.If(of_queue(ended)):
                            m.d.sync += context.running.eq(0)
            with m.State("DECIDE"):
                m.d.comb += [aims.eq(1), area.eq(areas.device)]
                m.next = "LOOK"
                with m.If(packed & ~context.running):
                    with m.If(of_queue(kicked)):
                        m.d.comb += clear_kick.eq(here)
                        m.d.sync += [context.running.eq(1), context.start.eq(context.count)]
                    with m.Elif(table.rules.event_index & (context.published != event)):
                        m.next = "PUBLISH"
                    with m.Else():
                        m.next = "STORE"
                with m.If(~packed & of_queue(index_here)):
                    m.next = "TAKE_INDEX"
            with m.State("TAKE_INDEX"):
                m.d.comb += take_index.eq(1)
                m.d.sync += [context.seen.eq(self.index), context.news.eq(self.index != context.seen)]
                m.next = "LOOK"
                with m.If(jump > size):
                    m.next = "BREAK"

            # Ring entries, one after the other.
            with m.State("LOOK"):
                m.d.sync += head.eq(context.head)
                with m.If(has_entry & may_take):
                    m.next = "HEAD"
                    with m.If(packed):
                        m.next = "TARGET"
                with m.Else():
                    with m.If(has_entry):
                        m.d.sync += is_short.eq(1)
                    m.next = "ASK_HEADS"
                    with m.If(packed):
                        m.next = "STORE"
            with m.State("HEAD"):
                m.d.sync += head.eq(self.head_row.word_select(head_place, 16))
                m.next = "TARGET"
            with m.State("TARGET"):
                m.d.comb += [aims.eq(1), area.eq(table.base << 4), offset.eq(head << 4)]
                m.d.sync += is_shared.eq(in_line)
                m.next = "TAKE"
                with m.If(rest[16] | ~rest.any()):
                    m.next = "BREAK"
            with m.State("TAKE"):
                m.d.comb += [
                    access.length_bytes.eq(fresh_length << 4),
                    access.cookie.kind.eq(LineKind.LINE),
                    access.cookie.number.eq(tail[:SLOT_BITS]),
                    access.cookie.place.eq(place),
                    self.accesses.valid.eq(~is_shared),
                ]
                with m.If(is_shared | self.accesses.ready):
                    m.d.comb += [self.slot.valid.eq(1), self.claim.eq(1 << port)]
                    m.d.sync += [context.count.eq(context.count + 1), line_left.eq(Mux(is_shared, line_left, fresh_length) - 1)]
                    with m.If(~is_shared):
                        m.d.sync += [line_valid.eq(1), first.eq(head), length.eq(fresh_length), line.eq(tail[:SLOT_BITS])]
                    with m.If(packed):
                        m.d.sync += context.head.eq(context.head + 1)
                        with m.If(rest == 1):
                            m.d.sync += [context.head.eq(0), context.wrap.eq(~context.wrap)]
                    with m.Else():
                        m.d.sync += [context.left.eq(context.left - 1), context.row.eq(context.row + head_place.all())]
                        with m.If(context.left == 1):
                            m.d.comb += end_half.eq(1)
                            m.d.sync += [
                                context.left.eq(context.other), context.other.eq(0), context.half.eq(~context.half), context.row.eq(0),
                            ]
                    m.next = "LOOK"

            # What comes after them: heads, index, and the driver's event.
            with m.State("ASK_HEADS"):
                m.d.comb += [aims.eq(1), area.eq(areas.driver), offset.eq(spec.AVAIL_RING + (ask_slot << 1))]
                m.next = "ASK_INDEX"
                with m.If((pending != 0) & (context.other == 0)):
                    m.d.sync += is_short.eq(is_short | ~may_ask)
                    with m.If(may_ask):
                        m.next = "SEND_HEADS"
            with m.State("SEND_HEADS"):
                m.d.comb += [
                    self.accesses.valid.eq(1),
                    access.length_bytes.eq(ask_count << 1),
                    access.cookie.kind.eq(LineKind.HEADS),
                    access.cookie.number.eq(Cat(queue, Const(0, 6 - len(queue)), ask_half)),
                ]
                with m.If(self.accesses.ready):
                    m.d.comb += ask_heads.eq(1)
                    m.d.sync += context.requested.eq(context.requested + ask_count)
                    with m.If(context.left == 0):
                        m.d.sync += context.left.eq(ask_count)
                    with m.Else():
                        m.d.sync += context.other.eq(ask_count)
                    m.next = "MEASURE_HEADS"
            with m.State("MEASURE_HEADS"):  # ``fewest`` of the next ones
                m.next = "ASK_HEADS"
            with m.State("ASK_INDEX"):
                m.d.comb += [aims.eq(1), area.eq(areas.device), offset.eq(spec.USED_RING | (size << 3))]
                with m.If(wants_index):
                    m.d.comb += [area.eq(areas.driver), offset.eq(spec.AVAIL_INDEX)]
                m.next = "STORE"
                with m.If(~of_queue(index_flies) & ~of_queue(index_here)):
                    with m.If(~may_ask):
                        m.d.sync += is_short.eq(1)
                    with m.Elif(wants_index):
                        m.next = "SEND_INDEX"
                    with m.Elif(table.rules.event_index & (context.published != event)):
                        m.next = "PUBLISH"
            with m.State("SEND_INDEX"):
                m.d.comb += [
                    self.accesses.valid.eq(1),
                    access.length_bytes.eq(2),
                    access.cookie.kind.eq(LineKind.INDEX),
                    access.cookie.number.eq(queue),
                ]
                with m.If(self.accesses.ready):
                    m.d.comb += [ask_index.eq(1), clear_kick.eq(here)]
                    m.d.sync += context.news.eq(0)
                    m.next = "STORE"
            with m.State("PUBLISH"):
                m.d.comb += [
                    access.length_bytes.eq(Mux(packed, 4, 2)),
                    access.is_write.eq(1),
                    access.data.eq(Cat(event[:16], Const(spec.EVENT_DESC, 16))),
                    self.accesses.valid.eq(1),
                ]
                with m.If(self.accesses.ready):
                    m.d.sync += [context.published.eq(event), context.news.eq(1), context.running.eq(1), context.start.eq(context.count)]
                    m.next = "ASK_INDEX"
                    with m.If(packed):
                        m.next = "LOOK"

            with m.State("STORE"):
                m.d.comb += [write_context.en.eq(1), visited.eq(1)]
                m.next = "CHOOSE"
            with m.State("BREAK"):
                m.d.comb += self.broken.eq(1 << function)
                m.next = "CHOOSE"
        m.d.comb += self.at_work.eq(Mux(fsm.ongoing("CHOOSE"), 0, 1 << function))

        # What a command stores. Addresses are aligned [VIRTIO1.4 2.7, 2.8].
        m.d.comb += [
            self.table.queue.eq(queue),
            self.table.content.base.eq(command.descriptor_iova[4:]),
            self.table.content.size.eq(command.size),
            self.table.content.rules.eq(command.rules),
            write_areas.addr.eq(queue),
            write_areas.data.driver.eq(Cat(Const(0, 1), command.driver_iova[1:])),
            write_areas.data.device.eq(Cat(Const(0, 2), command.device_iova[2:])),
            self.fresh.payload.eq(queue),
        ]

        # The slot that is taken.
        content = self.slot.content
        m.d.comb += [
            self.slot.function.eq(function),
            self.slot.number.eq(tail[:SLOT_BITS]),
            content.queue.eq(queue),
            content.generation.eq(generation),
            content.count.eq(context.count),
            content.head.eq(head),
            content.wrap.eq(context.wrap),
            content.line.eq(Mux(is_shared, line, tail[:SLOT_BITS])),
            content.before.eq(Mux(is_shared, before, 0)),
            content.length.eq(Mux(is_shared, length, fresh_length)),
            content.place.eq(place),
        ]
        for n, own_tail in enumerate(self.tails):
            with m.If(self.slot.valid & (function == n)):
                m.d.sync += own_tail.eq(own_tail + 1)

        # Bits of the queues.
        both_halves, asked_half = Signal(2 * count), Signal(2 * count)
        m.d.comb += [
            both_halves.eq(3 << Cat(Const(0, 1), queue)),
            asked_half.eq(1 << Cat(ask_half, queue)),
        ]
        begin_halves = Cat(begin[q // 2] for q in range(2 * count))
        enabled_halves = Cat(self.enabled[q // 2] for q in range(2 * count))
        forgotten = Cat(self.forget[n] for n in self.queue_functions)
        m.d.sync += [
            self.enabled.eq((self.enabled | begin) & ~end & ~forgotten),
            work.eq(((work & ~clear_work) | set_work) & ~begin),
            hungry.eq(((hungry & ~Mux(visited, here, 0)) | Mux(visited & is_short, here, 0)) & ~begin),
            kicked.eq(((kicked & ~clear_kick) | kick) & ~begin),
            parked.eq(((parked & ~Mux(restart, here, 0)) | self.flush_parks) & ~begin),
            flushed.eq(((flushed & ~Mux(restart, here, 0)) | self.flush) & ~begin),
            ended.eq(((ended & ~Mux(restart, here, 0)) | self.flush_ends) & ~begin),
            index_flies.eq((index_flies & ~self.index_came) | Mux(ask_index, here, 0)),
            index_here.eq(((index_here & ~Mux(take_index, here, 0)) | (self.index_came & self.enabled)) & ~begin),
            heads_fly.eq((heads_fly & ~self.heads_came) | Mux(ask_heads, asked_half, 0)),
            heads_here.eq(((heads_here & ~Mux(restart, both_halves, 0) & ~Mux(end_half, here_half, 0))
                           | (self.heads_came & enabled_halves)) & ~begin_halves),
        ]

        # A queue is drained when the slots are gone that were taken before it ended.
        marks = [Signal(SLOT_BITS + 1, name=f"mark_{n}") for n in range(self.functions)]
        draining = Signal(self.functions)
        for n in range(self.functions):
            with m.If(self.walks[n] == marks[n]):
                m.d.sync += draining[n].eq(0)
            with m.If(end.any() & (function == n)):
                m.d.sync += [draining[n].eq(1), marks[n].eq(self.tails[n])]
        for q, n in enumerate(self.queue_functions):
            m.d.comb += self.drained[q].eq(
                ~self.enabled[q] & ~draining[n] & ~index_flies[q] & ~heads_fly[2 * q] & ~heads_fly[2 * q + 1])
        return m
