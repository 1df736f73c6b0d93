"""Translation requests, page requests and a whole unit: debug translation, counters, interrupts. [RVIOMMU1.0 3.6, 3.7, 4.3, 5, 6]"""

from contextlib import nullcontext
from dataclasses import replace

import pytest

from ringwall.models.iommu.ats import (
    AtsStatus,
    PageRequest,
    PrgCode,
    PrgResponse,
    TranslationCompletion,
    napot_page,
    translation_completion,
)
from ringwall.models.iommu.commands import IodirInvalDdt, IofenceC
from ringwall.models.iommu.entries import SIZE_2M, SIZE_4K, SIZE_64K, SV39, SV39X4, DeviceContext, MsiPte, ProcessContext
from ringwall.models.iommu.faults import AccessType, Cause, FaultRecord, TransactionType, TranslationFault
from ringwall.models.iommu.hpm import Event, EventIds, EventSelector
from ringwall.models.iommu.msi import Notice
from ringwall.models.iommu.registers import Capabilities, Igs, IommuMode
from ringwall.models.iommu.tables import Allocator, DeviceDirectory, GuestView, MsiTable, PageTable, ProcessDirectory
from ringwall.models.iommu.unit import Unit
from ringwall.models.iommu.walk import Implementation, Iommu, PlainRegisters, Request, RequestKind
from ringwall.models.memory import GuestMemory

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
POOL, DEVICE, FILE, PAGES = 0x8000_0000, 0x1_2345, 0x2800_0000, 0x1000_0000
FULL = Capabilities(Sv39x4=True, Svpbmt=True, ATS=True, T2GPA=True, PD8=True, AMO_HWAD=True, MSI_FLAT=True, MSI_MRIF=True, HPM=True,
                    DBG=True, END=True, IGS=Igs.BOTH)
DDTP, PQB, PQH, PQT, PQCSR, FQB, FQCSR, IPSR, TR_IOVA, TR_CTL, TR_RESPONSE = (
    0x10, 0x38, 0x40, 0x44, 0x50, 0x28, 0x4C, 0x54, 0x258, 0x260, 0x268)


class Machine:
    """A unit in mode 3LVL with all queues on, DEVICE with a process directory, its process 1 with an Sv39 table, perhaps two stages."""

    def __init__(self, *, two_stages=False, msi=False, fctl=0, implementation=Implementation(), **context):
        self.memory = GuestMemory(all_ram=False)
        self.memory.add_range(POOL, 0x400_0000)
        self.allocator = Allocator(self.memory, POOL, 0x400_0000)
        self.unit = Unit(self.memory, FULL, implementation=implementation, reset_mode=IommuMode.OFF, counters=4)
        registers, self.order = self.unit.registers, "big" if fctl & 1 else "little"
        registers.write(8, 4, fctl)
        self.queues = self.allocator.pages(4)
        for n, (base, csr) in enumerate(((0x18, 0x48), (FQB, FQCSR), (PQB, PQCSR))):
            registers.write(base, 8, (self.queues >> 12) + n << 10 | 1)  # 4 entries
            registers.write(csr, 4, 1)
        self.directory = DeviceDirectory(self.memory, self.allocator, levels=3, extended=True, order=self.order)
        registers.write(DDTP, 8, self.directory.ddtp)
        view, tables = self.memory, self.allocator
        self.second = self.msi = None
        if two_stages:
            self.second = PageTable(self.memory, self.allocator, scheme=SV39X4, order=self.order)
            for n in range(16):
                self.second.map_page(PAGES + n * 0x1000, self.allocator.page())
            view = GuestView(self.memory, self.second)
            tables = Allocator(view, PAGES, 0x1_0000)
        self.processes = ProcessDirectory(view, tables, levels=1)
        self.table = PageTable(view, tables)
        self.processes.set(1, ProcessContext.first_stage(SV39, self.table.root, PSCID=0x55, ENS=True))
        self.processes.set(2, ProcessContext.first_stage(SV39, self.table.root, PSCID=0x55, ENS=True, SUM=True))
        self.context(**context)
        if msi:
            self.msi = MsiTable(self.memory, self.allocator, mask=1, pattern=FILE >> 12)
            self.context(**context)

    def context(self, **fields):
        context = DeviceContext.process_directory(self.processes.pdtp, **{"EN_ATS": True, **fields})
        if self.second:
            context = context.with_second_stage(SV39X4, self.second.root, GSCID=0x77)
        if self.msi:
            context = context.with_msi_table(self.msi.root, mask=1, pattern=FILE >> 12)
        self.directory.set(DEVICE, context)

    def ats(self, iova, access=READ, **options):
        return self.unit.complete(Request(DEVICE, iova, access, kind=RequestKind.ATS, **{"pid": 1, **options}))

    def records(self, count=3):
        """What lies in the fault queue, and how many of it are new."""
        raw = self.memory.read(self.queues + 0x1000, 32 * count)
        return [FaultRecord.unpack(raw[n * 32:n * 32 + 32]) for n in range(self.unit.registers.fqt)]


def test_iommu_ats_permissions():
    """MODEL-IOMMU-ATS-1: R, W, X of both stages, W with D, X with R and when asked for with PASID; a page without any is a success."""
    machine = Machine(two_stages=True)
    perms = ("ru", "rwu", "rxu", "rwxu", "xu")
    for n, first in enumerate(perms):
        for m, second in enumerate(perms):
            page = 0x9000_0000 + n * 0x1_0000 + m * 0x1000
            machine.second.map_page(page, page + 0x1000_0000, perms=second)
            machine.table.map_page(page, page, perms=first)
            for access in (READ, EXEC):
                found = machine.ats(page | 0x123, access)
                both = set(first) & set(second)
                assert found == TranslationCompletion(AtsStatus.SUCCESS, page + 0x1000_0000, SIZE_4K, "r" in both, "w" in both,
                                                      both >= set("rx") and access is EXEC)
    assert machine.records() == []
    assert not machine.ats(0x9003_3000, EXEC, pid=None).executable  # Execute Requested means nothing without PASID
    machine.table.map_page(0x7000, 0x9003_3000, d=False)
    machine.table.map_page(0x8000, 0x9003_3000, a=False)
    found = machine.ats(0x7000)
    assert (found.readable, found.writable) == (True, False)
    assert not machine.ats(0x8000).readable
    assert machine.unit.iommu.update_count == 0
    # with SADE: A is set, D only when writing is asked for and permitted
    machine.context(SADE=True)
    for iova, options, bits in ((0x8000, {"no_write": True}, 3), (0x7000, {"no_write": True}, 1), (0x7000, {}, 3)):
        assert machine.ats(iova, **options).readable
        assert machine.table.entry(iova) >> 6 & 3 == bits
    assert machine.ats(0x7000).writable
    machine.table.protect(0x7000, "ru", d=False)
    assert not machine.ats(0x7000).writable
    assert machine.table.entry(0x7000) >> 7 & 1 == 0


def test_iommu_ats_privilege():
    """MODEL-IOMMU-ATS-2: Priv is the request's, with PASID; U against the privilege gives no access, unless SUM; no ENS is UR, 260."""
    machine = Machine()
    for n, perms in enumerate(("rwxu", "rwx")):
        machine.table.map_page(n << 12, 0x9000_0000, perms=perms, g=True)
    for pid, priv, page, has in ((1, False, 0, True), (1, False, 1, False), (1, True, 0, False), (1, True, 1, True), (2, True, 0, True)):
        found = machine.ats(page << 12, pid=pid, priv=priv)
        assert (found.status, found.readable, found.privileged) == (AtsStatus.SUCCESS, has, priv)
        assert found.is_global == has
    assert not machine.ats(0, EXEC, pid=2, priv=True).readable  # a supervisor never executes a user's page
    assert machine.ats(0, priv=True, pid=None).size == SIZE_2M  # no PASID: not translated, not privileged
    assert not machine.ats(0, priv=True, pid=None).privileged
    machine.context(DPE=True)
    machine.processes.set(0, machine.processes.get(1))
    assert machine.ats(0, pid=None).readable
    assert not machine.ats(0, pid=None).is_global
    assert machine.records() == []
    machine.processes.set(1, replace(machine.processes.get(1), ENS=False))
    assert machine.ats(0, priv=True).status is AtsStatus.UNSUPPORTED_REQUEST
    assert machine.records() == [
        FaultRecord(Cause.TRANSACTION_TYPE_DISALLOWED, TransactionType.ATS_TRANSLATION_REQUEST, DEVICE, 1, True)]


def test_iommu_ats_faults():
    """MODEL-IOMMU-ATS-3: every cause that a translation request can have, and what it is answered; success is never recorded."""
    success, ur, ca = AtsStatus.SUCCESS, AtsStatus.UNSUPPORTED_REQUEST, AtsStatus.COMPLETER_ABORT
    answer = dict.fromkeys((12, 13, 20, 21, 262, 266), success) | dict.fromkeys((256, 257, 258, 259, 260), ur) | dict.fromkeys(
        (1, 5, 261, 263, 265, 267, 268, 269, 270, 274), ca)
    seen = set()

    def case(cause, build, *, access=READ, iova=0x7000, device=DEVICE, pid=1, **machine):
        m = Machine(**machine)
        if m.second:
            m.second.map_page(0x9000_0000, 0x9000_0000, perms="rwxu")
        m.table.map_page(0x7000, 0x9000_0000, perms="rwxu")
        m.table.map_page(0x8000, FILE)
        build(m)
        request = Request(device, iova, access, pid, kind=RequestKind.ATS)
        with pytest.raises(TranslationFault) as caught:
            m.unit.iommu.translate(request)
        assert caught.value.cause == cause
        completion = m.unit.complete(request)
        assert completion.status is answer[cause]
        assert not completion.readable
        assert not completion.writable
        expected = [] if completion.status is success else [
            FaultRecord(cause, 8, device, pid, iotval=iova, iotval2=caught.value.iotval2)]
        assert m.records() == expected
        seen.add(cause)

    def entry(m):
        return m.directory.entry_address(DEVICE)

    case(256, lambda m: m.unit.registers.write(DDTP, 8, 0))
    case(260, lambda m: [m.unit.registers.write(DDTP, 8, mode) for mode in (0, 1)])
    case(260, lambda m: m.context(EN_ATS=False))
    case(257, lambda m: m.memory.write(m.directory.entry_address(DEVICE, 1), (0x1000 << 10 | 1).to_bytes(8, "little")))
    case(258, lambda m: m.directory.clear(DEVICE))
    case(259, lambda m: m.directory.corrupt(DEVICE, "TC_RESERVED_13"))
    case(268, lambda m: m.memory.poison(entry(m), 1))
    case(266, lambda m: m.processes.clear(1))
    case(267, lambda m: m.processes.corrupt(1, "PC_TA_RESERVED_3"))
    case(269, lambda m: m.memory.poison(m.processes.entry_address(1), 1))
    case(265, lambda m: m.directory.set(DEVICE, replace(m.directory.get(DEVICE), fsc_ppn=1)))
    case(13, lambda m: m.table.unmap(0x7000))
    case(12, lambda m: m.table.unmap(0x7000), access=EXEC)
    case(274, lambda m: m.memory.poison(m.table._slot(0x7000, 0), 1))
    for access, cause in ((READ, 5), (EXEC, 1)):
        case(cause, lambda m: m.processes.set(1, ProcessContext.first_stage(SV39, 0x1000, PSCID=1)), access=access)
    for access, cause in ((READ, 21), (EXEC, 20)):
        case(cause, lambda m: m.second.unmap(0x9000_0000), two_stages=True, access=access)
    for cause, build in ((262, lambda m: None),
                         (263, lambda m: m.msi.set(FILE, MsiPte(spa=0)) or m.msi.corrupt(FILE, "MSI_PTE_CUSTOM", ())),
                         (270, lambda m: m.memory.poison(m.msi.entry_address(FILE), 1)),
                         (261, lambda m: m.directory.set(DEVICE, replace(m.directory.get(DEVICE), msiptp_ppn=1)))):
        case(cause, build, two_stages=True, msi=True, iova=0x8000)
    assert seen == set(answer)


def test_iommu_ats_fields():
    """MODEL-IOMMU-ATS-4: sizes, GPAs with T2GPA, MSI pages, U for files in memory, CXL.io; Bare stages are as large as chosen."""
    machine = Machine(two_stages=True, msi=True, implementation=Implementation(bare_size=1 << 30))
    machine.second.map_page(0x9000_0000, 0xA000_0000, size=SIZE_2M)
    machine.second.map_page(0xB000_0000, 0xC000_0000, size=SIZE_64K, pbmt=1)
    machine.table.map_page(0x4020_0000, 0x9000_0000, size=SIZE_2M, g=True)
    machine.table.map_page(0x7000, 0xB000_5000)
    machine.table.map_page(0x8000, FILE, g=True)
    machine.table.map_page(0x9000, FILE + 0x1000)
    machine.msi.set(FILE, MsiPte(spa=0x77_7000))
    machine.msi.set(FILE + 0x1000, MsiPte(mrif_address=0x1200, notice_address=0, nid=1))
    cases = ((0x4020_1234, 0xA000_0000, 0x9000_0000, SIZE_2M, True, False), (0x7000, 0xC000_5000, 0xB000_5000, SIZE_4K, False, True),
             (0x8000, 0x77_7000, FILE, SIZE_4K, False, True))
    for t2gpa in (False, True):
        machine.context(T2GPA=t2gpa)
        for iova, spa, gpa, size, is_global, is_io in cases:
            found = machine.ats(iova, is_cxl=True)
            assert (found.address, found.size, found.is_global, found.cxl_io) == (gpa if t2gpa else spa, size, is_global, is_io or t2gpa)
            assert not machine.ats(iova).cxl_io
            assert not found.untranslated_only
            assert not found.no_snoop
        found = machine.ats(0x9000, EXEC)
        assert (found.untranslated_only, found.readable, found.writable, found.executable) == (True, True, True, False)
    bare = machine.ats(0x9000_1234, pid=None)
    assert (bare.address, bare.size) == (0x9000_0000, SIZE_2M)
    machine = Machine(implementation=Implementation(bare_size=1 << 30))
    bare = machine.ats(0x9000_1234, pid=None)
    assert (bare.address, bare.size, bare.readable, bare.writable) == (0x8000_0000, 1 << 30, True, True)
    assert [napot_page(0x1234_5678, size) for size in (SIZE_4K, 1 << 13, SIZE_64K, SIZE_2M, 1 << 22)] == [
        (0x12345, False), (0x12344, True), (0x12347, True), (0x122FF, True), (0x121FF, True)]
    assert bare.page_and_s == (0x8000_0000 >> 12 | 0x1FFFF, True)
    with pytest.raises(ValueError, match="must be a translation request"):
        translation_completion(Iommu(machine.memory, registers=PlainRegisters()), Request(0, 0, READ))


def test_iommu_ats_page_requests():
    """MODEL-IOMMU-ATS-5: page requests are records in order; full is pqof and success, a failed write pqmf and failure, off is failure."""
    machine = Machine(EN_PRI=True)
    unit, registers = machine.unit, machine.unit.registers
    registers.write(PQCSR, 4, 3)
    request = PageRequest(DEVICE, 0x1234_5678_9000, 0x155, reads=True, writes=True, is_last=True, pid=0xABCDE, priv=True, is_exec=True)
    assert unit.receive(request) is None
    raw = machine.memory.read(machine.queues + 0x2000, 16)
    assert raw == (DEVICE << 40 | 7 << 32 | 0xABCDE << 12).to_bytes(8, "little") + (0x1234_5678_9000 | 0x155 << 3 | 7).to_bytes(8, "little")
    assert (registers.read(PQT, 4), registers.read(IPSR, 4)) == (1, 8)
    marker = PageRequest(DEVICE, is_last=True, pid=1)
    assert marker.is_stop_marker
    assert unit.receive(marker) is None
    assert unit.receive(replace(request, pid=None)) is None
    assert machine.memory.read(machine.queues + 0x2020, 8) == (DEVICE << 40).to_bytes(8, "little")
    registers.write(IPSR, 4, 8)
    for message, prpr, response in ((request, False, None), (request, True, 0xABCDE), (replace(request, pid=None), True, None)):
        machine.context(EN_PRI=True, PRPR=prpr)
        assert unit.receive(message) == PrgResponse(DEVICE, 0x155, PrgCode.SUCCESS, response)
        assert (registers.read(PQT, 4), registers.read(PQCSR, 4), registers.read(IPSR, 4)) == (3, 0x1_0203, 8)
    for silent in (marker, replace(request, is_last=False)):
        assert unit.receive(silent) is None
    registers.write(PQH, 4, 2)
    assert unit.receive(request).code is PrgCode.SUCCESS  # pqof still stands
    registers.write(PQCSR, 4, 0x203)
    assert unit.receive(request) is None
    assert registers.read(PQT, 4) == 0
    registers.write(PQCSR, 4, 0)
    machine.context(EN_PRI=True)
    failure = PrgResponse(DEVICE, 0x155, PrgCode.RESPONSE_FAILURE, 0xABCDE)  # with PASID whatever PRPR says
    assert unit.receive(request) == failure
    registers.write(PQB, 8, 0x1000 << 10 | 1)
    registers.write(PQCSR, 4, 1)
    for _ in range(2):
        assert unit.receive(request) == failure
        assert (registers.read(PQT, 4), registers.read(PQCSR, 4)) == (0, 0x1_0101)
    assert unit.receive(replace(request, pid=None)) == replace(failure, pid=None)
    machine.memory.add_range(0x100_0000, 0x1000)  # pqmf stands until it is cleared
    assert unit.receive(request) == failure
    assert (registers.read(PQT, 4), machine.memory.read(0x100_0000, 16)) == (0, bytes(16))
    registers.write(PQCSR, 4, 0x101)
    assert unit.receive(request) is None
    assert machine.memory.read(0x100_0000, 16) == request.pack()
    assert machine.records() == []
    for message, values in (("Device", {"device_id": 1 << 24}), ("Address", {"address": -1}), ("Group", {"group": 512}),
                            ("Process", {"pid": 1 << 20})):
        with pytest.raises(ValueError, match=message):
            replace(request, **values)


def test_iommu_ats_page_requests_refused():
    """MODEL-IOMMU-ATS-6: 256 to 259 are failures, 260 an invalid request; all are recorded as messages, 260 of EN_PRI unless DTF."""
    request = PageRequest(DEVICE, 0x1000, 5, reads=True, is_last=True, pid=3, priv=True)
    invalid, failure = PrgCode.INVALID_REQUEST, PrgCode.RESPONSE_FAILURE
    cases = (
        (256, failure, lambda m: m.unit.registers.write(DDTP, 8, 0)),
        (260, invalid, lambda m: [m.unit.registers.write(DDTP, 8, mode) for mode in (0, 1)]),
        (260, invalid, lambda m: [m.unit.registers.write(DDTP, 8, mode) for mode in (0, m.directory.root >> 2 | 3)]),  # 2LVL: too wide
        (257, failure, lambda m: m.memory.write(m.directory.root + 8 * 2, (0x1000 << 10 | 1).to_bytes(8, "little"))),
        (258, failure, lambda m: m.directory.clear(DEVICE)),
        (259, failure, lambda m: m.directory.corrupt(DEVICE, "TC_RESERVED_13")),
        (268, failure, lambda m: m.memory.poison(m.directory.entry_address(DEVICE), 1)),
        (260, invalid, lambda m: m.context(EN_PRI=False)), (260, invalid, lambda m: m.context(EN_ATS=False)),
        (None, invalid, lambda m: m.context(EN_PRI=False, DTF=True)),
    )
    for cause, code, build in cases:
        machine = Machine(EN_PRI=True, PRPR=True)
        build(machine)
        expected = PrgResponse(DEVICE, 5, code, 3 if code is failure else None)
        assert machine.unit.receive(request) == expected, cause
        assert machine.records() == ([] if cause is None else [FaultRecord(cause, 9, DEVICE, 3, True, 4)])
        assert machine.unit.receive(replace(request, is_last=False)) is None
        assert len(machine.records()) == (0 if cause is None else 2)
        assert machine.unit.registers.read(PQT, 4) == 0


def debug(machine, iova, *, pid=None, priv=False, exec_=False, nw=False, device=DEVICE, wide=True):
    """Ask through the registers; return tr_response."""
    registers = machine.unit.registers
    ctl = device << 40 | (pid is not None) << 32 | (pid or 0) << 12 | nw << 3 | exec_ << 2 | priv << 1 | 1
    registers.write(TR_IOVA, 8, iova)
    if wide:
        registers.write(TR_CTL, 8, ctl)
    else:
        registers.write(TR_CTL + 4, 4, ctl >> 32)
        assert not machine.unit.translate_for_debug()
        registers.write(TR_CTL, 4, ctl & 0xFFFF_FFFF)
    assert registers.read(TR_CTL, 8) == ctl
    registers.write(TR_CTL, 8, 0)  # neither cleared nor changed while it is busy
    registers.write(TR_IOVA, 8, 0)
    assert (registers.read(TR_CTL, 8), registers.read(TR_IOVA, 8)) == (ctl, iova & ~0xFFF)
    assert machine.unit.translate_for_debug()
    assert not machine.unit.translate_for_debug()
    assert registers.read(TR_CTL, 8) == ctl - 1
    return registers.read(TR_RESPONSE, 8)


def test_iommu_unit_debug():
    """MODEL-IOMMU-UNIT-1: tr_req_iova and tr_req_ctl give page, size and memory type, or a fault that is recorded; MRIF is 260."""
    machine = Machine(two_stages=True, msi=True)
    machine.second.map_page(0x9000_0000, 0xA020_0000, size=SIZE_2M, pbmt=2, perms="rwxu")
    machine.table.map_page(0x4020_0000, 0x9000_0000, size=SIZE_2M, perms="rxu")
    machine.table.map_page(0x7000, 0x9000_0000, perms="rw")
    machine.table.map_page(0x9000, FILE)
    machine.msi.set(FILE, MsiPte(mrif_address=0x1200, notice_address=0, nid=1))
    response = 0xA02FF << 10 | 1 << 9 | 2 << 7
    for wide in (True, False):
        assert debug(machine, 0x4020_1FFF, pid=1, nw=True, wide=wide) == response
    assert debug(machine, 0x4020_1000, pid=1, nw=True, exec_=True) == response
    assert machine.records() == []
    assert debug(machine, 0x4020_1000, pid=1) == 1  # write permission as well
    assert debug(machine, 0x7000, pid=1, nw=True) == 1
    assert debug(machine, 0x7000, pid=1, priv=True) == 0xA0200 << 10 | 2 << 7
    assert debug(machine, 0x9000, pid=1) == 1
    assert machine.records() == [FaultRecord(15, 3, DEVICE, 1, iotval=0x4020_1000), FaultRecord(13, 2, DEVICE, 1, iotval=0x7000),
                                 FaultRecord(260, 3, DEVICE, 1, iotval=0x9000)]
    machine = Machine()
    assert debug(machine, 0x1234_5000, nw=True, priv=True) == 0x122FF << 10 | 1 << 9  # Bare: Priv without PV is ignored
    machine.unit.registers.write(DDTP, 8, 0)
    assert debug(machine, 0x1234_5000) == 1
    assert machine.records()[0] == FaultRecord(256, 3, DEVICE, iotval=0x1234_5000)


def test_iommu_unit_counters():
    """MODEL-IOMMU-UNIT-2: what one cold translation counts, with the IDs of its stages; selectors count through the registers."""
    machine = Machine(two_stages=True)
    unit = machine.unit
    machine.second.map_page(0x9000_0000, 0x9000_0000)
    machine.table.map_page(0x7000, 0x9000_0000)
    start, guest = EventIds(DEVICE, 1), EventIds(DEVICE, 1, 0x77)
    stages = EventIds(DEVICE, 1, 0x77, 0x55)
    for n, selector in enumerate((EventSelector(8), EventSelector(8, dv_gscv=True, did_gscid=0x77, idt=True, pv_pscv=True, pid_pscid=0x55),
                                  EventSelector(1), EventSelector(3, dv_gscv=True, did_gscid=DEVICE + 1))):
        unit.registers.write(0x160 + 8 * n, 8, selector.value)
    unit.translate(Request(DEVICE, 0x7000, WRITE, 1))
    expected = [(Event.UNTRANSLATED_REQUEST, start), (Event.DDT_WALK, start), (Event.PDT_WALK, guest), (Event.SECOND_STAGE_WALK, guest),
                (Event.TLB_MISS, stages), (Event.FIRST_STAGE_WALK, stages), *[(Event.SECOND_STAGE_WALK, stages)] * 4]
    assert unit.iommu.events == expected
    unit.translate(Request(DEVICE, 0x9000_0000, READ))
    assert unit.iommu.events == [(event, EventIds(DEVICE, None, gscid)) for event, gscid in (
        (1, None), (5, None), (4, 0x77), (8, 0x77))]
    unit.translate(Request(DEVICE, 0x7000, READ, kind=RequestKind.TRANSLATED))
    assert [event for event, _ in unit.iommu.events] == [2, 5]
    machine.ats(0x7000)
    assert unit.iommu.events[0] == (Event.ATS_TRANSLATION_REQUEST, start)
    assert debug(machine, 0x7000, pid=1)
    with pytest.raises(TranslationFault):
        unit.translate(Request(DEVICE, 0x8000, READ, 1))
    assert [unit.registers.read(0x68 + 8 * n, 8) for n in range(4)] == [5 + 1 + 5 + 5 + 4, 4 + 4 + 4 + 3, 4, 0]


def test_iommu_unit_messages():
    """MODEL-IOMMU-UNIT-5: a message is recorded in memory and its notice written; one of either that cannot be is recorded with 264."""
    machine = Machine(two_stages=True, msi=True)
    unit, request, there, nowhere = machine.unit, Request(DEVICE, FILE, WRITE), POOL + 0x3FF_F000, 0x1000
    for bad, (file, notice) in enumerate(((there, there - 0x1000), (there, nowhere), (nowhere, there))):
        machine.memory.write(there, bytes(512))
        machine.msi.set(FILE, MsiPte(mrif_address=file, notice_address=notice, nid=0x123))
        with pytest.raises(TranslationFault) if bad else nullcontext():
            assert unit.write_msi(request, (70).to_bytes(4, "little")) == Notice(notice, 0x123)
        assert machine.records() == [FaultRecord(264, 3, DEVICE, iotval=FILE)] * bad
        assert machine.memory.read(there + 16, 8) == (64 * (file == there)).to_bytes(8, "little")
    assert machine.memory.read(there - 0x1000, 4) == (0x123).to_bytes(4, "little")


def test_iommu_unit_interrupts():
    """MODEL-IOMMU-UNIT-3: messages are written in the order of bytes of fctl.BE; one that cannot be is record 273, whose own ends there."""
    for be in (0, 1):
        machine = Machine(fctl=be)
        unit, registers = machine.unit, machine.unit.registers
        registers.write(0x300, 8, POOL + 0x3FF_F000)
        registers.write(0x308, 4, 0x1122_3344)
        registers.write(0x30C, 4, 0)
        registers.write(FQCSR, 4, 3)
        with pytest.raises(TranslationFault):
            unit.translate(Request(1, 0x1000, READ))
        sent = unit.send_interrupts()
        assert [(message.address, message.data) for message in sent] == [(POOL + 0x3FF_F000, 0x1122_3344)]
        assert machine.memory.read(POOL + 0x3FF_F000, 4) == (0x1122_3344).to_bytes(4, "big" if be else "little")
        assert unit.send_interrupts() == []
        raw = machine.memory.read(machine.queues + 0x1000, 8)
        assert raw == (1 << 40 | 2 << 34 | 258).to_bytes(8, "big" if be else "little")
    machine = Machine()
    unit, registers = machine.unit, machine.unit.registers
    registers.write(0x300, 8, 0x1000)
    registers.write(0x30C, 4, 0)
    registers.write(FQCSR, 4, 3)
    with pytest.raises(TranslationFault):
        unit.translate(Request(1, 0x1000, READ))
    assert len(unit.send_interrupts()) == 1
    assert machine.records()[1:] == [FaultRecord(273, 0, iotval=0x1000)]
    registers.write(IPSR, 4, 2)
    assert unit.send_interrupts() == []


def test_iommu_unit_commands_and_failures():
    """MODEL-IOMMU-UNIT-4: a unit runs its queue to the end or to where it waits, and goes on after a fault of each queue."""
    machine = Machine(EN_PRI=True)
    unit, registers = machine.unit, machine.unit.registers
    for n, command in enumerate((IodirInvalDdt(), IofenceC(address=machine.queues + 0x3000, data=7), IofenceC())):
        machine.memory.write(machine.queues + 16 * n, command.encode())
    registers.write(0x24, 4, 3)
    assert len(unit.run_commands()) == 3
    assert unit.run_commands() == []
    assert machine.memory.load_l_le(machine.queues + 0x3000) == 7
    for n in range(5):
        with pytest.raises(TranslationFault):
            unit.translate(Request(n, 0x1000, READ))
    assert registers.fqof
    registers.write(0x30, 4, 3)
    registers.write(FQCSR, 4, 0x201)
    with pytest.raises(TranslationFault):
        unit.translate(Request(9, 0x1000, READ))
    assert FaultRecord.unpack(machine.memory.read(machine.queues + 0x1060, 32)).device_id == 9
