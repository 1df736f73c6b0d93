"""Virtual functions of a disk in a whole card; tests/nightly/test_vf.py goes on from here."""

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.host import ConfigRead, ConfigWrite, MemoryRead, disable_virtual, enable_msix
from ringwall.models.tlp import TlpType
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import Card
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

SECTOR = 512
PATIENCE = 2500
# The disk is function 1, its virtual functions are 2 and 3.
CONFIG = EndpointConfig(
    width=64, iommu=IommuConfig(entries=16, ways=2, walks=4), completion_timeout_cycles=PATIENCE, tags=64, wall_tags=8,
    read_buffer_bytes=4096, disks=(BlkConfig(capacity_sectors=64, queue_size=16, virtual_functions=2),))  # fmt: skip
DEVICE_STATUS, DEVICE_CONTROL, INITIATE_FLR = 0x14, 8, 1 << 15


def test_virtual_functions(request):
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, sim="icarus")


class Requests:
    """Counts the requests of each function, by its requester ID; an observer of TLPs."""

    def __init__(self):
        self.counts = dict.fromkeys(range(4), 0)

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


async def write(card, disk, sector, count):
    """Write sectors; returns what they hold."""
    content = card.rng.randbytes(count * SECTOR)
    await disk.done([disk.blk.write(sector, content)])
    return content


async def check(disk, sector, content):
    read = disk.blk.read(sector, len(content))
    await disk.done([read])
    assert (read.status, read.data) == (0, content)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def virtual_disks_work_and_go(dut):
    """SYS-VF-1 (R54, R72): two VFs appear, work at once in their own pages, one is reset, both go under load and come back; judged."""
    card = await Card(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=60).begin()
    requests, perform = Requests(), card.port.perform
    card.observers.append(requests)
    await card.enable_iommu()

    async def presence():
        return [n for n in range(2, 5) if await perform(ConfigRead(n, 0x08, 4)) != 0xFFFF_FFFF]

    assert await presence() == []
    plan = await card.enable_virtual(0, 2)
    assert await presence() == [2, 3]
    assert {index: bar.size for index, bar in plan.bars.items()} == {0: 16384, 2: 4096}
    assert not any(info.problems for info in card.functions)
    one, other = [await card.disk(n, buffer_pages=16) for n in (1, 2)]

    # At once, each its own sectors, pages and interrupts.
    contents = [card.rng.randbytes(3 * SECTOR) for _ in range(2)]
    writes = [disk.blk.write(5, content) for disk, content in zip((one, other), contents)]
    await one.offer()
    await other.done(writes[1:])
    await one.done(writes[:1])
    for disk, content in zip((one, other), contents):
        await check(disk, 5, content)
    assert requests.counts[1] == 0 and min(requests.counts[2], requests.counts[3]) > 20

    # A reset of one of them.
    one.blk.read(5, 4 * SECTOR)
    await one.offer()
    await ClockCycles(dut.clk, 150)
    at = card.functions[2].capabilities[0x10][0] + DEVICE_CONTROL
    await perform(ConfigWrite(2, at, 2, INITIATE_FLR))
    contents[1] = await write(card, other, 5, 3)
    count = requests.counts[2]
    await check(other, 5, contents[1])
    assert requests.counts[2] == count, "a request behind a reset"
    await back(card, one)
    await check(one, 5, contents[0])

    # Both go.
    for disk in (one, other):
        disk.blk.read(5, 4 * SECTOR)
        await disk.offer()
    await ClockCycles(dut.clk, 100)
    await card.port.run(disable_virtual(card.functions[1], plan))
    assert await presence() == []
    await ClockCycles(dut.clk, 300)
    counts = dict(requests.counts)
    assert await perform(MemoryRead(plan.bars[0].address + DEVICE_STATUS, 1)) == 0xFF
    await ClockCycles(dut.clk, 300)
    assert requests.counts == counts, "a request behind VF Enable"
    await card.enable_virtual(0, 2, plan)
    for disk, content in zip((one, other), contents):
        await back(card, disk)
        await check(disk, 5, content)
    assert not await card.port.run(card.iommu.read_faults())
    card.finish()
