"""The tag table by itself: times, order of tags, reset; what completions may do is tested with the requester."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, Tlp, TlpType, memory_read
from ringwall.rtl.tlp.layouts import BurstStatus, TlpBeat
from ringwall.rtl.tlp.tags import Opened, StoreBeat, TagEnd, TagGrant, TagTable
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, start, unpack
from ringwall.sim.tlp_beats import completions_of, to_beats

WIDTH, ROWS, INDEX_BITS, TAGS, WALL_TAGS = 64, 1024, 8, 40, 8


@pytest.mark.parametrize("timeout", [32 * TAGS, 10000])
def test_tags(request, timeout):
    table = TagTable(width=WIDTH, tags=TAGS, wall_tags=WALL_TAGS, rows=ROWS, index_bits=INDEX_BITS, timeout_cycles=timeout)
    run(table, module=__name__, node=request.node.nodeid, params={"timeout": timeout})


class Bench:
    """Takes tags, opens requests of one kind, sends completions."""

    async def begin(self, dut):
        await start(dut)
        self.dut = dut
        names = ["wall_tags", "short_tags", "long_tags", "completions"]
        self.s = {name: Stream(dut, name) for name in [*names, "opened", "store", "ended"]}
        self.ends, self.end_cycles, self.stores, self.store_cycles = [], [], [], []
        cocotb.start_soon(self.s["ended"].watch(self.ends, self.end_cycles))
        cocotb.start_soon(self.s["store"].watch(self.stores, self.store_cycles))
        return self

    async def open(self, pool, index=0, length=8, requester=0x1234):
        """Take a tag and open a request of ``length`` bytes at 0; return its TLP and the cycle."""
        grant = unpack(TagGrant, await self.s[f"{pool}_tags"].get())
        await self.s["opened"].put(pack(Opened(ROWS, INDEX_BITS), tag=grant.tag, generation=grant.generation, index=index,
                                        requester_id=requester, length_bytes=length, client=3, function=2, epoch=1))  # fmt: skip
        return memory_read(0, length, requester_id=requester, tag=grant.tag), cycle()

    async def send(self, tlp):
        await self.s["completions"].put_many(to_beats(WIDTH, tlp))
        return cycle()

    async def drain(self, pool):
        """Take every tag that a set has now."""
        tags = []
        while True:
            await RisingEdge(self.dut.clk)
            if not self.s[f"{pool}_tags"].read_valid():
                return tags
            tags.append(unpack(TagGrant, await self.s[f"{pool}_tags"].get()).tag)
            await ClockCycles(self.dut.clk, 3)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def timeouts_are_in_time(dut):
    """TLP-TAG-1: requests opened at random times and never answered end with TIMEOUT after 1.00 to 1.25 times the timeout."""
    rng, timeout = random.Random(cocotb.RANDOM_SEED), params()["timeout"]
    bench = await Bench().begin(dut)
    opened = {}
    for n in range(TAGS - WALL_TAGS):
        await ClockCycles(dut.clk, rng.choice([0, 1, rng.randrange(timeout // 10)]))
        _, opened[n] = await bench.open("short" if n < 24 else "long", n)
    await ClockCycles(dut.clk, 2)
    assert int(dut.in_flight.value) == TAGS - WALL_TAGS - len(bench.ends)
    await ClockCycles(dut.clk, timeout * 5 // 4 + 10)
    ends = [unpack(TagEnd(INDEX_BITS), end) for end in bench.ends]
    assert sorted(end.index for end in ends) == list(range(TAGS - WALL_TAGS))
    for end, at in zip(ends, bench.end_cycles):
        assert (end.status, end.client, end.function, end.epoch) == (BurstStatus.TIMEOUT, 3, 2, 1)
        assert timeout <= at - opened[end.index] <= 1.25 * timeout, f"ended after {at - opened[end.index]}"
    assert int(dut.in_flight.value) == 0
    assert (int(dut.dead.value), int(dut.exhausted.value)) == (0b110, 1)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def a_flood_does_not_stop_the_timer(dut):
    """TLP-TAG-2: with a wrong completion of one beat in every cycle timeouts are still found, and `ready` is 0 in less than one cycle in
    60; with beats that leave gaps it never is."""
    timeout = params()["timeout"]
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, TAGS + 5)
    opened = [(await bench.open("short", n))[1] for n in range(3)]
    flood = to_beats(WIDTH, Tlp(TlpType.CPL, status=CplStatus.UR, tag=9, requester_id=0x4321, byte_count=4))
    assert len(flood) == 1
    c = bench.s["completions"]
    c._payload(flood[0])
    c._valid(1)
    waited, total = 0, 0
    while len(bench.ends) < 3:
        await RisingEdge(dut.clk)
        waited += not c.read_ready()
        total += 1
        assert total < 1.25 * timeout + 70 * TAGS, "a timeout was not found"
    c._valid(0)
    assert 0 < waited < total / 60
    assert min(bench.end_cycles) - opened[0] >= timeout
    # Two beats each: the second leaves the table a cycle to look.
    _, opened = await bench.open("short", 7)
    pair = to_beats(WIDTH, Tlp(TlpType.CPLD, tag=9, requester_id=0x4321, byte_count=16, length_dw=4, data=bytes(16)))
    assert len(pair) == 2
    while len(bench.ends) < 4:
        for beat in pair:
            c._payload(beat)
            c._valid(1)
            await RisingEdge(dut.clk)
            waited_for_end = not c.read_ready()
            if waited_for_end:  # only to let the table write down what it found
                await RisingEdge(dut.clk)
        assert cycle() - opened < 1.25 * timeout + 70
    c._valid(0)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def tags_are_handed_out_in_turn(dut):
    """TLP-TAG-3: no tag before the table is cleared; then each set gives its own tags, the one that was free for longest first."""
    bench = await Bench().begin(dut)
    begin = cycle()
    while not bench.s["wall_tags"].read_valid():
        await RisingEdge(dut.clk)
    assert cycle() - begin >= TAGS - 3
    assert await bench.drain("wall") == list(range(8))
    assert await bench.drain("long") == list(range(32, 40))
    order = []
    for n in range(60):
        tlp, _ = await bench.open("short", n)
        order.append(tlp.tag)
        await bench.send(completions_of(tlp, bytes(8))[0])
        await ClockCycles(dut.clk, 8)
    assert order == [8 + n % 24 for n in range(60)]
    assert len(bench.ends) == 60


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def latencies_are_as_stated(dut):
    """TLP-TAG-4: 2 cycles from a beat to its place in the buffer, 3 from the last beat to the end; positions follow the address."""
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, TAGS + 5)
    tlp, _ = await bench.open("short", 5, length=20)
    content = bytes(range(20))
    for part in completions_of(tlp, content, [8]):
        sent = await bench.send(part)
    await ClockCycles(dut.clk, 6)
    assert bench.store_cycles == [sent + n for n in (0, 1, 2)]  # beats were taken at sent - 2, - 1 and in `sent`
    assert bench.end_cycles == [sent + 3]
    stores = [unpack(StoreBeat(WIDTH, ROWS), store) for store in bench.stores]
    assert [(s.position, s.dword_count) for s in stores] == [(0, 2), (2, 2), (4, 1)]
    assert b"".join(s.data.to_bytes(8, "little")[: 4 * s.dword_count] for s in stores) == content


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_reset_forgets_everything(dut):
    """TLP-TAG-5: after a reset no old request exists: its completion is unexpected, all tags are free, none ends or times out."""
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, TAGS + 5)
    old = [(await bench.open("short", n))[0] for n in range(24)]
    await bench.send(completions_of(old[3], bytes(8))[0])
    await ClockCycles(dut.clk, 10)
    assert len(bench.ends) == 1
    dut.rst.value = 1
    await ClockCycles(dut.clk, 2)
    dut.rst.value = 0
    await ClockCycles(dut.clk, TAGS + 5)
    for tlp in old:
        await bench.send(completions_of(tlp, bytes(8))[0])
    await ClockCycles(dut.clk, params()["timeout"] * 5 // 4)
    assert len(bench.ends) == 1 and len(bench.stores) == 1
    for n in range(30):
        tlp, _ = await bench.open("short", n)
        await bench.send(completions_of(tlp, bytes(8))[0])
    await ClockCycles(dut.clk, 10)
    assert len(bench.ends) == 31


def test_layout():
    """TLP-TAG-6: a completion as the receiver hands it over has its fields where the table looks for them."""
    beat = unpack(TlpBeat(WIDTH), to_beats(WIDTH, Tlp(TlpType.CPLD, tag=0x155, status=CplStatus.CA, byte_count=4096, lower_address=0x7F,
                                                      length_dw=1, data=b"abcd"))[0])  # fmt: skip
    assert (beat.header.tag, beat.header.status, beat.header.byte_count, beat.header.lower_address) == (0x155, 4, 4096, 0x7F)
    assert (beat.first, beat.last, beat.dword_count, beat.data) == (1, 1, 1, int.from_bytes(b"abcd", "little"))
