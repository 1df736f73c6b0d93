"""A register in a stream, both ways."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out


class SkidBuffer(wiring.Component):
    """Passes a stream on so that no path leads through it: ``payload`` and ``valid`` forwards and ``ready`` backwards are registers.

    Latency: 1 cycle. Throughput: 1 item per cycle. Two items fit.

    Parameters
    ----------
    layout : shape-castable
        One item.

    Members
    -------
    i : ``In(stream.Signature(layout))``
        Items.
    o : ``Out(stream.Signature(layout))``
        The same items.
    """

    def __init__(self, layout):
        self.layout = layout
        super().__init__({"i": In(stream.Signature(layout)), "o": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        spare, full = Signal(self.layout), Signal()  # what arrived while ``o`` was stalled
        m.d.comb += self.i.ready.eq(~full)
        with m.If(~full):
            m.d.sync += spare.eq(self.i.payload)
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [full.eq(0), self.o.valid.eq(self.i.valid | full), self.o.payload.eq(Mux(full, spare, self.i.payload))]
        with m.Elif(self.i.valid):
            m.d.sync += full.eq(1)
        return m
