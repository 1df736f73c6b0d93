"""Transmitter: one order of posted requests, non-posted requests and completions."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import Tlp, TlpType, memory_read, memory_write
from ringwall.rtl.tlp.layouts import TlpBeat
from ringwall.rtl.tlp.transmitter import Transmitter
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, random_ready, start, unpack
from ringwall.sim.tlp_beats import from_beats, to_beats

KINDS = ("posted", "non_posted", "completions")


@pytest.mark.parametrize("width", [64, 256])
def test_transmitter(request, width):
    run(Transmitter(width=width), module=__name__, node=request.node.nodeid, params={"width": width})


def tlp_of(rng, kind, number):
    if kind == "posted":
        return memory_write(number << 12, rng.randbytes(rng.choice([1, 8, 64, 128, 200])), requester_id=1, tag=0)
    if kind == "non_posted":
        return memory_read(number << 12, rng.randrange(1, 4096), requester_id=1, tag=number % 1024)
    size = 4 * rng.randrange(20)
    return Tlp(TlpType.CPLD if size else TlpType.CPL, length_dw=size // 4, completer_id=number, requester_id=2, tag=7, byte_count=4,
               data=rng.randbytes(size))  # fmt: skip


def packets(width, beats, cycles):
    """Return (TLP, cycle of its first beat) of all that left."""
    found, now, begins = [], [], []
    for beat, at in zip(beats, cycles):
        if not now:
            begins.append(at)
        now.append(beat)
        if unpack(TlpBeat(width), beat).last:
            found.append(from_beats(width, now))
            now = []
    assert not now
    return list(zip(found, begins))


@cocotb.test(timeout_time=400, timeout_unit="us")
async def posted_requests_are_not_passed(dut):
    """TLP-TX-1: random TLPs of three kinds leave whole, each kind in order; what is offered after a posted one was accepted leaves later.

    Accepted is a posted TLP when its last beat was taken; a TLP is offered from the first cycle of its valid. [PCIe5 2.4.1]
    """
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    *inputs, o = await start(dut, *KINDS, "o")
    beats, cycles = [], []
    cocotb.start_soon(o.watch(beats, cycles))
    cocotb.start_soon(random_ready(o, rng, 0.7))
    log = {kind: [] for kind in KINDS}  # (TLP, offered, accepted)

    async def drive(kind, stream):
        for number in range(120):
            tlp = tlp_of(rng, kind, number)
            if rng.random() < 0.5:
                await ClockCycles(dut.clk, rng.randrange(1, 30))
            offered = cycle()
            await stream.put_many(to_beats(width, tlp))
            log[kind].append((tlp, offered, cycle()))

    for task in [cocotb.start_soon(drive(kind, stream)) for kind, stream in zip(KINDS, inputs)]:
        await task
    await ClockCycles(dut.clk, 60)
    left = packets(width, beats, cycles)
    places = {}
    for kind in KINDS:
        mine = [n for n, (tlp, _) in enumerate(left) if _kind(tlp) == kind]
        assert [left[n][0] for n in mine] == [tlp for tlp, _, _ in log[kind]]
        places[kind] = mine
    checked = 0
    for kind in KINDS[1:]:
        for (tlp, offered, _), place in zip(log[kind], places[kind]):
            before = [at for (_, _, accepted), at in zip(log["posted"], places["posted"]) if accepted <= offered]
            checked += len(before)
            assert all(at < place for at in before), f"{tlp} passed a posted request"
    assert checked > 1000


def _kind(tlp):
    return "completions" if tlp.type.is_completion else "posted" if tlp.type.is_posted else "non_posted"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def nobody_starves(dut):
    """TLP-TX-2: with all three kinds on offer at all times they take turns, and a beat leaves in every cycle."""
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    *inputs, o = await start(dut, *KINDS, "o")
    beats, cycles = [], []
    cocotb.start_soon(o.watch(beats, cycles))
    o.set_ready(1)
    tasks = [cocotb.start_soon(stream.put_many([b for n in range(60) for b in to_beats(width, tlp_of(rng, kind, n))]))
             for kind, stream in zip(KINDS, inputs)]  # fmt: skip
    for task in tasks:
        while not task.done():
            await RisingEdge(dut.clk)
    await ClockCycles(dut.clk, 3)
    assert cycles == list(range(cycles[0], cycles[0] + len(beats)))
    turns = [_kind(tlp) for tlp, _ in packets(width, beats, cycles)]
    assert len(turns) == 180 and turns == turns[:3] * 60 and len(set(turns[:3])) == 3
