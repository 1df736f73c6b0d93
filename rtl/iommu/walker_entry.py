"""The page-table entry at work, of either stage. [RVPRIV 10.3.2; RVIOMMU1.0 3.3.4]"""

from amaranth import Cat, Mux, Signal

from ..spec import riscv_iommu as spec
from ..tlp.layouts import BurstStatus
from .walker_state import Outcome, Phase


class EntryAtWork:
    """What the entry at work says, as values.

    Attributes
    ----------
    is_leaf, is_broken
        It is a leaf; it is of no use, whatever the access. That a leaf lacks A is not asked here with AMO_HWAD.
    reach, leaf_page
        Of a leaf: its size, and the page that it makes of the one that is translated.
    """

    def __init__(self, m, work):
        features, entry, level, page = work.features, work.entry, work.level, work.page
        self.is_leaf, self.is_broken, self.reach = Signal(), Signal(), Signal(3)
        low = Signal(9 * (features.levels - 1))  # page-number bits that the leaf covers, but for NAPOT
        with m.Switch(level):
            for n in range(1, features.levels):
                with m.Case(n):
                    m.d.comb += low.eq((1 << 9 * n) - 1)
        napot_ok = (level == 0) & (entry.PPN[:4] == spec.NAPOT_64K)
        unusable = ~entry.U & (work.is_second if features.has_processes else 1)
        if not features.AMO_HWAD:
            unusable = ~entry.A | unusable
        bad_type = (entry.PBMT == spec.PBMT_RESERVED) | (~self.is_leaf & (entry.PBMT != 0)) if features.Svpbmt else entry.PBMT != 0
        m.d.comb += [
            self.is_leaf.eq(entry.R | entry.X),
            self.reach.eq(Mux(level == 0, entry.N, level + 1)),
            self.is_broken.eq(
                ~entry.V | (~entry.R & entry.W) | (entry.reserved != 0) | bad_type
                | Mux(self.is_leaf, ((entry.PPN[: len(low)] & low) != 0) | (entry.N & ~napot_ok) | unusable,
                      (level == 0) | entry.N | entry.A | entry.D | entry.U)),
        ]
        covered = Signal.like(low)
        m.d.comb += covered.eq(low | Mux(entry.N, 0xF, 0))
        self.leaf_page = Cat((entry.PPN[: len(low)] & ~covered) | (page[: len(low)] & covered), entry.PPN[len(low) :])


def take_entry(m, work, judged, read, update):
    """Add the state that takes the entry ``judged``, which ``read`` brought: to the next level or stage, or to the end of the walk.

    ``update``, an :class:`.walker_update.UpdateAtWork`, is there with AMO_HWAD: then the walk ends where its access is not permitted.
    """
    features, walk, context, key = work.features, work.walk, work.context, work.key
    entry, mapped, next_ppn, is_second, fail = work.entry, work.mapped, work.next_ppn, work.is_second, work.fail
    first, two_stages = work.first, features.has_second_stage
    with m.State("TAKE_ENTRY"):
        m.d.sync += [
            mapped.vpn.eq(key.page), mapped.PSCID.eq(context.PSCID), mapped.G.eq(entry.G), mapped.ppn.eq(entry.PPN),
            mapped.readable.eq(entry.R), mapped.writable.eq(entry.W & entry.D), mapped.reach.eq(judged.reach), next_ppn.eq(entry.PPN),
        ]
        if features.has_processes:
            m.d.sync += [mapped.executable.eq(entry.X), mapped.U.eq(entry.U)]
        if features.Svpbmt:
            m.d.sync += mapped.PBMT.eq(entry.PBMT)
        if two_stages:
            m.d.sync += [mapped.first.eq(1), mapped.GV.eq(0), mapped.GSCID.eq(0), mapped.is_fragment.eq(0)]
        with m.If(is_second):
            if two_stages:
                m.d.sync += walk.second_level.eq(walk.second_level - 1)
        with m.Else():
            m.d.sync += walk.level.eq(walk.level - 1)
        no_page = fail(Mux(is_second, Outcome.GUEST_PAGE_FAULT, Outcome.PAGE_FAULT))
        m.next = "END_WALK"
        with m.If(work.status == BurstStatus.POISONED):
            m.d.sync += fail(Outcome.FAULT, Mux(read.is_process_read, spec.PDT_CORRUPTED, spec.PT_CORRUPTED))
        if update:
            with m.Elif(work.status == BurstStatus.REFUSED):
                m.d.sync += no_page
        with m.Elif(work.status != BurstStatus.OK):
            m.d.sync += fail(read.fault, read.cause)
        with m.Elif(judged.is_broken):
            m.d.sync += no_page
        with m.Elif(~judged.is_leaf):
            m.next = "READ"
            if features.ATS:
                m.d.sync += walk.is_global.eq(walk.is_global | (entry.G & ~is_second))
            if two_stages:
                with m.If(~is_second):
                    work.access(m)
                    if update:
                        m.d.sync += walk.is_writing.eq(0)
        if update:
            with m.Elif(~update.is_granted | (update.is_needed & ~update.is_allowed)):
                m.d.sync += no_page
            with m.Elif(update.is_needed):
                update.begin(m, work)
        with m.Elif(is_second):
            if two_stages:
                m.d.sync += [next_ppn.eq(judged.leaf_page), walk.phase.eq(walk.purpose), walk.second_level.eq(walk.second_level)]
                with m.If(walk.purpose == Phase.LEAF):
                    m.next = "COMBINE"
                with m.Elif(~entry.R):
                    m.d.sync += fail(Outcome.GUEST_PAGE_FAULT)
                with m.Else():
                    m.next = "READ"
        with m.Else():
            m.d.sync += [
                work.outcome.eq(Outcome.MAPPED),
                first.readable.eq(entry.R), first.writable.eq(entry.W & entry.D), first.executable.eq(entry.X),
                first.U.eq(entry.U), first.is_bare.eq(0),
            ]
            m.next = "KEEP_LEAF"
            if two_stages:
                m.d.sync += [
                    walk.reach.eq(judged.reach), walk.G.eq(entry.G), walk.PBMT.eq(entry.PBMT if features.Svpbmt else 0),
                ]
                with m.If(work.has_guest):
                    m.d.sync += [walk.phase.eq(Phase.LEAF), next_ppn.eq(judged.leaf_page)]
                    m.next = "FIND_MSI" if features.MSI_FLAT else "BEGIN_SECOND"
