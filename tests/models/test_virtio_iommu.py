"""The golden virtio-iommu: every sentence of the standard about requests, configuration and bypass, by worked examples."""

from itertools import product

import pytest

from ringwall.models.virtio.iommu import IommuDevice
from ringwall.models.virtio.iommu_formats import (
    Attach,
    AttachFlag,
    Detach,
    Fault,
    FaultReason,
    IommuConfig,
    IommuFeature,
    Map,
    MapFlag,
    Probe,
    Range,
    Region,
    RegionType,
    Status,
    Unmap,
    pack_regions,
    unpack_regions,
)
from ringwall.models.virtio.iommu_rules import OFFERED, X86_MSI, IommuDescription, Verdict

OK, UNSUPP, INVAL, RANGE, NOENT, FAULT, NOMEM = (Status[name] for name in ("OK", "UNSUPP", "INVAL", "RANGE", "NOENT", "FAULT", "NOMEM"))
RW = MapFlag.READ | MapFlag.WRITE
RESERVED = Region(0x200000, 0x20FFFF)
TOP = (1 << 64) - 1
ROOM = 4 + 512
BLOCKED, REFUSED = Verdict(reason=FaultReason.DOMAIN), Verdict(reason=FaultReason.MAPPING)


def bits(*features):
    return sum(1 << bit for bit in features)


def device_of(*, accepted=None, **options):
    """A device with endpoints 1 to 3, of which the third has a reserved region beside the interrupts'."""
    regions = {1: (X86_MSI,), 2: (X86_MSI,), 3: (X86_MSI, RESERVED)}
    device = IommuDevice(IommuDescription(**{"endpoints": regions, **options}))
    device.negotiate(device.description.features if accepted is None else accepted)
    return device


def room_of(request):
    return ROOM if isinstance(request, Probe) else 4


def allowed(device, request, room=None):
    """Statuses that a request may have now, None for unwritten; the device stays as it is."""
    found = device.rules.outcomes(device.state, request.pack(), room_of(request) if room is None else room)
    return [one.status for one in found]


def do(device, *requests):
    """Requests that must succeed."""
    for request in requests:
        assert device.execute(request.pack(), room_of(request))[-4:] == bytes(4), request
    return device


def go(device, endpoint, address, is_write=False, length=1):
    """The one verdict that an access may have."""
    (verdict,) = device.translate(endpoint, address, is_write, length)
    return verdict


def test_bytes_by_hand():
    """MODEL-VIOMMU-1 (R76, R90): requests, configuration, properties and fault records lie in their bytes as the standard's structures."""
    for request, raw in [
        (Attach(0x04030201, 0x14131211, 1), "01000000 01020304 11121314 01000000 00000000"),
        (Detach(0x04030201, 0x14131211), "02000000 01020304 11121314 0000000000000000"),
        (Map(7, 0x1000, 0x1FFF, 0xA000, 5), "03000000 07000000 0010000000000000 ff1f000000000000 00a0000000000000 05000000"),
        (Unmap(7, 0x1000, 0x1FFF, b"abcd", b"xyz"), "0478797a 07000000 0010000000000000 ff1f000000000000 61626364"),
        (Probe(0x14131211), "05000000 11121314" + "00" * 64),
    ]:
        assert request.pack() == bytes.fromhex(raw)
        assert type(request).unpack(request.pack()) == request
    assert pack_regions([X86_MSI, Region(0x1000, 0x1FFF)]) == bytes.fromhex(
        "01001400 01000000 0000e0fe00000000 ffffeffe00000000 01001400 00000000 0010000000000000 ff1f000000000000")  # fmt: skip
    record = Fault(2, 0x102, 5, 0x123456789)
    assert record.pack() == bytes.fromhex("02000000 02010000 05000000 00000000 8967452301000000")
    assert Fault.unpack(record.pack()) == record
    raw = IommuConfig(0xF000, Range(1, 2), Range(3, 4), 5, 1).pack()
    assert raw == bytes.fromhex("00f0000000000000 0100000000000000 0200000000000000 03000000 04000000 05000000 01000000")
    assert len(raw) == 40
    assert IommuConfig.unpack(raw) == IommuConfig(0xF000, Range(1, 2), Range(3, 4), 5, 1)


@pytest.mark.parametrize("raw, what", [
    ("01101400" + "00" * 20, "reserved bits 0x1"), ("02000400" + "00" * 4, "type 2"), ("01001000" + "00" * 16, "length 16"),
    ("01001400" + "00" * 19, "leave the list"), ("01001400 01000100" + "00" * 16, "reserved bytes 000100"), ("00000000 00000001", "not 0"),
    ("01001400" + "00" * 20 + "0000 0100", "not 0"),
])  # fmt: skip
def test_properties_that_no_device_writes(raw, what):
    """MODEL-VIOMMU-2: a property with reserved bits, of another type or length, out of its place, or followed by other than zeroes is
    found (V200, V201, V202, V204)."""
    assert what in "".join(unpack_regions(bytes.fromhex(raw))[1])
    assert unpack_regions(pack_regions([X86_MSI, RESERVED]) + bytes(8)) == ([X86_MSI, RESERVED], [])


@pytest.mark.parametrize("options, what", [
    ({"features": bits(3, 6)}, "both BYPASS and BYPASS_CONFIG"), ({"features": 1 << 7}, "those of a virtio-iommu"),
    ({"page_size_mask": 0}, "1 to 64 bits"), ({"page_size_mask": 1 << 64}, "1 to 64 bits"), ({"bypass": 2}, "0 or 1"),
    ({"capacity": 0}, "at least 1"), ({"endpoints": {1: (X86_MSI, Region(0, 9, RegionType.MSI))}}, "at most one MSI"),
    ({"endpoints": {1: (Region(0, 9), Region(9, 19))}}, "not be inverted or overlap"),
    ({"endpoints": {1: (RESERVED, RESERVED)}}, "not be inverted or overlap"),
    ({"endpoints": {1: (Region(9, 8),)}}, "not be inverted or overlap"), ({"input_range": Range(9, 8)}, "Ranges must not be inverted"),
    ({"domain_range": Range(1, 0)}, "Ranges must not be inverted"), ({"physical": (Range(1, 0),)}, "Ranges must not be inverted"),
    ({"endpoints": {1: (X86_MSI, RESERVED)}, "probe_size": 47}, "must fit in 47 bytes"),
])  # fmt: skip
def test_devices_that_may_not_be(options, what):
    """MODEL-VIOMMU-3: what no device may offer or tell is refused with a sentence (V158, V159, V160, V205, V206); what ours offers has
    MAP_UNMAP and not BYPASS (V157)."""
    with pytest.raises(ValueError, match=what):
        IommuDescription(**{"endpoints": {1: ()}, **options})
    assert bits(0, 1, 2, 4, 5, 6) == OFFERED


def test_config():
    """MODEL-VIOMMU-4 (R48, R90): device configuration: 40 bytes; fields of features that are not offered are 0, the others are there before
    FEATURES_OK; bypass is 0 or 1, changes only by the driver's write, outlives a device reset and not a system reset (V012, V159, V160,
    V161)."""
    told = {"input_range": Range(0x1000, 0xFFFF), "domain_range": Range(2, 9), "probe_size": 64}
    device = device_of(accepted=0, **told)
    assert device.config() == IommuConfig(TOP & ~0xFFF, Range(0x1000, 0xFFFF), Range(2, 9), 64, 1).pack()
    bare = device_of(features=bits(IommuFeature.MAP_UNMAP), **told)
    assert bare.config() == IommuConfig(TOP & ~0xFFF, Range(0, 0), Range(0, 0), 0, 0).pack()
    assert device_of(bypass=0).config()[36:] == bytes(4)
    device.negotiate(OFFERED)
    device.write_config(36, b"\0")
    assert device.config()[36:] == bytes(4)
    for offset, data in ((0, b"\xff" * 36), (37, b"\xff\xff\xff"), (40, b"\1")):
        device.write_config(offset, data)
    assert device.config_read(IommuConfig(TOP & ~0xFFF, Range(0x1000, 0xFFFF), Range(2, 9), 64, 0).pack()) == ""
    device.reset()
    assert device.config()[36] == 0
    device.system_reset()
    assert device.config()[36] == 1
    device.negotiate(OFFERED)
    device.write_config(32, b"\0\0\0\0\0\xff\xff\xff")
    assert device.config()[36:] == bytes(4)
    wrong = bytearray(device.config())
    for n, value in ((36, 2), (36, 1), (37, 1), (0, 1)):
        assert "must be" in device.config_read(bytes(wrong[:n] + bytes([value]) + wrong[n + 1 :]))
    with pytest.raises(ValueError, match="must be offered"):
        device.negotiate(1 << IommuFeature.BYPASS)


def test_config_left_open():
    """MODEL-VIOMMU-5: a bypass that no driver may write, or without the feature accepted, becomes 0 or 1 or nothing: the next read tells
    which, and accesses must fit it (V160)."""
    for accepted, value, possible in ((OFFERED, 7, {0, 1}), (0, 0, {0, 1}), (OFFERED, 0, {0}), (0, 1, {1})):
        for bit in (0, 1):
            device = device_of(accepted=accepted)
            device.write_config(36, bytes([value]))
            raw = device.config()[:36] + bytes([bit, 0, 0, 0])
            assert (device.config_read(raw) == "") is (bit in possible)
            if bit in possible:
                assert go(device, 1, 0x1000) == (Verdict(0x1000) if bit else BLOCKED)


# -- ATTACH and DETACH --


def test_attach():
    """MODEL-VIOMMU-6: every reason to refuse an ATTACH: reserved bytes, unknown flags, unknown endpoints, domains of the other kind or out
    of the range, a second endpoint, other properties, an endpoint that moves (V169 to V176)."""
    device = device_of(domain_range=Range(1, 8))
    assert allowed(device, Attach(1, 1)) == [OK]
    assert allowed(device, Attach(1, 1, head=b"abc")) == [OK]
    for reserved in (b"\1\0\0\0", b"\0\0\0\x80"):
        assert allowed(device, Attach(1, 1, reserved=reserved)) == [INVAL]
    for flags in (2, 3, 1 << 31):
        assert allowed(device, Attach(1, 1, flags)) == [INVAL]
    for endpoint in (0, 4, 0x101, 0xFFFFFFFF):
        assert allowed(device, Attach(1, endpoint)) == [NOENT]
    assert allowed(device, Attach(1, 4, 2)) == [INVAL, NOENT]
    for number in (0, 9):
        assert allowed(device, Attach(number, 1)) == [RANGE, INVAL]
        assert allowed(device, Attach(number, 4)) == [NOENT]  # a MUST before a SHOULD
    do(device, Attach(1, 1), Attach(8, 2, AttachFlag.BYPASS))
    assert allowed(device, Attach(1, 1)) == [OK]
    assert allowed(device, Attach(1, 3, AttachFlag.BYPASS)) == [INVAL]
    assert allowed(device, Attach(8, 3)) == [INVAL]
    assert allowed(device, Attach(1, 2)) == [OK]
    assert allowed(device, Attach(1, 3)) == [OK, UNSUPP]  # other regions than endpoint 1
    do(device, Map(1, 0x200000, 0x200FFF, 0, RW))
    assert allowed(device, Attach(1, 3)) == [UNSUPP]  # and a mapping in one
    assert allowed(device_of(features=OFFERED & ~bits(IommuFeature.DOMAIN_RANGE), domain_range=Range(1, 8)), Attach(0xFFFFFFFF, 1)) == [OK]


def test_attach_that_cannot():
    """MODEL-VIOMMU-7: a device that has one endpoint per domain, or cannot move one, says UNSUPP and changes nothing (V172, V174)."""
    device = do(device_of(shares=False, reattaches=False), Attach(1, 1))
    before = device.state
    for request in (Attach(1, 2), Attach(2, 1)):
        assert allowed(device, request) == [UNSUPP]
        assert device.execute(request.pack(), 4) == bytes([UNSUPP, 0, 0, 0])
    assert device.state == before
    do(device, Attach(2, 2), Attach(1, 1))


def test_attach_attaches():
    """MODEL-VIOMMU-8 (R27, R91): an endpoint that was not refused has the mappings of its domain and none of another; one that moves is
    detached first, and what only it had is gone (V174, V176, V181)."""
    device = do(device_of(), Attach(1, 1), Attach(2, 2), Map(1, 0x1000, 0x1FFF, 0xA000, RW), Map(2, 0x1000, 0x1FFF, 0xB000, RW))
    assert (go(device, 1, 0x1004), go(device, 2, 0x1004)) == (Verdict(0xA004), Verdict(0xB004))
    do(device, Map(1, 0x2000, 0x2FFF, 0xC000, RW))
    assert (go(device, 1, 0x2000), go(device, 2, 0x2000)) == (Verdict(0xC000), REFUSED)
    do(device, Attach(2, 1))
    assert go(device, 1, 0x1004) == Verdict(0xB004)
    assert go(device, 1, 0x2000) == REFUSED
    assert allowed(device, Map(1, 0x3000, 0x3FFF, 0, RW)) == [NOENT]
    do(device, Attach(1, 1))
    assert [go(device, 1, at) for at in (0x1004, 0x2000)] == [REFUSED, REFUSED]
    assert go(device, 2, 0x1004) == Verdict(0xB004)
    do(device, Attach(1, 1))  # to where it is: nothing changes
    do(device, Map(1, 0x4000, 0x4FFF, 0xD000, RW), Attach(1, 1))
    assert go(device, 1, 0x4000) == Verdict(0xD000)


def test_detach():
    """MODEL-VIOMMU-9 (R91): reserved bytes ignored, unknown endpoints, wrong domains; afterwards no mapping is reached; the last one takes
    the domain along, whose number starts afresh; a reset detaches all (V162, V177 to V181)."""
    device = do(device_of(bypass=0), Attach(1, 1), Attach(1, 2), Map(1, 0x1000, 0x1FFF, 0xA000, RW))
    assert allowed(device, Detach(1, 9)) == [NOENT]
    for request in (Detach(2, 1), Detach(1, 3)):
        assert allowed(device, request)[0] is INVAL
        assert set(allowed(device, request)) == {INVAL, OK, NOENT}
        assert all(one.state is device.state for one in device.rules.outcomes(device.state, request.pack(), 4))
    do(device, Detach(1, 1, b"reserved"))
    assert (go(device, 1, 0x1000), go(device, 2, 0x1000)) == (BLOCKED, Verdict(0xA000))
    do(device, Detach(1, 2))
    assert allowed(device, Unmap(1, 0, TOP)) == [NOENT]
    do(device, Attach(1, 1))
    assert go(device, 1, 0x1000) == REFUSED
    do(device, Detach(1, 1), Attach(1, 1, AttachFlag.BYPASS))
    assert go(device, 1, 0x1000) == Verdict(0x1000)
    device.reset()
    assert go(device, 1, 0x1000) == BLOCKED
    assert device.state.domains == {}


# -- MAP and UNMAP --


@pytest.mark.parametrize("request_, statuses", [
    (Map(1, 0x1000, 0x1FFF, 0xA000, RW), [OK]),
    (Map(1, 0x1000, 0x1FFF, 0xA000, RW, b"abc"), [OK]),
    (Map(1, 0, 0xFFF, 0, MapFlag.READ), [OK]),
    (Map(1, 0x1000, 0x1FFF, 0xA000, RW | MapFlag.MMIO), [OK]),
    (Map(1, 0x1800, 0x1FFF, 0xA000, RW), [RANGE]),  # V182
    (Map(1, 0x1000, 0x1FFE, 0xA000, RW), [RANGE]),
    (Map(1, 0x1000, 0x2000, 0xA000, RW), [RANGE]),
    (Map(1, 0x1000, 0x1FFF, 0xA001, RW), [RANGE]),
    (Map(1, 0x1000, 0x1000, 0xA000, RW), [RANGE]),
    (Map(1, 0x5000, 0x5FFF, 0xA000, RW), [INVAL]),  # V183: the same
    (Map(1, 0x4000, 0x5FFF, 0xA000, RW), [INVAL]),
    (Map(1, 0x6000, 0x7FFF, 0xA000, RW), [INVAL]),
    (Map(1, 0x4000, 0x8FFF, 0xA000, RW), [INVAL]),
    (Map(1, 0x4000, 0x4FFF, 0xA000, RW), [OK]),
    (Map(1, 0x7000, 0x7FFF, 0xA000, RW), [OK]),
    (Map(1, 0x1000, 0x1FFF, 0xA000, 8 | RW), [INVAL]),  # V184
    (Map(1, 0x1000, 0x1FFF, 0xA000, 1 << 31 | RW), [INVAL]),
    (Map(1, 0x1001, 0x1FFF, 0xA000, 8), [INVAL]),  # a MUST before a SHOULD
    (Map(7, 0x1000, 0x1FFF, 0xA000, 8), [INVAL]),
    (Map(7, 0x1000, 0x1FFF, 0xA000, RW), [NOENT]),  # V185
    (Map(2, 0x1000, 0x1FFF, 0xA000, RW), [INVAL]),  # V186
    (Map(1, 0x3000, 0x1FFF, 0xA000, RW), [INVAL, RANGE]),  # V189
    (Map(1, 0x2000, 0x1FFF, 0xA000, RW), [INVAL, RANGE]),
    (Map(1, TOP - 0xFFF, 0xFFF, 0xA000, RW), [INVAL, RANGE]),
    (Map(1, 1 << 40, (1 << 40) + 0xFFF, 0xA000, RW), [RANGE, INVAL]),  # V190
    (Map(1, (1 << 40) - 0x1000, (1 << 40) + 0xFFF, 0xA000, RW), [RANGE, INVAL]),
    (Map(1, (1 << 40) - 0x1000, (1 << 40) - 1, 0xA000, RW), [OK]),
    (Map(1, 0xFEE00000, 0xFEE00FFF, 0xA000, RW), [INVAL, RANGE]),  # V207
    (Map(1, 0xFEDFF000, 0xFEE00FFF, 0xA000, RW), [INVAL, RANGE]),
    (Map(1, 0xFEEFF000, 0xFEF00FFF, 0xA000, RW), [INVAL, RANGE]),
    (Map(1, 0xFED00000, 0xFEDFFFFF, 0xA000, RW), [OK]),
    (Map(1, 0x200000, 0x200FFF, 0xA000, RW), [OK]),  # reserved for another endpoint
    (Map(1, 0x1000, 0x2FFF, 0x3FFF000, RW), [RANGE, INVAL, FAULT]),  # physical addresses that are not there
    (Map(1, 0x1000, 0x1FFF, 0x3FFF000, RW), [OK]),
    (Map(1, 0x1000, 0x2FFF, TOP - 0xFFF, RW), [RANGE, INVAL, FAULT]),
    (Map(1, 0x1000, 0x1FFF, 0xA000, 0), [OK, INVAL]),  # which combinations there are is the device's
    (Map(7, 0x1800, 0x1FFF, 0xA000, RW), [NOENT, RANGE]),  # several at once
])  # fmt: skip
def test_map(request_, statuses):
    """MODEL-VIOMMU-10 (R32, R87): each reason to refuse a MAP, alone and with others, first what our card says; what is refused changes
    nothing (V182 to V186, V189, V190, V207)."""
    device = device_of(input_range=Range(0, (1 << 40) - 1), physical=(Range(0, 0x3FFFFFF), Range(1 << 32, 1 << 33)))
    do(device, Attach(1, 1), Attach(2, 2, AttachFlag.BYPASS), Map(1, 0x5000, 0x6FFF, 0xF0000, RW))
    found = device.rules.outcomes(device.state, request_.pack(), 4)
    assert [one.status for one in found] == statuses
    for one in found:
        assert (one.state == device.state) is (one.status is not OK)


@pytest.mark.parametrize("mask, unit", [(TOP & ~0xFFF, 0x1000), (0x10000, 0x10000), (0x4000 | 1 << 30, 0x4000), (1, 1)])
def test_map_granule(mask, unit):
    """MODEL-VIOMMU-11 (R32): the least bit of page_size_mask is the granularity, whatever the others say; one byte where it is 1 (V159,
    V182)."""
    device = do(device_of(page_size_mask=mask), Attach(1, 1), Map(1, unit, 3 * unit - 1, 5 * unit, RW))
    assert go(device, 1, 3 * unit - 1) == Verdict(7 * unit - 1)
    assert go(device, 1, 3 * unit) == REFUSED
    if unit > 1:
        for made in (Map(1, 8 * unit, 9 * unit - 1, unit // 2, RW), Map(1, 8 * unit + unit // 2, 9 * unit - 1, 0, RW)):
            assert allowed(device, made) == [RANGE]
    else:  # "strictly greater" against "one byte at a time is legal"
        assert allowed(device, Map(1, 8, 8, 8, RW)) == [OK, INVAL, RANGE]


def test_map_permissions():
    """MODEL-VIOMMU-12 (R36): reads want READ, writes WRITE, for any length of a mapping; MMIO is told of the access, without the feature it
    is no flag; an address leads as far from phys_start as it lies from virt_start (V187, V188, V191)."""
    device = do(device_of(), Attach(1, 1))
    for n, flags in enumerate((MapFlag.READ, MapFlag.WRITE, RW, RW | MapFlag.MMIO, MapFlag(0))):
        start = 0x10000 * n
        do(device, Map(1, start, start + 0x2FFF, 0x900000 + start, flags))
        for at, is_write in product((0, 0x1234, 0x2FFF), (False, True)):
            good = flags & (MapFlag.WRITE if is_write else MapFlag.READ)
            wanted = Verdict(0x900000 + start + at, is_mmio=bool(flags & MapFlag.MMIO)) if good else REFUSED
            assert go(device, 1, start + at, is_write) == wanted
        assert go(device, 1, start + 0x3000) == REFUSED
    assert allowed(device_of(features=OFFERED & ~bits(IommuFeature.MMIO)), Map(1, 0, 0xFFF, 0, RW | MapFlag.MMIO)) == [INVAL]
    unsure = do(device_of(accepted=OFFERED & ~bits(IommuFeature.MMIO)), Attach(1, 1))
    assert allowed(unsure, Map(1, 0, 0xFFF, 0, RW | MapFlag.MMIO)) == [OK, INVAL]


# The seven of 5.13.6.6: what is mapped, what is unmapped, what is left; None: it fails.
EXAMPLES = [
    ([], (0, 4), []), ([(0, 9)], (0, 9), []), ([(0, 4), (5, 9)], (0, 9), []), ([(0, 9)], (0, 4), None),
    ([(0, 4), (5, 9)], (0, 4), [(5, 9)]), ([(0, 4)], (0, 9), []), ([(0, 4), (10, 14)], (0, 14), []),
]  # fmt: skip


@pytest.mark.parametrize("unit, base", [(1, 0), (0x1000, 0), (0x1000, 0x7000), (0x1000, TOP + 1 - 15 * 0x1000)])
@pytest.mark.parametrize("mapped, unmapped, left", EXAMPLES)
def test_unmap_examples(unit, base, mapped, unmapped, left):
    """MODEL-VIOMMU-13: the standard's seven examples of UNMAP, in bytes and in pages, at both ends of the addresses (V194, V195)."""
    device = do(device_of(page_size_mask=unit), Attach(1, 1))

    def span(first, last):
        return base + first * unit, base + (last + 1) * unit - 1

    for one in mapped:
        do(device, Map(1, *span(*one), 0x100000, RW))
    request = Unmap(1, *span(*unmapped))
    assert allowed(device, request) == [RANGE if left is None else OK]
    device.execute(request.pack(), 4)
    rest = [(one.start, one.end) for one in device.state.domains[1].mappings]
    assert rest == [span(*one) for one in (mapped if left is None else left)]


def test_unmap():
    """MODEL-VIOMMU-14: no domain, a bypass domain, ranges that split at one end or at both, unaligned ones, inverted ones, reserved bytes
    (V192 to V196)."""
    device = device_of(input_range=Range(0x1000, (1 << 40) - 1))
    do(device, Attach(1, 1), Attach(2, 2, AttachFlag.BYPASS), Map(1, 0x2000, 0x5FFF, 0, RW), Map(1, 0x8000, 0x8FFF, 0, RW))
    assert allowed(device, Unmap(7, 0, TOP)) == [NOENT]
    assert allowed(device, Unmap(2, 0, TOP)) == [INVAL]
    for start, end in ((0x2000, 0x2FFF), (0x3000, 0x5FFF), (0x3000, 0x3FFF), (0x3000, 0x8FFF), (0x2000, 0x5FFE), (0x2001, 0x5FFF),
                       (0x5FFF, TOP), (0x1000, 0x8FFE)):  # fmt: skip
        before = device.state
        assert allowed(device, Unmap(1, start, end))[0] is RANGE
        device.execute(Unmap(1, start, end).pack(), 4)
        assert device.state == before
    assert allowed(device, Unmap(1, 0x1FFF, 0x6001)) == [OK]  # nothing says that an UNMAP is aligned
    assert allowed(device, Unmap(1, 0x6000, 0x7FFF)) == [OK]
    assert allowed(device, Unmap(1, 0x9000, 0x1000)) == [INVAL, RANGE, OK]
    assert allowed(device, Unmap(1, 0x4000, 0x3000)) == [INVAL, RANGE, OK]
    assert {len(one.state.domains[1].mappings) for one in device.rules.outcomes(device.state, Unmap(1, 0x9000, 0x1000).pack(), 4)} == {2}
    assert allowed(device, Unmap(1, 0, TOP)) == [OK, RANGE, INVAL]  # beyond the input range
    made = device.rules.outcomes(device.state, Unmap(1, 0x1000, 0x8FFF, b"\0\0\0\1").pack(), 4)
    assert [(one.status, len(one.state.domains[1].mappings)) for one in made] == [(OK, 0), (INVAL, 2), (INVAL, 0)]
    do(device, Unmap(1, 0x1000, 0x8FFF))
    assert go(device, 1, 0x2000) == REFUSED


def test_capacity():
    """MODEL-VIOMMU-15: NOMEM is allowed from the stated number of mappings on, of all domains together, never before, and not for ATTACH;
    a place that is free again counts."""
    device = do(device_of(capacity=3), Attach(1, 1), Attach(2, 2), Map(1, 0, 0xFFF, 0, RW), Map(2, 0, 0xFFF, 0, RW))
    assert allowed(device, Map(1, 0x1000, 0x1FFF, 0, RW)) == [OK]
    do(device, Map(1, 0x1000, 0x1FFF, 0, RW))
    assert allowed(device, Map(1, 0x2000, 0x2FFF, 0, RW)) == [OK, NOMEM]
    assert allowed(device, Map(1, 0x1000, 0x1FFF, 0, RW)) == [INVAL, NOMEM]
    assert allowed(device, Map(1, 0x1000, 0x1FFF, 0, 8)) == [INVAL]
    assert allowed(device, Attach(3, 3)) == [OK]
    do(device, Detach(2, 2))
    assert allowed(device, Map(1, 0x2000, 0x2FFF, 0, RW)) == [OK]


# -- PROBE, and the form of requests --


def test_probe():
    """MODEL-VIOMMU-16 (R79, R81): the regions in any order, zeroes behind them, the tail at the end, all of it counted; reserved bytes
    ignored; unknown endpoints; too little room: no property (V197, V198, V200 to V204)."""
    device = device_of()
    for request in (Probe(3), Probe(3, b"r" * 64), Probe(3, head=b"abc")):
        served = device.serve(request.pack(), ROOM)
        assert served.statuses == {OK}
        good = pack_regions([X86_MSI, RESERVED])
        assert served.outcomes[0].written(ROOM) == good + bytes(464) + bytes(4)
        turned = pack_regions([RESERVED, X86_MSI]) + bytes(468)
        assert device.settle(b"\xa5" * ROOM, turned, ROOM) == ""
    for raw, length, what in [
        (good + bytes(468), ROOM - 1, "used length 515 of 516"), (good + bytes(468), 4, "used length 4"),
        (good[:24] + bytes(492), ROOM, "regions"), (good + good[:24] + bytes(444), ROOM, "regions"),
        (good + b"\xa5" * 464 + bytes(4), ROOM, "leave the list"), (good + bytes(463) + b"\1" + bytes(4), ROOM, "not 0"),
        (good + bytes(464) + b"\0\0\0\1", ROOM, "reserved bytes of the tail"), (bytes(ROOM), ROOM, "regions"),
        (good.replace(b"\x14", b"\x18", 1) + bytes(468), ROOM, "length 24"),
    ]:  # fmt: skip
        device.serve(Probe(3).pack(), ROOM)
        assert what in device.settle(b"\xa5" * ROOM, raw, length)
    for room, statuses in ((4, [INVAL]), (ROOM - 1, [INVAL]), (ROOM + 1, [OK, None, INVAL]), (3, [None])):
        assert allowed(device, Probe(3), room) == statuses
    assert allowed(device, Probe(4)) == [NOENT]
    assert allowed(device, Probe(4), 100) == [NOENT, INVAL]
    assert device.execute(Probe(4).pack(), ROOM) == bytes(512) + bytes([NOENT, 0, 0, 0])
    assert device.execute(Probe(3).pack(), 100) == bytes(96) + bytes([INVAL, 0, 0, 0])


def test_unavailable():
    """MODEL-VIOMMU-17: PROBE that is not offered is not written; MAP and UNMAP that were not accepted are unknown or UNSUPP; flags that are
    not offered are unknown, offered but not accepted: as the device likes (V170, V191, V199)."""
    assert allowed(device_of(features=OFFERED & ~bits(IommuFeature.PROBE)), Probe(1)) == [None]
    assert allowed(device_of(accepted=0), Probe(1)) == [OK, None, UNSUPP]
    device = do(device_of(accepted=bits(IommuFeature.PROBE)), Attach(1, 1))
    assert allowed(device, Map(1, 0, 0xFFF, 0, RW)) == [None, UNSUPP]
    assert allowed(device, Unmap(1, 0, 0xFFF)) == [None, UNSUPP]
    assert allowed(device, Attach(2, 2, AttachFlag.BYPASS)) == [OK, INVAL]
    assert allowed(device_of(features=bits(IommuFeature.MAP_UNMAP)), Attach(2, 2, AttachFlag.BYPASS)) == [INVAL]


UNKNOWN, SHORT = b"\x06" + bytes(19), b"\1" + bytes(18)


def test_form():
    """MODEL-VIOMMU-18 (R78, R80, R82): unknown types and requests without room for a tail come back unwritten with length 0, short ones
    too, or with INVAL where a tail is; the tail is the last four bytes, its reserved ones 0; reserved bytes of the head say nothing
    (V163 to V166, V168)."""
    device = do(device_of(), Attach(1, 1))
    before = device.state
    for kind in (0, 6, 0x7F, 0xFF):
        assert [one.status for one in device.rules.outcomes(before, bytes([kind]) + bytes(71), 4)] == [None]
    requests = (Attach(2, 2), Detach(1, 1), Map(1, 0x1000, 0x1FFF, 0, RW), Unmap(1, 0, TOP), Probe(1))
    for request in requests:
        raw, room = request.pack(), room_of(request)
        for length in range(len(raw)):
            found = device.rules.outcomes(before, raw[:length], room)
            assert [one.status for one in found] == [None, INVAL]
            assert all(one.state is before for one in found)
        for few in range(4):
            assert [(one.status, one.state) for one in device.rules.outcomes(before, raw, few)] == [(None, before)]
        for long, more in ((raw + b"\0", room), (raw, room + 1), (raw + b"x" * 60, room + 60)):
            assert [one.status for one in device.rules.outcomes(before, long, more)] == [OK, None, INVAL]
            assert device.rules.outcomes(before, long, more)[0].written(more)[-4:] == bytes(4)
            assert len(device.rules.outcomes(before, long, more)[0].written(more)) == more
        assert [one.status for one in device.rules.outcomes(before, raw[:1] + b"\xff\xff\xff" + raw[4:], room)] == [OK]


@pytest.mark.parametrize("request_, after, used_len, what", [
    (Attach(1, 1), b"\0\0\0\0", 4, ""), (Attach(1, 1), b"\0\0\0\0", 3, "OK: used length 3 of 4"),
    (Attach(1, 1), b"\0\0\0\0", 0, "used length 0"), (Attach(1, 1), b"\0\0\0\0", 5, "used length 5"),
    (Attach(1, 1), b"\4\0\0\0", 4, "status 4"), (Attach(1, 1), b"\0\0\1\0", 4, "reserved bytes of the tail"),
    (Attach(1, 1), b"\xa5" * 4, 0, "status 165"), (Attach(1, 9), b"\6\0\0\0", 4, ""), (Attach(1, 9), b"\0\0\0\0", 4, "NOENT: status 0"),
    (Attach(1, 9, 2), b"\4\0\0\0", 4, ""), (Attach(1, 9, 2), b"\5\0\0\0", 4, "INVAL: status 5; NOENT: status 5"),
    (UNKNOWN, b"\xa5" * 4, 0, ""), (UNKNOWN, b"\xa5" * 4, 4, "used length 4, must be 0"),
    (UNKNOWN, b"\2\0\0\0", 4, "unwritten: is written"), (UNKNOWN, b"\xa5\xa5\xa5\0", 0, "is written"),
    (SHORT, b"\xa5" * 4, 0, ""), (SHORT, b"\4\0\0\0", 4, ""), (SHORT, b"\1\0\0\0", 4, "INVAL: status 1"),
])  # fmt: skip
def test_answers_are_judged(request_, after, used_len, what):
    """MODEL-VIOMMU-19 (R78, R79, R80): a wrong status, a wrong length, a reserved byte, a write where none may be: each is found; what is
    allowed passes (V163, V164, V166, V168)."""
    device = device_of()
    device.serve(request_ if isinstance(request_, bytes) else request_.pack(), 4)
    found = device.settle(b"\xa5" * 4, after, used_len)
    assert what in found if what else found == ""
    device.serve(b"", 4)
    with pytest.raises(ValueError, match="must be 4, not 4 and 3"):
        device.settle(bytes(4), bytes(3), 0)
    with pytest.raises(ValueError, match="in order, not with 1 pending"):
        device.execute(b"", 4)


# -- bypass --

NONE, MAPPED, PASSING = "unattached", "in a domain", "in a bypass domain"
# Offered, accepted, config.bypass -> what the endpoint is, and whether it is in bypass mode.
BC, OLD = bits(IommuFeature.BYPASS_CONFIG), bits(IommuFeature.BYPASS)
TRUTH = [
    (BC, BC, 1, NONE, True), (BC, BC, 1, MAPPED, False), (BC, BC, 1, PASSING, True),
    (BC, BC, 0, NONE, False), (BC, BC, 0, MAPPED, False), (BC, BC, 0, PASSING, True),
    (BC, 0, 1, NONE, True), (BC, 0, 1, MAPPED, False),
    (BC, 0, 0, NONE, False), (BC, 0, 0, MAPPED, False),
    (OLD, OLD, 0, NONE, True), (OLD, OLD, 0, MAPPED, False),
    (OLD, 0, 0, NONE, False), (OLD, 0, 0, MAPPED, False),
    (0, 0, 0, NONE, False), (0, 0, 0, MAPPED, False),
]  # fmt: skip


@pytest.mark.parametrize("offered, accepted, bypass, where, passes", TRUTH)
def test_bypass(offered, accepted, bypass, where, passes):
    """MODEL-VIOMMU-20 (R47, R51, R88): every row of the truth table: offered and accepted features, config.bypass, where the endpoint is;
    the endpoints beside it stay as they were (V167)."""
    base = bits(IommuFeature.MAP_UNMAP)
    device = device_of(features=base | offered, accepted=base | accepted, bypass=bypass if offered == BC else 0)
    for endpoint, other in ((1, 2), (2, 1)):
        beside = go(device, other, 0x5000)
        if where is not NONE:
            do(device, Attach(endpoint, endpoint, AttachFlag.BYPASS if where is PASSING else 0))
        if where is MAPPED:
            do(device, Map(endpoint, 0x1000, 0x1FFF, 0xA000, RW))
        for is_write in (False, True):
            if passes:
                assert [go(device, endpoint, at, is_write) for at in (0, 0x1234, TOP)] == [Verdict(0), Verdict(0x1234), Verdict(TOP)]
            elif where is MAPPED:
                assert (go(device, endpoint, 0x1234, is_write), go(device, endpoint, 0x2000, is_write)) == (Verdict(0xA234), REFUSED)
            else:
                assert go(device, endpoint, 0x1234, is_write) == BLOCKED
        assert go(device, other, 0x5000) == beside


def test_bypass_is_complete():
    """MODEL-VIOMMU-21: the truth table has each row that can be, once: a bypass domain needs BYPASS_CONFIG, config.bypass too."""
    rows = {(offered, accepted, bypass, where)
            for offered in (BC, OLD, 0) for accepted in {0, offered} for bypass in ((0, 1) if offered == BC else (0,))
            for where in (NONE, MAPPED, PASSING) if where is not PASSING or accepted == BC}  # fmt: skip
    assert rows == {row[:4] for row in TRUTH}
    assert len(rows) == len(TRUTH)


def test_bypass_domain():
    """MODEL-VIOMMU-22 (R47, R85): a bypass domain takes no mapping, passes every address as it is, and ends with its last endpoint."""
    device = do(device_of(bypass=0), Attach(1, 1, AttachFlag.BYPASS), Attach(1, 2, AttachFlag.BYPASS))
    assert allowed(device, Map(1, 0x1000, 0x1FFF, 0, RW)) == [INVAL]
    do(device, Detach(1, 1))
    assert (go(device, 1, 0x1000), go(device, 2, 0x1000)) == (BLOCKED, Verdict(0x1000))
    do(device, Detach(1, 2), Attach(1, 1))
    assert go(device, 1, 0x1000) == REFUSED


def test_regions():
    """MODEL-VIOMMU-23 (R45): in the window for interrupts an aligned write of four bytes goes where it says and nothing else goes anywhere;
    a reserved region takes nothing; for an endpoint without translation both are left open (V208)."""
    device = do(device_of(bypass=0), Attach(1, 3))
    for at in (0xFEE00000, 0xFEEFFFFC, 0xFEE12344):
        assert go(device, 3, at, True, 4) == Verdict(at)
        for is_write, address, length in ((False, at, 4), (True, at, 1), (True, at, 8), (True, at + 1, 4), (True, at + 2, 2)):
            assert go(device, 3, address, is_write, length) == REFUSED
        assert device.translate(2, at, True, 4) == {Verdict(at), BLOCKED}
        assert device.translate(2, at, False, 4) == {REFUSED, BLOCKED}
    for at, is_write in product((RESERVED.start, RESERVED.end - 3), (False, True)):
        assert go(device, 3, at, is_write, 4) == REFUSED
    do(device, Attach(2, 2, AttachFlag.BYPASS), Attach(2, 3, AttachFlag.BYPASS))
    assert device.translate(2, 0xFEE00000, True, 4) == {Verdict(0xFEE00000)}
    assert device.translate(2, 0xFEE00000, False, 4) == {Verdict(0xFEE00000), REFUSED}
    assert device.translate(3, RESERVED.start, True, 4) == {Verdict(RESERVED.start), REFUSED}
    assert device.translate(2, RESERVED.start, True, 4) == {Verdict(RESERVED.start)}
