"""The gate between clients, a translator that answers late and in any order, and a requester that retires late."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge, Timer

from ringwall.rtl.iommu.gate import Gate
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.spec.riscv_iommu import MRIF_LOG2
from ringwall.rtl.tlp.layouts import DIVERTED, AtomicKind, Burst, BurstRetired, BurstStatus, ConfigState, Hint
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, start, unpack


def device_id(function):
    return 0x42 << 8 | 1 << 3 | function


@pytest.mark.parametrize("clients, functions", [(1, 1), (6, 3)])
def test_gate(request, clients, functions):
    run(Gate(clients=clients, functions=functions), module=__name__, node=request.node.nodeid,
        params={"clients": clients, "functions": functions, "depth": 8},
        testcase=["random_traffic", "fences_wait_for_what_entered", "latency_and_rate"])  # fmt: skip


def test_gate_isolation(request):
    run(Gate(clients=3, functions=2), module=__name__, node=request.node.nodeid, params={"clients": 3, "functions": 2, "depth": 8},
        testcase=["a_miss_holds_up_nobody_else", "bypassed_bursts_need_no_translator", "hints_wait_for_the_translator"])  # fmt: skip


def test_gate_files(request):
    run(Gate(clients=3, functions=2, diverts=True), module=__name__, node=request.node.nodeid,
        params={"clients": 3, "functions": 2, "depth": 8}, testcase="dwords_to_files_are_diverted")  # fmt: skip


def test_gate_null(request):
    run(Gate(clients=2, functions=2, has_iommu=False), module=__name__, node=request.node.nodeid,
        params={"clients": 2, "functions": 2, "depth": 8}, testcase=["without_iommu_everything_passes"])  # fmt: skip


def test_gate_counts(request):
    run(Gate(clients=2, functions=2, count_bits=2), module=__name__, node=request.node.nodeid,
        params={"clients": 2, "functions": 2, "depth": 8}, testcase=["counts_never_overflow"])  # fmt: skip


def test_gate_parameters():
    """IOMMU-GATE-1: parameters out of range are refused with a sentence."""
    for bad, message in (({"clients": 0}, "Clients must be 1 to 32, not 0"), ({"clients": 33}, "Clients must be 1 to 32, not 33"),
                         ({"functions": 9}, "Functions must be 1 to 8, not 9"), ({"depth": 3}, "Depth must be a power of two"),
                         ({"count_bits": 1}, "Bits of a count must be 2 to 16, not 1"),
                         ({"late_count": True, "count_bits": 4}, "inside the gate twice, not 4 bits")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Gate(**({"clients": 2, "functions": 2} | bad))


class Bench:
    """Everything around the gate. ``answer(request)`` gives ``(latency, response fields)``; ``retire(burst)`` a latency."""

    def __init__(self, dut, rng, answer=None, retire=None):
        self.dut, self.rng, self.clients = dut, rng, params()["clients"]
        self.answer = answer or (lambda request: (2, self.mapped(request)))
        self.retire = retire or (lambda burst: 5)
        self.requests, self.out, self.out_cycles = [], [], []
        self.entered, self.entered_cycles = [[] for _ in range(self.clients)], [[] for _ in range(self.clients)]
        self.retired = []  # (cycle, function, epoch)
        self.outstanding_cookies = {}
        self.requests_ready, self.out_ready = None, None
        self.fence_cycles, self.fenced_cycles = [], []
        self.edge = RisingEdge(dut.clk)

    @staticmethod
    def mapped(request):
        return {"page": request.page ^ 0xABCDE000, "readable": 1, "writable": 1, "size_log2": 12}

    async def begin(self):
        dut = self.dut
        await start(dut)
        for f in range(params()["functions"]):
            getattr(dut, f"config__{f}").value = pack(ConfigState, bus=0x42, device=1)
        self.ports = [Stream(dut, f"bursts__{n}") for n in range(self.clients)]
        self.o = Stream(dut, "o")
        self.request, self.response = Stream(dut, "translate_request"), Stream(dut, "translate_response")
        self.fence, self.fenced = Stream(dut, "fence"), Stream(dut, "fenced")
        for n, port in enumerate(self.ports):
            cocotb.start_soon(port.watch(self.entered[n], self.entered_cycles[n]))
        cocotb.start_soon(self.o.watch(self.out, self.out_cycles))
        cocotb.start_soon(self.fence.watch([], self.fence_cycles))
        cocotb.start_soon(self.fenced.watch([], self.fenced_cycles))
        cocotb.start_soon(self.request.watch(self.requests))
        self.o.set_ready(1)
        self.request.set_ready(1)
        self.fenced.set_ready(1)
        cocotb.start_soon(self._translate())
        cocotb.start_soon(self._retire())
        return self

    async def _translate(self):
        waiting, seen = [], 0
        respond = self.response
        while True:
            for payload in self.requests[seen:]:
                request = unpack(TranslateRequest, payload)
                if request.is_prefetch:
                    continue
                assert request.cookie not in self.outstanding_cookies, "cookie is used twice"
                self.outstanding_cookies[request.cookie] = request
                latency, fields = self.answer(request)
                waiting.append((cycle() + latency - 1, pack(TranslateResponse, cookie=request.cookie, **fields), request.cookie))
            seen = len(self.requests)
            due = [item for item in waiting if item[0] <= cycle()]
            if due:
                item = self.rng.choice(due)
                waiting.remove(item)
                del self.outstanding_cookies[item[2]]
                respond._payload(item[1])
            respond._valid(int(bool(due)))
            await self.edge
            await Timer(1, "step")

    async def _retire(self):
        streams = [Stream(self.dut, name) for name in ("retired_reads", "retired_writes")]
        waiting, seen = ([], []), 0
        while True:
            for payload in self.out[seen:]:
                burst = unpack(Burst, payload)
                waiting[burst.is_write].append((cycle() + self.retire(burst), burst))
            seen = len(self.out)
            for stream, queue in zip(streams, waiting):
                due = [item for item in queue if item[0] <= cycle()]
                if due:
                    queue.remove(due[0])
                    self.retired.append((cycle(), due[0][1].cookie, due[0][1].function, due[0][1].epoch))
                    stream._payload(pack(BurstRetired, function=due[0][1].function, epoch=due[0][1].epoch))
                stream._valid(int(bool(due)))
            await self.edge
            await Timer(1, "step")

    def burst(self, client, n, function, **fields):
        """Return a burst that is told from all others by its cookie."""
        rng = self.rng
        base = {
            "address": rng.getrandbits(52) << 12 | rng.randrange(2048), "length_bytes": rng.randrange(1, 2048),
            "is_write": rng.randrange(2), "function": function, "pasid_valid": rng.randrange(2), "pasid": rng.getrandbits(20),
            "relaxed_ordering": rng.randrange(2), "no_snoop": rng.randrange(2), "client": rng.getrandbits(6), "is_wall": rng.randrange(2),
            "cookie": client << 8 | n % 256,
            "verdict": rng.choice(list(BurstStatus)), "epoch": rng.randrange(2),
        }  # fmt: skip
        base |= {"atomic": AtomicKind.NONE if base["is_write"] else rng.choice([*[AtomicKind.NONE] * 4, *AtomicKind])}
        return base | fields

    async def wait(self, condition, what, cycles=4000):
        for _ in range(cycles):
            if condition():
                return
            await self.edge
            await Timer(1, "step")
        raise AssertionError(f"waited {cycles} cycles for {what}")


def expected(burst, port, answers):
    """The fields that must leave for ``burst``; ``answers`` has the translator's word by page, device and direction, or None for bypass."""
    out = dict(burst, client=port + 1, is_wall=0, pasid_valid=0, pasid=0)
    del out["epoch"]
    out["verdict"] = BurstStatus.OK
    if answers is not None:
        is_atomic = burst["atomic"] != AtomicKind.NONE
        answer = answers[burst["address"] >> 12, burst["is_write"] | is_atomic]
        needs = ["writable"] * (burst["is_write"] | is_atomic) + ["readable"] * (1 - burst["is_write"])
        if answer.get("fault") or not all(answer[right] for right in needs):
            out["verdict"] = BurstStatus.FAULT
        else:
            out["address"] = answer["page"] << 12 | burst["address"] & 0xFFF
    return out


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def random_traffic(dut):
    """IOMMU-GATE-2 (R01, R22, R27): random clients, latencies, verdicts, bypasses: each leaves once, in order, as the translator said;
    an AtomicOp, asked for as a write, needs permission to read and to write."""
    rng = random.Random(cocotb.RANDOM_SEED)
    functions, clients, answers, asked = params()["functions"], params()["clients"], {}, []

    def answer(request):
        asked.append(request)
        fields = Bench.mapped(request) | {"fault": int(rng.random() < 0.15), "cause": 13, "readable": int(rng.random() < 0.9),
                                          "writable": int(rng.random() < 0.9)}  # fmt: skip
        answers[request.page, request.is_write] = fields
        return rng.choice([1, 2, 3, rng.randrange(1, 60)]), fields

    bench = await Bench(dut, rng, answer, lambda burst: rng.randrange(1, 80)).begin()
    bypass = rng.randrange(1, 1 << functions) if functions > 1 else 0
    dut.bypass.value = bypass
    cocotb.start_soon(random_ready(bench.o, rng, 0.7))
    cocotb.start_soon(random_ready(bench.request, rng, 0.7))
    sent = [[bench.burst(n, k, rng.randrange(functions)) for k in range(60)] for n in range(clients)]
    for n, port in enumerate(bench.ports):
        cocotb.start_soon(port.put_many([pack(Burst, **b) for b in sent[n]], lambda: rng.choice([0, 0, 0, 5])))
    await bench.wait(lambda: len(bench.out) == 60 * clients, "all bursts")
    await ClockCycles(dut.clk, 100)
    assert len(bench.out) == 60 * clients
    left = [[] for _ in range(clients)]
    for payload in bench.out:
        burst = vars(unpack(Burst, payload))
        del burst["epoch"]
        left[burst["client"] - 1].append(burst)
    for n in range(clients):
        want = [expected(b, n, None if bypass >> b["function"] & 1 else answers) for b in sent[n]]
        for k, (seen, wanted) in enumerate(zip(left[n], want, strict=True)):
            assert seen == wanted, f"client {n} burst {k}: {seen} is not {wanted}"
    translated = [b for bursts in sent for b in bursts if not bypass >> b["function"] & 1]
    by_page = {(b["address"] >> 12, b["is_write"] | (b["atomic"] != AtomicKind.NONE)): b for b in translated}
    assert len(asked) == len(by_page), "one request for each translated burst, none for bypassed ones"
    for request in asked:
        burst = by_page[request.page, request.is_write]
        assert (request.device_id, request.process_id_valid, request.process_id, request.offset, request.is_prefetch, request.execute,
                request.privileged) == (device_id(burst["function"]), burst["pasid_valid"], burst["pasid"] if burst["pasid_valid"] else 0,
                                        burst["address"] & 0xFFF, 0, 0, 0)  # fmt: skip
    assert {b["verdict"] for bursts in left for b in bursts} == {BurstStatus.OK, BurstStatus.FAULT}


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def fences_wait_for_what_entered(dut):
    """IOMMU-GATE-3: fences in a row under traffic: none is answered before all that entered before it is retired, each is answered."""
    rng = random.Random(cocotb.RANDOM_SEED)
    functions, clients = params()["functions"], params()["clients"]
    bench = Bench(dut, rng, None, lambda burst: rng.choice([1, rng.randrange(1, 200)]))
    bench.answer = lambda request: (rng.randrange(1, 30), bench.mapped(request))
    await bench.begin()
    dut.bypass.value = 1 if functions > 1 else 0
    total = 120
    sent = [[bench.burst(n, k, rng.randrange(functions)) for k in range(total)] for n in range(clients)]
    for n, port in enumerate(bench.ports):
        cocotb.start_soon(port.put_many([pack(Burst, **b) for b in sent[n]], lambda: rng.choice([0, 0, 8, 60])))
    for _ in range(12):
        await bench.fence.put()
        await ClockCycles(dut.clk, rng.randrange(1, 60))
    await bench.wait(lambda: len(bench.retired) == total * clients, "all retired", 20000)
    await bench.wait(lambda: len(bench.fenced_cycles) == 12, "all fences")
    over = {cookie: when for when, cookie, _, _ in bench.retired}
    entered = [(when, n << 8 | k) for n in range(clients) for k, when in enumerate(bench.entered_cycles[n])]
    waited = 0
    for asked, answered in zip(bench.fence_cycles, bench.fenced_cycles, strict=True):
        for when, cookie in entered:
            if when <= asked:
                assert over[cookie] <= answered, f"fence of {asked} answered at {answered}: burst {cookie:#x} is retired at {over[cookie]}"
                waited += over[cookie] > asked
        last = max([over[cookie] for when, cookie in entered if when <= asked] + [asked])
        assert answered - last <= 6, f"fence of {asked}, drained at {last}, is answered at {answered}"
    assert waited, "no fence had anything to wait for"
    later = [c for when, c in entered if any(a < when for a in bench.fence_cycles)]
    assert any(over[c] > f for c, f in ((c, f) for c in later for f in bench.fenced_cycles)), "no burst went on across a fence"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def latency_and_rate(dut):
    """IOMMU-GATE-4: a hit of 2 cycles leaves 4 cycles after it was offered; a burst per cycle from one client and over all."""
    rng = random.Random(cocotb.RANDOM_SEED)
    clients = params()["clients"]
    bench = await Bench(dut, rng, None, lambda burst: 1).begin()
    offered = cycle()
    await bench.ports[0].put(pack(Burst, **bench.burst(0, 0, 0)))
    await bench.wait(lambda: bench.out, "the burst")
    asked = bench.entered_cycles[0][0]
    assert bench.out_cycles[0] - asked == 4, f"latency of a hit {bench.out_cycles[0] - asked} cycles"
    assert asked - offered <= 1
    dut.bypass.value = 1
    await bench.ports[0].put(pack(Burst, **bench.burst(0, 1, 0)))
    await bench.wait(lambda: len(bench.out) == 2, "the bypassed burst")
    assert bench.out_cycles[1] - bench.entered_cycles[0][1] == 2
    dut.bypass.value = 0
    for ports in (1, clients):
        bench.out_cycles.clear()
        for n in range(ports):
            cocotb.start_soon(bench.ports[n].put_many([pack(Burst, **bench.burst(n, k, 0)) for k in range(100 // ports)]))
        count, before = 100 // ports * ports, len(bench.out)
        await bench.wait(lambda total=before + count: len(bench.out) == total, "the bursts")
        assert bench.out_cycles[-1] - bench.out_cycles[0] == count - 1, f"{count} bursts of {ports} clients took too long"
    await bench.fence.put()
    await bench.wait(lambda: bench.fenced_cycles, "the fence")
    assert bench.fenced_cycles[0] - bench.fence_cycles[0] <= 4


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_miss_holds_up_nobody_else(dut):
    """IOMMU-GATE-5: while all translations of client 0 take 1000 cycles, the others pass at full rate with 4 cycles of latency."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = Bench(dut, rng)
    bench.answer = lambda request: (1000 if request.device_id & 7 == 0 else 2, bench.mapped(request))
    await bench.begin()
    cocotb.start_soon(bench.ports[0].put_many([pack(Burst, **bench.burst(0, k, 0)) for k in range(20)]))
    await ClockCycles(dut.clk, 20)
    assert len(bench.entered[0]) == 8, "the gate holds 8 bursts of a client"
    for n in (1, 2):
        cocotb.start_soon(bench.ports[n].put_many([pack(Burst, **bench.burst(n, k, 1)) for k in range(60)]))
    await bench.wait(lambda: len(bench.out) == 120, "bursts of the others", 200)
    assert bench.out_cycles[-1] - bench.out_cycles[0] == 119
    assert bench.out_cycles[0] - min(bench.entered_cycles[1] + bench.entered_cycles[2]) == 4
    await bench.wait(lambda: len(bench.out) == 140, "the slow client")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def bypassed_bursts_need_no_translator(dut):
    """IOMMU-GATE-6 (R22): with the translator stuck, bursts of a bypassing function pass, per function, and are counted by fences."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng, None, lambda burst: 50).begin()
    bench.request.set_ready(0)
    dut.bypass.value = 0b10
    for n in (0, 1):
        cocotb.start_soon(bench.ports[n].put_many([pack(Burst, **bench.burst(n, k, n)) for k in range(20)]))
    await bench.wait(lambda: len(bench.out) == 20, "bypassed bursts", 60)
    assert {unpack(Burst, p).function for p in bench.out} == {1}
    assert [unpack(Burst, p).address for p in bench.out] == [unpack(Burst, p).address for p in bench.entered[1]]
    await bench.fence.put()
    await bench.wait(lambda: len(bench.retired) == 20, "the bypassed bursts' ends", 100)
    await ClockCycles(dut.clk, 50)
    assert not bench.fenced_cycles, "the burst that waits for the translator entered before the fence"
    bench.request.set_ready(1)
    await bench.wait(lambda: bench.fenced_cycles, "the fence")
    await bench.wait(lambda: len(bench.out) == 40, "translated bursts")


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def without_iommu_everything_passes(dut):
    """IOMMU-GATE-7 (R28): a build without IOMMU passes all bursts unchanged whatever ``bypass`` says, and still drains."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng, None, lambda burst: 40).begin()
    bench.request.set_ready(0)
    sent = [[bench.burst(n, k, rng.randrange(2)) for k in range(30)] for n in (0, 1)]
    for n in (0, 1):
        cocotb.start_soon(bench.ports[n].put_many([pack(Burst, **b) for b in sent[n]]))
    await bench.wait(lambda: len(bench.out) == 60, "all bursts", 100)
    for n in (0, 1):
        left = [vars(unpack(Burst, p)) for p in bench.out if unpack(Burst, p).client == n + 1]
        assert [{k: v for k, v in b.items() if k != "epoch"} for b in left] == [expected(b, n, None) for b in sent[n]]
    await bench.fence.put()
    await bench.wait(lambda: bench.fenced_cycles, "the fence", 200)
    assert len(bench.retired) == 60
    assert not bench.requests


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def counts_never_overflow(dut):
    """IOMMU-GATE-8: with counts of 2 bits a function has at most 3 bursts in flight, the other one is free to go on, and fences work."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng, None, lambda burst: 300 if burst.function == 0 else 1).begin()
    for n in (0, 1):
        cocotb.start_soon(bench.ports[n].put_many([pack(Burst, **bench.burst(n, k, n, is_write=n)) for k in range(8)]))
    await ClockCycles(dut.clk, 150)
    assert len(bench.entered[0]) == 3
    assert len(bench.entered[1]) == 8
    for _ in range(3):
        await bench.fence.put()
    await bench.wait(lambda: len(bench.fenced_cycles) == 3 and len(bench.retired) == 16, "the rest", 6000)
    over = {cookie: when for when, cookie, _, _ in bench.retired}
    for asked, answered in zip(bench.fence_cycles, bench.fenced_cycles, strict=True):
        assert all(over[k] <= answered for k, when in enumerate(bench.entered_cycles[0]) if when <= asked)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def dwords_to_files_are_diverted(dut):
    """IOMMU-GATE-9: answers that name files among others, and bypassed bursts: aligned dwords that are written are diverted, one at a time,
    with the cookie of their translation, anything else to a file is refused; until one is over its client neither leaves nor asks."""
    rng = random.Random(cocotb.RANDOM_SEED)
    count, files, cookies = 150, set(), {}

    def answer(request):
        cookies[request.page] = request.cookie
        if rng.random() < 0.25:
            files.add(request.page)
            return rng.choice([1, 2, rng.randrange(1, 40)]), {"size_log2": MRIF_LOG2}
        return rng.choice([1, 2, rng.randrange(1, 40)]), Bench.mapped(request)

    bench = await Bench(dut, rng, answer).begin()
    dut.bypass.value = 2
    cocotb.start_soon(random_ready(bench.o, rng, 0.8))
    sent = [[bench.burst(n, k, int(rng.random() < 0.2)) for k in range(count)] for n in range(3)]
    for burst in (burst for bursts in sent for burst in bursts):
        if rng.random() < 0.7:
            burst |= {"is_write": 1, "atomic": AtomicKind.NONE} if rng.random() < 0.7 else {}
            burst |= {"length_bytes": 4, "address": burst["address"] & -4 | rng.choice([0, 0, 0, 0, 1, 2])}
    for n, port in enumerate(bench.ports):
        cocotb.start_soon(port.put_many([pack(Burst, **b) for b in sent[n]], lambda: rng.choice([0, 0, 5])))
    seen, under_way, end, left, beside = 0, None, 0, [[] for _ in range(3)], 0
    while len(bench.out) < 3 * count:
        await bench.edge
        await Timer(1, "step")
        if under_way is not None and cycle() >= end:
            dut.diverted_over.value = 1
            under_way = None
        else:
            dut.diverted_over.value = 0
        for payload in bench.out[seen:]:
            burst = unpack(Burst, payload)
            assert under_way is None or burst.client != under_way.client, "a burst behind one that is not over"
            beside += under_way is not None
            left[burst.client - 1].append((burst.address, burst.verdict))
            if burst.is_write and burst.verdict == DIVERTED:
                assert under_way is None, "two at a time"
                assert int(dut.diverted.value) == cookies[burst.address >> 12]
                under_way, end = burst, cycle() + rng.choice([1, 2, 2, rng.randrange(1, 80)])
        seen = len(bench.out)
        if under_way is not None:
            assert int(dut.diverted.value) not in bench.outstanding_cookies, "asked with the cookie of a burst that is under way"
    for n in range(3):
        for burst, (address, verdict) in zip(sent[n], left[n], strict=True):
            is_file = burst["address"] >> 12 in files
            is_dword = burst["is_write"] and burst["length_bytes"] == 4 and not burst["address"] % 4
            wanted = (DIVERTED if is_dword else BurstStatus.FAULT) if is_file else BurstStatus.OK
            is_same = is_file or burst["function"] == 1
            assert (verdict, address) == (wanted, burst["address"] if is_same else burst["address"] ^ 0xABCDE000 << 12), burst
    verdicts = [verdict for bursts in left for _, verdict in bursts]
    assert min(verdicts.count(verdict) for verdict in (DIVERTED, BurstStatus.FAULT, BurstStatus.OK)) > 10 and beside > 10


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def hints_wait_for_the_translator(dut):
    """IOMMU-GATE-10: hints wait while the translator has nothing to spare, bursts do not; then each becomes a prefetch, one by one."""
    bench = await Bench(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    pages = [bench.rng.getrandbits(52) for _ in range(6)]
    hints = [pack(Hint, function=1, is_write=n % 2, page=page) for n, page in enumerate(pages)]
    told = cocotb.start_soon(Stream(dut, "hints").put_many(hints))
    for n in range(8):
        await bench.ports[0].put(pack(Burst, **bench.burst(0, n, 1, pasid_valid=0)))
        await ClockCycles(dut.clk, 8)
    assert len(bench.out) == len(bench.requests) == 8 and not told.done()
    bench.requests.clear()
    bench.request.set_ready(0)
    dut.spare.value = 1
    await ClockCycles(dut.clk, 8)
    bench.request.set_ready(1)
    await ClockCycles(dut.clk, 1)
    dut.spare.value = 0  # because of the one that was accepted
    await ClockCycles(dut.clk, 8)
    assert len(bench.requests) == 1
    dut.spare.value = 1
    await told
    await ClockCycles(dut.clk, 8)
    found = [unpack(TranslateRequest, payload) for payload in bench.requests]
    assert all(request.is_prefetch for request in found)
    assert [pack(Hint, function=1, is_write=request.is_write, page=request.page) for request in found] == hints
