"""Guest memory: sparse pages over a 64-bit space, rights per range, accessors with a stated byte order, a log.

The model of everything that a host calls RAM. It also says what may be torn: an interleaver is given the word between
the indivisible pieces of an access, so that a test can play the other CPU.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NewType

import numpy as np

__all__ = ["PAGE", "Access", "AccessFault", "Gpa", "GuestMemory", "Iova", "MemoryRange", "Spa"]

Iova = NewType("Iova", int)  # what a device puts on the bus in front of the IOMMU
Gpa = NewType("Gpa", int)  # what a guest calls physical
Spa = NewType("Spa", int)  # what the machine calls physical

PAGE = 4096  # bytes of one page of this model
SPACE = 1 << 64  # bytes of the address space
_ZEROES = bytes(PAGE)


class AccessFault(Exception):
    """An access that memory refuses; nothing of it was done.

    Attributes
    ----------
    address, length : :class:`int`
        The whole access that was asked for, bytes.
    is_write : :class:`bool`
        Direction.
    reason : :class:`str`
        "unmapped", "read-only", "write-only" or "poisoned".
    """

    def __init__(self, address: int, length: int, is_write: bool, reason: str):
        super().__init__(f"{'write' if is_write else 'read'} of {length} bytes at {address:#x}: {reason}")
        self.address, self.length, self.is_write, self.reason = address, length, is_write, reason


@dataclass(frozen=True, slots=True)
class Access:
    """One access that was done: what was read or written, and by whom."""

    address: int
    data: bytes
    is_write: bool
    source: str


@dataclass(frozen=True, slots=True, order=True)
class MemoryRange:
    """``length`` bytes from ``start`` that exist, and the rights on them."""

    start: int
    length: int
    read: bool = True
    write: bool = True
    name: str = ""

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.start + self.length


class GuestMemory:
    """Sparse 64-bit space of bytes that are 0 until written, kept in 4 KiB numpy pages.

    An access is checked whole before a byte moves: it is done, or raises and changes nothing. An access of 0 bytes
    touches nothing and never faults. With no range ever added all of the space is RAM; from the first range on only the
    ranges exist, and a range starts as zeroes.

    A naturally aligned load or store of 2, 4 or 8 bytes is one indivisible piece. Everything else is cut into naturally
    aligned pieces of at most 8 bytes, in ascending address order, between which others may act: the bulk path promises
    nothing more, and neither does an unaligned accessor.

    Poison belongs to the place, not to the data: it stays through writes until `unpoison`.

    Parameters
    ----------
    log : :class:`bool`
        Keep every access that was done in `log`.
    all_ram : :class:`bool`
        False: nothing exists before the first range.

    Attributes
    ----------
    log : list of :class:`Access`
        In the order in which they ended; filled only when asked for.
    interleaver : callable or None
        Called as ``interleaver(address, length, is_write)`` before each indivisible piece. Accesses that it makes itself
        are not interleaved again. A range that it takes away ends the access with a fault in the middle.
    """

    def __init__(self, *, log: bool = False, all_ram: bool = True):
        self.all_ram, self.is_logged = all_ram, log
        self.log: list[Access] = []
        self.interleaver: Callable[[int, int, bool], None] | None = None
        self._pages: dict[int, memoryview] = {}  # page number -> bytes of a numpy page
        self._ranges: list[MemoryRange] = []  # by start
        self._poison: dict[int, np.ndarray] = {}  # page number -> a flag per byte

    # -- ranges --

    @property
    def ranges(self) -> tuple[MemoryRange, ...]:
        """The ranges that exist, by address; none while all of the space is RAM."""
        return tuple(self._ranges)

    def add_range(self, start: int, length: int, *, read: bool = True, write: bool = True, name: str = "") -> None:
        """Let ``length`` bytes from ``start`` exist, filled with zeroes; ValueError when that overlaps another range.

        The first range ends "all of it is RAM": what was written until then is gone.
        """
        if not 0 <= start < SPACE or not 0 < length <= SPACE - start:
            raise ValueError(f"A range must lie within 64 bits and hold at least one byte, not {start!r} and {length!r}")
        new = MemoryRange(start, length, read, write, name)
        for old in self._ranges:
            if old.start < new.end and new.start < old.end:
                raise ValueError(f"A range must not overlap {old.start:#x}+{old.length:#x}, not {start:#x}+{length:#x}")
        if self.all_ram:
            self.all_ram = False
            self._pages.clear()
            self._poison.clear()
        insort(self._ranges, new)

    def remove_range(self, start: int) -> None:
        """Take the range that starts at ``start`` away, and its content and poison with it."""
        for n in range(len(self._ranges)):
            if self._ranges[n].start == start:
                gone = self._ranges.pop(n)
                break
        else:
            raise ValueError(f"A range to remove must start where one was added, not at {start:#x}")
        for pages in (self._pages, self._poison):
            for number in [number for number in pages if gone.start < (number + 1) * PAGE and number * PAGE < gone.end]:
                begin, end = max(gone.start - number * PAGE, 0), min(gone.end - number * PAGE, PAGE)
                np.frombuffer(pages[number], np.uint8)[begin:end] = 0

    def poison(self, address: int, length: int) -> None:
        """Let reads of any of these bytes fault from now on."""
        for number, begin, end in _by_page(address, length):
            if number not in self._poison:
                self._poison[number] = np.zeros(PAGE, np.bool_)
            self._poison[number][begin:end] = True

    def unpoison(self, address: int, length: int) -> None:
        """Let these bytes be read again; they hold what was last written."""
        for number, begin, end in _by_page(address, length):
            if number in self._poison:
                self._poison[number][begin:end] = False
                if not self._poison[number].any():
                    del self._poison[number]

    def check(self, address: int, length: int, is_write: bool) -> None:
        """Raise the :exc:`AccessFault` that such an access would raise; touch nothing."""
        if length < 0:
            raise ValueError(f"A length must not be negative, not {length!r}")
        if length == 0:
            return
        if address < 0 or address + length > SPACE:
            raise AccessFault(address, length, is_write, "unmapped")
        if not self.all_ram:
            at, ranges = address, self._ranges
            n = bisect_right(ranges, at, key=_start) - 1
            while at < address + length:
                if not 0 <= n < len(ranges) or not ranges[n].start <= at < ranges[n].end:
                    raise AccessFault(address, length, is_write, "unmapped")
                if not (ranges[n].write if is_write else ranges[n].read):
                    raise AccessFault(address, length, is_write, "read-only" if is_write else "write-only")
                at, n = ranges[n].end, n + 1
        if self._poison and not is_write:
            for number, begin, end in _by_page(address, length):
                if number in self._poison and self._poison[number][begin:end].any():
                    raise AccessFault(address, length, is_write, "poisoned")

    # -- bulk --

    def read(self, address: int, length: int, *, source: str = "") -> bytes:
        """Return ``length`` bytes from ``address``."""
        self.check(address, length, False)
        if self.interleaver is None:
            data = self._get(address, length)
        else:
            data = b"".join([self._get(at, size) for at, size in self._pieces(address, length, False)])
        if self.is_logged:
            self.log.append(Access(address, data, False, source))
        return data

    def write(self, address: int, data: bytes | bytearray | memoryview, *, source: str = "") -> None:
        """Write ``data`` (any bytes-like object) from ``address`` on."""
        if not isinstance(data, bytes):
            data = memoryview(data).tobytes()
        self.check(address, len(data), True)
        if self.interleaver is None:
            self._put(address, data)
        else:
            for at, size in self._pieces(address, len(data), True):
                self._put(at, data[at - address : at - address + size])
        if self.is_logged:
            self.log.append(Access(address, data, True, source))

    def _get(self, address: int, length: int) -> bytes:
        offset = address % PAGE
        if offset + length <= PAGE:
            page = self._pages.get(address // PAGE)
            return page[offset : offset + length].tobytes() if page is not None else _ZEROES[:length]
        return b"".join([self._get(number * PAGE + begin, end - begin) for number, begin, end in _by_page(address, length)])

    def _put(self, address: int, data: bytes) -> None:
        at = 0
        for number, begin, end in _by_page(address, len(data)):
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = np.zeros(PAGE, np.uint8).data
            page[begin:end] = data[at : at + end - begin]
            at += end - begin

    def _pieces(self, address: int, length: int, is_write: bool) -> Iterator[tuple[int, int]]:
        """Yield (address, length) of each indivisible piece, the interleaver having had its turn before each."""
        hook, end = self.interleaver, address + length
        while address < end:
            size = 8
            while address % size or address + size > end:
                size //= 2
            self.interleaver = None
            try:
                if hook is not None:
                    hook(address, size, is_write)
            finally:
                self.interleaver = hook
            self.check(address, size, is_write)
            yield address, size
            address += size

    # -- accessors: u8, and 16, 32, 64 bits in a stated byte order --

    def load_ub(self, address: int) -> int:
        """Return the byte at ``address``."""
        return self.read(address, 1)[0]

    def load_uw_le(self, address: int) -> int:
        """Return 16 bits, lowest address least significant."""
        return int.from_bytes(self.read(address, 2), "little")

    def load_uw_be(self, address: int) -> int:
        """Return 16 bits, lowest address most significant."""
        return int.from_bytes(self.read(address, 2), "big")

    def load_l_le(self, address: int) -> int:
        """Return 32 bits, lowest address least significant."""
        return int.from_bytes(self.read(address, 4), "little")

    def load_l_be(self, address: int) -> int:
        """Return 32 bits, lowest address most significant."""
        return int.from_bytes(self.read(address, 4), "big")

    def load_q_le(self, address: int) -> int:
        """Return 64 bits, lowest address least significant."""
        return int.from_bytes(self.read(address, 8), "little")

    def load_q_be(self, address: int) -> int:
        """Return 64 bits, lowest address most significant."""
        return int.from_bytes(self.read(address, 8), "big")

    def store_ub(self, address: int, value: int) -> None:
        """Write one byte."""
        self.write(address, _packed(value, 1, "little"))

    def store_uw_le(self, address: int, value: int) -> None:
        """Write 16 bits, lowest address least significant."""
        self.write(address, _packed(value, 2, "little"))

    def store_uw_be(self, address: int, value: int) -> None:
        """Write 16 bits, lowest address most significant."""
        self.write(address, _packed(value, 2, "big"))

    def store_l_le(self, address: int, value: int) -> None:
        """Write 32 bits, lowest address least significant."""
        self.write(address, _packed(value, 4, "little"))

    def store_l_be(self, address: int, value: int) -> None:
        """Write 32 bits, lowest address most significant."""
        self.write(address, _packed(value, 4, "big"))

    def store_q_le(self, address: int, value: int) -> None:
        """Write 64 bits, lowest address least significant."""
        self.write(address, _packed(value, 8, "little"))

    def store_q_be(self, address: int, value: int) -> None:
        """Write 64 bits, lowest address most significant."""
        self.write(address, _packed(value, 8, "big"))

    # -- whole memories --

    def snapshot(self) -> GuestMemory:
        """Return an independent copy: content, ranges and poison, without log and interleaver."""
        copy = GuestMemory(all_ram=self.all_ram)
        copy._ranges = list(self._ranges)
        copy._pages = {number: np.array(page, np.uint8).data for number, page in self._pages.items()}
        copy._poison = {number: flags.copy() for number, flags in self._poison.items()}
        return copy

    def differences(self, other: GuestMemory) -> list[tuple[int, int]]:
        """Return (address, length) of each run of bytes that differ, by address; rights and poison are not compared."""
        found: list[tuple[int, int]] = []
        for number in sorted(self._pages.keys() | other._pages.keys()):
            mine, theirs = (np.frombuffer(memory._pages.get(number, _ZEROES), np.uint8) for memory in (self, other))
            flags = np.zeros(PAGE + 2, np.int8)
            flags[1:-1] = mine != theirs
            edges = np.flatnonzero(np.diff(flags)).tolist()  # where a run begins, where it ends, and so on
            for begin, end in zip(edges[::2], edges[1::2]):
                start = number * PAGE + begin
                if found and sum(found[-1]) == start:
                    found[-1] = found[-1][0], found[-1][1] + end - begin
                else:
                    found.append((start, end - begin))
        return found


def _start(item: MemoryRange) -> int:
    return item.start


def _by_page(address: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (page number, first offset, offset after the last) of each page that the bytes touch."""
    end = address + length
    while address < end:
        number, begin = divmod(address, PAGE)
        stop = min(PAGE, begin + end - address)
        yield number, begin, stop
        address += stop - begin


def _packed(value: int, size: int, order: str) -> bytes:
    if not 0 <= value < 1 << 8 * size:
        raise ValueError(f"A value to store must fit in {8 * size} bits without a sign, not {value!r}")
    return value.to_bytes(size, "little" if order == "little" else "big")
