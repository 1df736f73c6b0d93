"""Completer: each request answered as the model says; decoder, registers and configuration behind it are Python."""

import random
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, Tlp, TlpType, memory_read, memory_write
from ringwall.rtl.regs.bus import RegisterRequest, RegisterResponse
from ringwall.rtl.tlp.completer import Completer, CompleterEvents
from ringwall.rtl.tlp.layouts import ConfigRequest, ConfigResponse, ConfigState, DecodeRequest, DecodeResponse, TlpBeat
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, random_ready, reader, start, unpack
from ringwall.sim.tlp_beats import from_beats, to_beats

FUNCTIONS = 3
IDENTITIES = [0x0A08, 0x0B11, 0x0A0A]  # bus and device of each function, as its state has them
LONGEST_READ = 128
BARS = [(0, 0, 0x1_2000_0000, 0x4000), (1, 0, 0x8000_0000, 0x1000), (2, 4, 0x1_2000_8000, 0x2000)]  # function, BAR, address, size
NOWHERE = 0x3_0000_0000
BAD = 0xE00  # registers in the 8 bytes from this offset report an error
EVENTS = ("unsupported", "aborted", "poisoned", "malformed")
ACCEPTED = {0x00, 0x14, 0x19, 0x40, 0x41, 0x43, 0x44, 0x45, 0x47, 0x48, 0x50, 0x7F}  # messages [PCIe5 2.2.8]


@pytest.mark.parametrize("width", [64, 256, 512])
def test_completer(request, width):
    run(Completer(width=width, functions=FUNCTIONS), module=__name__, node=request.node.nodeid, params={"width": width})


class Card:
    """What stands behind the completer, and what the completer must do with a request: :meth:`serve`."""

    def __init__(self, rng):
        self.memory = {(function, bar): bytearray(rng.randbytes(size)) for function, bar, _, size in BARS}
        self.config = {(function, register): rng.getrandbits(32) for function in range(FUNCTIONS) for register in range(1024)}

    def place(self, address):
        for function, bar, base, size in BARS:
            if base <= address < base + size:
                return function, bar, address - base
        return None

    @staticmethod
    def refuser(address):
        """Return the function that refuses an address which nobody serves: the decoder says which."""
        return address >> 12 & 1

    @staticmethod
    def claims(address):
        """Return whether a function says that such an address is its own, as one in reset does."""
        return bool(address >> 4 & 1)

    @staticmethod
    def is_absent(identity):
        """Return whether the configuration space refuses this ID: beyond the functions, or 1, which is virtual, on odd buses."""
        return identity & 7 >= FUNCTIONS or bool(identity & 7 == 1 and identity >> 8 & 1)

    def serve(self, tlp, arrived=None):
        """Return (accesses, completion or None, events) of ``tlp``; ``arrived``: dwords of a payload that was cut short."""
        kind, is_poisoned = tlp.type, tlp.type.has_data and tlp.poisoned
        if kind in (TlpType.CFGRD0, TlpType.CFGWR0):
            return self.serve_config(tlp)
        if kind in (TlpType.MSG, TlpType.MSGD):
            if tlp.message_code not in ACCEPTED:
                return [], None, [("unsupported", None)]
            return [], None, [("poisoned", None)] if is_poisoned else []
        if kind in (TlpType.IORD, TlpType.IOWR, TlpType.CFGRD1, TlpType.CFGWR1):
            return [], self.refusal(tlp), [("unsupported", None)]
        place = self.place(tlp.address)
        if kind not in (TlpType.MRD, TlpType.MWR) or place is None:
            refuser = self.refuser(tlp.address) if place is None else place[0]
            claimer = place[0] if place else refuser if self.claims(tlp.address) else None
            return [], None if kind is TlpType.MWR else self.refusal(tlp, function=refuser), [("unsupported", claimer)]
        function, bar, offset = place
        if is_poisoned:
            return [], None, [("poisoned", function)]
        length = tlp.byte_span()[1]
        if kind is TlpType.MRD and tlp.length_dw * 4 > LONGEST_READ:
            return [], self.refusal(tlp, CplStatus.CA, function), [("aborted", function)]
        if not length:
            return [], self.answer(tlp, function, bytes(4), 1) if kind is TlpType.MRD else None, []
        enabled = {n for n in range(4 * tlp.length_dw)
                   if (tlp.first_be if n < 4 else tlp.last_be if n >= 4 * tlp.length_dw - 4 else 15) >> n % 4 & 1}
        accesses = []
        for word in range(offset & ~7, offset + 4 * tlp.length_dw, 8):
            lanes = {k: word + k - offset for k in range(8) if word + k - offset in enabled}
            if kind is TlpType.MWR and arrived is not None and 4 * arrived < min(word + 8 - offset, 4 * tlp.length_dw):
                break
            mask = sum(1 << k for k in lanes)
            content = sum(tlp.data[n] << 8 * k for k, n in lanes.items()) if kind is TlpType.MWR else None
            accesses.append((function, bar, word, mask, content))
            if word & 0xFFF == BAD:
                return accesses, None if kind is TlpType.MWR else self.refusal(tlp, CplStatus.CA, function), [("aborted", function)]
            if kind is TlpType.MWR:
                for k, n in lanes.items():
                    self.memory[function, bar][word + k] = tlp.data[n]
        if kind is TlpType.MWR:
            return accesses, None, []
        return accesses, self.answer(tlp, function, bytes(self.memory[function, bar][offset : offset + 4 * tlp.length_dw]), length), []

    def serve_config(self, tlp):
        function, is_write = tlp.completer_id & 7, tlp.type is TlpType.CFGWR0
        is_absent = self.is_absent(tlp.completer_id)
        if is_write and tlp.poisoned:
            if function >= FUNCTIONS:
                return [], self.refusal(tlp), [("unsupported", None)]
            return [], self.refusal(tlp, function=function), [("poisoned", function)]
        accesses = [("config", tlp.completer_id, tlp.register // 4, tlp.first_be, int.from_bytes(tlp.data, "little") if is_write else None)]
        if is_absent:
            return accesses, self.refusal(tlp, function=function if function < FUNCTIONS else 0), [("unsupported", None)]
        place = function, tlp.register // 4
        if is_write:
            mask = sum(0xFF << 8 * n for n in range(4) if tlp.first_be >> n & 1)
            self.config[place] = self.config[place] & ~mask | int.from_bytes(tlp.data, "little") & mask
        answer = Tlp(TlpType.CPL, requester_id=tlp.requester_id, tag=tlp.tag, completer_id=IDENTITIES[function], byte_count=4, tc=tlp.tc)
        if not is_write:
            answer = replace(answer, type=TlpType.CPLD, length_dw=1, data=self.config[place].to_bytes(4, "little"))
        return accesses, answer, []

    def refusal(self, tlp, status=CplStatus.UR, function=0):
        start, length = tlp.byte_span()
        is_read = tlp.type in (TlpType.MRD, TlpType.MRDLK)
        return Tlp(
            TlpType.CPLLK if tlp.type is TlpType.MRDLK else TlpType.CPL, requester_id=tlp.requester_id, tag=tlp.tag, tc=tlp.tc,
            relaxed_ordering=tlp.relaxed_ordering, no_snoop=tlp.no_snoop, status=status,
            completer_id=IDENTITIES[function],
            byte_count=max(length, 1) if is_read else 4, lower_address=start & 0x7F if is_read else 0)  # fmt: skip

    def answer(self, tlp, function, data, length):
        return Tlp(TlpType.CPLD, requester_id=tlp.requester_id, tag=tlp.tag, tc=tlp.tc, relaxed_ordering=tlp.relaxed_ordering,
                   no_snoop=tlp.no_snoop, completer_id=IDENTITIES[function], byte_count=length,
                   lower_address=tlp.byte_span()[0] & 0x7F, length_dw=tlp.length_dw, data=data)  # fmt: skip


class Bench:
    """The completer between a driver of requests and a :class:`Card` that answers for decoder, registers and configuration."""

    def __init__(self, dut, rng, streams, busy):
        self.dut, self.rng, self.width, self.busy = dut, rng, params()["width"], busy
        self.requests, self.completions, self.config, self.configured, self.decode, self.decoded, self.access, self.accessed = streams
        self.card, self.model = Card(random.Random(1)), Card(random.Random(1))
        self.accesses, self.beats, self.cycles = [], [], []
        self.events = []  # (name, function or None for all, header)
        cocotb.start_soon(self.completions.watch(self.beats, self.cycles))
        for stream in (self.config, self.decode, self.access):
            cocotb.start_soon(stream.watch([]))
        cocotb.start_soon(self._respond(self.config, self.configured, self._configure))
        cocotb.start_soon(self._respond(self.decode, self.decoded, self._decode))
        cocotb.start_soon(self._respond(self.access, self.accessed, self._access))
        cocotb.start_soon(self._count())
        if busy:
            cocotb.start_soon(random_ready(self.completions, rng, 0.6))
        else:
            self.completions.set_ready(1)

    async def _respond(self, asks, answers, serve):
        while True:
            if self.busy and self.rng.random() < 0.3:
                await ClockCycles(self.dut.clk, self.rng.randrange(1, 8))
            question = await asks.get()
            if self.busy and self.rng.random() < 0.5:
                await ClockCycles(self.dut.clk, self.rng.randrange(1, 8))
            await answers.put(serve(question))

    def _configure(self, question):
        q = unpack(ConfigRequest, question)
        identity = q.bus << 8 | q.device << 3 | q.function & 7
        self.accesses.append(("config", identity, q.register, q.byte_enable, q.data if q.is_write else None))
        if self.card.is_absent(identity):
            return pack(ConfigResponse, unsupported=1)
        if q.is_write:
            for n in range(4):
                if q.byte_enable >> n & 1:
                    mask = 0xFF << 8 * n
                    self.card.config[q.function, q.register] = self.card.config[q.function, q.register] & ~mask | q.data & mask
        return pack(ConfigResponse, data=self.card.config[q.function, q.register])

    def _decode(self, question):
        address = unpack(DecodeRequest, question).address
        place = self.card.place(address)
        if place is None:
            return pack(DecodeResponse, hit=0, claimed=self.card.claims(address), function=self.card.refuser(address), bar=3, offset=64)
        return pack(DecodeResponse, hit=1, claimed=1, function=place[0], bar=place[1], offset=place[2])

    def _access(self, question):
        q = unpack(RegisterRequest, question)
        mask = sum(0xFF << 8 * n for n in range(8) if q.byte_enable >> n & 1)
        self.accesses.append((q.function, q.bar, q.offset, q.byte_enable, q.data & mask if q.is_write else None))
        if q.offset & 0xFFF == BAD:
            return pack(RegisterResponse, error=1, data=self.rng.getrandbits(64))
        memory = self.card.memory[q.function, q.bar]
        if q.is_write:
            for n in range(8):
                if q.byte_enable >> n & 1:
                    memory[q.offset + n] = q.data >> 8 * n & 0xFF
        return pack(RegisterResponse, data=int.from_bytes(memory[q.offset : q.offset + 8], "little"))

    async def _count(self):
        edge = RisingEdge(self.dut.clk)
        read = reader(self.dut.events)
        while True:
            await edge
            value = read()
            if value & 15:
                event = unpack(CompleterEvents, value)
                [name] = [name for name in EVENTS if getattr(event, name)]
                self.events.append((name, None if event.is_for_all else event.function, event.header))

    async def send(self, tlp, arrived=None):
        """Send ``tlp`` (only ``arrived`` dwords of its payload)."""
        short = tlp if arrived is None else replace(tlp, data=tlp.data[: 4 * arrived])
        gaps = (lambda: self.rng.choice([0, 0, 0, 2])) if self.busy else None
        await self.requests.put_many(to_beats(self.width, short), gaps)

    async def judge(self, sent):
        """Wait until all is quiet, then compare with what the model does with ``sent``: TLPs, or (TLP, dwords that arrived)."""
        quiet, last = 0, None
        while quiet < 60:
            await RisingEdge(self.dut.clk)
            now = len(self.accesses), len(self.beats)
            quiet, last = (quiet + 1, last) if now == last else (0, now)
        accesses, completions, events = [], [], []
        for item in sent:
            done, completion, seen = self.model.serve(*item) if isinstance(item, tuple) else self.model.serve(item)
            accesses += done
            completions += [completion] if completion else []
            tlp = item[0] if isinstance(item, tuple) else item
            events += [(*event, unpack(TlpBeat(self.width), to_beats(self.width, tlp)[0]).header) for event in seen]
        got = completions_of_beats(self.width, self.beats)
        for n, (one, other) in enumerate(zip(got, completions)):
            assert one == other, f"completion {n}: {one}, expected {other}\n{one!r}\n{other!r}"
        assert len(got) == len(completions)
        for n, (one, other) in enumerate(zip(self.accesses, accesses)):
            assert one == other, f"access {n}: {one}, expected {other}"
        assert len(self.accesses) == len(accesses)
        assert self.events == events
        assert self.card.memory == self.model.memory and self.card.config == self.model.config
        self.accesses.clear()
        self.beats.clear()
        self.events.clear()


def completions_of_beats(width, beats):
    found, now = [], []
    for beat in beats:
        now.append(beat)
        if unpack(TlpBeat(width), beat).last:
            found.append(from_beats(width, now))
            now = []
    assert not now
    return found


async def bench(dut, busy=True):
    rng = random.Random(cocotb.RANDOM_SEED)
    names = ("requests", "completions", "config_requests", "config_responses", "decode_requests", "decode_responses",
             "registers__request", "registers__response")  # fmt: skip
    streams = await start(dut, *names)
    for n, identity in enumerate(IDENTITIES):
        getattr(dut, f"state__{n}").value = pack(ConfigState, bus=identity >> 8, device=identity >> 3 & 31)
    return rng, Bench(dut, rng, streams, busy)


def common(rng):
    return {"requester_id": rng.getrandbits(16), "tag": rng.getrandbits(10), "tc": rng.randrange(8),
            "relaxed_ordering": rng.random() < 0.5, "no_snoop": rng.random() < 0.5}  # fmt: skip


def configuration(rng, **fields):
    is_write = rng.random() < 0.5
    made = {"type": TlpType.CFGWR0 if is_write else TlpType.CFGRD0, "requester_id": rng.getrandbits(16), "tag": rng.getrandbits(10),
            "completer_id": rng.getrandbits(13) << 3 | rng.choice([0, 1, 2, 0, 1, 2, 3, 7]), "register": 4 * rng.randrange(1024),
            "length_dw": 1, "first_be": rng.randrange(16), "data": rng.randbytes(4) if is_write else b""}  # fmt: skip
    return Tlp(**made | fields)


def somewhere(rng, length):
    """Return an address in a BAR with ``length`` bytes behind it that are in the same 4 KiB, mostly without bad registers."""
    _, _, base, size = rng.choice(BARS)
    page = base + 4096 * rng.randrange(size // 4096)
    return page + rng.randrange(0, (4096 if rng.random() < 0.1 else BAD) - length + 1)


def memory_request(rng, longest):
    length = rng.choice([0, 1, 2, 4, 4, 8, 8, 8, 12, 16, 60, 64, 65, rng.randrange(longest + 1)])
    address = NOWHERE + rng.randrange(2048) if rng.random() < 0.1 else somewhere(rng, length)
    if rng.random() < 0.5:
        tlp = memory_read(address, length, **common(rng))
    else:
        tlp = memory_write(address, rng.randbytes(length), **common(rng))
    if tlp.length_dw == 1:
        tlp = replace(tlp, first_be=rng.randrange(16))
    elif tlp.length_dw == 2 and tlp.address % 8 == 0:
        tlp = replace(tlp, first_be=rng.randrange(1, 16), last_be=rng.randrange(1, 16))
    return tlp


def foreign(rng):
    """Requests that no endpoint of ours serves."""
    kind = rng.choice([TlpType.IORD, TlpType.IOWR, TlpType.CFGRD1, TlpType.CFGWR1, TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS,
                       TlpType.MRDLK, TlpType.MSG, TlpType.MSGD])  # fmt: skip
    fields = common(rng) | {"type": kind, "length_dw": 1, "first_be": rng.randrange(1, 16)}
    if kind is TlpType.CAS:
        fields |= {"length_dw": 2, "last_be": 15}
    if kind in (TlpType.MSG, TlpType.MSGD):
        fields |= {"message_code": rng.choice([*ACCEPTED, 0x7E, 0x01, 0x15, 0x51, rng.randrange(256)]), "message_routing": rng.randrange(8),
                   "address": rng.getrandbits(64), "poisoned": rng.random() < 0.3}  # fmt: skip
    if kind in (TlpType.CFGRD1, TlpType.CFGWR1):
        fields |= {"completer_id": rng.getrandbits(16), "register": 4 * rng.randrange(1024), "relaxed_ordering": False, "no_snoop": False}
    elif kind in (TlpType.IORD, TlpType.IOWR):
        fields |= {"address": BARS[1][2] + 4 * rng.randrange(64)}
    elif kind not in (TlpType.MSG, TlpType.MSGD):
        fields |= {"address": BARS[0][2] + 8 * rng.randrange(64)}
    elif kind is TlpType.MSG:
        fields |= {"length_dw": 0, "first_be": 0}
    else:
        fields |= {"length_dw": 16, "first_be": 0}
    return Tlp(**fields, data=rng.randbytes(4 * fields["length_dw"]) if kind.has_data else b"")


@cocotb.test(timeout_time=400, timeout_unit="us")
async def configuration_is_one_access(dut):
    """TLP-CPL-1 (R74): configuration requests of all byte enables, to functions that exist and not: one access, one completion each."""
    rng, b = await bench(dut)
    sent = [configuration(rng, first_be=enables) for enables in range(16) for _ in range(8)]
    for tlp in sent:
        await b.send(tlp)
    await b.judge(sent)


@cocotb.test(timeout_time=1000, timeout_unit="us")
async def byte_enables_are_kept(dut):
    """TLP-CPL-2: 1 and 2 dwords with all byte enables: bytes, byte count, lower address; an aligned word is one access."""
    rng, b = await bench(dut, busy=False)
    sent, base = [], BARS[0][2] + 0x40
    for first in range(16):
        for address in (base, base + 4):
            sent.append(Tlp(TlpType.MRD, length_dw=1, first_be=first, address=address, **common(rng)))
            sent.append(Tlp(TlpType.MWR, length_dw=1, first_be=first, address=address, data=rng.randbytes(4), **common(rng)))
        for last in range(1, 16) if first else ():
            sent.append(Tlp(TlpType.MRD, length_dw=2, first_be=first, last_be=last, address=base, **common(rng)))
            sent.append(Tlp(TlpType.MWR, length_dw=2, first_be=first, last_be=last, address=base, data=rng.randbytes(8), **common(rng)))
    for tlp in sent:
        await b.send(tlp)
    await b.judge(sent)


@cocotb.test(timeout_time=2000, timeout_unit="us")
async def every_request_is_served(dut):
    """TLP-CPL-3: random reads and writes of any length and offset, configuration, foreign requests, poison, under back-pressure."""
    rng, b = await bench(dut)
    sent = []
    for _ in range(250):
        tlp = rng.choice([configuration, foreign, lambda r: memory_request(r, 256), lambda r: memory_request(r, 256)])(rng)
        if rng.random() < 0.05:
            tlp = replace(tlp, poisoned=True)
        sent.append(tlp)
        await b.send(tlp)
    await b.judge(sent)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def what_cannot_be_served_is_refused(dut):
    """TLP-CPL-4: BAR misses, unsupported types, poison, register errors: the right completion and event, and the next request is served."""
    rng, b = await bench(dut)
    spoilt = [foreign(rng) for _ in range(60)]
    spoilt += [replace(memory_write(somewhere(rng, 64), rng.randbytes(n), **common(rng)), poisoned=True) for n in (1, 8, 64)]
    spoilt += [configuration(rng, type=TlpType.CFGWR0, poisoned=True, data=bytes(4)), memory_read(NOWHERE, 5, **common(rng)),
               memory_write(NOWHERE, bytes(100), **common(rng)), memory_read(NOWHERE + 3, 0, **common(rng))]  # fmt: skip
    for _, _, base, _ in BARS:
        spoilt += [memory_read(base + BAD - 8, 24, **common(rng)), memory_write(base + BAD - 16, rng.randbytes(64), **common(rng)),
                   memory_read(base + BAD, 1, **common(rng)), memory_write(base + BAD + 7, b"!", **common(rng))]  # fmt: skip
    for tlp in spoilt:
        good = memory_request(rng, 32)
        await b.send(tlp)
        await b.send(good)
        await b.judge([tlp, good])


@cocotb.test(timeout_time=400, timeout_unit="us")
async def long_reads_are_aborted(dut):
    """TLP-CPL-5: reads of 124 to 136 bytes at every alignment: up to 32 dwords are served with one completion, longer ones aborted."""
    rng, b = await bench(dut, busy=False)
    sent = [memory_read(BARS[0][2] + 0x200 + shift, length, **common(rng)) for length in range(124, 137) for shift in range(8)]
    sent.append(memory_read(BARS[0][2], 4096, **common(rng)))
    for tlp in sent:
        await b.send(tlp)
    await b.judge(sent)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def short_writes_use_what_came(dut):
    """TLP-CPL-6: writes that end before their length: nothing beyond what came is written, one beat writes nothing; the next is served."""
    rng, b = await bench(dut)
    lanes = b.width // 32
    for _ in range(60):
        tlp = memory_write(somewhere(rng, 256) & ~3, rng.randbytes(4 * rng.randrange(2, 60)), **common(rng))
        arrived = rng.randrange(tlp.length_dw)
        await b.send(tlp, arrived)
        follower = memory_request(rng, 64)
        await b.send(follower)
        await b.judge([*([(tlp, arrived)] if arrived > lanes else []), follower])
    config = configuration(rng, type=TlpType.CFGWR0, data=rng.randbytes(4))
    await b.send(config, 0)
    await b.judge([])


@cocotb.test(timeout_time=400, timeout_unit="us")
async def malformed_requests_are_dropped(dut):
    """TLP-CPL-7: configuration and I/O requests of more than one dword or with last byte enables: dropped, no answer, one pulse each."""
    rng, b = await bench(dut)
    for kind in (TlpType.CFGRD0, TlpType.CFGWR0, TlpType.CFGRD1, TlpType.IOWR, TlpType.IORD):
        for length, last in ((2, 0), (1, 3), (40, 15)):
            data = rng.randbytes(4 * length) if kind.has_data else b""
            await b.send(Tlp(kind, length_dw=length, first_be=15, last_be=last, data=data, **common(rng)))
            await ClockCycles(dut.clk, 8)
            assert [event[:2] for event in b.events] == [("malformed", None)]
            b.events.clear()
            good = configuration(rng)
            await b.send(good)
            await b.judge([good])


@cocotb.test(timeout_time=100, timeout_unit="us")
async def answers_come_in_time(dut):
    """TLP-CPL-8: cycles from a request to its completion, with owners that answer at once, are those of the docstring."""
    rng, b = await bench(dut, busy=False)
    spent = {}
    for name, tlp in (("configuration", configuration(rng, type=TlpType.CFGRD0, data=b"", completer_id=0)),
                      ("one word", memory_read(BARS[0][2], 8, **common(rng))), ("two words", memory_read(BARS[0][2], 16, **common(rng))),
                      ("miss", memory_read(NOWHERE, 8, **common(rng)))):  # fmt: skip
        await ClockCycles(dut.clk, 5)
        begin = cycle()
        await b.send(tlp)
        await b.judge([tlp])
        spent[name] = b.cycles[-1] - begin if b.width > 64 or name != "two words" else b.cycles[-2] - begin
    owner = 1  # cycles of the stand-ins from question to answer
    assert spent == {"configuration": 3 + owner, "one word": 6 + 2 * owner, "two words": 8 + 3 * owner, "miss": 4 + owner}
