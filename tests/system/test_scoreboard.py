"""The judges: a run that follows the rules passes, each planted deed of the card is found, and a log gives the same verdict."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from ringwall.models.events import HostStore, Note, Operation, TlpReceived, TlpSent, Told
from ringwall.models.host import MemoryWrite
from ringwall.models.iommu.commands import IofenceC, IotinvalVma
from ringwall.models.iommu.faults import Cause, FaultRecord, TransactionType
from ringwall.models.iommu.registers import IommuMode
from ringwall.models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, PageTable
from ringwall.models.tlp import CplStatus, Tlp, TlpType, decode, encode, memory_read, memory_write
from ringwall.sim.log import Log, read_log, run_header
from ringwall.sim.scoreboard import Difference
from ringwall.sim.session import Session, replay

PAGE = 4096
TABLES, QUEUE, BUFFERS, MARKS = 0x10_0000, 0x20_0000, 0x40_0000, 0x60_0000
REGISTERS, MESSAGE = 0xE000_0000, 0xFEE0_0040
IOMMU, DEVICE, OTHER = 0x100, 0x101, 0x102  # requester IDs: bus 1, functions 0 to 2


class Run:
    """Software and a card that are written here: two devices behind page tables, the first with three pages mapped."""

    def __init__(self, log=None):
        self.now = self.entry = 0
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
        session.add("MessageChecker", function=0, table=REGISTERS + 0x300, entries=2, is_translated=False)
        self.software(MemoryWrite(REGISTERS + 0x310, 8, MESSAGE), MemoryWrite(REGISTERS + 0x318, 4, 0xCAFE))
        session.add("AccessChecker", iommu_function=0, own=[[TABLES, 64 * 4096, "r"]])
        session.add("FenceChecker")
        session.add("FaultQueueChecker", base=QUEUE, entries=64, registers=REGISTERS)
        session.add("MemoryChecker", free=[[BUFFERS + 0xFF8, 7]])

    def software(self, *operations):
        for operation in operations:
            self.session.take(Operation(self.now, operation, None))

    def fence(self, address, data, **fields):
        """Software submits IOFENCE.C; returns the token."""
        return self.session.allowed.submitted(IofenceC(address=address, data=data, **fields))

    def complete(self, status, data=b"", byte_count=8, who=IOMMU, **fields):
        """The host completes the read with tag 1."""
        self.now += 10
        kind = {"type": TlpType.CPLD, "length_dw": len(data) // 4, "data": data} if data else {"type": TlpType.CPL}
        tlp = Tlp(**kind, completer_id=0, requester_id=who, tag=1, status=status, byte_count=byte_count, **fields)
        self.session.take(TlpSent(self.now, encode(tlp)))

    def walk_fails(self, cause, status=CplStatus.SC, data=bytes(8), **fields):
        """The IOMMU reads an entry, the host answers so, then there is a record."""
        self.read(TABLES + 0x2000, 8, who=IOMMU)
        self.complete(status, data, **fields)
        self.record(cause, 0x7000)

    def card(self, tlp):
        """The card sends ``tlp``."""
        self.now += 10
        dwords = encode(tlp)
        if tlp.data and tlp.address & -PAGE != MESSAGE & -PAGE:
            start, length = tlp.byte_span()
            at = start - tlp.address
            self.session.memory.write(start, tlp.data[at : at + length], source="card")
        self.session.take(TlpReceived(self.now, dwords), decode(dwords))

    def read(self, address, length=64, who=DEVICE):
        self.card(memory_read(address, length, requester_id=who, tag=1))

    def write(self, address, data=b"12345678", who=DEVICE):
        self.card(memory_write(address, data, requester_id=who))

    def record(self, cause, iova, at=None, ttyp=TransactionType.UNTRANSLATED_WRITE, device=1, **fields):
        at = self.entry if at is None else at
        self.entry = at + 1
        self.write(QUEUE + 32 * at, FaultRecord(cause, ttyp, device, iotval=iova, **fields).pack(), who=IOMMU)

    def bypass(self, is_bypassed):
        """The driver of device 2 does without ACCESS_PLATFORM, or with it; all that follows is device 2's."""
        self.session.allowed.bypassed(2, is_bypassed)
        self.read = lambda address: self.card(memory_read(address, 8, requester_id=OTHER, tag=1))

    def late_record(self):
        """A fault, long after its page was mapped."""
        self.now += 30_000
        self.session.take(Note(self.now, "long after"))
        self.record(Cause.WRITE_PAGE_FAULT, 0x7010)

    def good(self):
        """Deeds that are all allowed."""
        self.read(BUFFERS + 5, 100)
        self.write(BUFFERS + 0xFF8, b"1234567")
        self.read(BUFFERS + 0x1000, 128)
        self.read(BUFFERS + 0x5000, 128, who=OTHER)
        self.read(TABLES + 0x2000, 8, who=IOMMU)
        self.complete(CplStatus.SC, bytes(8))
        self.record(Cause.WRITE_PAGE_FAULT, 0x8000)
        self.record(Cause.READ_PAGE_FAULT, 0x9123, 1, TransactionType.UNTRANSLATED_READ)
        self.session.take(TlpSent(self.now, encode(memory_read(0xE000_0000, 4, requester_id=0, tag=0))))
        self.session.take(Note(self.now, "half of it"))
        self.write(MESSAGE, b"\xfe\xca\0\0", who=IOMMU)
        token = self.fence(MARKS, 0x1234_5678)
        self.write(MARKS, b"\x78\x56\x34\x12", who=IOMMU)
        self.session.allowed.fence_completed(token)

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
    messages, access, fences, faults, memory = run.session.board.checkers
    assert (messages.comparisons, access.comparisons, fences.comparisons, faults.comparisons, memory.comparisons) == (1, 11, 1, 3, 1)
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
    "wrong cause": (lambda run: run.record(Cause.READ_PAGE_FAULT, 0x8000), r"allowed: .*WRITE_PAGE_FAULT \(15\)"),
    "half a record": (lambda run: run.write(QUEUE, bytes(16), who=IOMMU), "fault record is not written as one whole entry"),
    "reserved cause": (lambda run: run.record(99, 0x8000), "fault record is malformed"),
    "record at another place": (lambda run: run.record(Cause.WRITE_PAGE_FAULT, 0x8000, 3), r"not the next one \[RVIOMMU1.0 4.2\]"),
    "old place after a restart": (lambda run: (
        run.software(MemoryWrite(REGISTERS + 0x4C, 4, 2)), run.record(Cause.WRITE_PAGE_FAULT, 0x8000, 0),
        run.record(Cause.WRITE_PAGE_FAULT, 0x8000, 2)), "entry 2\n  model: entry 1"),
    "full fault queue": (lambda run: (
        run.software(MemoryWrite(REGISTERS + 0x30, 4, 4)), [run.record(Cause.WRITE_PAGE_FAULT, 0x8000) for _ in range(2)]),
        "full queue .*\n  card:  entry 3\n  model: fqh is 4"),
    "access fault of a good walk": (lambda run: run.walk_fails(Cause.WRITE_ACCESS_FAULT), "no read of the IOMMU failed"),
    "access fault of another's read": (
        lambda run: run.walk_fails(Cause.WRITE_ACCESS_FAULT, CplStatus.UR, b"", who=DEVICE), "no read of the IOMMU failed"),
    "access fault long after": (lambda run: (run.complete(CplStatus.UR), run.late_record()), "fault that did not have to be"),
    "corruption of a good walk": (
        lambda run: run.walk_fails(Cause.PT_DATA_CORRUPTION, CplStatus.UR, b""), "no read of the IOMMU was answered with poison"),
    "fence writes other data": (lambda run: (run.fence(MARKS, 5), run.write(MARKS, bytes(4), who=IOMMU)), "RVIOMMU1.0 4.1.2"),
    "fence writes too much": (
        lambda run: (run.fence(MARKS, 5), run.write(MARKS, b"\5" + bytes(7), who=IOMMU)), r"otherwise than its command says"),
    "fences out of order": (
        lambda run: (run.fence(MARKS, 5), run.fence(MARKS + 4, 6), run.write(MARKS + 4, b"\6\0\0\0", who=IOMMU)), "05000000 at 0x600000"),
    "fence writes twice": (lambda run: (
        run.fence(MARKS, 5), [run.write(MARKS, b"\5\0\0\0", who=IOMMU) for _ in range(2)]), "write of the IOMMU outside"),
    "fence without its write": (
        lambda run: run.session.allowed.fence_completed(run.fence(MARKS, 5)), "complete, its data is not written"),
    "fence of a device": (lambda run: (run.fence(BUFFERS, 5), run.write(BUFFERS, b"\5\0\0\0")), "memory differs at 0x400000"),
    "message with other data": (lambda run: run.write(MESSAGE, b"\xff\xca\0\0", who=IOMMU), r"MSI-X table \[PCIe5 6.1.4"),
    "message of 8 bytes": (lambda run: run.write(MESSAGE, b"\xfe\xca\0\0" + bytes(4), who=IOMMU), r"MSI-X table \[PCIe5 6.1.4"),
    "half a message": (lambda run: run.write(MESSAGE, b"\xfe\xca", who=IOMMU), r"byte enables 0011 0000"),
    "message to another address": (lambda run: run.write(MESSAGE + 4, b"\xfe\xca\0\0", who=IOMMU), "write of the IOMMU outside"),
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


def test_walks_that_fail():
    """SIM-BOARD-5: access faults and corruption are taken when the host failed a read of the IOMMU, or never answered it."""
    for cause, arguments in (
        (Cause.WRITE_ACCESS_FAULT, {"status": CplStatus.UR, "data": b""}),
        (Cause.WRITE_ACCESS_FAULT, {"status": CplStatus.CA, "data": b""}),
        (Cause.WRITE_ACCESS_FAULT, {"byte_count": 12}), (Cause.DDT_ENTRY_LOAD_ACCESS_FAULT, {"status": CplStatus.UR, "data": b""}),
        (Cause.PT_DATA_CORRUPTION, {"poisoned": True}), (Cause.DDT_DATA_CORRUPTION, {"poisoned": True}),
    ):  # fmt: skip
        run = Run()
        run.walk_fails(cause, **arguments)
        run.session.finish()
    run = Run()
    run.read(TABLES + 0x2000, 8, who=IOMMU)
    run.now += 10_000
    run.record(Cause.WRITE_ACCESS_FAULT, 0x7000)
    run.session.finish()


def test_lapsed_fence():
    """SIM-BOARD-6: a fence on a queue that was turned off may write or not; with its own data only."""
    run = Run()
    run.fence(MARKS, 5)
    run.fence(MARKS + 8, 6)
    run.session.allowed.commands_aborted()
    run.session.allowed.fence_completed(run.session.allowed.submitted(IofenceC()))
    run.write(MARKS + 8, b"\6\0\0\0", who=IOMMU)
    with pytest.raises(Difference, match="05000000 at 0x600000"):
        run.write(MARKS, b"\6\0\0\0", who=IOMMU)


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
