"""The judge of packed rings: plain devices that do as they may are never blamed, each that errs is blamed for what it does."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import Access, GuestMemory
from ringwall.models.virtio.judge import RULES, Notification, StatusWritten
from ringwall.models.virtio.packed import PackedDriver, PackedMalformed, read_list
from ringwall.models.virtio.packed_rules import PackedDeviceRules
from ringwall.models.virtio.ring import WRITE, Answer

BASE, BUFFERS, SIZE = 0x10000, 0x100000, 7
BOTH = 0x8080  # AVAIL and USED


class Device:
    """A device on one packed ring, written from the specification without a thought of speed; ``bug``: the one thing that it does wrong.

    It reads lists when told, serves them in any order, writes used descriptors in any order once they are begun.
    """

    def __init__(self, memory, layout, rng, *, event_idx=False, indirect=False, in_order=False):
        self.memory, self.layout, self.rng = memory, layout, rng
        self.event_idx, self.indirect, self.in_order, self.bug = event_idx, indirect, in_order, ""
        self.avail = self.used = 0  # turns
        self.taken = []  # lists that are not served yet
        self.is_broken = False  # NEEDS_RESET

    def read(self, address, length):
        return self.memory.read(address, length, source="device")

    def write(self, address, data):
        at = 0
        while at < len(data):
            piece = self.rng.randrange(1, len(data) - at + 1)
            self.memory.write(address + at, data[at : at + piece], source="device")
            at += piece

    def take(self):
        """Read what became available."""
        while not self.is_broken and (chain := read_list(self, self.layout, self.avail, indirect=self.indirect)) is not None:
            if chain.error and not (chain.is_complete and "readable" in chain.error):
                if self.bug == "endless" and chain.head < 0:
                    for _ in range(200):
                        read_list(self, self.layout, self.avail, indirect=self.indirect)
                self.is_broken = True
                return
            self.avail += len(chain.numbers)
            self.taken.append(chain)

    def answer(self, chain, late):
        """Write to a list's buffers; return the length to report."""
        bug, room = self.bug, chain.writable_bytes
        done = room if bug in ("late data", "hole", "length") or self.in_order else self.rng.randrange(room + 1)
        left = done
        for address, length in chain.writable:
            piece = self.rng.randbytes(min(left, length))
            left -= len(piece)
            if bug == "late data":
                late.append((address, piece))
            elif piece:
                skip = bug == "hole" and address == chain.writable[0][0]
                self.write(address + skip, piece[skip:])
        match bug:
            case "writes readable":
                self.memory.write(chain.readable[0][0], b"x", source="device")
            case "reads writable":
                self.read(chain.writable[0][0], 1)
            case "writes its table":
                self.memory.write(chain.table[0], b"x", source="device")
            case "writes behind a buffer":
                self.memory.write(sum(chain.writable[-1]) - 1, b"xy", source="device")
            case "length":
                return room + 1
        return done if self.in_order or bug in ("hole", "late data") or done == 0 else self.rng.randrange(1, done + 1)

    def mark(self, turn, name, length, *, write, swapped=False, flags=BOTH):
        """Write one used descriptor: whole, or its flags last."""
        layout = self.layout
        raw = length.to_bytes(4, "little") + name.to_bytes(2, "little")
        last = ((flags if layout.wrap(turn) else BOTH & ~flags) | (WRITE if write else 0)).to_bytes(2, "little")
        at = layout.descriptor(turn)
        if swapped:
            self.memory.write(at + 14, last, source="device")
            self.memory.write(at + 8, raw, source="device")
        elif self.rng.randrange(2):
            self.memory.write(at, bytes(8) + raw + last, source="device")
        else:
            self.write(at + 8, raw)
            self.memory.write(at + 14, last, source="device")

    def serve(self, count):
        """Serve so many lists: read, answer, publish; with IN_ORDER by one used descriptor."""
        old, bug, late, marks = self.used, self.bug, [], []
        for n in range(count):
            chain = self.taken.pop(0 if self.in_order else self.rng.randrange(len(self.taken)))
            for span in chain.readable:
                self.read(*span)
            length = 0 if bug == "skips unwritten" and n == 0 else self.answer(chain, late)
            marks.append([self.used, chain.head, length, bool(length)])
            self.used += len(chain.numbers)
        last = marks[-1]
        match bug:
            case "wrong id":
                last[1] ^= 0x4000
            case "id of the first descriptor":
                last[1] ^= 0xFFFF
            case "one place on":
                last[0] += 1
            case "WRITE missing":
                last[3] = False
            case "WRITE although nothing was written":
                last[2:] = 0, True
            case "used twice":
                last[1] = marks[0][1]
            case "marks each descriptor":
                marks.insert(0, [last[0] + 1, last[1], 0, False])
        if self.in_order:
            marks = [[old, *last[1:]]]
        if not bug:
            self.rng.shuffle(marks)
        for mark in marks:
            self.mark(*mark[:3], write=mark[3], swapped=bug == "flags first")
        for address, piece in late:
            self.write(address, piece)
        match bug:
            case "touches it again":
                self.memory.write(self.layout.descriptor(last[0]) + 8, bytes(4), source="device")
            case "touches what it skipped":
                self.memory.write(self.layout.descriptor(last[0] + 1), b"x", source="device")
            case "uses what is not available":
                self.mark(self.used, 0, 0, write=False)
            case "writes the driver's event area":
                self.memory.write(self.layout.driver, bytes(4), source="device")
        self.notify(old)

    def notify(self, old):
        event, flags = (int.from_bytes(self.read(self.layout.driver + at, 2), "little") for at in (0, 2))
        wanted = flags != 1
        if flags == 2 and self.event_idx:
            names = {(turn % self.layout.size, 1 - turn // self.layout.size % 2) for turn in range(old, self.used)}
            wanted = (event & 0x7FFF, event >> 15) in names
        if {"never notifies": False, "always notifies": True}.get(self.bug, wanted):
            self.memory.log.append(Notification())


class Bench:
    """A driver, a device and the judge of it on one memory whose log is what happened."""

    def __init__(self, seed=1, *, bug="", size=SIZE, indirect=False, event_idx=False, in_order=False, **rules):
        self.rng = random.Random(seed)
        self.memory = GuestMemory(log=True)
        self.driver = PackedDriver(self.memory, size=size, base=BASE, indirect=indirect, event_idx=event_idx, in_order=in_order,
                                   arrangement="contiguous" if in_order else "scattered", rng=self.rng)  # fmt: skip
        self.device = Device(self.memory, self.driver.layout, self.rng, event_idx=event_idx, indirect=indirect, in_order=in_order)
        self.device.bug = bug
        self.rules = PackedDeviceRules(self.driver.layout, self.memory, indirect=indirect, event_idx=event_idx, in_order=in_order,
                                       **{"granule": 1, **rules})  # fmt: skip
        self.memory.log.clear()

    def spans(self, count):
        """Buffers, each in a page of its own."""
        return [(BUFFERS + 4096 * self.rng.randrange(1 << 20) + self.rng.randrange(64), self.rng.randrange(1, 40)) for _ in range(count)]

    def add(self, readable=1, writable=1, direct=None):
        name = self.driver.add_chain(self.spans(readable), self.spans(writable), direct=direct)
        self.driver.publish()
        return name

    def round(self, count=1):
        """So many lists there and back."""
        for _ in range(count):
            self.add()
        self.device.take()
        self.device.serve(count)

    def broken(self, is_finished=True):
        return self.rules.broken(self.memory.log, is_finished=is_finished)

    def names(self, is_finished=True):
        return {one.rule for one in self.broken(is_finished)}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([1, 2, 3, 7, 16]), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_packed_good_device(seed, size, indirect, event_idx, in_order, data):
    """MODEL-PACKED-RULES-1: a device that does what it may, in any order and any pieces, breaks no rule; the driver gets its lists back
    (V051 to V054, V057 to V062, V064, V066)."""
    bench = Bench(seed, size=size, indirect=indirect, event_idx=event_idx, in_order=in_order)
    returned = added = 0
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["add", "add", "take", "serve", "serve", "poll", "quiet", "loud", "ahead"])):
            case "add" if bench.driver.free_count:
                readable = data.draw(st.integers(0, min(2, bench.driver.free_count)))
                writable = data.draw(st.integers(not readable, min(3, bench.driver.free_count - readable)))
                bench.add(readable, writable, 0 if indirect and data.draw(st.booleans()) else None)
                added += 1
            case "take":
                bench.device.take()
            case "serve" if bench.device.taken:
                bench.device.serve(data.draw(st.integers(1, len(bench.device.taken))))
            case "poll":
                returned += len(bench.driver.poll_used())
            case "quiet":
                bench.driver.disable_interrupts()
            case "loud":
                bench.driver.enable_interrupts()
            case "ahead":
                bench.driver.enable_interrupts(ahead=data.draw(st.integers(0, size)))
    assert bench.broken(is_finished=False) == []
    bench.device.take()
    if bench.device.taken:
        bench.device.serve(len(bench.device.taken))
    returned += len(bench.driver.poll_used())
    assert returned == added
    assert bench.broken() == []


# Bug -> (the rule that must be named, how the bench is made, lists of a round).
BUGS = {
    "writes readable": ("V053", {}, 1),
    "writes its table": ("V053", {"indirect": True}, 1),
    "reads writable": ("V054", {}, 1),
    "uses what is not available": ("V055", {"size": 32}, 1),
    "flags first": ("V056", {}, 1),
    "touches it again": ("V056", {}, 1),
    "touches what it skipped": ("V056", {}, 1),
    "wrong id": ("V058", {}, 1),
    "id of the first descriptor": ("V058", {}, 1),
    "marks each descriptor": ("V058", {}, 1),
    "one place on": ("V046", {}, 1),  # the driver never comes to it
    "used twice": ("used twice", {}, 2),
    "WRITE missing": ("V061", {"in_order": True}, 1),
    "WRITE although nothing was written": ("V061", {"writable": 0}, 1),
    "never notifies": ("V062", {}, 1),
    "late data": ("late data", {}, 1),
    "hole": ("length", {}, 1),
    "length": ("length", {}, 1),
    "skips unwritten": ("V064", {"in_order": True}, 2),
    "writes behind a buffer": ("stray write", {}, 1),
    "writes the driver's event area": ("stray write", {}, 1),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", list(BUGS))
def test_packed_bugs(bug, seed):
    """MODEL-PACKED-RULES-2: each wrong device is blamed for what it does, not before; the same device without the bug is not (V053 to
    V056, V058, V061, V062, V064)."""
    expected, options, count = BUGS[bug]
    options = dict(options)
    writable = options.pop("writable", 1)
    for with_bug in (True, False):
        bench = Bench(seed, **options)
        for n in range(4):
            bench.device.bug = bug if with_bug and n == 3 else ""
            good = len(bench.memory.log)
            for _ in range(count):
                bench.add(1, writable, 0 if options.get("indirect") else None)
            bench.device.take()
            bench.device.serve(count)
            if not bench.device.bug:
                assert len(bench.driver.poll_used()) == count
        if with_bug:
            found = bench.broken()
            assert expected in bench.names()
            assert found[0].event >= good
            assert all(f"[VIRTIO1.4 {RULES[one.rule][1]}]" in str(one) for one in found)
            assert all(one.is_must is (one.rule not in ("V054", "unasked")) for one in found)
        else:
            assert bench.broken() == []


def test_packed_idle():
    """MODEL-PACKED-RULES-3: nothing of a zeroed ring, or of one with the flags of another lap, is available: a device that uses it is
    blamed, one that waits is not (V055)."""
    bench = Bench()
    bench.device.take()
    assert bench.device.taken == []
    bench.device.mark(0, 0, 0, write=False)
    assert [one.rule for one in bench.broken()] == ["V055"]
    bench = Bench()
    bench.driver.add_malformed(PackedMalformed.NOT_AVAILABLE, bench.spans(1), bench.spans(1))
    bench.driver.publish()
    bench.device.take()
    assert bench.device.taken == [] and not bench.device.is_broken
    assert bench.names() == set()


@pytest.mark.parametrize("size, before", [(3, 0), (3, 2), (3, 5), (16, 0), (16, 15), (16, 31)])
@pytest.mark.parametrize("ahead", range(-1, 5))
def test_packed_event_idx(size, before, ahead):
    """MODEL-PACKED-RULES-4: with DESC a notification is owed when the descriptor with that offset and wrap counter is used, alone, in a
    list or in a batch, over the end of the ring, and no other time (V062)."""
    for bug in ("", "never notifies", "always notifies"):
        bench = Bench(event_idx=True, size=size)
        for _ in range(before):
            bench.add(1, 0)
            bench.device.take()
            bench.device.serve(1)
            bench.driver.poll_used()
        layout, event = bench.driver.layout, bench.driver.layout.event(before + ahead) if before + ahead >= 0 else 0x7FFF
        bench.memory.write(layout.driver, event.to_bytes(2, "little") + b"\2\0")
        bench.device.bug = bug
        bench.add(1, 1)
        bench.add(1, 0)
        bench.device.take()
        bench.device.serve(2)
        is_owed = 0 <= ahead < 3
        wrong = {"never notifies": {"V062"} if is_owed else set(), "always notifies": set() if is_owed else {"unasked"}}.get(bug, set())
        assert bench.names() == wrong, (bug, ahead)


def test_packed_notifications():
    """MODEL-PACKED-RULES-5: the driver's event area is judged with its races; values that no driver may write bind no device; a queue
    without a vector has none (V062, V117)."""
    bench = Bench()
    bench.driver.disable_interrupts()
    bench.round()
    assert bench.names() == set()
    bench.memory.log.append(Notification())
    assert [(one.rule, one.is_must) for one in bench.broken()] == [("unasked", False)]
    bench = Bench(bug="never notifies")
    bench.round()
    assert bench.names(is_finished=False) == set()  # it may come yet
    assert bench.names() == {"V062"}
    bench.driver.disable_interrupts()  # the device may have seen either
    assert bench.names() == set()
    for flags, event_idx in ((3, True), (3, False), (2, False)):
        for bug in ("never notifies", "always notifies"):
            bench = Bench(bug=bug, event_idx=event_idx)
            bench.memory.store_uw_le(bench.driver.layout.driver + 2, flags)
            bench.round()
            assert bench.names() == set(), (flags, event_idx, bug)
    bench = Bench(has_vector=False)
    bench.round()
    assert bench.names() == {"V117"}


@pytest.mark.parametrize("event_idx, raw, is_good", [
    (False, "00000000", True), (False, "00000100", True), (False, "00000200", False), (False, "00000300", False),
    (False, "00000400", False), (True, "06800200", True), (True, "07800200", False), (True, "06800100", True), (True, "00000300", False),
    (True, "00000280", False),
])  # fmt: skip
def test_packed_event_area(event_idx, raw, is_good):
    """MODEL-PACKED-RULES-6: what the device may say in its event area: valid flags, DESC with EVENT_IDX and inside the ring, reserved
    bits 0 (V063)."""
    bench = Bench(event_idx=event_idx)
    bench.memory.write(bench.driver.layout.device, bytes.fromhex(raw), source="device")
    assert bench.names() == (set() if is_good else {"V063"})


def test_packed_not_ready():
    """MODEL-PACKED-RULES-7: before DRIVER_OK and after a reset nothing is touched; both wrap counters begin anew (V001, V011, V015)."""
    for event in (Access(BASE, bytes(16), False, "device"), Access(BASE, bytes(16), True, "device"), Notification()):
        bench = Bench(is_ready=False)
        bench.memory.log.append(event)
        assert [one.rule for one in bench.broken(False)] == ["V001"]
        bench.memory.log[-1] = StatusWritten(15)
        bench.round(2)
        bench.memory.log += [StatusWritten(0), event]
        assert [one.rule for one in bench.broken()] == ["V011"]
        bench.memory.log.pop()
        bench.driver.reset()
        bench.memory.log.append(StatusWritten(15))
        bench.device.avail = bench.device.used = 0
        for _ in range(4):
            bench.round()
            bench.driver.poll_used()
        assert bench.names() == set()


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("kind", list(PackedMalformed))
def test_packed_malformed_rules(kind, first):
    """MODEL-PACKED-RULES-8: a device that refuses a malformed ring, or serves what can be served, breaks no rule; one that cannot leave
    it is found by its reads (V031, V059, V067)."""
    for bug in ("", "endless"):
        bench = Bench(indirect=kind.needs_indirect is True, bug=bug)
        for _ in range(first):
            bench.add(0, 1)
            bench.device.take()
            bench.device.serve(1)
            bench.driver.poll_used()
        bench.driver.add_malformed(kind, bench.spans(1), bench.spans(1))
        bench.driver.publish()
        bench.device.take()
        is_served = bool(bench.device.taken)
        if is_served:
            bench.device.serve(1)
        is_endless = bug and kind in (PackedMalformed.LIST_TOO_LONG, PackedMalformed.LIST_OPEN)
        assert bench.names() == ({"V067"} if is_endless else set())
        assert (Answer.SERVED if is_served else Answer.REFUSED if bench.device.is_broken else Answer.IDLE) in kind.allowed


def test_packed_out_of_order():
    """MODEL-PACKED-RULES-9: used descriptors behind one that is begun may be written first, the first buffer of a request last; nothing
    counts before the driver comes to it (V052, V065)."""
    bench = Bench(bug="never notifies")
    names = [bench.add(0, 1) for _ in range(3)]
    bench.driver.disable_interrupts()
    bench.device.take()
    for turn in (2, 1):
        bench.device.mark(turn, names[turn], 0, write=False)
        assert bench.rules.broken(bench.memory.log) == []
        assert {one.rule for one in bench.broken()} == {"V046"}
    bench.device.mark(0, names[0], 0, write=False)
    assert bench.names() == set()
    assert [name for name, _ in bench.driver.poll_used()] == names


def test_packed_open_list():
    """MODEL-PACKED-RULES-10: a device that waits for the rest of a list without an end may take the next list for it (V067)."""
    bench = Bench(size=16)
    bench.driver.add_malformed(PackedMalformed.LIST_OPEN, bench.spans(1), bench.spans(1))
    bench.driver.publish()
    assert read_list(bench.device, bench.device.layout, 0).head == -1
    bench.add(0, 2)
    bench.device.take()
    [chain] = bench.device.taken
    assert len(chain.numbers) == 4
    bench.device.serve(1)
    assert bench.names() - {"unasked"} == set()
