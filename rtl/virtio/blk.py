"""virtio-blk on a block RAM."""

from amaranth import Array, Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from ..spec import virtio_blk as spec
from ..tlp.layouts import BurstStatus
from .header import HEADER_BYTES, HeaderSplitter
from .layouts import Chain
from .store import Store

SECTOR_BYTES = 512  # [VIRTIO1.4 5.2.4]
WIDTHS = (64, 128, 256, 512)


def configuration(*, capacity_sectors):
    """Return the device configuration bytes of a :class:`Blk`: its capacity, zeros behind. [VIRTIO1.4 5.2.4]"""
    return capacity_sectors.to_bytes(8, "little") + bytes(52)


class Blk(wiring.Component):
    """Back end of a virtio-blk function: executes IN, OUT, FLUSH and GET_ID on a store of sectors. [VIRTIO1.4 5.2.6]

    For each chain one packet of exactly ``writable_bytes`` goes back; its last byte is the request's status, whatever the
    framing. A request beyond the capacity, or whose data is no whole number of sectors, ends in IOERR; an unknown type in
    UNSUPP; writable bytes in front of the status that the request does not define are zero. A request shorter than its
    header, or a header that could not be fetched, ends in IOERR. When OUT data could not be fetched the request ends in
    IOERR; sectors in front of the failure may have been written, none behind it. When IN data could not be delivered
    (``failed``) the status is IOERR.

    Latency: 4 cycles from the header to the first byte of the answer. Throughput: one beat per cycle in and out; about 8
    cycles per request besides.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    capacity_sectors : :class:`int`
        Sectors of 512 bytes: a power of two.
    serial : :class:`bytes`
        What GET_ID answers: at most 20 bytes, padded with zeros.

    Members
    -------
    chains : ``In(stream.Signature(Chain))``
        Requests.
    readable : ``In(stream.Signature(ChainBeat(width)))``
        Their device-readable bytes.
    writable : ``Out(stream.Signature(ChainBeat(width)))``
        Their device-writable bytes.
    settled, failed : ``In(1)``
        Of the writer behind ``writable``: see :class:`ringwall.rtl.dma.writer.Writer`.
    stop, stopped : ``In(1)``, ``Out(1)``
        See "Stop" in rtl/README.md. The store keeps its content.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, capacity_sectors, serial=b"ringwall"):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        if not isinstance(capacity_sectors, int) or capacity_sectors < 2 or capacity_sectors & (capacity_sectors - 1):
            raise ValueError(f"Capacity must be a power of two of at least 2 sectors, not {capacity_sectors!r}")
        if len(serial) > spec.ID_BYTES:
            raise ValueError(f"Serial must have at most {spec.ID_BYTES} bytes, not {serial!r}")
        self.width, self.capacity_sectors, self.serial = width, capacity_sectors, serial
        super().__init__({
            "chains": In(stream.Signature(Chain)),
            "readable": In(stream.Signature(ChainBeat(width))),
            "writable": Out(stream.Signature(ChainBeat(width))),
            "settled": In(1),
            "failed": In(1),
            "stop": In(1),
            "stopped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.core = ResetInserter(self.stop)(_Core(self))
        m.d.comb += self.stopped.eq(self.stop & ~self.chains.valid & ~self.readable.valid)
        return m


class _Core(Elaboratable):
    """Everything of :class:`Blk` but the stop handshake: ``stop`` is its reset, and in reset it takes and drops input."""

    def __init__(self, blk):
        self.blk = blk

    def elaborate(self, platform):
        blk, m = self.blk, Module()
        lanes = blk.width // 8
        rows_per_sector = SECTOR_BYTES // lanes
        m.submodules.store = store = Store(width=blk.width, depth=blk.capacity_sectors * rows_per_sector)
        m.submodules.header = header = HeaderSplitter(width=blk.width)
        data_in = header.o.payload
        m.d.comb += [
            header.i.valid.eq(blk.readable.valid),
            header.i.payload.eq(blk.readable.payload),
            blk.readable.ready.eq(header.i.ready),
        ]

        chain = Signal(Chain)
        front = header.header.payload
        kind, sector = Signal(32), Signal(64)
        complete = Signal()
        status = Signal(8)
        data_bytes = Signal(32)  # in front of the status, or behind the header
        is_in, is_out, is_id = Signal(), Signal(), Signal()
        fits, whole = Signal(), Signal()
        row = Signal(range(store.depth + 1))

        # The answer: ``left`` bytes still to give, the status in the last of them.
        left = Signal(32)
        final = Signal()
        serial = blk.serial.ljust(spec.ID_BYTES, b"\0")
        id_beats = -(-spec.ID_BYTES // lanes)
        id_rows = Array([
            Const(int.from_bytes(serial[n * lanes : (n + 1) * lanes], "little"), blk.width) for n in range(id_beats)
        ] + [Const(0, blk.width)])
        id_beat = Signal(range(id_beats + 1))
        out = blk.writable.payload
        first = Signal()
        row_ready = Signal()  # store.read_data is the row that goes out next
        m.d.comb += final.eq(left <= lanes)

        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += blk.chains.ready.eq(1)
                with m.If(blk.chains.valid):
                    m.d.sync += chain.eq(blk.chains.payload)
                    m.d.sync += [status.eq(spec.S_IOERR), kind.eq(0), is_in.eq(0), is_out.eq(0), is_id.eq(0)]
                    m.next = "TAKE_HEADER"
                    with m.If(blk.chains.payload.readable_bytes == 0):
                        m.next = "START_ANSWER"
            with m.State("TAKE_HEADER"):
                m.d.comb += header.header.ready.eq(1)
                with m.If(header.header.valid):
                    m.d.sync += [
                        kind.eq(front.data[:32]),
                        sector.eq(front.data[64:128]),
                        complete.eq(front.complete),
                        is_in.eq(front.data[:32] == spec.T_IN),
                        is_out.eq(front.data[:32] == spec.T_OUT),
                        is_id.eq(front.data[:32] == spec.T_GET_ID),
                        data_bytes.eq(Mux(front.data[:32] == spec.T_OUT, chain.readable_bytes - HEADER_BYTES,
                                          chain.writable_bytes - 1)),
                    ]
                    m.next = "CHECK_RANGE"
            with m.State("CHECK_RANGE"):
                sectors = data_bytes[9:]
                m.d.sync += [
                    whole.eq(data_bytes[:9] == 0),
                    fits.eq((sector[33:] == 0) & (sector[:33] + sectors <= blk.capacity_sectors)),
                    row.eq(sector[: (blk.capacity_sectors - 1).bit_length()] * rows_per_sector),
                ]
                m.next = "DECIDE"
            with m.State("DECIDE"):
                with m.If(~complete):
                    m.d.sync += status.eq(spec.S_IOERR)
                with m.Elif(is_in | is_out):
                    m.d.sync += status.eq(Mux(whole & fits & (chain.writable_bytes != 0), spec.S_OK, spec.S_IOERR))
                with m.Elif(is_id | (kind == spec.T_FLUSH)):
                    m.d.sync += status.eq(spec.S_OK)
                with m.Else():
                    m.d.sync += status.eq(spec.S_UNSUPP)
                m.next = "TAKE_DATA"
            with m.State("TAKE_DATA"):
                m.d.comb += header.o.ready.eq(1)
                m.d.comb += [
                    store.write_row.eq(row),
                    store.write_data.eq(data_in.data),
                    store.write_enable.eq(
                        header.o.valid & is_out & (status == spec.S_OK) & (data_in.byte_count == lanes)
                        & (~data_in.last | (data_in.status == BurstStatus.OK))),
                ]
                with m.If(header.o.valid):
                    m.d.sync += row.eq(row + is_out)
                    with m.If(data_in.last):
                        with m.If(data_in.status != BurstStatus.OK):
                            m.d.sync += status.eq(spec.S_IOERR)
                        m.next = "START_ANSWER"
            with m.State("START_ANSWER"):
                m.d.sync += [left.eq(chain.writable_bytes), id_beat.eq(0), row_ready.eq(0), first.eq(1)]
                with m.If(~is_in | (status != spec.S_OK) | (chain.writable_bytes <= 1)):
                    m.next = "GIVE_BEAT"
                with m.Else():
                    m.next = "GIVE_ROW"
            with m.State("GIVE_ROW"):  # whole rows of the store
                advance = Signal()
                m.d.comb += [
                    advance.eq(~row_ready | blk.writable.ready),
                    store.read_row.eq(row),
                    store.read_enable.eq(advance),
                    blk.writable.valid.eq(row_ready),
                ]
                with m.If(advance):
                    m.d.sync += [row.eq(row + 1), row_ready.eq(1)]
                with m.If(row_ready & blk.writable.ready):
                    m.d.sync += [left.eq(left - lanes), first.eq(0)]
                    with m.If(left == lanes + 1):  # only the status is left
                        m.next = "WAIT_SETTLED"
            with m.State("WAIT_SETTLED"):
                with m.If(blk.settled):
                    m.d.sync += status.eq(Mux(blk.failed, spec.S_IOERR, spec.S_OK))
                    m.next = "GIVE_BEAT"
            with m.State("GIVE_BEAT"):  # anything but rows of the store; the last beat of every answer
                m.d.comb += blk.writable.valid.eq(1)
                with m.If(blk.writable.ready):
                    m.d.sync += [left.eq(left - lanes), first.eq(0)]
                    with m.If(id_beat != id_beats):
                        m.d.sync += id_beat.eq(id_beat + 1)
                    with m.If(final):
                        m.next = "TAKE_CHAIN"

        body = Signal(blk.width)
        with m.If((status == spec.S_OK) & is_in & (left > lanes)):
            m.d.comb += body.eq(store.read_data)
        with m.Elif((status == spec.S_OK) & is_id):
            m.d.comb += body.eq(id_rows[id_beat])
        m.d.comb += [
            out.data.eq(Cat(*[
                Mux(final & (left == lane + 1), status, body.word_select(lane, 8)) for lane in range(lanes)
            ])),
            out.byte_count.eq(Mux(final, left, lanes)),
            out.first.eq(first),
            out.last.eq(final),
        ]
        return m
