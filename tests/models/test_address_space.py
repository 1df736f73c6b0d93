"""Routing of a device's requests: windows, RAM, peers, and nobody."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.address_space import (
    Acs,
    AddressSpace,
    MapError,
    MapListener,
    Mmio,
    Peer,
    PeerRouter,
    Platform,
    Ram,
    RamNotMapped,
    Route,
    Skip,
    Window,
)
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


A, B = Window(0xE000_0000, 0x1000), Window(0xE001_0000, 0x1000)
OUTSIDE = 0x1000


def functions(control=Acs.NONE, egress=0, is_port=False):
    """Two peers, the first of which has this control."""
    return PeerRouter([Peer((A,), range(0x100, 0x101), control, egress, is_port), Peer((B,), range(0x200, 0x208), is_port=is_port)])


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("redirect", [False, True])
@pytest.mark.parametrize("egress", [None, 0b00, 0b01, 0b10])
def test_peer_router_requests(egress, redirect, direct):
    """MODEL-P2P-1: request redirect, egress control and direct translated in every combination, by address type (R38, R39)."""
    control = ((Acs.NONE if egress is None else Acs.EGRESS_CONTROL) | (Acs.REQUEST_REDIRECT if redirect else Acs.NONE)
               | (Acs.DIRECT_TRANSLATED if direct else Acs.NONE))  # fmt: skip
    router = functions(control, egress or 0)
    if egress is None:
        untranslated = Route.UPSTREAM if redirect else Route.PEER
    elif egress & 0b10:  # the bit of the other peer
        untranslated = Route.UPSTREAM if redirect else Route.VIOLATION
    else:
        untranslated = Route.PEER
    assert router.request(0, 0xE001_0FF0, 16) is untranslated
    assert router.request(0, 0xE001_0000, 0) is untranslated, "a read of nothing goes the same way"
    assert router.request(0, 0xE001_0000, 4, at=2) is (Route.PEER if direct else untranslated)
    for address, length in ((OUTSIDE, 4), (0xE001_0FF0, 17), (0xE000_FFFF, 2)):
        for at in (0, 2):
            assert router.request(0, address, length, at=at) is Route.UPSTREAM
    assert router.request(0, 0xE001_0000, 8, at=1) is Route.UPSTREAM, "only the root complex translates"
    assert router.request(1, 0xE000_0000, 4) is Route.PEER, "the control of where it comes in decides"
    assert router.request(1, 0xE000_0000, 4, at=2, requester_id=0x100) is Route.PEER, "a forged ID"


def test_peer_router_ports():
    """MODEL-P2P-2: source validation, translation blocking and upstream forwarding are a downstream port's alone (R39)."""
    router = functions(Acs.SOURCE_VALIDATION, is_port=True)
    for requester_id, wanted in ((0x100, Route.PEER), (0x101, Route.VIOLATION), (0x200, Route.VIOLATION), (None, Route.PEER)):
        assert router.request(0, 0xE001_0000, 4, requester_id=requester_id) is wanted
    assert router.request(0, OUTSIDE, 4, requester_id=0x200) is Route.VIOLATION, "upstream too"
    assert router.request(1, OUTSIDE, 4, requester_id=0x100) is Route.UPSTREAM, "without source validation"
    router = functions(Acs.TRANSLATION_BLOCKING | Acs.DIRECT_TRANSLATED, is_port=True)
    assert [router.request(0, address, 4, at=at) for address in (0xE001_0000, OUTSIDE) for at in (0, 1, 2)] == [
        Route.PEER, Route.VIOLATION, Route.VIOLATION, Route.UPSTREAM, Route.VIOLATION, Route.VIOLATION]  # fmt: skip
    for control, wanted in ((Acs.NONE, Route.UNSUPPORTED), (Acs.UPSTREAM_FORWARDING, Route.UPSTREAM)):
        assert functions(control, is_port=True).request(0, 0xE000_0000, 4) is wanted
    for control in (Acs.SOURCE_VALIDATION, Acs.TRANSLATION_BLOCKING, Acs.UPSTREAM_FORWARDING):
        with pytest.raises(ValueError, match=f"Only a downstream port must have .*{control.name}.*, not a function"):
            functions(control | Acs.REQUEST_REDIRECT)


def test_peer_router_completions():
    """MODEL-P2P-3: completions among peers are redirected unless they are relaxed; those to the host go up (R39)."""
    for control, wanted in ((Acs.NONE, Route.PEER), (Acs.REQUEST_REDIRECT, Route.PEER), (Acs.COMPLETION_REDIRECT, Route.UPSTREAM)):
        router = functions(control)
        assert router.completion(0, 0x207) is wanted
        assert router.completion(0, 0x207, relaxed_ordering=True) is Route.PEER
        assert router.completion(0, 0x208) is router.completion(0, 0x0000) is Route.UPSTREAM
        assert router.completion(1, 0x100) is Route.PEER


class Iommu:
    """A container that keeps what is mapped, and refuses what it is told to."""

    def __init__(self, page_sizes=4096, refuse=()):
        self.page_sizes, self.refuse, self.maps = page_sizes, refuse, {}

    def map(self, iova, length, section, offset):
        if section.start in self.refuse:
            raise MapError("no room")
        assert length > 0 and not (iova | length) & (self.page_sizes & -self.page_sizes) - 1
        assert not any(iova < at + size and at < iova + length for at, (size, _, _) in self.maps.items())
        self.maps[iova] = length, section, offset

    def unmap(self, iova, length):
        if iova in self.refuse:
            raise MapError("busy")
        assert self.maps.pop(iova)[0] == length


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_map_listener_alignment(page):
    """MODEL-MAP-1: the smallest page decides: registers whole or not at all, RAM without its ragged ends (R29, R30, R32, R33, R35)."""
    memory, registers = GuestMemory(), Registers()
    iommu = Iommu(page | 1 << 30)
    listener = MapListener(iommu)
    whole, half, shifted = Mmio(0xE000_0000, page, registers), Mmio(0xE100_0000, page // 2, registers), Mmio(0xE200_0800, page, registers)
    ragged, small = Ram(0x800, 3 * page, memory, base=0x800), Ram(0x8000_0100, page, memory, base=0x100)
    crooked = Ram(0x9000_0000, page, memory, base=page // 2)
    space = AddressSpace([ragged, small, crooked, whole, half])
    space.listen(listener)
    space.add(shifted)
    assert {at: (size, offset) for at, (size, _, offset) in iommu.maps.items()} == {page: (2 * page, page - 0x800), 0xE000_0000: (page, 0)}
    assert listener.counts == {Skip.UNALIGNED: 3, Skip.SMALL: 1}
    assert listener.trimmed_bytes == page
    assert listener.reports[0] == f"RAM at 0x80000100+{page:#x}: no whole page of the IOMMU"
    for section in (half, whole, ragged, shifted, small, crooked):
        space.remove(section)
    assert (iommu.maps, listener.mapped) == ({}, {})
    assert sum(listener.counts.values()) == 4, "what was not mapped is not unmapped"
    with pytest.raises(ValueError, match="at least one bit, not 0"):
        MapListener(Iommu(0))


def test_map_listener_refusals():
    """MODEL-MAP-2: refused registers are an event, refused RAM is the end until a reset; reports are limited, drops counted (R31, R34)."""
    memory, registers = GuestMemory(), Registers()
    iommu = Iommu(refuse={0xE000_0000, 0x4000_0000})
    listener = MapListener(iommu, report_limit=3)
    space = AddressSpace([Ram(0, 0x10000, memory)])
    space.listen(listener)
    bar = Mmio(0xE000_0000, 0x1000, registers)
    for n in range(5):
        space.add(bar)
        space.remove(bar)
        assert (listener.counts[Skip.REFUSED], len(listener.reports), listener.dropped_reports) == (n + 1, min(n + 1, 3), max(0, n - 2))
    assert listener.reports[0] == "registers at 0xe0000000+0x1000: the IOMMU does not map it (no room)"
    for section, reason in ((Mmio(1 << 63, 0x1000, registers), Skip.HIGH), (Ram(3 << 62, 0x1000, memory), Skip.HIGH),
                            (Mmio(0xF000_0000, 0x1000, registers, is_pci=False), Skip.EMULATED),
                            (Mmio(0xF001_0000, 0x1000, registers, is_real=False), Skip.EMULATED)):  # fmt: skip
        before = listener.counts[reason]
        space.add(section)
        assert listener.counts[reason] == before + 1
    assert list(iommu.maps) == [0] and not listener.is_broken
    with pytest.raises(RamNotMapped, match="RAM at 0x40000000 is not mapped: no room"):
        space.add(Ram(0x4000_0000, 0x1000, memory))
    with pytest.raises(RamNotMapped, match="must be reset"):
        space.add(Ram(0x5000_0000, 0x1000, memory))
    listener.reset()
    assert (iommu.maps, listener.mapped) == ({}, {})
    space.add(Ram(0x6000_0000, 0x1000, memory))
    assert list(iommu.maps) == [0x6000_0000]
    iommu.refuse = {0x6000_0000}
    space.remove(space.route(0x6000_0000, 1))
    assert (listener.counts[Skip.NOT_UNMAPPED], listener.mapped) == (1, {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 20), st.integers(0, 3)), max_size=10),
       st.sampled_from([2, 4, 8]))
def test_map_listener_oracle(sections, page):
    """MODEL-MAP-3: any sections coming and going: each is mapped at its own place or counted, and all of it goes (R29, R35)."""
    iommu = Iommu(page)
    listener = MapListener(iommu)
    space = AddressSpace()
    space.listen(listener)
    added = 0
    for is_ram, start, size, base in sections:
        section = Ram(start, size, GuestMemory(), base) if is_ram else Mmio(start, size, Registers())
        if all(other.end <= start or section.end <= other.start for other in space.sections):
            space.add(section)
            added += 1
    assert len(iommu.maps) + sum(listener.counts.values()) == added
    pages = {at // page: section for at, (size, section, _) in iommu.maps.items() for at in range(at, at + size, page)}
    for n in range(80 // page):
        wanted = {section for section in space.sections if section.holds(n * page, page)}
        wanted = {section for section in wanted if (isinstance(section, Ram) and (section.start - section.base) % page == 0)
                  or (isinstance(section, Mmio) and section.start % page == section.length % page == 0)}  # fmt: skip
        assert {pages[n]} == wanted if n in pages else not wanted
    for at, (_, section, offset) in iommu.maps.items():
        assert section.start + offset == at
    for section in space.sections:
        space.remove(section)
    assert iommu.maps == {}


def test_platform_has_two_address_spaces():
    """MODEL-AS-7 (R42): processors and devices have a space each, with listeners of their own; what comes and goes is told in each."""
    platform, ram, timer = Platform(), GuestMemory(), Registers()
    told = {name: [] for name in ("cpu", "bus")}

    class Ear:
        def __init__(self, name):
            self.name = name

        def add(self, section):
            told[self.name].append(("add", section.start))

        def remove(self, section):
            told[self.name].append(("remove", section.start))

    platform.cpu.listen(Ear("cpu"))
    platform.bus.listen(Ear("bus"))
    memory, private = Ram(0, 0x10_0000, ram), Mmio(0xF000_0000, 0x100, timer, is_pci=False)
    platform.add(memory)
    platform.add(private, is_on_bus=False)
    assert told == {"cpu": [("add", 0), ("add", 0xF000_0000)], "bus": [("add", 0)]}
    platform.bus.write(0x1000, b"abcd")
    assert platform.cpu.read(0x1000, 4) == b"abcd"
    assert platform.bus.route(0xF000_0000, 4) is None
    with pytest.raises(ValueError, match="must not overlap"):
        platform.add(Ram(0x4000_0000, 0x1000, ram), bus_start=0x800)
    assert [section.start for section in platform.cpu.sections] == [0, 0xF000_0000], "half of a section stayed"
    platform.remove(memory)
    platform.remove(private)
    assert told == {"cpu": [("add", 0), ("add", 0xF000_0000), ("add", 0x4000_0000), ("remove", 0x4000_0000), ("remove", 0),
                            ("remove", 0xF000_0000)], "bus": [("add", 0), ("remove", 0)]}  # fmt: skip
    assert platform.cpu.sections == platform.bus.sections == ()


@pytest.mark.parametrize("bus_start", [None, 0x8000_0000, 0x20_0000_0000])
def test_platform_views_may_differ(bus_start):
    """MODEL-AS-8 (R43): registers and RAM lie for devices where the machine says, at the same address or another one, and only there."""
    platform, ram, registers = Platform(), GuestMemory(), Registers()
    platform.add(Mmio(0x1_0000_0000, 0x1000, registers), bus_start=bus_start)
    platform.add(Ram(0x2_0000_0000, 0x1000, ram, base=0x5000), bus_start=None if bus_start is None else bus_start + 0x1000)
    at = 0x1_0000_0000 if bus_start is None else bus_start
    assert platform.bus.read(at + 8, 4) == platform.cpu.read(0x1_0000_0008, 4) == bytes((8, 9, 10, 11))
    platform.bus.write((0x2_0000_0000 if bus_start is None else bus_start + 0x1000) + 4, b"wxyz")
    assert platform.cpu.read(0x2_0000_0004, 4) == ram.read(0x5004, 4) == b"wxyz"
    if bus_start is not None:
        for address in (0x1_0000_0008, 0x2_0000_0004):
            with pytest.raises(AccessFault):
                platform.bus.read(address, 4)


def test_two_windows_and_messages():
    """MODEL-AS-9 (R45): a low and a high window upstream and one for messages: RAM in two, interrupts in the third, nothing beside."""
    messages = Window(0x4000_0000, 0x1_0000)
    ram = GuestMemory()
    platform = Platform(windows=(Window(0, 0x8000_0000), Window(1 << 59, 1 << 40)), messages=messages)
    platform.add(Ram(0, 0x8000_0000, ram))
    platform.add(Ram(0x1_0000_0000, 0x1_0000_0000, ram, base=0x8000_0000), bus_start=1 << 59)
    platform.bus.write(0x3FFF_FFFC, b"low!")
    platform.bus.write((1 << 59) + 8, b"high")
    assert platform.cpu.read(0x3FFF_FFFC, 4) == b"low!" and platform.cpu.read(0x1_0000_0008, 4) == b"high"
    platform.bus.write(0x4000_0040, (0x1234).to_bytes(4, "little"))
    assert platform.bus.interrupts == [(0x4000_0040, 0x1234)]
    assert platform.cpu.read(0x4000_0040, 4) == bytes(4), "an interrupt was stored"
    for address, data in ((0x4000_0042, bytes(4)), (0x4000_0040, bytes(2)), (0x4000_0040, bytes(8)), (0x3FFF_FFFE, bytes(4)),
                          (0x4000_FFFE, bytes(4)), (0x8000_0000, bytes(4)), ((1 << 59) + (1 << 40), bytes(4))):  # fmt: skip
        with pytest.raises(AccessFault):
            platform.bus.write(address, data)
    with pytest.raises(AccessFault):
        platform.bus.read(0x4000_0040, 4)
    assert len(platform.bus.interrupts) == 1
    platform.bus.write(0x4001_0000, b"next")
    assert platform.cpu.read(0x4001_0000, 4) == b"next"
