"""The walker: what the caches do not know is read from memory, several walks at a time.

How it is built. The walker is a small engine, one FSM, that does one thing for one walk per state. A walk is a row of a small RAM
(``Walk``, as wide as the features ask); while a read of its own is in flight nothing of it is anywhere else. A reply, or a walk that was
parked and can go on, loads the row into ``walk``; READ stores it. Flip-flops per walk are only its key (device, process, page), which
new requests are compared with, and a few bits of state.

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
"""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import riscv_iommu as spec
from ..spec.riscv_iommu_registers import EventId
from ..tlp.layouts import BurstStatus
from .contexts import Process, context_layout
from .features import Features
from .iotlb import entry_layout, superpages
from .layouts import Events, FaultReport, MemoryRead, MemoryReadData, TranslateRequest, TranslateResponse


class Phase(enum.Enum, shape=3):
    """What a walk waits for."""

    DIRECTORY = 0  # non-leaf entry of the device directory [RVIOMMU1.0 3.3.1]
    CONTEXT = 1
    FIRST = 2  # entry of a first-stage table [RVPRIV 10.3.2]
    SECOND = 3  # entry of a second-stage table
    PROCESS = 4  # non-leaf entry of a process directory [RVIOMMU1.0 3.3.2]
    PROCESS_CONTEXT = 5
    MSI = 6  # entry of an MSI page table [RVIOMMU1.0 3.3.3]
    LEAF = 7  # a purpose of SECOND only


# Causes of what may be wrong with an entry: it cannot be read, is not valid, is misconfigured, is poisoned. [RVIOMMU1.0 4.2]
DDT = spec.DDT_LOAD_FAULT, spec.DDT_NOT_VALID, spec.DDT_MISCONFIGURED, spec.DDT_CORRUPTED
PDT = spec.PDT_LOAD_FAULT, spec.PDT_NOT_VALID, spec.PDT_MISCONFIGURED, spec.PDT_CORRUPTED
MSI = spec.MSI_LOAD_FAULT, spec.MSI_NOT_VALID, spec.MSI_MISCONFIGURED, spec.MSI_CORRUPTED

# What a leaf of the first stage grants to users with ``U`` 1, to supervisors with 0 or SUM; ``is_bare``: to all, there is no first stage.
Grant = data.StructLayout({"readable": 1, "writable": 1, "executable": 1, "U": 1, "is_bare": 1})


def first_grants(grant, is_write, execute, supervisor, SUM):
    """Return whether the first stage lets this access pass. [RVIOMMU1.0 3.3 step 17; RVPRIV 10.3.2]"""
    user_page = (is_write | ~execute) & SUM
    granted = Mux(is_write, grant.writable, Mux(execute, grant.executable, grant.readable))
    return granted & (grant.is_bare | Mux(supervisor, ~grant.U | user_page, grant.U))


def key_layout(features):
    """Return the layout of what two walks never have in common."""
    return data.StructLayout({
        "device_id": 24, "page": 52, "process_id_valid": 1, **({"process_id": 20} if features.has_processes else {}),
    })  # fmt: skip


def walk_layout(features):
    """Return the layout of a walk in flight."""
    return data.StructLayout({
        "key": key_layout(features), "phase": Phase, "level": 3, "context": context_layout(features),
        **({"ENS": 1, "SUM": 1} if features.has_processes else {}),
        **({"purpose": Phase, "second_level": 3, "guest_page": 52, "first": Grant, "reach": 3, "G": 1, "PBMT": 2}
           if features.has_second_stage else {}),
    })  # fmt: skip


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


class Outcome(enum.Enum, shape=3):
    """How a walk, or a request without one, ends."""

    MAPPED = 0
    PAGE_FAULT = 1  # the cause follows the access
    ACCESS_FAULT = 2  # the cause follows the access
    FAULT = 3  # the cause is known
    GUEST_PAGE_FAULT = 4  # the cause follows the access


def needs_process(context, process_id_valid, features):
    """Return whether a process context decides on a request. [RVIOMMU1.0 3.3 steps 10 to 13]"""
    if not features.has_processes:
        return Const(0, 1)
    return context.PDTV & (context.fsc_mode != spec.MODE_BARE) & (process_id_valid | context.DPE)


def is_refused(context, process_id_valid, process_id, features):
    """Return whether the device context forbids the request's process_id. [RVIOMMU1.0 3.3 step 7]"""
    if not features.has_processes:
        return process_id_valid & ~context.PDTV
    too_wide = ((context.fsc_mode == spec.MODE_PD8) & process_id[8:].any()) | ((context.fsc_mode == spec.MODE_PD17) & process_id[17:].any())
    return process_id_valid & (~context.PDTV | too_wide)


def is_canonical(page, mode, features):
    """Return whether ``page`` is an address of the first-stage ``mode``. [RVPRIV 10.4.1]"""

    def within(levels):
        high = page[9 * levels - 1 :]
        return ~high.any() | high.all()

    result = within(3)
    for number, has in ((spec.MODE_SV48, features.Sv48), (spec.MODE_SV57, features.Sv57)):
        if has:
            result = Mux(mode == number, within(spec.LEVELS[number]), result)
    return result


def is_guest_page(page, mode, features):
    """Return whether ``page`` is an address of the second-stage ``mode``. [RVPRIV Sv39x4]"""
    result = ~page[9 * 3 + 2 :].any()
    for number, has in ((spec.MODE_SV48, features.Sv48x4), (spec.MODE_SV57, features.Sv57x4)):
        if has:
            result = Mux(mode == number, ~page[9 * spec.LEVELS[number] + 2 :].any(), result)
    return result


class Walker(wiring.Component):
    """Answers the requests that the caches could not: reads directories and page tables, fills the caches, reports faults.

    Up to ``walks`` walks are in flight. A request for a page that is being walked for the same device and process waits for that walk, and
    one whose device context is being fetched for another page waits for that fetch, unless an invalidation came between; a walk that an
    invalidation met fills no cache. A request whose page was filled while the request waited goes back to the IOTLB, by ``retry``.
    Entries that lead to leaf tables are remembered, of both stages: then the next page costs one read, or two with two stages. Prefetches
    are dropped when there is no walk for them or one runs already, and never answered or reported.
    Every other request is answered, or given back, exactly once; every refused one is reported, if its context does not forbid it (DTF).
    Supported: Off, Bare, 1 to 3 directory levels, first stage Bare or Sv39 with Svnapot, and what ``features`` say; no hardware update of
    A and D, no ATS, no MRIF. iotval2 of a guest page fault has all bits of the guest address. [RVIOMMU1.0 3.3]

    Latency, with nothing else to do and without features: 4 cycles from a request accepted to its first read offered, 4 from the data of an
    entry to the next read, 6 from that of a leaf to the answer. Throughput: one thing at a time.

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
    features : :class:`.features.Features`
        What there is beside the least.

    Members
    -------
    i : ``In(stream.Signature(TranslateRequest))``
        Requests.
    o : ``Out(stream.Signature(TranslateResponse))``
        Answers, in any order.
    retry : ``Out(stream.Signature(TranslateRequest))``
        Requests that the IOTLB can answer now; not prefetches.
    memory_read, memory_read_data : streams
        8 to 64 bytes; ``cookie`` is the walk.
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
    forget, forget_tables : ``In(1)``
        An invalidation happens: walks in flight are stale; remembered leaf tables are forgotten.
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
        if tables not in range(1, 65):
            raise ValueError(f"Remembered tables must be between 1 and 64, not {tables!r}")
        if physical_address_bits not in range(32, 57):
            raise ValueError(f"Physical address bits must be between 32 and 56, not {physical_address_bits!r}")
        self.walks, self.waiters, self.tables, self.physical_address_bits = walks, waiters, tables, physical_address_bits
        self.features = features
        context = context_layout(features)
        super().__init__({
            "i": In(stream.Signature(TranslateRequest)),
            "o": Out(stream.Signature(TranslateResponse)),
            "retry": Out(stream.Signature(TranslateRequest)),
            "memory_read": Out(stream.Signature(MemoryRead)),
            "memory_read_data": In(stream.Signature(MemoryReadData)),
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
            "forget": In(1),
            "forget_tables": In(1),
            "begun": Out(1),
            "merged": Out(1),
            "read": Out(1),
            **({"events": Out(Events)} if features.HPM else {}),
        })

    def elaborate(self, platform):
        m = Module()
        features = self.features
        two_stages, processes, pages = features.has_second_stage, features.has_processes, superpages(features)
        walk_bits, waiter_bits = max((self.walks - 1).bit_length(), 1), (self.waiters - 1).bit_length()
        request, reply = self.i.payload, self.memory_read_data.payload

        # Walks in flight, and who waits for them: a linked list per walk.
        m.submodules.rows = rows = Memory(shape=walk_layout(features), depth=self.walks, init=[])
        read_row, write_row = rows.read_port(domain="comb"), rows.write_port()
        keys = [Signal(key_layout(features), name=f"key_{n}") for n in range(self.walks)]
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

        # The walk at work, the request at work, the entry at work.
        at, walk = Signal(walk_bits), Signal(walk_layout(features))
        context, key = walk.context, walk.key
        asked, asked_key = Signal(TranslateRequest), Signal(key_layout(features))
        doublewords = [Signal(64, name=f"doubleword_{n}") for n in range(8 if features.MSI_FLAT else 4)]
        beat = Signal(range(len(doublewords)))
        status = Signal(BurstStatus)
        entry = spec.PageTableEntry(doublewords[0])
        directory = spec.DirectoryEntry(doublewords[0])
        next_ppn = Signal(52 if two_stages else 44)  # page of the next read; of a guest in front of BEGIN_SECOND
        outcome, cause, mapped = Signal(Outcome), Signal(12), Signal(entry_layout(features))
        first = walk.first if two_stages else Signal(Grant)
        second = Signal(data.StructLayout({"readable": 1, "writable": 1, "executable": 1}))
        is_msi = Signal()
        is_direct = Signal()  # the answer is for ``asked``, no walk is involved
        identity = Signal()
        dtf = Signal()
        has_guest = context.guest_mode != spec.MODE_BARE if two_stages else Const(0, 1)
        is_second = walk.phase == Phase.SECOND if two_stages else Const(0, 1)

        # Directories.
        ddis = spec.EXTENDED_DDI if features.MSI_FLAT else spec.DDI
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
            self.device_id.eq(asked.device_id),
            asked_key.device_id.eq(asked.device_id), asked_key.page.eq(asked.page),
            asked_key.process_id_valid.eq(asked.process_id_valid),
        ]
        if processes:
            m.d.comb += [
                asked_key.process_id.eq(Mux(asked.process_id_valid, asked.process_id, 0)), self.process_id.eq(key.process_id),
            ]
        may_share = 1 if processes else ~asked.process_id_valid  # a process_id is answered by the device context alone
        joins, joined = Signal(), Signal(walk_bits)
        is_cached, cached_at, context_comes = Signal(), Signal(walk_bits), Signal()
        wake = Signal()  # the device context of ``walk`` has come, or never will
        for n, other in enumerate(keys):
            same_page = may_share & (other.as_value() == asked_key.as_value())
            with m.If(busy[n] & ~stale[n] & same_page):
                m.d.comb += [joins.eq(1), joined.eq(n)]
            with m.If(cached[n] & ~stale[n] & same_page & (processes | ~asked.execute)):
                m.d.comb += [is_cached.eq(1), cached_at.eq(n)]
            with m.If(fetching[n] & ~stale[n] & (other.device_id == asked.device_id)):
                m.d.comb += context_comes.eq(1)
            with m.If(wake & parked[n] & (other.device_id == key.device_id)):
                m.d.sync += [parked[n].eq(0), resumable[n].eq(1)]
        resumed = Signal(walk_bits)
        for n in reversed(range(self.walks)):
            with m.If(resumable[n]):
                m.d.comb += resumed.eq(n)
        m.d.comb += read_row.addr.eq(Mux(self.memory_read_data.valid, reply.cookie, resumed))

        # Leaf tables that are known.
        place = data.StructLayout({
            "root": 44, "region": features.page_bits - 9, **({"mode": 2} if features.levels > 3 else {}),
            **({"is_second": 1, "GV": 1, "GSCID": 16} if two_stages else {}),
        })  # fmt: skip
        known = [Signal(data.StructLayout({"place": place, "ppn": 44}), name=f"table_{n}") for n in range(self.tables)]
        known_valid, known_turn = Signal(self.tables), Signal(range(max(self.tables, 2)))
        table_known, table_ppn, sought = Signal(), Signal(44), Signal(place)
        mode = Mux(is_second, context.guest_mode, context.fsc_mode) if two_stages else context.fsc_mode
        page = Mux(is_second, walk.guest_page, key.page) if two_stages else key.page
        m.d.comb += [
            sought.root.eq(Mux(is_second, context.guest_root_ppn, context.root_ppn) if two_stages else context.root_ppn),
            sought.region.eq(page[9 : features.page_bits]),
        ]
        if features.levels > 3:
            m.d.comb += sought.mode.eq(mode[:2])
        if two_stages:
            m.d.comb += [sought.is_second.eq(is_second), sought.GV.eq(has_guest), sought.GSCID.eq(Mux(has_guest, context.GSCID, 0))]
        for n in range(self.tables):
            with m.If(known_valid[n] & (known[n].place.as_value() == sought.as_value())):
                m.d.comb += [table_known.eq(1), table_ppn.eq(known[n].ppn)]

        # The page-table entry at work, of either stage. [RVPRIV 10.3.2; RVIOMMU1.0 3.3.4]
        level = Mux(is_second, walk.second_level, walk.level) if two_stages else walk.level
        is_leaf, is_broken, reach = Signal(), Signal(), Signal(3)
        low = Signal(9 * (features.levels - 1))  # page-number bits that the leaf covers, but for NAPOT
        with m.Switch(level):
            for n in range(1, features.levels):
                with m.Case(n):
                    m.d.comb += low.eq((1 << 9 * n) - 1)
        napot_ok = (level == 0) & (entry.PPN[:4] == spec.NAPOT_64K)
        unusable = ~entry.A | (~entry.U & (is_second if processes else 1))
        bad_type = (entry.PBMT == spec.PBMT_RESERVED) | (~is_leaf & (entry.PBMT != 0)) if features.Svpbmt else entry.PBMT != 0
        m.d.comb += [
            is_leaf.eq(entry.R | entry.X),
            reach.eq(Mux(level == 0, entry.N, level + 1)),
            is_broken.eq(
                ~entry.V | (~entry.R & entry.W) | (entry.reserved != 0) | bad_type
                | Mux(is_leaf, ((entry.PPN[: len(low)] & low) != 0) | (entry.N & ~napot_ok) | unusable,
                      (level == 0) | entry.N | entry.A | entry.D | entry.U)),
        ]
        covered = Signal.like(low)
        m.d.comb += covered.eq(low | Mux(entry.N, 0xF, 0))
        leaf_page = Cat((entry.PPN[: len(low)] & ~covered) | (page[: len(low)] & covered), entry.PPN[len(low) :])

        # The answer's page.
        translated, inside = Signal(44), Signal(pages[-1][0])  # ``inside``: page-number bits that the mapping leaves alone
        with m.Switch(mapped.reach):
            for n, (covered_bits, _) in enumerate(pages, 1):
                with m.Case(n):
                    m.d.comb += inside.eq((1 << covered_bits) - 1)
        m.d.comb += translated.eq(Cat(
            (mapped.ppn[: len(inside)] & ~inside) | (key.page[: len(inside)] & inside), mapped.ppn[len(inside) :]))

        found, context_bad = self._judge_context(m, doublewords)

        # Memory reads of the walk at work.
        table_index, ddi, pdi = Signal(9), Signal(9), Signal(9)
        with m.Switch(level):
            for n in range(features.levels):
                with m.Case(n):
                    m.d.comb += table_index.eq(page[9 * n : 9 * n + 9])
        with m.Switch(walk.level):
            for n in range(3):
                with m.Case(n):
                    m.d.comb += ddi.eq(key.device_id[slice(*ddis[n])])
                    if processes:
                        m.d.comb += pdi.eq(key.process_id[slice(*spec.PDI[n])])

        def beyond(ppn):
            return ppn[self.physical_address_bits - spec.PAGE_BITS :].any()

        read = self.memory_read.payload
        offset, read_fault, read_cause = Signal(12), Signal(Outcome), Signal(12)
        msi_number = Signal(features.guest_page_bits) if features.MSI_FLAT else Const(0, 8)
        is_process_read = (walk.phase == Phase.PROCESS) | (walk.phase == Phase.PROCESS_CONTEXT) if processes else Const(0, 1)
        if processes and two_stages:
            is_process_read |= is_second & ((walk.purpose == Phase.PROCESS) | (walk.purpose == Phase.PROCESS_CONTEXT))
        m.d.comb += [
            read.cookie.eq(at), read.length_bytes.eq(spec.ENTRY_BYTES), read.address.eq(Cat(offset, next_ppn)),
            read_fault.eq(Outcome.FAULT), read_cause.eq(spec.DDT_LOAD_FAULT), offset.eq(Cat(Const(0, 3), table_index)),
        ]
        with m.Switch(walk.phase):
            with m.Case(Phase.DIRECTORY):
                m.d.comb += offset.eq(Cat(Const(0, 3), ddi))
            with m.Case(Phase.CONTEXT):
                size = spec.EXTENDED_DC_BYTES if features.MSI_FLAT else spec.DC_BYTES
                m.d.comb += [offset.eq(key.device_id[: ddis[0][1]] << (size - 1).bit_length()), read.length_bytes.eq(size)]
            with m.Case(Phase.FIRST):
                m.d.comb += read_fault.eq(Outcome.ACCESS_FAULT)
            if two_stages:
                with m.Case(Phase.SECOND):
                    m.d.comb += read_fault.eq(Outcome.ACCESS_FAULT)
            if processes:
                with m.Case(Phase.PROCESS):
                    m.d.comb += offset.eq(Cat(Const(0, 3), pdi))
                with m.Case(Phase.PROCESS_CONTEXT):
                    m.d.comb += [offset.eq(Cat(Const(0, 4), key.process_id[:8])), read.length_bytes.eq(spec.PC_BYTES)]
            if features.MSI_FLAT:
                with m.Case(Phase.MSI):
                    m.d.comb += [
                        offset.eq(Cat(Const(0, 4), msi_number[:8])), read.length_bytes.eq(spec.MSI_PTE_BYTES),
                        read_cause.eq(spec.MSI_LOAD_FAULT),
                    ]
        if processes:
            with m.If(is_process_read):
                m.d.comb += [read_fault.eq(Outcome.FAULT), read_cause.eq(spec.PDT_LOAD_FAULT)]

        # Answers: of the walk's waiters one after the other, or of the request itself.
        waiter_at = Signal(waiter_bits)
        m.d.comb += [read_waiter.addr.eq(waiter_at), read_link.addr.eq(waiter_at)]
        subject, subject_page, subject_device = Signal(Waiter), Signal(52), Signal(24)
        with m.If(is_direct):
            m.d.comb += [
                *(subject[name].eq(asked[name]) for name in WAITER), subject_page.eq(asked.page), subject_device.eq(asked.device_id),
            ]
        with m.Else():
            m.d.comb += [subject.eq(read_waiter.data), subject_page.eq(key.page), subject_device.eq(key.device_id)]
        # A write is a write; what executes reads. [RVIOMMU1.0 2.3]
        page_fault, access_fault, guest_fault, ttyp, second_allows = Signal(12), Signal(12), Signal(12), Signal(6), Signal()
        with m.If(subject.is_write):
            m.d.comb += [
                page_fault.eq(spec.WRITE_PAGE_FAULT), access_fault.eq(spec.WRITE_ACCESS_FAULT), ttyp.eq(spec.TTYP_UNTRANSLATED_WRITE),
                guest_fault.eq(spec.WRITE_GUEST_PAGE_FAULT), second_allows.eq(second.writable),
            ]
        with m.Elif(subject.execute):
            m.d.comb += [
                page_fault.eq(spec.INSTRUCTION_PAGE_FAULT), access_fault.eq(spec.INSTRUCTION_ACCESS_FAULT),
                ttyp.eq(spec.TTYP_UNTRANSLATED_EXECUTE), guest_fault.eq(spec.INSTRUCTION_GUEST_PAGE_FAULT),
                second_allows.eq(second.executable),
            ]
        with m.Else():
            m.d.comb += [
                page_fault.eq(spec.READ_PAGE_FAULT), access_fault.eq(spec.READ_ACCESS_FAULT), ttyp.eq(spec.TTYP_UNTRANSLATED_READ),
                guest_fault.eq(spec.READ_GUEST_PAGE_FAULT), second_allows.eq(second.readable),
            ]
        supervisor = subject.process_id_valid & subject.privileged
        first_allows = is_direct | first_grants(first, subject.is_write, subject.execute, supervisor if processes else Const(0, 1),
                                                walk.SUM if processes else Const(0, 1))  # fmt: skip
        permitted, subject_cause, is_guest_fault = Signal(), Signal(12), Signal()
        with m.If((~is_direct & supervisor & ~walk.ENS) if processes else Const(0, 1)):
            m.d.comb += subject_cause.eq(spec.TYPE_DISALLOWED)
        with m.Elif(~first_allows):
            m.d.comb += subject_cause.eq(page_fault)
        with m.Elif(outcome == Outcome.FAULT):
            m.d.comb += subject_cause.eq(cause)
        with m.Elif((outcome == Outcome.ACCESS_FAULT) | ((outcome == Outcome.MAPPED) & is_msi & ~second_allows)):
            m.d.comb += subject_cause.eq(access_fault)
        with m.Elif(outcome == Outcome.PAGE_FAULT):
            m.d.comb += subject_cause.eq(page_fault)
        with m.Elif((outcome == Outcome.GUEST_PAGE_FAULT) | ~second_allows):
            m.d.comb += [subject_cause.eq(guest_fault), is_guest_fault.eq(1)]
        with m.Else():
            m.d.comb += permitted.eq(1)
        always_logged = Cat(subject_cause == number for number in spec.LOGGED_ALWAYS).any()
        answer, report = self.o.payload, self.faults.payload
        m.d.comb += [
            answer.cookie.eq(subject.cookie),
            answer.fault.eq(~permitted),
            report.cause.eq(subject_cause),
            report.ttyp.eq(ttyp),
            report.device_id.eq(subject_device),
            report.process_id_valid.eq(subject.process_id_valid),
            report.process_id.eq(Mux(subject.process_id_valid, subject.process_id, 0)),
            report.privileged.eq(supervisor),
            report.iotval.eq(Cat(subject.offset, subject_page)),
        ]
        if two_stages:
            with m.If(is_guest_fault & (walk.purpose == Phase.LEAF)):
                m.d.comb += report.iotval2.eq(Cat(Const(0, 2), subject.offset[2:], walk.guest_page))
            with m.Elif(is_guest_fault):
                m.d.comb += report.iotval2.eq(Cat(Const(1, 2), self._entry_offset(m, walk)[2:], walk.guest_page))
        with m.If(~permitted):
            m.d.comb += answer.cause.eq(subject_cause)
        with m.Elif(identity):
            m.d.comb += [answer.page.eq(subject_page), answer.readable.eq(1), answer.writable.eq(1), answer.size_log2.eq(63)]
        with m.Else():
            m.d.comb += [answer.page.eq(translated), answer.readable.eq(mapped.readable), answer.writable.eq(mapped.writable)]
            if features.Svpbmt:
                m.d.comb += answer.PBMT.eq(mapped.PBMT)
            with m.Switch(mapped.reach):
                with m.Case(0):
                    m.d.comb += answer.size_log2.eq(spec.PAGE_BITS)
                for n, (_, size) in enumerate(pages, 1):
                    with m.Case(n):
                        m.d.comb += answer.size_log2.eq(size)

        write_waiter_data = write_waiter.data
        m.d.comb += [
            write_waiter.addr.eq(free_waiter), *(write_waiter_data[name].eq(asked[name]) for name in WAITER),
            write_link.addr.eq(tails[joined]), write_link.data.eq(free_waiter), self.retry.payload.eq(asked),
            write_row.addr.eq(at), write_row.data.eq(walk),
            self.fill.payload.eq(mapped),
            self.fill_context.payload.eq(context),
        ]

        def fail(kind, number=0):
            return [outcome.eq(kind), cause.eq(number)]

        def direct(kind, number=0):
            return [*fail(kind, number), is_direct.eq(1), dtf.eq(0)]

        def refuse(causes, is_valid, is_bad):
            """End the walk if what was read is of no use; what becomes of it otherwise is the caller's ``m.Else()``."""
            load_fault, not_valid, misconfigured, corrupted = causes
            m.next = "END_WALK"
            with m.If(status == BurstStatus.POISONED):
                m.d.sync += fail(Outcome.FAULT, corrupted)
            with m.Elif(status != BurstStatus.OK):
                m.d.sync += fail(Outcome.FAULT, load_fault)
            with m.Elif(~is_valid):
                m.d.sync += fail(Outcome.FAULT, not_valid)
            with m.Elif(is_bad):
                m.d.sync += fail(Outcome.FAULT, misconfigured)

        def access():
            """Read at ``next_ppn``, which is a guest's with a second stage."""
            m.next = "READ"
            if two_stages:
                with m.If(has_guest):
                    m.next = "BEGIN_SECOND"

        passes = self.context.fsc_mode == spec.MODE_BARE
        if processes:
            passes = ~needs_process(self.context, asked.process_id_valid, features) & (passes | self.context.PDTV)
        if two_stages:
            passes &= self.context.guest_mode == spec.MODE_BARE

        pending = Signal()  # ``asked`` could not be begun: it stays, and replies go first
        with m.FSM() as fsm:
            with m.State("REST"):
                m.d.sync += [is_direct.eq(0), identity.eq(0), beat.eq(0), second.eq(~0), is_msi.eq(0), walk.eq(read_row.data)]
                if not two_stages:
                    m.d.sync += first.eq(~0)
                with m.If(self.memory_read_data.valid):
                    m.d.sync += at.eq(reply.cookie)
                    m.next = "TAKE_REPLY"
                with m.Elif(resumable.any()):
                    m.d.sync += [at.eq(resumed), resumable.bit_select(resumed, 1).eq(0)]
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
                with m.Elif(self.context_found & is_refused(self.context, asked.process_id_valid, asked.process_id, features)):
                    m.d.sync += [*direct(Outcome.FAULT, spec.TYPE_DISALLOWED), dtf.eq(self.context.DTF)]
                with m.Elif(self.context_found & passes):
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
                        key.eq(asked_key), context.eq(self.context), walk.phase.eq(Phase.CONTEXT),
                    ]
                    for n, other in enumerate(keys):
                        with m.If(free_walk == n):
                            m.d.sync += other.eq(asked_key)
                    if processes:
                        m.d.sync += [walk.ENS.eq(1), walk.SUM.eq(0)]
                    if two_stages:
                        m.d.sync += [first.eq(~0), walk.reach.eq(~0), walk.G.eq(0), walk.PBMT.eq(0)]
                    with m.If(self.context_found):
                        m.next = "PLAN" if processes else "BEGIN_TABLE"
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
                m.d.comb += self.device_id.eq(key.device_id)
                m.d.sync += [context.eq(self.context), dtf.eq(self.context.DTF)]
                m.next = "BEGIN_DIRECTORY"
                with m.If(self.context_found):
                    m.next = "USE_CONTEXT"
            with m.State("BEGIN_DIRECTORY"):
                m.d.comb += self.device_id.eq(key.device_id)
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
                    walk.phase.eq(Phase.FIRST), dtf.eq(context.DTF), walk.level.eq(Mux(table_known, 0, context.fsc_mode[:2] + 2)),
                    next_ppn.eq(Mux(table_known, table_ppn, context.root_ppn)),
                ]
                with m.If((context.fsc_mode == spec.MODE_BARE) if processes or two_stages else Const(0, 1)):
                    m.d.sync += [outcome.eq(Outcome.MAPPED), identity.eq(1)]
                    m.next = "END_WALK"
                    if two_stages:
                        with m.If(has_guest):
                            m.d.sync += [walk.phase.eq(Phase.LEAF), next_ppn.eq(key.page)]
                            m.next = "FIND_MSI" if features.MSI_FLAT else "BEGIN_SECOND"
                with m.Elif(~is_canonical(key.page, context.fsc_mode, features)):
                    m.d.sync += fail(Outcome.PAGE_FAULT)
                    m.next = "END_WALK"
                with m.Elif(table_known):
                    m.next = "READ"
                with m.Else():
                    access()
            with m.State("READ"):
                m.d.comb += self.memory_read.valid.eq(~beyond(next_ppn))
                with m.If(beyond(next_ppn)):
                    m.d.sync += [
                        *fail(read_fault, read_cause),
                        dtf.eq((walk.phase != Phase.DIRECTORY) & (walk.phase != Phase.CONTEXT) & context.DTF),
                    ]
                    m.next = "END_WALK"
                with m.Elif(self.memory_read.ready):
                    m.d.comb += [self.read.eq(1), write_row.en.eq(1)]
                    with m.If((is_second | (walk.phase == Phase.FIRST)) & (level == 0) & ~stale.bit_select(at, 1) & ~table_known):
                        for n in range(self.tables):
                            with m.If(known_turn == n):
                                m.d.sync += [known[n].place.eq(sought), known[n].ppn.eq(next_ppn), known_valid[n].eq(1)]
                        m.d.sync += known_turn.eq(Mux(known_turn == self.tables - 1, 0, known_turn + 1))
                    m.next = "REST"

            # A reply.
            with m.State("TAKE_REPLY"):
                m.d.comb += self.memory_read_data.ready.eq(1)
                with m.If(self.memory_read_data.valid):
                    for n, doubleword in enumerate(doublewords):
                        with m.If(beat == n):
                            m.d.sync += doubleword.eq(reply.data)
                    m.d.sync += [
                        beat.eq(beat + 1), status.eq(reply.status),
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
            with m.State("TAKE_DIRECTORY"):
                m.d.sync += [next_ppn.eq(directory.PPN), walk.level.eq(walk.level - 1)]
                refuse(DDT, directory.V, (directory.reserved_low != 0) | (directory.reserved_high != 0))
                with m.Else():
                    with m.If(walk.level == 1):
                        m.d.sync += walk.phase.eq(Phase.CONTEXT)
                    m.next = "READ"
            with m.State("TAKE_CONTEXT"):
                m.d.sync += [context.device_id.eq(key.device_id), *(context[name].eq(value) for name, value in found.items())]
                refuse(DDT, doublewords[0][0], context_bad)
                with m.Else():
                    m.d.sync += dtf.eq(found["DTF"])
                    m.next = "USE_CONTEXT"
            with m.State("USE_CONTEXT"):
                m.d.comb += [self.fill_context.valid.eq(~stale.bit_select(at, 1)), wake.eq(fetching.bit_select(at, 1))]
                m.d.sync += fetching.bit_select(at, 1).eq(0)
                if processes:
                    m.next = "PLAN"
                else:
                    m.next = "BEGIN_TABLE"
                    with m.If(key.process_id_valid & ~context.PDTV):
                        m.d.sync += fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
                        m.next = "END_WALK"
                    if not two_stages:
                        with m.Elif(context.fsc_mode == spec.MODE_BARE):
                            m.d.sync += [outcome.eq(Outcome.MAPPED), identity.eq(1)]
                            m.next = "END_WALK"
            with m.State("TAKE_ENTRY"):
                m.d.sync += [
                    mapped.vpn.eq(key.page), mapped.PSCID.eq(context.PSCID), mapped.G.eq(entry.G), mapped.ppn.eq(entry.PPN),
                    mapped.readable.eq(entry.R), mapped.writable.eq(entry.W & entry.D), mapped.reach.eq(reach), next_ppn.eq(entry.PPN),
                ]
                if processes:
                    m.d.sync += [mapped.executable.eq(entry.X), mapped.U.eq(entry.U)]
                if features.Svpbmt:
                    m.d.sync += mapped.PBMT.eq(entry.PBMT)
                if two_stages:
                    m.d.sync += [mapped.first.eq(1), mapped.GV.eq(0), mapped.GSCID.eq(0), mapped.is_fragment.eq(0)]
                with m.If(is_second):
                    if two_stages:
                        m.d.sync += walk.second_level.eq(walk.second_level - 1)
                with m.Else():
                    m.d.sync += walk.level.eq(walk.level - 1)
                m.next = "END_WALK"
                with m.If(status == BurstStatus.POISONED):
                    m.d.sync += fail(Outcome.FAULT, Mux(is_process_read, spec.PDT_CORRUPTED, spec.PT_CORRUPTED))
                with m.Elif(status != BurstStatus.OK):
                    m.d.sync += fail(read_fault, read_cause)
                with m.Elif(is_broken):
                    m.d.sync += fail(Mux(is_second, Outcome.GUEST_PAGE_FAULT, Outcome.PAGE_FAULT))
                with m.Elif(~is_leaf):
                    m.next = "READ"
                    if two_stages:
                        with m.If(~is_second):
                            access()
                with m.Elif(is_second):
                    if two_stages:
                        m.d.sync += [next_ppn.eq(leaf_page), walk.phase.eq(walk.purpose), walk.second_level.eq(walk.second_level)]
                        with m.If(walk.purpose == Phase.LEAF):
                            m.next = "COMBINE"
                        with m.Elif(~entry.R):
                            m.d.sync += fail(Outcome.GUEST_PAGE_FAULT)
                        with m.Else():
                            m.next = "READ"
                with m.Else():
                    m.d.sync += [
                        outcome.eq(Outcome.MAPPED),
                        first.readable.eq(entry.R), first.writable.eq(entry.W & entry.D), first.executable.eq(entry.X),
                        first.U.eq(entry.U), first.is_bare.eq(0),
                    ]
                    m.next = "KEEP_LEAF"
                    if two_stages:
                        m.d.sync += [
                            walk.reach.eq(reach), walk.G.eq(entry.G), walk.PBMT.eq(entry.PBMT if features.Svpbmt else 0),
                        ]
                        with m.If(has_guest):
                            m.d.sync += [walk.phase.eq(Phase.LEAF), next_ppn.eq(leaf_page)]
                            m.next = "FIND_MSI" if features.MSI_FLAT else "BEGIN_SECOND"
            with m.State("KEEP_LEAF"):
                m.next = "END_WALK"
                with m.If(beyond(mapped.ppn)):
                    m.d.sync += fail(Outcome.ACCESS_FAULT)
                with m.Elif(mapped.readable & ~stale.bit_select(at, 1)):
                    m.d.comb += self.fill.valid.eq(1)
                    m.d.sync += cached.bit_select(at, 1).eq(1)
            if processes:
                self._find_process(m, walk, doublewords, next_ppn, stale.bit_select(at, 1), dtf, fail, refuse, access)
            if two_stages:
                self._begin_second(m, walk, next_ppn, table_known, table_ppn, dtf, fail)
                self._combine(m, walk, entry, reach, next_ppn, mapped, second, outcome, inside)
            if features.MSI_FLAT:
                self._translate_msi(m, walk, doublewords, next_ppn, msi_number, mapped, second, is_msi, outcome, refuse)

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

        if features.HPM:
            self._tell_events(m, fsm, walk, has_guest, (self.mode != spec.OFF) & (self.mode != spec.BARE) & ~too_wide)
        with m.If(self.forget):
            m.d.sync += stale.eq(~0)
        with m.If(self.forget_tables):
            m.d.sync += known_valid.eq(0)
        return m

    def _tell_events(self, m, fsm, walk, has_guest, may_begin):
        """Tell each miss and each walk of a table when it begins; one that begins at a remembered leaf table is one too.

        A miss is a walk that comes to its page tables, whoever joins it later. IDs are those known by then, and
        no process_id without process directories. [RVIOMMU1.0 6.23]
        """
        context, key, events = walk.context, walk.key, self.events
        begins_table = fsm.ongoing("BEGIN_TABLE")
        has_first = context.fsc_mode != spec.MODE_BARE
        m.d.comb += [
            events.kinds[EventId.DDT_WALK].eq(fsm.ongoing("BEGIN_DIRECTORY") & may_begin),
            events.kinds[EventId.TLB_MISS].eq(begins_table & (has_first | has_guest)),
            events.kinds[EventId.FIRST_STAGE_WALK].eq(begins_table & has_first),
            events.device_id.eq(key.device_id), events.PSCV.eq(has_first), events.PSCID.eq(context.PSCID),
        ]  # fmt: skip
        if self.features.has_processes:
            m.d.comb += [
                events.kinds[EventId.PDT_WALK].eq(fsm.ongoing("LOOK_PROCESS") & ~self.process_found),
                events.process_id_valid.eq(key.process_id_valid), events.process_id.eq(key.process_id),
            ]  # fmt: skip
        if self.features.has_second_stage:
            is_for_table = (walk.phase == Phase.FIRST) | (walk.phase == Phase.LEAF)
            m.d.comb += [
                events.kinds[EventId.SECOND_STAGE_WALK].eq(fsm.ongoing("BEGIN_SECOND")),
                events.PSCV.eq(has_first & (begins_table | is_for_table)),
                events.GSCV.eq(has_guest), events.GSCID.eq(context.GSCID),
            ]  # fmt: skip

    def _first_mode_ok(self, mode):
        """Return whether ``mode`` is one of iosatp that is there."""
        modes = ((spec.MODE_BARE, True), (spec.MODE_SV39, True), (spec.MODE_SV48, self.features.Sv48), (spec.MODE_SV57, self.features.Sv57))
        return Cat(mode == number for number, has in modes if has).any()

    def _judge_context(self, m, doublewords):
        """Return what to keep of the device context in ``doublewords``, by name, and whether it is misconfigured. [RVIOMMU1.0 3.1.4]"""
        features, found = self.features, spec.DeviceContext(Cat(doublewords[:4]))
        kept = {"fsc_mode": found.fsc_mode, "root_ppn": found.fsc_ppn, "PSCID": found.PSCID, "DTF": found.DTF, "PDTV": found.PDTV}
        directories = ((spec.MODE_BARE, True), (spec.MODE_PD8, features.PD8), (spec.MODE_PD17, features.PD17),
                       (spec.MODE_PD20, features.PD20))  # fmt: skip
        guests = ((spec.MODE_BARE, True), (spec.MODE_SV39, features.Sv39x4), (spec.MODE_SV48, features.Sv48x4),
                  (spec.MODE_SV57, features.Sv57x4))  # fmt: skip
        has_guest = found.iohgatp_mode != spec.MODE_BARE
        faults = [
            found.EN_ATS, found.EN_PRI, found.T2GPA, found.PRPR, found.GADE, found.SADE, found.SBE, found.SXL, found.DPE & ~found.PDTV,
            found.tc_reserved.any(), found.tc_reserved_high.any(), found.ta_reserved.any(), found.ta_reserved_high.any(),
            found.fsc_reserved.any(),
            ~Cat(found.iohgatp_mode == number for number, has in guests if has).any(),
            has_guest & found.iohgatp_ppn[:2].any(),
            found.PDTV & ~Cat(found.fsc_mode == number for number, has in directories if has).any(),
            ~found.PDTV & ~self._first_mode_ok(found.fsc_mode),
        ]
        if features.has_processes:
            kept |= {"DPE": found.DPE}
        if features.has_second_stage:
            kept |= {"guest_root_ppn": found.iohgatp_ppn, "GSCID": found.GSCID, "guest_mode": found.iohgatp_mode}
        if features.MSI_FLAT:
            msi, bits = spec.MsiContext(Cat(doublewords[4:])), features.guest_page_bits
            is_on = msi.msiptp_mode != spec.MODE_BARE
            kept |= {"msi_on": is_on, "msi_ppn": msi.msiptp_ppn, "msi_mask": msi.mask[:bits], "msi_pattern": msi.pattern[:bits]}
            faults += [
                msi.msiptp_reserved.any(), is_on & ((msi.msiptp_mode != spec.MODE_FLAT) | ~has_guest), msi.mask[bits:].any(),
                msi.mask_reserved.any(), msi.pattern[bits:].any(), msi.pattern_reserved.any(), msi.reserved.any(),
            ]
        is_bad = Signal()
        m.d.comb += is_bad.eq(Cat(faults).any())
        return kept, is_bad

    def _entry_offset(self, m, walk):
        """Return where in its page the entry lies that the second stage was asked for."""
        offset, page = Signal(12, name="entry_offset"), walk.key.page
        with m.Switch(walk.level):
            for n in range(self.features.first_levels):
                with m.Case(n):
                    m.d.comb += offset.eq(Cat(Const(0, 3), page[9 * n : 9 * n + 9]))
        if self.features.has_processes:
            with m.If(walk.purpose == Phase.PROCESS):
                for n in (1, 2):
                    with m.If(walk.level == n):
                        m.d.comb += offset.eq(Cat(Const(0, 3), walk.key.process_id[slice(*spec.PDI[n])]))
            with m.Elif(walk.purpose == Phase.PROCESS_CONTEXT):
                m.d.comb += offset.eq(Cat(Const(0, 4), walk.key.process_id[:8]))
        return offset

    def _find_process(self, m, walk, doublewords, next_ppn, is_stale, dtf, fail, refuse, access):
        """Process contexts. [RVIOMMU1.0 3.3 steps 7 to 16, 3.3.2]"""
        features, context, key = self.features, walk.context, walk.key
        directory, found = spec.DirectoryEntry(doublewords[0]), spec.ProcessContext(Cat(doublewords[:2]))
        kept = self.fill_process.payload
        m.d.comb += [
            kept.device_id.eq(key.device_id), kept.process_id.eq(key.process_id), kept.fsc_mode.eq(context.fsc_mode),
            kept.root_ppn.eq(context.root_ppn), kept.PSCID.eq(context.PSCID), kept.ENS.eq(walk.ENS), kept.SUM.eq(walk.SUM),
        ]
        with m.State("PLAN"):
            m.d.sync += dtf.eq(context.DTF)
            m.next = "BEGIN_TABLE"
            with m.If(is_refused(context, key.process_id_valid, key.process_id, features)):
                m.d.sync += fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
                m.next = "END_WALK"
            with m.Elif(needs_process(context, key.process_id_valid, features)):
                m.next = "LOOK_PROCESS"
            with m.Elif(context.PDTV):
                m.d.sync += context.fsc_mode.eq(spec.MODE_BARE)
        with m.State("LOOK_PROCESS"):
            m.d.comb += self.device_id.eq(key.device_id)
            with m.If(self.process_found):
                m.d.sync += [
                    *(context[name].eq(self.process[name]) for name in ("fsc_mode", "root_ppn", "PSCID")),
                    walk.ENS.eq(self.process.ENS), walk.SUM.eq(self.process.SUM),
                ]
                m.next = "BEGIN_TABLE"
            with m.Else():
                m.d.sync += [
                    walk.level.eq(context.fsc_mode - 1), next_ppn.eq(context.root_ppn),
                    walk.phase.eq(Mux(context.fsc_mode == spec.MODE_PD8, Phase.PROCESS_CONTEXT, Phase.PROCESS)),
                ]
                access()
        with m.State("TAKE_PROCESS"):
            m.d.sync += [next_ppn.eq(directory.PPN), walk.level.eq(walk.level - 1)]
            refuse(PDT, directory.V, (directory.reserved_low != 0) | (directory.reserved_high != 0))
            with m.Else():
                with m.If(walk.level == 1):
                    m.d.sync += walk.phase.eq(Phase.PROCESS_CONTEXT)
                access()
        with m.State("TAKE_PROCESS_CONTEXT"):
            reserved = found.ta_reserved.any() | found.ta_reserved_high.any() | found.fsc_reserved.any()
            refuse(PDT, found.V, reserved | ~self._first_mode_ok(found.fsc_mode))
            with m.Else():
                m.d.sync += [
                    context.fsc_mode.eq(found.fsc_mode), context.root_ppn.eq(found.fsc_ppn), context.PSCID.eq(found.PSCID),
                    walk.ENS.eq(found.ENS), walk.SUM.eq(found.SUM),
                ]
                m.next = "KEEP_PROCESS"
        with m.State("KEEP_PROCESS"):
            m.d.comb += self.fill_process.valid.eq(~is_stale)
            m.next = "BEGIN_TABLE"

    def _begin_second(self, m, walk, next_ppn, table_known, table_ppn, dtf, fail):
        """The second stage for the guest page in ``next_ppn``. [RVPRIV 18.5]"""
        context, page = walk.context, walk.guest_page
        with m.State("BEGIN_SECOND"):
            m.d.sync += [page.eq(next_ppn), walk.purpose.eq(walk.phase), walk.phase.eq(Phase.SECOND), dtf.eq(context.DTF)]
            m.next = "LOOK_SECOND"
        with m.State("LOOK_SECOND"):
            top = Signal(2)
            with m.Switch(context.guest_mode):
                for number, levels in spec.LEVELS.items():
                    if levels <= self.features.second_levels:
                        with m.Case(number):
                            m.d.comb += top.eq(page[9 * levels : 9 * levels + 2])
            m.d.sync += [
                walk.second_level.eq(Mux(table_known, 0, context.guest_mode[:2] + 2)),
                next_ppn.eq(Mux(table_known, table_ppn, Cat(top, context.guest_root_ppn[2:]))),
            ]
            m.next = "READ"
            with m.If(~is_guest_page(page, context.guest_mode, self.features)):
                m.d.sync += fail(Outcome.GUEST_PAGE_FAULT)
                m.next = "END_WALK"

    def _tags(self, walk, mapped):
        """Return assignments of page and address space to what two stages make of a page."""
        is_bare, context = walk.first.is_bare, walk.context
        return [
            mapped.vpn.eq(walk.key.page), mapped.first.eq(~is_bare), mapped.PSCID.eq(Mux(is_bare, 0, context.PSCID)), mapped.G.eq(walk.G),
            mapped.GV.eq(1), mapped.GSCID.eq(context.GSCID),
        ]

    def _combine(self, m, walk, entry, reach, next_ppn, mapped, second, outcome, inside):
        """Make one translation of two stages."""
        first, context = walk.first, walk.context
        with m.State("COMBINE"):
            second_reach = Signal(3)
            m.d.comb += second_reach.eq(Mux(walk.second_level == 0, entry.N, walk.second_level + 1))
            writable = entry.W & entry.D
            m.d.sync += [
                outcome.eq(Outcome.MAPPED),
                second.readable.eq(entry.R), second.writable.eq(writable), second.executable.eq(entry.X),
                mapped.readable.eq(first.readable & entry.R), mapped.writable.eq(first.writable & writable),
                mapped.ppn.eq(next_ppn), mapped.reach.eq(Mux(walk.reach < second_reach, walk.reach, second_reach)),
                mapped.is_fragment.eq(~first.is_bare & (walk.reach > second_reach)), *self._tags(walk, mapped),
            ]
            if self.features.has_processes:
                m.d.sync += [mapped.executable.eq(first.executable & entry.X), mapped.U.eq(first.U)]
            if self.features.Svpbmt:
                m.d.sync += mapped.PBMT.eq(Mux(walk.PBMT != 0, walk.PBMT, entry.PBMT))
            m.next = "CUT" if self.features.MSI_FLAT else "KEEP_LEAF"
        if self.features.MSI_FLAT:
            with m.State("CUT"):  # a larger page in which a virtual interrupt file lies
                bits = self.features.guest_page_bits
                outside = Cat(~inside, Const(-1, bits))[:bits]
                fixed = (walk.guest_page[:bits] ^ context.msi_pattern) & ~context.msi_mask & outside
                with m.If(context.msi_on & (mapped.reach != 0) & ~fixed.any()):
                    m.d.sync += [mapped.reach.eq(0), mapped.is_fragment.eq(mapped.first)]
                m.next = "KEEP_LEAF"

    def _translate_msi(self, m, walk, doublewords, next_ppn, number, mapped, second, is_msi, outcome, refuse):
        """MSI page tables for the guest page in ``next_ppn``. [RVIOMMU1.0 3.3.3]"""
        context, first, entry = walk.context, walk.first, spec.MsiEntry(doublewords[0])
        bits = self.features.guest_page_bits
        page, mask, weight = Signal(bits), Signal(bits), Signal(bits)
        with m.State("FIND_MSI"):
            m.d.sync += [page.eq(next_ppn), mask.eq(context.msi_mask), weight.eq(1), number.eq(0)]
            m.next = "BEGIN_SECOND"
            differs = (next_ppn ^ context.msi_pattern) & Cat(~context.msi_mask, Const(-1, 52 - bits))
            with m.If(context.msi_on & ~differs.any()):
                m.d.sync += [walk.guest_page.eq(next_ppn), walk.purpose.eq(Phase.LEAF)]
                m.next = "EXTRACT"
        with m.State("EXTRACT"):  # a bit of the mask per cycle
            m.d.sync += [page.eq(page >> 1), mask.eq(mask >> 1)]
            with m.If(mask[0]):
                m.d.sync += weight.eq(weight << 1)
                with m.If(page[0]):
                    m.d.sync += number.eq(number | weight)
            with m.If(~mask.any()):
                m.d.sync += [next_ppn.eq(context.msi_ppn | number[8:]), walk.phase.eq(Phase.MSI)]
                m.next = "READ"
        with m.State("TAKE_MSI"):
            m.d.sync += [
                is_msi.eq(1), second.readable.eq(1), second.writable.eq(1), second.executable.eq(0),
                mapped.readable.eq(first.readable), mapped.writable.eq(first.writable), mapped.ppn.eq(entry.PPN), mapped.reach.eq(0),
                mapped.is_fragment.eq(~first.is_bare & (walk.reach != 0)), *self._tags(walk, mapped),
            ]
            if self.features.has_processes:
                m.d.sync += [mapped.executable.eq(0), mapped.U.eq(first.U)]
            if self.features.Svpbmt:
                m.d.sync += mapped.PBMT.eq(walk.PBMT)
            refuse(MSI, entry.V, entry.C | (entry.M != spec.MSI_TRANSLATE) | entry.reserved_low.any() | entry.reserved_high.any())
            with m.Else():
                m.d.sync += outcome.eq(Outcome.MAPPED)
                m.next = "KEEP_LEAF"
