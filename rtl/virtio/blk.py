"""virtio-blk on a memory of rows."""

from amaranth import Array, Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.reader import WIDTHS
from ..spec import virtio_blk as spec
from ..tlp.layouts import BurstStatus
from .blk_device import BlkDevice
from .device import back_end_ports
from .header import HEADER_BYTES, HeaderSplitter
from .layouts import Chain
from .store import MemoryPort, Store

IN_FLIGHT = 64  # reads, and writes, of the memory that are not answered
FAR = 33  # bits of a sector number from which on it is beyond any capacity


class Extent(data.Struct):
    """Sectors that a DISCARD names."""

    sector: 33
    count: 32


class Blk(wiring.Component):
    """Back end of a virtio-blk function: executes requests on a memory of sectors, one by one. [VIRTIO1.4 5.2.6]

    For each chain one packet of exactly ``writable_bytes`` goes back; its last byte is the request's status, whatever the
    framing. A request beyond the capacity, or whose data is no whole number of sectors, ends in IOERR; a type that is unknown or not
    offered in UNSUPP; writable bytes in front of the status that the request does not define are zero. A request shorter than its
    header, or a header that could not be fetched, ends in IOERR. When OUT data could not be fetched the request ends in
    IOERR; sectors in front of the failure may have been written, none behind it. When the memory fails, or bytes in front of the status
    could not be delivered (``failed``), the status is IOERR; ``status`` of the packet's last beat then says that it tells of it.

    DISCARD and WRITE_ZEROES: a segment with an unknown flag, or an UNMAP to discard, makes the status UNSUPP; one beyond the capacity
    or longer than offered IOERR; the segments in front of it are carried out. Too many, none or a part of one: IOERR, nothing is
    carried out. DISCARD leaves a RAM as it is.

    All that a request wrote is stored for good before its status is given, so FLUSH finds nothing to do. A chain that it has is
    finished also while ``suspend`` is 1.

    Latency: 5 cycles from the header to the first byte of the answer, and that of the memory. Throughput: one beat per cycle in and out,
    one row per cycle zeroed; about 10 cycles per request besides, and the latency of the memory's writes.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    device : :class:`.blk_device.BlkDevice`
        Its size and features.
    has_memory_port : :class:`bool`
        The sectors are in a memory outside, behind ``memory``; else in a block RAM.

    Members
    -------
    chains, readable, writable, assured, failed, features, config, config_changed, config_write, needs_reset, stop, stopped, port_stop,
    port_stopped, suspend, suspended
        See :func:`.device.back_end_ports`: one port for all queues.
    memory : ``Out(MemoryPort(width, rows))``
        With ``has_memory_port``. Row 0 begins with byte 0 of sector 0.
    sectors : ``In(range(capacity_sectors + 1))``
        With ``has_memory_port``: the capacity at present, shown and obeyed but while the device is suspended.
    discards : ``Out(stream.Signature(Extent))``
        With ``has_memory_port`` and DISCARD: sectors that nobody needs; taken when that is done.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, device=None, has_memory_port=False):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        self.width, self.device, self.has_memory_port = width, device or BlkDevice(), has_memory_port
        self.rows = self.device.capacity_sectors * spec.SECTOR_BYTES * 8 // width
        members = back_end_ports(width, 1, spec.CONFIG_BYTES)
        if has_memory_port:
            members["memory"] = Out(MemoryPort(width, self.rows))
            members["sectors"] = In(range(self.device.capacity_sectors + 1))
            if self.device.max_discard_sectors:
                members["discards"] = Out(stream.Signature(Extent))
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        m.submodules.core = core = ResetInserter(self.stop)(_Core(self))
        if self.has_memory_port:
            memory = self.memory
        else:
            m.submodules.store = store = Store(width=self.width, depth=self.rows)
            memory = store.port

        # What the memory owes outlives a stop.
        counts = []
        for asked, theirs, answer, ours in ((core.memory.reads, memory.reads, memory.rows, core.memory.rows),
                                            (core.memory.writes, memory.writes, memory.written, core.memory.written)):  # fmt: skip
            count, has_room = Signal(range(IN_FLIGHT + 1)), Signal()
            counts.append(count)
            m.d.comb += [
                has_room.eq((count != IN_FLIGHT) & ~self.stop),
                ours.valid.eq(answer.valid & ~self.stop), ours.payload.eq(answer.payload), answer.ready.eq(ours.ready | self.stop),
            ]  # fmt: skip
            m.d.sync += count.eq(count + (asked.valid & asked.ready) - (answer.valid & answer.ready))
            if self.has_memory_port:  # what is offered stays, whatever stops
                m.d.comb += asked.ready.eq((~theirs.valid | theirs.ready) & has_room)
                with m.If(~theirs.valid | theirs.ready):
                    m.d.sync += [theirs.valid.eq(asked.valid & has_room), theirs.payload.eq(asked.payload)]
            else:
                m.d.comb += [
                    theirs.valid.eq(asked.valid & has_room), theirs.payload.eq(asked.payload), asked.ready.eq(theirs.ready & has_room),
                ]  # fmt: skip
        is_discarding = Signal()
        if hasattr(self, "discards"):
            m.d.comb += [is_discarding.eq(self.discards.valid), core.is_discarded.eq(self.discards.valid & self.discards.ready)]
            with m.If(core.is_discarded):
                m.d.sync += self.discards.valid.eq(0)
            with m.Elif(core.discards):
                m.d.sync += [self.discards.valid.eq(1), self.discards.payload.eq(core.extent)]
        m.d.comb += [
            core.is_stored.eq(counts[1] == 0),
            self.stopped.eq(self.stop & ~self.chains[0].valid & ~self.readable[0].valid & (counts[0] == 0) & (counts[1] == 0)
                            & ~is_discarding),
            self.port_stopped.eq(self.port_stop),
            self.suspended.eq(self.suspend & core.is_idle & ~self.chains[0].valid),
        ]

        writeback = Signal(8)
        if self.device.has_cache_control:
            byte = spec.CONFIG_WRITEBACK % 8
            with m.If((self.config_write.word == spec.CONFIG_WRITEBACK // 8) & self.config_write.enable[byte]):
                m.d.sync += writeback.eq(self.config_write.data.word_select(byte, 8) == 1)
            with m.If(self.stop):
                m.d.sync += writeback.eq(0)
        if self.has_memory_port:
            m.d.sync += self.config_changed.eq(0)
            with m.If((core.capacity != self.sectors) & ~self.suspended):
                m.d.sync += [core.capacity.eq(self.sectors), self.config_changed.eq(1)]
        m.d.comb += self.config.eq(
            Cat(core.capacity | Const(0, 64), Const(int.from_bytes(self.device.configuration(), "little"), 8 * (spec.CONFIG_BYTES - 8)))
            | (writeback << 8 * spec.CONFIG_WRITEBACK))  # fmt: skip
        return m


def _at_most(count, size):
    """Return whether ``count`` is at most ``size``, a power of two: a comparison without a carry chain."""
    return (count & -2 * size == 0) & ((count & size == 0) | (count & size - 1 == 0))


class _Core(Elaboratable):
    """Everything of :class:`Blk` but the stop handshake: ``stop`` is its reset, and in reset it takes and drops input."""

    def __init__(self, blk):
        self.blk = blk
        self.memory = MemoryPort(blk.width, blk.rows).create()
        self.capacity = Signal(range(blk.device.capacity_sectors + 1), init=blk.device.capacity_sectors)
        self.is_stored, self.is_idle = Signal(), Signal()
        self.extent, self.discards, self.is_discarded = Signal(Extent), Signal(), Signal()

    def elaborate(self, platform):
        blk, device, memory, m = self.blk, self.blk.device, self.memory, Module()
        chains, readable, writable, assured, failed = (
            getattr(blk, name)[0] for name in ("chains", "readable", "writable", "assured", "failed"))
        lanes = blk.width // 8
        rows_per_sector = spec.SECTOR_BYTES // lanes
        has_segments = device.max_discard_sectors or device.max_zero_sectors
        m.submodules.header = header = HeaderSplitter(width=blk.width)
        rest = header.o
        m.d.comb += [
            header.i.valid.eq(readable.valid),
            header.i.payload.eq(readable.payload),
            readable.ready.eq(header.i.ready),
        ]

        chain = Signal(Chain)
        front = header.header.payload
        kind, complete, status = Signal(32), Signal(), Signal(8)
        is_in, is_out, is_id, is_discard, is_zeroing = Signal(), Signal(), Signal(), Signal(), Signal()
        sector, sectors, tail, fits = Signal(64), Signal(32), Signal(9), Signal()  # what is read or written
        row, left_rows = Signal(range(blk.rows + 1)), Signal(range(max(blk.rows, device.max_zero_sectors * rows_per_sector) + 1))
        in_range = (sector[FAR:] == 0) & (sector[:FAR] + sectors <= self.capacity)
        first_row = sector[: (device.capacity_sectors - 1).bit_length()] * rows_per_sector

        # The answer: ``left`` bytes still to give, the status in the last of them.
        left = Signal(32)
        final, is_told = Signal(), Signal()
        serial = device.serial.ljust(spec.ID_BYTES, b"\0")
        id_beats = -(-spec.ID_BYTES // lanes)
        id_rows = Array([
            Const(int.from_bytes(serial[n * lanes : (n + 1) * lanes], "little"), blk.width) for n in range(id_beats)
        ] + [Const(0, blk.width)])
        id_beat = Signal(range(id_beats + 1))
        first = Signal()
        m.d.comb += [final.eq(_at_most(left, lanes)), self.is_idle.eq(0)]

        # Rows of an answer are asked for as fast as the memory takes it.
        m.d.comb += [memory.reads.valid.eq(is_in & (left_rows != 0)), memory.reads.payload.eq(row)]
        with m.If(memory.reads.valid & memory.reads.ready):
            m.d.sync += [row.eq(row + 1), left_rows.eq(left_rows - 1)]
        m.d.comb += [memory.writes.payload.row.eq(row), memory.writes.payload.data.eq(rest.payload.data), memory.written.ready.eq(1)]
        with m.If(memory.writes.valid & memory.writes.ready):
            m.d.sync += row.eq(row + 1)

        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += [chains.ready.eq(1), self.is_idle.eq(1)]
                with m.If(chains.valid):
                    m.d.sync += [chain.eq(chains.payload), status.eq(spec.S_IOERR), is_told.eq(0)]
                    m.next = "TAKE_HEADER"
                    with m.If(chains.payload.readable_bytes == 0):
                        m.next = "START_ANSWER"
            with m.State("TAKE_HEADER"):
                m.d.comb += header.header.ready.eq(1)
                with m.If(header.header.valid):
                    is_read = front.data[:32] == spec.T_IN
                    data_bytes = Mux(is_read, chain.writable_bytes, chain.readable_bytes) - Mux(is_read, 1, HEADER_BYTES)
                    m.d.sync += [
                        kind.eq(front.data[:32]),
                        sector.eq(front.data[64:128]),
                        Cat(tail, sectors).eq(data_bytes[:32]),
                        complete.eq(front.complete),
                        is_in.eq(is_read),
                        is_out.eq(front.data[:32] == spec.T_OUT),
                        is_id.eq(front.data[:32] == spec.T_GET_ID),
                    ]
                    if device.max_discard_sectors:
                        m.d.sync += is_discard.eq(front.data[:32] == spec.T_DISCARD)
                    if device.max_zero_sectors:
                        m.d.sync += is_zeroing.eq(front.data[:32] == spec.T_WRITE_ZEROES)
                    m.next = "CHECK_RANGE"
            with m.State("CHECK_RANGE"):
                m.d.sync += [fits.eq(in_range & (tail == 0)), row.eq(first_row)]
                m.next = "DECIDE"
            with m.State("DECIDE"):
                m.next = "TAKE_DATA"
                with m.If(~complete | (chain.writable_bytes == 0)):
                    m.d.sync += status.eq(spec.S_IOERR)
                with m.Elif(is_in):
                    m.d.sync += status.eq(Mux(fits, spec.S_OK, spec.S_IOERR))
                with m.Elif(is_out):
                    m.d.sync += status.eq(spec.S_IOERR if device.is_read_only else Mux(fits, spec.S_OK, spec.S_IOERR))
                with m.Elif(is_id | (kind == spec.T_FLUSH)):
                    m.d.sync += status.eq(spec.S_OK)
                with m.Elif(~is_discard & ~is_zeroing):
                    m.d.sync += status.eq(spec.S_UNSUPP)
                if has_segments:
                    with m.Else():
                        most = Mux(is_discard, device.max_discard_segments, device.max_zero_segments)
                        size, unit = Cat(tail, sectors), (spec.SEGMENT_BYTES - 1).bit_length()
                        is_good = (size != 0) & (size[:unit] == 0) & (size[unit:] <= most)
                        m.d.sync += status.eq(Mux(is_good, spec.S_OK, spec.S_IOERR))
                        m.next = "TAKE_SEGMENT"
            with m.State("TAKE_DATA"):
                is_good = ~rest.payload.last | (rest.payload.status == BurstStatus.OK)
                m.d.comb += [
                    memory.writes.valid.eq(rest.valid & is_out & (status == spec.S_OK) & (rest.payload.byte_count == lanes) & is_good),
                    rest.ready.eq(~memory.writes.valid | memory.writes.ready),
                ]
                with m.If(rest.valid & rest.ready & rest.payload.last):
                    with m.If(~is_good):
                        m.d.sync += status.eq(spec.S_IOERR)
                    m.next = "WAIT_STORED"
            if has_segments:
                self._serve_segments(m, rest, status, is_discard, sector, sectors, fits, in_range, row, first_row, left_rows)
            with m.State("WAIT_STORED"):
                with m.If(self.is_stored):
                    m.next = "START_ANSWER"
            with m.State("START_ANSWER"):
                m.d.sync += [left.eq(chain.writable_bytes), id_beat.eq(0), first.eq(1)]
                with m.If(_at_most(chain.writable_bytes, lanes)):
                    m.next = "GIVE_LAST"
                with m.Elif(is_in & (status == spec.S_OK)):
                    m.d.sync += left_rows.eq(sectors * rows_per_sector)
                    m.next = "GIVE_ROWS"
                with m.Else():
                    m.next = "GIVE_BEATS"
            with m.State("GIVE_ROWS"):
                m.d.comb += [writable.valid.eq(memory.rows.valid), memory.rows.ready.eq(writable.ready)]
                with m.If(writable.valid & writable.ready):
                    m.d.sync += [left.eq(left - lanes), first.eq(0)]
                    with m.If(~memory.rows.payload.ok):
                        m.d.sync += status.eq(spec.S_IOERR)
                    with m.If(left == lanes + 1):  # only the status is left
                        m.next = "WAIT_ASSURED"
            with m.State("GIVE_BEATS"):
                m.d.comb += writable.valid.eq(1)
                with m.If(writable.ready):
                    m.d.sync += [left.eq(left - lanes), first.eq(0)]
                    with m.If(id_beat != id_beats):
                        m.d.sync += id_beat.eq(id_beat + 1)
                    with m.If(_at_most(left, 2 * lanes)):
                        m.next = "WAIT_ASSURED"
            with m.State("WAIT_ASSURED"):
                with m.If(assured):
                    m.d.sync += is_told.eq(failed)
                    with m.If(failed & (status == spec.S_OK)):
                        m.d.sync += status.eq(spec.S_IOERR)
                    m.next = "GIVE_LAST"
            with m.State("GIVE_LAST"):
                m.d.comb += writable.valid.eq(1)
                with m.If(writable.ready):
                    m.next = "TAKE_CHAIN"

        with m.If(memory.written.valid & ~memory.written.payload & (status == spec.S_OK)):
            m.d.sync += status.eq(spec.S_IOERR)

        body, out = Signal(blk.width), writable.payload
        with m.If(is_in & (status == spec.S_OK) & memory.rows.valid & memory.rows.payload.ok):
            m.d.comb += body.eq(memory.rows.payload.data)
        with m.Elif((status == spec.S_OK) & is_id):
            m.d.comb += body.eq(id_rows[id_beat])
        m.d.comb += [
            out.data.eq(Cat(*[
                Mux(final & (left == lane + 1), status, body.word_select(lane, 8)) for lane in range(lanes)
            ])),
            out.byte_count.eq(Mux(final, left, lanes)),
            out.first.eq(first),
            out.last.eq(final),
            out.status.eq(Mux(is_told, BurstStatus.FAULT, BurstStatus.OK)),
        ]
        return m

    def _serve_segments(self, m, rest, status, is_discard, sector, sectors, fits, in_range, row, first_row, left_rows):
        """The data of DISCARD and WRITE_ZEROES, segment by segment; a part of one is passed over. [VIRTIO1.4 5.2.6]"""
        device, memory = self.blk.device, self.memory
        lanes, size = self.blk.width // 8, spec.SEGMENT_BYTES
        beat = rest.payload
        parts = max(lanes // size, size // lanes)  # segments in a beat, or beats in a segment
        part, begun = Signal(range(parts)), Signal(64)
        flags, is_last, is_lost = Signal(32), Signal(), Signal()
        if lanes < size:
            whole, over, segment = part & (beat.byte_count == lanes), Const(1), Cat(begun, beat.data)
        else:
            whole, over = beat.byte_count >= size * (part + 1), beat.byte_count <= size * (part + 1)
            segment = beat.data.word_select(part, 8 * size)
        m.d.comb += is_lost.eq(beat.last & (beat.status != BurstStatus.OK))

        def go_on():
            m.next = "TAKE_SEGMENT"
            with m.If(is_last):
                m.next = "WAIT_STORED"

        with m.State("TAKE_SEGMENT"):
            m.d.comb += rest.ready.eq(over | ~whole | is_lost)
            with m.If(rest.valid):
                m.d.sync += [
                    begun.eq(beat.data[:64]), part.eq(Mux(beat.last & rest.ready, 0, part + 1)), is_last.eq(beat.last & over),
                    sector.eq(segment[:64]), sectors.eq(segment[64:96]), flags.eq(segment[96:]),
                ]  # fmt: skip
                with m.If(is_lost & (status == spec.S_OK)):
                    m.d.sync += status.eq(spec.S_IOERR)
                with m.If(whole & ~is_lost):
                    m.next = "CHECK_SEGMENT"
                with m.Elif(beat.last):
                    m.next = "WAIT_STORED"
        with m.State("CHECK_SEGMENT"):
            most = Mux(is_discard, device.max_discard_sectors, device.max_zero_sectors)
            m.d.sync += [fits.eq(in_range & (sectors <= most)), row.eq(first_row)]
            m.next = "DO_SEGMENT"
        with m.State("DO_SEGMENT"):
            go_on()
            with m.If((flags[spec.UNMAP + 1 :] != 0) | (is_discard & flags[spec.UNMAP])):
                m.d.sync += status.eq(spec.S_UNSUPP)
            with m.Elif((status == spec.S_OK) & ~fits):
                m.d.sync += status.eq(spec.S_IOERR)
            with m.Elif((status == spec.S_OK) & ~is_discard):
                m.d.sync += left_rows.eq(sectors * (spec.SECTOR_BYTES // lanes))
                m.next = "ZERO"
            if hasattr(self.blk, "discards"):
                with m.Elif(status == spec.S_OK):
                    m.next = "DISCARD"
        with m.State("ZERO"):
            m.d.comb += [memory.writes.valid.eq(left_rows != 0), memory.writes.payload.data.eq(0)]
            with m.If(left_rows == 0):
                go_on()
            with m.Elif(memory.writes.ready):
                m.d.sync += left_rows.eq(left_rows - 1)
        if hasattr(self.blk, "discards"):
            m.d.comb += [self.extent.sector.eq(sector), self.extent.count.eq(sectors)]
            with m.State("DISCARD"):
                m.d.comb += self.discards.eq(1)
                with m.If(self.is_discarded):
                    go_on()
