"""Device contexts and process contexts."""

from amaranth import Cat, Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .layouts import Kind
from .walker_rules import is_refused, needs_process, passes_first
from .walker_state import DDT, PDT, Outcome, Phase


def _first_mode_ok(mode, features):
    """Return whether ``mode`` is one of iosatp that is there."""
    modes = ((spec.MODE_BARE, True), (spec.MODE_SV39, True), (spec.MODE_SV48, features.Sv48), (spec.MODE_SV57, features.Sv57))
    return Cat(mode == number for number, has in modes if has).any()


def judge_context(m, work):
    """Return what to keep of the device context in ``doublewords``, by name, and whether it is misconfigured. [RVIOMMU1.0 3.1.4]"""
    features, doublewords = work.features, work.doublewords
    found = spec.DeviceContext(Cat(doublewords[:4]))
    kept = {"fsc_mode": found.fsc_mode, "root_ppn": found.fsc_ppn, "PSCID": found.PSCID, "DTF": found.DTF, "PDTV": found.PDTV}
    directories = ((spec.MODE_BARE, True), (spec.MODE_PD8, features.PD8), (spec.MODE_PD17, features.PD17),
                   (spec.MODE_PD20, features.PD20))  # fmt: skip
    guests = ((spec.MODE_BARE, True), (spec.MODE_SV39, features.Sv39x4), (spec.MODE_SV48, features.Sv48x4),
              (spec.MODE_SV57, features.Sv57x4))  # fmt: skip
    has_guest = found.iohgatp_mode != spec.MODE_BARE
    ats = [found.EN_ATS, found.EN_PRI, found.T2GPA, found.PRPR]
    if features.ATS:
        no_guest_addresses = ~has_guest if features.T2GPA else 1
        ats = [~found.EN_ATS & (found.T2GPA | found.EN_PRI), ~found.EN_PRI & found.PRPR, found.T2GPA & no_guest_addresses]
    faults = [
        *ats, *([] if features.AMO_HWAD else [found.GADE, found.SADE]),
        found.SBE, found.SXL, found.DPE & ~found.PDTV,
        found.tc_reserved.any(), found.tc_reserved_high.any(), found.ta_reserved.any(), found.ta_reserved_high.any(),
        found.fsc_reserved.any(),
        ~Cat(found.iohgatp_mode == number for number, has in guests if has).any(),
        has_guest & found.iohgatp_ppn[:2].any(),
        found.PDTV & ~Cat(found.fsc_mode == number for number, has in directories if has).any(),
        ~found.PDTV & ~_first_mode_ok(found.fsc_mode, features),
    ]
    if features.AMO_HWAD:
        kept |= {"SADE": found.SADE, "GADE": found.GADE}
    if features.ATS:
        kept |= {"EN_ATS": found.EN_ATS, "EN_PRI": found.EN_PRI, "PRPR": found.PRPR}
    if features.T2GPA:
        kept |= {"T2GPA": found.T2GPA}
    if features.has_processes:
        kept |= {"DPE": found.DPE}
    if features.has_second_stage:
        kept |= {"guest_root_ppn": found.iohgatp_ppn, "GSCID": found.GSCID, "guest_mode": found.iohgatp_mode}
    if features.MSI_FLAT:
        msi, bits = spec.MsiContext(Cat(doublewords[4:])), features.guest_page_bits
        is_on = msi.msiptp_mode != spec.MODE_BARE
        kept |= {"msi_on": is_on, "msi_ppn": msi.msiptp_ppn, "msi_mask": msi.mask[:bits], "msi_pattern": msi.pattern[:bits]}
        faults += [
            msi.msiptp_reserved.any(), is_on & ((msi.msiptp_mode != spec.MODE_FLAT) | ~has_guest), msi.mask[bits:].any(),
            msi.mask_reserved.any(), msi.pattern[bits:].any(), msi.pattern_reserved.any(), msi.reserved.any(),
        ]
    is_bad = Signal()
    m.d.comb += is_bad.eq(Cat(faults).any())
    return kept, is_bad


def take_context(m, work, walker, found, is_bad, is_fetching, wake):
    """Add the states that take an entry of the device directory and a device context; ``found``, ``is_bad`` as of :func:`judge_context`."""
    features, walk, context, key = work.features, work.walk, work.context, work.key
    with m.State("TAKE_DIRECTORY"):
        m.d.sync += [work.next_ppn.eq(work.directory.PPN), walk.level.eq(walk.level - 1)]
        work.refuse(m, DDT, work.directory.V, (work.directory.reserved_low != 0) | (work.directory.reserved_high != 0))
        with m.Else():
            with m.If(walk.level == 1):
                m.d.sync += walk.phase.eq(Phase.CONTEXT)
            m.next = "READ"
    with m.State("TAKE_CONTEXT"):
        m.d.sync += [context.device_id.eq(key.device_id), *(context[name].eq(value) for name, value in found.items())]
        work.refuse(m, DDT, work.doublewords[0][0], is_bad)
        with m.Else():
            m.d.sync += work.dtf.eq(found["DTF"])
            m.next = "USE_CONTEXT"
    with m.State("USE_CONTEXT"):
        m.d.comb += [walker.fill_context.valid.eq(~work.is_stale), wake.eq(is_fetching)]
        m.d.sync += is_fetching.eq(0)
        if features.has_processes or features.ATS:
            m.next = "PLAN"
        else:
            m.next = "BEGIN_TABLE"
            with m.If(key.process_id_valid & ~context.PDTV):
                m.d.sync += work.fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
                m.next = "END_WALK"
            if not features.has_second_stage:
                with m.Elif(context.fsc_mode == spec.MODE_BARE):
                    m.d.sync += [work.outcome.eq(Outcome.MAPPED), work.identity.eq(1)]
                    m.next = "END_WALK"


def plan(m, work):
    """Add the state that decides what the device context makes of the request. [RVIOMMU1.0 3.3 steps 7 to 13]"""
    features, context, key = work.features, work.context, work.key
    with m.State("PLAN"):
        m.d.sync += work.dtf.eq(context.DTF)
        m.next = "BEGIN_TABLE"
        with m.If(is_refused(context, key, features)):
            m.d.sync += work.fail(Outcome.FAULT, spec.TYPE_DISALLOWED)
            m.next = "END_WALK"
        if features.ATS:
            with m.Elif(passes_first(key, features)):
                m.d.sync += [context.fsc_mode.eq(spec.MODE_BARE), work.outcome.eq(Outcome.MAPPED), work.identity.eq(1)]
                goes_on = (key.kind == Kind.TRANSLATED) & context.T2GPA if features.T2GPA else Const(0, 1)
                with m.If(~goes_on):
                    m.next = "END_WALK"
        if features.has_processes:
            with m.Elif(needs_process(context, key, features)):
                m.next = "LOOK_PROCESS"
            with m.Elif(context.PDTV):
                m.d.sync += context.fsc_mode.eq(spec.MODE_BARE)


def find_process(m, work, walker):
    """Add the states that find process contexts. [RVIOMMU1.0 3.3 steps 14 to 16, 3.3.2]"""
    features, walk, context, key, next_ppn = work.features, work.walk, work.context, work.key, work.next_ppn
    directory, found = work.directory, spec.ProcessContext(Cat(work.doublewords[:2]))
    kept = walker.fill_process.payload
    m.d.comb += [
        kept.device_id.eq(key.device_id), kept.process_id.eq(key.process_id), kept.fsc_mode.eq(context.fsc_mode),
        kept.root_ppn.eq(context.root_ppn), kept.PSCID.eq(context.PSCID), kept.ENS.eq(walk.ENS), kept.SUM.eq(walk.SUM),
    ]
    with m.State("LOOK_PROCESS"):
        with m.If(walker.process_found):
            m.d.sync += [
                *(context[name].eq(walker.process[name]) for name in ("fsc_mode", "root_ppn", "PSCID")),
                walk.ENS.eq(walker.process.ENS), walk.SUM.eq(walker.process.SUM),
            ]
            m.next = "BEGIN_TABLE"
        with m.Else():
            m.d.sync += [
                walk.level.eq(context.fsc_mode - 1), next_ppn.eq(context.root_ppn),
                walk.phase.eq(Mux(context.fsc_mode == spec.MODE_PD8, Phase.PROCESS_CONTEXT, Phase.PROCESS)),
            ]
            work.access(m)
    with m.State("TAKE_PROCESS"):
        m.d.sync += [next_ppn.eq(directory.PPN), walk.level.eq(walk.level - 1)]
        work.refuse(m, PDT, directory.V, (directory.reserved_low != 0) | (directory.reserved_high != 0))
        with m.Else():
            with m.If(walk.level == 1):
                m.d.sync += walk.phase.eq(Phase.PROCESS_CONTEXT)
            work.access(m)
    with m.State("TAKE_PROCESS_CONTEXT"):
        reserved = found.ta_reserved.any() | found.ta_reserved_high.any() | found.fsc_reserved.any()
        work.refuse(m, PDT, found.V, reserved | ~_first_mode_ok(found.fsc_mode, features))
        with m.Else():
            m.d.sync += [
                context.fsc_mode.eq(found.fsc_mode), context.root_ppn.eq(found.fsc_ppn), context.PSCID.eq(found.PSCID),
                walk.ENS.eq(found.ENS), walk.SUM.eq(found.SUM),
            ]
            m.next = "KEEP_PROCESS"
    with m.State("KEEP_PROCESS"):
        m.d.comb += walker.fill_process.valid.eq(~work.is_stale)
        m.next = "BEGIN_TABLE"
