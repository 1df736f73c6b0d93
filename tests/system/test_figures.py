"""The observer of a run: what moved, when, and how long its parts took."""

import pytest

from ringwall.models.events import Note, TlpReceived, TlpSent
from ringwall.models.tlp import CplStatus, Tlp, TlpType, encode, memory_read, memory_write
from ringwall.sim.figures import DATA_READ, DATA_WRITE, Figures, Region, payload_limit

CARD = 0x101


def completion(tag, byte_count, data, lower_address=0, **fields):
    return Tlp(TlpType.CPLD, requester_id=CARD, tag=tag, byte_count=byte_count, length_dw=len(data) // 4, data=data,
               lower_address=lower_address, **fields)  # fmt: skip


def test_figures():
    """SIM-FIGURES-1: reads last until their last completion, writes are instants, data is told from rings, spans end in time."""
    figures = Figures([Region("ring read", 0x1000, 0x100), Region("MSI-X", 0xFEE0_0000, 0x1000), Region("doorbell", 0x20_0000, 4)],
                      interrupts=1)  # fmt: skip

    def card(when, tlp):
        figures.take(TlpReceived(when, encode(tlp)), tlp)

    def host(when, tlp):
        figures.take(TlpSent(when, encode(tlp)), None)

    card(5, memory_read(0x1000, 16, requester_id=CARD, tag=9))
    host(8, completion(9, 16, bytes(16)))
    assert not figures.spans, "nothing is kept before the first doorbell"
    host(10, memory_write(0x20_0000, b"\0\0", requester_id=0))
    host(11, memory_write(0x30_0000, b"\0\0", requester_id=0))
    card(20, memory_read(0x1010, 16, requester_id=CARD, tag=1))
    card(21, memory_read(0x8001, 200, requester_id=CARD, tag=2))
    figures.take(Note(25, "in between"), None)
    host(30, completion(1, 16, bytes(16)))
    host(40, completion(2, 200, bytes(128), lower_address=1))
    host(41, completion(3, 4, bytes(4)))
    host(50, completion(2, 73, bytes(76)))
    card(60, memory_write(0x9003, b"12345", requester_id=CARD))
    card(61, memory_read(0xA000, 64, requester_id=CARD, tag=4))
    host(62, Tlp(TlpType.CPL, requester_id=CARD, tag=4, status=CplStatus.UR, byte_count=64))
    card(70, memory_write(0xFEE0_0010, b"\1\0\0\0", requester_id=CARD))
    card(80, memory_write(0x9003, b"6789", requester_id=CARD))
    assert figures.reads == [(40, 127), (50, 73)]
    assert figures.writes == [(60, 5), (80, 4)]
    assert figures.counts == {"ring read": 2, "doorbell": 1, DATA_READ: 2, DATA_WRITE: 2, "MSI-X": 1}
    assert figures.latencies == {"ring read": [3, 10], DATA_READ: [29, 1]}
    line = figures.timeline("first", ["doorbell", "ring read", DATA_READ, DATA_WRITE, "MSI-X"])
    assert [(span.lane, span.begin, span.end) for span in line.spans] == [
        ("doorbell", 10, 10), ("ring read", 20, 30), (DATA_READ, 21, 50), (DATA_WRITE, 60, 60), (DATA_READ, 61, 62),
        ("MSI-X", 70, 70)]  # fmt: skip
    assert line.origin == 10
    assert [span.lane for span in figures.timeline("rings", ["ring read"]).spans] == ["ring read"]


@pytest.mark.parametrize("width, rate, payload, header, limit", [
    (256, 31.5, 256, 4, 28.444), (256, 31.5, 128, 3, 25.6), (256, 31.5, 256, 3, 28.444), (512, 63.0, 512, 4, 56.889),
    (64, 8, 256, 3, 7.42), (128, 10, 256, 4, 9.143),
])  # fmt: skip
def test_payload_limit(width, rate, payload, header, limit):
    """SIM-FIGURES-2: the limits are those of the peers' table: interface or link, whichever is less."""
    assert payload_limit(width, rate, payload, header) == pytest.approx(limit, abs=0.01)
