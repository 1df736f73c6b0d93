"""Packed virtqueues as software sees them: layout, lists, event areas, the driver's side, and every ring that a driver must not make.

A *turn* counts descriptors from the reset on; it says the place in the ring and the wrap counter. [VIRTIO1.4 2.8]
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from .ring import (
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
    placed,
    unsigned,
)

__all__ = ["AVAIL", "USED", "EventFlags", "PackedDescriptor", "PackedDriver", "PackedLayout", "PackedMalformed", "read_list"]

AVAIL, USED = 1 << 7, 1 << 15  # flags of a descriptor [VIRTIO1.4 2.8.1]
EVENT_BYTES = 4


class EventFlags(IntEnum):
    """Flags of an event suppression structure. [VIRTIO1.4 2.8.10]"""

    ENABLE = 0
    DISABLE = 1
    DESC = 2  # with EVENT_IDX only; 3 is reserved


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the three parts of a packed virtqueue of ``size`` descriptors lie. [VIRTIO1.4 2.8.10.1]

    :exc:`ValueError` when the size is not between 1 and 32768, or a part is not aligned or leaves the address space.
    """

    size: int
    desc: int
    driver: int
    device: int

    def __post_init__(self):
        if not 1 <= self.size <= MAX_SIZE:
            raise ValueError(f"Size of a packed queue must be between 1 and {MAX_SIZE}, not {self.size!r}")
        for name, (at, length), alignment in zip(("Descriptor ring", "Driver event area", "Device event area"), self.parts, (16, 4, 4)):
            if at % alignment or not 0 <= at <= SPACE - length:
                raise ValueError(f"{name} must lie within 64 bits on a multiple of {alignment}, not at {at!r}")

    @classmethod
    def at(cls, base: int, size: int) -> PackedLayout:
        """Return the layout whose parts follow each other from ``base``, a multiple of 16."""
        driver = base + DESCRIPTOR_BYTES * size
        return cls(size, base, driver, driver + EVENT_BYTES)

    @property
    def parts(self) -> tuple[Span, Span, Span]:
        """Descriptor ring, driver event area and device event area."""
        return (self.desc, DESCRIPTOR_BYTES * self.size), (self.driver, EVENT_BYTES), (self.device, EVENT_BYTES)

    def descriptor(self, turn: int) -> int:
        """Address of the descriptor of a turn."""
        return self.desc + DESCRIPTOR_BYTES * (turn % self.size)

    def wrap(self, turn: int) -> int:
        """Wrap counter of a turn. [VIRTIO1.4 2.8.1]"""
        return 1 - turn // self.size % 2

    def available(self, turn: int) -> int:
        """AVAIL and USED of a descriptor that is available in a turn."""
        return AVAIL if self.wrap(turn) else USED

    def is_available(self, turn: int, flags: int) -> bool:
        """The flags of its descriptor make it available."""
        return flags & (AVAIL | USED) == self.available(turn)

    def is_used(self, turn: int, flags: int) -> bool:
        """The flags of its descriptor mark it used."""
        return flags & (AVAIL | USED) == (AVAIL | USED) * self.wrap(turn)

    def event(self, turn: int) -> int:
        """Offset and wrap counter of a turn, as event areas and notifications have them. [VIRTIO1.4 2.8.14]"""
        return turn % self.size | self.wrap(turn) << 15

    def passes(self, event: int, old: int, new: int) -> bool:
        """Tell whether the turns from ``old`` up to ``new``, not included, have the descriptor of an event among them.

        One that a list or a batch skips counts: it was made available or used with the others. [VIRTIO1.4 2.8.10]
        """
        at = event & 0x7FFF
        return at < self.size and any(
            old <= (turn := lap * self.size + at) < new and self.event(turn) == event
            for lap in range(old // self.size, new // self.size + 1))  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedDescriptor:
    """One descriptor. [VIRTIO1.4 2.8.13]"""

    address: int
    length: int
    id: int = 0
    flags: int = 0

    def pack(self) -> bytes:
        """Return its 16 bytes."""
        return b"".join((self.address.to_bytes(8, "little"), self.length.to_bytes(4, "little"),
                         self.id.to_bytes(2, "little"), self.flags.to_bytes(2, "little")))  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> PackedDescriptor:
        """Return the descriptor that 16 bytes are."""
        return cls(unsigned(raw[:8]), unsigned(raw[8:12]), unsigned(raw[12:14]), unsigned(raw[14:16]))


def read_list(memory: Memory, layout: PackedLayout, turn: int, *, indirect: bool = False) -> Chain | None:
    """Return the list that starts at a turn, None while there is none. Reads the ring once around and a table of its size at most.

    ``indirect``: INDIRECT_DESC was negotiated. A list that goes on into what is not available is not complete, and has no name: -1.
    [VIRTIO1.4 2.8.6, 2.8.7]
    """
    readable: list[Span] = []
    writable: list[Span] = []
    numbers: list[int] = []
    table: Span | None = None
    soft, hard = "", ""  # the first mistake that can be overlooked, that cannot

    def take(one: PackedDescriptor) -> None:
        nonlocal soft, hard
        if one.address + one.length > SPACE:
            hard = "a buffer beyond 2^64"
        elif one.flags & WRITE:
            writable.append((one.address, one.length))
        else:
            if writable:
                soft = soft or "readable behind writable"
            readable.append((one.address, one.length))

    def read_table(one: PackedDescriptor) -> None:
        nonlocal table, hard
        if not indirect:
            hard = "INDIRECT without the feature"
        elif numbers or one.flags & NEXT:  # [VIRTIO1.4 2.8.17]
            hard = "INDIRECT in a list of several descriptors"
        elif one.length % DESCRIPTOR_BYTES or not one.length:
            hard = f"an indirect table of {one.length} bytes"
        elif one.address + one.length > SPACE:
            hard = "an indirect table beyond 2^64"
        else:
            table = one.address, one.length  # WRITE in this descriptor says nothing
            for n in range(one.length // DESCRIPTOR_BYTES):
                if n == layout.size:
                    hard = f"more than {layout.size} descriptors"
                if hard:
                    break
                take(PackedDescriptor.unpack(memory.read(one.address + DESCRIPTOR_BYTES * n, DESCRIPTOR_BYTES)))

    name = -1
    while True:
        one = PackedDescriptor.unpack(memory.read(layout.descriptor(turn + len(numbers)), DESCRIPTOR_BYTES))
        if not layout.is_available(turn + len(numbers), one.flags):
            if not numbers:
                return None
            hard = hard or "a list that goes on into a descriptor that is not available"
            break
        if not hard:
            if one.flags & INDIRECT:
                read_table(one)
            else:
                take(one)
        numbers.append((turn + len(numbers)) % layout.size)
        if not one.flags & NEXT:
            name = one.id
            break
        if len(numbers) == layout.size:
            hard = hard or f"more than {layout.size} descriptors"
            break
    if sum(length for _, length in readable + writable) > MAX_CHAIN_BYTES:
        soft = soft or "chain of more than 2^32 bytes"
    return Chain(name, tuple(readable), tuple(writable), tuple(numbers), table, hard or soft, not hard)


class PackedMalformed(StrEnum):
    """Rings that a driver must not make, by name. [VIRTIO1.4 2.8.13, 2.8.16, 2.8.17]"""

    NOT_AVAILABLE = "flags of another lap"
    LIST_TOO_LONG = "list longer than the ring"  # NEXT in every descriptor
    LIST_OPEN = "list without an end"  # the last descriptor leads to one that is not available
    TOO_MANY_BYTES = "list of more than 2^32 bytes"
    ZERO_LENGTH = "zero length"  # one descriptor more, of no bytes, in the middle; not forbidden, not expected either
    READABLE_AFTER_WRITABLE = "readable after writable"
    ADDRESS_WRAP = "buffer beyond 2^64"
    INDIRECT_WITHOUT_FEATURE = "indirect without the feature"
    INDIRECT_NEXT = "indirect and next together"  # a table, and then a direct descriptor
    INDIRECT_BEHIND_DIRECT = "indirect behind a direct descriptor"
    TABLE_EMPTY = "indirect table of 0 bytes"
    TABLE_LENGTH = "indirect table of a broken length"  # no multiple of 16
    TABLE_WRAP = "indirect table beyond 2^64"
    TABLE_TOO_LONG = "indirect table of more descriptors than the queue has"
    TABLE_FLAGS = "reserved flags and IDs in an indirect table"  # INDIRECT among them: the device ignores all but WRITE

    @property
    def needs_indirect(self) -> bool | None:
        """INDIRECT_DESC must have been negotiated (True), must not have been (False), does not matter (None)."""
        if self is PackedMalformed.INDIRECT_WITHOUT_FEATURE:
            return False
        return True if self.name.startswith(("TABLE", "INDIRECT")) else None

    @property
    def allowed(self) -> frozenset[Answer]:
        """How a device may answer."""
        match self:
            case PackedMalformed.NOT_AVAILABLE:  # [VIRTIO1.4 2.8.15]
                return frozenset({Answer.IDLE})
            case PackedMalformed.TABLE_FLAGS:  # [VIRTIO1.4 2.8.7]
                return frozenset({Answer.SERVED})
            case PackedMalformed.LIST_OPEN:  # the rest may come
                return frozenset({Answer.REFUSED, Answer.IDLE})
            case PackedMalformed.ZERO_LENGTH | PackedMalformed.READABLE_AFTER_WRITABLE | PackedMalformed.TABLE_TOO_LONG:
                return frozenset({Answer.REFUSED, Answer.SERVED})
        return frozenset({Answer.REFUSED})


class PackedDriver(RingDriver):
    """The driver's side of one packed virtqueue in ``memory``, which it zeroes.

    A list is written but for the flags of its first descriptor, which `publish` writes, so that a device never sees half a list.
    Its buffer ID stands in the last descriptor only. With "scattered" IDs are any 16 bits. [VIRTIO1.4 2.8.6, 2.8.19, 2.8.21]

    Parameters
    ----------
    size : :class:`int`
        Descriptors: 1 to 32768.
    base : :class:`int`
        Where the parts lie one behind the other; or
    addresses : (descriptor ring, driver event area, device event area)
        where each of them lies.
    options
        As :class:`.ring.RingDriver` takes them. ``direct`` of a chain is 0 or None: a list has no table, or is one.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    layout: PackedLayout
    malformed = PackedMalformed

    def __init__(self, memory: Memory, *, size: int, base: int | None = None, addresses: tuple[int, int, int] | None = None, **options):
        super().__init__(memory, placed(PackedLayout, size, base, addresses), **options)
        self.reset()

    def reset(self) -> None:
        self._zero()
        self._numbers = list(range(self.layout.size))  # free ones, of each list that may be out
        if self.arrangement == "scattered" and self.rng is not None:
            self.rng.shuffle(self._numbers)
        self._out: dict[int, tuple[int, int, int]] = {}  # ID -> (its number, descriptors, bytes that may be written)
        self._added: list[tuple[int, int, int]] = []  # (turn, flags of the first descriptor, ID) of what waits for `publish`
        self._published: set[int] = set()
        self._next = self._seen = self._used = 0  # turns: written next, published next, used next

    # -- giving lists to the device --

    @property
    def free_count(self) -> int:
        return self.layout.size - (self._next - self._used)

    @property
    def outstanding(self) -> tuple[int, ...]:
        return tuple(name for name in self._out if name in self._published)

    def add_chain(self, readable: Sequence[Span] = (), writable: Sequence[Span] = (), *, direct: int | None = None) -> int:
        count = self._check_chain(readable, writable)
        if direct is not None and (direct or not self.indirect):
            raise ValueError(f"Buffers without a table must be all of them, or none while INDIRECT_DESC is on, not {direct!r}")
        buffers = _buffers(readable, writable)
        self._need(count if direct is None else 1)
        if direct is not None:
            buffers = [self._table(buffers)]
        return self._enter(buffers, sum(length for _, length in writable))

    def _need(self, count: int) -> None:
        if count > self.free_count:
            raise RingFull(f"{count} descriptors are needed, {self.free_count} are free")

    def _number(self) -> int:
        """Return the number that the next list gets."""
        return self._numbers[-1 if self.arrangement == "reversed" else 0]

    def _name(self, number: int) -> int:
        """Return a buffer ID that no list has."""
        if self.arrangement != "scattered" or self.rng is None:
            return number
        while (name := self.rng.randrange(1 << 16)) in self._out:
            pass
        return name

    def _table(self, buffers: Sequence[PackedDescriptor]) -> PackedDescriptor:
        """Write an indirect table and return the descriptor that refers to it."""
        at = self._table_at(self._number())
        self.memory.write(at, b"".join(one.pack() for one in buffers))
        return PackedDescriptor(at, DESCRIPTOR_BYTES * len(buffers), 0, INDIRECT)

    def _enter(self, buffers: Sequence[PackedDescriptor], writable_bytes: int, *, is_open: bool = False) -> int:
        """Write a list, but for the flags of its first descriptor; ``is_open``: NEXT in the last one."""
        self._need(len(buffers))
        number = self._number()
        self._numbers.remove(number)
        name, layout = self._name(number), self.layout
        for n, one in enumerate(buffers):
            turn, is_last = self._next + n, n + 1 == len(buffers)
            flags = one.flags | layout.available(turn) | (0 if is_last and not is_open else NEXT)
            raw = replace(one, id=name if is_last else name ^ 0xFFFF, flags=flags).pack()
            self.memory.write(layout.descriptor(turn), raw if n else raw[:14])
            if not n:
                self._added.append((turn, flags, name))
        self._out[name] = number, len(buffers), writable_bytes
        self._next += len(buffers)
        return name

    def publish(self) -> bool:
        """Let the device see what was added; return whether it asks to be notified of it. [VIRTIO1.4 2.8.21]"""
        if not self._added:
            return False
        for turn, flags, name in self._added:
            self._store(self.layout.descriptor(turn) + 14, flags)
            self._published.add(name)
        self._added.clear()
        old, self._seen = self._seen, self._next
        event, flags = self._load(self.layout.device), self._load(self.layout.device + 2) & 3
        if flags == EventFlags.DESC and self.event_idx:
            return self.layout.passes(event, old, self._seen)
        return flags != EventFlags.DISABLE

    def notification(self, queue: int) -> int:
        return queue | self.layout.event(self._seen) << 16

    # -- taking them back --

    @property
    def has_used(self) -> bool:
        return self.layout.is_used(self._used, self._load(self.layout.descriptor(self._used) + 14))

    def poll_used(self) -> list[tuple[int, int]]:
        found: dict[int, int] = {}
        waiting, turn = self.outstanding if self.in_order else (), self._used
        while self.layout.is_used(turn, self._load(self.layout.descriptor(turn) + 14)):
            one = PackedDescriptor.unpack(self.memory.read(self.layout.descriptor(turn), DESCRIPTOR_BYTES))
            if one.id not in self._published or one.id in found:
                raise RingError(f"used descriptor {turn % self.layout.size} names {one.id}, which is not out")
            length = one.length if one.flags & WRITE else 0
            if length > self._out[one.id][2]:
                raise RingError(f"used descriptor {turn % self.layout.size} claims {length} bytes of {self._out[one.id][2]} writable ones")
            if self.in_order:  # those in front of it were used to their end [VIRTIO1.4 2.8.8]
                for name in waiting[len(found) : waiting.index(one.id)]:
                    found[name] = self._out[name][2]
            found[one.id] = length
            turn = self._used + sum(self._out[name][1] for name in found)
        for name in found:
            self._published.discard(name)
            self._free(self._out.pop(name)[0])
        self._used = turn
        return list(found.items())

    def _free(self, number: int) -> None:
        if self.arrangement == "scattered" and self.rng is not None:
            self._numbers.insert(self.rng.randrange(len(self._numbers) + 1), number)
        else:
            insort(self._numbers, number)

    def disable_interrupts(self) -> None:
        self._store(self.layout.driver + 2, EventFlags.DISABLE)

    def enable_interrupts(self, *, ahead: int = 0) -> bool:
        if self.event_idx:
            self._store(self.layout.driver, self.layout.event(self._used + ahead))
        self._store(self.layout.driver + 2, EventFlags.DESC if self.event_idx else EventFlags.ENABLE)
        return self.has_used

    # -- what a driver must not do --

    def add_malformed(self, kind: StrEnum | str, readable: Sequence[Span] = (), writable: Sequence[Span] = ()) -> int:
        kind = PackedMalformed(kind)
        buffers = _buffers(readable, writable)
        self._check_malformed(kind, kind.needs_indirect, len(buffers))
        room, is_open = sum(length for _, length in writable), kind in (PackedMalformed.LIST_TOO_LONG, PackedMalformed.LIST_OPEN)
        match kind:
            case PackedMalformed.LIST_TOO_LONG:
                if self.free_count < self.layout.size:
                    raise ValueError(f"The ring must be empty for {kind.value!r}, not have {self.free_count} of {self.layout.size} free")
                buffers += [buffers[-1]] * (self.layout.size - len(buffers))
            case PackedMalformed.LIST_OPEN:
                self._need(len(buffers) + 1)
            case PackedMalformed.TOO_MANY_BYTES:
                last = replace(buffers[-1], length=(1 << 32) - 1)
                buffers[-1:] = [last, last]
                room = (1 << 32) - 1  # no used descriptor can say more
            case PackedMalformed.ZERO_LENGTH:
                middle = len(buffers) // 2
                buffers.insert(middle, replace(buffers[middle], length=0))
            case PackedMalformed.READABLE_AFTER_WRITABLE:
                if not readable or not writable:
                    raise ValueError(f"Buffers of {kind.value!r} must be of both kinds, not {len(readable)} and {len(writable)}")
                buffers = buffers[len(readable) :] + buffers[: len(readable)]
            case PackedMalformed.ADDRESS_WRAP:
                last = buffers[-1]
                buffers[-1] = replace(last, address=SPACE - max(last.length // 2, 1), length=max(last.length, 2))
            case PackedMalformed.INDIRECT_WITHOUT_FEATURE:
                buffers = [self._table(buffers)]
            case _ if kind.needs_indirect:
                buffers, room = self._malformed_table(kind, buffers)
        name = self._enter(buffers, room, is_open=is_open)
        if kind is PackedMalformed.NOT_AVAILABLE:
            turn, flags, _ = self._added[-1]
            self._added[-1] = turn, flags ^ (AVAIL | USED), name
        return name

    def _malformed_table(self, kind: PackedMalformed, buffers: list[PackedDescriptor]) -> tuple[list[PackedDescriptor], int]:
        """Return the descriptors of a list that has a table, wrong in one way, and the bytes that may be written."""
        if kind is PackedMalformed.TABLE_TOO_LONG:
            buffers = buffers + [buffers[-1]] * (self.layout.size + 1 - len(buffers))
        elif kind is PackedMalformed.TABLE_FLAGS:
            buffers = [replace(one, id=0xFFFF, flags=one.flags | 0xFFFF & ~WRITE) for one in buffers]
        refers, room = self._table(buffers), sum(one.length for one in buffers if one.flags & WRITE)
        match kind:
            case PackedMalformed.TABLE_EMPTY:
                refers = replace(refers, length=0)
            case PackedMalformed.TABLE_LENGTH:
                refers = replace(refers, length=refers.length - 8)
            case PackedMalformed.TABLE_WRAP:
                refers = replace(refers, address=SPACE - DESCRIPTOR_BYTES, length=2 * DESCRIPTOR_BYTES)
            case PackedMalformed.INDIRECT_NEXT:
                return [refers, buffers[-1]], room
            case PackedMalformed.INDIRECT_BEHIND_DIRECT:
                return [buffers[0], refers], room
        return [refers], room


def _buffers(readable: Sequence[Span], writable: Sequence[Span]) -> list[PackedDescriptor]:
    """Return the descriptors of buffers, without ID, not available."""
    return [PackedDescriptor(*span) for span in readable] + [PackedDescriptor(*span, flags=WRITE) for span in writable]
