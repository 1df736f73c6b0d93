"""Mappings as intervals: against a list that is searched from end to end, and UNMAP's examples of the standard."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.virtio.intervals import IntervalMap, Mapping

TOP = (1 << 64) - 1
# Few addresses near both ends, so that neighbours, overlaps and edges are common.
ADDRESS = st.one_of(st.integers(0, 24), st.integers(TOP - 8, TOP))
OPERATION = st.tuples(st.sampled_from(["insert", "insert", "remove"]), ADDRESS, ADDRESS)


class Naive:
    """The same with a list in no order."""

    def __init__(self):
        self.mappings = []

    def touched(self, start, end):
        return [one for one in self.mappings if one.start <= end and start <= one.end and start <= end]

    def splits(self, start, end):
        return any(one.start < start or one.end > end for one in self.touched(start, end))

    def at(self, address):
        return next((one for one in self.mappings if one.start <= address <= one.end), None)


@settings(max_examples=400, deadline=None)
@given(st.lists(OPERATION, max_size=40), st.lists(st.tuples(ADDRESS, ADDRESS), max_size=8))
def test_intervals_as_a_list(operations, questions):
    """MODEL-VIOMMU-MAP-1 (R76): any inserts and removals give what a naive list gives: contents, lookups, overlaps, splits; older maps
    stay as they were."""
    naive, mapped = Naive(), IntervalMap()
    for n, (what, start, end) in enumerate(operations):
        before, copy = mapped, list(mapped)
        if what == "insert":
            one = Mapping(start, end, n << 12, n)
            if end < start or naive.touched(start, end):
                with pytest.raises(ValueError, match="must cover addresses and overlap none"):
                    mapped.insert(one)
            else:
                mapped = mapped.insert(one)
                naive.mappings.append(one)
        elif naive.splits(start, end):
            with pytest.raises(ValueError, match="must not split"):
                mapped.remove(start, end)
        else:
            mapped = mapped.remove(start, end)
            naive.mappings = [one for one in naive.mappings if one not in naive.touched(start, end)]
        assert list(before) == copy
        assert list(mapped) == sorted(naive.mappings, key=lambda one: one.start)
        assert len(mapped) == len(naive.mappings)
    for start, end in questions:
        assert set(mapped.touched(start, end)) == set(naive.touched(start, end))
        assert mapped.splits(start, end) is naive.splits(start, end)
        assert mapped.at(start) == naive.at(start)


def test_intervals_lead_to():
    """MODEL-VIOMMU-MAP-2: an address leads to the byte that lies as far from the physical start, at both ends of 64 bits."""
    one = Mapping(0x1000, 0x2FFF, 0xABC000, 3)
    assert [one.leads_to(at) for at in (0x1000, 0x1001, 0x2FFF)] == [0xABC000, 0xABC001, 0xABDFFF]
    mapped = IntervalMap().insert(Mapping(TOP, TOP, 5, 1)).insert(Mapping(0, 0, 7, 1))
    assert [mapped.at(at) and mapped.at(at).leads_to(at) for at in (0, 1, TOP - 1, TOP)] == [7, None, None, 5]
