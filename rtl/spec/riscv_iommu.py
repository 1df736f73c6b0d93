"""Directories, page tables and faults of the RISC-V IOMMU, as the RTL reads them."""

from amaranth.lib import data

PAGE_BITS = 12
PPN_BITS = 44
DC_BYTES = 32  # base format [RVIOMMU1.0 3.1]
EXTENDED_DC_BYTES = 64  # [RVIOMMU1.0 3.1]
PC_BYTES = 16  # [RVIOMMU1.0 3.2]
MSI_PTE_BYTES = 16  # [RVIOMMU1.0 3.3.3]
ENTRY_BYTES = 8

# Where the parts of a device_id lie: with 32-byte contexts, with 64-byte contexts. [RVIOMMU1.0 3.1]
DDI = ((0, 7), (7, 16), (16, 24))
EXTENDED_DDI = ((0, 6), (6, 15), (15, 24))
PDI = ((0, 8), (8, 17), (17, 20))  # where the parts of a process_id lie [RVIOMMU1.0 3.2]


class DirectoryEntry(data.Struct):
    """Non-leaf entry of the device directory or of a process directory. [RVIOMMU1.0 3.1.1, 3.2.1]"""

    V: 1
    reserved_low: 9
    PPN: 44
    reserved_high: 10


class DeviceContext(data.Struct):
    """Device context, base format: tc, iohgatp, ta, fsc. [RVIOMMU1.0 3.1.3]"""

    V: 1
    EN_ATS: 1
    EN_PRI: 1
    T2GPA: 1
    DTF: 1
    PDTV: 1
    PRPR: 1
    GADE: 1
    SADE: 1
    DPE: 1
    SBE: 1
    SXL: 1
    tc_reserved: 12
    tc_custom: 8
    tc_reserved_high: 32
    iohgatp_ppn: 44
    GSCID: 16
    iohgatp_mode: 4
    ta_reserved: 12
    PSCID: 20
    ta_reserved_high: 32
    fsc_ppn: 44
    fsc_reserved: 16
    fsc_mode: 4


class MsiContext(data.Struct):
    """What extended format has behind it: msiptp, msi_addr_mask, msi_addr_pattern, a reserved doubleword. [RVIOMMU1.0 3.1.3]"""

    msiptp_ppn: 44
    msiptp_reserved: 16
    msiptp_mode: 4
    mask: 52
    mask_reserved: 12
    pattern: 52
    pattern_reserved: 12
    reserved: 64


class ProcessContext(data.Struct):
    """Process context: ta, fsc. [RVIOMMU1.0 3.2.2]"""

    V: 1
    ENS: 1
    SUM: 1
    ta_reserved: 9
    PSCID: 20
    ta_reserved_high: 32
    fsc_ppn: 44
    fsc_reserved: 16
    fsc_mode: 4


MODE_BARE = 0  # of iosatp, iohgatp, pdtp; Off of msiptp [RVIOMMU1.0 3.1.3]
MODE_SV39, MODE_SV48, MODE_SV57 = 8, 9, 10  # of iosatp; of iohgatp with x4 [RVIOMMU1.0 3.1.3]
MODE_PD8, MODE_PD17, MODE_PD20 = 1, 2, 3  # of pdtp [RVIOMMU1.0 3.1.3]
MODE_FLAT = 1  # of msiptp [RVIOMMU1.0 3.1.3]
LEVELS = {MODE_SV39: 3, MODE_SV48: 4, MODE_SV57: 5}  # of page tables [RVPRIV 10.4 to 10.6]


class PageTableEntry(data.Struct):
    """Page-table entry of Sv39 and larger, of either stage. [RVPRIV 10.4]"""

    V: 1
    R: 1
    W: 1
    X: 1
    U: 1
    G: 1
    A: 1
    D: 1
    RSW: 2
    PPN: 44
    reserved: 7
    PBMT: 2
    N: 1


NAPOT_64K = 0b1000  # low bits of PPN of the one NAPOT size [RVPRIV 11]
PBMT_RESERVED = 3  # [RVPRIV 12]


class MsiEntry(data.Struct):
    """First doubleword of an MSI page-table entry, basic translate mode; the second says nothing then. [RVIOMMU1.0 3.3.3]"""

    V: 1
    M: 2
    reserved_low: 7
    PPN: 44
    reserved_high: 9
    C: 1


class MrifEntry(data.Struct):
    """MSI page-table entry, MRIF mode: where messages are recorded, and the notice of it. [RVIOMMU1.0 3.3.3]"""

    V: 1
    M: 2
    reserved_low: 4
    address: 47  # bits 55:9
    reserved_high: 9
    C: 1
    NID_low: 10
    NPPN: 44
    reserved_notice: 6
    NID_high: 1
    reserved_notice_high: 3


MSI_MRIF, MSI_TRANSLATE = 1, 3  # M of MRIF mode, of basic translate mode [RVIOMMU1.0 3.3.3]
MRIF_LOG2 = 9  # bytes of an interrupt file in memory [AIA1.0 8.2.1]
MRIF_IDENTITY_BITS = 11  # of an interrupt in it [AIA1.0 8.2.1]

# ddtp.iommu_mode [RVIOMMU1.0 6.5]
OFF, BARE, LVL1, LVL2, LVL3 = range(5)

# Causes [RVIOMMU1.0 4.2]
INSTRUCTION_ACCESS_FAULT = 1
READ_ACCESS_FAULT = 5
WRITE_ACCESS_FAULT = 7
INSTRUCTION_PAGE_FAULT = 12
READ_PAGE_FAULT = 13
WRITE_PAGE_FAULT = 15
INSTRUCTION_GUEST_PAGE_FAULT = 20
READ_GUEST_PAGE_FAULT = 21
WRITE_GUEST_PAGE_FAULT = 23
ALL_DISALLOWED = 256
DDT_LOAD_FAULT = 257
DDT_NOT_VALID = 258
DDT_MISCONFIGURED = 259
TYPE_DISALLOWED = 260
MSI_LOAD_FAULT = 261
MSI_NOT_VALID = 262
MSI_MISCONFIGURED = 263
MRIF_FAULT = 264
PDT_LOAD_FAULT = 265
PDT_NOT_VALID = 266
PDT_MISCONFIGURED = 267
DDT_CORRUPTED = 268
PDT_CORRUPTED = 269
MSI_CORRUPTED = 270
MRIF_CORRUPTED = 271
PT_CORRUPTED = 274
LOGGED_ALWAYS = (ALL_DISALLOWED, DDT_LOAD_FAULT, DDT_NOT_VALID, DDT_MISCONFIGURED, DDT_CORRUPTED)  # with DTF too [RVIOMMU1.0 4.2]

# Transaction types [RVIOMMU1.0 4.2]
TTYP_UNTRANSLATED_EXECUTE = 1
TTYP_UNTRANSLATED_READ = 2
TTYP_UNTRANSLATED_WRITE = 3
TTYP_TRANSLATED = 4  # more than that of an untranslated request
TTYP_TRANSLATION_REQUEST = 8
TTYP_MESSAGE = 9

# What a fault makes of a translation request: no page that may be used, an unsupported request; others abort it. [RVIOMMU1.0 3.6]
ANSWERED_BY_NO_ACCESS = (
    INSTRUCTION_PAGE_FAULT, READ_PAGE_FAULT, WRITE_PAGE_FAULT, INSTRUCTION_GUEST_PAGE_FAULT, READ_GUEST_PAGE_FAULT, WRITE_GUEST_PAGE_FAULT,
    MSI_NOT_VALID, PDT_NOT_VALID,
)  # fmt: skip
ANSWERED_AS_UNSUPPORTED = (ALL_DISALLOWED, DDT_LOAD_FAULT, DDT_NOT_VALID, DDT_MISCONFIGURED, TYPE_DISALLOWED)
BARE_SIZE_LOG2 = 21  # of the region of a completion where nothing translates [RVIOMMU1.0 3.6]
