"""The golden virtio-iommu in time: what accesses may do while a request is under way, what answers leave open, which faults are told."""

import pytest

from ringwall.models.virtio.iommu import IommuDevice
from ringwall.models.virtio.iommu_formats import (
    Attach,
    AttachFlag,
    Detach,
    Fault,
    FaultFlag,
    FaultReason,
    Map,
    MapFlag,
    Probe,
    Range,
    Region,
    Unmap,
)
from ringwall.models.virtio.iommu_rules import ALL_64, OFFERED, X86_MSI, Access, IommuDescription, Verdict

RW = MapFlag.READ | MapFlag.WRITE
BLOCKED, REFUSED = Verdict(reason=FaultReason.DOMAIN), Verdict(reason=FaultReason.MAPPING)
THERE, ELSEWHERE = Verdict(0xA000), Verdict(0xB000)
GOOD = bytes(4)
FIRST = Map(1, 0x1000, 0x1FFF, 0xA000, RW)
READ = Access(1, 0x1000, False)


def device_of(*requests, **options):
    device = IommuDevice(IommuDescription(**{"endpoints": dict.fromkeys((1, 2, 3), (X86_MSI,)), "bypass": 0, **options}))
    device.negotiate(OFFERED)
    for request in requests:
        assert device.execute(request.pack(), 4) == GOOD
    return device


def serve(device, *requests):
    for request in requests:
        device.serve(request.pack(), 4)


def settle(device, status=0):
    return device.settle(b"\xa5" * 4, bytes([status, 0, 0, 0]), 4)


def now(device, access=READ):
    return device.translate(access.endpoint, access.address, access.is_write, access.length)


@pytest.mark.parametrize("request_, after", [
    (Unmap(1, 0x1000, 0x1FFF), REFUSED), (Unmap(1, 0, ALL_64.end), REFUSED), (Detach(1, 1), BLOCKED), (Attach(2, 1), REFUSED),
    (Attach(2, 1, AttachFlag.BYPASS), Verdict(0x1000)),
])  # fmt: skip
def test_old_mappings_end(request_, after):
    """MODEL-VIOMMU-ORDER-1 (R15): a mapping that UNMAP, DETACH or ATTACH ends may be used until the request's used index is there, and not
    behind it (V174, V180, V213)."""
    device = device_of(Attach(1, 1), FIRST)
    assert now(device) == {THERE}
    serve(device, request_)
    assert now(device) == {THERE, after}
    opened = [device.begin(READ) for _ in range(3)]
    assert device.judge(opened[0], THERE) == ""
    assert settle(device) == ""
    assert now(device) == {after}
    assert "must be one of" in device.judge(opened[1], THERE)
    assert device.judge(opened[2], after) == ""


def test_new_mappings_begin():
    """MODEL-VIOMMU-ORDER-2: a mapping may be used from when its MAP arrives, must be from when it is answered; an access that began before
    may still be refused, one behind it may not; a MAP that failed maps nothing."""
    device = device_of(Attach(1, 1))
    early = device.begin(READ)
    serve(device, FIRST)
    assert now(device) == {REFUSED, THERE}
    between = device.begin(READ)
    assert settle(device) == ""
    late = device.begin(READ)
    assert [device.allowed(one) for one in (early, between, late)] == [{REFUSED, THERE}, {REFUSED, THERE}, {THERE}]
    assert device.judge(early, REFUSED) == ""
    assert device.judge(between, THERE) == ""
    assert "must be one of" in device.judge(late, REFUSED)
    serve(device, Map(1, 0x1000, 0x2FFF, 0xB000, RW))
    assert now(device, Access(1, 0x2000, False)) == {REFUSED}
    assert settle(device, 4) == ""


def test_several_under_way():
    """MODEL-VIOMMU-ORDER-3 (R83): of several requests each may have happened or not, in their order; each answer narrows it."""
    device = device_of(Attach(1, 1), FIRST)
    serve(device, Unmap(1, 0x1000, 0x1FFF), Map(1, 0x1000, 0x1FFF, 0xB000, RW), Map(1, 0x2000, 0x2FFF, 0xC000, RW))
    second = Access(1, 0x2000, False)
    assert (now(device), now(device, second)) == ({THERE, REFUSED, ELSEWHERE}, {REFUSED, Verdict(0xC000)})
    assert settle(device) == ""
    assert now(device) == {REFUSED, ELSEWHERE}
    assert settle(device) == ""
    assert (now(device), now(device, second)) == ({ELSEWHERE}, {REFUSED, Verdict(0xC000)})
    assert settle(device) == ""
    assert now(device, second) == {Verdict(0xC000)}
    serve(device, FIRST)  # what is there cannot be mapped: in no state does its address change
    assert now(device) == {ELSEWHERE}
    assert "INVAL: status 0" in settle(device)


def test_left_open():
    """MODEL-VIOMMU-ORDER-4: where an answer does not tell what happened, both states are allowed until an access or an answer tells: an
    UNMAP with reserved bytes that was INVAL (V196), an ATTACH that failed as a DETACH and an ATTACH (V174)."""
    for verdict in (THERE, REFUSED):
        device = device_of(Attach(1, 1), FIRST)
        serve(device, Unmap(1, 0x1000, 0x1FFF, b"\1\0\0\0"))
        assert settle(device, 4) == ""
        assert now(device) == {THERE, REFUSED}
        assert device.judge(device.begin(READ), verdict) == ""
        assert now(device) == {verdict}
    for status, left in ((0, ELSEWHERE), (4, THERE)):
        device = device_of(Attach(1, 1), FIRST)
        serve(device, Unmap(1, 0x1000, 0x1FFF, b"\1\0\0\0"))
        settle(device, 4)
        serve(device, Map(1, 0x1000, 0x1FFF, 0xB000, RW))
        assert settle(device, status) == ""
        assert now(device) == {left}
    for verdict in (THERE, BLOCKED):
        device = device_of(Attach(1, 1), FIRST, Attach(2, 2, AttachFlag.BYPASS))
        serve(device, Attach(2, 1))
        assert settle(device, 4) == ""
        assert device.judge(device.begin(READ), verdict) == ""
        assert now(device) == {verdict}
    device = device_of(Attach(1, 1), FIRST)
    serve(device, Unmap(1, 0x1000, 0x1FFF, b"\1\0\0\0"))
    assert settle(device, 0) == ""
    assert now(device) == {REFUSED}


def test_too_much_left_open():
    """MODEL-VIOMMU-ORDER-5: a device that leaves more and more open is told so, not followed for ever."""
    device = device_of(Attach(1, 1), *(Map(1, n << 12, (n << 12) + 0xFFF, 0, RW) for n in range(9)))
    for n in range(8):
        serve(device, Unmap(1, n << 12, (n << 12) + 0xFFF, b"\1\0\0\0"))
        assert settle(device, 4) == ""
    with pytest.raises(ValueError, match="at most 256"):
        serve(device, Unmap(1, 0x8000, 0x8FFF, b"\1\0\0\0"))


def test_reset_and_bypass():
    """MODEL-VIOMMU-ORDER-6: what a reset or a write of config.bypass ends may be used until the driver has read that it is done (V161,
    V162)."""
    device = device_of(Attach(1, 1), FIRST)
    serve(device, Unmap(1, 0, ALL_64.end))
    device.begin_reset()
    assert now(device) == {THERE, REFUSED, BLOCKED}
    opened = [device.begin(READ), device.begin(READ)]
    device.reset()
    assert now(device) == {BLOCKED}
    assert device.judge(opened[0], REFUSED) == ""
    assert "must be one of" in device.judge(opened[1], THERE)
    device.negotiate(OFFERED)
    device.write_config(36, b"\1")
    assert now(device) == {BLOCKED, Verdict(0x1000)}
    serve(device, Attach(1, 2))
    assert settle(device) == ""
    assert now(device) == {BLOCKED, Verdict(0x1000)}
    assert device.config_read(device.config()) == ""
    assert now(device) == {Verdict(0x1000)}
    serve(device, Attach(3, 1))
    assert settle(device) == ""
    serve(device, Detach(3, 1))
    device.write_config(36, b"\0")
    assert now(device) == {REFUSED, BLOCKED, Verdict(0x1000)}
    assert settle(device) == ""
    assert now(device) == {BLOCKED, Verdict(0x1000)}  # the domain is gone, whatever is still to come of the configuration
    device.system_reset()
    assert now(device) == {BLOCKED}


# -- fault records --


def refuse(device, access, reason=None):
    assert device.judge(device.begin(access), Verdict(reason=reason)) == ""


def test_faults():
    """MODEL-VIOMMU-ORDER-7 (R34): a refused access is told once, with its reason, direction, endpoint and address, or counted as dropped
    (V209 to V212)."""
    device = device_of(Attach(1, 1), FIRST)
    refuse(device, Access(1, 0x5000, True))
    refuse(device, Access(2, 0x1000, False), FaultReason.DOMAIN)
    refuse(device, Access(1, 0x7FFF, False))
    assert device.fault_count == 3
    assert "3 faults were not reported, 0" in device.unreported(0)
    wrote, read = Fault(2, 0x102, 1, 0x5000), Fault(1, 0x101, 2, 0x1000)
    assert device.reported(read.pack(), 24) == ""
    for bad in (read, Fault(1, 0x102, 1, 0x5000), Fault(2, 0x101, 1, 0x5000), Fault(2, 0x102, 2, 0x5000), Fault(2, 0x102, 1, 0x5004),
                Fault(0, 0x102, 1, 0x5000), Fault(2, 0x100, 1, 0x5000), Fault(2, 0x106, 1, 0x5000)):  # fmt: skip
        assert "tells of no refused access" in device.reported(bad.pack(), 24)
    for bad in (Fault(2, 0x102, 1, 0x5000, b"\0\1\0"), Fault(2, 0x102, 1, 0x5000, reserved1=1)):
        assert "reserved fields" in device.reported(bad.pack(), 24)
    for length in (0, 16, 23, 25):
        assert f"used length {length}" in device.reported(wrote.pack(), length)
    assert device.reported(wrote.pack()[:23], 0) == ""
    assert "used length 23, must be 0" in device.reported(wrote.pack()[:23], 23)
    assert device.reported(wrote.pack() + b"more", 24) == ""
    assert device.unreported(1) == ""
    assert "1 faults were not reported, 2" in device.unreported(2)
    assert device.reported(Fault(2, FaultFlag.READ, 1, 0x99).pack(), 24) == ""  # ADDRESS may be left out
    assert device.unreported(0) == ""


def test_faults_of_either_reason():
    """MODEL-VIOMMU-ORDER-8: where both reasons are allowed, because a DETACH is under way, the record may have either, and tells once."""
    for reason in (FaultReason.DOMAIN, FaultReason.MAPPING):
        device = device_of(Attach(1, 1))
        serve(device, Detach(1, 1))
        refuse(device, READ)
        assert settle(device) == ""
        assert device.reported(Fault(reason, 0x101, 1, 0x1000).pack(), 24) == ""
        assert "tells of no" in device.reported(Fault(reason, 0x101, 1, 0x1000).pack(), 24)
    device = device_of(Attach(1, 1))
    refuse(device, READ)
    assert "tells of no" in device.reported(Fault(1, 0x101, 1, 0x1000).pack(), 24)


def test_what_is_seen_of_an_access():
    """MODEL-VIOMMU-ORDER-13: a reason or a kind of memory that was not seen is not judged; one that was, is."""
    device = device_of(Attach(1, 1), Map(1, 0x1000, 0x1FFF, 0xA000, RW | MapFlag.MMIO))
    for seen, is_good in ((Verdict(0xA000, is_mmio=None), True), (Verdict(0xA000, is_mmio=True), True), (Verdict(0xA000), False),
                          (Verdict(0xA001, is_mmio=None), False), (Verdict(), False)):  # fmt: skip
        assert (device.judge(device.begin(READ), seen) == "") is is_good
    for seen, is_good in ((Verdict(), True), (REFUSED, True), (BLOCKED, False), (Verdict(0x5000), False)):
        assert (device.judge(device.begin(Access(1, 0x5000, False)), seen) == "") is is_good
    assert device.fault_count == 2


# -- whose accesses are translated at all --


def test_access_platform():
    """MODEL-VIOMMU-ORDER-9 (R22, R24, R26, R48, R51): a function whose driver did not accept ACCESS_PLATFORM uses physical addresses,
    attached or blocked, and is never refused; each function for itself; once it accepts, it is translated."""
    device = device_of(Attach(1, 1), FIRST, Attach(2, 2), Map(2, 0x1000, 0x1FFF, 0xB000, RW))
    device.access_platform(1, False)
    device.access_platform(3, False)
    assert now(device) == now(device, Access(3, 0x1000, True)) == {Verdict(0x1000)}
    assert now(device, Access(2, 0x1000, False)) == {ELSEWHERE}
    assert now(device, Access(1, 0xFEE00000, False)) == {Verdict(0xFEE00000)}
    serve(device, Unmap(1, 0, ALL_64.end))
    assert settle(device) == ""
    assert now(device) == {Verdict(0x1000)}
    device.access_platform(1, True)
    assert now(device) == {REFUSED}
    assert now(device, Access(3, 0x1000, True)) == {Verdict(0x1000)}


def test_topology():
    """MODEL-VIOMMU-ORDER-10 (R23, R50): the endpoints that PROBE and ATTACH know are those whose accesses are decided; of others nothing is
    said."""
    device = device_of()
    for endpoint in range(6):
        is_known = endpoint in (1, 2, 3)
        for request, room in ((Attach(1, endpoint), 4), (Probe(endpoint), 516)):
            assert (device.rules.outcomes(device.state, request.pack(), room)[0].status == 0) is is_known
        if is_known:
            assert now(device, Access(endpoint, 0x1000, False)) == {BLOCKED}
        else:
            with pytest.raises(KeyError):
                device.translate(endpoint, 0x1000, False)


def test_identity_in_every_way():
    """MODEL-VIOMMU-ORDER-11 (R25, R28, R47): no ACCESS_PLATFORM, config.bypass, a bypass domain and identity mappings give the same
    addresses for the same accesses."""
    limits = Range(0, (1 << 40) - 1)
    accesses = [Access(1, at, is_write, 4) for at in (0, 0x1234, 0xFEE00010, (1 << 40) - 4) for is_write in (False, True)
                if is_write or at not in X86_MSI]  # fmt: skip
    bypassed = device_of(bypass=1)
    untranslated = device_of()
    untranslated.access_platform(1, False)
    passing = device_of(Attach(1, 1, AttachFlag.BYPASS))
    halves = (0, X86_MSI.start - 1), (X86_MSI.end + 1, limits.end)
    mapped = device_of(Attach(1, 1), *(Map(1, start, end, start, RW) for start, end in halves), input_range=limits)
    wanted = [{Verdict(one.address)} for one in accesses]
    for device in (bypassed, untranslated, passing, mapped):
        assert [now(device, one) for one in accesses] == wanted
    assert now(mapped, Access(1, 1 << 40, False)) == {REFUSED}


def test_domains_apart():
    """MODEL-VIOMMU-ORDER-12 (R27): two domains that map the same addresses lead each endpoint to its own, and a region of one endpoint
    does nothing to the other."""
    own = Region(0x8000, 0x8FFF)
    device = device_of(Attach(1, 1), Attach(2, 2), FIRST, Map(2, 0x1000, 0x1FFF, 0xB000, MapFlag.READ), Map(2, 0x8000, 0x8FFF, 0xC000, RW),
                       endpoints={1: (own,), 2: (), 3: ()})  # fmt: skip
    assert (now(device), now(device, Access(2, 0x1000, False))) == ({THERE}, {ELSEWHERE})
    assert (now(device, Access(1, 0x1000, True)), now(device, Access(2, 0x1000, True))) == ({THERE}, {REFUSED})
    assert (now(device, Access(1, 0x8000, True)), now(device, Access(2, 0x8000, True))) == ({REFUSED}, {Verdict(0xC000)})
