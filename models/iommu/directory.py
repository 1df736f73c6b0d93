"""How device and process contexts are found, and which of them are misconfigured. [RVIOMMU1.0 3.1.4, 3.2.4, 3.3.1, 3.3.2]"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ..memory import Spa
from .entries import (
    DC_BYTES,
    DC_EXTENDED_BYTES,
    FIRST_STAGE,
    IOHGATP_BARE,
    MSIPTP_FLAT,
    MSIPTP_OFF,
    PC_BYTES,
    PDTP_LEVELS,
    PTE_PPN_MASK,
    SECOND_STAGE,
    DeviceContext,
    ProcessContext,
    mgpaw,
)
from .faults import Cause
from .hpm import Event
from .second_stage import table_address
from .walk_state import Implementation, Walk

if TYPE_CHECKING:
    from .registers import Capabilities

__all__ = ["context_misconfigurations", "device_id_parts", "locate_device_context", "locate_process_context", "process_misconfigurations"]

# [RVIOMMU1.0 3.1.3] reserved bits of tc (31:24 are custom), ta, fsc and msiptp
TC_RESERVED = 0xFFFF_FFFF_00FF_F000
TA_RESERVED = 0x0000_00FF_0000_0FFF
TA_QOSID = 0xFFFF_FF00_0000_0000
FSC_RESERVED = 0x0FFF_F000_0000_0000
POINTER_RESERVED = 0xFFC0_0000_0000_03FE  # [RVIOMMU1.0 3.1.2, 3.2.1]
PC_TA_RESERVED = 0xFFFF_FFFF_0000_0FF8  # [RVIOMMU1.0 3.2.3]
DDT_CAUSES = Cause.DDT_ENTRY_LOAD_ACCESS_FAULT, Cause.DDT_DATA_CORRUPTION
PDT_CAUSES = Cause.PDT_ENTRY_LOAD_ACCESS_FAULT, Cause.PDT_DATA_CORRUPTION


def device_id_parts(device_id: int, *, extended: bool) -> tuple[int, int, int]:
    """Return DDI[0], DDI[1], DDI[2]. [RVIOMMU1.0 3.3 steps 3, 4]"""
    low = 6 if extended else 7
    return device_id & (1 << low) - 1, device_id >> low & 0x1FF, device_id >> low + 9


def locate_device_context(walk: Walk, ddi: tuple[int, int, int], levels: int) -> DeviceContext:
    """[RVIOMMU1.0 3.3.1] process to locate the device context."""
    walk.count(Event.DDT_WALK)
    # 1. a = ddtp.PPN * 2^12, i = LEVELS - 1
    a, i = (walk.registers.ddtp >> 10 & PTE_PPN_MASK) << 12, levels - 1
    # 2. until i = 0
    while i > 0:
        # 3, 4. eight bytes at a + DDI[i] * 8: access fault 257, data corruption 268
        ddte, = walk.read_entry("3.3.1", f"DDT entry of level {i}", Spa(a + ddi[i] * 8), 8, walk.order, DDT_CAUSES)
        # 5. not valid
        if not ddte & 1:
            raise walk.fault("3.3.1 step 5", Cause.DDT_ENTRY_NOT_VALID, "V is 0")
        # 6. reserved bits
        if ddte & POINTER_RESERVED:
            raise walk.fault("3.3.1 step 6", Cause.DDT_ENTRY_MISCONFIGURED, "a reserved bit is set")
        # 7. next level
        i, a = i - 1, (ddte >> 10 & PTE_PPN_MASK) << 12
    # 8. the context at a + DDI[0] * DC_SIZE: access fault 257, data corruption 268
    size = DC_EXTENDED_BYTES if walk.capabilities.MSI_FLAT else DC_BYTES
    dwords = walk.read_entry("3.3.1", "device context", Spa(a + ddi[0] * size), size, walk.order, DDT_CAUSES)
    # 9. not valid
    if not dwords[0] & 1:
        raise walk.fault("3.3.1 step 9", Cause.DDT_ENTRY_NOT_VALID, "tc.V is 0")
    # 10. misconfigured
    context, wrong = _judged(dwords, walk.capabilities, walk.registers.fctl, walk.implementation)
    if wrong:
        raise walk.fault("3.3.1 step 10", Cause.DDT_ENTRY_MISCONFIGURED, "; ".join(wrong))
    # 11, 12. located
    return context


@lru_cache(maxsize=1024)
def _judged(dwords: tuple[int, ...], capabilities: Capabilities, fctl: int,
            implementation: Implementation) -> tuple[DeviceContext, list[str]]:
    return DeviceContext.of_dwords(dwords), context_misconfigurations(dwords, capabilities, fctl, implementation)


def locate_process_context(walk: Walk, process_id: int) -> ProcessContext:
    """[RVIOMMU1.0 3.3.2] process to locate the process context; what the text prints as PDI[2] in step 2 is PDI[i]."""
    walk.count(Event.PDT_WALK)
    context, pdi = walk.context, (process_id & 0xFF, process_id >> 8 & 0x1FF, process_id >> 17)
    # 1. a = pdtp.PPN * 2^12, i = LEVELS - 1
    a, i = int(context.root), PDTP_LEVELS[context.fsc_mode] - 1
    while True:
        # 2. a + PDI[i] * 8, or a + PDI[0] * 16
        a += pdi[i] * (8 if i else PC_BYTES)
        # 3. with a second stage a is a GPA: an implicit read; access fault 265, data corruption 269
        at = table_address(walk, a, False, PDT_CAUSES)
        # 4. until i = 0
        if i == 0:
            break
        # 5, 6. eight bytes at a: access fault 265, data corruption 269
        pdte, = walk.read_entry("3.3.2", f"PDT entry of level {i}", at, 8, walk.guest_order, PDT_CAUSES)
        # 7. not valid
        if not pdte & 1:
            raise walk.fault("3.3.2 step 7", Cause.PDT_ENTRY_NOT_VALID, "V is 0")
        # 8. reserved bits
        if pdte & POINTER_RESERVED:
            raise walk.fault("3.3.2 step 8", Cause.PDT_ENTRY_MISCONFIGURED, "a reserved bit is set")
        # 9. next level
        i, a = i - 1, (pdte >> 10 & PTE_PPN_MASK) << 12
    # 10. the context: access fault 265, data corruption 269
    dwords = walk.read_entry("3.3.2", "process context", at, PC_BYTES, walk.guest_order, PDT_CAUSES)
    # 11. not valid
    if not dwords[0] & 1:
        raise walk.fault("3.3.2 step 11", Cause.PDT_ENTRY_NOT_VALID, "ta.V is 0")
    # 12. misconfigured
    if wrong := process_misconfigurations(dwords, context, walk.capabilities):
        raise walk.fault("3.3.2 step 12", Cause.PDT_ENTRY_MISCONFIGURED, "; ".join(wrong))
    # 13. located
    return ProcessContext.of_dwords(dwords)


def context_misconfigurations(dwords: tuple[int, ...], capabilities: Capabilities, fctl: int = 0,
                              implementation: Implementation = Implementation()) -> list[str]:
    """Return every check of a device context (its four or eight doublewords) that fails. [RVIOMMU1.0 3.1.4]

    Page numbers beyond PAS are left to fault on use. The rule that a context without second stage has no MSI table is
    not numbered in the text, and 23 here.
    """
    tc, _, ta, fsc = dwords[:4]
    msiptp, mask, pattern, last = dwords[4:] or (0, 0, 0, 0)
    context, has = DeviceContext.of_dwords(dwords), capabilities
    be, gxl, first = bool(fctl & 1), bool(fctl >> 2 & 1), FIRST_STAGE[context.SXL]
    second, on = SECOND_STAGE[gxl], capabilities.switched_on()
    beyond_gpa = -1 << mgpaw(on, has.PAS) - 12
    is_misfit = context.fsc_mode and not context.PDTV  # of iosatp
    checks = [
        (1, "reserved bit set", tc & TC_RESERVED or ta & TA_RESERVED or (fsc | msiptp) & FSC_RESERVED or last
         or (mask | pattern) & beyond_gpa or (ta & TA_QOSID and not has.QOSID)),
        (2, "EN_ATS, EN_PRI or PRPR without ATS", not has.ATS and (context.EN_ATS or context.EN_PRI or context.PRPR)),
        (3, "T2GPA without EN_ATS", context.T2GPA and not context.EN_ATS),
        (4, "EN_PRI without EN_ATS", context.EN_PRI and not context.EN_ATS),
        (5, "PRPR without EN_PRI", context.PRPR and not context.EN_PRI),
        (6, "T2GPA not offered", context.T2GPA and not has.T2GPA),
        (7, "T2GPA with iohgatp Bare", context.T2GPA and context.iohgatp_mode == IOHGATP_BARE),
        (8, "pdtp.MODE not supported", context.PDTV and not (
            {0: True, 1: has.PD8, 2: has.PD17, 3: has.PD20}.get(context.fsc_mode, False))),
        (9, "iosatp.MODE is reserved", is_misfit and context.fsc_mode not in first),
        (11 if context.SXL else 10, "iosatp.MODE not supported",
         is_misfit and context.fsc_mode in first and first[context.fsc_mode].name not in on),
        (12, "DPE without PDTV", context.DPE and not context.PDTV),
        (13, "iohgatp.MODE is reserved", context.iohgatp_mode and context.iohgatp_mode not in second),
        (15 if gxl else 14, "iohgatp.MODE not supported",
         context.iohgatp_mode in second and second[context.iohgatp_mode].name not in on),
        (16, "msiptp.MODE is neither Off nor Flat", context.msiptp_mode not in (MSIPTP_OFF, MSIPTP_FLAT)),
        (17, "iohgatp.PPN not aligned to 16 KiB", context.iohgatp_mode != IOHGATP_BARE and context.iohgatp_ppn & 3 != 0),
        (18, "SADE or GADE without AMO_HWAD", not has.AMO_HWAD and (context.SADE or context.GADE)),
        (19, "SBE differs from BE", be != context.SBE and not has.END),  # 19, 21
        (20, "SXL does not fit GXL", not context.SXL if gxl else context.SXL and not implementation.gxl_writable),
        (22, "RCID or MCID too wide", has.QOSID and (context.RCID >> implementation.rcid_bits or context.MCID >> implementation.mcid_bits)),
        (23, "msiptp without second stage", context.msiptp_mode != MSIPTP_OFF and context.iohgatp_mode == IOHGATP_BARE),
    ]  # fmt: skip
    return [f"check {number}: {text}" for number, text, fails in checks if fails]


def process_misconfigurations(dwords: tuple[int, ...], device: DeviceContext, capabilities: Capabilities) -> list[str]:
    """Return every check of a process context that fails, below this device context. [RVIOMMU1.0 3.2.4]"""
    ta, fsc = dwords
    mode, modes = fsc >> 60, FIRST_STAGE[device.SXL]
    checks = [
        (1, "reserved bit set", ta & PC_TA_RESERVED or fsc & FSC_RESERVED),
        (2, "fsc.MODE is reserved", mode and mode not in modes),
        (4 if device.SXL else 3, "fsc.MODE not supported", mode in modes and modes[mode].name not in capabilities.switched_on()),
    ]
    return [f"check {number}: {text}" for number, text, fails in checks if fails]
