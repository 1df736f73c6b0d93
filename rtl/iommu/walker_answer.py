"""What those who waited are answered, and what is reported of them."""

from amaranth import Cat, Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .debug import COOKIE as DEBUG_COOKIE
from .iotlb import superpages
from .layouts import Kind
from .walker_ats import complete_answer, is_translation
from .walker_msi import mrif_entry
from .walker_rules import first_grants, first_may_use
from .walker_second import entry_offset
from .walker_state import Outcome, Phase


def answered_page(m, work):
    """Return the physical page that ``mapped`` makes of the page asked for, and a mask: page-number bits that the mapping leaves alone."""
    mapped, key, pages = work.mapped, work.key, superpages(work.features)
    translated, inside = Signal(44), Signal(pages[-1][0])
    with m.Switch(mapped.reach):
        for n, (covered_bits, _) in enumerate(pages, 1):
            with m.Case(n):
                m.d.comb += inside.eq((1 << covered_bits) - 1)
    m.d.comb += translated.eq(Cat(
        (mapped.ppn[: len(inside)] & ~inside) | (key.page[: len(inside)] & inside), mapped.ppn[len(inside) :]))
    return translated, inside


def answer_subject(m, work, walker, subject, page, device_id, is_direct, translated):
    """Fill in answer and fault report for ``subject``, who asks for ``page``.

    Return whether nothing is to be recorded, whether a fault is recorded in any case, and whether what is permitted goes to an interrupt
    file in memory. A write is a write; what executes reads. [RVIOMMU1.0 2.3]
    """
    features, walk, mapped, second = work.features, work.walk, work.mapped, work.second
    processes = features.has_processes
    permitted = Signal()
    is_write, execute = subject.is_write, subject.execute
    if features.ATS:  # a translation request reads, or executes if there is a process
        is_write &= ~is_translation(subject)
        execute &= ~is_translation(subject) | subject.process_id_valid
    page_fault, access_fault, guest_fault, ttyp, second_allows = Signal(12), Signal(12), Signal(12), Signal(6), Signal()
    with m.If(is_write):
        m.d.comb += [
            page_fault.eq(spec.WRITE_PAGE_FAULT), access_fault.eq(spec.WRITE_ACCESS_FAULT), ttyp.eq(spec.TTYP_UNTRANSLATED_WRITE),
            guest_fault.eq(spec.WRITE_GUEST_PAGE_FAULT), second_allows.eq(second.writable),
        ]
    with m.Elif(execute):
        m.d.comb += [
            page_fault.eq(spec.INSTRUCTION_PAGE_FAULT), access_fault.eq(spec.INSTRUCTION_ACCESS_FAULT),
            ttyp.eq(spec.TTYP_UNTRANSLATED_EXECUTE), guest_fault.eq(spec.INSTRUCTION_GUEST_PAGE_FAULT),
            second_allows.eq(second.executable),
        ]
    with m.Else():
        m.d.comb += [
            page_fault.eq(spec.READ_PAGE_FAULT), access_fault.eq(spec.READ_ACCESS_FAULT), ttyp.eq(spec.TTYP_UNTRANSLATED_READ),
            guest_fault.eq(spec.READ_GUEST_PAGE_FAULT), second_allows.eq(second.readable),
        ]
    supervisor = subject.process_id_valid & subject.privileged
    who = (supervisor, walk.SUM) if processes else (Const(0, 1), Const(0, 1))
    first_allows = is_direct | first_grants(work.first, is_write, execute, *who)
    if features.ATS:
        with m.If(is_translation(subject)):
            m.d.comb += [ttyp.eq(spec.TTYP_TRANSLATION_REQUEST), second_allows.eq(1)]
        with m.Elif(subject.kind == Kind.TRANSLATED):
            m.d.comb += ttyp[2].eq(1)
        with m.Elif(subject.kind == Kind.MESSAGE):
            m.d.comb += ttyp.eq(spec.TTYP_MESSAGE)
        first_allows = Mux(is_translation(subject), is_direct | first_may_use(work.first, execute, *who), first_allows)
    subject_cause, is_guest_fault = Signal(12), Signal()
    with m.If((~is_direct & supervisor & ~walk.ENS) if processes else Const(0, 1)):
        m.d.comb += subject_cause.eq(spec.TYPE_DISALLOWED)
    with m.Elif(~first_allows):
        m.d.comb += subject_cause.eq(page_fault)
    with m.Elif(work.outcome == Outcome.FAULT):
        m.d.comb += subject_cause.eq(work.cause)
    with m.Elif((work.outcome == Outcome.ACCESS_FAULT) | ((work.outcome == Outcome.MAPPED) & work.is_msi & ~second_allows)):
        m.d.comb += subject_cause.eq(access_fault)
    with m.Elif(work.outcome == Outcome.PAGE_FAULT):
        m.d.comb += subject_cause.eq(page_fault)
    with m.Elif((work.outcome == Outcome.GUEST_PAGE_FAULT) | ~second_allows):
        m.d.comb += [subject_cause.eq(guest_fault), is_guest_fault.eq(1)]
    if features.DBG and features.MSI_MRIF:
        with m.Elif(work.is_mrif & (subject.cookie == DEBUG_COOKIE)):  # [RVIOMMU1.0 5]
            m.d.comb += subject_cause.eq(spec.TYPE_DISALLOWED)
    with m.Else():
        m.d.comb += permitted.eq(1)
    always_logged = Cat(subject_cause == number for number in spec.LOGGED_ALWAYS).any()
    answer, report = walker.o.payload, walker.faults.payload
    m.d.comb += [
        answer.cookie.eq(subject.cookie),
        answer.fault.eq(~permitted),
        report.cause.eq(subject_cause),
        report.ttyp.eq(ttyp),
        report.device_id.eq(device_id),
        report.process_id_valid.eq(subject.process_id_valid),
        report.process_id.eq(Mux(subject.process_id_valid, subject.process_id, 0)),
        report.privileged.eq(supervisor),
        report.iotval.eq(Cat(subject.offset, page)),
    ]
    if features.has_second_stage:
        with m.If(is_guest_fault & (walk.purpose == Phase.LEAF)):
            m.d.comb += report.iotval2.eq(Cat(Const(0, 2), subject.offset[2:], walk.guest_page))
        with m.Elif(is_guest_fault):
            is_write = walk.is_writing if features.AMO_HWAD else Const(0, 1)
            m.d.comb += report.iotval2.eq(Cat(Const(1, 1), is_write, entry_offset(m, work)[2:], walk.guest_page))
    goes_to_file = work.is_mrif
    if features.ATS:  # the device is told that it must not translate by itself
        goes_to_file &= ~is_translation(subject)
    if features.MSI_MRIF:
        target, file = walker.mrif.payload, mrif_entry(work)
        m.d.comb += [
            target.cookie.eq(subject.cookie), target.address.eq(file.address), target.NPPN.eq(file.NPPN),
            target.NID.eq(Cat(file.NID_low, file.NID_high)), target.is_silent.eq(work.dtf),
            *(target[name].eq(report[name]) for name in ("device_id", "process_id_valid", "process_id", "privileged", "iotval")),
            target.is_translated.eq((subject.kind == Kind.TRANSLATED) if features.ATS else 0),
        ]  # fmt: skip
    with m.If(~permitted):
        m.d.comb += answer.cause.eq(subject_cause)
    with m.Elif(work.identity):
        m.d.comb += [answer.page.eq(page), answer.readable.eq(1), answer.writable.eq(1), answer.size_log2.eq(63)]
    if features.MSI_MRIF:
        with m.Elif(goes_to_file):
            m.d.comb += answer.size_log2.eq(spec.MRIF_LOG2)
    with m.Else():
        m.d.comb += [answer.page.eq(translated), answer.readable.eq(mapped.readable), answer.writable.eq(mapped.writable)]
        if features.Svpbmt:
            m.d.comb += answer.PBMT.eq(mapped.PBMT)
        with m.Switch(mapped.reach):
            with m.Case(0):
                m.d.comb += answer.size_log2.eq(spec.PAGE_BITS)
            for n, (_, size) in enumerate(superpages(features), 1):
                with m.Case(n):
                    m.d.comb += answer.size_log2.eq(size)
    if features.ATS:
        permitted |= complete_answer(m, work, walker, subject, subject_cause, permitted, is_direct)
    return permitted, always_logged, goes_to_file
