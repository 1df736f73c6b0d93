"""A queue of stream items."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .ram import Ram


class Queue(wiring.Component):
    """Holds up to ``depth`` items, first in, first out.

    The memory is read in the cycle in front of the item's appearance (registered), so it may be a block RAM.

    Latency: 2 cycles from ``i`` to ``o`` when empty, none if ``direct``. Throughput: 1 item per cycle.

    Parameters
    ----------
    layout : shape-castable
        One item.
    depth : :class:`int`
        Items that fit: at least 2.
    direct : :class:`bool`
        While it is empty an item is shown in the cycle in which it comes: a path from ``i`` to ``o``, none back.
    in_block : :class:`bool`
        It lies in block RAM, however small it is.

    Members
    -------
    i : ``In(stream.Signature(layout))``
        Items.
    o : ``Out(stream.Signature(layout))``
        The same items.

    Raises
    ------
    :exc:`ValueError`
        If ``depth`` is below 2.
    """

    def __init__(self, layout, depth, *, direct=False, in_block=False):
        if not isinstance(depth, int) or depth < 2:
            raise ValueError(f"Depth must be an integer of at least 2, not {depth!r}")
        self.layout, self.depth, self.direct, self.in_block = layout, depth, direct, in_block
        super().__init__({"i": In(stream.Signature(layout)), "o": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.items = items = Ram(shape=self.layout, depth=self.depth, init=[])
        if self.in_block:
            items.attrs["ram_style"] = "block"
        write, read = items.write_port(), items.read_port()
        put, get = Signal(range(self.depth)), Signal(range(self.depth))
        count = Signal(range(self.depth + 1))  # items in the memory, the one shown at ``o`` included

        push, pop = self.i.valid & self.i.ready, self.o.valid & self.o.ready
        following = Mux(get == self.depth - 1, 0, get + 1)
        m.d.comb += [
            self.i.ready.eq(count != self.depth),
            write.addr.eq(put),
            write.data.eq(self.i.payload),
            write.en.eq(push),
            read.addr.eq(Mux(pop, following, get)),
            self.o.payload.eq(read.data),
        ]
        m.d.sync += count.eq(count + push - pop)
        # What was written in this very cycle cannot be read yet.
        if self.direct:
            readable, newest = Signal(), Signal(self.layout)
            m.d.sync += [readable.eq(count > pop), newest.eq(self.i.payload)]
            m.d.comb += self.o.valid.eq(self.i.valid | (count != 0))
            with m.If(count == 0):
                m.d.comb += self.o.payload.eq(self.i.payload)
            with m.Elif(~readable):
                m.d.comb += self.o.payload.eq(newest)
        else:
            m.d.sync += self.o.valid.eq(count > pop)
        with m.If(push):
            m.d.sync += put.eq(Mux(put == self.depth - 1, 0, put + 1))
        with m.If(pop):
            m.d.sync += get.eq(following)
        return m
