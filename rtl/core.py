"""What every card has: transaction layer, configuration space, error reporting, registers, and the wall in front of all DMA."""

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .ats.unit import HostAts
from .config import IOMMU_VECTORS
from .function.collector import ErrorCollector
from .function.config_space import ConfigSpace
from .function.decoder import AddressDecoder
from .function.description import AtsCapability, PasidCapability, PcieCapability, virtual_functions_of
from .function.errors import Errors
from .function.updates import PageFlags, UpdateMerger
from .iommu.gate import Gate
from .iommu.layouts import DwordRequest, TranslateResponse
from .iommu.unit import Iommu
from .regs.bus import RegisterBus
from .regs.router import Merger, Range, Router
from .spec import pcie
from .stream.arbiter import Arbiter
from .tlp.completer import Completer
from .tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, ConfigState, Hint, Malformed, TlpBeat, connect_beats
from .tlp.receiver import Receiver
from .tlp.requester import ReadClient, Requester
from .tlp.transmitter import Transmitter

__all__ = ["Activity", "Core"]

MAX_REQUEST_BYTES = 1024  # payload of a request that is held whole, also if the functions' Max_Payload_Size is less
WALL_BUFFER_BYTES, WALL_READS = 1024, 16
ANSWER_SETTLES = 3  # cycles from the answer to a configuration write until what it forbids is no longer offered anew


class Activity(data.Struct):
    """What happens in a cycle: levels and pulses for counters."""

    tags_in_flight: 11
    iotlb_hit: 1
    iotlb_miss: 1
    walk: 1
    walk_read: 1
    ring_read: 1
    used_write: 1


class Core(wiring.Component):
    """A card without what makes its functions worth having: registers and DMA clients attach to its ports.

    Client n of its ports is client n + 1 at the requester, 0 being the wall. Whatever attaches begins anew while ``discarding`` is 1
    (a ``ResetInserter`` does that), and follows "Stop" of rtl/README.md for ``reset`` and ``stop``.

    Parameters
    ----------
    width : :class:`int`
        Bits of the data path.
    functions : tuple of :class:`.function.description.FunctionDescription`
        Physical ones, then virtual ones; with ``iommu`` the first is the IOMMU's.
    clients : tuple of :class:`.tlp.requester.ReadClient`
        Who does DMA.
    registers : tuple of tuples of :class:`.regs.router.Range`
        What each of ``buses`` serves.
    iommu : :class:`.config.IommuConfig` or None
        None: all DMA is physical, or the host's to translate, or that of whoever is behind ``translate_request``.
    iommu_bar : :class:`int` or None
        None: function 0 is the IOMMU's. Else the BAR of function 0 that has its registers; what stops or resets that function does not
        stop the IOMMU.
    translates : :class:`bool`
        Instead of ``iommu``: whoever is behind ``translate_request`` does.
    host_ats : :class:`.config.HostAtsConfig` or None
        Instead of ``iommu``: a cache of the host's translations for functions with ATS Enable; they have the ATS capability. With
        ``pasid_bits`` physical ones have a PASID capability of so many bits, and all say that prefixes may come; bursts may then have a
        PASID. One that has a PASID, and must not, ends in FAULT.
    strict, tags, wall_tags, completion_timeout_cycles
        As for :class:`.config.EndpointConfig`.

    Members
    -------
    received, to_send, link_reset, discarding, max_payload, malformed
        Towards the link adapter, as those of :class:`.endpoint.Endpoint`.
    buses : ``Out(RegisterBus())``, one per item of ``registers``
        To the owners of registers.
    bursts, write_data, write_done, read_data
        One per client: ``In(stream.Signature(Burst))``, ``In(stream.Signature(BurstData(width)))``,
        ``Out(stream.Signature(BurstDone))``, ``Out(stream.Signature(BurstData(width)))``.
    passed : ``Out(clients)``
        Pulse: a write of the client has left the gate, and is refused no more.
    hints : ``In(stream.Signature(Hint))``
        Pages that functions will soon ask for; see :class:`.iommu.gate.Gate`.
    state : ``Out(ConfigState)``, one per function
        What software configured.
    reset : ``Out(functions)``
        The function is being reset, by whatever cause; until ``busy`` is 0.
    busy : ``In(functions)``
        What belongs to the function is not reset yet; at least from the cycle behind the rise of ``reset`` on.
    is_d3hot : ``Out(functions)``
        Power state.
    interrupt : ``In(functions)``
        For Interrupt Status.
    bypass : ``In(functions)``
        1: DMA of the function is physical, or the host's to translate.
    stop, stopped : ``In(functions)``, ``Out(functions)``
        Of the requester.
    translate_request, translate_response, spare, fence, fenced
        With ``translates``: those of a :class:`.iommu.gate.Gate` with ``doorbells``.
    activity : ``Out(Activity)``
        For counters; nothing about rings, nor about a translator outside.
    """

    def __init__(self, *, width, functions, clients, registers, iommu, strict, tags, wall_tags, completion_timeout_cycles,
                 host_ats=None, translates=False, iommu_bar=None):  # fmt: skip
        self.width, self.functions, self.clients, self.registers = width, tuple(functions), tuple(clients), tuple(registers)
        self.iommu, self.iommu_bar, self.strict, self.tags, self.wall_tags = iommu, iommu_bar, strict, tags, wall_tags
        self.completion_timeout_cycles, self.host_ats, self.translates = completion_timeout_cycles, host_ats, translates
        if iommu is not None and iommu.DBG and len(self.clients) > 31:  # one cookie of the gate's is the debug request's
            raise ValueError(f"Clients of a card with debug translation must be at most 31, not {len(self.clients)!r}")
        self._pasid_bits = 0 if host_ats is None else host_ats.pasid_bits
        for function in self.functions if self._pasid_bits else ():
            pasid, pcie_capability = function.capability(PasidCapability), function.capability(PcieCapability)
            if not pcie_capability.has_prefixes or (not function.is_virtual and getattr(pasid, "bits", 0) != self._pasid_bits):
                raise ValueError(f"Functions of a card with PASIDs must have a capability of {self._pasid_bits} bits for them, and take "
                                 f"prefixes, not {pasid!r} and {pcie_capability!r}")  # fmt: skip
        tlps, beats = stream.Signature(TlpBeat(width, self._pasid_bits > 0)), stream.Signature(BurstData(width))
        count = len(self.functions)
        ports = {"bursts": In(stream.Signature(Burst)), "write_data": In(beats), "write_done": Out(stream.Signature(BurstDone)),
                 "read_data": Out(beats)}  # fmt: skip
        super().__init__({
            "received": In(tlps), "to_send": Out(tlps), "link_reset": In(1), "discarding": Out(1), "max_payload": Out(3),
            "malformed": In(Malformed),
            "buses": Out(RegisterBus()).array(len(self.registers)),
            **{name: port.array(len(self.clients)) for name, port in ports.items()}, "passed": Out(len(self.clients)),
            "hints": In(stream.Signature(Hint)),
            "state": Out(ConfigState).array(count),
            "reset": Out(count), "busy": In(count), "is_d3hot": Out(count), "interrupt": In(count), "bypass": In(count),
            "stop": In(count), "stopped": Out(count),
            **({
                "translate_request": Out(stream.Signature(DwordRequest)), "translate_response": In(stream.Signature(TranslateResponse)),
                "spare": In(1), "fence": In(stream.Signature(0)), "fenced": Out(stream.Signature(0)),
            } if translates else {}),
            "activity": Out(Activity),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        width, descriptions, count = self.width, self.functions, len(self.functions)

        # Functions as the host sees them. They and what reports errors live through a reset of the link; all else begins anew.
        m.submodules.config_space = space = ConfigSpace(functions=descriptions)
        m.submodules.errors = errors = Errors(functions=descriptions)
        in_reset, is_resetting = Cat(space.reset[n] for n in range(count)), Signal()
        m.d.comb += space.link_reset.eq(self.link_reset)
        with m.If(self.link_reset):
            m.d.sync += [self.discarding.eq(1), is_resetting.eq(0)]
        with m.Elif(in_reset.all()):
            m.d.sync += is_resetting.eq(self.discarding)
        with m.Elif(is_resetting & ~in_reset.any()):
            m.d.sync += [self.discarding.eq(0), is_resetting.eq(0)]

        def add(name, component):
            m.submodules[name] = ResetInserter({"sync": self.discarding})(component)
            return component

        decoder = add("decoder", AddressDecoder(functions=descriptions))

        # Transaction layer.
        codes = [description.capability(PcieCapability).mps_code for description in descriptions]
        longest = max(MAX_REQUEST_BYTES, 128 << max(codes))  # a request is held until it is whole
        has_ats, has_pasid = self.host_ats is not None, self._pasid_bits > 0
        receiver = add("receiver", Receiver(width=width, depth=max(64, longest * 8 // width), has_pasid=has_pasid))
        transmitter = add("transmitter", Transmitter(width=width, has_pasid=has_pasid))
        has_pages = has_ats and self.host_ats.page_requests > 0
        completer = add("completer", Completer(width=width, functions=count, host_ats=has_ats, has_pri=has_pages, has_pasid=has_pasid))
        wall = ReadClient("wall", False, WALL_BUFFER_BYTES, WALL_READS, atomics=self.iommu is not None and self.iommu.has_atomics)
        has_files = self.iommu is not None and self.iommu.MSI_MRIF  # interrupt files in memory
        readers = (wall, *self.clients)
        # The wall's requests are those of function 0, or of one behind all others that has function 0's configuration but no stop.
        shares = self.iommu_bar is not None
        requester = add("requester", Requester(
            width=width, clients=readers, functions=count + shares, tags=self.tags, wall_tags=self.wall_tags,
            completion_timeout_cycles=self.completion_timeout_cycles, diverts=has_files, host_ats=has_ats, has_pasid=has_pasid))
        for source, sink in (
            (wiring.flipped(self.received), receiver.i), (transmitter.o, wiring.flipped(self.to_send)),
            (receiver.requests, completer.requests), (receiver.completions, requester.completions),
            (requester.posted, transmitter.posted), (requester.non_posted, transmitter.non_posted),
            *(() if has_pasid else ((completer.completions, transmitter.completions),)),
            (completer.decode_requests, decoder.requests), (decoder.responses, completer.decode_responses),
        ):
            wiring.connect(m, source, sink)
        if has_pasid:
            connect_beats(m, completer.completions, transmitter.completions)
        for n in range(count):
            m.d.comb += [
                completer.state[n].eq(space.state[n]),
                decoder.state[n].eq(space.state[n]),
                requester.config[n].eq(space.state[n]),
                space.pending[n].eq(requester.pending[n]),
            ]
        for name in ("bars", "virtual_bars"):
            m.d.comb += [inner.eq(outer) for inner, outer in zip(getattr(decoder, name), getattr(space, name))]
        m.d.comb += [
            self.reset.eq(in_reset),
            self.is_d3hot.eq(Cat(settings.is_d3hot for settings in space.settings)),
            requester.stop.eq(self.stop),
            self.stopped.eq(requester.stopped),
        ]
        for n in range(count):
            m.d.comb += [
                self.state[n].eq(space.state[n]),
                space.busy[n].eq(self.busy[n] & ~self.discarding),
                space.interrupt[n].eq(self.interrupt[n]),
            ]
        self._isolate(m, completer.config_requests, space.requests, self._behind(m, space.responses, requester.posted),
                      completer.config_responses)

        # Payloads: function 0 speaks for all of an ARI device, in which another may be set to more. [PCIe5 7.5.3.4]
        supported = min(codes)
        most = Signal(3)
        for n in range(1, count):
            with m.If(space.state[n].mps_code > space.state[0].mps_code):
                m.d.comb += requester.config[n].mps_code.eq(space.state[0].mps_code)
        m.d.comb += most.eq(0)
        for code in range(1, supported + 1):
            with m.If(Cat(state.mps_code >= code for state in space.state).any()):
                m.d.comb += most.eq(code)
        m.d.sync += self.max_payload.eq(most)

        # Errors.
        collector = add("collector", ErrorCollector(functions=count))
        if has_pages:
            m.submodules.updates, m.submodules.page_flags = updates, flags = UpdateMerger(), PageFlags(registers={
                n: f.map(n, count).place("pri", "control", "enable").word for n, f in enumerate(descriptions) if not f.is_virtual})
            wiring.connect(m, flags.updates, updates.initiators[1])
            wiring.connect(m, errors.updates, updates.initiators[0])
            wiring.connect(m, updates.bus, space.updates)
        else:
            wiring.connect(m, errors.updates, space.updates)
        wiring.connect(m, collector.reports, errors.reports)
        beat, message = receiver.completions, transmitter.messages
        function = requester.events.function
        event_function = Mux(function == count, 0, function) if shares else function
        if has_ats:
            tellers = add("tellers", Arbiter(TlpBeat(width, has_pasid), 3 if has_pages else 2))
            wiring.connect(m, tellers.o, transmitter.messages)
            message = tellers.i[0]
        m.d.comb += [
            collector.malformed.eq(self.malformed),
            collector.completer.eq(completer.events),
            collector.tags.eq(requester.events), collector.tags.function.eq(event_function),
            collector.completions.first.eq(beat.valid & beat.ready & beat.payload.first),
            collector.completions.spoilt.eq(receiver.spoilt & beat.ready),
            collector.completions.header.eq(beat.payload.header),
            message.valid.eq(errors.messages.valid),
            errors.messages.ready.eq(message.ready | self.discarding),
            message.payload.header.fmt.eq(1 << pcie.FMT_4DW),
            message.payload.header.type.eq(pcie.TYPE_MESSAGE | pcie.ROUTED_TO_ROOT),
            message.payload.header.requester_id.eq(errors.messages.payload.requester_id),
            message.payload.header.message_code.eq(errors.messages.payload.code),
            message.payload.first.eq(1),
            message.payload.last.eq(1),
        ]
        virtual = virtual_functions_of(descriptions)
        for n in range(count):
            m.d.comb += [collector.state[n].eq(space.state[n]), errors.state[n].eq(space.state[n]), errors.present[n].eq(1)]
            if n in virtual:
                owner, place = virtual[n]
                m.d.comb += errors.present[n].eq(space.settings[owner].vf_enable & (space.settings[owner].vf_count > place))
        m.d.comb += collector.present.eq(errors.present)

        # Registers.
        own = () if self.iommu is None else ((Range(0, self.iommu_bar or 0, 0, 4096),),)
        merger = add("merger", Merger(count=2))
        router = add("router", Router(targets=(*own, *self.registers)))
        wiring.connect(m, completer.registers, merger.initiators[0])
        window = merger.initiators[1]
        self._isolate(m, space.registers.request, window.request, window.response, space.registers.response)
        wiring.connect(m, merger.bus, router.bus)
        for ours, theirs in zip(router.targets[len(own) :], self.buses):
            wiring.connect(m, ours, wiring.flipped(theirs))

        # The wall. The gate is told no bus and device: the function number alone is the device_id.
        messages = [n for n, client in enumerate(self.clients) if client.messages] if has_ats else []
        has_iommu = self.iommu is not None or has_ats or self.translates
        gate = add("gate", Gate(clients=len(self.clients), functions=count, has_iommu=has_iommu, diverts=has_files, host_ats=has_ats,
                                messages=messages, late_count=has_pages, pasid_bits=self._pasid_bits,
                                doorbells=self.translates))  # fmt: skip
        if self.translates:
            for name in ("translate_request", "translate_response", "fence", "fenced"):
                wiring.connect(m, getattr(gate, name), wiring.flipped(getattr(self, name)))
            m.d.comb += gate.spare.eq(self.spare)
        m.d.comb += gate.bypass.eq(self.bypass)
        for n in range(len(self.clients)):
            for ours, theirs in ((gate.bursts[n], self.bursts[n]), (requester.write_data[n + 1], self.write_data[n]),
                                 (requester.write_done[n + 1], self.write_done[n]), (requester.read_data[n + 1], self.read_data[n])):
                wiring.connect(m, ours, wiring.flipped(theirs))
        for source, sink in ((wiring.flipped(self.hints), gate.hints), (gate.o, requester.gate),
                             (requester.retired_reads, gate.retired_reads), (requester.retired_writes, gate.retired_writes)):
            wiring.connect(m, source, sink)
        out, leaves = gate.o.p, Signal()  # what leaves the gate as a write that may be carried out
        m.d.comb += leaves.eq(gate.o.valid & gate.o.ready & out.is_write & (out.verdict == BurstStatus.OK))
        m.d.sync += self.passed.eq(Cat(leaves & (out.client == n + 1) for n in range(len(self.clients))))
        if self.iommu is not None:
            iommu = add("iommu", Iommu(
                width=width, strict=self.strict, vectors=IOMMU_VECTORS, entries=self.iommu.entries, ways=self.iommu.ways,
                superpage_entries=self.iommu.superpage_entries, second_entries=self.iommu.second_entries, walks=self.iommu.walks,
                features=self.iommu))
            for source, sink in (
                (gate.translate_request, iommu.translate_request), (iommu.translate_response, gate.translate_response),
                (iommu.fence, gate.fence), (gate.fenced, iommu.fenced), (router.targets[0], iommu.bus),
                (iommu.bursts, requester.wall), (iommu.write_data, requester.write_data[0]),
                (requester.read_data[0], iommu.read_data), (requester.write_done[0], iommu.write_done),
            ):
                wiring.connect(m, source, sink)
            if shares:
                m.d.comb += [requester.wall.p.function.eq(count), requester.config[count].eq(space.state[0])]
            if self.iommu.has_atomics:
                wiring.connect(m, iommu.operands, requester.wall_operands)
            if has_files:
                m.d.comb += [
                    iommu.mrif_writes.valid.eq(requester.diverted.valid), requester.diverted.ready.eq(iommu.mrif_writes.ready),
                    iommu.mrif_writes.p.cookie.eq(gate.diverted), iommu.mrif_writes.p.data.eq(requester.diverted.payload),
                    requester.diverted_end.valid.eq(iommu.mrif_done.valid), iommu.mrif_done.ready.eq(requester.diverted_end.ready),
                    requester.diverted_end.payload.eq(iommu.mrif_done.p.status), gate.diverted_over.eq(requester.diverted_over),
                ]  # fmt: skip
            m.d.comb += [
                iommu.config.eq(space.state[0]),
                gate.spare.eq(iommu.spare),
                self.activity.iotlb_hit.eq(iommu.hit),
                self.activity.iotlb_miss.eq(iommu.miss),
                self.activity.walk.eq(iommu.begun),
                self.activity.walk_read.eq(iommu.read),
            ]

        if has_ats:
            pages = {
                "page_requests": self.host_ats.page_requests, "page_patience_cycles": self.host_ats.page_patience_cycles,
                "client_cookies": gate.depth, "owners": [virtual.get(n, (n, 0))[0] for n in range(count)],
            } if has_pages else {}  # fmt: skip
            ats = add("ats", HostAts(
                width=width, functions=count, depth=sum(f.capability(AtsCapability).queue_depth for f in descriptions if not f.is_virtual),
                entries=self.host_ats.entries, ways=self.host_ats.ways, requests=self.host_ats.requests,
                waiting=gate.clients * gate.depth, has_pasid=has_pasid, **pages))
            for source, sink in (
                (gate.translate_request, ats.translate_request), (ats.translate_response, gate.translate_response),
                (ats.fence, gate.fence), (gate.fenced, ats.fenced), (ats.bursts, requester.wall),
                (requester.read_data[0], ats.read_data), (completer.invalidations, ats.invalidations),
            ):
                wiring.connect(m, source, sink)
            connect_beats(m, ats.messages, tellers.i[1])
            m.d.comb += [
                ats.enable.eq(Cat(settings.ats_enable for settings in space.settings)), requester.ats.eq(ats.usable),
                gate.bypass.eq(self.bypass | ~ats.usable), gate.spare.eq(ats.spare),
                completer.present.eq(errors.present),
                *(ats.config[n].eq(space.state[n]) for n in range(count)),
                self.activity.iotlb_hit.eq(ats.hit), self.activity.iotlb_miss.eq(ats.miss), self.activity.walk.eq(ats.sent),
            ]  # fmt: skip

        if has_pasid:
            enabled = Cat(settings.pasid_enable for settings in space.settings)
            m.d.comb += [
                ats.pasid_enable.eq(enabled), gate.pasid_enable.eq(enabled), completer.pasid_enable.eq(enabled),
                gate.pasid_usable.eq(ats.pasid_usable), requester.pasid.eq(ats.pasid_usable),
            ]  # fmt: skip

        if has_pages:
            wiring.connect(m, completer.page_responses, ats.page_responses)
            wiring.connect(m, ats.page_messages, tellers.i[2])
            m.d.comb += [
                ats.page_enable.eq(Cat(settings.pri_enable for settings in space.settings)),
                ats.restart.eq(Cat(settings.pri_reset for settings in space.settings)),
                ats.permitted.eq(Cat(state.bus_master & ~state.in_reset for state in space.state) & ~self.stop),
                *(ats.allocation[n].eq(settings.pri_allocation) for n, settings in enumerate(space.settings)),
                *(space.pri_stopped[n].eq(ats.stopped[n]) for n in range(count)),
                flags.failures.eq(ats.failures), flags.surprises.eq(ats.surprises), flags.in_reset.eq(in_reset),
            ]

        m.d.comb += self.activity.tags_in_flight.eq(requester.tags_in_flight)
        return m

    def _behind(self, m, answers, posted):
        """Return ``answers`` such that none is passed on in front of a posted TLP that was offered when it came.

        So no write is sent behind the answer to the one that ended a function's right to send. [PCIe5 2.4.1, 7.5.1.1.3]
        """
        held = stream.Signature(answers.payload.shape()).create()
        age, is_behind = Signal(range(ANSWER_SETTLES + 1)), Signal()
        ends = posted.valid & posted.ready & posted.payload.last
        with m.If(age == ANSWER_SETTLES - 1):
            m.d.sync += is_behind.eq(posted.valid & ~ends)
        with m.Elif(ends | self.discarding):
            m.d.sync += is_behind.eq(0)
        with m.If(~answers.valid | answers.ready):
            m.d.sync += age.eq(0)
        with m.Elif(age != ANSWER_SETTLES):
            m.d.sync += age.eq(age + 1)
        is_due = (age == ANSWER_SETTLES) & ~is_behind
        m.d.comb += [
            held.payload.eq(answers.payload),
            held.valid.eq(answers.valid & is_due),
            answers.ready.eq((held.ready & is_due) | self.discarding),
        ]
        return held

    def _isolate(self, m, asks, asked, answers, answered):
        """Join what outlives a reset of the link to what does not, ``asks`` to ``asked`` and ``answers`` to ``answered``.

        While all is discarded either side's stream is taken, and whoever waits for an answer gets some.
        """
        for source, sink in ((asks, asked), (answers, answered)):
            m.d.comb += [
                sink.payload.eq(source.payload),
                sink.valid.eq(source.valid),
                source.ready.eq(sink.ready | self.discarding),
            ]
        with m.If(self.discarding):
            m.d.comb += [asked.valid.eq(0), answered.valid.eq(1)]
