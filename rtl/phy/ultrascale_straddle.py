"""Two or four packets in one beat of the UltraScale+ hard block, apart."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .ultrascale_axis import AxisBeat


@cache
def Straddled(width, segments):
    """One beat of an interface on which a packet may start in any of ``segments`` equal parts, behind the end of the one before it.

    Up to ``segments`` packets start (``starts``: the first, the second ...; ``places``: in which part) and as many end (``lanes``: their
    last dwords). ``first_be`` and ``last_be`` belong to the starts in their order. ``discontinue`` is for every packet of the beat.
    """
    each = data.ArrayLayout
    return data.StructLayout({
        "data": width, "starts": each(1, segments), "places": each(2, segments), "ends": each(1, segments), "lanes": each(4, segments),
        "first_be": each(4, segments), "last_be": each(4, segments), "discontinue": 1,
    })  # fmt: skip


class Destraddler(wiring.Component):
    """Gives each packet beats of its own, from lane 0.

    Latency: 1 cycle from the beat that completes a beat. Throughput: one beat per cycle; each packet behind the first that ends in a beat
    takes one more, and so does an end in or behind the part that the packet began in.

    Parameters
    ----------
    width : :class:`int`
        256 or 512.
    segments : :class:`int`
        2, or 4 at 512 bits.

    Members
    -------
    i : ``In(stream.Signature(Straddled(width, segments)))``
        From the block.
    o : ``Out(stream.Signature(AxisBeat(width)))``
        Packets.
    under_way : ``Out(1)``
        1: the beat at ``i`` begins inside a packet.
    """

    def __init__(self, *, width, segments=2):
        self.width, self.segments = width, segments
        super().__init__({
            "i": In(stream.Signature(Straddled(width, segments))),
            "o": Out(stream.Signature(AxisBeat(width))),
            "under_way": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        segments, part = self.segments, self.width // self.segments
        lanes, size = self.width // 32, self.width // 32 // self.segments  # dwords of a beat, of a part
        beat, out = self.i.payload, self.o.payload

        # What starts and ends in each part; how many dwords there are up to the end.
        starts, ends = Signal(segments), Signal(segments)
        counts = [Signal(range(size + 1), name=f"count_{k}") for k in range(segments)]
        enables = [Signal(8, name=f"enables_{k}") for k in range(segments)]
        for k in range(segments):
            for n in range(segments):
                with m.If(beat.starts[n] & (beat.places[n] == k)):
                    m.d.comb += [starts[k].eq(1), enables[k].eq(Cat(beat.first_be[n], beat.last_be[n]))]
                with m.If(beat.ends[n] & (beat.lanes[n] // size == k)):
                    m.d.comb += [ends[k].eq(1), counts[k].eq(beat.lanes[n] % size + 1)]

        def first(bits, floor, name):
            """Return whether one of ``bits`` is 1 from bit ``floor`` on, and which."""
            found, where = Signal(name=f"{name}_found"), Signal(range(segments), name=name)
            for k in reversed(range(segments)):
                with m.If(bits[k] & (k >= floor)):
                    m.d.comb += [found.eq(1), where.eq(k)]
            return found, where

        # The packet under way began in part ``offset`` of a beat; what is not sent of the beat before this one is in ``hold``.
        active, offset, hold, hold_enables, hold_discontinue = Signal(), Signal(range(segments)), Signal(self.width), Signal(8), Signal()
        place = Signal(range(segments + 1))  # parts of this beat that are done
        is_tail = Signal()  # what is left is the end of the packet under way
        continues = Signal()
        m.d.comb += continues.eq(active & ~is_tail)
        has_start, start = first(starts, place, "start")
        begin = Signal(range(segments))  # of what is sent in this cycle, in this beat
        m.d.comb += begin.eq(Mux(is_tail, offset, Mux(active, 0, start)))
        has_end, end = first(ends, begin, "end")
        has_next, following = first(starts, end + 1, "following")
        next_ends, _ = first(ends, following, "following_end")

        go, take, send, closes, keeps, goes_on = Signal(), Signal(), Signal(), Signal(), Signal(), Signal()
        count = Signal(range(lanes + 1))
        m.d.comb += [go.eq(~self.o.valid | self.o.ready), self.i.ready.eq(go & take), count.eq(lanes)]
        upto = Signal(range(lanes + 1))  # dwords of this beat up to the end
        for k in range(segments):
            with m.If(end == k):
                m.d.comb += upto.eq(k * size + counts[k])
        kept = Signal(range(segments))  # part in which what is kept begins
        m.d.comb += kept.eq(Mux(active, offset, start))
        with m.If(continues & (offset != 0) & (~has_end | (end >= offset))):  # its beat is full without an end
            m.d.comb += [send.eq(1), take.eq(~has_end), keeps.eq(~has_end), goes_on.eq(1)]
        with m.Elif((active | has_start) & has_end):
            m.d.comb += [
                send.eq(1), closes.eq(1), count.eq(upto - begin * size + Mux(continues & (offset != 0), lanes - offset * size, 0)),
                take.eq(~has_next | ~next_ends), keeps.eq(has_next & ~next_ends), kept.eq(following),
            ]  # fmt: skip
        with m.Elif(active | has_start):
            m.d.comb += [send.eq((active & (offset == 0)) | (~active & (start == 0))), take.eq(1), keeps.eq(1), goes_on.eq(1)]
        with m.Else():
            m.d.comb += take.eq(1)

        # Parts of two beats in a row, from that in which the packet began.
        window, shifted = Signal(self.width), Signal(self.width)
        with m.Switch(offset):
            for k in range(segments):
                with m.Case(k):
                    m.d.comb += window.eq(Cat(hold, beat.data)[part * k :] if k else beat.data)
        with m.Switch(begin):
            for k in range(segments):
                with m.Case(k):
                    m.d.comb += shifted.eq(beat.data[part * k :])
        with m.If(go):
            m.d.sync += [
                self.o.valid.eq(self.i.valid & send), out.last.eq(closes), out.keep.eq((1 << count) - 1),
                out.data.eq(Mux(continues, window, shifted)),
                Cat(out.first_be, out.last_be).eq(Mux(active, hold_enables, _pick(m, enables, start))),
                out.discontinue.eq(beat.discontinue | (continues & (offset != 0) & hold_discontinue)),
            ]
            with m.If(self.i.valid):
                m.d.sync += [active.eq(goes_on | keeps), is_tail.eq(goes_on & ~take)]
                with m.If(closes):
                    m.d.sync += place.eq(end + 1)
                with m.If(keeps):
                    m.d.sync += [offset.eq(kept), hold_enables.eq(Mux(active & ~closes, hold_enables, _pick(m, enables, kept)))]
                with m.If(take):
                    m.d.sync += [place.eq(0), hold.eq(beat.data), hold_discontinue.eq(beat.discontinue), self.under_way.eq(keeps)]
        return m


def _pick(m, values, index):
    """Return the ``index``-th of ``values``."""
    picked = Signal.like(values[0], name="picked")
    with m.Switch(index):
        for k, value in enumerate(values):
            with m.Case(k):
                m.d.comb += picked.eq(value)
    return picked
