"""Where read data waits: written by completions in any order and alignment, read in rows by the lines of the clients."""

from functools import cache

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.arbiter import Arbiter
from ..stream.queue import Queue
from ..stream.ram import Ram
from .layouts import BurstData, BurstStatus
from .tags import StoreBeat

OUTPUT_DEPTH = 8  # beats that wait for each client: covers the way there and back at one beat per cycle


@cache
def RowRead(width, rows):
    """Layout: one beat for a client: ``row``, of which bytes ``first_byte`` to ``last_byte`` count; the rest as in ``BurstData``."""
    return data.StructLayout({
        "row": range(rows), "first_byte": range(width // 8), "last_byte": range(width // 8),
        "first": 1, "last": 1, "cookie": 12, "status": BurstStatus, "function": 3,
    })  # fmt: skip


class Over(data.Struct):
    """A client took the last beat of a read of ``function``."""

    valid: 1
    function: 3


class ReadBuffer(wiring.Component):
    """Keeps the data of reads from the arrival of their completions until their clients take it.

    A row is as wide as a beat and holds bytes of one naturally aligned block of addresses; each dword of it is written on its own,
    so that a completion beat of any alignment is stored in one cycle. The rows of a client form a ring: behind the last row of its
    region (or of its slot) comes the first. Clients share one read port in turns; one that does not take its beats does not hold up
    another.

    Latency: 2 cycles from ``store`` to the row being readable; 1 from a row read being accepted to the beat at ``o``.
    Throughput: 1 ``store`` per cycle, 1 row read per cycle.

    Parameters
    ----------
    width : :class:`int`
        Bits of a row.
    rows : :class:`int`
        All rows.
    regions : tuple of :class:`int`
        For each client, in its order, the rows of its ring: a power of two, a ring starting at a multiple of it. 0: no reads.

    Members
    -------
    store : ``In(stream.Signature(StoreBeat(width, rows), always_ready=True))``
        Completion data.
    reads : ``In(stream.Signature(RowRead(width, rows))).array(n)``
        Rows to hand out, for each client in its order.
    o : ``Out(stream.Signature(BurstData(width))).array(n)``
        Beats.
    over : ``Out(Over).array(n)``
        Pulse for each last beat taken.
    """

    def __init__(self, *, width, rows, regions):
        self.width, self.rows, self.regions = width, rows, tuple(regions)
        super().__init__({
            "store": In(stream.Signature(StoreBeat(width, rows), always_ready=True)),
            "reads": In(stream.Signature(RowRead(width, rows))).array(len(self.regions)),
            "o": Out(stream.Signature(BurstData(width))).array(len(self.regions)),
            "over": Out(Over).array(len(self.regions)),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 32
        lanes_log2 = lanes.bit_length() - 1
        row_shape = range(self.rows)

        # Store: turn the beat so that each dword is in its lane, then write the lanes that count.
        s = self.store.p
        masks = Signal(data.ArrayLayout(row_shape, len(self.regions)))
        m.d.comb += [masks[n].eq(max(region, 1) - 1) for n, region in enumerate(self.regions)]
        mask = Signal(row_shape)
        m.d.comb += mask.eq(masks[s.client])
        lane = s.position[:lanes_log2]
        row_index = s.position[lanes_log2:]

        def wrapped(offset):
            row = Signal(row_shape)
            m.d.comb += row.eq((s.row & ~mask) | ((s.row + row_index + offset) & mask))
            return row

        here, behind = wrapped(0), wrapped(1)
        enables = Signal(2 * lanes)
        m.d.comb += enables.eq(((Const(1) << s.dword_count) - 1)[: lanes + 1] << lane)
        turned = Signal(self.width)
        twice = Cat(s.data, s.data)
        with m.Switch(lane):
            for n in range(lanes):
                with m.Case(n):
                    m.d.comb += turned.eq(twice.bit_select((lanes - n) * 32, self.width) if n else s.data)
        m.submodules.lanes = banks = Module()
        row_valid, row = Signal(), Signal(row_shape)
        row_data = Signal(self.width)
        for n in range(lanes):
            banks.submodules[f"lane{n}"] = bank = Ram(shape=32, depth=self.rows, init=[])
            write, read = bank.write_port(), bank.read_port()
            m.d.sync += [
                write.data.eq(turned.word_select(n, 32)),
                write.addr.eq(Mux(enables[lanes + n], behind, here)),
                write.en.eq(self.store.valid & (enables[n] | enables[lanes + n])),
            ]
            m.d.comb += [read.addr.eq(row), row_data.word_select(n, 32).eq(read.data)]

        # Read: one row per cycle for whoever has room for it at the client's side.
        readers = [n for n, region in enumerate(self.regions) if region]
        wanted = data.StructLayout({"what": RowRead(self.width, self.rows), "reader": range(max(2, len(readers)))})
        m.submodules.turns = turns = Arbiter(wanted, len(readers), direct=True)
        took = turns.o.payload
        m.d.comb += [turns.o.ready.eq(1), row.eq(took.what.row)]
        bytes_ = self.width // 8
        arrives, keep = Signal(wanted), Signal(bytes_)
        keep_from, keep_to = Signal(bytes_), Signal(bytes_)
        beat = Signal(BurstData(self.width))
        m.d.sync += [row_valid.eq(turns.o.valid), arrives.eq(took), keep.eq(keep_from & keep_to)]
        m.d.comb += [
            keep_from.eq(Const(-1, bytes_) << took.what.first_byte),
            keep_to.eq(Const((1 << bytes_) - 1, bytes_) >> ~took.what.last_byte),
            beat.data.eq(row_data),
            beat.keep.eq(keep),
            beat.first.eq(arrives.what.first),
            beat.last.eq(arrives.what.last),
            beat.cookie.eq(arrives.what.cookie),
            beat.status.eq(arrives.what.status),
        ]
        out_layout = data.StructLayout({"beat": beat.shape(), "function": 3})
        for k, n in enumerate(readers):
            m.submodules[f"output{n}"] = output = Queue(out_layout, OUTPUT_DEPTH, direct=True)
            room = Signal(range(OUTPUT_DEPTH + 1), init=OUTPUT_DEPTH)  # beats that are neither in the queue nor on the way to it
            wants, o = turns.i[k], self.o[n]
            m.d.comb += [
                wants.p.what.eq(self.reads[n].payload),
                wants.p.reader.eq(k),
                wants.valid.eq(self.reads[n].valid & (room != 0)),
                self.reads[n].ready.eq(wants.ready & (room != 0)),
                output.i.valid.eq(row_valid & (arrives.reader == k)),
                output.i.p.beat.eq(beat),
                output.i.p.function.eq(arrives.what.function),
                o.valid.eq(output.o.valid),
                o.payload.eq(output.o.p.beat),
                output.o.ready.eq(o.ready),
                self.over[n].valid.eq(o.valid & o.ready & o.p.last),
                self.over[n].function.eq(output.o.p.function),
            ]
            m.d.sync += room.eq(room - (wants.valid & wants.ready) + (o.valid & o.ready))
        return m
