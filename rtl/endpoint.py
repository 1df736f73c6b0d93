"""The card: two TLP streams on one side, virtio functions behind an IOMMU on the other."""

from amaranth import Cat, Module, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import IOMMU_VECTORS, EndpointConfig
from .function.collector import ErrorCollector
from .function.config_space import ConfigSpace
from .function.decoder import AddressDecoder
from .function.description import MsixCapability, PcieCapability
from .function.errors import Errors
from .function.layouts import MsixRequest
from .function.msix import Msix, MsixFunction
from .iommu.gate import Gate
from .iommu.unit import Iommu
from .regs.router import Merger, Range, Router
from .spec import pcie, virtio, virtio_blk
from .stream.arbiter import Arbiter
from .tlp.completer import Completer
from .tlp.layouts import Malformed, TlpBeat
from .tlp.receiver import Receiver
from .tlp.requester import ReadClient, Requester
from .tlp.transmitter import Transmitter
from .virtio.blk import configuration
from .virtio.blk_function import BlkFunction
from .virtio.engine import QueueDescription, RingEngine
from .virtio.layouts import QueueCommand
from .virtio.transport import MSIX_BAR, MSIX_BYTES, OFFERED, REGISTERS_BAR, REGISTERS_BYTES, PciTransport, virtio_function

CLIENTS_PER_FUNCTION = 3  # ring, data, MSI-X
MAX_REQUEST_BYTES = 1024  # payload of a request that a link adapter passes on
RING_BUFFER_BYTES = 1024
BLK_FEATURES = 1 << virtio_blk.F_FLUSH
BLK_CONFIG_BYTES = 60
MASS_STORAGE = 0x018000  # class code of a virtio-blk function


class Activity(data.Struct):
    """What happens in a cycle: levels and pulses for counters."""

    tags_in_flight: 11
    iotlb_hit: 1
    iotlb_miss: 1
    walk: 1
    walk_read: 1
    ring_read: 1
    used_write: 1


def descriptions_of(config):
    """Return the :class:`.function.description.FunctionDescription` of each function of the card that ``config`` describes: physical
    ones, then virtual ones."""
    descriptions = [] if config.iommu is None else [config.iommu.description(config.extended)]
    following = config.physical_functions
    for disk in config.disks:
        descriptions.append(virtio_function(
            device_type=virtio_blk.DEVICE_TYPE, class_code=MASS_STORAGE, queues=1, config_bytes=BLK_CONFIG_BYTES, vectors=disk.vectors,
            extended=config.extended, virtual_functions=disk.virtual_functions, first_offset=following - len(descriptions),
            is_lowest=following == config.physical_functions))
        following += disk.virtual_functions
    return descriptions + [d.virtual() for d, disk in zip(descriptions[config.first_disk :], config.disks)
                           for _ in range(disk.virtual_functions)]  # fmt: skip


class Endpoint(wiring.Component):
    """A card as :class:`.config.EndpointConfig` says; a link adapter of ``rtl/phy`` joins it to a link.

    Parameters
    ----------
    config : :class:`.config.EndpointConfig`
        What it is made of.

    Members
    -------
    received : ``In(stream.Signature(TlpBeat(width)))``
        TLPs from the host.
    to_send : ``Out(stream.Signature(TlpBeat(width)))``
        TLPs to the host.
    link_reset : ``In(1)``
        The link is down or in hot reset; a pulse of one cycle is enough. All that is under way is discarded, all but sticky bits of
        configuration space becomes as after power-on. [PCIe5 6.6.1]
    discarding : ``Out(1)``
        From the cycle behind ``link_reset`` until that is done: what is received vanishes, what was being sent is broken off.
    max_payload : ``Out(3)``
        Code of the largest payload that the host may send: the largest Max_Payload_Size of a function, as far as it is supported.
    malformed : ``In(Malformed)``
        The link adapter discarded a malformed TLP, or passed it on as damaged.
    in_reset : ``Out(functions)``
        A bit per function: a function level reset is under way; from in front of the answer to the write that begins it.
    activity : ``Out(Activity)``
        For counters.
    """

    def __init__(self, config: EndpointConfig):
        self.config = config
        tlps = stream.Signature(TlpBeat(config.width))
        super().__init__({
            "received": In(tlps), "to_send": Out(tlps), "link_reset": In(1), "discarding": Out(1), "max_payload": Out(3),
            "malformed": In(Malformed), "in_reset": Out(config.functions), "activity": Out(Activity),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        config, width, disks = self.config, self.config.width, self.config.all_disks
        first, count = config.first_disk, len(disks)
        numbers = [first + n for n in range(count)]  # function numbers of the disks
        clients = [1 + CLIENTS_PER_FUNCTION * n for n in range(count)]  # their first requester clients

        # Functions as the host sees them. They and what reports errors live through a reset of the link; all else begins anew.
        descriptions = descriptions_of(config)
        m.submodules.config_space = space = ConfigSpace(functions=descriptions)
        m.submodules.errors = errors = Errors(functions=descriptions)
        in_reset, is_resetting = Cat(space.reset[n] for n in range(config.functions)), Signal()
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
        receiver = add("receiver", Receiver(width=width, depth=max(64, MAX_REQUEST_BYTES * 8 // width)))
        transmitter = add("transmitter", Transmitter(width=width))
        completer = add("completer", Completer(width=width, functions=config.functions))
        readers = [ReadClient("wall", False, RING_BUFFER_BYTES)]
        for n in numbers:
            readers += [
                ReadClient(f"ring {n}", False, RING_BUFFER_BYTES),
                ReadClient(f"data {n}", True, config.read_buffer_bytes),
                ReadClient(f"msix {n}", False, 0),
            ]
        requester = add("requester", Requester(
            width=width, clients=readers, functions=config.functions, tags=config.tags, wall_tags=config.wall_tags,
            completion_timeout_cycles=config.completion_timeout_cycles))
        for source, sink in (
            (wiring.flipped(self.received), receiver.i), (transmitter.o, wiring.flipped(self.to_send)),
            (receiver.requests, completer.requests), (receiver.completions, requester.completions),
            (requester.posted, transmitter.posted), (requester.non_posted, transmitter.non_posted),
            (completer.completions, transmitter.completions),
            (completer.decode_requests, decoder.requests), (decoder.responses, completer.decode_responses),
        ):
            wiring.connect(m, source, sink)
        for n in range(config.functions):
            m.d.comb += [
                completer.state[n].eq(space.state[n]),
                decoder.state[n].eq(space.state[n]),
                requester.config[n].eq(space.state[n]),
                space.pending[n].eq(requester.pending[n]),
            ]
        for name in ("bars", "virtual_bars"):
            m.d.comb += [inner.eq(outer) for inner, outer in zip(getattr(decoder, name), getattr(space, name))]
        m.d.comb += self.in_reset.eq(in_reset)
        self._isolate(m, completer.config_requests, space.requests, space.responses, completer.config_responses)

        # Payloads: function 0 speaks for all of an ARI device, in which another may be set to more. [PCIe5 7.5.3.4]
        supported = min(description.capability(PcieCapability).mps_code for description in descriptions)
        most = Signal(3)
        for n in range(1, config.functions):
            with m.If(space.state[n].mps_code > space.state[0].mps_code):
                m.d.comb += requester.config[n].mps_code.eq(space.state[0].mps_code)
        m.d.comb += most.eq(0)
        for code in range(1, supported + 1):
            with m.If(Cat(state.mps_code >= code for state in space.state).any()):
                m.d.comb += most.eq(code)
        m.d.sync += self.max_payload.eq(most)

        # Errors.
        collector = add("collector", ErrorCollector(functions=config.functions))
        wiring.connect(m, errors.updates, space.updates)
        wiring.connect(m, collector.reports, errors.reports)
        beat, message = receiver.completions, transmitter.messages
        m.d.comb += [
            collector.malformed.eq(self.malformed),
            collector.completer.eq(completer.events),
            collector.tags.eq(requester.events),
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
        for n in range(config.functions):
            m.d.comb += [collector.state[n].eq(space.state[n]), errors.state[n].eq(space.state[n])]

        # Registers.
        ranges = [] if config.iommu is None else [(Range(0, 0, 0, 4096),)]
        ranges += [(Range(n, REGISTERS_BAR, 0, REGISTERS_BYTES),) for n in numbers]
        ranges.append(tuple(Range(n, MSIX_BAR, 0, MSIX_BYTES) for n in numbers))
        merger = add("merger", Merger(count=2))
        router = add("router", Router(targets=ranges))
        wiring.connect(m, completer.registers, merger.initiators[0])
        window = merger.initiators[1]
        self._isolate(m, space.registers.request, window.request, window.response, space.registers.response)
        wiring.connect(m, merger.bus, router.bus)

        # The wall. The gate is told no bus and device: the function number alone is the device_id.
        gate = add("gate", Gate(
            clients=CLIENTS_PER_FUNCTION * count, functions=config.functions, has_iommu=config.iommu is not None))
        for source, sink in ((gate.o, requester.gate), (requester.retired_reads, gate.retired_reads),
                             (requester.retired_writes, gate.retired_writes)):
            wiring.connect(m, source, sink)
        if config.iommu is not None:
            iommu = add("iommu", Iommu(
                width=width, strict=config.strict, vectors=IOMMU_VECTORS, entries=config.iommu.entries, ways=config.iommu.ways,
                walks=config.iommu.walks))
            for source, sink in (
                (gate.translate_request, iommu.translate_request), (iommu.translate_response, gate.translate_response),
                (iommu.fence, gate.fence), (gate.fenced, iommu.fenced), (router.targets[0], iommu.bus),
                (iommu.bursts, requester.wall), (iommu.write_data, requester.write_data[0]),
                (requester.read_data[0], iommu.read_data), (requester.write_done[0], iommu.write_done),
            ):
                wiring.connect(m, source, sink)
            m.d.comb += [
                iommu.config.eq(space.state[0]),
                self.activity.iotlb_hit.eq(iommu.hit),
                self.activity.iotlb_miss.eq(iommu.miss),
                self.activity.walk.eq(iommu.begun),
                self.activity.walk_read.eq(iommu.read),
            ]

        # The ring engine, and what is per disk.
        engine = add("engine", RingEngine(
            width=width, functions=numbers, clients=clients,
            queues=[QueueDescription(n, 0, disk.queue_size) for n, disk in enumerate(disks)]))
        msix = add("msix", Msix(
            functions=[
                MsixFunction(number, descriptions[number].capability(MsixCapability), client + 2)
                for number, client in zip(numbers, clients)
            ],
            width=width))
        commands = add("commands", Arbiter(QueueCommand, count))
        kicks = add("kicks", Arbiter(6, count))
        interrupts = add("interrupts", Arbiter(MsixRequest, count))
        wiring.connect(m, commands.o, engine.commands)
        wiring.connect(m, kicks.o, engine.kicks)
        wiring.connect(m, interrupts.o, msix.requests)
        wiring.connect(m, router.targets[-1], msix.bus)
        bypass = Signal(config.functions)
        m.d.comb += gate.bypass.eq(bypass)
        for n, disk in enumerate(disks):
            number, client = numbers[n], clients[n]
            transport = PciTransport(
                function=number, device_features=BLK_FEATURES, queues=(disk.queue_size,), first_queue=n, config_bytes=BLK_CONFIG_BYTES,
                vectors=disk.vectors, strict=config.strict,
                transport_features=OFFERED | (1 << virtio.F_SR_IOV if disk.virtual_functions else 0))
            back_end = BlkFunction(
                width=width, function=number, client=client + 1, capacity_sectors=disk.capacity_sectors, serial=disk.serial)
            add(f"transport_{number}", transport)
            add(f"disk_{number}", back_end)
            wiring.connect(m, router.targets[first + n], transport.bus)
            wiring.connect(m, transport.commands, commands.i[n])
            wiring.connect(m, transport.kicks, kicks.i[n])
            wiring.connect(m, transport.interrupts, interrupts.i[n])
            for name in ("chains", "readable", "writable", "finished"):
                wiring.connect(m, getattr(engine, name)[n], getattr(back_end, name))
            for offset, owner in enumerate((engine, back_end, msix)):
                port = client + offset
                for name, theirs in (("bursts", gate.bursts[port - 1]), ("write_data", requester.write_data[port]),
                                     ("write_done", requester.write_done[port]), ("read_data", requester.read_data[port])):
                    ours = getattr(owner, name, None)
                    if ours is not None:
                        wiring.connect(m, ours if owner is back_end else ours[n], theirs)
            state, stop = space.state[number], Signal(name=f"stop_{number}")
            m.d.comb += [
                stop.eq(transport.stop | space.reset[number] | space.settings[number].is_d3hot),  # it comes out of D3hot by a reset
                transport.reset.eq(space.reset[number]),
                msix.clear[n].eq(space.reset[number]),
                space.busy[number].eq((transport.stop | ~msix.cleared[n]) & ~self.discarding),
                transport.config.eq(int.from_bytes(configuration(capacity_sectors=disk.capacity_sectors), "little")),
                transport.msix_enable.eq(state.msix_enable),
                transport.notifications.valid.eq(engine.notifications.valid & (engine.notifications.payload.queue == n)),
                transport.notifications.payload.eq(engine.notifications.payload),
                transport.needs_reset.eq(engine.needs_reset[n]),
                space.interrupt[number].eq(transport.interrupt),
                msix.state[n].eq(state),
                bypass[number].eq(0 if config.strict else ~transport.access_platform),
                engine.stop[n].eq(stop),
                back_end.stop.eq(stop),
                msix.stop[n].eq(stop),
                requester.stop[number].eq(stop),
                transport.stopped.eq(engine.stopped[n] & back_end.stopped & msix.stopped[n] & requester.stopped[number]),
            ]
            with m.If(engine.notifications.payload.queue == n):
                m.d.comb += engine.notifications.ready.eq(transport.notifications.ready)

        m.d.comb += [
            self.activity.tags_in_flight.eq(requester.tags_in_flight),
            self.activity.ring_read.eq(engine.ring_reads),
            self.activity.used_write.eq(engine.used_writes),
        ]
        return m

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
