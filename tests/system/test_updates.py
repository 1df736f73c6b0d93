"""A card whose IOMMU sets A and D: AtomicOps of function 0 on the link, done by the model host."""

from dataclasses import replace

import cocotb
import pytest

from ringwall.models.host import ConfigWrite
from ringwall.models.iommu.entries import PTE_A, PTE_D
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import Card
from ringwall.sim.run import run

CONFIG = EndpointConfig(width=64, iommu=IommuConfig(entries=16, walks=2, AMO_HWAD=True), disks=(BlkConfig(capacity_sectors=64),), tags=64,
                        completion_timeout_cycles=10_000)  # fmt: skip
PCIE, DEVICE_CONTROL_2, ATOMIC_REQUESTER = 0x10, 0x28, 1 << 6  # capability; in it; AtomicOp Requester Enable [PCIe5 7.5.3.16]


def test_updates(request):
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, sim="icarus")


def test_walks_have_room():
    """SYS-AD-2: more walks than the wall has room for, so that updates could wait for ever, are refused with a sentence."""
    with pytest.raises(ValueError, match="Walks in flight must be at most 16 with AMO_HWAD, not 17"):
        IommuConfig(AMO_HWAD=True, walks=17)
    assert IommuConfig(AMO_HWAD=True, walks=16).walks == IommuConfig(walks=32).walks // 2 == 16


@cocotb.test(timeout_time=400, timeout_unit="us")
async def pages_that_are_used_get_their_bits(dut):
    """SYS-AD-1: a disk whose pages lack A and D, AtomicOps enabled: it works; A is set where it reads, D where it writes, only there."""
    card = await Card(dut, CONFIG, seed=cocotb.RANDOM_SEED).begin()
    await card.enable_iommu()
    disk = await card.disk(0, buffer_pages=24, alignment=4096, framing="whole")
    memory, table = card.session.memory, disk.table
    pages = [*range(0x10_0000_0000, 0x10_0000_0000 + 16 * 4096, 4096), *range(0x10_0010_0000, 0x10_0010_0000 + 24 * 4096, 4096)]
    slots = {iova: table._slot(iova, 0) for iova in pages}
    for slot in slots.values():
        memory.store_q_le(slot, memory.load_q_le(slot) & ~(PTE_A | PTE_D))
    card.iommu.directory.set(disk.function, replace(card.iommu.directory.get(disk.function), SADE=True))
    await card.port.run(card.iommu.invalidate_context(disk.function))
    await card.port.run(card.iommu.invalidate())

    def enable_atomics():
        yield ConfigWrite(0, card.functions[0].capabilities[PCIE][0] + DEVICE_CONTROL_2, 2, ATOMIC_REQUESTER)

    await card.port.run(enable_atomics())
    content = card.rng.randbytes(4096)
    for request in (disk.blk.write(0, content), disk.blk.read(0, 4096)):
        await disk.done([request])
        assert request.status == 0
    assert request.data == content
    bits = {iova: memory.load_q_le(slot) & (PTE_A | PTE_D) for iova, slot in slots.items()}
    assert set(bits.values()) == {0, PTE_A, PTE_A | PTE_D}, bits
    assert card.host.statistics.atomics >= sum(value != 0 for value in bits.values()) > 3
    for slot in slots.values():
        memory.store_q_le(slot, memory.load_q_le(slot))  # the checker of memory knows what software writes
    card.finish()
