"""The card: two TLP streams on one side, virtio functions behind an IOMMU on the other."""

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
from .virtio.blk_function import BlkFunction
from .virtio.engine import QueueDescription, RingEngine
from .virtio.layouts import QueueCommand
from .virtio.transport import MSIX_BAR, MSIX_BYTES, OFFERED, REGISTERS_BAR, REGISTERS_BYTES, PciTransport, virtio_function

__all__ = ["Activity", "Endpoint", "descriptions_of"]

CLIENTS_PER_FUNCTION = 3  # ring, data, MSI-X
RING_BUFFER_BYTES = 1024


def descriptions_of(config):
    """Return the :class:`.function.description.FunctionDescription` of each function of the card that ``config`` describes: physical
    ones, then virtual ones."""
    descriptions = [] if config.iommu is None else [config.iommu.description(config.extended)]
    following = config.physical_functions
    for disk in config.disks:
        descriptions.append(virtio_function(
            device_type=disk.device_type, class_code=disk.class_code, queues=1, config_bytes=disk.config_bytes,
            vectors=disk.vectors, extended=config.extended, virtual_functions=disk.virtual_functions,
            first_offset=following - len(descriptions), is_lowest=following == config.physical_functions))
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
        descriptions = descriptions_of(config)
        readers = []
        for n in numbers:
            readers += [
                ReadClient(f"ring {n}", False, RING_BUFFER_BYTES),
                ReadClient(f"data {n}", True, config.read_buffer_bytes),
                ReadClient(f"msix {n}", False, 0, messages=True),
            ]
        m.submodules.core = core = Core(
            width=width, functions=descriptions, clients=readers,
            registers=[*((Range(n, REGISTERS_BAR, 0, REGISTERS_BYTES),) for n in numbers),
                       tuple(Range(n, MSIX_BAR, 0, MSIX_BYTES) for n in numbers)],
            iommu=config.iommu, strict=config.strict, tags=config.tags, wall_tags=config.wall_tags,
            completion_timeout_cycles=config.completion_timeout_cycles, host_ats=config.host_ats)
        wiring.connect(m, wiring.flipped(self.received), core.received)
        wiring.connect(m, core.to_send, wiring.flipped(self.to_send))
        m.d.comb += [
            core.link_reset.eq(self.link_reset), core.malformed.eq(self.malformed), self.discarding.eq(core.discarding),
            self.max_payload.eq(core.max_payload), self.in_reset.eq(core.reset), self.activity.eq(core.activity),
        ]  # fmt: skip

        def add(name, component):
            m.submodules[name] = ResetInserter({"sync": core.discarding})(component)
            return component

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
        hints = add("hints", Arbiter(Hint, count + 1))
        wiring.connect(m, engine.hints, hints.i[count])
        wiring.connect(m, hints.o, core.hints)
        wiring.connect(m, commands.o, engine.commands)
        wiring.connect(m, kicks.o, engine.kicks)
        wiring.connect(m, interrupts.o, msix.requests)
        wiring.connect(m, core.buses[-1], msix.bus)
        for n, disk in enumerate(disks):
            number, client = numbers[n], clients[n]
            transport = PciTransport(
                function=number, device_features=disk.device_features, queues=(disk.queue_size,), first_queue=n,
                config_bytes=disk.config_bytes, vectors=disk.vectors, strict=config.strict,
                transport_features=OFFERED | (1 << virtio.F_SR_IOV if disk.virtual_functions else 0))
            back_end = BlkFunction(width=width, function=number, client=client + 1, device=disk)
            add(f"transport_{number}", transport)
            add(f"disk_{number}", back_end)
            wiring.connect(m, core.buses[n], transport.bus)
            wiring.connect(m, transport.commands, commands.i[n])
            wiring.connect(m, transport.kicks, kicks.i[n])
            wiring.connect(m, transport.interrupts, interrupts.i[n])
            wiring.connect(m, back_end.hints, hints.i[n])
            for name in ("chains", "readable", "writable", "finished"):
                wiring.connect(m, getattr(engine, name)[n], getattr(back_end, name))
            for offset, owner in enumerate((engine, back_end, msix)):
                for name in ("bursts", "write_data", "write_done", "read_data"):
                    ours = getattr(owner, name, None)
                    if ours is not None:
                        wiring.connect(m, ours if owner is back_end else ours[n], getattr(core, name)[client + offset - 1])
            state, stop = core.state[number], Signal(name=f"stop_{number}")
            m.d.comb += [
                stop.eq(transport.stop | core.reset[number] | core.is_d3hot[number]),  # it comes out of D3hot by a reset
                transport.reset.eq(core.reset[number]),
                msix.clear[n].eq(core.reset[number]),
                core.busy[number].eq(transport.stop | ~msix.cleared[n]),
                transport.config.eq(back_end.config),
                transport.msix_enable.eq(state.msix_enable),
                transport.notifications.valid.eq(engine.notifications.valid & (engine.notifications.payload.queue == n)),
                transport.notifications.payload.eq(engine.notifications.payload),
                transport.needs_reset.eq(engine.needs_reset[n]),
                core.interrupt[number].eq(transport.interrupt),
                msix.state[n].eq(state),
                core.bypass[number].eq(0 if config.strict else ~transport.access_platform),
                engine.stop[n].eq(stop),
                back_end.stop.eq(stop),
                msix.stop[n].eq(stop),
                core.stop[number].eq(stop),
                transport.stopped.eq(engine.stopped[n] & back_end.stopped & msix.stopped[n] & core.stopped[number]),
            ]
            with m.If(engine.notifications.payload.queue == n):
                m.d.comb += engine.notifications.ready.eq(transport.notifications.ready)

        m.d.comb += [
            self.activity.ring_read.eq(engine.ring_reads),
            self.activity.used_write.eq(engine.used_writes),
        ]
        return m
