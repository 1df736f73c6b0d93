"""What translation requests of devices that cache translations are answered. [RVIOMMU1.0 3.6]"""

from amaranth import Cat, Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .layouts import AtsStatus, Kind


def is_translation(asked):
    """Return whether ``asked``, a request, the key of a walk or one who waits for it, is a translation request."""
    return asked.kind == Kind.TRANSLATION


def complete_answer(m, work, walker, subject, cause, permitted, is_direct):
    """Add to the answer what ATS needs of it; return whether the fault of ``subject`` is no failure: a page that it may not use."""
    features, walk, answer = work.features, work.walk, walker.o.payload
    ours, is_success, no_access, is_used = is_translation(subject), Signal(), Signal(), Signal()
    is_msi = work.is_msi if features.MSI_FLAT else Const(0, 1)
    is_mapped = ~work.identity & ~is_direct
    answers_gpa = work.context.T2GPA & is_mapped if features.T2GPA else Const(0, 1)
    supervisor, execute = subject.process_id_valid & subject.privileged, subject.process_id_valid & subject.execute
    m.d.comb += [
        no_access.eq(ours & Cat(cause == number for number in spec.ANSWERED_BY_NO_ACCESS).any()),
        is_success.eq(permitted | no_access), is_used.eq(ours & permitted), answer.kind.eq(subject.kind),
        answer.PRPR.eq(permitted & (subject.kind == Kind.MESSAGE) & Mux(is_direct, walker.context.PRPR, work.context.PRPR)),
    ]
    with m.If(ours):
        m.d.comb += [answer.fault.eq(~is_success), answer.privileged.eq(supervisor & is_success)]
        with m.If(~is_success):
            is_unsupported = Cat(cause == number for number in spec.ANSWERED_AS_UNSUPPORTED).any()
            m.d.comb += answer.status.eq(AtsStatus.COMPLETER_ABORT)
            with m.If(is_unsupported):
                m.d.comb += answer.status.eq(AtsStatus.UNSUPPORTED_REQUEST)
    with m.If(is_used):
        may_execute = is_direct | (work.first.executable & work.second.executable)
        m.d.comb += [
            answer.executable.eq(execute & answer.readable & may_execute),
            answer.is_global.eq(
                subject.process_id_valid & is_mapped & ~is_msi & ~work.first.is_bare & (work.mapped.G | walk.is_global)),
            answer.untranslated_only.eq(work.is_mrif),
            answer.CXL_io.eq(subject.is_CXL & ((is_mapped & (is_msi | (answer.PBMT != 0))) | answers_gpa)),
        ]
        with m.If(~is_mapped):
            m.d.comb += answer.size_log2.eq(spec.BARE_SIZE_LOG2)
    if features.T2GPA:
        with m.If(is_used & answers_gpa):
            m.d.comb += answer.page.eq(walk.guest_page)
    return no_access
