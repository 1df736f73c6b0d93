"""A card whose IOMMU has every translation feature: two stages, processes and MSI page tables under a disk that works."""

import cocotb

from ringwall.models.events import Told
from ringwall.models.iommu.commands import IotinvalGvma
from ringwall.models.iommu.entries import SV57, SV57X4, DeviceContext, MsiPte, ProcessContext
from ringwall.models.iommu.faults import Cause
from ringwall.models.iommu.tables import Allocator, GuestView, MsiTable, PageTable, ProcessDirectory
from ringwall.models.virtio.blk import BlkStatus
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import PAGE, Card
from ringwall.sim.log import Log, read_log, run_header
from ringwall.sim.run import params, run
from ringwall.sim.session import replay

FEATURES = {name: True for name in Features.flags() if name not in ("ATS", "T2GPA")}  # those are the IOMMU's without a card
CONFIG = EndpointConfig(width=128, iommu=IommuConfig(entries=32, walks=4, **FEATURES), disks=(BlkConfig(capacity_sectors=512),), tags=64,
                        completion_timeout_cycles=10_000)  # fmt: skip
GUEST, TABLES = 0x12_0000_0000, 0x15_0000_0000  # guest physical addresses of buffers and of first-stage tables
GSCID, PSCID, TABLE_PAGES = 5, 9, 64


def test_features(request, tmp_path):
    """SYS-FEAT-2: the log of SYS-FEAT-1 replays without the card, and tells of processes and message tables."""
    path = tmp_path / "log.jsonl"
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, sim="verilator", params={"path": str(path)})
    session = replay(*read_log(path))
    assert session.board.comparisons > 500
    told = {event.method for event in read_log(path)[1] if isinstance(event, Told)}
    assert told >= {"offered", "context_changed", "process_context_changed", "msi_changed", "submitted"}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def disk_behind_everything(dut):
    """SYS-FEAT-1 (R41): every feature; PD20, Sv57 over Sv57x4, an MSI page table: a disk works, the golden model judges."""
    log = Log(params()["path"], run_header(cocotb.RANDOM_SEED, {"width": CONFIG.width}))
    card = await Card(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=30, log=log).begin()
    await card.enable_iommu(levels=2)
    assert all(getattr(card.iommu.capabilities, name) for name in FEATURES)
    disk = await card.disk(0, buffer_pages=40)
    memory, allowed, features = card.session.memory, card.session.allowed, card.iommu.capabilities.switched_on()
    options = {"observer": allowed, "features": features}

    # The guest: its pages lie where they did, its tables in memory of its own.
    second = PageTable(memory, card.allocator, scheme=SV57X4, **options)
    for n in range(TABLE_PAGES):
        second.map_page(TABLES + n * PAGE, card.allocator.page())
    view = GuestView(memory, second)
    own = Allocator(view, TABLES, TABLE_PAGES * PAGE)
    first = PageTable(view, own, scheme=SV57, **options)
    for n, (page, frame) in enumerate(disk.memory.frames.items()):
        second.map_page(GUEST + n * PAGE, frame * PAGE)
        first.map_page(page * PAGE, GUEST + n * PAGE)
    message = card.functions[disk.function].msix.message_address & -PAGE
    file = GUEST + 0x1000_0000
    first.map_page(message, file)
    files = MsiTable(memory, card.allocator, mask=0, pattern=file // PAGE, observer=allowed)
    files.set(file, MsiPte(spa=message))
    processes = ProcessDirectory(view, own, levels=3, **options)
    processes.set(0, ProcessContext.first_stage(SV57, first.root, PSCID=PSCID))
    context = DeviceContext.process_directory(processes.pdtp, DPE=True).with_second_stage(SV57X4, second.root, GSCID=GSCID)
    card.iommu.directory.set(disk.function, context.with_msi_table(files.root, mask=0, pattern=file // PAGE))
    await card.port.run(card.iommu.invalidate_context(disk.function))
    await card.port.run(card.iommu.invalidate())

    for length in (512, 4096, 40_960):
        content = card.rng.randbytes(length)
        for request in (disk.blk.write(8, content), disk.blk.read(8, length)):
            await disk.done([request])
            assert request.status == BlkStatus.OK
        assert request.data == content
    assert card.host.statistics.interrupts > 3

    # The second stage is asked for every page: without one the disk reports an error, the IOMMU the guest's address.
    request = disk.blk.write(8, content)
    page = request.readable[1][0] // PAGE + 3  # status and header are elsewhere
    guest = first.mappings[page * PAGE].spa
    second.unmap(guest)
    await card.port.run(card.iommu.submit([IotinvalGvma()]))
    await card.port.run(card.iommu.fence())
    await disk.done([request], may_fail=True)
    assert request.status == BlkStatus.IOERR
    records = await card.port.run(card.iommu.read_faults())
    assert {(record.cause, record.iotval2 // PAGE * PAGE, record.iotval // PAGE) for record in records} == {
        (Cause.READ_GUEST_PAGE_FAULT, guest, page)}
    second.map_page(guest, disk.memory.frames[page] * PAGE)
    request = disk.blk.write(8, content)
    await disk.done([request])
    assert request.status == BlkStatus.OK
    card.finish()
    log.close()
