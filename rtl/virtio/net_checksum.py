"""The ones' complement sum of what passes."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out


class Checksum(wiring.Component):
    """Sums the 16-bit words of frames: the byte at an even place is a word's upper one; bytes that are not kept count as 0. [RFC1071]

    Latency: 4 cycles from a frame's last beat at 64 bits, 5 at 128 and 256, 6 at 512. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.

    Members
    -------
    valid : ``In(1)``
        There is a beat.
    beat : ``In(data.StructLayout)``
        ``data``, ``keep`` (a bit per byte), ``first`` and ``last`` of the frame.
    done : ``Out(1)``
        Pulse: ``sum`` is that of a frame.
    sum : ``Out(16)``
        0 and FFFFh are the same number.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "valid": In(1),
            "beat": In(data.StructLayout({"data": width, "keep": width // 8, "first": 1, "last": 1})),
            "done": Out(1),
            "sum": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        kept = [Mux(self.beat.keep[n], self.beat.data.word_select(n, 8), 0) for n in range(self.width // 8)]
        terms, valid, first, last = [Cat(b, a) for a, b in zip(kept[::2], kept[1::2])], self.valid, self.beat.first, self.beat.last
        while len(terms) > 1:
            sums = [sum(terms[n : n + 4]) for n in range(0, len(terms), 4)]
            following = [Signal(value.shape()) for value in sums]
            flags = Signal(3)
            m.d.sync += [*(register.eq(value) for register, value in zip(following, sums)), flags.eq(Cat(valid, first, last))]
            terms, (valid, first, last) = following, flags
        total, folded, stage = Signal(32), Signal(17), Signal(2)  # 64 KiB of FFFFh fit in ``total``
        with m.If(valid):
            m.d.sync += total.eq(Mux(first, 0, total) + terms[0])
        m.d.sync += [
            stage.eq(Cat(valid & last, stage[0])),
            folded.eq(total[:16] + total[16:]),
            self.sum.eq(folded[:16] + folded[16]),
            self.done.eq(stage[1]),
        ]
        return m
