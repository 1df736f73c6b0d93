"""The tag table by itself: times, order of tags, reset; what completions may do is tested with the requester."""

import random
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, Tlp, TlpType, memory_read
from ringwall.rtl.tlp.layouts import BurstStatus, TlpBeat
from ringwall.rtl.tlp.tags import Opened, StoreBeat, TagEnd, TagEvents, TagGrant, TagTable, TimeoutSetting
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, reader, start, unpack
from ringwall.sim.tlp_beats import completions_of, to_beats

WIDTH, ROWS, INDEX_BITS, TAGS, WALL_TAGS = 64, 1024, 8, 40, 8
TIMEOUT_OF_8 = 5000
PULSES = ("unexpected", "timeout", "unsupported", "aborted", "poisoned")


@pytest.mark.parametrize("timeout", [32 * TAGS, 4000])
def test_tags(request, timeout):
    table = TagTable(width=WIDTH, tags=TAGS, wall_tags=WALL_TAGS, rows=ROWS, index_bits=INDEX_BITS, timeout_cycles=timeout)
    everything = ["timeouts_are_in_time", "a_flood_does_not_stop_the_timer", "tags_are_handed_out_in_turn", "latencies_are_as_stated",
                  "a_reset_forgets_everything", "every_error_of_a_completion", "a_completion_before_its_request"]  # fmt: skip
    only = everything if timeout == 32 * TAGS else everything[:2]
    run(table, module=__name__, node=request.node.nodeid, params={"timeout": timeout}, testcase=only)


def test_timeouts_of_functions(request):
    table = TagTable(width=WIDTH, tags=10, wall_tags=2, rows=ROWS, index_bits=INDEX_BITS, timeout_cycles=TIMEOUT_OF_8)
    run(table, module=__name__, node=request.node.nodeid, testcase="timeouts_of_functions")


def test_ten_bits(request):
    table = TagTable(width=WIDTH, tags=768, wall_tags=WALL_TAGS, rows=ROWS, index_bits=10, timeout_cycles=32 * 768)
    run(table, module=__name__, node=request.node.nodeid, testcase="ten_bits")


class Bench:
    """Takes tags, opens requests of one kind, sends completions."""

    async def begin(self, dut):
        await start(dut)
        self.dut, self.index_bits = dut, len(dut.opened__payload) - Opened(ROWS, 0).size
        names = ["wall_tags", "short_tags", "long_tags", "wide_tags", "completions"]
        self.s = {name: Stream(dut, name) for name in [*names, "opened", "store", "ended"]}
        self.ends, self.end_cycles, self.stores, self.store_cycles, self.events = [], [], [], [], []
        cocotb.start_soon(self.s["ended"].watch(self.ends, self.end_cycles))
        cocotb.start_soon(self.s["store"].watch(self.stores, self.store_cycles))
        cocotb.start_soon(self.watch_events(reader(dut.events)))
        return self

    async def watch_events(self, read):
        while True:
            await RisingEdge(self.dut.clk)
            if not read() % (1 << len(PULSES)):
                await self.dut.events.value_change
                continue
            events = unpack(TagEvents, read())
            (name,) = (name for name in PULSES if getattr(events, name))
            self.events.append((name, events))

    async def open(self, pool, index=0, length=8, requester=0x1234, address=0, grant=None, row=0, function=2, ten_bit=0):
        """Take a tag (or use ``grant``) and open a request of ``length`` bytes; return its TLP and the cycle."""
        grant = grant or unpack(TagGrant, await self.s[f"{pool}_tags"].get())
        await self.s["opened"].put(pack(Opened(ROWS, self.index_bits), tag=grant.tag, generation=grant.generation, index=index, row=row,
                                        requester_id=requester, length_bytes=length, lower_address=address & 0x7F, client=3, epoch=1,
                                        function=function, ten_bit=ten_bit))  # fmt: skip
        return memory_read(address, length, requester_id=requester, tag=grant.tag + 256 * ten_bit), cycle()

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
    assert (int(dut.dead.value), int(dut.exhausted.value)) == (0b1110, 1)


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
    """TLP-TAG-4: 1 cycle from a beat to its place in the buffer, 2 from the last beat to the end; positions follow the address."""
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, TAGS + 5)
    tlp, _ = await bench.open("short", 5, length=20)
    content = bytes(range(20))
    for part in completions_of(tlp, content, [8]):
        sent = await bench.send(part)
    await ClockCycles(dut.clk, 6)
    assert bench.store_cycles == [sent + n for n in (-1, 0, 1)]  # beats were taken at sent - 2, - 1 and in `sent`
    assert bench.end_cycles == [sent + 2]
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


def damages(read, content):
    """Return, by name, what may go wrong with the completions of ``read``: what is sent, the end, the report of each, what comes late.

    A report is the name of a pulse, or "" for none.
    """
    first, middle, last = good = completions_of(read, content, [(read.address | 63) + 1, (read.address | 63) + 65])
    bare = replace(first, type=TlpType.CPL, data=b"", length_dw=0)
    lost = BurstStatus.TIMEOUT

    def failing(status):
        return replace(bare, status=status)

    def longer(part, count):
        return replace(part, data=part.data + bytes(4 * count), length_dw=part.length_dw + count)

    rows = {
        "none": (good, BurstStatus.OK, ["", "", ""]),
        "wrong tag": ([replace(first, tag=first.tag ^ 0x10), *good], BurstStatus.OK, ["unexpected", "", "", ""]),
        "wrong tag[8]": ([replace(first, tag=first.tag | 0x100), *good], BurstStatus.OK, ["unexpected", "", "", ""]),
        "wrong tag[9]": ([replace(first, tag=first.tag | 0x200), *good], BurstStatus.OK, ["unexpected", "", "", ""]),
        "duplicate of all": ([*good, *good], BurstStatus.OK, ["", "", "", *["unexpected"] * 3]),
        "duplicate of one": ([first, first, middle, last], BurstStatus.OK, ["", "unexpected", "", ""]),
        "longer than it says": ([replace(first, data=first.data + bytes(8)), *good], BurstStatus.OK, ["unexpected", "", "", ""]),
        "more than a request": ([longer(first, 60), *good], BurstStatus.OK, ["unexpected", "", "", ""]),
        "over-long at the end": ([first, middle, longer(last, 1)], lost, ["", "", "unexpected"]),
        "short at the end": ([first, middle, replace(last, data=last.data[:-4], length_dw=last.length_dw - 1)], lost, ["", "", ""]),
        "shorter than it says": ([first, replace(middle, data=middle.data[:-4])], lost, ["", "unexpected"]),
        "missing": ([], lost, []),
        "last missing": ([first, middle], lost, ["", ""]),
        "middle missing": ([first, last], lost, ["", "unexpected"]),
        "wrong order": ([last, middle, first], lost, ["unexpected", "unexpected", ""]),
        "wrong bus": ([replace(first, requester_id=first.requester_id ^ 0x8000)], lost, ["unexpected"]),
        "wrong function": ([replace(first, requester_id=first.requester_id ^ 1)], lost, ["unexpected"]),
        "wrong lower address": ([replace(first, lower_address=first.lower_address ^ 4)], lost, ["unexpected"]),
        "wrong first byte": ([replace(first, lower_address=first.lower_address ^ 1)], lost, ["unexpected"]),
        "wrong byte count": ([first, replace(middle, byte_count=middle.byte_count - 1)], lost, ["", "unexpected"]),
        "not at a boundary": (completions_of(read, content, [read.address + 6 & ~3, read.address + 30 & ~3]), BurstStatus.OK, [""] * 3),
        "locked": ([replace(first, type=TlpType.CPLDLK)], lost, ["unexpected"]),
        "without data": ([bare], lost, ["unexpected"]),
        "poisoned": ([first, replace(middle, poisoned=True), last], BurstStatus.POISONED, ["", "poisoned", ""]),
        "all poisoned": ([replace(part, poisoned=True) for part in good], BurstStatus.POISONED, ["poisoned"] * 3),
        "poisoned and wrong": ([replace(middle, poisoned=True), *good], BurstStatus.OK, ["unexpected", "", "", ""]),
        "UR poisoned": ([replace(failing(CplStatus.UR), poisoned=True)], BurstStatus.UR, ["unsupported"]),
    }
    for status, end, event in ((CplStatus.UR, BurstStatus.UR, "unsupported"), (CplStatus.CA, BurstStatus.CA, "aborted"),
                               (CplStatus.CRS, BurstStatus.UR, "unsupported"), *((n, BurstStatus.UR, "unsupported") for n in (3, 5, 6, 7))):
        rows[f"status {int(status)}"] = ([failing(status)], end, [event])
        rows[f"status {int(status)} midway"] = ([first, failing(status), middle], end, ["", event, "unexpected"])
        rows[f"status {int(status)} with data"] = ([first, replace(middle, status=status)], end, ["", event])
    # What the host still owes after a request that was given up.
    owed = {"wrong order": [middle, last], "short at the end": completions_of(read, content, [read.address + len(content) - 1 & ~3])[1:]}
    return {name: (*row, owed.get(name, good[row[2].count("") :])) for name, row in rows.items()}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def every_error_of_a_completion(dut):
    """TLP-TAG-7: each row of the table of completion errors: how its request ends, what is reported with whose header, that a
    neighbour's data is right, no other row of the buffer is written, and that the tag works later."""
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, TAGS + 5)
    rng = random.Random(cocotb.RANDOM_SEED)
    address, length = 0x1_0000_0030 + rng.randrange(16), 140
    names = damages(memory_read(address, length, requester_id=0, tag=0), bytes(length))
    for name in names:
        content = [rng.randbytes(length) for _ in range(2)]
        victim, _ = await bench.open("long", 1, length, address=address, row=32)
        neighbour, _ = await bench.open("long", 2, length, address=address, row=64)
        bench.events.clear()
        bench.ends.clear()
        bench.stores.clear()
        sent, status, reports, owed = damages(victim, content[0])[name]
        beside = completions_of(neighbour, content[1], [(address | 63) + 1])
        for n, tlp in enumerate([*sent[:1], beside[0], *sent[1:], beside[1]]):
            await bench.send(tlp)
            if n % 2:
                await ClockCycles(dut.clk, 2)
        await ClockCycles(dut.clk, 8)
        expected = [(report, tlp) for report, tlp in zip(reports, sent, strict=True) if report]
        if status == BurstStatus.TIMEOUT:
            assert [unpack(TagEnd(INDEX_BITS), end).index for end in bench.ends] == [2], name
            await ClockCycles(dut.clk, params()["timeout"] * 5 // 4)
            expected.append(("timeout", None))
            for tlp in owed:
                await bench.send(tlp)
                expected.append(("unexpected", tlp))
            await ClockCycles(dut.clk, 8)
        ends = {end.index: end.status for end in (unpack(TagEnd(INDEX_BITS), end) for end in bench.ends)}
        assert len(bench.ends) == 2 and ends == {1: status, 2: BurstStatus.OK}, f"{name}: {ends}"
        assert [report for report, _ in bench.events] == [report for report, _ in expected], f"{name}: {bench.events}"
        for (report, events), (_, tlp) in zip(bench.events, expected):
            if tlp is None:
                assert events.function == 2
                assert (events.header.tag, events.header.requester_id) == (victim.tag, victim.requester_id)
            else:
                assert events.header == unpack(TlpBeat(WIDTH), to_beats(WIDTH, tlp)[0]).header, f"{name}: header of {tlp}"
                assert report == "unexpected" or events.function == 2
        buffer = {}
        for store in (unpack(StoreBeat(WIDTH, ROWS), store) for store in bench.stores):
            assert store.client == 3 and store.row in (32, 64), f"{name}: stored in {store}"
            for n in range(store.dword_count):
                buffer[store.row, store.position + n] = (store.data >> 32 * n & 0xFFFF_FFFF).to_bytes(4, "little")
        places = range(address >> 2 & 1, (address & 7) + length + 3 >> 2)
        assert {place for row, place in buffer if row == 64} == set(places)
        assert {place for row, place in buffer if row == 32} <= set(places), f"{name}: stored outside its request"
        for row, is_right in ((64, True), (32, status == BurstStatus.OK)):
            found = b"".join(buffer.get((row, place), b"") for place in places)[address & 3 :][:length]
            assert not is_right or found == content[row == 64], f"{name}: row {row} has other data"
        for n in range(TAGS - 32):  # each tag of the set once more
            tlp, _ = await bench.open("long", n, address=0x40, row=96)
            await bench.send(completions_of(tlp, bytes(8))[0])
        await ClockCycles(dut.clk, 8)
        ends = [unpack(TagEnd(INDEX_BITS), end) for end in bench.ends[2:]]
        assert [(end.index, end.status) for end in ends] == [(n, BurstStatus.OK) for n in range(TAGS - 32)], f"{name}: later {ends}"
        assert int(dut.in_flight.value) == 0


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def timeouts_of_functions(dut):
    """TLP-TAG-9: each function's Device Control 2 decides how long its requests wait, values that are not offered are the default, also
    while they are in flight; none ends while disabled, and all end after that or after a stop."""
    default = TIMEOUT_OF_8
    short, medium = (default // 160, 2.2 * default / 160), (default // 2, 1.25 * default / 2)
    bench = await Bench().begin(dut)

    def settings(**of):
        dut_settings = {**{f"f{n}": {} for n in range(8)}, **of}
        for n in range(8):
            getattr(dut, f"timeouts__{n}").value = pack(TimeoutSetting, **dut_settings[f"f{n}"])

    endless = {"value": 2, "disable": 1}
    now = {"f1": {"value": 1}, "f2": {"value": 2}, "f4": {"value": 0b0101}, "f5": endless, "f6": endless, "f7": {"value": 2}}
    settings(**now)
    await ClockCycles(dut.clk, 40)
    opened = {}
    for n in range(8):
        _, opened[n] = await bench.open("short", n, function=n)
    expected = {0: (default, 1.25 * default), 1: short, 2: medium, 3: (default, 1.25 * default), 4: (default, 1.25 * default)}
    await ClockCycles(dut.clk, 1500)
    settings(**now | {"f7": {"value": 1}})  # it has waited longer than that
    expected[7] = 1500, 1500 + 100 + short[1] - short[0]
    await ClockCycles(dut.clk, 5000)
    assert {unpack(TagEnd(INDEX_BITS), end).index for end in bench.ends} == {0, 1, 2, 3, 4, 7}
    settings(**now | {"f6": {"value": 1}})
    changed = cycle() - opened[6]
    expected[6] = changed + short[0] - default // 16 - 20, changed + short[1]  # looked at 16 times in the default
    dut.stop.value = 1 << 5
    stopped = cycle() - opened[5]
    expected[5] = stopped + medium[0] - default // 16 - 20, stopped + medium[1]
    await ClockCycles(dut.clk, int(medium[1]) + 20)
    found = {unpack(TagEnd(INDEX_BITS), end).index: at for end, at in zip(bench.ends, bench.end_cycles)}
    for n in range(8):
        low, high = expected[n]
        assert low <= found[n] - opened[n] <= high, f"function {n} after {found[n] - opened[n]} cycles, expected {low} to {high}"
    assert [name for name, _ in bench.events] == ["timeout"] * 8


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def ten_bits(dut):
    """TLP-TAG-10: 768 tags in sets of 8, 24, 224 and 512; in 10 bits each is 256 to 1023, and only a completion with the tag of the
    request counts: neither the same number without bits 9:8 nor another with them."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, 800)
    used = []
    for pool, count, forms in (("wall", 8, (0, 1)), ("short", 24, (0, 1)), ("long", 224, (0, 1)), ("wide", 512, (1,))):
        for _ in range(count):
            ten_bit = rng.choice(forms)
            tlp, _ = await bench.open(pool, len(used), ten_bit=ten_bit)
            assert (256 <= tlp.tag <= 1023) if ten_bit else tlp.tag <= 255
            used.append(tlp)
        await ClockCycles(dut.clk, 3)
        assert not bench.s[f"{pool}_tags"].read_valid(), pool
    assert len({tlp.tag % 256 if tlp.tag < 256 else tlp.tag - 256 for tlp in used}) == 768
    there = {tlp.tag for tlp in used}
    for tag in sorted(set(range(1024)) - there):
        await bench.send(completions_of(replace(used[0], tag=tag), bytes(8))[0])
    await ClockCycles(dut.clk, 4)
    assert not bench.stores and len(bench.events) == 1024 - 768
    order = list(range(768))
    rng.shuffle(order)
    for n in order:
        await bench.send(completions_of(used[n], bytes(8))[0])
    await ClockCycles(dut.clk, 8)
    assert [unpack(TagEnd(10), end).index for end in bench.ends] == order
    assert len(bench.events) == 1024 - 768
    # Each set again: in the order in which they were given back.
    for pool, (low, high) in {"wall": (0, 8), "short": (8, 32), "long": (32, 256), "wide": (256, 768)}.items():
        for n in (n for n in order if low <= n < high):
            tlp, _ = await bench.open(pool, 0, ten_bit=1)
            assert tlp.tag == n + 256
            if (n & 63) == 0:
                break


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_completion_before_its_request(dut):
    """TLP-TAG-8: completions for tags that are free, or handed out and not yet sent: unexpected, and the request is none the wiser."""
    bench = await Bench().begin(dut)
    await ClockCycles(dut.clk, TAGS + 5)
    for n in range(20):
        grant = unpack(TagGrant, await bench.s["long_tags"].get())
        early = memory_read(0x40, 8, requester_id=0x1234, tag=grant.tag)
        for tlp in (completions_of(early, bytes(8))[0], Tlp(TlpType.CPL, status=CplStatus.UR, tag=grant.tag, requester_id=0x1234)):
            await bench.send(tlp)
        await ClockCycles(dut.clk, n % 6)
        assert not bench.ends and not bench.stores
        tlp, _ = await bench.open("long", n, address=0x40, grant=grant)
        await bench.send(completions_of(tlp, bytes(8))[0])
        await ClockCycles(dut.clk, 6)
        assert [unpack(TagEnd(INDEX_BITS), end).status for end in bench.ends] == [BurstStatus.OK] and len(bench.stores) == 1
        assert [name for name, _ in bench.events] == ["unexpected"] * 2
        bench.ends.clear()
        bench.stores.clear()
        bench.events.clear()


def test_layout():
    """TLP-TAG-6: a completion as the receiver hands it over has its fields where the table looks for them."""
    beat = unpack(TlpBeat(WIDTH), to_beats(WIDTH, Tlp(TlpType.CPLD, tag=0x155, status=CplStatus.CA, byte_count=4096, lower_address=0x7F,
                                                      length_dw=1, data=b"abcd"))[0])  # fmt: skip
    assert (beat.header.tag, beat.header.status, beat.header.byte_count, beat.header.lower_address) == (0x155, 4, 4096, 0x7F)
    assert (beat.first, beat.last, beat.dword_count, beat.data) == (1, 1, 1, int.from_bytes(b"abcd", "little"))
