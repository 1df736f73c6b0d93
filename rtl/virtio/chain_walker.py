"""Walks descriptor chains in ring order: scatter lists for the back ends, and every rule that a chain may break."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..dma.layouts import Segment
from ..spec import virtio_ring as spec
from .layouts import Chain, Flight
from .ring_layouts import LINE_DESCRIPTORS, SLOT_BITS, SLOTS, Descriptor, LineAccess, Position, RingTable, Slot, read_descriptors
from .scout import has_sound_table, is_available


class Walk(data.Struct):
    """What is known of the chain that is being walked."""

    id: 16  # split: its head; packed: the buffer ID
    slots: 16  # entries of the ring
    count: 16  # descriptors
    total: 33  # bytes
    readable: 32  # of them
    is_writing: 1  # it has reached its writable part
    held: Segment  # its newest segment, until it is known whether another follows
    held_valid: 1
    held_is_write: 1
    next: 16  # split, or in a table: the next descriptor
    in_table: 1
    base: 60  # of the table, in units of 16 bytes
    offset: 4  # and behind that, in bytes: its descriptors lie in two places each
    entries: 17  # as far as `next` can lead
    in_second: 1  # the descriptor is in the slot's second line: its place, and what is there
    place: 2
    first: 16
    length: 3
    has_end: 1  # and the place behind the line, as far as the line's last descriptor lies there
    has_second: 1  # the scout's read was not used yet


class ChainWalker(wiring.Component):
    """Walks the slots of each function in order, once the scout was there, and gives each chain to its port when its walk ended well.

    A chain breaks its function (``broken``) that has more descriptors than ``limit``, a next index beyond table or queue, a readable
    descriptor behind a writable one, more than 2^32-1 readable or writable bytes or 2^32 of both, a buffer or table beyond 2^64, an
    indirect table without INDIRECT_DESC, inside a table, beside NEXT, in a packed list of several entries, of no or broken descriptors, in
    a packed ring of more than ``limit``; a packed list that is longer than its ring, or whose end is still not available when its ring is
    read again. [VIRTIO1.4 2.7.5, 2.8.6, 2.8.7] WRITE of a descriptor that refers to a table is ignored, in a packed table everything but
    WRITE.

    A table may lie anywhere. One that does not lie at a multiple of 16 costs a second read of a descriptor that lies in two blocks.

    A chain waits until its port has room for the longest chain. One of a port that ``waits`` is forgotten meanwhile, so that it holds up
    nobody, and its queue is started again (``flush``); so is one that meets a slot of another queue, which is then ``barred``.

    Latency: 6 cycles from slot to chain. Throughput: 6 cycles per chain of one descriptor; 2 more for a table, 5 for each further
    descriptor of it or of a split chain, 6 of a packed list; up to 8 more for each of a table that does not lie at a multiple of 16; a
    read's latency where the scout did not see it coming.

    Parameters
    ----------
    functions : :class:`int`
        How many.
    queue_functions, queue_ports, queue_indices : tuple of :class:`int`
        Function, port, and index in its function, of each queue.
    limits : tuple of :class:`int`
        The most descriptors of a chain of each port.
    waits : tuple of :class:`bool`
        Which ports wait.

    Members
    -------
    fresh : ``In(stream.Signature(6))``
        A queue begins.
    scouted, places : ``In(7)``, ``Out(7)``, one per function
        Free-running numbers of the next slot that the scout visits, and the next that is walked: the oldest one.
    waiting : ``In(2 * SLOTS)``, one per function
        Lines that have not come.
    slot_at, slot, second, table_at, table, wants_line, line, descriptor, accesses, enabled, generations, alive, room, at_work
        As the scout's; ``second``: the scout has asked for the slot's second line. ``wants_line`` is always granted.
    walked_at, walked : ``In``, ``Out(Position)``
        A queue, and one cycle later how far it was walked.
    suspend : ``In(functions)``
        No chain is begun.
    flush, flush_ends, flush_parks, progress, midway, barred, lacks_entry
        See :class:`.dispatcher.Dispatcher`.
    release : ``Out(ports)``
        Pulse: a slot of the port is gone and no chain comes of it.
    port_ready : ``In(ports)``
        There is room for the segments of the longest chain.
    readable, writable, put_readable, put_writable, commit, rollback : ``Out``
        Segments, pulses of the ports that take them, and what becomes of them.
    chain, flight : ``Out``
        With ``commit``.
    buffer : ``Out``
        Pulse ``valid``: ``function`` has a buffer, of ``address``, ``length_bytes``, ``is_write``.
    broken : ``Out(functions)``
        Pulse.
    """

    def __init__(self, *, functions, queue_functions, queue_ports, queue_indices, limits, waits):
        self.queue_functions, self.queue_ports, self.queue_indices = tuple(queue_functions), tuple(queue_ports), tuple(queue_indices)
        self.limits, self.waits = tuple(limits), tuple(waits)
        self.functions, self.ports, self.queues = functions, len(limits), len(queue_functions)
        function, queue = range(max(self.functions, 2)), range(max(self.queues, 2))
        super().__init__({
            "fresh": In(stream.Signature(6)),
            "scouted": In(SLOT_BITS + 1).array(self.functions),
            "places": Out(SLOT_BITS + 1).array(self.functions),
            "waiting": In(2 * SLOTS).array(self.functions),
            "slot_at": Out(data.StructLayout({"function": function, "number": SLOT_BITS})),
            "slot": In(Slot),
            "second": In(1),
            "table_at": Out(queue),
            "table": In(RingTable),
            "wants_line": Out(1),
            "line": Out(data.StructLayout({"function": function, "number": 7, "place": 2})),
            "descriptor": In(Descriptor),
            "accesses": Out(stream.Signature(LineAccess)),
            "walked_at": In(queue),
            "walked": Out(Position),
            "enabled": In(self.queues),
            "generations": Out(self.queues),
            "alive": In(self.functions),
            "room": In(self.functions),
            "suspend": In(self.functions),
            "flush": Out(self.queues),
            "flush_ends": Out(self.queues),
            "flush_parks": Out(self.queues),
            "progress": Out(self.queues),
            "midway": Out(self.queues),
            "barred": Out(self.queues),
            "lacks_entry": Out(self.queues),
            "release": Out(self.ports),
            "port_ready": In(self.ports),
            "readable": Out(Segment),
            "writable": Out(Segment),
            "put_readable": Out(self.ports),
            "put_writable": Out(self.ports),
            "commit": Out(self.ports),
            "rollback": Out(self.ports),
            "chain": Out(Chain),
            "flight": Out(Flight),
            "buffer": Out(data.StructLayout({"valid": 1, "function": function, "address": 64, "length_bytes": 32, "is_write": 1})),
            "broken": Out(self.functions),
            "at_work": Out(self.functions),
        })

    def elaborate(self, platform):
        m = Module()
        queue_depth, function_depth = max(self.queues, 2), max(self.functions, 2)
        m.submodules.walks = walks = Memory(shape=Walk, depth=self.functions, init=[])
        m.submodules.walked = walked = Memory(shape=Position, depth=self.queues, init=[])
        read_walk, write_walk = walks.read_port(), walks.write_port()
        read_walked, write_walked = walked.read_port(), walked.write_port()
        m.d.comb += [read_walked.addr.eq(self.walked_at), self.walked.eq(read_walked.data)]

        # One bit per function: a chain was begun; it waits for its slot's second line, or to ask for it; others are barred.
        begun, stuck, unasked, alone = (Signal(self.functions, name=name) for name in ("begun", "stuck", "unasked", "alone"))
        begun_queues = [Signal(range(queue_depth), name=f"begun_queue_{n}") for n in range(self.functions)]
        tried = Signal(self.queues)  # a list is read again: its beginning was there, what came behind may be older

        # The slot at work.
        function, turn = Signal(range(function_depth)), Signal(range(function_depth))
        place, begun_queue = Signal(SLOT_BITS + 1), Signal(range(queue_depth))
        with m.Switch(function):
            for n in range(self.functions):
                with m.Case(n):
                    m.d.comb += [place.eq(self.places[n]), begun_queue.eq(begun_queues[n])]
        slot, table, descriptor, walk = Signal(Slot), Signal(RingTable), Signal(Descriptor), Signal(Walk)
        owner, is_kept = Signal(range(function_depth)), Signal()  # whose ``walk`` is; it is the function's
        port, limit, index, port_waits = Signal(range(max(self.ports, 2))), Signal(16), Signal(16), Signal()
        with m.Switch(slot.queue):
            for q, p in enumerate(self.queue_ports):
                with m.Case(q):
                    m.d.comb += [
                        port.eq(p), limit.eq(self.limits[p]), index.eq(self.queue_indices[q]), port_waits.eq(int(self.waits[p])),
                    ]
        here, queue_here, port_here, begun_port_here = Signal(self.functions), Signal(self.queues), Signal(self.ports), Signal(self.ports)
        m.d.comb += [here.eq(1 << function), queue_here.eq(1 << slot.queue), port_here.eq(1 << port)]
        with m.Switch(begun_queue):
            for q, p in enumerate(self.queue_ports):
                with m.Case(q):
                    m.d.comb += begun_port_here.eq(1 << p)
        resumed, is_begun, is_dead = Signal(), Signal(), Signal()
        m.d.comb += [
            is_begun.eq((begun & here).any()),
            is_dead.eq(~(self.enabled & queue_here).any() | ~(self.alive & here).any()
                       | ((self.generations & queue_here).any() != slot.generation)),
        ]

        # Whose turn it is.
        ready, lost = Signal(self.functions), Signal(self.functions)
        for n in range(self.functions):
            second_waits = self.waiting[n].bit_select(Cat(self.places[n][:SLOT_BITS], Const(1, 1)), 1)
            m.d.comb += [
                ready[n].eq(
                    (self.places[n] != self.scouted[n]) & ~second_waits & ~(unasked[n] & ~self.room[n] & self.alive[n])),
                lost[n].eq(begun[n] & ~stuck[n]
                           & (~self.alive[n] | self.suspend[n] | ~self.enabled.bit_select(begun_queues[n], 1))),
            ]

        # What the descriptor says.
        packed, flags = Signal(), Signal(16)
        is_chained, is_table, is_write, is_bad, following = Signal(), Signal(), Signal(), Signal(), Signal(16)
        entries, last_slot, ends_table = Signal(17), Signal(16), Signal()  # of table or ring; from ``TAKE`` on, the last from ``JUDGE`` on
        total, has_bytes = Signal(33), Signal()  # with the descriptor, one cycle after it
        writable, is_too_much = Signal(32), Signal()  # ``writable`` after ``PUT``
        in_table = walk.in_table
        m.d.comb += [
            packed.eq(table.rules.packed),
            flags.eq(Mux(packed, descriptor.next, descriptor.flags)),
            is_write.eq(flags[spec.F_WRITE]),
            is_table.eq(flags[spec.F_INDIRECT] & ~(packed & in_table)),
            following.eq(Mux(packed, walk.next + 1, descriptor.next)),
            is_chained.eq(Mux(packed & in_table, ~ends_table, flags[spec.F_NEXT])),
            is_too_much.eq(total[32] & (total[:32].any() | ~is_write | (walk.readable == 0))),
        ]
        m.d.sync += [total.eq(walk.total + descriptor.length), has_bytes.eq(descriptor.length != 0)]
        m.d.sync += ends_table.eq(walk.next + 1 == walk.entries)
        is_beyond, end, most = Signal(), Signal(33), Signal(16)  # ``most`` from ``TAKE`` on
        # Whether the sum's low bits are 0 is known without it: the carries are those of the operands' highest bits that are alike.
        low = descriptor.address[:32]
        is_zero = (low ^ descriptor.length) == ((low | descriptor.length) << 1)[:32]
        m.d.comb += [
            end.eq(low + descriptor.length),
            is_beyond.eq(descriptor.address[32:].all() & end[32] & ~is_zero),
        ]
        with m.If(is_table):
            m.d.comb += is_bad.eq(
                in_table | is_beyond | (packed & (walk.slots != 0)) | ~has_sound_table(descriptor, table.rules, flags[spec.F_NEXT])
                | (packed & (descriptor.length[20:].any() | (descriptor.length[4:20] > most))))
        with m.Else():
            m.d.comb += is_bad.eq(
                (walk.count >= most) | (walk.is_writing & ~is_write) | is_beyond
                | (is_chained & Mux(packed, ~in_table & (walk.slots >= last_slot), descriptor.next >= entries)))

        # Segments: each waits until it is known whether it is the last of its list.
        is_alike, put_held, is_end, ends = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            is_end.eq(~is_chained),
            is_alike.eq(walk.held_is_write == is_write),
            self.put_readable.eq(Mux(put_held & ~walk.held_is_write, port_here, 0)),
            self.put_writable.eq(Mux(put_held & walk.held_is_write, port_here, 0)),
            self.readable.eq(walk.held),
            self.readable.last.eq(ends | ~is_alike),
            self.writable.eq(self.readable),
        ]

        # Where the next descriptor is.
        target, offset, in_first = Signal(60), Signal(16), Signal()  # ``in_...`` from ``STEP`` on
        # From ``TAKE`` on: number of the slot's first descriptor; place in the second line of ``walk.next``, whenever that has changed.
        slot_index, second_offset = Signal(16), Signal(16)
        m.d.sync += slot_index.eq(slot.head - slot.before)
        table_place, table_offset = descriptor.address[4:6], descriptor.address[:4]
        table_block, table_rest = LINE_DESCRIPTORS - table_place, descriptor.length[4:] + table_offset.any()
        rest, second_number, opens_second = Signal(17), Signal(7), Signal()
        is_cut, begins_in_second, in_second = Signal(), Signal(), Signal()  # it lies in two places; the first is there; both are
        has_both = Signal()
        lacks_end, asks_end = Signal(), Signal()  # only the second is to be asked for; is asked for
        turns, more_turns = Signal(2), Signal(2)  # dwords, and bytes, by which the descriptor is to be turned
        access = self.accesses.payload
        ask, places = read_descriptors(access, target, rest, lead=Mux(asks_end, 0, walk.offset), offset=walk.offset)
        m.d.comb += [
            offset.eq(walk.next - slot_index),
            is_cut.eq(walk.offset.any()),
            begins_in_second.eq(walk.in_second & (second_offset < walk.length)),
            has_both.eq(begins_in_second & (~is_cut | (second_offset + 1 < walk.length) | walk.has_end)),
            lacks_end.eq(begins_in_second & ~has_both),
            second_number.eq(Cat(place[:SLOT_BITS], Const(1, 1))),
        ]

        flush, gone, give_up, is_again = Signal(self.queues), Signal(), Signal(), Signal()
        m.d.comb += [
            self.slot_at.function.eq(function),
            self.slot_at.number.eq(place),
            self.table_at.eq(slot.queue),
            self.line.function.eq(function),
            *ask,
            access.function.eq(function),
            access.cookie.number.eq(second_number),
            write_walk.addr.eq(function),
            write_walk.data.eq(walk),
            read_walk.addr.eq(function),
            write_walked.addr.eq(slot.queue),
            write_walked.data.count.eq(slot.count + 1),
            write_walked.data.head.eq(slot.head + 1),
            write_walked.data.wrap.eq(slot.wrap),
            is_kept.eq((owner == function) | (self.functions == 1)),
            self.flush.eq(flush),
            self.chain.queue.eq(index),
            self.chain.readable_bytes.eq(walk.readable),
            self.chain.writable_bytes.eq(writable),
            self.flight.queue.eq(slot.queue),
            self.flight.id.eq(walk.id),
            self.flight.slots.eq(walk.slots),
            self.flight.writable_bytes.eq(writable),
            self.buffer.function.eq(function),
            self.buffer.address.eq(descriptor.address),
            self.buffer.length_bytes.eq(descriptor.length),
            self.buffer.is_write.eq(is_write),
        ]
        ends_ring = Signal()
        m.d.comb += ends_ring.eq(slot.head + 1 == table.size)
        with m.If(ends_ring):
            m.d.comb += [write_walked.data.head.eq(0), write_walked.data.wrap.eq(~slot.wrap)]

        begun_walk = Walk(read_walk.data)  # the function's, unless that is kept
        with m.FSM() as fsm:
            with m.State("CHOOSE"):
                m.d.sync += function.eq(turn)
                m.d.comb += [self.slot_at.function.eq(turn), read_walk.addr.eq(turn)]
                for n in range(self.functions):
                    with m.If(turn == n):
                        m.d.comb += self.slot_at.number.eq(self.places[n])
                with m.If((ready | lost).any()):
                    m.d.sync += turn.eq(Mux(turn == self.functions - 1, 0, turn + 1))
                with m.If(self.fresh.valid):
                    m.d.comb += [
                        self.fresh.ready.eq(1), write_walked.en.eq(1), write_walked.addr.eq(self.fresh.payload),
                        write_walked.data.count.eq(0), write_walked.data.head.eq(0), write_walked.data.wrap.eq(1),
                    ]
                    m.d.sync += tried.eq(tried & ~(1 << self.fresh.payload))
                with m.Elif(lost.bit_select(turn, 1)):
                    m.next = "GIVE_UP"
                with m.Elif(ready.bit_select(turn, 1)):
                    m.next = "LOAD"
            with m.State("GIVE_UP"):
                m.d.comb += [give_up.eq(1), flush.eq(1 << begun_queue)]
                m.next = "CHOOSE"
            with m.State("LOAD"):
                m.d.comb += [
                    self.table_at.eq(self.slot.queue),
                    self.line.number.eq(Cat(self.slot.line, is_again)),
                    self.line.place.eq(self.slot.place),
                    self.wants_line.eq(1),
                ]
                m.d.sync += [slot.eq(self.slot), owner.eq(function), resumed.eq((stuck & here).any())]
                with m.If(~is_begun):
                    m.d.sync += [
                        walk.id.eq(self.slot.head), walk.slots.eq(0), walk.count.eq(0), walk.total.eq(0), walk.readable.eq(0),
                        walk.is_writing.eq(0), walk.held_valid.eq(0), walk.next.eq(0), walk.in_table.eq(0), walk.offset.eq(0),
                        walk.in_second.eq(0), walk.has_end.eq(0), walk.has_second.eq(self.second),
                    ]  # fmt: skip
                with m.Elif(~is_kept):
                    m.d.sync += walk.eq(begun_walk)
                with m.If((stuck & here).any()):
                    m.d.comb += [self.line.number.eq(second_number), self.line.place.eq(Mux(is_kept, walk.place, begun_walk.place))]
                with m.Elif(is_begun & (begun_queue == self.slot.queue)):  # it goes on: in a line that was read again, or in the one before
                    m.d.comb += is_again.eq(Mux(self.slot.before == 0, self.second, Mux(is_kept, walk.in_second, begun_walk.in_second)))
                    m.d.sync += [walk.has_second.eq(0), walk.in_second.eq(is_again)]
                m.next = "TAKE"
            with m.State("TAKE"):
                m.d.sync += [
                    table.eq(self.table), descriptor.eq(self.descriptor), second_offset.eq(walk.next - walk.first),
                    entries.eq(Mux(in_table, walk.entries, self.table.size)), last_slot.eq(self.table.size - 1),
                    most.eq(Mux(self.table.size < limit, self.table.size, limit)),
                ]
                m.next = "CHOOSE"
                with m.If(is_dead):
                    m.d.comb += [gone.eq(1), give_up.eq(is_begun & (begun_queue == slot.queue))]
                with m.Elif(is_begun & (begun_queue != slot.queue)):
                    m.d.comb += [gone.eq(1), flush.eq(queue_here)]
                    m.d.sync += alone.eq(alone | here)
                with m.Elif((self.suspend & here).any()):
                    m.d.comb += [gone.eq(1), flush.eq(queue_here), give_up.eq(is_begun)]
                with m.Elif(~is_begun & ~(self.port_ready & port_here).any()):
                    m.d.comb += [gone.eq(port_waits), flush.eq(Mux(port_waits, queue_here, 0)), self.flush_parks.eq(flush)]
                with m.Elif(is_begun & ~resumed & (slot.before == 0) & ~walk.in_second & ~(tried & queue_here).any()):
                    m.d.comb += [gone.eq(1), flush.eq(queue_here), give_up.eq(1)]  # its line may be older than its first descriptor
                    m.d.sync += tried.eq(tried | queue_here)
                with m.Elif(resumed & ((unasked & here).any() | is_cut)):
                    m.next = "STEP"
                with m.Else():
                    m.next = "JUDGE"
            with m.State("JUDGE"):
                m.d.comb += [
                    self.line.number.eq(second_number),
                    self.line.place.eq(table_place),
                    self.wants_line.eq(is_table),
                ]
                with m.If(packed & ~in_table & ~is_available(flags, slot.wrap)):
                    m.d.comb += [
                        gone.eq(1), flush.eq(queue_here), give_up.eq(is_begun), self.flush_ends.eq(Mux(is_begun, 0, queue_here)),
                    ]
                    m.next = "CHOOSE"
                    with m.If(is_begun):
                        m.d.sync += tried.eq(tried | queue_here)
                        with m.If((tried & queue_here).any()):
                            m.d.comb += self.broken.eq(here)
                with m.Elif(is_bad):
                    m.d.comb += [gone.eq(1), give_up.eq(is_begun), self.broken.eq(here)]
                    m.next = "CHOOSE"
                with m.Elif(is_table):
                    m.d.sync += [
                        walk.in_table.eq(1), walk.base.eq(descriptor.address[4:]), walk.offset.eq(table_offset),
                        *(of.eq(Mux(descriptor.length[20:].any(), 1 << 16, descriptor.length[4:])) for of in (walk.entries, entries)),
                        walk.next.eq(0), second_offset.eq(0), walk.slots.eq(1), walk.in_second.eq(0),
                    ]
                    with m.If(packed):
                        m.d.sync += walk.id.eq(descriptor.flags)
                    m.next = "STEP"
                    with m.If(walk.has_second):  # the scout has asked for its beginning
                        m.d.sync += [
                            walk.has_second.eq(0),
                            walk.in_second.eq(1),
                            walk.first.eq(0),
                            walk.length.eq(Mux(table_rest < table_block, table_rest, table_block)),
                        ]
                        with m.If(~table_offset.any()):
                            m.next = "GET"
                with m.Else():
                    m.next = "PUT"
            with m.State("PUT"):
                m.d.comb += [put_held.eq(walk.held_valid & has_bytes), self.buffer.valid.eq(has_bytes)]
                m.d.sync += [
                    walk.count.eq(walk.count + 1),
                    walk.total.eq(total),
                    walk.is_writing.eq(is_write),
                    walk.next.eq(following),
                    second_offset.eq(following - walk.first),
                    writable.eq(total - walk.readable),
                ]
                with m.If(~is_write):
                    m.d.sync += [walk.readable.eq(total), writable.eq(0)]
                with m.If(~in_table & (packed | (walk.slots == 0))):
                    m.d.sync += walk.slots.eq(walk.slots + 1)
                with m.If(~in_table & packed):
                    m.d.sync += walk.id.eq(descriptor.flags)
                with m.If(has_bytes):
                    m.d.sync += [
                        walk.held.address.eq(descriptor.address), walk.held.length_bytes.eq(descriptor.length), walk.held_valid.eq(1),
                        walk.held_is_write.eq(is_write),
                    ]  # fmt: skip
                with m.If(is_too_much):
                    m.d.comb += [gone.eq(1), give_up.eq(is_begun), self.broken.eq(here)]
                    m.next = "CHOOSE"
                with m.Elif(is_end):
                    m.next = "COMMIT"
                with m.Elif(packed & ~in_table):
                    m.next = "GO_ON"
                with m.Else():
                    m.next = "STEP"
            with m.State("COMMIT"):  # the writer wants a list for every chain
                m.d.comb += [
                    self.commit.eq(port_here), write_walked.en.eq(1), gone.eq(1), put_held.eq(walk.held_valid), ends.eq(1),
                ]
                with m.If(writable == 0):
                    m.d.comb += [self.put_writable.eq(port_here), self.writable.length_bytes.eq(0)]
                m.d.sync += [tried.eq(tried & ~queue_here), begun.eq(begun & ~here), alone.eq(alone & ~here)]
                m.next = "CHOOSE"
            with m.State("GO_ON"):  # with the next entry of a packed ring
                m.d.comb += [write_walk.en.eq(1), gone.eq(1)]
                m.d.sync += begun.eq(begun | here)
                m.next = "CHOOSE"

            with m.State("STEP"):
                m.d.sync += [
                    target.eq(Mux(in_table, walk.base, table.base) + walk.next + lacks_end),
                    rest.eq(Mux(lacks_end, 1, entries - walk.next + is_cut)),
                    asks_end.eq(lacks_end),
                    in_first.eq(~in_table & ~walk.in_second & (offset < slot.length)),
                    in_second.eq(has_both),
                ]
                m.next = "SEEK"
            with m.State("SEEK"):
                m.d.comb += [
                    self.line.number.eq(Mux(in_first, slot.line, second_number)),
                    self.line.place.eq(target[:2]),
                    self.wants_line.eq(1),
                ]
                m.next = "GET"
                with m.If(~in_first & ~in_second):
                    m.d.sync += unasked.eq(unasked & ~here)
                    with m.If(~walk.has_second):
                        m.next = "ASK"
                        with m.If(~(self.room & here).any()):
                            m.d.sync += unasked.eq(unasked | here)
                            m.next = "WAIT"
                    with m.Else():
                        m.d.comb += opens_second.eq(1)
            with m.State("ASK"):
                m.d.comb += self.accesses.valid.eq(1)
                with m.If(self.accesses.ready):
                    m.d.comb += opens_second.eq(1)
                    m.next = "WAIT"
            with m.State("GET"):
                m.d.comb += [self.line.number.eq(second_number), self.line.place.eq(target[:2] + 1), self.wants_line.eq(is_cut)]
                m.d.sync += descriptor.eq(self.descriptor)
                m.next = "JUDGE"
                with m.If(is_cut):
                    m.next = "GET_END"
            with m.State("GET_END"):
                m.d.sync += Cat(more_turns, turns).eq(walk.offset)
                for n in range(spec.DESCRIPTOR_BYTES):
                    with m.If(n < walk.offset):
                        m.d.sync += descriptor.as_value().word_select(n, 8).eq(self.descriptor.as_value().word_select(n, 8))
                m.next = "TURN"
            with m.State("TURN"):
                with m.If(turns.any()):
                    m.d.sync += [descriptor.eq(descriptor.as_value().rotate_right(32)), turns.eq(turns - 1)]
                with m.Elif(more_turns.any()):
                    m.d.sync += [descriptor.eq(descriptor.as_value().rotate_right(8)), more_turns.eq(more_turns - 1)]
                with m.Else():
                    m.next = "JUDGE"
            with m.State("WAIT"):
                m.d.comb += write_walk.en.eq(1)
                m.d.sync += [begun.eq(begun | here), stuck.eq(stuck | here)]
                m.next = "CHOOSE"

        with m.If(opens_second):
            m.d.sync += [
                walk.has_second.eq(0),
                walk.in_second.eq(1),
                walk.has_end.eq(asks_end),
                walk.place.eq(target),
                walk.first.eq(walk.next),
                walk.length.eq(places),
            ]
        with m.If(gone):
            m.d.sync += [stuck.eq(stuck & ~here), unasked.eq(unasked & ~here)]
        with m.If(give_up):
            m.d.comb += self.rollback.eq(begun_port_here)
            m.d.sync += [begun.eq(begun & ~here), alone.eq(alone & ~here)]
        with m.If(self.broken.any()):  # what was put before the chain's first read
            m.d.comb += self.rollback.eq(port_here)
        for n, own in enumerate(self.places):
            with m.If(gone & (function == n)):
                m.d.sync += own.eq(own + 1)
            with m.If(write_walk.en & (function == n)):
                m.d.sync += begun_queues[n].eq(slot.queue)
        m.d.comb += [
            self.at_work.eq(Mux(fsm.ongoing("CHOOSE"), 0, here)),
            self.release.eq(Mux(gone & ~self.commit.any(), port_here, 0)),
            self.progress.eq(Mux(gone & packed & (ends_ring | (slot.place == LINE_DESCRIPTORS - 1)), queue_here, 0)),
        ]
        m.d.sync += self.generations.eq(self.generations ^ flush)
        for q, n in enumerate(self.queue_functions):
            m.d.comb += [
                self.midway[q].eq(begun[n] & (begun_queues[n] == q)),
                self.barred[q].eq(alone[n] & (begun_queues[n] != q)),
                self.lacks_entry[q].eq(self.midway[q] & ~stuck[n]),
            ]
        return m
