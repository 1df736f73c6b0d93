"""Tags of our read requests: who has which, what each completion may bring, and what happens when none comes."""

from functools import cache

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..stream.queue import Queue
from ..stream.ram import Ram
from .layouts import BurstStatus, Header, TlpBeat

SHORT_TAGS = 32  # tags 0..31: all that a function may use without Extended Tag Field Enable [PCIe5 2.2.6.2]
LONG_TAGS = 256  # tags 0..255: all that a function may use without 10-Bit Tag Requester Enable [PCIe5 2.2.6.2]
MAX_TAGS = 768  # tags 256..1023: those that it uses with it
TICKS = 1024  # of the timer in the default completion timeout, at least
SHORT_DIVISOR, MEDIUM_DIVISOR = 160, 2  # the default of 10 ms over those of 62.5 us and 5 ms
REFUSALS = 64  # cycles in which a probe that is due lets completions go first
PROBES, SHORT_PROBES = 16, 500  # times that each tag is looked at in the default timeout, and while any function has the short one


class TagGrant(data.Struct):
    """A free tag; ``generation`` goes back to the table with the request, unchanged.

    ``tag`` counts from 0. In a request of 8 bits it is the tag itself, in one of 10 bits the tag is :func:`ten_bit_name`.
    """

    tag: 10
    generation: 1


class Pool(data.Struct):
    """A bit for each set of tags."""

    wall: 1
    short: 1
    long: 1
    wide: 1


def ten_bit_name(tag):
    """Return ``tag`` + 256: the name of a tag in a request with 10-bit tags, of which bits 9:8 are never 0. [PCIe5 2.2.6.2]"""
    return Cat(tag[:8], tag[8:10] + 1)[:10]


class TagEvents(data.Struct):
    """What happened in this cycle, for error reporting: at most one of the pulses is 1. [PCIe5 6.2]

    ``function`` and ``header`` are valid with a pulse. ``function`` is the one whose request it is, 0 for ``unexpected``: there only the
    Requester ID in ``header`` says whom it was meant for. ``header`` is the completion's; for ``timeout`` it has type, Requester ID and
    tag of the request, and 0 in all else.
    """

    unexpected: 1  # completion that nobody asked for, or that does not fit its request
    timeout: 1
    unsupported: 1  # completion with Unsupported Request, Configuration Request Retry or a reserved status
    aborted: 1  # completion with Completer Abort
    poisoned: 1  # completion with EP=1 for a request in flight: each of them
    function: 8
    header: Header


class State(enum.Enum, shape=2):
    """Of a tag."""

    FREE = 0
    BUSY = 1
    QUARANTINED = 2  # timed out: its completion may still come
    RECOVERING = 3  # quarantined, and its function was stopped since: free after two more timeouts


class Patience(enum.Enum, shape=2):
    """How long requests of a function wait for their completions. [PCIe5 7.5.3.16]"""

    DEFAULT = 0
    SHORT = 1
    MEDIUM = 2
    ENDLESS = 3


class TimeoutSetting(data.Struct):
    """Completion Timeout Value and Completion Timeout Disable of a function. [PCIe5 7.5.3.16]"""

    value: 4
    disable: 1


@cache
def Opened(rows, index_bits):
    """Layout: a read request that has just been sent. ``row`` is the first of the read buffer for its data, ``index`` the client's own.

    ``ten_bit``: the tag in it was of 10 bits. ``atomic``: it is an AtomicOp or a translation request.
    """
    return data.StructLayout({
        "tag": 10, "ten_bit": 1, "atomic": 1, "generation": 1, "client": 6, "function": 3, "epoch": 1, "requester_id": 16,
        "lower_address": 7, "length_bytes": 13, "row": range(rows), "index": index_bits,
    })  # fmt: skip


@cache
def TagEnd(index_bits):
    """Layout: a read request is over."""
    return data.StructLayout({"client": 6, "index": index_bits, "function": 3, "epoch": 1, "status": BurstStatus})


@cache
def StoreBeat(width, rows):
    """Layout: dwords for the read buffer: lane 0 belongs at ``position`` dwords behind the start of ``row``."""
    return data.StructLayout({
        "data": width, "dword_count": range(width // 32 + 1), "client": 6, "row": range(rows), "position": 11,
    })  # fmt: skip


class TagPool(wiring.Component):
    """Hands out the tags ``first`` to ``first + count - 1``, the one that has been free for longest first.

    After ``begins`` all are free; from then on a tag is handed out again only after it came back in ``freed``. ``o.valid`` is a register.

    Members
    -------
    begins : ``In(1)``
        A pulse: tags are handed out from the next cycle on.
    o : ``Out(stream.Signature(TagGrant))``
        Free tags.
    freed : ``In(stream.Signature(TagGrant, always_ready=True))``
        Tags that come back; each only once.
    """

    def __init__(self, *, first, count):
        self.first, self.count = first, count
        super().__init__({
            "begins": In(1),
            "o": Out(stream.Signature(TagGrant)),
            "freed": In(stream.Signature(TagGrant, always_ready=True)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.used = used = Queue(TagGrant, max(2, self.count))
        new, has_new = Signal(range(max(2, self.count))), Signal()  # tags that were handed out at least once, until all were
        m.d.comb += [used.i.valid.eq(self.freed.valid), used.i.payload.eq(self.freed.payload)]
        with m.If(self.begins):
            m.d.sync += has_new.eq(1)
        with m.If(has_new):
            m.d.comb += [self.o.valid.eq(1), self.o.p.tag.eq(self.first + new), self.o.p.generation.eq(1)]
            with m.If(self.o.ready):
                m.d.sync += [new.eq(new + 1), has_new.eq(new != self.count - 1)]
        with m.Else():
            m.d.comb += [self.o.valid.eq(used.o.valid), self.o.payload.eq(used.o.payload), used.o.ready.eq(self.o.ready)]
        return m


class TagTable(wiring.Component):
    """Knows every read request in flight, judges each completion before a byte of it counts, and ends every request.

    Tags come in four sets: the wall's, those below 32, those below 256, and the others, which only a request with 10-bit tags can name;
    it can have any. A tag taken from one of the four streams is announced in ``opened`` when its request is sent. Exactly one ``ended``
    follows, always:

    - OK when completions brought every byte, in order; POISONED when one of them had EP=1 (after the last of them);
    - UR or CA when a completion had that status (Configuration Request Retry and reserved ones count as UR);
    - TIMEOUT when they did not come in time.

    A completion counts only if its tag is in flight, its Requester ID is the request's, Byte Count and Lower Address are
    what is still missing, its length is not more than that, and all its dwords are there. That of an AtomicOp or a translation request
    brings all of it, and its Lower Address does not matter. Any other is dropped whole and
    reported as unexpected; it changes nothing, so the request it was for ends by timeout. [PCIe5 2.3.2, 6.2.3.2.4.5]

    A tag is free again after its end, except after TIMEOUT: it is quarantined until its last completion arrives, or until
    two timeouts have passed since its function was stopped. ``dead`` shows sets without a tag that will come back by itself.

    How long a request waits is what ``timeouts`` says of its function when it is looked at: ``timeout_cycles`` by default, half of it with
    value 2 and 1/160 of it with value 1, which with a default of 10 ms are 5 ms and 62.5 us: both encodings of range A
    [PCIe5 7.5.3.16]. Other values count as 0. While timeouts are disabled and the function is not stopped its requests wait for ever;
    when that ends their time begins anew. A timeout is found between this time and 1.25 times that (value 1: 1.6 times, if the
    default is at least 1000 * ``tags``). For this the table needs a cycle without the first beat of a completion every
    ``timeout_cycles / (16 * tags)`` cycles (with value 1 on any function 1/500), and one without a last beat for each timeout. When
    there was none for 64 cycles ``completions.ready`` is 0 for one cycle; otherwise it is always 1.

    Latency: 1 cycle from a beat to ``store``; 2 from a last beat to ``ended``. Throughput: 1 beat per cycle. No tag is handed out
    in the first ``tags`` cycles after reset.

    Parameters
    ----------
    width : :class:`int`
        Bits of data per beat.
    tags, wall_tags : :class:`int`
        All tags, and those of the wall: 0 to ``wall_tags - 1``.
    rows, index_bits : :class:`int`
        Rows of the read buffer; bits of ``index``.
    timeout_cycles : :class:`int`
        Default completion timeout; at least 32 * ``tags``.

    Members
    -------
    wall_tags, short_tags, long_tags, wide_tags : ``Out(stream.Signature(TagGrant))``
        Free tags: the wall's; those below 32; those below 256; the others.
    opened : ``In(stream.Signature(Opened(rows, index_bits), always_ready=True))``
        Requests sent.
    completions : ``In(stream.Signature(TlpBeat(width)))``
        Everything that came in as a completion.
    store : ``Out(stream.Signature(StoreBeat(width, rows), always_ready=True))``
        Data for the read buffer. What is stored for a request counts only if its end is OK.
    ended : ``Out(stream.Signature(TagEnd(index_bits), always_ready=True))``
        Ends of requests, at least one cycle behind the last data.
    stop : ``In(8)``
        A bit per function: it rises when the function is stopped.
    timeouts : ``In(TimeoutSetting).array(8)``
        Of each function.
    in_flight : ``Out(range(tags + 1))``
        Requests opened and not ended.
    dead, exhausted : ``Out(Pool)``, ``Out(1)``
        Sets all of whose tags are quarantined; 1 while half of any set is quarantined.
    events : ``Out(TagEvents)``
        Pulses.

    Raises
    ------
    :exc:`ValueError`
        If the numbers of tags or the timeout are out of range.
    """

    def __init__(self, *, width, tags, wall_tags, rows, index_bits, timeout_cycles):
        if tags not in range(2, MAX_TAGS + 1):
            raise ValueError(f"Number of tags must be between 2 and {MAX_TAGS}, not {tags!r}")
        if wall_tags not in range(1, min(tags, SHORT_TAGS)):
            raise ValueError(f"Number of wall tags must leave a tag below 32 to the others, not {wall_tags!r} of {tags!r}")
        if timeout_cycles < 32 * tags:
            raise ValueError(f"Completion timeout must be at least {32 * tags} cycles with {tags} tags, not {timeout_cycles!r}")
        self.width, self.tags, self.wall_count, self.rows = width, tags, wall_tags, rows
        self.index_bits, self.timeout_cycles = index_bits, timeout_cycles
        super().__init__({
            "wall_tags": Out(stream.Signature(TagGrant)),
            "short_tags": Out(stream.Signature(TagGrant)),
            "long_tags": Out(stream.Signature(TagGrant)),
            "wide_tags": Out(stream.Signature(TagGrant)),
            "opened": In(stream.Signature(Opened(rows, index_bits), always_ready=True)),
            "completions": In(stream.Signature(TlpBeat(width))),
            "store": Out(stream.Signature(StoreBeat(width, rows), always_ready=True)),
            "ended": Out(stream.Signature(TagEnd(index_bits), always_ready=True)),
            "stop": In(8),
            "timeouts": In(TimeoutSetting).array(8),
            "in_flight": Out(range(tags + 1)),
            "dead": Out(Pool),
            "exhausted": Out(1),
            "events": Out(TagEvents),
        })

    def elaborate(self, platform):
        m = Module()
        tag_shape = range(self.tags)
        # Time is counted in ticks, modulo so many that twice the longest wait (that of the quarantine) and the time until it is noticed are
        # less than half.
        tick_cycles = max(1, self.timeout_cycles // TICKS)
        ticks = -(-self.timeout_cycles // tick_cycles)
        waits = {Patience.DEFAULT: ticks, Patience.SHORT: -(-ticks // SHORT_DIVISOR), Patience.MEDIUM: -(-ticks // MEDIUM_DIVISOR)}
        stamp_bits = (3 * ticks).bit_length() + 1
        # What a request asked for: written once, when it is opened.
        asked_layout = data.StructLayout({
            "generation": 1, "client": 6, "function": 3, "epoch": 1, "requester_id": 16, "lower_address": 7, "length_bytes": 13,
            "row": range(self.rows), "index": self.index_bits, "ten_bit": 1, "atomic": 1, "stamp": stamp_bits, "stops": 2,
        })  # fmt: skip
        # What its completions brought: counts only while it has the generation of the request; before that, nothing came.
        got_layout = data.StructLayout({
            "generation": 1, "state": State, "remaining": 13, "lower_address": 7, "position": 11, "poisoned": 1,
            "is_stamped": 1, "stamp": stamp_bits,  # the time begins here, not when it was opened
        })  # fmt: skip
        m.submodules.asked = asked = Ram(shape=asked_layout, depth=self.tags, init=[])
        m.submodules.got = got = Ram(shape=got_layout, depth=self.tags, init=[])
        ask, tell = asked.write_port(), got.write_port()
        ask_read, tell_read = asked.read_port(), got.read_port()
        just_told, told_last = Signal(), Signal(got_layout)  # what is read is just being written: that
        m.d.sync += [just_told.eq(tell.en & (tell.addr == tell_read.addr)), told_last.eq(tell.data)]
        is_opening = Signal()  # the request of the tag in stage B: nothing of it can have come
        m.d.sync += is_opening.eq(ask.en & (ask.addr == ask_read.addr))

        # After reset every tag becomes free.
        sweep, swept = Signal(range(self.tags)), Signal()
        sweeps_last = ~swept & (sweep == self.tags - 1)
        with m.If(~swept):
            m.d.sync += [sweep.eq(sweep + 1), swept.eq(sweeps_last)]

        # Time. It stands still while no tag is watched. `limits`: what was stamped before that has waited long enough.
        is_watched = Signal()
        now = Signal(stamp_bits)
        tick = Signal(range(max(2, tick_cycles)))
        lap = 1 << stamp_bits
        limits = {wait: Signal(stamp_bits, init=-count % lap, name=f"limit_{wait.name.lower()}") for wait, count in waits.items()}
        recovered = Signal(stamp_bits, init=-2 * ticks % lap)
        with m.If(is_watched):
            m.d.sync += tick.eq(tick + 1)
            with m.If(tick == tick_cycles - 1):
                m.d.sync += [tick.eq(0), *(time.eq(time + 1) for time in (now, recovered, *limits.values()))]
        patience_of = Signal(data.ArrayLayout(Patience, 8))
        for n, setting in enumerate(self.timeouts):
            m.d.sync += patience_of[n].eq(Patience.DEFAULT)
            with m.If(setting.disable & ~self.stop[n]):
                m.d.sync += patience_of[n].eq(Patience.ENDLESS)
            with m.Elif((setting.value == Patience.SHORT.value) | (setting.value == Patience.MEDIUM.value)):
                m.d.sync += patience_of[n].eq(setting.value)
        limit_of = Signal(data.ArrayLayout(stamp_bits, 8))  # of a function that does not wait forever
        for n in range(8):
            m.d.sync += limit_of[n].eq(limits[Patience.DEFAULT])
            for wait in (Patience.SHORT, Patience.MEDIUM):
                with m.If(patience_of[n] == wait):
                    m.d.sync += limit_of[n].eq(limits[wait])

        # Stops of each function, modulo 4: a tag finds out that its function was stopped since it was opened.
        stopped_before = Signal(8)
        stops = Signal(data.ArrayLayout(2, 8))
        m.d.sync += stopped_before.eq(self.stop)
        for n in range(8):
            with m.If(self.stop[n] & ~stopped_before[n]):
                m.d.sync += stops[n].eq(stops[n] + 1)

        # Requests sent.
        new = self.opened.p
        new_record = Signal(asked_layout)
        m.d.comb += [
            ask.en.eq(self.opened.valid | ~swept),
            ask.addr.eq(Mux(swept, new.tag, sweep)),
            ask.data.eq(Mux(swept, new_record, 0)),
            new_record.stamp.eq(now),
            new_record.stops.eq(stops[new.function]),
        ]
        m.d.comb += [new_record[name].eq(new[name]) for name, _ in Opened(self.rows, self.index_bits) if name != "tag"]

        b = Signal(data.StructLayout({
            "valid": 1, "probe": 1, "first": 1, "last": 1, "data": self.width, "dword_count": range(self.width // 32 + 1),
            "tag": tag_shape, "in_range": 1, "ten_bit": 1, "requester_id": 16, "brings_data": 1, "failed": 1, "aborted": 1, "poisoned": 1,
            "byte_count": 13, "lower_address": 7, "length_dw": 11, "payload_bytes": 13, "final": 1, "too_long": 1,
        }))  # fmt: skip

        # Stage A: a completion's first beat, or else the next probe, reads the record.
        i = self.completions
        period, short_period = (max(2, self.timeout_cycles // (times * self.tags)) for times in (PROBES, SHORT_PROBES))
        is_short = Signal()
        m.d.sync += is_short.eq(Cat(patience_of[n] == Patience.SHORT for n in range(8)).any())
        wait = Signal(range(period))
        due, force = Signal(), Signal()
        probe_tag = Signal(tag_shape)
        accept, probe = Signal(), Signal()
        h = i.p.header
        ten_bit, named = Signal(), Signal(10)
        m.d.comb += [
            ten_bit.eq(h.tag[8:] != 0),
            named.eq(Cat(h.tag[:8], Mux(ten_bit, h.tag[8:] - 1, 0)[:2])),
            i.ready.eq(~force),
            accept.eq(i.valid & ~force),
            probe.eq(due & ~(accept & i.p.first)),
            ask_read.addr.eq(Mux(probe, probe_tag, named)),
            tell_read.addr.eq(ask_read.addr),
        ]
        over = is_watched & ((wait == period - 1) | (is_short & (wait >= short_period - 1)))
        m.d.sync += wait.eq(Mux(over, 0, wait + is_watched))
        with m.If(over):
            m.d.sync += due.eq(swept)
        with m.If(probe):
            m.d.sync += [due.eq(over), probe_tag.eq(Mux(probe_tag == self.tags - 1, 0, probe_tag + 1))]
        refused, clean, retry = Signal(range(REFUSALS)), Signal(), Signal()
        with m.If(retry):
            m.d.sync += [due.eq(1), probe_tag.eq(b.tag)]
        with m.If(clean):
            m.d.sync += refused.eq(0)
        with m.Elif((due | b.probe) & (refused != REFUSALS - 1)):
            m.d.sync += refused.eq(refused + 1)
        m.d.sync += force.eq((retry | (due & ~probe)) & (refused == REFUSALS - 1))

        header = Signal(Header)  # of the completion in stage B
        with m.If(accept & i.p.first):
            m.d.sync += header.eq(h)
        # Payload beyond what the completion says is missing: final ones bring 0 to 3 bytes more [PCIe5 2.3.1.1].
        payload_bytes, excess = Signal(13), Signal(15)
        m.d.comb += [payload_bytes.eq((h.length_dw << 2) - h.lower_address[:2]), excess.eq(payload_bytes - h.byte_count)]
        is_completion = (h.type == pcie.TYPE_COMPLETION) & ~h.fmt[pcie.FMT_4DW] & ~h.fmt[pcie.FMT_PREFIX]
        m.d.sync += [
            b.valid.eq(accept), b.probe.eq(probe), b.first.eq(i.p.first), b.last.eq(i.p.last),
            b.data.eq(i.p.data), b.dword_count.eq(i.p.dword_count),
            b.tag.eq(ask_read.addr), b.in_range.eq((named < self.tags) & swept), b.ten_bit.eq(ten_bit), b.requester_id.eq(h.requester_id),
            b.brings_data.eq(is_completion & h.fmt[pcie.FMT_DATA] & (h.status == pcie.STATUS_SC)),
            b.failed.eq(is_completion & (h.status != pcie.STATUS_SC)), b.aborted.eq(h.status == pcie.STATUS_CA),
            b.poisoned.eq(h.poisoned), b.byte_count.eq(h.byte_count), b.lower_address.eq(h.lower_address),
            b.length_dw.eq(h.length_dw), b.payload_bytes.eq(payload_bytes),
            b.final.eq(~excess[-1]), b.too_long.eq(~excess[-1] & excess[2:].any()),
        ]  # fmt: skip

        # Stage B: the record is there.
        a, g = ask_read.data, Signal(got_layout)
        m.d.comb += g.eq(Mux(just_told, told_last, tell_read.data))
        untouched = a.generation != g.generation
        state = Signal(State)
        with m.If(is_opening):
            m.d.comb += state.eq(State.FREE)
        with m.Elif(untouched):
            m.d.comb += state.eq(State.BUSY)
        with m.Else():
            m.d.comb += state.eq(g.state)
        work_layout = data.StructLayout({
            "tag": tag_shape, "asked": asked_layout, "state": State, "is_stamped": 1, "stamp": stamp_bits,
            "remaining": 13, "lower_address": 7, "position": 11, "poisoned": 1,  # before this completion
            "remaining_then": 13, "lower_dw_then": 5, "position_then": 11,  # behind it
            "left_dw": 11, "at": 11, "bad": 1,  # dwords of this completion to come, and where they belong
            "fits": 1, "failed": 1, "aborted": 1, "final": 1,
        })  # fmt: skip
        fresh, saved, work = Signal(work_layout), Signal(work_layout), Signal(work_layout)
        lanes_log2 = (self.width // 32).bit_length() - 1
        # One signal each, not fields of `fresh`: it must not depend on itself.
        remaining, lower_address, position = Signal(13), Signal(7), Signal(11)
        mine = b.in_range & (a.ten_bit == b.ten_bit) & (a.requester_id == b.requester_id) & (state != State.FREE)
        m.d.comb += [
            remaining.eq(Mux(untouched, a.length_bytes, g.remaining)),
            lower_address.eq(Mux(untouched, a.lower_address, g.lower_address)),
            position.eq(Mux(untouched, a.lower_address[2 : 2 + lanes_log2], g.position)),
            fresh.tag.eq(b.tag), fresh.asked.eq(a), fresh.state.eq(state), fresh.stamp.eq(g.stamp),
            fresh.is_stamped.eq(g.is_stamped & ~untouched),
            fresh.remaining.eq(remaining), fresh.lower_address.eq(lower_address), fresh.position.eq(position),
            # What is read decides after the sums, not before.
            fresh.remaining_then.eq(Mux(untouched, a.length_bytes - b.payload_bytes, g.remaining - b.payload_bytes)),
            fresh.lower_dw_then.eq(Mux(untouched, a.lower_address[2:] + b.length_dw, g.lower_address[2:] + b.length_dw)),
            fresh.position_then.eq(Mux(untouched, a.lower_address[2 : 2 + lanes_log2] + b.length_dw, g.position + b.length_dw)),
            fresh.poisoned.eq((~untouched & g.poisoned) | b.poisoned),
            fresh.left_dw.eq(b.length_dw), fresh.at.eq(position),
            fresh.final.eq(a.atomic | b.final),
            fresh.fits.eq(mine & b.brings_data & Mux(untouched, b.byte_count == a.length_bytes, b.byte_count == g.remaining)
                          & Mux(a.atomic, b.length_dw == a.length_bytes[2:],
                                (b.lower_address == lower_address) & ~b.too_long)),
            fresh.failed.eq(mine & b.failed), fresh.aborted.eq(b.aborted),
            work.eq(Mux(b.first, fresh, saved)),
        ]  # fmt: skip
        too_many = b.dword_count > work.left_dw
        with m.If(b.valid):
            m.d.sync += [
                saved.eq(work),
                saved.bad.eq(work.bad | too_many),
                saved.left_dw.eq(work.left_dw - b.dword_count),
                saved.at.eq(work.at + b.dword_count),
            ]
            with m.If(b.last):  # beats without a first one are nobody's
                m.d.sync += [saved.fits.eq(0), saved.failed.eq(0)]
        # From the cycle after a first beat's stage B to the last beat's: a probe must not free what is being written.
        under_way = Signal()
        with m.If(b.valid):
            m.d.sync += under_way.eq(~b.last)

        complete = Signal()
        m.d.comb += complete.eq(work.fits & ~work.bad & (b.dword_count == work.left_dw))
        m.d.comb += [
            self.store.valid.eq(b.valid & work.fits & (work.state == State.BUSY) & ~work.bad & ~too_many),
            self.store.p.data.eq(b.data), self.store.p.dword_count.eq(b.dword_count), self.store.p.client.eq(work.asked.client),
            self.store.p.row.eq(work.asked.row), self.store.p.position.eq(work.at),
        ]  # fmt: skip

        # The verdict: what becomes of the record, and what is told. A probe that finds something in a cycle with a last beat, or a record
        # that was just written, is made once more.
        concludes, probed, found, restamps = Signal(), Signal(), Signal(), Signal()
        subject, record = Signal(work_layout), Signal(got_layout)
        end, status, release = Signal(), Signal(BurstStatus), Signal()
        enters, leaves = Signal(), Signal()  # the quarantine
        unexpected = Signal()
        m.d.comb += [
            concludes.eq(b.valid & b.last),
            probed.eq(b.probe & ~just_told & ~is_opening & ~(under_way & (saved.tag == b.tag))),
            retry.eq((probed & found & concludes) | (b.probe & just_told)),
            clean.eq(b.probe & ~retry),
            subject.eq(Mux(concludes & ~b.first, saved, fresh)),
            record.generation.eq(subject.asked.generation),
            record.state.eq(subject.state),
            record.is_stamped.eq(subject.is_stamped),
            record.stamp.eq(subject.stamp),
            record.remaining.eq(fresh.remaining),  # of what is probed
            record.lower_address.eq(fresh.lower_address),
            record.position.eq(fresh.position),
            record.poisoned.eq(subject.poisoned),
        ]
        # A probe: which limit counts, and whether the record, as the RAM has it, is from before it.
        patience, known, known_state = Signal(Patience), tell_read.data, Signal(State)
        begun, late, recovers = Signal(stamp_bits), Signal(), Signal()
        m.d.comb += [
            patience.eq(patience_of[a.function]),
            known_state.eq(Mux(a.generation != known.generation, State.BUSY, known.state)),
            recovers.eq(known_state == State.RECOVERING),
            begun.eq(Mux((a.generation == known.generation) & (known.is_stamped | recovers), known.stamp, a.stamp)),
            late.eq((begun - Mux(recovers, recovered, limit_of[a.function]))[stamp_bits - 1]),
        ]
        with m.Switch(known_state):
            with m.Case(State.BUSY):
                m.d.comb += [found.eq(late & (patience != Patience.ENDLESS)), restamps.eq(patience == Patience.ENDLESS)]
            with m.Case(State.QUARANTINED):
                m.d.comb += found.eq(a.stops != stops[a.function])
            with m.Case(State.RECOVERING):
                m.d.comb += found.eq(late)
        with m.If(concludes):
            m.d.comb += unexpected.eq(~(work.failed | complete) | (work.state != State.BUSY))
            m.d.comb += [
                tell.en.eq(work.failed | complete),
                record.remaining.eq(work.remaining_then),
                record.lower_address.eq(Cat(Const(0, 2), work.lower_dw_then)),
                record.position.eq(work.position_then),
            ]
            with m.If(work.failed | work.final):
                m.d.comb += record.state.eq(State.FREE)
            with m.If(work.failed | (complete & work.final)):
                m.d.comb += [
                    release.eq(1),
                    end.eq(work.state == State.BUSY),
                    leaves.eq(work.state != State.BUSY),
                ]
            with m.If(work.failed):
                m.d.comb += status.eq(Mux(work.aborted, BurstStatus.CA, BurstStatus.UR))
            with m.Elif(work.poisoned):
                m.d.comb += status.eq(BurstStatus.POISONED)
        with m.Elif(probed & (found | restamps)):
            m.d.comb += tell.en.eq(1)
            with m.Switch(known_state):
                with m.Case(State.BUSY):
                    m.d.comb += [record.is_stamped.eq(1), record.stamp.eq(now)]
                    with m.If(found):
                        m.d.comb += [record.state.eq(State.QUARANTINED), enters.eq(1), end.eq(1), status.eq(BurstStatus.TIMEOUT)]
                with m.Case(State.QUARANTINED):
                    m.d.comb += [record.state.eq(State.RECOVERING), record.stamp.eq(now)]
                with m.Case(State.RECOVERING):
                    m.d.comb += [record.state.eq(State.FREE), release.eq(1), leaves.eq(1)]
        m.d.comb += [tell.addr.eq(subject.tag), tell.data.eq(record)]
        with m.If(~swept):
            m.d.comb += [tell.en.eq(1), tell.addr.eq(sweep), tell.data.eq(0)]

        # For error reports.
        events, timed_out = Signal(TagEvents), Signal(Header)
        m.d.comb += [
            timed_out.type.eq(pcie.TYPE_MEMORY),
            timed_out.requester_id.eq(subject.asked.requester_id),
            timed_out.tag.eq(Mux(subject.asked.ten_bit, ten_bit_name(subject.tag), subject.tag)),
            events.unexpected.eq(unexpected),
            events.timeout.eq(enters),
            events.unsupported.eq(end & (status == BurstStatus.UR)),
            events.aborted.eq(end & (status == BurstStatus.CA)),
            events.poisoned.eq(concludes & complete & (work.state == State.BUSY) & header.poisoned),
            events.function.eq(Mux(unexpected, 0, subject.asked.function)),
            events.header.eq(Mux(concludes, header, timed_out)),
        ]
        m.d.sync += [self.events[name].eq(events[name]) for name in ("unexpected", "timeout", "unsupported", "aborted", "poisoned")]
        with m.If(concludes | b.probe):
            m.d.sync += [self.events.function.eq(events.function), self.events.header.eq(events.header)]

        # Stage C: everyone is told, a cycle later than `store`.
        told = Signal(data.StructLayout({
            "end": 1, "release": 1, "enters": 1, "leaves": 1, "tag": tag_shape, "generation": 1,
            "what": self.ended.payload.shape(),
        }))  # fmt: skip
        m.d.sync += [
            told.end.eq(end), told.release.eq(release), told.enters.eq(enters), told.leaves.eq(leaves),
            self.in_flight.eq(self.in_flight + self.opened.valid - told.end),
        ]  # fmt: skip
        with m.If(concludes | b.probe):
            m.d.sync += [told.tag.eq(subject.tag), told.generation.eq(subject.asked.generation), told.what.status.eq(status)]
            m.d.sync += [told.what[name].eq(subject.asked[name]) for name in ("client", "index", "function", "epoch")]
        m.d.comb += [self.ended.valid.eq(told.end), self.ended.payload.eq(told.what)]

        bounds = (0, self.wall_count, min(self.tags, SHORT_TAGS), min(self.tags, LONG_TAGS), self.tags)
        half, any_lost = [], []
        for n, name in enumerate(("wall", "short", "long", "wide")):
            first, end_tag = bounds[n], bounds[n + 1]
            if first == end_tag:
                m.d.sync += self.dead[name].eq(1)
                continue
            m.submodules[name] = pool = TagPool(first=first, count=end_tag - first)
            grants = getattr(self, f"{name}_tags")
            inside = (told.tag >= first) & (told.tag < end_tag)
            lost = Signal(range(end_tag - first + 1))
            m.d.comb += [
                pool.begins.eq(sweeps_last),
                grants.valid.eq(pool.o.valid),
                grants.payload.eq(pool.o.payload),
                pool.o.ready.eq(grants.ready),
                pool.freed.valid.eq(told.release & inside),
                pool.freed.p.tag.eq(told.tag),
                pool.freed.p.generation.eq(~told.generation),
            ]
            m.d.sync += self.dead[name].eq(lost == end_tag - first)
            m.d.sync += lost.eq(lost + (told.enters & inside) - (told.leaves & inside))
            half.append((lost << 1) >= end_tag - first)
            any_lost.append(lost != 0)
        m.d.sync += self.exhausted.eq(Cat(half).any())
        m.d.comb += is_watched.eq(~swept | self.in_flight.any() | Cat(any_lost).any())
        return m
