"""The IOMMU's own reads and writes as bursts of the wall."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..stream.arbiter import Arbiter
from ..tlp.layouts import AtomicKind, Burst, BurstData, BurstDone, BurstStatus
from .layouts import MemoryRead, MemoryReadData, MemoryUpdate, MemoryWrite, MemoryWriteDone

BLOCK_BYTES = 64  # an access stays inside one aligned block
COOKIE_BITS = 8  # of a reader or writer; the number of the reader or writer travels above them
WIDTHS = (64, 128, 256, 512)


class _TaggedWrite(data.Struct):
    """A beat of a write, and whose it is."""

    write: MemoryWrite
    number: 4
    last: 1


class _TaggedUpdate(data.Struct):
    """An update, and whose it is."""

    update: MemoryUpdate
    number: 4


class MemoryPort(wiring.Component):
    """Turns accesses of several readers and writers into wall bursts of function 0, and their answers back.

    Reads go out in any mix and are answered to the reader that asked, with its cookie. Writes are collected whole before their burst is
    issued; one is at work at a time, from its first beat until its data has left; it is done when the requester says so. A write is 4
    bytes at a multiple of 4, or a multiple of 8 bytes at a multiple of 8. An answer that is not taken holds up those behind it: nobody
    lets one wait for an answer to another, but a reader may for its next read to be taken.
    An update is a CAS, answered as a read of its reader; its operands leave in front of its burst. [PCIe5 6.15]

    Throughput: 1 read per cycle; 8 bytes of read data per cycle; 1 write and 1 update at a time.

    Parameters
    ----------
    width : :class:`int`
        Bits of burst data per beat: 64, 128, 256 or 512.
    readers, writers : :class:`int`
        1 to 16 of each.
    client : :class:`int`
        Number of the wall at the requester.
    updaters : tuple of :class:`int`
        Numbers of the readers that have updates.

    Members
    -------
    read, read_data : ``In(stream.Signature(MemoryRead)).array(readers)``, ``Out(stream.Signature(MemoryReadData)).array(readers)``
        Of each reader.
    write, write_done : ``In(stream.Signature(MemoryWrite)).array(writers)``, ``Out(stream.Signature(MemoryWriteDone)).array(writers)``
        Of each writer.
    bursts : ``Out(stream.Signature(Burst))``
        Reads and writes, physical addresses.
    burst_write_data, burst_read_data : ``Out(stream.Signature(BurstData(width)))``, ``In(stream.Signature(BurstData(width)))``
        Their data.
    burst_done : ``In(stream.Signature(BurstDone))``
        Ends of writes.
    update, operands : ``In(stream.Signature(MemoryUpdate))``, ``Out(stream.Signature(BurstData(width)))``
        With ``updaters``: an array of their updates, and the operands of all.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, width, readers=1, writers=1, client=0, updaters=()):
        if width not in WIDTHS:
            raise ValueError(f"Width must be 64, 128, 256 or 512 bits, not {width!r}")
        if readers not in range(1, 17):
            raise ValueError(f"Readers must be 1 to 16, not {readers!r}")
        if writers not in range(1, 17):
            raise ValueError(f"Writers must be 1 to 16, not {writers!r}")
        if client not in range(64):
            raise ValueError(f"Client must be 0 to 63, not {client!r}")
        if not set(updaters) <= set(range(readers)):
            raise ValueError(f"Updaters must be readers 0 to {readers - 1}, not {updaters!r}")
        self.width, self.readers, self.writers, self.client, self.updaters = width, readers, writers, client, tuple(updaters)
        super().__init__({
            "read": In(stream.Signature(MemoryRead)).array(readers),
            "read_data": Out(stream.Signature(MemoryReadData)).array(readers),
            "write": In(stream.Signature(MemoryWrite)).array(writers),
            "write_done": Out(stream.Signature(MemoryWriteDone)).array(writers),
            "bursts": Out(stream.Signature(Burst)),
            "burst_write_data": Out(stream.Signature(BurstData(width))),
            "burst_read_data": In(stream.Signature(BurstData(width))),
            "burst_done": In(stream.Signature(BurstDone)),
            **({"update": In(stream.Signature(MemoryUpdate)).array(len(updaters)), "operands": Out(stream.Signature(BurstData(width)))}
               if updaters else {}),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.bursts = bursts = Arbiter(Burst, self.readers + 1 + bool(self.updaters))
        wiring.connect(m, bursts.o, wiring.flipped(self.bursts))
        for n, read in enumerate(self.read):
            m.d.comb += self._burst(bursts.i[n], read.p, read.valid, read.ready, Const(n, 4))
        self._return_reads(m)
        self._send_writes(m, bursts.i[self.readers])
        self._end_writes(m)
        if self.updaters:
            self._send_updates(m, bursts.i[self.readers + 1])
        return m

    def _burst(self, burst, access, valid, ready, number, is_write=0):
        return [
            burst.valid.eq(valid), ready.eq(burst.ready),
            burst.p.address.eq(access.address), burst.p.length_bytes.eq(access.length_bytes), burst.p.is_write.eq(is_write),
            burst.p.is_wall.eq(1), burst.p.client.eq(self.client), burst.p.cookie.eq(Cat(access.cookie, number)),
        ]  # fmt: skip

    def _return_reads(self, m):
        """Give the words of each beat, lowest first, to the reader that its cookie names."""
        words = self.width // 64
        source = self.burst_read_data
        beat, left = Signal(BurstData(self.width)), Signal(words)  # words of the beat that are still to be given
        lowest, failed, taken = Signal(words), Signal(), Signal()
        wanted = Cat(source.p.keep[8 * n : 8 * n + 8].any() for n in range(words))
        ready = Array(target.ready for target in self.read_data)[beat.cookie[COOKIE_BITS:]]
        m.d.comb += [
            lowest.eq(left & -left),
            taken.eq(left.any() & ready),
            source.ready.eq(~left.any() | (taken & (left == lowest))),
            failed.eq(source.p.last & (source.p.status != BurstStatus.OK)),
        ]
        with m.If(taken):
            m.d.sync += left.eq(left & ~lowest)
        with m.If(source.valid & source.ready):
            # A failed read is one item; so is a beat without a byte.
            m.d.sync += [beat.eq(source.p), left.eq(Mux(failed | ~wanted.any(), 1, wanted))]
        word = Signal(64)
        for n in range(words):
            with m.If(lowest[n]):
                m.d.comb += word.eq(beat.data[64 * n : 64 * n + 64])
        for n, target in enumerate(self.read_data):
            m.d.comb += [
                target.valid.eq(left.any() & (beat.cookie[COOKIE_BITS:] == n)),
                target.p.cookie.eq(beat.cookie),
                target.p.data.eq(word),
                target.p.last.eq(beat.last & (left == lowest)),
                target.p.status.eq(beat.status),
            ]

    def _send_writes(self, m, burst):
        """Collect a write, issue its burst, give its rows."""
        m.submodules.writers = writers = Arbiter(_TaggedWrite, self.writers, packets=True)
        for n, write in enumerate(self.write):
            m.d.comb += [
                writers.i[n].valid.eq(write.valid), write.ready.eq(writers.i[n].ready), writers.i[n].p.write.eq(write.p),
                writers.i[n].p.number.eq(n), writers.i[n].p.last.eq(write.p.last),
            ]  # fmt: skip
        words = self.width // 64  # of a row
        row_bits, lane_bits = (BLOCK_BYTES // 8 // words - 1).bit_length(), (words - 1).bit_length()
        m.submodules.block = block = Memory(shape=data.ArrayLayout(64, words), depth=1 << row_bits, init=[])
        put, get = block.write_port(granularity=1), block.read_port(domain="comb")
        head, kept = Signal(_TaggedWrite), Signal(BLOCK_BYTES // 8)  # words that are written
        word, row = Signal(range(BLOCK_BYTES // 8)), Signal(max(row_bits, 1))
        item, rows, first = writers.o, self.burst_write_data, Signal(init=1)
        at = Signal(range(BLOCK_BYTES // 8))
        short = [access.length_bytes == 4 for access in (item.p.write, head.write)]
        row_kept, word_keep = kept.word_select(row, words) if row_bits else kept, Signal(8)
        end = Signal(range(BLOCK_BYTES + 1))
        m.d.comb += end.eq(head.write.address[:6] + head.write.length_bytes - 1)
        m.d.comb += [
            # The word of the first beat is that of the address, further ones follow.
            at.eq(Mux(first, item.p.write.address[3:6], word)), put.addr.eq(at[lane_bits:]),
            *(lane.eq(Cat(item.p.write.data[:32], Mux(short[0], item.p.write.data[:32], item.p.write.data[32:]))) for lane in put.data),
            get.addr.eq(row),
            word_keep.eq(Mux(short[1], Mux(head.write.address[2], 0xF0, 0x0F), 0xFF)),
            rows.p.data.eq(get.data),
            rows.p.keep.eq(Cat(Mux(row_kept[n], word_keep, 0) for n in range(words))),
            rows.p.first.eq(first),
            rows.p.last.eq(row == end[6 - row_bits : 6] if row_bits else 1),
        ]
        with m.FSM():
            with m.State("COLLECT"):
                m.d.comb += item.ready.eq(1)
                with m.If(item.valid):
                    m.d.comb += put.en.eq(1 << at[:lane_bits])
                    m.d.sync += [head.eq(item.p), word.eq(at + 1), first.eq(0), kept.eq(Mux(first, 0, kept) | (1 << at))]
                    with m.If(item.p.last):
                        m.next = "ISSUE"
            with m.State("ISSUE"):
                m.d.comb += self._burst(burst, head.write, 1, Signal(), head.number, 1)
                m.d.sync += [first.eq(1), row.eq(head.write.address[6 - row_bits : 6] if row_bits else 0)]
                with m.If(burst.ready):
                    m.next = "GIVE_DATA"
            with m.State("GIVE_DATA"):
                m.d.comb += rows.valid.eq(1)
                with m.If(rows.ready):
                    m.d.sync += [row.eq(row + 1), first.eq(rows.p.last)]
                    with m.If(rows.p.last):
                        m.next = "COLLECT"

    def _end_writes(self, m):
        done = self.burst_done
        number = done.p.cookie[COOKIE_BITS:]
        m.d.comb += done.ready.eq(Array(target.ready for target in self.write_done)[number])
        for n, target in enumerate(self.write_done):
            m.d.comb += [target.valid.eq(done.valid & (number == n)), target.p.cookie.eq(done.p.cookie), target.p.status.eq(done.p.status)]

    def _send_updates(self, m, burst):
        """Give the operands of an update, then issue its burst."""
        m.submodules.updates = updates = Arbiter(_TaggedUpdate, len(self.updaters), direct=True)
        for n, (number, update) in enumerate(zip(self.updaters, self.update)):
            m.d.comb += [
                updates.i[n].valid.eq(update.valid), update.ready.eq(updates.i[n].ready), updates.i[n].p.update.eq(update.p),
                updates.i[n].p.number.eq(number),
            ]  # fmt: skip
        ours, order, row, given = updates.o, updates.o.p.update, self.operands.p, Signal()
        m.d.comb += [
            self.operands.valid.eq(ours.valid & ~given), row.keep.eq(0xFFFF), row.first.eq(1), row.last.eq(1),
            row.data.eq(Cat(order.compare, order.swap)),
            burst.valid.eq(ours.valid & given), ours.ready.eq(burst.ready & given),
            burst.p.address.eq(order.address), burst.p.length_bytes.eq(8), burst.p.atomic.eq(AtomicKind.CAS),
            burst.p.is_wall.eq(1), burst.p.client.eq(self.client), burst.p.cookie.eq(Cat(order.cookie, ours.p.number)),
        ]
        if self.width == 64:
            second = Signal()
            m.d.comb += [row.first.eq(~second), row.last.eq(second), row.data.eq(Mux(second, order.swap, order.compare))]
            with m.If(self.operands.valid & self.operands.ready):
                m.d.sync += second.eq(~second)
        with m.If(self.operands.valid & self.operands.ready & row.last):
            m.d.sync += given.eq(1)
        with m.If(ours.valid & ours.ready):
            m.d.sync += given.eq(0)
