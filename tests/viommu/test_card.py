"""A card whose function 0 is a virtio-iommu: a driver as Linux's binds to it, and the disk behind goes where it says."""

import cocotb

from ringwall.models.host import enable_msix
from ringwall.models.virtio.blk import BlkDriver
from ringwall.models.virtio.driver import Feature, VirtioPciDriver
from ringwall.models.virtio.iommu_driver import DriverDomain, IommuDriver, Post, Reply
from ringwall.models.virtio.iommu_formats import CONFIG_BYTES, FAULT_BYTES, Fault, FaultFlag, FaultReason, MapFlag
from ringwall.models.virtio.virtqueue import make_ring
from ringwall.rtl.config import BlkConfig, EndpointConfig, VirtioIommuConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import FRAMES, IOVAS, PAGE, Card, MappedMemory
from ringwall.sim.host_port import drive
from ringwall.sim.run import run

CONFIG = EndpointConfig(width=64, iommu=VirtioIommuConfig(intervals=64, entries=16, queue_size=16), completion_timeout_cycles=10_000,
                        disks=(BlkConfig(capacity_sectors=64, queue_size=16),), strict=True)  # fmt: skip
REQUESTS, EVENTS = 0, 1
PAGES = 6
NEEDED = 1 << Feature.VERSION_1 | 1 << Feature.ACCESS_PLATFORM
RINGS, BUFFERS, DISK = FRAMES, FRAMES + 0x10_0000, FRAMES + 0x100_0000


def test_card(request):
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid)


def test_config():
    """VIOMMU-CARD-2: the endpoints are the card's other functions, virtual ones too; bypass is 0 at first in a strict card (R48)."""
    assert CONFIG.virtio_iommu.endpoints == (1,) and not CONFIG.virtio_iommu.bypass and CONFIG.functions == 2
    disks = BlkConfig(virtual_functions=2), BlkConfig()
    card = EndpointConfig(iommu=VirtioIommuConfig(), disks=disks)
    assert card.virtio_iommu.endpoints == (1, 2, 3, 4) and card.virtio_iommu.bypass
    assert not EndpointConfig(iommu=VirtioIommuConfig(bypass=False), disks=disks).virtio_iommu.bypass
    assert EndpointConfig().virtio_iommu is None


class Queue:
    """A queue of function 0 with a buffer of a page for each place of its ring."""

    def __init__(self, card, driver, index):
        self.card, self.driver, self.index, self.memory = card, driver, index, card.session.memory
        self.ring = make_ring(self.memory, 0, size=16, base=RINGS + index * 0x1_0000)
        self.posted, self.next = {}, 0

    async def post(self, readable, room, *, rings=True):
        at = BUFFERS + (16 * self.index + self.next % 8) * PAGE
        self.next += 1
        self.memory.write(at, readable + bytes(room))
        answer = at + len(readable), room
        self.posted[self.ring.add_chain([(at, len(readable))] if readable else [], [answer])] = answer
        if self.ring.publish() and rings:
            await self.card.port.run(self.driver.notify(self.index, self.ring))

    async def replies(self, count):
        """Return so many replies, in the order in which they come."""
        found = []
        while len(found) < count:
            assert await self.card.port.until(lambda: self.ring.has_used, 20_000), "no answer"
            for head, length in self.ring.poll_used():
                at, room = self.posted.pop(head)
                found.append(Reply(self.memory.read(at, room), length))
        return found

    async def run(self, steps):
        """Do what a method of an IommuDriver asks for."""
        return await drive(steps, self.perform)

    async def perform(self, step):
        if isinstance(step, Post):
            return await self.post(step.readable, step.room)
        return await self.replies(len(self.posted))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def a_disk_goes_where_its_domain_says(dut):
    """VIOMMU-CARD-1 (R22, R23, R24): a strict card: function 0 enumerates as a virtio-iommu, PROBE, ATTACH and MAP through its rings; a
    disk writes and reads its own pages; what is unmapped is refused and told in the event queue; interrupts come through the MSI region."""
    card = await Card(dut, CONFIG, seed=cocotb.RANDOM_SEED).begin()
    run_software, memory = card.port.run, card.session.memory
    info, disk_info = card.functions[:2]
    assert (info.vendor, info.device, info.class_code) == (0x1AF4, 0x1057, 0x080600)
    for one in (info, disk_info):
        await run_software(enable_msix(one, 2))
    driver = VirtioPciDriver(info)
    await run_software(driver.find())
    await run_software(driver.reset())
    await run_software(driver.acknowledge())
    offered = await run_software(driver.read_features())
    raw = await run_software(driver.read_device_config([(at, 4) for at in range(0, CONFIG_BYTES, 4)]))
    software = IommuDriver(b"".join(value.to_bytes(4, "little") for value in raw), offered, in_flight=7)
    await run_software(driver.negotiate(software.features | NEEDED, NEEDED))
    requests, events = (Queue(card, driver, index) for index in (REQUESTS, EVENTS))
    for queue in (requests, events):
        await run_software(driver.set_up_queue(queue.index, queue.ring.layout, vector=1))
    await run_software(driver.driver_ok())
    for _ in range(2):  # as Linux, which tells nobody of these
        await events.post(b"", FAULT_BYTES, rings=False)

    domain, view = DriverDomain(), MappedMemory(memory)
    await requests.run(software.probe(1))
    await requests.run(software.attach(1, domain))
    for n in range(PAGES):
        view.frames[IOVAS // PAGE + n] = DISK // PAGE + PAGES - n
        await requests.run(software.map(domain, IOVAS + n * PAGE, DISK + (PAGES - n) * PAGE, PAGE, MapFlag.READ | MapFlag.WRITE))
    await requests.run(software.sync())
    assert not software.unseen and not software.problems

    disk = VirtioPciDriver(disk_info)
    ring = make_ring(view, 0, size=16, base=IOVAS)
    blk = BlkDriver(ring, view, area=(IOVAS + PAGE, (PAGES - 1) * PAGE), rng=card.rng, framing="parts", alignment=1)
    await run_software(disk.find())
    await run_software(disk.start([ring.layout], wanted=NEEDED, required=NEEDED, vectors=[1]))

    async def done(*asked):
        blk.publish()
        await run_software(disk.notify(0, ring))

        def are_back():
            blk.poll()
            return all(one.is_done for one in asked)

        assert await card.port.until(are_back, 60_000), "the disk did not answer"
        return [one.status for one in asked]

    content = card.rng.randbytes(1024)
    assert await done(blk.write(0, content[:512]), blk.write(1, content[512:])) == [0, 0]
    read = blk.read(0, 1024)
    assert await done(read) == [0] and read.data == content

    for n in range(1, PAGES):
        await requests.run(software.unmap(domain, IOVAS + n * PAGE, PAGE))
    await requests.run(software.sync())
    refused = blk.read(0, 512)
    blk.publish()
    await run_software(disk.notify(0, ring))
    spans = [*refused.readable, *refused.writable]
    for reply in await events.replies(1):
        fault = Fault.unpack(reply.after)
        assert reply.used_len == FAULT_BYTES and fault.reason == FaultReason.MAPPING and fault.endpoint == 1
        assert fault.flags & FaultFlag.ADDRESS and any(at <= fault.address < at + size for at, size in spans)
    assert not software.unseen and not software.problems
    assert not card.host.violations
