"""virtio-iommu: what lies in its requests, its configuration, its properties and its fault records. [VIRTIO1.4 5.13.3 to 5.13.6]"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import ClassVar

__all__ = ["CONFIG_BYTES", "FAULT_BYTES", "REQUESTS", "TAIL_BYTES", "Attach", "AttachFlag", "Detach", "Fault", "FaultFlag",
           "FaultReason", "IommuConfig", "IommuFeature", "Map", "MapFlag", "Probe", "Range", "Region", "RegionType",
           "Request", "RequestType", "Status", "Unmap", "pack_regions", "unpack_regions"]  # fmt: skip

CONFIG_BYTES = 40  # [VIRTIO1.4 5.13.4]
TAIL_BYTES = 4  # status and three reserved bytes [VIRTIO1.4 5.13.6]
FAULT_BYTES = 24  # [VIRTIO1.4 5.13.6.9]
PROPERTY_HEADER_BYTES = 4  # [VIRTIO1.4 5.13.6.7]
REGION_BYTES = 24  # [VIRTIO1.4 5.13.6.8.1]
RESV_MEM = 1  # type of a property [VIRTIO1.4 5.13.6.8]


class IommuFeature(IntEnum):
    """Numbers of the feature bits. [VIRTIO1.4 5.13.3]"""

    INPUT_RANGE = 0
    DOMAIN_RANGE = 1
    MAP_UNMAP = 2
    BYPASS = 3
    PROBE = 4
    MMIO = 5
    BYPASS_CONFIG = 6


class RequestType(IntEnum):
    """[VIRTIO1.4 5.13.6]"""

    ATTACH = 1
    DETACH = 2
    MAP = 3
    UNMAP = 4
    PROBE = 5


class Status(IntEnum):
    """[VIRTIO1.4 5.13.6]"""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    DEVERR = 3
    INVAL = 4
    RANGE = 5
    NOENT = 6
    FAULT = 7
    NOMEM = 8


class AttachFlag(IntFlag):
    """[VIRTIO1.4 5.13.6.3]"""

    BYPASS = 1


class MapFlag(IntFlag):
    """[VIRTIO1.4 5.13.6.5]"""

    READ = 1
    WRITE = 2
    MMIO = 4


class RegionType(IntEnum):
    """Subtype of a RESV_MEM property. [VIRTIO1.4 5.13.6.8.1]"""

    RESERVED = 0
    MSI = 1


class FaultReason(IntEnum):
    """[VIRTIO1.4 5.13.6.9]"""

    UNKNOWN = 0
    DOMAIN = 1
    MAPPING = 2


class FaultFlag(IntFlag):
    """[VIRTIO1.4 5.13.6.9]"""

    READ = 1
    WRITE = 2
    ADDRESS = 1 << 8


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers ``start`` to ``end``, inclusive."""

    start: int
    end: int

    def __contains__(self, number: int) -> bool:
        return self.start <= number <= self.end

    def overlaps(self, start: int, end: int) -> bool:
        """Tell whether one number of ``start`` to ``end``, inclusive, is in it."""
        return self.start <= end and start <= self.end


# -- requests --


class _Request:
    """A request: its fields in the order of the bytes, ``head`` (what is reserved in the head) last."""

    __slots__ = ()
    TYPE: ClassVar[RequestType]
    LAYOUT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        """Return the device-readable bytes."""
        *rest, head = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return self.LAYOUT.pack(self.TYPE, head, *rest)

    @classmethod
    def unpack(cls, raw: bytes):
        """Return the request that ``raw`` begins with."""
        _, head, *rest = cls.LAYOUT.unpack_from(raw)
        return cls(*rest, head)


@dataclass(frozen=True, slots=True)
class Attach(_Request):
    """[VIRTIO1.4 5.13.6.3]"""

    TYPE = RequestType.ATTACH
    LAYOUT = struct.Struct("<B3sIII4s")

    domain: int
    endpoint: int
    flags: int = 0
    reserved: bytes = bytes(4)
    head: bytes = bytes(3)


@dataclass(frozen=True, slots=True)
class Detach(_Request):
    """[VIRTIO1.4 5.13.6.4]"""

    TYPE = RequestType.DETACH
    LAYOUT = struct.Struct("<B3sII8s")

    domain: int
    endpoint: int
    reserved: bytes = bytes(8)
    head: bytes = bytes(3)


@dataclass(frozen=True, slots=True)
class Map(_Request):
    """[VIRTIO1.4 5.13.6.5]"""

    TYPE = RequestType.MAP
    LAYOUT = struct.Struct("<B3sIQQQI")

    domain: int
    virt_start: int
    virt_end: int
    phys_start: int
    flags: int
    head: bytes = bytes(3)


@dataclass(frozen=True, slots=True)
class Unmap(_Request):
    """[VIRTIO1.4 5.13.6.6]"""

    TYPE = RequestType.UNMAP
    LAYOUT = struct.Struct("<B3sIQQ4s")

    domain: int
    virt_start: int
    virt_end: int
    reserved: bytes = bytes(4)
    head: bytes = bytes(3)


@dataclass(frozen=True, slots=True)
class Probe(_Request):
    """[VIRTIO1.4 5.13.6.7]"""

    TYPE = RequestType.PROBE
    LAYOUT = struct.Struct("<B3sI64s")

    endpoint: int
    reserved: bytes = bytes(64)
    head: bytes = bytes(3)


Request = Attach | Detach | Map | Unmap | Probe
REQUESTS: dict[int, type[_Request]] = {kind.TYPE: kind for kind in (Attach, Detach, Map, Unmap, Probe)}


# -- configuration --

_CONFIG = struct.Struct("<QQQIIIB3s")


@dataclass(frozen=True, slots=True)
class IommuConfig:
    """The device configuration. [VIRTIO1.4 5.13.4]"""

    page_size_mask: int
    input_range: Range
    domain_range: Range
    probe_size: int
    bypass: int
    reserved: bytes = bytes(3)

    BYPASS_AT: ClassVar = 36

    def pack(self) -> bytes:
        """Return the 40 bytes."""
        return _CONFIG.pack(self.page_size_mask, self.input_range.start, self.input_range.end, self.domain_range.start,
                            self.domain_range.end, self.probe_size, self.bypass, self.reserved)  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> IommuConfig:
        """Return the fields of 40 bytes."""
        mask, first, last, first_domain, last_domain, *rest = _CONFIG.unpack_from(raw)
        return cls(mask, Range(first, last), Range(first_domain, last_domain), *rest)


# -- properties --

_HEADER, _RESV_MEM = struct.Struct("<HH"), struct.Struct("<HHB3sQQ")


@dataclass(frozen=True, slots=True)
class Region(Range):
    """Reserved addresses of an endpoint. [VIRTIO1.4 5.13.6.8.1]"""

    subtype: int = RegionType.RESERVED


def pack_regions(regions: Iterable[Region]) -> bytes:
    """Return the properties that tell of ``regions``."""
    return b"".join(_RESV_MEM.pack(RESV_MEM, REGION_BYTES - PROPERTY_HEADER_BYTES, one.subtype, bytes(3), one.start, one.end)
                    for one in regions)  # fmt: skip


def unpack_regions(raw: bytes) -> tuple[list[Region], list[str]]:
    """Return the regions in a list of properties, as a driver reads it, and what a device must not write in it.

    Unknown properties are passed by; one whose reserved bits are set is ignored. [VIRTIO1.4 5.13.6.7.1, 5.13.6.7.2]
    """
    regions: list[Region] = []
    problems: list[str] = []
    at = 0
    while at + PROPERTY_HEADER_BYTES <= len(raw):
        kind, length = _HEADER.unpack_from(raw, at)
        if kind & 0xFFF == 0:
            break
        end = at + PROPERTY_HEADER_BYTES + length
        if end > len(raw):
            problems.append(f"property at {at}: {length} bytes leave the list")  # V202
            return regions, problems
        if kind >> 12:
            problems.append(f"property at {at}: reserved bits {kind >> 12:#x}")  # V200
        elif kind != RESV_MEM:
            problems.append(f"property at {at}: type {kind}")
        elif length != REGION_BYTES - PROPERTY_HEADER_BYTES:
            problems.append(f"property at {at}: length {length}")  # V201
        else:
            _, _, subtype, reserved, start, last = _RESV_MEM.unpack_from(raw, at)
            if any(reserved):
                problems.append(f"property at {at}: reserved bytes {reserved.hex()}")
            regions.append(Region(start, last, subtype))
        at = end
    if any(raw[at:]):
        problems.append(f"bytes behind the last property, from {at} on, are not 0")  # V204
    return regions, problems


# -- fault records --

_FAULT = struct.Struct("<B3sIIIQ")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault record. [VIRTIO1.4 5.13.6.9]"""

    reason: int
    flags: int
    endpoint: int
    address: int
    reserved: bytes = bytes(3)
    reserved1: int = 0

    def pack(self) -> bytes:
        """Return the 24 bytes."""
        return _FAULT.pack(self.reason, self.reserved, self.flags, self.endpoint, self.reserved1, self.address)

    @classmethod
    def unpack(cls, raw: bytes) -> Fault:
        """Return the fields of 24 bytes."""
        reason, reserved, flags, endpoint, reserved1, address = _FAULT.unpack_from(raw)
        return cls(reason, flags, endpoint, address, reserved, reserved1)
