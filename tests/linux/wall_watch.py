"""Judges a card whose function 0 is a virtio-iommu: from its TLPs alone, no function reaches what its driver did not map for it."""

from collections import Counter, defaultdict

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.tlp import TlpType, decode
from ringwall.models.virtio.iommu_formats import Attach, Detach, Map, MapFlag, Status, Unmap

__all__ = ["WallWatch"]

_KINDS = (Attach, Detach, Map, Unmap)
_PAGE = 4096
_MESSAGES = range(0xFEE0_0000, 0xFEF0_0000)


class WallWatch:
    """Observes a compiled card; raises :exc:`AssertionError` at the first access to a page that is not mapped for its function.

    A mapping counts from the answer to its MAP to the answer to its UNMAP: what goes by it behind that is a stale translation. A request
    is what the card read right in front of where it writes an answer. A function attached to no domain may reach everything.

    Attributes
    ----------
    attached : dict
        Function -> domain.
    counts : :class:`collections.Counter`
        Requests by name, as they ended well; ``accesses`` of attached functions.
    """

    def __init__(self, card):
        self.attached, self.counts = {}, Counter()
        self._mapped = defaultdict(dict)  # domain -> first IOVA -> Map
        self._pages = defaultdict(Counter)  # (domain, right) -> physical page -> how many mappings have it
        self._reads, self._read = {}, {}  # tag -> address of what comes next; address -> dword that function 0 read
        self._observe, card.observe = card.observe, self.observe

    def observe(self, event, tlp):
        if isinstance(event, TlpReceived):
            if tlp.requester_id & 7:
                self._accessed(tlp)
            elif tlp.type is TlpType.MRD:
                self._reads[tlp.tag] = tlp.address
            elif tlp.type is TlpType.MWR and tlp.length_dw == 1:
                self._ended(tlp)
        elif isinstance(event, TlpSent):
            self._answered(decode(event.dwords))
        if self._observe is not None:
            self._observe(event, tlp)

    def _accessed(self, tlp):
        function, size = tlp.requester_id & 7, 4 * tlp.length_dw
        domain = self.attached.get(function)
        if domain is None or tlp.type not in (TlpType.MRD, TlpType.MWR) or (size == 4 and tlp.address in _MESSAGES):
            return
        self.counts["accesses"] += 1
        right = MapFlag.READ if tlp.type is TlpType.MRD else MapFlag.WRITE
        for page in range(tlp.address // _PAGE, (tlp.address + size - 1) // _PAGE + 1):
            assert self._pages[domain, right][page], f"{tlp} is beside what is mapped in domain {domain} [VIRTIO1.4 5.13.6.6]"

    def _answered(self, tlp):
        if tlp.type is TlpType.CPLD and not tlp.requester_id & 7 and tlp.tag in self._reads:
            for at in range(0, len(tlp.data), 4):
                self._read[self._reads[tlp.tag]] = tlp.data[at : at + 4]
                self._reads[tlp.tag] += 4

    def _ended(self, tlp):
        """A dword was written that may be the answer to a request."""
        for kind in _KINDS:
            at = range(tlp.address - kind.LAYOUT.size, tlp.address, 4)
            if all(one in self._read for one in at) and self._read[at[0]][0] == kind.TYPE:
                request = kind.unpack(b"".join(self._read.pop(one) for one in at))
                if Status(tlp.data[0]) is Status.OK:
                    self.counts[kind.__name__] += 1
                    self._carry_out(request)
                return

    def _carry_out(self, request):
        if isinstance(request, Attach):
            self.attached[request.endpoint] = request.domain
        elif isinstance(request, Detach):
            self.attached.pop(request.endpoint, None)
        elif isinstance(request, Map):
            self._mapped[request.domain][request.virt_start] = request
            self._count(request, 1)
        else:
            mapped = self._mapped[request.domain]
            for start in [start for start in mapped if request.virt_start <= start <= request.virt_end]:
                self._count(mapped.pop(start), -1)

    def _count(self, one, by):
        first, pages = one.phys_start // _PAGE, (one.virt_end - one.virt_start + 1) // _PAGE
        for right in (MapFlag.READ, MapFlag.WRITE):
            if one.flags & right:
                self._pages[one.domain, right].update(dict.fromkeys(range(first, first + pages), by))
