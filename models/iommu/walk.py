"""How a request is translated, or why it is refused: the procedure of the specification, step by step.

Every capability is modelled. No caches: an answer is what the tables in memory say now; `cache.py` tells which older
answers are still allowed. The processes that the procedure invokes are in `directory.py`, `first_stage.py`, `msi.py`
and `second_stage.py`; what a translation request is answered is in `ats.py`. [RVIOMMU1.0 3.3]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..memory import Gpa, Spa
from .directory import context_misconfigurations, device_id_parts, locate_device_context, locate_process_context
from .entries import IOSATP_BARE, PDTP_BARE, PROCESS_ID_BITS, DeviceContext
from .faults import AccessType, Cause, FaultRecord, TranslationFault
from .first_stage import FirstStage, first_stage
from .hpm import Event, EventIds
from .msi import MrifFault, Notice, region_without_interrupt_files, store_msi, translate_msi
from .registers import Capabilities, IommuMode
from .second_stage import second_stage
from .tables import Memory
from .walk_state import (
    UNTRANSLATED_SIZE,
    Implementation,
    Mrif,
    Request,
    RequestKind,
    Step,
    Translation,
    TranslationRegisters,
    Walk,
)

__all__ = [
    "UNTRANSLATED_SIZE", "Implementation", "Iommu", "Mrif", "PlainRegisters", "Request", "RequestKind", "Step", "Translation",
    "TranslationRegisters", "context_misconfigurations",
]  # fmt: skip

_REQUEST_EVENT = {
    RequestKind.UNTRANSLATED: Event.UNTRANSLATED_REQUEST,
    RequestKind.TRANSLATED: Event.TRANSLATED_REQUEST,
    RequestKind.ATS: Event.ATS_TRANSLATION_REQUEST,
}


@dataclass
class PlainRegisters:
    """`TranslationRegisters` as two numbers that anyone may set; Bare at first."""

    ddtp: int = int(IommuMode.BARE)
    fctl: int = 0


class Iommu:
    """Translates one request per call from the tables in ``memory``. [RVIOMMU1.0 3.3]

    Parameters
    ----------
    memory : :class:`Memory`
        ``read`` may raise `AccessFault`; reason "poisoned" is data corruption, anything else an access fault. It is
        written only where contexts have SADE or GADE.
    capabilities : :class:`Capabilities`
        Decides what entries may say.
    registers : :class:`TranslationRegisters` or None
        ddtp and fctl; None makes a pair of plain numbers.
    implementation : :class:`Implementation`
        What the specification leaves open.

    Attributes
    ----------
    read_count, update_count : :class:`int`
        Reads of table entries so far (a context is one), and atomic updates of A and D.
    last_read_count : :class:`int`
        Reads of the last translation.
    steps : list of :class:`Step`
        Of the last translation that was traced, also when it ended in a fault.
    events : list of pairs of :class:`Event` and :class:`EventIds`
        What the last translation would count in an IOMMU whose caches are empty.
    context : :class:`DeviceContext` or None
        The one that the last translation located.
    """

    def __init__(self, memory: Memory, capabilities: Capabilities = Capabilities(), *,
                 registers: TranslationRegisters | None = None, implementation: Implementation = Implementation()):
        self.memory, self.capabilities, self.implementation = memory, capabilities, implementation
        self.registers: TranslationRegisters = PlainRegisters() if registers is None else registers
        self.read_count = self.last_read_count = self.update_count = 0
        self.steps: list[Step] = []
        self.events: list[tuple[Event, EventIds]] = []
        self.context: DeviceContext | None = None

    def translate(self, request: Request, *, trace: bool = False) -> Translation:
        """Return the translation, or raise `TranslationFault`; with ``trace`` the steps are kept in ``steps``.

        Of a translation request (kind ATS) what is permitted is collected: see `ats.translation_completion`.
        """
        walk = self.begin(request, trace)
        try:
            return self._translate(walk)
        finally:
            self._keep(walk)

    def locate(self, request: Request) -> DeviceContext:
        """Return the device context, by steps 1 to 6 alone, or raise `TranslationFault`: for messages. [RVIOMMU1.0 3.7]"""
        walk = self.begin(request)
        try:
            return self._locate(walk)
        finally:
            self._keep(walk)

    def write_msi(self, request: Request, data: bytes, *, accepts_big_endian: bool = False) -> Notice | None:
        """Do what a write of ``data`` to a virtual interrupt file in MRIF mode does: record it, and return the notice due.

        :exc:`ValueError` when the request does not lead to one, or is not 4 aligned bytes; `TranslationFault` with cause
        264 or 271 when the file cannot be accessed. `store_msi` says more. [RVIOMMU1.0 3.3.3]
        """
        found = self.translate(request)
        if found.mrif is None or found.gpa is None or request.access is not AccessType.WRITE:
            raise ValueError(f"A request must be a write to an interrupt file in memory, not {request!r}")
        try:
            return store_msi(self.memory, found.mrif, found.gpa, data, is_atomic=self.capabilities.AMO_MRIF,
                             accepts_big_endian=accepts_big_endian)
        except MrifFault as error:
            raise TranslationFault(error.cause, request.iova, dtf=self.context.DTF) from error

    def record(self, request: Request, fault: TranslationFault) -> FaultRecord | None:
        """Return the record that is due for ``fault``, or None when DTF silences it. [RVIOMMU1.0 4.2]"""
        if not fault.is_logged:
            return None
        return FaultRecord(cause=fault.cause, ttyp=request.ttyp, device_id=request.device_id,
                           process_id=request.pid, priv=request.is_supervisor,
                           iotval=fault.iotval, iotval2=fault.iotval2)

    def begin(self, request: Request, is_traced: bool = False) -> Walk:
        """Return what a translation carries from step to step, at its start."""
        self.context = None
        return Walk(request, self.memory, self.capabilities, self.registers, self.implementation, is_traced)

    def _keep(self, walk: Walk) -> None:
        self.read_count += walk.read_count
        self.update_count += walk.update_count
        self.last_read_count, self.events = walk.read_count, walk.events
        if walk.is_traced:
            self.steps = walk.steps

    def _translate(self, walk: Walk) -> Translation:
        """[RVIOMMU1.0 3.3] process to translate an IOVA."""
        plan = self.plan(walk)
        return plan if isinstance(plan, Translation) else self._stages(walk, plan)

    def plan(self, walk: Walk) -> Translation | FirstStage:
        """[RVIOMMU1.0 3.3] steps 1 to 16, with the specification's numbers: the tables to use, or that none is.

        Nothing of it depends on the IOVA.
        """
        request = walk.request
        is_ats, is_translated = request.kind is RequestKind.ATS, request.kind is RequestKind.TRANSLATED
        walk.count(_REQUEST_EVENT[request.kind])
        if self.registers.ddtp & 0xF == IommuMode.BARE:
            # 2. Bare: an untranslated request passes with PA = IOVA.
            if is_ats or is_translated:
                raise walk.fault("3.3 step 2", Cause.TRANSACTION_TYPE_DISALLOWED, f"{request.kind.value} request, and ddtp is Bare")
            walk.note("3.3 step 2", f"ddtp is Bare: SPA = IOVA = {request.iova:#x}")
            return Translation(Spa(request.iova), UNTRANSLATED_SIZE)
        # 1, 3 to 6.
        context = self._locate(walk)
        # 7. Types that the context does not allow.
        if (is_ats or is_translated) and not context.EN_ATS:
            raise walk.fault("3.3 step 7", Cause.TRANSACTION_TYPE_DISALLOWED, f"{request.kind.value} request without EN_ATS")
        if request.pid is not None and not context.PDTV:
            raise walk.fault("3.3 step 7", Cause.TRANSACTION_TYPE_DISALLOWED, "process_id without PDTV")
        if request.pid is not None and context.fsc_mode != PDTP_BARE and request.pid >> PROCESS_ID_BITS[context.fsc_mode]:
            raise walk.fault("3.3 step 7", Cause.TRANSACTION_TYPE_DISALLOWED,
                             f"process_id {request.pid:#x} is wider than {PROCESS_ID_BITS[context.fsc_mode]} bits")
        # 8. A translated request without T2GPA: done.
        if is_translated and not context.T2GPA:
            walk.note("3.3 step 8", f"translated request: SPA = {request.iova:#x}")
            return Translation(Spa(request.iova), UNTRANSLATED_SIZE, rcid=context.RCID, mcid=context.MCID)
        # 9. With T2GPA its address is a GPA: the first stage is Bare.
        if is_translated:
            walk.note("3.3 step 9", "translated request with T2GPA: the address is a GPA")
            return FirstStage()
        # 10. PDTV = 0: the first stage is fsc.
        if not context.PDTV:
            return FirstStage(context.fsc_mode, context.root, context.PSCID)
        # 11. No process_id and DPE = 1: process_id is 0.  12. DPE = 0: first stage Bare.
        process_id = request.pid
        if process_id is None:
            if not context.DPE:
                walk.note("3.3 step 12", "no process_id and DPE is 0: first stage is Bare")
                return FirstStage()
            process_id = 0
        # 13. pdtp Bare: first stage Bare.
        if context.fsc_mode == PDTP_BARE:
            walk.note("3.3 step 13", "pdtp is Bare")
            return FirstStage()
        # 14. Locate the process context.
        process = locate_process_context(walk, process_id)
        # 15. Supervisor privilege without ENS.
        if request.is_supervisor and not process.ENS:
            raise walk.fault("3.3 step 15", Cause.TRANSACTION_TYPE_DISALLOWED, "supervisor request and ENS is 0")
        # 16. The first stage is that of the process.
        return FirstStage(process.fsc_mode, process.root, process.PSCID, process.SUM)

    def _locate(self, walk: Walk) -> DeviceContext:
        """[RVIOMMU1.0 3.3] steps 1 to 6."""
        request, mode = walk.request, self.registers.ddtp & 0xF
        # 1. Off: nothing passes.
        if mode == IommuMode.OFF:
            raise walk.fault("3.3 step 1", Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED, "ddtp is Off")
        # 2. Bare: what is no untranslated request is not supported.
        if mode == IommuMode.BARE:
            raise walk.fault("3.3 step 2", Cause.TRANSACTION_TYPE_DISALLOWED, "ddtp is Bare")
        # 3, 4. MSI_FLAT = 0: base format, 1: extended format.
        ddi = device_id_parts(request.device_id, extended=self.capabilities.MSI_FLAT)
        # 5. device_id wider than the mode.
        if (mode == IommuMode.LVL2 and ddi[2]) or (mode == IommuMode.LVL1 and (ddi[2] or ddi[1])):
            raise walk.fault("3.3 step 5", Cause.TRANSACTION_TYPE_DISALLOWED,
                             f"device_id {request.device_id:#x} is wider than {IommuMode(mode).name} supports")
        # 6. Locate the device context.
        self.context = walk.context = locate_device_context(walk, ddi, IommuMode(mode).levels)
        walk.dtf = walk.context.DTF
        return walk.context

    def _stages(self, walk: Walk, plan: FirstStage) -> Translation:
        """[RVIOMMU1.0 3.3] steps 17 to 20."""
        context, iova = walk.context, walk.request.iova
        walk.pscid = plan.pscid if plan.mode != IOSATP_BARE else None
        if plan.mode != IOSATP_BARE or context.iohgatp_mode:
            walk.count(Event.TLB_MISS)  # where no stage translates, nothing is looked up
        # 17. The first stage gives A, the GPA.
        first = first_stage(walk, plan)
        a, mrif, msi = Gpa(first.address), None, None
        if context.msiptp_mode:
            # 18. Virtual interrupt files.
            msi = translate_msi(walk, a)
        if msi is not None:
            second, mrif = msi
        else:
            # 19. The second stage.
            second = second_stage(walk, a)
            if context.msiptp_mode:  # what covers more would hide the files
                second = replace(second, size=region_without_interrupt_files(context, a, second.size))
        if plan.mode == IOSATP_BARE and not context.iohgatp_mode:
            walk.note("3.3 step 17", f"first stage is Bare: SPA = IOVA = {iova:#x}")
        else:
            # 20. Done.
            walk.note("3.3 step 20", f"SPA = {second.address:#x}")
        # of both stages: the smaller page, what both permit, the memory type of the first unless that is PMA
        return Translation(
            Spa(second.address), min(first.size, second.size), first.readable and second.readable, first.writable and second.writable,
            first.executable and second.executable, first.pbmt or second.pbmt, first.is_global, msi is not None, mrif,
            a if context.iohgatp_mode else None, context.RCID, context.MCID)
