"""Registers alone: every register of the model's list, then random accesses, compared with the golden register file."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.registers import CQ_ERRORS, REGISTERS, IommuMode, QueueCsr, RegisterFile, register_list
from ringwall.models.iommu.registers import Capabilities as ModelCapabilities
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.registers import Registers
from ringwall.rtl.spec import riscv_iommu_registers as spec
from ringwall.sim.regs_bus import RegisterBus
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, start

ON_BUSY = 3 << 16


@pytest.mark.parametrize("strict, vectors, log2", [(False, 4, 16), (True, 2, 9)])
def test_registers(request, strict, vectors, log2):
    run(Registers(strict=strict, vectors=vectors, queue_log2_max=log2), module=__name__, node=request.node.nodeid,
        params={"strict": strict, "vectors": vectors, "log2": log2, "IGS": 0})  # fmt: skip


@pytest.mark.parametrize("IGS, vectors", [(1, 2), (2, 4)])
def test_registers_with_wires(request, IGS, vectors):
    run(Registers(strict=True, vectors=vectors, queue_log2_max=9, features=Features(IGS=IGS, HPM=True)), module=__name__,
        node=request.node.nodeid, params={"strict": True, "vectors": vectors, "log2": 9, "IGS": IGS},
        testcase=["every_register_as_the_model", "random_accesses_as_the_model"])  # fmt: skip


@pytest.mark.parametrize("IGS", [0, 2])
def test_registers_with_devices(request, IGS):
    run(Registers(vectors=8, features=Features(IGS=IGS, HPM=IGS == 2, ATS=True)), module=__name__, node=request.node.nodeid,
        params={"strict": False, "vectors": 8, "log2": 16, "IGS": IGS, "ATS": True},
        testcase=["every_register_as_the_model", "random_accesses_as_the_model"])  # fmt: skip


def test_registers_parameters():
    """IOMMU-REG-1: parameters out of range are refused with a sentence; both register lists agree name by name."""
    for bad, message in (({"vectors": 3}, "Vectors .*not 3"), ({"queue_log2_max": 17}, "Largest LOG2SZ .*not 17"),
                         ({"physical_address_bits": 57}, "Physical address bits .*not 57")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Registers(**bad)
    ours = {(r.name, r.offset, r.width, r.access) for r in spec.REGISTERS}
    assert ours == {(r.name, r.offset, r.width, r.access) for r in REGISTERS}
    more = {(r.name, r.offset, r.width, r.access) for r in register_list(ModelCapabilities(ATS=True))} - ours
    assert more == {(r.name, r.offset, r.width, r.access) for r in spec.FEATURE_REGISTERS["ATS"]}


class Bench:
    """Device under test and model side by side; the queues go on and off one cycle after software says so."""

    def __init__(self, dut, rng):
        self.dut, self.rng = dut, rng
        p = params()
        self.IGS = p["IGS"]
        self.has_ATS = p.get("ATS", False)
        self.capabilities = ModelCapabilities(IGS=self.IGS, HPM=self.IGS != 0, ATS=self.has_ATS)
        self.mode = IommuMode.OFF if p["strict"] else IommuMode.BARE
        self.model = RegisterFile(self.capabilities, reset_mode=self.mode, vectors=p["vectors"], queue_log2_max=p["log2"])
        # the counters are another component's
        self.registers = [r for r in register_list(self.capabilities, reset_mode=self.mode) if not r.name.startswith(("iohpm", "iocount"))]
        self.interrupts = []

    async def begin(self):
        await start(self.dut)
        self.bus = RegisterBus(self.dut, hold=lambda: self.rng.choice([0, 0, 3]))
        self.drain, self.drained = Stream(self.dut, "drain"), Stream(self.dut, "drained")
        cocotb.start_soon(self._queues())
        cocotb.start_soon(self._drain())
        return self

    async def _queues(self):
        dut = self.dut
        while True:
            await RisingEdge(dut.clk)
            dut.commands__on.value = dut.commands__enable.value
            dut.faults__on.value = dut.faults__enable.value
            if self.has_ATS:
                dut.pages__on.value = dut.pages__enable.value
            bits = int(dut.interrupt.value) if self.IGS != 1 else 0
            self.interrupts += [n for n in range(16) if bits >> n & 1]

    async def _drain(self):
        while True:
            await self.drain.get()
            await ClockCycles(self.dut.clk, self.rng.randrange(1, 6))
            await self.drained.put()

    async def pulse(self, name):
        await RisingEdge(self.dut.clk)
        getattr(self.dut, name).value = 1
        await RisingEdge(self.dut.clk)
        getattr(self.dut, name).value = 0
        await RisingEdge(self.dut.clk)

    async def write(self, offset, size, value):
        await self.bus.write(offset, value, size)
        self.model.write(offset, size, value)
        await ClockCycles(self.dut.clk, 12)

    async def compare(self, what):
        for register in self.registers:
            size = register.width // 8
            seen, want = await self.bus.read(register.offset, size), self.model.read(register.offset, size)
            assert seen == want, f"{register.name} is {seen:#x}, not {want:#x}, after {what}"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def every_register_as_the_model(dut):
    """IOMMU-REG-2: each register by name: reset value, ones, zeros, patterns, halves; all others compared too."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin()
    listed = {r.name: r for r in bench.registers}
    for register in listed.values():
        if not register.name.startswith("msi_addr") and not register.name.startswith("msi_data"):
            assert await bench.bus.read(register.offset, register.width // 8) == register.reset, register.name
    for n in range(16):  # the table is 0 at power-up in this memory as well
        assert await bench.bus.read(0x300 + 16 * n, 8) == 0
        assert await bench.bus.read(0x308 + 16 * n, 4) == 0
    for name, register in listed.items():
        size = register.width // 8
        enables = name in ("cqcsr", "fqcsr", "pqcsr")
        for value in (0, (1 << 8 * size) - 1, rng.getrandbits(8 * size), 0):
            await bench.write(register.offset, size, value)
            if value and not enables:
                await bench.compare(f"{name} = {value:#x}")
        if size == 8:
            for at in (4, 0):
                await bench.write(register.offset + at, 4, rng.getrandbits(32))
                await bench.compare(f"half {at} of {name}")
    for offset in (0x00C, 0x258, 0x270, 0x400, 0x408, 0x800, 0xFF8, *(() if bench.IGS else (0x058, 0x060)),
                   *(() if bench.has_ATS else (0x038, 0x050)),
                   *((0x300, 0x304, 0x308, 0x30C, 0x3F8) if bench.IGS == 1 else ())):  # fmt: skip
        await bench.bus.write(offset, 0xFFFF_FFFF)
        assert await bench.bus.read(offset, 4) == 0, f"nothing is at {offset:#x}"


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def random_accesses_as_the_model(dut):
    """IOMMU-REG-3: random writes, queue events, interrupts: all registers, the messages due and the wires are the model's after each."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng).begin()
    model = bench.model
    names = [r for r in bench.registers if not r.name.startswith("msi_") or r.name in ("msi_addr_1", "msi_vec_ctl_2")]
    for n in range(16):  # the table survives resets
        await bench.write(0x300 + 16 * n, 8, 0)
        await bench.write(0x308 + 16 * n, 4, 0)
        await bench.write(0x30C + 16 * n, 4, 0)  # nothing is masked: the model's messages are this component's pulses
    events = {"commands__step": model.command_done, "commands__memory_fault": lambda: model.command_error("cqmf"),
              "commands__refused": lambda: model.command_error("cmd_ill"), "faults__step": model.fault_recorded,
              "faults__memory_fault": lambda: model.fault_queue_error("fqmf"),
              "faults__refused": lambda: model.fault_queue_error("fqof")}  # fmt: skip
    if bench.has_ATS:
        events |= {"pages__step": model.page_request_recorded, "pages__memory_fault": lambda: model.page_queue_error("pqmf"),
                   "pages__refused": lambda: model.page_queue_error("pqof"),
                   "timed_out": lambda: model.command_error("cmd_to")}  # fmt: skip
    if bench.IGS:
        events |= {"overflow": lambda: overflow(model), "fence_done": model.fence_signalled}
    seen_messages, seen_wires = 0, set()
    for n in range(250):
        if bench.IGS and rng.random() < 0.1:  # fctl can be changed
            for offset in (0x10, 0x48, 0x4C, *([0x50] if bench.has_ATS else [])):
                await bench.write(offset, 4, 0)
            if bench.has_ATS and rng.random() < 0.5:
                await bench.write(0x50, 4, 1)
            await bench.write(8, 4, rng.getrandbits(32))
        model.messages.clear()
        bench.interrupts.clear()
        if rng.random() < 0.3:
            what = rng.choice(list(events))
            await bench.pulse(what)
            events[what]()
            await ClockCycles(dut.clk, 4)
        else:
            register = rng.choice(names)
            value = rng.choice([rng.getrandbits(64), rng.randrange(8), 0xFFF, 3])
            if register.name == "ddtp":
                value = rng.getrandbits(54) >> 10 << 10 | rng.randrange(7)
            if register.name == "msi_vec_ctl_2":
                value = 0
            offset, size = (register.offset + rng.choice([0, 4]), 4) if register.width == 64 and rng.random() < 0.4 else (
                register.offset, register.width // 8)  # fmt: skip
            what = f"{register.name} at {offset:#x} = {value & (1 << 8 * size) - 1:#x}"
            await bench.write(offset, size, value & (1 << 8 * size) - 1)
        if n % 3 == 0:
            await bench.compare(f"step {n}: {what}")
        wanted = sorted({m.vector for m in model.messages})
        assert sorted(set(bench.interrupts)) == wanted, f"step {n}: {what}: interrupts {bench.interrupts}, not {wanted}"
        seen_messages += len(wanted)
        if bench.IGS:
            wires = int(dut.wires.value)
            assert wires == sum(1 << wire for wire in model.wires), f"step {n}: {what}: wires {wires:#x}, not {set(model.wires)}"
            assert dut.WSI.value == model.fctl >> 1 & 1
            seen_wires.add(wires)
        if bench.has_ATS:
            assert dut.pages_failed.value == bool(model.pqcsr & QueueCsr.MF)
            assert dut.commands__stopped.value == bool(model.cqcsr & CQ_ERRORS)
        assert int(dut.ddtp_mode.value) == model.mode
        assert int(dut.ddtp_ppn.value) == model.ddtp >> 10 & (1 << 44) - 1
    assert (seen_messages > 3 or bench.IGS == 1) and (len(seen_wires) > 2 or not bench.IGS)


def overflow(model):
    """Have a counter of the model overflow for the first time."""
    model.write(0x160, 8, 0)
    model.write(0x68, 8, (1 << 64) - 1)
    model.advance(1)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def busy_until_drained(dut):
    """IOMMU-REG-4: ddtp.busy from the write until the drain is answered, writes in between are ignored; queue csrs the same with on."""
    await start(dut)
    bus, drain, drained = RegisterBus(dut), Stream(dut, "drain"), Stream(dut, "drained")
    await bus.write(0x10, 0x1234_5678 << 10 | 4, 8)
    for _ in range(2):  # with the drain not yet taken, then taken
        assert await bus.read(0x10, 8) == 0x1234_5678 << 10 | 4 | 1 << 4
        assert dut.ddtp_mode.value == 4
        await bus.write(0x10, 0, 8)
        if dut.drain__valid.value:
            await drain.get()
    assert await bus.read(0x10, 8) & 0x1F == 0x14
    await drained.put()
    assert await bus.read(0x10, 8) == 0x1234_5678 << 10 | 4
    for offset, on in ((0x48, dut.commands__on), (0x4C, dut.faults__on)):
        await bus.write(offset, 1)
        assert await bus.read(offset) == 1 | 2 << 16
        await bus.write(offset, 0)
        assert await bus.read(offset) == 1 | 2 << 16, "a write while busy is ignored"
        on.value = 1
        assert await bus.read(offset) == 1 | 1 << 16
        await bus.write(offset, 0)
        assert await bus.read(offset) == 3 << 16
        on.value = 0
        assert await bus.read(offset) == 0
    assert max(bus.latencies) <= 2


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def bytes_and_set_wins(dut):
    """IOMMU-REG-5: single bytes are merged; an event in the very cycle of its clearing is not lost; pending bits are shown."""
    await start(dut)
    bus = RegisterBus(dut)
    await bus.write(0x300, 0x11_2233_4455_6677, 8)
    await bus.write(0x303, 0xAB, 1)
    assert await bus.read(0x300, 8) == 0x11_2233_AB55_6674
    dut.msi_pending.value = 0xA5A5
    assert await bus.read(0x400, 8) == 0xA5A5
    dut.msi_pending.value = 0
    await bus.write(0x4C, 3)
    dut.faults__on.value = 1
    clearings = []  # the cycle in which a write takes effect is the one after its acceptance

    async def watch():
        request = Stream(dut, "bus__request")
        while True:
            await RisingEdge(dut.clk)
            if request.read_valid() and request.read_ready():
                clearings.append(cycle() + 1)

    cocotb.start_soon(watch())
    found = set()
    for delay in range(6):  # fip is cleared while records keep coming
        await bus.write(0x54, 2)
        assert await bus.read(0x54) == 0
        pulses = []

        async def step(delay, pulses):
            await ClockCycles(dut.clk, delay)
            dut.faults__step.value = 1
            await RisingEdge(dut.clk)
            dut.faults__step.value = 0
            pulses.append(cycle())

        await step(0, [])
        await ClockCycles(dut.clk, 2)
        assert await bus.read(0x54) == 2
        task = cocotb.start_soon(step(delay, pulses))
        before = len(clearings)
        await bus.write(0x54, 2)
        await task
        await ClockCycles(dut.clk, 3)
        late = pulses[0] - clearings[before]  # of the record behind the clearing
        found.add(late)
        assert await bus.read(0x54) == (0 if late < 0 else 2), f"record {late} cycles behind the clearing"
    assert {-1, 0, 1} <= found, found


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_smaller_queue_keeps_small_indices(dut):
    """IOMMU-REG-6: after a write to cqb or fqb both indices have only LOG2SZ bits left."""
    await start(dut)
    bus = RegisterBus(dut)
    for name, base, csr, own, other in (("commands", 0x18, 0x48, 0x20, 0x24), ("faults", 0x28, 0x4C, 0x34, 0x30)):
        await bus.write(base, 3, 8)
        await bus.write(csr, 1)
        getattr(dut, f"{name}__on").value = 1
        getattr(dut, f"{name}__step").value = 1
        await ClockCycles(dut.clk, 7)
        getattr(dut, f"{name}__step").value = 0
        await bus.write(other, 0x17)
        index = await bus.read(own)
        assert index in (6, 7) and await bus.read(other) == 7
        await bus.write(base, 0, 8)
        assert await bus.read(base, 8) == 3, "ignored while on"
        await bus.write(csr, 0)
        getattr(dut, f"{name}__on").value = 0
        await ClockCycles(dut.clk, 2)
        await bus.write(base, 1, 8)
        assert await bus.read(own) == index & 3 and await bus.read(other) == 3
        await bus.write(base, 0, 8)
        assert await bus.read(own) == index & 1 and await bus.read(other) == 1
