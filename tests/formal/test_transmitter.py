"""Proof of the ordering of what the card sends: what was accepted as posted is never passed. [PCIe5 2.4.1]"""

import pytest
from amaranth.hdl import Assert, Assume, Cover, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.tlp.layouts import TlpBeat
from ringwall.rtl.tlp.transmitter import Transmitter
from ringwall.sim.formal import check_stream, mutant, offered, prove, refute

WIDTH = 64
KINDS = ("posted", "non_posted", "completions", "messages")


class OrderContract(wiring.Component):
    """One posted TLP is followed, and one TLP of any kind that is offered when the first has been accepted.

    The lowest two bits of a beat's data mark them: 1 on every beat of the first, 2 on every beat of the other.
    """

    i: In(stream.Signature(TlpBeat(WIDTH))).array(len(KINDS))
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
            port = self.i[n]
            offered(m, port)
            wiring.connect(m, wiring.flipped(port), getattr(proven, name))
            mark, inside = port.payload.data[:2], Signal(name=f"inside_{name}")
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
