"""Answers the requests that the host sends us."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..regs.bus import RegisterBus
from ..spec import pcie
from .codec import is_config, is_message
from .layouts import (
    ConfigRequest,
    ConfigResponse,
    ConfigState,
    DecodeRequest,
    DecodeResponse,
    Header,
    Invalidation,
    TlpBeat,
    page_response_layout,
)

MAX_READ_BYTES = 128  # one completion of any Max_Payload_Size; a longer read of a BAR is answered with Completer Abort


class CompleterEvents(data.Struct):
    """Pulses for error reporting, at most one at a time; the other fields count with one. [PCIe5 6.2.3, 6.2.4]"""

    unsupported: 1  # Unsupported Request, answered (non-posted) or dropped (posted)
    aborted: 1  # Completer Abort
    poisoned: 1  # poisoned data was not used
    malformed: 1  # dropped: a configuration or I/O request whose length is not 1
    function: 8
    is_for_all: 1  # no function claims the request
    header: Header  # of the request


class Completer(wiring.Component):
    """Serves configuration and memory requests, one after the other, and answers each non-posted request exactly once.

    Configuration requests of type 0 go to ``config_requests``. Memory requests are looked up with ``decode_requests``, then
    become one access for each aligned 8-byte word that they touch, in ascending order: what lies in one word is one access. A
    read of up to 128 bytes is answered with one completion, whose byte count and lower address follow its byte enables; a zero-length
    read or write touches no register; a longer read, or one in which a register reports an error, is answered with Completer Abort; a
    posted write ends at an error. All else that wants an answer, a BAR miss, and a function with memory disabled get Unsupported
    Request; messages are dropped. Poisoned data is not used. Of a write shorter than its length no dword is
    used that did not come. A request that is refused and poisoned is an unsupported one; a message is unsupported unless every
    endpoint must accept it or vendors say what it means, type 1. [PCIe5 2.2.8, 2.3.1, 2.7.2, 6.2.3.2.3]

    With ``host_ats`` Invalidate Requests of two dwords to functions that are ``present`` go to ``invalidations``; with
    ``has_pri`` PRG Responses to them go to ``page_responses``. [PCIe5 10.3.1, 10.4.2] With ``has_pasid`` both may have a PASID if
    their function's ``pasid_enable`` is 1; any other request that has one is unsupported. [PCIe5 6.20]

    Latency: from a request to its completion 3 cycles for configuration, 6 for a read of one word and 2 more for each further one,
    besides the time of those it asks. Throughput: one request at a time; nothing it waits for depends on DMA,
    but an Invalidate Request that finds no room.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    functions : :class:`int`
        Functions of the card.
    host_ats : :class:`bool`
        They have ATS.
    has_pri : :class:`bool`
        And send page requests.
    has_pasid : :class:`bool`
        With ``host_ats``: they know PASIDs.

    Members
    -------
    requests : ``In(stream.Signature(TlpBeat(width, has_pasid)))``
        Requests.
    completions : ``Out(stream.Signature(TlpBeat(width)))``
        Answers; without bubbles.
    config_requests, config_responses : streams
        One configuration access at a time.
    decode_requests, decode_responses : streams
        One address at a time.
    registers : ``Out(RegisterBus())``
        One register access at a time.
    state : ``In(ConfigState)``, one per function
        For completer IDs.
    events : ``Out(CompleterEvents)``
        Pulses.
    invalidations : ``Out(stream.Signature(Invalidation))``
        With ``host_ats``: one Invalidate Request at a time.
    present : ``In(functions)``
        With ``host_ats``: the function is there.
    page_responses : ``Out(stream.Signature(page_response_layout(has_pasid)))``
        With ``has_pri``: one PRG Response at a time.
    pasid_enable : ``In(functions)``
        With ``has_pasid``: PASID Enable of each function.
    """

    def __init__(self, *, width, functions, host_ats=False, has_pri=False, has_pasid=False):
        self.width, self.functions, self.host_ats, self.has_pri, self.has_pasid = width, functions, host_ats, has_pri, has_pasid
        super().__init__({
            "requests": In(stream.Signature(TlpBeat(width, has_pasid))),
            "completions": Out(stream.Signature(TlpBeat(width))),
            "config_requests": Out(stream.Signature(ConfigRequest)),
            "config_responses": In(stream.Signature(ConfigResponse)),
            "decode_requests": Out(stream.Signature(DecodeRequest)),
            "decode_responses": In(stream.Signature(DecodeResponse)),
            "registers": Out(RegisterBus()),
            "state": In(ConfigState).array(functions),
            "events": Out(CompleterEvents),
            **({"invalidations": Out(stream.Signature(Invalidation)), "present": In(functions)} if host_ats else {}),
            **({"page_responses": Out(stream.Signature(page_response_layout(has_pasid)))} if has_pri else {}),
            **({"pasid_enable": In(functions)} if has_pasid else {}),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 32
        beat, header = self.requests.payload, self.requests.payload.header
        kept = Signal.like(header)
        is_write = kept.fmt[pcie.FMT_DATA]
        answers = Signal()  # the request wants a completion
        status = Signal(3)
        place, is_claimed = Signal(DecodeResponse), Signal()  # ``is_claimed``: by place.function
        completer_id = Signal(16)

        # Bytes asked for: the first of them, and how many from the first to the last. [PCIe5 2.3.1.1]
        first_be, last_be = kept.first_be, Mux(kept.length_dw == 1, kept.first_be, kept.last_be)
        low, high = Signal(2), Signal(2)
        for n in reversed(range(4)):
            with m.If(first_be[n]):
                m.d.comb += low.eq(n)
        for n in range(4):
            with m.If(last_be[n]):
                m.d.comb += high.eq(n)
        nothing = (kept.length_dw == 1) & (kept.first_be == 0)
        byte_count, lower_address = Signal(13), Signal(7)
        is_read = (kept.type[1:] == pcie.TYPE_MEMORY >> 1) & ~is_write
        m.d.sync += [byte_count.eq(4), lower_address.eq(0)]
        with m.If(is_read):
            m.d.sync += [
                byte_count.eq(Mux(nothing, 1, ((kept.length_dw - 1) << 2) + high - low + 1)),
                lower_address.eq(Cat(low, kept.address[2:7])),
            ]

        # The dword at work; whether its neighbour goes with it, and comes with the next beat only.
        index, lane = Signal(range(MAX_READ_BYTES // 4)), Signal(range(lanes))
        left, is_first = Signal(11), Signal()  # dwords from it on; it is the request's first
        in_page, offset = Signal(10), Signal(32)  # in the BAR, in dwords and in bytes; no request crosses 4 KiB [PCIe5 2.2.7]
        pair, last_pair, straddles, lacks = Signal(), Signal(), Signal(), Signal()
        saved, has_saved = Signal(32), Signal()
        m.d.comb += [
            lane.eq(index),
            offset.eq(Cat(Const(0, 2), in_page, place.offset[12:])),
            pair.eq(~offset[2] & (left > 1)),
            last_pair.eq(Mux(pair, left == 2, left == 1)),
            straddles.eq(is_write & pair & (lane == lanes - 1) & ~has_saved),
            lacks.eq(is_write & (beat.dword_count <= Mux(has_saved, 0, lane + (pair & ~straddles)))),
        ]

        enables, next_enables = Signal(4), Signal(4)
        m.d.comb += [
            enables.eq(Mux(is_first, kept.first_be, Mux(left == 1, kept.last_be, 0xF))),
            next_enables.eq(Mux(left == 2, kept.last_be, 0xF)),
        ]
        here, neighbour = Signal(32), Signal(32)
        m.d.comb += [
            here.eq(Mux(has_saved, saved, beat.data.word_select(lane, 32))),
            neighbour.eq(beat.data.word_select((lane + 1)[: len(lane)], 32)),
        ]
        request = self.registers.request

        sent = Signal(11)  # dwords of the completion that have left
        out = self.completions.payload
        answer, config_answers, is_empty = self.registers.response, Signal(), Signal()
        following = Signal.like(sent)
        m.d.comb += following.eq(Mux(self.completions.valid & self.completions.ready, sent + lanes, sent))
        for n in range(lanes):  # dwords of the completion, in their order
            m.submodules[f"dwords_{n}"] = dwords = Memory(shape=32, depth=MAX_READ_BYTES // 4 // lanes, init=[])
            write = dwords.write_port()
            read = dwords.read_port(transparent_for=(write,))
            is_here, is_next = lane == n, (lane == (n - 1) % lanes) & pair
            m.d.comb += [
                write.en.eq(answer.valid & answer.ready & (is_here | is_next)),
                write.addr.eq((index + is_next) >> (lanes.bit_length() - 1)),
                write.data.eq(Mux(is_next | offset[2], answer.p.data[32:], answer.p.data[:32])),
                read.addr.eq(following >> (lanes.bit_length() - 1)),
                out.data.word_select(n, 32).eq(read.data),
            ]
            if n == 0:
                with m.If(config_answers):
                    m.d.comb += [write.en.eq(1), write.data.eq(self.config_responses.p.data)]
                with m.If(is_empty):
                    m.d.comb += [write.en.eq(1), write.data.eq(0)]
        has_data, length_dw = Signal(), Signal.like(out.header.length_dw)
        m.d.comb += [
            has_data.eq((status == pcie.STATUS_SC) & ~is_write),
            length_dw.eq(Mux(has_data, kept.length_dw, 0)),
            out.header.fmt.eq(Mux(has_data, 1 << pcie.FMT_DATA, 0)),
            out.header.type.eq(pcie.TYPE_COMPLETION | (kept.type == pcie.TYPE_MEMORY_LOCKED)),
            out.header.tc.eq(kept.tc),
            out.header.relaxed_ordering.eq(kept.relaxed_ordering),
            out.header.no_snoop.eq(kept.no_snoop),
            out.header.length_dw.eq(length_dw),
            out.header.requester_id.eq(kept.requester_id),
            out.header.tag.eq(kept.tag),
            out.header.completer_id.eq(completer_id),
            out.header.status.eq(status),
            out.header.byte_count.eq(byte_count),
            out.header.lower_address.eq(lower_address),
            out.first.eq(sent == 0),
            out.dword_count.eq(Mux(length_dw - sent < lanes, length_dw - sent, lanes)),
            out.last.eq(sent + lanes >= length_dw),
        ]
        identities = Signal(16)
        with m.Switch(place.function):
            for n in range(self.functions):
                with m.Case(n):
                    m.d.comb += identities.eq(Cat(Const(n, 3), self.state[n].device, self.state[n].bus))

        config = self.config_requests.payload
        m.d.comb += [
            config.function.eq(kept.completer_id[:3]),
            config.device.eq(kept.completer_id[3:8]),
            config.bus.eq(kept.completer_id[8:]),
            config.register.eq(kept.address[2:12]),
            config.is_write.eq(is_write),
            config.byte_enable.eq(kept.first_be),
            config.data.eq(beat.data[:32]),
            self.decode_requests.payload.address.eq(Cat(Const(0, 3), kept.address[3:])),
        ]

        events = {name: Signal(name=name) for name in ("unsupported", "aborted", "poisoned", "malformed")}
        m.d.sync += [getattr(self.events, name).eq(event) for name, event in events.items()]
        m.d.comb += [self.events.function.eq(place.function), self.events.is_for_all.eq(~is_claimed), self.events.header.eq(kept)]
        is_accepted = Cat(header.message_code == code for code in (*pcie.MESSAGES_ACCEPTED, pcie.MESSAGE_VENDOR_1)).any()

        if self.host_ats:  # its body is drawn as a header is: byte 0 is the highest
            body, order = Cat(beat.data[8 * n : 8 * n + 8] for n in reversed(range(8))), self.invalidations.p
            m.d.comb += [
                order.function.eq(kept.address[48:51]), order.requester_id.eq(kept.requester_id), order.itag.eq(kept.tag),
                order.page.eq(body[12:]), order.is_range.eq(body[11]),
            ]  # fmt: skip

        if self.has_pri:
            reply = self.page_responses.p
            m.d.comb += [reply.function.eq(kept.address[48:51]), reply.code.eq(kept.address[44:48]), reply.index.eq(kept.address[32:41])]
            if self.has_pasid:
                m.d.comb += reply.pasid.eq(beat.pasid)

        with m.FSM():
            with m.State("TAKE"):  # the beat stays at the input until the request has been served
                is_memory, is_register = header.type == pcie.TYPE_MEMORY, is_config(header) | (header.type == pcie.TYPE_IO)
                is_atomic = header.type[2:] == pcie.TYPE_FETCH_ADD >> 2
                posted = is_message(header) | (is_memory & header.fmt[pcie.FMT_DATA])
                is_poisoned = header.poisoned & header.fmt[pcie.FMT_DATA]
                m.d.sync += [
                    kept.eq(header), answers.eq(~posted), status.eq(pcie.STATUS_SC), sent.eq(0), place.function.eq(0), is_claimed.eq(0),
                    index.eq(0), left.eq(header.length_dw), is_first.eq(1), has_saved.eq(0),
                ]
                is_ours = header.completer_id[:3] < self.functions
                with m.If((header.type == pcie.TYPE_CONFIG_0) & is_ours):
                    m.d.sync += [place.function.eq(header.completer_id[:3]), is_claimed.eq(1)]
                is_short = header.fmt[pcie.FMT_DATA] & beat.last & (beat.dword_count < header.length_dw)
                with m.If(self.requests.valid & (~beat.first | is_short)):
                    m.next = "DROP"
                with m.Elif(self.requests.valid & is_register & ((header.length_dw != 1) | (header.last_be != 0))):
                    m.d.comb += events["malformed"].eq(1)
                    m.d.sync += is_claimed.eq(0)
                    m.next = "DROP"
                with m.Elif(self.requests.valid):
                    m.next = "REFUSE"
                    with m.If(header.type == pcie.TYPE_CONFIG_0):
                        m.next = "ASK_CONFIG"
                        with m.If(is_poisoned):
                            m.d.comb += events["poisoned"].eq(is_ours)
                            m.next = "REFUSE"
                    with m.Elif(self._and_plain(is_memory | is_atomic | (header.type == pcie.TYPE_MEMORY_LOCKED))):
                        m.next = "ASK_DECODER"
                    if self.host_ats:
                        with m.Elif(self._invalidates(header)):
                            m.d.comb += events["poisoned"].eq(is_poisoned)
                            m.d.sync += [place.function.eq(header.address[48:51]), is_claimed.eq(1)]
                            m.next = "DROP"
                            with m.If(~is_poisoned):
                                m.next = "INVALIDATE"
                    if self.has_pri:
                        with m.Elif(self._answers_pages(header)):
                            m.next = "TELL"
                    with m.Elif(self._and_plain(is_message(header) & is_accepted)):
                        m.d.comb += events["poisoned"].eq(is_poisoned)
                        m.next = "DROP"

            if self.host_ats:
                with m.State("INVALIDATE"):
                    m.d.comb += self.invalidations.valid.eq(1)
                    with m.If(self.invalidations.ready):
                        m.next = "DROP"
            if self.has_pri:
                with m.State("TELL"):
                    m.d.comb += self.page_responses.valid.eq(1)
                    with m.If(self.page_responses.ready):
                        m.next = "DROP"
            with m.State("ASK_CONFIG"):
                m.d.comb += self.config_requests.valid.eq(1)
                with m.If(self.config_requests.ready):
                    m.next = "AWAIT_CONFIG"
            with m.State("AWAIT_CONFIG"):
                m.d.comb += [self.config_responses.ready.eq(1), config_answers.eq(1)]
                with m.If(self.config_responses.valid):
                    m.d.sync += [completer_id.eq(identities), self.completions.valid.eq(~self.config_responses.payload.unsupported)]
                    m.next = "COMPLETE"
                    with m.If(self.config_responses.payload.unsupported):  # no such function
                        m.d.sync += is_claimed.eq(0)
                        m.next = "REFUSE"

            with m.State("ASK_DECODER"):
                m.d.comb += self.decode_requests.valid.eq(1)
                with m.If(self.decode_requests.ready):
                    m.next = "AWAIT_DECODER"
            with m.State("AWAIT_DECODER"):
                m.d.comb += self.decode_responses.ready.eq(1)
                with m.If(self.decode_responses.valid):
                    found = self.decode_responses.payload
                    m.d.sync += [place.eq(found), is_claimed.eq(found.claimed), in_page.eq(Cat(kept.address[2], found.offset[3:12]))]
                    m.next = "IDENTIFY"
                    with m.If(~found.hit | (kept.type != pcie.TYPE_MEMORY)):
                        m.next = "REFUSE"
                    with m.Elif(kept.poisoned & is_write):
                        m.d.comb += events["poisoned"].eq(1)
                        m.next = "DROP"
            with m.State("IDENTIFY"):
                m.d.comb += is_empty.eq(1)
                m.d.sync += completer_id.eq(identities)
                m.next = "PREPARE"
                with m.If(nothing):
                    m.next = "DROP"
                    with m.If(answers):
                        m.d.sync += self.completions.valid.eq(1)
                        m.next = "COMPLETE"
                with m.Elif(answers & (kept.length_dw > MAX_READ_BYTES // 4)):
                    m.next = "ABORT"
            with m.State("PREPARE"):
                m.d.sync += [
                    request.payload.function.eq(place.function),
                    request.payload.bar.eq(place.bar),
                    request.payload.offset.eq(Cat(Const(0, 3), offset[3:])),
                    request.payload.is_write.eq(is_write),
                    request.payload.byte_enable.eq(Cat(enables, Mux(pair, next_enables, 0))),
                    request.payload.data.eq(Cat(here, neighbour)),
                ]
                with m.If(offset[2]):
                    m.d.sync += [
                        request.payload.byte_enable.eq(Cat(Const(0, 4), enables)),
                        request.payload.data.eq(Cat(Const(0, 32), here)),
                    ]
                m.next = "ACCESS"
                with m.If(lacks):
                    m.next = "DROP"
                with m.Elif(straddles):
                    m.d.sync += [saved.eq(here), has_saved.eq(1)]
                    m.next = "NEXT_BEAT"
            with m.State("ACCESS"):
                m.d.comb += request.valid.eq(1)
                with m.If(request.ready):
                    m.next = "AWAIT_ACCESS"
            with m.State("AWAIT_ACCESS"):
                m.d.comb += answer.ready.eq(1)
                with m.If(answer.valid):
                    m.d.sync += [
                        index.eq(index + 1 + pair), in_page.eq(in_page + 1 + pair), left.eq(left - 1 - pair),
                        is_first.eq(0), has_saved.eq(0),
                    ]  # fmt: skip
                    leaves = Signal()  # the beat at the input is used up
                    m.d.comb += leaves.eq(is_write & ~has_saved & (lane + pair == lanes - 1))
                    m.next = "PREPARE"
                    with m.If(answer.p.error):
                        m.next = "ABORT"
                    with m.Elif(last_pair):
                        m.next = "DROP"
                        with m.If(answers):
                            m.d.sync += self.completions.valid.eq(1)
                            m.next = "COMPLETE"
                    with m.Elif(leaves):
                        m.next = "NEXT_BEAT"
            with m.State("NEXT_BEAT"):
                m.next = "AWAIT_BEAT"
                with m.If(beat.last):  # shorter than its length
                    m.next = "DROP"
                with m.Else():
                    m.d.comb += self.requests.ready.eq(1)
            with m.State("AWAIT_BEAT"):
                with m.If(self.requests.valid):
                    m.next = "PREPARE"

            with m.State("REFUSE"):
                is_poisoned_config = kept.poisoned & is_write & is_claimed & (kept.type == pcie.TYPE_CONFIG_0)
                m.d.comb += events["unsupported"].eq(~is_poisoned_config)
                m.d.sync += [status.eq(pcie.STATUS_UR), completer_id.eq(identities)]
                m.next = "DROP"
                with m.If(answers):
                    m.d.sync += self.completions.valid.eq(1)
                    m.next = "COMPLETE"
            with m.State("ABORT"):
                m.d.comb += events["aborted"].eq(1)
                m.d.sync += status.eq(pcie.STATUS_CA)
                m.next = "DROP"
                with m.If(answers):
                    m.d.sync += self.completions.valid.eq(1)
                    m.next = "COMPLETE"
            with m.State("COMPLETE"):
                with m.If(self.completions.ready):
                    m.d.sync += sent.eq(following)
                    with m.If(out.last):
                        m.d.sync += self.completions.valid.eq(0)
                        m.next = "DROP"
            with m.State("DROP"):  # what is left of the request
                m.d.comb += self.requests.ready.eq(1)
                with m.If(self.requests.valid & beat.last):
                    m.next = "TAKE"
        return m

    def _and_plain(self, condition):
        """Return whether ``condition`` holds of the request, and it has no PASID."""
        return condition & ~self.requests.p.pasid.valid if self.has_pasid else condition

    def _invalidates(self, header):
        """Return whether ``header`` is one of an Invalidate Request to a function that is there. [PCIe5 10.3.1]"""
        return self._tells(header, pcie.MESSAGE_INVALIDATE) & header.fmt[pcie.FMT_DATA] & (header.length_dw == 2)

    def _answers_pages(self, header):
        """Return whether ``header`` is one of a PRG Response to a function that is there. [PCIe5 10.4.2]"""
        return self._tells(header, pcie.MESSAGE_PAGE_RESPONSE) & ~header.fmt[pcie.FMT_DATA]

    def _tells(self, header, code):
        """Return whether ``header`` is one of a message with ``code``, routed by ID to a function that is there."""
        function = header.address[48:51]
        is_there = (function < self.functions) & self.present.bit_select(function, 1)
        if self.has_pasid:
            is_there &= ~self.requests.p.pasid.valid | self.pasid_enable.bit_select(function, 1)
        return (header.type == pcie.TYPE_MESSAGE | pcie.ROUTED_BY_ID) & (header.message_code == code) & is_there
