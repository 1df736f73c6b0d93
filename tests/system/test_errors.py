"""Errors on the whole card: each row of the table gives the completion, the status bits, the log and the message that the model says."""

import random
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.aer import Cause, Message, report, report_to_all
from ringwall.models.config_space import ConfigSpace
from ringwall.models.host import ConfigRead, ConfigWrite, Fault
from ringwall.models.tlp import CplStatus, Tlp, TlpType, decode, encode, memory_read, memory_write
from ringwall.sim.card import Card, bench_card, bench_config
from ringwall.sim.linux.judge import describe_functions
from ringwall.sim.run import run

LIMITS = {"timeout_time": 4, "timeout_unit": "ms"}
PARTS = 2  # simulations that the tests are dealt out to
PROBE = 0x00F8  # requester ID of requests that no software of the host makes
NOWHERE = 0x7_0000_0000  # no BAR is here
PM, EXPRESS, AER = 0x01, 0x10, 0x0001  # capability IDs
ALL = None
COMMAND_MEMORY, COMMAND_MASTER, COMMAND_PARITY, COMMAND_SERR = 2, 4, 1 << 6, 1 << 8
WAIT = 400  # cycles in which all functions have surely reported an error
EVERY = 0xFFFF_FFFF
FATAL = 0x0046_2010


@pytest.mark.parametrize("part", range(PARTS))
def test_errors(request, part):
    tests = [name for name, value in globals().items() if type(value).__name__ == "TestGenerator"]
    run(bench_card(), module=__name__, node=request.node.nodeid, sim="verilator", testcase=tests[part::PARTS])


# Settings: bits of Command, Device Control, uncorrectable mask, severity, correctable mask.
SETTINGS = {
    "all": (COMMAND_PARITY, 0xF, 0, FATAL, 0),
    "advisory is masked": (0, 0xF, 0, FATAL, 1 << 13),
    "uncorrectable is masked": (COMMAND_PARITY | COMMAND_SERR, 0xF, EVERY, FATAL, 0),
    "the other severity": (COMMAND_PARITY, 0xF, 0, ~FATAL & EVERY, 0),
    "system errors only": (COMMAND_SERR, 0, 0, FATAL, 0),
    "without UR": (0, 7, 0, FATAL, 0),
}


class Bench:
    """A card, the model of its configuration spaces, and TLPs that only a hostile host sends."""

    def __init__(self, card):
        self.card, self.port, self.rng = card, card.port, card.rng
        self.spaces = [ConfigSpace(description) for description in describe_functions(card.config)]
        self.places = [(info.capabilities[EXPRESS][0], info.ext_capabilities[AER][0]) for info in card.functions]
        self.answers, self._tag, self._host = [], 0, card.link.on_receive
        self.checked = 0
        card.link.on_receive = self._received

    def _received(self, when, dwords):
        if dwords[0] >> 25 & 0x1F == 0b00101 and dwords[2] >> 16 == PROBE:
            self.answers.append(decode(dwords))
        else:
            self._host(when, dwords)

    async def write(self, function, offset, size, value):
        """Software writes; the model sees it, too."""
        await self.port.perform(ConfigWrite(function, offset, size, value))
        self.spaces[function].write(offset, size, value)

    async def begin(self):
        """Make model and card agree: no error is noted."""
        for n in range(len(self.spaces)):
            for offset, size in ((4, 2), (self.places[n][0] + 8, 2)):
                self.spaces[n].write(offset, size, await self.port.perform(ConfigRead(n, offset, size)))
        await self.clear()
        self.card.host.messages.clear()
        await self.check(ALL, "in the beginning", [])
        return self

    async def settle(self, name, functions=ALL):
        command, control, mask, severity, correctable = SETTINGS[name]
        for n in range(len(self.spaces)) if functions is ALL else functions:
            express, aer = self.places[n]
            await self.write(n, 4, 2, COMMAND_MEMORY | COMMAND_MASTER | command)
            await self.write(n, express + 8, 2, self.spaces[n].read(express + 8, 2) & ~0xF | control)
            for at, value in ((8, mask), (0xC, severity), (0x14, correctable)):
                await self.write(n, aer + at, 4, value)

    async def clear(self):
        """Software clears all status."""
        for n, (express, aer) in enumerate(self.places):
            for offset, size in ((6, 2), (express + 0xA, 2), (aer + 4, 4), (aer + 0x10, 4)):
                await self.write(n, offset, size, EVERY >> 32 - 8 * size)

    async def check(self, functions, name, wanted):
        """Compare every register about errors, and the messages that came with ``wanted``: (code, those who may have sent it)."""
        for n in range(len(self.spaces)) if functions is ALL else functions:
            express, aer = self.places[n]
            for offset in (4, express + 8, *range(aer + 4, aer + 0x2C, 4)):
                got = await self.port.perform(ConfigRead(n, offset, 4))
                model = self.spaces[n].read(offset, 4)
                free = 1 << 21 if offset == express + 8 else 1 << 19 if offset == 4 else 0  # Transactions Pending, Interrupt Status
                assert (got ^ model) & ~free == 0, f"{name}: function {n} at {offset:#x} is {got:#010x}, must be {model:#010x}"
                self.checked += 1
        sent = self.card.host.messages
        left = list(wanted)
        for tlp in sent:
            assert (tlp.type, tlp.message_routing, tlp.tc, tlp.tag, tlp.length_dw) == (TlpType.MSG, 0, 0, 0, 0), f"{name}: {tlp}"
            found = [item for item in left if item[0] == tlp.message_code and tlp.requester_id - (self.card.host.bus << 8) in item[1]]
            assert found, f"{name}: {tlp} must not be, only {left}"
            left.remove(found[0])
        assert not left, f"{name}: {left} were not sent"
        sent.clear()

    def expect(self, cause, functions, header):
        """Let the model find an error; returns the messages that there must be."""
        if functions is ALL:
            return list(report_to_all(self.spaces, cause, header).items())
        found = [(report(self.spaces[n], cause, header), {n}) for n in functions]
        return [(message, who) for message, who in found if message is not None]

    async def probe(self, name, tlp, cause, function=ALL, status=None, *, dwords=None):
        """Send ``tlp`` (as ``dwords``): the card answers with ``status`` or not at all, and does what the model does for ``cause``."""
        self._tag = (self._tag + 1) % 256
        if not tlp.type.is_completion:
            tlp = replace(tlp, requester_id=PROBE, tag=self._tag)
        words = dwords(encode(tlp)) if dwords else encode(tlp)
        header = words[: 4 if words[0] >> 29 & 1 else 3]
        self.answers.clear()
        self.card.link.send(words)
        wanted = self.expect(cause, ALL if function is ALL else [function], header)
        await ClockCycles(self.card.dut.clk, WAIT)
        await self.check(ALL, name, wanted)
        found = [(answer.status, answer.tag, answer.data) for answer in self.answers]
        assert found == ([] if status is None else [(status, self._tag, b"")]), f"{name}: answered with {found}"
        await self.clear()


def rows(bench):
    """Yield what is sent and what it is: name, TLP, cause, function or ALL, status of the answer; perhaps how its dwords are spoilt."""
    rng, disk = bench.rng, bench.card.functions[1]
    bar = disk.bars[0].address
    one = {"requester_id": 0, "tag": 0}
    part = {"length_dw": 1, "first_be": 15}
    unanswered, answered, ur, ca = Cause.UNSUPPORTED_POSTED, Cause.UNSUPPORTED_NON_POSTED, CplStatus.UR, CplStatus.CA
    yield "read of no BAR", memory_read(NOWHERE, 8, **one), answered, ALL, ur
    yield "write to no BAR", memory_write(NOWHERE + 0x444, b"1234", requester_id=0), unanswered, ALL, None
    yield "configuration of an absent function", Tlp(TlpType.CFGRD0, completer_id=0x0105, register=0x44, **part), answered, ALL, ur
    yield "configuration of type 1", Tlp(TlpType.CFGWR1, completer_id=0x0101, register=4, data=bytes(4), **part), answered, ALL, ur
    yield "I/O", Tlp(TlpType.IORD, address=0x1000, **part), answered, ALL, ur
    yield "locked read of a BAR", Tlp(TlpType.MRDLK, address=bar, **part), answered, 1, ur
    yield "AtomicOp on a BAR", Tlp(TlpType.FETCHADD, address=bar + 8, data=bytes(4), **part), answered, 1, ur
    yield "interrupt message", Tlp(TlpType.MSG, message_code=0x20, message_routing=4, address=rng.getrandbits(64)), unanswered, ALL, None
    yield "message of a vendor, type 0", Tlp(TlpType.MSG, message_code=0x7E, message_routing=3, tc=1), unanswered, ALL, None
    yield "read too long for registers", memory_read(bar, 256, **one), Cause.ABORTED_NON_POSTED, 1, ca
    poisoned = Cause.POISONED_REQUEST
    yield "poisoned write", replace(memory_write(bar + 0x14, b"\xff", requester_id=0), poisoned=True), poisoned, 1, None
    yield "poisoned configuration write", Tlp(TlpType.CFGWR0, completer_id=0x0102, register=0x3C, data=b"\x55" * 4, poisoned=True,
                                              **part), poisoned, 2, ur  # fmt: skip
    yield "poisoned write to no BAR", replace(memory_write(NOWHERE, bytes(8), requester_id=0), poisoned=True), unanswered, ALL, None
    completion = Tlp(TlpType.CPLD, completer_id=0, requester_id=0x0102, tag=77, byte_count=64, length_dw=16, data=rng.randbytes(64))
    unexpected = Cause.UNEXPECTED_COMPLETION
    yield "completion of a free tag", completion, unexpected, 2, None
    yield "completion for an absent function", replace(completion, requester_id=0x0107), unexpected, ALL, None
    yield "completion for another bus", replace(completion, requester_id=0x0201, status=ca, type=TlpType.CPL, data=b"", length_dw=0), \
        unexpected, ALL, None  # fmt: skip
    bad = Cause.MALFORMED
    write, read = memory_write(bar + 0x14, rng.randbytes(100), requester_id=0), memory_read(bar, 16, **one)
    yield "payload too short", write, bad, ALL, None, lambda words: words[:-1]
    yield "payload too long", write, bad, ALL, None, lambda words: [*words, *range(40)]
    yield "payload of a read", read, bad, ALL, None, lambda words: [*words, 1]
    yield "completion too long", completion, bad, ALL, None, lambda words: [*words, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    yield "completion too short", completion, bad, ALL, None, lambda words: words[:-1]
    yield "short completion too long", replace(completion, data=b"", length_dw=0, type=TlpType.CPL), bad, ALL, None, lambda words: [*words, 1]
    yield "reserved type", read, bad, ALL, None, lambda words: [words[0] | 0x1F << 24, *words[1:]]
    yield "reserved format", read, bad, ALL, None, lambda words: [words[0] | 5 << 29, *words[1:]]
    yield "last byte enables of one dword", replace(memory_read(bar, 4, **one), last_be=1), bad, ALL, None
    yield "no first byte enables", replace(read, first_be=0), bad, ALL, None
    yield "gaps in byte enables", replace(write, first_be=5), bad, ALL, None
    yield "across 4 KiB", replace(read, address=bar + 0xFF8), bad, ALL, None
    yield "write across 4 KiB", replace(write, address=bar + 0xFA0), bad, ALL, None
    yield "over Max_Payload_Size", memory_write(bar, rng.randbytes(260), requester_id=0), bad, ALL, None
    yield "traffic class of configuration", Tlp(TlpType.CFGRD0, completer_id=0x0101, tc=3, **part), bad, ALL, None
    yield "configuration of two dwords", Tlp(TlpType.CFGRD0, completer_id=0x0101, length_dw=2, first_be=15), bad, ALL, None
    yield "traffic class of a message", Tlp(TlpType.MSG, message_code=0x19, message_routing=3, tc=3), bad, ALL, None


async def begin(dut):
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED, latency=60).begin()
    return card, await Bench(card).begin()


@cocotb.test(**LIMITS)
@cocotb.parametrize(name=list(SETTINGS))
async def every_row_is_reported(dut, name):
    """SYS-ERR-1 (R34, R37, R40): each wrong request, completion and malformed TLP: completion, all status, pointer, log, message; per setting."""
    card, bench = await begin(dut)
    await bench.settle(name)
    for row, *rest in rows(bench):
        spoilt = {"dwords": rest.pop()} if len(rest) > 4 else {}
        await bench.probe(row, *rest, **spoilt)
    assert bench.checked > 1000
    card.finish()
