"""What a function of a card says of itself: BARs and capabilities, each field with its reset value and who may change it. [PCIe5 7]

A description is data; :mod:`.config_space` gives it behaviour. A field is read-only unless ``rw`` or ``rw1c`` says otherwise, and
goes back to its reset value at every reset unless ``kept``, ``sticky`` or ``hwinit`` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

__all__ = [
    "CAP_MSI", "CAP_MSIX", "CAP_PCIE", "CAP_PM", "CAP_VENDOR", "EXT_ACS", "EXT_AER", "EXT_ARI", "EXT_ATS", "EXT_DSN", "EXT_DVSEC",
    "EXT_PASID", "EXT_PRI", "EXT_SRIOV", "EXT_VSEC", "BarDescription", "CapabilityDescription", "FunctionDescription", "acs_capability",
    "aer_capability", "ari_capability", "ats_capability", "dvsec_capability", "msi_capability", "msix_capability", "pasid_capability",
    "pcie_capability", "power_capability", "pri_capability", "serial_number_capability", "sriov_capability", "vendor_capability",
    "virtio_capability", "virtual_capability", "virtual_function", "vsec_capability",
]  # fmt: skip

CAP_PM, CAP_MSI, CAP_VENDOR, CAP_PCIE, CAP_MSIX = 0x01, 0x05, 0x09, 0x10, 0x11  # capability IDs
EXT_AER, EXT_DSN, EXT_VSEC, EXT_ACS, EXT_ARI, EXT_ATS, EXT_SRIOV = 0x0001, 0x0003, 0x000B, 0x000D, 0x000E, 0x000F, 0x0010
EXT_PRI, EXT_PASID, EXT_DVSEC = 0x0013, 0x001B, 0x0023
VIRTIO_COMMON, VIRTIO_NOTIFY, VIRTIO_ISR, VIRTIO_DEVICE, VIRTIO_PCI_CFG = 1, 2, 3, 4, 5  # cfg_type [VIRTIO1.4 4.1.4]

DEVICE_CONTROL_RESET = 0x2810  # Relaxed Ordering and No Snoop enabled, MRRS 512 [PCIe5 7.5.3.4]
DEVICE_CONTROL_RW = 0x78FF  # without Extended Tag, Phantom Functions, Aux Power, FLR
EXTENDED_TAG, INITIATE_FLR = 1 << 8, 1 << 15
LINK_CONTROL_RW = 0x00CB  # ASPM, RCB, Common Clock, Extended Synch [PCIe5 7.5.3.7]
TIMEOUT_RANGES = (0x0, 0x1, 0x2, 0x3, 0x6, 0x7, 0xE, 0xF)  # none, A, B, AB, BC, ABC, BCD, ABCD [PCIe5 7.5.3.15]

UNCORRECTABLE = 1 << 4 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 22  # [PCIe5 7.8.4.2]
UNCORRECTABLE_FATAL = 1 << 4 | 1 << 5 | 1 << 13 | 1 << 17 | 1 << 18 | 1 << 22  # severities at reset [PCIe5 7.8.4.4]
UNCORRECTABLE_MASKED = 1 << 22 | 1 << 26  # masks at reset: internal, poisoned egress [PCIe5 7.8.4.3]
CORRECTABLE = 1 << 0 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13  # [PCIe5 7.8.4.5]
CORRECTABLE_MASKED = 1 << 13 | 1 << 14 | 1 << 15  # masks at reset: advisory, internal, log overflow [PCIe5 7.8.4.6]


@dataclass(frozen=True)
class BarDescription:
    """A BAR: ``size`` bytes, a power of two; at least 128 (memory) or 4 (I/O)."""

    size: int
    is_64: bool = True
    prefetch: bool = False
    is_io: bool = False

    def __post_init__(self):
        if self.size & (self.size - 1) or not (4 if self.is_io else 128) <= self.size:
            raise ValueError(f"Size of a BAR must be a power of two and at least {4 if self.is_io else 128}, not {self.size!r}")
        if self.size > 1 << (63 if self.is_64 else 31):
            raise ValueError(f"Size of a BAR of {64 if self.is_64 else 32} bits must leave one bit to write, not {self.size!r}")
        if self.is_io and (self.is_64 or self.prefetch):
            raise ValueError("An I/O BAR must have neither 64 bits nor prefetching")

    @property
    def kind(self) -> int:
        """The low bits that never change. [PCIe5 7.5.1.2.1]"""
        return 1 if self.is_io else self.is_64 << 2 | self.prefetch << 3


@dataclass(frozen=True)
class CapabilityDescription:
    """A capability: ``body`` are its reset bytes behind the header (2 bytes, or 4 of an extended one), then what may be written.

    Attributes
    ----------
    rw, rw1c : :class:`int`
        Masks over the body as one little-endian number: bits that take the written value, bits that a 1 clears.
    offset : :class:`int` or None
        Where it lies; None: behind the one before it, on the next dword.
    kept : :class:`int`
        Mask of the bits of the body that a function level reset leaves alone.
    sticky : :class:`int`
        Mask of the bits that neither a function level reset nor a hot reset changes: ROS, RWS, RW1CS. [PCIe5 7.4]
    hwinit : :class:`int`
        Mask of the bits that the card fills in once; only power-on changes them.
    """

    id: int
    body: bytes
    rw: int = 0
    rw1c: int = 0
    offset: int | None = None
    kept: int = 0
    version: int = 1  # of an extended one
    sticky: int = 0
    hwinit: int = 0

    def __post_init__(self):
        if self.rw & self.rw1c or (self.rw | self.rw1c) & self.hwinit:
            raise ValueError(f"A bit of capability {self.id:#x} must have one kind of access, "
                             f"not {self.rw & self.rw1c | (self.rw | self.rw1c) & self.hwinit:#x}")  # fmt: skip


@dataclass(frozen=True)
class FunctionDescription:
    """What a function says of itself. ``capabilities`` are chained in the order given.

    ``rom_bytes``: size of the expansion ROM, 0 for none. ``is_virtual``: made by :func:`virtual_function`, which ``virtual`` of a
    physical function with SR-IOV is too.
    """

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    interrupt_pin: int = 0
    is_multi_function: bool = False
    bars: dict[int, BarDescription] = field(default_factory=dict)
    capabilities: tuple[CapabilityDescription, ...] = ()
    ext_capabilities: tuple[CapabilityDescription, ...] = ()
    rom_bytes: int = 0
    is_virtual: bool = False
    virtual: FunctionDescription | None = None

    def __post_init__(self):
        if self.rom_bytes and (self.rom_bytes & (self.rom_bytes - 1) or not 2048 <= self.rom_bytes <= 1 << 24):
            raise ValueError(f"Size of an expansion ROM must be a power of two between 2048 and 16777216, not {self.rom_bytes!r}")
        if self.virtual is not None and not self.virtual.is_virtual:
            raise ValueError("Virtual functions must be described by virtual_function(), not by a physical function")


class _Body:
    """A capability in the making; places count from its first byte."""

    def __init__(self, id: int, size: int, header: int):
        self.id, self.size, self.header, self.reset = id, size - header, header, 0
        self.masks = dict.fromkeys(("rw", "rw1c", "kept", "sticky", "hwinit"), 0)

    def put(self, at: int, reset: int = 0, **masks: int) -> None:
        """Add a register at byte ``at``: its reset value and masks over it."""
        shift = 8 * (at - self.header)
        self.reset |= reset << shift
        for name, mask in masks.items():
            self.masks[name] |= mask << shift

    def done(self, offset: int | None, version: int = 1) -> CapabilityDescription:
        return CapabilityDescription(self.id, self.reset.to_bytes(self.size, "little"), offset=offset, version=version, **self.masks)


def power_capability(*, d1: bool = False, d2: bool = False, pme: int = 0, no_soft_reset: bool = False,
                     offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return a Power Management capability; ``pme``: states that can signal PME, bit 0 is D0, bit 4 D3cold. [PCIe5 7.5.2]"""
    if not 0 <= pme < 32:
        raise ValueError(f"PME support must have five bits, not {pme!r}")
    made = _Body(CAP_PM, 8, 2)
    made.put(2, 3 | d1 << 9 | d2 << 10 | pme << 11)
    enable, status = (1 << 8, 1 << 15) if pme else (0, 0)
    made.put(4, no_soft_reset << 3, rw=3 | enable, rw1c=status, sticky=(enable | status) if pme >> 4 else 0)
    return made.done(offset)


def msi_capability(vectors: int = 1, *, is_64: bool = True, has_masks: bool = True, offset: int | None = None) -> CapabilityDescription:
    """Return an MSI capability of 10, 14, 20 or 24 bytes. [PCIe5 7.7.1]"""
    if vectors not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"Number of MSI vectors must be a power of two up to 32, not {vectors!r}")
    made = _Body(CAP_MSI, 10 + 4 * is_64 + 10 * has_masks, 2)
    made.put(2, (vectors.bit_length() - 1) << 1 | is_64 << 7 | has_masks << 8, rw=0x71)
    made.put(4, rw=0xFFFF_FFFC)
    if is_64:
        made.put(8, rw=0xFFFF_FFFF)
    made.put(8 + 4 * is_64, rw=0xFFFF)
    if has_masks:
        made.put(12 + 4 * is_64, rw=(1 << vectors) - 1)
    return made.done(offset)


def msix_capability(count: int, *, table_bar: int, table_offset: int, pba_bar: int, pba_offset: int,
                    offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return an MSI-X capability with ``count`` vectors. [PCIe5 7.7.2]"""
    if not 1 <= count <= 2048:
        raise ValueError(f"Number of vectors must be between 1 and 2048, not {count!r}")
    for name, bar, at in (("table", table_bar, table_offset), ("PBA", pba_bar, pba_offset)):
        if not 0 <= bar <= 5 or at % 8:
            raise ValueError(f"MSI-X {name} must lie in BAR 0 to 5 on 8 bytes, not in BAR {bar!r} at {at!r}")
    places = ((table_offset | table_bar).to_bytes(4, "little"), (pba_offset | pba_bar).to_bytes(4, "little"))
    body = (count - 1).to_bytes(2, "little") + b"".join(places)
    return CapabilityDescription(CAP_MSIX, body, rw=0xC000, offset=offset)


def pcie_capability(*, mps_supported: int = 512, ext_tag: bool = True, flr: bool = False, link_capabilities: int = 0,
                    link_status: int = 0, device_capabilities_2: int = 1 << 4, device_control_2_rw: int = 1 << 4,
                    link_capabilities_2: int = 0, link_control_2: int = 0, link_control_2_rw: int = 0,
                    ext_tag_reset: bool = False, timeout_ranges: int = 0, atomic_requester: bool = False, atomic_completer: int = 0,
                    tag_10_completer: bool = False, tag_10_requester: bool = False, ido: bool = False, prefixes: int = 0,
                    offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return a PCI Express capability, version 2, of an endpoint; what a link brings along is given as numbers. [PCIe5 7.5.3]

    The words for AtomicOps (``atomic_completer``: bits for 32, 64 and 128-bit CAS), 10-bit tags, ID-based ordering, ranges of the
    completion timeout (bits A to D) and up to 4 End-End TLP prefixes are added to the two numbers for Device Capabilities 2 and Device
    Control 2. Prefixes need the Fmt field of three bits. [PCIe5 2.2.10]
    """
    if mps_supported not in (128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"Max_Payload_Size supported must be a power of two between 128 and 4096, not {mps_supported!r}")
    if timeout_ranges not in TIMEOUT_RANGES:
        raise ValueError(f"Completion timeout ranges must be none, A, B, AB, BC, ABC, BCD or ABCD, not {timeout_ranges!r}")
    if not 0 <= atomic_completer < 8:
        raise ValueError(f"AtomicOps of a completer must be three bits, not {atomic_completer!r}")
    if tag_10_requester and not tag_10_completer:
        raise ValueError("A requester of 10-bit tags must also complete them [PCIe5 7.5.3.15], not False")
    if not 0 <= prefixes <= 4:
        raise ValueError(f"End-End TLP prefixes must be at most 4, not {prefixes!r}")
    made = _Body(CAP_PCIE, 60, 2)
    made.put(0x02, 0x0002)
    made.put(0x04, mps_supported.bit_length() - 8 | ext_tag << 5 | 1 << 15 | flr << 28)  # 15: Role-Based Error Reporting
    made.put(0x08, DEVICE_CONTROL_RESET | (EXTENDED_TAG if ext_tag and ext_tag_reset else 0),
             rw=DEVICE_CONTROL_RW | (EXTENDED_TAG if ext_tag else 0), kept=0x00E0)  # Max_Payload_Size [PCIe5 6.6.2]  # fmt: skip
    made.put(0x0A, rw1c=0x000F)
    made.put(0x0C, link_capabilities)
    made.put(0x10, rw=LINK_CONTROL_RW, kept=LINK_CONTROL_RW)
    made.put(0x12, link_status)
    made.put(0x24, device_capabilities_2 | timeout_ranges | atomic_completer << 7 | tag_10_completer << 16 | tag_10_requester << 17
             | (0b11 << 20 | prefixes % 4 << 22 if prefixes else 0))  # fmt: skip
    enables = (0xF if timeout_ranges else 0) | atomic_requester << 6 | (3 << 8 if ido else 0) | tag_10_requester << 12
    made.put(0x28, rw=device_control_2_rw | enables)
    made.put(0x2C, link_capabilities_2)
    made.put(0x30, link_control_2, rw=link_control_2_rw, sticky=link_control_2_rw)  # RWS [PCIe5 7.5.3.19]
    return made.done(offset)


def vendor_capability(content: bytes, *, rw: int = 0, offset: int | None = None) -> CapabilityDescription:
    """Return a vendor-specific capability; its length byte is added in front of ``content``. [PCIe5 7.9.4]"""
    return CapabilityDescription(CAP_VENDOR, bytes([3 + len(content)]) + content, rw << 8, offset=offset)


def virtio_capability(cfg_type: int, bar: int = 0, at: int = 0, length: int = 0, *, notify_off_multiplier: int = 0, id: int = 0,
                      offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return a virtio capability for a structure of ``length`` bytes at ``at`` in a BAR. [VIRTIO1.4 4.1.4]

    NOTIFY has the multiplier behind it, PCI_CFG the data window; that one's bar, offset, length and data are software's.
    """
    content = bytes([cfg_type, bar, id, 0, 0]) + at.to_bytes(4, "little") + length.to_bytes(4, "little")
    if cfg_type == VIRTIO_NOTIFY:
        return vendor_capability(content + notify_off_multiplier.to_bytes(4, "little"), offset=offset)
    if cfg_type == VIRTIO_PCI_CFG:
        writable = 0xFF << 8 | (1 << 96) - 1 << 40  # bar; offset, length, data
        return vendor_capability(content + bytes(4), rw=writable, offset=offset)
    return vendor_capability(content, offset=offset)


# -- extended --


def aer_capability(*, uncorrectable: int = UNCORRECTABLE, correctable: int = CORRECTABLE, severity: int = UNCORRECTABLE_FATAL,
                   offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return an Advanced Error Reporting capability, version 2, without ECRC, with one header in its log. [PCIe5 7.8.4]

    Parameters
    ----------
    uncorrectable, correctable : :class:`int`
        The errors that the function reports: only these have status and mask bits, and severities to write.
    severity : :class:`int`
        Reset value of the severities; the specification leaves those of other errors to the card.
    """
    made = _Body(EXT_AER, 0x48, 4)
    made.put(0x04, rw1c=uncorrectable, sticky=uncorrectable)
    made.put(0x08, UNCORRECTABLE_MASKED & uncorrectable, rw=uncorrectable, sticky=uncorrectable)
    made.put(0x0C, severity, rw=uncorrectable, sticky=uncorrectable)
    made.put(0x10, rw1c=correctable, sticky=correctable)
    made.put(0x14, CORRECTABLE_MASKED & correctable, rw=correctable, sticky=correctable)
    made.put(0x18, sticky=0x1F)  # First Error Pointer
    made.put(0x1C, sticky=(1 << 128) - 1)  # Header Log
    return made.done(offset, version=2)


def serial_number_capability(number: int, *, offset: int | None = None) -> CapabilityDescription:
    """Return a Device Serial Number capability with an EUI-64. [PCIe5 7.9.3]"""
    return CapabilityDescription(EXT_DSN, number.to_bytes(8, "little"), offset=offset)


def ats_capability(*, queue_depth: int = 32, page_aligned: bool = True, global_invalidate: bool = False, relaxed: bool = False,
                   offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return an ATS capability whose function buffers ``queue_depth`` Invalidate Requests, 1 to 32. [PCIe5 10.5.1]"""
    if not 1 <= queue_depth <= 32:
        raise ValueError(f"Invalidate queue depth must be between 1 and 32, not {queue_depth!r}")
    made = _Body(EXT_ATS, 8, 4)
    made.put(4, queue_depth % 32 | page_aligned << 5 | global_invalidate << 6 | relaxed << 7)
    made.put(6, rw=0x801F)
    return made.done(offset)


def pri_capability(capacity: int, *, pasid_required: bool = False, offset: int | None = None) -> CapabilityDescription:
    """Return a Page Request capability that can hold ``capacity`` requests; it starts stopped. [PCIe5 10.5.2]"""
    if not 0 <= capacity < 1 << 32:
        raise ValueError(f"Outstanding Page Request Capacity must have 32 bits, not {capacity!r}")
    made = _Body(EXT_PRI, 16, 4)
    made.put(4, rw=1)
    made.put(6, 1 << 8 | pasid_required << 15, rw1c=3)
    made.put(8, capacity)
    made.put(12, rw=0xFFFF_FFFF)
    return made.done(offset)


def pasid_capability(width: int, *, execute: bool = False, privileged: bool = False, offset: int | None = None) -> CapabilityDescription:
    """Return a PASID capability for PASIDs of ``width`` bits, 0 to 20. [PCIe5 7.8.8]"""
    if not 0 <= width <= 20:
        raise ValueError(f"Width of a PASID must be between 0 and 20 bits, not {width!r}")
    made = _Body(EXT_PASID, 8, 4)
    made.put(4, execute << 1 | privileged << 2 | width << 8)
    made.put(6, rw=1 | execute << 1 | privileged << 2)
    return made.done(offset)


def acs_capability(features: int = 0, *, egress_bits: int = 0, offset: int | None = None) -> CapabilityDescription:
    """Return an ACS capability with the offered ``features``, bits 0 (source validation) to 6 (direct translated). [PCIe5 7.7.8]

    Egress control (bit 5) has ``egress_bits``, 1 to 255, in the vector behind it.
    """
    if not 0 <= features < 128:
        raise ValueError(f"ACS features must have seven bits, not {features!r}")
    if bool(features >> 5 & 1) != (0 < egress_bits < 256) or not 0 <= egress_bits < 256:
        raise ValueError(f"Bits of an egress control vector must be 1 to 255 with egress control and 0 without, not {egress_bits!r}")
    made = _Body(EXT_ACS, 8 + (egress_bits + 31) // 32 * 4, 4)
    made.put(4, features | egress_bits << 8)
    made.put(6, rw=features)
    if egress_bits:
        made.put(8, rw=(1 << egress_bits) - 1)
    return made.done(offset)


def ari_capability(next_function: int = 0, *, offset: int | None = None) -> CapabilityDescription:
    """Return an ARI capability. [PCIe5 7.8.7]"""
    if not 0 <= next_function < 256:
        raise ValueError(f"Next function number must have eight bits, not {next_function!r}")
    return CapabilityDescription(EXT_ARI, bytes([0, next_function, 0, 0]), offset=offset)


def vsec_capability(id: int, revision: int, content: bytes, *, rw: int = 0, offset: int | None = None) -> CapabilityDescription:
    """Return a vendor-specific extended capability; ``rw`` is a mask over ``content``. [PCIe5 7.9.5]"""
    made = _Body(EXT_VSEC, 8 + len(content), 4)
    made.put(4, id | revision << 16 | (8 + len(content)) << 20)
    made.put(8, int.from_bytes(content, "little"), rw=rw)
    return made.done(offset)


def dvsec_capability(vendor: int, id: int, revision: int, content: bytes, *, rw: int = 0,
                     offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return a designated vendor-specific extended capability; ``rw`` is a mask over ``content``. [PCIe5 7.9.6]"""
    made = _Body(EXT_DVSEC, 10 + len(content), 4)
    made.put(4, vendor | revision << 16 | (10 + len(content)) << 20)
    made.put(8, id)
    made.put(10, int.from_bytes(content, "little"), rw=rw)
    return made.done(offset)


def sriov_capability(total: int, *, first_offset: int, stride: int, device: int, bars: dict[int, BarDescription] | None = None,
                     page_sizes: int = 0x553, has_ari: bool = False, dependency: int = 0,
                     offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return an SR-IOV capability for up to ``total`` virtual functions. [PCIe5 9.3.3]

    ``bars`` are those of one virtual function; ``page_sizes``: bit n is 2^(12 + n) bytes, of which 4 KiB must be one; ``has_ari``: the
    lowest physical function, whose ARI Capable Hierarchy bit is software's.
    """
    if not 1 <= total <= 0xFFFF or not 1 <= first_offset <= 0xFFFF or not 1 <= stride <= 0xFFFF:
        raise ValueError(f"Virtual functions, first offset and stride must be 1 to 65535, not {total!r}, {first_offset!r}, {stride!r}")
    if not page_sizes & 1 or page_sizes >> 20:
        raise ValueError(f"Supported page sizes must have 4 KiB and none above 2 GiB, not {page_sizes!r}")
    made = _Body(EXT_SRIOV, 0x40, 4)
    made.put(0x08, rw=1 << 0 | 1 << 3 | has_ari << 4)
    made.put(0x0C, total | total << 16, hwinit=0xFFFF_FFFF)
    made.put(0x10, rw=0xFFFF)
    made.put(0x12, dependency)
    made.put(0x14, first_offset | stride << 16)
    made.put(0x1A, device)
    made.put(0x1C, page_sizes)
    made.put(0x20, 1, rw=page_sizes)
    taken: set[int] = set()
    for index, bar in sorted((bars or {}).items()):
        needs = {index, index + 1} if bar.is_64 else {index}
        if bar.is_io or not needs <= set(range(6)) or needs & taken:
            raise ValueError(f"BAR {index} of virtual functions must be memory with registers of its own among 0 to 5, not {bar!r}")
        taken |= needs
        made.put(0x24 + 4 * index, bar.kind, rw=(1 << (64 if bar.is_64 else 32)) - bar.size)
    return made.done(offset)


# -- virtual functions --


def virtual_capability(known: CapabilityDescription, *, is_extended: bool) -> CapabilityDescription:
    """Return what a virtual function has of a capability of its physical function: no settings of the link or of all. [PCIe5 9.3]"""
    body = int.from_bytes(known.body, "little")
    if not is_extended and known.id == CAP_PCIE:  # Device Control, Link Control, Link Status and the like are the physical function's
        mine = 0xFFFF | 0xFFFF_FFFF << 16 | 0xFFFF_FFFF << 8 * 10 | 0xFFFF_FFFF << 8 * 34 | 0xFFFF_FFFF << 8 * 42
        body = body & mine | 1 << 8 * 2 + 28
        return replace(known, body=body.to_bytes(len(known.body), "little"), rw=0, kept=0, sticky=0)
    if is_extended and known.id == EXT_ATS:
        return replace(known, body=(body & ~0x1F).to_bytes(4, "little"), rw=0x8000 << 16)
    if is_extended and known.id == EXT_AER:
        log = 0xFFFF_FFFF | 0xFFFF_FFFF << 8 * 12
        return replace(known, body=bytes(len(known.body)), rw=0, sticky=known.sticky & (log | (1 << 160) - 1 << 8 * 20))
    if is_extended and known.id in (EXT_PRI, EXT_PASID, EXT_SRIOV):
        raise ValueError(f"A virtual function must share the physical function's, not have an extended capability {known.id:#x}")
    return known


def virtual_function(physical: FunctionDescription, *, capabilities: tuple[CapabilityDescription, ...] = (),
                     ext_capabilities: tuple[CapabilityDescription, ...] = ()) -> FunctionDescription:  # fmt: skip
    """Return the description of the virtual functions of ``physical``: IDs FFFF, no BARs, no ROM, no pin. [PCIe5 9.3.4]"""
    return replace(
        physical, vendor=0xFFFF, device=0xFFFF, interrupt_pin=0, is_multi_function=False, bars={}, rom_bytes=0, is_virtual=True,
        virtual=None,
        capabilities=tuple(virtual_capability(known, is_extended=False) for known in capabilities),
        ext_capabilities=tuple(virtual_capability(known, is_extended=True) for known in ext_capabilities))  # fmt: skip
