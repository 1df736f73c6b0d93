"""Which answers are allowed while an IOMMU may still hold old entries. [RVIOMMU1.0 3.8, 4.1, 7.3]

An IOMMU may use any translation that was valid at some time since the last invalidation that covers it *completed*.
`AllowedTranslations` is told what software did, in the order in which it did it: tables changed, commands submitted,
fences seen to be complete. It answers what may happen to one request, and, fast, whether a device may touch a page.

What it takes from the specification:

- Invalid entries are never cached: a fault for want of a mapping is allowed only while the mapping is missing.
- Translations are tagged by PSCID alone (no second stage), contexts by device. Two tables under one PSCID: either
  may be used. Global entries hold for every PSCID and survive an invalidation by PSCID.
- A leaf entry of 64 KiB may be cached page by page, so that an invalidation by address is sure only of its own 4 KiB;
  a superpage leaf is one entry, which any address in it names.
- Commands of one queue take effect in their order, as the sequences of [RVIOMMU1.0 7.3] need.
- An invalidation by address covers leaves only: software that replaces a table invalidates without an address. What
  old pointers could lead to is not tracked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..memory import Iova, Spa
from .commands import Command, IodirInvalDdt, IofenceC, IotinvalVma
from .faults import AccessType, Cause
from .registers import IommuMode
from .tables import DEVICE_ID_BITS, IOSATP_BARE, SIZE_1G, SIZE_2M, SIZE_4K, SIZE_64K, DeviceContext

GLOBAL = -1  # the tag of global entries; PSCIDs are 0 and up
PIECES = (SIZE_4K, SIZE_2M, SIZE_1G)  # what one entry covers


@dataclass(frozen=True)
class Outcome:
    """What may become of a request: a physical address, or the cause of a fault."""

    spa: Spa | None = None
    cause: Cause | None = None


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

    value: IommuMode | DeviceContext | Cause
    ended: int | None = None


def _since(history: list[_Era], since: int) -> Iterator[Any]:
    """The values of ``history`` that could be used at some time since."""
    for era in reversed(history):
        if era.ended is not None and era.ended <= since:
            return
        yield era.value


@dataclass
class _Tag:
    """All entries that may be cached under one PSCID (or as global ones), by IOVA and by physical page.

    ``stale`` holds those that are no longer what a walk would find, with the time since when.
    """

    by_iova: dict[tuple[int, int], set[_Entry]] = field(default_factory=dict)
    by_spa: dict[tuple[int, int], set[_Entry]] = field(default_factory=dict)
    stale: dict[_Entry, int] = field(default_factory=dict)

    def add(self, entry: _Entry) -> None:
        self.stale.pop(entry, None)
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
        for size in PIECES:
            yield from self.by_iova.get((size, iova // size), ())

    def at_spa(self, spa: Spa) -> Iterator[_Entry]:
        for size in PIECES:
            yield from self.by_spa.get((size, spa // size), ())


_PERM = {AccessType.READ: "r", AccessType.WRITE: "w", AccessType.EXEC: "x"}


class AllowedTranslations:
    """The answers that an IOMMU may give, with every cache it may have. An `Observer` of tables.

    Parameters
    ----------
    mode : :class:`IommuMode`
        ddtp.iommu_mode at the start; BARE as a permissive card resets.

    Attributes
    ----------
    now : :class:`int`
        Counts the events told so far. Keep it when a request starts, and give it as ``since``.
    """

    def __init__(self, mode: IommuMode = IommuMode.BARE):
        self.now = 0
        self._modes = [_Era(mode)]
        self._unsettled = 0  # modes before the last that may still be used
        self._live: dict[Spa, dict[Iova, list[_Entry]]] = {}
        self._contexts: dict[int, list[_Era]] = {}  # valid ones, until an invalidation makes them unusable
        self._refusals: dict[int, list[_Era]] = {}  # the faults of invalid ones, which are not cached
        self._tags: dict[int, _Tag] = {GLOBAL: _Tag()}
        self._roots: dict[int, set[Spa]] = {}  # PSCID -> tables that a context may name with it
        self._pending: list[tuple[int, Command]] = []

    # -- what software did --

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
            if isinstance(command, IotinvalVma):
                self._invalidate(command, submitted)
            elif isinstance(command, IodirInvalDdt):
                self._forget_contexts(command.device_id, submitted)

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
            if not mode.levels or device_id >> DEVICE_ID_BITS[mode.levels]:
                continue
            for context in self._contexts.get(device_id, ()):
                if _is_bare(context.value):
                    yield Iova(spa)
                    continue
                for tag in self._tags[GLOBAL], self._tags[context.value.PSCID]:
                    for entry in tag.at_spa(spa):
                        if perm in entry.perms:
                            yield Iova(entry.iova + spa - entry.spa)

    def outcomes(self, device_id: int, iova: Iova, access: AccessType, *, since: int | None = None) -> frozenset[Outcome]:
        """Return everything that may become of a request that started at time ``since`` (None: now).

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
            elif device_id >> DEVICE_ID_BITS[mode.levels]:
                found.add(Outcome(cause=Cause.TRANSACTION_TYPE_DISALLOWED))
            else:
                found |= self._device_outcomes(device_id, iova, access, since)
        return frozenset(found)

    def _device_outcomes(self, device_id: int, iova: Iova, access: AccessType, since: int) -> set[Outcome]:
        refusals = self._refusals.get(device_id, [_Era(Cause.DDT_ENTRY_NOT_VALID)])
        found = {Outcome(cause=cause) for cause in _since(refusals, since)}
        for context in self._contexts.get(device_id, ()):
            if _is_bare(context.value):
                found.add(Outcome(spa=Spa(iova)))
            else:
                found |= self._page_outcomes(context.value, iova, access, since)
        return found

    def _page_outcomes(self, context: DeviceContext, iova: Iova, access: AccessType, since: int) -> set[Outcome]:
        entries = [entry for tag in (self._tags[GLOBAL], self._tags[context.PSCID]) for entry in tag.at_iova(iova)]
        found = {Outcome(spa=Spa(entry.spa + iova % entry.size)) if _PERM[access] in entry.perms
                 else Outcome(cause=access.page_fault) for entry in entries}
        if not any(entry.root == context.root and entry.is_live and entry.started <= since for entry in entries):
            found.add(Outcome(cause=access.page_fault))  # a walk since then may have found nothing
        return found

    # -- inside --

    def _tags_of(self, entry: _Entry) -> list[_Tag]:
        """The tags under which a walk may cache the entry now."""
        pscids = [pscid for pscid, roots in self._roots.items() if entry.root in roots]
        if entry.is_global:
            return [self._tags[GLOBAL]] if pscids else []
        return [self._tags[pscid] for pscid in pscids]

    def _update_roots(self, time: int) -> None:
        """After a change of contexts: tables that came under a PSCID, and those that left it at ``time``."""
        roots: dict[int, set[Spa]] = {}
        for history in self._contexts.values():
            for context in history:
                if not _is_bare(context.value):
                    roots.setdefault(context.value.PSCID, set()).add(context.value.root)
        old, self._roots = self._roots, roots
        in_use = set().union(*roots.values())
        for pscid in roots.keys() | old.keys():
            tag = self._tags.setdefault(pscid, _Tag())
            for entry in self._entries(roots.get(pscid, set()) - old.get(pscid, set())):
                (self._tags[GLOBAL] if entry.is_global else tag).add(entry)
            for entry in self._entries(old.get(pscid, set()) - roots.get(pscid, set())):
                if not entry.is_global:
                    tag.stale[entry] = time
                elif entry.root not in in_use:
                    self._tags[GLOBAL].stale[entry] = time

    def _entries(self, roots: set[Spa]) -> Iterator[_Entry]:
        """The live entries of these tables."""
        for root in roots:
            for pieces in self._live.get(root, {}).values():
                yield from pieces

    def _invalidate(self, command: IotinvalVma, submitted: int) -> None:
        """[RVIOMMU1.0 4.1.1] what IOTINVAL.VMA covers; with GV=1 no host address space."""
        if command.gscid is not None:
            return
        if command.pscid is None:
            tags = list(self._tags.values())
        else:
            tags = [self._tags[command.pscid]] if command.pscid in self._tags else []
        for tag in tags:
            for entry, ended in list(tag.stale.items()):
                if ended < submitted and _covers(command, entry):
                    tag.drop(entry)

    def _forget_contexts(self, device_id: int | None, submitted: int) -> None:
        for one in list(self._contexts) if device_id is None else [device_id]:
            self._contexts[one] = [era for era in self._contexts.get(one, [])
                                   if era.ended is None or era.ended > submitted]
        self._update_roots(submitted)


def _is_bare(context: DeviceContext) -> bool:
    """First stage Bare; pdtp can only be Bare too, as there are no process directories."""
    return context.fsc_mode == IOSATP_BARE


def _pieces(iova: Iova, spa: Spa, size: int) -> Iterator[tuple[Iova, Spa, int]]:
    """Cut a 64 KiB page into what may be cached alone."""
    piece = SIZE_4K if size == SIZE_64K else size
    for at in range(0, size, piece):
        yield Iova(iova + at), Spa(spa + at), piece


def _covers(command: IotinvalVma, entry: _Entry) -> bool:
    if command.address is None:
        return True
    if not command.is_range:
        return entry.iova <= command.address < entry.iova + entry.size
    # [RVIOMMU1.0 9.3] S: the lowest 0 bit X of the page number makes a range of 2^(X+1) pages
    page = command.address >> 12
    span = ((page ^ page + 1) + 1) << 12
    start = command.address // span * span
    return entry.iova < start + span and start < entry.iova + entry.size
