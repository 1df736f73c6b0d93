"""AtomicOps of the requester, done by the golden host (R17)."""

import random
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.host import CompletionPolicy, Fault, Host
from ringwall.models.memory import GuestMemory
from ringwall.models.tlp import TlpType, decode, encode
from ringwall.rtl.tlp.layouts import AtomicKind, Burst, BurstData, BurstStatus, ConfigState
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, start, unpack
from ringwall.sim.tlp_beats import RequesterLink

WALL, RING, PLAIN, DATA = range(4)
CLIENTS = (ReadClient("wall", False, 128, 4, atomics=True), ReadClient("ring", False, 256, 8, atomics=True),
           ReadClient("plain", False, 128, 4), ReadClient("data", True, 4096, 4))  # fmt: skip
TIMEOUT = 1024
TYPES = {AtomicKind.FETCH_ADD: TlpType.FETCHADD, AtomicKind.SWAP: TlpType.SWAP, AtomicKind.CAS: TlpType.CAS}


@pytest.mark.parametrize("width", [64, 256])
def test_atomics(request, width):
    dut = Requester(width=width, clients=CLIENTS, functions=3, tags=24, wall_tags=4, completion_timeout_cycles=TIMEOUT)
    only = None if width == 64 else "atomics_are_done"
    run(dut, module=__name__, node=request.node.nodeid, params={"width": width}, testcase=only)


class Bench:
    """The requester between clients and the golden host."""

    async def begin(self, dut, rng):
        self.dut, self.rng, self.width = dut, rng, params()["width"]
        await start(dut)
        self.memory = GuestMemory()
        self.host = Host(self.memory, rng=rng, policy=CompletionPolicy(latency=20, jitter=60, reorder=True))
        for n in range(3):
            self.host.assume_enabled(n, atomics=True)
            self.configure(n)
        names = ["wall", "wall_operands", "gate", "completions", "posted", "non_posted", "retired_reads", "retired_writes"]
        names += [f"{kind}__{n}" for kind in ("write_data", "read_data") for n in range(len(CLIENTS))]
        self.s = {name: Stream(dut, name) for name in names}
        for name in ("posted", "non_posted", "retired_reads", "retired_writes", *(f"read_data__{n}" for n in range(len(CLIENTS)))):
            self.s[name].set_ready(1)
        self.tlps, self.answers, self.got, self.cookie = [], {}, {}, 0
        for n in range(len(CLIENTS)):
            cocotb.start_soon(self.s[f"read_data__{n}"].watch(self))
        self.link = RequesterLink(self.width, self.s["posted"], self.s["non_posted"], self.s["completions"], self.on_tlp,
                                  self.on_tlp).start()  # fmt: skip
        await ClockCycles(dut.clk, 80)
        return self

    def configure(self, n, **fields):
        config = {"bus": 1, "bus_master": 1, "extended_tag": 1, "mps_code": 1, "mrrs_code": 2, "atomics": 1} | fields
        getattr(self.dut, f"config__{n}").value = pack(ConfigState, **config)

    def append(self, payload):
        """Take a beat of read data."""
        beat = unpack(BurstData(self.width), payload)
        assert beat.cookie not in self.got and beat.first and beat.last, "one beat, once"
        self.got[beat.cookie] = beat

    def on_tlp(self, tlp):
        assert decode(encode(tlp)) == tlp  # raises for one that a receiver must refuse
        self.tlps.append(tlp)
        for reply in self.host.receive(tlp):
            self.answers[tlp.requester_id, tlp.tag] = reply.tlp
            self.link.send(reply.tlp, reply.delay_cycles)
            cocotb.start_soon(self.arrive(reply))

    async def arrive(self, reply):
        await ClockCycles(self.dut.clk, reply.delay_cycles)
        self.host.sent(reply)

    async def issue(self, client, kind, address, size, operands=(), function=0, **fields):
        """Hand over a burst and its operands; return its cookie."""
        self.cookie += 1
        if kind is not AtomicKind.NONE:
            data = b"".join(operand.to_bytes(size, "little") for operand in operands)
            step = self.width // 8
            chunks = [data[at : at + step] for at in range(0, len(data), step)]
            beats = [pack(BurstData(self.width), data=int.from_bytes(chunk, "little"), keep=(1 << len(chunk)) - 1, first=n == 0,
                          last=n == len(chunks) - 1) for n, chunk in enumerate(chunks)]  # fmt: skip
            if CLIENTS[client].atomics:
                cocotb.start_soon(self.feed(client, beats))
        burst = pack(Burst, address=address, length_bytes=size, client=client, is_wall=client == WALL, cookie=self.cookie,
                     function=function, atomic=kind, **fields)  # fmt: skip
        await self.s["wall" if client == WALL else "gate"].put(burst)
        return self.cookie

    async def feed(self, client, beats):
        key = f"lock{client}"
        if not hasattr(self, key):
            setattr(self, key, cocotb.triggers.Lock())
        async with getattr(self, key):
            await ClockCycles(self.dut.clk, self.rng.choice([0, 0, 3, 9]) or 1)
            await self.s["wall_operands" if client == WALL else f"write_data__{client}"].put_many(beats)

    async def result(self, cookie, cycles=400):
        for _ in range(cycles // 4):
            if cookie in self.got:
                return self.got[cookie]
            await ClockCycles(self.dut.clk, 4)
        raise AssertionError(f"no answer to {cookie}")

    def value(self, beat, address, size):
        """Return what a beat holds at ``address``; exactly those bytes count."""
        lane = address % (self.width // 8)
        assert beat.keep == (1 << size) - 1 << lane
        return beat.data >> 8 * lane & (1 << 8 * size) - 1


def apply(kind, old, operands, size):
    """Return what memory holds after an AtomicOp."""
    if kind is AtomicKind.FETCH_ADD:
        return (old + operands[0]) & (1 << 8 * size) - 1
    if kind is AtomicKind.SWAP:
        return operands[0]
    return operands[1] if old == operands[0] else old


@cocotb.test(timeout_time=200, timeout_unit="us")
async def atomics_are_done(dut):
    """TLP-ATOM-1: FetchAdd, Swap and CAS of 4 and 8 bytes above and below 4 GiB among reads: type, length, operands in order, the old value
    as the answer in its lanes, memory as the golden host makes it; 10-bit tags too (R17)."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut, rng)
    bench.configure(2, ten_bit_tag=1)
    bench.host.assume_enabled(2, atomics=True, ten_bit_tags=True)
    shadow, hits = {}, 0
    for _ in range(60 if bench.width == 64 else 20):
        client, kind, size = rng.choice([WALL, RING]), rng.choice(list(TYPES)), rng.choice([4, 8])
        function = 0 if client == WALL else rng.choice([1, 2])
        address = rng.choice([0x1000, 0x5_0000_0F00]) + 64 * rng.randrange(2) + 8 * rng.randrange(4) + (4 if size == 4 else 0)
        old = shadow.get((address, size), 0)
        first = old if kind is AtomicKind.CAS and rng.random() < 0.6 else rng.choice([1, rng.getrandbits(8 * size), (1 << 8 * size) - 1])
        operands = [first, rng.getrandbits(8 * size)][: 1 + (kind is AtomicKind.CAS)]
        hits += kind is AtomicKind.CAS and first == old
        before, sent = bench.memory.read(address, size), len(bench.tlps)
        read = await bench.issue(PLAIN, AtomicKind.NONE, 0x9000 + 64 * rng.randrange(8), 8, function=function)
        cookie = await bench.issue(client, kind, address, size, operands, function, relaxed_ordering=0)
        answer = await bench.result(cookie)
        assert answer.status == BurstStatus.OK
        assert bench.value(answer, address, size) == int.from_bytes(before, "little") & (1 << 8 * size) - 1
        (tlp,) = (tlp for tlp in bench.tlps[sent:] if tlp.type is not TlpType.MRD)
        assert tlp.type is TYPES[kind] and tlp.address == address and tlp.length_dw == size * len(operands) // 4
        assert tlp.data == b"".join(operand.to_bytes(size, "little") for operand in operands)
        assert (tlp.tag > 255) == (function == 2)
        new = apply(kind, int.from_bytes(before, "little"), operands, size)
        assert bench.memory.read(address, size) == new.to_bytes(size, "little")
        shadow[address, size] = new
        assert (await bench.result(read)).status == BurstStatus.OK
    assert hits > 0 and not bench.host.violations, bench.host.violations[:3]
    assert int(dut.tags_in_flight.value) == 0


@cocotb.test(timeout_time=200, timeout_unit="us")
async def a_counter_of_many(dut):
    """TLP-ATOM-2: many additions to one counter in flight at once: each answer is another value, and the sum is right."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut, rng)
    cookies = [await bench.issue(RING, AtomicKind.FETCH_ADD, 0x2008, 8, [3]) for _ in range(40)]
    found = [bench.value(await bench.result(cookie, 4000), 0x2008, 8) for cookie in cookies]
    assert sorted(found) == [3 * n for n in range(40)]
    assert int.from_bytes(bench.memory.read(0x2008, 8), "little") == 120
    assert not bench.host.violations, bench.host.violations[:3]


@cocotb.test(timeout_time=200, timeout_unit="us")
async def refused_atomics_send_nothing(dut):
    """TLP-ATOM-3: not enabled, not aligned, of another size, of a client that may not, refused by the gate, of a function that is not bus
    master: the status, nothing sent, its operand gone; the next one works with its own."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut, rng)
    bench.configure(1, atomics=0)
    bench.configure(2, bus_master=0)
    cas, add, swap = AtomicKind.CAS, AtomicKind.FETCH_ADD, AtomicKind.SWAP
    refused = BurstStatus.REFUSED
    for status, client, kind, address, size, fields in (
        (refused, RING, cas, 0x1000, 8, {"function": 1}), (refused, RING, add, 0x1004, 8, {}), (refused, RING, add, 0x1002, 4, {}),
        (refused, RING, swap, 0x1000, 2, {}), (refused, RING, swap, 0x1000, 16, {}), (refused, PLAIN, add, 0x1000, 4, {}),
        (refused, RING, swap, 0x11FC, 8, {}), (refused, DATA, swap, 0x1000, 8, {}), (refused, WALL, swap, 0x1001, 8, {}),
        (BurstStatus.FAULT, RING, cas, 0x1000, 8, {"verdict": BurstStatus.FAULT}),
        (BurstStatus.RESET, RING, add, 0x1000, 4, {"function": 2}),
    ):  # fmt: skip
        wrong = 1 << 8 * size - 1
        cookie = await bench.issue(client, kind, address, size, [wrong, wrong][: 1 + (kind is cas)], **fields)
        assert (await bench.result(cookie)).status == status
        assert not bench.tlps, f"sent in spite of {status}: {bench.tlps}"
        cookie = await bench.issue(RING, swap, 0x3000, 4, [cookie])
        assert (await bench.result(cookie)).status == BurstStatus.OK
        assert bench.memory.read(0x3000, 4) == (cookie - 1).to_bytes(4, "little")
        bench.tlps.clear()
    assert not bench.host.violations, bench.host.violations[:3]


@cocotb.test(timeout_time=200, timeout_unit="us")
async def failing_atomics_end(dut):
    """TLP-ATOM-4: UR, CA, poison, wrong Byte Count, a completion without data, half a completion, none at all: the status of each; a
    reserved Lower Address is ignored; the tag works later."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench().begin(dut, rng)
    timeout = BurstStatus.TIMEOUT
    for kind, status in (("UR", BurstStatus.UR), ("CA", BurstStatus.CA), ("POISON", BurstStatus.POISONED), ("DUPLICATE", BurstStatus.OK),
                         ("WRONG_LOWER_ADDRESS", BurstStatus.OK), ("WRONG_BYTE_COUNT", timeout), ("SHORT", timeout),
                         ("WRONG_REQUESTER", timeout), ("MISSING", timeout)):  # fmt: skip
        bench.host.policy.faults.append(Fault(kind, lambda tlp: tlp.type is TlpType.CAS))
        cookie = await bench.issue(RING, AtomicKind.CAS, 0x4008, 8, [0, 1])
        assert (await bench.result(cookie, 3 * TIMEOUT)).status == status, kind
        cookie = await bench.issue(RING, AtomicKind.CAS, 0x4010, 8, [0, cookie])
        assert (await bench.result(cookie)).status == BurstStatus.OK, kind
        tlp = bench.tlps[-1]
        answer = bench.answers[tlp.requester_id, tlp.tag]
        bench.link.send(replace(answer, byte_count=4, length_dw=1, data=answer.data[:4]))  # nobody waits for it
        await ClockCycles(dut.clk, 40)
    # Half of what was asked for does not count.
    bench.host.policy.faults.append(Fault("MISSING", lambda tlp: tlp.type is TlpType.SWAP))
    cookie = await bench.issue(RING, AtomicKind.SWAP, 0x4018, 8, [5])
    await ClockCycles(dut.clk, 60)
    tlp = bench.tlps[-1]
    for length, count in ((1, 8), (2, 4), (3, 8)):
        bench.link.send(replace(answer, tag=tlp.tag, byte_count=count, length_dw=length, data=bytes(4 * length)))
    assert (await bench.result(cookie, 3 * TIMEOUT)).status == timeout
