"""The whole card on Icarus, where a value that nothing has defined stays unknown."""

import cocotb

from ringwall.sim.card import Card, bench_card, bench_config
from ringwall.sim.run import run

WIDTH = 64


def test_icarus(request):
    run(bench_card(WIDTH), module=__name__, node=request.node.nodeid, sim="icarus")


@cocotb.test(timeout_time=400, timeout_unit="us")
async def translated_disk_reads_what_it_wrote(dut):
    """SYS-ICARUS-1: enumerate, IOMMU up, a translated virtio-blk: 4 KiB come back whole, no bit on the link is unknown (R22, R24)."""
    card = await Card(dut, bench_config(WIDTH), seed=cocotb.RANDOM_SEED).begin()
    await card.enable_iommu(levels=2)
    disk = await card.disk(0)
    content = card.rng.randbytes(4096)
    pieces = [(0, 1), (1, 2), (3, 5)]  # first sector, sectors
    writes = [disk.blk.write(sector, content[512 * sector : 512 * (sector + count)]) for sector, count in pieces]
    await disk.done(writes)
    assert [request.status for request in writes] == [0, 0, 0]
    reads = [disk.blk.read(sector, 512 * count) for sector, count in ((0, 8), (7, 1))]
    await disk.done(reads)
    assert [request.status for request in reads] == [0, 0]
    assert [request.data for request in reads] == [content, content[-512:]]
    card.finish()
