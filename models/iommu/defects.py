"""Each malformed entry of the specification, by name, and what it leads to.

What is malformed depends on capabilities; the functions take ``features``, the names of those that are 1
(`Capabilities.switched_on`), and leave out what these make legal. The constants are those of the first card, Sv39
alone. [RVIOMMU1.0 3.1, 3.2, 3.3.3] [RVPRIV Sv39, Svnapot, Svpbmt]
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .entries import (
    IOSATP_BARE,
    PTE_A,
    PTE_D,
    PTE_N,
    PTE_PBMT_SHIFT,
    PTE_PPN_SHIFT,
    PTE_R,
    PTE_U,
    PTE_V,
    PTE_W,
    PTE_X,
    TC_BITS,
    mgpaw,
)
from .faults import AccessType, Cause

__all__ = [
    "DC_DEFECTS", "DDTE_DEFECTS", "FIRST_FEATURES", "PDTE_DEFECTS", "PTE_DEFECTS", "DirectoryDefect", "PteDefect",
    "device_context_defects", "msi_pte_defects", "process_context_defects", "pte_defects",
]  # fmt: skip

FIRST_FEATURES = frozenset({"Sv39"})
MODE_BITS, PPN_BITS = 0xF << 60, (1 << 44) - 1


@dataclass(frozen=True)
class PteDefect:
    """One way in which a page table entry is wrong or insufficient.

    ``where`` is "leaf" (a 4 KiB page), "superpage" (larger than 64 KiB) or "pointer" (non-leaf). ``faults`` are the kinds
    of user access that end in a page fault.
    """

    where: str
    mutate: Callable[[int], int]
    faults: frozenset[AccessType] = frozenset(AccessType)


@dataclass(frozen=True)
class DirectoryDefect:
    """One way in which an entry of a directory or MSI table is wrong.

    ``mutate`` works on its doublewords. ``check`` is the number in the specification's list of checks of a context,
    0 when it is not about one.
    """

    mutate: Callable[[list[int]], list[int]]
    cause: Cause = Cause.DDT_ENTRY_MISCONFIGURED
    check: int = 0


def _set(bits: int) -> Callable[[int], int]:
    return lambda pte: pte | bits


def _clear(bits: int) -> Callable[[int], int]:
    return lambda pte: pte & ~bits


def _change(clear: int, set_: int) -> Callable[[int], int]:
    return lambda pte: pte & ~clear | set_


def pte_defects(features: Collection[str] = FIRST_FEATURES, *, pte_bytes: int = 8, is_updated: bool = False) -> dict[str, PteDefect]:
    """Return the defects of entries of page tables of either stage; 4-byte entries (Sv32) have no high bits.

    ``is_updated``: hardware sets A and D, so that a clear one is no defect.
    """
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
            if bit < 59 or "Svrsw60t59b" not in features:
                found[f"{where.upper()}_RESERVED_{bit}"] = PteDefect(where, _set(1 << bit))
        for pbmt in (1, 2, 3):
            if pbmt == 3 or where == "pointer" or "Svpbmt" not in features:
                found[f"{where.upper()}_PBMT_{pbmt}"] = PteDefect(where, _set(pbmt << PTE_PBMT_SHIFT))
    for low in range(16):
        if low != 8:  # the encoding of 64 KiB
            found[f"LEAF_NAPOT_RESERVED_{low}"] = PteDefect(
                "leaf", _change(0xF << PTE_PPN_SHIFT, PTE_N | low << PTE_PPN_SHIFT))
    if pte_bytes == 4:
        found = {name: one for name, one in found.items() if not any(word in name for word in ("NAPOT", "RESERVED", "PBMT"))}
    if is_updated:
        found = {name: one for name, one in found.items() if name.split("_", 1)[1] not in ("A_CLEAR", "D_CLEAR")}
    return found


def _in_dword(index: int, clear: int, set_: int) -> Callable[[list[int]], list[int]]:
    return lambda dwords: [dword & ~clear | set_ if at == index else dword for at, dword in enumerate(dwords)]


def _both(*mutations: Callable[[list[int]], list[int]]) -> Callable[[list[int]], list[int]]:
    def mutate(dwords: list[int]) -> list[int]:
        for one in mutations:
            dwords = one(dwords)
        return dwords
    return mutate


def _tc(**bits: bool) -> Callable[[list[int]], list[int]]:
    set_ = sum(1 << TC_BITS.index(name) for name, value in bits.items() if value)
    return _in_dword(0, sum(1 << TC_BITS.index(name) for name in bits), set_)


def device_context_defects(features: Collection[str] = FIRST_FEATURES, *, extended: bool = False, gxl: bool = False,
                           gxl_writable: bool = False, pas: int = 56) -> dict[str, DirectoryDefect]:
    """Return the defects of device contexts, each made out of any good context; little-endian IOMMUs (fctl.BE = 0).

    [RVIOMMU1.0 3.1.4]
    """
    has, tc, iohgatp, ta, fsc, msiptp, mask, pattern = set(features), 0, 1, 2, 3, 4, 5, 6
    first = {mode: f"Sv{39 + 9 * (mode - 8)}" for mode in (8, 9, 10)}
    second = {8: "Sv32x4"} if gxl else {mode: f"{name}x4" for mode, name in first.items()}
    found = {"TC_V_CLEAR": DirectoryDefect(_in_dword(tc, 1, 0), Cause.DDT_ENTRY_NOT_VALID)}

    def add(name: str, check: int, *mutations: Callable[[list[int]], list[int]]) -> None:
        found[name] = DirectoryDefect(_both(*mutations), check=check)

    if "ATS" not in has:
        for name in ("EN_ATS", "EN_PRI", "PRPR"):
            add(f"TC_{name}_SET", 2, _tc(**{name: True}))
    else:
        add("TC_EN_PRI_SET", 4, _tc(EN_ATS=False, T2GPA=False, EN_PRI=True))
        add("TC_PRPR_SET", 5, _tc(EN_PRI=False, PRPR=True))
    supported_second = [mode for mode, name in second.items() if name in has]
    with_second = _in_dword(iohgatp, MODE_BITS | 3, (supported_second or [0])[0] << 60)
    add("TC_T2GPA_SET", 3, _tc(EN_ATS=False, EN_PRI=False, PRPR=False, T2GPA=True), with_second)
    if "ATS" in has and "T2GPA" not in has:
        add("TC_T2GPA_UNSUPPORTED", 6, _tc(EN_ATS=True, T2GPA=True), with_second)
    if "T2GPA" in has and "ATS" in has:
        add("TC_T2GPA_WITHOUT_SECOND_STAGE", 7, _tc(EN_ATS=True, T2GPA=True), _in_dword(iohgatp, MODE_BITS, 0),
            *([_in_dword(msiptp, MODE_BITS, 0)] if extended else []))
    if "AMO_HWAD" not in has:
        for name in ("GADE", "SADE"):
            add(f"TC_{name}_SET", 18, _tc(**{name: True}))
    add("TC_DPE_SET", 12, _tc(PDTV=False, DPE=True))
    if "END" not in has:
        add("TC_SBE_SET", 21, _tc(SBE=True))  # and 19
    if gxl:
        add("TC_SXL_CLEAR", 20, _tc(SXL=False))
    elif not gxl_writable:
        add("TC_SXL_SET", 20, _tc(SXL=True))
    for bit in (*range(12, 24), *range(32, 64)):
        add(f"TC_RESERVED_{bit}", 1, _in_dword(tc, 0, 1 << bit))
    for value in range(1, 16):
        if value not in supported_second:
            add(f"IOHGATP_MODE_{value}", 14 if value in second and not gxl else 15 if value in second else 13,
                _in_dword(iohgatp, MODE_BITS, value << 60))
    for value in supported_second:
        for low in (1, 2, 3):
            add(f"IOHGATP_MODE_{value}_MISALIGNED_{low}", 17, _in_dword(iohgatp, MODE_BITS | 3, value << 60 | low))
    for bit in (*range(12), *range(32, 40), *(() if "QOSID" in has else range(40, 64))):  # 63:40 are RCID and MCID
        add(f"TA_RESERVED_{bit}", 1, _in_dword(ta, 0, 1 << bit))
    for bit in range(44, 60):
        add(f"FSC_RESERVED_{bit}", 1, _in_dword(fsc, 0, 1 << bit))
    for value in range(1, 16):
        if value not in first:
            add(f"IOSATP_MODE_{value}", 9, _tc(PDTV=False, DPE=False), _in_dword(fsc, MODE_BITS, value << 60))
        elif not gxl and first[value] not in has:
            add(f"IOSATP_MODE_{value}", 10, _tc(PDTV=False, DPE=False, SXL=False), _in_dword(fsc, MODE_BITS, value << 60))
        if gxl or gxl_writable:
            if value != 8:
                add(f"IOSATP_SXL_MODE_{value}", 9, _tc(PDTV=False, DPE=False, SXL=True), _in_dword(fsc, MODE_BITS, value << 60))
            elif "Sv32" not in has:
                add(f"IOSATP_SXL_MODE_{value}", 11, _tc(PDTV=False, DPE=False, SXL=True), _in_dword(fsc, MODE_BITS, value << 60))
        if {1: "PD8", 2: "PD17", 3: "PD20"}.get(value, "") not in has:
            add(f"PDTP_MODE_{value}", 8, _tc(PDTV=True), _in_dword(fsc, MODE_BITS, value << 60))
    if not extended:
        return found
    for bit in range(44, 60):
        add(f"MSIPTP_RESERVED_{bit}", 1, _in_dword(msiptp, 0, 1 << bit))
    for bit in range(mgpaw(has, pas) - 12, 64):
        add(f"MSI_ADDR_MASK_RESERVED_{bit}", 1, _in_dword(mask, 0, 1 << bit))
        add(f"MSI_ADDR_PATTERN_RESERVED_{bit}", 1, _in_dword(pattern, 0, 1 << bit))
    for bit in range(64):
        add(f"DWORD_7_RESERVED_{bit}", 1, _in_dword(7, 0, 1 << bit))
    for value in range(2, 16):
        add(f"MSIPTP_MODE_{value}", 16, _in_dword(msiptp, MODE_BITS, value << 60))
    add("MSIPTP_WITHOUT_SECOND_STAGE", 23, _tc(T2GPA=False), _in_dword(iohgatp, MODE_BITS, 0), _in_dword(msiptp, MODE_BITS, 1 << 60))
    return found


def process_context_defects(features: Collection[str] = FIRST_FEATURES, *, sxl: bool = False) -> dict[str, DirectoryDefect]:
    """Return the defects of process contexts below a device context with this SXL. [RVIOMMU1.0 3.2.4]"""
    ta, fsc, wrong = 0, 1, Cause.PDT_ENTRY_MISCONFIGURED
    modes = {8: "Sv32"} if sxl else {8: "Sv39", 9: "Sv48", 10: "Sv57"}
    found = {"PC_V_CLEAR": DirectoryDefect(_in_dword(ta, 1, 0), Cause.PDT_ENTRY_NOT_VALID)}
    for bit in (*range(3, 12), *range(32, 64)):
        found[f"PC_TA_RESERVED_{bit}"] = DirectoryDefect(_in_dword(ta, 0, 1 << bit), wrong, 1)
    for bit in range(44, 60):
        found[f"PC_FSC_RESERVED_{bit}"] = DirectoryDefect(_in_dword(fsc, 0, 1 << bit), wrong, 1)
    for value in range(IOSATP_BARE + 1, 16):
        if modes.get(value, "") not in features:
            check = 2 if value not in modes else 4 if sxl else 3
            found[f"PC_FSC_MODE_{value}"] = DirectoryDefect(_in_dword(fsc, MODE_BITS, value << 60), wrong, check)
    return found


def _pointer_defects(prefix: str, not_valid: Cause, misconfigured: Cause) -> dict[str, DirectoryDefect]:
    found = {f"{prefix}_V_CLEAR": DirectoryDefect(_in_dword(0, 1, 0), not_valid)}
    for bit in (*range(1, 10), *range(54, 64)):
        found[f"{prefix}_RESERVED_{bit}"] = DirectoryDefect(_in_dword(0, 0, 1 << bit), misconfigured)
    return found


def msi_pte_defects(features: Collection[str], *, is_mrif: bool) -> dict[str, DirectoryDefect]:
    """Return the defects of MSI entries, of those in MRIF mode or of those that translate. [RVIOMMU1.0 3.3.3]"""
    wrong = Cause.MSI_PTE_MISCONFIGURED
    found = {"MSI_PTE_V_CLEAR": DirectoryDefect(_in_dword(0, 1, 0), Cause.MSI_PTE_NOT_VALID)}
    for mode in (0, 2) if "MSI_MRIF" in features else (0, 1, 2):
        found[f"MSI_PTE_MODE_{mode}"] = DirectoryDefect(_in_dword(0, 6, mode << 1), wrong)
    if is_mrif and "MSI_MRIF" not in features:
        return found
    for bit in (*range(3, 7 if is_mrif else 10), *range(54, 63)):
        found[f"MSI_PTE_RESERVED_{bit}"] = DirectoryDefect(_in_dword(0, 0, 1 << bit), wrong)
    found["MSI_PTE_CUSTOM"] = DirectoryDefect(_in_dword(0, 0, 1 << 63), wrong)
    for bit in (*range(54, 60), *range(61, 64)) if is_mrif else ():
        found[f"MSI_PTE_NOTICE_RESERVED_{bit}"] = DirectoryDefect(_in_dword(1, 0, 1 << bit), wrong)
    return found


PTE_DEFECTS = pte_defects()  # [RVPRIV Sv39, Svnapot, Svpbmt]
DC_DEFECTS = device_context_defects()  # [RVIOMMU1.0 3.1.4]
DDTE_DEFECTS = _pointer_defects("DDTE", Cause.DDT_ENTRY_NOT_VALID, Cause.DDT_ENTRY_MISCONFIGURED)  # [RVIOMMU1.0 3.1.2]
PDTE_DEFECTS = _pointer_defects("PDTE", Cause.PDT_ENTRY_NOT_VALID, Cause.PDT_ENTRY_MISCONFIGURED)  # [RVIOMMU1.0 3.2.1]
