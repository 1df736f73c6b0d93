"""The judge that knows a ring only from the card's own reads and writes."""

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.split import SplitDriver
from ringwall.models.virtio.wire import WireJudge


class Card:
    """Serves one chain after the other; every read and write is told to the judge."""

    def __init__(self, **options):
        self.memory, self.number, self.back = GuestMemory(), 0, []
        self.ring = SplitDriver(self.memory, size=8, base=0x10000)
        self.judge = WireJudge(self.ring.layout, on_returned=lambda one, length: self.back.append((bytes(one.sent), length)), **options)

    def read(self, address, length):
        self.number += 1
        read = self.judge.requested(self.number, address, length)
        self.judge.answered(self.number, read, 0, self.memory.read(address, length), True)

    def write(self, address, data):
        self.number += 1
        self.memory.write(address, data)
        self.judge.wrote(self.number, address, data)

    def notify(self):
        self.number += 1
        self.judge.notified(self.number)

    def serve(self, turn):
        layout = self.ring.layout
        self.memory.write(0x5000, bytes([turn]) * 16)
        head = self.ring.add_chain([(0x5000, 16)], [(0x6000, 32)])
        self.ring.publish()
        for span in ((layout.avail, 4), (layout.avail_slot(turn), 2), layout.parts[0], (0x5000, 16)):
            self.read(*span)
        self.write(0x6000, bytes(32))
        self.write(layout.used_slot(turn), head.to_bytes(4, "little") + (32).to_bytes(4, "little"))
        self.write(layout.used_idx, (turn + 1).to_bytes(2, "little"))
        self.read(layout.avail, 4)
        self.notify()
        assert self.ring.poll_used() == [(head, 32)]


def test_wire():
    """MODEL-WIRE-1: a good card is not blamed, and every byte of its chains is known; an index that jumps, stray accesses, a needless
    notification and whatever comes after a reset are found (V011, V035)."""
    card = Card()
    for turn in range(20):
        card.serve(turn)
    card.judge.end(card.number, is_finished=True)
    assert card.judge.found == []
    assert card.back == [(bytes([turn]) * 16, 32) for turn in range(20)]
    assert card.judge.out == {} and card.judge.order == []
    card.write(card.ring.layout.used_idx, (30).to_bytes(2, "little"))
    card.read(0x9000, 4)
    card.write(0x9000, b"1")
    card.notify()
    card.judge.ended()
    card.read(0x10000, 16)
    assert [one.rule for one in card.judge.found] == ["used index", "stray read", "stray write", "V035", "V011"]
