"""Warm reboots of a user-mode Linux on the card: as its kernel does it, and with nothing reset at all."""

import struct

import pytest

from .test_uml import Guests

pytestmark = pytest.mark.guest


@pytest.fixture
def one(tmp_path):
    made = Guests(tmp_path, judged=True)
    yield made
    made.close()


def in_flight(session, function):
    """Return how many chains of queue 0 are with the function; 0 when it has no queue. [VIRTIO1.4 2.7, 4.1.4.3]"""
    size, desc, avail, used = struct.unpack_from("<H6xQQQ", session.bridge.bar_read(function, 0, 0x18, 0x20))
    if not size or not desc:
        return 0
    given, back = (int.from_bytes(session.card.read(at + 2, 2), "little") for at in (avail, used))
    return (given - back) % 0x1_0000


def test_reboot(one):
    """LINUX-UML-4: three warm reboots in the midst of reads: the guest resets live rings, connects anew, finds what it wrote (R72)."""
    bridge, cut = one.session.bridge, []
    write = bridge.bar_write

    def watch(function, bar, offset, data):
        if (bar, offset, data) == (0, 0x14, b"\0") and bridge.bar_read(function, 0, 0x14, 1) == b"\x0f":
            cut.append(in_flight(one.session, function))
        write(function, bar, offset, data)

    bridge.bar_write = watch
    run = one.boot("reboot", "job_count=3", expect=[r"I/O error, dev vd. sector \d+ op 0x0:\(READ\)"])
    assert run.fact("rebooted") == "3"
    assert run.facts["boot"] == ["1", "2", "3", "4"]
    assert len(run.facts["found"]) == 4
    assert len(cut) == 8  # each disk, each time
    assert sum(map(bool, cut)) >= 3
    assert [server.counts["connections"] for server in one.servers.values()] == [4, 4]
    counts, dma = bridge.counts, one.session.card.counts
    assert counts.strange_interrupts == 0
    assert dma.refused_reads == dma.dropped_writes == 0


def test_reboot_live(one):
    """LINUX-REBOOT-1: the guest is gone at once, rings and mappings live; the card ends its reads, and the next kernel resets it."""
    session = one.session
    for server in one.servers.values():
        server.keeps = True
    run = one.boot("reboot", "job_before=60000000", is_good=False,
                   until=lambda run: "reading" in run.facts and all(in_flight(session, n) for n in one.servers))  # fmt: skip
    assert not run.problem
    assert not any(server.is_connected for server in one.servers.values())
    unheard = session.bridge.counts.interrupts
    session.settle()
    assert session.card.is_idle
    assert [in_flight(session, n) for n in one.servers] == [0, 0]
    assert session.bridge.counts.interrupts >= unheard + 2
    for n, server in one.servers.items():
        assert session.bridge.bar_read(n, 0, 0x14, 1) == b"\x0f"  # DRIVER_OK: nobody reset it
        server.forget()
    run = one.boot("reboot", "job_count=1")
    assert run.facts["boot"] == ["2"]
    assert len(run.facts["found"]) == 1
    dma = session.card.counts
    assert session.bridge.counts.strange_interrupts == 0
    assert dma.refused_reads == dma.dropped_writes == 0
