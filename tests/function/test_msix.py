"""MSI-X: messages against requests, masks and tables; each test keeps its own account of what is due."""

import itertools
import os
import random
from collections import Counter

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.function.description import MsixCapability
from ringwall.rtl.function.layouts import MsixRequest
from ringwall.rtl.function.msix import Msix, MsixFunction
from ringwall.rtl.tlp.layouts import AtomicKind, Burst, BurstData, BurstDone, BurstStatus, ConfigState
from ringwall.sim.regs_bus import RegisterBus
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, start, unpack

VECTORS = (3, 129, 2)  # of functions 1, 2 and 5; the second has a word of pending bits for its last alone
FUNCTIONS = (1, 2, 5)
CLIENTS = (3, 6, 15)
PBA = (0x800, 0x1000, 0x40)
BAR = 2
MESSAGE = 16  # cycles that a message takes here at most, while nobody holds it


def component(width):
    return Msix(width=width, functions=[
        MsixFunction(function, MsixCapability(vectors, BAR, 0, BAR, pba), client)
        for function, vectors, client, pba in zip(FUNCTIONS, VECTORS, CLIENTS, PBA)
    ])  # fmt: skip


@pytest.mark.parametrize("width", [64, 512])
def test_msix(request, width):
    only = None if width == 64 else ["each_request_is_one_message", "masked_vectors_wait"]  # the rest does not depend on it
    sim = os.environ.get("SIM") or ("icarus" if only else "verilator")
    run(component(width), module=__name__, node=request.node.nodeid, params={"width": width}, testcase=only, sim=sim)


@pytest.mark.parametrize("functions, width, sentence", [
    ((), 64, r"at least one, each once, not \[\]"),
    ((1, 1), 64, r"each once, not \[1, 1\]"),
    ((1,), 96, "64, 128, 256 or 512 bits, not 96"),
])  # fmt: skip
def test_parameters_are_checked(functions, width, sentence):
    """FUNC-MSIX-1: no function, the same one twice or a wrong width is refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        Msix(functions=[MsixFunction(n, MsixCapability(1, 0, 0, 0, 16), n) for n in functions], width=width)


class Bench:
    """Tables, requests and the requester side; every message is checked for its form when it is taken."""

    def __init__(self, dut, rng):
        self.dut, self.rng, self.width = dut, rng, params()["width"]
        self.bus = RegisterBus(dut, limit=1033)
        self.requests = Stream(dut, "requests")
        self.table = {(f, v): (0, 0, True) for f, count in zip(FUNCTIONS, VECTORS) for v in range(count)}  # address, data, masked
        self.messages = []  # (cycle of the offer, function, address, data)
        self.latency, self.status, self.hold = (lambda: 4), (lambda: BurstStatus.OK), set()
        self.states = {f: {} for f in FUNCTIONS}
        for n, function in enumerate(FUNCTIONS):
            cocotb.start_soon(self.serve(n, function))
        cocotb.start_soon(self.requests.watch([]))

    def state(self, function, **changes):
        """Set fields of a function's configuration state."""
        self.states[function] |= changes
        getattr(self.dut, f"state__{FUNCTIONS.index(function)}").value = pack(ConfigState, **self.states[function])

    async def enable(self, *functions):
        for function in functions:
            self.state(function, msix_enable=1, bus_master=1, msix_mask=0)
        await RisingEdge(self.dut.clk)

    async def entry(self, function, vector, *, address=None, data=None, mask=None):
        """Write parts of a table entry."""
        old = self.table[function, vector]
        new = tuple(a if b is None else b for a, b in zip(old, (address, data, mask)))
        where = {"function": function, "bar": BAR}
        if address is not None:
            await self.bus.write(16 * vector, address, 8, **where)
        if data is not None:
            await self.bus.write(16 * vector + 8, data, 4, **where)
        if mask is False:
            self.table[function, vector] = new  # the message may leave before the answer
        if mask is not None:
            await self.bus.write(16 * vector + 12, int(mask), 4, **where)
        self.table[function, vector] = new

    async def fill(self):
        """Give every vector an address and data that name it, and unmask it."""
        for function, vector in self.table:
            await self.entry(function, vector, address=self.address(function, vector), data=function << 16 | vector, mask=False)

    @staticmethod
    def address(function, vector):
        return 0x12_FEE0_0000 + 0x1000 * function + 4 * vector

    async def request(self, function, vector):
        await self.requests.put(pack(MsixRequest, function=function, vector=vector))

    async def pending(self, function):
        """Return the numbers of the vectors whose pending bit is 1."""
        n = FUNCTIONS.index(function)
        found = []
        for word in range(-(-VECTORS[n] // 64)):
            value = await self.bus.read(PBA[n] + 8 * word, 8, function=function, bar=BAR)
            found += [64 * word + k for k in range(64) if value >> k & 1]
        return found

    async def serve(self, n, function):
        """Take the bursts of a function and end them."""
        bursts, write_data, done = (Stream(self.dut, f"{name}__{n}") for name in ("bursts", "write_data", "write_done"))
        seen, datas = [], []
        cocotb.start_soon(bursts.watch(seen))
        cocotb.start_soon(write_data.watch(datas))
        lanes = self.width // 8
        while True:
            await RisingEdge(self.dut.clk)
            if not bursts.read_valid() or function in self.hold:
                continue
            offered = cycle()
            burst = unpack(Burst, bursts.read_payload())
            await ClockCycles(self.dut.clk, self.rng.randrange(1, 4))
            bursts.set_ready(1)
            await RisingEdge(self.dut.clk)
            bursts.set_ready(0)
            await ClockCycles(self.dut.clk, self.rng.randrange(1, 4))
            data = unpack(BurstData(self.width), await write_data.get())
            assert vars(burst) == {
                "address": burst.address & ~3, "length_bytes": 4, "is_write": 1, "is_wall": 0, "function": function, "pasid_valid": 0,
                "pasid": 0, "relaxed_ordering": 0, "no_snoop": 0, "client": CLIENTS[n], "cookie": 0, "verdict": BurstStatus.OK, "epoch": 0,
                "atomic": AtomicKind.NONE,
            }  # fmt: skip
            lane = burst.address % lanes
            assert (data.keep, data.first, data.last) == (0xF << lane, 1, 1)
            self.messages.append((offered, function, burst.address, data.data >> 8 * lane & 0xFFFFFFFF))
            await ClockCycles(self.dut.clk, self.latency())
            await done.put(pack(BurstDone, status=self.status()))
            assert (len(seen), len(datas)) == (1, 1)
            seen.clear()
            datas.clear()

    def sent(self):
        """Return how often each (function, vector) was sent; every message must be what its table entry says."""
        found = Counter()
        for _, function, address, data in self.messages:
            vector = data & 0xFFFF
            assert (address, data) == (self.address(function, vector), function << 16 | vector)
            found[function, vector] += 1
        return found

    async def settle(self, cycles=2500):
        await ClockCycles(self.dut.clk, cycles)


async def begin(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "requests")
    return Bench(dut, rng), rng


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def tables_read_what_was_written(dut):
    """FUNC-MSIX-2 (R10, R33, V111, V112): reset values, random byte enables on all entries, pending bits read-only, holes read 0."""
    bench, rng = await begin(dut)
    for n, function in enumerate(FUNCTIONS):
        where = {"function": function, "bar": BAR}
        mirror = {8 * k: 1 << 32 if k % 2 else 0 for k in range(2 * VECTORS[n])}
        for offset, wanted in mirror.items():
            assert await bench.bus.raw(offset, 0xFF, **where) == wanted
        for _ in range(200):
            offset, enables, data = rng.choice(list(mirror)), rng.choice([0xF, 0xF0, 0xFF, rng.randrange(256)]), rng.getrandbits(64)
            await bench.bus.raw(offset, enables, data, **where)
            mask = sum(0xFF << 8 * k for k in range(8) if enables >> k & 1) & (0x1_FFFFFFFF if offset % 16 else ~3)
            mirror[offset] = mirror[offset] & ~mask | data & mask
        for offset, wanted in mirror.items():
            assert await bench.bus.raw(offset, 0xFF, **where) == wanted
        for offset in (PBA[n], PBA[n] + 8 * -(-VECTORS[n] // 64), 16 * VECTORS[n] if n else 0x100):
            await bench.bus.raw(offset, 0xFF, rng.getrandbits(64), **where)
            assert await bench.bus.raw(offset, 0xFF, **where) == 0
        assert await bench.bus.raw(0, 0xFF, function=function, bar=0) == 0
    assert await bench.bus.raw(0, 0xFF, function=3, bar=BAR) == 0
    assert not bench.messages


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def each_request_is_one_message(dut):
    """FUNC-MSIX-3 (R19, V112): each vector of each function: one write of one dword, at the entry's address, with its data; 5 cycles."""
    bench, _ = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.settle(700)
    for n, (function, vector) in enumerate(bench.table):
        await bench.request(function, vector)
        asked = cycle()
        await ClockCycles(dut.clk, 20)
        assert len(bench.messages) == n + 1
        assert bench.messages[-1][0] - asked == 5
    assert bench.sent() == Counter(bench.table.keys())


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def masked_vectors_wait(dut):
    """FUNC-MSIX-4 (R63): masked, function masked or no bus master: pending bit, no write; then exactly one message and no bit."""
    bench, _ = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    for function, vector in ((1, 2), (2, 0), (2, 63), (2, 64), (2, 128), (5, 1)):
        for block, release in (
            (lambda f, v: bench.entry(f, v, mask=True), lambda f, v: bench.entry(f, v, mask=False)),
            (lambda f, v: set_state(f, msix_mask=1), lambda f, v: set_state(f, msix_mask=0)),
            (lambda f, v: set_state(f, bus_master=0), lambda f, v: set_state(f, bus_master=1)),
        ):  # fmt: skip

            async def set_state(function, **changes):
                bench.state(function, **changes)
                await ClockCycles(dut.clk, 2)

            bench.messages.clear()
            await block(function, vector)
            for _ in range(3):
                await bench.request(function, vector)
            await bench.settle(800)
            assert not bench.messages
            assert await bench.pending(function) == [vector]
            await release(function, vector)
            await bench.settle(800)
            assert bench.sent() == {(function, vector): 1}
            assert await bench.pending(function) == []


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def address_may_change_while_pending(dut):
    """FUNC-MSIX-5: what leaves after unmasking is the entry as it is then."""
    bench, _ = await begin(dut)
    await bench.enable(1)
    await bench.request(1, 0)
    await bench.entry(1, 0, address=0xDEAD0000, data=1)
    await bench.entry(1, 0, address=bench.address(1, 0) | 3, data=1 << 16)
    await bench.entry(1, 0, mask=False)
    await bench.settle(100)
    assert bench.sent() == {(1, 0): 1}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def disabled_and_absent_vectors_are_dropped(dut):
    """FUNC-MSIX-6: MSI-X disabled, a vector beyond the table, a function without one: no message, no bit, others go on."""
    bench, _ = await begin(dut)
    await bench.fill()
    await bench.enable(1)
    for function, vector in ((2, 0), (5, 0), (1, 3), (1, 2047), (0, 0), (3, 0), (255, 1)):
        await bench.request(function, vector)
    await bench.request(1, 2)
    await bench.settle(100)
    assert bench.sent() == {(1, 2): 1}
    assert [await bench.pending(f) for f in FUNCTIONS] == [[], [], []]
    await bench.enable(*FUNCTIONS)
    await bench.settle(500)
    assert bench.sent() == {(1, 2): 1}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def no_function_waits_for_another(dut):
    """FUNC-MSIX-7: while one function's message is never taken, requests of all are accepted and the others' messages leave."""
    bench, _ = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.settle(700)
    bench.hold = {2}
    for n in range(30):
        await bench.request(2, n)
        await bench.request(1, n % 3)
        asked = cycle()
        await ClockCycles(dut.clk, 30)
        assert bench.messages[-1][1] == 1
        assert bench.messages[-1][0] - asked <= 12
    assert len(bench.messages) == 30
    assert await bench.pending(2) == list(range(1, 30))
    bench.hold = set()
    await bench.settle(2500)
    assert {key: n for key, n in bench.sent().items() if key[0] == 2} == {(2, n): 1 for n in range(30)}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def messages_that_were_not_sent_are_sent_again(dut):
    """FUNC-MSIX-8: an end with RESET (bus master off in flight) leaves the vector pending; a fault or UR of its write is final."""
    bench, _ = await begin(dut)
    await bench.fill()
    await bench.enable(1)
    bench.latency = lambda: 20
    bench.status = lambda: BurstStatus.RESET
    await bench.request(1, 1)
    await ClockCycles(dut.clk, 15)
    bench.state(1, bus_master=0)
    await bench.settle(100)
    assert await bench.pending(1) == [1]
    assert len(bench.messages) == 1
    bench.status = lambda: BurstStatus.OK
    bench.state(1, bus_master=1)
    await bench.settle(100)
    assert bench.sent() == {(1, 1): 2}
    for final in (BurstStatus.FAULT, BurstStatus.UR):
        bench.messages.clear()
        bench.status = lambda final=final: final
        await bench.request(1, 1)
        await bench.settle(200)
        assert bench.sent() == {(1, 1): 1}
        assert await bench.pending(1) == []


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def requests_and_masks_race(dut):
    """FUNC-MSIX-9 (R63): random requests against random masking of vectors and functions: none lost, none invented, none while masked."""
    bench, rng = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.settle(700)
    bench.latency = lambda: rng.choice([1, 1, 5, 60])
    asked, last, masked_since = Counter(), {}, {}
    few = [(1, 0), (1, 1), (2, 0), (2, 64), (2, 128), (5, 0), (5, 1)]
    busy = True

    async def ask():
        while busy:
            await ClockCycles(dut.clk, rng.choice([1, 2, 3, 10, 50]))
            key = rng.choice(few)
            last[key] = cycle()
            asked[key] += 1
            await bench.request(*key)

    async def mask():
        while busy:
            await ClockCycles(dut.clk, rng.randrange(1, 30))
            key = rng.choice(few)
            if bench.table[key][2]:
                masked_since.pop(key, None)
                await bench.entry(*key, mask=False)
            else:
                await bench.entry(*key, mask=True)
                masked_since[key] = cycle()

    async def block():
        while busy:
            await ClockCycles(dut.clk, rng.randrange(1, 100))
            function = rng.choice(FUNCTIONS)
            bench.state(function, **{rng.choice(["msix_mask", "bus_master"]): rng.getrandbits(1)})

    async def judge():
        done = 0
        while True:
            await RisingEdge(dut.clk)
            for offered, function, _, data in bench.messages[done:]:
                since = masked_since.get((function, data & 0xFFFF))
                assert since is None or offered <= since, "a message of a masked vector"
            done = len(bench.messages)

    tasks = [cocotb.start_soon(task()) for task in (ask, mask, block)]
    cocotb.start_soon(judge())
    await ClockCycles(dut.clk, 30000)
    busy = False
    for task in tasks:
        await task
    masked_since.clear()
    for key in few:
        await bench.entry(*key, mask=False)
    await bench.enable(*FUNCTIONS)
    await bench.settle(4000)
    sent = bench.sent()
    latest = {(f, data & 0xFFFF): at for at, f, _, data in bench.messages}
    for key in few:
        assert 0 < sent[key] <= asked[key]
        assert latest[key] >= last[key], f"the latest request of {key} was never followed by a message"
    assert sum(asked.values()) > 1000
    assert [await bench.pending(f) for f in FUNCTIONS] == [[], [], []]


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def pressure_starves_nobody(dut):
    """FUNC-MSIX-10: register accesses and requests without a pause: accesses within their limit, pending vectors still leave."""
    bench, rng = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.entry(2, 128, mask=True)
    await bench.request(2, 128)
    busy = True

    async def ask():
        while busy:
            await bench.request(1, rng.randrange(3))

    async def access():
        while busy:
            await bench.bus.read(0, 8, function=1, bar=BAR)

    task = cocotb.start_soon(ask())
    await bench.entry(2, 128, mask=False)
    other = cocotb.start_soon(access())
    await bench.settle(3000)
    assert (2, 128) in bench.sent()
    assert bench.sent()[1, 0] > 20
    busy = False
    await task
    await other
    assert max(bench.bus.latencies) <= 8 + MESSAGE


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reads_see_the_end_of_messages(dut):
    """FUNC-MSIX-13 (R63): a read behind a mask is answered when the function's message has ended, writes at once; a message that never
    ends holds a read up for 1,023 cycles."""
    bench, _ = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.settle(700)
    for held in (100, 3200):  # three words of pending bits are read
        told = len(bench.messages)
        bench.hold = {2}
        await bench.request(2, 5)
        await ClockCycles(dut.clk, 20)
        await bench.entry(2, 5, mask=True)
        assert bench.bus.latencies[-1] <= 8, "writes wait for nothing"
        read, begun = cocotb.start_soon(bench.pending(2)), cycle()
        await ClockCycles(dut.clk, held)
        assert read.done() == (held > 1023)
        bench.hold = set()
        assert await read == []
        if held < 1023:
            assert len(bench.messages) == told + 1 and cycle() - begun <= held + MESSAGE + 40
        else:
            assert max(bench.bus.latencies) in range(1023, 1023 + 10)
        await bench.settle(100)
        assert len(bench.messages) == told + 1
        await bench.entry(2, 5, mask=False)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def stopped_functions_are_silent(dut):
    """FUNC-MSIX-11 (V011): stop at 80 moments: stopped comes, nothing is pending, nothing leaves later, other functions go on."""
    bench, rng = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.settle(700)
    stop, stopped = (getattr(dut, f"{name}__1") for name in ("stop", "stopped"))
    for wait, few in itertools.product(range(40), (False, True)):
        bench.latency = lambda: rng.randrange(1, 40)
        await bench.entry(2, 3, mask=True)
        await bench.entry(2, 128, mask=True)
        for vector in (128,) if few else (3, 128, rng.randrange(129), rng.randrange(129)):
            await bench.request(2, vector)
        await ClockCycles(dut.clk, wait)
        stop.value = 1
        since = cycle()
        while True:
            await RisingEdge(dut.clk)
            if stopped.value == 1:
                break
            assert cycle() - since < 200, "stopped never came"
            if rng.random() < 0.2:
                await bench.request(2, rng.randrange(129))
                await bench.request(1, 0)
        stop.value = 0
        await ClockCycles(dut.clk, 1)
        bench.messages.clear()
        await bench.entry(2, 3, mask=False)
        await bench.entry(2, 128, mask=False)
        await bench.settle(400)
        assert all(function != 2 for _, function, _, _ in bench.messages)
        assert await bench.pending(2) == []
        await bench.request(1, 1)
        await bench.request(2, 128)
        await ClockCycles(dut.clk, 120)
        assert bench.sent()[2, 128] == 1
        assert bench.sent()[1, 1] == 1


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def table_is_cleared(dut):
    """FUNC-MSIX-12 (R72): a function's table is cleared at random moments under traffic; the others' tables, messages, accesses go on."""
    bench, rng = await begin(dut)
    await bench.fill()
    await bench.enable(*FUNCTIONS)
    await bench.settle(700)
    for n, function in [(n, function) for n, function in enumerate(FUNCTIONS) for _ in range(6)]:
        others = [other for other in FUNCTIONS if other != function]
        due = Counter()
        bench.messages.clear()
        for other in rng.sample(others * 3, rng.randrange(5)):
            await bench.request(other, 1)
            due[other] = 1
        await ClockCycles(dut.clk, rng.randrange(30))
        clear, cleared = getattr(dut, f"clear__{n}"), getattr(dut, f"cleared__{n}")
        clear.value = 1
        since = cycle()
        await ClockCycles(dut.clk, 2)
        while not int(cleared.value):
            assert cycle() - since < 6 * 2 * 192, "cleared never came"
            if rng.random() < 0.3:
                other = rng.choice(others)
                await bench.request(other, 0)
                due[other] = 1
                assert await bench.bus.read(0, 8, function=other, bar=BAR) == bench.address(other, 0)
            await RisingEdge(dut.clk)
        for vector in range(VECTORS[n]):
            assert await bench.bus.read(16 * vector, 8, function=function, bar=BAR) == 0
            assert await bench.bus.read(16 * vector + 8, 8, function=function, bar=BAR) == 1 << 32
        clear.value = 0
        await ClockCycles(dut.clk, 150)
        assert not int(cleared.value)
        assert all(bench.sent()[other, 0] + bench.sent()[other, 1] for other in due)
        await bench.request(function, 1)  # masked now
        await ClockCycles(dut.clk, 100)
        assert await bench.pending(function) == [1]
        assert all(owner != function for _, owner, _, _ in bench.messages)
        for other, vector in bench.table:
            if other == function:
                bench.table[other, vector] = 0, 0, True
                await bench.entry(other, vector, address=bench.address(other, vector), data=other << 16 | vector, mask=False)
            else:
                assert await bench.bus.read(16 * vector, 8, function=other, bar=BAR) == bench.address(other, vector)
        await bench.settle(300)
        assert bench.sent()[function, 1] == 1


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def nothing_comes_when_it_is_quiet(dut):
    """FUNC-MSIX-14 (V019, V023): behind quiet no message comes until one is asked for, whatever is masked, under way, not sent or late; it
    is quiet soon, also with pending bits."""
    bench, rng = await begin(dut)
    await bench.fill()
    n = 0
    function, vectors = FUNCTIONS[n], VECTORS[n]
    await bench.enable(*FUNCTIONS)
    ends = [BurstStatus.OK]
    bench.latency, bench.status = (lambda: rng.choice([1, 4, 60])), (lambda: rng.choice(ends))
    for turn in range(50):
        ends[:] = [BurstStatus.OK, BurstStatus.RESET] if turn % 3 else [BurstStatus.OK]
        bench.state(function, msix_enable=1, bus_master=turn % 7 != 0, msix_mask=turn % 5 == 0)
        masked = rng.randrange(vectors)
        await bench.entry(function, masked, mask=True)
        for _ in range(rng.choice([1, 1, 3])):
            await bench.request(function, rng.choice([masked, rng.randrange(vectors)]))
            await ClockCycles(dut.clk, rng.choice([0, 1, 2, 5, 20]) + 1)
        if turn % 2:
            cocotb.start_soon(bench.request(function, (masked + 1) % vectors))
            await RisingEdge(dut.clk)
        since = cycle()
        while not getattr(dut, f"quiet__{n}").value:
            await RisingEdge(dut.clk)
            assert cycle() - since < 2500
        told = len(bench.messages)
        await ClockCycles(dut.clk, 200)
        assert len(bench.messages) == told, "a message behind quiet"
        await bench.entry(function, masked, mask=False)
