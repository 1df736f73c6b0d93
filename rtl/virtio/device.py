"""What a virtio device is to a card: its queues, its configuration, its back end with a data mover for each port."""

from dataclasses import dataclass
from typing import Protocol

from amaranth import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat, Segment, WriterDone, client_ports
from ..dma.scatter_gather import ScatterGather
from ..stream.arbiter import Arbiter
from ..tlp.layouts import Hint
from .layouts import Chain, ConfigWrite


@dataclass(frozen=True)
class Port:
    """Queues that share the streams of a back end, by their largest sizes.

    ``waits``: the back end finishes chains only when the outside gives it something; then there is one queue, and a reset of it
    is a stop of the port. ``read_buffer_bytes``: space for its reads in flight, 4096 to 65536; None: as much as the card has for each.
    ``most_chains``: that the back end has at once, 2 to 128; None: as many as small buffers at the rate of the link want.
    """

    sizes: tuple[int, ...]
    waits: bool = False
    read_buffer_bytes: int | None = None
    most_chains: int | None = None

    def __post_init__(self):
        if not self.sizes or (self.waits and len(self.sizes) != 1):
            raise ValueError(f"A port must have queues, a waiting one exactly one, not {self.sizes!r}")


class Device(Protocol):
    """What a card asks of a device before it has a function; a frozen dataclass of the device's parameters answers well."""

    @property
    def device_type(self) -> int:
        """[VIRTIO1.4 5]"""
        ...

    @property
    def class_code(self) -> int:
        """24 bits for configuration space."""
        ...

    @property
    def device_features(self) -> int:
        """Bits that are offered beside those of transport and rings."""
        ...

    @property
    def config_bytes(self) -> int:
        """Of the device configuration, or 0."""
        ...

    @property
    def ports(self) -> tuple[Port, ...]:
        """Of the back end; their queues have the device's indices one after the other."""
        ...

    def back_end(self, width: int) -> wiring.Component:
        """Return a component with :func:`back_end_ports`; the card passes its other members on to the user."""
        ...


def back_end_ports(width, ports=1, config_bytes=0):
    """Return the members that every back end has, by name.

    - ``chains``, ``readable``, ``writable`` (arrays of ``ports``): see :class:`.layouts.Chain`.
    - ``settled``, ``assured``, ``failed``, ``flows`` (arrays of ``ports``): of the port's :class:`..dma.writer.Writer`.
    - ``features``: what driver and device agreed on. ``needs_reset``: pulse, the device cannot go on.
    - ``config``: the device configuration, byte 0 in bits 7:0. ``config_changed``: pulse, it is another from this cycle on.
      ``config_write``: the driver writes to it.
    - ``stop``, ``stopped``: see "Stop" in rtl/README.md. ``port_stop``, ``port_stopped``: the same of one waiting port.
    - ``suspend``, ``suspended``: begin nothing with a chain that was not begun; nothing is begun. [VIRTIO1.4 3.4]
    """
    return {
        "chains": In(stream.Signature(Chain)).array(ports),
        "readable": In(stream.Signature(ChainBeat(width))).array(ports),
        "writable": Out(stream.Signature(ChainBeat(width))).array(ports),
        "settled": In(1).array(ports), "assured": In(1).array(ports), "failed": In(1).array(ports), "flows": Out(1).array(ports),
        "features": In(128), "config": Out(8 * config_bytes), "config_changed": Out(1), "config_write": In(ConfigWrite),
        "needs_reset": Out(1),
        "stop": In(1), "stopped": Out(1), "port_stop": In(ports), "port_stopped": Out(ports), "suspend": In(1), "suspended": Out(1),
    }  # fmt: skip


def join(m, outer, inner, names):
    """Pass members of ``inner`` on as those of ``outer``: ``names`` has the inner name of each outer one."""
    for outer_name, inner_name in names.items():
        ours, theirs, member = getattr(outer, outer_name), getattr(inner, inner_name), inner.signature.members[inner_name]
        if not member.is_port:
            wiring.connect(m, wiring.flipped(ours), theirs)
        else:
            m.d.comb += theirs.eq(ours) if member.flow == In else ours.eq(theirs)


class DeviceFunction(wiring.Component):
    """A back end with a :class:`..dma.scatter_gather.ScatterGather` for each of its ports: what a ring engine hands chains to.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    function : :class:`int`
        PCI function number.
    clients : tuple of :class:`int`
        Requester client of each port's data.
    back_end : component
        Has the members of :func:`back_end_ports` for as many ports; all others of its members are this component's, too.

    Members
    -------
    chains, readable, writable, finished : one per port
        From and to the ring engine.
    hints : ``Out(stream.Signature(Hint))``
        Of all ports.
    bursts, read_data, write_data, write_done : one per port
        Towards gate and requester.
    passed : ``In(1)``, one per port
        The gate lets a write of the port's client pass.
    features, config, config_changed, config_write, needs_reset, stop, stopped, port_stop, port_stopped, suspend, suspended
        Of the back end, see :func:`back_end_ports`; what stops has its movers stopped, too.
    """

    def __init__(self, *, width, function, clients, back_end):
        self.width, self.function, self.clients, self.back_end = width, function, tuple(clients), back_end
        count, config_bytes = len(self.clients), len(back_end.config) // 8
        common = back_end_ports(width, count, config_bytes)
        for name, member in common.items():
            if back_end.signature.members.get(name) != member:
                raise ValueError(f"A back end must have a member {name} for {count} ports, not {back_end.signature.members.get(name)!r}")
        self.outside = {name: member for name, member in back_end.signature.members.items() if name not in common}
        super().__init__({
            "chains": In(stream.Signature(Chain)).array(count),
            "readable": In(stream.Signature(Segment)).array(count),
            "writable": In(stream.Signature(Segment)).array(count),
            "finished": Out(stream.Signature(WriterDone)).array(count),
            "hints": Out(stream.Signature(Hint)),
            **{name: member.array(count) for name, member in client_ports(width).items()},
            "passed": In(1).array(count),
            **{name: common[name] for name in ("features", "config", "config_changed", "config_write", "needs_reset", "stop", "stopped",
                                               "port_stop", "port_stopped", "suspend", "suspended")},
            **self.outside,
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        count = len(self.clients)
        m.submodules.back_end = back_end = self.back_end
        m.submodules.hints = hints = Arbiter(Hint, count)
        wiring.connect(m, hints.o, wiring.flipped(self.hints))
        movers = []
        for n, client in enumerate(self.clients):
            m.submodules[f"mover_{n}"] = mover = ScatterGather(width=self.width, function=self.function, client=client)
            movers.append(mover)
            for name in ("readable", "writable", "finished", "bursts", "read_data", "write_data", "write_done"):
                wiring.connect(m, getattr(mover, name), wiring.flipped(getattr(self, name)[n]))
            wiring.connect(m, back_end.chains[n], wiring.flipped(self.chains[n]))
            wiring.connect(m, mover.o, back_end.readable[n])
            wiring.connect(m, back_end.writable[n], mover.i)
            wiring.connect(m, mover.hints, hints.i[n])
            m.d.comb += [
                back_end.settled[n].eq(mover.settled),
                back_end.assured[n].eq(mover.assured),
                mover.passed.eq(self.passed[n]),
                back_end.failed[n].eq(mover.failed),
                mover.flows.eq(back_end.flows[n]),
                mover.stop.eq(self.stop | self.port_stop[n]),
                self.port_stopped[n].eq(back_end.port_stopped[n] & mover.stopped),
            ]
        join(m, self, back_end, {name: name for name in self.outside})
        m.d.comb += [
            *(getattr(back_end, name).eq(getattr(self, name)) for name in ("features", "config_write", "stop", "port_stop", "suspend")),
            *(getattr(self, name).eq(getattr(back_end, name)) for name in ("config", "config_changed", "needs_reset", "suspended")),
            self.stopped.eq(back_end.stopped & Cat(mover.stopped for mover in movers).all()),
        ]
        return m
