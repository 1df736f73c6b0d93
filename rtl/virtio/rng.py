"""virtio-rng: an entropy source of the user's."""

from dataclasses import dataclass

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.reader import WIDTHS
from ..spec import virtio_rng as spec
from .device import Port, back_end_ports
from .ports import SMALL_READS, join_port, port_streams


@dataclass(frozen=True)
class RngDevice:
    """A virtio-rng device, for a card: the largest size of its queue. [VIRTIO1.4 5.4]"""

    queue_size: int = 64

    device_type = spec.DEVICE_TYPE
    class_code = 0x108000  # other encryption controller
    device_features = 0
    config_bytes = 0

    @property
    def ports(self):
        """The request queue."""
        return (Port((self.queue_size,), waits=True, read_buffer_bytes=SMALL_READS),)

    def back_end(self, width):
        """Return the :class:`Rng`."""
        return Rng(width=width)


class Rng(wiring.Component):
    """Back end of a virtio-rng function: fills buffers with what comes at ``entropy``. [VIRTIO1.4 5.4]

    A buffer is filled whole, but one that is at work when ``suspend`` rises ends with the bytes that it has; it is left as it is
    while it has none. Nothing is kept between buffers: the bytes of a word behind the end of its buffer are thrown away.

    Latency: 1 cycle from entropy to data. Throughput: one word per cycle, one cycle more per chain.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.

    Members
    -------
    entropy : ``In(stream.Signature(width))``
        Random bits; each word is used for one beat of one buffer. It may pause for any time.
    Others
        See :func:`.device.back_end_ports`: one port, which waits.

    Raises
    ------
    :exc:`ValueError`
        If ``width`` is not such a number.
    """

    def __init__(self, *, width):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        self.width = width
        super().__init__({**back_end_ports(width), "entropy": In(stream.Signature(width))})

    def elaborate(self, platform):
        m = Module()
        fill = _Fill(width=self.width)
        join_port(m, self, 0, fill)
        m.d.comb += [
            fill.entropy.valid.eq(self.entropy.valid),
            fill.entropy.payload.eq(self.entropy.payload),
            self.entropy.ready.eq(fill.entropy.ready),
            fill.suspend.eq(self.suspend),
            self.suspended.eq(fill.suspended & self.settled[0]),
            self.stopped.eq(self.port_stopped[0]),
        ]
        return m


class _Fill(wiring.Component):
    """The one port of :class:`Rng`, but for its stop."""

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            **port_streams(width), "entropy": In(stream.Signature(width)), "suspend": In(1), "suspended": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        out, free, left, first = self.writable.payload, Signal(), Signal(32), Signal()
        final, cut, rests = Signal(), Signal(), Signal()
        m.d.comb += [
            self.readable.ready.eq(1),
            free.eq(~self.writable.valid | self.writable.ready),
            final.eq(left <= lanes),
            cut.eq(self.suspend & ~first),
            rests.eq(self.suspend & ~self.writable.valid),
        ]
        with m.If(self.writable.ready):
            m.d.sync += self.writable.valid.eq(0)
        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += [self.chains.ready.eq(~self.suspend), self.suspended.eq(rests)]
                m.d.sync += [left.eq(self.chains.payload.writable_bytes), first.eq(1)]
                with m.If(self.chains.valid & ~self.suspend):
                    m.next = "FILL"
            with m.State("FILL"):
                nothing = left == 0
                m.d.comb += [
                    self.entropy.ready.eq(free & ~nothing & ~self.suspend),
                    self.suspended.eq(rests & first & ~nothing),
                ]
                with m.If(free & (nothing | cut | (self.entropy.valid & ~self.suspend))):
                    m.d.sync += [
                        self.writable.valid.eq(1), out.data.eq(self.entropy.payload), out.first.eq(first), out.last.eq(final | cut),
                        out.byte_count.eq(Mux(cut, 0, Mux(final, left, lanes))), first.eq(0), left.eq(left - lanes),
                    ]  # fmt: skip
                    with m.If(final | cut):
                        m.next = "TAKE_CHAIN"
        return m


class XorShift(wiring.Component):
    """A source of bits that look random and are not: **no entropy, never for keys**. For simulations, and for boards without a source.

    A 64-bit xorshift generator (shifts 13, 7, 17) for each 64 bits of a word, all begun at constants: whoever has seen one word knows
    all that follow, and every power-on gives the same.

    Latency: none. Throughput: one word per cycle.

    Parameters
    ----------
    width : :class:`int`
        Bits of a word: 64, 128, 256 or 512.

    Members
    -------
    o : ``Out(stream.Signature(width))``
        Words, always valid.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"o": Out(stream.Signature(width, always_valid=True))})

    def elaborate(self, platform):
        m = Module()
        states = [Signal(64, init=0x9E3779B97F4A7C15 * (2 * n + 1) % 2**64, name=f"state_{n}") for n in range(self.width // 64)]
        for state in states:
            a = state ^ (state << 13)[:64]
            b = a ^ (a >> 7)
            with m.If(self.o.ready):
                m.d.sync += state.eq(b ^ (b << 17))
        m.d.comb += self.o.payload.eq(Cat(states))
        return m
