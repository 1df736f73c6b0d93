"""First-stage translation: IOVAs to guest physical addresses, or physical ones without second stage. [RVIOMMU1.0 3.3 step 17]"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .entries import FIRST_STAGE, IOSATP_BARE, Scheme
from .faults import Cause, TranslationFault
from .hpm import Event
from .page_walk import Stage, walk_table
from .second_stage import table_address
from .walk_state import Leaf, Walk

__all__ = ["FirstStage", "first_stage"]


@dataclass(frozen=True)
class FirstStage:
    """Which first stage a request uses: iosatp's MODE and root, PSCID, and SUM of the process context."""

    mode: int = IOSATP_BARE
    root: int = 0
    pscid: int = 0
    sum: bool = False


def first_stage(walk: Walk, plan: FirstStage) -> Leaf:
    """[RVPRIV "Two-Stage Address Translation"] the first stage alone."""
    context, request, iova, mode = walk.context, walk.request, walk.request.iova, plan.mode
    if mode == IOSATP_BARE:
        return Leaf(iova)
    scheme: Scheme = FIRST_STAGE[context.SXL][mode]
    walk.count(Event.FIRST_STAGE_WALK)
    causes = request.fault_access.access_fault, Cause.PT_DATA_CORRUPTION

    def page_fault(step: str, why: str) -> TranslationFault:
        return walk.fault(f"RVPRIV {scheme.name} {step}", request.fault_access.page_fault, why)

    def refuses_user(user: bool) -> str | None:
        if not request.is_supervisor:
            return None if user else "U is 0"
        # [RVIOMMU1.0 3.2.3] supervisors use pages of users when SUM is 1, and never execute them
        if user and request.is_exec:
            return "a supervisor may not execute a page with U = 1"
        return "U is 1 and SUM is 0" if user and not plan.sum else None

    # the high bits of the address, as the format wants them
    if not scheme.accepts(iova):
        raise page_fault("step 0", f"bits 63:{scheme.address_bits - 1} of the IOVA are not all equal" if scheme.pte_bytes == 8
                         else "a bit above 31 of the IOVA is set")
    leaf = walk_table(walk, Stage(
        scheme, plan.root, walk.guest_order,
        access=request.fault_access,
        is_checked=request.is_checked,
        wants_write=request.wants_write,
        updates=context.SADE and walk.implementation.atomics,
        page_fault=page_fault,
        causes=causes,
        refuses_user=refuses_user,
        locate=lambda at, is_written: table_address(walk, at, is_written, causes),
    ), iova)
    if context.iohgatp_mode:
        walk.note("3.3 step 17", f"A = {leaf.address:#x}")
    return replace(leaf, executable=False) if leaf.user and request.is_supervisor else leaf
