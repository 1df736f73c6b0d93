"""Proof of the splitter: every piece legal, the pieces of every segment cover it exactly; beside it the planted bugs that it refutes."""

import pytest
from amaranth.hdl import Assert, C, Cover, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.dma.layouts import Segment
from ringwall.rtl.dma.splitter import DirectSplitter, Splitter
from ringwall.sim.formal import check_stream, mutant, offered, prove, refute

PAGE = 4096  # [PCIe5 2.2.7]


class SplitterContract(wiring.Component):
    """Keeps account of what is owed for the segment that was taken last, and of the ends of lists; all 64 and 32 bits are free."""

    i: In(stream.Signature(Segment))
    ready: In(1)
    stop: In(1)

    def __init__(self, splitter=Splitter, max_burst=64, *, is_direct=False):
        self.splitter, self.max_burst, self.is_direct = splitter, max_burst, is_direct
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.splitter = splitter = self.splitter(max_burst=self.max_burst)
        offered(m, self.i)
        m.d.comb += [
            splitter.i.valid.eq(self.i.valid),
            splitter.i.payload.eq(self.i.payload),
            self.i.ready.eq(splitter.i.ready),
            splitter.o.ready.eq(self.ready),
            splitter.stop.eq(self.stop),
        ]
        check_stream(m, splitter.o, "o")

        r, o = self.i.p, splitter.o.p
        accepted, taken = self.i.valid & self.i.ready, splitter.o.valid & self.ready
        # What is owed of the segment that was taken: the bytes from `at` to `at + owed`, and, where `ends`, one end of a list. Addresses
        # count modulo 2^64.
        debt = data.StructLayout({"at": 64, "owed": 32, "ends": 1, "begun": 3})  # begun: pieces taken of this segment, up to 7
        inside, kept, now = Signal(), Signal(debt), Signal(debt)
        begins = ~self.stop & ((r.length_bytes != 0) | r.last)
        owing = inside
        m.d.comb += now.eq(kept)
        if self.is_direct:  # of the segment that is offered, too
            owing = inside | (self.i.valid & begins)
            with m.If(~inside):
                m.d.comb += [now.at.eq(r.address), now.owed.eq(r.length_bytes), now.ends.eq(r.last), now.begun.eq(0)]
        at, owed, ends, begun = now.at, now.owed, now.ends, now.begun
        with m.If(taken):
            m.d.sync += [
                kept.at.eq(at + o.length_bytes), kept.owed.eq(owed - o.length_bytes), kept.ends.eq(ends),
                kept.begun.eq(begun + (begun != 7)), inside.eq((o.length_bytes != owed) & ~self.stop),
            ]  # fmt: skip
        with m.Elif(accepted):
            m.d.sync += [
                kept.at.eq(r.address), kept.owed.eq(r.length_bytes), kept.ends.eq(r.last), kept.begun.eq(0), inside.eq(begins),
            ]  # fmt: skip
        # Ends of lists that came in, less those that went out or were forgotten.
        open_lists = Signal(2)
        forgotten = taken & self.stop & ends & ~o.last
        m.d.sync += open_lists.eq(open_lists + (accepted & ~self.stop & r.last) - (taken & o.last) - forgotten)

        block, in_page = Signal(14), Signal(14)
        m.d.comb += [block.eq((o.address[:12] & (self.max_burst - 1)) + o.length_bytes), in_page.eq(o.address[:12] + o.length_bytes)]
        shown = splitter.o.valid
        for condition, rule, text in (
            (shown, owing, "no piece without a segment, none after its end, none of a segment that stop dropped"),
            (owing, shown, "a piece is there in each cycle until the segment is covered"),
            (accepted, ~inside, "a segment is taken when the one before it is done"),
            (~inside, self.i.ready, "a segment is taken as soon as the one before it is done"),
            (shown, o.address == at, "each piece starts where the one before it ended"),
            (shown, o.length_bytes <= owed, "no piece reaches beyond its segment"),
            (shown, (o.length_bytes != 0) | ((owed == 0) & ends), "an empty piece does nothing but end a list"),
            (shown, o.length_bytes <= self.max_burst, "no piece exceeds the limit"),
            (shown, block <= self.max_burst, "no piece leaves its block of max_burst bytes"),
            (shown, in_page <= PAGE, "no piece crosses 4 KiB"),
            (shown, (block == self.max_burst) | (o.length_bytes == owed), "a segment is cut at the ends of blocks only"),
            (shown, o.last == (ends & (o.length_bytes == owed)), "the last piece of a list's last segment, and no other, ends the list"),
            (C(1), open_lists == (inside & kept.ends), "each list that is not stopped ends once"),
        ):
            m.d.comb += Assert(~condition | rule, text)
        m.d.comb += [
            Cover(taken & o.last & (begun == 2) & (o.length_bytes == 1), "a third piece of one byte ends a list"),
            Cover(taken & o.last & (o.length_bytes == 0), "an empty segment ends a list"),
            Cover(taken & (in_page == PAGE) & (begun != 0) & (o.length_bytes != owed), "a segment is cut at a page"),
            Cover(forgotten & (begun != 0), "stop forgets the rest of a list"),
            Cover(accepted & self.stop & r.last & (r.length_bytes != 0), "stop drops a whole segment"),
        ]
        return m


@pytest.mark.parametrize("max_burst", [64, 4096])
def test_splitter(max_burst):
    """FORMAL-SPLIT-1: for every segment, back-pressure and stop the pieces are legal and cover it exactly, a list ends once (R12, R14)."""
    # Every state of the splitter is the start of some segment: a few pieces are as good as 2^26.
    prove(SplitterContract(max_burst=max_burst), depth=8)
    prove(SplitterContract(DirectSplitter, max_burst, is_direct=True), depth=8)


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("self.max_burst - segment.address[:block_bits]", "self.max_burst", "leaves its block"),
    ("o.length_bytes.eq(fitting)", "o.length_bytes.eq(room)", "beyond its segment"),
    ("o.length_bytes.eq(fitting)", "o.length_bytes.eq(length_bytes)", "cut at the ends of blocks|leaves its block"),
    ("o.address[block_bits:] + 1", "o.address[block_bits:] + 2", "starts where"),
    ("behind.eq(rest)", "behind.eq(length_bytes)", "beyond its segment|each cycle|without a segment|stop dropped"),
    ("ends_list & fits", "ends_list", "ends the list"),
    ("ends_list & fits", "fits", "ends the list"),
    ("ends.eq(segment.last)", "ends.eq(ends | segment.last)", "ends the list"),
    ("(behind != 0) & ~self.stop", "behind != 0", "stop dropped|as soon as"),
    ("(behind != 0) & ~self.stop", "(behind > self.max_burst) & ~self.stop", "until the segment is covered"),
    ("self.i.valid & ~self.stop & (", "self.i.valid & (", "stop dropped"),
    ("(segment.length_bytes != 0) | segment.last", "segment.length_bytes != 0", "until the segment is covered"),
    ("(segment.length_bytes != 0) | segment.last", "1", "stop dropped"),
    ("with m.Elif(self.o.ready):", "with m.Elif(self.o.ready | self.stop):", "stays until it is taken"),
    ("self.i.ready.eq(~self.o.valid)", "self.i.ready.eq(~self.o.valid & ~self.stop)", "as soon as"),
])  # fmt: skip
def test_splitter_bugs(old, new, broken):
    """FORMAL-SPLIT-2: each planted bug of the splitter breaks the assertion that it should."""
    found = refute(SplitterContract(mutant(Splitter, old, new)), depth=8)
    assert any(text in found for text in broken.split("|")), found


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("room.eq(self.max_burst - iova[: (self.max_burst - 1).bit_length()])", "room.eq(self.max_burst)", "leaves its block"),
    ("step.eq(Mux(left < room, left, room))", "step.eq(room)", "beyond its segment"),
    ("step.eq(Mux(left < room, left, room))", "step.eq(left)", "cut at the ends of blocks|leaves its block"),
    ("address.eq(iova + step)", "address.eq(iova + self.max_burst)", "starts where"),
    ("length_bytes.eq(left - step)", "length_bytes.eq(left - 1)", "beyond its segment|ends the list"),
    ("work.last & (left == step)", "work.last", "ends the list"),
    ("work.last & (left == step)", "(left == step)", "ends the list"),
    ("held.last.eq(work.last)", "held.last.eq(held.last | work.last)", "ends the list"),
    ("(left != step) & ~self.stop", "left != step", "stop dropped|as soon as"),
    ("(left != step) & ~self.stop", "(left > self.max_burst) & ~self.stop", "until the segment is covered"),
    ("self.i.valid & ~self.stop & (", "self.i.valid & (", "stop dropped"),
    ("(left != 0) | work.last", "left != 0", "until the segment is covered"),
    ("(left != 0) | work.last", "1", "stop dropped"),
    ("with m.If(self.o.valid & self.o.ready):", "with m.If(self.o.valid & (self.o.ready | self.stop)):", "stays until it is taken"),
    ("self.i.ready.eq(~busy)", "self.i.ready.eq(~busy & ~self.stop)", "as soon as"),
])  # fmt: skip
def test_direct_splitter_bugs(old, new, broken):
    """FORMAL-SPLIT-3: each planted bug of the direct splitter breaks the assertion that it should."""
    found = refute(SplitterContract(mutant(DirectSplitter, old, new), is_direct=True), depth=8)
    assert any(text in found for text in broken.split("|")), found
