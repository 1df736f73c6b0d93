"""What split and packed virtqueues have in common: buffers and chains, and the driver's side that devices' drivers use.

Numbers are little-endian bytes, whatever the guest's byte order. [VIRTIO1.4 2.6]
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

__all__ = ["ARRANGEMENTS", "DESCRIPTOR_BYTES", "INDIRECT", "MAX_CHAIN_BYTES", "MAX_SIZE", "NEXT", "SPACE", "WRITE", "Answer", "Chain",
           "Memory", "RingDriver", "RingError", "RingFull", "RingLayout", "Span", "gather", "placed", "read_bound", "scatter",
           "unsigned"]  # fmt: skip

NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor [VIRTIO1.4 2.7.5, 2.8.3, 2.8.6, 2.8.7]
MAX_SIZE = 32768  # descriptors [VIRTIO1.4 2.7, 2.8]
MAX_CHAIN_BYTES = 1 << 32  # [VIRTIO1.4 2.7.5.2]
DESCRIPTOR_BYTES = 16
SPACE = 1 << 64  # bytes of the address space
ARRANGEMENTS = ("contiguous", "scattered", "reversed")
READ_AHEAD = 16  # reads of a ring that belong to no chain: indices, event words, descriptors that are not available yet

Span = tuple[int, int]  # address, length in bytes


class RingError(Exception):
    """The device broke the ring, or software asked for what a ring cannot do; says what."""


class RingFull(RingError):
    """Not enough free descriptors or room; nothing was changed."""


class Answer(StrEnum):
    """What a device may do with a ring that a driver must not make."""

    REFUSED = "refused"  # NEEDS_RESET, nothing more of the queue
    SERVED = "served"  # as if nothing were wrong
    IDLE = "idle"  # nothing, as if nothing were there


class Memory(Protocol):
    """What a ring needs of memory: addresses are those that the device is told."""

    def read(self, address: int, length: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...


class RingLayout(Protocol):
    """Where the three parts of a virtqueue lie."""

    @property
    def size(self) -> int:
        """Descriptors."""
        ...

    @property
    def parts(self) -> tuple[Span, Span, Span]:
        """Descriptor area, driver area and device area."""
        ...


Layout = TypeVar("Layout", bound=RingLayout)


def placed(kind: Callable[..., Layout], size: int, base: int | None, addresses: tuple[int, int, int] | None) -> Layout:
    """Return the layout of a kind whose parts follow each other from ``base``, or lie at ``addresses``."""
    if base is not None and addresses is None:
        return kind.at(base, size)
    if addresses is not None and base is None:
        return kind(size, *addresses)
    raise ValueError(f"Place of a queue must be given by base or by addresses, not {base!r} and {addresses!r}")


def read_bound(size: int, chains: int) -> int:
    """Return how many reads of ring and tables must suffice for so many chains, good or not, until a device is idle or gives up.

    A chain costs its entry, the descriptor of its table and no more descriptors than the queue has; others are at most 16.
    """
    return READ_AHEAD + chains * (size + 2)


def unsigned(raw: bytes) -> int:
    """Return the number that bytes of a ring are."""
    return int.from_bytes(raw, "little")


@dataclass(frozen=True, slots=True)
class Chain:
    """What a chain of descriptors says.

    Attributes
    ----------
    head : :class:`int`
        What a used element calls it: the first descriptor of a split ring, the buffer ID of a packed one.
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


class RingDriver(ABC):
    """The driver's side of one virtqueue in ``memory``, whichever kind it is. What a device says is believed only as far as it can be true.

    Parameters
    ----------
    memory : object with read and write
        Addresses are those that the device is told.
    layout : :class:`RingLayout`
    indirect, event_idx, in_order : :class:`bool`
        INDIRECT_DESC, EVENT_IDX, IN_ORDER were negotiated.
    tables : :class:`int` or None
        Where indirect tables lie, at any address, ``16 * (size + 1)`` bytes for each descriptor; None: behind the parts, on the next page.
    arrangement : :class:`str`
        How what is free is taken: "contiguous" (ascending, side by side where possible), "reversed" (the same descending) or
        "scattered" (any, in any order: needs ``rng``). No device may care. [VIRTIO1.4 2.7.4.1] With IN_ORDER "contiguous" only.

    Attributes
    ----------
    malformed : type of :class:`enum.StrEnum`
        Every ring of this kind that a driver must not make; of each member ``allowed`` says how a device may answer.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    layout: RingLayout
    malformed: type[StrEnum]

    def __init__(self, memory: Memory, layout: RingLayout, *, indirect: bool = False, event_idx: bool = False, in_order: bool = False,
                 tables: int | None = None, arrangement: str = "contiguous", rng: random.Random | None = None):  # fmt: skip
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f"Arrangement must be one of {', '.join(ARRANGEMENTS)}, not {arrangement!r}")
        if arrangement == "scattered" and rng is None:
            raise ValueError("Scattered descriptors must have a random.Random to choose them, not None")
        if in_order and arrangement != "contiguous":
            raise ValueError(f"Arrangement must be contiguous while IN_ORDER is on, not {arrangement!r}")
        if tables is not None and tables < 0:
            raise ValueError(f"Indirect tables must lie at an address, not at {tables!r}")
        self.memory, self.indirect, self.event_idx, self.in_order, self.arrangement, self.rng = (
            memory, indirect, event_idx, in_order, arrangement, rng)  # fmt: skip
        self.layout = layout
        self.tables = (max(sum(part) for part in layout.parts) + 4095) // 4096 * 4096 if tables is None else tables

    @property
    @abstractmethod
    def free_count(self) -> int:
        """Free descriptors."""

    @property
    @abstractmethod
    def outstanding(self) -> tuple[int, ...]:
        """What the chains are called that were published and did not come back, oldest first."""

    @property
    @abstractmethod
    def has_used(self) -> bool:
        """A chain came back that `poll_used` has not taken."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all chains and zero the three parts, as after a reset of the device or of the queue."""

    @abstractmethod
    def add_chain(self, readable: Sequence[Span] = (), writable: Sequence[Span] = (), *, direct: int | None = None) -> int:
        """Write a chain; return what its used element will call it. The device sees it with the next `publish`.

        ``direct``: that many buffers get descriptors of the ring, the others an indirect table; None: all of them.

        Raises :exc:`RingFull` when descriptors are missing, :exc:`ValueError` for a chain that must not be.
        """

    @abstractmethod
    def publish(self) -> bool:
        """Let the device see what was added; return whether it asks to be notified of it."""

    @abstractmethod
    def notification(self, queue: int) -> int:
        """Return the 32 bits that a notification is with NOTIFICATION_DATA; ``queue``: number or configuration data. [VIRTIO1.4 2.9]"""

    @abstractmethod
    def poll_used(self) -> list[tuple[int, int]]:
        """Return (name, bytes written) of each chain that came back since, in order, and free its descriptors.

        A chain that a batch skips was written to its end. [VIRTIO1.4 2.7.9, 2.8.8]
        Raises :exc:`RingError`, and takes nothing back, when the device says what cannot be.
        """

    @abstractmethod
    def disable_interrupts(self) -> None:
        """Tell the device that nobody waits: a hint."""

    @abstractmethod
    def enable_interrupts(self, *, ahead: int = 0) -> bool:
        """Ask for a notification of the next chain that is used; return `has_used`.

        ``ahead``: with EVENT_IDX, of the one so many chains (packed: descriptors) behind the next.
        """

    @abstractmethod
    def add_malformed(self, kind: StrEnum | str, readable: Sequence[Span] = (), writable: Sequence[Span] = ()) -> int:
        """Write a ring that is wrong in one way, a member of `malformed`, and otherwise a good chain of these buffers; return its name.

        The device sees it with the next `publish`. A chain that a device returns is taken back as usual; after the others only
        `reset` helps. :exc:`ValueError` when the queue, or what was negotiated, has no room for the mistake.
        """

    def read_bound(self, chains: int = 1) -> int:
        """Return `read_bound` of this queue."""
        return read_bound(self.layout.size, chains)

    # -- for both kinds --

    def _check_chain(self, readable: Sequence[Span], writable: Sequence[Span]) -> int:
        """Return the number of buffers of a chain that may be."""
        count, size = len(readable) + len(writable), self.layout.size
        if not 1 <= count <= size:
            raise ValueError(f"A chain must have between 1 and {size} buffers, not {count!r}")
        total = sum(length for _, length in (*readable, *writable))
        if total > MAX_CHAIN_BYTES:
            raise ValueError(f"A chain must have at most 2^32 bytes, not {total!r}")
        return count

    def _check_malformed(self, kind: StrEnum, needs_indirect: bool | None, buffers: int) -> None:
        if needs_indirect is not None and needs_indirect != self.indirect:
            raise ValueError(f"INDIRECT_DESC must be {'on' if needs_indirect else 'off'} for {kind.value!r}, not {self.indirect!r}")
        if not buffers:
            raise ValueError("A malformed chain must have a buffer at least, not none")

    def _table_at(self, place: int) -> int:
        return self.tables + DESCRIPTOR_BYTES * (self.layout.size + 1) * place

    def _zero(self) -> None:
        for address, length in self.layout.parts:
            self.memory.write(address, bytes(length))

    def _load(self, address: int) -> int:
        return unsigned(self.memory.read(address, 2))

    def _store(self, address: int, value: int) -> None:
        self.memory.write(address, value.to_bytes(2, "little"))
