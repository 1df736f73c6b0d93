"""The translator of a virtio-iommu alone, with intervals that are made up: what is forgotten serves nobody."""

import cocotb
from cocotb.triggers import ClockCycles, Lock, RisingEdge

from ringwall.rtl.iommu.layouts import DwordRequest, TranslateResponse
from ringwall.rtl.viommu.intervals import Interval
from ringwall.rtl.viommu.layouts import Endpoint, Forget
from ringwall.rtl.viommu.translator import FRAME_BITS, Translator
from ringwall.sim.run import run
from ringwall.sim.stream import cycle, pack, start, unpack

SLOT, FIRST, LAST, FRAME = 5, 0x100, 0x1FF, 0x7000


def test_translator(request):
    run(Translator(entries=16), module=__name__, node=request.node.nodeid)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def nothing_old_is_kept(dut):
    """VIOMMU-TR-4 (R15): in whatever cycle of a miss a forget comes: what is asked for behind it is looked up again, whether the miss took
    a lookup, or the interval of the one before, or was a prefetch (V180, V213)."""
    request, response, find, found, forget = await start(dut, "request", "response", "find", "found", "forget")
    interval = Interval(len(dut.find__payload), FRAME_BITS)
    dut.endpoints__1.value = pack(Endpoint, attached=1, slot=SLOT)
    response.set_ready(1)
    looked_up, answers = [], []
    cocotb.start_soon(response.watch(answers))
    is_mapped = True

    async def answer_lookups():
        while True:
            key = await find.get()
            looked_up.append(key & (1 << 36) - 1)
            await ClockCycles(dut.clk, 4)
            base = SLOT << 36
            await found.put(pack(interval, hit=is_mapped, first=base | FIRST, last=base | LAST, page=FRAME, readable=1, writable=1))

    async def ask(page, is_prefetch=0):
        answers.clear()
        await request.put(pack(DwordRequest, device_id=1, page=page, is_prefetch=is_prefetch))

    async def answered():
        while not answers:
            await RisingEdge(dut.clk)
        return unpack(TranslateResponse, answers[0])

    cocotb.start_soon(answer_lookups())
    for is_prefetch in (0, 1):
        for has_kept in (0, 1):
            for delay in range(20):
                is_mapped = True
                if has_kept:
                    await ask(FIRST + 3)
                    assert (await answered()).page == FRAME + 3
                await ask(FIRST + 32, is_prefetch)
                await ClockCycles(dut.clk, delay)
                is_mapped = False
                await forget.put(pack(Forget))
                await ClockCycles(dut.clk, 30)
                looked_up.clear()
                await ask(FIRST + 32)
                assert (await answered()).fault and looked_up == [FIRST + 32], (is_prefetch, has_kept, delay)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def prefetches_are_looked_up_one_by_one(dut):
    """VIOMMU-TR-5: pages prefetched while there is something to spare are looked up each; a miss waits for two of them at most."""
    request, response, find, found = await start(dut, "request", "response", "find", "found")
    interval = Interval(len(dut.find__payload), FRAME_BITS)
    dut.endpoints__1.value = pack(Endpoint, attached=1, slot=SLOT)
    response.set_ready(1)
    looked_up, answers, took, lock = [], [], [], Lock()
    cocotb.start_soon(response.watch(answers))

    async def answer_lookups():
        while True:
            key = await find.get()
            looked_up.append(key & (1 << 36) - 1)
            await ClockCycles(dut.clk, 4)
            await found.put(pack(interval, hit=1, first=key, last=key, page=FRAME, readable=1, writable=1))

    async def prefetch():
        page = 1
        while page < 31:
            async with lock:
                await RisingEdge(dut.clk)
                if dut.spare.value:
                    await request.put(pack(DwordRequest, device_id=1, page=page, is_prefetch=1))
                    page += 1

    cocotb.start_soon(answer_lookups())
    done = cocotb.start_soon(prefetch())
    for page in range(40, 48):
        begun = cycle()
        async with lock:
            await request.put(pack(DwordRequest, device_id=1, page=page))
        while len(answers) <= page - 40:
            await RisingEdge(dut.clk)
        took.append(cycle() - begun)
    assert not done.done() and max(took) < 30, took
    await done
    await ClockCycles(dut.clk, 40)
    assert sorted(looked_up) == [*range(1, 31), *range(40, 48)]
