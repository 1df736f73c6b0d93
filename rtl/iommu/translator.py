"""The translation path: caches in front, walker behind."""

from amaranth import Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import riscv_iommu as spec
from ..stream.queue import Queue
from .contexts import ContextCache, Process, context_layout
from .features import Features
from .iotlb import Iotlb, found_layout, space_layout
from .iotlb_second import SecondIotlb
from .layouts import (
    Events,
    FaultReport,
    Invalidate,
    InvalidateKind,
    Kind,
    MemoryRead,
    MemoryReadData,
    MemoryUpdate,
    MrifTarget,
    asked_layout,
    request_layout,
    response_layout,
)
from .walker import Walker
from .walker_rules import is_canonical, is_guest_page, is_refused, needs_process, passes_first


class Translator(wiring.Component):
    """Translates a page per cycle as long as contexts and translations are cached; walks run beside.

    Answers come out of order, by cookie. An invalidation that was accepted is effective for every request that is accepted later: caches
    forget, and what walks in flight bring neither fills a cache nor serves such a request. With ddtp Bare every page is its own
    translation. Translation requests always walk, and fill no cache but those of contexts: the device keeps what it is answered.
    [RVIOMMU1.0 3.3, 3.6]

    Latency: 2 cycles from request accepted to response valid when cached, 4 when only the second level has it; a miss 8 cycles more than
    its reads and the lookup in a second level. Throughput: one request per cycle while one more miss could wait; the answer of a miss or
    of the second level takes the place of one hit, and so does a request that comes back from the walker.

    Parameters
    ----------
    entries, ways, superpage_entries : :class:`int`
        See :class:`.iotlb.Iotlb`.
    second_entries, second_generation_bits : :class:`int`
        See :class:`.iotlb_second.SecondIotlb`; 0 entries: there is none.
    walks, context_entries : :class:`int`
        Walks in flight, for which 16 requests can wait, or 32 if there are more than 4; device contexts cached, and as many process
        contexts.
    misses : :class:`int`
        Requests that wait in front of the walker before what is behind them stalls; prefetches do not wait.
    physical_address_bits, features
        See :class:`.walker.Walker`.

    Members
    -------
    request, response : ``In(stream.Signature(request_layout(features)))``, ``Out(stream.Signature(response_layout(features)))``
        Translation; whoever asks takes answers at once.
    memory_read, memory_read_data : streams
        The walker's reads.
    memory_update, atomics
        With AMO_HWAD, see :class:`.walker.Walker`.
    ddtp_mode, ddtp_ppn : ``In(4)``, ``In(44)``
        From the registers.
    faults : ``Out(stream.Signature(FaultReport))``
        What is to be recorded.
    mrif : ``Out(stream.Signature(MrifTarget))``
        With MSI_MRIF, see :class:`.walker.Walker`; not after its answer.
    invalidate : ``In(stream.Signature(Invalidate))``
        Always taken.
    in_flight : ``Out(walks)``
        A bit per walk that has not ended; a prefetch or a debug request may have left nothing else behind.
    spare : ``Out(1)``
        A prefetch that is asked for now will find a walk, and leave one to requests that wait for answers, unless more of those than
        one are in front of it; 0 while another is on its way to the walker.
    hit, miss, begun, merged, read : ``Out(1)``
        Pulses for counters: translations found in the IOTLB, of either level, requests for the walker, walks begun, requests that joined a
        walk, reads.
    events : ``Out(Events)``
        With HPM, see :class:`.walker.Walker`.

    Raises
    ------
    :exc:`ValueError`
        If a size is out of range.
    """

    def __init__(self, *, entries=64, ways=4, superpage_entries=8, second_entries=0, second_generation_bits=8, walks=8, context_entries=8,
                 misses=16, physical_address_bits=56, features=Features()):  # fmt: skip
        self.entries, self.ways, self.superpage_entries = entries, ways, superpage_entries
        self.walks, self.context_entries, self.misses, self.physical_address_bits = walks, context_entries, misses, physical_address_bits
        self.second_entries, self.second_generation_bits, self.features = second_entries, second_generation_bits, features
        self._reads_space_at_once = not features.has_processes and not features.has_second_stage  # a device context says it all
        self._iotlb = Iotlb(entries=entries, ways=ways, superpage_entries=superpage_entries, features=features,
                            early=not second_entries, knows_space=self._reads_space_at_once)
        self._second = SecondIotlb(entries=second_entries, generation_bits=second_generation_bits, features=features,
                                   asked=self._asked()) if second_entries else None  # fmt: skip
        self._contexts = ContextCache(entries=context_entries, ports=2, layout=context_layout(features))
        self._processes = ContextCache(entries=context_entries, ports=2, layout=Process) if features.has_processes else None
        self._walker = Walker(walks=walks, waiters=16 if walks <= 4 else 32, physical_address_bits=physical_address_bits, features=features)
        self._missed = Queue(asked_layout(features), misses, in_block=True)
        super().__init__({
            "request": In(stream.Signature(request_layout(features))),
            "response": Out(stream.Signature(response_layout(features))),
            "memory_read": Out(stream.Signature(MemoryRead)),
            "memory_read_data": In(stream.Signature(MemoryReadData)),
            **({"memory_update": Out(stream.Signature(MemoryUpdate)), "atomics": In(1)} if features.AMO_HWAD else {}),
            "ddtp_mode": In(4),
            "ddtp_ppn": In(44),
            "faults": Out(stream.Signature(FaultReport)),
            **({"mrif": Out(stream.Signature(MrifTarget))} if features.MSI_MRIF else {}),
            "invalidate": In(stream.Signature(Invalidate)),
            "in_flight": Out(walks),
            "spare": Out(1),
            "hit": Out(1),
            "miss": Out(1),
            "begun": Out(1),
            "merged": Out(1),
            "read": Out(1),
            **({"events": Out(Events)} if features.HPM else {}),
        })

    def elaborate(self, platform):
        m = Module()
        features = self.features
        m.submodules.iotlb = iotlb = self._iotlb
        m.submodules.contexts = contexts = self._contexts
        m.submodules.walker = walker = self._walker
        m.submodules.missed = missed = self._missed
        wiring.connect(m, missed.o, walker.i)
        wiring.connect(m, walker.memory_read, wiring.flipped(self.memory_read))
        wiring.connect(m, wiring.flipped(self.memory_read_data), walker.memory_read_data)
        if features.AMO_HWAD:
            wiring.connect(m, walker.memory_update, wiring.flipped(self.memory_update))
            m.d.comb += walker.atomics.eq(self.atomics)
        wiring.connect(m, walker.faults, wiring.flipped(self.faults))
        if features.MSI_MRIF:
            wiring.connect(m, walker.mrif, wiring.flipped(self.mrif))
        if self._second is None:
            wiring.connect(m, walker.fill, iotlb.fill)
        wiring.connect(m, walker.fill_context, contexts.fill)
        m.d.comb += [
            walker.mode.eq(self.ddtp_mode), walker.root_ppn.eq(self.ddtp_ppn),
            contexts.device_id[1].eq(walker.device_id), walker.context.eq(contexts.context[1]), walker.context_found.eq(contexts.found[1]),
            self.begun.eq(walker.begun), self.merged.eq(walker.merged), self.read.eq(walker.read),
            self.in_flight.eq(walker.in_flight),
        ]
        if features.HPM:
            m.d.comb += self.events.eq(walker.events)

        # Invalidations take effect in the cycle behind, for what is accepted then, too.
        order, forgets = Signal(Invalidate), Signal()
        m.d.sync += [order.eq(self.invalidate.payload), forgets.eq(self.invalidate.valid)]
        is_all = order.kind == InvalidateKind.ALL
        translations = (order.kind == InvalidateKind.VMA) | (order.kind == InvalidateKind.GVMA) | is_all
        m.d.comb += self.invalidate.ready.eq(1)
        with m.If(forgets):
            m.d.comb += [
                walker.forget.eq(1),
                iotlb.forget.eq(translations),
                iotlb.forget_av.eq(order.av & (order.kind == InvalidateKind.VMA)),
                walker.forget_tables.eq(translations & ~iotlb.forget_av),
                contexts.forget.eq((order.kind == InvalidateKind.DDT) | is_all),
            ]
            if features.has_processes:
                m.d.comb += self._processes.forget.eq(contexts.forget | (order.kind == InvalidateKind.PDT))
        m.d.comb += iotlb.forget_vpn.eq(order.page)

        # First cycle: contexts and IOTLB are read. Second cycle: decide. Then the response, unless the walker's answer goes first.
        request, go = Signal(asked_layout(features)), Signal()
        context = Signal(context_layout(features))
        # What the walker gives back never waits for a place in front of the walker: it is held here until the first cycle is free.
        held, is_held = Signal(asked_layout(features)), Signal()
        with m.If(walker.retry.valid & ~is_held):
            m.d.sync += [held.eq(walker.retry.payload), is_held.eq(1)]
        with m.Elif(go):
            m.d.sync += is_held.eq(0)
        m.d.comb += [
            walker.retry.ready.eq(~is_held), request.eq(held), self.request.ready.eq(go & ~is_held),
            contexts.device_id[0].eq(request.device_id), context.eq(contexts.context[0]),
            iotlb.vpn.eq(request.page), iotlb.advance.eq(go),
        ]
        with m.If(~is_held):
            names = [name for name, _ in data.Layout.cast(request_layout(features))]
            m.d.comb += [request.is_again.eq(0), *(request[name].eq(self.request.p[name]) for name in names)]
        space, now = Signal(self._space()), Signal(self._space())
        m.d.comb += self._resolve(m, request, context, contexts.found[0] & ~contexts.forget, now)
        valid, asked = Signal(), Signal(asked_layout(features))
        with m.If(go):
            m.d.sync += [valid.eq(is_held | self.request.valid), asked.eq(request), space.eq(now)]
        found = iotlb.found
        m.d.comb += iotlb.space.eq(space.tag)
        if self._reads_space_at_once:
            m.d.comb += iotlb.coming_space.eq(now.tag)
        passes, found_ours, hits, permitted = Signal(), Signal(), Signal(), Signal()
        is_bare = self.ddtp_mode == spec.BARE
        if features.ATS:
            is_bare &= asked.kind == Kind.UNTRANSLATED
        in_directory = (self.ddtp_mode != spec.OFF) & (self.ddtp_mode != spec.BARE)
        self._judge(m, asked, space, found, permitted)
        m.d.comb += [
            passes.eq(is_bare | (in_directory & space.is_known & space.is_bare)),
            found_ours.eq(self._is_sought(in_directory, space) & found.hit),
            hits.eq(found_ours & permitted),
            iotlb.discard.eq(valid & found_ours & ~permitted & go),  # the walk brings what memory says now
        ]
        answered, unanswered = Signal(), Signal()
        onward, passed_on = (missed.i, missed.i.p) if self._second is None else (self._second.i, self._second.i.p.asked.request)
        m.d.comb += [
            answered.eq(valid & (passes | hits)),
            unanswered.eq(valid & ~passes & ~hits),
            passed_on.eq(asked),
        ]
        # A prefetch on its way from here to the walker.
        goes_on, ends, is_on_its_way = Signal(), Signal(), Signal()
        m.d.comb += [
            goes_on.eq(onward.valid & onward.ready & asked.is_prefetch),
            ends.eq(missed.o.valid & missed.o.ready & missed.o.p.is_prefetch),
            self.spare.eq(walker.spare & ~is_on_its_way & ~(valid & asked.is_prefetch)),
        ]
        if self._second is not None:
            was = self._second.o
            with m.If(was.valid & was.ready & was.p.asked.request.is_prefetch & ~(missed.i.valid & missed.i.ready)):
                m.d.comb += ends.eq(1)
        m.d.sync += is_on_its_way.eq((is_on_its_way | goes_on) & ~ends)

        answer = Signal(response_layout(features))
        m.d.comb += self._told(answer, asked, found, passes)
        with m.If(passes):
            m.d.comb += [answer.page.eq(asked.page), answer.size_log2.eq(63), answer.PBMT.eq(0)]

        free = Signal()
        has_place = free & ~walker.answers
        if self._second is not None:
            second_answers, second_answer = Signal(), Signal(response_layout(features))
            has_place &= ~(answered & second_answers)
            second_hits = self._join_second(m, in_directory, free, second_answers, second_answer)
            m.d.comb += [onward.p.vpn.eq(asked.page), onward.p.space.eq(space.tag), onward.p.asked.space.eq(space)]
        m.d.comb += [
            free.eq(~self.response.valid | self.response.ready),
            walker.o.ready.eq(free),
            # A second cycle ends when its answer and its miss would have a place: which of them it is whoever asks cannot wait for.
            go.eq(~valid | asked.is_prefetch | (has_place & onward.ready)),
            onward.valid.eq(unanswered & (asked.is_prefetch | has_place)),
            self.hit.eq(valid & hits & go), self.miss.eq(missed.i.valid & missed.i.ready),
        ]
        with m.If(free):
            m.d.sync += self.response.valid.eq(walker.o.valid | (answered & go & ~asked.is_prefetch))
            m.d.sync += self.response.payload.eq(answer)
            if self._second is not None:
                with m.If(second_answers):
                    m.d.sync += [self.response.valid.eq(1), self.response.payload.eq(second_answer)]
            with m.If(walker.o.valid):
                m.d.sync += self.response.payload.eq(walker.o.payload)
        if self._second is not None:
            with m.If(second_hits):
                m.d.comb += self.hit.eq(1)
        return m

    def _asked(self):
        """Return the layout of a request with what the contexts say about it."""
        return data.StructLayout({"request": asked_layout(self.features), "space": self._space()})

    def _join_second(self, m, in_directory, free, answers, answer):
        """Look up what the first level has not answered, and pass on what is not found; return whether a request was.

        What is found fills the first level, but for the lookups that began before that was seen. ``answers``: a request is to be answered,
        by ``answer``, when ``free`` and the walker allow.
        """
        m.submodules.second = second = self._second
        walker, iotlb, missed = self._walker, self._iotlb, self._missed
        for name in ("forget", "forget_av", "forget_vpn"):
            m.d.comb += getattr(second, name).eq(getattr(iotlb, name))
        entry, asked, space = second.o.p.entry, second.o.p.asked.request, second.o.p.asked.space
        found = Signal(found_layout(self.features), name="found_second")
        m.d.comb += [
            found.hit.eq(second.found), found.size_log2.eq(spec.PAGE_BITS),
            *(found[name].eq(entry[name]) for name, _ in found.shape() if name not in ("hit", "size_log2")),
        ]
        permitted = Signal()
        self._judge(m, asked, space, found, permitted)
        hits, has_place, age, last = Signal(), Signal(), Signal(2), Signal(self.features.page_bits)
        m.d.comb += [
            hits.eq(second.o.valid & self._is_sought(in_directory, space) & found.hit & permitted),
            answers.eq(hits & ~asked.is_prefetch), has_place.eq((free & ~walker.o.valid) | asked.is_prefetch),
            second.o.ready.eq(Mux(hits, has_place, missed.i.ready | asked.is_prefetch)),
            missed.i.payload.eq(asked), missed.i.valid.eq(second.o.valid & ~hits),
            *self._told(answer, asked, found, 0),
            second.fill.payload.eq(walker.fill.payload), second.fill.valid.eq(walker.fill.valid), walker.fill.ready.eq(1),
            iotlb.fill.payload.eq(Mux(walker.fill.valid, walker.fill.payload, entry)),  # one of two at a time is lost
            iotlb.fill.valid.eq(walker.fill.valid | (hits & has_place & ((age == 0) | (last != entry.vpn)))),
        ]
        m.d.sync += age.eq(age - (age != 0))
        with m.If(hits & has_place):
            m.d.sync += [age.eq(3), last.eq(entry.vpn)]
        return hits & has_place

    @staticmethod
    def _is_sought(in_directory, space):
        """Return whether a translation of ``space`` would be an answer."""
        return in_directory & space.is_known & ~space.is_bare & space.is_canonical

    def _judge(self, m, asked, space, found, permitted):
        """Say with ``permitted`` whether ``found`` permits what is asked."""
        with m.If(asked.is_write):
            m.d.comb += permitted.eq(found.writable & self._may(asked, space, found))
        with m.Elif(asked.execute & Const(self.features.has_processes, 1)):
            m.d.comb += permitted.eq((found.executable if self.features.has_processes else 0) & self._may(asked, space, found))
        with m.Else():
            m.d.comb += permitted.eq(found.readable & self._may(asked, space, found))

    def _told(self, answer, asked, found, passes):
        """Return assignments of the ``answer`` that ``found`` gives; ``passes``: all is permitted."""
        result = [
            answer.cookie.eq(asked.cookie), answer.readable.eq(passes | found.readable), answer.writable.eq(passes | found.writable),
            answer.page.eq(found.ppn), answer.size_log2.eq(found.size_log2),
        ]
        if self.features.ATS:
            result.append(answer.kind.eq(asked.kind))
        if self.features.Svpbmt:
            result.append(answer.PBMT.eq(found.PBMT))
        return result

    def _space(self):
        """Return the layout of what the contexts say about a request."""
        return data.StructLayout({
            "is_known": 1, "is_bare": 1, "is_canonical": 1, "tag": space_layout(self.features),
            **({"SUM": 1, "has_first": 1} if self.features.has_processes else {}),
        })  # fmt: skip

    def _resolve(self, m, request, context, context_found, space):
        """Return assignments of ``space``: where ``request`` is to be looked up, if the caches know that. [RVIOMMU1.0 3.3]"""
        features = self.features
        first_mode, PSCID, is_known = context.fsc_mode, context.PSCID, context_found
        if features.ATS:
            first_mode = Mux(passes_first(request, features), spec.MODE_BARE, first_mode)
        result = []
        if features.has_processes:
            m.submodules.processes = processes = self._processes
            wiring.connect(m, self._walker.fill_process, processes.fill)
            process_id = Mux(request.process_id_valid, request.process_id, 0)
            process, needed = processes.context[0], needs_process(context, request, features)
            m.d.comb += [
                processes.device_id[0].eq(request.device_id), processes.process_id[0].eq(process_id),
                processes.device_id[1].eq(self._walker.device_id), processes.process_id[1].eq(self._walker.process_id),
                self._walker.process.eq(processes.context[1]), self._walker.process_found.eq(processes.found[1]),
            ]
            first_mode = Mux(context.PDTV, Mux(needed, process.fsc_mode, spec.MODE_BARE), first_mode)
            PSCID = Mux(needed, process.PSCID, context.PSCID)
            is_known = context_found & ((processes.found[0] & ~processes.forget) | ~needed) & ~is_refused(context, request, features)
            result += [
                space.SUM.eq(process.SUM & needed), space.has_first.eq(first_mode != spec.MODE_BARE),
            ]
        else:
            is_known = context_found & ~request.process_id_valid & ~request.execute
            if features.ATS:
                is_known &= ~is_refused(context, request, features)
        if features.ATS:
            is_known &= (request.kind == Kind.UNTRANSLATED) | (request.kind == Kind.TRANSLATED)
        has_first = first_mode != spec.MODE_BARE
        is_bare, fits = ~has_first, is_canonical(request.page, first_mode, features)
        if features.has_second_stage:
            has_second = context.guest_mode != spec.MODE_BARE
            if features.ATS:
                has_second &= (request.kind == Kind.UNTRANSLATED) | (context.T2GPA if features.T2GPA else 0)
            is_bare = ~has_first & ~has_second
            fits = Mux(has_first, fits, is_guest_page(request.page, context.guest_mode, features))
            PSCID = Mux(has_first, PSCID, 0)
            result += [
                space.tag.first.eq(has_first), space.tag.GV.eq(has_second), space.tag.GSCID.eq(Mux(has_second, context.GSCID, 0)),
            ]
        if features.has_processes:  # who may not be a supervisor here is the walker's to refuse
            is_known &= ~(request.process_id_valid & request.privileged) | process.ENS | ~needed
        return [*result, space.is_known.eq(is_known), space.is_bare.eq(is_bare), space.is_canonical.eq(fits), space.tag.PSCID.eq(PSCID)]

    def _may(self, asked, space, found):
        """Return whether the privilege of ``asked`` is one that the first stage serves. [RVPRIV 10.3.2]"""
        if not self.features.has_processes:
            return Const(1, 1)
        supervisor, user_page = asked.process_id_valid & asked.privileged, (asked.is_write | ~asked.execute) & space.SUM
        return ~space.has_first | Mux(supervisor, ~found.U | user_page, found.U)
