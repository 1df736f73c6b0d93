"""What a device may do with a packed virtqueue. [VIRTIO1.4 2.8]"""

from __future__ import annotations

from ..memory import Access, AccessFault
from .judge import DeviceRules, RingJudge, _Duty, _told
from .packed import EventFlags, PackedDescriptor, PackedLayout, read_list
from .ring import DESCRIPTOR_BYTES, Chain, Span

__all__ = ["PackedDeviceJudge", "PackedDeviceRules"]


class PackedDeviceJudge(RingJudge):
    """Judges a device on one packed virtqueue, event by event; see :class:`.judge.RingJudge`.

    Used descriptors may be written in any order; one counts when the driver comes to it. A write is taken as done at once.
    """

    layout: PackedLayout
    WRITES_READABLE, READS_WRITABLE, LATE, OVER, SKIPPED, UNTOLD, UNASKED, ENDLESS = (
        "V053", "V054", "late data", "length", "V064", "V062", "unasked", "V067")  # fmt: skip

    def _begin(self) -> None:
        super()._begin()
        self.turn = self.used_turn = self._first  # of the next list; of the next used descriptor
        self.ring = bytearray(DESCRIPTOR_BYTES * self.layout.size)  # available descriptors, and what the device made of them
        self.event = bytearray(4)  # the device's event area as the device wrote it
        self.marked: set[int] = set()  # turns that are marked used, up to which the driver has not come
        self.done: set[int] = set()  # places that were used at any time

    def own_parts(self) -> tuple[Span, ...]:
        return self.layout.parts[0], self.layout.parts[2]

    def driver_parts(self) -> tuple[Span, ...]:
        return self.layout.parts[:2]

    def _publication(self, duty: _Duty) -> str:
        return f"used descriptors of turns {duty.old} to {duty.new - 1}"

    def _look(self) -> None:
        """Take note of the lists that the driver made available. [VIRTIO1.4 2.8.6]"""
        while self.is_ready and self.turn - self.used_turn < self.layout.size:
            try:
                chain = self._list()
            except AccessFault:
                return  # the device cannot see it either
            if chain is None:
                return
            for number in chain.numbers:
                at = DESCRIPTOR_BYTES * number
                self.ring[at : at + DESCRIPTOR_BYTES] = self.memory.read(self.layout.desc + at, DESCRIPTOR_BYTES)
            self.turn += len(chain.numbers)
            self._became_available(chain)

    def _list(self) -> Chain | None:
        try:
            return read_list(self.memory, self.layout, self.turn, indirect=self.indirect)
        except AccessFault as fault:
            bare = read_list(self.memory, self.layout, self.turn)  # without its table
            return None if bare is None else Chain(bare.head, (), (), bare.numbers, None, str(fault), False)

    # -- writes --

    def _ring_written(self, event: Access) -> bool:
        start, end = event.address, event.address + len(event.data)
        for (at, length), act in zip(self.own_parts(), (self._descriptors, self._event_area)):
            if start < at + length and at < end:
                low, high = max(start, at), min(end, at + length)
                if (low, high) != (start, end):
                    self._say("stray write", f"{_told(event)}, over the end of the ring or the event area")
                act(low - at, event.data[low - start : high - start], event)
                return True
        return False

    def _event_area(self, at: int, data: bytes, event: Access) -> None:
        """[VIRTIO1.4 2.8.14]"""
        self.event[at : at + len(data)] = data
        place, flags = int.from_bytes(self.event[:2], "little"), int.from_bytes(self.event[2:], "little")
        if flags > EventFlags.DESC or (flags == EventFlags.DESC and (not self.event_idx or place & 0x7FFF >= self.layout.size)):
            self._say("V063", f"{_told(event)}: offset and wrap counter {place:#06x}, flags {flags:#06x}")

    def _descriptors(self, at: int, data: bytes, event: Access) -> None:
        """Bytes of the ring were written. [VIRTIO1.4 2.8.15]"""
        if self.order and self.order[0].chain.head < 0:
            return  # a list without an end: nobody knows what the device takes for one
        end = at + len(data)
        places = range(at // DESCRIPTOR_BYTES, -(-end // DESCRIPTOR_BYTES))
        for place in places:
            turn = self.used_turn + (place - self.used_turn) % self.layout.size
            if turn in self.marked or (turn >= self.turn and place in self.done):
                self._say("V056", f"{_told(event)}: descriptor {place}")
            elif turn >= self.turn:
                self._say("V055", f"{_told(event)}: descriptor {place}")
        self.ring[at:end] = data
        for place in places:
            turn = self.used_turn + (place - self.used_turn) % self.layout.size
            if turn < self.turn and self.layout.is_used(turn, self._descriptor(turn).flags):
                self.marked.add(turn)
        old = self.used_turn
        while self.used_turn in self.marked:
            self._used(self._descriptor(self.used_turn))
        if self.used_turn != old:
            self._owe(old, self.used_turn)

    def _descriptor(self, turn: int) -> PackedDescriptor:
        at = DESCRIPTOR_BYTES * (turn % self.layout.size)
        return PackedDescriptor.unpack(self.ring[at : at + DESCRIPTOR_BYTES])

    def _used(self, one: PackedDescriptor) -> None:
        """The driver comes to a used descriptor. [VIRTIO1.4 2.8.4 to 2.8.6, 2.8.8]"""
        turn, length = self.used_turn, one.length if one.flags & 2 else 0
        if one.id in self.out:
            batch = self._batch(one.id)
            last = batch[-1]
            if bool(last.written.spans) is not bool(one.flags & 2):
                self._say("V061", f"ID {one.id}: WRITE is {one.flags >> 1 & 1}, written are {last.written.spans}")
            self._batch_returned(batch, length)
        else:
            was = any(known.chain.head == one.id for known in self.returned)
            self._say("used twice" if was else "V058", f"ID {one.id} at descriptor {turn % self.layout.size}; out are {sorted(self.out)}")
            batch = self.order[:1]  # in its stead
        count = max(sum(len(known.chain.numbers) for known in batch), 1)
        skipped = self.marked & set(range(turn + 1, turn + count))
        if skipped:
            self._say("V058", f"descriptor {min(skipped) % self.layout.size} is marked used, inside the list or batch of ID {one.id}")
        passed = range(turn, turn + count)
        self.marked.difference_update(passed)
        self.done.update(at % self.layout.size for at in passed)
        self.used_turn += count

    # -- notifications --

    def _wish(self) -> int:
        """The driver's event area."""
        try:
            return self._load(self.layout.driver, 4)
        except AccessFault:
            return self.wish

    def _asks(self, duty: _Duty) -> bool:
        """[VIRTIO1.4 2.8.10]"""
        flags = self.wish >> 16 & 3
        if flags == EventFlags.DESC:
            return self.layout.passes(self.wish & 0xFFFF, duty.old, duty.new)
        return flags != EventFlags.DISABLE

    def _weigh(self, duties: list[_Duty]) -> None:
        flags = self.wish >> 16 & 3
        if flags == 3 or (flags == EventFlags.DESC and not self.event_idx):  # what no driver may write: the device does as it likes
            for duty in duties:
                duty.must, duty.may = False, True
        else:
            super()._weigh(duties)


class PackedDeviceRules(DeviceRules):
    """Judges what a device did on one packed virtqueue, from a log of events; see :class:`.judge.DeviceRules`."""

    judge = PackedDeviceJudge
