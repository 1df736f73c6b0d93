"""Random requests and accesses: each name makes what it says, everything there is happens, and a device that follows is followed."""

import random
from collections import defaultdict

import pytest

from ringwall.models.virtio.iommu import IommuDevice
from ringwall.models.virtio.iommu_formats import Attach, AttachFlag, Detach, FaultReason, Map, Range, Region, Status, Unmap
from ringwall.models.virtio.iommu_rules import OFFERED, X86_MSI, IommuDescription
from ringwall.models.virtio.iommu_traffic import ACCESSES, MALFORMED, VALID, IommuTraffic

FILL = b"\xa5"
OK, INVAL, RANGE, NOENT, FAULT = Status.OK, Status.INVAL, Status.RANGE, Status.NOENT, Status.FAULT


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


# What each malformed request, and each of the others, may end in when everything it can meet is there.
WANTED = {
    **{name: {OK} for name in VALID}, "unknown_type": {None}, "no_tail": {None}, "short": {None, INVAL},
    "head_reserved": {OK}, "long": {OK, INVAL, None}, "much_room": {OK, INVAL, None},
    "attach_reserved": {INVAL}, "attach_flags": {INVAL}, "attach_stranger": {NOENT}, "attach_other_kind": {INVAL},
    "attach_beyond": {RANGE, INVAL}, "detach_stranger": {NOENT}, "detach_elsewhere": {INVAL, OK, NOENT, RANGE}, "detach_reserved": {OK},
    "map_start_unaligned": {RANGE}, "map_end_unaligned": {RANGE}, "map_phys_unaligned": {RANGE}, "map_overlap": {INVAL},
    "map_flags": {INVAL}, "map_no_flags": {OK, INVAL}, "map_missing": {NOENT}, "map_bypass": {INVAL}, "map_inverted": {INVAL, RANGE},
    "map_outside": {RANGE, INVAL}, "map_region": {INVAL, RANGE}, "map_phys_outside": {RANGE, INVAL, FAULT}, "unmap_split": {RANGE},
    "unmap_unaligned": {OK}, "unmap_missing": {NOENT}, "unmap_bypass": {INVAL}, "unmap_inverted": {INVAL, RANGE, OK},
    "unmap_reserved": {OK, INVAL}, "probe_stranger": {NOENT}, "probe_small": {INVAL}, "probe_reserved": {OK},
}  # fmt: skip


def test_names_say_what_is_made():
    """MODEL-VIOMMU-GEN-2: of each name 40 requests to a device with domains of both kinds and ten mappings apart: they may end in what
    the name promises, and in nothing else."""
    device = device_of()
    maps = (Map(1, n << 20, (n << 20) + 0x2FFF, n << 24, 3) for n in range(1, 11))
    for request in (Attach(1, 1), Attach(1, 3), Attach(2, 2, AttachFlag.BYPASS), *maps):
        assert device.execute(request.pack(), 4) == bytes(4)
    traffic = IommuTraffic(device, random.Random(2), pages=0x8000, base=0x20000)
    for name in (*VALID, *MALFORMED):
        found = set()
        for _ in range(40):
            sent = traffic.request(name)
            found |= {one.status for one in device.rules.outcomes(device.state, sent.readable, sent.room)}
        assert found == WANTED[name], name
    assert set(WANTED) == {*VALID, *MALFORMED}


def test_traffic_repeats():
    """MODEL-VIOMMU-GEN-3: the same seed makes the same requests and accesses; weights leave names out; bad parameters are refused."""
    made = [IommuTraffic(device_of(), random.Random(seed), malformed=0.5) for seed in (3, 3, 4)]
    streams = [[(one.request(), one.access()) for _ in range(50)] for one in made]
    assert streams[0] == streams[1] != streams[2]
    weights = {name: name in ("map", "mapped") for name in (*VALID, *ACCESSES)}
    quiet = IommuTraffic(device_of(), random.Random(5), malformed=0, weights=weights)
    assert {quiet.request().name for _ in range(50)} == {"map"}
    for options, what in (({"malformed": 1.5}, "between 0 and 1"), ({"weights": {"bad": 1}}, "not \\['bad'\\]")):
        with pytest.raises(ValueError, match=what):
            IommuTraffic(device_of(), random.Random(6), **options)


class Pages:
    """What requests that were OK have done, page by page."""

    def __init__(self):
        self.attached, self.bypass, self.pages = {}, set(), {}

    def leave(self, endpoint):
        number = self.attached.pop(endpoint, None)
        if number not in self.attached.values():
            self.bypass.discard(number)
            self.pages = {key: value for key, value in self.pages.items() if key[0] != number}

    def done(self, request):
        match request:
            case Attach(number, endpoint, flags):
                if self.attached.get(endpoint) != number:
                    self.leave(endpoint)
                self.attached[endpoint] = number
                self.bypass |= {number} if flags else set()
            case Detach(number, endpoint):
                if self.attached.get(endpoint) == number:
                    self.leave(endpoint)
            case Map(number, start, end, phys, flags):
                for at in range(start, end, 4096):
                    assert (number, at) not in self.pages
                    self.pages[number, at] = phys + at - start, flags
            case Unmap(number, start, end):
                self.pages = {key: value for key, value in self.pages.items() if key[0] != number or not start <= key[1] <= end}

    def goes(self, access):
        """Where an access must go; None: nowhere."""
        number = self.attached.get(access.endpoint)
        if number is None or number in self.bypass:
            return access.address
        offset = access.address % 4096
        phys, flags = self.pages.get((number, access.address - offset), (0, 0))
        return phys + offset if flags & (2 if access.is_write else 1) else None


@pytest.mark.parametrize("seed", [1, 2])
def test_as_page_by_page(seed):
    """MODEL-VIOMMU-GEN-4 (R27, R76): 3000 random requests served as our card does: accesses go where a dictionary of pages says that was
    filled by the requests that were OK."""
    device, rng, pages, count = device_of(), random.Random(seed), Pages(), 0
    traffic = IommuTraffic(device, rng, pages=64, malformed=0.3)
    kinds = {1: Attach, 2: Detach, 3: Map, 4: Unmap}
    for _ in range(3000):
        sent = traffic.request()
        if device.execute(sent.readable, sent.room)[-4:] == bytes(4) and sent.readable[0] in kinds:
            pages.done(kinds[sent.readable[0]].unpack(sent.readable))
        for _ in range(3):
            access = traffic.access()
            if access.address < 0xFE000000:  # below the reserved regions
                (verdict,) = device.translate(access.endpoint, access.address, access.is_write, access.length)
                assert verdict.phys == pages.goes(access), (sent.name, access)
                count += verdict.phys not in (None, access.address)
    assert count > 1000
