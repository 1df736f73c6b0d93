"""The registers of an IOMMU: what it says it can do, how the register file behaves, and a driver for it.

`Capabilities` decides what the rest of the model does. `RegisterFile` is the golden behaviour without a clock: what
hardware may do later (busy bits, on bits) is done at once. `IommuDriver` is software, written as generators over the
operations of `models.host`. [RVIOMMU1.0 6]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from ..host import Delay, MemoryRead, MemoryWrite, Software
from ..memory import Iova, Spa
from .commands import COMMAND_BYTES, Command, IodirInvalDdt, IofenceC, IotinvalVma
from .faults import RECORD_BYTES, FaultRecord
from .hpm import Event, EventIds, EventSelector
from .tables import PAGE, Allocator, DeviceDirectory, Memory

if TYPE_CHECKING:
    from .cache import AllowedTranslations

__all__ = [
    "CQ_ERRORS",
    "CQ_RW1C",
    "FQ_RW1C",
    "MSI_CFG_ENTRIES",
    "MSI_CFG_TBL",
    "OFFSET",
    "PQ_RW1C",
    "REGISTERS",
    "REGISTER_SPACE",
    "Capabilities",
    "CommandQueueStopped",
    "Fctl",
    "Igs",
    "InterruptMessage",
    "IommuDriver",
    "IommuDriverError",
    "IommuMode",
    "Ipsr",
    "QueueCsr",
    "Register",
    "RegisterFile",
    "UnspecifiedAccess",
    "register_list",
]  # fmt: skip

REGISTER_SPACE = 4096  # [RVIOMMU1.0 6.1]
MSI_CFG_TBL = 0x300
MSI_CFG_ENTRIES = 16


class IommuMode(IntEnum):
    """ddtp.iommu_mode. [RVIOMMU1.0 6.5]"""

    OFF = 0
    BARE = 1
    LVL1 = 2
    LVL2 = 3
    LVL3 = 4

    @property
    def levels(self) -> int:
        """Levels of the device directory; 0 for Off and Bare."""
        return max(self - IommuMode.BARE, 0)


class Igs(IntEnum):
    """capabilities.IGS: which interrupts there are. [RVIOMMU1.0 6.3]"""

    MSI = 0
    WSI = 1
    BOTH = 2


# [RVIOMMU1.0 6.3] the bit of each one-bit field, by its name
_CAPABILITY_BITS = {
    "Sv32": 8, "Sv39": 9, "Sv48": 10, "Sv57": 11, "Svrsw60t59b": 14, "Svpbmt": 15, "Sv32x4": 16, "Sv39x4": 17,
    "Sv48x4": 18, "Sv57x4": 19, "AMO_MRIF": 21, "MSI_FLAT": 22, "MSI_MRIF": 23, "AMO_HWAD": 24, "ATS": 25,
    "T2GPA": 26, "END": 27, "HPM": 30, "DBG": 31, "PD8": 38, "PD17": 39, "PD20": 40, "QOSID": 41, "NL": 42, "S": 43,
}


@dataclass(frozen=True)
class Capabilities:
    """The capabilities register, field by field; the default is the first card. [RVIOMMU1.0 6.3]

    Raises
    ------
    :exc:`ValueError`
        When a field does not fit, or one mode lacks the one that it requires.
    """

    version: int = 0x10
    Sv32: bool = False
    Sv39: bool = True
    Sv48: bool = False
    Sv57: bool = False
    Svrsw60t59b: bool = False
    Svpbmt: bool = False
    Sv32x4: bool = False
    Sv39x4: bool = False
    Sv48x4: bool = False
    Sv57x4: bool = False
    AMO_MRIF: bool = False
    MSI_FLAT: bool = False
    MSI_MRIF: bool = False
    AMO_HWAD: bool = False
    ATS: bool = False
    T2GPA: bool = False
    END: bool = False
    IGS: Igs = Igs.MSI
    HPM: bool = False
    DBG: bool = False
    PAS: int = 56
    PD8: bool = False
    PD17: bool = False
    PD20: bool = False
    QOSID: bool = False
    NL: bool = False
    S: bool = False

    def __post_init__(self):
        if not 0 <= self.version < 256:
            raise ValueError(f"Version must fit 8 bits, not {self.version!r}")
        if not 32 <= self.PAS <= 56:
            raise ValueError(f"PAS must be 32 to 56 physical address bits, not {self.PAS!r}")
        if self.IGS not in tuple(Igs):
            raise ValueError(f"IGS must be 0, 1 or 2, not {self.IGS!r}")
        for larger, smaller in (("Sv48", "Sv39"), ("Sv57", "Sv48")):
            if getattr(self, larger) and not getattr(self, smaller):
                raise ValueError(f"{larger} must come with {smaller}, not {getattr(self, smaller)!r}")

    @property
    def value(self) -> int:
        """The register."""
        bits = sum(bool(getattr(self, name)) << bit for name, bit in _CAPABILITY_BITS.items())
        return self.version | self.IGS << 28 | self.PAS << 32 | bits

    @classmethod
    def from_value(cls, value: int) -> Capabilities:
        """Read a register; reserved and custom bits are passed over."""
        flags = {name: bool(value >> bit & 1) for name, bit in _CAPABILITY_BITS.items()}
        igs = value >> 28 & 3
        return cls(version=value & 0xFF, IGS=Igs(igs) if igs in tuple(Igs) else igs, PAS=value >> 32 & 0x3F, **flags)

    def switched_on(self) -> set[str]:
        """Return the names of the one-bit fields that are 1."""
        return {one.name for one in fields(self) if one.name in _CAPABILITY_BITS and getattr(self, one.name)}


@dataclass(frozen=True)
class Register:
    """One register: byte offset, width in bits, value after reset, access (RO, RW, RW1C, WARL). [RVIOMMU1.0 6.1]"""

    name: str
    offset: int
    width: int
    reset: int
    access: str


def register_list(capabilities: Capabilities, *, reset_mode: IommuMode = IommuMode.BARE, counters: int = 7) -> list[Register]:
    """Return the registers of an IOMMU with these capabilities; every other offset reads 0 and ignores writes.

    ``counters`` are the event counters that there are with HPM, 1 to 31. Resets that the specification leaves open are
    0, but M, which resets to 1 because the table is also the function's MSI-X table. [RVIOMMU1.0 6.2] [PCIe5 7.7.2]
    """
    if not 1 <= counters <= 31:
        raise ValueError(f"Event counters must be 1 to 31, not {counters!r}")
    has = capabilities
    found = [
        Register("capabilities", 0x000, 64, capabilities.value, "RO"),
        Register("fctl", 0x008, 32, 2 if has.IGS == Igs.WSI else 0, "WARL"),
        Register("ddtp", 0x010, 64, int(reset_mode), "WARL"),
        Register("cqb", 0x018, 64, 0, "WARL"),
        Register("cqh", 0x020, 32, 0, "RO"),
        Register("cqt", 0x024, 32, 0, "WARL"),
        Register("fqb", 0x028, 64, 0, "WARL"),
        Register("fqh", 0x030, 32, 0, "WARL"),
        Register("fqt", 0x034, 32, 0, "RO"),
    ]
    if has.ATS:
        found += [Register("pqb", 0x038, 64, 0, "WARL"), Register("pqh", 0x040, 32, 0, "WARL"), Register("pqt", 0x044, 32, 0, "RO")]
    found += [Register("cqcsr", 0x048, 32, 0, "RW"), Register("fqcsr", 0x04C, 32, 0, "RW")]
    if has.ATS:
        found += [Register("pqcsr", 0x050, 32, 0, "RW")]
    found += [Register("ipsr", 0x054, 32, 0, "RW1C")]
    if has.HPM:
        found += [Register("iocountovf", 0x058, 32, 0, "RO"), Register("iocountinh", 0x05C, 32, 0, "WARL"),
                  Register("iohpmcycles", 0x060, 64, 0, "WARL")]
        found += [Register(f"iohpmctr{n}", 0x068 + 8 * (n - 1), 64, 0, "WARL") for n in range(1, counters + 1)]
        found += [Register(f"iohpmevt{n}", 0x160 + 8 * (n - 1), 64, 0, "WARL") for n in range(1, counters + 1)]
    if has.DBG:
        found += [Register("tr_req_iova", 0x258, 64, 0, "WARL"), Register("tr_req_ctl", 0x260, 64, 0, "WARL"),
                  Register("tr_response", 0x268, 64, 0, "RO")]
    if has.QOSID:
        found += [Register("iommu_qosid", 0x270, 32, 0, "WARL")]
    found += [Register("icvec", 0x2F8, 64, 0, "WARL")]
    if capabilities.IGS != Igs.WSI:
        for n in range(MSI_CFG_ENTRIES):
            found += [
                Register(f"msi_addr_{n}", MSI_CFG_TBL + 16 * n, 64, 0, "WARL"),
                Register(f"msi_data_{n}", MSI_CFG_TBL + 16 * n + 8, 32, 0, "WARL"),
                Register(f"msi_vec_ctl_{n}", MSI_CFG_TBL + 16 * n + 12, 32, 1, "RW"),
            ]
    return found


REGISTERS = register_list(Capabilities())
_BY_NAME = {register.name: register for register in register_list(Capabilities(ATS=True, HPM=True, DBG=True, QOSID=True), counters=31)}
OFFSET = {name: register.offset for name, register in _BY_NAME.items()}  # of every register that there may be


class QueueCsr(IntFlag):
    """cqcsr, fqcsr and pqcsr, which share their common bits. [RVIOMMU1.0 6.15 to 6.17]"""

    EN = 1 << 0
    IE = 1 << 1
    MF = 1 << 8
    CMD_TO = 1 << 9  # cqcsr
    OF = 1 << 9  # fqcsr, pqcsr
    CMD_ILL = 1 << 10
    FENCE_W_IP = 1 << 11
    ON = 1 << 16
    BUSY = 1 << 17


CQ_ERRORS = QueueCsr.MF | QueueCsr.CMD_TO | QueueCsr.CMD_ILL
CQ_RW1C = CQ_ERRORS | QueueCsr.FENCE_W_IP
FQ_RW1C = QueueCsr.MF | QueueCsr.OF
PQ_RW1C = QueueCsr.MF | QueueCsr.OF


class Ipsr(IntFlag):
    """ipsr. [RVIOMMU1.0 6.18]"""

    CIP = 1 << 0
    FIP = 1 << 1
    PMIP = 1 << 2
    PIP = 1 << 3


class Fctl(IntFlag):
    """fctl. [RVIOMMU1.0 6.4]"""

    BE = 1 << 0
    WSI = 1 << 1
    GXL = 1 << 2


@dataclass(frozen=True)
class InterruptMessage:
    """One MSI of the IOMMU itself: the vector it belongs to, and the 4-byte write in its order of bytes. [RVIOMMU1.0 6.29]"""

    vector: int
    address: Spa
    data: int
    order: str = "little"


class UnspecifiedAccess(ValueError):
    """A register access whose outcome the specification leaves open: size, alignment or span. [RVIOMMU1.0 6]"""


class RegisterFile:
    """Golden behaviour of the register file. [RVIOMMU1.0 6]

    An 8-byte access is two 4-byte ones, high half first. Where the specification says UNSPECIFIED it does this: writes
    to a queue base while the queue is on are ignored; ddtp keeps its value on a mode that is unsupported, from one
    nLVL mode to another or to Bare, and ignores its high half outside Off and Bare; fctl keeps its value outside Off and
    while a queue is on; tr_req_iova and tr_req_ctl keep theirs while Go/Busy is 1. iohpmevt keeps any eventID; those that
    are reserved count nothing.

    Parameters
    ----------
    capabilities : :class:`Capabilities`
    reset_mode : :class:`IommuMode`
        ddtp.iommu_mode after reset: BARE in a permissive card, OFF in a strict one.
    vectors : :class:`int`
        Interrupt vectors that icvec can name: 1, 2, 4, 8 or 16.
    queue_log2_max : :class:`int`
        Largest LOG2SZ of a queue, 1 to 32; larger requests read back as this.
    gxl, gxl_writable : :class:`bool`
        fctl.GXL after reset, and whether software may change it.
    counters, counter_bits : :class:`int`
        With HPM: event counters, and the width of them and of iohpmcycles, 32 to 64 (63 of iohpmcycles).

    Attributes
    ----------
    messages : list of :class:`InterruptMessage`
        MSIs due, oldest first; whoever sends them takes them out.
    pending : set of :class:`int`
        Vectors whose message M holds back: what the function's pending bit array shows. The array itself is the
        function's and not here.
    """

    def __init__(self, capabilities: Capabilities = Capabilities(), *, reset_mode: IommuMode = IommuMode.BARE,
                 vectors: int = 4, queue_log2_max: int = 16, gxl: bool = False, gxl_writable: bool = False, counters: int = 7,
                 counter_bits: int = 64):
        if reset_mode not in (IommuMode.OFF, IommuMode.BARE):
            raise ValueError(f"Mode at reset must be Off or Bare, not {reset_mode!r}")
        if vectors not in (1, 2, 4, 8, 16):
            raise ValueError(f"Vectors must be 1, 2, 4, 8 or 16, not {vectors!r}")
        if not 1 <= queue_log2_max <= 32:
            raise ValueError(f"Largest LOG2SZ must be 1 to 32, not {queue_log2_max!r}")
        if not 32 <= counter_bits <= 64:
            raise ValueError(f"Width of counters must be 32 to 64 bits, not {counter_bits!r}")
        self.capabilities, self.reset_mode = capabilities, reset_mode
        self.vectors, self.queue_log2_max = vectors, queue_log2_max
        self.counters, self.counter_bits = counters if capabilities.HPM else 0, counter_bits
        registers = register_list(capabilities, reset_mode=reset_mode, counters=counters)
        self._value = {register.name: register.reset for register in registers}
        self._at = {register.offset + half: (register, 8 * half) for register in registers
                    for half in range(0, register.width // 8, 4)}
        self._fctl_mask = (capabilities.END * Fctl.BE | (capabilities.IGS == Igs.BOTH) * Fctl.WSI | gxl_writable * Fctl.GXL)
        self._value["fctl"] |= gxl * Fctl.GXL
        self.pending: set[int] = set()
        self.messages: list[InterruptMessage] = []

    # -- software side --

    def read(self, offset: int, size: int) -> int:
        """Return a register, or one half of it; 0 where there is none."""
        self._check(offset, size)
        if size == 8:
            return self.read(offset, 4) | self.read(offset + 4, 4) << 32
        register, shift = self._at.get(offset, (None, 0))
        return self._value[register.name] >> shift & 0xFFFF_FFFF if register else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register, or one half of it; nothing happens where there is none."""
        self._check(offset, size)
        if not 0 <= value < 1 << 8 * size:
            raise ValueError(f"Value must fit {size} bytes, not {value!r}")
        if size == 8:
            self.write(offset + 4, 4, value >> 32)
            self.write(offset, 4, value & 0xFFFF_FFFF)
            return
        register, shift = self._at.get(offset, (None, 0))
        if register is None:
            return
        new = self._value[register.name] & ~(0xFFFF_FFFF << shift) | value << shift
        match register.name:
            case "ddtp":
                self._write_ddtp(new, is_high=shift == 32)
            case "fctl":
                self._write_fctl(new)
            case "cqb" | "fqb" | "pqb":
                self._write_base(register.name, new)
            case "cqt" | "fqh" | "pqh":
                self._value[register.name] = new & self.entries(f"{register.name[:2]}b") - 1
            case "cqcsr":
                self._write_csr("cqcsr", new, int(CQ_RW1C), "cqh")
            case "fqcsr":
                self._write_csr("fqcsr", new, int(FQ_RW1C), "fqt")
            case "pqcsr":
                self._write_csr("pqcsr", new, int(PQ_RW1C), "pqt")
            case "ipsr":
                self._value["ipsr"] &= ~value
            case "icvec":
                # [RVIOMMU1.0 6.28] pmiv and piv only where they have a source
                fields = 0x11 | self.capabilities.HPM << 8 | self.capabilities.ATS << 12
                self._value["icvec"] = new & (self.vectors - 1) * fields
            case "iocountinh":
                self._value["iocountinh"] = new & (2 << self.counters) - 1
            case "iohpmcycles":
                self._value["iohpmcycles"] = new & (1 << 63 | (1 << min(self.counter_bits, 63)) - 1)
                self._update_overflows()
            case "tr_req_iova" | "tr_req_ctl":
                self._write_debug(register.name, new, is_high=shift == 32)
            case "iommu_qosid":
                self._value["iommu_qosid"] = new & 0x0FFF_0FFF
            case name if name.startswith("iohpmctr"):
                self._value[name] = new & (1 << self.counter_bits) - 1
            case name if name.startswith("iohpmevt"):
                self._value[name] = new
                self._update_overflows()
            case name if name.startswith("msi_"):
                self._write_msi(name, new)
        self._update_interrupts()

    def _check(self, offset: int, size: int) -> None:
        if size not in (4, 8) or offset % size or not 0 <= offset <= REGISTER_SPACE - size:
            raise UnspecifiedAccess(f"Register access must be 4 or 8 bytes, aligned, inside {REGISTER_SPACE} bytes, "
                                    f"not {size!r} bytes at {offset!r}")
        if size == 8 and offset in self._at and self._at[offset][0].width == 32:
            raise UnspecifiedAccess(f"An 8-byte access must not span registers, not at {offset!r}")

    def _write_ddtp(self, new: int, *, is_high: bool) -> None:
        old = self._value["ddtp"]
        mode, old_mode = new & 0xF, old & 0xF
        off_or_bare = old_mode in (IommuMode.OFF, IommuMode.BARE)
        new = new & self._ppn_mask | mode
        if is_high:  # [RVIOMMU1.0 6] the half without iommu_mode has no side effect
            if off_or_bare:
                self._value["ddtp"] = new
        elif mode == IommuMode.OFF or (mode in tuple(IommuMode) and off_or_bare):
            self._value["ddtp"] = new

    def _write_fctl(self, new: int) -> None:
        queues = [self._value.get(csr, 0) & (QueueCsr.EN | QueueCsr.ON) for csr in ("cqcsr", "fqcsr", "pqcsr")]
        if self.mode == IommuMode.OFF and not any(queues):
            self._value["fctl"] = self._value["fctl"] & ~self._fctl_mask | new & self._fctl_mask

    def _write_base(self, name: str, new: int) -> None:
        queue = name[:2]
        if self._value[f"{queue}csr"] & QueueCsr.ON:
            return
        log2 = min((new & 0x1F) + 1, self.queue_log2_max)
        self._value[name] = new & self._ppn_mask | log2 - 1
        for index in (f"{queue}h", f"{queue}t"):  # [RVIOMMU1.0 6.7] bits 31:LOG2SZ become 0
            self._value[index] &= (1 << log2) - 1

    def _write_csr(self, name: str, new: int, rw1c: int, index: str) -> None:
        old = self._value[name]
        value = old & rw1c & ~new | new & (QueueCsr.EN | QueueCsr.IE) | old & QueueCsr.ON
        if new & ~old & QueueCsr.EN:  # [RVIOMMU1.0 6.15] 0 to 1
            value = value & ~rw1c | QueueCsr.ON
            self._value[index] = 0
        elif old & ~new & QueueCsr.EN:
            value &= ~int(QueueCsr.ON)
        self._value[name] = int(value)

    def _write_msi(self, name: str, new: int) -> None:
        kind, vector = name.rsplit("_", 1)
        mask = {"msi_addr": (1 << 56) - 4, "msi_data": 0xFFFF_FFFF, "msi_vec_ctl": 1}[kind]
        self._value[name] = new & mask
        if kind == "msi_vec_ctl" and not new & 1 and int(vector) in self.pending:
            self.pending.remove(int(vector))
            self._send(int(vector))

    def _write_debug(self, name: str, new: int, *, is_high: bool) -> None:
        busy = self._value["tr_req_ctl"] & 1
        if busy:
            return
        if name == "tr_req_iova":
            self._value[name] = new & ~0xFFF
        else:  # DID, PV, PID, NW, Exe, Priv; Go is in the low half
            self._value[name] = new & (0xFFFF_FF01_FFFF_F00E | (not is_high))

    @property
    def _ppn_mask(self) -> int:
        """The bits of the PPN field in ddtp and queue bases that PAS leaves."""
        return (1 << self.capabilities.PAS - 12) - 1 << 10

    # -- what the rest of the model reads --

    @property
    def ddtp(self) -> int:
        return self._value["ddtp"]

    @property
    def fctl(self) -> int:
        return self._value["fctl"]

    @property
    def mode(self) -> IommuMode:
        return IommuMode(self.ddtp & 0xF)

    @property
    def cqh(self) -> int:
        return self._value["cqh"]

    @property
    def cqt(self) -> int:
        return self._value["cqt"]

    @property
    def fqh(self) -> int:
        return self._value["fqh"]

    @property
    def fqt(self) -> int:
        return self._value["fqt"]

    @property
    def order(self) -> str:
        """Order of bytes in queues and of messages (fctl.BE)."""
        return "big" if self.fctl & Fctl.BE else "little"

    @property
    def wires(self) -> frozenset[int]:
        """The wires that are high: none unless fctl.WSI is 1. [RVIOMMU1.0 6.18, 6.28]"""
        if not self.fctl & Fctl.WSI:
            return frozenset()
        return frozenset(self._vector(bit) for bit in Ipsr if self._value["ipsr"] & bit)

    @property
    def pqh(self) -> int:
        return self._value["pqh"]

    @property
    def pqt(self) -> int:
        return self._value["pqt"]

    @property
    def pqcsr(self) -> QueueCsr:
        """0 without ATS."""
        return QueueCsr(self._value.get("pqcsr", 0))

    @property
    def debug_request(self) -> tuple[int, int] | None:
        """tr_req_iova and tr_req_ctl while Go/Busy is 1."""
        ctl = self._value.get("tr_req_ctl", 0)
        return (self._value["tr_req_iova"], ctl) if ctl & 1 else None

    @property
    def cqcsr(self) -> QueueCsr:
        return QueueCsr(self._value["cqcsr"])

    @property
    def cq_runs(self) -> bool:
        """The command queue is on and no error stops it."""
        return bool(self.cqcsr & QueueCsr.ON) and not self.cqcsr & CQ_ERRORS

    @property
    def fqon(self) -> bool:
        return bool(self._value["fqcsr"] & QueueCsr.ON)

    @property
    def fqof(self) -> bool:
        return bool(self._value["fqcsr"] & QueueCsr.OF)

    @property
    def fqmf(self) -> bool:
        return bool(self._value["fqcsr"] & QueueCsr.MF)

    def entries(self, base: str) -> int:
        """Entries of the queue whose base register is ``base``."""
        return 1 << (self._value[base] & 0x1F) + 1

    def base(self, base: str) -> Spa:
        """Byte address of the first entry."""
        return Spa((self._value[base] >> 10) * PAGE)

    # -- hardware side --

    def command_done(self) -> None:
        """Advance cqh by one entry."""
        self._value["cqh"] = (self.cqh + 1) % self.entries("cqb")

    def command_error(self, bit: str) -> None:
        """Stop the command queue with "cqmf", "cmd_to" or "cmd_ill"; cqh stays."""
        self._value["cqcsr"] |= int({"cqmf": QueueCsr.MF, "cmd_to": QueueCsr.CMD_TO, "cmd_ill": QueueCsr.CMD_ILL}[bit])
        self._update_interrupts()

    def fence_signalled(self) -> None:
        """An IOFENCE.C with WSI is complete: fence_w_ip. [RVIOMMU1.0 6.15]"""
        self._value["cqcsr"] |= int(QueueCsr.FENCE_W_IP)
        self._update_interrupts()

    def fault_recorded(self) -> None:
        """Advance fqt by one entry that is in memory."""
        self._value["fqt"] = (self.fqt + 1) % self.entries("fqb")
        if self._value["fqcsr"] & QueueCsr.IE:
            self._raise(Ipsr.FIP)

    def fault_queue_error(self, bit: str) -> None:
        """Stop the fault queue with "fqof" or "fqmf"."""
        self._value["fqcsr"] |= int({"fqof": QueueCsr.OF, "fqmf": QueueCsr.MF}[bit])
        self._update_interrupts()

    def page_request_recorded(self) -> None:
        """Advance pqt by one entry that is in memory."""
        self._value["pqt"] = (self.pqt + 1) % self.entries("pqb")
        if self._value["pqcsr"] & QueueCsr.IE:
            self._raise(Ipsr.PIP)

    def page_queue_error(self, bit: str) -> None:
        """Stop the page-request queue with "pqof" or "pqmf"."""
        self._value["pqcsr"] |= int({"pqof": QueueCsr.OF, "pqmf": QueueCsr.MF}[bit])
        self._update_interrupts()

    def debug_done(self, response: int) -> None:
        """Let tr_response be this, and Go/Busy 0."""
        self._value["tr_response"] = response
        self._value["tr_req_ctl"] &= ~1

    def count(self, events: list[tuple[Event, EventIds]]) -> None:
        """Count each of these events where iohpmevt selects it. [RVIOMMU1.0 6.23]"""
        for n in self.counted(events):
            self.advance(n)

    def counted(self, events: list[tuple[Event, EventIds]]) -> list[int]:
        """Return the numbers of the event counters that would count now, one for each event."""
        selectors = {n: EventSelector.from_value(self._value[f"iohpmevt{n}"]) for n in range(1, self.counters + 1)
                     if not self._value["iocountinh"] >> n & 1}
        return [n for event, ids in events for n, selector in selectors.items() if selector.takes(event, ids)]

    def advance(self, number: int) -> None:
        """Let event counter ``number`` count once. [RVIOMMU1.0 6.22]"""
        self._advance(f"iohpmctr{number}", 1, self.counter_bits, f"iohpmevt{number}")

    def tick(self, cycles: int) -> None:
        """Let clock cycles pass for iohpmcycles. [RVIOMMU1.0 6.21]"""
        if self.counters and not self._value["iocountinh"] & 1:
            self._advance("iohpmcycles", cycles, min(self.counter_bits, 63), "iohpmcycles")

    def _advance(self, name: str, by: int, bits: int, overflow: str) -> None:
        """Add to the low ``bits`` of a counter, which wraps; OF is bit 63 of ``overflow``, and raises pmip when it becomes 1."""
        mask = (1 << bits) - 1
        value = (self._value[name] & mask) + by
        self._value[name] = self._value[name] & ~mask | value & mask
        if value > mask and not self._value[overflow] >> 63:
            self._value[overflow] |= 1 << 63
            self._raise(Ipsr.PMIP)
        self._update_overflows()

    def _update_overflows(self) -> None:
        """iocountovf shadows the OF bits. [RVIOMMU1.0 6.19]"""
        names = ["iohpmcycles", *(f"iohpmevt{n}" for n in range(1, self.counters + 1))]
        self._value["iocountovf"] = sum((self._value[name] >> 63) << n for n, name in enumerate(names))

    def _update_interrupts(self) -> None:
        """Set what stands for a condition that lasts, also again after software cleared it. [RVIOMMU1.0 6.18]"""
        for csr, conditions, bit in (("cqcsr", CQ_RW1C, Ipsr.CIP), ("fqcsr", FQ_RW1C, Ipsr.FIP), ("pqcsr", PQ_RW1C, Ipsr.PIP)):
            value = self._value.get(csr, 0)
            if value & QueueCsr.IE and value & conditions:
                self._raise(bit)

    def _vector(self, bit: Ipsr) -> int:
        return self._value["icvec"] >> {Ipsr.CIP: 0, Ipsr.FIP: 4, Ipsr.PMIP: 8, Ipsr.PIP: 12}[bit] & 0xF

    def _raise(self, bit: Ipsr) -> None:
        if self._value["ipsr"] & bit:
            return
        self._value["ipsr"] |= int(bit)
        if self.fctl & Fctl.WSI:
            return  # a level: `wires`
        vector = self._vector(bit)
        if self._value[f"msi_vec_ctl_{vector}"] & 1:
            self.pending.add(vector)
        else:
            self._send(vector)

    def _send(self, vector: int) -> None:
        self.messages.append(InterruptMessage(vector, Spa(self._value[f"msi_addr_{vector}"]),
                                              self._value[f"msi_data_{vector}"], self.order))


# --------------------------------------------------------------------------------------------------------------------
# Software


class IommuDriverError(Exception):
    """The IOMMU did not do what software waited for, or says what it cannot mean."""


class CommandQueueStopped(IommuDriverError):
    """The command queue stopped on an error. ``cqcsr`` tells which, ``cqh`` at which entry."""

    def __init__(self, cqcsr: int, cqh: int):
        super().__init__(f"Command queue stopped at entry {cqh}, cqcsr {cqcsr:#x}")
        self.cqcsr, self.cqh = QueueCsr(cqcsr), cqh


class IommuDriver:
    """Software that drives one IOMMU; every method that touches it is a generator over `models.host` operations.

    All that it waits for it waits for ``polls`` times ``poll_cycles`` cycles at most, then raises `IommuDriverError`.
    Indices that the IOMMU reports are checked before they are used.

    Parameters
    ----------
    bar_address : :class:`int`
        Bus address of the register space.
    memory : :class:`Memory`
        Where queues and directory live, at the addresses that the IOMMU uses.
    allocator : :class:`Allocator`
    allowed : :class:`AllowedTranslations` or None
        Is told of tables, commands and completed fences.
    wide : :class:`bool`
        64-bit registers by one 8-byte access; else by two of 4 bytes, high half first.
    polls, poll_cycles : :class:`int`
        Bound of every wait.

    Attributes
    ----------
    directory : :class:`DeviceDirectory`
        After `init`.
    capabilities : :class:`Capabilities`
        After `init`.
    fault_overflows : :class:`int`
        Times that `read_faults` found that records were lost.
    """

    def __init__(self, bar_address: int, memory: Memory, allocator: Allocator, *,
                 allowed: AllowedTranslations | None = None, wide: bool = True, polls: int = 1000,
                 poll_cycles: int = 20):
        self.bar_address, self.memory, self.allocator, self.allowed = bar_address, memory, allocator, allowed
        self.wide, self.polls, self.poll_cycles = wide, polls, poll_cycles
        self.directory: DeviceDirectory | None = None
        self.capabilities: Capabilities | None = None
        self.fault_overflows = 0
        self.cq_base = self.fq_base = Spa(0)
        self.cq_entries = self.fq_entries = 0
        self._cqt = self._cqh = self._fqh = 0
        self._queue_pages: dict[str, tuple[Spa, int]] = {}
        self._fence_token: int | None = None

    def init(self, levels: int = 3, *, cq_log2: int = 6, fq_log2: int = 6, civ: int = 0, fiv: int = 1) -> Software:
        """Bring the IOMMU up: queues on, an empty directory of ``levels`` levels, caches empty.

        The MSI-X table is the host's to write (``enable_msix``). Devices without a context fault from here on.
        """
        value = yield from self.read("capabilities")
        if value & 0xFF != 0x10:
            raise IommuDriverError(f"Version of the IOMMU must be 0x10 (1.0), not {value & 0xFF:#x}")
        try:
            self.capabilities = Capabilities.from_value(value)
        except ValueError as error:
            raise IommuDriverError(f"Capabilities {value:#x} cannot be: {error}") from error
        if self.allowed is not None:
            self.allowed.offered(self.capabilities)
        yield from self.set_ddtp(IommuMode.OFF)
        yield from self.write("icvec", civ | fiv << 4)
        if (yield from self.read("icvec")) & 0xFF != civ | fiv << 4:
            raise IommuDriverError(f"icvec must hold vectors {civ} and {fiv}, and does not")
        yield from self.enable_command_queue(cq_log2)
        yield from self.enable_fault_queue(fq_log2)
        self.directory = DeviceDirectory(self.memory, self.allocator, levels=levels, observer=self.allowed,
                                         extended=self.capabilities.MSI_FLAT, features=self.capabilities.switched_on())
        yield from self.submit([IodirInvalDdt(), IotinvalVma()])
        yield from self.fence()
        yield from self.set_ddtp(IommuMode.BARE + levels, self.directory.root)

    def set_ddtp(self, mode: int, root: Spa = Spa(0)) -> Software:
        """Select a mode and a directory; goes through Off when a directory is in use. [RVIOMMU1.0 6.5]"""
        wanted = IommuMode(mode)
        old = yield from self.read("ddtp")
        if wanted == IommuMode.OFF or old & 0xF > IommuMode.BARE:
            yield from self._write_ddtp(old & ~0x1F)  # the PPN may not change in this write
        if wanted != IommuMode.OFF:
            yield from self._write_ddtp(root // PAGE << 10 | wanted)

    def _write_ddtp(self, value: int) -> Software:
        mode = IommuMode(value & 0xF)
        if self.allowed:
            self.allowed.mode_changed(mode)
        yield from self.write("ddtp", value)
        seen = yield from self.wait("ddtp", lambda ddtp: not ddtp & 1 << 4, "ddtp.busy to clear")
        if seen & 0xF != mode or (mode > IommuMode.BARE and seen != value):
            raise IommuDriverError(f"ddtp must read back as {value:#x}, not {seen:#x}")
        if self.allowed:
            self.allowed.mode_settled()

    def enable_command_queue(self, log2_entries: int = 6) -> Software:
        """Give the IOMMU a new command queue of 2^``log2_entries`` entries and turn it on. [RVIOMMU1.0 6.6, 6.15]"""
        yield from self.disable_queue("cqcsr")
        self.cq_base, self.cq_entries = yield from self._set_base("cqb", log2_entries, COMMAND_BYTES)
        self._cqt = self._cqh = 0
        yield from self.write("cqt", 0)
        yield from self.write("cqcsr", QueueCsr.EN | QueueCsr.IE)
        yield from self.wait("cqcsr", lambda csr: csr & QueueCsr.ON and not csr & QueueCsr.BUSY, "cqon")

    def enable_fault_queue(self, log2_entries: int = 6) -> Software:
        """Give the IOMMU a new fault queue of 2^``log2_entries`` entries and turn it on. [RVIOMMU1.0 6.9, 6.16]"""
        yield from self.disable_queue("fqcsr")
        self.fq_base, self.fq_entries = yield from self._set_base("fqb", log2_entries, RECORD_BYTES)
        self._fqh = 0
        yield from self.write("fqh", 0)
        yield from self.write("fqcsr", QueueCsr.EN | QueueCsr.IE)
        yield from self.wait("fqcsr", lambda csr: csr & QueueCsr.ON and not csr & QueueCsr.BUSY, "fqon")

    def disable_queue(self, csr: str) -> Software:
        """Turn the queue of "cqcsr" or "fqcsr" off, if it is not, and wait until it is."""
        if (yield from self.read(csr)) & (QueueCsr.EN | QueueCsr.ON):
            yield from self.write(csr, 0)
            if self.allowed and csr == "cqcsr":
                self.allowed.commands_aborted()
        yield from self.wait(csr, lambda value: not value & (QueueCsr.ON | QueueCsr.BUSY), f"{csr} to turn off")

    def submit(self, commands: Sequence[Command | bytes]) -> Software:
        """Put commands (or raw entries of 16 bytes) on the queue, waiting for room where there is none."""
        for command in commands:
            raw = command if isinstance(command, bytes) else command.encode()
            if len(raw) != COMMAND_BYTES:
                raise ValueError(f"A command must be {COMMAND_BYTES} bytes long, not {len(raw)!r}")
            after = (self._cqt + 1) % self.cq_entries
            if after == self._cqh:
                yield from self.write("cqt", self._cqt)
                yield from self._wait_head(lambda head, full=after: head != full, "room in the command queue")
            self.memory.write(Spa(self.cq_base + self._cqt * COMMAND_BYTES), raw)
            self._cqt = after
            if self.allowed and not isinstance(command, bytes):
                self._fence_token = self.allowed.submitted(command)
        yield from self.write("cqt", self._cqt)

    def fence(self, *, pr: bool = True, pw: bool = True) -> Software:
        """Submit IOFENCE.C and wait until cqh has passed it: all earlier commands are complete."""
        yield from self.submit([IofenceC(pr=pr, pw=pw)])
        token = self._fence_token
        yield from self._wait_head(lambda head: head == self._cqt, "IOFENCE.C to complete")
        if self.allowed:
            self.allowed.fence_completed(token)

    def invalidate(self, *, iova: Iova | None = None, pscid: int | None = None) -> Software:
        """IOTINVAL.VMA for one page, one address space, or all, then a fence."""
        yield from self.submit([IotinvalVma(address=iova, pscid=pscid)])
        yield from self.fence()

    def invalidate_context(self, device_id: int | None, *, pscid: int | None = None) -> Software:
        """After a change of a device context (None: of any): IODIR.INVAL_DDT, IOTINVAL.VMA, fence. [RVIOMMU1.0 7.3]"""
        yield from self.submit([IodirInvalDdt(device_id=device_id), IotinvalVma(pscid=pscid)])
        yield from self.fence()

    def replace_stopped_command(self, command: Command | None = None) -> Software:
        """Overwrite the command on which the queue stopped, clear the errors, and let it go on there.

        Without ``command`` it becomes an IOFENCE.C that does nothing else.
        """
        csr = yield from self.read("cqcsr")
        head = yield from self._read_head()
        raw = (command or IofenceC()).encode()
        self.memory.write(Spa(self.cq_base + head * COMMAND_BYTES), raw)
        yield from self.write("cqcsr", csr & (QueueCsr.EN | QueueCsr.IE) | CQ_RW1C)

    def read_faults(self) -> Software:
        """Return the records that wait in the fault queue, oldest first, and give their entries back.

        Clears ipsr.fip first, so that a record that comes later raises it again; clears overflow and memory fault.
        """
        yield from self.write("ipsr", Ipsr.FIP)
        tail = yield from self.read("fqt")
        if tail >= self.fq_entries:
            raise IommuDriverError(f"fqt must be below {self.fq_entries}, not {tail}")
        found = []
        while self._fqh != tail:
            found.append(FaultRecord.unpack(self.memory.read(Spa(self.fq_base + self._fqh * RECORD_BYTES),
                                                             RECORD_BYTES)))
            self._fqh = (self._fqh + 1) % self.fq_entries
        yield from self.write("fqh", self._fqh)
        csr = yield from self.read("fqcsr")
        if csr & FQ_RW1C:
            self.fault_overflows += 1
            yield from self.write("fqcsr", csr & (QueueCsr.EN | QueueCsr.IE | FQ_RW1C))
        return found

    # -- register access --

    def read(self, name: str) -> Software:
        """Read a register by name."""
        register = _BY_NAME[name]
        at = self.bar_address + register.offset
        if register.width == 32 or self.wide:
            return (yield MemoryRead(at, register.width // 8))
        low = yield MemoryRead(at, 4)
        return low | (yield MemoryRead(at + 4, 4)) << 32

    def write(self, name: str, value: int) -> Software:
        """Write a register by name."""
        register = _BY_NAME[name]
        at, value = self.bar_address + register.offset, int(value)
        if register.width == 32 or self.wide:
            yield MemoryWrite(at, register.width // 8, value)
        else:
            yield MemoryWrite(at + 4, 4, value >> 32)
            yield MemoryWrite(at, 4, value & 0xFFFF_FFFF)

    def wait(self, name: str, is_so: Callable[[int], object], what: str) -> Software:
        """Read a register until ``is_so(value)``, and return it; `IommuDriverError` when that never comes."""
        for _ in range(self.polls):
            value = yield from self.read(name)
            if is_so(value):
                return value
            yield Delay(self.poll_cycles)
        raise IommuDriverError(f"Waited {self.polls} times {self.poll_cycles} cycles for {what}; {name} is {value:#x}")

    def _set_base(self, name: str, log2_entries: int, entry_bytes: int) -> Software:
        if not 1 <= log2_entries <= 16:
            raise ValueError(f"Queue must have 2^1 to 2^16 entries, not 2^{log2_entries!r}")
        if name in self._queue_pages:
            self.allocator.free(*self._queue_pages.pop(name))
        count = -(-(entry_bytes << log2_entries) // PAGE)
        base = self.allocator.pages(count)
        self._queue_pages[name] = base, count
        value = base // PAGE << 10 | log2_entries - 1
        yield from self.write(name, value)
        seen = yield from self.read(name)
        if seen != value:  # WARL: a smaller queue may be all there is
            log2_entries = (seen & 0x1F) + 1
            if seen >> 10 != value >> 10 or seen & 0x1F > value & 0x1F:
                raise IommuDriverError(f"{name} must read back as {value:#x} or with a smaller size, not {seen:#x}")
        return base, 1 << log2_entries

    def _read_head(self) -> Software:
        head = yield from self.read("cqh")
        if head >= self.cq_entries:
            raise IommuDriverError(f"cqh must be below {self.cq_entries}, not {head}")
        self._cqh = head
        return head

    def _wait_head(self, is_so: Callable[[int], object], what: str) -> Software:
        for _ in range(self.polls):
            head = yield from self._read_head()
            if is_so(head):
                return
            csr = yield from self.read("cqcsr")
            if csr & CQ_ERRORS:
                if self.allowed:
                    self.allowed.commands_aborted()
                raise CommandQueueStopped(csr, head)
            yield Delay(self.poll_cycles)
        raise IommuDriverError(f"Waited {self.polls} times {self.poll_cycles} cycles for {what}; cqh is {head}")
