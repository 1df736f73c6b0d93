"""Looks ahead: finds the second read that a ring entry's chain needs, while older chains are being walked."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import virtio_ring as spec
from .ring_layouts import LINE_DESCRIPTORS, SLOT_BITS, SLOTS, Descriptor, LineAccess, RingTable, Slot, read_descriptors


def has_sound_table(descriptor, rules, next_flag):
    """Return whether ``descriptor`` may refer to a table: whole descriptors, the last of its chain. [VIRTIO1.4 2.7.5.3, 2.8.7]"""
    return rules.indirect & ~next_flag & (descriptor.length[:4] == 0) & (descriptor.length != 0)


def is_available(flags, wrap):
    """Return whether a packed descriptor with ``flags`` is the device's while its wrap counter is ``wrap``. [VIRTIO1.4 2.8.1]"""
    return (flags[spec.F_AVAIL] == wrap) & (flags[spec.F_USED] != wrap)


class Scout(wiring.Component):
    """Visits the slots of each function in order, once their line is there, and asks for one more line where it is sure to be needed.

    That is the beginning of an indirect table, or where a split chain leaves the line of its head; and a line in which a packed list goes
    on is read again, now that its first descriptor is known to be available: reads overtake each other, so the line may have been read
    before the driver wrote it. [VIRTIO1.4 2.8.6, 2.8.21] What a slot then waits for is in its second line. In a packed ring nothing is
    asked for behind an entry that is not available.

    Latency: 4 cycles from a line to the read. Throughput: 4 cycles per slot, 2 more for each descriptor of a split chain.

    Parameters
    ----------
    functions, queues : :class:`int`
        How many.

    Members
    -------
    tails, places : ``In(7)``, ``Out(7)``, one per function
        Free-running numbers of the next slot to be taken, and of the next to be visited.
    waiting : ``In(2 * SLOTS)``, one per function
        Lines that have not come.
    slot_at : ``Out``
        ``function``, ``number`` of the next ``slot``.
    slot : ``In(Slot)``
        One cycle later.
    table_at, table : ``Out``, ``In(RingTable)``
        A queue, and what is known of it one cycle later.
    wants_line, line, descriptor
        To read a descriptor, in a cycle in which ``has_line``: see :class:`.lines.LineStore`.
    accesses : ``Out(stream.Signature(LineAccess))``
        The second reads.
    second : ``Out``
        Pulse ``valid``: the slot of ``slot_at`` has a second line, or not (``there``).
    enabled, generations : ``In``, one bit per queue
        Slots of other generations are passed over.
    flush : ``In``, one bit per queue
        Pulse: a generation ends.
    room, alive : ``In(functions)``
        Reads of the function may be sent; slots of others are passed over.
    at_work : ``Out(functions)``
        The function whose slot is visited.
    """

    def __init__(self, *, functions, queues):
        self.functions, self.queues = functions, queues
        function = range(max(functions, 2))
        super().__init__({
            "tails": In(SLOT_BITS + 1).array(functions),
            "places": Out(SLOT_BITS + 1).array(functions),
            "waiting": In(2 * SLOTS).array(functions),
            "slot_at": Out(data.StructLayout({"function": function, "number": SLOT_BITS})),
            "slot": In(Slot),
            "table_at": Out(range(max(queues, 2))),
            "table": In(RingTable),
            "wants_line": Out(1),
            "has_line": In(1),
            "line": Out(data.StructLayout({"function": function, "number": 7, "place": 2})),
            "descriptor": In(Descriptor),
            "accesses": Out(stream.Signature(LineAccess)),
            "second": Out(data.StructLayout({"valid": 1, "there": 1})),
            "enabled": In(queues),
            "generations": In(queues),
            "flush": In(queues),
            "room": In(functions),
            "alive": In(functions),
            "at_work": Out(functions),
        })

    def elaborate(self, platform):
        m = Module()
        function, turn = Signal(range(max(self.functions, 2))), Signal(range(max(self.functions, 2)))
        place, waiting = Signal(SLOT_BITS + 1), Signal(2 * SLOTS)
        with m.Switch(function):
            for n in range(self.functions):
                with m.Case(n):
                    m.d.comb += [place.eq(self.places[n]), waiting.eq(self.waiting[n])]
        ready = Signal(self.functions)
        m.d.comb += [ready[n].eq(self.tails[n] != self.places[n]) for n in range(self.functions)]
        ended = Signal(self.queues)  # an entry that is not available was met
        inside = Signal(self.queues)  # the next entry goes on with a packed list: a table there is a mistake

        slot, table, descriptor = Signal(Slot), Signal(RingTable), Signal(Descriptor)
        steps = Signal(2)  # descriptors behind the head that were looked at
        first, following, needed, offset, unavailable = Signal(16), Signal(16), Signal(16), Signal(16), Signal()
        packed, next_flag, is_live, queue_here = Signal(), Signal(), Signal(), Signal(self.queues)
        m.d.comb += [
            packed.eq(table.rules.packed),
            next_flag.eq(Mux(packed, descriptor.next, descriptor.flags)[spec.F_NEXT]),
            queue_here.eq(1 << slot.queue),
            unavailable.eq(packed & is_live & ~is_available(descriptor.next, slot.wrap)),
            is_live.eq((self.enabled & ~ended).bit_select(slot.queue, 1) & (self.generations.bit_select(slot.queue, 1) == slot.generation)
                       & self.alive.bit_select(function, 1)),
            first.eq(slot.head - slot.before),
            following.eq(descriptor.next),
            needed.eq(Mux(packed, slot.head, following)),
            offset.eq(following - first),
        ]

        # The second line: a table's first block, or the block of the next descriptor.
        target, offset_bytes, left = Signal(60), Signal(4), Signal(4)
        table_left, ring_left = Signal(4), Signal(16)  # from 8 on it does not matter how many
        ask, _ = read_descriptors(self.accesses.payload, target, left, lead=offset_bytes, offset=offset_bytes)
        m.d.comb += [
            *ask,
            table_left.eq(descriptor.length[4:7] + descriptor.address[:4].any()),
            ring_left.eq(table.size - needed),
            self.slot_at.function.eq(turn),
            self.slot_at.number.eq(place),
            self.table_at.eq(slot.queue),
            self.line.function.eq(function),
            self.line.number.eq(slot.line),
            self.line.place.eq(slot.place),
            self.accesses.payload.function.eq(function),
            self.accesses.payload.cookie.number.eq(Cat(place[:SLOT_BITS], Const(1, 1))),
        ]
        is_over, has_room, step = Signal(), Signal(), Signal(2)
        m.d.comb += [has_room.eq(self.room.bit_select(function, 1)), step.eq(slot.place + (following - slot.head)[:2])]
        with m.FSM() as fsm:
            with m.State("CHOOSE"):
                m.d.sync += [function.eq(turn), steps.eq(0)]
                for n in range(self.functions):
                    with m.If(turn == n):
                        m.d.comb += self.slot_at.number.eq(self.places[n])
                m.d.sync += turn.eq(Mux(turn == self.functions - 1, 0, turn + 1))
                with m.If(ready.bit_select(turn, 1)):
                    m.next = "LOOK"
            with m.State("LOOK"):
                m.d.comb += [
                    self.table_at.eq(self.slot.queue),
                    self.line.number.eq(self.slot.line),
                    self.line.place.eq(self.slot.place),
                    self.wants_line.eq(1),
                ]
                m.d.sync += slot.eq(self.slot)
                m.next = "CHOOSE"
                with m.If(self.has_line & ~waiting.bit_select(self.slot.line, 1)):
                    m.next = "TAKE"
            with m.State("TAKE"):
                m.d.sync += [table.eq(self.table), descriptor.eq(self.descriptor)]
                m.next = "JUDGE"
            with m.State("JUDGE"):
                is_indirect, has_table, goes_on_here, again = Signal(), Signal(), Signal(), Signal()
                m.d.comb += [
                    goes_on_here.eq((inside & queue_here).any()),
                    has_table.eq(is_live & ~unavailable & is_indirect & ~goes_on_here
                                 & has_sound_table(descriptor, table.rules, next_flag)),
                    again.eq(is_live & ~unavailable & packed & ~is_indirect & goes_on_here & (slot.before == 0)),
                    is_indirect.eq(Mux(packed, descriptor.next, descriptor.flags)[spec.F_INDIRECT]),
                ]
                m.d.sync += [
                    target.eq(Mux(is_indirect, descriptor.address[4:], table.base + needed)),
                    offset_bytes.eq(Mux(is_indirect, descriptor.address[:4], 0)),
                    left.eq(Mux(is_indirect, table_left | (descriptor.length[7:].any() << 3), ring_left[:3] | (ring_left[3:].any() << 3))),
                ]
                m.next = "CHOOSE"  # for want of room, to come again
                with m.If(has_table | again):
                    with m.If(has_room):
                        m.next = "ASK"
                with m.Elif(is_live & ~packed & ~is_indirect & next_flag & (following < table.size) & (steps != LINE_DESCRIPTORS - 1)):
                    with m.If(offset < slot.length):
                        m.next = "FOLLOW"
                    with m.Elif(has_room):
                        m.next = "ASK"
                with m.Else():
                    m.d.comb += is_over.eq(1)
            with m.State("FOLLOW"):
                m.d.comb += [self.line.place.eq(step), self.wants_line.eq(1)]
                m.d.sync += steps.eq(steps + 1)
                with m.If(self.has_line):
                    m.next = "TAKE"
            with m.State("ASK"):
                m.d.comb += self.accesses.valid.eq(1)
                with m.If(self.accesses.ready):
                    m.d.comb += is_over.eq(1)
                    m.next = "CHOOSE"
        m.d.comb += [
            self.second.valid.eq(is_over),
            self.second.there.eq(self.accesses.valid),
            self.at_work.eq(Mux(fsm.ongoing("CHOOSE"), 0, 1 << function)),
        ]
        with m.If(~fsm.ongoing("CHOOSE")):
            m.d.comb += self.slot_at.function.eq(function)
        for n, own in enumerate(self.places):
            with m.If(is_over & (function == n)):
                m.d.sync += own.eq(own + 1)
        goes_on = packed & is_live & ~unavailable & next_flag
        m.d.sync += [
            ended.eq((ended | Mux(unavailable & is_over, queue_here, 0)) & ~self.flush & self.enabled),
            inside.eq(((inside & ~Mux(is_over, queue_here, 0)) | Mux(is_over & goes_on, queue_here, 0)) & ~self.flush & self.enabled),
        ]
        return m
