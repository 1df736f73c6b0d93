"""The cache and what keeps it true, joined: Enables and fences."""

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.rtl.ats.unit import HostAts
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, start


def test_unit(request):
    run(HostAts(width=64, functions=2, depth=4, entries=16, ways=2, requests=2, waiting=8, has_pasid=True), module=__name__,
        node=request.node.nodeid)  # fmt: skip


@cocotb.test(timeout_time=50, timeout_unit="us")
async def pasids_wait_for_a_fence(dut):
    """ATS-PASID-4: a function whose PASID Enable fell may use PASIDs again when a fence has ended that began behind it; its ATS Enable,
    and the other function, go on."""
    await start(dut)
    dut.enable.value = dut.pasid_enable.value = 0b11
    await ClockCycles(dut.clk, 20)
    assert (dut.usable.value, dut.pasid_usable.value, dut.fence__valid.value) == (0b11, 0b11, 0)
    for enabled in (0b01, 0b11):
        dut.pasid_enable.value = enabled
        await ClockCycles(dut.clk, 10)
        assert (dut.usable.value, dut.pasid_usable.value, dut.fence__valid.value) == (0b11, 0b01, 1)
    await Stream(dut, "fence").get()
    await ClockCycles(dut.clk, 20)
    assert dut.pasid_usable.value == 0b01
    await Stream(dut, "fenced").put()
    await ClockCycles(dut.clk, 10)
    assert (dut.usable.value, dut.pasid_usable.value, dut.fence__valid.value) == (0b11, 0b11, 0)
