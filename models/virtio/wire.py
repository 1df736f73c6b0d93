"""What a device may do with a split virtqueue, judged from its own reads and writes alone: memory is what its reads were answered.

:mod:`.rules` is told what software stores; here nobody tells. A chain is known as far as the device can know it: from the
available index, ring entries and descriptors that it read, each after what led to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..memory import Access
from .judge import Available, _Duty, _Spans, _told
from .rules import SplitDeviceJudge
from .split import DESCRIPTOR_BYTES, INDIRECT, MAX_CHAIN_BYTES, NEXT, NO_INTERRUPT, SPACE, WRITE, Chain, Descriptor, Span, SplitLayout

__all__ = ["KEPT_BYTES", "READABLE_LAST", "TOO_LONG", "Walked", "WireJudge", "WireRead"]

PAGE_BITS = 12
LATE = 5_000  # cycles for which notifications that were decided on may follow each other
KEPT_BYTES = 1 << 26  # of a chain; beyond it bytes are not kept
READABLE_LAST, TOO_LONG = "readable behind writable", "chain of more than 2^32 bytes"  # what a device may serve nevertheless


@dataclass(eq=False)
class _Part:
    """A buffer of a chain: ``length`` bytes from ``start``, which are bytes ``at`` on of its readable or writable ones."""

    start: int
    end: int
    at: int
    chain: Walked
    is_writable: bool


@dataclass(eq=False)
class Walked(Available):
    """A chain whose head the device knows.

    Attributes
    ----------
    turn : :class:`int`
        Its number, counted from the reset on.
    next : :class:`int` or None
        The descriptor that must be read to know more, of the table once there is one; None: the chain is known to its end.
    table : (address, length) or None
        Its indirect table, of which ``entries`` are known.
    sent, got : :class:`bytearray`
        What the device read of its readable bytes, wrote to its writable ones.
    lost : :class:`int`
        Reads of it that were refused.
    pending : :class:`int`
        Reads of it that are not answered.
    """

    turn: int = 0
    next: int | None = None
    numbers: list[int] = field(default_factory=list)
    steps: int = 0  # descriptors of buffers so far
    table: Span | None = None
    entries: dict[int, bytes] = field(default_factory=dict)
    parts: list[_Part] = field(default_factory=list)
    readable_bytes: int = 0
    writable_bytes: int = 0
    sent: bytearray = field(default_factory=bytearray)
    fetched: list[Span] = field(default_factory=list)
    got: bytearray = field(default_factory=bytearray)
    lost: int = 0
    pending: int = 0

    @property
    def error(self) -> str:
        """What the driver did wrong with it."""
        return self.chain.error

    def put(self, store: bytearray, at: int, data: bytes) -> None:
        """Keep bytes ``at`` on of one direction."""
        if at + len(data) > KEPT_BYTES:
            return
        if len(store) < at + len(data):
            store.extend(bytes(at + len(data) - len(store)))
        store[at : at + len(data)] = data

    def unfetched(self, length: int) -> Span | None:
        """Return the first span of the first ``length`` readable bytes that the device never read."""
        at = 0
        for low, high in sorted(self.fetched):
            if low > at:
                break
            at = max(at, high)
        return None if at >= length else (at, length)


@dataclass(eq=False)
class WireRead:
    """A read under way, and what its answer will tell."""

    address: int
    length: int
    since: int
    seen: int  # available chains that the device knew of when it asked
    kind: str = ""
    parts: list[tuple[_Part, int, int]] = field(default_factory=list)  # (part, offset in the read, bytes)
    duties: list[_Duty] = field(default_factory=list)
    tables: list[Walked] = field(default_factory=list)  # chains whose tables it touches


class WireJudge(SplitDeviceJudge):
    """Judges a device on one split virtqueue from its reads, their answers, its writes and its notifications.

    A ring entry counts when the read that showed it was issued after an available index that covers it was seen, a descriptor
    likewise: only then can no driver change it any more. [VIRTIO1.4 2.7.13] The driver's wish for notifications is what the device
    itself read behind its write of the used index: a device that did not look must notify. A table counts likewise, when its read was
    issued after the descriptor that refers to it was seen.

    Parameters
    ----------
    layout : :class:`SplitLayout`
    has_vector : :class:`bool`
        The queue has an MSI-X vector; without one no notification comes.
    indirect, event_idx : :class:`bool`
        INDIRECT_DESC, EVENT_IDX were negotiated.
    granule : :class:`int`
        A read of a buffer may be rounded out to whole blocks of so many bytes.
    on_returned : callable or None
        Called with each :class:`Walked` and the reported length when the device returns it.
    on_lost : callable or None
        Called with each :class:`Walked` that a reset ends.

    Attributes
    ----------
    erred : :class:`bool`
        The driver made any mistake, or an access of the ring was refused: the device need not go on.
    """

    def __init__(self, layout: SplitLayout, *, has_vector: bool = True, indirect: bool = False, event_idx: bool = False, granule: int = 4,
                 on_returned: Callable[[Walked, int], None] | None = None,
                 on_lost: Callable[[Walked], None] | None = None):  # fmt: skip
        self.on_lost, self._return = on_lost, on_returned
        super().__init__(layout, _Nothing(), indirect=indirect, event_idx=event_idx, has_vector=has_vector, granule=granule)

    # -- what the base does from memory --

    def _look(self) -> None:
        pass

    def _wish(self) -> int:
        return self.wish

    def _weigh(self, duties: list[_Duty]) -> None:
        pass

    def _open(self, chain: Chain, is_open: bool) -> None:
        pass

    def _begin(self) -> None:
        super()._begin()
        self.seen = self.turn = self._first  # chains whose index, whose head the device knows, since the reset
        self.seen_at = self.kicked_at = -1
        self.slots: dict[int, tuple[int, int]] = {}  # ring entry -> (head, `seen` when its read was issued)
        self.shown: dict[int, tuple[bytes, int]] = {}  # descriptor -> (bytes, the same)
        self.waiting: list[Walked] = []  # chains that are not known to their end
        self.held: dict[int, int] = {}  # descriptor -> chains that are out and have it
        self.pages: dict[int, list[_Part]] = {}

    def ended(self) -> None:
        """The device was reset, and is quiet."""
        for same in list(self.out.values()):
            for one in same:
                if self.on_lost is not None and isinstance(one, Walked):
                    self.on_lost(one)
        self._status(0)

    def kicked(self, number: int) -> None:
        """The driver rang the doorbell."""
        if self.kicked_at < 0:
            self.kicked_at = number

    # -- reads --

    def requested(self, number: int, address: int, length: int) -> WireRead:
        """The device asks for bytes; give the answer to :meth:`answered` or :meth:`refused`."""
        self._number = number
        layout, end = self.layout, address + length
        read = WireRead(address, length, number, self.seen)
        if not length:
            return read
        if not self.is_ready:
            self._say("V011", self._read_text(read))
        elif layout.desc <= address and end <= layout.desc + layout.desc_bytes:
            read.kind = "descriptors"
            first, last = (address - layout.desc) // DESCRIPTOR_BYTES, (end - 1 - layout.desc) // DESCRIPTOR_BYTES
            if not any(n in self.held for n in range(first, last + 1)) and not any(
                    one.next is not None and first <= one.next <= last for one in self.waiting):  # fmt: skip
                self._say("early read", f"{self._read_text(read)}, descriptors {first} to {last}, to which no available chain leads")
        elif layout.avail <= address and end <= layout.avail + layout.avail_bytes:
            read.kind = "available"
            if address <= layout.avail_idx < end:
                self.kicked_at = -1
            wish = layout.used_event if self.event_idx else layout.avail
            if address <= wish and wish + 2 <= end:
                read.duties = list(self.duties)
        elif not (layout.used <= address and end <= layout.used + layout.used_bytes):
            read.tables = [one for one in self.order if isinstance(one, Walked) and one.table is not None
                           and one.table[0] < end and address < sum(one.table)]  # fmt: skip
            if _Spans(one.table for one in read.tables if one.table is not None).missing(address, end) is not None:
                self._buffers_read(read)
        return read

    def _buffers_read(self, read: WireRead) -> None:
        address, end, granule = read.address, read.address + read.length, self.granule
        low, high = address // granule * granule, -(-end // granule) * granule
        touched = [part for part in self._parts(low, high) if not part.is_writable]
        whole = False
        for part in touched:
            start, stop = max(part.start, address), min(part.end, end)
            if start < stop:
                read.parts.append((part, start - address, stop - start))
                part.chain.pending += 1
                whole = whole or (start, stop) == (address, end)
        if whole:
            return
        spans = _Spans((part.start // granule * granule, -(-part.end // granule) * granule - part.start // granule * granule)
                       for part in touched)  # fmt: skip
        gap = spans.missing(address, end)
        if gap is None:
            return
        if any(part.is_writable and part.start < gap[1] and gap[0] < part.end for part in self._parts(*gap)):
            self._say("V027", self._read_text(read))
        else:
            self._say("stray read", self._read_text(read))

    def _parts(self, start: int, end: int) -> Iterator[_Part]:
        """Yield the buffers of chains that are out that share a page with [start, end), each once or more."""
        for page in range(start >> PAGE_BITS, (end - 1 >> PAGE_BITS) + 1):
            yield from self.pages.get(page, ())

    def answered(self, number: int, read: WireRead, offset: int, data: bytes, is_last: bool) -> None:
        """Bytes of a read arrived at the device, from ``offset`` on."""
        self._number = number
        layout, address = self.layout, read.address + offset
        end = address + len(data)
        if read.kind == "descriptors":
            first = -(-(address - layout.desc) // DESCRIPTOR_BYTES)
            for n in range(first, (end - layout.desc) // DESCRIPTOR_BYTES):
                at = layout.descriptor(n) - address
                self.shown[n] = data[at : at + DESCRIPTOR_BYTES], read.seen
            for one in list(self.waiting):
                self._walk(one)
        elif read.kind == "available":
            for at in range(-(-address // 2) * 2, end - 1, 2):
                value = int.from_bytes(data[at - address : at - address + 2], "little")
                if at == layout.avail_idx:
                    self._index_seen(value)
                elif at == layout.avail:
                    self._wished(read, value if not self.event_idx else None)
                elif at == layout.used_event:
                    self._wished(read, value if self.event_idx else None)
                else:
                    self.slots[(at - layout.avail_slot(0)) // 2] = value, read.seen
            self._take_heads()
        for one in read.tables:
            first = one.table[0]
            for n in range(-(-max(address - first, 0) // DESCRIPTOR_BYTES), min(end - first, one.table[1]) // DESCRIPTOR_BYTES):
                at = first + DESCRIPTOR_BYTES * n - address
                one.entries[n] = data[at : at + DESCRIPTOR_BYTES]
            if one in self.waiting:
                self._walk(one)
        for part, start, size in read.parts:
            low, high = max(start, offset), min(start + size, offset + len(data))
            if low < high:
                at, one = part.at + read.address + low - part.start, part.chain
                one.put(one.sent, at, data[low - offset : high - offset])
                one.fetched.append((at, at + high - low))
                if len(one.fetched) > 64:
                    one.fetched = _joined(one.fetched)
            if is_last:
                part.chain.pending -= 1

    def refused(self, number: int, read: WireRead) -> None:
        """A read was answered without data, or not well."""
        self._number = number
        for part, _, _ in read.parts:
            part.chain.lost += 1
            part.chain.pending -= 1
        if read.kind:
            self.erred = True

    def _read_text(self, read: WireRead) -> str:
        return f"read of {read.length} bytes at {read.address:#x} by the card"

    # -- what answers tell --

    def _index_seen(self, value: int) -> None:
        grown = value - self.seen & 0xFFFF
        if grown >= 0x8000 or self.jumped:
            return  # an older answer that was late
        if grown > self.layout.size:
            self.jumped = self.erred = True
            return
        if grown:
            self.seen += grown
            self.seen_at = self._number

    def _take_heads(self) -> None:
        """Take note of the chains whose entries in the ring are known."""
        size = self.layout.size
        while self.turn < self.seen:
            head, seen = self.slots.get(self.turn % size, (0, 0))
            if seen <= self.turn:
                return
            turn, self.turn = self.turn, self.turn + 1
            if head >= size:
                self.erred = True
                continue
            if head in self.out:
                self.erred = True
            one = Walked(Chain(head, (), (), (), None, "", False), self._number, turn=turn, next=head)
            self.out.setdefault(head, []).append(one)
            self.order.append(one)
            self.waiting.append(one)
            self._walk(one)

    def _walk(self, one: Walked) -> None:
        """Follow a chain as far as its descriptors are known. [VIRTIO1.4 2.7.5]"""
        error = ""
        readable, writable = list(one.chain.readable), list(one.chain.writable)
        while one.next is not None:
            raw = self._descriptor(one)
            if not raw:
                break
            found = Descriptor.unpack(raw)
            if one.table is None:
                one.numbers.append(one.next)
                self.held[one.next] = self.held.get(one.next, 0) + 1
            one.next = None
            if found.flags & INDIRECT:
                error = self._refer(one, found)
                continue
            one.steps += 1
            if found.address + found.length > SPACE:
                error = "a buffer beyond 2^64"
            elif one.readable_bytes + one.writable_bytes + found.length > MAX_CHAIN_BYTES:
                error = TOO_LONG
            elif not found.flags & WRITE and writable:
                error = READABLE_LAST
            else:
                self._add(one, found)
                (writable if found.flags & WRITE else readable).append((found.address, found.length))
                if found.flags & NEXT:
                    count = self.layout.size if one.table is None else one.table[1] // DESCRIPTOR_BYTES
                    if found.next >= count:
                        error = f"next {found.next} out of {'a queue' if one.table is None else 'an indirect table'} of {count}"
                    elif one.steps >= self.layout.size:
                        error = f"more than {self.layout.size} descriptors"
                    else:
                        one.next = found.next
        self.erred = self.erred or bool(error)
        is_whole = one.next is None and not error
        one.chain = Chain(one.chain.head, tuple(readable), tuple(writable), tuple(one.numbers), one.table, error, is_whole)
        if one.next is None:
            self.waiting.remove(one)

    def _descriptor(self, one: Walked) -> bytes:
        """Return the next descriptor of a chain; nothing while the device cannot know it."""
        if one.next is None:
            return b""
        if one.table is not None:
            return one.entries.get(one.next, b"")
        raw, seen = self.shown.get(one.next, (b"", 0))
        return raw if seen > one.turn else b""

    def _refer(self, one: Walked, found: Descriptor) -> str:
        """The chain goes on in a table; return what is wrong with that. [VIRTIO1.4 2.7.5.3]"""
        if not self.indirect:
            return "INDIRECT without the feature"
        if one.table is not None:
            return "INDIRECT inside an indirect table"
        if found.flags & NEXT:
            return "INDIRECT and NEXT together"
        if found.length % DESCRIPTOR_BYTES or not found.length:
            return f"an indirect table of {found.length} bytes"
        if found.address + found.length > SPACE:
            return "an indirect table beyond 2^64"
        one.table, one.next = (found.address, found.length), 0
        return ""

    def _add(self, one: Walked, found: Descriptor) -> None:
        """A buffer of a chain is known."""
        is_writable = bool(found.flags & WRITE)
        at = one.writable_bytes if is_writable else one.readable_bytes
        part = _Part(found.address, found.address + found.length, at, one, is_writable)
        if is_writable:
            one.writable_bytes += found.length
        else:
            one.readable_bytes += found.length
        if not found.length:
            return
        if found.length > KEPT_BYTES:  # nothing that a driver means
            self.erred = True
        one.parts.append(part)
        for page in range(part.start >> PAGE_BITS, min(part.end - 1 >> PAGE_BITS, (part.start + KEPT_BYTES) >> PAGE_BITS) + 1):
            self.pages.setdefault(page, []).append(part)

    def _wished(self, read: WireRead, value: int | None) -> None:
        """The device sees which notifications the driver wants."""
        if value is None:
            return
        self.wish = value
        for duty in read.duties:
            asks = self._asks(duty)
            if not duty.looked:
                duty.must, duty.may, duty.looked = asks, asks, True
            else:
                duty.must, duty.may = duty.must and asks, duty.may or asks

    # -- writes --

    def wrote(self, number: int, address: int, data: bytes) -> None:
        """The device wrote ``data``."""
        self._number = number
        layout, end = self.layout, address + len(data)
        if not data:
            return
        event = Access(address, data, True, "the card")
        if not self.is_ready:
            self._say("V011", _told(event))
            return
        if address < layout.used + layout.used_bytes and layout.used < end:
            self._used_ring(event)
            return
        touched, whole = [], False
        for part in self._parts(address, end):
            start, stop = max(part.start, address), min(part.end, end)
            if start < stop and part.is_writable:
                touched.append((start, stop - start))
                one, at = part.chain, part.at + start - part.start
                one.put(one.got, at, data[start - address : stop - address])
                one.written.add(at, at + stop - start)
                whole = whole or (start, stop) == (address, end)
        if whole:
            return
        gap = _Spans(touched).missing(address, end)
        if gap is None:
            return
        readable = [(part.start, part.end) for part in self._parts(*gap)]
        readable += [(one.table[0], sum(one.table)) for one in self.order if isinstance(one, Walked) and one.table is not None]
        if layout.desc < end and address < layout.desc + layout.desc_bytes:
            self._say("V028", _told(event))
        elif any(low < gap[1] and gap[0] < high for low, high in readable):
            self._say("V026", _told(event))
        elif any(one.note(address, end) for one in self.returned):
            self._say("V040", f"{_told(event)}, after the chain was returned")
        else:
            self._say("stray write", _told(event))

    def _returned(self, head: int, length: int) -> None:
        one = self.out[head][0] if head in self.out else None
        if isinstance(one, Walked):
            if one.next is not None and not self.erred:
                self._say("blind return", f"chain {head}, descriptor {one.next} of which was not read")
            self._close(one)
        super()._returned(head, length)
        if isinstance(one, Walked) and self._return is not None:
            self._return(one, length)

    def _close(self, one: Walked) -> None:
        if one in self.waiting:
            self.waiting.remove(one)
        for n in one.numbers:
            self.held[n] -= 1
            if not self.held[n]:
                del self.held[n]
        for part in one.parts:
            for page in range(part.start >> PAGE_BITS, min(part.end - 1 >> PAGE_BITS, (part.start + KEPT_BYTES) >> PAGE_BITS) + 1):
                same = self.pages[page]
                same.remove(part)
                if not same:
                    del self.pages[page]

    # -- notifications --

    def _notified(self) -> None:
        if not self.is_ready or not self.has_vector:
            super()._notified()
            return
        asks = bool(self.wish & NO_INTERRUPT) is False or self.event_idx
        for duty in self.duties:
            duty.may = duty.may or (not duty.looked and asks)
        super()._notified()
        for duty in self.duties:  # the driver sees all of them now
            duty.looked = True
        self.duties = [duty for duty in self.duties if self._number - duty.since < LATE]  # they were served with this one

    def notified(self, number: int) -> None:
        """A notification of this queue arrived."""
        self._number = number
        self._notified()

    def merged(self, before: int) -> None:
        """Notifications that were due before event ``before`` waited for one vector together: one of them comes."""
        old = [duty for duty in self.duties if duty.since < before and duty.looked and duty.may]
        for duty in old[:-1]:
            old[-1].must = old[-1].must or duty.must
            self.duties.remove(duty)

    # -- the end --

    def end(self, number: int, *, is_finished: bool, patience: int = 0) -> None:
        super().end(number, is_finished=is_finished, patience=patience)
        if not is_finished or self.needs_reset or self.erred or not self.is_ready:
            return
        if self.turn < self.seen and 0 <= self.seen_at <= number - patience:
            self._say("V046", f"{self.seen - self.turn} available chains whose ring entries were never read")
        if 0 <= self.kicked_at <= number - patience:
            self._say("deaf", f"no look at the available index since event {self.kicked_at}")


class _Nothing:
    """Memory of which nothing is known."""

    def read(self, address: int, length: int) -> bytes:
        return bytes(length)


def _joined(spans: list[Span]) -> list[Span]:
    found: list[Span] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found
