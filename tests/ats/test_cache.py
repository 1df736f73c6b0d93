"""The translation cache alone, below a host whose answers are late, change, and go wrong."""

import random
from dataclasses import dataclass, field, replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, ReadOnly, RisingEdge

from ringwall.models.host_iommu import translation_entry
from ringwall.models.iommu.ats import AtsStatus, TranslationCompletion
from ringwall.rtl.ats.cache import TranslationCache
from ringwall.rtl.iommu.gate import UNTRANSLATED_LOG2
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.spec import pcie
from ringwall.rtl.tlp.layouts import AddressedBurst, BurstData, BurstStatus
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, start, unpack

PAGE = 4096
WAITING, FUNCTIONS = 32, 3
PROCESSES = (0, None), (0, 0), (0, 2), (1, 2)  # (function, PASID) of the address spaces with PASIDs
SETTLES = 3  # cycles from the fall of Enable until the cache has forgotten
PASS = "pass"


@pytest.mark.parametrize(("width", "requests", "patience", "has_pasid"), [
    (64, 4, 0, False), (256, 1, 0, False), (64, 4, 100, False), (64, 4, 0, True)])  # fmt: skip
def test_cache(request, width, requests, patience, has_pasid):
    run(TranslationCache(width=width, entries=16, ways=2, requests=requests, waiting=WAITING, client_cookies=4,
                         page_patience_cycles=patience, has_pasid=has_pasid), module=__name__, node=request.node.nodeid,
        params={"width": width, "requests": requests, "client_cookies": 4 if patience else 0, "has_pasid": has_pasid})  # fmt: skip


def identity(space):
    """Return (function, PASID or None) of an address space: that of a function, or of a process of one."""
    return PROCESSES[space] if params()["has_pasid"] and space < len(PROCESSES) else (space, None)


def space_of(burst):
    """Return the address space that a burst is of."""
    return next(n for n in range(8) if identity(n) == (burst.function, burst.pasid if burst.pasid_valid else None))


@dataclass
class Region:
    """Pages of a function, or a process, that the host maps as one, and what it said of them since when: (cycle, completion or failure)."""

    function: int
    first: int
    pages: int
    history: list = field(default_factory=list)
    forgotten: int = -1  # since this cycle nothing from before counts

    def values(self, begin, end):
        """Return what was said at some time from ``begin`` to ``end``."""
        ends = [when for when, _ in self.history[1:]] + [1 << 60]
        return [value for (when, value), until in zip(self.history, ends) if when <= end and until > begin]


class Host:
    """Everything around the cache; every answer is judged when it comes."""

    def __init__(self, dut, rng, latency=60):
        self.dut, self.rng, self.latency, self.edge = dut, rng, latency, RisingEdge(dut.clk)
        self.regions, self.asked, self.open, self.answers, self.sent = [], {}, {}, 0, []
        self.enabled, self.last = [1] * 8, {(n, bit): 0 for n in range(8) for bit in (0, 1)}  # last cycle in which Enable was 0, and 1
        self.fails, self.keeps_clean = 0, False  # of 10 requests; NW gives no permission to write
        self.hold = False
        self.client_cookies = params()["client_cookies"]  # of each client whose answers come in order; 0: in any
        self.failed = {}  # (function, page) -> cycle of the last failure

    async def begin(self):
        await start(self.dut)
        self.request, self.response, self.bursts, self.read_data = (
            Stream(self.dut, name) for name in ("request", "response", "bursts", "read_data"))  # fmt: skip
        self.enable(0b111)
        self.response.set_ready(1)
        self.bursts.set_ready(1)
        cocotb.start_soon(self._watch())
        cocotb.start_soon(self._serve())
        await ClockCycles(self.dut.clk, 2)
        return self

    def enable(self, bits):
        self.dut.enable.value = bits
        self.enabled = [bits >> identity(n)[0] & 1 for n in range(8)]

    def map(self, function, first, pages):
        region = Region(function, first, pages)
        self.regions.append(region)
        self.change(region)
        return region

    def change(self, region, **fields):
        """Let the host say something else of the region from now on."""
        rng = self.rng
        kind = rng.randrange(10)
        frame = rng.getrandbits(44 if kind or fields else 52) // region.pages * region.pages
        value = TranslationCompletion(AtsStatus.SUCCESS, frame * PAGE, region.pages * PAGE, **({
            "readable": rng.random() < 0.9, "writable": rng.random() < 0.8, "untranslated_only": kind == 1, "no_snoop": kind == 2,
            "is_global": kind == 3} | fields))  # fmt: skip
        region.history.append((cycle(), value))

    def region_of(self, function, page):
        return next(r for r in self.regions if r.function == function and r.first <= page < r.first + r.pages)

    async def forget(self, region=None):
        dut = self.dut
        dut.forget.value, dut.forget_av.value = 1, int(region is not None)
        dut.forget_page.value = region.first if region is not None else 0
        await self.edge
        dut.forget.value = 0
        for one in self.regions if region is None else [region]:
            one.forgotten = cycle()

    async def ask(self, function, page, is_write, *, is_prefetch=0, cookie=None):
        """Ask with a free cookie, or this one; returns it when the request was taken."""
        while not is_prefetch and len(self.open) >= WAITING - 1:
            await self.edge
        if cookie is None:
            cookies = range(WAITING if self.client_cookies else 256)
            cookie = self.rng.choice([n for n in cookies if is_prefetch or (n not in self.open and n not in self.asked)])
        if not is_prefetch:
            self.asked[cookie] = function, page, is_write
        device, pid = identity(function)
        await self.request.put(pack(
            TranslateRequest, device_id=device, process_id_valid=pid is not None, process_id=pid or 0, page=page, is_write=is_write,
            is_prefetch=is_prefetch, cookie=cookie, offset=self.rng.getrandbits(12)))  # fmt: skip
        return cookie

    async def idle(self):
        for _ in range(20_000):
            if not self.open and not self.asked:
                return
            await self.edge
        raise AssertionError(f"no answer for {self.open} {self.asked}")

    async def _watch(self):
        """Note what is taken, judge what is answered."""
        while True:
            await self.edge
            now = cycle()
            for n in range(8):
                self.last[n, self.enabled[n]] = now
            if self.response.read_valid():
                answer = unpack(TranslateResponse, self.response.read_payload())
                if self.client_cookies:
                    client = [cookie for cookie in self.open if cookie // self.client_cookies == answer.cookie // self.client_cookies]
                    assert answer.cookie == client[0], "an answer overtook another of its client"
                self.judge(answer, now, *self.open.pop(answer.cookie))
            if self.request.read_valid() and self.request.read_ready():
                request = unpack(TranslateRequest, self.request.read_payload())
                if not request.is_prefetch:
                    function, page, is_write = self.asked.pop(request.cookie)
                    region = None if page >> 45 else self.region_of(function, page)
                    self.open[request.cookie] = function, page, is_write, now, region.forgotten if region else 0

    def judge(self, answer, now, function, page, is_write, since, forgotten):
        self.answers += 1
        passes = answer.size_log2 == UNTRANSLATED_LOG2
        got = "fault" if answer.fault else PASS if passes else (answer.page, answer.readable, answer.writable)
        if passes:
            assert answer.page == page
            if page >> 45 or self.last[function, 0] >= since - 1:
                return
        assert self.last[function, 1] >= since - SETTLES, "translated though ATS is not enabled"
        region = self.region_of(function, page)
        found = region.values(forgotten, now)
        has_failed = got == "fault" and self.failed.get((function, page), -1000) >= since - 2 * WAITING
        assert has_failed or any(self.fits(got, value, region, page, is_write) for value in found), (
            f"page {page:#x} of {function}, write {is_write}: {got}, must be one of {found}")  # fmt: skip

    @staticmethod
    def fits(got, value, region, page, is_write):
        if got == "fault":
            return not value.readable and not (value.writable and is_write)  # for NW the host may leave out writing
        if not (value.readable or value.writable):
            return False
        if value.untranslated_only or value.address >> 56:
            return got == PASS
        if got == PASS:
            return False
        frame, readable, writable = got
        may = value.writable == writable if is_write else value.readable == readable
        return may and frame == value.address // PAGE + page - region.first and readable <= value.readable and writable <= value.writable

    async def _serve(self):
        """Answer translation requests in any order, by what is true at some time on the way."""
        rng, due, failures = self.rng, [], [BurstStatus.UR, BurstStatus.CA, BurstStatus.TIMEOUT, BurstStatus.POISONED, BurstStatus.RESET]
        width = params()["width"]
        while True:
            await self.edge
            now = cycle()
            if self.bursts.read_valid() and self.bursts.read_ready():
                burst = unpack(AddressedBurst, self.bursts.read_payload())
                assert burst.at == pcie.AT_TRANSLATION_REQUEST
                assert (burst.length_bytes, burst.is_write, burst.is_wall, burst.address % PAGE) == (8, 0, 1, 0)
                assert burst.cookie not in [item[1] for item in due]
                space = space_of(burst)
                assert self.last[space, 1] >= now - SETTLES
                self.sent.append((space, burst.address // PAGE, burst.no_write))
                region = self.region_of(space, burst.address // PAGE)
                place = space, burst.address // PAGE
                due.append([now + rng.randrange(self.latency), burst.cookie, region, None, burst.no_write and self.keeps_clean, place])
            for item in due:
                if item[3] is None and rng.randrange(8) == 0:
                    item[3] = item[2].history[-1][1]
            ready = [item for item in due if item[0] <= now and not self.hold]
            self.read_data._valid(int(bool(ready)))
            if ready:
                item = rng.choice(ready)
                due.remove(item)
                value = item[3] or item[2].history[-1][1]
                value = replace(value, writable=value.writable and not item[4])
                status, entry = BurstStatus.OK, translation_entry(value)
                if rng.randrange(10) < self.fails:
                    self.failed[item[5]] = now
                    status, entry = rng.choice(failures), rng.randbytes(7) + b"\x03"
                self.read_data._payload(pack(BurstData(width), data=int.from_bytes(entry, "little"), keep=0xFF, first=1, last=1,
                                             cookie=item[1], status=status))  # fmt: skip


def make_regions(host):
    """Map regions of every size that an entry can code, some side by side, at the same addresses for all functions."""
    base = host.rng.getrandbits(30) << 10
    for function in range(len(PROCESSES) if params()["has_pasid"] else FUNCTIONS):
        at = base
        for pages in (1, 1, 1, 2, 8, 16, 32, 512, 1024, 1 << 18, 1 << 20):
            at = (at + pages - 1) // pages * pages
            host.map(function, at, pages)
            at += pages


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def answers_are_the_hosts(dut):
    """ATS-CACHE-1: random pages, sizes and permissions; mappings change, are forgotten page by page or all, requests fail, Enable toggles:
    each request is answered once, by what was true since what it forgot; with patience for pages those of a client in their order. With
    PASIDs a function, its processes, and a process of another one with the same number, are apart."""
    host = await Host(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    rng = host.rng
    make_regions(host)
    changed = []
    for n in range(2000):
        if n % 100 == 0:
            hot = rng.sample(host.regions, 5)
        region = rng.choice(hot)
        page = region.first + rng.choice((0, region.pages // 2, region.pages - 1))
        await host.ask(region.function, page, rng.randrange(2), is_prefetch=rng.randrange(8) == 0)
        if rng.randrange(30) == 0:
            await host.ask(region.function, page | 1 << rng.randrange(45, 52), 0)
        if rng.randrange(12) == 0:
            changed.append(rng.choice(hot))
            host.change(changed[-1])
        if changed and rng.randrange(8) == 0:
            region = changed.pop(0)
            await host.forget(region if region.pages == 1 else None)
        if rng.randrange(60) == 0:
            host.keeps_clean = not host.keeps_clean
            host.fails = rng.choice((0, 0, 5))
        if rng.randrange(60) == 0:
            host.enable(rng.choice((7, 7, 3, 6)))
            await host.forget()
        if rng.randrange(4) == 0:
            await ClockCycles(dut.clk, rng.randrange(20))
    await host.idle()
    assert host.answers > 1200


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_page_is_asked_for_once(dut):
    """ATS-CACHE-2: requests for a page that is asked for wait for its answer; a second request follows only for a write behind NW; what is
    cached, also in larger pages and by a prefetch, is answered after 2 cycles without one, a miss 8 after the host; a page
    without permission is not cached."""
    host = await Host(dut, random.Random(cocotb.RANDOM_SEED), latency=40).begin()
    host.keeps_clean = True
    free = {"readable": True, "writable": True, "untranslated_only": False}
    small, large, none = host.map(0, 5, 1), host.map(0, 1 << 18, 512), host.map(1, 5, 1)
    for region, fields in ((small, free), (large, free), (none, free | {"readable": False, "writable": False})):
        region.history.clear()
        host.change(region, **fields)
    for is_write, expected in ((0, [(0, 5, 1)]), (1, [(0, 5, 0)])):
        for _ in range(8):
            await host.ask(0, 5, is_write)
        await host.idle()
        assert host.sent == expected
        host.sent.clear()
    await host.ask(0, (1 << 18) + 7, 1, is_prefetch=1)
    await ClockCycles(dut.clk, 100)
    assert host.sent == [(0, (1 << 18) + 7, 0)]
    for page in range(1 << 18, (1 << 18) + 512, 5):
        await host.ask(0, page, page & 1)
        await RisingEdge(dut.clk)
        await ReadOnly()
        assert host.response.read_valid()
        await host.idle()
    assert len(host.sent) == 1
    for _ in range(3):
        for _ in range(4):
            await host.ask(1, 5, 0)
        await host.idle()
    assert host.sent[1:] == [(1, 5, 1)] * 3
    host.latency = 1  # it answers in the next cycle
    await host.ask(1, 5, 0)
    taken = cycle()
    await host.idle()
    assert cycle() - taken == 8 + 1


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def more_pages_than_requests(dut):
    """ATS-CACHE-4: pages beyond the requests in flight wait until one of those is over, also when all of them end at once; a hit passes."""
    host = await Host(dut, random.Random(cocotb.RANDOM_SEED), latency=1).begin()
    for page in range(16):
        host.change(host.map(2, page, 1), readable=True, writable=True)
    await host.ask(2, 0, 1)
    await host.idle()
    host.hold = True
    for page in range(1, 16):
        await host.ask(2, page, 1, cookie=page)
    await ClockCycles(dut.clk, 30)
    assert len(host.sent) == 1 + params()["requests"]
    answers = host.answers
    await host.ask(2, 0, 0, cookie=WAITING - 1)
    await ClockCycles(dut.clk, 4)
    assert host.answers == answers + 1
    host.hold = False
    await host.idle()
    assert len(host.sent) == 16


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def answers_are_forgotten_too(dut):
    """ATS-CACHE-5: mappings change and all is forgotten while answers come, each for several requests: who asks after that gets none."""
    host = await Host(dut, random.Random(cocotb.RANDOM_SEED), latency=12).begin()
    rng = host.rng
    for page in range(6):
        host.map(2, page, 1)

    async def ask(count):
        for _ in range(count):
            await host.ask(2, rng.randrange(6), rng.randrange(2))

    for _ in range(200):
        host.hold = True
        await ask(10)
        host.hold = False
        more = cocotb.start_soon(ask(16))
        await ClockCycles(dut.clk, rng.randrange(24))
        for region in host.regions:
            host.change(region, readable=True, writable=True, untranslated_only=False)
        await host.forget()
        await more
        await host.idle()


def test_parameters():
    """ATS-CACHE-3: sizes that cannot be are refused with a sentence."""
    for bad, message in (({"entries": 24}, "not 24"), ({"requests": 0}, "not 0"), ({"requests": 17}, "not 17"), ({"waiting": 1}, "not 1")):
        with pytest.raises(ValueError, match=message):
            TranslationCache(**({"width": 64} | bad))


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def prefetches_leave_room(dut):
    """ATS-CACHE-6: of pages prefetched while there is something to spare none is lost; one request, if there are two, is left to others."""
    host = await Host(dut, random.Random(cocotb.RANDOM_SEED), latency=1).begin()
    for page in range(16):
        host.change(host.map(2, page, 1), readable=True, writable=True)
    host.hold = True

    async def prefetch():
        for page in range(15):
            await RisingEdge(dut.clk)
            while not dut.spare.value:
                await RisingEdge(dut.clk)
            await host.ask(2, page, 1, is_prefetch=1)

    done = cocotb.start_soon(prefetch())
    await ClockCycles(dut.clk, 100)
    assert len(host.sent) == max(params()["requests"] - 1, 1)
    await host.ask(2, 15, 1)
    await ClockCycles(dut.clk, 20)
    assert ((2, 15, 0) in host.sent) == (params()["requests"] > 1)
    host.hold = False
    await done
    await host.idle()
    await ClockCycles(dut.clk, 100)
    if params()["requests"] > 1:
        assert sorted(host.sent) == [(2, page, 0) for page in range(16)]
