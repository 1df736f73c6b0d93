"""Cycles of the virtio-iommu with room for 4096 mappings, in the highest tree that they make; tests/viommu/test_intervals.py fills it."""

import cocotb
from cocotb.triggers import RisingEdge

from ringwall.models.virtio.iommu_formats import Attach, Detach, Map, MapFlag, Unmap
from ringwall.models.virtio.iommu_rules import Access
from ringwall.rtl.viommu.device import IommuDevice
from ringwall.sim.run import run
from ringwall.sim.stream import cycle
from ringwall.sim.viommu_bench import Wall, WallBench

PAGE = 4096
DEVICE = IommuDevice(endpoints=(1, 2), regions=())
HIGHEST = [0, *(1 << bit for bit in range(36))]  # pages whose tree is as high as it has nodes


def test_viommu(request, capsys):
    done = run(Wall(width=256, device=DEVICE), module=__name__, node=request.node.nodeid, params={"width": 256})
    with capsys.disabled():
        print("", *(line[6:] for line in done.log.splitlines() if line.startswith("BENCH ")), sep="\n  ")


def report(text):
    print(f"BENCH {text}", flush=True)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def requests_and_lookups(dut):
    """BENCH-VIOMMU-1: of 4096 mappings MAP, UNMAP of one and the first access to a page cost at most 200 cycles in the highest tree,
    UNMAP of many 8 more for each, the drain left out, which is counted apart; pages that are cached leave the gate one per cycle."""
    bench = await WallBench(dut, DEVICE).begin()
    assert DEVICE.intervals == 4096
    drains = []
    cocotb.start_soon(count_drains(dut, drains))

    async def ask(request):
        """Return the cycles of a request without those of its drain, and these."""
        drains.clear()
        began = cycle()
        assert await bench.serve(request.pack(), 4) == bytes(4)
        return cycle() - began - sum(drains), sum(drains)

    def page(n, last=None):
        return n * PAGE, (n if last is None else last) * PAGE + PAGE - 1

    await ask(Attach(1, 1))
    maps = [(await ask(Map(1, *page(n), n * PAGE, MapFlag.READ)))[0] for n in reversed(HIGHEST)]
    misses, bench.latency = [], lambda: 0
    for n in HIGHEST:
        began = cycle()
        await bench.access(Access(1, n * PAGE, False, 8))
        misses.append(bench.times[-1] - began)
    unmaps = [await ask(Unmap(1, *page(n))) for n in (0, 1)]
    unmap, drain = (max(figures) for figures in zip(*unmaps))
    report(f"highest tree of {len(HIGHEST)}: MAP {max(maps)} cycles, first access {max(misses)}, UNMAP of one {unmap}; to reach 200")
    report(f"a drain with nothing under way: {drain} cycles")
    assert max(*maps, *misses, unmap) <= 200

    cycles, _ = await ask(Unmap(1, 0, (1 << 64) - 1))
    report(f"UNMAP of {len(HIGHEST) - 2}: {cycles} cycles; to reach {200 + 8 * (len(HIGHEST) - 2)}")
    assert cycles <= 200 + 8 * (len(HIGHEST) - 2)

    for n in range(64):
        await ask(Map(1, *page(n), (1 << 20) * PAGE + 3 * n * PAGE, MapFlag.READ))
    for _ in range(2):
        bench.times.clear()
        over = await bench.send(*(Access(1, n * PAGE, False, 8) for n in range(64)))
        await over.wait()
    rate = 63 / (bench.times[-1] - bench.times[0])
    report(f"64 pages again: {rate:.3f} per cycle; to reach 1.0")
    assert rate >= 1.0

    cycles, drain = await ask(Detach(1, 1))
    report(f"DETACH of the last endpoint with 64 mappings: {cycles} cycles, drain {drain}")
    assert cycles <= 200 + 8 * 64


async def count_drains(dut, drains):
    """Append the cycles of each fence, from asked to answered."""
    while True:
        await RisingEdge(dut.fences)
        began = cycle()
        await RisingEdge(dut.drained)
        drains.append(cycle() - began)
