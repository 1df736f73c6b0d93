"""The receiving side of virtio-net behind the verdict: frames wait for buffers and go into them."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import virtio_net as spec
from ..stream.queue import Queue
from ..stream.transaction import TransactionQueue
from .header import HeaderJoiner
from .net_layouts import NetBeat, Verdict
from .ports import port_streams

FRAMES = 32  # that wait for buffers
LENGTH_BITS = 17  # of a buffer's length, as far as it matters


class ReceivePort(wiring.Component):
    """Serves a receive queue: keeps frames until there are buffers for them, and writes them with their headers. [VIRTIO1.4 5.1.9.4]

    Buffers are taken ahead, up to ``max_buffers``, and used in their order. A frame begins when enough of them are there: one, or with
    MRG_RXBUF as many as its header and bytes fill, so that ``num_buffers`` is known; the packet at ``writable`` lies over them
    (``flows``). A frame that does not fit into one buffer, or into ``max_buffers``, or that has some of its buffers and waits too long
    for the rest, is dropped, and the buffers are kept. A buffer that cannot hold a header comes back empty. What comes while the store
    is full is dropped; so is what is there while not ``enabled``.

    Latency: a frame is stored whole before it is written. Throughput: one beat per cycle, some cycles more per frame and per buffer.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    depth : :class:`int`
        Beats of the store: a power of two.
    max_buffers : :class:`int`
        Buffers of a frame: a power of two.
    patience : :class:`int`
        Cycles that a frame waits for the rest of its buffers.

    Members
    -------
    valid, beat, verdict : ``In(1)``, ``In(NetBeat(width))``, ``In(Verdict)``
        A beat of a frame comes; with the last one ``verdict.keep`` says whether the frame is for this queue.
    merges : ``In(1)``
        MRG_RXBUF was agreed on.
    enabled : ``In(1)``
        The queue is to be used.
    suspend, suspended : ``In(1)``, ``Out(1)``
        Begin no frame; none is begun.
    busy : ``Out(1)``
        A frame is being written.
    dropped : ``Out(2)``
        So many frames for this queue are lost in this cycle.
    Others
        See :func:`.ports.port_streams`.
    """

    def __init__(self, *, width, depth, max_buffers, patience=1 << 16):
        self.width, self.depth, self.max_buffers, self.patience = width, depth, max_buffers, patience
        super().__init__({
            **port_streams(width), "valid": In(1), "beat": In(NetBeat(width)), "verdict": In(Verdict), "merges": In(1), "enabled": In(1),
            "suspend": In(1), "suspended": Out(1), "busy": Out(1), "dropped": Out(2),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        m.submodules.rows = rows = TransactionQueue(self.width, self.depth)
        m.submodules.frames = frames = Queue(data.StructLayout({"length_bytes": 16, "is_valid": 1}), FRAMES)
        m.submodules.joiner = joiner = HeaderJoiner(width=self.width, header_bytes=spec.HEADER_BYTES)
        m.submodules.lengths = lengths = Memory(shape=LENGTH_BITS, depth=self.max_buffers, init=[])

        # Frames into the store. Of one that has begun when there is no room, or while the port was stopped, nothing is kept.
        lost, is_lost, ends, keep, lose = Signal(init=1), Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            is_lost.eq((lost & ~self.beat.first) | ~rows.i.ready | ~frames.i.ready),
            ends.eq(self.valid & self.beat.last),
            keep.eq(ends & self.verdict.keep & ~is_lost),
            lose.eq(ends & self.verdict.keep & is_lost),
            rows.i.valid.eq(self.valid & ~is_lost),
            rows.i.payload.eq(self.beat.data),
            rows.commit.eq(keep),
            rows.rollback.eq(ends & ~keep),
            frames.i.valid.eq(keep),
            frames.i.payload.length_bytes.eq(self.verdict.length_bytes),
            frames.i.payload.is_valid.eq(self.verdict.is_valid),
        ]
        with m.If(self.valid):
            m.d.sync += lost.eq(is_lost | self.beat.last)

        # Buffers: ``get`` to ``put`` are here, those in front of ``at`` are counted for the frame.
        put, get, at = (Signal(range(2 * self.max_buffers)) for _ in range(3))
        write, read = lengths.write_port(), lengths.read_port()
        room = self.chains.payload.writable_bytes
        m.d.comb += [
            self.readable.ready.eq(1),
            self.chains.ready.eq((put - get)[: len(put)] != self.max_buffers),
            write.addr.eq(put),
            write.data.eq(Mux(room[LENGTH_BITS:].any(), (1 << LENGTH_BITS) - 1, room)),
            write.en.eq(self.chains.valid & self.chains.ready),
            read.addr.eq(at),
        ]
        m.d.sync += put.eq(put + write.en)

        # The frame in front: counted out, then written or dropped.
        frame, left = frames.o.payload, Signal(16)
        need, so_far, total = Signal(LENGTH_BITS), Signal(LENGTH_BITS + 1), Signal(LENGTH_BITS + 1)
        is_final, is_empty, is_useful, give_empty = Signal(), Signal(), Signal(), Signal()  # the latter three: of the first buffer
        has_frame, lose_whole, waited = Signal(), Signal(), Signal(range(self.patience + 1))
        m.d.comb += [
            is_final.eq(left <= lanes),
            total.eq(so_far + read.data),
            joiner.header.payload.eq(frame.is_valid << spec.HDR_F_DATA_VALID | (at - get)[: len(put)] << 8 * spec.HDR_NUM_BUFFERS),
            joiner.i.payload.data.eq(rows.o.payload),
            joiner.i.payload.byte_count.eq(Mux(is_final, left, lanes)),
            joiner.i.payload.last.eq(is_final),
            joiner.o.ready.eq(self.writable.ready),
            self.writable.valid.eq(joiner.o.valid | give_empty),
            self.writable.payload.eq(joiner.o.payload),
        ]
        with m.If(give_empty):
            m.d.comb += [self.writable.payload.byte_count.eq(0), self.writable.payload.first.eq(1), self.writable.payload.last.eq(1)]
        with m.If(rows.o.valid & rows.o.ready):
            m.d.sync += left.eq(left - lanes)
        with m.FSM() as fsm:
            with m.State("LOOK"):
                m.d.sync += [
                    has_frame.eq(frames.o.valid), left.eq(frame.length_bytes), need.eq(frame.length_bytes + spec.HEADER_BYTES)]
                with m.If(at != get):
                    m.d.sync += waited.eq(waited + 1)
                with m.If(frames.o.valid & (~self.enabled | (waited == self.patience))):
                    m.next = "DROP"
                with m.Elif((at != put) & ~self.suspend & (frames.o.valid | ~is_useful)):
                    m.next = "COUNT"
            with m.State("COUNT"):
                m.next = "LOOK"
                m.d.sync += [is_empty.eq(read.data == 0), is_useful.eq(1), waited.eq(0)]
                with m.If((at == get) & (read.data < spec.HEADER_BYTES)):
                    m.d.sync += at.eq(at + 1)
                    m.next = "RETURN"
                with m.Elif(has_frame):
                    m.d.sync += [at.eq(at + 1), so_far.eq(total)]
                    with m.If(total >= need):
                        m.next = "GIVE_HEADER"
                    with m.Elif(~self.merges | ((at - get)[: len(put)] == self.max_buffers - 1)):
                        m.next = "DROP"
            with m.State("GIVE_HEADER"):
                m.d.comb += joiner.header.valid.eq(1)
                with m.If(joiner.header.ready):
                    m.next = "GIVE_ROWS"
            with m.State("GIVE_ROWS"):
                m.d.comb += [
                    joiner.i.valid.eq(rows.o.valid),
                    rows.o.ready.eq(joiner.i.ready),
                    frames.o.ready.eq(rows.o.valid & joiner.i.ready & is_final),
                ]
                with m.If(frames.o.ready):
                    m.d.sync += [get.eq(at), so_far.eq(0), is_useful.eq(0)]
                    m.next = "LOOK"
            with m.State("DROP"):
                m.d.comb += [rows.o.ready.eq(1), frames.o.ready.eq(rows.o.valid & is_final), lose_whole.eq(frames.o.ready)]
                with m.If(frames.o.ready):
                    m.d.sync += [at.eq(get), so_far.eq(0), waited.eq(0)]
                    m.next = "LOOK"
            with m.State("RETURN"):  # with ``flows`` a list without bytes takes no packet
                m.d.comb += give_empty.eq(~is_empty & ~joiner.o.valid)
                with m.If(is_empty | (give_empty & self.writable.ready)):
                    m.d.sync += [get.eq(at), is_useful.eq(0)]
                    m.next = "LOOK"
        m.d.comb += [
            self.busy.eq(~fsm.ongoing("LOOK") | joiner.o.valid),
            self.suspended.eq(self.suspend & ~self.busy),
            self.dropped.eq(lose + lose_whole),
        ]
        return m
