"""Transaction layer packets to and from dwords. [PCIe5 2.2]

A TLP is a list of dwords as the raw link carries it: a header dword is the 32-bit number as the specification draws it
(byte 0 in bits 31:24), a payload dword has its lowest address in bits 7:0.

`encode` writes whatever it is given, also what a receiver must refuse, as long as each value fits its field; `decode`
refuses what is malformed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NamedTuple

__all__ = ["PAGE", "TRANSLATED", "TRANSLATION_REQUEST", "UNTRANSLATED", "CplStatus", "MalformedTlp", "Pasid", "Tlp", "TlpType", "decode",
           "encode", "memory_read", "memory_write", "stray_bits"]  # fmt: skip

UNTRANSLATED, TRANSLATION_REQUEST, TRANSLATED = 0, 1, 2  # address types [PCIe5 10.2.1]
PAGE = 4096  # a request never crosses a naturally aligned block of this many bytes [PCIe5 2.2.7]
MAX_DW = 1024  # dwords of one TLP's payload or request [PCIe5 2.2.2]

_4DW, _DATA, _PREFIX = 1, 2, 4  # bits of Fmt [PCIe5 2.2.1]


class TlpType(Enum):
    """Kinds of TLP; the values are (bits 4:0 of Type, carries data). Messages have their routing in Type bits 2:0. [PCIe5 2.2.1]"""

    MRD = 0b00000, False
    MRDLK = 0b00001, False
    MWR = 0b00000, True
    IORD = 0b00010, False
    IOWR = 0b00010, True
    CFGRD0 = 0b00100, False
    CFGWR0 = 0b00100, True
    CFGRD1 = 0b00101, False
    CFGWR1 = 0b00101, True
    MSG = 0b10000, False
    MSGD = 0b10000, True
    CPL = 0b01010, False
    CPLD = 0b01010, True
    CPLLK = 0b01011, False
    CPLDLK = 0b01011, True
    FETCHADD = 0b01100, True
    SWAP = 0b01101, True
    CAS = 0b01110, True

    @property
    def has_data(self) -> bool:
        """The TLP carries a payload."""
        return self.value[1]

    @property
    def is_completion(self) -> bool:
        """The TLP answers a non-posted request."""
        return self in _COMPLETIONS

    @property
    def is_posted(self) -> bool:
        """The TLP is a request without an answer."""
        return self in _POSTED


_COMPLETIONS = frozenset({TlpType.CPL, TlpType.CPLD, TlpType.CPLLK, TlpType.CPLDLK})
_POSTED = frozenset({TlpType.MWR, TlpType.MSG, TlpType.MSGD})


class CplStatus(IntEnum):
    """Completion Status. [PCIe5 2.2.9]"""

    SC = 0
    UR = 1
    CRS = 2
    CA = 4


class Pasid(NamedTuple):
    """What a PASID TLP prefix says. [PCIe5 6.20.2]"""

    value: int
    execute: bool = False
    privileged: bool = False


class MalformedTlp(Exception):
    """Dwords that a receiver must treat as a Malformed TLP: discarded, never answered.

    Attributes
    ----------
    reason : :class:`str`
        The broken rule.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Tlp:
    """One TLP; a field that its type does not have is 0.

    Attributes
    ----------
    length_dw : :class:`int`
        1 to 1024; 0 for TLPs whose Length is reserved.
    address : :class:`int`
        Memory and I/O: byte address with bits 1:0 = 0. Messages: header bytes 8 to 15 as one number.
    at : :class:`int`
        Address type: 0 untranslated, 1 translation request, 2 translated. [PCIe5 10.2.1]
    no_write : :class:`bool`
        NW of a translation request, bit 0 of the address in the header. [PCIe5 10.2.2]
    completer_id : :class:`int`
        Of completions; the destination of configuration requests.
    status : :class:`CplStatus` or :class:`int`
        An int where the value is reserved; a receiver takes those for UR.
    byte_count : :class:`int`
        1 to 4096.
    register : :class:`int`
        Configuration: byte offset 0 to 4092, bits 1:0 = 0.
    data : :class:`bytes`
        Payload as memory has it, a multiple of 4 bytes.
    digest : :class:`int`
        The dword behind the payload when ``td`` says that there is one; its value is not checked.
    """

    type: TlpType
    tc: int = 0
    relaxed_ordering: bool = False
    no_snoop: bool = False
    ido: bool = False
    at: int = 0
    poisoned: bool = False
    td: bool = False
    length_dw: int = 0
    requester_id: int = 0
    tag: int = 0
    first_be: int = 0
    last_be: int = 0
    address: int = 0
    no_write: bool = False
    completer_id: int = 0
    status: CplStatus | int = CplStatus.SC
    bcm: bool = False
    byte_count: int = 0
    lower_address: int = 0
    register: int = 0
    message_code: int = 0
    message_routing: int = 0
    pasid: Pasid | None = None
    data: bytes = b""
    digest: int = 0

    @property
    def has_gaps(self) -> bool:
        """The byte enables of a request leave out bytes between the first and the last enabled one."""
        if self.length_dw == 1:
            return self.first_be in _GAPPY
        return self.first_be not in _RUNS_UP or self.last_be not in _RUNS_DOWN

    def byte_span(self) -> tuple[int, int]:
        """Return (address, length) from the first to the last enabled byte of a request; length 0 when none is enabled."""
        base = self.register if self.type in _CONFIGURATION else self.address
        first, last = self.first_be, self.last_be if self.length_dw > 1 else self.first_be
        if not first and not last:
            return base, 0
        if not first or not last:  # malformed for more than one dword, but has an answer
            enabled = list(self._enabled())
            return base + enabled[0], enabled[-1] - enabled[0] + 1
        start = base + _LOWEST[first]
        return start, base + 4 * (self.length_dw - 1) + last.bit_length() - start

    def enabled_bytes(self) -> Iterator[tuple[int, int]]:
        """Yield (address, byte) of each byte that a write request writes, by address."""
        base = self.register if self.type in _CONFIGURATION else self.address
        for n in self._enabled():
            yield base + n, self.data[n]

    def _enabled(self) -> Iterator[int]:
        """Yield the index of each enabled byte within the payload."""
        end = 4 * (self.length_dw - 1)
        for n in range(4 * self.length_dw):
            enables = self.first_be if n < 4 else self.last_be if n >= end else 15
            if enables >> n % 4 & 1:
                yield n

    def __str__(self) -> str:
        text = f"{self.type.name} {_id_text(self.requester_id)} tag {self.tag}"
        if self.type.is_completion:
            status = self.status.name if isinstance(self.status, CplStatus) else f"status {self.status}"
            text += f" {status} byte count {self.byte_count} lower address {self.lower_address:#x}"
        elif self.type in _CONFIGURATION:
            text += f" to {_id_text(self.completer_id)} register {self.register:#x} enables {self.first_be:04b}"
        elif self.type in _MESSAGES:
            text += f" code {self.message_code:#x} routing {self.message_routing}"
        else:
            start, length = self.byte_span()
            text += f" {start:#x}+{length}"
        marks = [name for name in ("poisoned", "relaxed_ordering", "no_snoop", "ido", "td", "no_write") if getattr(self, name)]
        marks += [f"{name}={getattr(self, name)}" for name in ("tc", "at", "pasid") if getattr(self, name)]
        return " ".join([text, *marks])


_MESSAGES = frozenset({TlpType.MSG, TlpType.MSGD})
_CONFIGURATION = frozenset({TlpType.CFGRD0, TlpType.CFGWR0, TlpType.CFGRD1, TlpType.CFGWR1})
_IO = frozenset({TlpType.IORD, TlpType.IOWR})
_ATOMIC_SIZES = {TlpType.FETCHADD: (1, 2), TlpType.SWAP: (1, 2), TlpType.CAS: (2, 4, 8)}  # payload dwords [PCIe5 2.2.7]

_RUNS_UP = frozenset({0b1111, 0b1110, 0b1100, 0b1000})  # enables of a first dword that others follow
_RUNS_DOWN = frozenset({0b1111, 0b0111, 0b0011, 0b0001})  # enables of a last dword
_GAPPY = frozenset({0b0101, 0b1001, 0b1010, 0b1011, 0b1101})
_LOWEST = [(enables & -enables).bit_length() - 1 for enables in range(16)]
_STATUS: list[CplStatus | int] = [CplStatus(n) if n in (0, 1, 2, 4) else n for n in range(8)]
_PASID_PREFIX = 0b100_10001  # Fmt and Type of the PASID TLP prefix [PCIe5 6.20.2]

# What a header holds after its first dword, per Fmt and Type.
_MEMORY_LIKE, _IO_LIKE, _CONFIG_LIKE, _MESSAGE_LIKE, _COMPLETION_LIKE = range(5)


def _forms() -> tuple[list[tuple[TlpType, int] | None], dict[TlpType, tuple[int, int]]]:
    """Return the form of each (Fmt, Type) byte, None where reserved, and (Fmt and Type in place, form) of each type."""
    by_byte: list[tuple[TlpType, int] | None] = [None] * 256
    by_type = {}
    for kind in TlpType:
        code, has_data = kind.value
        fmt = _DATA if has_data else 0
        if kind in _MESSAGES:
            by_type[kind] = (fmt | _4DW) << 5 | code, _MESSAGE_LIKE
            for routing in range(8):
                by_byte[(fmt | _4DW) << 5 | code | routing] = kind, _MESSAGE_LIKE
            continue
        form = (_COMPLETION_LIKE if kind in _COMPLETIONS else _CONFIG_LIKE if kind in _CONFIGURATION
                else _IO_LIKE if kind in _IO else _MEMORY_LIKE)  # fmt: skip
        by_type[kind] = fmt << 5 | code, form
        by_byte[fmt << 5 | code] = kind, form
        if form == _MEMORY_LIKE:
            by_byte[(fmt | _4DW) << 5 | code] = kind, form
    return by_byte, by_type


_BY_BYTE, _BY_TYPE = _forms()


def encode(tlp: Tlp) -> list[int]:
    """Return the dwords of ``tlp``: header of 4 dwords for memory addresses from 4 GiB on, else of 3; nothing but widths is checked.

    Raises
    ------
    :exc:`ValueError`
        When a value does not fit its field, or the payload is no multiple of 4 bytes.
    """
    dwords = _header(tlp)
    if tlp.data:
        if len(tlp.data) % 4:
            raise ValueError(f"Payload of a TLP must be a multiple of 4 bytes, not {len(tlp.data)!r}")
        dwords += struct.unpack(f"<{len(tlp.data) // 4}I", tlp.data)
    if tlp.td:
        dwords.append(tlp.digest)
    return dwords


def _header(tlp: Tlp) -> list[int]:
    length, tag, rid = tlp.length_dw, tlp.tag, tlp.requester_id
    fmt_type, form = _BY_TYPE[tlp.type]
    if not 0 <= length <= MAX_DW or tag >> 10 or rid >> 16 or tlp.tc >> 3 or tlp.at >> 2:
        raise _misfit(tlp)
    dw0 = (fmt_type << 24 | (tag & 0x200) << 14 | tlp.tc << 20 | (tag & 0x100) << 11 | tlp.ido << 18 | tlp.td << 15
           | tlp.poisoned << 14 | tlp.relaxed_ordering << 13 | tlp.no_snoop << 12 | tlp.at << 10 | length & 0x3FF)  # fmt: skip
    dw1 = rid << 16 | (tag & 0xFF) << 8
    if form == _COMPLETION_LIKE:
        if tlp.byte_count > 4096 or tlp.byte_count < 0 or tlp.lower_address >> 7 or tlp.completer_id >> 16 or tlp.status >> 3:
            raise _misfit(tlp)
        found = [dw0, tlp.completer_id << 16 | tlp.status << 13 | tlp.bcm << 12 | tlp.byte_count & 0xFFF,
                 dw1 | tlp.lower_address]  # fmt: skip
    elif form == _MESSAGE_LIKE:
        if tlp.message_code >> 8 or tlp.message_routing >> 3 or tlp.address >> 64:
            raise _misfit(tlp)
        found = [dw0 | tlp.message_routing << 24, dw1 | tlp.message_code, tlp.address >> 32, tlp.address & 0xFFFF_FFFF]
    else:
        address = tlp.address
        if tlp.first_be >> 4 or tlp.last_be >> 4 or address & 3:
            raise _misfit(tlp)
        address |= tlp.no_write
        dw1 |= tlp.last_be << 4 | tlp.first_be
        if form == _CONFIG_LIKE:
            if tlp.register >> 12 or tlp.register & 3 or tlp.completer_id >> 16:
                raise _misfit(tlp)
            found = [dw0, dw1, tlp.completer_id << 16 | tlp.register]
        elif not address >> 32:
            found = [dw0, dw1, address]
        elif form == _MEMORY_LIKE and not address >> 64:
            found = [dw0 | _4DW << 29, dw1, address >> 32, address & 0xFFFF_FFFF]
        else:
            raise _misfit(tlp)
    if tlp.pasid is not None:
        value, execute, privileged = tlp.pasid
        if value >> 20:
            raise _misfit(tlp)
        found.insert(0, _PASID_PREFIX << 24 | privileged << 21 | execute << 20 | value)
    return found


def _misfit(tlp: Tlp) -> ValueError:
    return ValueError(f"Each field of a TLP must fit the header, not {tlp!r}")


def decode(dwords: Sequence[int]) -> Tlp:
    """Return the TLP that ``dwords`` are; reserved bits are ignored (see `stray_bits`).

    Raises
    ------
    :exc:`MalformedTlp`
        Reserved Fmt or Type; a length that is not that of the dwords; byte enables against the rules; a request that crosses
        4 KiB; a header of 4 dwords with an address below 4 GiB; a configuration or I/O request of more than one dword; an
        AtomicOp of a size or alignment that does not exist; a prefix that is not understood.
    """
    if not dwords:
        raise MalformedTlp("no dword at all")
    pasid = None
    if dwords[0] >> 31:  # prefixes come first
        if dwords[0] >> 24 != _PASID_PREFIX:
            raise MalformedTlp(f"{dwords[0]:#010x} is no prefix that is supported")
        pasid = Pasid(dwords[0] & 0xFFFFF, bool(dwords[0] >> 20 & 1), bool(dwords[0] >> 21 & 1))
        dwords = dwords[1:]
        if not dwords:
            raise MalformedTlp("nothing behind the prefix")
    dw0 = dwords[0]
    known = _BY_BYTE[dw0 >> 24]
    if known is None:
        raise MalformedTlp(f"Fmt {dw0 >> 29:03b} with Type {dw0 >> 24 & 31:05b} is reserved")
    kind, form = known
    has_data, td = bool(dw0 >> 30 & 1), bool(dw0 >> 15 & 1)
    header = 4 if dw0 >> 29 & 1 else 3
    length = (dw0 & 0x3FF or MAX_DW) if has_data or form < _MESSAGE_LIKE else 0
    end = header + length if has_data else header
    if len(dwords) != end + td:
        raise MalformedTlp(f"{kind.name} of {len(dwords)} dwords, its header says {end + td}")
    dw1, dw2 = dwords[1], dwords[2]
    common: dict[str, Any] = {
        "type": kind,
        "tc": dw0 >> 20 & 7,
        "relaxed_ordering": bool(dw0 >> 13 & 1),
        "no_snoop": bool(dw0 >> 12 & 1),
        "ido": bool(dw0 >> 18 & 1),
        "at": dw0 >> 10 & 3,
        "poisoned": bool(dw0 >> 14 & 1),
        "td": td,
        "length_dw": length,
        "tag": dw0 >> 14 & 0x200 | dw0 >> 11 & 0x100 | (dw2 if form == _COMPLETION_LIKE else dw1) >> 8 & 0xFF,
        "pasid": pasid,
        "data": struct.pack(f"<{length}I", *dwords[header:end]) if has_data else b"",
        "digest": dwords[end] if td else 0,
    }
    if form == _COMPLETION_LIKE:
        if pasid is not None:
            raise MalformedTlp("completion with a PASID prefix")
        return Tlp(completer_id=dw1 >> 16, status=_STATUS[dw1 >> 13 & 7], bcm=bool(dw1 >> 12 & 1), byte_count=dw1 & 0xFFF or 4096,
                   requester_id=dw2 >> 16, lower_address=dw2 & 0x7F, **common)  # fmt: skip
    if form == _MESSAGE_LIKE:
        return Tlp(requester_id=dw1 >> 16, message_code=dw1 & 0xFF, message_routing=dw0 >> 24 & 7, address=dw2 << 32 | dwords[3],
                   **common)  # fmt: skip
    first, last = dw1 & 15, dw1 >> 4 & 15
    if form == _MEMORY_LIKE:
        if header == 4:
            if not dw2:
                raise MalformedTlp(f"{kind.name} with a header of 4 dwords for address {dwords[3]:#x} below 4 GiB")
            address = dw2 << 32 | dwords[3] & ~3
        else:
            address = dw2 & ~3
        if kind in _ATOMIC_SIZES:
            size = 2 * length if kind is TlpType.CAS else 4 * length  # bytes of the operand
            if length not in _ATOMIC_SIZES[kind]:
                raise MalformedTlp(f"{kind.name} of {length} dwords")
            if address % size:
                raise MalformedTlp(f"{kind.name} of {size} bytes at {address:#x} is not aligned")
        else:
            _check_enables(address, length, first, last)
            if (address & PAGE - 1) + 4 * length > PAGE:
                raise MalformedTlp(f"{kind.name} of {length} dwords at {address:#x} crosses 4 KiB")
        no_write = kind is TlpType.MRD and common["at"] == TRANSLATION_REQUEST and bool(dwords[header - 1] & 1)
        return Tlp(requester_id=dw1 >> 16, first_be=first, last_be=last, address=address, no_write=no_write, **common)
    if length != 1 or last:
        raise MalformedTlp(f"{kind.name} of {length} dwords with last byte enables {last:04b}: must be 1 and 0000")
    if pasid is not None:
        raise MalformedTlp(f"{kind.name} with a PASID prefix")
    if form == _IO_LIKE:
        return Tlp(requester_id=dw1 >> 16, first_be=first, address=dw2 & ~3, **common)
    return Tlp(requester_id=dw1 >> 16, first_be=first, completer_id=dw2 >> 16, register=dw2 & 0xFFC, **common)


def _check_enables(address: int, length: int, first: int, last: int) -> None:
    """Raise for byte enables that a memory request must not have. [PCIe5 2.2.5]"""
    if length == 1:
        if last:
            raise MalformedTlp(f"last byte enables of a request of 1 dword are {last:04b}, must be 0000")
    elif not first or not last:
        raise MalformedTlp(f"byte enables of {length} dwords are {first:04b} and {last:04b}, must not be 0000")
    elif (first not in _RUNS_UP or last not in _RUNS_DOWN) and (length > 2 or address % 8):
        raise MalformedTlp(f"byte enables of {length} dwords at {address:#x} are {first:04b} and {last:04b}, must not have gaps")


def stray_bits(dwords: Sequence[int], tlp: Tlp | None = None) -> list[tuple[int, int]]:
    """Return (index, bits) of the header dwords in which a transmitter set what it must leave 0; ``tlp``: what they decode to."""
    clean = _header(decode(dwords) if tlp is None else tlp)
    return [(n, dwords[n] ^ clean[n]) for n in range(len(clean)) if dwords[n] != clean[n]]


def _one_request(address: int, length: int) -> None:
    if length < 0 or address < 0 or address + max(length, 1) > 1 << 64:
        raise ValueError(f"A memory request must lie within 64 bits, not {address!r} and {length!r}")
    if address % PAGE + length > PAGE:
        raise ValueError(f"A memory request must not cross 4 KiB, not {address:#x} and {length!r}")


def _selection(address: int, length: int) -> dict[str, int]:
    """Return the fields that select ``length`` bytes from ``address``."""
    if length == 0:
        return {"address": address & ~3, "length_dw": 1}
    length_dw = (address % 4 + length + 3) // 4
    first, last = 15 << address % 4 & 15, 15 >> -(address + length) % 4
    if length_dw == 1:
        first, last = first & last, 0
    return {"address": address & ~3, "length_dw": length_dw, "first_be": first, "last_be": last}


def memory_read(address: int, length_bytes: int, *, requester_id: int, tag: int, **fields: Any) -> Tlp:
    """Return the one Memory Read of ``length_bytes`` bytes, 0 to 4096, from any byte address; 0 is a zero-length read.

    Raises
    ------
    :exc:`ValueError`
        When it would cross 4 KiB, so that one TLP cannot carry it.
    """
    _one_request(address, length_bytes)
    return Tlp(TlpType.MRD, requester_id=requester_id, tag=tag, **_selection(address, length_bytes), **fields)


def memory_write(address: int, data: bytes, *, requester_id: int, tag: int = 0, **fields: Any) -> Tlp:
    """Return the one Memory Write of ``data``, 0 to 4096 bytes, to any byte address; bytes that are not enabled are 0.

    Raises
    ------
    :exc:`ValueError`
        When it would cross 4 KiB, so that one TLP cannot carry it.
    """
    _one_request(address, len(data))
    selected = _selection(address, len(data))
    payload = (bytes(address % 4) + data if data else b"").ljust(4 * selected["length_dw"], b"\0")
    return Tlp(TlpType.MWR, requester_id=requester_id, tag=tag, data=payload, **selected, **fields)


def _id_text(routing_id: int) -> str:
    return f"{routing_id >> 8:02x}:{routing_id >> 3 & 31:02x}.{routing_id & 7}"
