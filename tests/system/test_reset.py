"""Every way to stop a function, each under full load at random moments: silence, nothing late, Transactions Pending, a new beginning."""

import random

import pytest

from ringwall.models.host import ConfigWrite, Delay, MemoryRead, MemoryWrite, enable_msix
from ringwall.models.host import enumerate as enumerate_functions
from ringwall.models.iommu.tables import Allocator
from ringwall.models.tlp import TlpType
from ringwall.sim.card import FRAMES, IOVAS, OWN, OWN_BYTES, PAGE, bench_config
from ringwall.sim.compiled_bench import CompiledBench

from .test_flr import BOUND, DEVICE_STATUS, Load, initiated, is_over, pending, restored, saved

PM = 0x01  # capability ID
MASTER = 4  # of Command
HELD = 200  # cycles in which the link may still carry what the card gave it
QUEUED = 2 * bench_config(64).read_buffer_bytes // 8 + 1500  # cycles of the link for what both disks have asked for
APART = 32 << 20  # bytes from one disk's addresses to those of the other
WAYS = ("FLR", "D3HOT", "MASTER", "DEVICE")
LINKS = ({}, {"latency": 300, "jitter": 300, "split": "random"}, {"latency": 60, "stalls": 100}, {"latency": 900, "split": "rcb"})


class Watch:
    """Requests of all functions: those of one that must be silent, and the longest time in which another made none."""

    def __init__(self, card):
        self.card, self.silent, self.found, self.busy, self.counts = card, set(), [], {}, {}
        self.longest = 0

    def __call__(self, event, tlp):
        if tlp is not None and tlp.type in (TlpType.MRD, TlpType.MWR):
            function = tlp.requester_id & 0xFF
            self.counts[function] = self.counts.get(function, 0) + 1
            if function in self.silent:
                self.found.append(f"{event.cycle}: {tlp.type.name} of function {function} at {tlp.address:#x}, which must be silent")
            if function in self.busy:
                self.longest = max(self.longest, event.cycle - self.busy[function])
                self.busy[function] = event.cycle


class Bench(CompiledBench):
    """Two disks with addresses of their own, translated or not, and a load on each."""

    def __init__(self, seed, is_translated, **parameters):
        super().__init__(bench_config(64), seed=seed, judged=False, **parameters)
        self.is_translated, self.dice, self.watch = is_translated, random.Random(seed), Watch(self.compiled)
        self.compiled.observe = self.watch
        self.rise()

    def rise(self):
        """Software begins with an enumerated card."""
        if self.is_translated:
            self.now(self.enable_iommu(levels=1))
        for n in range(2):
            self.now(self.disk(n, buffer_pages=128, base=IOVAS + n * APART))
        self.loads = [Load(self, n, self.dice.getrandbits(32)) for n in range(2)]

    def restart(self, loads):
        """Software begins with a card that a link reset left; what ``loads`` had under way may be done or not."""
        self.host, self.iommu, self._frame = self.compiled.host, None, FRAMES // PAGE
        self.allocator = Allocator(self.compiled.memory, OWN, OWN_BYTES, rng=self.rng)
        self.functions = self.compiled.run(enumerate_functions(self.host))
        assert not any(self.compiled.run(pending(info)) for info in self.functions)
        self.watch.silent.clear()
        self.rise()
        for load, old in zip(self.loads, loads):
            load.image, load.batch = old.image, old.batch
            load.settle()

    def fill(self, load):
        """Have requests of a disk under way; those that are back are compared."""
        if load.batch:
            load.disk.blk.poll()
            if not all(request.is_done for request, _, _ in load.batch):
                return
            load.compare()
        load.begin()
        self.watch.busy[load.disk.function] = self.compiled.cycle

    def rest(self, load):
        """End what a disk has under way."""
        if load.batch:
            load.end()
        self.watch.busy.pop(load.disk.function, None)

    def go(self, cycles, *loads):
        """Let cycles pass with ``loads`` going on."""
        end = self.compiled.cycle + cycles
        while self.compiled.cycle < end:
            for load in loads:
                self.fill(load)
            self.compiled.step(min(97, end - self.compiled.cycle))

    def contents(self, disk):
        """Memory that the disk may write: its rings and buffers."""
        base = disk.layout.desc & -PAGE
        return disk.memory.read(base, 16 * PAGE) + disk.memory.read(base + 0x10_0000, 128 * PAGE)

    def quiet(self):
        assert not self.watch.found, self.watch.found[0]


def begin_stop(bench, way, info):
    """Stop a function; returns what :func:`end_stop` needs."""
    run, perform = bench.compiled.run, bench.compiled.perform
    values = run(saved(info))
    if way == "FLR":
        run(initiated(info))
    elif way == "D3HOT":
        perform(ConfigWrite(info.function, info.capabilities[PM][0] + 4, 2, 3))
    elif way == "MASTER":
        perform(ConfigWrite(info.function, 4, 2, values[-1][2] & ~MASTER))
    else:
        perform(MemoryWrite(info.bars[0].address + DEVICE_STATUS, 1, 0))
        begun = bench.compiled.cycle
        while perform(MemoryRead(info.bars[0].address + DEVICE_STATUS, 1)):
            assert bench.compiled.cycle - begun < BOUND, "the device reset has no end"
    return values


def end_stop(bench, way, info, values):
    """Software takes the function back; its driver is to begin again."""
    run, perform, begun = bench.compiled.run, bench.compiled.perform, bench.compiled.cycle
    if way == "D3HOT":
        perform(ConfigWrite(info.function, info.capabilities[PM][0] + 4, 2, 0))
    if way in ("FLR", "D3HOT"):
        run(restored(info, values))
        while not (over := run(is_over(info))):
            assert bench.compiled.cycle - begun < BOUND, "the reset has no end"
        assert over is True, over
        run(enable_msix(info, 2))
    elif way == "MASTER":
        perform(ConfigWrite(info.function, 4, 2, values[-1][2]))


def stop_under_load(bench, way, number, longest):
    """One function is stopped at a random moment; the other works all the time. Returns cycles until nothing was pending."""
    card, rng, watch = bench.compiled, bench.dice, bench.watch
    info, load, other = bench.functions[1 + number], bench.loads[number], bench.loads[1 - number]
    bench.fill(load)
    bench.go(rng.randrange(1, rng.choice([60, 600, 3000])), other)
    watch.busy.pop(info.function, None)
    values = begin_stop(bench, way, info)
    begun = card.cycle
    while card.run(pending(info)):
        assert card.cycle - begun < longest, f"{way}: requests are pending after {card.cycle - begun} cycles"
        bench.go(20, other)
    took = card.cycle - begun
    if way != "DEVICE":
        bench.go(HELD, other)
    watch.silent.add(info.function)
    before = bench.contents(load.disk)
    bench.go(rng.randrange(1, 1500), other)
    assert bench.contents(load.disk) == before, f"{way}: memory changed behind it"
    assert not card.run(pending(info)), f"{way}: requests are pending again"
    if way == "MASTER":  # what it still has to tell, it may from now on
        watch.silent.clear()
    end_stop(bench, way, info, values)
    bench.go(rng.randrange(1, 500), other)
    assert way == "MASTER" or bench.contents(load.disk) == before, f"{way}: memory changed in front of the driver's beginning"
    bench.quiet()
    watch.silent.clear()
    bench.now(load.disk.restart())
    load.settle()
    return took


@pytest.mark.parametrize("is_translated", [True, False], ids=["translated", "physical"])
def test_stops_under_load(is_translated, capsys):
    """SYS-RESET-1 (R61, R72): FLR, D3hot and back, bus master off and on, device reset of a disk at random moments under full load.

    Transactions Pending clears within what the link needs; then no request, no write to its memory; then it works again, and what it
    held is there. The other disk's data are right all the time, and it is never late.
    """
    took, longest = {way: [] for way in WAYS}, 0
    for seed, parameters in enumerate(LINKS):
        bench = Bench(40 + seed, is_translated, **parameters)
        limit = QUEUED + 2 * (parameters.get("latency", 8) + parameters.get("jitter", 0))
        for _ in range(4):
            for way in bench.dice.sample(WAYS, 4):
                took[way].append(stop_under_load(bench, way, bench.dice.randrange(2), limit))
        for load in bench.loads:
            bench.rest(load)
            load.run(1)
        assert min(bench.watch.counts[n] for n in (1, 2)) > 1000
        longest = max(longest, bench.watch.longest)
        assert bench.watch.longest < limit, "the other disk was late"
        bench.compiled.close()
    with capsys.disabled():
        print("\n  " + ", ".join(f"{way} {min(one)} to {max(one)}" for way, one in took.items()), f"cycles; longest silence {longest}")


@pytest.mark.parametrize("is_translated", [True, False], ids=["translated", "physical"])
def test_link_resets_under_load(is_translated):
    """SYS-RESET-2 (R61, R72): the link goes down under full load of both disks at random moments: silence, memory stays, all as new.

    What was on the link is lost, a TLP that was being sent is broken off; software finds a card without pending requests that works,
    and what the disks held.
    """
    for seed, parameters in enumerate(LINKS[:3]):
        bench = Bench(60 + seed, is_translated, **parameters)
        card, rng, watch = bench.compiled, bench.dice, bench.watch
        for _ in range(5):
            loads = bench.loads
            for load in loads:
                bench.fill(load)
            bench.go(rng.randrange(1, rng.choice([60, 600, 3000])), *loads)
            card.reset_link(rng.choice([1, 2, 3, 30, 700, 5000]))
            watch.busy.clear()
            watch.silent = {0, 1, 2}
            before = [bench.contents(load.disk) for load in loads]
            card.perform(Delay(rng.randrange(2500, 4000)))
            assert not card.interrupts()
            assert [bench.contents(load.disk) for load in loads] == before, "memory changed behind a link reset"
            bench.quiet()
            bench.restart(loads)
        for load in bench.loads:
            bench.fill(load)
            bench.rest(load)
        bench.compiled.close()


class Messages:
    """What a function tells its driver: cycles of messages and of new used indices."""

    def __init__(self, bench, disk):
        self.function, self.window, self.messages, self.used = disk.function, bench.compiled.message_window, [], []
        (self.index, _), = disk.memory.places(disk.layout.used + 2 & -4, 4)

    def __call__(self, event, tlp):
        if tlp is not None and tlp.type is TlpType.MWR and tlp.requester_id & 0xFF == self.function:
            if tlp.address - self.window[0] in range(self.window[1]):
                self.messages.append(event.cycle)
            elif tlp.address <= self.index < tlp.address + 4 * tlp.length_dw:
                self.used.append(event.cycle)


class Masks:
    """The two masks of vector 1 of a function, as software writes them."""

    def __init__(self, card, info):
        self.card, self.info, self.function, self.vector = card, info, False, False
        self.control = info.msix.offset + 2
        self.entry = info.bars[info.msix.table_bar].address + info.msix.table_offset + 16
        self.bits = info.bars[info.msix.pba_bar].address + info.msix.pba_offset

    def write(self, *, function=None, vector=None):
        if function is not None:
            self.function = function
            self.card.perform(ConfigWrite(self.info.function, self.control, 2, 0x8000 | function << 14 | self.info.msix.count - 1))
        if vector is not None:
            self.vector = vector
            self.card.perform(MemoryWrite(self.entry + 12, 4, int(vector)))

    def is_pending(self):
        """Pending bit of the vector; all that was written before has had its effect."""
        return bool(self.card.perform(MemoryRead(self.bits, 8)) & 2)


def test_masks_under_load():
    """SYS-RESET-3: Function Mask and vector masks toggled at random while a disk interrupts; the other one goes on.

    Masked: no message, and a pending bit for what happened. The last mask gone: exactly one message, no pending bit. None is lost.
    """
    bench = Bench(80, True, latency=60)
    card, rng = bench.compiled, bench.dice
    seen, waited = Messages(bench, bench.loads[0].disk), 0

    def observe(event, tlp):
        bench.watch(event, tlp)
        seen(event, tlp)

    card.observe = observe
    masks, (load, other) = Masks(card, bench.functions[1]), bench.loads
    for n in range(40):
        for _ in range(rng.randrange(6) if n % 3 == 0 else 0):  # quickly, while messages are on their way
            bench.fill(load)
            masks.write(**rng.choice([{"function": True}, {"function": False}, {"vector": True}, {"vector": False}]))
            bench.go(rng.randrange(1, 300), other)
        masks.write(function=False)
        masks.write(vector=False)
        bench.fill(load)
        bench.go(rng.randrange(1, 1200), other)
        which = rng.choice([("function",), ("vector",), ("function", "vector"), ("vector", "function")])
        for one in which:
            masks.write(**{one: True})
        masks.is_pending()
        told, used = len(seen.messages), len(seen.used)
        bench.rest(load)
        bench.go(rng.randrange(400, 600), other)  # what it has told by now has come to the masks
        happened = len(seen.used) > used
        is_pending = masks.is_pending()
        assert len(seen.messages) == told, f"a message behind {which}"
        assert is_pending or not happened, f"nothing is pending behind {which}"
        waited += is_pending
        for one in rng.sample(which, len(which)):
            assert len(seen.messages) == told
            masks.write(**{one: False})
            assert (masks.function, masks.vector) == (False, False) or masks.is_pending() == is_pending
        bench.go(400, other)
        assert len(seen.messages) == told + is_pending, f"{len(seen.messages) - told} messages behind the end of {which}"
        assert not masks.is_pending()
        if seen.used:
            assert seen.messages[-1] > seen.used[-1], "a message was lost"
    assert waited > 12
    assert len(seen.messages) <= len(seen.used)
    assert bench.watch.longest < QUEUED + 120
    card.close()
