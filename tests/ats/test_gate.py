"""The gate in front of a host that translates: which address type each burst gets."""

import random

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import TRANSLATED, UNTRANSLATED
from ringwall.rtl.iommu.gate import UNTRANSLATED_LOG2, Gate
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.tlp.layouts import AddressedBurst, Burst, BurstStatus
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, start, unpack

CLIENTS, MESSAGES, BYPASSED = 3, 2, 1  # a client whose bursts are interrupts; a function


def test_gate(request):
    run(Gate(clients=CLIENTS, functions=2, host_ats=True, messages=(MESSAGES,)), module=__name__, node=request.node.nodeid)


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
            self.asked.append((request.device_id, request.page))
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
            asked.append((0, page))
            answer = translator.answer(page)
        is_translated = answer.get("size_log2", UNTRANSLATED_LOG2) != UNTRANSLATED_LOG2
        if answer.get("fault") or not answer.get("writable" if was["is_write"] else "readable"):
            assert burst.verdict == BurstStatus.FAULT
        else:
            assert (burst.verdict, burst.at) == (BurstStatus.OK, TRANSLATED if is_translated else UNTRANSLATED)
            assert burst.address == answer["page"] << 12 | was["address"] % 4096
    assert not sent
    assert sorted(asked) == sorted(translator.asked)
