"""The programming interface of the IOMMU: registers, queues and interrupts around one memory port; everything but translation."""

from amaranth import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..regs.bus import RegisterBus
from ..spec.riscv_iommu_registers import Mode
from ..stream.arbiter import Arbiter
from ..tlp.layouts import Burst, BurstData, BurstDone, ConfigState
from .commands import Commands
from .counters import Counters
from .faults import Faults
from .features import Features
from .interrupts import Interrupts
from .layouts import (
    AtsMessage,
    Events,
    FaultReport,
    GroupResponse,
    Invalidate,
    InvalidationCompletion,
    MemoryRead,
    MemoryReadData,
    MemoryUpdate,
    MrifDone,
    MrifTarget,
    MrifWrite,
    PageRequest,
    request_layout,
    response_layout,
)
from .memory_port import MemoryPort
from .mrif import Mrif
from .page_requests import PageRequests
from .registers import PPN_BITS, Bank, Registers


class FenceShare(wiring.Component):
    """Lets ``count`` askers use one fence, one after the other, the first before the others.

    Latency: none from an asker to ``fence``, none from ``fenced`` to the asker.

    Members
    -------
    ask, answer : ``In(stream.Signature(0)).array(count)``, ``Out(stream.Signature(0)).array(count)``
        Of each asker.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate.

    Raises
    ------
    :exc:`ValueError`
        If ``count`` is not positive.
    """

    def __init__(self, *, count):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Askers must be at least 1, not {count!r}")
        self.count = count
        super().__init__({
            "ask": In(stream.Signature(0)).array(count),
            "answer": Out(stream.Signature(0)).array(count),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
        })

    def elaborate(self, platform):
        m = Module()
        with m.FSM():
            with m.State("CHOOSE"):
                m.d.comb += self.fence.valid.eq(Cat(ask.valid for ask in self.ask).any())
                for n in range(self.count):
                    with m.If(self.ask[n].valid) if n == 0 else m.Elif(self.ask[n].valid):
                        m.d.comb += self.ask[n].ready.eq(self.fence.ready)
                        with m.If(self.fence.ready):
                            m.next = f"AWAIT_{n}"
            for n in range(self.count):
                with m.State(f"AWAIT_{n}"):
                    m.d.comb += [self.answer[n].valid.eq(self.fenced.valid), self.fenced.ready.eq(self.answer[n].ready)]
                    with m.If(self.fenced.valid & self.fenced.ready):
                        m.next = "CHOOSE"
        return m


class ProgrammingInterface(wiring.Component):
    """What software sees of the IOMMU, beside a translator of any kind.

    Behaviour: see :class:`.registers.Registers`, :class:`.commands.Commands`, :class:`.faults.Faults`, :class:`.interrupts.Interrupts`,
    :class:`.memory_port.MemoryPort`.

    Parameters
    ----------
    width : :class:`int`
        Bits of burst data per beat.
    strict, vectors, queue_log2_max, physical_address_bits, features
        See :class:`.registers.Registers`.
    itags, timeout_cycles
        See :class:`.ats_messages.AtsMessages`.

    Members
    -------
    bus : ``In(RegisterBus())``
        BAR 0 of function 0.
    config : ``In(ConfigState)``
        Of function 0.
    bursts, write_data, read_data, write_done
        Wall port of the requester: ``Out(stream.Signature(Burst))``, ``Out(stream.Signature(BurstData(width)))``,
        ``In(stream.Signature(BurstData(width)))``, ``In(stream.Signature(BurstDone))``.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate.
    ddtp_mode, ddtp_ppn : ``Out(Mode)``, ``Out(44)``
        For the translator.
    invalidate : ``Out(stream.Signature(Invalidate))``
        For the translator.
    reports : ``In(stream.Signature(FaultReport))``
        Of the translator.
    memory_read, memory_read_data : ``In(stream.Signature(MemoryRead))``, ``Out(stream.Signature(MemoryReadData))``
        Of the translator.
    memory_update : ``In(stream.Signature(MemoryUpdate))``
        With AMO_HWAD: of the translator.
    operands : ``Out(stream.Signature(BurstData(width)))``
        With AMO_HWAD or AMO_MRIF, as in :class:`.memory_port.MemoryPort`.
    mrif_targets, mrif_writes, mrif_done, mrif_busy
        With MSI_MRIF, as ``targets``, ``writes``, ``ended`` and ``busy`` of :class:`.mrif.Mrif`.
    requests, walks : ``In(Events)``, ``In(Events)``
        With HPM: what :class:`.counters.Counters` counts.
    debug : ``Out(Bank())``
        With DBG: for :class:`.debug.Debug`.
    ats_message, invalidation_completion, page_request, group_response : streams
        With ATS, to and from devices: see :class:`.ats_messages.AtsMessages` and :class:`.page_requests.PageRequests`.
    locate, located : ``Out(stream.Signature(request_layout(features)))``, ``In(stream.Signature(response_layout(features)))``
        With ATS, for the translator: requests of page requests for their contexts, and the answers.
    wires : ``Out(vectors)``
        With wire interrupts.
    """

    def __init__(self, *, width, strict=False, vectors=4, queue_log2_max=16, physical_address_bits=56, features=Features(), itags=8,
                 timeout_cycles=1 << 33):  # fmt: skip
        self.width, self.features = width, features
        self._commands = Commands(features=features, itags=itags, timeout_cycles=timeout_cycles)
        there = {"interrupts": features.has_messages, "pages": features.ATS, "mrif": features.MSI_MRIF}
        self._writers = ["commands", "faults", *(name for name, is_there in there.items() if is_there)]
        # Readers: translator, commands, Mrif.
        self._port = MemoryPort(width=width, readers=2 + features.MSI_MRIF, writers=len(self._writers),
                                updaters=(*([0] if features.AMO_HWAD else []), *([2] if features.AMO_MRIF else [])))  # fmt: skip
        self._mrif = Mrif(atomics=features.AMO_MRIF, physical_address_bits=physical_address_bits) if features.MSI_MRIF else None
        self._registers = Registers(strict=strict, vectors=vectors, queue_log2_max=queue_log2_max,
                                    physical_address_bits=physical_address_bits, features=features)  # fmt: skip
        super().__init__({
            "bus": In(RegisterBus()),
            "config": In(ConfigState),
            "bursts": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(BurstData(width))),
            "read_data": In(stream.Signature(BurstData(width))),
            "write_done": In(stream.Signature(BurstDone)),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            "ddtp_mode": Out(Mode, init=Mode.OFF if strict else Mode.BARE),
            "ddtp_ppn": Out(PPN_BITS),
            "invalidate": Out(stream.Signature(Invalidate)),
            "reports": In(stream.Signature(FaultReport)),
            "memory_read": In(stream.Signature(MemoryRead)),
            "memory_read_data": Out(stream.Signature(MemoryReadData)),
            **({"memory_update": In(stream.Signature(MemoryUpdate))} if features.AMO_HWAD else {}),
            **({"operands": Out(stream.Signature(BurstData(width)))} if features.has_atomics else {}),
            **({"mrif_targets": In(stream.Signature(MrifTarget)), "mrif_writes": In(stream.Signature(MrifWrite)),
                "mrif_done": Out(stream.Signature(MrifDone)), "mrif_busy": Out(1)} if features.MSI_MRIF else {}),
            **({"requests": In(Events), "walks": In(Events)} if features.HPM else {}),
            **({"debug": Out(Bank())} if features.DBG else {}),
            **({
                "ats_message": Out(stream.Signature(AtsMessage)),
                "invalidation_completion": In(stream.Signature(InvalidationCompletion)),
                "page_request": In(stream.Signature(PageRequest)),
                "group_response": Out(stream.Signature(GroupResponse)),
                "locate": Out(stream.Signature(request_layout(features))),
                "located": In(stream.Signature(response_layout(features))),
            } if features.ATS else {}),
            **({"wires": Out(vectors)} if features.has_wires else {}),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.registers, m.submodules.port = registers, port = self._registers, self._port
        m.submodules.commands, m.submodules.faults = commands, faults = self._commands, Faults()
        m.submodules.fences = fences = FenceShare(count=2)

        outer = wiring.flipped
        for inner, member in ((registers.bus, self.bus), (port.bursts, self.bursts), (port.burst_write_data, self.write_data),
                              (port.burst_read_data, self.read_data), (port.burst_done, self.write_done), (fences.fence, self.fence),
                              (fences.fenced, self.fenced), (commands.invalidate, self.invalidate), (port.read[0], self.memory_read),
                              (port.read_data[0], self.memory_read_data)):  # fmt: skip
            wiring.connect(m, inner, outer(member))
        if self.features.AMO_HWAD:
            wiring.connect(m, outer(self.memory_update), port.update[0])
        if self.features.has_atomics:
            wiring.connect(m, port.operands, outer(self.operands))
        for one, other in ((registers.commands, commands.control), (registers.faults, faults.control),
                           (port.read[1], commands.read), (port.read_data[1], commands.read_data),
                           (port.write[0], commands.write), (port.write_done[0], commands.write_done),
                           (port.write[1], faults.write), (port.write_done[1], faults.write_done),
                           (commands.fence, fences.ask[0]), (commands.fenced, fences.answer[0]),
                           (registers.drain, fences.ask[1]), (registers.drained, fences.answer[1])):  # fmt: skip
            wiring.connect(m, one, other)
        m.d.comb += [
            self.ddtp_mode.eq(registers.ddtp_mode), self.ddtp_ppn.eq(registers.ddtp_ppn), commands.ddtp_mode.eq(registers.ddtp_mode),
        ]  # fmt: skip
        reports = self._record_messages(m, port) if self.features.MSI_MRIF else outer(self.reports)
        if self.features.has_messages:
            self._send_messages(m, registers, port, reports, faults)
        else:
            wiring.connect(m, reports, faults.reports)
        if self.features.has_wires:
            m.d.comb += [
                self.wires.eq(registers.wires), commands.WSI.eq(registers.WSI), registers.fence_done.eq(commands.fence_done),
            ]  # fmt: skip
        if self.features.ATS:
            self._queue_pages(m, registers, port, commands)
        if self.features.DBG:
            wiring.connect(m, registers.debug, outer(self.debug))
        if self.features.HPM:
            m.submodules.counters = counters = Counters(count=self.features.counters)
            wiring.connect(m, registers.counters, counters.bank)
            m.d.comb += [
                registers.overflow.eq(counters.overflow), counters.requests.eq(self.requests), counters.walks.eq(self.walks),
            ]  # fmt: skip
        return m

    def _queue_pages(self, m, registers, port, commands):
        """Messages to and from devices."""
        m.submodules.page_requests = pages = PageRequests(features=self.features)
        outer, ours = wiring.flipped, self._writers.index("pages")
        for one, other in ((registers.pages, pages.control), (pages.write, port.write[ours]), (port.write_done[ours], pages.write_done),
                           (outer(self.page_request), pages.page_request), (pages.group_response, outer(self.group_response)),
                           (pages.request, outer(self.locate)), (outer(self.located), pages.response),
                           (commands.ats_message, outer(self.ats_message)),
                           (outer(self.invalidation_completion), commands.invalidation_completion)):  # fmt: skip
            wiring.connect(m, one, other)
        m.d.comb += [pages.has_failed.eq(registers.pages_failed), registers.timed_out.eq(commands.timed_out)]

    def _send_messages(self, m, registers, port, others, faults):
        """Interrupts by messages, whose faults are recorded too."""
        m.submodules.interrupts = interrupts = Interrupts()
        m.submodules.reports = reports = Arbiter(FaultReport, 2)
        for one, other in ((port.write[2], interrupts.write), (port.write_done[2], interrupts.write_done),
                           (others, reports.i[0]), (interrupts.reports, reports.i[1]),
                           (reports.o, faults.reports)):  # fmt: skip
            wiring.connect(m, one, other)
        m.d.comb += [
            interrupts.interrupt.eq(registers.interrupt), interrupts.masked.eq(registers.msi_masked), interrupts.config.eq(self.config),
            registers.msi_pending.eq(interrupts.pending), registers.msi_sending.eq(interrupts.sending),
            registers.msi_word_index.eq(interrupts.word_index),
            interrupts.word.eq(registers.msi_word), interrupts.word_stays.eq(registers.msi_word_stays),
        ]  # fmt: skip

    def _record_messages(self, m, port):
        """Record messages of devices in memory; return their faults and those of the translator."""
        m.submodules.mrif = mrif = self._mrif
        m.submodules.mrif_reports = reports = Arbiter(FaultReport, 2)
        ours = self._writers.index("mrif")
        for one, other in ((port.read[2], mrif.read), (port.read_data[2], mrif.read_data), (port.write[ours], mrif.write),
                           (port.write_done[ours], mrif.write_done), (wiring.flipped(self.mrif_targets), mrif.targets),
                           (wiring.flipped(self.mrif_writes), mrif.writes), (mrif.ended, wiring.flipped(self.mrif_done)),
                           (wiring.flipped(self.reports), reports.i[0]), (mrif.reports, reports.i[1]),
                           *([(port.update[-1], mrif.update)] if self.features.AMO_MRIF else [])):  # fmt: skip
            wiring.connect(m, one, other)
        m.d.comb += self.mrif_busy.eq(mrif.busy)
        return reports.o
