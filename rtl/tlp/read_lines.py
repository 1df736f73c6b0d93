"""One client's reads from burst to data: the decision to send, the space for the data, the order of the answers."""

from functools import cache

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..stream.queue import Queue
from ..stream.ram import Ram
from .cutter import Cutter, Piece, Wrapper
from .layouts import AtomicKind, BurstData, BurstRetired, BurstStatus, ConfigState, burst_layout
from .read_buffer import RowRead
from .tags import TagEnd

OPERANDS = 4  # of AtomicOps that wait
SLOT_BYTES = 64  # an unordered read lies inside one naturally aligned block of this size


class TagSets(data.Struct):
    """A bit for each set of the tags that are not the wall's."""

    short: 1
    long: 1
    wide: 1


@cache
def ReadRequest(rows, index_bits, host_ats=False):
    """Layout: a Memory Read or AtomicOp that may be sent now.

    ``index`` is the line's own, ``row`` the first one kept free for its data; ``is_far`` says that the address takes 64 bits.
    """
    return data.StructLayout({
        "piece": Piece(host_ats), "reach": TagSets, "row": range(rows), "index": index_bits, "operand": 128, "is_far": 1,
    })  # fmt: skip


class ReadFront(wiring.Component):
    """Queue, cutter and decision of a line: what happens to the next piece of a client's reads.

    The piece at the head waits until every write that was accepted before its burst has been sent, until there is space and a tag;
    then it is ``wanted``, and leaves when ``granted``. If it must not be sent at all (refused by the gate, function
    stopped or not bus master, an AtomicOp that is not allowed, or no tag will ever come) it leaves with ``refused`` instead and the rest of
    its burst with it.

    Parameters
    ----------
    reads : :class:`int`
        Bursts that fit into the queue.
    functions : :class:`int`
        Number of functions.
    cuts : :class:`bool`
        False: no burst is longer than one request may be (:class:`.cutter.Wrapper`).
    atomics : :class:`bool`
        False: every AtomicOp is refused.
    host_ats : :class:`bool`
        Bursts are :data:`.layouts.AddressedBurst`.
    has_pasid : :class:`bool`
        And their requests may have a PASID.

    Members
    -------
    bursts : ``In(stream.Signature(burst_layout(host_ats)))``
        Read bursts.
    room : ``Out(1)``
        At least 4 more bursts fit into the queue.
    cleared : ``In(1)``
        Pulse: one more of the bursts, in order, has no unsent write in front of it.
    config : ``In(ConfigState).array(functions)``
        Of each function.
    live : ``In(functions)``
        1: the function may send requests from the next cycle on; 0: not from then on.
    ats : ``In(functions)``
        With ``host_ats``; 1: the function may send requests that are not untranslated.
    pasid : ``In(functions)``
        With ``has_pasid``; 1: the function may send requests with a PASID.
    free, dead : ``In(TagSets)``
        There is a tag in a set; none of a set will come back, known a cycle later.
    space, refusable : ``In(1)``
        The line can take the piece as one that is sent, as one that is refused.
    granted : ``In(1)``
        The piece is being sent; only while ``wanted``.
    piece, reach : ``Out(Piece(host_ats))``, ``Out(TagSets)``
        The piece at the head, with the attributes that its function allows, and the sets that it may have a tag of.
    wanted, refused : ``Out(1)``
        The piece may be sent; the piece is refused, in this cycle.
    status : ``Out(BurstStatus)``
        Why it is refused.
    """

    def __init__(self, *, reads, functions, cuts, atomics=False, host_ats=False, has_pasid=False):
        self.reads, self.functions, self.cuts = reads, functions, cuts
        self.atomics, self.host_ats, self.has_pasid = atomics, host_ats, has_pasid
        super().__init__({
            "bursts": In(stream.Signature(burst_layout(host_ats))),
            "room": Out(1),
            "cleared": In(1),
            "config": In(ConfigState).array(functions),
            "live": In(functions),
            **({"ats": In(functions)} if host_ats else {}),
            **({"pasid": In(functions)} if has_pasid else {}),
            "free": In(TagSets),
            "dead": In(TagSets),
            "space": In(1),
            "refusable": In(1),
            "granted": In(1),
            "piece": Out(Piece(host_ats)),
            "reach": Out(TagSets),
            "wanted": Out(1),
            "refused": Out(1),
            "status": Out(BurstStatus),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = Queue(burst_layout(self.host_ats), self.reads)
        extended = Array(config.extended_tag | config.ten_bit_tag for config in self.config)
        ten_bit = Array(config.ten_bit_tag for config in self.config)
        relaxes, unsnooped = (Array(config[name] for config in self.config) for name in ("relaxed_ordering", "no_snoop"))
        waiting, is_empty = Signal(range(self.reads + 1)), Signal(init=1)
        new, new_valid, new_ready = Signal(burst_layout(self.host_ats)), Signal(), Signal()
        waits = queue.o
        if self.cuts:  # so that what decides how it is cut comes out of registers, not of a block RAM
            waits = stream.Signature(burst_layout(self.host_ats)).create(path=("waits",))
            m.d.comb += queue.o.ready.eq(~waits.valid | waits.ready)
            with m.If(queue.o.ready):
                m.d.sync += [waits.valid.eq(queue.o.valid), waits.payload.eq(queue.o.payload)]
        comes, goes = queue.i.valid & queue.i.ready, waits.valid & waits.ready
        with m.If(comes != goes):
            m.d.sync += [waiting.eq(Mux(goes, waiting - 1, waiting + 1)), is_empty.eq(goes & (waiting == 1))]
        m.d.comb += [
            self.room.eq(waiting + 4 <= self.reads),
            queue.i.valid.eq(self.bursts.valid & ~(is_empty & new_ready)),  # else it goes past the queue
            queue.i.payload.eq(self.bursts.payload),
            self.bursts.ready.eq(queue.i.ready),
            waits.ready.eq(new_ready),
            new_valid.eq(Mux(is_empty, self.bursts.valid, waits.valid)),
            new.eq(Mux(is_empty, self.bursts.payload, waits.payload)),
            new.function.eq(Mux(is_empty, self.bursts.p.function, waits.p.function)[: ceil_log2(self.functions)]),
        ]
        if self.cuts:
            m.submodules.cutter = cutter = Cutter(host_ats=self.host_ats)
            codes, function_bits = Array(config.mrrs_code for config in self.config), ceil_log2(self.functions)
            m.d.comb += [
                cutter.i.p.burst.eq(new), cutter.abandon.eq(self.refused),
                cutter.i.p.limit_code.eq(Mux(is_empty, *(codes[its.function[:function_bits]] for its in (self.bursts.p, waits.p)))),
            ]
        else:
            m.submodules.cutter = cutter = Wrapper(host_ats=self.host_ats)
            m.d.comb += cutter.i.payload.eq(new)
        m.d.comb += [cutter.i.valid.eq(new_valid), new_ready.eq(cutter.i.ready)]

        head, burst = cutter.o, cutter.o.p.burst
        sent, leaves = Signal(), Signal()
        in_order = Signal(range(self.reads + 4))  # bursts, the one at the head included, without an unsent write in front
        m.d.comb += [
            sent.eq(self.granted),
            head.ready.eq(sent | self.refused),
            leaves.eq(self.refused | (sent & head.p.last)),
        ]
        is_cleared = Signal()  # there are any
        m.d.sync += is_cleared.eq(self.cleared | (in_order > 1) | ((in_order == 1) & ~leaves))
        with m.If(self.cleared != leaves):
            m.d.sync += in_order.eq(Mux(leaves, in_order - 1, in_order + 1))

        # What may become of the piece, as its function was in the cycle before: known when it comes to the head. Both are looked at, the
        # piece at the head and what comes, for which of them is there a cycle later is known late.
        reaches = Array(Cat(1, extended[f], ten_bit[f]) for f in range(self.functions))
        deaths = Array((self.dead.as_value() | ~reaches[f])[:3].all() for f in range(self.functions))
        looks_layout = data.StructLayout({"reach": TagSets, "was_live": 1, "dead": 1, "turned_down": 1})
        of_head, of_coming, looks, moved = Signal(looks_layout), Signal(looks_layout), Signal(looks_layout), Signal()
        for kept, its in ((of_head, burst), (of_coming, cutter.coming)):
            m.d.sync += [
                kept.reach.eq(reaches[its.function]),
                kept.was_live.eq(self.live.bit_select(its.function, 1)),
                kept.dead.eq(deaths[its.function]),
                kept.turned_down.eq((its.verdict != BurstStatus.OK) | (0 if self.atomics else its.atomic != AtomicKind.NONE)),
            ]
        m.d.sync += moved.eq(~head.valid | head.ready)
        m.d.comb += looks.eq(Mux(moved, of_coming, of_head))
        ready, live = Signal(), Signal()
        m.d.comb += [
            self.piece.eq(head.payload),
            self.piece.burst.relaxed_ordering.eq(burst.relaxed_ordering & relaxes[burst.function]),
            self.piece.burst.no_snoop.eq(burst.no_snoop & unsnooped[burst.function]),
            self.reach.eq(looks.reach),
            live.eq(looks.was_live),
            ready.eq(head.valid & is_cleared),
            self.status.eq(burst.verdict),
        ]
        if self.host_ats:
            with m.If(burst.at.any() & ~self.ats.bit_select(burst.function, 1)):
                m.d.comb += live.eq(0)
        if self.has_pasid:
            with m.If(burst.pasid_valid & ~self.pasid.bit_select(burst.function, 1)):
                m.d.comb += live.eq(0)
        is_atomic, illegal = burst.atomic != AtomicKind.NONE, Signal()
        m.d.comb += illegal.eq(is_atomic)
        if self.atomics:
            enabled = Array(config.atomics for config in self.config)[burst.function]
            low, size = burst.address[:3], burst.length_bytes
            is_natural = ((size == 4) & (low[:2] == 0)) | ((size == 8) & (low == 0))
            m.d.comb += illegal.eq(is_atomic & ~(enabled & is_natural & head.p.first & head.p.last))
        with m.If(burst.verdict == BurstStatus.OK):
            m.d.comb += self.status.eq(Mux(~live, BurstStatus.RESET, Mux(illegal, BurstStatus.REFUSED, BurstStatus.TIMEOUT)))
        must_not = looks.turned_down | ~live | looks.dead | (illegal if self.atomics else 0)
        m.d.comb += [
            self.refused.eq(ready & must_not & self.refusable),
            self.wanted.eq(ready & ~must_not & self.space & (self.free.as_value() & self.reach.as_value()).any()),
        ]
        return m


@cache
def Span(width, rows):
    """Layout: a run of bytes in the buffer that is handed to the client; with a ``status`` other than OK a single beat without data."""
    return data.StructLayout({
        "row": range(rows), "offset": range(width // 8), "length_bytes": 13, "first": 1, "last": 1, "cookie": 12,
        "status": BurstStatus, "function": 3,
    })  # fmt: skip


class RowStreamer(wiring.Component):
    """Spans to row reads.

    Latency: 1 cycle. Throughput: 1 row per cycle, also across spans.

    Members
    -------
    i : ``In(stream.Signature(Span(width, rows)))``
        Spans.
    o : ``Out(stream.Signature(RowRead(width, rows)))``
        Their rows.
    """

    def __init__(self, *, width, rows, region):
        self.width, self.rows, self.region = width, rows, region
        super().__init__({
            "i": In(stream.Signature(Span(width, rows))),
            "o": Out(stream.Signature(RowRead(width, rows))),
        })

    def elaborate(self, platform):
        m = Module()
        bytes_log2 = (self.width // 8).bit_length() - 1
        rows_left = Signal(range(4096 * 8 // self.width + 1))  # behind the one at ``o``
        last, last_byte = Signal(), Signal(bytes_log2)  # of the span
        i, o = self.i.p, self.o.p
        end = i.offset + i.length_bytes - 1  # place of the last byte, counted from the start of the first row
        more = Signal.like(rows_left)
        with m.If(i.status == BurstStatus.OK):
            m.d.comb += more.eq(end[bytes_log2:])
        taken, final = Signal(), Signal()
        m.d.comb += [
            taken.eq(self.o.valid & self.o.ready),
            final.eq(rows_left == 0),
            self.i.ready.eq(~self.o.valid | (taken & final)),
        ]
        with m.If(taken):
            m.d.sync += [
                rows_left.eq(rows_left - 1),
                o.row.eq((o.row & ~(self.region - 1)) | ((o.row + 1) & (self.region - 1))),
                o.first_byte.eq(0),
                o.last_byte.eq(Mux(rows_left == 1, last_byte, -1)),
                o.first.eq(0),
                o.last.eq(last & (rows_left == 1)),
            ]
            with m.If(final):
                m.d.sync += self.o.valid.eq(0)
        with m.If(self.i.ready & self.i.valid):
            m.d.sync += [
                self.o.valid.eq(1),
                rows_left.eq(more),
                last.eq(i.last),
                last_byte.eq(end[:bytes_log2]),
                o.row.eq(i.row),
                o.first_byte.eq(i.offset),
                o.last_byte.eq(Mux(more == 0, end[:bytes_log2], -1)),
                o.first.eq(i.first),
                o.last.eq(i.last & (more == 0)),
                o.cookie.eq(i.cookie),
                o.status.eq(i.status),
                o.function.eq(i.function),
            ]
            with m.If(i.status != BurstStatus.OK):
                m.d.sync += [o.first_byte.eq(0), o.last_byte.eq(0)]
        return m


def _line_members(width, rows, index_bits, functions, host_ats, has_pasid):
    """Members of a line, as in :class:`OrderedLine`."""
    return {
        "bursts": In(stream.Signature(burst_layout(host_ats))),
        "room": Out(1),
        "cleared": In(1),
        "config": In(ConfigState).array(functions),
        "live": In(functions),
        **({"ats": In(functions)} if host_ats else {}),
        **({"pasid": In(functions)} if has_pasid else {}),
        "free": In(TagSets),
        "dead": In(TagSets),
        "wanted": Out(1),
        "granted": In(1),
        "request": Out(ReadRequest(rows, index_bits, host_ats)),
        "ended": In(stream.Signature(TagEnd(index_bits), always_ready=True)),
        "rows": Out(stream.Signature(RowRead(width, rows))),
        "retired": Out(stream.Signature(BurstRetired)),
    }


def _make_front(m, line, *, cuts):
    """Add the front of ``line`` to ``m``, joined to the members of the same names."""
    m.submodules.front = front = ReadFront(reads=line.reads, functions=line.functions, cuts=cuts, atomics=line.atomics,
                                           host_ats=line.host_ats, has_pasid=line.has_pasid)  # fmt: skip
    wiring.connect(m, wiring.flipped(line.bursts), front.bursts)
    for config, its_config in zip(line.config, front.config):
        m.d.comb += its_config.eq(config)
    if line.host_ats:
        m.d.comb += front.ats.eq(line.ats)
    if line.has_pasid:
        m.d.comb += front.pasid.eq(line.pasid)
    m.d.comb += [
        line.room.eq(front.room),
        front.cleared.eq(line.cleared),
        front.live.eq(line.live),
        front.free.eq(line.free),
        front.dead.eq(line.dead),
        front.granted.eq(line.granted),
        line.wanted.eq(front.wanted),
        line.request.piece.eq(front.piece),
        line.request.is_far.eq(front.piece.burst.address[32:].any()),
        line.request.reach.eq(front.reach),
    ]
    return front


class Operands(wiring.Component):
    """Beats of write data to operands of AtomicOps: up to 16 bytes, from lane 0 of the first beat on.

    Members
    -------
    i : ``In(stream.Signature(BurstData(width)))``
        Beats.
    o : ``Out(stream.Signature(128))``
        All that came up to a last beat.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(BurstData(width))), "o": Out(stream.Signature(128))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = Queue(128, OPERANDS)
        beat, before = self.i.p, Signal(self.width)
        m.d.comb += [
            self.i.ready.eq(queue.i.ready),
            queue.i.valid.eq(self.i.valid & beat.last),
            queue.i.payload.eq(Mux(beat.first, beat.data, Cat(before, beat.data))),
        ]
        with m.If(self.i.valid & beat.first):
            m.d.sync += before.eq(beat.data)
        wiring.connect(m, queue.o, wiring.flipped(self.o))
        return m


class OrderedLine(wiring.Component):
    """Reads of a client that gets its data in the order of its bursts.

    Data leaves as soon as all pieces in front of it ended. After the first piece that failed or was refused the burst ends
    in one beat with ``last`` and its status; what else the burst had in flight is waited for and dropped. Each burst is
    reported in ``retired`` once, when its last piece in flight ended, whether or not the client takes its data.

    Parameters
    ----------
    width, rows, index_bits, functions : :class:`int`
        As in the requester: data width, rows of the whole buffer, bits of a request's index, functions.
    client : :class:`int`
        Number of the client.
    base, region : :class:`int`
        First row of the client's ring and its size in rows: a power of two of at least 4096 bytes, at a multiple of itself.
    reads : :class:`int`
        Bursts that wait without holding up others.
    host_ats, has_pasid : :class:`bool`
        As in :class:`ReadFront`.

    Members
    -------
    bursts, room, cleared, config, live, ats, pasid, free, dead, wanted, granted
        As in :class:`ReadFront`.
    request : ``Out(ReadRequest(rows, index_bits, host_ats))``
        What is wanted.
    ended : ``In(stream.Signature(TagEnd(index_bits), always_ready=True))``
        Ends of requests of all clients.
    rows : ``Out(stream.Signature(RowRead(width, rows)))``
        Beats to hand out.
    retired : ``Out(stream.Signature(BurstRetired))``
        Bursts that are over.
    """

    atomics = False

    def __init__(self, *, width, rows, index_bits, functions, client, base, region, reads, host_ats=False,
                 has_pasid=False):  # fmt: skip
        self.width, self.buffer_rows, self.index_bits, self.functions = width, rows, index_bits, functions
        self.client, self.base, self.region, self.reads = client, base, region, reads
        self.host_ats, self.has_pasid = host_ats, has_pasid
        super().__init__(_line_members(width, rows, index_bits, functions, host_ats, has_pasid))

    @staticmethod
    def pieces(width, region):
        """Return the number of pieces that a line keeps track of: one for each 64 bytes of its ring."""
        return region * width // 8 // SLOT_BYTES

    def elaborate(self, platform):
        m = Module()
        front = _make_front(m, self, cuts=True)
        bytes_log2 = (self.width // 8).bit_length() - 1
        depth = self.pieces(self.width, self.region)
        pointer = depth.bit_length()  # bits: a place in the ring of pieces, and on top the lap
        count_shape = range(self.region + 1)

        def rows_of(offset, length_bytes):
            """Rows that bytes from ``offset`` of the first row touch."""
            return ((offset + length_bytes - 1) >> bytes_log2)[:13] + 1

        # One ticket for each piece, in the order of issue.
        ticket_layout = data.StructLayout({
            "offset": bytes_log2, "length_bytes": 13, "first": 1, "last": 1, "cookie": 12, "function": 3, "epoch": 1,
            "refused": 1,
        })  # fmt: skip
        # Filled in when it ended; it counts if ``mark`` is the inverse of the lap.
        end_layout = data.StructLayout({"mark": 1, "status": BurstStatus})
        m.submodules.tickets = tickets = Ram(shape=ticket_layout, depth=depth, init=[])
        m.submodules.ends = ends = Ram(shape=end_layout, depth=depth, init=[])
        ends.attrs["ram_style"] = "block"
        ticket_write, end_write = tickets.write_port(), ends.write_port()
        issued, seen, retired, done = (Signal(pointer, name=name) for name in ("issued", "seen", "retired", "done"))

        sweep, swept = Signal(range(depth)), Signal()  # after reset nothing ended
        ended = self.ended.p
        mine = Signal()
        m.d.comb += mine.eq(self.ended.valid & (ended.client == self.client))
        with m.If(~swept):
            m.d.sync += [sweep.eq(sweep + 1), swept.eq(sweep == depth - 1)]
            m.d.comb += [end_write.en.eq(1), end_write.addr.eq(sweep)]
        with m.Elif(mine):
            m.d.comb += [
                end_write.en.eq(1),
                end_write.addr.eq(ended.index[: pointer - 1]),
                end_write.data.mark.eq(~ended.index[pointer - 1]),
                end_write.data.status.eq(ended.status),
            ]
        with m.Else():
            m.d.comb += [
                end_write.en.eq(front.refused),
                end_write.addr.eq(issued[:-1]),
                end_write.data.mark.eq(~issued[-1]),
                end_write.data.status.eq(front.status),
            ]

        # Issue.
        left = Signal(range(-self.region, 1), init=-self.region)  # free rows, as a number below 0
        put = Signal(range(self.region))
        burst = front.piece.burst
        offset = burst.address[:bytes_log2]
        need, room = Signal(count_shape), Signal()  # room: for a piece in any case, one that was issued meanwhile included
        m.d.sync += room.eq(swept & Cat((issued - over)[:pointer] < depth - 1 for over in (done, retired)).all())
        m.d.comb += [
            need.eq(rows_of(offset, burst.length_bytes)),
            front.space.eq(room & (Cat(offset[2:], left).as_signed() + front.piece.behind_dw < 0)),  # where its last dword lies
            front.refusable.eq(room & ~mine),
            self.request.row.eq(self.base | put),
            self.request.index.eq(issued),
            ticket_write.en.eq(self.granted | front.refused),
            ticket_write.addr.eq(issued[:-1]),
            ticket_write.data.offset.eq(offset),
            ticket_write.data.length_bytes.eq(burst.length_bytes),
            ticket_write.data.first.eq(front.piece.first),
            ticket_write.data.last.eq(front.piece.last | front.refused),
            ticket_write.data.cookie.eq(burst.cookie),
            ticket_write.data.function.eq(burst.function),
            ticket_write.data.epoch.eq(burst.epoch),
            ticket_write.data.refused.eq(front.refused),
        ]
        m.d.sync += [issued.eq(issued + ticket_write.en), seen.eq(issued)]
        with m.If(self.granted):
            m.d.sync += put.eq(put + need)

        # Retire: pieces in order as they end, however long the client leaves its data.
        r_ticket, r_end = tickets.read_port(), ends.read_port(transparent_for=(end_write,))
        r_over, r_step = Signal(), Signal()
        m.d.comb += [
            r_ticket.addr.eq(Mux(r_step, retired + 1, retired)[: pointer - 1]),
            r_end.addr.eq(r_ticket.addr),
            r_over.eq((retired != seen) & (r_end.data.mark != retired[-1])),
            self.retired.valid.eq(r_over & r_ticket.data.last),
            self.retired.p.function.eq(r_ticket.data.function),
            self.retired.p.epoch.eq(r_ticket.data.epoch),
            r_step.eq(r_over & (self.retired.ready | ~r_ticket.data.last)),
        ]
        m.d.sync += retired.eq(retired + r_step)

        # Deliver.
        m.submodules.streamer = streamer = RowStreamer(width=self.width, rows=self.buffer_rows, region=self.region)
        wiring.connect(m, streamer.o, wiring.flipped(self.rows))
        d_ticket, d_end = tickets.read_port(), ends.read_port(transparent_for=(end_write,))
        get = Signal(range(self.region))
        now = Signal()  # the piece at the head ends in this cycle
        skipping = Signal()  # the client has the status; the rest of the burst is dropped
        status = Signal(BurstStatus)
        have, step = Signal(), Signal()
        sent_rows = Signal(count_shape)
        span, t = streamer.i.p, d_ticket.data
        m.d.comb += [
            d_ticket.addr.eq(Mux(step, done + 1, done)[: pointer - 1]),
            d_end.addr.eq(d_ticket.addr),
            now.eq(mine & (ended.index[:pointer] == done)),
            have.eq(now | ((done != seen) & (d_end.data.mark != done[-1]))),
            status.eq(Mux(now, ended.status, d_end.data.status)),
            sent_rows.eq(Mux(t.refused, 0, rows_of(t.offset, t.length_bytes))),
            streamer.i.valid.eq(have & ~skipping),
            step.eq(have & (skipping | streamer.i.ready)),
            span.row.eq(self.base | get),
            span.offset.eq(t.offset),
            span.length_bytes.eq(t.length_bytes),
            span.first.eq(t.first),
            span.last.eq(t.last | (status != BurstStatus.OK)),
            span.cookie.eq(t.cookie),
            span.status.eq(status),
            span.function.eq(t.function),
        ]
        dropped = skipping | (status != BurstStatus.OK)
        row_read = self.rows.valid & self.rows.ready & (self.rows.p.status == BurstStatus.OK)
        with m.If(step):
            m.d.sync += [
                done.eq(done + 1),
                get.eq(get + sent_rows),
                skipping.eq(dropped & ~t.last),
            ]
        returned = Signal(count_shape)  # rows that are free again, two cycles later
        is_row, dropped_rows = Signal(), Signal(count_shape)
        m.d.sync += [is_row.eq(row_read), dropped_rows.eq(Mux(step & dropped, sent_rows, 0)), returned.eq(dropped_rows + is_row)]
        m.d.sync += left.eq(left - returned)
        with m.If(self.granted):  # who is granted decides behind the sums
            m.d.sync += left.eq(left - returned + need)
        return m


class UnorderedLine(wiring.Component):
    """Reads of a client that takes its answers in any order: each at most 64 bytes inside one naturally aligned block of 64.

    Answers leave in the order in which they became complete. Each burst is reported in ``retired`` once, when it ended.

    Parameters
    ----------
    slots : :class:`int`
        Reads in flight: a power of two of at least 2.
    base : :class:`int`
        First row of the slots, a multiple of all their rows.
    wall : :class:`bool`
        The wall's: no burst is reported in ``retired``.
    atomics : :class:`bool`
        Its reads may be AtomicOps; an AtomicOp waits for its operand.
    width, rows, index_bits, functions, client, reads, host_ats, has_pasid
        As in :class:`OrderedLine`.

    Members
    -------
    operands : ``In(stream.Signature(BurstData(width)))``
        Of its AtomicOps, in their order; there with ``atomics`` only.
    others
        As in :class:`OrderedLine`.
    """

    def __init__(self, *, width, rows, index_bits, functions, client, base, slots, reads, wall=False, atomics=False,
                 host_ats=False, has_pasid=False):  # fmt: skip
        self.width, self.buffer_rows, self.index_bits, self.functions = width, rows, index_bits, functions
        self.client, self.base, self.slots, self.reads, self.wall, self.atomics = client, base, slots, reads, wall, atomics
        self.host_ats, self.has_pasid = host_ats, has_pasid
        operands = {"operands": In(stream.Signature(BurstData(width)))} if atomics else {}
        super().__init__(_line_members(width, rows, index_bits, functions, host_ats, has_pasid) | operands)

    def elaborate(self, platform):
        m = Module()
        front = _make_front(m, self, cuts=False)
        bytes_log2 = (self.width // 8).bit_length() - 1
        slot_rows = SLOT_BYTES * 8 // self.width
        slot_shape = range(self.slots)

        # Slots: all are free after reset, later those that were given back.
        m.submodules.free = free = Queue(data.StructLayout({"slot": slot_shape}), self.slots)
        new, has_new = Signal(slot_shape), Signal(init=1)  # slots that were never taken, until all were
        slot, slot_valid, slot_taken = Signal(slot_shape), Signal(), Signal()
        with m.If(has_new):
            m.d.comb += [slot_valid.eq(1), slot.eq(new)]
            with m.If(slot_taken):
                m.d.sync += [new.eq(new + 1), has_new.eq(new != self.slots - 1)]
        with m.Else():
            m.d.comb += [slot_valid.eq(free.o.valid), slot.eq(free.o.p.slot), free.o.ready.eq(slot_taken)]

        # Issue.
        burst, ended = front.piece.burst, self.ended.p
        mine, complete = Signal(), Signal(init=1)  # what the burst needs of the client is there
        is_told = Signal(init=1)  # no refused burst waits to be answered
        if self.atomics:
            m.submodules.operands = operands = Operands(width=self.width)
            wiring.connect(m, wiring.flipped(self.operands), operands.i)
            is_atomic = burst.atomic != AtomicKind.NONE
            m.d.comb += [
                complete.eq(operands.o.valid | ~is_atomic),
                operands.o.ready.eq(slot_taken & is_atomic),
                self.request.operand.eq(operands.o.payload),
            ]
        ticket_layout = data.StructLayout({"offset": bytes_log2, "length_bytes": 7, "cookie": 12})
        m.submodules.tickets = tickets = Ram(shape=ticket_layout, depth=self.slots, init=[])
        ticket_write = tickets.write_port()
        ticket_read = tickets.read_port()
        m.d.comb += [
            mine.eq(self.ended.valid & (ended.client == self.client)),
            front.space.eq(slot_valid & complete),
            front.refusable.eq(slot_valid & complete & is_told),
            slot_taken.eq(self.granted | front.refused),
            self.request.row.eq(self.base | (slot * slot_rows)),
            self.request.index.eq(slot),
            ticket_write.en.eq(slot_taken),
            ticket_write.addr.eq(slot),
            ticket_write.data.offset.eq(burst.address[:bytes_log2]),
            ticket_write.data.length_bytes.eq(burst.length_bytes),
            ticket_write.data.cookie.eq(burst.cookie),
        ]

        # Retire, then deliver: the queues hold all slots, so an end never waits.
        answer_layout = data.StructLayout({"slot": slot_shape, "status": BurstStatus, "function": 3, "epoch": 1})
        m.submodules.arrived = arrived = Queue(answer_layout, self.slots, direct=True)
        turned = Signal(answer_layout)  # the answer of the burst that was refused last
        with m.If(is_told):
            m.d.sync += [
                turned.slot.eq(slot), turned.status.eq(front.status), turned.function.eq(burst.function), turned.epoch.eq(burst.epoch),
            ]
        m.d.sync += is_told.eq(Mux(is_told, ~front.refused, ~mine))
        m.d.comb += [arrived.i.valid.eq(mine | ~is_told), arrived.i.payload.eq(turned)]
        with m.If(mine):
            m.d.comb += [
                arrived.i.p.slot.eq(ended.index),
                arrived.i.p.status.eq(ended.status),
                arrived.i.p.function.eq(ended.function),
                arrived.i.p.epoch.eq(ended.epoch),
            ]
        answers = arrived.o
        if not self.wall:
            m.submodules.retiring = retiring = Queue(answer_layout, self.slots)
            m.d.comb += [
                self.retired.valid.eq(arrived.o.valid & retiring.i.ready),
                self.retired.p.function.eq(arrived.o.p.function),
                self.retired.p.epoch.eq(arrived.o.p.epoch),
                retiring.i.valid.eq(arrived.o.valid & self.retired.ready),
                retiring.i.payload.eq(arrived.o.payload),
                arrived.o.ready.eq(self.retired.ready & retiring.i.ready),
            ]
            answers = retiring.o

        m.submodules.streamer = streamer = RowStreamer(width=self.width, rows=self.buffer_rows, region=slot_rows)
        wiring.connect(m, streamer.o, wiring.flipped(self.rows))
        held, held_valid = Signal(answer_layout), Signal()
        move = Signal()
        span = streamer.i.p
        m.d.comb += [
            move.eq(answers.valid & (~held_valid | streamer.i.ready)),
            answers.ready.eq(~held_valid | streamer.i.ready),
            ticket_read.addr.eq(answers.p.slot),
            ticket_read.en.eq(move),
            streamer.i.valid.eq(held_valid),
            span.row.eq(self.base | (held.slot * slot_rows)),
            span.offset.eq(ticket_read.data.offset),
            span.length_bytes.eq(ticket_read.data.length_bytes),
            span.first.eq(1),
            span.last.eq(1),
            span.cookie.eq(ticket_read.data.cookie),
            span.status.eq(held.status),
            span.function.eq(held.function),
        ]
        with m.If(~held_valid | streamer.i.ready):
            m.d.sync += [held_valid.eq(answers.valid), held.eq(answers.payload)]

        # A slot is free again when its last row was read.
        slot_rows_log2 = slot_rows.bit_length() - 1
        m.d.comb += [
            free.i.valid.eq(self.rows.valid & self.rows.ready & self.rows.p.last),
            free.i.p.slot.eq(self.rows.p.row[slot_rows_log2:]),
        ]
        return m
