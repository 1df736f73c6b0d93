"""What a device may do with a split virtqueue. [VIRTIO1.4 2.7]"""

from __future__ import annotations

from ..memory import Access, AccessFault
from .judge import RULES, Available, Broken, DeviceRules, Event, Notification, RingJudge, StatusWritten, _Duty, _told
from .ring import Chain, Span
from .split import NO_INTERRUPT, SplitLayout, read_chain

__all__ = ["RULES", "Available", "Broken", "Event", "Notification", "SplitDeviceJudge", "SplitDeviceRules", "StatusWritten"]


class SplitDeviceJudge(RingJudge):
    """Judges a device on one split virtqueue, event by event; see :class:`.judge.RingJudge`."""

    layout: SplitLayout
    WRITES_READABLE, READS_WRITABLE, LATE, OVER, SKIPPED, ENDLESS = "V026", "V027", "V040", "V041", "V050", "V032"

    @property
    def UNTOLD(self) -> str:
        return "V037" if self.event_idx else "V034"

    @property
    def UNASKED(self) -> str:
        return "V038" if self.event_idx else "V035"

    def _begin(self) -> None:
        super()._begin()
        layout = self.layout
        self.avail_index = self.used_index = self._first
        self.used = bytearray(layout.used_bytes)  # the used ring as the device wrote it
        self.used[2:4] = self._first.to_bytes(2, "little")
        self.fresh: set[int] = set()  # bytes of the used ring's elements that were written for the coming lap

    def own_parts(self) -> tuple[Span, ...]:
        return (self.layout.parts[2],)

    def driver_parts(self) -> tuple[Span, ...]:
        return (self.layout.parts[1],)

    def _used(self, address: int) -> int:
        """A word of the used ring."""
        at = address - self.layout.used
        return int.from_bytes(self.used[at : at + 2], "little")

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
            if head < self.layout.size:
                self._became_available(chain)
            else:
                self.erred = True

    # -- writes --

    def _ring_written(self, event: Access) -> bool:
        layout = self.layout
        is_mine = event.address < layout.used + layout.used_bytes and layout.used < event.address + len(event.data)
        if is_mine:
            self._used_ring(event)
        return is_mine

    def _forbidden(self, start: int, end: int) -> str:
        return "V028" if start < self.layout.desc + self.layout.desc_bytes and self.layout.desc < end else ""

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
        n = 0
        while n < grown:
            slot = (before + n) % layout.size
            if not set(range(8 * slot, 8 * slot + 8)) <= self.fresh:
                self._say("V039", f"index {index} covers element {slot}, which was not written")
            at = layout.used_slot(before + n) - layout.used
            raw = bytes(self.used[at : at + 8])
            covered = self._element(int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little"), grown - n)
            for one in range(n, n + covered):
                slot = (before + one) % layout.size
                self.fresh -= set(range(8 * slot, 8 * slot + 8))
            n += covered
        self.used_index = index
        if grown:
            self._owe(before, index)

    def _element(self, head: int, length: int, most: int) -> int:
        """An element was published; return how many of the index's steps it stands for, ``most`` at most."""
        if head not in self.out:
            was = any(one.chain.head == head for one in self.returned)
            self._say("used twice" if was else "V042", f"id {head}; out are {sorted(self.out)}")
            return 1
        batch = self._batch(head)
        if len(batch) > most:  # [VIRTIO1.4 2.7.9]
            self._say("V049", f"id {head} is {len(batch)} chains ahead, the index only {most}")
            batch = batch[-1:]
        self._batch_returned(batch, length)
        return len(batch)

    # -- notifications --

    def _asks(self, duty: _Duty) -> bool:
        if self.event_idx:  # [VIRTIO1.4 2.7.7.2] the slot at used_event was filled
            return self.wish - duty.old & 0xFFFF < (duty.new - duty.old & 0xFFFF)
        return not self.wish & NO_INTERRUPT

    def _wish(self) -> int:
        try:
            return self._load(self.layout.used_event if self.event_idx else self.layout.avail)
        except AccessFault:
            return self.wish


class SplitDeviceRules(DeviceRules):
    """Judges what a device did on one split virtqueue, from a log of events; see :class:`.judge.DeviceRules`."""

    judge = SplitDeviceJudge
