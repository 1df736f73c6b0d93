"""Second-stage translation: guest physical to supervisor physical addresses. [RVIOMMU1.0 3.3 step 19] [RVPRIV Hypervisor]"""

from __future__ import annotations

from ..memory import Gpa, Spa
from .entries import IOHGATP_BARE, SECOND_STAGE
from .faults import AccessType, Cause, TranslationFault
from .hpm import Event
from .page_walk import Stage, walk_table
from .walk_state import Leaf, Walk

__all__ = ["second_stage", "table_address"]


def second_stage(walk: Walk, gpa: Gpa, *, implicit: AccessType | None = None, causes: tuple[Cause, Cause] | None = None) -> Leaf:
    """[RVPRIV "Guest Physical Address Translation"] of the request itself, or of an ``implicit`` READ or WRITE for it.

    ``causes`` are the access fault and the data corruption that an entry gives; by default those of the request. Guest
    page faults are those of the request's own access, with the address and the kind of implicit access in iotval2.
    """
    context, request = walk.context, walk.request
    if context.iohgatp_mode == IOHGATP_BARE:
        return Leaf(gpa)
    scheme = SECOND_STAGE[walk.gxl][context.iohgatp_mode]
    walk.count(Event.SECOND_STAGE_WALK)

    def guest_page_fault(step: str, why: str) -> TranslationFault:
        flags = 0 if implicit is None else 1 | (implicit is AccessType.WRITE) << 1
        return walk.fault(f"RVPRIV {scheme.name} {step}", request.fault_access.guest_page_fault, why, gpa & ~3 | flags)

    # bits above the widened address are 0; with SXL = 1 [RVIOMMU1.0 3.1.3.1] so are those above bit 33
    if not scheme.accepts(gpa) or (context.SXL and gpa >> 34):
        raise guest_page_fault("step 0", "a bit of the GPA above the translated ones is set")
    return walk_table(walk, Stage(
        scheme, context.iohgatp_root, walk.order,
        access=implicit or request.fault_access,
        is_checked=implicit is not None or request.is_checked,
        wants_write=implicit is AccessType.WRITE if implicit else request.wants_write,
        updates=context.GADE and walk.implementation.atomics,
        page_fault=guest_page_fault,
        causes=causes or (request.fault_access.access_fault, Cause.PT_DATA_CORRUPTION),
        # every access is a user's
        refuses_user=lambda user: None if user else "U is 0",
        locate=lambda at, is_written: Spa(at),
    ), gpa)


def table_address(walk: Walk, gpa: int, is_written: bool, causes: tuple[Cause, Cause]) -> Spa:
    """Return where a first-stage or directory table's entry is in memory: an implicit access through the second stage."""
    if walk.context.iohgatp_mode == IOHGATP_BARE:
        return Spa(gpa)
    return Spa(second_stage(walk, Gpa(gpa), implicit=AccessType.WRITE if is_written else AccessType.READ, causes=causes).address)
