"""The judge of a ring: a device that does as the golden one passes in any order and framing; each deed that it must not do is found."""

import random
from dataclasses import dataclass

import pytest

from ringwall.models.events import Note, Operation, TlpReceived
from ringwall.models.host import MemoryRead, MemoryWrite
from ringwall.models.iommu.commands import IofenceC, IotinvalVma
from ringwall.models.iommu.registers import IommuMode
from ringwall.models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, PageTable
from ringwall.models.tlp import decode, encode, memory_read, memory_write
from ringwall.sim.ring_checker import DoubtfulBlkDevice, RingChecker
from ringwall.sim.scoreboard import Difference
from ringwall.sim.session import Session

SIZE, DESC, AVAIL, USED, BUFFERS = 8, 0x1000, 0x2000, 0x3000, 0x10_0000  # IOVAs
TABLE, MESSAGES, MESSAGE = 0xE000_0000, 0xFEE0_0000, 0x1234_5678  # MSI-X table; address of vector 0, data of vector 1
STATUS = 0xE000_2014  # device_status
SPA = 0x8000_0000  # where the pages of IOVA 0 on are, in another order


@dataclass
class Result:
    written: bytes

    def problem(self, before, after, used_len):
        right = self.written + before[len(self.written) :]
        return next((f"byte {n} of {len(after)} differs" for n in range(len(after)) if after[n] != right[n]), "")


class Reverse:
    """Golden device: writes what it reads, backwards, as far as there is room."""

    def __init__(self):
        self.unknown = []

    def execute(self, readable, writable_len):
        return Result(readable[::-1][:writable_len])

    def lost(self, header, length):
        self.unknown.append((header, length))


class Run:
    """A driver and a card that are written here, behind page tables that shuffle the pages."""

    def __init__(self, seed=1, indices=0, **options):
        self.rng, self.now = random.Random(seed), 0
        self.session = session = Session(seed=seed, cycle=lambda: self.now)
        allocator = Allocator(session.memory, 0x10_0000, 64 * 4096)
        directory = DeviceDirectory(session.memory, allocator, levels=1, observer=session.allowed)
        self.table = PageTable(session.memory, allocator, observer=session.allowed)
        directory.set(1, DeviceContext.sv39(self.table.root, PSCID=1))
        session.allowed.mode_changed(IommuMode.LVL1)
        session.allowed.mode_settled()
        pages = list(range(0x200))
        self.rng.shuffle(pages)
        self.spa = {page * 4096: SPA + place * 4096 for page, place in enumerate(pages)}
        for iova, spa in self.spa.items():
            self.table.map_page(iova, spa)
        self.table.map_page(MESSAGES, MESSAGES)
        self.table.map_page(0xABC_D000, MESSAGES + 0x1000)
        messages = session.add("MessageChecker", function=1, table=TABLE, entries=2)
        self.software(MemoryWrite(TABLE + 16, 8, MESSAGES + 0x10), MemoryWrite(TABLE + 24, 8, MESSAGE))
        self.avail_index = self.used_index = indices
        self.store(AVAIL + 2, indices.to_bytes(2, "little"))
        self.store(USED + 2, indices.to_bytes(2, "little"))
        self.checker = RingChecker(session.memory, session.golden, session.allowed, function=1, size=SIZE, desc=DESC, avail=AVAIL,
                                   used=USED, device=Reverse(), vector=1, messages=messages, index=indices, patience=100,
                                   **options)  # fmt: skip
        session.board.checkers.append(self.checker)
        session.add("MemoryChecker")
        self.free, self.out = list(range(SIZE)), {}  # descriptors; head -> (readable bytes, writable [(iova, length)], descriptors)

    def software(self, *operations, result=None):
        """Software performs operations."""
        for operation in operations:
            self.session.take(Operation(self.now, operation, result))

    def interrupt(self):
        """The card sends the interrupt of the queue."""
        self.raw_write(MESSAGES + 0x10, MESSAGE.to_bytes(4, "little"))

    def read(self, iova, length):
        """The card reads."""
        tlp = memory_read(self.spa[iova & ~4095] + iova % 4096, length, requester_id=0x101, tag=1)
        self.session.take(TlpReceived(self.now, encode(tlp)), decode(encode(tlp)))

    def pieces(self, iova, data):
        while data:
            size = min(len(data), 4096 - iova % 4096)
            yield self.spa[iova & ~4095] + iova % 4096, data[:size]
            iova, data = iova + size, data[size:]

    def store(self, iova, data):
        """Software writes."""
        for spa, part in self.pieces(iova, data):
            self.session.memory.write(spa, part)

    def offer(self, lengths, *, loops=False):
        """The driver makes a chain of ``lengths`` available, negative ones writable; returns its head."""
        taken = [self.free.pop(self.rng.randrange(len(self.free))) for _ in lengths]
        readable, writable = b"", []
        for n, length in enumerate(lengths):
            iova = BUFFERS + taken[n] * 0x4000 + self.rng.randrange(4096)
            following = taken[n + 1] if n + 1 < len(taken) else 0
            if loops and n + 1 == len(taken):
                following = taken[0]
            flags = (loops or n + 1 < len(taken)) | (2 if length < 0 else 0)
            content = self.rng.randbytes(abs(length))
            self.store(iova, content)
            if length < 0:
                writable.append((iova, -length))
            else:
                readable += content
            raw = iova.to_bytes(8, "little") + abs(length).to_bytes(4, "little") + bytes([flags, 0, following, 0])
            self.store(DESC + 16 * taken[n], raw)
        self.store(AVAIL + 4 + 2 * (self.avail_index % SIZE), taken[0].to_bytes(2, "little"))
        self.avail_index = self.avail_index + 1 & 0xFFFF
        self.store(AVAIL + 2, self.avail_index.to_bytes(2, "little"))
        self.out[taken[0]] = readable, writable, taken
        return taken[0]

    def write(self, iova, data, cut=256):
        """The card writes, in TLPs of up to ``cut`` bytes."""
        for spa, part in self.pieces(iova, data):
            for at in range(0, len(part), cut):
                self.raw_write(spa + at, part[at : at + cut])

    def raw_write(self, spa, data):
        if not data:
            return
        first = min(len(data), 4096 - spa % 4096)
        self.now += 1
        tlp = memory_write(spa, data[:first], requester_id=0x101)
        if not MESSAGES <= spa < MESSAGES + 0x2000:
            self.session.memory.write(spa, data[:first], source="card")
        self.session.take(TlpReceived(self.now, encode(tlp)), decode(encode(tlp)))

    def answer(self, head, data=None):
        """The card writes the data of a chain; returns how much."""
        readable, writable, _ = self.out[head]
        data = readable[::-1] if data is None else data
        at = 0
        for iova, length in writable:
            self.write(iova, data[at : at + length], self.rng.choice([13, 64, 256]))
            at += length
        return min(at, len(data))

    def element(self, head, length):
        self.write(USED + 4 + 8 * (self.used_index % SIZE), head.to_bytes(4, "little") + length.to_bytes(4, "little"))
        self.used_index = self.used_index + 1 & 0xFFFF

    def index(self, index=None):
        self.write(USED + 2, (self.used_index if index is None else index).to_bytes(2, "little"))

    def give_back(self, head, length=None, data=None, told=True):
        written = self.answer(head, data)
        self.element(head, written if length is None else length)
        self.index()
        if told:
            self.interrupt()
        for descriptor in self.out.pop(head)[2]:
            self.free.append(descriptor)


@pytest.mark.parametrize("indices", [0, 65530])
def test_good(indices):
    """SIM-RING-1: chains of every framing come back in any order, several at once, over the wrap of the indices; all are compared."""
    run = Run(7, indices)
    count = 0
    for _ in range(60):
        while len(run.free) > 2 and run.rng.random() < 0.7:
            lengths = [run.rng.choice([0, 1, 16, 700, 5000, -1, -16, -700, -9000]) for _ in range(run.rng.randrange(1, 4))]
            run.offer(sorted(lengths, reverse=True))  # readable ones first
        if not run.out:
            continue
        heads = run.rng.sample(sorted(run.out), run.rng.randrange(1, len(run.out) + 1))
        for head in heads:
            run.element(head, run.answer(head) // 2)
        run.index()
        for head in heads:
            run.free += run.out.pop(head)[2]
        run.interrupt()
        count += len(heads)
    run.session.finish()
    assert run.checker.comparisons == len(run.checker.finished) == count > 60
    assert sum(room for *_, room in run.checker.finished) > 50_000


def offered(act):
    """Return a deed that begins with two chains on offer: 0 of 700 bytes each way, 1 of 20 to read."""

    def go(run):
        act(run, run.offer([700, -300, -400]), run.offer([20]))

    return go


def spoil(run, head):
    data = bytearray(run.out[head][0][::-1])
    data[301] ^= 1
    return bytes(data)


def late(act):
    """Return a deed after which the run goes on for longer than the patience."""

    def go(run):
        act(run)
        run.now += 101
        run.session.take(Note(run.now, "long after"))

    return go


def reset(run):
    """Software resets the device; nothing is available then."""
    run.software(MemoryWrite(STATUS, 1, 0))
    run.software(MemoryRead(STATUS, 1), result=0)


DEEDS = {
    "wrong byte": (offered(lambda run, a, b: run.give_back(a, data=spoil(run, a))), r"answers \[VIRTIO1.4 5.2.6\]\n.*\n.*byte 301 of 700"),
    "too little": (offered(lambda run, a, b: run.give_back(a, data=run.out[a][0][::-1][:650])), r"byte 650 of 700 differs"),
    "reports too much": (offered(lambda run, a, b: run.give_back(a, 701)), r"V041 of function 1 \[VIRTIO1.4 2.7.8\]\n.*len 701, written"),
    "index before data": (offered(lambda run, a, b: (run.element(a, 700), run.index(), run.answer(a))), r"byte 0 of 700 differs"),
    "index before element": (offered(lambda run, a, b: (run.answer(b), run.index(1))), r"V039 of function 1 \[VIRTIO1.4 2.7.8.2\]"),
    "unknown head": (offered(lambda run, a, b: (run.element(({*range(8)} - {a, b}).pop(), 0), run.index())), "V042.*2.7.8"),
    "head out of range": (offered(lambda run, a, b: (run.element(0x10000 + a, 0), run.index())), f"V042(.|\n)*id {0x10000}"),
    "twice": (offered(lambda run, a, b: (run.give_back(b), run.element(b, 0), run.index())), "used twice"),
    "index jumps": (offered(lambda run, a, b: run.index(3)), r"used index of function 1 \[VIRTIO1.4 2.7.8\]\n  card:  from 0 to 3"),
    "index goes back": (offered(lambda run, a, b: (run.give_back(b), run.index(0))), "used index of .*\n  card:  from 1 to 0"),
    "flags": (offered(lambda run, a, b: run.write(USED, b"\2\0")), r"V043 of function 1 \[VIRTIO1.4 2.7.10.2\]"),
    "writes the available ring": (offered(lambda run, a, b: run.write(AVAIL, b"\1\0")), "stray write"),
    "writes a descriptor": (offered(lambda run, a, b: run.write(DESC, b"\1")), "V028"),
    "writes a readable buffer": (offered(lambda run, a, b: run.write(BUFFERS + b * 0x4000 + 8, bytes(8))), "V026|stray write"),
    "writes behind a buffer": (offered(lambda run, a, b: run.write(sum(run.out[a][1][0]) - 1, b"12")), "stray write"),
    "writes behind the used ring": (offered(lambda run, a, b: run.write(USED + 6 + 8 * SIZE, b"1")), "stray write"),
    "writes after giving back": (
        offered(lambda run, a, b: (at := run.out[a][1][0][0], run.give_back(a), run.write(at, b"1"))), "V040"),
    "scribbles unused elements": (
        offered(lambda run, a, b: (run.give_back(b), run.write(USED + 4 + 8 * 5, b"12345678"))), "V039"),
    "reads what is writable": (offered(lambda run, a, b: run.read(run.out[a][1][0][0], 64)), "V027"),
    "reads elsewhere": (offered(lambda run, a, b: run.read(DESC + 16 * SIZE, 4)), "stray read"),
    "no interrupt": (late(offered(lambda run, a, b: run.give_back(b, told=False))), "V034"),
    "an interrupt too many": (offered(lambda run, a, b: (run.give_back(b), run.interrupt())), "V035"),
    "never returned": (late(offered(lambda run, a, b: run.give_back(b))), "V046"),
    "acts after a reset": (offered(lambda run, a, b: (reset(run), run.read(DESC, 16))), "V011"),
    "an interrupt after a reset": (offered(lambda run, a, b: (reset(run), run.interrupt())), "V011"),
    "another vector's data": (offered(lambda run, a, b: run.raw_write(MESSAGES + 0x10, bytes(4))), "PCIe5 6.1.4"),
    "half a message": (offered(lambda run, a, b: run.raw_write(MESSAGES + 0x10, b"\x78\x56")), "PCIe5 6.1.4"),
    "a message and more": (offered(lambda run, a, b: run.raw_write(MESSAGES + 0x10, MESSAGE.to_bytes(8, "little"))), "PCIe5 6.1.4"),
    "beside the messages": (offered(lambda run, a, b: run.raw_write(MESSAGES + 0x20, MESSAGE.to_bytes(4, "little"))), "stray write"),
    "a message elsewhere": (offered(lambda run, a, b: run.raw_write(MESSAGES + 0x1010, MESSAGE.to_bytes(4, "little"))), "stray write"),
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_bad(deed):
    """SIM-RING-2: each thing that a device must not do to a ring or its buffers is found."""
    act, message = DEEDS[deed]
    run = Run(11, status=STATUS)
    run.software(MemoryWrite(STATUS, 1, 15))

    def go():
        act(run)
        run.session.finish()

    with pytest.raises(Difference, match=message):
        go()


def test_out_of_reach():
    """SIM-RING-3: a chain with a buffer that was taken away comes back without being executed; the next one is judged again."""
    run = Run(5)
    head = run.offer([700, -300, -400])
    at = int.from_bytes(run.session.golden.read(run.spa[DESC] + 16 * head, 8), "little")
    page = run.out[head][1][0][0] & ~4095
    run.table.unmap(page)
    run.session.allowed.submitted(IotinvalVma())
    run.session.allowed.fence_completed(run.session.allowed.submitted(IofenceC()))
    run.element(head, 0)
    run.index()
    run.interrupt()
    good = run.offer([64, -64])
    run.give_back(good)
    assert run.checker.comparisons == 2
    assert [head for _, head, *_ in run.checker.finished] == [good]
    assert run.checker.device.unknown == [(run.session.golden.read(run.spa[at & ~4095] + at % 4096, 16), 700)]


def test_moved():
    """SIM-RING-5: the used ring is followed to another page; other functions and interrupts are not this judge's business."""
    run = Run(5)
    run.give_back(run.offer([64, -64]))
    new = SPA + 0x1000 * 0x300
    run.session.memory.write(new, run.session.memory.read(run.spa[USED], 4096))
    run.table.unmap(USED)
    run.session.allowed.submitted(IotinvalVma())
    run.session.allowed.fence_completed(run.session.allowed.submitted(IofenceC()))
    run.spa[USED] = new
    run.table.map_page(USED, new)
    run.give_back(run.offer([64, -64]))
    tlp = memory_write(SPA + 0x1000 * 0x400, b"12345678", requester_id=0x102)
    run.session.take(TlpReceived(run.now, encode(tlp)), tlp)
    assert run.checker.comparisons == 2
    run.session.finish()


def test_endless_chain():
    """SIM-RING-4: a chain that loops is never waited for, and returning it is found."""
    run = Run(5)
    head = run.offer([16, -16], loops=True)
    run.element(head, 0)
    with pytest.raises(Difference, match="although it has no end"):
        run.index()


def test_life():
    """SIM-RING-6: before DRIVER_OK nothing may happen; a reset forgets chains half done; a device that asks for a reset owes nothing."""
    run = Run(5, status=STATUS)
    with pytest.raises(Difference, match=r"V001 of function 1 \[VIRTIO1.4 2.1.2\]"):
        run.read(AVAIL + 2, 2)
    run.software(MemoryWrite(STATUS, 1, 15))
    head = run.offer([16, -64])
    run.write(run.out[head][1][0][0], bytes(40))
    run.element(head, 9)
    reset(run)
    run.store(AVAIL, bytes(4))
    run.avail_index = run.used_index = 0
    run.software(MemoryWrite(STATUS, 1, 15))
    run.give_back(run.offer([16, -16]))
    run.offer([16, -16])
    run.software(MemoryRead(STATUS, 1), result=79)
    run.now += 200
    run.session.take(Note(run.now, "long after"))
    run.session.finish()
    assert run.checker.comparisons == 1


def test_doubtful():
    """SIM-RING-7: a doubtful IN may end in IOERR with right bytes, none, or old ones, never with others; a doubtful OUT leaves doubt."""
    told = []
    device = DoubtfulBlkDevice(8, record=lambda method, arguments: told.append((method, arguments)))
    device.store[:512] = bytes([7]) * 512
    header = bytes(16)
    device.doubtful |= {(0, 0)}
    result, before = device.execute(header, 513), bytes([5]) * 513
    assert not result.problem(before, bytes([7]) * 100 + bytes([5]) * 400 + bytes(12) + b"\1", 0)
    assert "byte 3 is 0x09" in result.problem(before, bytes([7, 7, 7, 9]) + before[4:512] + b"\1", 0)
    assert not result.problem(before, bytes([7]) * 512 + b"\0", 0)
    assert "must be 0x07" in result.problem(before, before[:512] + b"\0", 0)
    device.doubtful |= {(1, 2)}
    assert not device.execute(b"\1" + bytes(7) + b"\2" + bytes(7) + bytes(512), 1).problem(b"\5", b"\1", 0)
    assert device.unknown == {2}
    device.carry_out(b"\1" + bytes(7) + b"\2" + bytes(7) + bytes([3]) * 512)
    assert device.store[1024:1536] == bytes([3]) * 512 and not device.unknown
    device.doubtful.clear()
    again = DoubtfulBlkDevice(8)
    again.store[:512] = bytes([7]) * 512
    for method, arguments in told:
        again.repeat(method, arguments)
    assert (again.store, again.unknown, set(again.doubtful)) == (device.store, set(), set())
    with pytest.raises(ValueError, match="not 'explode'"):
        again.repeat("explode", [])
