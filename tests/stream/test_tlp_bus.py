"""The raw TLP link of the testbench: what is sent arrives, at the link's rate, and a card that breaks a rule is caught."""

import itertools
import random
import time

import cocotb
import pytest
from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, start
from ringwall.sim.tlp_bus import RawLink


def beat(width):
    return data.StructLayout({"data": width, "keep": width // 32, "first": 1, "last": 1})


class Mirror(wiring.Component):
    """Returns every beat it gets; ``hold`` stops it."""

    def __init__(self, *, width):
        super().__init__({"i": In(stream.Signature(beat(width))), "o": Out(stream.Signature(beat(width))), "hold": In(1)})

    def elaborate(self, platform):
        m = Module()
        full, held = Signal(), Signal.like(self.i.payload)
        m.d.comb += [self.i.ready.eq((~full | self.o.ready) & ~self.hold), self.o.valid.eq(full), self.o.payload.eq(held)]
        with m.If(self.i.ready):
            m.d.sync += [full.eq(self.i.valid), held.eq(self.i.payload)]
        with m.Elif(self.o.ready):
            m.d.sync += full.eq(0)
        return m


class Rude(wiring.Component):
    """Takes everything, sends TLPs of two beats for ever and breaks the rule ``how``, 0: none; 15: sends nothing."""

    def __init__(self):
        super().__init__({"how": In(4), "i": In(stream.Signature(beat(128))), "o": Out(stream.Signature(beat(128)))})

    def elaborate(self, platform):
        m = Module()
        second, wait = Signal(), Signal(6)
        m.d.sync += wait.eq(wait + 1)
        with m.If(self.o.ready & self.o.valid):
            m.d.sync += second.eq(~second)
        how = self.how
        m.d.comb += [
            self.i.ready.eq(1),
            self.o.valid.eq((how != 15) & ((how != 1) | wait[0])),
            self.o.payload.data.eq(Mux(how == 2, wait, 1)),
            self.o.payload.first.eq(Mux(how == 3, 1, Mux(how == 4, 0, ~second))),
            self.o.payload.last.eq(Mux(how == 5, 0, second)),
            self.o.payload.keep.eq(Mux(second, 0b0001, 0b1111)),
        ]
        with m.If(how == 6):
            m.d.comb += self.o.payload.keep.eq(Mux(second, 0b1111, 0b0111))
        with m.If(how == 7):
            m.d.comb += self.o.payload.keep.eq(Mux(second, 0b0101, 0b1111))
        with m.If(how == 8):
            m.d.comb += self.o.payload.keep.eq(Mux(second, 0, 0b1111))
        return m


MIRRORED = ["all_lengths_return", "due_is_kept_and_nothing_is_lost_in_idle_time"]


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_tlp_bus(request, width):
    """SIM-LINK-1: TLPs of every length cross both directions unchanged, with and without gaps and back-pressure."""
    run(Mirror(width=width), module=__name__, node=request.node.nodeid, params={"width": width}, testcase=MIRRORED)


def collector(found):
    return lambda when, dwords: found.append((when, dwords))


def tlp(rng, length):
    return [rng.getrandbits(32) for _ in range(length)]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def all_lengths_return(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "i", "o")
    got, sent = [], []
    lanes = params()["width"] // 32
    link = RawLink(dut, on_receive=lambda when, dwords: got.append(dwords), on_sent=lambda when, dwords: sent.append(dwords))
    link.start()
    wanted = []
    for gap, ready in itertools.product([None, lambda first: rng.choice([0, 0, 1, 5])], [None, lambda: rng.random() < 0.5]):
        link.gap, link.ready = gap, ready
        tlps = [tlp(rng, n) for n in [*range(1, 2 * lanes + 3), 260, 1028, 3]]
        for t in tlps:
            link.send(t)
        wanted += tlps
        await link.drained()
        await ClockCycles(dut.clk, 100)
    assert got == wanted
    assert sent == wanted
    assert link.from_card.tlps == link.to_card.tlps == len(wanted)
    assert link.from_card.dwords == sum(map(len, wanted))


def test_pace(request):
    """SIM-LINK-4: each direction by itself is held to the link's rate; a card that speaks first is heard."""
    run(Rude(), module=__name__, node=request.node.nodeid, params={"width": 128},
        testcase=["link_is_never_faster_than_its_rate", "link_wakes_when_the_card_begins"])  # fmt: skip


@cocotb.test(timeout_time=2, timeout_unit="us")
async def link_wakes_when_the_card_begins(dut):
    await start(dut, "i", "o")
    dut.how.value = 15
    got = []
    RawLink(dut, on_receive=collector(got)).start()
    await ClockCycles(dut.clk, 50)
    dut.how.value = 0
    begin = cycle()
    await ClockCycles(dut.clk, 12)
    assert [dwords for _, dwords in got] == [[1, 0, 0, 0, 1]] * 5
    assert got[0][0] == begin + 2


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def link_is_never_faster_than_its_rate(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "i", "o")
    width = params()["width"]
    for rate in (width / 8, width / 8 * 0.9846, width / 8 / 3):
        sent, got, begin = [], [], cycle()
        link = RawLink(dut, bytes_per_cycle=rate, on_receive=collector(got), on_sent=collector(sent))
        link.start()
        for _ in range(60):
            link.send(tlp(rng, rng.choice([3, 4, 20, 68])))
        await link.drained()
        await ClockCycles(dut.clk, 300)
        link.stop()
        dut.rst.value = 1  # the card may be in the middle of a TLP
        await ClockCycles(dut.clk, 2)
        dut.rst.value = 0
        assert len(sent) == 60
        for way in (sent, got):
            spent = [max((4 * len(dwords) + 8) / rate, -(-len(dwords) * 32 // width)) for _, dwords in way]
            slack = 2 + 68 * 32 / width  # of a TLP's end against its begin
            for first in range(0, len(way), 7):
                for last in range(first + 1, len(way)):
                    took = way[last][0] - way[first][0]
                    between = sum((4 * len(dwords) + 8) / rate for _, dwords in way[first + 1 : last])
                    assert took >= between - slack, f"{rate}: faster than the link from TLP {first} to {last}"
            assert way[-1][0] - way[0][0] <= sum(spent) + 0.3 * len(way) + 2 * slack, f"{rate}: slower than the link"
            assert way[0][0] <= begin + 3 + 68 * 32 / width


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def due_is_kept_and_nothing_is_lost_in_idle_time(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "i", "o")
    sent, got = [], []
    link = RawLink(dut, on_receive=collector(got), on_sent=collector(sent))
    link.start()
    begin = cycle()
    dues = [begin + n for n in (40, 10, 400, 401, 1000, 20)]
    for n, due in enumerate(dues):
        link.send([n, 0, 0, 0], due)
    await link.drained()
    await ClockCycles(dut.clk, 200)
    beats = -(-128 // params()["width"])
    order = sorted(range(6), key=lambda n: dues[n])
    assert [dwords[0] for _, dwords in sent] == order
    late = {dwords[0]: when - dues[dwords[0]] - (beats - 1) for when, dwords in sent}
    assert 0 <= late.pop(3) <= beats + 2  # one cycle behind another TLP
    assert set(late.values()) == {0}, late
    assert [dwords for _, dwords in got] == [dwords for _, dwords in sent]
    assert all(a[0] < b[0] <= a[0] + beats + 2 for a, b in zip(sent, got, strict=True))
    for _ in range(50):  # one TLP after each length of silence
        await ClockCycles(dut.clk, rng.randrange(1, 12))
        link.send([7, 7, 7])
        await link.drained()
    await ClockCycles(dut.clk, 20)
    assert link.from_card.tlps == 56


BROKEN = {
    1: "valid was withdrawn",
    2: "stalled beat changed",
    3: "first is 1 on beat 1",
    4: "first is 0 on beat 0",
    5: "last is 0 and keep is 0001 on beat 1",
    6: "last is 0 and keep is 0111 on beat 0",
    7: "keep is 0101 on the last beat",
    8: "keep is 0000 on the last beat",
}


@pytest.mark.parametrize("how", [0, *BROKEN])
def test_broken_card(request, how):
    """SIM-LINK-2: each broken rule of stream and framing fails the test; a card that breaks none passes."""

    def go():
        run(Rude(), module=__name__, node=request.node.nodeid, params={"how": how}, testcase="rude_card_is_watched")

    if how:
        with pytest.raises(AssertionError, match=BROKEN[how]):
            go()
    else:
        go()


@cocotb.test(timeout_time=2, timeout_unit="us")
async def rude_card_is_watched(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "i")
    dut.how.value = params()["how"]
    RawLink(dut, ready=lambda: rng.random() < 0.5).start()
    await ClockCycles(dut.clk, 200)


def test_rate(request):
    """SIM-LINK-3: full traffic in both directions, 256 bits wide, on Verilator arrives; its speed is printed."""
    done = run(Mirror(width=256), module=__name__, node=request.node.nodeid, sim="verilator", testcase="traffic_is_fast")
    print(next(line for line in done.log.splitlines() if "cycles per second" in line))


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def traffic_is_fast(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "i", "o")
    count = []
    link = RawLink(dut, bytes_per_cycle=31.5, on_receive=lambda when, dwords: count.append(len(dwords)))
    link.start()
    tlps = [tlp(rng, 68) for _ in range(50)]
    begin, cycles = time.perf_counter(), cycle()
    for n in range(2000):
        link.send(tlps[n % 50])
    await link.drained()
    seconds = time.perf_counter() - begin
    await ClockCycles(dut.clk, 30)
    assert count == [68] * 2000
    dut._log.info(f"{(cycle() - cycles) / seconds:.0f} cycles per second")
