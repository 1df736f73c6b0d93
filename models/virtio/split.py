"""Split virtqueues as software sees them: layout, chains, the driver's side, and every ring that a driver must not make.

Numbers are little-endian bytes, whatever the guest's byte order. [VIRTIO1.4 2.7]
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from .ring import (
    ARRANGEMENTS,
    DESCRIPTOR_BYTES,
    INDIRECT,
    MAX_CHAIN_BYTES,
    MAX_SIZE,
    NEXT,
    SPACE,
    WRITE,
    Answer,
    Chain,
    Memory,
    RingDriver,
    RingError,
    RingFull,
    Span,
    gather,
    placed,
    scatter,
    unsigned,
)

__all__ = ["ARRANGEMENTS", "INDIRECT", "NEXT", "NO_INTERRUPT", "NO_NOTIFY", "WRITE", "Chain", "Descriptor", "Malformed", "Memory",
           "RingError", "RingFull", "Span", "SplitDriver", "SplitLayout", "gather", "read_chain", "scatter"]  # fmt: skip

NO_INTERRUPT = 1  # flags of the available ring [VIRTIO1.4 2.7.6]
NO_NOTIFY = 1  # flags of the used ring [VIRTIO1.4 2.7.8]


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
    def parts(self) -> tuple[Span, Span, Span]:
        """Descriptor table, available ring and used ring."""
        return (self.desc, self.desc_bytes), (self.avail, self.avail_bytes), (self.used, self.used_bytes)

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
        return cls(unsigned(raw[:8]), unsigned(raw[8:12]), unsigned(raw[12:14]), unsigned(raw[14:16]))


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


class Malformed(StrEnum):
    """Rings that a driver must not make, by name. [VIRTIO1.4 2.7.4 to 2.7.6]"""

    LOOP = "loop"  # the last descriptor leads to the first
    SELF_LOOP = "self loop"  # the last descriptor leads to itself
    HEAD_OUT_OF_RANGE = "head out of range"
    HEAD_TWICE = "head twice"  # the same chain made available a second time before it is used
    AVAIL_JUMP = "available index jump"  # by more than the queue has
    AVAIL_BACK = "available index goes back"
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
    TABLE_WRAP = "indirect table beyond 2^64"
    TABLE_NEXT_OUT_OF_RANGE = "next out of an indirect table"
    TABLE_LOOP = "loop in an indirect table"

    @property
    def needs_indirect(self) -> bool | None:
        """INDIRECT_DESC must have been negotiated (True), must not have been (False), does not matter (None)."""
        if self is Malformed.INDIRECT_WITHOUT_FEATURE:
            return False
        return True if self in _OF_TABLES or self is Malformed.TOO_MANY_DESCRIPTORS else None

    @property
    def allowed(self) -> frozenset[Answer]:
        """How a device may answer: one that overlooks the mistake and knows what to do may serve the chain as well as refuse it."""
        is_known = self in (Malformed.HEAD_TWICE, Malformed.ZERO_LENGTH, Malformed.READABLE_AFTER_WRITABLE, Malformed.TOO_MANY_DESCRIPTORS)
        return frozenset({Answer.REFUSED, Answer.SERVED} if is_known else {Answer.REFUSED})


_OF_TABLES = {Malformed.INDIRECT_NEXT, Malformed.INDIRECT_NESTED, Malformed.TABLE_EMPTY, Malformed.TABLE_LENGTH,
              Malformed.TABLE_WRAP, Malformed.TABLE_NEXT_OUT_OF_RANGE, Malformed.TABLE_LOOP}  # fmt: skip


class SplitDriver(RingDriver):
    """The driver's side of one split virtqueue in ``memory``, which it zeroes.

    Descriptors and the ring's entry are written first, the available index by `publish` alone, so that a device never sees
    half a chain. [VIRTIO1.4 2.7.13, 2.7.14] With IN_ORDER descriptors are taken in the order of the table. [VIRTIO1.4 2.7.5]

    Parameters
    ----------
    size : :class:`int`
        Descriptors: a power of two up to 32768.
    base : :class:`int`
        Where the parts lie one behind the other; or
    addresses : (desc, avail, used)
        where each of them lies.
    index : :class:`int`
        First value of both indices: as if that many chains had come and gone. 0 after any reset.
    options
        As :class:`.ring.RingDriver` takes them.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    layout: SplitLayout
    malformed = Malformed

    def __init__(self, memory: Memory, *, size: int, base: int | None = None, addresses: tuple[int, int, int] | None = None,
                 index: int = 0, **options):  # fmt: skip
        if not 0 <= index < 1 << 16:
            raise ValueError(f"Index must fit in 16 bits, not {index!r}")
        super().__init__(memory, placed(SplitLayout, size, base, addresses), **options)
        self.reset(index=index)

    def reset(self, *, index: int = 0) -> None:
        self._zero()
        layout = self.layout
        self._store(layout.avail_idx, index)
        self._store(layout.used_idx, index)
        self._free = list(range(layout.size))  # ascending
        self._turn = 0  # with IN_ORDER: the descriptor that is taken next
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
        return len(self._free)

    @property
    def outstanding(self) -> tuple[int, ...]:
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
        self._check_chain(readable, writable)
        buffers = _buffers(readable, writable)
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
        if self.in_order:
            numbers = [(self._turn + n) % self.layout.size for n in range(count)]
            self._turn = (self._turn + count) % self.layout.size
        elif self.arrangement == "scattered" and self.rng is not None:
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
        at = self._table_at(head)
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

    def notification(self, queue: int) -> int:
        return queue | self._seen_index << 16

    # -- taking them back --

    @property
    def has_used(self) -> bool:
        return self._load(self.layout.used_idx) != self._used_index

    def poll_used(self) -> list[tuple[int, int]]:
        index = self._load(self.layout.used_idx)
        count = index - self._used_index & 0xFFFF
        if count > len(self._published):
            raise RingError(f"used index went from {self._used_index} to {index} while {len(self._published)} chains are out")
        found: dict[int, int] = {}
        waiting = list(self.outstanding) if self.in_order else []
        while len(found) < count:
            turn = self._used_index + len(found)
            raw = self.memory.read(self.layout.used_slot(turn), 8)
            head, length = unsigned(raw[:4]), unsigned(raw[4:])
            if head not in self._published or head in found:
                raise RingError(f"used element {turn & 0xFFFF} names {head}, which is not out")
            if length > self._out[head][1]:
                raise RingError(f"used element {turn & 0xFFFF} claims {length} bytes of {self._out[head][1]} writable ones")
            if self.in_order:  # those in front of it were used to their end [VIRTIO1.4 2.7.9]
                last = waiting.index(head, len(found))
                if last >= count:
                    raise RingError(f"used element {turn & 0xFFFF} names {head}, so that {last + 1} came back, not {count}")
                found.update((one, self._out[one][1]) for one in waiting[len(found) : last])
            found[head] = length
        for head in found:
            self._published.discard(head)
            for number in self._out.pop(head)[0]:
                insort(self._free, number)
        self._used_index = index
        return list(found.items())

    def disable_interrupts(self) -> None:
        if self.event_idx:  # as far away as it goes
            self._store(self.layout.used_event, self._used_index - 1 & 0xFFFF)
        else:
            self._store(self.layout.avail, NO_INTERRUPT)

    def enable_interrupts(self, *, ahead: int = 0) -> bool:
        if self.event_idx:
            self._store(self.layout.used_event, self._used_index + ahead & 0xFFFF)
        else:
            self._store(self.layout.avail, 0)
        return self.has_used

    # -- what a driver must not do --

    def add_malformed(self, kind: StrEnum | str, readable: Sequence[Span] = (), writable: Sequence[Span] = ()) -> int:
        kind = Malformed(kind)
        if kind is Malformed.HEAD_OUT_OF_RANGE:
            self._enter_head(self.layout.size)
            return self.layout.size
        buffers = _buffers(readable, writable)
        self._check_malformed(kind, kind.needs_indirect, len(buffers))
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
        elif kind is Malformed.AVAIL_BACK:
            self._skew = -2
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
            case Malformed.TABLE_WRAP:
                refers = replace(refers, address=SPACE - DESCRIPTOR_BYTES, length=2 * DESCRIPTOR_BYTES)
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


def _buffers(readable: Sequence[Span], writable: Sequence[Span]) -> list[Descriptor]:
    """Return the descriptors of buffers, not yet linked."""
    return [Descriptor(*span) for span in readable] + [Descriptor(*span, WRITE) for span in writable]
