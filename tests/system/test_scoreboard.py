"""The judges: a run that follows the rules passes, each planted deed of the card is found, and a log gives the same verdict."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from ringwall.models.events import HostStore, Note, TlpReceived, TlpSent, Told
from ringwall.models.iommu.commands import IofenceC, IotinvalVma
from ringwall.models.iommu.faults import Cause, FaultRecord, TransactionType
from ringwall.models.iommu.registers import IommuMode
from ringwall.models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, PageTable
from ringwall.models.tlp import decode, encode, memory_read, memory_write
from ringwall.sim.log import Log, read_log, run_header
from ringwall.sim.scoreboard import Difference
from ringwall.sim.session import Session, replay

TABLES, QUEUE, BUFFERS = 0x10_0000, 0x20_0000, 0x40_0000
IOMMU, DEVICE, OTHER = 0x100, 0x101, 0x102  # requester IDs: bus 1, functions 0 to 2


class Run:
    """Software and a card that are written here: two devices behind page tables, the first with three pages mapped."""

    def __init__(self, log=None):
        self.now = 0
        self.session = session = Session(seed=99, log=log, cycle=lambda: self.now)
        allocator = Allocator(session.memory, TABLES, 64 * 4096, rng=random.Random(3))
        directory = DeviceDirectory(session.memory, allocator, levels=1, observer=session.allowed)
        self.table = PageTable(session.memory, allocator, observer=session.allowed)
        other = PageTable(session.memory, allocator, observer=session.allowed)
        session.allowed.mode_changed(IommuMode.LVL1)
        session.allowed.mode_settled()
        directory.set(1, DeviceContext.sv39(self.table.root, PSCID=1))
        directory.set(2, DeviceContext.sv39(other.root, PSCID=2))
        self.table.map_page(0x7000, BUFFERS)
        self.table.map_page(0x8000, BUFFERS + 0x1000, perms="ru")
        other.map_page(0x7000, BUFFERS + 0x5000)
        session.add("AccessChecker", iommu_function=0, own=[[TABLES, 64 * 4096, "r"], [QUEUE, 2048, "rw"]])
        session.add("FaultQueueChecker", base=QUEUE, entries=64)
        session.add("MemoryChecker", free=[[BUFFERS + 0xFF8, 7]])

    def card(self, tlp):
        """The card sends ``tlp``."""
        self.now += 10
        dwords = encode(tlp)
        if tlp.data:
            start, length = tlp.byte_span()
            at = start - tlp.address
            self.session.memory.write(start, tlp.data[at : at + length], source="card")
        self.session.take(TlpReceived(self.now, dwords), decode(dwords))

    def read(self, address, length=64, who=DEVICE):
        self.card(memory_read(address, length, requester_id=who, tag=1))

    def write(self, address, data=b"12345678", who=DEVICE):
        self.card(memory_write(address, data, requester_id=who))

    def record(self, cause, iova, at=0, ttyp=TransactionType.UNTRANSLATED_WRITE, device=1, **fields):
        self.write(QUEUE + 32 * at, FaultRecord(cause, ttyp, device, iotval=iova, **fields).pack(), who=IOMMU)

    def bypass(self, is_bypassed):
        """The driver of device 2 does without ACCESS_PLATFORM, or with it; all that follows is device 2's."""
        self.session.allowed.bypassed(2, is_bypassed)
        self.read = lambda address: self.card(memory_read(address, 8, requester_id=OTHER, tag=1))

    def late_record(self):
        """A fault, long after its page was mapped."""
        self.now += 30_000
        self.session.take(Note(self.now, "long after"))
        self.record(Cause.WRITE_PAGE_FAULT, 0x7010, 2)

    def good(self):
        """Deeds that are all allowed."""
        self.read(BUFFERS + 5, 100)
        self.write(BUFFERS + 0xFF8, b"1234567")
        self.read(BUFFERS + 0x1000, 128)
        self.read(BUFFERS + 0x5000, 128, who=OTHER)
        self.read(TABLES + 0x2000, 8, who=IOMMU)
        self.record(Cause.WRITE_PAGE_FAULT, 0x8000)
        self.record(Cause.READ_PAGE_FAULT, 0x9123, 1, TransactionType.UNTRANSLATED_READ)
        self.session.take(TlpSent(self.now, encode(memory_read(0xE000_0000, 4, requester_id=0, tag=0))))
        self.session.take(Note(self.now, "half of it"))

    def revoke(self, fence=True):
        """Software takes the first page away."""
        self.now += 10
        allowed = self.session.allowed
        self.table.unmap(0x7000)
        allowed.submitted(IotinvalVma(pscid=1))
        token = allowed.submitted(IofenceC())
        if fence:
            allowed.fence_completed(token)


def test_good():
    """SIM-BOARD-1: what is allowed passes, also a revoked page until the fence has been seen complete, and is counted."""
    run = Run()
    run.good()
    run.revoke(fence=False)
    run.read(BUFFERS, 64)
    run.record(Cause.READ_PAGE_FAULT, 0x7000, 2, TransactionType.UNTRANSLATED_READ)
    run.session.finish()
    access, faults, memory = run.session.board.checkers
    assert (access.comparisons, faults.comparisons, memory.comparisons) == (9, 3, 1)
    assert [record.cause for record in faults.records] == [15, 13, 13]
    assert run.session.board.differences == 0


DEEDS = {
    "write to a read-only page": (lambda run: run.write(BUFFERS + 0x1000), "write that no allowed translation leads to"),
    "page of another device": (lambda run: run.read(BUFFERS + 0x5000), "device 1 may not read 0x405000"),
    "nobody's page": (lambda run: run.read(BUFFERS + 0x2000), "device 1 may not read 0x402000"),
    "a device that has no context": (lambda run: run.read(BUFFERS, 4, who=0x103), "device 3 may not read"),
    "zero-length read of nobody's page": (lambda run: run.read(BUFFERS + 0x2000, 0), "device 1 may not read"),
    "revoked page after the fence": (lambda run: (run.revoke(), run.read(BUFFERS, 64)), "device 1 may not read 0x400000"),
    "IOMMU writes a table": (lambda run: run.write(TABLES, who=IOMMU), "write of the IOMMU outside of its own"),
    "IOMMU reads a buffer": (lambda run: run.read(BUFFERS, 8, who=IOMMU), "read of the IOMMU outside of its own"),
    "IOMMU reads beyond its end": (lambda run: run.read(QUEUE + 2040, 16, who=IOMMU), "read of the IOMMU outside of its own"),
    "fault of a page that is mapped": (lambda run: run.late_record(), "fault that did not have to be"),
    "wrong cause": (lambda run: run.record(Cause.READ_PAGE_FAULT, 0x8000, 2), r"allowed: .*WRITE_PAGE_FAULT \(15\)"),
    "half a record": (lambda run: run.write(QUEUE, bytes(16), who=IOMMU), "fault record is not written as one whole entry"),
    "reserved cause": (lambda run: run.record(99, 0x8000, 2), "fault record is malformed"),
    "bypass that has ended": (lambda run: (run.bypass(True), run.read(0x7654_0000), run.bypass(False), run.read(0x7655_0000)),
                              "device 2 may not read 0x76550000"),
    "write before what is free": (lambda run: run.write(BUFFERS + 0xFF6, b"ab123"), "memory differs at 0x400ff6, 2 bytes"),
    "write beside what is free": (lambda run: run.write(BUFFERS + 0xFFC, b"4567"), "memory differs at 0x400fff, 1 bytes"),
    "stray write": (lambda run: run.write(BUFFERS + 0x1000 - 4, bytes(3) + b"x"), "memory differs at 0x400fff, 1 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_bad(tmp_path, deed):
    """SIM-BOARD-2: each forbidden deed ends the run with both sides, the events before and the seed; so does its replay."""
    act, message = DEEDS[deed]
    path = tmp_path / "log.jsonl"
    with Log(path, run_header(99, {"deed": deed})) as log:
        run = Run(log)
        run.good()

        def go():
            act(run)
            run.session.finish()

        with pytest.raises(Difference, match=message) as caught:
            go()
    text = str(caught.value)
    assert "seed 99" in text
    assert "half of it" in text
    assert len(text.partition("oldest first:\n")[2].splitlines()) == 20
    header, events = read_log(path)
    assert (header.seed, header.parameters) == (99, {"deed": deed})
    with pytest.raises(Difference) as again:
        replay(header, events)
    assert again.value.mismatch == caught.value.mismatch


def test_replay(tmp_path):
    """SIM-BOARD-3: a good log replays without the card to the same counts; a byte changed in it is found; a torn end is no error."""
    path = tmp_path / "log.jsonl"
    with Log(path, run_header(99, {"width": 256})) as log:
        run = Run(log)
        run.good()
        run.session.finish()
    header, events = read_log(path)
    session = replay(header, events)
    assert session.board.comparisons == run.session.board.comparisons
    assert session.board.events == run.session.board.events == log.count - 1
    assert not session.memory.differences(run.session.memory)
    assert not session.golden.differences(run.session.golden)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert header.commit.rstrip("+") == (git.stdout.strip() or "unknown")
    assert {"amaranth", "cocotb", "numpy"} <= set(header.tools)
    kinds = {type(event) for event in read_log(path)[1]}
    assert {HostStore, Told, TlpReceived, TlpSent, Note} <= kinds
    text = path.read_text()
    path.write_text(text + '{"event": "No')
    assert replay(*read_log(path)).board.events == session.board.events
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="must begin with a RunHeader"):
        read_log(path)
    at = next(n for n, line in enumerate(lines) if '"TlpReceived"' in line)
    event = next(one for n, one in enumerate(read_log_lines(lines)) if n == at - 1)
    changed = TlpReceived(event.cycle, [*event.dwords[:2], event.dwords[2] + 0x2000, *event.dwords[3:]])
    path.write_text("".join([*lines[:at], changed.to_json() + "\n", *lines[at + 1 :]]))
    with pytest.raises(Difference, match="device 1 may not read 0x402000"):
        replay(*read_log(path))


def read_log_lines(lines):
    from ringwall.models.events import from_json

    return [from_json(line) for line in lines[1:]]


def test_replay_program(tmp_path):
    """SIM-BOARD-4: the program tells agreement, difference and nonsense apart by its exit status."""
    program = Path(__file__).parents[1] / "replay.py"

    def status(file):
        done = subprocess.run([sys.executable, program, file], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    path = tmp_path / "log.jsonl"
    with Log(path, run_header(7, {"width": 64})) as log:
        run = Run(log)
        run.good()
        run.session.finish()
    code, text = status(path)
    assert code == 0
    assert f"{run.session.board.comparisons} comparisons, 0 differences" in text
    assert "seed 7, width 64" in text
    path.write_text(path.read_text() + TlpReceived(1, encode(memory_read(0x123, 4, requester_id=DEVICE, tag=3))).to_json() + "\n")
    code, text = status(path)
    assert code == 1
    assert "device 1 may not read 0x0" in text
    path.write_text("{}\n")
    assert status(path)[0] == 2
    assert status(tmp_path / "absent")[0] == 2
