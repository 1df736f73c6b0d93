"""The walker: what the caches do not know is read from memory, several walks at a time."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import riscv_iommu as spec
from ..tlp.layouts import BurstStatus
from .contexts import Context
from .iotlb import SUPERPAGES, VPN_BITS, Entry
from .layouts import FaultReport, MemoryRead, MemoryReadData, TranslateRequest, TranslateResponse

NON_LEAF_BITS = VPN_BITS - 9  # of a page number: which leaf table it is in


class Phase(enum.Enum, shape=2):
    """What a walk waits for."""

    DIRECTORY = 0  # non-leaf directory entry [RVIOMMU1.0 3.3.1]
    CONTEXT = 1
    TABLE = 2  # page-table entry [RVPRIV 10.3.2]


class Walk(data.Struct):
    """A walk in flight."""

    device_id: 24
    page: 52
    process_id_valid: 1
    phase: Phase
    level: 2
    context: Context


class Waiter(data.Struct):
    """A request that waits for a walk."""

    cookie: 8
    is_write: 1
    execute: 1
    is_prefetch: 1
    process_id_valid: 1
    process_id: 20
    privileged: 1
    offset: 12


WAITER = tuple(name for name, _ in data.Layout.cast(Waiter))


class Outcome(enum.Enum, shape=2):
    """How a walk, or a request without one, ends."""

    MAPPED = 0
    PAGE_FAULT = 1  # the cause follows the access
    ACCESS_FAULT = 2  # the cause follows the access
    FAULT = 3  # the cause is known


class Walker(wiring.Component):
    """Answers the requests that the caches could not: reads directories and page tables, fills the caches, reports faults.

    Up to ``walks`` walks are in flight. A request for a page that is being walked for the same device waits for that walk, and one whose
    device context is being fetched for another page waits for that fetch, unless an invalidation came between; a walk that an
    invalidation met fills no cache. A request whose page was filled while the request waited goes back to the IOTLB, by ``retry``.
    Non-leaf entries that lead to leaf tables are remembered: then the next page costs one read. Prefetches are dropped when there is
    no walk for them or one runs already, and never answered or reported.
    Every other request is answered, or given back, exactly once; every refused one is reported, if its context does not forbid it (DTF).
    Supported: Off, Bare, 1 to 3 directory levels with 32-byte contexts, first stage Bare or Sv39 with Svnapot, no second stage, no process
    directory, no hardware update of A and D. [RVIOMMU1.0 3.3]

    Latency, with nothing else to do: 4 cycles from a request accepted to its first read offered, 4 from the data of an entry to the
    next read, 6 from that of a leaf to the answer. Throughput: one thing at a time.

    Parameters
    ----------
    walks : :class:`int`
        Walks in flight: 1 to 32.
    waiters : :class:`int`
        Requests that wait for walks: a power of two.
    tables : :class:`int`
        Leaf tables that are remembered.
    physical_address_bits : :class:`int`
        Nothing is read or reached beyond; an access fault instead. [RVIOMMU1.0 6.3 PAS]

    Members
    -------
    i : ``In(stream.Signature(TranslateRequest))``
        Requests.
    o : ``Out(stream.Signature(TranslateResponse))``
        Answers, in any order.
    retry : ``Out(stream.Signature(TranslateRequest))``
        Requests that the IOTLB can answer now; not prefetches.
    memory_read, memory_read_data : streams
        8 or 32 bytes; ``cookie`` is the walk.
    mode, root_ppn : ``In``
        ddtp.
    context, context_found, device_id : ``In``, ``In``, ``Out``
        A port of the context cache.
    fill_context, fill : ``Out`` streams
        To the caches; taken in the same cycle.
    faults : ``Out(stream.Signature(FaultReport))``
        Faults to be recorded.
    forget, forget_tables : ``In(1)``
        An invalidation happens: walks in flight are stale; remembered leaf tables are forgotten.
    begun, merged, read : ``Out(1)``
        Pulses for counters.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, walks=8, waiters=32, tables=8, physical_address_bits=56):
        if walks not in range(1, 33):
            raise ValueError(f"Walks in flight must be between 1 and 32, not {walks!r}")
        if waiters not in [1 << n for n in range(1, 9)]:
            raise ValueError(f"Waiters must be a power of two between 2 and 256, not {waiters!r}")
        if tables not in range(1, 65):
            raise ValueError(f"Remembered tables must be between 1 and 64, not {tables!r}")
        if physical_address_bits not in range(32, 57):
            raise ValueError(f"Physical address bits must be between 32 and 56, not {physical_address_bits!r}")
        self.walks, self.waiters, self.tables, self.physical_address_bits = walks, waiters, tables, physical_address_bits
        super().__init__({
            "i": In(stream.Signature(TranslateRequest)),
            "o": Out(stream.Signature(TranslateResponse)),
            "retry": Out(stream.Signature(TranslateRequest)),
            "memory_read": Out(stream.Signature(MemoryRead)),
            "memory_read_data": In(stream.Signature(MemoryReadData)),
            "mode": In(4),
            "root_ppn": In(44),
            "device_id": Out(24),
            "context": In(Context),
            "context_found": In(1),
            "fill_context": Out(stream.Signature(Context)),
            "fill": Out(stream.Signature(Entry)),
            "faults": Out(stream.Signature(FaultReport)),
            "forget": In(1),
            "forget_tables": In(1),
            "begun": Out(1),
            "merged": Out(1),
            "read": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        walk_bits, waiter_bits = max((self.walks - 1).bit_length(), 1), (self.waiters - 1).bit_length()
        request, reply = self.i.payload, self.memory_read_data.payload

        # Walks in flight, and who waits for them: a linked list per walk.
        flights = Array(Signal(Walk, name=f"walk_{n}") for n in range(self.walks))
        busy, stale = Signal(self.walks), Signal(self.walks)
        fetching = Signal(self.walks)  # its device context
        parked, resumable = Signal(self.walks), Signal(self.walks)  # until another has fetched the device context; no longer
        cached = Signal(self.walks)  # not busy: what it found is in the IOTLB
        heads = Array(Signal(waiter_bits, name=f"head_{n}") for n in range(self.walks))
        tails = Array(Signal(waiter_bits, name=f"tail_{n}") for n in range(self.walks))
        m.submodules.waiting = waiting = Memory(shape=Waiter, depth=self.waiters, init=[])
        m.submodules.links = links = Memory(shape=waiter_bits, depth=self.waiters, init=[])
        read_waiter, write_waiter = waiting.read_port(domain="comb"), waiting.write_port()
        read_link, write_link = links.read_port(domain="comb"), links.write_port()
        used = Signal(self.waiters)
        free_waiter, any_waiter = Signal(waiter_bits), Signal()
        free_walk, any_walk = Signal(walk_bits), Signal()
        m.d.comb += [any_waiter.eq(~used.all()), any_walk.eq(~busy.all())]
        for n in reversed(range(self.waiters)):
            with m.If(~used[n]):
                m.d.comb += free_waiter.eq(n)
        for n in reversed(range(self.walks)):
            with m.If(~busy[n]):
                m.d.comb += free_walk.eq(n)

        # Leaf tables that are known.
        known = [Signal(data.StructLayout({"root": 44, "region": NON_LEAF_BITS, "ppn": 44}), name=f"table_{n}") for n in range(self.tables)]
        known_valid, known_turn = Signal(self.tables), Signal(range(max(self.tables, 2)))

        # The walk at work, the request at work, the entry at work.
        at, walk = Signal(walk_bits), Signal(Walk)
        asked = Signal(TranslateRequest)
        doublewords = [Signal(64, name=f"doubleword_{n}") for n in range(4)]
        beat = Signal(2)
        status = Signal(BurstStatus)
        entry = spec.PageTableEntry(doublewords[0])
        directory = spec.DirectoryEntry(doublewords[0])
        found = spec.DeviceContext(Cat(doublewords))
        next_ppn = Signal(44)
        outcome, cause, mapped, executable = Signal(Outcome), Signal(12), Signal(Entry), Signal()
        is_direct = Signal()  # the answer is for ``asked``, no walk is involved
        identity = Signal()
        dtf = Signal()

        levels = Signal(2)  # non-leaf levels of the directory
        too_wide = Signal()
        with m.Switch(self.mode):
            with m.Case(spec.LVL1):
                m.d.comb += too_wide.eq(self.device_id[spec.DDI[0][1] :] != 0)
            with m.Case(spec.LVL2):
                m.d.comb += [levels.eq(1), too_wide.eq(self.device_id[spec.DDI[1][1] :] != 0)]
            with m.Case(spec.LVL3):
                m.d.comb += levels.eq(2)

        m.d.comb += self.device_id.eq(asked.device_id)
        context = self.context
        is_plain = ~asked.process_id_valid  # a process_id is answered by the device context alone
        joins, joined = Signal(), Signal(walk_bits)
        is_cached, cached_at, context_comes = Signal(), Signal(walk_bits), Signal()
        wake = Signal()  # the device context of ``walk`` has come, or never will
        for n, flight in enumerate(flights):
            same_page = is_plain & ~flight.process_id_valid & (flight.device_id == asked.device_id) & (flight.page == asked.page)
            with m.If(busy[n] & ~stale[n] & same_page):
                m.d.comb += [joins.eq(1), joined.eq(n)]
            with m.If(cached[n] & ~stale[n] & same_page & ~asked.execute):
                m.d.comb += [is_cached.eq(1), cached_at.eq(n)]
            with m.If(fetching[n] & ~stale[n] & (flight.device_id == asked.device_id)):
                m.d.comb += context_comes.eq(1)
            with m.If(wake & parked[n] & (flight.device_id == walk.device_id)):
                m.d.sync += [parked[n].eq(0), resumable[n].eq(1)]
        resumed = Signal(walk_bits)
        for n in reversed(range(self.walks)):
            with m.If(resumable[n]):
                m.d.comb += resumed.eq(n)
        table_known, table_ppn = Signal(), Signal(44)
        walk_root, walk_region = Signal(44), Signal(NON_LEAF_BITS)
        m.d.comb += [walk_root.eq(walk.context.root_ppn), walk_region.eq(walk.page[9:VPN_BITS])]
        for n in range(self.tables):
            with m.If(known_valid[n] & (known[n].root == walk_root) & (known[n].region == walk_region)):
                m.d.comb += [table_known.eq(1), table_ppn.eq(known[n].ppn)]

        canonical = (walk.page[VPN_BITS - 1 :] == 0) | walk.page[VPN_BITS - 1 :].all()

        # The leaf at work. [RVPRIV 10.3.2; RVIOMMU1.0 3.3.4]
        is_leaf, is_broken = Signal(), Signal()
        low = Signal(18)  # page-number bits that the leaf covers
        with m.Switch(walk.level):
            with m.Case(1):
                m.d.comb += low.eq((1 << 9) - 1)
            with m.Case(2):
                m.d.comb += low.eq((1 << 18) - 1)
        napot_ok = (walk.level == 0) & (entry.PPN[:4] == spec.NAPOT_64K)
        m.d.comb += [
            is_leaf.eq(entry.R | entry.X),
            is_broken.eq(
                ~entry.V | (~entry.R & entry.W) | (entry.reserved != 0) | (entry.PBMT != 0)
                | Mux(is_leaf, ((entry.PPN[:18] & low) != 0) | (entry.N & ~napot_ok) | ~entry.U | ~entry.A,
                      (walk.level == 0) | entry.N | entry.A | entry.D | entry.U)),
        ]
        translated, inside = Signal(44), Signal(18)  # ``inside``: page-number bits that the mapping leaves alone
        with m.Switch(mapped.reach):
            for reach, (covered, _) in enumerate(SUPERPAGES, 1):
                with m.Case(reach):
                    m.d.comb += inside.eq((1 << covered) - 1)
        m.d.comb += translated.eq(Cat(
            (mapped.ppn[:18] & ~inside) | (walk.page[:18] & inside), mapped.ppn[18:]))

        context_bad = Signal()
        m.d.comb += context_bad.eq(
            found.EN_ATS | found.EN_PRI | found.T2GPA | found.PRPR | found.GADE | found.SADE | found.SBE | found.SXL
            | (found.DPE & ~found.PDTV) | (found.tc_reserved != 0) | (found.tc_reserved_high != 0) | (found.iohgatp_mode != spec.MODE_BARE)
            | (found.ta_reserved != 0) | (found.ta_reserved_high != 0) | (found.fsc_reserved != 0)
            | ((found.fsc_mode != spec.MODE_BARE) & ((found.fsc_mode != spec.MODE_SV39) | found.PDTV)))

        # Memory reads of the walk at work.
        vpn_part = Signal(9)
        ddi = Signal(9)
        with m.Switch(walk.level):
            for level in range(3):
                with m.Case(level):
                    m.d.comb += [
                        vpn_part.eq(walk.page[9 * level : 9 * level + 9]),
                        ddi.eq(walk.device_id[slice(*spec.DDI[level])]),
                    ]
        def beyond(ppn):
            return ppn[self.physical_address_bits - spec.PAGE_BITS :].any()

        read = self.memory_read.payload
        m.d.comb += [read.cookie.eq(at), read.length_bytes.eq(spec.ENTRY_BYTES)]
        with m.Switch(walk.phase):
            with m.Case(Phase.DIRECTORY):
                m.d.comb += read.address.eq(Cat(Const(0, 3), ddi, next_ppn))
            with m.Case(Phase.CONTEXT):
                m.d.comb += [read.address.eq(Cat(Const(0, 5), walk.device_id[:7], next_ppn)), read.length_bytes.eq(spec.DC_BYTES)]
            with m.Case(Phase.TABLE):
                m.d.comb += read.address.eq(Cat(Const(0, 3), vpn_part, next_ppn))

        # Answers: of the walk's waiters one after the other, or of the request itself.
        waiter_at = Signal(waiter_bits)
        m.d.comb += [read_waiter.addr.eq(waiter_at), read_link.addr.eq(waiter_at)]
        subject, subject_page, subject_device = Signal(Waiter), Signal(52), Signal(24)
        with m.If(is_direct):
            m.d.comb += [
                *(subject[name].eq(asked[name]) for name in WAITER), subject_page.eq(asked.page), subject_device.eq(asked.device_id),
            ]
        with m.Else():
            m.d.comb += [subject.eq(read_waiter.data), subject_page.eq(walk.page), subject_device.eq(walk.device_id)]
        # A write is a write; what executes reads. [RVIOMMU1.0 2.3]
        allowed, page_fault, access_fault, ttyp = Signal(), Signal(12), Signal(12), Signal(6)
        with m.If(subject.is_write):
            m.d.comb += [
                allowed.eq(mapped.writable), page_fault.eq(spec.WRITE_PAGE_FAULT), access_fault.eq(spec.WRITE_ACCESS_FAULT),
                ttyp.eq(spec.TTYP_UNTRANSLATED_WRITE),
            ]
        with m.Elif(subject.execute):
            m.d.comb += [
                allowed.eq(executable), page_fault.eq(spec.INSTRUCTION_PAGE_FAULT), access_fault.eq(spec.INSTRUCTION_ACCESS_FAULT),
                ttyp.eq(spec.TTYP_UNTRANSLATED_EXECUTE),
            ]
        with m.Else():
            m.d.comb += [
                allowed.eq(mapped.readable), page_fault.eq(spec.READ_PAGE_FAULT), access_fault.eq(spec.READ_ACCESS_FAULT),
                ttyp.eq(spec.TTYP_UNTRANSLATED_READ),
            ]
        permitted, subject_cause = Signal(), Signal(12)
        m.d.comb += permitted.eq((outcome == Outcome.MAPPED) & (identity | allowed))
        with m.Switch(outcome):
            with m.Case(Outcome.FAULT):
                m.d.comb += subject_cause.eq(cause)
            with m.Case(Outcome.ACCESS_FAULT):
                m.d.comb += subject_cause.eq(access_fault)
            with m.Default():
                m.d.comb += subject_cause.eq(page_fault)
        always_logged = (outcome == Outcome.FAULT) & (cause != spec.TYPE_DISALLOWED) & (cause != spec.PT_CORRUPTED)
        answer, report = self.o.payload, self.faults.payload
        m.d.comb += [
            answer.cookie.eq(subject.cookie),
            answer.fault.eq(~permitted),
            report.cause.eq(subject_cause),
            report.ttyp.eq(ttyp),
            report.device_id.eq(subject_device),
            report.process_id_valid.eq(subject.process_id_valid),
            report.process_id.eq(Mux(subject.process_id_valid, subject.process_id, 0)),
            report.privileged.eq(subject.process_id_valid & subject.privileged),
            report.iotval.eq(Cat(subject.offset, subject_page)),
        ]
        with m.If(~permitted):
            m.d.comb += answer.cause.eq(subject_cause)
        with m.Elif(identity):
            m.d.comb += [answer.page.eq(subject_page), answer.readable.eq(1), answer.writable.eq(1), answer.size_log2.eq(63)]
        with m.Else():
            m.d.comb += [answer.page.eq(translated), answer.readable.eq(mapped.readable), answer.writable.eq(mapped.writable)]
            with m.Switch(mapped.reach):
                with m.Case(0):
                    m.d.comb += answer.size_log2.eq(spec.PAGE_BITS)
                for reach, (_, size) in enumerate(SUPERPAGES, 1):
                    with m.Case(reach):
                        m.d.comb += answer.size_log2.eq(size)

        write_waiter_data = write_waiter.data
        m.d.comb += [
            write_waiter.addr.eq(free_waiter), *(write_waiter_data[name].eq(asked[name]) for name in WAITER),
            write_link.addr.eq(tails[joined]), write_link.data.eq(free_waiter), self.retry.payload.eq(asked),
            self.fill.payload.eq(mapped),
            self.fill_context.payload.eq(walk.context),
        ]

        def fail(kind, number=0):
            return [outcome.eq(kind), cause.eq(number)]

        def direct(kind, number=0):
            return [*fail(kind, number), is_direct.eq(1), dtf.eq(0)]

        pending = Signal()  # ``asked`` could not be begun: it stays, and replies go first
        with m.FSM():
            with m.State("REST"):
                m.d.sync += [is_direct.eq(0), identity.eq(0), beat.eq(0)]
                with m.If(self.memory_read_data.valid):
                    m.d.sync += [at.eq(reply.cookie), walk.eq(flights[reply.cookie[:walk_bits]])]
                    m.next = "TAKE_REPLY"
                with m.Elif(resumable.any()):
                    m.d.sync += [at.eq(resumed), walk.eq(flights[resumed]), resumable.bit_select(resumed, 1).eq(0)]
                    m.next = "RESUME"
                with m.Elif(pending):
                    m.next = "CLASSIFY"
                with m.Elif(self.i.valid):
                    m.d.comb += self.i.ready.eq(1)
                    m.d.sync += [asked.eq(request), pending.eq(1)]
                    m.next = "CLASSIFY"

            # A request. [RVIOMMU1.0 3.3, steps 1 to 10]
            with m.State("CLASSIFY"):
                m.d.sync += pending.eq(0)
                m.next = "ANSWER"
                with m.If(self.mode == spec.OFF):
                    m.d.sync += direct(Outcome.FAULT, spec.ALL_DISALLOWED)
                with m.Elif(self.mode == spec.BARE):
                    m.d.sync += [*direct(Outcome.MAPPED), identity.eq(1)]
                with m.Elif(too_wide):
                    m.d.sync += direct(Outcome.FAULT, spec.TYPE_DISALLOWED)
                with m.Elif(self.context_found & asked.process_id_valid & ~context.PDTV):
                    m.d.sync += [*direct(Outcome.FAULT, spec.TYPE_DISALLOWED), dtf.eq(context.DTF)]
                with m.Elif(self.context_found & context.is_bare):
                    m.d.sync += [*direct(Outcome.MAPPED), identity.eq(1)]
                with m.Elif(asked.is_prefetch & (joins | is_cached)):
                    m.next = "REST"
                with m.Elif(is_cached):
                    m.d.sync += cached.bit_select(cached_at, 1).eq(0)  # so that it is given back once only
                    m.next = "GIVE_BACK"
                with m.Elif(joins & any_waiter):
                    m.d.comb += [write_waiter.en.eq(1), write_link.en.eq(1), self.merged.eq(1)]
                    m.d.sync += [tails[joined].eq(free_waiter), used.bit_select(free_waiter, 1).eq(1)]
                    m.next = "REST"
                with m.Elif(any_walk & any_waiter):
                    m.d.comb += [write_waiter.en.eq(1), self.begun.eq(1)]
                    m.d.sync += [
                        at.eq(free_walk),
                        busy.bit_select(free_walk, 1).eq(1), stale.bit_select(free_walk, 1).eq(0), cached.bit_select(free_walk, 1).eq(0),
                        used.bit_select(free_waiter, 1).eq(1), heads[free_walk].eq(free_waiter), tails[free_walk].eq(free_waiter),
                        walk.device_id.eq(asked.device_id), walk.page.eq(asked.page), walk.context.eq(context),
                        walk.process_id_valid.eq(asked.process_id_valid),
                    ]
                    with m.If(self.context_found):
                        m.next = "BEGIN_TABLE"
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
                m.d.sync += [flights[at].eq(walk), parked.bit_select(at, 1).eq(1)]
                m.next = "REST"
            with m.State("RESUME"):
                m.d.comb += self.device_id.eq(walk.device_id)
                m.d.sync += [walk.context.eq(context), dtf.eq(context.DTF)]
                m.next = "BEGIN_DIRECTORY"
                with m.If(self.context_found):
                    m.next = "USE_CONTEXT"
            with m.State("BEGIN_DIRECTORY"):
                m.d.comb += self.device_id.eq(walk.device_id)
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
                m.d.sync += [
                    walk.phase.eq(Phase.TABLE), walk.level.eq(Mux(table_known, 0, 2)),
                    next_ppn.eq(Mux(table_known, table_ppn, walk_root)),
                ]
                m.next = "READ"
                with m.If(~canonical):
                    m.d.sync += [*fail(Outcome.PAGE_FAULT), dtf.eq(walk.context.DTF)]
                    m.next = "END_WALK"
            with m.State("READ"):
                m.d.comb += self.memory_read.valid.eq(~beyond(next_ppn))
                with m.If(beyond(next_ppn)):
                    m.d.sync += [*fail(Outcome.FAULT, spec.DDT_LOAD_FAULT), dtf.eq(walk.context.DTF)]
                    with m.If(walk.phase == Phase.TABLE):
                        m.d.sync += fail(Outcome.ACCESS_FAULT)
                    m.next = "END_WALK"
                with m.Elif(self.memory_read.ready):
                    m.d.comb += self.read.eq(1)
                    m.d.sync += flights[at].eq(walk)
                    m.next = "REST"

            # A reply.
            with m.State("TAKE_REPLY"):
                m.d.comb += self.memory_read_data.ready.eq(1)
                with m.If(self.memory_read_data.valid):
                    for n, doubleword in enumerate(doublewords):
                        with m.If(beat == n):
                            m.d.sync += doubleword.eq(reply.data)
                    m.d.sync += [beat.eq(beat + 1), status.eq(reply.status), dtf.eq((walk.phase == Phase.TABLE) & walk.context.DTF)]
                    with m.If(reply.last):
                        with m.Switch(walk.phase):
                            with m.Case(Phase.DIRECTORY):
                                m.next = "TAKE_DIRECTORY"
                            with m.Case(Phase.CONTEXT):
                                m.next = "TAKE_CONTEXT"
                            with m.Case(Phase.TABLE):
                                m.next = "TAKE_ENTRY"
            with m.State("TAKE_DIRECTORY"):
                m.d.sync += [next_ppn.eq(directory.PPN), walk.level.eq(walk.level - 1)]
                m.next = "END_WALK"
                with m.If(status == BurstStatus.POISONED):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_CORRUPTED)
                with m.Elif(status != BurstStatus.OK):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_LOAD_FAULT)
                with m.Elif(~directory.V):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_NOT_VALID)
                with m.Elif((directory.reserved_low != 0) | (directory.reserved_high != 0)):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_MISCONFIGURED)
                with m.Else():
                    with m.If(walk.level == 1):
                        m.d.sync += walk.phase.eq(Phase.CONTEXT)
                    m.next = "READ"
            with m.State("TAKE_CONTEXT"):
                m.d.sync += [
                    walk.context.device_id.eq(walk.device_id), walk.context.is_bare.eq(found.fsc_mode == spec.MODE_BARE),
                    walk.context.root_ppn.eq(found.fsc_ppn), walk.context.PSCID.eq(found.PSCID), walk.context.DTF.eq(found.DTF),
                    walk.context.PDTV.eq(found.PDTV),
                ]
                m.next = "END_WALK"
                with m.If(status == BurstStatus.POISONED):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_CORRUPTED)
                with m.Elif(status != BurstStatus.OK):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_LOAD_FAULT)
                with m.Elif(~found.V):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_NOT_VALID)
                with m.Elif(context_bad):
                    m.d.sync += fail(Outcome.FAULT, spec.DDT_MISCONFIGURED)
                with m.Else():
                    m.d.sync += dtf.eq(found.DTF)
                    m.next = "USE_CONTEXT"
            with m.State("USE_CONTEXT"):
                m.d.comb += [self.fill_context.valid.eq(~stale.bit_select(at, 1)), wake.eq(fetching.bit_select(at, 1))]
                m.d.sync += fetching.bit_select(at, 1).eq(0)
                m.next = "BEGIN_TABLE"
                with m.If(walk.process_id_valid & ~walk.context.PDTV):
                    m.d.sync += fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
                    m.next = "END_WALK"
                with m.Elif(walk.context.is_bare):
                    m.d.sync += [outcome.eq(Outcome.MAPPED), identity.eq(1)]
                    m.next = "END_WALK"
            with m.State("TAKE_ENTRY"):
                m.d.sync += [
                    mapped.vpn.eq(walk.page), mapped.PSCID.eq(walk.context.PSCID), mapped.G.eq(entry.G), mapped.ppn.eq(entry.PPN),
                    mapped.readable.eq(entry.R), mapped.writable.eq(entry.W & entry.D), executable.eq(entry.X),
                    mapped.reach.eq(Mux(walk.level == 0, entry.N, walk.level + 1)),
                    next_ppn.eq(entry.PPN), walk.level.eq(walk.level - 1),
                ]
                m.next = "END_WALK"
                with m.If(status == BurstStatus.POISONED):
                    m.d.sync += fail(Outcome.FAULT, spec.PT_CORRUPTED)
                with m.Elif(status != BurstStatus.OK):
                    m.d.sync += fail(Outcome.ACCESS_FAULT)
                with m.Elif(is_broken):
                    m.d.sync += fail(Outcome.PAGE_FAULT)
                with m.Elif(is_leaf):
                    m.d.sync += outcome.eq(Outcome.MAPPED)
                    m.next = "KEEP_LEAF"
                with m.Else():
                    with m.If((walk.level == 1) & ~stale.bit_select(at, 1) & ~table_known):
                        for n in range(self.tables):
                            with m.If(known_turn == n):
                                m.d.sync += [
                                    known[n].root.eq(walk_root), known[n].region.eq(walk_region), known[n].ppn.eq(entry.PPN),
                                    known_valid[n].eq(1),
                                ]
                        m.d.sync += known_turn.eq(Mux(known_turn == self.tables - 1, 0, known_turn + 1))
                    m.next = "READ"
            with m.State("KEEP_LEAF"):
                m.next = "END_WALK"
                with m.If(beyond(mapped.ppn)):
                    m.d.sync += fail(Outcome.ACCESS_FAULT)
                with m.Elif(mapped.readable & ~stale.bit_select(at, 1)):
                    m.d.comb += self.fill.valid.eq(1)
                    m.d.sync += cached.bit_select(at, 1).eq(1)

            # The end.
            with m.State("END_WALK"):
                m.d.comb += wake.eq(fetching.bit_select(at, 1))
                m.d.sync += [waiter_at.eq(heads[at]), fetching.bit_select(at, 1).eq(0)]
                m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += self.o.valid.eq(~subject.is_prefetch)
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

        with m.If(self.forget):
            m.d.sync += stale.eq(~0)
        with m.If(self.forget_tables):
            m.d.sync += known_valid.eq(0)
        return m
