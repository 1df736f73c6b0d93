"""The vhost-user server: a front end in Python that plays the guest's kernel, and one that breaks every rule."""

import mmap
import os
import random
import socket
import struct

import pytest

from ringwall.models.virtio.split import SplitDriver
from ringwall.sim.card import bench_config
from ringwall.sim.compiled import CompiledCard
from ringwall.sim.linux.bridge import Bridge
from ringwall.sim.linux.loop import Loop
from ringwall.sim.linux.vhost_user import Server

CONFIG = bench_config(64)
BASE, SIZE, OFFSET, OWN = 0x10_0000, 0x20_0000, 0x3000, 0x7000_0000_0000  # guest's memory, its place in the file, its own addresses
COMMANDS, INTERRUPTS, BUFFERS = BASE, BASE + 0x1_0000, BASE + 0x2_0000
CFG_READ, CFG_WRITE, MMIO_READ, MMIO_WRITE, MEMSET = 1, 2, 3, 4, 5


class Memory:
    """The guest's view of its own memory."""

    def __init__(self):
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, OFFSET + SIZE)
        self.map = mmap.mmap(self.fd, OFFSET + SIZE)

    def read(self, address, length):
        return self.map[address - BASE + OFFSET : address - BASE + OFFSET + length]

    def write(self, address, data):
        self.map[address - BASE + OFFSET : address - BASE + OFFSET + len(data)] = data


class Bench:
    """A card, its bridge, a loop and a server on a socket."""

    def __init__(self, folder):
        self.card = CompiledCard(CONFIG)
        self.bridge, self.lines = Bridge(self.card), []
        self.loop = Loop(self.bridge)
        self.server = Server(self.loop, self.bridge, folder / "disk0", 1, log=self.lines.append)

    def serve(self, until, timeout_s=10):
        assert self.loop.run(until=until, timeout_s=timeout_s), self.lines

    def close(self):
        self.server.close()
        self.loop.close()
        self.card.close()


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


class FrontEnd:
    """What a guest's kernel does at the socket, message by message."""

    def __init__(self, bench):
        self.bench, self.link = bench, socket.socket(socket.AF_UNIX)
        self.link.connect(os.fspath(bench.server.path))
        self.link.setblocking(False)
        self.memory, self.fds = Memory(), []

    def send(self, request, payload=b"", fds=(), *, flags=1, size=None):
        header = struct.pack("<III", request, flags, len(payload) if size is None else size)
        socket.send_fds(self.link, [header + payload], list(fds))

    def receive(self, size=8):
        """Return (request, flags, payload) of an answer, None when the other end closed."""
        found = bytearray()

        def is_there():
            try:
                data = self.link.recv(12 + size - len(found))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data = b""
            found.extend(data)
            return not data or len(found) == 12 + size

        self.bench.serve(is_there)
        if not found:
            return None
        request, flags, length = struct.unpack_from("<III", found)
        assert (flags, length) == (5, size)
        return request, bytes(found[12:])

    def ask(self, request, payload=b"", size=8):
        self.send(request, payload)
        found = self.receive(size)
        assert found[0] == request
        return found[1]

    def told(self, request, payload=b"", fds=()):
        """Send a message that is to be acknowledged; return the status."""
        self.send(request, payload, fds, flags=9)
        found = self.receive()
        assert found[0] == request
        return int.from_bytes(found[1], "little")

    def is_alive(self):
        return int.from_bytes(self.ask(1), "little") == 1 << 32 | 1 << 30

    def negotiate(self):
        self.send(3)
        assert self.is_alive()
        assert int.from_bytes(self.ask(15), "little") == 1 << 3 | 1 << 5
        assert self.told(16, struct.pack("<Q", 1 << 3 | 1 << 5)) == 0
        ends = os.pipe()
        self.fds += ends
        assert self.told(21, fds=[ends[1]]) == 0
        assert self.told(2, struct.pack("<Q", 1 << 32 | 1 << 30)) == 0

    def table(self, *, base=BASE, size=SIZE, own=OWN, offset=OFFSET, fd=None):
        return self.told(5, struct.pack("<IIQQQQ", 1, 0, base, size, own, offset) + bytes(32), [self.memory.fd if fd is None else fd])

    def ring(self, index, driver, *, own=OWN, call=None):
        layout = driver.layout
        kick = os.eventfd(0)
        call = os.pipe() if call is None else call
        self.fds += [kick, *call]
        at = [own + place - BASE for place in (layout.desc, layout.used, layout.avail)]
        statuses = [self.told(13, struct.pack("<Q", index), [call[1]]), self.told(8, struct.pack("<II", index, layout.size)),
                    self.told(10, struct.pack("<II", index, 0)), self.told(9, struct.pack("<IIQQQQ", index, 0, *at, (1 << 64) - 1)),
                    self.told(12, struct.pack("<Q", index), [kick]), self.told(18, struct.pack("<II", index, 1))]  # fmt: skip
        os.set_blocking(call[0], False)
        return kick, call[0], statuses

    def start(self, size=16):
        self.negotiate()
        assert self.table() == 0
        self.commands = SplitDriver(self.memory, size=size, base=COMMANDS)
        self.interrupts = SplitDriver(self.memory, size=size, base=INTERRUPTS)
        self.kick, self.call, statuses = self.ring(0, self.commands)
        assert statuses == [0] * 6
        self.kick_interrupts, self.call_interrupts, statuses = self.ring(1, self.interrupts)
        assert statuses == [0] * 6
        return self

    def command(self, op, size, address, data=b"", *, bar=0, room=0, raw=None, split=False):
        """Do one command and return (bytes written according to the ring, the bytes); None when it does not come back."""
        message = struct.pack("<BBHIQ", op, bar, 0, size, address) + data if raw is None else raw
        self.memory.write(BUFFERS, message)
        self.memory.write(BUFFERS + 0x1_0000, b"\xee" * (room + 8))
        readable = [(BUFFERS, 16), (BUFFERS + 16, len(message) - 16)] if split else [(BUFFERS, len(message))]
        self.commands.add_chain(readable, [(BUFFERS + 0x1_0000, room)] if room else [])
        self.commands.publish()
        os.eventfd_write(self.kick, 1)
        found = []

        def is_back():
            found.extend(self.commands.poll_used())
            return found

        if not self.bench.loop.run(until=is_back, timeout_s=1):
            return None
        assert self.memory.read(BUFFERS + 0x1_0000 + room, 8) == b"\xee" * 8
        assert os.read(self.call, 64)
        return found[0][1], self.memory.read(BUFFERS + 0x1_0000, room)

    def config_read(self, offset, size):
        written, data = self.command(CFG_READ, size, offset, room=8)
        assert written == size
        return int.from_bytes(data[:size], "little")

    def close(self):
        for fd in self.fds:
            os.close(fd)
        self.link.close()
        self.memory.map.close()  # it has a descriptor of its own
        os.close(self.memory.fd)


def test_commands(bench):
    """LINUX-VHOST-1: negotiation, memory, rings; configuration and BAR accesses of every size do what the bridge does."""
    guest, bridge = FrontEnd(bench).start(), bench.bridge
    assert guest.config_read(0, 4) == 0x1042_1AF4
    assert guest.config_read(0, 8) == bridge.config_read(1, 0, 8)
    assert [guest.config_read(2, 2), guest.config_read(3, 1)] == [0x1042, 0x10]
    assert guest.command(CFG_WRITE, 4, 0x10, struct.pack("<Q", 0xF000_0000)) == (0, b"")
    assert guest.command(CFG_WRITE, 8, 0x18, struct.pack("<Q", 0xF000_4000)) == (0, b"")
    assert guest.command(MMIO_READ, 4, 0x14, room=4) == (4, b"\xff" * 4)  # Memory Space is off
    assert guest.command(CFG_WRITE, 2, 0x04, struct.pack("<Q", 6), split=True) == (0, b"")
    assert guest.command(MMIO_READ, 4, 0x14, room=4) == (4, bridge.bar_read(1, 0, 0x14, 4))
    assert guest.command(MMIO_WRITE, 4, 0x08, struct.pack("<I", 1), split=True) == (0, b"")
    assert guest.command(MMIO_READ, 4, 0x08, room=12) == (4, b"\1\0\0\0" + b"\xee" * 8)
    assert guest.command(MEMSET, 16, 0, b"\x5a", bar=2) == (0, b"")
    assert guest.command(MMIO_READ, 16, 0, bar=2, room=16)[1][:12] == b"\x58" + b"\x5a" * 11  # the two low bits of an address are 0
    assert bench.lines == ["function 1: connected"]
    assert bench.server.counts["commands"] == 13
    guest.close()


def test_interrupts(bench):
    """LINUX-VHOST-2: messages of the card arrive in order, wait for room, and are as the table has them."""
    guest, server = FrontEnd(bench).start(), bench.server
    server._interrupted(1, 0, 0xA_0000, 0x11)
    server._interrupted(1, 1, 0xA_0000, 0x12)
    for n in range(2):
        guest.interrupts.add_chain([], [(BUFFERS + 32 * n, 20)])
    guest.interrupts.publish()
    os.eventfd_write(guest.kick_interrupts, 1)
    found = []
    bench.serve(lambda: found.extend(guest.interrupts.poll_used()) or len(found) == 2)
    assert [guest.memory.read(BUFFERS + 32 * n, 20) for n in range(2)] == [
        struct.pack("<BBHIQI", 7, 0, 0, 4, 0xA_0000, 0x11 + n) for n in range(2)]  # fmt: skip
    assert [length for _, length in found] == [20, 20]
    assert len(os.read(guest.call_interrupts, 64)) == 16
    guest.interrupts.add_chain([], [(BUFFERS, 20)])
    guest.interrupts.disable_interrupts()
    guest.interrupts.publish()
    server._interrupted(1, 1, 0xA_0000, 0x13)
    assert guest.interrupts.poll_used()
    with pytest.raises(BlockingIOError):
        os.read(guest.call_interrupts, 64)
    for n in range(5000):
        server._interrupted(1, 0, 0xA_0000, n)
    assert server.counts["lost"] == 5000 - 4096
    guest.interrupts.add_chain([], [(BUFFERS, 19)])  # too small
    guest.interrupts.publish()
    os.eventfd_write(guest.kick_interrupts, 1)
    bench.serve(lambda: "19 bytes for interrupts" in bench.lines[-1])
    assert guest.config_read(0, 2) == 0x1AF4  # the other ring does not care
    guest.kick_interrupts, _, statuses = guest.ring(1, guest.interrupts)
    assert statuses == [0] * 6
    os.close(guest.fds.pop(-2))  # the end at which calls are heard
    assert guest.is_alive()
    guest.interrupts.reset()
    guest.interrupts.add_chain([], [(BUFFERS, 20)])
    guest.interrupts.publish()
    assert guest.told(10, struct.pack("<II", 1, 0)) == 0
    os.eventfd_write(guest.kick_interrupts, 1)
    bench.serve(guest.interrupts.poll_used)
    assert guest.is_alive()
    guest.close()


@pytest.mark.parametrize("what, raw, room, text", [
    ("short", bytes(15), 0, "15 bytes"), ("unknown", struct.pack("<BBHIQ", 9, 0, 0, 4, 0), 8, "9 is not known"),
    ("size", struct.pack("<BBHIQ", 1, 0, 0, 3, 0), 8, "asks for 3 bytes"),
    ("big", struct.pack("<BBHIQ", 3, 0, 0, 1 << 31, 0), 8, "asks for 2147483648"),
    ("room", struct.pack("<BBHIQ", 3, 0, 0, 16, 0), 8, "room for 8"),
    ("data", struct.pack("<BBHIQ", 4, 0, 0, 8, 0) + b"1234", 0, "brings 4"),
    ("memset", struct.pack("<BBHIQ", 5, 0, 0, 8, 0), 0, "brings 0"),
])  # fmt: skip
def test_bad_commands(bench, what, raw, room, text):
    """LINUX-VHOST-3: a command that makes no sense comes back empty and is noted; the next one works."""
    guest = FrontEnd(bench).start()
    assert guest.command(0, 0, 0, raw=raw, room=room) == (0, b"\xee" * room)
    assert text in bench.lines[-1]
    for bar, address, size in ((0, 1 << 63, 4), (5, 0, 4), (0, 0x4000, 4), (255, 0, 4)):
        assert guest.command(MMIO_READ, size, address, bar=bar, room=size) == (size, b"\xff" * size)
        assert guest.command(MMIO_WRITE, size, address, bytes(size), bar=bar) == (0, b"")
    assert guest.command(CFG_READ, 4, 1 << 40, room=4) == (4, b"\xff" * 4)
    assert guest.config_read(0, 4) == 0x1042_1AF4
    guest.close()


def broken_rings():
    def index(guest):
        guest.memory.write(COMMANDS + 16 * 16 + 2, struct.pack("<H", guest.commands.avail_index + 17))

    def head(guest):
        guest.commands.add_chain([(BUFFERS, 16)])
        guest.memory.write(guest.commands.layout.avail_slot(guest.commands.avail_index), struct.pack("<H", 16))
        guest.commands.publish()

    def descriptor(guest, raw):
        head = guest.commands.add_chain([(BUFFERS, 16)])
        guest.memory.write(guest.commands.layout.descriptor(head), struct.pack("<QIHH", *raw(head)))
        guest.commands.publish()

    def behind(guest):
        first = guest.commands.add_chain([(BUFFERS, 16), (BUFFERS + 16, 4)])
        guest.memory.write(guest.commands.layout.descriptor(first), struct.pack("<QIHH", BUFFERS, 16, 3, 1))
        guest.commands.publish()

    yield "index", index, "jumped"
    yield "head", head, "descriptor 16 in a ring of 16"
    yield "next", lambda guest: descriptor(guest, lambda head: (BUFFERS, 16, 1, 99)), "descriptor 99"
    yield "loop", lambda guest: descriptor(guest, lambda head: (BUFFERS, 16, 1, head)), "is a loop"
    yield "nowhere", lambda guest: descriptor(guest, lambda head: (1 << 62, 16, 0, 0)), "unmapped"
    yield "around", lambda guest: descriptor(guest, lambda head: ((1 << 64) - 8, 16, 0, 0)), "unmapped"
    yield "long", lambda guest: descriptor(guest, lambda head: (BUFFERS, 0xFFFF_FFFF, 0, 0)), "longer than"
    yield "indirect", lambda guest: descriptor(guest, lambda head: (BUFFERS, 16, 4, 0)), "indirect"
    yield "behind", behind, "behind one that can be written"


@pytest.mark.parametrize("what, spoil, text", [*broken_rings()], ids=[one[0] for one in broken_rings()])
def test_bad_rings(bench, what, spoil, text):
    """LINUX-VHOST-4: a ring that cannot be walked stands still and is noted; set up anew it works, on the same connection."""
    guest = FrontEnd(bench).start()
    assert guest.config_read(0, 4) == 0x1042_1AF4
    spoil(guest)
    os.eventfd_write(guest.kick, 1)
    bench.serve(lambda: text in bench.lines[-1])
    noted = len(bench.lines)
    os.eventfd_write(guest.kick, 1)
    assert bench.loop.run(timeout_s=0.1) is False
    assert len(bench.lines) == noted  # once, not for every kick
    guest.commands.reset()
    guest.kick, guest.call, statuses = guest.ring(0, guest.commands)
    assert statuses == [0] * 6
    assert guest.config_read(0, 4) == 0x1042_1AF4
    guest.close()


def test_refused_messages(bench):
    """LINUX-VHOST-5: a message that asks for what cannot be is refused with a status, without effect; the connection goes on."""
    guest, short = FrontEnd(bench), os.memfd_create("short")
    os.ftruncate(short, 4096)
    guest.negotiate()
    assert guest.table(fd=short) == 1
    assert guest.table(offset=1) == 1
    assert guest.table(size=0) == 1
    assert guest.table(base=(1 << 64) - 4096) == 1
    region = struct.pack("<QQQQ", BASE, SIZE, OWN, OFFSET)
    for payload, fds in ((struct.pack("<II", 1, 0) + region, []), (struct.pack("<II", 2, 0) + region, [short, short]),
                         (struct.pack("<II", 2, 0) + region * 2, [guest.memory.fd] * 2),
                         (struct.pack("<II", 9, 0) + region * 9, [short] * 8), (struct.pack("<II", 0xFFFF_FFFF, 0), []),
                         (b"", [])):  # fmt: skip
        assert guest.told(5, payload, fds) == 1
    assert guest.told(9, struct.pack("<IIQQQQ", 0, 0, OWN, OWN, OWN, 0)) == 1  # size first
    for index, size in ((0, 0), (0, 3), (0, 2048), (2, 16), (0xFFFF_FFFF, 16)):
        assert guest.told(8, struct.pack("<II", index, size)) == 1
    assert guest.told(8, struct.pack("<II", 0, 16)) == 0
    assert guest.told(9, struct.pack("<IIQQQQ", 0, 0, OWN, OWN + 4096, OWN + 8192, 0)) == 1  # no memory yet
    assert guest.table() == 0
    end = OWN + SIZE
    for at in ((end - 255, OWN, OWN), (OWN, end - 16, OWN), (OWN, OWN, end), (OWN + 8, OWN, OWN), (0, OWN, OWN),
               ((1 << 64) - 16, OWN, OWN)):  # fmt: skip
        assert guest.told(9, struct.pack("<IIQQQQ", 0, 0, *at, 0)) == 1
    assert guest.told(9, struct.pack("<IIQQQQ", 0, 1, OWN, OWN + 4096, OWN + 8192, 0)) == 1  # a log was not offered
    for request in (12, 13, 14):
        assert guest.told(request, struct.pack("<Q", 0)) == 1  # a descriptor is missing
        assert guest.told(request, struct.pack("<Q", 2), [short]) == 1
        assert guest.told(request, struct.pack("<Q", 0x100), [short]) == 1
        assert guest.told(request, struct.pack("<Q", 0), [short, short]) == 1
        assert guest.told(request, struct.pack("<Q", 0x100)) == 0
    assert guest.told(12, struct.pack("<Q", 0), [short]) == 1  # cannot be waited for
    assert guest.told(2, struct.pack("<Q", 1 << 26)) == 1
    assert guest.told(16, struct.pack("<Q", 1)) == 1
    assert guest.told(21) == 1
    assert guest.told(77, b"what") == 1
    assert guest.told(18, b"1") == 1
    refused = bench.server.counts["refused"]
    assert refused == sum("message" in line for line in bench.lines) > 40
    assert guest.told(8, struct.pack("<II", 0, 16)) == 0
    assert guest.table() == 0  # once more: the old one goes
    os.close(short)
    guest.close()


@pytest.mark.parametrize("raw, text", [
    (struct.pack("<III", 1, 2, 0), "header"), (struct.pack("<III", 1, 5, 0), "header"), (struct.pack("<III", 1, 1, 5000), "header"),
    (struct.pack("<III", 1, 1, 0xFFFF_FFFF), "header"), (struct.pack("<III", 11, 1, 0), "message 11"),
    (struct.pack("<IIIII", 11, 1, 8, 5, 0), "message 11"), (struct.pack("<III", 24, 1, 0), "message 24"),
    (struct.pack("<II", 1, 1), "within"), (struct.pack("<IIII", 2, 1, 8, 0), "within"),
])  # fmt: skip
def test_bad_headers(bench, raw, text):
    """LINUX-VHOST-6: behind a header that is wrong nothing can be understood: the connection ends, the next one works."""
    guest = FrontEnd(bench).start()
    socket.send_fds(guest.link, [raw], [guest.memory.fd])
    if text == "within":
        bench.loop.run(timeout_s=0.05)
        guest.link.shutdown(socket.SHUT_WR)
    bench.serve(lambda: not bench.server.is_connected)
    assert text in bench.lines[-1]
    again = FrontEnd(bench).start()
    assert again.config_read(0, 4) == 0x1042_1AF4
    assert again.config_read(4, 2) & 7 == 0
    guest.close()
    again.close()


def test_connections(bench):
    """LINUX-VHOST-7: in pieces, byte by byte; second connections are refused; after an end nothing is open, mapped or decoded."""
    guest = FrontEnd(bench)
    for byte in struct.pack("<IIIQ", 2, 1, 8, 1 << 32):
        guest.link.send(bytes([byte]))
        bench.loop.run(timeout_s=0.01)
    assert guest.is_alive()
    second = FrontEnd(bench)
    bench.serve(lambda: "refused" in bench.lines[-1])
    assert second.receive() is None
    second.close()
    guest.close()
    bench.serve(lambda: not bench.server.is_connected)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(3):
        guest = FrontEnd(bench).start()
        guest.command(CFG_WRITE, 8, 0x10, struct.pack("<Q", 0xF000_0000))
        guest.command(CFG_WRITE, 2, 4, struct.pack("<Q", 6))
        assert guest.command(MMIO_READ, 1, 0x14, room=1) == (1, b"\0")
        fds = [guest.memory.fd] * random.Random(n).randrange(4)
        guest.send(2, struct.pack("<Q", 1 << 32), fds)  # with descriptors that nobody asked for
        guest.send(12, struct.pack("<Q", 0x100))
        assert guest.is_alive()
        guest.close()
        bench.serve(lambda: not bench.server.is_connected)
        assert len(os.listdir("/proc/self/fd")) == before
        assert bench.card.unmap(0, 1 << 64) == 0
        assert bench.bridge.config_read(1, 4, 2) & 7 == 0
        assert bench.bridge.config_read(1, 0x10, 4) & ~15 == 0
    assert bench.server.counts["connections"] == 4


def test_many_commands(bench):
    """LINUX-VHOST-8: a ring that is filled again while it is emptied does not keep the loop; all commands come back in order."""
    guest = FrontEnd(bench).start(size=4)
    guest.memory.write(BUFFERS, struct.pack("<BBHIQ", CFG_READ, 0, 0, 4, 0))
    rounds, done, ran = 60, [], []

    def more():
        """Add what there is room for, kick once in the beginning only."""
        done.extend(guest.commands.poll_used())
        while guest.commands.free_count >= 2 and len(done) + len(guest.commands.outstanding) < rounds:
            guest.commands.add_chain([(BUFFERS, 16)], [(BUFFERS + 4096, 4)])
        guest.commands.publish()

    pop = bench.server._connection.rings[0].pop

    def refill():
        found = pop()
        more()
        ran.append(found)
        return found

    bench.server._connection.rings[0].pop = refill
    more()
    os.eventfd_write(guest.kick, 1)
    seen = []
    bench.loop.soon(lambda: seen.append(len(done)))
    bench.serve(lambda: more() or len(done) == rounds)
    assert 0 < seen[0] < 8  # the loop came by
    assert [length for _, length in done] == [4] * rounds
    guest.close()


def test_parameters(bench, tmp_path):
    """LINUX-VHOST-9: a server for a function that is not there is refused with a sentence."""
    with pytest.raises(ValueError, match=r"^Function must be one of 0, 1, 2, not 3$"):
        Server(bench.loop, bench.bridge, tmp_path / "other", 3)


def test_empty_slot(bench, tmp_path):
    """LINUX-VHOST-10: a server without a function answers reads with all ones, ignores writes, and lets its connection's memory go."""
    bench.server.close()
    before = {name: value for name, value in vars(bench.bridge.counts).items() if not name.startswith("pumped")}
    bench.server = Server(bench.loop, bench.bridge, tmp_path / "empty", None, log=bench.lines.append)
    guest = FrontEnd(bench).start()
    assert guest.command(CFG_READ, 4, 0, room=8) == (4, b"\xff" * 4 + b"\xee" * 4)
    assert guest.command(MMIO_READ, 8, 0x14, room=8) == (8, b"\xff" * 8)
    assert guest.command(CFG_WRITE, 2, 4, struct.pack("<Q", 6)) == (0, b"")
    assert guest.command(MMIO_WRITE, 4, 0, bytes(4)) == (0, b"")
    assert guest.command(MEMSET, 64, 0, b"\x11") == (0, b"")
    guest.close()
    bench.serve(lambda: not bench.server.is_connected)
    assert vars(bench.bridge.counts) | before == vars(bench.bridge.counts)  # the card saw nothing
    assert bench.card.unmap(0, 1 << 64) == 0


def test_kept(bench):
    """LINUX-VHOST-11: a server that keeps leaves function and memory as they are after a connection, until told otherwise."""
    bench.server.keeps = True
    guest = FrontEnd(bench).start()
    guest.command(CFG_WRITE, 8, 0x10, struct.pack("<Q", 0xF000_0000))
    guest.command(CFG_WRITE, 2, 4, struct.pack("<Q", 6))
    guest.command(MMIO_WRITE, 1, 0x14, b"\1")
    bench.server.forget()  # while it is connected: nothing
    assert guest.command(MMIO_READ, 1, 0x14, room=1) == (1, b"\1")
    guest.memory.write(BUFFERS + 64, b"still there")
    guest.close()
    bench.serve(lambda: not bench.server.is_connected)
    assert bench.bridge.bar_read(1, 0, 0x14, 1) == b"\1"
    assert bench.card.read(BUFFERS + 64, 11) == b"still there"
    bench.server.forget()
    assert bench.card.unmap(0, 1 << 64) == 0
    assert bench.bridge.bar_read(1, 0, 0x14, 1) == b"\1"
    guest = FrontEnd(bench).start()
    assert guest.command(MMIO_READ, 1, 0x14, room=1) == (1, b"\1")
    guest.close()
    bench.server.close()
    assert bench.bridge.config_read(1, 4, 2) & 7 == 0
    assert bench.card.unmap(0, 1 << 64) == 0
