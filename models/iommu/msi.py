"""MSIs of a guest's devices: which addresses they are, where they go, and how one is recorded in memory.

[RVIOMMU1.0 3.1.3.5, 3.3.3]; formats and recording as in the Advanced Interrupt Architecture, chapter on IOMMUs.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..memory import AccessFault, Gpa, Spa
from .entries import MSI_PTE_BYTES, PTE_PPN_MASK, DeviceContext, extract
from .faults import Cause
from .walk_state import Leaf, Mrif, Walk, undisturbed

if TYPE_CHECKING:
    from .tables import Memory

__all__ = ["MrifFault", "Notice", "is_interrupt_file", "region_without_interrupt_files", "store_msi", "translate_msi"]

CAUSES = Cause.MSI_PTE_LOAD_ACCESS_FAULT, Cause.MSI_PT_DATA_CORRUPTION
BASIC_RESERVED = 0x7FC0_0000_0000_03F8  # first doubleword in basic translate mode: 9:3, 62:54
MRIF_RESERVED = 0x7FC0_0000_0000_0078  # in MRIF mode: 6:3, 62:54
NOTICE_RESERVED = 0xEFC0_0000_0000_0000  # second doubleword in MRIF mode: 59:54, 63:61


def is_interrupt_file(context: DeviceContext, gpa: Gpa) -> bool:
    """Tell whether the page of ``gpa`` is a virtual interrupt file's. [RVIOMMU1.0 3.1.3.5]"""
    return bool(context.msiptp_mode) and not (gpa >> 12 ^ context.msi_addr_pattern) & ~context.msi_addr_mask


def region_without_interrupt_files(context: DeviceContext, gpa: Gpa, size: int) -> int:
    """Return how much of the region of ``size`` bytes around ``gpa`` can be aligned and without virtual interrupt files.

    Such a region may be used for all its addresses at once; a larger one would hide the MSI page table.
    """
    if not context.msiptp_mode:
        return size
    while size > 4096 and not (gpa >> 12 ^ context.msi_addr_pattern) & ~context.msi_addr_mask & ~((size >> 12) - 1):
        size >>= 1
    return size


def translate_msi(walk: Walk, gpa: Gpa) -> tuple[Leaf, Mrif | None] | None:
    """[RVIOMMU1.0 3.3.3] process to translate addresses of MSIs; None when ``gpa`` is not a virtual interrupt file's."""
    # 1, 2. A is the GPA, DC the located context.  3, 4. is it a virtual interrupt file?
    context, a = walk.context, gpa
    if not is_interrupt_file(context, a):
        return None
    # 5. interrupt file number
    i = extract(a >> 12, context.msi_addr_mask)
    # 6. m is the table.  7, 8. sixteen bytes at m | I * 16: access fault 261, data corruption 270
    m = context.msiptp_root
    first, second = walk.read_entry("3.3.3 step 7", f"MSI PTE {i}", Spa(m | i * MSI_PTE_BYTES), MSI_PTE_BYTES, walk.order, CAUSES)

    def misconfigured(step: int, why: str) -> Exception:
        return walk.fault(f"3.3.3 step {step}", Cause.MSI_PTE_MISCONFIGURED, why)

    # 9. not valid
    if not first & 1:
        raise walk.fault("3.3.3 step 9", Cause.MSI_PTE_NOT_VALID, "V is 0")
    # 10. C = 1: left to the implementation, here misconfigured.  11. C = 0
    if first >> 63:
        raise misconfigured(10, "C is 1")
    # 12. modes 0 and 2
    mode = first >> 1 & 3
    if mode in (0, 2):
        raise misconfigured(12, f"M is {mode}")
    if mode == 3:
        # 13. basic translate mode
        if first & BASIC_RESERVED:
            raise misconfigured(13, "a reserved bit is set")
        spa, mrif = Spa((first >> 10 & PTE_PPN_MASK) << 12 | a & 0xFFF), None
    else:
        # 14. MRIF mode
        if not walk.capabilities.MSI_MRIF:
            raise misconfigured(14, "M is 1 without MSI_MRIF")
        if first & MRIF_RESERVED or second & NOTICE_RESERVED:
            raise misconfigured(14, "a reserved bit is set")
        spa = Spa((first >> 7 & (1 << 47) - 1) * 512)
        mrif = Mrif(spa, Spa((second >> 10 & PTE_PPN_MASK) << 12), second & 0x3FF | (second >> 60 & 1) << 10)
    # 15. permissions: R = W = U = 1, X = 0; never executed
    if walk.request.is_exec and walk.request.is_checked:
        raise walk.fault("3.3.3 step 15", Cause.INSTRUCTION_ACCESS_FAULT, "a virtual interrupt file is not executable")
    walk.note("3.3.3 step 16", f"MSI goes to {spa:#x}" if mrif is None else f"MSI is recorded at {spa:#x}, notice {mrif.nid}")
    return Leaf(spa, 4096, executable=False), mrif


# --------------------------------------------------------------------------------------------------------------------
# Recording an MSI


@dataclass(frozen=True)
class Notice:
    """The 4-byte write that follows an MSI recorded in memory, little-endian."""

    address: Spa
    data: int


class MrifFault(Exception):
    """The interrupt file cannot be accessed: cause 264, or 271 for corrupt data."""

    def __init__(self, cause: Cause):
        super().__init__(f"{cause.name} ({int(cause)})")
        self.cause = cause


def store_msi(memory: Memory, mrif: Mrif, gpa: Gpa, data: bytes, *, is_atomic: bool = False,
              accepts_big_endian: bool = False) -> Notice | None:
    """Do what a naturally aligned 4-byte write of ``data`` to ``gpa`` does in MRIF mode; returns the notice, if one is due.

    None: accepted and discarded, because it is not an MSI. :exc:`ValueError` for an access that is to be aborted as
    unsupported: another size or alignment. ``is_atomic`` (AMO_MRIF): nobody gets between read and write. `MrifFault` when
    the file cannot be accessed. [RVIOMMU1.0 3.3.3]
    """
    if len(data) != 4 or gpa % 4:
        raise ValueError(f"An MSI must be 4 aligned bytes, not {len(data)!r} bytes at {gpa!r}")
    is_big = bool(gpa >> 2 & 1)
    identity = int.from_bytes(data, "big" if is_big else "little")
    if gpa >> 3 & 0x1FF or identity >> 11 or (is_big and not accepts_big_endian):
        return None
    at = Spa(mrif.address + identity // 64 * 16)
    try:
        pending = int.from_bytes(memory.read(at, 8), "little") | 1 << identity % 64  # little-endian whatever fctl.BE says
        with undisturbed(memory) if is_atomic else nullcontext():
            memory.write(at, pending.to_bytes(8, "little"))
    except AccessFault as error:
        raise MrifFault(Cause.MRIF_DATA_CORRUPTION if error.reason == "poisoned" else Cause.MRIF_ACCESS_FAULT) from error
    return Notice(mrif.notice_address, mrif.nid)
