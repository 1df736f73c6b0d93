"""Translation requests in flight: sent, answered, made anew when what comes is too old. [PCIe5 10.2]"""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.iotlb import SUPERPAGES, entry_layout
from ..spec import pcie
from ..tlp.layouts import AddressedBurst, BurstData, BurstStatus, Pasid
from .layouts import FRAME_BITS, MAX_FUNCTIONS, PAGE_BITS, Answer, PageOver, asked_layout, page_wanted_layout, put_space, store_features

ENTRY_BYTES = 8  # of a translation completion [PCIe5 10.2.3.2]


MAX_AGE = 2  # ticks of patience that a request can see


class State(enum.Enum, shape=2):
    """Of a request."""

    FREE = 0
    SEND = 1
    SENT = 2
    DONE = 3  # its answer is there, for whoever waits


class Paging(enum.Enum, shape=2):
    """Of a request that was answered without the permission wanted."""

    NO = 0
    WANTS = 1  # the page is yet to be asked for
    WAITS = 2  # it is asked for


class TranslationRequests(wiring.Component):
    """Asks the host for pages, and keeps each answer until ``release``.

    A request concerns one page: 8 bytes, NW as long as nobody wants to write. Every other end than a completion of an entry (Unsupported
    Request, Completer Abort, timeout, the function's reset) is a fault, and so is an entry that permits nothing. An answer that came
    across ``forget`` is not used: the request is made anew, or, for a function without ``enable``, answered by "untranslated".
    [PCIe5 10.2.3, 10.3.3]

    Good answers fill the store with the largest page that it knows inside of what the host gave; an entry beyond 2 ** 56 is answered by
    "untranslated".

    With ``page_patience_cycles`` a request whose entry lacks the permission wanted keeps its place and offers its page at ``wanted``, if
    its function ``may_page``. Granted, it is made once more, and what comes then is its answer. Not granted, without ``may_page``, or after
    the patience, twice of it at most, it ends in a fault. [PCIe5 10.4.1]

    Latency: 2 cycles from ``ask`` to ``bursts``, 3 from ``read_data`` to ``fill`` and ``is_answered``. Throughput: a request per cycle.

    Parameters
    ----------
    width : :class:`int`
        Bits of burst data per beat.
    count : :class:`int`
        Requests in flight: 1 to 16.
    page_patience_cycles : :class:`int`
        How long one waits for its page; 0: none does.
    has_pasid : :class:`bool`
        Pages may be those of processes: what is said of a page for one PASID, or none, counts for no other.

    Members
    -------
    sought : ``In(asked_layout(has_pasid))``
        A page below 2 ** 57 that is wanted; the outputs below are about it, combinationally.
    is_answered, is_pending : ``Out(1)``
        There is an answer for it; it is asked for.
    answer : ``Out(Answer)``
        With ``is_answered``.
    ask : ``In(1)``
        Ask for what is sought; only with ``has_room``, if it is neither.
    has_answers, has_room, spare : ``Out(1)``
        There are answers; there is room for one more request; for two, or for the only one.
    release : ``In(1)``
        All answers that were there at the last ``begins`` have been used.
    begins : ``In(1)``
        Whoever waits is looked through from now on.
    enable : ``In(8)``
        ATS Enable of each function.
    forget : ``In(1)``
        What has been asked by now is too old.
    bursts, read_data : ``Out(stream.Signature(AddressedBurst))``, ``In(stream.Signature(BurstData(width)))``
        Wall port of the requester.
    fill : ``Out(stream.Signature(entry_layout(store_features(has_pasid))))``
        For the store; always taken.
    sent : ``Out(1)``
        Pulse: a request was sent.
    may_page : ``In(8)``
        With patience: the function may ask for pages.
    is_asking : ``Out(1)``
        With patience: there is a request that does not wait for a page.
    wanted, wants, takes : ``Out(page_wanted_layout(has_pasid))``, ``Out(1)``, ``In(1)``
        With patience: a page to ask for; there is one; it is taken.
    waits : ``Out(count)``
        With patience: the request waits for a page that was taken.
    over : ``In(stream.Signature(PageOver))``
        With patience: ends of such; always taken.
    """

    def __init__(self, *, width, count, page_patience_cycles=0, has_pasid=False):
        self.width, self.count, self.page_patience_cycles, self.has_pasid = width, count, page_patience_cycles, has_pasid
        pages = {"is_asking": Out(1), "may_page": In(MAX_FUNCTIONS), "wanted": Out(page_wanted_layout(has_pasid)), "wants": Out(1),
                 "takes": In(1), "waits": Out(count), "over": In(stream.Signature(PageOver))}  # fmt: skip
        super().__init__({
            "sought": In(asked_layout(has_pasid)), "is_answered": Out(1), "is_pending": Out(1), "answer": Out(Answer),
            "ask": In(1), "has_answers": Out(1), "has_room": Out(1), "spare": Out(1), "release": In(1), "begins": In(1),
            "enable": In(MAX_FUNCTIONS), "forget": In(1),
            "bursts": Out(stream.Signature(AddressedBurst)),
            "read_data": In(stream.Signature(BurstData(width))),
            "fill": Out(stream.Signature(entry_layout(store_features(has_pasid)))),
            "sent": Out(1),
            **(pages if page_patience_cycles else {}),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        layout = data.StructLayout({
            "state": State, "function": 3, "page": PAGE_BITS, "no_write": 1, "stale": 1, "seen": 1, "answer": Answer,
            **({"paging": Paging, "again": 1, "age": 2} if self.page_patience_cycles else {}),
            **({"pasid": Pasid} if self.has_pasid else {}),
        })  # fmt: skip
        slots = Array(Signal(layout, name=f"slot_{n}") for n in range(self.count))

        # Look up: at most one answer fits, or several that say the same of the page.
        sought, free = self.sought, Signal(range(self.count))
        answered, pending, idle = Signal(self.count), Signal(self.count), Signal(self.count)
        for n, slot in reversed(list(enumerate(slots))):
            fits = Signal(name=f"fits_{n}")
            same = (slot.function == sought.function) & (slot.page == sought.page[:PAGE_BITS])
            if self.has_pasid:
                same &= slot.pasid.as_value() == sought.pasid.as_value()
            m.d.comb += [
                fits.eq(same & ~(sought.is_write & slot.no_write)),
                answered[n].eq(fits & (slot.state == State.DONE)),
                pending[n].eq(fits & ((slot.state == State.SEND) | (slot.state == State.SENT))),
                idle[n].eq(slot.state == State.FREE),
            ]
            with m.If(answered[n]):
                m.d.comb += self.answer.eq(slot.answer)
            with m.If(idle[n]):
                m.d.comb += free.eq(n)
        m.d.comb += [
            self.is_answered.eq(answered.any()), self.is_pending.eq(pending.any()), self.has_room.eq(idle.any()),
            self.has_answers.eq(Cat(slot.state == State.DONE for slot in slots).any()),
            self.spare.eq((idle & (idle - (self.count > 1))).any()),
        ]  # fmt: skip
        with m.If(self.ask):
            new = slots[free]
            m.d.sync += [
                new.state.eq(State.SEND), new.function.eq(sought.function), new.page.eq(sought.page), new.no_write.eq(~sought.is_write),
                new.stale.eq(0), new.seen.eq(0),
            ]  # fmt: skip
            if self.page_patience_cycles:
                m.d.sync += new.again.eq(0)
            if self.has_pasid:
                m.d.sync += new.pasid.eq(sought.pasid)

        # Send.
        burst, waiting = self.bursts.payload, Signal(self.count)
        chosen, next_one = Signal(range(self.count)), Signal(layout)
        m.d.comb += waiting.eq(Cat(slot.state == State.SEND for slot in slots))
        for n in reversed(range(self.count)):
            with m.If(waiting[n]):
                m.d.comb += [chosen.eq(n), next_one.eq(slots[n])]
        takes, is_enabled = Signal(), self.enable.bit_select(next_one.function, 1)
        m.d.comb += takes.eq(waiting.any() & (~self.bursts.valid | self.bursts.ready))
        with m.If(self.bursts.ready):
            m.d.sync += self.bursts.valid.eq(0)
        with m.If(takes):
            m.d.sync += [
                self.bursts.valid.eq(is_enabled), burst.address.eq(Cat(Const(0, 12), next_one.page)), burst.length_bytes.eq(ENTRY_BYTES),
                burst.is_wall.eq(1), burst.function.eq(next_one.function), burst.cookie.eq(chosen),
                burst.at.eq(pcie.AT_TRANSLATION_REQUEST), burst.no_write.eq(next_one.no_write),
                slots[chosen].state.eq(Mux(is_enabled, State.SENT, State.DONE)),
                slots[chosen].answer.eq(Const({"untranslated": 1}, Answer)), slots[chosen].seen.eq(0),
            ]  # fmt: skip
            if self.has_pasid:
                m.d.sync += [burst.pasid_valid.eq(next_one.pasid.valid), burst.pasid.eq(next_one.pasid.value)]
        m.d.comb += self.sent.eq(self.bursts.valid & self.bursts.ready)

        # An entry comes; a cycle later it is taken apart, and kept and stored in the next.
        beat, raw = self.read_data.payload, Signal(64)
        got, at, number = Signal(), Signal(range(self.count)), Signal(64)
        failed = Signal()
        m.d.comb += [
            self.read_data.ready.eq(1),
            raw.eq(Cat(beat.data[8 * n : 8 * n + 8] for n in reversed(range(ENTRY_BYTES)))),  # byte 0 is the highest [PCIe5 10.2.3.2]
        ]
        m.d.sync += [
            got.eq(self.read_data.valid), at.eq(beat.cookie), number.eq(raw), failed.eq(beat.status != BurstStatus.OK),
        ]  # fmt: skip
        page, is_range, mask = number[12:], number[11], Signal(52)
        readable, writable, untranslated = number[0], number[1], number[2]
        ours, is_beyond = Signal(layout), Signal()
        m.d.comb += [ours.eq(slots[at]), mask.eq(Mux(is_range, page ^ (page + 1), 0))]
        frame, reach = Signal(52), Signal(range(len(SUPERPAGES) + 1))
        m.d.comb += [frame.eq((page & ~mask) | (ours.page & mask)), is_beyond.eq(page[FRAME_BITS:].any())]
        for n, (low, _) in enumerate(SUPERPAGES, 1):
            with m.If(mask[low - 1]):  # the range has 2 ** low pages at least
                m.d.comb += reach.eq(n)
        permits_nothing = failed | ~(readable | writable)
        is_used, answer = Signal(), Signal(Answer)
        m.d.comb += [
            is_used.eq(got & ~ours.stale & ~self.forget),
            answer.page.eq(frame), answer.readable.eq(readable), answer.writable.eq(writable),
            answer.untranslated.eq(untranslated | is_beyond), answer.fault.eq(permits_nothing),
        ]  # fmt: skip
        with m.If(got):
            with m.If(is_used):
                m.d.sync += [slots[at].state.eq(State.DONE), slots[at].answer.eq(answer), slots[at].seen.eq(0)]
            with m.Else():
                m.d.sync += [slots[at].state.eq(State.SEND), slots[at].stale.eq(0)]
        entry = self.fill.payload
        m.d.sync += [
            self.fill.valid.eq(is_used & ~permits_nothing),
            entry.vpn.eq(ours.page), entry.ppn.eq(frame), entry.readable.eq(readable),
            entry.writable.eq(writable), entry.reach.eq(reach), entry.U.eq(untranslated | is_beyond),
            *put_space(entry, ours, self.has_pasid),
        ]  # fmt: skip

        if self.page_patience_cycles:
            wants_page = (is_used & ~failed & ~untranslated & ~Mux(ours.no_write, readable, writable) & ~ours.again
                          & self.may_page.bit_select(ours.function, 1))  # fmt: skip
            self._page(m, slots, wants_page, at)

        # Answers end, or are too old.
        for slot in slots:
            with m.If(slot.state == State.DONE):
                with m.If(self.begins):
                    m.d.sync += slot.seen.eq(1)
                with m.If(self.release & slot.seen):
                    m.d.sync += slot.state.eq(State.FREE)
        with m.If(self.forget):
            for n, slot in enumerate(slots):
                with m.If(slot.state == State.DONE):
                    m.d.sync += slot.state.eq(State.SEND)
                with m.If((slot.state == State.SENT) & ~(got & (at == n))):
                    m.d.sync += slot.stale.eq(1)
        return m

    def _page(self, m, slots, wants_page, at):
        """Let the request ``at`` wait for its page if it wants to, and those that have theirs, or will not get it, go on."""
        with m.If(wants_page):
            m.d.sync += [slots[at].state.eq(State.SENT), slots[at].paging.eq(Paging.WANTS), slots[at].age.eq(0)]

        left, tick = Signal(range(self.page_patience_cycles)), Signal()
        m.d.comb += tick.eq(left == 0)
        m.d.sync += left.eq(Mux(tick, self.page_patience_cycles - 1, left - 1))
        wanted, over = self.wanted, self.over
        m.d.comb += [
            over.ready.eq(1),
            self.is_asking.eq(Cat((slot.state != State.FREE) & (slot.paging == Paging.NO) for slot in slots).any()),
        ]
        for n, slot in reversed(list(enumerate(slots))):
            ends, is_over, wants = Signal(name=f"ends_{n}"), Signal(name=f"over_{n}"), Signal(name=f"wants_{n}")
            m.d.comb += [
                ends.eq(~self.may_page.bit_select(slot.function, 1) | (slot.age == MAX_AGE)),
                is_over.eq(over.valid & (over.p.slot == n) & self.waits[n]),
                self.waits[n].eq(slot.paging == Paging.WAITS), wants.eq((slot.paging == Paging.WANTS) & ~ends),
            ]  # fmt: skip
            with m.If(wants):
                m.d.comb += [
                    self.wants.eq(1), wanted.slot.eq(n), wanted.function.eq(slot.function), wanted.page.eq(slot.page),
                    wanted.is_write.eq(~slot.no_write),
                ]  # fmt: skip
                if self.has_pasid:
                    m.d.comb += wanted.pasid.eq(slot.pasid)
                with m.If(self.takes & (wanted.slot == n)):
                    m.d.sync += slot.paging.eq(Paging.WAITS)
            with m.If(tick & (slot.paging != Paging.NO)):
                m.d.sync += slot.age.eq(slot.age + 1)
            with m.If(is_over & over.p.granted):
                m.d.sync += [slot.state.eq(State.SEND), slot.paging.eq(Paging.NO), slot.again.eq(1), slot.stale.eq(0)]
            with m.Elif(is_over | (ends & (slot.paging != Paging.NO))):
                m.d.sync += [
                    slot.state.eq(State.DONE), slot.paging.eq(Paging.NO), slot.answer.eq(Const({"fault": 1}, Answer)), slot.seen.eq(0),
                ]  # fmt: skip
