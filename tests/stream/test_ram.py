"""RAMs as FPGAs have them."""

import gc
import warnings

import cocotb
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from cocotb.triggers import NextTimeStep, ReadOnly, RisingEdge

from ringwall.rtl.stream.ram import Ram
from ringwall.rtl.verilog import to_rtlil
from ringwall.sim.rams import BlockRams
from ringwall.sim.run import run
from ringwall.sim.stream import start


class Three(wiring.Component):
    """The same in a Ram, in one whose port is transparent, and in a memory: one place is written and read in each cycle."""

    write: In(2)
    read: In(2)
    data: In(8)
    ram: Out(8)
    transparent: Out(8)
    memory: Out(8)

    def elaborate(self, platform):
        m = Module()
        for name, kind, is_transparent in (("ram", Ram, False), ("transparent", Ram, True), ("memory", Memory, False)):
            m.submodules[f"{name}_rows"] = rows = kind(shape=8, depth=4, init=[1, 2, 3, 4])
            write = rows.write_port()
            read = rows.read_port(transparent_for=(write,) if is_transparent else ())
            m.d.comb += [
                write.en.eq(1), write.addr.eq(self.write), write.data.eq(self.data), read.addr.eq(self.read),
                getattr(self, name).eq(read.data),
            ]  # fmt: skip
        return m


def test_nothing_is_said():
    """STREAM-RAM-2: a component elaborated with such RAMs leaves nothing behind that Amaranth would warn of: ``make sim`` is quiet."""
    gc.collect()  # what others left
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        to_rtlil(Three(), platform=BlockRams())
        gc.collect()
    assert not [str(each.message) for each in said]


def test_collisions(request):
    run(Three(), module=__name__, node=request.node.nodeid, testcase="collisions_bring_wrong_data")


@cocotb.test(timeout_time=10, timeout_unit="us")
async def collisions_bring_wrong_data(dut):
    """STREAM-RAM-1: simulated, a Ram brings the complement of the old data when its place is written, a transparent port new data."""
    await start(dut)
    content = [0, 2, 3, 4]  # as the inputs were 0
    for write, read, data in ((1, 1, 0x55), (1, 1, 0x66), (2, 1, 0x77), (3, 3, 0x88), (0, 3, 0x99), (3, 2, 0xAA)):
        dut.write.value, dut.read.value, dut.data.value = write, read, data
        await RisingEdge(dut.clk)
        old, content[write] = content[read], data
        await ReadOnly()
        found = [int(port.value) for port in (dut.ram, dut.transparent, dut.memory)]
        assert found == ([old ^ 0xFF, data, old] if write == read else [old, old, old])
        await NextTimeStep()
