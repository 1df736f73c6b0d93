"""Random requests and accesses: each name makes what it says, everything there is happens, and a device that follows is followed."""

import random
from collections import defaultdict

from ringwall.models.virtio.iommu import IommuDevice
from ringwall.models.virtio.iommu_formats import FaultReason, Range, Region, Status
from ringwall.models.virtio.iommu_rules import OFFERED, X86_MSI, IommuDescription
from ringwall.models.virtio.iommu_traffic import MALFORMED, VALID, IommuTraffic

FILL = b"\xa5"


def device_of(**options):
    """A device as our card's, with both ranges short."""
    told = {"input_range": Range(0x10000, (1 << 48) - 1), "domain_range": Range(1, 6), "physical": (Range(0, (1 << 40) - 1),), **options}
    device = IommuDevice(IommuDescription({n: (X86_MSI, Region(0xFED00000, 0xFED0FFFF)) for n in (1, 2, 3)}, **told))
    device.negotiate(OFFERED)
    return device


def answer(device, sent, outcome):
    """Let the device's buffer hold what an outcome writes; return the problem."""
    before, after = FILL * sent.room, outcome.written(sent.room)
    return device.settle(before, after or before, len(after))


def test_traffic_reaches_everything():
    """MODEL-VIOMMU-GEN-1 (R77): 12 000 requests and 6 000 accesses answered in any allowed way, by a permissive device and by a strict
    one whose domains have one endpoint: every name comes, every status that requests can have, every verdict, and nothing that was
    allowed is a problem."""
    found, verdicts = defaultdict(set), set()
    for seed, device in enumerate((device_of(capacity=64), device_of(capacity=64, bypass=0, shares=False))):
        rng = random.Random(seed)
        traffic = IommuTraffic(device, rng)
        for _ in range(6_000):
            sent = traffic.request()
            outcome = rng.choice(device.serve(sent.readable, sent.room).outcomes)
            assert answer(device, sent, outcome) == "", sent
            found[sent.name].add(outcome.status)
            opened = device.begin(traffic.access())
            verdict = rng.choice(sorted(device.allowed(opened), key=str))
            verdicts.add((verdict.reason, verdict.is_mmio))
            assert device.judge(opened, verdict) == ""
    assert set(found) == {*VALID, *MALFORMED}
    assert set().union(*found.values()) == {None, *Status} - {Status.IOERR, Status.DEVERR}
    assert verdicts == {(None, False), (None, True), (FaultReason.DOMAIN, False), (FaultReason.MAPPING, False)}
