"""Debug translation of the whole IOMMU beside the golden unit, while the gate has its own requests."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.entries import SV39, SV39X4
from ringwall.models.iommu.faults import RECORD_BYTES, AccessType, FaultRecord
from ringwall.models.iommu.registers import Capabilities, register_list
from ringwall.models.iommu.tables import (
    Allocator,
    DeviceContext,
    DeviceDirectory,
    MsiPte,
    MsiTable,
    PageTable,
    ProcessContext,
    ProcessDirectory,
)
from ringwall.models.iommu.unit import Unit
from ringwall.models.iommu.walk import Implementation, Request
from ringwall.rtl.config import EndpointConfig, IommuConfig
from ringwall.rtl.core import Core
from ringwall.rtl.iommu.debug import COOKIE, Debug
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.iommu.unit import Iommu
from ringwall.rtl.spec import riscv_iommu_registers as spec
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, random_ready, start, unpack

FEATURES = dict.fromkeys(["Svpbmt", "Sv39x4", "PD8", "MSI_FLAT", "DBG"], True)
SIZES = (4096, 1 << 16, 1 << 21, 1 << 30) * 2  # of the pages from GUEST on, 2 GiB apart
POOL, QUEUE, GOLDEN_QUEUE = 0x8000_0000, 0x9000_0000, 0xA000_0000
IOVA, CTL, RESPONSE = 0x258, 0x260, 0x268
MSI, GUEST = 0x2800_0000, 0x4000_0000


def test_debug(request):
    run(Iommu(width=64, features=Features(**FEATURES)), module=__name__, node=request.node.nodeid,
        testcase=["responses_are_the_golden_ones", "beside_the_gate", "writes_while_busy_are_ignored"])  # fmt: skip


def test_debug_alone(request):
    run(Debug(), module=__name__, node=request.node.nodeid, testcase="what_is_offered_stays")


def test_debug_registers():
    """IOMMU-DBG-1: both register lists agree name by name; a gate that would use the cookie is refused with a sentence."""
    plain = {r.name for r in register_list(Capabilities())}
    theirs = {(r.name, r.offset, r.width, r.access) for r in register_list(Capabilities(DBG=True)) if r.name not in plain}
    assert {(r.name, r.offset, r.width, r.access) for r in spec.FEATURE_REGISTERS["DBG"]} == theirs
    config = EndpointConfig()
    with pytest.raises(ValueError, match="Clients of a card with debug translation must be at most 31, not 32"):
        Core(width=64, functions=(), clients=[None] * 32, registers=(), iommu=IommuConfig(DBG=True), strict=config.strict, tags=32,
             wall_tags=8, completion_timeout_cycles=1000)  # fmt: skip


class Bench(IommuHost):
    """Devices of each kind at random; the golden unit has a fault queue of its own. ``places``: addresses worth asking for."""

    async def enable(self):
        await self.begin()
        rng = self.rng = random.Random(cocotb.RANDOM_SEED)
        memory, allocator = self.memory, Allocator(self.memory, POOL, 0x100_0000, rng=rng)
        features = Capabilities(**FEATURES).switched_on()
        self.golden = Unit(memory, Capabilities(**FEATURES), implementation=Implementation(bare_size=4096))
        directory = DeviceDirectory(memory, allocator, levels=2, features=features, extended=True)

        def table(scheme, guest=False):
            found = PageTable(memory, allocator, scheme=scheme, features=features)
            for n, size in enumerate(SIZES):
                perms = "rwxu" if guest or n == 0 else rng.choice(["rwxu", "ru", "rwx", "xu"])
                found.map_page(GUEST + (n << 31), (0x1_0000_0000 if guest else GUEST + (rng.randrange(8) << 31)) + (n << 31), size=size,
                               perms=perms, pbmt=rng.randrange(3))  # fmt: skip
            found.map_page(0x5000, MSI + 0x1000 * rng.randrange(2), perms="rwxu")
            return found

        first, second = table(SV39), table(SV39X4, guest=True)
        messages = MsiTable(memory, allocator, mask=1, pattern=MSI >> 12)
        messages.set(MSI, MsiPte(spa=0x9900_0000))
        processes = ProcessDirectory(memory, allocator, levels=1, features=features)
        for pid in range(3):
            processes.set(pid, ProcessContext.first_stage(SV39, table(SV39).root, PSCID=pid, ENS=pid != 1, SUM=pid == 2))
        guest = DeviceContext().with_second_stage(SV39X4, second.root, GSCID=4)
        guest = guest.with_msi_table(messages.root, mask=1, pattern=MSI >> 12)
        self.devices = {1: DeviceContext(), 2: DeviceContext.first_stage(SV39, first.root, PSCID=5), 3: guest,
                        4: DeviceContext.process_directory(processes.pdtp, DPE=True),
                        5: DeviceContext.first_stage(SV39, first.root, PSCID=6, DTF=True)}  # fmt: skip
        for number, context in self.devices.items():
            directory.set(number, context)
        for registers in (self, self.golden.registers):
            queue = QUEUE if registers is self else GOLDEN_QUEUE
            for offset, size, value in ((0x28, 8, queue >> 2 | 11), (0x4C, 4, 1), (0x10, 8, directory.ddtp)):
                if registers is self:
                    await self.bus.write(offset, value, size)
                else:
                    registers.write(offset, size, value)
        self.request, self.response, self.answers = Stream(self.dut, "translate_request"), Stream(self.dut, "translate_response"), []
        cocotb.start_soon(self.response.watch(self.answers))
        return self

    def asked(self):
        """Return IOVA and control of a request worth making."""
        rng, device = self.rng, self.rng.choice([1, 2, 3, 4, 5, 5, 6, 1 << 20])
        pages = [GUEST + (n << 31) + rng.randrange(size) for n, size in enumerate(SIZES)]
        iova = rng.choice([0x5000, MSI, MSI + 4096, rng.getrandbits(64), *pages * 2])
        pid, has_pid = rng.choice([0, 1, 2, 3, 300]), rng.random() < (0.7 if device == 4 else 0.1)
        access = rng.choice([0, 8, 8 | 4])
        return iova, device << 40 | has_pid << 32 | pid << 12 | access | rng.getrandbits(1) << 1 | 1

    async def debug(self, iova, control):
        """Return tr_response, as the circuit and as the model have it."""
        garbage = self.rng.getrandbits(12) & 0xFFF
        await self.bus.write(IOVA, iova & -4096 | garbage, 8)
        if self.rng.random() < 0.5:
            await self.bus.write(CTL, control | 0xFF0 | 0xFE << 32, 8)
        else:
            await self.bus.write(CTL + 4, control >> 32)
            await self.bus.write(CTL, control & 0xFFFF_FFFF)
        self.golden.registers.write(IOVA, 8, iova & -4096)
        self.golden.registers.write(CTL, 8, control)
        assert self.golden.translate_for_debug()
        for _ in range(300):
            if not (seen := await self.bus.read(CTL, 8)) & 1:
                break
        assert seen == self.golden.registers.read(CTL, 8) == control & ~1
        assert await self.bus.read(IOVA, 8) == iova & -4096
        return await self.bus.read(RESPONSE, 8), self.golden.registers.read(RESPONSE, 8)

    def records(self, base, count):
        return [FaultRecord.unpack(self.memory.read(base + RECORD_BYTES * n, RECORD_BYTES)) for n in range(count)]


def covers(response):
    """Return the first page of an answer, and how many there are. [RVIOMMU1.0 6.26]"""
    ppn = response >> 10 & (1 << 44) - 1
    if not response >> 9 & 1:
        return ppn, 1
    low = (ppn ^ ppn + 1) + 1
    return ppn & -low, low


def walked(bench, device, iova):
    """Return what the golden walk says to a read."""
    return bench.golden.translate(Request(device, iova, AccessType.READ)).spa


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def responses_are_the_golden_ones(dut):
    """IOMMU-DBG-2: random devices, addresses, access, privilege: tr_response, the request read back and fault records as the model's."""
    bench = await Bench(dut, 64, latency=lambda: 3).enable()
    bench.response.set_ready(1)
    assert Capabilities.from_value(await bench.read("capabilities")).DBG
    faults, large = 0, 0
    for n in range(250):
        iova, control = bench.asked()
        seen, wanted = await bench.debug(iova, control)
        what = f"{n}: {iova:#x} {control:#x}: {seen:#x}, not {wanted:#x}"
        faults, large = faults + (wanted & 1), large + (wanted >> 9 & 1)
        if wanted & 1:
            assert seen & 1, what
        else:  # a smaller page may be reported
            (page, count), (golden_page, golden_count) = covers(seen), covers(wanted)
            assert not seen & 1 and seen >> 7 & 3 == wanted >> 7 & 3 and seen >> 54 == 0, what
            assert count <= golden_count and page & -golden_count == golden_page and (golden_count > 1) == (count > 1), what
            assert page & golden_count - 1 == iova >> 12 & golden_count - 1 & -count, what
    assert not bench.answers, "nothing goes to the gate"
    assert faults > 30 and large > 30
    await bench.until_register("fqt", lambda fqt: fqt == bench.golden.registers.fqt, "the records")
    assert bench.records(QUEUE, bench.golden.registers.fqt) == bench.records(GOLDEN_QUEUE, bench.golden.registers.fqt)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def beside_the_gate(dut):
    """IOMMU-DBG-3: requests in every cycle, answers taken now and then: the gate gets its own, once each, and debug its answer."""
    bench = await Bench(dut, 64, latency=lambda: 3).enable()
    rng, stop, asked = bench.rng, [], []

    async def traffic():
        while not stop:
            while len(asked) - len(bench.answers) > 200:
                await RisingEdge(dut.clk)
            batch = [(len(asked) + n) % 255 for n in range(40)]
            asked.extend(batch)
            await bench.request.put_many(pack(TranslateRequest, device_id=1, page=rng.getrandbits(52) & ~0xFF | cookie, cookie=cookie)
                                         for cookie in batch)  # fmt: skip

    async def taking():
        while True:
            bench.response.set_ready(rng.random() < 0.7)
            await RisingEdge(dut.clk)

    cocotb.start_soon(taking())
    task = cocotb.start_soon(traffic())
    for _ in range(60):
        iova, control = bench.asked()
        seen, wanted = await bench.debug(iova, control)
        assert seen & 1 == wanted & 1 and (wanted & 1 or seen >> 7 & 3 == wanted >> 7 & 3)
    stop.append(1)
    await task
    await bench.until(lambda: len(bench.answers) == len(asked), "all answers")
    answers = [unpack(TranslateResponse, payload) for payload in bench.answers]
    assert sorted(answer.cookie for answer in answers) == sorted(asked) and len(asked) > 1000
    assert all(not answer.fault and answer.page & 0xFF == answer.cookie for answer in answers)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def writes_while_busy_are_ignored(dut):
    """IOMMU-DBG-4: with Go/Busy 1 neither register changes, the request is as it was; without Go nothing is asked."""
    bench = await Bench(dut, 64, latency=lambda: 200).enable()
    bench.response.set_ready(1)
    await bench.bus.write(IOVA, GUEST, 8)
    await bench.bus.write(CTL, 2 << 40 | 8, 8)
    await ClockCycles(dut.clk, 300)
    assert not bench.bursts and await bench.bus.read(RESPONSE, 8) == 0
    await bench.bus.write(CTL, 2 << 40 | 9, 8)
    await bench.bus.write(IOVA, 0, 8)
    await bench.bus.write(CTL, 6 << 40, 8)
    assert (await bench.bus.read(IOVA, 8), await bench.bus.read(CTL, 8)) == (GUEST, 2 << 40 | 9)
    await bench.until(lambda: len(bench.bursts) == 1, "the first read")
    assert bench.bursts[0][1].address & 0xFFF == 0, "the directory"
    for _ in range(600):
        if not await bench.bus.read(CTL, 8) & 1:
            break
    assert await bench.bus.read(RESPONSE, 8) >> 10 == walked(bench, 2, GUEST) >> 12


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def what_is_offered_stays(dut):
    """IOMMU-DBG-5: a translator that stalls: an offered request is not withdrawn or changed, none is lost, debug has its turn."""
    await start(dut)
    rng, asked = random.Random(cocotb.RANDOM_SEED), []
    request, asks, answer = (Stream(dut, name) for name in ("request", "translate_request", "translate_response"))
    cocotb.start_soon(asks.watch(asked))  # it checks the first half
    cocotb.start_soon(random_ready(asks, rng, 0.4))
    sent = [pack(TranslateRequest, cookie=n % 255, page=rng.getrandbits(52)) for n in range(400)]
    task = cocotb.start_soon(request.put_many(sent, lambda: rng.choice([0, 0, 1, 5])))
    for n in range(20):
        await ClockCycles(dut.clk, rng.randrange(1, 6))
        dut.bank__at.value, dut.bank__data.value, dut.bank__write.value = CTL // 8, n << 40 | 1, 0xFF
        await RisingEdge(dut.clk)
        dut.bank__write.value = 0
        while sum(unpack(TranslateRequest, payload).cookie == COOKIE for payload in asked) == n:
            await RisingEdge(dut.clk)
        await ClockCycles(dut.clk, 10)
        await answer.put(pack(TranslateResponse, cookie=COOKIE))
    await task
    await ClockCycles(dut.clk, 10)
    requests = [(payload, unpack(TranslateRequest, payload)) for payload in asked]
    assert [payload for payload, one in requests if one.cookie != COOKIE] == sent
    assert [one.device_id for _, one in requests if one.cookie == COOKIE] == list(range(20))
