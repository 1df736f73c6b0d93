"""Function level reset of a disk under load: silence, reset values, a working function again, and nobody else notices."""

import random

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.host import ConfigRead, ConfigWrite, Fault, MemoryRead, MemoryWrite, enable_msix
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.blk import BlkStatus
from ringwall.sim.card import Card, bench_card, bench_config
from ringwall.sim.compiled_bench import CompiledBench, Traffic
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

SECTOR = 512
PCIE, CAPABILITIES, CONTROL, STATUS = 0x10, 4, 8, 10  # capability ID; offsets in it
FLR_OFFERED, INITIATE_FLR, TRANSACTIONS_PENDING = 1 << 28, 1 << 15, 1 << 5
DEVICE_STATUS = 0x14  # of the common structure, which begins BAR 0
PATIENCE = bench_config().completion_timeout_cycles
BOUND = PATIENCE * 5 // 4 + 3000  # cycles that a reset may take


# -- software, for either bench --


def saved(info):
    """Read what software must put back after a reset; returns [(offset, size, value)]."""
    places = [(0x10 + 4 * n, 4) for n in range(6)] + [(0x3C, 1), (info.capabilities[PCIE][0] + CONTROL, 2), (0x04, 2)]
    found = []
    for offset, size in places:
        found.append((offset, size, (yield ConfigRead(info.function, offset, size))))
    return found


def restored(info, values):
    """Write back what :func:`saved` returned; memory and bus master are enabled last."""
    for offset, size, value in values:
        yield ConfigWrite(info.function, offset, size, value)


def initiated(info):
    """Initiate a function level reset."""
    at = info.capabilities[PCIE][0] + CONTROL
    control = yield ConfigRead(info.function, at, 2)
    yield ConfigWrite(info.function, at, 2, control | INITIATE_FLR)


def pending(info):
    """Return Transactions Pending."""
    return bool((yield ConfigRead(info.function, info.capabilities[PCIE][0] + STATUS, 2)) & TRANSACTIONS_PENDING)


def is_over(info):
    """Tell, once memory is enabled again, whether the function answers; it must be as after power-on then."""
    status = yield MemoryRead(info.bars[0].address + DEVICE_STATUS, 1)
    return status != 0xFF and (status == 0 or f"status is {status:#x} although the reset is over")


def differences(info, before):
    """Compare configuration space (64 dwords of it) and MSI-X table with those in ``before``; memory must be enabled."""
    found = []
    for n, wanted in enumerate(before):
        if n * 4 in (0x04, *range(0x10, 0x28, 4)):
            continue  # put back already
        value = yield ConfigRead(info.function, 4 * n, 4)
        if value != wanted:
            found.append(f"{4 * n:#x} is {value:#x}, must be {wanted:#x}")
    table = info.bars[info.msix.table_bar].address + info.msix.table_offset
    for n in range(info.msix.count):
        entry = yield from pair(table + 16 * n)
        if entry != [0, 1 << 32]:
            found.append(f"entry {n} of the MSI-X table is {entry}")
    return found


def pair(address):
    """Read 16 bytes as two numbers."""
    low = yield MemoryRead(address, 8)
    return [low, (yield MemoryRead(address + 8, 8))]


def dwords(info):
    """Read the configuration space in front of the virtio window."""
    found = []
    for n in range(info.capabilities.get(0x09, [0x100])[-1] // 4):
        found.append((yield ConfigRead(info.function, 4 * n, 4)))
    return found


class Watch:
    """Finds requests of a function while it must be silent; an observer of TLPs."""

    def __init__(self, function):
        self.function, self.is_silent, self.found, self.reads, self.writes = function, False, [], 0, 0

    def __call__(self, event, tlp):
        if tlp is not None and tlp.type in (TlpType.MRD, TlpType.MWR) and tlp.requester_id & 0xFF == self.function:
            self.reads += tlp.type is TlpType.MRD
            self.writes += tlp.type is TlpType.MWR
            if self.is_silent:
                self.found.append(f"{event.cycle}: {tlp.type.name} of function {self.function} at {tlp.address:#x} after its reset")


# -- the compiled card --


class Load(Traffic):
    """Requests of one disk and what its sectors must hold."""

    def __init__(self, bench, number, seed):
        super().__init__(bench, bench.disks[number], random.Random(seed), (1, 2, 8, 8, 32), cycles=60_000)

    def begin(self):
        super().begin(least=2, most=6)

    def settle(self):
        """After a reset: what was to be written is old or new, in pieces of a row; all else is as before."""
        lost, self.batch = self.batch, []
        reads = []
        for _, at, data in lost:
            if data is not None:
                reads.append((self.disk.blk.read(at // SECTOR, len(data)), at, data))
        self.bench.done(self.disk, [request for request, _, _ in reads])
        for request, at, data in reads:
            assert request.status == BlkStatus.OK
            for n in range(0, len(data), 8):
                assert request.data[n : n + 8] in (data[n : n + 8], self.image[at + n : at + n + 8]), f"byte {at + n:#x} is neither"
            self.image[at : at + len(data)] = request.data
            for sector in range(at // SECTOR, (at + len(data)) // SECTOR):
                self.disk.golden.store[sector * SECTOR : (sector + 1) * SECTOR] = self.image[sector * SECTOR : (sector + 1) * SECTOR]


def bench_of(seed, **parameters):
    """Return a bench with IOMMU, two disks and a watch on the first."""
    bench = CompiledBench(bench_config(64), seed=seed, **parameters)
    bench.now(bench.enable_iommu(levels=2))
    bench.compiled.step(1000)
    for info in bench.functions:  # enumeration asked for functions that are not there, which is an error of all that are
        bench.compiled.config_write(info.function, info.capabilities[PCIE][0] + STATUS, 2, 0xF)
    first = [bench.compiled.run(dwords(info)) for info in bench.functions]
    for n in range(2):
        bench.now(bench.disk(n, buffer_pages=128))
    watch, take = Watch(1), bench.compiled.observe

    def observe(event, tlp):
        watch(event, tlp)
        if take is not None:
            take(event, tlp)

    bench.compiled.observe = observe
    return bench, watch, first


def test_offer():
    """SYS-FLR-1 (R72): disks offer it, the IOMMU does not and ignores it; an idle disk is as after power-on but for the link's settings."""
    bench, watch, _ = bench_of(1)
    card, (wall, info, other) = bench.compiled, bench.functions
    for one, offered in ((wall, False), (info, True), (other, True)):
        assert bool(card.run(_read(one, CAPABILITIES)) & FLR_OFFERED) == offered
    load = Load(bench, 0, 1)
    for _ in range(3):
        load.begin()
        load.end()
    before = [card.run(dwords(one)) for one in bench.functions]
    values = card.run(saved(info))
    card.run(initiated(wall))
    assert card.run(dwords(wall)) == before[0]
    card.run(initiated(info))
    watch.is_silent = True
    fresh = card.run(dwords(info))
    assert fresh[1] & 0xFFFF == 0 and not any(word & -16 for word in fresh[4:10])
    control = info.capabilities[PCIE][0] + CONTROL
    assert card.config_read(1, control, 2) == 0x2810 | values[-2][2] & 0xE0  # Max_Payload_Size survives [PCIe5 6.6.2]
    assert card.config_read(1, info.msix.offset + 2, 2) == info.msix.count - 1
    card.step(2000)
    card.run(restored(info, values))
    assert card.run(is_over(info)) is True
    table = info.bars[info.msix.table_bar].address + info.msix.table_offset
    assert all(card.run(pair(table + 16 * n)) == [0, 1 << 32] for n in range(info.msix.count))
    common = info.bars[0].address
    words = [int.from_bytes(card.memory_read(common + at, 8), "little") for at in (0x10, 0x18, 0x20, 0x28, 0x30)]
    assert words == [0x1_FFFF | 0, 0xFFFF_0000 | bench.config.disks[0].queue_size, 0, 0, 0]
    assert [card.run(dwords(one)) for one in (wall, other)] == [before[0], before[2]]
    watch.is_silent = False
    assert not watch.found
    card.run(enable_msix(info, 2))
    bench.now(bench.disks[0].restart())
    read = bench.disks[0].blk.read(0, 64 * SECTOR)
    bench.done(bench.disks[0], [read])
    assert read.data == load.image[: 64 * SECTOR]
    bench.session.finish()
    card.close()


def _read(info, at):
    """Read a dword of the PCI Express capability."""
    return (yield ConfigRead(info.function, info.capabilities[PCIE][0] + at, 4))


def reset_under_load(bench, watch, loads, first, rng, *, early):
    """One reset of disk 0 at a random moment of both disks' traffic; returns the cycles that it took."""
    card, info, disk = bench.compiled, bench.functions[1], bench.disks[0]
    values = card.run(saved(info))
    for load in loads:
        load.begin()
    card.step(rng.randrange(1, rng.choice([60, 600, 4000])))
    if rng.random() < 0.2:  # in the middle of a device reset
        card.perform(MemoryWrite(info.bars[0].address + DEVICE_STATUS, 1, 0))
    card.run(initiated(info))
    begun = card.cycle
    if not early:
        card.step(200)  # a request that the link held up
        watch.is_silent = True
        card.step(rng.randrange(1, 3000))
    card.run(restored(info, values))
    while not (over := card.run(is_over(info))):
        assert card.cycle - begun < BOUND, "the reset has no end"
        card.step(20)
    assert over is True, over
    took, watch.is_silent = card.cycle - begun, True
    assert not card.run(pending(info))
    card.step(300)
    card.config_write(1, info.capabilities[PCIE][0] + STATUS, 2, 0xF)  # to ask a function in reset was an error
    wrong = card.run(differences(info, first))
    assert not wrong, wrong[0]
    if loads[1].batch:
        loads[1].end()  # on the other disk all goes on
    if rng.random() < 0.5:
        card.step(2000)
    card.run(enable_msix(info, 2))
    watch.is_silent = False
    assert not watch.found, watch.found[0]
    bench.now(disk.restart())
    loads[0].settle()
    return took


def test_resets_under_load(capsys):
    """SYS-FLR-2 (R72): 100 random moments: silence from the end on, all as after power-on, works again, the other disk goes on; judged."""
    took = []
    for seed, parameters in enumerate([{}, {"latency": 300, "jitter": 300, "split": "random"}, {"latency": 60, "stalls": 100},
                                       {"latency": 900, "split": "rcb"}]):  # fmt: skip
        bench, watch, fresh = bench_of(20 + seed, **parameters)
        rng = random.Random(seed)
        loads = [Load(bench, n, 2 * seed + n) for n in range(2)]
        first = bench.compiled.run(_now(fresh, bench))
        for n in range(25):
            took.append(reset_under_load(bench, watch, loads, first, rng, early=n % 2 == 0))
            if n % 5 == 0:
                for load in loads:
                    load.begin()
                    load.end()
        assert watch.reads > 200
        assert watch.writes > 200
        assert not bench.compiled.run(bench.iommu.read_faults())
        bench.session.finish()
        assert bench.session.board.comparisons > 1000
        bench.compiled.close()
    with capsys.disabled():
        print(f"\n  100 resets took {min(took)} to {max(took)} cycles")


def _now(fresh, bench):
    """What the disk's configuration space reads after a reset once software put back what it saved."""
    control = bench.functions[1].capabilities[PCIE][0] + CONTROL
    wanted = list(fresh[1])
    wanted[control // 4] = yield ConfigRead(1, control, 4)
    return wanted


# -- simulated, 256 bits --


def test_flr(request):
    run(bench_card(), module=__name__, node=request.node.nodeid, sim="verilator")


async def begin(dut, *, latency=60):
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED, latency=latency).begin()
    await card.enable_iommu()
    disks = [await card.disk(n, buffer_pages=96) for n in range(2)]
    watch = Watch(1)
    card.observers.append(watch)
    return card, disks, watch


async def one_by_one(card, disk, until, rng):
    """Good requests of a disk, one behind the other, until ``until()``; returns how many."""
    count = 0
    while not until():
        content = rng.randbytes(SECTOR * rng.choice([1, 3, 8]))
        write = disk.blk.write(100, content)
        await disk.done([write], cycles=3000)
        read = disk.blk.read(100, len(content))
        await disk.done([read], cycles=3000)
        assert (write.status, read.status, read.data) == (BlkStatus.OK, BlkStatus.OK, content)
        count += 1
    return count


async def reset(card, disk, watch, values):
    """Initiate it, put configuration back at once, wait for the end; returns the cycles that it took and whether reads were pending."""
    info, perform = card.functions[disk.function], card.port.run
    await perform(initiated(info))
    begun = cycle()
    was_pending = await perform(pending(info))
    await perform(restored(info, values))
    while not (over := await perform(is_over(info))):
        assert cycle() - begun < BOUND, "the reset has no end"
        await ClockCycles(card.dut.clk, 50)
    took, watch.is_silent = cycle() - begun, True
    assert over is True, over
    assert not await perform(pending(info))
    return took, was_pending


async def back(card, disk, watch):
    """Software goes on with the function; a good request works."""
    await card.port.run(enable_msix(card.functions[disk.function], 2))
    watch.is_silent = False
    assert not watch.found, watch.found[0]
    await disk.restart()
    content = card.rng.randbytes(9 * SECTOR)
    await disk.done([disk.blk.write(500, content)])
    read = disk.blk.read(500, len(content))
    await disk.done([read])
    assert (read.status, read.data) == (BlkStatus.OK, content)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def resets_under_load(dut):
    """SYS-FLR-3 (R72): at 256 bits: 16 moments; reads in flight are absorbed, silence behind the end, the other disk is never late."""
    card, (disk, other), watch = await begin(dut, latency=200)
    rng, ends = card.rng, [False]
    values = await card.port.run(saved(card.functions[1]))
    task = cocotb.start_soon(one_by_one(card, other, lambda: ends[0], random.Random(7)))
    were_pending = 0
    for n in range(16):
        for k in range(4):
            length = SECTOR * rng.choice([1, 8, 24])
            disk.blk.read(64 * k, length) if rng.randrange(2) else disk.blk.write(64 * k, rng.randbytes(length))
        await disk.offer()
        await ClockCycles(dut.clk, rng.randrange(1, 1500) if n % 2 else rng.randrange(100, 400))
        took, was_pending = await reset(card, disk, watch, values)
        were_pending += was_pending
        assert took < 3000
        await ClockCycles(dut.clk, rng.randrange(1, 500))
        await back(card, disk, watch)
    ends[0] = True
    assert await task > 20
    assert were_pending
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def reset_ends_without_completions(dut):
    """SYS-FLR-4 (R72): reads that are never answered, or after 9000 cycles: the end comes by completion timeout, late data goes nowhere."""
    card, (disk, other), watch = await begin(dut)
    values = await card.port.run(saved(card.functions[1]))
    for kind in ("MISSING", "LATE"):
        fault = Fault(kind, lambda tlp: tlp.requester_id & 0xFF == 1 and tlp.length_dw > 16, times=2, cycles=9000)
        card.host.policy.faults.append(fault)
        disk.blk.write(0, card.rng.randbytes(24 * SECTOR), framing="pages")
        await disk.offer()
        begun = cycle()
        while fault.times:
            assert cycle() - begun < 5000, "the reads that were to be struck never came"
            await ClockCycles(dut.clk, 20)
        took, was_pending = await reset(card, disk, watch, values)
        assert was_pending
        assert (PATIENCE - 1000 if kind == "MISSING" else 7000) < took < BOUND
        await back(card, disk, watch)
        await one_by_one(card, other, iter([False, False, True]).__next__, card.rng)
    card.finish()
