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
        locked, held, free, is_offered, offered = Signal(), Signal(), Signal(), Signal(), Signal(self.layout)
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
        with m.Switch(grant):
            for n in range(self.count):
                with m.Case(n):
                    m.d.comb += [is_offered.eq(self.i[n].valid), offered.eq(self.i[n].payload), self.i[n].ready.eq(free)]
        with m.If(free | int(self.direct)):
            m.d.sync += latest.eq(grant)
        if self.direct:
            m.d.comb += [self.o.valid.eq(is_offered), self.o.payload.eq(offered)]
            m.d.sync += held.eq(is_offered & ~free)
        else:
            with m.If(free):
                m.d.sync += [self.o.valid.eq(is_offered), self.o.payload.eq(offered)]
        if self.packets:
            with m.If(is_offered & free):
                m.d.sync += locked.eq(~offered.last)
        return m
