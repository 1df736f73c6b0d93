"""Directories, page tables and faults of the RISC-V IOMMU, as the RTL reads them."""

from amaranth.lib import data

PAGE_BITS = 12
PPN_BITS = 44
DC_BYTES = 32  # base format [RVIOMMU1.0 3.1]
ENTRY_BYTES = 8

# Where the parts of a device_id lie, with 32-byte contexts. [RVIOMMU1.0 3.1]
DDI = ((0, 7), (7, 16), (16, 24))


class DirectoryEntry(data.Struct):
    """Non-leaf entry of the device directory. [RVIOMMU1.0 3.1.1]"""

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


MODE_BARE = 0  # of iosatp, iohgatp and pdtp [RVIOMMU1.0 3.1.3]
MODE_SV39 = 8


class PageTableEntry(data.Struct):
    """Sv39 page-table entry. [RVPRIV 10.4]"""

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

# ddtp.iommu_mode [RVIOMMU1.0 6.5]
OFF, BARE, LVL1, LVL2, LVL3 = range(5)

# Causes [RVIOMMU1.0 4.2]
INSTRUCTION_ACCESS_FAULT = 1
READ_ACCESS_FAULT = 5
WRITE_ACCESS_FAULT = 7
INSTRUCTION_PAGE_FAULT = 12
READ_PAGE_FAULT = 13
WRITE_PAGE_FAULT = 15
ALL_DISALLOWED = 256
DDT_LOAD_FAULT = 257
DDT_NOT_VALID = 258
DDT_MISCONFIGURED = 259
TYPE_DISALLOWED = 260
DDT_CORRUPTED = 268
PT_CORRUPTED = 274

# Transaction types [RVIOMMU1.0 4.2]
TTYP_UNTRANSLATED_EXECUTE = 1
TTYP_UNTRANSLATED_READ = 2
TTYP_UNTRANSLATED_WRITE = 3
