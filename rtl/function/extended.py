"""Extended capabilities (from 0x100 on) as data: what each is made of, and the registers that it comes to."""

from dataclasses import dataclass, field

from ..regs.table import Field, Register
from ..spec import pcie_config as spec
from .bars import Bar, bar_registers, check, check_bars
from .capabilities import EVENT, HWINIT, RW, RW1C

__all__ = [
    "AcsCapability", "AerCapability", "AriCapability", "AtsCapability", "DvsecCapability", "PasidCapability", "PriCapability",
    "SerialNumber", "SriovCapability", "VsecCapability",
]  # fmt: skip


@dataclass(frozen=True)
class AerCapability:
    """Advanced Error Reporting, without ECRC, prefixes and more than one header. [PCIe5 7.8.4]"""

    at: int | None = None
    name = "aer"
    id = spec.EXT_AER
    version = 2
    size_bytes = spec.AER_BYTES

    def registers(self, card):
        def fields(rows, access, doc, column=None):
            resets = [column is not None and row[column] for row in rows]
            return tuple(Field(row[0], row[1], 1, access, int(reset), is_sticky=True, doc=doc) for row, reset in zip(rows, resets))

        decides = (  # what is done about an error: a virtual function leaves that to its physical one [PCIe5 9.4.2]
            Register("uncorrectable_mask", spec.AER_UNCORRECTABLE_MASK, 4, fields(spec.UNCORRECTABLE, RW, "not logged, not reported", 3)),
            Register("uncorrectable_severity", spec.AER_SEVERITY, 4, fields(spec.UNCORRECTABLE, RW, "reported as fatal", 2)),
            Register("correctable_mask", spec.AER_CORRECTABLE_MASK, 4, fields(spec.CORRECTABLE, RW, "not reported", 2)),
        )
        return (
            Register("uncorrectable_status", spec.AER_UNCORRECTABLE_STATUS, 4, fields(spec.UNCORRECTABLE, RW1C, "found")),
            Register("correctable_status", spec.AER_CORRECTABLE_STATUS, 4, fields(spec.CORRECTABLE, RW1C, "found")),
            *(() if card.is_virtual else decides),
            Register("control", spec.AER_CONTROL, 4, (
                Field("first_error", 0, 5, is_sticky=True, doc="bit of the error that the header log is of, if its status is 1"),
            )),
            *(Register(f"header_log_{n}", spec.AER_HEADER_LOG + 4 * n, 4, (
                Field("value", 0, 32, is_sticky=True, doc=f"dword {n} of the header of the first error"),)) for n in range(4)),
        )  # fmt: skip


@dataclass(frozen=True)
class SerialNumber:
    """Device Serial Number: an EUI-64. [PCIe5 7.9.3]"""

    value: int
    at: int | None = None
    name = "serial_number"
    id = spec.EXT_DSN
    version = 1
    size_bytes = 12

    def __post_init__(self):
        check(isinstance(self.value, int) and 0 <= self.value < 1 << 64, "Serial number must be a number of 64 bits", self.value)

    def registers(self, card):
        return (
            Register("low", 4, 4, (Field("value", 0, 32, HWINIT, self.value & 0xFFFFFFFF, doc="bits 31:0"),)),
            Register("high", 8, 4, (Field("value", 0, 32, HWINIT, self.value >> 32, doc="bits 63:32"),)),
        )


@dataclass(frozen=True)
class AtsCapability:
    """Address Translation Services. ``queue_depth``: invalidations that can wait, 1 to 32. [PCIe5 10.5.1]"""

    queue_depth: int = 32
    is_page_aligned: bool = True
    has_global_invalidate: bool = False
    at: int | None = None
    name = "ats"
    id = spec.EXT_ATS
    version = 1
    size_bytes = 8

    def __post_init__(self):
        check(self.queue_depth in range(1, 33), "Depth of the invalidation queue must be between 1 and 32", self.queue_depth)

    def registers(self, card):
        depth = 0 if card.is_virtual else self.queue_depth % 32  # a queue and a unit for all [PCIe5 10.5.1.2]
        return (
            Register("capability", 4, 2, (
                Field("queue_depth", 0, 5, reset=depth, doc="invalidations that can wait; 0 is 32"),
                Field("page_aligned", 5, reset=int(self.is_page_aligned), doc="untranslated addresses are multiples of 4096"),
                Field("global_invalidate", 6, reset=int(self.has_global_invalidate), doc="Global Invalidate is served"),
            )),
            Register("control", 6, 2, (
                *(() if card.is_virtual else (Field("stu", 0, 5, RW, doc="smallest translation unit is 4096 << this"),)),
                Field("enable", 15, 1, RW, doc="translations may be cached"),
            )),
        )  # fmt: skip


@dataclass(frozen=True)
class PriCapability:
    """Page Request Interface, for a function with ATS. ``capacity``: page requests that can wait for an answer. [PCIe5 10.5.2]"""

    capacity: int = 32
    needs_pasid: bool = False
    at: int | None = None
    name = "pri"
    id = spec.EXT_PRI
    version = 1
    size_bytes = 16

    def __post_init__(self):
        check(self.capacity in range(1, 1 << 32), "Capacity of page requests must be a positive number of 32 bits", self.capacity)

    def registers(self, card):
        return (
            Register("control", 4, 2, (
                Field("enable", 0, 1, RW, doc="page requests may be sent"),
                Field("reset", 1, 1, EVENT, doc="forgets credits and requests while not enabled"),
            )),
            Register("status", 6, 2, (
                Field("response_failure", 0, 1, RW1C, doc="a failed response came"),
                Field("unexpected_response", 1, 1, RW1C, doc="a response to no request came"),
                Field("stopped", 8, doc="no request waits any more"),
                Field("response_pasid", 15, reset=int(self.needs_pasid), doc="responses must carry the PASID"),
            )),
            Register("capacity", 8, 4, (Field("value", 0, 32, reset=self.capacity, doc="page requests that can wait"),)),
            Register("allocation", 12, 4, (Field("value", 0, 32, RW, doc="page requests that may wait"),)),
        )  # fmt: skip


@dataclass(frozen=True)
class PasidCapability:
    """Process Address Space IDs of ``bits`` bits. [PCIe5 7.8.8]"""

    bits: int = 20
    has_execute: bool = False
    has_privileged: bool = False
    at: int | None = None
    name = "pasid"
    id = spec.EXT_PASID
    version = 1
    size_bytes = 8

    def __post_init__(self):
        check(self.bits in range(spec.PASID_BITS_MAX + 1), f"PASID bits must be between 0 and {spec.PASID_BITS_MAX}", self.bits)

    def registers(self, card):
        freezes = ("ats", "control", "enable") if any(c.id == spec.EXT_ATS for c in card.function.extended) else None
        control = (
            (True, Field("enable", 0, 1, RW, frozen_by=freezes, doc="requests may carry a PASID")),
            (self.has_execute, Field("execute", 1, 1, RW, frozen_by=freezes, doc="and ask to execute")),
            (self.has_privileged, Field("privileged", 2, 1, RW, frozen_by=freezes, doc="and be privileged")),
        )
        return (
            Register("capability", 4, 2, (
                Field("execute", 1, reset=int(self.has_execute), doc="Execute Requested is there"),
                Field("privileged", 2, reset=int(self.has_privileged), doc="Privileged Mode Requested is there"),
                Field("bits", 8, 5, reset=self.bits, doc="width of a PASID"),
            )),
            Register("control", 6, 2, tuple(item for is_there, item in control if is_there)),
        )  # fmt: skip


@dataclass(frozen=True)
class AcsCapability:
    """Access Control Services between the functions of a card; all False on one without peer-to-peer traffic. [PCIe5 7.7.8]"""

    redirects_requests: bool = False
    redirects_completions: bool = False
    has_direct_translated: bool = False
    at: int | None = None
    name = "acs"
    id = spec.EXT_ACS
    version = 1
    size_bytes = 8

    def registers(self, card):
        bits = (
            ("request_redirect", 2, self.redirects_requests, "requests between functions go by the root"),
            ("completion_redirect", 3, self.redirects_completions, "completions between functions go by the root"),
            ("direct_translated", 6, self.has_direct_translated, "translated requests need not"),
        )
        return (
            Register("capability", 4, 2, tuple(Field(name, bit, reset=int(is_there), doc=doc) for name, bit, is_there, doc in bits)),
            Register("control", 6, 2, tuple(Field(name, bit, 1, RW, doc=doc) for name, bit, is_there, doc in bits if is_there)),
        )


@dataclass(frozen=True)
class AriCapability:
    """Alternative Routing-ID Interpretation: names the next function of the card. [PCIe5 7.8.7]"""

    at: int | None = None
    name = "ari"
    id = spec.EXT_ARI
    version = 1
    size_bytes = 8

    def registers(self, card):
        following = card.number + 1 if card.number + 1 < card.count else 0
        return (Register("capability", 4, 2, (Field("next_function", 8, 8, reset=following, doc="next function; 0 for none"),)),)


@dataclass(frozen=True)
class SriovCapability:
    """Single Root I/O Virtualisation: ``total`` virtual functions of ``device_id``. [PCIe5 9.3.3]

    The Routing ID of the first is the function's plus ``first_offset``, of each other the one in front of it plus ``stride``.
    ``bars``: of one virtual function, 4 KiB or more; each takes at least a page, whose size software chooses among ``page_sizes``
    (bit n: 4 KiB << n). ``is_lowest``: no function in front of this one has the capability; by default that is function 0.
    """

    total: int
    device_id: int
    first_offset: int
    stride: int = 1
    bars: tuple[Bar, ...] = field(default=())
    page_sizes: int = spec.PAGE_SIZES
    is_lowest: bool | None = None
    at: int | None = None
    name = "sriov"
    id = spec.EXT_SRIOV
    version = 1
    size_bytes = 64

    def __post_init__(self):
        for name, value in (("Virtual functions", self.total), ("First offset", self.first_offset), ("Stride", self.stride)):
            check(value in range(1, 1 << 16), f"{name} must be between 1 and 65535", value)
        check(self.device_id in range(1 << 16), "Device ID of virtual functions must be a number of 16 bits", self.device_id)
        check(self.page_sizes in range(1, 1 << 20) and self.page_sizes & 1, "Page sizes must hold 4 KiB, bit 0, and none above 2 GiB",
              self.page_sizes)  # fmt: skip
        check_bars(self.bars)
        for bar in self.bars:
            check(isinstance(bar, Bar) and bar.size_bytes >= 4096, "A BAR of virtual functions must have 4096 bytes or more", bar)

    @property
    def pages(self):
        """Log2 of the page sizes, ascending."""
        return tuple(12 + n for n in range(20) if self.page_sizes >> n & 1)

    def apertures(self, bar):
        """Return log2 of the bytes that ``bar`` of one virtual function takes, for each of :attr:`pages`. [PCIe5 9.2.1.1.1]"""
        return tuple(max(bar.size_bytes.bit_length() - 1, page) for page in self.pages)

    def registers(self, card):
        def number(name, offset, value, doc, access=HWINIT):
            return Register(name, offset, 2, (Field("value", 0, 16, access, value, doc=doc),))

        hierarchy = (Field("ari_hierarchy", 4, 1, RW, doc="Routing IDs beyond 8 functions can be reached"),)
        is_lowest = not card.number if self.is_lowest is None else self.is_lowest
        enable = ("sriov", "control", "enable")
        return (
            Register("capabilities", 0x04, 4),
            Register("control", 0x08, 2, (
                Field("enable", 0, 1, RW, doc="virtual functions are there"),
                Field("memory_enable", 3, 1, RW, doc="their memory is"),
                *(hierarchy if is_lowest else ()),
            )),
            number("initial", 0x0C, self.total, "virtual functions at first"),
            number("total", 0x0E, self.total, "virtual functions at most"),
            Register("count", 0x10, 2, (Field("value", 0, 16, RW, frozen_by=enable, doc="functions in use"),)),
            Register("link", 0x12, 1, (Field("value", 0, 8, reset=card.number, doc="function that this one depends on: itself"),)),
            number("first_offset", 0x14, self.first_offset, "from this function's Routing ID to the first's"),
            number("stride", 0x16, self.stride, "from one's Routing ID to the next one's"),
            number("device_id", 0x1A, self.device_id, "of all virtual functions"),
            Register("page_sizes", 0x1C, 4, (Field("value", 0, 32, reset=self.page_sizes, doc="4 KiB << n of each bit n can be set"),)),
            Register("page_size", 0x20, 4, tuple(
                Field(f"page_{n}", n - 12, 1, RW, int(n == 12), frozen_by=enable, doc=f"pages of {1 << n - 10} KiB; the lowest bit counts")
                for n in self.pages)),
            *bar_registers(self.bars, 0x24),
        )  # fmt: skip


@dataclass(frozen=True)
class VsecCapability:
    """Vendor-specific extended capability ``vsec_id``; ``content`` are registers from offset 8 on. [PCIe5 7.9.5]"""

    vsec_id: int
    size_bytes: int
    content: tuple[Register, ...] = field(default=())
    revision: int = 0
    at: int | None = None
    id = spec.EXT_VSEC
    version = 1

    def __post_init__(self):
        check(self.vsec_id in range(1 << 16), "ID of a VSEC must be a number of 16 bits", self.vsec_id)
        check(self.revision in range(16), "Revision of a VSEC must be a number of 4 bits", self.revision)
        check(self.size_bytes in range(8, 3841, 4), "Size of a VSEC must be a multiple of 4 between 8 and 3840", self.size_bytes)

    @property
    def name(self):
        return f"vsec_{self.vsec_id:04x}"

    def registers(self, card):
        return (Register("header", 4, 4, _vendor_header(self.vsec_id, self.revision, self.size_bytes, "ID")), *self.content)


@dataclass(frozen=True)
class DvsecCapability:
    """Designated vendor-specific capability ``dvsec_id`` of ``vendor_id``; ``content`` are registers from offset 10 on. [PCIe5 7.9.6]"""

    vendor_id: int
    dvsec_id: int
    size_bytes: int
    content: tuple[Register, ...] = field(default=())
    revision: int = 0
    at: int | None = None
    id = spec.EXT_DVSEC
    version = 1

    def __post_init__(self):
        check(self.vendor_id in range(0xFFFF), "Vendor ID of a DVSEC must be between 0 and 0xfffe", self.vendor_id)
        check(self.dvsec_id in range(1 << 16), "ID of a DVSEC must be a number of 16 bits", self.dvsec_id)
        check(self.revision in range(16), "Revision of a DVSEC must be a number of 4 bits", self.revision)
        check(self.size_bytes in range(12, 3841, 4), "Size of a DVSEC must be a multiple of 4 between 12 and 3840", self.size_bytes)

    @property
    def name(self):
        return f"dvsec_{self.vendor_id:04x}_{self.dvsec_id:04x}"

    def registers(self, card):
        return (
            Register("header", 4, 4, _vendor_header(self.vendor_id, self.revision, self.size_bytes, "vendor ID")),
            Register("id", 8, 2, (Field("value", 0, 16, reset=self.dvsec_id, doc="ID given by the vendor"),)),
            *self.content,
        )


def _vendor_header(number, revision, length, doc):
    return (Field("value", 0, 16, reset=number, doc=doc), Field("revision", 16, 4, reset=revision, doc="of the layout"),
            Field("length", 20, 12, reset=length, doc="bytes of the capability"))  # fmt: skip
