"""Second level of the IOTLB: whatever it finds was filled and not forgotten; numbers of generations run out and are used again."""

import random

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.rtl.config import IommuConfig
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.iotlb import Iotlb
from ringwall.rtl.iommu.iotlb_second import SecondIotlb
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, start, unpack

FEATURES = Features(Sv39x4=True)
SHAPES = {  # entries, ways, generation_bits
    "usual": (64, 4, 8), "few generations": (16, 2, 2), "one generation": (16, 4, 1), "direct": (8, 1, 3),
}  # fmt: skip
_PORTS = SecondIotlb(entries=8, features=FEATURES, asked=8)
Lookup, Result, Entry = (port.payload.shape() for port in (_PORTS.i, _PORTS.o, _PORTS.fill))


@pytest.mark.parametrize("shape", SHAPES)
def test_iotlb_second(request, shape):
    entries, ways, generation_bits = SHAPES[shape]
    run(SecondIotlb(entries=entries, ways=ways, generation_bits=generation_bits, features=FEATURES, asked=8), module=__name__,
        node=request.node.nodeid, params={"entries": entries, "ways": ways, "generations": (1 << generation_bits) - 1})  # fmt: skip


@pytest.mark.parametrize("bad", [{"entries": 48}, {"entries": 8192}, {"entries": 4}, {"ways": 3}, {"generation_bits": 0}])
def test_parameters_are_checked(bad):
    """IOMMU-TLB2-1: sizes that make no sense are refused with a sentence."""
    with pytest.raises(ValueError, match=r"must be .*, not"):
        SecondIotlb(**{"entries": 64} | bad)


def test_reach_is_checked():
    """IOMMU-TLB2-7: a card's IOTLB has at most 256 entries, and names what brings more; its second level has at most 4,096."""
    assert IommuConfig(second_entries=4096).entries == 256
    for make, bad in ((IommuConfig, {"entries": 512}), (Iotlb, {"entries": 512})):
        with pytest.raises(ValueError, match=r"256, more by second_entries, not 512"):
            make(**bad)
    for bad in (8, 100, 8192):
        with pytest.raises(ValueError, match=r"must be 0 or a power of two between 16 and 4096, not"):
            IommuConfig(second_entries=bad)


class Bench:
    """Inputs of one cycle at a time; ``live`` is what may be found, ``results`` what was said: number of the lookup, entry or None."""

    def __init__(self, dut):
        self.dut, self.live, self.flying, self.results, self.asked = dut, [], {}, [], 0

    async def begin(self):
        await start(self.dut, "fill")
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.sets = params()["entries"] // params()["ways"]
        self.dut.o__ready.value = 1
        await self.idle(self.sets)
        return self

    async def cycle(self, *, lookup=None, fill=None, forget=None):
        """Run one cycle; ``lookup`` is a page and its space, ``forget`` True for all, or a page. Returns whether the lookup was taken."""
        dut = self.dut
        dut.i__valid.value = lookup is not None
        if lookup is not None:
            dut.i__payload.value = pack(Lookup, vpn=lookup[0], space=lookup[1], asked=self.asked)
        dut.fill__valid.value = fill is not None
        if fill is not None:
            dut.fill__payload.value = pack(Entry, **fill)
        dut.forget.value = forget is not None
        dut.forget_av.value = forget is not None and forget is not True
        dut.forget_vpn.value = 0 if forget is None or forget is True else forget
        await RisingEdge(dut.clk)
        if dut.o__valid.value and dut.o__ready.value:
            self._judge(unpack(Result, int(dut.o__payload.value)), int(dut.found.value))
        taken = lookup is not None and bool(dut.i__ready.value)
        if taken:
            self.flying[self.asked] = (*lookup, list(self.live))
            self.asked = (self.asked + 1) % 256
        if fill is not None and fill["reach"] == 0:
            self.live.append(fill)
        if forget is not None:
            self.live = [] if forget is True else [one for one in self.live if one["vpn"] != forget and not one["is_fragment"]]
            self.flying = {asked: (vpn, space, []) for asked, (vpn, space, _) in self.flying.items()}
        return taken

    def _judge(self, result, found):
        vpn, space, allowed = self.flying.pop(result.asked)
        entry = vars(result.entry)
        if found:
            assert entry in allowed and entry["vpn"] == vpn and lives_in(entry, space), f"{vpn:#x} in {space}: {entry}"
        self.results.append((result.asked, entry if found else None))

    async def idle(self, cycles):
        for _ in range(cycles):
            await self.cycle()

    async def fill(self, entry):
        """Fill and wait until that is done."""
        await self.cycle(fill=entry)
        await self.idle(4)

    async def look_up(self, vpn, space):
        """Return the entry found, or None."""
        asked = self.asked
        while not await self.cycle(lookup=(vpn, space)):
            pass
        await self.idle(2)
        return dict(self.results)[asked]


def lives_in(entry, space):
    names = ("first", "GV", "GSCID") if entry["G"] else ("first", "GV", "GSCID", "PSCID")
    return all(entry[name] == space[name] for name in names)


def space(PSCID=0, first=1, GV=0, GSCID=0):
    return {"PSCID": PSCID, "first": first, "GV": GV, "GSCID": GSCID}


def page(vpn, ppn, *, G=0, readable=1, writable=1, reach=0, is_fragment=0, **of):
    return {"vpn": vpn, "ppn": ppn, "G": G, "readable": readable, "writable": writable, "reach": reach, "is_fragment": is_fragment,
            **space(**of)}  # fmt: skip


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def only_what_lives_is_found(dut):
    """IOMMU-TLB2-2: random fills, lookups, stalls, invalidations in every cycle: a hit is a filled, unforgotten page of its space (R27)."""
    bench = await Bench(dut).begin()
    rng, turns = bench.rng, 0
    bases = [rng.randrange(1 << 28) for _ in range(2)]
    spaces = [space(), space(7), space(7, GV=1, GSCID=1), space(0, first=0, GV=1, GSCID=1), space(7, GV=1, GSCID=2)]
    calm = False
    for n in range(5000):
        if n % 200 == 0:
            calm = rng.random() < 0.7
        vpn, fill, forget = rng.choice(bases) ^ rng.choice([rng.randrange(8)] * 4 + [1 << rng.randrange(28)]), None, None
        if rng.random() < 0.3:
            own = rng.choice(spaces[1:3] if calm else spaces)
            fill = page(rng.choice(bases) ^ rng.randrange(8), rng.getrandbits(44), **own, G=own["first"] and rng.random() < 0.1,
                        reach=rng.random() < 0.1, is_fragment=not calm and own["GV"] and rng.random() < 0.1,
                        readable=rng.getrandbits(1), writable=rng.getrandbits(1))  # fmt: skip
            if fill["reach"]:
                fill["is_fragment"] = 0
        if rng.random() < (0.02 if calm else 0.15):
            forget = rng.choice([True, rng.choice(bases) ^ rng.randrange(8)])
            turns += forget is True
        dut.o__ready.value = rng.random() < 0.7
        lookup = vpn, rng.choice(spaces[1:3] if calm else spaces)
        await bench.cycle(lookup=lookup if rng.random() < 0.8 else None, fill=fill, forget=forget)
    hits = sum(entry is not None for _, entry in bench.results)
    dut._log.info("%d lookups, %d hits, %d times all forgotten", len(bench.results), hits, turns)
    assert hits > 100 and turns > 50 and len(bench.results) > 1500


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def cycles_are_exact(dut):
    """IOMMU-TLB2-3: one lookup per cycle, 2 cycles; what is forgotten is not found by lookups of that cycle or on their way (R15)."""
    bench = await Bench(dut).begin()
    for forget in (True, 0x1234):
        entry = page(0x1234, 0x7777)
        await bench.fill(entry)
        bench.results.clear()
        first = bench.asked
        for _ in range(10):
            assert await bench.cycle(lookup=(0x1234, space()))
        assert bench.results == [((first + n) % 256, entry) for n in range(8)], "shown in the second cycle behind, all found"
        # One of each kind: its result is there; it is compared; its set is read now.
        await bench.cycle(lookup=(0x1234, space()), forget=forget)
        await bench.idle(3)
        assert [found for _, found in bench.results] == [entry] * 9 + [None] * 2
        await bench.idle(bench.sets)
        await bench.fill(entry)
        dut.o__ready.value = 0
        await bench.cycle(lookup=(0x1234, space()))
        await bench.cycle()
        await bench.cycle()
        assert dut.found.value == 1
        await bench.cycle(forget=forget)
        await bench.cycle()
        assert dut.found.value == 0 and dut.o__valid.value == 1, "it waits"
        dut.o__ready.value = 1
        for age in range(5):  # of a fill that the invalidation meets: from its coming to its being there
            while await bench.look_up(0x1234, space()) is not None:
                await bench.cycle(forget=True)
            await bench.idle(bench.sets)
            await bench.cycle(fill=entry, forget=forget if age == 0 else None)
            for n in range(1, 5):
                await bench.cycle(forget=forget if n == age else None)
            assert await bench.look_up(0x1234, space()) is None
            await bench.idle(bench.sets)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_page_is_forgotten_alone(dut):
    """IOMMU-TLB2-4: forgetting by address leaves the pages of other sets; behind a fragment it forgets all."""
    bench = await Bench(dut).begin()
    count = bench.sets
    for fragment in (0, 1):
        for n in range(count):
            await bench.fill(page(n, n, GV=1, GSCID=3, is_fragment=fragment and n == 0))
        await bench.cycle(forget=1)
        found = [await bench.look_up(n, space(GV=1, GSCID=3)) is not None for n in range(count)]
        assert found == [n != 1 and not fragment for n in range(count)]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def generations_end_and_begin_anew(dut):
    """IOMMU-TLB2-5: all forgotten again and again, and a reset: never an old page; nothing is kept only for as many cycles as sets."""
    bench = await Bench(dut).begin()
    cleared = 0
    for n in range(min(3 * params()["generations"] + 2, 40)):
        vpn = bench.rng.randrange(1 << 28)
        await bench.fill(page(vpn, n))
        assert (await bench.look_up(vpn, space()))["ppn"] == n
        await bench.cycle(forget=True)
        await bench.fill(page(vpn, n + 100))
        found = await bench.look_up(vpn, space())
        assert found is None or found["ppn"] == n + 100
        cleared += found is None
        await bench.idle(bench.sets)
        await bench.cycle(forget=vpn)
        assert await bench.look_up(vpn, space()) is None
    assert cleared == n + 1 if params()["generations"] == 1 else cleared >= (n + 1) // params()["generations"]
    pages = [bench.rng.randrange(1 << 28) for _ in range(params()["entries"])]
    for vpn in pages:
        await bench.fill(page(vpn, 1))
    dut.rst.value = 1
    await bench.cycle()
    bench.live.clear()
    dut.rst.value = 0
    for vpn in pages:
        assert await bench.look_up(vpn, space()) is None


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def new_entries_find_a_place(dut):
    """IOMMU-TLB2-6: as many sequential pages as entries are kept; a new entry replaces those for its page and is always found."""
    bench = await Bench(dut).begin()
    entries = params()["entries"]
    for _ in range(3):
        await bench.cycle(forget=True)
        await bench.idle(bench.sets)
        base = bench.rng.randrange(1 << 19) << 9 | bench.rng.randrange(512 - entries + 1)
        for n in range(entries):
            await bench.fill(page(base + n, n))
        for n in range(entries):  # in the same places
            await bench.fill(page(base + n, n, writable=0))
        found = [await bench.look_up(base + n, space()) for n in range(entries)]
        assert [entry and (entry["ppn"], entry["writable"]) for entry in found] == [(n, 0) for n in range(entries)]
        await bench.fill(page(base, 5, PSCID=3, G=1))
        await bench.fill(page(base, 6, PSCID=4))
        assert (await bench.look_up(base, space(4)))["ppn"] == 6, "a global one is replaced, too"
        for _ in range(40):
            vpn, of = bench.rng.randrange(1 << 28), bench.rng.choice([{"PSCID": 1}, {"first": 0, "GV": 1, "GSCID": 9}])
            await bench.fill(page(vpn, 0, **of))
            assert await bench.look_up(vpn, space(**of))
