"""Errors beside a configuration space: every report against a second reading of the rules, typed here from the specification."""

import random

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.function.description import AerCapability, FunctionDescription, PcieCapability
from ringwall.rtl.function.errors import Errors
from ringwall.rtl.function.layouts import ErrorKind, ErrorMessage, ErrorReport
from ringwall.rtl.tlp.layouts import ConfigRequest, ConfigResponse
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, start, unpack

FUNCTIONS = (
    FunctionDescription(vendor_id=1, device_id=1, class_code=0, reports_errors=True, extended=(AerCapability(),)),
    FunctionDescription(vendor_id=1, device_id=2, class_code=0, reports_errors=True),
    FunctionDescription(vendor_id=1, device_id=3, class_code=0),
    FunctionDescription(vendor_id=1, device_id=4, class_code=0, reports_errors=True, extended=(AerCapability(),),
                        capabilities=(PcieCapability(at=0x80),)),
)  # fmt: skip
PCIE = (0x40, 0x40, 0x40, 0x80)
HAS_AER, REPORTS = (True, False, False, True), (True, True, False, True)
STATUS, MASK, SEVERITY, COR_STATUS, COR_MASK, CONTROL, LOG = 0x104, 0x108, 0x10C, 0x110, 0x114, 0x118, 0x11C
FATAL_BY_DEFAULT = 1 << 4 | 1 << 13 | 1 << 17 | 1 << 18 | 1 << 22
COR, NONFATAL, FATAL = 0x30, 0x31, 0x33

# Fmt and Type in the first dword: memory write, memory read, message, configuration write, completion with and without data.
WRITE, READ, MESSAGE, CONFIG_WRITE, COMPLETION_DATA, COMPLETION = 0x60, 0x20, 0x34, 0x44, 0x4A, 0x0A
# What the table of the specification says: kind, its bit, TLP, whether it is advisory when not fatal, bits of Status.
UNCORRECTABLE = (
    (ErrorKind.UNSUPPORTED, 20, READ, True, 0), (ErrorKind.UNSUPPORTED, 20, CONFIG_WRITE, True, 0),
    (ErrorKind.UNSUPPORTED, 20, WRITE, False, 0), (ErrorKind.UNSUPPORTED, 20, 0x40, False, 0),
    (ErrorKind.UNSUPPORTED, 20, MESSAGE, False, 0),
    (ErrorKind.UNSUPPORTED, 20, 0x4D, True, 0), (ErrorKind.UNSUPPORTED, 20, 0x00, True, 0),
    (ErrorKind.COMPLETER_ABORT, 15, READ, True, 1 << 11), (ErrorKind.COMPLETER_ABORT, 15, WRITE, False, 1 << 11),
    (ErrorKind.UNEXPECTED_COMPLETION, 16, COMPLETION, True, 0),
    (ErrorKind.COMPLETION_TIMEOUT, 14, 0, False, 0),
    (ErrorKind.POISONED, 12, WRITE, True, 1 << 15), (ErrorKind.POISONED, 12, COMPLETION_DATA, True, 1 << 15 | 1 << 8),
    (ErrorKind.MALFORMED, 18, WRITE, False, 0), (ErrorKind.OVERFLOW, 17, 0, False, 0), (ErrorKind.FLOW_CONTROL, 13, 0, False, 0),
    (ErrorKind.DATA_LINK, 4, 0, False, 0), (ErrorKind.INTERNAL, 22, 0xFF, False, 0),
)  # fmt: skip
CORRECTABLE = (
    (ErrorKind.RECEIVER, 0), (ErrorKind.BAD_TLP, 6), (ErrorKind.BAD_DLLP, 7), (ErrorKind.REPLAY_ROLLOVER, 8),
    (ErrorKind.REPLAY_TIMEOUT, 12), (ErrorKind.CORRECTED_INTERNAL, 14),
)  # fmt: skip
STATUS_ONLY = ((ErrorKind.RECEIVED_TARGET_ABORT, 1 << 12), (ErrorKind.RECEIVED_MASTER_ABORT, 1 << 13))


class Unit(wiring.Component):
    """Configuration space with its errors."""

    requests: In(stream.Signature(ConfigRequest))
    responses: Out(stream.Signature(ConfigResponse))
    reports: In(stream.Signature(ErrorReport))
    messages: Out(stream.Signature(ErrorMessage))

    def elaborate(self, platform):
        m = Module()
        m.submodules.space = space = ConfigSpace(functions=FUNCTIONS)
        m.submodules.errors = errors = Errors(functions=FUNCTIONS)
        for source, sink in (
            (wiring.flipped(self.requests), space.requests), (space.responses, wiring.flipped(self.responses)),
            (wiring.flipped(self.reports), errors.reports), (errors.messages, wiring.flipped(self.messages)),
            (errors.updates, space.updates),
        ):  # fmt: skip
            wiring.connect(m, source, sink)
        m.d.comb += [theirs.eq(ours) for theirs, ours in zip(errors.state, space.state)]
        m.d.comb += errors.present.eq(-1)
        return m


def test_errors(request):
    run(Unit(), module=__name__, node=request.node.nodeid)


def test_functions_are_checked():
    """FUNC-ERR-1: a card without functions is refused with a sentence."""
    with pytest.raises(ValueError, match="between 1 and 8, not 0"):
        Errors(functions=())


class Expected:
    """The registers of one function, and what a report does to them, step by step as the specification's flow chart."""

    def __init__(self, number):
        self.number, self.has_aer = number, HAS_AER[number]
        self.command = self.status = self.device_control = self.device_status = 0
        self.uncorrectable = self.correctable = self.pointer = 0
        self.mask, self.severity, self.correctable_mask = (0x400000, 0x462010, 0x6000) if self.has_aer else (0, FATAL_BY_DEFAULT, 0)
        self.log = [0, 0, 0, 0]

    def dwords(self):
        pcie = PCIE[self.number]
        shown = {4: self.command | 0x100000 | self.status << 16, pcie + 8: self.device_control | self.device_status << 16}
        if self.has_aer:
            shown |= {
                STATUS: self.uncorrectable, MASK: self.mask, SEVERITY: self.severity, COR_STATUS: self.correctable,
                COR_MASK: self.correctable_mask, CONTROL: self.pointer, **{LOG + 4 * n: dword for n, dword in enumerate(self.log)},
            }  # fmt: skip
        return shown

    def happens(self, row, header):
        """Return the code of the message that is sent, or None."""
        if row in STATUS_ONLY:
            self.status |= row[1]
            return None
        if row in CORRECTABLE:
            self.device_status |= 1
            return self.correctable_happens(row[1], False)
        kind, bit, _, is_advisory, status = row
        if not self.command >> 6 & 1:
            status &= ~(1 << 8)  # Master Data Parity needs Parity Error Response
        self.status |= status
        is_fatal, is_unsupported = self.severity >> bit & 1, kind is ErrorKind.UNSUPPORTED
        if is_unsupported:
            self.device_status |= 8
        if is_advisory and not is_fatal:
            self.device_status |= 1
            if not self.correctable_mask >> 13 & 1:
                self.record(bit, header)
            return self.correctable_happens(13, is_unsupported)
        self.device_status |= 4 if is_fatal else 2
        self.record(bit, header)
        if self.mask >> bit & 1:
            return None
        serr, enable = self.command >> 8 & 1, self.device_control >> (2 if is_fatal else 1) & 1
        if is_unsupported and not self.device_control >> 3 & 1:
            enable = 0
        if serr:
            self.status |= 1 << 14
        return (FATAL if is_fatal else NONFATAL) if serr or enable else None

    def record(self, bit, header):
        if not self.has_aer:
            return
        if not self.mask >> bit & 1 and not self.uncorrectable >> self.pointer & 1:
            self.pointer, self.log = bit, header
        self.uncorrectable |= 1 << bit

    def correctable_happens(self, bit, is_unsupported):
        if self.has_aer:
            self.correctable |= 1 << bit
            if self.correctable_mask >> bit & 1:
                return None
        enables = self.device_control
        return COR if enables & 1 and (enables & 8 or not is_unsupported) else None


class Bench:
    def __init__(self, dut, rng):
        self.dut, self.rng = dut, rng
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.reports, self.messages = Stream(dut, "reports"), Stream(dut, "messages")
        self.expected, self.sent, self.wanted, self.cycles = [Expected(n) for n in range(len(FUNCTIONS))], [], [], []
        cocotb.start_soon(self.responses.watch([]))
        cocotb.start_soon(self.messages.watch(self.sent, self.cycles))

    async def access(self, function, at, value=None, enables=15):
        await self.requests.put(pack(ConfigRequest, function=function, bus=0x77, device=function + 1, register=at // 4,
                                     is_write=value is not None, byte_enable=enables, data=value or 0))  # fmt: skip
        return unpack(ConfigResponse, await self.responses.get()).data

    async def configure(self, function, *, command, control, mask=0, severity=0, correctable_mask=0):
        """Set what decides about errors."""
        model = self.expected[function]
        model.command, model.device_control = command & 0x140, control & 0xF
        await self.access(function, 4, model.command, 3)
        await self.access(function, PCIE[function] + 8, model.device_control, 3)
        if model.has_aer:
            model.mask, model.severity, model.correctable_mask = mask & 0x57F010, severity & 0x57F010, correctable_mask & 0x71C1
            for at, value in ((MASK, model.mask), (SEVERITY, model.severity), (COR_MASK, model.correctable_mask)):
                await self.access(function, at, value)

    async def clear(self, function, *, uncorrectable, everything=False):
        """Write ones to status bits."""
        model = self.expected[function]
        if model.has_aer:
            model.uncorrectable &= ~uncorrectable
            await self.access(function, STATUS, uncorrectable)
        if everything:
            model.correctable = model.status = model.device_status = 0
            await self.access(function, 4, 0xFFFF0000, 12)
            await self.access(function, PCIE[function] + 8, 0xFFFF0000, 12)
            if model.has_aer:
                await self.access(function, COR_STATUS, 0xFFFFFFFF)

    async def report(self, function, row, is_for_all=False):
        tlp = row[2] if row in UNCORRECTABLE else self.rng.getrandbits(8)
        header = [tlp << 24 | self.rng.getrandbits(24), *(self.rng.getrandbits(32) for _ in range(3))]
        if tlp == 0 and row in UNCORRECTABLE and row[0] is not ErrorKind.UNSUPPORTED:
            header = [0, 0, 0, 0]
        elif tlp == 0xFF and row in UNCORRECTABLE:
            header = [0xFFFFFFFF] * 4
        codes = set()
        for n in range(len(FUNCTIONS)) if is_for_all else [function]:
            if n < len(FUNCTIONS) and REPORTS[n]:
                code = self.expected[n].happens(row, header)
                if code is not None and code not in codes:
                    codes.add(code)
                    self.wanted.append((0x77 << 8 | (n + 1) << 3 | n, code))
        await self.reports.put(pack(ErrorReport, function=function, is_for_all=is_for_all, kind=row[0].value,
                                    header=sum(dword << 32 * n for n, dword in enumerate(header))))  # fmt: skip

    async def rest(self):
        """Wait until no report is at work."""
        await ClockCycles(self.dut.clk, 1)
        while int(self.dut.reports__ready.value) == 0:
            await ClockCycles(self.dut.clk, 1)

    async def check(self, functions=(0, 1, 3)):
        for n in functions:
            for at, wanted in self.expected[n].dwords().items():
                got = await self.access(n, at)
                if at == PCIE[n] + 8:
                    got &= 0xF000F
                assert got == wanted, f"function {n} offset {at:#x}: {got:#x}, must be {wanted:#x}"
        messages = [(message.requester_id, message.code) for message in (unpack(ErrorMessage, word) for word in self.sent)]
        assert messages == self.wanted


async def begin(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "requests", "reports")
    bench = Bench(dut, rng)
    for n in range(len(FUNCTIONS)):
        await bench.access(n, 0x10, 0)  # says its bus number
        await bench.configure(n, command=0, control=0, mask=0x400000, severity=0x462010, correctable_mask=0x6000)
    return bench, rng


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def every_row_is_reported(dut):
    """FUNC-ERR-2: each kind of error under the settings that Linux makes, with and without AER: status, pointer, log, message."""
    bench, _ = await begin(dut)
    bench.messages.set_ready(1)
    seen = set()
    for n in (0, 1):
        for correctable_mask in (0, 0x2000) if n == 0 else (0,):
            for row in (*UNCORRECTABLE, *CORRECTABLE, *STATUS_ONLY):
                await bench.configure(n, command=0x40, control=0xF, severity=0x462010, correctable_mask=correctable_mask)
                await bench.report(n, row)
                await bench.access(2, 0)
                await bench.check([n])
                seen |= {code for _, code in bench.wanted}
                await bench.clear(n, uncorrectable=0xFFFFFFFF, everything=True)
    assert seen == {COR, NONFATAL, FATAL}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def random_errors_do_what_the_rules_say(dut):
    """FUNC-ERR-3: random errors of all, some and absent functions under random masks, severities, enables and clears of software."""
    bench, rng = await begin(dut)
    task = cocotb.start_soon(random_ready(bench.messages, rng))
    rows = (*UNCORRECTABLE, *UNCORRECTABLE, *CORRECTABLE, *STATUS_ONLY)
    for round in range(90):
        n = rng.choice([0, 0, 1, 3])
        some = [rng.choice([0, 0xFFFFFFFF, rng.getrandbits(32)]) for _ in range(3)]
        await bench.configure(n, command=rng.getrandbits(16), control=rng.choice([15, rng.getrandbits(4)]), mask=some[0],
                              severity=rng.choice([0x462010, some[1]]), correctable_mask=some[2])  # fmt: skip
        if rng.random() < 0.6:
            pointed = 1 << bench.expected[n].pointer
            await bench.clear(n, uncorrectable=rng.choice([0xFFFFFFFF, pointed, rng.getrandbits(32)]), everything=rng.random() < 0.5)
        for _ in range(rng.randrange(1, 5)):
            await bench.report(rng.choice([n, n, 2, 7, 255]) if rng.random() < 0.3 else n, rng.choice(rows), rng.random() < 0.15)
        await bench.rest()
        if round % 3 == 0:
            await bench.check()
    task.cancel()
    assert {code for _, code in bench.wanted} == {COR, NONFATAL, FATAL}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_log_is_never_torn(dut):
    """FUNC-ERR-4: software clears and reads at any moment of a report: the pointer's header is the one of its bit, and nothing is lost."""
    bench, _ = await begin(dut)
    bench.messages.set_ready(1)
    timeout, malformed = (next(row for row in UNCORRECTABLE if row[1] == bit) for bit in (14, 18))
    for moment in range(0, 80, 3):
        await bench.clear(0, uncorrectable=0xFFFFFFFF)
        await bench.report(0, timeout)
        await bench.access(0, 0)
        await bench.report(0, malformed)
        header = bench.expected[0].log
        await ClockCycles(dut.clk, 1 + moment)
        await bench.access(0, STATUS, 1 << 14)  # in front of the malformed TLP, or behind it
        await bench.rest()
        assert await bench.access(0, STATUS) == 1 << 18
        pointer, dword = await bench.access(0, CONTROL), await bench.access(0, LOG)
        assert pointer in (14, 18)
        assert (dword == 0) == (pointer == 14)
        assert header == [0, 0, 0, 0]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def software_goes_on_under_a_flood(dut):
    """FUNC-ERR-5 (R34): reports as fast as they are taken: an access waits for one at most; a message takes at most 64 cycles."""
    bench, rng = await begin(dut)
    await bench.configure(0, command=0x100, control=0xF)
    begun = []

    async def flood():
        while True:
            await bench.report(0, rng.choice(UNCORRECTABLE[:5]))
            begun.append(cycle())

    task = cocotb.start_soon(flood())
    bench.messages.set_ready(1)
    for _ in range(40):
        before = cycle()
        await bench.access(0, rng.choice([0, 4, STATUS, LOG]))
        assert cycle() - before <= 64
    bench.messages.set_ready(0)  # nobody takes messages: software does not notice
    for _ in range(10):
        before = cycle()
        await bench.access(0, STATUS)
        assert cycle() - before <= 64
    await ClockCycles(dut.clk, 300)
    taken = len(begun)
    await ClockCycles(dut.clk, 300)
    assert len(begun) == taken
    task.cancel()
    latencies = [min(at - since for since in begun if since <= at) for at in bench.cycles]
    assert len(latencies) > 10
    assert max(latencies) <= 64
    bench.messages.set_ready(1)
