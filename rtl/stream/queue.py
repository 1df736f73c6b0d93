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
        self._wraps = not depth & (depth - 1)  # a power of two: places wrap by themselves
        super().__init__({"i": In(stream.Signature(layout)), "o": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.items = items = Ram(shape=self.layout, depth=self.depth, init=[])
        if self.in_block:
            items.attrs["ram_style"] = "block"
        write, read = items.write_port(), items.read_port()
        put, get = Signal(range(self.depth)), Signal(range(self.depth))  # ``get``: behind the item that was read last
        count = Signal(range(self.depth + 1))  # items in the memory, the one that was read included
        is_read = Signal()  # ``read.data`` is the first of them

        push, pop = self.i.valid & self.i.ready, self.o.valid & self.o.ready
        remains = (count[0] & ~pop) | count[1:].any()  # what is written in this very cycle cannot be read yet
        m.d.comb += [
            self.i.ready.eq(~count[-1] if self._wraps else count != self.depth),
            write.addr.eq(put),
            write.data.eq(self.i.payload),
            write.en.eq(push),
            read.addr.eq(get),
            read.en.eq(~is_read | pop),  # so what is taken enables a register, it leads to no address
            self.o.payload.eq(read.data),
        ]
        m.d.sync += is_read.eq(remains)
        with m.If(push):
            m.d.sync += put.eq(self._behind(put))
        with m.If(read.en & remains):
            m.d.sync += get.eq(self._behind(get))
        with m.If(push ^ pop):
            m.d.sync += count.eq(count + Mux(pop, -1, 1))
        if self.direct:
            newest = Signal(self.layout)
            m.d.sync += newest.eq(self.i.payload)
            m.d.comb += self.o.valid.eq(self.i.valid | (count != 0))
            with m.If(count == 0):
                m.d.comb += self.o.payload.eq(self.i.payload)
            with m.Elif(~is_read):
                m.d.comb += self.o.payload.eq(newest)
            with m.If(pop & ~is_read):  # it was never read
                m.d.sync += get.eq(self._behind(get))
        else:
            m.d.comb += self.o.valid.eq(is_read)
        return m

    def _behind(self, place):
        """Return the place behind ``place``."""
        behind = (place + 1)[: len(place)]
        return behind if self._wraps else Mux(place == self.depth - 1, 0, behind)
