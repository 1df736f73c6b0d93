"""Routing of a device's requests: windows, RAM, peers, and nobody."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.address_space import AddressSpace, Mmio, Ram, Window
from ringwall.models.host import Host
from ringwall.models.memory import AccessFault, GuestMemory
from ringwall.models.tlp import CplStatus, memory_read, memory_write

TOP = 1 << 64


class Registers:
    """MMIO that remembers what was done to it."""

    def __init__(self):
        self.calls = []

    def read(self, offset, length):
        self.calls.append((offset, length))
        return bytes((offset + n) & 0xFF for n in range(length))

    def write(self, offset, data):
        self.calls.append((offset, data))


def machine(windows, ram=None):
    """Two pieces of RAM, a BAR between them, a BAR at the top, and a timer that is not on the bus."""
    ram = GuestMemory() if ram is None else ram
    return AddressSpace([
        Ram(0x1_0000_0000, 0x1_0000_0000, ram, base=0x8000_0000), Ram(0, 0x8000_0000, ram), Mmio(0xE000_0000, 0x1000, Registers()),
        Mmio(TOP - 0x800, 0x800, Registers()), Mmio(0xF000_0000, 0x100, Registers(), is_pci=False),
    ], windows=windows)  # fmt: skip


LOW, HIGH = Window(0, 0x8000_0000), Window(0x1_0000_0000, 0x8000_0000)


@pytest.mark.parametrize("address, length, everything, low, both", [
    (0x0, 4, "ram", "ram", "ram"),
    (0x7FFF_FFFC, 4, "ram", "ram", "ram"),
    (0x7FFF_FFFC, 5, None, None, None),  # over the end of RAM
    (0x8000_0000, 1, None, None, None),
    (0xDFFF_FFFF, 2, None, None, None),
    (0xE000_0000, 0x1000, "bar", "bar", "bar"),
    (0xE000_0FFF, 2, None, None, None),
    (0xF000_0000, 4, None, None, None),  # not on the bus
    (0x1_0000_0000, 64, "ram", None, "ram"),  # RAM, but no window reaches it
    (0x1_7FFF_FFFF, 1, "ram", None, "ram"),
    (0x1_7FFF_FFFF, 2, "ram", None, None),  # half in a window
    (0x1_8000_0000, 1, "ram", None, None),
    (TOP - 1, 1, "bar", "bar", "bar"),
    (TOP - 1, 2, None, None, None),
    (0xE000_0010, 0, "bar", "bar", "bar"),
    (-1, 2, None, None, None),
])  # fmt: skip
def test_address_space_route(address, length, everything, low, both):
    """MODEL-AS-1: with windows smaller than 64 bits a miss goes to a peer or is Unsupported Request (R36, R37, R44)."""
    for windows, wanted in ((None, everything), ([LOW], low), ([LOW, HIGH], both)):
        section = machine(windows).route(address, length)
        assert {Ram: "ram", Mmio: "bar", type(None): None}[type(section)] == wanted


def test_address_space_window_over_a_bar():
    """MODEL-AS-2: a BAR inside an upstream window is not reached, nor is one that a window cuts (R37)."""
    for windows, wanted in (([Window(0, TOP)], False), ([Window(0xE000_0000, 16)], False), ([Window(0xE000_0010, 16)], True),
                            ([Window(0xDFFF_0000, 0x1_0000)], True), ([], True)):  # fmt: skip
        assert (machine(windows).route(0xE000_0000, 16) is not None) is wanted
    assert machine([Window(0xE000_0008, 16)]).route(0xE000_0000, 16) is None
    assert machine([Window(0xE000_0008, 16)]).route(0xE000_0000, 8) is not None


def test_address_space_access():
    """MODEL-AS-3: RAM is reached at its base, registers at their offset, nothing raises an access fault (R03, R37)."""
    ram = GuestMemory(log=True)
    space = machine([LOW, HIGH], ram)
    space.write(0x1_0000_0010, b"abcd", source="01:00.0")
    assert ram.read(0x8000_0010, 4) == b"abcd"
    assert ram.log[0].source == "01:00.0"
    assert space.read(0x1_0000_0010, 4, source="x") == b"abcd"
    assert ram.log[-1].source == "x"
    space.write(0xE000_0020, b"xy")
    assert space.read(TOP - 2, 2) == b"\xfe\xff"
    bars = [section.handler for section in space.sections if isinstance(section, Mmio)]
    assert [bar.calls for bar in bars] == [[(0x20, b"xy")], [], [(0x7FE, 2)]]
    for call in (lambda: space.read(0x1_8000_0000, 4), lambda: space.write(0xF000_0000, b"abcd")):
        with pytest.raises(AccessFault, match="unmapped"):
            call()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 12)), max_size=8),
       st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=3)),
       st.integers(0, 70), st.integers(1, 8))  # fmt: skip
def test_address_space_oracle(sections, windows, address, length):
    """MODEL-AS-4: any sections, unaligned ones too, and any windows, against a byte map (R37)."""
    space, owner = AddressSpace(windows=windows and [Window(*window) for window in windows]), {}
    if windows == []:
        space = AddressSpace(windows=[])
    for is_ram, start, size in sections:
        new = Ram(start, size, GuestMemory()) if is_ram else Mmio(start, size, Registers())
        if any(at in owner for at in range(start, start + size)):
            with pytest.raises(ValueError, match="must not overlap"):
                space.add(new)
        else:
            space.add(new)
            owner |= dict.fromkeys(range(start, start + size), new)
    assert [section.start for section in space.sections] == sorted(section.start for section in space.sections)
    wanted = {owner.get(at) for at in range(address, address + length)}
    wanted = wanted.pop() if len(wanted) == 1 else None
    if windows is not None and wanted is not None:
        inside = [all(start <= at < start + size for at in range(address, address + length)) for start, size in windows]
        touched = [any(start <= at < start + size for at in range(address, address + length)) for start, size in windows]
        if not (any(inside) if isinstance(wanted, Ram) else not any(touched)):
            wanted = None
    assert space.route(address, length) is wanted


def test_address_space_hotplug():
    """MODEL-AS-5: a section that goes is Unsupported Request at once, and may come back elsewhere."""
    space = machine([LOW, HIGH])
    bar = space.route(0xE000_0000, 4)
    space.remove(bar)
    assert space.route(0xE000_0000, 4) is None
    with pytest.raises(ValueError, match="must be one of the address space, not Mmio"):
        space.remove(bar)
    moved = Mmio(0xE100_0000, 0x1000, bar.handler)
    space.add(moved)
    assert space.route(0xE100_0FFC, 4) is moved
    for wrong in ((0, 0), (-1, 4), (TOP, 1), (TOP - 1, 2)):
        with pytest.raises(ValueError, match="within 64 bits and hold at least one byte, not"):
            Window(*wrong)


def test_address_space_behind_a_host():
    """MODEL-AS-6: a card behind such a bridge: data from RAM, data from a peer, UR outside, then good again (R03, R37)."""
    host = Host(machine([LOW]), rng=random.Random(1))
    host.assume_enabled(0)
    host.receive(memory_write(0x1000, b"abcd", requester_id=0x0100))
    for tag, (address, status, data) in enumerate([
        (0x1000, CplStatus.SC, b"abcd"), (0xE000_0040, CplStatus.SC, b"\x40\x41\x42\x43"), (0x1_0000_0000, CplStatus.UR, b""),
        (0xF000_0000, CplStatus.UR, b""), (0x1000, CplStatus.SC, b"abcd")]):  # fmt: skip
        [reply] = host.receive(memory_read(address, 4, requester_id=0x0100, tag=tag))
        assert (reply.tlp.status, reply.tlp.data) == (status, data)
    assert host.violations == []
    host.receive(memory_write(0x1_0000_0000, b"abcd", requester_id=0x0100))
    assert host.violations[0].startswith("write refused by memory (unmapped)")
