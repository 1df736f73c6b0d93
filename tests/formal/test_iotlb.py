"""Proof of the IOTLB: it answers with one entry of the space that asks, and never with a forgotten one; beside it planted bugs."""

from amaranth.hdl import Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.iotlb import SUPERPAGES, Iotlb
from ringwall.sim.formal import planted, prove, refute_each

DEPTH = 8
FEATURES = Features(Sv39x4=True, PD8=True, Svpbmt=True)
PAGE_BITS = FEATURES.page_bits

# Of every page number one bit below, between and above the borders of 64 KiB, 2 MiB and 1 GiB; of every other field a bit or two.
PLACES = (0, 4, 9, 18)
Space = data.StructLayout({"PSCID": 1, "first": 1, "GV": 1, "GSCID": 1})
Answer = data.StructLayout({"ppn": len(PLACES), "readable": 1, "writable": 1, "executable": 1, "U": 1, "PBMT": 2, "reach": 2})
Fill = data.StructLayout({"valid": 1, "vpn": len(PLACES), "space": Space, "G": 1, "is_fragment": 1, "answer": Answer})


def _spread(bits, width):
    """The page number with ``bits`` at ``PLACES``."""
    at = dict(zip(PLACES, bits))
    return Cat(at.get(n, Const(0, 1)) for n in range(width))


class IotlbContract(wiring.Component):
    """Any fills, lookups, discards and invalidations; follows one page of one space, and one answer to it, which are picked first."""

    page: In(len(PLACES))
    space: In(Space)
    answer: In(Answer)
    vpn: In(len(PLACES))
    asking: In(Space)
    advance: In(1)
    discard: In(1)
    fill: In(Fill)
    forget: In(1)
    forget_av: In(1)
    forget_vpn: In(len(PLACES))

    def __init__(self, make=Iotlb):
        self.make = make
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.iotlb = iotlb = self.make(entries=4, ways=2, superpage_entries=2, features=FEATURES)
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
            iotlb.fill.valid.eq(fill.valid & begun), entry.vpn.eq(_spread(fill.vpn, PAGE_BITS)),
            entry.G.eq(fill.G), entry.is_fragment.eq(fill.is_fragment),
            *(entry[name].eq(fill.space[name]) for name, _ in Space),
            *(entry[name].eq(fill.answer[name]) for name, _ in Answer if name != "ppn"),
            entry.ppn.eq(_spread(fill.answer.ppn, 44)),
            # What walkers fill in: fields that do not count are 0, only 4 KiB can be fragments.
            *(Assume(s.first | ~s.PSCID) for s in (fill.space, self.asking)),
            *(Assume(s.GV | ~s.GSCID) for s in (fill.space, self.asking)),
            Assume(fill.space.first | ~fill.G), Assume((fill.answer.reach == 0) | ~fill.is_fragment),
        ]

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
            iotlb.fill.valid & same_page.bit_select(fill.answer.reach, 1) & (fill.space.first == space.first)
            & (fill.G | (fill.space.PSCID == space.PSCID)) & (fill.space.GV == space.GV) & (fill.space.GSCID == space.GSCID))
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
    prove(IotlbContract(), depth=DEPTH)


STALE, DEAF = "one entry's", "a new entry"
BUGS = [
    ("item.G | (item.PSCID == self.space.PSCID)", "1", STALE),
    ("item.G | (item.PSCID == self.space.PSCID)", "item.PSCID == self.space.PSCID", DEAF),
    ("item[name] == self.space[name]", "1", STALE),
    ("read.data.vpn == sought", "1", STALE),
    ("item.vpn[low:] == vpn[low:]", "item.vpn[low + 1 :] == vpn[low + 1 :]", STALE),
    ("had_fragments | (small & entry.is_fragment)", "small & entry.is_fragment", STALE),
    ("had_fragments.eq(has_fragments & ~forget_all)", "had_fragments.eq(0)", STALE),
    ("forget_all | (self.forget & (forgotten == looked_up))", "forget_all", STALE),
    ("forget_all | (self.forget & (forgotten == looked_up))", "self.forget & (forgotten == looked_up)", STALE),
    ("large_valid.eq(large_valid & ~Cat(large_hits))", "large_valid.eq(large_valid)", STALE),
    ("large_valid.eq(0)", "large_valid.eq(large_valid)", STALE),
    ("valid.bit_select(shown, 1).eq(0)", "valid.bit_select(shown, 1).eq(1)", STALE),
    ("valid.bit_select(forgotten, 1).eq(0)", "valid.bit_select(forgotten, 1).eq(valid.bit_select(forgotten, 1))", STALE),
    ("Cat(sought[:low], item.ppn[low:])", "item.ppn", STALE),
    ("self.fill.valid & (entry.reach == 0)", "self.fill.valid", STALE),
    ("sought.eq(self.vpn)", "sought.eq(sought)", f"{STALE}|{DEAF}"),
    ("large_valid.bit_select(large_victim, 1).eq(1)", "large_valid.bit_select(large_victim, 1).eq(0)", DEAF),
    ("self.found.size_log2.eq(size)", "self.found.size_log2.eq(12)", STALE),
]


def test_planted_bugs():
    """FORMAL-IOTLB-2: each planted bug of the IOTLB breaks the assertion that it should."""
    found = refute_each(IotlbContract(planted(Iotlb, [bug[:2] for bug in BUGS])), len(BUGS), depth=DEPTH)
    missed = [(bug, text) for (*bug, broken), text in zip(BUGS, found, strict=True) if not any(part in text for part in broken.split("|"))]
    assert not missed
