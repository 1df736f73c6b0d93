"""Mappings of one domain: disjoint ranges of addresses that are inserted and removed whole, never split. [VIRTIO1.4 5.13.6.5, 5.13.6.6]"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

__all__ = ["IntervalMap", "Mapping"]

_start, _end = attrgetter("start"), attrgetter("end")


@dataclass(frozen=True, slots=True)
class Mapping:
    """What one MAP request made: addresses ``start`` to ``end``, inclusive, lead to physical ones from ``phys`` on."""

    start: int
    end: int
    phys: int
    flags: int

    def leads_to(self, address: int) -> int:
        """Return the physical address for one in the mapping."""
        return self.phys + address - self.start


@dataclass(frozen=True, slots=True)
class IntervalMap:
    """Disjoint mappings by address. It does not change: `insert` and `remove` return another.

    Raises
    ------
    :exc:`ValueError`
        From `insert`, when the mapping overlaps one that is there; from `remove`, when the range would split one.
    """

    mappings: tuple[Mapping, ...] = ()

    def __len__(self) -> int:
        return len(self.mappings)

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self.mappings)

    def at(self, address: int) -> Mapping | None:
        """Return the mapping that covers ``address``."""
        n = bisect_right(self.mappings, address, key=_start) - 1
        return self.mappings[n] if n >= 0 and address <= self.mappings[n].end else None

    def touched(self, start: int, end: int) -> tuple[Mapping, ...]:
        """Return the mappings that share an address with ``start`` to ``end``, inclusive; none when the range is inverted."""
        return self.mappings[self._slice(start, end)]

    def splits(self, start: int, end: int) -> bool:
        """Tell whether a mapping lies partly in the range and partly outside."""
        touched = self.touched(start, end)
        return bool(touched) and (touched[0].start < start or touched[-1].end > end)

    def insert(self, mapping: Mapping) -> IntervalMap:
        """Return the map with one more."""
        span = self._slice(mapping.start, mapping.end)
        if mapping.end < mapping.start or span.start != span.stop:
            raise ValueError(f"Mapping must cover addresses and overlap none, not {mapping!r}")
        return IntervalMap(self.mappings[: span.start] + (mapping,) + self.mappings[span.start :])

    def remove(self, start: int, end: int) -> IntervalMap:
        """Return the map without those in the range."""
        if self.splits(start, end):
            raise ValueError(f"Range must not split a mapping, not {start!r} to {end!r}")
        span = self._slice(start, end)
        return self if span.start == span.stop else IntervalMap(self.mappings[: span.start] + self.mappings[span.stop :])

    def _slice(self, start: int, end: int) -> slice:
        first = bisect_left(self.mappings, start, key=_end)
        return slice(first, bisect_right(self.mappings, end, lo=first, key=_start) if start <= end else first)
