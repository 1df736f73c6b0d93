"""UltraScalePhy against the drivers and sinks of cocotbext-pcie, which pack and unpack descriptors and sideband by their own reading."""

import logging
import random
import struct
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiStreamBus
from cocotbext.pcie.core.tlp import Tlp as RcTlp
from cocotbext.pcie.core.tlp import TlpType as RcTlpType
from cocotbext.pcie.core.utils import PcieId
from cocotbext.pcie.xilinx.us.interface import CcSink, CqSource, RcSource, RqSink
from cocotbext.pcie.xilinx.us.tlp import Tlp_us

from ringwall.models.tlp import CplStatus, Tlp, TlpType, encode, memory_read, memory_write
from ringwall.rtl.phy.ultrascale import MirroredFunction, UltraScalePhy
from ringwall.rtl.phy.ultrascale_send import Sender
from ringwall.rtl.tlp.layouts import TlpBeat
from ringwall.sim.run import params, run
from ringwall.sim.second_host import from_dwords, to_dwords
from ringwall.sim.stream import cycle, random_ready, start, unpack
from ringwall.sim.tlp_beats import to_beats

FUNCTIONS = tuple(
    MirroredFunction(bars=bars, device_control=18, device_control_2=26, msix_control=31, power_control=40) for bars in ((0,), (0, 2)))
LIMIT = 512
ORDER_CYCLES = 400
OFFSET_BITS = 39
STRADDLED = {
    256: ["completions_are_whole", "broken_completions_disturb_nobody"],
    512: ["requests_are_whole", "completions_are_whole", "broken_requests_disturb_nobody", "broken_completions_disturb_nobody"],
}


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_ultrascale(request, width):
    dut = UltraScalePhy(width=width, functions=FUNCTIONS, order_cycles=ORDER_CYCLES)
    only = None if width in (64, 256) else ["requests_are_whole", "completions_are_whole", "sent_tlps_are_whole_and_in_order"]
    run(dut, module=__name__, node=request.node.nodeid, params={"width": width, "straddle": []}, testcase=only)


@pytest.mark.parametrize("width", [512])
def test_cut_packets(request, width):
    dut = UltraScalePhy(width=width, functions=FUNCTIONS, order_cycles=ORDER_CYCLES)
    only = ["reset_of_the_link_cuts_packets"]
    run(dut, module=__name__, node=request.node.nodeid, params={"width": width, "straddle": []}, testcase=only)


@pytest.mark.parametrize("width, straddle", [(256, ["rc"]), (512, ["cq", "rc"]), (512, ["rc4"])])
def test_straddled(request, width, straddle):
    dut = UltraScalePhy(width=width, functions=FUNCTIONS, order_cycles=ORDER_CYCLES, straddle=straddle)
    only = [name for name in STRADDLED[width] if "cq" in straddle or "completions" in name]
    run(dut, module=__name__, node=request.node.nodeid, params={"width": width, "straddle": straddle}, testcase=only)


def test_parameters_are_checked():
    """PHY-USP-1: what the hard block cannot be is refused with a sentence."""
    good = {"width": 256, "functions": FUNCTIONS}
    for bad, message in (
        ({"width": 32}, "64, 128, 256 or 512 bits, not 32"), ({"functions": ()}, "between 1 and 4, not 0"),
        ({"functions": FUNCTIONS * 3}, "between 1 and 4, not 6"), ({"max_payload": 2048}, "512 or 1024 bytes, not 2048"),
        ({"straddle": ["cq"]}, "among"), ({"straddle": ["cc"], "width": 512}, "among"), ({"straddle": ["rc4"]}, "among"),
        ({"straddle": ["rc", "rc4"], "width": 512}, "by two packets or by four"), ({"straddle": ["rc"], "width": 128}, "among"),
        ({"pcie_capability": 0x71}, "multiple of 4 below 256, not 113"), ({"order_cycles": 63}, "at least 64 cycles, not 63"),
    ):
        with pytest.raises(ValueError, match=message):
            UltraScalePhy(**good | bad)
    with pytest.raises(TypeError, match="must be a MirroredFunction, not 3"):
        UltraScalePhy(width=64, functions=[3])
    with pytest.raises(ValueError, match="64-bit one at 0, 2 or 4, not 1"):
        MirroredFunction(bars=(1,))
    with pytest.raises(ValueError, match="at least 64 cycles, not 1"):
        Sender(width=64, completion_beats=4, order_cycles=1)


class OrderedCqSource(CqSource):
    """The byte enables of a straddled beat's starts in their order, as the block has them; cocotbext-pcie 0.2.16 places them by half."""

    straddled = 0  # beats in which two packets start

    async def _drive(self, obj):
        self.straddled += self.seg_count == 2 and obj.tuser >> 81 & 1
        if self.seg_count == 2 and obj.tuser >> 80 & 0b1111 == 0b1001:  # one start, in the upper half
            low = (obj.tuser >> 4 & 0xF) | (obj.tuser >> 12 & 0xF) << 8
            obj.tuser = obj.tuser >> 16 << 16 | low
        await super()._drive(obj)


class CountingRcSource(RcSource):
    """Counts the beats in which a packet starts in the upper half."""

    straddled = 0

    async def _drive(self, obj):
        if self.seg_count > 1:
            self.straddled += bool(obj.tuser >> 65 & 1 if self.width == 512 else obj.tuser >> 33 & 1)
        await super()._drive(obj)


class Bench:
    """The four interfaces, as the block would drive them."""

    def __init__(self, dut):
        self.dut, self.rng, self.width = dut, random.Random(cocotb.RANDOM_SEED), params()["width"]

    async def begin(self, pauses=0.0):
        logging.getLogger("cocotb.top").setLevel(logging.WARNING)
        dut, straddle = self.dut, params()["straddle"]
        self.received, self.to_send = await start(dut, "received", "to_send")
        self.beats, self.pulses = [], []
        cocotb.start_soon(self.received.watch(self.beats))
        cocotb.start_soon(self.count("malformed", self.pulses))

        def port(kind, name, segments=1):
            made = kind(AxiStreamBus.from_prefix(dut, name), dut.clk, segments=segments)
            made.log.setLevel(logging.WARNING)
            if pauses:
                made.set_pause_generator(iter(lambda: self.rng.random() < pauses, None))
            return made

        self.cq = port(OrderedCqSource, "m_axis_cq", 2 if "cq" in straddle else 1)
        self.rc = port(CountingRcSource, "m_axis_rc", 2 if "rc" in straddle else 4 if "rc4" in straddle else 1)
        self.rq, self.cc = port(RqSink, "s_axis_rq"), port(CcSink, "s_axis_cc")
        if pauses:
            cocotb.start_soon(random_ready(self.received, self.rng, 1 - pauses))
        else:
            self.received.set_ready(1)
        return self

    async def count(self, name, found):
        edge, signal = RisingEdge(self.dut.clk), getattr(self.dut, name)
        while True:
            await edge
            if signal.value:
                found.append(cycle())

    async def answer(self, answers):
        """Answer the host's requests as a card does, one after the other, with any status; note the completions."""
        beats = []
        cocotb.start_soon(self.received.watch(beats))
        while True:
            await RisingEdge(self.dut.clk)
            while beats:
                beat = unpack(TlpBeat(self.width), beats.pop(0))
                if beat.first and not beat.header.fmt & 2:
                    h, rng = beat.header, self.rng
                    status = rng.choice([CplStatus.UR, CplStatus.CA, CplStatus.SC])
                    ids = {"completer_id": 0x300, "requester_id": h.requester_id, "tag": h.tag, "tc": h.tc}
                    answers.append(completion(rng, 4 if status == CplStatus.SC else 0, status=status, **ids))
                    await self.to_send.put_many(to_beats(self.width, answers[-1]))

    async def idle(self, *sources, cycles=40):
        for source in sources:
            while not source.idle():
                await ClockCycles(self.dut.clk, 4)
        await ClockCycles(self.dut.clk, cycles)

    def packets(self):
        """Return the TlpBeat payloads that came, by packet, and forget them."""
        found, now = [], []
        for payload in self.beats:
            now.append(payload)
            if unpack(TlpBeat(self.width), payload).last:
                found.append(now)
                now = []
        assert not now, "a TLP has begun and not ended"
        self.beats.clear()
        return found


def same(width, payloads, tlp):
    """Whether the TlpBeat ``payloads`` are ``tlp``; lanes that do not count are not compared."""
    want = [unpack(TlpBeat(width), p) for p in to_beats(width, tlp)]
    got = [unpack(TlpBeat(width), p) for p in payloads]
    assert len(got) == len(want), f"{len(got)} beats for {tlp}"
    assert got[0].header == want[0].header, f"{got[0].header} for {tlp}"
    for one, other in zip(got, want):
        mask = (1 << 32 * other.dword_count) - 1
        assert (one.data & mask, one.dword_count, one.first, one.last) == (other.data & mask, other.dword_count, other.first, other.last)


ENABLES = [(first, 0, 1) for first in range(16)] + [
    (first, last, length) for first in (0b1111, 0b1110, 0b1100, 0b1000) for last in (1, 3, 7, 15) for length in (2, 3, 4, 5, 17)
] + [(5, 10, 2), (9, 6, 2)]  # gaps are legal in one dword, and in two [PCIe5 2.2.5]


def host_request(rng, n):
    """Return a memory request of the host, and (function, bar, aperture) as the block will say."""
    first, last, length = ENABLES[n % len(ENABLES)]
    page = rng.choice([0, rng.getrandbits(31) << 32]) | rng.randrange(1 << 19) << 12
    address = page | rng.choice([4096 - 4 * length, 0, 4 * rng.randrange(900)])
    fields = {"address": address, "requester_id": rng.getrandbits(16), "tag": rng.getrandbits(8), "length_dw": length, "first_be": first,
              "last_be": last, "tc": rng.randrange(8), "relaxed_ordering": rng.random() < 0.5, "no_snoop": rng.random() < 0.5}  # fmt: skip
    if rng.random() < 0.5:
        tlp = Tlp(TlpType.MRD, **fields)
    else:
        tlp = Tlp(TlpType.MWR, data=rng.randbytes(4 * length), **fields)
    return tlp, (rng.randrange(4), rng.choice([0, 2, 4]), rng.choice([7, 12, 14, 31]))


def cq_frame(tlp, target):
    """Return the packet of ``tlp`` on CQ."""
    theirs = Tlp_us(from_dwords(encode(tlp)))
    function, theirs.bar_id, theirs.bar_aperture = target
    theirs.completer_id = PcieId(3, 0, function)
    return theirs.pack_us_cq()


def inside(tlp, target):
    """Return ``tlp`` as the card sees it: at the place that its BAR has in there."""
    function, bar, aperture = target
    place = (1 << OFFSET_BITS) + (bar << OFFSET_BITS + 1) + (function << OFFSET_BITS + 4)
    return replace(tlp, address=place + tlp.address % (1 << aperture))


def rc_frame(tlp, **fields):
    """Return the packet of the completion ``tlp`` on RC."""
    theirs = Tlp_us(from_dwords(encode(tlp)))
    for name, value in fields.items():
        setattr(theirs, name, value)
    return theirs.pack_us_rc()


def completion(rng, size=None, **fields):
    size = 4 * rng.choice([1, 1, 2, 3, 4, 5, 8, 13, 16, 29, 32, 64]) if size is None else size
    ids = {"completer_id": rng.getrandbits(16), "requester_id": rng.getrandbits(16), "tag": rng.getrandbits(8), "tc": rng.randrange(8)}
    if size == 0:
        return Tlp(TlpType.CPL, byte_count=4, **ids | fields)
    low = rng.randrange(4)
    rest = rng.choice([size - low - rng.randrange(4 - low), rng.randrange(size - low, 4097 - low)])
    return Tlp(TlpType.CPLD, length_dw=size // 4, byte_count=rest, lower_address=4 * rng.randrange(32) + low, data=rng.randbytes(size),
               **ids | fields)  # fmt: skip


async def take_all(sink, packets):
    """Append each packet of ``sink`` to ``packets``."""
    while True:
        packets.append(await sink.recv())


@cocotb.test(timeout_time=100, timeout_unit="us")
async def requests_are_whole(dut):
    """PHY-USP-2: the host's reads and writes arrive in order, field by field, at their BAR's place: all byte enables, 4 KiB ends.

    An answer that says UR or CA leaves with byte enables and descriptor of its request behind it, every other as it is. [PG213]
    """
    bench = await Bench(dut).begin(pauses=0.3)
    sent, answers, packets = [host_request(bench.rng, n) for n in range(len(ENABLES))], [], []
    cocotb.start_soon(bench.answer(answers))
    cocotb.start_soon(take_all(bench.cc, packets))
    for tlp, target in sent:
        await bench.cq.send(cq_frame(tlp, target))
    await bench.idle(bench.cq, cycles=200)
    found = bench.packets()
    assert len(found) == len(sent)
    for payloads, (tlp, target) in zip(found, sent):
        same(bench.width, payloads, inside(tlp, target))
    reads = [(tlp, target) for tlp, target in sent if tlp.type is TlpType.MRD]
    assert len(answers) == len(packets) == len(reads) > 20
    for packet, answer, (tlp, target) in zip(packets, answers, reads):
        theirs = Tlp_us.unpack_us_cc(packet)
        theirs.completer_id = PcieId.from_int(answer.completer_id)
        assert to_dwords(RcTlp(theirs)) == encode(answer), f"{theirs!r} for {answer}"
        request = cq_frame(tlp, target).data
        assert packet.data[0] >> 8 & 3 == request[0] & 3
        reason = [tlp.first_be | tlp.last_be << 4, *request] if answer.status != CplStatus.SC else [*struct.unpack("<I", answer.data)]
        assert packet.data[3:] == reason
    assert not bench.pulses and (bench.cq.straddled > 10 or "cq" not in params()["straddle"])


@cocotb.test(timeout_time=100, timeout_unit="us")
async def completions_are_whole(dut):
    """PHY-USP-3: completions of all lengths and of every status arrive in order, field by field."""
    bench = await Bench(dut).begin(pauses=0.3)
    rng, sent = bench.rng, []
    for _ in range(50):
        tlp = completion(rng)
        if rng.random() < 0.25:
            tlp = completion(rng, 0, status=rng.choice([CplStatus.UR, CplStatus.CA, CplStatus.CRS]))
        sent.append(tlp)
        await bench.rc.send(rc_frame(tlp, error_code=0 if tlp.status == CplStatus.SC else 2))
    await bench.idle(bench.rc)
    found = bench.packets()
    assert len(found) == len(sent)
    for payloads, tlp in zip(found, sent):
        same(bench.width, payloads, tlp)
    assert not bench.pulses and (bench.rc.straddled > 3 or not params()["straddle"])


BROKEN_REQUESTS = [
    "discontinued", "reserved type", "configuration", "short by one", "short by many", "no payload", "long by one", "long by many",
    "read with payload", "wide I/O", "one dword", "three dwords",
]  # fmt: skip


def break_request(rng, name, bare):
    """Return a packet on CQ that is wrong, ``bare``: without payload if may be, and whether a non-posted request was lost with it."""
    write = memory_write(0x1_0000_0000 + 4 * rng.randrange(64), rng.randbytes(4 * rng.choice([3, 30, 64])), requester_id=1)
    is_read = name == "read with payload" or (bare and name in ("reserved type", "configuration"))
    tlp = memory_read(0x1000, 64, requester_id=1, tag=3) if is_read else write
    if name == "wide I/O":
        tlp = Tlp(TlpType.IORD, address=0x40, length_dw=2, first_be=15, last_be=15, requester_id=1)
        theirs = Tlp_us(from_dwords(encode(replace(tlp, length_dw=1, last_be=0))))
        theirs.length, theirs.last_be = 2, 15
        return theirs.pack_us_cq(), True
    frame = cq_frame(tlp, (1, 0, 14))
    kind = {"reserved type": 0b1111, "configuration": 0b1010}.get(name)
    if kind is not None:
        frame.data[2] = frame.data[2] & ~(0xF << 11) | kind << 11
    frame.discontinue = name == "discontinued"
    size = {"short by one": len(frame) - 1, "short by many": len(frame) - 3, "no payload": 4, "one dword": 1, "three dwords": 3}
    size = size.get(name, len(frame))
    more = {"long by one": 1, "long by many": rng.choice([140, 600]), "read with payload": rng.choice([1, 30])}.get(name, 0)
    frame.data = frame.data[:size] + [rng.getrandbits(32) for _ in range(more)]
    frame.byte_en = (frame.byte_en + [15] * more)[: len(frame.data)]
    frame.update_parity()
    return frame, name in ("read with payload", "reserved type", "configuration")


@cocotb.test(timeout_time=100, timeout_unit="us")
async def broken_requests_disturb_nobody(dut):
    """PHY-USP-4: packets on CQ that are discontinued, of no known type, cut or too long vanish whole; the next is whole."""
    bench = await Bench(dut).begin()
    rng, grants = bench.rng, []
    cocotb.start_soon(bench.count("pcie_cq_np_req", grants))
    for name in BROKEN_REQUESTS:
        for bare in (False, True):
            await bench.idle(bench.cq, cycles=30)
            bench.packets()
            bench.pulses.clear()
            grants.clear()
            frame, gives_back = break_request(rng, name, bare)
            good = host_request(rng, rng.randrange(len(ENABLES)))
            while good[0].type is not TlpType.MWR:
                good = host_request(rng, rng.randrange(len(ENABLES)))
            for each in (frame, cq_frame(*good)):
                await bench.cq.send(each)
                if name == "discontinued":  # it is said once for both packets of a beat
                    await bench.idle(bench.cq, cycles=2)
            await bench.idle(bench.cq, cycles=60)
            found = bench.packets()
            assert len(found) == 1, f"{name}: {len(found)} TLPs"
            same(bench.width, found[0], inside(*good))
            assert len(bench.pulses) == 1, f"{name}: {len(bench.pulses)} pulses"
            assert len(grants) == gives_back, f"{name}: {len(grants)} more non-posted requests allowed"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def broken_completions_disturb_nobody(dut):
    """PHY-USP-5: every error code of RC, discontinued and cut packets: nothing of them counts, what the card must know comes."""
    bench = await Bench(dut).begin()
    rng = bench.rng
    whole = [("poisoned", 1), ("status", 2)]
    gone = [("length", 3), ("fields", 4), ("address", 5), ("tag", 6), ("reset", 8), ("timeout", 9), ("reserved", 7), ("reserved", 15)]
    for name, code in [*whole, *gone, ("discontinued", 0), ("discontinued", 0), ("one dword", 0), ("two dwords", 0)]:
        for size in (4, 200):
            bench.packets()
            bench.pulses.clear()
            tlp = completion(rng, 0 if name == "status" else size, status=CplStatus.CA if name == "status" else CplStatus.SC)
            frame = rc_frame(tlp, error_code=code, discontinue=name == "discontinued")
            cut = {"one dword": 1, "two dwords": 2}.get(name, len(frame))
            frame.data, frame.byte_en, frame.parity = frame.data[:cut], frame.byte_en[:cut], frame.parity[:cut]
            good = completion(rng)
            for each in (frame, rc_frame(good)):
                await bench.rc.send(each)
                if name == "discontinued":  # it is said once for both packets of a beat
                    await bench.idle(bench.rc, cycles=2)
            await bench.idle(bench.rc, cycles=20)
            found = bench.packets()
            same(bench.width, found[-1], good)
            assert len(bench.pulses) == ((name, code) not in whole), f"{name}: {len(bench.pulses)} pulses"
            if (name, code) in whole:
                same(bench.width, found[0], replace(tlp, poisoned=name == "poisoned"))
            elif name == "discontinued" and len(found) == 2:
                beats = [unpack(TlpBeat(bench.width), payload) for payload in found[0]]
                assert sum(beat.dword_count for beat in beats) < beats[0].header.length_dw
            else:
                assert len(found) == 1, f"{name}: {len(found)} TLPs"


class Block:
    """What the block does with what we send: takes it, and reports posted requests in their order, late."""

    def __init__(self, bench, delay, lose=lambda: False):
        self.bench, self.delay, self.lose = bench, delay, lose
        self.requests, self.completions = [], []  # (when it began on the interface, its TLP)
        self.reported = []  # cycle in which the n-th posted request was reported
        self.ports, self.invented = (0, 1), []  # where reports come; numbers to report in spite of all
        self.begun = {"rq": [], "cc": []}
        for name in self.begun:
            cocotb.start_soon(self.watch(name))
        cocotb.start_soon(self.take(bench.rq, "rq", Tlp_us.unpack_us_rq, self.requests))
        cocotb.start_soon(self.take(bench.cc, "cc", Tlp_us.unpack_us_cc, self.completions))
        self.due = []
        cocotb.start_soon(self.report())

    async def watch(self, name):
        """Note when packets begin; a pause inside of one, or a beat that changes while it waits, is an error."""
        dut, inside, held = self.bench.dut, False, None
        parts = ("tvalid", "tready", "tlast", "tdata", "tuser")
        tvalid, tready, tlast, tdata, tuser = (getattr(dut, f"s_axis_{name}_{part}") for part in parts)
        while True:
            await RisingEdge(dut.clk)
            if not tvalid.value:
                assert not inside and held is None, f"{name} pauses inside of a packet"
                continue
            now = str(tdata.value), str(tuser.value), int(tlast.value)
            assert held in (None, now), f"{name} changes while it waits"
            if not inside and held is None:
                self.begun[name].append(cycle())
            held = None if tready.value else now
            if tready.value:
                inside = not tlast.value

    async def take(self, sink, name, unpacked, found):
        while True:
            frame = await sink.recv()
            theirs = unpacked(frame)
            found.append((self.begun[name][len(found)], theirs))
            if name == "rq" and theirs.fmt_type in (RcTlpType.MEM_WRITE, RcTlpType.MEM_WRITE_64):
                self.due.append((cycle() + self.delay(), frame.seq_num))
            elif name == "rq":
                assert frame.seq_num == 0

    async def report(self):
        dut, rng = self.bench.dut, self.bench.rng
        while True:
            await RisingEdge(dut.clk)
            for n in range(2):
                number = self.invented.pop(0) if self.invented else None
                if n in self.ports and self.due and self.due[0][0] <= cycle() and (n == self.ports[0] or rng.random() < 0.5):
                    due = self.due.pop(0)[1]
                    number = None if self.lose() else due
                    self.reported.append(cycle())
                getattr(dut, f"pcie_rq_seq_num_vld{n}").value = number is not None
                getattr(dut, f"pcie_rq_seq_num{n}").value = number or 0


def our_tlp(rng):
    """Return a TLP as an endpoint sends them; a message goes nowhere."""
    address = rng.choice([0, rng.getrandbits(31) << 32]) + (rng.randrange(1 << 19) << 12)
    rid, kind = rng.getrandbits(16), rng.randrange(6)
    flags = {"relaxed_ordering": rng.random() < 0.5, "no_snoop": rng.random() < 0.5, "tc": rng.randrange(8)}
    if kind < 2:
        size = rng.choice([1, 2, 3, 4, 5, 16, 63, 64, 65, 128])
        address += rng.choice([0, 4096 - size, rng.randrange(4096 - size)])
        return memory_write(address, rng.randbytes(size), requester_id=rid, **flags)
    if kind == 2:
        size = rng.choice([1, 4, 64, 512, 4096])
        return memory_read(address + rng.choice([0, rng.randrange(4097 - size)]), size, requester_id=rid, tag=rng.getrandbits(8), **flags)
    if kind == 4:
        size, kind = rng.choice([4, 8, 16]), rng.choice([TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS])
        return Tlp(kind, address=address + 16 * rng.randrange(256), requester_id=rid, tag=rng.getrandbits(8), length_dw=size // 4,
                   first_be=15, last_be=15 if size > 4 else 0, data=rng.randbytes(size), **flags)  # fmt: skip
    if kind == 5:
        return Tlp(TlpType.MSG, message_code=rng.choice([0x30, 0x31, 0x33]), requester_id=rid)
    if rng.random() < 0.3:
        return completion(rng, 0, status=CplStatus.UR, lower_address=0)
    return completion(rng, 4 * rng.choice([1, 1, 2, 3, 9, 32]))


@cocotb.test(timeout_time=100, timeout_unit="us")
async def sent_tlps_are_whole_and_in_order(dut):
    """PHY-USP-6: our requests and completions leave as they are, AtomicOps and attributes included; messages do not leave at all.

    No completion leaves before an older posted request was reported.
    """
    bench = await Bench(dut).begin(pauses=0.2)
    rng = bench.rng
    block = Block(bench, lambda: rng.choice([0, 1, 10, 40, 90]))
    tlps = [our_tlp(rng) for _ in range(180)]
    await bench.to_send.put_many(b for tlp in tlps for b in to_beats(bench.width, tlp))
    await ClockCycles(dut.clk, 500)
    tlps = [tlp for tlp in tlps if tlp.type is not TlpType.MSG]
    assert len({tlp.type for tlp in tlps}) == 7
    for found, are_completions in ((block.requests, False), (block.completions, True)):
        ours = [tlp for tlp in tlps if tlp.type.is_completion == are_completions]
        assert len(found) == len(ours)
        for (_, theirs), tlp in zip(found, ours):
            if tlp.type.is_completion:
                theirs.completer_id = PcieId.from_int(tlp.completer_id)
            assert to_dwords(RcTlp(theirs)) == encode(tlp), f"{theirs!r} for {tlp}"
            assert not getattr(theirs, "completer_id_enable", False) and not getattr(theirs, "requester_id_enable", False)
    posted, place, waited = 0, 0, 0
    for tlp in tlps:
        posted += tlp.type is TlpType.MWR
        if tlp.type.is_completion:
            if posted:
                assert block.completions[place][0] > block.reported[posted - 1], f"completion {place} passed a posted request"
                waited += block.completions[place][0] < block.reported[posted - 1] + 8
            place += 1
    assert waited > 10, "the reports were never awaited"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def posted_requests_pass_completions(dut):
    """PHY-USP-7: while the block takes no completion, and while reports do not come, posted requests go on: 31 unreported at most."""
    bench = await Bench(dut).begin()
    rng = bench.rng
    bench.cc.pause = True
    block = Block(bench, lambda: 0)
    write = memory_write(0x1000, bytes(64), requester_id=1)
    for _ in range(4):  # as many as may be in the card
        await bench.to_send.put_many(to_beats(bench.width, completion(rng, 128)))
        await bench.to_send.put_many(b for _ in range(20) for b in to_beats(bench.width, write))
    await ClockCycles(dut.clk, 60)
    assert len(block.requests) == 80 and not block.completions
    bench.cc.pause = False
    await ClockCycles(dut.clk, 200)
    assert len(block.completions) == 4
    block.delay = lambda: 10**6
    short = memory_write(0x1000, bytes(4), requester_id=1)
    sending = cocotb.start_soon(bench.to_send.put_many(b for _ in range(40) for b in to_beats(bench.width, short)))
    await ClockCycles(dut.clk, 200)
    assert len(block.requests) == 80 + 31
    sending.cancel()


@cocotb.test(timeout_time=100, timeout_unit="us")
async def lost_reports_hold_nothing_for_ever(dut):
    """PHY-USP-8: reports that never come, for others, or were never due: no wait without end, no completion before its time."""
    bench = await Bench(dut).begin()
    rng, lost = bench.rng, []
    cocotb.start_soon(bench.count("order_lost", lost))
    block = Block(bench, lambda: 5, lose=lambda: True)
    write = memory_write(0x1000, bytes(64), requester_id=1)
    for sent in range(3):
        await bench.to_send.put_many(to_beats(bench.width, write))
        await bench.to_send.put_many(to_beats(bench.width, completion(rng, 8)))
        under_way = 32 + (sent + 1) % 32
        block.invented = [number for number in range(64) if number != under_way]
        await ClockCycles(dut.clk, ORDER_CYCLES - 20)
        assert not block.completions
        await ClockCycles(dut.clk, 60)
        assert len(block.completions) == 1 and len(lost) == 1
        assert ORDER_CYCLES <= block.completions[0][0] - block.begun["rq"][-1] < ORDER_CYCLES + 20
        block.completions.clear()
        block.begun["cc"].clear()
        lost.clear()
    # The report of a later one counts for those before it.
    fate = iter([True, True, False])
    block.lose, block.ports = lambda: next(fate), (1,)
    await bench.to_send.put_many(b for _ in range(3) for b in to_beats(bench.width, write))
    await bench.to_send.put_many(to_beats(bench.width, completion(rng, 8)))
    await ClockCycles(dut.clk, 100)
    assert len(block.completions) == 1 and not lost


@cocotb.test(timeout_time=100, timeout_unit="us")
async def packets_run_at_full_rate(dut):
    """PHY-USP-9: back to back, a packet takes the beats that its dwords and its descriptor fill and not a cycle more, each way."""
    bench = await Bench(dut).begin()
    lanes, count = bench.width // 32, 12
    block = Block(bench, lambda: 0)
    for size in (64, 128, 256):
        beats = -(-(size // 4 + 4) // lanes)
        tlps = [memory_write(0x1000 * n, bytes(size), requester_id=1) for n in range(count)]
        block.begun["rq"].clear()
        block.requests.clear()
        await bench.to_send.put_many(b for tlp in tlps for b in to_beats(bench.width, tlp))
        await ClockCycles(dut.clk, 40)
        assert len(block.begun["rq"]) == count and block.begun["rq"][-1] - block.begun["rq"][0] == beats * (count - 1)
    for source, name, make in ((bench.cq, "m_axis_cq", lambda: cq_frame(memory_write(0x1000, bytes(256), requester_id=1), (1, 0, 14))),
                               (bench.rc, "m_axis_rc", lambda: rc_frame(completion(bench.rng, 256)))):  # fmt: skip
        stalls = []

        async def watch(name=name, stalls=stalls):
            while True:
                await RisingEdge(dut.clk)
                if getattr(dut, f"{name}_tvalid").value and not getattr(dut, f"{name}_tready").value:
                    stalls.append(cycle())

        watching = cocotb.start_soon(watch())
        bench.packets()
        for _ in range(count):
            await source.send(make())
        await bench.idle(source)
        watching.cancel()
        assert len(bench.packets()) == count and len(stalls) <= count, f"{len(stalls)} stalls on {name}"


class Registers:
    """The configuration space behind ``received``: takes writes, answers them, and is in reset when asked to be."""

    def __init__(self, bench, bus):
        self.bench, self.bus, self.values, self.log = bench, bus, {}, []
        self.resets, self.reset_cycles = [], 120
        cocotb.start_soon(self.serve())

    async def serve(self):
        bench, layout = self.bench, TlpBeat(self.bench.width)
        while True:
            while not bench.beats:
                await RisingEdge(bench.dut.clk)
            beat = unpack(layout, bench.beats.pop(0))
            h = beat.header
            if h.type != 4:
                self.log.append((h.type, h.tag))
                continue
            assert (h.fmt, h.length_dw, h.last_be, beat.dword_count, beat.first, beat.last) == (2, 1, 0, 1, 1, 1)
            function = h.completer_id & 7
            self.bus[function] = h.completer_id >> 3
            old, mask = self.values.get((function, h.address), 0), sum(0xFF << 8 * n for n in range(4) if h.first_be >> n & 1)
            new = old & ~mask | beat.data & mask & 0xFFFFFFFF
            if h.address == 72 and new >> 15 & 1:
                self.resets.append(function)
                new &= ~(1 << 15)
                self.values = {key: value for key, value in self.values.items() if key[0] != function}
                cocotb.start_soon(self.reset(function))
            self.values[function, h.address] = new
            self.log.append(("write", function, h.address))
            await ClockCycles(bench.dut.clk, 3)
            answer = Tlp(TlpType.CPL, completer_id=h.completer_id, requester_id=h.requester_id, tag=h.tag, byte_count=4)
            await bench.to_send.put_many(to_beats(bench.width, answer))

    async def reset(self, function):
        bench = self.bench
        bench.dut.in_reset.value = int(bench.dut.in_reset.value) | 1 << function
        await ClockCycles(bench.dut.clk, self.reset_cycles)
        bench.dut.in_reset.value = int(bench.dut.in_reset.value) & ~(1 << function)


async def answer_management(dut, values, values_2=(0, 0)):
    """Read Device Control and Device Control 2 of the block: the upper halves are Device Status, and reserved."""
    while True:
        await RisingEdge(dut.clk)
        dut.cfg_mgmt_read_write_done.value = 0
        if dut.cfg_mgmt_read.value and not dut.cfg_mgmt_read_write_done.value:
            address, function = 4 * int(dut.cfg_mgmt_addr.value), int(dut.cfg_mgmt_function_number.value)
            assert address in (0x78, 0x98)
            await ClockCycles(dut.clk, 5)
            dut.cfg_mgmt_read_data.value = 0xFFFF << 16 | (values if address == 0x78 else values_2)[function]
            dut.cfg_mgmt_read_write_done.value = 1
            await RisingEdge(dut.clk)
            dut.cfg_mgmt_read_write_done.value = 0
            await RisingEdge(dut.clk)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def configuration_is_mirrored(dut):
    """PHY-USP-10: what the block's configuration space says reaches the card, in front of later requests; FLR is a handshake."""
    bench = await Bench(dut).begin()
    controls, bus = [0x2810, 0x5930], {}
    registers = Registers(bench, bus)
    cocotb.start_soon(answer_management(dut, controls))
    status = {"bus": 7, "master": [0, 1], "enable": [0, 1], "mask": [0, 1]}

    def drive():
        dut.cfg_bus_number.value = status["bus"]
        dut.cfg_function_status.value = sum(status["master"][n] << 4 * n + 2 for n in range(2))
        dut.cfg_interrupt_msix_enable.value = sum(bit << n for n, bit in enumerate(status["enable"]))
        dut.cfg_interrupt_msix_mask.value = sum(bit << n for n, bit in enumerate(status["mask"]))

    def check():
        for n in range(2):
            values = {offset: registers.values.get((n, offset)) for offset in (4, 72, 124)}
            assert values[4] == 2 | status["master"][n] << 2
            assert values[72] == controls[n] and values[124] == status["enable"][n] << 31 | status["mask"][n] << 30
            assert bus[n] == status["bus"] << 5
            for bar in FUNCTIONS[n].bars:
                place = (1 << OFFSET_BITS) + (bar << OFFSET_BITS + 1) + (n << OFFSET_BITS + 4)
                assert registers.values[n, 16 + 4 * bar] | registers.values[n, 20 + 4 * bar] << 32 == place

    drive()
    await ClockCycles(dut.clk, 400)
    check()
    quiet = len(registers.log)
    await ClockCycles(dut.clk, 200)
    assert len(registers.log) == quiet, "what does not change is written once"

    status |= {"bus": 9, "master": [1, 1], "mask": [0, 0]}
    request = cq_frame(Tlp(TlpType.MRD, address=0x1000, length_dw=1, first_be=15, requester_id=1, tag=0x55), (1, 0, 12))
    drive()
    await bench.cq.send(request)
    await ClockCycles(dut.clk, 300)
    check()
    assert registers.log[-1] == (0, 0x55) and len(registers.log) > quiet + 5, "the request overtook what was set before"
    controls[0] ^= 0x7000
    await ClockCycles(dut.clk, 300)
    check()

    done = []
    cocotb.start_soon(bench.count("cfg_flr_done", done))
    dut.cfg_flr_in_process.value = 2
    await ClockCycles(dut.clk, 60)
    status["master"] = [0, 0]  # the other function does not wait
    drive()
    await ClockCycles(dut.clk, 60)
    assert registers.resets == [1] and not done and registers.values[0, 4] == 2
    await ClockCycles(dut.clk, 200)
    assert len(done) == 1
    dut.cfg_flr_in_process.value = 0
    await ClockCycles(dut.clk, 200)
    check()
    assert registers.resets == [1] and len(done) == 1
    dut.cfg_flr_in_process.value = 2  # at its end the block says what it said before: the card has forgotten it all the same
    await ClockCycles(dut.clk, 400)
    dut.cfg_flr_in_process.value = 0
    check()
    assert registers.resets == [1, 1] and len(done) == 2
    registers.reset_cycles = 0  # a function that does not take part
    dut.cfg_flr_in_process.value = 1
    await ClockCycles(dut.clk, 200)
    assert len(done) == 3


@cocotb.test(timeout_time=100, timeout_unit="us")
async def power_and_second_control_are_mirrored(dut):
    """PHY-USP-11: power states, of Device Control 2 timeouts and AtomicOps but no 10-bit tags; what a reset of the card's forgot."""
    bench = await Bench(dut).begin()
    controls_2 = [0x1055, 0x0046]
    registers = Registers(bench, {})
    cocotb.start_soon(answer_management(dut, [0x2810, 0x5930], controls_2))
    await ClockCycles(dut.clk, 400)
    assert [registers.values[n, 104] for n in range(2)] == [0x55, 0x46] and registers.values[0, 160] == 0
    controls_2[1] = 0x100A
    await ClockCycles(dut.clk, 200)
    assert [registers.values[n, 104] for n in range(2)] == [0x55, 0x0A]

    acknowledged = []
    cocotb.start_soon(bench.count("cfg_power_state_change_ack", acknowledged))
    dut.cfg_function_power_state.value = 3 << 3
    dut.cfg_power_state_change_interrupt.value = 1
    while not acknowledged:
        await RisingEdge(dut.clk)
    assert registers.log[-1] == ("write", 1, 160) and registers.values[1, 160] == 3, "acknowledged before the card knows"
    await ClockCycles(dut.clk, 100)
    dut.cfg_power_state_change_interrupt.value = 0
    await ClockCycles(dut.clk, 20)
    assert len(acknowledged) == 1 and registers.values[0, 160] == 0
    dut.cfg_power_state_change_interrupt.value = 1  # of a function that the card does not have
    await ClockCycles(dut.clk, 20)
    dut.cfg_power_state_change_interrupt.value = 0
    await ClockCycles(dut.clk, 5)
    assert len(acknowledged) == 2

    log = len(registers.log)
    dut.cfg_function_power_state.value = 0  # the card resets the function on the way
    dut.cfg_power_state_change_interrupt.value = 1
    while ("write", 1, 160) not in registers.log[log:]:
        await RisingEdge(dut.clk)
    cocotb.start_soon(registers.reset(1))
    await ClockCycles(dut.clk, 60)
    dut.cfg_power_state_change_interrupt.value = 0
    assert len(acknowledged) == 3, "it is not acknowledged as long as the reset takes"
    quiet = len(registers.log)
    await ClockCycles(dut.clk, registers.reset_cycles - 70)
    assert len(registers.log) == quiet, "nothing is written while a reset takes"
    registers.values.clear()
    await ClockCycles(dut.clk, 200)
    assert registers.values[1, 104] == 0x0A and registers.values[1, 160] == 0 and (0, 104) not in registers.values


@cocotb.test(timeout_time=100, timeout_unit="us")
async def functions_are_reset_at_once(dut):
    """PHY-USP-12: function level resets of two functions that begin in one cycle: each is told done when its own is over."""
    bench = await Bench(dut).begin()
    registers, done = Registers(bench, {}), {}
    cocotb.start_soon(answer_management(dut, [0x2810, 0x5930]))
    await ClockCycles(dut.clk, 300)

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            for n in range(4):
                if int(dut.cfg_flr_done.value) >> n & 1:
                    done.setdefault(n, []).append(int(dut.in_reset.value))

    cocotb.start_soon(watch())
    for _ in range(2):
        done.clear()
        registers.resets.clear()
        dut.cfg_flr_in_process.value = 3
        await ClockCycles(dut.clk, 60)
        assert sorted(registers.resets) == [0, 1] and not done
        await ClockCycles(dut.clk, 300)
        dut.cfg_flr_in_process.value = 0
        assert sorted(done) == [0, 1] and all(len(pulses) == 1 and not pulses[0] >> n & 1 for n, pulses in done.items())
        assert [registers.values[n, 72] for n in range(2)] == [0x2810, 0x5930], "they know all again"
        await ClockCycles(dut.clk, 10)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def errors_reach_the_block(dut):
    """PHY-USP-13: what only the adapter finds goes to cfg_err_uncor_in and cfg_err_cor_in; what the block found itself does not."""
    bench = await Bench(dut).begin()
    rng, fatal, corrected = bench.rng, [], []
    cocotb.start_soon(bench.count("cfg_err_uncor_in", fatal))
    cocotb.start_soon(bench.count("cfg_err_cor_in", corrected))
    for name in BROKEN_REQUESTS:
        await bench.cq.send(break_request(rng, name, False)[0])
        await bench.idle(bench.cq)
        assert len(fatal) == (name != "discontinued"), f"{name}: {len(fatal)} pulses"
        fatal.clear()
    tlp = completion(rng, 64)
    cut = rc_frame(tlp)
    cut.data, cut.byte_en, cut.parity = cut.data[:2], cut.byte_en[:2], cut.parity[:2]
    for frame, count in ((rc_frame(tlp, error_code=6), 0), (rc_frame(tlp, discontinue=True), 0), (cut, 1)):
        await bench.rc.send(frame)
        await bench.idle(bench.rc)
        assert len(fatal) == count
    Block(bench, lambda: 5, lose=lambda: True)
    for masters, count in ((0x44, 1), (0x04, 1), (0x40, 1), (0x44, 2)):
        dut.cfg_function_status.value = masters
        await bench.to_send.put_many(to_beats(bench.width, memory_write(0x1000, bytes(8), requester_id=1)))
        await ClockCycles(dut.clk, ORDER_CYCLES + 20)
        assert len(corrected) == count, f"{masters:x}"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def reset_of_the_link_cuts_packets(dut):
    """PHY-USP-14: packets under way each way when the link goes: ours end as discontinued, theirs vanish; the next are whole.

    The link is reset without user_lnk_up and in hot reset. Nothing of before is sent, credits for requests are given anew.
    """
    bench = await Bench(dut).begin()
    rng, sent, grants = bench.rng, {"rq": [], "cc": []}, []
    cocotb.start_soon(bench.count("pcie_cq_np_req", grants))
    for name, sink in (("rq", bench.rq), ("cc", bench.cc)):
        cocotb.start_soon(take_all(sink, sent[name]))
    dut.user_lnk_up.value = 1
    await ClockCycles(dut.clk, 2)
    assert not dut.link_reset.value
    dut.cfg_hot_reset_out.value = 1
    await ClockCycles(dut.clk, 2)
    assert dut.link_reset.value
    dut.cfg_hot_reset_out.value = 0
    dut.user_lnk_up.value = 0
    await ClockCycles(dut.clk, 2)
    assert dut.link_reset.value
    dut.user_lnk_up.value = 1

    for _ in range(4):  # a write and an answer, each cut behind its first beat of several; a request and an answer to us cut as well
        for name, beats in (
            ("rq", to_beats(bench.width, memory_write(0x1000, rng.randbytes(512), requester_id=1))),
            ("cc", to_beats(bench.width, completion(rng, 128))),
        ):
            sent[name].clear()
            if name == "cc":
                putting = cocotb.start_soon(bench.to_send.put_many(beats))
                while not int(dut.s_axis_cc_tvalid.value):
                    await RisingEdge(dut.clk)
                bench.cc.pause = True
                await putting
            else:
                await bench.to_send.put_many(beats[: len(beats) // 2])
                await ClockCycles(dut.clk, 8)
            for source, frame in ((bench.cq, cq_frame(memory_write(0x1000, rng.randbytes(256), requester_id=1), (1, 0, 14))),
                                  (bench.rc, rc_frame(completion(rng, 256)))):  # fmt: skip
                await source.send(frame)
            await ClockCycles(dut.clk, 2)
            grants.clear()
            dut.discarding.value = 1
            await ClockCycles(dut.clk, 3)
            dut.discarding.value = 0
            bench.cc.pause = False
            await bench.idle(bench.cq, bench.rc)
            assert not bench.packets(), "of a packet that was cut"
            assert len(grants) == 4
            assert len(sent[name]) == 1 and sent[name][0].discontinue, f"{name}: {sent[name]}"
        good = cq_frame(memory_write(0x1000, rng.randbytes(256), requester_id=1), (1, 0, 14)), rc_frame(completion(rng, 256))
        for source, frame in zip((bench.cq, bench.rc), good):
            await source.send(frame)
        await bench.to_send.put_many(to_beats(bench.width, completion(rng, 8)))
        await bench.to_send.put_many(to_beats(bench.width, memory_write(0x1000, bytes(64), requester_id=1)))
        await bench.idle(bench.cq, bench.rc)
        assert len(bench.packets()) == 2
        for name in sent:
            assert [frame.discontinue for frame in sent[name]][-1:] == [False]
