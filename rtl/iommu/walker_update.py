"""A and D of leaf entries, set by hardware. [RVIOMMU1.0 3.4]"""

from amaranth import Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .walker_ats import is_translation
from .walker_rules import first_grants, first_may_use
from .walker_state import Grant, Phase

ENTRY_BITS = {name: field.offset for name, field in spec.PageTableEntry.as_shape()}


class UpdateAtWork:
    """What the access of the walk asks of the entry at work, if that is a good leaf. [RVPRIV 10.3.2 steps 6 to 9]

    The access is that of the request, or behind the first stage the walk's own: it reads tables, and writes those whose entries it updates.

    Attributes
    ----------
    is_granted
        The entry permits it.
    is_needed, is_allowed
        A must be set, or D for a write; the walk may do so.
    bits
        A, and D for a write, at their places.
    """

    def __init__(self, m, work, enabled):
        features, walk, context, key, entry = work.features, work.walk, work.context, work.key, work.entry
        supervisor, SUM = (key.supervisor, walk.SUM) if features.has_processes else (Const(0, 1), Const(0, 1))
        leaf, is_write, granted = Signal(Grant), Signal(), Signal()
        m.d.comb += [
            leaf.readable.eq(entry.R), leaf.writable.eq(entry.W), leaf.executable.eq(entry.X), leaf.U.eq(entry.U),
            is_write.eq(key.is_write), granted.eq(first_grants(leaf, key.is_write, key.execute, supervisor, SUM)),
        ]
        updates = context.SADE
        if features.has_second_stage:
            is_implicit = walk.purpose != Phase.LEAF
            updates = Mux(work.is_second, context.GADE, context.SADE)
            with m.If(work.is_second):
                m.d.comb += [
                    is_write.eq(Mux(is_implicit, walk.is_writing, key.is_write)),
                    granted.eq(Mux(is_write, entry.W, Mux(key.execute & ~is_implicit, entry.X, entry.R))),
                ]
        self.is_granted, self.bits = granted, (1 << ENTRY_BITS["A"]) | (is_write << ENTRY_BITS["D"])
        self.is_allowed = enabled & updates & work.demanded.bit_select(work.at, 1) & ~walk.failures.all()
        if features.ATS:  # its permissions are collected, and D is set where it asks to write, and may
            with m.If(is_translation(key) & ~(work.is_second & (is_implicit if features.has_second_stage else 0))):
                m.d.comb += [
                    is_write.eq(key.is_write & entry.W & self.is_allowed),
                    granted.eq(work.is_second | first_may_use(leaf, key.execute, supervisor, SUM)),
                ]
        self.is_needed = ~entry.A | (is_write & ~entry.D)

    def begin(self, m, work):
        """Go on to the update of the entry at work; first to the second stage, if that must yet say whether the table may be written."""
        features, walk = work.features, work.walk
        m.d.sync += [work.next_ppn.eq(walk.table), walk.level.eq(walk.level)]
        m.next = "UPDATE"
        if features.has_second_stage:
            m.d.sync += walk.second_level.eq(walk.second_level)
            with m.If(~work.is_second & work.has_guest & ~walk.is_writing):
                m.d.sync += [work.next_ppn.eq(walk.guest_page), walk.is_writing.eq(1)]
                m.next = "BEGIN_SECOND"
                with m.If(walk.skipped):
                    m.d.sync += walk.is_writing.eq(0)
                    m.next = "BEGIN_TABLE"


def update_entry(m, work, walker, write_row, update, next_read):
    """Add the states that update the entry at work and take the answer; a compare that failed has read the entry anew."""
    walk, found, order = work.walk, work.doublewords[0], walker.memory_update.payload
    m.d.comb += [
        order.address.eq(next_read.read.address), order.cookie.eq(work.at),
        order.compare.eq(found), order.swap.eq(found | update.bits),
        write_row.data.table.eq(work.next_ppn), write_row.data.entry.eq(found), write_row.data.is_updating.eq(0),
    ]
    with m.State("UPDATE"):
        m.d.comb += walker.memory_update.valid.eq(1)
        with m.If(walker.memory_update.ready):
            m.d.comb += [write_row.en.eq(1), write_row.data.is_updating.eq(1)]
            m.next = "REST"
    with m.State("TAKE_UPDATE"):
        m.next = "TAKE_ENTRY"
        with m.If(found == walk.entry):
            m.d.sync += found.eq(found | update.bits)
        with m.Else():
            m.d.sync += walk.failures.eq(walk.failures + 1)
