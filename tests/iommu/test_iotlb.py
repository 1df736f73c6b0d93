"""IOTLB: whatever it finds was filled and not forgotten; whatever must be there is found."""

import random

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.rtl.iommu.iotlb import Entry, Found, Iotlb
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, start, unpack

VPNS = 1 << 27
PAGES_LOG2 = (0, 4, 9, 18)  # pages of each reach: 4 KiB, 64 KiB, 2 MiB, 1 GiB
SHAPES = {"usual": {}, "small": {"entries": 16, "ways": 4, "superpage_entries": 2}, "direct": {"entries": 8, "ways": 1},
          "wide": {"entries": 32, "ways": 16}}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_iotlb(request, shape):
    dut = Iotlb(**SHAPES[shape])
    sizes = {"entries": dut.entries, "ways": dut.ways, "superpages": dut.superpage_entries}
    run(dut, module=__name__, node=request.node.nodeid, params=sizes)


@pytest.mark.parametrize("bad", [{"entries": 63}, {"entries": 2}, {"entries": 64.0}, {"ways": 3}, {"ways": 64}, {"superpage_entries": 1}])
def test_parameters_are_checked(bad):
    """IOMMU-TLB-1: sizes that make no sense are refused with a sentence."""
    with pytest.raises(ValueError, match=r"must be .*, not"):
        Iotlb(**bad)


class Bench:
    """Inputs of one cycle at a time; ``live`` is what may be found."""

    def __init__(self, dut):
        self.dut, self.live = dut, []

    async def begin(self):
        await start(self.dut, "fill")
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.sets = params()["entries"] // params()["ways"]
        return self

    async def cycle(self, *, lookup=None, fill=None, forget=None, discard=0, PSCID=0):
        """Run one cycle; ``forget`` is True for all, or a page. Returns what was shown before its edge."""
        dut = self.dut
        dut.advance.value = lookup is not None
        dut.vpn.value = lookup or 0
        dut.fill__valid.value = fill is not None
        dut.fill__payload.value = pack(Entry, **(fill or {}))
        dut.forget.value = forget is not None
        dut.forget_av.value = forget is not None and forget is not True
        dut.forget_vpn.value = 0 if forget is None or forget is True else forget
        dut.discard.value = discard
        dut.space.value = PSCID
        await RisingEdge(dut.clk)
        found = unpack(Found, int(dut.found.value))
        if fill is not None:
            self.live.append(fill)
        if forget is not None:
            self.live = [] if forget is True else [entry for entry in self.live if not covers(entry, forget)]
        return found

    async def look_up(self, vpn, PSCID=0):
        await self.cycle(lookup=vpn)
        return await self.cycle(PSCID=PSCID)


def covers(entry, vpn):
    return entry["vpn"] >> PAGES_LOG2[entry["reach"]] == vpn >> PAGES_LOG2[entry["reach"]]


def answer(entry, vpn):
    low = PAGES_LOG2[entry["reach"]]
    return {"hit": 1, "ppn": entry["ppn"] >> low << low | vpn & (1 << low) - 1, "readable": entry["readable"],
            "writable": entry["writable"], "size_log2": 12 + low}  # fmt: skip


def answers(entries, vpn, PSCID):
    """Every answer that ``entries`` allow; a translation that is cached need not stay."""
    return [answer(entry, vpn) for entry in entries if covers(entry, vpn) and (entry["G"] or entry["PSCID"] == PSCID)]


def page(vpn, ppn, *, PSCID=0, reach=0, G=0, readable=1, writable=1):
    return {"vpn": vpn, "PSCID": PSCID, "G": G, "ppn": ppn, "readable": readable, "writable": writable, "reach": reach}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def only_what_lives_is_found(dut):
    """IOMMU-TLB-2: random fills, lookups, invalidations in every cycle: a hit is a filled, unforgotten page of its space (R27)."""
    bench = await Bench(dut).begin()
    rng, hits = bench.rng, 0
    bases = [rng.randrange(VPNS) for _ in range(3)]
    pending, allowed = None, []
    for _ in range(4000):
        vpn = rng.choice(bases) ^ rng.choice([0, rng.randrange(8), 1 << rng.randrange(27)])
        fill = forget = None
        if rng.random() < 0.3:
            fill = page(rng.choice(bases) ^ rng.randrange(8), rng.getrandbits(44), PSCID=rng.randrange(3), G=rng.random() < 0.1,
                        reach=rng.choice([0, 0, 0, 1, 2, 3]), readable=rng.getrandbits(1), writable=rng.getrandbits(1))
        if rng.random() < 0.05:
            forget = rng.choice([True, rng.choice(bases) ^ rng.randrange(8)])
        PSCID, lookup = rng.randrange(3), vpn if rng.random() < 0.8 else None
        # What lives at the edge of the first cycle may be found in the second; an entry of this very cycle is one too many for 4 KiB pages.
        then = list(bench.live)
        found = vars(await bench.cycle(lookup=lookup, fill=fill, forget=forget, PSCID=PSCID))
        if pending is not None and found["hit"]:
            hits += 1
            assert found in answers(allowed, pending, PSCID), f"{pending:#x} in space {PSCID}: {found}"
        if lookup is not None:
            pending, allowed = vpn, [entry for entry in then if forget is None or (forget is not True and not covers(entry, forget))]
        if fill is not None and fill["reach"]:  # larger pages are looked up in the second cycle
            allowed = [*allowed, fill] if forget is None or (forget is not True and not covers(fill, forget)) else allowed
    assert hits > 200


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def sizes_and_spaces_are_exact(dut):
    """IOMMU-TLB-3: a page of each size hits from its first to its last 4 KiB page and in its own space only; G in every space."""
    bench = await Bench(dut).begin()
    for reach, low in enumerate(PAGES_LOG2):
        for G in (0, 1):
            await bench.cycle(forget=True)
            vpn = bench.rng.randrange(1, (VPNS >> low) - 1) << low
            entry = page(vpn | (1 << low) // 3, bench.rng.getrandbits(44) >> low << low, PSCID=5, reach=reach, G=G, writable=0)
            await bench.cycle(fill=entry)
            for inside in (vpn, vpn + (1 << low) - 1, vpn + (1 << low) // 2):
                assert vars(await bench.look_up(inside, PSCID=5)) == answer(entry, inside)
                for other in (4, 5 ^ 1 << 19, 0):
                    assert (await bench.look_up(inside, PSCID=other)).hit == G
            for outside in (vpn - 1, vpn + (1 << low), *(vpn ^ 1 << bit for bit in range(low, 27))):
                assert not (await bench.look_up(outside, PSCID=5)).hit, f"{outside:#x} beside {vpn:#x}, {1 << low} pages"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def cycles_are_exact(dut):
    """IOMMU-TLB-4: a fill shows to the next lookup; a forget, of all or of a page, to lookups and fills of its own cycle (R15)."""
    bench = await Bench(dut).begin()
    for reach in range(4):
        for forget in (True, 0x1234):
            entry = page(0x1234, 0x7777, reach=reach)
            await bench.cycle(fill=entry)
            await bench.cycle(lookup=0x1234)
            assert (await bench.cycle(lookup=0x1234, forget=forget)).hit == 1, "found in the cycle behind the lookup"
            assert not (await bench.cycle()).hit, "looked up in the cycle of the forget"
            await bench.cycle(fill=entry, forget=forget)
            assert not (await bench.look_up(0x1234)).hit, "filled in the cycle of the forget"
            await bench.cycle(fill=entry)
            await bench.cycle(lookup=0x1234)
            await bench.cycle()
            assert (await bench.cycle()).hit, "shown until the next lookup"
            await bench.cycle(forget=forget)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_page_is_forgotten_alone(dut):
    """IOMMU-TLB-5: forgetting by address leaves the 4 KiB pages that fall into other sets."""
    bench = await Bench(dut).begin()
    count = bench.sets
    for n in range(count):
        await bench.cycle(fill=page(n, n))
    await bench.cycle(forget=1)
    assert [(await bench.look_up(n)).hit for n in range(count)] == [n != 1 for n in range(count)]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def sequential_pages_fill_every_place(dut):
    """IOMMU-TLB-6: as many sequential pages of a 2 MiB region as there are entries are kept, so are superpages; the newest always is."""
    bench = await Bench(dut).begin()
    entries, superpages = params()["entries"], params()["superpages"]
    for _ in range(6):
        await bench.cycle(forget=True)
        base = bench.rng.randrange(VPNS >> 9) << 9 | bench.rng.randrange(512 - entries + 1)
        for n in range(entries):
            await bench.cycle(fill=page(base + n, n))
        assert all([(await bench.look_up(base + n)).ppn == n for n in range(entries)]), f"{base:#x}"
        reach = bench.rng.choice([1, 2, 3])
        for n in range(superpages):
            await bench.cycle(fill=page(n << 18, n << 18, reach=reach))
        assert all([(await bench.look_up(n << 18)).hit for n in range(superpages)])
        for _ in range(20):
            vpn, reach = bench.rng.randrange(VPNS), bench.rng.randrange(4)
            await bench.cycle(fill=page(vpn, 0, PSCID=1, reach=reach))
            assert (await bench.look_up(vpn, PSCID=1)).hit


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def discarded_entries_are_gone(dut):
    """IOMMU-TLB-7: discard takes out what the lookup found, copies too, and nothing else; without a hit it does nothing."""
    bench = await Bench(dut).begin()
    ways, sets = params()["ways"], bench.sets
    for reach in range(4):
        await bench.cycle(forget=True)
        copies = min(ways, 3) if reach == 0 else min(params()["superpages"], 3)
        for n in range(copies):
            await bench.cycle(fill=page(0x40000, 0x40000 * n, reach=reach))
        neighbour = 0x40001 if reach == 0 and sets > 1 else 0x80000
        await bench.cycle(fill=page(neighbour, 0))
        await bench.cycle(lookup=0x40000 ^ 1 << 26)
        await bench.cycle(discard=1)
        assert (await bench.look_up(0x40000)).hit
        assert (await bench.cycle(discard=1)).hit
        assert not (await bench.look_up(0x40000)).hit
        assert (await bench.look_up(neighbour)).hit
