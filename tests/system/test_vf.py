"""Virtual functions of a disk in a whole card; tests/nightly/test_vf.py goes on from here."""

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.host import ConfigRead, ConfigWrite, MemoryRead, disable_virtual, enable_msix
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.driver import Feature, VirtioPciDriver
from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import Card
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

SECTOR = 512
PATIENCE = 1100
# Without an IOMMU, so that it is small: the disk is function 0, its virtual functions are 1 and 2.
CONFIG = EndpointConfig(
    width=64, iommu=None, completion_timeout_cycles=PATIENCE, tags=32, wall_tags=2, read_buffer_bytes=4096,
    disks=(BlkConfig(capacity_sectors=64, queue_size=16, virtual_functions=2),))  # fmt: skip
DEVICE_STATUS = 0x14  # of the common structure, which begins BAR 0


def test_virtual_functions(request):
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, sim="icarus")


class Requests:
    """Counts the requests of each function, by its requester ID; an observer of TLPs."""

    def __init__(self):
        self.counts = dict.fromkeys(range(3), 0)

    def __call__(self, event, tlp):
        if tlp is not None and type(event).__name__ == "TlpReceived" and tlp.type in (TlpType.MRD, TlpType.MWR):
            self.counts[tlp.requester_id & 0xFF] += 1


async def back(card, disk):
    """Software goes on with a virtual function after a reset: bus master, MSI-X, driver."""
    info, perform = card.functions[disk.function], card.port.perform
    await perform(ConfigWrite(info.function, 0x04, 2, 4))
    begun = cycle()
    while (status := await perform(MemoryRead(info.bars[0].address + DEVICE_STATUS, 1))) == 0xFF:
        assert cycle() - begun < PATIENCE * 5 // 4 + 3000, "the reset has no end"
        await ClockCycles(card.dut.clk, 20)
    assert status == 0
    await card.port.run(enable_msix(info, 2))
    await disk.restart()


async def check(disk, sector, content):
    read = disk.blk.read(sector, len(content))
    await disk.done([read])
    assert (read.status, read.data) == (0, content)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def virtual_disks_work_and_go(dut):
    """SYS-VF-1 (R54, R72): two VFs appear, work, go under load; one comes back with what it held; judged; the owner has SR_IOV (V124)."""
    card = await Card(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=20).begin()
    requests, perform = Requests(), card.port.perform
    card.observers.append(requests)

    async def presence():
        return [n for n in range(1, 4) if await perform(ConfigRead(n, 0x08, 4)) != 0xFFFF_FFFF]

    assert await presence() == []
    plan = await card.enable_virtual(0, 2)
    assert await presence() == [1, 2]
    assert {index: bar.size for index, bar in plan.bars.items()} == {0: 16384, 2: 4096}
    assert not any(info.problems for info in card.functions)
    one, other = [await card.disk(n, buffer_pages=16, queue_size=16, base=n << 33) for n in (1, 2)]

    owner = VirtioPciDriver(card.functions[0])
    await card.port.run(owner.find())
    await card.port.run(owner.read_features())
    assert [driver.offered >> Feature.SR_IOV & 1 for driver in (owner, one.driver, other.driver)] == [1, 0, 0]

    # At once, each its own sectors, pages and interrupts.
    contents = [card.rng.randbytes(2 * SECTOR) for _ in range(2)]
    writes = [disk.blk.write(5, content) for disk, content in zip((one, other), contents)]
    await one.offer()
    await other.done(writes[1:])
    await one.done(writes[:1])
    for disk, content in zip((one, other), contents):
        await check(disk, 5, content)
    assert requests.counts[0] == 0 and min(requests.counts[1], requests.counts[2]) > 12

    # Both go.
    for disk in (one, other):
        disk.blk.read(5, 3 * SECTOR)
        await disk.offer()
    await ClockCycles(dut.clk, 50)
    await card.port.run(disable_virtual(card.functions[0], plan))
    assert await presence() == []
    await ClockCycles(dut.clk, 300)
    counts = dict(requests.counts)
    assert await perform(MemoryRead(plan.bars[0].address + DEVICE_STATUS, 1)) == 0xFF
    await ClockCycles(dut.clk, 300)
    assert requests.counts == counts, "a request behind VF Enable"
    await card.enable_virtual(0, 2, plan)
    await back(card, other)
    await check(other, 5, contents[1])
    card.finish()
