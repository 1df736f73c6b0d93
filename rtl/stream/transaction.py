"""A queue whose items become visible only when their writer says so."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .ram import Ram


class TransactionQueue(wiring.Component):
    """Holds up to ``depth`` items; those written since the last ``commit`` wait for the next, or vanish with ``rollback``.

    An item taken at ``i`` in the cycle of a ``commit`` or ``rollback`` is part of what is committed or rolled back.

    Latency: 2 cycles from ``commit`` to ``o`` when empty. Throughput: 1 item per cycle.

    Parameters
    ----------
    layout : shape-castable
        One item.
    depth : :class:`int`
        Items that fit, committed or not: a power of two, at least 2.

    Members
    -------
    i : ``In(stream.Signature(layout))``
        Items.
    commit, rollback : ``In(1)``
        What becomes of the items since the last of the two; ``rollback`` wins.
    o : ``Out(stream.Signature(layout))``
        Committed items.
    level : ``Out(range(depth + 1))``
        Items inside, committed or not.

    Raises
    ------
    :exc:`ValueError`
        If ``depth`` is not a power of two.
    """

    def __init__(self, layout, depth):
        if not isinstance(depth, int) or depth < 2 or depth & (depth - 1):
            raise ValueError(f"Depth must be a power of two and at least 2, not {depth!r}")
        self.layout, self.depth = layout, depth
        super().__init__({
            "i": In(stream.Signature(layout)),
            "commit": In(1),
            "rollback": In(1),
            "o": Out(stream.Signature(layout)),
            "level": Out(range(depth + 1)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.items = items = Ram(shape=self.layout, depth=self.depth, init=[])
        write, read = items.write_port(), items.read_port()
        # Free-running indices, one bit wider than an address: what lies between two of them is their difference.
        put, committed, get = (Signal(range(2 * self.depth)) for _ in range(3))
        put_next, get_next = Signal.like(put), Signal.like(get)
        behind_get = Signal(range(2 * self.depth), init=1)  # a register: no sum in front of an address

        push, pop = self.i.valid & self.i.ready, self.o.valid & self.o.ready
        m.d.comb += [
            self.level.eq((put - get)[: len(put)]),
            self.i.ready.eq(self.level != self.depth),
            put_next.eq(put + push),
            get_next.eq(Mux(pop, behind_get, get)),
            write.addr.eq(put),
            write.data.eq(self.i.payload),
            write.en.eq(push),
            read.addr.eq(Mux(self.o.valid, behind_get, get)),
            read.en.eq(~self.o.valid | pop),  # so what is taken enables a register, it leads to no address
            self.o.payload.eq(read.data),
        ]
        m.d.sync += [
            put.eq(Mux(self.rollback, committed, put_next)),
            get.eq(get_next),
            self.o.valid.eq(committed != get_next),
        ]
        with m.If(pop):
            m.d.sync += behind_get.eq(behind_get + 1)
        with m.If(self.commit & ~self.rollback):
            m.d.sync += committed.eq(put_next)
        return m
