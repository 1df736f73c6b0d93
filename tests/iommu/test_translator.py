"""Translator: every answer is the golden walk's, cycle counts and reads are counted."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.faults import AccessType, TranslationFault
from ringwall.models.iommu.tables import DC_DEFECTS, DDTE_DEFECTS, PTE_DEFECTS, SIZES, Allocator, DeviceContext, DeviceDirectory, PageTable
from ringwall.models.iommu.walk import Iommu, PlainRegisters, Request
from ringwall.models.memory import AccessFault, GuestMemory
from ringwall.rtl.iommu.layouts import (
    FaultReport,
    Invalidate,
    InvalidateKind,
    MemoryRead,
    MemoryReadData,
    TranslateRequest,
    TranslateResponse,
)
from ringwall.rtl.iommu.translator import Translator
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, start, unpack

POOL = 0x8000_0000
READ, WRITE = AccessType.READ, AccessType.WRITE


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_translator(request, levels):
    run(Translator(), module=__name__, node=request.node.nodeid, params={"levels": levels})


def test_parameters_are_checked():
    """IOMMU-TR-9: sizes that make no sense are refused with a sentence."""
    from ringwall.rtl.iommu.contexts import ContextCache
    from ringwall.rtl.iommu.iotlb import Iotlb
    from ringwall.rtl.iommu.walker import Walker

    for make, bad in ((Iotlb, {"entries": 63}), (Iotlb, {"entries": 4, "ways": 4}), (ContextCache, {"entries": 3}), (Walker, {"walks": 0}),
                      (Walker, {"waiters": 3}), (Walker, {"tables": 0})):
        with pytest.raises(ValueError, match=r"must be .*, not"):
            make(**bad)


class Bench:
    def __init__(self, dut):
        self.dut, self.latency = dut, lambda: 10

    async def begin(self):
        dut = self.dut
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.memory = GuestMemory(all_ram=False)
        self.memory.add_range(POOL, 0x400_0000)
        self.allocator = Allocator(self.memory, POOL, 0x400_0000, rng=self.rng)
        self.directory = DeviceDirectory(self.memory, self.allocator, levels=params()["levels"])
        self.golden = Iommu(self.memory, registers=PlainRegisters(ddtp=self.directory.ddtp))
        self.request, self.response, reads, self.data, faults, self.invalidations = await start(
            dut, "request", "response", "memory_read", "memory_read_data", "faults", "invalidate")
        dut.ddtp_mode.value = self.directory.ddtp & 0xF
        dut.ddtp_ppn.value = self.directory.ddtp >> 10
        self.response.set_ready(1)
        faults.set_ready(1)
        reads.set_ready(1)
        self.answers, self.times, self.reports, self.reads, self.due = [], [], [], [], []
        cocotb.start_soon(self.response.watch(self.answers, self.times))
        cocotb.start_soon(faults.watch(self.reports))
        cocotb.start_soon(reads.watch(self.reads))
        cocotb.start_soon(self.serve())
        self.read_count, self.asked = 0, {}

    async def serve(self):
        """Answer memory reads out of order, each after a latency of its own."""
        while True:
            while self.reads:
                read = unpack(MemoryRead, self.reads.pop(0))
                self.read_count += 1
                self.due.append((cycle() + self.latency(), read))
            ready = [item for item in self.due if item[0] <= cycle()]
            if not ready:
                await self.data._edge
                continue
            self.due.remove(ready[0])
            read = ready[0][1]
            try:
                raw, status = self.memory.read(read.address, read.length_bytes), BurstStatus.OK
            except AccessFault as fault:
                raw, status = bytes(8), BurstStatus.POISONED if fault.reason == "poisoned" else BurstStatus.UR
            words = [raw[n : n + 8] for n in range(0, len(raw), 8)]
            await self.data.put_many(
                pack(MemoryReadData, cookie=read.cookie, data=int.from_bytes(word, "little"), last=n == len(words) - 1,
                     status=status if n == len(words) - 1 else BurstStatus.OK)
                for n, word in enumerate(words))

    async def ask(self, cookie, device, iova, access=READ):
        self.asked[cookie] = (device, iova, access)
        await self.request.put(self.packed(cookie, device, iova, access))

    @staticmethod
    def packed(cookie, device, iova, access=READ):
        return pack(TranslateRequest, device_id=device, is_write=access is WRITE, page=iova >> 12, offset=iova & 0xFFF, cookie=cookie)

    async def forget(self, kind=InvalidateKind.ALL, **operands):
        await self.invalidations.put(pack(Invalidate, kind=kind, **operands))

    async def answered(self, count, cycles=4000):
        begun = cycle()
        while len(self.answers) < count:
            await RisingEdge(self.dut.clk)
            assert cycle() - begun < cycles, f"{len(self.answers)} of {count} answers"
        found = [unpack(TranslateResponse, payload) for payload in self.answers]
        self.answers.clear()
        return found

    def expected(self, device, iova, access):
        """Return (fault cause or 0, SPA page or None, whether a fault is recorded)."""
        try:
            return 0, self.golden.translate(Request(device, iova, access)).spa >> 12, False
        except TranslationFault as fault:
            return int(fault.cause), None, fault.is_logged

    async def check(self, device, iova, access=READ):
        self.reports.clear()
        cause, page, logged = self.expected(device, iova, access)
        await self.ask(1, device, iova, access)
        (answer,) = await self.answered(1)
        await ClockCycles(self.dut.clk, 4)
        assert (answer.fault, answer.cause) == (cause != 0, cause), f"{device:#x} {iova:#x} {access}"
        if not cause:
            assert answer.page == page
        assert len(self.reports) == logged
        if logged:
            report = unpack(FaultReport, self.reports[0])
            assert (report.cause, report.device_id, report.iotval, report.iotval2) == (cause, device, iova, 0)
            assert report.ttyp == (3 if access is WRITE else 2)
        return cause

    def device(self, number, PSCID, **options):
        table = PageTable(self.memory, self.allocator)
        self.directory.set(number, DeviceContext.sv39(table.root, PSCID=PSCID, **options))
        return table


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def answers_are_the_golden_walk(dut):
    """IOMMU-TR-1: random tables of all page sizes, permissions and flags, requests of several devices, reordered memory (R02, R27, R41)."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    bench.latency = lambda: rng.randrange(1, 80)
    devices, places = [3, 9, 77], {}
    for n, number in enumerate(devices):
        table, places[number] = bench.device(number, PSCID=n + 1), []
        for _ in range(40):
            size = rng.choice(SIZES)
            iova = rng.randrange(1 << 38) & -size | rng.choice([0, 0, -1 << 38])
            iova &= (1 << 64) - 1
            try:
                table.map_page(iova, rng.randrange(1 << 56) & -size, perms=rng.choice(["rwu", "ru", "rwxu", "xu", "rw", "r"]), size=size,
                               a=rng.random() < 0.9, d=rng.random() < 0.8)
            except ValueError:
                continue  # it overlaps
            places[number].append((iova, size))
    wanted = {}
    for round_number in range(8):
        for cookie in range(24):
            number = rng.choice([*devices, 5])
            iova, size = rng.choice(places[rng.choice(devices)])
            iova = rng.choice([iova + rng.randrange(size), iova ^ 1 << rng.randrange(64), iova]) & (1 << 64) - 1
            access = rng.choice([READ, WRITE])
            wanted[cookie] = (number, iova, access, bench.expected(number, iova, access))
            await bench.ask(cookie, number, iova, access)
        for answer in await bench.answered(24, 8000):
            number, iova, access, (cause, page, _) = wanted.pop(answer.cookie)
            assert (answer.fault, answer.cause) == (cause != 0, cause), f"round {round_number}: {number} {iova:#x} {access}"
            if not cause:
                assert answer.page == page, f"{number} {iova:#x}"
        assert not wanted


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def malformed_entries_fault_exactly(dut):
    """IOMMU-TR-2: each malformed entry by name gives the golden cause, is not cached, and mends [RVIOMMU1.0 3.1.4, RVPRIV 10.3.2]."""
    bench = Bench(dut)
    await bench.begin()
    table = bench.device(3, PSCID=7)
    places = {size: 0x40_0000_0000 * 2 // 3 & -(1 << 30) | size for size in SIZES}
    for iova in places.values():
        table.map_page(iova, 0x1234_4000_0000, size=iova & -iova)
    seen, applied = set(), set()
    for name in PTE_DEFECTS:
        for iova in places.values():
            for access in (READ, WRITE):
                try:
                    undo = table.corrupt(iova, name)
                except ValueError:
                    continue  # a defect of another kind of page
                applied.add(name)
                await bench.forget()
                seen.add(await bench.check(3, iova + 0x123, access))
                undo()
                await bench.forget()
                assert await bench.check(3, iova + 0x123, access) == 0, name
    assert applied == set(PTE_DEFECTS)
    for name in DC_DEFECTS:
        undo = bench.directory.corrupt(3, name)
        await bench.forget()
        seen.add(await bench.check(3, iova))
        undo()
        await bench.forget()
        assert await bench.check(3, iova) == 0, name
    for level in range(1, params()["levels"]):
        for name in DDTE_DEFECTS:
            undo = bench.directory.corrupt(3, name, level=level)
            await bench.forget()
            seen.add(await bench.check(3, iova))
            undo()
            await bench.forget()
            assert await bench.check(3, iova) == 0, name
    assert {13, 15, 258, 259} <= seen


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def memory_errors_fault_exactly(dut):
    """IOMMU-TR-3: access errors and poison at each step of a walk: 257/268, 5/7, 274; the next good request works (R03)."""
    bench = Bench(dut)
    await bench.begin()
    table = bench.device(3, PSCID=7)
    table.map_page(0x5000, 0x7000)
    places = [bench.directory.entry_address(3, level) for level in range(params()["levels"])]
    places += [table._slot(0x5000, level) for level in range(3)]
    for place in places:
        for spoil, mend in ((bench.memory.poison, bench.memory.unpoison),):
            for access in (READ, WRITE):
                spoil(place, 8)
                await bench.forget()
                assert await bench.check(3, 0x5000, access) in (268, 274)
                mend(place, 8)
                await bench.forget()
                assert await bench.check(3, 0x5000, access) == 0
    other = bench.device(4, PSCID=8)
    other.map_page(0x5000, 0x7000)
    bench.directory.set(4, DeviceContext.sv39(0x10_0000_0000, PSCID=8))
    await bench.forget()
    assert await bench.check(4, 0x5000, READ) == 5
    assert await bench.check(4, 0x5000, WRITE) == 7
    assert await bench.check(3, 0x5000, WRITE) == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def modes_decide_first(dut):
    """IOMMU-TR-4: Off refuses with 256, Bare passes everything at full rate, too wide device_ids get 260 [RVIOMMU1.0 3.3 steps 1, 2, 5]."""
    bench = Bench(dut)
    await bench.begin()
    bench.device(3, PSCID=7).map_page(0x5000, 0x7000)
    mode = bench.directory.ddtp & 0xF
    dut.ddtp_mode.value = 0
    await bench.ask(1, 3, 0x5000)
    (answer,) = await bench.answered(1)
    assert (answer.fault, answer.cause) == (1, 256)
    dut.ddtp_mode.value = 1
    pages = [bench.rng.getrandbits(52) for _ in range(60)]
    bench.times.clear()
    await bench.request.put_many(bench.packed(n, 3, page << 12, WRITE) for n, page in enumerate(pages))
    assert [answer.page for answer in await bench.answered(60)] == pages
    assert bench.times[-1] - bench.times[0] == 59
    dut.ddtp_mode.value = mode
    assert await bench.check(3, 0x5000) == 0
    for wide in (1 << 7, 1 << 16, 1 << 23):
        await bench.check(wide, 0x5000)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def hits_take_two_cycles_one_per_cycle(dut):
    """IOMMU-TR-5: a cached translation is valid 2 cycles after its request; 200 hits take 200 cycles; a cold page 3 reads, the next 1."""
    bench = Bench(dut)
    await bench.begin()
    table = bench.device(3, PSCID=7)
    for n in range(16):
        table.map_page(0x10000 + 0x1000 * n, 0x90000 + 0x1000 * n)
    await bench.check(3, 0x1F000)  # the context is cached now
    await bench.forget(InvalidateKind.VMA)
    bench.read_count = 0
    await bench.check(3, 0x10000)
    assert bench.read_count == 3
    for n in range(1, 16):
        await bench.check(3, 0x10000 + 0x1000 * n)
        assert bench.read_count == 3 + n
    bench.times.clear()
    pages = [bench.rng.randrange(16) for _ in range(200)]
    begun = cycle()
    await bench.request.put_many(bench.packed(n % 256, 3, 0x10000 + 0x1000 * page) for n, page in enumerate(pages))
    found = await bench.answered(200)
    assert [answer.page for answer in found] == [0x90 + page for page in pages]
    assert bench.times[-1] - bench.times[0] == 199
    assert bench.times[0] - (begun + 1) <= 2, "request accepted at the first edge after begun"
    assert bench.read_count == 18


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def walks_run_side_by_side(dut):
    """IOMMU-TR-6: 8 independent misses at 100 cycles of memory take at most 450; same-page misses are one walk; hits flow past misses."""
    bench = Bench(dut)
    await bench.begin()
    table = bench.device(3, PSCID=7)
    for n in range(9):
        table.map_page(n << 30, 0x90000 + 0x1000 * n)
    await bench.check(3, 8 << 30)
    bench.latency = lambda: 100
    begun, bench.read_count = cycle(), 0
    await bench.request.put_many(bench.packed(n, 3, n << 30) for n in range(8))
    assert {answer.page for answer in await bench.answered(8)} == {0x90 + n for n in range(8)}
    dut._log.info("8 misses: %d cycles, %d reads", cycle() - begun, bench.read_count)
    assert cycle() - begun <= 450 and bench.read_count == 24
    await bench.forget(InvalidateKind.VMA)
    bench.read_count = 0
    await bench.request.put_many(bench.packed(n, 3, 5 << 30) for n in range(8))
    assert {answer.page for answer in await bench.answered(8)} == {0x95}
    assert bench.read_count == 3
    bench.times.clear()
    await bench.request.put(bench.packed(200, 3, 6 << 30))
    await bench.request.put_many(bench.packed(n, 3, 5 << 30) for n in range(100))
    found = await bench.answered(100)
    assert all(answer.cookie != 200 for answer in found) and bench.times[99] - bench.times[0] <= 110
    assert (await bench.answered(1))[0].cookie == 200


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def invalidated_pages_are_never_seen_again(dut):
    """IOMMU-TR-7: requests accepted after an invalidation never get the old page, whatever walks are in flight [RVIOMMU1.0 3.8]."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    bench.latency = lambda: rng.randrange(1, 120)
    table = bench.device(3, PSCID=7)
    pages, version = [0x1000 * n for n in range(6)], dict.fromkeys(range(6), 0)
    for n, page in enumerate(pages):
        table.map_page(page, 0x100000 * (n + 1))
    cookie, wanted = 0, {}

    for _ in range(250):
        if rng.random() < 0.3:
            n = rng.randrange(6)
            version[n] += 1
            table.unmap(pages[n])
            table.map_page(pages[n], 0x100000 * (n + 1) + 0x1000 * (version[n] % 200))
            if rng.random() < 0.5:
                await bench.forget(InvalidateKind.VMA, av=1, page=pages[n] >> 12)
            else:
                await bench.forget(InvalidateKind.VMA, pscv=rng.getrandbits(1), pscid=7)
        else:
            n = rng.randrange(6)
            wanted[cookie] = (n, version[n])
            await bench.ask(cookie, 3, pages[n])
            cookie = (cookie + 1) % 256
            await ClockCycles(dut.clk, rng.choice([1, 1, 1, 30]))
        for payload in bench.answers:
            answer = unpack(TranslateResponse, payload)
            n, oldest = wanted.pop(answer.cookie)
            got = answer.page - 0x100 * (n + 1)
            assert not answer.fault and oldest % 200 <= got <= version[n] % 200, f"page {n}: version {got}, asked at {oldest}"
        bench.answers.clear()
        while len(wanted) > 20:
            await RisingEdge(dut.clk)
            if bench.answers:
                break
    await ClockCycles(dut.clk, 2000)
    assert len(bench.answers) == len(wanted)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def prefetches_fill_and_are_not_answered(dut):
    """IOMMU-TR-8: a prefetch brings its page in without answer or fault report; the page then is a hit."""
    bench = Bench(dut)
    await bench.begin()
    bench.device(3, PSCID=7).map_page(0x5000, 0x7000)
    for page in (0x5, 0x6):
        await bench.request.put(pack(TranslateRequest, device_id=3, page=page, is_prefetch=1, cookie=9))
    await ClockCycles(dut.clk, 300)
    assert not bench.answers and not bench.reports
    bench.read_count = 0
    assert await bench.check(3, 0x5000) == 0
    assert bench.read_count == 0
    assert await bench.check(3, 0x6000) == 13
