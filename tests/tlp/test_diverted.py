"""Dwords that the requester gives away instead of sending them, among writes that it sends."""

import random

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import TlpType
from ringwall.rtl.tlp.layouts import DIVERTED, Burst, BurstDone, BurstStatus, ConfigState
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.sim.burst_bus import data_beats
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, random_ready, start, unpack
from ringwall.sim.tlp_beats import RequesterLink

WIDTH, MESSAGES, CLIENTS = 128, 1, 4  # bits; the client whose dwords are given away; all, with the wall
NAMES = ("gate", "posted", "non_posted", "completions", "retired_reads", "retired_writes", "diverted", "diverted_end")


def test_diverted(request):
    clients = (ReadClient("wall", False, 512), *(ReadClient(f"writer{n}", False, 0) for n in range(1, CLIENTS)))
    run(Requester(width=WIDTH, clients=clients, functions=2, tags=32, completion_timeout_cycles=1024, diverts=True), module=__name__,
        node=request.node.nodeid)  # fmt: skip


class Bench:
    """The requester; ``sent`` has addresses of TLPs, ``done`` (cookie, status) of each client in order, ``overs`` counts pulses."""

    async def begin(self, dut, rng):
        self.dut, self.sent, self.done, self.overs, self.accepted = dut, [], [[] for _ in range(CLIENTS)], 0, 0
        await start(dut)
        self.enable(1)
        self.s = {name: Stream(dut, name) for name in NAMES}
        RequesterLink(WIDTH, self.s["posted"], self.s["non_posted"], self.s["completions"], self.on_write, None).start()
        cocotb.start_soon(random_ready(self.s["posted"], rng, 0.6))
        self.retired = []
        self.s["retired_writes"].set_ready(1)
        cocotb.start_soon(self.s["retired_writes"].watch(self.retired))
        for n in range(CLIENTS):
            stream, raw = Stream(dut, f"write_done__{n}"), []
            cocotb.start_soon(stream.watch(raw))
            cocotb.start_soon(random_ready(stream, rng, 0.7))
            self.done[n] = raw
        self.beats = [[] for _ in range(CLIENTS)]
        for n in range(CLIENTS):
            cocotb.start_soon(self.feed(Stream(dut, f"write_data__{n}"), self.beats[n]))
        cocotb.start_soon(self.count())
        return self

    def on_write(self, tlp):
        assert tlp.type is TlpType.MWR
        self.sent.append(tlp.address)

    def enable(self, bus_master):
        for n in range(2):
            getattr(self.dut, f"config__{n}").value = pack(ConfigState, bus=1, bus_master=bus_master if n else 1)

    async def count(self):
        while True:
            await RisingEdge(self.dut.clk)
            self.overs += int(self.dut.diverted_over.value)

    async def feed(self, stream, beats):
        while True:
            while beats:
                await stream.put(beats.pop(0))
            await RisingEdge(self.dut.clk)

    async def issue(self, client, address, content, cookie, verdict=BurstStatus.OK):
        """Issue a write and give its data."""
        self.beats[client] += data_beats(WIDTH, address, content)
        await self.s["gate"].put(pack(Burst, address=address, length_bytes=len(content), is_write=1, function=1, client=client,
                                      cookie=cookie, verdict=verdict))  # fmt: skip

    def ends(self, client):
        return [(end.cookie, end.status) for end in (unpack(BurstDone, one) for one in self.done[client])]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def dwords_are_given_away_in_order(dut):
    """TLP-REQ-11: a DIVERTED dword in any lane is given away when all writes in front of it are accepted, and not sent; it is retired once,
    and done, with the status told, when that is told, while writes of others go on."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut, rng)
    wanted, addresses, number = [], [], 0
    for given in range(40):
        for _ in range(rng.randrange(4)):
            number += 1
            client = rng.randrange(1, CLIENTS)
            address = number * 4096 + rng.randrange(200)
            await bench.issue(client, address, rng.randbytes(rng.choice([4, 4, 30, 300])), number)
            wanted.append((client, number, BurstStatus.OK))
            addresses.append(address)
        number += 1
        content, status = rng.randbytes(4), rng.choice([BurstStatus.OK, BurstStatus.FAULT])
        await bench.issue(MESSAGES, 4 * rng.randrange(1 << 20), content, number, DIVERTED)
        expected = [end[1:] for end in wanted if end[0] == MESSAGES]
        wanted.append((MESSAGES, number, status))
        behind = number + 1
        other = cocotb.start_soon(bench.issue(MESSAGES + 1, behind * 4096, bytes(4), behind))
        assert (await bench.s["diverted"].get()).to_bytes(4, "little") == content
        await RisingEdge(dut.clk)
        assert {address >> 12 for address in addresses} <= {address >> 12 for address in bench.sent}, "given away in front of a write"
        await other
        wanted.append((MESSAGES + 1, behind, BurstStatus.OK))
        addresses.append(behind * 4096)
        number += 1
        while (behind, BurstStatus.OK) not in bench.ends(MESSAGES + 1):
            await RisingEdge(dut.clk)
        await ClockCycles(dut.clk, 20)
        assert bench.ends(MESSAGES) == expected and bench.overs == given, "done too early"
        await bench.s["diverted_end"].put(status.value)
        await ClockCycles(dut.clk, 20)
        assert bench.ends(MESSAGES) == [*expected, (wanted[-2][1], status)] and bench.overs == given + 1
    await ClockCycles(dut.clk, 50)
    for client in range(1, CLIENTS):
        assert bench.ends(client) == [end[1:] for end in wanted if end[0] == client]
    assert len(bench.retired) == len(wanted)
    assert {address >> 12 for address in bench.sent} == {address >> 12 for address in addresses}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def no_dword_of_a_stopped_function(dut):
    """TLP-REQ-12: a function that is no bus master gives no dword away: it is done with RESET and over; then the next one comes."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut, rng)
    bench.enable(0)
    await bench.issue(MESSAGES, 0x1000, b"\1\2\3\4", 1, DIVERTED)
    await ClockCycles(dut.clk, 40)
    assert bench.ends(MESSAGES) == [(1, BurstStatus.RESET)] and bench.overs == 1 and not int(dut.diverted__valid.value)
    bench.enable(1)
    await bench.issue(MESSAGES, 0x1000, b"\5\6\7\x08", 2, DIVERTED)
    assert (await bench.s["diverted"].get()).to_bytes(4, "little") == b"\5\6\7\x08"
    await bench.s["diverted_end"].put(BurstStatus.OK.value)
    await ClockCycles(dut.clk, 20)
    assert bench.ends(MESSAGES)[1:] == [(2, BurstStatus.OK)] and bench.overs == len(bench.retired) == 2
