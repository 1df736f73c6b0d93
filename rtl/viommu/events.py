"""The event queue of a virtio-iommu: what was refused, told to the driver."""

from amaranth import Array, Cat, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from ..spec import virtio_iommu as spec
from ..stream.queue import Queue
from ..virtio.layouts import Chain
from .layouts import Report

# A fault record, byte 0 in bits 7:0. [VIRTIO1.4 5.13.6.9]
_Fault = data.StructLayout({"reason": 8, "reserved": 24, "flags": 32, "endpoint": 32, "reserved1": 32, "address": 64})


class Events(wiring.Component):
    """Writes each report into a buffer of its own; a buffer is taken when there is one to write.

    A buffer that is too small is given back unwritten. Reports wait, ``depth`` of them; of what comes then nothing is kept but their
    number. [VIRTIO1.4 5.13.6.9]

    Latency: 5 cycles from a report to the first byte of its record.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    depth : :class:`int`
        Reports that wait: at least 2.

    Members
    -------
    chains, readable, writable
        ``In(stream.Signature(Chain))``, ``In(stream.Signature(ChainBeat(width)))``, ``Out(stream.Signature(ChainBeat(width)))``: the
        queue, as for any back end that waits.
    reports : ``In(stream.Signature(Report))``
        Always taken.
    dropped : ``Out(32)``
        How many were not kept since power-on.
    stop : ``In(1)``
        The queue is reset: chains and readable bytes are taken and dropped, reports stay.
    suspend, is_idle : ``In(1)``, ``Out(1)``
        Take no chain; there is none.
    """

    def __init__(self, *, width, depth=16):
        self.width, self.depth = width, depth
        super().__init__({
            "chains": In(stream.Signature(Chain)),
            "readable": In(stream.Signature(ChainBeat(width))),
            "writable": Out(stream.Signature(ChainBeat(width))),
            "reports": In(stream.Signature(Report)),
            "dropped": Out(32),
            "stop": In(1),
            "suspend": In(1),
            "is_idle": Out(1),
        })

    def elaborate(self, platform):
        m, core = Module(), Module()
        m.submodules.reports = reports = Queue(Report, self.depth)
        m.submodules.core = ResetInserter(self.stop)(core)
        m.d.comb += [reports.i.payload.eq(self.reports.payload), reports.i.valid.eq(self.reports.valid), self.reports.ready.eq(1)]
        with m.If(self.reports.valid & ~reports.i.ready):
            m.d.sync += self.dropped.eq(self.dropped + 1)

        report, fault, out = reports.o.p, Signal(_Fault), self.writable.p
        lanes = self.width // 8
        rows = Array(Cat(fault.as_value(), Const(0, self.width))[at : at + self.width] for at in range(0, 8 * spec.FAULT_BYTES, self.width))
        row, fits = Signal(range(len(rows))), Signal()
        m.d.comb += [
            fault.reason.eq(report.reason), fault.endpoint.eq(report.endpoint), fault.address.eq(report.address),
            fault.flags.eq(1 << spec.FAULT_F_ADDRESS | Mux(report.is_write, 1 << spec.FAULT_F_WRITE, 1 << spec.FAULT_F_READ)),
            out.data.eq(rows[row]), out.first.eq(row == 0), out.last.eq(~fits | (row == len(rows) - 1)),
            out.byte_count.eq(Mux(fits, Mux(out.last, spec.FAULT_BYTES - (len(rows) - 1) * lanes, lanes), 0)),
        ]  # fmt: skip
        with core.FSM():
            with core.State("AWAIT"):
                core.d.comb += [
                    self.is_idle.eq(1), self.chains.ready.eq(self.stop | (reports.o.valid & ~self.suspend)),
                    self.readable.ready.eq(self.stop),
                ]  # fmt: skip
                with core.If(self.chains.valid & self.chains.ready):
                    core.d.sync += [row.eq(0), fits.eq(self.chains.p.writable_bytes >= spec.FAULT_BYTES)]
                    core.next = "GIVE"
                    with core.If(self.chains.p.readable_bytes != 0):
                        core.next = "SKIP"
            with core.State("SKIP"):
                core.d.comb += self.readable.ready.eq(1)
                with core.If(self.readable.valid & self.readable.p.last):
                    core.next = "GIVE"
            with core.State("GIVE"):
                core.d.comb += self.writable.valid.eq(1)
                with core.If(self.writable.ready):
                    core.d.sync += row.eq(row + 1)
                    with core.If(out.last):
                        core.d.comb += reports.o.ready.eq(fits)
                        core.next = "AWAIT"
        return m
