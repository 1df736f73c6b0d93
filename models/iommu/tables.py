"""Builders of the tables that software keeps in memory for an IOMMU: directories, page tables of both stages, MSI tables.

They write good entries, and each malformed entry of the specification by name (`defects.py`). Entries are written as
software should write them on a live IOMMU: an entry becomes valid with its last store and stops being valid with its
first. [RVIOMMU1.0 3.1, 3.2, 3.3.3] [RVPRIV Sv32, Sv39, Sv48, Sv57, Hypervisor, Svnapot, Svpbmt]
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

from ..memory import Gpa, Iova, Spa
from .defects import (
    DC_DEFECTS,
    DDTE_DEFECTS,
    FIRST_FEATURES,
    PDTE_DEFECTS,
    PTE_DEFECTS,
    DirectoryDefect,
    PteDefect,
    device_context_defects,
    msi_pte_defects,
    process_context_defects,
    pte_defects,
)
from .entries import (
    DC_BYTES,
    DC_EXTENDED_BYTES,
    DDT_MODE_OF_LEVELS,
    DEVICE_ID_BITS,
    EXTENDED_DEVICE_ID_BITS,
    IOSATP_BARE,
    IOSATP_SV39,
    LEVEL_OF_SIZE,
    MSI_PTE_BYTES,
    PAGE,
    PC_BYTES,
    PROCESS_ID_BITS,
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
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_64K,
    SIZE_OF_LEVEL,
    SIZES,
    SV39,
    DeviceContext,
    MsiPte,
    ProcessContext,
    Scheme,
    extract,
)
from .faults import AccessType, Cause

__all__ = [
    "DC_BYTES", "DC_DEFECTS", "DDTE_DEFECTS", "DDT_MODE_OF_LEVELS", "DEVICE_ID_BITS", "IOSATP_BARE", "IOSATP_SV39", "LEVEL_OF_SIZE",
    "PAGE", "PTE_A", "PTE_D", "PTE_DEFECTS", "PTE_G", "PTE_N", "PTE_PBMT_SHIFT", "PTE_PPN_MASK", "PTE_PPN_SHIFT", "PTE_R", "PTE_U",
    "PTE_V", "PTE_W", "PTE_X", "SIZES", "SIZE_1G", "SIZE_2M", "SIZE_4K", "SIZE_64K", "SIZE_OF_LEVEL", "Allocator", "DeviceContext",
    "DeviceDirectory", "DirectoryDefect", "GuestView", "Mapping", "Memory", "MsiTable", "Observer", "PageTable", "ProcessDirectory",
    "PteDefect",
]  # fmt: skip


class Memory(Protocol):
    """What the builders and walks need of a memory; `GuestMemory` is one. Either call may raise `AccessFault`."""

    def read(self, address: Spa, length: int) -> bytes: ...
    def write(self, address: Spa, data: bytes) -> None: ...


class Observer(Protocol):
    """Hears of every change that software makes to tables, in the call that makes it; `AllowedTranslations` is one."""

    def mapped(self, root: Spa, iova: Iova, spa: Spa, size: int, perms: str, *, is_global: bool = False) -> None: ...
    def unmapped(self, root: Spa, iova: Iova) -> None: ...
    def context_changed(self, device_id: int, context: DeviceContext | Cause) -> None: ...
    def pointer_replaced(self, root: Spa, iova: Iova, size: int) -> None: ...
    def msi_changed(self, root: Spa, gpa: Gpa, entry: MsiPte | Cause) -> None: ...
    def process_context_changed(self, root: Spa, process_id: int, context: ProcessContext | Cause) -> None: ...


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


# --------------------------------------------------------------------------------------------------------------------
# Directories and MSI tables


class DeviceDirectory:
    """A device directory. [RVIOMMU1.0 3.1]

    Parameters
    ----------
    memory : :class:`Memory`
    allocator : :class:`Allocator`
        Gives the root page and the pages below it, as they are needed.
    levels : :class:`int`
        1, 2 or 3: device ids of 7, 16 or 24 bits; in the extended format 6, 15 or 24.
    observer : :class:`Observer` or None
        Hears of every change of a context.
    extended : :class:`bool`
        Contexts of 64 bytes (MSI_FLAT).
    order : :class:`str`
        "little" or "big", as fctl.BE says.
    features, gxl, gxl_writable
        Decide which ``defects`` there are, as in `device_context_defects`.
    """

    def __init__(self, memory: Memory, allocator: Allocator, *, levels: int, observer: Observer | None = None, extended: bool = False,
                 order: str = "little", features: Collection[str] = FIRST_FEATURES, gxl: bool = False, gxl_writable: bool = False):
        if levels not in DDT_MODE_OF_LEVELS:
            raise ValueError(f"Levels of a device directory must be 1, 2 or 3, not {levels!r}")
        self.memory, self.allocator, self.levels, self.observer = memory, allocator, levels, observer
        self.extended, self.order = extended, _checked_order(order)
        self.defects = device_context_defects(features, extended=extended, gxl=gxl, gxl_writable=gxl_writable)
        self.root = allocator.page()

    @property
    def ddtp(self) -> int:
        """The value of ddtp that selects this directory. [RVIOMMU1.0 6.5]"""
        return self.root // PAGE << 10 | DDT_MODE_OF_LEVELS[self.levels]

    @property
    def device_id_bits(self) -> int:
        """Bits of a device id that this directory can hold."""
        return (EXTENDED_DEVICE_ID_BITS if self.extended else DEVICE_ID_BITS)[self.levels]

    def entry_address(self, device_id: int, level: int = 0) -> Spa:
        """Return where the entry of ``level`` for this device is (0: the context), making the tables above it."""
        if not 0 <= device_id < 1 << self.device_id_bits:
            raise ValueError(f"Device id must fit the {self.device_id_bits} bits of a directory of "
                             f"{self.levels} levels, not {device_id!r}")
        low = 6 if self.extended else 7
        index = (device_id & (1 << low) - 1, device_id >> low & 0x1FF, device_id >> low + 9)
        return _directory_entry(self, index, level, DC_EXTENDED_BYTES if self.extended else DC_BYTES)

    def set(self, device_id: int, context: DeviceContext) -> None:
        """Write a context; one that was valid before passes through V=0 first."""
        self._write(device_id, context.dwords(extended=self.extended), context if context.V else Cause.DDT_ENTRY_NOT_VALID)

    def clear(self, device_id: int) -> None:
        """Make the device's context invalid (V=0, then zeroes)."""
        self._write(device_id, [0] * self._count, Cause.DDT_ENTRY_NOT_VALID)

    def get(self, device_id: int) -> DeviceContext:
        """Read the device's context back."""
        return DeviceContext.of_dwords(_load_all(self.memory, self.entry_address(device_id), self._count, self.order))

    def corrupt(self, device_id: int, name: str, *, level: int = 1) -> Callable[[], None]:
        """Plant the defect ``name`` of ``defects``, or of `DDTE_DEFECTS` in the pointer of ``level``.

        Returns a function that takes it out again. The observer hears of the device given, not of its neighbours
        below the same pointer.
        """
        is_leaf = name in self.defects
        if not is_leaf and name not in DDTE_DEFECTS:
            raise ValueError(f"Defect must be a name in DC_DEFECTS or DDTE_DEFECTS, not {name!r}")
        if not is_leaf and level < 1:
            raise ValueError(f"Level of a pointer must be at least 1, not {level!r}")
        at = self.entry_address(device_id, 0 if is_leaf else level)
        old = _load_all(self.memory, at, self._count if is_leaf else 1, self.order)
        defect = (self.defects if is_leaf else DDTE_DEFECTS)[name]
        before = self.get(device_id)
        self._write_at(at, defect.mutate(old), device_id, defect.cause)
        return lambda: self._write_at(at, old, device_id, before if before.V else Cause.DDT_ENTRY_NOT_VALID)

    @property
    def _count(self) -> int:
        return 8 if self.extended else 4

    def _write(self, device_id: int, dwords: list[int], becomes: DeviceContext | Cause) -> None:
        self._write_at(self.entry_address(device_id), dwords, device_id, becomes)

    def _write_at(self, at: Spa, dwords: list[int], device_id: int, becomes: DeviceContext | Cause) -> None:
        observer = self.observer
        _store_entry(self.memory, at, dwords, self.order,
                     None if observer is None else lambda: observer.context_changed(device_id, Cause.DDT_ENTRY_NOT_VALID),
                     None if observer is None else lambda: observer.context_changed(device_id, becomes))


class ProcessDirectory:
    """A process directory; behind a second stage ``memory`` is a `GuestView`. [RVIOMMU1.0 3.2]

    Parameters
    ----------
    memory : :class:`Memory`
    allocator : :class:`Allocator`
        Gives the root page and the pages below it, as they are needed.
    levels : :class:`int`
        1, 2 or 3 (PD8, PD17, PD20).
    observer : :class:`Observer` or None
        Hears of every change of a context, as ``process_context_changed(root, process_id, context or cause)``.
    order : :class:`str`
        "little" or "big", as DC.tc.SBE says.
    features, sxl
        Decide which ``defects`` there are, as in `process_context_defects`.
    """

    def __init__(self, memory: Memory, allocator: Allocator, *, levels: int, observer: Observer | None = None, order: str = "little",
                 features: Collection[str] = FIRST_FEATURES, sxl: bool = False):
        if levels not in PROCESS_ID_BITS:
            raise ValueError(f"Levels of a process directory must be 1, 2 or 3, not {levels!r}")
        self.memory, self.allocator, self.levels, self.observer = memory, allocator, levels, observer
        self.order = _checked_order(order)
        self.defects = process_context_defects(features, sxl=sxl)
        self.root = allocator.page()

    @property
    def pdtp(self) -> int:
        """The value of pdtp that selects this directory. [RVIOMMU1.0 3.1.3.6]"""
        return self.levels << 60 | self.root // PAGE

    def entry_address(self, process_id: int, level: int = 0) -> Spa:
        """Return where the entry of ``level`` for this process is (0: the context), making the tables above it."""
        if not 0 <= process_id < 1 << PROCESS_ID_BITS[self.levels]:
            raise ValueError(f"Process id must fit the {PROCESS_ID_BITS[self.levels]} bits of a directory of "
                             f"{self.levels} levels, not {process_id!r}")
        return _directory_entry(self, (process_id & 0xFF, process_id >> 8 & 0x1FF, process_id >> 17), level, PC_BYTES)

    def set(self, process_id: int, context: ProcessContext) -> None:
        """Write a context; one that was valid before passes through V=0 first."""
        self._write_at(self.entry_address(process_id), context.dwords(), process_id,
                       context if context.V else Cause.PDT_ENTRY_NOT_VALID)

    def clear(self, process_id: int) -> None:
        """Make the context of the process invalid (V=0, then zeroes)."""
        self._write_at(self.entry_address(process_id), [0, 0], process_id, Cause.PDT_ENTRY_NOT_VALID)

    def get(self, process_id: int) -> ProcessContext:
        """Read the context of the process back."""
        return ProcessContext.of_dwords(_load_all(self.memory, self.entry_address(process_id), 2, self.order))

    def corrupt(self, process_id: int, name: str, *, level: int = 1) -> Callable[[], None]:
        """Plant the defect ``name`` of ``defects``, or of `PDTE_DEFECTS` in the pointer of ``level``; returns the way back."""
        is_leaf = name in self.defects
        if not is_leaf and name not in PDTE_DEFECTS:
            raise ValueError(f"Defect must be a name of a defect of process contexts or in PDTE_DEFECTS, not {name!r}")
        if not is_leaf and level < 1:
            raise ValueError(f"Level of a pointer must be at least 1, not {level!r}")
        at = self.entry_address(process_id, 0 if is_leaf else level)
        old, before = _load_all(self.memory, at, 2 if is_leaf else 1, self.order), self.get(process_id)
        defect = (self.defects if is_leaf else PDTE_DEFECTS)[name]
        self._write_at(at, defect.mutate(old), process_id, defect.cause)
        return lambda: self._write_at(at, old, process_id, before if before.V else Cause.PDT_ENTRY_NOT_VALID)

    def _write_at(self, at: Spa, dwords: list[int], process_id: int, becomes: ProcessContext | Cause) -> None:
        def hear(what: ProcessContext | Cause) -> Callable[[], None] | None:
            return self.observer and (lambda: self.observer.process_context_changed(self.root, process_id, what))
        _store_entry(self.memory, at, dwords, self.order, hear(Cause.PDT_ENTRY_NOT_VALID), hear(becomes))


class MsiTable:
    """A flat MSI page table. [RVIOMMU1.0 3.3.3]

    Parameters
    ----------
    memory : :class:`Memory`
    allocator : :class:`Allocator`
        Gives the whole table at once.
    mask, pattern : :class:`int`
        msi_addr_mask and msi_addr_pattern: page numbers of guest physical addresses.
    order : :class:`str`
        "little" or "big", as fctl.BE says.
    observer : :class:`Observer` or None
        Hears of every change of an entry.
    """

    def __init__(self, memory: Memory, allocator: Allocator, *, mask: int, pattern: int, order: str = "little",
                 observer: Observer | None = None):
        if not 0 <= mask < 1 << 52 or mask.bit_count() > 16:
            raise ValueError(f"Mask must be of 52 bits with at most 16 ones, not {mask!r}")
        if not 0 <= pattern < 1 << 52:
            raise ValueError(f"Pattern must be of 52 bits, not {pattern!r}")
        self.memory, self.mask, self.pattern, self.order = memory, mask, pattern, _checked_order(order)
        self.observer = observer
        self.entries = 1 << mask.bit_count()
        self.root = allocator.pages(-(-self.entries * MSI_PTE_BYTES // PAGE))

    def holds(self, gpa: Gpa) -> bool:
        """Whether this is an address of a virtual interrupt file."""
        return not (gpa >> 12 ^ self.pattern) & ~self.mask

    def entry_address(self, gpa: Gpa) -> Spa:
        """Return where the entry of the page at ``gpa`` is."""
        if not self.holds(gpa):
            raise ValueError(f"Address must be one of a virtual interrupt file, not {gpa!r}")
        return Spa(self.root + extract(gpa >> 12, self.mask) * MSI_PTE_BYTES)

    def set(self, gpa: Gpa, entry: MsiPte) -> None:
        """Write the entry of the page at ``gpa``."""
        self._write(gpa, entry.dwords(), entry if entry.V else Cause.MSI_PTE_NOT_VALID)

    def clear(self, gpa: Gpa) -> None:
        """Make the entry of the page at ``gpa`` invalid."""
        self._write(gpa, [0, 0], Cause.MSI_PTE_NOT_VALID)

    def corrupt(self, gpa: Gpa, name: str, features: Collection[str]) -> Callable[[], None]:
        """Plant a defect of `msi_pte_defects` for these capabilities in a good entry; returns the way back."""
        at = self.entry_address(gpa)
        old = _load_all(self.memory, at, 2, self.order)
        defects = msi_pte_defects(features, is_mrif=old[0] >> 1 & 3 == 1)
        if name not in defects:
            raise ValueError(f"Defect must be a name of a defect of MSI entries, not {name!r}")
        before = MsiPte.of_dwords(old)
        self._write(gpa, defects[name].mutate(old), defects[name].cause)
        return lambda: self._write(gpa, old, before)

    def _write(self, gpa: Gpa, dwords: list[int], becomes: MsiPte | Cause) -> None:
        def hear(what: MsiPte | Cause) -> Callable[[], None] | None:
            return self.observer and (lambda: self.observer.msi_changed(self.root, Gpa(gpa & ~0xFFF), what))
        _store_entry(self.memory, self.entry_address(gpa), dwords, self.order, hear(Cause.MSI_PTE_NOT_VALID), hear(becomes))


# --------------------------------------------------------------------------------------------------------------------
# Page tables


@dataclass(frozen=True)
class Mapping:
    """One page that a table maps: base addresses, size in bytes, what a device may do ("rwx"), whether it is global."""

    iova: Iova
    spa: Spa
    size: int
    perms: str
    is_global: bool = False


class PageTable:
    """A page table of one stage. [RVPRIV Sv39]

    Of a second stage ``iova`` means the guest physical address, and U must be set for every device. A first-stage table
    behind a second stage lies in a `GuestView`, and ``spa`` means the guest physical address. Tables that are replaced
    by a superpage are not reused but collected in ``retired``: free them after the invalidation that covers them is
    complete.

    Parameters
    ----------
    memory : :class:`Memory`
    allocator : :class:`Allocator`
        Gives the root page and the pages below it, as they are needed.
    observer : :class:`Observer` or None
        Hears of every change of a translation.
    scheme : :class:`Scheme`
        SV32 to SV57 for a first stage, SV32X4 to SV57X4 for a second.
    order : :class:`str`
        "little" or "big": DC.tc.SBE for a first stage, fctl.BE for a second.
    features
        Decides which ``defects`` there are, as in `pte_defects`.
    is_updated : :class:`bool`
        Hardware sets A and D (SADE or GADE): what an observer hears of permissions does not depend on them.
    """

    def __init__(self, memory: Memory, allocator: Allocator, *, observer: Observer | None = None, scheme: Scheme = SV39,
                 order: str = "little", features: Collection[str] = FIRST_FEATURES, is_updated: bool = False):
        self.memory, self.allocator, self.observer = memory, allocator, observer
        self.scheme, self.order, self.is_updated = scheme, _checked_order(order), is_updated
        self.defects = pte_defects(features, pte_bytes=scheme.pte_bytes, is_updated=is_updated)
        self.root = allocator.page() if scheme.root_pages == 1 else allocator.pages(scheme.root_pages)
        self.mappings: dict[Iova, Mapping] = {}
        self.retired: list[Spa] = []

    def map_page(self, iova: Iova, spa: Spa, *, perms: str = "rwu", size: int = SIZE_4K,
                 a: bool = True, d: bool = True, g: bool = False, pbmt: int = 0) -> None:
        """Map one page of ``size`` bytes (4 KiB, 64 KiB as Svnapot, or a superpage of the table's format).

        ``perms`` is out of "rwxu", with "r" or "x", and no "w" without "r": what else an entry can say is a defect,
        see `corrupt`. ``a``, ``d``, ``g``, ``pbmt`` are the bits of the entry.
        """
        scheme = self.scheme
        if size not in scheme.sizes:
            raise ValueError(f"Page size must be one of {', '.join(f'{one:#x}' for one in scheme.sizes)}, not {size!r}")
        if iova % size or not scheme.accepts(iova):
            raise ValueError(f"IOVA must be a multiple of the page size and an address of {scheme.name}, not {iova!r}")
        if spa % size or not 0 <= spa < 1 << self._spa_bits:
            raise ValueError(f"Physical address must be a multiple of the page size below 2^{self._spa_bits}, not {spa!r}")
        flags = _flags(perms)
        if not 0 <= pbmt <= (0 if scheme.pte_bytes == 4 else 3):
            raise ValueError(f"PBMT must be 0 to 3, and 0 in Sv32, not {pbmt!r}")
        level, ppn = scheme.level_of_size(size), spa // PAGE
        at = self._make_slot(iova, level)
        if any(self._load(at, n) & PTE_V for n in range(16 if size == SIZE_64K else 1)):
            raise ValueError(f"IOVA must not be mapped yet, not {iova!r}")
        pte = flags | PTE_V | a * PTE_A | d * PTE_D | g * PTE_G | pbmt << PTE_PBMT_SHIFT | ppn << PTE_PPN_SHIFT
        self._mapped(Mapping(iova, spa, size, self._usable(perms, a, d), g))
        if size == SIZE_64K:  # [RVPRIV Svnapot] 16 equal entries, PPN[3:0] = 1000b
            for n in range(16):
                self._store(at, n, pte | PTE_N | 8 << PTE_PPN_SHIFT)
        else:
            self._store(at, 0, pte)

    def unmap(self, iova: Iova) -> Mapping:
        """Make the page that holds ``iova`` invalid and return what it mapped."""
        mapping = self._mapping(iova)
        at = self._slot(mapping.iova, self.scheme.level_of_size(mapping.size))
        for n in range(16 if mapping.size == SIZE_64K else 1):
            self._store(at, n, 0)
        self._unmapped(mapping)
        return mapping

    def protect(self, iova: Iova, perms: str, *, a: bool = True, d: bool = True) -> None:
        """Change the permissions, A and D of the page that holds ``iova``; its address stays."""
        old = self._mapping(iova)
        clear, flags = PTE_R | PTE_W | PTE_X | PTE_U | PTE_A | PTE_D, _flags(perms) | a * PTE_A | d * PTE_D
        at = self._slot(old.iova, self.scheme.level_of_size(old.size))
        if self.observer:
            self._observe_unmapped(old)
        self._mapped(replace(old, perms=self._usable(perms, a, d)))
        for n in range(16 if old.size == SIZE_64K else 1):
            self._store(at, n, self._load(at, n) & ~clear | flags)

    def entry(self, iova: Iova) -> int:
        """Return the leaf entry that is read for ``iova``."""
        return self._load(self._slot(iova, self.scheme.level_of_size(self._mapping(iova).size)), 0)

    def spa_of(self, iova: Iova) -> Spa:
        """Return where ``iova`` is mapped to, by what this builder was told, whatever the permissions."""
        mapping = self._mapping(iova)
        return Spa(mapping.spa + iova - mapping.iova)

    def corrupt(self, iova: Iova, name: str, *, level: int | None = None) -> Callable[[], None]:
        """Plant the defect ``name`` of ``defects`` on the way to ``iova``; returns a function that takes it out.

        Leaf and superpage defects change the leaf that maps ``iova`` (of a 64 KiB page: the one entry read for
        ``iova``); pointer defects change the pointer of ``level`` (by default the one above the leaf).
        """
        if name not in self.defects:
            raise ValueError(f"Defect must be a name in PTE_DEFECTS, not {name!r}")
        defect, mapping, scheme = self.defects[name], self._mapping(iova), self.scheme
        leaf = scheme.level_of_size(mapping.size)
        if (defect.where == "leaf") != (leaf == 0) and defect.where != "pointer":
            raise ValueError(f"Defect {name} needs a {defect.where}, not {mapping!r}")
        if defect.where == "pointer":
            at_level = leaf + 1 if level is None else level
            if not leaf < at_level < scheme.levels:
                raise ValueError(f"Level of a pointer above this page must be {leaf + 1} to {scheme.levels - 1}, not {at_level!r}")
            span = scheme.size_of_level(at_level)
            hit = [page for page in self.mappings.values() if page.iova // span == iova // span]
        else:
            at_level, hit = leaf, [mapping]
        at = self._slot(iova, at_level)
        old = self._load(at, 0)
        left = "".join(perm for perm, access in (("r", AccessType.READ), ("w", AccessType.WRITE),
                                                 ("x", AccessType.EXEC)) if access not in defect.faults)
        self._store(at, 0, defect.mutate(old))
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
            self._store(at, 0, old)
        return undo

    # -- inside --

    @property
    def _spa_bits(self) -> int:
        return 56 if self.scheme.pte_bytes == 8 else 34

    def _load(self, at: Spa, n: int) -> int:
        return _load(self.memory, Spa(at + n * self.scheme.pte_bytes), self.order, self.scheme.pte_bytes)

    def _store(self, at: Spa, n: int, pte: int) -> None:
        _store(self.memory, Spa(at + n * self.scheme.pte_bytes), pte, self.order, self.scheme.pte_bytes)

    def _entry_at(self, table: Spa, iova: Iova, level: int) -> Spa:
        return Spa(table + self.scheme.index(iova, level) * self.scheme.pte_bytes)

    def _make_slot(self, iova: Iova, level: int) -> Spa:
        """Return the address of the entry of ``level`` for ``iova``, free to be written; makes the tables above."""
        at = self.root
        for upper in range(self.scheme.levels - 1, level, -1):
            slot = self._entry_at(at, iova, upper)
            pte = self._load(slot, 0)
            if not pte & PTE_V:
                pte = self.allocator.page() // PAGE << PTE_PPN_SHIFT | PTE_V
                self._store(slot, 0, pte)
            elif pte & (PTE_R | PTE_X):
                raise ValueError(f"IOVA must not lie in a superpage that is mapped, not {iova!r}")
            at = Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE)
        slot = self._entry_at(at, iova, level)
        pte = self._load(slot, 0)
        if level and pte & PTE_V and not pte & (PTE_R | PTE_X):
            below = self._empty_tables(Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE), level - 1)
            if below is None:
                raise ValueError(f"No smaller page may be mapped inside a new superpage, not at {iova!r}")
            self._store(slot, 0, 0)
            self.retired += below
            if self.observer:
                size = self.scheme.size_of_level(level)
                self.observer.pointer_replaced(self.root, Iova(iova // size * size), size)
        return slot

    def _empty_tables(self, table: Spa, level: int) -> list[Spa] | None:
        """Return a table without leaves and those below it; None when a leaf is found."""
        found = [table]
        for n in range(1 << self.scheme.index_bits):
            pte = self._load(table, n)
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
        for upper in range(self.scheme.levels - 1, level, -1):
            pte = self._load(self._entry_at(at, iova, upper), 0)
            at = Spa((pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) * PAGE)
        return self._entry_at(at, iova, level)

    def _mapping(self, iova: Iova) -> Mapping:
        for size in self.scheme.sizes:
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

    def _usable(self, perms: str, a: bool, d: bool) -> str:
        """Return the permissions that a user device has now: none without A or U, no write without D. [RVIOMMU1.0 3.3]"""
        if not (a or self.is_updated) or "u" not in perms:
            return ""
        return "".join(perm for perm in "rwx" if perm in perms and (perm != "w" or d or self.is_updated))


class GuestView:
    """Memory at guest physical addresses: what a guest reads and writes through its second-stage table.

    It goes by what the builder of that table was told, not by permissions: the guest's own harts may have others.
    :exc:`ValueError` when an address is not mapped.
    """

    def __init__(self, memory: Memory, second_stage: PageTable):
        self.memory, self.second_stage = memory, second_stage

    def read(self, address: Spa, length: int) -> bytes:
        """Return ``length`` bytes."""
        return b"".join(self.memory.read(at, size) for at, size in self._pieces(address, length))

    def write(self, address: Spa, data: bytes) -> None:
        """Write ``data``."""
        done = 0
        for at, size in self._pieces(address, len(data)):
            self.memory.write(at, data[done:done + size])
            done += size

    def _pieces(self, address: Spa, length: int) -> list[tuple[Spa, int]]:
        found, end = [], address + length
        while address < end:
            size = min(PAGE - address % PAGE, end - address)
            found.append((self.second_stage.spa_of(Iova(address)), size))
            address = Spa(address + size)
        return found


def _checked_order(order: str) -> str:
    if order not in ("little", "big"):
        raise ValueError(f'Order of bytes must be "little" or "big", not {order!r}')
    return order


def _load(memory: Memory, address: Spa, order: str = "little", size: int = 8) -> int:
    return int.from_bytes(memory.read(address, size), "big" if order == "big" else "little")


def _store(memory: Memory, address: Spa, value: int, order: str = "little", size: int = 8) -> None:
    memory.write(address, value.to_bytes(size, "big" if order == "big" else "little"))


def _load_all(memory: Memory, address: Spa, count: int, order: str) -> list[int]:
    return [_load(memory, Spa(address + 8 * n), order) for n in range(count)]


def _store_entry(memory: Memory, at: Spa, dwords: list[int], order: str, hear_invalid: Callable[[], None] | None = None,
                 hear_new: Callable[[], None] | None = None) -> None:
    """Write an entry whose V is bit 0 of its first doubleword so that it is valid only while it is whole."""
    if len(dwords) > 1 and _load(memory, at, order) & 1:
        _store(memory, at, 0, order)
        if hear_invalid:
            hear_invalid()
    if hear_new:
        hear_new()
    for n in range(len(dwords) - 1, -1, -1):  # V is in the first doubleword: stored last
        _store(memory, Spa(at + n * 8), dwords[n], order)


def _directory_entry(directory: DeviceDirectory | ProcessDirectory, index: tuple[int, ...], level: int, leaf_bytes: int) -> Spa:
    """Return where the entry of ``level`` is, making the tables above it."""
    if not 0 <= level < directory.levels:
        raise ValueError(f"Level must be below {directory.levels}, not {level!r}")
    at = directory.root
    for upper in range(directory.levels - 1, level, -1):
        entry = Spa(at + index[upper] * 8)
        pointer = _load(directory.memory, entry, directory.order)
        if not pointer & 1:
            pointer = directory.allocator.page() // PAGE << 10 | 1
            _store(directory.memory, entry, pointer, directory.order)
        at = Spa((pointer >> 10 & PTE_PPN_MASK) * PAGE)
    return Spa(at + index[level] * (8 if level else leaf_bytes))


def _flags(perms: str) -> int:
    """Return R, W, X, U of a leaf; :exc:`ValueError` for what would not be a good leaf."""
    if set(perms) - set("rwxu") or len(set(perms)) != len(perms):
        raise ValueError(f'Permissions must be out of "rwxu", each at most once, not {perms!r}')
    if not set(perms) & set("rx") or ("w" in perms and "r" not in perms):
        raise ValueError(f'Permissions must contain "r" or "x", and no "w" without "r", not {perms!r}')
    return sum(bit for perm, bit in zip("rwxu", (PTE_R, PTE_W, PTE_X, PTE_U)) if perm in perms)
