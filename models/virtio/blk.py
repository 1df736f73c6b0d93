"""virtio-blk: the golden device, which says what a request may end in, and a driver that frames requests in every way.

[VIRTIO1.4 5.2]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from enum import IntEnum

from .buffers import FILL, Buffers
from .ring import Memory, RingDriver, RingError, RingFull, Span, gather

__all__ = ["FRAMINGS", "SECTOR", "BlkConfig", "BlkDevice", "BlkDriver", "BlkFeature", "BlkResult", "BlkStatus", "BlkType", "Outcome",
           "Request"]  # fmt: skip

SECTOR = 512  # bytes [VIRTIO1.4 5.2.4]
HEADER_BYTES = 16  # type, reserved, sector [VIRTIO1.4 5.2.6]
ID_BYTES = 20  # [VIRTIO1.4 5.2.6]
SEGMENT_BYTES = 16  # sector, num_sectors, flags [VIRTIO1.4 5.2.6]
UNMAP = 1  # the only flag
CONFIG_BYTES = 60  # up to unused1; what lies behind belongs to features that this device does not offer [VIRTIO1.4 5.2.4]


class BlkType(IntEnum):
    """Type of a request. [VIRTIO1.4 5.2.6]"""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14
    ZONE_APPEND = 15
    ZONE_REPORT = 16
    ZONE_OPEN = 18
    ZONE_CLOSE = 20
    ZONE_FINISH = 22
    ZONE_RESET = 24
    ZONE_RESET_ALL = 26


class BlkStatus(IntEnum):
    """Status of a request. [VIRTIO1.4 5.2.6]"""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class BlkFeature(IntEnum):
    """Feature bits of the device type that the golden device can offer. [VIRTIO1.4 5.2.3]"""

    SIZE_MAX = 1
    SEG_MAX = 2
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14


KNOWN_FEATURES = sum(1 << bit for bit in BlkFeature)


def _bits(features: int, *bits: BlkFeature) -> bool:
    return all(features >> bit & 1 for bit in bits)


# -- the device --


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way in which a request may end.

    Attributes
    ----------
    status : :class:`BlkStatus` or None
        The last writable byte; None: nothing is written at all.
    data : :class:`bytes`
        What the first writable bytes hold.
    free : tuple of (start, end)
        Bytes of ``data`` that may be anything, because what the store holds is not known.
    """

    status: BlkStatus | None
    data: bytes = b""
    free: tuple[Span, ...] = ()

    def problem(self, before: bytes, after: bytes, used_len: int) -> str:
        """Return in which way writable bytes that held ``before`` and now hold ``after`` are not this outcome; empty: they are."""
        room = len(before)
        if self.status is None:
            if after != before:
                return "is written, must not be"
            return f"used length {used_len}, must be 0" if used_len else ""
        if after[-1] != self.status:
            return f"status {after[-1]}"
        for n in _differences(after[: len(self.data)], self.data):
            if not any(low <= n < high for low, high in self.free):
                return f"byte {n} is {after[n]:#04x}, must be {self.data[n]:#04x}"
        # Behind the data nothing leaks: a byte is zero or as it was. Only zeroes can have been written.
        written = len(self.data)
        if written < room - 1:
            rest = after[written : room - 1]
            if any(rest):
                leak = next((n for n in range(len(rest)) if rest[n] and rest[n] != before[written + n]), None)
                if leak is not None:
                    return f"byte {written + leak} is {rest[leak]:#04x}, must be 0 or as it was"
                written += next(n for n in range(len(rest)) if rest[n])
            else:
                written = room - 1
        if written == room - 1:
            written = room
        return f"used length {used_len} of {written} bytes written" if used_len > written else ""


def _differences(one: bytes, other: bytes) -> list[int]:
    if one == other:
        return []
    return [n for n in range(len(other)) if n >= len(one) or one[n] != other[n]]


@dataclass(frozen=True, slots=True)
class BlkResult:
    """What a device may do with the writable bytes of one request, and what the used element may say.

    Attributes
    ----------
    outcomes : tuple of :class:`Outcome`
        All that are allowed.
    room : :class:`int`
        Writable bytes.
    """

    outcomes: tuple[Outcome, ...]
    room: int

    @property
    def status(self) -> BlkStatus | None:
        """Status of the first outcome; the only one for every request that a driver may make."""
        return self.outcomes[0].status

    @property
    def written(self) -> bytes | None:
        """What the device writes from the first writable byte on, when there is one way only; None: see `problem`."""
        if len(self.outcomes) > 1 or self.outcomes[0].free:
            return None
        only = self.outcomes[0]
        if only.status is None:
            return b""
        if len(only.data) != self.room - 1:
            return None
        return only.data + bytes([only.status])

    @property
    def used_len_allowed(self) -> Container[int]:
        """Lengths that at least one outcome allows; a device may report less than it wrote, never more. [VIRTIO1.4 2.7.8]"""
        return range(1 if all(one.status is None for one in self.outcomes) else self.room + 1)

    def problem(self, before: bytes, after: bytes, used_len: int) -> str:
        """Return why writable bytes that held ``before``, hold ``after`` and are reported so are no allowed outcome; empty: one is.

        This is the whole judgement; `written` and `used_len_allowed` are the parts of it that do not depend on ``before``.
        """
        if not len(before) == len(after) == self.room:
            raise ValueError(f"Writable bytes must be {self.room}, not {len(before)!r} and {len(after)!r}")
        found = [f"{'nothing written' if one.status is None else one.status.name}: {one.problem(before, after, used_len)}"
                 for one in self.outcomes]  # fmt: skip
        return "" if any(text.endswith(": ") for text in found) else "; ".join(found)


class BlkDevice:
    """The golden virtio-blk: executes requests one by one on a store of sectors, and says what may be seen of each.

    A request is what its device-readable bytes say; how they are cut into descriptors is not known here. [VIRTIO1.4 2.7.4.1]
    Its status is the last device-writable byte. [VIRTIO1.4 5.2.6] Left open by the specification, and so allowed:

    - an error leaves the data bytes as they were or zero; nothing else, since that would leak;
    - bytes of the wrong direction (data behind the header of an IN, bytes in front of the status of an OUT) are ignored or zeroed;
    - a request shorter than its header is returned unwritten or with IOERR, one without a byte for the status unwritten;
    - GET_ID with other than 20 bytes is cut short, or padded, or IOERR;
    - an access of no bytes beyond the capacity, and a FLUSH without the feature, succeed or do not;
    - sectors that were discarded hold anything, and so do those of a DISCARD or WRITE_ZEROES that failed, of which each segment may have
      been carried out; more segments or sectors than were offered succeed or do not; ``writeback`` is 0 or 1 after a reset.

    Parameters
    ----------
    capacity_sectors : :class:`int`
        Sectors of 512 bytes.
    read_only : :class:`bool`
        Offer RO: each OUT ends in IOERR.
    serial : :class:`bytes`
        Up to 20 bytes for GET_ID.
    features : :class:`int`
        Bits of the device type that are offered, of :class:`BlkFeature`; RO is added by ``read_only``.
    size_max, seg_max, blk_size, num_queues : :class:`int`
        Configuration behind SIZE_MAX, SEG_MAX, BLK_SIZE and MQ.
    topology : (physical_block_exp, alignment_offset, min_io_size, opt_io_size)
        Behind TOPOLOGY.
    discard, zeroes : (sectors of a segment, segments of a request) at most
        Behind DISCARD and WRITE_ZEROES.
    discard_alignment : :class:`int`
        discard_sector_alignment, in sectors.
    writeback : :class:`int` or None
        ``writeback`` after a reset; None: 1 when CONFIG_WCE and FLUSH were accepted.

    Attributes
    ----------
    store : :class:`bytearray`
        The sectors.
    unknown : set of :class:`int`
        Sectors whose content is not known: see `forget`.
    """

    def __init__(self, capacity_sectors: int, *, read_only: bool = False, serial: bytes = b"", features: int = 1 << BlkFeature.FLUSH,
                 size_max: int = 0, seg_max: int = 0, blk_size: int = SECTOR, num_queues: int = 1,
                 topology: tuple[int, int, int, int] = (0, 0, 0, 0), discard: tuple[int, int] = (0, 0), zeroes: tuple[int, int] = (0, 0),
                 discard_alignment: int = 0, writeback: int | None = None):  # fmt: skip
        if not 0 <= capacity_sectors < 1 << 64:
            raise ValueError(f"Capacity must fit in 64 bits, not {capacity_sectors!r}")
        if len(serial) > ID_BYTES:
            raise ValueError(f"Serial must have at most {ID_BYTES} bytes, not {serial!r}")
        if features & ~KNOWN_FEATURES:
            raise ValueError(f"Features must be known to this device, not {features & ~KNOWN_FEATURES:#x}")
        if _bits(features, BlkFeature.CONFIG_WCE) and not _bits(features, BlkFeature.FLUSH):
            raise ValueError(f"Features must contain FLUSH where CONFIG_WCE is offered, not {features:#x}")  # V139
        if not 1 <= num_queues < 1 << 16:
            raise ValueError(f"Number of queues must be between 1 and 65535, not {num_queues!r}")
        self.capacity, self.serial = capacity_sectors, serial
        self.features = features | read_only << BlkFeature.RO
        self.size_max, self.seg_max, self.blk_size, self.num_queues = size_max, seg_max, blk_size, num_queues
        self.topology, self.discard, self.zeroes, self.discard_alignment = topology, discard, zeroes, discard_alignment
        self.writeback = writeback
        self.store = bytearray(capacity_sectors * SECTOR)
        self.unknown: set[int] = set()

    def config(self, negotiated: int | None = None) -> bytes:
        """Return the device configuration after ``negotiated`` was accepted; None: before FEATURES_OK. [VIRTIO1.4 5.2.4, 5.2.5]

        Offered fields are there before FEATURES_OK (V012); ``writeback`` starts as 0 without FLUSH (V140); padding is 0 (V141).
        """
        accepted = self.features if negotiated is None else negotiated
        raw = bytearray(CONFIG_BYTES)

        def put(at: int, size: int, value: int) -> None:
            raw[at : at + size] = value.to_bytes(size, "little")

        put(0, 8, self.capacity)
        if _bits(self.features, BlkFeature.SIZE_MAX):
            put(8, 4, self.size_max)
        if _bits(self.features, BlkFeature.SEG_MAX):
            put(12, 4, self.seg_max)
        if _bits(self.features, BlkFeature.BLK_SIZE):
            put(20, 4, self.blk_size)
        if _bits(self.features, BlkFeature.CONFIG_WCE):
            both = _bits(accepted, BlkFeature.CONFIG_WCE, BlkFeature.FLUSH)
            put(32, 1, both if self.writeback is None else self.writeback)
        if _bits(self.features, BlkFeature.TOPOLOGY):
            for at, size, value in zip((24, 25, 26, 28), (1, 1, 2, 4), self.topology, strict=True):
                put(at, size, value)
        if _bits(self.features, BlkFeature.MQ):
            put(34, 2, self.num_queues)
        if _bits(self.features, BlkFeature.DISCARD):
            for at, value in zip((36, 40, 44), (*self.discard, self.discard_alignment), strict=True):
                put(at, 4, value)
        if _bits(self.features, BlkFeature.WRITE_ZEROES):
            for at, value in zip((48, 52), self.zeroes, strict=True):
                put(at, 4, value)
        return bytes(raw)

    def forget(self, sector: int, count: int) -> None:
        """Take the content of sectors as unknown until it is written: an OUT failed whose data could not all be fetched."""
        self.unknown.update(range(max(sector, 0), min(sector + count, self.capacity)))

    def execute(self, readable: bytes, writable_len: int) -> BlkResult:
        """Execute one request: change the store as it says, return what may be seen of it. [VIRTIO1.4 5.2.6]"""
        if writable_len == 0:  # no byte for the status: not carried out
            return BlkResult((Outcome(None),), 0)
        if len(readable) < HEADER_BYTES:
            return BlkResult((Outcome(None), Outcome(BlkStatus.IOERR)), writable_len)
        kind, sector = int.from_bytes(readable[:4], "little"), int.from_bytes(readable[8:16], "little")
        match kind:
            case BlkType.IN:
                outcomes = self._in(sector, writable_len - 1)
            case BlkType.OUT:
                outcomes = self._out(sector, readable[HEADER_BYTES:])
            case BlkType.FLUSH if _bits(self.features, BlkFeature.FLUSH):
                outcomes = (Outcome(BlkStatus.OK),)  # every write was stable when it ended (V146)
            case BlkType.FLUSH:
                outcomes = (Outcome(BlkStatus.OK), Outcome(BlkStatus.UNSUPP))
            case BlkType.GET_ID:
                outcomes = self._get_id(writable_len - 1)
            case BlkType.DISCARD if _bits(self.features, BlkFeature.DISCARD):
                outcomes = self._segments(readable[HEADER_BYTES:], 0, self.discard)
            case BlkType.WRITE_ZEROES if _bits(self.features, BlkFeature.WRITE_ZEROES):
                outcomes = self._segments(readable[HEADER_BYTES:], UNMAP, self.zeroes, is_zeroing=True)
            case _:  # V147, V148
                outcomes = (Outcome(BlkStatus.UNSUPP),)
        return BlkResult(outcomes, writable_len)

    def _fits(self, sector: int, length: int) -> bool:
        """The access is whole sectors below the capacity; ``sector`` is a number of 64 bits, their sum is not cut off. (V148)"""
        return length % SECTOR == 0 and sector + length // SECTOR <= self.capacity

    def _in(self, sector: int, length: int) -> tuple[Outcome, ...]:
        if not self._fits(sector, length):
            return (Outcome(BlkStatus.IOERR),) if length else (Outcome(BlkStatus.OK), Outcome(BlkStatus.IOERR))
        free = tuple((SECTOR * n, SECTOR * (n + 1)) for n in range(length // SECTOR) if sector + n in self.unknown) if self.unknown else ()
        return (Outcome(BlkStatus.OK, bytes(self.store[SECTOR * sector : SECTOR * sector + length]), free),)

    def _out(self, sector: int, data: bytes) -> tuple[Outcome, ...]:
        if _bits(self.features, BlkFeature.RO):  # V142
            return (Outcome(BlkStatus.IOERR),)
        if not self._fits(sector, len(data)):
            return (Outcome(BlkStatus.IOERR),) if data else (Outcome(BlkStatus.OK), Outcome(BlkStatus.IOERR))
        self.store[SECTOR * sector : SECTOR * sector + len(data)] = data
        if self.unknown:
            self.unknown.difference_update(range(sector, sector + len(data) // SECTOR))
        return (Outcome(BlkStatus.OK),)

    def _segments(self, data: bytes, flags_known: int, most: tuple[int, int], *, is_zeroing: bool = False) -> tuple[Outcome, ...]:
        """The data of a DISCARD or WRITE_ZEROES. [VIRTIO1.4 5.2.6]"""
        whole = len(data) // SEGMENT_BYTES * SEGMENT_BYTES
        parts = [data[at : at + SEGMENT_BYTES] for at in range(0, whole, SEGMENT_BYTES)]
        spans = [(int.from_bytes(part[:8], "little"), int.from_bytes(part[8:12], "little")) for part in parts]
        is_unknown = any(int.from_bytes(part[12:], "little") & ~flags_known for part in parts)
        fits = all(sector + count <= self.capacity for sector, count in spans)
        in_limits = len(parts) <= most[1] and all(count <= most[0] for _, count in spans)
        failed = (Outcome(BlkStatus.UNSUPP),) if is_unknown else (Outcome(BlkStatus.IOERR),)  # V143, V144, V148
        if _bits(self.features, BlkFeature.RO):
            return failed  # V142
        is_good = bool(parts) and whole == len(data) and not is_unknown and fits
        if is_good and is_zeroing and in_limits:  # V145
            for sector, count in spans:
                self.store[SECTOR * sector : SECTOR * (sector + count)] = bytes(SECTOR * count)
                self.unknown.difference_update(range(sector, sector + count))
            return (Outcome(BlkStatus.OK),)
        for sector, count in spans:
            if sector + count <= self.capacity:
                self.forget(sector, count)
        if is_good and in_limits:
            return (Outcome(BlkStatus.OK),)
        if whole != len(data) or not parts:
            return (*failed, Outcome(BlkStatus.UNSUPP)) if not is_unknown else failed
        return (*failed, Outcome(BlkStatus.UNSUPP), Outcome(BlkStatus.OK)) if is_good else failed

    def _get_id(self, length: int) -> tuple[Outcome, ...]:
        good = Outcome(BlkStatus.OK, self.serial.ljust(ID_BYTES, b"\0")[:length])
        return (good,) if length == ID_BYTES else (good, Outcome(BlkStatus.IOERR))


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """What a driver reads from the device configuration. [VIRTIO1.4 5.2.4]"""

    capacity: int
    size_max: int
    seg_max: int
    blk_size: int
    writeback: int
    num_queues: int
    padding: bytes  # unused0 and unused1
    topology: tuple[int, int, int, int] = (0, 0, 0, 0)  # physical_block_exp, alignment_offset, min_io_size, opt_io_size
    discard: tuple[int, int, int] = (0, 0, 0)  # sectors of a segment, segments of a request, alignment
    zeroes: tuple[int, int, int] = (0, 0, 0)  # sectors of a segment, segments of a request, write_zeroes_may_unmap

    @classmethod
    def unpack(cls, raw: bytes) -> BlkConfig:
        """Return the fields of 60 bytes."""
        if len(raw) < CONFIG_BYTES:
            raise ValueError(f"Device configuration must have at least {CONFIG_BYTES} bytes, not {len(raw)!r}")

        def get(at: int, size: int) -> int:
            return int.from_bytes(raw[at : at + size], "little")

        return cls(get(0, 8), get(8, 4), get(12, 4), get(20, 4), get(32, 1), get(34, 2), raw[33:34] + raw[57:60],
                   (get(24, 1), get(25, 1), get(26, 2), get(28, 4)), (get(36, 4), get(40, 4), get(44, 4)),
                   (get(48, 4), get(52, 4), get(56, 1)))  # fmt: skip


# -- the driver --


def _segments(spans: Sequence[tuple[int, int]], flags: int) -> bytes:
    return b"".join(sector.to_bytes(8, "little") + count.to_bytes(4, "little") + flags.to_bytes(4, "little") for sector, count in spans)


def _whole(lengths: Sequence[int], rng: random.Random, most: int) -> list[int]:
    return [sum(lengths)]


def _parts(lengths: Sequence[int], rng: random.Random, most: int) -> list[int]:
    return [length for length in lengths if length] if most >= len(lengths) else [sum(lengths)]


def _pages(lengths: Sequence[int], rng: random.Random, most: int) -> list[int]:
    cut = [min(4096, length - at) for length in lengths for at in range(0, length, 4096)]
    return cut if len(cut) <= most else _parts(lengths, rng, most)


def _random(lengths: Sequence[int], rng: random.Random, most: int) -> list[int]:
    total = sum(lengths)
    places = sorted(rng.sample(range(1, total), rng.randrange(min(total, most)))) if total > 1 else []
    return [high - low for low, high in zip([0, *places], [*places, total])]


def _bytes(lengths: Sequence[int], rng: random.Random, most: int) -> list[int]:
    """As many single bytes in front as descriptors allow, the rest in one."""
    total = sum(lengths)
    return [1] * total if total <= most else [1] * (most - 1) + [total - most + 1]


# How the readable (header, data) and the writable bytes (data, status) of a request become buffers: called with the lengths of
# the parts, a random.Random and the most buffers that there may be.
FRAMINGS: dict[str, Callable[[Sequence[int], random.Random, int], list[int]]] = {
    "parts": _parts,  # each part a buffer, as most drivers do
    "whole": _whole,  # one buffer per direction
    "pages": _pages,  # data in pages, as a driver with scattered pages does
    "random": _random,
    "bytes": _bytes,
}


@dataclass(eq=False)
class Request:
    """A request of the driver.

    Attributes
    ----------
    status : :class:`int` or None
        Last writable byte once the request came back; 0xFF when the device did not write it.
    data : :class:`bytes`
        Writable bytes in front of it.
    used_len : :class:`int` or None
        What the used element says; None: not back yet.
    """

    head: int
    kind: int
    sector: int
    sent: bytes
    readable: tuple[Span, ...]
    writable: tuple[Span, ...]
    status: int | None = None
    data: bytes = b""
    used_len: int | None = None

    @property
    def is_done(self) -> bool:
        """It came back."""
        return self.used_len is not None


class BlkDriver:
    """Makes requests in guest memory and takes them back.

    Every buffer lies between guard bytes; whoever writes over its end, or into what is readable, is found in `damage`. Writable
    bytes hold 0xA5 and a status of 0xFF before the device gets them.

    Parameters
    ----------
    ring : :class:`RingDriver`
        Its queue.
    memory : object with read and write
        As the device addresses it.
    area : (address, length)
        Where buffers lie.
    rng : :class:`random.Random`
        Chooses places and random framings.
    framing : :class:`str`
        One of `FRAMINGS`, for requests that do not say otherwise.
    alignment : :class:`int`
        Of buffers: a power of two up to 4096; 1: any address.
    """

    NO_STATUS = 0xFF

    def __init__(self, ring: RingDriver, memory: Memory, *, area: Span, rng: random.Random, framing: str = "parts", alignment: int = 1):
        if framing not in FRAMINGS:
            raise ValueError(f"Framing must be one of {', '.join(FRAMINGS)}, not {framing!r}")
        self.ring, self.memory, self.rng, self.framing = ring, memory, rng, framing
        self.buffers = Buffers(memory, area, rng, alignment)
        self.requests: dict[int, Request] = {}  # head -> not back yet
        self.damage: list[str] = []

    def read(self, sector: int, length: int, *, framing: str | None = None) -> Request:
        """Add an IN of ``length`` bytes."""
        return self.request(BlkType.IN, sector, room=length + 1, framing=framing)

    def write(self, sector: int, data: bytes, *, framing: str | None = None) -> Request:
        """Add an OUT."""
        return self.request(BlkType.OUT, sector, data, framing=framing)

    def flush(self, *, framing: str | None = None) -> Request:
        """Add a FLUSH."""
        return self.request(BlkType.FLUSH, framing=framing)

    def discard(self, *spans: tuple[int, int], framing: str | None = None) -> Request:
        """Add a DISCARD of (sector, count) spans."""
        return self.request(BlkType.DISCARD, data=_segments(spans, 0), framing=framing)

    def write_zeroes(self, *spans: tuple[int, int], unmap: bool = False, framing: str | None = None) -> Request:
        """Add a WRITE_ZEROES of (sector, count) spans."""
        return self.request(BlkType.WRITE_ZEROES, data=_segments(spans, UNMAP * unmap), framing=framing)

    def get_id(self, *, framing: str | None = None) -> Request:
        """Add a GET_ID."""
        return self.request(BlkType.GET_ID, room=ID_BYTES + 1, framing=framing)

    def request(self, kind: int, sector: int = 0, data: bytes = b"", *, room: int = 1, header_bytes: int = HEADER_BYTES,
                framing: str | None = None) -> Request:  # fmt: skip
        """Add any request: ``data`` behind the header, ``room`` writable bytes, the status last. The device sees it after `publish`.

        ``header_bytes`` below 16 cuts the header short. Raises :exc:`RingFull` when descriptors or room are missing; nothing is left
        behind then.
        """
        header = (kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"))[:header_bytes]
        sent = header + data
        cut, free = FRAMINGS[framing or self.framing], self.ring.free_count
        most = free - (room > 0)
        if most < (len(sent) > 0) or free == 0:
            raise RingFull(f"{free} descriptors are free")
        readable_lengths = cut([len(header), len(data)], self.rng, min(most, max(1, free // 2))) if sent else []
        writable_lengths = cut([room - 1, 1], self.rng, free - len(readable_lengths)) if room else []
        lengths = [length for length in readable_lengths + writable_lengths if length]
        spans = self.buffers.take(lengths)
        count = len([length for length in readable_lengths if length])
        readable, writable = spans[:count], spans[count:]
        self.buffers.fill(readable, sent)
        self.buffers.fill(writable, bytes([FILL]) * (room - 1) + bytes([self.NO_STATUS]) if room else b"")
        try:
            head = self.ring.add_chain(readable, writable)
        except RingFull:
            self.buffers.give_back(spans)
            raise
        made = self.requests[head] = Request(head, kind, sector, sent, readable, writable)
        return made

    def publish(self) -> bool:
        """Let the device see what was added; return whether it asks for a doorbell."""
        return self.ring.publish()

    def poll(self) -> list[Request]:
        """Return the requests that came back since, with status and data, and free their buffers."""
        found = []
        for head, length in self.ring.poll_used():
            if head not in self.requests:
                raise RingError(f"chain {head} is none of this driver's requests")
            done = self.requests.pop(head)
            raw = gather(self.memory, done.writable)
            done.used_len, done.data, done.status = length, raw[:-1], raw[-1] if raw else None
            self.damage += [f"request {done.head}: {what}" for what in self.buffers.damage(done.readable, done.sent, done.writable)]
            self.buffers.give_back(done.readable + done.writable)
            found.append(done)
        return found

    def abandon(self) -> None:
        """Forget the requests that did not come back and free their buffers: after a reset of the device and the ring."""
        for request in self.requests.values():
            self.buffers.give_back(request.readable + request.writable)
        self.requests.clear()
