"""UsedEvents alone: any position of a ring, any number of entries, any wish of the driver."""

import random

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.rtl.tlp.layouts import BurstData
from ringwall.rtl.virtio.layouts import QueueCommand
from ringwall.rtl.virtio.used_events import UsedEvents
from ringwall.rtl.virtio.used_writer import Written
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, start, unpack


def test_used_events(request):
    run(UsedEvents(width=64, functions=1, queue_functions=(0,)), module=__name__, node=request.node.nodeid)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def events_are_crossed(dut):
    """VIRTIO-USED-9: notification if one of the last entries, up to 65536 and more, is the named one, at any wrap."""
    rng = random.Random(cocotb.RANDOM_SEED)
    commands, written, answers, accesses = await start(dut, "commands", "written__0", "answers__0", "accesses")
    access_layout = UsedEvents(width=64, functions=1, queue_functions=(0,)).accesses.payload.shape()
    wants = []
    cocotb.start_soon(Stream(dut, "wants").watch(wants))
    dut.usable.value = dut.enabled.value = 1
    told = {False: 0, True: 0}
    for n in range(400):
        packed = n & 1
        size = rng.choice([1, 2, 3, 7, 256, 1000, 32767, 32768]) if packed else 1 << rng.randrange(16)
        await commands.put(pack(
            QueueCommand, size=size, rules={"packed": packed, "event_index": 1}, driver_iova=rng.getrandbits(62) << 2,
            device_iova=rng.getrandbits(62) << 2))
        turn = 2 * size if packed else 1 << 16  # positions
        end = rng.choice([0, 1, size - 1, size, turn - 1, rng.randrange(turn)]) % turn
        entries = rng.choice([1, 2, max(size - 1, 1), size, turn - 1, turn, turn + 1, 1 << 17, rng.randrange(1, turn + 1)])
        position, left = end % size | (1 - end // size) << 15 if packed else end, entries
        writes = []
        while left:  # told of by several writes
            writes.append(min(left, 1 << 16, rng.randrange(1, 1 << 17)))
            left -= writes[-1]
        await written.put_many(pack(Written, position=position, count=count) for count in writes)
        if not packed:
            index = unpack(access_layout, await accesses.get()).access
            assert index.is_write and index.index == end
        question = unpack(access_layout, await accesses.get()).access
        assert not question.is_write
        named = (end - rng.choice([0, 1, 2, entries, entries + 1, rng.randrange(turn)])) % turn
        content = named if not packed else named % size | (1 - named // size) << 15 | 2 << 16
        wants.clear()
        await answers.put(pack(BurstData(64), data=content << 8 * (question.iova % 8), first=1, last=1, cookie=question.cookie))
        await ClockCycles(dut.clk, 12)
        due = (end - 1 - named) % turn < entries
        assert len(wants) == due, f"packed {packed}, size {size}: {named} of {entries} entries up to {end}"
        told[due] += 1
    assert min(told.values()) > 50
