"""All Memory Requests of the card: bursts in, TLPs out, completions to read data."""

import dataclasses
import functools
import operator

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..spec import pcie
from ..stream.arbiter import Arbiter
from ..stream.queue import Queue
from .layouts import DIVERTED, AtomicKind, BurstData, BurstDone, BurstRetired, BurstStatus, ConfigState, TlpBeat, burst_layout
from .read_buffer import Over, ReadBuffer
from .read_lines import SLOT_BYTES, OrderedLine, ReadRequest, UnorderedLine
from .tags import TagEvents, TagTable, ten_bit_name
from .write_path import WriteOver, WritePath

MAX_CLIENTS = 64
MAX_FUNCTIONS = 8
WIDTHS = (64, 128, 256, 512)
WRITES_IN_FLIGHT = 16  # write bursts of each client between being accepted and its taking their BurstDone
_ATOMIC_TYPES = {AtomicKind.FETCH_ADD: pcie.TYPE_FETCH_ADD, AtomicKind.SWAP: pcie.TYPE_SWAP, AtomicKind.CAS: pcie.TYPE_CAS}
ORDER_DEPTH = 32  # bursts that wait to be found in order: reads behind writes


@dataclasses.dataclass(frozen=True)
class ReadClient:
    """What the requester must know of a client.

    Attributes
    ----------
    name : :class:`str`
        For people.
    ordered : :class:`bool`
        Its read data returns in burst order, bursts of up to 4096 bytes; else reads of at most 64 bytes inside one naturally
        aligned block of 64 are answered in any order.
    buffer_bytes : :class:`int`
        Space for data in flight, a power of two: 4096 to 65536 if ordered, else 64 for each read in flight, 128 to 16384. 0: the
        client only writes.
    atomics : :class:`bool`
        Its reads may be AtomicOps. It must be unordered, and writes nothing: its write data are their operands. The wall may write all the
        same: its operands come by ``wall_operands``.
    relaxed : :class:`bool`
        Its bursts may ask for Relaxed Ordering and No Snoop: bulk data. Rings, interrupts and the wall must not (R16).
    messages : :class:`bool`
        Its bursts are interrupts: a host that translates gets them untranslated. [PCIe5 6.1.4]
    reads : :class:`int`
        Read bursts of the client that wait at the requester without holding up others: a client with no more than this many
        reads outstanding never holds up the gate's stream.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    name: str
    ordered: bool
    buffer_bytes: int
    reads: int = 32
    atomics: bool = False
    relaxed: bool = False
    messages: bool = False

    def __post_init__(self):
        low, high = (4096, 65536) if self.ordered else (128, 16384)
        size = self.buffer_bytes
        if size != 0 and (size not in range(low, high + 1) or size & (size - 1)):
            raise ValueError(f"Buffer of client {self.name!r} must be 0 or a power of two between {low} and {high} bytes, not {size!r}")
        if self.reads not in range(2, 257):
            raise ValueError(f"Waiting reads of client {self.name!r} must be between 2 and 256, not {self.reads!r}")
        if self.atomics and (self.ordered or not size):
            raise ValueError(f"AtomicOps of client {self.name!r} need a client that is unordered and reads, not {self!r}")

    @property
    def reads_data(self):
        """Whether the client reads at all."""
        return self.buffer_bytes != 0


class Requester(wiring.Component):
    """Sends the bursts of all clients as Memory Requests and answers each of them exactly once, whatever the link does.

    Bursts are cut at multiples of Max_Payload_Size and Max_Read_Request_Size of their function [PCIe5 2.2.7]; an aligned access of
    2, 4 or 8 bytes is one TLP (R05), no dword is written by two TLPs of a burst (R18). Relaxed Ordering and No Snoop are set only where
    burst, client and function all allow it. Every byte of a read is reserved before its request is sent; read data is delivered as
    its requests complete, per client in order (ordered) or not (unordered).

    AtomicOps are reads that bring operands: one TLP each, never cut. One that Device Control 2 of its function does not allow, or that is
    not 4 or 8 bytes at a multiple of that, or of a client that may not ask for them, is answered with REFUSED. [PCIe5 6.15.3.1]

    Nothing is sent for a burst with a verdict other than OK, or for a function that is not bus master or is stopped: a write's data is
    taken and dropped, and it is done with the verdict, or RESET; a read is answered by one beat with that status, in order. The
    same happens to the rest of a burst during which that comes true. Once all tags that a read may use are quarantined it is
    answered with TIMEOUT at once.

    Order: bursts of one client are served in order, and a read is sent after every write that came before it through the same port. The
    wall has tags, buffer space and queues of its own and goes first. A client that takes its data late holds up nobody else; a client
    with more than ``reads`` reads or 16 writes outstanding holds up the port it uses.

    Tags: 0 to ``wall_tags`` - 1 are the wall's; a function without Extended Tag Field Enable uses only tags below 32, one with 10-Bit Tag
    Requester Enable all of them, each under its number + 256, any other those below 256. The ends of requests, the rules for
    completions, the timeout and the quarantine are those of :class:`.tags.TagTable`.

    With ``diverts`` a write of an aligned dword that the gate lets leave as DIVERTED is not sent: its dword is given away when everything
    in front of it was accepted into the transmit order; it is retired then, and done when ``diverted_end`` says so. One at a time.

    With ``host_ats`` bursts are :data:`.layouts.AddressedBurst`, with the address type of their requests. Reads of the wall are then
    translation requests, 8 bytes at a multiple of 4096, that one completion answers. Those and translated requests of a function whose
    ``ats`` is 0 are not sent, as if it were no bus master; nor are requests with a PASID of one whose ``pasid`` is 0. [PCIe5 6.20, 10.2]

    Stop: while ``stop`` is 1 for a function nothing is sent for it; ``stopped`` is 1 when besides every burst accepted for it has been
    answered and the answer taken. A stop also starts the recovery of the function's quarantined tags.

    Latency: 2 cycles from a read burst to its TLP and 4 from the last beat of a TLP's completions to its data (5 for the wall, 7 for other
    unordered clients); 5 from the last beat of data of a write TLP to its first beat, 2 from its last beat to its BurstDone. Throughput:
    reads and writes a beat per cycle, writes that do not start in dword lane 0 a cycle more per burst; a read TLP per cycle. For
    reads at full rate an ordered client needs a buffer of the link's latency in beats, and 10 % more.

    Parameters
    ----------
    width : :class:`int`
        Bits of data per beat: 64, 128, 256 or 512.
    clients : tuple of :class:`ReadClient`
        Up to 64; the first is the wall and unordered.
    functions : :class:`int`
        Number of functions: 1 to 8.
    tags, wall_tags : :class:`int`
        Tags in all, up to 768, and those of the wall. More than 256 are of use to functions with 10-bit tags.
    completion_timeout_cycles : :class:`int`
        At least 32 * ``tags``: the cycles of 10 ms. A missing completion is reported between this time and 1.25 times it, if the host
        did not set another timeout for the function.
    max_payload : :class:`int`
        Largest Max_Payload_Size in bytes that is used, whatever the host sets.
    diverts : :class:`bool`
        The gate may say DIVERTED.
    host_ats : :class:`bool`
        Requests may be translated.
    has_pasid : :class:`bool`
        With ``host_ats``: those that are not may have a PASID.

    Members
    -------
    wall : ``In(stream.Signature(burst_layout(host_ats)))``
        Bursts of the wall; ``client`` is 0.
    gate : ``In(stream.Signature(burst_layout(host_ats)))``
        Bursts of all other clients, with addresses and verdicts.
    write_data : ``In(stream.Signature(BurstData(width))).array(n)``
        Data of each client's write bursts, or operands of its AtomicOps, in their order.
    wall_operands : ``In(stream.Signature(BurstData(width)))``
        Operands of the wall's AtomicOps; there if it has ``atomics``.
    read_data : ``Out(stream.Signature(BurstData(width))).array(n)``
        Data and ends of each client's reads.
    write_done : ``Out(stream.Signature(BurstDone)).array(n)``
        Ends of each client's writes, in their order.
    completions : ``In(stream.Signature(TlpBeat(width)))``
        Every completion that came in.
    posted, non_posted : ``Out(stream.Signature(TlpBeat(width, has_pasid)))``
        Memory Writes; Memory Reads (one beat without data each) and AtomicOps.
    config : ``In(ConfigState).array(functions)``
        Of each function.
    ats : ``In(functions)``
        With ``host_ats``: ATS Enable of each function.
    pasid : ``In(functions)``
        With ``has_pasid``: PASID Enable of each function.
    retired_reads, retired_writes : ``Out(stream.Signature(BurstRetired))``
        Each burst of the gate that is over, once. The receiver is always ready.
    stop, stopped : ``In(functions)``, ``Out(functions)``
        A bit per function.
    pending : ``Out(functions)``
        1: read requests of the function are sent, or about to be, and not over. [PCIe5 7.5.3.5]
    reads_room : ``Out(n)``
        1: at least 4 more reads of the client will be taken without waiting.
    tags_in_flight : ``Out(range(tags + 1))``
        Reads that wait for completions.
    exhausted : ``Out(1)``
        At least half of the wall's tags, of the others below 32, or of the others above are quarantined.
    events : ``Out(TagEvents)``
        Pulses for error reporting.
    diverted, diverted_end : ``Out(stream.Signature(32))``, ``In(stream.Signature(BurstStatus))``
        With ``diverts``: dwords; how each ended.
    diverted_over : ``Out(1)``
        With ``diverts``: a pulse when one has ended, or does not come because its function was stopped.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range or the clients do not fit.
    """

    def __init__(self, *, width, clients, functions, tags=256, wall_tags=8, completion_timeout_cycles=2_500_000, max_payload=512,
                 diverts=False, host_ats=False, has_pasid=False):  # fmt: skip
        clients = tuple(clients)
        if width not in WIDTHS:
            raise ValueError(f"Width must be 64, 128, 256 or 512 bits, not {width!r}")
        if functions not in range(1, MAX_FUNCTIONS + 1):
            raise ValueError(f"Number of functions must be between 1 and {MAX_FUNCTIONS}, not {functions!r}")
        if len(clients) not in range(1, MAX_CLIENTS + 1):
            raise ValueError(f"Number of clients must be between 1 and {MAX_CLIENTS}, not {len(clients)!r}")
        if clients[0].ordered or not clients[0].reads_data:
            raise ValueError(f"The first client must be the wall, which reads and is unordered, not {clients[0]!r}")
        if max_payload not in (128, 256, 512, 1024, 2048, 4096):
            raise ValueError(f"Largest payload must be a power of two between 128 and 4096, not {max_payload!r}")
        self.width, self.clients, self.functions, self.max_payload, self.diverts = width, clients, functions, max_payload, diverts
        self.tags, self.wall_tags, self.completion_timeout_cycles = tags, wall_tags, completion_timeout_cycles
        self.host_ats, self.has_pasid = host_ats, has_pasid
        # Rings at multiples of their size: the largest first.
        row_bytes = width // 8
        self._base, rows = {}, 0
        for n in sorted(range(len(clients)), key=lambda n: -clients[n].buffer_bytes):
            if clients[n].reads_data:
                self._base[n] = rows
                rows += clients[n].buffer_bytes // row_bytes
        self._rows = max(2, rows)
        self._index_bits = max((c.buffer_bytes // SLOT_BYTES).bit_length() for c in clients)
        self._table = TagTable(width=width, tags=tags, wall_tags=wall_tags, rows=self._rows, index_bits=self._index_bits,
                               timeout_cycles=completion_timeout_cycles)  # fmt: skip
        n = len(clients)
        super().__init__({
            "wall": In(stream.Signature(burst_layout(host_ats))),
            "gate": In(stream.Signature(burst_layout(host_ats))),
            "write_data": In(stream.Signature(BurstData(width))).array(n),
            **({"wall_operands": In(stream.Signature(BurstData(width)))} if clients[0].atomics else {}),
            "read_data": Out(stream.Signature(BurstData(width))).array(n),
            "write_done": Out(stream.Signature(BurstDone)).array(n),
            "completions": In(stream.Signature(TlpBeat(width))),
            "posted": Out(stream.Signature(TlpBeat(width, has_pasid))),
            "non_posted": Out(stream.Signature(TlpBeat(width, has_pasid))),
            "config": In(ConfigState).array(functions),
            **({"ats": In(functions)} if host_ats else {}),
            **({"pasid": In(functions)} if has_pasid else {}),
            "retired_reads": Out(stream.Signature(BurstRetired)),
            "retired_writes": Out(stream.Signature(BurstRetired)),
            "stop": In(functions),
            "stopped": Out(functions),
            "pending": Out(functions),
            "reads_room": Out(n),
            "tags_in_flight": Out(range(tags + 1)),
            "exhausted": Out(1),
            "events": Out(TagEvents),
            **({"diverted": Out(stream.Signature(32)), "diverted_end": In(stream.Signature(BurstStatus)), "diverted_over": Out(1)}
               if diverts else {}),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.table = table = self._table
        m.submodules.writes = writes = WritePath(width=self.width, clients=len(self.clients), functions=self.functions,
                                                 max_payload_code=(self.max_payload // 128).bit_length() - 1,
                                                 diverts=self.diverts, host_ats=self.host_ats, has_pasid=self.has_pasid)  # fmt: skip
        live = Signal(self.functions)
        m.d.comb += live.eq(Cat(config.bus_master for config in self.config) & ~self.stop)

        lines = self._make_lines(m, table, live)
        may_write, dones = self._make_write_side(m, writes, lines, live)
        accepted = self._make_entries(m, writes, lines, may_write)
        self._make_read_requests(m, table, lines)
        overs = self._make_buffer(m, table, lines)
        self._count_bursts(m, accepted, overs + dones)

        m.d.comb += [
            table.stop.eq(self.stop),
            self.tags_in_flight.eq(table.in_flight),
            self.exhausted.eq(table.exhausted),
            self.events.eq(table.events),
        ]
        for config, setting in zip(self.config, table.timeouts):
            m.d.comb += [setting.value.eq(config.timeout), setting.disable.eq(config.timeout_disable)]
        wiring.connect(m, wiring.flipped(self.completions), table.completions)
        return m

    def _make_lines(self, m, table, live):
        """Add a line for each client that reads; return them by client."""
        lines = {}
        shared = {"width": self.width, "rows": self._rows, "index_bits": self._index_bits, "functions": self.functions,
                  "host_ats": self.host_ats, "has_pasid": self.has_pasid}  # fmt: skip
        for n, base in sorted(self._base.items()):
            client = self.clients[n]
            own = {"client": n, "base": base, "reads": client.reads}
            if client.ordered:
                line = OrderedLine(**shared, **own, region=client.buffer_bytes * 8 // self.width)
            else:
                line = UnorderedLine(**shared, **own, slots=client.buffer_bytes // SLOT_BYTES, wall=n == 0,
                                     atomics=client.atomics)  # fmt: skip
            m.submodules[f"line{n}"] = lines[n] = line
            for config, its_config in zip(self.config, line.config):
                m.d.comb += its_config.eq(config)
            m.d.comb += [
                line.live.eq(live),
                line.ended.valid.eq(table.ended.valid),
                line.ended.payload.eq(table.ended.payload),
                line.ended.p.function.eq(table.ended.p.function[: ceil_log2(self.functions)]),
                line.free.short.eq(table.short_tags.valid if n else table.wall_tags.valid),
                line.dead.short.eq(table.dead.short if n else table.dead.wall),
                line.dead.long.eq(table.dead.long if n else 1),
                line.dead.wide.eq(table.dead.wide if n else 1),
            ]
            if self.host_ats:
                m.d.comb += line.ats.eq(self.ats)
            if self.has_pasid:
                m.d.comb += line.pasid.eq(self.pasid)
            if n:
                m.d.comb += [line.free.long.eq(table.long_tags.valid), line.free.wide.eq(table.wide_tags.valid)]
        return lines

    def _make_write_side(self, m, writes, lines, live):
        """Join the write path to the ports; return, for each client, whether a write may be accepted, and that a BurstDone was taken."""
        may_write, taken = [], []
        over = writes.over
        m.d.comb += writes.live.eq(live)
        if self.host_ats:
            m.d.comb += writes.ats.eq(self.ats)
        if self.has_pasid:
            m.d.comb += writes.pasid.eq(self.pasid)
        for config, its_config in zip(self.config, writes.config):
            m.d.comb += its_config.eq(config)
        wiring.connect(m, writes.posted, wiring.flipped(self.posted))
        if self.clients[0].atomics:
            wiring.connect(m, wiring.flipped(self.wall_operands), lines[0].operands)
        if self.diverts:
            late = self._end_diverted(m, writes)
        for n, port in enumerate(self.write_data):
            wiring.connect(m, wiring.flipped(port), lines[n].operands if n and self.clients[n].atomics else writes.data[n])
            m.submodules[f"done{n}"] = done = Queue(data.StructLayout({"done": BurstDone, "function": 3}), WRITES_IN_FLIGHT)
            o = self.write_done[n]
            m.d.comb += [
                done.i.valid.eq(over.valid & (over.p.client == n)),
                done.i.p.done.cookie.eq(over.p.cookie),
                done.i.p.done.status.eq(over.p.status),
                done.i.p.function.eq(over.p.function),
            ]
            if self.diverts:
                with m.If(over.p.status == DIVERTED):
                    m.d.comb += done.i.valid.eq(0)
                with m.If(late.valid & (late.p.client == n)):
                    m.d.comb += [
                        done.i.valid.eq(1), done.i.p.done.cookie.eq(late.p.cookie), done.i.p.done.status.eq(late.p.status),
                        done.i.p.function.eq(late.p.function),
                    ]  # fmt: skip
            m.d.comb += [
                o.valid.eq(done.o.valid),
                o.payload.eq(done.o.p.done),
                done.o.ready.eq(o.ready),
            ]
            taken.append(end := Signal(Over, name=f"done{n}_taken"))
            m.d.comb += [end.valid.eq(o.valid & o.ready), end.function.eq(done.o.p.function)]
            outstanding, is_full = Signal(range(WRITES_IN_FLIGHT + 1)), Signal()
            source = self.gate if n else self.wall
            starts = source.valid & source.ready & source.p.is_write & ((source.p.client == n) if n else 1)
            ends = o.valid & o.ready
            with m.If(starts != ends):
                m.d.sync += [
                    outstanding.eq(Mux(ends, outstanding - 1, outstanding + 1)),
                    is_full.eq(~ends & (outstanding == WRITES_IN_FLIGHT - 1)),
                ]
            may_write.append(~is_full)
        m.d.sync += [
            self.retired_writes.valid.eq(over.valid & ~over.p.is_wall),
            self.retired_writes.p.function.eq(over.p.function),
            self.retired_writes.p.epoch.eq(over.p.epoch),
        ]
        return may_write, taken

    def _end_diverted(self, m, writes):
        """Return the end of the burst whose dword was given away, when that is over; no other burst of its client is under way then."""
        late, given = stream.Signature(WriteOver).create(path=("late",)), Signal(WriteOver)
        waits, over, end = Signal(), writes.over, self.diverted_end
        wiring.connect(m, writes.diverted, wiring.flipped(self.diverted))
        with m.If(over.valid & (over.p.status == DIVERTED)):
            m.d.sync += [given.eq(over.p), waits.eq(1)]
        with m.If(late.valid):
            m.d.sync += waits.eq(0)
        m.d.comb += [
            end.ready.eq(waits), late.valid.eq(waits & end.valid), late.p.eq(given), late.p.status.eq(end.payload),
            self.diverted_over.eq(late.valid | writes.diverted_lost),
        ]
        return late

    def _make_entries(self, m, writes, lines, may_write):
        """Join the two ports to write path and lines; return, for each, a stream that shows what is accepted."""
        over = writes.over
        for name, port, write_port, ours in (
            ("wall", self.wall, writes.wall, {0: lines[0]}),
            ("gate", self.gate, writes.gate, {n: line for n, line in lines.items() if n}),
        ):
            burst = Signal(burst_layout(self.host_ats), name=f"{name}_burst")
            may_relax = Array(int(entry.relaxed) for entry in self.clients)[port.p.client]
            m.d.comb += [
                burst.eq(port.p),
                burst.function.eq(port.p.function[: ceil_log2(self.functions)]),
                burst.relaxed_ordering.eq(port.p.relaxed_ordering & may_relax),
                burst.no_snoop.eq(port.p.no_snoop & may_relax),
            ]
            client = burst.client if ours.keys() != {0} else Const(0, 6)
            # Every burst in order. A write leaves when it was sent, a read at once: then no unsent write is in front of it.
            m.submodules[f"{name}_order"] = order = Queue(data.StructLayout({"is_write": 1, "client": 6}), ORDER_DEPTH, direct=True)
            unsent_gone = Signal(range(ORDER_DEPTH + 1), name=f"{name}_sent")  # writes sent whose turn here has not come
            line_ready = Signal()
            write_ready = write_port.ready & Array(may_write)[client]
            m.d.comb += [
                line_ready.eq(Array(ours[n].bursts.ready if n in ours else 0 for n in range(len(self.clients)))[client]),
                port.ready.eq(order.i.ready & Mux(burst.is_write, write_ready, line_ready)),
                order.i.valid.eq(port.valid & port.ready),
                order.i.p.is_write.eq(burst.is_write),
                order.i.p.client.eq(client),
                write_port.valid.eq(port.valid & port.ready & burst.is_write),
                write_port.payload.eq(burst),
                write_port.p.client.eq(client),
            ]
            for n, line in ours.items():
                m.d.comb += [
                    line.bursts.valid.eq(port.valid & port.ready & ~burst.is_write & (client == n)),
                    line.bursts.payload.eq(burst),
                    line.cleared.eq(order.o.valid & ~order.o.p.is_write & (order.o.p.client == n)),
                    self.reads_room[n].eq(line.room),
                ]
            leaves, gone = order.o.p.is_write & (unsent_gone != 0), over.valid & (over.p.is_wall == (name == "wall"))
            m.d.comb += order.o.ready.eq(~order.o.p.is_write | (unsent_gone != 0))  # a write that was sent came before: there is one
            with m.If(gone != leaves):
                m.d.sync += unsent_gone.eq(Mux(leaves, unsent_gone - 1, unsent_gone + 1))
        return [self.wall, self.gate]

    def _make_read_requests(self, m, table, lines):
        """Choose the next piece of a read, give it a tag, send it."""
        o = self.non_posted
        wanted, granted = Signal(len(self.clients)), Signal(len(self.clients))
        behind = Signal(len(self.clients))  # the clients behind the one served last
        # An AtomicOp has 1 to 4 dwords of operands: at 64 bits maybe a second beat.
        second, second_data = Signal(), Signal(64)
        free = (~o.valid | o.ready) & ~second
        m.d.comb += granted[0].eq(free & wanted[0])
        for n in range(1, len(self.clients)):
            lower, higher = wanted[1:n], wanted[n + 1 :]
            first = Mux(behind[n], (lower & behind[1:n]) == 0, (lower == 0) & ((higher & behind[n + 1 :]) == 0))
            m.d.comb += granted[n].eq(wanted[n] & first & ~wanted[0] & free)
        with m.If(granted[1:].any()):
            m.d.sync += behind.eq(~((granted << 1) - 1))

        request = Signal(ReadRequest(self._rows, self._index_bits, self.host_ats))
        client = Signal(6)
        for n, line in lines.items():
            m.d.comb += [wanted[n].eq(line.wanted), line.granted.eq(granted[n])]
            with m.If(granted[n]):
                m.d.comb += client.eq(n)
        m.d.comb += request.eq(functools.reduce(operator.or_, (Mux(granted[n], line.request, 0) for n, line in lines.items())))

        # The widest set first, so that tags which others could use are left to them.
        grant = Signal(table.wall_tags.payload.shape())
        with m.If(granted[0]):
            m.d.comb += [grant.eq(table.wall_tags.payload), table.wall_tags.ready.eq(1)]
        with m.Elif(request.reach.wide & table.wide_tags.valid):
            m.d.comb += [grant.eq(table.wide_tags.payload), table.wide_tags.ready.eq(granted.any())]
        with m.Elif(request.reach.long & table.long_tags.valid):
            m.d.comb += [grant.eq(table.long_tags.payload), table.long_tags.ready.eq(granted.any())]
        with m.Else():
            m.d.comb += [grant.eq(table.short_tags.payload), table.short_tags.ready.eq(granted.any())]

        piece, burst = request.piece, request.piece.burst
        config = Signal(ConfigState)
        requester_id = Cat(burst.function[:3], config.device, config.bus)
        m.d.comb += config.eq(Array(self.config)[burst.function])
        opened, header = table.opened, o.p.header
        m.d.comb += [opened.valid.eq(o.valid & o.ready & o.p.first), o.p.last.eq(~second)]
        has_atomics = any(client.atomics for client in self.clients)
        is_atomic, is_double = Signal(), Signal()
        tlp_type, length_dw = Signal(5, init=pcie.TYPE_MEMORY), Signal(11)
        m.d.comb += length_dw.eq(piece.length_dw)
        if has_atomics:
            m.d.comb += [is_atomic.eq(burst.atomic != AtomicKind.NONE), is_double.eq(burst.atomic == AtomicKind.CAS)]
            with m.Switch(burst.atomic):
                for kind, code in _ATOMIC_TYPES.items():
                    with m.Case(kind):
                        m.d.comb += tlp_type.eq(code)
            with m.If(is_double):
                m.d.comb += length_dw.eq(piece.length_dw << 1)
            with m.If(free):
                m.d.sync += [
                    o.p.data.eq(request.operand),
                    o.p.dword_count.eq(Mux(is_atomic, Mux(length_dw > self.width // 32, self.width // 32, length_dw), 0)),
                ]
            if self.width == 64:
                with m.If(free):
                    m.d.sync += [second.eq(granted.any() & is_double & (length_dw == 4)), second_data.eq(request.operand[64:])]
                with m.Elif(second & o.ready):
                    m.d.sync += [second.eq(0), o.p.first.eq(0), o.p.data.eq(second_data)]
        with m.If(free):
            m.d.sync += [
                o.valid.eq(granted.any()),
                o.p.first.eq(1),
                header.fmt.eq((request.is_far << pcie.FMT_4DW) | (is_atomic << pcie.FMT_DATA)),
                header.type.eq(tlp_type),
                header.relaxed_ordering.eq(burst.relaxed_ordering),
                header.no_snoop.eq(burst.no_snoop),
                header.length_dw.eq(length_dw),
                header.requester_id.eq(requester_id),
                header.tag.eq(Mux(request.reach.wide, ten_bit_name(grant.tag), grant.tag)),
                header.first_be.eq(Mux(is_atomic, 0, piece.first_be)),  # reserved in AtomicOps
                header.last_be.eq(Mux(is_atomic, 0, piece.last_be)),
                header.address.eq(Cat(Const(0, 2), burst.address[2:])),
                opened.p.tag.eq(grant.tag),
                opened.p.ten_bit.eq(request.reach.wide),
                opened.p.atomic.eq(is_atomic),
                opened.p.generation.eq(grant.generation),
                opened.p.client.eq(client),
                opened.p.function.eq(burst.function),
                opened.p.epoch.eq(burst.epoch),
                opened.p.requester_id.eq(requester_id),
                opened.p.lower_address.eq(burst.address[:7]),
                opened.p.length_bytes.eq(burst.length_bytes),
                opened.p.row.eq(request.row),
                opened.p.index.eq(request.index),
            ]
            if self.host_ats:  # the answer to a translation request is one completion, as an AtomicOp's [PCIe5 10.2.2, 10.2.3]
                asks = burst.at == pcie.AT_TRANSLATION_REQUEST
                m.d.sync += [header.at.eq(burst.at), header.address[0].eq(asks & burst.no_write), opened.p.atomic.eq(is_atomic | asks)]
            if self.has_pasid:
                m.d.sync += o.p.pasid.eq(Cat(burst.pasid_valid, burst.pasid))
        is_new = Signal()  # the request in ``opened`` is there since this cycle
        m.d.sync += is_new.eq(granted.any())
        for f in range(self.functions):
            count = Signal(range(self.tags + 1), name=f"requests{f}")
            begins = is_new & (opened.p.function == f)
            ends = table.ended.valid & (table.ended.p.function == f)
            with m.If(begins != ends):
                m.d.sync += count.eq(Mux(ends, count - 1, count + 1))
            m.d.comb += self.pending[f].eq((count != 0) | begins)

    def _make_buffer(self, m, table, lines):
        """Join buffer, lines and clients; return the ends of reads taken by their clients."""
        regions = [0] * len(self.clients)
        for n in lines:
            regions[n] = (self.clients[n].buffer_bytes if self.clients[n].ordered else SLOT_BYTES) * 8 // self.width
        m.submodules.buffer = buffer = ReadBuffer(width=self.width, rows=self._rows, regions=regions)
        wiring.connect(m, table.store, buffer.store)
        m.submodules.retiring = retiring = Arbiter(BurstRetired, max(1, len(lines) - 1))
        gate_lines = [n for n in lines if n]
        for n, line in lines.items():
            wiring.connect(m, line.rows, buffer.reads[n])
            wiring.connect(m, buffer.o[n], wiring.flipped(self.read_data[n]))
            if n:
                wiring.connect(m, line.retired, retiring.i[gate_lines.index(n)])
        wiring.connect(m, retiring.o, wiring.flipped(self.retired_reads))
        return [buffer.over[n] for n in lines]

    def _count_bursts(self, m, accepted, taken):
        """Count the bursts of each function that are not over."""
        begins, ends = [], []
        for n, port in enumerate(accepted):
            begins.append(begin := Signal(Over, name=f"begin{n}"))
            m.d.sync += [begin.valid.eq(port.valid & port.ready), begin.function.eq(port.p.function)]
        for n, over in enumerate(taken):
            ends.append(end := Signal(Over, name=f"end{n}"))
            m.d.sync += end.eq(over)
        for f in range(self.functions):
            begin, end = (sum((one.valid & (one.function == f) for one in ones), start=Const(0, 1)) for ones in (begins, ends))
            count, change = Signal(15, name=f"bursts{f}"), Signal(signed(8), name=f"change{f}")
            m.d.sync += [
                change.eq(begin - end),
                count.eq(count + change),
                self.stopped[f].eq(self.stop[f] & (count == 0) & (change == 0) & (begin == 0)),
            ]
