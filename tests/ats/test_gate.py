"""The gate in front of a host that translates: which address type each burst gets."""

import random

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import TRANSLATED, UNTRANSLATED
from ringwall.rtl.iommu.gate import UNTRANSLATED_LOG2, Gate
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.tlp.layouts import AddressedBurst, Burst, BurstStatus
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, start, unpack

CLIENTS, MESSAGES, BYPASSED = 3, 2, 1  # a client whose bursts are interrupts; a function
BITS = 8  # of a PASID


def test_gate(request):
    run(Gate(clients=CLIENTS, functions=2, host_ats=True, messages=(MESSAGES,)), module=__name__, node=request.node.nodeid,
        params={"pasid_bits": 0}, testcase=["types_follow_the_answers", "pasids_go_where_they_may"])  # fmt: skip


def test_pasid(request):
    run(Gate(clients=CLIENTS, functions=2, host_ats=True, messages=(MESSAGES,), pasid_bits=BITS), module=__name__,
        node=request.node.nodeid, params={"pasid_bits": BITS}, testcase=["pasids_go_where_they_may", "pasids_wait"])  # fmt: skip


class Translator:
    """Answers pages by their low bits: refused, untranslated, translated for both directions or for one."""

    def __init__(self, dut):
        self.asked = []
        self.request, self.response = Stream(dut, "translate_request"), Stream(dut, "translate_response")

    @staticmethod
    def answer(page):
        return {0: {"fault": 1}, 1: {"page": page, "readable": 1, "writable": 1, "size_log2": UNTRANSLATED_LOG2},
                2: {"page": page ^ 0xABCDE, "readable": 1, "size_log2": 12}}.get(page % 6, {
                    "page": page ^ 0xABCDE, "readable": 1, "writable": 1, "size_log2": 21})  # fmt: skip

    async def serve(self):
        while True:
            request = unpack(TranslateRequest, await self.request.get())
            self.asked.append((request.device_id, request.page, request.process_id if request.process_id_valid else None))
            await self.response.put(pack(TranslateResponse, cookie=request.cookie, **self.answer(request.page)))


@cocotb.test(timeout_time=200, timeout_unit="us")
async def types_follow_the_answers(dut):
    """ATS-GATE-1: a translated burst leaves with the frame and AT=10; one whose page is its own, of a function that bypasses, or of an
    interrupt, with its address and AT=00; nothing is asked for the latter two; pages without permission are refused."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut)
    dut.bypass.value = 1 << BYPASSED
    out, sent = [], {}
    o = Stream(dut, "o")
    o.set_ready(1)
    cocotb.start_soon(o.watch(out))
    translator = Translator(dut)
    cocotb.start_soon(translator.serve())

    async def issue(client, count):
        port = Stream(dut, f"bursts__{client}")
        for n in range(count):
            burst = {"address": rng.getrandbits(52) << 12 | rng.randrange(4000), "length_bytes": 8, "is_write": rng.randrange(2),
                     "function": rng.randrange(2), "cookie": client << 8 | n, "pasid": rng.getrandbits(20)}  # fmt: skip
            sent[burst["cookie"]] = burst
            await port.put(pack(Burst, **burst))

    tasks = [cocotb.start_soon(issue(client, 60)) for client in range(CLIENTS)]
    for task in tasks:
        await task
    while len(out) < len(sent):
        await RisingEdge(dut.clk)
    await ClockCycles(dut.clk, 20)
    asked = []
    for burst in (unpack(AddressedBurst, payload) for payload in out):
        was = sent.pop(burst.cookie)
        page, answer = was["address"] >> 12, {"page": was["address"] >> 12, "readable": 1, "writable": 1}
        if was["function"] != BYPASSED and burst.client != MESSAGES + 1:
            asked.append((0, page, None))
            answer = translator.answer(page)
        is_translated = answer.get("size_log2", UNTRANSLATED_LOG2) != UNTRANSLATED_LOG2
        if answer.get("fault") or not answer.get("writable" if was["is_write"] else "readable"):
            assert burst.verdict == BurstStatus.FAULT
        else:
            assert (burst.verdict, burst.at) == (BurstStatus.OK, TRANSLATED if is_translated else UNTRANSLATED)
            assert burst.address == answer["page"] << 12 | was["address"] % 4096
    assert not sent
    assert sorted(asked) == sorted(translator.asked)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def pasids_go_where_they_may(dut):
    """ATS-PASID-1: a burst with a PASID is translated for it and leaves without if translated, with it if untranslated or bypassed; one
    whose function may have none, or that is too wide, is refused unasked; interrupts leave without; a gate without PASIDs refuses all."""
    rng, bits = random.Random(cocotb.RANDOM_SEED), params()["pasid_bits"]
    await start(dut)
    dut.bypass.value = 1 << BYPASSED
    out, translator, o = [], Translator(dut), Stream(dut, "o")
    o.set_ready(1)
    cocotb.start_soon(o.watch(out))
    cocotb.start_soon(translator.serve())
    ports = [Stream(dut, f"bursts__{client}") for client in range(CLIENTS)]
    for enabled in (0b11, 0b01, 0b10):
        if bits:
            dut.pasid_enable.value = dut.pasid_usable.value = enabled
        for _ in range(150):
            client, function, pasid, page = rng.randrange(CLIENTS), rng.randrange(2), rng.getrandbits(BITS + 1), rng.getrandbits(52)
            has_pasid, is_write = rng.randrange(2), rng.randrange(2)
            out.clear()
            translator.asked.clear()
            await ports[client].put(pack(Burst, address=page << 12 | 8, length_bytes=8, is_write=is_write, function=function,
                                         pasid_valid=has_pasid, pasid=pasid))  # fmt: skip
            for _ in range(40):
                if out:
                    break
                await RisingEdge(dut.clk)
            (burst,) = (unpack(AddressedBurst, payload) for payload in out)
            is_message = client == MESSAGES
            is_refused = has_pasid and not is_message and not (bits and enabled >> function & 1 and not pasid >> bits)
            asks = function != BYPASSED and not is_message and not is_refused
            assert translator.asked == ([(0, page, pasid if has_pasid else None)] if asks else [])
            answer = translator.answer(page) if asks else {"readable": 1, "writable": 1, "size_log2": UNTRANSLATED_LOG2}
            if is_refused or answer.get("fault") or not answer.get("writable" if is_write else "readable"):
                assert burst.verdict == BurstStatus.FAULT
                continue
            is_translated = answer["size_log2"] != UNTRANSLATED_LOG2
            assert (burst.verdict, burst.at) == (BurstStatus.OK, TRANSLATED if is_translated else UNTRANSLATED)
            assert burst.pasid_valid == (has_pasid and not is_translated and not is_message)
            assert not burst.pasid_valid or burst.pasid == pasid


@cocotb.test(timeout_time=100, timeout_unit="us")
async def pasids_wait(dut):
    """ATS-PASID-2: while PASID Enable is 1 and not usable yet, bursts with a PASID wait, others pass at other ports; then they leave."""
    await start(dut)
    dut.bypass.value, dut.pasid_enable.value, dut.pasid_usable.value = 0b11, 0b11, 0b10
    out, o = [], Stream(dut, "o")
    o.set_ready(1)
    cocotb.start_soon(o.watch(out))
    waiting = cocotb.start_soon(Stream(dut, "bursts__0").put(pack(Burst, length_bytes=8, pasid_valid=1, pasid=5, cookie=1)))
    for cookie, fields in ((2, {"pasid_valid": 1, "pasid": 5, "function": 1}), (3, {})):
        await Stream(dut, "bursts__1").put(pack(Burst, length_bytes=8, cookie=cookie, **fields))
    await ClockCycles(dut.clk, 20)
    assert [unpack(AddressedBurst, payload).cookie for payload in out] == [2, 3]
    assert not waiting.done()
    dut.pasid_usable.value = 0b11
    await ClockCycles(dut.clk, 10)
    last = unpack(AddressedBurst, out[-1])
    assert (last.cookie, last.verdict, last.pasid_valid, last.pasid) == (1, BurstStatus.OK, 1, 5)
