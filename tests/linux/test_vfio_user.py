"""The vfio-user server: a client in Python, kind and unkind, on the compiled card."""

import errno
import json
import os
import random
import select
import socket
import struct
import time
from dataclasses import replace

import pytest

from ringwall.models.host import ConfigRead, ConfigWrite, Delay, MemoryRead, MemoryWrite
from ringwall.models.host import run as run_software
from ringwall.models.virtio.blk import BlkDriver, BlkStatus
from ringwall.models.virtio.driver import VirtioPciDriver
from ringwall.models.virtio.split import SplitDriver
from ringwall.sim.card import bench_config
from ringwall.sim.compiled import CompiledCard
from ringwall.sim.linux.bridge import Bridge
from ringwall.sim.linux.loop import Loop
from ringwall.sim.linux.vfio_user import Server

CONFIG = bench_config(64)
WINDOW = 0xF000_0000  # where the client places BARs
SIZE, RING, AREA = 0x40_0000, 0x10_0000, (0x20_0000, 0x10_0000)
VERSION, MAP, UNMAP, INFO, REGION, IRQ, SET_IRQS, READ, WRITE, RESET = 1, 2, 3, 4, 5, 7, 8, 9, 10, 13
GREETING = struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_msg_fds":8}}\0'
PATIENCE_S = 20


class Client:
    """The other end of a server's socket, in the same process: the loop runs while it waits."""

    def __init__(self, loop, path, *, greets=True):
        self.loop, self.number = loop, 0x40
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        if greets:
            self.wanted(VERSION, GREETING)

    def send(self, command, payload=b"", fds=(), *, size=None, flags=0):
        self.number += 1
        raw = struct.pack("<HHIII", self.number, command, 16 + len(payload) if size is None else size, flags, 0) + payload
        socket.send_fds(self.socket, [raw], list(fds))

    def take(self, count):
        raw = b""
        while len(raw) < count:
            assert self.loop.run(until=lambda: select.select([self.socket], [], [], 0)[0], timeout_s=PATIENCE_S), "no answer"
            more = self.socket.recv(count - len(raw))
            if not more:
                raise ConnectionError("the server ended the connection")
            raw += more
        return raw

    def answer(self, command):
        number, kind, size, flags, error = struct.unpack("<HHIII", self.take(16))
        assert (number, kind) == (self.number, command)
        assert flags == (0x21 if error else 1)
        return error, self.take(size - 16)

    def call(self, command, payload=b"", fds=(), **how):
        self.send(command, payload, fds, **how)
        return self.answer(command)

    def wanted(self, command, payload=b"", fds=()):
        error, found = self.call(command, payload, fds)
        assert not error, os.strerror(error)
        return found

    def error(self, command, payload=b"", fds=(), **how):
        error, found = self.call(command, payload, fds, **how)
        assert not found
        return error

    def map(self, address, size, fd, offset=0, rights=3):
        return self.call(MAP, struct.pack("<IIQQQ", 32, rights, offset, address, size), () if fd is None else (fd,))[0]

    def unmap(self, address, size, flags=0):
        return self.call(UNMAP, struct.pack("<IIQQ", 24, flags, address, size))[0]

    def set_irqs(self, start, count, fds=(), flags=0x24, index=2, data=b""):
        return self.call(SET_IRQS, struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data, fds)[0]

    def read(self, region, offset, count):
        found = self.wanted(READ, struct.pack("<QII", offset, region, count))
        assert found[:16] == struct.pack("<QII", offset, region, count)
        return found[16:]

    def write(self, region, offset, data):
        assert self.wanted(WRITE, struct.pack("<QII", offset, region, len(data)) + data) == struct.pack("<QII", offset, region, len(data))


class FileMemory:
    """Memory of a guest as its own software sees it: the file."""

    def __init__(self, file):
        self.file = file

    def read(self, address, length):
        return os.pread(self.file, length, address)

    def write(self, address, data):
        os.pwrite(self.file, data, address)


class Guest(Client):
    """A client with memory that brings the disk up and uses it."""

    def __init__(self, loop, server, *, function=1):
        super().__init__(loop, server.path)
        self.function, self.server, self.eventfds = function, server, []
        self.file = os.memfd_create("guest")
        os.ftruncate(self.file, SIZE)
        assert not self.map(0, SIZE, self.file)
        self.bars, at = {}, WINDOW + 0x10_0000 * function
        for index, bar in sorted(server.info.bars.items()):
            self.bars[index] = replace(bar, address=at)
            self.write(7, 0x10 + 4 * index, at.to_bytes(8, "little"))
            at += max(bar.size, 4096)
        self.write(7, 0x04, b"\x06\x00")

    def perform(self, operation):
        match operation:
            case ConfigRead(_, offset, size):
                return int.from_bytes(self.read(7, offset, size), "little")
            case ConfigWrite(_, offset, size, value):
                self.write(7, offset, value.to_bytes(size, "little"))
            case MemoryRead(address, size):
                return int.from_bytes(self.read(*self.place(address), size), "little")
            case MemoryWrite(address, size, value):
                self.write(*self.place(address), value.to_bytes(size, "little"))
            case Delay():
                self.loop.run(timeout_s=0.001)
        return None

    def place(self, address):
        return next((n, address - bar.address) for n, bar in self.bars.items() if bar.address <= address < bar.address + bar.size)

    def interrupts(self):
        """MSI-X on, with an eventfd for each vector."""
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(self.server.info.msix.count)]
        assert not self.set_irqs(0, len(self.eventfds), self.eventfds)
        self.write(7, self.server.info.msix.offset + 2, b"\x00\x80")

    def start(self):
        self.interrupts()
        self.driver = VirtioPciDriver(replace(self.server.info, bars=self.bars))
        memory = FileMemory(self.file)
        ring = SplitDriver(memory, size=64, base=RING)
        self.blk = BlkDriver(ring, memory, area=AREA, rng=random.Random(1))
        run_software(self.driver.start([ring.layout], wanted=1 << 32 | 1 << 9, vectors=[1], config_vector=0), self.perform)
        return self

    def go(self, *requests):
        if self.blk.publish():
            run_software(self.driver.notify(), self.perform)

        def is_over():
            self.blk.poll()
            return all(request.is_done for request in requests)

        assert self.loop.run(until=is_over, timeout_s=PATIENCE_S)
        return [request.status for request in requests]

    def count(self, vector):
        try:
            return os.eventfd_read(self.eventfds[vector])
        except BlockingIOError:
            return 0

    def leave(self):
        self.socket.close()
        for fd in (self.file, *self.eventfds):
            os.close(fd)


@pytest.fixture
def loop():
    with CompiledCard(CONFIG) as card:
        loop = Loop(Bridge(card))
        yield loop
        loop.close()


@pytest.fixture
def server(loop, tmp_path):
    server = Server(loop, loop.bridge, tmp_path / "socket", 1)
    yield server
    server.close()


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def settled(loop, condition):
    assert loop.run(until=condition, timeout_s=PATIENCE_S)


def test_descriptions(loop, server):
    """LINUX-VFIO-1: version, device, regions, interrupt indexes: each as the card's own configuration space says it; R24."""
    client = Client(loop, server.path, greets=False)
    found = client.wanted(VERSION, struct.pack("<HH", 0, 9) + b"{}\0")
    assert struct.unpack_from("<HH", found) == (0, 1)
    assert found[-1] == 0
    limits = json.loads(found[4:-1])["capabilities"]
    assert limits == {"max_msg_fds": 16, "max_data_xfer_size": 1 << 20, "max_dma_maps": 65535, "pgsizes": 4096}
    assert struct.unpack("<IIII", client.wanted(INFO, struct.pack("<IIII", 16, 0, 0, 0))) == (16, 3, 9, 5)
    sizes = []
    for index in range(9):
        size, flags, same, _, length, at = struct.unpack("<IIIIQQ", client.wanted(REGION, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0)))
        assert (size, same, at) == (32, index, 0)
        assert flags == (3 if length else 0)
        sizes.append(length)
    assert sizes == [server.info.bars[n].size if n in server.info.bars else 0 for n in range(6)] + [0, 4096, 0]
    counts = [struct.unpack("<IIII", client.wanted(IRQ, struct.pack("<IIII", 16, 0, n, 0))) for n in range(5)]
    assert counts == [(16, 9 if n == 2 else 0, n, server.info.msix.count if n == 2 else 0) for n in range(5)]
    whole = client.read(7, 0, 4096)
    assert whole[:4] == loop.bridge.config_read(1, 0, 4).to_bytes(4, "little")
    assert [client.read(7, at, size) for at, size in ((1, 7), (0x3E, 1), (0, 4096))] == [whole[1:8], whole[0x3E:0x3F], whole]
    client.socket.close()


def test_disk(loop, server):
    """LINUX-VFIO-2: a client maps memory, places BARs, starts the disk, moves data, gets its eventfds; R24, R25."""
    guest = Guest(loop, server).start()
    rng, done = random.Random(2), 0
    for sectors in (1, 2, 8, 16, 100):
        content = rng.randbytes(512 * sectors)
        assert guest.go(guest.blk.write(7, content)) == [BlkStatus.OK]
        read = guest.blk.read(7, len(content))
        assert guest.go(read) == [BlkStatus.OK]
        assert read.data == content
        settled(loop, lambda: select.select([guest.eventfds[1]], [], [], 0)[0])
        done += guest.count(1)
    assert done == server.counts["interrupts"] == loop.bridge.counts.interrupts
    assert server.counts["lost"] == guest.count(0) == loop.bridge.counts.strange_interrupts == loop.bridge.card.counts.dropped_writes == 0
    guest.leave()


def test_vectors(loop, server):
    """LINUX-VFIO-3: a vector without an eventfd pends in the card and fires once when it has one; the table is the server's; R24, R48."""
    guest = Guest(loop, server).start()
    bar, at = server.info.msix.table_bar, server.info.msix.table_offset
    guest.write(bar, at, b"\0" * 16 * server.info.msix.count)
    assert guest.read(bar, at, 16) == b"\xff" * 16
    assert not guest.set_irqs(1, 1)
    for _ in range(3):
        assert guest.go(guest.blk.read(0, 512)) == [BlkStatus.OK]
    loop.run(timeout_s=0.05)
    assert [guest.count(n) for n in range(len(guest.eventfds))] == [0] * len(guest.eventfds)
    assert not guest.set_irqs(1, 1, [guest.eventfds[1]])
    settled(loop, lambda: select.select([guest.eventfds[1]], [], [], 0)[0])
    loop.run(timeout_s=0.05)
    assert guest.count(1) == 1
    assert not guest.set_irqs(0, 0, flags=0x21, index=0)  # of no concern
    assert not guest.set_irqs(0, 2, flags=0x21)
    assert not guest.set_irqs(0, 2, flags=0x22, data=b"\0\1")
    assert [guest.count(n) for n in (0, 1)] == [1, 2]
    assert not guest.set_irqs(0, 0, flags=0x21)
    assert not guest.set_irqs(0, 1, flags=0x21)
    assert guest.count(0) == 0
    full = os.eventfd(0xFFFF_FFFF)  # a blocking one, whose counter has no room any more
    os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE - 0xFFFF_FFFF)
    assert not guest.set_irqs(1, 1, [full])
    assert guest.go(guest.blk.read(0, 512)) == [BlkStatus.OK]
    loop.run(timeout_s=0.05)
    assert guest.go(guest.blk.read(0, 512)) == [BlkStatus.OK]
    os.close(full)
    guest.leave()


def test_refusals(loop, server):
    """LINUX-VFIO-4: each malformed message gets its error, changes nothing, leaks no descriptor; the connection goes on; R72."""
    guest = Guest(loop, server)
    settled_fds, config = open_fds(), guest.read(7, 0, 4096)
    file = guest.file
    access, irqs, region = "<QII", "<IIIII", "<IIIIQQ"
    table = server.info.bars[0].size
    for command, payload, number in (
        (VERSION, GREETING, errno.EINVAL), (0, b"", errno.ENOTSUP), (6, bytes(16), errno.ENOTSUP), (11, bytes(24), errno.ENOTSUP),
        (15, bytes(16), errno.ENOTSUP), (999, b"", errno.ENOTSUP), (INFO, b"", errno.EINVAL), (INFO, bytes(15), errno.EINVAL),
        (INFO, bytes(16), errno.EINVAL), (INFO, struct.pack("<IIII", 16, 0, 0, 0) + b"x", errno.EINVAL),
        (REGION, struct.pack(region, 32, 0, 9, 0, 0, 0), errno.EINVAL), (REGION, struct.pack(region, 31, 0, 0, 0, 0, 0), errno.EINVAL),
        (REGION, bytes(8), errno.EINVAL), (IRQ, struct.pack("<IIII", 16, 0, 5, 0), errno.EINVAL), (IRQ, b"", errno.EINVAL),
        (READ, struct.pack(access, 0, 7, 0), errno.EINVAL), (READ, struct.pack(access, 4095, 7, 2), errno.EINVAL),
        (READ, struct.pack(access, 0, 0, 0xFFFF_FFFF), errno.EINVAL), (READ, struct.pack(access, (1 << 64) - 1, 0, 4), errno.EINVAL),
        (READ, struct.pack(access, 0, 9, 4), errno.EINVAL), (READ, struct.pack(access, 0, 6, 4), errno.EINVAL),
        (READ, struct.pack(access, table, 0, 1), errno.EINVAL), (READ, struct.pack(access, 0, 7, 4) + b"data", errno.EINVAL),
        (READ, b"\0" * 15, errno.EINVAL), (WRITE, struct.pack(access, 0, 7, 4), errno.EINVAL),
        (WRITE, struct.pack(access, 4, 7, 2) + b"\0\0\0", errno.EINVAL), (WRITE, struct.pack(access, 4096, 7, 1) + b"\0", errno.EINVAL),
        (WRITE, struct.pack(access, 4, 7, 0), errno.EINVAL), (RESET, b"\0", errno.EINVAL),
        (MAP, bytes(31), errno.EINVAL), (UNMAP, bytes(23), errno.EINVAL), (UNMAP, struct.pack("<IIQQ", 24, 1, 0, SIZE), errno.EINVAL),
        (UNMAP, struct.pack("<IIQQ", 24, 2, 0, SIZE), errno.EINVAL), (UNMAP, struct.pack("<IIQQ", 24, 0, 0, 0), errno.EINVAL),
        (UNMAP, struct.pack("<IIQQ", 24, 0, 4096, SIZE), errno.EINVAL), (UNMAP, struct.pack("<IIQQ", 24, 0, 0, 4096), errno.EINVAL),
        (SET_IRQS, struct.pack(irqs, 20, 0x24, 2, 0, 99), errno.EINVAL),
        (SET_IRQS, struct.pack(irqs, 20, 0x24, 2, 0xFFFF_FFFF, 1), errno.EINVAL),
        (SET_IRQS, struct.pack(irqs, 20, 0x24, 0, 0, 1), errno.EINVAL), (SET_IRQS, struct.pack(irqs, 20, 0x24, 5, 0, 0), errno.EINVAL),
        (SET_IRQS, struct.pack(irqs, 20, 0x0C, 2, 0, 1), errno.EINVAL),
        (SET_IRQS, struct.pack(irqs, 20, 0x22, 2, 0, 2) + b"\1", errno.EINVAL), (SET_IRQS, bytes(19), errno.EINVAL),
    ):  # fmt: skip
        assert guest.error(command, payload, [file, file]) == number, (command, payload)
        assert open_fds() == settled_fds, (command, payload)
    for address, size, fd, offset, rights in (
        (0x100_0000, 0, file, 0, 3), (0x100_0000, 4096, file, 0, 0), (0x100_0000, 4096, file, 0, 7), (0x100_0800, 4096, file, 0, 3),
        (0x100_0000, 100, file, 0, 3), ((1 << 64) - 4096, 8192, file, 0, 3), (0x100_0000, SIZE, file, 4096, 3),
        (0x100_0000, 4096, file, 1, 3), (0x100_0000, 4096, file, (1 << 64) - 4096, 3), (0x100_0000, 4096, guest.socket.fileno(), 0, 3),
    ):  # fmt: skip
        assert guest.map(address, size, fd, offset, rights) in (errno.EINVAL, errno.ENODEV), (address, size, offset, rights)
    assert guest.map(SIZE - 4096, 8192, file) == errno.EEXIST
    assert guest.error(MAP, struct.pack("<IIQQQ", 32, 3, 0, 0x100_0000, 4096), [file, file]) == errno.EINVAL
    read_only = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    assert guest.map(0x100_0000, 4096, read_only) == errno.EACCES
    os.close(read_only)
    assert guest.set_irqs(0, 1, [file]) == errno.EINVAL  # no eventfd
    assert guest.set_irqs(0, 1, [file, file]) == errno.EINVAL
    assert guest.error(INFO, struct.pack("<IIII", 16, 0, 0, 0), flags=2) == errno.EINVAL
    assert guest.error(INFO, struct.pack("<IIII", 16, 0, 0, 0), flags=0x20) == errno.EINVAL
    assert guest.error(INFO, struct.pack("<IIII", 16, 0, 0, 0), [file] * 17) == errno.EINVAL
    assert guest.error(INFO, struct.pack("<IIII", 16, 0, 0, 0), [file] * 200) == errno.EINVAL
    refused = server.counts["refused"]
    guest.send(INFO, b"", flags=0x10)  # no reply wanted, not even of an error
    guest.send(INFO, struct.pack("<IIII", 16, 0, 0, 0), flags=1)  # a reply to nothing
    assert guest.wanted(INFO, struct.pack("<IIII", 16, 0, 0, 0))
    assert server.counts["refused"] == refused + 2
    assert open_fds() == settled_fds
    assert guest.read(7, 0, 4096) == config
    assert guest.start().go(guest.blk.read(0, 512)) == [BlkStatus.OK]
    guest.leave()


def test_broken_streams(loop, server):
    """LINUX-VFIO-5: greetings that are none, lengths that are none, ends within a message: the next client is served; R72."""
    before = open_fds()
    for greeting in (b"", b"\1\0\0\0{}\0", b"\0\0\0\0{\0", b"\0\0\0\0[]\0", b"\0\0\0\0{\"capabilities\":3}\0", b"\0\0\0\0\xff\xfe\0",
                     b"\0\0\0\0" + b"[" * 100_000):  # fmt: skip
        client = Client(loop, server.path, greets=False)
        assert client.error(INFO, struct.pack("<IIII", 16, 0, 0, 0)) == errno.EINVAL
        assert client.error(VERSION, greeting) == errno.EINVAL
        client.wanted(VERSION, GREETING)
        client.socket.close()
    for size in (0, 15, (1 << 20) + 65, 0xFFFF_FFFF):
        client = Client(loop, server.path)
        assert client.error(INFO, size=size) == errno.EINVAL
        with pytest.raises(ConnectionError):
            client.take(1)
        client.socket.close()
    for raw in (b"", b"\1", struct.pack("<HHIII", 1, INFO, 32, 0, 0), struct.pack("<HHIII", 1, INFO, 32, 0, 0) + b"\0" * 7):
        client, connections = Client(loop, server.path), server.connections
        socket.send_fds(client.socket, [raw or b"\0" * 16], [0, 1])
        loop.run(timeout_s=0.02)
        assert server.is_connected == bool(raw)  # 16 zeroes announce 0 bytes
        client.socket.close()
        settled(loop, lambda: not server.is_connected)
        assert server.connections == connections
    client = Client(loop, server.path)
    one = struct.pack("<HHIII", 7, INFO, 32, 0, 0) + struct.pack("<IIII", 16, 0, 0, 0)
    for byte in one + one:  # in the smallest pieces
        client.socket.send(bytes([byte]))
        loop.run(timeout_s=0.001)
    assert len(client.take(64)) == 64
    client.socket.send(one * 300)  # and many at once
    assert len(client.take(32 * 300)) == 32 * 300
    client.socket.close()
    settled(loop, lambda: not server.is_connected)
    assert open_fds() == before


def test_reconnect(loop, server):
    """LINUX-VFIO-6: a client dies under load, the next begins with a card after reset, disk content kept, nothing mapped; R61, R72."""
    before, contents = open_fds(), {}
    for turn in range(6):
        guest = Guest(loop, server)
        assert (server.counts["maps"], server.connections) == (1, turn + 1)
        assert guest.read(7, server.info.msix.offset + 2, 2)[1] & 0xC0 == 0
        guest.start()
        for sector, content in contents.items():
            read = guest.blk.read(sector, len(content))
            assert guest.go(read) == [BlkStatus.OK]
            assert read.data == content
        contents[16 * turn] = random.Random(turn).randbytes(4096)
        assert guest.go(guest.blk.write(16 * turn, contents[16 * turn])) == [BlkStatus.OK]
        for n in range(12):
            guest.blk.read(200 + 8 * n, 4096)
        guest.blk.publish()
        run_software(guest.driver.notify(), guest.perform)
        for _ in range(turn):
            loop.bridge.pump(100)
        guest.leave()
        settled(loop, lambda: not server.is_connected)
        dropped, refused = loop.bridge.card.counts.dropped_writes, loop.bridge.card.counts.refused_reads
        loop.run(timeout_s=0.02)
        assert (loop.bridge.card.counts.dropped_writes, loop.bridge.card.counts.refused_reads) == (dropped, refused) == (0, 0)
        assert loop.bridge.card.unmap(0, SIZE, function=1) == server.counts["maps"] == 0
        assert open_fds() == before
        assert loop.bridge.config_read(1, 4, 2) & 7 == 0


def under_load(guest):
    for n in range(8):
        guest.blk.read(8 * n, 4096)
    guest.blk.publish()
    run_software(guest.driver.notify(), guest.perform)


def starts_again(guest, server):
    """Memory and bus master, MSI-X, the driver: as after a reset; a request and its interrupt come."""
    guest.write(7, 0x04, b"\x06\x00")
    guest.write(7, server.info.msix.offset + 2, b"\x00\x80")
    memory = FileMemory(guest.file)
    ring = SplitDriver(memory, size=64, base=RING)
    guest.blk = BlkDriver(ring, memory, area=AREA, rng=random.Random(1))
    run_software(guest.driver.start([ring.layout], wanted=1 << 32 | 1 << 9, vectors=[1], config_vector=0), guest.perform)
    assert guest.go(guest.blk.read(0, 4096)) == [BlkStatus.OK]
    settled(guest.loop, lambda: guest.count(1))


def test_device_reset(loop, server):
    """LINUX-VFIO-7: DEVICE_RESET under load: configuration as after reset, eventfds stay and work once the driver starts again; R61."""
    guest = Guest(loop, server).start()
    for _ in range(3):
        under_load(guest)
        assert guest.wanted(RESET) == b""
        assert guest.read(7, 4, 2)[0] & 7 == 0
        loop.run(timeout_s=0.01)
        guest.count(1)
        assert guest.read(7, 0x10, 24) == bytes.fromhex("04000000 00000000") * 2 + bytes(8)
        for index, bar in sorted(guest.bars.items()):
            guest.write(7, 0x10 + 4 * index, bar.address.to_bytes(8, "little"))
        starts_again(guest, server)
    guest.leave()


def test_level_reset(loop, server):
    """LINUX-VFIO-11: a function level reset by the client, under load: BARs are where they were, all else as after reset; R61."""
    guest = Guest(loop, server).start()
    control = server.info.capabilities[0x10][0] + 8
    for _ in range(3):
        under_load(guest)
        before = guest.read(7, 0x10, 24)
        guest.write(7, control, b"\x10\xa8")
        assert guest.read(7, 0x10, 24) == before
        assert guest.read(7, 4, 2)[0] & 7 == 0
        assert guest.read(7, server.info.msix.offset + 2, 2)[1] & 0x80 == 0
        loop.run(timeout_s=0.01)
        guest.count(1)
        starts_again(guest, server)
    guest.leave()


def test_maps(loop, server, capsys):
    """LINUX-VFIO-8: thousands of pages mapped and unmapped one by one, at any time, without a descriptor each; what is gone is refused."""
    guest = Guest(loop, server)
    before, pages, base = open_fds(), 3000, 0x40_0000_0000
    order = list(range(pages))
    random.Random(4).shuffle(order)
    begin = time.perf_counter()
    for n in order:
        assert not guest.map(base + 4096 * n, 4096, guest.file, 4096 * (n % (SIZE // 4096)), 1 + 2 * (n % 2))
    middle = time.perf_counter()
    assert server.counts["maps"] == pages + 1
    assert open_fds() == before
    os.pwrite(guest.file, b"here", 4096 * 5 + 8)
    assert loop.bridge.card.read(base + 4096 * 5 + 8, 4, function=1) == b"here"
    for n in order[: pages // 2]:
        assert not guest.unmap(base + 4096 * n, 4096)
    end = time.perf_counter()
    assert server.counts["maps"] == pages + 1 - pages // 2
    assert guest.unmap(base, 4096 * pages) == 0  # what is left, in one
    assert not guest.unmap(base, 4096 * pages)  # nothing is there, as with Linux's vfio
    assert (server.counts["maps"], loop.bridge.card.unmap(base, 4096 * pages, function=1)) == (1, 0)
    assert not guest.map(base, 4096, None)  # no file: not reached
    assert loop.bridge.card.unmap(base, 4096, function=1) == 0
    assert guest.map(base, 4096, guest.file) == errno.EEXIST
    assert not guest.unmap(0, 0, 2)
    assert (server.counts["maps"], loop.bridge.card.unmap(0, 1 << 63, function=1)) == (0, 0)
    with capsys.disabled():
        print(f"\n  {pages / (middle - begin):.0f} maps/s, {pages // 2 / (end - middle):.0f} unmaps/s, client and server in one process")
    guest.leave()


def test_rights(loop, server):
    """LINUX-VFIO-9: the card writes nowhere where the client gave it only reading, and reads nothing that is not mapped; both counted."""
    guest = Guest(loop, server).start()
    assert guest.go(guest.blk.write(0, b"A" * 512)) == [BlkStatus.OK]
    counts = loop.bridge.card.counts
    # the same memory again, the buffers read-only now
    assert not guest.unmap(0, SIZE)
    assert not guest.map(0, AREA[0], guest.file)
    assert not guest.map(AREA[0], AREA[1], guest.file, AREA[0], 1)
    read = guest.blk.read(0, 512)
    guest.blk.publish()
    run_software(guest.driver.notify(), guest.perform)
    settled(loop, lambda: counts.dropped_writes)
    assert os.pread(guest.file, AREA[1], AREA[0]).count(b"A" * 512) <= 1  # of the write alone
    assert not guest.unmap(AREA[0], AREA[1])
    assert read.status != BlkStatus.OK
    refused = counts.refused_reads
    assert not guest.unmap(0, AREA[0])
    run_software(guest.driver.notify(), guest.perform)
    settled(loop, lambda: counts.refused_reads > refused)
    guest.leave()


def test_two_functions(loop, server, tmp_path):
    """LINUX-VFIO-10: two sockets, one card, other memory at the same addresses: each has its own data and interrupts; one leaves."""
    with_other = Server(loop, loop.bridge, tmp_path / "other", 2)
    guests = [Guest(loop, server).start(), Guest(loop, with_other, function=2)]
    assert guests[0].go(guests[0].blk.write(3, b"one!" * 128)) == [BlkStatus.OK]
    settled(loop, lambda: guests[0].count(1))
    guests[1].start()
    both = [guest.blk.read(3, 512) for guest in guests]
    for guest in guests:
        guest.blk.publish()
        run_software(guest.driver.notify(), guest.perform)
    assert [guest.go(read) for guest, read in zip(guests, both, strict=True)] == [[BlkStatus.OK]] * 2
    assert [read.data for read in both] == [b"one!" * 128, bytes(512)]
    settled(loop, lambda: server.counts["interrupts"] == 2 and with_other.counts["interrupts"] == 1)
    guests[0].leave()
    settled(loop, lambda: not server.is_connected)
    read = guests[1].blk.read(3, 512)
    assert guests[1].go(read) == [BlkStatus.OK]
    assert read.data == bytes(512)
    settled(loop, lambda: with_other.counts["interrupts"] == 2)
    assert (server.counts["interrupts"], server.counts["lost"], with_other.counts["lost"]) == (2, 0, 0)
    guests[1].leave()
    with_other.close()
    with pytest.raises(ValueError, match=r"not 256"):
        loop.bridge.card.map(0, 4096, function=256)
    with pytest.raises(ValueError, match=r"not 3"):
        Server(loop, loop.bridge, tmp_path / "third", 3)
