"""Performance counters: alone beside the golden register file, and behind the registers of the whole IOMMU."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.hpm import Event, EventIds, EventSelector
from ringwall.models.iommu.registers import Capabilities, Ipsr, RegisterFile, register_list
from ringwall.models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, PageTable
from ringwall.rtl.iommu.counters import Counters
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import Events, TranslateRequest
from ringwall.rtl.iommu.unit import Iommu
from ringwall.rtl.spec import riscv_iommu_registers as spec
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, start

OVF, INH, CYCLES, CTR, EVT = 0x58, 0x5C, 0x60, 0x68, 0x160
POOL = 0x8000_0000


@pytest.mark.parametrize("count", [1, 4])
def test_counters(request, count):
    run(Counters(count=count), module=__name__, node=request.node.nodeid, params={"count": count}, testcase="counters_are_the_golden_ones")


def test_counters_of_the_unit(request):
    run(Iommu(width=64, features=Features(HPM=True, counters=4)), module=__name__, node=request.node.nodeid, params={"count": 4},
        testcase="counted_through_the_registers")  # fmt: skip


def test_counters_parameters():
    """IOMMU-HPM-1: numbers of counters out of range are refused with a sentence; both register lists agree name by name."""
    for make in (lambda count: Counters(count=count), lambda count: Features(HPM=True, counters=count)):
        for bad in (0, 32):
            with pytest.raises(ValueError, match=f"Event counters must be 1 to 31, not {bad}"):
                make(bad)
    plain = {r.name for r in register_list(Capabilities())}
    theirs = {(r.name, r.offset, r.width, r.access) for r in register_list(Capabilities(HPM=True), counters=31) if r.name not in plain}
    assert {(r.name, r.offset, r.width, r.access) for r in spec.FEATURE_REGISTERS["HPM"]} == theirs


class Lockstep:
    """Events, writes and reads of each cycle, on the counters and on the model.

    Events of a cycle are judged one cycle later in front of what is written then, and counted in the cycle after that; a counter that is
    written does not count then.
    """

    def __init__(self, dut, count):
        self.dut, self.model = dut, RegisterFile(Capabilities(HPM=True), counters=count)
        self.rng, self.count = random.Random(cocotb.RANDOM_SEED), count
        self.happened, self.judged, self.planned, self.counted, self.word = [], [], [], 0, 0
        self.device_ids, self.ids = [self.rng.getrandbits(24) for _ in range(2)], [self.rng.getrandbits(20) for _ in range(2)]
        self.device_ids += [self.device_ids[0] ^ 1, self.device_ids[0] | 7, 0xFFFFFF]

    def selector(self):
        rng, wide = self.rng, self.rng.random() < 0.5
        device = rng.choice(self.device_ids) & (0xFFFFFF if wide else 0xFFFF)
        if rng.random() < 0.5:
            device = device & -16 | rng.choice([0, 1, 3, 7, 5, 0xF])
        event = rng.choice([*Event, *Event, *Event, 9, 16 + Event.TLB_MISS, 0x4000 + Event.DDT_WALK, 0x7FFF])
        return EventSelector(event, rng.random() < 0.5, rng.choice(self.ids), device, rng.random() < 0.3, rng.random() < 0.4,
                             rng.random() < 0.4)  # fmt: skip

    def events(self, kinds):
        """Return the payload of some events, and the model's list of them."""
        rng = self.rng
        happens = [event for event in kinds if rng.random() < 0.6]
        ids = EventIds(rng.choice(self.device_ids), *(rng.choice([None, *choice]) for choice in
                       (self.ids, [device & 0xFFFF for device in self.device_ids], self.ids)))  # fmt: skip
        if kinds[0] < Event.TLB_MISS:
            ids = EventIds(ids.device_id, ids.process_id)
        others = {"process_id": self.ids[0], "GSCID": self.device_ids[0] & 0xFFFF, "PSCID": self.ids[0]}
        fields = {}
        for valid, name, number in (("process_id_valid", "process_id", ids.process_id), ("GSCV", "GSCID", ids.gscid),
                                    ("PSCV", "PSCID", ids.pscid)):  # fmt: skip
            fields |= {valid: number is not None, name: others[name] if number is None else number}  # what is not valid looks as if it were
        payload = pack(Events, kinds=sum(1 << event for event in happens), device_id=ids.device_id, **fields)
        return payload, [(event, ids) for event in happens]

    def write(self):
        """Return offset of a word, enabled bytes and value of a random write, or None."""
        rng = self.rng
        if not self.planned and rng.random() < 0.05:  # OF is cleared about when its counter overflows
            n, selector = 8 * rng.randrange(self.count), EventSelector(rng.choice(list(Event)[1:])).value
            self.planned = [(EVT + n, 0xFF, selector | (rng.random() < 0.7) << 63), (CTR + n, 0xFF, (1 << 64) - rng.randrange(1, 4)),
                            *[None] * rng.randrange(8), (EVT + n, 0xFF, selector)]  # fmt: skip
        if self.planned:
            return self.planned.pop(0)
        if rng.random() < 0.6:
            return None
        n = rng.randrange(1, self.count + 2)  # one more than there are
        high = (1 << 64) - rng.randrange(1, 6)
        where, value = rng.choice([
            (OVF, rng.getrandbits(64) & rng.getrandbits(64)), (CYCLES, rng.choice([high, high >> 1, rng.getrandbits(64)])),
            (CTR + 8 * (n - 1), rng.choice([high, high, rng.getrandbits(64)])),
            *[(EVT + 8 * (n - 1), self.selector().value | (rng.random() < 0.2) << 63)] * 2,
        ])  # fmt: skip
        return where, rng.choice([0x0F, 0xF0]) if where == OVF or rng.random() < 0.4 else 0xFF, value

    def apply(self, write):
        """What the write does in the model."""
        if write is None:
            return
        where, enable, value = write
        if enable == 0xFF:
            self.model.write(where, 8, value)
        else:
            self.model.write(where + 4 * (enable == 0xF0), 4, value >> 32 if enable == 0xF0 else value & 0xFFFF_FFFF)

    async def step(self, write=None):
        """One cycle; return the word that is read in it and what it is to be, and whether ``overflow`` is to pulse."""
        dut, model, rng = self.dut, self.model, self.rng
        requests, asked = self.events([Event.UNTRANSLATED_REQUEST, Event.TRANSLATED_REQUEST, Event.ATS_TRANSLATION_REQUEST])
        walks, walked = self.events(list(Event)[Event.TLB_MISS :])
        words = [OVF, CYCLES, *(base + 8 * n for base in (CTR, EVT) for n in range(self.count + 1)), 0x10, 0x258]
        at = write[0] if write else rng.choice(words)
        dut.requests.value, dut.walks.value = requests, walks
        access = write is not None or rng.random() < 0.8
        dut.bank__access.value, dut.bank__at.value = access, at // 8
        dut.bank__write.value, dut.bank__data.value = write[1:] if write else (0, rng.getrandbits(64))
        if access:
            self.word = (model.read(at, 4) | model.read(at + 4, 4) << 32) if at in words[:-2] else 0
        word = self.word
        await RisingEdge(dut.clk)
        counting, self.judged, self.happened = self.judged, model.counted(self.happened), asked + walked
        if at != CYCLES or not write:
            model.tick(1)
        self.apply(write)
        for n in counting:
            if at != CTR + 8 * (n - 1) or not write:
                model.advance(n)
                self.counted += 1
        is_raised = bool(model.read(0x54, 4) & Ipsr.PMIP)
        model.write(0x54, 4, Ipsr.PMIP)
        return at, word, is_raised


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def counters_are_the_golden_ones(dut):
    """IOMMU-HPM-2: random events, filters, inhibits, overflows and writes in every cycle: counters, OF and pulses as the model's."""
    await start(dut)
    lockstep = Lockstep(dut, params()["count"])
    for _ in range(2):
        await lockstep.step((CYCLES, 0xFF, 0))
    expected, raised = await lockstep.step(), 0
    for cycle in range(4000):
        at, word, is_raised = expected
        expected = await lockstep.step(lockstep.write())
        seen = int(dut.bank__word.value)
        assert seen == word, f"cycle {cycle}: the word at {at:#x} is {seen:#x}, not {word:#x}"
        assert int(dut.overflow.value) == is_raised, f"cycle {cycle}: overflow"
        raised += is_raised
    dut._log.info("%d counted, %d overflows", lockstep.counted, raised)
    assert raised > 50 and lockstep.counted > 500


class Bench(IommuHost):
    """The unit with its counters set, a device with pages, interrupts on vector 2."""

    async def word(self, offset, value=None):
        """Write a 64-bit register, or return it."""
        if value is None:
            return await self.bus.read(offset, 8)
        return await self.bus.write(offset, value, 8)

    async def ask(self, iova):
        """Have a page translated."""
        await self.request.put(pack(TranslateRequest, device_id=3, page=iova >> 12))
        await self.answers.get()


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def counted_through_the_registers(dut):
    """IOMMU-HPM-4: requests, misses, walks and cycles by the registers, filters, inhibit; overflow: OF, iocountovf, pmip, its message."""
    bench = await Bench(dut, 64, hold=lambda: 2).begin()
    allocator = Allocator(bench.memory, POOL, 0x10_0000, rng=random.Random(cocotb.RANDOM_SEED))
    table, directory = PageTable(bench.memory, allocator), DeviceDirectory(bench.memory, allocator, levels=1)
    directory.set(3, DeviceContext.sv39(table.root, PSCID=7))
    for n in range(4):
        table.map_page(n << 12, 0x9000_0000 + (n << 12))
    assert Capabilities.from_value(await bench.read("capabilities")).HPM
    bench.request, bench.answers = Stream(dut, "translate_request"), Stream(dut, "translate_response")
    await bench.write("icvec", 0x7FF)
    assert await bench.read("icvec") == 0x333, "4 vectors; no page requests"
    await bench.write("icvec", 0x200)
    for name, value in (("msi_addr_2", 0xFEE0_0000), ("msi_data_2", 0x42), ("msi_vec_ctl_2", 0), ("ddtp", directory.ddtp)):
        await bench.write(name, value)
    await bench.bus.write(INH, 0x1E)
    selectors = [EventSelector(Event.UNTRANSLATED_REQUEST), EventSelector(Event.TLB_MISS, pid_pscid=7, pv_pscv=True, idt=True),
                 EventSelector(Event.FIRST_STAGE_WALK, did_gscid=1, dv_gscv=True, dmask=True), EventSelector(Event.DDT_WALK)]  # fmt: skip
    for n, selector in enumerate(selectors):
        await bench.word(EVT + 8 * n, selector.value)
    await bench.ask(0)
    assert [await bench.word(CTR + 8 * n) for n in range(4)] == [0] * 4, "inhibited"
    await bench.bus.write(INH, 0x01)
    cycles = await bench.word(CYCLES)
    for n in (0, 1, 2, 3, 3, 2):
        await bench.ask(n << 12)
    assert [await bench.word(CTR + 8 * n) for n in range(4)] == [6, 3, 3, 0]
    assert await bench.word(CYCLES) == cycles
    await bench.word(CTR, (1 << 64) - 2)
    cocotb.start_soon(bench.request.put_many(pack(TranslateRequest, device_id=3, page=n % 4) for n in range(5)))
    await ClockCycles(dut.clk, 20)  # a request that waits counts once
    for _ in range(5):
        await bench.answers.get()
    await ClockCycles(dut.clk, 60)
    assert await bench.word(CTR) == 3 and await bench.word(EVT) == selectors[0].value | 1 << 63 and await bench.bus.read(OVF) == 2
    assert await bench.read("ipsr") == Ipsr.PMIP
    assert [(address, data[0]) for _, address, data in bench.writes(0, 1 << 64)] == [(0xFEE0_0000, 0x42)]
    await bench.write("ipsr", Ipsr.PMIP)
    assert await bench.read("ipsr") == 0, "an overflow is no lasting cause"
    await bench.word(CTR, (1 << 64) - 1)
    await bench.ask(0)
    assert await bench.word(CTR) == 0 and await bench.read("ipsr") == 0, "OF was 1 already"
