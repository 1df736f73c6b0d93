"""Page requests in flight: sent as messages, ended by the host's responses. [PCIe5 10.4, 10.5.2]"""

from amaranth import Array, Cat, Const, Module, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..tlp.layouts import ConfigState, Pasid, TlpBeat, page_response_layout
from .layouts import MAX_FUNCTIONS, PageOver, page_wanted_layout


class State(enum.Enum, shape=2):
    """Of a page request."""

    FREE = 0
    SEND = 1
    SENT = 2


class PageRequests(wiring.Component):
    """Asks the host to bring pages in: one page for each group, whose index is its place here.

    A request that nobody waits for any more keeps its place until its response, a PRI Reset or a reset of its function. Functions share the
    interface of their owner: no more than its allocation are in flight. A failure ends all of the owner's, whose later responses
    are ignored until it was disabled; a response that fits no request changes nothing but Unexpected Response. [PCIe5 10.4.2.1]
    A request for a process has its PASID. A response with another one does not fit it; one without fits by its index alone.

    Latency: 2 cycles from ``wants`` to the message; none from a response to ``over``. Throughput: a request in 2 cycles.

    Parameters
    ----------
    width : :class:`int`
        Bits of TLP data per beat.
    count : :class:`int`
        Page requests in flight: 1 to 15.
    slots : :class:`int`
        Translation requests, who wait.
    owners : tuple of :class:`int`
        Of each function, who has its Page Request Interface.
    has_pasid : :class:`bool`
        Pages may be those of processes.

    Members
    -------
    wanted, wants, takes : ``In(page_wanted_layout(has_pasid))``, ``In(1)``, ``Out(1)``
        A page is wanted; it is taken.
    waits : ``In(slots)``
        Whoever wanted a page that was taken still waits.
    over : ``Out(stream.Signature(PageOver))``
        Ends; always taken.
    responses : ``In(stream.Signature(page_response_layout(has_pasid)))``
        From the host; always taken.
    messages : ``Out(stream.Signature(TlpBeat(width, has_pasid)))``
        Page Requests.
    config : ``In(ConfigState).array(functions)``
        Of each function: requester IDs, resets.
    enable, restart : ``In(8)``, ``In(8)``
        PRI Enable of each function, or its owner's; pulses of Reset of each owner, in front of what the same write makes of Enable.
    allocation : ``In(32).array(functions)``
        Of each function, or its owner.
    permitted : ``In(8)``
        The function may send at all.
    may_page, stopped : ``Out(8)``, ``Out(8)``
        The function may ask for pages; Stopped of each owner.
    failures, surprises : ``Out(8)``, ``Out(8)``
        Pulses for Response Failure and Unexpected Response of each owner.
    """

    def __init__(self, *, width, count, slots, owners, has_pasid=False):
        self.width, self.count, self.slots, self.owners, self.has_pasid = width, count, slots, tuple(owners), has_pasid
        functions = len(self.owners)
        super().__init__({
            "wanted": In(page_wanted_layout(has_pasid)), "wants": In(1), "takes": Out(1), "waits": In(slots),
            "over": Out(stream.Signature(PageOver)),
            "responses": In(stream.Signature(page_response_layout(has_pasid))),
            "messages": Out(stream.Signature(TlpBeat(width, has_pasid))),
            "config": In(ConfigState).array(functions),
            "enable": In(MAX_FUNCTIONS), "restart": In(MAX_FUNCTIONS), "allocation": In(32).array(functions),
            "permitted": In(MAX_FUNCTIONS),
            "may_page": Out(MAX_FUNCTIONS), "stopped": Out(MAX_FUNCTIONS),
            "failures": Out(MAX_FUNCTIONS), "surprises": Out(MAX_FUNCTIONS),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        functions, indices = len(self.owners), range(self.count)
        layout = data.StructLayout({
            "state": State, "left": 1, "slot": 4, "function": 3, "page": 52, "is_write": 1, **({"pasid": Pasid} if self.has_pasid else {}),
        })  # fmt: skip
        entries = [Signal(layout, name=f"entry_{n}") for n in indices]
        owner_of = Array(self.owners)
        is_free, waiting, failed = Signal(self.count), Signal(self.count), Signal(functions)
        m.d.comb += [
            is_free.eq(Cat(entry.state == State.FREE for entry in entries)),
            waiting.eq(Cat(entry.state == State.SEND for entry in entries)),
            self.may_page.eq(Cat(self.enable[f] & self.permitted[f] & ~failed[owner] for f, owner in enumerate(self.owners))),
        ]

        # Take: when the count of the one before is known.
        has_credit, is_counted = Signal(functions), Signal()
        m.d.comb += self.takes.eq(self.wants & is_free.any() & has_credit.bit_select(self.wanted.function, 1) & is_counted)
        m.d.sync += is_counted.eq(~self.takes)
        theirs = {owner: Cat((entry.state != State.FREE) & (owner_of[entry.function] == owner) for entry in entries)
                  for owner in set(self.owners)}  # fmt: skip
        for f, owner in enumerate(self.owners):
            m.d.sync += has_credit[f].eq(sum(theirs[owner]) < self.allocation[f])
        first_free = is_free & -is_free
        for n, entry in enumerate(entries):
            with m.If(self.takes & first_free[n]):
                m.d.sync += [
                    entry.state.eq(State.SEND), entry.left.eq(0), entry.slot.eq(self.wanted.slot), entry.function.eq(self.wanted.function),
                    entry.page.eq(self.wanted.page), entry.is_write.eq(self.wanted.is_write),
                    *([entry.pasid.eq(self.wanted.pasid)] if self.has_pasid else []),
                ]  # fmt: skip

        # Send.
        message, ids = self.messages.payload, Array(Cat(state.device, state.bus) for state in self.config)
        m.d.comb += [
            message.header.fmt.eq(1 << pcie.FMT_4DW), message.header.type.eq(pcie.TYPE_MESSAGE | pcie.ROUTED_TO_ROOT),
            message.header.message_code.eq(pcie.MESSAGE_PAGE_REQUEST), message.first.eq(1), message.last.eq(1),
        ]  # fmt: skip
        requester_id, content = Signal(16), Signal(64)
        m.d.comb += [message.header.requester_id.eq(requester_id), message.header.address.eq(content)]
        if self.has_pasid:
            pasid = Signal(Pasid)
            m.d.comb += message.pasid.eq(pasid)
        next_one = waiting & -waiting
        with m.If(self.messages.ready):
            m.d.sync += self.messages.valid.eq(0)

        # Responses.
        answer, code = self.responses.p, self.responses.p.code
        owner, matches, ends = owner_of[answer.function], Signal(self.count), Signal(functions)
        is_heard, is_failure, fits = Signal(), Signal(), Signal(self.count)  # a bit for each request: its PASID is the response's
        m.d.comb += [
            self.responses.ready.eq(1),
            is_heard.eq(self.responses.valid & ~failed.bit_select(owner, 1)),
            matches.eq(fits & Cat((answer.index == n) & (entry.state == State.SENT) & (entry.function == answer.function)
                                  for n, entry in enumerate(entries))),
            *([fits.eq(Cat(~answer.pasid.valid | (entry.pasid.as_value() == answer.pasid.as_value()) for entry in entries))]
              if self.has_pasid else [fits.eq(-1)]),
            is_failure.eq((code != pcie.PAGE_SUCCESS) & (code != pcie.PAGE_INVALID)),
            self.over.p.granted.eq(code == pcie.PAGE_SUCCESS),
        ]  # fmt: skip
        fails, surprises = is_heard & matches.any() & is_failure, is_heard & ~matches.any()
        was_restarted = Signal(MAX_FUNCTIONS)
        m.d.sync += was_restarted.eq(self.restart)
        for number, used in theirs.items():
            m.d.comb += [
                self.failures[number].eq(fails & (owner == number)), self.surprises[number].eq(surprises & (owner == number)),
                self.stopped[number].eq(~self.enable[number] & ~used.any()),
                ends[number].eq((was_restarted[number] & ~self.enable[number]) | self.failures[number]),
            ]  # fmt: skip
            with m.If(~self.enable[number]):
                m.d.sync += failed[number].eq(0)
            with m.Elif(self.failures[number]):
                m.d.sync += failed[number].eq(1)

        in_reset = Array(state.in_reset for state in self.config)
        for n, entry in enumerate(entries):
            is_waited_for = self.waits.bit_select(entry.slot, 1) & ~entry.left
            with m.If(~is_waited_for & (entry.state != State.FREE)):
                m.d.sync += entry.left.eq(1)
            with m.If((entry.state == State.SEND) & ~is_waited_for):
                m.d.sync += entry.state.eq(State.FREE)
            with m.Elif(next_one[n] & (~self.messages.valid | self.messages.ready)):
                m.d.sync += [
                    self.messages.valid.eq(1), requester_id.eq(Cat(entry.function, ids[entry.function])), entry.state.eq(State.SENT),
                    content.eq(Cat(~entry.is_write, entry.is_write, Const(1, 1), Const(n, 9), entry.page)),
                    *([pasid.eq(entry.pasid)] if self.has_pasid else []),
                ]  # fmt: skip
            with m.If(is_heard & matches[n]):
                m.d.comb += [self.over.valid.eq(is_waited_for), self.over.p.slot.eq(entry.slot)]
                m.d.sync += entry.state.eq(State.FREE)
            is_forgotten = ends.bit_select(owner_of[entry.function], 1) | in_reset[entry.function]
            with m.If((entry.state != State.FREE) & is_forgotten):
                m.d.sync += entry.state.eq(State.FREE)

        return m
