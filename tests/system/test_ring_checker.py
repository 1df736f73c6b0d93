"""The judge of a ring: a device that does as the golden one passes in any order and framing; each deed that it must not do is found."""

import random
from dataclasses import dataclass

import pytest

from ringwall.models.events import TlpReceived
from ringwall.models.iommu.commands import IofenceC, IotinvalVma
from ringwall.models.iommu.registers import IommuMode
from ringwall.models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, PageTable
from ringwall.models.tlp import decode, encode, memory_write
from ringwall.sim.ring_checker import RingChecker
from ringwall.sim.scoreboard import Difference
from ringwall.sim.session import Session

SIZE, DESC, AVAIL, USED, BUFFERS = 8, 0x1000, 0x2000, 0x3000, 0x10_0000  # IOVAs
SPA = 0x8000_0000  # where the pages of IOVA 0 on are, in another order


@dataclass
class Result:
    written: bytes | None
    used_len_allowed: range


class Reverse:
    """Golden device: writes what it reads, backwards, as far as there is room; may report any length up to that."""

    def execute(self, readable, writable_len):
        written = readable[::-1][:writable_len]
        return Result(written, range(len(written) + 1))


class Run:
    """A driver and a card that are written here, behind page tables that shuffle the pages."""

    def __init__(self, seed=1, indices=0):
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
        self.checker = RingChecker(session.memory, session.golden, session.allowed, function=1, size=SIZE, desc=DESC, avail=AVAIL,
                                   used=USED, device=Reverse(), free=[[0xFEE0_0000, 0x1000]])  # fmt: skip
        session.board.checkers.append(self.checker)
        session.add("MemoryChecker", free=[[0xFEE0_0000, 0x1000]])
        self.avail_index = self.used_index = indices
        self.checker._avail_index = self.checker._used_index = indices
        self.store(AVAIL + 2, indices.to_bytes(2, "little"))
        self.store(USED + 2, indices.to_bytes(2, "little"))
        self.free, self.out = list(range(SIZE)), {}  # descriptors; head -> (readable bytes, writable [(iova, length)], descriptors)

    def pieces(self, iova, data):
        while data:
            size = min(len(data), 4096 - iova % 4096)
            yield self.spa[iova & ~4095] + iova % 4096, data[:size]
            iova, data = iova + size, data[size:]

    def store(self, iova, data):
        """Software writes."""
        for spa, part in self.pieces(iova, data):
            self.session.memory.write(spa, part)

    def offer(self, lengths):
        """The driver makes a chain of ``lengths`` available, negative ones writable; returns its head."""
        taken = [self.free.pop(self.rng.randrange(len(self.free))) for _ in lengths]
        readable, writable = b"", []
        for n, length in enumerate(lengths):
            iova = BUFFERS + taken[n] * 0x4000 + self.rng.randrange(4096)
            following = taken[n + 1] if n + 1 < len(taken) else 0
            flags = (n + 1 < len(taken)) | (2 if length < 0 else 0)
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
        if not 0xFEE0_0000 <= spa < 0xFEE0_1000:
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

    def give_back(self, head, length=None, data=None):
        written = self.answer(head, data)
        self.element(head, written if length is None else length)
        self.index()
        for descriptor in self.out.pop(head)[2]:
            self.free.append(descriptor)


@pytest.mark.parametrize("indices", [0, 65530])
def test_good(indices):
    """SIM-RING-1: chains of every framing come back in any order, several at once, over the wrap of the indices; all are compared."""
    run = Run(7, indices)
    count = 0
    for _ in range(60):
        while len(run.free) > 2 and run.rng.random() < 0.7:
            run.offer([run.rng.choice([0, 1, 16, 700, 5000, -1, -16, -700, -9000]) for _ in range(run.rng.randrange(1, 4))])
        if not run.out:
            continue
        heads = run.rng.sample(sorted(run.out), run.rng.randrange(1, len(run.out) + 1))
        for head in heads:
            run.element(head, run.answer(head) // 2)
        run.index()
        for head in heads:
            run.free += run.out.pop(head)[2]
        run.raw_write(0xFEE0_0010, b"\1\0\0\0")
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


DEEDS = {
    "wrong byte": (offered(lambda run, a, b: run.give_back(a, data=spoil(run, a))), r"byte 301 of 700 writable bytes differs"),
    "too little": (offered(lambda run, a, b: run.give_back(a, data=run.out[a][0][::-1][:650])), r"byte 650 of 700"),
    "reports too much": (offered(lambda run, a, b: run.give_back(a, 701)), r"used length\n  card:  701"),
    "index before data": (offered(lambda run, a, b: (run.element(a, 0), run.index())), r"byte 0 of 700 writable bytes differs"),
    "index before element": (offered(lambda run, a, b: (run.answer(b), run.index(1))), r"differs|not available"),
    "unknown head": (offered(lambda run, a, b: (run.element(({*range(8)} - {a, b}).pop(), 0), run.index())), "is not available"),
    "head out of range": (offered(lambda run, a, b: (run.element(0x10000 + a, 0), run.index())), f"id {0x10000}|is not available"),
    "twice": (offered(lambda run, a, b: (run.give_back(b), run.element(b, 0), run.index())), "is not available"),
    "index jumps": (offered(lambda run, a, b: run.index(3)), "used index runs ahead\n  card:  from 0 to 3"),
    "index goes back": (offered(lambda run, a, b: (run.give_back(b), run.index(0))), "used index runs ahead\n  card:  from 1 to 0"),
    "writes the available ring": (offered(lambda run, a, b: run.write(AVAIL, b"\1\0")), "write outside of writable buffers"),
    "writes a descriptor": (offered(lambda run, a, b: run.write(DESC, b"\1")), "write outside of writable buffers"),
    "writes a readable buffer": (offered(lambda run, a, b: run.write(BUFFERS + b * 0x4000 + 8, bytes(8))), "write outside of writable"),
    "writes behind a buffer": (offered(lambda run, a, b: run.write(sum(run.out[a][1][0]) - 1, b"12")), "write outside of writable"),
    "writes behind the used ring": (offered(lambda run, a, b: run.write(USED + 6 + 8 * SIZE, b"1")), "write outside of writable"),
    "writes after giving back": (
        offered(lambda run, a, b: (at := run.out[a][1][0][0], run.give_back(a), run.write(at, b"1"))), "write outside of writable"),
    "scribbles unused elements": (
        offered(lambda run, a, b: (run.give_back(b), run.write(USED + 4 + 8 * 5, b"12345678"))), "memory differs"),
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_bad(deed):
    """SIM-RING-2: each thing that a device must not do to a ring or its buffers is found."""
    act, message = DEEDS[deed]
    run = Run(11)

    def go():
        act(run)
        run.session.finish()

    with pytest.raises(Difference, match=message):
        go()


def test_out_of_reach():
    """SIM-RING-3: a chain with a buffer that was taken away comes back without being executed; the next one is judged again."""
    run = Run(5)
    head = run.offer([700, -300, -400])
    page = run.out[head][1][0][0] & ~4095
    run.table.unmap(page)
    run.session.allowed.submitted(IotinvalVma())
    run.session.allowed.fence_completed(run.session.allowed.submitted(IofenceC()))
    run.element(head, 0)
    run.index()
    good = run.offer([64, -64])
    run.give_back(good)
    assert run.checker.comparisons == 2
    assert [head for _, head, *_ in run.checker.finished] == [good]


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
    head = run.offer([16, -16])
    run.store(DESC + 16 * run.out[head][2][1] + 12, bytes([3, 0, head, 0]))
    run.element(head, 0)
    with pytest.raises(Difference, match="used index runs ahead"):
        run.index()
