"""The used side of the ring engine: what the back ends finished is published in the rings, and the driver is told."""

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import WriterDone
from ..dma.reader import WIDTHS
from ..stream.queue import Queue
from ..stream.round_robin import number, round_robin
from ..tlp.layouts import BurstData, BurstDone, BurstStatus
from .layouts import Flight, Notification, QueueCommand, QueueOperation, RingAccess
from .used_events import UsedEvents
from .used_writer import VISIT_WRITES, UsedWriter, Written

ROOM = 6  # accesses that may come after ``room`` fell
WRITES = 16  # of a function that may be under way


class Crowd(wiring.Component):
    """Counts who is inside a queue, and waits until those who were inside at a mark have left.

    Parameters
    ----------
    most : :class:`int`
        Places inside.

    Members
    -------
    enter, leave : ``In(1)``
        One goes in behind the others; the first comes out.
    mark : ``In(1)``
        Wait for those inside now. A later mark waits for more.
    inside : ``Out(range(most + 1))``
        How many there are.
    waiting : ``Out(1)``
        Not all have left.
    """

    def __init__(self, *, most):
        self.most = most
        super().__init__({"enter": In(1), "leave": In(1), "mark": In(1), "inside": Out(range(most + 1)), "waiting": Out(1)})

    def elaborate(self, platform):
        m = Module()
        marked, count = Signal(range(self.most + 1)), Signal(range(self.most + 1))
        m.d.comb += [count.eq(Mux(self.mark, self.inside + self.enter, marked)), self.waiting.eq(marked != 0)]
        m.d.sync += [self.inside.eq(self.inside + self.enter - self.leave), marked.eq(count - (self.leave & (count != 0)))]
        return m


class UsedRings(wiring.Component):
    """Publishes finished chains in their rings, split and packed, and notifies the driver as it wishes.

    Order, per queue: elements in order of chains; the used index of a split ring when the writes of all elements below it ended OK;
    behind it what the driver wants to hear is read; then the notification. A used descriptor is one write of 16 bytes.
    [VIRTIO1.4 2.7.7, 2.7.8, 2.8.4, 2.8.10] What waits is batched: see :class:`UsedWriter` and :class:`UsedEvents`.

    The chains of a packet (:class:`WriterDone`, ``more``) are published together. In a packed ring the descriptor that shows them leaves
    behind the others without waiting for their ends: the bursts of a client keep their order on the link. [VIRTIO1.4 5.1.9.4.1]

    Nothing is published behind a write, a read or a chain that did not end OK, but for what had left already: it is told by ``failed``, and
    whoever gets that sets ``broken`` in the next cycle. Chains of a queue that was taken back by RESET are taken from the back end and
    forgotten.

    ENABLE comes before the first flight of its queue, RESET behind the last, ENABLE again when ``idle`` is 1. No function waits for
    another's memory accesses, if ``room`` is kept.

    Latency: 5 cycles from a chain taken to its write, 7 from the end of that to the next access, both at rest. Throughput: a chain in
    at most 3 cycles when several wait, in 6 when they come one by one.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    functions : :class:`int`
        How many: at least 1.
    ports : tuple
        Each with ``function`` (position), ``sizes``, one for each queue, and ``waits``: only such ports have packets of several chains.
        Queues, at most 64, are numbered through the ports.
    chains : :class:`int`
        That a port may have in flight: at least 2.

    Members
    -------
    commands : ``In(stream.Signature(QueueCommand))``
        Queues to serve from now on, or no longer.
    flights : ``In(stream.Signature(Flight))``, one per port
        Chains that go to the back end, in their order.
    finished : ``In(stream.Signature(WriterDone))``, one per port
        How they ended, in the same order.
    push : ``Out(stream.Signature(RingAccess(width)))``, one per function
        Ring accesses, to be carried out in this order: a read comes behind the writes in front of it.
    room : ``In(functions)``
        Six more are taken without a wait for memory.
    write_done : ``In(stream.Signature(BurstDone))``, one per function
        Ends of these writes, in their order; never stalled.
    answers : ``In(stream.Signature(BurstData(width)))``, one per function
        Answers of these reads, one beat each, with the low 11 bits of ``cookie`` as they were; never stalled.
    notifications : ``Out(stream.Signature(Notification))``
        Used buffer notifications that are due.
    failed : ``Out(functions)``
        Pulse: an access or a chain of the function did not end OK.
    broken : ``In(functions)``
        Nothing more of the function is published.
    port_stop : ``In(ports)``
        The port's flights are forgotten, and what comes as finished is thrown away.
    stop : ``In(functions)``
        As ``broken`` and ``port_stop`` of all its ports; its queues are no longer served. Held until ``quiet``.
    quiet : ``Out(functions)``
        Of the function nothing is at work: nothing finished, no access under way, no notification due.
    empty : ``Out(ports)``
        No chain of the port is in flight.
    idle : ``Out(queues)``
        The queue is not served, and nothing of it is in flight.
    used_writes : ``Out(1)``
        Pulse for a counter: an element, or several in one write.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, functions, ports, chains=64):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        if functions < 1:
            raise ValueError(f"Functions must be at least 1, not {functions!r}")
        for port in ports:
            if not 0 <= port.function < functions:
                raise ValueError(f"Function of a port must be below {functions}, not {port.function!r}")
        self.queue_ports = tuple(n for n, port in enumerate(ports) for _ in port.sizes)
        if not 1 <= len(self.queue_ports) <= 64:
            raise ValueError(f"Queues must be between 1 and 64, not {len(self.queue_ports)!r}")
        if chains < 2:
            raise ValueError(f"Chains of a port must be at least 2, not {chains!r}")
        self.width, self.functions, self.ports, self.chains = width, functions, tuple(ports), chains
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "flights": In(stream.Signature(Flight)).array(len(ports)),
            "finished": In(stream.Signature(WriterDone)).array(len(ports)),
            "push": Out(stream.Signature(RingAccess(width))).array(functions),
            "room": In(functions),
            "write_done": In(stream.Signature(BurstDone)).array(functions),
            "answers": In(stream.Signature(BurstData(width))).array(functions),
            "notifications": Out(stream.Signature(Notification)),
            "failed": Out(functions),
            "broken": In(functions),
            "port_stop": In(len(ports)),
            "stop": In(functions),
            "quiet": Out(functions),
            "empty": Out(len(ports)),
            "idle": Out(len(self.queue_ports)),
            "used_writes": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        port_functions = [port.function for port in self.ports]
        queue_count = len(self.queue_ports)
        queue_functions = [port_functions[port] for port in self.queue_ports]
        m.submodules.writer = writer = UsedWriter(
            width=self.width, functions=self.functions, port_functions=port_functions, queues=queue_count,
            packets=any(port.waits for port in self.ports))
        m.submodules.events = events = UsedEvents(width=self.width, functions=self.functions, queue_functions=queue_functions)

        enabled, dead, marks = Signal(queue_count), Signal(self.functions), Signal(queue_count)
        m.d.comb += dead.eq(self.stop | self.broken)
        for part in (writer, events):
            m.d.comb += [part.enabled.eq(enabled), part.dead.eq(dead)]
        self._command(m, (writer, events), enabled, marks)

        # The access that leaves next.
        access, function, leaving = Signal(RingAccess(self.width)), Signal(range(max(self.functions, 2))), Signal()
        entry, accepted, free = Signal(Written), Signal(), Signal()
        with m.Switch(function):
            for n in range(self.functions):
                with m.Case(n):
                    m.d.comb += accepted.eq(self.push[n].ready)
        m.d.comb += [
            free.eq(~leaving | accepted),
            events.accesses.ready.eq(free),
            writer.writes.ready.eq(free & ~events.accesses.valid),
            self.used_writes.eq(writer.writes.valid & writer.writes.ready),
            entry.eq(writer.writes.payload.written),
        ]
        with m.If(events.accesses.valid):
            m.d.comb += [entry.queue.eq(events.accesses.payload.queue), entry.count.eq(0)]
        with m.If(free):
            m.d.sync += leaving.eq(events.accesses.valid | writer.writes.valid)
            with m.If(events.accesses.valid):
                m.d.sync += [access.eq(events.accesses.payload.access), function.eq(events.accesses.payload.function)]
            with m.Else():
                m.d.sync += [access.eq(writer.writes.payload.access), function.eq(writer.writes.payload.function)]
            m.d.sync += [access.data.eq(writer.writes.payload.access.data), access.index.eq(events.accesses.payload.access.index)]

        # Writes under way: the end of one lets the next entry of the function through.
        write_crowds = []
        for n in range(self.functions):
            m.submodules[f"under_way_{n}"] = under_way = Queue(Written, WRITES)
            m.submodules[f"write_crowd_{n}"] = crowd = Crowd(most=WRITES)
            write_crowds.append(crowd)
            ended, head, lets = Signal(range(WRITES + 1), name=f"ended_{n}"), under_way.o, Signal(name=f"lets_{n}")
            done, fails = self.write_done[n], Signal(name=f"fails_{n}")
            m.d.comb += [
                self.push[n].valid.eq(leaving & (function == n)),
                self.push[n].payload.eq(access),
                under_way.i.payload.eq(entry),
                under_way.i.valid.eq(free & Mux(
                    events.accesses.valid,
                    (events.accesses.payload.function == n) & events.accesses.payload.access.is_write,
                    writer.writes.valid & (writer.writes.payload.function == n))),
                lets.eq(head.valid & (ended != 0)),
                events.written[n].valid.eq(lets & (head.payload.count != 0) & ~dead[n]),
                events.written[n].payload.eq(head.payload),
                head.ready.eq(lets & (events.written[n].ready | (head.payload.count == 0) | dead[n])),
                crowd.enter.eq(under_way.i.valid),
                crowd.leave.eq(head.valid & head.ready),
                done.ready.eq(1),
                writer.usable[n].eq(self.room[n] & (crowd.inside < WRITES - VISIT_WRITES)),
                events.usable[n].eq(self.room[n]),
                fails.eq(done.valid & (done.payload.status != BurstStatus.OK)),
                self.failed[n].eq((writer.failed[n] | events.failed[n] | fails) & ~self.stop[n]),
            ]
            m.d.sync += ended.eq(ended + done.valid - crowd.leave)
            wiring.connect(m, wiring.flipped(self.answers[n]), events.answers[n])

        # Chains in flight.
        port_crowds = []
        for n, owner in enumerate(port_functions):
            throws = Signal(name=f"throws_{n}")
            m.submodules[f"flights_{n}"] = flights = ResetInserter(throws)(Queue(Flight, self.chains))
            m.submodules[f"port_crowd_{n}"] = crowd = ResetInserter(throws)(Crowd(most=self.chains))
            port_crowds.append(crowd)
            wiring.connect(m, wiring.flipped(self.flights[n]), flights.i)
            wiring.connect(m, flights.o, writer.flights[n])
            m.d.comb += [
                throws.eq(self.port_stop[n] | self.stop[owner]),
                writer.finished[n].payload.eq(self.finished[n].payload),
                writer.finished[n].valid.eq(self.finished[n].valid & ~throws),
                self.finished[n].ready.eq(writer.finished[n].ready | throws),
                crowd.enter.eq(flights.i.valid & flights.i.ready),
                crowd.leave.eq(flights.o.valid & flights.o.ready),
                crowd.mark.eq(Cat(marks[q] for q, port in enumerate(self.queue_ports) if port == n).any()),
                self.empty[n].eq(crowd.inside == 0),
            ]

        # Notifications, round robin.
        due, wants, tells, told = (Signal(queue_count) for _ in range(4))
        note = self.notifications
        with m.If(events.wants.valid):
            m.d.comb += wants.eq(1 << events.wants.payload.queue)
        with m.If(~note.valid | note.ready):
            m.d.comb += tells.eq(due)
            m.d.sync += [note.valid.eq(due.any()), note.payload.queue.eq(number(told))]
        round_robin(m, tells, told, "notification")
        m.d.sync += due.eq((due & ~told) | wants)

        busy = Signal(queue_count)
        m.d.comb += busy.eq(events.asking | due | (note.valid << note.payload.queue))
        for q, (port, owner) in enumerate(zip(self.queue_ports, queue_functions, strict=True)):
            m.d.comb += self.idle[q].eq(
                ~(enabled[q] | busy[q] | self.commands.valid | port_crowds[port].waiting | write_crowds[owner].waiting))
        for n in range(self.functions):
            members = [q for q in range(queue_count) if queue_functions[q] == n]
            ports = [p for p, owner in enumerate(port_functions) if owner == n]
            m.d.comb += write_crowds[n].mark.eq(Cat(marks[q] for q in members).any())
            m.d.comb += self.quiet[n].eq(
                ~(writer.at_work[n] | events.at_work[n] | Cat(busy[q] for q in members).any()
                  | (write_crowds[n].inside != 0) | Cat(self.finished[p].valid for p in ports).any()))
            with m.If(self.stop[n]):
                m.d.sync += [signal[q].eq(0) for signal in (enabled, due) for q in members]
        return m

    def _command(self, m, parts, enabled, marks):
        """Give the command to both parts, each when it is at rest; a queue that is taken back is not served from the first cycle on."""
        command, here, told = self.commands.payload, Signal(len(enabled)), Signal(len(parts))
        m.d.comb += [
            here.eq(1 << command.queue),
            self.commands.ready.eq((Cat(part.commands.ready for part in parts) | told).all()),
        ]
        for n, part in enumerate(parts):
            m.d.comb += [part.commands.valid.eq(self.commands.valid & ~told[n]), part.commands.payload.eq(command)]
            with m.If(part.commands.valid & part.commands.ready):
                m.d.sync += told[n].eq(1)
        with m.If(self.commands.valid & (command.operation == QueueOperation.RESET)):
            m.d.sync += enabled.eq(enabled & ~here)
        with m.If(self.commands.valid & self.commands.ready):
            m.d.sync += told.eq(0)
            with m.If(command.operation == QueueOperation.ENABLE):
                m.d.sync += enabled.eq(enabled | here)
            with m.Else():
                m.d.comb += marks.eq(here)
