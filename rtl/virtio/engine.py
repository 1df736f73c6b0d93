"""The ring engine: virtqueues of all functions, split and packed, with queue contexts in memory."""

from dataclasses import dataclass

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..dma.layouts import Segment, WriterDone
from ..dma.reader import WIDTHS
from ..stream.arbiter import Arbiter
from ..stream.queue import Queue
from ..stream.ram import Ram
from ..stream.transaction import TransactionQueue
from ..tlp.layouts import Burst, BurstData, BurstDone, Hint
from .chain_walker import ChainWalker
from .dispatcher import Dispatcher
from .lane import Lane
from .layouts import Chain, Notification, QueueCommand, QueueOperation
from .lines import LineStore
from .ring_layouts import SLOTS, LineAccess, RingTable, Slot
from .scout import Scout
from .used import UsedRings

CHAINS, WAITING_CHAINS = 128, 32  # of a port, between being asked for and being finished; fewer where they wait for the outside
CHAIN_DESCRIPTORS = 256  # the most that a chain may have [VIRTIO1.4 2.7.4.1]
HINTS = 256  # those that wait


@dataclass(frozen=True)
class PortDescription:
    """Virtqueues that one back end serves: its function (position in the engine's ``functions``), largest size of each queue.

    A port that ``waits`` finishes chains only when the outside gives it something; it has one queue. ``most_chains``: that it has at
    once, 2 to 128.
    """

    function: int
    sizes: tuple[int, ...] = (256,)
    waits: bool = False
    most_chains: int | None = None

    @property
    def chains(self):
        """How many it may have at once."""
        return self.most_chains or (WAITING_CHAINS if self.waits else CHAINS)

    @property
    def limit(self):
        """The most descriptors of a chain: loops end there, too."""
        return min(max(self.sizes), CHAIN_DESCRIPTORS)


class PortQueues(wiring.Component):
    """What waits for one back end: chains, and their segments.

    Parameters
    ----------
    port : :class:`PortDescription`
        Whose.

    Members
    -------
    chain, readable, writable, put_readable, put_writable, commit, rollback : ``In``
        From the walker; a chain comes with ``commit``.
    chains, readables, writables : ``Out(stream)``
        To the back end.
    claim, release : ``In(1)``
        Pulses: a ring entry was asked for; no chain came of it.
    finished : ``In(1)``
        Pulse: the back end has finished a chain.
    is_free, is_roomy : ``Out(1)``
        One more entry may be asked for; several.
    is_ready : ``Out(1)``
        There is room for the segments of the longest chain.
    stop : ``In(1)``
        All chains are forgotten.
    """

    def __init__(self, port):
        self.port = port
        super().__init__({
            "chain": In(Chain), "readable": In(Segment), "writable": In(Segment),
            "put_readable": In(1), "put_writable": In(1), "commit": In(1), "rollback": In(1),
            "chains": Out(stream.Signature(Chain)),
            "readables": Out(stream.Signature(Segment)),
            "writables": Out(stream.Signature(Segment)),
            "claim": In(1), "release": In(1), "finished": In(1),
            "is_free": Out(1), "is_roomy": Out(1), "is_ready": Out(1), "stop": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        most, depth = self.port.chains, 2 * self.port.limit
        chains = Queue(Chain, most)
        m.submodules.chains = ResetInserter(self.stop)(chains)
        wiring.connect(m, chains.o, wiring.flipped(self.chains))
        m.d.comb += [chains.i.valid.eq(self.commit), chains.i.payload.eq(self.chain)]
        entries, flying, landed, rooms = Signal(range(most + 1)), Signal(range(most + 1)), Signal(), []
        for name, outer in (("readable", self.readables), ("writable", self.writables)):
            segments = TransactionQueue(Segment, depth)
            m.submodules[name] = ResetInserter(self.stop)(segments)
            wiring.connect(m, segments.o, wiring.flipped(outer))
            m.d.comb += [
                segments.i.valid.eq(getattr(self, f"put_{name}")),
                segments.i.payload.eq(getattr(self, name)),
                segments.commit.eq(self.commit),
                segments.rollback.eq(self.rollback),
            ]
            rooms.append(segments.level <= depth - self.port.limit)
        m.d.comb += [
            self.is_free.eq(entries + flying < most),
            self.is_roomy.eq(entries + flying <= most // 2),
            self.is_ready.eq(Cat(rooms).all()),
        ]
        m.d.sync += [
            entries.eq(entries + self.claim - self.release - self.commit),
            landed.eq(self.finished),
            flying.eq(Mux(self.stop, 0, flying + self.commit - landed)),
        ]
        return m


class RingEngine(wiring.Component):
    """Serves virtqueues, split or packed: turns available descriptor chains into scatter lists, and finished ones into used entries.

    Three parts look for chains, each with its own pace: a dispatcher asks for ring entries far ahead of their use, a scout for the
    indirect tables and the far descriptors that they need, and a walker turns them into chains, in ring order; ``UsedRings`` publishes
    those that are finished. A chain becomes visible only when its walk ended well. [VIRTIO1.4 2.7, 2.8]

    A ring that breaks a rule (see :class:`.chain_walker.ChainWalker`; an available index that jumps by more than the queue size, or back; a
    head beyond the queue), or whose access fails, or a chain whose ``finished`` is not OK, gives ``needs_reset`` for its function; nothing
    more is read or written of its rings until ``stop``. The reads for a chain are bounded: at most two for its first descriptor, one for
    each other, two for each of an indirect table that does not lie at a multiple of 16.
    No function waits for another's memory accesses.

    Latency: 11 cycles from a kick to the first ring read. Throughput: 6 cycles per chain of one descriptor, all queues together.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    functions : tuple of :class:`int`
        PCI function numbers.
    clients : tuple of :class:`int`
        Requester client of each function's ring accesses.
    ports : tuple of :class:`PortDescription`
        Their queues have the card's numbers one after the other, at most 64, and those of a function its indices.

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
    chains : ``Out(stream.Signature(Chain))``, one per port
        For the back end.
    readable, writable : ``Out(stream.Signature(Segment))``, one per port
        Scatter lists of the chains, for reader and writer. A chain without readable bytes has no readable list; one
        without writable bytes has a writable list of length 0.
    finished : ``In(stream.Signature(WriterDone))``, one per port
        Chains whose answer is written, in order.
    hints : ``Out(stream.Signature(Hint))``
        The first two pages of each buffer, as soon as its descriptor is known; some are left out when more than 256 wait.
    ring_reads, used_writes : ``Out(1)``
        Pulses for counters.
    idle : ``Out``, one bit per queue
        It is not enabled, and nothing of it is in flight. RESET of an enabled queue ends in that.
    port_stop, port_stopped : ``Out``, ``In``, one bit per port
        A port that waits gives up its chains, as with ``stop``: its queue was taken back.
    suspend, suspended : ``In``, ``Out``, one bit per function
        No chain is begun; those of ports that do not wait are published, and nothing is under way. [VIRTIO1.4 3.4]
    stop, stopped : one per function
        See "Stop" in rtl/README.md.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, functions, clients, ports):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        if not functions or len(functions) != len(clients):
            raise ValueError(f"Clients must be one for each of {len(functions)} functions (at least one), not {clients!r}")
        queues = [size for port in ports for size in port.sizes]
        if not 1 <= len(queues) <= 64:
            raise ValueError(f"Queues must be between 1 and 64, not {len(queues)!r}")
        for port in ports:
            if not 0 <= port.function < len(functions):
                raise ValueError(f"Function of a port must be a position in {functions!r}, not {port.function!r}")
            if not port.sizes or (port.waits and len(port.sizes) != 1):
                raise ValueError(f"A port must have queues, one that waits exactly one, not {port.sizes!r}")
        for size in queues:
            if size not in [1 << n for n in range(16)]:
                raise ValueError(f"Queue size must be a power of two up to 32768, not {size!r}")
        self.width, self.functions, self.clients, self.ports = width, tuple(functions), tuple(clients), tuple(ports)
        count, port_count = len(functions), len(ports)
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "kicks": In(stream.Signature(6)),
            "notifications": Out(stream.Signature(Notification)),
            "needs_reset": Out(1).array(count),
            "bursts": Out(stream.Signature(Burst)).array(count),
            "write_data": Out(stream.Signature(BurstData(width))).array(count),
            "write_done": In(stream.Signature(BurstDone)).array(count),
            "read_data": In(stream.Signature(BurstData(width))).array(count),
            "chains": Out(stream.Signature(Chain)).array(port_count),
            "readable": Out(stream.Signature(Segment)).array(port_count),
            "writable": Out(stream.Signature(Segment)).array(port_count),
            "finished": In(stream.Signature(WriterDone)).array(port_count),
            "hints": Out(stream.Signature(Hint)),
            "ring_reads": Out(1),
            "used_writes": Out(1),
            "idle": Out(len(queues)),
            "port_stop": Out(port_count),
            "port_stopped": In(port_count),
            "suspend": In(count),
            "suspended": Out(count),
            "stop": In(1).array(count),
            "stopped": Out(1).array(count),
        })

    def elaborate(self, platform):
        m = Module()
        queue_ports = [n for n, port in enumerate(self.ports) for _ in port.sizes]
        queue_functions = [self.ports[n].function for n in queue_ports]
        queue_indices = [queue_functions[:q].count(n) for q, n in enumerate(queue_functions)]
        queue_count, function_count, port_count = len(queue_ports), len(self.functions), len(self.ports)
        sizes = {"functions": function_count, "queues": queue_count}
        of_queues = {"functions": function_count, "queue_functions": queue_functions, "queue_ports": queue_ports}

        m.submodules.dispatcher = dispatcher = Dispatcher(width=self.width, ports=port_count, **of_queues)
        m.submodules.scout = scout = Scout(**sizes)
        m.submodules.walker = walker = ChainWalker(
            queue_indices=queue_indices, limits=[port.limit for port in self.ports], waits=[port.waits for port in self.ports], **of_queues)
        m.submodules.lines = lines = LineStore(width=self.width, **sizes)
        m.submodules.used = used = UsedRings(width=self.width, functions=function_count, ports=self.ports, chains=CHAINS)
        parts = (dispatcher, scout, walker)

        # What the three parts of the fetch side know together.
        m.submodules.slots = slots = Ram(shape=Slot, depth=SLOTS * max(function_count, 2), init=[])
        m.submodules.seconds = seconds = Memory(shape=1, depth=SLOTS * function_count, init=[])
        m.submodules.tables = tables = Memory(shape=RingTable, depth=queue_count, init=[])
        write_slot, write_second, write_table = slots.write_port(), seconds.write_port(), tables.write_port()
        read_second, read_known = seconds.read_port(), tables.read_port()
        broken, alive = Signal(function_count), Signal(function_count)
        m.d.comb += [
            write_slot.en.eq(dispatcher.slot.valid),
            write_slot.addr.eq(Cat(dispatcher.slot.number, dispatcher.slot.function)),
            write_slot.data.eq(dispatcher.slot.content),
            write_second.en.eq(scout.second.valid),
            write_second.addr.eq(Cat(scout.slot_at.number, scout.slot_at.function)),
            write_second.data.eq(scout.second.there),
            write_table.en.eq(dispatcher.table.valid),
            write_table.addr.eq(dispatcher.table.queue),
            write_table.data.eq(dispatcher.table.content),
            read_second.addr.eq(Cat(walker.slot_at.number, walker.slot_at.function)),
            walker.second.eq(read_second.data),
            walker.walked_at.eq(dispatcher.queue),
            dispatcher.walked.eq(walker.walked),
            read_known.addr.eq(dispatcher.queue),
            dispatcher.known.eq(read_known.data),
            lines.line.eq(Mux(walker.wants_line, walker.line, scout.line)),
            scout.has_line.eq(~walker.wants_line),
            lines.heads.eq(dispatcher.heads),
        ]
        wiring.connect(m, dispatcher.fresh, walker.fresh)
        for part in (scout, walker):
            read_slot, read_table = slots.read_port(), tables.read_port()
            m.d.comb += [
                read_slot.addr.eq(Cat(part.slot_at.number, part.slot_at.function)),
                part.slot.eq(read_slot.data),
                read_table.addr.eq(part.table_at),
                part.table.eq(read_table.data),
                part.descriptor.eq(lines.descriptor),
                part.enabled.eq(dispatcher.enabled),
                [part.waiting[n].eq(lines.waiting[n]) for n in range(function_count)],
            ]
        for part in (dispatcher, scout):
            m.d.comb += [part.generations.eq(walker.generations), part.flush.eq(walker.flush)]
        for part in parts:
            m.d.comb += part.alive.eq(alive)
        for name in ("flush_ends", "flush_parks", "progress", "midway", "barred", "lacks_entry"):
            m.d.comb += getattr(dispatcher, name).eq(getattr(walker, name))
        for name in ("head_row", "index", "index_came", "heads_came"):
            m.d.comb += getattr(dispatcher, name).eq(getattr(lines, name))
        for n in range(function_count):
            m.d.comb += [
                scout.tails[n].eq(dispatcher.tails[n]),
                walker.scouted[n].eq(scout.places[n]),
                dispatcher.walks[n].eq(walker.places[n]),
            ]

        # Ring accesses of the fetch side, and a lane for each function.
        m.submodules.accesses = accesses = Arbiter(LineAccess, 3, direct=True)
        access, left, leaves, taken = accesses.o.payload, Signal(LineAccess), Signal(), Signal()  # ``left`` behind ``access``
        m.d.comb += accesses.o.ready.eq(~leaves | taken)
        with m.If(accesses.o.ready):
            m.d.sync += [left.eq(access), leaves.eq(accesses.o.valid)]
        is_read = Signal()
        for n, part in enumerate(parts):
            wiring.connect(m, part.accesses, accesses.i[n])
        m.d.comb += [
            is_read.eq(accesses.o.valid & accesses.o.ready & ~access.is_write),
            lines.asked.valid.eq(is_read & access.cookie.is_line()),
            lines.asked.function.eq(access.function),
            lines.asked.number.eq(access.cookie.number),
            self.ring_reads.eq(is_read),
            self.used_writes.eq(used.used_writes),
        ]
        lanes, room = [], Signal(function_count)
        for n, (function, client) in enumerate(zip(self.functions, self.clients)):
            m.submodules[f"lane_{n}"] = lane = Lane(width=self.width, function=function, client=client)
            lanes.append(lane)
            for name in ("bursts", "write_data", "write_done", "read_data"):
                wiring.connect(m, getattr(lane, name), wiring.flipped(getattr(self, name)[n]))
            wiring.connect(m, lane.lines, lines.read_data[n])
            wiring.connect(m, lane.answers, used.answers[n])
            wiring.connect(m, lane.used_done, used.write_done[n])
            wiring.connect(m, used.push[n], lane.used)
            m.d.comb += [
                lane.fetch.valid.eq(leaves & (left.function == n)),
                lane.fetch.payload.eq(left),
                room[n].eq(lane.room),
                used.room[n].eq(lane.used_room),
                lane.stored.eq(lines.over[n]),
            ]
            with m.If(left.function == n):
                m.d.comb += taken.eq(lane.fetch.ready)
        for part in parts:
            m.d.comb += part.room.eq(room)

        # What waits for each back end.
        for n, description in enumerate(self.ports):
            stop = Signal(name=f"stop_{n}")
            m.submodules[f"port_{n}"] = port = PortQueues(description)
            for name, inner in (("chains", port.chains), ("readable", port.readables), ("writable", port.writables)):
                wiring.connect(m, inner, wiring.flipped(getattr(self, name)[n]))
            wiring.connect(m, wiring.flipped(self.finished[n]), used.finished[n])
            m.d.comb += [
                stop.eq(self.stop[description.function] | self.port_stop[n]),
                port.stop.eq(stop),
                port.chain.eq(walker.chain),
                port.readable.eq(walker.readable),
                port.writable.eq(walker.writable),
                [getattr(port, name).eq(getattr(walker, name)[n]) for name in ("put_readable", "put_writable", "commit", "rollback")],
                port.claim.eq(dispatcher.claim[n]),
                port.release.eq(walker.release[n]),
                port.finished.eq(self.finished[n].valid & self.finished[n].ready & ~stop),
                dispatcher.port_free[n].eq(port.is_free),
                dispatcher.port_roomy[n].eq(port.is_roomy),
                dispatcher.port_ready[n].eq(port.is_ready),
                walker.port_ready[n].eq(port.is_ready),
                used.flights[n].valid.eq(walker.commit[n]),
                used.flights[n].payload.eq(walker.flight),
            ]
        wiring.connect(m, used.notifications, wiring.flipped(self.notifications))
        wiring.connect(m, wiring.flipped(self.kicks), dispatcher.kicks)
        self._command(m, dispatcher, used, queue_ports)
        self._hint(m, walker.buffer)

        # Breaking, suspending and stopping, per function.
        walker_broken = Signal(function_count)
        m.d.sync += walker_broken.eq(walker.broken)
        m.d.comb += [
            used.broken.eq(broken), used.stop.eq(Cat(self.stop)), used.port_stop.eq(self.port_stop),
            dispatcher.suspend.eq(self.suspend), walker.suspend.eq(self.suspend),
        ]
        for n in range(function_count):
            hurt, at_rest = Signal(name=f"hurt_{n}"), Signal(name=f"at_rest_{n}")
            begun = Cat(walker.midway[q] for q in range(queue_count) if queue_functions[q] == n).any()
            has_chains = Cat(~used.empty[p] for p, port in enumerate(self.ports) if port.function == n and not port.waits).any()
            m.d.comb += [
                hurt.eq((dispatcher.broken | walker_broken | lines.failed | used.failed)[n] | lanes[n].failed),
                alive[n].eq(~broken[n] & ~self.stop[n]),
                self.needs_reset[n].eq(hurt & alive[n]),
                at_rest.eq((dispatcher.tails[n] == walker.places[n]) & ~begun & ~Cat(part.at_work[n] for part in parts).any()
                           & ~lanes[n].fetch.valid & lanes[n].quiet & used.quiet[n] & ~walker_broken[n]),
                self.stopped[n].eq(self.stop[n] & at_rest),
                self.suspended[n].eq(self.suspend[n] & at_rest & ~has_chains),
                dispatcher.forget[n].eq(self.stopped[n]),
            ]
            m.d.sync += broken[n].eq((broken[n] | hurt) & ~self.stop[n])
        return m

    def _command(self, m, dispatcher, used, queue_ports):
        """Tell both sides of a new queue; of one that ends, the used side only when fetch side and port have nothing of it."""
        command, count = self.commands.payload, len(queue_ports)
        ending, gone, drained, here = Signal(count), Signal(count), Signal(count), Signal(count)
        is_reset, told, ends, queue = Signal(), Signal(), Signal(), Signal(range(max(count, 2)))
        waits = [self.ports[p].waits for p in queue_ports]
        m.d.comb += [
            is_reset.eq(command.operation == QueueOperation.RESET),
            dispatcher.commands.payload.eq(command),
            dispatcher.commands.valid.eq(self.commands.valid & (is_reset | told)),
            self.commands.ready.eq(dispatcher.commands.valid & dispatcher.commands.ready),
            used.commands.payload.eq(command),
            used.commands.valid.eq(self.commands.valid & ~is_reset & ~told),
            here.eq(1 << queue),
        ]
        with m.If(ends):
            m.d.comb += [
                used.commands.valid.eq(1), used.commands.payload.operation.eq(QueueOperation.RESET), used.commands.payload.queue.eq(queue),
            ]
            with m.If(used.commands.ready):
                m.d.sync += [ends.eq(0), ending.eq(ending & ~here)]
        with m.Else():
            with m.If(used.commands.valid & used.commands.ready):
                m.d.sync += told.eq(1)
            for q in range(count):
                with m.If(ending[q] & gone[q] & ~used.commands.valid):
                    m.d.sync += [ends.eq(1), queue.eq(q)]
        with m.If(self.commands.ready):
            m.d.sync += told.eq(0)
            with m.If(is_reset):
                m.d.sync += ending.eq(ending | (1 << command.queue))
        for q, p in enumerate(queue_ports):
            m.d.comb += [drained[q].eq(ending[q] & dispatcher.drained[q]), gone[q].eq(drained[q])]
            if waits[q]:
                asked, stopped = Signal(name=f"asked_{q}"), Signal(name=f"stopped_{q}")  # to stop; it has
                m.d.comb += [self.port_stop[p].eq(asked), gone[q].eq(stopped)]
                with m.If(asked):
                    m.d.sync += [asked.eq(~self.port_stopped[p]), stopped.eq(self.port_stopped[p])]
                with m.Elif(drained[q] & ~stopped):
                    m.d.sync += asked.eq(1)
                with m.Elif(~ending[q]):
                    m.d.sync += stopped.eq(0)
            m.d.comb += self.idle[q].eq(dispatcher.drained[q] & used.idle[q] & ~ending[q])

    def _hint(self, m, buffer):
        """Tell of the page of a buffer's first byte, and one cycle later of the page behind it."""
        m.submodules.hints = hints = Queue(Hint, HINTS)
        wiring.connect(m, hints.o, wiring.flipped(self.hints))
        first, second, is_longer = Signal(Hint), Signal(Hint), Signal()
        m.d.comb += [first.is_write.eq(buffer.is_write), first.page.eq(buffer.address[12:])]
        with m.Switch(buffer.function):
            for n, number in enumerate(self.functions):
                with m.Case(n):
                    m.d.comb += first.function.eq(number)
        end = buffer.address[:12] + buffer.length_bytes[:13]
        m.d.sync += [
            second.eq(first), second.page.eq(first.page + 1),
            is_longer.eq(buffer.valid & (buffer.length_bytes[13:].any() | (end > 4096))),
        ]
        m.d.comb += [hints.i.valid.eq(buffer.valid | is_longer), hints.i.payload.eq(Mux(is_longer, second, first))]
