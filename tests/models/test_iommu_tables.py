"""Builders of device directories and page tables, against entries written out by hand. [RVIOMMU1.0 3.1] [RVPRIV Sv39]"""

import random

import pytest

from ringwall.models.iommu.faults import AccessType, Cause
from ringwall.models.iommu.tables import (
    DC_DEFECTS,
    DDTE_DEFECTS,
    PTE_DEFECTS,
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_64K,
    Allocator,
    DeviceContext,
    DeviceDirectory,
    PageTable,
)
from ringwall.models.memory import GuestMemory


def pool(**options):
    memory = GuestMemory(**options)
    return memory, Allocator(memory, 0x8000_0000, 0x40_0000)


def dwords(memory, address, count=1):
    return [int.from_bytes(memory.read(address + 8 * n, 8), "little") for n in range(count)]


class Heard:
    """An observer that writes down what it hears."""

    def __init__(self):
        self.events = []

    def mapped(self, root, iova, spa, size, perms, *, is_global=False):
        self.events.append(("mapped", iova, spa, size, perms, is_global))

    def unmapped(self, root, iova):
        self.events.append(("unmapped", iova))

    def context_changed(self, device_id, context):
        self.events.append(("context", device_id, context))

    def pointer_replaced(self, root, iova, size):
        self.events.append(("pointer", iova, size))


def test_iommu_tables_page_entries():
    """MODEL-IOMMU-TABLE-1: pages of every size, entries compared with numbers worked out from the field positions."""
    memory, allocator = pool()
    table = PageTable(memory, allocator)
    assert table.root == 0x8000_0000
    # VPN[2]=1, VPN[1]=2, VPN[0]=3
    table.map_page(0x4040_3000, 0x12_3456_7000, perms="rwu")
    assert dwords(memory, 0x8000_0000 + 1 * 8) == [0x8000_1000 >> 12 << 10 | 0x01]
    assert dwords(memory, 0x8000_1000 + 2 * 8) == [0x8000_2000 >> 12 << 10 | 0x01]
    assert dwords(memory, 0x8000_2000 + 3 * 8) == [0x1234567 << 10 | 0xD7]  # D A - U - W R V
    # 64 KiB at VPN[0]=16..31: N, and PPN[3:0]=8 in each of 16 equal entries
    table.map_page(0x4041_0000, 0x5_0000, perms="rxu", size=SIZE_64K)
    assert dwords(memory, 0x8000_2000 + 15 * 8, 18) == [0] + [1 << 63 | 0x58 << 10 | 0xDB] * 16 + [0]
    # 2 MiB at VPN[1]=3, global, not dirty, PBMT=IO
    table.map_page(0x4060_0000, 0xA00_0000, perms="rwu", size=SIZE_2M, d=False, g=True, pbmt=2)
    assert dwords(memory, 0x8000_1000 + 3 * 8) == [2 << 61 | 0xA000 << 10 | 0x77]
    # 1 GiB at the top of the negative half: VPN[2]=511
    table.map_page(0xFFFF_FFFF_C000_0000, 0x80_4000_0000, perms="ru", size=SIZE_1G, a=False)
    assert dwords(memory, 0x8000_0000 + 511 * 8) == [0x804_0000 << 10 | 0x93]
    # protect changes the flags only; unmap leaves zero
    table.protect(0x4040_3ABC, "x", d=False)
    assert dwords(memory, 0x8000_2000 + 3 * 8) == [0x1234567 << 10 | 0x49]
    assert table.unmap(0x4041_FFFF).size == SIZE_64K
    assert dwords(memory, 0x8000_2000, 512) == [0] * 3 + [0x1234567 << 10 | 0x49] + [0] * 508


def test_iommu_tables_contexts():
    """MODEL-IOMMU-TABLE-2: device contexts and the entries above them, for directories of one, two and three levels."""
    context = DeviceContext.sv39(0x8765_4000, PSCID=0xABCDE, DTF=True)
    expected = [0x11, 0, 0xABCDE000, 8 << 60 | 0x87654]
    for levels, device_id, path in ((1, 0x7F, []), (2, 0xFFFF, [0x1FF]), (3, 0xC00182, [0xC0, 3])):
        memory, allocator = pool()
        directory = DeviceDirectory(memory, allocator, levels=levels)
        directory.set(device_id, context)
        assert directory.ddtp == 0x8000_0000 >> 12 << 10 | levels + 1
        at = 0x8000_0000
        for n, index in enumerate(path):
            below = 0x8000_1000 + n * 0x1000
            assert dwords(memory, at + index * 8) == [below >> 12 << 10 | 1]
            at = below
        assert dwords(memory, at + (device_id & 0x7F) * 32, 4) == expected
        assert directory.get(device_id) == context
        directory.clear(device_id)
        assert dwords(memory, at + (device_id & 0x7F) * 32, 4) == [0, 0, 0, 0]
    flags = ["V", "EN_ATS", "EN_PRI", "T2GPA", "DTF", "PDTV", "PRPR", "GADE", "SADE", "DPE", "SBE", "SXL"]
    for bit, name in enumerate(flags):
        assert DeviceContext(**{"V": False, name: True}).dwords()[0] == 1 << bit
    every_bit = DeviceContext(**dict.fromkeys(flags, True), iohgatp_mode=9, GSCID=0x8001,
                              iohgatp_ppn=(1 << 44) - 1, PSCID=1, fsc_mode=3, fsc_ppn=5)
    assert every_bit.dwords() == [0xFFF, 9 << 60 | 0x8001 << 44 | (1 << 44) - 1, 0x1000, 3 << 60 | 5]
    assert DeviceContext.unpack(every_bit.pack()) == every_bit


def test_iommu_tables_refusals():
    """MODEL-IOMMU-TABLE-3: what a builder must not write is refused with a sentence, and memory stays as it was."""
    memory, allocator = pool()
    table, directory = PageTable(memory, allocator), DeviceDirectory(memory, allocator, levels=1)
    table.map_page(0x20_0000, 0x1000)
    table.map_page(0x4000_0000, 0x4000_0000, size=SIZE_1G)
    before = memory.snapshot()
    for message, call in (
        ("Page size", lambda: table.map_page(0, 0, size=8192)),
        ("IOVA must be a multiple", lambda: table.map_page(0x1000, 0x10000, size=SIZE_64K)),
        ("IOVA must be a multiple", lambda: table.map_page(1 << 38, 0)),
        ("Physical address", lambda: table.map_page(0x20_0000, 0x1000, size=SIZE_2M)),
        ("Physical address", lambda: table.map_page(0x5000, 1 << 56)),
        ("not be mapped yet", lambda: table.map_page(0x20_0000, 0x1000)),
        ("not be mapped yet", lambda: table.map_page(0x20_0000, 0x1_0000, size=SIZE_64K)),
        ("No smaller page", lambda: table.map_page(0x20_0000, 0x20_0000, size=SIZE_2M)),
        ("superpage that is mapped", lambda: table.map_page(0x4020_0000, 0x1000)),
        ("Permissions", lambda: table.map_page(0x9000, 0, perms="wu")),
        ("Permissions", lambda: table.map_page(0x9000, 0, perms="u")),
        ("Permissions", lambda: table.map_page(0x9000, 0, perms="rz")),
        ("PBMT", lambda: table.map_page(0x9000, 0, pbmt=4)),
        ("IOVA must be mapped", lambda: table.unmap(0x9000)),
        ("IOVA must be mapped", lambda: table.protect(0x9000, "r")),
        ("Defect must be a name", lambda: table.corrupt(0x20_0000, "NO_SUCH")),
        ("needs a superpage", lambda: table.corrupt(0x20_0000, "SUPERPAGE_NAPOT")),
        ("needs a leaf", lambda: table.corrupt(0x4000_0000, "LEAF_V_CLEAR")),
        ("Level of a pointer", lambda: table.corrupt(0x4000_0000, "POINTER_A_SET")),
        ("Device id", lambda: directory.set(0x80, DeviceContext())),
        ("Levels", lambda: DeviceDirectory(memory, allocator, levels=4)),
        ("Level must be below", lambda: directory.corrupt(0, "DDTE_V_CLEAR")),
        ("Defect must be a name", lambda: directory.corrupt(0, "LEAF_V_CLEAR")),
        ("Root", lambda: DeviceContext.sv39(0x123, PSCID=0)),
        ("PSCID", lambda: DeviceContext(PSCID=1 << 20).pack()),
        ("device context must be", lambda: DeviceContext.unpack(bytes(31))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not [place for place in before.differences(memory) if place[0] < 0x8000_3000]


def test_iommu_tables_allocator():
    """MODEL-IOMMU-TABLE-4: pages are zeroed, aligned, never given twice, and every one comes back."""
    memory = GuestMemory()
    memory.write(0x10_0000, b"\xFF" * 0x8000)
    allocator = Allocator(memory, 0x10_1000, 0x7000, rng=random.Random(5))
    run = allocator.pages(3)
    assert run == 0x10_4000
    singles = {allocator.page() for _ in range(4)}
    assert singles == {0x10_1000, 0x10_2000, 0x10_3000, 0x10_7000}
    assert memory.read(0x10_1000, 0x7000) == bytes(0x7000)
    assert memory.read(0x10_0000, 0x1000) == b"\xFF" * 0x1000
    with pytest.raises(MemoryError):
        allocator.page()
    with pytest.raises(MemoryError):
        allocator.pages(2)
    allocator.free(run, 3)
    for page in singles:
        allocator.free(page)
    assert allocator.free_count == 7
    for wrong in (0x10_1000, 0x10_0000, 0x10_8000, 0x10_1800):
        with pytest.raises(ValueError, match="handed out"):
            allocator.free(wrong)
    for message, arguments in (("Start", (0x800, 0x1000)), ("Length", (0, 0)), ("Length", (0, 100))):
        with pytest.raises(ValueError, match=message):
            Allocator(memory, *arguments)
    with pytest.raises(ValueError, match="Count"):
        allocator.pages(0)
    orders = {tuple(Allocator(memory, 0x20_0000, 0x8000, rng=random.Random(seed)).page() for _ in range(1))
              for seed in range(20)}
    assert len(orders) > 1


def test_iommu_tables_defects_change_and_return():
    """MODEL-IOMMU-TABLE-5: each named defect changes exactly its entry, names do not repeat one another, undo restores."""
    memory, allocator = pool()
    table, directory = PageTable(memory, allocator), DeviceDirectory(memory, allocator, levels=3)
    table.map_page(0x4040_3000, 0x7000, perms="rwxu")
    table.map_page(0x60_0000, 0x20_0000, perms="rwxu", size=SIZE_2M)
    directory.set(0x1_2345, DeviceContext.sv39(table.root, PSCID=1))
    before = memory.snapshot()
    images = set()
    for name, defect in PTE_DEFECTS.items():
        iova = 0x60_0000 if defect.where == "superpage" else 0x4040_3000
        for level in (1, 2) if defect.where == "pointer" else (None,):
            undo = table.corrupt(iova, name, level=level)
            changed = before.differences(memory)
            assert changed, name
            assert len({at & ~7 for at, _ in changed}) == 1, name
            at = changed[0][0] & ~7
            images.add((at, memory.read(at, 8)))
            undo()
            assert not before.differences(memory), name
    assert len(images) == len(PTE_DEFECTS) + sum(one.where == "pointer" for one in PTE_DEFECTS.values())
    at, images = directory.entry_address(0x1_2345), set()
    for name in DC_DEFECTS:
        undo = directory.corrupt(0x1_2345, name)
        assert {place & ~31 for place, _ in before.differences(memory)} == {at}, name
        images.add(memory.read(at, 32))
        undo()
        assert not before.differences(memory), name
    assert len(images) == len(DC_DEFECTS)
    for level in (1, 2):
        for name in DDTE_DEFECTS:
            undo = directory.corrupt(0x1_2345, name, level=level)
            assert [place & ~7 for place, _ in before.differences(memory)] == [directory.root + 8 * 1
                                                                              if level == 2 else at_level_1(directory)]
            undo()
            assert not before.differences(memory), name


def at_level_1(directory):
    """Address of the level-1 entry of device 0x12345, from the root entry: DDI[2]=1, DDI[1]=0x46."""
    root_entry = int.from_bytes(directory.memory.read(directory.root + 8, 8), "little")
    return (root_entry >> 10 << 12) + 0x46 * 8


def test_iommu_tables_valid_last():
    """MODEL-IOMMU-TABLE-6: on a live IOMMU a context is valid only while it is whole, and V=0 stands between two."""
    memory, allocator = pool(log=True)
    directory = DeviceDirectory(memory, allocator, levels=1)
    at = directory.entry_address(3)
    old, new = DeviceContext.sv39(0x1000, PSCID=1), DeviceContext.sv39(0x2000, PSCID=2)
    legal = {old.pack(), new.pack()}
    image = bytearray(32)

    def watch(change):
        memory.log.clear()
        change()
        for access in memory.log:
            if access.is_write and at <= access.address < at + 32:
                assert len(access.data) == 8
                image[access.address - at:access.address - at + 8] = access.data
                assert not image[0] & 1 or bytes(image) in legal

    watch(lambda: directory.set(3, old))
    assert bytes(image) == old.pack()
    watch(lambda: directory.set(3, new))
    assert bytes(image) == new.pack()
    watch(lambda: directory.clear(3))
    assert bytes(image) == bytes(32)


def test_iommu_tables_retired_and_observed():
    """MODEL-IOMMU-TABLE-7: a superpage over emptied tables retires them; an observer hears what a device can use."""
    memory, allocator = pool()
    heard = Heard()
    table = PageTable(memory, allocator, observer=heard)
    directory = DeviceDirectory(memory, allocator, levels=1, observer=heard)
    table.map_page(0x20_0000, 0x3000, perms="rwu", d=False)
    table.map_page(0x20_1000, 0x4000, perms="rw")
    undo = table.corrupt(0x20_0000, "LEAF_X_CLEAR")
    undo()
    undo = table.corrupt(0x20_1000, "POINTER_A_SET")
    undo()
    table.protect(0x20_0000, "ru")
    table.unmap(0x20_0000)
    table.unmap(0x20_1000)
    level_0 = 0x8000_3000
    table.map_page(0, 0x4000_0000, size=SIZE_1G, g=True)
    assert table.retired == [0x8000_2000, level_0]
    assert heard.events == [
        ("mapped", 0x20_0000, 0x3000, SIZE_4K, "r", False), ("mapped", 0x20_1000, 0x4000, SIZE_4K, "", False),
        ("unmapped", 0x20_0000), ("mapped", 0x20_0000, 0x3000, SIZE_4K, "r", False),
        ("unmapped", 0x20_0000), ("mapped", 0x20_0000, 0x3000, SIZE_4K, "r", False),
        ("unmapped", 0x20_0000), ("unmapped", 0x20_1000),
        ("mapped", 0x20_0000, 0x3000, SIZE_4K, "r", False), ("mapped", 0x20_1000, 0x4000, SIZE_4K, "", False),
        ("unmapped", 0x20_0000), ("mapped", 0x20_0000, 0x3000, SIZE_4K, "r", False),
        ("unmapped", 0x20_0000), ("unmapped", 0x20_1000),
        ("pointer", 0, SIZE_1G), ("mapped", 0, 0x4000_0000, SIZE_1G, "rw", True),
    ]
    heard.events.clear()
    context = DeviceContext(PSCID=9)
    directory.set(5, context)
    undo = directory.corrupt(5, "TC_SADE_SET")
    undo()
    directory.clear(5)
    assert [event[2] for event in heard.events if event[1] == 5] == [
        context, Cause.DDT_ENTRY_NOT_VALID, Cause.DDT_ENTRY_MISCONFIGURED, Cause.DDT_ENTRY_NOT_VALID, context,
        Cause.DDT_ENTRY_NOT_VALID, Cause.DDT_ENTRY_NOT_VALID]
    assert PTE_DEFECTS["LEAF_D_CLEAR"].faults == {AccessType.WRITE}
