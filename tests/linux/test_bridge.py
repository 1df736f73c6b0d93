"""The bridge and the loop: a foreign host's accesses, mappings and interrupts on the compiled card."""

import os
import random
import time

import pytest

from ringwall.models.host import ConfigRead, ConfigWrite, Delay, MemoryRead, MemoryWrite
from ringwall.models.host import run as run_software
from ringwall.models.memory import AccessFault
from ringwall.models.virtio.blk import BlkDriver
from ringwall.models.virtio.driver import VirtioPciDriver
from ringwall.models.virtio.split import SplitDriver
from ringwall.sim.card import bench_config
from ringwall.sim.compiled import CompiledCard
from ringwall.sim.linux.bridge import Bridge
from ringwall.sim.linux.loop import Loop

CONFIG = bench_config(64)
WINDOW = 0xF000_0000  # where the guest places BARs
RING, AREA, SIZE = 0x10_0000, 0x20_0000, 0x40_0000


class Guest:
    """A guest with memory in a file that drives function 1 through the bridge alone: addresses are its own."""

    def __init__(self, bridge, *, function=1, window=WINDOW, message=(0xFEE0_0000, 0x41)):
        self.bridge, self.function, self.seen, self.message = bridge, function, [], message
        self.info = bridge.functions[function]
        self.file = os.memfd_create("guest")
        os.ftruncate(self.file, SIZE)
        bridge.map(0, SIZE, self.file, 0, owner=self)
        self.bars = {}
        for index, bar in sorted(self.info.bars.items()):
            self.bars[index] = type(bar)(window, bar.size, bar.is_64, bar.prefetch, bar.is_io)
            bridge.config_write(function, 0x10 + 4 * index, 8, window)
            window += max(bar.size, 4096)
        bridge.config_write(function, 0x04, 2, 6)
        bridge.on_interrupt[function] = lambda *what: self.seen.append(what)

    def perform(self, operation):
        match operation:
            case ConfigRead(_, offset, size):
                return self.bridge.config_read(self.function, offset, size)
            case ConfigWrite(_, offset, size, value):
                self.bridge.config_write(self.function, offset, size, value)
            case MemoryRead(address, size):
                return int.from_bytes(self.bridge.bar_read(self.function, *self.place(address), size), "little")
            case MemoryWrite(address, size, value):
                self.bridge.bar_write(self.function, *self.place(address), value.to_bytes(size, "little"))
            case Delay(cycles):
                self.bridge.pump(cycles)
        return None

    def place(self, address):
        return next((n, address - bar.address) for n, bar in self.bars.items() if bar.address <= address < bar.address + bar.size)

    def entry(self, vector, address, data, mask):
        at = self.info.msix.table_offset + 16 * vector
        raw = address.to_bytes(8, "little") + data.to_bytes(4, "little") + mask.to_bytes(4, "little")
        self.bridge.bar_write(self.function, self.info.msix.table_bar, at, raw)

    def start(self, size=64, framing="parts"):
        """Bring MSI-X and virtio up."""
        self.entry(0, self.message[0], self.message[1], 0)
        self.entry(1, self.message[0], self.message[1] + 1, 0)
        self.bridge.config_write(self.function, self.info.msix.offset + 2, 2, 0x8000)
        info = type(self.info)(**{name: getattr(self.info, name) for name in self.info.__dataclass_fields__} | {"bars": self.bars})
        self.driver = VirtioPciDriver(info)
        self.ring = SplitDriver(self.bridge.card.memory, size=size, base=RING)
        self.blk = BlkDriver(self.ring, self.bridge.card.memory, area=(AREA, 0x10_0000), rng=random.Random(1), framing=framing)
        for step in (self.driver.find, self.driver.reset, self.driver.acknowledge, lambda: self.driver.negotiate(1 << 32 | 1 << 9),
                     lambda: self.driver.set_config_vector(0), lambda: self.driver.set_up_queue(0, self.ring.layout, vector=1),
                     self.driver.driver_ok):  # fmt: skip
            run_software(step(), self.perform)
        return self

    def go(self, loop, *requests, timeout_s=20):
        if self.blk.publish():
            run_software(self.driver.notify(), self.perform)

        def is_over():
            self.blk.poll()
            return all(request.is_done for request in requests)

        return loop.run(until=is_over, timeout_s=timeout_s)


@pytest.fixture
def bridge():
    with CompiledCard(CONFIG) as card:
        yield Bridge(card)


def test_power_on(bridge):
    """LINUX-BRIDGE-1: the bridge finds the functions by reading, and leaves them as after a reset: no BAR, no decoding, no MSI-X."""
    assert sorted(bridge.functions) == [0, 1, 2]
    for number, info in bridge.functions.items():
        assert bridge.config_read(number, 0x04, 2) & 7 == 0
        assert bridge.config_read(number, info.capabilities[0x10][0] + 8, 2) == 0x2810
        assert bridge.config_read(number, info.msix.offset + 2, 2) & 0xC000 == 0
        assert [bridge.config_read(number, 0x10 + 4 * n, 4) & ~15 for n in range(6)] == [0] * 6
        assert bridge.bar_read(number, 0, 0, 8) == b"\xff" * 8
    assert bridge.counts.refused == 3
    assert bridge.config_read(1, 0, 8) == bridge.config_read(1, 4, 4) << 32 | bridge.config_read(1, 0, 4)
    assert [bridge.config_read(f, o, s) for f, o, s in ((7, 0, 4), (1, 4096, 1), (1, 4094, 4))] == [0xFFFF_FFFF, 0xFF, 0xFFFF_FFFF]


def test_disk(bridge):
    """LINUX-BRIDGE-2: a guest places BARs where it likes, starts a disk, moves data; interrupts say vector and data."""
    loop, guest = Loop(bridge), Guest(bridge).start()
    content = random.Random(2).randbytes(8192)
    write, read = guest.blk.write(8, content), guest.blk.flush()
    assert guest.go(loop, write, read)
    read = guest.blk.read(8, 8192)
    assert guest.go(loop, read)
    assert read.data == content
    loop.run(until=lambda: guest.seen, timeout_s=5)
    assert set(guest.seen) == {(1, 1, 0xFEE0_0000, 0x42)}
    assert bridge.counts.strange_interrupts == 0
    assert bridge.counts.interrupts == len(guest.seen)
    before = bridge.bar_read(1, 0, 0, 4)
    bridge.config_write(1, 0x04, 2, 4)  # Memory Space off
    assert bridge.bar_read(1, 0, 0, 4) == b"\xff" * 4
    bridge.config_write(1, 0x10, 4, WINDOW + 0x10_0000)
    bridge.config_write(1, 0x04, 2, 6)
    assert bridge.bar_read(1, 0, 0, 4) == before  # where the BAR is now
    assert bridge.bar_read(1, 0, bridge.functions[1].bars[0].size - 2, 4) == b"\xff" * 4
    assert bridge.bar_read(1, 5, 0, 4) == b"\xff" * 4
    loop.close()


@pytest.mark.parametrize("size", [1 << n for n in range(1, 11)])
def test_queue_sizes(bridge, size):
    """LINUX-BRIDGE-8: queues of 2 to 1024 descriptors, as a driver makes them: data moves around the ring, and beyond its end."""
    loop, guest, rng = Loop(bridge), Guest(bridge).start(size=size, framing="whole"), random.Random(size)
    image, turns = bytearray(1 << 16), 0
    while turns < 6 or guest.ring.used_index <= size:
        turns += 1
        batch, taken = [], set()
        for _ in range(min(size // 2, 8)):
            sector = rng.randrange(0, 128, 8)
            if sector in taken:
                continue
            taken.add(sector)
            data = rng.randbytes(4096) if rng.randrange(2) else None
            batch.append((sector * 512, data, guest.blk.read(sector, 4096) if data is None else guest.blk.write(sector, data)))
        assert guest.go(loop, *(request for _, _, request in batch))
        for at, data, request in batch:
            assert request.status == 0
            if data is None:
                assert request.data == image[at : at + 4096]
            else:
                image[at : at + 4096] = data
    loop.close()


def test_masked_vector(bridge):
    """LINUX-BRIDGE-3: a masked vector pends, and fires once when it is unmasked, however often it was asked for. [PCIe5 6.1.4.4]"""
    loop, guest = Loop(bridge), Guest(bridge).start()
    guest.entry(1, *guest.message, 1)
    for _ in range(3):
        read = guest.blk.read(0, 512)
        assert guest.go(loop, read)
    while bridge.pump(1000):
        pass
    assert guest.seen == []
    pba = guest.info.msix.pba_offset
    assert bridge.bar_read(1, guest.info.msix.pba_bar, pba, 8) == b"\2" + bytes(7)
    guest.entry(1, *guest.message, 0)
    while bridge.pump(1000):
        pass
    assert len(guest.seen) == 1
    assert bridge.bar_read(1, guest.info.msix.pba_bar, pba, 8) == bytes(8)
    loop.close()


def test_message_window(bridge):
    """LINUX-BRIDGE-4: the window of messages follows the host; beside it the same write goes to memory, or nowhere."""
    loop = Loop(bridge)
    bridge.messages = (0xA_0000, 0x1000)
    guest = Guest(bridge, message=(0xA_0000, 7)).start()
    assert guest.go(loop, guest.blk.read(0, 512))
    loop.run(until=lambda: guest.seen, timeout_s=5)
    assert guest.seen == [(1, 1, 0xA_0000, 8)]
    assert os.pread(guest.file, 4, 0xA_0000) == bytes(4)
    bridge.messages = (0xFEE0_0000, 0x1000)
    assert guest.go(loop, guest.blk.read(0, 512))
    while bridge.pump(1000):
        pass
    assert len(guest.seen) == 1
    assert os.pread(guest.file, 4, 0xA_0000) == (8).to_bytes(4, "little")
    loop.close()


def test_reset(bridge):
    """LINUX-BRIDGE-5: a reset under load stops the function: no more of its writes land; the guest can start it again."""
    loop, guest = Loop(bridge), Guest(bridge).start()
    for _ in range(8):
        guest.blk.read(0, 16384)
    guest.blk.publish()
    run_software(guest.driver.notify(), guest.perform)
    bridge.pump(300)
    bridge.reset(1)
    landed = bridge.card.counts.writes
    while bridge.pump(1000):
        pass
    assert bridge.card.counts.writes == landed
    assert bridge.config_read(1, 0x04, 2) & 7 == 0
    assert bridge.config_read(1, 0x10, 4) & ~15 == 0
    assert bridge.bar_read(1, 0, 0, 4) == b"\xff" * 4
    bridge.unmap_all(owner=guest)
    again = Guest(bridge).start()
    read = again.blk.read(0, 512)
    assert again.go(loop, read)
    assert read.status == 0
    loop.close()


def test_owners(bridge):
    """LINUX-BRIDGE-6: several owners map the same memory: it is there until the last is gone; what differs is refused."""
    file, other = os.memfd_create("one"), os.memfd_create("two")
    for one in (file, other):
        os.ftruncate(one, 0x4000)
    bridge.map(0x1000, 0x2000, file, 0x1000, owner="a")
    bridge.map(0x0000, 0x4000, file, 0, owner="b")
    for parameters in ({"fd": other, "owner": "c"}, {"fd": file, "owner": "a"}, {"fd": file, "owner": "c", "writable": False}):
        with pytest.raises(ValueError, match="must not overlap"):
            bridge.map(0x2000, 0x1000, offset=0x2000, **parameters)
    with pytest.raises(ValueError, match="must not overlap"):
        bridge.map(0x2000, 0x1000, file, 0x1000, owner="c")
    with pytest.raises(ValueError, match="within the file"):
        bridge.map(0x0000, 0x5000, file, 0, owner="c")
    with pytest.raises(AccessFault):
        bridge.card.read(0x4000, 1)
    os.pwrite(file, b"here", 0x2000)
    assert bridge.unmap(0x1800, 0x1000, owner="a") == 0x1000
    assert bridge.card.read(0x1000, 0x3000)[0x1000:0x1004] == b"here"
    assert bridge.unmap_all(owner="b") == 0x4000
    assert bridge.card.read(0x2800, 0x800) == bytes(0x800)
    assert bridge.card.read(0x1000, 0x800) == bytes(0x800)
    for address in (0, 0x1800, 0x2000, 0x27FF, 0x3000):
        with pytest.raises(AccessFault):
            bridge.card.read(address, 1)
    assert bridge.unmap(0, 0x4000, owner="b") == 0
    assert bridge.unmap_all(owner="a") == 0x1000
    with pytest.raises(AccessFault):
        bridge.card.read(0x1000, 1)
    os.close(file)
    os.close(other)


def test_loop(bridge):
    """LINUX-BRIDGE-7: an idle loop sleeps, ends in time, and survives handlers that remove each other; paused, no cycle passes."""
    loop = Loop(bridge)
    while bridge.pump(1000):
        pass
    cycle, begin, used = bridge.card.cycle, time.monotonic(), time.process_time()
    assert loop.run(timeout_s=0.4) is False
    assert 0.4 <= time.monotonic() - begin < 5
    assert time.process_time() - used < 0.3
    assert bridge.card.cycle == cycle
    ends, called = [os.pipe() for _ in range(2)], []

    def take(n):
        called.append(n)
        loop.remove(ends[0][0])
        loop.remove(ends[1][0])

    for n in range(2):
        loop.add(ends[n][0], lambda n=n: take(n))
        os.write(ends[n][1], b"x")
    assert loop.run(until=lambda: called, timeout_s=5)
    loop.run(timeout_s=0.1)
    assert len(called) == 1
    loop.add(ends[0][0], loop.stop)
    assert loop.run(timeout_s=60) is False
    loop.remove(ends[0][0])
    for both in ends:
        for end in both:
            os.close(end)
    guest = Guest(bridge).start()
    read = guest.blk.read(0, 512)
    loop.is_paused = True
    assert guest.go(loop, read, timeout_s=0.2) is False
    loop.is_paused = False
    assert guest.go(loop, read)
    loop.close()
    with pytest.raises(ValueError, match=r"^Cycles between .* not 0$"):
        Loop(bridge, cycles=0)
