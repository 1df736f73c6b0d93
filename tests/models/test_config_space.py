"""Configuration space against a register table typed here once more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.config_space import (
    BarDescription,
    CapabilityDescription,
    ConfigSpace,
    FunctionDescription,
    msix_capability,
    pcie_capability,
    vendor_capability,
    virtio_capability,
)

ONES = 0xFFFF_FFFF

BLK = FunctionDescription(
    vendor=0x1AF4, device=0x1042, class_code=0x018000, revision=1, subsystem_vendor=0x1AF4, subsystem=0x0042, interrupt_pin=1,
    is_multi_function=True,
    bars={0: BarDescription(16384), 2: BarDescription(4096, prefetch=True), 4: BarDescription(256, is_64=False),
          5: BarDescription(32, is_64=False, is_io=True)},
    capabilities=(
        pcie_capability(mps_supported=512, flr=True, link_capabilities=0x0040_0083, link_status=0x1083),
        msix_capability(3, table_bar=2, table_offset=0, pba_bar=2, pba_offset=0x800),
        virtio_capability(1, bar=0, at=0x0000, length=0x40),
        virtio_capability(2, bar=0, at=0x3000, length=0x0E, notify_off_multiplier=4, offset=0xA0),
        virtio_capability(5),
    ),
    ext_capabilities=(CapabilityDescription(0x000D, bytes(4)), CapabilityDescription(0x000B, bytes(range(12)), offset=0x140)),
)  # fmt: skip

# The same function, dword by dword: offset -> (reset value, bits that take what is written, bits that a 1 clears). [PCIe5 7.5]
TABLE = {
    0x00: (0x1042_1AF4, 0, 0),
    0x04: (0x0010_0000, 0x0000_0547, 0xF900_0000),
    0x08: (0x0180_0001, 0, 0),
    0x0C: (0x0080_0000, 0x0000_00FF, 0),
    0x10: (0x0000_0004, 0xFFFF_C000, 0),
    0x14: (0x0000_0000, ONES, 0),
    0x18: (0x0000_000C, 0xFFFF_F000, 0),
    0x1C: (0x0000_0000, ONES, 0),
    0x20: (0x0000_0000, 0xFFFF_FF00, 0),
    0x24: (0x0000_0001, 0xFFFF_FFE0, 0),
    0x2C: (0x0042_1AF4, 0, 0),
    0x34: (0x0000_0040, 0, 0),
    0x3C: (0x0000_0100, 0x0000_00FF, 0),
    0x40: (0x0002_7C10, 0, 0),  # PCI Express at 0x40, 60 bytes
    0x44: (0x1000_8022, 0, 0),  # MPS 512, extended tags, role-based errors, FLR
    0x48: (0x0000_2810, 0x0000_79FF, 0x000F_0000),
    0x4C: (0x0040_0083, 0, 0),
    0x50: (0x1083_0000, 0x0000_00CB, 0),
    0x64: (0x0000_0010, 0, 0),
    0x68: (0x0000_0000, 0x0000_0010, 0),
    0x7C: (0x0002_8811, 0xC000_0000, 0),  # MSI-X
    0x80: (0x0000_0002, 0, 0),
    0x84: (0x0000_0802, 0, 0),
    0x88: (0x0110_A009, 0, 0),  # COMMON
    0x94: (0x0000_0040, 0, 0),
    0xA0: (0x0214_B409, 0, 0),  # NOTIFY
    0xA8: (0x0000_3000, 0, 0),
    0xAC: (0x0000_000E, 0, 0),
    0xB0: (0x0000_0004, 0, 0),
    0xB4: (0x0514_0009, 0, 0),  # PCI_CFG
    0xB8: (0x0000_0000, 0x0000_00FF, 0),
    0xBC: (0x0000_0000, ONES, 0),
    0xC0: (0x0000_0000, ONES, 0),
    0xC4: (0x0000_0000, ONES, 0),
    0x100: (0x1401_000D, 0, 0),  # ACS
    0x140: (0x0001_000B, 0, 0),
    0x144: (0x0302_0100, 0, 0),
    0x148: (0x0706_0504, 0, 0),
    0x14C: (0x0B0A_0908, 0, 0),
}
KEPT = {0x48: 0x0000_00E0, 0x50: 0x0000_00CB}  # what a function level reset leaves alone [PCIe5 6.6.2]
STATUS = 0xF910


class Reference:
    """The table, bit by bit."""

    def __init__(self):
        self.values = {at: TABLE[at][0] for at in TABLE}

    def write(self, register, enables, value):
        _, rw, rw1c = TABLE.get(register, (0, 0, 0))
        new = self.values.get(register, 0)
        for bit in range(32):
            if enables >> bit // 8 & 1:
                if rw >> bit & 1:
                    new = new & ~(1 << bit) | (value >> bit & 1) << bit
                elif rw1c >> bit & 1 and value >> bit & 1:
                    new &= ~(1 << bit)
        if register in self.values:
            self.values[register] = new
        if register == 0x48 and enables & 2 and value & 1 << 15:
            for at in self.values:
                kept = KEPT.get(at, 0)
                self.values[at] = TABLE[at][0] & ~kept | self.values[at] & kept

    def dwords(self):
        return [self.values.get(at, 0) for at in range(0, 4096, 4)]


def image(space):
    return [space.read_dword(at) for at in range(0, 4096, 4)]


def test_config_space_reset():
    """MODEL-CFG-1: after reset every dword of 4096 bytes is that of the table, reserved places 0, ROM BAR absent (R59)."""
    space = ConfigSpace(BLK)
    assert image(space) == Reference().dwords()
    assert space.offsets == [0x40, 0x7C, 0x88, 0xA0, 0xB4]
    assert space.ext_offsets == [0x100, 0x140]
    assert space.differences(Reference().dwords()) == []


writes = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(sorted(TABLE)), st.integers(0, 1023).map(lambda n: 4 * n)),
        st.integers(0, 15),
        st.one_of(st.sampled_from([0, ONES]), st.integers(0, ONES)),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(writes)
def test_config_space_writes(sequence):
    """MODEL-CFG-2: any writes with any byte enables change exactly the bits that the table lets them change (R57, R58, R60, R74)."""
    space, reference = ConfigSpace(BLK), Reference()
    space.set_bits(0x06, 2, STATUS)
    space.set_bits(0x4A, 2, 0x000F)
    reference.values[0x04] |= STATUS << 16
    reference.values[0x48] |= 0x000F_0000
    for register, enables, value in sequence:
        space.write_dword(register, enables, value)
        reference.write(register, enables, value)
        assert space.read_dword(register) == reference.values.get(register, 0)
    assert image(space) == reference.dwords()


@pytest.mark.parametrize("register", TABLE)
def test_config_space_enables(register):
    """MODEL-CFG-10: every register with every set of byte enables, from all bits set and from none (R60, R74)."""
    for enables in range(16):
        for before in (0, ONES):
            for value in (ONES, 0, 0x5555_5555, 0xAAAA_AAAA):
                space, reference = ConfigSpace(BLK), Reference()
                space.set_bits(register, 4, TABLE[register][2])
                reference.values[register] |= TABLE[register][2]
                for target in (space.write_dword, reference.write):
                    target(register, 15, before & ~(1 << 15) & ~TABLE[register][2])
                    target(register, enables, value)
                assert space.read_dword(register) == reference.values[register]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 63), st.integers(0, ONES))
def test_config_space_sizes(size, place, value):
    """MODEL-CFG-3: an access of 1, 2 or 4 bytes is the dword access with those bytes enabled (R74)."""
    offset, value = place * 4 // size * size, value & (1 << 8 * size) - 1
    one, other = ConfigSpace(BLK), ConfigSpace(BLK)
    one.write(offset, size, value)
    other.write_dword(offset & ~3, (1 << size) - 1 << offset % 4, value << 8 * (offset % 4))
    assert image(one) == image(other)
    assert one.read(offset, size) == one.read_dword(offset & ~3) >> 8 * (offset % 4) & (1 << 8 * size) - 1
    for bad in ((offset, 3), (4096, 1), (-1, 1), (offset // 4 * 4 + 1, 2), (2, 4)):
        with pytest.raises(ValueError, match="aligned bytes below 4096, not"):
            one.read(*bad)
        with pytest.raises(ValueError, match="aligned bytes below 4096, not"):
            one.write(*bad, 0)
    with pytest.raises(ValueError, match="must fit in 8 bits without a sign, not 256"):
        one.write(0x3C, 1, 256)


@pytest.mark.parametrize("bar, mask", [
    (BarDescription(128), 0xFFFF_FFFF_FFFF_FF84),
    (BarDescription(1 << 20, prefetch=True), 0xFFFF_FFFF_FFF0_000C),
    (BarDescription(1 << 40), 0xFFFF_FF00_0000_0004),
    (BarDescription(1 << 31, is_64=False), 0x8000_0000),
    (BarDescription(4096, is_64=False, prefetch=True), 0xFFFF_F008),
    (BarDescription(4, is_64=False, is_io=True), 0xFFFF_FFFD),
])  # fmt: skip
def test_config_space_bars(bar, mask):
    """MODEL-CFG-4: each type of BAR shows its size at the very next read, whatever was written before (R57, R58)."""
    space = ConfigSpace(FunctionDescription(1, 2, 3, bars={2: bar}))
    halves = [0x18, 0x1C] if bar.is_64 else [0x18]
    for value in (ONES, 0x5A5A_5A5A, 0, ONES):
        for n in range(len(halves)):
            space.write(halves[n], 4, value)
            wanted = value & mask >> 32 * n & ONES
            if n == 0:
                fixed = 1 if bar.is_io else (4 if bar.is_64 else 0) | (8 if bar.prefetch else 0)
                wanted = value & mask & ~0xF & ONES | fixed | (value & 0xC if bar.is_io else 0)
            assert space.read(halves[n], 4) == wanted
    assert space.read(0x10, 4) == space.read(0x24, 4) == space.read(0x30, 4) == 0
    space.write(0x10, 4, ONES)
    assert space.read(0x10, 4) == 0, "a BAR that is not there holds nothing"


def test_config_space_decode():
    """MODEL-CFG-5: an address belongs to a BAR only while memory space is on, and up to its last byte."""
    space = ConfigSpace(BLK)
    space.write(0x10, 4, 0x0000_4000)
    space.write(0x14, 4, 0x0000_0012)
    space.write(0x20, 4, 0xE000_0100)
    assert space.decode(0x12_0000_4000) is None
    space.write(0x04, 1, 2)
    assert (space.memory_enable, space.bus_master) == (True, False)
    assert space.decode(0x12_0000_4000) == (0, 0)
    assert space.decode(0x12_0000_7FFF) == (0, 0x3FFF)
    assert space.decode(0x12_0000_8000) is None
    assert space.decode(0xE000_01FF) == (4, 0xFF)
    assert space.decode(0xE000_0200) is None
    space.write(0x05, 1, 0xFF)
    assert space.bus_master is False
    space.write(0x04, 2, 4)
    assert (space.memory_enable, space.bus_master, space.decode(0x12_0000_4000)) == (False, True, None)


def test_config_space_function_level_reset():
    """MODEL-CFG-6: Initiate FLR resets at once, reads 0, leaves MPS and Link Control; without the capability it does nothing."""
    space = ConfigSpace(BLK)
    for at in TABLE:
        space.write(at, 4, ONES & ~(1 << 15 if at == 0x48 else 0))
    space.write(0x48, 2, 0x0040 | 1 << 15)
    assert space.resets == 1
    wanted = Reference().dwords()
    wanted[0x48 // 4] |= 0x0040
    wanted[0x50 // 4] |= 0x00CB
    assert space.differences(wanted) == []
    none = ConfigSpace(FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),)))
    none.write(0x3C, 1, 5)
    none.write(0x48, 2, ONES & 0xFFFF)
    assert (none.resets, none.read(0x3C, 1), none.read(0x48, 2)) == (0, 5, 0x79FF)


def test_config_space_window():
    """MODEL-CFG-7: PCI_CFG reaches the structures of the function and nothing else (V106, V107, V108, V109)."""
    bar, calls = bytearray(range(64)), []

    def window(index, offset, length, data):
        calls.append((index, offset, length, data))
        if data is None:
            return bytes(bar[offset : offset + length])
        bar[offset : offset + length] = data
        return None

    space = ConfigSpace(BLK, window=window)
    cap = space.offsets[4]

    def select(index, offset, length):
        space.write(cap + 4, 1, index)
        space.write(cap + 8, 4, offset)
        space.write(cap + 12, 4, length)

    for length in (1, 2, 4):
        select(0, 0x14, length)
        space.write(cap + 16, 4, 0xEEEE_EEEE)
        bar[0x14:0x18] = b"\x11\x22\x33\x44"
        wanted = int.from_bytes(b"\x11\x22\x33\x44"[:length] + b"\xee" * (4 - length), "little")
        assert space.read(cap + 16, 4) == wanted
        space.write(cap + 16, 4, 0xA4A3_A2A1)
        assert bar[0x14:0x18] == b"\xa1\xa2\xa3\xa4"[:length] + b"\x11\x22\x33\x44"[length:]
    assert [call[:3] for call in calls] == [(0, 0x14, n) for n in (1, 1, 1, 2, 2, 2, 4, 4, 4)]
    calls.clear()
    space.write_dword(cap + 16, 0, ONES)
    for choice in ((0, 0x14, 0), (0, 0x14, 3), (0, 0x14, 8), (0, 0x12, 4), (0, 0x13, 2), (0, 0x40, 4), (0, 0x3E, 4), (1, 0, 4), (2, 0, 4),
                   (7, 0, 4), (0, 0x300C, 4), (0, 0x300E, 1), (0, 0xFFFF_FFFC, 4), (0, 0x14, ONES)):  # fmt: skip
        select(*choice)
        space.write(cap + 16, 4, 0x1234_5678)
        assert space.read(cap + 16, 4) == 0x1234_5678
    assert calls == []
    select(0, 0x3C, 4)
    space.read(cap + 16, 4)
    select(0, 0x300C, 2)
    space.read(cap + 18, 1)
    assert calls == [(0, 0x3C, 4, None), (0, 0x300C, 2, None)]


def test_config_space_differences():
    """MODEL-CFG-8: a card that differs in one bit is told apart, with the register's name; what may differ is left out."""
    space, dwords = ConfigSpace(BLK), Reference().dwords()
    for at in range(0, 4096, 4):
        dwords[at // 4] ^= 1 << at // 4 % 32
        found = space.differences(dwords)
        assert len(found) == 1
        assert found[0].startswith(f"{at:#05x} (")
        assert space.differences(dwords, ignore={at: 1 << at // 4 % 32}) == []
        dwords[at // 4] ^= 1 << at // 4 % 32
    dwords[1] ^= 1
    dwords[0x7C // 4] ^= 1
    assert space.differences(dwords) == [
        "0x004 (Command, Status) is 0x00100001, must be 0x00100000",
        "0x07c (capability 0x11 at 0x7c) is 0x00028810, must be 0x00028811",
    ]
    assert space.differences(dwords[:1]) == []


@pytest.mark.parametrize("message, make", [
    ("power of two and at least 128, not 64", lambda: BarDescription(64)),
    ("power of two and at least 128, not 384", lambda: BarDescription(384)),
    ("power of two and at least 4, not 2", lambda: BarDescription(2, is_64=False, is_io=True)),
    ("leave one bit to write, not", lambda: BarDescription(1 << 32, is_64=False)),
    ("neither 64 bits nor prefetching", lambda: BarDescription(64, is_io=True)),
    ("MPS|Max_Payload_Size supported .* not 100", lambda: pcie_capability(mps_supported=100)),
    ("vectors must be between 1 and 2048, not 0", lambda: msix_capability(0, table_bar=0, table_offset=0, pba_bar=0, pba_offset=0)),
    ("PBA must lie in BAR 0 to 5 on 8 bytes", lambda: msix_capability(1, table_bar=0, table_offset=0, pba_bar=0, pba_offset=4)),
    ("table must lie in BAR 0 to 5 on 8 bytes", lambda: msix_capability(1, table_bar=6, table_offset=0, pba_bar=0, pba_offset=0)),
    ("BAR 1 must have registers of its own", lambda: space_of(bars={0: BarDescription(128), 1: BarDescription(128)})),
    ("BAR 5 must have registers of its own", lambda: space_of(bars={5: BarDescription(128)})),
    ("BAR 6 must have registers of its own", lambda: space_of(bars={6: BarDescription(128, is_64=False)})),
    ("must not overlap", lambda: space_of(capabilities=(pcie_capability(), vendor_capability(b"", offset=0x78)))),
    ("must lie on a dword between 0x40 and 0x100", lambda: space_of(capabilities=(vendor_capability(b"", offset=0x3C),))),
    ("must lie on a dword", lambda: space_of(capabilities=(vendor_capability(b"", offset=0x42),))),
    ("must lie on a dword", lambda: space_of(capabilities=(vendor_capability(bytes(200)),))),
    ("first extended capability must lie at 0x100", lambda: space_of(ext_capabilities=(CapabilityDescription(1, b"", offset=0x200),))),
])  # fmt: skip
def test_config_space_parameters(message, make):
    """MODEL-CFG-9: a description that cannot be is refused with a sentence (R69)."""
    with pytest.raises(ValueError, match=message):
        make()


def space_of(**fields):
    return ConfigSpace(FunctionDescription(1, 2, 3, **fields))
