"""What a foreign host (user-mode Linux, QEMU) does to the functions of a compiled card, in terms of PCI."""

import os
import struct
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from ...models.host import ConfigRead, ConfigWrite, Delay, MemoryRead, MemoryWrite
from ...models.host import enumerate as enumerate_functions
from ..compiled import pieces

__all__ = ["Bridge", "Counts"]

_COMMAND, _BARS, _BARS_END = 0x04, 0x10, 0x28
_MEMORY_SPACE = 2
_VENDOR_CAP, _PCIE_CAP = 0x09, 0x10
_FLR_CAPABLE, _START_FLR = 1 << 28, 1 << 15  # of Device Capabilities, of Device Control [PCIe5 7.5.3.3, 7.5.3.4]
_CONTROL_AT_RESET = 0x2810  # of Device Control [PCIe5 7.5.3.4]
_FLR_CYCLES, _RESET_POLLS, _RESET_CYCLES = 4096, 200, 500
_COMMON, _DEVICE_STATUS = 1, 0x14  # virtio: kind of the structure; offset in it [VIRTIO1.4 4.1.4]


@dataclass
class Counts:
    """What the host did and what came of it; ``refused``: accesses that the card or the bridge refused, ``strange_interrupts``: those
    that no entry of the function's MSI-X table asks for; ``pumped``: time that passed beside accesses, in both measures."""  # fmt: skip

    config_reads: int = 0
    config_writes: int = 0
    mmio_reads: int = 0
    mmio_writes: int = 0
    interrupts: int = 0
    strange_interrupts: int = 0
    refused: int = 0
    resets: int = 0
    pumped_cycles: int = 0
    pumped_seconds: float = 0.0


class _Function:
    """What the bridge knows of one function: its registers as they were last read, its MSI-X table as it was last written."""

    def __init__(self, info):
        self.info = info
        self.is_stale, self.command, self.addresses = True, 0, {}
        self.clear()

    def clear(self):
        self.table = bytearray(16 * self.info.msix.count) if self.info.msix else bytearray()

    def snoop(self, bar, offset, data):
        msix = self.info.msix
        if msix is None or bar != msix.table_bar:
            return
        at = offset - msix.table_offset
        low, high = max(at, 0), min(at + len(data), len(self.table))
        if low < high:
            self.table[low:high] = data[low - at : high - at]

    def vector(self, address, data):
        """Return the vector that asks for this message, by its data alone where only one has it and none has both; None without."""
        entries = [struct.unpack_from("<QI", self.table, at) for at in range(0, len(self.table), 16)]
        if (address, data) in entries:
            return entries.index((address, data))
        same = [n for n, entry in enumerate(entries) if entry[1] == data and entry[0]]
        return same[0] if len(same) == 1 else None


class _Ranges:
    """Disjoint ranges [start, end) with a tag each, in order."""

    def __init__(self):
        self._starts, self._rest = [], {}  # start -> (end, tag)

    def overlapping(self, start, end):
        """Return [(start, end, tag)] of what overlaps."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        for at in self._starts[first : bisect_left(self._starts, end)]:
            if self._rest[at][0] > start:
                found.append((at, *self._rest[at]))
        return found

    def add(self, start, end, tag):
        self._starts.insert(bisect_left(self._starts, start), start)
        self._rest[start] = end, tag

    def cut(self, start, end):
        """Take [start, end) out; returns the pieces that were there."""
        gone = []
        for low, high, tag in self.overlapping(start, end):
            del self._starts[bisect_left(self._starts, low)]
            del self._rest[low]
            if low < start:
                self.add(low, start, tag)
            if high > end:
                self.add(end, high, tag)
            gone.append((max(low, start), min(high, end)))
        return gone


class Bridge:
    """The functions of a compiled card as a foreign host sees them.

    What the host is answered it could have seen on a bus: all ones for what is refused, and before an answer or an interrupt every earlier
    write of the card has landed. The functions are found by reading the card's configuration space, given their Requester IDs by a
    first configuration write, and left as after a reset, with BARs at 0.

    Parameters
    ----------
    card : :class:`ringwall.sim.compiled.CompiledCard`
        Nobody else operates it.
    messages : tuple of :class:`int`
        (address, size) of the window in which a write of one dword is an interrupt; see :attr:`messages`.

    Attributes
    ----------
    functions : dict
        Function number -> :class:`ringwall.models.host.FunctionInfo`: BAR sizes, MSI-X table, capabilities.
    on_interrupt : dict
        Function number -> callable ``(function, vector, address, data)``, which must not operate the card; ``vector`` is None when no
        entry of the function's table has it.
    counts : :class:`Counts`
    """

    def __init__(self, card, *, messages=(0xFEE0_0000, 0x10_0000)):
        self.card, self.counts, self.on_interrupt = card, Counts(), {}
        found = card.run(enumerate_functions(card.host))
        self.functions = {info.function: info for info in found}
        self._functions = {info.function: _Function(info) for info in found}
        self._owned = {}
        for number in self.functions:
            self._quiet(number)
        self.messages = messages
        card.on_interrupt = self._interrupted

    @property
    def messages(self):
        """(address, size) of the window in which a write of one whole dword is an interrupt; memory below it is out of the card's reach."""
        return self.card.message_window

    @messages.setter
    def messages(self, window):
        self.card.message_window = window

    # -- configuration space --

    def config_read(self, function, offset, size):
        """Return 1, 2, 4 or 8 bytes of configuration space as an int; all ones when the card refuses."""
        self.counts.config_reads += 1
        if function not in self.functions or not 0 <= offset <= offset + size <= 4096:
            self.counts.refused += 1
            return (1 << 8 * size) - 1
        found = 0
        for at, piece in pieces(offset, size, 4):
            found |= self.card.perform(ConfigRead(function, at, piece)) << 8 * (at - offset)
        return found

    def config_write(self, function, offset, size, value):
        """Write 1, 2, 4 or 8 bytes of configuration space; nothing happens when the card refuses."""
        self.counts.config_writes += 1
        if function not in self.functions or not 0 <= offset <= offset + size <= 4096:
            self.counts.refused += 1
            return
        for at, piece in pieces(offset, size, 4):
            self._config_write(function, at, piece, value >> 8 * (at - offset) & (1 << 8 * piece) - 1)

    def _config_write(self, function, offset, size, value):
        known = self._functions[function]
        self.card.perform(ConfigWrite(function, offset, size, value))
        if offset < _BARS_END and offset + size > _COMMAND:
            known.is_stale = True
        control = self._pcie(known) + 8
        if control > 8 and offset <= control + 1 < offset + size and value >> 8 * (control + 1 - offset) & _START_FLR >> 8:
            known.is_stale = True
            known.clear()

    @staticmethod
    def _pcie(known):
        """Return the offset of the PCI Express capability, 0 without one."""
        return known.info.capabilities.get(_PCIE_CAP, [0])[0]

    def _refresh(self, function):
        """Read where the function's BARs are now."""
        known = self._functions[function]
        if known.is_stale:
            known.is_stale = False
            known.command = self.card.perform(ConfigRead(function, _COMMAND, 2))
            for index, bar in known.info.bars.items():
                address = self.card.perform(ConfigRead(function, _BARS + 4 * index, 4)) & ~0xF
                if bar.is_64:
                    address |= self.card.perform(ConfigRead(function, _BARS + 4 * index + 4, 4)) << 32
                known.addresses[index] = address
            self.card.host.function(function).bars = [(known.addresses[n], bar.size) for n, bar in known.info.bars.items()]
        return known

    # -- BARs --

    def _place(self, function, bar, offset, size):
        """Return the bus address of an access to a BAR, None when it is refused."""
        if function in self._functions:
            known = self._refresh(function)
            if bar in known.info.bars and 0 <= offset <= offset + size <= known.info.bars[bar].size and known.command & _MEMORY_SPACE:
                return known.addresses[bar] + offset
        self.counts.refused += 1
        return None

    def bar_read(self, function, bar, offset, size):
        """Return ``size`` bytes of a BAR, read in aligned pieces of at most 8 bytes; all ones for what is refused.

        Refused are accesses beside the BAR, those to a function whose Memory Space is off, and what the card refuses.
        """
        self.counts.mmio_reads += 1
        place = self._place(function, bar, offset, size)
        if place is None:
            return b"\xff" * size
        return b"".join(self.card.perform(MemoryRead(at, piece)).to_bytes(piece, "little") for at, piece in pieces(place, size))

    def bar_write(self, function, bar, offset, data):
        """Write to a BAR in aligned pieces of at most 8 bytes; posted: the card has it once cycles pass. Refused as in `bar_read`."""
        self.counts.mmio_writes += 1
        place = self._place(function, bar, offset, len(data))
        if place is None:
            return
        self._functions[function].snoop(bar, offset, data)
        for at, piece in pieces(place, len(data)):
            self.card.perform(MemoryWrite(at, piece, int.from_bytes(data[at - place : at - place + piece], "little")))

    # -- guest memory --

    def map(self, address, size, fd, offset, *, readable=True, writable=True, owner=None, function=None):
        """Let the card reach ``size`` bytes of the file ``fd`` at ``address``.

        Each ``owner`` (a connection) maps and unmaps its own; the same bytes of the same file at the same address with the same rights may
        be mapped by several, and are reachable until the last of them unmaps. ``function``: for that one alone, in which memory it then
        lives, apart from what the others share.

        Raises
        ------
        :exc:`ValueError`
            When something else is mapped there, or the owner itself has it mapped, or the file ends earlier.
        :exc:`OSError`
            When the file cannot be mapped so.
        """
        if not 0 <= address < 1 << 64 or not 0 < size <= (1 << 64) - address:
            raise ValueError(f"A mapping must lie within 64 bits and hold at least one byte, not {address!r} and {size!r}")
        file, end = os.fstat(fd), address + size
        tag = (file.st_dev, file.st_ino, offset - address, readable, writable)
        missing = _Ranges()
        missing.add(address, end, None)
        for other, ranges in self._owned.items():
            for low, high, what in ranges.overlapping(address, end) if other[1] == function else ():
                if other[0] == owner or what != tag:
                    raise ValueError(f"A mapping must not overlap another, not {address:#x} and {size:#x}")
                missing.cut(low, high)
        if function is not None:
            self.card.separate(function)
        done = []
        try:
            for low, high, _ in missing.overlapping(address, end):
                self.card.map(low, high - low, fd, offset + low - address, readable=readable, writable=writable, function=function)
                done.append((low, high))
        except (ValueError, OSError):
            for low, high in done:
                self.card.unmap(low, high - low, function=function)
            raise
        self._owned.setdefault((owner, function), _Ranges()).add(address, end, tag)

    def unmap(self, address, size, *, owner=None, function=None):
        """Take away what ``owner`` mapped of ``size`` bytes from ``address``; returns how many bytes it had mapped there."""
        gone = self._owned.get((owner, function), _Ranges()).cut(address, address + size)
        for low, high in gone:
            alone = _Ranges()
            alone.add(low, high, None)
            for other, ranges in self._owned.items():
                for kept_low, kept_high, _ in ranges.overlapping(low, high) if other[1] == function else ():
                    alone.cut(kept_low, kept_high)
            for start, end, _ in alone.overlapping(low, high):
                self.card.unmap(start, end - start, function=function)
        return sum(high - low for low, high in gone)

    def unmap_all(self, *, owner=None, function=None):
        """Take away all that ``owner`` mapped; returns how many bytes that was."""
        gone = self.unmap(0, 1 << 64, owner=owner, function=function)
        self._owned.pop((owner, function), None)
        return gone

    # -- time, interrupts, reset --

    def pump(self, cycles):
        """Let up to ``cycles`` pass; returns how many did: 0 when the card is idle."""
        begin = time.perf_counter()
        done = self.card.step(cycles)
        if done:
            self.counts.pumped_cycles += done
            self.counts.pumped_seconds += time.perf_counter() - begin
        return done

    def _interrupted(self, interrupt):
        self.counts.interrupts += 1
        function = interrupt.function
        vector = self._functions[function].vector(interrupt.address, interrupt.data) if function in self._functions else None
        self.counts.strange_interrupts += vector is None
        handler = self.on_interrupt.get(function)
        if handler is not None:
            handler(function, vector, interrupt.address, interrupt.data)

    def reset(self, function):
        """Reset one function: by a function level reset when it offers one, otherwise through its virtio status.

        Then BARs are at 0, and decoding, Bus Master and MSI-X are off. Every wait is bounded: a function that does not end its reset
        is left so.

        Raises
        ------
        :exc:`KeyError`
            When the card has no such function.
        """
        known = self._functions[function]
        self.counts.resets += 1
        pcie = self._pcie(known)
        if pcie and self.card.perform(ConfigRead(function, pcie + 4, 4)) & _FLR_CAPABLE:
            self.card.perform(ConfigWrite(function, _COMMAND, 2, 0))
            self.card.perform(ConfigWrite(function, pcie + 8, 2, _START_FLR | _CONTROL_AT_RESET))
            self.card.perform(Delay(_FLR_CYCLES))
        else:
            self._stop_virtio(function)
        self._quiet(function)

    def _stop_virtio(self, function):
        """Write 0 to the device status and wait until it reads 0. [VIRTIO1.4 4.1.4.3.2]"""
        at = self._common(function)
        if at is None:
            return
        known = self._refresh(function)
        self.card.perform(MemoryWrite(known.addresses[at[0]] + at[1] + _DEVICE_STATUS, 1, 0))
        for _ in range(_RESET_POLLS):
            if self.card.perform(MemoryRead(known.addresses[at[0]] + at[1] + _DEVICE_STATUS, 1)) == 0:
                return
            self.card.perform(Delay(_RESET_CYCLES))

    def _common(self, function):
        """Return (BAR, offset) of the virtio common configuration; None when the function has none or it cannot be reached."""
        known = self._refresh(function)
        for at in known.info.capabilities.get(_VENDOR_CAP, ()):
            kind, bar = (self.card.perform(ConfigRead(function, at + n, 1)) for n in (3, 4))
            if kind == _COMMON and bar in known.addresses and known.command & _MEMORY_SPACE:
                return bar, self.card.perform(ConfigRead(function, at + 8, 4))
        return None

    def _quiet(self, function):
        """Leave the function's configuration as after a reset."""
        known, perform = self._functions[function], self.card.perform
        info = known.info
        perform(ConfigWrite(function, _COMMAND, 2, 0))
        if info.msix is not None:
            perform(ConfigWrite(function, info.msix.offset + 2, 2, 0))
        if self._pcie(known):
            perform(ConfigWrite(function, self._pcie(known) + 8, 2, _CONTROL_AT_RESET))
        for index, bar in info.bars.items():
            for n in range(1 + bar.is_64):
                perform(ConfigWrite(function, _BARS + 4 * (index + n), 4, 0))
        known.is_stale = True
        known.clear()
        self.card.host.function(function).bars, self.card.host.function(function).msix = [], None
