"""A disk whose interrupts are recorded in memory: the card's IOMMU keeps the guest's interrupt file, and notifies."""

import cocotb
import pytest

from ringwall.models.host import ConfigWrite, MemoryWrite
from ringwall.models.iommu.entries import SV39X4, DeviceContext, MsiPte
from ringwall.models.iommu.tables import MsiTable, PageTable
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.blk import BlkStatus
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import PAGE, Card
from ringwall.sim.run import params, run
from ringwall.sim.scoreboard import AccessChecker

PCIE, DEVICE_CONTROL_2, ATOMIC_REQUESTER = 0x10, 0x28, 1 << 6  # [PCIe5 7.5.3.16]
NID, IDENTITIES = 0x5A5, (5, 70)  # of the notice; of vectors 0 and 1


def config(is_atomic):
    """Return the smallest card that does it."""
    iommu = IommuConfig(entries=16, walks=2, Sv39x4=True, MSI_FLAT=True, MSI_MRIF=True, AMO_MRIF=is_atomic)
    return EndpointConfig(width=64, iommu=iommu, disks=(BlkConfig(capacity_sectors=64),), tags=64, completion_timeout_cycles=10_000)


@pytest.mark.parametrize("is_atomic", [False, True])
def test_mrif(request, is_atomic):
    run(RawCard(config(is_atomic)), module=__name__, node=request.node.nodeid, sim="icarus", params={"is_atomic": is_atomic})


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def interrupts_are_recorded(dut):
    """SYS-MRIF-1: each interrupt of a disk sets its bit in the file, then the notice comes, in that order behind the used ring; no message
    of the function is on the link; bits of others stay."""
    is_atomic = params()["is_atomic"]
    card = await Card(dut, config(is_atomic), seed=cocotb.RANDOM_SEED).begin()
    await card.enable_iommu()
    disk = await card.disk(0, buffer_pages=24)
    memory, info = card.session.memory, card.functions[disk.function]
    file, notice = card.allocator.page() + 0x600, card.allocator.page()
    (checker,) = (one for one in card.session.board.checkers if isinstance(one, AccessChecker))
    checker.own += [[file, 512, "rw"], [notice, 4, "w"]]

    second = PageTable(memory, card.allocator, scheme=SV39X4, observer=card.session.allowed)
    for page, frame in disk.memory.frames.items():
        second.map_page(page * PAGE, frame * PAGE)
    message = info.msix.message_address & -PAGE
    files = MsiTable(memory, card.allocator, mask=0, pattern=message // PAGE, observer=card.session.allowed)
    files.set(message, MsiPte(mrif_address=file, notice_address=notice, nid=NID))
    context = DeviceContext().with_second_stage(SV39X4, second.root, GSCID=5)
    card.iommu.directory.set(disk.function, context.with_msi_table(files.root, mask=0, pattern=message // PAGE))
    await card.port.run(card.iommu.invalidate_context(disk.function))
    await card.port.run(card.iommu.invalidate())
    table = info.bars[info.msix.table_bar].address + info.msix.table_offset

    def set_up():
        for vector, identity in enumerate(IDENTITIES):
            yield MemoryWrite(table + 16 * vector, 4, message & 0xFFFF_FFFF)
            yield MemoryWrite(table + 16 * vector + 4, 4, message >> 32)
            yield MemoryWrite(table + 16 * vector + 8, 4, identity)
        if is_atomic:
            yield ConfigWrite(0, card.functions[0].capabilities[PCIE][0] + DEVICE_CONTROL_2, 2, ATOMIC_REQUESTER)

    await card.port.run(set_up())
    seen, atomics = [], card.host.statistics.atomics
    card.observers.append(lambda event, tlp: seen.append(tlp) if tlp is not None and tlp.type is TlpType.MWR else None)
    used = disk.memory.places(disk.layout.used + 2, 2)
    index = next(iter(used))[0]
    at, bit = file + 16 * (IDENTITIES[1] // 64), 1 << IDENTITIES[1] % 64
    for length in (512, 1024):
        others = card.rng.getrandbits(64) & ~bit
        memory.store_q_le(at, others)
        memory.write(notice, bytes(4))
        seen.clear()
        request = disk.blk.write(8, card.rng.randbytes(length))
        await disk.done([request])
        assert request.status == BlkStatus.OK
        assert await card.port.until(lambda: memory.read(notice, 4) == NID.to_bytes(4, "little"), 5000)
        assert memory.load_q_le(at) == others | bit
        writes = [tlp.address for tlp in seen]
        order = [index & -4, *([] if is_atomic else [at]), notice]
        assert [address for address in writes if address in order] == order, [hex(address) for address in writes]
    assert card.host.statistics.interrupts == 0
    assert card.host.statistics.atomics - atomics == 2 * is_atomic
    for page in (file & -PAGE, notice):
        memory.write(page, memory.read(page, PAGE))  # the checker of memory knows what software writes

    def mask():
        yield MemoryWrite(table + 16 * 1 + 12, 4, 1)

    await card.port.run(mask())  # nobody waits for messages on the link
    card.finish()
