"""The event queue of a virtio-iommu: what was refused, told to the driver."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import virtio_iommu as spec
from ..virtio.ports import port_streams
from .layouts import Report

# A fault record, byte 0 in bits 7:0. [VIRTIO1.4 5.13.6.9]
_Fault = data.StructLayout({"reason": 8, "reserved": 24, "flags": 32, "endpoint": 32, "reserved1": 32, "address": 64})


class Events(wiring.Component):
    """Writes each report into a buffer of its own; a buffer is taken when there is one to write.

    A buffer that is too small is given back unwritten. [VIRTIO1.4 5.13.6.9]

    Latency: 1 cycle from a report to the first byte of its record. Throughput: one report in 2 cycles, in 4 at 64 bits.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.

    Members
    -------
    chains, readable, writable
        The queue, see :func:`..virtio.ports.port_streams`.
    reports : ``In(stream.Signature(Report))``
        Each is taken when its record is written.
    suspend, is_idle : ``In(1)``, ``Out(1)``
        Take no buffer; there is none.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({**port_streams(width), "reports": In(stream.Signature(Report)), "suspend": In(1), "is_idle": Out(1)})

    def elaborate(self, platform):
        m = Module()
        report, fault, out = self.reports.p, Signal(_Fault), self.writable.p
        lanes = self.width // 8
        rows = Array(Cat(fault.as_value(), Const(0, self.width))[at : at + self.width] for at in range(0, 8 * spec.FAULT_BYTES, self.width))
        row, fits = Signal(range(len(rows))), Signal()
        m.d.comb += [
            fault.reason.eq(report.reason), fault.endpoint.eq(report.endpoint), fault.address.eq(report.address),
            fault.flags.eq(1 << spec.FAULT_F_ADDRESS | Mux(report.is_write, 1 << spec.FAULT_F_WRITE, 1 << spec.FAULT_F_READ)),
            out.data.eq(rows[row]), out.first.eq(row == 0), out.last.eq(~fits | (row == len(rows) - 1)),
            out.byte_count.eq(Mux(fits, Mux(out.last, spec.FAULT_BYTES - (len(rows) - 1) * lanes, lanes), 0)),
        ]  # fmt: skip
        with m.FSM():
            with m.State("AWAIT"):
                m.d.comb += [self.is_idle.eq(1), self.chains.ready.eq(self.reports.valid & ~self.suspend)]
                with m.If(self.chains.valid & self.chains.ready):
                    m.d.sync += [row.eq(0), fits.eq(self.chains.p.writable_bytes >= spec.FAULT_BYTES)]
                    m.next = "GIVE"
                    with m.If(self.chains.p.readable_bytes != 0):
                        m.next = "SKIP"
            with m.State("SKIP"):
                m.d.comb += self.readable.ready.eq(1)
                with m.If(self.readable.valid & self.readable.p.last):
                    m.next = "GIVE"
            with m.State("GIVE"):
                m.d.comb += self.writable.valid.eq(1)
                with m.If(self.writable.ready):
                    m.d.sync += row.eq(row + 1)
                    with m.If(out.last):
                        m.d.comb += self.reports.ready.eq(fits)
                        m.next = "AWAIT"
        return m
