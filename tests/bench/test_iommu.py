"""Cycles and reads of the translation unit, beside those of the open peer (peers.md) and what is to be reached."""

import random

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.commands import IofenceC, IotinvalVma
from ringwall.models.iommu.entries import SV39X4
from ringwall.models.iommu.registers import QueueCsr
from ringwall.models.iommu.tables import Allocator, DeviceContext, GuestView, PageTable
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.gate import Gate
from ringwall.rtl.iommu.layouts import InvalidateKind
from ringwall.rtl.iommu.translator import Translator
from ringwall.rtl.iommu.unit import Iommu
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle
from ringwall.sim.translator_bench import TranslatorBench

PAGE, DEVICE, AREA = 4096, 3, 0x40_0000  # AREA: the first page of every test
GUEST = 0x6000_0000, 64 << 12  # guest addresses of the tables of the first stage
CIRCUITS = {  # entries of the IOTLB and of its second level, features, tests
    "64": (64, 0, (), ["hits", "hits_behind_a_miss", "independent_misses", "misses_of_one_page", "sequential_pages", "second_pass"]),
    "16": (16, 0, (), ["a_page_too_many"]),
    "two-stage": (64, 0, ("Sv39x4",), ["hits", "sequential_pages"]),
    "4096": (64, 4096, (), ["pages_by_turns", "pages_at_random"]),
}
REACH = 1000  # pages


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_iommu(request, circuit, capsys):
    entries, second_entries, features, tests = CIRCUITS[circuit]
    dut = Translator(entries=entries, second_entries=second_entries, features=Features(**dict.fromkeys(features, True)))
    done = run(dut, module=__name__, node=request.node.nodeid,
               params={"levels": 1, "features": features}, testcase=tests)  # fmt: skip
    with capsys.disabled():
        print("", *(line[6:] for line in done.log.splitlines() if line.startswith("BENCH ")), sep="\n  ")


class IdleCard(wiring.Component):
    """The IOMMU and the gate that drains for it, with nothing to translate; ``step`` pulses when cqh moves."""

    def __init__(self, second_entries):
        self._iommu, self._gate = Iommu(width=256, second_entries=second_entries), Gate(clients=1, functions=1)
        members = self._iommu.signature.members
        super().__init__({name: members[name] for name in ("bus", "config", "bursts", "write_data", "read_data", "write_done")}
                         | {"step": Out(1)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.iommu, m.submodules.gate = iommu, gate = self._iommu, self._gate
        for name in ("bus", "bursts", "write_data", "read_data", "write_done"):
            wiring.connect(m, getattr(iommu, name), wiring.flipped(getattr(self, name)))
        wiring.connect(m, iommu.fence, gate.fence)
        wiring.connect(m, gate.fenced, iommu.fenced)
        m.d.comb += [iommu.config.eq(self.config), self.step.eq(iommu._interface._registers.commands.step)]
        return m


@pytest.mark.parametrize("second_entries", [0, 16])
def test_iommu_commands(request, second_entries, capsys):
    tests = ["an_address_forgotten", "everything_forgotten"]
    done = run(IdleCard(second_entries), module=__name__, node=request.node.nodeid, testcase=tests)
    with capsys.disabled():
        print("", *(line[6:] for line in done.log.splitlines() if line.startswith("BENCH ")), sep="\n  ")


def report(text):
    print("BENCH", f"{'two stages' if params().get('features') else 'one stage'}: {text}", flush=True)


class Bench(TranslatorBench):
    """A device with pages from AREA on, at memory of constant latency; its context is cached."""

    async def begin(self, pages, *, latency, stride=PAGE):
        """``pages`` is their number, or the pages themselves."""
        await super().begin()
        self.pages = [AREA + stride * n for n in range(pages)] if isinstance(pages, int) else pages
        if params()["features"]:
            second = PageTable(self.memory, self.allocator, scheme=SV39X4, features=self.features)
            for at in range(GUEST[0], sum(GUEST), PAGE):
                second.map_page(at, self.allocator.page(), perms="rwxu")
            view = GuestView(self.memory, second)
            table = PageTable(view, Allocator(view, *GUEST, rng=self.rng), features=self.features)
            self.directory.set(DEVICE, DeviceContext.sv39(table.root, PSCID=7).with_second_stage(SV39X4, second.root, GSCID=9))
        else:
            table = self.device(DEVICE, PSCID=7)
        for n, iova in enumerate(self.pages):
            table.map_page(iova, (0x1_0000 + n) * PAGE)
            if params()["features"]:
                second.map_page((0x1_0000 + n) * PAGE, (0x9_0000 + n) * PAGE, perms="rwu")
        await self.check(DEVICE, self.pages[-1])  # brings the context
        self.latency = lambda: latency
        await self.forget(InvalidateKind.VMA)
        return self

    async def move(self, order):
        """Have the pages with these numbers translated, as fast as they are taken; return cycles to the last answer, and reads."""
        self.times.clear()
        self.read_count, begun = 0, cycle()
        await self.request.put_many(self.packed(n % 256, DEVICE, self.pages[page]) for n, page in enumerate(order))
        answers = await self.answered(len(order), 40_000)
        assert not any(answer.fault for answer in answers)
        return self.times[-1] - begun, self.read_count


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def hits(dut):
    """BENCH-IOMMU-1: pages that are cached: one per cycle, answers 2 cycles behind requests."""
    bench = await Bench(dut).begin(16, latency=20)
    await bench.move(range(16))
    _, reads = await bench.move([n % 16 for n in range(400)])
    rate = 399 / (bench.times[-1] - bench.times[0])
    await bench.move([3])
    begun = cycle()
    await bench.move([5])
    latency = bench.times[0] - begun - 1  # accepted at the first edge
    report(f"hits {rate:.3f} per cycle, {latency} cycles; peer 0.334, 2; to reach 1.0, 2")
    assert reads == 0 and rate >= 1.0 and latency <= 2


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def hits_behind_a_miss(dut):
    """BENCH-IOMMU-2: hits while a miss waits for memory of 20 cycles: at least 0.9 per cycle until it is answered."""
    bench = await Bench(dut).begin(17, latency=20)
    await bench.move(range(16))
    bench.times.clear()
    await bench.request.put(bench.packed(255, DEVICE, bench.pages[16]))
    await bench.request.put_many(bench.packed(n, DEVICE, bench.pages[n % 16]) for n in range(60))
    answers = await bench.answered(61)
    at = next(n for n, answer in enumerate(answers) if answer.cookie == 255)
    rate = (at - 1) / (bench.times[at - 1] - bench.times[0])
    report(f"{at} hits behind a pending miss (20 cycles of memory): {rate:.3f} per cycle; peer 0; to reach 0.9")
    assert at >= 15 and rate >= 0.9


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def independent_misses(dut):
    """BENCH-IOMMU-3: 8 misses in tables of their own, memory of 100 cycles: all answered within 450 cycles."""
    bench = await Bench(dut).begin(9, latency=100, stride=1 << 30)
    cycles, reads = await bench.move(range(8))
    report(f"8 independent misses (100 cycles of memory): {cycles} cycles, {reads} reads; peer about 2450; to reach 450")
    assert cycles <= 450


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def misses_of_one_page(dut):
    """BENCH-IOMMU-4: 8 requests for a page that is not cached: one walk of 3 reads."""
    bench = await Bench(dut).begin(2, latency=100, stride=1 << 30)
    cycles, reads = await bench.move([0] * 8)
    report(f"8 misses of one page: {cycles} cycles, {reads} reads; to reach one walk, 3 reads")
    assert reads == 3


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def sequential_pages(dut):
    """BENCH-IOMMU-5: page behind page, what leads to them being known: one read each, two with a second stage."""
    bench = await Bench(dut).begin(32, latency=20)
    await bench.move([0])
    cycles, reads = await bench.move(range(1, 32))
    each, goal, peer = reads / 31, 2 if params()["features"] else 1, 15 if params()["features"] else 3
    report(f"sequential pages: {each:.2f} reads, {cycles / 31:.1f} cycles each (20 cycles of memory); peer {peer} reads; to reach {goal}")
    assert each == goal


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def second_pass(dut):
    """BENCH-IOMMU-6: as many pages as there are entries, once more: at least 95 % are hits."""
    bench = await Bench(dut).begin(64, latency=20)
    await bench.move(range(64))
    _, reads = await bench.move(range(64))
    report(f"second pass over 64 pages, 64 entries: {100 - reads / 0.64:.1f} % hits; to reach 95")
    assert 1 - reads / 64 >= 0.95


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def a_page_too_many(dut):
    """BENCH-IOMMU-7: 17 pages by turns on 16 entries, one request at a time: at least 85 % are hits."""
    bench = await Bench(dut).begin(17, latency=5)
    passes = 40
    await bench.move(range(17))
    misses = 0
    for _ in range(passes):
        for page in range(17):
            misses += (await bench.move([page]))[1]
    rate = 1 - misses / (17 * passes)
    report(f"17 pages by turns, 16 entries: {rate:.1%} hits; peer 0; to reach 85")
    assert rate >= 0.85


async def second_level(bench, what, orders):
    """Have pages translated in two ``orders``, of which the second is to be hits; report and check them and the second level's latency."""
    dut, (first, second) = bench.dut, orders
    await ClockCycles(dut.clk, 1024)  # it is being cleared
    await bench.move(first)
    cycles, reads = await bench.move(second)
    rate = 1 - reads / len(second)
    latencies = set()
    for page in second[:200]:
        bench.times.clear()
        bench.read_count = 0
        await bench.request.put(bench.packed(0, DEVICE, bench.pages[page]))
        begun = cycle()
        await bench.answered(1)
        if bench.read_count == 0:
            latencies.add(bench.times[0] - begun)
    report(f"{REACH} pages {what}, 64 and 4,096 entries: {rate:.1%} hits, {cycles / len(second):.2f} cycles each, one alone at most "
           f"{max(latencies)} cycles; to reach 95 %, 4")  # fmt: skip
    assert rate >= 0.95 and latencies <= {2, 4} and 4 in latencies


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def pages_by_turns(dut):
    """BENCH-IOMMU-10: 1,000 pages by turns, a second level of 4,096 entries: at least 95 % are hits, each within 4 cycles."""
    bench = await Bench(dut).begin(REACH, latency=20)
    await second_level(bench, "by turns", [range(REACH)] * 2)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def pages_at_random(dut):
    """BENCH-IOMMU-11: 1,000 pages anywhere, in random orders, a second level of 4,096 entries: at least 95 % are hits, within 4 cycles."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut).begin([page * PAGE for page in rng.sample(range(1 << 26), REACH)], latency=20)
    await second_level(bench, "at random", [rng.sample(range(REACH), REACH), rng.choices(range(REACH), k=2 * REACH)])


class CommandBench(IommuHost):
    """An idle card with its command queue on, at memory of constant latency."""

    LATENCY, QUEUE = 100, 0x8000_0000

    def __init__(self, dut):
        super().__init__(dut, 256, latency=lambda: self.LATENCY)

    async def _drain(self):
        """The gate is in the circuit."""

    async def measure(self, commands, goal, what):
        """Have ``commands`` done; report and check the cycles in which they are not the memory's."""
        await self.begin()
        await self.write("cqb", self.QUEUE >> 2 | 3)
        await self.write("cqcsr", QueueCsr.EN)
        await self.until_register("cqcsr", lambda value: value & QueueCsr.ON, "cqon")
        for n, command in enumerate(commands):
            self.memory.write(self.QUEUE + 16 * n, command.encode())
        times = {"read": [], "data": [], "done": []}
        cocotb.start_soon(self._watch(times))
        bell = cycle()
        await self.write("cqt", len(commands))
        await self.until(lambda: len(times["done"]) == len(commands), "the commands")
        asked, brought, done = times["read"][0] - bell, times["data"][0] - times["read"][0], times["done"][-1] - times["data"][0]
        print(f"BENCH {what}: {done} cycles from its word to cqh moved, {asked + done} from the write of cqt but for {brought} of memory; "
              f"to reach {goal}", flush=True)  # fmt: skip
        assert done <= goal

    async def _watch(self, times):
        dut = self.dut
        while True:
            await RisingEdge(dut.clk)
            for name, signals in (("read", (dut.bursts__valid, dut.bursts__ready)), ("data", (dut.read_data__valid, dut.read_data__ready)),
                                  ("done", (dut.step,))):  # fmt: skip
                if all(signal.value for signal in signals):
                    times[name].append(cycle())


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def an_address_forgotten(dut):
    """BENCH-IOMMU-8: IOTINVAL.VMA of an address, IOFENCE.C, idle card: 10 cycles beside the memory's."""
    await CommandBench(dut).measure([IotinvalVma(0x1234_5000, 7), IofenceC(pr=True, pw=True)], 10, "IOTINVAL by address, IOFENCE.C")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def everything_forgotten(dut):
    """BENCH-IOMMU-9: IOTINVAL.VMA of everything, IOFENCE.C, idle card: 20 cycles beside the memory's."""
    await CommandBench(dut).measure([IotinvalVma(), IofenceC(pr=True, pw=True)], 20, "IOTINVAL of everything, IOFENCE.C")
