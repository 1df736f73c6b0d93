"""Every capability of an endpoint, dword by dword, against numbers typed here once more; resets, and rules between fields."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.config_space import (
    Access,
    BarDescription,
    CapabilityDescription,
    Change,
    ConfigEvent,
    ConfigSpace,
    FunctionDescription,
    MsiMessage,
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
    virtual_function,
    vsec_capability,
)

ONES = 0xFFFF_FFFF


def space_of(*capabilities, ext=(), **fields):
    return ConfigSpace(FunctionDescription(0x1234, 0x5678, 0x028000, capabilities=capabilities, ext_capabilities=tuple(ext), **fields))


# name: (description, is extended, {offset: (reset, rw, rw1c, kept by FLR alone, sticky)}); the header is the first dword
TABLES = {
    "pm": (power_capability(), False, {0: (0x0003_0001, 0, 0, 0, 0), 4: (0, 3, 0, 0, 0)}),
    "pm all": (power_capability(d1=True, d2=True, pme=0x1F, no_soft_reset=True), False,
               {0: (0xFE03_0001, 0, 0, 0, 0), 4: (8, 0x103, 0x8000, 0, 0x8100)}),
    "pm d3hot pme": (power_capability(pme=0x08), False, {0: (0x4003_0001, 0, 0, 0, 0), 4: (0, 0x103, 0x8000, 0, 0)}),
    "msi 10": (msi_capability(is_64=False, has_masks=False), False,
               {0: (0x0000_0005, 0x0071_0000, 0, 0, 0), 4: (0, 0xFFFF_FFFC, 0, 0, 0), 8: (0, 0xFFFF, 0, 0, 0), 12: (0, 0, 0, 0, 0)}),
    "msi 14": (msi_capability(4, has_masks=False), False,
               {0: (0x0084_0005, 0x0071_0000, 0, 0, 0), 4: (0, 0xFFFF_FFFC, 0, 0, 0), 8: (0, ONES, 0, 0, 0), 12: (0, 0xFFFF, 0, 0, 0),
                16: (0, 0, 0, 0, 0)}),
    "msi 20": (msi_capability(32, is_64=False), False,
               {0: (0x010A_0005, 0x0071_0000, 0, 0, 0), 4: (0, 0xFFFF_FFFC, 0, 0, 0), 8: (0, 0xFFFF, 0, 0, 0), 12: (0, ONES, 0, 0, 0),
                16: (0, 0, 0, 0, 0)}),
    "msi 24": (msi_capability(8), False,
               {0: (0x0186_0005, 0x0071_0000, 0, 0, 0), 4: (0, 0xFFFF_FFFC, 0, 0, 0), 8: (0, ONES, 0, 0, 0), 12: (0, 0xFFFF, 0, 0, 0),
                16: (0, 0xFF, 0, 0, 0), 20: (0, 0, 0, 0, 0)}),
    "pcie": (pcie_capability(mps_supported=128, ext_tag=False, timeout_ranges=1, atomic_requester=True, atomic_completer=3,
                             tag_10_completer=True, tag_10_requester=True, ido=True), False,
             {0: (0x0002_0010, 0, 0, 0, 0), 4: (0x0000_8000, 0, 0, 0, 0), 8: (0x2810, 0x78FF, 0x000F_0000, 0xE0, 0),
              16: (0, 0xCB, 0, 0xCB, 0), 0x24: (0x0003_0191, 0, 0, 0, 0), 0x28: (0, 0x135F, 0, 0, 0)}),
    "aer": (aer_capability(), True,
            {0: (0x0002_0001, 0, 0, 0, 0), 4: (0, 0, 0x0057_F010, 0, 0x0057_F010), 8: (0x0040_0000, 0x0057_F010, 0, 0, 0x0057_F010),
             12: (0x0046_2030, 0x0057_F010, 0, 0, 0x0057_F010), 16: (0, 0, 0x31C1, 0, 0x31C1), 20: (0x2000, 0x31C1, 0, 0, 0x31C1),
             24: (0, 0, 0, 0, 0x1F), 28: (0, 0, 0, 0, ONES), 40: (0, 0, 0, 0, ONES), 44: (0, 0, 0, 0, 0), 68: (0, 0, 0, 0, 0)}),
    "aer all": (aer_capability(uncorrectable=0x07FF_F030, correctable=0xF1C1), True,
                {8: (0x0440_0000, 0x07FF_F030, 0, 0, 0x07FF_F030), 20: (0xE000, 0xF1C1, 0, 0, 0xF1C1)}),
    "dsn": (serial_number_capability(0x0123_4567_89AB_CDEF), True,
            {0: (0x0001_0003, 0, 0, 0, 0), 4: (0x89AB_CDEF, 0, 0, 0, 0), 8: (0x0123_4567, 0, 0, 0, 0)}),
    "ats": (ats_capability(), True, {0: (0x0001_000F, 0, 0, 0, 0), 4: (0x0000_0020, 0x801F_0000, 0, 0, 0)}),
    "ats 32": (ats_capability(queue_depth=32, page_aligned=False), True, {4: (0, 0x801F_0000, 0, 0, 0)}),
    "ats all": (ats_capability(queue_depth=5, global_invalidate=True, relaxed=True), True, {4: (0x0000_00E5, 0x801F_0000, 0, 0, 0)}),
    "pri": (pri_capability(64, pasid_required=True), True,
            {0: (0x0001_0013, 0, 0, 0, 0), 4: (0x8100_0000, 1, 0x0003_0000, 0, 0), 8: (64, 0, 0, 0, 0), 12: (0, ONES, 0, 0, 0)}),
    "pasid": (pasid_capability(20), True, {0: (0x0001_001B, 0, 0, 0, 0), 4: (0x0000_1400, 0x0001_0000, 0, 0, 0)}),
    "pasid all": (pasid_capability(8, execute=True, privileged=True), True, {4: (0x0000_0806, 0x0007_0000, 0, 0, 0)}),
    "acs": (acs_capability(), True, {0: (0x0001_000D, 0, 0, 0, 0), 4: (0, 0, 0, 0, 0)}),
    "acs p2p": (acs_capability(0x4C), True, {4: (0x4C, 0x004C_0000, 0, 0, 0)}),
    "acs egress": (acs_capability(0x6C, egress_bits=40), True,
                   {4: (0x286C, 0x006C_0000, 0, 0, 0), 8: (0, ONES, 0, 0, 0), 12: (0, 0xFF, 0, 0, 0)}),
    "ari": (ari_capability(3), True, {0: (0x0001_000E, 0, 0, 0, 0), 4: (0x0300, 0, 0, 0, 0)}),
    "vsec": (vsec_capability(0x1234, 5, bytes(range(8)), rw=0xF0), True,
             {0: (0x0001_000B, 0, 0, 0, 0), 4: (0x0105_1234, 0, 0, 0, 0), 8: (0x0302_0100, 0xF0, 0, 0, 0), 12: (0x0706_0504, 0, 0, 0, 0)}),
    "dvsec": (dvsec_capability(0x1AF4, 0x77, 2, b"\x11\x22", rw=0xFF), True,
              {0: (0x0001_0023, 0, 0, 0, 0), 4: (0x00C2_1AF4, 0, 0, 0, 0), 8: (0x2211_0077, 0x00FF_0000, 0, 0, 0)}),
    "sriov": (sriov_capability(7, first_offset=4, stride=2, device=0x1001, bars={0: BarDescription(16384, prefetch=True),
                                                                              3: BarDescription(4096, is_64=False)}, dependency=1), True,
              {0: (0x0001_0010, 0, 0, 0, 0), 4: (0, 0, 0, 0, 0), 8: (0, 0x9, 0, 0, 0), 12: (0x0007_0007, 0, 0, 0, 0),
               0x14: (0x0002_0004, 0, 0, 0, 0), 0x18: (0x1001_0000, 0, 0, 0, 0), 0x1C: (0x553, 0, 0, 0, 0),
               0x24: (0xC, 0xFFFF_C000, 0, 0, 0), 0x28: (0, ONES, 0, 0, 0), 0x2C: (0, 0, 0, 0, 0), 0x30: (0, 0xFFFF_F000, 0, 0, 0),
               0x34: (0, 0, 0, 0, 0), 0x38: (0, 0, 0, 0, 0), 0x3C: (0, 0, 0, 0, 0)}),
}  # fmt: skip


RULED = {("pm", 4): 3, ("pri", 4): 1, ("sriov", 8): 1}  # (capability, offset) -> bits that have tests of their own


@pytest.mark.parametrize("name", TABLES)
def test_capabilities(name):
    """CFG-CAP-1: each dword of each capability: reset value, writable bits, bits that a 1 clears, what resets leave (R52, R62)."""
    description, is_extended, table = TABLES[name]
    for at, (reset, rw, rw1c, kept, sticky) in table.items():
        space = space_of(description) if not is_extended else space_of(ext=[description])
        place = (0x100 if is_extended else 0x40) + at
        assert space.read_dword(place) == reset
        quiet = ONES & ~RULED.get((name.split()[0], at), 0)
        value = ~reset & rw & quiet | reset & ~rw
        space.write_dword(place, 15, value)
        assert space.read_dword(place) == value, "writable bits"
        space.write_dword(place, 15, quiet)
        assert space.read_dword(place) & ~rw == reset & ~rw, "a written 1 sets nothing that is not writable"
        space.set_bits(place, 4, rw1c)
        space.write_dword(place, 0, ONES)
        assert space.read_dword(place) & rw1c == rw1c
        space.write_dword(place, 15, rw1c & 0x5555_5555)
        assert space.read_dword(place) & rw1c == rw1c & 0xAAAA_AAAA
        hwinit = ONES if (name, at) == ("sriov", 12) else 0
        for reset_of, remains in (("function_level_reset", kept | sticky | hwinit), ("hot_reset", sticky | hwinit), ("power_on", 0)):
            space.set_bits(place, 4, quiet)
            before = space.read_dword(place)
            getattr(space, reset_of)()
            assert space.read_dword(place) == reset & ~remains | before & remains, reset_of
        kinds = [kind for n in range(4) for kind in space.access(place + n)]
        for n in range(32):
            bits = tuple(mask >> n & 1 for mask in (rw, rw1c, sticky))
            assert kinds[n] is (Access.HWINIT if hwinit else {
                (0, 0, 0): Access.RO, (1, 0, 0): Access.RW, (0, 1, 0): Access.RW1C, (0, 0, 1): Access.ROS, (1, 0, 1): Access.RWS,
                (0, 1, 1): Access.RW1CS}[bits])  # fmt: skip


@pytest.mark.parametrize("message, make", [
    ("five bits, not 32", lambda: power_capability(pme=32)),
    ("power of two up to 32, not 3", lambda: msi_capability(3)),
    ("A, B, AB, BC, ABC, BCD or ABCD, not 4", lambda: pcie_capability(timeout_ranges=4)),
    ("three bits, not 8", lambda: pcie_capability(atomic_completer=8)),
    ("must also complete them", lambda: pcie_capability(tag_10_requester=True)),
    ("between 1 and 32, not 33", lambda: ats_capability(queue_depth=33)),
    ("must have 32 bits, not -1", lambda: pri_capability(-1)),
    ("between 0 and 20 bits, not 21", lambda: pasid_capability(21)),
    ("seven bits, not 128", lambda: acs_capability(128)),
    ("1 to 255 with egress control and 0 without, not 0", lambda: acs_capability(0x20)),
    ("1 to 255 with egress control and 0 without, not 256", lambda: acs_capability(0x20, egress_bits=256)),
    ("1 to 255 with egress control and 0 without, not 3", lambda: acs_capability(0x4C, egress_bits=3)),
    ("eight bits, not 256", lambda: ari_capability(256)),
    ("1 to 65535, not 0, 1, 1", lambda: sriov_capability(0, first_offset=1, stride=1, device=1)),
    ("4 KiB and none above 2 GiB, not 2", lambda: sriov_capability(1, first_offset=1, stride=1, device=1, page_sizes=2)),
    ("BAR 5 of virtual functions", lambda: sriov_capability(1, first_offset=1, stride=1, device=1, bars={5: BarDescription(4096)})),
    ("one kind of access, not 0x1", lambda: CapabilityDescription(9, bytes(2), rw=1, rw1c=1)),
    ("ROM must be a power of two between 2048 and 16777216, not 1024", lambda: space_of(rom_bytes=1024)),
    ("described by virtual_function", lambda: space_of(virtual=FunctionDescription(1, 2, 3))),
    ("and no other, must have a physical one, not None", lambda: ConfigSpace(virtual_function(FunctionDescription(1, 2, 3)))),
    ("share the physical function's, not have an extended capability 0x1b",
     lambda: virtual_function(FunctionDescription(1, 2, 3), ext_capabilities=(pasid_capability(8),))),
    ("one of those that software allocated, not 1", lambda: space_of(msi_capability(4)).interrupt(1)),
    ("between 1 and TotalVFs, not 0", lambda: space_of().virtual_routing_id(0x100, 0)),
])  # fmt: skip
def test_capabilities_parameters(message, make):
    """CFG-CAP-2: what cannot be described is refused with a sentence (R69)."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("no_soft_reset", [False, True])
@pytest.mark.parametrize("d1, d2", [(False, False), (True, False), (False, True), (True, True)])
def test_capabilities_power_state(d1, d2, no_soft_reset):
    """CFG-PM-1: any way between power states: unsupported ones change nothing, from D3hot only D0 and a reset (R61)."""
    offered = {0, 3} | ({1} if d1 else set()) | ({2} if d2 else set())
    for first in range(4):
        for then in range(4):
            space = space_of(power_capability(d1=d1, d2=d2, pme=0x1F, no_soft_reset=no_soft_reset), pcie_capability(flr=True))
            space.write(0x04, 2, 6)
            space.write(0x3C, 1, 9)
            space.write(0x44, 2, 0x100 | first)
            state = first if first in offered else 0
            assert space.power_state == state
            assert space.may_request is (state == 0)
            space.events.clear()
            space.write(0x44, 2, 0x100 | then)
            moves = then in offered and (then == 0 or then >= state)
            assert space.power_state == (then if moves else state)
            was_reset = state == 3 and then == 0 and not no_soft_reset
            assert (space.read(0x3C, 1), space.bus_master) == ((0, False) if was_reset else (9, True))
            assert space.read(0x44, 2) & 0x100, "PME_En is sticky"
            assert [event.change for event in space.events] == (
                [Change.POWER_STATE] * (moves and then != state) + [Change.RESET] * was_reset)  # fmt: skip
    assert space.resets == 0, "no function level reset"


@pytest.mark.parametrize("is_64", [False, True])
def test_capabilities_msi(is_64):
    """CFG-MSI-1: vector bits of the data as allocated; masked is pending, one message after unmask (R19, R62, R63)."""
    space = space_of(msi_capability(8, is_64=is_64), power_capability())
    mask, data = 0x40 + (16 if is_64 else 12), 0x40 + (12 if is_64 else 8)
    address = 0xFEE0_1004 | (0x12 << 32 if is_64 else 0)
    space.write(0x44, 4, 0xFEE0_1007)
    if is_64:
        space.write(0x48, 4, 0x12)
    space.write(data, 4, 0xABCD_4FFF)
    space.write(0x04, 2, 4)
    assert space.interrupt(0) is None, "MSI is off"
    for log2, count in ((0, 1), (1, 2), (2, 4), (3, 8), (4, 8), (7, 8)):  # more than it asked for is no more
        space.write(0x42, 2, log2 << 4 | 1)
        assert space.msi_vectors == count
        assert [space.interrupt(n) for n in range(count)] == [MsiMessage(address, 0x4FFF & -count | n) for n in range(count)]
    space.write(mask, 4, 0b0101)
    space.events.clear()
    assert (space.interrupt(0), space.interrupt(0), space.interrupt(2)) == (None, None, None)
    assert space.interrupt(1) == MsiMessage(address, 0x4FF9)
    assert space.read(mask + 4, 4) == 0b0101
    space.write(mask + 4, 4, ONES)
    assert space.read(mask + 4, 4) == 0b0101, "pending bits are read-only"
    assert space.events == []
    space.write(mask, 1, 0b0100)
    assert space.events == [ConfigEvent(Change.MSI, MsiMessage(address, 0x4FF8))]
    assert space.read(mask + 4, 4) == 0b0100
    space.events.clear()
    space.write(0x04, 2, 0)
    space.write(mask, 4, 0)
    assert (space.events, space.interrupt(3)) == ([], None)
    space.write(0x04, 2, 4)
    assert [event.detail.data for event in space.events] == [0x4FFA, 0x4FFB]
    space.write(mask, 4, 1)
    space.interrupt(0)
    space.function_level_reset()
    assert space.read(mask, 4) == space.read(mask + 4, 4) == space.read(0x42, 2) & 0x71 == 0
    bare = space_of(msi_capability(is_64=is_64, has_masks=False))
    bare.write(0x42, 2, 1)
    assert bare.interrupt(0) is None
    bare.write(0x04, 2, 4)
    assert bare.interrupt(0) == MsiMessage(0, 0)
    assert bare.events == []


def test_capabilities_timeout():
    """CFG-CTO-1: every value of the completion timeout field with every set of ranges; what is not offered is 50 us to 50 ms."""
    ranges = {1: ("A", 50, 100), 2: ("A", 1_000, 10_000), 5: ("B", 16_000, 55_000), 6: ("B", 65_000, 210_000), 9: ("C", 260_000, 900_000),
              10: ("C", 1_000_000, 3_500_000), 13: ("D", 4_000_000, 13_000_000), 14: ("D", 17_000_000, 64_000_000)}  # fmt: skip
    for offered, letters in ((0, ""), (1, "A"), (2, "B"), (3, "AB"), (6, "BC"), (7, "ABC"), (14, "BCD"), (15, "ABCD")):
        space = space_of(pcie_capability(timeout_ranges=offered))
        for value in range(16):
            space.write(0x68, 2, value)
            letter, *limits = ranges.get(value, ("-", 0, 0))
            assert space.completion_timeout_us == (tuple(limits) if letter in letters else (50, 50_000))
        space.write(0x68, 2, 0x10)
        assert space.completion_timeout_us is None
    rigid = space_of(pcie_capability(device_capabilities_2=0, device_control_2_rw=0))
    rigid.write(0x68, 2, 0x10)
    assert rigid.completion_timeout_us == (50, 50_000)


def test_capabilities_ats():
    """CFG-ATS-1: the unit is written before or with Enable, PASID only without; whoever disables ATS empties a cache (R39)."""
    space = space_of(pcie_capability(flr=True), ext=[ats_capability(), pasid_capability(20, execute=True), pri_capability(8)])
    ats, pasid, pri = space.ext_offsets
    space.write(pasid + 6, 2, 3)
    space.write(ats + 6, 2, 0x8003)
    assert (space.ats_enable, space.stu_bytes) == (True, 32768)
    space.write(ats + 6, 2, 0x8001)
    space.write(ats + 6, 1, 0x1F)
    space.write(pasid + 6, 2, 0)
    assert (space.read(ats + 6, 2), space.read(pasid + 6, 2)) == (0x8003, 3)
    assert space.events == []
    space.write(ats + 7, 1, 0)
    assert space.events == [ConfigEvent(Change.ATS_DISABLED)]
    space.write(ats + 6, 1, 1)
    space.write(pasid + 6, 2, 5)
    assert (space.read(ats + 6, 2), space.read(pasid + 6, 2)) == (1, 1), "privileged mode is not offered"
    space.events.clear()
    space.write(pri + 4, 2, 1)
    assert (space.read(pri + 6, 2), space.read(pri + 4, 2)) == (0, 1)
    space.write(pri + 4, 2, 3)
    space.write(pri + 4, 2, 2)
    assert (space.read(pri + 6, 2), space.read(pri + 4, 2)) == (0, 0)
    space.set_bits(pri + 6, 2, 0x101)
    space.write(pri + 6, 2, 0x101)
    assert space.read(pri + 6, 2) == 0x100
    assert [event.change for event in space.events] == [Change.PRI_ENABLED, Change.PRI_DISABLED, Change.PRI_RESET]
    space.write(ats + 6, 2, 0x8000)
    space.write(0x48, 2, 0x8000)
    assert (space.ats_enable, space.events[-1]) == (False, ConfigEvent(Change.RESET))


def card_with_virtual(total=8, **options):
    physical = FunctionDescription(0x1AF4, 0x1042, 0x018000, revision=3, subsystem_vendor=0x1AF4, subsystem=2, interrupt_pin=1,
                                   is_multi_function=True, bars={0: BarDescription(4096)}, rom_bytes=65536)  # fmt: skip
    pcie = pcie_capability(flr=True, link_capabilities=0x83, link_status=0x1083, timeout_ranges=3, ido=True)
    virtual = virtual_function(physical, capabilities=(pcie, msix_capability(3, table_bar=0, table_offset=0, pba_bar=0, pba_offset=2048)),
                               ext_capabilities=(aer_capability(), ats_capability(), acs_capability(), ari_capability()))  # fmt: skip
    bars = {0: BarDescription(4096), 2: BarDescription(16384, prefetch=True), 4: BarDescription(1 << 20, is_64=False)}
    sriov = sriov_capability(total, first_offset=0x80, stride=2, device=0x1042, bars=bars, **options)
    return ConfigSpace(FunctionDescription(**{**physical.__dict__, "capabilities": (pcie, power_capability()), "virtual": virtual,
                                              "ext_capabilities": (aer_capability(), ats_capability(), sriov)}))  # fmt: skip


def test_capabilities_virtual_functions():
    """CFG-SRIOV-1: virtual functions come and go with VF Enable; NumVFs and the page size only while it is 0; routing IDs wrap (R54)."""
    space = card_with_virtual(total=5)
    at = space.ext_offsets[2]
    for number, rid, wanted in ((1, 0x0100, 0x0180), (2, 0x0100, 0x0182), (5, 0x0101, 0x0189), (5, 0xFFF0, 0x0078), (1, 0xFF80, 0)):
        assert space.virtual_routing_id(rid, number) == wanted
    for number in (0, 6):
        with pytest.raises(ValueError, match="between 1 and TotalVFs"):
            space.virtual_routing_id(0x100, number)
    space.write(at + 0x10, 2, 3)
    assert (space.virtual_count, space.virtual_functions) == (0, [])
    space.write(at + 8, 2, 1)
    assert (space.virtual_count, len(space.virtual_functions), space.events) == (3, 3, [ConfigEvent(Change.VFS_ENABLED, 3)])
    first = space.virtual_functions[0]
    for register, value in ((at + 0x10, 5), (at + 0x20, 2)):
        space.write(register, 4, value)
    assert (space.read(at + 0x10, 2), space.read(at + 0x20, 4), space.virtual_functions[0] is first) == (3, 1, True)
    space.write(at + 8, 2, 9)
    assert space.virtual_functions[0] is first, "VF Enable did not change"
    space.write(at + 8, 2, 0)
    assert (space.virtual_functions, space.events[-1]) == ([], ConfigEvent(Change.VFS_DISABLED, 3))
    space.write(at + 0x10, 2, 0xFFFF)
    space.write(at + 8, 2, 1)
    assert space.virtual_count == len(space.virtual_functions) == 5, "more than TotalVFs is no more"
    assert space.virtual_functions[0] is not first
    space.write(0x48, 2, 0x8000)
    assert (space.virtual_count, space.virtual_functions, space.read(at + 0x10, 2), space.resets) == (0, [], 0, 1)


def test_capabilities_virtual_space():
    """CFG-SRIOV-2: what a virtual function shows and lets write: IDs FFFF, Bus Master alone, FLR of its own, settings of the PF (R54)."""
    space = card_with_virtual()
    at = space.ext_offsets[2]
    space.write(at + 0x10, 2, 2)
    space.write(at + 8, 2, 1)
    one, other = space.virtual_functions
    for n in range(0, 4096, 4):
        if n != 0x48:
            one.write(n, 4, ONES)
    one.write(0x48, 4, 0x7FFF_7FFF)
    assert [one.read_dword(n) for n in range(0, 0x40, 4)] == [
        ONES, 0x0010_0004, 0x0180_0003, 0, 0, 0, 0, 0, 0, 0, 0, 0x0002_1AF4, 0, 0x40, 0, 0]  # fmt: skip
    pcie = [one.read_dword(n) for n in range(0x40, 0x7C, 4)]
    assert pcie == [0x0002_7C10, 0x1000_8022, 0, 0x83, 0, 0, 0, 0, 0, 0x13, 0, 0, 0, 0, 0]
    assert one.read(0x7E, 2) == 0xC002
    aer, ats = one.ext_offsets[:2]
    assert [one.read_dword(aer + n) for n in (4, 8, 12, 16, 20, 24)] == [0] * 6, "masks and severities are the PF's"
    assert one.read_dword(ats + 4) == 0x8000_0020, "no unit, no queue of its own"
    space.write(space.ext_offsets[1] + 6, 2, 4)
    assert (one.stu_bytes, one.ats_enable, space.ats_enable) == (65536, True, False)
    space.write(0x68, 2, 5)
    assert one.completion_timeout_us == (16_000, 55_000)
    assert one.may_request and not other.may_request
    space.write(0x7C + 4, 2, 3)
    assert not one.may_request, "its physical function is in D3hot"
    one.write(0x48, 2, 0x8000)
    assert (one.resets, other.resets, space.resets, one.bus_master, space.virtual_count) == (1, 0, 0, False, 2)
    assert one.read(0x7E, 2) == 2


def test_capabilities_virtual_bars():
    """CFG-SRIOV-3: addresses of virtual functions' BARs, with system pages larger than a BAR, only with VF MSE (R54, R57)."""
    space = card_with_virtual()
    at = space.ext_offsets[2]
    space.write(at + 0x24, 4, ONES)
    assert space.read(at + 0x24, 4) == 0xFFFF_F004
    space.write(at + 0x20, 4, 0xFFFF_FFF0)
    assert space.read(at + 0x20, 4) == 0x550, "only sizes that are offered"
    assert space.read(at + 0x24, 4) == 0xFFFF_0004, "64 KiB"
    space.write(at + 0x24, 4, 0x8000_1000)
    space.write(at + 0x28, 4, 0x12)
    space.write(at + 0x2C, 4, 0x9123_4567)
    space.write(at + 0x34, 4, 0xE000_0000)
    assert (space.read(at + 0x24, 4), space.read(at + 0x2C, 4)) == (0x8000_0004, 0x9123_000C)
    space.write(at + 0x10, 2, 3)
    space.write(at + 8, 2, 1)
    assert space.virtual_decode(0x12_8000_0000) is None
    space.write(at + 8, 2, 9)
    for address, wanted in (
        (0x12_8000_0000, (1, 0, 0)), (0x12_8000_FFFF, (1, 0, 0xFFFF)), (0x12_8001_0000, (2, 0, 0)), (0x12_8002_0004, (3, 0, 4)),
        (0x12_8003_0000, None), (0x12_7FFF_FFFF, None), (0x9124_0010, (2, 2, 0x10)), (0xE02F_FFFF, (3, 4, 0xF_FFFF)), (0xE030_0000, None),
    ):  # fmt: skip
        assert space.virtual_decode(address) == wanted
    space.write(0x80, 2, 3)
    assert space.virtual_decode(0x12_8000_0000) is None, "D3hot"


def test_capabilities_rom():
    """CFG-ROM-1: the expansion ROM shows its size at once and decodes with both enables only (R59)."""
    space = card_with_virtual()
    for value in (ONES, 0x1234_5678, 0xFFFF_F7FE):
        space.write(0x30, 4, value)
        assert space.read(0x30, 4) == value & 0xFFFF_0001
    space.write(0x30, 4, 0xF800_0001)
    assert space.decode(0xF800_0000) is None
    space.write(0x04, 2, 2)
    assert [space.decode(0xF800_0000 + n) for n in (-1, 0, 0xFFFF, 0x1_0000)] == [None, (6, 0), (6, 0xFFFF), None]
    space.write(0x30, 1, 0)
    assert space.decode(0xF800_0000) is None
    space.write(0x30, 1, 1)
    space.write(0x80, 2, 3)
    assert space.decode(0xF800_0000) is None, "D3hot"
    space.function_level_reset()
    assert space.read(0x30, 4) == 0


FIXED = [sum(1 << 8 * k + bit for k in range(4) for bit, kind in enumerate(card_with_virtual().access(4 * n + k))
             if kind in (Access.RO, Access.ROS, Access.HWINIT)) for n in (*range(0x22), *range(0x40, 0x68))]  # fmt: skip


def image(space):
    return [space.read_dword(4 * n) for n in (*range(0x22), *range(0x40, 0x68))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(FIXED) - 1), st.integers(0, 15), st.sampled_from([0, ONES, 0x8001_0009])),
                max_size=40))
def test_capabilities_any_writes(sequence):
    """CFG-CAP-3: whatever is written, read-only bits keep their values and virtual functions agree with the registers (R52, R54)."""
    space = card_with_virtual()
    fresh = image(space)
    for place, enables, value in sequence:
        space.write_dword(4 * (place if place < 0x22 else place - 0x22 + 0x40), enables, value)
        assert len(space.virtual_functions) == space.virtual_count <= 8
    assert [is_now & fixed for is_now, fixed in zip(image(space), FIXED)] == [was & fixed for was, fixed in zip(fresh, FIXED)]
    space.power_on()
    assert image(space) == fresh
