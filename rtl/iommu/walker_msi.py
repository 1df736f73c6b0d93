"""MSI page tables."""

from amaranth import Cat, Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .walker_second import tags
from .walker_state import MSI, Outcome, Phase


def translate_msi(m, work, number):
    """Add the states of MSI page tables: the guest page in ``next_ppn`` is that of interrupt file ``number``. [RVIOMMU1.0 3.3.3]"""
    features, walk, context, next_ppn, mapped = work.features, work.walk, work.context, work.next_ppn, work.mapped
    first, second, entry = walk.first, work.second, spec.MsiEntry(work.doublewords[0])
    bits = features.guest_page_bits
    page, mask, weight = Signal(bits), Signal(bits), Signal(bits)
    with m.State("FIND_MSI"):
        m.d.sync += [page.eq(next_ppn), mask.eq(context.msi_mask), weight.eq(1), number.eq(0)]
        m.next = "BEGIN_SECOND"
        differs = (next_ppn ^ context.msi_pattern) & Cat(~context.msi_mask, Const(-1, 52 - bits))
        with m.If(context.msi_on & ~differs.any()):
            m.d.sync += [walk.guest_page.eq(next_ppn), walk.purpose.eq(Phase.LEAF)]
            m.next = "EXTRACT"
    with m.State("EXTRACT"):  # a bit of the mask per cycle
        m.d.sync += [page.eq(page >> 1), mask.eq(mask >> 1)]
        with m.If(mask[0]):
            m.d.sync += weight.eq(weight << 1)
            with m.If(page[0]):
                m.d.sync += number.eq(number | weight)
        with m.If(~mask.any()):
            m.d.sync += [next_ppn.eq(context.msi_ppn | number[8:]), walk.phase.eq(Phase.MSI)]
            m.next = "READ"
    with m.State("TAKE_MSI"):
        m.d.sync += [
            work.is_msi.eq(1), second.readable.eq(1), second.writable.eq(1), second.executable.eq(0),
            mapped.readable.eq(first.readable), mapped.writable.eq(first.writable), mapped.ppn.eq(entry.PPN), mapped.reach.eq(0),
            mapped.is_fragment.eq(~first.is_bare & (walk.reach != 0)), *tags(work),
        ]
        if features.has_processes:
            m.d.sync += [mapped.executable.eq(0), mapped.U.eq(first.U)]
        if features.Svpbmt:
            m.d.sync += mapped.PBMT.eq(walk.PBMT)
        is_bad = (entry.M != spec.MSI_TRANSLATE) | entry.reserved_low.any() | entry.reserved_high.any()
        if features.MSI_MRIF:
            file = mrif_entry(work)
            is_file = entry.M == spec.MSI_MRIF
            reserved = (file.reserved_low, file.reserved_high, file.reserved_notice, file.reserved_notice_high)
            is_bad = Mux(is_file, Cat(reserved).any(), is_bad)
        work.refuse(m, MSI, entry.V, entry.C | is_bad)
        with m.Else():
            m.d.sync += work.outcome.eq(Outcome.MAPPED)
            m.next = "KEEP_LEAF"
            if features.MSI_MRIF:
                with m.If(is_file):  # of which no cache knows
                    m.d.sync += work.is_mrif.eq(1)
                    m.next = "END_WALK"


def mrif_entry(work):
    """Return the MSI page-table entry at work, as one in MRIF mode."""
    return spec.MrifEntry(Cat(work.doublewords[:2]))
