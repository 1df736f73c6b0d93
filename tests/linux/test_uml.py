"""An unmodified Linux drives the card: user-mode Linux, its own drivers, its own file system."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringwall.models.events import TlpReceived
from ringwall.models.tlp import TlpType
from ringwall.sim import replay
from ringwall.sim.card import bench_config
from ringwall.sim.linux import initramfs, kernel, uml
from ringwall.sim.linux.main import Session
from ringwall.sim.linux.vhost_user import Server

pytestmark = pytest.mark.guest
CONFIG = bench_config(64)


class Guests:
    """A session with a server per disk, at which guests boot one after the other."""

    def __init__(self, folder, *, config=CONFIG, judged=False, **parameters):
        self.folder, self.lines, self.number = folder, [], 0
        self.linux, self.image = kernel.uml(), initramfs.build()
        with ExitStack() as stack:
            self.session = Session(config, judged=judged, **parameters)
            stack.callback(self.session.close)
            self.servers = {}
            for n in self.session.disks:
                self.servers[n] = Server(self.session.loop, self.session.bridge, folder / f"function{n}", n, log=self.lines.append)
                self.session.watch(n)
                stack.callback(self.servers[n].close)
            self._end = stack.pop_all()

    def boot(self, job, *words, is_good=True, **serving):
        """Run a job; return its GuestRun, which must be good."""
        self.number += 1
        run = uml.run(
            self.session.loop, [server.path for server in self.servers.values()], linux=self.linux, image=self.image, job=job,
            words=words, folder=self.folder, name=f"{job}{self.number}", **{"timeout_s": 170} | serving)  # fmt: skip
        if is_good:
            assert run.is_good, "\n".join([run.problem, *run.facts.get("failed", []), *self.lines[-10:], *run.lines[-30:]])
        self.session.loop.run(until=lambda: not any(server.is_connected for server in self.servers.values()), timeout_s=10)
        return run

    def close(self):
        self._end.close()


@pytest.fixture
def guests(tmp_path):
    made = []

    def make(**parameters):
        made.append(Guests(tmp_path, **parameters))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_tour(guests, capsys):
    """LINUX-UML-1: Linux finds the card, makes a file system, reads it back; golden model watching; the server stops once (R46, R48)."""
    one = guests(judged=True, latency=20, jitter=30, split="random")
    stopped = []

    def stop(run):
        """Serve nobody for a second, once, while the file system is written."""
        if "tree" in run.facts and not stopped:
            stopped.append(time.sleep(1))
        return False

    run = one.boot("tour", until=stop)
    text = "\n".join(run.lines)
    assert stopped
    assert re.search(r"Class 0180|Mass storage controller", text)
    assert text.count("MSI-X: Enable+ Count=2 Masked-") == 2
    assert text.count("Kernel driver in use: virtio-pci") == 2
    assert run.fact("disks") == "2"
    assert run.fact("verified") == "200"
    for line in run.facts["disk"]:  # VERSION_1, ACCESS_PLATFORM, ORDER_PLATFORM
        assert [re.search(r"features=([01]{64})", line)[1][bit] for bit in (32, 33, 36)] == ["1"] * 3
    counts, dma = one.session.bridge.counts, one.session.card.counts
    assert counts.interrupts > 100
    assert counts.strange_interrupts == 0
    assert dma.refused_reads == dma.dropped_writes == 0
    assert one.session.judge.requests > 100
    with capsys.disabled():
        print(f"\n  tour: {run.seconds:.1f} s, mounted after {run.moments['mounted'][0]:.1f} s, {run.cycles} cycles, "
              f"{one.session.judge.requests} requests judged, {counts.pumped_cycles / counts.pumped_seconds:.0f} cycles/s")  # fmt: skip


def test_rebind(guests):
    """LINUX-UML-2: 50 times each disk's driver is taken away and given back; data is there after each time."""
    one = guests()
    run = one.boot("rebind", "job_count=50")
    assert run.fact("rebound").split()[0] == "50"
    assert one.session.bridge.counts.strange_interrupts == 0


def test_coming_and_going(guests):
    """LINUX-UML-3: one server, guests come and go: remove and rescan, requests of every size, resets under load (R72), killed."""
    one = guests(judged=True)
    run = one.boot("rescan", "job_count=5")
    assert run.fact("rescanned").split()[0] == "5"
    assert len(one.boot("sizes").facts["size"]) > 20
    counts = one.session.card.counts
    enough = counts.written_bytes + (1 << 20)
    killed = one.boot("rebind", is_good=False, until=lambda run: counts.written_bytes > enough)
    assert killed.status is None
    assert not killed.problem
    run = one.boot("reset", "job_count=4")
    assert run.fact("resets").split()[0] == "4"
    assert all(line.split()[1:] == ["flr", "pm"] for line in run.facts["reset_method"])
    assert [server.counts["connections"] for server in one.servers.values()] == [4, 4]


class Holes:
    """Takes the data pages of chosen requests away from under the card, and gives them back in front of the disk's next request.

    ``plan``: {(type, sector)}, each once; ``met``: what was done, in order. What the card does in a hole is counted at the link, too.
    """

    def __init__(self, session, function, plan):
        self.session, self.function, self.plan, self.met, self.pages, self.memory = session, function, set(plan), [], [], None
        self.tlps = {TlpType.MRD: 0, TlpType.MWR: 0}
        self._map, self._write = session.bridge.map, session.bridge.bar_write
        session.bridge.map, session.bridge.bar_write = self.map, self.write
        self._observe, session.card.observe = session.card.observe, self.observe

    def map(self, address, size, fd, offset, **parameters):
        self._map(address, size, fd, offset, **parameters)
        if self.memory is None:
            self.memory = address, os.dup(fd), offset

    def observe(self, event, tlp):
        self._observe(event, tlp)
        if isinstance(event, TlpReceived) and tlp.type in self.tlps and tlp.address & ~4095 in self.pages:
            self.tlps[tlp.type] += 1

    def write(self, function, bar, offset, data):
        if function == self.function and (bar, offset) == self.session._doorbells[function]:
            self.fill()
            self.dig()
        self._write(function, bar, offset, data)

    def fill(self):
        """Everything is within reach again."""
        base, fd, offset = self.memory
        for page in self.pages:
            self.session.card.map(page, 4096, fd, offset + page - base)
        self.pages = []

    def dig(self):
        """The newest chain of the queue: header, data, status. [VIRTIO1.4 2.7, 5.2.6]"""
        card = self.session.card
        size, desc, avail = struct.unpack_from("<H6xQQ", self.session.bridge.bar_read(self.function, 0, 0x18, 0x18))
        index = int.from_bytes(card.read(avail + 2, 2), "little")
        head, chain, flags = int.from_bytes(card.read(avail + 4 + 2 * ((index - 1) % size), 2), "little"), [], 1
        while flags & 1:
            address, length, flags, following = struct.unpack("<QIHH", card.read(desc + 16 * head, 16))
            chain.append((address, length))
            head = following
        kind, sector = struct.unpack("<I4xQ", card.read(chain[0][0], 16))
        if (kind, sector) in self.plan:
            self.plan.remove((kind, sector))
            self.met.append((kind, sector))
            self.pages = sorted({page for address, length in chain[1:-1] for page in range(address & ~4095, address + length, 4096)})
            for page in self.pages:
                assert card.unmap(page, 4096) == 4096


def test_wrong_dma(guests):
    """LINUX-UML-5: data pages out of the card's reach (planted): its writes are dropped, its reads refused, all counted; Linux lives on.

    A request whose data cannot be read fails in the guest; the same request works when its page is back. [PCIe5 2.3.1]
    """
    one, blocks = guests(judged=True), (1, 2, 5)
    card, count = one.session.card, 8
    holes = Holes(one.session, one.session.disks[0], {(0, 8 * n) for n in blocks} | {(1, 1024 + 8 * n) for n in blocks})
    run = one.boot("wrongdma", f"job_count={count}", expect=(r"I/O error, dev vda, sector 10\d\d op 0x1:\(WRITE\)",))
    holes.fill()
    os.close(holes.memory[1])
    assert not holes.plan
    assert holes.met == [(0, 8 * n) for n in blocks] + [(1, 1024 + 8 * n) for n in blocks]
    left = count - len(blocks)
    assert run.facts["reads"] == [f"first good={count} right={left}", f"second good={count} right={count}"]
    assert run.facts["writes"] == [f"first good={left} right={left}", f"second good={count} right={count}"]
    assert sum("I/O error" in line for line in run.lines) == len(blocks)
    assert card.counts.dropped_writes == holes.tlps[TlpType.MWR] == len(blocks) * 4096 // 128  # Max_Payload_Size
    assert card.counts.refused_reads == holes.tlps[TlpType.MRD] == len(blocks) * 4096 // 512  # Max_Read_Request_Size


def test_late_writes(guests):
    """LINUX-UML-6: interrupts that overtake the data they tell of (planted in the host) are seen by the guest's checks. [PCIe5 2.4.1]

    The job is one that ends well without (LINUX-UML-3).
    """
    one = guests()
    one.session.card._options.late_writes = 20_000
    run = one.boot("sizes", is_good=False, timeout_s=10)
    assert not run.is_good


@pytest.fixture(scope="module")
def command(tmp_path_factory, clean_environment):
    """The command of a tour in a process of its own, which stands still for two seconds while the guest writes; its log."""
    folder = tmp_path_factory.mktemp("command")
    done = SimpleNamespace(log=folder / "tour.log", lines=[])
    call = [sys.executable, "-u", "-m", "ringwall.sim.linux.main", "--job", "tour", "--timeout", "170", "--record", str(done.log)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                done.lines.append(line.rstrip())
                if line.startswith("RINGWALL tree"):
                    process.send_signal(signal.SIGSTOP)
                    time.sleep(2)
                    done.was_stopped = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
                    process.send_signal(signal.SIGCONT)
            done.status = process.wait(timeout=60)
        finally:
            process.kill()
    return done


def test_suspended(command):
    """LINUX-UML-7: the serving process is stopped for two seconds while the guest writes; the tour ends well, with its table."""
    text = "\n".join(command.lines)
    assert command.was_stopped == "T"
    assert command.status == 0, text[-3000:]
    assert "RINGWALL verified 200" in text
    assert re.search(r"^model differences +0 +[\d,]+ comparisons", text, re.MULTILINE)
    assert f"make replay FILE={command.log}" in text


def test_replay(command, tmp_path, capsys):
    """LINUX-REPLAY-1: a recorded tour replays on the RTL cycle by cycle and through the golden model; one flipped bit is found by both."""
    assert replay.main([str(command.log)]) == 0
    said = capsys.readouterr().out
    assert int(re.search(r"RTL: (\d+) TLPs of the card are identical", said)[1]) > 5000
    assert int(re.search(r"golden model: \d+ comparisons, (\d+) requests, 0 differences", said)[1]) > 100
    lines = command.log.read_text().splitlines(keepends=True)
    data = re.compile(r'"TlpReceived",.*"dwords":"40')  # at least 16 dwords of what a disk reads
    n = next(n for n, line in enumerate(lines) if n > len(lines) // 4 and data.search(line) and line.count(" ") >= 16)
    lines[n] = re.sub(r'(.)"\}$', lambda found: f'{int(found[1], 16) ^ 1:x}"}}', lines[n])
    altered = tmp_path / "altered.log"
    altered.write_text("".join(lines))
    assert replay.main([str(altered)]) == 1
    said = capsys.readouterr().out
    assert "RTL: the card does otherwise than in the log" in said
    assert re.search(r"golden model: .*\n.*chain \d+ of function \d", said)
    assert "the replay DIFFERS" in said
