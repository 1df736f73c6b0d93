"""Proof of the write path: each request is the piece that the cutter made, none that must not be sent; beside it the planted bugs.

That the pieces are legal, whatever the burst and the limit, is proved in ``test_cutter.py``; here the cutter may make any pieces at all
that keep the limit for which it was asked.
"""

import pytest
from amaranth.hdl import Array, Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ringwall.rtl.spec import pcie
from ringwall.rtl.stream.queue import Queue
from ringwall.rtl.tlp import write_path
from ringwall.rtl.tlp.cutter import Cut, Piece
from ringwall.rtl.tlp.layouts import Burst, BurstStatus
from ringwall.rtl.tlp.write_path import WritePath
from ringwall.sim.formal import check_stream, offered, past, planted, prove, refute_each

WIDTH, DEPTH = 512, 10
LANES = WIDTH // 32
LARGEST_CODE = 2
Request = data.StructLayout({"high": 1, "function": 1, "client": 1, "verdict": BurstStatus, "epoch": 1, "relaxed": 1})
Cutting = data.StructLayout({"place": 12, "length_dw": 11, "first_be": 4, "last_be": 4, "last": 1})


class AnyCutter(wiring.Component):
    """A cutter that makes of each burst any pieces within the limit that it was asked for. The contract gives the next ``choice``."""

    i: In(stream.Signature(Cut()))
    o: Out(stream.Signature(Piece()))
    choice = Signal(Cutting)
    taken = Signal()  # a piece was, this one:
    piece = Signal(Piece())
    limit = Signal(11)  # for which it was asked, in dwords

    def __init__(self, *, largest_code, host_ats):
        self.largest_code, self.host_ats = largest_code, host_ats
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        burst, code, cut = Signal(Burst), Signal(3), Signal(Cutting)
        m.d.comb += [
            self.i.ready.eq(~self.o.valid | (self.taken & cut.last)), self.taken.eq(self.o.valid & self.o.ready), self.piece.eq(self.o.p),
            self.o.p.burst.eq(burst), self.o.p.burst.address.eq(Cat(cut.place, burst.address[12:])),
            Assume(~self.o.valid | ((cut.length_dw != 0) & (cut.length_dw <= self.limit))), self.limit.eq(dwords(code, self.largest_code)),
        ]  # fmt: skip
        m.d.comb += [self.o.p[name].eq(cut[name]) for name in ("length_dw", "first_be", "last_be", "last")]
        with m.If(self.i.ready):
            m.d.sync += [self.o.valid.eq(self.i.valid), burst.eq(self.i.p.burst), code.eq(self.i.p.limit_code)]
        with m.If(self.i.ready | self.taken):
            m.d.sync += cut.eq(self.choice)
        return m


def dwords(code, largest_code=5):
    """Max_Payload_Size of ``code``; a reserved one counts as 0 [PCIe5 7.5.3.4]."""
    return (Const(32, 11) << Mux(code > 5, 0, Mux(code > largest_code, largest_code, code)))[:11]


class WriteContract(wiring.Component):
    """Bursts on both ports; one of them is followed, which alone lies in page 1, and of its pieces one, the ``which``-th.

    Functions cease to be bus masters, and are again, at any time.
    """

    i: In(stream.Signature(Request)).array(2)  # of the wall, of all others
    mark: In(2)
    choice: In(Cutting)
    which: In(2)
    codes: In(3).array(2)  # Max_Payload_Size of each function
    data: In(2)
    live: In(2)
    ready: In(1)

    def __init__(self, make=WritePath):
        self.make = make
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.path = path = self.make(width=WIDTH, clients=2, functions=2, max_payload_code=LARGEST_CODE)
        begun, known = Signal(), Signal()
        codes, which = Array(Signal(3, name=f"code_{n}") for n in range(2)), Signal(2)
        m.d.sync += begun.eq(1)
        m.d.comb += AnyCutter.choice.eq(self.choice)
        with m.If(~begun):
            m.d.sync += [which.eq(self.which), *(its.eq(choice) for its, choice in zip(codes, self.codes))]
        burst, is_wall = Signal(Request), Signal()
        for n, (port, its) in enumerate(zip(self.i, (path.wall, path.gate))):
            offered(m, port)
            r = port.p
            # Decided when it is offered, so that the payload stays put.
            marks, marked, waits = Signal(name=f"marks_{n}"), Signal(name=f"marked_{n}"), Signal(name=f"waits_{n}")
            m.d.sync += [waits.eq(its.valid & ~its.ready), marked.eq(marks)]
            m.d.comb += [
                marks.eq(Mux(waits, marked, self.mark[n])), Assume(~(marks & its.valid) | ~known),
                its.valid.eq(port.valid & begun), port.ready.eq(its.ready & begun), its.p.is_write.eq(1), its.p.cookie.eq(marks),
                its.p.address.eq(Cat(Const(0, 12), marks, Const(0, 19), r.high)), its.p.function.eq(r.function), its.p.client.eq(r.client),
                its.p.verdict.eq(r.verdict), its.p.epoch.eq(r.epoch), its.p.relaxed_ordering.eq(r.relaxed),
                path.data[n].valid.eq(self.data[n]),
                path.config[n].mps_code.eq(codes[n]), path.config[n].relaxed_ordering.eq(1),
            ]  # fmt: skip
            with m.If(its.valid & its.ready & marks):
                m.d.sync += [known.eq(1), burst.eq(r), is_wall.eq(n == 0)]
        m.d.comb += [
            Assume(~(path.wall.valid & path.wall.p.cookie[0] & path.gate.valid & path.gate.p.cookie[0])),
            path.live.eq(self.live), path.posted.ready.eq(self.ready),
        ]  # fmt: skip

        # Its pieces, and the one that is followed.
        made, whole, piece = Signal(4), Signal(), Signal(Piece())
        with m.If(AnyCutter.taken & AnyCutter.piece.burst.cookie[0]):
            m.d.sync += [made.eq(made + 1), whole.eq(AnyCutter.piece.last)]
            with m.If(made == which):
                m.d.sync += piece.eq(AnyCutter.piece)

        limit = dwords(codes[AnyCutter.piece.burst.function], LARGEST_CODE)
        m.d.comb += Assert(~AnyCutter.taken | (AnyCutter.limit == limit), "each burst is cut for its function's limit")

        # The request on the wire.
        o, h = path.posted, path.posted.p.header
        check_stream(m, o, "posted")
        mine, sent, now = Signal(), Signal(4), Signal(4)
        m.d.comb += [mine.eq(o.valid & o.p.first & h.address[12]), now.eq(sent + (mine & self.ready))]
        m.d.sync += sent.eq(now)
        fresh = past(m, ~o.valid | self.ready)  # it is shown for the first time
        for rule, text in (
            (known & (sent < made), "each piece is sent once"),
            ((sent != which) | ((h.length_dw == piece.length_dw) & (h.first_be == piece.first_be) & (h.last_be == piece.last_be)
                                & (h.address == Cat(Const(0, 2), piece.burst.address[2:]))), "bytes and enables are those of the piece"),
            (h.length_dw <= dwords(codes[burst.function]), "no request is longer than Max_Payload_Size"),
            ((h.length_dw != 0) & (h.length_dw <= 32 << LARGEST_CODE), "no request is empty, or longer than the card can"),
            ((h.type == pcie.TYPE_MEMORY) & (h.fmt == Cat(burst.high, 1)), "it is a write with as many dwords of address as it needs"),
            ((h.requester_id[:3] == burst.function) & (h.relaxed_ordering == burst.relaxed), "it is of its burst's function, as it says"),
            (burst.verdict == BurstStatus.OK, "nothing is sent for a verdict other than OK"),
            (~fresh | past(m, self.live).bit_select(burst.function, 1), "no request begins for a function that is no bus master"),
        ):
            m.d.comb += Assert(~mine | rule, text)

        # Its beats.
        inside, left = Signal(), Signal(11)  # of a request that has begun: dwords that are to come
        rest = Mux(o.p.first, h.length_dw, left)
        with m.If(o.valid & self.ready):
            m.d.sync += [inside.eq(~o.p.last), left.eq(rest - o.p.dword_count)]
        m.d.comb += [
            Assert(~inside | o.valid, "a request has no gaps"),
            Assert(~o.valid | (o.p.first == ~inside), "requests do not mix"),
            Assert(~o.valid | ((o.p.dword_count == Mux(rest > LANES, LANES, rest)) & (o.p.last == (rest <= LANES))),
                   "a request is as long as it says"),
        ]  # fmt: skip

        # The end of the burst.
        over, done, p = path.over.valid & path.over.p.cookie[0], Signal(), path.over.p
        m.d.sync += done.eq(done | over)
        refused = burst.verdict != BurstStatus.OK
        for rule, text in (
            (known & ~done & whole, "a burst ends once"),
            (refused | Mux(now == made, p.status == BurstStatus.OK, p.status == BurstStatus.RESET), "OK: all was sent; RESET: not all"),
            (~refused | ((p.status == burst.verdict) & (now == 0)), "what was refused says so"),
            ((p.function == burst.function) & (p.client == burst.client) & (p.epoch == burst.epoch) & (p.is_wall == is_wall),
             "the end is that of its burst"),
        ):  # fmt: skip
            m.d.comb += Assert(~over | rule, text)
        m.d.comb += [
            Assert(~mine | ~done, "nothing of a burst is sent behind its end"),
            Cover(over & (p.status == BurstStatus.OK) & (made == 3) & burst.high, "a burst of three requests is sent"),
            Cover(over & (p.status == BurstStatus.OK) & (piece.length_dw == 33), "a request of three beats"),
            Cover(over & (p.status == BurstStatus.RESET) & ~refused & (now != 0), "a burst is given up"),
            Cover(over & (p.status == BurstStatus.FAULT) & ~is_wall, "a burst was refused"),
        ]
        return m


class QuickQueue(Queue):
    """A short queue that shows what comes at once: what can happen does so soon."""

    def __init__(self, shape, depth, *, in_block=False):
        super().__init__(shape, 2 if depth == 2 else 4, direct=True, in_block=in_block)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Queues that do not decide what a request looks like, any cutter."""
    monkeypatch.setattr(write_path, "Cutter", AnyCutter)
    monkeypatch.setattr(write_path, "Queue", QuickQueue)
    monkeypatch.setattr(write_path, "HEADERS", 2)
    monkeypatch.setattr(write_path, "WAITING_BURSTS", 2)


def test_write_path():
    """FORMAL-WRITE-1: each write request is one piece of the cutter, once and in order, with its length, address and enables; none for a
    verdict other than OK or a function that is no bus master; a burst is done when all was sent, and only then (R05, R18)."""
    # A request leaves 5 cycles after its burst came; the longest here has three beats, and three requests of a burst follow each other.
    prove(WriteContract(), depth=DEPTH)


BUGS = [
    ("codes[burst.function]", "5", "cut for its function's limit"),
    ("h.over.status != BurstStatus.OK", "0", "verdict other than OK|what was refused says so"),
    ("~sending & ~self.live.bit_select(h.over.function, 1)", "0", "no bus master"),
    ("~sending & ~self.live.bit_select(h.over.function, 1)", "~self.live.bit_select(h.over.function, 1)", "has no gaps"),
    ("dropping.eq(drop & ~(final_beat & h.last))", "dropping.eq(drop & ~final_beat)", "bytes and enables|all was sent"),
    ("ending.eq(final_beat & h.last)", "ending.eq(final_beat)", "all was sent|ends once"),
    ("first_be.eq(h.first_be)", "first_be.eq(15)", "bytes and enables"),
    ("last_be.eq(h.last_be)", "last_be.eq(h.first_be)", "bytes and enables"),
    ("(h.length_dw + lanes - 1)", "h.length_dw", "as long as it says"),
    ("is_wall.eq(wall.o.valid)", "is_wall.eq(0)", "that of its burst"),
    ("beats + (shift != 0)", "beats", "has no gaps"),
    ("slot + 2 == slots", "slot + 3 == slots", "has no gaps"),
    ("(shift == 0) & (piece.length_dw <= lanes)", "(piece.length_dw <= lanes)", "has no gaps"),
    ("load & final_beat", "load", "has no gaps"),
    ("end.status.eq(fate)", "end.status.eq(h.over.status)", "all was sent"),
    ("offered & ending & (~o.valid | o.ready)", "offered & ending", "all was sent"),
    ("valid.eq(~drop)", "valid.eq(1)", "verdict other than OK|no bus master"),
    ("h.address[32:].any()", "h.address[33:].any()", "dwords of address"),
]


def test_write_path_bugs():
    """FORMAL-WRITE-2: each planted bug of the write path breaks the assertion that it should."""
    found = refute_each(WriteContract(planted(WritePath, [bug[:2] for bug in BUGS])), len(BUGS), depth=DEPTH)
    missed = [(bug, text) for (*bug, broken), text in zip(BUGS, found, strict=True) if not any(part in text for part in broken.split("|"))]
    assert not missed
