"""A card whose functions copy memory for processes: what tests of PASIDs run on, and what a user's own logic looks like on a core."""

from dataclasses import dataclass

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..rtl.config import HostAtsConfig
from ..rtl.core import Activity, Core
from ..rtl.dma.layouts import ChainBeat, client_ports
from ..rtl.dma.scatter_gather import ScatterGather
from ..rtl.function.description import Bar, FunctionDescription, PcieCapability, SriovCapability
from ..rtl.phy.raw import RawBeat, RawPhy
from ..rtl.regs.bus import RegisterBus
from ..rtl.regs.router import Range
from ..rtl.stream.queue import Queue
from ..rtl.tlp.layouts import BurstStatus, Pasid
from ..rtl.tlp.requester import ReadClient

__all__ = ["ENGINES", "SOURCE", "START", "TARGET", "CopyCard", "CopyConfig"]

SOURCE, TARGET, START, PASIDS = range(0, 32, 8)  # registers of an engine, 8 bytes each
ENGINES = (0, 0, 1)  # functions of the engines; those of one function follow one another in its BAR
SPAN = 64  # bytes of BAR for each engine


class Copier(wiring.Component):
    """Reads bytes for one process and writes them for another.

    A write of the number of bytes to START begins. Read, START has bit 0 set when that is over, and how reading and writing
    ended in bits 10:8 and 14:12. PASIDS has the :class:`Pasid` of the source in bits 20:0 and of the target in bits 52:32.

    Parameters
    ----------
    width, function, client
        As for :class:`ringwall.rtl.dma.scatter_gather.ScatterGather`.
    """

    def __init__(self, *, width, function, client):
        self.width, self.function, self.client = width, function, client
        super().__init__({"bus": In(RegisterBus()), **client_ports(width), "stop": In(1), "stopped": Out(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.mover = mover = ScatterGather(width=self.width, function=self.function, client=self.client)
        m.submodules.queue = queue = ResetInserter({"sync": self.stop})(Queue(ChainBeat(self.width), 16))
        for name in ("bursts", "read_data", "write_data", "write_done"):
            wiring.connect(m, getattr(mover, name), wiring.flipped(getattr(self, name)))
        source, target, size = Signal(64), Signal(64), Signal(32)
        pasids = [Signal(Pasid, name=f"pasid_{name}") for name in ("read", "write")]
        to_read, to_write, is_over = Signal(), Signal(), Signal()
        statuses = [Signal(BurstStatus, name=f"{name}_status") for name in ("read", "write")]
        pasid = Signal(Pasid)
        m.d.comb += [
            pasid.eq(Mux(mover.bursts.p.is_write, pasids[1].as_value(), pasids[0].as_value())),
            self.bursts.p.pasid_valid.eq(pasid.valid), self.bursts.p.pasid.eq(pasid.value),
            mover.stop.eq(self.stop), self.stopped.eq(mover.stopped), mover.finished.ready.eq(1),
            mover.readable.valid.eq(to_read), mover.readable.p.address.eq(source), mover.readable.p.length_bytes.eq(size),
            mover.readable.p.last.eq(1),
            mover.writable.valid.eq(to_write), mover.writable.p.address.eq(target), mover.writable.p.length_bytes.eq(size),
            mover.writable.p.last.eq(1),
            queue.i.payload.eq(mover.o.payload), queue.i.valid.eq(mover.o.valid), mover.o.ready.eq(queue.i.ready | self.stop),
        ]  # fmt: skip
        wiring.connect(m, queue.o, mover.i)
        with m.If(mover.readable.ready):
            m.d.sync += to_read.eq(0)
        with m.If(mover.writable.ready):
            m.d.sync += to_write.eq(0)
        with m.If(mover.o.valid & mover.o.ready & mover.o.p.last):
            m.d.sync += statuses[0].eq(mover.o.p.status)
        with m.If(mover.finished.valid):
            m.d.sync += [is_over.eq(1), statuses[1].eq(mover.finished.p.status)]

        request, response = self.bus.request, self.bus.response
        m.d.comb += request.ready.eq(~response.valid)
        with m.If(response.ready):
            m.d.sync += response.valid.eq(0)
        with m.If(request.valid & request.ready):
            m.d.sync += [response.valid.eq(1), response.p.data.eq(Cat(is_over, *(0,) * 7, statuses[0], 0, statuses[1]))]
            with m.If(request.p.is_write):
                with m.Switch(request.p.offset[:5]):
                    with m.Case(SOURCE):
                        m.d.sync += source.eq(request.p.data)
                    with m.Case(TARGET):
                        m.d.sync += target.eq(request.p.data)
                    with m.Case(PASIDS):
                        m.d.sync += [pasids[0].eq(request.p.data), pasids[1].eq(request.p.data[32:])]
                    with m.Case(START):
                        m.d.sync += [size.eq(request.p.data), to_read.eq(1), to_write.eq(1), is_over.eq(0)]
        with m.If(self.stop):
            m.d.sync += [to_read.eq(0), to_write.eq(0)]
        return m


@dataclass(frozen=True)
class CopyConfig:
    """A :class:`CopyCard`: physical function 0 with two engines, and its virtual function 1 with one."""

    width: int = 64
    host_ats = HostAtsConfig(entries=16, ways=2, requests=4, page_requests=2, page_patience_cycles=4000, pasid_bits=6)
    disks = ()
    first_disk = 0
    functions = 2

    @property
    def descriptions(self):
        """Of the functions."""
        bars = (Bar(0, 4096),)
        physical = FunctionDescription(
            0x1209, 0x0002, 0x120000, bars=bars, capabilities=(PcieCapability(has_flr=True, has_prefixes=True),),
            extended=(*self.host_ats.capabilities, SriovCapability(1, 0x0002, 1, bars=bars)))
        return physical, physical.virtual()


class CopyCard(wiring.Component):
    """:class:`Copier` engines on a core on a raw link: the ports of :class:`ringwall.rtl.verilog.RawCard`."""

    def __init__(self, config: CopyConfig):
        self.config = config
        raw = stream.Signature(RawBeat(config.width))
        super().__init__({"i": In(raw), "o": Out(raw), "link_reset": In(1), "activity": Out(Activity), "malformed": Out(1)})

    def elaborate(self, platform):
        m = Module()
        config, width = self.config, self.config.width
        places = [(function, SPAN * ENGINES[:n].count(function)) for n, function in enumerate(ENGINES)]
        m.submodules.core = core = Core(
            width=width, functions=config.descriptions, clients=[ReadClient(f"copier {n}", True, 4096) for n in range(len(ENGINES))],
            registers=tuple((Range(function, 0, at, SPAN),) for function, at in places), iommu=None, host_ats=config.host_ats,
            strict=False, tags=32, wall_tags=8, completion_timeout_cycles=3000)
        m.submodules.phy = phy = ResetInserter({"sync": core.discarding})(RawPhy(width=width, has_pasid=True))
        for source, sink in ((wiring.flipped(self.i), phy.i), (phy.o, wiring.flipped(self.o)), (phy.received, core.received),
                             (core.to_send, phy.to_send)):
            wiring.connect(m, source, sink)
        m.d.comb += [
            core.link_reset.eq(self.link_reset), core.malformed.eq(phy.malformed), phy.max_payload.eq(core.max_payload),
            self.malformed.eq(phy.malformed.found), self.activity.eq(core.activity),
        ]
        all_stopped = [1] * config.functions
        for n, function in enumerate(ENGINES):
            engine = ResetInserter({"sync": core.discarding})(Copier(width=width, function=function, client=n + 1))
            m.submodules[f"copier_{n}"] = engine
            for source, sink in ((core.buses[n], engine.bus), (engine.bursts, core.bursts[n]), (engine.write_data, core.write_data[n]),
                                 (core.write_done[n], engine.write_done), (core.read_data[n], engine.read_data)):
                wiring.connect(m, source, sink)
            m.d.comb += engine.stop.eq(core.reset[function])
            all_stopped[function] &= engine.stopped
        for function, stopped in enumerate(all_stopped):
            m.d.comb += [core.stop[function].eq(core.reset[function]), core.busy[function].eq(~(stopped & core.stopped[function]))]
        return m
