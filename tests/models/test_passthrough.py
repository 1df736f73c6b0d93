"""The pass-through view, bit by bit, against the table of what Linux 6.12 virtualises, typed here once more (spec/pci.md, section 4)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.config_space import (
    BarDescription,
    CapabilityDescription,
    ConfigSpace,
    FunctionDescription,
    acs_capability,
    aer_capability,
    ari_capability,
    ats_capability,
    dvsec_capability,
    msi_capability,
    msix_capability,
    pasid_capability,
    pcie_capability,
    power_capability,
    pri_capability,
    serial_number_capability,
    sriov_capability,
    vendor_capability,
    vsec_capability,
)
from ringwall.models.passthrough import BeyondSpace, Effect, EffectKind, PassThrough

ONES = 0xFFFF_FFFF
VPD, PCIX, SLOT_ID, AF = 0x03, 0x07, 0x04, 0x13

BARS = {0: BarDescription(16384), 2: BarDescription(4096, is_64=False, prefetch=True), 3: BarDescription(1 << 20),
        5: BarDescription(32, is_64=False, is_io=True)}  # fmt: skip
CARD = FunctionDescription(
    0x1AF4, 0x1042, 0x018000, interrupt_pin=1, bars=BARS, rom_bytes=65536,
    capabilities=(
        power_capability(pme=0x1F),  # 0x40
        CapabilityDescription(SLOT_ID, bytes(2)),  # 0x48, hidden
        pcie_capability(flr=True),  # 0x4C
        msi_capability(8),  # 0x88
        msix_capability(4, table_bar=0, table_offset=0, pba_bar=0, pba_offset=0x800),  # 0xA0
        CapabilityDescription(VPD, bytes(6)),  # 0xAC
        CapabilityDescription(AF, b"\x06\x03\0\0"),  # 0xB4
        vendor_capability(bytes(13)),  # 0xBC
        CapabilityDescription(PCIX, b"\0\x10" + bytes(20)),  # 0xCC
    ),
    ext_capabilities=(
        aer_capability(), pasid_capability(20), ats_capability(), pri_capability(4), acs_capability(), ari_capability(),
        serial_number_capability(7), vsec_capability(1, 0, bytes(8)), dvsec_capability(1, 1, 0, bytes(2)),
        sriov_capability(4, first_offset=1, stride=1, device=1), CapabilityDescription(4, bytes(12)),
        CapabilityDescription(0x19, bytes(8))))  # fmt: skip
SIZES = {0: 16384, 2: 4096, 3: 1 << 20, 5: 32, 6: 65536}

# offset: (virtual, writable). Elsewhere in a capability: all of the device, nothing writable.
HEADER = {0x00: (ONES, 0), 0x04: (0x0010_0400, 0x0000_FFFF), 0x0C: (0, 0xFF00_FFFF), 0x34: (0xFF, 0), 0x3C: (0xFFFF, 0xFF)}
STANDARD = {
    0x40: (0xF800_FF00, 0), 0x44: (0x8100, 0xFFFF_7EFC),  # PM
    0x4C: (0xFF00, 0), 0x54: (0xF0E0, 0xFDFF), 0x74: (0, 0xFFDF),  # PCI Express
    0x88: (0x00FF_FF00, 0x00FF_0000), 0x8C: (ONES, ONES), 0x90: (ONES, ONES), 0x94: (0xFFFF, 0xFFFF), 0x98: (0, ONES), 0x9C: (0, ONES),
    0xA0: (0xFFFF, 0),  # MSI-X: its header only
    0xAC: (0xFFFF_FF00, 0xFFFF_0000), 0xB0: (ONES, ONES),  # VPD
    0xB4: (0xFF00, 0), 0xB8: (1, 0xFFFF_0001),  # AF, and two bytes that belong to nothing
    0xBC: (0xFFFF, ONES), 0xC0: (0, ONES), 0xC4: (0, ONES), 0xC8: (0, ONES),  # vendor, written raw
    0xCC: (0xFF00, 0xFFFF_0000), 0xD4: (0, ONES),  # PCI-X version 2
}  # fmt: skip
AER = {0x100: (ONES, 0), 0x104: (0, 0x03FF_F031), 0x108: (0, 0x03FF_F031), 0x10C: (0, 0x03FF_F031), 0x110: (0, 0xF1C1), 0x114: (0, 0xF1C1),
       0x118: (0, 0x140)}  # fmt: skip


class Plain:
    """A device whose every bit is writable, with a log."""

    def __init__(self, description=CARD):
        space = ConfigSpace(description)
        self.space, self.log = space, []
        self.bytes = bytearray(b"".join(space.read_dword(n).to_bytes(4, "little") for n in range(0, 4096, 4)))

    def read(self, offset, size):
        assert size in (1, 2, 4) and offset % size == 0 and offset + size <= 4096
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset, size, value):
        assert size in (1, 2, 4) and offset % size == 0 and offset + size <= 4096
        self.log.append((offset, size, value))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")

    def put(self, offset, data):
        self.bytes[offset : offset + len(data)] = data


def measure(view, device, at):
    """Return (bits that do not come from the device, bits that a write changes anywhere) of a dword."""
    device.put(at, bytes(4))
    low = view.read(at, 4)
    device.put(at, b"\xff" * 4)
    high = view.read(at, 4)
    writable = 0
    for value in (0, ONES, 0):
        before = view.read(at, 4), device.read(at, 4)
        view.write(at, 4, value)
        writable |= before[0] ^ view.read(at, 4) | before[1] ^ device.read(at, 4)
    return ~(low ^ high) & ONES, writable


def test_passthrough_header():
    """PASS-HEAD-1: virtual and writable bits of the header; BARs are all shadow (R55, R60)."""
    for at in (*range(0, 0x10, 4), *range(0x28, 0x30, 4), 0x34, 0x38, 0x3C):
        device = Plain()
        view = PassThrough(device, bars=SIZES)
        assert measure(view, device, at) == HEADER.get(at, (0, 0)), hex(at)
    device = Plain()
    view = PassThrough(device, bars=SIZES)
    for at in (*range(0x10, 0x28, 4), 0x30):
        assert measure(view, device, at)[0] == ONES
        assert [entry for entry in device.log if entry[0] == at] == []


def test_passthrough_standard():
    """PASS-CAP-1: virtual and writable bits of each standard capability (R61, R62, R63, R64, R65)."""
    for at in range(0x40, 0xE4, 4):
        if at == 0x48:
            continue
        device = Plain()
        view = PassThrough(device, bars=SIZES)
        view.msi_is_on = True
        virtual, writable = measure(view, device, at)
        wanted = STANDARD.get(at, (0, 0))
        trapped = {0x44: 3, 0x54: 0x8000, 0xB8: 1}.get(at, 0)  # a power state that the host sets, resets that read 0
        wanted = wanted[0], wanted[1] & ~trapped
        if at == 0x88:
            writable &= 0x00FF_FFFF  # the word is written back whole; no device has writable bits there
        if at in (0xAC, 0xB0):
            assert not any(entry[0] == at for entry in device.log), "VPD is never written directly"
        assert (virtual, writable) == wanted, hex(at)


def test_passthrough_extended():
    """PASS-CAP-2: extended capabilities are read-only but for AER, power budgeting and vendors' own; gaps are raw (R64, R68)."""
    places = ConfigSpace(CARD).ext_offsets
    _, pasid, ats, _, _, _, _, vsec, dvsec, _, budget, last = places
    for at in range(0x100, last + 0x10, 4):
        device = Plain()
        view = PassThrough(device, bars=SIZES)
        measured = measure(view, device, at)
        if at in AER:
            assert measured == AER[at], hex(at)
        elif pasid <= at < ats or at >= last or 0x12C <= at < 0x148:
            assert measured == (0, ONES), "hidden, or nothing known is there"
        elif vsec <= at < vsec + 16 or dvsec <= at < dvsec + 12:
            assert measured == ((ONES if at in places else 0), ONES)
        elif at == budget + 4:
            assert measured == (0, 0xFF)
        else:
            assert measured == ((ONES if at in places else 0), 0), hex(at)


def test_passthrough_chain():
    """PASS-WALK-1: what is hidden is not in the guest's list, and the rest is, in order (R66, R67)."""
    view = PassThrough(Plain(), bars=SIZES)
    assert view.hidden == [(False, SLOT_ID), (True, 0x1B), (True, 0x19)]
    assert view.conflicts == []
    at, found = view.read(0x34, 1), []
    while at:
        found.append(view.read(at, 1))
        at = view.read(at, 2) >> 8
    assert found == [0x01, 0x10, 0x05, 0x11, VPD, AF, 0x09, PCIX]
    at, found = 0x100, []
    while at:
        found.append(view.read(at, 2))
        at = view.read(at, 4) >> 20
    assert found == [0x01, 0x0F, 0x13, 0x0D, 0x0E, 0x03, 0x0B, 0x23, 0x10, 0x04]


def test_passthrough_nothing():
    """PASS-WALK-2: no list, only hidden capabilities, a hidden first extended one, no PCI Express capability, 256 bytes (R67, R70, R71)."""
    bare = PassThrough(Plain(FunctionDescription(1, 2, 3)))
    assert (bare.read(0x06, 2), bare.read(0x34, 1), bare.hidden) == (0, 0, [])
    hidden = FunctionDescription(1, 2, 3, capabilities=(CapabilityDescription(SLOT_ID, bytes(2)), CapabilityDescription(0x0D, bytes(6))))
    view = PassThrough(Plain(hidden))
    assert (view.read(0x06, 2) & 0x10, view.read(0x34, 1), len(view.hidden)) == (0, 0, 2)
    device = Plain()
    device.put(0x06, b"\0")
    view = PassThrough(device)
    view.write(0x44, 4, 3)
    assert (view.effects, device.log) == ([], [(0x44, 4, 3)]), "without the bit there is no capability, only bytes"
    first = FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),), ext_capabilities=(pasid_capability(8), ats_capability()))
    view = PassThrough(Plain(first))
    assert (view.read(0x100, 4), view.read(0x108, 4) & 0xFFFF) == (0x1080_0000 & 0xFFC0_0000, 0x0F)
    alone = FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),), ext_capabilities=(pasid_capability(8),))
    assert PassThrough(Plain(alone)).read(0x100, 4) == 0
    conventional = FunctionDescription(1, 2, 3, capabilities=(power_capability(),), ext_capabilities=(pasid_capability(8),))
    view = PassThrough(Plain(conventional))
    assert (view.read(0x100, 2), view.hidden) == (0x1B, []), "nobody looks without PCI Express"
    small = PassThrough(Plain(), size=256)
    assert all(not extended for extended, _ in small.hidden)
    for view, end in ((small, 256), (PassThrough(Plain()), 4096)):
        assert view.read(end - 4, 4) == 0
        for offset, size in ((end - 3, 4), (end, 1), (-1, 1), (end - 1, 2), (0, end + 1)):
            with pytest.raises(BeyondSpace):
                view.read(offset, size)
            with pytest.raises(BeyondSpace):
                view.write(offset, size, 0)
    for make, message in ((lambda: PassThrough(Plain(), size=512), "256 or 4096, not 512"),
                          (lambda: PassThrough(Plain(), msi_log2=6), "power of two between 0 and 5, not 6"),
                          (lambda: view.write(0, 1, 256), "must fit in 8 bits without a sign, not 256")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("links", [{0x34: 0x40, 0x41: 0x40}, {0x34: 0x44, 0x45: 0x48, 0x49: 0x44}, {0x34: 0xFF}, {0x34: 0x2C, 0x2C: 1}])
def test_passthrough_loops(links):
    """PASS-WALK-3: a list that loops, ends behind the space, points into the header: the walk ends, accesses work (R66, R69)."""
    device = Plain(FunctionDescription(1, 2, 3, bars={0: BarDescription(4096)}))
    device.put(0x06, b"\x10")
    device.put(0x40, bytes([0x01, 0, 0, 0] * 48))
    for at, value in links.items():
        device.put(at, bytes([value]))
    for size in (256, 4096):
        view = PassThrough(device, size=size)
        assert len(view.hidden) <= 48
        assert bool(view.conflicts) == (links[0x34] in (0x40, 0x44, 0x2C))
        assert len(view.conflicts) <= 48 * 8
        for at in range(0, size, 4):
            view.write(at, 4, view.read(at, 4))
    device = Plain(FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),), ext_capabilities=(ats_capability(), ats_capability())))
    device.put(0x10A, b"\x01\x10")  # the second one's next is the first
    view = PassThrough(device)
    assert len(view.conflicts) == (960 - 2) * 8


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=256, max_size=256), st.binary(min_size=64, max_size=64), st.integers(0, 4095), st.integers(0, 8))
def test_passthrough_hostile(standard, extended, offset, size):
    """PASS-WALK-4: any bytes for a configuration space: the view is made, every access ends, none is unaligned (R66, R75)."""
    device = Plain(FunctionDescription(1, 2, 3))
    device.put(0, standard)
    device.put(0x06, b"\x10\0")
    device.put(0x100, extended)
    view = PassThrough(device, bars={0: 4096, 4: 1 << 40, 6: 2048}, vpd=bytearray(64))
    assert all(0 <= at < 4096 for at in view.conflicts)
    for at in (*range(0, 0x180, 4), 0xFFC):
        view.write(at, 4, view.read(at, 4) ^ 0x8001_8003)
        view.write(at, 4, ONES)
    if offset + size <= 4096:
        value = view.read(offset, size)
        assert value == sum(view.read(offset + n, 1) << 8 * n for n in range(size))


def test_passthrough_pieces():
    """PASS-CUT-1: an access is cut at dwords and at capabilities, into aligned pieces of 4, 2 and 1 bytes, each one access (R74)."""
    device = Plain()
    view = PassThrough(device, bars=SIZES)
    log = device.log
    for offset, size, wanted in (
        (0xC0, 4, [(0xC0, 4)]), (0xC1, 3, [(0xC1, 1), (0xC2, 2)]), (0xC2, 4, [(0xC2, 2), (0xC4, 2)]), (0xC3, 2, [(0xC3, 1), (0xC4, 1)]),
        (0xC1, 8, [(0xC1, 1), (0xC2, 2), (0xC4, 4), (0xC8, 1)]), (0xC0, 0, []), (0xFF0, 8, [(0xFF0, 4), (0xFF4, 4)]),
    ):  # fmt: skip
        log.clear()
        view.write(offset, size, int.from_bytes(bytes(range(1, size + 1)), "little"))
        assert [entry[:2] for entry in log] == wanted
        assert view.read(offset, size) == int.from_bytes(bytes(range(1, size + 1)), "little")
    odd = FunctionDescription(1, 2, 3, capabilities=(CapabilityDescription(0x09, b"\x06\x11\x22\x33"),))  # six bytes, then a gap
    device = Plain(odd)
    view = PassThrough(device)
    device.log.clear()
    view.write(0x44, 4, 0x0403_0201)
    assert device.log == [(0x44, 2, 0x0201), (0x46, 2, 0x0403)]


def test_passthrough_bars():
    """PASS-BAR-1: the guest sizes BARs as they are, those without an address are none, and the real ones never change (R57, R58, R59)."""
    device = Plain()
    device.put(0x10, b"\x04\x40\0\0\x12\0\0\0")
    view = PassThrough(device, bars=SIZES | {5: 0})
    assert view.read(0x10, 4) == 0x4004
    for at in range(0x10, 0x34, 4):
        view.write(at, 4, ONES)
    assert [view.read(at, 4) for at in (*range(0x10, 0x28, 4), 0x30)] == [
        0xFFFF_C004, ONES, 0xFFFF_F008, 0xFFF0_0004, ONES, 0, 0xFFFF_0001]  # fmt: skip
    assert device.read(0x10, 4) == 0x4004
    assert PassThrough(Plain(), bars=SIZES).read(0x24, 4) == 1
    view.write(0x12, 1, 0x34)
    assert view.read(0x10, 4) == 0xFF34_C004
    assert all(PassThrough(Plain()).read(at, 4) == 0 for at in (*range(0x10, 0x28, 4), 0x30))


def test_passthrough_command():
    """PASS-CMD-1: INTx disable is the guest's own; enables are real, their shadow finds a reset that nobody announced (R55, R56, R72)."""
    device = Plain()
    device.put(0x10, b"\x04\x40\0\0\x12\0\0\0")
    view = PassThrough(device, bars=SIZES)
    view.write(0x04, 2, 0x0407)
    assert (device.read(0x04, 2), view.read(0x04, 2), view.effects) == (0x0007, 0x0407, [Effect(EffectKind.INTX_MASKED)])
    device.put(0x04, b"\x07\x04")
    view.write(0x04, 2, 0x0006)
    assert (device.read(0x04, 2), view.read(0x04, 2)) == (0x0406, 0x0006), "the host's bit stays"
    assert view.effects[1:] == [Effect(EffectKind.INTX_UNMASKED)]
    view.effects.clear()
    view.write(0x04, 1, 0x04)
    assert view.effects == [Effect(EffectKind.MAPPINGS_REVOKED)]
    view.write(0x04, 1, 0x06)
    view.effects.clear()
    for lost in ({0x04: b"\0\0"}, {0x14: b"\0"}):
        for at, data in lost.items():
            device.put(at, data)
        device.log.clear()
        view.write(0x04, 2, 0x0006)
        assert view.effects.pop() == Effect(EffectKind.BARS_RESTORED)
        assert device.log[:7] == [(0x10, 4, 0x4004), (0x14, 4, 0x12), (0x18, 4, 8), (0x1C, 4, 4), (0x20, 4, 0), (0x24, 4, 1), (0x30, 4, 0)]
        assert device.read(0x04, 2) & 0xFF == 6
    view.write(0x04, 2, 0x0006)
    assert view.effects == []


def test_passthrough_virtual_function():
    """PASS-VF-1: a virtual function shows real IDs, no pin, memory enabled though it has no such bit; its BARs are not restored (R54)."""
    device = Plain(FunctionDescription(0xFFFF, 0xFFFF, 3, interrupt_pin=1))
    view = PassThrough(device, ids=(0x1AF4, 0x1042), bars={})
    assert (view.read(0, 4), view.read(0x3D, 1), view.read(0x04, 2)) == (0x1042_1AF4, 0, 2)
    view.write(0x04, 2, 4)
    device.put(0x04, b"\x04\0")
    assert view.read(0x04, 2) == 4
    view.write(0x04, 2, 6)
    device.put(0x04, b"\x04\0")
    assert view.read(0x04, 2) == 6
    view.effects.clear()
    view.write(0x04, 2, 6)
    assert view.effects == []
    assert PassThrough(Plain(), has_intx=False).read(0x3D, 1) == 0
    assert PassThrough(Plain()).read(0x3D, 1) == 1


def test_passthrough_power():
    """PASS-PM-1: the guest asks for a power state and the host sets it; D3hot takes mappings away; no PME (R61)."""
    space = ConfigSpace(CARD)
    view = PassThrough(space, carry_out=lambda effect: (
        space.write(0x44, 2, space.read(0x44, 2) & ~3 | effect.detail) if effect.kind is EffectKind.POWER_STATE else None))  # fmt: skip
    assert view.read(0x42, 2) == 0x0003
    view.write(0x44, 2, 0x8103)
    assert (view.read(0x44, 2), space.power_state, space.read(0x44, 2)) == (3, 3, 3)
    assert view.effects == [Effect(EffectKind.MAPPINGS_REVOKED), Effect(EffectKind.POWER_STATE, 3)]
    view.write(0x45, 1, 0x80)
    assert len(view.effects) == 2
    view.write(0x44, 1, 0)
    assert (view.effects[2:], space.power_state) == ([Effect(EffectKind.POWER_STATE, 0)], 0)


def test_passthrough_express():
    """PASS-EXP-1: FLR becomes the host's reset and reads 0, MPS is the guest's own, MRRS goes through, not below the real MPS (R65)."""
    space = ConfigSpace(CARD)
    space.write(0x54, 2, 0x2840)
    view = PassThrough(space)
    view.write(0x54, 2, 0xA8BF)
    assert view.effects == [Effect(EffectKind.MAPPINGS_REVOKED), Effect(EffectKind.RESET)]
    assert (view.read(0x54, 2), space.read(0x54, 2), space.resets) == (0x28BF, 0x285F & ~0xE0 | 0x5F, 0)
    view.effects.clear()
    for value, wanted in ((0x08BF, 512), (0x18BF, 512), (0x28BF, 512), (0x58BF, 4096)):
        view.write(0x54, 2, value)
        assert view.effects == [Effect(EffectKind.READ_REQUEST, wanted)]
        assert view.read(0x54, 2) == value
        view.effects.clear()
        view.write(0x54, 2, value)
        assert view.effects == []
    assert space.read(0x54, 2) & 0x70E0 == 0x2040
    no_flr = PassThrough(ConfigSpace(FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),))))
    no_flr.write(0x48, 2, 0xA810)
    assert (no_flr.effects, no_flr.read(0x48, 2) >> 15) == ([], 0)


def test_passthrough_features():
    """PASS-AF-1: the older function level reset, with both of its capability bits only."""
    for bits, wanted in ((3, 2), (1, 0), (2, 0), (0, 0)):
        device = Plain()
        device.put(0xB7, bytes([bits]))
        view = PassThrough(device)
        view.write(0xB8, 1, 0xFF)
        assert (len(view.effects), view.read(0xB8, 1)) == (wanted, 0)


def test_passthrough_msi():
    """PASS-MSI-1: enable stays 0 until the host enables, vectors are clamped, address and data are the guest's own (R62, R63)."""
    for is_on, most, value, wanted in ((False, 5, 0x31, 0x30), (True, 5, 0x31, 0x31), (True, 1, 0x31, 0x11), (True, 3, 0x31, 0x31)):
        device = Plain()
        view = PassThrough(device, msi_log2=most)
        view.msi_is_on = is_on
        view.write(0x8A, 1, 0x86 | value)
        assert view.read(0x8A, 1) == 0x86 | wanted
        assert device.read(0x8A, 2) == 0x0186 | wanted
        view.write(0x8C, 4, 0xFEE0_0000)
        view.write(0x94, 4, 0x1234_4321)
        assert (view.read(0x8C, 4), view.read(0x94, 4)) == (0xFEE0_0000, 0x4321)
        assert (device.read(0x8C, 4), device.read(0x94, 4)) == (0, 0)
        view.write(0x98, 4, 5)
        device.put(0x9C, b"\x05")
        assert (device.read(0x98, 4), view.read(0x9C, 4)) == (5, 5)


def test_passthrough_vpd():
    """PASS-VPD-1: the flag toggles when the data are there; without data, or behind their end, it never does (R61)."""
    data = bytearray(range(64))
    view = PassThrough(Plain(), vpd=data)
    view.write(0xAE, 2, 0x0008)
    assert (view.read(0xAE, 2), view.read(0xB0, 4)) == (0x8008, 0x0B0A_0908)
    view.write(0xB0, 4, 0x4433_2211)
    view.write(0xAE, 1, 0x0C)
    assert view.read(0xAE, 2) == 0x800C, "only the upper byte starts it"
    view.write(0xAF, 1, 0x80)
    assert (view.read(0xAE, 2), data[12:16]) == (0x000C, b"\x11\x22\x33\x44")
    view.write(0xAE, 2, 0x8040)
    assert (view.read(0xAE, 2), len(data)) == (0x8040, 64)
    assert view.effects == [Effect(EffectKind.VPD_READ, 8), Effect(EffectKind.VPD_WRITTEN, 12)]
    none = PassThrough(Plain())
    none.write(0xAE, 2, 0x0008)
    assert none.read(0xAE, 2) == 8


def test_state_is_built_at_open():
    """PASS-OPEN-1 (R73): a view is complete when it is made, and made anew each time: neither what an earlier one did nor the device's
    later writes to its identity change what it shows."""
    first, second = (PassThrough(ConfigSpace(CARD), bars=SIZES) for _ in range(2))
    fresh = [second.read(offset, 4) for offset in range(0, 4096, 4)]
    for offset in range(0, 4096, 4):
        first.write(offset, 4, ONES)
    assert [second.read(offset, 4) for offset in range(0, 4096, 4)] == fresh
    third = PassThrough(ConfigSpace(CARD), bars=SIZES)
    assert [third.read(offset, 4) for offset in range(0, 4096, 4)] == fresh
    assert (third.hidden, third.conflicts) == (second.hidden, second.conflicts)
    calls = []

    class Counted(ConfigSpace):
        def read(self, offset, size):
            calls.append(offset)
            return super().read(offset, size)

    view = PassThrough(Counted(CARD), bars=SIZES)
    calls.clear()
    for offset in range(0x34, 0x40, 4):
        view.read(offset, 4)
    assert not [offset for offset in calls if offset >= 0x40], "the capabilities were walked again"
