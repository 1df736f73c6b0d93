"""From everyone who finds errors to the one who reports them; nobody waits."""

from amaranth import Array, Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..stream.arbiter import Arbiter
from ..tlp.codec import encode
from ..tlp.completer import CompleterEvents
from ..tlp.layouts import ConfigState, Header, Malformed
from ..tlp.tags import TagEvents
from .layouts import ErrorKind, ErrorReport

__all__ = ["CompletionTap", "ErrorCollector"]

TAG_EVENTS_LATER = 2  # cycles from a completion's last beat to its TagEvents


class CompletionTap(data.Struct):
    """What is taken at the completions' way to the tag table in this cycle."""

    first: 1  # a first beat, with ``header``
    spoilt: 1  # the last beat of a damaged completion, which was reported as malformed
    header: Header


class ErrorCollector(wiring.Component):
    """Makes error reports of events, one waiting for each kind of source: what comes while one waits is dropped.

    Sources are malformed TLPs, the completer, and of the tag table unexpected completions, poisoned ones, timeouts, and completions
    that say Unsupported Request or Completer Abort. They are reported in turn. An error that no function claims, and an unexpected
    completion whose Requester ID is that of no function that is there, belong to all. The header of a poisoned completion is that of the
    latest one that came in front of the end of its request; a timeout has none. Reserved bits of a header that was decoded are 0.
    [PCIe5 6.2.3.2.3, 6.2.4]

    Latency: 2 cycles from an event to its report.

    Parameters
    ----------
    functions : :class:`int`
        Functions of the card.

    Members
    -------
    malformed : ``In(Malformed)``
        From the link adapter.
    completer : ``In(CompleterEvents)``
        From the completer.
    tags : ``In(TagEvents)``
        From the tag table: 2 cycles behind the last beat of the completion that they are about.
    completions : ``In(CompletionTap)``
        What the tag table takes.
    state : ``In(ConfigState)``, one per function
        For IDs.
    present : ``In(functions)``
        A bit per function: it is there.
    reports : ``Out(stream.Signature(ErrorReport))``
        To :class:`.errors.Errors`.
    """

    def __init__(self, *, functions):
        self.functions = functions
        super().__init__({
            "malformed": In(Malformed),
            "completer": In(CompleterEvents),
            "tags": In(TagEvents),
            "completions": In(CompletionTap),
            "state": In(ConfigState).array(functions),
            "present": In(functions),
            "reports": Out(stream.Signature(ErrorReport)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.turns = turns = Arbiter(ErrorReport, 6)
        wiring.connect(m, turns.o, wiring.flipped(self.reports))
        completer, tags = self.completer, self.tags

        # Headers of completions, as old as the events are; all of them are completions.
        header = Signal(Header)
        m.d.comb += [header.eq(self.completions.header), header.type.eq(pcie.TYPE_COMPLETION | self.completions.header.type[0])]
        newest, taken, poisoned = Signal(96), Signal(96), Signal(96)
        spoilt, is_known = Signal(TAG_EVENTS_LATER), Signal()
        completion = Cat(encode(m, "completion", header)[:3])
        with m.If(self.completions.first):
            m.d.sync += newest.eq(completion)
        m.d.sync += [taken.eq(newest), spoilt.eq(Cat(self.completions.spoilt, spoilt))]
        with m.If(newest[14]):
            m.d.sync += poisoned.eq(newest)
        requester = taken[80:96]
        identity = Array(Cat(Const(n, 3), state.device, state.bus) for n, state in enumerate(self.state))[requester[:3]]
        is_there = Cat(self.present, Const(0, 8 - self.functions)).bit_select(requester[:3], 1)
        m.d.comb += is_known.eq((requester == identity) & is_there)

        kind = Signal(ErrorKind, init=ErrorKind.UNSUPPORTED)
        with m.If(completer.aborted):
            m.d.comb += kind.eq(ErrorKind.COMPLETER_ABORT)
        with m.Elif(completer.poisoned):
            m.d.comb += kind.eq(ErrorKind.POISONED)
        with m.Elif(completer.malformed):
            m.d.comb += kind.eq(ErrorKind.MALFORMED)
        abort = Signal(ErrorKind, init=ErrorKind.RECEIVED_MASTER_ABORT)
        with m.If(tags.aborted):
            m.d.comb += abort.eq(ErrorKind.RECEIVED_TARGET_ABORT)
        is_completer = completer.unsupported | completer.aborted | completer.poisoned | completer.malformed
        dwords = Signal(128)
        m.d.comb += dwords.eq(Cat(encode(m, "request", completer.header)))
        with m.If(~completer.header.fmt[pcie.FMT_4DW]):
            m.d.comb += dwords[96:].eq(0)

        sources = (  # what happened, kind, function, whether it is of all, header
            (self.malformed.found, ErrorKind.MALFORMED, 0, 1, self.malformed.header),
            (is_completer, kind, completer.function, completer.is_for_all, dwords),
            (tags.unexpected & ~spoilt[-1], ErrorKind.UNEXPECTED_COMPLETION, requester[:3], ~is_known, taken),
            (tags.poisoned, ErrorKind.POISONED, tags.function, 0, poisoned),
            (tags.timeout, ErrorKind.COMPLETION_TIMEOUT, tags.function, 0, 0),
            (tags.unsupported | tags.aborted, abort, tags.function, 0, 0),
        )
        for (happens, what, function, is_for_all, found), waiting in zip(sources, turns.i):
            with m.If(waiting.ready):
                m.d.sync += waiting.valid.eq(0)
            with m.If(happens & ~waiting.valid):
                m.d.sync += [
                    waiting.valid.eq(1),
                    waiting.payload.function.eq(function),
                    waiting.payload.is_for_all.eq(is_for_all),
                    waiting.payload.kind.eq(what),
                    waiting.payload.header.eq(found),
                ]
        return m
