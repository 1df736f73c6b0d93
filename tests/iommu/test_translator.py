"""Translator: every answer is the golden walk's, cycle counts and reads are counted."""

import random
from collections import Counter
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, Lock, RisingEdge

from ringwall.models.iommu.ats import TranslationCompletion
from ringwall.models.iommu.defects import msi_pte_defects
from ringwall.models.iommu.entries import SV39, SV39X4, SV48, SV48X4, SV57, SV57X4, MsiPte, ProcessContext
from ringwall.models.iommu.faults import AccessType, TranslationFault
from ringwall.models.iommu.hpm import IDT_EVENTS, Event
from ringwall.models.iommu.tables import (
    DC_DEFECTS,
    DDTE_DEFECTS,
    PDTE_DEFECTS,
    PTE_DEFECTS,
    SIZES,
    Allocator,
    DeviceContext,
    GuestView,
    MsiTable,
    PageTable,
    ProcessDirectory,
)
from ringwall.models.iommu.walk import Request, RequestKind
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import (
    Events,
    FaultReport,
    InvalidateKind,
    TranslateRequest,
    TranslateResponse,
)
from ringwall.rtl.iommu.translator import Translator
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, unpack
from ringwall.sim.translator_bench import TranslatorBench

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC


LEAST = [  # tests of a translator without features
    "answers_are_the_golden_walk",
    "malformed_entries_fault_exactly",
    "memory_errors_fault_exactly",
    "modes_decide_first",
    "hits_take_two_cycles_one_per_cycle",
    "walks_run_side_by_side",
    "invalidated_pages_are_never_seen_again",
    "prefetches_fill_and_are_not_answered",
    "prefetches_wait_for_walks",
    "more_misses_than_fit_all_end",
    "what_was_walked_is_not_walked_again",
    "leaf_tables_are_remembered",
    "leaf_tables_of_old_are_not",
]


SECOND = {"entries": 4, "ways": 1, "second_entries": 8, "second_generation_bits": 2}  # most hits are those of the second level


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_translator(request, levels):
    run(Translator(), module=__name__, node=request.node.nodeid, params={"levels": levels}, testcase=LEAST)


def test_second_level(request):
    run(Translator(**SECOND), module=__name__, node=request.node.nodeid, params={"levels": 1},
        testcase=[*[name for name in LEAST if "cycles" not in name], "the_second_level_answers"])  # fmt: skip


def test_parameters_are_checked():
    """IOMMU-TR-9: sizes that make no sense are refused with a sentence."""
    from ringwall.rtl.iommu.contexts import ContextCache
    from ringwall.rtl.iommu.iotlb import Iotlb
    from ringwall.rtl.iommu.walker import Walker

    for make, bad in ((Iotlb, {"entries": 63}), (Iotlb, {"entries": 4, "ways": 4}), (ContextCache, {"entries": 3}), (Walker, {"walks": 0}),
                      (Walker, {"waiters": 3}), (Walker, {"tables": 6})):
        with pytest.raises(ValueError, match=r"must be .*, not"):
            make(**bad)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def answers_are_the_golden_walk(dut):
    """IOMMU-TR-1: random tables of all page sizes, permissions and flags, requests of several devices, reordered memory (R02, R27, R41)."""
    bench = TranslatorBench(dut)
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
            wanted[cookie] = (bench.expected(number, iova, access), f"round {round_number}: {number} {iova:#x} {access}")
            await bench.ask(cookie, number, iova, access)
        for answer in await bench.answered(24, 8000):
            bench.judge(answer, *wanted.pop(answer.cookie))
        assert not wanted


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def malformed_entries_fault_exactly(dut):
    """IOMMU-TR-2: each malformed entry by name gives the golden cause, is not cached, and mends [RVIOMMU1.0 3.1.4, RVPRIV 10.3.2]."""
    bench = TranslatorBench(dut)
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
    bench = TranslatorBench(dut)
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
    bench = TranslatorBench(dut)
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
    bench = TranslatorBench(dut)
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
    bench = TranslatorBench(dut)
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
    bench = TranslatorBench(dut)
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
    bench = TranslatorBench(dut)
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


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def prefetches_wait_for_walks(dut):
    """IOMMU-TR-12: of pages that are prefetched while there is something to spare none is lost, and others' misses wait for no walk."""
    bench = TranslatorBench(dut)
    await bench.begin()
    table, latency, prefetched = bench.device(3, PSCID=7), 150, 80
    for page in range(96):
        table.map_page(page << 12, 0x900_0000 + (page << 12))
    bench.latency = lambda: latency
    assert await bench.check(3, 0) == 0
    bench.read_count, lock = 0, Lock()

    async def prefetch():
        page = 1
        while page <= prefetched:
            async with lock:
                await RisingEdge(dut.clk)
                if dut.spare.value:
                    await bench.request.put(pack(TranslateRequest, device_id=3, page=page, is_prefetch=1))
                    page += 1

    done = cocotb.start_soon(prefetch())
    await ClockCycles(dut.clk, latency)
    assert int(dut.in_flight.value).bit_count() == 7  # of 8
    took = []
    for page in range(90, 96):
        await ClockCycles(dut.clk, bench.rng.randrange(20, 60))
        begun = cycle()
        async with lock:
            await bench.ask(0, 3, page << 12)
        await bench.answered(1)
        took.append(cycle() - begun)
    assert not done.done() and max(took) < 1.5 * latency, took
    await done
    await ClockCycles(dut.clk, 2 * latency)
    assert bench.read_count == prefetched + len(took)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def more_misses_than_fit_all_end(dut):
    """IOMMU-TR-10: far more requests at once than walks, waiters and queued misses, for few pages and many: each is answered once (R03)."""
    bench = TranslatorBench(dut)
    await bench.begin()
    rng = bench.rng
    table = bench.device(3, PSCID=7)
    for n in range(64):
        table.map_page(n << 21, 0x900_0000 + 0x1000 * n)
    for latency, pages in ((40, 12), (3, 20), (100, 64), (1, 30)):
        bench.latency = lambda latency=latency: latency
        await bench.forget()
        wanted = [rng.randrange(pages) for _ in range(200)]
        await bench.request.put_many(bench.packed(n, 3, page << 21) for n, page in enumerate(wanted))
        found = await bench.answered(200, 8000)
        assert {answer.cookie: answer.page for answer in found} == {n: 0x9000 + page for n, page in enumerate(wanted)}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def what_was_walked_is_not_walked_again(dut):
    """IOMMU-TR-15: far more requests than waiters for few pages: those in front of the walker when a walk ends cost no other read."""
    bench = TranslatorBench(dut)
    await bench.begin()
    table = bench.device(3, PSCID=7)
    for page in range(64):
        table.map_page(page << 12, 0x900_0000 + (page << 12))
    for latency, pages in ((1, 1), (40, 4), (100, 3)):
        bench.latency = lambda latency=latency: latency
        await bench.forget(InvalidateKind.VMA)
        await bench.check(3, 63 << 12)
        bench.read_count = 0
        wanted = [n % pages for n in range(200)]
        await bench.request.put_many(bench.packed(n, 3, page << 12) for n, page in enumerate(wanted))
        found = await bench.answered(200, 8000)
        assert {answer.cookie: answer.page for answer in found} == {n: 0x9000 + page for n, page in enumerate(wanted)}
        assert bench.read_count == pages


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def leaf_tables_are_remembered(dut):
    """IOMMU-TR-13: of 8 sequential regions a second page costs one read each, two devices take each other's for none of theirs."""
    bench = TranslatorBench(dut)
    await bench.begin()
    tables = {device: bench.device(device, PSCID=device) for device in (3, 9)}
    for device, table in tables.items():
        for n in range(5, 13):
            for page in range(2):
                table.map_page(n << 21 | page << 12, device << 32 | n << 16 | page << 12)
    for device in tables:
        for page, reads in ((0, 3), (1, 1)):
            for n in range(5, 13):
                await bench.check(device, n << 21 | page << 12)
                if page or n > 5:  # the first one of a device reads its context, too
                    assert bench.read_count == reads
                bench.read_count = 0
    await bench.forget(InvalidateKind.VMA)
    for n in range(5, 13):
        await bench.check(9, n << 21)
        assert bench.read_count == 3
        bench.read_count = 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def leaf_tables_of_old_are_not(dut):
    """IOMMU-TR-14: a leaf table that moves while a walk is on its way to it: behind the invalidation no walk ends in the old one."""
    bench = TranslatorBench(dut)
    await bench.begin()
    bench.latency = lambda: 25
    table = bench.device(3, PSCID=7)
    for wait in range(140):
        region = wait + 1 << 21
        pages = region, region | 0x1000
        for page in pages:
            table.map_page(page, 0x10_0000)
        await bench.ask(1, 3, region)
        await ClockCycles(dut.clk, wait)
        for page in pages:
            table.unmap(page)
        table.map_page(region, 1 << 30, size=1 << 21)  # in place of the table
        table.unmap(region)
        for page in pages:
            table.map_page(page, 0x20_0000)
        await bench.forget(InvalidateKind.VMA)
        await bench.answered(1)
        assert await bench.check(3, pages[1]) == 0, wait


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def the_second_level_answers(dut):
    """IOMMU-TR-11: pages that the first level has lost: no read, 4 cycles, one per cycle beside a miss; a permission is walked for once."""
    bench = TranslatorBench(dut)
    await bench.begin()
    table = bench.device(3, PSCID=7)
    for n in range(8):
        table.map_page(n << 12, 0x90000 + (n << 12), d=n != 5)
    await ClockCycles(dut.clk, 8)
    for n in range(8):
        await bench.check(3, n << 12)
    bench.read_count, took, hits = 0, Counter(), []

    async def count():
        while True:
            await RisingEdge(dut.clk)
            if dut.hit.value:
                hits.append(cycle())

    cocotb.start_soon(count())
    for n in [0, *range(8)] * 3:
        await bench.ask(1, 3, n << 12)
        begun = cycle()
        bench.times.clear()
        assert (await bench.answered(1))[0].page == 0x90 + n
        took[bench.times[0] - begun] += 1
    assert bench.read_count == 0 and took.keys() == {2, 4} and took[4] >= 12 and len(hits) == took.total(), took
    # A prefetch brings it back to the first level, and is not answered.
    for n in (0, 4) * 2:
        await bench.request.put(pack(TranslateRequest, device_id=3, page=n, is_prefetch=1, cookie=9))
        await ClockCycles(dut.clk, 8)
        assert dut.spare.value
        await bench.ask(1, 3, n << 12)
        begun = cycle()
        bench.times.clear()
        assert [answer.cookie for answer in await bench.answered(1)] == [1] and bench.times[0] - begun == 2
    # Back to back, beside a miss: one per cycle.
    bench.latency = lambda: 60
    table.map_page(1 << 30, 0x70000)
    order, begun = [n % 8 for n in range(30)], cycle()
    await bench.request.put_many([bench.packed(99, 3, 1 << 30), *(bench.packed(n, 3, page << 12) for n, page in enumerate(order))])
    found = await bench.answered(30)
    assert {answer.cookie: answer.page for answer in found} == {n: 0x90 + page for n, page in enumerate(order)}
    assert bench.times[-1] - begun <= 36
    assert (await bench.answered(1))[0].cookie == 99 and bench.read_count == 3
    # A page that may be written now, in both levels.
    assert await bench.check(3, 0x5000, WRITE) == 15
    table.unmap(0x5000)
    table.map_page(0x5000, 0x95000)
    bench.read_count = 0
    assert await bench.check(3, 0x5000, WRITE) == 0
    assert bench.read_count == 1
    for n in [*range(8), 5]:
        assert await bench.check(3, n << 12, WRITE) == 0
    assert bench.read_count == 1
    bench.directory.set(3, DeviceContext())  # the page itself
    await bench.forget(InvalidateKind.DDT)
    assert await bench.check(3, 0x5000) == 0



SECOND_FEATURES = ["Sv39x4", "Sv48x4", "Sv57x4"]
FULL = ["Sv48", "Sv57", "Svpbmt", *SECOND_FEATURES, "PD8", "PD17", "PD20", "MSI_FLAT"]
CARDS = {  # features, levels of the device directory, random worlds
    "full": (FULL, 3, 4), "guests": (["Sv39x4"], 2, 2), "processes": (["Sv48", "PD17", "PD8"], 1, 2),
    "large": (["Sv48", "Sv57", "Svpbmt"], 2, 2), "updates": ([*FULL, "MSI_MRIF", "AMO_HWAD"], 2, 4),
    "second level": ([*FULL, "AMO_HWAD"], 1, 4), "devices": ([*FULL, "ATS", "T2GPA"], 3, 4),
    "devices, updates": ([*FULL, "AMO_HWAD", "ATS", "T2GPA"], 2, 4), "devices, least": (["ATS"], 1, 2),
}  # fmt: skip
PIDS = (0, 1, 0xFF, 0x100, 0x1FFFF, 0x20000, 0xFFFFF)
GUEST_POOL, GUEST_PAGES = 0x20_0000, 256


class Space:
    """An address space of a device or a process: its first-stage table, or None, and addresses worth asking for."""

    def __init__(self, world, scheme):
        bench, rng = world.bench, world.rng
        self.table, self.places = None, [(gpa + rng.randrange(size), 12) for gpa, size in world.targets]
        if scheme is None:
            return
        self.places = []
        self.table = PageTable(world.memory, world.allocator, scheme=scheme, features=bench.features)
        for _ in range(10):
            size = rng.choice(scheme.sizes)
            iova = rng.getrandbits(64) & -size
            if rng.random() < 0.95:
                bits = scheme.address_bits
                iova = ((iova & (1 << bits) - 1) ^ 1 << bits - 1) - (1 << bits - 1) & (1 << 64) - 1
            gpa, extent = rng.choice(world.targets)
            gpa = (gpa + rng.randrange(extent)) & -size & (1 << 56) - 1
            try:
                self.table.map_page(iova, gpa, size=size, g=rng.random() < world.globals, **world.permissions(first=True))
            except ValueError:
                continue  # it overlaps, or is not canonical
            for _ in range(3):
                low = (rng.choice(world.targets)[0] - gpa) if rng.random() < 0.5 else rng.getrandbits(64)
                self.places.append((iova + low % size, size.bit_length() - 1))
        self.places.append((rng.getrandbits(64), 12))


class World:
    """What a device context leads to, at random: two stages, processes, MSI table."""

    def __init__(self, bench, GSCID):
        self.bench, self.rng, self.memory, self.allocator, self.first_PSCID = bench, bench.rng, bench.memory, bench.allocator, 16 * GSCID
        rng, features = bench.rng, bench.features
        seconds = [scheme for scheme in (SV39X4, SV48X4, SV57X4) if scheme.name in features]
        self.firsts = [scheme for scheme in (SV39, SV48, SV57) if scheme.name in features]
        self.second = None
        self.targets = [(rng.getrandbits(56) & -4096, 4096) for _ in range(6)]
        self.updates = "AMO_HWAD" in features
        context = DeviceContext(DTF=rng.random() < 0.2)
        self.kinds = [RequestKind.UNTRANSLATED]
        if "ATS" in features:
            context = replace(context, EN_ATS=rng.random() < 0.9)
            self.kinds = [*RequestKind, RequestKind.ATS]
        if self.updates:
            context = replace(context, SADE=rng.random() < 0.85, GADE=rng.random() < 0.85)
        if seconds and rng.random() < 0.8:
            context = self._guest(rng.choice(seconds), context, GSCID)
            if "MSI_FLAT" in features and rng.random() < 0.7:
                context = self._messages(context)
        self.spaces, self.globals = {}, 0  # a global page is one of all processes, and of all devices without second stage
        levels = [n for n, name in enumerate(("PD8", "PD17", "PD20"), 1) if name in features]
        if levels and rng.random() < 0.8:
            self._processes(rng.choice([0, *levels, *levels]), replace(context, DPE=rng.random() < 0.5))
        else:
            self.globals = 0.1 if self.second else 0
            space = self.spaces[None] = Space(self, rng.choice([None, *self.firsts, *self.firsts]))
            PSCID = rng.randrange(1, 1 << 20)
            self.context = replace(context, PSCID=PSCID, **self._fsc(space))

    @staticmethod
    def _fsc(space):
        return {"fsc_mode": space.table.scheme.mode, "fsc_ppn": space.table.root >> 12} if space.table else {}

    def permissions(self, first):
        rng = self.rng
        kinds = ["rwu", "rwxu", "ru", "rxu", "xu"] + (["rw", "rwx", "r"] if first else ["rw"])
        return {"perms": rng.choice([*["rwxu"] * 4, *kinds]),
                "a": rng.random() < (0.5 if self.updates else 0.95), "d": rng.random() < (0.4 if self.updates else 0.9),
                "pbmt": rng.choice([0, 0, 1, 2]) if "Svpbmt" in self.bench.features else 0}  # fmt: skip

    def _guest(self, scheme, context, GSCID):
        rng, features = self.rng, self.bench.features
        self.second = PageTable(self.memory, self.allocator, scheme=scheme, features=self.bench.features)
        for n in range(GUEST_PAGES):
            self.second.map_page(GUEST_POOL + (n << 12), self.allocator.page(), perms=rng.choice(["rwxu", "ru"]),
                                 **({"a": rng.random() < 0.6, "d": rng.random() < 0.6} if self.updates else {}))
        view = GuestView(self.memory, self.second)
        self.memory, self.allocator = view, Allocator(view, GUEST_POOL, GUEST_PAGES << 12, rng=rng)
        self.targets = [(GUEST_POOL, GUEST_PAGES << 12), (rng.getrandbits(59) & -4096, 4096)]
        for _ in range(8):
            size = rng.choice(scheme.sizes)
            gpa = rng.getrandbits(scheme.address_bits if rng.random() < 0.5 else min(scheme.address_bits, 50)) & -size
            try:
                self.second.map_page(gpa, rng.getrandbits(56) & -size, size=size, **self.permissions(first=False))
            except ValueError:
                continue  # it overlaps
            self.targets.append((gpa, size))
        context = replace(context, T2GPA="T2GPA" in features and context.EN_ATS and rng.random() < 0.6)
        return context.with_second_stage(scheme, self.second.root, GSCID=GSCID)

    def _messages(self, context):
        rng, bench = self.rng, self.bench
        gpa, size = rng.choice(self.targets[2:] or self.targets)
        page = (gpa + rng.randrange(size) >> 12) & (1 << 47) - 1
        mask = sum(1 << bit for bit in rng.sample(range(12), rng.randrange(6))) | rng.choice([0, 0, 1 << rng.randrange(47)])
        table = MsiTable(bench.memory, bench.allocator, mask=mask, pattern=page)
        self.targets.append((page << 12, 4096))
        for n in range(table.entries):
            gpa = (page & ~mask | sum(1 << bit for at, bit in enumerate(b for b in range(52) if mask >> b & 1) if n >> at & 1)) << 12
            if rng.random() < 0.7:
                is_mrif = "MSI_MRIF" in bench.features and rng.random() < 0.8
                entry = MsiPte(spa=rng.getrandbits(56) & -4096)
                if is_mrif:
                    notice = {"notice_address": rng.getrandbits(56) & -4096, "nid": rng.getrandbits(11)}
                    entry = MsiPte(mrif_address=rng.getrandbits(56) & -512, **notice)
                table.set(gpa, entry)
                if rng.random() < 0.2:
                    table.corrupt(gpa, rng.choice(list(msi_pte_defects(bench.features, is_mrif=is_mrif))), bench.features)
            if len(self.targets) < 20:
                self.targets.append((gpa, 4096))
        return context.with_msi_table(table.root, mask=mask, pattern=page)

    def _processes(self, levels, context):
        rng, bench = self.rng, self.bench
        if levels == 0:
            self.spaces = {pid: Space(self, None) for pid in (None, *PIDS)}
            self.context = replace(context, PDTV=True)
            return
        directory = ProcessDirectory(self.memory, self.allocator, levels=levels, features=bench.features)
        for number, pid in enumerate(PIDS):
            if pid >> (8, 17, 20)[levels - 1]:
                continue
            space = self.spaces[pid] = Space(self, rng.choice([None, *self.firsts, *self.firsts]))
            PSCID = self.first_PSCID + number
            directory.set(pid, ProcessContext(ENS=rng.random() < 0.7, SUM=rng.random() < 0.5, PSCID=PSCID, **self._fsc(space)))
            if rng.random() < 0.15:
                directory.corrupt(pid, rng.choice(list(directory.defects)))
        self.spaces[None] = self.spaces[0] if context.DPE else Space(self, None)
        self.context = DeviceContext.process_directory(directory.pdtp, **{
            name: getattr(context, name) for name in DeviceContext.__dataclass_fields__ if name not in ("PDTV", "fsc_mode", "fsc_ppn")})

    def request(self, device):
        """Return a request worth making."""
        rng = self.rng
        pid = rng.choice(list(self.spaces) if rng.random() < 0.95 else PIDS)
        places = self.spaces.get(pid, next(iter(self.spaces.values()))).places
        iova, size_log2 = rng.choice(places) if places else (rng.getrandbits(64), 12)
        if rng.random() < 0.3:
            iova ^= 1 << rng.randrange(size_log2)
        if rng.random() < 0.05:
            iova ^= 1 << rng.randrange(64)
        kind = rng.choice(self.kinds)
        if kind is RequestKind.TRANSLATED and self.second:
            iova = rng.choice(self.targets)[0] + rng.randrange(4096)
        access = rng.choice([READ, EXEC] if kind is RequestKind.ATS else [READ, READ, WRITE, EXEC])
        return Request(device, iova & (1 << 64) - 1, access, pid, rng.random() < 0.3, kind, rng.random() < 0.4, rng.random() < 0.5)


@pytest.mark.parametrize("card", CARDS)
def test_stages(request, card):
    features, levels, worlds = CARDS[card]
    sizes = SECOND if card == "second level" else {}
    run(Translator(features=Features(**dict.fromkeys(features, True)), **sizes), module=__name__, node=request.node.nodeid,
        params={"features": features, "levels": levels, "worlds": worlds}, testcase="stages_are_the_golden_walk")  # fmt: skip


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def stages_are_the_golden_walk(dut):
    """IOMMU-STAGE-1: random guests, processes, MSI tables, entries of all sizes: answers, PBMT, sizes, faults as the model (R02, R41)."""
    bench = TranslatorBench(dut)
    await bench.begin()
    rng, delays = bench.rng, random.Random(cocotb.RANDOM_SEED)  # what is asked does not depend on cycles
    seen, mapped = Counter(), 0
    for world_number in range(params()["worlds"]):
        bench.latency = rng.choice([lambda: 1, lambda: delays.randrange(1, 60)])
        worlds = {}
        for number, device in enumerate((3, 9, 0x2C, 0x3F)):
            worlds[device] = World(bench, number + 1)
            bench.directory.set(device, worlds[device].context)
        await bench.forget()
        for round_number in range(6):
            wanted, reports = {}, []
            bench.reports.clear()
            for cookie in range(24):
                device = rng.choice(list(worlds))
                request = worlds[device].request(device)
                expected, record = bench.outcome(request)
                wanted[cookie] = request, expected
                await bench.ask_for(cookie, request)
                if isinstance(expected, TranslationFault):
                    seen[int(expected.cause)] += 1
                elif isinstance(expected, TranslationCompletion):
                    seen[expected.status.value, expected.readable] += 1
                    mapped += expected.readable
                else:
                    mapped += 1
                if record is not None:
                    pid = -1 if request.pid is None else request.pid
                    reports.append((record.cause, record.ttyp, device, pid, record.priv, record.iotval, record.iotval2))
            for answer in await bench.answered(24, 8000):
                request, expected = wanted.pop(answer.cookie)
                if bench.updates:
                    expected, _ = bench.outcome(request)  # what it set may be seen by others
                if request.kind is RequestKind.ATS:
                    bench.judge_completion(answer, expected, request)
                else:
                    bench.judge(answer, expected, f"world {world_number} round {round_number} {request}")
            await ClockCycles(dut.clk, 4)
            bench.check_updates()
            found = [unpack(FaultReport, report) for report in bench.reports]
            assert sorted((r.cause, r.ttyp, r.device_id, r.process_id if r.process_id_valid else -1, r.privileged, r.iotval, r.iotval2)
                          for r in found) == sorted(tuple(map(int, report)) for report in reports)  # fmt: skip
    dut._log.info("%d mapped, faults %s", mapped, dict(sorted(seen.items(), key=str)))
    assert mapped > 25 * params()["worlds"]
    assert bench.update_count > 30 * params()["worlds"] or not bench.capabilities.AMO_HWAD
    assert len(bench.files) > 4 * params()["worlds"] or not bench.capabilities.MSI_MRIF


@pytest.mark.parametrize("bad", [{"Sv57": True}, {"Sv48x4": True}, {"Sv39x4": True, "Sv57x4": True}, {"MSI_FLAT": True}, {"PD8": 2}])
def test_features_are_checked(bad):
    """IOMMU-STAGE-2: features without what they need are refused with a sentence."""
    with pytest.raises(ValueError, match=r"must be .*, not"):
        Features(**bad)


class Guest:
    """Device 3 in a guest: PD20, a process with Sv48 tables, another with none, MSIs; all but the roots at guest addresses."""

    BAD, HOLE = 0x4000_0000, 0x5000_0000  # guest pages: outside memory, not mapped
    MSI = 0x2800_0000  # 4 interrupt files
    LARGE = 0x180_0000_0000  # two pages of 1 GiB
    SIZES = {size: 0x1555_0000_0000 | size for size in SV48.sizes[:4]}  # of the first stage: an IOVA each

    def __init__(self, bench):
        self.bench, self.seen = bench, set()
        memory, allocator, features = bench.memory, bench.allocator, bench.features
        self.second = PageTable(memory, allocator, scheme=SV39X4, features=features)
        for n in range(GUEST_PAGES):
            self.second.map_page(GUEST_POOL + (n << 12), allocator.page(), perms="rwxu")
        self.second.map_page(self.BAD, 0x1000, perms="rwxu")
        for n in range(2):
            self.second.map_page(self.LARGE + (n << 30), 0x123_0000_0000 + (n << 30), size=1 << 30, perms="rwxu")
        for n in range(512):
            self.second.map_page(0x6000_0000 + (n << 12), 0x77_0000_0000 + (n << 13), perms="rwxu")
        view = GuestView(memory, self.second)
        self.allocator = Allocator(view, GUEST_POOL, GUEST_PAGES << 12, rng=bench.rng)
        self.first = PageTable(view, self.allocator, scheme=SV48, features=features)
        for size, iova in self.SIZES.items():
            self.first.map_page(iova, self.LARGE, size=size, perms="rwxu")
        self.first.map_page(0x60_0000, 0x6000_0000, size=1 << 21, perms="rwxu")
        self.first.map_page(0x1000, self.MSI + 0x1000, perms="rwxu")
        self.first.map_page(0x2000, self.HOLE, perms="rwxu")
        self.directory = ProcessDirectory(view, self.allocator, levels=3, features=features)
        self.process = ProcessContext.first_stage(SV48, self.first.root, PSCID=5, ENS=True, SUM=False)
        self.directory.set(0x12345, self.process)
        self.directory.set(0, ProcessContext())
        self.messages = MsiTable(memory, allocator, mask=3, pattern=self.MSI >> 12)
        for n in range(4):
            self.messages.set(self.MSI + (n << 12), MsiPte(spa=0x9900_0000 + (n << 12)))
        context = DeviceContext.process_directory(self.directory.pdtp, DPE=True)
        context = context.with_second_stage(SV39X4, self.second.root, GSCID=9)
        self.context = context.with_msi_table(self.messages.root, mask=3, pattern=self.MSI >> 12)
        bench.directory.set(3, self.context)

    async def ask(self, iova=SIZES[4096], access=READ, pid=0x12345, priv=False):
        """Ask with caches empty; return the cause or 0."""
        await self.bench.forget()
        cause = await self.bench.check(3, iova, access, pid, priv)
        self.seen.add(cause)
        return cause


def test_second_level_of_stages(request):
    run(Translator(features=Features(**dict.fromkeys(FULL, True)), **SECOND), module=__name__, node=request.node.nodeid,
        params={"features": FULL, "levels": 2}, testcase="no_stage_survives_its_invalidation")  # fmt: skip


def test_causes(request):
    run(Translator(features=Features(**dict.fromkeys(FULL, True))), module=__name__, node=request.node.nodeid,
        params={"features": FULL, "levels": 2},
        testcase=["every_cause_is_exact", "caches_are_right", "no_stage_survives_its_invalidation"])  # fmt: skip


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def every_cause_is_exact(dut):
    """IOMMU-STAGE-3: each check of a context, each malformed entry of both stages, directories, MSIs, each memory error: cause, iotval2."""
    bench = TranslatorBench(dut)
    await bench.begin()
    bench.latency, rng = lambda: 1, bench.rng
    guest = Guest(bench)
    page, msi = guest.SIZES[4096] + 0x123, 0x1008

    async def planted(undo, *requests):
        for request in requests:
            await guest.ask(*request)
        undo()

    def some(defects, count, key=lambda name, defect: None):
        """Return ``count`` names of each kind: those that differ in a number at their end are one."""
        kinds = {}
        for name, defect in defects.items():
            kinds.setdefault((key(name, defect), name.rstrip("0123456789")), []).append(name)
        return [name for names in kinds.values() for name in rng.sample(names, min(count, len(names)))]

    # Contexts: of each check of the specification, and of each kind of bits.
    for name in some(bench.directory.defects, 2, lambda name, defect: defect.check):
        await planted(bench.directory.corrupt(3, name), (page,))
    for name in some(guest.directory.defects, 2):
        await planted(guest.directory.corrupt(0x12345, name), (page,))
    for level in (1, 2):
        for name in some(PDTE_DEFECTS, 2):
            await planted(guest.directory.corrupt(0x12345, name, level=level), (page, WRITE))
    assert await guest.ask(page) == 0

    # Entries of tables: of the first stage, of the second for the page itself, for a table, for a directory.
    for table in (guest.first, guest.second):
        for name in some(table.defects, 2):
            where, access = table.defects[name].where, rng.choice([READ, WRITE, EXEC])
            if table is guest.first:
                iova = page if where != "superpage" else guest.SIZES[rng.choice([1 << 21, 1 << 30])]
                await planted(table.corrupt(iova & -4096, name), (iova, access))
            elif where == "superpage":
                await planted(table.corrupt(guest.LARGE, name), (page, access))
            else:
                target = rng.choice([0x6000_5000, guest.first._slot(page, 1) & -4096, guest.directory.root])
                await planted(table.corrupt(target, name), (0x60_5000, access) if target == 0x6000_5000 else (page, access))
    for target in (guest.first._slot(page, 1) & -4096, guest.directory.root):  # what may be executed only cannot be walked
        await planted(guest.second.corrupt(target, "LEAF_EXEC_ONLY"), (page, EXEC), (page, READ))
    for name in some(msi_pte_defects(bench.features, is_mrif=False), 2):
        await planted(guest.messages.corrupt(guest.MSI + 0x1000, name, bench.features), (msi, WRITE))
    assert await guest.ask(msi, EXEC) == 1
    for access in (READ, WRITE, EXEC):
        assert await guest.ask(0x2000, access) in (20, 21, 23)

    # Memory errors at each place that a walk reads.
    def poisoned(address):
        bench.memory.poison(address, 8)
        return lambda: bench.memory.unpoison(address, 8)

    places = [(bench.directory.entry_address(3, level), 268) for level in range(2)]
    places += [(guest.second.spa_of(guest.directory.entry_address(0x12345, level)), 269) for level in range(3)]
    places += [(guest.second.spa_of(guest.first._slot(page, level)), 274) for level in range(4)]
    places += [(guest.second._slot(guest.LARGE, 2), 274), (guest.second._slot(guest.directory.root, 0), 269)]
    for place, cause in places:
        undo = poisoned(place)
        assert await guest.ask(page, WRITE) == cause
        undo()
    await planted(poisoned(guest.messages.entry_address(guest.MSI + 0x1000) + 8), (msi, WRITE))
    for change, cause in (({"fsc_ppn": guest.BAD >> 12}, 265), ({"iohgatp_ppn": 0x40}, 265), ({"msiptp_ppn": 0x40}, 261)):
        bench.directory.set(3, replace(guest.context, **change))
        assert await guest.ask(msi, WRITE) == cause
    bench.directory.set(3, guest.context)
    for root, causes in ((guest.BAD, [5, 7, 1]), (0x1000, [21, 23, 20])):
        guest.directory.set(0x12345, replace(guest.process, fsc_ppn=root >> 12))
        assert [await guest.ask(page, access) for access in (READ, WRITE, EXEC)] == causes
    guest.directory.set(0x12345, guest.process)
    bench.directory.set(3, replace(DeviceContext.first_stage(SV57, 0x1000, PSCID=1), DTF=True))
    assert await guest.ask(page, READ, None) == 5

    # What a context allows: process_ids, privilege, SUM, wide addresses.
    for mode, pid in ((1, 0x100), (2, 0x20000)):
        bench.directory.set(3, replace(guest.context, fsc_mode=mode))
        assert await guest.ask(page, READ, pid) == 260
    bench.directory.set(3, guest.context)
    for process in (replace(guest.process, ENS=ENS, SUM=SUM) for ENS in (False, True) for SUM in (False, True)):
        guest.directory.set(0x12345, process)
        for access in (READ, WRITE, EXEC):
            cause = await guest.ask(page, access, 0x12345, True)
            assert cause == (260 if not process.ENS else 12 if access is EXEC else 0 if process.SUM else access.page_fault)
    for iova in (1 << 47, 1 << 63):
        assert await guest.ask(iova, WRITE) == 15
    assert await guest.ask(1 << 41, WRITE, None) == 23, "process 0 is the default, and has no first stage"
    assert await guest.ask(GUEST_POOL, WRITE, 0) == 0
    guest.directory.set(0, guest.process)
    assert await guest.ask(page, WRITE, None) == 0, "process 0 has one"
    ddtp = bench.golden.registers.ddtp
    bench.golden.registers.ddtp = 0x40 << 10 | ddtp & 15
    dut.ddtp_ppn.value = 0x40
    assert await guest.ask(page) == 257
    bench.golden.registers.ddtp = ddtp
    dut.ddtp_ppn.value = ddtp >> 10
    assert await guest.ask(page) == 0
    assert guest.seen == {0, 1, 5, 7, 12, 13, 15, 20, 21, 23, *range(257, 264), *range(265, 271), 274}, sorted(guest.seen)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def caches_are_right(dut):
    """IOMMU-STAGE-4: reads are counted, hits take 2 cycles, one per cycle; each invalidation forgets what it must (R15, R27)."""
    bench = TranslatorBench(dut)
    await bench.begin()
    bench.latency = lambda: 5
    guest = Guest(bench)

    async def reads(*request, device=3):
        bench.read_count = 0
        await bench.check(device, *request)
        return bench.read_count

    # Both stages warm: a page costs two reads; once cached none, for every access and privilege that it grants.
    view = guest.first.memory
    for n in range(8):
        guest.first.map_page(0x7000_0000 + (n << 12), 0x6000_0000 + (n << 12), perms="rwxu")
    assert await reads(0x7000_0000, READ, 0x12345) > 10
    assert [await reads(0x7000_0000 + (n << 12), READ, 0x12345) for n in range(1, 8)] == [2] * 7
    assert [await reads(0x7000_3000, access, 0x12345) for access in (READ, WRITE, EXEC)] == [0] * 3
    bench.times.clear()
    begun = cycle()
    await bench.request.put_many(bench.packed(n, 3, 0x7000_0000 + (n % 8 << 12), pid=0x12345) for n in range(100))
    await bench.answered(100)
    assert bench.times[-1] - bench.times[0] == 99 and bench.times[0] - (begun + 1) <= 2
    assert bench.read_count == 0

    # A page of the first stage stands for all the pages that were made of it.
    for n in (0, 1, 300):
        await bench.check(3, 0x60_0000 + (n << 12), READ, 0x12345)
    assert await reads(0x60_0000 + (300 << 12), READ, 0x12345) == 0
    guest.first.unmap(0x60_0000)
    guest.first.map_page(0x60_0000, guest.LARGE + (1 << 21), size=1 << 21, perms="rwu")
    await bench.forget(InvalidateKind.VMA, av=1, page=0x600, pscv=1, pscid=5, gv=1, gscid=9)
    for n in (0, 1, 300):
        assert await bench.check(3, 0x60_0000 + (n << 12), WRITE, 0x12345) == 0

    # A guest address stands for what leads to it, also for a table.
    await bench.check(3, 0x7000_0000, READ, 0x12345)
    assert await reads(0x7000_0000, READ, 0x12345) == 0
    guest.second.unmap(0x6000_0000)
    guest.second.map_page(0x6000_0000, 0x55_0000_0000, perms="rwu")
    await bench.forget(InvalidateKind.GVMA, av=1, page=0x60000, gv=1, gscid=9)
    assert await bench.check(3, 0x7000_0000, WRITE, 0x12345) == 0
    table = guest.first._slot(0x7000_0000, 0) & -4096
    old, new = guest.second.spa_of(table), bench.allocator.page()
    bench.memory.write(new, bench.memory.read(old, 4096))
    guest.second.unmap(table)
    guest.second.map_page(table, new, perms="rwu")
    bench.memory.write(old, bytes(4096))
    await bench.forget(InvalidateKind.GVMA, av=1, page=table >> 12, gv=1, gscid=9)
    assert await bench.check(3, 0x7000_5000, READ, 0x12345) == 0

    # Contexts: of a process alone, of the device with its processes; translations stay.
    await bench.check(3, 0x7000_6000, READ, 0x12345)
    assert await reads(0x7000_6000, READ, 0x12345) == 0
    other = PageTable(view, guest.allocator, scheme=SV48, features=bench.features)
    other.map_page(0x7000_6000, 0x6000_1000, perms="ru")
    guest.directory.set(0x12345, ProcessContext.first_stage(SV48, other.root, PSCID=6))
    await bench.forget(InvalidateKind.PDT, dv=1, device_id=3)
    assert await reads(0x7000_6000, READ, 0x12345) > 5
    assert await bench.check(3, 0x7000_6000, WRITE, 0x12345) == 15
    guest.directory.set(0x12345, guest.process)
    await bench.forget(InvalidateKind.DDT, dv=1, device_id=3)
    assert await reads(0x7000_6000, READ, 0x12345) > 3, "two levels of one directory, three of the other"

    # A first-stage table at the guest address that is the physical one of the second-stage table, and the same regions in both.
    for n in range(4):
        guest.second.map_page(guest.second.root + (n << 12), bench.allocator.page(), perms="rwu")
    twin = PageTable(view, Allocator(view, guest.second.root, 4 << 12), features=bench.features)
    bench.directory.set(4, DeviceContext.sv39(twin.root, PSCID=8).with_second_stage(SV39X4, guest.second.root, GSCID=9))
    for n in range(3):
        twin.map_page(0x6000_0000 + (n << 12), 0x6000_8000 - (n << 12), perms="rwu")
        assert await bench.check(4, 0x6000_0000 + (n << 12), WRITE) == 0
    assert twin.root == guest.second.root

    # The same page of two guests.
    second = PageTable(bench.memory, bench.allocator, scheme=SV39X4, features=bench.features)
    second.map_page(0x6000_0000, 0x44_0000_0000, perms="rwu")
    for device, table, GSCID in ((5, guest.second, 9), (6, second, 10)):
        bench.directory.set(device, DeviceContext().with_second_stage(SV39X4, table.root, GSCID=GSCID))
    for device in (5, 6, 5, 6):
        assert await bench.check(device, 0x6000_0000, WRITE) == 0
    assert await reads(0x6000_0000, device=5) == await reads(0x6000_0000, device=6) == 0

    # Superpages around an interrupt file are cut, others are not.
    guest.first.map_page(1 << 35, 0, size=1 << 30, perms="rwu")
    guest.second.map_page(guest.MSI & -(1 << 21), 0x66_0000_0000, size=1 << 21, perms="rwu")
    guest.second.map_page((guest.MSI & -(1 << 21)) + (1 << 21), 0x66_0020_0000, size=1 << 21, perms="rwu")
    await bench.forget()
    for offset in (0x4000, 0x3000, 1 << 21, 0x5000, 0):
        assert await bench.check(3, (1 << 35) + guest.MSI + offset, WRITE, 0x12345) == 0
    assert await reads((1 << 35) + guest.MSI + (1 << 21) + 0x7000, READ, 0x12345) == 0
    assert await reads((1 << 35) + guest.MSI + 0x2000, READ, 0x12345) > 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def no_stage_survives_its_invalidation(dut):
    """IOMMU-STAGE-5: entries of either stage, processes and MSIs change under traffic: after the invalidation never the old (R15, R27)."""
    bench = TranslatorBench(dut)
    await bench.begin()
    rng = bench.rng
    bench.latency = lambda: rng.randrange(1, 25)
    guest = Guest(bench)
    view, spare = guest.first.memory, 0x10_0000_0000
    tables = [PageTable(view, guest.allocator, scheme=SV48, features=bench.features) for _ in range(2)]
    pages = [0x7000_0000, 0x7000_1000, 0x7020_0000]
    for number, table in enumerate(tables):
        for n, page in enumerate(pages):
            table.map_page(page, 0x6000_0000 + (number << 16) + (n << 12), perms="rwxu")
        table.map_page(0x1000, guest.MSI + 0x1000, perms="rwxu")
    guest.directory.set(0x12345, replace(guest.process, fsc_ppn=tables[0].root >> 12, PSCID=20))
    turn, wanted, cookie, changes, strict = 0, {}, 0, Counter(), 0

    def now(page):
        """What a request must get: a mapping, as the model sees memory."""
        return bench.expected(3, page, WRITE, 0x12345).spa >> 12

    async def ask(page):
        nonlocal cookie
        wanted[cookie] = page, len(history[page]) - 1
        await bench.ask(cookie, 3, page, WRITE, 0x12345)
        cookie = (cookie + 1) % 256

    history = {page: [now(page)] for page in (*pages, 0x1000)}
    for step in range(250):
        if rng.random() < 0.2:
            kind = rng.choice(["first", "second", "table", "table", "process", "process", "msi", "all"])
            n, spare = rng.randrange(3), spare + 0x1000
            process, table = guest.directory.get(0x12345), tables[turn]
            if kind == "first":
                guest_page = 0x6000_0000 + (rng.randrange(512) << 12)
                table.unmap(pages[n])
                table.map_page(pages[n], guest_page, perms="rwxu")
                order = {"kind": InvalidateKind.VMA, "av": 1, "page": pages[n] >> 12, "gv": 1, "gscid": 9}
            elif kind == "second":
                guest_page = bench.expected(3, pages[n], WRITE, 0x12345).gpa & -4096
                guest.second.unmap(guest_page)
                guest.second.map_page(guest_page, spare, perms="rwxu")
                order = {"kind": InvalidateKind.GVMA, "av": 1, "page": guest_page >> 12, "gv": 1, "gscid": 9}
            elif kind == "msi":
                guest.messages.set(guest.MSI + 0x1000, MsiPte(spa=spare))
                order = {"kind": InvalidateKind.GVMA, "gv": 1, "gscid": 9}
            elif kind == "table":  # while the old one is being found
                await bench.forget(InvalidateKind.VMA)
                await ask(pages[n])
                await ClockCycles(dut.clk, rng.randrange(20, 120))
                leaf, new = table._slot(pages[n], 0), guest.allocator.page()
                entry = int.from_bytes(view.read(leaf, 8), "little") & 0x3FF | 0x6000_0000 >> 2 | rng.randrange(512) << 10
                view.write(new, view.read(leaf & -4096, 4096))
                view.write(new + leaf % 4096, entry.to_bytes(8, "little"))
                view.write(table._slot(pages[n], 1), (new >> 2 | 1).to_bytes(8, "little"))
                order = {"kind": InvalidateKind.VMA, "gv": 1, "gscid": 9}
            elif kind == "process":  # while the old one is being fetched
                await bench.forget(InvalidateKind.PDT, dv=1, device_id=3)
                await ask(pages[n])
                await ClockCycles(dut.clk, rng.randrange(40, 140))
                turn ^= 1
                guest.directory.set(0x12345, replace(process, fsc_ppn=tables[turn].root >> 12, PSCID=20 + turn))
                order = {"kind": InvalidateKind.PDT, "dv": 1, "device_id": 3}
            else:
                order = {"kind": InvalidateKind.ALL}
            changes[kind] += 1
            await bench.forget(**order)
            for page, values in history.items():
                values.append(now(page))
        else:
            await ask(rng.choice(list(history)))
            await ClockCycles(dut.clk, rng.choice([1, 1, 60, 200]))
        while True:
            for payload in bench.answers:
                answer = unpack(TranslateResponse, payload)
                page, oldest = wanted.pop(answer.cookie)
                legal = history[page][oldest:]
                assert not answer.fault and (len(legal) > 2 or answer.page in legal), f"step {step}: {page:#x} {vars(answer)}, {legal}"
                strict += len(legal) <= 2  # a walk may mix what two changes left
            bench.answers.clear()
            if len(wanted) < 5:
                break
            await RisingEdge(dut.clk)
    assert len(changes) == 6 and strict > 60, f"{changes} {strict}"
    await ClockCycles(dut.clk, 3000)
    assert len(bench.answers) == len(wanted)
    bench.answers.clear()
    for page in history:
        assert await bench.check(3, page, WRITE, 0x12345) == 0


def test_events(request):
    features = [*FULL, "HPM"]
    run(Translator(features=Features(**dict.fromkeys(features, True))), module=__name__, node=request.node.nodeid,
        params={"features": features, "levels": 2}, testcase="events_are_the_golden_ones")  # fmt: skip


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def events_are_the_golden_ones(dut):
    """IOMMU-HPM-3: random worlds, caches empty: misses and walks with their IDs as the model's; what faults may walk on."""
    bench = TranslatorBench(dut)
    await bench.begin()
    rng, told, seen = bench.rng, [], Counter()
    bench.latency = lambda: 1

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            events = unpack(Events, int(dut.events.value))
            ids = (events.device_id, events.process_id if events.process_id_valid else None,
                   events.GSCID if events.GSCV else None, events.PSCID if events.PSCV else None)  # fmt: skip
            told.extend((event, ids if event in IDT_EVENTS else ids[:2]) for event in Event if events.kinds >> event & 1)

    cocotb.start_soon(watch())
    for _ in range(5):
        worlds = {device: World(bench, number + 1) for number, device in enumerate((3, 0x2C))}
        for device, world in worlds.items():
            bench.directory.set(device, world.context)
        for _ in range(30):
            await bench.forget()
            told.clear()
            device = rng.choice(list(worlds))
            request = worlds[device].request(device)
            cause = await bench.check(device, request.iova, request.access, request.pid, request.priv)
            wanted = Counter((event, (ids.device_id, ids.process_id, ids.gscid, ids.pscid)[: 4 if event in IDT_EVENTS else 2])
                             for event, ids in bench.golden.events if event is not Event.UNTRANSLATED_REQUEST)  # fmt: skip
            missing, more = wanted - Counter(told), Counter(told) - wanted
            assert not missing and (cause or not more), f"cause {cause}: missing {missing}, too many {more}"
            seen.update(event for event, _ in told)
    assert set(seen) == set(Event) - {Event.NONE, Event.UNTRANSLATED_REQUEST, Event.TRANSLATED_REQUEST, Event.ATS_TRANSLATION_REQUEST}
