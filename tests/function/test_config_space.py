"""Configuration space: every access is compared with models.config_space, which is made from numbers typed again here."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.config_space import BarDescription, msix_capability, pcie_capability, virtio_capability
from ringwall.models.config_space import ConfigSpace as Model
from ringwall.models.config_space import FunctionDescription as ModelDescription
from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.function.description import Bar, FunctionDescription, MsixCapability, PcieCapability, VirtioCapability, VirtioWindow
from ringwall.rtl.regs.bus import RegisterRequest, RegisterResponse
from ringwall.rtl.tlp.layouts import ConfigRequest, ConfigResponse, ConfigState
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, cycle, pack, start, unpack

FUNCTIONS = (
    FunctionDescription(
        vendor_id=0x1B36, device_id=0x0014, class_code=0x080600, revision=3,
        bars=(Bar(0, 4096),),
        capabilities=(PcieCapability(), MsixCapability(4, 0, 0x300, 0, 0x400)),
    ),
    FunctionDescription(
        vendor_id=0x1AF4, device_id=0x1042, class_code=0x018000, subsystem_vendor_id=0x1AF4, subsystem_id=0x1100,
        bars=(Bar(0, 16384), Bar(2, 4096, is_prefetchable=True), Bar(4, 256, is_64=False)),
        capabilities=(
            PcieCapability(has_flr=True), MsixCapability(3, 2, 0, 2, 0x800), VirtioCapability(1, 0, 0, 0x40),
            VirtioCapability(2, 0, 0x3000, 8, 4), VirtioCapability(3, 0, 0x1000, 1), VirtioCapability(4, 0, 0x2000, 60), VirtioWindow(),
        ),
    ),
    FunctionDescription(vendor_id=0x1234, device_id=0x5678, class_code=0xFF0000, capabilities=(PcieCapability(mps_code=0, at=0x80),)),
)  # fmt: skip

LINK = {"link_capabilities": 3 | 8 << 4 | 1 << 22, "link_status": 3 | 8 << 4, "link_capabilities_2": 0b1110,
        "timeout_ranges": 1}  # fmt: skip
MODELS = (
    ModelDescription(0x1B36, 0x0014, 0x080600, revision=3, is_multi_function=True, bars={0: BarDescription(4096)}, capabilities=(
        pcie_capability(**LINK, link_control_2=3, link_control_2_rw=0xF),
        msix_capability(4, table_bar=0, table_offset=0x300, pba_bar=0, pba_offset=0x400),
    )),
    ModelDescription(
        0x1AF4, 0x1042, 0x018000, revision=1, subsystem_vendor=0x1AF4, subsystem=0x1100, is_multi_function=True,
        bars={0: BarDescription(16384), 2: BarDescription(4096, prefetch=True), 4: BarDescription(256, is_64=False)},
        capabilities=(
            pcie_capability(**LINK, flr=True), msix_capability(3, table_bar=2, table_offset=0, pba_bar=2, pba_offset=0x800),
            virtio_capability(1, 0, 0, 0x40), virtio_capability(2, 0, 0x3000, 8, notify_off_multiplier=4),
            virtio_capability(3, 0, 0x1000, 1), virtio_capability(4, 0, 0x2000, 60), virtio_capability(5),
        ),
    ),
    ModelDescription(0x1234, 0x5678, 0xFF0000, revision=1, is_multi_function=True,
                     capabilities=(pcie_capability(**LINK, mps_supported=128, offset=0x80),)),
)  # fmt: skip
WINDOW = 0xCC  # offset of the virtio window of function 1: 0x40 + 0x3C + 12 + 16 + 20 + 16 + 16
NO_BAR_COMMAND = 0x2  # function 2 has no memory: its Memory Space Enable is a constant 0 [PCIe5 7.5.1.1.3]
CARD = [
    "every_dword_reads_its_reset_value", "every_bit_is_as_writable_as_it_must_be", "random_accesses_do_what_the_model_does",
    "window_survives_a_slow_and_a_failing_owner", "card_sees_what_the_host_has_set", "absent_functions_are_unsupported",
    "interrupt_status_is_shown", "reset_restores_everything", "function_level_reset_is_the_models", "function_level_reset_takes_its_time",
    "transactions_pending_is_shown",
]  # fmt: skip


def test_config_space(request):
    run(ConfigSpace(functions=FUNCTIONS), module=__name__, node=request.node.nodeid, testcase=CARD)


def test_config_space_of_one_function(request):
    run(ConfigSpace(functions=FUNCTIONS[1:2]), module=__name__, node=request.node.nodeid, testcase="single_function_card_says_so")


def test_functions_are_checked():
    """FUNC-CFG-3: a card without functions is refused with a sentence."""
    with pytest.raises(ValueError, match="between 1 and 8, not 0"):
        ConfigSpace(functions=())


class Bench:
    """The request side, a device behind the windows, and a model of each function."""

    def __init__(self, dut, rng, models=MODELS):
        self.dut, self.rng = dut, rng
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.models = [Model(model, window=self.window) for model in models]
        self.memory, self.expected = bytearray(rng.randbytes(1 << 14)), []
        self.accesses, self.latencies, self.is_slow, self.fails = [], [], False, False
        cocotb.start_soon(self.responses.watch([]))
        cocotb.start_soon(self.serve())

    async def access(self, function, register, *, enables=15, value=None, bus=7, device=0):
        """One access of a dword; returns ``(data, unsupported)``."""
        request = pack(ConfigRequest, function=function, bus=bus, device=device, register=register, is_write=value is not None,
                       byte_enable=enables, data=value or 0)  # fmt: skip
        await self.requests.put(request)
        begin = cycle()
        if self.rng.random() < 0.3:
            await ClockCycles(self.dut.clk, self.rng.randrange(1, 6))
        answer = unpack(ConfigResponse, await self.responses.get())
        self.latencies.append(cycle() - begin)
        return answer.data, answer.unsupported

    async def read(self, function, offset, **how):
        data, unsupported = await self.access(function, offset // 4, **how)
        assert not unsupported
        return data

    async def write(self, function, offset, value, enables=15, **how):
        assert not (await self.access(function, offset // 4, value=value, enables=enables, **how))[1]

    def window(self, bar, offset, length, data):
        """What the model does when software uses the window: what the card must do at this moment."""
        self.expected.append((bar, offset, length, data is not None))
        if self.fails:
            return None
        if data is None:
            return bytes(self.memory[offset : offset + length])
        self.memory[offset : offset + length] = data
        return None

    async def serve(self):
        """The owner of all BARs: one memory. Its writes are checked against the memory that the model wrote."""
        requests, responses = Stream(self.dut, "registers__request"), Stream(self.dut, "registers__response")
        cocotb.start_soon(requests.watch([]))
        while True:
            request = unpack(RegisterRequest, await requests.get())
            assert request.offset % 8 == 0 and request.byte_enable
            low = (request.byte_enable & -request.byte_enable).bit_length() - 1
            length = request.byte_enable.bit_count()
            assert request.byte_enable == ((1 << length) - 1) << low
            self.accesses.append((request.function, request.bar, request.offset + low, length, bool(request.is_write), request.data))
            word = int.from_bytes(self.memory[request.offset : request.offset + 8], "little")
            if self.is_slow:
                await ClockCycles(self.dut.clk, 15)
            await responses.put(pack(RegisterResponse, data=word, error=self.fails))

    def state(self, function):
        return unpack(ConfigState, int(getattr(self.dut, f"state__{function}").value))


async def begin(dut, models=MODELS):
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "requests")
    return Bench(dut, rng, models), rng


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def every_dword_reads_its_reset_value(dut):
    """FUNC-CFG-4 (R59, R60, V069, V070, V074, V076, V077, V091, V095, V100, V106): all 4096 bytes of all functions after reset."""
    bench, _ = await begin(dut)
    for function, model in enumerate(bench.models):
        found = [await bench.read(function, 4 * n) for n in range(WINDOW // 4 + 4)]
        found += [0] if function == 1 else [await bench.read(function, WINDOW + 16)]
        found += [await bench.read(function, 4 * n) for n in range(len(found), 1024)]
        assert not model.differences(found)
    assert not bench.accesses
    assert max(bench.latencies) <= 4 + 5  # the bench itself waits up to 5 cycles


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def every_bit_is_as_writable_as_it_must_be(dut):
    """FUNC-CFG-5 (R57, R58, R60, V068): ones, zeroes and random values into every dword; BAR size masks act on the write."""
    bench, rng = await begin(dut)
    for value in (0xFFFFFFFF, 0, rng.getrandbits(32), 0xFFFFFFFF):
        for function, model in enumerate(bench.models):
            for register in [*range(64), *(rng.randrange(64, 1024) for _ in range(8))]:
                if function == 1 and register == WINDOW // 4 + 4:
                    continue  # not yet: it acts
                await bench.write(function, 4 * register, value)
                model.write_dword(4 * register, 15, value)
                got, wanted = await bench.read(function, 4 * register), model.read_dword(4 * register)
                if function == 2 and register == 1:
                    wanted &= ~NO_BAR_COMMAND
                assert got == wanted, f"function {function} offset {4 * register:#x}: {got:#x}, must be {wanted:#x}"


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def random_accesses_do_what_the_model_does(dut):
    """FUNC-CFG-6 (R74, V107, V108, V109): 4000 random accesses with random byte enables, the virtio window's included."""
    bench, rng = await begin(dut)
    window = WINDOW // 4
    done = 0
    for _ in range(4000):
        function = rng.choice([0, 1, 1, 1, 2])
        model = bench.models[function]
        register = rng.choice([rng.randrange(64), rng.randrange(1024), *([rng.randrange(window + 1, window + 6)] * 4)])
        register -= register == window + 5  # the data twice as often
        enables = rng.choice([15, 15, rng.randrange(16), 1 << rng.randrange(4), 3, 12])
        is_window = function == 1 and register == window + 4
        value = rng.getrandbits(32)
        if function == 1 and rng.random() < 0.97:  # mostly numbers that a window may have
            places = [rng.randrange(64), 0x1000, 0x2000 + rng.randrange(64), 0x3000 + rng.randrange(9)]
            sets = {window + 1: [0, 0, 0, 0, 0, 2], window + 2: places, window + 3: [1, 2, 4, 4, 8, 3]}
            if register in sets:
                value, enables = rng.choice(sets[register]), 15
        if rng.random() < 0.5:
            bench.expected.clear()
            bench.accesses.clear()
            model.write_dword(4 * register, enables, value)
            await bench.write(function, 4 * register, value, enables)
        else:
            bench.expected.clear()
            bench.accesses.clear()
            if is_window and not enables:
                await bench.read(function, 4 * register, enables=0)  # asks for no byte: touches nothing
            else:
                wanted = model.read_dword(4 * register)
                got = await bench.read(function, 4 * register, enables=enables)
                if function == 2 and register == 1:
                    wanted &= ~NO_BAR_COMMAND
                assert got == wanted, f"function {function} offset {4 * register:#x}: {got:#x}, must be {wanted:#x}"
        assert [access[1:5] for access in bench.accesses] == bench.expected
        for at, _, offset, length, is_write, data in bench.accesses:
            done += 1
            assert at == 1
            if is_write:
                lane = 8 * (offset % 8)
                assert (data >> lane).to_bytes(8, "little")[:length] == bench.memory[offset : offset + length]
    assert done > 100


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def window_survives_a_slow_and_a_failing_owner(dut):
    """FUNC-CFG-7 (V107, V108, V109): an answer after 15 cycles is waited for; one with an error leaves the data as it is."""
    bench, _ = await begin(dut)
    for offset, value in ((4, 0), (8, 0x2004), (12, 4), (16, 0x11223344)):
        await bench.write(1, WINDOW + offset, value)
    bench.memory[0x2004:0x2008] = bytes(range(1, 5))
    bench.is_slow, bench.fails = True, True
    assert await bench.read(1, WINDOW + 16) == 0x11223344
    bench.fails = False
    assert await bench.read(1, WINDOW + 16) == 0x04030201
    assert max(bench.latencies[-2:]) < 2 + 12 + 16 + 5
    assert await bench.read(1, 0) == 0x10421AF4


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def card_sees_what_the_host_has_set(dut):
    """FUNC-CFG-8: state and BAR values follow the writes of their own function only, and the bus number its writes only."""
    bench, rng = await begin(dut)
    for n in range(3):
        state = bench.state(n)
        assert vars(state) == {"bus": 0, "device": 0, "memory_enable": 0, "bus_master": 0, "mps_code": 0, "mrrs_code": 2,
                               "extended_tag": 0, "relaxed_ordering": 1, "no_snoop": 1, "msix_enable": 0, "msix_mask": 0,
                               "in_reset": 0, "ten_bit_tag": 0, "timeout": 0, "timeout_disable": 0, "atomics": 0}  # fmt: skip
    seen = dict.fromkeys(range(3), (0, 0))
    for _ in range(300):
        function, bus, device = rng.randrange(3), rng.getrandbits(8), rng.getrandbits(5)
        offset = rng.choice([4, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x48, 0x7C, 0x88])
        value, enables = rng.getrandbits(32), rng.choice([15, rng.randrange(16)])
        if rng.random() < 0.3:
            await bench.read(function, offset, bus=bus, device=device)
        else:
            await bench.write(function, offset, value, enables, bus=bus, device=device)
            bench.models[function].write_dword(offset, enables, value)
            seen[function] = (bus, device)
            await bench.read(function, 0)  # a function level reset is over
        for n, model in enumerate(bench.models):
            state, control = bench.state(n), model.read(0x88 if n == 2 else 0x48, 2)
            assert (state.bus, state.device) == seen[n]
            assert (state.bus_master, state.memory_enable) == (model.bus_master, model.memory_enable and n != 2)
            assert (state.relaxed_ordering, state.mps_code, state.extended_tag, state.no_snoop, state.mrrs_code) == (
                control >> 4 & 1, control >> 5 & 7, control >> 8 & 1, control >> 11 & 1, control >> 12 & 7)  # fmt: skip
            if n < 2:
                assert (state.msix_mask, state.msix_enable) == (model.read(0x7E, 2) >> 14 & 1, model.read(0x7E, 2) >> 15)
        values = [int(getattr(dut, f"bars__{n}").value) for n in range(4)]
        assert values == [bench.models[0].bar_address(0), *(bench.models[1].bar_address(n) for n in (0, 2, 4))]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def absent_functions_are_unsupported(dut):
    """FUNC-CFG-9: every function number that the card does not have is answered with unsupported, and changes nothing."""
    bench, _ = await begin(dut)
    for function in range(3, 256):
        assert (await bench.access(function, 4, value=0xFFFFFFFF, bus=9))[1]
        assert (await bench.access(function, 0))[1]
    for n in range(3):
        assert bench.state(n).bus == 0
        assert await bench.read(n, 0x10) == bench.models[n].read(0x10, 4)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def interrupt_status_is_shown(dut):
    """FUNC-CFG-10 (V098): Status.Interrupt of each function is its level, whatever is written."""
    bench, rng = await begin(dut)
    for _ in range(60):
        levels = [rng.getrandbits(1) for _ in range(3)]
        for n, level in enumerate(levels):
            getattr(dut, f"interrupt__{n}").value = level
        await bench.write(rng.randrange(3), 4, rng.getrandbits(32), 12)
        for n, level in enumerate(levels):
            assert await bench.read(n, 4) >> 16 == 0x10 | level << 3


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reset_restores_everything(dut):
    """FUNC-CFG-11: a reset in the middle of an access returns every dword and level to its reset value, within 128 cycles per function."""
    bench, _ = await begin(dut)
    for function in range(3):
        for register in range(64):
            await bench.write(function, 4 * register, 0xFFFFFFFF)
    await bench.requests.put(pack(ConfigRequest, function=1, register=1, byte_enable=15))
    dut.rst.value = 1
    await RisingEdge(dut.clk)
    dut.rst.value = 0
    since = cycle()
    bench.models = [Model(model, window=bench.window) for model in MODELS]
    for function, model in enumerate(bench.models):
        for register in range(64):
            if (function, register) != (1, WINDOW // 4 + 4):
                assert await bench.read(function, 4 * register) == model.read_dword(4 * register)
            if not function and not register:
                assert cycle() - since <= 3 * 128 + 12
        assert bench.state(function).mrrs_code == 2 and not bench.state(function).bus_master
    assert int(dut.bars__1.value) == 0


CONTROL = (0x48, 0x48, 0x88)  # offset of Device Control of each function


@cocotb.test(timeout_time=10, timeout_unit="ms")
async def function_level_reset_is_the_models(dut):
    """FUNC-CFG-13 (R72): Initiate FLR at random settings: answered at once, every dword as the model's, other functions untouched."""
    bench, rng = await begin(dut)
    begun = 0
    for n in range(60):
        for _ in range(40):
            function, register = rng.randrange(3), rng.choice([1, 3, 4, 5, 6, 7, 15, CONTROL[0] // 4, 0x50 // 4, 0x70 // 4, 0x7C // 4])
            value = rng.getrandbits(32) & ~(1 << 15 if function == 1 and register == CONTROL[1] // 4 else 0)
            await bench.write(function, 4 * register, value)
            bench.models[function].write_dword(4 * register, 15, value)
        function, enables, value = rng.choice([0, 1, 1, 1, 2]), rng.choice([15, 3, 2, 1, 12, 0]), rng.getrandbits(32) | 1 << 15
        before = [bench.models[at].resets for at in range(3)]
        bench.latencies.clear()
        await bench.write(function, CONTROL[function], value, enables, bus=n, device=3)
        assert bench.latencies[0] <= 2 + 5 + 1
        bench.models[function].write_dword(CONTROL[function], enables, value)
        is_reset = bench.models[function].resets != before[function]
        assert is_reset == (function == 1 and bool(enables & 2))
        assert [int(getattr(dut, f"reset__{at}").value) for at in range(3)] == [0, is_reset, 0]
        begun += is_reset
        since = cycle()
        assert await bench.read(function, CONTROL[function]) & 0x8000 == 0
        assert cycle() - since < (2 * 64 if is_reset else 0) + 20
        for at, model in enumerate(bench.models):
            found = [await bench.read(at, 4 * register) for register in range(64) if at != 1 or register != WINDOW // 4 + 4]
            ignore = {4: NO_BAR_COMMAND} if at == 2 else {}
            assert not model.differences(found[: WINDOW // 4 + 4], ignore=ignore), f"function {at} after round {n}"
        state, model = bench.state(1), bench.models[1]
        assert (state.bus_master, state.memory_enable) == (model.bus_master, model.memory_enable)
        assert [int(getattr(dut, f"bars__{at}").value) for at in (1, 2, 3)] == [model.bar_address(at) for at in (0, 2, 4)]
        assert (bench.state(function).bus, bench.state(function).device) == (n, 3)
    assert begun > 10


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def function_level_reset_takes_its_time(dut):
    """FUNC-CFG-14: while the function is busy it is in reset, configuration accesses go on, and a second reset changes nothing."""
    bench, rng = await begin(dut)
    for n in range(12):
        await bench.write(1, 4, 6)
        await bench.write(1, 0x10, 0x1234_0000)
        assert (bench.state(1).memory_enable, bench.state(1).bus_master) == (1, 1)
        busy = rng.choice([1, 60, 140, 300, 700])
        await bench.write(1, CONTROL[1], 0x8000, 2)
        dut.busy__1.value = 1
        assert (int(dut.reset__1.value), bench.state(1).in_reset) == (1, 1)
        since = cycle()
        if n % 3 == 2:
            await ClockCycles(dut.clk, rng.randrange(200))
            await bench.write(1, CONTROL[1], 0x8000, 2)
        assert await bench.read(1, 4) & 6 == 0
        await bench.write(1, 4, 6)
        await bench.write(1, 0x10, 0x1234_0000)
        while cycle() - since < busy:
            assert (int(dut.reset__1.value), bench.state(1).in_reset, bench.state(1).memory_enable) == (1, 1, 1)
            await bench.write(0, 4, rng.getrandbits(32))
            assert await bench.read(1, 4) & 6 == 6
        dut.busy__1.value = 0
        await ClockCycles(dut.clk, 3)
        assert (int(dut.reset__1.value), bench.state(1).in_reset, bench.state(1).memory_enable) == (0, 0, 1)
        assert int(dut.bars__1.value) == 0x1234_0000


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def transactions_pending_is_shown(dut):
    """FUNC-CFG-15: Transactions Pending of Device Status of each function is its level, whatever is written."""
    bench, rng = await begin(dut)
    for _ in range(60):
        levels = [rng.getrandbits(1) for _ in range(3)]
        for n, level in enumerate(levels):
            getattr(dut, f"pending__{n}").value = level
        await bench.write(rng.randrange(3), CONTROL[0], rng.getrandbits(32), 12)
        for n, level in enumerate(levels):
            assert await bench.read(n, CONTROL[n]) >> 16 == level << 5


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def single_function_card_says_so(dut):
    """FUNC-CFG-12: the multi-function bit is 0 on a card of one function, which then speaks for the link."""
    bench, _ = await begin(dut, MODELS[1:2])
    assert await bench.read(0, 0x0C) == 0
    await bench.write(0, 0x70, 0xF)
    assert await bench.read(0, 0x70) == 0xF
    assert (await bench.access(1, 0))[1]
