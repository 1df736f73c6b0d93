"""Cycles of the requester, beside the limit of its ports: one beat of data per cycle."""

import itertools
import os
import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.tlp import TlpType
from ringwall.rtl.tlp.layouts import Burst, ConfigState
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.sim.burst_bus import data_beats
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, start
from ringwall.sim.tlp_beats import RequesterLink, completions_of, to_beats

LATENCY = 250  # cycles from a read to its completions
CLIENTS = (ReadClient("wall", False, 512), ReadClient("ring", False, 16384, 64), ReadClient("data", True, 32768, 64))
WALL, RING, DATA = range(3)
CONFIG = {"bus": 1, "bus_master": 1, "extended_tag": 1, "mps_code": 1, "mrrs_code": 2}


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_requester(request, width, capsys):
    dut = Requester(width=width, clients=CLIENTS, functions=1)
    done = run(dut, module=__name__, node=request.node.nodeid, params={"width": width}, sim=os.environ.get("SIM") or "verilator")
    with capsys.disabled():
        print("", *(line[6:] for line in done.log.splitlines() if line.startswith("BENCH ")), sep="\n  ")


class Bench:
    """The requester with clients that take everything at once and a host of constant latency."""

    async def begin(self, dut, tags=None):
        self.width, self.bytes = params()["width"], params()["width"] // 8
        await start(dut)
        dut.config__0.value = pack(ConfigState, **CONFIG)
        names = ["wall", "gate", "completions", "posted", "non_posted", "retired_reads", "retired_writes"]
        names += [f"{kind}__{n}" for kind in ("write_data", "read_data", "write_done") for n in range(3)]
        self.s = {name: Stream(dut, name) for name in names}
        self.cycles, self.beats = {name: [] for name in names}, {name: [] for name in names}
        for name, stream in self.s.items():
            if name not in ("posted", "non_posted"):
                cocotb.start_soon(stream.watch(self.beats[name], self.cycles[name]))
            if not name.startswith(("wall", "gate", "completions", "write_data")):
                stream.set_ready(1)
        self.link = RequesterLink(self.width, self.s["posted"], self.s["non_posted"], self.s["completions"], self.on_write,
                                  self.on_read).start()  # fmt: skip
        self.cycles |= {"posted": self.link.posted_cycles, "non_posted": self.link.non_posted_cycles}
        self.reads = []
        await ClockCycles(dut.clk, 400)
        return self

    def on_write(self, tlp):
        assert tlp.type is TlpType.MWR

    def on_read(self, tlp):
        """Answer with completions of at most Max_Payload_Size, the content being of no interest."""
        start, length = tlp.byte_span()
        self.reads.append((cycle(), tlp))
        for part in completions_of(tlp, bytes(length), range((start | 255) + 1, start + length, 256)):
            self.link.send_beats(to_beats(self.width, part), LATENCY)

    def bursts(self, client, is_write, spans):
        return [pack(Burst, address=a, length_bytes=n, is_write=is_write, client=client, cookie=k % 4096, is_wall=client == WALL)
                for k, (a, n) in enumerate(spans)]  # fmt: skip

    async def move(self, client, is_write, spans):
        """Run bursts through the gate; return when all are answered."""
        if is_write:
            beats = list(itertools.chain(*(data_beats(self.width, a, bytes(n)) for a, n in spans)))
            cocotb.start_soon(self.s[f"write_data__{client}"].put_many(beats))
        name = f"write_done__{client}" if is_write else f"read_data__{client}"
        expected = len(spans) if is_write else sum((a % self.bytes + n + self.bytes - 1) // self.bytes for a, n in spans)
        for name_of in self.cycles:
            self.cycles[name_of].clear()
            self.beats[name_of].clear()
        await self.s["gate" if client else "wall"].put_many(self.bursts(client, is_write, spans))
        for _ in range(600):
            if len(self.cycles[name]) == expected:
                return self.cycles[name]
            await ClockCycles(self.s["gate"].clk, 50)
        raise AssertionError(f"{len(self.cycles[name])} of {expected} arrived")


def report(text):
    print("BENCH", text, flush=True)


def steady(cycles):
    """Return cycles per event over the middle of a run."""
    part = cycles[len(cycles) // 4 : len(cycles) * 3 // 4]
    return (part[-1] - part[0]) / (len(part) - 1)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reads_fill_the_port(dut):
    """BENCH-REQ-1: aligned 4 KiB reads, MRRS 512, completions of 256 bytes back to back after 250 cycles: >= 99 % of a beat per cycle."""
    bench = await Bench().begin(dut)
    cycles = await bench.move(DATA, False, [(n << 12, 4096) for n in range(12 * bench.bytes // 8)])
    rate = bench.bytes / steady(cycles)
    report(f"{bench.width:3} bits: 4 KiB reads {rate:.2f} of {bench.bytes} bytes per cycle")
    assert rate >= 0.99 * bench.bytes
    assert bench.link.stalls == 0


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def writes_fill_the_port(dut):
    """BENCH-REQ-2: aligned 4 KiB writes, MPS 256: >= 99 % of a beat per cycle, no gap inside a TLP; unaligned ones within 3 % of it."""
    bench = await Bench().begin(dut)
    whole = None
    for offset in (0, 1, 4, 7):
        count = 24
        await bench.move(DATA, True, [((n << 12) + offset, 4096 - offset) for n in range(count)])
        posted = bench.cycles["posted"]
        done = bench.cycles[f"write_done__{DATA}"]
        rate = (4096 - offset) / ((done[-4] - done[4]) / (count - 8))
        whole = whole or rate
        report(f"{bench.width:3} bits: 4 KiB writes at +{offset} {rate:.2f} of {bench.bytes} bytes per cycle")
        assert rate >= (0.97 if offset else 0.99) * whole and rate >= (0.96 if offset else 0.99) * bench.bytes
        beats_per_tlp = 256 // bench.bytes
        if offset == 0:
            for n in range(0, len(posted), beats_per_tlp):
                assert posted[n + beats_per_tlp - 1] - posted[n] == beats_per_tlp - 1, f"gap inside TLP {n // beats_per_tlp}"


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def small_bursts_flow(dut):
    """BENCH-REQ-3: 64-byte reads (ordered and unordered) and writes: a TLP every 2 cycles, or as fast as the data's beats allow."""
    bench = await Bench().begin(dut)
    limit = max(2, 64 // bench.bytes)
    for name, client, is_write in (("ordered reads", DATA, False), ("unordered reads", RING, False), ("writes", DATA, True)):
        cycles = await bench.move(client, is_write, [(n << 12, 64) for n in range(1200)])
        each = steady(cycles) * (1 if is_write else 64 // bench.bytes)
        report(f"{bench.width:3} bits: 64 B {name} {each:.2f} cycles each, limit {64 // bench.bytes}")
        assert each <= limit * 1.01


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reads_are_issued_quickly(dut):
    """BENCH-REQ-4: small reads of one client while tags and space last: at least one TLP every 2 cycles."""
    bench = await Bench().begin(dut)
    for name, client in (("ordered", DATA), ("unordered", RING)):
        await bench.move(client, False, [(n << 12, 4) for n in range(200)])
        issued = bench.cycles["non_posted"]
        each = (issued[199] - issued[0]) / 199
        report(f"{bench.width:3} bits: {name} 4 B reads issued every {each:.2f} cycles")
        assert each <= 2


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def latencies_are_as_stated(dut):
    """BENCH-REQ-5: a lone 64-byte read and write: cycles from burst to TLP, from last completion beat to data,
    from last beat of write data to TLP to done."""
    bench = await Bench().begin(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    found = set()
    for _ in range(5):
        await ClockCycles(dut.clk, rng.randrange(20, 90))
        for client in (WALL, RING, DATA):
            data = await bench.move(client, False, [(0x1000, 64)])
            accepted = bench.cycles["gate" if client else "wall"][0]
            issue = bench.cycles["non_posted"][0] - accepted
            answer = data[0] - bench.cycles["completions"][-1]
            found.add((("wall", "unordered", "ordered")[client], issue, answer))
        await bench.move(DATA, True, [(0x2000, 64)])
        taken = bench.cycles[f"write_data__{DATA}"][-1]
        found.add(("write", bench.cycles["posted"][0] - taken, bench.cycles[f"write_done__{DATA}"][0] - bench.cycles["posted"][-1]))
    report(f"{bench.width:3} bits: latencies {sorted(found)} at cycle {cycle()}")
    assert found == {("wall", 2, 5), ("unordered", 2, 7), ("ordered", 2, 4), ("write", 5, 2)}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def the_wall_goes_first(dut):
    """BENCH-REQ-6: lone wall reads while the device's reads and writes fill both directions: TLP within 8 cycles of the burst."""
    bench = await Bench().begin(dut)
    for stream, is_write in (("write", True), ("read", False)):
        spans = [(n << 12, 4096) for n in range(12 * bench.bytes // 8)]
        cocotb.start_soon(bench.move(DATA, is_write, spans))
        await ClockCycles(dut.clk, 600)
        worst = 0
        for n in range(7):  # the wall has 8 tags, and answers stand behind those of the device
            bench.reads.clear()
            bench.cycles["wall"].clear()
            await bench.s["wall"].put(bench.bursts(WALL, False, [(0x9000_0000 + 64 * n, 64)])[0])
            await ClockCycles(dut.clk, 300)  # its answer is there
            sent = next(at for at, tlp in bench.reads if tlp.address >> 28 == 9)
            worst = max(worst, sent - bench.cycles["wall"][0])
        report(f"{bench.width:3} bits: wall read during device {stream}s: TLP after at most {worst} cycles")
        assert worst <= 8
        await ClockCycles(dut.clk, 7000)
