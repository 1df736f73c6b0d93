"""What a device may do with a split virtqueue, judged from what happened in memory and which interrupts came.

The judge predicts nothing: when a device reads, how often, in what pieces and in what order it serves chains is its own
affair. Every broken rule is named by its number in the list of device requirements (V001 and so on), or in words where the
specification has no sentence of its own.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ..memory import Access, AccessFault, GuestMemory
from .split import NO_INTERRUPT, Chain, Span, SplitLayout, read_chain

__all__ = ["RULES", "Available", "Broken", "Event", "Notification", "SplitDeviceJudge", "SplitDeviceRules", "StatusWritten"]

DRIVER_OK = 4  # device status [VIRTIO1.4 2.1]
ON_THEIR_WAY = 16  # notifications that can be decided on, but not arrived, when one more is

# Rule -> (a MUST, section, what it says).
RULES = {
    "V001": (True, "2.1.2", "nothing is read, written or notified before DRIVER_OK"),
    "V011": (True, "2.4.1", "nothing is read, written or notified after a reset"),
    "V026": (True, "2.7.5.1", "no device-readable buffer is written"),
    "V027": (False, "2.7.5.1", "no device-writable buffer is read"),
    "V028": (True, "2.7.5.1", "no descriptor table is written"),
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
    "V117": (True, "4.1.5.3.1", "no notification without a vector"),
    "early read": (True, "2.7.13", "a descriptor is read after the available index and the ring led to it"),
    "blind return": (True, "2.7.5", "a chain is returned after all of its descriptors were read"),
    "deaf": (True, "2.9", "an available buffer notification is looked into"),
    "used twice": (True, "2.7.8", "a chain is used once"),
    "used index": (True, "2.7.8", "the used index only grows, by what is out"),
    "stray write": (True, "2.7.5.1", "only writable buffers of available chains and the used ring are written"),
    "stray read": (True, "2.7.6", "only the rings and buffers of available chains are read"),
}


@dataclass(frozen=True, slots=True)
class StatusWritten:
    """Software wrote the device status; 0: a reset that is complete."""

    value: int


@dataclass(frozen=True, slots=True)
class Notification:
    """A used buffer notification of this queue arrived."""


Event = Access | StatusWritten | Notification


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
    """The notification that one write of the used index asks for: a must while every value seen since asked for it."""

    old: int
    new: int
    since: int  # number of the event
    must: bool = True
    may: bool = False
    looked: bool = False  # the device read the driver's wish since (:mod:`.wire`)


class SplitDeviceRules:
    """Judges what a device did on one split virtqueue, from a log of events.

    Parameters
    ----------
    layout : :class:`SplitLayout`
        The queue.
    memory : :class:`GuestMemory`
        What memory holds before the first event: copied now.
    is_ready : :class:`bool`
        DRIVER_OK is set before the first event.
    settings
        Further ones of :class:`SplitDeviceJudge`.
    """

    def __init__(self, layout: SplitLayout, memory: GuestMemory, *, is_ready: bool = True, **settings):
        self.layout, self.memory, self.settings = layout, memory.snapshot(), settings | {"is_ready": is_ready}
        SplitDeviceJudge(layout, self.memory, **self.settings)  # bad settings fail now

    def broken(self, events: Iterable[Event], *, is_finished: bool = False) -> list[Broken]:
        """Return every rule that the device broke, in the order of the events; empty: none.

        An :class:`Access` with an empty ``source`` is software's, any other the device's: the log of a `GuestMemory` will do.
        ``is_finished``: the device had all the time that it needed, so that every good chain must have come back (V046) and every
        notification have arrived (V034, V037).
        """
        memory = self.memory.snapshot()
        judge = SplitDeviceJudge(self.layout, memory, **self.settings)
        number = -1
        for number, event in enumerate(events):
            if isinstance(event, Access) and event.is_write:
                memory.write(event.address, event.data)
            judge.take(number, event)
        judge.end(number + 1, is_finished=is_finished)
        return judge.found


class SplitDeviceJudge:
    """Judges a device on one split virtqueue, event by event.

    Notification is judged with the races that the specification leaves: a notification is missing only if the driver asked for it
    all the time since the used index was written, and one too many only if he did not at any time since; one may serve several.

    Parameters
    ----------
    layout : :class:`SplitLayout`
        The queue.
    memory : object with read
        Memory as the device addresses it and as software left it; changes before :meth:`take` is told.
    indirect, event_idx : :class:`bool`
        INDIRECT_DESC, EVENT_IDX were negotiated.
    has_vector : :class:`bool`
        The queue is mapped to an MSI-X vector; without one no notification comes.
    is_ready : :class:`bool`
        DRIVER_OK is set before the first event.
    index : :class:`int`
        Both indices before the first event.
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
        Chains that are available, by head.
    needs_reset : :class:`bool`
        The device was seen to ask for a reset: it need not serve this queue any more. Set by the owner, ended by the reset.
    """

    def __init__(self, layout: SplitLayout, memory: Readable, *, indirect: bool = False, event_idx: bool = False,
                 has_vector: bool = True, is_ready: bool = True, index: int = 0, granule: int = 4, allowed: Iterable[Span] = (),
                 on_available: Callable[[Available], None] | None = None,
                 on_returned: Callable[[Available, int], None] | None = None):  # fmt: skip
        if granule < 1 or granule & (granule - 1):
            raise ValueError(f"Granule of reads must be a power of two, not {granule!r}")
        self.layout, self.memory = layout, memory
        self.indirect, self.event_idx, self.has_vector = indirect, event_idx, has_vector
        self.granule, self.allowed = granule, tuple(allowed)
        self.on_available, self.on_returned = on_available, on_returned
        self.found: list[Broken] = []
        self.is_ready = self.was_ready = is_ready
        self._number, self._first = 0, index
        self.wish = 0
        self._begin()
        self._look()

    def _begin(self) -> None:
        """Nothing is out: as after a reset."""
        layout = self.layout
        self.avail_index = self.used_index = self._first
        self.used = bytearray(layout.used_bytes)  # the used ring as the device wrote it
        self.used[2:4] = self._first.to_bytes(2, "little")
        self.needs_reset = False
        self.jumped = self.erred = False  # the available index cannot be; the driver made any mistake
        self.wish = self._wish()
        self.out: dict[int, list[Available]] = {}  # head -> available chains of that head: one, unless the driver erred
        self.returned: list[Available] = []
        self.fresh: set[int] = set()  # bytes of the used ring's elements that were written for the coming lap
        self.beyond: set[int] = set()  # addresses of descriptors that are none
        self.duties: list[_Duty] = []
        self.readable = _Spans(((layout.desc, layout.desc_bytes), (layout.avail, layout.avail_bytes), (layout.used, layout.used_bytes)))
        self.writable = _Spans()
        for address, length in self.allowed:
            self.readable.add(address, length)
            self.writable.add(address, length)
        self.not_to_write = _Spans()  # readable buffers and indirect tables of available chains

    def _say(self, rule: str, what: str) -> None:
        self.found.append(Broken(rule, self._number, what))

    def _load(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def _used(self, address: int) -> int:
        """A word of the used ring."""
        at = address - self.layout.used
        return int.from_bytes(self.used[at : at + 2], "little")

    # -- one event --

    def take(self, number: int, event: Event) -> None:
        self._number = number
        match event:
            case StatusWritten():
                self._status(event.value)
            case Notification():
                self._notified()
            case Access() if event.source == "":
                if event.is_write:
                    self.stored(number)
            case Access() if not event.data:
                pass  # a zero-length read moves nothing
            case Access() if not self.is_ready and not self._is_elsewhere(event):
                self._say("V011" if self.was_ready else "V001", _told(event))
            case Access() if event.is_write:
                self._write(event)
            case Access():
                self._read(event)

    def stored(self, number: int) -> None:
        """Software wrote to memory, or what the device's addresses lead to was changed."""
        self._number = number
        self._look()
        if self._wish() != self.wish:
            self.wish = self._wish()
            self._weigh(self.duties)

    def knows(self, address: int, length: int, *, is_write: bool) -> bool:
        """Tell whether these bytes are all the device's to write, or to read."""
        used = self.layout.used <= address and address + length <= self.layout.used + self.layout.used_bytes
        return used or (self.writable if is_write else self.readable).missing(address, address + length) is None

    def _is_elsewhere(self, event: Access) -> bool:
        return _Spans(self.allowed).missing(event.address, event.address + len(event.data)) is None

    def _status(self, value: int) -> None:
        """[VIRTIO1.4 2.1, 2.4]"""
        if value == 0:
            self.duties.clear()
            self._claims()
            self._first = 0
            self._begin()
            self.is_ready = False
        elif value & DRIVER_OK and not self.is_ready:
            self._begin()
            self.is_ready = self.was_ready = True
            self._look()

    def _look(self) -> None:
        """Take note of the chains that the driver made available. [VIRTIO1.4 2.7.6]"""
        if not self.is_ready or self.jumped:
            return
        try:
            index = self._load(self.layout.avail_idx)
        except AccessFault:
            return  # the device cannot see it either
        count = index - self.avail_index & 0xFFFF
        if count > self.layout.size:
            self.jumped = self.erred = True  # nothing of it can be meant [V047]
            return
        for _ in range(count):
            try:
                head = self._load(self.layout.avail_slot(self.avail_index))
            except AccessFault:
                return
            self.avail_index = self.avail_index + 1 & 0xFFFF
            try:
                chain = read_chain(self.memory, self.layout, head, indirect=self.indirect)
            except AccessFault as fault:
                chain = Chain(head, (), (), (), None, str(fault), False)
            if chain.beyond is not None:
                self.beyond.add(chain.beyond)
            self.erred = self.erred or bool(chain.error) or head in self.out
            if head < self.layout.size:
                one = Available(chain, self._number)
                self.out.setdefault(head, []).append(one)
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
        if self.readable.missing(start, end) is None:
            return
        granule = self.granule
        wide = _Spans((low // granule * granule, -(-high // granule) * granule - low // granule * granule)
                      for low, high in self.readable.spans)  # fmt: skip
        gap = wide.missing(start, end)
        if gap is None:
            return
        if self.writable.touches(*gap):
            self._say("V027", _told(event))
        elif any(start < at + 16 and at < end for at in self.beyond):
            self._say("V048", _told(event))
        else:
            self._say("stray read", _told(event))

    # -- writes --

    def _write(self, event: Access) -> None:
        start, end = event.address, event.address + len(event.data)
        layout = self.layout
        if start < layout.used + layout.used_bytes and layout.used < end:
            self._used_ring(event)
            return
        gap = self.writable.missing(start, end)
        if gap is None:
            for one in (one for same in self.out.values() for one in same):
                one.note(start, end)
        elif start < layout.desc + layout.desc_bytes and layout.desc < end:
            self._say("V028", _told(event))
        elif self.not_to_write.touches(*gap):
            self._say("V026", _told(event))
        elif [one for one in self.returned if one.note(start, end)]:
            self._say("V040", f"{_told(event)}, after the chain was returned")
        else:
            self._say("stray write", _told(event))

    def _used_ring(self, event: Access) -> None:
        """A write that touches the used ring. [VIRTIO1.4 2.7.8, 2.7.10]"""
        layout, start, end = self.layout, event.address, event.address + len(event.data)
        before = self._used(layout.used_idx)
        low, high = max(start, layout.used), min(end, layout.used + layout.used_bytes)
        self.used[low - layout.used : high - layout.used] = event.data[low - start : high - start]
        if start < layout.used or end > layout.used + layout.used_bytes:
            self._say("stray write", f"{_told(event)}, over the end of the used ring")
        if end > layout.avail_event and not self.event_idx:
            self._say("stray write", f"{_told(event)}, where avail_event would be")
        if start < layout.used + 2:
            flags = self._used(layout.used)
            if self.event_idx and flags:
                self._say("V044", f"flags are {flags}")
            elif flags > 1:
                self._say("V043", f"flags are {flags}")
        touches_index = start < layout.used_idx + 2 and layout.used_idx < end
        low, high = max(start, layout.used_slot(0)), min(end, layout.avail_event)
        if low < high:
            if touches_index and self._used(layout.used_idx) != before:
                self._say("V039", f"{_told(event)}: index and elements at once, the index first")
            self._elements(low, high)
        if touches_index:
            self._index(before)

    def _elements(self, low: int, high: int) -> None:
        """Bytes of elements were written: only those of turns that can come next."""
        layout, first = self.layout, self.layout.used_slot(0)
        count = sum(len(same) for same in self.out.values())
        for slot in range((low - first) // 8, (high - first + 7) // 8):
            ahead = (slot - self.used_index) % layout.size
            if ahead >= count:
                self._say("V039", f"element {slot} is written while {count} chains are out and the index is {self.used_index}")
        self.fresh.update(range(low - first, high - first))

    def _index(self, before: int) -> None:
        """The used index was written."""
        layout, index = self.layout, self._used(self.layout.used_idx)
        grown = index - before & 0xFFFF
        count = sum(len(same) for same in self.out.values())
        if grown > count:
            self._say("used index", f"from {before} to {index} while {count} chains are out")
            self.used_index = index
            return
        for n in range(grown):
            slot = (before + n) % layout.size
            places = set(range(8 * slot, 8 * slot + 8))
            if not places <= self.fresh:
                self._say("V039", f"index {index} covers element {slot}, which was not written")
            self.fresh -= places
            at = layout.used_slot(before + n) - layout.used
            raw = bytes(self.used[at : at + 8])
            self._returned(int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little"))
        self.used_index = index
        if grown:
            self.duties.append(_Duty(before, index, self._number))
            self._weigh(self.duties[-1:])
            spare = [duty for duty in self.duties if not duty.must]
            self.duties = [duty for duty in self.duties if duty.must or duty in spare[-ON_THEIR_WAY:]]

    def _returned(self, head: int, length: int) -> None:
        """An element was published."""
        if head not in self.out:
            was = any(one.chain.head == head for one in self.returned)
            self._say("used twice" if was else "V042", f"id {head}; out are {sorted(self.out)}")
            return
        one = self.out[head].pop(0)
        if not self.out[head]:
            del self.out[head]
        self._open(one.chain, False)
        one.claimed, one.in_time = length, one.written.prefix
        self._forget(one)
        self.returned.append(one)
        if self.on_returned is not None:
            self.on_returned(one, length)

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
            self._say("V041", f"chain {one.chain.head}: len {one.claimed}, written {one.written.prefix} of {one.chain.writable_bytes}")
        elif one.claimed is not None and one.claimed > one.in_time:
            self._say("V040", f"chain {one.chain.head}: len {one.claimed}, of which {one.in_time} were there when the index was written")

    # -- notifications --

    def _asks(self, duty: _Duty) -> bool:
        """Does the driver ask for this notification now?"""
        if self.event_idx:  # [VIRTIO1.4 2.7.7.2] the slot at used_event was filled
            return self.wish - duty.old & 0xFFFF < (duty.new - duty.old & 0xFFFF)
        return not self.wish & NO_INTERRUPT

    def _wish(self) -> int:
        """What the driver wrote to say which notifications it wants."""
        try:
            return self._load(self.layout.used_event if self.event_idx else self.layout.avail)
        except AccessFault:
            return self.wish

    def _weigh(self, duties: list[_Duty]) -> None:
        """These are new, or the driver's wish changed."""
        for duty in duties:
            asks = self._asks(duty)
            duty.must, duty.may = duty.must and asks, duty.may or asks

    def _notified(self) -> None:
        if not self.is_ready:
            self._say("V011" if self.was_ready else "V001", "a notification")
        elif not self.has_vector:
            self._say("V117", "a notification")
        else:
            asked = next((duty for duty in self.duties if duty.may), None)
            if asked is None:
                self._say("V038" if self.event_idx else "V035",
                          f"a notification after {len(self.duties)} writes of the index, none of which asked for it")  # fmt: skip
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
                self._say("V037" if self.event_idx else "V034", f"used index {duty.old} to {duty.new} was never notified")
        late = [head for head, same in self.out.items() if same[0].since + patience <= number]
        if late and not self.erred:  # a broken ring may stop for good
            self._say("V046", f"chains {sorted(late)} never came back")


def _told(event: Access) -> str:
    return f"{'write' if event.is_write else 'read'} of {len(event.data)} bytes at {event.address:#x} by {event.source}"
