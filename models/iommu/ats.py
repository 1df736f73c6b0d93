"""What devices that cache translations are answered: translation completions, page requests and responses to them.

[RVIOMMU1.0 3.6, 3.7, 4.3]
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from ..memory import AccessFault, Spa
from .commands import MessageCode
from .faults import AccessType, Cause, FaultQueue, FaultRecord, TransactionType, TranslationFault
from .registers import QueueCsr, RegisterFile
from .tables import Memory
from .walk import UNTRANSLATED_SIZE, Iommu, Request, RequestKind

__all__ = [
    "PAGE_REQUEST_BYTES", "AtsStatus", "PageRequest", "PageRequestQueue", "PrgCode", "PrgResponse", "TranslationCompletion", "napot_page",
    "translation_completion",
]  # fmt: skip

PAGE_REQUEST_BYTES = 16  # [RVIOMMU1.0 4.3]


class AtsStatus(Enum):
    """How a translation request ends."""

    SUCCESS = "SC"
    UNSUPPORTED_REQUEST = "UR"
    COMPLETER_ABORT = "CA"


# [RVIOMMU1.0 3.6] what a fault makes of a translation request; data corruption and MRIF faults, not in the lists, are aborts
_NO_ACCESS = frozenset({
    Cause.INSTRUCTION_PAGE_FAULT, Cause.READ_PAGE_FAULT, Cause.WRITE_PAGE_FAULT, Cause.INSTRUCTION_GUEST_PAGE_FAULT,
    Cause.READ_GUEST_PAGE_FAULT, Cause.WRITE_GUEST_PAGE_FAULT, Cause.PDT_ENTRY_NOT_VALID, Cause.MSI_PTE_NOT_VALID,
})  # fmt: skip
_UNSUPPORTED = frozenset({
    Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED, Cause.DDT_ENTRY_LOAD_ACCESS_FAULT, Cause.DDT_ENTRY_NOT_VALID, Cause.DDT_ENTRY_MISCONFIGURED,
    Cause.TRANSACTION_TYPE_DISALLOWED,
})  # fmt: skip


@dataclass(frozen=True)
class TranslationCompletion:
    """The answer to a translation request. [RVIOMMU1.0 3.6]

    Attributes
    ----------
    status : :class:`AtsStatus`
        Without success the rest means nothing; without ``readable`` and ``writable`` the address means nothing.
    address, size : :class:`int`
        Translated address of the region (a GPA with T2GPA), and its bytes. A smaller region is as good an answer.
    readable, writable, executable : :class:`bool`
    privileged, is_global, untranslated_only, cxl_io, no_snoop : :class:`bool`
        Priv, Global, U, CXL.io and N. AMA is 0.
    """

    status: AtsStatus
    address: int = 0
    size: int = 4096
    readable: bool = False
    writable: bool = False
    executable: bool = False
    privileged: bool = False
    is_global: bool = False
    untranslated_only: bool = False
    cxl_io: bool = False
    no_snoop: bool = False

    @property
    def page_and_s(self) -> tuple[int, bool]:
        """The address and size as they are coded: page number, and S."""
        return napot_page(self.address, self.size)


def napot_page(address: int, size: int) -> tuple[int, bool]:
    """Return a page number with the size coded in its low bits, and S, which tells whether it is. [RVIOMMU1.0 6.26]"""
    first = address // size * size >> 12
    return (first | (size >> 13) - 1, True) if size > 4096 else (first, False)


def translation_completion(iommu: Iommu, request: Request) -> tuple[TranslationCompletion, FaultRecord | None]:
    """Answer a translation request, and say what is recorded: faults that are answered by success never are."""
    if request.kind is not RequestKind.ATS:
        raise ValueError(f"Request must be a translation request, not {request!r}")
    is_privileged = request.is_supervisor
    try:
        found = iommu.translate(request)
    except TranslationFault as fault:
        if fault.cause in _NO_ACCESS:
            return TranslationCompletion(AtsStatus.SUCCESS, privileged=is_privileged), None
        status = AtsStatus.UNSUPPORTED_REQUEST if fault.cause in _UNSUPPORTED else AtsStatus.COMPLETER_ABORT
        return TranslationCompletion(status), iommu.record(request, fault)
    context = iommu.context
    t2gpa = context is not None and context.T2GPA
    size = iommu.implementation.bare_size if found.size == UNTRANSLATED_SIZE else found.size
    address = found.gpa if t2gpa and found.gpa is not None else found.spa
    return TranslationCompletion(
        AtsStatus.SUCCESS, address // size * size, size, found.readable, found.writable,
        # executable only when asked for and readable as well
        found.executable and found.readable and request.is_exec, is_privileged,
        found.is_global and request.pid is not None and not found.is_msi, found.mrif is not None,
        request.is_cxl and (found.is_msi or t2gpa or found.pbmt != 0)), None


class PrgCode(IntEnum):
    """Response codes of PCI Express."""

    SUCCESS = 0
    INVALID_REQUEST = 1
    RESPONSE_FAILURE = 15


@dataclass(frozen=True)
class PageRequest:
    """A page request message, or a stop marker, as it reaches the IOMMU. [RVIOMMU1.0 4.3]"""

    device_id: int
    address: int = 0
    group: int = 0
    reads: bool = False
    writes: bool = False
    is_last: bool = False
    pid: int | None = None
    priv: bool = False
    is_exec: bool = False

    def __post_init__(self):
        for name, value, width in (("Device id", self.device_id, 24), ("Address", self.address, 64), ("Group", self.group, 9),
                                   ("Process id", self.pid or 0, 20)):
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")

    @property
    def is_stop_marker(self) -> bool:
        """Whether it is a stop marker: the last of its group, which asks for nothing."""
        return self.is_last and not self.reads and not self.writes

    @property
    def payload(self) -> int:
        """Bytes 8 to 15 of the message, as a record has them."""
        return self.reads | self.writes << 1 | self.is_last << 2 | self.group << 3 | self.address & ~0xFFF

    def pack(self, order: str = "little") -> bytes:
        """Return the record of 16 bytes."""
        has_pid = self.pid is not None
        first = ((self.pid or 0) << 12 | has_pid << 32 | (has_pid and self.priv) << 33 | (has_pid and self.is_exec) << 34
                 | self.device_id << 40)
        return b"".join(dword.to_bytes(8, "big" if order == "big" else "little") for dword in (first, self.payload))


@dataclass(frozen=True)
class PrgResponse:
    """A page request group response that the IOMMU itself makes; ``pid`` is None without PASID."""

    device_id: int
    group: int
    code: PrgCode
    pid: int | None = None


class PageRequestQueue:
    """Golden behaviour of page requests, one message per call. [RVIOMMU1.0 3.7, 4.3, 6.17]

    Parameters
    ----------
    registers : :class:`RegisterFile`
        Holds pqb, pqh, pqt and pqcsr.
    memory : :class:`Memory`
        Where the queue is.
    iommu : :class:`Iommu`
        Finds the device context.
    faults : :class:`FaultQueue`
        Takes the records of messages from devices that may send none.
    """

    def __init__(self, registers: RegisterFile, memory: Memory, iommu: Iommu, faults: FaultQueue):
        self.registers, self.memory, self.iommu, self.faults = registers, memory, iommu, faults

    def receive(self, message: PageRequest) -> PrgResponse | None:
        """Queue the message, or return the response that the IOMMU gives; None when it is queued or dropped."""
        code, prpr = self._queue(message)
        if code is None or not message.is_last or message.is_stop_marker:
            return None
        # PASID: always in a failure, else only when the function expects it
        pid = message.pid if code is PrgCode.RESPONSE_FAILURE or prpr else None
        return PrgResponse(message.device_id, message.group, code, pid)

    def _queue(self, message: PageRequest) -> tuple[PrgCode | None, bool]:
        """Return the code of a response, None when the message is in the queue; and PRPR."""
        registers = self.registers
        try:
            # steps 1 to 6 of section 3.3
            context = self.iommu.locate(Request(message.device_id, 0, AccessType.READ))
        except TranslationFault as fault:
            self._report(message, fault.cause, fault.is_logged)
            is_disallowed = fault.cause == Cause.TRANSACTION_TYPE_DISALLOWED
            return (PrgCode.INVALID_REQUEST if is_disallowed else PrgCode.RESPONSE_FAILURE), False
        if not (context.EN_ATS and context.EN_PRI):
            self._report(message, Cause.TRANSACTION_TYPE_DISALLOWED, not context.DTF)
            return PrgCode.INVALID_REQUEST, context.PRPR
        csr = registers.pqcsr
        if not csr & QueueCsr.ON or not csr & QueueCsr.EN or csr & QueueCsr.MF:
            return PrgCode.RESPONSE_FAILURE, context.PRPR
        if csr & QueueCsr.OF:
            return PrgCode.SUCCESS, context.PRPR
        if (registers.pqt + 1) % registers.entries("pqb") == registers.pqh:
            registers.page_queue_error("pqof")
            return PrgCode.SUCCESS, context.PRPR
        try:
            self.memory.write(Spa(registers.base("pqb") + registers.pqt * PAGE_REQUEST_BYTES), message.pack(registers.order))
        except AccessFault:
            registers.page_queue_error("pqmf")
            return PrgCode.RESPONSE_FAILURE, context.PRPR
        registers.page_request_recorded()
        return None, context.PRPR

    def _report(self, message: PageRequest, cause: Cause, is_logged: bool) -> None:
        if is_logged:
            self.faults.report(FaultRecord(
                cause=cause, ttyp=TransactionType.MESSAGE_REQUEST, device_id=message.device_id, process_id=message.pid,
                priv=message.priv and message.pid is not None, iotval=MessageCode.PAGE_REQUEST))
