"""A disk of a whole card on rings of either kind, with what may be negotiated for them; the golden model judges every TLP."""

import cocotb
import pytest

from ringwall.models.virtio.blk import BlkStatus
from ringwall.models.virtio.driver import Feature
from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import Card
from ringwall.sim.run import params, run

CONFIG = EndpointConfig(width=128, iommu=None, disks=(BlkConfig(capacity_sectors=512),), tags=64, completion_timeout_cycles=10_000)
KINDS = {
    "packed": (Feature.RING_PACKED, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.NOTIFICATION_DATA),
    "packed in order": (Feature.RING_PACKED, Feature.IN_ORDER),
    "split": (Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.NOTIFICATION_DATA),
    "split in order": (Feature.IN_ORDER, Feature.EVENT_IDX),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ring_kinds(request, kind):
    """SYS-RING-2: the card is simulated with each kind of ring."""
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, params={"kind": kind})


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def disk_on_any_ring(dut):
    """SYS-RING-1: writes and reads in every framing, several at once, over the end of the ring; interrupts as asked for (V037, V040, V049,
    V056, V058, V061, V062)."""
    card = await Card(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=30).begin()
    features = sum(1 << bit for bit in KINDS[params()["kind"]])
    disk = await card.disk(0, queue_size=24 if features >> Feature.RING_PACKED & 1 else 16, buffer_pages=40, features=features)
    for turn in range(4):
        content = card.rng.randbytes(512 * card.rng.randrange(1, 5))
        framing = ("parts", "whole", "random")[turn % 3]
        requests = [disk.blk.write(8 * n, content, framing=framing) for n in range(3)]
        disk.blk.ring.enable_interrupts(ahead=2 if features >> Feature.EVENT_IDX & 1 else 0)
        await disk.done(requests)
        assert {request.status for request in requests} == {BlkStatus.OK}
        back = disk.blk.read(8, len(content), framing=framing)
        await disk.done([back])
        assert back.data == content
    assert card.host.statistics.interrupts >= 2
    card.finish()
