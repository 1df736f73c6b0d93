"""Capabilities of the first 256 bytes as data: what each is made of, and the registers that it comes to."""

from dataclasses import dataclass, field
from typing import Any

from ..regs.table import Access, Field, Register
from ..spec import pcie_config as spec
from ..spec import virtio
from .bars import check

__all__ = [
    "EVENT", "HWINIT", "RO", "RW", "RW1C", "Card", "MsiCapability", "MsixCapability", "PcieCapability", "PowerCapability",
    "VendorCapability", "VirtioCapability", "VirtioWindow",
]  # fmt: skip

RO, HWINIT, RW, RW1C, EVENT = Access.RO, Access.HWINIT, Access.RW, Access.RW1C, Access.EVENT


@dataclass(frozen=True)
class Card:
    """Where a function is: ``function`` (a description) is number ``number`` of ``count``."""

    function: Any
    number: int = 0
    count: int = 1

    @property
    def is_virtual(self):
        """Whether it is a virtual function, which leaves settings of the link and of the whole card to its physical one. [PCIe5 9.3]"""
        return self.function.is_virtual


@dataclass(frozen=True)
class PowerCapability:
    """PCI Power Management: D0 and D3hot. [PCIe5 7.5.2]

    ``keeps_state``: No_Soft_Reset, the way from D3hot to D0 leaves the function as it is; without, it is a function level reset.
    ``pme_states``: PME_Support, a bit for each of D0, D1, D2, D3hot, D3cold.
    """

    keeps_state: bool = True
    pme_states: int = 0
    at: int | None = None
    name = "pm"
    id = spec.CAP_PM
    size_bytes = spec.PM_BYTES

    def __post_init__(self):
        check(self.pme_states in range(32) and not self.pme_states & 0b00110, "PME must be from D0, D3hot, D3cold", self.pme_states)

    def registers(self, card):
        is_sticky = bool(self.pme_states >> 4)  # with PME from D3cold [PCIe5 7.5.2.2]
        pme = (Field("pme_enable", 8, 1, RW, is_sticky=is_sticky, doc="PME may be signaled"),
               Field("pme_status", 15, 1, RW1C, is_sticky=is_sticky, doc="PME would be signaled"))  # fmt: skip
        return (
            Register("capabilities", 2, 2, (
                Field("version", 0, 3, reset=3, doc="of the power management specification: 1.2"),
                Field("pme_support", 11, 5, reset=self.pme_states, doc="states that PME may be signaled from: D0, D1, D2, D3hot, D3cold"),
            )),
            Register("control", 4, 2, (
                Field("power_state", 0, 2, RW, spec.D0, accepts=(spec.D0, spec.D3HOT), doc="0 D0, 3 D3hot"),
                Field("no_soft_reset", 3, reset=int(self.keeps_state), doc="D3hot to D0 leaves the function as it is"),
                *(pme if self.pme_states else ()),
            )),
        )  # fmt: skip


@dataclass(frozen=True)
class MsiCapability:
    """MSI with 1 to 32 vectors, in one of its four layouts. [PCIe5 7.7.1]"""

    vectors: int = 1
    is_64: bool = True
    has_mask: bool = True
    at: int | None = None
    name = "msi"
    id = spec.CAP_MSI

    def __post_init__(self):
        check(self.vectors in spec.MSI_VECTORS, f"MSI vectors must be one of {spec.MSI_VECTORS}", self.vectors)

    @property
    def size_bytes(self):
        return 10 + 4 * self.is_64 + 10 * self.has_mask

    def registers(self, card):
        data = 0x0C if self.is_64 else 0x08
        high = (Register("address_high", 8, 4, (Field("value", 0, 32, RW, doc="message address, bits 63:32"),)),)
        masking = (
            Register("mask", data + 4, 4, (Field("bits", 0, self.vectors, RW, doc="vectors that are not sent"),)),
            Register("pending", data + 8, 4, (Field("bits", 0, self.vectors, doc="vectors that wait"),)),
        )
        return (
            Register("control", 2, 2, (
                Field("enable", 0, 1, RW, doc="MSI is used"),
                Field("capable", 1, 3, reset=self.vectors.bit_length() - 1, doc="log2 of the vectors that there are"),
                Field("multiple", 4, 3, RW, doc="log2 of the vectors that may be used"),
                Field("is_64", 7, reset=int(self.is_64), doc="address of 64 bits"),
                Field("has_mask", 8, reset=int(self.has_mask), doc="mask and pending bits are there"),
            )),
            Register("address", 4, 4, (Field("value", 2, 30, RW, doc="message address, bits 31:2"),)),
            *(high if self.is_64 else ()),
            Register("data", data, 2, (Field("value", 0, 16, RW, doc="message data"),)),
            *(masking if self.has_mask else ()),
        )  # fmt: skip


@dataclass(frozen=True)
class PcieCapability:
    """The PCI Express capability, version 2, of an endpoint. [PCIe5 7.5.3]

    ``mps_code``: largest Max_Payload_Size as 128 << code. ``link_speed``: 1 (2.5 GT/s) to 5 (32 GT/s). ``at``: offset
    in configuration space, chosen by the function when None. ``has_flr``: software may reset the function alone; what belongs to
    the link survives. [PCIe5 6.6.2] ``has_atomics``: AtomicOps may be requested. ``has_ten_bit_tags``: by this function, and of others.
    ``timeout_ranges``: code of the completion timeouts that can be set, by default range A: 50 us to 10 ms; ``has_timeout_disable``: or
    none, which who sends requests must allow. ``has_prefixes``: one End-End TLP prefix may come. [PCIe5 7.5.3.15]
    """

    mps_code: int = 2
    link_speed: int = 3
    link_width: int = 8
    at: int | None = None
    has_flr: bool = False
    has_atomics: bool = False
    has_ten_bit_tags: bool = False
    timeout_ranges: int = 1
    has_timeout_disable: bool = True
    has_prefixes: bool = False
    name = "pcie"
    id = spec.CAP_PCIE
    size_bytes = spec.PCIE_BYTES

    def __post_init__(self):
        check(self.mps_code in range(6), "Code of the largest payload must be between 0 and 5", self.mps_code)
        check(self.link_speed in range(1, spec.SPEED_MAX + 1), f"Link speed must be between 1 and {spec.SPEED_MAX}", self.link_speed)
        check(self.link_width in spec.WIDTHS, f"Link width must be one of {spec.WIDTHS}", self.link_width)
        check(self.timeout_ranges in spec.TIMEOUT_RANGES,
              f"Code of the completion timeout ranges must be one of {spec.TIMEOUT_RANGES}", self.timeout_ranges)  # fmt: skip

    def registers(self, card):
        link = (Field("speed", 0, 4, reset=self.link_speed, doc="1 for 2.5 GT/s, 2 for 5, 3 for 8, 4 for 16, 5 for 32"),
                Field("width", 4, 6, reset=self.link_width, doc="lanes"))  # fmt: skip
        errors = tuple(Field(name, bit, 1, RW1C, doc="an error of the kind was found") for bit, name in enumerate(spec.DEVICE_ERRORS))
        control_2 = (
            (self.timeout_ranges, Field("timeout", 0, 4, RW, doc="completion timeout value")),
            (self.has_timeout_disable, Field("timeout_disable", 4, 1, RW, doc="no request times out")),
            (self.has_atomics, Field("atomics", 6, 1, RW, doc="AtomicOps may be requested")),
            (self.has_ten_bit_tags, Field("ten_bit_tags", 12, 1, RW, doc="tags of 10 bits may be used")),
        )
        prefixes = (
            Field("extended_fmt", 20, reset=1, doc="Fmt has three bits"),
            Field("prefixes", 21, 1, HWINIT, 1, doc="End-End TLP prefixes may come"),
            Field("prefixes_max", 22, 2, HWINIT, 1, doc="how many in front of a TLP"),
        )
        own = not card.is_virtual  # settings that a virtual function leaves to its physical one [PCIe5 9.3.5.4, 9.3.5.7, 9.3.5.11]
        control = (
            Field("error_reporting", 0, 4, RW, doc="messages that may be sent: correctable, non-fatal, fatal, and of UR"),
            Field("relaxed_ordering", 4, 1, RW, 1, doc="may be set in requests"),
            Field("mps", 5, 3, RW, is_kept=True, doc="Max_Payload_Size is 128 << this"),
            Field("extended_tag", 8, 1, RW, doc="tags of 8 bits may be used"),
            Field("no_snoop", 11, 1, RW, 1, doc="may be set in requests"),
            Field("mrrs", 12, 3, RW, spec.MRRS_RESET, doc="Max_Read_Request_Size is 128 << this"),
        )
        link_control = (
            Field("aspm", 0, 2, RW, is_kept=True, doc="link power states that may be entered"),
            Field("rcb", 3, 1, RW, is_kept=True, doc="read completion boundary is 128 bytes"),
            Field("common_clock", 6, 1, RW, is_kept=True, doc="both ends share a clock"),
            Field("extended_synch", 7, 1, RW, is_kept=True, doc="longer training sequences"),
        )
        return (
            Register("capabilities", 0x02, 2, (Field("version", 0, 4, reset=2, doc="of the capability"),)),
            Register("device_capabilities", 0x04, 4, (
                Field("mps_supported", 0, 3, reset=self.mps_code, doc="Max_Payload_Size may be up to 128 << this"),
                Field("extended_tag_supported", 5, reset=1, doc="tags of 8 bits"),
                Field("role_based_errors", 15, reset=1, doc="advisory errors are reported as such"),
                Field("flr", 28, reset=int(self.has_flr), doc="function level reset is there"),
            )),
            Register("device_control", 0x08, 2, (
                *(control if own else ()),
                Field("initiate_flr", spec.FLR_BIT, 1, EVENT if self.has_flr else RO, doc="resets the function"),
            )),
            Register("device_status", 0x0A, 2, (
                *(errors if card.function.reports_errors else ()),
                Field("transactions_pending", 5, doc="requests of the function wait for completions"),
            )),
            Register("link_capabilities", 0x0C, 4, (*link, Field("aspm_optionality", 22, 1, HWINIT, 1, doc="ASPM may be left out"))),
            Register("link_control", 0x10, 2, link_control if own else ()),
            Register("link_status", 0x12, 2, link if own else ()),
            Register("device_capabilities_2", 0x24, 4, (
                Field("timeout_ranges", 0, 4, HWINIT, self.timeout_ranges, doc="completion timeouts that can be set"),
                Field("timeout_disable", 4, reset=int(self.has_timeout_disable), doc="completion timeouts can be turned off"),
                Field("ten_bit_tag_completer", 16, 1, HWINIT, int(self.has_ten_bit_tags), doc="requests with tags of 10 bits are served"),
                Field("ten_bit_tag_requester", 17, 1, HWINIT, int(self.has_ten_bit_tags), doc="tags of 10 bits can be turned on"),
                *(prefixes if self.has_prefixes else ()),
            )),
            Register("device_control_2", 0x28, 2, tuple(item for is_there, item in control_2 if is_there and own)),
            Register("link_capabilities_2", 0x2C, 4, (Field("speeds", 1, 7, reset=(1 << self.link_speed) - 1, doc="a bit for each"),)),
            # Function 0 speaks for the link of the whole card. [PCIe5 7.5.3.19]
            Register("link_control_2", 0x30, 2, () if card.number else (
                Field("target_speed", 0, 4, RW, self.link_speed, is_sticky=True, doc="upper limit of the speed"),
            )),
        )  # fmt: skip


@dataclass(frozen=True)
class MsixCapability:
    """MSI-X: where table and pending bits lie. [PCIe5 7.7.2]"""

    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int
    at: int | None = None
    name = "msix"
    id = spec.CAP_MSIX
    size_bytes = spec.MSIX_BYTES

    def __post_init__(self):
        check(isinstance(self.vectors, int) and 1 <= self.vectors <= spec.MSIX_VECTORS_MAX,
              f"MSI-X vectors must be between 1 and {spec.MSIX_VECTORS_MAX}", self.vectors)  # fmt: skip
        for offset in (self.table_offset, self.pba_offset):
            check(offset % 8 == 0, "MSI-X table and pending bits must start at a multiple of 8", offset)

    @property
    def spans(self):
        """``(bar, offset, bytes)`` of the table and of the pending bits."""
        return (
            (self.table_bar, self.table_offset, self.vectors * spec.MSIX_ENTRY_BYTES),
            (self.pba_bar, self.pba_offset, -(-self.vectors // 64) * 8),
        )

    def registers(self, card):
        def place(bar, offset):
            return (Field("bir", 0, 3, reset=bar, doc="BAR"), Field("offset", 3, 29, reset=offset >> 3, doc="offset inside it, over 8"))

        return (
            Register("control", 0x02, 2, (
                Field("table_size", 0, 11, reset=self.vectors - 1, doc="vectors less one"),
                Field("function_mask", 14, 1, RW, doc="no vector is sent"),
                Field("enable", 15, 1, RW, doc="MSI-X is used"),
            )),
            Register("table", 0x04, 4, place(self.table_bar, self.table_offset)),
            Register("pba", 0x08, 4, place(self.pba_bar, self.pba_offset)),
        )  # fmt: skip


@dataclass(frozen=True)
class VendorCapability:
    """The vendor-specific capability: ``content`` are registers from offset 3 on, of ``size_bytes`` in all. [PCIe5 7.9.4]"""

    size_bytes: int
    content: tuple[Register, ...] = field(default=())
    at: int | None = None
    name = "vendor"
    id = spec.CAP_VENDOR

    def __post_init__(self):
        check(self.size_bytes in range(3, 0xC1), "Size of a vendor-specific capability must be between 3 and 192 bytes", self.size_bytes)

    def registers(self, card):
        return (Register("length", 2, 1, (Field("value", 0, 8, reset=self.size_bytes, doc="bytes of the capability"),)), *self.content)


@dataclass(frozen=True)
class VirtioCapability:
    """Where a virtio structure lies; ``notify_multiplier`` with a notification structure only. [VIRTIO1.4 4.1.4]"""

    cfg_type: int
    bar: int
    offset: int
    length: int
    notify_multiplier: int = 0
    at: int | None = None

    def __post_init__(self):
        kinds = (virtio.CFG_COMMON, virtio.CFG_NOTIFY, virtio.CFG_ISR, virtio.CFG_DEVICE)
        check(self.cfg_type in kinds, f"Type of a virtio structure must be one of {kinds}", self.cfg_type)
        alignment = {virtio.CFG_ISR: 1, virtio.CFG_NOTIFY: 2}.get(self.cfg_type, 4)
        check(self.offset % alignment == 0,
              f"Offset of a virtio structure of type {self.cfg_type} must be a multiple of {alignment}", self.offset)  # fmt: skip
        check(self.length > 0, "Length of a virtio structure must be positive", self.length)
        legal = (0, *(1 << n for n in range(1, 17))) if self.cfg_type == virtio.CFG_NOTIFY else (0,)
        check(self.notify_multiplier in legal,
              "Multiplier must be 0 or an even power of two, and belongs to notification", self.notify_multiplier)  # fmt: skip

    id = spec.CAP_VENDOR

    @property
    def name(self):
        return f"virtio_{self.cfg_type}"

    @property
    def size_bytes(self):
        return 20 if self.cfg_type == virtio.CFG_NOTIFY else 16

    @property
    def spans(self):
        """``(bar, offset, bytes)`` of the structure."""
        return ((self.bar, self.offset, self.length),)

    def registers(self, card):
        extra = ()
        if self.cfg_type == virtio.CFG_NOTIFY:
            extra = (Register("notify_off_multiplier", 0x10, 4, (
                Field("value", 0, 32, reset=self.notify_multiplier, doc="bytes from queue to queue"),)),)  # fmt: skip
        return (
            *_virtio(self.size_bytes, self.cfg_type),
            Register("bar", 0x04, 1, (Field("value", 0, 8, reset=self.bar, doc="BAR of the structure"),)),
            Register("offset", 0x08, 4, (Field("value", 0, 32, reset=self.offset, doc="bytes inside the BAR"),)),
            Register("length", 0x0C, 4, (Field("value", 0, 32, reset=self.length, doc="bytes of the structure"),)),
            *extra,
        )


@dataclass(frozen=True)
class VirtioWindow:
    """The virtio capability through which configuration accesses reach the BARs. [VIRTIO1.4 4.1.4.9]"""

    at: int | None = None
    name = "virtio_window"
    id = spec.CAP_VENDOR
    size_bytes = 20

    def registers(self, card):
        return (
            *_virtio(self.size_bytes, virtio.CFG_PCI),
            Register("bar", 0x04, 1, (Field("value", 0, 8, RW, doc="BAR that is accessed"),)),
            Register("offset", 0x08, 4, (Field("value", 0, 32, RW, doc="bytes inside the BAR"),)),
            Register("length", 0x0C, 4, (Field("value", 0, 32, RW, doc="bytes of the access: 1, 2 or 4"),)),
            Register("pci_cfg_data", 0x10, 4, (Field("value", 0, 32, RW, doc="an access here is an access there"),)),
        )


def _virtio(size_bytes, cfg_type):
    return (Register("cap_len", 0x02, 1, (Field("value", 0, 8, reset=size_bytes, doc="bytes of the capability"),)),
            Register("cfg_type", 0x03, 1, (Field("value", 0, 8, reset=cfg_type, doc="kind of structure"),)))  # fmt: skip
