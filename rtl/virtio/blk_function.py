"""virtio-blk functions behind a ring engine: everything of them that moves data."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import Segment, WriterDone, client_ports
from ..dma.scatter_gather import ScatterGather
from ..tlp.layouts import Hint
from .blk import Blk
from .layouts import Chain


class BlkFunction(wiring.Component):
    """A :class:`.blk.Blk` with its data mover: what a ring engine hands chains to.

    Parameters
    ----------
    width, device
        See :class:`.blk.Blk`.
    function, client : :class:`int`
        Identify the data bursts at gate and requester.

    Members
    -------
    chains, readable, writable, finished
        From and to the ring engine.
    hints, bursts, read_data, write_data, write_done
        Towards gate and requester.
    config : ``Out(8 * config_bytes)``
        Device configuration.
    stop, stopped : ``In(1)``, ``Out(1)``
        See "Stop" in rtl/README.md.
    """

    def __init__(self, *, width, function, client, device):
        self.width, self.function, self.client, self.device = width, function, client, device
        super().__init__({
            "chains": In(stream.Signature(Chain)),
            "readable": In(stream.Signature(Segment)),
            "writable": In(stream.Signature(Segment)),
            "finished": Out(stream.Signature(WriterDone)),
            "hints": Out(stream.Signature(Hint)),
            **client_ports(width),
            "config": Out(8 * device.config_bytes),
            "stop": In(1),
            "stopped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.blk = blk = Blk(width=self.width, device=self.device)
        m.submodules.mover = mover = ScatterGather(width=self.width, function=self.function, client=self.client)
        for inner, outer in ((blk.chains[0], self.chains), *(
            (getattr(mover, name), getattr(self, name))
            for name in ("readable", "writable", "finished", "hints", "bursts", "read_data", "write_data", "write_done")
        )):
            wiring.connect(m, inner, wiring.flipped(outer))
        wiring.connect(m, mover.o, blk.readable[0])
        wiring.connect(m, blk.writable[0], mover.i)
        m.d.comb += [
            self.config.eq(blk.config),
            blk.settled[0].eq(mover.settled),
            blk.failed[0].eq(mover.failed),
            blk.stop.eq(self.stop),
            mover.stop.eq(self.stop),
            self.stopped.eq(blk.stopped & mover.stopped),
        ]
        return m
