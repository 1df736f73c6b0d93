"""Intervals: every answer is that of a plain list, every cycle is counted."""

import random
from bisect import bisect_right

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.rtl.viommu.intervals import Interval, Intervals, Order, OrderKind, Outcome
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, start, unpack

SHAPES = {  # intervals, key bits, tests
    "tiny": (3, 4, ["a_list_answers_the_same"]),
    "small": (16, 9, ["a_list_answers_the_same", "lookups_go_between"]),
    "full": (300, 39, ["full_is_full"]),
    "default": (4096, 39, ["costs_are_bounded"]),
}
PAGE_BITS = 12


@pytest.mark.parametrize("shape", SHAPES)
def test_intervals(request, shape, capsys):
    intervals, key_bits, tests = SHAPES[shape]
    done = run(Intervals(intervals=intervals, key_bits=key_bits, page_bits=PAGE_BITS), module=__name__, node=request.node.nodeid,
               params={"intervals": intervals, "key_bits": key_bits}, testcase=tests)  # fmt: skip
    with capsys.disabled():
        print("", *(line[6:] for line in done.log.splitlines() if line.startswith("BENCH ")), sep="\n  ")


@pytest.mark.parametrize("bad", [{"intervals": 1}, {"intervals": 2.0}, {"key_bits": 12}, {"key_bits": 1, "intervals": 2}, {"page_bits": 0}])
def test_parameters_are_checked(bad):
    """VIOMMU-INT-1: sizes that make no sense are refused with a sentence."""
    with pytest.raises(ValueError, match=r"must be .*, not"):
        Intervals(**bad)


class PlainList:
    """Intervals as (first, last, page, readable, writable), in order."""

    def __init__(self, room):
        self.room, self.items = room, []

    def find(self, key):
        at = bisect_right(self.items, (key, float("inf"))) - 1
        return self.items[at] if at >= 0 and self.items[at][1] >= key else None

    def inside(self, first, last):
        """Return where those that share a key with ``first`` to ``last`` are."""
        start, end = (bisect_right(self.items, (key, float("inf"))) for key in (first, last))
        return slice(start - (start > 0 and self.items[start - 1][1] >= first), end)

    def insert(self, item):
        if self.items[self.inside(*item[:2])]:
            return Outcome.OVERLAPS
        if len(self.items) == self.room:
            return Outcome.FULL
        self.items.insert(bisect_right(self.items, item), item)
        return Outcome.DONE

    def remove(self, first, last, cuts_first=0, cuts_last=0):
        touched = self.inside(first, last)
        if any(i[0] < first or i[1] > last or (cuts_first and i[0] == first) or (cuts_last and i[1] == last) for i in self.items[touched]):
            return Outcome.SPLITS
        del self.items[touched]
        return Outcome.DONE


class Bench:
    """The circuit with a list beside it; each call returns its cycles, from the one in which it is accepted to that of the answer."""

    def __init__(self, dut):
        self.dut = dut

    async def begin(self):
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.key_bits = params()["key_bits"]
        self.order, self.interval = Order(self.key_bits, PAGE_BITS), Interval(self.key_bits, PAGE_BITS)
        self.list = PlainList(params()["intervals"])
        names = ("find", "found", "orders", "outcomes")
        self.find_port, self.found, self.orders, self.outcomes = await start(self.dut, *names)
        return self

    async def ask(self, i, o, payload):
        await i.put(payload)
        began = cycle()
        o.set_ready(1)
        if not o.read_valid():
            await RisingEdge(o.valid)  # far cheaper than every edge of the clock
        await RisingEdge(self.dut.clk)
        answer = o.read_payload()
        o.set_ready(0)
        return answer, cycle() - began

    async def find(self, key):
        answer, cycles = await self.ask(self.find_port, self.found, key)
        self.check(key, answer, self.list.find(key))
        return cycles

    def check(self, key, answer, wanted):
        found = unpack(self.interval, answer)
        got = (found.first, found.last, found.page, found.readable, found.writable) if found.hit else None
        assert got == wanted, f"{key:#x}: {got}, not {wanted}"

    async def change(self, kind, wanted, **fields):
        answer, cycles = await self.ask(self.orders, self.outcomes, pack(self.order, kind=kind, **fields))
        assert Outcome(answer) == wanted, f"{kind} {fields}: {Outcome(answer)}, not {wanted}"
        assert int(self.dut.count.value) == len(self.list.items)
        return cycles

    async def insert(self, first, last, page=0, readable=1, writable=1):
        wanted = self.list.insert((first, last, page, readable, writable))
        return await self.change(OrderKind.INSERT, wanted, first=first, last=last, page=page, readable=readable, writable=writable)

    async def remove(self, first, last, cuts_first=0, cuts_last=0):
        wanted = self.list.remove(first, last, cuts_first, cuts_last)
        return await self.change(OrderKind.REMOVE, wanted, first=first, last=last, cuts_first=cuts_first, cuts_last=cuts_last)

    def draw(self):
        """Return two keys in order, near to each other mostly, at the borders of what there is often."""
        rng, top = self.rng, (1 << self.key_bits) - 1
        edges = [edge for item in self.list.items for edge in (item[0] - 1, item[0], item[1], item[1] + 1) if 0 <= edge <= top]
        first = rng.choice(edges) if edges and rng.random() < 0.4 else rng.randrange(top + 1)
        last = rng.choice(edges) if edges and rng.random() < 0.3 else first + rng.choice([0, 0, 0, 1, 3, rng.randrange(top // 4 + 1)])
        return sorted((first, min(last, top)))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def a_list_answers_the_same(dut):
    """VIOMMU-INT-2: thousands of insertions, removals and lookups: outcomes and answers are those of a list (V183, V194, V195)."""
    bench = await Bench(dut).begin()
    rng = bench.rng
    seen = set()
    for n in range(1500):
        first, last = bench.draw()
        filling = n // 60 % 2 == 0  # grow and shrink by turns
        kind = rng.random()
        if kind < 0.3:
            await bench.find(first)
        elif (kind < 0.85) == filling:
            seen.add(("insert", len(bench.list.items)))
            await bench.insert(first, last, rng.getrandbits(PAGE_BITS), rng.getrandbits(1), rng.getrandbits(1))
        else:
            await bench.remove(first, last, rng.random() < 0.1, rng.random() < 0.1)
    assert ("insert", 0) in seen and ("insert", bench.list.room) in seen, "empty and full both met"
    for key in range(1 << bench.key_bits):
        await bench.find(key)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def lookups_go_between(dut):
    """VIOMMU-INT-3: while a removal takes out intervals one by one lookups are answered, of all that still is there, and it ends."""
    bench = await Bench(dut).begin()
    count = bench.list.room
    for n in range(count):
        await bench.insert(2 * n, 2 * n, n)
    before = bench.list.items[:]
    removal = cocotb.start_soon(bench.remove(1, 2 * count - 3))
    left, looks = set(range(count)), 0
    while not removal.done():
        key = bench.rng.randrange(count)
        answer, _ = await bench.ask(bench.find_port, bench.found, 2 * key)
        if unpack(bench.interval, answer).hit:
            assert key in left, f"{key} came back"
            bench.check(2 * key, answer, before[key])
        else:
            left.discard(key)
        looks += 1
    assert looks > count // 2 and len(left) > 2, "lookups went between"
    for key in range(2 * count):
        await bench.find(key)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def full_is_full(dut):
    """VIOMMU-INT-4: as many intervals fit as were asked for, however they lie, whatever was taken out before; one more does not."""
    bench = await Bench(dut).begin()
    room, keys = bench.list.room, bench.rng.sample(range(1 << bench.key_bits), 2 * bench.list.room)
    for key in keys[:room]:
        await bench.insert(key, key)
    await bench.insert(keys[room], keys[room])  # the list says FULL
    assert len(bench.list.items) == room
    low, high = (bench.list.items[n][0] for n in (room // 4, room // 2))
    await bench.remove(low, high)
    for key in keys[room:]:
        if len(bench.list.items) == room:
            break
        await bench.insert(key, key)
    assert len(bench.list.items) == room
    for key in keys[::40]:
        await bench.find(key)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def costs_are_bounded(dut):
    """VIOMMU-INT-5: of 4096 intervals the highest tree costs <= 200 cycles per lookup and insertion, a removal 8 more for each."""
    bench = await Bench(dut).begin()
    top, room = bench.key_bits, bench.list.room
    assert bench.list.room == 4096
    for key in [0, *(1 << bit for bit in range(top))]:
        await bench.insert(key, key)
    worst = {"lookup": 0, "insertion": 0}
    for key in [*(1 << bit for bit in range(top)), 0]:
        worst["lookup"] = max(worst["lookup"], await bench.find(key))
    assert await bench.remove(0, 0) <= 200
    worst["insertion"] = await bench.insert(0, 0)
    removal = await bench.remove(0, (1 << top) - 1)
    assert removal <= 200 + 8 * (top + 1)
    for n in range(room):
        await bench.insert(n, n)
    usual = await bench.find(bench.rng.randrange(room))
    all_of_them = await bench.remove(0, room)
    assert all_of_them <= 200 + 8 * room and max(worst.values()) <= 200
    print(f"BENCH highest tree of {top + 1}: lookup {worst['lookup']}, insertion {worst['insertion']}, removal of all {removal} cycles")
    print(f"BENCH {room} pages in a row: lookup {usual}, removal of all {all_of_them} cycles, {all_of_them / room:.2f} each")
