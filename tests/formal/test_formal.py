"""The harness of the proofs: it proves what holds, refutes what does not, and says which it was."""

import pytest
from amaranth.hdl import Assert, Assume, Cover, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ringwall.sim import formal
from ringwall.sim.formal import CounterExample, Unreachable, check_stream, mutant, offered, planted, prove, refute, refute_each


class Counter(wiring.Component):
    """Counts the cycles in which ``step`` is 1 up to 9, and claims that it stays below ``limit``."""

    step: In(1)

    def __init__(self, *, limit, top=9, still=False, rare=9, contradiction=False):
        self.limit, self.top, self.still, self.rare, self.contradiction = limit, top, still, rare, contradiction
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        count = Signal(5, init=1)
        with m.If(self.step & (count != self.top)):
            m.d.sync += count.eq(count + 1)
        m.d.comb += [Assert(count < self.limit, "count stays low"), Assert(count > 0, "count is positive")]
        m.d.comb += Cover(count == self.rare, "rare")
        if self.still:
            m.d.comb += Assume(~self.step)
        if self.contradiction:
            m.d.comb += [Assume(self.step), Assume(~self.step)]
        return m


def test_depth_counts():
    """FORMAL-1: a count that breaks its limit in cycle 8 passes with 8 cycles and fails with 9; its text is reported, and only its text."""
    prove(Counter(limit=9, rare=8), depth=8)
    with pytest.raises(CounterExample, match=r"Counter, bmc of 9 cycles: count stays low \(.*trace.vcd\)"):
        prove(Counter(limit=9, rare=8), depth=9)
    assert refute(Counter(limit=9, rare=8), depth=9) == "count stays low"
    with pytest.raises(AssertionError, match="no assertion breaks within 8 cycles"):
        refute(Counter(limit=9, rare=8), depth=8)


def test_every_length_counts():
    """FORMAL-2: mode "prove" finds what bounded traces do not reach, and proves what holds for ever."""
    with pytest.raises(CounterExample, match="pdr of 4 cycles: broken by a trace longer"):
        prove(Counter(limit=9, rare=2), depth=4, mode="prove")
    prove(Counter(limit=10, rare=2), depth=4, mode="prove")


@pytest.mark.parametrize("mode", ["bmc", "prove"])
def test_assumptions_hold(mode):
    """FORMAL-3: what is assumed does not happen; assumptions that contradict each other are an error and no proof."""
    prove(Counter(limit=2, still=True, rare=1), depth=12, mode=mode)
    with pytest.raises(CounterExample):
        prove(Counter(limit=2, rare=1), depth=12, mode=mode)
    with pytest.raises(Unreachable, match="rare"):
        prove(Counter(limit=2, contradiction=True, rare=1), depth=12, mode=mode)
    with pytest.raises(RuntimeError, match="Assumptions are unsatisfiable"):
        refute(Counter(limit=2, contradiction=True, rare=1), depth=12)


def test_covers_are_reached():
    """FORMAL-4: a Cover that cannot happen within the depth fails, by its text."""
    prove(Counter(limit=10, rare=9), depth=9)
    with pytest.raises(Unreachable, match="cover of 8 cycles: rare"):
        prove(Counter(limit=10, rare=9), depth=8)


def test_proofs_run_once(monkeypatch, tmp_path):
    """FORMAL-5: the same circuit is not proved twice, a changed one is."""
    runs = []
    real = formal._run

    def counted(text, step, depth, folder):
        runs.append(step)
        return real(text, step, depth, folder)

    monkeypatch.setattr(formal, "_run", counted)
    monkeypatch.setattr(formal, "build_root", lambda: tmp_path)
    prove(Counter(limit=10), depth=9)
    assert runs == ["cover", "bmc"]
    prove(Counter(limit=10), depth=9)
    assert runs == ["cover", "bmc"]
    for changed in (Counter(limit=11), Counter(limit=10, top=8, rare=8)):
        runs.clear()
        prove(changed, depth=9)
        assert runs == ["cover", "bmc"]


class Forwarder(wiring.Component):
    """A wire that withdraws or changes what it offers, if told so."""

    i: In(stream.Signature(2))
    o: Out(stream.Signature(2))
    ready: In(1)
    noise: In(1)

    def __init__(self, bug=None):
        self.bug = bug
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        offered(m, self.i)
        m.d.comb += [
            self.o.valid.eq(self.i.valid & ~(self.noise if self.bug == "withdraws" else 0)),
            self.o.payload.eq(self.i.payload ^ (self.noise if self.bug == "changes" else 0)),
            self.i.ready.eq(self.ready), self.o.ready.eq(self.ready),
        ]  # fmt: skip
        check_stream(m, self.o, "o")
        m.d.comb += Cover(self.i.valid & ~self.ready, "stalled")
        return m


def test_stream_rules():
    """FORMAL-6: the assumed rules of streams are the asserted ones; a withdrawn and a changed item break them."""
    prove(Forwarder(), depth=5, mode="prove")
    for bug in ("withdraws", "changes"):
        assert refute(Forwarder(bug), depth=5) == "o: an item stays until it is taken"


def test_mistakes_are_told():
    """FORMAL-7: a contract that asserts nothing, an unknown mode, and what is no component are refused with a sentence."""
    class Nothing(wiring.Component):
        a: In(1)

        def elaborate(self, platform):
            return Module()

    with pytest.raises(ValueError, match="must assert something, not 'Nothing'"):
        prove(Nothing(), depth=2)
    class Hope(Nothing):
        def elaborate(self, platform):
            m = Module()
            m.d.comb += [Assume(~self.a), Assert(~self.a)]
            return m

    with pytest.raises(ValueError, match="must cover what it hopes for, not 'Hope'"):
        prove(Hope(), depth=2)
    with pytest.raises(ValueError, match="bmc or prove, not 'ever'"):
        prove(Counter(limit=3), depth=2, mode="ever")
    with pytest.raises(TypeError, match=r"must be an amaranth.lib.wiring.Component, not 3"):
        prove(3, depth=2)


def test_mutants():
    """FORMAL-8: a mutant differs in the one place that was named, the original stays; a text that is not there once is refused."""
    broken = mutant(Counter, "count.eq(count + 1)", "count.eq(count - 1)")
    assert refute(broken(limit=9, rare=8), depth=4) == "count is positive"
    prove(Counter(limit=9, rare=8), depth=8)
    for text in ("count.eq(count + 2)", "count"):
        with pytest.raises(ValueError, match="must stand in Counter once, not"):
            mutant(Counter, text, "")


def test_planted_bugs():
    """FORMAL-9: of several planted bugs each is alone; each tells what it breaks, and one that breaks nothing is told by its number."""
    bugs = [("count.eq(count + 1)", "count.eq(count - 1)"), ("count != self.top", "1"), ("count > 0", "count >= 0")]
    circuit = planted(Counter, bugs)(limit=10)
    assert refute_each(circuit, 2, depth=11) == ["count is positive", "count stays low"]
    with pytest.raises(AssertionError, match=r"no assertion breaks within 11 cycles by bugs \[3\]"):
        refute_each(circuit, 3, depth=11)
    prove(circuit, depth=11)
    with pytest.raises(ValueError, match="between 1 and 255, not 256"):
        refute_each(circuit, 256, depth=11)
    with pytest.raises(ValueError, match="must stand in Counter once, not"):
        planted(Counter, [("count", "0")])
