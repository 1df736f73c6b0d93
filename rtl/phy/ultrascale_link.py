"""What lives through a reset of the link: packets that it cut in two, on their way to us and on their way to the UltraScale+ hard block."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Starter(wiring.Component):
    """Lets beats of the block through but while ``discarding``, and after that from the next beat that begins no packet's middle.

    What is not let through is taken and forgotten.

    Latency: 0 cycles.

    Members
    -------
    discarding : ``In(1)``
        The receiver is in reset.
    valid, ready : ``In(1)``, ``Out(1)``
        Towards the block.
    inside : ``Out(1)``
        The beat begins inside a packet.
    goes_on : ``In(1)``
        Its last packet ends in another.
    passed_valid, passed_ready : ``Out(1)``, ``In(1)``
        Towards the receiver.
    """

    def __init__(self):
        super().__init__({
            "discarding": In(1), "valid": In(1), "ready": Out(1), "inside": Out(1), "goes_on": In(1),
            "passed_valid": Out(1), "passed_ready": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        inside, is_cut, is_let = self.inside, Signal(), Signal()
        m.d.comb += [
            is_let.eq(~self.discarding & ~(is_cut & inside)),
            self.passed_valid.eq(self.valid & is_let),
            self.ready.eq(self.passed_ready | ~is_let),
        ]
        with m.If(self.valid & self.ready):
            m.d.sync += inside.eq(self.goes_on)
        m.d.sync += is_cut.eq(self.discarding | (is_cut & inside))
        return m


class Ender(wiring.Component):
    """Ends a packet that a reset of the link has cut: with a beat that is its last and says that nothing of it counts.

    A beat that waits when ``discarding`` rises is withdrawn, or becomes that beat: no link is there to see it.

    Latency: 0 cycles.

    Members
    -------
    discarding : ``In(1)``
        The sender is in reset.
    valid, ready, last : ``In(1)``, ``Out(1)``, ``In(1)``
        Towards the sender.
    passed_valid, passed_ready, passed_last, discontinue : ``Out(1)``, ``In(1)``, ``Out(1)``, ``Out(1)``
        Towards the block.
    """

    def __init__(self):
        super().__init__({
            "discarding": In(1), "valid": In(1), "ready": Out(1), "last": In(1),
            "passed_valid": Out(1), "passed_ready": In(1), "passed_last": Out(1), "discontinue": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        inside, is_cut = Signal(), Signal()
        m.d.comb += [
            self.discontinue.eq(inside & (self.discarding | is_cut)),
            self.passed_valid.eq(self.discontinue | (self.valid & ~self.discarding)),
            self.passed_last.eq(self.discontinue | self.last),
            self.ready.eq(self.passed_ready & ~self.discontinue & ~self.discarding),
        ]
        with m.If(self.passed_valid & self.passed_ready):
            m.d.sync += inside.eq(~self.passed_last)
        m.d.sync += is_cut.eq((self.discarding | is_cut) & inside & ~(self.passed_valid & self.passed_ready))
        return m
