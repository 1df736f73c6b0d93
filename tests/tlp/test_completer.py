"""Completer, Receiver, Transmitter: what the host asks is answered once, rightly, and in an order that PCIe allows."""

import random

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, Tlp, TlpType, encode, memory_read, memory_write
from ringwall.rtl.regs.bus import RegisterBus, RegisterRequest, RegisterResponse
from ringwall.rtl.tlp.completer import Completer, CompleterEvents
from ringwall.rtl.tlp.layouts import (
    ConfigRequest,
    ConfigResponse,
    ConfigState,
    DecodeRequest,
    DecodeResponse,
    TlpBeat,
)
from ringwall.rtl.tlp.receiver import Receiver
from ringwall.rtl.tlp.transmitter import Transmitter
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack
from ringwall.sim.tlp_beats import from_beats, to_beats

BASE, SIZE = 0x10_0000_0000, 0x1000
HOST = 0x0008


class Path(wiring.Component):
    """Receiver, completer and transmitter, as the card joins them; ``posted`` and ``non_posted`` stand for the requester."""

    def __init__(self, *, width):
        self.width = width
        beat = stream.Signature(TlpBeat(width))
        super().__init__({
            "i": In(beat), "completions_in": Out(beat), "posted": In(beat), "non_posted": In(beat), "o": Out(beat),
            "config_requests": Out(stream.Signature(ConfigRequest)), "config_responses": In(stream.Signature(ConfigResponse)),
            "decode_requests": Out(stream.Signature(DecodeRequest)), "decode_responses": In(stream.Signature(DecodeResponse)),
            "registers": Out(RegisterBus()), "state": In(ConfigState).array(2), "events": Out(CompleterEvents),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.receiver = receiver = Receiver(width=self.width, depth=16)
        m.submodules.completer = completer = Completer(width=self.width, functions=2)
        m.submodules.transmitter = transmitter = Transmitter(width=self.width)
        wiring.connect(m, receiver.requests, completer.requests)
        wiring.connect(m, completer.completions, transmitter.completions)
        for inner, outer in (
            (receiver.i, self.i), (receiver.completions, self.completions_in), (transmitter.posted, self.posted),
            (transmitter.non_posted, self.non_posted), (transmitter.o, self.o), (completer.registers, self.registers),
            *((getattr(completer, name), getattr(self, name)) for name in (
                "config_requests", "config_responses", "decode_requests", "decode_responses")),
        ):
            wiring.connect(m, inner, wiring.flipped(outer))
        m.d.comb += [
            completer.state[0].eq(self.state[0]), completer.state[1].eq(self.state[1]), self.events.eq(completer.events),
        ]
        return m


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_completer(request, width):
    run(Path(width=width), module=__name__, node=request.node.nodeid, params={"width": width})


class Bench:
    """Owner of one BAR of 4 KiB of RAM in function 1 and of two configuration spaces; errors from offset 0xF00 on."""

    def __init__(self, dut):
        self.dut = dut

    async def begin(self):
        self.rng, self.width = random.Random(cocotb.RANDOM_SEED), params()["width"]
        names = ("i", "completions_in", "posted", "non_posted", "o", "config_requests", "config_responses", "decode_requests",
                 "decode_responses", "registers__request", "registers__response")
        (self.i, self.completions_in, self.posted, self.non_posted, self.o, *self.sides) = await start(self.dut, *names)
        for n in range(2):
            getattr(self.dut, f"state__{n}").value = pack(ConfigState, bus=7, device=3)
        self.ram, self.config, self.accesses = bytearray(SIZE), {0: bytearray(4096), 1: bytearray(4096)}, []
        self.beats, self.passed = [], []
        cocotb.start_soon(self.o.watch(self.beats))
        cocotb.start_soon(self.completions_in.watch(self.passed))
        cocotb.start_soon(self._config())
        cocotb.start_soon(self._decode())
        cocotb.start_soon(self._registers())
        self.counts = dict.fromkeys(("unsupported", "aborted", "poisoned"), 0)
        cocotb.start_soon(self._count())
        self.o.set_ready(1)
        self.completions_in.set_ready(1)

    async def _count(self):
        while True:
            await RisingEdge(self.dut.clk)
            for name, value in vars(unpack(CompleterEvents, int(self.dut.events.value))).items():
                self.counts[name] += value

    async def _config(self):
        ask, answer = self.sides[0], self.sides[1]
        while True:
            request = unpack(ConfigRequest, await ask.get())
            self.accesses.append(request)
            space = self.config.get(request.function)
            word = 0
            if space is not None:
                at = 4 * request.register
                for n in range(4):
                    if request.is_write and request.byte_enable >> n & 1:
                        space[at + n] = request.data >> 8 * n & 0xFF
                word = int.from_bytes(space[at : at + 4], "little")
            await answer.put(pack(ConfigResponse, data=word, unsupported=space is None))

    async def _decode(self):
        ask, answer = self.sides[2], self.sides[3]
        while True:
            address = unpack(DecodeRequest, await ask.get()).address
            hit = BASE <= address < BASE + SIZE
            place = {"function": 1, "bar": 2, "offset": address % SIZE} if hit else {}
            await answer.put(pack(DecodeResponse, hit=hit, **place))

    async def _registers(self):
        ask, answer = self.sides[4], self.sides[5]
        while True:
            request = unpack(RegisterRequest, await ask.get())
            self.accesses.append(request)
            assert (request.function, request.bar) == (1, 2) and request.offset % 8 == 0
            at = request.offset
            for n in range(8):
                if request.is_write and request.byte_enable >> n & 1:
                    self.ram[at + n] = request.data >> 8 * n & 0xFF
            await ClockCycles(self.dut.clk, self.rng.randrange(1, 4))
            await answer.put(pack(RegisterResponse, data=int.from_bytes(self.ram[at : at + 8], "little"), error=at >= 0xF00))

    async def send(self, tlp):
        await self.i.put_many(to_beats(self.width, tlp))

    async def answers(self, count):
        """Return the next ``count`` TLPs that left."""
        found, now = [], []
        for _ in range(3000):
            while self.beats:
                now.append(self.beats.pop(0))
                if unpack(TlpBeat(self.width), now[-1]).last:
                    found.append(from_beats(self.width, now))
                    now = []
            if len(found) >= count:
                return found
            await RisingEdge(self.dut.clk)
        raise AssertionError(f"{len(found)} of {count} answers")

    async def ask(self, tlp):
        await self.send(tlp)
        (answer,) = await self.answers(1)
        assert (answer.requester_id, answer.tag, answer.tc) == (tlp.requester_id, tlp.tag, tlp.tc)
        encode(answer)  # it must be one that exists
        return answer


@cocotb.test(timeout_time=500, timeout_unit="us")
async def registers_are_read_and_written(dut):
    """TLP-CPL-1: writes of any length, reads of 1 to 64 bytes: bytes, byte count, lower address; one word is one access."""
    bench = Bench(dut)
    await bench.begin()
    want = bytearray(SIZE)
    for n in range(120):
        at = bench.rng.randrange(0xE00)
        if n % 2:
            data = bench.rng.randbytes(bench.rng.choice([1, 2, 3, 4, 7, 8, 16, 64, 200]))
            want[at : at + len(data)] = data
            await bench.send(memory_write(BASE + at, data, requester_id=HOST, tag=0))
        else:
            size = bench.rng.choice([1, 2, 3, 4, 8, 8, 12, 57])
            tlp = memory_read(BASE + at, size, requester_id=HOST, tag=n, tc=n % 8)
            answer = await bench.ask(tlp)
            assert (answer.type, answer.status, answer.completer_id) == (TlpType.CPLD, CplStatus.SC, 7 << 8 | 3 << 3 | 1)
            assert (answer.byte_count, answer.lower_address, answer.length_dw) == (size, at & 0x7F, tlp.length_dw)
            assert answer.data[at % 4 : at % 4 + size] == want[at : at + size], f"{at:#x}+{size}"
    await bench.ask(memory_read(BASE, 4, requester_id=HOST, tag=1))
    bench.accesses.clear()
    await bench.send(memory_write(BASE + 0x100, bytes(range(8)), requester_id=HOST, tag=0))
    await bench.ask(memory_read(BASE + 0x100, 8, requester_id=HOST, tag=1))
    assert [(a.is_write, a.offset, a.byte_enable) for a in bench.accesses] == [(1, 0x100, 0xFF), (0, 0x100, 0xFF)]
    want[0x100:0x108] = bytes(range(8))
    assert bench.ram[:0xE00] == want[:0xE00]


@cocotb.test(timeout_time=500, timeout_unit="us")
async def configuration_is_one_update(dut):
    """TLP-CPL-2: one CfgWr is one update with its byte enables (R74); reads give the dword; an absent function is UR."""
    bench = Bench(dut)
    await bench.begin()
    want = {0: bytearray(4096), 1: bytearray(4096)}
    for n in range(60):
        function, register, enables = bench.rng.randrange(3), 4 * bench.rng.randrange(1024), bench.rng.randrange(16)
        data = bench.rng.randbytes(4)
        config = {"requester_id": HOST, "tag": n, "completer_id": 9 << 8 | 5 << 3 | function, "register": register, "length_dw": 1}
        bench.accesses.clear()
        answer = await bench.ask(Tlp(TlpType.CFGWR0, first_be=enables, data=data, **config))
        assert len(bench.accesses) == 1 and bench.accesses[0].byte_enable == enables
        assert (bench.accesses[0].bus, bench.accesses[0].device) == (9, 5)
        assert answer.type is TlpType.CPL and answer.completer_id == config["completer_id"]
        assert answer.status == (CplStatus.UR if function == 2 else CplStatus.SC)
        if function < 2:
            for k in range(4):
                if enables >> k & 1:
                    want[function][register + k] = data[k]
            answer = await bench.ask(Tlp(TlpType.CFGRD0, first_be=15, **config))
            assert (answer.type, answer.data) == (TlpType.CPLD, bytes(want[function][register : register + 4]))


@cocotb.test(timeout_time=500, timeout_unit="us")
async def what_is_not_supported_is_refused(dut):
    """TLP-CPL-3: UR and CA where they belong, posted ones dropped, zero-length reads touch nothing, and the next request works (R37)."""
    bench = Bench(dut)
    await bench.begin()

    def ids(tag):
        return {"requester_id": HOST, "tag": tag}

    refused = [
        (memory_read(BASE + SIZE, 4, **ids(1)), CplStatus.UR, "unsupported"),
        (Tlp(TlpType.CFGRD1, completer_id=0x938, register=0, length_dw=1, first_be=15, **ids(2)), CplStatus.UR, "unsupported"),
        (Tlp(TlpType.IORD, address=0x1000, length_dw=1, first_be=15, **ids(3)), CplStatus.UR, "unsupported"),
        (Tlp(TlpType.IOWR, address=0x1000, length_dw=1, first_be=15, data=bytes(4), **ids(4)), CplStatus.UR, "unsupported"),
        (Tlp(TlpType.FETCHADD, address=BASE, length_dw=1, first_be=15, data=bytes(4), **ids(5)), CplStatus.UR, "unsupported"),
        (Tlp(TlpType.CFGWR0, completer_id=0x938, register=0, length_dw=1, first_be=15, data=bytes(4), poisoned=True, **ids(6)),
         CplStatus.UR, "poisoned"),
        (memory_read(BASE, 68, **ids(7)), CplStatus.CA, "aborted"),
        (memory_read(BASE + 0xF00, 8, **ids(8)), CplStatus.CA, "aborted"),
        (memory_read(BASE + 0xEFC, 8, **ids(9)), CplStatus.CA, "aborted"),
    ]
    for tlp, status, counter in refused:
        before = bench.counts[counter]
        answer = await bench.ask(tlp)
        assert (answer.type, answer.status) == (TlpType.CPL, status), str(tlp)
        assert bench.counts[counter] == before + 1, str(tlp)
        assert (await bench.ask(memory_read(BASE, 4, **ids(10)))).status == CplStatus.SC
    bench.accesses.clear()
    dropped = [
        memory_write(BASE + SIZE, bytes(300), **ids(0)),
        Tlp(TlpType.MWR, address=BASE, length_dw=70, first_be=15, last_be=15, data=bytes(280), poisoned=True, **ids(0)),
        Tlp(TlpType.MSG, message_code=0x19, message_routing=4, **ids(0)),
        Tlp(TlpType.MSGD, message_code=0x50, message_routing=4, length_dw=1, data=bytes(4), **ids(0)),
    ]
    for tlp in dropped:
        await bench.send(tlp)
    answer = await bench.ask(memory_read(BASE + 0x10, 0, **ids(11)))
    assert (answer.type, answer.byte_count, answer.length_dw) == (TlpType.CPLD, 1, 1)
    await bench.send(memory_write(BASE + 0x10, b"", **ids(0)))
    assert (await bench.ask(memory_read(BASE, 4, **ids(12)))).status == CplStatus.SC
    assert [access.is_write for access in bench.accesses] == [0]


@cocotb.test(timeout_time=500, timeout_unit="us")
async def order_is_kept(dut):
    """TLP-TX-1: what is offered behind an accepted posted TLP leaves behind it, whole; completions pass waiting requests."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    cocotb.start_soon(random_ready(bench.o, rng, 0.6))
    order = []

    async def offer(port, tlp):
        await port.put_many(to_beats(bench.width, tlp))
        order.append(tlp)

    for n in range(40):
        write = memory_write(0x1000 * n, rng.randbytes(4 * rng.randrange(1, 40)), requester_id=0x739, tag=0)
        await offer(bench.posted, write)
        await offer(bench.non_posted, memory_read(0x2_0000_0000 + 64 * n, 64, requester_id=0x739, tag=n))
    found = await bench.answers(80)
    assert [encode(tlp) for tlp in found] == [encode(tlp) for tlp in order]
    completion = Tlp(TlpType.CPLD, requester_id=0x739, tag=5, completer_id=HOST, byte_count=64, length_dw=16, data=rng.randbytes(64))
    sending = cocotb.start_soon(bench.send(memory_write(BASE, bytes(256), requester_id=HOST, tag=0)))
    await sending
    await bench.send(completion)
    await ClockCycles(dut.clk, 3)
    assert from_beats(bench.width, bench.passed) == completion
    assert len(bench.accesses) < 32, "the write is still being served"
