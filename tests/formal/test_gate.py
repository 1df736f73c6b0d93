"""Proof of the gate: nothing leaves untranslated, nothing leaves twice, a fence waits for all that is older; beside it planted bugs."""

import pytest
from amaranth.hdl import Array, Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In

from ringwall.rtl.iommu.gate import Gate
from ringwall.rtl.tlp.layouts import AtomicKind, Burst, BurstStatus
from ringwall.sim.formal import check_stream, mutant, offered, past, planted, prove, refute, refute_each

CLIENTS, FUNCTIONS, SLOTS = 2, 2, 2
PLACES = CLIENTS * SLOTS

# Of every field as many bits as show where it goes: of addresses both sides of the border between page and offset, and the highest.
Place = data.StructLayout({"offset": 1, "page": 2})
Request = data.StructLayout({
    "function": 1, "place": Place, "length": 1, "is_write": 1, "atomic": 2, "pasid_valid": 1, "pasid": 1, "relaxed_ordering": 1,
    "no_snoop": 1, "cookie": 1, "noise": 1,
})  # fmt: skip
Answer = data.StructLayout({"valid": 1, "cookie": 2, "fault": 1, "readable": 1, "writable": 1, "page": 2})
Hinted = data.StructLayout({"valid": 1, "function": 1, "is_write": 1, "page": 2})
Retired = data.StructLayout({"valid": 1, "function": 1, "epoch": 1, "is_followed": 1})


def _spread(place):
    """The address with the bits of ``place``."""
    return Cat(Const(0, 11), place.offset, place.page[0], Const(0, 50), place.page[1])


class GateContract(wiring.Component):
    """Bursts of two clients and two functions, a translator that answers what it was asked in any order with anything, any bypass.

    One burst that ``mark`` picks is followed. ``fields`` of bursts are free, the others 0.
    """

    fields = tuple(name for name, _ in Request)

    i: In(stream.Signature(Request)).array(CLIENTS)
    client: In(1)  # whose burst is followed from now
    mark: In(1)
    ready: In(2)  # of translator and requester
    answer: In(Answer)
    hint: In(Hinted)  # all of them are the same
    spare: In(1)
    bypass: In(FUNCTIONS)
    buses: In(FUNCTIONS)  # a bit of the bus number of each function
    fence: In(1)
    fenced_ready: In(1)
    retired: In(Retired).array(2)

    def __init__(self, make=Gate):
        self.make = make
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate = gate = self.make(clients=CLIENTS, functions=FUNCTIONS, depth=SLOTS, count_bits=2)
        o, asks = gate.o, gate.translate_request
        came = Signal(CLIENTS)
        for n, (port, its) in enumerate(zip(self.i, gate.bursts)):
            offered(m, port)
            r = Signal(Request, name=f"offered_{n}")
            m.d.comb += [r[name].eq(port.p[name]) for name in self.fields]
            m.d.comb += [
                its.valid.eq(port.valid), port.ready.eq(its.ready), came[n].eq(port.valid & port.ready),
                its.p.address.eq(_spread(r.place)), its.p.length_bytes.eq(r.length), its.p.function.eq(r.function),
                its.p.is_write.eq(r.is_write), its.p.atomic.eq(r.atomic), its.p.pasid_valid.eq(r.pasid_valid), its.p.pasid.eq(r.pasid),
                its.p.relaxed_ordering.eq(r.relaxed_ordering), its.p.no_snoop.eq(r.no_snoop), its.p.cookie.eq(r.cookie),
                its.p.client.eq(r.noise), its.p.is_wall.eq(r.noise), its.p.verdict.eq(r.noise), its.p.epoch.eq(r.noise),
            ]  # fmt: skip
        a, response = self.answer, gate.translate_response
        m.d.comb += [
            gate.spare.eq(self.spare), gate.bypass.eq(self.bypass),
            gate.config[0].bus.eq(self.buses[0]), gate.config[1].bus.eq(self.buses[1]),
            asks.ready.eq(self.ready[0]), o.ready.eq(self.ready[1]),
            response.valid.eq(a.valid), response.p.cookie.eq(a.cookie), response.p.fault.eq(a.fault),
            response.p.readable.eq(a.readable), response.p.writable.eq(a.writable),
            response.p.page.eq(Cat(a.page[0], Const(0, 50), a.page[1])),
            gate.fence.valid.eq(self.fence), gate.fenced.ready.eq(self.fenced_ready),
        ]  # fmt: skip
        m.d.comb += Assume(~past(m, gate.fence.valid & ~gate.fence.ready) | self.fence)
        for over, port in zip(self.retired, (gate.retired_reads, gate.retired_writes)):
            m.d.comb += [port.valid.eq(over.valid), port.p.function.eq(over.function), port.p.epoch.eq(over.epoch)]

        # Hints: any page and function, but the same all the time.
        hint, same = gate.hints, Signal(Hinted)
        m.d.sync += same.eq(self.hint)
        begun = past(m, Const(1, 1))
        m.d.comb += [
            hint.valid.eq(self.hint.valid), hint.p.function.eq(self.hint.function), hint.p.is_write.eq(self.hint.is_write),
            hint.p.page.eq(Cat(self.hint.page[0], Const(0, 50), self.hint.page[1])),
            Assume(~begun | (same.as_value()[1:] == self.hint.as_value()[1:])),
        ]

        # Cookies whose answer has not come; an answer may come in the cycle of its question.
        asked = asks.valid & asks.ready & ~asks.p.is_prefetch
        waiting, open_ = Signal(PLACES), Signal(PLACES)
        m.d.comb += [
            open_.eq(waiting | Mux(asked, 1 << asks.p.cookie[:2], 0)),
            Assume(~a.valid | open_.bit_select(a.cookie, 1)),
        ]
        m.d.sync += waiting.eq(open_ & ~Mux(a.valid, 1 << a.cookie, 0))

        # The burst that is followed, and how many of its client leave before it does.
        entry = Array(port.p for port in self.i)[self.client]
        starts, known, gone = Signal(), Signal(), Signal()
        burst, its_client, ahead = Signal(Request), Signal(), Signal(3)
        left, went = o.valid & o.ready, Signal(CLIENTS)
        inside = [Signal(3, name=f"inside_{n}") for n in range(CLIENTS)]
        for n in range(CLIENTS):
            m.d.comb += went[n].eq(left & (o.p.client == n + 1))
            m.d.sync += inside[n].eq(inside[n] + came[n] - went[n])
            m.d.comb += Assert(~(o.valid & (o.p.client == n + 1)) | (inside[n] != 0), "what leaves has entered, and leaves once")
        m.d.comb += starts.eq(came.bit_select(self.client, 1) & self.mark & ~known)
        mine = Signal()
        m.d.comb += mine.eq(o.valid & known & ~gone & (ahead == 0) & (o.p.client == its_client + 1))
        with m.If(starts):
            m.d.sync += [known.eq(1), burst.eq(entry), its_client.eq(self.client)]
            m.d.sync += ahead.eq(Array(inside)[self.client] - went.bit_select(self.client, 1))
        with m.Elif(went.bit_select(its_client, 1)):
            m.d.sync += [ahead.eq(ahead - 1), gone.eq(gone | mine)]
        check_stream(m, o, "o")
        m.d.comb += Assert(~o.valid | (o.p.client == 1) | (o.p.client == 2), "what leaves is some client's")
        self.check(m, gate, came, asked, waiting, starts, entry, burst, mine, gone)
        return m


class VerdictContract(GateContract):
    """What becomes of a burst: bursts may be retired that never were, fences come at any time."""

    def check(self, m, gate, came, asked, waiting, starts, entry, burst, mine, gone):
        o, asks, a = gate.o, gate.translate_request, self.answer
        check_stream(m, asks, "translate_request")
        passes = Signal(CLIENTS)
        for n, port in enumerate(self.i):
            m.d.comb += passes[n].eq(self.bypass.bit_select(port.p.function, 1))

        # Requests come in the order in which the bursts entered that need one.
        owed, questions = Signal(2), Signal(2)  # of all; up to that of the burst that is followed
        m.d.sync += owed.eq(owed + (came[0] & ~passes[0]) + (came[1] & ~passes[1]) - asked)
        bypassed, bus, answered, verdict, cookie = Signal(), Signal(), Signal(), Signal(Answer), Signal(2)
        demand, its = Signal(), Signal()
        m.d.comb += [demand.eq(asks.valid & ~asks.p.is_prefetch), its.eq(demand & (questions == 1))]  # its request
        with m.If(starts):
            m.d.sync += [bypassed.eq(passes.bit_select(self.client, 1)), bus.eq(self.buses.bit_select(entry.function, 1))]
            m.d.sync += questions.eq(Mux(passes.bit_select(self.client, 1), 0, owed - asked + 1))
        with m.Elif(asked & (questions != 0)):
            m.d.sync += questions.eq(questions - 1)
        waits = Signal()  # its request was taken
        with m.If(its & asked):
            m.d.sync += [cookie.eq(asks.p.cookie), waits.eq(1)]
        with m.If(a.valid & ((waits & (a.cookie == cookie)) | (its & asked & (a.cookie == asks.p.cookie)))):
            m.d.sync += [waits.eq(0), answered.eq(1), verdict.eq(a)]
        ask = asks.p
        reads, writes = ~burst.is_write, burst.is_write | (burst.atomic != AtomicKind.NONE)
        for rule, text in (
            (ask.device_id == Cat(burst.function, Const(0, 7), bus), "the device is that of the burst's function"),
            (Cat(ask.offset, ask.page) == _spread(burst.place),
             "the page asked for is the burst's"),
            ((ask.process_id_valid == burst.pasid_valid) & (ask.process_id == (burst.pasid & burst.pasid_valid)),
             "the process is the burst's"),
            (ask.is_write == writes, "what changes memory asks for a write"),
            (~ask.privileged & ~ask.execute, "nothing else is asked for"),
        ):  # fmt: skip
            m.d.comb += Assert(~its | rule, text)
        hint, hints, prefetch, prefetch_bus, is_second = self.hint, Signal(2), Signal(), Signal(), Signal()
        takes = gate.hints.valid & gate.hints.ready & ~self.bypass.bit_select(hint.function, 1)
        m.d.comb += prefetch.eq(asks.valid & ask.is_prefetch)
        m.d.sync += [
            hints.eq(hints + takes - (prefetch & asks.ready)), is_second.eq(is_second | (prefetch & asks.ready)),
            prefetch_bus.eq(Mux(prefetch & ~asks.ready, prefetch_bus, self.buses.bit_select(hint.function, 1))),
        ]
        allowed = Signal()
        m.d.comb += allowed.eq(answered & ~verdict.fault & (verdict.readable | ~reads) & (verdict.writable | ~writes))
        ok, own = o.p.verdict == BurstStatus.OK, o.p.address == _spread(burst.place)
        translated = o.p.address == Cat(Const(0, 11), burst.place.offset, verdict.page[0], Const(0, 50), verdict.page[1])
        unchanged = Signal(Burst)  # but address and verdict
        m.d.comb += [
            unchanged.length_bytes.eq(burst.length), unchanged.function.eq(burst.function), unchanged.is_write.eq(burst.is_write),
            unchanged.atomic.eq(burst.atomic), unchanged.relaxed_ordering.eq(burst.relaxed_ordering),
            unchanged.no_snoop.eq(burst.no_snoop), unchanged.cookie.eq(burst.cookie), unchanged.address.eq(o.p.address),
            unchanged.verdict.eq(o.p.verdict), unchanged.client.eq(o.p.client), unchanged.epoch.eq(o.p.epoch),
        ]  # fmt: skip
        for rule, text in (
            (~ok | bypassed | allowed, "OK needs a permission that was given for this burst, or the bypass when it entered"),
            (~ok | bypassed | translated, "the address is the one that was given for this burst"),
            (~bypassed | (ok & own), "a bypassed burst leaves as it came"),
            (ok | (~allowed & own & (o.p.verdict == BurstStatus.FAULT)), "what is refused has a reason, FAULT, and its own address"),
            (bypassed | answered, "no burst leaves before its answer"),
            (o.p == unchanged, "nothing else of a burst changes, and it is not the wall's"),
        ):
            m.d.comb += Assert(~mine | rule, text)
        m.d.comb += [
            Assert(demand == ((owed != 0) & ~prefetch), "one request for each burst that needs one, behind the prefetch that is there"),
            Assert(~demand | ((asks.p.cookie < PLACES) & ~waiting.bit_select(asks.p.cookie[:2], 1)), "no cookie names two requests"),
            Assert(~prefetch | (hints != 0), "one prefetch for a hint"),
            Assert(~prefetch | ((ask.device_id == Cat(hint.function, Const(0, 7), prefetch_bus)) & (ask.is_write == hint.is_write)
                                & (ask.page == Cat(hint.page[0], Const(0, 50), hint.page[1])) & ~ask.process_id_valid),
                   "a prefetch is the hint's"),
            Assert(~prefetch | past(m, Mux(prefetch, ~asks.ready, self.spare)),
                   "prefetches come one by one, when there is something to spare"),
            Cover(prefetch & is_second, "two prefetches"),
            Cover(prefetch & past(m, demand), "a prefetch behind a request"),
            Cover(mine & ~bypassed & ok & (burst.atomic == AtomicKind.CAS), "an AtomicOp leaves translated"),
            Cover(mine & answered & ~verdict.fault & ~ok, "a permission was missing"),
            Cover(mine & bypassed & ~self.bypass.any() & (o.p.client == 2), "the bypass is gone when the burst leaves"),
        ]  # fmt: skip


class FenceContract(GateContract):
    """Bursts that left are retired once each, as they say, in any order; fences come at any time."""

    fields = ("function",)

    def check(self, m, gate, came, asked, waiting, starts, entry, burst, mine, gone):
        o = gate.o
        left, over = o.valid & o.ready, self.retired
        # Bursts that left and are not retired: the one that is followed, all others by function and epoch.
        retired, now_gone, function, epoch = Signal(), Signal(), Signal(), Signal()
        m.d.comb += now_gone.eq(gone | (mine & left))
        with m.If(mine):
            m.d.sync += [function.eq(o.p.function), epoch.eq(o.p.epoch)]
        its_function, its_epoch = Mux(gone, function, o.p.function), Mux(gone, epoch, o.p.epoch)
        ends = [port.valid & port.is_followed for port in over]
        m.d.comb += Assume(~(ends[0] & ends[1]))
        for port, end in zip(over, ends):
            m.d.comb += Assume(~end | (now_gone & ~retired & (port.function == its_function) & (port.epoch == its_epoch)))
        m.d.sync += retired.eq(retired | ends[0] | ends[1])
        for f in range(FUNCTIONS):
            for e in range(2):
                count, rest = Signal(3, name=f"left_{f}_{e}"), Signal(3, name=f"rest_{f}_{e}")
                m.d.comb += rest.eq(count + (left & ~mine & (o.p.function == f) & (o.p.epoch == e)))
                gives = [port.valid & ~port.is_followed & (port.function == f) & (port.epoch == e) for port in over]
                m.d.comb += Assume(gives[0] + gives[1] <= rest)
                m.d.sync += count.eq(rest - gives[0] - gives[1])

        accepted, answered = gate.fence.valid & gate.fence.ready, gate.fenced.valid & gate.fenced.ready
        pending, older, newer = Signal(), Signal(), Signal()  # a fence; what is followed entered before it, or behind it
        known = Signal()
        m.d.sync += known.eq(known | starts)
        with m.If(accepted):
            m.d.sync += [pending.eq(1), older.eq((known | starts) & ~(retired | ends[0] | ends[1])), newer.eq(0)]
        with m.Else():
            with m.If(pending & starts):
                m.d.sync += newer.eq(1)
            with m.If(answered):
                m.d.sync += pending.eq(0)
        check_stream(m, gate.fenced, "fenced")
        m.d.comb += [
            Assert(~gate.fenced.valid | pending, "each fence is answered once"),
            Assert(~(gate.fence.ready & pending), "one fence at a time"),
            Assert(~(gate.fenced.valid & older & ~retired), "a fence ends when what entered before it is retired"),
            Cover(answered & older & gone, "a fence waited for a burst"),
            Cover(answered & newer & ~gone, "a fence did not wait for a burst behind it"),
        ]


def test_gate():
    """FORMAL-GATE-1: a burst leaves with OK only by the answer to its own request or its bypass, with that address; nothing else of it
    changes, it leaves once and in its client's order; requests ask for what the burst does, prefetches for what a hint says (R22)."""
    # A burst leaves 2 cycles after it came at the soonest: in 8 cycles each slot of a client is used again, by a third and a fourth burst.
    prove(VerdictContract(), depth=8)


def test_fences():
    """FORMAL-GATE-2: a fence ends only when every burst that entered before it is retired, whatever entered behind it."""
    # A fence ends 4 cycles after it came at the soonest: in 9 a second one ends, and what began in its first cycle can have left.
    prove(FenceContract(), depth=9)


VERDICT_BUGS = [
    ("~verdict.fault", "1", "OK needs"),
    ("(verdict.writable | ~writes)", "1", "OK needs"),
    ("(verdict.readable | ~reads)", "1", "OK needs"),
    ("writes.eq(burst_out.data.is_write | (burst_out.data.atomic != AtomicKind.NONE))", "writes.eq(burst_out.data.is_write)", "OK needs"),
    ("is_write.eq(entry.is_write | (entry.atomic != AtomicKind.NONE))", "is_write.eq(entry.is_write)", "asks for a write"),
    ("(bypassed[n].bit_select(slot, 1) & ~answered)", "bypassed[n].bit_select(slot, 1)", "OK needs|is the one that was given"),
    ("decided[n][at].eq(0)", "decided[n][at].eq(1)", "leaves as it came|before its answer|has entered"),
    ("self.bypass.bit_select(function, 1) if self.has_iommu and n not in self.messages else 1", "self.bypass[0]",
     "one request for each|leaves as it came|OK needs"),
    ("page.eq(entry.address[12:])", "page.eq(entry.address[11:])", "page asked for"),
    ("offset.eq(entry.address[:12])", "offset.eq(entry.address[:11])", "page asked for"),
    ("Cat(burst_out.data.address[:12], verdict.page)", "burst_out.data.address", "was given for this burst"),
    ("~out_passes", "1", "leaves as it came"),
    ("judged.addr.eq(response.p.cookie)", "judged.addr.eq(response.p.cookie ^ 1)", "OK needs|has a reason|was given"),
    ("answered.eq(response.valid & (response.p.cookie == oldest))", "answered.eq(response.valid)",
     "some client's|before its answer|has entered"),
    ("Const(n, 3)", "Const(0, 3)", "device is that"),
    ("((put[n] - get[n])[: slot_bits + 1] != self.depth)", "1", "nothing else of a burst|no cookie names two"),
    ("out_client.eq(n + 1)", "out_client.eq(1)", "has entered"),
    ("free.eq(~self.o.valid | self.o.ready)", "free.eq(1)", "stays until it is taken"),
    ("(passing[n] | requests.i.ready)", "1", "one request for each"),
    ("Mux(entry.pasid_valid, entry.pasid, 0)", "entry.pasid", "process is"),
    ("page.eq(hint.page)", "page.eq(hint.page + 1)", "the hint's"),
    ("Mux(entering, entry.function, hint.function)", "entry.function", "the hint's"),
    ("is_hinted.eq(0)", "is_hinted.eq(1)", "one prefetch for"),
    ("self.spare", "1", "something to spare"),
    ("(requests.o.ready & ~requests.o.p.is_prefetch)", "requests.o.ready", "one by one"),
    ("~self.bypass.bit_select(function, 1) if self.has_iommu else 0", "1", "one prefetch for"),
    ("request.is_prefetch.eq(~entering)", "request.is_prefetch.eq(0)", "one request for each"),
]

FENCE_BUGS = [
    ("Mux(begins, counts[epoch] < full - 1, counts[epoch] != full)", "1", "a fence ends"),
    ("Mux(begins, counts[epoch] < full - 1, counts[epoch] != full)", "counts[epoch] != full", "a fence ends"),
    ("all_empty[~epoch]", "all_empty[epoch]", "a fence ends"),
    ("entry.epoch.eq(epoch)", "entry.epoch.eq(~epoch)", "a fence ends"),
    ("(source.p.epoch == e)", "1", "a fence ends"),
    ("(source.p.function == f)", "1", "a fence ends"),
    ("empty[e].all()", "empty[e].any()", "a fence ends"),
]


@pytest.mark.parametrize("contract, bugs, depth", [(VerdictContract, VERDICT_BUGS, 8), (FenceContract, FENCE_BUGS, 9)])
def test_gate_bugs(contract, bugs, depth):
    """FORMAL-GATE-3: each planted bug of the gate breaks the assertion that it should."""
    found = refute_each(contract(planted(Gate, [bug[:2] for bug in bugs])), len(bugs), depth=depth)
    missed = [(bug, text) for (*bug, broken), text in zip(bugs, found, strict=True) if not any(part in text for part in broken.split("|"))]
    assert not missed


def test_fence_without_settling():
    """FORMAL-GATE-4: a fence that does not wait until what entered last is counted ends too soon."""
    bug = 'm.next = "FLUSH" if self.late_count else "SETTLE"', 'm.next = "DRAIN"'
    assert "a fence ends" in refute(FenceContract(mutant(Gate, *bug)), depth=9)
