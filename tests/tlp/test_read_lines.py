"""The lines of reads by themselves: refusals and ends in any cycle, each read answered and reported once, no row or slot given twice."""

import random
from dataclasses import dataclass, field

import cocotb
import pytest
from amaranth.hdl import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.tlp.layouts import Burst, BurstRetired, BurstStatus
from ringwall.rtl.tlp.read_buffer import RowRead
from ringwall.rtl.tlp.read_lines import OrderedLine, UnorderedLine
from ringwall.rtl.tlp.tags import TagEnd
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, start, unpack

CLIENT, FUNCTIONS, INDEX_BITS, SLOTS = 5, 2, 9, 4
ROWS = 1024
CODES = (0, 5)  # Max_Read_Request_Size of the functions: 128 and 4096 bytes
SOONEST = 3  # cycles from a grant to its end, as the tag table is
Sent = data.StructLayout({"burst": Burst, "last": 1, "row": range(ROWS), "index": INDEX_BITS})


class Line(wiring.Component):
    """A line whose requests are a stream, each granted when it is taken; no writes are in front of its bursts, tags are there."""

    def __init__(self, line):
        self.line = line
        super().__init__({
            "bursts": In(stream.Signature(Burst)),
            "requests": Out(stream.Signature(Sent)),
            "ended": In(stream.Signature(TagEnd(INDEX_BITS), always_ready=True)),
            "rows": Out(stream.Signature(RowRead(line.width, ROWS))),
            "retired": Out(stream.Signature(BurstRetired)),
            "live": In(FUNCTIONS),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.line = line = self.line
        for name in ("bursts", "ended", "rows", "retired"):
            ours, its = wiring.flipped(getattr(self, name)), getattr(line, name)
            wiring.connect(m, ours, its)
        request, taken = line.request, self.requests.p
        m.d.comb += [
            line.cleared.eq(self.bursts.valid & self.bursts.ready), line.live.eq(self.live), line.free.short.eq(1),
            *(config.mrrs_code.eq(code) for config, code in zip(line.config, CODES)),
            self.requests.valid.eq(line.wanted), line.granted.eq(line.wanted & self.requests.ready),
            taken.burst.eq(request.piece.burst), taken.last.eq(request.piece.last), taken.row.eq(request.row),
            taken.index.eq(request.index),
        ]  # fmt: skip
        return m


@pytest.mark.parametrize("width", [64, 512])
def test_ordered_line(request, width):
    region = 4096 * 8 // width
    line = OrderedLine(width=width, rows=ROWS, index_bits=INDEX_BITS, functions=FUNCTIONS, client=CLIENT, base=region, region=region,
                       reads=8)  # fmt: skip
    run(Line(line), module=__name__, node=request.node.nodeid, testcase="each_read_is_answered",
        params={"width": width, "base": region, "region": region, "is_ordered": True})  # fmt: skip


@pytest.mark.parametrize("width", [64, 512])
def test_unordered_line(request, width):
    rows = SLOTS * 512 // width
    line = UnorderedLine(width=width, rows=ROWS, index_bits=INDEX_BITS, functions=FUNCTIONS, client=CLIENT, base=rows, slots=SLOTS, reads=8)
    run(Line(line), module=__name__, node=request.node.nodeid, testcase="each_read_is_answered",
        params={"width": width, "base": rows, "region": rows, "is_ordered": False})  # fmt: skip


@dataclass(eq=False)
class Read:
    """A burst as it was accepted, and what came of it."""

    fields: dict
    pieces: list = field(default_factory=list)
    is_sent: bool = False  # all of it
    reset: bool = False  # its function was not live at some time since it came
    is_answered: bool = False
    is_retired: bool = False

    @property
    def refusal(self):
        """How the burst ends where it was not sent."""
        return BurstStatus.RESET if self.fields["verdict"] == BurstStatus.OK else self.fields["verdict"]


@dataclass(eq=False)
class Request:
    """A piece that was sent; ``unread``: its rows that nobody read yet."""

    read: Read
    index: int
    address: int
    length: int
    unread: list
    sent_at: int
    status: BurstStatus | None = None  # None: it has not ended


class Bench:
    """Drives a line in every cycle as dice say, and judges all that it does."""

    def __init__(self, dut, rng):
        self.dut, self.rng, self.p = dut, rng, params()
        self.bytes = self.p["width"] // 8
        self.reads, self.in_flight, self.holders = [], [], {}
        self.beats, self.most = [], 0  # of the answer under way, the burst; requests in flight at once
        self.live = (1 << FUNCTIONS) - 1
        self.offered = self.ending = None

    async def begin(self):
        names = ("bursts", "requests", "ended", "rows", "retired")
        streams = await start(self.dut, *names)
        self.s = dict(zip(names, streams))
        return self

    def random_burst(self, number):
        rng = self.rng
        function, is_small = rng.randrange(FUNCTIONS), not self.p["is_ordered"]
        offset = rng.randrange(64) if is_small else rng.choice([0, rng.randrange(4096)])
        room = 64 - offset if is_small else 4096 - offset
        length = min(rng.choice([1, 4, 8, 64, rng.randrange(1, 65), rng.randrange(1, 400), 4096]), room)
        verdict = rng.choices([BurstStatus.OK, BurstStatus.FAULT], [3, 1])[0]
        return {"address": (rng.getrandbits(8) << 12) + offset, "length_bytes": length, "function": function, "cookie": number,
                "verdict": verdict, "epoch": rng.getrandbits(1), "client": CLIENT}  # fmt: skip

    async def cycles(self, count, *, bursts, grants, ends, takes, reports=None, stops=0.01, until=lambda: False):
        """Let up to ``count`` cycles pass; the others are how likely each thing is in a cycle."""
        s, rng, edge = self.s, self.rng, RisingEdge(self.dut.clk)
        for _ in range(count):
            if self.offered is None and rng.random() < bursts:
                self.offered = self.random_burst(len(self.reads))
                s["bursts"]._payload(pack(Burst, **self.offered))
            s["bursts"]._valid(self.offered is not None)
            s["requests"].set_ready(rng.random() < grants)
            s["rows"].set_ready(rng.random() < takes)
            s["retired"].set_ready(rng.random() < (takes if reports is None else reports))
            if rng.random() < stops:
                self.live = rng.choice([1, 2, 3, 3])
                self.dut.live.value = self.live
            self.end_one(ends)
            await edge
            if self.ending is not None:
                request, status = self.ending
                request.status = status
                self.in_flight.remove(request)
            for name, happens in (("bursts", self.accept), ("requests", self.send), ("rows", self.read_row), ("retired", self.report)):
                if s[name].read_valid() and s[name].read_ready():
                    happens(s[name].read_payload())
            for read in self.reads:
                read.reset |= not self.live >> read.fields["function"] & 1
            if until():
                return

    def end_one(self, likely):
        """Perhaps end a request in this cycle, or let it be one of another client."""
        s, rng, self.ending = self.s["ended"], self.rng, None
        due = [request for request in self.in_flight if cycle() - request.sent_at >= SOONEST]
        is_one = rng.random() < likely
        s._valid(is_one)
        if not is_one:
            return
        if not due or rng.random() < 0.1:
            s._payload(pack(TagEnd(INDEX_BITS), client=CLIENT ^ 1, index=rng.getrandbits(INDEX_BITS), status=BurstStatus.UR))
            return
        request = rng.choice(due[:1] + due)  # the oldest more often
        fields = request.read.fields
        status = rng.choices([BurstStatus.OK, BurstStatus.UR, BurstStatus.CA, BurstStatus.TIMEOUT], [9, 1, 1, 1])[0]
        self.ending = request, status
        s._payload(pack(TagEnd(INDEX_BITS), client=CLIENT, index=request.index, status=status, function=fields["function"],
                        epoch=fields["epoch"]))  # fmt: skip

    async def lone_read(self):
        """A read with nothing in front of it is wanted in the cycle after it was taken."""
        quiet = {"bursts": 0, "grants": 1, "ends": 1, "takes": 1, "stops": 0}
        self.dut.live.value = self.live = (1 << FUNCTIONS) - 1
        await self.cycles(3, **quiet)
        self.offered = self.random_burst(0) | {"verdict": BurstStatus.OK}
        self.s["bursts"]._payload(pack(Burst, **self.offered))
        await self.cycles(1, **quiet)
        began = cycle()
        await self.cycles(10, **quiet, until=lambda: self.reads[0].pieces)
        assert cycle() - began == 1, f"wanted after {cycle() - began} cycles"
        await self.cycles(3000, **quiet, until=lambda: self.reads[0].is_answered and self.reads[0].is_retired)
        self.reads.clear()

    async def reset(self):
        """Reset the line in the midst of everything, for it to forget all."""
        for name in ("bursts", "ended"):
            self.s[name]._valid(0)
        self.dut.rst.value = 1
        await ClockCycles(self.dut.clk, 2)
        self.dut.rst.value = 0
        for what in (self.reads, self.in_flight, self.holders, self.beats):
            what.clear()
        self.offered = None

    def accept(self, payload):
        self.reads.append(Read(self.offered))
        self.offered = None

    def send(self, payload):
        """A request: the next piece of its burst, within its limit, into rows that nobody needs."""
        sent = unpack(Sent, payload)
        burst = sent.burst
        read = next(read for read in self.reads if read.fields["cookie"] == burst.cookie)
        fields = read.fields
        at = fields["address"] + sum(piece.length for piece in read.pieces)
        assert not read.is_sent and (read.pieces or not (read.is_answered or read.is_retired)), f"{fields} is sent twice"
        assert fields["verdict"] == BurstStatus.OK, f"{fields} is sent"
        assert (burst.address, burst.function, burst.epoch) == (at, fields["function"], fields["epoch"])
        assert 0 < burst.length_bytes <= min(128 << CODES[burst.function], fields["address"] + fields["length_bytes"] - at)
        read.is_sent = at + burst.length_bytes == fields["address"] + fields["length_bytes"]
        assert sent.last == read.is_sent
        base, region = self.p["base"], self.p["region"]
        assert base <= sent.row < base + region
        count = (at % self.bytes + burst.length_bytes - 1) // self.bytes + 1
        rows = [base + (sent.row - base + n) % region for n in range(count)]
        for row in rows:
            holder = self.holders.get(row)
            assert holder is None or row not in holder.unread or self.is_dropped(holder), f"row {row} is given to two"
        request = Request(read, sent.index, at, burst.length_bytes, rows.copy(), cycle())
        self.holders.update(dict.fromkeys(rows, request))
        assert all(other.index != sent.index for other in self.in_flight), f"index {sent.index} is in flight twice"
        read.pieces.append(request)
        self.in_flight.append(request)
        self.most = max(self.most, len(self.in_flight))

    def is_dropped(self, request):
        """Whether nobody will read the rows of a request: it ended, and it or one before it in its burst failed."""
        pieces = request.read.pieces
        before = pieces[: pieces.index(request) + 1]
        return request.status is not None and any(piece.status not in (None, BurstStatus.OK) for piece in before)

    def may_refuse(self, read):
        """Whether what was not sent of a burst may have been refused."""
        return not read.is_sent and (read.fields["verdict"] != BurstStatus.OK or read.reset)

    def read_row(self, payload):
        """A beat of an answer: what the burst has to say next."""
        beat = unpack(RowRead(self.p["width"], ROWS), payload)
        read = next((read for read in self.reads if read.fields["cookie"] == beat.cookie), None)
        assert read is not None and not read.is_answered, f"an answer that nobody waits for: {beat}"
        if self.p["is_ordered"] or self.beats:
            asked = next(read for read in self.reads if not read.is_answered) if self.p["is_ordered"] else self.beats[0]
            assert read is asked, f"an answer to {read.fields} before that to {asked.fields}"
        number, place = len(self.beats), 0
        for piece in read.pieces:
            count = (piece.address % self.bytes + piece.length - 1) // self.bytes + 1
            if piece.status != BurstStatus.OK or number < place + count:
                break
            place += count
        else:
            piece = None
        expects = {"first": number == 0, "function": read.fields["function"]}
        if piece is None:
            assert self.may_refuse(read), f"{read.fields} is refused"
            expects |= {"status": read.refusal, "last": True}
        else:
            assert piece.status is not None, f"{beat} comes before its piece ended"
            is_end = read.is_sent and piece is read.pieces[-1] and number == place + count - 1
            expects |= {"status": piece.status, "last": is_end or piece.status != BurstStatus.OK}
            if piece.status == BurstStatus.OK:
                n = number - place
                begin, end = piece.address % self.bytes, (piece.address + piece.length - 1) % self.bytes
                rows = [row for row, holder in self.holders.items() if holder is piece and row in piece.unread]
                assert beat.row in rows and beat.row == piece.unread[0], f"row {beat.row}, not {piece.unread[0]}"
                expects |= {"first_byte": begin if n == 0 else 0, "last_byte": end if n == count - 1 else self.bytes - 1}
                piece.unread.pop(0)
        assert {name: getattr(beat, name) for name in expects} == expects, f"{beat} of {read.fields}"
        self.beats.append(read)
        if beat.last:
            read.is_answered, self.beats = True, []
            for piece in read.pieces:
                assert self.p["is_ordered"] or piece.status is not None
                if not self.p["is_ordered"]:
                    piece.unread = []

    def report(self, payload):
        """A report: in order of the bursts, or of one that is over, when nothing of it is in flight."""
        retired = unpack(BurstRetired, payload)
        what = retired.function, retired.epoch
        waiting = [read for read in self.reads if not read.is_retired]
        if not self.p["is_ordered"]:
            waiting = [read for read in waiting if (read.fields["function"], read.fields["epoch"]) == what
                       and (read.pieces[0].status is not None if read.pieces else self.may_refuse(read))]  # fmt: skip
            waiting.sort(key=lambda read: not read.pieces)  # refused ones may go without
        assert waiting, f"a report of {what} too many"
        read = waiting[0]
        assert what == (read.fields["function"], read.fields["epoch"])
        is_over = all(piece.status is not None for piece in read.pieces) and (read.is_sent or self.may_refuse(read))
        assert is_over, f"{read.fields} is reported before its end"
        read.is_retired = True


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def each_read_is_answered(dut):
    """TLP-LINE-1: refusals and ends meet in every way, rings are full, clients slow: each read is answered and reported once."""
    bench = await Bench(dut, random.Random(cocotb.RANDOM_SEED)).begin()
    dut.live.value = bench.live

    def all_over():
        return all(read.is_answered and read.is_retired for read in bench.reads) and bench.offered is None

    odds = [{"bursts": 1, "grants": 1, "ends": 0.9, "takes": 1}, {"bursts": 0.7, "grants": 0.7, "ends": 0.5, "takes": 0.7},
            {"bursts": 1, "grants": 1, "ends": 0.02, "takes": 1}, {"bursts": 1, "grants": 1, "ends": 1, "takes": 0.1},
            {"bursts": 1, "grants": 1, "ends": 1, "takes": 1, "reports": 0.05}]  # fmt: skip
    for n in range(8):
        for ours in odds:
            await bench.cycles(300, **ours)
        if n % 3:
            await bench.reset()
            continue
        await bench.cycles(20_000, bursts=0, grants=1, ends=1, takes=1, until=all_over)
        assert all_over(), [read for read in bench.reads if not (read.is_answered and read.is_retired)][:3]
        bench.reads.clear()
        await bench.cycles(20, bursts=0, grants=1, ends=1, takes=1)
        await bench.lone_read()
    assert params()["is_ordered"] or bench.most == SLOTS
