"""Campaigns of hostile rings on a compiled ring engine: what it may touch, how each must end, and that the next good ring works."""

import random
from collections import Counter

from ..models.memory import GuestMemory
from ..models.virtio.driver import Feature
from ..models.virtio.hostile import hostile_ring
from ..models.virtio.virtqueue import is_packed, make_ring, make_rules
from .compiled_rings import CompiledRings
from .ring_bench import RULES

__all__ = ["HostileRings"]

SIZES = {False: (1, 2, 4, 8, 16), True: (1, 2, 3, 5, 8, 13, 16)}  # of split and packed rings
BASE, LENGTH, GOOD = 1 << 32, 0x1_0000, 0x8000  # memory; where good rings lie in it
CYCLES_PER_READ, CYCLES = 60, 2000  # a ring ends within the one for each read that must suffice, and the other
# What a back end that moves no data, and a used ring that began as noise, look like.
NOT_JUDGED = {"V041", "V043", "V044", "V050", "V061", "V064", "length"}


class HostileRings:
    """Plays hostile rings number 0, 1, ...; each is drawn from ``seed`` plus its number alone.

    Attributes
    ----------
    ends : :class:`collections.Counter`
        How rings ended: ("packed" or "split", "refused", "served" or "idle").
    """

    def __init__(self, seed):
        self.seed, self.ends = seed, Counter()
        self.engine = CompiledRings(size=max(SIZES[True]), base=BASE, length=LENGTH, seed=seed)

    def play(self, first, count):
        """Play ``count`` rings from number ``first`` on; AssertionError, with a note of the seed, when one does not end as it must."""
        for number in range(first, first + count):
            try:
                self._play(random.Random(self.seed + number))
            except AssertionError as error:
                error.add_note(f"ring {number}: SEED={self.seed + number}")
                raise

    def _play(self, rng):
        features = sum(rng.randrange(2) << bit for bit in RULES.values())
        hostile = hostile_ring(rng, features, size=rng.choice(SIZES[is_packed(features)]), base=BASE)
        is_broken = self._hostile(hostile)
        if is_broken or rng.randrange(2):
            self.engine.stop(CYCLES)
        else:
            self.engine.take_back()
            self.engine.settle(CYCLES)
            if not self.engine.is_idle:
                raise AssertionError("the queue is not idle after its reset")
        if self.engine.take()[2:] != (0, 0):
            raise AssertionError("needs reset, or notifies, while it is reset")
        self._good(rng, features)

    def _give(self, layout, features):
        self.engine.enable(layout, {name: features >> bit & 1 for name, bit in RULES.items()})
        self.engine.kick()

    def _hostile(self, hostile):
        """Play the ring; return whether the engine refused it."""
        engine = self.engine
        engine.write(BASE, hostile.image)
        self._give(hostile.layout, hostile.features)
        engine.settle(CYCLES + CYCLES_PER_READ * hostile.read_bound)
        accesses, chains, breaks, _ = engine.take()
        found = hostile.problems(accesses, engine)
        if breaks > 1 or (hostile.must_refuse and not breaks) or (breaks and not hostile.may_refuse):
            found.append(f"refused {breaks} times; must be: {hostile.must_refuse}, may be: {hostile.may_refuse}")
        if not breaks:
            wanted = [tuple(tuple(span for span in part if span[1]) for part in (one.readable, one.writable)) for one in hostile.chains]
            if chains != wanted:
                found.append(f"chains {chains}, not {wanted}")
        heads = [chain.head for chain in hostile.chains]
        if len(set(heads)) == len(heads) or not hostile.features >> Feature.IN_ORDER & 1:  # else nobody knows which of them is meant
            before = GuestMemory()
            before.write(BASE, hostile.image)
            rules = make_rules(hostile.layout, before, hostile.features, has_vector=False, granule=1)
            found += [str(broken) for broken in rules.broken(accesses, is_finished=not breaks) if broken.rule not in NOT_JUDGED]
        engine.kick()
        engine.settle(CYCLES)
        more, _, again, _ = engine.take()
        if breaks and (more or again):
            found.append(f"goes on after it was refused: {more}, refused {again} times more")
        if found:
            raise AssertionError("; ".join(found))
        kind = "packed" if is_packed(hostile.features) else "split"
        self.ends[kind, "refused" if breaks else "served" if chains else "idle"] += 1
        return bool(breaks)

    def _good(self, rng, features):
        """A good ring works."""
        engine = self.engine
        ring = make_ring(engine, features, size=8, base=BASE + GOOD)
        made = []
        for n in range(rng.randrange(1, 3)):
            spans = [(rng.randrange(1 << 40), rng.randrange(1, 9000)) for _ in range(rng.randrange(1, 5))]
            cut = rng.randrange(len(spans) + 1)
            name = ring.add_chain(spans[:cut], spans[cut:], direct=0 if ring.indirect and n else None)
            made.append((name, tuple(spans[:cut]), tuple(spans[cut:])))
        ring.publish()
        self._give(ring.layout, features)
        engine.settle(CYCLES)
        _, chains, breaks, _ = engine.take()
        used = ring.poll_used()
        if breaks or chains != [each[1:] for each in made] or used != [(name, sum(size for _, size in spans)) for name, _, spans in made]:
            raise AssertionError(f"the good ring behind it: refused {breaks} times, chains {chains}, used {used}, not {made}")
        engine.stop(CYCLES)
        engine.take()
