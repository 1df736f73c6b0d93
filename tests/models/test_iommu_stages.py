"""Both stages of translation, process directories and every check of contexts. [RVIOMMU1.0 3] [RVPRIV Hypervisor]"""

import random
from dataclasses import replace

import pytest

from ringwall.models.iommu.defects import DDTE_DEFECTS, PDTE_DEFECTS, device_context_defects, process_context_defects
from ringwall.models.iommu.entries import (
    SIZE_4K,
    SIZE_64K,
    SV32,
    SV32X4,
    SV39,
    SV39X4,
    SV48,
    SV48X4,
    SV57,
    SV57X4,
    DeviceContext,
    ProcessContext,
)
from ringwall.models.iommu.faults import AccessType, Cause, FaultRecord, TranslationFault
from ringwall.models.iommu.registers import Capabilities, IommuMode
from ringwall.models.iommu.tables import Allocator, DeviceDirectory, GuestView, PageTable, ProcessDirectory
from ringwall.models.iommu.walk import Implementation, Iommu, PlainRegisters, Request, RequestKind, Translation, context_misconfigurations
from ringwall.models.memory import AccessFault, GuestMemory

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
PAGE_FAULT, GUEST_PAGE_FAULT, ACCESS_FAULT = {EXEC: 12, READ: 13, WRITE: 15}, {EXEC: 20, READ: 21, WRITE: 23}, {EXEC: 1, READ: 5, WRITE: 7}
POOL, GUEST = 0x8000_0000, 0x1000_0000  # where tables are in memory, and where a guest sees its own
FULL = Capabilities(Sv48=True, Sv57=True, Svpbmt=True, Sv39x4=True, Sv48x4=True, Sv57x4=True, AMO_HWAD=True, ATS=True, T2GPA=True,
                    PD8=True, PD17=True, PD20=True, QOSID=True)
RV32 = replace(FULL, Sv32=True, Sv32x4=True)
SECOND = {SV39: SV39X4, SV48: SV48X4, SV57: SV57X4, SV32: SV32X4}
DEVICE = 5


class Machine:
    """A memory, a directory and an IOMMU; with ``second`` a guest whose own pages are at ``GUEST``, one by one somewhere else."""

    def __init__(self, *, capabilities=FULL, second=None, fctl=0, rng=None, gxl_writable=False, updates=(False, False), implementation=None,
                 levels=1):
        self.memory = GuestMemory(all_ram=False)
        self.memory.add_range(POOL, 0x400_0000)
        self.allocator = Allocator(self.memory, POOL, 0x400_0000, rng=rng)
        self.order, features = "big" if fctl & 1 else "little", capabilities.switched_on()
        self.options = {"order": self.order, "features": features}
        self.directory = DeviceDirectory(self.memory, self.allocator, levels=levels, extended=capabilities.MSI_FLAT,
                                         gxl=bool(fctl >> 2 & 1), gxl_writable=gxl_writable, **self.options)
        self.iommu = Iommu(self.memory, capabilities, registers=PlainRegisters(self.directory.ddtp, fctl),
                           implementation=implementation or Implementation(gxl_writable=gxl_writable))
        self.view, self.tables = self.memory, self.allocator
        self.second = None
        self.updates = updates
        if second:
            self.second = PageTable(self.memory, self.allocator, scheme=second, is_updated=updates[1], **self.options)
            for n in range(48):
                self.second.map_page(GUEST + n * 0x1000, self.allocator.page())
            self.view = GuestView(self.memory, self.second)
            self.tables = Allocator(self.view, GUEST, 48 * 0x1000, rng=rng)

    def first(self, scheme, **options):
        return PageTable(self.view, self.tables, scheme=scheme, is_updated=self.updates[0], **{**self.options, **options})

    def context(self, context, gscid=0x1234):
        """Give the device this context, with the second stage of the machine."""
        context = replace(context, SADE=self.updates[0], GADE=self.updates[1])
        if self.second:
            context = context.with_second_stage(self.second.scheme, self.second.root, GSCID=gscid)
        self.directory.set(DEVICE, context)
        return context

    def translate(self, iova, access=READ, **options):
        return self.iommu.translate(Request(DEVICE, iova, access, **options))

    def fault(self, iova, access=READ, *, iotval2=0, **options):
        """The cause of the fault that must come, with the page of iotval2 and its flags checked."""
        request = Request(DEVICE, iova, access, **options)
        with pytest.raises(TranslationFault) as caught:
            self.iommu.translate(request)
        assert caught.value.iotval == iova
        record = self.iommu.record(request, caught.value)
        if record is not None:
            assert FaultRecord.unpack(record.pack()) == record
        seen = caught.value.iotval2
        assert not FaultRecord(0, 0, iotval2=iotval2).differences(FaultRecord(0, 0, iotval2=seen)), hex(seen)
        return caught.value.cause


def test_iommu_stages_worked_example():
    """MODEL-IOMMU-STAGE-1: Sv48 over Sv39x4, every byte written here by number; reads are counted in their order."""
    memory = GuestMemory()

    def put(address, *dwords):
        memory.write(address, b"".join(dword.to_bytes(8, "little") for dword in dwords))

    put(0x1000 + 7 * 32, 1, 8 << 60 | 0xBEEF << 44 | 0x10, 0x99 << 12, 9 << 60 | 0x12_3456)  # Sv39x4 at 0x10000, Sv48 at GPA 0x1_2345_6000
    # the GPAs of the four tables: 0x1_2345_6000 + n * 0x1000, VPN[2] = 4, VPN[1] = 0x11A, VPN[0] = 0x56
    put(0x10000 + 4 * 8, 0x20 << 10 | 1)
    put(0x20000 + 0x11A * 8, 0x21 << 10 | 1)
    for n in range(4):
        put(0x21000 + (0x56 + n) * 8, 0x30 + n << 10 | 0x53)  # A U R V: not writable
    # IOVA 0x5A_1234_5678_9: VPN[3] = 0x0B, VPN[2] = 0x84, VPN[1] = 0x11A (IOVA 0x05A1_2345_6789)
    iova = 0x05A1_2345_6789
    vpn = [iova >> 12 + 9 * n & 0x1FF for n in range(4)]
    for n in range(3):
        put(0x30000 + n * 0x1000 + vpn[3 - n] * 8, 0x12_3457 + n << 10 | 1 | (n == 1) << 5)  # the middle one global
    put(0x33000 + vpn[0] * 8, 0x1FF_F000_0 << 10 | 0xDF)  # GPA 0x1FFF0000000, above 39 bits
    put(0x10000 + (0x1FF_F000_0000 >> 30) * 8, 0x7_C000_0000 >> 12 << 10 | 0xDB)  # index 2047 of the wide root: 1 GiB, R X
    iommu = Iommu(memory, FULL, registers=PlainRegisters(ddtp=1 << 10 | 2))
    assert iommu.translate(Request(7, iova, EXEC)) == Translation(0x7_F000_0789, SIZE_4K, True, False, True, 0, True)
    assert iommu.last_read_count == 1 + 4 * (3 + 1) + 1
    with pytest.raises(TranslationFault) as caught:
        iommu.translate(Request(7, iova, WRITE))
    assert (caught.value.cause, caught.value.iotval, caught.value.iotval2) == (23, iova, 0x1FF_F000_0788)
    put(0x21000 + 0x58 * 8, 0)  # the third table's page goes
    with pytest.raises(TranslationFault) as caught:
        iommu.translate(Request(7, iova, WRITE))
    assert (caught.value.cause, caught.value.iotval2) == (23, 0x1_2345_8000 + vpn[1] * 8 | 1)


def random_pages(rng, scheme, count, spa_bits):
    """Pages that do not overlap: (first, target, size, perms, a, d, pbmt)."""
    found = []
    top = 1 << scheme.address_bits
    for _ in range(count * 3):
        size = rng.choice(scheme.sizes)
        first = (rng.choice([0, top // 2 - top // 8, top // 2, top - top // 8]) + rng.randrange(top // 8)) // size * size
        if not scheme.wider and scheme.pte_bytes == 8 and first >> scheme.address_bits - 1:
            first |= (1 << 64) - (1 << scheme.address_bits)
        perms = rng.choice(["ru", "rwu", "rxu", "rwxu", "xu", "r", "rw"])
        page = (first, rng.randrange(1 << spa_bits) // size * size, size, perms, rng.random() < 0.8, rng.random() < 0.7,
                rng.choice([0, 0, 1, 2]) if scheme.pte_bytes == 8 else 0)
        if all(first + size <= other[0] or other[0] + other[2] <= first for other in found):
            found.append(page)
    return found[:count]


def flat(pages, address, access):
    """What a list of pages says of a user's access: (target, size, permissions, pbmt), or None for a fault."""
    for first, target, size, perms, a, d, pbmt in pages:
        if first <= address < first + size:
            usable = {perm for perm in perms if perm != "w" or d} if a and "u" in perms else set()
            if access is None or {READ: "r", WRITE: "w", EXEC: "x"}[access] in usable:
                return target + address - first, size, usable, pbmt
    return None


@pytest.mark.parametrize("scheme", [SV39, SV48, SV57, SV32], ids=lambda scheme: scheme.name)
def test_iommu_stages_random_tables(scheme):
    """MODEL-IOMMU-STAGE-2 (R41): random tables of each format, one stage or both, agree with flat lists kept here."""
    rng = random.Random(scheme.name)
    rv32 = scheme is SV32
    ends = set()
    for trial in range(12):
        kind = ("first", "second", "both")[trial % 3]
        machine = Machine(capabilities=RV32 if rv32 else FULL, fctl=4 if rv32 else 0, rng=rng,
                          second=SECOND[scheme] if kind != "first" else None)
        outer = random_pages(rng, SECOND[scheme], 8, 34 if rv32 else 56)
        if kind != "first":
            outer = [page for page in outer if not page[0] < GUEST + 0x3_0000 or not page[0] + page[2] > GUEST]
            for first, target, size, perms, a, d, pbmt in outer:
                if not any(first < one.iova + one.size and one.iova < first + size for one in machine.second.mappings.values()):
                    machine.second.map_page(first, target, size=size, perms=perms, a=a, d=d, pbmt=pbmt)
        outer = [page for page in outer if kind != "first" and page[0] in machine.second.mappings]
        inner = random_pages(rng, scheme, 8, 34 if rv32 else 56)
        if kind == "both":  # into pages of the second stage, mostly
            inner = [(first, rng.choice(outer)[0] % (1 << 56) // size * size if rng.random() < 0.8 and outer else target, size, *rest)
                     for first, target, size, *rest in inner]
        context = DeviceContext(SXL=rv32)
        if kind != "second":
            table = machine.first(scheme)
            for first, target, size, perms, a, d, pbmt in inner:
                table.map_page(first, target, size=size, perms=perms, a=a, d=d, pbmt=pbmt)
            context = DeviceContext.first_stage(scheme, table.root, PSCID=7)
        machine.context(context)
        pages = outer if kind == "second" else inner
        probes = [first + rng.choice([0, size - 1, rng.randrange(size)]) for first, _, size, *_ in pages for _ in range(3)]
        for iova in probes + [iova ^ 1 << rng.randrange(12, 64) for iova in probes]:
            for access in AccessType:
                one = flat(inner, iova, access) if kind != "second" else (iova, 1 << 64, set("rwx"), 0)
                two = flat(outer, one[0], access) if one and kind != "first" else one
                if one is None:
                    assert machine.fault(iova, access) == PAGE_FAULT[access]
                elif two is None:
                    assert machine.fault(iova, access, iotval2=one[0] & ~3) == GUEST_PAGE_FAULT[access]
                else:
                    found, both = machine.translate(iova, access), one[2] & two[2]
                    assert found == Translation(two[0], min(one[1], two[1]), "r" in both, "w" in both, "x" in both, one[3] or two[3])
                    assert found.gpa == (None if kind == "first" else one[0])
                ends.add((kind, one is None, two is None))
    assert ends >= {("first", True, True), ("first", False, False), ("second", False, True), ("second", False, False), ("both", True, True),
                    ("both", False, True), ("both", False, False)}


@pytest.mark.parametrize("scheme", [SV39X4, SV48X4, SV57X4, SV32X4], ids=lambda scheme: scheme.name)
def test_iommu_stages_second_stage_defects(scheme):
    """MODEL-IOMMU-STAGE-3 (R41): each malformed second-stage entry is a guest page fault of the access; under a table, of an implicit read.

    The address of the table's entry and the flag are in iotval2. [RVIOMMU1.0 4.2]
    """
    first = {SV39X4: SV39, SV48X4: SV48, SV57X4: SV57, SV32X4: SV32}[scheme]
    rv32, big = scheme is SV32X4, scheme.size_of_level(1)
    machine = Machine(capabilities=RV32 if rv32 else FULL, second=scheme, fctl=4 if rv32 else 0)
    table = machine.first(first)
    gpa = 0x2_0000_0000 + 5 * big
    page, superpage = gpa + 0x3000, gpa + big
    machine.second.map_page(page, 0x1_2345_0000, perms="rwxu")
    machine.second.map_page(superpage, 0x1_0000_0000, perms="rwxu", size=big)
    table.map_page(0x4020_0000, page, perms="rwxu")
    table.map_page(0x4020_1000, superpage + 0x5000, perms="rwxu")
    machine.context(DeviceContext.first_stage(first, table.root, PSCID=1))
    for name, defect in machine.second.defects.items():
        iova, at, target = (0x4020_1ABC, superpage + 0x5000, 0x1_0000_5ABC) if defect.where == "superpage" else (
            0x4020_0ABC, page, 0x1_2345_0ABC)
        for level in range(1, scheme.levels) if defect.where == "pointer" else (None,):
            undo = machine.second.corrupt(at, name, level=level)
            above = level is not None and at // scheme.size_of_level(level) == GUEST // scheme.size_of_level(level)
            for access in AccessType:
                if above:  # the pointer is one to the tables as well: the first read of the first stage
                    assert machine.fault(iova, access, iotval2=table.root | 1) == GUEST_PAGE_FAULT[access]
                elif access in defect.faults:
                    assert machine.fault(iova, access, iotval2=at & ~0xFFF) == GUEST_PAGE_FAULT[access], (name, level)
                else:
                    assert machine.translate(iova, access).spa == target
            undo()
            assert machine.translate(iova).spa == target
    # the same under the first stage's own tables: only what an implicit read needs
    undo_map = machine.second.mappings[table.root]
    for name, defect in machine.second.defects.items():
        if defect.where == "leaf":
            undo = machine.second.corrupt(undo_map.iova, name)
            for access in AccessType:
                if READ in defect.faults:
                    assert machine.fault(0x4020_0ABC, access, iotval2=table.root | 1) == GUEST_PAGE_FAULT[access]
                else:
                    assert machine.translate(0x4020_0ABC, access).spa == 0x1_2345_0ABC
            undo()
    # addresses wider than the second stage translates
    for bit in range(scheme.address_bits, 64):
        machine.context(DeviceContext(SXL=rv32))
        assert machine.fault(1 << bit | page, iotval2=1 << bit | page) == 21
    assert machine.translate(page).spa == 0x1_2345_0000


def test_iommu_stages_first_stage_defects():
    """MODEL-IOMMU-STAGE-4: each malformed entry of Sv48, Sv57 and Sv32 is a page fault of the access, behind a second stage too."""
    for scheme in (SV48, SV57, SV32):
        rv32, big = scheme is SV32, scheme.size_of_level(1)
        for second in (None, SECOND[scheme]):
            machine = Machine(capabilities=RV32 if rv32 else FULL, second=second, fctl=4 if rv32 else 0)
            table = machine.first(scheme)
            if second:
                machine.second.map_page(big * 8, big * 8, perms="rwxu", size=big)
            table.map_page(big * 2, big * 8, perms="rwxu")
            table.map_page(big * 3, big * 8, perms="rwxu", size=big)
            machine.context(DeviceContext.first_stage(scheme, table.root, PSCID=1))
            for name, defect in table.defects.items():
                iova = big * 3 + 0x123 if defect.where == "superpage" else big * 2 + 0x123
                for level in range(1, scheme.levels) if defect.where == "pointer" else (None,):
                    undo = table.corrupt(iova, name, level=level)
                    for access in AccessType:
                        if access in defect.faults:
                            assert machine.fault(iova, access) == PAGE_FAULT[access], (name, level)
                        else:
                            assert machine.translate(iova, access).spa == big * 8 + 0x123
                    undo()
            for bit in range(scheme.address_bits - (not rv32), 64):
                assert machine.fault(iova ^ 1 << bit) == 13


def test_iommu_stages_process_directories():
    """MODEL-IOMMU-STAGE-5: PD8, PD17 and PD20 lead each process_id to its table, with and without second stage; a wider one is 260."""
    rng = random.Random(5)
    for levels, bits in ((1, 8), (2, 17), (3, 20)):
        for second in (None, SV48X4):
            machine = Machine(second=second, rng=rng)
            processes = ProcessDirectory(machine.view, machine.tables, levels=levels, **machine.options)
            table = machine.first(SV48)
            if second:
                machine.second.map_page(0x9000_0000, 0x5000_0000)
            table.map_page(0x7000, 0x9000_0000)
            empty = machine.first(SV39)
            machine.context(DeviceContext.process_directory(processes.pdtp))
            ids = [0, (1 << bits) - 1, rng.randrange(1 << bits)]
            for n, pid in enumerate(ids):
                processes.set(pid, ProcessContext.first_stage(SV48, table.root, PSCID=n))
            assert processes.get(ids[1]) == ProcessContext.first_stage(SV48, table.root, PSCID=1)
            target = 0x5000_0000 if second else 0x9000_0000
            for pid in ids:
                assert machine.translate(0x7ABC, WRITE, pid=pid).spa == target + 0xABC
                assert machine.iommu.last_read_count == 1 + levels * (5 if second else 1) + 4 * (5 if second else 1) + (4 if second else 0)
            assert machine.fault(0x7ABC, pid=ids[2] ^ 1) == 266
            processes.set(1, ProcessContext.first_stage(SV39, empty.root, PSCID=9))
            assert machine.fault(0x7ABC, EXEC, pid=1) == 12
            processes.set(2, ProcessContext())
            assert machine.translate(0x9000_0000 if second else 0x4567, pid=2).spa == (0x5000_0000 if second else 0x4567)
            for bit in range(bits, 20):
                assert machine.fault(0x7ABC, pid=1 << bit) == 260
            # without process_id: Bare, or process 0 with DPE; with PDTV = 0 no process_id is allowed
            assert machine.translate(0x9000_0000).spa == (0x5000_0000 if second else 0x9000_0000)
            machine.context(DeviceContext.process_directory(processes.pdtp, DPE=True))
            assert machine.translate(0x7ABC).spa == target + 0xABC
            assert machine.fault(0x8ABC, priv=True) == 13
            machine.context(DeviceContext())
            assert machine.fault(0x7ABC, pid=0) == 260


def test_iommu_stages_process_defects():
    """MODEL-IOMMU-STAGE-6: each malformed process context and each pointer above it is 266 or 267, and silenced by DTF."""
    for capabilities, second in ((FULL, None), (FULL, SV39X4), (replace(FULL, Sv57=False), None)):
        machine = Machine(capabilities=capabilities, second=second)
        processes = ProcessDirectory(machine.view, machine.tables, levels=3, **machine.options)
        table = machine.first(SV39)
        if second:
            machine.second.map_page(0x9000_0000, 0x9000_0000)
        table.map_page(0x7000, 0x9000_0000)
        processes.set(0x5_4321, ProcessContext.first_stage(SV39, table.root, PSCID=1))
        for dtf in (False, True):
            machine.context(DeviceContext.process_directory(processes.pdtp, DTF=dtf))
            for name in [*processes.defects, *PDTE_DEFECTS]:
                for level in (1, 2) if name in PDTE_DEFECTS else (1,):
                    undo = processes.corrupt(0x5_4321, name, level=level)
                    request = Request(DEVICE, 0x7000, READ, pid=0x5_4321)
                    with pytest.raises(TranslationFault) as caught:
                        machine.iommu.translate(request)
                    assert caught.value.cause == (266 if name in ("PC_V_CLEAR", "PDTE_V_CLEAR") else 267), name
                    assert (machine.iommu.record(request, caught.value) is None) == dtf
                    undo()
                    assert machine.translate(0x7000, pid=0x5_4321).spa == 0x9000_0000
    assert {one.check for one in process_context_defects({"Sv39"}).values()} >= {0, 1, 2, 3}
    assert {one.check for one in process_context_defects(set(), sxl=True).values()} >= {0, 1, 2, 4}


def test_iommu_stages_supervisors():
    """MODEL-IOMMU-STAGE-7: privilege, ENS, SUM and U for each access; a supervisor never executes a user's page."""
    machine = Machine()
    processes = ProcessDirectory(machine.view, machine.tables, levels=1, **machine.options)
    table = machine.first(SV39)
    table.map_page(0x1000, 0x1000, perms="rwxu")
    table.map_page(0x2000, 0x2000, perms="rwx")
    machine.context(DeviceContext.process_directory(processes.pdtp))
    for pid, (ens, sum_) in enumerate(((False, False), (True, False), (True, True))):
        processes.set(pid, ProcessContext.first_stage(SV39, table.root, PSCID=pid, ENS=ens, SUM=sum_))
        for access in AccessType:
            assert machine.translate(0x1000, access, pid=pid).executable
            assert machine.fault(0x2000, access, pid=pid) == PAGE_FAULT[access]
            if not ens:
                assert machine.fault(0x1000, access, pid=pid, priv=True) == 260
                continue
            assert machine.translate(0x2000, access, pid=pid, priv=True) == Translation(0x2000, SIZE_4K)
            if sum_ and access is not EXEC:
                assert machine.translate(0x1000, access, pid=pid, priv=True) == Translation(0x1000, SIZE_4K, executable=False)
            else:
                assert machine.fault(0x1000, access, pid=pid, priv=True) == PAGE_FAULT[access]
    # a second stage asks for U whatever the privilege
    machine = Machine(second=SV39X4)
    processes = ProcessDirectory(machine.view, machine.tables, levels=1, **machine.options)
    table = machine.first(SV39)
    for n, perms in enumerate(("rwxu", "rwx")):
        machine.second.map_page(0x9000_0000 + n * 0x1000, 0x9000_0000, perms=perms)
        table.map_page(n << 12, 0x9000_0000 + n * 0x1000, perms="rwx")
    machine.context(DeviceContext.process_directory(processes.pdtp))
    processes.set(3, ProcessContext.first_stage(SV39, table.root, PSCID=0, ENS=True, SUM=True))
    for access in AccessType:
        assert machine.translate(0, access, pid=3, priv=True).spa == 0x9000_0000
        assert machine.fault(0x1000, access, pid=3, priv=True, iotval2=0x9000_1000) == GUEST_PAGE_FAULT[access]


SETS = [
    (FULL, 0, False), (replace(FULL, MSI_FLAT=True), 0, False), (Capabilities(), 0, False),
    (Capabilities(MSI_FLAT=True, Sv39x4=True), 0, False),
    (replace(FULL, AMO_HWAD=False, T2GPA=False, Sv57=False, Sv57x4=False, PD17=False), 0, False), (RV32, 4, True), (RV32, 0, True),
    (replace(FULL, Sv48=False, Sv57=False, QOSID=False), 0, True), (replace(FULL, PD8=False, PD20=False, Sv39x4=False), 0, False),
]


@pytest.mark.parametrize("capabilities, fctl, writable", SETS, ids=range(len(SETS)))
def test_iommu_stages_context_checks(capabilities, fctl, writable):
    """MODEL-IOMMU-STAGE-8: every check of the list of section 3.1.4, by capabilities: its defect is 259, the others' contexts pass.

    The check that fails is the one named.
    """
    machine = Machine(capabilities=capabilities, fctl=fctl, gxl_writable=writable, levels=3)
    gxl, extended = bool(fctl & 4), capabilities.MSI_FLAT
    goods = [DeviceContext(SXL=gxl, PSCID=5)]
    if capabilities.Sv39x4 or gxl:
        ats = dict.fromkeys(("EN_ATS", "EN_PRI", "PRPR", "T2GPA"), capabilities.T2GPA)
        goods.append(DeviceContext(SXL=gxl, iohgatp_mode=8, iohgatp_ppn=4, GSCID=1, **ats))
    if capabilities.PD8:
        goods.append(DeviceContext(SXL=gxl, PDTV=True, DPE=True, fsc_mode=1, DTF=True))
    if extended:
        goods.append(DeviceContext(iohgatp_mode=8, msiptp_mode=1, msi_addr_mask=7, msi_addr_pattern=0x123))
    for context in goods:
        machine.directory.set(DEVICE, context)
        at = machine.directory.entry_address(DEVICE)
        raw = machine.memory.read(at, 64 if extended else 32)
        assert raw == context.pack(extended=extended)
        assert DeviceContext.unpack(raw) == context
        assert machine.iommu.locate(Request(DEVICE, 0, READ)) == context
        for name, defect in machine.directory.defects.items():
            undo = machine.directory.corrupt(DEVICE, name)
            assert machine.fault(0) == defect.cause, name
            if defect.check:
                dwords = [int.from_bytes(machine.memory.read(at + 8 * n, 8), "little") for n in range(len(raw) // 8)]
                wrong = context_misconfigurations(tuple(dwords), capabilities, fctl, machine.iommu.implementation)
                number = 19 if defect.check == 21 else defect.check
                assert any(one.startswith(f"check {number}:") for one in wrong), (name, wrong)
            undo()
        for name in DDTE_DEFECTS:
            for level in (1, 2):
                undo = machine.directory.corrupt(DEVICE, name, level=level)
                assert machine.fault(0) == (258 if name == "DDTE_V_CLEAR" else 259)
                undo()
        assert machine.directory.get(DEVICE) == context


def test_iommu_stages_context_checks_are_all_hit():
    """MODEL-IOMMU-STAGE-9: every numbered check is reached by some defect above; QoS IDs as wide as the unit, and END, are judged."""
    hit = set()
    for capabilities, fctl, writable in SETS:
        hit |= {one.check for one in device_context_defects(capabilities.switched_on(), extended=capabilities.MSI_FLAT, gxl=bool(fctl & 4),
                                                            gxl_writable=writable).values()}
    without_32 = device_context_defects(replace(RV32, Sv32=False, Sv32x4=False).switched_on(), gxl=True)
    hit |= {one.check for one in without_32.values()}
    assert hit == set(range(24)) - {19, 22}  # 19 is 21 for software; 22 is here:
    machine = Machine(implementation=Implementation(rcid_bits=4, mcid_bits=6))
    for rcid, mcid, good in ((15, 63, True), (16, 0, False), (0, 64, False)):
        machine.directory.set(DEVICE, DeviceContext(RCID=rcid, MCID=mcid))
        if good:
            assert (machine.translate(0).rcid, machine.translate(0).mcid) == (rcid, mcid)
        else:
            assert machine.fault(0) == 259
    machine = Machine(capabilities=replace(RV32, Sv32=False, Sv32x4=False), fctl=4)
    for fields in ({"fsc_mode": 8}, {"iohgatp_mode": 8}, {"fsc_mode": 9}, {"iohgatp_mode": 9}):
        machine.directory.set(DEVICE, DeviceContext(SXL=True, **fields))
        assert machine.fault(0) == 259
    for end, be, sbe, good in ((False, 0, False, True), (False, 0, True, False), (False, 1, False, False), (False, 1, True, True),
                               (True, 0, True, True), (True, 1, False, True)):
        machine = Machine(capabilities=replace(FULL, END=end), fctl=be)
        machine.directory.set(DEVICE, DeviceContext(SBE=sbe))
        if good:
            assert machine.translate(0x123).spa == 0x123
        else:
            assert machine.fault(0) == 259
    for message, values in (("RCID", {"rcid_bits": 13}), ("MCID", {"mcid_bits": -1}), ("without translation", {"bare_size": 5000})):
        with pytest.raises(ValueError, match=message):
            Implementation(**values)


def test_iommu_stages_memory_types_and_napot():
    """MODEL-IOMMU-STAGE-10: PBMT of the first stage unless it is PMA; 64 KiB pages in either stage, whose reserved forms fault."""
    machine = Machine(second=SV39X4)
    table = machine.first(SV39)
    for n in range(9):
        machine.second.map_page(0x9000_0000 + n * 0x1000, 0xA000_0000, pbmt=n % 3)
        table.map_page(n << 12, 0x9000_0000 + n * 0x1000, pbmt=n // 3)
    machine.second.map_page(0xB000_0000, 0x7_0000, size=SIZE_64K, perms="rwxu")
    machine.second.map_page(0xB001_0000, 0x9_0000, perms="rwxu")
    table.map_page(0x10_0000, 0xB000_0000, size=SIZE_64K)
    table.map_page(0x20_0000, 0xB000_3000)
    table.map_page(0x30_0000, 0xB001_0000, size=SIZE_64K)
    machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1))
    assert [machine.translate(n << 12).pbmt for n in range(9)] == [0, 1, 2, 1, 1, 1, 2, 2, 2]
    assert machine.translate(0x10_5678).spa == 0x7_5678
    assert machine.translate(0x10_5678).size == SIZE_64K
    assert (machine.translate(0x20_0ABC).spa, machine.translate(0x20_0ABC).size) == (0x7_3ABC, SIZE_4K)
    assert (machine.translate(0x30_0ABC).spa, machine.translate(0x30_0ABC).size) == (0x9_0ABC, SIZE_4K)
    for stage, address in ((table, 0x20_0000), (machine.second, 0xB001_0000)):
        for low in range(16):
            if low != 8:
                undo = stage.corrupt(address, f"LEAF_NAPOT_RESERVED_{low}")
                assert machine.fault(0x20_0000) == 13 if stage is table else machine.fault(0x30_0000, iotval2=0xB001_0000) == 21
                undo()


class Holes:
    """Memory whose read number ``at`` fails for ``reason``."""

    def __init__(self, memory):
        self.memory, self.count, self.at, self.reason = memory, 0, None, ""

    def read(self, address, length):
        self.count += 1
        if self.count - 1 == self.at:
            raise AccessFault(address, length, False, self.reason)
        return self.memory.read(address, length)

    def write(self, address, data):
        raise AccessFault(address, len(data), True, "read-only")


def test_iommu_stages_unreadable_tables():
    """MODEL-IOMMU-STAGE-11: each read of a two-stage walk through a process directory that fails gives the cause of its table.

    257 and 268, 265 and 269 for the directory and the second stage under it, then access faults of the request and 274.
    """
    machine = Machine(second=SV39X4, capabilities=replace(FULL, PAS=46))
    processes = ProcessDirectory(machine.view, machine.tables, levels=2, **machine.options)
    table = machine.first(SV39)
    machine.second.map_page(0x9000_0000, 0x9000_0000, perms="rwxu")
    table.map_page(0x7000, 0x9000_0000, perms="rwxu")
    processes.set(0x1_2345, ProcessContext.first_stage(SV39, table.root, PSCID=1))
    machine.context(DeviceContext.process_directory(processes.pdtp))
    machine.iommu.translate(Request(DEVICE, 0x7123, READ, pid=0x1_2345), trace=True)
    lengths = [len(step.entry) * 8 for step in machine.iommu.steps if step.address is not None]
    assert lengths == [32, *[8] * 4, *[8] * 3, 16, *[8] * 12, *[8] * 3]
    holes = Holes(machine.memory)
    machine.iommu.memory = holes
    for n in range(len(lengths)):
        for access in AccessType:
            for reason, cause in (("unmapped", 257 if n == 0 else 265 if n < 9 else ACCESS_FAULT[access]),
                                  ("poisoned", 268 if n == 0 else 269 if n < 9 else 274)):
                holes.count, holes.at, holes.reason = 0, n, reason
                assert machine.fault(0x7123, access, pid=0x1_2345) == cause
    holes.at = None
    assert machine.translate(0x7123, pid=0x1_2345).spa == 0x9000_0123
    # an address beyond PAS is an access fault that reads nothing
    for field, read_count, cause in (("fsc_ppn", 1, 5), ("iohgatp_ppn", 1, 5)):
        machine = Machine(capabilities=replace(FULL, PAS=40))
        machine.directory.set(DEVICE, DeviceContext(**{field: 1 << 28, field.replace("ppn", "mode"): 8}))
        assert (machine.fault(0x1000), machine.iommu.last_read_count) == (cause, read_count)


def test_iommu_stages_updates():
    """MODEL-IOMMU-STAGE-12: with SADE and GADE, A and D are set where and when the access needs them, and nothing else is."""
    for sade in (False, True):
        for gade in (False, True):
            for a, d in ((False, False), (True, False)):
                for stage in (0, 1):
                    for access in AccessType:
                        machine = Machine(second=SV39X4, updates=(sade, gade))
                        table = machine.first(SV39)
                        bits = ({"a": a, "d": d}, {}) if stage == 0 else ({}, {"a": a, "d": d})
                        machine.second.map_page(0x9000_0000, 0x9000_0000, perms="rwxu", **bits[1])
                        table.map_page(0x7000, 0x9000_0000, perms="rwxu", **bits[0])
                        machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1))
                        before, entry = machine.memory.snapshot(), (table.entry(0x7000), machine.second.entry(0x9000_0000))[stage]
                        is_needed = not a or access is WRITE
                        if is_needed and not (sade, gade)[stage]:
                            cause, iotval2 = ((PAGE_FAULT, 0), (GUEST_PAGE_FAULT, 0x9000_0000))[stage]
                            assert machine.fault(0x7000, access, iotval2=iotval2) == cause[access]
                            assert not before.differences(machine.memory)
                            continue
                        found = machine.translate(0x7000, access)
                        assert found.writable == (access is WRITE)
                        expected = entry | 1 << 6 | (access is WRITE) << 7
                        assert (table.entry(0x7000), machine.second.entry(0x9000_0000))[stage] == expected
                        assert len(before.differences(machine.memory)) == machine.iommu.update_count == is_needed
                        assert machine.translate(0x7000, access) == found
                        assert machine.iommu.update_count == is_needed
    # without atomic requests an access that needs one faults as if SADE and GADE were 0, and others pass
    machine = Machine(second=SV39X4, updates=(True, True), implementation=Implementation(atomics=False))
    table = machine.first(SV39)
    machine.second.map_page(0x9000_0000, 0x9000_0000, d=False)
    machine.second.map_page(0x9000_1000, 0x9000_1000)
    for n, bits in enumerate(({}, {"a": False}, {"d": False})):
        table.map_page(n << 12, 0x9000_0000 + (n > 0) * 0x1000, **bits)
    machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1))
    assert machine.translate(0).spa == 0x9000_0000
    assert machine.fault(0, WRITE, iotval2=0x9000_0000) == 23
    assert (machine.fault(0x1000), machine.fault(0x1000, WRITE), machine.fault(0x2000, WRITE)) == (13, 15, 15)
    assert machine.translate(0x2000).spa == 0x9000_1000


def test_iommu_stages_updates_of_tables():
    """MODEL-IOMMU-STAGE-13: setting A in a guest's table is an implicit write: it needs W and D of the second stage; iotval2[1:0]."""
    def build(**second):
        machine = Machine(second=SV39X4, updates=(True, second.pop("gade", True)))
        table = machine.first(SV39)
        machine.second.map_page(0x9000_0000, 0x9000_0000)
        table.map_page(0x7000, 0x9000_0000, a=False, d=False)
        table.map_page(0x8000, 0x9000_0000)
        leaf_page = table._slot(0x7000, 0) & ~0xFFF
        machine.second.protect(leaf_page, **second)
        machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1))
        return machine, table, leaf_page

    machine, _, page = build(perms="ru")
    for access in (READ, WRITE):
        assert machine.fault(0x7000, access, iotval2=page | 3) == GUEST_PAGE_FAULT[access]
        assert machine.translate(0x8000, access).spa == 0x9000_0000
    machine, _, page = build(perms="rwu", d=False, gade=False)
    assert machine.fault(0x7000, iotval2=page | 3) == 21
    assert machine.translate(0x8000, WRITE).spa == 0x9000_0000
    machine, table, page = build(perms="rwu", d=False)
    assert machine.translate(0x8000, WRITE).spa == 0x9000_0000
    assert machine.iommu.update_count == 0
    assert machine.translate(0x7000).spa == 0x9000_0000
    assert machine.iommu.update_count == 2
    assert (machine.second.entry(page) >> 6 & 3, table.entry(0x7000) >> 6 & 3) == (3, 1)
    machine, table, page = build(perms="rwu", a=False, d=False)
    assert machine.translate(0x8000).spa == 0x9000_0000
    assert machine.second.entry(page) >> 6 & 3 == 1
    machine, _, page = build(perms="rwu", a=False, gade=False)
    assert machine.fault(0x8000, WRITE, iotval2=page | 1) == 23


def test_iommu_stages_updates_race():
    """MODEL-IOMMU-STAGE-14: a table that another changes between read and update is read again; a refused store is an access fault."""
    machine = Machine(updates=(True, False))
    table = machine.first(SV39)
    table.map_page(0x7000, 0x9000_0000, a=False, d=False)
    machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1))
    at, calls = table._slot(0x7000, 0), []

    def other(address, length, is_write):
        if address == at:
            calls.append(is_write)
            if len(calls) == 2:  # just before the compare of the update
                machine.memory.write(at, (0xA000_0000 >> 12 << 10 | 0x17).to_bytes(8, "little"))

    machine.memory.interleaver = other
    assert machine.translate(0x7000, WRITE).spa == 0xA000_0000
    assert machine.memory.interleaver is other
    assert calls == [False] * 4  # read, compare, read again, compare: the store has no gap before it
    machine.memory.interleaver = None
    assert table.entry(0x7000) == 0xA000_0000 >> 12 << 10 | 0xD7
    table.unmap(0x7000)
    table.map_page(0x7000, 0x9000_0000, a=False)

    def restless(address, length, is_write):
        if address == at:
            machine.memory.write(at, (table.entry(0x7000) ^ 1 << 20).to_bytes(8, "little"))

    machine.memory.interleaver = restless
    with pytest.raises(RuntimeError, match="must not change 1000 times"):
        machine.translate(0x7000)
    machine.memory.interleaver = None
    holes = Holes(machine.memory)
    machine.iommu.memory = holes
    for access in AccessType:
        table.protect(0x7000, "rwxu", a=False)
        assert machine.fault(0x7000, access) == ACCESS_FAULT[access]
        assert table.entry(0x7000) & 1 << 6 == 0
    holes.at, holes.reason, holes.count = 4, "poisoned", 0
    assert machine.fault(0x7000) == 274


@pytest.mark.parametrize("gxl", [False, True])
def test_iommu_stages_rv32(gxl):
    """MODEL-IOMMU-STAGE-15: SXL = 1: Sv32 tables, IOVAs of 32 bits, GPAs of 34, whatever the second stage could translate."""
    machine = Machine(capabilities=RV32, fctl=gxl << 2, gxl_writable=True, second=SV32X4 if gxl else SV48X4)
    table = machine.first(SV32)
    machine.second.map_page(0x3_0000_0000, 0x3_4000_0000, size=SV32X4.size_of_level(1) if gxl else 0x20_0000)
    if not gxl:
        machine.second.map_page(0x4_0000_0000, 0x1000)
    table.map_page(0xFFC0_0000, 0x3_0000_0000, size=0x40_0000)
    table.map_page(0x8000_1000, 0x3_0000_1000)
    context = machine.context(DeviceContext.first_stage(SV32, table.root, PSCID=1))
    assert context.SXL
    assert machine.translate(0xFFC0_1234, WRITE) == Translation(0x3_4000_1234, 0x40_0000 if gxl else 0x20_0000, executable=False)
    assert machine.translate(0x8000_1234).size == SIZE_4K
    assert machine.fault(0x1_FFC0_1234, EXEC) == 12
    assert machine.fault(1 << 63 | 0x8000_1000) == 13
    assert machine.fault(0x1000) == 13
    machine.context(DeviceContext(SXL=True))
    assert machine.translate(0x3_0000_0000).spa == 0x3_4000_0000
    assert machine.fault(0x4_0000_0000, iotval2=0x4_0000_0000) == 21
    if not gxl:
        machine.context(DeviceContext())
        assert machine.translate(0x4_0000_0000).spa == 0x1000


def test_iommu_stages_big_endian():
    """MODEL-IOMMU-STAGE-16: fctl.BE turns directory and second stage around, SBE process directory and first stage."""
    for be in (0, 1):
        for sbe in ("little", "big"):
            machine = Machine(capabilities=replace(FULL, END=True), fctl=be, second=SV39X4, updates=(True, True))
            machine.options["order"] = sbe
            processes = ProcessDirectory(machine.view, machine.tables, levels=2, **machine.options)
            table = machine.first(SV39)
            machine.second.map_page(0x9000_0000, 0x1234_5000, a=False)
            table.map_page(0x7000, 0x9000_0000, a=False)
            processes.set(0x123, ProcessContext.first_stage(SV39, table.root, PSCID=1))
            machine.context(DeviceContext.process_directory(processes.pdtp, SBE=sbe == "big"))
            assert machine.translate(0x7ABC, pid=0x123).spa == 0x1234_5ABC
            assert (machine.second.entry(0x9000_0000), table.entry(0x7000)) == (0x12345 << 10 | 0xD7, 0x9_0000 << 10 | 0xD7)
            entry = machine.memory.read(machine.directory.entry_address(DEVICE), 8)
            assert int.from_bytes(entry, "big" if be else "little") & 1
            machine.context(DeviceContext.process_directory(processes.pdtp, SBE=sbe != "big"))
            with pytest.raises(TranslationFault):
                machine.translate(0x7ABC, pid=0x123)


def test_iommu_stages_translated_requests():
    """MODEL-IOMMU-STAGE-17: translated requests pass with EN_ATS, go through the second stage with T2GPA, else are 260; Off is 256."""
    machine = Machine(second=SV39X4)
    table = machine.first(SV39)
    machine.second.map_page(0x9000_0000, 0x1234_5000, perms="rwu")
    machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1))
    translated, types = {"kind": RequestKind.TRANSLATED}, {READ: 6, WRITE: 7, EXEC: 5}
    for access in AccessType:
        assert machine.fault(0x9000_0000, access, **translated) == 260
    machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1, EN_ATS=True))
    assert machine.translate(1 << 60 | 0x123, WRITE, **translated) == Translation(1 << 60 | 0x123, 1 << 64)
    machine.context(DeviceContext.first_stage(SV39, table.root, PSCID=1, EN_ATS=True, T2GPA=True))
    for access in AccessType:
        request = Request(DEVICE, 0x9000_0123, access, **translated)
        if access is EXEC:
            fault = machine.fault(0x9000_0123, access, iotval2=0x9000_0000, **translated)
            assert fault == 20
        else:
            assert machine.iommu.translate(request).spa == 0x1234_5123
        assert request.ttyp == types[access]
    assert machine.fault(0x9000_1000, WRITE, iotval2=0x9000_1000, **translated) == 23
    for mode, cause in ((IommuMode.OFF, Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED), (IommuMode.BARE, Cause.TRANSACTION_TYPE_DISALLOWED)):
        machine.iommu.registers.ddtp = int(mode)
        assert machine.fault(0x9000_0000, **translated) == cause
        assert machine.fault(0x9000_0000, kind=RequestKind.ATS) == cause
    with pytest.raises(ValueError, match="must be a read"):
        Request(0, 0, WRITE, kind=RequestKind.ATS)


def test_iommu_stages_extended_ids():
    """MODEL-IOMMU-STAGE-18: in the extended format levels reach 6, 15 and 24 bits of device_id; one bit more is 260. By hand: 0xC00182."""
    capabilities = replace(FULL, MSI_FLAT=True)
    for levels, bits in ((1, 6), (2, 15), (3, 24)):
        machine = Machine(capabilities=capabilities, levels=levels)
        for bit in range(bits):
            machine.directory.set(1 << bit, DeviceContext(RCID=bit))
        for bit in range(bits):
            assert machine.iommu.translate(Request(1 << bit, 0x123, READ)).rcid == bit
            assert machine.iommu.last_read_count == levels
        for bit in range(bits, 24):
            with pytest.raises(TranslationFault) as caught:
                machine.iommu.translate(Request(1 << bit, 0x123, READ))
            assert caught.value.cause == 260
        with pytest.raises(ValueError, match="Device id must fit"):
            machine.directory.set(1 << bits, DeviceContext())
    memory = GuestMemory()
    for address, value in ((0x1000 + 0x180 * 8, 0x2 << 10 | 1), (0x2000 + 6 * 8, 0x3 << 10 | 1), (0x3000 + 2 * 64, 1)):
        memory.write(address, value.to_bytes(8, "little"))
    iommu = Iommu(memory, capabilities, registers=PlainRegisters(0x1 << 10 | 4))
    assert iommu.translate(Request(0xC00182, 0x5000, WRITE)).spa == 0x5000
