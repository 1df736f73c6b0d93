"""What the back ends have in common: one port of them, and how it is stopped."""

from amaranth import ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from .layouts import Chain

SMALL_READS = 4096  # read buffer of a port that reads little: one burst


def port_streams(width):
    """Return the members of a component that serves one port, by name: see :func:`.device.back_end_ports`."""
    return {
        "chains": In(stream.Signature(Chain)),
        "readable": In(stream.Signature(ChainBeat(width))),
        "writable": Out(stream.Signature(ChainBeat(width))),
    }


def join_port(m, back_end, n, server):
    """Let ``server`` (a component with :func:`port_streams`) serve port ``n`` of ``back_end``.

    While the port is stopped the server is in reset, and what comes for the port is taken and dropped.
    """
    stop, is_reset = Signal(name=f"stop_{n}"), Signal(name=f"is_reset_{n}")
    m.submodules[f"port_{n}"] = ResetInserter(stop)(server)
    wiring.connect(m, server.writable, wiring.flipped(back_end.writable[n]))
    for ours, theirs in ((back_end.chains[n], server.chains), (back_end.readable[n], server.readable)):
        m.d.comb += [
            theirs.valid.eq(ours.valid & ~stop),
            theirs.payload.eq(ours.payload),
            ours.ready.eq(theirs.ready | stop),
        ]
    m.d.sync += is_reset.eq(stop)
    m.d.comb += [
        stop.eq(back_end.stop | back_end.port_stop[n]),
        back_end.port_stopped[n].eq(stop & is_reset & ~back_end.chains[n].valid & ~back_end.readable[n].valid),
    ]
