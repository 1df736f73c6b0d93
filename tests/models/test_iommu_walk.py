"""The translation procedure, against tables written out by hand and against flat lists kept here. [RVIOMMU1.0 3.3]"""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.iommu.faults import (
    AccessType,
    Cause,
    FaultQueue,
    FaultRecord,
    TransactionType,
    TranslationFault,
    broken_record_rules,
    is_logged,
)
from ringwall.models.iommu.registers import Capabilities, RegisterFile
from ringwall.models.iommu.tables import (
    DC_DEFECTS,
    DDTE_DEFECTS,
    PTE_DEFECTS,
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_64K,
    SIZES,
    Allocator,
    DeviceContext,
    DeviceDirectory,
    PageTable,
)
from ringwall.models.iommu.walk import Iommu, PlainRegisters, Request, Translation
from ringwall.models.memory import GuestMemory

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
PAGE_FAULT = {EXEC: 12, READ: 13, WRITE: 15}  # [RVIOMMU1.0 4.2]
ACCESS_FAULT = {EXEC: 1, READ: 5, WRITE: 7}
POOL = 0x8000_0000


def card(*, levels=1, capabilities=Capabilities(), rng=None):
    """A memory of 64 MiB at POOL, an empty directory in it, and an IOMMU that uses it."""
    memory = GuestMemory(all_ram=False)
    memory.add_range(POOL, 0x400_0000)
    allocator = Allocator(memory, POOL, 0x400_0000, rng=rng)
    directory = DeviceDirectory(memory, allocator, levels=levels)
    iommu = Iommu(memory, capabilities, registers=PlainRegisters(ddtp=directory.ddtp))
    return memory, allocator, directory, iommu


def fault_of(iommu, device_id, iova, access=READ, **options):
    """Translate what must fault; return the fault, whose iotval is the IOVA and iotval2 is 0."""
    with pytest.raises(TranslationFault) as caught:
        iommu.translate(Request(device_id, iova, access, **options))
    assert (caught.value.iotval, caught.value.iotval2) == (iova, 0)
    return caught.value


def test_iommu_walk_worked_example():
    """MODEL-IOMMU-WALK-1: a directory of two levels and an Sv39 table, every byte written here by number."""
    memory = GuestMemory()

    def put(address, *dwords):
        memory.write(address, b"".join(dword.to_bytes(8, "little") for dword in dwords))

    put(0x1000 + 0x24 * 8, 0x2 << 10 | 1)  # device 0x1234: DDI[1]=0x24 -> table at 0x2000
    put(0x2000 + 0x34 * 32, 1, 0, 0x77 << 12, 8 << 60 | 0x3)  # DDI[0]=0x34: Sv39, PSCID 0x77, root 0x3000
    # IOVA 0x12_3456_789A: VPN[2]=0x48, VPN[1]=0x1A2, VPN[0]=0x167
    put(0x3000 + 0x48 * 8, 0x4 << 10 | 0x01)
    put(0x4000 + 0x1A2 * 8, 0x5 << 10 | 0x01)
    put(0x5000 + 0x167 * 8, 0xABC_DEF0_1234 << 10 | 0xD7)
    put(0x5000 + 0x170 * 8, *[1 << 63 | 0x765_4328 << 10 | 0xF3] * 16)  # 64 KiB, read-only, global
    put(0x4000 + 0x1A3 * 8, 0x400 << 10 | 0xDF)  # 2 MiB, read write execute
    iommu = Iommu(memory, registers=PlainRegisters(ddtp=0x1 << 10 | 3))
    assert iommu.translate(Request(0x1234, 0x12_3456_789A, WRITE)) == Translation(
        0xAB_CDEF_0123_489A, SIZE_4K, True, True, False, 0, False)
    assert iommu.last_read_count == 5
    assert iommu.translate(Request(0x1234, 0x12_3457_BCDE, READ)) == Translation(
        0x76_5432_BCDE, SIZE_64K, True, False, False, 0, True)
    assert iommu.translate(Request(0x1234, 0x12_3460_0001, EXEC)) == Translation(
        0x40_0001, SIZE_2M, True, True, True, 0, False)
    assert iommu.last_read_count == 4
    assert fault_of(iommu, 0x1234, 0x12_3457_BCDE, WRITE).cause == 15


REGIONS = (0, 0x3F_0000_0000, 0xFFFF_FFC0_0000_0000, 0xFFFF_FFFF_0000_0000)  # ends of both halves of Sv39
PAGES = st.tuples(
    st.sampled_from(SIZES), st.sampled_from(REGIONS), st.integers(0, 40), st.integers(0, (1 << 44) - 1),
    st.sampled_from(["ru", "rwu", "rxu", "rwxu", "xu", "r", "rw"]), st.booleans(), st.booleans())


@settings(max_examples=80, deadline=None)
@given(pages=st.lists(PAGES, min_size=1, max_size=14), seed=st.integers(0, 1 << 30), levels=st.integers(1, 3))
def test_iommu_walk_random_tables(pages, seed, levels):
    """MODEL-IOMMU-WALK-2 (R02, R41): random tables of all page sizes agree with a flat list of pages kept here."""
    rng = random.Random(seed)
    _, allocator, directory, iommu = card(levels=levels, rng=rng)
    table = PageTable(iommu.memory, allocator)
    device = rng.randrange(1 << (7, 16, 24)[levels - 1])
    directory.set(device, DeviceContext.sv39(table.root, PSCID=rng.randrange(1 << 20)))
    flat = []  # (first IOVA, first SPA, size, perms, a, d)
    for size, region, slot, page, perms, a, d in pages:
        iova, spa = region + slot % (4 if size == SIZE_1G else 41) * size, (page << 12) // size * size
        if all(iova + size <= other[0] or other[0] + other[2] <= iova for other in flat):
            table.map_page(iova, spa, perms=perms, size=size, a=a, d=d)
            flat.append((iova, spa, size, perms, a, d))
    probes = [first + at for first, _, size, *_ in flat for at in (0, rng.randrange(size), size - 1)]
    probes += [first + at & (1 << 64) - 1 for first, _, size, *_ in flat for at in (-1, size)]
    for iova in probes:
        hit = [page for page in flat if page[0] <= iova < page[0] + page[2]]
        first, spa, size, perms, a, d = hit[0] if hit else (0, 0, 0, "", False, False)
        for access in AccessType:
            if a and "u" in perms and {READ: "r", WRITE: "w", EXEC: "x"}[access] in perms and (d or access != WRITE):
                found = iommu.translate(Request(device, iova, access))
                assert (found.spa, found.size) == (spa + iova - first, size)
                assert (found.readable, found.writable, found.executable) == (
                    "r" in perms, "w" in perms and d, "x" in perms)
            else:
                assert fault_of(iommu, device, iova, access).cause == PAGE_FAULT[access]
    first, _, size, *_ = rng.choice(flat)
    assert table.unmap(first + rng.randrange(size)).size == size
    for iova in (first, first + size - 1):
        assert fault_of(iommu, device, iova).cause == 13


@pytest.mark.parametrize("name", sorted(PTE_DEFECTS))
def test_iommu_walk_malformed_page_entry(name):
    """MODEL-IOMMU-WALK-3 (R41): each malformed page table entry gives the page fault of the access, and only those."""
    memory, allocator, directory, iommu = card()
    table = PageTable(memory, allocator)
    defect = PTE_DEFECTS[name]
    size = {"leaf": SIZE_4K, "superpage": SIZE_2M, "pointer": SIZE_4K}[defect.where]
    table.map_page(0x4020_0000, 0x1234_0000 if size == SIZE_4K else 0x1220_0000, perms="rwxu", size=size)
    table.map_page(0x8020_0000, 0x5_6780_0000, perms="rwxu", size=size)
    directory.set(9, DeviceContext.sv39(table.root, PSCID=1))
    needs = {"LEAF_D_CLEAR": [WRITE], "SUPERPAGE_D_CLEAR": [WRITE], "LEAF_READ_ONLY": [WRITE, EXEC],
             "LEAF_EXEC_ONLY": [READ, WRITE], "LEAF_X_CLEAR": [EXEC]}.get(name, list(AccessType))
    for level in (1, 2) if defect.where == "pointer" else (None,):
        for access in AccessType:
            request = Request(9, 0x4020_0ABC, access)
            good = iommu.translate(request).spa
            undo = table.corrupt(0x4020_0000, name, level=level)
            if access in needs:
                assert fault_of(iommu, 9, 0x4020_0ABC, access).cause == PAGE_FAULT[access]
            else:
                assert iommu.translate(request).spa == good
            assert iommu.translate(Request(9, 0x8020_0ABC, access)).spa == 0x5_6780_0ABC
            undo()
            assert iommu.translate(request).spa == good


def test_iommu_walk_malformed_directory():
    """MODEL-IOMMU-WALK-4: each check of a device context gives 259, V=0 gives 258, the same in entries above it."""
    memory, allocator, directory, iommu = card(levels=3)
    table = PageTable(memory, allocator)
    table.map_page(0x1000, 0x7000)
    device = 0x5A_1234
    for context in (DeviceContext.sv39(table.root, PSCID=3, DTF=True), DeviceContext()):
        directory.set(device, context)
        good = iommu.translate(Request(device, 0x1000, READ))
        for name in DC_DEFECTS:
            undo = directory.corrupt(device, name)
            fault = fault_of(iommu, device, 0x1000)
            assert fault.cause == (258 if name == "TC_V_CLEAR" else 259), name
            assert fault.is_logged
            undo()
            assert iommu.translate(Request(device, 0x1000, READ)) == good
        for name in DDTE_DEFECTS:
            for level in (1, 2):
                undo = directory.corrupt(device, name, level=level)
                assert fault_of(iommu, device, 0x1000).cause == (258 if name == "DDTE_V_CLEAR" else 259), name
                undo()
    # legal oddities: custom bits of tc, GSCID with iohgatp Bare, DTF, PDTV with pdtp Bare, and with DPE
    at = directory.entry_address(device)
    for dwords in ([0xFF00_0001, 0, 0, 0], [1, 0xFFFF << 44, 0, 0], [0x11, 0, 0, 0], [0x21, 0, 0xFFFFF000, 5],
                   [0x221, 0, 0, 0]):
        memory.write(at, b"".join(dword.to_bytes(8, "little") for dword in dwords))
        assert iommu.translate(Request(device, 0xF00, READ)).spa == 0xF00
    # V is looked at before the rest
    memory.write(at, b"\xFE" + b"\xFF" * 31)
    assert fault_of(iommu, device, 0).cause == 258


def test_iommu_walk_levels_and_wide_ids():
    """MODEL-IOMMU-WALK-5: one, two and three levels reach 7, 16 and 24 bits; one bit more is 260, an empty slot 258."""
    for levels, bits in ((1, 7), (2, 16), (3, 24)):
        _, _, directory, iommu = card(levels=levels)
        for bit in range(bits):
            directory.set(1 << bit, DeviceContext())
            assert iommu.translate(Request(1 << bit, 0x1234, WRITE)).spa == 0x1234
            assert iommu.last_read_count == levels
        assert fault_of(iommu, 0, 0x1234).cause == 258
        assert fault_of(iommu, (1 << bits) - 1, 0x1234).cause == 258
        for bit in range(bits, 24):
            fault = fault_of(iommu, 1 << bit | 1, 0x1234)
            assert (fault.cause, iommu.last_read_count) == (260, 0)


def test_iommu_walk_off_and_bare():
    """MODEL-IOMMU-WALK-6 (R02): Off refuses with 256 and Bare passes every 64-bit address, without a read."""
    memory = GuestMemory(all_ram=False)
    memory.add_range(0, 0x1000)
    registers = PlainRegisters()
    iommu = Iommu(memory, registers=registers)
    corners = [0, 1, 0xFFF, 0x1000, 0xFFFF_FFFF, 1 << 32, (1 << 56) - 1, 1 << 56, 1 << 63, (1 << 64) - 1]
    for iova in corners:
        for access in AccessType:
            registers.ddtp = 1 | 0x123 << 10
            assert iommu.translate(Request(0xFFFFFF, iova, access, pid=3)) == Translation(iova, 1 << 64)
            registers.ddtp = 0
            fault = fault_of(iommu, 0xFFFFFF, iova, access)
            assert fault.cause == 256
            assert fault.is_logged
    assert iommu.read_count == 0


def test_iommu_walk_unreadable_tables():
    """MODEL-IOMMU-WALK-7 (R03): a table that cannot be read is an access fault, a poisoned one is data corruption.

    At each read of a cold walk: 257 or 268 in the directory, 1, 5, 7 or 274 in the page table.
    """
    memory, allocator, directory, iommu = card(levels=3)
    table = PageTable(memory, allocator)
    table.map_page(0x1000, 0x7000, perms="rwxu")
    directory.set(0x1_0000, DeviceContext.sv39(table.root, PSCID=0, DTF=True))
    iommu.translate(Request(0x1_0000, 0x1000, READ), trace=True)
    reads = [(step.address, len(step.entry) * 8) for step in iommu.steps if step.address is not None]
    assert [length for _, length in reads] == [8, 8, 32, 8, 8, 8]
    for n, (address, length) in enumerate(reads):
        for access in AccessType:
            for at in (address, address + length - 1):
                memory.poison(at, 1)
                fault = fault_of(iommu, 0x1_0000, 0x1000, access)
                assert fault.cause == (268 if n < 3 else 274)
                assert fault.is_logged == (n < 3)  # DTF
                memory.unpoison(at, 1)
            # the pointer to this table leads where there is no memory
            old = memory.read(reads[n - 1][0], 32) if n else b""
            if n == 0:
                iommu.registers.ddtp = 4 | 0x1000 << 10
            elif n == 3:
                memory.write(reads[2][0] + 24, (8 << 60 | 0x1000).to_bytes(8, "little"))
            else:
                memory.write(reads[n - 1][0], (0x1000 << 10 | 1).to_bytes(8, "little"))
            assert fault_of(iommu, 0x1_0000, 0x1000, access).cause == (257 if n < 3 else ACCESS_FAULT[access])
            iommu.registers.ddtp = directory.ddtp
            if n:
                memory.write(reads[n - 1][0], old)
            assert iommu.translate(Request(0x1_0000, 0x1000, access)).spa == 0x7000
    # beyond the physical address space that capabilities name
    narrow = Iommu(memory, Capabilities(PAS=32), registers=PlainRegisters(ddtp=directory.ddtp))
    assert narrow.translate(Request(0x1_0000, 0x1000, READ)).spa == 0x7000
    narrow.registers.ddtp = 4 | 1 << 20 << 10
    assert fault_of(narrow, 0x1_0000, 0x1000).cause == 257
    assert narrow.last_read_count == 0


def test_iommu_walk_process_ids():
    """MODEL-IOMMU-WALK-8: a process_id without PDTV is 260; with pdtp Bare, with or without DPE, nothing is translated."""
    memory, allocator, directory, iommu = card()
    table = PageTable(memory, allocator)
    table.map_page(0x1000, 0x7000)
    directory.set(1, DeviceContext.sv39(table.root, PSCID=0))
    fault = fault_of(iommu, 1, 0x1000, WRITE, pid=5, priv=True)
    assert fault.cause == 260
    record = iommu.record(Request(1, 0x1000, WRITE, pid=5, priv=True), fault)
    assert record == FaultRecord(cause=260, ttyp=3, device_id=1, process_id=5, priv=True, iotval=0x1000)
    for dpe in (False, True):
        directory.set(1, DeviceContext(PDTV=True, DPE=dpe))
        for pid in (None, 0, 0xFFFFF):
            assert iommu.translate(Request(1, 0x1000, WRITE, pid=pid)).spa == 0x1000


def test_iommu_walk_trace_and_counts():
    """MODEL-IOMMU-WALK-9: reads are counted; a trace names sections in order, ends in the verdict, changes nothing."""
    memory, allocator, directory, iommu = card(levels=2)
    table = PageTable(memory, allocator)
    table.map_page(0x4000_1000, 0x9_9000)
    table.map_page(0x8000_0000, 0x4000_0000, size=SIZE_1G)
    directory.set(0x1234, DeviceContext.sv39(table.root, PSCID=0))
    request = Request(0x1234, 0x4000_1234, READ)
    plain = iommu.translate(request)
    assert iommu.steps == []
    assert iommu.translate(request, trace=True) == plain
    assert [step.section for step in iommu.steps] == [
        "3.3.1", "3.3.1", "RVPRIV Sv39 step 2", "RVPRIV Sv39 step 2", "RVPRIV Sv39 step 2", "RVPRIV Sv39 step 10",
        "3.3 step 20"]
    leaf = iommu.steps[4]
    assert leaf.entry == (0x99 << 10 | 0xD7,)
    assert memory.read(leaf.address, 8) == leaf.entry[0].to_bytes(8, "little")
    assert f"{0x99 << 10 | 0xD7:#018x}" in str(leaf)
    assert (iommu.read_count, iommu.last_read_count) == (10, 5)
    iommu.translate(Request(0x1234, 0x8000_0000, READ))
    assert iommu.last_read_count == 3
    with pytest.raises(TranslationFault):
        iommu.translate(Request(0x1234, 0x5000_0000, READ), trace=True)
    assert "READ_PAGE_FAULT (13)" in iommu.steps[-1].what
    assert iommu.last_read_count == 4


def test_iommu_walk_two_domains():
    """MODEL-IOMMU-WALK-10 (R27): one IOVA in two domains leads to two places, and to a fault where it is not mapped."""
    memory, allocator, directory, iommu = card()
    tables = [PageTable(memory, allocator) for _ in range(2)]
    for n, table in enumerate(tables):
        directory.set(n, DeviceContext.sv39(table.root, PSCID=n + 1))
        table.map_page(0x1000, 0x10_0000 + n * 0x1000)
    tables[0].map_page(0x5000, 0x20_0000)
    assert [iommu.translate(Request(n, 0x1008, WRITE)).spa for n in (0, 1)] == [0x10_0008, 0x10_1008]
    for name, values in (("Device id", (1 << 24, 0)), ("IOVA", (0, 1 << 64)), ("IOVA", (0, -1))):
        with pytest.raises(ValueError, match=name):
            Request(*values, READ)
    with pytest.raises(ValueError, match="Process id"):
        Request(0, 0, READ, pid=1 << 20)
    assert iommu.translate(Request(0, 0x5000, WRITE)).spa == 0x20_0000
    assert fault_of(iommu, 1, 0x5000, WRITE).cause == 15


def test_iommu_walk_addresses_outside_sv39():
    """MODEL-IOMMU-WALK-11 (R02): bits 63:38 that are not all equal are a page fault before anything is read."""
    memory, allocator, directory, iommu = card()
    table = PageTable(memory, allocator)
    table.map_page(0x3F_FFFF_F000, 0x1000, perms="rwxu")
    table.map_page(0xFFFF_FFC0_0000_0000, 0x2000, perms="rwxu")
    directory.set(0, DeviceContext.sv39(table.root, PSCID=0))
    assert iommu.translate(Request(0, 0x3F_FFFF_FFFF, READ)).spa == 0x1FFF
    assert iommu.translate(Request(0, 0xFFFF_FFC0_0000_0000, READ)).spa == 0x2000
    for bit in range(38, 64):
        for iova in (0x3F_FFFF_F000 ^ 1 << bit, 0xFFFF_FFC0_0000_0000 ^ 1 << bit):
            for access in AccessType:
                assert fault_of(iommu, 0, iova, access).cause == PAGE_FAULT[access]
                assert iommu.last_read_count == 1


def test_iommu_walk_capabilities():
    """MODEL-IOMMU-WALK-12: Svpbmt makes its encodings legal on leaves, Svrsw60t59b its bits, a mode its tables."""
    memory, allocator, directory, _ = card()
    table = PageTable(memory, allocator)
    directory.set(0, DeviceContext.sv39(table.root, PSCID=0))
    for pbmt in range(4):
        table.map_page(pbmt << 12, 0x5000, pbmt=pbmt)
    registers = PlainRegisters(ddtp=directory.ddtp)
    without = Iommu(memory, registers=registers)
    having = Iommu(memory, Capabilities(Svpbmt=True), registers=registers)
    assert [having.translate(Request(0, pbmt << 12, READ)).pbmt for pbmt in range(3)] == [0, 1, 2]
    assert fault_of(having, 0, 3 << 12).cause == 13
    for pbmt in (1, 2, 3):
        assert fault_of(without, 0, pbmt << 12).cause == 13
        undo = table.corrupt(0, f"POINTER_PBMT_{pbmt}")
        assert fault_of(having, 0, 0).cause == 13
        undo()
    spare = Iommu(memory, Capabilities(Svrsw60t59b=True), registers=registers)
    for bit, legal in ((58, False), (59, True), (60, True)):
        undo = table.corrupt(0, f"LEAF_RESERVED_{bit}")
        assert fault_of(without, 0, 0).cause == 13
        if legal:
            assert spare.translate(Request(0, 0, READ)).spa == 0x5000
        else:
            assert fault_of(spare, 0, 0).cause == 13
        undo()
    # a mode of page tables is legal when its capability is 1, and what is below it is not
    for mode, name in ((8, "Sv39"), (9, "Sv48"), (10, "Sv57")):
        directory.set(0, DeviceContext(fsc_mode=mode, fsc_ppn=table.root >> 12))
        less, more = ({"Sv39": mode > 8, "Sv48": mode > 9, "Sv57": False}, {"Sv39": True, "Sv48": mode >= 9, "Sv57": mode == 10})
        assert fault_of(Iommu(memory, Capabilities(**less), registers=registers), 0, 0).cause == 259, name
        assert fault_of(Iommu(memory, Capabilities(**more), registers=registers), 0, 1 << 50).cause in (12, 13, 15), name


def test_iommu_walk_fault_records():
    """MODEL-IOMMU-WALK-13: records are the bits that the specification draws, both ways; malformed ones are described."""
    record = FaultRecord(cause=15, ttyp=3, device_id=0xABCDEF, process_id=0x54321, priv=True, iotval=0x1234_5678_9ABC_DEF0)
    first = 0xABCDEF << 40 | 3 << 34 | 1 << 33 | 1 << 32 | 0x54321 << 12 | 15
    assert record.pack() == b"".join(
        dword.to_bytes(8, "little") for dword in (first, 0, 0x1234_5678_9ABC_DEF0, 0))
    assert FaultRecord.unpack(record.pack()) == record
    assert isinstance(FaultRecord.unpack(record.pack()).cause, Cause)
    plain = FaultRecord(cause=Cause.DDT_ENTRY_NOT_VALID, ttyp=TransactionType.UNTRANSLATED_READ, device_id=1)
    assert plain.pack()[:8] == (1 << 40 | 2 << 34 | 258).to_bytes(8, "little")
    assert broken_record_rules(record.pack()) == broken_record_rules(plain.pack()) == []
    for dword, bit, rule in ((1, 32, "reserved bits"), (1, 63, "reserved bits"), (0, 0, "CAUSE"), (0, 12, "PV is 0"),
                             (0, 33, "PV is 0"), (0, 36, "TTYP")):
        raw = bytearray(FaultRecord(cause=256 + (6 << 2), ttyp=8 + 2 if rule == "TTYP" else 2).pack()
                        if rule in ("CAUSE", "TTYP") else plain.pack())
        raw[dword * 8 + bit // 8] ^= 1 << bit % 8
        assert any(rule in found for found in broken_record_rules(bytes(raw))), (dword, bit)
    nobody = FaultRecord(cause=273, ttyp=0, iotval=0xFEE0_0000)
    assert broken_record_rules(nobody.pack()) == []
    assert "TTYP is 0" in broken_record_rules(replace(nobody, device_id=1).pack())[0]
    assert "TTYP is 0" in broken_record_rules(replace(nobody, process_id=0).pack())[0]
    # what may differ: page offsets, never the page, the flags of iotval2 or anything else
    expected = FaultRecord(cause=13, ttyp=2, device_id=4, iotval=0x1234, iotval2=0x5001)
    for fine in (expected, replace(expected, iotval=0x1000), replace(expected, iotval2=0x5FFD)):
        assert expected.differences(fine) == []
    for wrong in ({"iotval": 0x1235}, {"iotval": 0}, {"iotval": 0x2234}, {"iotval2": 0x5000}, {"iotval2": 0x5003}, {"cause": 15},
                  {"ttyp": 3}, {"device_id": 5}, {"process_id": 0}):
        assert len(expected.differences(replace(expected, **wrong))) == 1
    for message, values in (("CAUSE", {"cause": 4096}), ("TTYP", {"ttyp": 64}), ("DID", {"device_id": 1 << 24}),
                            ("PID", {"process_id": 1 << 20}), ("PRIV", {"priv": True}), ("iotval", {"iotval": -1})):
        with pytest.raises(ValueError, match=message):
            replace(plain, **values).pack()
    with pytest.raises(ValueError, match="32 bytes"):
        FaultRecord.unpack(bytes(33))


def test_iommu_walk_dtf():
    """MODEL-IOMMU-WALK-14: DTF silences the rows marked so in the table of causes, and no others."""
    always = {256, 257, 258, 259, 268, 272, 273}
    for cause in Cause:
        assert is_logged(cause, dtf=False)
        assert is_logged(cause, dtf=True) == (cause in always)
    memory, allocator, directory, iommu = card()
    table = PageTable(memory, allocator)
    for dtf in (False, True):
        directory.set(0, DeviceContext.sv39(table.root, PSCID=0, DTF=dtf))
        fault = fault_of(iommu, 0, 0x1234, WRITE)
        record = iommu.record(Request(0, 0x1234, WRITE), fault)
        assert record == (None if dtf else FaultRecord(cause=15, ttyp=3, device_id=0, iotval=0x1234))


def test_iommu_walk_fault_queue():
    """MODEL-IOMMU-WALK-15: records land in order and wrap; full sets fqof, a write that fails fqmf, both drop the rest."""
    memory = GuestMemory(all_ram=False)
    memory.add_range(0x10_0000, 0x1000)
    registers = RegisterFile()
    queue = FaultQueue(registers, memory)
    records = [FaultRecord(cause=13, ttyp=2, device_id=n, iotval=n << 12) for n in range(12)]
    assert not queue.report(records[0])  # off: dropped, no error
    registers.write(0x28, 8, 0x100 << 10 | 1)  # 4 entries at 0x10_0000
    assert registers.read(0x4C, 4) == 0
    registers.write(0x4C, 4, 1)
    assert registers.read(0x4C, 4) == 1 << 16 | 1
    assert [queue.report(record) for record in records[:4]] == [True, True, True, False]
    assert registers.read(0x34, 4) == 3
    assert registers.read(0x4C, 4) == 1 << 16 | 1 << 9 | 1
    assert memory.read(0x10_0000, 128) == b"".join(record.pack() for record in records[:3]) + bytes(32)
    registers.write(0x30, 4, 3)
    assert not queue.report(records[4])  # fqof still stands
    registers.write(0x4C, 4, 1 << 9 | 1)
    assert [queue.report(record) for record in records[5:9]] == [True, True, True, False]
    assert memory.read(0x10_0000, 128) == b"".join(records[n].pack() for n in (6, 7, 2, 5))
    assert registers.read(0x34, 4) == 2
    registers.write(0x4C, 4, 0)
    registers.write(0x28, 8, 0x200 << 10 | 1)  # no memory there
    registers.write(0x4C, 4, 1)
    assert registers.read(0x34, 4) == 0
    registers.write(0x30, 4, 0)
    assert not queue.report(records[9])
    assert registers.read(0x4C, 4) == 1 << 16 | 1 << 8 | 1
    assert registers.read(0x34, 4) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 15)), min_size=1, max_size=6, unique=True), st.integers(0, 1 << 30))
def test_iommu_walk_identity(pages, seed):
    """MODEL-IOMMU-WALK-16 (R28): the same DMA in Bare and behind tables of identity reaches the same bytes and leaves the same memory."""
    rng, images = random.Random(seed), []
    starts = [(size, 0x8_0000_0000 * (SIZES.index(size) + 1) + n * size) for size, n in pages]
    accesses = []  # of 8 bytes, aligned: address, data to write or None
    for _ in range(60):
        size, start = rng.choice(starts)
        accesses.append((start + rng.randrange(0, size, 8), rng.getrandbits(64) if rng.random() < 0.6 else None))
    for is_translated in (False, True):
        _, allocator, directory, iommu = card()
        table, data, seen = PageTable(iommu.memory, allocator), GuestMemory(), []
        for size, start in starts:
            table.map_page(start, start, size=size)
        directory.set(5, DeviceContext.sv39(table.root, PSCID=9))
        if not is_translated:
            iommu.registers.ddtp = 1
        for address, value in accesses:
            spa = iommu.translate(Request(5, address, READ if value is None else WRITE)).spa
            seen.append(data.load_q_le(spa)) if value is None else data.store_q_le(spa, value)
        assert bool(iommu.read_count) == is_translated
        images.append((seen, [data.load_q_le(address) for address, _ in accesses]))
    assert images[0] == images[1]
