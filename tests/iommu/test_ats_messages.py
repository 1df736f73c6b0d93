"""ATS commands, completions of invalidations and their timeouts, behind the registers and beside the golden queue. [RVIOMMU1.0 4.1.4]"""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.commands import AtsInval, AtsPrgr, CommandQueue, IofenceC, IotinvalVma, command_defects
from ringwall.models.iommu.registers import CQ_ERRORS, CQ_RW1C, Capabilities, QueueCsr, RegisterFile
from ringwall.models.memory import GuestMemory
from ringwall.rtl.iommu.ats_messages import AtsMessages
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.interface import ProgrammingInterface
from ringwall.rtl.iommu.layouts import AtsMessage, InvalidationCompletion
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, unpack

WIDTH, QUEUE, LOG2 = 64, 0x8000_0000, 6
NEVER, SOON = 1 << 33, 3000  # timeouts


@pytest.mark.parametrize("itags", [1, 5, 32])
def test_ats_messages(request, itags):
    run(ProgrammingInterface(width=WIDTH, features=Features(ATS=True), itags=itags, timeout_cycles=NEVER), module=__name__,
        node=request.node.nodeid, params={"itags": itags}, testcase=["commands_are_the_golden_ones", "illegal"])  # fmt: skip


def test_ats_timeouts(request):
    run(ProgrammingInterface(width=WIDTH, features=Features(ATS=True), itags=3, timeout_cycles=SOON), module=__name__,
        node=request.node.nodeid, params={"itags": 3}, testcase=["timeouts", "off_while_waiting", "a_message_stays"])  # fmt: skip


def test_ats_messages_parameters():
    """IOMMU-ITAG-1: a number of ITags and a timeout that cannot be are refused with a sentence."""
    for itags, timeout, message in ((0, 4, "ITags must be 1 to 32, not 0"), (33, 4, "ITags .* not 33"), (1, 3, "Timeout must be .* not 3")):
        with pytest.raises(ValueError, match=message):
            AtsMessages(itags=itags, timeout_cycles=timeout)


class Bench(IommuHost):
    """The queue on, in circuit and model; ``sent`` has the messages, ``sent_cycles`` when they were taken."""

    async def enable(self):
        await self.begin()
        self.memory.write(QUEUE, bytes(16 << LOG2))
        self.sent, self.sent_cycles, self.tail, self.golden_memory = [], [], 0, GuestMemory()
        self.messages, self.completions = Stream(self.dut, "ats_message"), Stream(self.dut, "invalidation_completion")
        self.messages.set_ready(1)
        cocotb.start_soon(self.messages.watch(self.sent, self.sent_cycles))
        Stream(self.dut, "invalidate").set_ready(1)
        self.registers = RegisterFile(Capabilities(ATS=True))
        self.golden = CommandQueue(self.registers, self.golden_memory, itags=params()["itags"])
        await self.both(0x18, 8, QUEUE >> 2 | LOG2 - 1)
        await self.both(0x48, 4, 3)
        return self

    async def both(self, offset, size, value):
        await self.bus.write(offset, value, size)
        self.registers.write(offset, size, value)

    async def submit(self, commands):
        for command in commands:
            for memory in (self.memory, self.golden_memory):
                memory.write(QUEUE + 16 * self.tail, command if isinstance(command, bytes) else command.encode())
            self.tail = (self.tail + 1) % (1 << LOG2)
        await self.both(0x24, 4, self.tail)

    async def compare(self, what):
        """Let both go as far as they can; compare messages, cqh, errors."""
        while self.golden.step() is not None:
            pass
        head, still = None, 0
        while still < 6 or head != self.registers.cqh:
            now, still = await self.read("cqh"), still + 1
            if now != head:
                head, still = now, 0
            assert still < 100, f"{what}: cqh stays at {head}, not {self.registers.cqh}"
        assert await self.read("cqcsr") & CQ_RW1C == self.registers.cqcsr & CQ_RW1C, what
        assert await self.read("ipsr") == self.registers.read(0x54, 4), what
        found = [unpack(AtsMessage, payload) for payload in self.sent]
        assert [(m.code, m.RID, m.payload, m.PID if m.PV else None, m.DSEG if m.DSV else None, m.itag) for m in found] == [
            (m.code, m.rid, m.payload, m.pid, m.segment, m.itag or 0) for m in self.golden.sent], what
        assert all(m.PV or not m.PID for m in found) and all(m.DSV or not m.DSEG for m in found)
        self.sent.clear()
        self.golden.sent.clear()

    async def complete(self, rid, itags, count, segment=None):
        """A function completes invalidations, of both."""
        await self.completions.put(pack(InvalidationCompletion, RID=rid, DSV=segment is not None, DSEG=segment or 0, itags=itags,
                                        count=count))  # fmt: skip
        return self.golden.invalidation_completed(rid, itags, count, segment=segment)


def a_command(rng):
    pid, segment = rng.choice([None, rng.getrandbits(20)]), rng.choice([None, None, 3, 0x80])
    rid = rng.choice([0x100, 0x101, 0x4321])
    return rng.choice([AtsInval(rid, rng.getrandbits(52) << 12, rng.random() < 0.5, rng.random() < 0.5, pid, segment)] * 3 + [
        AtsPrgr(rng.getrandbits(16), rng.getrandbits(9), rng.getrandbits(4), pid, segment), IotinvalVma(), IofenceC()])  # fmt: skip


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def commands_are_the_golden_ones(dut):
    """IOMMU-ITAG-2: random commands, fences, completions in parts, of several ITags, late, strange: messages, cqh as the golden queue."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, WIDTH, latency=lambda: rng.randrange(5, 30), fence_latency=lambda: rng.randrange(1, 9)).enable()
    cocotb.start_soon(random_ready(bench.messages, rng, 0.5))
    golden, strange, done = bench.golden, 0, 0
    for step in range(80):
        room = (bench.registers.cqh - bench.tail - 1) % (1 << LOG2)
        if rng.random() < 0.5 and room > 8:
            await bench.submit([a_command(rng) for _ in range(rng.randrange(1, 8))])
            await bench.compare(f"step {step}")
        waiting = golden._under_way
        for _ in range(rng.choice([0, 1, 2, 8])):
            if not waiting:
                break
            itag, one = rng.choice(list(waiting.items()))
            same = [n for n, other in waiting.items() if (other.rid, other.segment) == (one.rid, one.segment)]
            itags = sum(1 << n for n in rng.choice([same, [itag]]))
            rid, segment = one.rid, one.segment if one.segment is not None else rng.choice([None, 9])
            if rng.random() < 0.2:
                more = itags ^ 1 << rng.randrange(32)
                itags, rid, segment = rng.choice([(0, rid, segment), (more, rid, segment), (itags, rid ^ 1, segment), (itags, rid, None),
                                                  (itags, rid, 5)])  # fmt: skip
            is_taken = await bench.complete(rid, itags, rng.choice([one.completions + 1 & 7] * 3 + [0, 2]), segment)
            strange, done = strange + (not is_taken), done + is_taken
            await bench.compare(f"step {step}, completed")
    assert strange > 5 and done > 20


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def illegal(dut):
    """IOMMU-ITAG-3: each reserved func3 and bit of ATS commands: cmd_ill, no message; bits of payloads without use are no errors."""
    bench = await Bench(dut, WIDTH, latency=lambda: 3).enable()
    bad = {name: raw for name, raw in command_defects({"ATS"}).items() if name.startswith(("ATS", "OPCODE_5"))}
    for name, raw in bad.items():
        await bench.submit([raw])
        await bench.compare(name)
        assert bench.registers.cqcsr & CQ_ERRORS == QueueCsr.CMD_ILL
        for memory in (bench.memory, bench.golden_memory):
            memory.write(QUEUE + 16 * bench.registers.cqh, IofenceC().encode())
        await bench.both(0x48, 4, 3 | CQ_RW1C)
        await bench.both(0x54, 4, 3)
        await bench.compare(f"{name}, replaced")
    assert len(bad) > 20
    for command in (AtsInval(5), AtsPrgr(5, 6, 1)):
        await bench.submit([command.encode()[:8] + b"\xff" * 8])
    for command in (AtsInval(5, pid=0xABCDE, segment=0x77), AtsPrgr(5, 6, 1, pid=0xABCDE, segment=0x77)):  # without PV and DSV
        await bench.submit([(int.from_bytes(command.encode(), "little") & ~(3 << 32)).to_bytes(16, "little")])
    await bench.compare("payloads of ones, operands without their valid bits")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def timeouts(dut):
    """IOMMU-ITAG-4: not completed in time: told by the next fence by cmd_to, once; its ITag is free; a late completion is none."""
    bench = await Bench(dut, WIDTH, latency=lambda: 3, fence_latency=lambda: 2).enable()
    for wait in (0, 900, 1700, 2500):
        await ClockCycles(dut.clk, wait)
        bench.sent_cycles.clear()
        commands = [AtsInval(n % 2, n << 12) for n in range(4)] + [IotinvalVma(), IofenceC(), AtsPrgr(1, 2)]
        await bench.submit(commands)
        await bench.compare("three are under way, the fourth waits for an ITag")
        assert bench.registers.cqh == (bench.tail - 4) % (1 << LOG2)
        await bench.complete(1, 2, 1)
        await bench.compare("the fourth goes, too, and the fence waits")
        while not (csr := await bench.read("cqcsr")) & CQ_ERRORS:
            assert cycle() - bench.sent_cycles[-1] < 2 * SOON
        assert csr & CQ_ERRORS == QueueCsr.CMD_TO
        assert cycle() - bench.sent_cycles[-1] >= SOON
        bench.golden.invalidations_timed_out()
        await bench.compare("the fence says so")
        assert bench.registers.cqh == (bench.tail - 2) % (1 << LOG2)
        await bench.completions.put(pack(InvalidationCompletion, RID=0, itags=1, count=1))
        await bench.both(0x48, 4, 3 | CQ_RW1C)
        await bench.both(0x54, 4, 1)
        await bench.compare("it is told once, and the queue goes on")
        assert bench.registers.cqh == bench.tail
    await bench.submit([AtsInval(7), AtsInval(7)])
    await bench.compare("a last one")
    begun = cycle()
    await bench.complete(7, 1, 1)
    await ClockCycles(dut.clk, SOON - 200)
    await bench.complete(7, 2, 1)
    await ClockCycles(dut.clk, SOON)
    await bench.submit([IofenceC()])
    await bench.compare("completed in time")
    assert bench.registers.cqh == bench.tail and cycle() - begun > SOON


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_message_stays(dut):
    """IOMMU-ITAG-6: the ITag of a message that nobody takes yet stays the same when a lower one gets free."""
    bench = await Bench(dut, WIDTH, latency=lambda: 3).enable()
    await bench.submit([AtsInval(1), AtsInval(1)])
    await bench.compare("two are under way")
    bench.messages.set_ready(0)
    await bench.submit([AtsInval(2)])
    await bench.until(lambda: dut.ats_message__valid.value, "the third")
    bench.golden.step()
    await bench.complete(1, 1, 1)
    await ClockCycles(dut.clk, 5)
    bench.messages.set_ready(1)
    await bench.compare("it has the third ITag")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def off_while_waiting(dut):
    """IOMMU-ITAG-5: switched off while a fence, or a command without an ITag, waits for functions the queue goes off, and on again."""
    bench = await Bench(dut, WIDTH, latency=lambda: 3, fence_latency=lambda: 2).enable()
    for commands, sent in (([AtsInval(3), IofenceC()], 1), ([AtsInval(3)] * 4, 3)):
        await bench.both(0x18, 8, QUEUE >> 2 | LOG2 - 1)
        await bench.submit(commands)
        await bench.until(lambda count=sent: len(bench.sent) == count, "messages")
        await ClockCycles(dut.clk, 100)
        begun = cycle()
        await bench.both(0x48, 4, 0)
        await bench.until_register("cqcsr", lambda value: not value & 3 << 16, "cqon to fall", 5)
        assert cycle() - begun < 200 and len(bench.sent) == sent
        bench.sent.clear()
        bench.tail = 0
        await bench.both(0x24, 4, 0)
        await bench.both(0x48, 4, 3)
        for itag in range(sent):
            await bench.completions.put(pack(InvalidationCompletion, RID=3, itags=1 << itag, count=1))
        await bench.submit([IotinvalVma(), IofenceC()])
        await bench.until_register("cqh", lambda value: value == 2, "the queue")
        await bench.both(0x48, 4, 0)
        await bench.until_register("cqcsr", lambda value: not value & 3 << 16, "cqon to fall")
        bench.tail = 0
        await bench.both(0x24, 4, 0)
        await bench.both(0x48, 4, 3)
