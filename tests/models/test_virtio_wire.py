"""The judge that knows a ring only from the card's own reads and writes."""

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.split import SplitDriver
from ringwall.models.virtio.wire import WireJudge


class Card:
    """Serves one chain after the other; every read and write is told to the judge."""

    def __init__(self, *, indirect=False):
        self.memory, self.number, self.back = GuestMemory(), 0, []
        self.ring = SplitDriver(self.memory, size=8, base=0x10000, indirect=indirect, tables=0x2_0004)
        self.judge = WireJudge(self.ring.layout, indirect=indirect,
                               on_returned=lambda one, length: self.back.append((bytes(one.sent), length)))  # fmt: skip

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

    def serve(self, turn, tables=()):
        """One chain there and back; ``tables``: what is read of its table, from its start on."""
        layout = self.ring.layout
        self.memory.write(0x5000, bytes([turn]) * 16)
        head = self.ring.add_chain([(0x5000, 16)], [(0x6000, 32)], direct=0 if self.ring.indirect else None)
        self.ring.publish()
        for span in ((layout.avail, 4), (layout.avail_slot(turn), 2), layout.parts[0]):
            self.read(*span)
        for at, length in tables:
            self.read(0x2_0004 + 144 * head + at, length)
        self.read(0x5000, 16)
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


def test_wire_tables():
    """MODEL-WIRE-2: a table is known as far as it was read, in whatever pieces; a chain whose table was not read to its end, a write to a
    table and a read behind it are found, and so is a table without the feature (V026, V029, V031)."""
    card = Card(indirect=True)
    for turn, tables in enumerate(([(0, 32)], [(0, 16), (16, 16)], [(0, 16), (0, 32)])):
        card.serve(turn, tables)
    card.judge.end(card.number, is_finished=True)
    assert card.judge.found == []
    assert card.back == [(bytes([turn]) * 16, 32) for turn in range(3)]
    card.serve(3, [(0, 16)])
    assert {one.rule for one in card.judge.found} == {"blind return", "stray write"}
    card = Card(indirect=True)
    card.serve(0, [(0, 32), (16, 32), (32, 16)])
    assert [one.rule for one in card.judge.found] == ["stray read", "stray read"]
    card.judge.found.clear()
    head = card.ring.add_chain([(0x5000, 16)], [(0x6000, 32)], direct=0)
    card.ring.publish()
    for span in ((card.ring.layout.avail, 4), (card.ring.layout.avail_slot(1), 2), card.ring.layout.parts[0]):
        card.read(*span)
    card.write(0x2_0004 + 144 * head, b"x")
    assert [one.rule for one in card.judge.found] == ["V026"]
    card = Card()
    card.ring.indirect = True
    card.ring.add_malformed("loop in an indirect table", [(0x5000, 16)])
    card.ring.publish()
    for span in ((card.ring.layout.avail, 4), (card.ring.layout.avail_slot(0), 2), card.ring.layout.parts[0]):
        card.read(*span)
    assert card.judge.erred
    assert card.judge.order[0].chain.error == "INDIRECT without the feature"
