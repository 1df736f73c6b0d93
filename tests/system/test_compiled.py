"""The compiled card: the whole card as a shared library, against the same software and models as in simulations."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from ringwall.models.events import Setup, TlpReceived
from ringwall.models.host import Delay, MemoryRead, WaitInterrupt
from ringwall.models.memory import AccessFault
from ringwall.models.tlp import encode, memory_read
from ringwall.models.virtio.blk import BlkStatus
from ringwall.sim import compiled, session
from ringwall.sim.card import bench_config
from ringwall.sim.compiled import BrokenRule, CardError, CompiledCard, replay
from ringwall.sim.compiled_bench import CompiledBench, Traffic
from ringwall.sim.log import read_log

SECTOR = 512
CONFIG = bench_config(64)


def bench_with_disk(seed, *, vectors=True, **parameters):
    """Return a bench with its IOMMU in use, and its first disk."""
    bench = CompiledBench(CONFIG, seed=seed, **parameters)
    bench.now(bench.enable_iommu(levels=2))
    return bench, bench.now(bench.disk(0, vectors=vectors))


@pytest.mark.parametrize("parameters", [{}, {"latency": 250, "jitter": 300, "split": "random", "stalls": 64}, {"split": "rcb", "rcb": 128}])
def test_translated_disk(parameters):
    """SYS-COMP-1: enumerate, IOMMU up, translated disk, golden model watching every TLP, on the compiled card (R22, R24)."""
    bench, disk = bench_with_disk(len(parameters), **parameters)
    assert [info.function for info in bench.functions] == [0, 1, 2]
    assert not any(info.problems for info in bench.functions)
    Traffic(bench, disk, bench.rng, (1, 2, 8, 16, 128)).run(12)
    bench.session.finish()
    assert bench.session.board.comparisons > 1000
    interrupts = bench.compiled.interrupts()
    assert interrupts
    assert {address & ~0xFFFFF for address, _ in interrupts} == {0xFEE0_0000}
    assert not bench.compiled.interrupts()
    bench.compiled.close()


def test_long_run(capsys):
    """SYS-COMP-2: 2 million cycles of mixed requests to two disks at once at random latencies and cuts, all data compared (R24)."""
    bench, disk = bench_with_disk(2, judged=False, latency=100, jitter=100, split="random", stalls=16)
    disks = [disk, bench.now(bench.disk(1))]
    traffic = [Traffic(bench, one, random.Random(n), (1, 1, 2, 8, 8, 16, 64, 128)) for n, one in enumerate(disks)]
    begin, first = time.perf_counter(), bench.compiled.cycle
    while bench.compiled.cycle - first < 2_000_000:
        for one in traffic:
            one.begin()
        for one in traffic:
            one.end()
    seconds, cycles = time.perf_counter() - begin, bench.compiled.cycle - first
    counts, moved = bench.compiled.counts, sum(one.moved for one in traffic)
    assert counts.refused_reads == counts.dropped_writes == 0
    assert counts.read_bytes + counts.written_bytes > moved
    with capsys.disabled():
        print(f"\n  {cycles} cycles in {seconds:.1f} s, {cycles / seconds:.0f} cycles/s, {moved >> 10} KiB of requests")
    bench.compiled.close()


def test_record_and_replay(tmp_path):
    """SYS-COMP-3: a log replays on the RTL bit by bit and through the golden model; one bit or cycle more or less is found."""
    path = tmp_path / "log.jsonl"
    bench, disk = bench_with_disk(3, judged=False, path=path, latency=60, jitter=50, split="random", stalls=100)
    Traffic(bench, disk, bench.rng, (1, 8, 16)).run(6)
    for n in range(300):  # more than the card takes at once
        bench.compiled.memory_write(bench.functions[1].bars[0].address + 0x08, (n % 2).to_bytes(4, "little"))
    bench.compiled.memory_read(bench.functions[1].bars[0].address, 64)
    bench.compiled.log(Setup(bench.compiled.cycle, "MemoryChecker", {}))
    received = bench.compiled.counts.received
    bench.compiled.close()
    text = path.read_text()
    assert text.count('"text":"offered"') > 0  # the card held the host back, and the log says since when
    assert replay(path, CONFIG) == received > 300
    judged = session.replay(*read_log(path))
    assert judged.board.comparisons > 300

    altered = tmp_path / "altered.jsonl"
    lines = text.splitlines(keepends=True)
    seen = [n for n, line in enumerate(lines) if "TlpReceived" in line]
    n = seen[len(seen) // 2]
    shifted = re.sub(r'"cycle":(\d+)', lambda found: f'"cycle":{int(found[1]) + 1}', lines[n])
    flipped = re.sub(r'(.)"\}$', lambda found: f'{int(found[1], 16) ^ 1:x}"}}', lines[n])
    for changed in ([shifted], [flipped], [], [lines[n], lines[n]]):
        altered.write_text("".join([*lines[:n], *changed, *lines[n + 1 :]]))
        with pytest.raises(BrokenRule, match="differs from the log"):
            replay(altered, CONFIG)
    sent = next(n for n, line in enumerate(lines) if "TlpSent" in line and n > len(lines) // 2)
    altered.write_text("".join(lines[:sent] + lines[sent + 1 :]))  # the card misses something
    with pytest.raises(BrokenRule, match="differs from the log"):
        replay(altered, CONFIG)
    with pytest.raises(ValueError, match="must begin at cycle 0"):
        replay(path, bench_config(128))


def poll_isr(bench, disk, request):
    """Read the ISR until it tells of ``request``, then look at once whether the used ring tells of it too: return the request's status."""
    card, isr = bench.compiled, bench.functions[1].bars[0].address + 0x1000
    if disk.blk.publish():
        card.run(disk.driver.notify())
    for _ in range(500):
        if card.memory_read(isr, 1)[0] & 1:
            disk.blk.poll()
            return request.status if request.is_done else None
        card.step(20)
    raise AssertionError("no interrupt came")


def test_order():
    """SYS-COMP-4: what an ISR read tells of has landed; a completion let past earlier writes (planted) is seen. [PCIe5 2.4.1]"""
    for late in (0, 400):
        bench, disk = bench_with_disk(4, judged=False, vectors=False)
        bench.compiled._options.late_writes = late
        content = bench.rng.randbytes(1024)
        landed = [poll_isr(bench, disk, disk.blk.write(0, content)) == 0]
        for _ in range(5):
            request = disk.blk.read(0, 1024)
            landed.append(poll_isr(bench, disk, request) == 0 and request.data == content)
            bench.compiled.perform(Delay(1000))
            disk.blk.poll()
        assert all(landed) is (late == 0)
        bench.compiled.close()


def test_unmapped_memory():
    """SYS-COMP-5: where nothing is mapped, or not for it, its reads get UR, its writes are dropped, both counted; it lives."""
    bench, disk = bench_with_disk(5, judged=False)
    card, counts = bench.compiled, bench.compiled.counts
    content = bench.rng.randbytes(4096)

    def done(request):
        bench.done(disk, [request])
        return request

    assert done(disk.blk.write(0, content)).status == BlkStatus.OK
    assert counts.refused_reads == counts.dropped_writes == 0
    for mappings in ((), ({"readable": False},)):
        write = disk.blk.write(8, content)
        place = next(disk.memory.places(write.readable[-1][0], 1))[0] & -4096
        kept = card.read(place, 4096)
        refused = counts.refused_reads
        assert card.unmap(place, 4096) == 4096
        for parameters in mappings:
            card.map(place, 4096, **parameters)
        disk.blk.publish()
        card.run(disk.driver.notify())
        while card.step(1000):
            pass
        assert counts.refused_reads > refused
        card.unmap(place, 4096)
        card.map(place, 4096)
        card.write(place, kept)
        assert done(write).status == BlkStatus.IOERR
    for mappings in ((), ({"writable": False},)):
        read = disk.blk.read(0, 4096)
        place = next(disk.memory.places(read.writable[0][0] + read.writable[0][1] - 1, 1))[0] & -4096
        kept = card.read(place, 4096)
        dropped = counts.dropped_writes
        card.unmap(place, 4096)
        for parameters in mappings:
            card.map(place, 4096, **parameters)
            card.write(place, kept)
        disk.blk.publish()
        card.run(disk.driver.notify())
        while card.step(1000):
            pass
        assert counts.dropped_writes > dropped
        assert not mappings or card.read(place, 4096) == kept
        card.unmap(place, 4096)
        card.map(place, 4096)
        card.write(place, kept)
        assert done(read).data != content
    read = done(disk.blk.read(0, 4096))
    assert (read.status, read.data) == (BlkStatus.OK, content)
    card.close()


def test_mappings():
    """SYS-COMP-6: memory of files and fresh memory side by side, split by unmapping; what does not fit is refused."""
    file = os.memfd_create("guest")
    os.ftruncate(file, 0x4000)
    os.pwrite(file, b"from the file", 0x1000)
    with CompiledCard(CONFIG) as card:
        card.map(0x1_0000, 0x2000, file, 0x1000)
        card.map(0x1_2000, 0x1000)
        assert card.read(0x1_0000, 13) == b"from the file"
        card.write(0x1_1FFE, b"\1\2\3\4")  # over the border of two mappings
        assert os.pread(file, 2, 0x2FFE) == b"\1\2"
        assert card.read(0x1_1FFE, 4) == b"\1\2\3\4"
        for address, size in ((0x1_0FFF, 1), (0x1_2FFF, 0x1000), (0xFFFF, 2), (0, 1 << 40)):
            with pytest.raises(ValueError, match="must not overlap"):
                card.map(address, size)
        with pytest.raises(ValueError, match="within the file"):
            card.map(0x8_0000, 0x4001, file)
        with pytest.raises(ValueError, match="within 64 bits"):
            card.map((1 << 64) - 1, 2)
        with pytest.raises(OSError, match="Invalid argument"):
            card.map(0x8_0000, 0x1000, file, 1)
        readonly = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
        with pytest.raises(PermissionError):
            card.map(0x8_0000, 0x1000, readonly)
        card.map(0x8_0000, 0x1000, readonly, 0x1000, writable=False)
        os.close(readonly)
        assert card.read(0x8_0000, 4) == b"from"
        with pytest.raises(AccessFault):
            card.write(0x8_0000, b"x")
        assert card.unmap(0x1_0800, 0x1000) == 0x1000
        assert card.read(0x1_0000, 13) == b"from the file"
        assert card.read(0x1_1FFE, 4) == b"\1\2\3\4"
        for address in (0x1_0800, 0x1_17FF, 0x1_07FF):
            with pytest.raises(AccessFault):
                card.read(address, 2)
        assert card.unmap(0, 1 << 64) == 0x1000 + 0x1000 + 0x1000
        assert card.unmap(0, 1 << 64) == card.unmap(5, 0) == 0
        card.map((1 << 64) - 4096, 4096)
        card.write((1 << 64) - 4, b"last")
        assert card.read((1 << 64) - 4, 4) == b"last"
        with pytest.raises(AccessFault):
            card.read((1 << 64) - 4, 5)
        assert card.unmap(0, 1 << 64) == 4096
        with pytest.raises(AccessFault):
            card.read((1 << 64) - 4, 4)
    os.close(file)
    with pytest.raises(ValueError, match="after its end"):
        card.step(1)


def test_shrinking_file():
    """SYS-COMP-11: of a guest's file that shrinks while it is mapped the lost pages read as zeroes and are counted; all else goes on."""
    file = os.memfd_create("guest")
    os.ftruncate(file, 0x8000)
    os.pwrite(file, b"\xee" * 0x8000, 0)
    bench, disk = bench_with_disk(13, judged=False)
    card = bench.compiled
    card.map(1 << 40, 0x8000, file)
    os.ftruncate(file, 0x2000)
    assert card.read((1 << 40) + 0x1FF0, 32) == b"\xee" * 16 + bytes(16)
    card.write((1 << 40) + 0x4000, b"lost")
    assert card.counts.lost_pages == 2
    assert card.read((1 << 40) + 0x1000, 0x7000) == b"\xee" * 0x1000 + bytes(0x2000) + b"lost" + bytes(0x3FFC)
    assert card.counts.lost_pages == 6
    assert os.fstat(file).st_size == 0x2000
    os.close(file)
    Traffic(bench, disk, bench.rng, (1, 8)).run(3)
    card.close()
    code = "from ringwall.sim.compiled import CompiledCard; from ringwall.sim.card import bench_config\n" \
           "import os, mmap, signal; card = CompiledCard(bench_config(64)); f = os.memfd_create('x'); os.ftruncate(f, 4096)\n" \
           "card.map(0, 4096, f); other = os.memfd_create('y'); os.ftruncate(other, 4096); m = mmap.mmap(other, 4096)\n" \
           "os.ftruncate(other, 0); m[0]"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == -signal.SIGBUS, "a file of somebody else"


def test_broken_rules():
    """SYS-COMP-7: a card that breaks a rule ends the run at once, in every call from then on: limits, unasked answers, observers."""
    bench, disk = bench_with_disk(7, judged=False)
    card = bench.compiled
    card._library.card_limits(card._card, 1, compiled._Limits(1, 1, 1, 256, 256, 128, 256, 0x3000))
    with pytest.raises(BrokenRule, match="longer than Max_Read_Request_Size"):
        bench.done(disk, [disk.blk.write(0, bytes(4096))])
    with pytest.raises(BrokenRule, match="longer than Max_Read_Request_Size"):
        card.step(1)
    with pytest.raises(BrokenRule):
        card.config_read(0, 0, 4)
    card.close()

    bench, disk = bench_with_disk(8, judged=False)
    card = bench.compiled
    card._library.card_limits(card._card, 1, compiled._Limits(1, 1, 0, 256, 256, 512, 256, 0x3000))
    with pytest.raises(BrokenRule, match="write without bus master"):
        bench.done(disk, [disk.blk.read(0, 4096)])
    card.close()

    bench, _ = bench_with_disk(9, judged=False)
    card = bench.compiled
    card._send(encode(memory_read(bench.functions[1].bars[0].address, 4, requester_id=0, tag=77)))
    with pytest.raises(BrokenRule, match="unexpected completion"):
        card.step(1000)
    card.close()

    class Stop(Exception):
        pass

    def observe(event, tlp):
        if isinstance(event, TlpReceived):
            raise Stop

    bench, disk = bench_with_disk(10, judged=False)
    bench.compiled.observe = observe
    with pytest.raises(Stop):
        bench.done(disk, [disk.blk.read(0, 4096)])
    bench.compiled.close()


def test_bounded_waits(monkeypatch):
    """SYS-COMP-8: every wait ends: no interrupt, no answer in time, an idle card; refused accesses raise, and the next good one works."""
    bench, disk = bench_with_disk(11, judged=False)
    card = bench.compiled
    assert card.step(100_000) < 100_000
    assert card.is_idle
    assert card.step(100_000) == 0
    begin = card.cycle
    assert card.perform(WaitInterrupt(1, 0, 5000)) is False
    assert card.cycle - begin == 5000
    card.perform(Delay(777))
    assert card.cycle - begin == 5777
    identity = card.config_read(1, 0, 4)
    assert identity & 0xFFFF == 0x1AF4
    assert [card.config_read(1, 2 * n, 2) for n in range(2)] == [identity & 0xFFFF, identity >> 16]
    for refused in (lambda: card.config_read(7, 0, 4), lambda: card.memory_read(0x2000, 4), lambda: card.config_write(7, 4, 2, 0)):
        with pytest.raises(CardError, match="ended with UR") as error:
            refused()
        assert error.value.status == "UR"
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_LIMIT_CYCLES", 2)
        with pytest.raises(CardError, match="TIMEOUT"):
            card.config_read(1, 0, 4)
        card.step(1000)
        with pytest.raises(BrokenRule, match="did not answer"):
            card.perform(MemoryRead(bench.functions[1].bars[0].address, 4))
    bar = bench.functions[1].bars[0].address
    card.memory_write(bar + 0x08, (1).to_bytes(4, "little"))  # driver_feature_select
    assert card.memory_read(bar + 0x08, 4) == b"\1\0\0\0"
    assert card.memory_read(bar + 0x01, 7) == b"".join(card.memory_read(bar + n, 1) for n in range(1, 8))
    Traffic(bench, disk, bench.rng, (1, 8)).run(3)
    card.close()


@pytest.mark.parametrize("name, value, text", [
    ("latency", 0, "Latency"), ("jitter", -1, "Jitter"), ("seed", 1.5, "Seed"), ("idle_after", 0, "Idle"), ("split", "max ", "Splitting"),
    ("stalls", 256, "Stalls"), ("mps", 100, "Max_Payload_Size"), ("mrrs", 64, "Max_Read"), ("rcb", 32, "Read completion"),
])  # fmt: skip
def test_parameters(name, value, text):
    """SYS-COMP-9: parameters out of range are refused with a sentence, before anything is built."""
    with pytest.raises(ValueError, match=rf"^{text}.* not {re.escape(repr(value))}"):
        CompiledCard(CONFIG, **{name: value})


def test_idle_card_costs_nothing():
    """SYS-COMP-10: an idle card lets no cycle pass in a step, until software or a mapped page gives it something to do."""
    bench, disk = bench_with_disk(12, judged=False)
    card = bench.compiled
    while card.step(1000):
        pass
    at = card.cycle
    for _ in range(100):
        assert card.step(1 << 40) == 0
    assert card.cycle == at
    read = disk.blk.read(0, 512)
    bench.done(disk, [read])
    assert read.status == BlkStatus.OK
    card.close()
