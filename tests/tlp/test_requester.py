"""The requester between clients that do everything they may and a link that does everything it must not."""

import dataclasses
import os
import random

import cocotb
import pytest
from amaranth.lib import data
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.dma import Span, TlpRules
from ringwall.models.tlp import CplStatus, TlpType, decode, encode, stray_bits
from ringwall.rtl.tlp.layouts import Burst, BurstData, BurstDone, BurstRetired, BurstStatus, ConfigState, TlpBeat
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.rtl.tlp.tags import TagEvents
from ringwall.sim.burst_bus import data_beats
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, reader, start, unpack
from ringwall.sim.tlp_beats import RequesterLink, completions_of

PAGE = 4096
WALL, RING, DATA, MSIX, RING2, DATA2 = range(6)
CLIENTS = (ReadClient("wall", False, 512), ReadClient("ring", False, 1024, 16), ReadClient("data", True, 8192, 8, relaxed=True),
           ReadClient("msix", False, 0), ReadClient("ring2", False, 128, 4), ReadClient("data2", True, 4096, 4))  # fmt: skip
FUNCTION_OF = {WALL: 0, RING: 1, DATA: 1, MSIX: 1, RING2: 2, DATA2: 2}
TAGS, TIMEOUT = 64, 2048


@dataclasses.dataclass
class Op:
    """A burst that was issued, and what became of it."""

    client: int
    is_write: bool
    address: int
    length: int
    cookie: int
    function: int
    data: bytes = b""
    verdict: BurstStatus = BurstStatus.OK
    epoch: int = 0
    ro: int = 0
    ns: int = 0
    got: bytes = b""
    beats: int = 0
    status: BurstStatus | None = None
    sent_bytes: int = 0
    tlps: list = dataclasses.field(default_factory=list)
    rules: TlpRules | None = None
    accepted: int = -1  # place in the order of its port
    accepted_at: int = -1  # cycle

    def covers(self, address, length):
        return self.address <= address and address + length <= self.address + self.length


class Bench:
    """The requester, its clients, and a host that answers what it is told to."""

    def __init__(self, dut, rng):
        self.dut, self.rng, self.width = dut, rng, params()["width"]
        self.pattern = rng.randbytes(1 << 16)
        self.config = [{"bus": rng.getrandbits(8), "device": rng.getrandbits(5), "bus_master": 1, "extended_tag": 1, "mrrs_code": 2,
                        "mps_code": 1, "relaxed_ordering": 1, "no_snoop": 1} for _ in range(3)]  # fmt: skip
        self.memory = {}  # what was written
        self.ops, self.reads, self.writes = [], {n: [] for n in range(6)}, {n: [] for n in range(6)}
        self.outstanding = {}  # tag -> read TLP
        self.retired = {"retired_reads": [], "retired_writes": []}
        self.accepted, self.order = {"wall": [], "gate": []}, {"wall": 0, "gate": 0}
        self.dead = set()  # functions that are stopped, or not bus master
        self.tlps = []  # every TLP sent
        self.events = dict.fromkeys(("unexpected", "timeout", "unsupported", "aborted", "poisoned"), 0)
        self.tags = params()["tags"]
        self.told = []  # of every event
        self.problems = []
        self.answer = self.answer_well
        self.delay = lambda: 0
        self.issued = cocotb.triggers.Event()
        self.cookies = 0
        self.page = 0

    async def begin(self, *, ready=1.0, gaps=None):
        """Start everything; ``ready``: probability that a stream of the bench is ready; ``gaps``: idle cycles before beats of data."""
        await start(self.dut)
        self.set_config()
        names = ["wall", "gate", "completions", "posted", "non_posted", "retired_reads", "retired_writes"]
        names += [f"{kind}__{n}" for kind in ("write_data", "read_data", "write_done") for n in range(6)]
        self.s = {name: Stream(self.dut, name) for name in names}
        self.link = RequesterLink(self.width, self.s["posted"], self.s["non_posted"], self.s["completions"], self.on_write,
                                  self.on_read).start()  # fmt: skip
        self.gaps = gaps
        ours = ["posted", "non_posted", *(name for name in names if name.startswith(("read_data", "write_done")))]
        cocotb.start_soon(self.drive_ready(ours, ready, random.Random(self.rng.getrandbits(32))))
        for name in ("retired_reads", "retired_writes"):
            cocotb.start_soon(self.s[name].watch(self.retired[name]))
            self.s[name].set_ready(1)
        self.pending = {"wall": [], "gate": []}
        self.data = {n: [] for n in range(6)}
        for n in range(6):
            cocotb.start_soon(self.s[f"read_data__{n}"].watch(_Call(lambda beat, n=n: self.on_data(n, beat))))
            cocotb.start_soon(self.s[f"write_done__{n}"].watch(_Call(lambda done, n=n: self.on_done(n, done))))
            cocotb.start_soon(self.feed(self.s[f"write_data__{n}"], self.data[n], gaps))
        for name in ("wall", "gate"):
            cocotb.start_soon(self.feed(self.s[name], self.pending[name], gaps))
            cocotb.start_soon(self.s[name].watch(_Call(lambda burst, name=name: self.on_accepted(name))))
        cocotb.start_soon(self.watch_events())
        await ClockCycles(self.dut.clk, 300)  # tags and tickets are being cleared
        return self

    async def drive_ready(self, names, p, rng):
        """Drive ``ready`` of streams anew in each cycle: 1 with probability ``p``."""
        writes, edge = [self.s[name].set_ready for name in names], RisingEdge(self.dut.clk)
        for write in writes:
            write(1)
        while p < 1.0:
            now = [rng.random() < p for _ in writes]
            for write, new in zip(writes, now):
                write(new)
            for _ in range(rng.choice([1, 1, 2, 5])):
                await edge

    def set_config(self, n=None, **fields):
        """Change the configuration of function ``n``, or just apply it."""
        if n is not None:
            self.config[n].update(fields)
        for f, config in enumerate(self.config):
            getattr(self.dut, f"config__{f}").value = pack(ConfigState, **config)

    async def feed(self, s, queue, gaps):
        """Put what appears in ``queue``."""
        while True:
            if not queue:
                await self.issued.wait()
                self.issued.clear()
                await s._edge
                continue
            for _ in range(gaps() if gaps else 0):
                await s._edge
            await s.put(queue[0])
            queue.pop(0)

    async def watch_events(self):
        edge, read = RisingEdge(self.dut.clk), reader(self.dut.events)
        pulses = sum(1 << data.Layout.cast(TagEvents)[name].offset for name in self.events)
        while True:
            while not read() & pulses:
                await self.dut.events.value_change
                await edge
            events = unpack(TagEvents, read())
            for name in self.events:
                self.events[name] += getattr(events, name)
            self.told.append(events)
            await edge

    # Clients

    def new_range(self, client, is_write):
        """Return a legal (address, length) for a burst of ``client``; writes never meet."""
        rng = self.rng
        if not is_write:
            page = rng.getrandbits(52 if rng.random() < 0.7 else 20) << 12
        else:
            self.page += 1
            page = (self.page << 12) + (rng.getrandbits(10) << 54 if rng.random() < 0.7 else 0)
        if client in (WALL, RING, RING2) and not is_write:
            start = rng.randrange(64)
            return page + 64 * rng.randrange(64) + start, rng.choice([1, 64 - start, rng.randrange(1, 65 - start)])
        edge = rng.choice([0, 64, 128, 256, 512, 1024, 2048, 4096])
        offset = rng.choice([edge, edge - rng.randrange(1, 9), edge + rng.randrange(9), rng.randrange(PAGE)]) % PAGE
        room = PAGE - offset
        length = rng.choice([1, 2, 3, 4, 8, 64, 127, 128, 129, 256, 513, room - 1, room, rng.randrange(1, PAGE + 1)])
        return page + offset, max(1, min(length, room))

    def issue(self, client, is_write, address=None, length=None, **fields):
        """Queue a burst (and its data); return its record."""
        if address is None:
            address, length = self.new_range(client, is_write)
        self.cookies = (self.cookies + 1) % 4096
        fields.setdefault("function", FUNCTION_OF[client])
        op = Op(client, is_write, address, length, self.cookies, **fields)
        if is_write:
            op.data = self.rng.randbytes(length)
            self.data[client] += data_beats(self.width, address, op.data)
            self.writes[client].append(op)
        else:
            self.reads[client].append(op)
        port = "wall" if client == WALL else "gate"
        self.ops.append(op)
        self.accepted[port].append(op)
        self.issued.set()
        self.pending[port].append(pack(
            Burst, address=address, length_bytes=length, is_write=is_write, is_wall=client == WALL, function=op.function,
            client=client, cookie=op.cookie, verdict=op.verdict, epoch=op.epoch, relaxed_ordering=op.ro, no_snoop=op.ns))  # fmt: skip
        return op

    def on_accepted(self, port):
        """The next burst of a port was taken."""
        op = self.accepted[port][self.order[port]]
        op.accepted, op.accepted_at = self.order[port], cycle()
        self.order[port] += 1

    def on_data(self, client, payload):
        """Check a beat of read data and add it to the read it is for."""
        beat, lanes = unpack(BurstData(self.width), payload), self.width // 8
        waiting = self.reads[client]
        if CLIENTS[client].ordered:
            op = next((op for op in waiting if op.status is None), None)
        else:
            op = next((op for op in waiting if op.status is None and op.cookie == beat.cookie), None)
        if op is None:
            self.problems.append(f"client {client}: data that nobody asked for: {beat}")
            return
        name = f"client {client} read {op.address:#x}+{op.length}"
        if beat.cookie != op.cookie:
            self.problems.append(f"{name}: cookie {beat.cookie}, expected {op.cookie}")
        if beat.first != (op.beats == 0):
            self.problems.append(f"{name}: beat {op.beats} with first {beat.first}")
        op.beats += 1
        if beat.last:
            op.status = beat.status
            if beat.status != BurstStatus.OK:
                return
        start = (op.address + len(op.got)) % lanes
        count = min(lanes - start, op.length - len(op.got))
        if beat.keep != ((1 << count) - 1) << start:
            self.problems.append(f"{name}: beat {op.beats} keep {beat.keep:#x}, expected {count} bytes from lane {start}")
        op.got += (beat.data >> 8 * start & (1 << 8 * count) - 1).to_bytes(count, "little")
        if bool(beat.last) != (len(op.got) == op.length):
            self.problems.append(f"{name}: last {beat.last} after {len(op.got)} bytes")

    def on_done(self, client, payload):
        """The oldest write of a client is done."""
        done = unpack(BurstDone, payload)
        op = next((op for op in self.writes[client] if op.status is None), None)
        if op is None or op.cookie != done.cookie:
            self.problems.append(f"client {client}: done {done}, expected {op}")
            return
        op.status = done.status
        if done.status == BurstStatus.OK and op.sent_bytes != op.length:
            self.problems.append(f"client {client}: write {op.address:#x}+{op.length} done with {op.sent_bytes} bytes sent")

    # Host

    def on_tlp(self, tlp, code):
        """Check what every request must obey; return the burst that it belongs to."""
        dwords = encode(tlp)
        decoded = decode(dwords)  # raises for a TLP that a receiver must refuse
        if stray_bits(dwords, decoded) or decoded != tlp:
            self.problems.append(f"{tlp}: decodes to {decoded}")
        self.tlps.append(tlp)
        start, length = tlp.byte_span()
        op = next((op for op in reversed(self.ops) if op.is_write == (tlp.type is TlpType.MWR) and op.covers(start, length)
                   and op.sent_bytes == start - op.address), None)  # fmt: skip
        if op is None:
            self.problems.append(f"{tlp}: no burst asks for it next")
            return None
        config = self.config[op.function]
        limits = {name: 128 << (0 if config[name] > 5 else config[name]) for name in ("mps_code", "mrrs_code")}
        limit = limits[code]
        op.rules = op.rules or TlpRules(mps=limits["mps_code"], mrrs=limits["mrrs_code"])
        op.tlps.append(tlp)
        if start // limit != (start + length - 1) // limit or (start != op.address and start % limit):
            self.problems.append(f"{tlp}: not cut at multiples of {limit}")
        if tlp.requester_id != config["bus"] << 8 | config["device"] << 3 | op.function:
            self.problems.append(f"{tlp}: wrong requester")
        asks = [bit and CLIENTS[op.client].relaxed for bit in (op.ro, op.ns)]
        allowed = [bool(bit and config[name]) for bit, name in zip(asks, ("relaxed_ordering", "no_snoop"))]
        if [tlp.relaxed_ordering, tlp.no_snoop] != allowed:
            self.problems.append(f"{tlp}: attributes of {op}, {config}")
        if (tlp.tc, tlp.at, tlp.td, tlp.poisoned, tlp.ido) != (0, 0, False, False, False):
            self.problems.append(f"{tlp}: a field is set that must not be")
        if op.verdict != BurstStatus.OK:
            self.problems.append(f"{tlp}: sent for a refused burst")
        op.sent_bytes += length
        return op

    def on_write(self, tlp):
        op = self.on_tlp(tlp, "mps_code")
        for address, byte in tlp.enabled_bytes():
            if address in self.memory:
                self.problems.append(f"{tlp}: byte {address:#x} written twice")
            self.memory[address] = byte
        if op is not None and list(dict(tlp.enabled_bytes())) != list(range(*(lambda s, n: (s, s + n))(*tlp.byte_span()))):
            self.problems.append(f"{tlp}: enables with gaps")

    def on_read(self, tlp):
        op = self.on_tlp(tlp, "mrrs_code")
        if tlp.tag in self.outstanding:
            self.problems.append(f"{tlp}: tag in flight twice")
        if op is not None:
            config = self.config[op.function]
            ten_bit = config.get("ten_bit_tag", 0)
            end = self.tags if ten_bit else min(self.tags, 256) if config["extended_tag"] else 32
            tags = range(8) if op.client == WALL else range(8, end)
            if tlp.tag - 256 * ten_bit not in tags:
                self.problems.append(f"{tlp}: tag not in {tags}")
            for before in self.accepted["wall" if op.client == WALL else "gate"][: op.accepted]:
                unsent = before.is_write and before.status is None and before.sent_bytes < before.length
                if unsent and before.verdict == BurstStatus.OK and before.function not in self.dead:
                    self.problems.append(f"{tlp}: overtook the write {before.address:#x}+{before.length}")
        self.outstanding[tlp.tag] = tlp
        self.answer(tlp)

    def content(self, address, length):
        """What memory holds for reads."""
        return bytes(self.pattern[a & 0xFFFF] ^ (a >> 16 & 0xFF) ^ (a >> 40 & 0xFF) for a in range(address, address + length))

    def good(self, tlp, cuts=()):
        """Return the completions of a read."""
        return completions_of(tlp, self.content(*tlp.byte_span()), cuts)

    def random_cuts(self, tlp):
        """Return addresses at which a completer may cut: any set of multiples of 64. [PCIe5 2.3.1.1]"""
        start, length = tlp.byte_span()
        every = range((start | 63) + 1, start + length, 64)
        return self.rng.sample(every, self.rng.randrange(len(every) + 1)) if self.rng.random() < 0.8 else every

    def answer_well(self, tlp):
        """Answer with legal completions, in order within the tag, at any time."""
        delay = 0
        parts = self.good(tlp, self.random_cuts(tlp))
        for n, part in enumerate(parts):
            delay += self.delay()
            self.link.send(part, delay)
            if n == len(parts) - 1:
                cocotb.start_soon(self.forget(tlp, delay))

    async def forget(self, tlp, delay=0):
        """A tag may be used again when its last completion is out."""
        if delay:
            await ClockCycles(self.dut.clk, delay)
        del self.outstanding[tlp.tag]

    def release(self, tlp):
        self.outstanding.pop(tlp.tag, None)

    # Verdict

    async def settle(self, cycles=20000, ops=None):
        """Wait until all bursts (or ``ops``) are answered; fail after ``cycles``."""
        ops = self.ops if ops is None else ops
        for _ in range(cycles // 16):
            if all(op.status is not None for op in ops):
                break
            await ClockCycles(self.dut.clk, 16)
        hung = [op for op in ops if op.status is None]
        assert not hung, f"{len(hung)} bursts without an end, first {hung[0]}; problems: {self.problems[:3]}"

    async def judge(self):
        """Everything that was OK moved the right bytes, nothing else was written, each burst of the gate retired once."""
        await ClockCycles(self.dut.clk, 60)
        assert not self.problems, self.problems[:5]
        expected = {}
        for op in self.ops:
            if op.is_write:
                done = op.length if op.status == BurstStatus.OK else op.sent_bytes
                expected.update(zip(range(op.address, op.address + done), op.data))
            if op.status == BurstStatus.OK:
                broken = op.rules.faults(Span(op.address, op.length), op.tlps, op.data if op.is_write else None)
                assert not broken, f"{op}: {broken}"
            if not op.is_write and op.status == BurstStatus.OK:
                assert op.got == self.content(op.address, op.length), f"wrong data for {op}"
        assert self.memory == expected, "memory differs"
        for name, is_write in (("retired_reads", False), ("retired_writes", True)):
            got = sorted((r.function, r.epoch) for r in (unpack(BurstRetired, r) for r in self.retired[name]))
            assert got == sorted((op.function, op.epoch) for op in self.ops if op.client != WALL and op.is_write == is_write), name
        assert int(self.dut.tags_in_flight.value) == 0
        assert self.link.stalls == 0, "a completion had to wait"


class _Call:
    def __init__(self, append):
        self.append = append


def make(width, **changes):
    return Requester(**{"width": width, "clients": CLIENTS, "functions": 3, "tags": TAGS, "completion_timeout_cycles": TIMEOUT,
                        "max_payload": 4096} | changes)  # fmt: skip


def simulate(request, component, sim="verilator", **more):
    """Run the test of the caller's name. Verilator is 5 times as fast on this circuit once it is built; Icarus finds unknown values."""
    names = [request.node.originalname.removeprefix("test_")]
    parameters = {"width": component.width, "tags": component.tags, **more}
    run(component, module=__name__, node=request.node.nodeid, testcase=names, params=parameters,
        sim=os.environ.get("SIM") or sim)  # fmt: skip


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_everything_arrives(request, width):
    simulate(request, make(width, completion_timeout_cycles=1 << 15), "icarus")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def everything_arrives(dut):
    """TLP-REQ-1: bursts of every alignment and length on every client at every MPS and MRRS, cut and reordered completions,
    back-pressure everywhere: bytes, framing, order, tags of 5, 8 and 10 bits, retirement; Relaxed Ordering and No Snoop on bulk data
    alone (R05, R14, R16, R18)."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin(ready=rng.choice([0.5, 0.9]), gaps=lambda: rng.choice([0, 0, 0, 2, 9]))
    bench.delay = lambda: rng.choice([0, 3, 40, 150])
    for _ in range(6):
        for n in range(3):
            bench.set_config(n, mps_code=rng.randrange(8), mrrs_code=rng.randrange(8), extended_tag=rng.getrandbits(1),
                             ten_bit_tag=rng.getrandbits(1), relaxed_ordering=rng.getrandbits(1), no_snoop=rng.getrandbits(1))  # fmt: skip
        for _ in range(25):
            client = rng.randrange(6)
            bits = {name: rng.getrandbits(1) for name in ("epoch", "ro", "ns")}
            bench.issue(client, client == MSIX or rng.random() < 0.5, **bits)
        await bench.settle(60000)
    assert all(op.status == BurstStatus.OK for op in bench.ops)
    await bench.judge()
    assert not any(bench.events.values()), bench.events


def damage(bench, tlp, fault):
    """Return the completions of a read with a fault, and the status that the read must end with."""
    start, length = tlp.byte_span()
    middle = [a for a in (start + length // 2 & ~63,) if start < a < start + length]
    parts = bench.good(tlp, middle)
    first, last = parts[0], parts[-1]
    failed = dataclasses.replace(first, type=TlpType.CPL, data=b"", length_dw=0)
    flipped = {name: dataclasses.replace(last, **{name: getattr(last, name) ^ bit}) for name, bit in (
        ("byte_count", 1), ("lower_address", 4), ("requester_id", 1), ("tag", 256))}  # fmt: skip
    longer = dataclasses.replace(last, data=last.data + b"more", length_dw=last.length_dw + 1)
    locked = dataclasses.replace(last, type=TlpType.CPLDLK)
    empty = dataclasses.replace(last, type=TlpType.CPL, data=b"", length_dw=0)
    poisoned = dataclasses.replace(first, poisoned=True)
    lost = BurstStatus.TIMEOUT
    return {
        "UR": ([dataclasses.replace(failed, status=CplStatus.UR)], BurstStatus.UR),
        "CA": ([dataclasses.replace(failed, status=CplStatus.CA)], BurstStatus.CA),
        "CRS": ([dataclasses.replace(failed, status=CplStatus.CRS)], BurstStatus.UR),
        "reserved status": ([dataclasses.replace(failed, status=7)], BurstStatus.UR),
        "UR with data": ([dataclasses.replace(first, status=CplStatus.UR)], BurstStatus.UR),
        "CA at the end": ([*parts[:-1], dataclasses.replace(failed, status=CplStatus.CA)], BurstStatus.CA),
        "poisoned": ([poisoned, *parts[1:]], BurstStatus.POISONED),
        "duplicate": ([*parts, last], BurstStatus.OK),
        "wrong, then right": ([flipped["byte_count"], longer, flipped["requester_id"], *parts], BurstStatus.OK),
        "missing": ([], lost),
        "last missing": (parts[:-1], lost),
        "wrong byte count": ([*parts[:-1], flipped["byte_count"]], lost),
        "wrong lower address": ([*parts[:-1], flipped["lower_address"]], lost),
        "wrong requester": ([*parts[:-1], flipped["requester_id"]], lost),
        "wrong tag": ([*parts[:-1], flipped["tag"]], lost),
        "too long": ([*parts[:-1], longer], lost),
        "locked": ([*parts[:-1], locked], lost),
        "without data": ([*parts[:-1], empty], lost),
        "wrong order": ([*reversed(parts)] if len(parts) > 1 else [flipped["lower_address"]], lost),
    }[fault]


FAULTS = ("UR", "CA", "CRS", "reserved status", "UR with data", "CA at the end", "poisoned", "duplicate", "wrong, then right",
          "missing", "last missing", "wrong byte count", "wrong lower address", "wrong requester", "wrong tag", "too long", "locked",
          "without data", "wrong order")  # fmt: skip


@pytest.mark.parametrize("width", [128, 256])
def test_every_error_ends_its_read(request, width):
    simulate(request, make(width))


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def every_error_ends_its_read(dut):
    """TLP-REQ-2: each fault of a completion, on the wall, an unordered and an ordered client, in the middle of a burst and of other
    reads: the burst ends once with its status, the neighbours are right, the tag comes back, the next read works."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin(ready=0.9)
    faulty, left = {}, []

    def answer(tlp):
        start, _ = tlp.byte_span()
        if start not in faulty:
            return bench.answer_well(tlp)
        parts, faulty[start][1] = damage(bench, tlp, faulty[start][0])
        for part in parts:
            bench.link.send(part, 30)
        bench.release(tlp)
        if faulty[start][1] == BurstStatus.TIMEOUT:
            left.append((tlp, parts))

    bench.answer = answer
    for fault in FAULTS:
        before = dict(bench.events)
        ops, expected = [], []
        for client in (WALL, RING, DATA, RING2, DATA2):
            page = rng.getrandbits(40) << 12
            length = 1500 if CLIENTS[client].ordered else 60
            good = [bench.issue(client, False, page + n, length) for n in (0, 2048)]
            bad = bench.issue(client, False, page + 1026 if CLIENTS[client].ordered else page + 1024 + rng.randrange(4), length)
            good.append(bench.issue(client, False, page + 3 * 4096, length))
            faulty[page + 1536 if CLIENTS[client].ordered else bad.address] = [fault, None]
            ops += [*good, bad]
            expected += [(op, BurstStatus.OK) for op in good] + [(bad, None)]
        await bench.settle(8000, ops)
        statuses = {found[1] for found in faulty.values()}
        assert len(statuses) == 1, f"{fault}: some were not read"
        status = statuses.pop()
        for op, wanted in expected:
            assert op.status == (wanted or status), f"{fault}: {op} ended with {op.status}, expected {wanted or status}"
        happened = {name: bench.events[name] - before[name] for name in before}
        assert happened["timeout"] == 5 * (status == BurstStatus.TIMEOUT), f"{fault}: {happened}"
        assert happened["unsupported"] == 5 * (status == BurstStatus.UR), f"{fault}: {happened}"
        assert happened["aborted"] == 5 * (status == BurstStatus.CA), f"{fault}: {happened}"
        assert happened["poisoned"] == 5 * (status == BurstStatus.POISONED), f"{fault}: {happened}"
        wrong = {"duplicate": 5, "wrong, then right": 15}.get(fault, 0 if "missing" in fault else 5)
        if status in (BurstStatus.OK, BurstStatus.TIMEOUT):
            assert happened["unexpected"] == wrong, f"{fault}: {happened}"
        assert int(dut.tags_in_flight.value) == 0
        # What is still missing arrives late: nothing happens but that the tags are free again.
        for tlp, _ in left:
            for part in damage(bench, tlp, "duplicate")[0][:-1]:
                bench.link.send(part)
        left.clear()
        faulty.clear()
        while not bench.link.idle:
            await ClockCycles(dut.clk, 10)
        await ClockCycles(dut.clk, 200)
        assert not bench.problems, f"{fault}: {bench.problems[:3]}"
    assert int(dut.exhausted.value) == 0
    for _ in range(80):
        bench.issue(rng.choice([WALL, RING, DATA, RING2, DATA2]), False)
    await bench.settle()
    assert all(op.status == BurstStatus.OK for op in bench.ops[-80:])
    await bench.judge()


@pytest.mark.parametrize("width", [256])
def test_missing_completions_use_up_the_tags(request, width):
    simulate(request, make(width))


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def missing_completions_use_up_the_tags(dut):
    """TLP-REQ-3: a host that never answers: each read ends in time, its tag is not used again; with all tags gone reads fail at once
    instead of hanging; the wall goes on; late completions and a stop bring the tags back."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin()
    for n in range(3):
        bench.set_config(n, extended_tag=0)
    lost = []

    def answer(tlp):
        if tlp.tag < 8:
            bench.answer_well(tlp)
        else:
            lost.append(tlp)  # and its tag stays in `outstanding`: using it again is a problem

    bench.answer = answer
    reads = [bench.issue(rng.choice([RING, DATA, RING2, DATA2]), False, (n + 1) << 12, 32) for n in range(30)]
    walls = [bench.issue(WALL, False) for _ in range(40)]
    began = cycle()
    await bench.settle(8 * TIMEOUT)
    assert all(op.status == BurstStatus.TIMEOUT for op in reads)
    assert all(op.status == BurstStatus.OK for op in walls)
    assert len(lost) == 24, f"{len(lost)} tags were used, 8 to 31 exist"
    assert cycle() - began < 1.3 * TIMEOUT + 400
    assert int(dut.exhausted.value) == 1
    began = cycle()
    more = [bench.issue(client, False, 0x100000, 64) for client in (RING, DATA, RING2, DATA2)]
    await bench.settle(2000)
    assert cycle() - began < 100
    assert all(op.status == BurstStatus.TIMEOUT for op in more) and len(lost) == 24

    # Late answers to half of them: in parts, so that the tag is free only after the last.
    bench.answer = bench.answer_well
    late, never = lost[:13], lost[13:]
    parts = {tlp.tag: bench.good(tlp) for tlp in late}
    for tlp in late[1:]:
        bench.link.send(parts[tlp.tag][0])
        bench.release(tlp)
    await ClockCycles(dut.clk, 100)
    assert int(dut.exhausted.value) == 1
    bench.link.send(parts[late[0].tag][0])
    bench.release(late[0])
    await ClockCycles(dut.clk, 50)
    assert int(dut.exhausted.value) == 0
    assert bench.events["unexpected"] == 13
    reads = [bench.issue(rng.choice([RING, DATA, RING2, DATA2]), False) for _ in range(60)]
    await bench.settle()
    assert all(op.status == BurstStatus.OK for op in reads)
    assert {tlp.tag for tlp in bench.tlps[-60:]} <= {tlp.tag for tlp in late}

    # A stop of both functions starts two more timeouts, then the rest is free as well.
    dut.stop.value = 0b110
    await ClockCycles(dut.clk, 20)
    assert int(dut.stopped.value) == 0b110
    dut.stop.value = 0
    await ClockCycles(dut.clk, 2 * TIMEOUT - 600)
    reads = [bench.issue(rng.choice([RING, DATA, RING2, DATA2]), False) for _ in range(60)]
    await bench.settle()
    assert {tlp.tag for tlp in bench.tlps[-60:]} <= {tlp.tag for tlp in late}
    await ClockCycles(dut.clk, TIMEOUT)
    for tlp in never:
        bench.release(tlp)
    reads += [bench.issue(rng.choice([RING, DATA, RING2, DATA2]), False) for _ in range(120)]
    await bench.settle()
    assert all(op.status == BurstStatus.OK for op in reads)
    assert {tlp.tag for tlp in bench.tlps[-100:]} >= {tlp.tag for tlp in never}
    await bench.judge()


@pytest.mark.parametrize("width", [128, 256])
def test_a_stop_ends_everything(request, width):
    simulate(request, make(width))


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def a_stop_ends_everything(dut):
    """TLP-REQ-4: stop, or bus master off, in the middle of traffic: nothing more is sent for the function, all its bursts end (done, RESET,
    or with their completions), the other function and the wall run on undisturbed, afterwards it works again. Requests are pending
    while one that was sent is not over, and never again once none is."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin(ready=0.8, gaps=lambda: rng.choice([0, 0, 1, 4]))
    bench.delay = lambda: rng.choice([20, 100])
    good, silent = bench.answer_well, [False]

    def answer(tlp):
        if silent[0] and tlp.requester_id & 7 == 1 and rng.random() < 0.3:
            return  # never answered; the tag stays in use
        good(tlp)

    bench.answer = answer
    ended = {1: 0, 2: 0}
    for trial in range(8):
        f = 1 + trial % 2
        ops = [bench.issue(client := rng.randrange(6), client == MSIX or rng.random() < 0.5) for _ in range(60)]
        silent[0], earlier = trial == 6, list(bench.outstanding.values())
        for _ in range(rng.randrange(60, 500)):
            await RisingEdge(dut.clk)
            pending = int(dut.pending.value)
            waiting = [tlp for tlp in bench.outstanding.values() if tlp not in earlier]
            assert all(pending >> (tlp.requester_id & 7) & 1 for tlp in waiting), f"{pending:#x} pending, waiting for {waiting}"
        if trial < 4:
            dut.stop.value = 1 << f
        else:
            bench.set_config(f, bus_master=0)
        bench.dead = {f}
        await ClockCycles(dut.clk, 50)  # what was offered must be taken, and a TLP that began may end
        sent = len(bench.tlps)
        if trial >= 4:
            was = 1
            for _ in range(1500):
                await RisingEdge(dut.clk)
                assert was or not int(dut.pending.value) >> f & 1, "requests are pending again of a function that may send none"
                was = int(dut.pending.value) >> f & 1
        if trial < 4:
            while not int(dut.stopped.value) >> f & 1:
                await ClockCycles(dut.clk, 10)
            waiting = [op for op in ops if op.function == f and op.status is None and 0 <= op.accepted_at < cycle() - 10]
            assert not waiting, f"{cycle()} stopped, but {waiting[0]} has no end"
            assert not int(dut.stopped.value) & ~(1 << f)
        await bench.settle(60000)
        for op in ops:
            if op.function != f:
                assert op.status == BurstStatus.OK, f"{op} is of another function"
            else:
                assert op.status in (BurstStatus.OK, BurstStatus.RESET, *([BurstStatus.TIMEOUT] if silent[0] else [])), op
                ended[f] += op.status == BurstStatus.RESET
        late = [tlp for tlp in bench.tlps[sent:] if tlp.requester_id & 7 == f]
        assert not late, f"sent in spite of the stop: {late[0]}"
        dut.stop.value = 0
        bench.set_config(f, bus_master=1)
        bench.dead = set()
        await ClockCycles(dut.clk, 2)
        assert int(dut.stopped.value) == 0
        assert int(dut.pending.value) == 0
    assert min(ended.values()) > 20, f"too few bursts were cut short: {ended}"
    await bench.settle()
    await bench.judge()


@pytest.mark.parametrize("width", [128, 256])
def test_refusals_keep_their_place(request, width):
    simulate(request, make(width))


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def refusals_keep_their_place(dut):
    """TLP-REQ-5: bursts that the gate refused among others: never sent, write data consumed, answered in the client's order."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin(ready=0.8)
    bench.delay = lambda: rng.choice([0, 60])
    for _ in range(400):
        client = rng.randrange(1, 6)
        verdict = rng.choice([BurstStatus.OK, BurstStatus.FAULT])
        bench.issue(client, client == MSIX or rng.random() < 0.5, verdict=verdict)
        if len(bench.ops) % 40 == 0:
            await bench.settle()
    await bench.settle()
    assert all(op.status == op.verdict for op in bench.ops)
    await bench.judge()
    assert not any(bench.events.values()), bench.events


@pytest.mark.parametrize("width", [256])
def test_nobody_waits_for_another(request, width):
    simulate(request, make(width))


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def nobody_waits_for_another(dut):
    """TLP-REQ-6: a client that takes nothing, with as many reads as it may have; a port that is full of reads; a device out of tags: the
    others and the wall go on."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin()
    # One client does not take its data: others of the gate go on, as long as it has no more than its `reads` outstanding.
    bench.s[f"read_data__{DATA}"].set_ready(0)
    stuck = [bench.issue(DATA, False, n << 12, 4096) for n in range(CLIENTS[DATA].reads)]
    bench.s[f"read_data__{RING2}"].set_ready(0)
    stuck += [bench.issue(RING2, False, n << 12, 64) for n in range(CLIENTS[RING2].reads)]
    others = [bench.issue(client, client == MSIX or rng.random() < 0.5) for client in [WALL, RING, MSIX, DATA2] * 20]
    others += [bench.issue(DATA, True) for _ in range(10)]
    await bench.settle(8000, others)
    assert all(op.status is None for op in stuck)
    # Retirement does not wait for the client: two bursts of 4 KiB fill its ring, four of 64 bytes the other's slots and output.
    assert len(bench.retired["retired_reads"]) == sum(not op.is_write and op.client != WALL for op in others) + 6
    # It asks for more: the port is full, and says so for this client alone; the wall goes on.
    stuck += [bench.issue(DATA, False, n << 12, 4096) for n in range(8)]
    blocked = [bench.issue(RING, False) for _ in range(5)]
    await ClockCycles(dut.clk, 200)
    assert not int(dut.reads_room.value) >> DATA & 1
    assert int(dut.reads_room.value) >> RING & 1
    walls = [bench.issue(WALL, n % 2 == 0) for n in range(60)]
    await bench.settle(4000, walls)
    assert any(op.status is None for op in blocked)
    bench.s[f"read_data__{DATA}"].set_ready(1)
    bench.s[f"read_data__{RING2}"].set_ready(1)
    await bench.settle()
    # Nobody answers the devices: the wall has tags of its own.
    answers = []
    bench.answer = lambda tlp: bench.answer_well(tlp) if tlp.tag < 8 else answers.append(tlp)
    waits = [bench.issue(client, False) for client in [RING, DATA, DATA2, RING2] * 3]
    await ClockCycles(dut.clk, 100)
    walls = [bench.issue(WALL, n % 2 == 0) for n in range(60)]
    await bench.settle(1000, walls)
    bench.answer = bench.answer_well
    for tlp in answers:
        bench.answer_well(tlp)
    await bench.settle()
    assert all(op.status == BurstStatus.OK for op in [*stuck, *blocked, *waits])
    await bench.judge()


@pytest.mark.parametrize("width", [128])
def test_reads_stay_behind_writes(request, width):
    simulate(request, make(width), "icarus")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def reads_stay_behind_writes(dut):
    """TLP-REQ-7: with posted traffic stalled no read that came after a write is sent, one that came before is; writes pass reads that are
    stalled."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin()
    bench.s["posted"].set_ready(0)
    for client in (WALL, RING, DATA):
        before = bench.issue(client, False)
        bench.issue(client, True)
        after = [bench.issue(client, False), bench.issue(DATA if client == RING else client, False)]
        await ClockCycles(dut.clk, 150)
        assert before.status == BurstStatus.OK
        assert all(op.sent_bytes == 0 for op in after)
        bench.s["posted"].set_ready(1)
        await bench.settle(2000)
        bench.s["posted"].set_ready(0)
    bench.s["posted"].set_ready(1)
    bench.s["non_posted"].set_ready(0)
    reads = [bench.issue(client, False) for client in (WALL, RING, DATA)]
    writes = [bench.issue(client, True) for client in (WALL, RING, DATA, MSIX) * 4]
    await bench.settle(4000, writes)
    assert all(op.status is None for op in reads)
    bench.s["non_posted"].set_ready(1)
    await bench.settle(1000)
    await bench.judge()


@pytest.mark.parametrize("width", [128])
def test_ends_of_writes_have_room(request, width):
    simulate(request, make(width), "icarus")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def ends_of_writes_have_room(dut):
    """TLP-REQ-13: of a client that takes no ends of its writes 16 are accepted and sent, one more for each end that it takes, in bursts as
    they come; all end in order."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin()
    for client in (WALL, RING, DATA):
        ends = bench.s[f"write_done__{client}"]
        ends.set_ready(0)
        writes = [bench.issue(client, True, bench.new_range(client, True)[0] & -PAGE, 8) for _ in range(60)]
        taken = 0
        while taken < 40:
            await ClockCycles(dut.clk, 120)
            sent, done = ([op for op in writes if test(op)] for test in (lambda op: op.sent_bytes == 8, lambda op: op.status is not None))
            assert (len(sent), len(done)) == (16 + taken, taken), client
            take = rng.choice([1, 2, 5, 12])
            taken += take
            ends.set_ready(1)
            await ClockCycles(dut.clk, take)
            ends.set_ready(0)
        ends.set_ready(1)
        await bench.settle(2000)
        assert all(op.status == BurstStatus.OK for op in writes)
    await bench.judge()


@pytest.mark.parametrize("width", [64, 256])
def test_garbage_changes_nothing(request, width):
    simulate(request, make(width), "icarus" if width == 64 else "verilator")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def garbage_changes_nothing(dut):
    """TLP-REQ-8: completions that no request asked for, of random content and framing, between the good ones: every read is right."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin(ready=0.9)
    bench.delay = lambda: rng.choice([0, 20, 60])
    shape = TlpBeat(bench.width)

    def garbage():
        """Return beats that must not count: not even their framing is right."""
        beats = []
        for n in range(rng.randrange(1, 5)):
            header = {"fmt": rng.choice([0, 2, 2, 2, 4, 6]), "type": rng.choice([10, 10, 10, 11, 0]), "tag": rng.randrange(70),
                      "status": rng.choice([0, 0, 0, 1, 4]), "byte_count": rng.randrange(1, 200), "lower_address": rng.getrandbits(7),
                      "length_dw": rng.randrange(1, 40), "poisoned": rng.getrandbits(1)}  # fmt: skip
            open_tags = list(bench.outstanding.values())
            if open_tags and rng.random() < 0.5:
                # Everything right but for one thing that must be noticed.
                tlp = rng.choice(open_tags)
                part = bench.good(tlp)[0]
                header |= {"fmt": 2, "type": 10, "tag": tlp.tag, "requester_id": tlp.requester_id, "status": 0,
                           "byte_count": part.byte_count ^ 1 << rng.randrange(12), "lower_address": part.lower_address,
                           "length_dw": part.length_dw}  # fmt: skip
            else:
                header["requester_id"] = rng.getrandbits(16) & 0xFFFF ^ 0x8000
                header["requester_id"] |= 4  # no function of the card
            beats.append(pack(shape, header=header, data=rng.getrandbits(bench.width), dword_count=rng.randrange(bench.width // 32 + 1),
                              first=n == 0 or rng.random() < 0.1, last=rng.random() < 0.3))  # fmt: skip
        return beats

    for _ in range(60):
        for _ in range(5):
            bench.issue(client := rng.randrange(6), client == MSIX or rng.random() < 0.2)
            bench.link.send_beats(garbage(), rng.randrange(100))
        await bench.settle()
    while not bench.link.idle:
        await ClockCycles(dut.clk, 20)
    bench.link.send_beats([pack(shape, last=1)])
    assert all(op.status == BurstStatus.OK for op in bench.ops)
    assert bench.events["unexpected"] > 80
    await bench.judge()


@pytest.mark.parametrize("width", [512])
def test_no_tag_overflows_the_buffer(request, width):
    clients = (CLIENTS[WALL], CLIENTS[RING], ReadClient("data", True, 32768, 16), CLIENTS[MSIX], CLIENTS[RING2],
               ReadClient("data2", True, 32768, 64))  # fmt: skip
    simulate(request, make(width, clients=clients, tags=768, completion_timeout_cycles=1 << 15), "icarus")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def no_tag_overflows_the_buffer(dut):
    """TLP-REQ-10: 768 tags, reads of 4096 bytes at MRRS 4096 and of 64 bytes, answered as late as can be and in any order: never more
    asked for than the buffer of 32 KiB of a client holds; one function has 10-bit tags, the other 8; the bytes are right."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = Bench(dut, rng)
    await bench.begin()
    await ClockCycles(dut.clk, 600)
    bench.set_config(1, mrrs_code=5)
    bench.set_config(2, mrrs_code=5, ten_bit_tag=1)
    held, asked, most, tags = [], {1: 0, 2: 0}, {1: 0, 2: 0}, set()

    def answer(tlp):
        function = tlp.requester_id & 7
        held.append(tlp)
        tags.add((function, tlp.tag))
        asked[function] += tlp.byte_span()[1]
        most[function] = max(most[function], asked[function])

    bench.answer = answer
    for length, count in ((4096, 9), (64, 300)):
        held.clear()
        ops = [bench.issue(client, False, (client << 32) + (n << 12) + (length * n % 4096), length)
               for n in range(count) for client in (DATA, DATA2)]  # fmt: skip
        quiet = 0
        while any(op.status is None for op in ops):
            before = len(held)
            await ClockCycles(dut.clk, 30)
            quiet = 0 if len(held) != before else quiet + 1
            assert quiet < 60 or held, "nothing is asked for, and not all is answered"
            if held and len(held) == before:  # the card has asked for all that it can
                rng.shuffle(held)
                for tlp in held[: rng.choice([1, len(held), len(held)])]:
                    held.remove(tlp)
                    asked[tlp.requester_id & 7] -= tlp.byte_span()[1]
                    for part in bench.good(tlp):
                        bench.link.send(part)
                    bench.release(tlp)
        if length == 4096:
            assert most == {1: 32768, 2: 32768}, f"asked for {most} bytes at once"
    assert max(most.values()) <= 32768
    assert len({tag for function, tag in tags if function == 2}) > 256 and max(tag for function, tag in tags if function == 1) < 256
    assert all(op.status == BurstStatus.OK for op in bench.ops)
    assert bench.link.stalls <= cycle() / 60  # completions of one beat without a gap leave the table no cycle to look for timeouts
    bench.link.stalls = 0
    await bench.judge()


def test_parameters():
    """TLP-REQ-9: parameters that do not fit are refused with a sentence."""
    wall, data = CLIENTS[WALL], CLIENTS[DATA]
    for changes, message in [
        ({"width": 96}, "Width must be 64, 128, 256 or 512 bits, not 96"),
        ({"functions": 0}, "Number of functions must be between 1 and 8, not 0"),
        ({"functions": 9}, "between 1 and 8, not 9"),
        ({"clients": ()}, "Number of clients must be between 1 and 64, not 0"),
        ({"clients": (data,)}, "The first client must be the wall, which reads and is unordered, not ReadClient"),
        ({"max_payload": 100}, "Largest payload must be a power of two between 128 and 4096, not 100"),
        ({"tags": 769}, "Number of tags must be between 2 and 768, not 769"),
        ({"wall_tags": 32}, "Number of wall tags must leave a tag below 32 to the others, not 32 of 64"),
        ({"completion_timeout_cycles": 100}, "Completion timeout must be at least 2048 cycles with 64 tags, not 100"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**{"width": 64, "clients": (wall, data)} | changes)
    for arguments, message in [
        (("x", True, 2048), "Buffer of client 'x' must be 0 or a power of two between 4096 and 65536 bytes, not 2048"),
        (("x", False, 64), "between 128 and 16384 bytes, not 64"),
        (("x", False, 192), "not 192"),
        (("x", False, 128, 1), "Waiting reads of client 'x' must be between 2 and 256, not 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ReadClient(*arguments)
