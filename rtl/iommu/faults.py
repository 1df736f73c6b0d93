"""The fault queue: fault reports to records in memory."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu_registers import FaultRecord
from ..stream.queue import Queue
from .layouts import FaultReport, MemoryWrite, MemoryWriteDone
from .records import RecordWriter
from .registers import QueueControl


class Faults(wiring.Component):
    """Writes a 32-byte record for each report and moves fqt on once it is in memory. [RVIOMMU1.0 4.2, 6.16]

    Reports are dropped while the queue is off or stopped; one that finds it full sets fqof, one whose write fails sets fqmf, and both are
    dropped. Reports wait in a queue of ``depth``; while that is full no more are taken until the write at work has ended.

    Throughput: 1 record at a time, 1 dropped report per cycle.

    Parameters
    ----------
    depth : :class:`int`
        Reports that wait: at least 2.

    Members
    -------
    reports : ``In(stream.Signature(FaultReport))``
        Faults, those that DTF silences left out.
    control : ``In(QueueControl())``
        The queue's registers.
    write, write_done : ``Out(stream.Signature(MemoryWrite))``, ``In(stream.Signature(MemoryWriteDone))``
        Memory.

    Raises
    ------
    :exc:`ValueError`
        If ``depth`` is below 2.
    """

    def __init__(self, *, depth=8):
        if not isinstance(depth, int) or depth < 2:
            raise ValueError(f"Depth must be an integer of at least 2, not {depth!r}")
        self.depth = depth
        super().__init__({
            "reports": In(stream.Signature(FaultReport)),
            "control": In(QueueControl()),
            "write": Out(stream.Signature(MemoryWrite)),
            "write_done": In(stream.Signature(MemoryWriteDone)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.waiting = waiting = Queue(FaultReport, self.depth, in_block=True)
        wiring.connect(m, wiring.flipped(self.reports), waiting.i)
        control, report = self.control, waiting.o
        writer = RecordWriter(m, self, FaultRecord)
        record = writer.record
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += report.ready.eq(1)
                m.d.sync += [
                    control.on.eq(control.enable), writer.word.eq(0),
                    record.CAUSE.eq(report.p.cause), record.TTYP.eq(report.p.ttyp), record.DID.eq(report.p.device_id),
                    record.PV.eq(report.p.process_id_valid), record.PID.eq(report.p.process_id), record.PRIV.eq(report.p.privileged),
                    record.iotval.eq(report.p.iotval), record.iotval2.eq(report.p.iotval2),
                ]  # fmt: skip
                with m.If(report.valid & control.on & control.enable & ~control.stopped):
                    with m.If(writer.full):
                        m.d.comb += control.refused.eq(1)
                    with m.Else():
                        m.next = "WRITE"
            writer.add_states(m, then="TAKE", failed="TAKE")
        return m
