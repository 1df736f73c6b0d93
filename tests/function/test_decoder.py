"""Address decoder: compared with what models.config_space says of the same BAR values."""

import random

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.config_space import BarDescription
from ringwall.models.config_space import ConfigSpace as Model
from ringwall.models.config_space import FunctionDescription as ModelDescription
from ringwall.rtl.function.decoder import AddressDecoder
from ringwall.rtl.function.description import Bar, FunctionDescription, Rom
from ringwall.rtl.tlp.layouts import ConfigState, DecodeRequest, DecodeResponse
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, cycle, pack, start, unpack

BARS = (
    ((0, 4096, True),),
    ((0, 16384, True), (2, 4096, True), (4, 128, False)),
    (),
    ((1, 1 << 20, False), (5, 256, False)),
)


def test_decoder(request):
    all_bars = [tuple(Bar(*bar) for bar in bars) for bars in BARS]
    all_bars[3] += (Rom(1 << 14),)
    functions = [FunctionDescription(vendor_id=1, device_id=1, class_code=0, bars=bars) for bars in all_bars]
    run(AddressDecoder(functions=functions), module=__name__, node=request.node.nodeid)


class Bench:
    """The decoder with a model of each function behind its levels."""

    def __init__(self, dut):
        self.dut = dut
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.models = [
            Model(ModelDescription(1, 1, 0, bars={index: BarDescription(size, is_64=wide) for index, size, wide in bars})) for bars in BARS
        ]
        self.latencies = []
        cocotb.start_soon(self.responses.watch([]))

    def place(self, function, index, address):
        self.models[function].write(0x10 + 4 * index, 4, address & 0xFFFFFFFF)
        if self.models[function].description.bars[index].is_64:
            self.models[function].write(0x14 + 4 * index, 4, address >> 32)

    async def show(self):
        at = 0
        for n, model in enumerate(self.models):
            getattr(self.dut, f"state__{n}").value = pack(ConfigState, memory_enable=model.memory_enable)
            for index in model.description.bars:
                getattr(self.dut, f"bars__{at}").value = model.bar_address(index)
                at += 1
        await ClockCycles(self.dut.clk, 1)

    def wanted(self, address):
        for n, model in enumerate(self.models):
            found = model.decode(address)
            if found is not None:
                return n, *found
        return None

    async def check(self, address):
        """Decode the 8-byte word at ``address``; return whether it hit."""
        await self.requests.put(pack(DecodeRequest, address=address))
        begin = cycle()
        answer = unpack(DecodeResponse, await self.responses.get())
        self.latencies.append(cycle() - begin)
        got = (answer.function, answer.bar, answer.offset) if answer.hit else None
        assert got == self.wanted(address), f"{address:#x}"
        return bool(answer.hit)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def addresses_belong_to_their_bars(dut):
    """FUNC-DEC-1: random placements; first, last and outer words of every BAR, and addresses that differ in one bit; <= 3 cycles."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "requests")
    bench = Bench(dut)
    hits = misses = 0
    for _ in range(60):
        edges = []
        for n, bars in enumerate(BARS):
            bench.models[n].write(4, 2, rng.choice([2, 2, 2, 0]))
            for index, size, wide in bars:
                address = rng.getrandbits(64 if wide else 32) if rng.random() < 0.7 else rng.getrandbits(24)
                address &= ~(size - 1)
                bench.place(n, index, address)
                beyond = [(address - 8) % (1 << 64), (address + size) % (1 << 64)]
                edges += [address, address + size - 8, *beyond, address ^ 1 << rng.randrange(3, 64)]
        await bench.show()
        for address in [*edges, rng.getrandbits(64) & ~7]:
            hit = await bench.check(address)
            hits, misses = hits + hit, misses + (not hit)
    assert hits > 200
    assert misses > 200
    assert max(bench.latencies) <= 3


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def disabled_functions_answer_nowhere(dut):
    """FUNC-DEC-2: memory space off hides a function's BARs and no other's; of overlapping ones the first wins."""
    await start(dut, "requests")
    bench = Bench(dut)
    bench.place(0, 0, 0x10_0000_1000)
    bench.place(1, 0, 0x10_0000_0000)
    for first, second, winner in ((2, 2, 0), (0, 2, 1), (2, 0, 0), (0, 0, None)):
        bench.models[0].write(4, 2, first)
        bench.models[1].write(4, 2, second)
        await bench.show()
        assert await bench.check(0x10_0000_1008) == (winner is not None)
        assert (bench.wanted(0x10_0000_1008) or (None,))[0] == winner


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def functions_in_reset_refuse(dut):
    """FUNC-DEC-3 (R72): what belongs to a function in reset is a miss that names the function; other functions answer as always."""
    await start(dut, "requests")
    bench = Bench(dut)
    for n in (0, 1):
        bench.models[n].write(4, 2, 2)
        bench.place(n, 0, 0x10_0000_4000 * (n + 1))
    await bench.show()
    for in_reset in (0, 1, 2, 3):
        for n in (0, 1):
            getattr(dut, f"state__{n}").value = pack(ConfigState, memory_enable=1, in_reset=in_reset >> n & 1)
        await ClockCycles(dut.clk, 1)
        for n in (0, 1):
            await bench.requests.put(pack(DecodeRequest, address=0x10_0000_4000 * (n + 1) + 8))
            answer = unpack(DecodeResponse, await bench.responses.get())
            assert (answer.hit, answer.function) == (not in_reset >> n & 1, n)
        await bench.requests.put(pack(DecodeRequest, address=0x77_7000_0008))
        answer = unpack(DecodeResponse, await bench.responses.get())
        assert (answer.hit, answer.function) == (0, 0)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def rom_needs_two_enables(dut):
    """FUNC-DEC-4 (R59): a ROM answers as BAR 6 while memory space and the ROM itself are enabled; first, last and outer words."""
    await start(dut, "requests")
    bench = Bench(dut)
    for memory, rom in ((1, 1), (0, 1), (1, 0), (0, 0)):
        dut.bars__6.value = 0xABCD_4000 | rom
        dut.state__3.value = pack(ConfigState, memory_enable=memory)
        await ClockCycles(dut.clk, 1)
        for address in (0xABCD_4000, 0xABCD_7FF8, 0xABCD_3FF8, 0xABCD_8000, 0x1_ABCD_4000):
            await bench.requests.put(pack(DecodeRequest, address=address))
            answer = unpack(DecodeResponse, await bench.responses.get())
            assert answer.hit == (memory and rom and 0xABCD_4000 <= address < 0xABCD_8000)
            if answer.hit:
                assert (answer.function, answer.bar, answer.offset) == (3, 6, address - 0xABCD_4000)
