"""Queue, SkidBuffer, TransactionQueue with wide items and deep memories; what they do cycle by cycle is proved in tests/formal."""

import random
from collections import deque

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.stream.queue import Queue
from ringwall.rtl.stream.skid_buffer import SkidBuffer
from ringwall.rtl.stream.transaction import TransactionQueue
from ringwall.rtl.verilog import to_rtlil
from ringwall.sim.run import params, run
from ringwall.sim.stream import random_ready, start

KINDS = {"queue": Queue(70, 100), "short": Queue(70, 2), "three": Queue(70, 3), "skid": SkidBuffer(70)}


@pytest.mark.parametrize("kind", KINDS)
def test_queue(request, kind):
    run(KINDS[kind], module=__name__, node=request.node.nodeid, testcase=["items_arrive_in_order", "items_flow_at_full_rate"],
        params={"kind": kind})


def test_transaction(request):
    run(TransactionQueue(70, 16), module=__name__, node=request.node.nodeid, testcase="what_is_committed_arrives")


def test_parameters_are_checked():
    """STREAM-QUEUE-3: depths that cannot be are refused with a sentence."""
    for bad in (1, 0, "8"):
        with pytest.raises(ValueError, match="integer of at least 2, not"):
            Queue(8, bad)
    for bad in (1, 12, None):
        with pytest.raises(ValueError, match="a power of two and at least 2, not"):
            TransactionQueue(8, bad)


def test_block():
    """STREAM-QUEUE-4: what Yosys reads of a queue asks for block RAM if it was asked for."""
    for in_block in (False, True):
        assert ('attribute \\ram_style "block"' in to_rtlil(Queue(8, 4, in_block=in_block))) == in_block


@cocotb.test(timeout_time=100, timeout_unit="us")
async def items_arrive_in_order(dut):
    """STREAM-QUEUE-1: random items, gaps and back-pressure: all arrive once, in order."""
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    seen = []
    cocotb.start_soon(o.watch(seen))
    ready = cocotb.start_soon(random_ready(o, rng, 0.3))  # fills it
    items = [rng.getrandbits(70) for _ in range(600)]
    await i.put_many(items[:300], lambda: rng.choice([0, 0, 0, 1, 5]))
    ready.cancel()
    cocotb.start_soon(random_ready(o, rng, 0.9))  # keeps it empty
    await i.put_many(items[300:], lambda: rng.choice([0, 0, 1, 2]))
    await ClockCycles(dut.clk, 200)
    assert seen == items


@cocotb.test(timeout_time=20, timeout_unit="us")
async def items_flow_at_full_rate(dut):
    """STREAM-QUEUE-2: one item per cycle (two in three cycles for a queue of 2), each after the latency of the docstring."""
    kind = params()["kind"]
    i, o = await start(dut, "i", "o")
    seen, cycles = [], []
    cocotb.start_soon(o.watch(seen, cycles))
    sent = []
    cocotb.start_soon(i.watch([], sent))
    o.set_ready(1)
    await i.put_many(range(120))
    await ClockCycles(dut.clk, 4)
    assert seen == list(range(120))
    assert cycles[0] - sent[0] == (1 if kind == "skid" else 2)
    assert cycles[-1] - cycles[0] == (178 if kind == "short" else 119)  # 59 pairs of 3 cycles, and the second of the last


@cocotb.test(timeout_time=200, timeout_unit="us")
async def what_is_committed_arrives(dut):
    """STREAM-TRANSACTION-1: random chains that end in commit or rollback, some with the last item, some longer than the queue."""
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    seen, expected = [], []
    cocotb.start_soon(o.watch(seen))
    cocotb.start_soon(random_ready(o, rng, 0.5))

    async def end(name):
        getattr(dut, name).value = 1
        await RisingEdge(dut.clk)
        getattr(dut, name).value = 0

    for _ in range(300):
        chain = deque(rng.getrandbits(70) for _ in range(rng.randrange(18)))
        keep = len(chain) <= 16 and rng.random() < 0.6
        taken = []
        while chain:
            offered = cocotb.start_soon(i.put(chain[0]))
            waits = 0
            while not offered.done() and waits < 100:  # 17 items never fit
                await RisingEdge(dut.clk)
                waits += 1
            if not offered.done():
                break
            taken.append(chain.popleft())
        if chain:
            assert len(taken) == 16
            await end("rollback")  # gives the room back, so that the item on offer is taken behind it
            while not offered.done():
                await RisingEdge(dut.clk)
            await end("rollback")
            continue
        await end("commit" if keep else "rollback")
        expected += taken if keep else []
    await ClockCycles(dut.clk, 60)
    assert seen == expected and len(expected) > 500
