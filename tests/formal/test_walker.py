"""Proof of the walker: each request has one end, walks end, what an invalidation met fills no cache; beside it planted bugs."""

from amaranth.hdl import Assert, Assume, Cat, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.iommu import walker as module
from ringwall.rtl.iommu.contexts import context_layout
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.walker import Walker
from ringwall.rtl.iommu.walker_entry import EntryAtWork
from ringwall.rtl.spec import riscv_iommu as spec
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.formal import mutant, offered, past, planted, prove, refute, refute_each

WAITERS = 2
READS, TABLE_READS = 6, 3  # two levels of directory, a device context, three tables; the tables alone
QUIET = 11  # cycles
DEPTH = 18

Request = data.StructLayout({"mark": 1, "page": 2, "is_write": 1, "is_prefetch": 1, "device_id": 1, "process_id_valid": 1})
Reply = data.StructLayout({"cookie": 1, "data": 64, "status": BurstStatus, "last": 1})


class WalkerContract(wiring.Component):
    """Any requests, contexts, memory and invalidations; follows one request, which ``mark`` picks."""

    i: In(stream.Signature(Request))
    o_ready: In(1)
    retry_ready: In(1)
    read_ready: In(1)
    faults_ready: In(1)
    replies: In(stream.Signature(Reply))
    mode: In(2)
    context: In(context_layout(Features()))
    context_found: In(1)
    forget: In(1)
    forget_tables: In(1)

    def __init__(self, make=Walker, *, walks):
        self.make, self.walks = make, walks
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.walker = walker = self.make(walks=self.walks, waiters=WAITERS, tables=2)
        offered(m, self.i)
        offered(m, self.replies)
        i, asked, reply = walker.i, self.i.payload, self.replies.payload
        replies = walker.memory_read_data
        m.d.comb += [
            i.valid.eq(self.i.valid), self.i.ready.eq(i.ready), i.p.cookie.eq(asked.mark),
            *(i.p[name].eq(asked[name]) for name, _ in Request if name != "mark"),
            replies.valid.eq(self.replies.valid), self.replies.ready.eq(replies.ready),
            *(replies.p[name].eq(reply[name]) for name, _ in Reply),
            walker.o.ready.eq(self.o_ready), walker.retry.ready.eq(self.retry_ready), walker.memory_read.ready.eq(self.read_ready),
            walker.faults.ready.eq(self.faults_ready), walker.mode.eq(self.mode), walker.context.eq(self.context),
            walker.context_found.eq(self.context_found), walker.forget.eq(self.forget),
            walker.forget_tables.eq(self.forget_tables & self.forget),
            Assume((self.context.fsc_mode == spec.MODE_BARE) | (self.context.fsc_mode == spec.MODE_SV39)),  # others are not kept
        ]
        # Memory answers what it was asked; a read is one beat or four.
        reading, beats, of = Signal(self.walks), Signal(2), Signal()
        took = walker.memory_read.valid & walker.memory_read.ready
        with m.If(took):
            m.d.sync += reading.bit_select(walker.memory_read.p.cookie, 1).eq(1)
        with m.If(self.replies.valid & self.replies.ready):
            m.d.sync += [beats.eq(beats + 1), of.eq(reply.cookie)]
            with m.If(reply.last):
                m.d.sync += [reading.bit_select(reply.cookie, 1).eq(0), beats.eq(0)]
        m.d.comb += [
            Assume((beats == 0) | (reply.cookie == of)),
            Assume(~self.replies.valid | reading.bit_select(reply.cookie, 1)), Assume(reply.last | (beats != 3) | ~self.replies.valid),
            Assert(~took | ~reading.bit_select(walker.memory_read.p.cookie, 1), "a walk reads one thing at a time"),
        ]

        # Each request has one end.
        open_ = Signal()
        came = i.valid & i.ready & asked.mark
        o, retry = walker.o, walker.retry
        answered, given_back = o.valid & o.ready & o.p.cookie[0], retry.valid & retry.ready & retry.p.cookie[0]
        with m.If(came):
            m.d.sync += open_.eq(~asked.is_prefetch)
        with m.If(answered | given_back):
            m.d.sync += open_.eq(0)
        m.d.comb += [
            Assume(~(i.valid & asked.mark) | ~open_),
            Assert(~(o.valid & o.p.cookie[0]) | open_, "a request is answered once, a prefetch never"),
            Assert(~(retry.valid & retry.p.cookie[0]) | open_, "what has its answer is not given back, nor a prefetch"),
            Cover(answered & o.p.fault, "a refusal"), Cover(answered & ~o.p.fault & (o.p.size_log2 == 30), "a page of 1 GiB"),
            Cover(given_back, "a request whose page came meanwhile"),
        ]

        # A walk ends: its reads are few, and between them nothing waits but for the outside.
        if self.walks == 1:
            reads, quiet = Signal(range(READS + 2)), Signal(range(QUIET + 2))
            is_mapped = ~o.p.fault & (o.p.size_log2 != 63)
            is_busy, met, needs_new, is_known = Signal(), Signal(), Signal(), Signal()
            was_found = past(m, self.context_found & ~self.forget)
            with m.If(took & (reads != READS + 1)):
                m.d.sync += reads.eq(reads + 1)
            with m.If(walker.begun):
                m.d.sync += [reads.eq(0), is_known.eq(was_found)]
            moves = [port.valid & port.ready for port in (i, o, retry, replies, walker.memory_read)]
            waits = [port.valid & ~port.ready for port in (o, retry, walker.memory_read, walker.faults)]
            m.d.comb += is_busy.eq(open_ & ~Cat(moves, waits, reading.any() & ~replies.valid).any())
            m.d.sync += quiet.eq(Mux(is_busy, Mux(quiet == QUIET + 1, quiet, quiet + 1), 0))
            # What an invalidation met fills no cache, and is nothing for requests that came behind it.
            with m.If(came):
                m.d.sync += needs_new.eq(met)
            with m.If(walker.begun):
                m.d.sync += [met.eq(0), needs_new.eq(0)]
            with m.If(self.forget):
                m.d.sync += met.eq(1)
            m.d.comb += [
                Assert(reads <= Mux(is_known, TABLE_READS, READS), "a walk reads no more than its directories, its context and its tables"),
                Assert(~walker.fill.valid | is_known | (reads > 1), "no walk uses a context that an invalidation met before it began"),
                Assert(quiet <= QUIET, "a walk that waits for nothing goes on"),
                Assert(~walker.fill.valid | ~met, "a walk that an invalidation met fills no IOTLB"),
                Assert(~walker.fill.valid | (walker.fill.p.as_value() == past(m, walker.fill.p.as_value())),
                       "what fills the IOTLB is known a cycle before"),
                Assert(~walker.fill_context.valid | ~met, "a walk that an invalidation met fills no context cache"),
                Assert(~(answered & is_mapped) | ~needs_new, "no request is answered by a walk that an older invalidation met"),
                Cover(answered & is_mapped & met, "a page for a request that came before the invalidation"),
                Cover(walker.fill.valid, "a page for the IOTLB"), Cover(walker.fill_context.valid, "a context"),
            ]
        return m


def test_one_walk():
    """FORMAL-WALK-1: whatever memory, contexts and invalidations do: each request ends once, walks end, fills are no stale ones."""
    prove(WalkerContract(walks=1), depth=DEPTH, mode="prove")


def test_two_walks():
    """FORMAL-WALK-2: two walks, that share a page or the fetch of a context: each request ends once."""
    prove(WalkerContract(walks=2), depth=DEPTH, mode="prove")


BUGS = [
    ("mapped.readable & ~work.is_stale", "mapped.readable", "fills no IOTLB"),
    ("self.fill.valid.eq(~self.forget)", "self.fill.valid.eq(1)", "fills no IOTLB"),
    ("stale.eq(~0)", "stale.eq(stale)", "fills no"),
    ("busy[n] & ~stale[n] & same_page", "busy[n] & same_page", "older invalidation"),
    ("self.context_found & ~self.forget", "self.context_found", "before it began"),
    ("self.o.valid.eq(~subject.is_prefetch)", "self.o.valid.eq(1)", "a prefetch never"),
    ("waiter_at == tails[at]", "0", "answered once"),
    ("self.memory_read_data.ready.eq(1)", "self.memory_read_data.ready.eq(0)", "one thing"),
]


def test_planted_bugs():
    """FORMAL-WALK-3: each planted bug of the walker breaks the assertion that it should."""
    found = refute_each(WalkerContract(planted(Walker, [bug[:2] for bug in BUGS]), walks=1), len(BUGS), depth=DEPTH)
    missed = [(bug, text) for (*bug, broken), text in zip(BUGS, found, strict=True) if broken not in text]
    assert not missed


def test_endless_walk(monkeypatch):
    """FORMAL-WALK-4: a walker that follows pointers below the last level reads too much."""
    monkeypatch.setattr(module, "EntryAtWork", mutant(EntryAtWork, "(level == 0) | entry.N | entry.A", "entry.N | entry.A"))
    assert "no more than" in refute(WalkerContract(walks=1), depth=28)
