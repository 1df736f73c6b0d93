"""The log of a whole-card run is judged again without the card: it replays clean, and what is wrong in it is named by its rule."""

import json
from dataclasses import replace as changed
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.events import HostStore, TlpReceived
from ringwall.models.iommu.commands import IofenceC
from ringwall.models.iommu.faults import Cause, FaultRecord
from ringwall.models.tlp import TlpType, decode, encode
from ringwall.sim.card import OWN, OWN_BYTES, Card, bench_card, bench_config
from ringwall.sim.log import Log, read_log, run_header
from ringwall.sim.run import params, run
from ringwall.sim.scoreboard import Difference
from ringwall.sim.session import replay

MESSAGES = 0xFEE0_0000, 0x10_0000
OK, IOERR = 0, 1


@pytest.fixture(scope="module")
def recorded(request, tmp_path_factory):
    """The log of a run, what its live judges counted, and its events."""
    path = tmp_path_factory.mktemp("replay") / "log.jsonl"
    run(bench_card(), module=__name__, node=request.node.nodeid, params={"path": str(path)}, sim="verilator")
    return path, json.loads(path.with_suffix(".counts").read_text()), list(read_log(path)[1])


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def disks_work_and_fault(dut):
    """SYS-REPLAY-0: requests of two disks, a fault and its record, a reset, IOFENCE.C with data, interrupts: all of it into a log."""
    config, path = bench_config(256), params()["path"]
    log = Log(path, run_header(cocotb.RANDOM_SEED, {"width": 256}))
    card = await Card(dut, config, seed=cocotb.RANDOM_SEED, latency=60, log=log).begin()
    await card.enable_iommu(levels=2)
    disks = [await card.disk(0, buffer_pages=60), await card.disk(1, buffer_pages=60, platform=False)]
    content = card.rng.randbytes(8192)
    for disk in disks:
        for framing in ("parts", "pages", "random"):
            await disk.done([disk.blk.write(8, content, framing=framing), disk.blk.get_id()])
            request = disk.blk.read(8, 8192, framing=framing)
            await disk.done([request])
            assert request.data == content
    disk = disks[0]
    request = disk.blk.read(8, 8192)
    page = request.writable[0][0] + 4096 & -4096
    frame = disk.memory.frames[page // 4096] * 4096
    disk.table.unmap(page)
    mark = card.allocator.pages(1)
    await card.port.run(card.iommu.invalidate(iova=page))
    await card.port.run(card.iommu.submit([IofenceC(address=mark + 64, data=0x600D_F00D)]))
    await card.port.run(card.iommu.fence())
    await disk.done([request], may_fail=True)
    assert request.status == IOERR
    records = await card.port.run(card.iommu.read_faults())
    assert {record.cause for record in records} == {Cause.WRITE_PAGE_FAULT}
    disk.table.map_page(page, frame, perms="rwu")
    disk.golden.forget_request(disk.blk.write(600, content))
    await disk.offer()
    await ClockCycles(dut.clk, 100)
    await disk.restart()
    request = disk.blk.read(8, 8192)
    await disk.done([request])
    assert request.data == content
    await ClockCycles(dut.clk, 1000)
    card.finish()
    log.close()
    Path(path).with_suffix(".counts").write_text(json.dumps(counts_of(card.session)))


def counts_of(session):
    """Return the comparisons of each judge, and the number of events."""
    board = session.board
    return [{type(one).__name__ + str(getattr(one, "function", "")): one.comparisons for one in board.checkers}, board.events]


def test_clean(recorded):
    """SYS-REPLAY-1: the replay judges what the run judged, as often: accesses, rings, data, messages, fences, faults, all memory."""
    path, counts, _ = recorded
    session = replay(*read_log(path))
    assert counts_of(session) == counts
    assert all(count > 0 for count in counts[0].values())
    assert {"RingChecker1", "RingChecker2", "MessageChecker0", "FenceChecker0", "FaultQueueChecker0", "MemoryChecker"} <= set(counts[0])
    assert not session.memory.differences(session.golden)


class Writes:
    """The writes of the card in a log: (place in the log, TLP)."""

    def __init__(self, events):
        self.events = events
        self.all = [(at, tlp) for at, event in enumerate(events) if isinstance(event, TlpReceived)
                    for tlp in [decode(event.dwords)] if tlp.type is TlpType.MWR]  # fmt: skip

    def of(self, function, is_so=lambda tlp: True):
        return [(at, tlp) for at, tlp in self.all if tlp.requester_id & 0xFF == function and is_so(tlp)]

    def elements(self):
        """Those of used elements of disk 1, whose addresses are physical: as its RingChecker's parameters say."""
        used = next(event.parameters["used"] for event in self.events
                    if getattr(event, "checker", "") == "RingChecker" and event.parameters["function"] == 2)  # fmt: skip
        return self.of(2, lambda tlp: used + 4 <= tlp.byte_span()[0] < used + 4 + 8 * 64)

    def data(self, function):
        """Those of 64 bytes and more into buffers."""
        return self.of(function, lambda tlp: len(tlp.data) >= 64)


def flip(tlp, at, bits):
    """Return the TLP with some bits of payload byte ``at`` inverted, counted from its first enabled byte."""
    at += tlp.byte_span()[0] - tlp.address
    data = bytearray(tlp.data)
    data[at] ^= bits
    return changed(tlp, data=bytes(data))


def in_the_middle(found):
    assert len(found) > 2
    return found[len(found) // 2]


def a_data_dword(writes):
    at, tlp = in_the_middle(writes.data(1))
    return at, flip(tlp, 20, 0x40)


def a_used_length(writes):
    at, tlp = in_the_middle(writes.elements())
    return at, flip(tlp, 6, 1)


def a_used_id(writes):
    at, tlp = in_the_middle(writes.elements())
    return at, flip(tlp, 0, 0x20)


def an_unmapped_page(writes):
    at, tlp = in_the_middle(writes.data(1))
    return at, changed(tlp, address=tlp.address + 0x100_0000_0000)


def a_message(writes):
    at, tlp = in_the_middle(writes.of(1, lambda tlp: MESSAGES[0] <= tlp.address < sum(MESSAGES)))
    return at, flip(tlp, 0, 2)


def a_fault_record(writes):
    at, tlp = writes.of(0, lambda tlp: len(tlp.data) == 32 and OWN <= tlp.address < OWN + OWN_BYTES)[0]
    wrong = FaultRecord.unpack(tlp.data)
    return at, changed(tlp, data=changed(wrong, cause=Cause.READ_PAGE_FAULT).pack())


def a_fence(writes):
    (at, tlp), = writes.of(0, lambda tlp: tlp.data == 0x600D_F00D.to_bytes(4, "little"))
    return at, flip(tlp, 0, 1)


CORRUPTIONS = {
    a_data_dword: r"chain \d+ of function 1: \d+ writable bytes are not what the device answers \[VIRTIO1.4 5.2.6\]",
    a_used_length: r"V041 of function 2 \[VIRTIO1.4 2.7.8\]",
    a_used_id: r"V042 of function 2 \[VIRTIO1.4 2.7.8\]",
    an_unmapped_page: r"write that no allowed translation leads to \[RVIOMMU1.0 3.3, 3.8\]",
    a_message: r"interrupt is not one whole dword of the MSI-X table \[PCIe5 6.1.4, 7.7.2\]",
    a_fault_record: r"fault that did not have to be \[RVIOMMU1.0 3.3, 4.2\]",
    a_fence: r"IOFENCE.C writes otherwise than its command says \[RVIOMMU1.0 4.1.2\]",
}


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda one: one.__name__)
def test_corrupted(recorded, corruption):
    """SYS-REPLAY-2: a thing in the log that the card must not have done is found by the rule that forbids it (R19, V041, V042)."""
    path, _, events = recorded
    at, tlp = corruption(Writes(events))
    events = list(events)
    assert encode(tlp) != events[at].dwords
    events[at] = TlpReceived(events[at].cycle, encode(tlp))
    with pytest.raises(Difference, match=r"\A.*\n" + CORRUPTIONS[corruption]):
        replay(read_log(path)[0], events)


def test_lost(recorded):
    """SYS-REPLAY-3: a write of data, of a used element, or of software that is missing in the log is found too (V039)."""
    path, _, events = recorded
    writes = Writes(events)
    stores = [at for at, event in enumerate(events) if isinstance(event, HostStore) and len(set(event.data)) > 200]
    for at, rule in ((in_the_middle(writes.data(1))[0], "5.2.6"), (in_the_middle(writes.elements())[0], "V039"),
                     (stores[0], "5.2.6")):  # fmt: skip
        with pytest.raises(Difference, match=rule):
            replay(read_log(path)[0], events[:at] + events[at + 1 :])
