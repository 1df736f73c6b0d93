"""The registers that a description makes: where they lie, what they hold, which bits may change and when they are reset. [PCIe5 7.4]"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from .capabilities import CAP_PCIE, CAP_VENDOR, VIRTIO_PCI_CFG, CapabilityDescription, FunctionDescription

__all__ = ["SIZE", "Access", "Registers", "check_access"]

SIZE = 4096  # bytes of the configuration space of a function [PCIe5 7.2]
FIRST_CAPABILITY, FIRST_EXT_CAPABILITY = 0x40, 0x100  # [PCIe5 7.5.1.1.11, 7.6.3]
COMMAND_RW = 0x0546  # Memory Space, Bus Master, Parity Error Response, SERR#, Interrupt Disable [PCIe5 7.5.1.1.3]
VIRTUAL_COMMAND_RW = 0x0004  # Bus Master [PCIe5 9.3.4.1.3]
STATUS_RW1C = 0xF900  # [PCIe5 7.5.1.1.4]
STATUS_CAPABILITIES = 0x0010


class Access(Enum):
    """Kind of a bit. [PCIe5 7.4]"""

    RO, RW, RW1C, ROS, RWS, RW1CS, HWINIT = range(7)


class Registers:
    """The bytes of a configuration space with the masks of its bits; :class:`.config_space.ConfigSpace` lets them live."""

    def __init__(self, description: FunctionDescription):
        self.description = description
        self._reset, self._rw, self._rw1c, self._kept, self._sticky, self._hwinit = (bytearray(SIZE) for _ in range(6))
        self._names: dict[int, str] = {}
        self._places: dict[tuple[bool, int], int] = {}  # (is extended, ID) -> offset of the first
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
        self._put(0x04, 2, 0, "Command", rw=VIRTUAL_COMMAND_RW if known.is_virtual else COMMAND_RW | has_io)
        self._put(0x06, 2, STATUS_CAPABILITIES if known.capabilities else 0, "Status", rw1c=STATUS_RW1C)
        self._put(0x08, 1, known.revision, "Revision ID")
        self._put(0x09, 3, known.class_code, "Class Code")
        self._put(0x0C, 1, 0, "Cache Line Size", rw=0 if known.is_virtual else 0xFF)
        self._put(0x0E, 1, known.is_multi_function << 7, "Header Type")
        taken = set()
        for index in sorted(known.bars):
            bar = known.bars[index]
            needs = {index, index + 1} if bar.is_64 else {index}
            if not needs <= set(range(6)) or needs & taken:
                raise ValueError(f"BAR {index} must have registers of its own among 0 to 5, not {sorted(needs)!r}")
            taken |= needs
            width = 8 if bar.is_64 else 4
            self._put(0x10 + 4 * index, width, bar.kind, f"BAR {index}", rw=(1 << 8 * width) - bar.size)
        self._put(0x2C, 2, known.subsystem_vendor, "Subsystem Vendor ID")
        self._put(0x2E, 2, known.subsystem, "Subsystem ID")
        if known.rom_bytes:
            self._put(0x30, 4, 0, "Expansion ROM", rw=(1 << 32) - known.rom_bytes | 1)
        self._put(0x3C, 1, 0, "Interrupt Line", rw=0 if known.is_virtual else 0xFF)
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
            for cells, mask in ((self._kept, known.kept), (self._sticky, known.sticky), (self._hwinit, known.hwinit)):
                cells[at + header : at + header + len(known.body)] = mask.to_bytes(len(known.body), "little")
            self._places.setdefault((header == 4, known.id), at)
            if header == 2 and known.id == CAP_PCIE and known.body[5] >> 4 & 1:
                self._device_control = at + 8
            if header == 2 and known.id == CAP_VENDOR and len(known.body) >= 18 and known.body[1] == VIRTIO_PCI_CFG:
                self._pci_cfg = at
        return offsets

    # -- bits --

    def set_bits(self, offset: int, size: int, bits: int) -> None:
        """Let the function itself set bits, of Status or Device Status for instance."""
        check_access(offset, size)
        value = int.from_bytes(self._values[offset : offset + size], "little") | bits
        self._values[offset : offset + size] = value.to_bytes(size, "little")

    def replace_bits(self, register: int, mask: int, bits: int) -> None:
        """Let the function itself give bits of a dword another value: Transactions Pending, Stopped, a log."""
        value = int.from_bytes(self._values[register : register + 4], "little")
        self._values[register : register + 4] = (value & ~mask | bits & mask).to_bytes(4, "little")

    def rw1c_bits(self, register: int) -> int:
        """Return which bits of a dword a 1 clears."""
        return int.from_bytes(self._rw1c[register : register + 4], "little")

    def access(self, offset: int) -> tuple[Access, ...]:
        """Return the kind of each bit of the byte at ``offset``, bit 0 first."""
        check_access(offset, 1)
        kinds = []
        for bit in range(8):
            rw, rw1c, sticky, hwinit = (cells[offset] >> bit & 1 for cells in (self._rw, self._rw1c, self._sticky, self._hwinit))
            plain = Access.RW if rw else Access.RW1C if rw1c else Access.HWINIT if hwinit else Access.RO
            kept = {Access.RW: Access.RWS, Access.RW1C: Access.RW1CS, Access.RO: Access.ROS}
            kinds.append(kept.get(plain, plain) if sticky else plain)
        return tuple(kinds)

    # -- places --

    def place(self, id: int) -> int | None:
        """Return the offset of the first capability with this ID."""
        return self._places.get((False, id))

    def ext_place(self, id: int) -> int | None:
        """Return the offset of the first extended capability with this ID."""
        return self._places.get((True, id))

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


def check_access(offset: int, size: int) -> None:
    """ValueError unless this is 1, 2 or 4 aligned bytes of a configuration space."""
    if size not in (1, 2, 4) or not 0 <= offset < SIZE or offset % size:
        raise ValueError(f"A configuration access must be 1, 2 or 4 aligned bytes below {SIZE}, not {size!r} at {offset!r}")
