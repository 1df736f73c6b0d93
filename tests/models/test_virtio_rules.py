"""The judge of split rings: plain devices that do as they may are never blamed, each that errs is blamed for what it does."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import Access, GuestMemory
from ringwall.models.virtio.judge import QueueEnabled, QueueReset, Suspended
from ringwall.models.virtio.rules import RULES, Broken, Notification, SplitDeviceRules, StatusWritten
from ringwall.models.virtio.split import Malformed, SplitDriver, read_chain

BASE, BUFFERS, SIZE = 0x10000, 0x100000, 16


class Device:
    """A device on one split ring, written from the specification without a thought of speed.

    It reads chains when told, serves them in any order, cuts its accesses as ``rng`` likes, and answers each chain with the
    bytes of ``answer(readable, room)``. ``bug``: the one thing that it does wrong.
    """

    def __init__(self, memory, layout, rng, *, event_idx=False, indirect=False, in_order=False, bug="", first=0):
        self.memory, self.layout, self.rng, self.event_idx, self.indirect, self.bug = memory, layout, rng, event_idx, indirect, bug
        self.in_order, self.batches = in_order, False
        self.avail = self.used = first
        self.taken = []  # chains that are not served yet
        self.is_broken = False  # NEEDS_RESET

    def read(self, address, length):
        data, at = b"", address
        while at < address + length:
            piece = self.rng.randrange(1, address + length - at + 1)
            data += self.memory.read(at, piece, source="device")
            at += piece
        return data

    def write(self, address, data):
        at = 0
        while at < len(data):
            piece = self.rng.randrange(1, len(data) - at + 1)
            self.memory.write(address + at, data[at : at + piece], source="device")
            at += piece

    def word(self, address):
        return int.from_bytes(self.memory.read(address, 2, source="device"), "little")

    def take(self):
        """Read what became available."""
        index = self.word(self.layout.avail_idx)
        if self.is_broken or index - self.avail & 0xFFFF > self.layout.size:
            self.is_broken = True
            return
        while self.avail != index:
            head = self.word(self.layout.avail_slot(self.avail))
            self.avail = self.avail + 1 & 0xFFFF
            if head >= self.layout.size:
                if self.bug == "head unchecked":
                    self.read(self.layout.descriptor(head), 16)
                self.is_broken = True
                return
            chain = read_chain(self, self.layout, head, indirect=self.indirect)
            if self.bug == "next unchecked" and chain.beyond is not None:
                self.read(chain.beyond, 16)
            if chain.error and not (chain.is_complete and "readable" in chain.error):
                self.is_broken = True
                return
            self.taken.append(chain)

    def serve(self, count):
        """Serve so many chains, and publish them with one write of the index."""
        if self.is_broken or not count:
            return
        old, bug = self.used, self.bug
        elements, late = [], []
        for _ in range(count):
            is_first = self.in_order and bug != "not in order"
            chain = self.taken.pop(0 if is_first else -1 if self.in_order else self.rng.randrange(len(self.taken)))
            data = b"".join(self.read(*span) for span in chain.readable)
            if bug == "reads writable":
                self.read(*chain.writable[0])
            length = self.answer(chain, data, late)
            head = chain.head
            if bug == "wrong id":
                head = next(n for n in range(self.layout.size) if n not in {one.head for one in [chain, *self.taken]})
            if bug == "id of 32 bits":
                head |= 0x10000
            elements.append((head, length))
        if self.in_order and self.batches:
            elements = elements[-1:]
        if bug == "used twice":
            elements[1] = elements[0]
        raw = [head.to_bytes(4, "little") + length.to_bytes(4, "little") for head, length in elements]
        self.used = self.used + count & 0xFFFF
        if bug == "index and element at once":
            at = self.layout.used_idx
            self.memory.write(at, self.used.to_bytes(2, "little") + raw[0], source="device")
        elif bug == "element late":
            self.publish()
            self.elements(old, raw)
        elif bug == "element missing":
            self.elements(old, raw[:-1])
            self.publish()
        elif bug == "element in the wrong slot":
            self.elements(old + 1, raw)
            self.publish()
        else:
            self.elements(old, raw)
            self.publish()
        for address, piece in late:
            self.write(address, piece)
        if bug == "flags":
            self.memory.write(self.layout.used, b"\2\0", source="device")
        if bug == "flags with EVENT_IDX":
            self.memory.write(self.layout.used, b"\1\0", source="device")
        if bug == "avail_event without the feature":
            self.memory.write(self.layout.avail_event, b"\1\0", source="device")
        self.notify(old)

    def answer(self, chain, data, late):
        """Write what the chain asks for; return the length to report."""
        bug, room = self.bug, chain.writable_bytes
        is_whole = bug in ("over-report", "len too large", "late data", "hole") or (self.in_order and bug != "skips unwritten")
        done = room if is_whole else self.rng.randrange(max(room, 1)) if self.in_order else self.rng.randrange(room + 1)
        left, skip = done, bug == "hole"
        for address, length in chain.writable:
            piece = bytes(self.rng.randrange(256) for _ in range(min(left, length)))
            left -= len(piece)
            if skip and piece:
                piece, address, skip = piece[1:], address + 1, False
            if bug == "late data":
                late.append((address, piece))
            else:
                self.write(address, piece)
        if bug == "writes readable":
            self.memory.write(chain.readable[0][0], b"x", source="device")
        if bug == "writes a descriptor":
            self.memory.write(self.layout.descriptor(chain.head) + 8, bytes(4), source="device")
        if bug == "writes the available ring":
            self.memory.write(self.layout.avail, b"\0", source="device")
        if bug == "writes behind a buffer":
            address, length = chain.writable[-1]
            self.memory.write(address + length - 1, b"xy", source="device")
        if bug == "reads behind a buffer":
            address, length = chain.readable[-1]
            self.read((address + length + 3) // 4 * 4, 4)
        if bug == "writes its table":
            self.memory.write(chain.table[0], b"x", source="device")
        if bug == "len too large":
            return room + 1
        if bug == "over-report":
            return 0 if not chain.writable else room + 1
        return done if bug in ("hole", "late data") else self.rng.randrange(done + 1)

    def elements(self, index, raw):
        for n in self.rng.sample(range(len(raw)), len(raw)):
            self.write(self.layout.used_slot(index + n), raw[n])

    def publish(self):
        step = {"index runs ahead": 5, "index goes back": -2}.get(self.bug, 0)
        self.memory.write(self.layout.used_idx, (self.used + step & 0xFFFF).to_bytes(2, "little"), source="device")

    def notify(self, old):
        if self.event_idx:
            event = self.word(self.layout.used_event)
            wanted = event - old & 0xFFFF < (self.used - old & 0xFFFF)
            if self.bug == "heeds flags with EVENT_IDX" and self.word(self.layout.avail) & 1:
                wanted = False
        else:
            wanted = not self.word(self.layout.avail) & 1
            if self.bug == "heeds used_event without the feature":
                wanted = wanted and self.word(self.layout.used_event) == old
        if {"never notifies": False, "always notifies": True}.get(self.bug, wanted):
            self.memory.log.append(Notification())


class Bench:
    """A driver, a device and the judge of it on one memory whose log is what happened."""

    def __init__(self, seed=1, *, bug="", size=SIZE, indirect=False, event_idx=False, in_order=False, index=0, arrangement="scattered",
                 addresses=None, **rules):  # fmt: skip
        self.rng = random.Random(seed)
        self.memory = GuestMemory(log=True)
        self.driver = SplitDriver(self.memory, size=size, base=None if addresses else BASE, addresses=addresses, indirect=indirect,
                                  event_idx=event_idx, in_order=in_order, index=index,
                                  arrangement="contiguous" if in_order else arrangement, rng=self.rng)  # fmt: skip
        self.device = Device(self.memory, self.driver.layout, self.rng, event_idx=event_idx, indirect=indirect, in_order=in_order, bug=bug,
                             first=index)  # fmt: skip
        self.rules = SplitDeviceRules(self.driver.layout, self.memory, indirect=indirect, event_idx=event_idx, in_order=in_order,
                                      index=index, **{"granule": 1, **rules})  # fmt: skip
        self.before = self.memory.snapshot()
        self.memory.log.clear()

    def spans(self, count):
        """Buffers, each in a page of its own."""
        return [(BUFFERS + 4096 * self.rng.randrange(1 << 20) + self.rng.randrange(64), self.rng.randrange(1, 40)) for _ in range(count)]

    def add(self, readable=1, writable=2, direct=None):
        head = self.driver.add_chain(self.spans(readable), self.spans(writable), direct=direct)
        self.driver.publish()
        return head

    def round(self, count=1):
        """So many chains there and back."""
        for _ in range(count):
            self.add()
        self.device.take()
        self.device.serve(count)

    def broken(self, is_finished=True):
        return self.rules.broken(self.memory.log, is_finished=is_finished)

    def names(self, is_finished=True):
        return {one.rule for one in self.broken(is_finished)}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans(), st.booleans(), st.sampled_from([0, 65533]), st.data())
def test_rules_good_device(seed, indirect, event_idx, index, data):
    """MODEL-RULES-1: a device that does what it may, in any order and any pieces, breaks no rule; the driver gets its chains back
    (V024, V026 to V030, V033, V034, V036 to V043, V045)."""
    bench = Bench(seed, indirect=indirect, event_idx=event_idx, index=index)
    returned = added = 0
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["add", "add", "take", "serve", "serve", "poll", "quiet", "loud"])):
            case "add" if bench.driver.free_count >= 4:
                bench.add(data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2)), 0 if indirect and data.draw(st.booleans()) else None)
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
    assert bench.broken(is_finished=False) == []
    bench.device.take()
    bench.device.serve(len(bench.device.taken))
    returned += len(bench.driver.poll_used())
    assert returned == added
    assert bench.broken() == []
    assert bench.before.differences(bench.rules.memory) == []  # judging changes nothing


# Bug -> (rules that must be named, how the bench is made).
BUGS = {
    "writes readable": ({"V026"}, {}),
    "writes its table": ({"V026"}, {"indirect": True}),
    "reads writable": ({"V027"}, {}),
    "writes a descriptor": ({"V028"}, {}),
    "never notifies": ({"V034"}, {}),
    "heeds used_event without the feature": ({"V034"}, {}),
    "element late": ({"V039"}, {}),
    "element missing": ({"V039"}, {}),
    "element in the wrong slot": ({"V039"}, {}),
    "index and element at once": ({"V039"}, {}),
    "late data": ({"V040"}, {}),
    "over-report": ({"V041"}, {}),
    "len too large": ({"V041"}, {}),
    "hole": ({"V041"}, {}),
    "wrong id": ({"V042"}, {}),
    "id of 32 bits": ({"V042"}, {}),
    "flags": ({"V043"}, {}),
    "flags with EVENT_IDX": ({"V044"}, {"event_idx": True}),
    "avail_event without the feature": ({"stray write"}, {}),
    "writes the available ring": ({"stray write"}, {}),
    "writes behind a buffer": ({"stray write"}, {}),
    "reads behind a buffer": ({"stray read"}, {}),
    "index runs ahead": ({"used index"}, {}),
    "index goes back": ({"used index"}, {}),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bug", list(BUGS))
def test_rules_bugs(bug, seed):
    """MODEL-RULES-2: each wrong device is blamed for what it does, at the event where it did it; the same device without the bug is
    not (V026 to V028, V034, V039 to V044)."""
    expected, options = BUGS[bug]
    for with_bug in (True, False):
        bench = Bench(seed, **options)
        for n in range(3):
            bench.device.bug = bug if with_bug and n == 1 else ""
            bench.driver.memory.write(bench.driver.layout.used_event, bytes([77, 0]) if not options.get("event_idx") else bytes([n, 0]))
            bench.add(2, 2, 0 if options.get("indirect") else None)
            bench.device.take()
            bench.device.serve(1)
            if bench.device.bug:
                break
            good = len(bench.memory.log)
            bench.driver.poll_used()
        if with_bug:
            assert expected <= bench.names()
            first = bench.broken()[0]
            assert first.rule in expected
            assert first.event >= good
            assert first.is_must is (first.rule != "V027")
            assert first.event <= len(bench.memory.log)
            assert f"[VIRTIO1.4 {RULES[first.rule][1]}]" in str(first)
        else:
            assert bench.broken() == []


def test_rules_used_twice():
    """MODEL-RULES-3: a chain that is returned a second time, at once or later, is named (V042)."""
    bench = Bench(bug="used twice")
    bench.round(2)
    assert "used twice" in bench.names()
    bench = Bench()
    bench.round(1)
    head = bench.driver.poll_used()[0][0]
    bench.add()
    other = bench.driver.outstanding[0]
    bench.device.take()
    assert head != other
    bench.device.taken[0] = read_chain(bench.memory.snapshot(), bench.driver.layout, head)
    bench.device.answer = lambda chain, data, late: 0
    bench.memory.log.append(StatusWritten(15))  # a status that changes nothing
    bench.device.serve(1)
    assert "used twice" in bench.names()


def test_rules_notifications():
    """MODEL-RULES-4: flags are judged with their races: a must only while asked for all the time, too many only if never asked for
    (V034, V035)."""
    bench = Bench()
    bench.driver.disable_interrupts()
    bench.round()
    assert bench.names() == set()
    bench.memory.log.append(Notification())
    assert [(one.rule, one.event, one.is_must) for one in bench.broken()] == [("V035", len(bench.memory.log) - 1, False)]
    bench = Bench(bug="never notifies")
    bench.round()
    assert bench.names(is_finished=False) == set()  # it may come yet
    assert bench.names() == {"V034"}
    bench.driver.disable_interrupts()  # the device may have seen either
    assert bench.names() == set()
    bench.memory.log.append(Notification())
    assert bench.names() == set()
    bench.memory.log.append(Notification())
    assert bench.names() == {"V035"}
    bench = Bench(bug="never notifies")
    for _ in range(3):
        bench.round()
    bench.memory.log.append(Notification())  # one for three
    assert bench.names() == set()
    bench.memory.log += [Notification(), Notification()]  # or one for each
    assert bench.names() == set()
    bench.memory.log.append(Notification())
    assert bench.names() == {"V035"}
    bench = Bench()
    bench.memory.log.append(Notification())  # nothing was used
    assert bench.names() == {"V035"}
    bench = Bench(has_vector=False)
    bench.round()
    assert bench.names() == {"V117"}
    bench = Bench(has_vector=False, bug="never notifies")
    bench.round()
    assert bench.names() == set()


@pytest.mark.parametrize("index", [0, 65534, 65535])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("event", range(-2, 5))
def test_rules_event_idx(index, batch, event):
    """MODEL-RULES-5: with EVENT_IDX a notification is owed when the element at used_event is filled, by whatever batch, over the
    wrap, and flags say nothing (V036 to V038)."""
    for bug, rule in (("", set()), ("never notifies", {"V037"}), ("always notifies", {"V038"}),
                      ("heeds flags with EVENT_IDX", {"V037"})):  # fmt: skip
        bench = Bench(event_idx=True, index=index, bug=bug)
        bench.memory.store_uw_le(bench.driver.layout.used_event, index + event & 0xFFFF)
        if bug == "heeds flags with EVENT_IDX":
            bench.memory.store_uw_le(bench.driver.layout.avail, 1)
        bench.round(batch)
        is_owed = 0 <= event < batch
        assert bench.names() == (rule if (rule == {"V038"}) is not is_owed else set()), bug


@pytest.mark.parametrize("index", [0, 65534])
def test_rules_not_ready(index):
    """MODEL-RULES-6: before DRIVER_OK and after a reset nothing is touched or notified, but what belongs to others (V001, V011)."""
    for event in (Access(BASE, bytes(16), False, "device"), Access(BUFFERS, b"x", True, "device"), Notification()):
        bench = Bench(is_ready=False, index=index, allowed=[(0x9000, 16)])
        bench.add()
        bench.memory.log += [StatusWritten(1), StatusWritten(3), StatusWritten(11), Access(0x9004, b"x", True, "device"), event]
        assert [(one.rule, one.event) for one in bench.broken(False)] == [("V001", len(bench.memory.log) - 1)]
        bench.memory.log[-1] = StatusWritten(15)
        bench.device.take()
        bench.device.serve(1)
        bench.driver.poll_used()
        assert bench.names() == set()
        bench.memory.log += [StatusWritten(0), event]
        assert [(one.rule, one.event) for one in bench.broken()] == [("V011", len(bench.memory.log) - 1)]
        bench.memory.log.pop()
        bench.driver.reset()
        bench.memory.log += [StatusWritten(11), StatusWritten(15)]
        bench.device.avail = bench.device.used = 0
        bench.round(3)
        assert bench.names() == set()


def test_rules_lost():
    """MODEL-RULES-7: a chain that never comes back is named at the end, unless the driver broke the ring (V046)."""
    bench = Bench()
    one, two, three = bench.add(), bench.add(), bench.add()
    bench.device.take()
    bench.device.serve(1)
    [(back, _)] = bench.driver.poll_used()
    assert bench.names(is_finished=False) == set()
    [found] = bench.broken()
    assert found == Broken("V046", len(bench.memory.log), f"chains {sorted({one, two, three} - {back})} never came back")
    bench.driver.add_malformed(Malformed.SELF_LOOP, bench.spans(1))
    bench.driver.publish()
    assert bench.names() == set()


@pytest.mark.parametrize("kind", list(Malformed))
def test_rules_malformed(kind):
    """MODEL-RULES-8: a device that refuses a malformed ring, or serves what can be served, breaks no rule; what it had before is
    judged as ever (V031, V032, V047, V048)."""
    bench = Bench(indirect=kind.needs_indirect is True)
    bench.round(2)
    bench.driver.poll_used()
    readable, writable = bench.spans(1), bench.spans(1)
    bench.driver.add_malformed(kind, readable, writable)
    bench.driver.publish()
    bench.device.take()
    bench.device.serve(min(len(bench.device.taken), 1))
    assert bench.names() == set()
    # One that goes on with what it cannot know is found.
    head = bench.memory.load_uw_le(bench.driver.layout.avail_slot(bench.driver.avail_index - 1))
    if kind in (Malformed.AVAIL_JUMP, Malformed.HEAD_OUT_OF_RANGE):
        used = bench.device.used
        bench.device.write(bench.driver.layout.used_slot(used), head.to_bytes(4, "little") + bytes(4))
        assert bench.names() & {"V039"}
        bench.memory.write(bench.driver.layout.used_idx, (used + 1).to_bytes(2, "little"), source="device")
        assert bench.names() & {"used index"}


@pytest.mark.parametrize("kind, bug", [(Malformed.HEAD_OUT_OF_RANGE, "head unchecked"), (Malformed.NEXT_OUT_OF_RANGE, "next unchecked"),
                                       (Malformed.TABLE_NEXT_OUT_OF_RANGE, "next unchecked")])  # fmt: skip
def test_rules_out_of_range(kind, bug):
    """MODEL-RULES-9: a fetch of a descriptor that is none is named (V048)."""
    # Apart, so that nothing else lies where the descriptor would.
    bench = Bench(indirect=kind.needs_indirect is True, bug=bug, addresses=(BASE, BASE + 0x2000, BASE + 0x3000))
    bench.driver.add_malformed(kind, bench.spans(1), bench.spans(1))
    bench.driver.publish()
    bench.device.take()
    assert bench.names() == {"V048"}
    bench.device.bug, bench.memory.log[:] = "", [event for event in bench.memory.log if event.source == ""]
    assert bench.names() == set()


def test_rules_granule():
    """MODEL-RULES-10: reads may be rounded out to blocks of the granule, and no further; writes never."""
    with pytest.raises(ValueError, match="power of two, not 3"):
        Bench(granule=3)
    for granule in (1, 4, 64):
        bench = Bench(granule=granule)
        bench.driver.add_chain([(BUFFERS + 66, 5)], [(BUFFERS + 1024, 8)])
        bench.driver.publish()
        for start, end in ((66, 71), (64, 72), (64, 128), (60, 72), (64, 129)):
            bench.memory.log.append(Access(BUFFERS + start, bytes(end - start), False, "device"))
            low, high = 66 // granule * granule, -(-71 // granule) * granule
            assert bench.names(False) == (set() if low <= start and end <= high else {"stray read"}), (granule, start, end)
            bench.memory.log[-1] = Access(BUFFERS + 1023, bytes(2), True, "device")
            assert bench.names(False) == {"stray write"}
            bench.memory.log.pop()


def test_rules_moments():
    """MODEL-RULES-11: what is wrong only by its moment: data behind a returned chain that claims none of it; an element that an earlier
    lap left behind; index and element in one write; while a read of no bytes is nothing (V039, V040)."""
    bench = Bench()
    bench.device.answer = lambda chain, data, late: 0
    bench.round()
    bench.memory.log.append(Access(0x7777, b"", False, "device"))
    assert bench.names() == set()
    chain = read_chain(bench.memory.snapshot(), bench.driver.layout, bench.driver.outstanding[0])
    address, _ = chain.writable[0]
    bench.memory.write(address, b"x", source="device")
    assert [(one.rule, one.event) for one in bench.broken()] == [("V040", len(bench.memory.log) - 1)]
    bench = Bench()
    for _ in range(SIZE):
        bench.round()
        bench.driver.poll_used()
    assert bench.names() == set()
    bench.device.bug = "element missing"
    bench.round()
    assert bench.broken()[0].rule == "V039"
    bench = Bench(bug="index and element at once")
    bench.round()
    assert [one.rule for one in bench.broken()] == ["V039"]


@pytest.mark.parametrize("index", [0, 65530])
@pytest.mark.parametrize("batches", [False, True])
def test_rules_in_order(batches, index):
    """MODEL-RULES-12: with IN_ORDER chains come back in order, one by one or as batches with one element in the slot of the first; one
    out of its turn, or skipped without having been written to its end, is named (V049, V050)."""
    for bug, rule in (("", set()), ("not in order", {"V049"}), ("skips unwritten", {"V050"} if batches else set())):
        for count in (2, 3, 5):
            bench = Bench(in_order=True, index=index)
            bench.device.batches = batches
            for n in range(3):
                bench.device.bug = bug if n == 2 else ""
                for _ in range(count):
                    bench.add()
                bench.device.take()
                bench.device.serve(1 if bench.device.bug == "not in order" else count)
                if not bench.device.bug:
                    assert len(bench.driver.poll_used()) == count
            assert bench.names(is_finished=False) == rule, (bug, count)


def test_rules_queue_reset():
    """MODEL-RULES-13: after the reset of its queue the device leaves it alone until it is enabled again, elsewhere and from index 0 on
    (V014 to V016)."""
    for event in (Access(BASE, bytes(16), False, "device"), Access(BUFFERS, b"x", True, "device"), Notification()):
        bench = Bench()
        bench.round(3)
        bench.add()
        bench.memory.log += [QueueReset(), event]
        assert [(one.rule, one.event) for one in bench.broken()] == [("V014", len(bench.memory.log) - 1)]
        bench.memory.log[-1:] = [StatusWritten(15)]  # does not enable it
        again = SplitDriver(bench.memory, size=4, base=BASE + 0x8000)
        bench.memory.log.append(QueueEnabled(again.layout))
        old, bench.driver = bench.device, again
        bench.device = Device(bench.memory, again.layout, bench.rng)
        for _ in range(6):
            bench.round()
            bench.driver.poll_used()
        assert bench.names() == set()
        old.word(old.layout.avail_idx)  # it looks where the queue was
        assert bench.names() == {"stray read"}
        bench.memory.log.pop()
        bench.memory.write(again.layout.used_idx, bytes([10, 0]), source="device")  # goes on where it was
        assert bench.names() == {"used index"}


def test_rules_suspend():
    """MODEL-RULES-14: what was used is notified before SUSPEND shows; then nothing happens, whatever becomes available, until the device
    resumes (V019, V023)."""
    for event in (Access(BASE, bytes(16), False, "device"), Access(BASE, bytes(16), True, "device"), Notification()):
        bench = Bench()
        bench.round(3)
        bench.driver.poll_used()
        bench.memory.log += [Suspended(), event]
        assert [(one.rule, one.event) for one in bench.broken()] == [("V019", len(bench.memory.log) - 1)]
        bench.memory.log.pop()
        bench.add()
        bench.memory.log.append(StatusWritten(31))
        assert bench.names() == {"V046"}
        bench.device.take()
        bench.device.serve(1)
        assert bench.names() == set()
    bench = Bench(bug="never notifies")
    bench.round()
    bench.memory.log.append(Suspended())
    assert [(one.rule, one.is_must) for one in bench.broken()] == [("V023", False)]


def test_rules_endless():
    """MODEL-RULES-15: a device that does not leave a loop is named once its reads exceed the bound, 64 bytes for each of 16 and size + 2
    per chain; one that reads as much for good chains is not (V032)."""
    bench = Bench()
    bench.driver.add_malformed(Malformed.LOOP, bench.spans(1), bench.spans(1))
    bench.driver.publish()
    bound = 64 * (16 + 2 * (SIZE + 2))
    assert bound == 64 * bench.driver.read_bound(2)
    for _ in range(bound // 16):
        bench.memory.read(BASE, 16, source="device")
    assert bench.names() == set()
    bench.memory.read(BASE, 16, source="device")
    bench.memory.read(BASE, 16, source="device")
    assert [one.rule for one in bench.broken()] == ["V032"]
    bench = Bench()
    bench.add()
    for _ in range(bound):
        bench.memory.read(BASE, 16, source="device")
    assert bench.names(is_finished=False) == set()
