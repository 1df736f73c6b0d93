"""The one gate: bursts with IOVA in, bursts with physical address or a refusal out, and the count of what is in flight."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..stream.ram import Ram
from ..stream.round_robin import round_robin
from ..stream.skid_buffer import SkidBuffer
from ..tlp.layouts import DIVERTED, AtomicKind, Burst, BurstRetired, BurstStatus, ConfigState, Hint, burst_layout
from .layouts import DwordRequest, TranslateRequest, TranslateResponse, is_mrif

COOKIES = 256  # of a translation request
UNTRANSLATED_LOG2 = 63  # size of a translation in an answer that says: the page is its own
MAX_FUNCTIONS = 8  # of one device number [PCIe5 2.2.6.2]


def _verdict_layout(host_ats, late_count):
    """Return the layout of what the translator said about a burst; with ``late_count`` also in which epoch."""
    return data.StructLayout({
        "fault": 1, "readable": 1, "writable": 1, **({"translated": 1} if host_ats else {}), "page": 52,
        **({"epoch": 1} if late_count else {}),
    })  # fmt: skip


def _waiting_layout(host_ats):
    """Return the layout of a burst that waits: all that its port, or the gate, does not say of it again."""
    said = ["client", "is_wall", *([] if host_ats else ["verdict", "pasid_valid", "pasid"])]
    return data.StructLayout({name: field.shape for name, field in data.Layout.cast(Burst) if name not in said})


class Gate(wiring.Component):
    """Translates every burst of every client, or lets it pass where its function bypasses, or refuses it.

    One translation per burst. Bursts of one client leave in their order; a client whose burst waits for its translation holds up no
    other one, as long as the translator takes requests; bypassed bursts do not need the translator at all. A burst that is refused leaves
    with verdict FAULT, its address unchanged. Nothing leaves with verdict OK without a permission for its direction that was
    given after the burst entered; an AtomicOp needs both and is translated as a write. ``client``, ``is_wall``, ``verdict`` and
    ``epoch`` of what enters are ignored: what leaves from port p has client p + 1, and a PASID with ``host_ats`` only.

    With ``diverts`` a write of an aligned dword to an interrupt file in memory leaves with verdict DIVERTED, any other burst to one with
    FAULT. One is under way at a time; until it is over its client waits, so that what the client does later is seen later.

    With ``host_ats`` the translator is a cache of the host's translations: what leaves is a :data:`..tlp.layouts.AddressedBurst`,
    translated unless it was bypassed or the answer says that the page is its own. One with a PASID is refused at once if PASID Enable of
    its function is 0 or the PASID is wider than ``pasid_bits``; it waits while that is 1 and not yet ``pasid_usable``. What leaves
    translated has none, and interrupts never have. [PCIe5 6.20, 10.2]

    A hint becomes a prefetch in a cycle in which no burst enters and the translator has something to ``spare`` for it; until then it
    waits, and those behind it. It vanishes if its function bypasses.

    A burst counts for its function from the cycle in which it enters until it is retired. An item at ``fence`` is answered at
    ``fenced`` when every burst that entered before it was accepted is retired; bursts that enter later do not delay it.
    A function with 2 ** ``count_bits`` - 1 bursts in flight waits.

    With ``late_count`` a burst counts from its verdict on, one that is not translated from when it leaves; which of them entered does
    not matter to a fence, and all functions share one count. Answers that come by the cycle behind that in which a fence was accepted are
    older than it. So that no verdict waits behind a burst without one, the translator then answers the bursts of a client in their order.

    Latency: 2 cycles from ``bursts`` valid to ``o`` valid, besides those of the translator from request to response; a fence with nothing
    in flight at most 4, with ``late_count`` 5. Throughput: 1 burst per cycle; from one client too, with ``depth`` 8, while its
    translations take 2 cycles.

    Parameters
    ----------
    clients : :class:`int`
        Ports: at least 1; at most 256 / ``depth``.
    functions : :class:`int`
        1 to 8; ``function`` of every burst is below.
    depth : :class:`int`
        Bursts of one client inside the gate: a power of two, 2 to 64.
    has_iommu : :class:`bool`
        False: every function bypasses, nothing is ever asked of a translator.
    diverts : :class:`bool`
        The translator may answer that a page is an interrupt file in memory.
    count_bits : :class:`int`
        Width of the counts: 2 to 16.
    host_ats : :class:`bool`
        True: what leaves goes to a host that translates.
    messages : tuple of :class:`int`
        Ports whose bursts are interrupts: they are never translated here.
    late_count : :class:`bool`
        With ``host_ats``: answers may wait for software, fences do not.
    pasid_bits : :class:`int`
        With ``host_ats``: width of PASIDs, 1 to 20; 0: there are none.
    doorbells : :class:`bool`
        Requests say which bursts write an aligned dword: see :class:`.layouts.DwordRequest`.

    Members
    -------
    bursts : ``In(stream.Signature(Burst)).array(clients)``
        Bursts with IOVA; wall bursts do not come here.
    o : ``Out(stream.Signature(burst_layout(host_ats)))``
        Bursts with physical address, verdict and epoch, for the requester.
    hints : ``In(stream.Signature(Hint))``
        Pages that functions will ask for.
    translate_request, translate_response : ``Out(stream.Signature(TranslateRequest))``, ``In(stream.Signature(TranslateResponse))``
        The translator; answers are always taken.
    spare : ``In(1)``
        The translator can take a prefetch; counts the one that it has accepted from the cycle behind that on.
    bypass : ``In(functions)``
        1: bursts of the function that enter now carry physical addresses.
    pasid_enable, pasid_usable : ``In(functions)``
        With ``pasid_bits``: PASID Enable of each function; the same, and no burst of before its last fall is under way.
    config : ``In(ConfigState).array(functions)``
        Bus and device of each function: with its number they are the device_id [RVIOMMU1.0 2.3].
    retired_reads, retired_writes : ``In(stream.Signature(BurstRetired))``
        Each burst that left, once; always taken.
    diverted, diverted_over : ``Out(8)``, ``In(1)``
        With ``diverts``: cookie of the translation of the burst that left as DIVERTED; a pulse when it is over.
    fence, fenced : ``In(stream.Signature(0))``, ``Out(stream.Signature(0))``
        Ask for a drain; its end. The next one is accepted after the answer was taken.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, clients, functions, depth=8, has_iommu=True, diverts=False, count_bits=12, host_ats=False, messages=(),
                 late_count=False, pasid_bits=0, doorbells=False):  # fmt: skip
        if depth not in (2, 4, 8, 16, 32, 64):
            raise ValueError(f"Depth must be a power of two between 2 and 64, not {depth!r}")
        if clients not in range(1, COOKIES // depth + 1):
            raise ValueError(f"Clients must be 1 to {COOKIES // depth}, not {clients!r}")
        if functions not in range(1, MAX_FUNCTIONS + 1):
            raise ValueError(f"Functions must be 1 to {MAX_FUNCTIONS}, not {functions!r}")
        if count_bits not in range(2, 17):
            raise ValueError(f"Bits of a count must be 2 to 16, not {count_bits!r}")
        if late_count and 1 << count_bits <= 2 * clients * depth:
            raise ValueError(f"Late counts must have room for all bursts inside the gate twice, not {count_bits!r} bits")
        self.clients, self.functions, self.depth = clients, functions, depth
        self.has_iommu, self.diverts, self.count_bits = has_iommu, diverts, count_bits
        self.host_ats, self.messages, self.late_count, self.pasid_bits = host_ats, tuple(messages), late_count, pasid_bits
        self.doorbells = doorbells
        super().__init__({
            "bursts": In(stream.Signature(Burst)).array(clients),
            "o": Out(stream.Signature(burst_layout(host_ats))),
            "hints": In(stream.Signature(Hint)),
            "translate_request": Out(stream.Signature(DwordRequest if doorbells else TranslateRequest)),
            "translate_response": In(stream.Signature(TranslateResponse)),
            "spare": In(1),
            "bypass": In(functions),
            **({"pasid_enable": In(functions), "pasid_usable": In(functions)} if pasid_bits else {}),
            "config": In(ConfigState).array(functions),
            "retired_reads": In(stream.Signature(BurstRetired)),
            "retired_writes": In(stream.Signature(BurstRetired)),
            **({"diverted": Out(8), "diverted_over": In(1)} if diverts else {}),
            "fence": In(stream.Signature(0)),
            "fenced": Out(stream.Signature(0)),
        })

    def elaborate(self, platform):
        m = Module()
        ports, slot_bits = self.clients, (self.depth - 1).bit_length()
        places = ports * self.depth
        m.submodules.waiting = waiting = Ram(shape=_waiting_layout(self.host_ats), depth=places, init=[])
        m.submodules.verdicts = verdicts = Ram(shape=_verdict_layout(self.host_ats, self.late_count), depth=places, init=[])
        for ram in (waiting, verdicts):
            ram.attrs["ram_style"] = "block"
        put, get = ([Signal(slot_bits + 1, name=f"{name}_{n}") for n in range(ports)] for name in ("put", "get"))
        decided = [Signal(self.depth, name=f"decided_{n}") for n in range(ports)]  # verdict is there, a bit per slot
        bypassed = [Signal(self.depth, name=f"bypassed_{n}") for n in range(ports)]
        epoch = Signal()
        if self.diverts:
            to_file = [Signal(self.depth, name=f"to_file_{n}") for n in range(ports)]  # the verdict: a bit per slot
            diverting, is_to_file = Signal(), Signal()  # a burst to a file left and is not over; it is the one at ``o``
            held = [diverting & (self.diverted[slot_bits:] == n) for n in range(ports)]

        # Enter: one client per cycle, round robin. Who may does not follow from what the translator takes in this cycle.
        m.submodules.requests = requests = SkidBuffer(self.translate_request.payload.shape())
        wiring.connect(m, requests.o, wiring.flipped(self.translate_request))
        request = requests.i.p
        enters, wanted = Signal(ports), Signal(ports)
        passing = Signal(ports)
        entering, entry, entry_slot = Signal(), Signal(Burst), Signal(slot_bits)
        entry_client, entry_passes = Signal(range(max(ports, 2))), Signal()
        room = Signal(self.functions, init=-1)
        for n in range(ports):
            burst = self.bursts[n]
            function = burst.p.function[: (self.functions - 1).bit_length()]
            wants = burst.valid & ((put[n] - get[n])[: slot_bits + 1] != self.depth) & room.bit_select(function, 1)
            if self.diverts:  # nobody asks with the cookie of a burst that is under way
                wants &= ~held[n]
            if self.pasid_bits and n not in self.messages:
                wants &= ~burst.p.pasid_valid | self._is_refused(n, burst.p) | self.pasid_usable.bit_select(function, 1)
            m.d.comb += [
                passing[n].eq(self.bypass.bit_select(function, 1) if self.has_iommu and n not in self.messages else 1),
                wanted[n].eq(wants & (passing[n] | requests.i.ready)),
                burst.ready.eq(enters[n]),
            ]  # fmt: skip
            if self.host_ats:
                with m.If(self._is_refused(n, burst.p)):
                    m.d.comb += passing[n].eq(1)
            with m.If(enters[n]):
                m.d.comb += [
                    entry.eq(burst.p), entry_client.eq(n), entry_slot.eq(put[n]), entry_passes.eq(passing[n]),
                    entry.epoch.eq(epoch), entry.verdict.eq(BurstStatus.OK),
                ]  # fmt: skip
                if self.host_ats and n in self.messages:
                    m.d.comb += entry.pasid_valid.eq(0)
                elif self.host_ats:
                    m.d.comb += entry.verdict.eq(Mux(self._is_refused(n, burst.p), BurstStatus.FAULT, BurstStatus.OK))
                m.d.sync += put[n].eq(put[n] + 1)
        round_robin(m, wanted, enters, "enter")
        m.d.comb += entering.eq(enters.any())

        # What entered is stored, and may leave from the next cycle on, beside its translation request.
        storing, stored_at, stored_passes = Signal(), Signal(range(max(places, 2))), Signal()
        m.d.sync += [storing.eq(entering), stored_at.eq(Cat(entry_slot, entry_client)), stored_passes.eq(entry_passes)]
        write = waiting.write_port()
        kept = [name for name, _ in write.data.shape()]
        m.d.comb += [
            write.en.eq(entering), write.addr.eq(Cat(entry_slot, entry_client)), *(write.data[name].eq(entry[name]) for name in kept),
        ]  # fmt: skip
        hint, is_hinted = Signal(Hint), Signal()
        asking = Mux(entering, entry.function, hint.function)
        device = Array(Cat(Const(n, 3), c.device, c.bus) for n, c in enumerate(self.config))[asking]
        m.d.comb += self.hints.ready.eq(~is_hinted)
        with m.If(self.hints.valid & ~is_hinted):
            function = self.hints.p.function[: (self.functions - 1).bit_length()]
            m.d.sync += [hint.eq(self.hints.p), is_hinted.eq(~self.bypass.bit_select(function, 1) if self.has_iommu else 0)]
        asks = entering & ~entry_passes
        has_place = requests.i.ready & (~requests.o.valid | (requests.o.ready & ~requests.o.p.is_prefetch))
        prefetches = ~entering & is_hinted & self.spare & has_place
        m.d.comb += [
            requests.i.valid.eq(asks | prefetches), request.device_id.eq(device), request.is_prefetch.eq(~entering),
            request.is_write.eq(hint.is_write), request.page.eq(hint.page),
        ]
        with m.If(prefetches):
            m.d.sync += is_hinted.eq(0)
        with m.If(entering):
            m.d.comb += [
                request.process_id_valid.eq(entry.pasid_valid),
                request.process_id.eq(Mux(entry.pasid_valid, entry.pasid, 0)),
                request.is_write.eq(entry.is_write | (entry.atomic != AtomicKind.NONE)),
                request.page.eq(entry.address[12:]),
                request.offset.eq(entry.address[:12]),
                request.cookie.eq(Cat(entry_slot, entry_client)),
            ]
            if self.doorbells:
                m.d.comb += request.is_dword.eq(entry.is_write & (entry.length_bytes == 4) & (entry.address[:2] == 0))

        # Verdicts come in any order.
        response = self.translate_response
        judged = verdicts.write_port()
        m.d.comb += [
            response.ready.eq(1),
            judged.en.eq(response.valid),
            judged.addr.eq(response.p.cookie),
            judged.data.fault.eq(response.p.fault),
            judged.data.readable.eq(response.p.readable),
            judged.data.writable.eq(response.p.writable),
            judged.data.page.eq(response.p.page),
        ]
        if self.host_ats:
            m.d.comb += judged.data.translated.eq(response.p.size_log2 != UNTRANSLATED_LOG2)
        if self.late_count:
            m.d.comb += judged.data.epoch.eq(epoch)
            out_epoch, passers = Signal(), Signal(ports)  # of a burst that passes untranslated; the client whose burst does so now

        # Leave: a client whose oldest burst has its verdict, round robin.
        burst_out, verdict_out = waiting.read_port(), verdicts.read_port(transparent_for=(judged,))
        leavers, chosen, leaves = Signal(ports), Signal(ports), Signal(ports)  # who is chosen leaves once ``o`` is free
        leave_at, free, out_passes, out_client = Signal(range(max(places, 2))), Signal(), Signal(), Signal(range(ports + 1))
        m.d.comb += [
            free.eq(~self.o.valid | self.o.ready),
            burst_out.en.eq(free), verdict_out.en.eq(free), burst_out.addr.eq(leave_at), verdict_out.addr.eq(leave_at),
        ]  # fmt: skip
        for n in range(ports):
            slot = get[n][:slot_bits]
            # The verdict on the oldest burst counts in the cycle in which it comes.
            oldest = Cat(slot, Const(n, range(max(ports, 2))))
            passes, answered = Signal(name=f"passes_{n}"), Signal(name=f"answered_{n}")
            m.d.comb += [
                passes.eq(storing & stored_passes & (stored_at == oldest)),
                answered.eq(response.valid & (response.p.cookie == oldest)),
            ]
            may_leave = decided[n].bit_select(slot, 1) | passes | answered
            if self.diverts:
                goes_to_file = to_file[n].bit_select(slot, 1)
                may_leave = (decided[n].bit_select(slot, 1) | passes | (answered & ~is_mrif(response.p))) & ~held[n] & ~(
                    goes_to_file & diverting)
            m.d.comb += leavers[n].eq(may_leave)
            for at in range(self.depth):
                place = n * self.depth + at
                passes_now = storing & stored_passes & (stored_at == place)
                with m.If(passes_now | (response.valid & (response.p.cookie == place))):
                    m.d.sync += [decided[n][at].eq(1), bypassed[n][at].eq(passes_now)]
                    if self.diverts:
                        m.d.sync += to_file[n][at].eq(~passes_now & is_mrif(response.p))
                with m.If(leaves[n] & (slot == at)):
                    m.d.sync += decided[n][at].eq(0)
                    if self.diverts:
                        m.d.sync += to_file[n][at].eq(0)
            with m.If(chosen[n]):
                m.d.comb += leave_at.eq(oldest)
            with m.If(leaves[n]):
                goes_by = passes | (bypassed[n].bit_select(slot, 1) & ~answered)
                m.d.sync += [get[n].eq(get[n] + 1), out_passes.eq(goes_by), out_client.eq(n + 1)]
                if self.late_count:
                    m.d.comb += passers[n].eq(goes_by)
                    m.d.sync += out_epoch.eq(epoch)
                if self.diverts:
                    m.d.sync += is_to_file.eq(goes_to_file)
                    with m.If(goes_to_file):
                        m.d.sync += [diverting.eq(1), self.diverted.eq(oldest)]
        round_robin(m, leavers, chosen, "leave", free)
        m.d.comb += leaves.eq(Mux(free, chosen, 0))
        with m.If(free):
            m.d.sync += self.o.valid.eq(chosen.any())
        verdict, allowed, reads, writes = verdict_out.data, Signal(), Signal(), Signal()
        m.d.comb += [
            reads.eq(~burst_out.data.is_write),
            writes.eq(burst_out.data.is_write | (burst_out.data.atomic != AtomicKind.NONE)),
            allowed.eq(out_passes | (~verdict.fault & (verdict.writable | ~writes) & (verdict.readable | ~reads))),
        ]
        m.d.comb += [self.o.p.client.eq(out_client), *(self.o.p[name].eq(burst_out.data[name]) for name in kept)]
        with m.If(~allowed):
            m.d.comb += self.o.p.verdict.eq(BurstStatus.FAULT)
        with m.Elif(~out_passes):
            m.d.comb += self.o.p.address.eq(Cat(burst_out.data.address[:12], verdict.page))
            if self.host_ats:
                with m.If(verdict.translated):
                    m.d.comb += [self.o.p.at.eq(pcie.AT_TRANSLATED), self.o.p.pasid_valid.eq(0)]
        if self.diverts:
            is_dword = burst_out.data.is_write & (burst_out.data.length_bytes == 4) & (burst_out.data.address[:2] == 0)
            with m.If(is_to_file & is_dword):
                m.d.comb += self.o.p.verdict.eq(DIVERTED)
            with m.If(self.diverted_over | (is_to_file & ~is_dword & self.o.valid & self.o.ready)):
                m.d.sync += diverting.eq(0)

        if self.late_count:
            m.d.comb += self.o.p.epoch.eq(Mux(out_passes, out_epoch, verdict.epoch))
            self._count_late(m, epoch, response.valid, passers.any(), places, room)
        else:
            self._count(m, epoch, entering, entry, room)
        return m

    def _is_refused(self, port, burst):
        """Return whether a ``burst`` of ``port`` has a PASID that it must not have; that of an interrupt is none."""
        if port in self.messages:
            return Const(0)
        if not self.pasid_bits:
            return burst.pasid_valid
        is_enabled = self.pasid_enable.bit_select(burst.function[: (self.functions - 1).bit_length()], 1)
        return burst.pasid_valid & ~(is_enabled & (burst.pasid >> self.pasid_bits == 0))

    def _count_late(self, m, epoch, judges, passes, places, room):
        """Count verdicts that came and bursts that pass, until they are retired, per epoch; serve fences."""
        m.d.comb += [self.retired_reads.ready.eq(1), self.retired_writes.ready.eq(1)]
        counts = Array(Signal(self.count_bits, name=f"count_{e}") for e in range(2))
        none = Array(Signal(name=f"none_{e}") for e in range(2))
        for e in range(2):
            over = [port.valid & (port.p.epoch == e) for port in (self.retired_reads, self.retired_writes)]
            begun = Mux(epoch == e, judges + passes, 0)
            m.d.sync += [counts[e].eq(counts[e] + begun - (over[0] + over[1])), none[e].eq(counts[e] == 0)]
        m.d.sync += room.eq((counts[epoch] < (1 << self.count_bits) - places - 1).replicate(self.functions))
        self._serve_fences(m, epoch, none)

    def _count(self, m, epoch, entering, entry, room):
        """Count bursts in flight per function and epoch; serve fences."""
        full = (1 << self.count_bits) - 1
        m.d.comb += [self.retired_reads.ready.eq(1), self.retired_writes.ready.eq(1)]
        empty, all_empty = [Signal(self.functions, name=f"empty_{e}") for e in range(2)], Array(Signal(name=f"none_{e}") for e in range(2))
        for f in range(self.functions):
            counts = Array(Signal(self.count_bits, name=f"count_{f}_{e}") for e in range(2))
            begins = Signal(name=f"begins_{f}")
            m.d.comb += begins.eq(entering & (entry.function == f))
            # Known before it is asked for; a cycle late where a burst is retired, or an epoch begins, which then has none.
            m.d.sync += room[f].eq(Mux(begins, counts[epoch] < full - 1, counts[epoch] != full))
            for e in range(2):
                begun, reads, writes = (Signal(name=f"{name}_{f}_{e}") for name in ("begun", "read_over", "write_over"))
                m.d.comb += begun.eq(begins & (epoch == e))
                for over, source in ((reads, self.retired_reads), (writes, self.retired_writes)):
                    m.d.comb += over.eq(source.valid & (source.p.function == f) & (source.p.epoch == e))
                m.d.sync += counts[e].eq(counts[e] + begun - (reads + writes))
                m.d.comb += empty[e][f].eq(counts[e] == 0)
        m.d.sync += [all_empty[e].eq(empty[e].all()) for e in range(2)]
        self._serve_fences(m, epoch, all_empty)

    def _serve_fences(self, m, epoch, all_empty):
        """Answer each fence when the epoch that it ends is empty."""
        with m.FSM():
            with m.State("TAKE_FENCE"):
                m.d.comb += self.fence.ready.eq(1)
                with m.If(self.fence.valid):
                    if not self.late_count:
                        m.d.sync += epoch.eq(~epoch)
                    m.next = "FLUSH" if self.late_count else "SETTLE"
            if self.late_count:
                with m.State("FLUSH"):  # answers that were on their way are older than the fence
                    m.d.sync += epoch.eq(~epoch)
                    m.next = "SETTLE"
            with m.State("SETTLE"):  # what entered in the cycle of the fence is in the counts now, and in their sum after this
                m.next = "DRAIN"
            with m.State("DRAIN"):
                with m.If(all_empty[~epoch]):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += self.fenced.valid.eq(1)
                with m.If(self.fenced.ready):
                    m.next = "TAKE_FENCE"
