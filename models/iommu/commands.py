"""Commands of the command queue: to and from 16 bytes, which are illegal, and the queue itself. [RVIOMMU1.0 4.1]"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from ..memory import AccessFault, Iova, Spa

if TYPE_CHECKING:
    from .registers import Capabilities, IommuMode, RegisterFile
    from .tables import Memory

__all__ = [
    "COMMAND_BYTES", "COMMAND_DEFECTS", "AtsInval", "AtsMessage", "AtsPrgr", "Command", "CommandQueue", "IllegalCommand", "IodirInvalDdt",
    "IodirInvalPdt", "IofenceC", "IotinvalGvma", "IotinvalVma", "MessageCode", "command_defects", "decode", "wide_id",
]  # fmt: skip

COMMAND_BYTES = 16
IOTINVAL, IOFENCE, IODIR, ATS = 1, 2, 3, 4  # [RVIOMMU1.0 4.1] opcodes

class IllegalCommand(Exception):
    """A command that hardware must refuse with cqcsr.cmd_ill: reserved, or not offered by capabilities."""


@dataclass(frozen=True)
class IotinvalVma:
    """IOTINVAL.VMA: forget first-stage translations. [RVIOMMU1.0 4.1.1]

    None stands for an operand that is not valid (AV, PSCV or GV = 0). ``address`` is a page address; with
    ``is_range`` (S) its low page-number bits code a naturally aligned range.
    """

    address: Iova | None = None
    pscid: int | None = None
    gscid: int | None = None
    non_leaf: bool = False
    is_range: bool = False

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        return _encode_iotinval(self, func3=0, pscid=self.pscid)


@dataclass(frozen=True)
class IotinvalGvma:
    """IOTINVAL.GVMA: forget second-stage translations; operands as in `IotinvalVma`. [RVIOMMU1.0 4.1.1]"""

    address: Iova | None = None
    gscid: int | None = None
    non_leaf: bool = False
    is_range: bool = False

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        return _encode_iotinval(self, func3=1, pscid=None)


@dataclass(frozen=True)
class IofenceC:
    """IOFENCE.C: done when everything before it is. [RVIOMMU1.0 4.1.2]

    With ``address`` (a multiple of 4) the 32-bit ``data`` is written there at the end.
    """

    pr: bool = False
    pw: bool = False
    wsi: bool = False
    address: Spa | None = None
    data: int = 0

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        _check("Address of IOFENCE.C", self.address or 0, 64, multiple=4)
        _check("Data of IOFENCE.C", self.data, 32)
        av = self.address is not None
        low = IOFENCE | av << 10 | self.wsi << 11 | self.pr << 12 | self.pw << 13 | self.data << 32
        return _bytes(low, (self.address or 0) >> 2)


@dataclass(frozen=True)
class IodirInvalDdt:
    """IODIR.INVAL_DDT: forget the context of one device, or (None) all directory entries. [RVIOMMU1.0 4.1.3]"""

    device_id: int | None = None

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        _check("Device id", self.device_id or 0, 24)
        return _bytes(IODIR | (self.device_id is not None) << 33 | (self.device_id or 0) << 40, 0)


@dataclass(frozen=True)
class IodirInvalPdt:
    """IODIR.INVAL_PDT: forget the context of one process of one device. [RVIOMMU1.0 4.1.3]"""

    device_id: int
    process_id: int

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        _check("Device id", self.device_id, 24)
        _check("Process id", self.process_id, 20)
        return _bytes(IODIR | 1 << 7 | self.process_id << 12 | 1 << 33 | self.device_id << 40, 0)


@dataclass(frozen=True)
class AtsInval:
    """ATS.INVAL: have a function forget translations it cached. [RVIOMMU1.0 4.1.4]

    ``address`` is a page address; with ``is_range`` (S) its low page-number bits code a naturally aligned range.
    ``is_global`` (G) is for all processes. None stands for no PASID and no segment.
    """

    rid: int
    address: int = 0
    is_range: bool = False
    is_global: bool = False
    pid: int | None = None
    segment: int | None = None

    @property
    def payload(self) -> int:
        """The message's body."""
        _check("Address", self.address, 64, multiple=4096)
        return self.is_global | self.is_range << 11 | self.address

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        return _encode_ats(self, 0)


@dataclass(frozen=True)
class AtsPrgr:
    """ATS.PRGR: answer a group of page requests. [RVIOMMU1.0 4.1.4]

    ``code`` is the response code of PCI Express: 0 success, 1 invalid request, 15 failure.
    """

    rid: int
    group: int
    code: int = 0
    pid: int | None = None
    segment: int | None = None

    @property
    def payload(self) -> int:
        """The message's body; the destination's id, which the message repeats, is filled in by hardware."""
        _check("Page request group index", self.group, 9)
        _check("Response code", self.code, 4)
        return self.group << 32 | self.code << 44

    def encode(self) -> bytes:
        """Return the 16 bytes."""
        return _encode_ats(self, 1)


Command = IotinvalVma | IotinvalGvma | IofenceC | IodirInvalDdt | IodirInvalPdt | AtsInval | AtsPrgr


class MessageCode(IntEnum):
    """Codes of the PCI Express messages that an IOMMU sends and receives."""

    INVALIDATION_REQUEST = 1
    INVALIDATION_COMPLETION = 2
    PAGE_REQUEST = 4
    PAGE_REQUEST_GROUP_RESPONSE = 5


@dataclass(frozen=True)
class AtsMessage:
    """A message that the IOMMU sends to a function; ``itag`` is that of an invalidation request."""

    code: MessageCode
    rid: int
    payload: int
    pid: int | None = None
    segment: int | None = None
    itag: int | None = None


def decode(raw: bytes, capabilities: Capabilities, *, wsi: bool = False, order: str = "little") -> Command:
    """Read a command; ``wsi`` is fctl.WSI, ``order`` "big" when fctl.BE is 1.

    Raises
    ------
    :exc:`IllegalCommand`
        When hardware with these capabilities must refuse it. Device and process ids that are too wide are not
        refused here, see `wide_id`. Bits of a payload that a message has no use for are passed over.
    """
    if len(raw) != COMMAND_BYTES:
        raise ValueError(f"A command must be {COMMAND_BYTES} bytes long, not {len(raw)!r}")
    command = int.from_bytes(_turned(raw, order), "little")
    opcode, func3 = command & 0x7F, command >> 7 & 7
    if opcode == IOTINVAL and func3 in (0, 1):
        return _decode_iotinval(command, capabilities, is_gvma=func3 == 1)
    if opcode == IOFENCE and func3 == 0:
        _refuse_reserved(command, (14, 31), (126, 127), *([] if wsi else [(11, 11)]))
        address = Spa((command >> 64 & (1 << 62) - 1) << 2) if _bit(command, 10) else None
        return IofenceC(pr=_bit(command, 12), pw=_bit(command, 13), wsi=_bit(command, 11), address=address,
                        data=command >> 32 & 0xFFFF_FFFF if address is not None else 0)
    if opcode == IODIR and func3 in (0, 1):
        _refuse_reserved(command, (10, 11), (32, 32), (34, 39), (64, 127))
        process_id, dv, device_id = command >> 12 & 0xFFFFF, _bit(command, 33), command >> 40 & 0xFFFFFF
        if func3 == 0:
            if process_id:
                raise IllegalCommand(f"PID of IODIR.INVAL_DDT must be 0, not {process_id:#x}")
            return IodirInvalDdt(device_id if dv else None)
        if not dv:
            raise IllegalCommand("DV of IODIR.INVAL_PDT must be 1, not 0")
        return IodirInvalPdt(device_id, process_id)
    if opcode == ATS and func3 in (0, 1) and capabilities.ATS:
        return _decode_ats(command, is_prgr=func3 == 1)
    raise IllegalCommand(f"Opcode {opcode} with func3 {func3} is reserved or not offered")


def wide_id(command: Command, capabilities: Capabilities, mode: IommuMode) -> str | None:
    """Say which id is wider than ``mode`` or the capabilities support, or return None. [RVIOMMU1.0 4.1.3]

    Software must not submit such a command; that hardware refuses it is usual but not spelled out, and outside the
    directory modes no width is. INVAL_PDT without any PDx capability is in the same position.
    """
    if isinstance(command, IodirInvalPdt):
        width = 20 if capabilities.PD20 else 17 if capabilities.PD17 else 8 if capabilities.PD8 else 0
        if not width:
            return "INVAL_PDT without process directories"
        if command.process_id >> width:
            return f"PID wider than {width} bits"
    if isinstance(command, IodirInvalDdt | IodirInvalPdt) and mode.levels:
        widths = (6, 15, 24) if capabilities.MSI_FLAT else (7, 16, 24)
        if (command.device_id or 0) >> widths[mode.levels - 1]:
            return f"DID wider than {widths[mode.levels - 1]} bits"
    return None


def _decode_iotinval(command: int, capabilities: Capabilities, *, is_gvma: bool) -> Command:
    _refuse_reserved(command, (11, 11), (35, 43), (60, 72), (126, 127),
                     *([] if capabilities.NL else [(34, 34)]), *([] if capabilities.S else [(73, 73)]))
    address = Iova((command >> 74 & (1 << 52) - 1) << 12) if _bit(command, 10) else None
    gscid = command >> 44 & 0xFFFF if _bit(command, 33) else None
    non_leaf, is_range = _bit(command, 34), _bit(command, 73)
    if is_gvma:
        if _bit(command, 32):
            raise IllegalCommand("PSCV of IOTINVAL.GVMA must be 0, not 1")
        return IotinvalGvma(address, gscid, non_leaf, is_range)
    return IotinvalVma(address, command >> 12 & 0xFFFFF if _bit(command, 32) else None, gscid, non_leaf, is_range)


def _decode_ats(command: int, *, is_prgr: bool) -> Command:
    _refuse_reserved(command, (10, 11), (34, 39))
    pid = command >> 12 & 0xFFFFF if _bit(command, 32) else None
    rid, segment = command >> 40 & 0xFFFF, command >> 56 & 0xFF if _bit(command, 33) else None
    if is_prgr:
        return AtsPrgr(rid, command >> 96 & 0x1FF, command >> 108 & 0xF, pid, segment)
    return AtsInval(rid, Iova(command >> 76 << 12), _bit(command, 75), _bit(command, 64), pid, segment)


def _encode_ats(command: AtsInval | AtsPrgr, func3: int) -> bytes:
    _check("Requester id", command.rid, 16)
    _check("Process id", command.pid or 0, 20)
    _check("Segment", command.segment or 0, 8)
    low = (ATS | func3 << 7 | (command.pid or 0) << 12 | (command.pid is not None) << 32 | (command.segment is not None) << 33
           | command.rid << 40 | (command.segment or 0) << 56)
    return _bytes(low, command.payload)


def _turned(raw: bytes, order: str) -> bytes:
    """Turn both doublewords around, when their order is "big"."""
    return raw if order == "little" else raw[7::-1] + raw[:7:-1]


def _encode_iotinval(command: IotinvalVma | IotinvalGvma, *, func3: int, pscid: int | None) -> bytes:
    address, gscid = command.address, command.gscid
    _check("Address", address or 0, 64, multiple=4096)
    _check("PSCID", pscid or 0, 20)
    _check("GSCID", gscid or 0, 16)
    low = (IOTINVAL | func3 << 7 | (address is not None) << 10 | (pscid or 0) << 12 | (pscid is not None) << 32
           | (gscid is not None) << 33 | command.non_leaf << 34 | (gscid or 0) << 44)
    return _bytes(low, command.is_range << 9 | (address or 0) >> 12 << 10)


def _bytes(low: int, high: int) -> bytes:
    return (high << 64 | low).to_bytes(COMMAND_BYTES, "little")


def _bit(command: int, at: int) -> bool:
    return bool(command >> at & 1)


def _refuse_reserved(command: int, *ranges: tuple[int, int]) -> None:
    """Raise when a bit of one of the ``ranges`` (first, last) is set."""
    for first, last in ranges:
        if command >> first & (1 << last - first + 1) - 1:
            raise IllegalCommand(f"Bits {last}:{first} of command {command:#034x} are reserved")


def _check(name: str, value: int, width: int, *, multiple: int = 1) -> None:
    if not 0 <= value < 1 << width or value % multiple:
        raise ValueError(f"{name} must be an unsigned multiple of {multiple} of {width} bits, not {value!r}")


def command_defects(features: Collection[str] = frozenset()) -> dict[str, bytes]:
    """Return raw commands that hardware must refuse, which has these capabilities (`Capabilities.switched_on`) and fctl.WSI = 0."""
    def with_bit(command: Command, bit: int) -> bytes:
        return (int.from_bytes(command.encode(), "little") | 1 << bit).to_bytes(COMMAND_BYTES, "little")

    found, has_ats = {}, "ATS" in features
    for opcode in (0, *range(5 if has_ats else 4, 128)):
        found[f"OPCODE_{opcode}"] = _bytes(opcode, 0)
    groups = [("IOTINVAL", IOTINVAL, 2), ("IOFENCE", IOFENCE, 1), ("IODIR", IODIR, 2)] + [("ATS", ATS, 2)] * has_ats
    for name, opcode, first in groups:
        for func3 in range(first, 8):
            found[f"{name}_FUNC3_{func3}"] = _bytes(opcode | func3 << 7 | 1 << 33, 0)
    for name, command in (("IOTINVAL_VMA", IotinvalVma()), ("IOTINVAL_GVMA", IotinvalGvma())):
        for bit in (11, *range(34, 44), *range(60, 74), 126, 127):
            if not (bit == 34 and "NL" in features) and not (bit == 73 and "S" in features):
                found[f"{name}_RESERVED_{bit}"] = with_bit(command, bit)
    found["IOTINVAL_GVMA_PSCV"] = with_bit(IotinvalGvma(), 32)
    for bit in (*range(14, 32), 126, 127):
        found[f"IOFENCE_RESERVED_{bit}"] = with_bit(IofenceC(), bit)
    found["IOFENCE_WSI"] = with_bit(IofenceC(), 11)
    for name, command in (("IODIR_INVAL_DDT", IodirInvalDdt()), ("IODIR_INVAL_PDT", IodirInvalPdt(0, 0))):
        for bit in (10, 11, 32, *range(34, 40), *range(64, 128)):
            found[f"{name}_RESERVED_{bit}"] = with_bit(command, bit)
    for bit in range(12, 32):
        found[f"IODIR_INVAL_DDT_PID_{bit}"] = with_bit(IodirInvalDdt(), bit)
    found["IODIR_INVAL_PDT_WITHOUT_DV"] = _bytes(IODIR | 1 << 7, 0)
    for name, command in (("ATS_INVAL", AtsInval(0)), ("ATS_PRGR", AtsPrgr(0, 0))) if has_ats else ():
        for bit in (10, 11, *range(34, 40)):
            found[f"{name}_RESERVED_{bit}"] = with_bit(command, bit)
    return found


COMMAND_DEFECTS = command_defects()  # [RVIOMMU1.0 4.1]


@dataclass
class _Invalidation:
    """An invalidation request that a function has not completed."""

    rid: int
    segment: int | None
    completions: int = 0


class CommandQueue:
    """Golden behaviour of the command queue, one command per call. [RVIOMMU1.0 4.1, 6.15]

    ATS.INVAL does not wait for its completion; IOFENCE.C does, and so does an ATS.INVAL for which no ITag is free.

    Parameters
    ----------
    registers : :class:`RegisterFile`
        Holds cqb, cqh, cqt, cqcsr and the mode.
    memory : :class:`Memory`
        Where the queue is, and where IOFENCE.C writes.
    refuses_wide_ids : :class:`bool`
        Whether this hardware refuses what `wide_id` names.
    itags : :class:`int`
        Invalidation requests that may be under way, 1 to 32.

    Attributes
    ----------
    sent : list of :class:`AtsMessage`
        Messages to functions, oldest first; whoever sends them takes them out.
    """

    def __init__(self, registers: RegisterFile, memory: Memory, *, refuses_wide_ids: bool = True, itags: int = 32):
        if not 1 <= itags <= 32:
            raise ValueError(f"ITags must be 1 to 32, not {itags!r}")
        self.registers, self.memory, self.refuses_wide_ids, self.itags = registers, memory, refuses_wide_ids, itags
        self.sent: list[AtsMessage] = []
        self._under_way: dict[int, _Invalidation] = {}  # by ITag
        self._has_timed_out = False

    def step(self) -> Command | None:
        """Process one command and return it; None when the queue is off, stopped or empty, stops at this one, or it waits."""
        # A stopped queue keeps cqh at the command that stopped it; it is fetched anew when software clears the bit.
        registers = self.registers
        if not registers.cq_runs or registers.cqh == registers.cqt:
            return None
        try:
            raw = self.memory.read(Spa(registers.base("cqb") + registers.cqh * COMMAND_BYTES), COMMAND_BYTES)
            command = decode(raw, registers.capabilities, wsi=bool(registers.fctl >> 1 & 1), order=registers.order)
            if self.refuses_wide_ids and (reason := wide_id(command, registers.capabilities, registers.mode)):
                raise IllegalCommand(reason)
            if not self._execute(command):
                return None
        except AccessFault:
            registers.command_error("cqmf")
            return None
        except IllegalCommand:
            registers.command_error("cmd_ill")
            return None
        registers.command_done()
        return command

    def _execute(self, command: Command) -> bool:
        """Do what a command does beside caches; False when it waits or has stopped the queue."""
        registers = self.registers
        match command:
            case IofenceC():
                if self._under_way:
                    return False
                if self._has_timed_out:  # [RVIOMMU1.0 4.1.2] told here and once
                    self._has_timed_out = False
                    registers.command_error("cmd_to")
                    return False
                if command.address is not None:
                    if command.address >> registers.capabilities.PAS:
                        raise AccessFault(command.address, 4, True, "beyond PAS")
                    self.memory.write(command.address, command.data.to_bytes(4, "big" if registers.order == "big" else "little"))
                if command.wsi:
                    registers.fence_signalled()
            case AtsInval():
                itag = next((n for n in range(self.itags) if n not in self._under_way), None)
                if itag is None:
                    return False
                self._under_way[itag] = _Invalidation(command.rid, command.segment)
                self.sent.append(AtsMessage(MessageCode.INVALIDATION_REQUEST, command.rid, command.payload, command.pid,
                                            command.segment, itag))
            case AtsPrgr():
                self.sent.append(AtsMessage(MessageCode.PAGE_REQUEST_GROUP_RESPONSE, command.rid, command.payload | command.rid << 48,
                                            command.pid, command.segment))
        return True

    def invalidation_completed(self, rid: int, itag_vector: int, count: int, *, segment: int | None = None) -> bool:
        """An invalidation completion came from a function: for these ITags, as one of ``count`` (0: of 8) for each.

        False when it was not expected: it changes nothing.
        """
        itags = [n for n in range(32) if itag_vector >> n & 1]
        waiting = [self._under_way.get(itag) for itag in itags]
        if not itags or any(one is None or one.rid != rid or (one.segment is not None and one.segment != segment) for one in waiting):
            return False
        for itag in itags:
            one = self._under_way[itag]
            one.completions += 1
            if one.completions % 8 == count:
                del self._under_way[itag]
        return True

    def invalidations_timed_out(self) -> None:
        """What has not been completed will not be; the next IOFENCE.C says so."""
        self._has_timed_out = self._has_timed_out or bool(self._under_way)
        self._under_way.clear()
