"""Proof of a chain's bound: whatever memory says, it ends after so many descriptors, each after so many reads; beside it planted bugs."""

from amaranth.hdl import Assert, Assume, Cat, Cover, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from ringwall.rtl.virtio.chain_walker import ChainWalker
from ringwall.rtl.virtio.layouts import RingRules
from ringwall.rtl.virtio.ring_layouts import SLOTS, Descriptor, Slot
from ringwall.sim.formal import mutant, past, prove, refute

SIZE, LIMIT = 4, 2  # of the queue; descriptors of a chain
READS = 2  # of a descriptor: one that lies in two blocks needs both
JUDGED = LIMIT + 2  # descriptors of a chain, that of its table, and the one that is too many
DEPTH = 30
VIEW = (  # what the proof sees; and what it does not look at: any chain may be refused for its addresses, and no descriptor need be turned
    '"broken": Out(self.functions),\n', '"broken": Out(self.functions), "judges": Out(1), "is_too_far": In(1),\n',
    'with m.State("JUDGE"):\n', 'with m.State("JUDGE"):\n                m.d.comb += self.judges.eq(1)\n',
    "(walk.is_writing & ~is_write) | is_beyond", "(walk.is_writing & ~is_write) | self.is_too_far",
    "in_table | is_beyond", "in_table | self.is_too_far",
    "with m.If(is_too_much):", "with m.If(self.is_too_far):",
    "with m.If(is_cut):\n", "with m.If(0):\n",
    "walk.length.eq(places),", "walk.length.eq(Mux(places == 0, 1, places)),",  # no read is empty: each simulation sees that
)  # fmt: skip


class ChainContract(wiring.Component):
    """One queue, any slots, any descriptors at any time: memory may even say something else when it is read again."""

    slot: In(Slot)
    rules: In(RingRules)
    descriptor: In(Descriptor)
    second: In(1)
    scouted: In(1)
    waiting: In(1)
    room: In(1)
    port_ready: In(1)
    accesses_ready: In(1)
    enabled: In(1)
    alive: In(1)
    suspend: In(1)
    is_too_far: In(1)

    def __init__(self, *bug):
        self.make = mutant(ChainWalker, *VIEW, *bug)
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        two = {"queue_functions": (0, 1), "queue_ports": (0, 1), "queue_indices": (0, 0), "limits": (LIMIT,) * 2, "waits": (False,) * 2}
        m.submodules.walker = walker = self.make(functions=2, **two)  # the second has nothing
        begins = Signal(init=1)
        m.d.sync += begins.eq(0)
        m.d.comb += [
            walker.slot.eq(self.slot), walker.slot.queue.eq(0), walker.slot.head.eq(0), walker.slot.before.eq(0),
            walker.slot.generation.eq(walker.generations[0]), walker.second.eq(self.second),
            walker.table.rules.eq(self.rules), walker.table.size.eq(SIZE), walker.descriptor.eq(self.descriptor),
            walker.scouted[0].eq(walker.places[0] + self.scouted), walker.scouted[1].eq(walker.places[1]),
            walker.waiting[0].eq(self.waiting.replicate(2 * SLOTS)), walker.room.eq(self.room), walker.port_ready.eq(self.port_ready),
            walker.accesses.ready.eq(self.accesses_ready), walker.enabled.eq(self.enabled), walker.alive.eq(self.alive),
            walker.suspend.eq(self.suspend), walker.is_too_far.eq(self.is_too_far),
            Assume(begins | (self.rules.as_value() == past(m, self.rules))),  # a queue keeps its rules
        ]

        # Between two chains the walker chooses and none is begun; between two descriptors it judges.
        reads, judged = Signal(range(READS + 2)), Signal(range(JUDGED + 2))
        with m.If(walker.accesses.valid & walker.accesses.ready & (reads != READS + 1)):
            m.d.sync += reads.eq(reads + 1)
        with m.If(walker.judges):
            m.d.sync += [judged.eq(judged + (judged != JUDGED + 1)), reads.eq(0)]
        with m.If(~Cat(walker.at_work, walker.midway).any()):
            m.d.sync += [judged.eq(0), reads.eq(0)]
        m.d.comb += [
            Assert(reads <= READS, "a descriptor needs no third read"),
            Assert(judged <= JUDGED, "a chain ends"),
            Cover(walker.commit.any() & (judged == LIMIT), "a chain of the most descriptors"),
            Cover(reads == READS, "a descriptor after two reads"),
        ]
        return m


def test_bound():
    """FORMAL-CHAIN-1: whatever lies in memory, a chain has few descriptors, each after at most two reads of the walker (V032, V067)."""
    prove(ChainContract(), depth=DEPTH, mode="prove")


BUGS = [
    ("(walk.count >= most) | (walk", "(walk", "a chain ends"),
    ("walk.has_end.eq(asks_end)", "walk.has_end.eq(0)", "no third read"),
    ("walk.first.eq(walk.next),", "walk.first.eq(walk.next + 1),", "no third read"),
]


def test_planted_bugs():
    """FORMAL-CHAIN-2: each planted bug of the walker breaks the assertion that it should."""
    for old, new, broken in BUGS:
        assert broken in refute(ChainContract(old, new), depth=DEPTH)
