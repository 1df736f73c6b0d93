"""The walk of one page table, of either stage: the ten steps of virtual address translation.

`first_stage.py` and `second_stage.py` say what differs between them. [RVPRIV Sv32, Sv39, Hypervisor, Svnapot, Svpbmt]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..memory import Spa
from .entries import (
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
    Scheme,
)
from .faults import AccessType, Cause, TranslationFault
from .walk_state import Leaf, Walk

__all__ = ["Stage", "reserved_in_pte", "walk_table"]

PTE_RESERVED = 0x07C0_0000_0000_0000  # [RVPRIV Sv39] 58:54
PTE_RSW60T59 = 0x1800_0000_0000_0000  # 60:59, software's with Svrsw60t59b
RETRIES = 1000  # of an update that others keep disturbing
_PERMISSION = {AccessType.READ: PTE_R, AccessType.WRITE: PTE_W, AccessType.EXEC: PTE_X}


@dataclass(frozen=True)
class Stage:
    """What the walk of a table depends on.

    Attributes
    ----------
    scheme, root, order
        Format, address and order of bytes of the table.
    access : :class:`AccessType`
        What must be permitted, when ``is_checked``.
    wants_write : :class:`bool`
        D must be set where writing is permitted.
    updates : :class:`bool`
        Hardware sets A and D (SADE, GADE).
    page_fault : callable
        Makes the page fault of a step, with its reason.
    causes : pair of :class:`Cause`
        Access fault and data corruption on an entry.
    refuses_user : callable
        Says from U of the leaf why the privilege is not enough, or None.
    locate : callable
        Says where an entry is in memory, given its address and whether it will be written: the identity, or the second
        stage.
    """

    scheme: Scheme
    root: int
    order: str
    access: AccessType
    is_checked: bool
    wants_write: bool
    updates: bool
    page_fault: Callable[[str, str], TranslationFault]
    causes: tuple[Cause, Cause]
    refuses_user: Callable[[bool], str | None]
    locate: Callable[[int, bool], Spa]


def walk_table(walk: Walk, stage: Stage, address: int) -> Leaf:
    """[RVPRIV Sv32, "Virtual Address Translation Process"] as a device's access, without MXR."""
    scheme, section = stage.scheme, f"RVPRIV {stage.scheme.name}"
    # 1. a is the root table, i = LEVELS - 1
    a, i, is_global, retries = stage.root, scheme.levels - 1, False, RETRIES
    while True:
        # 2. the PTE at a + vpn[i] * PTESIZE; access fault or data corruption
        at = a + scheme.index(address, i) * scheme.pte_bytes
        pte, = walk.read_entry(f"{section} step 2", f"PTE of level {i}", stage.locate(at, False), scheme.pte_bytes, stage.order,
                               stage.causes)
        # 3. not valid, W without R, or reserved bits and encodings
        if not pte & PTE_V:
            raise stage.page_fault("step 3", "V is 0")
        if pte & PTE_W and not pte & PTE_R:
            raise stage.page_fault("step 3", "W is 1 and R is 0")
        if why := reserved_in_pte(pte, i, walk.capabilities.Svpbmt, walk.capabilities.Svrsw60t59b):
            raise stage.page_fault("step 3", why)
        # 4. a leaf has R or X; else go one level down
        if not pte & (PTE_R | PTE_X):
            is_global = is_global or bool(pte & PTE_G)
            i -= 1
            if i < 0:
                raise stage.page_fault("step 4", "the entry of level 0 is not a leaf")
            a = (pte >> PTE_PPN_SHIFT & PTE_PPN_MASK) << 12
            continue
        # 5. misaligned superpage
        ppn = pte >> PTE_PPN_SHIFT & PTE_PPN_MASK
        if ppn & (1 << scheme.index_bits * i) - 1:
            raise stage.page_fault("step 5", "superpage is misaligned")
        # 6. U and the privilege
        if why := stage.refuses_user(bool(pte & PTE_U)):
            raise stage.page_fault("step 6", why)
        # 7. shadow stacks: none for devices. 8. permission by the type of access
        if stage.is_checked and not pte & _PERMISSION[stage.access]:
            raise stage.page_fault("step 8", f"no {stage.access.value} permission")
        # 9. A, and D for writes
        needs_d = stage.wants_write and bool(pte & PTE_W) and not pte & PTE_D
        if pte & PTE_A and not needs_d:
            break
        if not stage.updates:
            if not pte & PTE_A:
                raise stage.page_fault("step 9", "A is 0")
            if stage.is_checked:
                raise stage.page_fault("step 9", "D is 0")
            break  # a translation request: it is told that it may not write
        new = pte | PTE_A | needs_d * PTE_D
        found = walk.exchange(stage.locate(at, True), scheme.pte_bytes, pte, new, stage.order)
        if isinstance(found, str):
            raise walk.fault(f"{section} step 9", stage.causes[found == "poisoned"], f"PTE at {at:#x} is {found}")
        walk.note(f"{section} step 9", f"PTE of level {i} becomes {new:#018x}" if found else f"PTE of level {i} has changed: step 2")
        if found:
            pte = new
            break
        retries -= 1
        if not retries:
            raise RuntimeError(f"An entry of a page table must not change {RETRIES} times during one update, as that at {at:#x} does")
    # 10. the address; a NAPOT leaf takes its low PPN bits from the address [RVPRIV Svnapot]
    size = SIZE_64K if scheme.pte_bytes == 8 and pte & PTE_N else scheme.size_of_level(i)
    walk.note(f"{section} step 10", f"leaf of {size} bytes")
    return Leaf(ppn << 12 & ~(size - 1) | address & size - 1, size, bool(pte & PTE_R), bool(pte & PTE_W and pte & PTE_D),
                bool(pte & PTE_X), pte >> PTE_PBMT_SHIFT & 3, is_global or bool(pte & PTE_G), bool(pte & PTE_U))


def reserved_in_pte(pte: int, level: int, svpbmt: bool, svrsw60t59b: bool) -> str | None:
    """Say which reserved bit or encoding is set, or return None. [RVPRIV Sv39, Svnapot, Svpbmt]"""
    is_leaf, pbmt = bool(pte & (PTE_R | PTE_X)), pte >> PTE_PBMT_SHIFT & 3
    if pte & PTE_RESERVED or (pte & PTE_RSW60T59 and not svrsw60t59b):
        return "a reserved bit is set"
    if pbmt == 3 or (pbmt and not (svpbmt and is_leaf)):
        return f"PBMT is {pbmt}"
    if pte & PTE_N and (level or not is_leaf):
        return "N is set on a superpage or pointer"
    if pte & PTE_N and pte >> PTE_PPN_SHIFT & 0xF != 0b1000:
        return "the NAPOT encoding is reserved"
    if not is_leaf and pte & (PTE_A | PTE_D | PTE_U):
        return "A, D or U is set on a pointer"
    return None
