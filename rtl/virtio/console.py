"""virtio-console: a stream of bytes each way between user logic and a terminal of the guest."""

from dataclasses import dataclass

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.reader import WIDTHS
from ..spec import virtio_console as spec
from ..stream.arbiter import Arbiter
from ..stream.queue import Queue
from .device import Port, back_end_ports
from .ports import SMALL_READS, join_port, port_streams
from .serializer import Serializer

EMERGENCY_BYTES = 64  # that wait; more at once are lost
PATIENCE = 16  # cycles without a byte that end a buffer


@dataclass(frozen=True)
class ConsoleDevice:
    """A virtio-console device, for a card. [VIRTIO1.4 5.3]

    ``columns``, ``rows``: the size of the terminal, offered (SIZE) unless 0. ``emergency``: single bytes can be written into the
    configuration (EMERG_WRITE), also without a queue; they go to ``from_driver``. ``queue_size``: the largest of each queue.
    """

    columns: int = 0
    rows: int = 0
    emergency: bool = False
    queue_size: int = 64

    device_type = spec.DEVICE_TYPE
    class_code = 0x078000  # other communication device
    config_bytes = 12

    def __post_init__(self):
        if self.columns not in range(1 << 16) or self.rows not in range(1 << 16) or (self.columns == 0) != (self.rows == 0):
            raise ValueError(f"Columns and rows must both be 0 or both be between 1 and 65535, not {(self.columns, self.rows)!r}")

    @property
    def device_features(self):
        """Offered bits."""
        return (self.columns != 0) << spec.F_SIZE | self.emergency << spec.F_EMERG_WRITE

    @property
    def ports(self):
        """What the driver receives, what it transmits."""
        sizes = (self.queue_size,)
        return (Port(sizes, waits=True, read_buffer_bytes=SMALL_READS), Port(sizes, read_buffer_bytes=SMALL_READS))

    def back_end(self, width):
        """Return the :class:`Console`."""
        return Console(width=width, device=self)


class Console(wiring.Component):
    """Back end of a virtio-console function with one port: queue 0 receives, queue 1 transmits. [VIRTIO1.4 5.3.6]

    Bytes for the driver go into its buffers in order; a buffer ends when it is full, when it has bytes and no more came for 16 cycles,
    or when it has bytes and ``suspend`` rises. Bytes of the driver come in order; a buffer is used when its last byte was taken, so
    whoever takes them must go on doing so, or that queue can neither be reset nor suspended. Of a buffer that cannot be fetched whole
    comes only what lies in front of the failure.

    Latency: 3 cycles from a beat of the driver's to its first byte. Throughput: 1 byte per cycle from the driver, ``width / 8`` bytes in
    ``width / 8 + 1`` cycles to it; 3 cycles more per buffer.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    device : :class:`ConsoleDevice`
        What it shows.

    Members
    -------
    to_driver : ``In(stream.Signature(8))``
        Bytes that the driver receives.
    from_driver : ``Out(stream.Signature(8))``
        Bytes that the driver transmits.
    Others
        See :func:`.device.back_end_ports`: two ports, the first waits.

    Raises
    ------
    :exc:`ValueError`
        If ``width`` is not such a number.
    """

    def __init__(self, *, width, device):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        self.width, self.device = width, device
        super().__init__({
            **back_end_ports(width, 2, device.config_bytes), "to_driver": In(stream.Signature(8)), "from_driver": Out(stream.Signature(8)),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        receive, transmit = _Receive(width=self.width), _Transmit(width=self.width)
        join_port(m, self, 0, receive)
        join_port(m, self, 1, transmit)
        m.d.comb += [
            receive.i.valid.eq(self.to_driver.valid),
            receive.i.payload.eq(self.to_driver.payload),
            self.to_driver.ready.eq(receive.i.ready),
            receive.suspend.eq(self.suspend),
            self.suspended.eq(receive.suspended & self.settled[0]),
            self.stopped.eq(self.port_stopped.all()),
            self.config.eq(self.device.rows << 16 | self.device.columns),
        ]
        m.submodules.bytes = both = Arbiter(8, 1 + self.device.emergency)
        wiring.connect(m, transmit.o, both.i[0])
        if self.device.emergency:
            m.submodules.emergency = emergency = Queue(8, EMERGENCY_BYTES)
            wiring.connect(m, emergency.o, both.i[1])
            word, lane = divmod(spec.EMERG_WR, 8)
            m.d.comb += [
                emergency.i.valid.eq((self.config_write.word == word) & self.config_write.enable[lane]),
                emergency.i.payload.eq(self.config_write.data.word_select(lane, 8)),
            ]
        wiring.connect(m, both.o, wiring.flipped(self.from_driver))
        return m


class _Receive(wiring.Component):
    """Bytes into buffers: a port of :class:`Console`, but for its stop."""

    def __init__(self, *, width):
        self.width = width
        super().__init__({**port_streams(width), "i": In(stream.Signature(8)), "suspend": In(1), "suspended": Out(1)})

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        out, free = self.writable.payload, Signal()
        row, count, first = Signal(self.width), Signal(range(lanes + 1)), Signal()
        left, quiet = Signal(32), Signal(range(PATIENCE + 1))  # bytes that still fit behind ``row``; cycles without a byte
        begun, ends, take, rests = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            self.readable.ready.eq(1),
            free.eq(~self.writable.valid | self.writable.ready),
            begun.eq(~first | (count != 0)),
            ends.eq((left == 0) | (begun & (self.suspend | (quiet == PATIENCE)))),
            take.eq(self.i.valid & self.i.ready),
            rests.eq(self.suspend & ~self.writable.valid),
        ]
        with m.If(self.writable.ready):
            m.d.sync += self.writable.valid.eq(0)
        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += [self.chains.ready.eq(~self.suspend), self.suspended.eq(rests)]
                m.d.sync += [left.eq(self.chains.payload.writable_bytes), first.eq(1), quiet.eq(0)]
                with m.If(self.chains.valid & ~self.suspend):
                    m.next = "COLLECT"
            with m.State("COLLECT"):
                m.d.comb += [
                    self.i.ready.eq((count != lanes) & ~ends & ~self.suspend),
                    self.suspended.eq(rests & ~begun & (left != 0)),
                ]
                with m.If(take):
                    m.d.sync += [row.word_select(count, 8).eq(self.i.payload), count.eq(count + 1), left.eq(left - 1), quiet.eq(0)]
                with m.Elif(begun & (quiet != PATIENCE)):
                    m.d.sync += quiet.eq(quiet + 1)
                with m.If(free & (ends | (count == lanes))):
                    m.d.sync += [
                        self.writable.valid.eq(1), out.data.eq(row), out.byte_count.eq(count), out.first.eq(first), out.last.eq(ends),
                        first.eq(0), count.eq(0),
                    ]  # fmt: skip
                    with m.If(ends):
                        m.next = "TAKE_CHAIN"
        return m


class _Transmit(wiring.Component):
    """Buffers into bytes: a port of :class:`Console`, but for its stop."""

    def __init__(self, *, width):
        self.width = width
        super().__init__({**port_streams(width), "o": Out(stream.Signature(8))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.serializer = serializer = Serializer(width=self.width)
        wiring.connect(m, wiring.flipped(self.readable), serializer.i)
        item = serializer.o
        m.d.comb += [self.writable.payload.first.eq(1), self.writable.payload.last.eq(1), self.o.payload.eq(item.payload.byte)]
        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += self.chains.ready.eq(1)
                with m.If(self.chains.valid):
                    m.next = "GIVE_BYTES"
                    with m.If(self.chains.payload.readable_bytes == 0):
                        m.next = "END_CHAIN"
            with m.State("GIVE_BYTES"):
                m.d.comb += [self.o.valid.eq(item.valid & ~item.payload.end), item.ready.eq(self.o.ready | item.payload.end)]
                with m.If(item.valid & item.payload.end):
                    m.next = "END_CHAIN"
            with m.State("END_CHAIN"):
                m.d.comb += self.writable.valid.eq(1)
                with m.If(self.writable.ready):
                    m.next = "TAKE_CHAIN"
        return m
