"""The judge of a card with a virtio-iommu: what it lets pass, and what it must not."""

import pytest

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.tlp import Tlp, TlpType, encode
from ringwall.models.virtio.iommu_formats import Attach, Detach, Map, MapFlag, Status, Unmap

from .wall_watch import WallWatch

CARD, AT, PHYSICAL, IOVA, SIZE = 0x100, 0x27629E0, 0x5000, 0xFFFF_E000, 0x2000
MAPPED = Map(1, IOVA, IOVA + SIZE - 1, PHYSICAL, MapFlag.READ)


class Card:
    """Has what a watch wants of a card."""

    observe = None


class Link:
    """TLPs to and from a card, as the watch sees them."""

    def __init__(self):
        self.card = Card()
        self.watch = WallWatch(self.card)

    def request(self, kind, function, address, size, data=b""):
        tlp = Tlp(kind, requester_id=CARD | function, tag=7, address=address, length_dw=size // 4, first_be=15, last_be=15 * (size > 4),
                  data=data)  # fmt: skip
        self.card.observe(TlpReceived(0, []), tlp)

    def ask(self, request, status=Status.OK):
        """The card reads a request in two pieces, the first answered in two, and writes the status behind it."""
        raw = request.pack()
        cut = len(raw) - 8
        for at, pieces in ((0, (raw[:4], raw[4:cut])), (cut, (raw[cut:],))):
            self.request(TlpType.MRD, 0, AT + at, sum(map(len, pieces)))
            for piece in pieces:
                self.card.observe(TlpSent(0, encode(Tlp(TlpType.CPLD, requester_id=CARD, tag=7, length_dw=len(piece) // 4,
                                                        byte_count=len(piece), data=piece))), None)  # fmt: skip
        self.request(TlpType.MWR, 0, AT + len(raw), 4, bytes([status, 0, 0, 0]))


@pytest.fixture
def link():
    made = Link()
    made.ask(Attach(1, 1))
    return made


def test_mapped(link):
    """LINUX-WALL-1: accesses within what is mapped, messages, the IOMMU's own accesses and those of a function without a domain pass."""
    link.ask(MAPPED)
    link.ask(Map(1, 0, 0xFFF, 0x9000, MapFlag.WRITE))
    link.request(TlpType.MRD, 1, PHYSICAL, 64)
    link.request(TlpType.MRD, 1, PHYSICAL + SIZE - 64, 64)
    link.request(TlpType.MWR, 1, 0x9000, 64, bytes(64))
    link.request(TlpType.MWR, 1, 0xFEE0_0000, 4, bytes(4))
    link.request(TlpType.MWR, 2, 0xA000, 64, bytes(64))
    link.request(TlpType.MWR, 0, 0xA000, 64, bytes(64))
    link.ask(Unmap(1, IOVA, IOVA + SIZE - 1), Status.INVAL)
    link.request(TlpType.MRD, 1, PHYSICAL, 64)
    assert link.watch.counts == {"Attach": 1, "Map": 2, "accesses": 4} and link.watch.attached == {1: 1}
    link.ask(Detach(1, 1))
    link.request(TlpType.MRD, 1, 0xA000, 64)


@pytest.mark.parametrize(("kind", "address", "size"), [
    (TlpType.MWR, PHYSICAL, 64), (TlpType.MRD, PHYSICAL - 64, 128), (TlpType.MRD, PHYSICAL + SIZE, 64), (TlpType.MWR, 0xFEF0_0000, 4),
])  # fmt: skip
def test_beside(link, kind, address, size):
    """LINUX-WALL-2: a write of what may be read, an access that begins or ends beside a mapping, a message beside the window are told."""
    link.ask(MAPPED)
    with pytest.raises(AssertionError, match=r"beside what is mapped in domain 1 \[VIRTIO1\.4 5\.13\.6\.6\]"):
        link.request(kind, 1, address, size, bytes(size) if kind is TlpType.MWR else b"")


@pytest.mark.parametrize(("requests", "status"), [
    ((MAPPED, Unmap(1, IOVA, IOVA + SIZE - 1)), Status.OK), ((MAPPED, Unmap(1, 0, 2**64 - 1)), Status.OK),
    ((Map(2, IOVA, IOVA + SIZE - 1, PHYSICAL, MapFlag.READ),), Status.OK), ((MAPPED,), Status.NOMEM),
    ((MAPPED, Detach(1, 1), Attach(2, 1)), Status.OK),
])  # fmt: skip
def test_stale(link, requests, status):
    """LINUX-WALL-3: an access behind the answer to an UNMAP, by another domain's mapping, or by one that was refused, is told."""
    for request in requests:
        link.ask(request, status)
    with pytest.raises(AssertionError, match="beside what is mapped"):
        link.request(TlpType.MRD, 1, PHYSICAL, 64)
