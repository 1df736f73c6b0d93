"""Interrupts of the IOMMU behind its registers: messages in memory."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.faults import FaultRecord
from ringwall.models.iommu.registers import CQ_RW1C, FQ_RW1C, QueueCsr
from ringwall.rtl.config import IommuConfig
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.interface import ProgrammingInterface
from ringwall.rtl.iommu.layouts import FaultReport
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack

COMMANDS, FAULTS, DOORBELL = 0x8000_0000, 0x8001_0000, 0xFEE0_0000
WIDTH = 256


MESSAGES = ["one_message_per_rise", "pending_while_masked", "a_message_that_fails_is_recorded", "random_masks_lose_nothing",
            "reads_see_the_end_of_messages", "software_has_the_table_meanwhile"]


def test_interrupts(request):
    run(ProgrammingInterface(width=WIDTH), module=__name__, node=request.node.nodeid, testcase=MESSAGES)


@pytest.mark.parametrize("IGS", [1, 2])
def test_wires(request, IGS):
    run(ProgrammingInterface(width=WIDTH, features=Features(IGS=IGS)), module=__name__, node=request.node.nodeid,
        params={"IGS": IGS}, testcase="wires_are_levels")  # fmt: skip


def test_interrupts_are_possible():
    """IOMMU-IRQ-5: kinds of interrupts that there are not, and wires of a PCIe function, are refused with a sentence."""
    with pytest.raises(ValueError, match="IGS must be 0, 1 or 2, not 3"):
        Features(IGS=3)
    with pytest.raises(ValueError, match=r"IGS of a PCIe function must be 0, .* not 2"):
        IommuConfig(IGS=2)


class Bench(IommuHost):
    """Both queues on, with interrupts; vector v writes 0xD0 + v to DOORBELL + 0x100 * v + 4."""

    async def enable(self, civ=0, fiv=1, masked=(), **config):
        await self.begin(**config)
        self.reports, self.tail = Stream(self.dut, "reports"), 0
        for v in range(16):
            await self.write(f"msi_addr_{v}", self.place(v))
            await self.write(f"msi_data_{v}", 0xD0 + v)
            await self.write(f"msi_vec_ctl_{v}", v in masked)
        await self.write("icvec", civ | fiv << 4)
        for base, csr, at in (("cqb", "cqcsr", COMMANDS), ("fqb", "fqcsr", FAULTS)):
            await self.write(base, at >> 2 | 3)
            await self.write(csr, QueueCsr.EN | QueueCsr.IE)
        cocotb.start_soon(self._take())
        return self

    async def _take(self):
        Stream(self.dut, "invalidate").set_ready(1)

    @staticmethod
    def place(vector):
        return DOORBELL + 0x100 * vector + 4

    async def command_error(self):
        """An illegal command; the queue stays stopped."""
        self.memory.write(COMMANDS + 16 * self.tail, b"\x7f" * 16)
        self.tail += 1
        await self.write("cqt", self.tail)
        await self.until_register("cqcsr", lambda value: value & QueueCsr.CMD_ILL, "cmd_ill")

    async def fault(self):
        await self.reports.put(pack(FaultReport, cause=13, ttyp=2))

    async def settle(self):
        await ClockCycles(self.dut.clk, 120)

    def messages(self):
        """Vectors of all messages so far, in their order; each must be right."""
        found = []
        for _, address, data in self.writes(DOORBELL, DOORBELL + 0x1000):
            vector = (address - DOORBELL) // 0x100
            assert (address, data) == (self.place(vector), (0xD0 + vector).to_bytes(4, "little"))
            found.append(vector)
        return found


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def one_message_per_rise(dut):
    """IOMMU-IRQ-1: both sources, separate and shared vectors: one message per rise of ipsr, again when its cause persists."""
    bench = await Bench(dut, WIDTH).enable(civ=2, fiv=3)
    await bench.fault()
    await bench.settle()
    assert bench.messages() == [3]
    for _ in range(3):
        await bench.fault()
    await bench.settle()
    assert bench.messages() == [3], "fip was 1 already"
    await bench.write("ipsr", 2)
    await bench.settle()
    assert await bench.read("ipsr") == 0, "a record is no lasting cause"
    await bench.command_error()
    await bench.settle()
    assert bench.messages() == [3, 2]
    await bench.write("ipsr", 1)
    await bench.settle()
    assert await bench.read("ipsr") == 1 and bench.messages() == [3, 2, 2], "cmd_ill still stands"
    await bench.write("cqcsr", CQ_RW1C | 3)
    await bench.write("cqcsr", 1)  # the bad command is still there, without cie now
    await bench.write("ipsr", 1)
    await bench.settle()
    assert await bench.read("ipsr") == 0 and bench.messages() == [3, 2, 2]
    await bench.write("icvec", 3 | 3 << 4)
    await bench.write("cqcsr", 3)
    await bench.settle()
    assert await bench.read("ipsr") == 1 and bench.messages() == [3, 2, 2, 3]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def pending_while_masked(dut):
    """IOMMU-IRQ-2: M, Function Mask, MSI-X off: nothing is sent, the pending bit shows it, exactly one message when it is lifted."""
    sent = []
    bench = await Bench(dut, WIDTH).enable(masked=(1,))

    async def mask(how, on):
        if how == "M":
            await bench.write("msi_vec_ctl_1", on)
        else:
            bench.configure(**{how: on if how == "msix_mask" else 1 - on})

    for how in ("M", "msix_mask", "msix_enable"):
        await mask(how, 1)
        for _ in range(2):  # two rises while it is masked are one message
            await bench.fault()
            await bench.settle()
            await bench.write("ipsr", 2)
        assert bench.messages() == sent, how
        assert await bench.bus.read(0x400, 8) == 1 << 1, how
        await mask(how, 0)
        await bench.settle()
        sent.append(1)
        assert bench.messages() == sent, how
        assert await bench.bus.read(0x400, 8) == 0
        await bench.settle()
        assert bench.messages() == sent, how
    await bench.write("fqcsr", 1)
    await bench.fault()
    await bench.settle()
    assert bench.messages() == sent and await bench.read("ipsr") == 0, "fie is 0"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_message_that_fails_is_recorded(dut):
    """IOMMU-IRQ-3: cause 273, TTYP 0, iotval the address, for each error; one record, no storm; the next interrupt comes."""
    bench = await Bench(dut, WIDTH).enable()
    place, tail = bench.place(0), 0
    for status in (BurstStatus.UR, BurstStatus.CA, BurstStatus.TIMEOUT, BurstStatus.RESET):
        bench.broken[place >> 12] = status
        await bench.command_error()
        await bench.settle()
        await bench.settle()
        records = [FaultRecord.unpack(bench.memory.read(FAULTS + 32 * n, 32)) for n in range(tail, tail + 2)]
        # The first record raises fip, whose message fails as well; its record finds fip set.
        assert [(r.cause, r.ttyp, r.device_id, r.iotval) for r in records] == [(273, 0, 0, place), (273, 0, 0, bench.place(1))]
        tail += 2
        assert await bench.read("fqt") == tail
        bench.broken.clear()
        before = len(bench.messages())
        await bench.write("fqh", tail)
        await bench.write("fqcsr", 3 | FQ_RW1C)
        await bench.write("cqcsr", 0)
        await bench.until_register("cqcsr", lambda value: not value & 3 << 16, "cqon to fall")
        bench.tail = 0
        await bench.write("cqt", 0)
        await bench.write("cqcsr", 3)
        await bench.write("ipsr", 3)
        await bench.command_error()
        await bench.settle()
        assert bench.messages()[before:] == [0], "the next interrupt"
        await bench.write("cqcsr", 0)
        await bench.until_register("cqcsr", lambda value: not value & 3 << 16, "cqon to fall")
        bench.tail = 0
        await bench.write("cqt", 0)
        await bench.write("cqcsr", 3)
        await bench.write("ipsr", 3)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def software_has_the_table_meanwhile(dut):
    """IOMMU-IRQ-8: while messages are sent their addresses and data are written with what they are, in every phase: all are right."""
    bench = await Bench(dut, WIDTH).enable()
    for phase in range(24):
        await bench.fault()
        await ClockCycles(dut.clk, phase)
        for _ in range(4):
            await bench.write("msi_addr_1", bench.place(1))
            await bench.write("msi_data_1", 0xD1)
        await bench.settle()
        assert bench.messages() == [1] * (phase + 1)
        await bench.write("ipsr", 2)
        await bench.write("fqh", await bench.read("fqt"))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def random_masks_lose_nothing(dut):
    """IOMMU-IRQ-4: faults under masks that change at random: every fault acknowledged is followed by a message, never two for one rise."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, WIDTH).enable()
    for n in range(40):
        masked = rng.random() < 0.5
        await bench.write("msi_vec_ctl_1", masked)
        await bench.fault()
        await ClockCycles(dut.clk, rng.randrange(1, 150))
        if masked:
            await bench.write("msi_vec_ctl_1", 0)
        await bench.settle()
        assert bench.messages() == [1] * (n + 1), f"step {n}"
        await bench.write("fqh", await bench.read("fqt"))
        await bench.write("ipsr", 2)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def wires_are_levels(dut):
    """IOMMU-IRQ-6: by wires: high while ipsr has the bit, two causes on one wire, no message; by messages: no wire; fctl in Off only."""
    both = params()["IGS"] == 2
    bench = Bench(dut, WIDTH)
    await bench.begin()
    await bench.write("ddtp", 0)
    await bench.until_register("ddtp", lambda value: not value & 16, "busy to clear")
    assert await bench.read("fctl") == (0 if both else 2)
    await bench.write("fctl", 7)
    assert await bench.read("fctl") == 2
    await bench.write("ddtp", 1)
    await bench.write("fctl", 0)
    assert await bench.read("fctl") == 2, "not while ddtp is not Off"
    bench.reports, bench.tail = Stream(dut, "reports"), 0
    for v in range(4):
        await bench.write(f"msi_addr_{v}", bench.place(v))
        await bench.write(f"msi_vec_ctl_{v}", 0)
        assert both or await bench.read(f"msi_addr_{v}") == 0
    await bench.write("icvec", 2 | 3 << 4)
    for base, csr, at in (("cqb", "cqcsr", COMMANDS), ("fqb", "fqcsr", FAULTS)):
        await bench.write(base, at >> 2 | 3)
        await bench.write(csr, QueueCsr.EN | QueueCsr.IE)

    async def wires():
        await bench.settle()
        return int(dut.wires.value)

    await bench.fault()
    assert await wires() == 8
    await bench.command_error()
    assert await wires() == 12
    await bench.write("ipsr", 2)
    assert await wires() == 4
    await bench.fault()
    await bench.write("icvec", 1 | 1 << 4)
    assert await wires() == 2
    await bench.write("ipsr", 1)
    assert await wires() == 2 and await bench.read("ipsr") == 3, "the command is still illegal"
    await bench.write("cqcsr", CQ_RW1C)
    await bench.write("ipsr", 3)
    assert await wires() == 0 and not bench.messages()
    for csr in ("cqcsr", "fqcsr"):
        await bench.write(csr, 0)
        await bench.until_register(csr, lambda value: not value & 3 << 16, "it to be off")
    await bench.write("ddtp", 0)
    await bench.until_register("ddtp", lambda value: not value & 16, "busy to clear")
    await bench.write("fqcsr", QueueCsr.EN | QueueCsr.IE)
    await bench.write("fctl", 0)
    assert await bench.read("fctl") == 2, "not while a queue is on"
    await bench.write("fqcsr", 0)
    await bench.until_register("fqcsr", lambda value: not value & 3 << 16, "it to be off")
    bench.latency = lambda: 300
    await bench.write("cqcsr", QueueCsr.EN)
    await bench.write("cqt", 1)
    await bench.write("cqcsr", 0)
    assert await bench.read("cqcsr") == QueueCsr.ON | QueueCsr.BUSY
    await bench.write("fctl", 0)
    assert await bench.read("fctl") == 2, "not while a queue is on, if no longer wanted"
    await bench.until_register("cqcsr", lambda value: not value & 3 << 16, "it to be off")
    await bench.write("fctl", 0)
    assert await bench.read("fctl") == (0 if both else 2)
    await bench.write("fqcsr", QueueCsr.EN | QueueCsr.IE)
    await bench.write("msi_data_1", 0xD1)
    await bench.fault()
    assert await wires() == (0 if both else 2)
    assert bench.messages() == ([1] if both else [])


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def reads_see_the_end_of_messages(dut):
    """IOMMU-IRQ-7: a read of a mask or of the pending bits is answered behind a message under way, 1,023 cycles later at most; no write
    and no other read waits."""
    bench = await Bench(dut, WIDTH, limit=1030).enable(masked=(1,))
    memory = Stream(dut, "bursts")
    await bench.fault()
    await bench.settle()
    for place, held in ((0x31C, 40), (0x400, 40), (0x318, 1100)):
        memory.set_ready(0)
        await bench.write("msi_vec_ctl_1", 0)
        await bench.write("msi_vec_ctl_1", 1)
        await bench.read("ipsr")
        assert max(bench.bus.latencies[-3:]) <= 4
        told = len(bench.messages())
        read = cocotb.start_soon(bench.bus.read(place, 4))
        await ClockCycles(dut.clk, held)
        assert read.done() == (held > 1023)
        memory.set_ready(1)
        await read
        assert held > 1023 or len(bench.messages()) == told + 1
        await bench.settle()
        assert len(bench.messages()) == told + 1
        assert max(bench.bus.latencies) <= 1027
        await bench.write("ipsr", 2)
        await bench.fault()
        await bench.settle()
