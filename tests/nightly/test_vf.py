"""Virtual functions of a disk: each is a disk of its own; they come, work, are reset and go, and nobody else notices."""

import random

import pytest

from ringwall.models.host import ConfigRead, ConfigWrite, MemoryRead, disable_virtual, enable_msix, enable_virtual, plan_virtual
from ringwall.models.virtio.blk import BlkStatus
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.sim.compiled_bench import CompiledBench

from ..system.test_flr import Load, Watch, initiated, is_over

SECTOR = 512
PATIENCE = 10_000  # cycles of the completion timeout
BOUND = PATIENCE * 5 // 4 + 3000  # that a reset may take
CONTROL, COUNT = 8, 0x10  # in the SR-IOV capability
# The disk is function 1, its virtual functions are 2 and 3.
CONFIG = EndpointConfig(
    width=64, iommu=IommuConfig(entries=16, ways=2, walks=4), completion_timeout_cycles=PATIENCE, tags=64, wall_tags=8,
    read_buffer_bytes=4096, disks=(BlkConfig(capacity_sectors=256, queue_size=64, virtual_functions=2),))  # fmt: skip


class Bench(CompiledBench):
    """The card with IOMMU and disk, then its virtual functions, and a watch on each of them."""

    def __init__(self, seed, count=2, **parameters):
        super().__init__(CONFIG, seed=seed, **parameters)
        self.watches = {n: Watch(n) for n in (1, 2, 3)}
        take = self.compiled.observe

        def observe(event, tlp):
            for watch in self.watches.values():
                watch(event, tlp)
            take(event, tlp)

        self.compiled.observe = observe
        self.now(self.enable_iommu(levels=1))
        self.info = self.functions[1]
        self.plan = self.compiled.run(plan_virtual(self.host, self.info))
        self.now(self.enable_virtual(0, count, self.plan))
        for n in range(1 + count):
            self.now(self.disk(n, buffer_pages=64))

    def settings(self, number):
        """Software puts back what a reset of a virtual function took."""
        info = self.functions[number]
        yield ConfigWrite(number, 0x04, 2, 4)
        begun = self.compiled.cycle
        while not (over := (yield from is_over(info))):
            assert self.compiled.cycle - begun < BOUND, "the reset has no end"
            self.compiled.step(20)
        assert over is True, over
        self.watches[number].is_silent = True  # until its driver begins again
        yield from enable_msix(info, 2)
        self.watches[number].is_silent = False

    def off(self):
        self.compiled.run(disable_virtual(self.info, self.plan))

    def on(self, count=2):
        self.compiled.run(enable_virtual(self.host, self.info, self.plan, count))

    def again(self, loads):
        """Bring virtual functions up again and find out what was written."""
        for load in loads:
            self.compiled.run(self.settings(load.disk.function))
            self.now(load.disk.restart())
            load.settle()

    def finish(self):
        assert not [line for watch in self.watches.values() for line in watch.found]
        self.session.finish()
        self.compiled.close()


def presence(card):
    """Which of functions 2 to 7 are there."""
    return [n for n in range(2, 8) if card.perform(ConfigRead(n, 0x08, 4)) != 0xFFFF_FFFF]


def test_enumeration():
    """SYS-VF-2 (R54, R58): VFs are there as many as enabled, IDs read FFFF, BARs follow the page size, behind them is a disk."""
    bench = CompiledBench(CONFIG, seed=1)
    with bench.compiled as card:
        host, [_, info] = card.host, bench.functions
        assert presence(card) == []
        for page in (4096, 65536, 1 << 22):
            plan = card.run(plan_virtual(host, info, page=page))
            assert (plan.total, plan.device, plan.first_offset, plan.stride) == (2, info.device, 1, 1)
            assert {index: bar.size for index, bar in plan.bars.items()} == {0: max(page, 16384), 2: page}
            for count in (1, 2):
                virtual = card.run(enable_virtual(host, info, plan, count))
                assert presence(card) == [2, 3][:count]
                for n, one in enumerate(virtual):
                    assert (one.function, one.interrupt_pin, one.problems) == (2 + n, 0, [])
                    assert one.capabilities == info.capabilities and not one.ext_capabilities
                    assert one.msix.count == info.msix.count
                    common = one.bars[0].address
                    assert card.perform(MemoryRead(common + 0x18, 2)) == CONFIG.disks[0].queue_size
                    capacity = card.perform(MemoryRead(common + 0x2000, 8))
                    assert capacity == CONFIG.disks[0].capacity_sectors
                if count == 1:
                    assert card.perform(MemoryRead(plan.bars_of(1)[0].address, 4)) == 0xFFFF_FFFF
                card.run(disable_virtual(info, plan))
                assert presence(card) == []
                assert card.perform(MemoryRead(plan.bars[0].address, 4)) == 0xFFFF_FFFF
        assert not info.problems


@pytest.mark.parametrize("parameters", [{}, {"latency": 300, "jitter": 300, "split": "random", "stalls": 40}], ids=["quick", "slow"])
def test_virtual_disks(parameters):
    """SYS-VF-3 (R54, R72): PF and two VFs at once, each in pages of its own, with interrupts of its own; FLR of one; judged."""
    bench = Bench(2, **parameters)
    rng, card = random.Random(2), bench.compiled
    loads = [Load(bench, n, 10 + n) for n in range(3)]
    for n in range(12):
        for load in loads:
            load.begin()
        if n % 3 == 2:  # a reset at a random moment
            victim, other = rng.sample(loads[1:], 2)
            card.step(rng.randrange(1, rng.choice([60, 600, 4000])))
            card.run(initiated(bench.functions[victim.disk.function]))
            watch = bench.watches[victim.disk.function]
            card.step(200)
            watch.is_silent = True
            for load in (loads[0], other):
                load.end()
            watch.is_silent = False
            bench.again([victim])
        else:
            for load in loads:
                load.end()
    for watch in bench.watches.values():
        assert watch.reads > 50
        assert watch.writes > 20
    assert not card.run(bench.iommu.read_faults())
    bench.finish()
    assert bench.session.board.comparisons > 500


def test_virtual_functions_go():
    """SYS-VF-4 (R54, R72): VF Enable off under load at random moments, toggled quickly; silence; on again all work, with what they held."""
    bench = Bench(3, latency=60, stalls=30)
    rng, card = random.Random(3), bench.compiled
    loads = [Load(bench, n, 20 + n) for n in range(3)]
    for n in range(16):
        for load in loads:
            load.begin()
        card.step(rng.randrange(1, rng.choice([60, 600, 3000])))
        bench.off()
        if n % 2:
            for _ in range(rng.randrange(4)):  # toggled quickly: the reset of before is under way
                card.perform(ConfigWrite(1, bench.plan.offset + CONTROL, 2, 9))
                card.step(rng.randrange(1, 40))
                card.perform(ConfigWrite(1, bench.plan.offset + CONTROL, 2, 0))
        else:
            card.step(200)
            for number in (2, 3):
                bench.watches[number].is_silent = True
            card.step(rng.randrange(1, 3000))
            assert presence(card) == []
        if n == 8:  # in another number
            bench.on(1)
            assert presence(card) == [2]
            bench.off()
        loads[0].end()  # on the disk itself all goes on
        for number in (2, 3):
            bench.watches[number].is_silent = False
        bench.on()
        bench.again(loads[1:])
    bench.finish()


def test_hostile():
    """SYS-VF-5 (R54): NumVFs above TotalVFs, NumVFs and page size while enabled, accesses to what is not there, amid good requests."""
    bench = Bench(4)
    card, rng, loads = bench.compiled, random.Random(4), [Load(bench, n, 30 + n) for n in range(3)]
    at = bench.plan.offset
    for load in loads:
        load.begin()
    for _ in range(30):
        card.perform(ConfigWrite(1, at + COUNT, 2, rng.choice([0, 1, 7, 0xFFFF])))
        card.perform(ConfigWrite(1, at + 0x20, 4, rng.getrandbits(32)))
        number = rng.randrange(4, 8)
        assert card.perform(ConfigRead(number, rng.randrange(0, 4096, 4), 4)) == 0xFFFF_FFFF
        card.perform(ConfigWrite(number, rng.randrange(0, 4096, 4), 4, rng.getrandbits(32)))
        assert card.perform(MemoryRead(bench.plan.bars_of(2)[2].address, 8)) == (1 << 64) - 1
        card.step(50)
    assert card.perform(ConfigRead(1, at + COUNT, 2)) == 2
    assert card.perform(ConfigRead(1, at + 0x20, 4)) == 1
    for load in loads:
        load.end()
    bench.off()
    card.perform(ConfigWrite(1, at + COUNT, 2, 0xFFFF))
    card.perform(ConfigWrite(1, bench.plan.offset + CONTROL, 2, 9))
    assert presence(card) == [2, 3]
    bench.off()
    bench.on()
    bench.again(loads[1:])
    for load in loads:
        load.begin()
        load.end()
    assert all(request.status == BlkStatus.OK for load in loads for request, _, _ in load.batch)
    bench.finish()
