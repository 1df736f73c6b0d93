"""The judge of a card with a RISC-V IOMMU: what it lets pass, and what it must not."""

import pytest

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.iommu.commands import IodirInvalDdt, IofenceC, IotinvalVma
from ringwall.models.iommu.entries import SV39, DeviceContext
from ringwall.models.iommu.faults import Cause, FaultRecord
from ringwall.models.tlp import Tlp, TlpType, encode

from .table_watch import TableWatch

HOST, CARD, BAR, QUEUE, CONTEXTS = 0, 0x100, 0x4_0000_8000, 0x83B0_0000, 0x83AE_2000
PSCID, ROOT, MIDDLE, LOW, DATA, LARGE, IOVA = 5, 0x8000_0000, 0x8000_1000, 0x8000_2000, 0x9000_0000, 0xA000_0000, 0x12_3456_7000
READS, WRITES = 3, 5  # V and R, V and W


class Card:
    """Has what a watch wants of a card."""

    observe = None


class Link:
    """TLPs to and from a card, as the watch sees them."""

    def __init__(self):
        self.card = Card()
        self.watch = TableWatch(self.card)
        self.slot = 0
        for register, value in ((0x10, BAR & 0xFFFF_FFFF | 4), (0x14, BAR >> 32)):
            self.send(Tlp(TlpType.CFGWR0, completer_id=CARD, register=register, first_be=15, length_dw=1, data=value.to_bytes(4, "little")))
        self.send(Tlp(TlpType.MWR, address=BAR + 0x18, length_dw=2, first_be=15, last_be=15,
                      data=(QUEUE // 4096 << 10 | 3).to_bytes(8, "little")))  # fmt: skip

    def send(self, tlp):
        self.card.observe(TlpSent(0, encode(tlp)), None)

    def request(self, kind, function, address, size, data=b""):
        tlp = Tlp(kind, requester_id=CARD | function, tag=7, address=address, length_dw=size // 4, first_be=15, last_be=15 * (size > 4),
                  data=data)  # fmt: skip
        self.card.observe(TlpReceived(0, []), tlp)

    def answer(self, data):
        """In two pieces when it is long."""
        for piece in (data[:8], data[8:]):
            if piece:
                self.send(Tlp(TlpType.CPLD, requester_id=CARD, tag=7, length_dw=len(piece) // 4, byte_count=len(piece), data=piece))

    def read(self, address, data):
        self.request(TlpType.MRD, 0, address, len(data))
        self.answer(data)

    def context(self, **fields):
        self.read(CONTEXTS + 2 * 32, DeviceContext(**fields).pack())

    def entry(self, table, index, target, flags=1):
        self.read(table + 8 * index, (target // 4096 << 10 | flags).to_bytes(8, "little"))

    def walk(self, flags=READS | WRITES, target=DATA):
        """By three levels to a page for `IOVA`."""
        self.entry(ROOT, IOVA >> 30, MIDDLE)
        self.entry(MIDDLE, IOVA >> 21 & 511, LOW)
        self.entry(LOW, IOVA >> 12 & 511, target, flags)

    def command(self, command):
        self.read(QUEUE + 16 * self.slot, command.encode())
        self.slot += 1

    def fence(self, head=None):
        """Software sees that the commands are over, up to ``head``."""
        self.command(IofenceC())
        self.send(Tlp(TlpType.MRD, requester_id=HOST, tag=3, address=BAR + 0x20, length_dw=1, first_be=15))
        done = (self.slot if head is None else head).to_bytes(4, "little")
        self.card.observe(TlpReceived(0, []), Tlp(TlpType.CPLD, requester_id=HOST, tag=3, length_dw=1, byte_count=4, data=done))

    def fails(self, kind=TlpType.MRD, address=DATA, size=64):
        with pytest.raises(AssertionError, match=r"goes by no translation of function 2 that is in force \[RVIOMMU1\.0 4\.1\.1\]"):
            self.request(kind, 2, address, size, bytes(size) if kind is TlpType.MWR else b"")


@pytest.fixture
def link():
    made = Link()
    made.context(fsc_mode=SV39.mode, fsc_ppn=ROOT // 4096, PSCID=PSCID)
    return made


def test_in_force(link):
    """LINUX-TABLE-1: accesses by what was read, in a page and in a large one, of an endpoint that is not translated, of the IOMMU pass."""
    link.walk()
    link.entry(MIDDLE, 1, LARGE, READS)
    link.request(TlpType.MRD, 2, DATA, 64)
    link.request(TlpType.MWR, 2, DATA + 4032, 64, bytes(64))
    link.request(TlpType.MRD, 2, LARGE + 0x1F_FFC0, 64)
    link.request(TlpType.MRD, 1, 0x1234000, 64)
    link.request(TlpType.MWR, 0, QUEUE, 32, FaultRecord(Cause.WRITE_PAGE_FAULT, 3, device_id=2, iotval=IOVA + 5).pack())
    assert link.watch.faults == {(2, Cause.WRITE_PAGE_FAULT, IOVA): 1}
    assert link.watch.counts == {"contexts": 1, "leaves": 2, "large": 1, "accesses": 3}
    link.fails(address=LARGE + 0x20_0000)


@pytest.mark.parametrize(("flags", "kind", "address", "size"), [
    (READS, TlpType.MWR, DATA, 64), (WRITES, TlpType.MRD, DATA, 64), (READS, TlpType.MRD, DATA + 4032, 128), (0, TlpType.MRD, DATA, 64),
    (READS - 1, TlpType.MRD, DATA, 64),
])  # fmt: skip
def test_beside(link, flags, kind, address, size):
    """LINUX-TABLE-2: what a leaf gives no right to, an access that ends behind its page, one by an invalid entry are told."""
    link.walk(flags)
    link.fails(kind, address, size)


@pytest.mark.parametrize("command", [
    IotinvalVma(), IotinvalVma(pscid=PSCID), IotinvalVma(address=IOVA), IotinvalVma(address=IOVA, pscid=PSCID), IodirInvalDdt(),
    IodirInvalDdt(2),
])  # fmt: skip
def test_stale(link, command):
    """LINUX-TABLE-3: a translation counts until software sees that its invalidation is over; behind that it is told."""
    link.walk()
    link.command(command)
    link.request(TlpType.MRD, 2, DATA, 64)
    link.fence(head=0)
    link.request(TlpType.MRD, 2, DATA, 64)
    link.fence()
    link.fails()


@pytest.mark.parametrize("command", [
    IotinvalVma(address=IOVA + 4096), IotinvalVma(pscid=PSCID + 1), IotinvalVma(address=IOVA, pscid=PSCID + 1), IodirInvalDdt(1),
])  # fmt: skip
def test_others(link, command):
    """LINUX-TABLE-4: invalidations of others, and what was asked for behind one, leave a translation in force; what was before does not."""
    link.walk()
    link.command(command)
    link.fence()
    link.request(TlpType.MRD, 2, DATA, 64)
    link.request(TlpType.MRD, 0, LOW + 8 * (IOVA >> 12 & 511), 8)  # asked for in front of the command, answered behind it
    link.card.observe(TlpReceived(0, []), Tlp(TlpType.MRD, requester_id=CARD, tag=8, address=QUEUE + 16 * link.slot, length_dw=4,
                                              first_be=15, last_be=15))  # fmt: skip
    link.send(Tlp(TlpType.CPLD, requester_id=CARD, tag=8, length_dw=4, byte_count=16, data=IotinvalVma().encode()))
    link.slot += 1
    link.answer((DATA // 4096 << 10 | READS).to_bytes(8, "little"))
    link.request(TlpType.MRD, 2, DATA, 64)
    assert link.watch.counts["leaves"] == 2
    link.fence()
    link.fails()
    link.command(IotinvalVma())
    link.walk()
    link.fence()
    link.request(TlpType.MRD, 2, DATA, 64)


def test_identity(link):
    """LINUX-TABLE-5: behind a context that passes addresses everything may be reached, until the one in front of it is in force again."""
    link.command(IodirInvalDdt(2))
    link.context()
    link.fence()
    link.request(TlpType.MRD, 2, 0x1234000, 64)
    link.command(IodirInvalDdt(2))
    link.context(fsc_mode=SV39.mode, fsc_ppn=ROOT // 4096, PSCID=PSCID)
    link.fence()
    link.fails()
