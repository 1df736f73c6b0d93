"""Invalidate Requests from the link to the completion: completer and queue, a fence that takes its time, messages right and wrong."""

import random
from dataclasses import replace

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import Tlp, TlpType
from ringwall.rtl.ats.invalidations import Invalidations
from ringwall.rtl.tlp.completer import Completer, CompleterEvents
from ringwall.rtl.tlp.layouts import ConfigState, TlpBeat
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, random_ready, start, unpack
from ringwall.sim.tlp_beats import from_beats, to_beats

FUNCTIONS, ABSENT = 4, 2  # one of them is not there
DEPTH = 64
BY_ID = 0b010
BUS, DEVICE = 0x5A, 0x13
SEEN = ("unsupported", "poisoned")


class Path(wiring.Component):
    """Completer and invalidations of a card, with nothing else."""

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "requests": In(stream.Signature(TlpBeat(width))), "messages": Out(stream.Signature(TlpBeat(width))),
            "fence": Out(stream.Signature(0)), "fenced": In(stream.Signature(0)), "enable": In(8), "usable": Out(8),
            "events": Out(CompleterEvents),
            "forget": Out(1), "forget_av": Out(1), "forget_page": Out(52),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.completer = completer = Completer(width=self.width, functions=FUNCTIONS, host_ats=True)
        m.submodules.orders = orders = Invalidations(width=self.width, functions=FUNCTIONS, depth=DEPTH)
        wiring.connect(m, completer.invalidations, orders.i)
        for inner, outer in ((completer.requests, self.requests), (orders.messages, self.messages), (orders.fence, self.fence),
                             (orders.fenced, self.fenced)):  # fmt: skip
            wiring.connect(m, inner, wiring.flipped(outer))
        state = ConfigState.const({"bus": BUS, "device": DEVICE})
        m.d.comb += [
            completer.present.eq(~(1 << ABSENT)), self.events.eq(completer.events), orders.enable.eq(self.enable),
            self.usable.eq(orders.usable),
            *(getattr(self, name).eq(getattr(orders, name)) for name in ("forget", "forget_av", "forget_page")),
            *(config.eq(state) for config in (*orders.config, *completer.state)),
        ]  # fmt: skip
        return m


@pytest.mark.parametrize("width", [64, 256])
def test_invalidations(request, width):
    run(Path(width=width), module=__name__, node=request.node.nodeid, params={"width": width})


def identity(function):
    return BUS << 8 | DEVICE << 3 | function


def order(rng, function=None, **fields):
    """Return an Invalidate Request. [PCIe5 10.3.1]"""
    function = rng.choice([n for n in range(FUNCTIONS) if n != ABSENT]) if function is None else function
    body = rng.getrandbits(52) << 12 | rng.randrange(2) << 11 | rng.randrange(2)
    return Tlp(**{"type": TlpType.MSGD, "length_dw": 2, "requester_id": rng.getrandbits(16), "tag": rng.randrange(32), "message_code": 0x01,
                  "message_routing": BY_ID, "address": identity(function) << 48, "data": body.to_bytes(8, "big")} | fields)  # fmt: skip


def completion(tlp):
    """Return the one Invalidate Completion that answers ``tlp``. [PCIe5 10.3.2]"""
    return Tlp(TlpType.MSG, requester_id=tlp.address >> 48, message_code=0x02, message_routing=BY_ID,
               address=tlp.requester_id << 48 | 1 << 32 | 1 << tlp.tag % 32)  # fmt: skip


class Bench:
    """Notes what is forgotten, fenced, sent and reported, in this order of time."""

    def __init__(self, dut, rng):
        self.dut, self.rng, self.width = dut, rng, params()["width"]
        self.seen, self.fences, self.hold = [], 0, False

    async def begin(self):
        self.requests, self.messages, self.fence, self.fenced = await start(self.dut, "requests", "messages", "fence", "fenced")
        cocotb.start_soon(self._watch())
        cocotb.start_soon(self._fence())
        cocotb.start_soon(random_ready(self.messages, self.rng, 0.5))
        return self

    async def _fence(self):
        while True:
            await self.fence.get()
            self.seen.append("fence")
            await ClockCycles(self.dut.clk, 1 + self.rng.choice([0, 0, 5, 30]))
            while self.hold:
                await RisingEdge(self.dut.clk)
            self.seen.append("fenced")
            await self.fenced.put()

    async def _watch(self):
        dut = self.dut
        while True:
            await RisingEdge(dut.clk)
            if dut.forget.value:
                self.seen.append(("forget", int(dut.forget_page.value) if dut.forget_av.value else None))
            if self.messages.read_valid() and self.messages.read_ready():
                self.seen.append(from_beats(self.width, [self.messages.read_payload()]))
            events = unpack(CompleterEvents, int(dut.events.value))
            self.seen += [name for name in SEEN if getattr(events, name)]

    async def send(self, tlp):
        await self.requests.put_many(to_beats(self.width, tlp))

    async def until(self, count):
        for _ in range(20_000):
            if sum(isinstance(item, Tlp) for item in self.seen) >= count:
                return
            await RisingEdge(self.dut.clk)
        raise AssertionError(f"{count} completions did not come: {self.seen[-5:]}")


def forgotten(tlp):
    body = int.from_bytes(tlp.data, "big")
    return ("forget", None if body >> 11 & 1 else body >> 12)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def each_is_forgotten_fenced_completed(dut):
    """ATS-INV-1: each Invalidate Request, one page or a range, any ITag: forget, fence, its end, then one completion to whoever asked, in
    their order; without the fence's end none; reserved bits of the ITag's byte do not count."""
    b = await Bench(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    sent = [order(b.rng) for _ in range(60)]
    sent[7:9] = [replace(one, tag=one.tag | bits) for one, bits in zip(sent[7:9], (0x20, 0xE0))]
    b.hold = True
    await b.send(sent[0])
    await ClockCycles(dut.clk, 100)
    assert b.seen == [forgotten(sent[0]), "fence"]
    b.hold = False
    for tlp in sent[1:]:
        await b.send(tlp)
    await b.until(len(sent))
    assert b.seen == [item for tlp in sent for item in (forgotten(tlp), "fence", "fenced", completion(tlp))]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def others_are_refused(dut):
    """ATS-INV-2: Invalidate Requests of another length, without a body, routed otherwise, for functions that are not there, and completions
    are unsupported, poisoned ones reported as that; nothing is forgotten or answered for them, those between are served."""
    b = await Bench(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    good = order(b.rng)
    short, longer, many = (replace(good, length_dw=n, data=bytes(4 * n)) for n in (1, 3, 32))
    empty, local = replace(good, type=TlpType.MSG, length_dw=0, data=b""), replace(good, message_routing=0)
    absent, beyond = order(b.rng, ABSENT), order(b.rng, 7)
    other = replace(good, message_code=0x02)
    for bad in (short, longer, many, empty, local, absent, beyond, other, replace(good, poisoned=True)):
        b.seen.clear()
        await b.send(bad)
        await b.send(good)
        await b.until(1)
        await ClockCycles(dut.clk, 20)
        assert b.seen == ["poisoned" if bad.poisoned else "unsupported", forgotten(good), "fence", "fenced", completion(good)], bad


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def floods_wait(dut):
    """ATS-INV-3: 150 Invalidate Requests at once while the first fence does not end: 64 and more are taken, the others wait on the link,
    none is lost; the fall of ATS Enable forgets all meanwhile."""
    b = await Bench(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    dut.enable.value = 0b1111
    b.hold = True
    sent, taken = [order(b.rng) for _ in range(150)], []

    async def flood():
        for tlp in sent:
            await b.send(tlp)
            taken.append(cycle())

    task = cocotb.start_soon(flood())
    await ClockCycles(dut.clk, 3000)
    assert DEPTH <= len(taken) <= DEPTH + 3
    dut.enable.value = 0b1011
    await ClockCycles(dut.clk, 20)
    assert b.seen == [forgotten(sent[0]), "fence", ("forget", None)]
    b.hold = False
    await b.until(len(sent))
    await task
    assert [item for item in b.seen if isinstance(item, Tlp)] == [completion(tlp) for tlp in sent]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def enable_waits_for_a_fence(dut):
    """ATS-INV-4: a function whose ATS Enable fell may use it again when a fence has ended that began behind the last fall, also one of an
    Invalidate Request; that forgets all; others may go on."""
    b = await Bench(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    dut.enable.value = 0b1111
    await ClockCycles(dut.clk, 20)
    assert (dut.usable.value, b.seen) == (0b1111, [])
    b.hold = True
    for _ in range(2):  # the second fence is for the second fall
        dut.enable.value = 0b1011
        await ClockCycles(dut.clk, 20)
        dut.enable.value = 0b1111
        await ClockCycles(dut.clk, 60)
        assert dut.usable.value == 0b1011
    assert b.seen == [("forget", None), "fence", ("forget", None)]
    b.hold = False
    await ClockCycles(dut.clk, 100)
    assert dut.usable.value == 0b1111
    assert b.seen[3:] == ["fenced", "fence", "fenced"]
    b.seen.clear()
    b.hold = True
    tlp = order(b.rng)
    await b.send(tlp)
    await ClockCycles(dut.clk, 60)
    dut.enable.value = 0b1110
    await ClockCycles(dut.clk, 2)
    dut.enable.value = 0b1111
    await b.send(tlp)
    b.hold = False
    await b.until(1)
    assert dut.usable.value == 0b1110
    await b.until(2)
    await ClockCycles(dut.clk, 20)
    assert dut.usable.value == 0b1111
    assert b.seen.count("fence") == 2
