"""Two packets in one beat of the UltraScale+ hard block, apart."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .ultrascale_axis import AxisBeat


@cache
def Straddled(width):
    """One beat of an interface on which a packet may start in the upper half where the one before it has ended in the lower.

    Up to two packets start (``starts``: the first, the second of them; ``upper``: in the upper half) and up to two end (``lanes``: their
    last dwords). ``first_be`` and ``last_be`` belong to the starts in their order. ``discontinue`` is for every packet of the beat.
    """
    pair = data.ArrayLayout
    return data.StructLayout({
        "data": width, "starts": pair(1, 2), "upper": pair(1, 2), "ends": pair(1, 2), "lanes": pair(4, 2),
        "first_be": pair(4, 2), "last_be": pair(4, 2), "discontinue": 1,
    })  # fmt: skip


class Destraddler(wiring.Component):
    """Gives each packet beats of its own, from lane 0.

    Latency: 1 cycle from the beat that completes a beat. Throughput: one beat per cycle; an end in the upper half of a packet that began
    in an upper half takes one more.

    Parameters
    ----------
    width : :class:`int`
        256 or 512.

    Members
    -------
    i : ``In(stream.Signature(Straddled(width)))``
        From the block.
    o : ``Out(stream.Signature(AxisBeat(width)))``
        Packets.
    under_way : ``Out(1)``
        1: the next beat at ``i`` begins inside a packet.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "i": In(stream.Signature(Straddled(width))),
            "o": Out(stream.Signature(AxisBeat(width))),
            "under_way": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, half = self.width // 32, self.width // 64
        beat, out = self.i.payload, self.o.payload
        lower, upper = beat.data[: self.width // 2], beat.data[self.width // 2 :]

        # What starts and ends in each half.
        starts_low, starts_high, ends_low, ends_high = Signal(), Signal(), Signal(), Signal()
        count_low, count_high = Signal(range(half + 1)), Signal(range(half + 1))  # dwords up to the end
        m.d.comb += [
            starts_low.eq(Cat(beat.starts[n] & ~beat.upper[n] for n in range(2)).any()),
            starts_high.eq(Cat(beat.starts[n] & beat.upper[n] for n in range(2)).any()),
        ]
        for n in range(2):
            with m.If(beat.ends[n] & (beat.lanes[n] < half)):
                m.d.comb += [ends_low.eq(1), count_low.eq(beat.lanes[n] + 1)]
            with m.If(beat.ends[n] & (beat.lanes[n] >= half)):
                m.d.comb += [ends_high.eq(1), count_high.eq(beat.lanes[n] + 1 - half)]
        enables = [Cat(beat.first_be[n], beat.last_be[n]) for n in range(2)]
        high_enables = Mux(starts_low, enables[1], enables[0])

        # The upper half of the beat before, and a packet that begins in lane 0 of this one: at most one of them is under way.
        hold, held, hold_enables, hold_discontinue = Signal(self.width // 2), Signal(), Signal(8), Signal()
        active = Signal()
        only_upper = Signal()  # the lower half of this beat is done
        m.d.comb += self.under_way.eq(held | active)

        go, take, send = Signal(), Signal(), Signal()
        count = Signal(range(lanes + 1))
        begins, closes = Signal(), Signal()  # the lower half belongs to a packet; it ends in this output beat
        m.d.comb += [go.eq(~self.o.valid | self.o.ready), self.i.ready.eq(go & take), begins.eq(held | active | starts_low)]

        def keep_upper():
            """Take the beat; its upper half, of a packet that goes on, waits for the next."""
            return [hold.eq(upper), held.eq(1), active.eq(0), hold_enables.eq(high_enables), hold_discontinue.eq(beat.discontinue)]

        with m.If(go):
            m.d.sync += [
                self.o.valid.eq(self.i.valid & send), out.last.eq(closes), out.keep.eq((1 << count) - 1),
                out.data.eq(Mux(only_upper, upper, Mux(held, Cat(hold, lower), beat.data))),
                Cat(out.first_be, out.last_be).eq(Mux(only_upper, high_enables, Mux(held, hold_enables, enables[0]))),
                out.discontinue.eq(beat.discontinue | (held & ~only_upper & hold_discontinue)),
            ]
        with m.If(only_upper):
            m.d.comb += [send.eq(1), closes.eq(1), count.eq(count_high), take.eq(1)]
            with m.If(go & self.i.valid):
                m.d.sync += [only_upper.eq(0), held.eq(0), active.eq(0)]
        with m.Else():
            m.d.comb += [send.eq(begins), closes.eq(begins & ends_low), take.eq(1), count.eq(lanes)]
            with m.If(ends_low):
                m.d.comb += count.eq(Mux(held, half + count_low, count_low))
            with m.Elif(~held & ends_high):
                m.d.comb += [closes.eq(begins), count.eq(half + count_high)]
            upper_goes_on = Mux(begins & ~ends_low, held, starts_high)  # the upper half is not part of this output beat
            with m.If(go & self.i.valid):
                m.d.sync += [held.eq(0), active.eq(begins & ~ends_low & ~ends_high & ~held)]
                with m.If(upper_goes_on & ~ends_high):
                    m.d.sync += keep_upper()
            with m.If(upper_goes_on & ends_high):
                m.d.comb += take.eq(0)
                with m.If(go & self.i.valid):
                    m.d.sync += only_upper.eq(1)
        return m
