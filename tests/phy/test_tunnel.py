"""The card's end of the tunnel against the model of the host's end, over a line that may spoil what goes through."""

import random
import zlib

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tunnel import Arrived, Frame, FrameKind, Peer, Taken, encode_frame
from ringwall.models.tunnel import Deframer as ModelDeframer
from ringwall.rtl.phy.layouts import RawBeat
from ringwall.rtl.phy.tunnel import Tunnel
from ringwall.rtl.phy.tunnel_frames import Deframer, TlpDword
from ringwall.rtl.phy.tunnel_retry import Retry
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack

SMALL = {"room": 256, "depth": 256, "patience_cycles": 6000, "silence_cycles": 20_000}


def test_deframer(request):
    run(Deframer(), module=__name__, node=request.node.nodeid, testcase="frames_are_found")


@pytest.mark.parametrize("width", [64, 512])
def test_tunnel(request, width):
    run(Tunnel(width=width, **SMALL), module=__name__, node=request.node.nodeid, params={"width": width},
        testcase=["tlps_pass", "line_is_filled"])


def test_line(request):
    run(Tunnel(width=64, **SMALL), module=__name__, node=request.node.nodeid, params={"width": 64},
        testcase=["spoiled_lines_lose_nothing", "room_is_never_exceeded", "sessions_begin_and_end", "hostile_bytes_do_no_harm",
                  "cut_tlps_are_forgotten"])


def test_parameters_are_checked():
    """TUN-9: parameters that cannot be are refused with a sentence."""
    for bad, sentence in (({"width": 32}, "64, 128, 256 or 512 bits"), ({"room": 100}, "Room for TLPs"), ({"room": 128}, "Room for TLPs"),
                          ({"depth": 128}, "Depth of a retry buffer"), ({"window": 8}, "Window must"), ({"window": 255}, "Window must"),
                          ({"patience_cycles": 1}, "Patience"), ({"silence_cycles": 9_999}, "Silence")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{sentence}.*, not"):
            Tunnel(**{"width": 64} | bad)
    Retry(depth=256, window=1, patience_cycles=2)


def random_frame(rng):
    count = rng.choice([0, 1, 2, 3, 4, 5, rng.randrange(70)])
    body = tuple(rng.choice([rng.getrandbits(32), 0x7E7D7E7D, 0x5E5D7D5E]) for _ in range(count))
    return Frame(rng.choice([*FrameKind, 3, 3, 3, 0, 7, 0x7D, 0x7E]), rng.getrandbits(8), rng.getrandbits(8), rng.getrandbits(8), body)


def spoiled(rng, data, chance):
    """Return ``data`` with bits turned, bytes lost and bytes twice, about ``chance`` of the bytes each; now and then all of it twice."""
    found = bytearray()
    for byte in data if rng.random() >= 200 * chance else data + data:
        if rng.random() >= 3 * chance:
            found.append(byte)
        else:
            found += rng.choice([b"", bytes([byte, byte]), bytes([byte ^ 1 << rng.randrange(8)]), bytes([byte ^ 1 << rng.randrange(8)])])
    return bytes(found)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def frames_are_found(dut):
    """TUN-1: frames of all kinds and lengths between garbage, spoiled, cut: found, or damaged, as the model says; dwords of DATA leave."""
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    o.set_ready(1)
    dwords, found = [], []
    cocotb.start_soon(o.watch(dwords))

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            if int(dut.is_frame.value):
                header, length, body = int(dut.header.value), int(dut.length.value), int(dut.body.value)
                found.append((header, length, body if length else None, [unpack(TlpDword, one) for one in dwords]))
                dwords.clear()
            elif int(dut.is_damaged.value):
                found.append(None)
                dwords.clear()

    cocotb.start_soon(watch())
    pieces = [encode_frame(random_frame(rng)) for _ in range(150)]
    for n in range(0, len(pieces), 3):
        pieces[n] = rng.choice([
            spoiled(rng, pieces[n], 0.01), pieces[n][: rng.randrange(len(pieces[n]))], pieces[n][rng.randrange(len(pieces[n])) :],
            pieces[n][:-1] + b"\x7d\x7e", pieces[n][:5] + b"\x7d" + pieces[n][5:], b"\x7e\x7d\x7e", b"\x7e" + rng.randbytes(30), b"\x7e",
            b"\x7e\x00\x00\x00\x00\x7e", b"\x7e" + zlib.crc32(b"").to_bytes(4, "little") + b"\x7e",
        ])  # fmt: skip
    data = b"".join(pieces) + b"\x7e"
    await i.put_many(data)
    await ClockCycles(dut.clk, 10)
    expected = ModelDeframer().feed(data)
    assert expected.count(None) > 15 and len(expected) > 130
    for got, frame in zip(found, expected, strict=True):
        if frame is None:
            assert got is None, got
            continue
        header, length, body, words = got
        assert header.to_bytes(4, "little") == bytes([frame.kind, frame.seq, frame.ack, frame.freed])
        assert length == min(len(frame.body), 2)
        assert body == (frame.body[-1] if frame.body else None)
        assert [one.data for one in words] == (list(frame.body) if frame.kind == FrameKind.DATA else [])
        assert [one.last for one in words] == [0] * (len(words) - 1) + [1] * bool(words)


class Bench:
    """The host's end, and the card's link adapter, around ``dut``."""

    def __init__(self, dut, *, chance=0.0, pace=1.0):
        self.dut, self.width, self.rng = dut, params()["width"], random.Random(cocotb.RANDOM_SEED)
        self.layout, self.lanes = RawBeat(self.width), self.width // 32
        self.chance, self.pace = chance, pace
        self.now, self.plugged, self.news, self.beats, self.lines = 0, True, [], [], [0, 0]
        self.queue, self.session = bytearray(), 1

    async def begin(self):
        self.rx, self.tx, self.i, self.o = await start(self.dut, "rx", "tx", "i", "o")
        self.tx.set_ready(1)
        self.peer = Peer(self.session, patience=4000, keep_alive=5000)
        self.tasks = [cocotb.start_soon(one) for one in (self._line(), self.o.watch(self.beats), self._reset())]
        self.ready = cocotb.start_soon(random_ready(self.o, self.rng, self.pace))

    async def _reset(self):
        """Play the card: not ready for some cycles behind a link reset."""
        while True:
            await RisingEdge(self.dut.clk)
            if int(self.dut.link_reset.value):
                self.dut.discarding.value = 1
                while int(self.dut.link_reset.value):
                    await RisingEdge(self.dut.clk)
                await ClockCycles(self.dut.clk, 30)
                self.dut.discarding.value = 0

    async def _line(self):
        """Carry a byte each way in each cycle, now and then another one, or none."""
        edge, put, valid = RisingEdge(self.dut.clk), self.rx._payload, self.rx._valid
        read, read_valid, back = self.tx.read_payload, self.tx.read_valid, bytearray()
        while True:
            await edge
            self.now += 1
            if self.now % 16 == 0 and len(self.queue) < 8:
                self.queue += spoiled(self.rng, self.peer.output(self.now), self.chance)
            if self.queue and self.plugged:
                put(self.queue.pop(0))
                valid(1)
                self.lines[0] += 1
            else:
                self.queue.clear()
                valid(0)
            if read_valid() and self.plugged:
                back.append(read())
                self.lines[1] += 1
            if back and back[-1] == 0x7E:
                self.news += self.peer.feed(spoiled(self.rng, bytes(back), self.chance), self.now)
                back.clear()

    async def until(self, is_so, cycles=30_000):
        end = self.now + cycles
        while not is_so():
            assert self.now < end, f"not so within {cycles} cycles"
            await ClockCycles(self.dut.clk, 16)

    async def connect(self):
        await self.until(lambda: self.peer.hello is not None)

    async def give(self, tlps, gaps=None):
        """Let the card send ``tlps``."""
        for dwords in tlps:
            parts = [dwords[n : n + self.lanes] for n in range(0, len(dwords), self.lanes)]
            beats = [pack(self.layout, data=sum(word << 32 * k for k, word in enumerate(part)), keep=(1 << len(part)) - 1, first=n == 0,
                          last=n == len(parts) - 1) for n, part in enumerate(parts)]  # fmt: skip
            await self.i.put_many(beats, gaps)

    def received(self):
        """Return what came to the card: whole TLPs, in the form of the raw link."""
        found, current = [], None
        for beat in (unpack(self.layout, one) for one in self.beats):
            assert bool(beat.first) is (current is None)
            current = [] if current is None else current
            kept = beat.keep.bit_length()
            assert kept and beat.keep == (1 << kept) - 1 and (beat.last or kept == self.lanes)
            current += [beat.data >> 32 * n & 0xFFFF_FFFF for n in range(kept)]
            if beat.last:
                found.append(current)
                current = None
        assert current is None
        return found

    def arrived(self):
        return [one.dwords for one in self.news if isinstance(one, Arrived)]

    def taken(self):
        return [one.dwords for one in self.news if isinstance(one, Taken)]


def tlps_of(rng, count, longest=70):
    lengths = [rng.choice([1, 2, 3, 4, 5, rng.randrange(1, longest), longest]) for _ in range(count)]
    return [[rng.choice([rng.getrandbits(32), 0x7E7D7E7D]) for _ in range(length)] for length in lengths]


async def exchange(bench, down, up, *, gaps=(0, 0, 1, 40)):
    """Send ``down`` to the card and ``up`` to the host, at once; all arrive, once, in order."""
    bench.news.clear()
    bench.beats.clear()
    giving = cocotb.start_soon(bench.give(up, lambda: bench.rng.choice(gaps)))
    for dwords in down:
        bench.peer.send(dwords)
    await bench.until(lambda: len(bench.taken()) >= len(down) and len(bench.arrived()) >= len(up), 300_000)
    await giving
    assert bench.received() == down == bench.taken()
    assert bench.arrived() == up


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def tlps_pass(dut):
    """TUN-2: hello, then TLPs of 1 to 133 dwords both ways, under gaps and stalls: unchanged, once, in order; the link is up."""
    bench = Bench(dut, pace=0.3)
    await bench.begin()
    assert int(dut.link_reset.value) == 1
    await bench.connect()
    hello = bench.peer.hello
    assert (hello.lanes, hello.window, hello.room) == (bench.lanes, 31, 256)
    assert int(dut.link_reset.value) == 0
    await exchange(bench, tlps_of(bench.rng, 25, 133), tlps_of(bench.rng, 25, 133))
    assert bench.peer.statistics.again == bench.peer.statistics.damaged == bench.peer.statistics.repeated == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def line_is_filled(dut):
    """TUN-3: TLPs of 256 bytes of payload both ways: what both carry is the limit of the frame, 13 bytes and escapes more for each TLP."""
    bench = Bench(dut)
    await bench.begin()
    await bench.connect()
    tlps = [[n * 0x01010101 & 0x0F0F0F0F for n in range(68)] for _ in range(24)]
    begun, lines = bench.now, list(bench.lines)
    await exchange(bench, tlps, tlps, gaps=(0,))
    total = 24 * (4 * 68 + 10)
    for way, (at, before) in enumerate(zip(bench.lines, lines)):
        assert total <= at - before <= 1.05 * total + 40, way
    assert bench.now - begun < 1.3 * total


@cocotb.test(timeout_time=5, timeout_unit="ms")
async def spoiled_lines_lose_nothing(dut):
    """TUN-4: bits turned, bytes lost, bytes and frames twice, both ways, few and many: all TLPs arrive, unchanged, once, in order."""
    bench = Bench(dut, pace=0.5)
    await bench.begin()
    for chance in (0.0002, 0.0007):
        bench.chance = chance
        await bench.connect()
        await exchange(bench, tlps_of(bench.rng, 50), tlps_of(bench.rng, 50))
    statistics = bench.peer.statistics
    assert min(statistics.again, statistics.damaged, statistics.repeated) > 0


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def room_is_never_exceeded(dut):
    """TUN-5: while the card takes nothing the host sends no more than there is room for; nothing is sent twice, and all arrives later."""
    bench = Bench(dut, pace=0.0)
    await bench.begin()
    await bench.connect()
    tlps = tlps_of(bench.rng, 60)
    for dwords in tlps:
        bench.peer.send(dwords)
    await bench.until(lambda: bench.now > 5000)
    assert 0 < len(bench.peer._inside) < len(tlps)
    assert bench.beats == [] and len(bench.taken()) <= 1  # one may have left the buffer for a beat
    up = tlps_of(bench.rng, 10)
    await bench.give(up)  # the other direction is not held up
    await bench.until(lambda: len(bench.arrived()) == len(up))
    bench.ready.cancel()
    bench.o.set_ready(1)
    await bench.until(lambda: len(bench.taken()) == len(tlps))
    assert bench.received() == tlps
    statistics = bench.peer.statistics
    assert statistics.damaged == statistics.again == 0


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def sessions_begin_and_end(dut):
    """TUN-6: a new session resets the card once, though RESET comes again, and begins at 0; a plugged cable goes on; silence ends it."""
    bench = Bench(dut)
    await bench.begin()
    await bench.connect()
    await exchange(bench, tlps_of(bench.rng, 5), tlps_of(bench.rng, 5))
    resets = []

    async def watch():
        while True:
            await RisingEdge(dut.link_reset)
            resets.append(bench.now)

    cocotb.start_soon(watch())
    again = encode_frame(Frame(FrameKind.RESET, body=(1,)))
    bench.queue += again + again
    await exchange(bench, tlps_of(bench.rng, 5), tlps_of(bench.rng, 5))
    assert not resets

    await bench.give(tlps_of(bench.rng, 4))  # are lost, perhaps
    bench.peer = Peer(2, patience=4000, keep_alive=5000, now=bench.now)
    bench.queue += again[:7]
    await bench.connect()
    assert len(resets) == 1
    bench.news.clear()
    await ClockCycles(dut.clk, 500)
    assert not bench.arrived()
    await exchange(bench, tlps_of(bench.rng, 5), tlps_of(bench.rng, 5))

    bench.plugged = False
    down, up = tlps_of(bench.rng, 8, 20), tlps_of(bench.rng, 8, 20)
    exchanging = cocotb.start_soon(exchange(bench, down, up))
    await ClockCycles(dut.clk, 9000)
    bench.plugged = True
    await exchanging
    assert len(resets) == 1

    bench.plugged = False
    await bench.until(lambda: len(resets) == 2)
    assert int(dut.link_reset.value) == 1
    bench.plugged = True
    lines = bench.lines[1]
    await ClockCycles(dut.clk, 12_000)
    assert bench.lines[1] == lines, "a card without a session is silent"
    bench.beats.clear()
    bench.peer = Peer(3, patience=4000, keep_alive=5000, now=bench.now)
    await bench.connect()
    await exchange(bench, tlps_of(bench.rng, 5), tlps_of(bench.rng, 5))


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def hostile_bytes_do_no_harm(dut):
    """TUN-7: whole frames of wrong kinds, numbers, lengths, acknowledgements of nothing, NAKs again and again, garbage: no TLP of them
    comes through, and behind them all goes on."""
    bench = Bench(dut)
    await bench.begin()
    await bench.connect()
    rng, tlps = bench.rng, tlps_of(bench.rng, 6)
    await exchange(bench, tlps, tlps)
    expected = bench.peer._acked
    for _ in range(30):
        n = rng.randrange(9)
        seq = (expected + rng.choice([1, 2, 100, 127, 128, 200, 255])) % 256
        body = tuple(rng.getrandbits(32) for _ in range(rng.randrange(300)))
        beyond = (len(tlps) + rng.randrange(1, 250)) % 256
        bench.queue += (
            encode_frame(Frame(FrameKind.DATA, seq, 6, 6, body or (1,))), encode_frame(Frame(FrameKind.ACK, 0, beyond, beyond)),
            encode_frame(Frame(FrameKind.NAK, 0, beyond, beyond)) * 3, encode_frame(Frame(FrameKind.ACK, 0, beyond, 0, (1, 2))),
            encode_frame(Frame(FrameKind.HELLO, 0, 0, 0, (1, 2, 3))), encode_frame(Frame(rng.randrange(7, 256), 0, beyond, 0, body)),
            encode_frame(Frame(FrameKind.RESET, 0, 0, 0, (7, 8))), encode_frame(Frame(FrameKind.DATA, expected, beyond, 0)),
            b"\x7e" + rng.randbytes(rng.choice([3, 40, 1500])) + b"\x7e",
        )[n]  # fmt: skip
        await bench.until(lambda: not bench.queue)
    assert int(dut.link_reset.value) == 0
    await exchange(bench, tlps, tlps)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def cut_tlps_are_forgotten(dut):
    """TUN-8: a TLP that a link reset cuts is not sent, and nothing of it stands in front of the first one of the next session."""
    bench = Bench(dut)
    await bench.begin()
    await bench.connect()
    up = tlps_of(bench.rng, 12)
    await bench.i.put_many([pack(bench.layout, data=n, keep=3, first=n == 0) for n in range(5)])
    bench.peer = Peer(2, patience=4000, keep_alive=5000, now=bench.now)
    await bench.connect()
    await exchange(bench, up, up)
