"""The testbench's driver of the register bus: it reads what it wrote and catches an owner that breaks the contract."""

import random

import cocotb
import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In
from cocotb.triggers import ClockCycles

from ringwall.rtl.regs.bus import RegisterBus as Signature
from ringwall.sim.regs_bus import RegisterBus, RegisterError
from ringwall.sim.run import params, run
from ringwall.sim.stream import start


class Words(wiring.Component):
    """16 words of 8 bytes at offset 0 of every BAR, errors above; ``how`` breaks a rule: 1 slow, 2 answers twice, 3 never."""

    bus: In(Signature())
    how: In(2)

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=64, depth=16, init=[])
        read, write = memory.read_port(), memory.write_port(granularity=8)
        request, response = self.bus.request, self.bus.response
        count = Signal(6)
        out_of_range, answers = Signal(), Signal(2)
        offset = request.payload.offset
        m.d.comb += [
            read.addr.eq(offset[3:]), write.addr.eq(offset[3:]), write.data.eq(request.payload.data),
            response.payload.data.eq(read.data), response.payload.error.eq(out_of_range),
        ]  # fmt: skip
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += request.ready.eq(1)
                with m.If(request.valid):
                    m.d.comb += read.en.eq(1)
                    with m.If(request.payload.is_write & (offset < 128)):
                        m.d.comb += write.en.eq(request.payload.byte_enable)
                    m.d.sync += [out_of_range.eq(offset >= 128), count.eq(0), answers.eq(0)]
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.sync += count.eq(count + (count != 63))
                m.d.comb += [read.en.eq(0), response.valid.eq(~self.how[0] | (self.how == 1) & (count > 17))]
                with m.If(response.valid & response.ready):
                    m.d.sync += answers.eq(answers + 1)
                    with m.If((self.how != 2) | (answers == 1)):
                        m.next = "TAKE"
        return m


@pytest.mark.parametrize("how, message", [(0, None), (1, "no answer .* offset 0x8"), (2, "nobody asked for"), (3, "no answer")])
def test_regs_bus(request, how, message):
    """SIM-REGS-1: accesses of every size and place read what was written; late, missing and doubled answers are caught."""
    if message is None:
        run(Words(), module=__name__, node=request.node.nodeid, params={"how": 0}, testcase=["reads_return_what_was_written"])
        return
    with pytest.raises(AssertionError, match=message):
        run(Words(), module=__name__, node=request.node.nodeid, params={"how": how}, testcase="one_access")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def reads_return_what_was_written(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "bus__request")
    bus = RegisterBus(dut, hold=lambda: rng.choice([0, 0, 3]))
    mirror = bytearray(128)
    for n in range(16):
        await bus.write(8 * n, 0, 8)
    for _ in range(300):
        size = rng.randrange(1, 9)
        offset = 8 * rng.randrange(16) + rng.randrange(9 - size)
        if rng.random() < 0.5:
            value = rng.getrandbits(8 * size)
            await bus.write(offset, value, size, function=rng.randrange(8))
            mirror[offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert await bus.read(offset, size) == int.from_bytes(mirror[offset : offset + size], "little")
    with pytest.raises(RegisterError, match="function 2 BAR 1 offset 0x80"):
        await bus.read(0x80, 4, function=2, bar=1)
    assert await bus.read(0, 8) == int.from_bytes(mirror[:8], "little")
    with pytest.raises(ValueError, match=r"inside one 8-byte word, not \(6, 4\)"):
        await bus.read(6, 4)
    assert max(bus.latencies) == 1


@cocotb.test(timeout_time=1, timeout_unit="us")
async def one_access(dut):
    await start(dut, "bus__request")
    dut.how.value = params()["how"]
    await RegisterBus(dut).read(8)
    await ClockCycles(dut.clk, 20)
