"""What counters are told of the walker. [RVIOMMU1.0 6.23]"""

from ..spec import riscv_iommu as spec
from ..spec.riscv_iommu_registers import EventId
from .walker_state import Phase


def tell_events(m, work, fsm, events, may_begin, process_found):
    """Tell each miss and each walk of a table when it begins; one that begins at a remembered leaf table is one too.

    A miss is a walk that comes to its page tables, whoever joins it later, and each time when an update begins them anew. IDs are those
    known by then, and no process_id without process directories.
    """
    features, walk, context, key = work.features, work.walk, work.context, work.key
    begins_table, has_first = fsm.ongoing("BEGIN_TABLE"), context.fsc_mode != spec.MODE_BARE
    if features.AMO_HWAD and features.has_processes:  # else refused, before there is a walk
        begins_table &= ~key.supervisor | walk.ENS
    m.d.comb += [
        events.kinds[EventId.DDT_WALK].eq(fsm.ongoing("BEGIN_DIRECTORY") & may_begin),
        events.kinds[EventId.TLB_MISS].eq(begins_table & (has_first | work.has_guest)),
        events.kinds[EventId.FIRST_STAGE_WALK].eq(begins_table & has_first),
        events.device_id.eq(key.device_id), events.PSCV.eq(has_first), events.PSCID.eq(context.PSCID),
    ]  # fmt: skip
    if features.has_processes:
        m.d.comb += [
            events.kinds[EventId.PDT_WALK].eq(fsm.ongoing("LOOK_PROCESS") & ~process_found),
            events.process_id_valid.eq(key.process_id_valid), events.process_id.eq(key.process_id),
        ]  # fmt: skip
    if features.has_second_stage:
        is_for_table = (walk.phase == Phase.FIRST) | (walk.phase == Phase.LEAF)
        m.d.comb += [
            events.kinds[EventId.SECOND_STAGE_WALK].eq(fsm.ongoing("BEGIN_SECOND")),
            events.PSCV.eq(has_first & (begins_table | is_for_table)),
            events.GSCV.eq(work.has_guest), events.GSCID.eq(context.GSCID),
        ]  # fmt: skip
