"""PASID prefixes of the raw link: out of the line, and into it. [PCIe5 2.2.10.2, 6.20]"""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from .layouts import PasidBeat, RawBeat


class PasidRemover(wiring.Component):
    """Takes the PASID prefix of a TLP out of the line.

    A TLP that begins otherwise passes unchanged, also if it is nothing but a prefix, and so does what follows a PASID prefix: other
    prefixes and second ones are left to whoever takes headers. ``pasid`` is there with every beat.

    Latency: none; 1 cycle for a TLP with a PASID. Throughput: 1 beat per cycle, less one for each such TLP.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.

    Members
    -------
    i, o : ``In(stream.Signature(RawBeat(width)))``, ``Out(stream.Signature(PasidBeat(width)))``
        From the link, to what takes headers.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(RawBeat(width))), "o": Out(stream.Signature(PasidBeat(width)))})

    def elaborate(self, platform):
        m = Module()
        new, out, held = self.i.p, self.o.p, Signal.like(self.i.p)
        holds, is_first, pasid = Signal(), Signal(), Signal(20)  # ``held`` waits for the beat behind it; it is the first one
        begins, ends = Signal(), Signal()
        m.d.comb += [
            begins.eq(~holds & new.first & (new.data[24:32] == pcie.PASID_PREFIX) & new.keep[1]),
            ends.eq(holds & held.last),
            self.o.valid.eq(Mux(holds, ends | self.i.valid, self.i.valid & ~begins)),
            self.i.ready.eq(begins | (self.o.ready & ~ends)),
            out.pasid.valid.eq(holds), out.pasid.value.eq(pasid),
        ]  # fmt: skip
        with m.If(holds):
            m.d.comb += [
                out.data.eq(Cat(held.data[32:], new.data[:32])), out.first.eq(is_first), out.last.eq(ends | (new.last & ~new.keep[1])),
                out.keep.eq(Mux(ends, held.keep >> 1, Cat(held.keep[1:], Const(1)))),
            ]  # fmt: skip
        with m.Else():
            m.d.comb += [getattr(out, name).eq(getattr(new, name)) for name in ("data", "keep", "first", "last")]

        with m.If(self.o.valid & self.o.ready):
            m.d.sync += is_first.eq(0)
            with m.If(out.last):
                m.d.sync += holds.eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += held.eq(new)
            with m.If(begins):
                m.d.sync += [holds.eq(1), is_first.eq(1), pasid.eq(new.data[:20])]
        return m


class PasidInserter(wiring.Component):
    """Puts the PASID prefix of a TLP in front of it.

    Latency: none. Throughput: 1 beat per cycle, less one for each TLP that takes a beat more with its prefix.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.

    Members
    -------
    i, o : ``In(stream.Signature(PasidBeat(width)))``, ``Out(stream.Signature(RawBeat(width)))``
        From what puts headers in, to the link.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(PasidBeat(width))), "o": Out(stream.Signature(RawBeat(width)))})

    def elaborate(self, platform):
        m = Module()
        new, out = self.i.p, self.o.p
        carry, goes_on, flush = Signal(32), Signal(), Signal()  # the dword in front; of the TLP at work; it is all that is left
        begins, turns, spills = Signal(), Signal(), Signal()
        m.d.comb += [
            begins.eq(new.first & new.pasid.valid), turns.eq(begins | (goes_on & ~new.first)), spills.eq(turns & new.last & new.keep[-1]),
            self.o.valid.eq(flush | self.i.valid), self.i.ready.eq(self.o.ready & ~flush),
            out.first.eq(new.first & ~flush), out.last.eq(flush | (new.last & ~spills)),
        ]  # fmt: skip
        with m.If(flush):
            m.d.comb += [out.data.eq(carry), out.keep.eq(1)]
        with m.Elif(turns):
            lead = Mux(begins, Cat(new.pasid.value, Const(0, 4), Const(pcie.PASID_PREFIX, 8)), carry)
            m.d.comb += [out.data.eq(Cat(lead, new.data[:-32])), out.keep.eq(Cat(Const(1), new.keep[:-1]))]
        with m.Else():
            m.d.comb += [out.data.eq(new.data), out.keep.eq(new.keep)]
        with m.If(self.o.ready):
            m.d.sync += flush.eq(0)
            with m.If(self.i.valid & ~flush):
                m.d.sync += [carry.eq(new.data[-32:]), goes_on.eq(turns & ~new.last), flush.eq(spills)]
        return m
