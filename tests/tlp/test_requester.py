"""The requester between clients that do everything they may and a link that does everything it must not."""

import dataclasses
import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, Tlp, TlpType, decode, encode, stray_bits
from ringwall.rtl.tlp.layouts import Burst, BurstData, BurstDone, BurstRetired, BurstStatus, ConfigState
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.rtl.tlp.tags import TagEvents
from ringwall.sim.burst_bus import data_beats
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, random_ready, start, unpack
from ringwall.sim.tlp_beats import RequesterLink, completions_of

PAGE = 4096
WALL, RING, DATA, MSIX, RING2, DATA2 = range(6)
CLIENTS = (ReadClient("wall", False, 512), ReadClient("ring", False, 1024, 16), ReadClient("data", True, 8192, 8),
           ReadClient("msix", False, 0), ReadClient("ring2", False, 128, 4), ReadClient("data2", True, 4096, 4))  # fmt: skip
FUNCTION_OF = {WALL: 0, RING: 1, DATA: 1, MSIX: 1, RING2: 2, DATA2: 2}
TIMEOUT = 2048


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
    accepted: int = -1  # place in the order of its port

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
        self.accepted = {"wall": [], "gate": []}
        self.tlps = []  # every TLP sent
        self.events = dict.fromkeys(("unexpected", "timeout", "unsupported", "aborted", "poisoned"), 0)
        self.problems = []
        self.answer = self.answer_well
        self.delay = lambda: 0
        self.most_tags = 0
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
        for name in ("posted", "non_posted"):
            self.drive_ready(name, ready)
        for name in ("retired_reads", "retired_writes"):
            cocotb.start_soon(self.s[name].watch(self.retired[name]))
            self.s[name].set_ready(1)
        self.pending = {"wall": [], "gate": []}
        self.data = {n: [] for n in range(6)}
        for n in range(6):
            cocotb.start_soon(self.s[f"read_data__{n}"].watch(_Call(lambda beat, n=n: self.on_data(n, beat))))
            cocotb.start_soon(self.s[f"write_done__{n}"].watch(_Call(lambda done, n=n: self.on_done(n, done))))
            cocotb.start_soon(self.feed(self.s[f"write_data__{n}"], self.data[n], gaps))
            for kind in ("read_data", "write_done"):
                self.drive_ready(f"{kind}__{n}", ready)
        for name in ("wall", "gate"):
            cocotb.start_soon(self.feed(self.s[name], self.pending[name], gaps))
            cocotb.start_soon(self.s[name].watch(_Call(lambda burst, name=name: self.on_accepted(name))))
        cocotb.start_soon(self.watch_events())
        await ClockCycles(self.dut.clk, 300)  # tags and tickets are being cleared
        return self

    def drive_ready(self, name, p):
        """Drive a stream's ``ready`` with probability ``p``."""
        if p == 1.0:
            self.s[name].set_ready(1)
        else:
            cocotb.start_soon(random_ready(self.s[name], random.Random(self.rng.getrandbits(32)), p))

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
                await s._edge
                continue
            if gaps is not None:
                for _ in range(gaps()):
                    await s._edge
            await s.put(queue[0])
            queue.pop(0)

    async def watch_events(self):
        edge, handle = RisingEdge(self.dut.clk), self.dut.events
        while True:
            await edge
            events = unpack(TagEvents, int(handle.value))
            for name in self.events:
                self.events[name] += getattr(events, name)
            self.most_tags = max(self.most_tags, int(self.dut.tags_in_flight.value))

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
        self.pending[port].append(pack(
            Burst, address=address, length_bytes=length, is_write=is_write, is_wall=client == WALL, function=op.function,
            client=client, cookie=op.cookie, verdict=op.verdict, epoch=op.epoch, relaxed_ordering=op.ro, no_snoop=op.ns))  # fmt: skip
        return op

    def on_accepted(self, port):
        """The next burst of a port was taken."""
        op = next(op for op in self.accepted[port] if op.accepted < 0)
        op.accepted = self.accepted[port].index(op)

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
        limit = 128 << (0 if config[code] > 5 else min(config[code], 5))
        if length > limit or (tlp.length_dw * 4 > limit):
            self.problems.append(f"{tlp}: more than {limit} bytes")
        if start // limit != (start + length - 1) // limit or (start != op.address and start % limit):
            self.problems.append(f"{tlp}: not cut at multiples of {limit}")
        if tlp.requester_id != config["bus"] << 8 | config["device"] << 3 | op.function:
            self.problems.append(f"{tlp}: wrong requester")
        if tlp.relaxed_ordering != bool(op.ro and config["relaxed_ordering"]) or tlp.no_snoop != bool(op.ns and config["no_snoop"]):
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
            tags = range(8) if op.client == WALL else range(8, 256 if self.config[op.function]["extended_tag"] else 32)
            if tlp.tag not in tags:
                self.problems.append(f"{tlp}: tag not in {tags}")
            for before in self.accepted["wall" if op.client == WALL else "gate"][: op.accepted]:
                if before.is_write and before.status is None and before.verdict == BurstStatus.OK and before.sent_bytes < before.length:
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
            elif op.status == BurstStatus.OK:
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
    return Requester(**{"width": width, "clients": CLIENTS, "functions": 3, "tags": 64, "completion_timeout_cycles": TIMEOUT,
                        "max_payload": 4096} | changes)  # fmt: skip


def simulate(request, component, **more):
    names = [request.node.originalname.removeprefix("test_")]
    run(component, module=__name__, node=request.node.nodeid, testcase=names, params={"width": component.width, **more})


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_everything_arrives(request, width):
    simulate(request, make(width))


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def everything_arrives(dut):
    """TLP-REQ-1: bursts of every alignment and length on every client at every MPS and MRRS, cut and reordered completions,
    back-pressure everywhere: bytes, framing, order, tags, retirement (R05, R14, R18)."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin(ready=rng.choice([0.5, 0.9]), gaps=lambda: rng.choice([0, 0, 0, 2, 9]))
    bench.delay = lambda: rng.choice([0, 3, 40, 150])
    for _ in range(6):
        for n in range(3):
            bench.set_config(n, mps_code=rng.randrange(6), mrrs_code=rng.randrange(6), extended_tag=rng.getrandbits(1),
                             relaxed_ordering=rng.getrandbits(1), no_snoop=rng.getrandbits(1))  # fmt: skip
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


@pytest.mark.parametrize("width", [64, 512])
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
        await ClockCycles(dut.clk, 150)
        assert not bench.problems, f"{fault}: {bench.problems[:3]}"
    assert int(dut.exhausted.value) == 0
    for _ in range(80):
        bench.issue(rng.choice([WALL, RING, DATA, RING2, DATA2]), False)
    await bench.settle()
    assert all(op.status == BurstStatus.OK for op in bench.ops[-80:])
    await bench.judge()
