"""What a device may do with a virtqueue, judged from what happened in memory and which interrupts came: what both kinds of rings share.

The judge predicts nothing: when a device reads, how often, in what pieces and in what order it serves chains is its own
affair. Every broken rule is named by its number in the list of device requirements (V001 and so on), or in words where the
specification has no sentence of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..memory import Access, GuestMemory
from .ring import Chain, RingLayout, Span, read_bound

__all__ = ["RULES", "Available", "Broken", "DeviceRules", "Event", "Notification", "QueueEnabled", "QueueReset", "Readable", "RingJudge",
           "StatusWritten", "Suspended"]  # fmt: skip

DRIVER_OK = 4  # device status [VIRTIO1.4 2.1]
BLOCK = 64  # bytes: the most that one read of a ring is taken for
ON_THEIR_WAY = 16  # notifications that can be decided on, but not arrived, when one more is

# Rule -> (a MUST, section, what it says).
RULES = {
    "V001": (True, "2.1.2", "nothing is read, written or notified before DRIVER_OK"),
    "V011": (True, "2.4.1", "nothing is read, written or notified after a reset"),
    "V014": (True, "2.6.1.1.1", "nothing is read, written or notified after a reset of the queue"),
    "V019": (True, "3.4.2", "nothing is read, written or notified while suspended"),
    "V023": (False, "3.4.2", "used buffers are notified before SUSPEND shows"),
    "V026": (True, "2.7.5.1", "no device-readable buffer is written"),
    "V027": (False, "2.7.5.1", "no device-writable buffer is read"),
    "V028": (True, "2.7.5.1", "no descriptor table is written"),
    "V032": (True, "2.7.5.2", "a chain that is wrong costs no more reads than a good one may"),
    "V034": (True, "2.7.7.2", "a used buffer is notified when flags ask for it"),
    "V035": (False, "2.7.7.2", "no notification that flags do not ask for"),
    "V037": (True, "2.7.7.2", "a used buffer is notified when used_event asks for it"),
    "V038": (False, "2.7.7.2", "no notification that used_event does not ask for"),
    "V039": (True, "2.7.8.2", "used elements are in memory before the used index"),
    "V040": (True, "2.7.8.2", "len bytes are written before the used index"),
    "V041": (True, "2.7.8", "len is not more than was written"),
    "V042": (True, "2.7.8", "id is the head of an available chain"),
    "V043": (True, "2.7.10.2", "flags of the used ring are 0 or 1"),
    "V044": (True, "2.7.10.2", "flags of the used ring are 0 with EVENT_IDX"),
    "V046": (True, "2.7.13.3", "every available chain is used in the end"),
    "V048": (True, "2.7.6", "a ring that is out of range leads to no access"),
    "V049": (True, "6", "with IN_ORDER chains are used in the order in which they became available"),
    "V050": (True, "2.7.9", "with IN_ORDER a chain without a used element of its own was written to its end"),
    "V053": (True, "2.8.15", "no device-readable buffer is written"),
    "V054": (False, "2.8.15", "no device-writable buffer is read"),
    "V055": (True, "2.8.15", "a descriptor is used after it became available"),
    "V056": (True, "2.8.15", "a descriptor is not changed after it was marked used"),
    "V058": (True, "2.8.6", "one used descriptor for each list, with its ID, at the place behind the list before it"),
    "V061": (True, "2.8.3", "WRITE in a used descriptor tells whether anything was written"),
    "V062": (True, "2.8.10", "a used buffer is notified when the driver's event area asks for it"),
    "V063": (True, "2.8.14", "the device's event area has valid flags, no reserved bits, and DESC with EVENT_IDX only"),
    "V064": (True, "2.8.8", "with IN_ORDER a list without a used descriptor of its own was written to its end"),
    "V067": (True, "2.8.16", "a list that is wrong costs no more reads than a good one may"),
    "V117": (True, "4.1.5.3.1", "no notification without a vector"),
    "early read": (True, "2.7.13", "a descriptor is read after the available index and the ring led to it"),
    "blind return": (True, "2.7.5", "a chain is returned after all of its descriptors were read"),
    "deaf": (True, "2.9", "an available buffer notification is looked into"),
    "late data": (True, "2.8.5", "len bytes are written before the used descriptor"),
    "length": (True, "2.8.5", "len of a used descriptor is not more than was written"),
    "unasked": (False, "2.8.10", "no notification that the driver's event area does not ask for"),
    "used twice": (True, "2.7.8", "a chain is used once"),
    "used index": (True, "2.7.8", "the used index only grows, by what is out"),
    "stray write": (True, "2.7.5.1", "only writable buffers of available chains and the device's own parts of the ring are written"),
    "stray read": (True, "2.7.6", "only the rings and buffers of available chains are read"),
}


@dataclass(frozen=True, slots=True)
class StatusWritten:
    """Software wrote the device status; 0: a reset that is complete."""

    value: int


@dataclass(frozen=True, slots=True)
class Notification:
    """A used buffer notification of this queue arrived."""


@dataclass(frozen=True, slots=True)
class QueueReset:
    """The reset of this queue is complete. [VIRTIO1.4 2.6.1.1]"""


@dataclass(frozen=True, slots=True)
class QueueEnabled:
    """The queue runs again, at ``layout``. [VIRTIO1.4 2.6.1.2]"""

    layout: RingLayout


@dataclass(frozen=True, slots=True)
class Suspended:
    """The device shows SUSPEND without DRIVER_OK; the next DRIVER_OK that is written ends it. [VIRTIO1.4 3.4]"""


Event = Access | StatusWritten | Notification | QueueReset | QueueEnabled | Suspended


@dataclass(frozen=True, slots=True)
class Broken:
    """One rule that was broken by event number ``event``; the number of events, when it showed at the end only."""

    rule: str
    event: int
    what: str

    @property
    def is_must(self) -> bool:
        """The specification says MUST; otherwise SHOULD."""
        return RULES[self.rule][0]

    def __str__(self) -> str:
        return f"{self.rule} at event {self.event}: {self.what} ({RULES[self.rule][2]}) [VIRTIO1.4 {RULES[self.rule][1]}]"


class Readable(Protocol):
    """Memory as the device addresses it; may raise `AccessFault`."""

    def read(self, address: int, length: int) -> bytes: ...


class _Spans:
    """Bytes as sorted spans that may overlap; the question is whether a span is covered by their union."""

    def __init__(self, spans: Iterable[Span] = ()):
        self.spans: list[Span] = []  # (start, end)
        for address, length in spans:
            self.add(address, length)

    def add(self, address: int, length: int) -> None:
        if length > 0:
            insort(self.spans, (address, address + length))

    def discard(self, address: int, length: int) -> None:
        if length > 0:
            self.spans.remove((address, address + length))

    def missing(self, start: int, end: int) -> Span | None:
        """Return the first (start, end) inside the span that is not covered, None when all of it is."""
        for low, high in self.spans:
            if low > start:
                return start, min(low, end)
            start = max(start, high)
            if start >= end:
                return None
        return (start, end) if start < end else None

    def touches(self, start: int, end: int) -> bool:
        return any(low < end and start < high for low, high in self.spans[: bisect_right(self.spans, (end, 0))])


class _Written:
    """Which bytes of one chain's writable buffers were written, and how many of them from the first on."""

    def __init__(self):
        self.spans: list[list[int]] = []  # disjoint (start, end), ascending

    def add(self, start: int, end: int) -> None:
        kept = []
        for low, high in self.spans:
            if high < start or end < low:
                kept.append([low, high])
            else:
                start, end = min(start, low), max(end, high)
        insort(kept, [start, end])
        self.spans = kept

    @property
    def prefix(self) -> int:
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0


@dataclass(eq=False)
class Available:
    """A chain that is available, or was.

    Attributes
    ----------
    chain : :class:`Chain`
        What it said when it was made available.
    since : :class:`int`
        Number of that event.
    """

    chain: Chain
    since: int = 0
    written: _Written = field(default_factory=_Written)
    claimed: int | None = None  # len of its used element
    is_skipped: bool = False  # it has none of its own, but was used with a later one
    in_time: int = 0  # bytes that had been written from the first on when the index was

    def note(self, start: int, end: int) -> bool:
        """Take note of a write to [start, end); return whether any of it belongs to this chain."""
        at, is_mine = 0, False
        for address, length in self.chain.writable:
            low, high = max(start, address), min(end, address + length)
            if low < high:
                self.written.add(at + low - address, at + high - address)
                is_mine = True
            at += length
        return is_mine


@dataclass(eq=False)
class _Duty:
    """The notification that one publication asks for: a must while every value of the driver's wish since asked for it.

    ``old``, ``new``: used index, or turn of a packed ring, before and after.
    """

    old: int
    new: int
    since: int  # number of the event
    must: bool = True
    may: bool = False
    looked: bool = False  # the device read the driver's wish since (:mod:`.wire`)


class RingJudge(ABC):
    """Judges a device on one virtqueue, event by event: what does not depend on the kind of ring.

    Notification is judged with the races that the specification leaves: a notification is missing only if the driver asked for it
    all the time since the buffer was published, and one too many only if he did not at any time since; one may serve several.

    Parameters
    ----------
    layout : :class:`.ring.RingLayout`
        The queue.
    memory : object with read
        Memory as the device addresses it and as software left it; changes before :meth:`take` is told.
    indirect, event_idx, in_order : :class:`bool`
        INDIRECT_DESC, EVENT_IDX, IN_ORDER were negotiated.
    has_vector : :class:`bool`
        The queue is mapped to an MSI-X vector; without one no notification comes.
    is_ready : :class:`bool`
        DRIVER_OK is set before the first event.
    index : :class:`int`
        Both indices before the first event (packed: turns that came and went).
    granule : :class:`int`
        A read may be rounded out to whole blocks of so many bytes: a dword of the bus, a line of a descriptor cache.
    allowed : iterable of (address, length)
        Where else the device reads and writes without this queue's doing: other queues, the IOMMU.
    on_available, on_returned : callable or None
        Called with each :class:`Available` when the driver makes it available; with it and the reported length when the device
        returns it.

    Attributes
    ----------
    found : list of :class:`Broken`
        In the order of the events.
    out : dict of :class:`int` to list of :class:`Available`
        Chains that are available, by what a used element calls them.
    needs_reset : :class:`bool`
        The device was seen to ask for a reset: it need not serve this queue any more. Set by the owner, ended by the reset.
    """

    # Rules that each kind of ring has under its own number.
    WRITES_READABLE = READS_WRITABLE = LATE = OVER = SKIPPED = UNTOLD = UNASKED = ENDLESS = ""

    def __init__(self, layout: RingLayout, memory: Readable, *, indirect: bool = False, event_idx: bool = False, in_order: bool = False,
                 has_vector: bool = True, is_ready: bool = True, index: int = 0, granule: int = 4, allowed: Iterable[Span] = (),
                 on_available: Callable[[Available], None] | None = None,
                 on_returned: Callable[[Available, int], None] | None = None):  # fmt: skip
        if granule < 1 or granule & (granule - 1):
            raise ValueError(f"Granule of reads must be a power of two, not {granule!r}")
        self.layout, self.memory = layout, memory
        self.indirect, self.event_idx, self.in_order, self.has_vector = indirect, event_idx, in_order, has_vector
        self.granule, self.allowed = granule, tuple(allowed)
        self.on_available, self.on_returned = on_available, on_returned
        self.found: list[Broken] = []
        self.is_ready = is_ready
        self.closed = "V011" if is_ready else "V001"  # the rule that forbids everything while it is not ready
        self._number, self._first = 0, index
        self.wish = 0
        self._begin()
        self._look()

    def _begin(self) -> None:
        """Nothing is out: as after a reset."""
        self.needs_reset = False
        self.jumped = self.erred = False  # no chain can be made out any more; the driver made any mistake
        self.fetched = 0  # bytes of ring and tables since the driver or the device did something for the queue
        self.wish = self._wish()
        self.out: dict[int, list[Available]] = {}  # one each, unless the driver erred
        self.order: list[Available] = []  # the same in the order in which they became available
        self.returned: list[Available] = []
        self.beyond: set[int] = set()  # addresses of descriptors that are none
        self.duties: list[_Duty] = []
        self.readable, self.writable = _Spans(self.layout.parts), _Spans()
        for address, length in self.allowed:
            self.readable.add(address, length)
            self.writable.add(address, length)
        self.not_to_write = _Spans()  # readable buffers and indirect tables of available chains

    # -- what depends on the kind of ring --

    @abstractmethod
    def _look(self) -> None:
        """Take note of the chains that the driver made available."""

    @abstractmethod
    def _ring_written(self, event: Access) -> bool:
        """Judge a write of the device if it touches what is its own of the ring."""

    @abstractmethod
    def own_parts(self) -> tuple[Span, ...]:
        """Return the parts of the ring that the device writes."""

    @abstractmethod
    def driver_parts(self) -> tuple[Span, ...]:
        """Return the parts of the ring whose change by the driver must be told."""

    @abstractmethod
    def _wish(self) -> int:
        """Return what the driver wrote to say which notifications it wants."""

    @abstractmethod
    def _asks(self, duty: _Duty) -> bool:
        """Tell whether the driver asks for this notification now."""

    def _forbidden(self, start: int, end: int) -> str:
        """Return the rule that forbids a write to [start, end) whatever the buffers are."""
        return ""

    def _say(self, rule: str, what: str) -> None:
        self.found.append(Broken(rule, self._number, what))

    def _load(self, address: int, length: int = 2) -> int:
        return int.from_bytes(self.memory.read(address, length), "little")

    # -- one event --

    def take(self, number: int, event: Event) -> None:
        self._number = number
        match event:
            case StatusWritten():
                self._status(event.value)
            case QueueReset():
                self._shut("V014")
            case QueueEnabled():
                self.layout = event.layout
                self._open_queue()
            case Suspended():
                self._suspended()
            case Notification():
                self._notified()
            case Access() if event.source == "":
                if event.is_write:
                    self.stored(number)
            case Access() if not event.data:
                pass  # a zero-length read moves nothing
            case Access() if not self.is_ready and not self._is_elsewhere(event):
                self._say(self.closed, _told(event))
            case Access() if event.is_write:
                self._write(event)
            case Access():
                self._read(event)

    def stored(self, number: int) -> None:
        """Software wrote to memory, or what the device's addresses lead to was changed."""
        self._number, self.fetched = number, 0
        self._look()
        if self._wish() != self.wish:
            self.wish = self._wish()
            self._weigh(self.duties)

    def knows(self, address: int, length: int, *, is_write: bool) -> bool:
        """Tell whether these bytes are all the device's to write, or to read."""
        own = any(at <= address and address + length <= at + size for at, size in self.own_parts())
        return own or (self.writable if is_write else self.readable).missing(address, address + length) is None

    def _is_elsewhere(self, event: Access) -> bool:
        return _Spans(self.allowed).missing(event.address, event.address + len(event.data)) is None

    def _status(self, value: int) -> None:
        """[VIRTIO1.4 2.1, 2.4]"""
        if value == 0:
            self._shut("V011" if self.is_ready or self.closed != "V001" else "V001")
        elif value & DRIVER_OK and self.closed == "V019":
            self.is_ready, self.closed = True, "V011"
            self._look()
        elif value & DRIVER_OK and not self.is_ready and self.closed != "V014":
            self._open_queue()

    def _shut(self, rule: str) -> None:
        """The queue was reset."""
        self.duties.clear()
        self._claims()
        self._first = 0
        self._begin()
        self.is_ready, self.closed = False, rule

    def _open_queue(self) -> None:
        self._begin()
        self.is_ready, self.closed = True, "V011"
        self._look()

    def _suspended(self) -> None:
        for duty in self.duties:
            if duty.must and self.has_vector:
                self._say("V023", f"{self._publication(duty)} was not notified before")
            duty.must = False
        self.is_ready, self.closed = False, "V019"

    def _publication(self, duty: _Duty) -> str:
        return f"used index {duty.old} to {duty.new}"

    def _became_available(self, chain: Chain) -> None:
        """Take note of one chain."""
        self.erred = self.erred or bool(chain.error) or chain.head in self.out
        one = Available(chain, self._number)
        self.out.setdefault(chain.head, []).append(one)
        self.order.append(one)
        self._open(chain, True)
        if self.on_available is not None:
            self.on_available(one)

    def _open(self, chain: Chain, is_open: bool) -> None:
        """Let the device reach the buffers of a chain, or not any more."""
        tables = [chain.table] if chain.table is not None else []
        for spans, buffers in ((self.readable, [*chain.readable, *tables]), (self.not_to_write, [*chain.readable, *tables]),
                               (self.writable, chain.writable)):  # fmt: skip
            act: Callable[[int, int], None] = spans.add if is_open else spans.discard
            for address, length in buffers:
                act(address, length)

    # -- reads --

    def _read(self, event: Access) -> None:
        start, end = event.address, event.address + len(event.data)
        if self.erred:
            self._count_read(start, end)
        if self.readable.missing(start, end) is None:
            return
        granule = self.granule
        wide = _Spans((low // granule * granule, -(-high // granule) * granule - low // granule * granule)
                      for low, high in self.readable.spans)  # fmt: skip
        gap = wide.missing(start, end)
        if gap is None:
            return
        if self.writable.touches(*gap):
            self._say(self.READS_WRITABLE, _told(event))
        elif any(start < at + 16 and at < end for at in self.beyond):
            self._say("V048", _told(event))
        else:
            self._say("stray read", _told(event))

    def _count_read(self, start: int, end: int) -> None:
        """The driver erred: does the device come to an end?"""
        tables = [one.chain.table for one in self.order if one.chain.table is not None]
        if any(start < at + length and at < end for at, length in (*self.layout.parts, *tables)):
            bound, before = BLOCK * read_bound(self.layout.size, len(self.order) + 1), self.fetched
            self.fetched += end - start
            if before <= bound < self.fetched:
                self._say(self.ENDLESS, f"{self.fetched} bytes of ring and tables on end")

    # -- writes --

    def _write(self, event: Access) -> None:
        start, end = event.address, event.address + len(event.data)
        if self._ring_written(event):
            return
        gap = self.writable.missing(start, end)
        if gap is None:
            for one in self.order:
                one.note(start, end)
        elif rule := self._forbidden(start, end):
            self._say(rule, _told(event))
        elif self.not_to_write.touches(*gap):
            self._say(self.WRITES_READABLE, _told(event))
        elif [one for one in self.returned if one.note(start, end)]:
            self._say(self.LATE, f"{_told(event)}, after the chain was returned")
        else:
            self._say("stray write", _told(event))

    def _returned(self, head: int, length: int, *, is_skipped: bool = False) -> None:
        """A chain that is out was published."""
        one = self.out[head].pop(0)
        self.order.remove(one)
        if not self.out[head]:
            del self.out[head]
        self._open(one.chain, False)
        one.claimed, one.in_time, one.is_skipped, self.fetched = length, one.written.prefix, is_skipped, 0
        self._forget(one)
        self.returned.append(one)
        if self.on_returned is not None:
            self.on_returned(one, length)

    def _batch(self, head: int) -> list[Available]:
        """Return the chains that a used element for this one returns: with IN_ORDER all in front of it too."""
        if not self.in_order:
            return self.out[head][:1]
        return self.order[: self.order.index(self.out[head][0]) + 1]

    def _batch_returned(self, batch: list[Available], length: int) -> None:
        for one in batch[:-1]:
            self._returned(one.chain.head, one.chain.writable_bytes, is_skipped=True)
        self._returned(batch[-1].chain.head, length)

    def _forget(self, new: Available) -> None:
        """The chains of that head that came back before are the driver's again: what was claimed of them is settled."""
        for one in [one for one in self.returned if one.chain.head == new.chain.head]:
            self._claim(one)
            self.returned.remove(one)

    def _claims(self) -> None:
        for one in self.returned:
            self._claim(one)
        self.returned.clear()

    def _claim(self, one: Available) -> None:
        """Was as much written as was claimed, and in time? [VIRTIO1.4 2.7.8.2]"""
        if one.claimed is not None and one.claimed > one.written.prefix:
            self._say(self.SKIPPED if one.is_skipped else self.OVER,
                      f"chain {one.chain.head}: len {one.claimed}, written {one.written.prefix} of {one.chain.writable_bytes}")  # fmt: skip
        elif one.claimed is not None and one.claimed > one.in_time:
            self._say(self.LATE, f"chain {one.chain.head}: len {one.claimed}, of which {one.in_time} were there when the index was written")

    # -- notifications --

    def _owe(self, old: int, new: int) -> None:
        """A publication moved the used index, or turn."""
        self.duties.append(_Duty(old, new, self._number))
        self._weigh(self.duties[-1:])
        spare = [duty for duty in self.duties if not duty.must]
        self.duties = [duty for duty in self.duties if duty.must or duty in spare[-ON_THEIR_WAY:]]

    def _weigh(self, duties: list[_Duty]) -> None:
        """These are new, or the driver's wish changed."""
        for duty in duties:
            asks = self._asks(duty)
            duty.must, duty.may = duty.must and asks, duty.may or asks

    def _notified(self) -> None:
        if not self.is_ready:
            self._say(self.closed, "a notification")
        elif not self.has_vector:
            self._say("V117", "a notification")
        else:
            asked = next((duty for duty in self.duties if duty.may), None)
            if asked is None:
                self._say(self.UNASKED, f"a notification after {len(self.duties)} publications, none of which asked for it")
                return
            self.duties.remove(asked)
            for duty in self.duties:
                duty.must = False

    # -- the end --

    def end(self, number: int, *, is_finished: bool, patience: int = 0) -> None:
        """No event comes after number ``number``; ``is_finished``: the device had its time for all that began ``patience`` before."""
        self._number = number
        self._claims()
        if not is_finished or self.needs_reset:
            return
        for duty in self.duties:
            if self.has_vector and duty.must and duty.since + patience <= number:
                self._say(self.UNTOLD, f"{self._publication(duty)} was never notified")
        late = [head for head, same in self.out.items() if same[0].since + patience <= number]
        if late and not self.erred:  # a broken ring may stop for good
            self._say("V046", f"chains {sorted(late)} never came back")


class DeviceRules:
    """Judges what a device did on one virtqueue, from a log of events.

    Parameters
    ----------
    layout : :class:`.ring.RingLayout`
        The queue.
    memory : :class:`GuestMemory`
        What memory holds before the first event: copied now.
    settings
        Further ones of the judge.
    """

    judge: type[RingJudge]

    def __init__(self, layout: RingLayout, memory: GuestMemory, **settings):
        self.layout, self.memory, self.settings = layout, memory.snapshot(), settings
        self.judge(layout, self.memory, **self.settings)  # bad settings fail now

    def broken(self, events: Iterable[Event], *, is_finished: bool = False) -> list[Broken]:
        """Return every rule that the device broke, in the order of the events; empty: none.

        An :class:`Access` with an empty ``source`` is software's, any other the device's: the log of a `GuestMemory` will do.
        ``is_finished``: the device had all the time that it needed, so that every good chain must have come back (V046) and every
        notification have arrived (V034, V037).
        """
        memory = self.memory.snapshot()
        judge = self.judge(self.layout, memory, **self.settings)
        number = -1
        for number, event in enumerate(events):
            if isinstance(event, Access) and event.is_write:
                memory.write(event.address, event.data)
            judge.take(number, event)
        judge.end(number + 1, is_finished=is_finished)
        return judge.found


def _told(event: Access) -> str:
    return f"{'write' if event.is_write else 'read'} of {len(event.data)} bytes at {event.address:#x} by {event.source}"
