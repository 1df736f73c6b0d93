"""The used side's first half: finished chains become used elements or used descriptors."""

from amaranth import C, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..dma.layouts import WriterDone
from ..spec import virtio_ring as spec
from ..stream.round_robin import number, round_robin
from ..tlp.layouts import BurstStatus
from .layouts import Flight, QueueCommand, RingAccess

VISIT_CHAINS = 32  # of one queue in a row
VISIT_WRITES = 3  # that may follow a chain taken while its function is usable: a full row, and an element across two


class Written(data.Struct):
    """What one write tells the driver, or will tell when the used index is behind it."""

    queue: 6
    position: 16  # behind it: used index; packed: slot, and the wrap counter in bit 15
    count: 17  # entries of the ring that it covers, or 65536 if that is less; 0: nothing ends in this write


class Opened(data.Struct):
    """What is written of a queue and must not be seen yet: chains that wait for the rest of their packet."""

    position: 16  # in front of them
    count: 17
    holds: 1  # packed: the first used descriptor is kept back until all others are written
    first_position: 16
    first_id: 16
    first_length: 32


class Ring(data.Struct):
    """What a command says of one queue."""

    packed: 1
    in_order: 1
    size: 16
    area: 64  # split: the device area; packed: the descriptor area


def context_layout(packets):
    """Layout: how far the writer is in one queue; with ``packets`` also what it keeps back between two visits."""
    return data.StructLayout({"position": 16, **({"opened": Opened} if packets else {})})


MOST_COUNTED = 1 << 16  # entries of a ring: as many as positions there are, so all that an event could name


def count_up(count, more):
    """Return ``count + more``, or 65536 if that is less; each is 17 bits wide."""
    total = count + more
    return Mux(total[16:].any(), MOST_COUNTED, total[:16])


class UsedWriter(wiring.Component):
    """Writes the used element or the used descriptor of each finished chain, in order of chains.

    Elements of one visit to a queue that lie side by side in one row leave as one write; a used descriptor is never cut.
    [VIRTIO1.4 2.7.8, 2.8.4] With IN_ORDER a chain whose writable bytes were all written is left to the element of the next
    chain, if that waits already and does not begin a packet. [VIRTIO1.4 2.7.9, 2.8.8]

    Chains of one packet (``more`` of all but the last) are told of when the last is written; the used descriptor that comes first in
    the ring is written last. [VIRTIO1.4 2.8.9, 5.1.9.4.1]

    A chain of a queue that is not enabled, or of a dead function, is taken and forgotten. A chain that did not end OK is
    ``failed``: neither it nor what its row holds is written. A visit ends after at most 32 chains.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    functions : :class:`int`
        How many.
    port_functions : tuple of :class:`int`
        Function of each port.
    queues : :class:`int`
        How many.
    packets : :class:`bool`
        There may be ``more`` of a packet; without it the bit is ignored.

    Members
    -------
    commands : ``In(stream.Signature(QueueCommand))``
        Taken between two visits.
    flights, finished : one per port
        Chains, and how they ended.
    usable : ``In(functions)``
        Three writes may follow.
    enabled : ``In(queues)``
        Queues that are served.
    dead : ``In(functions)``
        The function is stopped or broken.
    writes : ``Out(stream)``
        ``function``, ``access`` and what it tells.
    failed : ``Out(functions)``
        Pulse.
    at_work : ``Out(functions)``
        The function that is visited.
    """

    def __init__(self, *, width, functions, port_functions, queues, packets):
        self.width, self.functions, self.port_functions = width, functions, tuple(port_functions)
        self.queues, self.packets = queues, packets
        self.row_bytes = max(width, 128) // 8
        ports = len(self.port_functions)
        write = data.StructLayout({"function": range(max(functions, 2)), "access": RingAccess(width), "written": Written})
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "flights": In(stream.Signature(Flight)).array(ports),
            "finished": In(stream.Signature(WriterDone)).array(ports),
            "usable": In(functions),
            "enabled": In(queues),
            "dead": In(functions),
            "writes": Out(stream.Signature(write)),
            "failed": Out(functions),
            "at_work": Out(functions),
        })

    def elaborate(self, platform):
        m = Module()
        ports, row_bits = len(self.port_functions), (self.row_bytes - 1).bit_length()
        layout = context_layout(self.packets)
        m.submodules.contexts = contexts = Memory(shape=layout, depth=self.queues, init=[])
        m.submodules.rings = rings = Memory(shape=Ring, depth=self.queues, init=[])
        read_context, write_context = contexts.read_port(), contexts.write_port()
        read_ring, write_ring = rings.read_port(), rings.write_port()

        # Who wants a visit, and what waits at the port that is visited.
        wanted, granted = Signal(ports), Signal(ports)
        port, function, take = Signal(range(max(ports, 2))), Signal(range(max(self.functions, 2))), Signal()
        flight, done, waits, more = Signal(Flight), Signal(WriterDone), Signal(), Signal()
        m.d.comb += more.eq(done.more & self.packets)
        for n, owner in enumerate(self.port_functions):
            m.d.comb += wanted[n].eq(self.flights[n].valid & self.finished[n].valid & (self.usable[owner] | self.dead[owner]))
        with m.Switch(port):
            for n, owner in enumerate(self.port_functions):
                with m.Case(n):
                    m.d.comb += [
                        function.eq(owner),
                        flight.eq(self.flights[n].payload),
                        done.eq(self.finished[n].payload),
                        waits.eq(self.flights[n].valid & self.finished[n].valid),
                        self.flights[n].ready.eq(take),
                        self.finished[n].ready.eq(take),
                    ]

        # The visit: its queue, the chain at work, the row in which elements gather.
        queue, context, opened, chains = Signal(6), Signal(layout), Signal(Opened), Signal(range(VISIT_CHAINS))
        ring = Signal(Ring)
        item = Signal(data.StructLayout({"id": 16, "slots": 16, "length": 32, "is_whole": 1, "is_good": 1, "more": 1}))
        ahead, ahead_next, is_last_slot = Signal(16), Signal(16), Signal()  # position behind the chain; context.position: of its element
        iova, row = Signal(64), Signal(RingAccess(self.width))
        opened_count, written_count, is_full = Signal(17), Signal(17), Signal()
        skipped = Signal()  # the element stands for chains in front of its own
        is_dead, follows = Signal(), Signal()
        mask, slot, slots, slot_end = Signal(16), Signal(15), Signal(16), Signal(17)
        m.d.comb += [
            slots.eq(Mux(ring.packed, item.slots, 1)),
            is_dead.eq(self.dead.bit_select(function, 1)),
            follows.eq(waits & (flight.queue == queue) & self.usable.bit_select(function, 1) & ~is_dead & (chains != VISIT_CHAINS - 1)),
            mask.eq(ring.size - 1),
            slot.eq(Mux(ring.packed, context.position, context.position & mask)),
            slot_end.eq(ahead[:15] + slots),
            opened_count.eq(count_up(opened.count, slots)),
        ]
        with m.If(ring.packed):
            m.d.comb += [is_last_slot.eq(slot_end >= ring.size), ahead_next.eq(Cat(slot_end[:15], ahead[15]))]
            with m.If(is_last_slot):
                m.d.comb += ahead_next.eq(Cat((slot_end - ring.size)[:15], ~ahead[15]))
        with m.Else():
            m.d.comb += [is_last_slot.eq((ahead & mask) == mask), ahead_next.eq(ahead + 1)]
        m.d.sync += iova.eq(ring.area + Mux(ring.packed, Cat(C(0, 4), slot), Cat(C(spec.USED_RING, 3), slot)))
        with m.If(take):
            m.d.sync += [
                chains.eq(chains + 1),
                item.id.eq(flight.id),
                item.slots.eq(flight.slots),
                item.length.eq(done.length_bytes),
                item.is_whole.eq(done.length_bytes == flight.writable_bytes),
                item.is_good.eq(done.status == BurstStatus.OK),
                item.more.eq(more),
            ]

        # Its element, dword by dword, at its place in the row.
        flags, dword, row_dwords = Signal(16), Signal(range(self.row_bytes // 4)), self.row_bytes // 4
        wrap = context.position[15]
        m.d.comb += [
            flags[spec.F_WRITE].eq(item.length != 0),
            flags[spec.F_AVAIL].eq(wrap),
            flags[spec.F_USED].eq(wrap),
            dword.eq(iova[2:row_bits]),
        ]
        put, put_rest, whole = Signal(), Signal(), Signal()
        with m.If(put):
            for n in range(row_dwords):
                lane = row.data.word_select(n, 32)
                with m.If(ring.packed & (dword[2:] == n >> 2)):
                    m.d.sync += lane.eq((0, 0, item.length, Cat(item.id, flags))[n & 3])
                with m.If(~ring.packed & (dword == n)):
                    m.d.sync += lane.eq(item.id)
                if n:
                    with m.If(~ring.packed & (dword == n - 1)):
                        m.d.sync += lane.eq(item.length)
        with m.If(put_rest):
            m.d.sync += row.data[:32].eq(item.length)
        crosses, ends_row, element_bytes = Signal(), Signal(), Signal(5)
        m.d.comb += [
            crosses.eq(~ring.packed & (dword == row_dwords - 1)),
            ends_row.eq(Mux(ring.packed, dword[2:].all(), dword == row_dwords - 2)),
            element_bytes.eq(Mux(ring.packed, spec.DESCRIPTOR_BYTES, Mux(crosses, 4, spec.USED_ELEMENT_BYTES))),
        ]

        closes, is_left_out = Signal(), Signal()
        m.d.comb += [
            closes.eq(ring.packed & opened.holds & ~item.more),
            is_left_out.eq(ring.in_order & item.is_whole & follows & (item.more | ~more)),  # what can be seen does not wait for a packet
        ]

        # The element is whole: the next one lies behind it, or elsewhere.
        with m.If(whole):
            m.d.sync += [
                context.position.eq(ahead_next),
                ahead.eq(ahead_next),
                skipped.eq(0),
                opened.count.eq(opened_count),
                is_full.eq((put & ends_row) | is_last_slot | skipped | (slots != 1)),
            ]
            with m.If(~item.more):
                m.d.sync += [opened.position.eq(ahead_next), opened.count.eq(0), written_count.eq(count_up(written_count, opened_count))]

        m.d.comb += [
            read_context.addr.eq(flight.queue),
            read_ring.addr.eq(flight.queue),
            write_context.addr.eq(queue),
            write_context.data.eq(context),
            *([write_context.data.opened.eq(opened)] if self.packets else []),
            self.writes.payload.function.eq(function),
            self.writes.payload.access.eq(row),
            self.writes.payload.access.is_write.eq(1),
            self.writes.payload.written.queue.eq(queue),
            self.writes.payload.written.position.eq(opened.position),
            self.writes.payload.written.count.eq(written_count),
        ]
        command, kept, fresh = self.commands.payload, Ring(write_ring.data), Signal(layout)
        m.d.comb += [
            write_ring.en.eq(self.commands.valid & self.commands.ready),
            write_ring.addr.eq(command.queue),
            kept.packed.eq(command.rules.packed),
            kept.in_order.eq(command.rules.in_order),
            kept.size.eq(command.size),
            kept.area.eq(Mux(command.rules.packed, command.descriptor_iova[4:] << 4, command.device_iova[2:] << 2)),  # [VIRTIO1.4 2.7, 2.8]
            [position.eq(command.rules.packed << 15) for position in (fresh.position, *([fresh.opened.position] if self.packets else []))],
        ]
        with m.FSM() as fsm:
            with m.State("CHOOSE"):
                m.d.comb += self.commands.ready.eq(1)
                m.d.sync += chains.eq(0)
                with m.If(self.commands.valid):
                    m.d.comb += [write_context.en.eq(1), write_context.addr.eq(command.queue), write_context.data.eq(fresh)]
                with m.Else():
                    round_robin(m, wanted, granted, "port")
                    m.d.sync += port.eq(number(granted))
                    with m.If(granted.any()):
                        m.next = "LOOK"
            with m.State("LOOK"):
                m.d.sync += queue.eq(flight.queue)
                m.next = "LOAD"
            with m.State("LOAD"):
                m.d.comb += take.eq(waits)
                m.d.sync += [context.eq(read_context.data), ring.eq(read_ring.data), ahead.eq(read_context.data.position), skipped.eq(0)]
                if self.packets:
                    m.d.sync += opened.eq(read_context.data.opened)
                else:
                    m.d.sync += [opened.position.eq(read_context.data.position), opened.count.eq(0)]
                m.next = "ADDRESS"
                with m.If(~waits | is_dead | ~self.enabled.bit_select(queue, 1)):
                    m.next = "CHOOSE"
            with m.State("ADDRESS"):
                m.d.sync += [row.length_bytes.eq(0), written_count.eq(0), is_full.eq(0)]
                m.next = "PUT"
            with m.State("PUT"):
                m.next = "GO_ON"
                with m.If(~item.is_good):
                    m.d.comb += self.failed.eq(1 << function)
                    m.next = "CHOOSE"
                with m.Elif(is_left_out):
                    m.d.comb += take.eq(1)
                    m.d.sync += [ahead.eq(ahead_next), opened.count.eq(opened_count), skipped.eq(1)]
                    m.next = "PUT"
                with m.Elif(ring.packed & item.more & ~opened.holds):
                    m.d.comb += whole.eq(1)
                    m.d.sync += [
                        opened.holds.eq(1),
                        opened.first_position.eq(context.position),
                        opened.first_id.eq(item.id),
                        opened.first_length.eq(item.length),
                        is_full.eq(row.length_bytes != 0),
                    ]
                with m.Else():
                    m.d.comb += [put.eq(1), whole.eq(~crosses & ~closes)]
                    m.d.sync += row.length_bytes.eq(row.length_bytes + element_bytes)
                    with m.If(row.length_bytes == 0):
                        m.d.sync += row.iova.eq(iova)
                    with m.If(crosses):
                        m.next = "CROSS"
                    with m.If(closes):
                        m.next = "CLOSE"
            with m.State("CLOSE"):  # what was kept back comes behind the rest of its packet
                m.d.comb += self.writes.valid.eq(1)
                with m.If(self.writes.ready):
                    m.d.sync += [
                        context.position.eq(opened.first_position),
                        item.id.eq(opened.first_id),
                        item.length.eq(opened.first_length),
                        item.is_whole.eq(0),
                        opened.holds.eq(0),
                        skipped.eq(1),
                    ]
                    m.next = "ADDRESS"
            with m.State("CROSS"):
                m.d.comb += self.writes.valid.eq(1)
                with m.If(self.writes.ready):
                    m.d.comb += [put_rest.eq(1), whole.eq(1)]
                    m.d.sync += [row.iova.eq(iova + 4), row.length_bytes.eq(4), written_count.eq(Mux(item.more, 0, opened_count))]
                    m.next = "GO_ON"
            with m.State("GO_ON"):
                m.d.comb += self.writes.valid.eq(is_full)
                with m.If(is_full & self.writes.ready):
                    m.d.sync += [row.length_bytes.eq(0), written_count.eq(0), is_full.eq(0)]
                with m.If(~is_full | self.writes.ready):
                    with m.If(follows):
                        m.d.comb += take.eq(1)
                        m.next = "PUT"
                    with m.Elif(is_full | (row.length_bytes == 0)):
                        m.d.comb += write_context.en.eq(1)
                        m.next = "CHOOSE"
                    with m.Else():
                        m.d.sync += is_full.eq(1)
        m.d.comb += self.at_work.eq(Mux(fsm.ongoing("CHOOSE"), 0, 1 << function))
        return m
