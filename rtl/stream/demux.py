"""One stream into several."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out


class Demux(wiring.Component):
    """Gives each item of a stream to one of ``count`` streams.

    With ``packets`` the items up to one with ``last`` go where the first of them went.

    Latency: none. Throughput: 1 item per cycle.

    Parameters
    ----------
    layout : shape-castable
        One item.
    count : :class:`int`
        Outputs: at least 1.
    packets : :class:`bool`
        Keep packets whole; ``layout`` then has a field ``last``.

    Members
    -------
    i : ``In(stream.Signature(layout))``
        Items.
    select : ``In(range(count))``
        Where the item at ``i`` goes: a function of its payload. With ``packets`` only that of a packet's first item counts.
    o : ``Out(stream.Signature(layout)).array(count)``
        The same items.

    Raises
    ------
    :exc:`ValueError`
        If ``count`` is not positive.
    """

    def __init__(self, layout, count, *, packets=False):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Outputs must be at least 1, not {count!r}")
        self.layout, self.count, self.packets = layout, count, packets
        super().__init__({
            "i": In(stream.Signature(layout)),
            "select": In(range(count)),
            "o": Out(stream.Signature(layout)).array(count),
        })

    def elaborate(self, platform):
        m = Module()
        inside, kept, to = Signal(), Signal.like(self.select), Signal.like(self.select)
        m.d.comb += to.eq(self.select)
        if self.packets:
            with m.If(inside):
                m.d.comb += to.eq(kept)
            with m.If(self.i.valid & self.i.ready):
                m.d.sync += [inside.eq(~self.i.payload.last), kept.eq(to)]
        for n, o in enumerate(self.o):
            m.d.comb += [o.valid.eq(self.i.valid & (to == n)), o.payload.eq(self.i.payload)]
            with m.If(to == n):
                m.d.comb += self.i.ready.eq(o.ready)
        return m
