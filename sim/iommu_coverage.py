"""What a lock-step run of the IOMMU has come across: rows by name with a count, among them each that this IOMMU can come to."""

import re
from collections import Counter

from ..models.iommu.commands import AtsInval, AtsPrgr, IodirInvalDdt, IodirInvalPdt, IofenceC, IotinvalGvma, IotinvalVma
from ..models.iommu.entries import PTE_D
from ..models.iommu.faults import Cause, TransactionType

__all__ = ["Coverage", "refused_message", "through", "updated", "with_devices"]

_NAMED_BY_ACCESS = {1: 1, 12: 1, 20: 1, 5: 2, 13: 2, 21: 2, 7: 3, 15: 3, 23: 3, 264: 3, 271: 3}  # cause -> TTYP
_DETAIL = re.compile(r" 0x[0-9a-f]+| \d+ bits$| LVL\d supports$|(?<=^bits) [\d:]+| of level \d| \d+(?= at)")
_UPDATE = re.compile(r"PTE of level \d becomes (\w+)")
_UNREADABLE = re.compile(r"(.*?) ?at is (poisoned|unmapped)")

# [RVPRIV Sv39] what may be wrong with an entry of a page table, or the address in front of the first.
_ENTRY = ("step 3: V is 0", "step 3: W is 1 and R is 0", "step 3: a reserved bit is set", "step 3: PBMT is 3",
          "step 3: the NAPOT encoding is reserved", "step 4: the entry is not a leaf", "step 6: U is 0",
          "step 8: no read permission", "step 9: A is 0")  # fmt: skip
_PAGE = ("step 3: N is set on a superpage or pointer", "step 3: A, D or U is set on a pointer", "step 5: superpage is misaligned",
         "step 8: no write permission", "step 8: no exec permission", "step 9: D is 0")  # fmt: skip
_PROCESS = ("step 6: a supervisor may not execute a page with U = 1", "step 6: U is 1 and SUM is 0")


def _causes(has, processes):
    """Yield (row, reason why this IOMMU cannot come to it, or None) of causes by type of access. [RVIOMMU1.0 4.2]"""
    reasons = {
        Cause.READ_ADDRESS_MISALIGNED: "no access is refused for its alignment",
        Cause.WRITE_ADDRESS_MISALIGNED: "no access is refused for its alignment",
        Cause.MRIF_ACCESS_FAULT: None if has.MSI_MRIF else "MSI_MRIF is 0",
        Cause.MRIF_DATA_CORRUPTION: None if has.MSI_MRIF else "MSI_MRIF is 0",
        Cause.INTERNAL_DATA_PATH_ERROR: "nothing inside is checked",
    }  # fmt: skip
    for cause in Cause:
        reason = reasons.get(cause)
        if "GUEST" in cause.name and not has.Sv39x4:
            reason = "there is no second stage"
        elif cause.name.startswith("MSI_P") and not has.MSI_FLAT:
            reason = "MSI_FLAT is 0"
        elif cause.name.startswith("PDT_") and not processes:
            reason = "there are no process directories"
        for ttyp in (1, 2, 3) if cause != Cause.IOMMU_MSI_WRITE_ACCESS_FAULT else (0,):
            if _NAMED_BY_ACCESS.get(int(cause), ttyp) == ttyp:
                yield _cause(cause, ttyp), reason


def _cause(cause, ttyp):
    return f"cause {int(cause):3} {Cause(cause).name}, TTYP {ttyp:d}"


def _checks(has, processes):
    """Yield rows and reasons likewise: of device and process contexts. [RVIOMMU1.0 3.1.4, 3.2.4]"""
    no_flat, all_modes = (None if has.MSI_FLAT else "MSI_FLAT is 0"), has.Sv48 and has.Sv57
    reasons = {
        **({2: "ATS is 1"} if has.ATS else {}), **({6: "T2GPA is 1"} if has.T2GPA else {}),
        10: "each iosatp.MODE is offered" if all_modes else None, 14: "each iohgatp.MODE is offered" if has.Sv57x4 else None,
        15: "fctl.GXL is 0", 16: no_flat, 17: None if has.Sv39x4 else "iohgatp.MODE can be Bare only", 21: "counted as 19: END is 0",
        18: "AMO_HWAD is 1" if has.AMO_HWAD else None, 22: "QOSID is 0: RCID and MCID are reserved bits of check 1", 23: no_flat,
    }  # fmt: skip
    for number in range(1, 24):
        yield f"device context check {number}", reasons.get(number)
    for number in range(1, 5):
        reasons = {3: "each fsc.MODE is offered" if all_modes else None, 4: "SXL is 0"}
        yield f"process context check {number}", reasons.get(number) if processes else "there are no process directories"


def _steps(has, processes):
    """Yield rows that this IOMMU can come to: steps of the walk, entries that cannot be read."""
    yield from ("3.3 step 1: ddtp is Off", "3.3 step 5: device_id is wider than", "3.3 step 7: process_id without PDTV",
                "3.3.1 step 5: V is 0", "3.3.1 step 6: a reserved bit is set", "3.3.1 step 9: tc.V is 0")  # fmt: skip
    unreadable, pages = ["DDT entry", "device context", "first-stage PTE"], ["first stage, page"]
    if has.Sv39x4:
        pages += ["second stage, page", "second stage, table"]
        unreadable.append("second-stage PTE")
    for page in pages:
        # Pointers to a guest's tables and large pages of them are not spoilt: nothing of the guest would be left.
        yield from (f"{page}, {check}" for check in (*_ENTRY, *(_PAGE if page.endswith("page") else ())))
        if not has.Svpbmt:
            yield from (f"{page}, step 3: PBMT is {pbmt}" for pbmt in (1, 2))
        high = "a bit of the GPA above the translated ones is set" if "second" in page else "bits of the IOVA are not all equal"
        yield f"{page}, step 0: {high}"
    if processes:
        unreadable += ["PDT entry", "process context"]
        yield from (f"first stage, page, {check}" for check in _PROCESS)
        yield from ("3.3 step 7: process_id is wider than",) if has.PD8 or has.PD17 else ()
        yield from ("3.3 step 15: supervisor request and ENS is 0", "3.3.2 step 7: V is 0",
                    "3.3.2 step 8: a reserved bit is set", "3.3.2 step 11: ta.V is 0")  # fmt: skip
    if has.MSI_FLAT:
        unreadable.append("MSI PTE")
        yield from ("3.3.3 step 9: V is 0", "3.3.3 step 10: C is 1", "3.3.3 step 12: M is 0", "3.3.3 step 12: M is 2",
                    "3.3.3 step 13: a reserved bit is set",
                    f"3.3.3 step 14: {'a reserved bit is set' if has.MSI_MRIF else 'M is 1 without MSI_MRIF'}",
                    "3.3.3 step 15: a virtual interrupt file is not executable")  # fmt: skip
    yield from (f"{what} {how}" for what in unreadable for how in ("poisoned", "unmapped"))


def _around(has, processes):
    """Yield rows of translations, commands, queues, records and races."""
    largest = 48 if has.Sv57 else 39 if has.Sv48 else 30
    yield from (through(1 << size) for size in (12, 16, 21, 30, 39, 48, 64) if size <= largest or size == 64)
    yield from (f"memory type {pbmt}" for pbmt in (1, 2) if has.Svpbmt)
    yield from ("interrupt file",) if has.MSI_FLAT else ()
    yield from ("message recorded", "no message: ignored", "notice out of reach") if has.MSI_MRIF else ()
    yield "no record: DTF"
    for guest in ("", " GV") if has.Sv39x4 else ("",):
        yield from (f"IOTINVAL.VMA{guest}{operands}" for operands in ("", " AV", " PSCV", " AV PSCV"))
    yield from ("IODIR.INVAL_DDT", "IODIR.INVAL_DDT DV", "IOFENCE.C AV")
    yield from ("IOTINVAL.GVMA", "IOTINVAL.GVMA GV", "IOTINVAL.GVMA GV AV") if has.Sv39x4 else ()
    yield from ("IODIR.INVAL_PDT DV",) if processes else ()
    yield from ("cqcsr.cqmf", "cqcsr.cmd_ill", "fqcsr.fqmf", "fqcsr.fqof")
    yield from ("race: as it was", "race: as it is")
    if has.HPM:
        yield from (f"event {event} counted" for event in (1, 4, 5, *([6] if processes else []), 7, *([8] if has.Sv39x4 else [])))
        yield from ("overflow of an event counter", "overflow of the counter of cycles")
    if has.AMO_HWAD:
        yield from (f"{stage} stage: {bit} set" for stage in ("first", "second") if stage == "first" or has.Sv39x4 for bit in "AD")
        yield "update: the entry has changed"
    yield from with_devices(has) if has.ATS else ()


def with_devices(has):
    """Yield rows of devices that cache translations, and of their page requests."""
    yield from (f"completion {how}" for how in ("SC", "SC, no access", "UR", "CA"))
    yield from ("translated request, passed", *(["translated request, looked up"] if has.T2GPA else []))
    yield from (f"{command}{operands}" for command in ("ATS.INVAL", "ATS.PRGR") for operands in ("", " PV", " DSV", " PV DSV"))
    yield from (f"group response {how}" for how in ("SUCCESS", "SUCCESS, PASID", "INVALID_REQUEST", "RESPONSE_FAILURE",
                                                    "RESPONSE_FAILURE, PASID"))  # fmt: skip
    yield from (f"page request, cause {cause}" for cause in (257, 258, 259, 260))
    yield from ("pqcsr.pqmf", "pqcsr.pqof")


def updated(steps):
    """Return rows of the entries that the steps of a golden walk update."""
    changes = [(step.section, int(found[1], 16)) for step in steps if (found := _UPDATE.match(step.what))]
    return tuple([f"{'second' if 'x4' in section else 'first'} stage: {'D' if entry & PTE_D else 'A'} set" for section, entry in changes])


def refused_message(cause):
    """Return the row of a message that could not be recorded."""
    return _cause(cause, TransactionType.UNTRANSLATED_WRITE)


def through(size):
    """Return the row of a request that was let through."""
    return f"let through, pages of 2^{size.bit_length() - 1} bytes"


class Coverage:
    """Counts of what was compared and equal.

    Parameters
    ----------
    capabilities : :class:`ringwall.models.iommu.registers.Capabilities`
        Decide which rows there are.
    decks : dict
        Of :func:`.iommu_decks.decks`: each defect by its name is to be met, too; printed as one line for each kind of entry.
    """

    def __init__(self, capabilities, decks):
        processes = capabilities.PD8 or capabilities.PD17 or capabilities.PD20
        judged = [*_causes(capabilities, processes), *_checks(capabilities, processes)]
        self.left_out = {row: reason for row, reason in judged if reason}
        self.wanted = [*(row for row, reason in judged if not reason), *_steps(capabilities, processes), *_around(capabilities, processes)]
        self.counts, self.defects, self._decks = Counter(), Counter(), decks

    @staticmethod
    def rows(cause, iotval2, ttyp, steps, planted):
        """Return the rows of a refusal, given the steps of the golden walk and what is ``planted`` in tables."""
        section, rows = steps[-1].section, [_cause(cause, ttyp)]
        why = _DETAIL.sub("", steps[-1].what.rsplit(": ", 1)[0])
        stage, unreadable = re.match(r"RVPRIV \w+?(x4)? (step \d)", section), _UNREADABLE.match(why)
        what = ["first", "second"][bool(stage[1])] if stage else ""
        if unreadable:
            rows.append(f"{what}{'-stage ' if stage else ''}{unreadable[1]} {unreadable[2]}")
        elif section in ("3.3.1 step 10", "3.3.2 step 12"):
            kind = "device" if section == "3.3.1 step 10" else "process"
            rows += [f"{kind} context {check.split(':')[0]}" for check in why.split("; ")]
        elif stage:
            rows.append(f"{what} stage, {'table' if stage[1] and iotval2 & 1 else 'page'}, {stage[2]}: {why}")
        else:
            rows.append(f"{section}: {why}")
        entry = next((step for step in reversed(steps) if step.address is not None), None)
        places = range(entry.address, entry.address + 8 * len(entry.entry), 8) if entry else ()
        defect = next((planted[place] for place in places if place in planted), None)
        return (*rows, defect) if defect else tuple(rows)

    def met(self, rows):
        """Count ``rows``: names, or (kind, name) of defects."""
        for row in rows:
            if isinstance(row, str):
                self.counts[row] += 1
            else:
                self.defects[row] += 1
                self._decks[row[0]].met.add(row[1])

    def record(self, record):
        """Count a record that no request has made; others are counted by what was refused."""
        if record.ttyp == TransactionType.NONE:
            self.counts[_cause(record.cause, record.ttyp)] += 1

    def command(self, command):
        """Count a command that was done."""
        match command:
            case IotinvalVma(address, pscid, gscid):
                name, operands = "IOTINVAL.VMA", (("GV", gscid), ("AV", address), ("PSCV", pscid))
            case IotinvalGvma(address, gscid):
                name, operands = "IOTINVAL.GVMA", (("GV", gscid), ("AV", address))
            case IodirInvalDdt(device_id):
                name, operands = "IODIR.INVAL_DDT", (("DV", device_id),)
            case IodirInvalPdt(device_id):
                name, operands = "IODIR.INVAL_PDT", (("DV", device_id),)
            case AtsInval(pid=pid, segment=segment):
                name, operands = "ATS.INVAL", (("PV", pid), ("DSV", segment))
            case AtsPrgr(pid=pid, segment=segment):
                name, operands = "ATS.PRGR", (("PV", pid), ("DSV", segment))
            case IofenceC():
                name, operands = "IOFENCE.C", (("AV", command.address),)
        self.counts[" ".join([name, *(operand for operand, value in operands if value is not None)])] += 1

    def empty(self):
        """Return the rows that were not met."""
        missed = [f"{kind} {name}" for kind, deck in self._decks.items() for name in deck.names if not self.defects[kind, name]]
        return [row for row in self.wanted if not self.counts[row]] + missed

    def __str__(self):
        lines = [f"{self.counts[row]:8}  {row}" for row in self.wanted]
        lines += [f"{count:8}  {row} (more)" for row, count in sorted(self.counts.items()) if row not in self.wanted]
        for kind, deck in self._decks.items():
            counts = [self.defects[kind, name] for name in deck.names]
            lines.append(f"{sum(counts):8}  {kind}: {sum(map(bool, counts))} of {len(counts)} defects by name, at least {min(counts)} each")
        return "\n".join([*lines, *(f"       -  {row}: {reason}" for row, reason in self.left_out.items())])
