"""Router and merger of register buses, with owners that answer late and differ in what they hold."""

import random

import cocotb
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In
from cocotb.triggers import ClockCycles

from ringwall.rtl.regs.bus import RegisterBus as Signature
from ringwall.rtl.regs.bus import RegisterRequest, RegisterResponse
from ringwall.rtl.regs.router import Merger, Range, Router
from ringwall.sim.regs_bus import RegisterBus, RegisterError
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, start, unpack

RANGES = (
    ((0, 0, 0x000, 0x1000),),
    ((1, 0, 0x000, 0x40), (1, 0, 0x1000, 0x8), (2, 2, 0x800, 0x10)),
    ((1, 2, 0x000, 0x1000), (2, 0, 0x8, 0x8)),
)


def routed():
    return Router(targets=[[Range(*numbers) for numbers in ranges] for ranges in RANGES])


def test_router(request):
    run(routed(), module=__name__, node=request.node.nodeid, testcase="accesses_reach_their_owner")


def test_merger(request):
    run(Merger(count=3), module=__name__, node=request.node.nodeid, testcase="initiators_get_their_own_answers")


def test_joined(request):
    run(Joined(), module=__name__, node=request.node.nodeid, testcase="first_initiator_has_priority")


class Joined(wiring.Component):
    """Two initiators in front of a router without wait states: all that is between them and an owner."""

    initiators: In(Signature()).array(2)

    def elaborate(self, platform):
        m = Module()
        m.submodules.merger = merger = Merger(count=2)
        m.submodules.router = router = routed()
        for inner, outer in zip(merger.initiators, self.initiators):
            wiring.connect(m, inner, wiring.flipped(outer))
        wiring.connect(m, merger.bus, router.bus)
        return m


@pytest.mark.parametrize("make, sentence", [
    (lambda: Range(256, 0, 0, 8), "Function of a range must be between 0 and 255, not 256"),
    (lambda: Range(0, 6, 0, 8), "BAR of a range must be between 0 and 5, not 6"),
    (lambda: Range(0, 0, 4, 8), r"multiples of 8, not \(4, 8\)"),
    (lambda: Range(0, 0, 0, 0), r"multiples of 8, not \(0, 0\)"),
    (lambda: Router(targets=[()]), r"at least one range, not \(\)"),
    (lambda: Router(targets=[[Range(0, 0, 0, 16)], [Range(0, 0, 8, 16)]]), r"must not overlap .* not Range\(.*start=8"),
    (lambda: Merger(count=0), "must be at least 1, not 0"),
])  # fmt: skip
def test_parameters_are_checked(make, sentence):
    """REGS-3: ranges that overlap, are empty or misaligned are refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        make()


async def own(dut, name, rng, log):
    """Serve the bus ``name``: data made from the request, sometimes an error, after 0 to 9 cycles."""
    requests, responses = Stream(dut, f"{name}__request"), Stream(dut, f"{name}__response")
    cocotb.start_soon(requests.watch([]))
    while True:
        await ClockCycles(dut.clk, rng.randrange(4)) if rng.random() < 0.5 else None
        request = unpack(RegisterRequest, await requests.get())
        log.append((name, request))
        await ClockCycles(dut.clk, rng.randrange(6)) if rng.random() < 0.5 else None
        await responses.put(pack(RegisterResponse, data=~request.offset & (1 << 64) - 1, error=request.byte_enable == 0x55))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def accesses_reach_their_owner(dut):
    """REGS-4: first, last and outer words of every range, and random ones: each to its owner only, unchanged; outside: 0, no error."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "bus__request")
    bus, log = RegisterBus(dut, hold=lambda: rng.choice([0, 0, 3])), []
    for n in range(len(RANGES)):
        cocotb.start_soon(own(dut, f"targets__{n}", rng, log))
    places = []
    for ranges in RANGES:
        for function, bar, first, length in ranges:
            places += [(function, bar, offset) for offset in (first, first + length - 8, first - 8, first + length) if offset >= 0]
    places += [(rng.randrange(4), rng.choice([0, 0, 2, 4]), rng.randrange(0x2000) & ~7) for _ in range(200)]
    outside = 0
    for function, bar, offset in places:
        owner = [n for n, ranges in enumerate(RANGES) for f, b, first, length in ranges
                 if (f, b) == (function, bar) and first <= offset < first + length]  # fmt: skip
        log.clear()
        enables, data = rng.choice([0x55, 0xFF, rng.randrange(256)]), rng.choice([None, rng.getrandbits(64)])
        try:
            got = await bus.raw(offset, enables, data, function=function, bar=bar)
        except RegisterError:
            got = None
        if not owner:
            outside += 1
            assert (got, log) == (0, [])
            continue
        [(name, request)] = log
        assert name == f"targets__{owner[0]}"
        assert vars(request) == {"function": function, "bar": bar, "offset": offset, "is_write": data is not None, "byte_enable": enables,
                                 "data": data or 0}  # fmt: skip
        assert got == (None if enables == 0x55 else ~offset & (1 << 64) - 1)
    assert outside > 20


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def initiators_get_their_own_answers(dut):
    """REGS-5: three initiators at once: each access goes out once and its answer returns to who asked."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut)
    log, asked = [], []
    cocotb.start_soon(own(dut, "bus", rng, log))

    async def ask(n):
        bus = RegisterBus(dut, f"initiators__{n}", limit=80, hold=lambda: rng.choice([0, 0, 3]))
        for k in range(60):
            offset, data = 8 * (64 * n + k), rng.choice([None, rng.getrandbits(64)])
            asked.append((n, offset, data or 0))
            assert await bus.raw(offset, 0xFF, data, function=n) == ~offset & (1 << 64) - 1
            await ClockCycles(dut.clk, rng.randrange(1, 6)) if rng.random() < 0.5 else None

    for task in [cocotb.start_soon(ask(n)) for n in range(3)]:
        await task
    assert sorted((r.function, r.offset, r.data) for _, r in log) == sorted(asked)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def first_initiator_has_priority(dut):
    """REGS-6: under constant pressure of both, the first is never delayed by more than one access; 4 cycles outside all ranges."""
    await start(dut)
    count, delays = [0, 0], [0]

    async def press(n):
        bus = RegisterBus(dut, f"initiators__{n}", limit=40)
        while count[0] < 50:
            other = count[1]
            assert await bus.raw(0x4000, 0xFF) == 0
            count[n] += 1
            if n == 0:
                delays.append(count[1] - other)
            assert max(bus.latencies) <= 4

    for task in [cocotb.start_soon(press(n)) for n in range(2)]:
        await task
    assert max(delays) <= 1
