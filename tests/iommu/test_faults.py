"""The fault queue behind its registers, in memory, beside the golden queue."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.faults import FaultQueue, FaultRecord, broken_record_rules
from ringwall.models.iommu.registers import FQ_RW1C, QueueCsr, RegisterFile
from ringwall.models.memory import AccessFault, GuestMemory
from ringwall.rtl.iommu.faults import Faults
from ringwall.rtl.iommu.interface import ProgrammingInterface
from ringwall.rtl.iommu.layouts import FaultReport
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack

QUEUE = 0x8000_0000


@pytest.mark.parametrize("width", [64, 512])
def test_faults(request, width):
    run(ProgrammingInterface(width=width), module=__name__, node=request.node.nodeid, params={"width": width})


def test_faults_parameters():
    """IOMMU-FQ-1: a queue of reports that is too short is refused with a sentence."""
    with pytest.raises(ValueError, match="Depth must be an integer of at least 2, not 1"):
        Faults(depth=1)


class Bench(IommuHost):
    """The fault queue on, with 2 ** ``log2`` entries."""

    async def enable(self, log2=3):
        await self.begin()
        self.reports = Stream(self.dut, "reports")
        await self.turn_on(log2)
        return self

    async def turn_on(self, log2):
        self.log2, self.head = log2, 0
        await self.write("fqcsr", 0)
        await self.until_register("fqcsr", lambda value: not value & 3 << 16, "fqon to fall")
        await self.write("fqb", QUEUE >> 2 | log2 - 1)
        await self.write("fqh", 0)
        await self.write("fqcsr", QueueCsr.EN | QueueCsr.IE)
        await self.until_register("fqcsr", lambda value: value & QueueCsr.ON, "fqon")
        await self.write("ipsr", 3)

    async def report(self, record):
        pv = record.process_id is not None
        await self.reports.put(pack(FaultReport, cause=int(record.cause), ttyp=int(record.ttyp), device_id=record.device_id,
                                    process_id_valid=pv, process_id=record.process_id or 0, privileged=record.priv,
                                    iotval=record.iotval, iotval2=record.iotval2))  # fmt: skip

    def entry(self, index):
        return self.memory.read(QUEUE + 32 * index, 32)


class Refusing:
    """A memory that refuses everything."""

    def read(self, address, length):
        raise AccessFault(address, length, False, "unmapped")

    def write(self, address, data):
        raise AccessFault(address, len(data), True, "unmapped")


def a_record(rng):
    pid = rng.getrandbits(20) if rng.random() < 0.5 else None
    return FaultRecord(cause=rng.choice([13, 15, 5, 7, 256, 257, 258, 259, 260, 268, 274]), ttyp=rng.choice([1, 2, 3]),
                       device_id=rng.getrandbits(24), process_id=pid, priv=pid is not None and rng.random() < 0.5,
                       iotval=rng.getrandbits(64), iotval2=rng.getrandbits(64))  # fmt: skip


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def records_are_the_golden_ones(dut):
    """IOMMU-FQ-2: random reports, readers, overflows, memory errors: records, fqt, fqcsr, ipsr as the golden queue, over many wraps."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"]).enable()
    kinds = set()
    for log2 in (1, 2, 5):
        await bench.turn_on(log2)
        registers, memory = RegisterFile(), GuestMemory()
        registers.write(0x28, 8, QUEUE >> 2 | log2 - 1)
        registers.write(0x4C, 4, 3)
        golden = FaultQueue(registers, memory)
        bench.memory.write(QUEUE, bytes(4096))
        for _ in range(60):
            burst = [a_record(rng) for _ in range(rng.choice([1, 1, 2, 5]))]
            broken = rng.random() < 0.08
            if broken:
                bench.broken[QUEUE >> 12] = rng.choice([BurstStatus.UR, BurstStatus.RESET])
                golden.memory = Refusing()
            for record in burst:
                await bench.report(record)
                golden.report(record)
            await ClockCycles(dut.clk, 60 * len(burst) + 40)
            bench.broken.clear()
            golden.memory = memory
            assert await bench.read("fqt") == registers.fqt
            assert await bench.read("fqcsr") & FQ_RW1C == registers.fqof << 9 | registers.fqmf << 8
            assert await bench.read("ipsr") == registers.read(0x54, 4)
            assert bench.memory.read(QUEUE, 4096) == memory.read(QUEUE, 4096)
            kinds |= {(registers.fqof, registers.fqmf)}
            if rng.random() < 0.5:  # software reads all, clears
                await bench.write("fqh", registers.fqt)
                registers.write(0x30, 4, registers.fqt)
                for name, offset, value in (("ipsr", 0x54, 2), ("fqcsr", 0x4C, int(3 | FQ_RW1C)), ("ipsr", 0x54, 2)):
                    await bench.write(name, value)
                    registers.write(offset, 4, value)
    assert kinds == {(False, False), (True, False), (False, True)}
    assert not broken_record_rules(bench.entry(0))


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def record_before_tail(dut):
    """IOMMU-FQ-3: whenever fqt has moved, also when memory is slow, the record is there; a slow memory only delays reports."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"]).enable(5)
    records = [a_record(rng) for _ in range(20)]

    async def tell():
        for record in records:
            await bench.report(record)

    cocotb.start_soon(tell())
    seen = 0
    while seen < len(records):
        tail = await bench.read("fqt")
        for n in range(seen, tail):
            assert bench.entry(n) == records[n].pack(), f"fqt is {tail}, record {n} is not there"
        seen = tail
    assert await bench.read("ipsr") == 2


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def full_or_off_never_blocks(dut):
    """IOMMU-FQ-4: with the queue full, failing or off 100 reports are taken at once; off drops silently; after clearing records go on."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"]).enable(1)
    await bench.report(a_record(rng))
    await ClockCycles(dut.clk, 100)
    assert await bench.read("fqt") == 1
    before = len(bench.bursts)
    for _ in range(100):
        await bench.report(a_record(rng))
    await ClockCycles(dut.clk, 20)
    assert await bench.read("fqcsr") & FQ_RW1C == QueueCsr.OF
    await bench.write("fqh", 1)
    for _ in range(3):
        await bench.report(a_record(rng))
    await ClockCycles(dut.clk, 100)
    assert await bench.read("fqt") == 1 and len(bench.bursts) == before, "dropped while fqof is set"
    await bench.write("fqcsr", 3 | FQ_RW1C)
    await bench.report(a_record(rng))
    await bench.until_register("fqt", lambda value: value == 0, "the next record")
    await bench.write("fqcsr", 0)
    await bench.until_register("fqcsr", lambda value: not value & 3 << 16, "fqon to fall")
    before = len(bench.bursts)
    for _ in range(50):
        await bench.report(a_record(rng))
    await ClockCycles(dut.clk, 100)
    assert await bench.read("fqcsr") == 0 and len(bench.bursts) == before and await bench.read("fqt") == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def off_waits_for_the_record(dut):
    """IOMMU-FQ-5: switched off while a record is written the queue is busy until the write ended; then nothing is written."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, params()["width"]).enable(3)
    for _ in range(3):
        await bench.report(a_record(rng))
    await bench.write("fqcsr", 0)
    busy = await bench.read("fqcsr") & 3 << 16
    await bench.until_register("fqcsr", lambda value: not value & 3 << 16, "fqon to fall")
    count = len(bench.bursts)
    await ClockCycles(dut.clk, 200)
    assert len(bench.bursts) == count
    assert busy == 3 << 16, "the write of a record was under way"
    assert await bench.read("fqt") == count
