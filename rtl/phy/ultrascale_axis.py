"""Packets of the UltraScale+ hard block: a descriptor, then the payload, dword-aligned; one packet at a time."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out


@cache
def AxisBeat(width):
    """One beat of a packet: dwords from lane 0, descriptor first.

    ``keep`` has one bit per dword: all ones but in the last beat, where it is contiguous from lane 0. ``first_be`` and ``last_be``
    (requests) and ``sequence`` (our requests) count in the first beat, ``discontinue`` in every beat.
    """
    return data.StructLayout({
        "data": width, "keep": width // 32, "first": 1, "last": 1, "first_be": 4, "last_be": 4, "sequence": 6, "discontinue": 1,
    })  # fmt: skip


@cache
def DescribedBeat(width):
    """One beat of a packet's payload, from lane 0, the descriptor and its byte enables beside it.

    As :func:`..tlp.layouts.TlpBeat`. ``discontinue`` counts with ``last``: it was set in any of the packet's beats.
    """
    return data.StructLayout({
        "descriptor": 128, "first_be": 4, "last_be": 4,
        "data": width, "dword_count": range(width // 32 + 1), "first": 1, "last": 1, "discontinue": 1,
    })  # fmt: skip


class Unpacker(wiring.Component):
    """Takes descriptors out of the line: beats of packets in, beats of payload out.

    A packet that ends inside its descriptor vanishes with a pulse of ``malformed``. The length in the descriptor is not looked at.

    Latency: 1 cycle from the beat that completes a beat of payload; 2 for the last. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    size : :class:`int`
        Dwords of a descriptor, 3 or 4.

    Members
    -------
    i : ``In(stream.Signature(AxisBeat(width)))``
        Packets; ``first`` is not looked at.
    o : ``Out(stream.Signature(DescribedBeat(width)))``
        Payload; ``descriptor``, ``first_be`` and ``last_be`` hold for every beat.
    malformed : ``Out(1)``
        Pulse.
    """

    def __init__(self, *, width, size):
        self.width, self.size = width, size
        super().__init__({
            "i": In(stream.Signature(AxisBeat(width))),
            "o": Out(stream.Signature(DescribedBeat(width))),
            "malformed": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 32
        pure, shift = divmod(self.size, lanes)  # beats of nothing but descriptor; lanes of descriptor in the beat behind them
        end = pure + (shift > 0)  # beats that hold any of it
        beat, out = self.i.payload, self.o.payload

        index = Signal(range(end + 1))  # of the beat at ``i`` in its packet
        known, described = Signal(128), Signal(128)  # descriptor so far, and with this beat
        enables, described_enables = Signal(8), Signal(8)
        hold = Signal(self.width)  # payload that waits for the next beat, from lane 0
        begun, flush, flush_count, discontinued = Signal(), Signal(), Signal(range(lanes + 1)), Signal()
        kept = Signal(range(lanes + 1))
        m.d.comb += [
            kept.eq(sum(beat.keep[n] for n in range(lanes))),
            described.eq(known),
            described_enables.eq(Mux(index == 0, Cat(beat.first_be, beat.last_be), enables)),
        ]
        for n in range(self.size):
            with m.If(index == n // lanes):
                m.d.comb += described.word_select(n, 32).eq(beat.data.word_select(n % lanes, 32))

        go, take = Signal(), Signal()
        m.d.comb += [
            go.eq(~self.o.valid | self.o.ready),
            self.i.ready.eq(go & ~flush),
            take.eq(self.i.valid & self.i.ready),
        ]
        opens = index < end  # the beat holds some of the descriptor
        closes = (index == end - 1) & (kept >= (shift or lanes))  # all that was missing of it
        fresh = Mux(opens, kept - shift, kept) if shift else kept  # payload dwords of this beat
        total = Signal(range(2 * lanes + 1))  # dwords to send: those held, and this beat's
        m.d.comb += total.eq(Mux(opens, fresh if shift else 0, fresh + (lanes - shift if shift else 0)))
        joined = Cat(hold[: self.width - 32 * shift], beat.data) if shift else beat.data

        with m.If(go):
            m.d.sync += [self.o.valid.eq(0), out.descriptor.eq(described), Cat(out.first_be, out.last_be).eq(described_enables)]
            with m.If(flush):
                m.d.sync += [
                    self.o.valid.eq(1), out.data.eq(hold), out.dword_count.eq(flush_count), out.first.eq(0), out.last.eq(1), flush.eq(0),
                    out.descriptor.eq(out.descriptor), Cat(out.first_be, out.last_be).eq(Cat(out.first_be, out.last_be)),
                ]
        with m.If(take):
            any_discontinue = beat.discontinue | (discontinued & (index != 0))
            m.d.sync += [
                known.eq(described), enables.eq(described_enables), discontinued.eq(any_discontinue),
                hold.eq(beat.data >> 32 * shift), out.discontinue.eq(any_discontinue),
                out.data.eq(Mux(opens, beat.data >> 32 * shift, joined)),
                out.dword_count.eq(Mux(total < lanes, total, lanes)),
                index.eq(Mux(beat.last, 0, Mux(index == end, end, index + 1))),
                begun.eq(~beat.last & ~opens),
                out.first.eq(opens | ~begun), out.last.eq(beat.last & (total <= lanes)),
            ]
            with m.If(opens):
                m.d.sync += self.o.valid.eq(beat.last & closes)
                m.d.comb += self.malformed.eq(beat.last & ~closes)
            with m.Else():
                m.d.sync += [self.o.valid.eq(1), flush.eq(beat.last & (total > lanes)), flush_count.eq(total - lanes)]
        return m


class Packer(wiring.Component):
    """Puts descriptors back in line: beats of payload in, beats of packets out.

    Latency: 1 cycle. Throughput: one packet beat per cycle: a packet of N dwords, descriptor included, takes the beats that N dwords
    fill; while its input does not pause, it has no bubbles.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    size : :class:`int`
        Dwords of a descriptor, 3 or 4.

    Members
    -------
    i : ``In(stream.Signature(DescribedBeat(width)))``
        Payload; descriptor and byte enables count with ``first``. ``discontinue`` is not looked at.
    sequence : ``In(6)``
        Beside ``i``, with ``first``.
    o : ``Out(stream.Signature(AxisBeat(width)))``
        Packets.
    """

    def __init__(self, *, width, size):
        self.width, self.size = width, size
        super().__init__({
            "i": In(stream.Signature(DescribedBeat(width))),
            "sequence": In(6),
            "o": Out(stream.Signature(AxisBeat(width))),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 32
        pure, shift = divmod(self.size, lanes)
        beat, out = self.i.payload, self.o.payload

        sent = Signal(range(pure + 1))  # beats of nothing but descriptor that have left
        carry = Signal(128)  # dwords of the last beat that did not fit
        flush, flush_count = Signal(), Signal(range(lanes + 1))
        lead, joined = Signal(128), Signal(self.width + 32 * shift)
        total = Signal(range(2 * lanes + 1))
        m.d.comb += [
            lead.eq(Mux(beat.first, beat.descriptor[32 * lanes * pure :] if pure * lanes < 4 else 0, carry)),
            joined.eq(Cat(lead[: 32 * shift], beat.data)),
            total.eq(beat.dword_count + shift),
        ]
        go, heading, headless = Signal(), Signal(), Signal()
        m.d.comb += [
            go.eq(~self.o.valid | self.o.ready),
            heading.eq(beat.first & (sent != pure)),
            # The last beat of nothing but descriptor is also the packet's.
            headless.eq((beat.last & (beat.dword_count == 0) & (sent + 1 == pure)) if shift == 0 else 0),
            self.i.ready.eq(go & ~flush & (~heading | headless)),
        ]

        def ones(count):
            return (1 << count) - 1

        with m.If(go):
            m.d.sync += [
                self.o.valid.eq(0), out.first_be.eq(beat.first_be), out.last_be.eq(beat.last_be), out.sequence.eq(self.sequence),
            ]
            with m.If(flush):
                m.d.sync += [
                    self.o.valid.eq(1), out.data.eq(carry), out.keep.eq(ones(flush_count)), out.first.eq(0), out.last.eq(1), flush.eq(0),
                ]
            with m.Elif(self.i.valid & heading):
                m.d.sync += [
                    self.o.valid.eq(1), out.keep.eq(ones(lanes)), out.first.eq(sent == 0), out.last.eq(headless),
                    sent.eq(Mux(headless, 0, sent + 1)),
                ]
                for n in range(pure):
                    with m.If(sent == n):
                        m.d.sync += out.data.eq(beat.descriptor[self.width * n :][: self.width])
            with m.Elif(self.i.valid):
                m.d.sync += [
                    self.o.valid.eq(1), out.data.eq(joined), out.first.eq(beat.first & (pure == 0)),
                    out.last.eq(beat.last & (total <= lanes)), out.keep.eq(ones(Mux(total < lanes, total, lanes))),
                    carry.eq(joined[self.width :]), sent.eq(0), flush.eq(beat.last & (total > lanes)), flush_count.eq(total - lanes),
                ]
        return m
