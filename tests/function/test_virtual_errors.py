"""Errors of virtual functions: what they log, whose settings decide, what is not theirs, all as models.aer has it."""

import random

import cocotb
from amaranth import Const, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.models import config_space as model
from ringwall.models.aer import Cause, report_to_all
from ringwall.rtl.function import description as rtl
from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.function.errors import Errors
from ringwall.rtl.function.layouts import ErrorKind, ErrorMessage, ErrorReport
from ringwall.rtl.tlp.layouts import ConfigRequest, ConfigResponse
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, random_ready, start, unpack

# Function 0 has no AER and functions 2 and 3, function 1 has AER and functions 4 and 5.
PHYSICAL, COUNT = 2, 6
LINK = {"link_capabilities": 3 | 8 << 4 | 1 << 22, "link_status": 3 | 8 << 4, "link_capabilities_2": 0b1110,
        "timeout_ranges": 1}  # fmt: skip
OWNERS = {2: (0, 0), 3: (0, 1), 4: (1, 0), 5: (1, 1)}  # number -> physical function, which of its virtual ones
SRIOV = {0: 0x100, 1: 0x154}
AER = {1: 0x10C, 4: 0x100, 5: 0x100}
_ONE, _OTHER = [rtl.FunctionDescription(
    0x1234, n, 0x018000, reports_errors=True, capabilities=(rtl.PcieCapability(has_flr=True),),
    extended=(*aer, rtl.SriovCapability(2, 0x1111, 2 + n, is_lowest=not n)))
    for n, aer in enumerate(((), (rtl.SerialNumber(5), rtl.AerCapability())))]  # fmt: skip
FUNCTIONS = (_ONE, _OTHER, *[_ONE.virtual()] * 2, *[_OTHER.virtual()] * 2)
COMMAND, DEVICE = 0x04, 0x48
UNCORRECTABLE, MASK, SEVERITY, CORRECTABLE, CORRECTABLE_MASK, LOG = 4, 8, 12, 16, 20, 24  # in AER
# What the card says, the first byte of the TLP, and what that is to the model.
ROWS = (
    (ErrorKind.UNSUPPORTED, 0x20, Cause.UNSUPPORTED_NON_POSTED), (ErrorKind.UNSUPPORTED, 0x60, Cause.UNSUPPORTED_POSTED),
    (ErrorKind.COMPLETER_ABORT, 0x20, Cause.ABORTED_NON_POSTED), (ErrorKind.COMPLETER_ABORT, 0x60, Cause.ABORTED_POSTED),
    (ErrorKind.COMPLETER_ABORT, 0x40, Cause.ABORTED_POSTED),
    (ErrorKind.UNEXPECTED_COMPLETION, 0x4A, Cause.UNEXPECTED_COMPLETION), (ErrorKind.COMPLETION_TIMEOUT, 0x00, Cause.COMPLETION_TIMEOUT),
    (ErrorKind.POISONED, 0x60, Cause.POISONED_REQUEST), (ErrorKind.POISONED, 0x4A, Cause.POISONED_COMPLETION),
    (ErrorKind.MALFORMED, 0x60, Cause.MALFORMED), (ErrorKind.RECEIVED_TARGET_ABORT, 0x0A, Cause.RECEIVED_CA),
    (ErrorKind.RECEIVED_MASTER_ABORT, 0x0A, Cause.RECEIVED_UR),
)  # fmt: skip


def described(number):
    """The model of physical function ``number``."""
    pcie = model.pcie_capability(flr=True, **LINK, **({} if number else {"link_control_2": 3, "link_control_2_rw": 0xF}))
    aer = (model.aer_capability(uncorrectable=0x0057_F010, correctable=0x71C1, severity=0x0046_2010),) if number else ()
    serial = (model.serial_number_capability(5),) if number else ()
    known = {"class_code": 0x018000, "revision": 1, "is_multi_function": True}
    plain = model.FunctionDescription(0x1234, number, **known)
    virtual = model.virtual_function(plain, capabilities=(pcie,), ext_capabilities=aer)
    sriov = model.sriov_capability(2, first_offset=2 + number, stride=1, device=0x1111, has_ari=not number, dependency=number)
    return model.ConfigSpace(model.FunctionDescription(
        0x1234, number, capabilities=(pcie,), ext_capabilities=(*serial, *aer, sriov), virtual=virtual, **known))


class Unit(wiring.Component):
    """Configuration space with its errors; who is there is said as the card says it."""

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
        for n in range(len(FUNCTIONS)):
            owner, place = OWNERS.get(n, (n, 0))
            settings = space.settings[owner]
            m.d.comb += errors.present[n].eq(settings.vf_enable & (settings.vf_count > place) if n in OWNERS else Const(1))
        return m


def test_virtual_errors(request):
    run(Unit(), module=__name__, node=request.node.nodeid)


class Bench:
    """Software and reporters in front of the card, and the models of its functions."""

    def __init__(self, dut):
        self.dut, self.rng = dut, random.Random(cocotb.RANDOM_SEED)
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.reports, self.messages = Stream(dut, "reports"), Stream(dut, "messages")
        self.physical, self.sent, self.wanted = [described(0), described(1)], [], []

    async def begin(self):
        await start(self.dut, "requests", "reports")
        cocotb.start_soon(self.responses.watch([]))
        cocotb.start_soon(self.messages.watch(self.sent))
        cocotb.start_soon(random_ready(self.messages, self.rng))
        for n in range(PHYSICAL):
            await self.write(n, 0x3C, 0)  # says its bus number
        return self

    def model(self, function):
        """The model of a function, None while it is not there."""
        if function < PHYSICAL:
            return self.physical[function]
        if function not in OWNERS:
            return None
        owner, place = OWNERS[function]
        known = self.physical[owner].virtual_functions
        return known[place] if place < len(known) else None

    async def access(self, function, at, value=None, enables=15):
        await self.requests.put(pack(ConfigRequest, function=function, bus=9, device=2, register=at // 4, is_write=value is not None,
                                     byte_enable=enables, data=value or 0))  # fmt: skip
        answer = unpack(ConfigResponse, await self.responses.get())
        return None if answer.unsupported else answer.data

    async def write(self, function, at, value, enables=15):
        await self.access(function, at, value, enables)
        self.model(function).write_dword(at, enables, value)

    async def present(self, count):
        """Have ``count`` virtual functions of either physical one that has some; the old ones are gone."""
        for owner, at in SRIOV.items():
            await self.write(owner, at + 8, 0)
            await ClockCycles(self.dut.clk, 2500)  # they are reset
            await self.write(owner, at + 0x10, count)
            await self.write(owner, at + 8, 1)

    async def report(self, function, row, is_for_all=False):
        kind, first, cause = row
        header = [0] * 4 if cause is Cause.COMPLETION_TIMEOUT else [first << 24 | self.rng.getrandbits(24), *(
            self.rng.getrandbits(32) for _ in range(3 if first in (0x20, 0x60) else 2))]
        await self.reports.put(pack(ErrorReport, function=function, is_for_all=is_for_all, kind=kind.value,
                                    header=sum(dword << 32 * n for n, dword in enumerate(header))))  # fmt: skip
        await ClockCycles(self.dut.clk, 1)
        while int(self.dut.reports__ready.value) == 0:
            await ClockCycles(self.dut.clk, 1)
        numbers = [n for n in range(COUNT + 1) if self.model(n) is not None]
        if is_for_all:
            for code, who in report_to_all([self.model(n) for n in numbers], cause, header).items():
                self.wanted.append((code, numbers[min(who)]))
        elif self.model(function) is not None:
            code = self.model(function).report_error(cause, header)
            if code is not None:
                self.wanted.append((code, function))

    async def check(self):
        for n in range(COUNT + 1):
            known = self.model(n)
            for at in (COMMAND, DEVICE, *(range(AER[n] + UNCORRECTABLE, AER[n] + LOG + 20, 4) if n in AER else ())):
                got = await self.access(n, at)
                assert (got is None) == (known is None)
                if known is not None:
                    wanted = known.read_dword(at)
                    free = {COMMAND: 1 << 19, DEVICE: 1 << 21}.get(at, 0) | known.unspecified().get(at, 0)
                    assert (got ^ wanted) & ~free == 0, f"function {n} at {at:#x} is {got:#x}, must be {wanted:#x}"
        found = [(message.code, message.requester_id) for message in (unpack(ErrorMessage, word) for word in self.sent)]
        assert sorted(found) == sorted((code, 9 << 8 | 2 << 3 | n) for code, n in self.wanted)

    async def settle(self, function, rng):
        """Software sets what decides, at a function that may not be the one that does."""
        if self.model(function) is None:
            return
        wild = [rng.choice([0, 0xFFFF_FFFF, rng.getrandbits(32)]) for _ in range(3)]
        await self.write(function, COMMAND, rng.getrandbits(16) & 0x140 | 4, 3)
        await self.write(function, DEVICE, rng.choice([0, 15, 15, rng.getrandbits(4)]), 3)
        if function in AER:
            for at, value in zip((MASK, SEVERITY, CORRECTABLE_MASK), wild):
                await self.write(function, AER[function] + at, value)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def errors_of_virtual_functions_do_what_the_model_does(dut):
    """FUNC-ERR-6 (R40, R54): errors of VFs and of all under random settings of PF and VF: who logs, what, and whose message it is.

    Enables, masks and severities are the physical function's, whatever software writes to the virtual one's; an error of no function
    is not theirs; absent ones have none, and come without any.
    """
    bench = await Bench(dut).begin()
    rng, seen = bench.rng, set()
    for round in range(100):
        if round % 25 == 0:
            await bench.present((2, 1, 0, 9)[round // 25])
        function = rng.choice([0, 1, 2, 3, 4, 4, 5])
        await bench.settle(rng.choice([0, 1, 1, function]), rng)
        if rng.random() < 0.5 and bench.model(function) is not None:
            await bench.write(function, COMMAND, 0xFFFF_0000, 12)
            await bench.write(function, DEVICE, 0xFFFF_0000, 12)
            for at in (UNCORRECTABLE, CORRECTABLE) if function in AER else ():
                await bench.write(function, AER[function] + at, rng.getrandbits(32))
        for _ in range(rng.randrange(1, 4)):
            row = rng.choice(ROWS)
            seen.add((function, row[2]))
            await bench.report(function, row, rng.random() < 0.15)
        await bench.check()
    codes = {(code, n >= PHYSICAL) for code, n in bench.wanted}
    assert {code for code, is_virtual in codes if is_virtual} == {0x30, 0x31, 0x33}
    assert len(seen) > 50


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def an_abort_of_a_posted_request_is_not_advisory(dut):
    """FUNC-ERR-7 (R40): Completer Abort of a posted request, of either severity: ERR_NONFATAL or ERR_FATAL, that of a read: ERR_COR."""
    bench = await Bench(dut).begin()
    await bench.present(2)
    wanted = []
    for function in (1, 5):
        for severity in (0, 1 << 15):
            await bench.write(1, DEVICE, 7, 3)
            await bench.write(1, AER[1] + MASK, 0)
            await bench.write(1, AER[1] + CORRECTABLE_MASK, 0)
            await bench.write(1, AER[1] + SEVERITY, severity)
            for kind, first, cause in ROWS:
                if kind is ErrorKind.COMPLETER_ABORT:
                    await bench.write(function, AER[function] + UNCORRECTABLE, 0xFFFF_FFFF)
                    await bench.report(function, (kind, first, cause))
                    await bench.check()
                    wanted.append(0x33 if severity else 0x30 if first == 0x20 else 0x31)
    assert [code for code, _ in bench.wanted] == wanted
