"""The configuration space that a card of a given description must have: values, what software may write, resets. [PCIe5 7.5]

One configuration write is one update of one dword; masks act on the write, so that a BAR never holds a bit that it does
not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["BarDescription", "CapabilityDescription", "ConfigSpace", "FunctionDescription", "msix_capability", "pcie_capability",
           "vendor_capability", "virtio_capability"]  # fmt: skip

SIZE = 4096  # bytes of the configuration space of a function [PCIe5 7.2]
FIRST_CAPABILITY, FIRST_EXT_CAPABILITY = 0x40, 0x100  # [PCIe5 7.5.1.1.11, 7.6.3]

CAP_VENDOR, CAP_PCIE, CAP_MSIX = 0x09, 0x10, 0x11  # capability IDs
VIRTIO_COMMON, VIRTIO_NOTIFY, VIRTIO_ISR, VIRTIO_DEVICE, VIRTIO_PCI_CFG = 1, 2, 3, 4, 5  # cfg_type [VIRTIO1.4 4.1.4]

COMMAND_RW = 0x0546  # Memory Space, Bus Master, Parity Error Response, SERR#, Interrupt Disable [PCIe5 7.5.1.1.3]
STATUS_RW1C = 0xF900  # [PCIe5 7.5.1.1.4]
STATUS_CAPABILITIES = 0x0010
DEVICE_CONTROL_RESET = 0x2810  # Relaxed Ordering and No Snoop enabled, MRRS 512 [PCIe5 7.5.3.4]
DEVICE_CONTROL_RW = 0x78FF  # without Extended Tag, Phantom Functions, Aux Power, FLR
EXTENDED_TAG, INITIATE_FLR = 1 << 8, 1 << 15
LINK_CONTROL_RW = 0x00CB  # ASPM, RCB, Common Clock, Extended Synch [PCIe5 7.5.3.7]


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
    """

    id: int
    body: bytes
    rw: int = 0
    rw1c: int = 0
    offset: int | None = None
    kept: int = 0
    version: int = 1  # of an extended one


def pcie_capability(*, mps_supported: int = 512, ext_tag: bool = True, flr: bool = False, link_capabilities: int = 0,
                    link_status: int = 0, device_capabilities_2: int = 1 << 4, device_control_2_rw: int = 1 << 4,
                    link_capabilities_2: int = 0, link_control_2: int = 0, link_control_2_rw: int = 0,
                    ext_tag_reset: bool = False, offset: int | None = None) -> CapabilityDescription:  # fmt: skip
    """Return a PCI Express capability, version 2, of an endpoint; what a link brings along is given as numbers. [PCIe5 7.5.3]"""
    if mps_supported not in (128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"Max_Payload_Size supported must be a power of two between 128 and 4096, not {mps_supported!r}")
    body = bytearray(58)
    rw = rw1c = kept = 0

    def put(at: int, size: int, value: int) -> None:
        body[at - 2 : at - 2 + size] = value.to_bytes(size, "little")

    put(0x02, 2, 0x0002)
    put(0x04, 4, mps_supported.bit_length() - 8 | ext_tag << 5 | 1 << 15 | flr << 28)  # 15: Role-Based Error Reporting
    put(0x08, 2, DEVICE_CONTROL_RESET | (EXTENDED_TAG if ext_tag and ext_tag_reset else 0))
    rw |= (DEVICE_CONTROL_RW | (EXTENDED_TAG if ext_tag else 0)) << 8 * 6
    kept |= 0x00E0 << 8 * 6  # Max_Payload_Size [PCIe5 6.6.2]
    rw1c |= 0x000F << 8 * 8
    put(0x0C, 4, link_capabilities)
    rw |= LINK_CONTROL_RW << 8 * 14
    kept |= LINK_CONTROL_RW << 8 * 14
    put(0x12, 2, link_status)
    put(0x24, 4, device_capabilities_2)
    rw |= device_control_2_rw << 8 * 38
    put(0x2C, 4, link_capabilities_2)
    put(0x30, 2, link_control_2)
    rw |= link_control_2_rw << 8 * 46
    kept |= link_control_2_rw << 8 * 46
    return CapabilityDescription(CAP_PCIE, bytes(body), rw, rw1c, offset, kept)


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


@dataclass(frozen=True)
class FunctionDescription:
    """What a function says of itself. ``capabilities`` are chained in the order given."""

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


class ConfigSpace:
    """The configuration space of one function, as software must see it after any sequence of accesses.

    ValueError when the description contradicts itself: a 64-bit BAR in the last register, two BARs or two capabilities in
    one place, a capability outside its region.

    Attributes
    ----------
    offsets : list of :class:`int`
        Of each standard capability, in the order of the description; ``ext_offsets`` of the extended ones.
    resets : :class:`int`
        Function level resets that software initiated so far.
    window : callable or None
        Called as ``window(bar, offset, length, data)`` for an access through the virtio PCI_CFG capability: with bytes for a
        write, with None for a read, whose bytes it returns.
    """

    def __init__(self, description: FunctionDescription, *, window: Callable[[int, int, int, bytes | None], bytes | None] | None = None):
        self.description, self.window = description, window
        self.resets = 0
        self._reset, self._rw, self._rw1c, self._kept = (bytearray(SIZE) for _ in range(4))
        self._names: dict[int, str] = {}
        self._device_control: int | None = None  # offset, when a function level reset is offered
        self._pci_cfg: int | None = None  # offset of the PCI_CFG capability
        self._header()
        self.offsets = self._chain(description.capabilities, FIRST_CAPABILITY, FIRST_EXT_CAPABILITY, 2)
        self.ext_offsets = self._chain(description.ext_capabilities, FIRST_EXT_CAPABILITY, SIZE, 4)
        self._values = bytearray(self._reset)

    # -- what the description makes --

    def _put(self, at: int, size: int, value: int, name: str, *, rw: int = 0, rw1c: int = 0) -> None:
        self._reset[at : at + size] = value.to_bytes(size, "little")
        self._rw[at : at + size] = rw.to_bytes(size, "little")
        self._rw1c[at : at + size] = rw1c.to_bytes(size, "little")
        for n in range(at // 4 * 4, at + size, 4):
            self._names[n] = f"{self._names[n]}, {name}" if n in self._names and name not in self._names[n] else name

    def _header(self) -> None:
        """Fill the type 0 header. [PCIe5 7.5.1.2]"""
        known = self.description
        self._put(0x00, 2, known.vendor, "Vendor ID")
        self._put(0x02, 2, known.device, "Device ID")
        has_io = any(bar.is_io for bar in known.bars.values())
        self._put(0x04, 2, 0, "Command", rw=COMMAND_RW | has_io)
        self._put(0x06, 2, STATUS_CAPABILITIES if known.capabilities else 0, "Status", rw1c=STATUS_RW1C)
        self._put(0x08, 1, known.revision, "Revision ID")
        self._put(0x09, 3, known.class_code, "Class Code")
        self._put(0x0C, 1, 0, "Cache Line Size", rw=0xFF)
        self._put(0x0E, 1, known.is_multi_function << 7, "Header Type")
        taken = set()
        for index in sorted(known.bars):
            bar = known.bars[index]
            needs = {index, index + 1} if bar.is_64 else {index}
            if not needs <= set(range(6)) or needs & taken:
                raise ValueError(f"BAR {index} must have registers of its own among 0 to 5, not {sorted(needs)!r}")
            taken |= needs
            kind = 1 if bar.is_io else bar.is_64 << 2 | bar.prefetch << 3
            width = 8 if bar.is_64 else 4
            self._put(0x10 + 4 * index, width, kind, f"BAR {index}", rw=(1 << 8 * width) - bar.size)
        self._put(0x2C, 2, known.subsystem_vendor, "Subsystem Vendor ID")
        self._put(0x2E, 2, known.subsystem, "Subsystem ID")
        self._put(0x3C, 1, 0, "Interrupt Line", rw=0xFF)
        self._put(0x3D, 1, known.interrupt_pin, "Interrupt Pin")

    def _chain(self, capabilities: Sequence[CapabilityDescription], start: int, stop: int, header: int) -> list[int]:
        """Place capabilities and link them; return their offsets."""
        offsets, at, taken = [], start, []
        for known in capabilities:
            at = known.offset if known.offset is not None else (at + 3) // 4 * 4
            end = at + header + len(known.body)
            if at % 4 or at < start or end > stop:
                raise ValueError(f"Capability {known.id:#x} must lie on a dword between {start:#x} and {stop:#x}, "
                                 f"not at {at:#x} to {end:#x}")  # fmt: skip
            if any(at < other_end and other < end for other, other_end in taken):
                raise ValueError(f"Capability {known.id:#x} must not overlap another, not at {at:#x} to {end:#x}")
            if header == 4 and not offsets and at != start:
                raise ValueError(f"The first extended capability must lie at {start:#x}, not at {at:#x}")
            taken.append((at, end))
            offsets.append(at)
            at = end
        if header == 2 and offsets:
            self._put(0x34, 1, offsets[0], "Capabilities Pointer")
        for n in range(len(offsets)):
            known, at = capabilities[n], offsets[n]
            after = offsets[n + 1] if n + 1 < len(offsets) else 0
            name = f"{'extended ' if header == 4 else ''}capability {known.id:#x} at {at:#x}"
            self._put(at, header, known.id | after << 8 if header == 2 else known.id | known.version << 16 | after << 20, name)
            self._put(at + header, len(known.body), int.from_bytes(known.body, "little"), name, rw=known.rw, rw1c=known.rw1c)
            self._kept[at + header : at + header + len(known.body)] = known.kept.to_bytes(len(known.body), "little")
            if header == 2 and known.id == CAP_PCIE and known.body[5] >> 4 & 1:
                self._device_control = at + 8
            if header == 2 and known.id == CAP_VENDOR and known.body[1] == VIRTIO_PCI_CFG:
                self._pci_cfg = at
        return offsets

    # -- what software does --

    def read(self, offset: int, size: int) -> int:
        """Return 1, 2 or 4 aligned bytes, little-endian."""
        _check(offset, size)
        return self.read_dword(offset & ~3) >> 8 * (offset % 4) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 aligned bytes in one update."""
        _check(offset, size)
        if not 0 <= value < 1 << 8 * size:
            raise ValueError(f"A value to write must fit in {8 * size} bits without a sign, not {value!r}")
        self.write_dword(offset & ~3, (1 << size) - 1 << offset % 4, value << 8 * (offset % 4))

    def read_dword(self, register: int) -> int:
        """Return the dword at byte offset ``register``, as one configuration read returns it."""
        if self._pci_cfg is not None and register == self._pci_cfg + 16:
            access = self._window_access()
            if access is not None and self.window is not None:
                bar, at, length = access
                data = self.window(bar, at, length, None)
                if data is not None:
                    self._values[register : register + length] = data
        return int.from_bytes(self._values[register : register + 4], "little")

    def write_dword(self, register: int, enables: int, value: int) -> None:
        """Write the enabled bytes of the dword at byte offset ``register``, as one configuration write does."""
        mask = sum(0xFF << 8 * n for n in range(4) if enables >> n & 1)
        old, rw, rw1c = (int.from_bytes(cells[register : register + 4], "little") for cells in (self._values, self._rw, self._rw1c))
        new = (old & ~(rw & mask) | value & rw & mask) & ~(value & rw1c & mask)
        self._values[register : register + 4] = new.to_bytes(4, "little")
        if self._device_control is not None and register == self._device_control and value & mask & INITIATE_FLR:
            self.function_level_reset()
            self.resets += 1
        if self._pci_cfg is not None and register == self._pci_cfg + 16 and mask:
            access = self._window_access()
            if access is not None and self.window is not None:
                bar, at, length = access
                self.window(bar, at, length, bytes(self._values[register : register + length]))

    def _window_access(self) -> tuple[int, int, int] | None:
        """Return (bar, offset, length) of the access that PCI_CFG asks for, None when it is not one. [VIRTIO1.4 4.1.4.9]"""
        at = self._pci_cfg or 0
        bar = self._values[at + 4]
        start, length = (int.from_bytes(self._values[n : n + 4], "little") for n in (at + 8, at + 12))
        if length not in (1, 2, 4) or start % length:
            return None
        for known in self.description.capabilities:
            if known.id == CAP_VENDOR and VIRTIO_COMMON <= known.body[1] <= VIRTIO_DEVICE and known.body[2] == bar:
                first, size = (int.from_bytes(known.body[n : n + 4], "little") for n in (6, 10))
                if first <= start and start + length <= first + size:
                    return bar, start, length
        return None

    # -- what the function does --

    def function_level_reset(self) -> None:
        """Return everything to its reset value but what a function level reset leaves alone. [PCIe5 6.6.2]"""
        for n in range(SIZE):
            self._values[n] = self._reset[n] & ~self._kept[n] | self._values[n] & self._kept[n]

    def set_bits(self, offset: int, size: int, bits: int) -> None:
        """Let the function itself set bits, of Status or Device Status for instance."""
        _check(offset, size)
        value = int.from_bytes(self._values[offset : offset + size], "little") | bits
        self._values[offset : offset + size] = value.to_bytes(size, "little")

    # -- what the rest of the function must know --

    @property
    def memory_enable(self) -> bool:
        """Memory Space Enable."""
        return bool(self._values[4] & 2)

    @property
    def bus_master(self) -> bool:
        """Bus Master Enable."""
        return bool(self._values[4] & 4)

    def bar_address(self, index: int) -> int:
        """Return the address that software gave a BAR."""
        bar = self.description.bars[index]
        raw = int.from_bytes(self._values[0x10 + 4 * index : 0x18 + 4 * index], "little")
        return raw & ~0xF if bar.is_64 else raw & (0xFFFF_FFFC if bar.is_io else 0xFFFF_FFF0)

    def decode(self, address: int) -> tuple[int, int] | None:
        """Return (BAR, offset) that a memory address belongs to; None while memory space is off."""
        if self.memory_enable:
            for index, bar in self.description.bars.items():
                if not bar.is_io and self.bar_address(index) <= address < self.bar_address(index) + bar.size:
                    return index, address - self.bar_address(index)
        return None

    def differences(self, dwords: Sequence[int], *, ignore: dict[int, int] | None = None) -> list[str]:
        """Return where ``dwords``, read from a card from offset 0 up, are not what they must be.

        ``ignore``: byte offset of a dword -> bits that may be anything.
        """
        found = []
        for n in range(len(dwords)):
            wanted = int.from_bytes(self._values[4 * n : 4 * n + 4], "little")
            wrong = (wanted ^ dwords[n]) & ~(ignore or {}).get(4 * n, 0)
            if wrong:
                found.append(f"{4 * n:#05x} ({self._names.get(4 * n, 'nothing there')}) is {dwords[n]:#010x}, must be {wanted:#010x}")
        return found


def _check(offset: int, size: int) -> None:
    if size not in (1, 2, 4) or not 0 <= offset < SIZE or offset % size:
        raise ValueError(f"A configuration access must be 1, 2 or 4 aligned bytes below {SIZE}, not {size!r} at {offset!r}")
