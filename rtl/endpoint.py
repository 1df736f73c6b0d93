"""The card: two TLP streams on one side, virtio functions behind an IOMMU on the other."""

from dataclasses import dataclass

from amaranth import Module, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .config import EndpointConfig
from .core import Activity, Core
from .function.description import MsixCapability
from .function.layouts import MsixRequest
from .function.msix import Msix, MsixFunction
from .regs.router import Range
from .spec import virtio
from .stream.arbiter import Arbiter
from .tlp.layouts import Hint, Malformed, TlpBeat
from .tlp.requester import ReadClient
from .viommu.unit import EVENTS
from .virtio.device import Device, DeviceFunction, join
from .virtio.engine import PortDescription, RingEngine
from .virtio.layouts import QueueCommand
from .virtio.transport import MSIX_BAR, MSIX_BYTES, MSIX_VECTORS_MAX, REGISTERS_BAR, REGISTERS_BYTES, PciTransport, virtio_function

__all__ = ["Activity", "Endpoint", "descriptions_of"]

RING_BUFFER_BYTES, RING_READS = 4096, 64
DATA_READS = 64  # as many as a reader asks for: one that waited in front of the requester would hold up the writes behind it


@dataclass(frozen=True)
class Place:
    """A device on the card: its function, and the first of its clients (rings, data of each port, MSI-X), queues and ports."""

    device: Device
    function: DeviceFunction
    client: int
    queue: int
    port: int

    @property
    def number(self):
        """Of its PCI function."""
        return self.function.function

    @property
    def clients(self):
        """Requester clients of rings and ports; behind them comes that of MSI-X. The wall's is 0."""
        return range(1 + self.client, 2 + self.client + len(self.device.ports))

    @property
    def queues(self):
        """Largest size of each queue."""
        return queues_of(self.device)


def queues_of(device):
    """Return the largest size of each queue of a :class:`.virtio.device.Device`, by index."""
    return tuple(size for port in device.ports for size in port.sizes)


def vectors_of(device):
    """Return the number of MSI-X vectors of its function: what it says, else one for each queue and one for changes."""
    return getattr(device, "vectors", None) or min(len(queues_of(device)) + 1, MSIX_VECTORS_MAX)


def descriptions_of(config):
    """Return the :class:`.function.description.FunctionDescription` of each function of the card that ``config`` describes: physical
    ones, then virtual ones."""
    descriptions = [config.iommu.description(config.extended)] if config.first_disk else []
    following, virtual = config.physical_functions, []
    for device in (*config.disks, *config.devices):
        count = getattr(device, "virtual_functions", 0)
        descriptions.append(virtio_function(
            device_type=device.device_type, class_code=device.class_code, queues=len(queues_of(device)), config_bytes=device.config_bytes,
            vectors=vectors_of(device), extended=config.extended, at=config.virtio_at, virtual_functions=count,
            first_offset=following - len(descriptions), is_lowest=following == config.physical_functions))
        virtual += [descriptions[-1].virtual() for _ in range(count)]
        following += count
    if config.iommu_bar is not None:
        descriptions[0] = config.iommu.share(descriptions[0])
    return descriptions + virtual


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
    name_n : one for each member of a back end that is the user's
        ``entropy_2`` is ``entropy`` of the device that is function 2, see :class:`.virtio.device.Device`.
    """

    def __init__(self, config: EndpointConfig):
        self.config = config
        tlps = stream.Signature(TlpBeat(config.width, config.pasid_bits > 0))
        self._places, client, queue, port = [], 0, 0, 0
        iommu = () if config.virtio_iommu is None else (config.virtio_iommu,)
        for number, device in enumerate((*iommu, *config.all_devices), config.first_disk - len(iommu)):
            ports = len(device.ports)
            function = DeviceFunction(width=config.width, function=number, clients=range(client + 2, client + 2 + ports),
                                      back_end=device.back_end(config.width))  # fmt: skip
            self._places.append(Place(device, function, client, queue, port))
            client, queue, port = client + ports + 2, queue + len(queues_of(device)), port + ports
        self.users = self._places[len(iommu) :]
        self.outside = {f"{name}_{place.number}": member for place in self.users for name, member in place.function.outside.items()}
        super().__init__({
            **self.outside,
            "received": In(tlps), "to_send": Out(tlps), "link_reset": In(1), "discarding": Out(1), "max_payload": Out(3),
            "malformed": In(Malformed), "in_reset": Out(config.functions), "activity": Out(Activity),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        config, width, places = self.config, self.config.width, self._places
        numbers = [place.number for place in places]
        descriptions = descriptions_of(config)
        readers = []
        for place in places:
            readers += [
                ReadClient(f"ring {place.number}", False, RING_BUFFER_BYTES, RING_READS),
                *(ReadClient(f"data {place.number}.{n}", True, port.read_buffer_bytes or config.read_buffer_bytes, DATA_READS)
                  for n, port in enumerate(place.device.ports)),
                ReadClient(f"msix {place.number}", False, 0, messages=True),
            ]
        m.submodules.core = core = Core(
            width=width, functions=descriptions, clients=readers,
            registers=[*((Range(n, REGISTERS_BAR, 0, REGISTERS_BYTES),) for n in numbers),
                       tuple(Range(n, MSIX_BAR, 0, MSIX_BYTES) for n in numbers)],
            iommu=None if config.virtio_iommu else config.iommu, iommu_bar=config.iommu_bar, strict=config.strict,
            tags=config.tags, wall_tags=config.wall_tags, completion_timeout_cycles=config.completion_timeout_cycles,
            host_ats=config.host_ats, translates=config.virtio_iommu is not None)  # fmt: skip
        wiring.connect(m, wiring.flipped(self.received), core.received)
        wiring.connect(m, core.to_send, wiring.flipped(self.to_send))
        m.d.comb += [
            core.link_reset.eq(self.link_reset), core.malformed.eq(self.malformed), self.discarding.eq(core.discarding),
            self.max_payload.eq(core.max_payload), self.in_reset.eq(core.reset), self.activity.eq(core.activity),
        ]  # fmt: skip

        def add(name, component):
            m.submodules[name] = ResetInserter({"sync": core.discarding})(component)
            return component

        # The ring engine, and what is per function.
        engine = add("engine", RingEngine(
            width=width, functions=numbers, clients=[place.clients.start for place in places],
            ports=[PortDescription(n, port.sizes, port.waits, port.most_chains)
                   for n, place in enumerate(places) for port in place.device.ports]))
        msix = add("msix", Msix(
            functions=[MsixFunction(place.number, descriptions[place.number].capability(MsixCapability), place.clients.stop)
                       for place in places],
            width=width))
        commands = add("commands", Arbiter(QueueCommand, len(places)))
        kicks = add("kicks", Arbiter(6, len(places) + any(place not in self.users for place in places)))
        interrupts = add("interrupts", Arbiter(MsixRequest, len(places)))
        hints = add("hints", Arbiter(Hint, len(places) + 1))
        wiring.connect(m, engine.hints, hints.i[len(places)])
        wiring.connect(m, hints.o, core.hints)
        wiring.connect(m, commands.o, engine.commands)
        wiring.connect(m, kicks.o, engine.kicks)
        wiring.connect(m, interrupts.o, msix.requests)
        wiring.connect(m, core.buses[-1], msix.bus)
        for n, place in enumerate(places):
            number, device, function = place.number, place.device, place.function
            transport = add(f"transport_{number}", PciTransport(
                function=number, device_features=device.device_features, queues=place.queues, first_queue=place.queue,
                config_bytes=device.config_bytes, vectors=vectors_of(device), strict=config.strict,
                dependencies=getattr(device, "dependencies", ()),
                transport_features=config.transport_features | (1 << virtio.F_SR_IOV if getattr(device, "virtual_functions", 0) else 0)))
            add(f"device_{number}", function)
            wiring.connect(m, core.buses[n], transport.bus)
            wiring.connect(m, transport.commands, commands.i[n])
            wiring.connect(m, transport.kicks, kicks.i[n])
            wiring.connect(m, transport.interrupts, interrupts.i[n])
            wiring.connect(m, function.hints, hints.i[n])
            clients = [(engine, n), *((function, port) for port in range(len(device.ports))), (msix, n)]
            for at, (owner, its) in enumerate(clients, place.client):
                for name in ("bursts", "write_data", "write_done", "read_data"):
                    if hasattr(owner, name):
                        wiring.connect(m, getattr(owner, name)[its], getattr(core, name)[at])
            for port in range(len(device.ports)):
                m.d.comb += function.passed[port].eq(core.passed[place.client + 1 + port])
                for name in ("chains", "readable", "writable", "finished"):
                    wiring.connect(m, getattr(engine, name)[place.port + port], getattr(function, name)[port])
            if place in self.users:
                join(m, self, function, {f"{name}_{number}": name for name in function.outside})
            else:
                self._translate(m, core, function, kicks.i[len(places)], place.queue)
            state, stop, notifies = core.state[number], Signal(name=f"stop_{number}"), Signal(name=f"notifies_{number}")
            notified = engine.notifications.payload.queue
            m.d.sync += stop.eq(transport.stop | core.reset[number] | core.is_d3hot[number])  # it comes out of D3hot by a reset
            m.d.comb += [
                transport.reset.eq(core.reset[number]),
                msix.clear[n].eq(core.reset[number]),
                core.busy[number].eq(transport.stop | ~msix.cleared[n]),
                transport.config.eq(function.config),
                transport.config_changed.eq(function.config_changed),
                function.config_write.eq(transport.config_write),
                transport.msix_enable.eq(state.msix_enable),
                notifies.eq((notified >= place.queue) & (notified < place.queue + len(place.queues))),
                transport.notifications.valid.eq(engine.notifications.valid & notifies),
                transport.notifications.payload.eq(engine.notifications.payload),
                transport.needs_reset.eq(engine.needs_reset[n] | function.needs_reset),
                core.interrupt[number].eq(transport.interrupt),
                msix.state[n].eq(state),
                core.bypass[number].eq(place not in self.users or (0 if config.strict else ~transport.access_platform)),
                engine.stop[n].eq(stop),
                transport.idle.eq(engine.idle[place.queue :]),
                engine.suspend[n].eq(transport.suspend),
                function.suspend.eq(transport.suspend),
                transport.suspended.eq(engine.suspended[n] & function.suspended & msix.quiet[n]),
                function.port_stop.eq(engine.port_stop[place.port :]),
                engine.port_stopped[place.port : place.port + len(device.ports)].eq(function.port_stopped),
                function.features.eq(transport.features),
                function.stop.eq(stop),
                msix.stop[n].eq(stop),
                core.stop[number].eq(stop),
            ]
            m.d.sync += transport.stopped.eq(stop & engine.stopped[n] & function.stopped & msix.stopped[n] & core.stopped[number])
            with m.If(notifies):
                m.d.comb += engine.notifications.ready.eq(transport.notifications.ready)

        m.d.comb += [
            self.activity.ring_read.eq(engine.ring_reads),
            self.activity.used_write.eq(engine.used_writes),
        ]
        return m

    def _translate(self, m, core, function, kicks, first_queue):
        """Let a virtio-iommu translate for the gate. What it sends itself is physical, so that it never waits for its own answers."""
        for source, sink in ((core.translate_request, function.translate_request), (function.translate_response, core.translate_response),
                             (function.fence, core.fence), (core.fenced, function.fenced)):  # fmt: skip
            wiring.connect(m, source, sink)
        m.d.comb += [
            core.spare.eq(function.spare),
            function.restore.eq(core.reset[0] if self.config.strict else 0),  # no reset of the function lets others bypass
            kicks.valid.eq(function.look.valid), kicks.payload.eq(first_queue + EVENTS), function.look.ready.eq(kicks.ready),
            self.activity.iotlb_hit.eq(function.hit), self.activity.iotlb_miss.eq(function.miss),
        ]  # fmt: skip
