"""Where the answers of ring reads wait until somebody looks at them."""

from functools import reduce
from operator import or_

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..stream.arbiter import Arbiter
from ..stream.ram import Ram
from ..tlp.layouts import BurstData, BurstStatus
from .ring_layouts import LINE_BYTES, SLOTS, LineBeat, LineCookie, LineKind


class LineStore(wiring.Component):
    """Keeps what ring reads brought, in any order: two lines of four descriptors per slot, 64 heads and the available index per queue.

    Latency: 3 cycles from the last beat of an answer to ``waiting`` and the pulses; 1 from an address to what lies there.
    Throughput: 1 beat per cycle of all functions together.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    functions, queues : :class:`int`
        How many.

    Members
    -------
    read_data : ``In(stream.Signature(BurstData(width)))``, one per function
        Answers of the fetch side.
    asked : ``In``
        A read of a line leaves: ``valid``, ``function``, ``number``.
    waiting : ``Out(2 * SLOTS)``, one per function
        Lines that were asked for and have not come.
    line : ``In``
        ``function``, ``number``, ``place``: of the next ``descriptor``.
    descriptor : ``Out(128)``
        One cycle later.
    heads : ``In``
        ``queue``, ``half``, ``row``: of the next ``head_row``, counted from the first row that the read brought.
    head_row, index : ``Out``
        One cycle after ``heads``.
    index_came, heads_came : ``Out``
        Pulses: one bit per queue; one per queue and half.
    over, failed : ``Out(functions)``
        Pulses: an answer is complete; it is not OK.
    """

    def __init__(self, *, width, functions, queues):
        self.width, self.functions, self.queues = width, functions, queues
        function, queue = range(max(functions, 2)), range(max(queues, 2))
        super().__init__({
            "read_data": In(stream.Signature(BurstData(width))).array(functions),
            "asked": In(data.StructLayout({"valid": 1, "function": function, "number": 7})),
            "waiting": Out(2 * SLOTS).array(functions),
            "line": In(data.StructLayout({"function": function, "number": 7, "place": 2})),
            "descriptor": Out(128),
            "heads": In(data.StructLayout({"queue": queue, "half": 1, "row": 3})),
            "head_row": Out(width),
            "index": Out(16),
            "index_came": Out(queues),
            "heads_came": Out(2 * queues),
            "over": Out(functions),
            "failed": Out(functions),
        })

    def elaborate(self, platform):
        m = Module()
        width, row_bits = self.width, max(self.width, 128)  # a row of lines holds whole descriptors
        rows, beats = 8 * LINE_BYTES // row_bits, 8 * LINE_BYTES // width
        layout = data.StructLayout({"about": LineBeat, "data": width, "keep": width // 8, "last": 1})
        m.submodules.beats = arbiter = Arbiter(layout, self.functions, packets=True)
        m.submodules.lines = lines = Ram(shape=row_bits, depth=2 * SLOTS * rows * max(self.functions, 2), init=[])
        m.submodules.heads = heads = Memory(shape=width, depth=2 * beats * self.queues, init=[])
        m.submodules.indices = indices = Memory(shape=16, depth=self.queues, init=[])
        write_line, read_line = lines.write_port(granularity=min(width, 128)), lines.read_port()
        write_head, read_head = heads.write_port(), heads.read_port()
        write_index, read_index = indices.write_port(), indices.read_port()
        for n, beat in enumerate(self.read_data):
            i = arbiter.i[n]
            m.d.comb += [
                i.valid.eq(beat.valid),
                i.payload.data.eq(beat.payload.data),
                i.payload.keep.eq(beat.payload.keep),
                i.payload.last.eq(beat.payload.last),
                i.payload.about.function.eq(n),
                i.payload.about.cookie.eq(LineCookie(beat.payload.cookie[: LineCookie.as_shape().size])),
                i.payload.about.first.eq(beat.payload.first),
                i.payload.about.status.eq(beat.payload.status),
                beat.ready.eq(i.ready),
            ]

        # Into the memories, a beat per cycle.
        beat, about, cookie = arbiter.o.payload, arbiter.o.payload.about, arbiter.o.payload.about.cookie
        first_row, row, at = Signal(3), Signal(3), Signal(3)
        is_line, is_heads, is_index = Signal(), Signal(), Signal()
        with m.If(is_line):
            m.d.comb += first_row.eq(Cat(cookie.kind == LineKind.LINE_HALF, cookie.place) >> (width // 128).bit_length())
        places = Cat(beat.keep.word_select(n, 16).any() for n in range(width // 128)) if width >= 128 else Cat(~at[0], at[0])
        m.d.comb += [
            arbiter.o.ready.eq(1),
            at.eq(Mux(about.first, first_row, row)),
            is_line.eq(cookie.is_line()),
            is_heads.eq(cookie.kind == LineKind.HEADS),
            is_index.eq(cookie.kind == LineKind.INDEX),
            write_line.addr.eq(_row_address(about.function, cookie.number, at if width >= 128 else at >> 1, rows)),
            write_line.data.eq(beat.data if width >= 128 else Cat(beat.data, beat.data)),
            write_head.addr.eq(_row_address(cookie.number[:6], cookie.number[6], at, beats)),
            write_head.data.eq(beat.data),
            write_index.addr.eq(cookie.number),
            write_index.data.eq(reduce(or_, (Mux(beat.keep[2 * n], beat.data.word_select(n, 16), 0) for n in range(width // 16)))),
        ]
        with m.If(arbiter.o.valid):
            m.d.comb += [
                write_line.en.eq(Mux(is_line, places, 0)),
                write_head.en.eq(is_heads),
                write_index.en.eq(is_index),
            ]
            m.d.sync += row.eq(at + 1)
        ended = Signal()
        m.d.comb += ended.eq(arbiter.o.valid & beat.last)
        m.d.comb += [
            self.index_came.eq(Mux(ended & is_index, 1 << cookie.number[:6], 0)),
            self.heads_came.eq(Mux(ended & is_heads, 1 << Cat(cookie.number[6], cookie.number[:6]), 0)),
            self.over.eq(Mux(ended, 1 << about.function, 0)),
            self.failed.eq(Mux(ended & (about.status != BurstStatus.OK), 1 << about.function, 0)),
        ]
        for n, waiting in enumerate(self.waiting):
            came, asked = Signal(2 * SLOTS, name=f"came_{n}"), Signal(2 * SLOTS, name=f"asked_{n}")
            m.d.comb += [
                came.eq(Mux(ended & is_line & (about.function == n), 1 << cookie.number, 0)),
                asked.eq(Mux(self.asked.valid & (self.asked.function == n), 1 << self.asked.number, 0)),
            ]
            m.d.sync += waiting.eq((waiting & ~came) | asked)

        # Out of them.
        place = Signal(2)
        m.d.sync += place.eq(self.line.place)
        m.d.comb += [
            read_line.addr.eq(_row_address(self.line.function, self.line.number, (self.line.place << 7) // row_bits, rows)),
            self.descriptor.eq(read_line.data.word_select(place[: (row_bits // 128 - 1).bit_length()], 128)),
            read_head.addr.eq(_row_address(self.heads.queue, self.heads.half, self.heads.row, beats)),
            self.head_row.eq(read_head.data),
            read_index.addr.eq(self.heads.queue),
            self.index.eq(read_index.data),
        ]
        return m


def _row_address(owner, part, row, rows):
    """Return the address of a row: ``rows`` for each part of an owner."""
    return Cat(row[: (rows - 1).bit_length()], part, owner)
