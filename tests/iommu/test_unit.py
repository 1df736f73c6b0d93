"""The whole IOMMU: programmed by the model's driver, tables and queues in memory, every answer one that is allowed."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.faults import AccessType, Cause, TranslationFault
from ringwall.models.iommu.registers import CommandQueueStopped, IommuDriver, IommuMode, RegisterFile
from ringwall.models.iommu.tables import Allocator, DeviceContext, PageTable
from ringwall.models.iommu.walk import Iommu as Golden
from ringwall.models.iommu.walk import PlainRegisters, Request
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.iommu.unit import Iommu
from ringwall.rtl.tlp.layouts import Burst, BurstStatus
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, unpack

POOL, DATA = 0x8000_0000, 0x1_0000_0000
WALKS = 8  # as the unit has by default
READ, WRITE = AccessType.READ, AccessType.WRITE


@pytest.mark.parametrize("width, strict", [(64, False), (256, True)])
def test_unit(request, width, strict):
    run(Iommu(width=width, strict=strict), module=__name__, node=request.node.nodeid, params={"width": width, "strict": strict})


class Bench(IommuHost):
    """The unit with the model's driver and two devices, each with its own table."""

    async def enable(self, rng, levels=3):
        await self.begin()
        self.rng = rng
        self.request, self.response, self.answers = Stream(self.dut, "translate_request"), Stream(self.dut, "translate_response"), {}
        self.response.set_ready(1)
        cocotb.start_soon(self._collect())
        self.allocator = Allocator(self.memory, POOL, 0x200_0000, rng=rng)
        self.driver = IommuDriver(0, self.memory, self.allocator, wide=rng.random() < 0.5)
        for v in range(4):
            await self.write(f"msi_addr_{v}", 0xFEE0_0000 + 16 * v)
            await self.write(f"msi_data_{v}", 0x40 + v)
            await self.write(f"msi_vec_ctl_{v}", 0)
        await self.perform(self.driver.init(levels))
        self.golden = Golden(self.memory, registers=PlainRegisters(ddtp=self.driver.directory.ddtp))
        self.tables, self.cookie = {}, 0
        for device in (0x08, 0x09):
            self.tables[device] = PageTable(self.memory, self.allocator)
            self.driver.directory.set(device, DeviceContext.sv39(self.tables[device].root, PSCID=device))
        return self

    async def _collect(self):
        seen = []
        cocotb.start_soon(self.response.watch(seen))
        while True:
            await RisingEdge(self.dut.clk)
            for payload in seen:
                answer = unpack(TranslateResponse, payload)
                assert answer.cookie not in self.answers
                self.answers[answer.cookie] = answer
            seen.clear()

    async def ask(self, device, iova, access):
        """Return the cookie of a request."""
        self.cookie = (self.cookie + 1) % 256
        self.answers.pop(self.cookie, None)
        await self.request.put(pack(TranslateRequest, device_id=device, is_write=access == WRITE, page=iova >> 12, offset=iova & 0xFFF,
                                    cookie=self.cookie))  # fmt: skip
        return self.cookie

    async def translate(self, device, iova, access=READ):
        """Return the physical address, or the cause of the fault."""
        cookie = await self.ask(device, iova, access)
        await self.until(lambda: cookie in self.answers, "the answer")
        answer = self.answers[cookie]
        return Cause(answer.cause) if answer.fault else answer.page << 12 | iova & 0xFFF

    def wanted(self, device, iova, access=READ):
        """What the golden walk says about the tables as they are now: address, or the fault."""
        try:
            return self.golden.translate(Request(device, iova, access)).spa
        except TranslationFault as fault:
            return fault


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def tables_to_answers_to_records(dut):
    """IOMMU-UNIT-1 (R24, R27): two devices, same IOVA: own pages only; after unmap and fence never the old; faults recorded in order."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"], latency=lambda: rng.randrange(10, 60)).enable(rng)
    driver, pages = bench.driver, [rng.getrandbits(26) << 12 for _ in range(6)]
    for device, table in bench.tables.items():
        for n, iova in enumerate(pages):
            table.map_page(iova, DATA + (device << 24) + (n << 12), perms=rng.choice(["rwu", "ru"]))
    for step in range(40):
        faults = []
        for _ in range(8):
            device = rng.choice([*bench.tables, 0x0A])
            iova, access = rng.choice(pages) + rng.randrange(4096), rng.choice([READ, WRITE])
            want = bench.wanted(device, iova, access)
            seen = await bench.translate(device, iova, access)
            if isinstance(want, TranslationFault):
                faults.append((want.cause, device, want.iotval & ~0xFFF))
                assert seen == want.cause, f"step {step}: device {device:#x} {iova:#x} {access} is {seen!r}"
            else:
                assert seen == want, f"step {step}: device {device:#x} {iova:#x} {access} is {seen!r}, not {want:#x}"
        await ClockCycles(dut.clk, 400)
        records = await bench.perform(driver.read_faults())
        assert [(r.cause, r.device_id, r.iotval & ~0xFFF) for r in records] == faults
        device, iova = rng.choice(list(bench.tables)), rng.choice(pages)
        table = bench.tables[device]
        if iova in table.mappings:
            table.unmap(iova)
        else:
            table.map_page(iova, DATA + (rng.getrandbits(12) << 12) + (device << 28), perms="rwu")
        kind = rng.randrange(3)
        if kind == 0:
            await bench.perform(driver.invalidate(iova=iova, pscid=device))
        elif kind == 1:
            await bench.perform(driver.invalidate())
        else:
            await bench.perform(driver.invalidate_context(device))
    assert [data[0] for _, _, data in bench.writes(0xFEE0_0000, 0xFEE1_0000)], "fault interrupts"
    assert {data[0] for _, _, data in bench.writes(0xFEE0_0000, 0xFEE1_0000)} == {0x41}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def modes(dut):
    """IOMMU-UNIT-2 (R28): at reset Bare (permissive) passes addresses unchanged, Off (strict) refuses with 256; then by software."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = Bench(dut, params()["width"])
    await bench.begin()
    assert await bench.read("ddtp") == RegisterFile(reset_mode=IommuMode.OFF if params()["strict"] else IommuMode.BARE).ddtp
    bench.request, bench.response, bench.answers, bench.cookie = Stream(dut, "translate_request"), Stream(dut, "translate_response"), {}, 0
    bench.response.set_ready(1)
    cocotb.start_soon(bench._collect())
    iova = rng.getrandbits(52) << 12 | 0x123
    bare, off = iova & (1 << 64) - 1, Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED
    assert await bench.translate(8, iova, WRITE) == (off if params()["strict"] else bare)
    for mode, want in ((IommuMode.OFF, off), (IommuMode.BARE, bare), (IommuMode.OFF, off)):
        await bench.write("ddtp", mode)
        await bench.until_register("ddtp", lambda value: not value & 16, "busy to clear")
        assert await bench.translate(8, iova, READ) == want


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def errors_and_the_next_good_one(dut):
    """IOMMU-UNIT-3: memory errors on walks, commands and records together: each reported where it belongs, then all works again."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"]).enable(rng, levels=1)
    driver, table = bench.driver, bench.tables[8]
    table.map_page(0x1000, DATA, perms="rwu")
    bench.broken[table.root >> 12] = BurstStatus.UR
    assert await bench.translate(8, 0x1000) == Cause.READ_ACCESS_FAULT
    bench.broken = {driver.cq_base >> 12: BurstStatus.TIMEOUT}
    with pytest.raises(CommandQueueStopped):
        await bench.perform(driver.invalidate())
    bench.broken = {driver.fq_base >> 12: BurstStatus.CA}
    assert await bench.translate(0x0A, 0x1000) == Cause.DDT_ENTRY_NOT_VALID
    await ClockCycles(dut.clk, 200)
    bench.broken = {}
    records = await bench.perform(driver.read_faults())
    assert [r.cause for r in records] == [Cause.READ_ACCESS_FAULT] and driver.fault_overflows == 1
    await bench.perform(driver.replace_stopped_command())
    await bench.perform(driver.fence())
    assert await bench.translate(8, 0x1000) == DATA
    assert await bench.translate(0x0A, 0x1000) == Cause.DDT_ENTRY_NOT_VALID
    await ClockCycles(dut.clk, 200)
    assert [r.cause for r in await bench.perform(driver.read_faults())] == [Cause.DDT_ENTRY_NOT_VALID]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def invalidation_under_traffic(dut):
    """IOMMU-UNIT-4: requests all the time while pages change: after the fence of a change no request gets the old page."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"], latency=lambda: rng.randrange(10, 80)).enable(rng)
    driver, table, iova = bench.driver, bench.tables[8], 0x40_0000
    table.map_page(iova, DATA, perms="rwu")
    allowed, stop, checked = [{DATA}], [], []

    async def traffic():
        while not stop:
            before = set(allowed[-1])
            seen = await bench.translate(8, iova)
            legal = before.union(*allowed[-3:])
            assert seen in legal, f"{seen!r} is not in {legal}"
            checked.append(seen)

    task = cocotb.start_soon(traffic())
    old = DATA
    for n in range(1, 25):
        new = DATA + (n << 12)
        allowed.append({old, new, Cause.READ_PAGE_FAULT})
        table.unmap(iova)
        table.map_page(iova, new, perms="rwu")
        await bench.perform(driver.invalidate(iova=iova, pscid=8))
        allowed[:] = [{new}]
        await ClockCycles(dut.clk, rng.randrange(200))
        old = new
    stop.append(1)
    await task
    assert len(set(checked)) > 12


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def fences_wait_for_prefetches(dut):
    """IOMMU-UNIT-5 (R15): a prefetch walks slowly, nobody waits for it: when a fence behind an invalidation is over, so are its reads."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"]).enable(rng)
    table = bench.tables[0x08]
    for page in range(3):
        iova = 0x1000_0000 + 0x4000_0000 * page
        table.map_page(iova, DATA, perms="rwu")
        bench.latency = lambda: 300
        await bench.request.put(pack(TranslateRequest, device_id=0x08, page=iova >> 12, is_prefetch=1))
        await ClockCycles(dut.clk, rng.randrange(200))
        await bench.perform(bench.driver.invalidate())
        seen = len(bench.bursts)
        await ClockCycles(dut.clk, 1500)
        assert len(bench.bursts) == seen, "read behind the fence"
        bench.latency = lambda: 20
        await bench.perform(bench.driver.invalidate_context(0x08))
    assert await bench.translate(0x08, iova) == DATA


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def reads_that_memory_must_take(dut):
    """IOMMU-UNIT-6: while memory answers nothing it is asked a read for each walk and one for the command queue, and no more."""
    bench = await Bench(dut, params()["width"]).enable(random.Random(cocotb.RANDOM_SEED))
    pages = [0x1000_0000 + 0x4000_0000 * n for n in range(12)]
    for iova in pages:
        bench.tables[0x08].map_page(iova, DATA + iova, perms="rwu")
    assert await bench.translate(0x08, pages[0]) == DATA + pages[0]
    bench.latency, asked = lambda: 1500, []
    cocotb.start_soon(Stream(dut, "bursts").watch(asked))
    cookies = [await bench.ask(0x08, iova, READ) for iova in pages[1:]]
    task = cocotb.start_soon(bench.perform(bench.driver.fence()))
    await ClockCycles(dut.clk, 1000)
    assert [unpack(Burst, burst).is_write for burst in asked] == [0] * (WALKS + 1)
    bench.latency = lambda: 20
    await task
    await bench.until(lambda: all(cookie in bench.answers for cookie in cookies), "the answers")
