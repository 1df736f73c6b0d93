"""All capabilities in a simulated configuration space: against a table that is typed here, dword by dword, from the specification."""

import random
from itertools import pairwise

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.function.description import (
    AcsCapability,
    AerCapability,
    AriCapability,
    AtsCapability,
    Bar,
    DvsecCapability,
    FunctionDescription,
    MsiCapability,
    PasidCapability,
    PcieCapability,
    PowerCapability,
    PriCapability,
    Rom,
    SerialNumber,
    SriovCapability,
    VendorCapability,
    VsecCapability,
    check_functions,
)
from ringwall.rtl.function.layouts import FunctionSettings, Operation, UpdateRequest
from ringwall.rtl.regs.table import Access, Block, Field, Map, Place, Register, Word
from ringwall.rtl.tlp.layouts import ConfigRequest, ConfigResponse, ConfigState
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, cycle, pack, start, unpack

OURS = Register("ours", 8, 4, (Field("low", 0, 16, Access.RW, 0xBEEF), Field("high", 16, 16, reset=0xCAFE)))
FUNCTIONS = (
    FunctionDescription(
        vendor_id=0x1234, device_id=0x0001, class_code=0x018000, reports_errors=True,
        bars=(Bar(0, 4096), Bar(2, 256, is_64=False), Bar(4, 1 << 20, is_prefetchable=True), Rom(1 << 16)),
        capabilities=(
            PowerCapability(), MsiCapability(32),
            PcieCapability(has_flr=True, has_atomics=True, has_ten_bit_tags=True, timeout_ranges=1, has_timeout_disable=True),
            VendorCapability(8, (Register("ours", 4, 4, OURS.fields),)),
        ),
        extended=(
            AerCapability(), SerialNumber(0x0123_4567_89AB_CDEF), AtsCapability(), PriCapability(), PasidCapability(20, True, True),
            AcsCapability(True, True, True), AriCapability(), SriovCapability(4, 0x7777, 8, 2, (Bar(0, 1 << 22),)),
            VsecCapability(3, 16, (OURS,), 1, at=0x400), DvsecCapability(0x1234, 5, 12, at=0x800),
        ),
    ),
    FunctionDescription(vendor_id=0x1234, device_id=0x0002, class_code=0xFF0000, bars=(Bar(0, 4096),),
                        capabilities=(PowerCapability(keeps_state=False), PcieCapability())),
    FunctionDescription(vendor_id=0x1234, device_id=0x0003, class_code=0xFF0000, reports_errors=True, extended=(AerCapability(),),
                        capabilities=(PowerCapability(pme_states=0b11001), PcieCapability(has_flr=True))),
)  # fmt: skip

ALL = 0xFFFFFFFF
# Offset: value after reset, bits that are RW, RW1C, that FLR leaves alone, that a hot reset leaves alone.
COMMAND = {0x04: (0x00100000, 0x546, 0xF9000000, 0, 0)}
PCIE = {  # at 0
    0x04: (0x10008022, 0, 0, 0, 0), 0x08: (0x2810, 0x79FF, 0xF0000, 0xE0, 0), 0x0C: (0x00400083, 0, 0, 0, 0),
    0x10: (0x00830000, 0xCB, 0, 0xCB, 0), 0x2C: (0xE, 0, 0, 0, 0),
}  # fmt: skip
AER = {  # at 0x100
    0x104: (0, 0, 0x57F010, ALL, ALL), 0x108: (0x400000, 0x57F010, 0, ALL, ALL), 0x10C: (0x462010, 0x57F010, 0, ALL, ALL),
    0x110: (0, 0, 0x71C1, ALL, ALL), 0x114: (0x6000, 0x71C1, 0, ALL, ALL),
    0x118: (0, 0, 0, 0x1F, 0x1F), **dict.fromkeys(range(0x11C, 0x12C, 4), (0, 0, 0, ALL, ALL)),
}  # fmt: skip
TABLES = (
    {
        0x00: (0x00011234, 0, 0, 0, 0), **COMMAND, 0x08: (0x01800001, 0, 0, 0, 0), 0x0C: (0x00800000, 0xFF, 0, 0, 0),
        0x10: (0x4, 0xFFFFF000, 0, 0, 0), 0x14: (0, ALL, 0, 0, 0), 0x18: (0, 0xFFFFFF00, 0, 0, 0),
        0x20: (0xC, 0xFFF00000, 0, 0, 0), 0x24: (0, ALL, 0, 0, 0), 0x30: (0, 0xFFFF0001, 0, 0, 0), 0x34: (0x40, 0, 0, 0, 0),
        0x3C: (0, 0xFF, 0, 0, 0),
        0x40: (0x00034801, 0, 0, 0, 0), 0x44: (0x8, 0x3, 0, 0, 0),
        0x48: (0x018A6005, 0x00710000, 0, 0, 0), 0x4C: (0, 0xFFFFFFFC, 0, 0, 0), 0x50: (0, ALL, 0, 0, 0), 0x54: (0, 0xFFFF, 0, 0, 0),
        0x58: (0, ALL, 0, 0, 0),
        0x60: (0x00029C10, 0, 0, 0, 0), **{0x60 + at: row for at, row in PCIE.items()}, 0x84: (0x00030011, 0, 0, 0, 0),
        0x88: (0, 0x105F, 0, 0, 0), 0x90: (3, 0xF, 0, 0xF, 0xF),
        0x9C: (0x00080009, 0, 0, 0, 0), 0xA0: (0xCAFEBEEF, 0xFFFF, 0, 0, 0),
        0x100: (0x14820001, 0, 0, 0, 0), **AER,
        0x148: (0x15410003, 0, 0, 0, 0), 0x14C: (0x89ABCDEF, 0, 0, 0, 0), 0x150: (0x01234567, 0, 0, 0, 0),
        0x154: (0x15C1000F, 0, 0, 0, 0), 0x158: (0x20, 0x801F0000, 0, 0, 0),
        0x15C: (0x16C10013, 0, 0, 0, 0), 0x160: (0, 1, 0x30000, 0, 0), 0x164: (32, 0, 0, 0, 0), 0x168: (0, ALL, 0, 0, 0),
        0x16C: (0x1741001B, 0, 0, 0, 0), 0x170: (0x1406, 0x70000, 0, 0, 0),
        0x174: (0x17C1000D, 0, 0, 0, 0), 0x178: (0x4C, 0x4C0000, 0, 0, 0),
        0x17C: (0x1841000E, 0, 0, 0, 0), 0x180: (0x100, 0, 0, 0, 0),
        0x184: (0x40010010, 0, 0, 0, 0), 0x18C: (0, 0x19, 0, 0, 0), 0x190: (0x40004, 0, 0, 0, 0), 0x194: (0, 0xFFFF, 0, 0, 0),
        0x198: (0x20008, 0, 0, 0, 0), 0x19C: (0x77770000, 0, 0, 0, 0), 0x1A0: (0x553, 0, 0, 0, 0), 0x1A4: (1, 0x553, 0, 0, 0),
        0x1A8: (0x4, 0xFFC00000, 0, 0, 0), 0x1AC: (0, ALL, 0, 0, 0),
        0x400: (0x8001000B, 0, 0, 0, 0), 0x404: (0x01010003, 0, 0, 0, 0), 0x408: (0xCAFEBEEF, 0xFFFF, 0, 0, 0),
        0x800: (0x00010023, 0, 0, 0, 0), 0x804: (0x00C01234, 0, 0, 0, 0), 0x808: (5, 0, 0, 0, 0),
    },
    {
        0x00: (0x00021234, 0, 0, 0, 0), 0x04: (0x00100000, 0x546, 0, 0, 0), 0x08: (0xFF000001, 0, 0, 0, 0),
        0x0C: (0x00800000, 0xFF, 0, 0, 0), 0x10: (0x4, 0xFFFFF000, 0, 0, 0), 0x14: (0, ALL, 0, 0, 0), 0x34: (0x40, 0, 0, 0, 0),
        0x3C: (0, 0xFF, 0, 0, 0), 0x40: (0x00034801, 0, 0, 0, 0), 0x44: (0, 0x3, 0, 0, 0),
        0x48: (0x00020010, 0, 0, 0, 0), **{0x48 + at: row for at, row in PCIE.items()},
        0x4C: (0x00008022, 0, 0, 0, 0), 0x50: (0x2810, 0x79FF, 0, 0xE0, 0),
    },
    {
        0x00: (0x00031234, 0, 0, 0, 0), 0x04: (0x00100000, 0x544, 0xF9000000, 0, 0), 0x08: (0xFF000001, 0, 0, 0, 0),
        0x0C: (0x00800000, 0xFF, 0, 0, 0), 0x34: (0x40, 0, 0, 0, 0), 0x3C: (0, 0xFF, 0, 0, 0),
        0x40: (0xC8034801, 0, 0, 0, 0), 0x44: (0x8, 0x103, 0x8000, 0x8100, 0x8100),
        0x48: (0x00020010, 0, 0, 0, 0), **{0x48 + at: row for at, row in PCIE.items()},
        0x100: (0x00020001, 0, 0, 0, 0), **AER,
    },
)  # fmt: skip
DEVICE_CONTROL = (0x68, 0x50, 0x50)
POWER = 0x44
ATS, PASID, VFS, VF_COUNT, PAGE_SIZE, PRI = 0x158, 0x170, 0x18C, 0x194, 0x1A4, 0x160
CARD = [
    "every_dword_reads_its_reset_value", "accesses_do_what_the_table_says", "resets_leave_what_they_must", "power_states_are_followed",
    "settings_are_shown", "an_update_and_a_clear_lose_nothing", "a_step_is_one", "both_sides_get_their_turn",
    "link_reset_comes_at_any_time",
]  # fmt: skip


def test_capabilities(request):
    run(ConfigSpace(functions=FUNCTIONS), module=__name__, node=request.node.nodeid, testcase=CARD)


class Expected:
    """One function's dwords as the table and a few rules of the specification have them."""

    def __init__(self, table):
        self.table = table
        self.values = {at: row[0] for at, row in table.items()}

    def read(self, at):
        return self.values.get(at, 0)

    def write(self, at, enables, value):
        """Software writes."""
        if at not in self.table:
            return
        enabled = sum(0xFF << 8 * n for n in range(4) if enables >> n & 1)
        _, writable, clearable, _, _ = self.table[at]
        mask = writable & enabled
        if at == POWER and value & 3 in (1, 2):
            mask &= ~3  # D1 and D2 are not there [PCIe5 7.5.2.2]
        if at == PASID and self.read(ATS) >> 31:
            mask &= ~0x70000
        if at in (VF_COUNT, PAGE_SIZE) and self.read(VFS) & 1:
            mask = 0
        self.values[at] = ((self.values[at] & ~mask) | (value & mask)) & ~(clearable & enabled & value)

    def reset(self, column):
        """A function level reset (column 3) or a hot reset (4)."""
        self.values = {at: (value & self.table[at][column]) | (self.table[at][0] & ~self.table[at][column])
                       for at, value in self.values.items()}  # fmt: skip


class Bench:
    """Software on one side, the card's own updates on the other."""

    def __init__(self, dut, rng):
        self.dut, self.rng = dut, rng
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.updates, self.answers = Stream(dut, "updates__request"), Stream(dut, "updates__response")
        self.expected = [Expected(table) for table in TABLES]
        self.latencies = []
        for stream in (self.requests, self.responses, self.updates, self.answers):
            cocotb.start_soon(stream.watch([]))

    async def access(self, function, at, value=None, enables=15):
        await self.requests.put(pack(ConfigRequest, function=function, bus=9, device=2, register=at // 4, is_write=value is not None,
                                     byte_enable=enables, data=value or 0))  # fmt: skip
        begin = cycle()
        answer = unpack(ConfigResponse, await self.responses.get())
        self.latencies.append(cycle() - begin)
        assert not answer.unsupported
        return answer.data

    async def write(self, function, at, value, enables=15):
        await self.access(function, at, value, enables)
        self.expected[function].write(at, enables, value)

    async def check(self, function, at):
        got, wanted = await self.access(function, at), self.expected[function].read(at)
        assert got == wanted, f"function {function} offset {at:#x}: {got:#x}, must be {wanted:#x}"

    async def check_all(self):
        for function, table in enumerate(TABLES):
            for at in table:
                await self.check(function, at)

    async def update(self, function, at, operation, value=0, is_last=True):
        await self.updates.put(pack(UpdateRequest, function=function, register=at // 4, operation=operation.value, data=value,
                                    is_last=is_last))  # fmt: skip
        return await self.answers.get()

    def settings(self, function):
        return unpack(FunctionSettings, int(getattr(self.dut, f"settings__{function}").value))

    def state(self, function):
        return unpack(ConfigState, int(getattr(self.dut, f"state__{function}").value))


async def begin(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "requests", "updates__request")
    return Bench(dut, rng), rng


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def every_dword_reads_its_reset_value(dut):
    """FUNC-CAP-1 (R59, R62, R71): every byte of one function and many of two after reset: all capabilities, 0 in gaps."""
    bench, rng = await begin(dut)
    for function in range(3):
        for at in range(0, 4096, 4) if not function else [*TABLES[function], *(4 * rng.randrange(1024) for _ in range(60))]:
            await bench.check(function, at)
    assert max(bench.latencies) == 3
    bench.latencies.clear()
    for at in range(0, 256, 4):
        await bench.check(0, at)
    assert set(bench.latencies) == {2}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def accesses_do_what_the_table_says(dut):
    """FUNC-CAP-2 (R57, R58, R60, R74): ones, zeroes, then random writes, byte enables and updates of the card, in gaps as well."""
    bench, rng = await begin(dut)
    for value in (ALL, 0):
        for function, table in enumerate(TABLES):
            for at in table:
                if at == DEVICE_CONTROL[function]:
                    continue  # Initiate FLR
                await bench.write(function, at, value if (function, at) != (1, POWER) else 0)
                await bench.check(function, at)
    frozen = 0
    for _ in range(1000):
        function = rng.choice([0, 0, 1, 2])
        at = rng.choice([*TABLES[function], rng.randrange(0, 4096, 4), POWER, *([ATS, PASID, VFS, VF_COUNT] * 3 if not function else [])])
        value, enables = rng.getrandbits(32), rng.choice([15, rng.randrange(16)])
        frozen += function == 0 and at in (PASID, VF_COUNT) and bool(bench.expected[0].read(ATS if at == PASID else VFS) & 0x80000001)
        if at == DEVICE_CONTROL[function]:
            value &= ~0x8000
        if function == 1 and at == POWER:
            value |= 1  # D1 or D3hot: no way back to D0, which is a reset
        row = TABLES[function].get(at)
        if rng.random() < 0.3 and row and row[2]:
            before = await bench.update(function, at, Operation.SET, value & row[2])
            assert before == bench.expected[function].read(at)
            bench.expected[function].values[at] |= value & row[2]
        elif rng.random() < 0.1 and at in range(0x118, 0x12C, 4) and function != 1:
            assert await bench.update(function, at, Operation.WRITE, value) == bench.expected[function].read(at)
            bench.expected[function].values[at] = value
        elif rng.random() < 0.2:
            assert await bench.update(function, at, Operation.READ, value) == bench.expected[function].read(at)
        else:
            await bench.write(function, at, value, enables)
        await bench.check(function, at)
    await bench.check_all()
    assert frozen > 20


async def fill(bench):
    """Every bit that can be 1 is, as far as rules and resets allow."""
    for function, table in enumerate(TABLES):
        for at, (_, _, clearable, _, _) in table.items():
            value = ALL if at != DEVICE_CONTROL[function] else ALL & ~0x8000
            value = bench.rng.choice([value, value & bench.rng.getrandbits(32)]) & ~(3 if at == POWER else 0)
            await bench.write(function, at, value & ~clearable)
            if clearable:
                await bench.update(function, at, Operation.SET, clearable)
                bench.expected[function].values[at] |= clearable
        if function != 1:
            for at in range(0x118, 0x12C, 4):
                value = bench.rng.getrandbits(5 if at == 0x118 else 32)
                await bench.update(function, at, Operation.WRITE, value)
                bench.expected[function].values[at] = value


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def resets_leave_what_they_must(dut):
    """FUNC-CAP-3 (R61): FLR restores its function but for sticky and link bits, a hot reset all functions but for sticky ones."""
    bench, _ = await begin(dut)
    for n in range(4):
        await fill(bench)
        await bench.check_all()
        if n % 2:
            for function in range(3):
                bench.expected[function].reset(4)
            dut.link_reset.value = 1
            await ClockCycles(dut.clk, 1 + 300 * (n // 2))
            dut.link_reset.value = 0
            await ClockCycles(dut.clk, 3)
            assert [int(getattr(dut, f"reset__{at}").value) for at in range(3)] == [1, 1, 1]
            assert (bench.state(0).bus, bench.state(0).device) == (0, 0)
        else:
            function = (0, 2)[n // 2]
            await bench.access(function, DEVICE_CONTROL[function], 0x8000, 2)
            assert [int(getattr(dut, f"reset__{at}").value) for at in range(3)] == [int(at == function) for at in range(3)]
            bench.expected[function].reset(3)
        await bench.check_all()
        assert [int(getattr(dut, f"reset__{at}").value) for at in range(3)] == [0, 0, 0]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def power_states_are_followed(dut):
    """FUNC-CAP-4 (R61): in D3hot neither memory nor bus master, D1 and D2 change nothing; the way back keeps the state or resets."""
    bench, _ = await begin(dut)
    for function in range(3):
        for at in (0x04, DEVICE_CONTROL[function], POWER):
            await bench.write(function, at, 0xFE6 if at == 4 else 0x4D5F if at != POWER else 0x100)
        has_memory = function != 2
        for value in (1, 2, 3, 1, 2):
            await bench.write(function, POWER, value)
            is_awake = bench.expected[function].read(POWER) & 3 == 0
            state = bench.state(function)
            assert is_awake == (not bench.settings(function).is_d3hot)
            assert (state.memory_enable, state.bus_master) == (is_awake and has_memory, is_awake)
            await bench.check(function, POWER)
        assert not is_awake
        assert not int(getattr(dut, f"reset__{function}").value)
        await bench.write(function, POWER, 0)
        if function == 1:
            bench.expected[1].reset(3)
            assert int(dut.reset__1.value)
        await bench.check_all()
        assert bench.state(function).bus_master == (function != 1)
        assert not int(getattr(dut, f"reset__{function}").value)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def settings_are_shown(dut):
    """FUNC-CAP-5 (R62, R63): settings and BARs follow random writes; pending and stopped levels are shown; PRI Reset is a pulse."""
    bench, rng = await begin(dut)
    pulses, wanted = [], 0

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            if bench.settings(0).pri_reset:
                pulses.append(cycle())

    cocotb.start_soon(watch())
    read = bench.expected[0].read
    offsets = [0x04, 0x10, 0x14, 0x18, 0x20, 0x24, 0x30, POWER, 0x48, 0x4C, 0x50, 0x54, 0x58, 0x88, ATS, PRI, 0x168, PASID, 0x178]
    offsets += [PRI, VFS, VF_COUNT]
    for _ in range(250):
        at, value, enables = rng.choice(offsets), rng.getrandbits(32), rng.choice([15, rng.randrange(16)])
        await bench.write(0, at, value, enables)
        wanted += at == PRI and enables & 1 and value >> 1 & 1
        pending, stopped = rng.getrandbits(32), rng.getrandbits(1)
        dut.msi_pending__0.value, dut.pri_stopped__0.value = pending, stopped
        assert await bench.access(0, 0x5C) == pending
        assert await bench.access(0, PRI) == read(PRI) | stopped << 24
        assert vars(bench.settings(0)) == {
            "is_d3hot": read(POWER) & 3 == 3, "msi_enable": read(0x48) >> 16 & 1, "msi_multiple": read(0x48) >> 20 & 7,
            "msi_address": read(0x4C) | read(0x50) << 32, "msi_data": read(0x54), "msi_mask": read(0x58),
            "timeout": read(0x88) & 15, "timeout_disable": read(0x88) >> 4 & 1, "atomics": read(0x88) >> 6 & 1,
            "ten_bit_tags": read(0x88) >> 12 & 1, "ats_enable": read(ATS) >> 31, "ats_stu": read(ATS) >> 16 & 31,
            "pri_enable": read(PRI) & 1, "pri_reset": 0, "pri_allocation": read(0x168), "pasid_enable": read(PASID) >> 16 & 1,
            "pasid_execute": read(PASID) >> 17 & 1, "pasid_privileged": read(PASID) >> 18 & 1, "request_redirect": read(0x178) >> 18 & 1,
            "completion_redirect": read(0x178) >> 19 & 1, "direct_translated": read(0x178) >> 22 & 1, "vf_enable": read(VFS) & 1,
            "vf_memory_enable": read(VFS) >> 3 & 1, "vf_count": read(VF_COUNT),
        }  # fmt: skip
        assert [int(getattr(dut, f"bars__{n}").value) for n in range(4)] == [
            read(0x10) & 0xFFFFF000 | read(0x14) << 32, read(0x18) & 0xFFFFFF00, read(0x20) & 0xFFF00000 | read(0x24) << 32, read(0x30)]
    assert len(pulses) == wanted > 3
    assert not any(vars(bench.settings(1)).values())


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def an_update_and_a_clear_lose_nothing(dut):
    """FUNC-CAP-6: software's clear of some status bits and a SET of others, begun up to 8 cycles apart either way: both happen."""
    bench, rng = await begin(dut)
    mask = TABLES[0][0x104][2]
    for apart in [*range(-8, 9)] * 4:
        old, cleared, found = (rng.getrandbits(32) & mask for _ in range(3))
        found &= ~cleared
        await bench.access(0, 0x104, ALL)
        await bench.update(0, 0x104, Operation.SET, old)

        async def software(apart=apart, cleared=cleared):
            await ClockCycles(dut.clk, 1 + max(apart, 0))
            await bench.access(0, 0x104, cleared)

        task = cocotb.start_soon(software())
        await ClockCycles(dut.clk, 1 + max(-apart, 0))
        before = await bench.update(0, 0x104, Operation.SET, found)
        await task
        assert before in (old, old & ~cleared)
        assert await bench.access(0, 0x104) == (old & ~cleared) | found


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_step_is_one(dut):
    """FUNC-CAP-7: from an update that is not the last to one that is, software's accesses wait, then go on."""
    bench, rng = await begin(dut)
    for _ in range(20):
        await bench.update(2, 0x104, Operation.SET, 0x1000, is_last=False)
        task = cocotb.start_soon(bench.access(2, 0x104, ALL))
        for _ in range(rng.randrange(1, 6)):
            await ClockCycles(dut.clk, rng.randrange(8))
            assert await bench.update(2, 0x104, Operation.SET, 0x2000, is_last=False) & 0x1000
        assert await bench.update(2, 0x104, Operation.READ) == 0x3000
        await task
        assert await bench.access(2, 0x104) == 0


@cocotb.test(timeout_time=50, timeout_unit="us")
async def both_sides_get_their_turn(dut):
    """FUNC-CAP-8: under full load of both sides, neither waits for more than one of the other's; absent functions are answered with 0."""
    bench, _ = await begin(dut)
    done, other = [], []

    async def software():
        for _ in range(60):
            await bench.access(1, 0)
            done.append(cycle())

    task = cocotb.start_soon(software())
    while not task.done():
        assert await bench.update(7, 0, Operation.WRITE, 5) == 0
        other.append(cycle())
    assert len(done) - 2 <= len(other) <= len(done) + 2
    assert max(b - a for a, b in pairwise(done)) <= 12


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def link_reset_comes_at_any_time(dut):
    """FUNC-CAP-9: a pulse of link_reset at every moment of an access: the access is answered, then everything is reset, once."""
    bench, _ = await begin(dut)
    for moment in range(10):
        await bench.write(0, 0x10, 0x5000_0000)
        await bench.write(2, 0x108, 0)

        async def pulse(moment=moment):
            await ClockCycles(dut.clk, 1 + moment)
            dut.link_reset.value = 1
            await ClockCycles(dut.clk, 1)
            dut.link_reset.value = 0

        task = cocotb.start_soon(pulse())
        await bench.access(0, 0x408, 0x1111)
        await task
        await ClockCycles(dut.clk, 4)
        assert (await bench.access(0, 0x408) & 0xFFFF) in (0xBEEF, 0x1111)
        assert await bench.access(0, 0x10) == 4
        assert await bench.access(2, 0x108) == 0
        assert [int(getattr(dut, f"reset__{at}").value) for at in range(3)] == [0, 0, 0]


def describe(**changes):
    return FunctionDescription(**{"vendor_id": 0x1AF4, "device_id": 0x1042, "class_code": 0x018000, "bars": (Bar(0, 4096),), **changes})


@pytest.mark.parametrize("is_64, has_mask, size, places", [
    (False, False, 10, {"data": 8}),
    (True, False, 14, {"address_high": 8, "data": 12}),
    (False, True, 20, {"data": 8, "mask": 12, "pending": 16}),
    (True, True, 24, {"address_high": 8, "data": 12, "mask": 16, "pending": 20}),
])  # fmt: skip
def test_msi_layouts(is_64, has_mask, size, places):
    """FUNC-CAP-10 (R62): the four layouts of MSI: length, and where data, mask and pending bits are."""
    capability = MsiCapability(16, is_64, has_mask)
    block = next(block for block in describe(capabilities=(capability, PcieCapability())).map().blocks if block.name == "msi")
    assert block.size_bytes == size
    found = {register.name: register.offset for register in block.registers}
    assert found == {"id": 0, "next": 1, "control": 2, "address": 4, **places}
    words = describe(capabilities=(capability,)).map().words()
    assert words[0x40 // 4].reset >> 16 == 4 << 1 | is_64 << 7 | has_mask << 8
    if has_mask:
        assert words[(0x40 + places["mask"]) // 4].writable == 0xFFFF


def extended(*capabilities, **changes):
    return describe(extended=capabilities, **changes)


@pytest.mark.parametrize("make, sentence", [
    (lambda: PowerCapability(pme_states=2), "PME must be from D0, D3hot, D3cold, not 2"),
    (lambda: MsiCapability(3), r"must be one of \(1, 2, 4, 8, 16, 32\), not 3"),
    (lambda: PcieCapability(timeout_ranges=4), "completion timeout ranges must be one of .* not 4"),
    (lambda: VendorCapability(2), "between 3 and 192 bytes, not 2"),
    (lambda: Rom(1024), "between 2 KiB and 16 MiB, not 1024"),
    (lambda: SerialNumber(1 << 64), "number of 64 bits, not 18446744073709551616"),
    (lambda: AtsCapability(33), "between 1 and 32, not 33"),
    (lambda: PriCapability(0), "positive number of 32 bits, not 0"),
    (lambda: PasidCapability(21), "between 0 and 20, not 21"),
    (lambda: SriovCapability(0, 1, 1), "Virtual functions must be between 1 and 65535, not 0"),
    (lambda: SriovCapability(1, 1, 0), "First offset must be between 1 and 65535, not 0"),
    (lambda: SriovCapability(1, 1, 1, page_sizes=2), "must hold 4 KiB, bit 0, and none above 2 GiB, not 2"),
    (lambda: SriovCapability(1, 1, 1, bars=(Bar(0, 2048),)), "must have 4096 bytes or more, not Bar"),
    (lambda: SriovCapability(1, 1, 1, bars=(Bar(0, 4096), Bar(1, 4096)), page_sizes=1), r"must not share a register, not \[0, 1, 1, 2\]"),
    (lambda: VsecCapability(1, 9), "multiple of 4 between 8 and 3840, not 9"),
    (lambda: DvsecCapability(0xFFFF, 1, 12), "between 0 and 0xfffe, not 65535"),
    (lambda: DvsecCapability(1, 1, 8), "multiple of 4 between 12 and 3840, not 8"),
    (lambda: extended(AriCapability(at=0x104)), r"must be at 0x100, not \[260\]"),
    (lambda: extended(AriCapability(at=0x80)), "must not overlap the first 256 bytes"),
    (lambda: extended(AriCapability(), SerialNumber(1, at=0x104)), "must not overlap ari, which ends at 0x107"),
    (lambda: extended(AriCapability(), SerialNumber(1, at=0xFF8)), "must lie below 0x1000, not '0xff8'"),
    (lambda: extended(AriCapability(), AriCapability()), "at most one AriCapability"),
    (lambda: extended(PriCapability()), "PriCapability must have AtsCapability"),
    (lambda: extended(AerCapability()), "must be one that reports errors, not False"),
    (lambda: extended(AriCapability(), capabilities=()), "must be with a PcieCapability"),
    (lambda: describe(reports_errors=True, capabilities=()), "reports errors must have a PcieCapability"),
    (lambda: describe(bars=(Rom(2048), Rom(4096))), r"must not share a register, not \[6, 6\]"),
    (lambda: check_functions([extended(AcsCapability())]), "must not be on a card of one function"),
    (lambda: check_functions([extended(SriovCapability(4, 1, 1)), describe()]), "must lie behind the 2 functions, not 1"),
    (lambda: Field("f", 0, 2, Access.RO, accepts=(0,)), "must be one that is written"),
    (lambda: Field("f", 7, 2, Access.RW, accepts=(0,)), "must lie inside one byte"),
    (lambda: Field("f", 0, 2, Access.RW, accepts=(1,)), "must fit and hold its reset value"),
])  # fmt: skip
def test_contradictions_are_refused(make, sentence):
    """FUNC-CAP-11 (R69): capabilities that cannot be, that overlap, or that lack what they go with are refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        make()


def test_words_of_all_kinds():
    """FUNC-CAP-12 (R52): access, sticky and kept bits of a register come to its dword; two lifetimes in one dword are refused."""
    def block(*fields):
        return Map(4, (Block("b", 0, 4, (Register("r", 0, 4, fields),)),))

    fields = (Field("a", 0, 4, Access.RW1C, is_sticky=True), Field("c", 4, 4, Access.HWINIT, 9),
              Field("d", 8, 1, Access.RW, is_sticky=True))  # fmt: skip
    assert block(*fields).words() == [Word(0x90, 0x100, 0x10F, 0xF, True)]
    assert block(Field("a", 0, 4, Access.RW, is_kept=True)).words() == [Word(0, 0xF, 0xF, 0, False)]
    with pytest.raises(ValueError, match=r"sticky bits beside kept ones, not 'b\.r\.k'"):
        block(*fields, Field("k", 9, 1, Access.RW, is_kept=True)).words()
    frozen = Field("f", 0, 2, Access.RW, frozen_by=("b", "r", "g"))
    assert block(frozen, Field("g", 2)).rules() == [(Place(0, 0, 2, 0), frozen)]
    with pytest.raises(ValueError, match="must be one bit"):
        block(frozen, Field("g", 2, 2)).rules()


def test_markdown():
    """FUNC-CAP-13 (R52): a function's document has a row for each field of its table: offset, bits, access, reset value, meaning."""
    text = FUNCTIONS[0].markdown(0, 3)
    for row in (
        "| 0x044 | control | 1:0 | power_state | RW, only 0, 3 | 0x0 | 0 D0, 3 D3hot |",
        "| 0x104 | uncorrectable_status | 20 | unsupported | RW1C, sticky | 0x0 | found |",
        "| 0x172 | control | 0 | enable | RW, not while ats.control.enable | 0x0 | requests may carry a PASID |",
        "| 0x070 | link_control | 3 | rcb | RW, kept by FLR | 0x0 | read completion boundary is 128 bytes |",
        "| 0x150 | high | 31:0 | value | HWINIT | 0x1234567 | bits 63:32 |",
    ):
        assert row in text.splitlines()
    assert text.startswith("# Function 0: 1234:0001, class 018000")
    assert all(item.doc for function in FUNCTIONS for block in function.map().blocks for register in block.registers
               for item in register.fields if register.name != "ours")  # fmt: skip
    fields = sum(len(register.fields) for block in FUNCTIONS[0].map(0, 3).blocks for register in block.registers)
    assert sum(line.startswith("| 0x") for line in text.splitlines()) == fields
