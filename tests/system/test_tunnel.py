"""A card at the end of a tunnel: the same software and golden model as everywhere, over bytes, a serial line, devices and sockets."""

import os
import pty
import socket
import threading

import pytest

from ringwall.models.tunnel import Deframer, Frame, FrameKind, encode_frame
from ringwall.models.virtio.blk import BlkStatus
from ringwall.sim import session, tunnel_light
from ringwall.sim.compiled_bench import Traffic
from ringwall.sim.log import read_log
from ringwall.sim.main import main
from ringwall.sim.settings import BadSetting
from ringwall.sim.tunnel import DeadLine, TunnelBench, TunnelledCard, board_config
from ringwall.sim.tunnel_lines import SimulatedLine, StreamLine, open_line

CONFIG = board_config()


def bench_with_disk(seed, **parameters):
    """Return a bench with its IOMMU in use, and its disk."""
    bench = TunnelBench(CONFIG, seed=seed, **parameters)
    assert [(info.function, info.problems) for info in bench.functions] == [(0, []), (1, [])]
    bench.now(bench.enable_iommu(levels=2))
    return bench, bench.now(bench.disk(0, buffer_pages=100))


def finish(bench):
    bench.settle()
    bench.session.finish()
    assert bench.session.board.comparisons > 50
    bench.compiled.close()


@pytest.mark.parametrize("target, batches", [("sim", 6), ("sim-uart", 1)])
def test_first_light(tmp_path, target, batches):
    """SYS-TUN-1: enumerate, IOMMU up, translated disk written and read, golden model watching every TLP; its log is judged again (R22)."""
    bench, disk = bench_with_disk(1, target=target, path=tmp_path / "log.jsonl")
    traffic = Traffic(bench, disk, bench.rng, (1, 2, 8), cycles=None)
    traffic.run(batches)
    traffic.begin(least=3, most=3)
    traffic.end()
    card = bench.compiled
    assert card.peer.statistics.again == card.peer.statistics.damaged == card.peer.statistics.repeated == 0
    assert card.interrupts() and not card.interrupts()
    assert not card.is_idle
    bench.settle()
    assert card.is_idle
    finish(bench)
    assert session.replay(*read_log(tmp_path / "log.jsonl")).board.comparisons > 100


@pytest.mark.parametrize("target, batches, more", [("sim", 8, 1), ("sim-uart", 2, 3)])
def test_spoiled_line(target, batches, more):
    """SYS-TUN-2: bits turned, bytes lost and bytes twice on the line, of a byte or of any bit of it: TLPs are sent again, data is exact."""
    bench, disk = bench_with_disk(2, target=target)
    options, statistics = bench.compiled.line.options, bench.compiled.peer.statistics
    options.turned, options.lost, options.twice = 400 * more, 1500 * more, 1500 * more
    Traffic(bench, disk, bench.rng, (1, 2, 8), cycles=None).run(batches)
    assert statistics.again > 0 and statistics.damaged > 0
    finish(bench)


def test_cable():
    """SYS-TUN-3: a cable that is pulled and plugged in costs time only; when it stays out a sentence says so; then a new session begins."""
    bench, disk = bench_with_disk(3)
    card = bench.compiled
    traffic = Traffic(bench, disk, bench.rng, (8,), cycles=None)
    traffic.begin(least=4, most=4)
    card.step(300)
    card.line.options.unplugged = 1
    card.step(60_000)
    card.line.options.unplugged = 0
    traffic.end()
    assert card.peer.statistics.again > 0
    traffic.run(2)

    card.line.options.unplugged = 1
    with pytest.raises(DeadLine, match="does not answer any more: is the cable in"):
        traffic.run(1)
    with pytest.raises(DeadLine, match="No card answers at the simulated card: is the board on"):
        card.reset_link()
    card.line.options.unplugged = 0
    card.reset_link()
    assert card.config_read(0, 4, 2) & 6 == 0, "the link reset has reset the card"
    bench.compiled.close()


def test_garbage():
    """SYS-TUN-4: bytes of any kind between frames, and frames that no host sends, disturb neither card nor data."""
    bench, disk = bench_with_disk(4)
    card, rng = bench.compiled, bench.rng
    traffic = Traffic(bench, disk, rng, (1, 8), cycles=None)
    for n in range(6):
        traffic.begin(least=2, most=4)
        card.line.put((
            rng.randbytes(3000), b"\x7e" * 50 + b"\x7d" * 50, encode_frame(Frame(FrameKind.DATA, rng.getrandbits(8), 0, 0, (1,) * 2000)),
            encode_frame(Frame(FrameKind.NAK, 0, rng.getrandbits(8), 9)) * 20, encode_frame(Frame(FrameKind.HELLO, body=(1, 2, 3))),
            encode_frame(Frame(FrameKind.RESET, body=(card.peer.session,))),
        )[n])  # fmt: skip
        traffic.end()
    finish(bench)


class Bridge(threading.Thread):
    """Carries bytes between the file descriptor that ``accept()`` returns and a simulated card, until it is stopped."""

    def __init__(self, accept):
        super().__init__(daemon=True)
        self.accept, self.card, self.is_over = accept, SimulatedLine(CONFIG), False

    def run(self):
        other = StreamLine(self.accept(), "a bridge")
        while not self.is_over:
            self.card.put(other.get(0))
            other.put(self.card.get(2000))
        other.close()

    def __enter__(self):
        self.start()

    def __exit__(self, *error):
        self.is_over = True
        self.join(10)


@pytest.mark.parametrize("kind", ["serial", "tcp", "unix"])
def test_lines(kind, tmp_path):
    """SYS-TUN-5: a serial device (a pseudo terminal here), TCP and Unix sockets lead to the card; times are microseconds."""
    if kind == "serial":
        far, near = pty.openpty()
        bridge, target = Bridge(lambda: far), f"{os.ttyname(near)}@3000000"
    else:
        server = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
        server.bind(("127.0.0.1", 0) if kind == "tcp" else str(tmp_path / "line"))
        server.listen()
        if kind == "tcp":
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bridge = Bridge(lambda: socket.socket.detach(server.accept()[0]))
        target = f"127.0.0.1:{server.getsockname()[1]}" if kind == "tcp" else str(tmp_path / "line")
    with bridge:
        bench, disk = bench_with_disk(5, target=target)
        assert (bench.compiled.line.unit, bench.compiled.line.bytes_per_unit) == ("µs", 0.3 if kind == "serial" else None)
        content = bench.rng.randbytes(4096)
        write = disk.blk.write(8, content)
        bench.done(disk, [write])
        read = disk.blk.read(8, 4096)
        bench.done(disk, [read])
        assert (write.status, read.status, read.data) == (BlkStatus.OK, BlkStatus.OK, content)
        bench.settle()
        bench.session.finish()
    bench.compiled.close()


class Impostor(threading.Thread):
    """Answers RESET with a HELLO whose second dword is ``second``; closes the line behind it, without one at once."""

    def __init__(self, other, second):
        super().__init__(daemon=True)
        self.other, self.second = other, second
        self.start()

    def run(self):
        frames, deframer = [], Deframer()
        while not frames:
            frames = deframer.feed(self.other.recv(100))
        if self.second is not None:
            self.other.sendall(encode_frame(Frame(FrameKind.HELLO, body=(frames[0].body[0], self.second, 256))))
            self.other.recv(100)
        self.other.close()


@pytest.mark.parametrize("second, sentence", [
    (0x1F0202, "has version 2, this one 1: build both from the same source"), (0x1F0801, "has a path of 256 bits, not 64: give its WIDTH"),
    (None, "broke: the other side closed it"), (0x1F0201, "broke: "),
])  # fmt: skip
def test_wrong_cards(monkeypatch, second, sentence):
    """SYS-TUN-6: another version, another width, a line that breaks: each ends with a sentence."""
    near, far = socket.socketpair()
    Impostor(far, second)
    line = StreamLine(near.detach(), "a socket")
    monkeypatch.setattr("ringwall.sim.tunnel.open_line", lambda *_, **__: line)
    with pytest.raises(DeadLine, match=sentence):
        TunnelledCard(CONFIG, target="x").config_read(0, 0, 4)


def test_nobody(monkeypatch):
    """SYS-TUN-7: nobody at the other end: a sentence after the line's limit. Targets that do not exist: a sentence at once."""
    far, near = pty.openpty()
    monkeypatch.setattr(StreamLine, "limit", 300_000)
    name = os.ttyname(near)
    with pytest.raises(DeadLine, match=f"No card answers at {name}: is the board on"):
        TunnelledCard(CONFIG, target=f"{name}@3000000")
    os.close(far)
    for target, sentence in (
        ("simulation", "TARGET must be tunnel:sim, .*, not 'simulation'"), ("host:name", "TARGET must be tunnel:sim"),
        (f"{name}@1234567", "a rate that the system knows .*3000000.*, not '1234567'"), (f"{name}@fast", "a rate .*, not 'fast'"),
        (os.devnull, "needs the bits per second of a serial device"), (f"{os.devnull}@3000000", "must be a serial device: /dev/null: "),
        ("/nowhere/tty@115200", "cannot be opened: /nowhere/tty@115200: No such file"), ("/nowhere/x", "cannot be opened: .*No such file"),
        ("127.0.0.1:1", "cannot be opened: 127.0.0.1:1: Connection refused"), ("127.0.0.1:99999", "cannot be opened: 127.0.0.1:99999"),
    ):  # fmt: skip
        with pytest.raises(BadSetting, match=sentence):
            open_line(target, CONFIG)


def plain(monkeypatch, tmp_path):
    for name in ("SIM", "WIDTH", "LATENCY", "SEED", "WAVES", "IMAGE", "TARGET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ringwall.sim.main.build_root", lambda: tmp_path)


def test_command(capfd, monkeypatch, tmp_path):
    """SYS-TUN-8: make sim with TARGET: the image comes back equal; a table with the link's limit, a page and a log; exit status 0, and 1
    when a byte differs."""
    plain(monkeypatch, tmp_path)
    image = tmp_path / "note"
    image.write_bytes(bytes(range(256)) * 200)
    monkeypatch.setenv("TARGET", "tunnel:sim")
    assert main(["--image", str(image)]) == 0
    said, errors = capfd.readouterr()
    assert not errors
    assert said.count("51,200 bytes equal") == 2
    assert said.count("% of it") == 2
    assert "link limit 0.9209" in said and "link limit 0.9078" in said
    assert "Every byte and every TLP" in (tmp_path / "report/index.html").read_text()
    assert (tmp_path / "tunnel/events.jsonl").is_file()
    flow = tunnel_light._flow
    monkeypatch.setattr(tunnel_light, "_flow", lambda *parts: (flow(*parts)[0], b"other"))
    assert main(["--image", str(image)]) == 1
    assert capfd.readouterr().err == "The guest memory differs from the image\n"
    assert "The guest memory differs" in (tmp_path / "report/index.html").read_text()


@pytest.mark.parametrize("name, value, sentence", [
    ("TARGET", "sim", "TARGET must begin with tunnel:, not 'sim'."),
    ("TARGET", "tunnel:/nowhere@115200", "TARGET cannot be opened: /nowhere@115200: No such file or directory."),
    ("LATENCY", "9", "LATENCY is for the card that make sim simulates itself: leave it out with TARGET."),
    ("SIM", "icarus", "SIM is for the card that make sim simulates itself: leave it out with TARGET."),
    ("WIDTH", "65", "WIDTH must be 64, 128, 256 or 512, not '65'."),
])  # fmt: skip
def test_bad_settings(capfd, monkeypatch, tmp_path, name, value, sentence):
    """SYS-TUN-9: a target that does not exist, and settings that mean nothing with one, get one sentence and exit status 2."""
    plain(monkeypatch, tmp_path)
    image = tmp_path / "note"
    image.write_bytes(bytes(512))
    monkeypatch.setenv("TARGET", "tunnel:nothing")
    monkeypatch.setenv(name, value)
    assert main(["--image", str(image)]) == 2
    assert capfd.readouterr().err == sentence + "\n"
