"""The command queue behind its registers, in memory, beside the golden queue."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.commands import COMMAND_DEFECTS, CommandQueue, IodirInvalDdt, IodirInvalPdt, IofenceC, IotinvalGvma, IotinvalVma
from ringwall.models.iommu.registers import CQ_ERRORS, CQ_RW1C, Capabilities, IommuMode, QueueCsr, RegisterFile
from ringwall.models.memory import GuestMemory
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.interface import FenceShare, ProgrammingInterface
from ringwall.rtl.iommu.layouts import Invalidate, InvalidateKind
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, random_ready, start, unpack

WIDTH = 128
QUEUE, TARGET = 0x8000_0000, 0x9000_0000


FEATURES = {"Sv48": True, "Sv57": True, "Sv39x4": True, "PD8": True, "PD17": True, "MSI_FLAT": True, "AMO_HWAD": True, "NL": True,
            "S": True}


COMMANDS = [
    "commands_are_the_golden_ones",
    "every_illegal_command_stops_the_queue",
    "a_fence_is_last",
    "memory_errors_stop_and_are_survived",
    "off_means_nothing_in_flight",
    "ddtp_and_fence_share_the_drain",
    "rate",
]


def test_commands(request):
    run(ProgrammingInterface(width=WIDTH), module=__name__, node=request.node.nodeid, params={"features": {}, "mode": 1}, testcase=COMMANDS)


def test_commands_of_features(request):
    run(ProgrammingInterface(width=WIDTH, features=Features(**FEATURES)), module=__name__, node=request.node.nodeid,
        params={"features": FEATURES, "mode": 3}, testcase="commands_are_the_golden_ones")  # fmt: skip


def test_commands_with_wires(request):
    run(ProgrammingInterface(width=WIDTH, features=Features(IGS=2)), module=__name__, node=request.node.nodeid,
        params={"features": {"IGS": 2}, "mode": 1, "WSI": 1}, testcase="commands_are_the_golden_ones")  # fmt: skip


def test_fence_share_parameters():
    """IOMMU-CMD-1: a share of no askers is refused with a sentence."""
    with pytest.raises(ValueError, match="Askers must be at least 1, not 0"):
        FenceShare(count=0)


def test_fence_share(request):
    run(FenceShare(count=2), module=__name__, node=request.node.nodeid, testcase="each_asker_has_its_fence")


class Bench(IommuHost):
    """The queue on, with 2 ** ``log2`` entries; ``orders`` has the invalidations, ``order_cycles`` when."""

    async def enable(self, log2=4, mode=IommuMode.BARE, **config):
        await self.begin(**config)
        self.orders, self.order_cycles = [], []
        self.invalidate = Stream(self.dut, "invalidate")
        self.invalidate.set_ready(1)
        cocotb.start_soon(self.invalidate.watch(self.orders, self.order_cycles))
        if "WSI" in params():
            await self.write("ddtp", 0)
            await self.until_register("ddtp", lambda value: not value & 16, "busy to clear")
            await self.write("fctl", 2)
        await self.write("ddtp", mode)
        await self.until_register("ddtp", lambda value: not value & 16, "busy to clear")
        await self.turn_on(log2)
        return self

    async def turn_on(self, log2):
        """Turn the queue off and on again with 2 ** ``log2`` entries."""
        self.log2, self.tail = log2, 0
        await self.write("cqcsr", 0)
        await self.until_register("cqcsr", lambda value: not value & 3 << 16, "cqon to fall")
        await self.write("cqb", QUEUE >> 2 | log2 - 1)
        await self.write("cqt", 0)
        await self.write("cqcsr", QueueCsr.EN | QueueCsr.IE)
        await self.until_register("cqcsr", lambda value: value & QueueCsr.ON, "cqon")

    async def submit(self, commands):
        for command in commands:
            raw = command if isinstance(command, bytes) else command.encode()
            self.memory.write(QUEUE + 16 * self.tail, raw)
            self.tail = (self.tail + 1) % (1 << self.log2)
        await self.write("cqt", self.tail)

    async def done(self):
        """Wait until the queue is empty or stopped; return cqcsr."""
        for _ in range(1000):
            head, csr = await self.read("cqh"), await self.read("cqcsr")
            if csr & CQ_ERRORS or head == self.tail:
                return QueueCsr(csr & ~(3 << 16 | 3))
        raise AssertionError(f"queue stands at {await self.read('cqh')}, tail {self.tail}")


def expected(command):
    """The fields of the invalidation that stands for a command."""
    if isinstance(command, IodirInvalDdt | IodirInvalPdt):
        return InvalidateKind.DDT if isinstance(command, IodirInvalDdt) else InvalidateKind.PDT, None, None, None, command.device_id
    kind = InvalidateKind.VMA if isinstance(command, IotinvalVma) else InvalidateKind.GVMA
    page = None if command.address is None or command.non_leaf or command.is_range else command.address >> 12
    return kind, page, getattr(command, "pscid", None), command.gscid, None


def seen(payload):
    order = unpack(Invalidate, payload)
    return (order.kind, order.page if order.av else None, order.pscid if order.pscv else None, order.gscid if order.gv else None,
            order.device_id if order.dv else None)  # fmt: skip


def random_command(rng, features):
    def maybe(value):
        return value if rng.random() < 0.5 else None

    device = rng.getrandbits(rng.choice([*[6, 15] * 6, 16, 24]))
    more = {"non_leaf": features.get("NL", False) and rng.random() < 0.3, "is_range": features.get("S", False) and rng.random() < 0.3}
    address, pscid, gscid = maybe(rng.getrandbits(52) << 12), maybe(rng.getrandbits(20)), maybe(rng.getrandbits(16))
    return rng.choice([IotinvalVma(address, pscid, gscid, **more), IotinvalGvma(address, gscid, **more), IodirInvalDdt(maybe(device)),
                       *([IodirInvalPdt(device, rng.getrandbits(rng.choice([*[17] * 12, 20])))] if "PD17" in features else []),
                       IofenceC(rng.random() < 0.5, rng.random() < 0.5, address=maybe(TARGET + 4 * rng.randrange(512)),
                                data=rng.getrandbits(32), wsi="WSI" in params() and rng.random() < 0.3)])  # fmt: skip


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def commands_are_the_golden_ones(dut):
    """IOMMU-CMD-2: random commands and garbage, queues of all small sizes and wrapping: cqh, errors, orders, memory as the golden queue."""
    rng, features, mode = random.Random(cocotb.RANDOM_SEED), params()["features"], params()["mode"]
    stopped, garbage = 0, list(COMMAND_DEFECTS.values())
    if "PD17" in features:  # INVAL_PDT without DV
        without = int.from_bytes(IodirInvalPdt(1, 1).encode(), "little") & ~(1 << 33)
        garbage = [*rng.sample(garbage, 5), *[without.to_bytes(16, "little")] * 5]
    bench = await Bench(dut, WIDTH, latency=lambda: rng.randrange(5, 40), fence_latency=lambda: rng.randrange(1, 20)).enable(mode=mode)
    assert await bench.read("capabilities") == Capabilities(**features).value
    cocotb.start_soon(random_ready(bench.invalidate, rng))
    memory = GuestMemory()
    for log2 in (1, 2, 3, 6):
        await bench.turn_on(log2)
        registers = RegisterFile(Capabilities(**features))
        if "WSI" in params():
            await bench.write("ipsr", 15)
            registers.write(0x10, 8, 0)
            registers.write(0x08, 4, 2)
        registers.write(0x10, 8, mode)
        registers.write(0x18, 8, QUEUE >> 2 | log2 - 1)
        registers.write(0x48, 4, 3)
        golden = CommandQueue(registers, memory)
        for _ in range(25):
            head = await bench.read("cqh")
            room = (head - bench.tail - 1) % (1 << log2)
            batch = [random_command(rng, features) for _ in range(rng.randrange(1, room + 1))]
            batch = [rng.choice([*garbage, rng.randbytes(16)]) if rng.random() < 0.05 else c for c in batch]
            at = bench.tail
            bench.orders.clear()
            await bench.submit(batch)
            for n, c in enumerate(batch):
                memory.write(QUEUE + 16 * ((at + n) % (1 << log2)), c if isinstance(c, bytes) else c.encode())
            registers.write(0x24, 4, bench.tail)
            csr = await bench.done()
            await ClockCycles(dut.clk, 5)
            wanted = []
            while (command := golden.step()) is not None:
                if not isinstance(command, IofenceC):
                    wanted.append(expected(command))
            assert [seen(p) for p in bench.orders] == wanted
            assert csr == registers.cqcsr & CQ_RW1C
            if "WSI" in params():
                assert set(registers.wires) == ({0} if dut.wires.value else set())
            assert await bench.read("cqh") == registers.cqh
            assert bench.memory.read(TARGET, 4096) == memory.read(TARGET, 4096)
            if csr & CQ_ERRORS:  # software puts a fence in its place, and goes on behind it
                stopped += 1
                for where in (bench.memory, memory):
                    where.write(QUEUE + 16 * registers.cqh, IofenceC().encode())
                await bench.write("cqcsr", 3 | CQ_RW1C)
                registers.write(0x48, 4, 3 | CQ_RW1C)
                bench.orders.clear()
                wanted.clear()
                is_bad = await bench.done() & CQ_ERRORS
                while (command := golden.step()) is not None:
                    wanted += [] if isinstance(command, IofenceC) else [expected(command)]
                assert [seen(p) for p in bench.orders] == wanted
                if is_bad:
                    bench.tail = registers.cqh  # a second bad one behind it: start anew
                    break
    assert stopped


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def every_illegal_command_stops_the_queue(dut):
    """IOMMU-CMD-3: each reserved opcode, func3, bit: cmd_ill, cqh at it, nothing invalidated or written; cip; goes on when replaced."""
    bench = await Bench(dut, WIDTH, latency=lambda: 5, fence_latency=lambda: 1).enable(2, IommuMode.LVL2)
    bad = dict(COMMAND_DEFECTS)
    bad["WIDE_DID"] = IodirInvalDdt(1 << 16).encode()
    bad["PDT"] = IodirInvalPdt(1, 1).encode()
    for name, raw in bad.items():
        head = await bench.read("cqh")
        await bench.submit([raw])
        assert await bench.done() == QueueCsr.CMD_ILL, name
        assert await bench.read("cqh") == head, name
        assert await bench.read("ipsr") == 1, name
        bench.memory.write(QUEUE + 16 * head, IotinvalVma().encode())
        await ClockCycles(dut.clk, 30)
        assert await bench.read("cqh") == head, f"{name}: stopped until software clears the bit"
        assert not bench.orders, name
        await bench.write("cqcsr", 3 | CQ_RW1C)
        await bench.write("ipsr", 3)
        assert await bench.done() == 0, name
        await bench.until(lambda: len(bench.orders) == 1, "the command in its place")
        assert await bench.read("ipsr") == 0
        bench.orders.clear()
    assert len(bad) > 380
    await bench.submit([IodirInvalDdt(0xFFFF)])
    assert await bench.done() == 0
    assert not bench.writes(0, 1 << 64)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_fence_is_last(dut):
    """IOMMU-CMD-4: invalidations before it are accepted before the drain is asked; drain before the write; write before cqh moves."""
    bench = await Bench(dut, WIDTH, fence_latency=lambda: 100).enable(4)
    bench.invalidate.set_ready(0)
    bench.fences.clear()
    await bench.submit([IotinvalVma(pscid=5), IofenceC(pr=True, address=TARGET + 4, data=0xCAFE), IotinvalVma()])
    await ClockCycles(dut.clk, 100)
    assert await bench.read("cqh") == 0 and not bench.fences, "the first is not accepted yet"
    bench.invalidate.set_ready(1)
    await bench.until(lambda: bench.fences, "the fence")
    assert bench.order_cycles[0] < bench.fences[0][0]
    assert await bench.read("cqh") == 1
    bench.latency = lambda: 5
    moved = None
    while moved is None:
        if await bench.read("cqh") > 1:
            moved = cycle()
    write = bench.writes(TARGET, TARGET + 8)
    assert [(address, data) for _, address, data in write] == [(TARGET + 4, (0xCAFE).to_bytes(4, "little"))]
    assert bench.fences[0][1] - 1 <= write[0][0] < moved
    assert await bench.done() == 0
    assert len(bench.orders) == 2 and bench.order_cycles[1] > write[0][0]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def memory_errors_stop_and_are_survived(dut):
    """IOMMU-CMD-5: every error status on a fetch and on a fence's write: cqmf, cip, cqh stays; done when it is gone."""
    bench = await Bench(dut, WIDTH).enable(3)
    for status in (BurstStatus.UR, BurstStatus.CA, BurstStatus.TIMEOUT, BurstStatus.POISONED, BurstStatus.RESET):
        for page in (QUEUE >> 12, TARGET >> 12):
            bench.broken[page] = status
            head = await bench.read("cqh")
            bench.orders.clear()
            await bench.submit([IofenceC(address=TARGET, data=int(status.value) + 0x100), IotinvalVma()])
            assert await bench.done() == QueueCsr.MF
            assert await bench.read("cqh") == head
            assert await bench.read("ipsr") == 1
            assert not bench.orders
            await bench.write("cqcsr", 3 | CQ_RW1C)
            assert await bench.done() == QueueCsr.MF, "the error is still there"
            bench.broken.clear()
            await bench.write("cqcsr", 3 | CQ_RW1C)
            await bench.write("ipsr", 3)
            assert await bench.done() == 0
            assert bench.memory.read(TARGET, 4) == (status.value + 0x100).to_bytes(4, "little")
            assert len(bench.orders) == 1
            bench.memory.write(TARGET, bytes(4))


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def off_means_nothing_in_flight(dut):
    """IOMMU-CMD-6: switched off during a fetch or a drain the queue is busy until that ended, then silent; on again it starts at 0."""
    bench = await Bench(dut, WIDTH, latency=lambda: 60, fence_latency=lambda: 200).enable(4)
    bench.fences.clear()
    for wait, name in ((10, "fetch"), (90, "drain")):
        await bench.turn_on(4)
        orders = len(bench.orders)
        await bench.submit([IofenceC(address=TARGET, data=1), IotinvalVma()])
        await ClockCycles(dut.clk, wait)
        await bench.write("cqcsr", 0)
        assert await bench.read("cqcsr") & 3 << 16 == 3 << 16, name
        await bench.until_register("cqcsr", lambda value: not value & 3 << 16, "cqon to fall")
        count = len(bench.bursts)
        assert len(bench.orders) == orders, f"{name}: a command behind the one at work was executed"
        assert all(answered for _, answered in bench.fences), f"{name}: off with a drain in flight"
        await ClockCycles(dut.clk, 200)
        assert (len(bench.bursts), len(bench.orders)) == (count, orders), name
        await bench.write("cqcsr", 1)
        assert await bench.read("cqh") == 0
        assert await bench.done() == 0
        assert len(bench.orders) == orders + 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def ddtp_and_fence_share_the_drain(dut):
    """IOMMU-CMD-7: ddtp.busy while a fence drains: both are answered, each by a drain of its own that began after it."""
    bench = await Bench(dut, WIDTH, fence_latency=lambda: 80).enable(4)
    bench.fences.clear()
    await bench.submit([IofenceC()])
    await bench.until(lambda: bench.fences, "the fence")
    begun = cycle()
    await bench.write("ddtp", 0)
    assert await bench.read("ddtp") == 16
    await bench.until_register("ddtp", lambda value: not value & 16, "busy to clear")
    assert len(bench.fences) == 2 and bench.fences[1][0] > begun and bench.fences[1][1] is not None
    assert await bench.done() == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def rate(dut):
    """IOMMU-CMD-8: 64 invalidations: one read per 4 of them, at most 1 cycle each besides the reads."""
    bench = await Bench(dut, WIDTH, latency=lambda: 20).enable(7)
    await bench.submit([IotinvalVma(pscid=n) for n in range(64)])
    assert await bench.done() == 0
    assert [seen(p)[2] for p in bench.orders] == list(range(64))
    reads = [b for _, b, _ in bench.bursts if not b.is_write]
    assert [b.length_bytes for b in reads] == [64] * 16
    spent = bench.order_cycles[-1] - bench.order_cycles[0]
    assert spent <= 48 + 15 * 40, f"{spent} cycles"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def each_asker_has_its_fence(dut):
    """IOMMU-CMD-9: two askers at random, a gate that takes and answers when it likes: as many fences as questions, each with its answer."""
    await start(dut)
    rng, fence, fenced, done = random.Random(cocotb.RANDOM_SEED), Stream(dut, "fence"), Stream(dut, "fenced"), [0, 0]
    taken, answered = [], []
    cocotb.start_soon(fence.watch(taken))
    cocotb.start_soon(fenced.watch(answered))

    async def gate():
        while True:
            await ClockCycles(dut.clk, rng.randrange(1, 5))
            await fence.get()
            await ClockCycles(dut.clk, rng.randrange(1, 5))
            await fenced.put()

    async def asker(n):
        for _ in range(40):
            await Stream(dut, f"ask__{n}").put()
            await Stream(dut, f"answer__{n}").get()
            done[n] += 1
            await ClockCycles(dut.clk, rng.randrange(1, 20))

    cocotb.start_soon(gate())
    for task in [cocotb.start_soon(asker(n)) for n in range(2)]:
        await task
    assert done == [40, 40] and len(taken) == len(answered) == 80
