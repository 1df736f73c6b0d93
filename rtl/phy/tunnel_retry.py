"""The retry buffer of the tunnel: TLPs stay until the other side has them."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..stream.ram import Ram
from .tunnel_frames import TlpDword

Ack = data.StructLayout({"valid": 1, "seq": 8})


class Retry(wiring.Component):
    """Numbers TLPs, gives them to the framer, and gives those that are not acknowledged once more when they are missed.

    A TLP is given once it is whole. Those behind one that is given again are given again, too.

    Latency: 3 cycles from the last dword of a TLP to its first. Throughput: 1 dword per cycle in; out, 2 cycles more for each TLP.

    Parameters
    ----------
    depth : :class:`int`
        Dwords that fit: a power of two, from 256 (the longest TLP of the card is 133) to 8192.
    window : :class:`int`
        TLPs that may be unacknowledged: 1, 3, 7, 15, 31, 63 or 127.
    patience_cycles : :class:`int`
        They are given again when for so long nothing was given or newly acknowledged.

    Members
    -------
    i : ``In(stream.Signature(TlpDword))``
        TLPs.
    o : ``Out(stream.Signature(TlpDword))``
        The same, without gaps inside of one.
    seq : ``Out(8)``
        Number of the TLP at ``o``: the first has 0, that behind 255 has 0.
    ack : ``In(Ack)``
        TLPs up to the one in front of ``seq`` are acknowledged. What cannot be, as no such TLP was given, counts for nothing.
    back : ``In(1)``
        Pulse: all that is not acknowledged is to be given again.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is none of these.
    """

    def __init__(self, *, depth=1024, window=31, patience_cycles=5_000_000):
        if depth not in [1 << n for n in range(8, 14)]:
            raise ValueError(f"Depth of a retry buffer must be a power of two between 256 and 8192 dwords, not {depth!r}")
        if window not in [(1 << n) - 1 for n in range(1, 8)]:
            raise ValueError(f"Window must be 1, 3, 7, 15, 31, 63 or 127 TLPs, not {window!r}")
        if patience_cycles not in range(2, 1 << 32):
            raise ValueError(f"Patience for an acknowledgement must be between 2 and 2 ** 32 - 1 cycles, not {patience_cycles!r}")
        self.depth, self.window, self.patience_cycles = depth, window, patience_cycles
        super().__init__({
            "i": In(stream.Signature(TlpDword)), "o": Out(stream.Signature(TlpDword)), "seq": Out(8), "ack": In(Ack), "back": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.dwords = dwords = Ram(shape=TlpDword, depth=self.depth, init=[])
        write, read = dwords.write_port(), dwords.read_port()
        # Where each TLP begins, the next one to come included.
        m.submodules.places = places = Memory(shape=range(2 * self.depth), depth=self.window + 1, init=[])
        place_write, place_read = places.write_port(), places.read_port()

        # Free-running indices of dwords, one bit wider than an address, and numbers of TLPs.
        put, begin, get, kept = (Signal(range(2 * self.depth), name=name) for name in ("put", "begin", "get", "kept"))
        put_seq, highest, acked, kept_seq = (Signal(8, name=name) for name in ("put_seq", "highest", "acked", "kept_seq"))

        # In.
        push, put_next, has_room, may_begin = Signal(), Signal.like(put), Signal(), Signal()
        held, waiting, ends = (put - kept)[: len(put)], (put_seq - kept_seq)[:8], push & self.i.payload.last
        m.d.sync += [  # what is acknowledged in this cycle counts in the next
            has_room.eq(Mux(push, held != self.depth - 1, held != self.depth)),
            may_begin.eq(Mux(ends, waiting != self.window - 1, waiting != self.window)),
        ]
        m.d.comb += [
            self.i.ready.eq(has_room & may_begin),
            push.eq(self.i.valid & self.i.ready), put_next.eq(put + 1),
            write.addr.eq(put), write.data.eq(self.i.payload), write.en.eq(push),
            place_write.addr.eq(put_seq), place_write.data.eq(begin), place_write.en.eq(1),
        ]  # fmt: skip
        with m.If(push):
            m.d.sync += put.eq(put_next)
            with m.If(self.i.payload.last):
                m.d.sync += [begin.eq(put_next), put_seq.eq(put_seq + 1)]

        # What the other side says.
        progress, misses = Signal(), Signal()
        ahead = (self.ack.seq - acked)[:8]
        m.d.comb += progress.eq(self.ack.valid & (ahead != 0) & (ahead <= (highest - acked)[:8]))
        with m.If(progress):
            m.d.sync += acked.eq(self.ack.seq)
        with m.If(self.back):
            m.d.sync += misses.eq(1)

        # Out; between two TLPs the indices follow what was acknowledged, or go back.
        target, pop, get_next = Signal(8), Signal(), Signal.like(get)
        m.d.comb += [
            pop.eq(self.o.valid & self.o.ready), get_next.eq(get + 1),
            read.addr.eq(Mux(pop, get_next, get)), self.o.payload.eq(read.data), place_read.addr.eq(acked),
        ]
        with m.If(pop):
            m.d.sync += get.eq(get_next)
        patience = Signal(range(self.patience_cycles), init=self.patience_cycles - 1)
        with m.If(progress | self.o.valid | (acked == highest)):
            m.d.sync += patience.eq(self.patience_cycles - 1)
        with m.Elif(patience != 0):
            m.d.sync += patience.eq(patience - 1)
        with m.Else():
            m.d.sync += misses.eq(1)
        with m.FSM():
            with m.State("PAUSE"):
                m.d.sync += target.eq(acked)
                with m.If((acked != kept_seq) | misses):
                    m.next = "FOLLOW"
                with m.Elif(self.seq != put_seq):
                    m.next = "GIVE"
            with m.State("FOLLOW"):
                m.d.sync += [kept.eq(place_read.data), kept_seq.eq(target), patience.eq(self.patience_cycles - 1)]
                with m.If(misses | (self.seq - target)[7]):
                    m.d.sync += [get.eq(place_read.data), self.seq.eq(target), misses.eq(self.back)]
                m.next = "PAUSE"
            with m.State("GIVE"):
                m.d.comb += self.o.valid.eq(1)
                with m.If(pop & self.o.payload.last):
                    m.d.sync += self.seq.eq(self.seq + 1)
                    with m.If(self.seq == highest):
                        m.d.sync += highest.eq(highest + 1)
                    m.next = "PAUSE"
        return m
