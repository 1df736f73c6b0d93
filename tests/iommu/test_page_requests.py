"""Page requests of the whole IOMMU beside the golden unit: queue, responses, faults, interrupts. [RVIOMMU1.0 3.7, 4.3]"""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.ats import PageRequest as Message
from ringwall.models.iommu.ats import PrgCode
from ringwall.models.iommu.registers import PQ_RW1C, Capabilities, IommuMode, QueueCsr
from ringwall.models.iommu.tables import Allocator, DeviceContext, DeviceDirectory
from ringwall.models.iommu.unit import Unit
from ringwall.models.memory import AccessFault, GuestMemory
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import GroupResponse, Kind, MemoryWriteDone, PageRequest, request_layout, response_layout
from ringwall.rtl.iommu.page_requests import PageRequests
from ringwall.rtl.iommu.unit import Iommu
from ringwall.rtl.spec.riscv_iommu_registers import ResponseCode
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, start, unpack

POOL, FAULTS, PAGES, MESSAGES = 0x8000_0000, 0x9000_0000, 0xA000_0000, 0xB000_0000
ASKS, SAYS = request_layout(Features(ATS=True)), response_layout(Features(ATS=True))


TESTS = ["messages_are_the_golden_ones", "record_before_tail", "beside_the_gate"]


@pytest.mark.parametrize("features", [["ATS"], ["ATS", "HPM", "DBG"]])
def test_page_requests(request, features):
    run(Iommu(width=64, features=Features(**dict.fromkeys(features, True))), module=__name__, node=request.node.nodeid,
        params={"features": features},
        testcase=[*TESTS, *(["kinds_are_counted"] if "HPM" in features else [])])  # fmt: skip


def test_page_requests_alone(request):
    run(PageRequests(features=Features(ATS=True)), module=__name__, node=request.node.nodeid,
        testcase=["off_waits_for_the_record", "stopped_is_not_refused_again"])  # fmt: skip


class World(GuestMemory):
    """Memory of the golden unit; writes of the page in ``refused`` fail."""

    refused = None

    def write(self, address, data):
        if self.refused is not None and address >> 12 == self.refused:
            raise AccessFault(address, len(data), True, "unmapped")
        super().write(address, data)


class Bench(IommuHost):
    """Devices 1 to 5 of different contexts, in circuit and model alike."""

    CONTEXTS = {1: {"EN_ATS": True, "EN_PRI": True}, 2: {"EN_ATS": True, "EN_PRI": True, "PRPR": True}, 3: {"EN_ATS": True}, 4: {},
                5: {"EN_ATS": True, "DTF": True}, 6: {"EN_PRI": True}}  # fmt: skip

    async def enable(self, log2=3):
        self.rng, self.golden_memory, self.responses, self.wanted, self.answers = random.Random(cocotb.RANDOM_SEED), World(), [], [], []
        await self.begin()
        self.asks, self.says = Stream(self.dut, "page_request"), Stream(self.dut, "group_response")
        self.request, self.answer = Stream(self.dut, "translate_request"), Stream(self.dut, "translate_response")
        cocotb.start_soon(self.says.watch(self.responses))
        cocotb.start_soon(self.answer.watch(self.answers))
        self.answer.set_ready(1)
        self.says.set_ready(1)
        capabilities = Capabilities(**dict.fromkeys(params()["features"], True))
        self.golden = Unit(self.golden_memory, capabilities)
        for memory in (self.memory, self.golden_memory):
            directory = DeviceDirectory(memory, Allocator(memory, POOL, 0x10_0000), levels=2, features=capabilities.switched_on())
            for device, fields in self.CONTEXTS.items():
                directory.set(device, DeviceContext(**fields))
        self.ddtp = directory.ddtp
        for n in range(4):
            await self.both(0x300 + 16 * n, 8, MESSAGES + 4 * n)
            await self.both(0x30C + 16 * n, 4, 0)
        await self.both(0x2F8, 8, 0x2110)
        await self.both(0x28, 8, FAULTS >> 2 | 9)
        await self.both(0x4C, 4, 3)
        await self.both(0x10, 8, self.ddtp)
        await self.turn_on(log2)
        return self

    async def turn_on(self, log2):
        await self.both(0x50, 4, 0)
        await self.both(0x38, 8, PAGES >> 2 | log2 - 1)
        await self.both(0x40, 4, 0)
        await self.both(0x50, 4, 3)

    async def both(self, offset, size, value):
        await self.bus.write(offset, value, size)
        self.golden.registers.write(offset, size, value)
        await ClockCycles(self.dut.clk, 30)

    async def send(self, message):
        """Give a message to both."""
        await self.asks.put(pack(PageRequest, device_id=message.device_id, process_id_valid=message.pid is not None,
                                 process_id=self.rng.getrandbits(20) if message.pid is None else message.pid,
                                 privileged=message.priv, execute=message.is_exec,
                                 reads=message.reads, writes=message.writes, is_last=message.is_last, group=message.group,
                                 page=message.address >> 12))  # fmt: skip
        if (response := self.golden.receive(message)) is not None:
            self.wanted.append((response.device_id, response.group, response.code, response.pid))

    async def compare(self, what):
        """Compare all that a message can change."""
        await ClockCycles(self.dut.clk, 150)
        registers = self.golden.registers
        self.golden.send_interrupts()
        for offset, size in ((0x38, 8), (0x40, 4), (0x44, 4), (0x50, 4), (0x34, 4), (0x54, 4)):  # pqb, pqh, pqt, pqcsr, fqt, ipsr
            found, wanted = await self.bus.read(offset, size), registers.read(offset, size)
            assert found == wanted, f"{what}: the register at {offset:#x} is {found:#x}, not {wanted:#x}"
        for base, length in ((PAGES, 1 << 12), (FAULTS, 1 << 12), (MESSAGES, 64)):
            assert self.memory.read(base, length) == self.golden_memory.read(base, length), f"{what}: memory at {base:#x}"
        found = [unpack(GroupResponse, payload) for payload in self.responses]
        assert all(r.process_id_valid or not r.process_id for r in found)
        found = [(r.device_id, r.group, PrgCode(r.code.value), r.process_id if r.process_id_valid else None) for r in found]
        assert found == self.wanted, what
        self.responses.clear()
        codes = {code for _, _, code, _ in self.wanted}
        self.wanted.clear()
        return codes


def a_message(rng):
    pid = rng.choice([None, rng.getrandbits(20)])
    reads, writes, is_last, priv, is_exec = (rng.random() < 0.6 for _ in range(5))
    device = rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 1 << 16])
    return Message(device, rng.getrandbits(52) << 12, rng.getrandbits(9), reads, writes, is_last, pid, priv, is_exec)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def messages_are_the_golden_ones(dut):
    """IOMMU-PRI-1: random messages, stop markers, modes, queue on, off, full, failing: records, responses, faults, pip as the model's."""
    bench = await Bench(dut, 64).enable()
    rng, codes, states = bench.rng, set(), set()
    cocotb.start_soon(random_ready(bench.says, rng, 0.3))
    for step in range(120):
        if step >= 60 and codes == set(PrgCode) and states >= {0, QueueCsr.MF, QueueCsr.OF}:
            break
        kind = rng.random()
        if kind < 0.15:
            await bench.turn_on(rng.choice([1, 2, 4, 8]))
        elif kind < 0.2:
            await bench.both(0x50, 4, rng.choice([0, 2]))
        elif kind < 0.3:
            await bench.both(0x10, 8, 0)
            await bench.both(0x10, 8, rng.choice([0, int(IommuMode.BARE), bench.ddtp, bench.ddtp]))
        elif kind < 0.5:
            await bench.both(0x40, 4, bench.golden.registers.pqt)
            if rng.random() < 0.6:
                await bench.both(0x50, 4, 3 | PQ_RW1C)
            await bench.both(0x54, 4, 15)
        broken = rng.random() < 0.1
        if broken:
            bench.golden_memory.refused, bench.broken[PAGES >> 12] = PAGES >> 12, BurstStatus.UR
        for _ in range(rng.choice([1, 2, 4])):
            await bench.send(a_message(rng))
        await ClockCycles(dut.clk, 400)
        bench.golden_memory.refused, bench.broken = None, {}
        codes |= await bench.compare(f"step {step}")
        states.add(bench.golden.registers.pqcsr & PQ_RW1C)
        await bench.both(0x30, 4, bench.golden.registers.fqt)
        await bench.both(0x4C, 4, 0x303)
        await bench.both(0x54, 4, 2)
    assert codes == set(PrgCode) and states >= {0, QueueCsr.MF, QueueCsr.OF}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def record_before_tail(dut):
    """IOMMU-PRI-2: when pqt has moved the record is there; after an overflow nothing is queued until software says so, nor when off."""
    bench = await Bench(dut, 64).enable(5)
    bench.answers.clear()
    messages = [Message(1, n << 12, n, True, is_last=True, pid=n) for n in range(16)]

    async def tell():
        for message in messages:
            await bench.send(message)

    cocotb.start_soon(tell())
    seen = 0
    while seen < len(messages):
        tail = await bench.read("pqt")
        for n in range(seen, tail):
            assert bench.memory.read(PAGES + 16 * n, 16) == messages[n].pack(), f"pqt is {tail}"
        seen = tail
    await bench.turn_on(1)
    for n, code in enumerate([set(), {PrgCode.SUCCESS}]):
        await bench.send(messages[n])
        assert await bench.compare("a queue of two entries") == code
    await bench.both(0x40, 4, 1)
    await bench.send(messages[3])
    assert await bench.compare("no longer full, but it was") == {PrgCode.SUCCESS}
    await bench.both(0x50, 4, 0)
    await bench.send(messages[3])
    assert await bench.compare("off") == {PrgCode.RESPONSE_FAILURE}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def beside_the_gate(dut):
    """IOMMU-PRI-3: requests one per cycle beside messages: each is answered once, none waits for a message whose response nobody takes."""
    bench = await Bench(dut, 64).enable()
    bench.says.set_ready(0)
    rng = bench.rng
    await bench.send(Message(1, is_last=True, reads=True))
    await ClockCycles(dut.clk, 200)
    await bench.both(0x50, 4, 0)
    bench.answers.clear()
    begun = cycle()

    async def tell():
        for n in range(3):
            await bench.send(Message(rng.choice([1, 7]), group=n, is_last=True, reads=True))

    task = cocotb.start_soon(tell())
    kinds = [rng.choice([Kind.UNTRANSLATED, Kind.TRANSLATED]) for _ in range(120)]
    await bench.request.put_many(pack(ASKS, device_id=1, page=n, cookie=n, kind=kind) for n, kind in enumerate(kinds))
    assert cycle() - begun < 160
    await ClockCycles(dut.clk, 100)
    found = [unpack(SAYS, payload) for payload in bench.answers]
    assert [(answer.cookie, answer.page, answer.kind) for answer in found] == [(n, n, kind) for n, kind in enumerate(kinds)]
    assert not task.done() and not bench.responses
    bench.says.set_ready(1)
    await task
    await bench.compare("all are answered")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def kinds_are_counted(dut):
    """IOMMU-HPM-5: untranslated, translated and translation requests are events of their own; a page request is none, its walk is one."""
    bench = await Bench(dut, 64).enable()
    for n, event in enumerate((1, 2, 3, 5)):
        await bench.both(0x160 + 8 * n, 8, event)
    kinds = {Kind.UNTRANSLATED: 3, Kind.TRANSLATED: 4, Kind.TRANSLATION: 5}
    await bench.send(Message(1))
    await ClockCycles(dut.clk, 200)
    await bench.send(Message(7))  # without a context: it walks anew each time
    await bench.send(Message(7))
    await ClockCycles(dut.clk, 300)
    for kind, count in kinds.items():
        await bench.request.put_many(pack(ASKS, device_id=1, page=n, cookie=n, kind=kind) for n in range(count))
    await ClockCycles(dut.clk, 200)
    assert [await bench.bus.read(0x68 + 8 * n, 8) for n in range(4)] == [*kinds.values(), 3]
    assert bench.golden.registers.read(0x68 + 8 * 3, 8) == 3


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def off_waits_for_the_record(dut):
    """IOMMU-PRI-4: switched off while a record is written the queue stays on until the write has ended; then messages are answered."""
    messages, asks, answers, writes, done, says = await start(dut, "page_request", "request", "response", "write", "write_done",
                                                              "group_response")  # fmt: skip
    dut.control__mask.value, dut.control__enable.value = 7, 1

    async def send():
        await messages.put(pack(PageRequest, device_id=1, reads=1, is_last=1))
        await asks.get()
        await answers.put(pack(SAYS, kind=Kind.MESSAGE))

    await send()
    await ClockCycles(dut.clk, 3)
    dut.control__enable.value = 0
    for _ in range(2):
        await ClockCycles(dut.clk, 9)
        assert dut.control__on.value == 1
        await writes.get()
    await ClockCycles(dut.clk, 9)
    assert dut.control__on.value == 1
    await done.put(pack(MemoryWriteDone, status=BurstStatus.OK))
    await ClockCycles(dut.clk, 2)
    assert dut.control__on.value == 0
    await send()
    assert unpack(GroupResponse, await says.get()).code == ResponseCode.RESPONSE_FAILURE
    assert not dut.write__valid.value


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def stopped_is_not_refused_again(dut):
    """IOMMU-PRI-5: a message that finds the queue full is refused once; one that finds it stopped is answered, and sets nothing again."""
    messages, asks, answers, says = await start(dut, "page_request", "request", "response", "group_response")
    dut.control__mask.value, dut.control__enable.value, dut.control__head.value = 7, 1, 1
    for stopped, count in ((0, 1), (1, 0)):
        dut.control__stopped.value = stopped
        await messages.put(pack(PageRequest, device_id=1, reads=1, is_last=1))
        await asks.get()
        refused = 0
        cocotb.start_soon(answers.put(pack(SAYS, kind=Kind.MESSAGE)))
        answer = cocotb.start_soon(says.get())
        for _ in range(12):
            await RisingEdge(dut.clk)
            refused += int(dut.control__refused.value)
        assert unpack(GroupResponse, await answer).code == ResponseCode.SUCCESS
        assert refused == count
