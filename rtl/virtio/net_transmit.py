"""The transmitting side of virtio-net: buffers of the driver become frames."""

from amaranth import Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import virtio_net as spec
from ..stream.queue import Queue
from ..stream.transaction import TransactionQueue
from ..tlp.layouts import BurstStatus
from .header import HeaderSplitter
from .net_checksum import Checksum
from .net_layouts import NetBeat
from .ports import port_streams

FRAME_MIN = 14  # destination, source, type
PATCHES = 16  # frames that wait to leave


def Row(width):
    """A beat of a stored frame."""
    return data.StructLayout({"data": width, "byte_count": range(width // 8 + 1), "last": 1})


class Patch(data.Struct):
    """What a stored frame still lacks: with ``valid`` its checksum, most significant byte at ``place``."""

    valid: 1
    place: 16
    value: 16


class TransmitPort(wiring.Component):
    """Serves a transmit queue: checks each buffer and hands its frame to a :class:`TransmitStore`. [VIRTIO1.4 5.1.9.2]

    A buffer is used when its frame is in the store, or dropped: one without a whole header, that could not be fetched, with a
    segmentation type, with a checksum that does not lie in the frame, or with a frame shorter than 14 bytes or longer than ``max_frame``.

    Latency: 2 to 3 cycles from a beat to ``rows``. Throughput: one beat per cycle; up to 8 cycles per frame besides, 13 with a checksum.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    max_frame : :class:`int`
        Bytes of the longest frame.
    checksums : :class:`bool`
        Fill in checksums.

    Members
    -------
    has_csum : ``In(1)``
        CSUM was agreed on.
    rows : ``Out(stream.Signature(Row(width)))``
        Beats of frames.
    patches : ``Out(stream.Signature(Patch))``
        The frame whose last beat went before is to be sent, so; taken in the cycle of its valid or a later one.
    dropped : ``Out(1)``
        Pulse: it is not.
    Others
        See :func:`.ports.port_streams`.
    """

    def __init__(self, *, width, max_frame, checksums):
        self.width, self.max_frame, self.checksums = width, max_frame, checksums
        super().__init__({
            **port_streams(width), "has_csum": In(1), "rows": Out(stream.Signature(Row(width))), "patches": Out(stream.Signature(Patch)),
            "dropped": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        lane_bits = lanes.bit_length() - 1
        m.submodules.header = header = HeaderSplitter(width=self.width, header_bytes=spec.HEADER_BYTES)
        wiring.connect(m, wiring.flipped(self.readable), header.i)
        front, beat = header.header.payload, header.o.payload
        good, fine, needs, summed = Signal(), Signal(), Signal(), Signal()
        start, place, length, row = Signal(16), Signal(17), Signal(17), Signal(17 - lane_bits)
        take, is_over, patch = Signal(), Signal(), self.patches.payload
        m.d.comb += [
            is_over.eq(length > self.max_frame),
            self.rows.payload.data.eq(beat.data),
            self.rows.payload.byte_count.eq(beat.byte_count),
            self.rows.payload.last.eq(beat.last),
            self.writable.payload.first.eq(1),
            self.writable.payload.last.eq(1),
            patch.valid.eq(needs),
            patch.place.eq(place),
        ]
        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += self.chains.ready.eq(1)
                m.d.sync += [length.eq(0), row.eq(0), summed.eq(0)]
                with m.If(self.chains.valid):
                    m.next = "TAKE_HEADER"
                    with m.If(self.chains.payload.readable_bytes == 0):
                        m.next = "DROP"
            with m.State("TAKE_HEADER"):
                m.d.comb += header.header.ready.eq(1)
                flags, kind = front.data[:8], front.data[8:16]
                m.d.sync += [
                    good.eq(front.complete & (kind == spec.GSO_NONE)),
                    needs.eq(flags[spec.HDR_F_NEEDS_CSUM] & self.has_csum if self.checksums else 0),
                    start.eq(front.data[48:64]),
                    place.eq(front.data[48:64] + front.data[64:80]),
                ]
                with m.If(header.header.valid):
                    m.next = "STORE"
            with m.State("STORE"):
                m.d.comb += [
                    self.rows.valid.eq(header.o.valid & ~is_over),
                    header.o.ready.eq(self.rows.ready | is_over),
                    take.eq(header.o.valid & header.o.ready),
                ]
                with m.If(take):
                    with m.If(~is_over):
                        m.d.sync += [length.eq(length + beat.byte_count), row.eq(row + 1)]
                    with m.If(beat.last):
                        m.d.sync += good.eq(good & (beat.status == BurstStatus.OK))
                        m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += fine.eq(
                    good & (length >= FRAME_MIN) & (length <= self.max_frame) & (~needs | (place + 2 <= length)))
                with m.If(~needs | summed):
                    m.next = "KEEP"
            with m.State("KEEP"):
                m.d.comb += self.patches.valid.eq(fine)
                with m.If(~fine):
                    m.next = "DROP"
                with m.Elif(self.patches.ready):
                    m.next = "END_CHAIN"
            with m.State("DROP"):
                m.d.comb += self.dropped.eq(1)
                m.next = "END_CHAIN"
            with m.State("END_CHAIN"):
                m.d.comb += self.writable.valid.eq(1)
                with m.If(self.writable.ready):
                    m.next = "TAKE_CHAIN"

        if self.checksums:
            m.submodules.checksum = checksum = Checksum(width=self.width)
            start_row, start_lane = start[lane_bits:], start[:lane_bits]
            total, summand, whole = Signal(16), Signal(lanes), Const(-1, lanes)  # ``summand``: bytes from ``start`` on
            m.d.comb += [
                checksum.valid.eq(take & needs),
                checksum.beat.data.eq(beat.data),
                summand.eq(Mux(row == start_row, whole << start_lane, Mux(row > start_row, whole, 0))),
                checksum.beat.keep.eq(summand & ((1 << beat.byte_count) - 1)),
                checksum.beat.first.eq(length == 0),
                checksum.beat.last.eq(beat.last),
                # Words count from ``start``: from an odd one their bytes change places. [RFC1071]
                total.eq(~Mux(start[0], checksum.sum.rotate_left(8), checksum.sum)),
            ]
            with m.If(checksum.done):
                m.d.sync += [summed.eq(1), patch.value.eq(Mux(total == 0, 0xFFFF, total))]  # 0 would say "none" [RFC768]
        return m


class TransmitStore(wiring.Component):
    """Frames of a :class:`TransmitPort` on their way out: each begins to leave when it is whole, and leaves whole.

    Latency: 3 cycles. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    depth : :class:`int`
        Beats that fit: a power of two.

    Members
    -------
    rows, patches, dropped
        Of the port.
    restart : ``In(1)``
        The port is in reset: what is there of its next frame is forgotten.
    o : ``Out(stream.Signature(NetBeat(width)))``
        Frames.
    """

    def __init__(self, *, width, depth):
        self.width, self.depth = width, depth
        super().__init__({
            "rows": In(stream.Signature(Row(width))), "patches": In(stream.Signature(Patch)), "dropped": In(1), "restart": In(1),
            "o": Out(stream.Signature(NetBeat(width))),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        lane_bits = lanes.bit_length() - 1
        m.submodules.store = store = TransactionQueue(Row(self.width), self.depth)
        m.submodules.patches = patches = Queue(Patch, PATCHES)
        wiring.connect(m, wiring.flipped(self.rows), store.i)
        kept = self.patches.valid & self.patches.ready
        m.d.comb += [
            self.patches.ready.eq(patches.i.ready & ~self.restart),
            patches.i.valid.eq(kept),
            patches.i.payload.eq(self.patches.payload),
            store.commit.eq(kept),
            store.rollback.eq(self.dropped | self.restart),
        ]
        beat, patch, out, free = store.o.payload, patches.o.payload, self.o.payload, Signal()
        at = Signal(16 - lane_bits)  # beat of the frame
        upper, lower = patch.place, (patch.place + 1)[:16]
        m.d.comb += [
            free.eq(~self.o.valid | self.o.ready),
            store.o.ready.eq(free & patches.o.valid),
            patches.o.ready.eq(free & store.o.valid & beat.last),
        ]
        with m.If(free):
            m.d.sync += [
                self.o.valid.eq(store.o.valid & patches.o.valid), out.data.eq(beat.data), out.byte_count.eq(beat.byte_count),
                out.first.eq(at == 0), out.last.eq(beat.last),
            ]  # fmt: skip
            for place, value in ((upper, patch.value[8:]), (lower, patch.value[:8])):
                with m.If(patch.valid & (at == place[lane_bits:])):
                    m.d.sync += out.data.word_select(place[:lane_bits], 8).eq(value)
            with m.If(store.o.valid & patches.o.valid):
                m.d.sync += at.eq(Mux(beat.last, 0, at + 1))
        return m
