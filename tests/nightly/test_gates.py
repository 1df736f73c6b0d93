"""A whole card as gates of an ECP5, under the software that runs on the RTL."""

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.iommu.faults import Cause
from ringwall.models.virtio.blk import SECTOR, BlkStatus
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.spec.virtio import F_VERSION_1
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import PAGE
from ringwall.sim.compiled_bench import CompiledBench
from ringwall.sim.gates import GateCard

CONFIG = EndpointConfig(
    width=64, iommu=IommuConfig(entries=16, ways=1, walks=2), disks=(BlkConfig(capacity_sectors=16, queue_size=16),),
    transport_features=1 << F_VERSION_1, tags=32, wall_tags=4, read_buffer_bytes=4096)  # fmt: skip


def first_light(card):
    """Return every TLP with its cycle: enumeration, IOMMU, a translated disk, an invalidation, a refused access; all judged."""
    bench, seen = CompiledBench(CONFIG, seed=1, latency=20, stalls=32, card=card), []
    take = bench.compiled.observe

    def observe(event, tlp):
        if isinstance(event, (TlpReceived, TlpSent)):
            seen.append((event.cycle, type(event).__name__, *event.dwords))
        take(event, tlp)

    bench.compiled.observe = observe
    bench.now(bench.enable_iommu(levels=2))
    disk = bench.now(bench.disk(0, queue_size=16, buffer_pages=16))
    for sector, count in ((0, 8), (9, 3)):
        data = bench.rng.randbytes(count * SECTOR)
        for request in (disk.blk.write(sector, data), disk.blk.read(sector, len(data))):
            bench.done(disk, [request])
            assert request.status == BlkStatus.OK
        assert request.data == data

    moved = disk.blk.read(0, SECTOR)
    page = moved.writable[0][0] & -PAGE
    bench.map(disk.table, disk.memory, page, 1)
    bench.compiled.run(bench.iommu.invalidate(iova=page))
    bench.done(disk, [moved])
    assert moved.status == BlkStatus.OK

    refused = disk.blk.write(0, bytes(SECTOR))
    page = refused.readable[-1][0] & -PAGE
    disk.golden.doubtful.add((refused.kind, refused.sector))
    disk.table.unmap(page)
    bench.compiled.run(bench.iommu.invalidate(iova=page))
    disk.blk.publish()
    bench.compiled.run(disk.driver.notify())
    while bench.compiled.step(1000):
        pass
    assert {record.cause for record in bench.compiled.run(bench.iommu.read_faults())} == {Cause.READ_PAGE_FAULT}
    bench.session.finish()
    assert bench.session.board.comparisons > 100
    bench.compiled.close()
    return seen


def test_whole_card():
    """GATES-5: first light on the gates of a whole card: each TLP is that of the RTL, in the same cycle."""
    assert first_light(GateCard) == first_light(RawCard)
