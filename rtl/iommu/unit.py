"""The IOMMU as one block: translation beside its programming interface."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..regs.bus import RegisterBus
from ..spec.riscv_iommu_registers import EventId
from ..tlp.layouts import Burst, BurstData, BurstDone, ConfigState
from .debug import Debug
from .features import Features
from .interface import ProgrammingInterface
from .layouts import MrifDone, MrifWrite, TranslateRequest, TranslateResponse
from .translator import Translator

COUNTERS = ("hit", "miss", "begun", "merged", "read")


class Iommu(wiring.Component):
    """Translates for the gate, is programmed over the register bus, reads and writes memory over the requester's wall port.

    Behaviour: see :class:`.translator.Translator` and :class:`.interface.ProgrammingInterface`.

    Parameters
    ----------
    width : :class:`int`
        Bits of burst data per beat.
    strict, vectors, queue_log2_max
        See :class:`.registers.Registers`.
    features : :class:`.features.Features`
        What there is beside the least.
    translator
        Keyword parameters of :class:`.translator.Translator`.

    Members
    -------
    translate_request, translate_response : ``In(stream.Signature(TranslateRequest))``, ``Out(stream.Signature(TranslateResponse))``
        For the gate; with DBG the cookie 255 is not its.
    bus : ``In(RegisterBus())``
        BAR 0 of function 0.
    config : ``In(ConfigState)``
        Of function 0.
    bursts, write_data, read_data, write_done
        Wall port of the requester: ``Out(stream.Signature(Burst))``, ``Out(stream.Signature(BurstData(width)))``,
        ``In(stream.Signature(BurstData(width)))``, ``In(stream.Signature(BurstDone))``.
    operands : ``Out(stream.Signature(BurstData(width)))``
        With AMO_HWAD or AMO_MRIF: those of AtomicOps of the wall.
    mrif_writes, mrif_done : ``In(stream.Signature(MrifWrite))``, ``Out(stream.Signature(MrifDone))``
        With MSI_MRIF: dwords written to interrupt files in memory, and their ends; one at a time. See :class:`.mrif.Mrif`.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate. The fence waits for the unit's own older walks, too, and for messages whose transfer is over, but not yet recorded.
    hit, miss, begun, merged, read : ``Out(1)``
        Pulses of the translator, for counters.
    wires : ``Out(vectors)``
        With wire interrupts: a level for each vector.
    """

    def __init__(self, *, width, strict=False, vectors=4, queue_log2_max=16, features=Features(), **translator):
        self.width, self.strict, self.vectors, self.queue_log2_max = width, strict, vectors, queue_log2_max
        self.features = features
        self._translator = Translator(features=features, **translator)
        self._interface = ProgrammingInterface(width=width, strict=strict, vectors=vectors, queue_log2_max=queue_log2_max,
                                               physical_address_bits=self._translator.physical_address_bits,
                                               features=features)  # fmt: skip
        super().__init__({
            "translate_request": In(stream.Signature(TranslateRequest)),
            "translate_response": Out(stream.Signature(TranslateResponse)),
            "bus": In(RegisterBus()),
            "config": In(ConfigState),
            "bursts": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(BurstData(width))),
            "read_data": In(stream.Signature(BurstData(width))),
            "write_done": In(stream.Signature(BurstDone)),
            **({"operands": Out(stream.Signature(BurstData(width)))} if features.has_atomics else {}),
            **({"mrif_writes": In(stream.Signature(MrifWrite)), "mrif_done": Out(stream.Signature(MrifDone))} if features.MSI_MRIF else {}),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            **{name: Out(1) for name in COUNTERS},
            **({"wires": Out(vectors)} if features.has_wires else {}),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.interface, m.submodules.translator = interface, translator = self._interface, self._translator
        asks, answers = translator.request, translator.response
        if self.features.DBG:
            m.submodules.debug = debug = Debug(features=self.features)
            wiring.connect(m, interface.debug, debug.bank)
            wiring.connect(m, debug.translate_request, asks)
            wiring.connect(m, answers, debug.translate_response)
            asks, answers = debug.request, debug.response
        for inner, name in ((asks, "translate_request"), (answers, "translate_response")):
            wiring.connect(m, inner, wiring.flipped(getattr(self, name)))
        hwad, mrif = self.features.AMO_HWAD, self.features.MSI_MRIF
        more = [*(["operands"] if self.features.has_atomics else []), *(["mrif_writes", "mrif_done"] if mrif else [])]
        for name in ("bus", "bursts", "write_data", "read_data", "write_done", "fence", *more):
            wiring.connect(m, getattr(interface, name), wiring.flipped(getattr(self, name)))

        # A fence is over when walks that are older have ended, too: of those that no transfer waits for the gate knows nothing.
        older = Signal.like(translator.in_flight)
        m.d.sync += older.eq(Mux(interface.fence.valid & interface.fence.ready, translator.in_flight, older & translator.in_flight))
        waits = older.any()
        if mrif:
            settled = Signal()
            m.d.sync += settled.eq(self.fenced.valid & ~self.fenced.ready & (settled | ~interface.mrif_busy))
            waits |= interface.mrif_busy & ~settled
        m.d.comb += [
            interface.fenced.valid.eq(self.fenced.valid & ~waits), self.fenced.ready.eq(interface.fenced.ready & ~waits),
        ]  # fmt: skip
        for ours, theirs in (("memory_read", "memory_read"), ("memory_read_data", "memory_read_data"), ("reports", "faults"),
                             ("invalidate", "invalidate"), *([("memory_update", "memory_update")] if hwad else []),
                             *([("mrif_targets", "mrif")] if mrif else [])):  # fmt: skip
            wiring.connect(m, getattr(interface, ours), getattr(translator, theirs))
        m.d.comb += [
            interface.config.eq(self.config), translator.ddtp_mode.eq(interface.ddtp_mode), translator.ddtp_ppn.eq(interface.ddtp_ppn),
            *(getattr(self, name).eq(getattr(translator, name)) for name in COUNTERS),
        ]  # fmt: skip
        if hwad:
            m.d.comb += translator.atomics.eq(self.config.atomics)
        if self.features.has_wires:
            m.d.comb += self.wires.eq(interface.wires)
        if self.features.HPM:
            asked, request = translator.request.p, interface.requests
            is_taken = translator.request.valid & translator.request.ready & ~asked.is_prefetch
            m.d.comb += [
                interface.walks.eq(translator.events),
                request.kinds[EventId.UNTRANSLATED_REQUEST].eq(is_taken), request.device_id.eq(asked.device_id),
                request.process_id_valid.eq(asked.process_id_valid), request.process_id.eq(asked.process_id),
            ]  # fmt: skip
        return m
