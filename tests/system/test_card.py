"""The whole card against the model host, with the golden model watching every TLP."""

import cocotb
import pytest

from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import Card
from ringwall.sim.run import params, run


def config_of(width):
    return EndpointConfig(width=width, disks=(BlkConfig(capacity_sectors=2048),), completion_timeout_cycles=10_000)


@pytest.mark.parametrize("width", [256])
def test_card(request, width):
    run(RawCard(config_of(width)), module=__name__, node=request.node.nodeid, params={"width": width}, sim="verilator")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def translated_disk_reads_what_it_wrote(dut):
    """SYS-CARD-1: enumerate, IOMMU up, virtio-blk with ACCESS_PLATFORM: requests of mixed sizes and framings come back whole (R22, R24)."""
    config = config_of(params()["width"])
    card = await Card(dut, config, seed=cocotb.RANDOM_SEED).begin()
    assert [info.function for info in card.functions] == [0, 1]
    await card.enable_iommu(levels=2)
    disk = await card.disk(0)
    content = card.rng.randbytes(256 * 1024)
    at, writes = 0, []
    while at < len(content):
        size = min(512 * card.rng.choice([1, 2, 8, 16, 128]), len(content) - at)
        writes.append(disk.blk.write(at // 512, content[at : at + size]))
        at += size
        if len(writes) == 6 or at == len(content):
            await disk.done(writes)
            assert all(request.status == 0 for request in writes)
            writes = []
    reads, at = [], 0
    while at < len(content):
        size = min(512 * card.rng.choice([1, 2, 8, 16, 128]), len(content) - at)
        reads.append((at, disk.blk.read(at // 512, size)))
        at += size
        if len(reads) == 6 or at == len(content):
            await disk.done([request for _, request in reads])
            assert all(request.status == 0 and request.data == content[begin : begin + len(request.data)] for begin, request in reads)
            reads = []

    card.finish()
