"""Which answers are allowed while an IOMMU may still hold old entries. [RVIOMMU1.0 3.8, 4.1, 7.3]

An IOMMU may use any translation that was valid at some time since the last invalidation that covers it *completed*.
`AllowedTranslations` is told what software did, in the order in which it did it: tables changed, commands submitted,
fences seen to be complete. It answers what may happen to one request, and, fast, whether a device may touch a page.

What it takes from the specification:

- Invalid entries are never cached: a fault for want of a mapping is allowed only while the mapping is missing.
- First-stage entries are tagged by PSCID and, behind a second stage, by GSCID; second-stage and MSI entries by GSCID;
  contexts by device, process contexts by device and process. Two tables under one tag: either may be used. Global
  entries hold for every PSCID of their guest, or of the host, and survive an invalidation by PSCID.
- What two stages allow together is any first-stage answer followed by any second-stage answer: an entry for both, made
  when both were valid, is ended by whichever invalidation ends one of them.
- A leaf entry of 64 KiB may be cached page by page, so that an invalidation by address is sure only of its own 4 KiB;
  a superpage leaf is one entry, which any address in it names.
- Commands of one queue take effect in their order, as the sequences of [RVIOMMU1.0 7.3] need.
- An invalidation by address covers leaves only, unless it has NL: a pointer that a superpage replaced may still lead to
  the empty table below it, and so to a page fault. What a retired table may say after its page was used again is not
  tracked, and neither are changes of the second stage under tables of a guest, nor what IODIR.INVAL_PDT must follow
  because of them.

Requests of supervisors are not judged: the permissions that it is told are those of users.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..memory import Iova, Spa
from .commands import Command, IodirInvalDdt, IodirInvalPdt, IofenceC, IotinvalGvma, IotinvalVma
from .entries import (
    DEVICE_ID_BITS,
    EXTENDED_DEVICE_ID_BITS,
    IOSATP_BARE,
    PDTP_BARE,
    PROCESS_ID_BITS,
    SIZE_4K,
    SIZE_64K,
    DeviceContext,
    MsiPte,
    ProcessContext,
)
from .faults import AccessType, Cause
from .msi import is_interrupt_file
from .registers import Capabilities, IommuMode

__all__ = ["AllowedTranslations", "Outcome"]

GLOBAL = -1  # in place of a PSCID: the tag of global entries
SECOND = -2  # in place of a PSCID: the tag of second-stage entries
TagKey = tuple[int | None, int]  # GSCID, or None for the host; PSCID


@dataclass(frozen=True)
class Outcome:
    """What may become of a request: a physical address, the cause of a fault, or an interrupt file in memory."""

    spa: Spa | None = None
    cause: Cause | None = None
    mrif: Spa | None = None


@dataclass(eq=False)
class _Entry:
    """One leaf that is in a table since ``started``, or was and may be cached."""

    root: Spa
    iova: Iova
    spa: Spa
    size: int
    perms: str
    is_global: bool
    started: int
    is_live: bool = True


@dataclass
class _Era:
    """A value that could be used until ``ended``: a mode, a context, or the fault that a bad context gave."""

    value: IommuMode | DeviceContext | ProcessContext | MsiPte | Cause
    ended: int | None = None


def _since(history: list[_Era], since: int) -> Iterator[Any]:
    """The values of ``history`` that could be used at some time since."""
    for era in reversed(history):
        if era.ended is not None and era.ended <= since:
            return
        yield era.value


@dataclass
class _Tag:
    """All entries that may be cached under one PSCID (or as global ones, or of a second stage), by IOVA and by physical page.

    ``stale`` holds those that are no longer what a walk would find, with the time since when; ``pointers`` the (address,
    bytes) of those that a superpage replaced, likewise.
    """

    by_iova: dict[tuple[int, int], set[_Entry]] = field(default_factory=dict)
    by_spa: dict[tuple[int, int], set[_Entry]] = field(default_factory=dict)
    stale: dict[_Entry, int] = field(default_factory=dict)
    pointers: dict[tuple[int, int], int] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)

    def add(self, entry: _Entry) -> None:
        self.stale.pop(entry, None)
        self.sizes.add(entry.size)
        self.by_iova.setdefault((entry.size, entry.iova // entry.size), set()).add(entry)
        self.by_spa.setdefault((entry.size, entry.spa // entry.size), set()).add(entry)

    def drop(self, entry: _Entry) -> None:
        self.stale.pop(entry, None)
        for index, key in ((self.by_iova, (entry.size, entry.iova // entry.size)),
                           (self.by_spa, (entry.size, entry.spa // entry.size))):
            index[key].discard(entry)
            if not index[key]:
                del index[key]

    def at_iova(self, iova: Iova) -> Iterator[_Entry]:
        for size in self.sizes:
            yield from self.by_iova.get((size, iova // size), ())

    def at_spa(self, spa: Spa) -> Iterator[_Entry]:
        for size in self.sizes:
            yield from self.by_spa.get((size, spa // size), ())


_PERM = {AccessType.READ: "r", AccessType.WRITE: "w", AccessType.EXEC: "x"}


class AllowedTranslations:
    """The answers that an IOMMU may give, with every cache it may have. An `Observer` of tables.

    Parameters
    ----------
    mode : :class:`IommuMode`
        ddtp.iommu_mode at the start; BARE as a permissive card resets.
    extended : :class:`bool`
        Contexts are in the extended format (MSI_FLAT).

    Attributes
    ----------
    now : :class:`int`
        Counts the events told so far. Keep it when a request starts, and give it as ``since``.
    """

    def __init__(self, mode: IommuMode = IommuMode.BARE, *, extended: bool = False):
        self._id_bits = EXTENDED_DEVICE_ID_BITS if extended else DEVICE_ID_BITS
        self.now = 0
        self._modes = [_Era(mode)]
        self._unsettled = 0  # modes before the last that may still be used
        self._live: dict[Spa, dict[Iova, list[_Entry]]] = {}
        self._contexts: dict[int, list[_Era]] = {}  # valid ones, until an invalidation makes them unusable
        self._refusals: dict[int, list[_Era]] = {}  # the faults of invalid ones, which are not cached
        self._processes: dict[Spa, dict[int, list[_Era]]] = {}  # root of a directory -> process -> valid contexts ever
        self._process_refusals: dict[tuple[Spa, int], list[_Era]] = {}
        self._forgotten: dict[tuple[int | None, int | None], int] = {}  # device, process -> when IODIR for them was submitted
        self._msi: dict[Spa, dict[int, list[_Era]]] = {}  # root of an MSI table -> guest page -> entries
        self._tags: dict[TagKey, _Tag] = {(None, GLOBAL): _Tag()}
        self._roots: dict[TagKey, set[Spa]] = {}  # tables that a context may name with a tag
        self._pending: list[tuple[int, Command]] = []

    # -- what software did --

    def offered(self, capabilities: Capabilities) -> None:
        """Software has read ``capabilities``: device contexts have the format that they say. [RVIOMMU1.0 6.3 MSI_FLAT]"""
        self._id_bits = EXTENDED_DEVICE_ID_BITS if capabilities.MSI_FLAT else DEVICE_ID_BITS

    def mode_changed(self, mode: IommuMode) -> None:
        """ddtp was written: the old mode may still be used."""
        self.now += 1
        self._modes.append(_Era(IommuMode(mode)))
        self._unsettled += 1

    def mode_settled(self) -> None:
        """ddtp.busy was seen 0 after the write: only the new mode is used. Caches stay as they are."""
        self.now += 1
        for era in self._modes[-1 - self._unsettled:-1]:
            era.ended = self.now
        self._unsettled = 0

    def mapped(self, root: Spa, iova: Iova, spa: Spa, size: int, perms: str, *, is_global: bool = False) -> None:
        """The table at ``root`` now maps a page; ``perms`` out of "rwx" is what a device may do with it."""
        self.now += 1
        live = self._live.setdefault(root, {})
        if iova in live:
            raise ValueError(f"IOVA must not be mapped twice in one table, not {iova!r}")
        live[iova] = [_Entry(root, *piece, perms, is_global, self.now) for piece in _pieces(iova, spa, size)]
        for entry in live[iova]:
            for tag in self._tags_of(entry):
                tag.add(entry)

    def unmapped(self, root: Spa, iova: Iova) -> None:
        """The table at ``root`` no longer maps the page that starts at ``iova``."""
        self.now += 1
        if iova not in self._live.get(root, {}):
            raise ValueError(f"IOVA must be where a mapped page starts, not {iova!r}")
        for entry in self._live[root].pop(iova):
            entry.is_live = False
            for tag in self._tags_of(entry):
                tag.stale[entry] = self.now

    def context_changed(self, device_id: int, context: DeviceContext | Cause) -> None:
        """The device's context was written; ``context`` is a valid one, or the fault that the entry now gives."""
        self.now += 1
        contexts = self._contexts.setdefault(device_id, [])
        refusals = self._refusals.setdefault(device_id, [_Era(Cause.DDT_ENTRY_NOT_VALID)])  # a new directory is zeroes
        for history in contexts, refusals:
            if history and history[-1].ended is None:
                history[-1].ended = self.now
        (refusals if isinstance(context, Cause) else contexts).append(_Era(context))
        self._update_roots(self.now)

    def process_context_changed(self, root: Spa, process_id: int, context: ProcessContext | Cause) -> None:
        """A process context in the directory at ``root`` was written, as in `context_changed`."""
        self.now += 1
        contexts = self._processes.setdefault(root, {}).setdefault(process_id, [])
        refusals = self._process_refusals.setdefault((root, process_id), [_Era(Cause.PDT_ENTRY_NOT_VALID)])
        for history in contexts, refusals:
            if history and history[-1].ended is None:
                history[-1].ended = self.now
        (refusals if isinstance(context, Cause) else contexts).append(_Era(context))
        self._update_roots(self.now)

    def msi_changed(self, root: Spa, gpa: Spa, entry: MsiPte | Cause) -> None:
        """The entry of the page at ``gpa`` in the MSI table at ``root`` was written; the fault is what it gives when malformed."""
        self.now += 1
        history = self._msi.setdefault(root, {}).setdefault(gpa >> 12, [_Era(Cause.MSI_PTE_NOT_VALID)])
        history[-1].ended = self.now
        history.append(_Era(entry))

    def pointer_replaced(self, root: Spa, iova: Iova, size: int) -> None:
        """A superpage took the place of a pointer to an empty table, in the table at ``root``."""
        for key, roots in self._roots.items():
            if root in roots:
                self._tags[key].pointers[iova, size] = self.now

    def submitted(self, command: Command) -> int:
        """A command was put on the queue (its tail written); returns a token for `fence_completed`."""
        self.now += 1
        if not isinstance(command, IofenceC):
            self._pending.append((self.now, command))
        return self.now

    def fence_completed(self, token: int | None = None) -> None:
        """The IOFENCE.C of this token was seen to be complete (None: one submitted after all commands so far)."""
        self.now += 1
        token = self.now if token is None else token
        done = [one for one in self._pending if one[0] < token]
        self._pending = [one for one in self._pending if one[0] > token]
        for submitted, command in done:
            if isinstance(command, IotinvalVma | IotinvalGvma):
                self._invalidate(command, submitted)
            elif isinstance(command, IodirInvalDdt):
                self._forget_contexts(command.device_id, submitted)
            elif isinstance(command, IodirInvalPdt):
                self._forgotten[command.device_id, command.process_id] = submitted
                self._update_roots(submitted)

    def commands_aborted(self) -> None:
        """The queue stopped on an error: what no fence has covered may not have been done. [RVIOMMU1.0 6.15]"""
        self.now += 1
        self._pending.clear()

    def invalidated(self, *, iova: Iova | None = None, pscid: int | None = None) -> int:
        """IOTINVAL.VMA was submitted for host address spaces; short for `submitted`."""
        return self.submitted(IotinvalVma(address=iova, pscid=pscid))

    # -- what may happen --

    def may_access(self, device_id: int, spa: Spa, is_write: bool, *, since: int | None = None) -> bool:
        """Tell whether any allowed translation leads this device to this physical byte with this permission.

        ``since`` (None: now) only widens the modes of ddtp that count: a request let through while Bare may reach
        memory after the change. Contexts and pages end with the fence that covers them, whenever the request started.
        """
        return next(self.iovas(device_id, spa, is_write, since=since), None) is not None

    def iovas(self, device_id: int, spa: Spa, is_write: bool, *, since: int | None = None) -> Iterator[Iova]:
        """Yield the addresses that may lead this device to this physical byte, as `may_access` judges; some more than once."""
        perm = "w" if is_write else "r"
        for mode in _since(self._modes, self.now if since is None else since):
            if mode == IommuMode.BARE:
                yield Iova(spa)
                continue
            if not mode.levels or device_id >> self._id_bits[mode.levels]:
                continue
            for context in self._contexts.get(device_id, ()):
                yield from self._sources(device_id, context.value, spa, perm)

    def _sources(self, device_id: int, context: DeviceContext, spa: Spa, perm: str) -> Iterator[Iova]:
        """The addresses that one context leads to this byte, for any process."""
        gscid, spaces = _gscid(context), self._spaces(device_id, context)
        for gpa in (spa,) if gscid is None else self._guest_sources(context, spa, perm):
            for pscid in spaces:
                if pscid is None:
                    yield Iova(gpa)
                    continue
                for key in (gscid, GLOBAL), (gscid, pscid):
                    for entry in self._tags[key].at_spa(gpa):
                        if perm in entry.perms:
                            yield Iova(entry.iova + gpa - entry.spa)

    def _guest_sources(self, context: DeviceContext, spa: Spa, perm: str) -> Iterator[Spa]:
        """The guest physical addresses that the second stage or the MSI table leads to this byte."""
        for entry in self._tags[context.GSCID, SECOND].at_spa(spa):
            gpa = Spa(entry.iova + spa - entry.spa)
            if perm in entry.perms and not is_interrupt_file(context, gpa):
                yield gpa
        if context.msiptp_mode:
            for page, history in self._msi.get(context.msiptp_root, {}).items():
                for era in history:
                    if isinstance(era.value, MsiPte) and era.value.mrif_address is None and era.value.spa >> 12 == spa >> 12:
                        if is_interrupt_file(context, page << 12):
                            yield Spa(page << 12 | spa & 0xFFF)

    def _spaces(self, device_id: int, context: DeviceContext) -> set[int | None]:
        """The PSCIDs that requests of this context may use; None when the first stage is Bare."""
        if not context.PDTV:
            return {None if context.fsc_mode == IOSATP_BARE else context.PSCID}
        found: set[int | None] = set() if context.DPE and context.fsc_mode != PDTP_BARE else {None}
        if context.fsc_mode != PDTP_BARE:
            for process_id in self._processes.get(context.root, {}):
                found |= {None if era.value.fsc_mode == IOSATP_BARE else era.value.PSCID
                          for era in self._usable(device_id, context.root, process_id)}
        return found

    def _usable(self, device_id: int, root: Spa, process_id: int) -> list[_Era]:
        """The contexts of a process that this device may still use."""
        gone = max(self._forgotten.get(key, -1) for key in ((None, None), (device_id, None), (device_id, process_id)))
        return [era for era in self._processes.get(root, {}).get(process_id, ()) if era.ended is None or era.ended > gone]

    def outcomes(self, device_id: int, iova: Iova, access: AccessType, *, since: int | None = None,
                 pid: int | None = None) -> frozenset[Outcome]:
        """Return everything that may become of an untranslated request that started at time ``since`` (None: now).

        A walk reads memory at any time from ``since`` on, so that mappings and contexts that were missing at some
        time since then may give their faults. Access faults and poison are not part of the answer.
        """
        since = self.now if since is None else since
        found: set[Outcome] = set()
        for mode in _since(self._modes, since):
            if mode == IommuMode.OFF:
                found.add(Outcome(cause=Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED))
            elif mode == IommuMode.BARE:
                found.add(Outcome(spa=Spa(iova)))
            elif device_id >> self._id_bits[mode.levels]:
                found.add(Outcome(cause=Cause.TRANSACTION_TYPE_DISALLOWED))
            else:
                found |= self._device_outcomes(device_id, iova, access, since, pid)
        return frozenset(found)

    def _device_outcomes(self, device_id: int, iova: Iova, access: AccessType, since: int, pid: int | None) -> set[Outcome]:
        refusals = self._refusals.get(device_id, [_Era(Cause.DDT_ENTRY_NOT_VALID)])
        found = {Outcome(cause=cause) for cause in _since(refusals, since)}
        for one in self._contexts.get(device_id, ()):
            context: Any = one.value
            if pid is not None and (not context.PDTV or (context.fsc_mode and pid >> PROCESS_ID_BITS[context.fsc_mode])):
                found.add(Outcome(cause=Cause.TRANSACTION_TYPE_DISALLOWED))
                continue
            process_id = 0 if pid is None and context.DPE else pid
            stages: list[tuple[int, Spa, int]] = []  # MODE, root and PSCID of first stages
            if not context.PDTV:
                stages.append((context.fsc_mode, context.root, context.PSCID))
            elif process_id is None or context.fsc_mode == PDTP_BARE:
                stages.append((IOSATP_BARE, Spa(0), 0))
            else:
                refusals = self._process_refusals.get((context.root, process_id), [_Era(Cause.PDT_ENTRY_NOT_VALID)])
                found |= {Outcome(cause=cause) for cause in _since(refusals, since)}
                processes: list[Any] = [era.value for era in self._usable(device_id, context.root, process_id)]
                stages += [(process.fsc_mode, process.root, process.PSCID) for process in processes]
            for mode, root, pscid in stages:
                answers = {Outcome(spa=Spa(iova))} if mode == IOSATP_BARE else self._page_outcomes(
                    (_gscid(context), pscid), root, iova, access, since)
                for answer in answers:
                    found |= {answer} if answer.spa is None else self._guest_outcomes(context, answer.spa, access, since)
        return found

    def _guest_outcomes(self, context: DeviceContext, gpa: Spa, access: AccessType, since: int) -> set[Outcome]:
        """What may become of a guest physical address; without second stage it is the physical one."""
        if _gscid(context) is None:
            return {Outcome(spa=gpa)}
        if not is_interrupt_file(context, gpa):
            return self._page_outcomes((context.GSCID, SECOND), context.iohgatp_root, Iova(gpa), access, since)
        found: set[Outcome] = set()
        history = self._msi.get(context.msiptp_root, {}).get(gpa >> 12, [_Era(Cause.MSI_PTE_NOT_VALID)])
        for era in history:
            if isinstance(era.value, Cause):  # not cached
                if era.ended is None or era.ended > since:
                    found.add(Outcome(cause=era.value))
            elif access is AccessType.EXEC:
                found.add(Outcome(cause=Cause.INSTRUCTION_ACCESS_FAULT))
            elif era.value.mrif_address is not None:
                found.add(Outcome(mrif=era.value.mrif_address))
            else:
                found.add(Outcome(spa=Spa(era.value.spa | gpa & 0xFFF)))
        return found

    def _page_outcomes(self, key: TagKey, root: Spa, iova: Iova, access: AccessType, since: int) -> set[Outcome]:
        fault = access.guest_page_fault if key[1] == SECOND else access.page_fault
        tags = [self._tags[key]] if key[1] == SECOND else [self._tags[key[0], GLOBAL], self._tags[key]]
        entries = [entry for tag in tags for entry in tag.at_iova(iova)]
        found = {Outcome(spa=Spa(entry.spa + iova % entry.size)) if _PERM[access] in entry.perms
                 else Outcome(cause=fault) for entry in entries}
        if not any(entry.root == root and entry.is_live and entry.started <= since for entry in entries):
            found.add(Outcome(cause=fault))  # a walk since then may have found nothing
        if any(first <= iova < first + size for first, size in self._tags[key].pointers):
            found.add(Outcome(cause=fault))  # a walk from an old pointer finds nothing
        return found

    # -- inside --

    def _tags_of(self, entry: _Entry) -> list[_Tag]:
        """The tags under which a walk may cache the entry now."""
        keys = [key for key, roots in self._roots.items() if entry.root in roots]
        if entry.is_global:  # the G bit of a second stage is ignored
            keys = list({(gscid, pscid if pscid == SECOND else GLOBAL) for gscid, pscid in keys})
        return [self._tags[key] for key in keys]

    def _update_roots(self, time: int) -> None:
        """After a change of contexts: tables that came under a tag, and those that left it at ``time``."""
        roots: dict[TagKey, set[Spa]] = {}
        for device_id, history in self._contexts.items():
            for era in history:
                context: Any = era.value
                gscid = _gscid(context)
                if gscid is not None:
                    roots.setdefault((gscid, SECOND), set()).add(context.iohgatp_root)
                    self._tags.setdefault((gscid, GLOBAL), _Tag())
                if not context.PDTV:
                    if context.fsc_mode != IOSATP_BARE:
                        roots.setdefault((gscid, context.PSCID), set()).add(context.root)
                elif context.fsc_mode != PDTP_BARE:
                    for process_id in self._processes.get(context.root, {}):
                        for one in self._usable(device_id, context.root, process_id):
                            if one.value.fsc_mode != IOSATP_BARE:
                                roots.setdefault((gscid, one.value.PSCID), set()).add(one.value.root)
        old, self._roots = self._roots, roots
        for key in roots.keys() | old.keys():
            gscid, pscid = key
            tag = self._tags.setdefault(key, _Tag())
            everyone = tag if pscid == SECOND else self._tags.setdefault((gscid, GLOBAL), _Tag())
            for entry in self._entries(roots.get(key, set()) - old.get(key, set())):
                (everyone if entry.is_global else tag).add(entry)
            for entry in self._entries(old.get(key, set()) - roots.get(key, set())):
                if pscid == SECOND or not entry.is_global:
                    tag.stale[entry] = time
                elif not any(entry.root in used for one, used in roots.items() if one[0] == gscid and one[1] != SECOND):
                    everyone.stale[entry] = time

    def _entries(self, roots: set[Spa]) -> Iterator[_Entry]:
        """The live entries of these tables."""
        for root in roots:
            for pieces in self._live.get(root, {}).values():
                yield from pieces

    def _invalidate(self, command: IotinvalVma | IotinvalGvma, submitted: int) -> None:
        """[RVIOMMU1.0 4.1.1] what IOTINVAL covers: with GV=0 host address spaces, or the second stages of all guests."""
        for (gscid, pscid), tag in self._tags.items():
            if isinstance(command, IotinvalVma):
                if gscid != command.gscid or pscid == SECOND or command.pscid not in (None, pscid):
                    continue
                address = command.address
            else:
                if pscid != SECOND or command.gscid not in (None, gscid):
                    continue
                address = None if command.gscid is None else command.address
            for entry, ended in list(tag.stale.items()):
                if ended < submitted and (address is None or _covers(command, entry.iova, entry.size)):
                    tag.drop(entry)
            for (first, size), ended in list(tag.pointers.items()):
                if ended < submitted and (address is None or (command.non_leaf and _covers(command, first, size))):
                    del tag.pointers[first, size]
        if isinstance(command, IotinvalGvma):
            self._forget_msi(command, submitted)

    def _forget_msi(self, command: IotinvalGvma, submitted: int) -> None:
        """Tables are shared by GSCID: an entry goes when every guest that may name its table is covered."""
        for root, pages in self._msi.items():
            guests = {era.value.GSCID for history in self._contexts.values() for era in history
                      if era.value.msiptp_mode and era.value.msiptp_root == root}
            if command.gscid is not None and guests - {command.gscid}:
                continue
            for page, history in pages.items():
                if command.gscid is None or command.address is None or _covers(command, page << 12, SIZE_4K):
                    pages[page] = [era for era in history if era.ended is None or era.ended > submitted]

    def _forget_contexts(self, device_id: int | None, submitted: int) -> None:
        for one in list(self._contexts) if device_id is None else [device_id]:
            self._contexts[one] = [era for era in self._contexts.get(one, [])
                                   if era.ended is None or era.ended > submitted]
        self._forgotten[device_id, None] = submitted
        self._update_roots(submitted)


def _gscid(context: DeviceContext) -> int | None:
    return context.GSCID if context.iohgatp_mode else None


def _pieces(iova: Iova, spa: Spa, size: int) -> Iterator[tuple[Iova, Spa, int]]:
    """Cut a 64 KiB page into what may be cached alone."""
    piece = SIZE_4K if size == SIZE_64K else size
    for at in range(0, size, piece):
        yield Iova(iova + at), Spa(spa + at), piece


def _covers(command: IotinvalVma | IotinvalGvma, first: int, size: int) -> bool:
    """Tell whether the address of the command, or its range, is in the region."""
    address = command.address or 0
    if not command.is_range:
        return first <= address < first + size
    # [RVIOMMU1.0 9.3] S: the lowest 0 bit X of the page number makes a range of 2^(X+1) pages
    page = address >> 12
    span = ((page ^ page + 1) + 1) << 12
    start = address // span * span
    return first < start + span and start < first + size
