"""Warm reboots of a user-mode Linux on the card: as its kernel does it, and with nothing reset at all."""

import struct
import sys

import pytest

from ringwall.sim.linux import uml
from ringwall.sim.linux.loop import Loop

from .test_main import NoCard
from .test_uml import Guests


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


@pytest.mark.guest
def test_reboot(one):
    """LINUX-UML-4: three warm reboots in the midst of reads: the guest resets live rings, connects anew, finds what it wrote (R72)."""
    bridge, cut = one.session.bridge, []
    write = bridge.bar_write

    def watch(function, bar, offset, data):
        if (bar, offset, data) == (0, 0x14, b"\0") and bridge.bar_read(function, 0, 0x14, 1) == b"\x0f":
            cut.append(in_flight(one.session, function))
        write(function, bar, offset, data)

    bridge.bar_write = watch
    run = one.boot("reboot", "job_count=3")
    assert run.fact("rebooted") == "3"
    assert run.facts["boot"] == ["1", "2", "3", "4"]
    assert len(run.facts["found"]) == 4
    assert len(cut) == 8  # each disk, each time
    assert sum(map(bool, cut)) >= 3
    assert [server.counts["connections"] for server in one.servers.values()] == [4, 4]
    counts, dma = bridge.counts, one.session.card.counts
    assert counts.strange_interrupts == 0
    assert dma.refused_reads == dma.dropped_writes == 0


@pytest.mark.guest
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


# What user-mode Linux does to its console before it starts itself anew, and what then ends that: a signal for each read of the console.
_SIGNALLED = """
import fcntl, os, signal, sys, time
fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_ASYNC)
fcntl.fcntl(1, fcntl.F_SETOWN, os.getpid())
signal.signal(signal.SIGIO, signal.SIG_IGN)
print("reboot: Restarting system", flush=True)
end = time.monotonic() + 10
while fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ASYNC and time.monotonic() < end:
    time.sleep(0.01)
signal.signal(signal.SIGIO, signal.SIG_DFL)
for number in range(20):
    print("RINGWALL line", number, flush=True)
    time.sleep(0.02)
print("RINGWALL done 0", flush=True)
"""


def test_reboot_signals(tmp_path):
    """LINUX-REBOOT-2: once a guest says that it restarts, reading its console sends it no signal, which would end it."""
    loop = Loop(NoCard())
    try:
        run = uml.serve(loop, [sys.executable, "-c", _SIGNALLED], folder=tmp_path, timeout_s=30)
        assert run.is_good
        assert len(run.facts["line"]) == 20
    finally:
        loop.close()
