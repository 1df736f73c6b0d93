"""The walker: what the caches do not know is read from memory, several walks at a time.

How it is built. The walker is a small engine, one FSM, that does one thing for one walk per state; the files ``walker_*`` have its parts,
each for one thing that a walk meets, and ``Work``, the signals that they share. A walk is a row of a small RAM (``walk_layout``, as wide
as the features ask); while a read of its own is in flight nothing of it is anywhere else. A reply, or a walk that was parked and can go
on, loads the row into ``walk``; READ stores it. Flip-flops per walk are only its key (device, process, page), which new requests are
compared with, and a few bits of state.

What a walk waits for is its ``phase``; they follow each other so, those in brackets if the context says so:

    DIRECTORY* > CONTEXT > [PROCESS* > PROCESS_CONTEXT] > [FIRST*] > [MSI, or SECOND* for the LEAF] > the end
                              \\________________________________/
                   with a second stage each of these reads has a guest address: SECOND* goes first, and comes back to ``purpose``

    BEGIN_SECOND takes the guest page in ``next_ppn`` and the phase in ``walk.phase`` as the purpose; when the leaf of the second stage is
    there, ``next_ppn`` is the physical page and the phase is the purpose again. LEAF is the purpose "the page itself": nothing is read.

Both stages share the checks of an entry, the arithmetic of superpages and NAPOT, and the small cache of leaf tables, keyed by stage,
root, mode, GSCID and region, which holds physical pages: a sequential page costs one read, two with two stages.

A walk does not depend on who waits for it. It collects what the first stage grants (``walk.first``), what the second does (``second``),
or where it ended (``outcome``); then each waiter is judged in the order in which the specification would have stopped it: what failed in
front of the process context, supervisor privilege without ENS, what the leaf of the first stage does not grant, what failed behind it,
what the leaf of the second stage does not grant. So reads, writes, executes and both privileges share one walk.

The IOTLB gets the two stages combined: page to physical page, the smaller size, permissions of both, PBMT of the first unless that is 0.
A page whose device has MSI page tables and that overlaps a virtual interrupt file is cut to 4 KiB.

With AMO_HWAD a walk serves only one kind of access and privilege, and ends where the specification would have stopped that: then what it
sets is what this access must set. A leaf that lacks A or D goes from TAKE_ENTRY to UPDATE, and its answer comes back to TAKE_ENTRY: with
the bits if the compare was true, else to be judged as it is now. In front of the update of a first-stage leaf the second stage is asked
again about the guest page of its table, for a write (``is_writing``), and the leaf is read again; if the table was a known one the
first stage begins anew at its root, since its guest page is not known. [RVIOMMU1.0 3.4; RVPRIV 10.3.2 step 9]
"""

from amaranth import Array, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import riscv_iommu as spec
from .contexts import Process, context_layout
from .features import Features
from .iotlb import entry_layout
from .layouts import (
    Events,
    FaultReport,
    Kind,
    MemoryRead,
    MemoryReadData,
    MemoryUpdate,
    MrifTarget,
    asked_layout,
    response_layout,
)
from .walker_answer import answer_subject, answered_page
from .walker_ats import is_translation
from .walker_directory import find_process, judge_context, plan, take_context
from .walker_entry import EntryAtWork, take_entry
from .walker_events import tell_events
from .walker_msi import translate_msi
from .walker_read import ReadAtWork
from .walker_rules import device_id_parts, is_canonical, is_refused, needs_process, passes_first
from .walker_second import begin_second, combine
from .walker_state import Outcome, Phase, Work, key_layout, waiter_layout, walk_layout
from .walker_tables import LeafTables
from .walker_update import UpdateAtWork, update_entry


class Walker(wiring.Component):
    """Answers the requests that the caches could not: reads directories and page tables, fills the caches, reports faults.

    Up to ``walks`` walks are in flight. A request for a page that is being walked for the same device and process waits for that walk, and
    one whose device context is being fetched for another page waits for that fetch, unless an invalidation came between; a walk that an
    invalidation met fills no cache. A request whose page was filled while the request waited goes back to the IOTLB, by ``retry``.
    Entries that lead to leaf tables are remembered, of both stages: then the next page costs one read, or two with two stages. Prefetches
    are dropped when there is no walk for them or one runs already, and never answered or reported.
    Every other request is answered, or given back, exactly once; every refused one is reported, if its context does not forbid it (DTF).
    Supported: Off, Bare, 1 to 3 directory levels, first stage Bare or Sv39 with Svnapot, and what ``features`` say.
    iotval2 of a guest page fault has all bits of the guest address. [RVIOMMU1.0 3.3]

    Latency, with nothing else to do and without features: 6 cycles from a request accepted to its first read offered, 5 from the data of an
    entry to the next read, 6 from that of a leaf to the answer. Throughput: one thing at a time.

    Parameters
    ----------
    walks : :class:`int`
        Walks in flight: 1 to 32.
    waiters : :class:`int`
        Requests that wait for walks: a power of two.
    tables : :class:`int`
        Leaf tables that are remembered: a power of two.
    physical_address_bits : :class:`int`
        Nothing is read or reached beyond; an access fault instead. [RVIOMMU1.0 6.3 PAS]
    features : :class:`.features.Features`
        What there is beside the least.

    Members
    -------
    i : ``In(stream.Signature(asked_layout(features)))``
        Requests.
    o : ``Out(stream.Signature(response_layout(features)))``
        Answers, in any order.
    answers : ``Out(1)``
        1 with each answer, and where one would be if the request was no prefetch.
    retry : ``Out(stream.Signature(asked_layout(features)))``
        Requests that the IOTLB can answer now, unless it has lost that again; not prefetches. Each is given back once.
    memory_read, memory_read_data : streams
        8 to 64 bytes; ``cookie`` is the walk.
    memory_update, atomics : ``Out(stream.Signature(MemoryUpdate))``, ``In(1)``
        With AMO_HWAD: updates of A and D, answered in ``memory_read_data``; whether they are possible. If not, or if the requester refuses
        one, or after 7 in one walk that came too late, it is as if SADE and GADE were 0. For prefetches nothing is updated.
    mode, root_ppn : ``In``
        ddtp.
    context, context_found, device_id : ``In``, ``In``, ``Out``
        A port of the context cache.
    process, process_found, process_id : ``In``, ``In``, ``Out``
        A port of the cache of process contexts, for ``device_id`` too; used only with process directories.
    fill_context, fill_process, fill : ``Out`` streams
        To the caches; taken in the same cycle.
    faults : ``Out(stream.Signature(FaultReport))``
        Faults to be recorded.
    mrif : ``Out(stream.Signature(MrifTarget))``
        With MSI_MRIF: beside each answer with an interrupt file in memory; taken in the same cycle.
    forget, forget_tables : ``In(1)``
        An invalidation happens: walks in flight are stale; remembered leaf tables are forgotten.
    in_flight : ``Out(walks)``
        A bit per walk.
    spare : ``Out(1)``
        No request is at work or waits to be, and one that came now would leave another walk free; with one walk, it would find that.
    begun, merged, read : ``Out(1)``
        Pulses for counters.
    events : ``Out(Events)``
        With HPM: misses and walks. [RVIOMMU1.0 6.23]

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, walks=8, waiters=32, tables=8, physical_address_bits=56, features=Features()):
        if walks not in range(1, 33):
            raise ValueError(f"Walks in flight must be between 1 and 32, not {walks!r}")
        if waiters not in [1 << n for n in range(1, 9)]:
            raise ValueError(f"Waiters must be a power of two between 2 and 256, not {waiters!r}")
        if tables not in [1 << n for n in range(1, 7)]:
            raise ValueError(f"Remembered tables must be a power of two between 2 and 64, not {tables!r}")
        if physical_address_bits not in range(32, 57):
            raise ValueError(f"Physical address bits must be between 32 and 56, not {physical_address_bits!r}")
        self.walks, self.waiters, self.tables, self.physical_address_bits = walks, waiters, tables, physical_address_bits
        self.features = features
        context = context_layout(features)
        super().__init__({
            "i": In(stream.Signature(asked_layout(features))),
            "o": Out(stream.Signature(response_layout(features))),
            "answers": Out(1),
            "retry": Out(stream.Signature(asked_layout(features))),
            "memory_read": Out(stream.Signature(MemoryRead)),
            "memory_read_data": In(stream.Signature(MemoryReadData)),
            **({"memory_update": Out(stream.Signature(MemoryUpdate)), "atomics": In(1)} if features.AMO_HWAD else {}),
            "mode": In(4),
            "root_ppn": In(44),
            "device_id": Out(24),
            "context": In(context),
            "context_found": In(1),
            "process_id": Out(20),
            "process": In(Process),
            "process_found": In(1),
            "fill_context": Out(stream.Signature(context)),
            "fill_process": Out(stream.Signature(Process)),
            "fill": Out(stream.Signature(entry_layout(features))),
            "faults": Out(stream.Signature(FaultReport)),
            **({"mrif": Out(stream.Signature(MrifTarget))} if features.MSI_MRIF else {}),
            "forget": In(1),
            "forget_tables": In(1),
            "in_flight": Out(self.walks),
            "spare": Out(1),
            "begun": Out(1),
            "merged": Out(1),
            "read": Out(1),
            **({"events": Out(Events)} if features.HPM else {}),
        })

    def elaborate(self, platform):
        m = Module()
        features = self.features
        two_stages, processes, updates = features.has_second_stage, features.has_processes, features.AMO_HWAD
        walk_bits, waiter_bits = max((self.walks - 1).bit_length(), 1), (self.waiters - 1).bit_length()
        request, reply = self.i.payload, self.memory_read_data.payload

        work = Work(self.walks, features)
        at, walk, context, key, next_ppn, stale = work.at, work.walk, work.context, work.key, work.next_ppn, work.stale
        outcome, mapped, dtf, fail = work.outcome, work.mapped, work.dtf, work.fail

        # Walks in flight, and who waits for them: a linked list per walk.
        m.submodules.rows = rows = Memory(shape=walk_layout(features), depth=self.walks, init=[])
        read_row, write_row = rows.read_port(domain="comb"), rows.write_port()
        keys = [Signal(key_layout(features), name=f"key_{n}") for n in range(self.walks)]
        busy = Signal(self.walks)
        fetching = Signal(self.walks)  # its device context
        parked, resumable = Signal(self.walks), Signal(self.walks)  # until another has fetched the device context; no longer
        cached = Signal(self.walks)  # not busy: what it found is in the IOTLB
        heads = Array(Signal(waiter_bits, name=f"head_{n}") for n in range(self.walks))
        tails = Array(Signal(waiter_bits, name=f"tail_{n}") for n in range(self.walks))
        waiter = waiter_layout(features)
        waiter_fields = [name for name, _ in data.Layout.cast(waiter)]
        m.submodules.waiting = waiting = Memory(shape=waiter, depth=self.waiters, init=[])
        m.submodules.links = links = Memory(shape=waiter_bits, depth=self.waiters, init=[])
        read_waiter, write_waiter = waiting.read_port(domain="comb"), waiting.write_port()
        read_link, write_link = links.read_port(domain="comb"), links.write_port()
        used = Signal(self.waiters)
        free_waiter, any_waiter = Signal(waiter_bits), Signal()
        free_walk, any_walk = Signal(walk_bits), Signal()
        m.d.comb += [any_waiter.eq(~used.all()), any_walk.eq(~busy.all()), self.in_flight.eq(busy)]
        for n in reversed(range(self.waiters)):
            with m.If(~used[n]):
                m.d.comb += free_waiter.eq(n)
        for n in reversed(range(self.walks)):
            with m.If(~busy[n]):
                m.d.comb += free_walk.eq(n)

        # The request at work.
        asked, asked_key = Signal(asked_layout(features)), Signal(key_layout(features))
        is_direct = Signal()  # the answer is for ``asked``, no walk is involved
        goes_on = Signal()  # what is at work is a walk that was there before, not ``asked`` or the walk that this has begun

        # Directories.
        ddis = device_id_parts(features)
        levels = Signal(2)  # non-leaf levels of the device directory
        too_wide = Signal()
        with m.Switch(self.mode):
            with m.Case(spec.LVL1):
                m.d.comb += too_wide.eq(self.device_id[ddis[0][1] :] != 0)
            with m.Case(spec.LVL2):
                m.d.comb += [levels.eq(1), too_wide.eq(self.device_id[ddis[1][1] :] != 0)]
            with m.Case(spec.LVL3):
                m.d.comb += levels.eq(2)

        # What is known about the request at work.
        m.d.comb += [
            self.device_id.eq(Mux(goes_on, key.device_id, asked.device_id)),
            asked_key.device_id.eq(asked.device_id), asked_key.page.eq(asked.page),
            asked_key.process_id_valid.eq(asked.process_id_valid),
        ]
        if processes:
            m.d.comb += [
                asked_key.process_id.eq(Mux(asked.process_id_valid, asked.process_id, 0)), self.process_id.eq(key.process_id),
            ]
        if updates:
            m.d.comb += [asked_key.is_write.eq(asked.is_write), asked_key.execute.eq(asked.execute & ~asked.is_write)]
            if processes:
                m.d.comb += asked_key.supervisor.eq(asked.process_id_valid & asked.privileged)
            if features.ATS:
                with m.If(is_translation(asked)):
                    m.d.comb += asked_key.execute.eq(asked.execute & asked.process_id_valid)
                if processes:
                    with m.If(passes_first(asked, features)):
                        m.d.comb += asked_key.supervisor.eq(0)
        if features.ATS:
            m.d.comb += asked_key.kind.eq(asked.kind)
        may_share = 1 if processes else ~asked.process_id_valid  # a process_id is answered by the device context alone
        # What LOOK_UP finds and CLASSIFY knows: a walk of the same page is in flight, and which; it is over and its page in the IOTLB;
        # the device context is known; it is being fetched; the device is none of the directory's.
        joins, joined, is_cached, is_known, context_comes, is_alien = Signal(), Signal(walk_bits), Signal(), Signal(), Signal(), Signal()
        m.d.sync += [
            joins.eq(0), is_cached.eq(0), context_comes.eq(0), is_known.eq(self.context_found & ~self.forget), is_alien.eq(too_wide),
        ]
        wake = Signal()  # the device context of ``walk`` has come, or never will
        for n, other in enumerate(keys):
            same_page = may_share & (other.as_value() == asked_key.as_value())
            with m.If(busy[n] & ~stale[n] & same_page):
                m.d.sync += [joins.eq(1), joined.eq(n)]
            with m.If(cached[n] & ~stale[n] & same_page & (processes | ~asked.execute)):
                m.d.sync += is_cached.eq(1)
            with m.If(fetching[n] & ~stale[n] & (other.device_id == asked.device_id)):
                m.d.sync += context_comes.eq(1)
            with m.If(wake & parked[n] & (other.device_id == key.device_id)):
                m.d.sync += [parked[n].eq(0), resumable[n].eq(1)]
        resumed = Signal(walk_bits)
        for n in reversed(range(self.walks)):
            with m.If(resumable[n]):
                m.d.comb += resumed.eq(n)
        m.d.comb += read_row.addr.eq(Mux(self.memory_read_data.valid, reply.cookie, resumed))

        tables = LeafTables(m, work, self.tables)
        judged = EntryAtWork(m, work)
        translated, inside = answered_page(m, work)
        found, context_bad = judge_context(m, work)
        next_read = ReadAtWork(m, work)
        with m.If(~self.memory_read.valid):
            m.d.sync += self.memory_read.payload.eq(next_read.read)
        with m.Elif(self.memory_read.ready):
            m.d.sync += self.memory_read.valid.eq(0)
        update = UpdateAtWork(m, work, self.atomics) if updates else None
        beat = Signal(range(len(work.doublewords)))  # of the reply at work

        def beyond(ppn):
            return ppn[self.physical_address_bits - spec.PAGE_BITS :].any()

        # Answers: of the walk's waiters one after the other, or of the request itself.
        waiter_at = Signal(waiter_bits)
        m.d.comb += [read_waiter.addr.eq(waiter_at), read_link.addr.eq(waiter_at)]
        subject, subject_page, subject_device = Signal(waiter), Signal(52), Signal(24)
        with m.If(is_direct):
            m.d.comb += [
                *(subject[name].eq(asked[name]) for name in waiter_fields), subject_page.eq(asked.page), subject_device.eq(asked.device_id),
            ]
        with m.Else():
            m.d.comb += [subject.eq(read_waiter.data), subject_page.eq(key.page), subject_device.eq(key.device_id)]
        permitted, always_logged, goes_to_file = answer_subject(m, work, self, subject, subject_page, subject_device, is_direct, translated)

        write_waiter_data = write_waiter.data
        m.d.comb += [
            write_waiter.addr.eq(free_waiter), *(write_waiter_data[name].eq(asked[name]) for name in waiter_fields),
            write_link.addr.eq(tails[joined]), write_link.data.eq(free_waiter), self.retry.payload.eq(asked), self.retry.p.is_again.eq(1),
            write_row.addr.eq(at), write_row.data.eq(walk),
            self.fill.payload.eq(mapped),
            self.fill_context.payload.eq(context),
        ]

        def direct(kind, number=0):
            return [*fail(kind, number), is_direct.eq(1), dtf.eq(0)]

        passes = context.fsc_mode == spec.MODE_BARE
        if processes:
            passes = ~needs_process(context, asked, features) & (passes | context.PDTV)
        if two_stages:
            passes &= context.guest_mode == spec.MODE_BARE

        pending = Signal()  # ``asked`` could not be begun: it stays, and replies go first
        reads_leaf, was_known = Signal(), Signal()  # in the cycle before: the walk still at work began to read a leaf table, a known one
        m.d.sync += [self.fill.valid.eq(0), reads_leaf.eq(0), was_known.eq(tables.known)]
        # Without more features key and context of a walk stand still in the cycle in front of BEGIN_TABLE, where its table is looked up.
        stands_still = not (two_stages or processes or features.ATS or updates)
        known_then, ppn_then = Signal(), Signal(44)
        if stands_still:
            m.d.sync += [known_then.eq(tables.known), ppn_then.eq(tables.ppn)]
        with m.If(reads_leaf & ~work.is_stale & ~was_known):
            tables.keep(m)
        free = ~busy
        m.d.sync += self.spare.eq((free & (free - (self.walks > 1))).any() & any_waiter & ~pending & ~self.i.valid)
        with m.FSM() as fsm:
            with m.State("REST"):
                m.d.sync += [
                    is_direct.eq(0), goes_on.eq(1), work.identity.eq(0), beat.eq(0), work.second.eq(~0), work.is_msi.eq(0),
                    walk.eq(read_row.data),
                ]
                if not two_stages:
                    m.d.sync += work.first.eq(~0)
                if features.MSI_MRIF:
                    m.d.sync += work.is_mrif.eq(0)
                with m.If(self.memory_read_data.valid):
                    m.d.sync += at.eq(reply.cookie)
                    m.next = "TAKE_REPLY"
                with m.Elif(resumable.any()):
                    m.d.sync += [at.eq(resumed), resumable.bit_select(resumed, 1).eq(0)]
                    m.next = "RESUME"
                with m.Elif(pending):
                    m.d.sync += goes_on.eq(0)
                    m.next = "LOOK_UP"
                with m.Elif(self.i.valid):
                    m.d.comb += self.i.ready.eq(1)
                    m.d.sync += [asked.eq(request), pending.eq(1), goes_on.eq(0)]
                    m.next = "LOOK_UP"

            # A request. [RVIOMMU1.0 3.3, steps 1 to 10]
            with m.State("LOOK_UP"):
                m.d.sync += [key.eq(asked_key), context.eq(self.context)]
                m.next = "CLASSIFY"
            with m.State("CLASSIFY"):
                m.d.sync += pending.eq(0)
                m.next = "ANSWER"
                with m.If(self.mode == spec.OFF):
                    m.d.sync += direct(Outcome.FAULT, spec.ALL_DISALLOWED)
                with m.Elif(self.mode == spec.BARE):
                    m.d.sync += [*direct(Outcome.MAPPED), work.identity.eq(1)]
                    if features.ATS:
                        with m.If(asked.kind != Kind.UNTRANSLATED):
                            m.d.sync += direct(Outcome.FAULT, spec.TYPE_DISALLOWED)
                with m.Elif(is_alien):
                    m.d.sync += direct(Outcome.FAULT, spec.TYPE_DISALLOWED)
                with m.Elif(is_known & is_refused(context, asked, features)):
                    m.d.sync += [*direct(Outcome.FAULT, spec.TYPE_DISALLOWED), dtf.eq(context.DTF)]
                with m.Elif(is_known & passes):
                    m.d.sync += [*direct(Outcome.MAPPED), work.identity.eq(1)]
                with m.Elif(asked.is_prefetch & (joins | is_cached)):
                    m.next = "REST"
                with m.Elif(is_cached & ~asked.is_again):
                    m.next = "GIVE_BACK"
                with m.Elif(joins & any_waiter):
                    m.d.comb += [write_waiter.en.eq(1), write_link.en.eq(1), self.merged.eq(1)]
                    m.d.sync += [tails[joined].eq(free_waiter), used.bit_select(free_waiter, 1).eq(1)]
                    if updates:
                        m.d.sync += work.demanded.bit_select(joined, 1).eq(1)
                    m.next = "REST"
                with m.Elif(any_walk & any_waiter):
                    m.d.comb += [write_waiter.en.eq(1), self.begun.eq(1)]
                    m.d.sync += [
                        at.eq(free_walk),
                        busy.bit_select(free_walk, 1).eq(1), stale.bit_select(free_walk, 1).eq(0), cached.bit_select(free_walk, 1).eq(0),
                        used.bit_select(free_waiter, 1).eq(1), heads[free_walk].eq(free_waiter), tails[free_walk].eq(free_waiter),
                        walk.phase.eq(Phase.CONTEXT),
                    ]
                    for n, other in enumerate(keys):
                        with m.If(free_walk == n):
                            m.d.sync += other.eq(asked_key)
                    if updates:
                        m.d.sync += [work.demanded.bit_select(free_walk, 1).eq(~asked.is_prefetch), walk.failures.eq(0)]
                        if two_stages:
                            m.d.sync += [walk.is_writing.eq(0), walk.skipped.eq(0)]
                    if processes:
                        m.d.sync += [walk.ENS.eq(1), walk.SUM.eq(0)]
                    if two_stages:
                        m.d.sync += [work.first.eq(~0), walk.reach.eq(~0), walk.G.eq(0), walk.PBMT.eq(0)]
                    with m.If(is_known):
                        m.next = "PLAN" if processes or features.ATS else "BEGIN_TABLE"
                    with m.Elif(context_comes):
                        m.next = "PARK"
                    with m.Else():
                        m.next = "BEGIN_DIRECTORY"
                with m.Elif(asked.is_prefetch):
                    m.next = "REST"
                with m.Else():
                    m.d.sync += pending.eq(1)
                    m.next = "REST"
            with m.State("GIVE_BACK"):
                m.d.comb += self.retry.valid.eq(1)
                with m.If(self.retry.ready):
                    m.next = "REST"
            with m.State("PARK"):
                m.d.comb += write_row.en.eq(1)
                m.d.sync += parked.bit_select(at, 1).eq(1)
                m.next = "REST"
            with m.State("RESUME"):
                m.d.sync += [context.eq(self.context), dtf.eq(self.context.DTF)]
                m.next = "BEGIN_DIRECTORY"
                with m.If(self.context_found):
                    m.next = "USE_CONTEXT"
            with m.State("BEGIN_DIRECTORY"):
                m.d.sync += [
                    walk.phase.eq(Mux(levels == 0, Phase.CONTEXT, Phase.DIRECTORY)), walk.level.eq(levels), next_ppn.eq(self.root_ppn),
                    fetching.bit_select(at, 1).eq(1), dtf.eq(0),
                ]
                m.next = "READ"
                # The mode may be another than when the request came.
                with m.If((self.mode == spec.OFF) | (self.mode == spec.BARE)):
                    m.d.sync += fail(Outcome.FAULT, spec.ALL_DISALLOWED)
                    m.next = "END_WALK"
                with m.Elif(too_wide):
                    m.d.sync += fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
                    m.next = "END_WALK"
            with m.State("BEGIN_TABLE"):
                table_known, table_ppn = tables.known, tables.ppn
                if stands_still:
                    table_known, table_ppn = known_then, ppn_then
                if updates and two_stages:
                    table_known = tables.known & ~walk.skipped
                    m.d.sync += walk.skipped.eq(table_known)
                m.d.sync += [
                    walk.phase.eq(Phase.FIRST), dtf.eq(context.DTF), walk.level.eq(Mux(table_known, 0, context.fsc_mode[:2] + 2)),
                    next_ppn.eq(Mux(table_known, table_ppn, context.root_ppn)),
                ]
                if features.ATS:
                    m.d.sync += walk.is_global.eq(table_known & tables.is_global)
                with m.If((context.fsc_mode == spec.MODE_BARE) if processes or two_stages or features.ATS else Const(0, 1)):
                    m.d.sync += [outcome.eq(Outcome.MAPPED), work.identity.eq(1)]
                    m.next = "END_WALK"
                    if two_stages:
                        with m.If(work.has_guest):
                            m.d.sync += [walk.phase.eq(Phase.LEAF), next_ppn.eq(key.page)]
                            m.next = "FIND_MSI" if features.MSI_FLAT else "BEGIN_SECOND"
                with m.Elif(~is_canonical(key.page, context.fsc_mode, features)):
                    m.d.sync += fail(Outcome.PAGE_FAULT)
                    m.next = "END_WALK"
                with m.Elif(table_known):
                    m.next = "READ"
                with m.Else():
                    work.access(m)
                if updates and processes:
                    with m.If(key.supervisor & ~walk.ENS):  # before anything is updated for it
                        m.d.sync += fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
                        m.next = "END_WALK"
            with m.State("READ"):
                m.d.comb += write_row.en.eq(1)
                with m.If(beyond(next_ppn)):
                    m.d.sync += [
                        *fail(next_read.fault, next_read.cause),
                        dtf.eq((walk.phase != Phase.DIRECTORY) & (walk.phase != Phase.CONTEXT) & context.DTF),
                    ]
                    m.next = "END_WALK"
                with m.Elif(~self.memory_read.valid):  # who else reads memory decides nothing here
                    m.d.comb += self.read.eq(1)
                    m.d.sync += self.memory_read.valid.eq(1)
                    m.d.sync += reads_leaf.eq((work.is_second | (walk.phase == Phase.FIRST)) & (work.level == 0))
                    m.next = "REST"

            # A reply.
            with m.State("TAKE_REPLY"):
                m.d.comb += self.memory_read_data.ready.eq(1)
                with m.If(self.memory_read_data.valid):
                    for n, doubleword in enumerate(work.doublewords):
                        with m.If(beat == n):
                            m.d.sync += doubleword.eq(reply.data)
                    m.d.sync += [
                        beat.eq(beat + 1), work.status.eq(reply.status),
                        dtf.eq((walk.phase != Phase.DIRECTORY) & (walk.phase != Phase.CONTEXT) & context.DTF),
                    ]
                    with m.If(reply.last):
                        with m.Switch(walk.phase):
                            with m.Case(Phase.DIRECTORY):
                                m.next = "TAKE_DIRECTORY"
                            with m.Case(Phase.CONTEXT):
                                m.next = "TAKE_CONTEXT"
                            with m.Case(*([Phase.FIRST, Phase.SECOND] if two_stages else [Phase.FIRST])):
                                m.next = "TAKE_ENTRY"
                            if processes:
                                with m.Case(Phase.PROCESS):
                                    m.next = "TAKE_PROCESS"
                                with m.Case(Phase.PROCESS_CONTEXT):
                                    m.next = "TAKE_PROCESS_CONTEXT"
                            if features.MSI_FLAT:
                                with m.Case(Phase.MSI):
                                    m.next = "TAKE_MSI"
                        if updates:
                            with m.If(walk.is_updating):
                                m.next = "TAKE_UPDATE"
            take_context(m, work, self, found, context_bad, fetching.bit_select(at, 1), wake)
            take_entry(m, work, judged, next_read, update)
            if updates:
                update_entry(m, work, self, write_row, update, next_read)
            with m.State("KEEP_LEAF"):
                keeps = mapped.readable & ~work.is_stale
                if features.ATS:
                    keeps &= ~is_translation(key)
                m.next = "END_WALK"
                with m.If(beyond(mapped.ppn)):
                    m.d.sync += fail(Outcome.ACCESS_FAULT)
                with m.Elif(keeps):
                    m.d.sync += [self.fill.valid.eq(~self.forget), cached.bit_select(at, 1).eq(1)]
            if processes or features.ATS:
                plan(m, work)
            if processes:
                find_process(m, work, self)
            if two_stages:
                begin_second(m, work, tables)
                combine(m, work, judged.reach, inside)
            if features.MSI_FLAT:
                translate_msi(m, work, next_read.msi_number)

            # The end.
            with m.State("END_WALK"):
                m.d.comb += wake.eq(fetching.bit_select(at, 1))
                m.d.sync += [waiter_at.eq(heads[at]), fetching.bit_select(at, 1).eq(0)]
                m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += [self.answers.eq(1), self.o.valid.eq(~subject.is_prefetch)]
                if features.MSI_MRIF:
                    m.d.comb += self.mrif.valid.eq(goes_to_file & permitted & ~subject.is_prefetch)
                with m.If(self.o.ready | subject.is_prefetch):
                    m.next = "NEXT_WAITER"
                    with m.If(~permitted & ~subject.is_prefetch & (always_logged | ~dtf)):
                        m.next = "REPORT"
            with m.State("REPORT"):
                m.d.comb += self.faults.valid.eq(1)
                with m.If(self.faults.ready):
                    m.next = "NEXT_WAITER"
            with m.State("NEXT_WAITER"):
                m.next = "REST"
                with m.If(~is_direct):
                    m.d.sync += [used.bit_select(waiter_at, 1).eq(0), waiter_at.eq(read_link.data)]
                    with m.If(waiter_at == tails[at]):
                        m.d.sync += busy.bit_select(at, 1).eq(0)
                    with m.Else():
                        m.next = "ANSWER"

        if features.HPM:
            may_begin = (self.mode != spec.OFF) & (self.mode != spec.BARE) & ~too_wide
            tell_events(m, work, fsm, self.events, may_begin, self.process_found)
        with m.If(self.forget):
            m.d.sync += stale.eq(~0)
        with m.If(self.forget_tables):
            tables.forget(m)
        return m
