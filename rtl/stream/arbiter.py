"""Several streams into one."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out


class Arbiter(wiring.Component):
    """Joins ``count`` streams into one, round robin.

    A stream that was served goes to the back of the line. With ``packets`` an item without ``last`` keeps the grant, so that packets
    (items up to one with ``last``) stay whole.

    Latency: 1 cycle, none if ``direct``. Throughput: 1 item per cycle.

    Parameters
    ----------
    layout : shape-castable
        One item.
    count : :class:`int`
        Inputs: at least 1.
    packets : :class:`bool`
        Keep packets whole; ``layout`` then has a field ``last``.
    direct : :class:`bool`
        An item leaves in the cycle in which it comes: paths from ``i`` to ``o`` and back. One that was shown keeps the grant.

    Members
    -------
    i : ``In(stream.Signature(layout)).array(count)``
        Items.
    o : ``Out(stream.Signature(layout))``
        The same items.

    Raises
    ------
    :exc:`ValueError`
        If ``count`` is not positive.
    """

    def __init__(self, layout, count, *, packets=False, direct=False):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Inputs must be at least 1, not {count!r}")
        self.layout, self.count, self.packets, self.direct = layout, count, packets, direct
        super().__init__({"i": In(stream.Signature(layout)).array(count), "o": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        grant, latest = Signal(range(max(self.count, 2))), Signal(range(max(self.count, 2)))
        locked, held, free = Signal(), Signal(), Signal()
        m.d.comb += [free.eq(self.o.ready if self.direct else ~self.o.valid | self.o.ready), grant.eq(latest)]
        with m.If(~locked & ~held):
            # The nearest valid input behind the one served last: later assignments win.
            with m.Switch(latest):
                for at in range(self.count):
                    with m.Case(at):
                        for distance in range(self.count, 0, -1):
                            index = (at + distance) % self.count
                            with m.If(self.i[index].valid):
                                m.d.comb += grant.eq(index)
        if self.direct:
            with m.Switch(grant):
                for n in range(self.count):
                    with m.Case(n):
                        m.d.comb += [self.o.valid.eq(self.i[n].valid), self.o.payload.eq(self.i[n].payload)]
            m.d.sync += [latest.eq(grant), held.eq(self.o.valid & ~self.o.ready)]
        else:
            with m.If(self.o.ready):
                m.d.sync += self.o.valid.eq(0)
        for n in range(self.count):
            m.d.comb += self.i[n].ready.eq(free & (grant == n))
            with m.If(self.i[n].valid & self.i[n].ready):
                if not self.direct:
                    m.d.sync += [self.o.valid.eq(1), self.o.payload.eq(self.i[n].payload), latest.eq(n)]
                if self.packets:
                    m.d.sync += locked.eq(~self.i[n].payload.last)
        return m
