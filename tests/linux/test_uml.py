"""An unmodified Linux drives the card: user-mode Linux, its own drivers, its own file system."""

import os
import re
import struct
import time
from contextlib import ExitStack

import pytest

from ringwall.sim.card import bench_config
from ringwall.sim.linux import initramfs, kernel, uml
from ringwall.sim.linux.main import Session
from ringwall.sim.linux.vhost_user import Server

pytestmark = pytest.mark.guest
CONFIG = bench_config(64)


class Guests:
    """A session with a server per disk, at which guests boot one after the other."""

    def __init__(self, folder, *, judged=False, **parameters):
        self.folder, self.lines, self.number = folder, [], 0
        self.linux, self.image = kernel.uml(), initramfs.build()
        with ExitStack() as stack:
            self.session = Session(CONFIG, judged=judged, **parameters)
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
    assert all(line.split()[1:] == ["flr"] for line in run.facts["reset_method"])
    assert [server.counts["connections"] for server in one.servers.values()] == [4, 4]


class Aim:
    """Takes pages that a request is to be read into away from under the card, and gives each back once the card's DMA met the hole."""

    def __init__(self, session, function, times):
        self.session, self.function, self.left, self.hole, self.met, self.memory = session, function, times, None, 0, None
        self._map, self._write = session.bridge.map, session.bridge.bar_write
        session.bridge.map, session.bridge.bar_write = self.map, self.write

    def map(self, address, size, fd, offset, **parameters):
        self._map(address, size, fd, offset, **parameters)
        self.memory = self.memory or (address, os.dup(fd), offset)

    def write(self, function, bar, offset, data):
        if function == self.function and (bar, offset) == (0, 0x3000) and self.hole is None and self.left:
            self.aim()
        self._write(function, bar, offset, data)

    def aim(self):
        """The newest chain of the queue: header, data, status. [VIRTIO1.4 2.7, 5.2.6]"""
        card, common = self.session.card, self.session.bridge.bar_read(self.function, 0, 0x18, 0x18)
        size, desc, avail = struct.unpack_from("<H6xQQ", common)
        index = int.from_bytes(card.read(avail + 2, 2), "little")
        head = int.from_bytes(card.read(avail + 4 + 2 * ((index - 1) % size), 2), "little")
        following = struct.unpack("<QIHH", card.read(desc + 16 * head, 16))[3]
        address, length, flags, _ = struct.unpack("<QIHH", card.read(desc + 16 * following, 16))
        if flags & 2 and length == 4096 and address % 4096 == 0:
            assert card.unmap(address, 4096) == 4096
            self.hole, self.left, self.before = address, self.left - 1, card.counts.dropped_writes

    def look(self, run):
        card = self.session.card
        if self.hole is not None and card.counts.dropped_writes > self.before and card.is_idle:
            base, fd, offset = self.memory
            card.map(self.hole, 4096, fd, offset + self.hole - base)
            self.hole, self.met = None, self.met + 1
        return False


def test_wrong_dma(guests):
    """LINUX-UML-5: pages that are out of the card's reach (planted) get nothing of its DMA, which is counted; the guest lives on."""
    one = guests()
    aim = Aim(one.session, one.session.disks[0], 5)
    run = one.boot("wrongdma", "job_count=16", until=aim.look)
    assert aim.met >= 1
    assert one.session.card.counts.dropped_writes >= aim.met * 4096 // 512
    assert run.fact("reads").endswith("unanswered=0")
    os.close(aim.memory[1])
    one.boot("sizes")


@pytest.mark.parametrize("late", [0, 20_000])
def test_late_writes(guests, late):
    """LINUX-UML-6: interrupts that overtake the data they tell of (planted in the host) are seen by the guest's checks. [PCIe5 2.4.1]"""
    one = guests()
    one.session.card._options.late_writes = late
    run = one.boot("sizes", is_good=False, timeout_s=60 if not late else 10)
    assert run.is_good is (late == 0)
