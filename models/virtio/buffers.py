"""Buffers of a driver in guest memory: each between guard bytes, at addresses that a generator of random numbers chooses."""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from .ring import Memory, RingDriver, RingFull, Span, gather

__all__ = ["FILL", "Buffers", "Posted", "RingUser"]

GUARD, GUARD_BYTE = 16, 0x5C
FILL = 0xA5  # what writable bytes hold before the device gets them


class Buffers:
    """Hands out buffers in ``area`` and finds who writes over their ends.

    Parameters
    ----------
    memory : object with read and write
        As the device addresses it.
    area : (address, length)
        Where buffers lie.
    rng : :class:`random.Random`
        Chooses places.
    alignment : :class:`int`
        Of buffers: a power of two up to 4096; 1: any address.

    Attributes
    ----------
    free : list of (address, length)
        What no buffer has, by address, not adjacent.
    """

    def __init__(self, memory: Memory, area: Span, rng: random.Random, alignment: int = 1):
        if not 1 <= alignment <= 4096 or alignment & (alignment - 1):
            raise ValueError(f"Alignment must be a power of two between 1 and 4096, not {alignment!r}")
        self.memory, self.rng, self.alignment = memory, rng, alignment
        self.free = [area]

    def take(self, lengths: Sequence[int]) -> tuple[Span, ...]:
        """Return a buffer of each length; :exc:`RingFull`, and nothing is taken, when there is no room."""
        taken: list[Span] = []
        try:
            for length in lengths:
                taken.append((self._allocate(length), length))
        except RingFull:
            self.give_back(taken)
            raise
        return tuple(taken)

    def _allocate(self, length: int) -> int:
        need = length + 2 * GUARD + self.alignment - 1
        fitting = [n for n in range(len(self.free)) if self.free[n][1] >= need]
        if not fitting:
            raise RingFull(f"no room for a buffer of {length} bytes")
        start, size = self.free.pop(fitting[self.rng.randrange(len(fitting))] if len(fitting) > 1 else fitting[0])
        slack = min(size - need, 4096)
        low = start + (self.rng.randrange(slack + 1) if slack else 0)
        address = (low + GUARD + self.alignment - 1) // self.alignment * self.alignment
        for piece in ((start, address - GUARD - start), (address + length + GUARD, start + size - address - length - GUARD)):
            if piece[1]:
                insort(self.free, piece)
        return address

    def give_back(self, spans: Sequence[Span]) -> None:
        """Free buffers."""
        for address, length in spans:
            insort(self.free, (address - GUARD, length + 2 * GUARD))
        joined: list[Span] = []
        for start, size in self.free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = joined[-1][0], joined[-1][1] + size
            else:
                joined.append((start, size))
        self.free = joined

    def fill(self, spans: Sequence[Span], data: bytes) -> None:
        """Write ``data`` into buffers one after the other, and the guards around them."""
        guard, at = bytes([GUARD_BYTE]) * GUARD, 0
        for address, length in spans:
            self.memory.write(address - GUARD, guard + data[at : at + length] + guard)
            at += length

    def damage(self, readable: Sequence[Span], sent: bytes, writable: Sequence[Span]) -> list[str]:
        """Return what was written that must not be: guards of either, and the bytes ``sent`` of the readable ones."""
        guard, found = bytes([GUARD_BYTE]) * GUARD, []
        for address, length in (*readable, *writable):
            for at, name in ((address - GUARD, "in front of"), (address + length, "behind")):
                if self.memory.read(at, GUARD) != guard:
                    found.append(f"bytes {name} the buffer of {length} bytes at {address:#x} were written")
        if gather(self.memory, readable) != sent:
            found.append("device-readable bytes were written")
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Posted:
    """What the device was given: descriptors and the bytes ``sent`` in the readable ones."""

    readable: tuple[Span, ...]
    writable: tuple[Span, ...]
    sent: bytes

    @property
    def room(self) -> int:
        """Writable bytes."""
        return sum(length for _, length in self.writable)


class RingUser:
    """Gives a device buffers on one ring, each cut at random into up to ``pieces`` descriptors per direction, and takes them back.

    Attributes
    ----------
    posted : dict
        Id -> :class:`Posted`, for what the device has.
    damage : list of :class:`str`
        What the device wrote that it must not.
    """

    def __init__(self, ring: RingDriver, buffers: Buffers, *, pieces: int = 2):
        if pieces < 1:
            raise ValueError(f"Descriptors of a direction must be at least 1, not {pieces!r}")
        self.ring, self.buffers, self.pieces = ring, buffers, pieces
        self.posted: dict[int, Posted] = {}
        self.damage: list[str] = []

    def _cut(self, length: int, most: int) -> list[int]:
        rng, count = self.buffers.rng, min(self.pieces, most, length)
        places = sorted(rng.sample(range(1, length), rng.randrange(count))) if count > 1 else []
        return [high - low for low, high in zip([0, *places], [*places, length])] if length else []

    def add(self, sent: bytes = b"", room: int = 0) -> int:
        """Add a buffer of ``sent`` readable and ``room`` writable bytes, seen after ``ring.publish()``; return its id.

        :exc:`RingFull`, and nothing is changed, when descriptors or memory are missing.
        """
        free = self.ring.free_count - bool(room)
        readable = self._cut(len(sent), free)
        writable = self._cut(room, free + bool(room) - len(readable))
        spans = self.buffers.take([*readable, *writable])
        made = Posted(spans[: len(readable)], spans[len(readable) :], sent)
        self.buffers.fill(made.readable, sent)
        self.buffers.fill(made.writable, bytes([FILL]) * room)
        try:
            number = self.ring.add_chain(made.readable, made.writable)
        except RingFull:
            self.buffers.give_back(spans)
            raise
        self.posted[number] = made
        return number

    def fill(self, count: int, room: int) -> int:
        """Add up to ``count`` buffers of ``room`` writable bytes; return how many there was space for."""
        for done in range(count):
            try:
                self.add(room=room)
            except RingFull:
                return done
        return count

    def taken(self) -> list[tuple[int, Posted, bytes]]:
        """Return (id, what it was, bytes that the device says it wrote) of the buffers that came back since, and free them.

        What the ring refuses of a device raises :exc:`.ring.RingError`.
        """
        found = []
        for number, length in self.ring.poll_used():
            made = self.posted.pop(number)
            found.append((number, made, gather(self.buffers.memory, made.writable)[:length]))
            self.damage += [f"buffer {number}: {what}" for what in self.buffers.damage(made.readable, made.sent, made.writable)]
            self.buffers.give_back(made.readable + made.writable)
        return found

    def abandon(self) -> None:
        """Forget what the device has: after a reset of the device and the ring."""
        for made in self.posted.values():
            self.buffers.give_back(made.readable + made.writable)
        self.posted.clear()
