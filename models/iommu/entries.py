"""What software keeps in memory for an IOMMU, bit by bit: page table entries, device and process contexts, MSI entries.

Formats only: `tables.py` writes them, `defects.py` names what can be wrong with them, the walk reads them.
MSI entries are those of the Advanced Interrupt Architecture, chapter on IOMMUs.
[RVIOMMU1.0 3.1, 3.2] [RVPRIV Sv32, Sv39, Sv48, Sv57, Svnapot, Svpbmt]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..memory import Spa

__all__ = [
    "DC_BYTES",
    "DC_EXTENDED_BYTES",
    "DDT_MODE_OF_LEVELS",
    "DEVICE_ID_BITS",
    "EXTENDED_DEVICE_ID_BITS",
    "FIRST_STAGE",
    "IOHGATP_BARE",
    "IOSATP_BARE",
    "IOSATP_SV39",
    "LEVEL_OF_SIZE",
    "MSIPTP_FLAT",
    "MSIPTP_OFF",
    "MSI_PTE_BYTES",
    "PAGE",
    "PC_BYTES",
    "PDTP_BARE",
    "PDTP_LEVELS",
    "PROCESS_ID_BITS",
    "PTE_A",
    "PTE_D",
    "PTE_G",
    "PTE_N",
    "PTE_PBMT_SHIFT",
    "PTE_PPN_MASK",
    "PTE_PPN_SHIFT",
    "PTE_R",
    "PTE_U",
    "PTE_V",
    "PTE_W",
    "PTE_X",
    "SECOND_STAGE",
    "SIZES",
    "SIZE_1G",
    "SIZE_2M",
    "SIZE_4K",
    "SIZE_4M",
    "SIZE_64K",
    "SIZE_256T",
    "SIZE_512G",
    "SIZE_OF_LEVEL",
    "SV32",
    "SV32X4",
    "SV39",
    "SV39X4",
    "SV48",
    "SV48X4",
    "SV57",
    "SV57X4",
    "TC_BITS",
    "DeviceContext",
    "MsiPte",
    "ProcessContext",
    "Scheme",
    "extract",
    "mgpaw",
]  # fmt: skip

PAGE = 4096
SIZE_4K = 1 << 12
SIZE_64K = 1 << 16  # [RVPRIV Svnapot] the only NAPOT size
SIZE_2M = 1 << 21
SIZE_4M = 1 << 22  # [RVPRIV Sv32]
SIZE_1G = 1 << 30
SIZE_512G = 1 << 39  # [RVPRIV Sv48]
SIZE_256T = 1 << 48  # [RVPRIV Sv57]
SIZES = (SIZE_4K, SIZE_64K, SIZE_2M, SIZE_1G)  # of Sv39
LEVEL_OF_SIZE = {SIZE_4K: 0, SIZE_64K: 0, SIZE_2M: 1, SIZE_1G: 2}
SIZE_OF_LEVEL = (SIZE_4K, SIZE_2M, SIZE_1G)

# [RVPRIV Sv39] page table entry; Sv32 has the low 32 bits of it
PTE_V, PTE_R, PTE_W, PTE_X, PTE_U, PTE_G, PTE_A, PTE_D = (1 << bit for bit in range(8))
PTE_PPN_SHIFT = 10
PTE_PPN_MASK = (1 << 44) - 1
PTE_PBMT_SHIFT = 61
PTE_N = 1 << 63

DC_BYTES = 32  # [RVIOMMU1.0 3.1.3] base format
DC_EXTENDED_BYTES = 64
DDT_MODE_OF_LEVELS = {1: 2, 2: 3, 3: 4}  # [RVIOMMU1.0 6.5] ddtp.iommu_mode
DEVICE_ID_BITS = {1: 7, 2: 16, 3: 24}  # [RVIOMMU1.0 3.1] of base-format directories
EXTENDED_DEVICE_ID_BITS = {1: 6, 2: 15, 3: 24}
PC_BYTES = 16  # [RVIOMMU1.0 3.2.2]
PDTP_BARE = 0  # [RVIOMMU1.0 3.1.3.6]
PDTP_LEVELS = {1: 1, 2: 2, 3: 3}  # PD8, PD17, PD20
PROCESS_ID_BITS = {1: 8, 2: 17, 3: 20}
IOSATP_BARE, IOSATP_SV39 = 0, 8  # [RVIOMMU1.0 3.1.3.6]
IOHGATP_BARE = 0  # [RVIOMMU1.0 3.1.3.2]
MSIPTP_OFF, MSIPTP_FLAT = 0, 1  # [RVIOMMU1.0 3.1.3.4]
MSI_PTE_BYTES = 16  # [RVIOMMU1.0 3.3.3]
_NOWHERE = Spa(0)
TC_BITS = ("V", "EN_ATS", "EN_PRI", "T2GPA", "DTF", "PDTV", "PRPR", "GADE", "SADE", "DPE", "SBE", "SXL")


@dataclass(frozen=True)
class Scheme:
    """One format of page tables: Sv32 to Sv57, and their second-stage forms, two bits wider. [RVPRIV Sv39, Hypervisor]

    Attributes
    ----------
    name : :class:`str`
        As the specification and the field of `Capabilities` call it.
    mode : :class:`int`
        MODE of iosatp or iohgatp.
    levels, pte_bytes, index_bits : :class:`int`
        Levels of tables, bytes of an entry, address bits that one level uses.
    wider : :class:`int`
        More address bits at the root: 2 for second-stage tables, whose root is four pages.
    """

    name: str
    mode: int
    levels: int
    pte_bytes: int = 8
    index_bits: int = 9
    wider: int = 0

    @property
    def address_bits(self) -> int:
        """Bits of an address that tables of this format translate."""
        return 12 + self.index_bits * self.levels + self.wider

    @property
    def root_pages(self) -> int:
        """Pages of the root table, which is aligned to its size."""
        return 1 << self.wider

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of pages that it can map, smallest first."""
        found = [self.size_of_level(level) for level in range(self.levels)]
        return tuple(sorted([*found, SIZE_64K] if self.pte_bytes == 8 else found))

    def size_of_level(self, level: int) -> int:
        """Bytes that one leaf of ``level`` maps (0: the last table)."""
        return 1 << 12 + self.index_bits * level

    def level_of_size(self, size: int) -> int:
        """The level whose leaf maps ``size`` bytes; a 64 KiB page is 16 leaves of level 0."""
        return (max(size, SIZE_4K).bit_length() - 13) // self.index_bits

    def index(self, address: int, level: int) -> int:
        """Index of the entry for ``address`` in its table of ``level``."""
        bits = self.index_bits + (self.wider if level == self.levels - 1 else 0)
        return address >> 12 + self.index_bits * level & (1 << bits) - 1

    def accepts(self, address: int) -> bool:
        """Whether the high bits of a 64-bit address are as they must be: sign-extended, or 0 in Sv32 and second stages."""
        if not 0 <= address < 1 << 64:
            return False
        if self.wider or self.pte_bytes == 4:
            return not address >> self.address_bits
        return address >> self.address_bits - 1 in (0, (1 << 65 - self.address_bits) - 1)


SV32 = Scheme("Sv32", 8, 2, pte_bytes=4, index_bits=10)
SV39, SV48, SV57 = (Scheme(f"Sv{12 + 9 * levels}", 5 + levels, levels) for levels in (3, 4, 5))
SV32X4 = Scheme("Sv32x4", 8, 2, pte_bytes=4, index_bits=10, wider=2)
SV39X4, SV48X4, SV57X4 = (Scheme(f"Sv{12 + 9 * levels}x4", 5 + levels, levels, wider=2) for levels in (3, 4, 5))
# MODE -> format, for tc.SXL and fctl.GXL [RVIOMMU1.0 3.1.3.2, 3.1.3.6]
FIRST_STAGE = {False: {one.mode: one for one in (SV39, SV48, SV57)}, True: {SV32.mode: SV32}}
SECOND_STAGE = {False: {one.mode: one for one in (SV39X4, SV48X4, SV57X4)}, True: {SV32X4.mode: SV32X4}}


def _check_fields(*fields: tuple[str, int, int]) -> None:
    for name, value, width in fields:
        if not 0 <= value < 1 << width:
            raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")


def _check_root(root: Spa, multiple: int = PAGE) -> None:
    if not 0 <= root < 1 << 56 or root % multiple:
        raise ValueError(f"Root must be a multiple of {multiple} below 2^56, not {root!r}")


def _packed(dwords: list[int], order: str) -> bytes:
    return b"".join(dword.to_bytes(8, "big" if order == "big" else "little") for dword in dwords)


@dataclass(frozen=True)
class DeviceContext:
    """A device context, field by field; the default is a valid one that passes addresses unchanged.

    ``fsc_mode`` and ``fsc_ppn`` are iosatp, or pdtp when ``PDTV`` is set. Addresses are page numbers, as in the
    entry. The last four fields are those of the extended format (MSI_FLAT). Reserved bits are not part of it:
    `device_context_defects` sets them. [RVIOMMU1.0 3.1.3]
    """

    V: bool = True
    EN_ATS: bool = False
    EN_PRI: bool = False
    T2GPA: bool = False
    DTF: bool = False
    PDTV: bool = False
    PRPR: bool = False
    GADE: bool = False
    SADE: bool = False
    DPE: bool = False
    SBE: bool = False
    SXL: bool = False
    iohgatp_mode: int = IOHGATP_BARE
    iohgatp_ppn: int = 0
    GSCID: int = 0
    PSCID: int = 0
    fsc_mode: int = IOSATP_BARE
    fsc_ppn: int = 0
    RCID: int = 0
    MCID: int = 0
    msiptp_mode: int = MSIPTP_OFF
    msiptp_ppn: int = 0
    msi_addr_mask: int = 0
    msi_addr_pattern: int = 0

    @classmethod
    def sv39(cls, root: Spa, *, PSCID: int, **fields) -> DeviceContext:
        """Return a context whose first stage is the Sv39 table at ``root``."""
        return cls.first_stage(SV39, root, PSCID=PSCID, **fields)

    @classmethod
    def first_stage(cls, scheme: Scheme, root: Spa, *, PSCID: int, **fields) -> DeviceContext:
        """Return a context whose first stage is the table of ``scheme`` at ``root``."""
        _check_root(root)
        return cls(PSCID=PSCID, fsc_mode=scheme.mode, fsc_ppn=root // PAGE, SXL=scheme is SV32, **fields)

    @classmethod
    def process_directory(cls, pdtp: int, **fields) -> DeviceContext:
        """Return a context with the process directory that ``pdtp`` (of a `ProcessDirectory`) selects."""
        return cls(PDTV=True, fsc_mode=pdtp >> 60, fsc_ppn=pdtp & PTE_PPN_MASK, **fields)

    def with_second_stage(self, scheme: Scheme, root: Spa, *, GSCID: int) -> DeviceContext:
        """Return this context with the second-stage table of ``scheme`` at ``root``."""
        _check_root(root, 4 * PAGE)
        return replace(self, iohgatp_mode=scheme.mode, iohgatp_ppn=root // PAGE, GSCID=GSCID)

    def with_msi_table(self, root: Spa, *, mask: int, pattern: int) -> DeviceContext:
        """Return this context with the flat MSI page table at ``root`` for the pages that mask and pattern name."""
        _check_root(root)
        return replace(self, msiptp_mode=MSIPTP_FLAT, msiptp_ppn=root // PAGE, msi_addr_mask=mask, msi_addr_pattern=pattern)

    @property
    def root(self) -> Spa:
        """Address of the table that fsc points to."""
        return Spa(self.fsc_ppn * PAGE)

    @property
    def iohgatp_root(self) -> Spa:
        """Address of the second-stage root table."""
        return Spa(self.iohgatp_ppn * PAGE)

    @property
    def msiptp_root(self) -> Spa:
        """Address of the MSI page table."""
        return Spa(self.msiptp_ppn * PAGE)

    def dwords(self, *, extended: bool = False) -> list[int]:
        """Return tc, iohgatp, ta, fsc; and in the extended format msiptp, mask, pattern and the reserved one."""
        _check_fields(("iohgatp.MODE", self.iohgatp_mode, 4), ("iohgatp.PPN", self.iohgatp_ppn, 44), ("GSCID", self.GSCID, 16),
                      ("PSCID", self.PSCID, 20), ("RCID", self.RCID, 12), ("MCID", self.MCID, 12), ("fsc.MODE", self.fsc_mode, 4),
                      ("fsc.PPN", self.fsc_ppn, 44), ("msiptp.MODE", self.msiptp_mode, 4), ("msiptp.PPN", self.msiptp_ppn, 44),
                      ("msi_addr_mask", self.msi_addr_mask, 52), ("msi_addr_pattern", self.msi_addr_pattern, 52))  # fmt: skip
        tc = sum(bool(getattr(self, name)) << bit for bit, name in enumerate(TC_BITS))
        base = [tc, self.iohgatp_mode << 60 | self.GSCID << 44 | self.iohgatp_ppn,
                self.MCID << 52 | self.RCID << 40 | self.PSCID << 12, self.fsc_mode << 60 | self.fsc_ppn]
        msi = [self.msiptp_mode << 60 | self.msiptp_ppn, self.msi_addr_mask, self.msi_addr_pattern, 0]
        if not extended and any(msi):
            raise ValueError(f"A base-format device context must have no MSI fields, not {self!r}")
        return base + msi if extended else base

    def pack(self, *, extended: bool = False, order: str = "little") -> bytes:
        """Return the 32 bytes, or the 64 of the extended format."""
        return _packed(self.dwords(extended=extended), order)

    @classmethod
    def unpack(cls, data: bytes) -> DeviceContext:
        """Read the fields of 32 or 64 bytes; reserved bits are passed over."""
        if len(data) not in (DC_BYTES, DC_EXTENDED_BYTES):
            raise ValueError(f"A device context must be {DC_BYTES} or {DC_EXTENDED_BYTES} bytes long, not {len(data)!r}")
        return cls.of_dwords([int.from_bytes(data[at:at + 8], "little") for at in range(0, len(data), 8)])

    @classmethod
    def of_dwords(cls, dwords: list[int] | tuple[int, ...]) -> DeviceContext:
        """Read the fields of four or eight doublewords; reserved bits are passed over."""
        tc, iohgatp, ta, fsc, msiptp, mask, pattern, _ = (*dwords, 0, 0, 0, 0)[:8]
        flags = {name: bool(tc >> bit & 1) for bit, name in enumerate(TC_BITS)}
        return cls(**flags, iohgatp_mode=iohgatp >> 60, GSCID=iohgatp >> 44 & 0xFFFF, iohgatp_ppn=iohgatp & PTE_PPN_MASK,
                   PSCID=ta >> 12 & 0xFFFFF, fsc_mode=fsc >> 60, fsc_ppn=fsc & PTE_PPN_MASK, RCID=ta >> 40 & 0xFFF, MCID=ta >> 52,
                   msiptp_mode=msiptp >> 60, msiptp_ppn=msiptp & PTE_PPN_MASK, msi_addr_mask=mask & (1 << 52) - 1,
                   msi_addr_pattern=pattern & (1 << 52) - 1)  # fmt: skip


@dataclass(frozen=True)
class ProcessContext:
    """A process context, field by field; the default is a valid one without first stage. [RVIOMMU1.0 3.2.3]"""

    V: bool = True
    ENS: bool = False
    SUM: bool = False
    PSCID: int = 0
    fsc_mode: int = IOSATP_BARE
    fsc_ppn: int = 0

    @classmethod
    def first_stage(cls, scheme: Scheme, root: Spa, *, PSCID: int, **fields) -> ProcessContext:
        """Return a context whose first stage is the table of ``scheme`` at ``root`` (a GPA behind a second stage)."""
        _check_root(root)
        return cls(PSCID=PSCID, fsc_mode=scheme.mode, fsc_ppn=root // PAGE, **fields)

    @property
    def root(self) -> Spa:
        """Address of the first-stage table."""
        return Spa(self.fsc_ppn * PAGE)

    def dwords(self) -> list[int]:
        """Return ta and fsc."""
        _check_fields(("PSCID", self.PSCID, 20), ("fsc.MODE", self.fsc_mode, 4), ("fsc.PPN", self.fsc_ppn, 44))
        return [bool(self.V) | bool(self.ENS) << 1 | bool(self.SUM) << 2 | self.PSCID << 12, self.fsc_mode << 60 | self.fsc_ppn]

    def pack(self, *, order: str = "little") -> bytes:
        """Return the 16 bytes."""
        return _packed(self.dwords(), order)

    @classmethod
    def of_dwords(cls, dwords: list[int] | tuple[int, ...]) -> ProcessContext:
        """Read the fields of two doublewords; reserved bits are passed over."""
        ta, fsc = dwords
        return cls(V=bool(ta & 1), ENS=bool(ta >> 1 & 1), SUM=bool(ta >> 2 & 1), PSCID=ta >> 12 & 0xFFFFF, fsc_mode=fsc >> 60,
                   fsc_ppn=fsc & PTE_PPN_MASK)


@dataclass(frozen=True)
class MsiPte:
    """An entry of an MSI page table: basic translation to the page ``spa``, or a memory-resident interrupt file.

    With ``mrif_address`` (a multiple of 512) it is in MRIF mode: ``notice_address`` (a page) is where the notice MSI
    ``nid`` goes, and ``spa`` is not used.
    """

    V: bool = True
    spa: Spa = _NOWHERE
    mrif_address: Spa | None = None
    notice_address: Spa = _NOWHERE
    nid: int = 0

    def dwords(self) -> list[int]:
        """Return the two doublewords."""
        for name, value, multiple in (("Page", self.spa, PAGE), ("MRIF", self.mrif_address or 0, 512),
                                      ("Notice page", self.notice_address, PAGE)):
            if not 0 <= value < 1 << 56 or value % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} below 2^56, not {value!r}")
        _check_fields(("NID", self.nid, 11))
        if self.mrif_address is None:
            return [bool(self.V) | 3 << 1 | self.spa // PAGE << 10, 0]
        return [bool(self.V) | 1 << 1 | self.mrif_address // 512 << 7,
                self.nid & 0x3FF | self.notice_address // PAGE << 10 | self.nid >> 10 << 60]

    def pack(self, *, order: str = "little") -> bytes:
        """Return the 16 bytes."""
        return _packed(self.dwords(), order)

    @classmethod
    def of_dwords(cls, dwords: list[int] | tuple[int, ...]) -> MsiPte:
        """Read the fields of a good entry."""
        first, second = dwords
        if first >> 1 & 3 != 1:
            return cls(bool(first & 1), Spa((first >> 10 & PTE_PPN_MASK) * PAGE))
        return cls(bool(first & 1), mrif_address=Spa((first >> 7 & (1 << 47) - 1) * 512),
                   notice_address=Spa((second >> 10 & PTE_PPN_MASK) * PAGE), nid=second & 0x3FF | (second >> 60 & 1) << 10)


def extract(value: int, mask: int) -> int:
    """Gather the bits of ``value`` where ``mask`` is 1, packed to the right in their order. [RVIOMMU1.0 3.3.3]"""
    found = at = 0
    while mask:
        low = mask & -mask
        found |= bool(value & low) << at
        mask, at = mask ^ low, at + 1
    return found


def mgpaw(features: Collection[str], pas: int) -> int:
    """Return the width of guest physical addresses, of which msi_addr_mask and _pattern have the page number. [RVIOMMU1.0 3.1.3.5]

    ``features`` are the names of capabilities that are 1 (`Capabilities.switched_on`).
    """
    return next((scheme.address_bits for scheme in (SV57X4, SV48X4, SV39X4, SV32X4) if scheme.name in features), pas)
