"""Proof of the cutter: every piece legal, the pieces of every burst cover it exactly; beside it the planted bugs that it refutes."""

import pytest
from amaranth.hdl import Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.tlp import cutter as module
from ringwall.rtl.tlp.cutter import Cutter
from ringwall.sim.formal import check_stream, mutant, offered, prove, refute

Request = data.StructLayout({"offset": 12, "length_bytes": 13, "code": 3, "page": 2})


class CutterContract(wiring.Component):
    """Follows one burst that ``mark`` picks: what its pieces must be does not depend on how the cutter is made."""

    i: In(stream.Signature(Request))
    ready: In(1)
    abandon: In(1)
    mark: In(1)

    def __init__(self, cutter=Cutter, largest_code=5):
        self.cutter, self.largest_code = cutter, largest_code
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.cutter = cutter = self.cutter(largest_code=self.largest_code)
        offered(m, self.i)
        r = self.i.p
        m.d.comb += [
            # A burst has 1 to 4096 bytes and crosses no 4 KiB boundary: the contract of bursts.
            Assume(~self.i.valid | ((r.length_bytes != 0) & (r.offset + r.length_bytes <= 4096))),
            cutter.i.valid.eq(self.i.valid),
            cutter.i.p.burst.address.eq(Cat(r.offset, r.page)),
            cutter.i.p.burst.length_bytes.eq(r.length_bytes),
            cutter.i.p.limit_code.eq(r.code),
            self.i.ready.eq(cutter.i.ready),
            cutter.o.ready.eq(self.ready),
            cutter.abandon.eq(self.abandon),
        ]
        check_stream(m, cutter.o, "o")

        o, taken = cutter.o.p, cutter.o.valid & self.ready
        over = taken & (o.last | self.abandon)  # of the burst at the output
        accepted = self.i.valid & self.i.ready
        ahead = Signal(3)  # bursts inside
        m.d.sync += ahead.eq(ahead + accepted - over)

        # The burst that is followed: where it ends, its limit, and up to where pieces have come.
        known, before = Signal(), Signal(3)
        at, end, page, limit = Signal(13), Signal(13), Signal(2), Signal(13)
        start = Signal(12)
        code = Mux(r.code > 5, 0, Mux(r.code > self.largest_code, self.largest_code, r.code))
        with m.If(accepted & self.mark & ~known):
            m.d.sync += [known.eq(1), before.eq(ahead - over), at.eq(r.offset), start.eq(r.offset), page.eq(r.page)]
            m.d.sync += [end.eq(r.offset + r.length_bytes), limit.eq((Const(128, 13) << code)[:13])]
        with m.Elif(known & over):
            m.d.sync += [before.eq(before - 1), known.eq(before != 0)]
        mine = known & (before == 0) & cutter.o.valid
        offset, size = o.burst.address[:12], o.burst.length_bytes
        with m.If(mine & self.ready):
            m.d.sync += at.eq(at + size)

        low = offset & (limit - 1)[:12]
        stop = Signal(13)
        m.d.comb += stop.eq(offset + size)
        first_lane, last_lane = offset[:2], (stop - 1)[:2]
        lanes = Signal(4)  # enabled bytes of the last dword, as if it were not the first
        m.d.comb += lanes.eq(Const(15, 4) >> ~last_lane)
        many = o.length_dw > 1
        upward = (Const(15, 4) << first_lane)[:4]
        for rule, text in (
            ((offset == at) & (o.burst.address[12:14] == page), "each piece starts where the one before it ended"),
            ((size != 0) & (size <= limit), "no piece exceeds the limit, none is empty"),
            (low + size <= limit, "no piece crosses a multiple of the limit, so none crosses 4 KiB"),
            (o.last == (stop == end), "the last piece, and no other, ends where the burst ends"),
            (o.last | ((low + size) == limit), "a burst is cut at multiples of the limit only"),
            (o.first == (offset == start), "the first piece, and no other, is marked so"),
            (o.length_dw == ((stop + 3) >> 2) - (offset >> 2), "the dwords are those touched"),
            (o.behind_dw == o.length_dw - 1, "behind the first dword are all others"),
            (o.first_be == Mux(many, upward, upward & lanes), "the first enables are those of the bytes"),
            (o.last_be == Mux(many, lanes, 0), "the last enables are those of the bytes, 0 for one dword"),
        ):
            m.d.comb += Assert(~mine | rule, text)
        m.d.comb += [
            Assert(~cutter.o.valid | (ahead != 0), "no piece is of no burst"),
            Cover(mine & o.last & ~o.first & (size == 1), "a burst ends in a piece of one byte"),
            Cover(mine & taken & o.last & (before == 0) & (ahead == 2), "the next burst is inside when one ends"),
            Cover(mine & taken & self.abandon & ~o.last, "a burst is abandoned"),
        ]
        return m


@pytest.mark.parametrize("largest_code", [5, 1])
def test_cutter(largest_code):
    """FORMAL-CUT-1: for every burst, limit and back-pressure the pieces are legal and cover the burst exactly (R05, R18)."""
    # Every state of the cutter is the start of some burst, or that of a shorter one: five pieces are as good as 32.
    prove(CutterContract(largest_code=largest_code), depth=7)


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("between.eq(~new.address[:12] & mask)", "between.eq(mask)", "crosses a multiple"),
    ("gap.eq(between)", "gap.eq(mask)", "crosses a multiple"),
    ("self.i.valid & ~(is_free & first.is_all)", "self.i.valid", ""),
    ("self.i.valid & ~(is_free & first.is_all)", "self.i.valid & ~first.is_all", ""),
    ("Mux(is_free, first.rest, new.length_bytes)", "first.rest", ""),
    ("Mux(further.is_all, 0, further.rest)", "further.rest", "of no burst"),
    ("offset.eq(first.end)", "offset.eq(new.address[:12])", "starts where"),
    ("offset.eq(further.end)", "offset.eq(offset)", "starts where"),
    ("begun.eq(is_free)", "begun.eq(0)", "the first piece"),
    ("self.o.p.first.eq(idle | ~begun)", "self.o.p.first.eq(~begun)", "the first piece"),
    (", begun.eq(1)]", ", begun.eq(0)]", "the first piece"),
    ("Mux(idle, first.length_dw, further.length_dw)", "first.length_dw", "the dwords"),
    ("Mux(idle, first.behind_dw, further.behind_dw)", "first.behind_dw", "behind the first"),
    ("Mux(idle, first.first_be, further.first_be)", "0xF", "first enables"),
    ("Mux(idle, first.last_be, further.last_be)", "0xF", "last enables"),
    ("with m.If(self.i.p.limit_code > LARGEST_CODE)", "with m.If(self.i.p.limit_code > 7)", "limit"),
    ("(~idle | self.i.valid) & ~dropped &", "(~idle | self.i.valid) &", ""),
    ("with m.Elif(dropped):", "with m.Elif(0):", ""),
    ("~self.o.p.last),", "1),", ""),
])  # fmt: skip
def test_cutter_bugs(old, new, broken):
    """FORMAL-CUT-2: each planted bug of the cutter breaks the assertion that it should."""
    assert broken in refute(CutterContract(mutant(Cutter, old, new)), depth=7)


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("self.rest[-1] | ~self.rest.any()", "length_bytes <= 256", ""),
    ("self.rest[-1] | ~self.rest.any()", "self.rest[-1]", ""),
    ("Mux(self.is_all, length_bytes, gap + 1)", "length_bytes", "crosses a multiple"),
    ("dwords + 1, dwords,", "dwords, dwords,", "the dwords"),
    ("dwords + 1, dwords,", "dwords + 1, 0,", "behind the first"),
    ("Mux(dwords == 0, 0, Const(0xF, 4))", "0xF", "last enables"),
    ("(Const(0xF, 4) << place[:2])[:4]", "0xF", "first enables"),
    ("self.end.eq(place + gap + 1)", "self.end.eq(place + gap)", "starts where"),
])  # fmt: skip
def test_first_piece_bugs(monkeypatch, old, new, broken):
    """FORMAL-CUT-3: so does each of what the first piece of some bytes is."""
    monkeypatch.setattr(module, "_FirstPiece", mutant(module._FirstPiece, old, new))
    assert broken in refute(CutterContract(), depth=7)
