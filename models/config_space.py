"""The configuration space that a card of a given description must have: values, what software may write, resets. [PCIe5 7.5]

One configuration write is one update of one dword; masks act on the write, so that a BAR never holds a bit that it does
not have. What the function then does on its own (a message, a reset) is an event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from . import aer
from .aer import Cause, Correctable, Message, Uncorrectable
from .capabilities import (
    CAP_MSI,
    CAP_PCIE,
    CAP_PM,
    CAP_VENDOR,
    EXT_AER,
    EXT_ATS,
    EXT_PASID,
    EXT_PRI,
    EXT_SRIOV,
    INITIATE_FLR,
    VIRTIO_COMMON,
    VIRTIO_DEVICE,
    BarDescription,
    CapabilityDescription,
    FunctionDescription,
    acs_capability,
    aer_capability,
    ari_capability,
    ats_capability,
    dvsec_capability,
    msi_capability,
    msix_capability,
    pasid_capability,
    pcie_capability,
    power_capability,
    pri_capability,
    serial_number_capability,
    sriov_capability,
    vendor_capability,
    virtio_capability,
    virtual_function,
    vsec_capability,
)
from .config_registers import SIZE, Access, Registers, check_access

__all__ = [
    "Access", "BarDescription", "CapabilityDescription", "Cause", "Change", "ConfigEvent", "ConfigSpace", "Correctable",
    "FunctionDescription", "Message", "MsiMessage", "Uncorrectable", "acs_capability", "aer_capability", "ari_capability",
    "ats_capability", "dvsec_capability", "msi_capability", "msix_capability", "pasid_capability", "pcie_capability", "power_capability",
    "pri_capability", "serial_number_capability", "sriov_capability", "vendor_capability", "virtio_capability", "virtual_function",
    "vsec_capability",
]  # fmt: skip

ROM = 6  # number of the expansion ROM where BARs have 0 to 5

TIMEOUTS_US = {  # (least, most) of each range of the completion timeout, in microseconds [PCIe5 7.5.3.16]
    0x0: (50, 50_000), 0x1: (50, 100), 0x2: (1_000, 10_000), 0x5: (16_000, 55_000), 0x6: (65_000, 210_000),
    0x9: (260_000, 900_000), 0xA: (1_000_000, 3_500_000), 0xD: (4_000_000, 13_000_000), 0xE: (17_000_000, 64_000_000),
}  # fmt: skip


class Change(Enum):
    """What a configuration write or a reset makes the function do."""

    RESET, POWER_STATE, MSI, ATS_DISABLED, PRI_RESET, PRI_ENABLED, PRI_DISABLED, VFS_ENABLED, VFS_DISABLED = range(9)


@dataclass(frozen=True)
class MsiMessage:
    """The one-dword memory write of an interrupt. [PCIe5 6.1.4]"""

    address: int
    data: int


@dataclass(frozen=True)
class ConfigEvent:
    """``detail``: the new power state, the number of virtual functions or the :class:`MsiMessage`."""

    change: Change
    detail: int | MsiMessage | None = None


class ConfigSpace(Registers):
    """The configuration space of one function, as software must see it after any sequence of accesses.

    ValueError when the description contradicts itself: a 64-bit BAR in the last register, two BARs or two capabilities in
    one place, a capability outside its region.

    Where the specification leaves to software not to do a thing, this function ignores it: NumVFs and the page size while VF Enable
    is 1, the Smallest Translation Unit while ATS is enabled before the write, PASID settings while ATS is enabled, a power state that
    is not offered or that cannot follow. A reset on the way from D3hot is a function level reset.

    Attributes
    ----------
    events : list of :class:`ConfigEvent`
        What the function did so far; whoever is told of it empties the list.
    physical : :class:`ConfigSpace` or None
        Of a virtual function: that of its physical function, which has most of its settings.
    virtual_functions : list of :class:`ConfigSpace`
        Of a physical function: those that exist now, the first one first, if the description has them.
    has_header : :class:`bool`
        Whether the error that the First Error Pointer points at had a header: else the log says nothing.
    offsets : list of :class:`int`
        Of each standard capability, in the order of the description; ``ext_offsets`` of the extended ones.
    resets : :class:`int`
        Function level resets that software initiated so far.
    window : callable or None
        Called as ``window(bar, offset, length, data)`` for an access through the virtio PCI_CFG capability: with bytes for a
        write, with None for a read, whose bytes it returns.
    """

    def __init__(self, description: FunctionDescription, *, window: Callable[[int, int, int, bytes | None], bytes | None] | None = None,
                 physical: ConfigSpace | None = None):  # fmt: skip
        if (physical is not None) != description.is_virtual:
            raise ValueError(f"A virtual function, and no other, must have a physical one, not {physical!r}")
        self.window, self.physical = window, physical
        self.resets = 0
        self.events: list[ConfigEvent] = []
        self.virtual_functions: list[ConfigSpace] = []
        self.has_header = False
        super().__init__(description)
        self._rules = self._special()

    # -- rules of registers --

    def _special(self) -> dict[int, Callable[[int, int], int]]:
        """Return, for dwords with rules of their own, what is stored given (value before, value that the masks allow)."""
        rules: dict[int, Callable[[int, int], int]] = {}
        pm, sriov, pasid, ats = self.place(CAP_PM), self.ext_place(EXT_SRIOV), self.ext_place(EXT_PASID), self.ext_place(EXT_ATS)
        if pm is not None:
            rules[pm + 4] = self._power_state
        if ats is not None:
            rules[ats + 4] = lambda old, new: new & ~0x001F_0000 | old & 0x001F_0000 if old >> 31 else new
        if pasid is not None:
            rules[pasid + 4] = lambda old, new: old if self.ats_enable else new
        if sriov is not None:
            rules[sriov + 0x10] = rules[sriov + 0x20] = lambda old, new: old if self.read(sriov + 8, 2) & 1 else new
            for n in range(6):
                rules[sriov + 0x24 + 4 * n] = lambda old, new, n=n: self._virtual_bar(sriov, n, new)
        return rules

    def _power_state(self, old: int, new: int) -> int:
        """[PCIe5 7.5.2.2]"""
        before, after = old & 3, new & 3
        offered = {0, 3} | {n for n in (1, 2) if self.read((self.place(CAP_PM) or 0) + 2, 2) >> 8 + n & 1}
        is_way = after in offered and (after == 0 or after >= before)
        return new if is_way else new & ~3 | before

    def _virtual_bar(self, sriov: int, index: int, value: int) -> int:
        """A BAR of virtual functions decodes no less than one system page each. [PCIe5 9.3.3.13]"""
        is_upper = index and self._is_64(sriov, index - 1)
        return value if is_upper else value & ~(self._page(sriov) - 1 & 0xFFFF_FFF0)

    def _is_64(self, sriov: int, index: int) -> bool:
        return int.from_bytes(self._reset[sriov + 0x24 + 4 * index :][:4], "little") & 7 == 4

    def _page(self, sriov: int) -> int:
        sizes = self.read(sriov + 0x20, 4)
        return 4096 * (sizes & -sizes or 1)

    # -- what software does --

    def read(self, offset: int, size: int) -> int:
        """Return 1, 2 or 4 aligned bytes, little-endian."""
        check_access(offset, size)
        return self.read_dword(offset & ~3) >> 8 * (offset % 4) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 aligned bytes in one update."""
        check_access(offset, size)
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
        if register in self._rules:
            new = self._rules[register](old, new)
        self._values[register : register + 4] = new.to_bytes(4, "little")
        self._happened(register, old, new, value & mask)
        if self._device_control is not None and register == self._device_control and value & mask & INITIATE_FLR:
            self.function_level_reset()
            self.resets += 1
            self.events.append(ConfigEvent(Change.RESET))
        if self._pci_cfg is not None and register == self._pci_cfg + 16 and mask:
            access = self._window_access()
            if access is not None and self.window is not None:
                bar, at, length = access
                self.window(bar, at, length, bytes(self._values[register : register + length]))

    def _happened(self, register: int, old: int, new: int, value: int) -> None:
        """Do what follows a write."""
        pm, msi = self.place(CAP_PM), self.place(CAP_MSI)
        ats, pri, sriov = self.ext_place(EXT_ATS), self.ext_place(EXT_PRI), self.ext_place(EXT_SRIOV)
        if pm is not None and register == pm + 4 and (old ^ new) & 3:
            self.events.append(ConfigEvent(Change.POWER_STATE, new & 3))
            if old & 3 == 3 and not new & 8:
                self.function_level_reset()
                self.events.append(ConfigEvent(Change.RESET))
        if ats is not None and register == ats + 4 and old & ~new & 1 << 31:
            self.events.append(ConfigEvent(Change.ATS_DISABLED))
        if pri is not None and register == pri + 4:
            if (old ^ new) & 1:
                self.events.append(ConfigEvent(Change.PRI_ENABLED if new & 1 else Change.PRI_DISABLED))
            if new & 1 and not old & 1:
                self.replace_bits(pri + 4, 3 << 16, 0)  # enabled anew, its flags are 0 [PCIe5 10.5.2.2]
            if new & 1:
                self.replace_bits(pri + 4, 1 << 24, 0)  # Stopped, which the function sets again with set_bits
            elif value & 2:
                self.events.append(ConfigEvent(Change.PRI_RESET))
        if sriov is not None and register == sriov + 8 and (old ^ new) & 1:
            self._virtual()
        if sriov is not None and register == sriov + 0x20:
            for n in range(6):
                raw = self.read(sriov + 0x24 + 4 * n, 4)
                self.replace_bits(sriov + 0x24 + 4 * n, 0xFFFF_FFFF, self._virtual_bar(sriov, n, raw))
        if register == 4 or (msi is not None and msi <= register < msi + 24):
            self._unmasked()

    def _virtual(self) -> None:
        """Let virtual functions come and go."""
        had, known = len(self.virtual_functions), self.description.virtual
        self.virtual_functions = [] if known is None else [ConfigSpace(known, physical=self) for _ in range(self.virtual_count)]
        if self.virtual_count:
            self.events.append(ConfigEvent(Change.VFS_ENABLED, self.virtual_count))
        else:
            self.events.append(ConfigEvent(Change.VFS_DISABLED, had))

    def _window_access(self) -> tuple[int, int, int] | None:
        """Return (bar, offset, length) of the access that PCI_CFG asks for, None when it is not one. [VIRTIO1.4 4.1.4.9]"""
        at = self._pci_cfg or 0
        bar = self._values[at + 4]
        start, length = (int.from_bytes(self._values[n : n + 4], "little") for n in (at + 8, at + 12))
        if length not in (1, 2, 4) or start % length:
            return None
        for known in self.description.capabilities:
            if known.id != CAP_VENDOR or len(known.body) < 14:
                continue
            if VIRTIO_COMMON <= known.body[1] <= VIRTIO_DEVICE and known.body[2] == bar:
                first, size = (int.from_bytes(known.body[n : n + 4], "little") for n in (6, 10))
                if first <= start and start + length <= first + size:
                    return bar, start, length
        return None

    # -- what the function does --

    def function_level_reset(self) -> None:
        """Return everything to its reset value but what a function level reset leaves alone. [PCIe5 6.6.2]"""
        self._reset_but(self._kept, self._sticky, self._hwinit)

    def hot_reset(self) -> None:
        """Do what a hot reset, or the link going down, does: only sticky and HwInit bits stay. [PCIe5 6.6.1]"""
        self._reset_but(self._sticky, self._hwinit)

    def power_on(self) -> None:
        """Return everything to its reset value."""
        self._reset_but()
        self.has_header = False

    def _reset_but(self, *keeping: bytearray) -> None:
        reset, values, *kept = (int.from_bytes(cells, "little") for cells in (self._reset, self._values, *keeping))
        mask = 0
        for bits in kept:
            mask |= bits
        self._values[:] = (reset & ~mask | values & mask).to_bytes(SIZE, "little")
        self.virtual_functions = []

    def report_error(self, what: Cause | Uncorrectable | Correctable, header: Sequence[int] | None = None, *,
                     is_advisory: bool | None = None) -> Message | None:  # fmt: skip
        """Log an error and return the message that must be sent for it: see :func:`.aer.report`."""
        return aer.report(self, what, header, is_advisory=is_advisory)

    def interrupt(self, vector: int) -> MsiMessage | None:
        """Return the message that must be sent for an MSI vector now; None when MSI is off, or when it only becomes pending.

        A vector is pending while its mask bit, or a function that may not send, holds it; the message comes as an event then.
        [PCIe5 6.1.4.3, 7.7.1]
        """
        at = self.place(CAP_MSI)
        if at is None or not 0 <= vector < self.msi_vectors:
            raise ValueError(f"An MSI vector must be one of those that software allocated, not {vector!r}")
        flags = self.read(at + 2, 2)
        if not flags & 1:
            return None
        if flags >> 8 & 1:
            masks = at + 12 + 4 * (flags >> 7 & 1)
            if self.read(masks, 4) >> vector & 1 or not self.may_request:
                self.set_bits(masks + 4, 4, 1 << vector)
                return None
        return self._message(vector) if self.may_request else None

    def _message(self, vector: int) -> MsiMessage:
        at = self.place(CAP_MSI) or 0
        is_64 = self.read(at + 2, 2) >> 7 & 1
        data = self.read(at + 8 + 4 * is_64, 2)
        address = self.read(at + 4, 4) | (self.read(at + 8, 4) << 32 if is_64 else 0)
        return MsiMessage(address, data & ~(self.msi_vectors - 1) | vector)

    def _unmasked(self) -> None:
        """Send what was pending and no longer is held."""
        at = self.place(CAP_MSI)
        if at is None or self.read(at + 2, 2) & 0x101 != 0x101 or not self.may_request:
            return
        masks = at + 12 + 4 * (self.read(at + 2, 2) >> 7 & 1)
        free = self.read(masks + 4, 4) & ~self.read(masks, 4)
        self.replace_bits(masks + 4, free, 0)
        self.events += [ConfigEvent(Change.MSI, self._message(n)) for n in range(self.msi_vectors) if free >> n & 1]

    # -- what the rest of the function must know --

    @property
    def memory_enable(self) -> bool:
        """Memory Space Enable."""
        return bool(self._values[4] & 2)

    @property
    def bus_master(self) -> bool:
        """Bus Master Enable."""
        return bool(self._values[4] & 4)

    @property
    def pcie(self) -> int | None:
        """Offset of the PCI Express capability."""
        return self.place(CAP_PCIE)

    @property
    def power_state(self) -> int:
        """0 for D0 to 3 for D3hot."""
        at = self.place(CAP_PM)
        return 0 if at is None else self._values[at + 4] & 3

    @property
    def may_request(self) -> bool:
        """Whether the function may send requests other than messages: Bus Master Enable, in D0."""
        return self.bus_master and not self.power_state and (self.physical is None or not self.physical.power_state)

    @property
    def msi_vectors(self) -> int:
        """MSI vectors that software allocated, never more than the function asked for; 0 without the capability. [PCIe5 7.7.1.2]"""
        at = self.place(CAP_MSI)
        if at is None:
            return 0
        flags = self.read(at + 2, 2)
        return 1 << min(flags >> 4 & 7, flags >> 1 & 7)

    @property
    def ats_enable(self) -> bool:
        """ATS Enable."""
        at = self.ext_place(EXT_ATS)
        return at is not None and bool(self.read(at + 6, 2) >> 15)

    @property
    def stu_bytes(self) -> int:
        """Smallest unit of a translation in bytes; a virtual function has that of its physical one. [PCIe5 10.5.1.3]"""
        space = self if self.physical is None else self.physical
        at = space.ext_place(EXT_ATS)
        return 4096 << (0 if at is None else space.read(at + 6, 2) & 0x1F)

    @property
    def completion_timeout_us(self) -> tuple[int, int] | None:
        """Least and most microseconds until a completion is given up; None: never. What is not offered is the default range."""
        space = self if self.physical is None else self.physical
        at = space.pcie
        if at is None:
            return TIMEOUTS_US[0]
        offered, control = space.read(at + 0x24, 4), space.read(at + 0x28, 2)
        if control & 0x10 and offered & 0x10:
            return None
        choice = control & 0xF
        has_range = choice in TIMEOUTS_US and offered >> (choice >> 2) & 1
        return TIMEOUTS_US[choice if has_range else 0]

    def unspecified(self) -> dict[int, int]:
        """Return the bits that may be anything now, by dword, for :meth:`differences`: a log without a valid pointer. [PCIe5 6.2.4.2]"""
        at = self.ext_place(EXT_AER)
        if at is None:
            return {}
        has_first = self.read(at + 4, 4) >> (self.read(at + 0x18, 4) & 0x1F) & 1
        log = {} if has_first and self.has_header else {at + 0x1C + 4 * n: 0xFFFF_FFFF for n in range(4)}
        return log if has_first else log | {at + 0x18: 0x1F}

    # -- virtual functions --

    @property
    def virtual_count(self) -> int:
        """Virtual functions that exist: NumVFs, no more than TotalVFs, while VF Enable is 1. [PCIe5 9.3.3.7]"""
        at = self.ext_place(EXT_SRIOV)
        return min(self.read(at + 0x10, 2), self.read(at + 0x0E, 2)) if at is not None and self.read(at + 8, 2) & 1 else 0

    def virtual_routing_id(self, routing_id: int, number: int) -> int:
        """Return the routing ID of virtual function ``number``, from 1, of the physical function ``routing_id``. [PCIe5 9.2.1.2]"""
        at = self.ext_place(EXT_SRIOV)
        if at is None or not 1 <= number <= self.read(at + 0x0E, 2):
            raise ValueError(f"A virtual function must have a number between 1 and TotalVFs, not {number!r}")
        return routing_id + self.read(at + 0x14, 2) + (number - 1) * self.read(at + 0x16, 2) & 0xFFFF

    def virtual_decode(self, address: int) -> tuple[int, int, int] | None:
        """Return (number from 1, BAR, offset) of the virtual function that a memory address belongs to. [PCIe5 9.2.1.1]"""
        at = self.ext_place(EXT_SRIOV)
        if at is None or not self.read(at + 8, 2) & 8 or self.power_state:
            return None
        for n in range(6):
            raw, rw = (int.from_bytes(cells[at + 0x24 + 4 * n :][:8], "little") for cells in (self._values, self._rw))
            width = 64 if self._is_64(at, n) else 32
            rw &= (1 << width) - 1
            if not rw or (n and self._is_64(at, n - 1)):
                continue
            size = max(rw & -rw, self._page(at))
            base = raw & rw & -size
            if base <= address < base + size * self.virtual_count:
                return (address - base) // size + 1, n, (address - base) % size
        return None

    def bar_address(self, index: int) -> int:
        """Return the address that software gave a BAR; 6 is the expansion ROM."""
        if index == ROM and self.description.rom_bytes:
            return self.read(0x30, 4) & -self.description.rom_bytes
        bar = self.description.bars[index]
        raw = int.from_bytes(self._values[0x10 + 4 * index : 0x18 + 4 * index], "little")
        return raw & ~0xF if bar.is_64 else raw & (0xFFFF_FFFC if bar.is_io else 0xFFFF_FFF0)

    def decode(self, address: int) -> tuple[int, int] | None:
        """Return (BAR, offset) that a memory address belongs to; None while memory space is off, and outside of D0. BAR 6 is the ROM."""
        if self.memory_enable and not self.power_state:
            for index, bar in self.description.bars.items():
                if not bar.is_io and self.bar_address(index) <= address < self.bar_address(index) + bar.size:
                    return index, address - self.bar_address(index)
            size = self.description.rom_bytes
            if size and self._values[0x30] & 1 and self.bar_address(ROM) <= address < self.bar_address(ROM) + size:
                return ROM, address - self.bar_address(ROM)
        return None
