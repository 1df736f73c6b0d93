"""virtio-net: Ethernet frames between the driver and a stream each way."""

from dataclasses import dataclass

from amaranth import Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.reader import WIDTHS
from ..spec import virtio_net as spec
from ..stream.arbiter import Arbiter
from .device import Port, back_end_ports
from .net_control import ControlPort
from .net_front import ETHERNET_BYTES, TAG_BYTES, ReceiveFront
from .net_layouts import NetBeat, Settings
from .net_receive import ReceivePort
from .net_transmit import TransmitPort, TransmitStore
from .ports import SMALL_READS, join_port, port_streams

PAIRS_MAX, MTU_MAX = 16, 9216
BUFFERS_MAX = 8  # of a frame


@dataclass(frozen=True)
class NetDevice:
    """A virtio-net device, for a card. [VIRTIO1.4 5.1]

    Parameters
    ----------
    mac : :class:`bytes`
        Its address.
    mtu : :class:`int`
        Bytes of the longest IP packet: 68 to 9216.
    pairs : :class:`int`
        Pairs of a receive and a transmit queue: 1 to 16.
    checksums : :class:`bool`
        Offer CSUM and GUEST_CSUM.
    queue_size : :class:`int`
        Largest size of each queue.
    """

    mac: bytes = b"\x02\0\0\0\0\1"
    mtu: int = 1500
    pairs: int = 1
    checksums: bool = True
    queue_size: int = 256

    device_type = spec.DEVICE_TYPE
    class_code = 0x020000  # Ethernet controller
    config_bytes = spec.CONFIG_BYTES

    def __post_init__(self):
        if len(self.mac) != 6 or self.mac[0] & 1:
            raise ValueError(f"MAC address must be 6 bytes of a single station, not {self.mac!r}")
        if self.mtu not in range(spec.MTU_MIN, MTU_MAX + 1):
            raise ValueError(f"MTU must be between {spec.MTU_MIN} and {MTU_MAX}, not {self.mtu!r}")
        if self.pairs not in range(1, PAIRS_MAX + 1):
            raise ValueError(f"Pairs of queues must be between 1 and {PAIRS_MAX}, not {self.pairs!r}")

    @property
    def device_features(self):
        """Offered bits."""
        bits = [spec.F_MTU, spec.F_MAC, spec.F_MRG_RXBUF, spec.F_STATUS, spec.F_CTRL_VQ, spec.F_CTRL_RX, spec.F_CTRL_MAC_ADDR]
        bits += [spec.F_CSUM, spec.F_GUEST_CSUM] * self.checksums + [spec.F_MQ] * (self.pairs > 1)
        return sum(1 << bit for bit in bits)

    @property
    def ports(self):
        """receiveq1, transmitq1, receiveq2, ..., controlq."""
        sizes = (self.queue_size,)
        receive, control = Port(sizes, waits=True, read_buffer_bytes=SMALL_READS), Port(sizes, read_buffer_bytes=SMALL_READS)
        return (receive, Port(sizes)) * self.pairs + (control,)

    @property
    def max_frame(self):
        """Bytes of the longest frame."""
        return self.mtu + ETHERNET_BYTES + TAG_BYTES

    def back_end(self, width):
        """Return the :class:`Net`."""
        return Net(width=width, device=self)


def _Leaving(width):
    """A beat that leaves, and of which pair."""
    return data.StructLayout({"beat": NetBeat(width), "last": 1, "queue": 8})


class _Either(wiring.Component):
    """Serves a port by one of two components with :func:`.ports.port_streams`: the second while ``select`` is 1."""

    def __init__(self, first, second):
        self.servers = (first, second)
        super().__init__({**port_streams(first.width), "select": In(1)})

    def elaborate(self, platform):
        m = Module()
        for n, server in enumerate(self.servers):
            m.submodules[f"server_{n}"] = server
            here = self.select == n
            for inner, outer in ((server.chains, self.chains), (server.readable, self.readable)):
                m.d.comb += [inner.valid.eq(outer.valid & here), inner.payload.eq(outer.payload)]
                with m.If(here):
                    m.d.comb += outer.ready.eq(inner.ready)
            with m.If(here):
                m.d.comb += [
                    self.writable.valid.eq(server.writable.valid),
                    self.writable.payload.eq(server.writable.payload),
                    server.writable.ready.eq(self.writable.ready),
                ]
        return m


class Net(wiring.Component):
    """Back end of a virtio-net function. [VIRTIO1.4 5.1.9]

    What comes is judged by :class:`.net_front.ReceiveFront`, waits in the store of its queue and goes into buffers by
    :class:`.net_receive.ReceivePort`; frames for a queue that is being reset are dropped. What the driver sends goes through
    :class:`.net_transmit.TransmitPort` and :class:`.net_transmit.TransmitStore`; a frame whose buffer is used is sent, also when the
    device is reset meanwhile. Each store has room for two frames of the largest size.

    A driver that did not take MQ has its control queue where the second pair begins: the port there serves either. [VIRTIO1.4 5.1.2]

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    device : :class:`NetDevice`
        What it shows.

    Members
    -------
    received : ``In(stream.Signature(NetBeat(width)))``
        Frames for the driver. It is ready whatever the driver does.
    transmitted : ``Out(stream.Signature(NetBeat(width)))``
        Frames of the driver. Whoever takes them must go on doing so, or transmit queues can neither be reset nor suspended.
    link_up : ``In(1)``
        Shown in ``status``.
    received_drops, transmit_drops : ``Out(32)``
        Frames for us that were lost for want of buffers or room, buffers of the driver that were no frames to be sent; since power-on.
    Others
        See :func:`.device.back_end_ports`: a port per queue, those that receive wait.

    Raises
    ------
    :exc:`ValueError`
        If ``width`` is not such a number.
    """

    def __init__(self, *, width, device):
        if width not in WIDTHS:
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        self.width, self.device = width, device
        super().__init__({
            **back_end_ports(width, len(device.ports), device.config_bytes),
            "received": In(stream.Signature(NetBeat(width))), "transmitted": Out(stream.Signature(NetBeat(width))), "link_up": In(1),
            "received_drops": Out(32), "transmit_drops": Out(32),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        width, device, pairs, features = self.width, self.device, self.device.pairs, self.features
        depth = 1 << (2 * (device.max_frame * 8 // width + 2) - 1).bit_length()
        receivers = [ReceivePort(width=width, depth=depth, max_buffers=BUFFERS_MAX) for _ in range(pairs)]
        transmitters = [TransmitPort(width=width, max_frame=device.max_frame, checksums=device.checksums) for _ in range(pairs)]
        controls = [ControlPort(width=width, pairs=pairs) for _ in range(1 + (pairs > 1))]

        # Ports. Without MQ the third queue is the control queue.
        for n in range(pairs):
            server = receivers[n]
            if n == 1:
                server = _Either(server, controls[1])
                m.d.comb += server.select.eq(~features[spec.F_MQ])
            join_port(m, self, 2 * n, server)
            join_port(m, self, 2 * n + 1, transmitters[n])
            m.d.comb += self.flows[2 * n].eq(features[spec.F_MQ] if n == 1 else 1)
        join_port(m, self, 2 * pairs, controls[0])

        # What the driver has said; forgotten when the device is reset.
        initial = {"mac": int.from_bytes(device.mac, "little"), "promiscuous": 0, "all_multicast": 0, "table": 0, "pairs": 1}
        settings, link_up = Signal(Settings, init=initial), Signal()
        for control in controls:
            with m.If(control.change):
                m.d.sync += settings.eq(control.changed)
        with m.If(self.stop):
            m.d.sync += settings.eq(Const(initial, Settings))
        m.d.sync += [
            link_up.eq(self.link_up),
            self.config_changed.eq((link_up != self.link_up) | Cat(control.change for control in controls).any()),
        ]
        status, max_pairs = Signal(16), pairs if pairs > 1 else 0  # without MQ there is no such field
        m.d.comb += [
            status[spec.S_LINK_UP].eq(link_up),
            self.config.eq(Cat(settings.mac, status, Const(max_pairs, 16), Const(device.mtu, 16))),
        ]

        # From the medium.
        m.submodules.front = front = ReceiveFront(width=width, pairs=pairs, mtu=device.mtu, checksums=device.checksums)
        wiring.connect(m, wiring.flipped(self.received), front.received)
        m.d.comb += [front.settings.eq(settings), front.filters.eq(features[spec.F_CTRL_RX])]
        for n, receiver in enumerate(receivers):
            m.d.comb += [
                receiver.valid.eq(front.valid),
                receiver.beat.eq(front.beat),
                receiver.verdict.eq(front.verdict),
                receiver.verdict.keep.eq(front.verdict.keep & (front.verdict.queue == n)),
                receiver.verdict.is_valid.eq(front.verdict.is_valid & features[spec.F_GUEST_CSUM]),
                receiver.merges.eq(features[spec.F_MRG_RXBUF]),
                receiver.enabled.eq(n < settings.pairs),
                receiver.suspend.eq(self.suspend),
            ]
        writes = [receiver.busy | ~self.settled[2 * n] for n, receiver in enumerate(receivers)]
        for control in controls:
            m.d.comb += [
                control.features.eq(features),
                control.settings.eq(settings),
                control.settled.eq(~Cat(is_writing & (n >= settings.pairs) for n, is_writing in enumerate(writes)).any()),
            ]

        # To the medium.
        m.submodules.leaving = leaving = Arbiter(_Leaving(width), pairs, packets=True)
        for n, transmitter in enumerate(transmitters):
            m.submodules[f"store_{n}"] = store = TransmitStore(width=width, depth=depth)
            wiring.connect(m, transmitter.rows, store.rows)
            wiring.connect(m, transmitter.patches, store.patches)
            m.d.comb += [
                transmitter.has_csum.eq(features[spec.F_CSUM]),
                store.dropped.eq(transmitter.dropped),
                store.restart.eq(self.stop | self.port_stop[2 * n + 1]),
                leaving.i[n].valid.eq(store.o.valid),
                leaving.i[n].payload.beat.eq(store.o.payload),
                leaving.i[n].payload.last.eq(store.o.payload.last),
                leaving.i[n].payload.queue.eq(n),
                store.o.ready.eq(leaving.i[n].ready),
            ]
        m.d.comb += [
            self.transmitted.valid.eq(leaving.o.valid),
            self.transmitted.payload.eq(leaving.o.payload.beat),
            leaving.o.ready.eq(self.transmitted.ready),
            front.sent.eq(leaving.o.valid & leaving.o.ready),
            front.sent_beat.eq(leaving.o.payload.beat),
            front.sent_queue.eq(leaving.o.payload.queue),
            self.stopped.eq(self.port_stopped.all()),
            self.suspended.eq(self.suspend & ~Cat(writes).any()),
        ]
        m.d.sync += [
            self.received_drops.eq(self.received_drops + sum(receiver.dropped for receiver in receivers)),
            self.transmit_drops.eq(self.transmit_drops + sum(transmitter.dropped for transmitter in transmitters)),
        ]
        return m
