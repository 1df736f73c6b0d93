"""What a translation is asked and answered, and what it carries from step to step: reads of memory, trace, events.

[RVIOMMU1.0 2.3, 3.3, 6.23]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from ..memory import AccessFault, Gpa, Iova, Spa
from .entries import DeviceContext
from .faults import AccessType, Cause, TransactionType, TranslationFault
from .hpm import Event, EventIds

if TYPE_CHECKING:
    from .registers import Capabilities
    from .tables import Memory

__all__ = [
    "UNTRANSLATED_SIZE", "Implementation", "Leaf", "Mrif", "Request", "RequestKind", "Step", "Translation", "TranslationRegisters", "Walk",
    "undisturbed",
]  # fmt: skip

UNTRANSLATED_SIZE = 1 << 64


class RequestKind(Enum):
    """What a device asks: an access, an access with an address that it had translated, or a translation. [RVIOMMU1.0 2.3]"""

    UNTRANSLATED = "untranslated"
    TRANSLATED = "translated"
    ATS = "ATS translation request"


@dataclass(frozen=True)
class Request:
    """One request as it reaches the IOMMU; ``pid`` is None without a process_id. [RVIOMMU1.0 2.3]

    A translation request (kind ATS) reads: READ, or EXEC when execute permission is asked for as well, which counts only
    with a process_id. It asks for write permission unless ``no_write`` is set. ``is_cxl``: the device is a CXL device of
    type 1 or 2.
    """

    device_id: int
    iova: Iova
    access: AccessType
    pid: int | None = None
    priv: bool = False
    kind: RequestKind = RequestKind.UNTRANSLATED
    no_write: bool = False
    is_cxl: bool = False

    def __post_init__(self):
        for name, value, width in (("Device id", self.device_id, 24), ("IOVA", self.iova, 64),
                                   ("Process id", self.pid or 0, 20)):
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")
        if self.kind is RequestKind.ATS and self.access is AccessType.WRITE:
            raise ValueError(f"A translation request must be a read, not {self.access!r}")

    @property
    def ttyp(self) -> TransactionType:
        """TTYP of a fault record. [RVIOMMU1.0 4.2]"""
        if self.kind is RequestKind.ATS:
            return TransactionType.ATS_TRANSLATION_REQUEST
        return self.access.ttyp if self.kind is RequestKind.UNTRANSLATED else self.access.translated_ttyp

    @property
    def is_exec(self) -> bool:
        """Whether execute permission is asked for."""
        return self.access is AccessType.EXEC and (self.kind is not RequestKind.ATS or self.pid is not None)

    @property
    def fault_access(self) -> AccessType:
        """The original access type, after which faults are named."""
        return AccessType.READ if self.access is AccessType.EXEC and not self.is_exec else self.access

    @property
    def is_checked(self) -> bool:
        """Whether a permission that is missing is a fault; of a translation request permissions are collected."""
        return self.kind is not RequestKind.ATS

    @property
    def wants_write(self) -> bool:
        """Whether D must be set, where writing is permitted."""
        return not self.no_write if self.kind is RequestKind.ATS else self.access is AccessType.WRITE

    @property
    def is_supervisor(self) -> bool:
        """Whether supervisor privilege is asked for, which takes a process_id."""
        return self.priv and self.pid is not None


@dataclass(frozen=True)
class Mrif:
    """Where an MSI is recorded in memory, and the notice that follows. [RVIOMMU1.0 3.3.3]"""

    address: Spa
    notice_address: Spa
    nid: int


@dataclass(frozen=True)
class Translation:
    """A request that was let through.

    Attributes
    ----------
    spa : :class:`int`
        Physical address of the byte asked for; in MRIF mode the address of the interrupt file.
    size : :class:`int`
        Bytes of the naturally aligned region that one cached entry may cover; hardware may use less.
        2^64 when nothing was translated.
    readable, writable, executable : :class:`bool`
        What the same entry lets through without another walk, for this privilege; writable asks for D=1 too.
    pbmt : :class:`int`
        Memory type of the page: 0 PMA, 1 NC, 2 IO. That of the first stage, unless it is 0.
    is_global : :class:`bool`
        The entry holds for every PSCID.
    is_msi : :class:`bool`
        It is the page of a virtual interrupt file.
    mrif : :class:`Mrif` or None
        In MRIF mode; such an answer is not cached.
    gpa : :class:`int` or None
        Guest physical address when there is a second stage. Not compared.
    rcid, mcid : :class:`int`
        QoS IDs of the device. [RVIOMMU1.0 9.1]
    """

    spa: Spa
    size: int
    readable: bool = True
    writable: bool = True
    executable: bool = True
    pbmt: int = 0
    is_global: bool = False
    is_msi: bool = False
    mrif: Mrif | None = None
    gpa: Gpa | None = field(default=None, compare=False)
    rcid: int = 0
    mcid: int = 0


@dataclass(frozen=True)
class Step:
    """One step of a traced translation: section, what happened, and the table entry read, if one was."""

    section: str
    what: str
    address: Spa | None = None
    entry: tuple[int, ...] = ()

    def __str__(self) -> str:
        entry = "" if self.address is None else f" [{self.address:#x}: {' '.join(f'{one:#018x}' for one in self.entry)}]"
        return f"{self.section}: {self.what}{entry}"


@dataclass(frozen=True)
class Implementation:
    """What the specification leaves to an implementation and a walk depends on.

    Attributes
    ----------
    gxl_writable : :class:`bool`
        Software may set fctl.GXL, so that SXL may be 0 or 1 while it is 0.
    atomics : :class:`bool`
        The unit may send atomic requests (AtomicReqEn of its function). Without, an access that needs A or D set faults
        as if SADE and GADE were 0.
    rcid_bits, mcid_bits : :class:`int`
        Width of QoS IDs.
    bare_size : :class:`int`
        Bytes that an ATS answer covers where nothing is translated.
    """

    gxl_writable: bool = False
    atomics: bool = True
    rcid_bits: int = 12
    mcid_bits: int = 12
    bare_size: int = 1 << 21

    def __post_init__(self):
        for name, value in (("RCID", self.rcid_bits), ("MCID", self.mcid_bits)):
            if not 0 <= value <= 12:
                raise ValueError(f"Width of {name} must be 0 to 12 bits, not {value!r}")
        if self.bare_size < 4096 or self.bare_size & self.bare_size - 1:
            raise ValueError(f"Size of an answer without translation must be a power of two from 4096 on, not {self.bare_size!r}")


class TranslationRegisters(Protocol):
    """The registers that a translation depends on; `RegisterFile` has them."""

    @property
    def ddtp(self) -> int: ...
    @property
    def fctl(self) -> int: ...


@dataclass(frozen=True)
class Leaf:
    """What one stage of translation found: the address, the region that the leaf covers, and what it permits."""

    address: int
    size: int = UNTRANSLATED_SIZE
    readable: bool = True
    writable: bool = True
    executable: bool = True
    pbmt: int = 0
    is_global: bool = False
    user: bool = False


_PASS = DeviceContext()


@dataclass
class Walk:
    """What one translation carries from step to step."""

    request: Request
    memory: Memory
    capabilities: Capabilities
    registers: TranslationRegisters
    implementation: Implementation
    is_traced: bool = False
    dtf: bool = False
    context: DeviceContext = _PASS
    pscid: int | None = None
    steps: list[Step] = field(default_factory=list)
    events: list[tuple[Event, EventIds]] = field(default_factory=list)
    read_count: int = 0
    update_count: int = 0

    @property
    def gscid(self) -> int | None:
        """GSCID of the second stage; None when there is none."""
        return self.context.GSCID if self.context.iohgatp_mode else None

    @property
    def order(self) -> str:
        """Order of bytes in what fctl.BE governs. [RVIOMMU1.0 3.10]"""
        return "big" if self.registers.fctl & 1 else "little"

    @property
    def guest_order(self) -> str:
        """Order of bytes in what DC.tc.SBE governs: process directory and first stage."""
        return "big" if self.context.SBE else "little"

    @property
    def gxl(self) -> bool:
        """fctl.GXL."""
        return bool(self.registers.fctl >> 2 & 1)

    def note(self, section: str, what: str, address: Spa | None = None, entry: tuple[int, ...] = ()) -> None:
        """Keep a step of the trace."""
        if self.is_traced:
            self.steps.append(Step(section, what, address, entry))

    def fault(self, section: str, cause: Cause, why: str, iotval2: int = 0) -> TranslationFault:
        """Return the fault that ends this translation."""
        self.note(section, f"{why}: {cause.name} ({int(cause)})")
        return TranslationFault(cause, self.request.iova, iotval2, dtf=self.dtf)

    def count(self, event: Event) -> None:
        """Keep an event with the IDs known so far. [RVIOMMU1.0 6.23]"""
        self.events.append((event, EventIds(self.request.device_id, self.request.pid, self.gscid, self.pscid)))

    def read(self, address: Spa, length: int, order: str) -> tuple[int, ...] | str:
        """Return doublewords (or the one shorter word), or the reason why they cannot be read; beyond PAS nothing can."""
        if address >> self.capabilities.PAS:
            return "beyond PAS"
        self.read_count += 1
        try:
            data = self.memory.read(address, length)
        except AccessFault as error:
            return error.reason
        order = "big" if order == "big" else "little"
        if length <= 8:
            return (int.from_bytes(data, order),)
        return tuple([int.from_bytes(data[at:at + 8], order) for at in range(0, length, 8)])

    def read_entry(self, section: str, what: str, address: Spa, length: int, order: str,
                   causes: tuple[Cause, Cause]) -> tuple[int, ...]:  # fmt: skip
        """Read an entry, or raise the first of ``causes`` for an access fault and the second for data corruption."""
        dwords = self.read(address, length, order)
        if isinstance(dwords, str):
            raise self.fault(section, causes[dwords == "poisoned"], f"{what} at {address:#x} is {dwords}")
        self.note(section, what, address, dwords)
        return dwords

    def exchange(self, address: Spa, length: int, old: int, new: int, order: str) -> bool | str:
        """Atomically put ``new`` where ``old`` still is; tell whether it was, or the reason why it cannot be accessed.

        One indivisible access: an interleaver of the memory has its turn before it and not within it.
        """
        self.update_count += 1
        memory, order = self.memory, "big" if order == "big" else "little"
        try:
            if memory.read(address, length) != old.to_bytes(length, order):
                return False
            with undisturbed(memory):
                memory.write(address, new.to_bytes(length, order))
        except AccessFault as error:
            return error.reason
        return True


@contextmanager
def undisturbed(memory: Memory) -> Iterator[None]:
    """Keep an interleaver of the memory from acting within an atomic access."""
    hook = getattr(memory, "interleaver", None)
    if hook is None:
        yield
        return
    memory.interleaver = None
    try:
        yield
    finally:
        memory.interleaver = hook
