"""The configuration space of a device as VFIO gives it to a guest: which bits are real, which a shadow, which nobody may write.

A bit that is virtual is read from, and written to, a shadow; a bit that is not is the device's. A bit that is not writable drops
what is written. The rules are those of Linux 6.12; what follows from a write beyond the bits is an event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple, Protocol

__all__ = ["BeyondSpace", "Effect", "EffectKind", "PassThrough", "PciDevice"]

STANDARD, HEADER, EXTENDED = 0x100, 0x40, 0x1000
STANDARD_STEPS, EXTENDED_STEPS = (STANDARD - HEADER) // 4, (EXTENDED - STANDARD) // 4  # bounds of the two walks
MEMORY, IO, INTX_DISABLE, CAP_LIST = 1 << 1, 1 << 0, 1 << 10, 1 << 4
BARS = (*range(0x10, 0x28, 4), 0x30)  # and the expansion ROM


class Cap(IntEnum):
    """Standard capabilities that a guest may see; the others are hidden."""

    PM, AGP, VPD, MSI, PCIX, HT, VENDOR, EXP, MSIX, SATA, AF = 0x01, 0x02, 0x03, 0x05, 0x07, 0x08, 0x09, 0x10, 0x11, 0x12, 0x13


class Ext(IntEnum):
    """Extended capabilities that a guest may see; the others, PASID among them, are hidden."""

    AER, VC, DSN, POWER, MFVC, VC9, VENDOR, ACS, ARI = 0x01, 0x02, 0x03, 0x04, 0x08, 0x09, 0x0B, 0x0D, 0x0E
    ATS, SRIOV, MULTICAST, PRI, REBAR, DPA, TPH, LTR, DVSEC = 0x0F, 0x10, 0x12, 0x13, 0x15, 0x16, 0x17, 0x18, 0x23


LENGTHS = {Cap.PM: 8, Cap.AGP: 12, Cap.VPD: 8, Cap.MSIX: 12, Cap.AF: 6}
EXT_LENGTHS = {Ext.AER: 0x2C, Ext.DSN: 12, Ext.POWER: 16, Ext.ARI: 8, Ext.ATS: 8, Ext.SRIOV: 64, Ext.MULTICAST: 0x28, Ext.PRI: 16,
               Ext.LTR: 8}  # fmt: skip

PM_SUPPORT, PM_EVENTS, PM_STATE = 0xF800, 1 << 8 | 1 << 15, 3
FLR, PHANTOM, PAYLOAD, READ_REQUEST, ARI_FORWARDING = 1 << 15, 1 << 9, 0x00E0, 0x7000, 1 << 5
UNCORRECTABLE, CORRECTABLE, ECRC_ENABLES = 0x03FF_F031, 0xF1C1, 1 << 6 | 1 << 8  # what the driver knows of, whatever the device has
VPD_FLAG = 1 << 15


class BeyondSpace(Exception):
    """An access that does not end inside the configuration space."""


class EffectKind(Enum):
    """What the host does besides changing bits."""

    RESET = "the function is reset"
    POWER_STATE = "the host sets the power state of the detail"
    MAPPINGS_REVOKED = "the guest's direct mappings of BARs are taken away"
    BARS_RESTORED = "real BARs are written again, after a reset that nobody announced"
    INTX_MASKED = "the host masks INTx"
    INTX_UNMASKED = "the host unmasks INTx"
    READ_REQUEST = "the host sets a Max_Read_Request_Size of the detail in bytes"
    VPD_READ = "VPD at the detail is read"
    VPD_WRITTEN = "VPD at the detail is written"


@dataclass(frozen=True)
class Effect:
    """``detail``: as the kind says."""

    kind: EffectKind
    detail: int = 0


class PciDevice(Protocol):
    """A real configuration space; :class:`.config_space.ConfigSpace` is one."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


class _Write(NamedTuple):
    """A piece of a write: where in its capability, its bytes, and the shadow of the capability before it."""

    place: int
    size: int
    value: int
    before: int


class _Region:
    """A capability as the view knows it."""

    def __init__(self, id: int, start: int, length: int):
        self.id, self.start, self.length = id, start, length
        self.has_masks = False  # else reads come from the device, but for the header
        self.is_raw = False  # writes go to the device whatever the masks
        self.virtual, self.writable = bytearray(length + 4), bytearray(length + 4)
        self.after: Callable[[_Region, _Write], None] | None = None  # when it was written

    def mask(self, at: int, size: int, virtual: int, writable: int) -> None:
        """Say which bits of ``size`` bytes at ``at`` are virtual and which may be written; -1 is all."""
        self.has_masks = True
        for cells, bits in ((self.virtual, virtual), (self.writable, writable)):
            cells[at : at + size] = (bits & (1 << 8 * size) - 1).to_bytes(size, "little")


class PassThrough:
    """What a guest sees of, and may do to, a device that is passed through to it.

    An access is cut into aligned pieces of 4, 2 or 1 bytes that lie in one capability, each of which is one access.

    Parameters
    ----------
    device : :class:`PciDevice`
        The real function, as it is when the guest gets it.
    size : :class:`int`
        Bytes of its configuration space: 256 or 4096.
    bars : dict
        BAR -> bytes, of those that the host gave an address; 6 is the expansion ROM.
    ids : tuple of two :class:`int` or None
        Vendor and device of a virtual function, which shows FFFF itself; None for any other function.
    has_intx : :class:`bool`
        Whether the host can give the guest a pin interrupt.
    msi_log2 : :class:`int`
        Most MSI vectors that the host gives, as a power of two.
    vpd : :class:`bytearray` or None
        Vital product data of the device; without, accesses to it never end.
    carry_out : callable or None
        Called with each :class:`Effect` as it happens, to do it to the device; None: nobody does.

    Attributes
    ----------
    effects : list of :class:`Effect`
        What the host did so far.
    msi_is_on : :class:`bool`
        Whether the guest's program enabled MSI at the host, without which the enable bit stays 0.
    hidden : list of (:class:`bool`, :class:`int`)
        Capabilities that are not in the guest's list: is extended, ID.
    conflicts : list of :class:`int`
        Bytes that two capabilities claim; the later one has them.
    """

    def __init__(self, device: PciDevice, *, size: int = EXTENDED, bars: dict[int, int] | None = None, ids: tuple[int, int] | None = None,
                 has_intx: bool = True, msi_log2: int = 5, vpd: bytearray | None = None,
                 carry_out: Callable[[Effect], None] | None = None):  # fmt: skip
        if size not in (STANDARD, EXTENDED):
            raise ValueError(f"Size of a configuration space must be 256 or 4096, not {size!r}")
        if not 0 <= msi_log2 <= 5:
            raise ValueError(f"MSI vectors must be a power of two between 0 and 5, not {msi_log2!r}")
        self.device, self.size, self.bars, self.ids, self.msi_log2, self.vpd = device, size, dict(bars or {}), ids, msi_log2, vpd
        self.carry_out = carry_out
        self.effects: list[Effect] = []
        self.msi_is_on = self._is_masked = False
        self.hidden: list[tuple[bool, int]] = []
        self.conflicts: list[int] = []
        self._shadow = bytearray(size)
        self._map: list[_Region | None] = [None] * size
        self._header(has_intx)
        self._walk()
        if self._has_extended():
            self._walk_extended()

    # -- what is there --

    def _real(self, at: int, size: int = 1) -> int:
        """Read the device where a capability may lie anywhere; what lies beyond its space is all ones."""
        if at + size > self.size:
            return (1 << 8 * size) - 1
        if at % size == 0:
            return self.device.read(at, size)
        return sum(self.device.read(at + n, 1) << 8 * n for n in range(size))

    def _get(self, at: int, size: int) -> int:
        return int.from_bytes(self._shadow[at : at + size], "little")

    def _set(self, at: int, size: int, value: int) -> None:
        self._shadow[at : at + size] = value.to_bytes(size, "little")

    def _claim(self, region: _Region) -> None:
        """Give a capability its bytes and copy them into the shadow, in pieces as large as may be."""
        at = region.start
        end = min(at + region.length, STANDARD if at < STANDARD else self.size)
        self.conflicts += [n for n in range(at, end) if self._map[n] is not None]
        self._map[at:end] = [region] * (end - at)
        while at < end:
            size = next(n for n in (4, 2, 1) if at % n == 0 and at + n <= end)
            self._set(at, size, self.device.read(at, size))
            at += size

    def _header(self, has_intx: bool) -> None:
        region = _Region(0, 0, HEADER)
        region.mask(0x00, 4, -1, 0)
        region.mask(0x04, 2, INTX_DISABLE, -1)
        region.mask(0x06, 2, CAP_LIST, 0)
        for at in (0x0C, 0x0D, 0x0F):  # cache line size, latency timer, BIST
            region.mask(at, 1, 0, -1)
        for at in BARS:
            region.mask(at, 4, -1, -1)
        region.mask(0x34, 1, -1, 0)
        region.mask(0x3C, 1, -1, -1)
        region.mask(0x3D, 1, -1, 0)
        region.after = self._after_header
        self._claim(region)
        self._real_bars = [self._get(at, 4) for at in BARS]
        if self.ids is not None:
            self._set(0, 4, self.ids[0] | self.ids[1] << 16)
            self._set(4, 2, self._get(4, 2) | MEMORY)  # which the physical function switches
        if self.ids is not None or not has_intx:
            self._set(0x3D, 1, 0)

    def _walk(self) -> None:
        """Find standard capabilities, in at most 48 steps."""
        if not self.device.read(0x06, 2) & CAP_LIST:
            return
        at, link, found = self.device.read(0x34, 1), 0x34, 0
        for _ in range(STANDARD_STEPS):
            if not at:
                break
            id, after = self._real(at), self._real(at + 1)
            region = self._standard(id, at)
            if region is None:
                self.hidden.append((False, id))
                self._set(link, 1, after)
            else:
                self._claim(region)
                if id == Cap.PM:  # it signals nothing to a guest
                    self._set(at + 2, 2, self._get(at + 2, 2) & ~PM_SUPPORT)
                    self._set(at + 4, 2, self._get(at + 4, 2) & ~PM_EVENTS)
                link, found = at + 1, found + 1
            at = after
        if not found:
            self._set(6, 2, self._get(6, 2) & ~CAP_LIST)

    def _has_extended(self) -> bool:
        """Extended capabilities are looked for behind a PCI Express capability, where the first dword is not 0."""
        has_express = any(region is not None and region.id == Cap.EXP for region in self._map[HEADER:STANDARD])
        return self.size > STANDARD and has_express and self.device.read(STANDARD, 4) != 0

    def _walk_extended(self) -> None:
        """Find extended capabilities, in at most 960 steps."""
        at, link, found = STANDARD, None, 0
        for _ in range(EXTENDED_STEPS):
            if at < STANDARD:
                break
            header = self.device.read(at, 4)
            id, after = header & 0xFFFF, header >> 20 & 0xFFC
            region = self._extended(id, at)
            if region is None:
                self.hidden.append((True, id))
            if region is None and link is not None:
                self._set(link, 4, self._get(link, 4) & 0x000F_FFFF | after << 20)
                at = after
                continue
            self._claim(region or _Region(id, at, 4))
            if region is None:
                self._set(at, 4, self._get(at, 4) & 0xFFC0_0000)  # the first one stays as an anchor, without its ID
            else:
                found += 1
            link, at = at, after
        if not found:
            self._set(STANDARD, 4, 0)

    def _standard(self, id: int, at: int) -> _Region | None:
        """Return the capability at ``at`` with its masks, None for one to hide."""
        flags = self._real(at + 2, 2)
        lengths: dict[int, int] = {
            **LENGTHS, Cap.MSI: 10 + 4 * (flags >> 7 & 1) + 10 * (flags >> 8 & 1), Cap.PCIX: 24 if flags >> 12 & 3 else 8,
            Cap.HT: 24 if flags >> 13 in (0, 1) else 28, Cap.VENDOR: flags & 0xFF, Cap.EXP: 0x14 if flags & 0xF == 1 else 0x3C,
            Cap.SATA: 16 if self._real(at + 4) & 0xF == 0xF else 8}  # fmt: skip
        if not lengths.get(id):
            return None
        region = _Region(id, at, lengths[id])
        if id in (Cap.PM, Cap.VPD, Cap.PCIX, Cap.EXP, Cap.AF, Cap.MSI):
            region.mask(1, 1, -1, 0)
        match id:
            case Cap.PM:
                region.mask(2, 2, PM_SUPPORT, 0)
                region.mask(4, 4, PM_EVENTS, ~(PM_EVENTS | PM_STATE))
                region.after = self._after_power
            case Cap.VPD:
                region.mask(2, 6, -1, -1)
                region.after = self._after_vpd
            case Cap.PCIX:
                region.mask(2, 2, 0, -1)
                if region.length == 24:
                    region.mask(8, 4, 0, -1)
            case Cap.EXP:
                region.mask(8, 2, FLR | PAYLOAD | READ_REQUEST, ~PHANTOM)
                if region.length > 0x28:
                    region.mask(0x28, 2, 0, ~ARI_FORWARDING)
                region.after = self._after_express
            case Cap.AF:
                region.mask(4, 1, 1, 1)
                region.after = self._after_features
            case Cap.MSI:
                wide = 4 * (flags >> 7 & 1)
                region.mask(2, 1, -1, -1)
                region.mask(4, 4 + wide, -1, -1)
                region.mask(8 + wide, 2, -1, -1)
                if flags >> 8 & 1:
                    region.mask(12 + wide, 8, 0, -1)
                region.after = self._after_msi
            case Cap.VENDOR:
                region.is_raw = True
        return region

    def _extended(self, id: int, at: int) -> _Region | None:
        first, low = self._real(at + 4, 4), self._real(at + 4)
        classes = 0x10 + 12 * (1 + (first & 7))  # of virtual channels; their tables are never writable
        egress = 8 + ((self._real(at + 5) or 256) + 31) // 32 * 4
        lengths: dict[int, int] = {
            **EXT_LENGTHS, Ext.VENDOR: first >> 20, Ext.DVSEC: first >> 20, Ext.VC: classes, Ext.VC9: classes, Ext.MFVC: classes,
            Ext.ACS: egress if low & 0x20 else 8, Ext.REBAR: 4 + 8 * (self._real(at + 8) >> 5), Ext.DPA: 17 + (low & 0x1F),
            Ext.TPH: 12 + (2 * (first >> 16 & 0x7FF) + 2 if first >> 9 & 3 == 1 else 0)}  # fmt: skip
        if not lengths.get(id):
            return None
        region = _Region(id, at, lengths[id])
        if id in (Ext.VENDOR, Ext.DVSEC):
            region.is_raw = True
        if id in (Ext.AER, Ext.POWER):
            region.mask(0, 4, -1, 0)
        if id == Ext.POWER:
            region.mask(4, 1, 0, -1)
        if id == Ext.AER:
            for place, bits in ((4, UNCORRECTABLE), (8, UNCORRECTABLE), (12, UNCORRECTABLE), (16, CORRECTABLE), (20, CORRECTABLE),
                                (24, ECRC_ENABLES)):  # fmt: skip
                region.mask(place, 4, 0, bits)
        return region

    # -- what the guest does --

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes, little-endian; :exc:`BeyondSpace` when they do not lie inside."""
        value, done = 0, 0
        for at, part in self._parts(offset, size):
            value |= self._read(at, part) << 8 * done
            done += part
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes, little-endian; :exc:`BeyondSpace`, and nothing written, when they do not lie inside."""
        if not 0 <= value < 1 << 8 * size:
            raise ValueError(f"A value to write must fit in {8 * size} bits without a sign, not {value!r}")
        for at, part in self._parts(offset, size):
            self._write(at, part, value >> 8 * (at - offset) & (1 << 8 * part) - 1)

    def _parts(self, offset: int, size: int) -> list[tuple[int, int]]:
        """Cut an access into (offset, size): aligned, in one dword and one capability each."""
        if not 0 <= offset < self.size or size < 0 or offset + size > self.size:
            raise BeyondSpace(f"{size} bytes at {offset:#x}")
        parts, at = [], offset
        while at < offset + size:
            room = 1
            while (at + room) % 4 and at + room < offset + size and self._map[at + room] is self._map[at]:
                room += 1
            parts.append((at, next(n for n in (4, 2, 1) if n <= room and at % n == 0)))
            at += parts[-1][1]
        return parts

    def _read(self, at: int, size: int) -> int:
        region = self._map[at]
        if region is None:
            return self.device.read(at, size)
        if not region.has_masks:
            header = 0 if region.id == 0 else 4 if region.start >= STANDARD else 2
            return self._mixed(at, size, (1 << 8 * max(0, min(region.start + header - at, size))) - 1)
        if region.id == 0 and any(bar <= at < bar + 4 for bar in BARS):
            self._size_bars()
        virtual = int.from_bytes(region.virtual[at - region.start :][:size], "little")
        if region.id == 0 and at == 4 and self.ids is not None:
            return self._mixed(at, size, virtual) | self._get(4, 2) & MEMORY
        return self._mixed(at, size, virtual)

    def _mixed(self, at: int, size: int, virtual: int) -> int:
        """Return virtual bits of the shadow, others of the device, which is not asked for none."""
        if virtual == (1 << 8 * size) - 1:
            return self._get(at, size)
        return self._get(at, size) & virtual | self.device.read(at, size) & ~virtual

    def _write(self, at: int, size: int, value: int) -> None:
        region = self._map[at]
        if region is None or region.is_raw:
            self.device.write(at, size, value)
            return
        place, before = at - region.start, self._get(region.start, region.length)
        if region.id == 0 and at == 4:
            self._before_command(value)
        virtual, writable = (int.from_bytes(cells[place:][:size], "little") for cells in (region.virtual, region.writable))
        if writable & virtual:
            self._set(at, size, self._get(at, size) & ~(writable & virtual) | value & writable & virtual)
        if writable & ~virtual:
            self.device.write(at, size, self.device.read(at, size) & ~(writable & ~virtual) | value & writable & ~virtual)
        if region.after is not None and writable:
            region.after(region, _Write(place, size, value, before))

    # -- what follows --

    def _do(self, kind: EffectKind, detail: int = 0) -> None:
        self.effects.append(Effect(kind, detail))
        if self.carry_out is not None:
            self.carry_out(self.effects[-1])

    def _size_bars(self) -> None:
        """Give BARs of the shadow the bits that the real ones have. Those without an address do not exist."""
        n = 0
        while n < 6:
            real, size = self._real_bars[n], self.bars.get(n, 0)
            wide = size and real & 7 == 4
            width = 8 if wide else 4
            kind = real & (1 if real & 1 else 0xF)
            at = BARS[n]
            self._set(at, width, self._get(at, width) & (1 << 8 * width) - size | kind if size else 0)
            n += 2 if wide else 1
        size = self.bars.get(6, 0)
        self._set(0x30, 4, self._get(0x30, 4) & ((1 << 32) - size | 1) if size else 0)

    def _before_command(self, value: int) -> None:
        real, shadow = self.device.read(4, 2), self._get(4, 2)
        if shadow & MEMORY and not value & MEMORY:
            self._do(EffectKind.MAPPINGS_REVOKED)
        was_lost = any(value & shadow & ~real & bit for bit in (MEMORY, IO))
        has_moved = any(bar and self.device.read(at, 4) != bar for at, bar in zip(BARS[:6], self._real_bars))
        if (was_lost or has_moved) and self.ids is None:
            for at, bar in zip(BARS, self._real_bars):
                self.device.write(at, 4, bar)
            self._do(EffectKind.BARS_RESTORED)

    def _after_header(self, region: _Region, done: _Write) -> None:
        if done.place == 4:
            self._set(4, 2, self._get(4, 2) & ~(MEMORY | IO) | done.value & (MEMORY | IO))
        if 4 <= done.place <= 5 and bool(self._get(4, 2) & INTX_DISABLE) != self._is_masked:
            self._is_masked = not self._is_masked
            self._do(EffectKind.INTX_MASKED if self._is_masked else EffectKind.INTX_UNMASKED)

    def _after_power(self, region: _Region, done: _Write) -> None:
        if done.place == 4:
            if done.value & PM_STATE == 3:
                self._do(EffectKind.MAPPINGS_REVOKED)
            self._do(EffectKind.POWER_STATE, done.value & PM_STATE)

    def _after_vpd(self, region: _Region, done: _Write) -> None:
        if not done.place <= 3 < done.place + done.size or self.vpd is None:
            return
        word = self._get(region.start + 2, 2)
        at = word & ~VPD_FLAG
        if word & VPD_FLAG:
            if at + 4 > len(self.vpd):
                return
            self.vpd[at : at + 4] = self._get(region.start + 4, 4).to_bytes(4, "little")
        else:
            self._set(region.start + 4, 4, int.from_bytes(self.vpd[at : at + 4], "little"))
        self._do(EffectKind.VPD_WRITTEN if word & VPD_FLAG else EffectKind.VPD_READ, at)
        self._set(region.start + 2, 2, word ^ VPD_FLAG)

    def _after_express(self, region: _Region, done: _Write) -> None:
        at = region.start + 8
        control = self._get(at, 2)
        if control & FLR:
            self._set(at, 2, control & ~FLR)
            if self._real(region.start + 4, 4) >> 28 & 1:
                self._do(EffectKind.MAPPINGS_REVOKED)
                self._do(EffectKind.RESET)
        if (control ^ done.before >> 64) & READ_REQUEST:
            payload = 128 << (self._real(at, 2) >> 5 & 7)
            self._do(EffectKind.READ_REQUEST, max(128 << (control >> 12 & 7), payload))

    def _after_features(self, region: _Region, done: _Write) -> None:
        if self._get(region.start + 4, 1) & 1:
            self._set(region.start + 4, 1, self._get(region.start + 4, 1) & ~1)
            if self._real(region.start + 3) & 3 == 3:
                self._do(EffectKind.MAPPINGS_REVOKED)
                self._do(EffectKind.RESET)

    def _after_msi(self, region: _Region, done: _Write) -> None:
        if done.place <= 3 and done.place + done.size > 2:
            flags = self._get(region.start + 2, 2)
            if not self.msi_is_on:
                flags &= ~1
            if flags >> 4 & 7 > self.msi_log2:
                flags = flags & ~0x70 | self.msi_log2 << 4
            self._set(region.start + 2, 2, flags)
            for at, part in self._parts(region.start + 2, 2):
                self.device.write(at, part, flags >> 8 * (at - region.start - 2) & (1 << 8 * part) - 1)
