"""rtl/virtio/README.md: its example is a device that works, its tables are those of the commands."""

import codecs
import importlib.util
import random
import re
import sys
from pathlib import Path

import cocotb
from cocotb.triggers import ClockCycles

import ringwall.rtl
from ringwall.boards.device_sizes import ROWS
from ringwall.boards.sizes import FAMILIES
from ringwall.models.memory import GuestMemory
from ringwall.rtl.dma.layouts import Segment, WriterDone
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.device import DeviceFunction
from ringwall.rtl.virtio.layouts import Chain
from ringwall.sim.burst_bus import BurstMemory
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, start, unpack

README = Path(ringwall.rtl.__path__[0]) / "virtio" / "README.md"
TABLES = README, README.parent.parent / "viommu" / "README.md"
NAMES = ("chains", "readable", "writable", "finished", "bursts", "read_data", "write_data", "write_done")


def test_tables():
    """VIRTIO-BACK-2: the tables of sizes have the rows that the command prints, and no other."""
    rows = [row for table in TABLES for row in re.findall(r"^\| (.*?) \| (ECP5|xc7) \|", table.read_text(), re.MULTILINE)]
    assert rows == [(row, family) for row in ROWS for family in FAMILIES]


def test_readme(request, tmp_path):
    source = tmp_path / "rot13.py"
    source.write_text(re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1])
    spec = importlib.util.spec_from_file_location("rot13", source)
    module = sys.modules["rot13"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = module.Rot13Device()
    back_end = device.back_end(64)
    assert len(device.ports) == 1 and device.config_bytes == 0
    run(DeviceFunction(width=64, function=1, clients=(3,), back_end=back_end), module=__name__, node=request.node.nodeid)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def the_example_works(dut):
    """VIRTIO-BACK-1: the README's device behind its mover: texts of random sizes in scattered buffers come back turned; empty chains are
    answered; a stop in between leaves it as new."""
    rng, memory = random.Random(cocotb.RANDOM_SEED), GuestMemory()
    await start(dut)
    port = {name: Stream(dut, f"{name}__0") for name in NAMES}
    BurstMemory(memory, width=64, **{name: port[name] for name in NAMES[4:]}).start()

    async def give(text, room):
        segments, place, at = [], 0x1000, 0
        while at < len(text):
            size = rng.randrange(1, 60)
            memory.write(place, text[at : at + size])
            segments.append((place, min(size, len(text) - at)))
            place, at = place + 100, at + size
        await port["chains"].put(pack(Chain, readable_bytes=len(text), writable_bytes=room))
        for name, items in (("readable", segments), ("writable", [(0x8000, room // 2), (0x9001, room - room // 2)])):
            await port[name].put_many(pack(Segment, address=a, length_bytes=n, last=a == items[-1][0]) for a, n in items)

    for n in range(40):
        text, room = rng.randbytes(rng.choice([0, 1, 8, rng.randrange(300)])), rng.choice([0, 300, 300, rng.randrange(300)])
        memory.write(0x8000, bytes(0x2000))
        cocotb.start_soon(give(text, room))
        if n % 10 == 9:
            await ClockCycles(dut.clk, rng.randrange(100))
            dut.stop.value = 1
            await ClockCycles(dut.clk, 300)
            assert dut.stopped.value
            dut.stop.value = 0
            continue
        done = unpack(WriterDone, await port["finished"].get())
        wanted = codecs.encode(text.decode("latin-1"), "rot13").encode("latin-1")[:room]
        assert (done.length_bytes, done.status) == (len(wanted), BurstStatus.OK)
        found = memory.read(0x8000, room // 2) + memory.read(0x9001, room - room // 2)
        assert found == wanted.ljust(room, b"\0")
