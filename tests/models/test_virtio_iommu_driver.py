"""The driver of a virtio-iommu, on the golden device: what Linux's does, and what devices do to it."""

import random

import pytest

from ringwall.models.host import run
from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.blk import FRAMINGS
from ringwall.models.virtio.iommu import IommuDevice
from ringwall.models.virtio.iommu_driver import SW_MSI, DirectQueue, DriverDomain, IommuDriver, Post, Reply, RequestError
from ringwall.models.virtio.iommu_formats import (
    Attach,
    Detach,
    Fault,
    IommuConfig,
    IommuFeature,
    Map,
    MapFlag,
    Probe,
    Range,
    Region,
    RegionType,
    Unmap,
)
from ringwall.models.virtio.iommu_rules import ALL_32, ALL_64, OFFERED, X86_MSI, IommuDescription, Verdict
from ringwall.models.virtio.split import SplitDriver, gather, read_chain, scatter

RW = MapFlag.READ | MapFlag.WRITE


class Machine:
    """A driver and a device, one request after the other; `sent` holds the requests."""

    def __init__(self, regions=(X86_MSI,), in_flight=64, **options):
        self.device = IommuDevice(IommuDescription(**{"endpoints": dict.fromkeys((1, 2, 3), regions), "bypass": 0, **options}))
        self.driver = IommuDriver(self.device.config(), self.device.description.features, in_flight=in_flight)
        self.device.negotiate(self.driver.features)
        self.sent = []
        self.queue, self.most = DirectQueue(self.serve), 0
        self.do = self.queue.run

    def serve(self, readable, room):
        kind = {1: Attach, 2: Detach, 3: Map, 4: Unmap, 5: Probe}[readable[0]]
        self.sent.append(kind.unpack(readable))
        self.most = max(self.most, len(self.queue.replies) + 1)
        written = self.device.execute(readable, room)
        return Reply(written.ljust(room, b"\0"), len(written))

    def goes(self, endpoint, address, is_write=False):
        (verdict,) = self.device.translate(endpoint, address, is_write, 4)
        return verdict.phys


def test_driver_takes_a_device():
    """MODEL-VIOMMU-DRV-1 (R90): what is read from 40 bytes of configuration; without a feature its field says nothing; without MAP_UNMAP,
    without a page size, or with pages that are too large, the driver does not start."""
    raw = IommuConfig(0x5000, Range(0x1000, 0xFFFF), Range(2, 9), 64, 1).pack()
    driver = IommuDriver(raw, OFFERED)
    assert (driver.granule, driver.input_range, driver.domain_range, driver.probe_size) == (0x1000, Range(0x1000, 0xFFFF), Range(2, 9), 64)
    plain = IommuDriver(raw, 1 << IommuFeature.MAP_UNMAP | 1 << IommuFeature.BYPASS | 1 << 33)
    assert plain.features == 1 << IommuFeature.MAP_UNMAP
    assert (plain.input_range, plain.domain_range, plain.probe_size, plain.map_flags) == (ALL_64, ALL_32, 0, RW)
    for config, features, what in ((raw, OFFERED & ~(1 << IommuFeature.MAP_UNMAP), "contain MAP_UNMAP"), (bytes(40), OFFERED, "not 0x0"),
                                   ((0x2000).to_bytes(8, "little") + raw[8:], OFFERED, "at most 4096 bytes, not 0x2000")):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            IommuDriver(config, features)


def test_driver_maps():
    """MODEL-VIOMMU-DRV-2 (R76, R83): PROBE, ATTACH, MAP, UNMAP, DETACH as Linux sends them; MAP and UNMAP wait for `sync`."""
    machine = Machine()
    driver, domain = machine.driver, DriverDomain()
    machine.do(driver.probe(1))
    machine.do(driver.attach(1, domain))
    machine.do(driver.map(domain, 0x1000, 0xA000, 0x2000, RW))
    machine.do(driver.sync())
    assert machine.goes(1, 0x2FFC) == 0xBFFC
    machine.do(driver.unmap(domain, 0x1000, 0x2000))
    machine.do(driver.sync())
    assert machine.goes(1, 0x1000) is None
    machine.do(driver.detach(1))
    assert machine.sent == [Probe(1), Attach(0, 1), Map(0, 0x1000, 0x2FFF, 0xA000, 3), Unmap(0, 0x1000, 0x2FFF), Detach(0, 1)]
    assert (driver.problems, driver.unseen) == ([], [])
    with pytest.raises(ValueError, match="Flags must be of"):
        machine.do(driver.map(domain, 0, 0, 0x1000, 8))


def test_driver_maps_again():
    """MODEL-VIOMMU-DRV-3 (R91): the last endpoint that leaves a domain takes the device's mappings along; the driver's live on, can change
    meanwhile, and are sent again when an endpoint comes back; a second endpoint needs none of it."""
    machine = Machine()
    driver, domain, other = machine.driver, DriverDomain(), DriverDomain()
    machine.do(driver.attach(1, domain))
    for n in range(4):
        machine.do(driver.map(domain, n << 12, 0xA0000 + (n << 12), 0x1000, RW))
    machine.do(driver.sync())
    machine.do(driver.attach(1, other))
    assert machine.goes(1, 0x1000) is None
    machine.do(driver.unmap(domain, 0x2000, 0x1000))
    machine.do(driver.map(domain, 0x8000, 0xB8000, 0x1000, MapFlag.READ))
    count = len(machine.sent)
    machine.do(driver.attach(1, domain))
    assert [type(one) for one in machine.sent[count:]] == [Attach, Map, Map, Map, Map]
    assert [machine.goes(1, at) for at in (0, 0x1000, 0x2000, 0x3000, 0x8000)] == [0xA0000, 0xA1000, None, 0xA3000, 0xB8000]
    machine.do(driver.attach(2, domain))
    assert machine.sent[count + 5 :] == [Attach(0, 2)]
    assert machine.goes(2, 0x3000) == 0xA3000
    with pytest.raises(ValueError, match="must have no endpoints"):
        driver.free(domain)
    driver.free(other)
    again = DriverDomain()
    machine.do(driver.attach(3, again))
    assert again.number == 1


def test_driver_queue_is_full():
    """MODEL-VIOMMU-DRV-4 (R83, R84): a queue of three requests: the fourth waits for all of them, none is lost, and what failed without
    anybody waiting for it is kept."""
    machine = Machine(in_flight=3)
    driver, domain = machine.driver, DriverDomain()
    machine.do(driver.attach(1, domain))
    machine.device.execute(Map(0, 0x5000, 0x5FFF, 0, RW).pack(), 4)  # what the driver does not know of
    for n in range(8):
        machine.do(driver.map(domain, n << 12, n << 12, 0x1000, RW))
    machine.do(driver.sync())
    assert [machine.goes(1, n << 12) for n in range(8)] == [n << 12 if n != 5 else 0 for n in range(8)]
    assert [(one.virt_start, status) for one, status in driver.unseen] == [(0x5000, 4)]
    assert machine.most == 3


@pytest.mark.parametrize("written, used_len, errno", [
    (b"\0\0\0\0", 4, None), (b"\2\0\0\0", 4, "ENOSYS"), (b"\4\0\0\0", 4, "EINVAL"), (b"\5\0\0\0", 4, "ERANGE"), (b"\6\0\0\0", 4, "ENOENT"),
    (b"\7\0\0\0", 4, "EFAULT"), (b"\x08\0\0\0", 4, "ENOMEM"), (b"\1\0\0\0", 4, "EIO"), (b"\3\0\0\0", 4, "EIO"), (b"\x09\0\0\0", 4, "EIO"),
    (b"\0\0\0\0", 0, "EIO"), (b"\0\0\0\0", 1, "EIO"), (b"\0\0\0\0", 5, "EIO"), (b"\0abc", 4, None),
])  # fmt: skip
def test_driver_reads_answers(written, used_len, errno):
    """MODEL-VIOMMU-DRV-5 (R77, R78, R79, R80): each status as an error number; used length 0 is an error, another length than that of the
    writable bytes is an error and a problem; what the tail reserves is not looked at."""
    driver = Machine().driver
    steps = driver.attach(1, DriverDomain())
    queue = DirectQueue(lambda readable, room: Reply(written, used_len))
    if errno is None:
        queue.run(steps)
    else:
        with pytest.raises(RequestError, match=errno):
            queue.run(steps)
    assert len(driver.problems) == (used_len in (1, 5) or written[0] > 8)


IDENTITY = [  # reserved regions, input range, granularity -> what is mapped
    ((X86_MSI,), ALL_64, 0x1000, [(0, 0xFEDFFFFF), (0xFEF00000, ALL_64.end)]),
    ((), Range(0x1000, 0xFFFF), 0x1000, [(0x1000, 0xFFFF)]),
    ((), Range(0x1001, 0xFFFE), 0x1000, [(0x2000, 0xEFFF)]),
    ((Region(0x2345, 0x2346), Region(0x4FFF, 0x5000)), Range(0, 0xFFFF), 0x1000, [(0, 0x1FFF), (0x3000, 0x3FFF), (0x6000, 0xFFFF)]),
    ((Region(0, 0x1FFF), Region(0xF000, 0xFFFFF)), Range(0x1000, 0xFFFF), 0x1000, [(0x2000, 0xEFFF)]),
    ((Region(0, 0xFFFFF),), Range(0x1000, 0xFFFF), 0x1000, []),
    ((Region(0x100000, 0x1FFFFF), Region(0x20000, 0x2FFFF)), Range(0, 0xFFFFF), 0x1000, [(0, 0x1FFFF), (0x30000, 0xFFFFF)]),
    ((Region(0x2345, 0x2346),), Range(0, 0xFFFF), 0x100, [(0, 0x22FF), (0x2400, 0xFFFF)]),
]  # fmt: skip


@pytest.mark.parametrize("regions, limits, granule, wanted", IDENTITY)
def test_driver_identity_mappings(regions, limits, granule, wanted):
    """MODEL-VIOMMU-DRV-6 (R85, R86): without BYPASS_CONFIG an identity domain maps the input range to itself, without the pages that a
    reserved region touches, aligned or not; the device takes every one of these mappings."""
    machine = Machine(regions, features=OFFERED & ~(1 << IommuFeature.BYPASS_CONFIG), input_range=limits, page_size_mask=granule)
    domain = DriverDomain(is_identity=True)
    machine.do(machine.driver.probe(1))
    machine.do(machine.driver.attach(1, domain))
    assert [(one.virt_start, one.virt_end) for one in machine.sent if isinstance(one, Map)] == wanted
    assert all(one.phys_start == one.virt_start and one.flags == RW for one in machine.sent if isinstance(one, Map))
    assert [(one.start, one.end) for one in machine.device.state.domains[0].mappings] == wanted


def test_driver_identity_by_bypass():
    """MODEL-VIOMMU-DRV-7 (R85, R88): with BYPASS_CONFIG it is a bypass domain and maps nothing; without config.bypass nothing passes before
    or behind it. Mapping everything is refused where only memory can be mapped, and a bypass domain is not (R87)."""
    machine = Machine()
    domain = DriverDomain(is_identity=True)
    machine.do(machine.driver.probe(1))
    assert machine.goes(1, 0x1000) is None
    machine.do(machine.driver.attach(1, domain))
    assert machine.sent[1:] == [Attach(0, 1, 1)]
    assert [machine.goes(1, at, True) for at in (0, 0xFEE00000, ALL_64.end - 3)] == [0, 0xFEE00000, ALL_64.end - 3]
    machine.do(machine.driver.detach(1))
    assert machine.goes(1, 0x1000) is None
    for features, works in ((OFFERED, True), (OFFERED & ~(1 << IommuFeature.BYPASS_CONFIG), False)):
        machine = Machine(features=features, physical=(Range(0, 0x7FFFFFFF),))
        machine.do(machine.driver.probe(1))
        if works:
            machine.do(machine.driver.attach(1, DriverDomain(is_identity=True)))
        else:
            with pytest.raises(RequestError, match="ERANGE"):
                machine.do(machine.driver.attach(1, DriverDomain(is_identity=True)))


def test_driver_doorbells():
    """MODEL-VIOMMU-DRV-8 (R89): without a region for interrupts the driver reserves 0x8000000 to 0x80fffff and maps a doorbell there, with
    MMIO if there is such a flag; with a region it does not."""
    told, silent = Machine(), Machine(())
    for machine, wanted in ((told, [X86_MSI]), (silent, [SW_MSI])):
        machine.do(machine.driver.probe(1))
        assert machine.driver.reserved(1) == wanted
    assert (SW_MSI.start, SW_MSI.end - SW_MSI.start + 1) == (0x8000000, 0x100000)
    domain = DriverDomain()
    silent.do(silent.driver.attach(1, domain))
    silent.do(silent.driver.map(domain, SW_MSI.start, 0xFEE00000, 0x1000, MapFlag.WRITE | MapFlag.MMIO))
    silent.do(silent.driver.sync())
    assert silent.device.translate(1, SW_MSI.start, True, 4) == {Verdict(0xFEE00000, is_mmio=True)}
    assert silent.goes(1, SW_MSI.start) is None


def test_driver_reads_events():
    """MODEL-VIOMMU-DRV-9: a record is taken as it is; one with reserved bytes is ignored, one that is too long is a problem."""
    driver = Machine().driver
    record = Fault(2, 0x102, 1, 0x5000)
    assert driver.event(record.pack(), 24) == record
    assert driver.event(Fault(2, 0x102, 1, 0x5000, b"\0\0\1").pack(), 24) is None
    assert driver.problems == []
    assert driver.event(record.pack(), 25) is None
    assert driver.problems == ["event of 25 bytes"]


def test_driver_reads_properties():
    """MODEL-VIOMMU-DRV-10 (R86): regions are sorted; an unknown subtype is a reserved region, an unknown property is passed by; a list that
    nobody may write is a problem; without PROBE nothing is asked."""
    machine = Machine((Region(0x9000, 0x9FFF), Region(0x1000, 0x1FFF, 7), X86_MSI))
    machine.do(machine.driver.probe(2))
    assert machine.driver.regions[2] == [Region(0x1000, 0x1FFF, 7), Region(0x9000, 0x9FFF, RegionType.RESERVED), X86_MSI]
    raw = bytes.fromhex("05000400 11223344 01001400 01000000 0000e0fe00000000 ffffeffe00000000").ljust(516, b"\0")
    DirectQueue(lambda readable, room: Reply(raw, room)).run(machine.driver.probe(3))
    assert machine.driver.regions[3] == [X86_MSI]
    assert machine.driver.problems == ["property at 0: type 5"]
    quiet = Machine(features=OFFERED & ~(1 << IommuFeature.PROBE))
    quiet.do(quiet.driver.probe(1))
    assert (quiet.sent, quiet.driver.regions) == ([], {1: []})


class Ring:
    """The device behind a split ring: puts requests on it in pieces, serves them when the driver waits."""

    def __init__(self, device, rng, framing):
        self.device, self.rng, self.cut = device, rng, FRAMINGS[framing]
        self.memory = GuestMemory()
        self.ring = SplitDriver(self.memory, size=64, base=0x10000)
        self.layout = self.ring.layout
        self.bump, self.served, self.chains = 0x20000, 0, {}

    def place(self, length):
        self.bump += length + 13
        return self.bump - length, length

    def post(self, readable, room):
        sent = [self.place(length) for length in self.cut([4, len(readable) - 4], self.rng, 12)]
        back = [self.place(length) for length in self.cut([room - 4, 4], self.rng, 12) if length]
        scatter(self.memory, sent, readable)
        scatter(self.memory, back, bytes(room))
        self.chains[self.ring.add_chain(sent, back)] = back

    def sync(self):
        self.ring.publish()
        while self.served != self.memory.load_uw_le(self.layout.avail_idx):
            head = self.memory.load_uw_le(self.layout.avail_slot(self.served))
            chain = read_chain(self.memory, self.layout, head)
            written = self.device.execute(gather(self.memory, chain.readable), chain.writable_bytes)
            scatter(self.memory, chain.writable, written.ljust(chain.writable_bytes, b"\0"))
            self.memory.write(self.layout.used_slot(self.served), head.to_bytes(4, "little") + len(written).to_bytes(4, "little"))
            self.served += 1
            self.memory.store_uw_le(self.layout.used_idx, self.served)
        return [Reply(gather(self.memory, self.chains.pop(head)), length) for head, length in self.ring.poll_used()]

    def do(self, steps):
        run(steps, lambda step: self.post(step.readable, step.room) if isinstance(step, Post) else self.sync())


@pytest.mark.parametrize("framing", FRAMINGS)
def test_driver_on_a_ring(framing):
    """MODEL-VIOMMU-DRV-11 (R82, R83): the same through a split ring, requests cut in every way: the tail is found from the end, used
    elements come in the order of requests."""
    machine = Machine(in_flight=2)
    driver, domain = machine.driver, DriverDomain()
    do = Ring(machine.device, random.Random(7), framing).do
    do(driver.probe(1))
    do(driver.attach(1, domain))
    for n in range(5):
        do(driver.map(domain, n << 12, 0xA0000 + (n << 12), 0x1000, RW))
    do(driver.unmap(domain, 0, 0x2000))
    do(driver.sync())
    assert driver.regions == {1: [X86_MSI]}
    assert [machine.goes(1, n << 12) for n in range(5)] == [None, None, 0xA2000, 0xA3000, 0xA4000]
    assert (driver.problems, driver.unseen) == ([], [])
