"""Address types at the requester: what the gate decided, what Enable allows, and translation requests of the wall."""

import itertools
import random

import cocotb
import pytest
from cocotb.queue import Queue
from cocotb.triggers import ClockCycles

from ringwall.models.tlp import TRANSLATED, TRANSLATION_REQUEST, UNTRANSLATED, Pasid, Tlp, TlpType, decode, encode, stray_bits
from ringwall.rtl.tlp.layouts import AddressedBurst, BurstData, BurstDone, BurstStatus, ConfigState
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.sim.burst_bus import data_beats
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, start, unpack
from ringwall.sim.tlp_beats import RequesterLink, completions_of

WALL, RING, DATA = range(3)
CLIENTS = ReadClient("wall", False, 256, 4), ReadClient("ring", False, 256, 8), ReadClient("data", True, 4096, 4)
FUNCTIONS = 3


def requester(**options):
    return Requester(clients=CLIENTS, functions=FUNCTIONS, tags=24, wall_tags=4, completion_timeout_cycles=1024, host_ats=True, **options)


@pytest.mark.parametrize("width", [64, 256])
def test_address_types(request, width):
    run(requester(width=width), module=__name__, node=request.node.nodeid, params={"width": width, "has_pasid": False},
        testcase=["types_are_the_bursts", "nothing_is_translated_without_enable"])  # fmt: skip


def test_pasid(request):
    run(requester(width=64, has_pasid=True), module=__name__, node=request.node.nodeid, params={"width": 64, "has_pasid": True})


class Bench:
    """The requester between clients and a host that answers everything at once, as long as it is ``answering``."""

    async def begin(self, dut, rng):
        self.dut, self.rng, self.width = dut, rng, params()["width"]
        await start(dut)
        for n in range(FUNCTIONS):
            getattr(dut, f"config__{n}").value = pack(ConfigState, bus=1, bus_master=1, extended_tag=1, mps_code=0, mrrs_code=0)
        names = ["wall", "gate", "completions", "posted", "non_posted", "retired_reads", "retired_writes"]
        names += [f"{kind}__{n}" for kind in ("write_data", "read_data", "write_done") for n in range(len(CLIENTS))]
        self.s = {name: Stream(dut, name) for name in names}
        for name in names:
            if name.startswith(("posted", "non_posted", "retired", "read_data", "write_done")):
                self.s[name].set_ready(1)
        self.tlps, self.got, self.cookie, self.lower = [], {}, 0, 0
        for n in range(len(CLIENTS)):
            for name in ("read_data", "write_done"):
                cocotb.start_soon(self._ends(self.s[f"{name}__{n}"], name))
        self.to_write = Queue()
        cocotb.start_soon(self._feed())
        self.link = RequesterLink(self.width, self.s["posted"], self.s["non_posted"], self.s["completions"], self.tlps.append,
                                  self.on_read, has_pasid=params()["has_pasid"]).start()  # fmt: skip
        await ClockCycles(dut.clk, 80)
        return self

    async def _ends(self, stream, name):
        data = []
        cocotb.start_soon(stream.watch(data))
        seen = 0
        while True:
            await stream._edge
            for payload in data[seen:]:
                beat = unpack(BurstData(self.width) if name == "read_data" else BurstDone, payload)
                if name == "write_done" or beat.last:
                    assert beat.cookie not in self.got
                    self.got[beat.cookie] = beat
            seen = len(data)

    async def _feed(self):
        while True:
            await self.s[f"write_data__{DATA}"].put_many(await self.to_write.get())

    def on_read(self, tlp):
        self.tlps.append(tlp)
        length = tlp.byte_span()[1]
        if tlp.at == TRANSLATION_REQUEST:  # its Lower Address does not matter
            content = int.to_bytes(tlp.address | tlp.no_write, 8, "little")
            self.link.send(Tlp(TlpType.CPLD, requester_id=tlp.requester_id, tag=tlp.tag, byte_count=8, length_dw=2, data=content,
                               lower_address=self.rng.choice((0, 0x38, 0x78))), 5)  # fmt: skip
        else:
            for one in completions_of(tlp, bytes(length)):
                self.link.send(one, 5)

    async def issue(self, client, address, length, *, is_write=0, function=0, at=0, no_write=0, pid=None):
        """Hand over a burst; return its cookie."""
        self.cookie += 1
        if is_write:
            self.to_write.put_nowait(data_beats(self.width, address, bytes(length)))
        await self.s["wall" if client == WALL else "gate"].put(pack(
            AddressedBurst, address=address, length_bytes=length, is_write=is_write, is_wall=client == WALL, function=function,
            client=client, cookie=self.cookie, at=at, no_write=no_write, pasid_valid=pid is not None, pasid=pid or 0))  # fmt: skip
        return self.cookie

    async def ended(self, cookie):
        for _ in range(2000):
            if cookie in self.got:
                return self.got[cookie]
            await ClockCycles(self.dut.clk, 1)
        raise AssertionError(f"burst {cookie} did not end")


@cocotb.test(timeout_time=200, timeout_unit="us")
async def types_are_the_bursts(dut):
    """ATS-TYPE-1: each TLP of a burst has its address type; a translation request is 2 dwords, all enabled, with NW in bit 0, and any Lower
    Address is good enough in its completion; nothing else differs."""
    rng = random.Random(cocotb.RANDOM_SEED)
    b = await Bench().begin(dut, rng)
    dut.ats.value = 0b111
    for _ in range(60):
        client, function, at = rng.choice((RING, DATA, WALL)), rng.randrange(FUNCTIONS), rng.choice((UNTRANSLATED, TRANSLATED))
        page, b.tlps[:] = rng.choice((0x7_0000, 0x12_3456_7000)), []
        if client == WALL:
            no_write = rng.randrange(2)
            beat = await b.ended(await b.issue(WALL, page, 8, function=function, at=TRANSLATION_REQUEST, no_write=no_write))
            assert (beat.status, beat.data & (1 << 64) - 1) == (BurstStatus.OK, page | no_write)
            (tlp,) = b.tlps
            assert tlp == Tlp(TlpType.MRD, at=1, length_dw=2, requester_id=1 << 8 | function, tag=tlp.tag, first_be=15, last_be=15,
                              address=page, no_write=bool(no_write))  # fmt: skip
        else:
            is_write, length = int(client == DATA and rng.randrange(2)), rng.randrange(1, 600) if client == DATA else 64
            start = page + (64 * rng.randrange(8) if client == RING else rng.randrange(1024))
            beat = await b.ended(await b.issue(client, start, length, is_write=is_write, function=function, at=at))
            assert beat.status == BurstStatus.OK
            assert sum(tlp.byte_span()[1] for tlp in b.tlps) == length
            assert {(tlp.at, tlp.type) for tlp in b.tlps} == {(at, TlpType.MWR if is_write else TlpType.MRD)}
        for tlp in b.tlps:
            assert decode(encode(tlp)) == tlp
            assert not stray_bits(encode(tlp))


@cocotb.test(timeout_time=200, timeout_unit="us")
async def nothing_is_translated_without_enable(dut):
    """ATS-TYPE-2: with ATS Enable 0 translation requests and translated bursts of the function end in RESET, also those that waited when it
    fell, but for what the link was offered; untranslated ones and other functions go on."""
    rng = random.Random(cocotb.RANDOM_SEED)
    b = await Bench().begin(dut, rng)
    dut.ats.value = 0b101
    for client, is_write, at, function in itertools.product((WALL, RING, DATA), (0, 1), (0, 1, 2), (1, 2)):
        if (client == WALL) != (at == 1) or (is_write and client != DATA):
            continue
        b.tlps.clear()
        refused = function == 1 and at != 0
        beat = await b.ended(await b.issue(client, 0x4000, 8, is_write=is_write, function=function, at=at))
        assert (beat.status, len(b.tlps)) == ((BurstStatus.RESET, 0) if refused else (BurstStatus.OK, 1))
    dut.ats.value = 0b111
    for name in ("posted", "non_posted"):
        b.s[name].set_ready(0)
    issued = [(await b.issue(DATA, 0x1000 * n, 64, is_write=n % 2, function=1, at=2 * (n % 4 < 2)), n % 4 < 2) for n in range(1, 9)]
    await ClockCycles(dut.clk, 40)
    dut.ats.value = 0b101
    await ClockCycles(dut.clk, 2)
    b.tlps.clear()
    for name in ("posted", "non_posted"):
        b.s[name].set_ready(1)
    ends = [(await b.ended(cookie), is_translated) for cookie, is_translated in issued]
    assert all(end.status == BurstStatus.OK for end, is_translated in ends if not is_translated)
    assert [end.status for end, is_translated in ends if is_translated].count(BurstStatus.RESET) >= 2
    assert sum(tlp.at == TRANSLATED for tlp in b.tlps) <= 2  # one of either kind was offered


@cocotb.test(timeout_time=200, timeout_unit="us")
async def pasids_are_the_bursts(dut):
    """ATS-PASID-3: each TLP of a burst with a PASID has it, a translation request too; with PASID Enable 0 such bursts end in
    RESET, also those that waited when it fell, but for what the link was offered; others go on."""
    rng = random.Random(cocotb.RANDOM_SEED)
    b = await Bench().begin(dut, rng)
    dut.ats.value, dut.pasid.value = 0b111, 0b101
    for _ in range(80):
        client, function, pid = rng.choice((RING, DATA, WALL)), rng.randrange(FUNCTIONS), rng.choice((None, 0, rng.getrandbits(20)))
        is_write, at = int(client == DATA and rng.randrange(2)), TRANSLATION_REQUEST if client == WALL else UNTRANSLATED
        start, length = (0x7000, 8) if client == WALL else (0x7040, 64) if client == RING else (0x7003, rng.randrange(1, 600))
        b.tlps.clear()
        beat = await b.ended(await b.issue(client, start, length, is_write=is_write, function=function, at=at, pid=pid))
        if function == 1 and pid is not None:
            assert (beat.status, b.tlps) == (BurstStatus.RESET, [])
            continue
        assert beat.status == BurstStatus.OK
        assert sum(tlp.byte_span()[1] for tlp in b.tlps) == length
        assert {(tlp.at, tlp.pasid) for tlp in b.tlps} == {(at, None if pid is None else Pasid(pid))}
    for name in ("posted", "non_posted"):
        b.s[name].set_ready(0)
    issued = [(await b.issue(DATA, 0x1000 * n, 64, is_write=n % 2, function=2, pid=7 if n % 4 < 2 else None), n % 4 < 2)
              for n in range(1, 9)]  # fmt: skip
    await ClockCycles(dut.clk, 40)
    dut.pasid.value = 0b001
    await ClockCycles(dut.clk, 2)
    b.tlps.clear()
    for name in ("posted", "non_posted"):
        b.s[name].set_ready(1)
    ends = [(await b.ended(cookie), has_pasid) for cookie, has_pasid in issued]
    assert all(end.status == BurstStatus.OK for end, has_pasid in ends if not has_pasid)
    assert [end.status for end, has_pasid in ends if has_pasid].count(BurstStatus.RESET) >= 2
    assert sum(tlp.pasid is not None for tlp in b.tlps) <= 2  # one of either kind was offered
