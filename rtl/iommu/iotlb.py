"""The IOTLB: translations of both stages together, by page, size and address space."""

from functools import reduce
from operator import or_

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .features import Features

# Larger pages: low page-number bits that the page covers, log2 of its size. [RVPRIV 10.4 to 10.6, 11]
SUPERPAGES = ((4, 16), (9, 21), (18, 30), (27, 39), (36, 48))
REGION_BITS = 9  # low page-number bits that number the pages of one leaf table


def superpages(features):
    """Return those of ``SUPERPAGES`` that there are."""
    return SUPERPAGES[: features.levels]


def entry_layout(features):
    """Return the layout of a translation, of both stages together; ``reach`` is 0 for 4 KiB, else 1 + the index in ``SUPERPAGES``.

    ``PSCID`` and ``G`` count where ``first`` is 1 (a first stage took part), ``GSCID`` where ``GV`` is 1 (a second stage did); they are
    0 elsewhere. ``is_fragment``: the page of the first stage is larger than the entry.
    """
    return data.StructLayout({
        "vpn": features.page_bits, "PSCID": 20, "G": 1, "ppn": 44, "readable": 1, "writable": 1,
        "reach": range(len(superpages(features)) + 1),
        **({"executable": 1, "U": 1} if features.has_processes else {}),
        **({"first": 1, "GV": 1, "GSCID": 16, "is_fragment": 1} if features.has_second_stage else {}),
        **({"PBMT": 2} if features.Svpbmt else {}),
    })  # fmt: skip


Entry = entry_layout(Features())


def space_layout(features):
    """Return the layout of an address space: the members of an entry that name it, but G."""
    return data.StructLayout({"PSCID": 20, **({"first": 1, "GV": 1, "GSCID": 16} if features.has_second_stage else {})})


def found_layout(features):
    """Return the layout of the result of a lookup: physical page for the looked-up page, permissions, size."""
    return data.StructLayout({
        "hit": 1, "ppn": 44, "readable": 1, "writable": 1, "size_log2": 6,
        **({"executable": 1, "U": 1} if features.has_processes else {}), **({"PBMT": 2} if features.Svpbmt else {}),
    })  # fmt: skip


Found = found_layout(Features())


def place(vpn, bits):
    """Return the set, a number of ``bits``, in which a 4 KiB page lives."""
    result = vpn[:bits]
    for low in range(max(REGION_BITS, bits), len(vpn), bits):
        result = result ^ vpn[low : low + bits]
    return result[:bits]


def same_space(item, space):
    """Return whether an entry translates for ``space``."""
    names = [name for name, _ in space.shape() if name != "PSCID"]
    return Cat(item.G | (item.PSCID == space.PSCID), *(item[name] == space[name] for name in names)).all()


def first_of(hits):
    """Return ``hits`` without all but the first."""
    return [hit & ~Cat(hits[:n]).any() for n, hit in enumerate(hits)]


def noise(m, step):
    """Return a pseudo-random number of 16 bits, another one after each ``step``: x^16 + x^15 + x^13 + x^4 + 1, every state but 0."""
    state = Signal(16, init=1, name="noise")
    with m.If(step):
        m.d.sync += state.eq(Cat(state[15] ^ state[14] ^ state[12] ^ state[3], state))
    return state


def forgets_all(m, level, is_fragment):
    """Return whether ``level`` forgets everything now; ``is_fragment``: a fragment of a larger first-stage page comes in."""
    forget_all = Signal()
    m.d.comb += forget_all.eq(level.forget & ~level.forget_av)
    if level.features.has_second_stage:
        had_fragments, has_fragments = Signal(), Signal()
        m.d.comb += [
            has_fragments.eq(had_fragments | is_fragment),
            forget_all.eq(level.forget & (~level.forget_av | has_fragments)),
        ]
        m.d.sync += had_fragments.eq(has_fragments & ~forget_all)
    return forget_all


class Iotlb(wiring.Component):
    """Looks a page up in every cycle.

    Pages of 4 KiB live in sets of ``ways`` entries: as many sequential pages of a 2 MiB region as there are entries fill every set
    evenly, and regions are spread over the sets. Larger pages live in a small associative array. A new entry takes an empty place of its
    set or a random one, so that a cyclic pattern that is a little too large does not evict all of itself; directly behind another one of
    its set it may take the place of that. An entry with G matches every PSCID. Several entries for one page may exist: one of them
    answers, and ``discard`` takes all of them out. Forgetting by page forgets all if there may be fragments of larger first-stage pages,
    since a page of those may stand for all of them. [RVIOMMU1.0 4.1.1]

    Latency: ``vpn`` in cycle n, ``space`` in cycle n + 1, ``found`` combinationally in cycle n + 1. Throughput: one lookup, one fill, one
    invalidation per cycle. What is filled in cycle n is found by lookups that begin in cycle n + 1, unless it came beside a ``discard``;
    what is forgotten in cycle n is not found by lookups that begin in it or later, and a fill in the same cycle is forgotten too.

    Parameters
    ----------
    entries : :class:`int`
        4 KiB entries: a power of two, at least 2 * ``ways``, at most 256.
    ways : :class:`int`
        A power of two.
    superpage_entries : :class:`int`
        Larger entries: a power of two, at least 2.
    features : :class:`.features.Features`
        Decides what an entry has.
    early : :class:`bool`
        The payload of ``fill`` stands still from the cycle in front of its ``valid`` on: where it goes is known by then.
    knows_space : :class:`bool`
        ``coming_space`` is known in cycle n: then that is what larger pages are compared with, a cycle earlier.

    Members
    -------
    vpn, space, advance : ``In(features.page_bits)``, ``In(space_layout(features))``, ``In(1)``
        The lookup; ``advance`` moves it from its first to its second cycle.
    coming_space : ``In(space_layout(features))``
        With ``knows_space``: what ``space`` will be.
    found : ``Out(found_layout(features))``
        Its result.
    discard : ``In(1)``
        The entries found are of no use: forget them.
    fill : ``In(stream.Signature(entry_layout(features)))``
        New entries; always taken.
    forget, forget_av, forget_vpn : ``In``
        Forget everything, or with ``forget_av`` at least what translates ``forget_vpn``.

    Raises
    ------
    :exc:`ValueError`
        If a size is out of range.
    """

    def __init__(self, *, entries=64, ways=4, superpage_entries=8, features=Features(), early=False,
                 knows_space=False):  # fmt: skip
        for name, value, least in (("IOTLB entries", entries, 4), ("IOTLB ways", ways, 1), ("Superpage entries", superpage_entries, 2)):
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two and at least {least}, not {value!r}")
        if entries > 256:  # each has a flip-flop
            raise ValueError(f"IOTLB entries must be at most 256, more by second_entries, not {entries!r}")
        if entries < 2 * ways:
            raise ValueError(f"IOTLB entries must be at least twice the {ways} ways, not {entries!r}")
        self.entries, self.ways, self.superpage_entries = entries, ways, superpage_entries
        self.features, self.early, self.knows_space = features, early, knows_space
        super().__init__({
            "vpn": In(features.page_bits),
            "space": In(space_layout(features)),
            **({"coming_space": In(space_layout(features))} if knows_space else {}),
            "advance": In(1),
            "found": Out(found_layout(features)),
            "discard": In(1),
            "fill": In(stream.Signature(entry_layout(features))),
            "forget": In(1),
            "forget_av": In(1),
            "forget_vpn": In(features.page_bits),
        })

    def elaborate(self, platform):
        m = Module()
        page_bits, pages = self.features.page_bits, superpages(self.features)
        layout = entry_layout(self.features)
        sets = self.entries // self.ways
        bits = sets.bit_length() - 1

        entry = self.fill.payload
        m.d.comb += self.fill.ready.eq(1)
        small = self.fill.valid & (entry.reach == 0)
        looked_up, shown = Signal(bits), Signal(bits)
        sought, forgotten, coming, filled = Signal(page_bits), Signal(bits), Signal(bits), Signal(bits)
        for vpn, at in ((self.vpn, looked_up), (self.forget_vpn, forgotten), (entry.vpn, coming)):
            m.d.comb += at.eq(place(vpn, bits))
        when_known = m.d.sync if self.early else m.d.comb
        when_known += filled.eq(coming)
        random = noise(m, self.fill.valid)
        with m.If(self.advance):
            m.d.sync += [shown.eq(looked_up), sought.eq(self.vpn)]

        forget_all = forgets_all(m, self, small & entry.is_fragment if self.features.has_second_stage else 0)

        # 4 KiB pages.
        # A row lacks what its place says: the low bits of the page number.
        row = data.StructLayout({name: field.shape for name, field in layout if name not in ("reach", "is_fragment")}
                                | {"vpn": page_bits - bits})  # fmt: skip
        hits, rows = [], []
        valids = [Signal(sets, name=f"valid_{way}") for way in range(self.ways)]
        victims = Array(self._victim(m, [valid[n] for valid in valids], random, n) for n in range(sets))
        victim, dropped, left = Signal(range(max(self.ways, 2))), Signal(sets), Signal(bits)  # set of what was discarded, a cycle later
        when_known += victim.eq(victims[coming])
        m.d.comb += [dropped.eq(Mux(self.forget, 1 << forgotten, 0) | forget_all.replicate(sets))]
        m.d.sync += left.eq(shown)
        for way, valid in enumerate(valids):
            m.submodules[f"way_{way}"] = memory = Memory(shape=row, depth=sets, init=[])
            read, write = memory.read_port(), memory.write_port()
            valid_then, useless = Signal(name=f"valid_then_{way}"), Signal(name=f"useless_{way}")
            m.d.comb += [
                read.addr.eq(looked_up), read.en.eq(self.advance), write.addr.eq(filled), write.en.eq(small & (victim == way)),
                *(write.data[name].eq(entry[name]) for name, _ in row if name != "vpn"), write.data.vpn.eq(entry.vpn[bits:]),
            ]
            with m.If(self.advance):
                m.d.sync += valid_then.eq(valid.bit_select(looked_up, 1) & ~(useless & (left == looked_up)) & ~(
                    forget_all | (self.forget & (forgotten == looked_up))))
            rows.append(read.data)
            hits.append(valid_then & (read.data.vpn == sought[bits:]) & same_space(read.data, self.space))
            m.d.sync += [
                useless.eq(self.discard & hits[way]),
                valid.eq(((valid & ~Mux(useless, 1 << left, 0)) | Mux(write.en, 1 << filled, 0)) & ~dropped),
            ]

        # Larger pages.
        key = data.StructLayout({name: field.shape for name, field in layout if name != "ppn"})
        large = [Signal(key, name=f"large_{n}") for n in range(self.superpage_entries)]
        m.submodules.large_ppns = large_ppns = Memory(shape=44, depth=self.superpage_entries, init=[])
        read_ppn, write_ppn = large_ppns.read_port(domain="comb"), large_ppns.write_port()
        large_valid, large_useless = Signal(self.superpage_entries), Signal(self.superpage_entries)
        large_victim = Signal(range(self.superpage_entries))
        large_hits = []
        lows = [low for low, _ in pages]

        def covers(item, vpn):
            parts = enumerate(zip(lows, [*lows[1:], page_bits]), 1)
            return Cat((item.vpn[low:high] == vpn[low:high]) | (item.reach > reach) for reach, (low, high) in parts).all()

        def has_space_early(item):
            return same_space(item, self.coming_space) if self.knows_space else 1

        def has_space(item):
            return 1 if self.knows_space else same_space(item, self.space)

        covering, taken = Cat(covers(item, self.vpn) & has_space_early(item) for item in large), Signal(self.superpage_entries)
        covered = Signal(self.superpage_entries)  # the page looked up, by each entry that was there when the lookup began
        m.d.sync += covered.eq(Mux(self.advance, covering, covered) & ~taken)
        for n in range(self.superpage_entries):
            large_hits.append(large_valid[n] & covered[n] & has_space(large[n]))
        m.d.comb += large_victim.eq(random)
        for n in reversed(range(self.superpage_entries)):
            with m.If(~large_valid[n]):
                m.d.comb += large_victim.eq(n)
        m.d.sync += [large_useless.eq(Mux(self.discard, Cat(large_hits), 0)), large_valid.eq(large_valid & ~large_useless)]
        with m.If(self.fill.valid & (entry.reach != 0)):
            m.d.comb += [taken.bit_select(large_victim, 1).eq(1), write_ppn.en.eq(1)]
            m.d.sync += large_valid.bit_select(large_victim, 1).eq(1)
        for n, item in enumerate(large):
            with m.If(taken[n]):
                m.d.sync += [item[name].eq(entry[name]) for name, _ in key]
        with m.If(self.forget):
            m.d.sync += large_valid.eq(0)

        names = [name for name, _ in self.found.shape() if name not in ("hit", "ppn", "size_log2")]
        one, region, first_large = Signal(row), Signal(key), first_of(large_hits)
        for selected, choices, chosen in ((one, rows, first_of(hits)), (region, large, first_large)):
            for name, _ in selected.shape():
                m.d.comb += selected[name].eq(reduce(or_, (Mux(hit, choice[name], 0) for choice, hit in zip(choices, chosen))))
        m.d.comb += [
            read_ppn.addr.eq(reduce(or_, (Mux(hit, n, 0) for n, hit in enumerate(first_large)))),
            write_ppn.addr.eq(large_victim), write_ppn.data.eq(entry.ppn),
        ]
        m.d.comb += self.found.hit.eq(Cat(*hits, *large_hits).any())
        with m.If(Cat(hits).any()):
            m.d.comb += [self.found.ppn.eq(one.ppn), self.found.size_log2.eq(12), *(self.found[name].eq(one[name]) for name in names)]
        with m.Else():
            m.d.comb += [self.found[name].eq(region[name]) for name in names]
            with m.Switch(region.reach):
                for reach, (low, size) in enumerate(pages, 1):
                    with m.Case(reach):
                        m.d.comb += [self.found.ppn.eq(Cat(sought[:low], read_ppn.data[low:])), self.found.size_log2.eq(size)]
        return m

    def _victim(self, m, valids, random, number):
        """Return which way of a set the next entry takes, as its ``valids`` were in the cycle before; ``number``: of the set."""
        victim = Signal(range(max(self.ways, 2)), name=f"victim_{number}")
        m.d.sync += victim.eq(random if self.ways > 1 else 0)
        for way in reversed(range(self.ways)):
            with m.If(~valids[way]):
                m.d.sync += victim.eq(way)
        return victim
