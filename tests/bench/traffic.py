"""A card whose functions do nothing but DMA, descriptors back to back: what the figures of the engine are measured with."""

from dataclasses import dataclass, field

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ringwall.rtl.config import IommuConfig
from ringwall.rtl.core import Activity, Core
from ringwall.rtl.dma.layouts import client_ports
from ringwall.rtl.dma.scatter_gather import ScatterGather
from ringwall.rtl.function.description import Bar, FunctionDescription, PcieCapability
from ringwall.rtl.phy.raw import RawBeat, RawPhy
from ringwall.rtl.regs.bus import RegisterBus
from ringwall.rtl.regs.router import Range
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.tlp.requester import ReadClient

__all__ = ["ADDRESS", "BYTES", "CYCLES", "FAILED", "START", "STRIDE", "Traffic", "TrafficCard", "TrafficConfig"]

ADDRESS, STRIDE, BYTES, START, CYCLES, FAILED = range(0, 48, 8)  # registers, 8 bytes each
DESCRIPTORS = 24  # bits of a count


class Traffic(wiring.Component):
    """Moves descriptors of the same length, at addresses a stride apart: packets that it throws away, or that it makes up.

    A write to START begins: bit 0 is the direction (1: to the host), bit 1 says that each descriptor waits for the end of the one before,
    bits 31:8 are the number of descriptors. CYCLES then counts the cycles
    from the first descriptor's being offered until the last one's end is known; FAILED those that did not end well.

    Parameters
    ----------
    width, function, client
        As for :class:`ringwall.rtl.dma.scatter_gather.ScatterGather`.
    """

    def __init__(self, *, width, function, client):
        self.width, self.function, self.client = width, function, client
        super().__init__({
            "bus": In(RegisterBus()),
            **client_ports(width),
            "stop": In(1),
            "stopped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.mover = mover = ScatterGather(width=self.width, function=self.function, client=self.client)
        for name in ("bursts", "read_data", "write_data", "write_done"):
            wiring.connect(m, getattr(mover, name), wiring.flipped(getattr(self, name)))
        address, stride, size = Signal(64), Signal(64), Signal(32)
        is_write, is_lone, to_begin, to_end = Signal(), Signal(), Signal(DESCRIPTORS), Signal(DESCRIPTORS)
        cycles, failed = Signal(32), Signal(DESCRIPTORS)
        m.d.comb += [mover.stop.eq(self.stop), self.stopped.eq(mover.stopped)]

        # Descriptors.
        segment = Signal.like(mover.readable.payload)
        m.d.comb += [segment.address.eq(address), segment.length_bytes.eq(size), segment.last.eq(1)]
        for port, wanted in ((mover.readable, ~is_write), (mover.writable, is_write)):
            m.d.comb += [port.payload.eq(segment), port.valid.eq(wanted & (to_begin != 0) & (~is_lone | (to_begin == to_end)))]
            with m.If(port.valid & port.ready):
                m.d.sync += [address.eq(address + stride), to_begin.eq(to_begin - 1)]

        # Data: what is read vanishes, what is written is a counter.
        sent, packets = Signal(32), Signal(DESCRIPTORS)
        row = self.width // 8
        beat = mover.i.payload
        m.d.comb += [
            mover.o.ready.eq(1),
            mover.finished.ready.eq(1),
            mover.i.valid.eq(packets != 0),
            beat.first.eq(sent == 0),
            beat.last.eq(sent + row >= size),
            beat.byte_count.eq(Mux(beat.last, size - sent, row)),
            beat.data.eq(Cat(sent).replicate(self.width // 32)),
            beat.status.eq(BurstStatus.OK),
        ]
        with m.If(mover.i.valid & mover.i.ready):
            m.d.sync += sent.eq(Mux(beat.last, 0, sent + row))
            with m.If(beat.last):
                m.d.sync += packets.eq(packets - 1)

        # Ends.
        read_end = mover.o.valid & mover.o.payload.last
        with m.If(to_end != 0):
            m.d.sync += cycles.eq(cycles + 1)
        with m.If(read_end | mover.finished.valid):
            m.d.sync += to_end.eq(to_end - 1)
            with m.If(Mux(read_end, mover.o.payload.status, mover.finished.payload.status) != BurstStatus.OK):
                m.d.sync += failed.eq(failed + 1)

        # Registers.
        request, response = self.bus.request, self.bus.response
        registers = {ADDRESS: address, STRIDE: stride, BYTES: size, START: to_end, CYCLES: cycles, FAILED: failed}
        m.d.comb += request.ready.eq(~response.valid)
        with m.If(response.ready):
            m.d.sync += response.valid.eq(0)
        with m.If(request.valid & request.ready):
            m.d.sync += response.valid.eq(1)
            with m.Switch(request.payload.offset[:6]):
                for offset, register in registers.items():
                    with m.Case(offset):
                        m.d.sync += response.payload.data.eq(register)
                        with m.If(request.payload.is_write & (offset < START)):
                            m.d.sync += register.eq(request.payload.data)
            count = request.payload.data[8 : 8 + DESCRIPTORS]
            with m.If(request.payload.is_write & (request.payload.offset == START)):
                m.d.sync += [Cat(is_write, is_lone).eq(request.payload.data[:2]), to_begin.eq(count), to_end.eq(count)]
                m.d.sync += [cycles.eq(0), failed.eq(0)]
                with m.If(request.payload.data[0]):
                    m.d.sync += packets.eq(count)
        return m


@dataclass(frozen=True)
class TrafficConfig:
    """A :class:`TrafficCard`: its IOMMU is function 0, its traffic the functions behind; without one it begins at 0."""

    width: int
    functions: int = 1
    iommu: IommuConfig | None = field(default_factory=IommuConfig)
    read_buffer_bytes: int = 32768
    disks = ()

    @property
    def first_disk(self):
        """Number of the first function with traffic."""
        return int(self.iommu is not None)

    @property
    def descriptions(self):
        """Of the functions."""
        own = (FunctionDescription(0x1209, 0x0002, 0x120000, bars=(Bar(0, 4096),), capabilities=(PcieCapability(),)),) * self.functions
        return own if self.iommu is None else (self.iommu.description(), *own)


class TrafficCard(wiring.Component):
    """:class:`Traffic` on a core on a raw link: the ports of :class:`ringwall.rtl.verilog.RawCard`."""

    def __init__(self, config: TrafficConfig):
        self.config = config
        raw = stream.Signature(RawBeat(config.width))
        super().__init__({"i": In(raw), "o": Out(raw), "link_reset": In(1), "activity": Out(Activity), "malformed": Out(1)})

    def elaborate(self, platform):
        m = Module()
        config, width = self.config, self.config.width
        numbers = range(config.first_disk, config.first_disk + config.functions)
        m.submodules.core = core = Core(
            width=width, functions=config.descriptions, clients=(ReadClient("data", True, config.read_buffer_bytes, 64),) * len(numbers),
            registers=tuple((Range(number, 0, 0, 4096),) for number in numbers), iommu=config.iommu, strict=False, tags=256, wall_tags=16,
            completion_timeout_cycles=2_500_000)
        m.submodules.phy = phy = ResetInserter({"sync": core.discarding})(RawPhy(width=width))
        for source, sink in ((wiring.flipped(self.i), phy.i), (phy.o, wiring.flipped(self.o)), (phy.received, core.received),
                             (core.to_send, phy.to_send)):
            wiring.connect(m, source, sink)
        m.d.comb += [
            core.link_reset.eq(self.link_reset), core.malformed.eq(phy.malformed), phy.max_payload.eq(core.max_payload),
            self.malformed.eq(phy.malformed.found), self.activity.eq(core.activity),
        ]
        for n, number in enumerate(numbers):
            traffic = ResetInserter({"sync": core.discarding})(Traffic(width=width, function=number, client=n + 1))
            m.submodules[f"traffic_{n}"] = traffic
            for source, sink in ((core.buses[n], traffic.bus), (traffic.bursts, core.bursts[n]), (traffic.write_data, core.write_data[n]),
                                 (core.write_done[n], traffic.write_done), (core.read_data[n], traffic.read_data)):
                wiring.connect(m, source, sink)
            m.d.comb += [
                core.stop[number].eq(core.reset[number]), traffic.stop.eq(core.reset[number]),
                core.busy[number].eq(~(traffic.stopped & core.stopped[number])),
            ]
        return m
