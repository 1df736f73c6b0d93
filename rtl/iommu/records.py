"""The writing end of a queue of records in memory: what fault queue and page-request queue have in common."""

from amaranth import Array, Cat, Const, Signal
from amaranth.hdl import Shape

from ..spec.riscv_iommu_registers import PAGE_BITS
from ..tlp.layouts import BurstStatus


class RecordWriter:
    """Writes ``record`` at the tail of the queue of ``owner``, which has ``control``, ``write``, ``write_done``, and moves the tail on.

    Parameters
    ----------
    m, owner
        Module and component that this is a part of.
    layout
        A record: a multiple of 64 bits.

    Attributes
    ----------
    record, word, full
        What is to be written; which 64 bits are, 0 in front of WRITE; the queue has no place.
    """

    def __init__(self, m, owner, layout):
        control, write, words = owner.control, owner.write, Shape.cast(layout).width // 64
        record, word, full = Signal(layout), Signal(range(words)), Signal()
        self.owner, self.record, self.word, self.full = owner, record, word, full
        m.d.comb += [
            full.eq(((control.tail + 1) & control.mask) == control.head),
            write.p.address.eq(Cat(Const(0, PAGE_BITS), control.base) | (control.tail << (8 * words - 1).bit_length())),
            write.p.length_bytes.eq(8 * words),
            write.p.data.eq(Array(record.as_value().word_select(n, 64) for n in range(words))[word]),
            write.p.last.eq(word == words - 1),
        ]

    def add_states(self, m, *, then, failed):
        """Add WRITE and what follows; the states behind are ``then``, or ``failed`` when memory refused."""
        control, write, write_done = self.owner.control, self.owner.write, self.owner.write_done
        with m.State("WRITE"):
            m.d.comb += write.valid.eq(1)
            with m.If(write.ready):
                m.d.sync += self.word.eq(self.word + 1)
                with m.If(write.p.last):
                    m.next = "WAIT_DONE"
        with m.State("WAIT_DONE"):
            m.d.comb += write_done.ready.eq(1)
            with m.If(write_done.valid):
                with m.If(write_done.p.status == BurstStatus.OK):
                    m.d.comb += control.step.eq(1)
                with m.Else():
                    m.d.comb += control.memory_fault.eq(1)
                m.next = then
                if failed != then:
                    with m.If(control.memory_fault):
                        m.next = failed
