"""Registers of the IOMMU: what software sees, and the levels and pulses that join it to the queues."""

from functools import reduce
from operator import or_

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..regs.bus import PATIENCE_BITS, RegisterBus
from ..spec.riscv_iommu_registers import (
    IGS_BOTH,
    IGS_WSI,
    MSI_ENTRIES,
    MSI_TABLE,
    OFFSET,
    PENDING_ARRAY,
    PPN_LOW,
    VERSION,
    Capabilities,
    Mode,
    QueueCsr,
)
from ..stream.ram import Ram
from .features import Features

INDEX_BITS = 16  # of a queue index: LOG2SZ is at most this
PPN_BITS = 44


class QueueControl(wiring.Signature):
    """What a queue and its registers tell each other (seen from the registers). [RVIOMMU1.0 6.6 to 6.16]

    base : page number of the queue; mask : entries - 1; head, tail : indices; enable : software wants it on; stopped : an error bit
    is 1. From the queue: on : level; step : pulse, its own index moves on by one; memory_fault, refused : pulses that set cqmf and
    cmd_ill, fqmf and fqof, or pqmf and pqof.
    """

    def __init__(self):
        super().__init__({
            "base": Out(PPN_BITS), "mask": Out(INDEX_BITS), "head": Out(INDEX_BITS), "tail": Out(INDEX_BITS),
            "enable": Out(1), "stopped": Out(1), "on": In(1), "step": In(1), "memory_fault": In(1), "refused": In(1),
        })  # fmt: skip

    def __repr__(self):
        return "QueueControl()"


class Bank(wiring.Signature):
    """Registers that another component keeps, by 64-bit words (seen from :class:`Registers`).

    at : number of a word; access : pulse, it is accessed; write, data : bytes to be written in that cycle, and their values. From the
    other: word : what the word accessed last read as then, 0 where it has none.
    """

    def __init__(self):
        super().__init__({"at": Out(9), "access": Out(1), "write": Out(8), "data": Out(64), "word": In(64)})

    def __repr__(self):
        return "Bank()"


class _Queue:
    """State of one queue's registers: base, csr, and two indices of which ``own`` ("head" or "tail") is the hardware's."""

    def __init__(self, name, own, control, has_fence_bit=False, has_timeout=False):
        self.ppn, self.log2 = Signal(PPN_BITS, name=f"{name}_ppn"), Signal(4, name=f"{name}_log2")  # entries: 2 ** (log2 + 1)
        self.index = {side: Signal(INDEX_BITS, name=f"{name}_{side}") for side in ("head", "tail")}
        self.enable, self.interrupt_enable = Signal(name=f"{name}_enable"), Signal(name=f"{name}_interrupt_enable")
        self.memory_fault, self.refused = Signal(name=f"{name}_memory_fault"), Signal(name=f"{name}_refused")
        self.has_fence_bit, self.fence_w_ip = has_fence_bit, Signal(name=f"{name}_fence_w_ip") if has_fence_bit else Const(0, 1)
        self.has_timeout, self.timed_out = has_timeout, Signal(name=f"{name}_timed_out") if has_timeout else Const(0, 1)
        self.stopped = self.memory_fault | self.refused
        if has_timeout:
            self.stopped |= self.timed_out
        self.own, self.other, self.control = own, "tail" if own == "head" else "head", control
        self.is_commands = own == "head"
        self.busy = self.enable ^ control.on
        self.mask = Cat(Const(1, 1), *(self.log2 >= n for n in range(1, INDEX_BITS)))
        self.event = self.interrupt_enable & (self.stopped | self.fence_w_ip)

    def base_word(self):
        return Cat(self.log2, Const(0, PPN_LOW - 4), self.ppn)

    def csr_word(self):
        csr = Signal(QueueCsr)
        error = csr.cmd_ill if self.is_commands else csr.stopped
        return csr, [
            *([csr.stopped.eq(self.timed_out)] if self.has_timeout else []),
            csr.enable.eq(self.enable), csr.interrupt_enable.eq(self.interrupt_enable), csr.memory_fault.eq(self.memory_fault),
            error.eq(self.refused), csr.fence_w_ip.eq(self.fence_w_ip), csr.on.eq(self.control.on), csr.busy.eq(self.busy),
        ]  # fmt: skip


class Registers(wiring.Component):
    """The 4 KiB of registers, the table of MSIs, and the pending bits. [RVIOMMU1.0 6]

    One access at a time. A write takes effect at once with all its bytes; bytes that are not enabled keep
    their value. Where the specification says UNSPECIFIED: writes to a queue base while the queue is on or wanted, to fctl outside Off or
    while a queue is on or wanted, to ddtp and the csr of a queue while they are busy are ignored; ddtp keeps its value on an unsupported
    mode, from one nLVL mode to another or to Bare, and its high half outside Off and Bare; what is not a register reads 0. Registers reset
    to 0 and M to 1; the rest of the MSI table is 0 at power-up and survives a reset.

    A write of ddtp that is taken is effective for translations in the next cycle; ddtp.busy stays 1 until an item sent at ``drain`` was
    answered at ``drained``.

    Latency: 2 cycles from request to answer; a read of the MSI table or the pending bits waits for the end of a message under way,
    at most 1,023 cycles.

    Parameters
    ----------
    strict : :class:`bool`
        ddtp resets to Off, else to Bare.
    vectors : :class:`int`
        Vectors that icvec can name: 1, 2, 4, 8 or 16.
    queue_log2_max : :class:`int`
        Largest LOG2SZ of a queue: 1 to 16.
    physical_address_bits : :class:`int`
        32 to 56.
    features : :class:`.features.Features`
        What capabilities says beside the least.

    Members
    -------
    bus : ``In(RegisterBus())``
        Accesses; function and BAR are not looked at, nor bits of the offset above 11.
    ddtp_mode, ddtp_ppn : ``Out(Mode)``, ``Out(44)``
        The translator's mode and the root of the directory.
    drain, drained : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        See above.
    commands, faults : ``Out(QueueControl())``
        The two queues.
    pages, pages_failed, timed_out : ``Out(QueueControl())``, ``Out(1)``, ``In(1)``
        With ATS: the page-request queue, pqmf; a pulse sets cmd_to.
    interrupt : ``Out(16)``
        Pulses: a bit of ipsr with this vector became 1, and fctl.WSI is 0. It and what begins with ``msi`` are there with messages.
    msi_masked : ``Out(16)``
        M of each vector.
    msi_pending, msi_sending : ``In(16)``, ``In(1)``
        What the pending bit array shows; a message is under way.
    msi_word_index, msi_word, msi_word_stays : ``In(5)``, ``Out(64)``, ``Out(1)``
        Reads a 64-bit word of the MSI table, one cycle later; M reads 0 here. ``msi_word_stays``: software has the table, nothing is read.
    WSI, wires, fence_done : ``Out(1)``, ``Out(vectors)``, ``In(1)``
        With wires: fctl.WSI; the wires, a cycle behind ipsr and icvec; a pulse sets cqcsr.fence_w_ip.
    counters, overflow : ``Out(Bank())``, ``In(1)``
        With HPM: the performance counters; a pulse sets ipsr.pmip.
    debug : ``Out(Bank())``
        With DBG: the registers of debug translation.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, strict=False, vectors=4, queue_log2_max=16, physical_address_bits=56, features=Features()):
        if vectors not in (1, 2, 4, 8, 16):
            raise ValueError(f"Vectors must be 1, 2, 4, 8 or 16, not {vectors!r}")
        if queue_log2_max not in range(1, INDEX_BITS + 1):
            raise ValueError(f"Largest LOG2SZ must be 1 to {INDEX_BITS}, not {queue_log2_max!r}")
        if physical_address_bits not in range(32, 57):
            raise ValueError(f"Physical address bits must be 32 to 56, not {physical_address_bits!r}")
        self.strict, self.vectors, self.queue_log2_max, self.physical_address_bits = strict, vectors, queue_log2_max, physical_address_bits
        self.features = features
        super().__init__({
            "bus": In(RegisterBus()),
            "ddtp_mode": Out(Mode, init=Mode.OFF if strict else Mode.BARE),
            "ddtp_ppn": Out(PPN_BITS),
            "drain": Out(stream.Signature(0)),
            "drained": In(stream.Signature(0)),
            "commands": Out(QueueControl()),
            "faults": Out(QueueControl()),
            **({"pages": Out(QueueControl()), "pages_failed": Out(1), "timed_out": In(1)} if features.ATS else {}),
            **({
                "interrupt": Out(MSI_ENTRIES),
                "msi_masked": Out(MSI_ENTRIES, init=(1 << MSI_ENTRIES) - 1),
                "msi_pending": In(MSI_ENTRIES),
                "msi_sending": In(1),
                "msi_word_index": In(range(2 * MSI_ENTRIES)),
                "msi_word": Out(64),
                "msi_word_stays": Out(1),
            } if features.has_messages else {}),
            **({"WSI": Out(1, init=features.IGS == IGS_WSI), "wires": Out(vectors), "fence_done": In(1)} if features.has_wires else {}),
            **({"counters": Out(Bank()), "overflow": In(1)} if features.HPM else {}),
            **({"debug": Out(Bank())} if features.DBG else {}),
        })

    def elaborate(self, platform):
        m = Module()
        features = self.features
        cq = _Queue("cq", "head", self.commands, features.has_wires, features.ATS)
        fq = _Queue("fq", "tail", self.faults)
        queues = {"cq": cq, "fq": fq, **({"pq": _Queue("pq", "tail", self.pages)} if features.ATS else {})}
        has_vector = [True, True, features.HPM, features.ATS][: 4 if features.ATS else 3 if features.HPM else 2]
        vectors = [Signal(4, name=name) if has else Const(0, 4) for name, has in zip(("civ", "fiv", "pmiv", "piv"), has_vector)]
        banks = [getattr(self, name) for name, has in (("counters", features.HPM), ("debug", features.DBG)) if has]
        draining = Signal()

        # What each word reads as.
        request, at = Signal.like(self.bus.request.p), Signal(9)
        now = Signal(64)
        capabilities = Capabilities.const({
            "version": VERSION, "PAS": self.physical_address_bits, **features.capabilities})  # fmt: skip
        (cqcsr, cq_parts), (fqcsr, fq_parts) = cq.csr_word(), fq.csr_word()
        ipsr = Signal(len(vectors))  # pip, pmip, fip, cip
        ddtp_busy = self.drain.valid | draining
        m.d.comb += [*cq_parts, *fq_parts, at.eq(request.offset[3:12])]
        if features.ATS:
            pq = queues["pq"]
            pqcsr, pq_parts = pq.csr_word()
            m.d.comb += [*pq_parts, self.pages_failed.eq(pq.memory_fault)]
        words = {
            "capabilities": capabilities,
            "ddtp": Cat(self.ddtp_mode, ddtp_busy, Const(0, PPN_LOW - 5), self.ddtp_ppn),
            **{word: value for name, queue in queues.items() for word, value in (
                (f"{name}b", queue.base_word()), (f"{name}h", Cat(queue.index["head"], Const(0, 16), queue.index["tail"])))},
            "cqcsr": Cat(cqcsr, fqcsr), "icvec": Cat(vectors), **({"fctl": Cat(Const(0, 1), self.WSI)} if features.has_wires else {}),
        }  # fmt: skip
        with m.Switch(at):
            for name, value in words.items():
                with m.Case(OFFSET[name] // 8):
                    m.d.comb += now.eq(value)
            with m.Case(OFFSET["ipsr"] // 8):
                m.d.comb += now[32:].eq(ipsr)
                if features.ATS:
                    m.d.comb += now[:32].eq(pqcsr)
            if features.has_messages:
                with m.Case(PENDING_ARRAY // 8):
                    m.d.comb += now.eq(self.msi_pending)

        # What a write makes of it.
        enabled, new, ones = Signal(64), Signal(64), Signal(64)
        low, high = Signal(), Signal()  # halves that are written
        write = Signal()
        m.d.comb += [
            enabled.eq(Cat(bit.replicate(8) for bit in request.byte_enable)),
            new.eq((now & ~enabled) | (request.data & enabled)),
            ones.eq(request.data & enabled),
            low.eq(write & request.byte_enable[:4].any()),
            high.eq(write & request.byte_enable[4:].any()),
        ]
        for name, queue in queues.items():
            self._keep_queue(m, queue, f"{name}b", f"{name}csr", f"{name}h", at, low, high, new, ones)
        self._keep_ddtp(m, (at == OFFSET["ddtp"] // 8) & ~ddtp_busy, low, high, new, draining)
        with m.If(low & (at == OFFSET["icvec"] // 8)):
            m.d.sync += [vectors[n].eq(new.word_select(n, 4) & (self.vectors - 1)) for n, has in enumerate(has_vector) if has]
        if features.IGS == IGS_BOTH:
            is_used = cq.enable | self.commands.on | fq.enable | self.faults.on
            if features.ATS:
                is_used |= pq.enable | self.pages.on
            may_change = (self.ddtp_mode == Mode.OFF) & ~is_used
            with m.If(low & (at == OFFSET["fctl"] // 8) & may_change):
                m.d.sync += self.WSI.eq(new[1])

        # ipsr: a bit cleared by software is set again at once while its condition holds.
        kept, raised = Signal.like(ipsr), Signal.like(ipsr)
        causes = [cq.event, fq.event | (fq.interrupt_enable & self.faults.step)]
        if features.HPM or features.ATS:
            causes.append(self.overflow if features.HPM else Const(0, 1))
        if features.ATS:
            causes.append(pq.event | (pq.interrupt_enable & self.pages.step))
        causes = Cat(causes)
        m.d.comb += kept.eq(Mux(high & (at == OFFSET["ipsr"] // 8), ipsr & ~ones[32:], ipsr))
        m.d.comb += raised.eq(causes & ~kept)
        m.d.sync += ipsr.eq(kept | causes)
        if features.has_messages:
            rises = reduce(or_, (bit << vector for bit, vector in zip(raised, vectors)))
            m.d.comb += self.interrupt.eq(Mux(self.WSI, 0, rises) if features.has_wires else rises)
        if features.has_wires:
            for n in range(self.vectors):
                m.d.sync += self.wires[n].eq(self.WSI & Cat(bit & (vector == n) for bit, vector in zip(ipsr, vectors)).any())

        answer, response, access = Signal(64), self.bus.response, Signal()
        told, patience = Signal(), Signal(PATIENCE_BITS)
        m.d.comb += write.eq(access & request.is_write)
        shown = answer
        if features.has_messages:
            shown |= self._keep_messages(m, at, access, write, request)
        for bank in banks:
            m.d.comb += [
                bank.at.eq(at), bank.access.eq(access), bank.write.eq(Mux(write, request.byte_enable, 0)), bank.data.eq(request.data),
            ]
            shown |= bank.word
        m.d.comb += response.p.data.eq(shown)
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += self.bus.request.ready.eq(1)
                m.d.sync += request.eq(self.bus.request.p)
                with m.If(self.bus.request.valid):
                    m.next = "EXECUTE"
            with m.State("EXECUTE"):
                m.d.comb += access.eq(1)
                m.d.sync += answer.eq(now)
                m.next = "ANSWER"
                m.d.sync += [told.eq(~self._shows_messages(at) | request.is_write), patience.eq(0)]
            with m.State("ANSWER"):
                # Who reads behind a mask sees the end of the message that was decided in front of it, but waits for a while only.
                m.d.sync += [told.eq(response.valid), patience.eq(patience + 1)]
                m.d.comb += response.valid.eq(told | patience.all() | (~self.msi_sending if features.has_messages else 0))
                with m.If(response.valid & response.ready):
                    m.next = "TAKE"
        return m

    def _shows_messages(self, at):
        """Return whether the word ``at`` is of the MSI table or the pending bits."""
        return (at >= MSI_TABLE // 8) & (at <= PENDING_ARRAY // 8) if self.features.has_messages else Const(0, 1)

    def _keep_messages(self, m, at, access, write, request):
        """Keep the MSI table, address words and data words in turn, M apart; return what the word accessed last read as then."""
        m.submodules.messages = messages = Ram(shape=64, depth=2 * MSI_ENTRIES, init=[])
        messages.attrs["ram_style"] = "block"
        store, show, send = messages.write_port(granularity=8), messages.read_port(), messages.read_port()
        is_table, is_shown, shows_mask = Signal(), Signal(), Signal()
        mask = self.msi_masked.bit_select(at[1:5], 1)
        m.d.comb += [
            is_table.eq((at >= MSI_TABLE // 8) & (at < MSI_TABLE // 8 + 2 * MSI_ENTRIES)), store.addr.eq(at[:5]), show.addr.eq(at[:5]),
            store.data.eq(Mux(at[0], request.data & 0xFFFF_FFFF, request.data & ((1 << 56) - 4))),
            show.en.eq(access & ~write), send.addr.eq(self.msi_word_index), send.en.eq(~access), self.msi_word.eq(send.data),
            self.msi_word_stays.eq(access),
        ]  # fmt: skip
        with m.If(access):
            m.d.sync += [is_shown.eq(is_table & ~write), shows_mask.eq(at[0] & mask)]
        with m.If(write & is_table):
            m.d.comb += store.en.eq(request.byte_enable)
            with m.If(at[0] & request.byte_enable[4]):
                m.d.sync += mask.eq(request.data[32])
        return Mux(is_shown, show.data | (shows_mask << 32), 0)

    def _keep_ddtp(self, m, selected, low, high, new, draining):
        """Take modes and roots as the specification lets them follow each other; have each change drained."""
        reachable = Signal()  # directory modes are entered from Off and Bare only
        mode = new[:4]
        ppn = new[PPN_LOW : PPN_LOW + PPN_BITS] & ((1 << self.physical_address_bits - 12) - 1)
        split = 32 - PPN_LOW
        m.d.comb += reachable.eq((self.ddtp_mode == Mode.OFF) | (self.ddtp_mode == Mode.BARE))
        with m.If(self.drain.ready):
            m.d.sync += self.drain.valid.eq(0)
        with m.If(self.drain.valid & self.drain.ready):
            m.d.sync += draining.eq(1)
        m.d.comb += self.drained.ready.eq(draining)
        with m.If(self.drained.valid & draining):
            m.d.sync += draining.eq(0)
        with m.If(selected & high & reachable):
            m.d.sync += self.ddtp_ppn[split:].eq(ppn[split:])
        with m.If(selected & low & ((mode == Mode.OFF) | (reachable & (mode <= Mode.LVL3)))):
            m.d.sync += [self.ddtp_mode.eq(mode), self.ddtp_ppn[:split].eq(ppn[:split]), self.drain.valid.eq(1)]

    def _keep_queue(self, m, queue, base, csr, indices, at, low, high, new, ones):
        """Take writes to base, csr and index of ``queue``; move its own index."""
        control = queue.control
        m.d.comb += [
            control.base.eq(queue.ppn), control.mask.eq(queue.mask), control.head.eq(queue.index["head"]),
            control.tail.eq(queue.index["tail"]), control.enable.eq(queue.enable), control.stopped.eq(queue.stopped),
        ]  # fmt: skip
        own, other = queue.index[queue.own], queue.index[queue.other]
        with m.If(control.step):
            m.d.sync += own.eq((own + 1) & queue.mask)
        written, value = (high, new[32:]) if queue.own == "head" else (low, new[:32])
        with m.If(written & (at == OFFSET[indices] // 8)):
            m.d.sync += other.eq(value & queue.mask)
        with m.If((low | high) & (at == OFFSET[base] // 8) & ~queue.enable & ~control.on):
            ppn = new[PPN_LOW : PPN_LOW + PPN_BITS] & ((1 << self.physical_address_bits - 12) - 1)
            log2, size_mask = Signal(5, name=f"{base}_size"), Signal(INDEX_BITS, name=f"{base}_size_mask")
            m.d.comb += [
                log2.eq(Mux(new[:5] < self.queue_log2_max, new[:5], self.queue_log2_max - 1)),
                size_mask.eq(Cat(Const(1, 1), *(log2 >= n for n in range(1, INDEX_BITS)))),
            ]
            m.d.sync += [queue.ppn.eq(ppn), queue.log2.eq(log2), own.eq(own & size_mask), other.eq(other & size_mask)]
        half, seen, clear = (high, new[32:], ones[32:]) if OFFSET[csr] % 8 else (low, new[:32], ones[:32])
        with m.If(half & (at == OFFSET[csr] // 8) & ~queue.busy):
            seen, clear = QueueCsr(seen), QueueCsr(clear)
            error = clear.cmd_ill if queue.is_commands else clear.stopped
            m.d.sync += [
                queue.enable.eq(seen.enable), queue.interrupt_enable.eq(seen.interrupt_enable),
                queue.memory_fault.eq(queue.memory_fault & ~clear.memory_fault), queue.refused.eq(queue.refused & ~error),
            ]  # fmt: skip
            with m.If(seen.enable & ~queue.enable):
                m.d.sync += [queue.memory_fault.eq(0), queue.refused.eq(0), own.eq(0)]
            if queue.has_fence_bit:
                m.d.sync += queue.fence_w_ip.eq(queue.fence_w_ip & ~clear.fence_w_ip & ~(seen.enable & ~queue.enable))
            if queue.has_timeout:
                m.d.sync += queue.timed_out.eq(queue.timed_out & ~clear.stopped & ~(seen.enable & ~queue.enable))
        if queue.has_fence_bit:
            with m.If(self.fence_done):
                m.d.sync += queue.fence_w_ip.eq(1)
        if queue.has_timeout:
            with m.If(self.timed_out):
                m.d.sync += queue.timed_out.eq(1)
        with m.If(control.memory_fault):
            m.d.sync += queue.memory_fault.eq(1)
        with m.If(control.refused):
            m.d.sync += queue.refused.eq(1)
