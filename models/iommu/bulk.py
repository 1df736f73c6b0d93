"""Many IOVAs of one device at once, with numpy; the answers are those of `walk.Iommu`, entry for entry.

What needs more than reading page tables (an update of A or D, an MSI page table, an entry that cannot be read) is
left to the step-by-step walk, address by address. [RVIOMMU1.0 3.3 steps 17 to 20] [RVPRIV Sv32, Sv39, Hypervisor]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..memory import AccessFault, Iova
from .entries import (
    FIRST_STAGE,
    IOSATP_BARE,
    PTE_A,
    PTE_D,
    PTE_N,
    PTE_PBMT_SHIFT,
    PTE_PPN_MASK,
    PTE_PPN_SHIFT,
    PTE_R,
    PTE_U,
    PTE_V,
    PTE_W,
    PTE_X,
    SECOND_STAGE,
    Scheme,
)
from .faults import AccessType, TranslationFault
from .page_walk import PTE_RESERVED, PTE_RSW60T59
from .walk import FirstStage, Iommu, Request, RequestKind, Translation

__all__ = ["U64", "BulkAnswers", "translate_many", "u64"]

U64 = np.dtype("<u8")
u64 = U64.type
_PERMISSION = {AccessType.READ: PTE_R, AccessType.WRITE: PTE_W, AccessType.EXEC: PTE_X}


@dataclass(frozen=True)
class BulkAnswers:
    """One entry for each IOVA, in their order.

    Attributes
    ----------
    cause : array of 16 bits
        0 for a translation; then the rest of the entry is that of `Translation`, with the size as a power of two.
        Else the cause of the fault, and ``iotval2``.
    slow_count : :class:`int`
        How many took the step-by-step walk.
    """

    cause: np.ndarray
    spa: np.ndarray
    size_log2: np.ndarray
    readable: np.ndarray
    writable: np.ndarray
    executable: np.ndarray
    pbmt: np.ndarray
    iotval2: np.ndarray
    slow_count: int

    def __len__(self) -> int:
        return len(self.cause)


class _Lanes:
    """Answers of one stage for some addresses."""

    def __init__(self, count: int):
        self.cause, self.iotval2 = np.zeros(count, "<u2"), np.zeros(count, U64)
        self.address, self.size_log2 = np.zeros(count, U64), np.full(count, 64, np.uint8)
        self.readable, self.writable, self.executable = (np.ones(count, np.bool_) for _ in range(3))
        self.pbmt, self.slow = np.zeros(count, np.uint8), np.zeros(count, np.bool_)

    @property
    def good(self) -> np.ndarray:
        return (self.cause == 0) & ~self.slow


def translate_many(iommu: Iommu, request: Request, iovas: np.ndarray) -> BulkAnswers:
    """Translate ``request`` at each of ``iovas`` (64-bit, unsigned) instead of its own.

    Reads of tables are not counted, nothing is traced, and the tables must not change meanwhile. :exc:`ValueError` for a
    translation request.
    """
    if request.kind is RequestKind.ATS:
        raise ValueError(f"Request must be an access, not {request!r}")
    iovas = np.ascontiguousarray(iovas, U64)
    lanes, walk = _Lanes(len(iovas)), iommu.begin(request)
    try:
        plan = iommu.plan(walk)
    except TranslationFault as fault:
        lanes.cause[:], lanes.iotval2[:] = int(fault.cause), fault.iotval2
        return _answers(lanes, 0)
    if isinstance(plan, Translation):
        lanes.address[:] = iovas
        return _answers(lanes, 0)
    _Tables(iommu, walk, plan).translate(iovas, lanes)
    slow = np.flatnonzero(lanes.slow)
    for lane in slow:
        try:
            found = iommu.translate(replace(request, iova=Iova(int(iovas[lane]))))
        except TranslationFault as fault:
            lanes.cause[lane], lanes.iotval2[lane] = int(fault.cause), fault.iotval2
            continue
        lanes.address[lane], lanes.size_log2[lane], lanes.pbmt[lane] = found.spa, found.size.bit_length() - 1, found.pbmt
        lanes.readable[lane], lanes.writable[lane], lanes.executable[lane] = found.readable, found.writable, found.executable
    return _answers(lanes, len(slow))


def _answers(lanes: _Lanes, slow_count: int) -> BulkAnswers:
    return BulkAnswers(lanes.cause, lanes.address, lanes.size_log2, lanes.readable, lanes.writable, lanes.executable, lanes.pbmt,
                       lanes.iotval2, slow_count)


class _Tables:
    """The tables of one request, and pages of memory that were read."""

    def __init__(self, iommu: Iommu, walk, plan: FirstStage):
        self.iommu, self.walk, self.plan, self.context = iommu, walk, plan, walk.context
        self._pages: dict[int, int] = {}  # page number -> index in _images, or -1 when it cannot be read
        self._images = np.zeros((0, 4096), np.uint8)

    def translate(self, iovas: np.ndarray, lanes: _Lanes) -> None:
        """Steps 17 to 20 for all; marks as slow what is not for this class."""
        first = self.first_stage(iovas)
        lanes.cause[:], lanes.iotval2[:], lanes.slow[:] = first.cause, first.iotval2, first.slow
        gpas, on = first.address, np.flatnonzero(first.good)
        if self.context.msiptp_mode:  # step 18
            lanes.slow[on] = self._interrupt_file(gpas[on], 12)
            on = np.flatnonzero(first.good & ~lanes.slow)
        second = self.second_stage(gpas[on], None)
        lanes.cause[on], lanes.iotval2[on], lanes.slow[on] = second.cause, second.iotval2, second.slow
        if self.context.msiptp_mode:
            for _ in range(52):  # at most from 2^64 to 2^12
                size = second.size_log2
                hides = (size > 12) & self._interrupt_file(gpas[on], size)
                if not hides.any():
                    break
                size[hides] -= 1
        lanes.address[on], lanes.size_log2[on] = second.address, np.minimum(first.size_log2[on], second.size_log2)
        lanes.pbmt[on] = np.where(first.pbmt[on] != 0, first.pbmt[on], second.pbmt)
        for name in ("readable", "writable", "executable"):
            getattr(lanes, name)[on] = getattr(first, name)[on] & getattr(second, name)

    def _interrupt_file(self, gpas: np.ndarray, size_log2) -> np.ndarray:
        """Whether regions around the addresses hold a virtual interrupt file."""
        low = ~(u64(0)) << (np.minimum(np.asarray(size_log2, U64), u64(63)) - u64(12))
        differs = (gpas >> u64(12) ^ u64(self.context.msi_addr_pattern)) & ~u64(self.context.msi_addr_mask)
        return differs & low == 0

    def first_stage(self, iovas: np.ndarray) -> _Lanes:
        lanes, request, plan = _Lanes(len(iovas)), self.walk.request, self.plan
        if plan.mode == IOSATP_BARE:
            lanes.address = iovas
            return lanes
        scheme = FIRST_STAGE[self.context.SXL][plan.mode]
        if scheme.pte_bytes == 4:
            wrong = iovas >> u64(32) != 0
        else:
            top = iovas >> u64(scheme.address_bits - 1)
            wrong = (top != 0) & (top != u64((1 << 65 - scheme.address_bits) - 1))
        lanes.cause[wrong] = int(request.fault_access.page_fault)

        def refuses(user: np.ndarray) -> np.ndarray:
            if not request.is_supervisor:
                return ~user
            return user & (request.is_exec or not plan.sum)

        def locate(at: np.ndarray) -> _Lanes:
            return self.second_stage(at, AccessType.READ)

        user = self._walk(lanes, scheme, plan.root, self.walk.guest_order, iovas, request.fault_access, request.wants_write,
                          int(request.fault_access.page_fault), None, refuses, locate if self.context.iohgatp_mode else None)
        if request.is_supervisor:
            lanes.executable &= ~user
        return lanes

    def second_stage(self, gpas: np.ndarray, implicit: AccessType | None) -> _Lanes:
        lanes, request, mode = _Lanes(len(gpas)), self.walk.request, self.context.iohgatp_mode
        if not mode:
            lanes.address = gpas
            return lanes
        scheme, cause = SECOND_STAGE[self.walk.gxl][mode], int(request.fault_access.guest_page_fault)
        iotval2 = gpas & ~u64(3) | u64(implicit is not None)
        wrong = gpas >> u64(min(scheme.address_bits, 34 if self.context.SXL else 64)) != 0
        lanes.cause[wrong], lanes.iotval2[wrong] = cause, iotval2[wrong]
        self._walk(lanes, scheme, self.context.iohgatp_root, self.walk.order, gpas, implicit or request.fault_access,
                   implicit is None and request.wants_write, cause, iotval2, lambda user: ~user, None)
        return lanes

    def _walk(self, lanes: _Lanes, scheme: Scheme, root: int, order: str, addresses: np.ndarray, access: AccessType, wants_write: bool,
              cause: int, iotval2: np.ndarray | None, refuses: Callable[[np.ndarray], np.ndarray],
              locate: Callable[[np.ndarray], _Lanes] | None) -> np.ndarray:  # fmt: skip
        """The ten steps of `page_walk.walk_table`, for the lanes that are good yet; returns U of their leaves."""
        has = self.iommu.capabilities
        updates = (self.context.SADE if iotval2 is None else self.context.GADE) and self.iommu.implementation.atomics
        on = np.flatnonzero(lanes.good)
        tables, leaves, levels = np.full(len(on), root, U64), np.zeros(len(addresses), U64), np.zeros(len(addresses), np.uint8)
        is_leaf = np.zeros(len(addresses), np.bool_)

        def refuse(where: np.ndarray) -> None:
            lanes.cause[where] = cause
            if iotval2 is not None:
                lanes.iotval2[where] = iotval2[where]

        for i in range(scheme.levels - 1, -1, -1):
            if not len(on):
                break
            bits = scheme.index_bits + (scheme.wider if i == scheme.levels - 1 else 0)
            index = addresses[on] >> u64(12 + scheme.index_bits * i) & u64((1 << bits) - 1)
            at = tables + index * u64(scheme.pte_bytes)
            if locate:
                found = locate(at)
                lanes.cause[on], lanes.iotval2[on], lanes.slow[on] = found.cause, found.iotval2, found.slow
                keep = found.good
                on, at = on[keep], found.address[keep]
            ptes, readable = self._gather(at, scheme.pte_bytes, order)
            lanes.slow[on[~readable]] = True
            on, ptes = on[readable], ptes[readable]
            leaf = ptes & u64(PTE_R | PTE_X) != 0
            wrong = (ptes & u64(PTE_V) == 0) | (ptes & u64(PTE_W | PTE_R) == u64(PTE_W))
            if scheme.pte_bytes == 8:
                pbmt = ptes >> u64(PTE_PBMT_SHIFT) & u64(3)
                wrong |= ptes & u64(PTE_RESERVED if has.Svrsw60t59b else PTE_RESERVED | PTE_RSW60T59) != 0
                wrong |= (pbmt == 3) | ((pbmt != 0) & ~leaf) if has.Svpbmt else pbmt != 0
                napot = ptes & u64(PTE_N) != 0
                wrong |= napot if i else napot & (~leaf | (ptes >> u64(PTE_PPN_SHIFT) & u64(15) != 8))
            wrong |= ~leaf & ((ptes & u64(PTE_A | PTE_D | PTE_U) != 0) | (i == 0))
            refuse(on[wrong])
            leaf &= ~wrong
            leaves[on[leaf]], levels[on[leaf]], is_leaf[on[leaf]] = ptes[leaf], i, True
            go = ~leaf & ~wrong
            on, tables = on[go], (ptes[go] >> u64(PTE_PPN_SHIFT) & u64(PTE_PPN_MASK)) << u64(12)
        on = np.flatnonzero(is_leaf)
        ptes, level = leaves[on], levels[on].astype(U64)
        ppns = ptes >> u64(PTE_PPN_SHIFT) & u64(PTE_PPN_MASK)
        user = ptes & u64(PTE_U) != 0
        wrong = ppns & ((u64(1) << u64(scheme.index_bits) * level) - u64(1)) != 0
        wrong |= refuses(user) | (ptes & u64(_PERMISSION[access]) == 0)
        stale = (ptes & u64(PTE_A) == 0) | (ptes & u64(PTE_D) == 0 if wants_write else np.zeros(len(on), np.bool_))
        if updates:
            lanes.slow[on[stale & ~wrong]] = True
        else:
            wrong |= stale
        refuse(on[wrong])
        size_log2 = u64(12) + u64(scheme.index_bits) * level
        if scheme.pte_bytes == 8:
            size_log2[ptes & u64(PTE_N) != 0] = 16
        low = (u64(1) << size_log2) - u64(1)
        lanes.address[on], lanes.size_log2[on] = ppns << u64(12) & ~low | addresses[on] & low, size_log2
        lanes.readable[on], lanes.executable[on] = ptes & u64(PTE_R) != 0, ptes & u64(PTE_X) != 0
        lanes.writable[on] = ptes & u64(PTE_W | PTE_D) == u64(PTE_W | PTE_D)
        if scheme.pte_bytes == 8:
            lanes.pbmt[on] = ptes >> u64(PTE_PBMT_SHIFT) & u64(3)
        every = np.zeros(len(addresses), np.bool_)
        every[on] = user
        return every

    def _gather(self, at: np.ndarray, size: int, order: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries at these addresses, and which could be read."""
        numbers, where = np.unique(at >> u64(12), return_inverse=True)
        slots = np.array([self._slot(int(number)) for number in numbers], np.intp)[where] if len(at) else np.zeros(0, np.intp)
        readable = slots >= 0
        words = self._images.view(f"{'>' if order == 'big' else '<'}u{size}")
        found = np.zeros(len(at), U64)
        found[readable] = words[slots[readable], (at[readable] & u64(0xFFF)).astype(np.intp) // size]
        return found, readable

    def _slot(self, number: int) -> int:
        """Return where the image of this page is; -1 when it cannot be read as a whole."""
        if number not in self._pages:
            slot = -1
            if not number << 12 >> self.iommu.capabilities.PAS:
                try:
                    page = np.frombuffer(self.iommu.memory.read(number << 12, 4096), np.uint8)
                except AccessFault:
                    pass
                else:
                    slot = max(self._pages.values(), default=-1) + 1
                    if slot == len(self._images):
                        more = np.zeros((max(16, len(self._images)), 4096), np.uint8)
                        self._images = np.concatenate([self._images, more])
                    self._images[slot] = page
            self._pages[number] = slot
        return self._pages[number]
