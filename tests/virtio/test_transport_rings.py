"""virtio-pci registers with all that a card may offer: rules of rings, doorbells with data, queue reset, suspend, configuration writes."""

import itertools

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.virtio.layouts import ConfigWrite, QueueCommand, QueueOperation
from ringwall.rtl.virtio.transport import KNOWN, virtio_function
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, cycle, unpack
from ringwall.sim.transport_bench import (
    CONFIG,
    CONFIG_VECTOR,
    DESC,
    DEVICE,
    DEVICE_FEATURES,
    DRIVER,
    DRIVER_FEATURE,
    DRIVER_SELECT,
    ENABLE,
    FIRST,
    FUNCTION,
    ISR,
    NO_VECTOR,
    NOTIFY,
    NOTIFY_DATA,
    NOTIFY_OFF,
    QUEUE_RESET,
    QUEUE_SELECT,
    QUEUES,
    SIZE,
    STATUS,
    VERSION_1,
    begin,
    component,
)

INDIRECT, EVENT_INDEX, PACKED, IN_ORDER = 28, 29, 34, 35
NOTIFICATION_DATA, NOTIF_CONFIG_DATA, RING_RESET, SUSPEND = 38, 39, 40, 43
WIDE = 1 << 52 | 1 << 63 | 1 << 64 | 1 << 70
DEPENDENCIES = (70, (2, 52)), (63, (64,)), (3, (4,))  # feature 3 is not offered
OFFERED = DEVICE_FEATURES | WIDE | KNOWN
RUNNING, IS_SUSPENDED = 15, 16


def test_transport_rings(request):
    run(component(device_features=DEVICE_FEATURES | WIDE, transport_features=KNOWN, dependencies=DEPENDENCIES), module=__name__,
        node=request.node.nodeid)  # fmt: skip


def test_no_configuration():
    """VIRTIO-PCI-28 (V100): a device without configuration announces no structure for it; one with configuration does."""
    for size in (0, 8):
        made = virtio_function(device_type=4, class_code=0xFF0000, queues=1, config_bytes=size, vectors=2)
        kinds = [c.cfg_type for c in made.capabilities if hasattr(c, "cfg_type")]
        assert kinds == [1, 3, *([4] if size else []), 2]
    assert not len(component(config_bytes=0).config)


async def prepare(dut, **how):
    bench, rng = await begin(dut, **{"features": OFFERED, **how})
    dut.suspended.value = 0
    cocotb.start_soon(bench.serve())
    return bench, rng


async def select(bench, number):
    await bench.write(QUEUE_SELECT, number, 2)


async def reset_queue(bench, number, *, cycles=400):
    """A driver's reset of a queue. [VIRTIO1.4 4.1.4.3.2]"""
    await select(bench, number)
    await bench.write(QUEUE_RESET, 1, 2)
    since = cycle()
    while await bench.read(QUEUE_RESET, 2):
        assert cycle() - since < cycles
    assert not bench.unserved
    assert await bench.read(ENABLE, 2) == 0


async def until_status(bench, wanted, others):
    """Wait until the status is ``wanted``; it is one of ``others`` before."""
    since = cycle()
    while (seen := await bench.read(STATUS, 1)) != wanted:
        assert seen in others, f"{seen:#x}"
        assert cycle() - since < 400


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def wide_features_are_negotiated(dut):
    """VIRTIO-PCI-22 (V005, V006, V008, V078, V079): features up to 127: what is offered is taken with what it needs, nothing else."""
    bench, rng = await prepare(dut)
    cases = [(OFFERED, True), (VERSION_1, True), (VERSION_1 | 1 << 63, False), (VERSION_1 | 1 << 63 | 1 << 64, True),
             (VERSION_1 | 1 << 70, False), (VERSION_1 | 1 << 70 | 1 << 2, True), (VERSION_1 | 1 << 70 | 1 << 52, True)]  # fmt: skip
    cases += [(OFFERED | 1 << bit, False) for bit in (3, 41, 53, 65, 69, 71, 95, 96, 127)]
    for _ in range(12):
        features = VERSION_1 | OFFERED & rng.getrandbits(128)
        needy = [all(not features >> other & 1 for other in others) for feature, others in DEPENDENCIES if features >> feature & 1]
        cases.append((features, not any(needy)))
    for features, legal in cases:
        await bench.reset()
        assert await bench.offer() == OFFERED
        await bench.write(STATUS, 3, 1)
        assert await bench.accept(features) == legal, f"{features:#x}"
        for window in range(4):
            await bench.write(DRIVER_SELECT, window, 4)
            assert await bench.read(DRIVER_FEATURE, 4) == (features & OFFERED) >> 32 * window & 0xFFFFFFFF
        assert bench.level("features") == (features if legal else 0)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def rules_are_handed_on(dut):
    """VIRTIO-PCI-23 (V088): the engine is told of the rings' rules as they were negotiated; packed ones may have any size, others not."""
    bench, rng = await prepare(dut)
    for accepted in itertools.product((0, 1), repeat=4):
        features = VERSION_1 | sum(bit << n for bit, n in zip(accepted, (PACKED, INDIRECT, EVENT_INDEX, IN_ORDER), strict=True))
        bench.commands.clear()
        await bench.start(features, queues=())
        n = rng.randrange(len(QUEUES))
        await select(bench, n)
        size = QUEUES[n]
        for value in [0, 1, 3, size - 1, size + 1, 0xFFFF, rng.randrange(1, size), rng.randrange(1, size)]:
            await bench.write(SIZE, value, 2)
            if 0 < value <= QUEUES[n] and (accepted[0] or value & (value - 1) == 0):
                size = value
            assert await bench.read(SIZE, 2) == size
        await bench.queue(n)
        await ClockCycles(dut.clk, 20)
        (command,) = (unpack(QueueCommand, payload) for payload in bench.commands)
        rules = command.rules
        assert (rules.packed, rules.indirect, rules.event_index, rules.in_order) == accepted
        assert (command.operation, command.queue, command.size) == (QueueOperation.ENABLE, FIRST + n, size)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def doorbells_carry_data(dut):
    """VIRTIO-PCI-24 (V092, V093, V119): doorbells of 16 bits or 32, with the index or queue_notif_config_data, as negotiated; no others."""
    bench, rng = await prepare(dut)
    for is_long, by_data in itertools.product((0, 1), repeat=2):
        await bench.start(VERSION_1 | is_long << NOTIFICATION_DATA | by_data << NOTIF_CONFIG_DATA, queues=(0, 2))
        numbers = []
        for n in range(len(QUEUES)):
            await select(bench, n)
            assert await bench.read(NOTIFY_OFF, 2) == n
            numbers.append(await bench.read(NOTIFY_DATA, 2) if by_data else n)
            assert by_data or await bench.read(NOTIFY_DATA, 8) == 0
        assert len(set(numbers)) == len(QUEUES)
        await ClockCycles(dut.clk, 20)
        bench.kicks.clear()
        for _ in range(30):
            n, size, hint = rng.choice([0, 2]), rng.choice([2, 4]), rng.getrandbits(16) << 16
            value = rng.choice([numbers[n], numbers[n], n, FIRST + n, numbers[1], rng.getrandbits(16)])
            await bench.ring(n, value=value | (hint if size == 4 else 0), size=size)
            await ClockCycles(dut.clk, 10)
            is_right = value == numbers[n] and size == (4 if is_long else 2)
            assert bench.kicks == ([FIRST + n] if is_right else []), (is_long, by_data, value, size)
            bench.kicks.clear()
        await bench.bus.raw(NOTIFY, 0xFF, 0, function=FUNCTION)  # one long doorbell and one that is not its queue's
        await ClockCycles(dut.clk, 10)
        assert bench.kicks == ([FIRST] if is_long and not by_data else [])
        bench.kicks.clear()


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def queues_are_reset_one_by_one(dut):
    """VIRTIO-PCI-25 (V014, V015, V016, V082-V086): queue_reset reads 1 until the engine is done with the queue, whose doorbells and
    notifications are nothing from then on; then all of it is as after a device reset, and it can be enabled with other settings."""
    bench, rng = await prepare(dut)
    dut.msix_enable.value = 1
    await bench.start(vectors=(0, 1, 2))
    for turn in range(40):
        n = rng.randrange(3)
        await select(bench, n)
        assert (await bench.read(QUEUE_RESET, 2), await bench.read(ENABLE, 2)) == (0, 1)
        for value in (0, 2, 0x100, 0x101):
            await bench.write(QUEUE_RESET, value, 2)
            assert await bench.read(QUEUE_RESET, 2) == 0
        await ClockCycles(dut.clk, 20)
        for log in (bench.commands, bench.kicks, bench.interrupts):
            log.clear()
        await bench.write(QUEUE_RESET, 1, 2)
        begun = cycle()
        other = (n + 1) % 3
        done = False
        while not done:
            seen = [await bench.read(offset, 2) for offset in (QUEUE_RESET, ENABLE)]
            done = not seen[0]
            assert seen in ([1, 1], [1, 0], [0, 0])  # it may end between the two
            if not done and turn % 2:
                for number in (n, other):
                    await bench.ring(number, value=FIRST + number, size=4)
                await bench.notify(n)
            assert cycle() - begun < 600
        assert dut.idle.value.to_unsigned() >> n & 1
        await ClockCycles(dut.clk, 20)
        command = unpack(QueueCommand, bench.commands.pop())
        assert (command.operation, command.queue) == (QueueOperation.RESET, FIRST + n)
        assert not bench.commands
        assert set(bench.kicks) <= {FIRST + other}
        assert not bench.vectors()
        assert [await bench.read(offset, 8) for offset in (SIZE, DESC, DRIVER, DEVICE, NOTIFY_DATA)] == [
            QUEUES[n] | NO_VECTOR << 16 | n << 48, 0, 0, 0, FIRST + n]  # fmt: skip
        await bench.ring(n, value=FIRST + n, size=4)
        await reset_queue(bench, n)  # one that is not enabled
        assert not bench.kicks or FIRST + n not in bench.kicks
        size, vector = 1 << rng.randrange(4), rng.randrange(3)
        await bench.queue(n, size=size, vector=vector)
        if turn % 3 == 0:
            await reset_queue(bench, n)  # at once
            await bench.queue(n, size=size, vector=vector)
        bench.kicks.clear()
        await bench.ring(n, value=FIRST + n, size=4)  # the engine may not know of the queue yet
        await ClockCycles(dut.clk, 60)
        assert bench.kicks == [FIRST + n]
        command = unpack(QueueCommand, bench.commands[-1])
        assert (command.operation, command.size, command.device_iova) == (QueueOperation.ENABLE, size, bench.addresses(n)[2])
        bench.kicks.clear()
        await bench.ring(n, value=FIRST + n, size=4)
        await bench.notify(n)
        await ClockCycles(dut.clk, 20)
        assert bench.kicks == [FIRST + n]
        assert bench.vectors() == [vector]
    await select(bench, 1)
    await bench.write(QUEUE_RESET, 1, 2)
    await bench.reset()  # of the device, in the middle
    await select(bench, 1)
    assert (await bench.read(QUEUE_RESET, 2), await bench.read(ENABLE, 2)) == (0, 0)
    await bench.start(VERSION_1)
    await select(bench, 1)
    await bench.write(QUEUE_RESET, 1, 2)  # not negotiated
    await ClockCycles(dut.clk, 200)
    assert (await bench.read(QUEUE_RESET, 2), await bench.read(ENABLE, 2)) == (0, 1)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reset_waits_behind_enable(dut):
    """VIRTIO-PCI-26 (V085): a queue whose ENABLE the engine has not taken is reset behind it: ENABLE, RESET, then 0 in queue_reset; what is
    written to the queue meanwhile is nothing."""
    bench, rng = await prepare(dut, ready=False)
    await bench.start()
    await select(bench, 1)
    await bench.write(QUEUE_RESET, 1, 2)
    for _ in range(30):
        assert [await bench.read(offset, 2) for offset in (QUEUE_RESET, ENABLE)] == [1, 1]
        for offset in (QUEUE_RESET, ENABLE):
            await bench.write(offset, rng.randrange(2), 2)
        await bench.write(SIZE, 2, 2)
        await bench.write(DESC, rng.getrandbits(64), 8)
        assert [await bench.read(offset, size) for offset, size in ((SIZE, 2), (DESC, 8))] == [QUEUES[1], bench.addresses(1)[0]]
    Stream(dut, "commands").set_ready(1)
    since = cycle()
    while await bench.read(QUEUE_RESET, 2):
        assert cycle() - since < 600
    told = [unpack(QueueCommand, payload) for payload in bench.commands]
    assert [c.operation for c in told if c.queue == FIRST + 1] == [QueueOperation.ENABLE, QueueOperation.RESET]


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def device_is_suspended(dut):
    """VIRTIO-PCI-27 (V017-V022): SUSPEND before DRIVER_OK or unaccepted is nothing; it shows in place of DRIVER_OK when all is quiet; then
    no interrupt, no register but status changes; changes are told behind the resume, no doorbell is lost; a reset ends it."""
    bench, rng = await prepare(dut)
    dut.msix_enable.value = 1
    await bench.start(VERSION_1)
    await bench.write(STATUS, RUNNING | IS_SUSPENDED, 1)
    await ClockCycles(dut.clk, 100)
    assert await bench.read(STATUS, 1) == RUNNING
    for turn in range(30):
        await bench.reset()
        await bench.write(STATUS, 3 | IS_SUSPENDED, 1)
        assert await bench.accept(OFFERED)
        await bench.write(CONFIG_VECTOR, 3, 2)
        for n in range(3):
            await bench.queue(n, vector=n)
        await bench.write(STATUS, RUNNING | IS_SUSPENDED, 1)  # too early: the driver was not ready
        assert await bench.read(STATUS, 1) == RUNNING
        await ClockCycles(dut.clk, 100)
        for log in (bench.commands, bench.kicks, bench.interrupts):
            log.clear()
        assert bench.level("suspend") == 0
        await bench.write(STATUS, rng.choice([RUNNING | IS_SUSPENDED, 11 | IS_SUSPENDED, IS_SUSPENDED]), 1)
        assert bench.level("suspend") == 1
        n = rng.randrange(3)
        if not dut.suspended.value:
            await bench.notify(n)  # what was under way is still told
            await ClockCycles(dut.clk, 20)
            assert bench.vectors() == [n]
        await until_status(bench, 11 | IS_SUSPENDED, [RUNNING])
        assert (bench.level("driver_ok"), bench.level("suspended")) == (0, 1)
        # Suspended.
        words = [await bench.read(offset, 8) for offset in range(0, 0x40, 8)]
        for offset in range(0, 0x40, 8):
            await bench.bus.raw(offset, 0xFF & ~(0x10 if offset == 0x10 else 0), rng.getrandbits(64), function=FUNCTION)
        writes = []
        watching = cocotb.start_soon(watch_config(dut, writes))
        await bench.write(CONFIG + 8, rng.getrandbits(32), 4)
        watching.cancel()
        assert not writes
        assert [await bench.read(offset, 8) for offset in range(0, 0x40, 8)] == words
        await bench.write(STATUS, 11 | IS_SUSPENDED, 1)
        change = turn % 3
        for _ in range(change):
            await bench.pulse("config_changed")
        if turn % 4 == 3:
            await bench.pulse("needs_reset")
        await bench.ring(n, value=FIRST + n, size=4)
        await ClockCycles(dut.clk, 50)
        assert await bench.read(ISR, 1) == 0
        assert not bench.interrupts
        after = 64 if turn % 4 == 3 else 0
        assert await bench.read(STATUS, 1) == 11 | IS_SUSPENDED | after
        if turn % 5 == 4:
            continue  # a device reset ends it
        await bench.write(STATUS, rng.choice([RUNNING, RUNNING | IS_SUSPENDED, 4]), 1)
        assert bench.level("suspend") == 0
        await until_status(bench, RUNNING | after, [11 | IS_SUSPENDED | after])
        assert bench.level("suspended") == 0
        await ClockCycles(dut.clk, 60)
        assert bench.kicks == [FIRST + n]
        assert bench.vectors() == ([3] if change or after else [])
        assert bench.level("driver_ok") == 1
        await bench.notify(n)
        await ClockCycles(dut.clk, 20)
        assert bench.vectors() == [n]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def what_waits_here_holds_the_end(dut):
    """VIRTIO-PCI-30 (V010, V016, V019): neither a queue reset, of a queue that is enabled or not, nor a suspend ends while an interrupt
    waits to be taken; a device reset does not while an interrupt, a kick or a command does. What is enabled meanwhile is nothing."""
    bench, _ = await prepare(dut)
    dut.msix_enable.value = 1
    await bench.start(queues=(0, 1), vectors=(0, 1, 2))
    held = {name: Stream(dut, name) for name in ("interrupts", "kicks", "commands")}

    async def stays(offset, size, wanted, *, enable=False):
        for _ in range(50):
            if enable:
                await bench.write(ENABLE, 1, 2)
            assert await bench.read(offset, size) == wanted
        held[name].set_ready(1)

    for n in (1, 2):
        await ClockCycles(dut.clk, 60)
        bench.commands.clear()
        name = "interrupts"
        held[name].set_ready(0)
        await bench.notify(0)
        await ClockCycles(dut.clk, 10)
        await select(bench, n)
        await bench.write(QUEUE_RESET, 1, 2)
        await stays(QUEUE_RESET, 2, 1, enable=True)
        await ClockCycles(dut.clk, 60)
        assert await bench.read(QUEUE_RESET, 2) == await bench.read(ENABLE, 2) == 0
        assert bench.vectors() == [0]
        assert [unpack(QueueCommand, c).operation for c in bench.commands] == [QueueOperation.RESET] * (n == 1)
    held[name].set_ready(0)
    await bench.notify(0)
    await bench.write(STATUS, RUNNING | IS_SUSPENDED, 1)
    await stays(STATUS, 1, RUNNING)
    await until_status(bench, 11 | IS_SUSPENDED, [RUNNING])
    for name in held:
        await bench.start(vectors=(0, 1, 2), queues=(0, 1))
        await ClockCycles(dut.clk, 60)
        held[name].set_ready(0)
        await bench.notify(0)
        await bench.ring(1, value=FIRST + 1, size=4)
        await bench.queue(2)
        await ClockCycles(dut.clk, 20)
        await bench.write(STATUS, 0, 1)
        await stays(STATUS, 1, RUNNING)
        await until_status(bench, 0, [RUNNING])


async def watch_config(dut, log):
    while True:
        await RisingEdge(dut.clk)
        write = unpack(ConfigWrite, int(dut.config_write.value))
        if write.enable:
            log.append((write.word, write.enable, write.data))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def configuration_can_be_written(dut):
    """VIRTIO-PCI-29 (R74): each write to the device configuration is told once, with its bytes; reads and writes elsewhere are not."""
    bench, rng = await prepare(dut)
    await bench.start()
    writes = []
    cocotb.start_soon(watch_config(dut, writes))
    for _ in range(60):
        size = rng.choice([1, 2, 4, 8])
        offset, value = size * rng.randrange(56 // size), rng.getrandbits(8 * size)
        place = rng.choice([CONFIG, CONFIG, 0x4000 + CONFIG, ISR + 8, NOTIFY + 0x40])
        await bench.write(place + offset, value, size)
        await bench.read(CONFIG + offset, size)
        lane = offset % 8
        assert writes == ([(offset // 8, (1 << size) - 1 << lane, value << 8 * lane)] if place == CONFIG else [])
        writes.clear()
