"""The IOMMU of a host between its memory and a card that caches translations: the card's side of it in TLPs. [PCIe5 10]

What is translated, and how a translation request ends, `iommu.unit.Unit` says; here that becomes completions and messages, and what the
card may still use is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .iommu.ats import AtsStatus, PageRequest, TranslationCompletion
from .iommu.commands import AtsMessage, AtsPrgr, MessageCode
from .iommu.faults import AccessType, TranslationFault
from .iommu.unit import Unit
from .iommu.walk import Request, RequestKind
from .memory import Iova
from .tlp import TRANSLATED, UNTRANSLATED, CplStatus, Pasid, Tlp, TlpType

__all__ = ["HostIommu", "translation_entry"]

_STATUS = {AtsStatus.SUCCESS: CplStatus.SC, AtsStatus.UNSUPPORTED_REQUEST: CplStatus.UR, AtsStatus.COMPLETER_ABORT: CplStatus.CA}
ENTRY_BYTES = 8  # of one translation [PCIe5 10.2.3.2]
ROUTED_TO_ROOT, ROUTED_BY_ID = 0b000, 0b010
BODY_BYTES = 8  # of an Invalidate Request [PCIe5 10.3.1]


def translation_entry(found: TranslationCompletion) -> bytes:
    """Return the 8 bytes of one translation, as the specification draws them: byte 0 is the highest. [PCIe5 10.2.3.2]"""
    page, is_range = found.page_and_s
    value = (page << 12 | is_range << 11 | found.no_snoop << 10 | found.is_global << 5 | found.privileged << 4 | found.executable << 3
             | found.untranslated_only << 2 | found.writable << 1 | found.readable)  # fmt: skip
    return value.to_bytes(ENTRY_BYTES, "big")


@dataclass(frozen=True)
class _Grant:
    """A translation that a function was given, for a process or (None) for itself."""

    requester_id: int
    pid: int | None
    iova: int
    size: int
    address: int
    readable: bool
    writable: bool


@dataclass(frozen=True)
class _Invalidation:
    """An Invalidate Request under way; what was granted by ``after`` is forgotten when it is complete, of one process or of all."""

    requester_id: int
    pid: int | None
    is_global: bool
    start: int
    size: int
    after: int


def _pid(tlp: Tlp) -> int | None:
    return None if tlp.pasid is None else tlp.pasid.value


class HostIommu:
    """Answers translation requests, leads other requests to memory, sends invalidations, judges completions and uses.

    A translated request must use a translation that its function was given and that no completed invalidation covers, unless it was given
    again since that was sent. An invalidation covers what was given for its PASID, or without one if it has none; a global one all.
    [PCIe5 10.3.3, 10.3.8]

    Parameters
    ----------
    unit : :class:`Unit`
        Its device_id is the function number: it serves one bus.

    Attributes
    ----------
    routed_to : :class:`Tlp` or None
        The last memory request as memory saw it; None when it was refused.
    requests, uses, untranslated, invalidated, paged : :class:`int`
        Translation requests, translated requests, others, Invalidate Completions, page requests so far.
    allocation : :class:`int`
        Page requests that the card may have in flight; 0 while none of its Page Request Interfaces is enabled.
    pages : set of tuple of :class:`int`
        Page requests without a response: (requester ID, group).
    """

    def __init__(self, unit: Unit):
        self.unit = unit
        self.routed_to: Tlp | None = None
        self.requests = self.uses = self.untranslated = self.invalidated = self.paged = 0
        self.allocation, self.pages = 0, set[tuple[int, int]]()
        self._now = 0
        self._grants: dict[_Grant, int] = {}  # when given last
        self._under_way: dict[int, _Invalidation] = {}  # by ITag

    def translated(self, tlp: Tlp) -> tuple[CplStatus, bytes, str]:
        """Answer a translation request by one translation: status, data, and the rule that it breaks or "". [PCIe5 10.2.2, 10.2.3]"""
        self.requests += 1
        fault = ""
        if tlp.length_dw % 2 or tlp.length_dw > 32:
            fault = f"length is {tlp.length_dw} dwords"
        elif (tlp.first_be, tlp.last_be) != (15, 15):
            fault = "byte enables are not all ones"
        elif tlp.address % 4096:
            fault = "address is not aligned, which the card promised"
        request = Request(tlp.requester_id & 0xFF, Iova(tlp.address), AccessType.READ, _pid(tlp), kind=RequestKind.ATS,
                          no_write=tlp.no_write)  # fmt: skip
        found = self.unit.complete(request)
        if found.status is AtsStatus.SUCCESS and (found.readable or found.writable) and not found.untranslated_only:
            start = tlp.address // found.size * found.size
            self._now += 1
            grant = _Grant(tlp.requester_id, _pid(tlp), start, found.size, found.address, found.readable, found.writable)
            self._grants[grant] = self._now
        return _STATUS[found.status], translation_entry(found) if found.status is AtsStatus.SUCCESS else b"", fault

    def routed(self, tlp: Tlp) -> tuple[Tlp | None, str]:
        """Return a memory request with its physical address, None when it is refused, and the rule that it breaks or ""."""
        kind = RequestKind.TRANSLATED if tlp.at == TRANSLATED else RequestKind.UNTRANSLATED
        start, fault = self._start(tlp), ""
        if tlp.at == TRANSLATED:
            self.uses += 1
            if not self._is_granted(tlp):
                fault = "translated address that the function does not have"
        else:
            self.untranslated += 1
        access = AccessType.READ if tlp.type is TlpType.MRD else AccessType.WRITE
        try:
            found = self.unit.translate(Request(tlp.requester_id & 0xFF, Iova(start), access, _pid(tlp), kind=kind))
            self.routed_to = replace(tlp, address=found.spa - start % 4, at=UNTRANSLATED, pasid=None)
        except TranslationFault:
            self.routed_to = None
        return self.routed_to, fault

    @staticmethod
    def _start(tlp: Tlp) -> int:
        """Return the address of the first byte of a memory request."""
        return tlp.byte_span()[0] if tlp.type in (TlpType.MRD, TlpType.MWR) else tlp.address

    def _is_granted(self, tlp: Tlp) -> bool:
        """Whether the function has a translation that permits its translated request."""
        start, writes, reads = self._start(tlp), tlp.type is not TlpType.MRD, tlp.type is not TlpType.MWR
        return any(grant.requester_id == tlp.requester_id and 0 <= start - grant.address < grant.size and (grant.readable or not reads)
                   and (grant.writable or not writes) for grant in self._grants)  # fmt: skip

    def page_requested(self, tlp: Tlp) -> str:
        """Take a Page Request; return the rule that it breaks or "". The IOMMU's own response is sent with the others. [PCIe5 10.4.1]"""
        self.paged += 1
        group, key = tlp.address >> 3 & 0x1FF, (tlp.requester_id, tlp.address >> 3 & 0x1FF)
        if tlp.type is not TlpType.MSG or tlp.message_routing != ROUTED_TO_ROOT or tlp.tag:
            return "type, routing or reserved fields are not as they must be"
        if not tlp.address & 3 or not tlp.address & 4:
            return "it asks for no access, or is not the last of its group"
        if key in self.pages:
            return f"group {group} has no response yet"
        self.pages.add(key)
        if len(self.pages) > self.allocation:
            return f"{len(self.pages)} are in flight, {self.allocation} are allocated"
        response = self.unit.receive(PageRequest(tlp.requester_id & 0xFF, tlp.address & ~0xFFF, group, bool(tlp.address & 1),
                                                 bool(tlp.address & 2), is_last=True, pid=_pid(tlp)))  # fmt: skip
        if response is not None:
            payload = AtsPrgr(tlp.requester_id, group, response.code).payload | tlp.requester_id << 48
            self.unit.commands.sent.append(AtsMessage(MessageCode.PAGE_REQUEST_GROUP_RESPONSE, tlp.requester_id, payload, response.pid))
        return ""

    def messages(self, routing_id: int) -> list[Tlp]:
        """Return the Invalidate Requests and PRG Responses that were asked for since the last time. [PCIe5 10.3.1, 10.4.2]"""
        made = []
        for message in self.unit.commands.sent:
            pasid = None if message.pid is None else Pasid(message.pid)
            if message.code is MessageCode.PAGE_REQUEST_GROUP_RESPONSE:
                self.pages.discard((message.rid, message.payload >> 32 & 0x1FF))
                made.append(Tlp(TlpType.MSG, requester_id=routing_id, address=message.payload, message_code=message.code,
                                message_routing=ROUTED_BY_ID, pasid=pasid))  # fmt: skip
                continue
            if message.code is not MessageCode.INVALIDATION_REQUEST or message.itag is None:
                raise ValueError(f"A message of this IOMMU must be an Invalidate Request or a PRG Response, not {message!r}")
            body = message.payload
            page = body >> 12
            size = ((page ^ page + 1) + 1 if body >> 11 & 1 else 1) << 12
            self._under_way[message.itag] = _Invalidation(message.rid, message.pid, bool(body & 1), body >> 12 << 12 & -size, size,
                                                          self._now)  # fmt: skip
            made.append(Tlp(TlpType.MSGD, length_dw=2, requester_id=routing_id, tag=message.itag, address=message.rid << 48,
                            message_code=MessageCode.INVALIDATION_REQUEST, message_routing=ROUTED_BY_ID, pasid=pasid,
                            data=body.to_bytes(BODY_BYTES, "big")))  # fmt: skip
        self.unit.commands.sent.clear()
        return made

    def completed(self, tlp: Tlp, routing_id: int, outstanding: Sequence[Tlp]) -> str:
        """Take an Invalidate Completion; return the rule that it breaks or "". [PCIe5 10.3.2, 10.3.3]

        ``outstanding``: requests whose answer the card does not have yet; of those none may use what is forgotten.
        """
        vector, count = tlp.address & 0xFFFF_FFFF, tlp.address >> 32 & 7
        if tlp.type is not TlpType.MSG or tlp.message_routing != ROUTED_BY_ID or tlp.tag or tlp.address >> 35 & 0x1FFF:
            return "type, routing or reserved fields are not as they must be"
        if tlp.address >> 48 != routing_id:
            return f"it is for {tlp.address >> 48:#06x}"
        if not self.unit.commands.invalidation_completed(tlp.requester_id, vector, count):
            return f"ITags {vector:#x} are not under way for {tlp.requester_id:#06x}"
        for itag in [itag for itag in range(32) if vector >> itag & 1]:
            order = self._under_way.pop(itag)
            self.invalidated += 1
            gone = [grant for grant, when in self._grants.items() if when <= order.after and grant.requester_id == order.requester_id
                    and (order.is_global or grant.pid == order.pid)
                    and grant.iova < order.start + order.size and order.start < grant.iova + grant.size]  # fmt: skip
            for grant in gone:
                del self._grants[grant]
        for read in outstanding:
            if read.at == TRANSLATED and read.requester_id == tlp.requester_id and not self._is_granted(read):
                return f"a request that uses what is forgotten has no answer yet: {read}"
        return ""

    def forget(self, requester_id: int) -> None:
        """The function has no translations any more: its ATS Enable is 0, it was reset."""
        self._grants = {grant: when for grant, when in self._grants.items() if grant.requester_id != requester_id}
