"""How a request is translated, or why it is refused: the procedure of the specification, step by step.

Modelled: modes Off, Bare, 1LVL to 3LVL; base-format device contexts; Sv39 first stage with Svnapot and, when
`Capabilities` says so, Svpbmt. Not modelled, and refused when the model is made: every other capability.
No caches: an answer is what the tables in memory say now; `cache.py` tells which older answers are still allowed.
Steps of the page table walk are numbered as in the ten-step text of the privileged architecture.
[RVIOMMU1.0 3.3] [RVPRIV Sv39]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..memory import AccessFault, Iova, Spa
from .faults import AccessType, Cause, FaultRecord, TranslationFault
from .registers import Capabilities, Igs, IommuMode
from .tables import (
    DC_BYTES,
    IOSATP_BARE,
    IOSATP_SV39,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_N,
    PTE_PBMT_SHIFT,
    PTE_PPN_MASK,
    PTE_PPN_SHIFT,
    PTE_R,
    PTE_U,
    PTE_V,
    PTE_W,
    PTE_X,
    SIZE_64K,
    SIZE_OF_LEVEL,
    DeviceContext,
    Memory,
)

MODELLED = frozenset({"Sv39", "Svpbmt", "Svrsw60t59b", "NL", "S"})  # NL and S concern commands only
PAGE_SHIFT = 12
UNTRANSLATED_SIZE = 1 << 64

# [RVIOMMU1.0 3.1.3] reserved bits of tc (31:24 are custom), ta and fsc
TC_RESERVED = 0xFFFF_FFFF_00FF_F000
TA_RESERVED = 0x0000_00FF_0000_0FFF
TA_QOSID = 0xFFFF_FF00_0000_0000
FSC_RESERVED = 0x0FFF_F000_0000_0000
DDTE_RESERVED = 0xFFC0_0000_0000_03FE  # [RVIOMMU1.0 3.1.2]
PTE_RESERVED = 0x07C0_0000_0000_0000  # [RVPRIV Sv39] 58:54
PTE_RSW60T59 = 0x1800_0000_0000_0000  # 60:59, software's with Svrsw60t59b


@dataclass(frozen=True)
class Request:
    """One untranslated request as it reaches the IOMMU; ``pid`` is None without a process_id. [RVIOMMU1.0 2.3]"""

    device_id: int
    iova: Iova
    access: AccessType
    pid: int | None = None
    priv: bool = False

    def __post_init__(self):
        for name, value, width in (("Device id", self.device_id, 24), ("IOVA", self.iova, 64),
                                   ("Process id", self.pid or 0, 20)):
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")


@dataclass(frozen=True)
class Translation:
    """A request that was let through.

    Attributes
    ----------
    spa : :class:`int`
        Physical address of the byte asked for.
    size : :class:`int`
        Bytes of the naturally aligned region that one cached entry may cover; hardware may use less.
        2^64 when nothing was translated.
    readable, writable, executable : :class:`bool`
        What the same entry lets through without another walk; writable asks for D=1 too.
    pbmt : :class:`int`
        Memory type of the page: 0 PMA, 1 NC, 2 IO.
    is_global : :class:`bool`
        The entry holds for every PSCID.
    """

    spa: Spa
    size: int
    readable: bool = True
    writable: bool = True
    executable: bool = True
    pbmt: int = 0
    is_global: bool = False


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


class TranslationRegisters(Protocol):
    """The registers that a translation depends on; `RegisterFile` has them."""

    @property
    def ddtp(self) -> int: ...
    @property
    def fctl(self) -> int: ...


@dataclass
class PlainRegisters:
    """`TranslationRegisters` as two numbers that anyone may set; Bare at first."""

    ddtp: int = int(IommuMode.BARE)
    fctl: int = 0


@dataclass
class _Walk:
    """What one translation carries from step to step."""

    request: Request
    is_traced: bool
    dtf: bool = False
    steps: list[Step] = field(default_factory=list)

    def note(self, section: str, what: str, address: Spa | None = None, entry: tuple[int, ...] = ()) -> None:
        if self.is_traced:
            self.steps.append(Step(section, what, address, entry))

    def fault(self, section: str, cause: Cause, why: str) -> TranslationFault:
        self.note(section, f"{why}: {cause.name} ({int(cause)})")
        return TranslationFault(cause, self.request.iova, dtf=self.dtf)


class Iommu:
    """Translates one request per call from the tables in ``memory``. [RVIOMMU1.0 3.3]

    Parameters
    ----------
    memory : :class:`Memory`
        ``read`` may raise `AccessFault`; reason "poisoned" is data corruption, anything else an access fault.
    capabilities : :class:`Capabilities`
        Decides what entries may say.
    registers : :class:`TranslationRegisters` or None
        ddtp and fctl; None makes a pair of plain numbers.

    Attributes
    ----------
    read_count : :class:`int`
        Reads of table entries so far; a device context is one.
    last_read_count : :class:`int`
        Those of the last translation.
    steps : list of :class:`Step`
        Of the last translation that was traced, also when it ended in a fault.

    Raises
    ------
    :exc:`ValueError`
        When the capabilities name something that is not modelled.
    """

    def __init__(self, memory: Memory, capabilities: Capabilities = Capabilities(), *,
                 registers: TranslationRegisters | None = None):
        if too_much := sorted(capabilities.switched_on() - MODELLED):
            raise ValueError(f"Capabilities must be among {', '.join(sorted(MODELLED))}, not {too_much!r}")
        if not capabilities.Sv39 or capabilities.IGS != Igs.MSI:
            raise ValueError(f"Capabilities must have Sv39 and IGS=MSI, not {capabilities!r}")
        self.memory, self.capabilities = memory, capabilities
        self.registers: TranslationRegisters = PlainRegisters() if registers is None else registers
        self.read_count = self.last_read_count = 0
        self.steps: list[Step] = []

    def translate(self, request: Request, *, trace: bool = False) -> Translation:
        """Return the translation, or raise `TranslationFault`; with ``trace`` the steps are kept in ``steps``."""
        walk, reads_before = _Walk(request, trace), self.read_count
        try:
            return self._translate(walk)
        finally:
            self.last_read_count = self.read_count - reads_before
            if trace:
                self.steps = walk.steps

    def record(self, request: Request, fault: TranslationFault) -> FaultRecord | None:
        """Return the record that is due for ``fault``, or None when DTF silences it. [RVIOMMU1.0 4.2]"""
        if not fault.is_logged:
            return None
        return FaultRecord(cause=fault.cause, ttyp=request.access.ttyp, device_id=request.device_id,
                           process_id=request.pid, priv=request.priv and request.pid is not None,
                           iotval=fault.iotval, iotval2=fault.iotval2)

    def _translate(self, walk: _Walk) -> Translation:
        """[RVIOMMU1.0 3.3] process to translate an IOVA, with the specification's step numbers."""
        request = walk.request
        mode = self.registers.ddtp & 0xF
        # 1. Off: nothing passes.
        if mode == IommuMode.OFF:
            raise walk.fault("3.3 step 1", Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED, "ddtp is Off")
        # 2. Bare: an untranslated request passes with PA = IOVA.
        if mode == IommuMode.BARE:
            walk.note("3.3 step 2", f"ddtp is Bare: SPA = IOVA = {request.iova:#x}")
            return Translation(Spa(request.iova), UNTRANSLATED_SIZE)
        # 3. MSI_FLAT = 0: base format. (4. The extended format is not modelled.)
        ddi = (request.device_id & 0x7F, request.device_id >> 7 & 0x1FF, request.device_id >> 16)
        # 5. device_id wider than the mode.
        if (mode == IommuMode.LVL2 and ddi[2]) or (mode == IommuMode.LVL1 and (ddi[2] or ddi[1])):
            raise walk.fault("3.3 step 5", Cause.TRANSACTION_TYPE_DISALLOWED,
                             f"device_id {request.device_id:#x} is wider than {IommuMode(mode).name} supports")
        # 6. Locate the device context.
        context = self._locate_device_context(walk, ddi, IommuMode(mode).levels)
        walk.dtf = context.DTF
        # 7. Types that the context does not allow. (The width of process_id: pdtp can only be Bare here.)
        if request.pid is not None and not context.PDTV:
            raise walk.fault("3.3 step 7", Cause.TRANSACTION_TYPE_DISALLOWED, "process_id without PDTV")
        # 8, 9. Translated requests: none, ATS = 0.
        # 10. PDTV = 0: the first stage is fsc.
        if not context.PDTV:
            return self._first_stage(walk, context.fsc_mode, context.root)
        # 11. No process_id and DPE = 1: process_id is 0.  12. DPE = 0: first stage Bare.
        # 13. pdtp Bare: first stage Bare. No other pdtp passes the checks of step 6, so that 11 ends here too.
        # 14 to 16. Process contexts: none.
        walk.note("3.3 step 13", "pdtp is Bare")
        return self._first_stage(walk, IOSATP_BARE, Spa(0))

    def _locate_device_context(self, walk: _Walk, ddi: tuple[int, int, int], levels: int) -> DeviceContext:
        """[RVIOMMU1.0 3.3.1] process to locate the device context."""
        # 1. a = ddtp.PPN * 2^12, i = LEVELS - 1
        a, i = (self.registers.ddtp >> 10 & PTE_PPN_MASK) << PAGE_SHIFT, levels - 1
        # 2. until i = 0
        while i > 0:
            # 3, 4. eight bytes at a + DDI[i] * 8: access fault 257, data corruption 268
            ddte, = self._read_directory(walk, Spa(a + ddi[i] * 8), 8, f"DDT entry of level {i}")
            # 5. not valid
            if not ddte & 1:
                raise walk.fault("3.3.1 step 5", Cause.DDT_ENTRY_NOT_VALID, "V is 0")
            # 6. reserved bits
            if ddte & DDTE_RESERVED:
                raise walk.fault("3.3.1 step 6", Cause.DDT_ENTRY_MISCONFIGURED, "a reserved bit is set")
            # 7. next level
            i, a = i - 1, (ddte >> 10 & PTE_PPN_MASK) << PAGE_SHIFT
        # 8. the context at a + DDI[0] * DC_SIZE: access fault 257, data corruption 268
        dwords = self._read_directory(walk, Spa(a + ddi[0] * DC_BYTES), DC_BYTES, "device context")
        # 9. not valid
        if not dwords[0] & 1:
            raise walk.fault("3.3.1 step 9", Cause.DDT_ENTRY_NOT_VALID, "tc.V is 0")
        # 10. misconfigured
        if wrong := context_misconfigurations(dwords, self.capabilities, self.registers.fctl):
            raise walk.fault("3.3.1 step 10", Cause.DDT_ENTRY_MISCONFIGURED, "; ".join(wrong))
        # 11, 12. located
        return DeviceContext.unpack(b"".join(dword.to_bytes(8, "little") for dword in dwords))

    def _first_stage(self, walk: _Walk, mode: int, root: Spa) -> Translation:
        """[RVIOMMU1.0 3.3 steps 17 to 20] with both MSI translation and the second stage off."""
        iova = walk.request.iova
        if mode == IOSATP_BARE:
            walk.note("3.3 step 17", f"first stage is Bare: SPA = IOVA = {iova:#x}")
            return Translation(Spa(iova), UNTRANSLATED_SIZE)
        answer = self._walk_sv39(walk, root)
        # 18. msiptp: none, MSI_FLAT = 0.  19. iohgatp is Bare: SPA = GPA.
        walk.note("3.3 step 20", f"SPA = {answer.spa:#x}")
        return answer

    def _walk_sv39(self, walk: _Walk, root: Spa) -> Translation:
        """[RVPRIV Sv39] virtual address translation, as a user (U) access without MXR; SADE = 0."""
        iova, access = walk.request.iova, walk.request.access

        def page_fault(step: str, why: str) -> TranslationFault:
            return walk.fault(f"RVPRIV Sv39 {step}", access.page_fault, why)

        # Sv39 addresses: bits 63:38 are all equal.
        if iova >> 38 not in (0, (1 << 26) - 1):
            raise page_fault("step 0", "bits 63:38 of the IOVA are not all equal")
        vpn = [iova >> PAGE_SHIFT + 9 * level & 0x1FF for level in range(3)]
        # 1. a is the root table, i = LEVELS - 1
        a, i, is_global = root, 2, False
        while True:
            # 2. the PTE at a + vpn[i] * 8; access fault or data corruption
            pte = self._read_pte(walk, Spa(a + vpn[i] * 8), i)
            # 3. not valid, W without R, or reserved bits and encodings
            if not pte & PTE_V:
                raise page_fault("step 3", "V is 0")
            if pte & PTE_W and not pte & PTE_R:
                raise page_fault("step 3", "W is 1 and R is 0")
            if why := self._reserved_in_pte(pte, i):
                raise page_fault("step 3", why)
            is_global = is_global or bool(pte & PTE_G)
            # 4. a leaf has R or X; else go one level down
            if pte & (PTE_R | PTE_X):
                break
            i -= 1
            if i < 0:
                raise page_fault("step 4", "the entry of level 0 is not a leaf")
            a = Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) << PAGE_SHIFT)
        # 5. misaligned superpage
        ppn = pte >> PTE_PPN_SHIFT & PTE_PPN_MASK
        if ppn & (1 << 9 * i) - 1:
            raise page_fault("step 5", "superpage is misaligned")
        # 6. U: the request is a user access. [RVIOMMU1.0 3.3 step 17]
        if not pte & PTE_U:
            raise page_fault("step 6", "U is 0")
        # 7. shadow stacks: none for devices. 8. permission by the type of access
        if not pte & {AccessType.READ: PTE_R, AccessType.WRITE: PTE_W, AccessType.EXEC: PTE_X}[access]:
            raise page_fault("step 8", f"no {access.value} permission")
        # 9. A, and D for writes
        if not pte & PTE_A:
            raise page_fault("step 9", "A is 0")
        if access == AccessType.WRITE and not pte & PTE_D:
            raise page_fault("step 9", "D is 0")
        # 10. the physical address; a NAPOT leaf takes its low PPN bits from the IOVA [RVPRIV Svnapot]
        size = SIZE_64K if pte & PTE_N else SIZE_OF_LEVEL[i]
        spa = Spa((ppn << PAGE_SHIFT) & ~(size - 1) | iova & size - 1)
        walk.note("RVPRIV Sv39 step 10", f"leaf of {size} bytes")
        return Translation(spa, size, readable=bool(pte & PTE_R), writable=bool(pte & PTE_W and pte & PTE_D),
                           executable=bool(pte & PTE_X), pbmt=pte >> PTE_PBMT_SHIFT & 3, is_global=is_global)

    def _reserved_in_pte(self, pte: int, level: int) -> str | None:
        """Say which reserved bit or encoding is set, or return None. [RVPRIV Sv39, Svnapot, Svpbmt]"""
        is_leaf, pbmt = bool(pte & (PTE_R | PTE_X)), pte >> PTE_PBMT_SHIFT & 3
        if pte & PTE_RESERVED or (pte & PTE_RSW60T59 and not self.capabilities.Svrsw60t59b):
            return "a reserved bit is set"
        if pbmt == 3 or (pbmt and not (self.capabilities.Svpbmt and is_leaf)):
            return f"PBMT is {pbmt}"
        if pte & PTE_N and (level or not is_leaf):
            return "N is set on a superpage or pointer"
        if pte & PTE_N and pte >> PTE_PPN_SHIFT & 0xF != 0b1000:
            return "the NAPOT encoding is reserved"
        if not is_leaf and pte & (PTE_A | PTE_D | PTE_U):
            return "A, D or U is set on a pointer"
        return None

    def _read_directory(self, walk: _Walk, address: Spa, length: int, what: str) -> tuple[int, ...]:
        dwords = self._read(address, length)
        if isinstance(dwords, str):
            raise walk.fault("3.3.1", Cause.DDT_DATA_CORRUPTION if dwords == "poisoned"
                             else Cause.DDT_ENTRY_LOAD_ACCESS_FAULT, f"{what} at {address:#x} is {dwords}")
        walk.note("3.3.1", what, address, dwords)
        return dwords

    def _read_pte(self, walk: _Walk, address: Spa, level: int) -> int:
        dwords = self._read(address, 8)
        if isinstance(dwords, str):
            raise walk.fault("RVPRIV Sv39 step 2", Cause.PT_DATA_CORRUPTION if dwords == "poisoned"
                             else walk.request.access.access_fault, f"PTE at {address:#x} is {dwords}")
        walk.note("RVPRIV Sv39 step 2", f"PTE of level {level}", address, dwords)
        return dwords[0]

    def _read(self, address: Spa, length: int) -> tuple[int, ...] | str:
        """Return doublewords, or the reason why they cannot be read; beyond PAS nothing can."""
        if address >> self.capabilities.PAS:
            return "beyond PAS"
        self.read_count += 1
        try:
            data = self.memory.read(address, length)
        except AccessFault as error:
            return error.reason
        return tuple(int.from_bytes(data[at:at + 8], "little") for at in range(0, length, 8))


def context_misconfigurations(dwords: tuple[int, ...], capabilities: Capabilities, fctl: int = 0) -> list[str]:
    """Return every check of a base-format device context (tc, iohgatp, ta, fsc) that fails. [RVIOMMU1.0 3.1.4]

    GXL is taken as not writable, END and BE as fctl says. Page numbers beyond PAS are left to fault on use.
    """
    tc, _, ta, fsc = dwords
    context = DeviceContext.unpack(b"".join(dword.to_bytes(8, "little") for dword in dwords))
    has, be = capabilities, bool(fctl & 1)
    checks = [
        (1, "reserved bit set", bool(tc & TC_RESERVED or ta & TA_RESERVED or fsc & FSC_RESERVED
                                     or (ta & TA_QOSID and not has.QOSID))),
        (2, "EN_ATS, EN_PRI or PRPR without ATS", not has.ATS and (context.EN_ATS or context.EN_PRI or context.PRPR)),
        (3, "T2GPA without EN_ATS", context.T2GPA and not context.EN_ATS),
        (4, "EN_PRI without EN_ATS", context.EN_PRI and not context.EN_ATS),
        (5, "PRPR without EN_PRI", context.PRPR and not context.EN_PRI),
        (6, "T2GPA not offered", context.T2GPA and not has.T2GPA),
        (7, "T2GPA with iohgatp Bare", context.T2GPA and context.iohgatp_mode == 0),
        (8, "pdtp.MODE not supported", context.PDTV and not _supported(
            context.fsc_mode, {0: True, 1: has.PD8, 2: has.PD17, 3: has.PD20})),
        (9, "iosatp.MODE not supported", not context.PDTV and not _supported(  # 9 to 11
            context.fsc_mode, {0: True, 8: has.Sv32} if context.SXL
            else {0: True, IOSATP_SV39: has.Sv39, 9: has.Sv48, 10: has.Sv57})),
        (12, "DPE without PDTV", context.DPE and not context.PDTV),
        (13, "iohgatp.MODE not supported", not _supported(  # 13 to 15
            context.iohgatp_mode, {0: True, 8: has.Sv39x4, 9: has.Sv48x4, 10: has.Sv57x4})),
        (17, "iohgatp.PPN not aligned to 16 KiB", context.iohgatp_mode != 0 and context.iohgatp_ppn & 3 != 0),
        (18, "SADE or GADE without AMO_HWAD", not has.AMO_HWAD and (context.SADE or context.GADE)),
        (19, "SBE differs from BE", be != context.SBE and not has.END),  # 19, 21
        (20, "SXL without GXL", context.SXL),
    ]
    return [f"check {number}: {text}" for number, text, fails in checks if fails]


def _supported(mode: int, modes: dict[int, bool]) -> bool:
    return modes.get(mode, False)
