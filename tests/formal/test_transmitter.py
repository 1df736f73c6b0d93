"""Proof of the ordering of what the card sends: what was accepted as posted is never passed. [PCIe5 2.4.1]"""

import pytest
from amaranth.hdl import Assert, Assume, Cat, Cover, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.tlp.transmitter import Transmitter
from ringwall.sim.formal import check_stream, mutant, offered, prove, refute

WIDTH = 64
Beat = data.StructLayout({"mark": 2, "first": 1, "last": 1, "rest": 1})  # all other bits of a beat are alike
KINDS = ("posted", "non_posted", "completions", "messages")


class OrderContract(wiring.Component):
    """One posted TLP is followed, and one TLP of any kind that is offered when the first has been accepted.

    The lowest two bits of a beat's data mark them: 1 on every beat of the first, 2 on every beat of the other.
    """

    i: In(stream.Signature(Beat)).array(len(KINDS))
    ready: In(1)
    is_message: In(1)  # what kind of posted TLP the first is

    def __init__(self, proven):
        self.proven = proven
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.proven = proven = self.proven
        FIRST, OTHER = 1, 2
        begun, accepted, left = Signal(), Signal(), Signal()  # of the first
        is_message, was_chosen = Signal(), Signal()
        m.d.comb += proven.o.ready.eq(self.ready)
        m.d.sync += was_chosen.eq(1)
        with m.If(~was_chosen):
            m.d.sync += is_message.eq(self.is_message)
        for n, name in enumerate(KINDS):
            port, its = self.i[n], getattr(proven, name)
            offered(m, port)
            m.d.comb += [its.valid.eq(port.valid), port.ready.eq(its.ready), its.p.first.eq(port.p.first), its.p.last.eq(port.p.last)]
            rest = port.p.rest.replicate(len(its.p.as_value()))
            m.d.comb += [its.p.header.eq(rest), its.p.dword_count.eq(rest), its.p.damaged.eq(rest), its.p.data.eq(Cat(port.p.mark, rest))]
            mark, inside = port.payload.mark, Signal(name=f"inside_{name}")
            may_be_first = was_chosen & {"posted": ~is_message, "messages": is_message}.get(name, 0)
            with m.If(port.valid & port.ready):
                m.d.sync += inside.eq(~port.payload.last)
                with m.If(mark == FIRST):
                    m.d.sync += begun.eq(1)
                    with m.If(port.payload.last):
                        m.d.sync += accepted.eq(1)
            m.d.comb += [
                Assume(~port.valid | (port.payload.first == ~inside)),
                Assume(~port.valid | (mark != FIRST) | (may_be_first & ~accepted & (begun | port.payload.first))),
                Assume(~(port.valid & inside & may_be_first & begun & ~accepted) | (mark == FIRST)),
                Assume(~port.valid | (mark != OTHER) | accepted),
            ]
        o = proven.o
        with m.If(o.valid & self.ready & (o.payload.data[:2] == FIRST) & o.payload.last):
            m.d.sync += left.eq(1)
        check_stream(m, o, "o")
        m.d.comb += [
            Assert(~(o.valid & (o.payload.data[:2] == OTHER)) | left, "a posted TLP that was accepted is passed by none"),
            Cover(o.valid & (o.payload.data[:2] == OTHER) & ~o.payload.first, "the other leaves"),
        ]
        return m


def test_order():
    """FORMAL-TX-1: whatever is offered behind an accepted posted TLP, of any kind, leaves behind it."""
    prove(OrderContract(Transmitter(width=WIDTH)), depth=8, mode="prove")


QUEUE = '__import__("ringwall.rtl.stream.queue", fromlist=["Queue"]).Queue'


@pytest.mark.parametrize("kind", ["posted", "messages"])
def test_order_bugs(kind):
    """FORMAL-TX-2: a queue in front of the arbiter, for either kind of posted TLP, breaks the order."""
    index = KINDS.index(kind)
    late = f"""if n == {index}:
                m.submodules.late = late = {QUEUE}(TlpBeat(self.width), 2)
                wiring.connect(m, wiring.flipped(kind), late.i)
                kind = wiring.flipped(late.o)
            wiring.connect(m, wiring.flipped(kind), arbiter.i[n])"""
    broken = mutant(Transmitter, "wiring.connect(m, wiring.flipped(kind), arbiter.i[n])", late)(width=WIDTH)
    assert "passed by none" in refute(OrderContract(broken), depth=8)
