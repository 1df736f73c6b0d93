"""Split virtqueues as software sees them: layout, chains, the driver's side, and every ring that a driver must not make.

Numbers are little-endian bytes, whatever the guest's byte order. [VIRTIO1.4 2.7]
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

__all__ = ["ARRANGEMENTS", "INDIRECT", "NEXT", "NO_INTERRUPT", "NO_NOTIFY", "WRITE", "Chain", "Descriptor", "Malformed", "Memory",
           "RingError", "RingFull", "Span", "SplitDriver", "SplitLayout", "gather", "read_chain", "scatter"]  # fmt: skip

NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor [VIRTIO1.4 2.7.5]
NO_INTERRUPT = 1  # flags of the available ring [VIRTIO1.4 2.7.6]
NO_NOTIFY = 1  # flags of the used ring [VIRTIO1.4 2.7.8]
MAX_SIZE = 32768  # descriptors [VIRTIO1.4 2.7]
MAX_CHAIN_BYTES = 1 << 32  # [VIRTIO1.4 2.7.5.2]
DESCRIPTOR_BYTES = 16
SPACE = 1 << 64  # bytes of the address space
ARRANGEMENTS = ("contiguous", "scattered", "reversed")

Span = tuple[int, int]  # address, length in bytes


class RingError(Exception):
    """The device broke the ring, or software asked for what a ring cannot do; says what."""


class RingFull(RingError):
    """Not enough free descriptors or room; nothing was changed."""


class Memory(Protocol):
    """What a ring needs of memory: addresses are those that the device is told."""

    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Where the three parts of a split virtqueue of ``size`` descriptors lie. [VIRTIO1.4 2.7]

    :exc:`ValueError` when the size is no power of two up to 32768, or a part is not aligned or leaves the address space.
    """

    size: int
    desc: int
    avail: int
    used: int

    def __post_init__(self):
        if not 1 <= self.size <= MAX_SIZE or self.size & (self.size - 1):
            raise ValueError(f"Size of a split queue must be a power of two between 1 and {MAX_SIZE}, not {self.size!r}")
        for name, at, alignment, length in (("Descriptor table", self.desc, 16, self.desc_bytes),
                                            ("Available ring", self.avail, 2, self.avail_bytes),
                                            ("Used ring", self.used, 4, self.used_bytes)):  # fmt: skip
            if at % alignment or not 0 <= at <= SPACE - length:
                raise ValueError(f"{name} must lie within 64 bits on a multiple of {alignment}, not at {at!r}")

    @classmethod
    def at(cls, base: int, size: int) -> SplitLayout:
        """Return the layout whose parts follow each other from ``base``, a multiple of 16."""
        avail = base + DESCRIPTOR_BYTES * size
        return cls(size, base, avail, (avail + 6 + 2 * size + 3) // 4 * 4)

    @property
    def desc_bytes(self) -> int:
        """Bytes of the descriptor table."""
        return DESCRIPTOR_BYTES * self.size

    @property
    def avail_bytes(self) -> int:
        """Bytes of the available ring, used_event included."""
        return 6 + 2 * self.size

    @property
    def used_bytes(self) -> int:
        """Bytes of the used ring, avail_event included."""
        return 6 + 8 * self.size

    @property
    def avail_idx(self) -> int:
        """Address of the available index; flags lie 2 bytes in front."""
        return self.avail + 2

    @property
    def used_event(self) -> int:
        """Address of used_event, in the available ring."""
        return self.avail + 4 + 2 * self.size

    @property
    def used_idx(self) -> int:
        """Address of the used index; flags lie 2 bytes in front."""
        return self.used + 2

    @property
    def avail_event(self) -> int:
        """Address of avail_event, in the used ring."""
        return self.used + 4 + 8 * self.size

    @property
    def end(self) -> int:
        """Address behind the last of the three parts."""
        return max(self.desc + self.desc_bytes, self.avail + self.avail_bytes, self.used + self.used_bytes)

    def descriptor(self, number: int) -> int:
        """Address of a descriptor."""
        return self.desc + DESCRIPTOR_BYTES * number

    def avail_slot(self, index: int) -> int:
        """Address of the available ring's entry for a free-running index."""
        return self.avail + 4 + 2 * (index % self.size)

    def used_slot(self, index: int) -> int:
        """Address of the used ring's element for a free-running index."""
        return self.used + 4 + 8 * (index % self.size)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One descriptor. [VIRTIO1.4 2.7.5]"""

    address: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        """Return its 16 bytes."""
        return b"".join((self.address.to_bytes(8, "little"), self.length.to_bytes(4, "little"),
                         self.flags.to_bytes(2, "little"), self.next.to_bytes(2, "little")))  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> Descriptor:
        """Return the descriptor that 16 bytes are."""
        return cls(_number(raw[:8]), _number(raw[8:12]), _number(raw[12:14]), _number(raw[14:16]))


@dataclass(frozen=True, slots=True)
class Chain:
    """What a chain of descriptors says.

    Attributes
    ----------
    readable, writable : tuple of (address, length)
        Buffers in the order of the chain; of a malformed chain those in front of the place where it ends.
    numbers : tuple of :class:`int`
        Descriptors of the ring that it takes, in order.
    table : (address, length) or None
        The indirect table.
    error : :class:`str`
        What a driver must not have done; empty: nothing.
    is_complete : :class:`bool`
        The end of the chain was reached: a device that overlooks the error knows all buffers.
    beyond : :class:`int` or None
        Address of the descriptor outside its table that the chain leads to.
    """

    head: int
    readable: tuple[Span, ...]
    writable: tuple[Span, ...]
    numbers: tuple[int, ...]
    table: Span | None
    error: str
    is_complete: bool
    beyond: int | None = None

    @property
    def writable_bytes(self) -> int:
        """Bytes that the device may write."""
        return sum(length for _, length in self.writable)


def read_chain(memory: Memory, layout: SplitLayout, head: int, *, indirect: bool = False) -> Chain:
    """Return the chain that starts at a head. Reads at most one descriptor more than the queue has; never outside the tables.

    ``indirect``: INDIRECT_DESC was negotiated. [VIRTIO1.4 2.7.5]
    """
    readable: list[Span] = []
    writable: list[Span] = []
    numbers: list[int] = []
    table: Span | None = None
    problems: list[str] = []

    def ended(problem: str = "", beyond: int | None = None) -> Chain:
        if sum(length for _, length in readable + writable) > MAX_CHAIN_BYTES:  # [VIRTIO1.4 2.7.5.2]
            problems.append("chain of more than 2^32 bytes")
        first = problem or (problems[0] if problems else "")
        return Chain(head, tuple(readable), tuple(writable), tuple(numbers), table, first, not problem, beyond)

    at, base, count, steps = head, layout.desc, layout.size, 0
    while True:
        if at >= count:
            place = f"an indirect table of {count}" if table is not None else f"a queue of {count}"
            return ended(f"{'next' if numbers else 'head'} {at} out of {place}", base + DESCRIPTOR_BYTES * at)
        if steps == layout.size:  # [VIRTIO1.4 2.7.5.3.1]
            return ended(f"more than {layout.size} descriptors")
        one = Descriptor.unpack(memory.read(base + DESCRIPTOR_BYTES * at, DESCRIPTOR_BYTES))
        if table is None:
            numbers.append(at)
        if one.flags & INDIRECT:
            if not indirect:
                return ended("INDIRECT without the feature")
            if table is not None:
                return ended("INDIRECT inside an indirect table")
            if one.flags & NEXT:
                return ended("INDIRECT and NEXT together")
            if one.length % DESCRIPTOR_BYTES or not one.length:
                return ended(f"an indirect table of {one.length} bytes")
            if one.address + one.length > SPACE:
                return ended("an indirect table beyond 2^64")
            table = one.address, one.length  # WRITE in this descriptor says nothing [VIRTIO1.4 2.7.5.3.2]
            at, base, count = 0, one.address, one.length // DESCRIPTOR_BYTES
            continue  # the descriptor that refers to the table is none of the buffer's
        steps += 1
        if one.address + one.length > SPACE:
            return ended("a buffer beyond 2^64")
        if one.flags & WRITE:
            writable.append((one.address, one.length))
        else:
            if writable:  # [VIRTIO1.4 2.7.4.2]
                problems.append("readable behind writable")
            readable.append((one.address, one.length))
        if not one.flags & NEXT:
            return ended()
        at = one.next


def gather(memory: Memory, spans: Iterable[Span]) -> bytes:
    """Return the bytes of buffers, one behind the other."""
    return b"".join([memory.read(address, length) for address, length in spans])


def scatter(memory: Memory, spans: Iterable[Span], data: bytes) -> None:
    """Write ``data`` into buffers from the first on; surplus room stays as it is."""
    at = 0
    for address, length in spans:
        piece = data[at : at + length]
        if piece:
            memory.write(address, piece)
        at += length


class Malformed(StrEnum):
    """Rings that a driver must not make, by name. [VIRTIO1.4 2.7.4 to 2.7.6]"""

    LOOP = "loop"  # the last descriptor leads to the first
    SELF_LOOP = "self loop"  # the last descriptor leads to itself
    HEAD_OUT_OF_RANGE = "head out of range"
    HEAD_TWICE = "head twice"  # the same chain made available a second time before it is used
    AVAIL_JUMP = "available index jump"  # by more than the queue has
    NEXT_OUT_OF_RANGE = "next out of range"
    TOO_MANY_DESCRIPTORS = "chain too long"  # more than the queue has, by an indirect table
    TOO_MANY_BYTES = "chain of more than 2^32 bytes"
    ZERO_LENGTH = "zero length"  # one descriptor more, of no bytes, in the middle; not forbidden, not expected either
    READABLE_AFTER_WRITABLE = "readable after writable"
    ADDRESS_WRAP = "buffer beyond 2^64"
    INDIRECT_WITHOUT_FEATURE = "indirect without the feature"
    INDIRECT_NEXT = "indirect and next together"
    INDIRECT_NESTED = "indirect inside an indirect table"
    TABLE_EMPTY = "indirect table of 0 bytes"
    TABLE_LENGTH = "indirect table of a broken length"  # no multiple of 16
    TABLE_NEXT_OUT_OF_RANGE = "next out of an indirect table"
    TABLE_LOOP = "loop in an indirect table"

    @property
    def needs_indirect(self) -> bool | None:
        """INDIRECT_DESC must have been negotiated (True), must not have been (False), does not matter (None)."""
        if self is Malformed.INDIRECT_WITHOUT_FEATURE:
            return False
        return True if self in _OF_TABLES or self is Malformed.TOO_MANY_DESCRIPTORS else None

    @property
    def may_be_served(self) -> bool:
        """A device that overlooks the mistake knows what to do: it may serve the chain as well as refuse it."""
        return self in (Malformed.ZERO_LENGTH, Malformed.READABLE_AFTER_WRITABLE, Malformed.TOO_MANY_DESCRIPTORS)


_OF_TABLES = {Malformed.INDIRECT_NEXT, Malformed.INDIRECT_NESTED, Malformed.TABLE_EMPTY, Malformed.TABLE_LENGTH,
              Malformed.TABLE_NEXT_OUT_OF_RANGE, Malformed.TABLE_LOOP}  # fmt: skip


class SplitDriver:
    """The driver's side of one split virtqueue in ``memory``, which it zeroes.

    Descriptors and the ring's entry are written first, the available index by `publish` alone, so that a device never sees
    half a chain. What a device says in the used ring is believed only as far as it can be true. [VIRTIO1.4 2.7.13, 2.7.14]

    Parameters
    ----------
    memory : object with read and write
        Addresses are those that the device is told.
    size : :class:`int`
        Descriptors: a power of two up to 32768.
    base : :class:`int`
        Where the parts lie one behind the other; or
    addresses : (desc, avail, used)
        where each of them lies.
    indirect, event_idx : :class:`bool`
        INDIRECT_DESC, EVENT_IDX were negotiated.
    tables : :class:`int` or None
        Where indirect tables lie, ``16 * (size + 1)`` bytes for each descriptor; None: behind the parts, on the next page.
    arrangement : :class:`str`
        How free descriptors become a chain: "contiguous" (ascending, side by side where possible), "reversed" (the same
        descending) or "scattered" (any, in any order: needs ``rng``). No device may care. [VIRTIO1.4 2.7.4.1]
    index : :class:`int`
        First value of both indices: as if that many chains had come and gone. 0 after any reset.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, memory: Memory, *, size: int, base: int | None = None, addresses: tuple[int, int, int] | None = None,
                 indirect: bool = False, event_idx: bool = False, tables: int | None = None, arrangement: str = "contiguous",
                 rng: random.Random | None = None, index: int = 0):  # fmt: skip
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f"Arrangement must be one of {', '.join(ARRANGEMENTS)}, not {arrangement!r}")
        if arrangement == "scattered" and rng is None:
            raise ValueError("Scattered descriptors must have a random.Random to choose them, not None")
        if not 0 <= index < 1 << 16:
            raise ValueError(f"Index must fit in 16 bits, not {index!r}")
        if base is not None and addresses is None:
            self.layout = SplitLayout.at(base, size)
        elif addresses is not None and base is None:
            self.layout = SplitLayout(size, *addresses)
        else:
            raise ValueError(f"Place of a queue must be given by base or by addresses, not {base!r} and {addresses!r}")
        self.memory, self.indirect, self.event_idx, self.arrangement, self.rng = memory, indirect, event_idx, arrangement, rng
        self.tables = (self.layout.end + 4095) // 4096 * 4096 if tables is None else tables
        if self.tables % DESCRIPTOR_BYTES or self.tables < 0:
            raise ValueError(f"Indirect tables must lie on a multiple of {DESCRIPTOR_BYTES}, not at {tables!r}")
        self.reset(index=index)

    def reset(self, *, index: int = 0) -> None:
        """Forget all chains and zero the three parts, as after a reset of the device."""
        layout, raw = self.layout, index.to_bytes(2, "little")
        self.memory.write(layout.desc, bytes(layout.desc_bytes))
        self.memory.write(layout.avail, bytes(2) + raw + bytes(layout.avail_bytes - 4))
        self.memory.write(layout.used, bytes(2) + raw + bytes(layout.used_bytes - 4))
        self._free = list(range(layout.size))  # ascending
        self._out: dict[int, tuple[tuple[int, ...], int]] = {}  # head -> its descriptors, bytes that may be written
        self._added: list[int] = []  # heads that wait for `publish`
        self._published: set[int] = set()
        self._avail_index = self._seen_index = index  # of the next entry; last published
        self._used_index = index
        self._skew = 0  # the index as published is so much too high
        if self.event_idx:
            self._store(layout.used_event, index)

    # -- giving chains to the device --

    @property
    def free_count(self) -> int:
        """Free descriptors."""
        return len(self._free)

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Heads of the chains that were published and did not come back, oldest first."""
        return tuple(head for head in self._out if head in self._published)

    @property
    def avail_index(self) -> int:
        """Available index as last published."""
        return self._seen_index

    @property
    def used_index(self) -> int:
        """Used index up to which `poll_used` has looked."""
        return self._used_index

    def add_chain(self, readable: Sequence[Span] = (), writable: Sequence[Span] = (), *, direct: int | None = None) -> int:
        """Write a chain and its entry of the available ring; return its head. The device sees it with the next `publish`.

        ``direct``: that many buffers get descriptors of the ring, the others an indirect table; None: all of them.

        Raises :exc:`RingFull` when descriptors are missing, :exc:`ValueError` for a chain that must not be.
        """
        buffers = _buffers(readable, writable)
        if not 1 <= len(buffers) <= self.layout.size:
            raise ValueError(f"A chain must have between 1 and {self.layout.size} buffers, not {len(buffers)!r}")
        total = sum(one.length for one in buffers)
        if total > MAX_CHAIN_BYTES:
            raise ValueError(f"A chain must have at most 2^32 bytes, not {total!r}")
        if direct is None:
            direct = len(buffers)
        elif not self.indirect:
            raise ValueError(f"Buffers without a table must be all of them while INDIRECT_DESC is off, not {direct!r}")
        elif not 0 <= direct < len(buffers):
            raise ValueError(f"Buffers without a table must be fewer than all {len(buffers)}, not {direct!r}")
        in_ring, in_table = buffers[:direct], buffers[direct:]
        numbers = self._take(len(in_ring) + bool(in_table))
        if in_table:
            in_ring.append(self._table(numbers[0], in_table))
        self._link(numbers, in_ring)
        return self._enter(numbers, sum(length for _, length in writable))

    def _take(self, count: int) -> list[int]:
        """Return free descriptors in the order in which they become a chain."""
        free = self._free
        if count > len(free):
            raise RingFull(f"{count} descriptors are needed, {len(free)} are free")
        if self.arrangement == "scattered" and self.rng is not None:
            numbers = self.rng.sample(free, count)
        else:
            start = next((n for n in range(len(free) - count + 1) if free[n + count - 1] - free[n] == count - 1), 0)
            numbers = free[start : start + count]
            if self.arrangement == "reversed":
                numbers.reverse()
        gone = set(numbers)
        self._free = [number for number in free if number not in gone]
        return numbers

    def _table(self, head: int, buffers: list[Descriptor]) -> Descriptor:
        """Write an indirect table and return the descriptor that refers to it."""
        order = list(range(1, len(buffers)))
        if self.arrangement == "reversed":
            order.reverse()
        elif self.arrangement == "scattered" and self.rng is not None:
            self.rng.shuffle(order)
        at = self.tables + DESCRIPTOR_BYTES * (self.layout.size + 1) * head
        self._link([0, *order], buffers, at)
        return Descriptor(at, DESCRIPTOR_BYTES * len(buffers), INDIRECT)

    def _link(self, numbers: Sequence[int], buffers: Sequence[Descriptor], base: int | None = None) -> None:
        """Write descriptors, each leading to the next."""
        for n in range(len(numbers)):
            one = buffers[n]
            if n + 1 < len(numbers):
                one = replace(one, flags=one.flags | NEXT, next=numbers[n + 1])
            self.memory.write((self.layout.desc if base is None else base) + DESCRIPTOR_BYTES * numbers[n], one.pack())

    def _enter(self, numbers: Sequence[int], writable_bytes: int) -> int:
        """Take note of a chain and write its entry of the available ring."""
        self._out[numbers[0]] = tuple(numbers), writable_bytes
        self._enter_head(numbers[0])
        return numbers[0]

    def _enter_head(self, head: int) -> None:
        self._store(self.layout.avail_slot(self._avail_index), head)
        self._avail_index = self._avail_index + 1 & 0xFFFF
        self._added.append(head)

    def publish(self) -> bool:
        """Let the device see what was added; return whether it asks to be notified of it. [VIRTIO1.4 2.7.13.3, 2.7.13.4]"""
        old, new = self._seen_index, self._avail_index + self._skew & 0xFFFF
        if not self._added:
            return False
        self._store(self.layout.avail_idx, new)
        self._published.update(head for head in self._added if head in self._out)
        self._added.clear()
        self._seen_index = new
        if self.event_idx:
            return new - self._load(self.layout.avail_event) - 1 & 0xFFFF < (new - old & 0xFFFF)
        return not self._load(self.layout.used) & NO_NOTIFY

    # -- taking them back --

    def poll_used(self) -> list[tuple[int, int]]:
        """Return (id, len) of each chain that came back since, in the order of the used ring, and free its descriptors.

        Raises :exc:`RingError`, and takes nothing back, when the device says what cannot be. [VIRTIO1.4 2.7.8]
        """
        index = self._load(self.layout.used_idx)
        count = index - self._used_index & 0xFFFF
        if count > len(self._published):
            raise RingError(f"used index went from {self._used_index} to {index} while {len(self._published)} chains are out")
        found: list[tuple[int, int]] = []
        seen = set()
        for n in range(count):
            raw = self.memory.read(self.layout.used_slot(self._used_index + n), 8)
            head, length = _number(raw[:4]), _number(raw[4:])
            if head not in self._published or head in seen:
                raise RingError(f"used element {self._used_index + n & 0xFFFF} names {head}, which is not out")
            if length > self._out[head][1]:
                raise RingError(f"used element {self._used_index + n & 0xFFFF} claims {length} bytes of {self._out[head][1]} writable ones")
            seen.add(head)
            found.append((head, length))
        for head, _ in found:
            self._published.discard(head)
            for number in self._out.pop(head)[0]:
                insort(self._free, number)
        self._used_index = index
        return found

    def disable_interrupts(self) -> None:
        """Tell the device that nobody waits: a hint. With EVENT_IDX, used_event is put as far away as it goes."""
        if self.event_idx:
            self._store(self.layout.used_event, self._used_index - 1 & 0xFFFF)
        else:
            self._store(self.layout.avail, NO_INTERRUPT)

    def enable_interrupts(self) -> bool:
        """Ask for a notification of the next chain that is used; return whether one came back already. [VIRTIO1.4 2.7.14]"""
        if self.event_idx:
            self._store(self.layout.used_event, self._used_index)
        else:
            self._store(self.layout.avail, 0)
        return self._load(self.layout.used_idx) != self._used_index

    # -- what a driver must not do --

    def add_malformed(self, kind: Malformed | str, readable: Sequence[Span] = (), writable: Sequence[Span] = ()) -> int:
        """Write a ring that is wrong in one way and otherwise a good chain of these buffers; return the head that it enters.

        The device sees it with the next `publish`. A chain that a device returns is taken back as usual; after the others only
        `reset` helps. :exc:`ValueError` when the queue, or what was negotiated, has no room for the mistake.
        """
        kind = Malformed(kind)
        if kind.needs_indirect is not None and kind.needs_indirect != self.indirect:
            raise ValueError(f"INDIRECT_DESC must be {'on' if kind.needs_indirect else 'off'} for {kind.value!r}, not {self.indirect!r}")
        if kind is Malformed.HEAD_OUT_OF_RANGE:
            self._enter_head(self.layout.size)
            return self.layout.size
        buffers = _buffers(readable, writable)
        if not buffers:
            raise ValueError("A malformed chain must have a buffer at least, not none")
        room = sum(length for _, length in writable)
        if kind.needs_indirect is not None:
            return self._malformed_table(kind, buffers, room)
        match kind:
            case Malformed.TOO_MANY_BYTES:
                last = replace(buffers[-1], length=(1 << 32) - 1)
                buffers[-1:] = [last, last]
                room = (1 << 32) - 1  # no used element can say more
            case Malformed.ZERO_LENGTH:
                middle = len(buffers) // 2
                buffers.insert(middle, replace(buffers[middle], length=0))
            case Malformed.READABLE_AFTER_WRITABLE:
                if not readable or not writable:
                    raise ValueError(f"Buffers of {kind.value!r} must be of both kinds, not {len(readable)} and {len(writable)}")
                buffers = buffers[len(readable) :] + buffers[: len(readable)]
            case Malformed.ADDRESS_WRAP:
                last = buffers[-1]
                buffers[-1] = replace(last, address=SPACE - max(last.length // 2, 1), length=max(last.length, 2))
        numbers = self._take(len(buffers))
        self._link(numbers, buffers)
        leads_to = {Malformed.LOOP: numbers[0], Malformed.SELF_LOOP: numbers[-1], Malformed.NEXT_OUT_OF_RANGE: self.layout.size}
        if kind in leads_to:
            self._patch(self.layout.descriptor(numbers[-1]), flags=buffers[-1].flags | NEXT, next=leads_to[kind])
        head = self._enter(numbers, room)
        if kind is Malformed.HEAD_TWICE:
            self._enter_head(head)
        elif kind is Malformed.AVAIL_JUMP:
            self._skew = self.layout.size + 1
        return head

    def _malformed_table(self, kind: Malformed, buffers: list[Descriptor], room: int) -> int:
        """Write a chain that has an indirect descriptor, wrong in one way."""
        if kind is Malformed.INDIRECT_NEXT:
            numbers = self._take(2)
            self._link(numbers, [self._table(numbers[0], buffers), buffers[-1]])
            return self._enter(numbers, room + (buffers[-1].length if buffers[-1].flags & WRITE else 0))
        numbers = self._take(1)
        if kind is Malformed.TOO_MANY_DESCRIPTORS:
            buffers = buffers[:-1] + [buffers[-1]] * (self.layout.size + 2 - len(buffers))
            room = sum(one.length for one in buffers if one.flags & WRITE)
        refers = self._table(numbers[0], buffers)
        match kind:
            case Malformed.TABLE_EMPTY:
                refers = replace(refers, length=0)
            case Malformed.TABLE_LENGTH:
                refers = replace(refers, length=refers.length - 8)
            case Malformed.INDIRECT_NESTED:
                self._patch(refers.address, flags=INDIRECT, address=refers.address, length=refers.length)
            case Malformed.TABLE_LOOP | Malformed.TABLE_NEXT_OUT_OF_RANGE:
                leads_to = 0 if kind is Malformed.TABLE_LOOP else len(buffers)
                for at in range(refers.address, refers.address + refers.length, DESCRIPTOR_BYTES):
                    one = Descriptor.unpack(self.memory.read(at, DESCRIPTOR_BYTES))
                    if not one.flags & NEXT:
                        self._patch(at, flags=one.flags | NEXT, next=leads_to)
        self._link(numbers, [refers])
        return self._enter(numbers, room)

    def _patch(self, at: int, **changes: int) -> None:
        """Change fields of a descriptor in memory."""
        self.memory.write(at, replace(Descriptor.unpack(self.memory.read(at, DESCRIPTOR_BYTES)), **changes).pack())

    # -- 16 bits --

    def _load(self, address: int) -> int:
        return _number(self.memory.read(address, 2))

    def _store(self, address: int, value: int) -> None:
        self.memory.write(address, value.to_bytes(2, "little"))


def _buffers(readable: Sequence[Span], writable: Sequence[Span]) -> list[Descriptor]:
    """Return the descriptors of buffers, not yet linked."""
    return [Descriptor(*span) for span in readable] + [Descriptor(*span, WRITE) for span in writable]
