"""RingEngine with virtio-blk back ends behind it: real rings in a guest memory, judged by the golden model."""

import os
import random
import struct

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge, Timer

from ringwall.models.memory import GuestMemory
from ringwall.rtl.tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, Hint
from ringwall.rtl.virtio.blk import Blk
from ringwall.rtl.virtio.blk_device import BlkDevice
from ringwall.rtl.virtio.device import DeviceFunction
from ringwall.rtl.virtio.engine import PortDescription, RingEngine
from ringwall.rtl.virtio.layouts import Notification, QueueCommand, QueueOperation
from ringwall.sim.burst_bus import BurstMemory
from ringwall.sim.run import params, run
from ringwall.sim.stream import CLOCK_NS, Stream, cycle, pack, start, unpack

SECTORS = 256


class TwoDisks(wiring.Component):
    """Two virtio-blk functions on one ring engine, their bursts as ports."""

    def __init__(self, *, width):
        self.width = width
        per_function = {
            "bursts": Out(stream.Signature(Burst)).array(2),
            "read_data": In(stream.Signature(BurstData(width))).array(2),
            "write_data": Out(stream.Signature(BurstData(width))).array(2),
            "write_done": In(stream.Signature(BurstDone)).array(2),
        }
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "kicks": In(stream.Signature(6)),
            "notifications": Out(stream.Signature(Notification)),
            "hints": Out(stream.Signature(Hint)),
            "needs_reset": Out(2),
            "stop": In(2),
            "stopped": Out(2),
            **{f"ring_{name}": member for name, member in per_function.items()},
            **{f"data_{name}": member for name, member in per_function.items()},
        })

    def elaborate(self, platform):
        m = Module()
        ports = (PortDescription(0, (64,)), PortDescription(1, (16,)))
        m.submodules.engine = engine = RingEngine(width=self.width, functions=(1, 2), clients=(1, 4), ports=ports)
        for name in ("commands", "kicks", "notifications", "hints"):
            wiring.connect(m, getattr(engine, name), wiring.flipped(getattr(self, name)))
        for n in range(2):
            blk = Blk(width=self.width, device=BlkDevice(SECTORS))
            disk = DeviceFunction(width=self.width, function=n + 1, clients=[3 * n + 2], back_end=blk)
            m.submodules[f"disk_{n}"] = disk
            for name in ("bursts", "read_data", "write_data", "write_done"):
                wiring.connect(m, getattr(engine, name)[n], wiring.flipped(getattr(self, f"ring_{name}")[n]))
                wiring.connect(m, getattr(disk, name)[0], wiring.flipped(getattr(self, f"data_{name}")[n]))
            for name in ("chains", "readable", "writable", "finished"):
                wiring.connect(m, getattr(engine, name)[n], getattr(disk, name)[0])
            m.d.comb += [
                self.needs_reset[n].eq(engine.needs_reset[n]),
                engine.stop[n].eq(self.stop[n]),
                disk.stop.eq(self.stop[n]),
                self.stopped[n].eq(engine.stopped[n] & disk.stopped),
            ]
        return m


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_engine(request, width):
    run(TwoDisks(width=width), module=__name__, node=request.node.nodeid, params={"width": width},
        sim=os.environ.get("SIM") or "verilator")  # as fast as Icarus to build and run, much faster once built


def test_parameters_are_checked():
    """VIRTIO-RING-9: bad widths, functions, queue counts and sizes are refused with a sentence."""
    good = {"width": 64, "functions": (1,), "clients": (1,), "ports": (PortDescription(0),)}
    for bad in ({"width": 63}, {"functions": ()}, {"clients": (1, 2)}, {"ports": ()}, {"ports": (PortDescription(1),)},
                {"ports": (PortDescription(0, (100,)),)}):
        with pytest.raises(ValueError, match=r"must be .*, not"):
            RingEngine(**good | bad)


class Ring:
    """The driver's side of one split ring, as plain as can be."""

    def __init__(self, memory, base, size):
        self.memory, self.base, self.size = memory, base, size
        self.desc, self.avail, self.used = base, base + 16 * size, base + 0x4000
        self.available = self.seen = 0

    def describe(self, index, address, length, *, write=False, following=None, flags=0):
        flags |= 2 * write | (following is not None)
        self.memory.write(self.desc + 16 * index, struct.pack("<QIHH", address, length, flags, following or 0))

    def offer(self, head):
        self.memory.write(self.avail + 4 + 2 * (self.available % self.size), struct.pack("<H", head))
        self.available = self.available + 1 & 0xFFFF

    def publish(self):
        self.memory.write(self.avail + 2, struct.pack("<H", self.available))

    def used_index(self):
        return struct.unpack("<H", self.memory.read(self.used + 2, 2))[0]

    def finished(self):
        """Return the (id, len) elements that are new since the last call."""
        found = []
        while self.seen != self.used_index():
            found.append(struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8)))
            self.seen = self.seen + 1 & 0xFFFF
        return found


class Bench:
    def __init__(self, dut):
        self.dut = dut

    async def begin(self):
        dut = self.dut
        self.rng = rng = random.Random(cocotb.RANDOM_SEED)
        self.width = params()["width"]
        self.memory = GuestMemory()
        self.status = [lambda burst: BurstStatus.OK] * 2
        self.latency = [lambda: rng.randrange(5, 60)] * 2
        self.commands, self.kicks, notes = await start(dut, "commands", "kicks", "notifications")
        self.servers = []
        for n in range(2):
            for side in ("ring", "data"):
                ports = {k: Stream(dut, f"{side}_{k}__{n}") for k in ("bursts", "read_data", "write_data", "write_done")}
                self.servers.append(BurstMemory(
                    self.memory, width=self.width, ordered=side == "data", latency=lambda n=n: self.latency[n](),
                    status=lambda burst, n=n: self.status[n](burst), **ports).start())
        self.notes = []
        notes.set_ready(1)
        cocotb.start_soon(notes.watch(self.notes))
        self.rings = [Ring(self.memory, 0x10000, 64), Ring(self.memory, 0x20000, 16)]
        for n in range(2):
            await self.enable(n)

    async def enable(self, n):
        ring = self.rings[n] = Ring(self.memory, self.rings[n].base, self.rings[n].size)
        self.memory.write(ring.base, bytes(0x8000))
        await self.commands.put(pack(
            QueueCommand, operation=QueueOperation.ENABLE, queue=n, size=ring.size,
            descriptor_iova=ring.desc, driver_iova=ring.avail, device_iova=ring.used))

    async def until(self, condition, cycles=6000):
        begun = cycle()
        while not condition():
            await Timer(7 * CLOCK_NS, "ns")
            await RisingEdge(self.dut.clk)
            assert cycle() - begun < cycles, "it takes too long"

    def request(self, n, head, kind, sector, data_address, length, cuts=1, at=0x40000):
        """Write a request's chain from descriptor ``head`` on: header, data in ``cuts`` pieces, status. Return the status' address."""
        ring, header = self.rings[n], at + 0x100 * head + 0x10000 * n
        self.memory.write(header, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(header + 0x40, b"\xee")
        ring.describe(head, header, 16, following=head + 1)
        step = length // cuts
        for k in range(cuts):
            size = step if k < cuts - 1 else length - step * (cuts - 1)
            ring.describe(head + 1 + k, data_address + step * k, size, write=kind == 0, following=head + 2 + k)
        ring.describe(head + 1 + cuts, header + 0x40, 1, write=True)
        ring.offer(head)
        return header + 0x40

    async def good(self, n):
        """One write and one read back on function ``n`` must work."""
        ring, content = self.rings[n], self.rng.randbytes(1024)
        self.memory.write(0x80000, content)
        status = self.request(n, 0, 1, 8, 0x80000, 1024)
        ring.publish()
        await self.kicks.put(n)
        await self.until(lambda: ring.used_index() == ring.available)
        assert ring.finished()[-1] == (0, 1) and self.memory.read(status, 1) == b"\0"
        status = self.request(n, 4, 0, 8, 0x90003, 1024, cuts=3)
        ring.publish()
        await self.kicks.put(n)
        await self.until(lambda: ring.used_index() == ring.available)
        assert ring.finished() == [(4, 1025)] and self.memory.read(status, 1) == b"\0"
        assert self.memory.read(0x90003, 1024) == content


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def disk_works(dut):
    """VIRTIO-RING-1: OUT then IN on both functions; data, status, used elements and notifications (V034, V040, V042)."""
    bench = Bench(dut)
    await bench.begin()
    for n in range(2):
        await bench.good(n)
    await bench.until(lambda: len(bench.notes) >= 2)
    await ClockCycles(dut.clk, 200)
    assert {unpack(Notification, note).queue for note in bench.notes} == {0, 1}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def buffers_are_hinted(dut):
    """VIRTIO-RING-10: the first two pages of each buffer are hinted, by function and direction, before the first byte of its data moves."""
    bench = Bench(dut)
    await bench.begin()
    hints, times, bursts, moved = [], [], [], []
    port, ring = Stream(dut, "hints"), bench.rings[1]
    port.set_ready(1)
    cocotb.start_soon(port.watch(hints, times))
    cocotb.start_soon(Stream(dut, "data_bursts__1").watch(bursts, moved))
    for head, (address, length) in enumerate(((0x8_0000, 4096), (0x9_0FFF, 512), (0xA_0001, 4096), (0xB_0E00, 8192))):
        is_read, page = head % 2 == 0, address >> 12
        status = bench.request(1, 0, 1 - is_read, 8, address, length, at=0x4_0000 + 0x1000 * head)
        ring.publish()
        await bench.kicks.put(1)
        await bench.until(lambda: ring.used_index() == ring.available)
        assert bench.memory.read(status, 1) == b"\0"
        pages = [page, page + 1] if address + length > page + 1 << 12 else [page]
        found = [unpack(Hint, hint) for hint in hints]
        other = status >> 12
        assert [(hint.page, hint.is_write) for hint in found] == [(other, 0), *((each, is_read) for each in pages), (other, 1)]
        assert {hint.function for hint in found} == {2}
        first = next(at for burst, at in zip(bursts, moved, strict=True) if unpack(Burst, burst).address >> 12 == page)
        assert times[len(pages)] < first
        for each in (hints, times, bursts, moved):
            each.clear()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def many_requests_in_flight(dut):
    """VIRTIO-RING-2: batches of requests on both rings at once, more than 65536/ring wraps of slots; everything arrives once."""
    bench = Bench(dut)
    await bench.begin()
    stored = [bytearray(SECTORS * 512) for _ in range(2)]
    for _ in range(12):
        checks = []
        for n, ring in enumerate(bench.rings):
            head, expected = 0, []
            while head + 8 <= ring.size:
                cuts = bench.rng.randrange(1, 6)
                length = 512 * bench.rng.randrange(1, 5)
                sector = bench.rng.randrange(10, SECTORS - 5)  # 8 and 9 keep what other tests wrote
                place = 0x100000 + 0x40000 * n + 0x1000 * head + bench.rng.randrange(64)
                kind = bench.rng.choice([0, 1])
                if kind:
                    content = bench.rng.randbytes(length)
                    bench.memory.write(place, content)
                    stored[n][512 * sector : 512 * sector + length] = content
                status = bench.request(n, head, kind, sector, place, length, cuts)
                want = bytes(stored[n][512 * sector : 512 * sector + length])
                expected.append((head, 1 + (0 if kind else length)))
                checks.append((place, want, status))
                head += cuts + 2
            ring.publish()
            ring.expected = expected
        for n in range(2):
            await bench.kicks.put(n)
        for ring in bench.rings:
            await bench.until(lambda ring=ring: ring.used_index() == ring.available)
            assert ring.finished() == ring.expected
        for place, want, status in checks:
            assert bench.memory.read(status, 1) == b"\0"
            assert bench.memory.read(place, len(want)) == want


def loop(ring):
    ring.describe(0, 0x5000, 16, following=1)
    ring.describe(1, 0x5000, 16, following=0)
    ring.offer(0)


def head_out_of_range(ring):
    ring.offer(ring.size)


def index_jump(ring):
    ring.available += ring.size + 1


def next_out_of_range(ring):
    ring.describe(0, 0x5000, 16, following=ring.size)
    ring.offer(0)


def indirect(ring):
    ring.describe(0, 0x5000, 16, flags=4)
    ring.offer(0)


def readable_after_writable(ring):
    ring.describe(0, 0x5000, 16, following=1)
    ring.describe(1, 0x5000, 16, write=True, following=2)
    ring.describe(2, 0x5000, 16)
    ring.offer(0)


def sum_too_large(ring):
    ring.describe(0, 0x5000, 0x80000000, following=1)
    ring.describe(1, 0x5000, 0x80000000)
    ring.offer(0)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def malformed_rings_need_reset(dut):
    """VIRTIO-RING-3: each malformed ring (V031, V032, V047, V048) gives needs_reset in bounded reads; the other runs on; stop mends."""
    bench = Bench(dut)
    await bench.begin()
    for n in range(2):
        for spoil in (loop, head_out_of_range, index_jump, next_out_of_range, indirect, readable_after_writable, sum_too_large):
            ring = bench.rings[n]
            spoil(ring)
            ring.publish()
            before = len(bench.servers[2 * n].log)
            raised = []

            async def watch(raised=raised, n=n):
                while True:
                    await RisingEdge(dut.clk)
                    if int(dut.needs_reset.value) >> n & 1:
                        raised.append(cycle())

            watching = cocotb.start_soon(watch())
            await bench.kicks.put(n)
            dut._log.info("function %d: %s", n, spoil.__name__)
            await bench.until(lambda raised=raised: raised)
            assert len(bench.servers[2 * n].log) - before <= 2 + ring.size, "reads are bounded"
            await bench.good(1 - n)
            await bench.kicks.put(n)
            await ClockCycles(dut.clk, 100)
            assert len(raised) == 1, f"{spoil.__name__}: needs_reset once, not {len(raised)} times"
            watching.cancel()
            dut.stop.value = 1 << n
            await bench.until(lambda n=n: int(dut.stopped.value) >> n & 1)
            dut.stop.value = 0
            await bench.enable(n)
            await bench.good(n)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def failed_ring_accesses_need_reset(dut):
    """VIRTIO-RING-4: each error status on index, head, descriptor and used accesses gives needs_reset; the function works after stop."""
    bench = Bench(dut)
    await bench.begin()
    ring = bench.rings[0]
    places = {
        "index": range(ring.avail + 2, ring.avail + 3), "heads": range(ring.avail + 4, ring.used),
        "flags": range(ring.avail, ring.avail + 1),
        "descriptor": range(ring.desc, ring.avail), "used": range(ring.used, ring.used + 0x1000),
    }
    for status in (s for s in BurstStatus if s != BurstStatus.OK):
        for name, place in places.items():
            bench.status[0] = lambda burst, place=place, status=status: status if burst.address in place else BurstStatus.OK
            raised = []

            async def watch(raised=raised, name=name):
                while not int(dut.needs_reset.value) & 1:
                    await RisingEdge(dut.clk)
                raised.append(name)

            cocotb.start_soon(watch())
            bench.request(0, 0, 1, 8, 0x80000, 512)
            bench.rings[0].publish()
            await bench.kicks.put(0)
            dut._log.info("%s on %s", status, name)
            await bench.until(lambda raised=raised: raised)
            bench.status[0] = lambda burst: BurstStatus.OK
            dut.stop.value = 1
            await bench.until(lambda: int(dut.stopped.value) & 1)
            dut.stop.value = 0
            await bench.enable(0)
            await bench.good(0)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def silent_function_holds_up_nobody(dut):
    """VIRTIO-RING-5: while a ring read of one function stays unanswered, the other's requests take no longer than before."""
    bench = Bench(dut)
    bench_latency = 30
    await bench.begin()
    bench.latency = [lambda: bench_latency] * 2
    begun = cycle()
    await bench.good(1)
    undisturbed = cycle() - begun
    bench.latency[0] = lambda: 20000
    bench.request(0, 0, 1, 8, 0x80000, 512)
    bench.rings[0].publish()
    await bench.kicks.put(0)
    await ClockCycles(dut.clk, 50)
    begun = cycle()
    await bench.good(1)
    dut._log.info("%d cycles alone, %d beside a silent function", undisturbed, cycle() - begun)
    assert cycle() - begun <= undisturbed + 40
    assert bench.rings[0].used_index() == 0


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def no_interrupt_when_not_wanted(dut):
    """VIRTIO-RING-6: avail.flags NO_INTERRUPT suppresses the notification (V035); clearing it brings them back (V034)."""
    bench = Bench(dut)
    await bench.begin()
    ring = bench.rings[0]
    for flags, wanted in ((1, 0), (0, 1), (1, 0)):
        bench.memory.write(ring.avail, struct.pack("<H", flags))
        bench.notes.clear()
        bench.request(0, 0, 1, 8, 0x80000, 512)
        ring.publish()
        await bench.kicks.put(0)
        await bench.until(lambda: ring.used_index() == ring.available)
        await ClockCycles(dut.clk, 300)
        assert len(bench.notes) == wanted


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def stop_under_load(dut):
    """VIRTIO-RING-7: stop at any moment ends in stopped with nothing in flight (V011); afterwards the function works."""
    bench = Bench(dut)
    await bench.begin()
    for _ in range(25):
        for head in range(0, 60, 4):
            bench.request(0, head, head // 4 & 1, 8, 0x80000 + 0x1000 * head, 1024)
        bench.rings[0].publish()
        await bench.kicks.put(0)
        await ClockCycles(dut.clk, bench.rng.randrange(1, 900))
        dut.stop.value = 1
        await bench.until(lambda: int(dut.stopped.value) & 1)
        assert not any(server.reads or server.writes for server in bench.servers[:2])
        counts = [len(server.log) for server in bench.servers[:2]]
        await ClockCycles(dut.clk, 100)
        assert counts == [len(server.log) for server in bench.servers[:2]]
        dut.stop.value = 0
        await bench.enable(0)
        await bench.good(0)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def order_on_the_bursts(dut):
    """VIRTIO-RING-8: data before element before index (V039, V040), no RO or NS (R16), no write into descriptors (V028)."""
    bench = Bench(dut)
    await bench.begin()
    await bench.good(0)
    ring_log, data_log = bench.servers[0].log, bench.servers[1].log
    assert not any(burst.relaxed_ordering or burst.no_snoop for _, burst, _ in ring_log)
    writes = [(when, burst) for when, burst, _ in ring_log if burst.is_write]
    ring = bench.rings[0]
    assert all(burst.address >= ring.used for _, burst in writes)
    indices = [when for when, burst in writes if burst.address == ring.used + 2]
    elements = [when for when, burst in writes if burst.address != ring.used + 2]
    assert len(indices) == 2
    assert max(when for when, burst, _ in data_log if burst.is_write) < indices[-1]
    assert elements[0] < indices[0] < elements[-1] < indices[-1]
