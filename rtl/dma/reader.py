"""Scatter-gather reads: lists of segments in, one packed packet per list out."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.queue import Queue
from ..tlp.layouts import Burst, BurstData, BurstStatus
from .layouts import ChainBeat, Segment
from .splitter import DirectSplitter, check_max_burst

WIDTHS = (64, 128, 256, 512)


def rotate_bytes(value, amount, width):
    """``value`` rotated towards higher lanes by ``amount`` bytes (a log shifter: one mux level per bit of ``amount``)."""
    for bit in range(len(amount)):
        shift = (8 << bit) % width
        value = Mux(amount[bit], Cat(value[width - shift :], value[: width - shift]), value) if shift else value
    return value


class Packer(wiring.Component):
    """Packs lane-aligned burst data into a gapless byte stream.

    Items of ``pieces`` say, in order, what each burst of ``i`` is: the last of its list or not, or no burst at all (an empty
    end of a list). The bytes of one list leave as one packet, byte 0 in bits 7:0, every beat but the last full. After a
    burst that failed, the list's other bursts are taken and dropped; behind the last of them the packet ends in one beat with
    the status of the first that failed.

    Latency: 3 cycles. Throughput: one beat per cycle; a list that ends in a partial beat may cost one more.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    depth : :class:`int`
        Bursts that may be in flight.
    """

    def __init__(self, *, width, depth=64):
        self.width, self.depth = width, depth
        super().__init__({
            "pieces": In(stream.Signature(data.StructLayout({"empty": 1, "last": 1}))),
            "i": In(stream.Signature(BurstData(width))),
            "o": Out(stream.Signature(ChainBeat(width))),
            "clear": In(1),
            "idle": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        m.submodules.pieces = pieces = Queue(self.pieces.payload.shape(), self.depth)
        wiring.connect(m, wiring.flipped(self.pieces), pieces.i)
        piece = pieces.o.payload

        # Stage 1: which lanes count. keep is contiguous, so its two edges say everything.
        go = Signal()  # the pipeline moves
        taken = Signal()
        keep = self.i.payload.keep
        starts = keep & ~(keep << 1)[:lanes]
        start, count = Signal(range(lanes)), Signal(range(lanes + 1))
        m.d.comb += start.eq(Cat(*[
            (starts & sum(1 << lane for lane in range(lanes) if lane >> bit & 1)).any()
            for bit in range(lanes.bit_length() - 1)
        ]))
        ones = [keep[lane] for lane in range(lanes)]
        while len(ones) > 1:
            ones = [a + b for a, b in zip(ones[::2], ones[1::2])]
        m.d.comb += count.eq(ones[0])
        m.d.comb += [
            taken.eq(pieces.o.valid & (piece.empty | self.i.valid) & go),
            self.i.ready.eq(pieces.o.valid & ~piece.empty & go),
            pieces.o.ready.eq(taken & (piece.empty | self.i.payload.last)),
        ]
        s1 = Signal(data.StructLayout({
            "valid": 1, "data": self.width, "start": range(lanes), "count": range(lanes + 1), "first": 1, "end": 1, "last": 1,
            "status": BurstStatus}))
        with m.If(go):
            m.d.sync += [
                s1.valid.eq(taken),
                s1.data.eq(self.i.payload.data),
                s1.start.eq(start),
                s1.count.eq(Mux(piece.empty, 0, count)),
                s1.first.eq(self.i.payload.first & ~piece.empty),
                s1.end.eq(piece.empty | self.i.payload.last),  # the burst ends
                s1.last.eq(piece.last & (piece.empty | self.i.payload.last)),  # the list ends
                s1.status.eq(Mux(piece.empty | ~self.i.payload.last, BurstStatus.OK, self.i.payload.status)),
            ]

        # Stage 2: where in the output beat it lands; the rotation is the same for all beats of a burst.
        position = Signal(range(lanes))  # bytes of the packet so far, modulo a beat
        dropping, failure = Signal(), Signal(BurstStatus)  # the list has failed so: its other bursts are dropped
        turn, turn_held = Signal(range(lanes)), Signal(range(lanes))
        m.d.comb += turn.eq(Mux(s1.first, position - s1.start, turn_held))
        failed = Signal()
        m.d.comb += failed.eq(s1.end & (s1.status != BurstStatus.OK))
        s2 = Signal(data.StructLayout({
            "valid": 1, "data": self.width, "fill": range(lanes), "count": range(lanes + 1), "last": 1, "status": BurstStatus}))
        with m.If(go):
            m.d.sync += [
                s2.valid.eq(s1.valid & (s1.last | ~(dropping | failed))),
                s2.data.eq(rotate_bytes(s1.data, turn, self.width)),
                s2.fill.eq(position),
                s2.count.eq(Mux(dropping | failed, 0, s1.count)),
                s2.last.eq(s1.last),
                s2.status.eq(Mux(dropping, failure, s1.status)),
            ]
            with m.If(s1.valid):
                m.d.sync += turn_held.eq(turn)
                with m.If(s1.last):
                    m.d.sync += [position.eq(0), dropping.eq(0)]
                with m.Elif(failed & ~dropping):
                    m.d.sync += [failure.eq(s1.status), dropping.eq(1)]
                with m.Elif(~dropping):
                    m.d.sync += position.eq(position + s1.count)

        # Stage 3: merge with what is held; a packet that ends beyond the beat leaves a second one.
        hold, total, first = Signal(self.width), Signal(range(2 * lanes + 1)), Signal(init=1)
        tail, tail_count = Signal(), Signal(range(lanes))
        merged = Cat(*[
            Mux(tail | (s2.fill > lane), hold.word_select(lane, 8), s2.data.word_select(lane, 8)) for lane in range(lanes)
        ])
        emit, out = Signal(), Signal(ChainBeat(self.width))
        m.d.comb += [
            total.eq(s2.fill + s2.count),
            emit.eq(s2.valid & (s2.last | (total >= lanes))),
            out.data.eq(merged),
            out.byte_count.eq(Mux(total >= lanes, lanes, total)),
            out.first.eq(first),
            out.last.eq(s2.last & (total <= lanes)),
            out.status.eq(s2.status),
        ]
        free = Signal()
        m.d.comb += [free.eq(~self.o.valid | self.o.ready), go.eq(free & ~tail)]
        with m.If(free):
            m.d.sync += self.o.valid.eq(emit & ~tail)
            m.d.sync += self.o.payload.eq(out)
            with m.If(tail):
                m.d.sync += [
                    tail.eq(0),
                    self.o.valid.eq(1),
                    self.o.payload.byte_count.eq(tail_count),
                    self.o.payload.first.eq(0),
                    self.o.payload.last.eq(1),
                    self.o.payload.status.eq(BurstStatus.OK),
                ]
            with m.Elif(s2.valid):
                for lane in range(lanes):
                    with m.If((total >= lanes) | (s2.fill <= lane)):
                        m.d.sync += hold.word_select(lane, 8).eq(s2.data.word_select(lane, 8))
                with m.If(s2.last & (total > lanes)):
                    m.d.sync += [tail.eq(1), tail_count.eq(total - lanes)]
                with m.If(emit):
                    m.d.sync += first.eq(s2.last)
        with m.If(self.clear):
            m.d.sync += [position.eq(0), dropping.eq(0), first.eq(1), hold.eq(0)]
        m.d.comb += self.idle.eq(~pieces.o.valid & ~s1.valid & ~s2.valid & ~tail & ~self.o.valid)
        return m


class Reader(wiring.Component):
    """Fetches scatter lists from behind the gate and hands each on as one packed packet.

    Requests run ahead of the data without limit but ``max_in_flight`` and the requester's buffer, over list ends too.
    After an error (fault, UR, CA, poison, timeout) a list's packet ends in exactly one ``last`` beat with that status, the
    list's other bytes are dropped, and the next list is served. No read of a list comes behind the end of its packet.
    A list without bytes gives one empty beat with ``last``. [PCIe5 2.2.7]

    Latency: none from segment to burst, 3 cycles from burst data to ``o``. Throughput: one beat per cycle at any alignment, one
    bubble per list.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    function, client : :class:`int`
        Identify the bursts at gate and requester.
    max_burst : :class:`int`
        Bytes of one burst: a power of two, 64 to 4096.
    max_in_flight : :class:`int`
        Bursts in flight.

    Members
    -------
    segments : ``In(stream.Signature(Segment))``
        Scatter lists.
    bursts : ``Out(stream.Signature(Burst))``
        Reads.
    read_data : ``In(stream.Signature(BurstData(width)))``
        Their data, in burst order.
    o : ``Out(stream.Signature(ChainBeat(width)))``
        One packet per list.
    stop, stopped : ``In(1)``, ``Out(1)``
        See "Stop" in rtl/README.md. Whoever takes ``o`` must go on taking while stopping.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, function, client, max_burst=4096, max_in_flight=64):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        if not 0 <= function < 256:
            raise ValueError(f"Function must be between 0 and 255, not {function!r}")
        if not 0 <= client < 64:
            raise ValueError(f"Client must be between 0 and 63, not {client!r}")
        self.width, self.function, self.client = width, function, client
        self.max_burst, self.max_in_flight = check_max_burst(max_burst), max_in_flight
        super().__init__({
            "segments": In(stream.Signature(Segment)),
            "bursts": Out(stream.Signature(Burst)),
            "read_data": In(stream.Signature(BurstData(width))),
            "o": Out(stream.Signature(ChainBeat(width))),
            "stop": In(1),
            "stopped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.splitter = splitter = DirectSplitter(max_burst=self.max_burst)
        m.submodules.packer = packer = Packer(width=self.width, depth=self.max_in_flight)
        wiring.connect(m, wiring.flipped(self.segments), splitter.i)
        wiring.connect(m, wiring.flipped(self.read_data), packer.i)
        wiring.connect(m, packer.o, wiring.flipped(self.o))

        # A piece becomes a burst and a note to the packer in one step.
        piece, goes, empty = splitter.o.payload, Signal(), Signal()
        m.d.comb += [
            empty.eq(piece.length_bytes == 0),
            goes.eq(empty | self.bursts.ready),
            splitter.o.ready.eq(goes & packer.pieces.ready),
            packer.pieces.valid.eq(goes & splitter.o.valid),
            packer.pieces.payload.empty.eq(empty),
            packer.pieces.payload.last.eq(piece.last),
            splitter.stop.eq(self.stop),
            self.bursts.valid.eq(splitter.o.valid & packer.pieces.ready & ~empty),
            self.bursts.payload.address.eq(piece.address),
            self.bursts.payload.length_bytes.eq(piece.length_bytes),
            self.bursts.payload.function.eq(self.function),
            self.bursts.payload.client.eq(self.client),
        ]
        stop_age = Signal(2)  # the packer shows what it was told after 2 cycles
        m.d.sync += stop_age.eq(Mux(self.stop & ~splitter.o.valid, Mux(stop_age == 3, 3, stop_age + 1), 0))
        m.d.comb += [
            self.stopped.eq(self.stop & (stop_age == 3) & packer.idle & ~splitter.o.valid & ~self.segments.valid),
            packer.clear.eq(self.stopped),
        ]
        return m
