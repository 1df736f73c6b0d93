"""Proof of the tag table: no tag twice in flight, each request ends once, whatever comes as completions; beside it planted bugs."""

import pytest
from amaranth.hdl import Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.spec import pcie
from ringwall.rtl.tlp import tags as module
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.tlp.tags import TagPool, TagTable
from ringwall.sim.formal import mutant, planted, prove, refute, refute_each

TAGS, WALL_TAGS = 2, 1
DEPTH = 12

# Completions: every field that the table looks at, in as few bits as show its rules.
Beat = data.StructLayout({
    "tag": 2, "high": 2, "requester_id": 1, "byte_count": 3, "lower_address": 3, "length_dw": 2, "status": 3, "has_data": 1, "poisoned": 1,
    "locked": 1, "dword_count": 2, "first": 1, "last": 1,
})  # fmt: skip


class TagContract(wiring.Component):
    """Takes tags, opens requests, feeds any completions at all; follows one tag that ``which`` picks."""

    which: In(1)
    take: In(2)  # from both sets
    lower_address: In(3)
    length_bytes: In(3)
    stop: In(1)
    endless: In(1)  # timeouts are disabled
    ten_bit: In(1)
    atomic: In(1)
    completions: In(stream.Signature(Beat))

    def __init__(self, table=TagTable):
        self.table = table
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.table = table = self.table(width=64, tags=TAGS, wall_tags=WALL_TAGS, rows=TAGS, index_bits=1,
                                                timeout_cycles=32 * TAGS)  # fmt: skip
        table.timeout_cycles = 2  # a tick each cycle: the shortest time that the table counts
        tag, chosen = Signal(), Signal()
        m.d.sync += chosen.eq(1)
        with m.If(~chosen):
            m.d.sync += tag.eq(self.which)

        # One tag at a time; its request is sent in the next cycle.
        wall, short = table.wall_tags, table.short_tags
        m.d.comb += [wall.ready.eq(self.take[0] & chosen), short.ready.eq(self.take[1] & ~self.take[0] & chosen)]
        grant = Signal(module.TagGrant)
        granted = Signal()
        m.d.comb += [granted.eq((wall.valid & wall.ready) | (short.valid & short.ready)), grant.eq(short.payload)]
        with m.If(self.take[0]):
            m.d.comb += grant.eq(wall.payload)
        opened, o = table.opened, table.opened.p
        m.d.sync += [opened.valid.eq(granted), o.tag.eq(grant.tag), o.generation.eq(grant.generation), o.index.eq(grant.tag)]
        m.d.sync += [o.row.eq(grant.tag), o.lower_address.eq(self.lower_address), o.length_bytes.eq(self.length_bytes)]
        m.d.sync += [o.ten_bit.eq(self.ten_bit), o.atomic.eq(self.atomic)]
        m.d.comb += [
            Assume(~self.atomic | ((self.length_bytes == 4) & (self.lower_address[:2] == 0))),  # the smaller of the two that there are
            table.timeouts[0].disable.eq(self.endless),
            Assume((self.length_bytes != 0) & (self.length_bytes <= 6)),  # up to 3 dwords: enough
            table.stop.eq(self.stop),
        ]
        b, c, h = self.completions.p, table.completions, table.completions.p.header
        m.d.comb += [
            c.valid.eq(self.completions.valid), self.completions.ready.eq(c.ready),
            c.p.first.eq(b.first), c.p.last.eq(b.last), c.p.dword_count.eq(b.dword_count),
            h.tag.eq(Cat(b.tag, Const(0, 6), b.high)), h.requester_id.eq(b.requester_id),
            h.byte_count.eq(b.byte_count), h.length_dw.eq(b.length_dw),
            h.lower_address.eq(b.lower_address), h.status.eq(b.status), h.poisoned.eq(b.poisoned),
            h.fmt.eq(b.has_data << pcie.FMT_DATA), h.type.eq(pcie.TYPE_COMPLETION | b.locked),
        ]  # fmt: skip

        # What must hold for the tag.
        ended, e = table.ended.valid & (table.ended.p.index == tag), table.ended.p
        given = granted & (grant.tag == tag)
        held, open_ = Signal(), Signal()  # between being given and the end; since it was opened
        quarantined, excused = Signal(), Signal()  # timed out; something came that may bring it back
        excuse, recent = Signal(), Signal(3)  # the table decides 3 cycles before it says so
        m.d.comb += excuse.eq(self.stop | (c.valid & (b.tag == tag)))
        patient = Signal(8)  # cycles since timeouts were on, or a stop
        m.d.sync += patient.eq(Mux(self.endless & ~self.stop, Cat(1, patient), 0))
        ten_bit, named = Signal(), Signal()  # of the request; a completion came under its name since it was opened
        came = c.valid & c.ready & (b.tag == tag) & ((b.high != 0) == ten_bit) & (~ten_bit | (b.high == 1))
        m.d.sync += recent.eq(Cat(excuse, recent))
        length, place = Signal(4), Signal(3)  # dwords up to the end of the request, from the start of its row
        with m.If(given):
            m.d.sync += [held.eq(1), quarantined.eq(0), excused.eq(0)]
        with m.If(opened.valid & (o.tag == tag)):
            m.d.sync += [ten_bit.eq(o.ten_bit), named.eq(0)]
            m.d.sync += [open_.eq(1), place.eq(o.lower_address), length.eq(o.length_bytes)]
        with m.If(ended):
            m.d.sync += [held.eq(0), open_.eq(0), quarantined.eq(e.status == BurstStatus.TIMEOUT), excused.eq((recent != 0) | excuse)]
        with m.If(quarantined & excuse):
            m.d.sync += excused.eq(1)
        with m.If(open_ & came & b.first):
            m.d.sync += named.eq(1)
        tail = Signal(4)
        m.d.comb += tail.eq((place + length + 3) >> 2)
        s = table.store.p
        stored = table.store.valid & (s.row == tag)
        # The first cycle of a stored beat is the cycle before `ended` at the latest: the request is still open.
        m.d.comb += [
            Assert(~given | ~held, "a tag in flight is not given again"),
            Assert(~ended | open_, "a request ends once"),
            Assert(~(given & quarantined) | excused, "a tag that timed out comes back only with a completion or a stop"),
            Assert(~stored | open_, "data is stored for open requests only"),
            Assert(~stored | (s.position + s.dword_count <= tail), "no data is stored behind the end of a request"),
            Assert(~stored | (s.position >= place[2:]), "no data is stored in front of a request"),
            Assert(~granted | (grant.tag < TAGS), "only tags that exist are given"),
            Assert(~(ended & (e.status == BurstStatus.TIMEOUT)) | ~patient[-1], "no request times out while timeouts are disabled"),
            Assert(~ended | (e.status == BurstStatus.TIMEOUT) | named, "what ends a request has its tag, of 8 bits or of 10"),
            Cover(ended & (e.status == BurstStatus.OK) & ten_bit, "a request with a tag of 10 bits ends well"),
            Cover(ended & (e.status == BurstStatus.OK), "a request ends well"),
            Cover(ended & (e.status == BurstStatus.POISONED), "a request ends poisoned"),
            Cover(ended & (e.status == BurstStatus.CA), "a request ends with CA"),
            Cover(ended & (e.status == BurstStatus.TIMEOUT), "a request times out"),
        ]
        return m


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short times: a timeout of two ticks, as many as the table's arithmetic needs."""
    monkeypatch.setattr(module, "TICKS", 2)
    monkeypatch.setattr(module, "REFUSALS", 2)


def test_tags():
    """FORMAL-TAG-1: under any completions no tag is given twice, each request ends once, no data is stored outside a request."""
    prove(TagContract(), depth=DEPTH)


BUGS = [
    ("end.eq(work.state == State.BUSY)", "end.eq(1)", "ends once"),
    ("saved.failed.eq(0)", "saved.failed.eq(saved.failed)", "ends once|what ends a request"),
    ("~b.too_long", "1", "behind the end"),
    ("~too_many", "1", "behind the end"),
    ("record.position.eq(work.position_then)", "record.position.eq(work.position_then + 1)", "behind the end"),
    ("(work.state == State.BUSY) & ~work.bad", "~work.bad", "open requests only"),
    ("(a.ten_bit == b.ten_bit)", "1", "of 8 bits or of 10"),
    ("found.eq(late & (patience != Patience.ENDLESS))", "found.eq(late)", "while timeouts are disabled"),
    ("b.length_dw == a.length_bytes[2:]", "1", "behind the end"),
    ("~(under_way & (saved.tag == b.tag))", "1", "ends once|open requests only"),
    ("b.probe & ~just_told", "b.probe", "ends once|open requests only"),
    ("~is_opening", "1", "ends once|while timeouts are disabled"),
]


def test_tags_bugs():
    """FORMAL-TAG-2: each planted bug of the tag table breaks the assertion that it should."""
    found = refute_each(TagContract(planted(TagTable, [bug[:2] for bug in BUGS])), len(BUGS), depth=DEPTH)
    missed = [(bug, text) for (*bug, broken), text in zip(BUGS, found, strict=True) if not any(part in text for part in broken.split("|"))]
    assert not missed


@pytest.mark.parametrize(("old", "new", "broken"), [
    ("g.eq(Mux(just_told, told_last, tell_read.data))", "g.eq(tell_read.data)", "for open requests only"),
    ("is_opening.eq(ask.en & (ask.addr == ask_read.addr))", "is_opening.eq(0)", "while timeouts are disabled|ends once"),
    ("[record.state.eq(State.QUARANTINED), enters.eq(1),", "[record.state.eq(State.QUARANTINED), release.eq(1), enters.eq(1),",
     "timed out comes back only"),
])  # fmt: skip
def test_tags_bugs_of_structure(old, new, broken):
    """FORMAL-TAG-4: so does each planted bug that is no expression."""
    found = refute(TagContract(mutant(TagTable, old, new)), depth=DEPTH)
    assert any(text in found for text in broken.split("|")), found


def test_pool_bug(monkeypatch):
    """FORMAL-TAG-3: a pool that hands a tag out twice is noticed."""
    monkeypatch.setattr(module, "TagPool", mutant(TagPool, "new.eq(new + 1), has_new.eq(new != self.count - 1)", "has_new.eq(1)"))
    assert "not given again" in refute(TagContract(), depth=DEPTH)
