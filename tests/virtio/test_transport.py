"""virtio-pci registers of a function: a driver's steps, hostile accesses against a reference made of the text, every level and stream."""

from collections import Counter

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.virtio.layouts import QueueCommand, QueueOperation
from ringwall.rtl.virtio.transport import HOLD, virtio_function
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, random_ready, unpack
from ringwall.sim.transport_bench import (
    ACCESS_PLATFORM,
    CONFIG,
    CONFIG_BYTES,
    CONFIG_VECTOR,
    DESC,
    DEVICE,
    DEVICE_FEATURE,
    DEVICE_FEATURES,
    DEVICE_SELECT,
    DRIVER,
    DRIVER_FEATURE,
    DRIVER_SELECT,
    ENABLE,
    FIRST,
    FUNCTION,
    GENERATION,
    ISR,
    NO_VECTOR,
    NOTIFY,
    NOTIFY_OFF,
    NUM_QUEUES,
    OFFERED,
    QUEUE_SELECT,
    QUEUES,
    SIZE,
    STATUS,
    VECTOR,
    VECTORS,
    VERSION_1,
    begin,
    component,
)

TESTS = [
    "driver_brings_the_device_up", "features_are_negotiated", "queue_fields_take_only_what_is_legal", "halves_of_addresses_are_independent",
    "doorbells_become_kicks", "doorbells_before_driver_ok_are_nothing", "notifications_become_vectors", "isr_is_cleared_by_reading",
    "needs_reset_is_told", "generation_tells_of_every_change", "reset_waits_for_all", "reset_restores_everything",
    "random_accesses_match_the_reference", "streams_survive_back_pressure", "function_level_reset_is_a_device_reset",
]  # fmt: skip


def test_transport(request):
    run(component(), module=__name__, node=request.node.nodeid, params={"strict": False}, testcase=TESTS)


def test_strict_transport(request):
    run(component(strict=True), module=__name__, node=request.node.nodeid, params={"strict": True},
        testcase=["features_are_negotiated", "random_accesses_match_the_reference"])  # fmt: skip


def test_many_queues(request):
    run(component(queues=(64,) * 59), module=__name__, node=request.node.nodeid, testcase=["many_queues_are_served"])


@pytest.mark.parametrize("changes, sentence", [
    ({"function": 256}, "between 0 and 255, not 256"),
    ({"device_features": 1 << 24}, "bits 0 to 23 and 50 to 127, not 16777216"),
    ({"device_features": 1 << 30}, "bits 0 to 23 and 50 to 127"),
    ({"device_features": 1 << 128}, "bits 0 to 23 and 50 to 127"),
    ({"transport_features": 1 << 33}, "must be VERSION_1 and bits of 0x9ff30000000, not 8589934592"),
    ({"transport_features": 1 << 32 | 1 << 41}, "must be VERSION_1 and bits of"),
    ({"transport_features": 1 << 32, "strict": True}, "must offer ACCESS_PLATFORM, not 4294967296"),
    ({"queues": ()}, r"at least one, not \(\)"),
    ({"queues": (24,)}, r"powers of two up to 32768, at least one, not \(24,\)"),
    ({"first_queue": 62}, "numbers below 64, not 62 to 64"),
    ({"config_bytes": -1}, "0 to 4096 bytes, not -1"),
    ({"config_bytes": 4097}, "0 to 4096 bytes, not 4097"),
    ({"dependencies": ((2, (3, 4)),)}, "2 must be offered with one of"),
    ({"vectors": 1}, "between 2 and 128, not 1"),
    ({"vectors": 129}, "between 2 and 128, not 129"),
])  # fmt: skip
def test_parameters_are_checked(changes, sentence):
    """VIRTIO-PCI-1 (V005, V007, V110): features that cannot be honoured and numbers out of range are refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        component(**changes)


def test_offer():
    """VIRTIO-PCI-2 (R46, V120, V121, V123): by default VERSION_1, ACCESS_PLATFORM and ORDER_PLATFORM are offered."""
    assert component().offered == OFFERED


def test_virtio_function():
    """VIRTIO-PCI-3 (V069, V070, V071, V075, V094, V110): IDs, BARs and structures of a virtio function; wrong vectors are refused."""
    made = virtio_function(device_type=2, class_code=0x018000, queues=3, config_bytes=61, vectors=4)
    assert (made.vendor_id, made.device_id, made.revision) == (0x1AF4, 0x1042, 1)
    assert made.subsystem_id >= 0x40
    assert [(c.cfg_type, c.bar, c.offset, c.length) for c in made.capabilities if hasattr(c, "cfg_type")] == [
        (1, 0, 0, 64), (3, 0, ISR, 1), (4, 0, CONFIG, 61), (2, 0, NOTIFY, 12)]  # fmt: skip
    for vectors in (1, 129):
        with pytest.raises(ValueError, match=f"between 2 and 128, not {vectors}"):
            virtio_function(device_type=2, class_code=0, queues=1, config_bytes=8, vectors=vectors)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def driver_brings_the_device_up(dut):
    """VIRTIO-PCI-4 (V004, V010, V012, V078, V087): reset, features, queues, DRIVER_OK; the engine is told of each queue as it was set."""
    bench, _ = await begin(dut)
    assert await bench.read(STATUS, 1) == 0
    assert await bench.read(NUM_QUEUES, 2) == len(QUEUES)
    for n in range(CONFIG_BYTES):
        assert await bench.read(CONFIG + n, 1) == bench.content[n]
    await bench.reset()
    for status in (1, 3):
        await bench.write(STATUS, status, 1)
        assert await bench.read(STATUS, 1) == status
    assert await bench.offer() == OFFERED
    assert bench.level("access_platform") == bench.level("features") == 0
    assert await bench.accept(OFFERED)
    assert bench.level("features") == OFFERED
    assert bench.level("access_platform") == 1
    for n, size in enumerate(QUEUES):
        await bench.write(QUEUE_SELECT, n, 2)
        assert (await bench.read(SIZE, 2), await bench.read(NOTIFY_OFF, 2), await bench.read(ENABLE, 2)) == (size, n, 0)
        await bench.queue(n, size=8 << n)
        assert await bench.read(ENABLE, 2) == 1
        await ClockCycles(dut.clk, 20)
        command = vars(unpack(QueueCommand, bench.commands[-1]))
        assert not any(vars(command.pop("rules")).values())
        assert command == dict(zip(("descriptor_iova", "driver_iova", "device_iova"), bench.addresses(n)),
                                     operation=QueueOperation.ENABLE, queue=FIRST + n, size=8 << n)  # fmt: skip
    assert len(bench.commands) == len(QUEUES)
    assert bench.level("driver_ok") == 0
    await bench.write(STATUS, 15, 1)
    assert bench.level("driver_ok") == 1
    await bench.write(QUEUE_SELECT, len(QUEUES), 2)
    assert await bench.read(SIZE, 8) == NO_VECTOR << 16
    assert max(bench.bus.latencies) <= 2


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def features_are_negotiated(dut):
    """VIRTIO-PCI-5 (R22, V006, V008, V009, V079, V120-V122): any offered subset with VERSION_1 is taken, again after reset; no other."""
    bench, rng = await begin(dut)
    strict = params()["strict"]
    cases = [(OFFERED, True), (OFFERED & ~VERSION_1, False), (0, False), (OFFERED | 1 << 29, False), (VERSION_1 | ACCESS_PLATFORM, True)]
    cases += [(OFFERED | 1 << bit, False) for bit in (0, 23, 28, 34, 35, 40, 63, 64, 79, 96, 127)]
    cases += [(VERSION_1, not strict), (OFFERED & ~ACCESS_PLATFORM, not strict)]
    for features, legal in [*cases, *[(VERSION_1 | OFFERED & rng.getrandbits(64), None) for _ in range(10)]]:
        if legal is None:
            legal = bool(features & ACCESS_PLATFORM) or not strict
        for _ in range(2):
            await bench.reset()
            await bench.write(STATUS, 3, 1)
            assert await bench.accept(features) == legal, f"{features:#x}"
            for select in range(4):
                await bench.write(DRIVER_SELECT, select, 4)
                assert await bench.read(DRIVER_FEATURE, 4) == (features & OFFERED) >> 32 * select & 0xFFFFFFFF
            assert bench.level("features") == (features if legal else 0)
            await bench.write(STATUS, 15, 1)
            assert await bench.read(STATUS, 1) == (15 if legal else 3)
            assert bench.level("driver_ok") == legal
            assert bench.level("access_platform") == (legal and features >> 33 & 1)
            await bench.write(DRIVER_SELECT, 0, 4)
            await bench.write(DRIVER_FEATURE, ~features & 0xFFFFFFFF, 4)  # too late when they were taken
            if legal:
                assert bench.level("features") == features
    for select in (4, 5, 0x80000000, 0xFFFFFFFF):
        await bench.write(DEVICE_SELECT, select, 4)
        await bench.write(DRIVER_SELECT, select, 4)
        assert await bench.read(DEVICE_FEATURE, 4) == await bench.read(DRIVER_FEATURE, 4) == 0


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def queue_fields_take_only_what_is_legal(dut):
    """VIRTIO-PCI-6 (V081, V087, V088, V113-V116): sizes, vectors and enable take legal values only; an enabled queue keeps its settings."""
    bench, rng = await begin(dut)
    await bench.reset()
    for n, most in enumerate(QUEUES):
        await bench.write(QUEUE_SELECT, n, 2)
        size = most
        for value in [0, 1, 2, 3, most // 2, most - 1, most, most + 1, 2 * most, 0xFFFF, *(rng.getrandbits(16) for _ in range(20))]:
            await bench.write(SIZE, value & 0xFFFF, 2)
            if value in [1 << k for k in range(16)] and value <= most:
                size = value
            assert await bench.read(SIZE, 2) == size
        for register in (VECTOR, CONFIG_VECTOR):
            for value in [0, VECTORS - 1, VECTORS, 0x7FF, 0xFFFE, NO_VECTOR, 1, *(rng.getrandbits(16) for _ in range(10))]:
                await bench.write(register, value, 2)
                assert await bench.read(register, 2) == (value if value < VECTORS else NO_VECTOR)
        for value in (0, 2, 3, 0x100, 0x101, 0xFFFF):
            await bench.write(ENABLE, value, 2)
            assert await bench.read(ENABLE, 2) == 0
        await bench.write(ENABLE + 1, 1, 1)
        assert await bench.read(ENABLE, 2) == 0
        assert not bench.commands
        await bench.queue(n, size=4)
        await ClockCycles(dut.clk, 20)
        await bench.write(SIZE, 2, 2)
        await bench.write(ENABLE, 0, 2)
        await bench.write(ENABLE, 1, 2)
        for field, address in zip((DESC, DRIVER, DEVICE), bench.addresses(n)):
            await bench.write(field, rng.getrandbits(64), 8)
            assert await bench.read(field, 8) == address
        assert (await bench.read(SIZE, 2), await bench.read(ENABLE, 2)) == (4, 1)
        await ClockCycles(dut.clk, 20)
        assert len(bench.commands) == 1
        bench.commands.clear()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def halves_of_addresses_are_independent(dut):
    """VIRTIO-PCI-7 (V072, V073): 8, 16, 32 and 64-bit accesses of the addresses, in any order, change their own bytes only."""
    bench, rng = await begin(dut)
    mirror = {(n, field): 0 for n in range(len(QUEUES)) for field in (DESC, DRIVER, DEVICE)}
    for _ in range(300):
        n, field = rng.choice(list(mirror))
        size = rng.choice([1, 2, 4, 4, 8])
        lane, value = size * rng.randrange(8 // size), rng.getrandbits(8 * size)
        await bench.write(QUEUE_SELECT, n, 2)
        await bench.write(field + lane, value, size)
        mask = (1 << 8 * size) - 1 << 8 * lane
        mirror[n, field] = mirror[n, field] & ~mask | value << 8 * lane
        assert await bench.read(field + lane, size) == value
        n, field = rng.choice(list(mirror))
        await bench.write(QUEUE_SELECT, n, 2)
        assert await bench.read(field, 8) == mirror[n, field]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def doorbells_become_kicks(dut):
    """VIRTIO-PCI-8 (V045, V093, V119): each doorbell of 16 bits with its queue's number is a kick; other widths and numbers are not."""
    bench, rng = await begin(dut)
    await bench.start(queues=(0, 2))
    for _ in range(50):
        n = rng.choice([0, 2])
        bench.kicks.clear()
        await bench.ring(n)
        rang = cycle()
        while not bench.kicks:
            await RisingEdge(dut.clk)
            assert cycle() - rang < 2 + len(QUEUES)
        await ClockCycles(dut.clk, 10)
        assert bench.kicks == [FIRST + n]
    bench.kicks.clear()
    wrong = ((1, None, 2), (0, None, 4), (0, 0, 1), (0, 2, 2), (2, 0, 2), (3, None, 2), (2, 0x102, 2), (2, 0x10002, 4), (64, None, 2))
    for n, value, size in wrong:
        await bench.ring(n, value=value, size=size)
        await bench.read(NOTIFY + 4 * n, 2)
    await bench.bus.write(NOTIFY + 0x4000, 0, 2, function=FUNCTION)
    await ClockCycles(dut.clk, 20)
    assert not bench.kicks
    await bench.bus.raw(NOTIFY + 8, 0x33, 3 << 32 | 2, function=FUNCTION)  # two doorbells of which one exists
    await ClockCycles(dut.clk, 20)
    assert bench.kicks == [FIRST + 2]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def doorbells_before_driver_ok_are_nothing(dut):
    """VIRTIO-PCI-9 (V001): doorbells, notifications, changes at every earlier status give no kick and no interrupt, later neither."""
    bench, _ = await begin(dut)
    dut.msix_enable.value = 1

    async def disturb():
        for n in range(len(QUEUES)):
            await bench.ring(n)
            await bench.notify(n)
        await bench.pulse("config_changed")

    await disturb()
    await bench.reset()
    for status in (1, 3):
        await bench.write(STATUS, status, 1)
        await disturb()
    await bench.write(CONFIG_VECTOR, 0, 2)
    assert await bench.accept(OFFERED)
    for n in range(len(QUEUES)):
        await bench.queue(n, vector=1)
    await disturb()
    await ClockCycles(dut.clk, 50)
    await bench.write(STATUS, 15, 1)
    await ClockCycles(dut.clk, 50)
    assert not bench.kicks
    assert not bench.interrupts
    assert await bench.read(ISR, 1) == 0
    await bench.ring(1)
    await ClockCycles(dut.clk, 20)
    assert bench.kicks == [FIRST + 1]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def notifications_become_vectors(dut):
    """VIRTIO-PCI-10 (V112-V118): each event to its vector, NO_VECTOR to none; the ISR stays 0 for queues while MSI-X is on."""
    bench, rng = await begin(dut)
    dut.msix_enable.value = 1
    await bench.start(vectors=(0, NO_VECTOR, 3))
    mapped = {0: 0, 1: NO_VECTOR, 2: 3}
    for _ in range(60):
        if rng.random() < 0.3:
            n = rng.randrange(3)
            mapped[n] = rng.choice([0, 1, 2, 3, NO_VECTOR])
            await bench.write(QUEUE_SELECT, n, 2)
            await bench.write(VECTOR, mapped[n], 2)
        n = rng.randrange(3)
        await bench.notify(n)
        told = cycle()
        while not bench.interrupts and cycle() - told < 10:
            await RisingEdge(dut.clk)
        assert mapped[n] == NO_VECTOR or cycle() - told <= 3
        assert bench.vectors() == [v for v in [mapped[n]] if v != NO_VECTOR]
    assert await bench.read(ISR, 1) == 0
    for vector in (NO_VECTOR, 2, VECTORS):
        await bench.write(CONFIG_VECTOR, vector, 2)
        await bench.pulse("config_changed")
        await ClockCycles(dut.clk, 10)
        assert bench.vectors() == ([2] if vector == 2 else [])
        assert bench.level("interrupt") == 0
        assert await bench.read(ISR, 1) == 2


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def isr_is_cleared_by_reading(dut):
    """VIRTIO-PCI-11 (V096-V099): without MSI-X events set ISR bits and the level; reading the byte, and nothing else, clears both."""
    bench, _ = await begin(dut)
    await bench.start(vectors=(0, 0, 0))
    for queue, changed, wanted in ((True, False, 1), (False, True, 2), (True, True, 3)):
        if queue:
            await bench.notify(1)
        if changed:
            await bench.pulse("config_changed")
        await ClockCycles(dut.clk, 10)
        assert bench.level("interrupt") == 1
        assert await bench.read(ISR + 1, 1) == 0
        await bench.write(ISR, 0, 1)
        await bench.read(ISR + 8, 8)
        assert bench.level("interrupt") == 1
        assert await bench.read(ISR, 1) == wanted
        assert bench.level("interrupt") == 0
        assert await bench.read(ISR, 8) == 0
    assert not bench.interrupts


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def needs_reset_is_told(dut):
    """VIRTIO-PCI-12 (V002, V003, V096): NEEDS_RESET shows bit 64 and, after DRIVER_OK, sends the configuration vector once."""
    bench, _ = await begin(dut)
    dut.msix_enable.value = 1
    await bench.reset()
    await bench.write(STATUS, 3, 1)
    await bench.write(CONFIG_VECTOR, 1, 2)
    await bench.pulse("needs_reset")
    await ClockCycles(dut.clk, 20)
    assert await bench.read(STATUS, 1) == 64 | 3
    assert not bench.interrupts
    await bench.start()
    await bench.write(CONFIG_VECTOR, 1, 2)
    await bench.pulse("needs_reset")
    await ClockCycles(dut.clk, 20)
    assert await bench.read(STATUS, 1) == 64 | 15
    assert bench.vectors() == [1]
    await bench.write(STATUS, 15, 1)
    assert await bench.read(STATUS, 1) == 64 | 15
    assert await bench.read(ISR, 1) == 2
    await bench.start()
    assert await bench.read(STATUS, 1) == 15


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def generation_tells_of_every_change(dut):
    """VIRTIO-PCI-13 (V013): config_generation differs whenever the configuration changed since the last look, also 256 times."""
    bench, rng = await begin(dut)
    before = await bench.read(GENERATION, 1)
    assert await bench.read(GENERATION, 1) == before
    for changes in (1, 2, 255, 256, 257, 512, 1, 1):
        for _ in range(changes):
            content = rng.randbytes(CONFIG_BYTES)
            dut.config.value = int.from_bytes(content, "little")
            await bench.pulse("config_changed")
        await bench.read(STATUS, 1)  # not a look
        now = await bench.read(GENERATION, 1)
        assert now != before
        assert await bench.read(GENERATION, 1) == now
        assert await bench.read(CONFIG + 8, 8) == int.from_bytes(content[8:16], "little")
        before = now


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reset_waits_for_all(dut):
    """VIRTIO-PCI-14 (V010, V011, V080): status shows its old value until stopped; meanwhile writes do nothing and nothing leaves."""
    bench, rng = await begin(dut, stop=False)
    dut.msix_enable.value = 1
    dut.stopped.value = 1
    await bench.start(vectors=(0, 1, 2))
    await ClockCycles(dut.clk, 20)
    dut.stopped.value = 0
    bench.commands.clear()
    await bench.write(STATUS, 0, 1)
    assert bench.level("stop") == 1
    assert bench.level("driver_ok") == 0
    for _ in range(30):
        n = rng.randrange(3)
        await bench.ring(n)
        await bench.notify(n)
        await bench.pulse(rng.choice(["needs_reset", "config_changed"]))
        await bench.write(rng.choice([STATUS, QUEUE_SELECT, CONFIG_VECTOR]), rng.choice([0, 1, 2, 3]), 1)
        await bench.queue(n)
        assert await bench.read(STATUS, 1) == 15
        assert bench.level("access_platform") == 1  # what is in flight still needs to know
    assert not bench.kicks
    assert not bench.interrupts
    assert not bench.commands
    dut.stopped.value = 1
    since = cycle()
    while await bench.read(STATUS, 1) != 0:
        assert bench.level("stop") == 1
        assert cycle() - since < 400
    assert cycle() - since >= 5 * HOLD
    assert bench.level("stop") == 0
    assert bench.level("access_platform") == 0
    await ClockCycles(dut.clk, 50)
    assert not bench.kicks
    assert not bench.interrupts
    assert not bench.commands


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reset_restores_everything(dut):
    """VIRTIO-PCI-15 (V004, V016, V081, V115): after a device reset every register reads as after power-on, and the device works again."""
    bench, rng = await begin(dut)

    async def look():
        found = [await bench.read(offset, 8) for offset in (0, 8, 0x10)]
        for n in range(len(QUEUES)):
            await bench.write(QUEUE_SELECT, n, 2)
            found += [await bench.read(offset, 8) for offset in (0x18, 0x20, 0x28, 0x30, 0x38)]
        await bench.write(QUEUE_SELECT, 0, 2)
        return [*found, await bench.read(ISR, 1)]

    fresh = await look()
    for _ in range(3):
        await bench.start(vectors=(0, 1, 2))
        await bench.write(CONFIG_VECTOR, 3, 2)
        await bench.write(DEVICE_SELECT, rng.getrandbits(32), 4)
        await bench.notify(0)
        await bench.ring(1)
        await bench.reset()
        assert await look() == fresh
        bench.commands.clear()
        bench.kicks.clear()
    await bench.start()
    await bench.ring(2)
    await ClockCycles(dut.clk, 20)
    assert bench.kicks == [FIRST + 2]
    assert [unpack(QueueCommand, c).queue for c in bench.commands] == [FIRST, FIRST + 1, FIRST + 2]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def function_level_reset_is_a_device_reset(dut):
    """VIRTIO-PCI-21 (R72, V011): ``reset`` at 120 moments: stop within 1 cycle, no 0 in status before the end, then as after power-on."""
    bench, rng = await begin(dut, stop=False)
    dut.stopped.value = 1
    words = [await bench.read(offset, 8) for offset in (0, 8, 0x10, 0x18, 0x20, 0x28, 0x30)]
    for n in range(120):
        dut.stopped.value = 1
        if n % 4:
            await bench.start(vectors=(0, 1, 2), queues=range(n % 4))
        if n % 5 == 0:
            cocotb.start_soon(bench.write(rng.choice([STATUS, ENABLE, NOTIFY]), rng.choice([0, 1]), 2 if n % 2 else 1))
        elif n % 5 == 1:
            await bench.ring(0)
        elif n % 5 == 2:
            await bench.queue(2, enable=False)
            cocotb.start_soon(bench.write(ENABLE, 1, 2))
        await ClockCycles(dut.clk, 1 + n % 13)
        is_idle = not bench.level("stop")  # no device reset is under way
        dut.stopped.value = not is_idle
        dut.reset.value = 1
        await ClockCycles(dut.clk, 2)
        assert bench.level("stop") or not is_idle
        await ClockCycles(dut.clk, 1)
        bench.commands.clear()
        bench.kicks.clear()
        await ClockCycles(dut.clk, 60)
        for _ in range(rng.randrange(3) if is_idle else 0):
            await bench.queue(0)
            await bench.ring(0)
            assert await bench.read(STATUS, 1) & 0x40
        dut.stopped.value = 1
        since = cycle()
        while bench.level("stop"):
            await RisingEdge(dut.clk)
            assert cycle() - since < 200
        dut.stopped.value = 0
        assert [await bench.read(offset, 8) for offset in (0, 8, 0x10, 0x18, 0x20, 0x28, 0x30)] == words
        assert bench.level("stop") == 0  # the level is old
        dut.reset.value = 0
        await ClockCycles(dut.clk, 20)
        assert bench.level("stop") == bench.level("driver_ok") == 0
        assert not bench.kicks
    dut.stopped.value = 1
    bench.commands.clear()
    await bench.start()
    await bench.ring(2)
    await ClockCycles(dut.clk, 20)
    assert bench.kicks == [FIRST + 2]
    assert [unpack(QueueCommand, c).queue for c in bench.commands] == [FIRST, FIRST + 1, FIRST + 2]


class Reference:
    """What the registers must read after any accesses (device side of [VIRTIO1.4 4.1.4.3]), byte by byte; nothing acts by itself."""

    def __init__(self, strict):
        self.strict = strict
        self.reset()

    def reset(self):
        self.status = self.device_select = self.driver_select = self.select = 0
        self.accepted, self.config_vector = [0, 0, 0, 0], NO_VECTOR
        self.queues = [{"size": most, "vector": NO_VECTOR, "enable": 0, "areas": [0, 0, 0]} for most in QUEUES]

    @property
    def features(self):
        return sum(word << 32 * n for n, word in enumerate(self.accepted))

    def word(self, offset):
        """The 8 bytes at ``offset`` as they read."""
        queue = self.queues[self.select] if self.select < len(QUEUES) else None
        if offset == 0:
            offered = OFFERED >> 32 * self.device_select & 0xFFFFFFFF if self.device_select < 4 else 0
            return self.device_select | offered << 32
        if offset == 8:
            accepted = (self.features & OFFERED) >> 32 * self.driver_select & 0xFFFFFFFF if self.driver_select < 4 else 0
            return self.driver_select | accepted << 32
        if offset == 0x10:
            return self.config_vector | len(QUEUES) << 16 | self.status << 32 | self.select << 48  # generation is 0
        if offset == 0x18:
            if queue is None:
                return NO_VECTOR << 16
            return queue["size"] | queue["vector"] << 16 | queue["enable"] << 32 | self.select << 48
        if offset in (0x20, 0x28, 0x30):
            return 0 if queue is None else queue["areas"][offset // 8 - 4]
        return 0

    def write(self, offset, enables, data):
        old = self.word(offset)
        mask = sum(0xFF << 8 * n for n in range(8) if enables >> n & 1)
        new = old & ~mask | data & mask
        queue = self.queues[self.select] if self.select < len(QUEUES) else None
        if offset == 0:
            self.device_select = new & 0xFFFFFFFF
        elif offset == 8:
            self.driver_select = new & 0xFFFFFFFF
            if self.driver_select < 4 and not self.status & 8:
                word, high = self.accepted[self.driver_select], mask >> 32
                self.accepted[self.driver_select] = word & ~high | data >> 32 & high
        elif offset == 0x10:
            if enables & 3:
                self.config_vector = legal_vector(new & 0xFFFF)
            if enables & 0x10:
                self.set_status(data >> 32 & 0xFF)
                if not data >> 32 & 0xFF:
                    return
            self.select = new >> 48
        elif offset == 0x18 and queue is not None:
            size = new & 0xFFFF
            if enables & 3 and size and not size & size - 1 and size <= QUEUES[self.select] and not queue["enable"]:
                queue["size"] = size
            if enables & 0xC:
                queue["vector"] = legal_vector(new >> 16 & 0xFFFF)
            if enables & 0x10 and (data & mask) >> 32 & 0xFFFF == 1:
                queue["enable"] = 1
        elif offset in (0x20, 0x28, 0x30) and queue is not None and not queue["enable"]:
            queue["areas"][offset // 8 - 4] = new

    def set_status(self, value):
        if value == 0:
            self.reset()
            return
        refused = self.features & ~OFFERED or not self.features & VERSION_1 or (self.strict and not self.features & ACCESS_PLATFORM)
        if value & 8 and not refused:
            self.status |= 8
        if value & 4 and self.status & 8:
            self.status |= 4
        self.status |= value & 0x83


PLACES = [0, 8, 8, 0x10, 0x10, 0x10, 0x18, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0xFF8, 0x3000, 0x3008]


def legal_vector(vector):
    return vector if vector < VECTORS else NO_VECTOR


@cocotb.test(timeout_time=20, timeout_unit="ms")
async def random_accesses_match_the_reference(dut):
    """VIRTIO-PCI-16 (R74, V068, V073, V079): 6000 random accesses, any bytes, any place: as the reference; each answered in 16 cycles."""
    bench, rng = await begin(dut)
    reference = Reference(params()["strict"])
    likely = {0x10: [0xFF, 0x10, 0x10, 0xC0, 3], 0x08: [0xF, 0xF0, 0xFF], 0x18: [3, 0xC, 0x30, 0xFF]}
    reached = Counter()
    for _ in range(6000):
        offset = rng.choice([*PLACES, rng.randrange(0x8000) & ~7])
        if ISR <= offset < 0x3000:
            continue
        if rng.random() < 0.01 and not reference.status:  # the steps that random accesses hardly find
            for place, part, value in ((8, 0xFF, 0), (8, 0xFF, OFFERED >> 32 << 32 | 1), (0x10, 0x10, 11 << 32), (0x10, 0x10, 15 << 32)):
                await bench.bus.raw(place, part, value, function=FUNCTION)
                reference.write(place, part, value)
        enables = rng.choice([*likely.get(offset, [0xF, 0xF0, 0xFF]), rng.randrange(256)])
        sensible = rng.randrange(4) << 48 | rng.choice([0, 3, 11, 15, 15]) << 32 | 8
        data = rng.choice([rng.getrandbits(64), OFFERED >> 32 << 32 | 1, DEVICE_FEATURES << 32, sensible])
        if rng.random() < 0.5:
            ends = offset == 0x10 and enables & 0x10 and not data >> 32 & 0xFF
            await bench.bus.raw(offset, enables, data, function=FUNCTION)
            reference.write(offset, enables, data)
            for _ in range(200 if ends else 0):
                if not bench.level("stop"):
                    break
                await bench.bus.raw(0x10, 0xFF, function=FUNCTION)
            reached["reset"] += bool(ends)
        else:
            got, wanted = await bench.bus.raw(offset, enables, function=FUNCTION), reference.word(offset)
            assert got == wanted, f"offset {offset:#x}: {got:#x}, must be {wanted:#x}"
        reached[reference.status] += 1
        assert bench.level("driver_ok") == reference.status >> 2 & 1
    assert min(reached[status] for status in (0, "reset", 15)) > 5
    assert max(bench.bus.latencies) <= 16


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def streams_survive_back_pressure(dut):
    """VIRTIO-PCI-17: commands, kicks and vectors that nobody takes stop no register access, and none of them is lost."""
    bench, rng = await begin(dut, ready=False)
    dut.msix_enable.value = 1
    await bench.start(vectors=(0, 1, 2))
    for n in range(3):
        await bench.ring(n)
    task = cocotb.start_soon(bench.notify(1))
    for _ in range(200):
        await bench.read(rng.choice([STATUS, SIZE, CONFIG]), 1)
        await bench.ring(rng.randrange(3))
    assert not bench.commands + bench.kicks + bench.interrupts
    assert max(bench.bus.latencies) <= 4
    second = Stream(dut, "kicks")
    second.set_ready(1)
    await ClockCycles(dut.clk, 40)
    assert not bench.kicks, "no kick in front of its queue's command"
    Stream(dut, "commands").set_ready(1)
    Stream(dut, "interrupts").set_ready(1)
    await task
    await ClockCycles(dut.clk, 60)
    assert sorted(unpack(QueueCommand, c).queue for c in bench.commands) == [FIRST + n for n in range(3)]
    assert sorted(set(bench.kicks)) == [FIRST + n for n in range(3)]
    assert bench.vectors() == [1]


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def many_queues_are_served(dut):
    """VIRTIO-PCI-18: with 59 queues each has its settings, doorbell and vector; a device reset takes 600 cycles at most."""
    bench, rng = await begin(dut)
    dut.msix_enable.value = 1
    count = 59
    cocotb.start_soon(random_ready(Stream(dut, "commands"), rng, 0.3))
    vectors = {n: n % VECTORS for n in range(count)}
    await bench.start(queues=range(count), vectors=vectors)
    await ClockCycles(dut.clk, 10 * count)  # each waits for its turn
    told = [unpack(QueueCommand, command) for command in bench.commands]
    assert sorted((c.queue, c.device_iova) for c in told) == [(FIRST + n, bench.addresses(n)[2]) for n in range(count)]
    for n in rng.sample(range(count), 20):
        bench.kicks.clear()
        await bench.ring(n)
        await bench.notify(n)
        await ClockCycles(dut.clk, count + 4)
        assert bench.kicks == [FIRST + n]
        assert bench.vectors() == [vectors[n]]
    bench.bus.latencies.clear()
    since = cycle()
    await bench.reset()
    assert cycle() - since < 600
    assert max(bench.bus.latencies) <= 2
