"""Errors on the whole card: each row of the table gives the completion, the status bits, the log and the message that the model says."""

from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.aer import Cause, report, report_to_all
from ringwall.models.config_space import ConfigSpace
from ringwall.models.events import TlpSent
from ringwall.models.host import ConfigRead, ConfigWrite, Fault, MemoryRead, enable_msix
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
WAIT = 250  # cycles in which all functions have surely reported an error
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
    empty = replace(completion, data=b"", length_dw=0, type=TlpType.CPL)
    yield "short completion too long", empty, bad, ALL, None, lambda words: [*words, 1]
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


async def begin(dut, **parameters):
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED, latency=60, **parameters).begin()
    return card, await Bench(card).begin()


@cocotb.test(**LIMITS)
@cocotb.parametrize(name=list(SETTINGS))
async def every_row_is_reported(dut, name):
    """SYS-ERR-1 (R40): wrong requests and completions, malformed TLPs: completion, status, pointer, log, message; per setting."""
    card, bench = await begin(dut)
    await bench.settle(name)
    for row, *rest in rows(bench):
        spoilt = {"dwords": rest.pop()} if len(rest) > 4 else {}
        await bench.probe(row, *rest, **spoilt)
    assert bench.checked > 1000
    card.finish()


# What happens to requests of the card: causes, in their order. Of the completion that goes wrong the header is logged.
COMPLETIONS = {
    "UR": (Cause.RECEIVED_UR,),
    "CA": (Cause.RECEIVED_CA,),
    "POISON": (Cause.POISONED_COMPLETION,),
    "MISSING": (Cause.COMPLETION_TIMEOUT,),
    "DUPLICATE": (Cause.UNEXPECTED_COMPLETION,),
    "LATE": (Cause.COMPLETION_TIMEOUT, Cause.UNEXPECTED_COMPLETION),
    "WRONG_BYTE_COUNT": (Cause.UNEXPECTED_COMPLETION, Cause.COMPLETION_TIMEOUT),
    "WRONG_LOWER_ADDRESS": (Cause.UNEXPECTED_COMPLETION, Cause.COMPLETION_TIMEOUT),
    "WRONG_REQUESTER": (Cause.UNEXPECTED_COMPLETION, Cause.COMPLETION_TIMEOUT),
    "SHORT": (Cause.COMPLETION_TIMEOUT,),
}


async def works(disk, sector=300):
    """A good request comes back whole."""
    content = disk.card.rng.randbytes(9 * 512)
    write = disk.blk.write(sector, content)
    await disk.done([write])
    read = disk.blk.read(sector, len(content))
    await disk.done([read])
    assert (write.status, read.status, read.data) == (0, 0, content)


@cocotb.test(**LIMITS)
@cocotb.parametrize(name=["all", "the other severity"])
async def completions_that_go_wrong_are_reported(dut, name):
    """SYS-ERR-2: each wrong answer to a read of a disk, none, a late one: status, pointer, log, message; the next is good."""
    card, bench = await begin(dut, mrrs=128)  # so that one completion answers each read
    disk = await card.disk(0, buffer_pages=96)
    await bench.settle(name)
    struck, sent = [], []

    def match(tlp):
        is_struck = tlp.requester_id & 0xFF == disk.function and tlp.length_dw == 32
        if is_struck:
            struck.append(tlp.tag)
        return is_struck

    def observe(event, tlp):
        if isinstance(event, TlpSent) and event.dwords[0] >> 25 & 0xF == 5:
            sent.append(event.dwords)

    card.observers.append(observe)
    for kind, causes in COMPLETIONS.items():
        if name != "all" and len(causes) > 1:
            continue
        struck.clear()
        sent.clear()
        card.host.policy.faults.append(Fault(kind, match, times=1, cycles=15_000))
        request = disk.blk.write(64, card.rng.randbytes(512), framing="pages")
        await disk.done([request], may_fail=True)
        assert request.status == (0 if kind == "DUPLICATE" else 1), kind
        await ClockCycles(dut.clk, 6000 if kind == "LATE" else WAIT)  # the late one comes 15,000 cycles behind its request
        answers = [words for words in sent if words[2] >> 8 & 0xFF == struck[0]]
        header = answers[-1 if kind in ("DUPLICATE", "LATE") else 0][:3] if answers else None
        wanted = []
        for cause in causes:
            is_of_all = kind == "WRONG_REQUESTER" and cause is Cause.UNEXPECTED_COMPLETION
            is_logged = cause not in (Cause.COMPLETION_TIMEOUT, Cause.RECEIVED_UR, Cause.RECEIVED_CA)
            wanted += bench.expect(cause, ALL if is_of_all else [disk.function], header if is_logged else None)
        await bench.check(ALL, f"{name}: {kind}", wanted)
        await bench.clear()
        await works(disk)
    await bench.check(ALL, "good requests", [])
    card.finish()


@cocotb.test(**LIMITS)
async def floods_of_errors_stall_nobody(dut):
    """SYS-ERR-3 (R34): wrong requests of all kinds back to back: each is answered, a disk works meanwhile, messages of all kinds."""
    card, bench = await begin(dut)
    disk = await card.disk(0, buffer_pages=96)
    await bench.settle("all")
    table = [row for row in rows(bench) if row[0] != "poisoned write"]
    asked, number = [], 0
    task = cocotb.start_soon(works(disk))
    for _ in range(4):
        card.rng.shuffle(table)
        for _, tlp, _, _, status, *spoilt in table:
            number = (number + 1) % 256
            if not tlp.type.is_completion:
                tlp = replace(tlp, requester_id=PROBE, tag=number)
            if status is not None:
                asked.append((number, status))
            words = encode(tlp)
            card.link.send(spoilt[0](words) if spoilt else words)
    await card.link.drained()
    await ClockCycles(dut.clk, 2000)
    assert [(answer.tag, answer.status) for answer in bench.answers] == asked
    await task
    codes = {tlp.message_code for tlp in card.host.messages}
    assert codes <= {0x30, 0x31, 0x33}
    assert len(codes) > 1  # most are dropped: one waits per source
    assert all(tlp.requester_id == 0x0100 for tlp in card.host.messages if tlp.message_code == 0x33)  # of all: the first speaks
    card.host.messages.clear()
    await bench.clear()
    for space in bench.spaces:  # which came first is not known
        aer = bench.places[0][1]
        for offset in range(aer + 0x18, aer + 0x2C, 4):
            number = bench.spaces.index(space)
            space.replace_bits(offset, EVERY, await card.port.perform(ConfigRead(number, offset, 4)))
    await bench.probe("one more", *rows_named(bench, "read of no BAR"))
    await works(disk)
    card.finish()


def rows_named(bench, name):
    """Return TLP, cause, function and status of the row ``name``."""
    return next(row[1:5] for row in rows(bench) if row[0] == name)


class Silence:
    """Requests of a function that come while there must be none; an observer."""

    def __init__(self, function):
        self.function, self.is_on, self.found = function, False, []

    def __call__(self, event, tlp):
        if self.is_on and tlp is not None and tlp.type in (TlpType.MRD, TlpType.MWR) and tlp.requester_id & 0xFF == self.function:
            self.found.append(str(tlp))


def saved(info):
    """Read what software must put back after a reset; returns [(offset, size, value)]."""
    places = [*((0x10 + 4 * n, 4) for n in range(6)), (info.capabilities[EXPRESS][0] + 8, 2), (0x04, 2)]
    found = []
    for offset, size in places:
        found.append((offset, size, (yield ConfigRead(info.function, offset, size))))
    return found


@cocotb.test(**LIMITS)
async def d3hot_is_silent(dut):
    """SYS-ERR-4 (R61): D3hot under load: requests get UR, writes vanish and are reported, no request leaves, messages do.

    The other disk goes on; the way to D0 resets the function but for what is sticky, and it works again.
    """
    card, bench = await begin(dut)
    await card.enable_iommu()
    disks = [await card.disk(n, buffer_pages=96) for n in range(2)]
    info, silence, power = card.functions[1], Silence(1), card.functions[1].capabilities[PM][0] + 4
    card.observers.append(silence)
    other = cocotb.start_soon(works(disks[1]))
    for moment in (0, 40, 150, 400, 900):
        await bench.settle("all")
        values = await card.port.run(saved(info))
        for n in range(4):
            disks[0].golden.forget_request(disks[0].blk.write(40 * n, card.rng.randbytes(24 * 512)))
        await disks[0].offer()
        await ClockCycles(dut.clk, moment)
        await bench.write(1, power, 2, 3)
        await ClockCycles(dut.clk, 300)  # what the link held up
        silence.is_on = True
        assert await card.port.perform(ConfigRead(1, power, 2)) & 3 == 3
        bar = info.bars[0].address
        await bench.probe("read in D3hot", memory_read(bar, 8, requester_id=0, tag=0), Cause.UNSUPPORTED_NON_POSTED, ALL, CplStatus.UR)
        await bench.probe("write in D3hot", memory_write(bar + 0x3000, bytes(2), requester_id=0), Cause.UNSUPPORTED_POSTED)
        poisoned = Tlp(TlpType.CFGWR0, completer_id=0x0101, register=0x3C, data=bytes(4), poisoned=True, length_dw=1, first_be=15)
        await bench.probe("poisoned write in D3hot", poisoned, Cause.POISONED_REQUEST, 1, CplStatus.UR)
        await ClockCycles(dut.clk, 1500)
        await bench.write(1, power, 2, 0)
        await ClockCycles(dut.clk, 400)
        assert await card.port.perform(ConfigRead(1, 0x10, 4)) & -16 == 0
        for offset, size, value in values:
            await bench.write(1, offset, size, value)
        begun = 0
        while await card.port.perform(MemoryRead(bar + 0x14, 1)) != 0:  # device status
            begun += 1
            assert begun < 300, "the reset has no end"
        assert not silence.found, silence.found[0]
        silence.is_on = False
        await bench.clear()
        await bench.check(ALL, "awake", [])
        await card.port.run(enable_msix(info, 2))
        await disks[0].restart()
        await works(disks[0])
    await other
    card.finish()


@cocotb.test(**LIMITS)
async def link_resets_under_load(dut):
    """SYS-ERR-5: the link goes down under load: all is as after power-on but what is sticky; the card works again."""
    config = bench_config(256)
    seed, before = cocotb.RANDOM_SEED, None
    for moment, cycles in ((30, 1), (200, 7), (700, 500), (90, 2)):
        seed += 1
        if before is None:
            card, bench = await begin(dut)
        else:
            card = Card(dut, config, seed=seed, latency=60)
            card.connect()
            bench = None
            for n, space in enumerate(before.spaces):
                space.hot_reset()
                for offset in range(0, 0x160, 4):
                    got, model = await card.port.perform(ConfigRead(n, offset, 4)), space.read(offset, 4)
                    assert got == model, f"function {n} at {offset:#x} is {got:#010x} behind a link reset, must be {model:#010x}"
            await card.enumerate()
            bench = Bench(card)
            for old, new in zip(before.spaces, bench.spaces):
                for offset in range(0x100, 0x12C, 4):
                    new.replace_bits(offset, EVERY, old.read(offset, 4))
            await bench.begin()
        await bench.settle("the other severity" if before is None else "all")
        await card.enable_iommu()
        disks = [await card.disk(n, buffer_pages=96) for n in range(2)]
        for disk in disks:
            await works(disk)
        await bench.probe("in front", *rows_named(bench, "read of no BAR"))
        wanted = bench.expect(Cause.UNSUPPORTED_POSTED, ALL, encode(memory_write(NOWHERE, bytes(4), requester_id=PROBE))[:4])
        card.link.send(encode(memory_write(NOWHERE, bytes(4), requester_id=PROBE)))  # what is logged now stays
        await ClockCycles(dut.clk, WAIT)
        await bench.check(ALL, "logged", wanted)
        for disk in disks:
            for n in range(4):
                disk.golden.forget_request(disk.blk.write(64 * n, card.rng.randbytes(24 * 512)))
            await disk.offer()
        await ClockCycles(dut.clk, moment)
        card.link.stop()
        await ClockCycles(dut.clk, 2)
        dut.link_reset.value = 1
        await ClockCycles(dut.clk, cycles)
        dut.link_reset.value = 0
        await ClockCycles(dut.clk, 2500)
        before = bench
