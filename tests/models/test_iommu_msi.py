"""MSI address translation, flat and to files in memory. [RVIOMMU1.0 3.1.3.5, 3.3.3] Formats: Advanced Interrupt Architecture."""

import random
from dataclasses import replace

import pytest

from ringwall.models.iommu.defects import msi_pte_defects
from ringwall.models.iommu.entries import SIZE_1G, SIZE_2M, SIZE_4K, SV39, SV39X4, DeviceContext, MsiPte, extract, mgpaw
from ringwall.models.iommu.faults import AccessType, TranslationFault
from ringwall.models.iommu.msi import Notice, region_without_interrupt_files
from ringwall.models.iommu.registers import Capabilities
from ringwall.models.iommu.tables import Allocator, DeviceDirectory, GuestView, MsiTable, PageTable
from ringwall.models.iommu.walk import Iommu, Mrif, PlainRegisters, Request, RequestKind, Translation
from ringwall.models.memory import GuestMemory

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
POOL, FILES = 0x8000_0000, 0x2800_0000  # a guest's interrupt files: four pages from here on
FLAT = Capabilities(Sv39x4=True, MSI_FLAT=True, ATS=True, T2GPA=True, Svpbmt=True)
MRIF = replace(FLAT, MSI_MRIF=True)
FILE, NOTICE = 0x8200_0000, 0x9900_0000


class Machine:
    """Device 3 with a second stage of identity over the first GiB and an MSI table for four pages at FILES."""

    def __init__(self, capabilities=FLAT, *, mask=3, pattern=FILES >> 12, fctl=0, order="little", **context):
        self.memory = GuestMemory(all_ram=False)
        self.memory.add_range(POOL, 0x400_0000)
        self.allocator = Allocator(self.memory, POOL, 0x100_0000)
        self.directory = DeviceDirectory(self.memory, self.allocator, levels=1, extended=True, order=order)
        self.second = PageTable(self.memory, self.allocator, scheme=SV39X4, order=order)
        self.second.map_page(0, 0, size=SIZE_1G, perms="rwxu")
        self.table = MsiTable(self.memory, self.allocator, mask=mask, pattern=pattern, order=order)
        context = DeviceContext(**context).with_second_stage(SV39X4, self.second.root, GSCID=1)
        self.directory.set(3, context.with_msi_table(self.table.root, mask=mask, pattern=pattern))
        self.iommu = Iommu(self.memory, capabilities, registers=PlainRegisters(self.directory.ddtp, fctl))

    def translate(self, iova, access=WRITE, **options):
        return self.iommu.translate(Request(3, iova, access, **options))

    def fault(self, iova, access=WRITE, **options):
        with pytest.raises(TranslationFault) as caught:
            self.translate(iova, access, **options)
        assert (caught.value.iotval, caught.value.iotval2) == (iova, 0)
        return caught.value.cause


def test_iommu_msi_worked_example():
    """MODEL-IOMMU-MSI-1: the bits of mask, number and entry by hand; other pages go through the second stage."""
    # the specification's own example: x = abcdefgh, y = 10100110 gives 0000acfg
    for value in range(256):
        a, c, f, g = (value >> bit & 1 for bit in (7, 5, 2, 1))
        assert extract(value, 0b10100110) == a << 3 | c << 2 | f << 1 | g
    machine = Machine(mask=0b1011, pattern=0x28004)
    at = machine.table.root
    for n in range(8):
        machine.memory.write(at + 16 * n, (0x5000 + n << 10 | 7).to_bytes(8, "little") + b"\xFF" * 8)  # the second half is ignored
    # pages 0x28004 | bits 0, 1, 3; bit 2 is part of the pattern
    for page, number in ((0x28004, 0), (0x28005, 1), (0x28006, 2), (0x28007, 3), (0x2800C, 4), (0x2800D, 5), (0x2800F, 7)):
        found = machine.translate(page << 12 | 0x678)
        assert found == Translation(0x5000 + number << 12 | 0x678, SIZE_4K, True, True, False, is_msi=True)
        assert machine.iommu.last_read_count == 2
    for page in (0x28000, 0x28003, 0x28014, 0x28008):
        assert machine.translate(page << 12 | 0x678).spa == page << 12 | 0x678
        assert not machine.translate(page << 12).is_msi
    assert MsiPte(spa=0x5003000).dwords() == [0x5003 << 10 | 7, 0]
    assert MsiPte(mrif_address=0xFF_FFFF_FFFF_FE00, notice_address=0x12_3456_7000, nid=0x7FF).dwords() == [
        ((1 << 47) - 1) << 7 | 3, 1 << 60 | 0x1234567 << 10 | 0x3FF]
    for message, values in (("Page", {"spa": 5}), ("MRIF", {"mrif_address": 0x100}), ("Notice", {"notice_address": 0x80}),
                            ("NID", {"nid": 2048})):
        with pytest.raises(ValueError, match=message):
            MsiPte(**values).dwords()
    for message, call in (("Mask", lambda: MsiTable(machine.memory, machine.allocator, mask=1 << 52, pattern=0)),
                          ("Pattern", lambda: MsiTable(machine.memory, machine.allocator, mask=0, pattern=-1)),
                          ("interrupt file", lambda: machine.table.set(0x28000000, MsiPte())),
                          ("Defect", lambda: machine.table.corrupt(0x28004000, "NO_SUCH", set()))):
        with pytest.raises(ValueError, match=message):
            call()


def test_iommu_msi_random_masks():
    """MODEL-IOMMU-MSI-2: random masks and patterns: every page is a file, or not, as bit by bit; its number and entry agree."""
    rng = random.Random(9)
    for _ in range(25):
        bits = rng.sample(range(18), rng.randrange(7))
        mask, pattern = sum(1 << bit for bit in bits), rng.randrange(1 << 18)
        machine = Machine(mask=mask, pattern=pattern)
        targets = {}
        for page in [pattern ^ rng.getrandbits(18) & mask for _ in range(10)]:
            targets[page] = rng.randrange(1 << 44)
            machine.table.set(page << 12, MsiPte(spa=targets[page] << 12))
        assert len({extract(page, mask) for page in targets}) == len(targets)
        for page in [*targets, *[rng.randrange(1 << 18) for _ in range(10)], *[pattern ^ 1 << bit for bit in range(18)]]:
            is_file = all(page >> bit & 1 == pattern >> bit & 1 for bit in range(52) if bit not in bits)
            if not is_file:
                assert machine.translate(page << 12).spa == page << 12
            elif page in targets:
                assert machine.translate(page << 12 | 4).spa == targets[page] << 12 | 4
            else:
                assert machine.fault(page << 12) == 262


@pytest.mark.parametrize("is_mrif", [False, True])
def test_iommu_msi_defects(is_mrif):
    """MODEL-IOMMU-MSI-3: each malformed entry is 262 or 263, one that cannot be read 261 or 270; execution is 1, after those."""
    entry = MsiPte(mrif_address=FILE, notice_address=NOTICE, nid=5) if is_mrif else MsiPte(spa=0x7000)
    for capabilities in (FLAT, MRIF):
        machine = Machine(capabilities)
        machine.table.set(FILES, entry)
        features, at = capabilities.switched_on(), machine.table.entry_address(FILES)
        is_good = not is_mrif or capabilities.MSI_MRIF
        for name in msi_pte_defects(features, is_mrif=is_mrif):
            undo = machine.table.corrupt(FILES, name, features)
            for access in AccessType:
                assert machine.fault(FILES, access) == (262 if name == "MSI_PTE_V_CLEAR" else 263), name
            undo()
        for access in AccessType:
            if not is_good:
                assert machine.fault(FILES, access) == 263
            elif access is EXEC:
                assert machine.fault(FILES, access) == 1
            else:
                assert machine.translate(FILES, access).is_msi
            machine.memory.poison(at + 15, 1)
            assert machine.fault(FILES, access) == 270
            machine.memory.unpoison(at + 15, 1)
        machine.table.clear(FILES)
        assert machine.fault(FILES) == 262
        context = machine.directory.get(3)
        machine.directory.set(3, context.with_msi_table(0x7000_0000, mask=3, pattern=FILES >> 12))
        assert machine.fault(FILES) == 261
        machine.directory.set(3, context.with_msi_table(1 << 55, mask=3, pattern=FILES >> 12))
        machine.iommu.capabilities = replace(capabilities, PAS=50)
        assert machine.fault(FILES) == 261


def test_iommu_msi_files_in_memory():
    """MODEL-IOMMU-MSI-4: each identity sets its bit in the file and sends the notice; what is no MSI is discarded or refused."""
    machine = Machine(MRIF)
    machine.table.set(FILES, MsiPte(mrif_address=FILE, notice_address=NOTICE, nid=0x555))
    found = machine.translate(FILES)
    assert (found.mrif, found.spa, found.is_msi, found.size) == (Mrif(FILE, NOTICE, 0x555), FILE, True, SIZE_4K)
    before, expected = machine.memory.snapshot(), 0
    for identity in (0, 1, 63, 64, 1000, 2047):
        at = FILE + identity // 64 * 16 + identity % 64 // 8
        notice = machine.iommu.write_msi(Request(3, FILES, WRITE), identity.to_bytes(4, "little"))
        assert notice == Notice(NOTICE, 0x555)
        assert machine.memory.read(at, 1)[0] >> identity % 8 & 1
        expected += 1
    changed = sum(byte.bit_count() for byte in machine.memory.read(FILE, 512))
    assert (changed, sum(length for _, length in before.differences(machine.memory))) == (expected, 5)
    before = machine.memory.snapshot()
    for iova, data in ((FILES, 2048), (FILES, 1 << 31), (FILES + 8, 1), (FILES + 4, 1), (FILES + 0xFF8, 1)):
        assert machine.iommu.write_msi(Request(3, iova, WRITE), data.to_bytes(4, "little")) is None
    assert machine.iommu.write_msi(Request(3, FILES + 4, WRITE), (65).to_bytes(4, "little"), accepts_big_endian=True) is None
    assert not before.differences(machine.memory)
    assert machine.iommu.write_msi(Request(3, FILES + 4, WRITE), (65).to_bytes(4, "big"), accepts_big_endian=True) == Notice(NOTICE, 0x555)
    assert machine.memory.read(FILE + 16, 1) == b"\x03"
    for iova, access, data in ((FILES + 2, WRITE, bytes(4)), (FILES, WRITE, bytes(8)), (FILES, READ, bytes(4)), (0x1000, WRITE, bytes(4))):
        with pytest.raises(ValueError, match="must be"):
            machine.iommu.write_msi(Request(3, iova, access), data)


def test_iommu_msi_file_faults():
    """MODEL-IOMMU-MSI-5: a file that cannot be accessed is 264, a corrupt one 271, silenced by DTF; with AMO_MRIF nobody gets between."""
    for dtf in (False, True):
        machine = Machine(MRIF, DTF=dtf)
        request = Request(3, FILES, WRITE)
        for address, poison, cause in ((0x7000_0000, False, 264), (FILE, True, 271)):
            machine.table.set(FILES, MsiPte(mrif_address=address, notice_address=NOTICE, nid=1))
            if poison:
                machine.memory.poison(address + 23, 1)
            with pytest.raises(TranslationFault) as caught:
                machine.iommu.write_msi(request, (70).to_bytes(4, "little"))
            assert (caught.value.cause, caught.value.iotval) == (cause, FILES)
            assert (machine.iommu.record(request, caught.value) is None) == dtf
    for atomic in (False, True):
        machine = Machine(replace(MRIF, AMO_MRIF=atomic))
        machine.table.set(FILES, MsiPte(mrif_address=FILE, notice_address=NOTICE, nid=1))
        calls = []

        def other(address, length, is_write, machine=machine, calls=calls):
            if address == FILE:
                calls.append(is_write)
                machine.memory.write(FILE, bytes([machine.memory.read(FILE, 1)[0] | 1 << len(calls)]))

        machine.memory.interleaver = other
        machine.iommu.write_msi(Request(3, FILES, WRITE), bytes(4))
        machine.memory.interleaver = None
        assert calls == ([False] if atomic else [False, True])
        assert machine.memory.read(FILE, 1)[0] == 0b011  # the plain read and write lose what came between


def test_iommu_msi_regions():
    """MODEL-IOMMU-MSI-6: what one answer covers holds no interrupt file, and is as large as that allows."""
    rng = random.Random(2)
    for _ in range(300):
        mask = sum(1 << rng.randrange(20) for _ in range(rng.randrange(8)))
        context = DeviceContext(msiptp_mode=1, msi_addr_mask=mask, msi_addr_pattern=rng.randrange(1 << 9))
        gpa, size = rng.randrange(1 << 21), rng.choice([SIZE_4K, 1 << 16, SIZE_2M])

        def holds_file(region, gpa=gpa, context=context):
            first = gpa // region * region >> 12
            return any(not (page ^ context.msi_addr_pattern) & ~context.msi_addr_mask for page in range(first, first + (region >> 12)))

        if holds_file(SIZE_4K):
            continue
        found = region_without_interrupt_files(context, gpa, size)
        assert found <= size
        assert not holds_file(found)
        assert found == size or holds_file(found * 2)
        assert region_without_interrupt_files(replace(context, msiptp_mode=0), gpa, size) == size
    machine = Machine()
    machine.table.set(FILES, MsiPte(spa=0x7000))
    assert machine.translate(FILES + 0x4000).size == 0x4000
    assert machine.translate(FILES + 0x10_0000).size == 0x10_0000
    assert machine.translate(0x1000).size == 1 << 29


def test_iommu_msi_behind_a_first_stage():
    """MODEL-IOMMU-MSI-7: an IOVA reaches a file through the first stage, its permissions and memory type count; tables never are files."""
    machine = Machine()
    machine.second.unmap(0)
    for n in range(8):
        machine.second.map_page(FILES + n * 0x1000, machine.allocator.page())
    view = GuestView(machine.memory, machine.second)
    table = PageTable(view, Allocator(view, FILES, 0x4000))  # in the pages of the files
    table.map_page(0x5000, FILES + 0x1000, pbmt=2, perms="ru", g=True)
    machine.table.set(FILES + 0x1000, MsiPte(spa=0x77_7000))
    context = machine.directory.get(3)
    machine.directory.set(3, replace(context, fsc_mode=SV39.mode, fsc_ppn=table.root >> 12))
    assert machine.translate(0x5ABC, READ) == Translation(0x77_7ABC, SIZE_4K, True, False, False, 2, True, True)
    assert machine.fault(0x5ABC) == 15
    # without MSI_FLAT nothing of it exists; a translated request with T2GPA reaches files as well
    machine.directory.set(3, replace(context, EN_ATS=True, T2GPA=True))
    assert machine.translate(FILES + 0x1004, kind=RequestKind.TRANSLATED).spa == 0x77_7004
    assert machine.fault(FILES + 0x1004, EXEC, kind=RequestKind.TRANSLATED) == 1
    assert [mgpaw(features, 46) for features in ({"Sv57x4", "Sv39x4"}, {"Sv48x4"}, {"Sv39x4"}, {"Sv32x4"}, ())] == [59, 50, 41, 34, 46]


def test_iommu_msi_big_endian():
    """MODEL-IOMMU-MSI-8: fctl.BE turns the MSI page table around and not the interrupt file."""
    machine = Machine(replace(MRIF, END=True), fctl=1, order="big")
    machine.table.set(FILES, MsiPte(spa=0x12_3000))
    machine.table.set(FILES + 0x1000, MsiPte(mrif_address=FILE, notice_address=NOTICE, nid=3))
    assert machine.translate(FILES | 8).spa == 0x12_3008
    assert machine.iommu.write_msi(Request(3, FILES + 0x1000, WRITE), (9).to_bytes(4, "little")) == Notice(NOTICE, 3)
    assert machine.memory.read(FILE, 8) == (1 << 9).to_bytes(8, "little")
