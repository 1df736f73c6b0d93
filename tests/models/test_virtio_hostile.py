"""Random hostile rings: a careful device touches nothing that it must not, each careless one is found, and every mistake occurs."""

import random
import re
from itertools import pairwise

import pytest

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.driver import Feature
from ringwall.models.virtio.hostile import hostile_ring
from ringwall.models.virtio.packed import PackedDescriptor, read_list
from ringwall.models.virtio.split import Descriptor, read_chain
from ringwall.models.virtio.virtqueue import make_rules

BASE = 0x40_0000
KINDS = [0, 1 << Feature.INDIRECT_DESC, 1 << Feature.RING_PACKED, 1 << Feature.RING_PACKED | 1 << Feature.INDIRECT_DESC]


class Device:
    """Takes all that is available, then writes a byte to each writable buffer, returns what it took; ``bug``: what it does not check."""

    def __init__(self, hostile, rng, bug=""):
        self.hostile, self.layout, self.rng, self.bug = hostile, hostile.layout, rng, bug
        self.memory = GuestMemory(log=True)
        self.memory.write(hostile.base, hostile.image)
        self.memory.log.clear()
        self.is_packed = bool(hostile.features >> Feature.RING_PACKED & 1)
        self.is_indirect = bool(hostile.features >> Feature.INDIRECT_DESC & 1)
        self.refused = False

    def read(self, address, length):
        return self.memory.read(address, length, source="device")

    def write(self, address, data):
        self.memory.write(address, data, source="device")

    def word(self, address):
        return int.from_bytes(self.read(address, 2), "little")

    def available(self):
        """Yield the chains that it finds."""
        if self.is_packed:
            turn = 0
            while turn < self.layout.size and (chain := read_list(self, self.layout, turn, indirect=self.is_indirect)) is not None:
                turn += len(chain.numbers)
                yield chain
                if chain.head < 0:
                    return
            return
        index = self.word(self.layout.avail_idx)
        if index > self.layout.size and self.bug != "jump":
            self.refused = True
            return
        for n in range(min(index, 2 * self.layout.size)):
            head = self.word(self.layout.avail_slot(n))
            if head >= self.layout.size and self.bug == "head":
                self.read(self.layout.descriptor(head), 16)
            yield read_chain(self, self.layout, head, indirect=self.is_indirect)

    def run(self):
        taken = []
        for chain in self.available():
            if self.bug == "next" and chain.beyond is not None:
                self.read(chain.beyond, 16)
            if self.bug == "endless" and "more than" in chain.error:
                for n in range(self.hostile.read_bound + 1):
                    self.read(self.layout.descriptor(n % self.layout.size), 16)
            if self.bug == "table" and self.is_indirect and not chain.is_complete:
                self.follow_table(chain)
            if not chain.is_complete or (chain.error and self.rng.randrange(2)):
                self.refused = True
                return
            taken.append(chain)
        turn = 0
        for n, chain in enumerate(taken):
            for address, length in chain.writable:
                if length:
                    self.write(address + length - 1, b"ab" if self.bug == "overrun" and length < 4096 else b"a")
            self.give_back(n, turn, chain)
            turn += len(chain.numbers)

    def follow_table(self, chain):
        """Read one descriptor behind the table that the chain's last descriptor refers to."""
        for number in chain.numbers:
            kind = PackedDescriptor if self.is_packed else Descriptor
            one = kind.unpack(self.memory.read(self.layout.descriptor(number), 16))
            if one.flags & 4:
                self.read(one.address + one.length, 16)

    def give_back(self, n, turn, chain):
        length = 1 if chain.writable and chain.writable[0][1] == 1 else 0
        if self.is_packed:
            wrote = any(size for _, size in chain.writable)
            flags = 0x8080 | 2 * wrote
            self.write(self.layout.descriptor(turn), PackedDescriptor(0, length, chain.head, flags).pack())
        else:
            self.write(self.layout.used_slot(n), chain.head.to_bytes(4, "little") + length.to_bytes(4, "little"))
            self.write(self.layout.used_idx, (n + 1).to_bytes(2, "little"))

    def problems(self):
        return self.hostile.problems([access for access in self.memory.log if access.source], self.memory)


@pytest.mark.parametrize("features", KINDS)
def test_hostile_careful(features):
    """MODEL-HOSTILE-1: 250 random rings of each kind: a device that checks all touches nothing else, ends in a bounded number of reads,
    refuses where it must, and breaks no rule of the judge (V025, V026, V031, V032, V047, V048, V053, V059, V067)."""
    rng = random.Random(features)
    refused = served = 0
    for _ in range(250):
        hostile = hostile_ring(rng, features, size=rng.choice([1, 3, 7, 16]) if features >> Feature.RING_PACKED else rng.choice([1, 4, 16]),
                               base=BASE)  # fmt: skip
        before = GuestMemory()
        before.write(hostile.base, hostile.image)
        device = Device(hostile, rng)
        device.run()
        assert device.problems() == []
        assert device.refused or not hostile.must_refuse
        assert hostile.may_refuse or not device.refused
        rules = make_rules(hostile.layout, before, features, has_vector=False, granule=1)
        broken = rules.broken(device.memory.log)
        assert {one.rule for one in broken} <= {"V041", "V043", "V044", "V061", "length"}, broken  # its lengths are made up
        refused, served = refused + device.refused, served + (not device.refused and bool(hostile.chains))
    assert refused > 50 and served > 20


@pytest.mark.parametrize("bug, features", [
    ("jump", 0), ("head", 0), ("next", 0), ("next", KINDS[1]), ("endless", 0), ("endless", KINDS[2]), ("table", KINDS[1]),
    ("table", KINDS[3]), ("overrun", KINDS[0]), ("overrun", KINDS[2]),
])  # fmt: skip
def test_hostile_careless(bug, features):
    """MODEL-HOSTILE-2: each check that a device leaves out is found within 400 rings, by an access, by the count of reads or by a byte
    that was changed; not one problem without it."""
    rng, found = random.Random(7), set()
    for _ in range(400):
        state = rng.getstate()
        for with_bug in (False, True):
            rng.setstate(state)
            device = Device(hostile_ring(rng, features, size=4, base=BASE), rng, bug if with_bug else "")
            device.run()
            problems = device.problems()
            assert with_bug or not problems
            found.update(re.sub(r"0x[0-9a-f]+|\d+", "N", problem) for problem in problems)
    expected = {"endless": "N reads of ring and tables, N must suffice", "overrun": "the byte at N was changed",
                "jump": "write of N bytes at N"}.get(bug, "read of N bytes at N")  # fmt: skip
    assert expected in found


def test_hostile_mistakes():
    """MODEL-HOSTILE-3: every mistake that a chain can have, jumps, heads out of range and good rings all occur; the same seed gives the
    same ring; guards lie around everything."""
    seen = set()
    for n in range(1500):
        hostile = hostile_ring(random.Random(n), KINDS[n % 4], size=5 if n % 4 > 1 else 4, base=BASE)
        seen |= {re.sub(r"\d+", "N", chain.error) for chain in hostile.chains}
        seen |= {"good"} if hostile.chains and not hostile.may_refuse else set()
        seen |= {"broken ring"} if hostile.must_refuse and all(not chain.error for chain in hostile.chains) else set()
        if n < 20:
            assert hostile == hostile_ring(random.Random(n), KINDS[n % 4], size=5 if n % 4 > 1 else 4, base=BASE)
            ends = sorted(span for span in hostile.layout.parts)
            assert all(low + length + 64 <= high for (low, length), (high, _) in pairwise(ends))
            assert hostile.base + 64 <= ends[0][0]
            assert all(high + length + 64 <= BASE + len(hostile.image) for high, length in ends)
    assert seen >= {
        "", "good", "broken ring", "INDIRECT without the feature", "INDIRECT inside an indirect table", "INDIRECT and NEXT together",
        "INDIRECT in a list of several descriptors", "a buffer beyond N^N", "an indirect table of N bytes", "more than N descriptors",
        "next N out of a queue of N", "next N out of an indirect table of N", "readable behind writable", "chain of more than N^N bytes",
        "a list that goes on into a descriptor that is not available"}  # fmt: skip
