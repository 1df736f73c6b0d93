"""Proof of the requester: every read request legal and inside its burst, no read before an older write; beside it planted bugs."""

import pytest
from amaranth.hdl import Assert, Assume, Cat, Const, Cover, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ringwall.rtl.spec import pcie
from ringwall.rtl.tlp import read_buffer, read_lines, requester, tags, write_path
from ringwall.rtl.tlp.layouts import BurstData
from ringwall.rtl.tlp.requester import ReadClient, Requester
from ringwall.sim.formal import offered, planted, prove, refute_each

CLIENTS = (ReadClient("wall", False, 128, 2), ReadClient("data", True, 4096, 2))
DEPTH = 8
Request = data.StructLayout({"offset": 12, "length_bytes": 13, "is_write": 1})


class NoBuffer(wiring.Component):
    """A read buffer that keeps nothing: requests alone are of interest."""

    def __init__(self, *, width, rows, regions):
        count = len(regions)
        super().__init__({
            "store": In(stream.Signature(tags.StoreBeat(width, rows), always_ready=True)),
            "reads": In(stream.Signature(read_buffer.RowRead(width, rows))).array(count),
            "o": Out(stream.Signature(BurstData(width))).array(count),
            "over": Out(read_buffer.Over).array(count),
        })

    def elaborate(self, platform):
        return Module()


class RequesterContract(wiring.Component):
    """Bursts of one client, any of its reads followed (it alone lies in page 1); writes are of one beat; the host never answers."""

    i: In(stream.Signature(Request))
    mark: In(1)
    code: In(3)  # Max_Read_Request_Size
    ready: In(2)  # of posted and non-posted requests

    def __init__(self, make=Requester):
        self.make = make
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.requester = dut = self.make(width=64, clients=CLIENTS, functions=1, tags=4, wall_tags=1, max_payload=128,
                                                 completion_timeout_cycles=128)  # fmt: skip
        offered(m, self.i)
        r, gate = self.i.p, dut.gate
        begun, code = Signal(), Signal(3)
        m.d.sync += begun.eq(1)
        with m.If(~begun):
            m.d.sync += code.eq(self.code)
        accepted = gate.valid & gate.ready
        known, end, at = Signal(), Signal(13), Signal(13)
        marks, marked = Signal(), Signal()  # decided when it is offered, so that the payload stays put
        m.d.comb += marks.eq(self.mark & ~known & ~r.is_write)
        waits = Signal()
        m.d.sync += [waits.eq(gate.valid & ~gate.ready), marked.eq(marks & ~waits | marked & waits)]
        is_marked = Mux(waits, marked, marks)
        m.d.comb += [
            # A burst has 1 to 4096 bytes and crosses no 4 KiB boundary; a write here is within 8 bytes, whose data is there at once.
            Assume(~self.i.valid | ((r.length_bytes != 0) & (r.offset + r.length_bytes <= 4096))),
            Assume(~self.i.valid | ~r.is_write | (r.offset[:3] + r.length_bytes <= 8)),
            gate.valid.eq(self.i.valid & begun),
            self.i.ready.eq(gate.ready & begun),
            gate.p.address.eq(Cat(r.offset, is_marked)),
            gate.p.length_bytes.eq(r.length_bytes),
            gate.p.is_write.eq(r.is_write),
            gate.p.client.eq(1),
            dut.write_data[1].valid.eq(1),
            dut.write_data[1].p.last.eq(1),
            dut.write_done[1].ready.eq(1),
            dut.retired_reads.ready.eq(1),
            dut.retired_writes.ready.eq(1),
            dut.config[0].bus_master.eq(1),
            dut.config[0].extended_tag.eq(1),
            dut.config[0].mrrs_code.eq(code),
            dut.posted.ready.eq(self.ready[0]),
            dut.non_posted.ready.eq(self.ready[1]),
        ]
        limit = Mux(code > 5, 128, (Const(128, 13) << code)[:13])

        # Writes that were accepted before the followed read, and those sent.
        writes, before, sent = Signal(4), Signal(4), Signal(4)
        m.d.sync += writes.eq(writes + (accepted & r.is_write))
        m.d.sync += sent.eq(sent + (dut.posted.valid & dut.posted.ready & dut.posted.p.last))
        with m.If(accepted & is_marked):
            m.d.sync += [known.eq(1), at.eq(r.offset), end.eq(r.offset + r.length_bytes), before.eq(writes)]

        # The request on the wire.
        o, h = dut.non_posted, dut.non_posted.p.header
        low, high = Signal(2), Signal(2)
        last_be = Mux(h.length_dw == 1, h.first_be, h.last_be)
        for n in reversed(range(4)):
            with m.If(h.first_be[n]):
                m.d.comb += low.eq(n)
        for n in range(4):
            with m.If(last_be[n]):
                m.d.comb += high.eq(n)
        start, stop = Signal(13), Signal(14)
        m.d.comb += [start.eq(Cat(low, h.address[2:12])), stop.eq(Cat(high, (h.address[2:12] + h.length_dw - 1)[:11]) + 1)]
        mine = o.valid & h.address[12]
        with m.If(mine & o.ready):
            m.d.sync += at.eq(stop)
        upward, downward = (Const(15, 4) << low)[:4], (Const(15, 4) >> ~high)[:4]
        many = h.length_dw > 1
        for rule, text in (
            (known & (start == at), "a request starts where its burst goes on"),
            ((stop > start) & (stop <= end), "no request touches a byte outside its burst"),
            (stop <= 4096, "no request crosses 4 KiB"),
            ((h.length_dw << 2) <= limit, "no request is longer than Max_Read_Request_Size"),
            (h.length_dw != 0, "no request is empty"),
            (h.first_be == Mux(many, upward, upward & downward), "first enables are those of the bytes"),
            (h.last_be == Mux(many, downward, 0), "last enables are those of the bytes"),
            ((h.type == pcie.TYPE_MEMORY) & (h.fmt == 0), "it is a read with an address below 4 GiB"),
            (sent >= before, "a read never passes a write that came before it"),
            ((h.tag >= 1) & (h.tag < 4), "its tag is none of the wall's"),
        ):
            m.d.comb += Assert(~mine | rule, text)
        posted = dut.posted
        m.d.comb += [
            Assert(~posted.valid | (posted.p.first & posted.p.last & (posted.p.header.length_dw <= 2)), "a write of one word is one TLP"),
            Assert(sent <= writes, "nothing is written that nobody asked for"),
            Cover(mine & (stop == end) & (code == 5) & (h.length_dw == 1024), "a read of 4096 bytes"),
            Cover(mine & (stop == end) & (end - start == 1) & (start[:7] == 0), "a burst ends in a read of one byte"),
        ]
        return m


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short queues, as few tickets as there are tags, no read buffer: nothing of that decides what a request looks like."""
    monkeypatch.setattr(requester, "ReadBuffer", NoBuffer)
    monkeypatch.setattr(requester, "ORDER_DEPTH", 4)
    monkeypatch.setattr(requester, "WRITES_IN_FLIGHT", 2)
    monkeypatch.setattr(write_path, "HEADERS", 2)
    monkeypatch.setattr(write_path, "WAITING_BURSTS", 2)
    monkeypatch.setattr(read_lines.OrderedLine, "pieces", staticmethod(lambda width, region: 4))


def test_requester():
    """FORMAL-REQ-1: at every Max_Read_Request_Size each read request is inside its burst and one page and within the limit, the requests
    of a burst cover it in order, and none leaves before a write that came before it (R05, R14)."""
    prove(RequesterContract(), depth=DEPTH)


BUGS = [
    (read_lines.Cutter, "gap.eq(mask)", "gap.eq((256 << code) - 1)", "longer than Max_Read_Request_Size"),
    (read_lines.ReadFront, "codes[its.function[:function_bits]]", "5 | codes[its.function[:function_bits]]",
     "longer than Max_Read_Request_Size"),
    (read_lines.ReadFront, "head.valid & is_cleared", "head.valid", "never passes a write"),
    (read_lines.ReadFront, "(in_order > 1)", "(in_order > 0)", "never passes a write"),
    (read_lines.ReadFront, "self.bursts.valid & ~(is_empty & new_ready)", "self.bursts.valid", "starts where its burst goes on"),
    (Requester, "order.o.ready.eq(~order.o.p.is_write | (unsent_gone != 0))", "order.o.ready.eq(1)", "never passes a write"),
    (Requester, "header.last_be.eq(Mux(is_atomic, 0, piece.last_be))", "header.last_be.eq(piece.last_be | (piece.length_dw == 1))",
     "last enables"),
]  # fmt: skip


def test_requester_bugs(monkeypatch):
    """FORMAL-REQ-2: each planted bug of the requester breaks the assertion that it should."""
    def with_bugs(component):
        numbers = [n for n, bug in enumerate(BUGS) if bug[0] is component]
        return planted(component, [BUGS[n][1:3] for n in numbers], numbers[0] + 1)

    monkeypatch.setattr(read_lines, "Cutter", with_bugs(read_lines.Cutter))
    monkeypatch.setattr(read_lines, "ReadFront", with_bugs(read_lines.ReadFront))
    found = refute_each(RequesterContract(with_bugs(Requester)), len(BUGS), depth=DEPTH)
    missed = [(bug, text) for (*bug, broken), text in zip(BUGS, found, strict=True) if broken not in text]
    assert not missed
