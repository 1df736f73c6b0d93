"""Random rings that no driver would make, and what a device may touch of them: for campaigns of many thousands."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from ..memory import Access, GuestMemory
from .driver import Feature
from .packed import AVAIL, USED, PackedDescriptor, PackedLayout, read_list
from .ring import DESCRIPTOR_BYTES, INDIRECT, NEXT, SPACE, WRITE, Chain, RingLayout, Span, read_bound
from .split import Descriptor, SplitLayout, read_chain
from .virtqueue import is_packed, make_layout

__all__ = ["HostileRing", "hostile_ring"]

GUARD = 64  # bytes around each thing
TABLES, BUFFERS, BUFFER_BYTES = 4, 8, 700
FAR = 1 << 44  # what is not in the arena is farther away than this
MOST_BYTES = 1 << 16  # of a chain that must be served


@dataclass(frozen=True)
class HostileRing:
    """A ring as it stands in memory when the doorbell is rung, and what a device may do with it.

    Attributes
    ----------
    layout : :class:`.ring.RingLayout`
        Index 0, or turn 0, is the device's next.
    features : :class:`int`
        What was negotiated.
    base, image : :class:`int`, :class:`bytes`
        All of it, guards between the things included.
    chains : tuple of :class:`Chain`
        What is available, in order.
    tables : tuple of (address, length)
        Indirect tables that are referred to, as far as anything leads into them.
    readable, writable : tuple of (address, length)
        What may be read, and written: the ring, tables, buffers.
    must_refuse, may_refuse : :class:`bool`
        NEEDS_RESET is the only right end, is one. Where a device does not refuse, all complete chains come back.
    read_bound : :class:`int`
        Reads of ring and tables that must suffice.
    """

    layout: RingLayout
    features: int
    base: int
    image: bytes
    chains: tuple[Chain, ...]
    tables: tuple[Span, ...]
    readable: tuple[Span, ...]
    writable: tuple[Span, ...]
    must_refuse: bool
    may_refuse: bool
    read_bound: int

    def problems(self, accesses: Iterable[Access], memory: GuestMemory, *, granule: int = 1) -> list[str]:
        """Return what a device did that it must not; ``accesses``: its own; ``memory``: afterwards, as the device addresses it.

        ``granule``: it may round its reads out to whole blocks of so many bytes.
        """
        found, ring_reads = [], 0
        readable = [(low // granule * granule, -(-(low + size) // granule) * granule) for low, size in self.readable]
        writable = [(low, low + size) for low, size in self.writable]
        for access in accesses:
            start, end = access.address, access.address + len(access.data)
            if not _covers(writable if access.is_write else readable, start, end):
                found.append(f"{'write' if access.is_write else 'read'} of {end - start} bytes at {start:#x}")
            ring_reads += not access.is_write and any(start < at + size and at < end for at, size in (*self.layout.parts, *self.tables))
        if ring_reads > self.read_bound:
            found.append(f"{ring_reads} reads of ring and tables, {self.read_bound} must suffice")
        after = memory.read(self.base, len(self.image))
        changed = next((n for n in range(len(after)) if after[n] != self.image[n]
                        and not _covers(writable, self.base + n, self.base + n + 1)), None)  # fmt: skip
        if after != self.image and changed is not None:
            found.append(f"the byte at {self.base + changed:#x} was changed")
        return found


def _covers(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    """All of [start, end) lies in the spans together."""
    for low, high in sorted(spans):
        if low > start:
            break
        start = max(start, high)
    return start >= end


def hostile_ring(rng: random.Random, features: int, *, size: int, base: int) -> HostileRing:
    """Return a random ring of ``size`` descriptors at ``base`` and above, a multiple of 4096 below 2^40.

    Its descriptors, tables, indices and event words are near enough to good ones to lead a careless device far. No buffer lies over
    the ring or a table, so that nothing changes what the device was told.
    """
    while True:
        made = _Maker(rng, features, size, base).made()
        if not any(not chain.error and sum(length for _, length in chain.readable + chain.writable) > MOST_BYTES for chain in made.chains):
            return made


class _Maker:
    """Puts one ring together."""

    def __init__(self, rng: random.Random, features: int, size: int, base: int):
        self.rng, self.features, self.size, self.base = rng, features, size, base
        self.is_packed, self.at = is_packed(features), base
        desc = self._room(DESCRIPTOR_BYTES * size, 16)
        self.layout = make_layout(features, size, desc, self._room(6 + 2 * size, 4), self._room(6 + 8 * size, 4))
        self.tables = [self._room(DESCRIPTOR_BYTES * (size + 2), rng.choice([1, 16])) for _ in range(TABLES)]
        self.buffers = [self._room(BUFFER_BYTES, 1) for _ in range(BUFFERS)]

    def _room(self, length: int, alignment: int) -> int:
        """Return the place of the next thing."""
        place = (self.at + GUARD + self.rng.randrange(GUARD) + alignment - 1) // alignment * alignment
        self.at = place + length
        return place

    def made(self) -> HostileRing:
        rng, layout = self.rng, self.layout
        image = bytearray(rng.randbytes(self.at + GUARD - self.base))

        def put(address: int, data: bytes) -> None:
            image[address - self.base : address - self.base + len(data)] = data

        for at in self.tables:
            put(at, b"".join(self._descriptor(n, self.size + 2, True) for n in range(self.size + 2)))
        put(layout.parts[0][0], b"".join(self._descriptor(n, self.size, False) for n in range(self.size)))
        if not self.is_packed:
            size = self.size
            count = rng.randrange(size + 1) if rng.randrange(20) else rng.choice([size + 1, 2 * size, rng.randrange(1 << 16)])
            entries = [rng.randrange(size) if rng.randrange(20) else rng.choice([size, rng.randrange(1 << 16)]) for _ in range(size)]
            put(layout.avail, rng.choice([bytes(2), b"\1\0"]) + b"".join(n.to_bytes(2, "little") for n in (count, *entries)))
        memory = GuestMemory()
        memory.write(self.base, bytes(image))
        chains, is_broken = self._chains(memory)
        spans = [span for chain in chains for span in chain.readable]
        longest = DESCRIPTOR_BYTES * (self.size + 4)  # as far as `next` leads
        tables = tuple((chain.table[0], min(chain.table[1], longest)) for chain in chains if chain.table is not None)
        writable = [span for chain in chains for span in chain.writable]
        own = (layout.parts[0], layout.parts[2]) if self.is_packed else (layout.parts[2],)
        doubts = any(chain.error or not all(length for _, length in chain.readable + chain.writable) for chain in chains)
        cut = sum(table[0] % DESCRIPTOR_BYTES != 0 for table in tables)  # each of their descriptors may need two reads
        doubts = doubts or len({chain.head for chain in chains}) < len(chains)
        must = is_broken or any(not chain.is_complete and chain.head >= 0 for chain in chains)
        must = must or any(f"more than {self.size} descriptors" in chain.error for chain in chains)
        return HostileRing(layout, self.features, self.base, bytes(image), tuple(chains), tables, (*layout.parts, *tables, *spans),
                           (*own, *writable), must, must or doubts, read_bound(self.size, len(chains) + 1 + cut))  # fmt: skip

    def _chains(self, memory: GuestMemory) -> tuple[list[Chain], bool]:
        """Return what is available, and whether the ring itself is broken."""
        is_indirect = bool(self.features >> Feature.INDIRECT_DESC & 1)
        chains: list[Chain] = []
        if isinstance(self.layout, PackedLayout):
            turn = 0
            while turn < self.size and (chain := read_list(memory, self.layout, turn, indirect=is_indirect)) is not None:
                chains.append(chain)
                turn += len(chain.numbers)
                if chain.head < 0:
                    break
            return chains, False
        assert isinstance(self.layout, SplitLayout)
        count = int.from_bytes(memory.read(self.layout.avail_idx, 2), "little")
        if count > self.size:
            return [], True
        heads = [int.from_bytes(memory.read(self.layout.avail_slot(n), 2), "little") for n in range(count)]
        return ([read_chain(memory, self.layout, head, indirect=is_indirect) for head in heads if head < self.size],
                any(head >= self.size for head in heads))  # fmt: skip

    def _descriptor(self, number: int, count: int, is_in_table: bool) -> bytes:
        """Return a descriptor that is more or less good."""
        rng = self.rng
        if not rng.randrange(40):
            return rng.randbytes(8)[:7] + b"\xff" + rng.randbytes(8)  # far away
        is_reference = not rng.randrange(8)
        at, length = (rng.choice(self.tables), self._table_bytes()) if is_reference else self._span()
        flags = INDIRECT * is_reference | WRITE * rng.randrange(2) | NEXT * (rng.randrange(5) < 2)
        if not self.is_packed:
            flags |= 0 if rng.randrange(30) else 0xFFF8 & rng.randrange(1 << 16)  # reserved ones
            following = number + 1 if rng.randrange(4) else rng.randrange(count + 2)
            return Descriptor(at, length, flags, following).pack()
        if is_in_table and not rng.randrange(4):
            flags &= WRITE
        else:
            flags |= AVAIL if rng.randrange(20) else rng.choice([0, USED, AVAIL | USED])
        return PackedDescriptor(at, length, rng.randrange(1 << 16), flags).pack()

    def _table_bytes(self) -> int:
        kind = self.rng.randrange(10)
        if kind == 0:
            return self.rng.choice([0, 8, 17, DESCRIPTOR_BYTES * (self.size + 1), 0xFFFF_FFF0])
        return DESCRIPTOR_BYTES * self.rng.randrange(1, min(self.size, 8) + 1)

    def _span(self) -> Span:
        """Return a buffer: inside of one of the good ones, far away, or over the end of all addresses."""
        rng = self.rng
        kind = rng.randrange(40)
        if kind == 0:
            return SPACE - rng.randrange(1, 64), rng.choice([0, 1, 63, 64, 0xFFFF_FFFF])
        if kind in (1, 2):
            return FAR + rng.randrange(FAR), rng.choice([0, 1, 4096, 0x8000_0000, 0xFFFF_FFFF])
        at, start = rng.choice(self.buffers), rng.randrange(BUFFER_BYTES)
        return at + start, rng.choice([0, 1, 16, BUFFER_BYTES - start]) if kind < 20 else rng.randrange(BUFFER_BYTES - start + 1)
