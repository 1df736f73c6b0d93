"""Proofs of rtl/stream: every trace of any length; beside each the planted bugs that it refutes."""

import pytest
from amaranth import Array, Cat
from amaranth.hdl import Assert, Assume, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.stream.arbiter import Arbiter
from ringwall.rtl.stream.demux import Demux
from ringwall.rtl.stream.queue import Queue
from ringwall.rtl.stream.skid_buffer import SkidBuffer
from ringwall.rtl.stream.transaction import TransactionQueue
from ringwall.sim.formal import check_stream, mutant, offered, past, prove, refute

PACKET = data.StructLayout({"value": 1, "last": 1})


class FifoContract(wiring.Component):
    """Any component with ``i`` and ``o``: what goes in comes out, once, in order; ``room`` items fit; ``latency`` cycles, 0 to 2."""

    i: In(stream.Signature(2))
    ready: In(1)
    mark: In(1)  # the item that is followed

    def __init__(self, proven, *, room, latency):
        self.proven, self.room, self.latency = proven, room, latency
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.proven = proven = self.proven
        offered(m, self.i)
        wiring.connect(m, wiring.flipped(self.i), proven.i)
        m.d.comb += proven.o.ready.eq(self.ready)
        push, pop = Signal(), Signal()
        count = Signal(range(self.room + 2))
        m.d.comb += [push.eq(self.i.valid & self.i.ready), pop.eq(proven.o.valid & self.ready)]
        m.d.sync += count.eq(count + push - pop)
        passes = (count == 0) & pop  # it leaves in the cycle in which it came
        _follow(m, self.mark & push & ~passes, count - pop, self.i.payload, pop, proven.o.payload)
        check_stream(m, proven.o, "o")
        shown = (self.i.valid | (count != 0), count != 0, past(m, count > pop))[self.latency]
        m.d.comb += [
            Assert(self.i.ready == (count < self.room), "an item is taken exactly while there is room"),
            Assert(proven.o.valid == shown, "an item is shown as soon as its latency is over"),
            Assert(~passes | (proven.o.payload == self.i.payload), "an item that leaves at once leaves unchanged"),
            Cover(count == self.room, "full"),
            Cover(push & pop & (count != 0), "one comes while one leaves"),
        ]
        return m


def _follow(m, mark, ahead_of_it, payload, pop, shown):
    """Follow the item that is pushed with ``mark``: it leaves behind those ``ahead_of_it``, unchanged."""
    inside, ahead, value = Signal(), Signal(4), Signal.like(payload)
    with m.If(mark & ~inside):
        m.d.sync += [inside.eq(1), ahead.eq(ahead_of_it), value.eq(payload)]
    with m.Elif(inside & pop):
        m.d.sync += [ahead.eq(ahead - 1), inside.eq(ahead != 0)]
    m.d.comb += Assert(~(inside & pop & (ahead == 0)) | (shown == value), "items leave unchanged and in order")


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_queue(depth, direct):
    """FORMAL-STREAM-1: Queue keeps order and content, takes exactly ``depth`` items, shows each 2 cycles after it came, or at once."""
    prove(FifoContract(Queue(2, depth, direct=direct), room=depth, latency=0 if direct else 2), depth=3 * depth, mode="prove")


@pytest.mark.parametrize(("depth", "old", "new", "broken"), [
    (3, "count != self.depth", "count != self.depth - 1", "while there is room"),
    (3, "count != self.depth", "1", "while there is room"),
    (4, "~count[-1] if", "~count[-2] if", "while there is room"),
    (3, "with m.If(push ^ pop):", "with m.If(push | pop):", "while there is room|latency is over"),
    (3, "Mux(pop, -1, 1)", "1", "while there is room|latency is over"),
    (3, "(count[0] & ~pop) | count[1:].any()", "count.any()", "latency is over"),
    (3, "(count[0] & ~pop) | count[1:].any()", "count[1:].any()", "latency is over"),
    (3, "is_read.eq(remains)", "is_read.eq(remains & ~push)", "latency is over"),
    (3, "read.en.eq(~is_read | pop)", "read.en.eq(1)", "in order|stays until it is taken"),
    (3, "read.en.eq(~is_read | pop)", "read.en.eq(pop)", "in order|stays until it is taken"),
    (3, "read.en.eq(~is_read | pop)", "read.en.eq(~is_read)", "in order|stays until it is taken"),
    (3, "Mux(place == self.depth - 1, 0, behind)", "behind", "in order"),
    (4, "behind = (place + 1)", "behind = (place + 2)", "in order|stays until it is taken"),
    (4, "with m.If(read.en & remains):", "with m.If(pop):", "in order|stays until it is taken"),
    (4, "with m.If(read.en & remains):", "with m.If(read.en):", "in order|stays until it is taken"),
])  # fmt: skip
def test_queue_bugs(depth, old, new, broken):
    """FORMAL-STREAM-2: each planted bug of Queue breaks the assertion that it should."""
    found = refute(FifoContract(mutant(Queue, old, new)(2, depth), room=depth, latency=2), depth=12)
    assert any(text in found for text in broken.split("|")), found


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("self.i.valid | (count != 0)", "count != 0", "latency is over"),
    ("with m.If(count == 0):", "with m.If(count <= 1):", "in order|stays until it is taken"),
    ("with m.Elif(~is_read):", "with m.Elif(0):", "in order|stays until it is taken"),
    ("is_read.eq(remains)", "is_read.eq(count != 0)", "in order|stays until it is taken"),
    ("with m.If(pop & ~is_read):", "with m.If(0):", "in order|stays until it is taken"),
    ("newest.eq(self.i.payload)", "newest.eq(newest)", "in order|stays until it is taken"),
])  # fmt: skip
def test_direct_queue_bugs(old, new, broken):
    """FORMAL-STREAM-11: each planted bug of a direct Queue breaks the assertion that it should."""
    found = refute(FifoContract(mutant(Queue, old, new)(2, 3, direct=True), room=3, latency=0), depth=12)
    assert any(text in found for text in broken.split("|")), found


def test_skid_buffer():
    """FORMAL-STREAM-3: SkidBuffer keeps order and content, takes 2 items, shows each 1 cycle after it came."""
    prove(FifoContract(SkidBuffer(2), room=2, latency=1), depth=8, mode="prove")


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("Mux(full, spare, self.i.payload)", "self.i.payload", "in order"),
    ("self.o.valid.eq(self.i.valid | full)", "self.o.valid.eq(self.i.valid)", "latency is over"),
    ("with m.If(~full):", "with m.If(1):", "in order"),
    ("with m.If(~self.o.valid | self.o.ready):", "with m.If(self.o.ready):", "latency is over"),
])  # fmt: skip
def test_skid_buffer_bugs(old, new, broken):
    """FORMAL-STREAM-4: each planted bug of SkidBuffer breaks an assertion."""
    contract = FifoContract(mutant(SkidBuffer, old, new)(2), room=2, latency=1)
    assert broken in refute(contract, depth=8)


class TransactionContract(wiring.Component):
    """TransactionQueue: what was committed comes out as of a queue, what was rolled back never."""

    i: In(stream.Signature(1))
    ready: In(1)
    commit: In(1)
    rollback: In(1)
    mark: In(1)

    def __init__(self, proven):
        self.proven = proven
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.proven = proven = self.proven
        depth = proven.depth
        offered(m, self.i)
        wiring.connect(m, wiring.flipped(self.i), proven.i)
        m.d.comb += [proven.o.ready.eq(self.ready), proven.commit.eq(self.commit), proven.rollback.eq(self.rollback)]
        push, pop = Signal(), Signal()
        visible, waiting = Signal(range(depth + 2)), Signal(range(depth + 2))
        m.d.comb += [push.eq(self.i.valid & self.i.ready), pop.eq(proven.o.valid & self.ready)]
        m.d.sync += [visible.eq(visible - pop), waiting.eq(waiting + push)]
        with m.If(self.rollback):
            m.d.sync += waiting.eq(0)
        with m.Elif(self.commit):
            m.d.sync += [visible.eq(visible + waiting + push - pop), waiting.eq(0)]

        inside, final, ahead, value = Signal(), Signal(), Signal(range(depth + 2)), Signal()
        starts = Signal()
        m.d.comb += starts.eq(self.mark & push & ~inside)
        with m.If(starts):
            m.d.sync += [ahead.eq(visible + waiting - pop), value.eq(self.i.payload)]
        with m.Elif(pop):
            m.d.sync += ahead.eq(ahead - 1)
        with m.If((starts | (inside & ~final)) & self.rollback):
            m.d.sync += inside.eq(0)
        with m.Elif(starts | (inside & ~final)):
            m.d.sync += [inside.eq(1), final.eq(self.commit)]
        with m.Elif(inside & pop & (ahead == 0)):
            m.d.sync += [inside.eq(0), final.eq(0)]
        check_stream(m, proven.o, "o")
        m.d.comb += [
            Assert(~(inside & pop & (ahead == 0)) | (final & (proven.o.payload == value)), "committed items leave unchanged and in order"),
            Assert(self.i.ready == (visible + waiting < depth), "an item is taken exactly while there is room"),
            Assert(proven.o.valid == past(m, visible > pop), "an item is shown one cycle after its commit took effect, and none else"),
            Cover(waiting == depth, "full of uncommitted items"),
            Cover(past(m, self.rollback & push & (visible == 1) & (waiting == depth - 2)) & proven.o.valid, "rolled back"),
        ]
        return m


def test_transaction_queue():
    """FORMAL-STREAM-5: TransactionQueue shows committed items only, in order, and rolled back ones give their room back."""
    for depth in (2, 4):
        prove(TransactionContract(TransactionQueue(1, depth)), depth=8, mode="prove")


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("committed != get_next", "put != get_next", "none else"),
    ("put.eq(Mux(self.rollback, committed, put_next))", "put.eq(Mux(self.rollback, get, put_next))", "stays until it is taken|none else"),
    ("read.en.eq(~self.o.valid | pop)", "read.en.eq(1)", "stays until it is taken|in order|none else"),
    ("Mux(self.o.valid, behind_get, get)", "get", "stays until it is taken|in order"),
    ("put.eq(Mux(self.rollback, committed, put_next))", "put.eq(put_next)", "an item is shown|in order"),
    ("self.commit & ~self.rollback", "self.commit", "none else"),
    ("m.d.sync += committed.eq(put_next)", "m.d.sync += committed.eq(put)", "none else"),
])  # fmt: skip
def test_transaction_queue_bugs(old, new, broken):
    """FORMAL-STREAM-6: each planted bug of TransactionQueue breaks an assertion."""
    found = refute(TransactionContract(mutant(TransactionQueue, old, new)(1, 4)), depth=12)
    assert any(text in found for text in broken.split("|")), found


class ArbiterContract(wiring.Component):
    """Arbiter of 3 streams: nothing lost, packets whole, nobody left out."""

    i: In(stream.Signature(PACKET)).array(3)
    ready: In(1)

    def __init__(self, proven):
        self.proven = proven
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.proven = proven = self.proven
        takes = Signal(3)
        for n in range(3):
            offered(m, self.i[n])
            wiring.connect(m, wiring.flipped(self.i[n]), proven.i[n])
            m.d.comb += takes[n].eq(self.i[n].valid & self.i[n].ready)
        m.d.comb += proven.o.ready.eq(self.ready)
        taken = Signal(PACKET)  # by whoever is served
        for n in range(3):
            with m.If(takes[n]):
                m.d.comb += taken.eq(self.i[n].payload)
        served, free = takes.any(), Signal()
        m.d.comb += free.eq(self.ready if proven.direct else ~proven.o.valid | self.ready)
        owner, locked = Signal(3), Signal()
        with m.If(served):
            m.d.sync += [owner.eq(takes), locked.eq(~taken.last if proven.packets else 0)]
        offers = Cat(i.valid for i in self.i)
        check_stream(m, proven.o, "o")
        m.d.comb += [
            Assert((takes & (takes - 1)[:3]) == 0, "one is served at a time"),
            Assert(~served | free, "nothing is taken while the output is stalled"),
            Assert(~(free & Mux(locked, offers & owner, offers).any()) | served, "somebody is served when one can be"),
            Assert(~(served & locked) | (takes == owner), "packets stay whole"),
            Cover(takes[2] & past(m, takes[1] & taken.last & past(m, takes[1])), "a packet behind another"),
        ]
        if proven.direct:
            m.d.comb += [
                Assert(proven.o.valid == Mux(locked, offers & owner, offers).any(), "an item is shown when one can be, and none else"),
                Assert(~served | proven.o.valid, "what is taken is shown"),
                Assert(~served | (proven.o.payload == taken), "items leave unchanged"),
            ]
        else:
            m.d.comb += [
                Assert(proven.o.valid == past(m, served | ~free), "an item is shown one cycle after it was taken, and once"),
                Assert(~past(m, served) | (proven.o.payload.as_value() == past(m, taken)), "items leave unchanged"),
            ]
        for n in range(3):
            others = Signal(3, name=f"others_{n}")  # packets of others that ended while n waited
            with m.If(takes[n] | ~offers[n]):
                m.d.sync += others.eq(0)
            with m.Elif(served & (taken.last if proven.packets else 1)):
                m.d.sync += others.eq(others + 1)
            m.d.comb += Assert(others <= 2, "nobody waits for more than one packet of each other")
        return m


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("packets", [False, True])
def test_arbiter(packets, direct):
    """FORMAL-STREAM-7: Arbiter loses and mixes nothing, keeps packets whole, and lets nobody pass twice."""
    prove(ArbiterContract(Arbiter(PACKET, 3, packets=packets, direct=direct)), depth=10, mode="prove")


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("index = (at + distance) % self.count", "index = distance % self.count", "nobody waits"),
    ("locked.eq(~offered.last)", "locked.eq(0)", "packets stay whole"),
    ("with m.If(free):\n                m.d.sync", "with m.If(1):\n                m.d.sync", "an item stays"),
    ("self.i[n].ready.eq(free)", "self.i[n].ready.eq(1)", "output is stalled"),
    ("with m.If(~locked & ~held):", "with m.If(~locked & ~held & self.o.ready):", "when one can be"),
    ("latest.eq(grant)", "latest.eq(grant & 1)", "when one can be"),
])  # fmt: skip
def test_arbiter_bugs(old, new, broken):
    """FORMAL-STREAM-8: each planted bug of Arbiter breaks an assertion."""
    assert broken in refute(ArbiterContract(mutant(Arbiter, old, new)(PACKET, 3, packets=True)), depth=12)


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("index = (at + distance) % self.count", "index = distance % self.count", "nobody waits"),
    ("locked.eq(~offered.last)", "locked.eq(0)", "packets stay whole"),
    ("self.i[n].ready.eq(free)", "self.i[n].ready.eq(1)", "output is stalled"),
    ("with m.If(~locked & ~held):", "with m.If(~locked):", "an item stays"),
    ("held.eq(is_offered & ~free)", "held.eq(is_offered)", "nobody waits|when one can be"),
    ("latest.eq(grant)", "latest.eq(grant & 1)", "an item stays|packets stay whole|when one can be"),
])  # fmt: skip
def test_direct_arbiter_bugs(old, new, broken):
    """FORMAL-STREAM-12: each planted bug of a direct Arbiter breaks an assertion."""
    found = refute(ArbiterContract(mutant(Arbiter, old, new)(PACKET, 3, packets=True, direct=True)), depth=12)
    assert any(text in found for text in broken.split("|")), found


class DemuxContract(wiring.Component):
    """Demux into 3 streams: each item at one output, packets whole."""

    i: In(stream.Signature(PACKET))
    select: In(range(3))
    ready: In(3)

    def __init__(self, proven):
        self.proven = proven
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.proven = proven = self.proven
        offered(m, self.i)
        wiring.connect(m, wiring.flipped(self.i), proven.i)
        m.d.comb += proven.select.eq(self.select)
        waits = past(m, self.i.valid & ~self.i.ready)
        m.d.comb += [Assume(self.select < 3), Assume(~waits | (self.select == past(m, self.select)))]
        inside, where = Signal(), Signal(range(3))
        right = Mux(inside, where, self.select) if proven.packets else self.select
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [inside.eq(~self.i.payload.last), where.eq(right)]
        for n in range(3):
            m.d.comb += [
                proven.o[n].ready.eq(self.ready[n]),
                Assert(proven.o[n].valid == (self.i.valid & (right == n)), "an item is shown where it belongs, and nowhere else"),
                Assert(~proven.o[n].valid | (proven.o[n].payload == self.i.payload), "items leave unchanged"),
            ]
            check_stream(m, proven.o[n], f"o {n}")
        ready = Array(self.ready)[right]
        m.d.comb += [
            Assert(~self.i.valid | (self.i.ready == ready), "an item leaves when its output takes it"),
            Cover(inside & (where == 2) & (self.select == 1) & self.i.valid, "select changes inside a packet"),
        ]
        return m


@pytest.mark.parametrize("packets", [False, True])
def test_demux(packets):
    """FORMAL-STREAM-9: Demux shows each item at one output, and packets stay whole."""
    prove(DemuxContract(Demux(PACKET, 3, packets=packets)), depth=8, mode="prove")


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("m.d.comb += to.eq(kept)", "m.d.comb += to.eq(self.select)", "where it belongs"),
    ("o.valid.eq(self.i.valid & (to == n))", "o.valid.eq(self.i.valid)", "where it belongs"),
    ("inside.eq(~self.i.payload.last)", "inside.eq(self.i.payload.last)", "where it belongs"),
    ("with m.If(self.i.valid & self.i.ready):", "with m.If(self.i.ready):", "where it belongs"),
    ("self.i.ready.eq(o.ready)", "self.i.ready.eq(1)", "when its output takes it"),
])  # fmt: skip
def test_demux_bugs(old, new, broken):
    """FORMAL-STREAM-10: each planted bug of Demux breaks an assertion."""
    assert broken in refute(DemuxContract(mutant(Demux, old, new)(PACKET, 3, packets=True)), depth=8)
