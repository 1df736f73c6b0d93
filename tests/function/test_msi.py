"""MSI: messages and pending bits against models.config_space, under masks, resets and back-pressure."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.config_space import Change, ConfigSpace, FunctionDescription, msi_capability, pcie_capability
from ringwall.rtl.function.layouts import FunctionSettings
from ringwall.rtl.function.msi import Msi
from ringwall.rtl.tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, ConfigState
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, start, unpack

FUNCTION, CLIENT = 3, 12
MSI, MASTER = 0xA0, 4


@pytest.mark.parametrize("width", [64, 512])
def test_msi(request, width):
    run(Msi(function=FUNCTION, client=CLIENT, width=width), module=__name__, node=request.node.nodeid, params={"width": width})


@pytest.mark.parametrize("changes, sentence", [
    ({"width": 96}, "64, 128, 256 or 512 bits, not 96"), ({"function": 256}, "between 0 and 255, not 256"),
    ({"client": -1}, "between 0 and 63, not -1"),
])  # fmt: skip
def test_parameters_are_checked(changes, sentence):
    """FUNC-MSI-1: a wrong width or number is refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        Msi(**{"function": 1, "client": 1, "width": 64} | changes)


class Bench:
    """The requester's side; every message is checked for its form. The model's registers are what the component sees."""

    def __init__(self, dut):
        self.dut, self.rng, self.width = dut, random.Random(cocotb.RANDOM_SEED), params()["width"]
        self.model = ConfigSpace(FunctionDescription(1, 2, 3, capabilities=(
            pcie_capability(), msi_capability(32, is_64=True, has_masks=True, offset=MSI))))  # fmt: skip
        self.messages, self.endings, self.is_slow = [], [], False
        self.requests = Stream(dut, "requests")

    async def begin(self):
        await start(self.dut, "requests", "write_done")
        self.show()
        cocotb.start_soon(self.serve())
        return self

    def show(self):
        """Let the component see the model's registers."""
        read = self.model.read
        control = read(MSI + 2, 2)
        self.dut.settings.value = pack(
            FunctionSettings, msi_enable=control & 1, msi_multiple=control >> 4 & 7, msi_data=read(MSI + 12, 2),
            msi_address=read(MSI + 4, 4) | read(MSI + 8, 4) << 32, msi_mask=read(MSI + 16, 4))  # fmt: skip
        self.dut.state.value = pack(ConfigState, bus_master=self.model.bus_master)

    async def serve(self):
        """Take messages, end each as ``endings`` say."""
        bursts, beats, ends = (Stream(self.dut, name) for name in ("bursts", "write_data", "write_done"))
        while True:
            await ClockCycles(self.dut.clk, self.rng.randrange(12) + 1 if self.is_slow else 1)
            burst, beat = unpack(Burst, await bursts.get()), unpack(BurstData(self.width), await beats.get())
            assert (burst.length_bytes, burst.is_write, burst.function, burst.client, burst.relaxed_ordering) == (4, 1, FUNCTION, CLIENT, 0)
            lane = burst.address % (self.width // 8)
            assert (burst.address % 4, beat.keep, beat.first, beat.last) == (0, 0xF << lane, 1, 1)
            status = self.endings.pop(0) if self.endings else BurstStatus.OK
            if status is BurstStatus.OK:
                self.messages.append((burst.address, beat.data >> 8 * lane & 0xFFFF_FFFF))
            await ClockCycles(self.dut.clk, self.rng.randrange(30) + 1 if self.is_slow else 1)
            await ends.put(pack(BurstDone, status=status.value))

    async def rest(self):
        """Until each vector had its turn."""
        await ClockCycles(self.dut.clk, 32 * 60 if self.is_slow else 32 * 8)

    def pending(self):
        return int(self.dut.pending.value)

    async def request(self, *vectors):
        for vector in vectors:
            await self.requests.put(vector)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def messages_are_those_of_the_model(dut):
    """FUNC-MSI-2 (R19): random enables, masks, vectors, addresses and data, bus master, slow requester: each message and pending bit."""
    bench = await Bench(dut).begin()
    rng, model, seen = bench.rng, bench.model, 0
    for n in range(120):
        bench.is_slow = n >= 90
        match rng.randrange(6):
            case 0:
                model.write(4, 2, rng.choice([0, MASTER, MASTER]))
            case 1 | 2:
                model.write(MSI + 16, 4, rng.choice([0, rng.getrandbits(32), rng.getrandbits(32)]))
            case 3 if not model.read(MSI + 20, 4):
                model.write(MSI + 2, 2, rng.choice([0, 1, 1]) | rng.randrange(6) << 4)
            case 4:
                for at in (4, 8):
                    model.write(MSI + at, 4, rng.getrandbits(32))
                model.write(MSI + 12, 2, rng.getrandbits(16))
        bench.show()
        await RisingEdge(dut.clk)
        wanted = [event.detail for event in model.events if event.change is Change.MSI]
        await bench.rest()
        vectors = rng.sample(range(32), rng.randrange(4))
        own = {}
        for vector in vectors:
            own.setdefault(vector & model.msi_vectors - 1, vector)
        await bench.request(*own.values())
        wanted += [message for message in map(model.interrupt, own) if message is not None]
        model.events.clear()
        await bench.rest()
        assert sorted(bench.messages) == sorted((message.address, message.data) for message in wanted)
        assert bench.pending() == model.read(MSI + 20, 4)
        seen += len(wanted)
        bench.messages.clear()
    assert seen > 30


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def requests_that_wait_together_are_one(dut):
    """FUNC-MSI-3: many requests behind a mask are one message; one that ended with RESET comes again, once; other ends are final."""
    bench = await Bench(dut).begin()
    bench.model.write(4, 2, MASTER)
    bench.model.write(MSI + 4, 4, 0xFEE0_1004)
    bench.model.write(MSI + 12, 2, 0x4321)
    bench.model.write(MSI + 2, 2, 1 | 5 << 4)
    for mask in (1 << 7, 0xFFFF_FFFF):
        bench.model.write(MSI + 16, 4, mask)
        bench.show()
        await bench.request(7, 7, 7)
        await bench.rest()
        assert (bench.messages, bench.pending()) == ([], 1 << 7)
        bench.model.write(MSI + 16, 4, 0)
        bench.show()
        await bench.rest()
        assert (bench.messages, bench.pending()) == ([(0xFEE0_1004, 0x4327)], 0)
        bench.messages.clear()
    for endings, count in (([BurstStatus.RESET], 1), ([BurstStatus.RESET] * 3, 1), ([BurstStatus.FAULT], 0)):
        bench.endings = list(endings)
        await bench.request(31)
        await bench.rest()
        await bench.rest()
        assert (bench.messages, bench.pending(), bench.endings) == ([(0xFEE0_1004, 0x433F)] * count, 0, [])
        bench.messages.clear()


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_stop_drops_what_waits(dut):
    """FUNC-MSI-4 (R72): stop at any moment: at most the message under way ends, then ``stopped``; nothing old comes afterwards."""
    bench = await Bench(dut).begin()
    bench.model.write(4, 2, MASTER)
    bench.model.write(MSI + 2, 2, 1 | 5 << 4)
    for moment in range(0, 80, 3):
        bench.show()
        bench.is_slow = moment % 2 == 0
        bench.endings = [BurstStatus.RESET] * (moment % 3)
        await bench.request(*range(0, 32, 5))
        await ClockCycles(dut.clk, moment)
        dut.stop.value = 1
        begun = 0
        await ClockCycles(dut.clk, 2)
        while not int(dut.stopped.value):
            begun += 1
            assert begun < 100, "the stop has no end"
            await RisingEdge(dut.clk)
        told = len(bench.messages)
        assert bench.pending() == 0
        await bench.request(4)  # nothing new is begun
        await ClockCycles(dut.clk, 40)
        assert int(dut.stopped.value)
        dut.stop.value = 0
        await bench.rest()
        assert len(bench.messages) == told
        assert bench.pending() == 0
        bench.endings = []
        await bench.request(9)
        await bench.rest()
        assert len(bench.messages) == told + 1
        bench.messages.clear()
    assert not bench.endings
