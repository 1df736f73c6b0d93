"""Segments to page-bounded pieces."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .layouts import Segment

PAGE_BYTES = 4096  # a request must not cross a naturally aligned 4 KiB boundary [PCIe5 2.2.7]
BURST_LIMITS = (64, 128, 256, 512, 1024, 2048, 4096)


def check_max_burst(max_burst):
    """Return ``max_burst``, or raise :exc:`ValueError` when it is no power of two between 64 and 4096."""
    if max_burst not in BURST_LIMITS:
        raise ValueError(f"Maximum burst must be a power of two between 64 and 4096, not {max_burst!r}")
    return max_burst


def cut(length_bytes, room):
    """Return whether ``length_bytes`` fit into ``room``, how many of them do, and how many do not."""
    fits = length_bytes <= room
    return fits, Mux(fits, length_bytes, room), Mux(fits, 0, length_bytes - room)


class Piece(data.Struct):
    """One burst's worth of a segment.

    ``last`` ends the scatter list; ``length_bytes`` is 0 only in a piece that does nothing but end a list.
    """

    address: 64
    length_bytes: range(PAGE_BYTES + 1)
    last: 1


class Splitter(wiring.Component):
    """Splits segments into pieces that one burst may carry.

    Every piece is at most ``max_burst`` bytes and lies inside one naturally aligned block of ``max_burst`` bytes, so inside
    one 4 KiB page; the pieces of one segment leave in ascending address order and cover it exactly. A segment of length
    0 produces no piece, unless it ends its list: then one piece of length 0 with ``last``. [PCIe5 2.2.7]

    Latency: 1 cycle from ``i`` to the first piece. Throughput: 1 piece per cycle; the last one of a segment is followed by an idle cycle.
    No path leads through it.

    Parameters
    ----------
    max_burst : :class:`int`
        Upper bound of one piece in bytes: a power of two, 64 to 4096.

    Members
    -------
    i : ``In(stream.Signature(Segment))``
        Segments.
    o : ``Out(stream.Signature(Piece))``
        Pieces.
    stop : ``In(1)``
        While 1: the segment at work is forgotten, further ones are taken and dropped. A piece already offered is kept.

    Raises
    ------
    :exc:`ValueError`
        If ``max_burst`` is not one of the powers of two.
    """

    def __init__(self, *, max_burst=PAGE_BYTES):
        self.max_burst = check_max_burst(max_burst)
        super().__init__({
            "i": In(stream.Signature(Segment)),
            "o": Out(stream.Signature(Piece)),
            "stop": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        segment, o = self.i.p, self.o.p
        behind, ends = Signal(32), Signal()  # bytes of the segment behind the piece at ``o``; it ends its list
        block_bits = (self.max_burst - 1).bit_length()

        def show(length_bytes, room, ends_list):
            """Return assignments for the piece at the beginning of ``length_bytes``."""
            fits, fitting, rest = cut(length_bytes, room)
            return [o.length_bytes.eq(fitting), behind.eq(rest), o.last.eq(ends_list & fits)]

        # max_burst divides the page, so stopping at each max_burst boundary never crosses a page.
        m.d.comb += self.i.ready.eq(~self.o.valid)
        with m.If(~self.o.valid):
            m.d.sync += [
                self.o.valid.eq(self.i.valid & ~self.stop & ((segment.length_bytes != 0) | segment.last)),
                o.address.eq(segment.address), ends.eq(segment.last),
                *show(segment.length_bytes, self.max_burst - segment.address[:block_bits], segment.last),
            ]
        with m.Elif(self.o.ready):
            m.d.sync += [
                self.o.valid.eq((behind != 0) & ~self.stop),
                o.address.eq((o.address[block_bits:] + 1) << block_bits),
                *show(behind, self.max_burst, ends),
            ]
        return m


class DirectSplitter(Splitter):
    """As :class:`Splitter`, but the first piece of a segment is shown in the cycle in which the segment is: a path leads through it.

    Latency: none from ``i`` to the first piece. Throughput: 1 piece per cycle; the last of several is followed by an idle cycle.
    """

    def elaborate(self, platform):
        m = Module()
        held, busy = Signal(Segment), Signal()  # what is left of the segment at work
        work = Signal(Segment)
        iova, left = work.address, work.length_bytes
        with m.If(busy):
            m.d.comb += work.eq(held)
        with m.Else():
            m.d.comb += work.eq(self.i.payload)

        # max_burst divides the page, so stopping at each max_burst boundary never crosses a page.
        room = Signal(range(self.max_burst + 1))
        step = Signal(range(self.max_burst + 1))
        m.d.comb += [
            room.eq(self.max_burst - iova[: (self.max_burst - 1).bit_length()]),
            step.eq(Mux(left < room, left, room)),
            self.o.valid.eq(busy | (self.i.valid & ~self.stop & ((left != 0) | work.last))),
            self.o.payload.address.eq(iova),
            self.o.payload.length_bytes.eq(step),
            self.o.payload.last.eq(work.last & (left == step)),
            self.i.ready.eq(~busy),
        ]
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += [held.address.eq(iova + step), held.length_bytes.eq(left - step), busy.eq((left != step) & ~self.stop)]
        with m.Elif(~busy):
            m.d.sync += [held.address.eq(iova), held.length_bytes.eq(left), busy.eq(self.o.valid)]
        with m.If(~busy):
            m.d.sync += held.last.eq(work.last)
        return m
