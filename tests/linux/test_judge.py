"""The golden model that learns from TLPs alone: it agrees with the card on everything, and finds each planted fault by its section."""

import random
import struct
from dataclasses import replace as changed

import pytest

from ringwall.models.events import Note, RunHeader, TlpReceived, TlpSent
from ringwall.models.host import ConfigRead, Delay, MemoryRead
from ringwall.models.tlp import Tlp, TlpType, decode, encode, memory_read, memory_write
from ringwall.models.virtio.blk import BlkStatus
from ringwall.models.virtio.split import RingFull
from ringwall.sim import card as cards
from ringwall.sim import replay
from ringwall.sim.card import bench_config
from ringwall.sim.compiled import CompiledCard
from ringwall.sim.compiled_bench import CompiledBench
from ringwall.sim.linux.judge import Judge, config_of, describe_functions, judge_log
from ringwall.sim.log import read_log, run_header
from ringwall.sim.scoreboard import Difference

SECTOR = 512
CONFIG = bench_config(64)
APART = 0x200_0000  # without a wall each disk has addresses of its own


class JudgedBench(CompiledBench):
    """A bench with a :class:`Judge` at its card from the first cycle on, and nothing else that judges; its disks are not translated."""

    def __init__(self, *, seed, **parameters):
        def watched(config, **given):
            card = CompiledCard(config, **given)
            self.judge = Judge(card, seed=seed)
            return card

        self.card_kind = watched
        super().__init__(CONFIG, seed=seed, judged=False, **parameters)

    def bring_up(self, number, **parameters):
        return self.now(self.disk(number, base=cards.IOVAS + APART * number, **parameters))

    def settle(self):
        """Let everything that is on its way come."""
        while self.compiled.step(10_000):
            pass


def mixed(rng, disk, count, most=24):
    """Return up to ``count`` requests that do not overlap, added to the ring: every kind, every framing, good and bad ones."""
    found, taken = [], []
    for _ in range(count):
        sectors = rng.choice((1, 1, 2, 3, 8, 9, most))
        sector = rng.randrange(2048 - sectors)
        if any(sector < end and begin < sector + sectors for begin, end in taken):
            continue
        framing = rng.choice(("parts", "whole", "pages", "random"))
        blk = disk.blk
        try:
            match rng.randrange(12):
                case 0:
                    found.append(blk.flush(framing=framing))
                case 1:
                    found.append(blk.get_id(framing=framing))
                case 2:
                    found.append(blk.request(77, 5, b"", room=rng.choice((1, 9)), framing=framing))  # of no type
                case 3:
                    found.append(blk.read(2048 - sectors + 1, sectors * SECTOR, framing=framing))  # over the end
                case kind if kind < 8:
                    found.append(blk.read(sector, sectors * SECTOR, framing=framing))
                case _:
                    found.append(blk.write(sector, rng.randbytes(sectors * SECTOR), framing=framing))
        except RingFull:
            break
        taken.append((sector, sector + sectors))
    return found


@pytest.mark.parametrize("parameters", [
    {}, {"latency": 250, "jitter": 300, "split": "random", "stalls": 64}, {"latency": 40, "jitter": 60, "split": "rcb", "rcb": 128},
    {"latency": 2, "split": "random", "mps": 128, "mrrs": 128},
], ids=str)  # fmt: skip
def test_agrees(parameters):
    """LINUX-JUDGE-1: two disks at once, every kind of request and framing, at random latencies and cuts: no difference (R24, V039)."""
    bench = JudgedBench(seed=len(parameters), **parameters)
    disks = [bench.bring_up(n, queue_size=size) for n, size in ((0, 64), (1, 16))]
    total = 0
    for _ in range(12):
        batches = [mixed(bench.rng, disk, 10) for disk in disks]
        for disk in disks:
            if disk.blk.publish():
                bench.compiled.run(disk.driver.notify())
        for disk, batch in zip(disks, batches):
            bench.done(disk, batch)
            total += len(batch)
    bench.settle()
    bench.judge.end()
    assert bench.judge.requests == total > 150
    assert bench.judge.unjudged == 0
    assert bench.judge.comparisons > 3000
    bench.compiled.close()


def test_resets():
    """LINUX-JUDGE-2: resets under load at random moments; what they ended is in doubt, all else is compared (V011)."""
    bench = JudgedBench(seed=7, latency=60, jitter=50)
    disk = bench.bring_up(0)
    for _ in range(12):
        batch = mixed(bench.rng, disk, 12)
        if disk.blk.publish():
            bench.compiled.run(disk.driver.notify())
        bench.compiled.step(bench.rng.randrange(3000))
        if bench.rng.randrange(2):
            bench.session.devices.setdefault(1, None)
            bench.now(disk.restart())
        else:
            bench.done(disk, batch)
    bench.done(disk, mixed(bench.rng, disk, 12))
    bench.settle()
    bench.judge.end()
    assert bench.judge.requests > 30
    bench.compiled.close()


def test_polled():
    """LINUX-JUDGE-3: without MSI-X the ISR tells of used buffers once; the judge takes it for the notification (V034)."""
    bench = JudgedBench(seed=8)
    disk = bench.bring_up(0, vectors=False)
    isr = bench.functions[1].bars[0].address + 0x1000
    for _ in range(10):
        bench.done(disk, mixed(bench.rng, disk, 3))
        bench.compiled.step(2000)
        assert bench.compiled.memory_read(isr, 1) == b"\1"
        assert bench.compiled.memory_read(isr, 1) == b"\0"
    bench.settle()
    bench.judge.end()
    assert not bench.compiled.interrupts()
    bench.compiled.close()


def test_masked():
    """LINUX-JUDGE-4: masked vectors stay silent, are pending, and fire once when they are unmasked, by entry and by function (R19)."""
    bench = JudgedBench(seed=9)
    disk, card, info = bench.bring_up(0), bench.compiled, bench.functions[1]
    table = info.bars[2].address
    for by_entry in (True, False, True):
        if by_entry:
            card.memory_write(table + 16 + 12, b"\1\0\0\0")
            card.memory_read(table + 16 + 12, 4)
        else:
            card.config_write(1, info.msix.offset + 2, 2, 0xC000)
        card.interrupts()
        for _ in range(3):
            bench.done(disk, mixed(bench.rng, disk, 3))
            card.step(3000)
        card.step(5000)
        card.run(delay(4000))
        assert not card.interrupts()
        assert card.memory_read(table + 0x800, 8)[0] == 2
        if by_entry:
            card.memory_write(table + 16 + 12, bytes(4))
        else:
            card.config_write(1, info.msix.offset + 2, 2, 0x8000)
        card.run(delay(1000))
        assert len(card.interrupts()) == 1
        assert card.memory_read(table + 0x800, 8)[0] == 0
    bench.judge.end()
    bench.compiled.close()


def delay(cycles):
    yield Delay(cycles)


def test_refused_memory():
    """LINUX-JUDGE-5: requests whose memory is away end in IOERR, which the judge understands from the refused reads; then all is well."""
    bench = JudgedBench(seed=10)
    disk, card = bench.bring_up(0), bench.compiled
    content = bench.rng.randbytes(4096)
    bench.done(disk, [disk.blk.write(8, content)])
    write = disk.blk.write(8, bench.rng.randbytes(4096))
    place = next(disk.memory.places(write.readable[-1][0] + 2048, 1))[0] & -4096
    kept = card.read(place, 4096)
    card.unmap(place, 4096)
    disk.blk.publish()
    card.run(disk.driver.notify())
    bench.settle()
    card.map(place, 4096)
    card.write(place, kept)
    bench.done(disk, [write])
    assert write.status == BlkStatus.IOERR
    for request in (disk.blk.read(8, 4096), disk.blk.write(8, content), disk.blk.read(8, 4096)):
        bench.done(disk, [request])
        assert request.status == BlkStatus.OK
    bench.judge.end()
    bench.compiled.close()


# -- planted faults --


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The log of a run without a judge, its header and its events."""
    path = tmp_path_factory.mktemp("judge") / "log.jsonl"
    bench = CompiledBench(CONFIG, seed=3, judged=False, path=path, latency=60, jitter=40, split="random")
    disk, rng = bench.now(bench.disk(0)), random.Random(3)
    for n in range(6):
        content = rng.randbytes(2048)
        bench.done(disk, [disk.blk.write(8 * n, content)])
        read = disk.blk.read(8 * n, 2048, framing="whole")
        bench.done(disk, [read])
        assert read.data == content
        bench.compiled.step(3000)
    bench.compiled.memory_read(bench.functions[1].bars[0].address + 0x14, 1)
    bench.compiled.memory_read(bench.functions[1].bars[0].address + 0x2000, 8)
    bench.compiled.memory_read(bench.functions[1].bars[2].address + 16, 8)
    bench.compiled.config_read(1, 0x10, 4)
    bench.compiled.log(Note(bench.compiled.cycle + 1_000_000, "the end"))
    layout, table = disk.layout, bench.functions[1].bars[2].address
    bench.compiled.close()
    header, events = read_log(path)
    return path, header, list(events), layout, table


class Recording:
    """Events of a log to spoil: ``tlps`` are (place, TLP) of what the card sent, ``given`` of what it was sent."""

    def __init__(self, recorded):
        _, self.header, events, self.layout, self.table = recorded
        self.events = list(events)
        self.tlps = [(n, decode(one.dwords)) for n, one in enumerate(events) if isinstance(one, TlpReceived)]
        self.given = [(n, decode(one.dwords)) for n, one in enumerate(events) if isinstance(one, TlpSent)]

    def writes(self, is_so=lambda tlp: True):
        return [(n, tlp) for n, tlp in self.tlps if tlp.type is TlpType.MWR and is_so(tlp)]

    def data(self):
        return self.writes(lambda tlp: tlp.length_dw >= 16)

    def at(self, address, length=1):
        return self.writes(lambda tlp: address <= tlp.byte_span()[0] < address + length)

    def interrupts(self):
        return self.at(0xFEE0_0000, 0x10_0000)

    def set(self, n, tlp):
        event = self.events[n]
        self.events[n] = type(event)(event.cycle, encode(tlp))

    def insert(self, n, kind, *tlps):
        self.events[n:n] = [kind(self.events[n].cycle, encode(tlp)) for tlp in tlps]

    def move(self, n, to):
        self.events.insert(to, self.events.pop(n))

    def answer(self, is_so):
        """Return (place of the answer, TLP) of the last request of the host for which ``is_so``."""
        place, request = [(n, tlp) for n, tlp in self.given if is_so(tlp)][-1]
        return next((n, tlp) for n, tlp in self.tlps if n > place and tlp.type.is_completion and tlp.tag == request.tag)


def flip(tlp, at, bits=1):
    at += tlp.byte_span()[0] - tlp.address if not tlp.type.is_completion else 0
    return changed(tlp, data=tlp.data[:at] + bytes([tlp.data[at] ^ bits]) + tlp.data[at + 1 :])


def element(log, part):
    """Return (place, TLP) of what wrote byte ``part`` of an element of the used ring."""
    return next((n, tlp) for n, tlp in log.at(log.layout.used + 4 + 24, 8 * 60) if (tlp.byte_span()[0] - log.layout.used - 4) % 8 == part)


def a_used_id(log):
    n, tlp = element(log, 0)
    log.set(n, flip(tlp, 0, 0x20))


def a_used_length(log):
    n, tlp = element(log, 4)
    log.set(n, flip(tlp, 2))


def an_index_before_its_data(log):
    n, _ = log.data()[9]
    log.move(n, next(at for at, _ in log.at(log.layout.used_idx) if at > n))


def an_index_before_its_element(log):
    n, _ = element(log, 4)
    log.move(n, next(at for at, _ in log.at(log.layout.used_idx) if at > n))


def a_bit_of_disk_content(log):
    n, tlp = log.data()[9]
    log.set(n, flip(tlp, 20, 0x40))


def a_bit_of_what_was_read(log):
    n, tlp = [(n, tlp) for n, tlp in log.given if tlp.type is TlpType.CPLD and tlp.length_dw >= 20][-1]
    log.set(n, flip(tlp, 30, 0x80))


def a_lost_answer(log):
    n, _ = [(n, tlp) for n, tlp in log.given if tlp.type is TlpType.CPLD and tlp.length_dw >= 20][-1]
    del log.events[n]


def a_read_of_a_descriptor_that_is_not_available(log):
    n, tlp = [(n, tlp) for n, tlp in log.tlps if tlp.type is TlpType.MRD][40]
    log.insert(n, TlpReceived, memory_read(log.layout.descriptor(60), 16, requester_id=tlp.requester_id, tag=250))


def a_descriptor_before_the_index(log):
    """The last index that told of a chain says less than the card knew; the same in all that come behind it."""
    answers = [(n, tlp) for n, tlp in log.given if tlp.type is TlpType.CPLD and tlp.requester_id & 0xFF == 1 and tlp.byte_count == 2
               and tlp.lower_address == log.layout.avail_idx & 0x7F]  # fmt: skip
    at = log.layout.avail_idx % 4
    values = [int.from_bytes(tlp.data[at : at + 2], "little") for _, tlp in answers]
    for (n, tlp), value in zip(answers, values):
        if value == values[-1]:
            log.set(n, changed(tlp, data=tlp.data[:at] + (value - 1).to_bytes(2, "little") + tlp.data[at + 2 :]))


def a_write_beyond_its_buffer(log):
    n, tlp = [(n, tlp) for n, tlp in log.data() if tlp.first_be == 15][-1]
    last = [(m, one) for m, one in log.data() if m >= n][-1][1]
    start, length = last.byte_span()
    log.insert(n, TlpReceived, memory_write(start + length + 64, b"more", requester_id=tlp.requester_id))


def a_write_to_what_is_readable(log):
    n, tlp = log.data()[0]
    header = next(one for m, one in log.tlps if m < n and one.type is TlpType.MRD and one.byte_span()[1] == 16
                  and not log.layout.desc <= one.address < log.layout.desc + log.layout.desc_bytes)  # fmt: skip
    log.insert(header_place(log, header) + 1, TlpReceived, memory_write(header.byte_span()[0], b"\5", requester_id=tlp.requester_id))


def header_place(log, header):
    return next(n for n, tlp in log.tlps if tlp == header)


def a_write_to_the_descriptors(log):
    n, tlp = log.data()[0]
    log.insert(n, TlpReceived, memory_write(log.layout.desc, bytes(8), requester_id=tlp.requester_id))


def a_configuration_answer(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.CFGRD0 and tlp.register == 0x10)
    log.set(n, flip(tlp, 0, 8))


def a_status_answer(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.MRD and tlp.address % 0x4000 == 0x14 and tlp.byte_span()[1] == 1)
    log.set(n, flip(tlp, 0, 0x10))


def a_feature_answer(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.MRD and tlp.address % 0x4000 == 0x4)
    log.set(n, flip(tlp, 0, 1))


def a_capacity_answer(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.MRD and tlp.address % 0x4000 == 0x2000)
    log.set(n, flip(tlp, 1, 1))


def a_vector_table_answer(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.MRD and tlp.address == log.table + 16)
    log.set(n, flip(tlp, 2, 1))


def an_interrupt_while_masked(log):
    n, _ = log.interrupts()[3]
    mask = memory_write(log.table + 28, b"\1\0\0\0", requester_id=0)
    look = memory_read(log.table + 28, 4, requester_id=0, tag=255)
    answer = Tlp(TlpType.CPLD, length_dw=1, completer_id=0x0101, byte_count=4, lower_address=28, tag=255, data=b"\1\0\0\0")
    log.insert(n, TlpReceived, answer)
    log.insert(n, TlpSent, mask, look)


def an_interrupt_while_msix_is_off(log):
    n, _ = log.interrupts()[3]
    write = Tlp(TlpType.CFGWR0, length_dw=1, first_be=0b1100, completer_id=0x0101, register=0x7C, tag=255, data=bytes(4))
    log.insert(n, TlpReceived, Tlp(TlpType.CPL, completer_id=0x0101, byte_count=4, tag=255))
    log.insert(n, TlpSent, write)


def an_interrupt_twice(log):
    n, tlp = log.interrupts()[3]
    log.insert(n, TlpReceived, tlp)


def an_interrupt_with_other_data(log):
    n, tlp = log.interrupts()[3]
    log.set(n, flip(tlp, 0, 2))


def an_interrupt_less(log):
    del log.events[log.interrupts()[-1][0]]


def a_foreign_requester(log):
    n, tlp = log.data()[3]
    log.set(n, changed(tlp, requester_id=0x0201))


def another_function(log):
    n, tlp = log.data()[3]
    log.set(n, changed(tlp, requester_id=0x0102))


def a_tag_twice(log):
    n, tlp = [(n, tlp) for n, tlp in log.tlps if tlp.type is TlpType.MRD][50]
    log.insert(n, TlpReceived, tlp)


def a_read_that_is_too_long(log):
    n, tlp = next((n, tlp) for n, tlp in log.tlps if tlp.type is TlpType.MRD and tlp.length_dw == 128 and tlp.address % 4096 < 3000)
    log.set(n, changed(tlp, length_dw=129, last_be=15))


def no_bus_master(log):
    n, _ = log.data()[3]
    write = Tlp(TlpType.CFGWR0, length_dw=1, first_be=0b0011, completer_id=0x0101, register=4, tag=255, data=b"\2\0\0\0")
    log.insert(n, TlpReceived, Tlp(TlpType.CPL, completer_id=0x0101, byte_count=4, tag=255))
    log.insert(n, TlpSent, write)


def a_read_in_front_of_driver_ok(log):
    n = next(n for n, tlp in log.tlps if tlp.type is TlpType.MRD)
    first = next(m for m, tlp in log.given if tlp.type is TlpType.MWR)
    log.move(n, first + 1)


def an_answer_to_nothing(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.CFGRD0)
    log.insert(n, TlpReceived, changed(tlp, tag=200))


def a_refusal(log):
    n, tlp = log.answer(lambda tlp: tlp.type is TlpType.CFGRD0)
    log.set(n, changed(tlp, type=TlpType.CPL, status=1, length_dw=0, data=b""))


def a_lost_doorbell(log):
    """Nothing of the card is seen any more behind the last doorbell."""
    ring = [n for n, tlp in log.given if tlp.type is TlpType.MWR and tlp.address % 0x4000 == 0x3000][-1]
    log.events = log.events[: ring + 1] + log.events[-1:]


FAULTS = {
    a_used_id: r"V042 of function 1 \[VIRTIO1.4 2.7.8\]",
    a_used_length: r"V041 of function 1 \[VIRTIO1.4 2.7.8\]",
    an_index_before_its_data: r"(not what the device answers \[VIRTIO1.4 5.2.6\]|V040 .*\[VIRTIO1.4 2.7.8.2\])",
    an_index_before_its_element: r"V039 of function 1 \[VIRTIO1.4 2.7.8.2\]",
    a_bit_of_disk_content: r"not what the device answers \[VIRTIO1.4 5.2.6\]",
    a_bit_of_what_was_read: r"not what the device answers \[VIRTIO1.4 5.2.6\]",
    a_lost_answer: r"carried out unread \[VIRTIO1.4 5.2.6\]",
    a_read_of_a_descriptor_that_is_not_available: r"early read of function 1 \[VIRTIO1.4 2.7.13\]",
    a_descriptor_before_the_index: r"early read of function 1 \[VIRTIO1.4 2.7.13\]",
    a_write_beyond_its_buffer: r"stray write of function 1 \[VIRTIO1.4 2.7.5.1\]",
    a_write_to_what_is_readable: r"V026 of function 1 \[VIRTIO1.4 2.7.5.1\]",
    a_write_to_the_descriptors: r"V028 of function 1 \[VIRTIO1.4 2.7.5.1\]",
    a_configuration_answer: r"configuration space of function 1 at 0x10 \[PCIe5 7.5\]",
    a_status_answer: r"register of function 1 is read wrong\n.*\n  model: device_status is 0xf \[VIRTIO1.4 2.1\]",
    a_feature_answer: r"register of function 1 is read wrong\n.*\n  model: device_feature is .* \[VIRTIO1.4 4.1.4.3\]",
    a_capacity_answer: r"register of function 1 is read wrong\n.*\n  model: device configuration .* \[VIRTIO1.4 5.2.4\]",
    a_vector_table_answer: r"register of function 1 is read wrong\n.*\n  model: byte 2 of entry 1 .* \[PCIe5 7.7.2\]",
    an_interrupt_while_masked: r"interrupt of a masked vector \[PCIe5 6.1.4.5, 7.7.2.6\]",
    an_interrupt_while_msix_is_off: r"interrupt while MSI-X is disabled or the function masked \[PCIe5 7.7.2.2\]",
    an_interrupt_twice: r"V035 of function 1 \[VIRTIO1.4 2.7.7.2\]",
    an_interrupt_with_other_data: r"stray write of function 1 \[VIRTIO1.4 2.7.5.1\]",
    an_interrupt_less: r"V034 of function 1 \[VIRTIO1.4 2.7.7.2\]",
    a_foreign_requester: r"requester ID is of no function of the card \[PCIe5 2.2.6.2\]",
    another_function: r"V001 of function 2 \[VIRTIO1.4 2.1.2\]",
    a_tag_twice: r"tag is still in use \[PCIe5 2.2.6.2\]",
    a_read_that_is_too_long: r"longer than Max_Read_Request_Size \[PCIe5 7.5.3.4\]",
    no_bus_master: r"request without Bus Master Enable \[PCIe5 7.5.1.1.3\]",
    a_read_in_front_of_driver_ok: r"V001 of function 1 \[VIRTIO1.4 2.1.2\]",
    an_answer_to_nothing: r"answer to nothing \[PCIe5 2.3.2\]",
    a_refusal: r"answer to a request that is of a function that is there \[PCIe5 2.3.1\]",
    a_lost_doorbell: r".*deaf of function 1 \[VIRTIO1.4 2.9\]",
}


def take(judge, events):
    for event in events:
        judge.observe(event)
    judge.end()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: one.__name__)
def test_faults(recorded, fault):
    """LINUX-JUDGE-6: what a card must not have done, planted in a log, is found by the rule that forbids it (R19, V026, V028, V041)."""
    log = Recording(recorded)
    fault(log)
    judge = Judge(config=config_of(log.header))
    with pytest.raises(Difference, match=r"(?s)\Acard and model differ[^\n]*\n[^\n]*" + FAULTS[fault] + ".*oldest first:") as found:
        take(judge, log.events)
    assert 1 < str(found.value).count("\n  Tlp") <= 21


def test_clean(recorded):
    """LINUX-JUDGE-7: the log that faults are planted in is without one, and all of its requests were compared."""
    judge = judge_log(recorded[0])
    assert (judge.requests, judge.unjudged) == (12, 0)
    assert judge.comparisons > 500


def test_replay(recorded, tmp_path, capsys):
    """LINUX-JUDGE-8: `make replay`: 0 when RTL and model agree with the log, 1 when a bit differs, 2 when it is none."""
    path, _, events, _, _ = recorded
    assert replay.main([str(path)]) == 0
    told = capsys.readouterr().out
    assert "identical, cycle by cycle" in told
    assert "12 requests, 0 differences" in told
    assert "the replay agrees with the log" in told
    lines = path.read_text().splitlines(keepends=True)
    log = Recording(recorded)
    n, tlp = log.data()[9]
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text("".join([*lines[: n + 1], TlpReceived(events[n].cycle, encode(flip(tlp, 3))).to_json() + "\n", *lines[n + 2 :]]))
    assert replay.main([str(spoiled)]) == 1
    told = capsys.readouterr().out
    assert "differs from the log" in told
    assert "[VIRTIO1.4 5.2.6]" in told
    assert "the replay DIFFERS" in told
    for text in ("", "no log\n", lines[1], RunHeader("x", 1, {"begin": 0}, {}).to_json() + "\n",
                 run_header(1, {"begin": 5, "config": log.header.parameters["config"]}).to_json() + "\n"):  # fmt: skip
        spoiled.write_text(text)
        assert replay.main([str(spoiled)]) == 2
        assert "no log that can be replayed" in capsys.readouterr().err
    assert replay.main([str(tmp_path / "missing")]) == 2


def test_configuration_space():
    """LINUX-JUDGE-9: every dword of configuration space of every function, before and after ones are written."""
    bench = JudgedBench(seed=11)
    card = bench.compiled
    before = bench.judge.comparisons
    for function in range(3):
        for register in range(0, 0x110, 4):
            card.perform(ConfigRead(function, register, 4))
    for function in range(3):
        for register in (0x04, 0x10, 0x14, 0x18, 0x1C, 0x0C, 0x3C, 0x50, 0x7C):
            card.config_write(function, register, 4, 0x0FFF_7FFF)
            card.config_read(function, register, 4)
    assert bench.judge.comparisons - before > 3 * (0x110 // 4)
    assert bench.judge.unjudged <= 2  # the windows of the two disks, which lead nowhere
    assert len(describe_functions(CONFIG)) == 3
    card.close()


def test_registers():
    """LINUX-JUDGE-10: every register of a virtio function, any values written in any order, is read as the model has it (V012, V018)."""
    bench = JudgedBench(seed=12)
    card, rng, bar = bench.compiled, bench.rng, bench.functions[2].bars[0].address
    registers = [(0, 4), (4, 4), (8, 4), (12, 4), (16, 2), (18, 2), (20, 1), (21, 1), (22, 2), (24, 2), (26, 2), (28, 2), (30, 2),
                 (32, 4), (36, 4), (40, 4), (44, 4), (48, 4), (52, 4)]  # fmt: skip
    for _ in range(600):
        at, size = rng.choice(registers)
        if at == 20 and rng.randrange(3):
            card.memory_write(bar + at, bytes([rng.choice((1, 3, 3, 11, 128, 0))]))
            card.step(300)
        elif at not in (4, 18, 20, 21, 30) and rng.randrange(2):
            value = rng.choice((0, 1, 1, 2, 16, 0xFFFF, 1 << 8 * size - 1, rng.getrandbits(8 * size))) & (1 << 8 * size) - 1
            card.memory_write(bar + at, value.to_bytes(size, "little"))
        card.perform(MemoryRead(bar + at, size))
    assert bench.judge.comparisons > 600
    card.close()


def test_settings(recorded):
    """LINUX-JUDGE-11: a judge without a card, with one that ran already, of a wall that translates, is refused with a sentence."""
    with pytest.raises(ValueError, match="must know a card or its configuration, not None and None"):
        Judge()
    with CompiledCard(CONFIG) as card:
        card.config_read(0, 0, 4)
        with pytest.raises(ValueError, match="from the first cycle on, not from cycle"):
            Judge(card)
    judge = Judge(config=CONFIG)
    for event in recorded[2]:
        judge.observe(event)
    base = judge.functions[0].space.bar_address(0)
    with pytest.raises(ValueError, match=r"must stay Bare .* not in mode 2"):
        judge.observe(TlpSent(judge.cycle, encode(memory_write(base + 0x10, struct.pack("<Q", 2), requester_id=0))))
    late = recorded[0].with_name("late.jsonl")
    late.write_text(run_header(1, {"begin": 5}).to_json() + "\n")
    with pytest.raises(ValueError, match="must begin at cycle 0, not 5"):
        judge_log(late)
