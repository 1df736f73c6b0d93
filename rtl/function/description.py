"""Functions as data: identity, BARs and capabilities, from which configuration space is made."""

from dataclasses import dataclass

from ..regs.table import Access, Block, Field, Map, Register
from ..spec import pcie_config as spec
from ..spec import virtio

RO, RW = Access.RO, Access.RW
STRUCTURES = 4  # virtio structures of one function, at most


def _check(condition, sentence, value):
    if not condition:
        raise ValueError(f"{sentence}, not {value!r}")


def _check_bits(name, value, width):
    _check(isinstance(value, int) and 0 <= value < 1 << width, f"{name} must be a number of {width} bits", value)


@dataclass(frozen=True)
class Bar:
    """A memory BAR of ``size_bytes`` (a power of two) in register ``index``; a 64-bit one takes ``index + 1`` as well. [PCIe5 7.5.1.2.1]"""

    index: int
    size_bytes: int
    is_64: bool = True
    is_prefetchable: bool = False

    def __post_init__(self):
        last = spec.BAR_COUNT - 1 - self.is_64
        _check(isinstance(self.index, int) and 0 <= self.index <= last, f"Index of a BAR must be between 0 and {last}", self.index)
        _check(self.size_bytes in [1 << n for n in range(spec.BAR_MINIMUM_BYTES.bit_length() - 1, 32)],
               "Size of a BAR must be a power of two between 128 bytes and 2 GiB", self.size_bytes)  # fmt: skip
        _check(self.is_64 or not self.is_prefetchable, "A prefetchable BAR must be a 64-bit one", self)

    @property
    def registers(self):
        """Numbers of the BAR registers that it takes."""
        return (self.index, self.index + 1) if self.is_64 else (self.index,)


@dataclass(frozen=True)
class PcieCapability:
    """The PCI Express capability, version 2, of an endpoint. [PCIe5 7.5.3]

    ``mps_code``: largest Max_Payload_Size as 128 << code. ``link_speed``: 1 (2.5 GT/s) to 5 (32 GT/s). ``at``: offset
    in configuration space, chosen by the function when None. ``has_flr``: software may reset the function alone; what belongs to
    the link survives. [PCIe5 6.6.2]
    """

    mps_code: int = 2
    link_speed: int = 3
    link_width: int = 8
    at: int | None = None
    has_flr: bool = False
    name = "pcie"
    id = spec.CAP_PCIE
    size_bytes = spec.PCIE_BYTES

    def __post_init__(self):
        _check(self.mps_code in range(6), "Code of the largest payload must be between 0 and 5", self.mps_code)
        _check(self.link_speed in range(1, spec.SPEED_MAX + 1), f"Link speed must be between 1 and {spec.SPEED_MAX}", self.link_speed)
        _check(self.link_width in spec.WIDTHS, f"Link width must be one of {spec.WIDTHS}", self.link_width)

    def registers(self, *, is_first):
        link = (Field("speed", 0, 4, reset=self.link_speed), Field("width", 4, 6, reset=self.link_width))
        return (
            Register("capabilities", 0x02, 2, (Field("version", 0, 4, reset=2),)),
            Register("device_capabilities", 0x04, 4, (
                Field("mps_supported", 0, 3, reset=self.mps_code),
                Field("extended_tag_supported", 5, reset=1),
                Field("role_based_errors", 15, reset=1),
                Field("flr", 28, reset=int(self.has_flr)),
            )),
            Register("device_control", 0x08, 2, (
                Field("error_reporting", 0, 4, RW),
                Field("relaxed_ordering", 4, 1, RW, 1),
                Field("mps", 5, 3, RW, is_kept=True),
                Field("extended_tag", 8, 1, RW),
                Field("no_snoop", 11, 1, RW, 1),
                Field("mrrs", 12, 3, RW, spec.MRRS_RESET),
                Field("initiate_flr", 15),  # reads 0; a 1 written to it is an event
            )),
            Register("device_status", 0x0A, 2, (Field("transactions_pending", 5),)),
            Register("link_capabilities", 0x0C, 4, (*link, Field("aspm_optionality", 22, reset=1))),
            Register("link_control", 0x10, 2, (
                Field("aspm", 0, 2, RW, is_kept=True),
                Field("rcb", 3, 1, RW, is_kept=True),
                Field("common_clock", 6, 1, RW, is_kept=True),
                Field("extended_synch", 7, 1, RW, is_kept=True),
            )),
            Register("link_status", 0x12, 2, link),
            Register("device_capabilities_2", 0x24, 4),
            Register("device_control_2", 0x28, 2),
            Register("link_capabilities_2", 0x2C, 4, (Field("speeds", 1, 7, reset=(1 << self.link_speed) - 1),)),
            # Function 0 speaks for the link of the whole card. [PCIe5 7.5.3.19]
            Register("link_control_2", 0x30, 2, (Field("target_speed", 0, 4, RW, self.link_speed, True),) if is_first else ()),
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
        _check(isinstance(self.vectors, int) and 1 <= self.vectors <= spec.MSIX_VECTORS_MAX,
               f"MSI-X vectors must be between 1 and {spec.MSIX_VECTORS_MAX}", self.vectors)  # fmt: skip
        for offset in (self.table_offset, self.pba_offset):
            _check(offset % 8 == 0, "MSI-X table and pending bits must start at a multiple of 8", offset)

    @property
    def spans(self):
        """``(bar, offset, bytes)`` of the table and of the pending bits."""
        return (
            (self.table_bar, self.table_offset, self.vectors * spec.MSIX_ENTRY_BYTES),
            (self.pba_bar, self.pba_offset, -(-self.vectors // 64) * 8),
        )

    def registers(self, *, is_first):
        return (
            Register("control", 0x02, 2, (
                Field("table_size", 0, 11, reset=self.vectors - 1),
                Field("function_mask", 14, 1, RW),
                Field("enable", 15, 1, RW),
            )),
            Register("table", 0x04, 4, (Field("bir", 0, 3, reset=self.table_bar), Field("offset", 3, 29, reset=self.table_offset >> 3))),
            Register("pba", 0x08, 4, (Field("bir", 0, 3, reset=self.pba_bar), Field("offset", 3, 29, reset=self.pba_offset >> 3))),
        )  # fmt: skip


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
        _check(self.cfg_type in kinds, f"Type of a virtio structure must be one of {kinds}", self.cfg_type)
        alignment = {virtio.CFG_ISR: 1, virtio.CFG_NOTIFY: 2}.get(self.cfg_type, 4)
        _check(self.offset % alignment == 0,
               f"Offset of a virtio structure of type {self.cfg_type} must be a multiple of {alignment}", self.offset)  # fmt: skip
        _check(self.length > 0, "Length of a virtio structure must be positive", self.length)
        legal = (0, *(1 << n for n in range(1, 17))) if self.cfg_type == virtio.CFG_NOTIFY else (0,)
        _check(self.notify_multiplier in legal,
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

    def registers(self, *, is_first):
        extra = ()
        if self.cfg_type == virtio.CFG_NOTIFY:
            extra = (Register("notify_off_multiplier", 0x10, 4, (Field("value", 0, 32, reset=self.notify_multiplier),)),)
        return (
            Register("cap_len", 0x02, 1, (Field("value", 0, 8, reset=self.size_bytes),)),
            Register("cfg_type", 0x03, 1, (Field("value", 0, 8, reset=self.cfg_type),)),
            Register("bar", 0x04, 1, (Field("value", 0, 8, reset=self.bar),)),
            Register("offset", 0x08, 4, (Field("value", 0, 32, reset=self.offset),)),
            Register("length", 0x0C, 4, (Field("value", 0, 32, reset=self.length),)),
            *extra,
        )


@dataclass(frozen=True)
class VirtioWindow:
    """The virtio capability through which configuration accesses reach the BARs. [VIRTIO1.4 4.1.4.9]"""

    at: int | None = None
    name = "virtio_window"
    id = spec.CAP_VENDOR
    size_bytes = 20

    def registers(self, *, is_first):
        return (
            Register("cap_len", 0x02, 1, (Field("value", 0, 8, reset=self.size_bytes),)),
            Register("cfg_type", 0x03, 1, (Field("value", 0, 8, reset=virtio.CFG_PCI),)),
            Register("bar", 0x04, 1, (Field("value", 0, 8, RW),)),
            Register("offset", 0x08, 4, (Field("value", 0, 32, RW),)),
            Register("length", 0x0C, 4, (Field("value", 0, 32, RW),)),
            Register("pci_cfg_data", 0x10, 4, (Field("value", 0, 32, RW),)),
        )


Capability = PcieCapability | MsixCapability | VirtioCapability | VirtioWindow


@dataclass(frozen=True)
class FunctionDescription:
    """One function as its configuration space shows it.

    Capabilities appear in the chain in the order given. One without an offset of its own (``at``) follows the one in front of
    it, the first at 0x40.

    Raises
    ------
    :exc:`ValueError`
        When a number does not fit, BARs or capabilities overlap, or a capability names a place that no BAR has.
    """

    vendor_id: int
    device_id: int
    class_code: int  # 24 bits: class, subclass, programming interface
    bars: tuple[Bar, ...] = ()
    capabilities: tuple[Capability, ...] = (PcieCapability(),)
    revision: int = 1
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0

    def __post_init__(self):
        for name, value, width in (
            ("Vendor ID", self.vendor_id, 16), ("Device ID", self.device_id, 16), ("Class code", self.class_code, 24),
            ("Revision", self.revision, 8), ("Subsystem vendor ID", self.subsystem_vendor_id, 16), ("Subsystem ID", self.subsystem_id, 16),
        ):  # fmt: skip
            _check_bits(name, value, width)
        _check(self.vendor_id != 0xFFFF, "Vendor ID must be one that an absent function does not show", self.vendor_id)
        taken = [register for bar in self.bars for register in bar.registers]
        _check(len(taken) == len(set(taken)), "BARs must not share a register", taken)
        spans = []
        for capability in self.capabilities:
            for index, offset, length in getattr(capability, "spans", ()):
                bar = self.bar(index)
                _check(bar is not None, f"Capability {capability.name} must lie in a BAR of the function", index)
                _check(offset >= 0 and offset + length <= bar.size_bytes,
                       f"Capability {capability.name} must lie inside the {bar.size_bytes} bytes of BAR {index}", (offset, length))
                for other, start, size in spans:
                    _check(other != index or offset >= start + size or start >= offset + length,
                           f"Capability {capability.name} must not share bytes of BAR {index} with another", (offset, length))
                spans.append((index, offset, length))
        for kind in (PcieCapability, MsixCapability, VirtioWindow):
            found = [capability for capability in self.capabilities if isinstance(capability, kind)]
            _check(len(found) <= 1, f"A function must have at most one {kind.__name__}", found)
        structures = [capability for capability in self.capabilities if isinstance(capability, VirtioCapability)]
        _check(len(structures) <= STRUCTURES, f"A function must have at most {STRUCTURES} virtio structures", len(structures))
        self.map(is_first=True, is_multifunction=False)

    def bar(self, index):
        """Return the BAR that starts at register ``index``, or None."""
        return next((bar for bar in self.bars if bar.index == index), None)

    def capability(self, kind):
        """Return the capability of class ``kind``, or None."""
        return next((capability for capability in self.capabilities if isinstance(capability, kind)), None)

    def map(self, *, is_first, is_multifunction):
        """Return the :class:`..regs.table.Map` of the first 256 bytes of configuration space; ``is_first``: as function 0."""
        places, end = [], spec.HEADER_BYTES
        for capability in self.capabilities:
            at = end if capability.at is None else capability.at
            _check(at % 4 == 0, f"Offset of capability {capability.name} must be a multiple of 4", at)
            places.append(at)
            end = at + capability.size_bytes + -capability.size_bytes % 4
        blocks = [self._header(places[0] if places else 0, is_multifunction)]
        for n, (capability, at) in enumerate(zip(self.capabilities, places)):
            following = places[n + 1] if n + 1 < len(places) else 0
            blocks.append(Block(capability.name, at, capability.size_bytes, (
                Register("id", 0, 1, (Field("value", 0, 8, reset=capability.id),)),
                Register("next", 1, 1, (Field("value", 0, 8, reset=following),)),
                *capability.registers(is_first=is_first),
            )))  # fmt: skip
        return Map(spec.CAPABILITIES_END, blocks)

    def _header(self, first_capability, is_multifunction):
        bars = []
        for bar in self.bars:
            low = bar.size_bytes.bit_length() - 1
            bars.append(Register(f"bar_{bar.index}", spec.BAR_0 + 4 * bar.index, 4, (
                Field("type", 1, 2, reset=spec.BAR_TYPE_64 if bar.is_64 else 0),
                Field("prefetchable", 3, reset=int(bar.is_prefetchable)),
                Field("base", low, 32 - low, RW),
            )))  # fmt: skip
            if bar.is_64:
                bars.append(Register(f"bar_{bar.index + 1}", spec.BAR_0 + 4 * bar.index + 4, 4, (Field("base", 0, 32, RW),)))
        return Block("header", 0, spec.HEADER_BYTES, (
            Register("vendor_id", 0x00, 2, (Field("value", 0, 16, reset=self.vendor_id),)),
            Register("device_id", 0x02, 2, (Field("value", 0, 16, reset=self.device_id),)),
            Register("command", 0x04, 2, (
                *((Field("memory_enable", 1, 1, RW),) if self.bars else ()),
                Field("bus_master", 2, 1, RW),
                Field("parity_response", 6, 1, RW),
                Field("serr_enable", 8, 1, RW),
                Field("intx_disable", 10, 1, RW),
            )),
            Register("status", 0x06, 2, (Field("interrupt", 3), Field("capabilities", 4, reset=int(bool(self.capabilities))))),
            Register("revision", 0x08, 1, (Field("value", 0, 8, reset=self.revision),)),
            Register("programming_interface", 0x09, 1, (Field("value", 0, 8, reset=self.class_code & 0xFF),)),
            Register("class", 0x0A, 2, (Field("value", 0, 16, reset=self.class_code >> 8),)),
            Register("cache_line_size", 0x0C, 1, (Field("value", 0, 8, RW),)),
            Register("header_type", 0x0E, 1, (Field("multifunction", 7, reset=int(is_multifunction)),)),
            *bars,
            Register("subsystem_vendor_id", 0x2C, 2, (Field("value", 0, 16, reset=self.subsystem_vendor_id),)),
            Register("subsystem_id", 0x2E, 2, (Field("value", 0, 16, reset=self.subsystem_id),)),
            Register("capabilities_pointer", 0x34, 1, (Field("value", 0, 8, reset=first_capability),)),
            Register("interrupt_line", 0x3C, 1, (Field("value", 0, 8, RW),)),
        ))  # fmt: skip


def check_functions(functions):
    """Return ``functions`` as a tuple, or raise :exc:`ValueError` when they are not 1 to 8 descriptions."""
    functions = tuple(functions)
    _check(1 <= len(functions) <= 8, "Functions of a card must be between 1 and 8", len(functions))
    for function in functions:
        if not isinstance(function, FunctionDescription):
            raise TypeError(f"A function must be a FunctionDescription, not {function!r}")
    return functions


def bars_of(functions):
    """Return ``(function, Bar)`` for all BARs of a card: the order of every port that carries BAR values."""
    return tuple((number, bar) for number, function in enumerate(functions) for bar in function.bars)
