"""Why a request was refused, and how software is told: causes, fault records, the fault queue. [RVIOMMU1.0 4.2]"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from ..memory import AccessFault

if TYPE_CHECKING:
    from .registers import RegisterFile
    from .tables import Memory

__all__ = [
    "LOGGED_DESPITE_DTF",
    "RECORD_BYTES",
    "AccessType",
    "Cause",
    "FaultQueue",
    "FaultRecord",
    "TransactionType",
    "TranslationFault",
    "broken_record_rules",
    "is_logged",
]  # fmt: skip

RECORD_BYTES = 32  # [RVIOMMU1.0 4.2]


class Cause(IntEnum):
    """CAUSE of a fault record. [RVIOMMU1.0 4.2]"""

    INSTRUCTION_ACCESS_FAULT = 1
    READ_ADDRESS_MISALIGNED = 4
    READ_ACCESS_FAULT = 5
    WRITE_ADDRESS_MISALIGNED = 6
    WRITE_ACCESS_FAULT = 7
    INSTRUCTION_PAGE_FAULT = 12
    READ_PAGE_FAULT = 13
    WRITE_PAGE_FAULT = 15
    INSTRUCTION_GUEST_PAGE_FAULT = 20
    READ_GUEST_PAGE_FAULT = 21
    WRITE_GUEST_PAGE_FAULT = 23
    ALL_INBOUND_TRANSACTIONS_DISALLOWED = 256
    DDT_ENTRY_LOAD_ACCESS_FAULT = 257
    DDT_ENTRY_NOT_VALID = 258
    DDT_ENTRY_MISCONFIGURED = 259
    TRANSACTION_TYPE_DISALLOWED = 260
    MSI_PTE_LOAD_ACCESS_FAULT = 261
    MSI_PTE_NOT_VALID = 262
    MSI_PTE_MISCONFIGURED = 263
    MRIF_ACCESS_FAULT = 264
    PDT_ENTRY_LOAD_ACCESS_FAULT = 265
    PDT_ENTRY_NOT_VALID = 266
    PDT_ENTRY_MISCONFIGURED = 267
    DDT_DATA_CORRUPTION = 268
    PDT_DATA_CORRUPTION = 269
    MSI_PT_DATA_CORRUPTION = 270
    MRIF_DATA_CORRUPTION = 271
    INTERNAL_DATA_PATH_ERROR = 272
    IOMMU_MSI_WRITE_ACCESS_FAULT = 273
    PT_DATA_CORRUPTION = 274


# [RVIOMMU1.0 4.2] the rows that DTF does not silence
LOGGED_DESPITE_DTF = frozenset({
    Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED,
    Cause.DDT_ENTRY_LOAD_ACCESS_FAULT,
    Cause.DDT_ENTRY_NOT_VALID,
    Cause.DDT_ENTRY_MISCONFIGURED,
    Cause.DDT_DATA_CORRUPTION,
    Cause.INTERNAL_DATA_PATH_ERROR,
    Cause.IOMMU_MSI_WRITE_ACCESS_FAULT,
})


def is_logged(cause: Cause, *, dtf: bool) -> bool:
    """Tell whether a fault makes a record; ``dtf`` is DC.tc.DTF, False when no DC was located. [RVIOMMU1.0 4.2]"""
    return not dtf or cause in LOGGED_DESPITE_DTF


class TransactionType(IntEnum):
    """TTYP of a fault record. [RVIOMMU1.0 4.2]"""

    NONE = 0
    UNTRANSLATED_EXEC = 1
    UNTRANSLATED_READ = 2
    UNTRANSLATED_WRITE = 3
    TRANSLATED_EXEC = 5
    TRANSLATED_READ = 6
    TRANSLATED_WRITE = 7
    ATS_TRANSLATION_REQUEST = 8
    MESSAGE_REQUEST = 9


class AccessType(Enum):
    """What an untranslated request wants to do; WRITE stands for writes and atomics. [RVIOMMU1.0 2.3]"""

    READ = "read"
    WRITE = "write"
    EXEC = "exec"

    @property
    def access_fault(self) -> Cause:
        """The access fault of this kind of access: 5, 7 or 1."""
        return _ACCESS_FAULT[self]

    @property
    def page_fault(self) -> Cause:
        """The first-stage page fault of this kind of access: 13, 15 or 12."""
        return _PAGE_FAULT[self]

    @property
    def guest_page_fault(self) -> Cause:
        """The second-stage page fault of this kind of access: 21, 23 or 20."""
        return _GUEST_PAGE_FAULT[self]

    @property
    def ttyp(self) -> TransactionType:
        """TTYP of an untranslated request of this kind."""
        return _UNTRANSLATED[self]

    @property
    def translated_ttyp(self) -> TransactionType:
        """TTYP of a translated request of this kind."""
        return _TRANSLATED[self]


_ACCESS_FAULT = {
    AccessType.EXEC: Cause.INSTRUCTION_ACCESS_FAULT,
    AccessType.READ: Cause.READ_ACCESS_FAULT,
    AccessType.WRITE: Cause.WRITE_ACCESS_FAULT,
}
_PAGE_FAULT = {
    AccessType.EXEC: Cause.INSTRUCTION_PAGE_FAULT,
    AccessType.READ: Cause.READ_PAGE_FAULT,
    AccessType.WRITE: Cause.WRITE_PAGE_FAULT,
}
_GUEST_PAGE_FAULT = {
    AccessType.EXEC: Cause.INSTRUCTION_GUEST_PAGE_FAULT,
    AccessType.READ: Cause.READ_GUEST_PAGE_FAULT,
    AccessType.WRITE: Cause.WRITE_GUEST_PAGE_FAULT,
}
_TRANSLATED = {
    AccessType.EXEC: TransactionType.TRANSLATED_EXEC,
    AccessType.READ: TransactionType.TRANSLATED_READ,
    AccessType.WRITE: TransactionType.TRANSLATED_WRITE,
}
_UNTRANSLATED = {
    AccessType.EXEC: TransactionType.UNTRANSLATED_EXEC,
    AccessType.READ: TransactionType.UNTRANSLATED_READ,
    AccessType.WRITE: TransactionType.UNTRANSLATED_WRITE,
}


class TranslationFault(Exception):
    """A request was refused.

    Attributes
    ----------
    cause : :class:`Cause`
    iotval, iotval2 : :class:`int`
        As in the fault record.
    is_logged : :class:`bool`
        Whether a fault record is due (DTF of the device context taken into account).
    """

    def __init__(self, cause: Cause, iotval: int, iotval2: int = 0, *, dtf: bool = False):
        super().__init__(f"{cause.name} ({int(cause)}) at {iotval:#x}")
        self.cause, self.iotval, self.iotval2 = cause, iotval, iotval2
        self.is_logged = is_logged(cause, dtf=dtf)


@dataclass(frozen=True)
class FaultRecord:
    """One record of the fault queue. [RVIOMMU1.0 4.2]

    ``process_id`` is None when PV is 0; ``cause`` and ``ttyp`` are plain integers when no standard name exists.
    """

    cause: int
    ttyp: int
    device_id: int = 0
    process_id: int | None = None
    priv: bool = False
    iotval: int = 0
    iotval2: int = 0
    custom: int = field(default=0, compare=False)

    def pack(self, order: str = "little") -> bytes:
        """Return the 32 bytes; ``order`` is "big" when fctl.BE is 1."""
        for name, value, width in (("CAUSE", self.cause, 12), ("TTYP", self.ttyp, 6), ("DID", self.device_id, 24),
                                   ("PID", self.process_id or 0, 20), ("custom", self.custom, 32),
                                   ("iotval", self.iotval, 64), ("iotval2", self.iotval2, 64)):
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")
        if self.priv and self.process_id is None:
            raise ValueError(f"PRIV must be 0 when there is no process_id, not {self.priv!r}")
        pv = self.process_id is not None
        first = (self.cause | (self.process_id or 0) << 12 | pv << 32 | self.priv << 33 | self.ttyp << 34
                 | self.device_id << 40)
        return b"".join(dword.to_bytes(8, "big" if order == "big" else "little")
                        for dword in (first, self.custom, self.iotval, self.iotval2))

    @classmethod
    def unpack(cls, data: bytes) -> FaultRecord:
        """Read a record whatever its bits say; `broken_record_rules` tells what is wrong with it."""
        if len(data) != RECORD_BYTES:
            raise ValueError(f"A fault record must be {RECORD_BYTES} bytes long, not {len(data)!r}")
        first, second, iotval, iotval2 = (int.from_bytes(data[at:at + 8], "little") for at in range(0, 32, 8))
        pv = first >> 32 & 1
        return cls(cause=_named(Cause, first & 0xFFF), ttyp=_named(TransactionType, first >> 34 & 0x3F),
                   device_id=first >> 40, process_id=first >> 12 & 0xFFFFF if pv else None,
                   priv=bool(pv and first >> 33 & 1), iotval=iotval, iotval2=iotval2, custom=second & 0xFFFF_FFFF)

    def differences(self, seen: FaultRecord) -> list[str]:
        """Return what of ``seen`` the specification does not allow where this record is expected.

        iotval may be given with page offset 0, and so may the address in iotval2; its two flag bits may not change.
        Bits 11:2 of iotval2 are not compared: implementations differ in them for table accesses.
        """
        found = [f"{name.name} is {getattr(seen, name.name)!r}, expected {getattr(self, name.name)!r}"
                 for name in fields(self) if name.compare and name.name not in ("iotval", "iotval2")
                 and getattr(seen, name.name) != getattr(self, name.name)]
        if seen.iotval not in (self.iotval, self.iotval & ~0xFFF):
            found.append(f"iotval is {seen.iotval:#x}, expected {self.iotval:#x} with or without its page offset")
        if (seen.iotval2 ^ self.iotval2) & ~0xFFC:
            found.append(f"iotval2 is {seen.iotval2:#x}, expected {self.iotval2:#x} (bits 11:2 free)")
        return found


def broken_record_rules(data: bytes) -> list[str]:
    """Return every rule of the record format that ``data`` (32 bytes) breaks, whatever the fault was."""
    record, found = FaultRecord.unpack(data), []
    first, second = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    if second >> 32:
        found.append(f"reserved bits 63:32 of doubleword 1 are {second >> 32:#x}")
    if not isinstance(record.cause, Cause) and record.cause < 2048:
        found.append(f"CAUSE {record.cause} is reserved")
    if not isinstance(record.ttyp, TransactionType) and record.ttyp < 32:
        found.append(f"TTYP {record.ttyp} is reserved")
    if record.process_id is None and (first >> 12 & 0xFFFFF or first >> 33 & 1):
        found.append("PID or PRIV is not 0 although PV is 0")
    if record.ttyp == TransactionType.NONE and first >> 12 & ~(0x3F << 22):
        found.append("DID, PV, PID or PRIV is not 0 although TTYP is 0")
    return found


def _named(names: type[IntEnum], value: int) -> int:
    return names(value) if value in names.__members__.values() else value


class FaultQueue:
    """Golden behaviour of the fault queue: one record per call. [RVIOMMU1.0 4.2, 6.16]

    Parameters
    ----------
    registers : :class:`RegisterFile`
        Holds fqb, fqh, fqt and fqcsr; its interrupt is raised after the record is in memory.
    memory
        Object with ``write(address, data)`` that may raise `AccessFault`.
    """

    def __init__(self, registers: RegisterFile, memory: Memory):
        self.registers, self.memory = registers, memory

    def report(self, record: FaultRecord) -> bool:
        """Write one record; return False when it had to be dropped (queue off, stopped, full, or memory fault)."""
        registers = self.registers
        if not registers.fqon or registers.fqof or registers.fqmf:
            return False
        entries = registers.entries("fqb")
        after = (registers.fqt + 1) % entries
        if after == registers.fqh:
            registers.fault_queue_error("fqof")
            return False
        try:
            self.memory.write(registers.base("fqb") + registers.fqt * RECORD_BYTES, record.pack(registers.order))
        except AccessFault:
            registers.fault_queue_error("fqmf")
            return False
        registers.fault_recorded()
        return True

