"""The host at the end of the raw link, against the smallest card there can be."""

import random

import cocotb
import pytest
from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.models.events import Operation, TlpReceived, TlpSent
from ringwall.models.host import CompletionPolicy, ConfigRead, Delay, Host, MemoryRead, MemoryWrite, WaitInterrupt
from ringwall.models.memory import GuestMemory
from ringwall.sim.host_port import HostPort
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, start
from ringwall.sim.tlp_bus import RawLink

BEAT = data.StructLayout({"data": 128, "keep": 4, "first": 1, "last": 1})
MRD, MWR, CFGRD, CPLD = 0x00, 0x40, 0x04, 0x4A


class SmallCard(wiring.Component):
    """16 dword registers at every address, read by configuration and memory reads of 1 dword, written by memory writes.

    A write to register 14 reads the dword at the address in register 2 from the host into register 3; one to register 15
    writes register 1 to the address in register 0. ``fault`` 1: never answers; 2: sends a TLP of a reserved type.
    """

    i: In(stream.Signature(BEAT))
    o: Out(stream.Signature(BEAT))
    fault: In(2)

    def elaborate(self, platform):
        m = Module()
        registers = Array(Signal(32, name=f"register_{n}") for n in range(16))
        words = [Signal(32, name=f"word_{n}") for n in range(4)]
        kind, index = words[0][24:32], words[2][2:6]
        requester = Const(0x0100, 16)
        m.d.comb += [self.o.payload.first.eq(1), self.o.payload.last.eq(1)]
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += Cat(*words).eq(self.i.payload.data)
                    m.next = "ACT"
            with m.State("ACT"):
                m.next = "TAKE"
                with m.If(kind == CPLD):
                    m.d.sync += registers[3].eq(words[3])
                with m.Elif(kind == MWR):
                    m.d.sync += registers[index].eq(words[3])
                    with m.If(index == 14):
                        m.next = "READ"
                    with m.Elif(index == 15):
                        m.next = "WRITE"
                with m.Elif(self.fault != 1):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                head = Mux(self.fault == 2, Const(0x1F00_0001, 32), Const(CPLD << 24 | 1, 32))
                lower = Mux(kind == CFGRD, 0, words[2][2:7])  # lower address: bits 6:2
                m.d.comb += [
                    self.o.valid.eq(1), self.o.payload.keep.eq(15),
                    self.o.payload.data.eq(Cat(
                        head, Const(4, 32), Const(0, 2), lower, Const(0, 1), words[1][8:32], registers[index])),
                ]  # fmt: skip
                with m.If(self.o.ready):
                    m.next = "TAKE"
            with m.State("READ"):
                m.d.comb += [
                    self.o.valid.eq(1), self.o.payload.keep.eq(7),
                    self.o.payload.data.eq(Cat(Const(MRD << 24 | 1, 32), Const(0x0F, 8), Const(5, 8), requester, registers[2])),
                ]  # fmt: skip
                with m.If(self.o.ready):
                    m.next = "TAKE"
            with m.State("WRITE"):
                m.d.comb += [
                    self.o.valid.eq(1), self.o.payload.keep.eq(15),
                    self.o.payload.data.eq(Cat(Const(MWR << 24 | 1, 32), Const(0x0F, 16), requester, registers[0], registers[1])),
                ]  # fmt: skip
                with m.If(self.o.ready):
                    m.next = "TAKE"
        return m


def test_host_port(request):
    """SIM-HOST-1: operations, DMA and interrupts cross the link both ways; software runs side by side; the log is complete."""
    run(SmallCard(), module=__name__, node=request.node.nodeid, testcase=["software_runs_side_by_side", "waits_end"])


def bring_up(dut, events=None, **policy):
    memory = GuestMemory()
    host = Host(memory, rng=random.Random(cocotb.RANDOM_SEED), policy=CompletionPolicy(**policy))
    host.assume_enabled(0)
    link = RawLink(dut)
    observe = None if events is None else lambda event, tlp: events.append((event, tlp))
    port = HostPort(host, link, observe=observe, limit_cycles=2000)
    link.start()
    return memory, host, port


@cocotb.test(timeout_time=200, timeout_unit="us")
async def software_runs_side_by_side(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "i")
    events = []
    memory, host, port = bring_up(dut, events, latency=100)
    base, finished = 0xE000_0000, []

    def registers(mine):
        content = {}
        for _ in range(40):
            n = rng.choice(mine)
            if n in content and rng.random() < 0.5:
                read = ConfigRead(0, 4 * n, 4) if rng.random() < 0.3 else MemoryRead(base + 4 * n, 4)
                assert (yield read) == content[n]
            else:
                content[n] = rng.getrandbits(32)
                yield MemoryWrite(base + 4 * n, 4, content[n])
            yield Delay(rng.randrange(30))
        finished.append(mine)
        return len(content)

    def mover():
        memory.store_l_le(0x1234, 0xCAFE)
        yield MemoryWrite(base + 8, 4, 0x1234)
        begin = cycle()
        yield MemoryWrite(base + 4 * 14, 4, 0)
        while (yield MemoryRead(base + 12, 4)) != 0xCAFE:
            yield Delay(10)
        assert cycle() - begin >= 100, "the answer came before the host's latency"
        yield MemoryWrite(base, 4, 0x5000)
        yield MemoryWrite(base + 4, 4, 77)
        yield MemoryWrite(base + 4 * 15, 4, 0)
        while memory.load_l_le(0x5000) != 77:
            yield Delay(10)
        yield MemoryWrite(base, 4, 0xFEE0_0000)
        yield MemoryWrite(base + 4 * 15, 4, 0)
        assert (yield WaitInterrupt(0, None, 500))
        begin = cycle()
        assert not (yield WaitInterrupt(0, None, 300))
        assert cycle() - begin == 300
        return "moved"

    beside = port.start(registers([8, 9, 10, 11, 12, 13]))
    third = port.start(registers([4, 5, 6, 7]))
    assert await port.run(mover()) == "moved"
    assert await beside == 6
    assert await third == 4
    assert len(finished) == 2
    assert not host.outstanding
    assert not host.violations
    kinds = [type(event) for event, _ in events]
    operations = [event for event, _ in events if type(event) is Operation]
    reads = [one for one in operations if isinstance(one.operation, ConfigRead | MemoryRead)]
    assert kinds.count(TlpReceived) == len(reads) + 1 + 2  # answers, one DMA read, one DMA write and one interrupt
    assert kinds.count(TlpSent) == len([one for one in operations if not isinstance(one.operation, Delay | WaitInterrupt)]) + 1
    assert [event.cycle for event, _ in events] == sorted(event.cycle for event, _ in events)
    assert all((tlp is not None) is (type(event) is TlpReceived) for event, tlp in events)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def waits_end(dut):
    await start(dut, "i")
    _, _, port = bring_up(dut)
    assert await port.perform(MemoryRead(0xE000_0000, 4)) == 0
    begin = cycle()
    await port.perform(Delay(7))
    assert cycle() - begin == 7
    dut.fault.value = 1
    begin = cycle()
    with pytest.raises(AssertionError, match=r"did not answer MemoryRead.* within 2000 cycles"):
        await port.perform(MemoryRead(0xE000_0000, 4))
    assert cycle() - begin == 2000
    dut.fault.value = 0
    assert await port.perform(MemoryRead(0xE000_0000, 4)) == 0


@pytest.mark.parametrize("how, message", [("reserved", "malformed TLP: .* reserved"), ("idle", "write without bus master")])
def test_broken_rules(request, how, message):
    """SIM-HOST-2: a malformed TLP of the card and a request that it was not allowed to make fail the test."""
    with pytest.raises(AssertionError, match=message):
        run(SmallCard(), module=__name__, node=request.node.nodeid, params={"how": how}, testcase="card_is_judged")


@cocotb.test(timeout_time=20, timeout_unit="us")
async def card_is_judged(dut):
    await start(dut, "i")
    _, host, port = bring_up(dut)
    if params()["how"] == "reserved":
        dut.fault.value = 2
        await port.perform(MemoryRead(0xE000_0000, 4))
    else:
        host.function(0).values[4] = [0]
        host.function(0).refresh()
        await port.perform(MemoryWrite(0xE000_003C, 4, 0))
        await ClockCycles(dut.clk, 50)
