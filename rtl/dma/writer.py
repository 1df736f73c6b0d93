"""Scatter-gather writes: one packed packet per list in, write bursts out."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.queue import Queue
from ..stream.skid_buffer import SkidBuffer
from ..tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, Hint
from .layouts import ChainBeat, Segment, WriterDone
from .reader import WIDTHS, rotate_bytes
from .splitter import Piece, Splitter, check_max_burst, cut

AHEAD = 3  # pages that are hinted in front of the one being written: the time of a walk in the time of pages


@cache
def Row(width):
    """One row of burst data, with what is known of its burst; or, with ``is_end``, the end of a list and no row.

    ``more`` of the list's packet follows in the next list.
    """
    return data.StructLayout({
        "data": width, "keep": width // 8, "first": 1, "last": 1, "address": 64, "length_bytes": 13, "is_end": 1, "more": 1})


class Unpacker(wiring.Component):
    """Lays packed packets over lists of pieces: rows of write bursts, lanes as the addresses want them.

    Bytes beyond a list's pieces are dropped, or, with ``flows``, go on in the next list; a packet that ends early cuts its piece short and
    drops the pieces that remain. After the rows of a list comes one item with ``is_end``.

    Latency: 3 cycles. Throughput: one row per cycle, one cycle more per list.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.

    Members
    -------
    pieces : ``In(stream.Signature(Piece))``
        What the splitter made of the lists.
    i : ``In(stream.Signature(ChainBeat(width)))``
        One packet per list.
    o : ``Out(stream.Signature(Row(width)))``
        Rows; ``length_bytes`` counts the burst's bytes up to and with this row.
    flows : ``In(1)``
        A packet may lie over several lists. A list without bytes takes no packet then.
    clear : ``In(1)``
        While 1, everything held and offered is forgotten and inputs are taken and dropped.
    waiting : ``Out(1)``
        Nothing moves unless more input comes.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "pieces": In(stream.Signature(Piece)),
            "i": In(stream.Signature(ChainBeat(width))),
            "o": Out(stream.Signature(Row(width))),
            "flows": In(1),
            "clear": In(1),
            "waiting": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        lane_bits = (lanes - 1).bit_length()
        go = Signal()  # the three stages move
        beat = self.i.payload

        # The window: the beat at work from byte ``position`` on, and the one behind it, still at the input.
        low, low_left, low_last, low_valid = Signal(self.width), Signal(range(lanes + 1)), Signal(), Signal()  # left: from ``position`` on
        position = Signal(lane_bits)
        high_valid, complete = Signal(), Signal()
        high_count = Signal(range(lanes + 1))
        m.d.comb += [
            high_valid.eq(self.i.valid & low_valid & ~low_last),
            high_count.eq(Mux(high_valid, beat.byte_count, 0)),
            complete.eq(low_valid & (low_last | (high_valid & beat.last))),  # the packet's end is in the window
        ]

        # The piece at work, and how far the list is.
        piece_valid, piece_last = Signal(), Signal()
        burst_address, done_bytes = Signal(64), Signal(13)
        pieces_over, packet_over, in_packet = Signal(), Signal(), Signal()
        # The row at work: its first lane, the bytes that fit, those of the piece behind it. Less than fits is given only at a packet's end,
        # so the next row is known before.
        lane, want, behind, ends_piece = Signal(lane_bits), Signal(range(lanes + 1)), Signal(13), Signal()
        give, ends_packet = Signal(range(lanes + 1)), Signal()
        lack = Signal(signed(lane_bits + 2))  # bytes that the row wants of the second beat
        m.d.comb += [
            lack.eq(want - low_left),
            give.eq(Mux(high_count < lack, low_left + high_count, want)),
            ends_packet.eq(complete & (high_count <= lack)),
        ]
        # A row leaves when it is known whether it ends its burst: the piece ends, more bytes are here, or the packet ends.
        move, drop_beat, drop_piece, close = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            move.eq(low_valid & piece_valid & ~pieces_over & ~packet_over & (want != 0)
                    & (complete | (high_count > lack) | (ends_piece & (high_count == lack)))),
            drop_beat.eq(low_valid & pieces_over & ~packet_over & ~self.flows),
            drop_piece.eq(piece_valid & ~pieces_over & (packet_over | (want == 0))),
            close.eq(pieces_over & (packet_over | self.flows)),
        ]

        use_low, use_high, next_position = Signal(), Signal(), Signal(range(2 * lanes))
        m.d.comb += next_position.eq(position + want)
        with m.If(go & move):
            m.d.comb += [
                use_low.eq(ends_packet | (next_position >= lanes)),
                use_high.eq(ends_packet & high_valid),
            ]
        with m.Elif(go & drop_beat):
            m.d.comb += use_low.eq(1)
        with m.If(go & (move | drop_beat)):
            m.d.sync += [position.eq(Mux(drop_beat | ends_packet, 0, next_position)), low_left.eq(low_left - want)]
        m.d.comb += self.i.ready.eq(self.clear | ~low_valid | use_low)
        with m.If(use_low | ~low_valid):
            m.d.sync += [
                low.eq(beat.data),
                low_left.eq(beat.byte_count - Mux(move & ~ends_packet, next_position[:lane_bits], 0)),
                low_last.eq(beat.last),
                low_valid.eq(self.i.valid & ~use_high),
            ]

        def row_of(first, length_bytes):
            """Return assignments for the first row of ``length_bytes`` from lane ``first`` on."""
            fits, fitting, rest = cut(length_bytes, lanes - first)
            return [lane.eq(first), want.eq(fitting), ends_piece.eq(fits), behind.eq(rest)]

        next_piece, piece = Signal(), self.pieces.payload
        with m.If(go & move):
            m.d.sync += [*row_of(0, behind), done_bytes.eq(done_bytes + give)]
            m.d.comb += next_piece.eq(ends_piece | ends_packet)
            m.d.sync += [packet_over.eq(ends_packet), in_packet.eq(~ends_packet)]
        with m.Elif(go & drop_piece):
            m.d.comb += next_piece.eq(1)
        with m.If(go & drop_beat & low_last):
            m.d.sync += packet_over.eq(1)
        with m.If(next_piece & piece_last):
            m.d.sync += pieces_over.eq(1)
        with m.If(go & close):
            m.d.sync += [pieces_over.eq(0), packet_over.eq(0)]
        m.d.comb += self.pieces.ready.eq(self.clear | ~piece_valid | next_piece)
        with m.If(~piece_valid | next_piece):
            m.d.sync += [
                piece_valid.eq(self.pieces.valid),
                *row_of(piece.address[:lane_bits], piece.length_bytes),
                burst_address.eq(piece.address),
                piece_last.eq(piece.last),
                done_bytes.eq(0),
            ]

        # Choose low or high per lane, then rotate.
        chosen = Signal(data.StructLayout({
            "valid": 1, "row": Row(self.width), "turn": lane_bits, "lane": lane_bits, "count": range(lanes + 1)}))
        ones = Signal(lanes)
        m.d.comb += [go.eq(~self.o.valid | self.o.ready), ones.eq((1 << chosen.count) - 1)]
        with m.If(go):
            m.d.sync += [
                chosen.valid.eq((move & (give != 0)) | close),
                chosen.row.data.eq(Cat(*[
                    Mux(position <= x, low.word_select(x, 8), beat.data.word_select(x, 8)) for x in range(lanes)
                ])),
                chosen.row.first.eq(done_bytes == 0),
                chosen.row.last.eq(ends_piece | ends_packet),
                chosen.row.address.eq(burst_address),
                chosen.row.length_bytes.eq(done_bytes + give),
                chosen.row.is_end.eq(close),
                chosen.row.more.eq(in_packet & self.flows),
                chosen.turn.eq(lane - position),
                chosen.lane.eq(lane),
                chosen.count.eq(give),
                self.o.valid.eq(chosen.valid),
                self.o.payload.eq(chosen.row),
                self.o.payload.data.eq(rotate_bytes(chosen.row.data, chosen.turn, self.width)),
                self.o.payload.keep.eq(ones << chosen.lane),
            ]
        with m.If(self.clear):
            m.d.sync += [
                low_valid.eq(0), position.eq(0), piece_valid.eq(0), pieces_over.eq(0), packet_over.eq(0), in_packet.eq(0),
                chosen.valid.eq(0), self.o.valid.eq(0),
            ]
        m.d.comb += self.waiting.eq(
            ~move & ~drop_beat & ~drop_piece & ~close & ~chosen.valid & ~self.o.valid & ~self.i.valid
            & ~(self.pieces.valid & ~piece_valid))
        return m


class Writer(wiring.Component):
    """Scatters packed packets over lists of segments, as write bursts that are issued only when their data is complete.

    List n takes packet n. Bytes beyond the list are dropped; a short packet leaves the rest of its list unwritten. One
    ``done`` per list, after all its bursts are answered: the bytes written before the first failure, and the status of the first
    failure that its packet did not tell of.
    With ``flows`` a packet that is longer than its list goes on in the next, and ``done`` says so; a list without bytes takes no packet.
    [PCIe5 2.2.7]

    Latency: 6 cycles from the last byte of a burst to the burst. Throughput: one row per cycle at any alignment, one cycle more
    per list.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    function, client : :class:`int`
        Identify the bursts at gate and requester.
    max_burst : :class:`int`
        Bytes of one burst: a power of two, 64 to 4096.
    buffer_bytes : :class:`int`
        Data on hold: at least twice ``max_burst``.
    max_in_flight : :class:`int`
        Bursts that are not answered yet.

    Members
    -------
    segments : ``In(stream.Signature(Segment))``
        Scatter lists.
    i : ``In(stream.Signature(ChainBeat(width)))``
        One packet per list. A ``status`` other than OK in its last beat, given while ``settled``: the packet tells of what has failed.
        With ``flows`` its last beat is not empty, unless the whole packet is.
    flows : ``In(1)``
        Constant: packets may lie over several lists.
    bursts : ``Out(stream.Signature(Burst))``
        Writes.
    write_data : ``Out(stream.Signature(BurstData(width)))``
        Their data, in burst order, without waiting.
    write_done : ``In(stream.Signature(BurstDone))``
        Their ends, in burst order.
    done : ``Out(stream.Signature(WriterDone))``
        One per list.
    hints : ``Out(stream.Signature(Hint))``
        Pages of the segment at work, up to three in front of the one being written; those not taken in time are forgotten.
    failed : ``Out(1)``
        A burst of the list at work has failed.
    settled : ``Out(1)``
        Every burst that can be made of the bytes taken so far has been answered, and every list before has ended: ``failed`` is of
        the list that these bytes are for.
    passed : ``In(1)``
        Pulse for each burst that the gate lets pass, in front of its answer; constant 0 if nobody tells.
    assured : ``Out(1)``
        As ``settled``, but what has passed counts as answered: it can then fail only when its function stops or may not send any more
        (Bus Master), and ``done`` says so.
    stop, stopped : ``In(1)``, ``Out(1)``
        See "Stop" in rtl/README.md.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, function, client, max_burst=512, buffer_bytes=4096, max_in_flight=32):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        if not 0 <= function < 256:
            raise ValueError(f"Function must be between 0 and 255, not {function!r}")
        if not 0 <= client < 64:
            raise ValueError(f"Client must be between 0 and 63, not {client!r}")
        check_max_burst(max_burst)
        if buffer_bytes < 2 * max_burst:
            raise ValueError(f"Buffer must hold two bursts of {max_burst} bytes, not {buffer_bytes!r} bytes")
        self.width, self.function, self.client = width, function, client
        self.max_burst, self.buffer_bytes, self.max_in_flight = max_burst, buffer_bytes, max_in_flight
        super().__init__({
            "segments": In(stream.Signature(Segment)),
            "i": In(stream.Signature(ChainBeat(width))),
            "flows": In(1),
            "bursts": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(BurstData(width))),
            "write_done": In(stream.Signature(BurstDone)),
            "done": Out(stream.Signature(WriterDone)),
            "hints": Out(stream.Signature(Hint)),
            "failed": Out(1),
            "settled": Out(1),
            "passed": In(1),
            "assured": Out(1),
            "stop": In(1),
            "stopped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        head = data.StructLayout({"address": 64, "length_bytes": 13})
        m.submodules.splitter = splitter = Splitter(max_burst=self.max_burst)
        m.submodules.unpacker = unpacker = Unpacker(width=self.width)
        m.submodules.rows = rows = Queue(BurstData(self.width), self.buffer_bytes // (self.width // 8))
        m.submodules.issue = issue = Queue(head, self.max_in_flight)
        m.submodules.pending = pending = Queue(
            data.StructLayout({"length_bytes": 13, "is_end": 1, "more": 1}), self.max_in_flight)
        wiring.connect(m, wiring.flipped(self.segments), splitter.i)
        wiring.connect(m, splitter.o, unpacker.pieces)
        m.submodules.skid = skid = SkidBuffer(ChainBeat(self.width))  # whoever fills ``i`` has no path from what the unpacker takes
        wiring.connect(m, wiring.flipped(self.i), skid.i)
        wiring.connect(m, skid.o, unpacker.i)
        m.d.comb += [splitter.stop.eq(self.stop), unpacker.flows.eq(self.flows), unpacker.clear.eq(self.stop)]
        self._hint(m, splitter.o)

        # Rows into the buffer; the burst behind its last row.
        row, ends_burst, push = unpacker.o.payload, Signal(), Signal()
        m.d.comb += [
            ends_burst.eq(row.last & ~row.is_end),
            unpacker.o.ready.eq(rows.i.ready & issue.i.ready & pending.i.ready),
            push.eq(unpacker.o.valid & unpacker.o.ready & ~self.stop),
            rows.i.valid.eq(push & ~row.is_end),
            rows.i.payload.data.eq(row.data),
            rows.i.payload.keep.eq(row.keep),
            rows.i.payload.first.eq(row.first),
            rows.i.payload.last.eq(row.last),
            issue.i.valid.eq(push & ends_burst),
            issue.i.payload.address.eq(row.address),
            issue.i.payload.length_bytes.eq(row.length_bytes),
            pending.i.valid.eq(push & (ends_burst | row.is_end)),
            pending.i.payload.length_bytes.eq(row.length_bytes),
            pending.i.payload.is_end.eq(row.is_end),
            pending.i.payload.more.eq(row.more),
        ]

        # Bursts and data out. While stopping, rows that belong to no issued burst are thrown away at the end.
        flush = Signal()
        stop_age = Signal(2)  # the queues show what was put into them after 2 cycles
        m.d.sync += stop_age.eq(Mux(self.stop, Mux(stop_age == 3, 3, stop_age + 1), 0))
        m.d.comb += [
            flush.eq((stop_age == 3) & ~pending.o.valid),
            self.bursts.valid.eq(issue.o.valid),
            self.bursts.payload.address.eq(issue.o.payload.address),
            self.bursts.payload.length_bytes.eq(issue.o.payload.length_bytes),
            self.bursts.payload.is_write.eq(1),
            self.bursts.payload.function.eq(self.function),
            self.bursts.payload.client.eq(self.client),
            issue.o.ready.eq(self.bursts.ready),
            self.write_data.valid.eq(rows.o.valid & ~flush),
            self.write_data.payload.eq(rows.o.payload),
            rows.o.ready.eq(self.write_data.ready | flush),
        ]

        # Ends: bursts in order, then the end of their list. Those of bursts are taken whatever becomes of ``done``: it may wait for
        # writes of other clients, which stand behind them.
        m.submodules.answers = answers = Queue(BurstStatus, self.max_in_flight, direct=True)
        m.d.comb += [
            answers.i.valid.eq(self.write_done.valid), answers.i.payload.eq(self.write_done.payload.status), self.write_done.ready.eq(1),
        ]  # fmt: skip
        unended = Signal(range(self.max_in_flight + 1))  # bursts and lists
        m.d.sync += unended.eq(unended + pending.i.valid - (pending.o.valid & pending.o.ready))
        written, status = Signal(32), Signal(BurstStatus)
        at_end = Signal()
        m.d.comb += [
            at_end.eq(pending.o.valid & pending.o.payload.is_end),
            answers.o.ready.eq(pending.o.valid & ~pending.o.payload.is_end),
            self.done.valid.eq(at_end & ~self.stop),
            self.done.payload.length_bytes.eq(written),
            self.done.payload.status.eq(status),
            self.done.payload.more.eq(pending.o.payload.more),
            pending.o.ready.eq(Mux(at_end, self.done.ready | self.stop, answers.o.valid)),
        ]
        with m.If(answers.o.valid & answers.o.ready):
            with m.If(answers.o.payload != BurstStatus.OK):
                m.d.sync += self.failed.eq(1)
            with m.Elif(~self.failed):
                m.d.sync += written.eq(written + pending.o.payload.length_bytes)
            with m.If(status == BurstStatus.OK):
                m.d.sync += status.eq(answers.o.payload)
        # Lists that have not ended, bursts that may still be refused.
        lists, unsure = Signal(range(self.max_in_flight + 1)), Signal(range(self.max_in_flight + 1))
        m.d.sync += lists.eq(lists + (pending.i.valid & row.is_end) - (at_end & pending.o.ready))
        m.d.sync += unsure.eq(Mux(unended == 0, 0, unsure - (self.passed & (unsure != 0))) + issue.i.valid)
        with m.If(self.i.valid & self.i.ready & self.i.payload.last & (self.i.payload.status != BurstStatus.OK)):
            m.d.sync += status.eq(BurstStatus.OK)
        with m.If((at_end & pending.o.ready) | self.stopped):
            m.d.sync += [written.eq(0), status.eq(BurstStatus.OK), self.failed.eq(0)]
        waits = Signal()
        m.d.comb += [
            waits.eq(unpacker.waiting & ~push & ~(splitter.i.valid & splitter.i.ready)),
            self.settled.eq(waits & (unended == 0)),
            self.assured.eq(waits & ((unended == 0) | ((lists == 0) & (unsure == 0) & ~self.failed))),
            self.stopped.eq(
                self.stop & (stop_age == 3) & ~pending.o.valid & ~issue.o.valid & ~rows.o.valid & ~splitter.o.valid & ~self.segments.valid
                & ~self.i.valid & ~unpacker.i.valid),
        ]
        return m

    def _hint(self, m, pieces):
        """Keep the hints ``AHEAD`` pages in front of ``pieces``."""
        segment, begins, end = self.segments.payload, Signal(), Signal(33)
        latest, following = Signal(52), Signal(52)  # page that was told of, or the segment's first; the one behind it
        more, is_over = Signal(21), Signal()  # pages behind the latest; one of them is not, as the segment ends in front of it
        due, in_first, turns_page = Signal(range(AHEAD + 2)), Signal(), Signal()
        wants, free = Signal(), ~self.hints.valid | self.hints.ready
        m.d.comb += [
            begins.eq(self.segments.valid & self.segments.ready & (segment.length_bytes != 0)),
            end.eq(segment.address[:12] + segment.length_bytes),
            following.eq(latest + 1),
            turns_page.eq(pieces.valid & pieces.ready & (pieces.p.address[:12] == 0) & ~in_first & (due <= AHEAD)),
            wants.eq((due != 0) & (more[1:].any() | (more[0] & ~is_over))),
            self.hints.payload.is_write.eq(1), self.hints.payload.function.eq(self.function),
        ]
        tells = wants & free
        with m.If(free):
            m.d.sync += [self.hints.valid.eq(wants), self.hints.payload.page.eq(following)]
        with m.If(begins):
            m.d.sync += [
                latest.eq(segment.address[12:]), more.eq(end[12:]), is_over.eq(end[:12] == 0), due.eq(AHEAD), in_first.eq(1),
            ]  # fmt: skip
        with m.Else():
            m.d.sync += [more.eq(more - (tells + is_over)), is_over.eq(0), due.eq(due - tells + turns_page)]
            with m.If(tells):
                m.d.sync += latest.eq(following)
            with m.If(pieces.valid & pieces.ready):
                m.d.sync += in_first.eq(0)
        with m.If(self.stop):
            m.d.sync += due.eq(0)
