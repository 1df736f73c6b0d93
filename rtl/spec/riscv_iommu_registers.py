"""Registers, commands and record of the RISC-V IOMMU's programming interface, as the RTL reads them."""

from dataclasses import dataclass

from amaranth import unsigned
from amaranth.lib import data, enum

REGISTER_SPACE = 4096  # bytes [RVIOMMU1.0 6.1]
MSI_ENTRIES = 16  # of msi_cfg_tbl [RVIOMMU1.0 6.29]
MSI_ENTRY_BYTES = 16
COMMAND_BYTES = 16  # [RVIOMMU1.0 4.1]
PAGE_BITS = 12
PPN_LOW = 10  # lowest bit of PPN in ddtp, cqb, fqb [RVIOMMU1.0 6.5, 6.6, 6.9]
VERSION = 0x10  # 1.0 [RVIOMMU1.0 6.3]
IGS_MSI, IGS_WSI, IGS_BOTH = range(3)  # [RVIOMMU1.0 6.3]
MAX_COUNTERS = 31  # of events [RVIOMMU1.0 6.22]
CAUSE_MSI_WRITE = 273  # IOMMU MSI write access fault [RVIOMMU1.0 4.2]


class Mode(enum.Enum, shape=4):
    """ddtp.iommu_mode. [RVIOMMU1.0 6.5]"""

    OFF = 0
    BARE = 1
    LVL1 = 2
    LVL2 = 3
    LVL3 = 4


DEVICE_ID_BITS = {Mode.LVL1: 7, Mode.LVL2: 16, Mode.LVL3: 24}  # with 32-byte contexts [RVIOMMU1.0 3.1]


@dataclass(frozen=True)
class Register:
    """Place, width in bits and access (RO, RW, RW1C, WARL) of a register. [RVIOMMU1.0 6.1]"""

    name: str
    offset: int
    width: int
    access: str


REGISTERS = (
    Register("capabilities", 0x000, 64, "RO"),
    Register("fctl", 0x008, 32, "WARL"),
    Register("ddtp", 0x010, 64, "WARL"),
    Register("cqb", 0x018, 64, "WARL"),
    Register("cqh", 0x020, 32, "RO"),
    Register("cqt", 0x024, 32, "WARL"),
    Register("fqb", 0x028, 64, "WARL"),
    Register("fqh", 0x030, 32, "WARL"),
    Register("fqt", 0x034, 32, "RO"),
    Register("cqcsr", 0x048, 32, "RW"),
    Register("fqcsr", 0x04C, 32, "RW"),
    Register("ipsr", 0x054, 32, "RW1C"),
    Register("icvec", 0x2F8, 64, "WARL"),
    *(Register(f"msi_addr_{n}", 0x300 + MSI_ENTRY_BYTES * n, 64, "WARL") for n in range(MSI_ENTRIES)),
    *(Register(f"msi_data_{n}", 0x308 + MSI_ENTRY_BYTES * n, 32, "WARL") for n in range(MSI_ENTRIES)),
    *(Register(f"msi_vec_ctl_{n}", 0x30C + MSI_ENTRY_BYTES * n, 32, "RW") for n in range(MSI_ENTRIES)),
)
# Those that there are with the features of these names.
FEATURE_REGISTERS = {
    "ATS": (
        Register("pqb", 0x038, 64, "WARL"),
        Register("pqh", 0x040, 32, "WARL"),
        Register("pqt", 0x044, 32, "RO"),
        Register("pqcsr", 0x050, 32, "RW"),
    ),
    "HPM": (
        Register("iocountovf", 0x058, 32, "RO"),
        Register("iocountinh", 0x05C, 32, "WARL"),
        Register("iohpmcycles", 0x060, 64, "WARL"),
        *(Register(f"iohpmctr{n}", 0x068 + 8 * (n - 1), 64, "WARL") for n in range(1, MAX_COUNTERS + 1)),
        *(Register(f"iohpmevt{n}", 0x160 + 8 * (n - 1), 64, "WARL") for n in range(1, MAX_COUNTERS + 1)),
    ),
    "DBG": (
        Register("tr_req_iova", 0x258, 64, "WARL"),
        Register("tr_req_ctl", 0x260, 64, "WARL"),
        Register("tr_response", 0x268, 64, "RO"),
    ),
}  # fmt: skip
OFFSET = {register.name: register.offset for registers in (REGISTERS, *FEATURE_REGISTERS.values()) for register in registers}
MSI_TABLE = 0x300  # of BAR 0: also the function's MSI-X table [RVIOMMU1.0 8.1]
PENDING_ARRAY = 0x400  # of BAR 0: the function's pending bits [PCIe5 7.7.2]


class Capabilities(data.Struct):
    """capabilities. [RVIOMMU1.0 6.3]"""

    version: 8
    Sv32: 1
    Sv39: 1
    Sv48: 1
    Sv57: 1
    reserved_12: 2
    Svrsw60t59b: 1
    Svpbmt: 1
    Sv32x4: 1
    Sv39x4: 1
    Sv48x4: 1
    Sv57x4: 1
    reserved_20: 1
    AMO_MRIF: 1
    MSI_FLAT: 1
    MSI_MRIF: 1
    AMO_HWAD: 1
    ATS: 1
    T2GPA: 1
    END: 1
    IGS: 2
    HPM: 1
    DBG: 1
    PAS: 6
    PD8: 1
    PD17: 1
    PD20: 1
    QOSID: 1
    NL: 1
    S: 1
    reserved_44: 20


class QueueCsr(data.Struct):
    """cqcsr, fqcsr and pqcsr: bits 9 and 8 are there in all, 11:10 in cqcsr only. [RVIOMMU1.0 6.15 to 6.17]"""

    enable: 1
    interrupt_enable: 1
    reserved_2: 6
    memory_fault: 1  # cqmf, fqmf, pqmf
    stopped: 1  # cmd_to, fqof, pqof
    cmd_ill: 1
    fence_w_ip: 1
    reserved_12: 4
    on: 1
    busy: 1
    reserved_18: 14


class EventId(enum.IntEnum, shape=4):
    """Events that counters can count. [RVIOMMU1.0 6.23]"""

    UNTRANSLATED_REQUEST = 1
    TRANSLATED_REQUEST = 2
    ATS_TRANSLATION_REQUEST = 3
    TLB_MISS = 4
    DDT_WALK = 5
    PDT_WALK = 6
    FIRST_STAGE_WALK = 7
    SECOND_STAGE_WALK = 8


class EventSelector(data.Struct):
    """iohpmevt. [RVIOMMU1.0 6.23]"""

    eventID: 15
    DMASK: 1
    PID_PSCID: 20
    DID_GSCID: 24
    PV_PSCV: 1
    DV_GSCV: 1
    IDT: 1
    OF: 1


class DebugControl(data.Struct):
    """tr_req_ctl. [RVIOMMU1.0 6.25]"""

    busy: 1  # Go/Busy
    Priv: 1
    Exe: 1
    NW: 1
    reserved_4: 8
    PID: 20
    PV: 1
    reserved_33: 7
    DID: 24


class DebugResponse(data.Struct):
    """tr_response. [RVIOMMU1.0 6.26]"""

    fault: 1
    reserved_1: 6
    PBMT: 2
    S: 1
    PPN: 44
    reserved_54: 10


class Opcode(enum.Enum, shape=7):
    """Opcodes of commands. [RVIOMMU1.0 4.1]"""

    IOTINVAL = 1
    IOFENCE = 2
    IODIR = 3
    ATS = 4


class Iotinval(data.Struct):
    """IOTINVAL. [RVIOMMU1.0 4.1.1]"""

    opcode: 7
    func3: 3  # 0 VMA, 1 GVMA
    AV: 1
    reserved_11: 1
    PSCID: unsigned(20)
    PSCV: 1
    GV: 1
    NL: 1
    reserved_35: 9
    GSCID: 16
    reserved_60: 13
    S: 1
    ADDR: 52
    reserved_126: 2


class Iofence(data.Struct):
    """IOFENCE.C. [RVIOMMU1.0 4.1.2]"""

    opcode: 7
    func3: 3
    AV: 1
    WSI: 1
    PR: 1
    PW: 1
    reserved_14: 18
    DATA: 32
    ADDR: 62
    reserved_126: 2


class Iodir(data.Struct):
    """IODIR. [RVIOMMU1.0 4.1.3]"""

    opcode: 7
    func3: 3  # 0 INVAL_DDT, 1 INVAL_PDT
    reserved_10: 2
    PID: 20
    reserved_32: 1
    DV: 1
    reserved_34: 6
    DID: 24
    reserved_64: 64


class Ats(data.Struct):
    """ATS. [RVIOMMU1.0 4.1.4]"""

    opcode: 7
    func3: 3  # 0 INVAL, 1 PRGR
    reserved_10: 2
    PID: 20
    PV: 1
    DSV: 1
    reserved_34: 6
    RID: 16
    DSEG: 8
    PAYLOAD: 64


# What of PAYLOAD a message has use for; an answer repeats RID at ``PAYLOAD_RID``. [RVIOMMU1.0 4.1.4]
INVAL_PAYLOAD = (1 << 64) - (1 << 11) | 1
PRGR_PAYLOAD = 0x1FF << 32 | 0xF << 44
PAYLOAD_RID = 48


class Command(data.Union):
    """One entry of the command queue. [RVIOMMU1.0 4.1]"""

    raw: 128
    iotinval: Iotinval
    iofence: Iofence
    iodir: Iodir


class FaultRecord(data.Struct):
    """One entry of the fault queue. [RVIOMMU1.0 4.2]"""

    CAUSE: 12
    PID: 20
    PV: 1
    PRIV: 1
    TTYP: 6
    DID: 24
    custom: 32
    reserved_96: 32
    iotval: 64
    iotval2: 64


class PageRequestRecord(data.Struct):
    """One entry of the page-request queue. [RVIOMMU1.0 4.3]"""

    reserved_0: 12
    PID: 20
    PV: 1
    PRIV: 1
    EXEC: 1
    reserved_35: 5
    DID: 24
    R: 1
    W: 1
    L: 1
    group_index: 9
    page: 52


class MessageCode(enum.IntEnum, shape=8):
    """Codes of PCI Express messages. [PCIe5 10.3, 10.4]"""

    INVALIDATION_REQUEST = 1
    PAGE_REQUEST = 4
    GROUP_RESPONSE = 5


class ResponseCode(enum.Enum, shape=4):
    """How a group of page requests ended. [PCIe5 10.4.2]"""

    SUCCESS = 0
    INVALID_REQUEST = 1
    RESPONSE_FAILURE = 15
