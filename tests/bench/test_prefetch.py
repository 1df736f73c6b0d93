"""What translation costs a disk whose buffers are new pages: rings tell the translator of them before their data moves."""

import re

import cocotb
import pytest

from ringwall.models.virtio.blk import BlkStatus
from ringwall.sim.card import PAGE, Card, bench_card, bench_config
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle

WIDTH, LATENCY, LEAST = 256, 250, 0.95
SIZES = {4096: (20, 60), 65536: (4, 12)}  # bytes of a request: from the end of which request to that of which other is measured


@pytest.mark.parametrize("size", SIZES)
def test_fresh_pages(request, size, capsys):
    """BENCH-PREFETCH-1: 256 bits, 250 cycles of latency, a fresh page per 4 KiB: at least 95 % of the throughput without translation."""
    done = run(bench_card(WIDTH), module=__name__, node=request.node.nodeid, params={"size": size}, sim="verilator")
    found = {key: float(each) for key, each in re.findall(r"BENCH (.*): (\S+) cycles", done.log)}
    assert len(found) == 4
    with capsys.disabled():
        print()
        for way in ("read", "write"):
            off, on = found[f"{way} off"], found[f"{way} on"]
            print(f"  {size:5} bytes, disk {way:5}: {on:.1f} cycles per 4 KiB, {off:.1f} untranslated: {off / on:.1%}, least {LEAST:.0%}")
    assert all(found[f"{way} off"] / found[f"{way} on"] >= LEAST for way in ("read", "write"))


async def each(card, disk, size, is_read):
    """Return the cycles per 4 KiB of requests of ``size`` bytes that are offered at once, without what the first of them wait for."""
    first, last = SIZES[size]
    if disk.table is not None:
        await card.port.run(card.iommu.invalidate())
    framing = {"framing": "pages" if size == PAGE else "parts"}
    batch = [disk.blk.read(0, size, **framing) if is_read else disk.blk.write(0, bytes(size), **framing) for _ in range(last)]
    await disk.done(batch[:first])
    begun, first = cycle(), sum(request.is_done for request in batch)
    await disk.done(batch)
    assert all(request.status == BlkStatus.OK for request in batch)
    return (cycle() - begun) / (last - first) / (size // PAGE)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def disks_with_and_without_translation(dut):
    """BENCH-PREFETCH-2: the run of BENCH-PREFETCH-1: one disk behind the IOMMU, one beside it; every request is OK."""
    link = {"bytes_per_cycle": WIDTH // 8, "overhead_bytes": 0}
    card = Card(dut, bench_config(WIDTH), seed=1, latency=LATENCY, link=link)
    card.observers.clear()
    await card.begin()
    await card.enable_iommu()
    size = params()["size"]
    for number, name in enumerate(("on", "off")):
        disk = await card.disk(number, queue_size=256, buffer_pages=400, platform=name == "on")
        for is_read in (True, False):
            dut._log.info("BENCH %s %s: %.2f cycles", "read" if is_read else "write", name, await each(card, disk, size, is_read))
