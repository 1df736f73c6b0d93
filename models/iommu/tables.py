"""Builders of the tables that software keeps in memory for an IOMMU: device directory, Sv39 page tables.

They write good entries, and each malformed entry of the specification by name (`PTE_DEFECTS`, `DDTE_DEFECTS`,
`DC_DEFECTS`). Entries are written as software should write them on a live IOMMU: an entry becomes valid with its last
store and stops being valid with its first. Defects are those of the default `Capabilities`.
[RVIOMMU1.0 3.1] [RVPRIV Sv39, Svnapot, Svpbmt]
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from ..memory import Iova, Spa
from .faults import AccessType, Cause

PAGE = 4096
SIZE_4K = 1 << 12
SIZE_64K = 1 << 16  # [RVPRIV Svnapot] the only NAPOT size
SIZE_2M = 1 << 21
SIZE_1G = 1 << 30
SIZES = (SIZE_4K, SIZE_64K, SIZE_2M, SIZE_1G)
LEVEL_OF_SIZE = {SIZE_4K: 0, SIZE_64K: 0, SIZE_2M: 1, SIZE_1G: 2}
SIZE_OF_LEVEL = (SIZE_4K, SIZE_2M, SIZE_1G)

# [RVPRIV Sv39] page table entry
PTE_V, PTE_R, PTE_W, PTE_X, PTE_U, PTE_G, PTE_A, PTE_D = (1 << bit for bit in range(8))
PTE_PPN_SHIFT = 10
PTE_PPN_MASK = (1 << 44) - 1
PTE_PBMT_SHIFT = 61
PTE_N = 1 << 63

DC_BYTES = 32  # [RVIOMMU1.0 3.1.3] base format
DDT_MODE_OF_LEVELS = {1: 2, 2: 3, 3: 4}  # [RVIOMMU1.0 6.5] ddtp.iommu_mode
DEVICE_ID_BITS = {1: 7, 2: 16, 3: 24}  # [RVIOMMU1.0 3.1] of base-format directories
IOSATP_BARE, IOSATP_SV39 = 0, 8  # [RVIOMMU1.0 3.1.3.6]


class Memory(Protocol):
    """What the builders and walks need of a memory; `GuestMemory` is one. Either call may raise `AccessFault`."""

    def read(self, address: Spa, length: int) -> bytes: ...
    def write(self, address: Spa, data: bytes) -> None: ...


class Observer(Protocol):
    """Hears of every change that software makes to tables, in the call that makes it; `AllowedTranslations` is one."""

    def mapped(self, root: Spa, iova: Iova, spa: Spa, size: int, perms: str, *, is_global: bool = False) -> None: ...
    def unmapped(self, root: Spa, iova: Iova) -> None: ...
    def context_changed(self, device_id: int, context: DeviceContext | Cause) -> None: ...


class Allocator:
    """Hands out zeroed, naturally aligned runs of 4 KiB pages from one range of memory.

    Parameters
    ----------
    memory : :class:`Memory`
    start, length : :class:`int`
        The range in bytes; both multiples of 4096.
    rng : :class:`random.Random` or None
        When given, single pages come in random order, so that nothing can rely on neighbours.
    """

    def __init__(self, memory: Memory, start: Spa, length: int, *, rng: random.Random | None = None):
        if start < 0 or start % PAGE:
            raise ValueError(f"Start must be a page address, not {start!r}")
        if length <= 0 or length % PAGE:
            raise ValueError(f"Length must be a positive multiple of {PAGE} bytes, not {length!r}")
        self.memory, self.start, self.length, self.rng = memory, start, length, rng
        self._free = list(range(start // PAGE, (start + length) // PAGE))

    @property
    def free_count(self) -> int:
        """Pages that are not handed out."""
        return len(self._free)

    def page(self) -> Spa:
        """Return the address of one zeroed page; :exc:`MemoryError` when none is left."""
        if not self._free:
            raise MemoryError(f"No page is left of {self.length // PAGE}")
        at = self.rng.randrange(len(self._free)) if self.rng else 0
        return self._take(self._free.pop(at), 1)

    def pages(self, count: int) -> Spa:
        """Return ``count`` zeroed pages in a row, aligned to ``count`` rounded up to a power of two."""
        if count < 1:
            raise ValueError(f"Count of pages must be at least 1, not {count!r}")
        align, run = 1 << (count - 1).bit_length(), 0
        for at, page in enumerate(self._free):
            follows = at > 0 and self._free[at - 1] == page - 1
            run = run + 1 if run and follows else int(page % align == 0)
            if run == count:
                del self._free[at - count + 1:at + 1]
                return self._take(page - count + 1, count)
        raise MemoryError(f"No run of {count} pages is left")

    def free(self, address: Spa, count: int = 1) -> None:
        """Take pages back; :exc:`ValueError` when one was not handed out."""
        for page in range(address // PAGE, address // PAGE + count):
            at = bisect.bisect_left(self._free, page)
            is_free = at < len(self._free) and self._free[at] == page
            if address % PAGE or is_free or not self.start <= page * PAGE < self.start + self.length:
                raise ValueError(f"Only a page that was handed out can be freed, not {address!r}")
            self._free.insert(at, page)

    def _take(self, page: int, count: int) -> Spa:
        self.memory.write(Spa(page * PAGE), bytes(count * PAGE))
        return Spa(page * PAGE)


@dataclass(frozen=True)
class DeviceContext:
    """A base-format device context, field by field; the default is a valid one that passes addresses unchanged.

    ``fsc_mode`` and ``fsc_ppn`` are iosatp, or pdtp when ``PDTV`` is set. Addresses are page numbers, as in the
    entry. Reserved bits are not part of it: `DC_DEFECTS` sets them. [RVIOMMU1.0 3.1.3]
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
    iohgatp_mode: int = 0
    iohgatp_ppn: int = 0
    GSCID: int = 0
    PSCID: int = 0
    fsc_mode: int = IOSATP_BARE
    fsc_ppn: int = 0

    @classmethod
    def sv39(cls, root: Spa, *, PSCID: int, DTF: bool = False) -> DeviceContext:
        """Return a context with the Sv39 first stage whose root table is at ``root``."""
        if root % PAGE or not 0 <= root < 1 << 56:
            raise ValueError(f"Root must be a page address below 2^56, not {root!r}")
        return cls(fsc_mode=IOSATP_SV39, fsc_ppn=root // PAGE, PSCID=PSCID, DTF=DTF)

    @property
    def root(self) -> Spa:
        """Address of the table that fsc points to."""
        return Spa(self.fsc_ppn * PAGE)

    def dwords(self) -> list[int]:
        """Return tc, iohgatp, ta, fsc."""
        for name, value, width in (("iohgatp.MODE", self.iohgatp_mode, 4), ("iohgatp.PPN", self.iohgatp_ppn, 44),
                                   ("GSCID", self.GSCID, 16), ("PSCID", self.PSCID, 20),
                                   ("fsc.MODE", self.fsc_mode, 4), ("fsc.PPN", self.fsc_ppn, 44)):
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")
        tc = sum(bool(getattr(self, name)) << bit for bit, name in enumerate(_TC_BITS))
        return [tc, self.iohgatp_mode << 60 | self.GSCID << 44 | self.iohgatp_ppn, self.PSCID << 12,
                self.fsc_mode << 60 | self.fsc_ppn]

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return b"".join(dword.to_bytes(8, "little") for dword in self.dwords())

    @classmethod
    def unpack(cls, data: bytes) -> DeviceContext:
        """Read the fields of 32 bytes; reserved bits are passed over."""
        if len(data) != DC_BYTES:
            raise ValueError(f"A base-format device context must be {DC_BYTES} bytes long, not {len(data)!r}")
        tc, iohgatp, ta, fsc = (int.from_bytes(data[at:at + 8], "little") for at in range(0, DC_BYTES, 8))
        flags = {name: bool(tc >> bit & 1) for bit, name in enumerate(_TC_BITS)}
        return cls(**flags, iohgatp_mode=iohgatp >> 60, GSCID=iohgatp >> 44 & 0xFFFF, iohgatp_ppn=iohgatp & PTE_PPN_MASK,
                   PSCID=ta >> 12 & 0xFFFFF, fsc_mode=fsc >> 60, fsc_ppn=fsc & PTE_PPN_MASK)


_TC_BITS = ("V", "EN_ATS", "EN_PRI", "T2GPA", "DTF", "PDTV", "PRPR", "GADE", "SADE", "DPE", "SBE", "SXL")


# --------------------------------------------------------------------------------------------------------------------
# Malformed entries, by name


@dataclass(frozen=True)
class PteDefect:
    """One way in which a page table entry is wrong or insufficient.

    ``where`` is "leaf" (a 4 KiB page), "superpage" (2 MiB or 1 GiB) or "pointer" (non-leaf). ``faults`` are the kinds
    of user access that end in a page fault.
    """

    where: str
    mutate: Callable[[int], int]
    faults: frozenset[AccessType] = frozenset(AccessType)


@dataclass(frozen=True)
class DirectoryDefect:
    """One way in which a directory entry is wrong; ``mutate`` works on its doublewords (one, or the DC's four)."""

    mutate: Callable[[list[int]], list[int]]
    cause: Cause = Cause.DDT_ENTRY_MISCONFIGURED


def _set(bits: int) -> Callable[[int], int]:
    return lambda pte: pte | bits


def _clear(bits: int) -> Callable[[int], int]:
    return lambda pte: pte & ~bits


def _change(clear: int, set_: int) -> Callable[[int], int]:
    return lambda pte: pte & ~clear | set_


def _pte_defects() -> dict[str, PteDefect]:
    read, write, exec_ = AccessType.READ, AccessType.WRITE, AccessType.EXEC
    rwx = PTE_R | PTE_W | PTE_X
    found = {
        "LEAF_V_CLEAR": PteDefect("leaf", _clear(PTE_V)),
        "LEAF_W_WITHOUT_R": PteDefect("leaf", _change(rwx, PTE_W)),
        "LEAF_WX_WITHOUT_R": PteDefect("leaf", _change(rwx, PTE_W | PTE_X)),
        "LEAF_U_CLEAR": PteDefect("leaf", _clear(PTE_U)),
        "LEAF_A_CLEAR": PteDefect("leaf", _clear(PTE_A)),
        "LEAF_D_CLEAR": PteDefect("leaf", _clear(PTE_D), frozenset({write})),
        "LEAF_READ_ONLY": PteDefect("leaf", _change(rwx, PTE_R), frozenset({write, exec_})),
        "LEAF_EXEC_ONLY": PteDefect("leaf", _change(rwx, PTE_X), frozenset({read, write})),
        "LEAF_X_CLEAR": PteDefect("leaf", _clear(PTE_X), frozenset({exec_})),
        "POINTER_AT_LEVEL_0": PteDefect("leaf", _clear(rwx | PTE_U | PTE_A | PTE_D)),
        "SUPERPAGE_MISALIGNED": PteDefect("superpage", _set(1 << PTE_PPN_SHIFT)),
        "SUPERPAGE_MISALIGNED_HIGH": PteDefect("superpage", _set(1 << PTE_PPN_SHIFT + 8)),
        "SUPERPAGE_NAPOT": PteDefect("superpage", _set(PTE_N)),
        "SUPERPAGE_A_CLEAR": PteDefect("superpage", _clear(PTE_A)),
        "SUPERPAGE_D_CLEAR": PteDefect("superpage", _clear(PTE_D), frozenset({write})),
        "POINTER_V_CLEAR": PteDefect("pointer", _clear(PTE_V)),
        "POINTER_W_SET": PteDefect("pointer", _set(PTE_W)),
        "POINTER_A_SET": PteDefect("pointer", _set(PTE_A)),
        "POINTER_D_SET": PteDefect("pointer", _set(PTE_D)),
        "POINTER_U_SET": PteDefect("pointer", _set(PTE_U)),
        "POINTER_NAPOT": PteDefect("pointer", _set(PTE_N)),
    }
    for where in ("leaf", "superpage", "pointer"):
        for bit in range(54, 61):
            found[f"{where.upper()}_RESERVED_{bit}"] = PteDefect(where, _set(1 << bit))
        for pbmt in (1, 2, 3):
            found[f"{where.upper()}_PBMT_{pbmt}"] = PteDefect(where, _set(pbmt << PTE_PBMT_SHIFT))
    for low in range(16):
        if low != 8:  # the encoding of 64 KiB
            found[f"LEAF_NAPOT_RESERVED_{low}"] = PteDefect(
                "leaf", _change(0xF << PTE_PPN_SHIFT, PTE_N | low << PTE_PPN_SHIFT))
    return found


def _in_dword(index: int, clear: int, set_: int) -> Callable[[list[int]], list[int]]:
    return lambda dwords: [dword & ~clear | set_ if at == index else dword for at, dword in enumerate(dwords)]


def _dc_defects() -> dict[str, DirectoryDefect]:
    mode, pdtv, tc, iohgatp, ta, fsc = 0xF << 60, 1 << 5, 0, 1, 2, 3
    found = {"TC_V_CLEAR": DirectoryDefect(_in_dword(tc, 1, 0), Cause.DDT_ENTRY_NOT_VALID)}
    for name in ("EN_ATS", "EN_PRI", "T2GPA", "PRPR", "GADE", "SADE", "DPE", "SBE", "SXL"):
        found[f"TC_{name}_SET"] = DirectoryDefect(_in_dword(tc, 0, 1 << _TC_BITS.index(name)))
    for bit in (*range(12, 24), *range(32, 64)):
        found[f"TC_RESERVED_{bit}"] = DirectoryDefect(_in_dword(tc, 0, 1 << bit))
    for value in range(1, 16):
        found[f"IOHGATP_MODE_{value}"] = DirectoryDefect(_in_dword(iohgatp, mode, value << 60))
    for bit in (*range(12), *range(32, 64)):  # 63:40 are RCID and MCID, reserved without QOSID
        found[f"TA_RESERVED_{bit}"] = DirectoryDefect(_in_dword(ta, 0, 1 << bit))
    for bit in range(44, 60):
        found[f"FSC_RESERVED_{bit}"] = DirectoryDefect(_in_dword(fsc, 0, 1 << bit))
    for value in (*range(1, 8), *range(9, 16)):
        found[f"IOSATP_MODE_{value}"] = DirectoryDefect(_in_dword(fsc, mode, value << 60))
    for value in range(1, 16):
        with_mode = _in_dword(fsc, mode, value << 60)
        found[f"PDTP_MODE_{value}"] = DirectoryDefect(
            lambda dwords, with_mode=with_mode: _in_dword(tc, 0, pdtv)(with_mode(dwords)))
    return found


def _ddte_defects() -> dict[str, DirectoryDefect]:
    found = {"DDTE_V_CLEAR": DirectoryDefect(_in_dword(0, 1, 0), Cause.DDT_ENTRY_NOT_VALID)}
    for bit in (*range(1, 10), *range(54, 64)):
        found[f"DDTE_RESERVED_{bit}"] = DirectoryDefect(_in_dword(0, 0, 1 << bit))
    return found


PTE_DEFECTS = _pte_defects()  # [RVPRIV Sv39, Svnapot, Svpbmt]
DC_DEFECTS = _dc_defects()  # [RVIOMMU1.0 3.1.4]
DDTE_DEFECTS = _ddte_defects()  # [RVIOMMU1.0 3.1.2]


# --------------------------------------------------------------------------------------------------------------------
# Builders


class DeviceDirectory:
    """A device directory of base-format contexts. [RVIOMMU1.0 3.1]

    Parameters
    ----------
    memory : :class:`Memory`
    allocator : :class:`Allocator`
        Gives the root page and the pages below it, as they are needed.
    levels : :class:`int`
        1, 2 or 3: device ids of 7, 16 or 24 bits.
    observer : :class:`Observer` or None
        Hears of every change of a context.
    """

    def __init__(self, memory: Memory, allocator: Allocator, *, levels: int, observer: Observer | None = None):
        if levels not in DDT_MODE_OF_LEVELS:
            raise ValueError(f"Levels of a device directory must be 1, 2 or 3, not {levels!r}")
        self.memory, self.allocator, self.levels, self.observer = memory, allocator, levels, observer
        self.root = allocator.page()

    @property
    def ddtp(self) -> int:
        """The value of ddtp that selects this directory. [RVIOMMU1.0 6.5]"""
        return self.root // PAGE << 10 | DDT_MODE_OF_LEVELS[self.levels]

    def entry_address(self, device_id: int, level: int = 0) -> Spa:
        """Return where the entry of ``level`` for this device is (0: the context), making the tables above it."""
        if not 0 <= device_id < 1 << DEVICE_ID_BITS[self.levels]:
            raise ValueError(f"Device id must fit the {DEVICE_ID_BITS[self.levels]} bits of a directory of "
                             f"{self.levels} levels, not {device_id!r}")
        if not 0 <= level < self.levels:
            raise ValueError(f"Level must be below {self.levels}, not {level!r}")
        index, at = (device_id & 0x7F, device_id >> 7 & 0x1FF, device_id >> 16), self.root
        for upper in range(self.levels - 1, level, -1):
            entry = Spa(at + index[upper] * 8)
            pointer = _load(self.memory, entry)
            if not pointer & 1:
                pointer = self.allocator.page() // PAGE << 10 | 1
                _store(self.memory, entry, pointer)
            at = Spa((pointer >> 10 & PTE_PPN_MASK) * PAGE)
        return Spa(at + index[level] * (8 if level else DC_BYTES))

    def set(self, device_id: int, context: DeviceContext) -> None:
        """Write a context; one that was valid before passes through V=0 first."""
        self._write(device_id, context.dwords(), context if context.V else Cause.DDT_ENTRY_NOT_VALID)

    def clear(self, device_id: int) -> None:
        """Make the device's context invalid (V=0, then zeroes)."""
        self._write(device_id, [0, 0, 0, 0], Cause.DDT_ENTRY_NOT_VALID)

    def get(self, device_id: int) -> DeviceContext:
        """Read the device's context back."""
        return DeviceContext.unpack(self.memory.read(self.entry_address(device_id), DC_BYTES))

    def corrupt(self, device_id: int, name: str, *, level: int = 1) -> Callable[[], None]:
        """Plant the defect ``name`` of `DC_DEFECTS`, or of `DDTE_DEFECTS` in the pointer of ``level``.

        Returns a function that takes it out again. The observer hears of the device given, not of its neighbours
        below the same pointer.
        """
        is_leaf = name in DC_DEFECTS
        if not is_leaf and name not in DDTE_DEFECTS:
            raise ValueError(f"Defect must be a name in DC_DEFECTS or DDTE_DEFECTS, not {name!r}")
        if not is_leaf and level < 1:
            raise ValueError(f"Level of a pointer must be at least 1, not {level!r}")
        at = self.entry_address(device_id, 0 if is_leaf else level)
        old = [_load(self.memory, Spa(at + n * 8)) for n in range(4 if is_leaf else 1)]
        defect = (DC_DEFECTS if is_leaf else DDTE_DEFECTS)[name]
        before = self.get(device_id)
        self._write_at(at, defect.mutate(old), device_id, defect.cause)
        return lambda: self._write_at(at, old, device_id, before if before.V else Cause.DDT_ENTRY_NOT_VALID)

    def _write(self, device_id: int, dwords: list[int], becomes: DeviceContext | Cause) -> None:
        self._write_at(self.entry_address(device_id), dwords, device_id, becomes)

    def _write_at(self, at: Spa, dwords: list[int], device_id: int, becomes: DeviceContext | Cause) -> None:
        if len(dwords) > 1 and _load(self.memory, at) & 1:
            _store(self.memory, at, 0)
            if self.observer:
                self.observer.context_changed(device_id, Cause.DDT_ENTRY_NOT_VALID)
        if self.observer:
            self.observer.context_changed(device_id, becomes)
        for n in range(len(dwords) - 1, -1, -1):  # V is in the first doubleword: stored last
            _store(self.memory, Spa(at + n * 8), dwords[n])


@dataclass(frozen=True)
class Mapping:
    """One page that a table maps: base addresses, size in bytes, what a device may do ("rwx"), whether it is global."""

    iova: Iova
    spa: Spa
    size: int
    perms: str
    is_global: bool = False


class PageTable:
    """An Sv39 first-stage page table. [RVPRIV Sv39]

    Tables that are replaced by a superpage are not reused but collected in ``retired``: free them after the
    invalidation that covers them is complete.

    Parameters
    ----------
    memory : :class:`Memory`
    allocator : :class:`Allocator`
        Gives the root page and the pages below it, as they are needed.
    observer : :class:`Observer` or None
        Hears of every change of a translation.
    """

    def __init__(self, memory: Memory, allocator: Allocator, *, observer: Observer | None = None):
        self.memory, self.allocator, self.observer = memory, allocator, observer
        self.root = allocator.page()
        self.mappings: dict[Iova, Mapping] = {}
        self.retired: list[Spa] = []

    def map_page(self, iova: Iova, spa: Spa, *, perms: str = "rwu", size: int = SIZE_4K,
                 a: bool = True, d: bool = True, g: bool = False, pbmt: int = 0) -> None:
        """Map one page of ``size`` bytes (4 KiB, 64 KiB as Svnapot, 2 MiB, 1 GiB).

        ``perms`` is out of "rwxu", with "r" or "x", and no "w" without "r": what else an entry can say is a defect,
        see `corrupt`. ``a``, ``d``, ``g``, ``pbmt`` are the bits of the entry.
        """
        if size not in LEVEL_OF_SIZE:
            raise ValueError(f"Page size must be 4 KiB, 64 KiB, 2 MiB or 1 GiB, not {size!r}")
        if iova % size or not _is_canonical(iova):
            raise ValueError(f"IOVA must be a multiple of the page size and sign-extended from 39 bits, not {iova!r}")
        if spa % size or not 0 <= spa < 1 << 56:
            raise ValueError(f"Physical address must be a multiple of the page size below 2^56, not {spa!r}")
        flags = _flags(perms)
        if not 0 <= pbmt <= 3:
            raise ValueError(f"PBMT must be 0 to 3, not {pbmt!r}")
        level, ppn = LEVEL_OF_SIZE[size], spa // PAGE
        at = self._make_slot(iova, level)
        if any(_load(self.memory, Spa(at + n * 8)) & PTE_V for n in range(16 if size == SIZE_64K else 1)):
            raise ValueError(f"IOVA must not be mapped yet, not {iova!r}")
        pte = flags | PTE_V | a * PTE_A | d * PTE_D | g * PTE_G | pbmt << PTE_PBMT_SHIFT | ppn << PTE_PPN_SHIFT
        self._mapped(Mapping(iova, spa, size, _usable(perms, a, d), g))
        if size == SIZE_64K:  # [RVPRIV Svnapot] 16 equal entries, PPN[3:0] = 1000b
            for n in range(16):
                _store(self.memory, Spa(at + n * 8), pte | PTE_N | 8 << PTE_PPN_SHIFT)
        else:
            _store(self.memory, at, pte)

    def unmap(self, iova: Iova) -> Mapping:
        """Make the page that holds ``iova`` invalid and return what it mapped."""
        mapping = self._mapping(iova)
        at = self._slot(mapping.iova, LEVEL_OF_SIZE[mapping.size])
        for n in range(16 if mapping.size == SIZE_64K else 1):
            _store(self.memory, Spa(at + n * 8), 0)
        self._unmapped(mapping)
        return mapping

    def protect(self, iova: Iova, perms: str, *, a: bool = True, d: bool = True) -> None:
        """Change the permissions, A and D of the page that holds ``iova``; its address stays."""
        old = self._mapping(iova)
        clear, flags = PTE_R | PTE_W | PTE_X | PTE_U | PTE_A | PTE_D, _flags(perms) | a * PTE_A | d * PTE_D
        at = self._slot(old.iova, LEVEL_OF_SIZE[old.size])
        if self.observer:
            self._observe_unmapped(old)
        self._mapped(replace(old, perms=_usable(perms, a, d)))
        for n in range(16 if old.size == SIZE_64K else 1):
            _store(self.memory, Spa(at + n * 8), _load(self.memory, Spa(at + n * 8)) & ~clear | flags)

    def corrupt(self, iova: Iova, name: str, *, level: int | None = None) -> Callable[[], None]:
        """Plant the defect ``name`` of `PTE_DEFECTS` on the way to ``iova``; returns a function that takes it out.

        Leaf and superpage defects change the leaf that maps ``iova`` (of a 64 KiB page: the one entry read for
        ``iova``); pointer defects change the pointer of ``level`` (1 or 2; by default the one above the leaf).
        """
        if name not in PTE_DEFECTS:
            raise ValueError(f"Defect must be a name in PTE_DEFECTS, not {name!r}")
        defect, mapping = PTE_DEFECTS[name], self._mapping(iova)
        leaf = LEVEL_OF_SIZE[mapping.size]
        if (defect.where == "leaf") != (leaf == 0) and defect.where != "pointer":
            raise ValueError(f"Defect {name} needs a {defect.where}, not {mapping!r}")
        if defect.where == "pointer":
            at_level = leaf + 1 if level is None else level
            if not leaf < at_level <= 2:
                raise ValueError(f"Level of a pointer above this page must be {leaf + 1} to 2, not {at_level!r}")
            span = 1 << 12 + 9 * at_level
            hit = [page for page in self.mappings.values() if page.iova // span == iova // span]
        else:
            at_level, hit = leaf, [mapping]
        at = self._slot(iova, at_level)
        old = _load(self.memory, at)
        left = "".join(perm for perm, access in (("r", AccessType.READ), ("w", AccessType.WRITE),
                                                 ("x", AccessType.EXEC)) if access not in defect.faults)
        _store(self.memory, at, defect.mutate(old))
        if self.observer:
            for page in hit:
                self._observe_unmapped(page)
                if left:
                    self._observe_mapped(replace(page, perms="".join(p for p in page.perms if p in left)))

        def undo() -> None:
            for page in hit if self.observer else ():
                if left:
                    self._observe_unmapped(page)
                self._observe_mapped(page)
            _store(self.memory, at, old)
        return undo

    # -- inside --

    def _make_slot(self, iova: Iova, level: int) -> Spa:
        """Return the address of the entry of ``level`` for ``iova``, free to be written; makes the tables above."""
        at = self.root
        for upper in range(2, level, -1):
            slot = Spa(at + _index(iova, upper) * 8)
            pte = _load(self.memory, slot)
            if not pte & PTE_V:
                pte = self.allocator.page() // PAGE << PTE_PPN_SHIFT | PTE_V
                _store(self.memory, slot, pte)
            elif pte & (PTE_R | PTE_X):
                raise ValueError(f"IOVA must not lie in a superpage that is mapped, not {iova!r}")
            at = Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE)
        slot = Spa(at + _index(iova, level) * 8)
        pte = _load(self.memory, slot)
        if level and pte & PTE_V and not pte & (PTE_R | PTE_X):
            below = self._empty_tables(Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE), level - 1)
            if below is None:
                raise ValueError(f"No smaller page may be mapped inside a new superpage, not at {iova!r}")
            _store(self.memory, slot, 0)
            self.retired += below
        return slot

    def _empty_tables(self, table: Spa, level: int) -> list[Spa] | None:
        """Return a table without leaves and those below it; None when a leaf is found."""
        found = [table]
        for n in range(512):
            pte = _load(self.memory, Spa(table + n * 8))
            if pte & PTE_V:
                if level == 0 or pte & (PTE_R | PTE_X):
                    return None
                below = self._empty_tables(Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE), level - 1)
                if below is None:
                    return None
                found += below
        return found

    def _slot(self, iova: Iova, level: int) -> Spa:
        at = self.root
        for upper in range(2, level, -1):
            pte = _load(self.memory, Spa(at + _index(iova, upper) * 8))
            at = Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE)
        return Spa(at + _index(iova, level) * 8)

    def _mapping(self, iova: Iova) -> Mapping:
        for size in SIZES:
            mapping = self.mappings.get(Iova(iova // size * size))
            if mapping and mapping.size == size:
                return mapping
        raise ValueError(f"IOVA must be mapped, not {iova!r}")

    def _mapped(self, mapping: Mapping) -> None:
        self.mappings[mapping.iova] = mapping
        if self.observer:
            self._observe_mapped(mapping)

    def _unmapped(self, mapping: Mapping) -> None:
        del self.mappings[mapping.iova]
        if self.observer:
            self._observe_unmapped(mapping)

    def _observe_mapped(self, mapping: Mapping) -> None:
        self.observer.mapped(self.root, mapping.iova, mapping.spa, mapping.size, mapping.perms,
                             is_global=mapping.is_global)

    def _observe_unmapped(self, mapping: Mapping) -> None:
        self.observer.unmapped(self.root, mapping.iova)


def _load(memory: Memory, address: Spa) -> int:
    return int.from_bytes(memory.read(address, 8), "little")


def _store(memory: Memory, address: Spa, value: int) -> None:
    memory.write(address, value.to_bytes(8, "little"))


def _index(iova: Iova, level: int) -> int:
    return iova >> 12 + 9 * level & 0x1FF


def _is_canonical(iova: Iova) -> bool:
    return 0 <= iova < 1 << 64 and iova >> 38 in (0, (1 << 26) - 1)


def _flags(perms: str) -> int:
    """Return R, W, X, U of a leaf; :exc:`ValueError` for what would not be a good leaf."""
    if set(perms) - set("rwxu") or len(set(perms)) != len(perms):
        raise ValueError(f'Permissions must be out of "rwxu", each at most once, not {perms!r}')
    if not set(perms) & set("rx") or ("w" in perms and "r" not in perms):
        raise ValueError(f'Permissions must contain "r" or "x", and no "w" without "r", not {perms!r}')
    return sum(bit for perm, bit in zip("rwxu", (PTE_R, PTE_W, PTE_X, PTE_U)) if perm in perms)


def _usable(perms: str, a: bool, d: bool) -> str:
    """Return the permissions that a device has now: none without A or U, no write without D. [RVIOMMU1.0 3.3]"""
    if not a or "u" not in perms:
        return ""
    return "".join(perm for perm in "rwx" if perm in perms and (perm != "w" or d))
