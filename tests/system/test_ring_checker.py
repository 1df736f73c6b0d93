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
from ringwall.models.virtio.driver import FIELDS, OPTIONAL_FIELDS, Feature
from ringwall.models.virtio.packed import PackedMalformed
from ringwall.models.virtio.split import Malformed
from ringwall.models.virtio.virtqueue import make_ring
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

    def __init__(self, seed=1, indices=0, size=SIZE, **options):
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
        self.checker = RingChecker(session.memory, session.golden, session.allowed, function=1, size=size, desc=DESC, avail=AVAIL,
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
        readable, writable, *_ = self.out[head]
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


class RingRun(Run):
    """A ring of either kind with any features, the driver's side from the models, and a card that is written here."""

    def __init__(self, *features, seed=1):
        bits = sum(1 << bit for bit in features)
        self.is_packed = Feature.RING_PACKED in features
        super().__init__(seed, size=7 if self.is_packed else SIZE, features=bits, status=STATUS)
        self.ring = make_ring(self.Iovas(self), bits, size=7 if self.is_packed else SIZE, addresses=(DESC, AVAIL, USED), tables=0x8003)
        self.places = list(range(64))  # of buffers
        self.turn = 0
        self.software(MemoryWrite(STATUS, 1, 15))

    @dataclass
    class Iovas:
        """Memory as the driver has it."""

        run: Run

        def read(self, address, length):
            return b"".join(self.run.session.golden.read(spa, len(part)) for spa, part in self.run.pieces(address, bytes(length)))

        def write(self, address, data):
            self.run.store(address, data)

    def spans(self, lengths):
        """Return buffers, readable and writable ones, and what the first hold."""
        spans = []
        for length in lengths:
            place = self.places.pop(self.rng.randrange(len(self.places)))
            spans.append((BUFFERS + place * 0x4000 + self.rng.randrange(4096), abs(length)))
            self.store(spans[-1][0], self.rng.randbytes(abs(length)))
        count = sum(length >= 0 for length in lengths)
        return spans[:count], spans[count:], b"".join(self.ring.memory.read(*span) for span in spans[:count])

    def offer(self, lengths, *, direct=None):
        """The driver makes a chain of ``lengths`` available, negative ones writable."""
        readable, writable, sent = self.spans(lengths)
        free = self.ring.free_count
        name = self.ring.add_chain(readable, writable, direct=direct)
        self.ring.publish()
        self.out[name] = sent, writable, free - self.ring.free_count, readable
        return name

    def take_back(self, name):
        """The driver has a chain back; returns how many descriptors it had."""
        _, writable, slots, readable = self.out.pop(name)
        self.places += [(address - BUFFERS) // 0x4000 for address, _ in readable + writable]
        return slots

    def mark(self, name, length=0, *, turn=None, write=None, flags=None):
        """The card writes a used descriptor."""
        turn = self.turn if turn is None else turn
        last = (0x8080 if turn // 7 % 2 == 0 else 0) | 2 * bool(length if write is None else write) if flags is None else flags
        raw = bytes(8) + length.to_bytes(4, "little") + name.to_bytes(2, "little") + last.to_bytes(2, "little")
        self.write(DESC + 16 * (turn % 7), raw)

    def publish(self, name, length, steps=1):
        """The card returns a chain, and the ``steps - 1`` in front of it in the same batch."""
        if self.is_packed:
            self.mark(name, length)
            batch = list(self.out)[:steps] if steps > 1 else [name]
            self.turn += sum(self.out[one][2] for one in batch)
        else:
            self.write(USED + 4 + 8 * (self.used_index % SIZE), name.to_bytes(4, "little") + length.to_bytes(4, "little"))
            self.used_index += steps
            self.index(self.used_index & 0xFFFF)

    def give_back(self, name, length=None, data=None, told=True):
        written = self.answer(name, data)
        self.publish(name, written if length is None else length)
        self.take_back(name)
        if told:
            self.interrupt()

    def register(self, name, value):
        offset, size = (FIELDS | OPTIONAL_FIELDS)[name]
        for low in range(0, size, 4):
            self.software(MemoryWrite(STATUS - 0x14 + offset + low, min(size, 4), value >> 8 * low & 0xFFFF_FFFF))

    def reset_queue(self):
        self.register("queue_select", 0)
        self.register("queue_reset", 1)
        self.software(MemoryRead(STATUS - 0x14 + 0x3A, 2), result=0)


PACKED, INDIRECT, EVENT, ORDER = Feature.RING_PACKED, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER
KINDS = [[bit for n, bit in enumerate((PACKED, INDIRECT, EVENT, ORDER)) if mask >> n & 1] for mask in range(16)]


@pytest.mark.parametrize("features", KINDS, ids=lambda bits: "+".join(bit.name for bit in bits) or "none")
def test_good_kinds(features):
    """SIM-RING-8: rings of either kind, with tables, event index and in-order use in every combination: chains come back as they may, all
    are compared, interrupts come when they are asked for (V029, V030, V033, V036 to V038, V049, V050, V057 to V062, V064)."""
    run = RingRun(*features, seed=5)
    count = 0
    for _ in range(40):
        while run.ring.free_count > 2 and run.rng.random() < 0.7:
            lengths = [run.rng.choice([1, 16, 700, -1, -16, -700, -5000]) for _ in range(run.rng.randrange(1, 4))]
            run.offer(sorted(lengths, reverse=True), direct=0 if INDIRECT in features and run.rng.random() < 0.5 else None)
        if not run.out:
            continue
        ahead = run.rng.randrange(3) if EVENT in features else 0
        run.ring.enable_interrupts(ahead=ahead)
        names = list(run.out)[: run.rng.randrange(1, len(run.out) + 1)]
        if ORDER not in features:
            run.rng.shuffle(names)
        lengths = [run.answer(name) for name in names]
        are_whole = all(length == sum(size for _, size in run.out[name][1]) for name, length in zip(names[:-1], lengths))
        if ORDER in features and are_whole:
            run.publish(names[-1], lengths[-1], len(names))
        else:
            for name, length in zip(names, lengths):
                run.publish(name, length)
        slots = [run.take_back(name) for name in names]
        if ahead < (sum(slots) if run.is_packed else len(slots)):
            run.interrupt()
        assert sorted(name for name, _ in run.ring.poll_used()) == sorted(names)
        count += len(names)
    run.session.finish()
    assert run.checker.comparisons == len(run.checker.finished) == count > 40


def kind(*features):
    """Return what makes a deed of ``act(run, a, b)`` on such a ring, with two chains on offer: 0 of 700 bytes each way, 1 of 20 to read."""
    def made(act):
        def go(run):
            tables = 0 if INDIRECT in features else None
            act(run, run.offer([700, -300, -400], direct=tables), run.offer([20], direct=tables))

        return features, go

    return made


packed, split = kind(PACKED), kind()


def malformed(mistake, *features):
    """Return a deed: the card does not leave a ring that is wrong."""
    def go(run):
        run.ring.add_malformed(mistake, *run.spans([16, -16])[:2])
        run.ring.publish()
        for _ in range(100):
            run.read(DESC, 64)

    return features, go


def wish(act, ahead):
    """Return a deed on a ring whose driver wants to hear of the chain or descriptor ``ahead``."""
    def go(run, a, b):
        run.ring.enable_interrupts(ahead=ahead)
        act(run, a, b)

    return go


def late_deed(deed):
    features, act = deed
    return features, late(act)


KIND_DEEDS = {
    "packed: wrong byte": (packed(lambda run, a, b: run.give_back(a, data=spoil(run, a))), "byte 301 of 700 differs"),
    "packed: writes a readable buffer": (packed(lambda run, a, b: run.write(run.out[b][3][0][0], bytes(8))), r"V053.*2\.8\.15"),
    "packed: writes a table": (kind(PACKED, INDIRECT)(lambda run, a, b: run.write(0x8003, bytes(8))), "V053"),
    "packed: reads what is writable": (packed(lambda run, a, b: run.read(run.out[a][1][0][0], 64)), "V054"),
    "packed: uses what is not available": (packed(lambda run, a, b: run.mark(b, turn=4)), "V055"),
    "packed: changes what it used": (packed(lambda run, a, b: (run.give_back(a), run.write(DESC, bytes(4)))), "V056"),
    "packed: changes what it skipped": (packed(lambda run, a, b: (run.give_back(a), run.write(DESC + 32, bytes(4)))), "V056"),
    "packed: unknown ID": (packed(lambda run, a, b: run.mark(0x55)), "V058"),
    "packed: same ID twice": (packed(lambda run, a, b: (run.give_back(b), run.mark(b))), "used twice"),
    "packed: one used descriptor each": (packed(lambda run, a, b: (run.mark(a, turn=1), run.give_back(a))), "V058"),
    "packed: WRITE missing": (packed(lambda run, a, b: (run.answer(a), run.mark(a))), "V061"),
    "packed: WRITE and nothing written": (packed(lambda run, a, b: run.mark(b, write=True)), "V061"),
    "packed: reports too much": (packed(lambda run, a, b: (run.give_back(a, 701), reset(run))), "length of function 1"),
    "packed: data late": (packed(lambda run, a, b: (run.mark(a, 700), run.answer(a))), "V061|byte 0 of 700 differs"),
    "packed: no interrupt": (late_deed(packed(lambda run, a, b: (run.give_back(a, told=False), run.give_back(b, told=False)))), "V062"),
    "packed: an interrupt too many": (packed(lambda run, a, b: (run.give_back(b), run.interrupt())), "unasked"),
    "packed: interrupt at the wrong descriptor": (
        kind(PACKED, EVENT)(wish(lambda run, a, b: run.give_back(a), 3)), "unasked"),
    "packed: none at the right one": (
        late_deed(kind(PACKED, EVENT)(wish(lambda run, a, b: (run.give_back(a, told=False), run.give_back(b, told=False)), 2))), "V062"),
    "packed: DESC without the feature": (packed(lambda run, a, b: run.write(USED, b"\0\0\2\0")), "V063"),
    "packed: reserved bits": (kind(PACKED, EVENT)(lambda run, a, b: run.write(USED + 2, b"\2\1")), "V063"),
    "packed: out of order": (kind(PACKED, ORDER)(lambda run, a, b: (run.publish(b, 0, 2), reset(run))), "byte 0 of 700 differs|V064"),
    "packed: writes the driver's area": (packed(lambda run, a, b: run.write(AVAIL, bytes(4))), "stray write"),
    "packed: reads elsewhere": (packed(lambda run, a, b: run.read(DESC + 16 * 7, 4)), "stray read"),
    "packed: never returned": (late_deed(packed(lambda run, a, b: run.give_back(b))), "V046"),
    "packed: does not leave a list": (malformed(PackedMalformed.LIST_TOO_LONG, PACKED), "V067"),
    "packed: acts after a reset": (packed(lambda run, a, b: (reset(run), run.read(DESC, 16))), "V011"),
    "split: does not leave a loop": (malformed(Malformed.LOOP), "V032"),
    "split: writes a table": (kind(INDIRECT)(lambda run, a, b: run.write(0x8003, bytes(8))), "V026"),
    "split: no interrupt at used_event": (
        late_deed(kind(EVENT)(wish(lambda run, a, b: (run.give_back(a, told=False), run.give_back(b, told=False)), 1))), "V037"),
    "split: interrupt before used_event": (kind(EVENT)(wish(lambda run, a, b: run.give_back(a), 1)), "V038"),
    "split: flags with EVENT_IDX": (kind(EVENT)(lambda run, a, b: run.write(USED, b"\1\0")), "V044"),
    "split: avail_event without the feature": (split(lambda run, a, b: run.write(USED + 4 + 8 * SIZE, b"\1\0")), "stray write"),
    "split: out of order": (kind(ORDER)(lambda run, a, b: run.publish(b, 0)), "V049"),
    "split: skips what it did not write": (
        kind(ORDER)(lambda run, a, b: (run.answer(a, run.out[a][0][::-1][:650]), run.publish(b, 0, 2))), "byte 650 of 700 differs|V050"),
    "split: acts after the reset of its queue": (split(lambda run, a, b: (run.reset_queue(), run.read(DESC, 16))), "V014"),
    "packed: interrupts after the reset of its queue": (packed(lambda run, a, b: (run.reset_queue(), run.interrupt())), "V014"),
    "split: acts while suspended": (split(lambda run, a, b: (suspend(run), run.read(AVAIL, 4))), "V019"),
    "packed: interrupts while suspended": (packed(lambda run, a, b: (suspend(run), run.interrupt())), "V019"),
    "split: suspended before its interrupts": (split(lambda run, a, b: (run.give_back(b, told=False), suspend(run))), "V023"),
}  # fmt: skip


def suspend(run):
    run.software(MemoryWrite(STATUS, 1, 31))
    run.software(MemoryRead(STATUS, 1), result=27)


@pytest.mark.parametrize("deed", KIND_DEEDS)
def test_bad_kinds(deed):
    """SIM-RING-9: each thing that a device must not do to a packed ring, with tables, event index, in-order use, to a queue that was reset
    or a device that is suspended is found (V014, V019, V023, V026, V032, V037, V038, V044, V049, V050, V053 to V056, V058, V061 to V064,
    V067)."""
    (features, act), message = KIND_DEEDS[deed]
    run = RingRun(*features)

    def go():
        act(run)
        run.session.finish()

    with pytest.raises(Difference, match=message):
        go()


@pytest.mark.parametrize("is_packed", [False, True])
def test_queue_life(is_packed):
    """SIM-RING-10: a queue is reset with chains half done and enabled elsewhere, smaller, from its first index on; a device is suspended
    and resumed: each chain is judged (V014 to V016, V019)."""
    run = RingRun(*([PACKED] if is_packed else []))
    for _ in range(3):
        run.give_back(run.offer([16, -64]))
        run.ring.poll_used()
    suspend(run)
    half = run.offer([16, -64])
    run.software(MemoryWrite(STATUS, 1, 31))
    run.write(run.out[half][1][0][0], bytes(40))
    run.reset_queue()
    del run.out[half]
    ring = make_ring(run.ring.memory, run.checker.features, size=7 if is_packed else 4, addresses=(DESC + 0x800, AVAIL + 0x800, USED))
    for name, value in (("queue_size", ring.layout.size), ("queue_desc", DESC + 0x800), ("queue_driver", AVAIL + 0x800),
                        ("queue_device", USED), ("queue_enable", 1)):  # fmt: skip
        run.register(name, value)
    run.ring, before = ring, run.checker.comparisons
    assert before == 3
    name = run.offer([16, -64])
    data = run.out[name][0][::-1]
    run.write(run.out[name][1][0][0], data)
    if is_packed:
        run.write(DESC + 0x800, bytes(8) + (16).to_bytes(4, "little") + name.to_bytes(2, "little") + b"\x82\x80")
    else:
        run.write(USED + 4, name.to_bytes(4, "little") + (16).to_bytes(4, "little"))
        run.index(1)
    run.interrupt()
    assert ring.poll_used() == [(name, 16)]
    run.session.finish()
    assert run.checker.comparisons == 4
