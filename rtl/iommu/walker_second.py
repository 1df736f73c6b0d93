"""The second stage, and what both stages make of a page together."""

from amaranth import Cat, Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .walker_read import process_offset
from .walker_rules import is_guest_page
from .walker_state import Outcome, Phase


def entry_offset(m, work):
    """Return where in its page the entry lies that the second stage was asked for."""
    features, walk, page = work.features, work.walk, work.key.page
    offset = Signal(12, name="entry_offset")
    with m.Switch(walk.level):
        for n in range(features.first_levels):
            with m.Case(n):
                m.d.comb += offset.eq(Cat(Const(0, 3), page[9 * n : 9 * n + 9]))
    if features.has_processes:
        with m.If((walk.purpose == Phase.PROCESS) | (walk.purpose == Phase.PROCESS_CONTEXT)):
            m.d.comb += offset.eq(process_offset(walk))
    return offset


def begin_second(m, work, tables):
    """Add the states that begin the second stage for the guest page in ``next_ppn``. [RVPRIV 18.5]"""
    features, walk, context, next_ppn, fail = work.features, work.walk, work.context, work.next_ppn, work.fail
    page = walk.guest_page
    with m.State("BEGIN_SECOND"):
        m.d.sync += [page.eq(next_ppn), walk.purpose.eq(walk.phase), walk.phase.eq(Phase.SECOND), work.dtf.eq(context.DTF)]
        m.next = "LOOK_SECOND"
    with m.State("LOOK_SECOND"):
        top = Signal(2)
        with m.Switch(context.guest_mode):
            for number, levels in spec.LEVELS.items():
                if levels <= features.second_levels:
                    with m.Case(number):
                        m.d.comb += top.eq(page[9 * levels : 9 * levels + 2])
        m.d.sync += [
            walk.second_level.eq(Mux(tables.known, 0, context.guest_mode[:2] + 2)),
            next_ppn.eq(Mux(tables.known, tables.ppn, Cat(top, context.guest_root_ppn[2:]))),
        ]
        m.next = "READ"
        with m.If(~is_guest_page(page, context.guest_mode, features)):
            m.d.sync += fail(Outcome.GUEST_PAGE_FAULT)
            m.next = "END_WALK"


def tags(work):
    """Return assignments of page and address space to what two stages make of a page."""
    walk, context, mapped = work.walk, work.context, work.mapped
    is_bare = walk.first.is_bare
    return [
        mapped.vpn.eq(walk.key.page), mapped.first.eq(~is_bare), mapped.PSCID.eq(Mux(is_bare, 0, context.PSCID)), mapped.G.eq(walk.G),
        mapped.GV.eq(1), mapped.GSCID.eq(context.GSCID),
    ]


def combine(m, work, reach, inside):
    """Add the states that make one translation of two stages."""
    features, walk, context, entry, mapped = work.features, work.walk, work.context, work.entry, work.mapped
    first, second = walk.first, work.second
    with m.State("COMBINE"):
        second_reach = Signal(3)
        m.d.comb += second_reach.eq(Mux(walk.second_level == 0, entry.N, walk.second_level + 1))
        writable = entry.W & entry.D
        m.d.sync += [
            work.outcome.eq(Outcome.MAPPED),
            second.readable.eq(entry.R), second.writable.eq(writable), second.executable.eq(entry.X),
            mapped.readable.eq(first.readable & entry.R), mapped.writable.eq(first.writable & writable),
            mapped.ppn.eq(work.next_ppn), mapped.reach.eq(Mux(walk.reach < second_reach, walk.reach, second_reach)),
            mapped.is_fragment.eq(~first.is_bare & (walk.reach > second_reach)), *tags(work),
        ]
        if features.has_processes:
            m.d.sync += [mapped.executable.eq(first.executable & entry.X), mapped.U.eq(first.U)]
        if features.Svpbmt:
            m.d.sync += mapped.PBMT.eq(Mux(walk.PBMT != 0, walk.PBMT, entry.PBMT))
        m.next = "CUT" if features.MSI_FLAT else "KEEP_LEAF"
    if features.MSI_FLAT:
        with m.State("CUT"):  # a larger page in which a virtual interrupt file lies
            bits = features.guest_page_bits
            outside = Cat(~inside, Const(-1, bits))[:bits]
            fixed = (walk.guest_page[:bits] ^ context.msi_pattern) & ~context.msi_mask & outside
            with m.If(context.msi_on & (mapped.reach != 0) & ~fixed.any()):
                m.d.sync += [mapped.reach.eq(0), mapped.is_fragment.eq(mapped.first)]
            m.next = "KEEP_LEAF"
