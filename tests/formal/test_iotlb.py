"""Proof of both levels of the IOTLB: an answer is one entry of the space that asks, and never a forgotten one; beside it planted bugs."""

import pytest
from amaranth.hdl import Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.iommu import iotlb as module
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.iotlb import SUPERPAGES, Iotlb, first_of, forgets_all, same_space
from ringwall.rtl.iommu.iotlb_second import SecondIotlb
from ringwall.sim.formal import check_stream, mutant, offered, past, planted, prove, refute, refute_each

DEPTH, SECOND_DEPTH = 8, 13
FEATURES = Features(Sv39x4=True, PD8=True, Svpbmt=True)
PAGE_BITS = FEATURES.page_bits

# Of every page number one bit below, between and above the borders of 64 KiB, 2 MiB and 1 GiB, or such that make sets far from each other;
# of every other field a bit or two.
PLACES, SECOND_PLACES = (0, 4, 9, 18), (0, 2, 9, 18)
Space = data.StructLayout({"PSCID": 1, "first": 1, "GV": 1, "GSCID": 1})
Answer = data.StructLayout({"ppn": len(PLACES), "readable": 1, "writable": 1, "executable": 1, "U": 1, "PBMT": 2, "reach": 2})
Fill = data.StructLayout({"valid": 1, "vpn": len(PLACES), "space": Space, "G": 1, "is_fragment": 1, "answer": Answer})


def _spread(bits, width, places=PLACES):
    """The page number with ``bits`` at ``places``."""
    at = dict(zip(places, bits))
    return Cat(at.get(n, Const(0, 1)) for n in range(width))


def _is_for(fill, space):
    """Whether what is filled in translates for the space."""
    same = Cat(fill.space[name] == space[name] for name, _ in Space if name != "PSCID").all()
    return same & (fill.G | (fill.space.PSCID == space.PSCID))


def _fill_in(entry, fill, places=PLACES):
    """Make an entry of what is filled in, such as walkers do: fields that do not count are 0, only 4 KiB can be fragments."""
    return [
        entry.vpn.eq(_spread(fill.vpn, PAGE_BITS, places)), entry.G.eq(fill.G), entry.is_fragment.eq(fill.is_fragment),
        *(entry[name].eq(fill.space[name]) for name, _ in Space),
        *(entry[name].eq(fill.answer[name]) for name, _ in Answer if name != "ppn"),
        entry.ppn.eq(_spread(fill.answer.ppn, 44)),
        *_possible(fill.space), Assume(fill.space.first | ~fill.G), Assume((fill.answer.reach == 0) | ~fill.is_fragment),
    ]


def _possible(space):
    return [Assume(space.first | ~space.PSCID), Assume(space.GV | ~space.GSCID)]


class IotlbContract(wiring.Component):
    """Any fills, lookups, discards and invalidations; follows one page of one space, and one answer to it, which are picked first."""

    page: In(len(PLACES))
    space: In(Space)
    answer: In(Answer)
    vpn: In(len(PLACES))
    asking: In(Space)
    coming: In(Space)
    advance: In(1)
    discard: In(1)
    fill: In(Fill)
    forget: In(1)
    forget_av: In(1)
    forget_vpn: In(len(PLACES))

    def __init__(self, make=Iotlb, *, early=False):
        self.make, self.early = make, early
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.iotlb = iotlb = self.make(entries=4, ways=2, superpage_entries=2, features=FEATURES, early=self.early,
                                               knows_space=self.early)  # fmt: skip
        begun = Signal()
        m.d.sync += begun.eq(1)
        page, space, answer = Signal(len(PLACES)), Signal(Space), Signal(Answer)
        with m.If(~begun):
            m.d.sync += [page.eq(self.page), space.eq(self.space), answer.eq(self.answer)]

        entry, fill = iotlb.fill.p, self.fill
        lookup = begun & self.advance
        m.d.comb += [
            iotlb.vpn.eq(_spread(self.vpn, PAGE_BITS)), iotlb.advance.eq(lookup), iotlb.discard.eq(self.discard),
            iotlb.forget.eq(self.forget), iotlb.forget_av.eq(self.forget_av), iotlb.forget_vpn.eq(_spread(self.forget_vpn, PAGE_BITS)),
            *(iotlb.space[name].eq(self.asking[name]) for name, _ in Space),
            iotlb.fill.valid.eq(fill.valid & begun), *_fill_in(entry, fill), *_possible(self.asking),
        ]

        if self.early:
            coming = Signal(Space)
            with m.If(lookup):
                m.d.sync += coming.eq(self.coming)
            m.d.comb += [
                *(iotlb.coming_space[name].eq(self.coming[name]) for name, _ in Space), *_possible(self.coming),
                Assume(~begun | (self.asking == coming)),
            ]
            m.d.comb += Assume(~iotlb.fill.valid | (entry.as_value() == past(m, entry.as_value())))

        def below(reach):
            """How many of ``PLACES`` are inside of a page."""
            return sum(place < SUPERPAGES[reach - 1][0] for place in PLACES) if reach else 0

        kinds = range(4)
        covers = Signal()  # the entry translates the page for the space
        same_page, forgets, seen_ppn = Signal(4), Signal(4), Signal(len(PLACES))
        for reach in kinds:
            low = below(reach)
            m.d.comb += [
                same_page[reach].eq(fill.vpn[low:] == page[low:]),
                forgets[reach].eq(self.forget & (~self.forget_av | (self.forget_vpn[low:] == page[low:]))),
            ]
            with m.If(fill.answer.reach == reach):
                m.d.comb += seen_ppn.eq(Cat(page[:low], fill.answer.ppn[low:]))
        m.d.comb += covers.eq(
            iotlb.fill.valid & same_page.bit_select(fill.answer.reach, 1) & _is_for(fill, space))
        given = Signal(Answer)  # what the entry says of the page
        m.d.comb += [given.eq(fill.answer), given.ppn.eq(seen_ppn)]
        means = covers & (given == answer)

        # Entries that say `answer` and were not forgotten, by size, and fragments; those since the lookup; whether that may find one.
        live, since, may = Signal(5), Signal(5), Signal()
        new = Cat(*(means & (fill.answer.reach == reach) & ~fill.is_fragment for reach in kinds), means & fill.is_fragment)
        ours = Signal()
        m.d.sync += live.eq((Mux(self.discard & ours, since, live) | new) & ~Cat(forgets, self.forget))
        with m.If(lookup):  # it begins beside a discard: too early for that
            m.d.sync += [may.eq(((live | new) & ~Cat(forgets, self.forget)).any()), since.eq(new)]
        with m.Else():
            m.d.sync += [may.eq(may | new.any()), since.eq(since | new)]

        sought, asked = Signal(len(PLACES)), Signal()
        with m.If(lookup):
            m.d.sync += [sought.eq(self.vpn), asked.eq(1)]
        m.d.comb += ours.eq(asked & (sought == page) & (self.asking == space))
        found, said = iotlb.found, Signal(Answer)
        m.d.comb += [said[name].eq(found[name]) for name, _ in Answer if name not in ("ppn", "reach")]
        m.d.comb += said.ppn.eq(Cat(found.ppn[place] for place in PLACES))
        with m.Switch(found.size_log2):
            for reach in (1, 2, 3):
                with m.Case(SUPERPAGES[reach - 1][1]):
                    m.d.comb += said.reach.eq(reach)

        # An entry that came in one cycle is found by the lookup that begins in the next, unless that is the end of the entry.
        fresh, works = Signal(), Signal()
        ends = self.forget | self.discard | iotlb.fill.valid
        m.d.sync += fresh.eq(covers & ~self.forget & ~self.discard)
        with m.If(lookup):
            m.d.sync += works.eq(fresh & ~ends)
        with m.Elif(ends):
            m.d.sync += works.eq(0)
        hit = ours & found.hit
        m.d.comb += [
            Assert(~(hit & (said == answer)) | may, "an answer is one entry's, of this space and not forgotten"),
            Assert(~(ours & works) | found.hit, "a new entry answers"),
            Cover(hit & (said == answer) & (said.reach == 2) & ~space.first, "a hit by 2 MiB of the second stage"),
            Cover(hit & (said == answer) & (said.reach == 0) & space.PSCID, "a hit by 4 KiB of a process"),
            Cover(ours & asked & ~found.hit & (live == 0) & fresh, "an entry comes behind a miss"),
        ]
        return m


def test_iotlb():
    """FORMAL-IOTLB-1: an answer is one entry's, of this page and space, neither forgotten nor discarded; new entries answer."""
    for early in (False, True):
        prove(IotlbContract(early=early), depth=DEPTH)


STALE, DEAF = "one entry's", "a new entry"
RULES = {
    same_space: [
        ("item.G | (item.PSCID == space.PSCID)", "1", STALE),
        ("item.G | (item.PSCID == space.PSCID)", "item.PSCID == space.PSCID", DEAF),
        ("item[name] == space[name]", "1", STALE),
    ],
    first_of: [("hit & ~Cat(hits[:n]).any()", "hit", STALE)],
    forgets_all: [
        ("had_fragments | is_fragment", "is_fragment", STALE),
        ("had_fragments.eq(has_fragments & ~forget_all)", "had_fragments.eq(0)", STALE),
    ],
}
BUGS = [
    ("read.data.vpn == sought[bits:]", "1", STALE),
    ("item.vpn[low:high] == vpn[low:high]", "item.vpn[low + 1 : high] == vpn[low + 1 : high]", STALE),
    ("forget_all | (self.forget & (forgotten == looked_up))", "forget_all", STALE),
    ("forget_all | (self.forget & (forgotten == looked_up))", "self.forget & (forgotten == looked_up)", STALE),
    ("large_valid.eq(large_valid & ~large_useless)", "large_valid.eq(large_valid)", STALE),
    ("large_valid.eq(0)", "large_valid.eq(large_valid)", STALE),
    ("useless.eq(self.discard & hits[way])", "useless.eq(0)", STALE),
    ("valid & ~Mux(useless, 1 << left, 0)", "valid", STALE),
    ("~(useless & (left == looked_up))", "1", STALE),
    ("left.eq(shown)", "left.eq(looked_up)", STALE),
    ("Mux(write.en, 1 << filled, 0)", "Mux(write.en & ~useless, 1 << filled, 0)", DEAF),
    ("Mux(self.forget, 1 << forgotten, 0)", "0", STALE),
    ("Cat(sought[:low], read_ppn.data[low:])", "read_ppn.data", STALE),
    ("Mux(self.advance, covering, covered) & ~taken", "Mux(self.advance, covering, covered)", STALE),
    ("self.fill.valid & (entry.reach == 0)", "self.fill.valid", STALE),
    ("sought.eq(self.vpn)", "sought.eq(sought)", f"{STALE}|{DEAF}"),
    ("large_valid.bit_select(large_victim, 1).eq(1)", "large_valid.bit_select(large_victim, 1).eq(0)", DEAF),
    ("self.found.size_log2.eq(size)", "self.found.size_log2.eq(12)", STALE),
]


def _refuted(contract, bugs, depth):
    found = refute_each(contract, len(bugs), depth=depth)
    missed = [(bug, text) for (*bug, broken), text in zip(bugs, found, strict=True) if not any(part in text for part in broken.split("|"))]
    assert not missed


def test_planted_bugs(monkeypatch):
    """FORMAL-IOTLB-2: each planted bug of the IOTLB breaks the assertion that it should."""
    bugs = []
    for rule, ours in RULES.items():
        monkeypatch.setattr(module, rule.__name__, planted(rule, [bug[:2] for bug in ours], len(bugs) + 1))
        bugs += ours
    _refuted(IotlbContract(planted(Iotlb, [bug[:2] for bug in BUGS], len(bugs) + 1)), bugs + BUGS, DEPTH)


@pytest.mark.parametrize("bug", [("same_space(item, self.coming_space)", "1"), ("self.coming_space", "self.space")])
def test_bugs_of_space(bug):
    """FORMAL-IOTLB-5: so does each of an IOTLB that knows the space early."""
    found = refute(IotlbContract(mutant(Iotlb, *bug), early=True), depth=DEPTH)
    assert STALE in found or DEAF in found


class SecondContract(wiring.Component):
    """Any fills, lookups, stalls and invalidations; follows one page of one space, and one answer to it, which are picked first.

    ``mark`` picks lookups for it, one at a time.
    """

    page: In(len(PLACES))
    space: In(Space)
    answer: In(Answer)
    lookups: In(stream.Signature(data.StructLayout({"vpn": len(PLACES), "space": Space, "mark": 1})))
    ready: In(1)
    fill: In(Fill)
    forget: In(1)
    forget_av: In(1)
    forget_vpn: In(len(PLACES))

    def __init__(self, make=SecondIotlb, *, entries=4, ways=2, generation_bits=2):
        self.make, self.entries, self.ways, self.generation_bits = make, entries, ways, generation_bits
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.second = second = self.make(
            entries=self.entries, ways=self.ways, generation_bits=self.generation_bits, waiting=2, features=FEATURES, asked=1)
        begun = Signal()
        m.d.sync += begun.eq(1)
        page, space, answer = Signal(len(PLACES)), Signal(Space), Signal(Answer)
        with m.If(~begun):
            m.d.sync += [page.eq(self.page), space.eq(self.space), answer.eq(self.answer)]
        offered(m, self.lookups)
        check_stream(m, second.o, "results")

        asks, entry, fill = self.lookups.p, second.fill.p, self.fill
        taken = second.i.valid & second.i.ready
        m.d.comb += [
            second.i.valid.eq(self.lookups.valid & begun), self.lookups.ready.eq(second.i.ready & begun), second.o.ready.eq(self.ready),
            second.i.p.vpn.eq(_spread(asks.vpn, PAGE_BITS, SECOND_PLACES)), second.i.p.asked.eq(asks.mark),
            *(second.i.p.space[name].eq(asks.space[name]) for name, _ in Space),
            second.forget.eq(self.forget), second.forget_av.eq(self.forget_av),
            second.forget_vpn.eq(_spread(self.forget_vpn, PAGE_BITS, SECOND_PLACES)),
            second.fill.valid.eq(fill.valid & begun), *_fill_in(entry, fill, SECOND_PLACES), *_possible(asks.space),
            Assume(~(taken & asks.mark) | ((asks.vpn == page) & (asks.space == space))),
        ]

        # Entries that say `answer` and were not forgotten: those that stand for themselves, and fragments; whether the lookup may find one.
        covers = second.fill.valid & (fill.answer.reach == 0) & (fill.vpn == page) & _is_for(fill, space)
        means = covers & (fill.answer == answer)
        live, flies, moved, may = Signal(2), Signal(), Signal(), Signal()
        forgets = Cat(self.forget & (~self.forget_av | (self.forget_vpn == page)), self.forget)
        m.d.sync += live.eq((live | Cat(means & ~fill.is_fragment, means & fill.is_fragment)) & ~forgets)
        found, is_shown, said = second.o.p.entry, second.o.valid & second.o.p.asked, Signal(Answer)
        m.d.comb += [said[name].eq(found[name]) for name, _ in Answer if name not in ("ppn", "reach")]
        m.d.comb += said.ppn.eq(Cat(found.ppn[place] for place in PLACES))
        with m.If(is_shown & second.o.ready):
            m.d.sync += flies.eq(0)
        m.d.sync += moved.eq(flies & (moved | ~second.o.valid | second.o.ready))
        with m.If(taken & asks.mark):
            m.d.sync += [flies.eq(1), may.eq((live & ~forgets).any() & ~self.forget)]
        with m.Elif(self.forget):
            m.d.sync += may.eq(0)

        # An entry that comes when places are in order and none is on its way: lookups behind the one that may meet it find it.
        clears = self.entries // self.ways + 1  # cycles
        calm, comes, fresh, works = Signal(4), Signal(2), Signal(), Signal()
        m.d.sync += calm.eq(Mux(self.forget, 0, Mux(calm == clears, clears, calm + 1)))
        with m.If(fill.valid):
            m.d.sync += comes.eq(1)
        with m.Elif(comes == 1):
            m.d.sync += comes.eq(2)
        with m.Elif(second.i.ready):
            m.d.sync += comes.eq(0)
        with m.If(self.forget | fill.valid):
            m.d.sync += fresh.eq(covers & (calm == clears) & (comes == 0) & ~self.forget)
        with m.If(taken & asks.mark):
            m.d.sync += works.eq(fresh & (comes == 0) & ~self.forget)
        with m.Elif(self.forget):
            m.d.sync += works.eq(0)
        hit = is_shown & second.found
        m.d.comb += [
            Assume(~(self.lookups.valid & asks.mark) | ~flies),
            Assert(Mux(is_shown, flies, ~(flies & moved)), "a lookup has one result, in the second cycle behind it"),
            Assert(~(hit & (said == answer)) | may, "an answer is one entry's, of this space and not forgotten"),
            Assert(~(is_shown & works) | second.found, "a new entry answers"),
            Cover(hit & (said == answer) & space.PSCID & fresh, "a hit of a process"),
            Cover(hit & ~space.first & ~second.o.ready & self.forget, "a hit of the second stage is forgotten while it waits"),
        ]
        return m


CLEARING = {"generation_bits": 1}  # each time when all is forgotten
SLOW = {"generation_bits": 1, "entries": 8, "ways": 1}  # clearing lasts longer than an entry's way in


def test_second_level():
    """FORMAL-IOTLB-3: an answer of the second level is one entry's, of this page and space, not forgotten; numbers of generations wrap."""
    for shape in ({}, CLEARING, SLOW):
        prove(SecondContract(**shape), depth=SECOND_DEPTH)


SECOND_BUGS = [
    ("read.data.generation == now", "1", STALE),
    ("read.data.vpn == key.vpn", "1", STALE),
    ("same_space(read.data, key.space)", "1", STALE),
    ("self.forget | is_off", "is_off", STALE),
    ("is_dead.eq(1)", "is_dead.eq(is_dead)", STALE),
    ("same.any() & ~is_dead & ~self.forget", "same.any() & ~is_dead", STALE),
    ("self.found.eq(0)", "self.found.eq(self.found)", STALE),
    ("now.eq(Mux(now.all(), 1, now + 1))", "now.eq(now)", STALE),
    ("new.o.valid & ~dies", "new.o.valid", STALE),
    ("self.fill.valid & (entry.reach == 0)", "self.fill.valid", STALE),
    ("Mux(self.forget, place(self.forget_vpn, bits), row)", "row", STALE),
    ("is_off | self.forget | (fills & (victim == way))", "is_off | (fills & (victim == way))", STALE),
    ("fills & ~self.forget & (victim == way)", "victim == way", STALE),
    ("fills & ~self.forget & (victim == way)", "fills & (victim == way)", STALE),
    ("Mux(new.o.valid, new.o.p.vpn, asks.vpn)", "asks.vpn", f"{STALE}|{DEAF}"),
    ("Mux(new.o.valid, new.o.p[name], asks.space[name])", "new.o.p[name]", f"{STALE}|{DEAF}"),
    ("row.eq(next_row)", "row.eq(row)", DEAF),
    ("moves & ~new.o.valid", "moves", "one result"),
    ("~looks | ~self.o.valid | self.o.ready", "1", "one result|stays"),
]


CLEARING_BUGS = [
    ("self.forget | is_off", "self.forget", STALE),
    ("is_off.eq(now.all())", "is_off.eq(0)", STALE),
    ("is_off.eq(swept != sets - 1)", "is_off.eq(0)", STALE),
    ("is_off | self.forget | (fills & (victim == way))", "self.forget | (fills & (victim == way))", STALE),
]


def test_planted_bugs_of_the_second_level():
    """FORMAL-IOTLB-4: each planted bug of the second level breaks the assertion that it should."""
    for bugs, shape in ((SECOND_BUGS, {}), (CLEARING_BUGS, CLEARING)):
        _refuted(SecondContract(planted(SecondIotlb, [bug[:2] for bug in bugs]), **shape), bugs, SECOND_DEPTH)
    for old, new, shape in (("ResetInserter(self.forget)(new)", "new", {}), ("new.o.valid & ~dies", "new.o.valid & ~self.forget", SLOW)):
        assert STALE in refute(SecondContract(mutant(SecondIotlb, old, new), **shape), depth=SECOND_DEPTH)
