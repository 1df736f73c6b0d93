"""Virtual functions: configuration spaces and decoder, every access and every address compared with models.config_space."""

import random

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.models import config_space as model
from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.endpoint import descriptions_of
from ringwall.rtl.function import description as rtl
from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.function.decoder import AddressDecoder
from ringwall.rtl.function.layouts import FunctionSettings, Operation, UpdateBus, UpdateRequest
from ringwall.rtl.tlp.layouts import ConfigRequest, ConfigResponse, ConfigState, DecodeRequest, DecodeResponse
from ringwall.rtl.verilog import UltraScaleCard
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, start, unpack

LINK = {"link_capabilities": 3 | 8 << 4 | 1 << 22, "link_status": 3 | 8 << 4, "link_capabilities_2": 0b1110,
        "timeout_ranges": 1}  # fmt: skip
IDENTITY = {"class_code": 0x018000, "revision": 1}
AER = {"correctable": 0x71C1, "severity": 0x0046_2010}

# Function 0 has two virtual functions with a 32-bit BAR, function 1 none, function 2 three with two 64-bit BARs.
_FIRST = rtl.FunctionDescription(
    0x1234, 0x0001, 0x018000, bars=(rtl.Bar(0, 4096),), reports_errors=True,
    capabilities=(rtl.PcieCapability(has_flr=True), rtl.MsixCapability(5, 0, 0, 0, 0x800), rtl.PowerCapability(keeps_state=False)),
    extended=(rtl.SriovCapability(2, 0x1111, 3, bars=(rtl.Bar(0, 4096), rtl.Bar(3, 1 << 17, is_64=False))),),
)  # fmt: skip
_SECOND = rtl.FunctionDescription(0x1234, 0x0002, 0x018000, bars=(rtl.Bar(0, 4096),), reports_errors=True)
_THIRD = rtl.FunctionDescription(
    0x1AF4, 0x1042, 0x018000, bars=(rtl.Bar(0, 16384), rtl.Bar(2, 4096)), reports_errors=True,
    capabilities=(rtl.PcieCapability(has_flr=True, timeout_ranges=3), rtl.MsixCapability(3, 2, 0, 2, 0x800),
                  rtl.VirtioCapability(1, 0, 0, 0x38), rtl.VirtioWindow()),
    extended=(rtl.AerCapability(), rtl.AtsCapability(), rtl.SriovCapability(
        3, 0x1042, 3, bars=(rtl.Bar(0, 16384), rtl.Bar(2, 4096)), is_lowest=False)),
)  # fmt: skip
FUNCTIONS = (_FIRST, _SECOND, _THIRD, *[_FIRST.virtual()] * 2, *[_THIRD.virtual()] * 3)
OWNERS = {3: (0, 0), 4: (0, 1), 5: (2, 0), 6: (2, 1), 7: (2, 2)}  # number -> physical function, which of its virtual ones
SRIOV = {0: 0x100, 2: 0x150}
CONTROL, COUNT, PAGE, BARS = 8, 0x10, 0x20, 0x24  # in the SR-IOV capability
DEVICE_CONTROL = 0x48
POWER = 0x8C  # of function 0


def first_model():
    """Function 0, then what its virtual functions have."""
    pcie = model.pcie_capability(**LINK, flr=True, link_control_2=3, link_control_2_rw=0xF)
    msix = model.msix_capability(5, table_bar=0, table_offset=0, pba_bar=0, pba_offset=0x800)
    sriov = model.sriov_capability(2, first_offset=3, stride=1, device=0x1111, has_ari=True, bars={
        0: model.BarDescription(4096), 3: model.BarDescription(1 << 17, is_64=False)})  # fmt: skip
    return _model(0x1234, 0x0001, {0: 4096}, (pcie, msix, model.power_capability()), (sriov,), (pcie, msix), ())


def third_model():
    """Function 2, likewise."""
    pcie = model.pcie_capability(**LINK | {"timeout_ranges": 3}, flr=True)
    rest = (model.msix_capability(3, table_bar=2, table_offset=0, pba_bar=2, pba_offset=0x800),
            model.virtio_capability(1, 0, 0, 0x38), model.virtio_capability(5))  # fmt: skip
    extended = model.aer_capability(**AER), model.ats_capability()
    sriov = model.sriov_capability(3, first_offset=3, stride=1, device=0x1042, dependency=2,
                                   bars={0: model.BarDescription(16384), 2: model.BarDescription(4096)})  # fmt: skip
    return _model(0x1AF4, 0x1042, {0: 16384, 2: 4096}, (pcie, *rest), (*extended, sriov), (pcie, *rest), extended)


def _model(vendor, device, bars, capabilities, extended, virtual_capabilities, virtual_extended):
    known = {"bars": {n: model.BarDescription(size) for n, size in bars.items()}, "is_multi_function": True, **IDENTITY}
    plain = model.FunctionDescription(vendor, device, **known)
    virtual = model.virtual_function(plain, capabilities=virtual_capabilities, ext_capabilities=virtual_extended)
    return model.ConfigSpace(model.FunctionDescription(vendor, device, capabilities=capabilities, ext_capabilities=extended,
                                                       virtual=virtual, **known))  # fmt: skip


def second_model():
    known = {"bars": {0: model.BarDescription(4096)}, "is_multi_function": True, **IDENTITY}
    return model.ConfigSpace(model.FunctionDescription(0x1234, 0x0002, capabilities=(model.pcie_capability(**LINK),), **known))


class Joined(wiring.Component):
    """Configuration space and decoder of one card."""

    def __init__(self, functions):
        self.space, self.decoder = ConfigSpace(functions=functions), AddressDecoder(functions=functions)
        count = len(functions)
        super().__init__({
            "requests": In(stream.Signature(ConfigRequest)), "responses": Out(stream.Signature(ConfigResponse)),
            "addresses": In(stream.Signature(DecodeRequest)), "places": Out(stream.Signature(DecodeResponse)),
            "updates": In(UpdateBus()), "link_reset": In(1), "busy": In(1).array(count), "interrupt": In(1).array(count),
            "state": Out(ConfigState).array(count), "settings": Out(FunctionSettings).array(count), "reset": Out(1).array(count),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.space, m.submodules.decoder = space, decoder = self.space, self.decoder
        for ours, theirs in ((self.requests, space.requests), (self.addresses, decoder.requests), (self.updates, space.updates)):
            wiring.connect(m, wiring.flipped(ours), theirs)
        for ours, theirs in ((self.responses, space.responses), (self.places, decoder.responses)):
            wiring.connect(m, theirs, wiring.flipped(ours))
        m.d.comb += space.link_reset.eq(self.link_reset)
        for n in range(len(self.state)):
            m.d.comb += [
                space.busy[n].eq(self.busy[n]), space.interrupt[n].eq(self.interrupt[n]), self.reset[n].eq(space.reset[n]),
                self.state[n].eq(space.state[n]), decoder.state[n].eq(space.state[n]), self.settings[n].eq(space.settings[n]),
            ]  # fmt: skip
        for name in ("bars", "virtual_bars"):
            m.d.comb += [inner.eq(outer) for inner, outer in zip(getattr(decoder, name), getattr(space, name))]
        return m


def test_virtual(request):
    run(Joined(FUNCTIONS), module=__name__, node=request.node.nodeid)


class Bench:
    """Software in front of the card, and the models of its physical functions, which know their virtual ones."""

    def __init__(self, dut):
        self.dut, self.rng = dut, random.Random(cocotb.RANDOM_SEED)
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.addresses, self.places = Stream(dut, "addresses"), Stream(dut, "places")
        self.updates, self.answers = Stream(dut, "updates__request"), Stream(dut, "updates__response")
        self.physical = [first_model(), second_model(), third_model()]
        for source in (self.responses, self.places, self.answers):
            cocotb.start_soon(source.watch([]))

    async def begin(self):
        await start(self.dut, "requests", "addresses", "updates__request")
        return self

    def model(self, function):
        """The model of a function; None while there is none."""
        if function < 3:
            return self.physical[function]
        owner, n = OWNERS.get(function, (1, 0))
        known = self.physical[owner].virtual_functions
        return known[n] if n < len(known) else None

    async def access(self, function, at, value=None, enables=15):
        await self.requests.put(pack(ConfigRequest, function=function, bus=9, device=2, register=at // 4, is_write=value is not None,
                                     byte_enable=enables, data=value or 0))  # fmt: skip
        return unpack(ConfigResponse, await self.responses.get())

    async def write(self, function, at, value, enables=15):
        known = self.model(function)
        answer = await self.access(function, at, value, enables)
        assert answer.unsupported == (known is None), f"function {function} at {at:#x}"
        if known is not None:
            known.write_dword(at, enables, value)

    async def check(self, function, at):
        known, answer = self.model(function), await self.access(function, at)
        assert answer.unsupported == (known is None), f"function {function} at {at:#x}"
        if known is not None:
            got, wanted = answer.data, known.read_dword(at)
            assert got == wanted, f"function {function} at {at:#x}: {got:#x}, must be {wanted:#x}"

    async def check_all(self, count=None):
        """Check all that there is, or ``count`` dwords of each function beside those that every reset changes."""
        for function in range(9):
            places = [*range(0, 0x190, 4), *(4 * self.rng.randrange(0x64, 1024) for _ in range(4))]
            for at in places if count is None else [0, 4, DEVICE_CONTROL, 0x7C, 0x104, *self.rng.choices(places, k=count)]:
                if function not in (2, 5, 6, 7) or at != self.window(function) + 16:
                    await self.check(function, at)

    @staticmethod
    def window(function):
        return 0x40 + 0x3C + 12 + 16

    async def set(self, function, *, count=None, enable=None, memory=None, page=None):
        """Software's way: through the SR-IOV capability of a physical function."""
        at = SRIOV[function]
        for offset, value in ((COUNT, count), (PAGE, page)):
            if value is not None:
                await self.write(function, at + offset, value)
        if enable is not None:
            await self.write(function, at + CONTROL, enable | (memory or 0) << 3)

    async def set_status(self, function, bits, at=0x104):
        """The card sets bits of AER's status."""
        await self.updates.put(pack(
            UpdateRequest, function=function, register=at // 4, operation=Operation.SET.value, data=bits, is_last=1))
        await self.answers.get()
        self.model(function).set_bits(at, 4, bits)

    def states(self):
        """Compare what the card must know of each function with its model."""
        for function in range(8):
            known = self.model(function)
            state = unpack(ConfigState, int(getattr(self.dut, f"state__{function}").value))
            owner = self.physical[OWNERS.get(function, (function,))[0]]
            control = owner.read(DEVICE_CONTROL, 2)
            assert (state.mps_code, state.mrrs_code, state.extended_tag) == (control >> 5 & 7, control >> 12 & 7, control >> 8 & 1)
            assert (state.relaxed_ordering, state.no_snoop) == (control >> 4 & 1, control >> 11 & 1)
            assert state.bus_master == (known is not None and known.may_request)
            memory = known is not None and (known.memory_enable if function < 3 else owner.read(SRIOV[OWNERS[function][0]] + 8, 2) >> 3 & 1)
            assert state.memory_enable == (memory and not owner.power_state), function
            msix = known.read(0x7C, 4) >> 30 if known is not None and function != 1 else 0
            assert (state.msix_enable, state.msix_mask) == (msix >> 1, msix & 1)

    def wanted(self, address):
        for function, known in enumerate(self.physical):
            found = known.decode(address)
            if found is not None:
                return function, *found
        for function in (0, 2):
            found = self.physical[function].virtual_decode(address)
            if found is not None:
                number, bar, offset = found
                return next(n for n, place in OWNERS.items() if place == (function, number - 1)), bar, offset
        return None

    async def decode(self, address):
        await self.addresses.put(pack(DecodeRequest, address=address))
        answer = unpack(DecodeResponse, await self.places.get())
        found, wanted = (answer.function, answer.bar, answer.offset) if answer.hit else None, self.wanted(address)
        assert found == wanted, f"{address:#x}: {found}, must be {wanted}"
        assert not answer.hit or answer.claimed, f"{address:#x} is a hit that nobody claims"
        return found


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def random_accesses_do_what_the_model_does(dut):
    """FUNC-VF-1 (R54, R58, R74): random writes, byte enables, resets and updates at physical and virtual functions: all is the model's."""
    bench = await Bench(dut).begin()
    rng, seen = bench.rng, set()
    await bench.check_all()
    for n in range(800):
        function = rng.randrange(9)
        function = rng.choice([0, 2]) if rng.random() < 0.3 else function
        common = [0x04, 0x0C, 0x3C, DEVICE_CONTROL, 0x4C, 0x50, 0x68, 0x7C, *range(0, 0x190, 4)]
        special = [SRIOV[function] + at for at in (CONTROL, CONTROL, CONTROL, COUNT, COUNT, PAGE, *range(BARS, BARS + 24, 4))] * 9 \
            if function in SRIOV else []
        at = rng.choice(common + special)
        value, enables = rng.getrandbits(32), rng.choice([15, 15, rng.randrange(16)])
        if function in (2, 5, 6, 7) and at in range(bench.window(function), bench.window(function) + 20):
            continue
        if at == DEVICE_CONTROL and rng.random() < (0.95 if function < 3 else 0.5):
            value &= ~0x8000
        if (function, at) == (2, 0x14C):
            value &= ~(1 << 31)  # what a Smallest Translation Unit does while ATS is enabled is the card's choice
        if function in SRIOV and at == SRIOV[function] + COUNT:
            value = rng.choice([0, 1, 2, 3, 3, 4, 0xFFFF])
        if function in SRIOV and at == SRIOV[function] + CONTROL:
            value = value & ~1 | (rng.random() < 0.6)
            if not bench.physical[function].read(at, 2) & 1:
                await bench.write(function, SRIOV[function] + COUNT, rng.choice([0, 1, 2, 3, 4, 0xFFFF]))
        if function in (5, 6, 7) and at in (0x104, 0x110) and bench.model(function) is not None:
            await bench.set_status(function, rng.getrandbits(32) & bench.model(function).rw1c_bits(at), at)
        await bench.write(function, at, value, enables)
        await bench.check(function, at)
        bench.states()
        seen.add(tuple(len(one.virtual_functions) for one in bench.physical))
        if n % 200 == 0:
            await bench.check_all(12)
    await bench.check_all()
    assert len(seen) > 4, seen


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def addresses_belong_to_virtual_functions(dut):
    """FUNC-VF-2 (R58): all page sizes, random bases, first and last words of every slice and their neighbours; counts above TotalVFs."""
    bench = await Bench(dut).begin()
    rng, hits, misses = bench.rng, set(), 0
    for _ in range(20):
        edges = []
        for function, bars in ((0, ((0, True), (3, False))), (2, ((0, True), (2, True)))):
            at = SRIOV[function]
            await bench.set(function, enable=0)
            await bench.set(function, count=rng.choice([1, 2, 3, 3, 7, 0xFFFF]), page=1 << rng.choice([0, 1, 4, 6, 8, 10]))
            for bar, is_64 in bars:
                await bench.write(function, at + BARS + 4 * bar, 0xFFFF_FFFF)
                await bench.check(function, at + BARS + 4 * bar)
                mask = bench.physical[function].read_dword(at + BARS + 4 * bar) & -16
                base, size = rng.getrandbits(64 if is_64 else 32) & (mask | 0xFFFF_FFFF << 32), mask & -mask
                if rng.random() < 0.1:
                    base = -size & ((1 << 64 if is_64 else 1 << 32) - 1)  # the next slice is beyond the end of the address space
                await bench.write(function, at + BARS + 4 * bar, base & 0xFFFF_FFFF)
                if is_64:
                    await bench.write(function, at + BARS + 4 * bar + 4, base >> 32)
                places = [base + n * size + byte for n in range(5) for byte in (0, size - 8, 8 * rng.randrange(size // 8))]
                edges += [place % (1 << 64) for place in (*places, base - 8, base ^ 1 << rng.randrange(12, 64))]
            await bench.set(function, enable=rng.random() < 0.9, memory=rng.random() < 0.9)
        for address in edges:
            found = await bench.decode(address)
            hits.add(found and found[0])
            misses += found is None
    assert hits >= set(OWNERS)
    assert misses > 60


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def the_end_of_vf_enable_is_a_reset(dut):
    """FUNC-VF-3 (R72): VF Enable off, FLR or D3hot of the physical function, hot reset: all in reset until not busy; FLR of one: one."""
    bench = await Bench(dut).begin()

    def resets():
        return {n for n in range(8) if int(getattr(dut, f"reset__{n}").value)}

    async def enable():
        for function in (0, 2):
            await bench.set(function, count=3, enable=1, memory=1)
            await bench.write(function, 0x04, 6)
        for n in OWNERS:
            await bench.write(n, 0x04, 4)
            await bench.write(n, 0x7C, 0x8000_0000)
            if n > 4:  # a sticky bit, which a reset of its own keeps and its end does not
                await bench.set_status(n, 0x1000)

    for n in OWNERS:
        getattr(dut, f"busy__{n}").value = 1  # while a function is not in reset that means nothing
    for what, functions in (("off", {5, 6, 7}), ("flr", {2, 5, 6, 7}), ("own", {6}), ("power", {0, 3, 4}), ("off 0", {3, 4}), ("own", {3}),
                            ("hot", set(range(8)))):  # fmt: skip
        await enable()
        assert not resets() & set(OWNERS)
        bench.states()
        match what:
            case "off":
                await bench.set(2, enable=0)
            case "off 0":
                await bench.set(0, enable=0)
            case "flr":
                await bench.write(2, DEVICE_CONTROL, 0x8000)
            case "own":
                await bench.write(min(functions), DEVICE_CONTROL, 0x8000)
            case "power":
                await bench.write(0, POWER, 3)
                bench.states()
                await bench.write(0, POWER, 0)
            case "hot":
                dut.link_reset.value = 1
                await ClockCycles(dut.clk, 1)
                dut.link_reset.value = 0
                for one in bench.physical:
                    one.hot_reset()
        await ClockCycles(dut.clk, 4)
        assert resets() == functions, what
        await bench.check_all(12)  # waits until the dwords are restored
        assert resets() == functions & set(OWNERS), what
        if what == "off":  # on again before it is over: there, but it does not answer
            await bench.set(2, enable=1, memory=1)
            await bench.check_all(4)
            state = unpack(ConfigState, int(dut.state__6.value))
            assert (state.in_reset, state.memory_enable, state.bus_master) == (1, 1, 0)
            assert resets() == functions
        for n in OWNERS:
            getattr(dut, f"busy__{n}").value = 0
        await ClockCycles(dut.clk, 3)
        assert not resets()
        await bench.check_all(12)
        bench.states()
        for n in OWNERS:
            getattr(dut, f"busy__{n}").value = 1


@pytest.mark.parametrize("make, sentence", [
    (lambda: BlkConfig(virtual_functions=8), "between 0 and 7, not 8"),
    (lambda: EndpointConfig(disks=(BlkConfig(virtual_functions=3), BlkConfig(virtual_functions=3))), "at least one device, not 9"),
    (lambda: UltraScaleCard(EndpointConfig(disks=(BlkConfig(virtual_functions=1),))), "must have no virtual functions, not"),
])  # fmt: skip
def test_cards_are_checked(make, sentence):
    """FUNC-VF-5: a card with more functions than there is room for, or that its link cannot have, is refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_card_has_them_behind_its_disks():
    """FUNC-VF-7: virtual functions of two disks are behind both, disk by disk; the lowest has ARI Capable Hierarchy; none by default."""
    config = EndpointConfig(disks=(BlkConfig(virtual_functions=2, vectors=3), BlkConfig(), BlkConfig(virtual_functions=1, vectors=4)))
    found = rtl.check_functions(descriptions_of(config))
    assert rtl.virtual_functions_of(found) == {4: (1, 0), 5: (1, 1), 6: (3, 0)}
    assert [one.capability(rtl.MsixCapability).vectors for one in found] == [4, 3, 2, 4, 3, 3, 4]
    assert [one.map(n, 4).has("sriov", "control", "ari_hierarchy") for n, one in enumerate(found[:4])] == [False, True, False, False]
    assert (config.functions, config.physical_functions) == (7, 4)
    assert not any(one.capability(rtl.SriovCapability) or one.is_virtual for one in descriptions_of(EndpointConfig()))


@pytest.mark.parametrize("make, sentence", [
    (lambda: [_FIRST, _SECOND, _FIRST.virtual()], "must be those of the SR-IOV capabilities, all of them"),
    (lambda: [_FIRST.virtual(), _FIRST], "Virtual functions must be behind physical ones"),
    (lambda: [_FIRST, _SECOND, _SECOND, *[_THIRD.virtual()] * 2], "must be those of the SR-IOV capabilities, all of them"),
    (lambda: [_FIRST, _FIRST, _FIRST], "must have a number each, not 4"),
    (lambda: [_SECOND.virtual()], "must have an SriovCapability, not None"),
    (lambda: [rtl.FunctionDescription(1, 2, 3, bars=(rtl.Bar(0, 4096),), capabilities=_FIRST.capabilities[:2], extended=(
        rtl.SriovCapability(1, 1, 1),)).virtual()], "must lie in a BAR of the function, not 0"),
])  # fmt: skip
def test_virtual_functions_are_checked(make, sentence):
    """FUNC-VF-4: virtual functions that are not where their SR-IOV capability says are refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        ConfigSpace(functions=make())
