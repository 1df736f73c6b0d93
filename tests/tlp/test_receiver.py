"""Receiver: requests and completions part, each in order; completions pass requests that wait."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.tlp import Tlp, TlpType, memory_read, memory_write
from ringwall.rtl import core
from ringwall.rtl.function.description import Bar, FunctionDescription, PcieCapability
from ringwall.rtl.tlp.layouts import TlpBeat
from ringwall.rtl.tlp.receiver import Receiver
from ringwall.rtl.tlp.requester import ReadClient
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack
from ringwall.sim.tlp_beats import to_beats

DEPTH = 32  # beats of the longest request here, and more


@pytest.mark.parametrize("width", [64, 256])
def test_receiver(request, width):
    run(Receiver(width=width, depth=DEPTH), module=__name__, node=request.node.nodeid, params={"width": width})


def request(rng):
    address = rng.randrange(1 << 40) << 12
    return rng.choice([memory_read(address, 64, requester_id=1, tag=3),
                       memory_write(address, rng.randbytes(rng.randrange(1, 200)), requester_id=1)])  # fmt: skip


def completion(rng):
    size = 4 * rng.randrange(40)
    return Tlp(TlpType.CPLD if size else TlpType.CPL, length_dw=size // 4, requester_id=5, tag=rng.getrandbits(8), byte_count=4,
               data=rng.randbytes(size))  # fmt: skip


async def listen(dut, rng):
    """Return the input and what leaves as requests and as completions, which are taken now and then."""
    i, *outputs = await start(dut, "i", "requests", "completions")
    seen = [], []
    for stream, found in zip(outputs, seen):
        cocotb.start_soon(stream.watch(found))
        cocotb.start_soon(random_ready(stream, rng, 0.7))
    return i, seen


@cocotb.test(timeout_time=200, timeout_unit="us")
async def kinds_part_in_order(dut):
    """TLP-RX-1: random requests and completions, gaps, back-pressure: each arrives on its stream, whole and in order."""
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    i, seen = await listen(dut, rng)
    expected = [], []
    for _ in range(200):
        is_completion = rng.random() < 0.5
        beats = to_beats(width, completion(rng) if is_completion else request(rng))
        expected[is_completion].extend(beats)
        await i.put_many(beats, lambda: rng.choice([0, 0, 0, 1]))
    await ClockCycles(dut.clk, 200)
    assert seen == expected


@cocotb.test(timeout_time=100, timeout_unit="us")
async def completions_pass_requests(dut):
    """TLP-RX-2: while nobody takes requests, as many beats of them as fit wait, and completions go on at full rate; nothing is lost."""
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    i, requests, completions = await start(dut, "i", "requests", "completions")
    waiting, passed, cycles = [], [], []
    cocotb.start_soon(requests.watch(waiting))
    cocotb.start_soon(completions.watch(passed, cycles))
    completions.set_ready(1)
    reads = [to_beats(width, memory_read(n << 12, 4, requester_id=1, tag=n))[0] for n in range(DEPTH)]
    await i.put_many(reads)
    beats = [beat for _ in range(30) for beat in to_beats(width, completion(rng))]
    await i.put_many(beats)
    await ClockCycles(dut.clk, 2)
    assert passed == beats and cycles[-1] - cycles[0] == len(beats) - 1 and not waiting
    one_more = cocotb.start_soon(i.put(reads[0]))
    await ClockCycles(dut.clk, 10)
    assert not one_more.done()
    requests.set_ready(1)
    await ClockCycles(dut.clk, DEPTH + 10)
    assert waiting == [*reads, reads[0]]


@pytest.mark.parametrize("width", [64, 512])
def test_a_cards_receiver_holds_what_it_must(monkeypatch, width):
    """TLP-RX-4: a request is held until it is whole: a card has room for the longest that one of its functions may be sent."""
    depths = []

    class Seen(Receiver):
        def __init__(self, *, depth, **others):
            depths.append(depth)
            super().__init__(depth=depth, **others)

    monkeypatch.setattr(core, "Receiver", Seen)
    for code in range(6):
        functions = [FunctionDescription(1, n, 0, bars=(Bar(0, 4096),), capabilities=(PcieCapability(mps_code=its),))
                     for n, its in enumerate((0, code))]  # fmt: skip
        core.Core(width=width, functions=functions, clients=(ReadClient("data", True, 4096),), registers=(), iommu=None, strict=False,
                  tags=64, wall_tags=8, completion_timeout_cycles=10_000).elaborate(None)  # fmt: skip
        assert depths[-1] * width // 8 >= 128 << code


def damaged(width, tlp):
    """Return the beats of ``tlp`` with the mark of damage in the last."""
    *beats, last = to_beats(width, tlp)
    return [*beats, last | pack(TlpBeat(width), damaged=1)]


@cocotb.test(timeout_time=200, timeout_unit="us")
async def damaged_tlps_vanish(dut):
    """TLP-RX-3: of a damaged request nothing arrives; of a damaged completion nothing, or a last beat without a dword; others are whole."""
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    i, seen = await listen(dut, rng)
    expected, spoilt = ([], []), 0
    for _ in range(300):
        is_completion, is_damaged = rng.random() < 0.5, rng.random() < 0.4
        tlp = completion(rng) if is_completion else request(rng)
        beats = damaged(width, tlp) if is_damaged else to_beats(width, tlp)
        if not is_damaged or (is_completion and len(beats) > 1):
            expected[is_completion].extend(beats)
            spoilt += is_damaged
        await i.put_many(beats, lambda: rng.choice([0, 0, 0, 1]))
    await ClockCycles(dut.clk, 200)
    assert spoilt > 20
    assert seen[0] == expected[0]
    for got, wanted in zip((unpack(TlpBeat(width), beat) for beat in seen[1]), (unpack(TlpBeat(width), beat) for beat in expected[1])):
        if wanted.damaged:
            wanted.dword_count = 0
        assert got == wanted
    assert len(seen[1]) == len(expected[1])
