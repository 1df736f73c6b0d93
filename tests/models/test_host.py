"""The root complex against a checker of its own completions, and against a card made of the configuration space model."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models import host as host_module
from ringwall.models.config_space import (
    BarDescription,
    CapabilityDescription,
    ConfigSpace,
    FunctionDescription,
    msix_capability,
    pcie_capability,
    virtio_capability,
)
from ringwall.models.host import (
    FAULT_KINDS,
    CompletionPolicy,
    ConfigRead,
    ConfigWrite,
    Delay,
    Fault,
    Host,
    Interrupt,
    MemoryRead,
    MemoryWrite,
    WaitInterrupt,
    enable_msix,
    run,
)
from ringwall.models.memory import AccessFault, GuestMemory
from ringwall.models.tlp import CplStatus, Pasid, Tlp, TlpType, decode, encode, memory_read, memory_write

CARD = 0x0100  # routing ID of function 0


def always(tlp):
    return True


def make_host(memory=None, *, seed=1, **options):
    """A host whose function 0 is enabled for everything that the host allows."""
    host = Host(GuestMemory() if memory is None else memory, rng=random.Random(seed), **options)
    host.assume_enabled(0)
    return host


def pattern(length, at=0):
    return bytes((at + n) * 7 + (at + n >> 8) & 0xFF for n in range(length))


# -- an independent judge of completions --


def completion_faults(request, completions, *, rcb, mps):
    """Return every rule that good completions of a read break, and the bytes that they carry. [PCIe5 2.2.9, 2.3.1.1]"""
    found = []
    mask = [n for n in range(4 * request.length_dw)
            if (request.first_be if n < 4 else request.last_be if n >= 4 * request.length_dw - 4 else 15) >> n % 4 & 1]  # fmt: skip
    first = request.address + mask[0] if mask else request.address
    end = request.address + mask[-1] + 1 if mask else request.address + 1
    at = request.address  # dword where the next completion starts
    data = {}
    for n in range(len(completions)):
        c, is_last = completions[n], n == len(completions) - 1
        if (c.type, c.status, c.poisoned) != (TlpType.CPLD, CplStatus.SC, False):
            found.append(f"{n}: is {c}")
        if (c.requester_id, c.tag, c.tc) != (request.requester_id, request.tag, request.tc):
            found.append(f"{n}: not for the request")
        if (c.relaxed_ordering, c.no_snoop, c.ido) != (request.relaxed_ordering, request.no_snoop, request.ido):
            found.append(f"{n}: attributes")
        if not 0 < 4 * c.length_dw <= mps or len(c.data) != 4 * c.length_dw:
            found.append(f"{n}: {c.length_dw} dwords")
        start = first if n == 0 else at
        if c.byte_count != end - start:
            found.append(f"{n}: byte count {c.byte_count}, {end - start} remain")
        if c.lower_address != start % 128:
            found.append(f"{n}: lower address {c.lower_address:#x}, is {start % 128:#x}")
        for k in range(len(c.data)):
            data[at + k] = c.data[k]
        at += 4 * c.length_dw
        if not is_last and at % rcb:
            found.append(f"{n}: ends at {at:#x}, not at a boundary of {rcb}")
        if not is_last and at >= end:
            found.append(f"{n}: data is complete, another follows")
    if at != request.address + 4 * request.length_dw:
        found.append(f"completions end at {at:#x}")
    return found, [(request.address + n, data.get(request.address + n)) for n in mask]


offsets = st.one_of(st.sampled_from([0, 1, 60, 63, 64, 65, 127, 128, 255, 256, 4092, 4095]), st.integers(0, 4095))
lengths = st.one_of(st.sampled_from([0, 1, 4, 5, 63, 64, 65, 128, 129, 255, 256, 257, 512, 4096]), st.integers(0, 4096))


@settings(max_examples=400, deadline=None)
@given(offsets, lengths, st.sampled_from([64, 128]), st.sampled_from([128, 256, 512]), st.sampled_from(["max", "rcb", "random"]),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def test_host_completions(offset, length, rcb, mps, split, reorder, seed):
    """MODEL-HOST-1: any read is answered by legal completions, whatever the cutting, and they carry its bytes (R14)."""
    length = min(length, 4096 - offset)
    memory = GuestMemory()
    memory.write(0x1_0000_0000, pattern(4096))
    host = make_host(memory, seed=seed, rcb=rcb, mps=mps, mrrs=4096,
                     policy=CompletionPolicy(split=split, reorder=reorder, jitter=seed))  # fmt: skip
    request = memory_read(0x1_0000_0000 + offset, length, requester_id=CARD, tag=seed, relaxed_ordering=seed % 2 == 1)
    replies = host.receive(encode(request))
    found, data = completion_faults(request, [reply.tlp for reply in replies], rcb=rcb, mps=mps)
    assert found == []
    assert data == [(0x1_0000_0000 + offset + n, pattern(1, offset + n)[0]) for n in range(length)]
    assert host.violations == []
    assert [reply.ends for reply in replies] == [None] * (len(replies) - 1) + [(CARD, seed)]
    for reply in replies:
        assert decode(encode(reply.tlp)) == reply.tlp


@pytest.mark.parametrize("first_be", range(16))
def test_host_completions_of_one_dword(first_be):
    """MODEL-HOST-2: a read of one dword with any byte enables: byte count and lower address span the enabled bytes."""
    host = make_host()
    host.memory.write(0x2000, b"abcd")
    request = Tlp(TlpType.MRD, length_dw=1, requester_id=CARD, tag=1, address=0x2000, first_be=first_be)
    [reply] = host.receive(encode(request))
    found, data = completion_faults(request, [reply.tlp], rcb=64, mps=128)
    assert found == []
    assert data == [(0x2000 + n, b"abcd"[n]) for n in range(4) if first_be >> n & 1]


def test_host_completion_judge():
    """MODEL-HOST-3: the judge of these tests sees each kind of wrong completion."""
    host = make_host(policy=CompletionPolicy(split="rcb"))
    request = memory_read(0x1010, 250, requester_id=CARD, tag=1)
    good = [reply.tlp for reply in host.receive(request)]
    assert len(good) == 5
    assert completion_faults(request, good, rcb=64, mps=256)[0] == []
    joined = replace(good[0], length_dw=good[0].length_dw + 1, data=good[0].data + b"abcd")
    cut = replace(good[1], length_dw=15, data=good[1].data[4:], byte_count=good[1].byte_count - 4,
                  lower_address=good[1].lower_address + 4)  # fmt: skip
    for bad in (good[:-1], good[1:], [*good, good[-1]], [good[1], good[0], *good[2:]], [joined, cut, *good[2:]],
                *([replace(good[0], **{field: value}), *good[1:]] for field, value in (
                    ("byte_count", 251), ("lower_address", 0x11), ("tag", 2), ("requester_id", 0), ("poisoned", True),
                    ("relaxed_ordering", True), ("status", CplStatus.UR), ("tc", 1), ("data", b"")))):  # fmt: skip
        assert completion_faults(request, bad, rcb=64, mps=256)[0], bad
    assert completion_faults(request, good, rcb=128, mps=256)[0], "cut at 64 where 128 is the boundary"
    long = [reply.tlp for reply in make_host().receive(request)]
    assert completion_faults(request, long, rcb=64, mps=128)[0], "longer than the payload size"


def test_host_cuts_in_every_legal_way():
    """MODEL-HOST-4: "random" reaches each of the legal cuttings, "max" is the coarsest and "rcb" the finest of them."""
    request = memory_read(0x1020, 300, requester_id=CARD, tag=1)  # boundaries at 0x1040, 80, C0, 1100, 1140; payload 256
    host = make_host(policy=CompletionPolicy(split="random"))
    seen = set()
    for _ in range(600):
        replies = host.receive(request)
        seen.add(tuple(reply.tlp.length_dw for reply in replies))
        for reply in replies:
            host.sent(reply)
    inner, legal = [0x1040, 0x1080, 0x10C0, 0x1100, 0x1140], set()
    for count in range(6):
        for cuts in itertools.combinations(inner, count):
            edges = [0x1020, *cuts, 0x114C]
            sizes = tuple((b - a) // 4 for a, b in itertools.pairwise(edges))
            if max(sizes) <= 64:
                legal.add(sizes)
    assert seen == legal
    assert [reply.tlp.length_dw for reply in make_host().receive(request)] == [56, 19]
    assert len(make_host(policy=CompletionPolicy(split="rcb")).receive(request)) == 6
    assert host.violations == []


def test_host_answers_keep_their_order():
    """MODEL-HOST-5: with jitter answers keep the order of the requests; with reordering tags overtake, a tag's own never do."""
    for reorder in (False, True):
        host = make_host(policy=CompletionPolicy(latency=100, jitter=80, reorder=reorder, split="rcb"))
        due = []
        for tag in range(60):
            now = 10 * tag
            for reply in host.receive(memory_read(0x1000, 512, requester_id=CARD, tag=tag), now):
                assert reply.delay_cycles >= 100
                due.append((now + reply.delay_cycles, tag, reply.tlp.byte_count))
        for tag in range(60):
            mine = [(when, -count) for when, owner, count in due if owner == tag]
            assert mine == sorted(mine)
        order = [tag for _, tag, _ in sorted(due, key=lambda item: item[0])]
        assert (order == sorted(order)) is not reorder
        if reorder:
            changes = sum(a != b for a, b in itertools.pairwise(order))
            assert changes > 60, "answers must interleave"
    host = make_host(policy=CompletionPolicy(latency=100, reorder=True))
    due = [10 * n + host.receive(memory_read(0, 64, requester_id=CARD, tag=n), 10 * n)[0].delay_cycles for n in range(60)]
    assert due != sorted(due)
    assert {reply.delay_cycles for reply in make_host().receive(memory_read(0, 64, requester_id=CARD, tag=1), 7)} == {250}


def test_host_faults():
    """MODEL-HOST-6: each fault strikes as it is described, as often as asked, and the next read is good again (R03)."""
    request = memory_read(0x1010, 250, requester_id=CARD, tag=9)
    quiet = make_host(policy=CompletionPolicy(split="rcb"))
    good = [reply.tlp for reply in quiet.receive(request)]
    for kind in FAULT_KINDS:
        for at in (0, 2, 99):
            host = make_host(policy=CompletionPolicy(split="rcb", latency=10, faults=[
                Fault(kind, lambda tlp: tlp.tag == 9, times=2, at=at, cycles=1000)]))  # fmt: skip
            n = min(at, 4)
            assert [reply.tlp for reply in host.receive(replace(request, tag=8))] == [replace(c, tag=8) for c in good]
            for _ in range(2):
                replies = host.receive(request)
                tlps, delays = [reply.tlp for reply in replies], [reply.delay_cycles for reply in replies]
                if kind in ("UR", "CA"):
                    assert tlps[:-1] == good[:n]
                    assert tlps[n] == replace(good[n], type=TlpType.CPL, status=CplStatus[kind], length_dw=0, data=b"")
                elif kind == "MISSING":
                    assert tlps == good[:n]
                elif kind == "LATE":
                    assert tlps == good
                    assert delays == [10] * n + [1010] * (5 - n)
                elif kind == "DUPLICATE":
                    assert tlps == [*good[: n + 1], *good[n:]]
                else:
                    wanted = {"POISON": {"poisoned": True}, "WRONG_BYTE_COUNT": {"byte_count": good[n].byte_count + 4},
                              "WRONG_LOWER_ADDRESS": {"lower_address": good[n].lower_address ^ 4},
                              "WRONG_REQUESTER": {"requester_id": CARD ^ 0x100},
                              "SHORT": {"length_dw": good[n].length_dw - 1, "data": good[n].data[:-4]}}[kind]  # fmt: skip
                    assert tlps == [*good[:n], replace(good[n], **wanted), *good[n + 1 :]]
                if kind == "MISSING" and n == 0:
                    assert host.outstanding == {(CARD, 8): replace(request, tag=8)}
                else:
                    ends = [reply.ends for reply in replies]
                    assert ends.count((CARD, 9)) == 1
                    assert ends.index((CARD, 9)) == len(tlps) - 1 - (kind == "DUPLICATE" and n == 4)
                for reply in replies:
                    host.sent(reply)
            assert [reply.tlp for reply in host.receive(request)] == good
            assert host.violations == []
    short = make_host(policy=CompletionPolicy(faults=[Fault("SHORT", always)]))
    [reply] = short.receive(memory_read(0x1000, 4, requester_id=CARD, tag=1))
    assert (reply.tlp.type, reply.tlp.status, reply.tlp.data) == (TlpType.CPL, CplStatus.SC, b"")
    whole = make_host(mrrs=4096, policy=CompletionPolicy(faults=[Fault("WRONG_BYTE_COUNT", always)]))
    assert whole.receive(memory_read(0x1000, 4096, requester_id=CARD, tag=1))[0].tlp.byte_count == 4092


@settings(max_examples=200, deadline=None)
@given(offsets, st.integers(0, 256), st.integers(0, 999))
def test_host_writes(offset, length, seed):
    """MODEL-HOST-7: a write of the card changes exactly its enabled bytes (R10, R14)."""
    data = random.Random(seed).randbytes(min(length, 4096 - offset, 253))
    memory = GuestMemory()
    memory.write(0, b"\xa5" * 12288)
    before = memory.snapshot()
    host = make_host(memory)
    assert host.receive(encode(memory_write(0x1000 + offset, data, requester_id=CARD))) == []
    before.write(0x1000 + offset, data)
    assert memory.differences(before) == []
    assert host.violations == []
    assert (host.statistics.writes, host.statistics.written_bytes) == (1, len(data))


def test_host_writes_with_gaps():
    """MODEL-HOST-8: byte enables with gaps leave the bytes between alone."""
    host = make_host()
    host.memory.write(0x1000, b"........")
    host.receive(Tlp(TlpType.MWR, length_dw=2, requester_id=CARD, address=0x1000, first_be=0b0101, last_be=0b1010, data=b"abcdefgh"))
    assert host.memory.read(0x1000, 8) == b"a.c..f.h"
    assert host.violations == []


def test_host_words_are_not_torn():
    """MODEL-HOST-9: aligned 2, 4 and 8 bytes cross the bus as one TLP and memory sees them whole, with another CPU between (R05, R06)."""
    rng = random.Random(9)
    for size in (2, 4, 8):
        memory = GuestMemory()
        host, values, seen = make_host(memory), [bytes(size), b"\xff" * size], set()

        def flip(address, length, is_write, size=size, memory=memory, values=values, seen=seen):
            seen.add(memory.read(0x2000, size))
            if not is_write:
                memory.write(0x2000, rng.choice(values))

        memory.interleaver = flip
        for n in range(30):
            [reply] = host.receive(memory_read(0x2000, size, requester_id=CARD, tag=n))
            seen.add(reply.tlp.data[:size])
            host.receive(memory_write(0x2000, rng.choice(values), requester_id=CARD))
        assert seen == set(values)


def test_host_refuses():
    """MODEL-HOST-10: reads of nothing are UR, of poison EP=1 in the completion that meets it; writes to nothing are reported (R03)."""
    memory = GuestMemory(all_ram=False)
    memory.add_range(0x1000, 0x1000)
    memory.add_range(0x2000, 0x1000, write=False)
    host = make_host(memory, policy=CompletionPolicy(split="rcb"))
    for n, (address, length) in enumerate([(0xFF0, 16), (0x3000, 64), (0x0, 4), (0x3001, 0)]):
        [reply] = host.receive(memory_read(address, length, requester_id=CARD, tag=n))
        assert (reply.tlp.type, reply.tlp.status, reply.tlp.tag) == (TlpType.CPL, CplStatus.UR, n)
        assert (reply.tlp.byte_count, reply.tlp.lower_address) == (length or 1, address & (0x7F if length else 0x7C))
        host.sent(reply)
    assert host.violations == []
    assert host.statistics.unsupported == 4
    memory.write(0x1000, pattern(256))
    memory.poison(0x1083, 1)
    request = memory_read(0x1010, 200, requester_id=CARD, tag=1)
    tlps = [reply.tlp for reply in host.receive(request)]
    assert [c.poisoned for c in tlps] == [False, False, True, False]
    found, data = completion_faults(request, [replace(c, poisoned=False) for c in tlps], rcb=64, mps=256)
    assert found == []
    assert [pair for pair in data if not 0x1080 <= pair[0] < 0x10C0] == [
        (0x1000 + n, pattern(1, n)[0]) for n in range(0x10, 0xD8) if not 0x80 <= n < 0xC0]  # fmt: skip
    before = memory.snapshot()
    for address in (0x2000, 0x3000):
        host.receive(memory_write(address, b"abcd", requester_id=CARD))
    assert memory.differences(before) == []
    assert [text.split(":")[0] for text in host.violations] == ["write refused by memory (read-only)", "write refused by memory (unmapped)"]
    host.receive(memory_write(0x1100, b"abcd", requester_id=CARD, poisoned=True))
    with pytest.raises(AccessFault, match="poisoned"):
        memory.read(0x1100, 4)


@pytest.mark.parametrize("rule, tlp", [
    ("address type", memory_read(0x1000, 4, requester_id=CARD, tag=1, at=2)),
    ("address type", memory_write(0x1000, b"abcd", requester_id=CARD, at=2)),
    ("traffic class", memory_read(0x1000, 4, requester_id=CARD, tag=1, tc=1)),
    ("IDO", memory_write(0x1000, b"abcd", requester_id=CARD, ido=True)),
    ("digest", memory_write(0x1000, b"abcd", requester_id=CARD, td=True)),
    ("PASID", memory_write(0x1000, b"abcd", requester_id=CARD, pasid=Pasid(1))),
    ("request is poisoned", memory_write(0x1000, b"abcd", requester_id=CARD, poisoned=True)),
    ("Max_Payload_Size 256", memory_write(0x1000, bytes(260), requester_id=CARD)),
    ("Max_Payload_Size 256", memory_write(0x1001, bytes(256), requester_id=CARD)),
    ("Max_Read_Request_Size 512", memory_read(0x1000, 516, requester_id=CARD, tag=1)),
    ("Max_Read_Request_Size 512", memory_read(0x1002, 512, requester_id=CARD, tag=1)),
    ("no function", memory_read(0x1000, 4, requester_id=0x0200, tag=1)),
    ("no function", memory_write(0x1000, b"abcd", requester_id=0x0101)),
    ("tag is wider", memory_read(0x1000, 4, requester_id=CARD, tag=256)),
    ("does not send", Tlp(TlpType.IORD, length_dw=1, requester_id=CARD, first_be=15)),
    ("does not send", Tlp(TlpType.CFGRD0, length_dw=1, requester_id=CARD, first_be=15)),
    ("does not send", Tlp(TlpType.MRDLK, length_dw=1, requester_id=CARD, first_be=15)),
    ("AtomicOp is not enabled", Tlp(TlpType.FETCHADD, length_dw=1, requester_id=CARD, data=bytes(4))),
    ("unknown code", Tlp(TlpType.MSG, requester_id=CARD, message_code=0x77)),
    ("unexpected completion", Tlp(TlpType.CPL, completer_id=CARD, byte_count=4)),
    ("interrupt is not one write", memory_write(0xFEE0_0000, bytes(8), requester_id=CARD)),
    ("interrupt is not one write", memory_write(0xFEEF_FFFC, bytes(2), requester_id=CARD)),
    ("interrupt may overtake", memory_write(0xFEE0_1000, bytes(4), requester_id=CARD, relaxed_ordering=True)),
])  # fmt: skip
def test_host_violations(rule, tlp):
    """MODEL-HOST-11: each rule that the card breaks is found, once, and a request is answered nevertheless (R19)."""
    host = make_host()
    replies = host.receive(encode(tlp))
    assert len(host.violations) == 1
    assert host.violations[0].startswith(rule) or rule in host.violations[0].split(":")[0]
    assert len(replies) == (0 if tlp.type.is_posted or tlp.type.is_completion else 1 if tlp.length_dw < 65 else 3)
    if tlp.type in (TlpType.IORD, TlpType.CFGRD0, TlpType.MRDLK) or tlp.at:
        assert [reply.tlp.status for reply in replies] == [CplStatus.UR] * len(replies)


def test_host_malformed():
    """MODEL-HOST-12: dwords that are no TLP, or that carry reserved bits, are reported; noise of any kind does no harm."""
    host = make_host()
    assert host.receive([0x0000_0002, 0x0100_01FF, 0x1FFC]) == []
    assert host.violations == ["malformed TLP: MRD of 2 dwords at 0x1ffc crosses 4 KiB: 00000002 010001ff 00001ffc"]
    dwords = encode(memory_read(0x1000, 4, requester_id=CARD, tag=1))
    dwords[2] |= 1
    assert len(host.receive(dwords)) == 1
    assert host.violations[1].startswith("reserved bits are set: dword 2: 0x00000001: MRD 01:00.0")
    rng = random.Random(12)
    for _ in range(3000):
        words = [rng.getrandbits(32) for _ in range(rng.randrange(0, 8))]
        if words and rng.random() < 0.7:
            kind = rng.choice([0x00, 0x20, 0x40, 0x60, 0x4A, 0x0A, 0x04, 0x44, 0x30, 0x70, 0x4C, 0x91])
            words[0] = kind << 24 | words[0] & 0x00FF_0000 | max(0, len(words) - 3)
        host.receive(words)
    [reply] = host.receive(memory_read(0x1000, 64, requester_id=CARD, tag=77))
    assert reply.tlp.status == CplStatus.SC


def test_host_tags():
    """MODEL-HOST-13: a tag is in use until its last completion is with the card; widths are as enabled; others do not collide."""
    host = make_host()
    host.assume_enabled(1, ext_tag=False)
    replies = host.receive(memory_read(0x1010, 512, requester_id=CARD, tag=5))
    host.receive(memory_read(0x1000, 4, requester_id=CARD + 1, tag=5))
    assert host.violations == []
    assert sorted(host.outstanding) == [(CARD, 5), (CARD + 1, 5)]
    for reply in replies[:-1]:
        host.sent(reply)
    again = memory_read(0x2000, 4, requester_id=CARD, tag=5)
    host.receive(again)
    assert host.violations == [f"tag is still in use: {again}"]
    host.sent(replies[-1])
    assert len(host.receive(again)) == 1
    assert len(host.violations) == 1
    host.receive(memory_read(0x1000, 4, requester_id=CARD + 1, tag=31))
    assert len(host.violations) == 1
    host.receive(memory_read(0x1000, 4, requester_id=CARD + 1, tag=32))
    assert host.violations[1].startswith("tag is wider")
    assert host.statistics.most_outstanding == 4


# -- a card made of the configuration space model --


def description(**changes):
    known = {
        "vendor": 0x1AF4, "device": 0x1042, "class_code": 0x018000, "revision": 1, "subsystem": 0x42, "subsystem_vendor": 0x1AF4,
        "bars": {0: BarDescription(16384), 2: BarDescription(4096), 4: BarDescription(256, is_64=False)},
        "capabilities": (pcie_capability(mps_supported=512, flr=True), msix_capability(4, table_bar=2, table_offset=0, pba_bar=2,
                         pba_offset=0x800), virtio_capability(1, 0, 0, 64), virtio_capability(4, 0, 0x2000, 64)),
        "ext_capabilities": (CapabilityDescription(0x000D, bytes(4)), CapabilityDescription(0x000B, bytes(8))),
    }  # fmt: skip
    return FunctionDescription(**known | changes)


class FakeCard:
    """Answers configuration and memory requests from `ConfigSpace` and plain bytes behind the BARs."""

    def __init__(self, *functions):
        self.spaces = {n: functions[n] for n in range(len(functions)) if functions[n] is not None}
        self.bars = {(n, bar): bytearray(min(known.size, 1 << 20))
                     for n, space in self.spaces.items() for bar, known in space.description.bars.items()}  # fmt: skip
        self.captured = {n: n for n in self.spaces}  # routing IDs [PCIe5 2.2.9]
        self.seen = []
        self.crs_left = 0

    def receive(self, dwords):
        """Return the completions for one TLP."""
        request = decode(dwords)
        self.seen.append(request)
        answer = {"requester_id": request.requester_id, "tag": request.tag, "completer_id": CARD}
        refusal = Tlp(TlpType.CPL, status=CplStatus.UR, byte_count=4, **answer)
        if request.type in (TlpType.CFGRD0, TlpType.CFGWR0):
            number = request.completer_id & 0xFF
            if number in self.captured and request.type is TlpType.CFGWR0:
                self.captured[number] = request.completer_id
            answer["completer_id"] = self.captured.get(number, 0)
            if self.crs_left:
                self.crs_left -= 1
                return [Tlp(TlpType.CPL, status=CplStatus.CRS, byte_count=4, **answer)]
            space = self.spaces.get(number)
            if space is None or request.completer_id >> 8 != 1:
                return [replace(refusal, completer_id=answer["completer_id"])]
            if request.type is TlpType.CFGRD0:
                data = space.read_dword(request.register).to_bytes(4, "little")
                return [Tlp(TlpType.CPLD, length_dw=1, data=data, byte_count=4, **answer)]
            space.write_dword(request.register, request.first_be, int.from_bytes(request.data, "little"))
            return [Tlp(TlpType.CPL, byte_count=4, **answer)]
        for n, space in self.spaces.items():
            hit = space.decode(request.address)
            if hit is None:
                continue
            bar, offset = self.bars[n, hit[0]], hit[1]
            if request.type is TlpType.MWR:
                for at, byte in request.enabled_bytes():
                    bar[offset + at - request.address] = byte
                return []
            start, length = request.byte_span()
            data = bytes(bar[offset : offset + 4 * request.length_dw])
            answer["completer_id"] = self.captured[n]
            return [Tlp(TlpType.CPLD, length_dw=request.length_dw, data=data, byte_count=length, lower_address=start & 0x7F, **answer)]
        return [replace(refusal, byte_count=request.byte_span()[1], lower_address=request.byte_span()[0] & 0x7F)
                ] if request.type is TlpType.MRD else []  # fmt: skip


class Bench:
    """Performs operations of software on a host and a card, without time."""

    def __init__(self, *functions, policy=None, **options):
        self.host = Host(GuestMemory(), rng=random.Random(5), policy=policy, **options)
        self.card = FakeCard(*(known if known is None or isinstance(known, ConfigSpace) else ConfigSpace(known) for known in functions))
        self.operations = 0

    def to_card(self, tlps):
        for tlp in tlps:
            for answer in self.card.receive(encode(tlp)):
                self.to_card(reply.tlp for reply in self.host.receive(encode(answer)))

    def perform(self, operation):
        self.operations += 1
        match operation:
            case Delay():
                return None
            case WaitInterrupt(function, vector):
                return self.host.take_interrupt(function, vector)
        pending = self.host.start(operation)
        self.to_card(pending.tlps)
        assert pending.done
        return pending.result

    def run(self, software):
        return run(software, self.perform)


def iommu_description():
    return description(device=0x0014, vendor=0x1B36, class_code=0x080600, is_multi_function=True, bars={0: BarDescription(4096)},
                       capabilities=(pcie_capability(mps_supported=256, ext_tag=False),
                                     msix_capability(16, table_bar=0, table_offset=0x300, pba_bar=0, pba_offset=0x400)),
                       ext_capabilities=())  # fmt: skip


def test_host_enumerate():
    """MODEL-HOST-14: a card of two functions is found, sized, placed, limited and enabled, and works as it was found (R57, R58)."""
    bench = Bench(iommu_description(), description(is_multi_function=True), mps=512)
    iommu, blk = bench.run(host_module.enumerate(bench.host))
    assert (iommu.function, iommu.vendor, iommu.device, iommu.class_code) == (0, 0x1B36, 0x0014, 0x080600)
    assert (blk.function, blk.vendor, blk.device, blk.class_code, blk.revision) == (1, 0x1AF4, 0x1042, 0x018000, 1)
    assert (blk.subsystem_vendor, blk.subsystem) == (0x1AF4, 0x42)
    assert iommu.problems == blk.problems == []
    assert {n: (bar.size, bar.is_64, bar.prefetch) for n, bar in blk.bars.items()} == {
        0: (16384, True, False), 2: (4096, True, False), 4: (256, False, False)}  # fmt: skip
    places = sorted((bar.address, bar.address + bar.size) for info in (iommu, blk) for bar in info.bars.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    assert all(bar.address % bar.size == 0 for info in (iommu, blk) for bar in info.bars.values())
    assert blk.bars[4].address >> 28 == 0xE
    assert iommu.bars[0].address == 0x10_0000_0000
    offsets = bench.card.spaces[1].offsets
    assert blk.capabilities == {0x10: [offsets[0]], 0x11: [offsets[1]], 0x09: offsets[2:]}
    assert blk.ext_capabilities == {0x0D: [0x100], 0x0B: [0x108]}
    assert iommu.ext_capabilities == {}
    assert (blk.msix.count, blk.msix.table_bar, blk.msix.table_offset, blk.msix.pba_offset) == (4, 2, 0, 0x800)
    assert (iommu.msix.count, iommu.msix.table_offset, iommu.msix.pba_offset) == (16, 0x300, 0x400)
    for n, info, ext_tag in ((0, iommu, 0), (1, blk, 1)):
        space = bench.card.spaces[n]
        assert (space.memory_enable, space.bus_master) == (True, True)
        assert {bar: space.bar_address(bar) for bar in space.description.bars} == {bar: info.bars[bar].address for bar in info.bars}
        control = space.read(info.capabilities[0x10][0] + 8, 2)
        assert (control >> 5 & 7, control >> 12 & 7, control >> 8 & 1) == (1, 2, ext_tag), "MPS is that of the weaker function"
        bench.run(iter_software([MemoryWrite(info.bars[0].address + 8, 8, 0x1122_3344_5566_7788 + n)]))
        assert bench.card.bars[n, 0][8:16] == (0x1122_3344_5566_7788 + n).to_bytes(8, "little")
    assert bench.host.violations == []
    assert bench.host.function(1).mps == 256
    bench.host.receive(memory_write(0x1000, bytes(256), requester_id=CARD + 1))
    bench.host.receive(memory_read(0x1000, 512, requester_id=CARD + 1, tag=255))
    assert bench.host.violations == []
    bench.host.receive(memory_write(0x1000, bytes(260), requester_id=CARD + 1))
    bench.host.receive(memory_read(0x1000, 4, requester_id=CARD, tag=32))
    assert len(bench.host.violations) == 2


def iter_software(operations):
    """Software that performs a list of operations and returns the results."""
    results = []
    for operation in operations:
        results.append((yield operation))
    return results


def test_host_enumerate_single():
    """MODEL-HOST-15: without the multi-function bit nobody looks further; no card at all is an empty list; RCB 128 is passed on."""
    bench = Bench(description(), description(), rcb=128, ext_tag=False)
    [info] = bench.run(host_module.enumerate(bench.host))
    assert (info.function, info.is_multi_function) == (0, False)
    assert not [request for request in bench.card.seen if request.type is TlpType.CFGRD0 and request.completer_id & 0xFF]
    pcie = info.capabilities[0x10][0]
    assert bench.card.spaces[0].read(pcie + 0x10, 2) & 8
    assert not bench.card.spaces[0].read(pcie + 8, 2) & 0x100
    assert Bench().run(host_module.enumerate(Bench().host)) == []
    sparse = Bench(description(is_multi_function=True), None, None, description())
    assert [info.function for info in sparse.run(host_module.enumerate(sparse.host))] == [0, 3]


def test_host_enable_msix():
    """MODEL-HOST-16: the table gets one message per vector, the rest stays masked, messages are told apart by function and vector (R19)."""
    bench = Bench(iommu_description(), description())
    infos = bench.run(host_module.enumerate(bench.host))
    for n in (0, 1):
        messages = bench.run(enable_msix(infos[n], 3))
        table = bench.card.bars[n, infos[n].msix.table_bar][infos[n].msix.table_offset :]
        for vector in range(infos[n].msix.count):
            words = [int.from_bytes(table[16 * vector + k : 16 * vector + k + 4], "little") for k in (0, 4, 8, 12)]
            if vector < 3:
                assert (words[0] | words[1] << 32, words[2], words[3]) == (*messages[vector], 0)
                assert 0xFEE0_0000 <= messages[vector][0] < 0xFEF0_0000
            else:
                assert words[3] == 1
        control = bench.card.spaces[n].read(infos[n].msix.offset + 2, 2)
        assert control >> 14 == 2
        for vector in (2, 0, 0):
            address, data = messages[vector]
            bench.host.receive(memory_write(address, data.to_bytes(4, "little"), requester_id=CARD + n))
            assert bench.host.interrupts[-1] == Interrupt(n, vector, address, data)
    assert bench.host.violations == []
    assert bench.host.statistics.writes == 0
    assert bench.host.statistics.interrupts == 6
    assert bench.host.interrupt_counts[messages[0]] == 2
    assert bench.run(iter_software([WaitInterrupt(1, v, 10) for v in (0, 0, 0, 1, 2, 2)])) == [True, True, False, False, True, False]
    address, data = messages[1]
    bench.host.receive(memory_write(address + 0x1000, data.to_bytes(4, "little"), requester_id=CARD + 1))
    assert bench.host.interrupts[-1].vector == 1, "the address may have been translated"
    assert bench.host.violations == []
    bench.host.receive(memory_write(address, (data + 64).to_bytes(4, "little"), requester_id=CARD + 1))
    bench.host.receive(memory_write(address, data.to_bytes(4, "little"), requester_id=CARD))
    assert [text.split(":")[0] for text in bench.host.violations] == [
        "interrupt that no vector of 01", "interrupt that no vector of 01"]  # fmt: skip
    assert [found.vector for found in bench.host.interrupts[-2:]] == [None, None]
    with pytest.raises(ValueError, match="between 0 and 4, not 5"):
        bench.run(enable_msix(infos[1], 5))


def test_host_msix_elsewhere():
    """MODEL-HOST-17: a message to an address of its own is an interrupt; other writes there are not; after FLR none is, and reads end."""
    bench = Bench(description())
    [info] = bench.run(host_module.enumerate(bench.host))
    messages = bench.run(enable_msix(info, 2, message_address=0x8000_0000))
    assert [address for address, _ in messages] == [0x8000_0000, 0x8000_0010]
    message = memory_write(0x8000_0010, messages[1][1].to_bytes(4, "little"), requester_id=CARD)
    bench.host.receive(message)
    assert bench.host.take_interrupt(0, 1)
    bench.host.receive(memory_write(0x8000_0010, bytes(4), requester_id=CARD))
    bench.host.receive(memory_write(0x8000_0000, bytes(8), requester_id=CARD))
    assert bench.host.statistics.interrupts == 1
    assert bench.host.statistics.writes == 2
    assert bench.host.violations == []
    pcie = info.capabilities[0x10][0]
    bench.run(iter_software([ConfigWrite(0, pcie + 8, 2, 0x8000 | 0x2930)]))
    assert bench.card.spaces[0].resets == 1
    bench.host.receive(memory_read(0x1000, 4, requester_id=CARD, tag=200))  # made before it
    bench.host.receive(memory_write(0x1000, bytes(4), requester_id=CARD))  # the answer came first
    assert bench.host.violations == []
    bench.run(iter_software([ConfigRead(0, 0, 4)]))
    bench.host.receive(memory_read(0x1000, 4, requester_id=CARD, tag=201))
    assert [text.split(":")[0] for text in bench.host.violations] == ["tag is wider than enabled", "read without bus master"]
    bench.host.violations.clear()
    bench.host.receive(message)
    assert bench.host.violations[0].startswith("write without bus master")
    assert bench.host.statistics.interrupts == 1


class RawSpace(ConfigSpace):
    """A configuration space with bytes changed at will: dword offset -> what reads return."""

    def __init__(self, known, changes):
        super().__init__(known)
        self.changes = changes

    def read_dword(self, register):
        return self.changes.get(register, super().read_dword(register))


@pytest.mark.parametrize("problem, changes", [
    ("capability list loops at 0x40", {0x40: 0x0002_4010}),
    ("capability list loops at 0x40", {0x7C: 0x0003_4011}),
    ("capability list leads to 0x20, inside the header", {0x40: 0x0002_2010}),
    ("capability list leads to 0x4, inside the header", {0x34: 0x0000_0004}),
    ("capability list leads to nothing at 0xf0", {0x40: 0x0002_F010, 0xF0: 0xFFFF_FFFF}),
    ("extended capability list loops at 0x100", {0x100: 0x1001_000D}),
    ("extended capability list loops at 0x100", {0x108: 0x1001_000B}),
    ("extended capability list leads to 0x40, below 0x100", {0x100: 0x0401_000D}),
    ("extended capability list leads to nothing at 0x200", {0x100: 0x2001_000D}),
    ("header type must be 0, not 1", {0x0C: 0x0001_0000}),
    ("BAR 0 has the writable bits", {0x10: 0xFFF0_0FF4}),
    ("BAR 5 must not be a 64-bit BAR", {0x24: 0xFFFF_F004}),
    ("BAR 4 reads back", {0x20: 0xFFFF_FF00}),
    ("MSI-X: BAR 1 does not hold", {0x80: 0x0000_0001}),
    ("MSI-X: BAR 2 does not hold 64 bytes at 0xfc8", {0x80: 0x0000_0FCA}),
])  # fmt: skip
def test_host_enumerate_hostile(problem, changes):
    """MODEL-HOST-18: a broken configuration space is reported by name and enumeration ends (R66)."""
    bench = Bench(RawSpace(description(), changes))
    [info] = bench.run(host_module.enumerate(bench.host))
    assert [text for text in info.problems if text.startswith(problem)] == info.problems[:1]
    assert bench.operations < 400


def test_host_enumerate_noise():
    """MODEL-HOST-19: whatever a card answers to configuration reads, enumeration ends."""
    rng = random.Random(3)
    for n in range(60):
        style = n % 4

        class Noise(ConfigSpace):
            def read_dword(self, register, style=style):
                value = rng.getrandbits(32)
                if style == 0:
                    return value
                if style == 1 and register < 0x40:
                    return super().read_dword(register)
                return value & 0xFFF0_00FF if register >= 0x100 else value

        bench = Bench(Noise(description(is_multi_function=True)))
        bench.run(host_module.enumerate(bench.host))
        assert bench.operations < 1100 * 8


def test_host_bars_find_no_room():
    """MODEL-HOST-20: a BAR larger than what is left is reported and left as it was; the others are placed."""
    bench = Bench(description(bars={0: BarDescription(1 << 62), 2: BarDescription(4096), 4: BarDescription(1 << 30, is_64=False),
                                    5: BarDescription(32, is_64=False, is_io=True)}, capabilities=()))  # fmt: skip
    [info] = bench.run(host_module.enumerate(bench.host))
    assert info.problems == [f"BAR 0 of {1 << 62:#x} bytes finds no room", f"BAR 4 of {1 << 30:#x} bytes finds no room"]
    assert sorted(info.bars) == [2, 5]
    assert (info.bars[5].is_io, info.bars[5].size, info.bars[5].address) == (True, 32, 0)
    assert bench.card.spaces[0].bar_address(0) == 0



# -- the host as requester --


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_host_memory_operations(size):
    """MODEL-HOST-21: reads and writes of 1 to 8 bytes at any alignment reach their bytes; aligned ones are one TLP (R05, R14)."""
    bench = Bench(description())
    [info] = bench.run(host_module.enumerate(bench.host))
    base, bar = info.bars[0].address, bench.card.bars[0, 0]
    bar[:] = pattern(16384)
    for offset in [*range(17), 60, 61, 127, *range(4096 - 9, 4096 + 1), 16384 - size]:
        bench.card.seen.clear()
        wanted = int.from_bytes(bar[offset : offset + size], "little")
        assert bench.run(iter_software([MemoryRead(base + offset, size)])) == [wanted]
        value = random.Random(offset).getrandbits(8 * size)
        copy = bytearray(bar)
        copy[offset : offset + size] = value.to_bytes(size, "little")
        assert bench.run(iter_software([MemoryWrite(base + offset, size, value)])) == [None]
        assert bar == copy
        crosses = offset % 4096 + size > 4096
        assert len(bench.card.seen) == (4 if crosses else 2)
    assert bench.host.violations == []


def test_host_config_operations():
    """MODEL-HOST-22: configuration accesses of 1, 2 and 4 bytes; an absent function and an unclaimed address read all ones."""
    bench = Bench(description())
    assert bench.run(iter_software([ConfigRead(0, 0, 4), ConfigRead(0, 2, 2), ConfigRead(0, 0x0B, 1), ConfigRead(3, 0, 2),
                                    MemoryRead(0x1234, 4), MemoryRead(0x1234, 8)])) == [
        0x1042_1AF4, 0x1042, 0x01, 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1]  # fmt: skip
    bench.run(iter_software([ConfigWrite(0, 0x3C, 1, 0x55), ConfigWrite(0, 0x12, 2, 0x8000)]))
    assert bench.card.spaces[0].read(0x3C, 1) == 0x55
    assert bench.card.spaces[0].read(0x10, 4) == 0x8000_0004
    assert [(r.register, r.first_be, r.completer_id) for r in bench.card.seen[-2:]] == [(0x3C, 1, CARD), (0x10, 0b1100, CARD)]
    pending = bench.host.start(ConfigWrite(2, 4, 2, 0))
    bench.to_card(pending.tlps)
    assert (pending.done, pending.result, pending.status) == (True, None, "UR")
    assert bench.host.violations == []


def good_completion(request, data=b"\1\2\3\4", **changes):
    fields = {"type": TlpType.CPLD, "length_dw": 1, "requester_id": request.requester_id, "tag": request.tag,
              "completer_id": CARD, "byte_count": 4, "lower_address": request.address & 0x7F, "data": data}  # fmt: skip
    return Tlp(**fields | changes)


@pytest.mark.parametrize("status, rule, changes", [
    ("MALFORMED", "byte count and lower address", {"byte_count": 8}),
    ("MALFORMED", "byte count and lower address", {"byte_count": 3}),
    ("MALFORMED", "byte count and lower address", {"lower_address": 0}),
    ("MALFORMED", "wrong type", {"type": TlpType.CPL, "length_dw": 0, "data": b""}),
    ("MALFORMED", "wrong type", {"type": TlpType.CPLDLK}),
    ("MALFORMED", "2 dwords for 4 bytes", {"length_dw": 2, "data": bytes(8)}),
    ("UR", "without success carries data", {"status": CplStatus.UR}),
    ("UR", "status is reserved", {"status": 5, "type": TlpType.CPL, "length_dw": 0, "data": b""}),
    ("CRS", "status is reserved", {"status": CplStatus.CRS, "type": TlpType.CPL, "length_dw": 0, "data": b""}),
    ("CA", None, {"status": CplStatus.CA, "type": TlpType.CPL, "length_dw": 0, "data": b""}),
    ("POISONED", None, {"poisoned": True}),
    ("OK", "TC or attributes", {"tc": 3}),
    ("OK", "TC or attributes", {"relaxed_ordering": True}),
    ("OK", "completer ID", {"completer_id": CARD + 1}),
    ("OK", None, {}),
    (None, "unexpected", {"tag": 200}),
    (None, "unexpected", {"requester_id": 0x0100}),
])  # fmt: skip
def test_host_bad_completions(status, rule, changes):
    """MODEL-HOST-23: a wrong completion ends the operation with its status and is reported; the next operation works (R03)."""
    bench = Bench(description())
    [info] = bench.run(host_module.enumerate(bench.host))
    pending = bench.host.start(MemoryRead(info.bars[0].address + 0x44, 4))
    [request] = pending.tlps
    assert bench.host.receive(encode(good_completion(request, **changes))) == []
    assert len(bench.host.violations) == (rule is not None)
    assert all(rule in text for text in bench.host.violations)
    assert pending.done is (status is not None)
    if status is not None:
        assert pending.status == status
        assert pending.result == (0x0403_0201 if status == "OK" else 0xFFFF_FFFF)
    bench.host.violations.clear()
    if status is None:
        bench.host.receive(good_completion(request))
        assert pending.status == "OK"
    else:
        bench.host.receive(good_completion(request))
        assert bench.host.violations[0].startswith("unexpected completion")
        bench.host.violations.clear()
    assert bench.run(iter_software([MemoryRead(info.bars[0].address, 4), ConfigRead(0, 0, 2)])) == [0, 0x1AF4]
    assert bench.host.violations == []


def test_host_split_answers():
    """MODEL-HOST-24: an answer in two completions is put together when it is cut at 128 bytes, and reported when it is not."""
    host = make_host()
    pending = host.start(MemoryRead(0x1_0000_007C, 8))
    first = Tlp(TlpType.CPLD, length_dw=1, tag=pending.tlps[0].tag, completer_id=CARD, byte_count=8, lower_address=0x7C, data=b"\1\2\3\4")
    host.receive(first)
    assert not pending.done
    host.receive(replace(first, byte_count=4, lower_address=0, data=b"\5\6\7\x08"))
    assert (pending.status, pending.result) == ("OK", 0x0807_0605_0403_0201)
    assert host.violations == []
    pending = host.start(MemoryRead(0x1_0000_0078, 8))
    first = replace(first, tag=pending.tlps[0].tag, lower_address=0x78)
    host.receive(first)
    host.receive(replace(first, byte_count=4, lower_address=0x7C))
    assert pending.result == 0x0403_0201_0403_0201
    assert len(host.violations) == 1
    assert host.violations[0].startswith("a completion that is not the last")


def test_host_retry_status():
    """MODEL-HOST-25: configuration requests are repeated on CRS, a hundred times at most, then read all ones."""
    bench = Bench(description())
    bench.card.crs_left = 5
    assert bench.run(iter_software([ConfigRead(0, 0, 2)])) == [0x1AF4]
    assert len(bench.card.seen) == 6
    bench.card.crs_left = 1000
    assert bench.run(iter_software([ConfigRead(0, 0, 2)])) == [0xFFFF]
    assert bench.card.crs_left == 1000 - 101
    assert bench.host.violations == []


def test_host_abandon():
    """MODEL-HOST-26: an operation that is given up ends; its tag is not used before its completion, which does no harm."""
    host = make_host()
    pending = host.start(MemoryRead(0x1_0000_0000, 4))
    host.abandon(pending)
    assert (pending.done, pending.status, pending.result) == (True, "TIMEOUT", 0xFFFF_FFFF)
    host.abandon(pending)
    lost = pending.tlps[0].tag
    used = [host.start(MemoryRead(0x1_0000_0000, 4)) for _ in range(255)]
    assert lost not in [other.tlps[0].tag for other in used]
    with pytest.raises(RuntimeError, match="All 256 tags"):
        host.start(MemoryRead(0x1_0000_0000, 4))
    host.receive(good_completion(pending.tlps[0]))
    assert pending.result == 0xFFFF_FFFF
    assert host.statistics.late_completions == 1
    assert host.start(MemoryRead(0x1_0000_0000, 4)).tlps[0].tag == lost
    assert host.violations == []
    crossing = make_host()
    pending = crossing.start(MemoryRead(0x1_0000_0FFE, 4))
    assert [tlp.byte_span() for tlp in pending.tlps] == [(0x1_0000_0FFE, 2), (0x1_0000_1000, 2)]
    crossing.receive(Tlp(TlpType.CPL, status=CplStatus.CA, tag=pending.tlps[0].tag, completer_id=CARD, byte_count=2, lower_address=0x7E))
    assert (pending.status, pending.result) == ("CA", 0xFFFF_FFFF)
    crossing.receive(good_completion(pending.tlps[1], byte_count=2))
    assert (crossing.statistics.late_completions, crossing.violations) == (1, [])


def test_host_limits_follow_software():
    """MODEL-HOST-27: while a write of Command or Device Control is under way old and new count, afterwards only the new one."""
    bench = Bench(description())
    [info] = bench.run(host_module.enumerate(bench.host))
    host, control = bench.host, info.capabilities[0x10][0] + 8

    def broken(tlp):
        before = len(host.violations)
        for reply in host.receive(tlp):
            host.sent(reply)
        return len(host.violations) - before

    write, read = memory_write(0x1000, b"abcd", requester_id=CARD), memory_read(0x1000, 4, requester_id=CARD, tag=1)
    assert broken(write) == broken(read) == 0
    off = host.start(ConfigWrite(0, 4, 1, 2))
    assert broken(write) == broken(read) == 0
    bench.to_card(off.tlps)
    assert broken(write) == 1
    assert broken(read) == 0, "a completion may overtake a read"
    bench.run(iter_software([ConfigRead(0, 0, 4)]))
    assert broken(read) == 1
    on = host.start(ConfigWrite(0, 4, 2, 6))
    assert broken(write) == broken(read) == 0
    bench.to_card(on.tlps)
    assert broken(write) == 0

    big, far = memory_write(0x1000, bytes(256), requester_id=CARD), memory_read(0x1000, 512, requester_id=CARD, tag=2)
    ordered = memory_write(0x1000, b"abcd", requester_id=CARD, relaxed_ordering=True)
    snooped = memory_write(0x1000, b"abcd", requester_id=CARD, no_snoop=True)
    assert [broken(tlp) for tlp in (big, far, ordered, snooped)] == [0, 0, 0, 0]
    less = host.start(ConfigWrite(0, control, 2, 0x0000))
    assert [broken(tlp) for tlp in (big, far, ordered, snooped)] == [0, 0, 0, 0]
    assert [reply.tlp.length_dw for reply in host.receive(far)] == [32] * 4, "completions fit the smaller of the two"
    host.outstanding.clear()
    bench.to_card(less.tlps)
    assert [broken(tlp) for tlp in (big, far, ordered, snooped)] == [1, 1, 1, 1]
    refused = host.start(ConfigWrite(0, control, 2, 0x5810))
    host.receive(Tlp(TlpType.CPL, status=CplStatus.CA, tag=refused.tlps[0].tag, completer_id=CARD, byte_count=4))
    assert [broken(tlp) for tlp in (far, ordered, snooped)] == [1, 1, 1]
    host.abandon(host.start(ConfigWrite(0, control, 2, 0x5810)))
    assert [broken(tlp) for tlp in (far, ordered, snooped)] == [0, 0, 0]
    bench.run(iter_software([ConfigWrite(0, control + 1, 1, 0x00), ConfigWrite(0, control, 1, 0x00)]))
    assert [broken(tlp) for tlp in (far, ordered, snooped)] == [1, 1, 1]


def test_host_messages():
    """MODEL-HOST-28: messages are kept as they came."""
    host = make_host()
    error = Tlp(TlpType.MSG, requester_id=CARD, message_code=0x31)
    assert host.receive(encode(error)) == []
    assert host.messages == [error]
    assert (host.statistics.messages, host.violations) == (1, [])


def test_host_parameters():
    """MODEL-HOST-29: operations, policies, faults and hosts that cannot be are refused with a sentence."""
    for message, make in (
        ("one of 1, 2, 4 bytes, not 8", lambda: ConfigRead(0, 0, 8)),
        ("below 4096 and aligned to its size, not 4096", lambda: ConfigRead(0, 4096, 1)),
        ("below 4096 and aligned to its size, not 2", lambda: ConfigWrite(0, 2, 4, 0)),
        ("fit in 16 bits without a sign, not 65536", lambda: ConfigWrite(0, 2, 2, 65536)),
        ("one of 1, 2, 4, 8 bytes, not 3", lambda: MemoryRead(0, 3)),
        ("one of 1, 2, 4, 8 bytes, not 16", lambda: MemoryWrite(0, 16, 0)),
        ("fit in 8 bits without a sign, not -1", lambda: MemoryWrite(0, 1, -1)),
        ("must be one of UR, CA, .* not 'ur'", lambda: Fault("ur", always)),
        ("must not be negative, not -1 and 0", lambda: CompletionPolicy(latency=-1)),
        ("must be 'max', 'rcb' or 'random', not 'min'", lambda: CompletionPolicy(split="min")),
        ("Max_Payload_Size must be a power of two between 128 and 4096, not 100", lambda: make_host(mps=100)),
        ("Max_Read_Request_Size must be a power of two between 128 and 4096, not 64", lambda: make_host(mrrs=64)),
        ("must be 64 or 128, not 32", lambda: make_host(rcb=32)),
        ("between 0 and 255, not 256", lambda: make_host(bus=256)),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="configuration and memory operations, not Delay"):
        make_host().start(Delay(1))
    assert repr(make_host().start(MemoryRead(0, 4))) == "Pending(MemoryRead(address=0, size=4), under way)"


def test_host_run():
    """MODEL-HOST-30: a generator gets each result, nested ones too, and returns its value."""

    def inner():
        return (yield Delay(1)) + (yield Delay(2))

    def outer():
        first = yield from inner()
        return [first, (yield Delay(10))]

    assert run(outer(), lambda operation: operation.cycles * 3) == [9, 30]
    assert run(iter_software([]), lambda operation: None) == []


def test_host_is_the_only_way_to_memory():
    """MODEL-HOST-31: every access of a card is logged with its function; software's own carry no name (R01)."""
    memory = GuestMemory(log=True)
    host = make_host(memory)
    host.assume_enabled(3)
    memory.write(0x1000, b"software")
    host.receive(memory_write(0x2000, b"abcd", requester_id=CARD + 3))
    host.receive(memory_read(0x1001, 6, requester_id=CARD, tag=1))
    host.receive(Tlp(TlpType.MWR, length_dw=1, requester_id=CARD, address=0x3000, first_be=0b0101, data=b"wxyz"))
    host.receive(memory_write(0xFEE0_0000, b"abcd", requester_id=CARD))
    assert [(access.source, access.address, access.data, access.is_write) for access in memory.log] == [
        ("", 0x1000, b"software", True), ("01:00.3", 0x2000, b"abcd", True), ("01:00.0", 0x1001, b"oftwar", False),
        ("01:00.0", 0x3000, b"w", True), ("01:00.0", 0x3002, b"y", True)]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 5000)), min_size=1, max_size=6), st.integers(0, 99))
def test_host_scatter_gather(fragments, seed):
    """MODEL-HOST-32: a structure in 1 to N fragments at any bytes is written and read back whole, in TLPs that the rules allow (R12)."""
    rng = random.Random(seed)
    spans, at = [], 0x1_0000_0000
    for gap, length in fragments:
        spans.append((at + gap, length))
        at += gap + length
    host = make_host(policy=CompletionPolicy(split="random", reorder=True))
    structure = rng.randbytes(sum(length for _, length in spans))
    rest, back = structure, b""
    for start, length in spans:
        for at, size in cuts(start, length, 256):
            host.receive(memory_write(at, rest[:size], requester_id=CARD))
            rest = rest[size:]
    for start, length in spans:
        assert host.memory.read(start, length) == structure[len(back) : len(back) + length]
        for at, size in cuts(start, length, 512):
            replies = host.receive(memory_read(at, size, requester_id=CARD, tag=0))
            back += b"".join(reply.tlp.data for reply in replies)[at % 4 :][:size]
            for reply in replies:
                host.sent(reply)
    assert (rest, back) == (b"", structure)
    assert host.violations == []


def cuts(start, length, limit):
    """Cut a fragment at multiples of ``limit``."""
    edges = [start, *range((start // limit + 1) * limit, start + length, limit), start + length]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def test_host_captured():
    """MODEL-HOST-33: a function knows its bus from configuration writes alone; answers say 0 before the first. [PCIe5 2.2.6.2, 2.2.9]"""
    for changes, rule in (({}, None), ({0: CARD}, "completer ID is not 0x0000"), ({1: CARD + 1}, "completer ID is not 0x0001")):
        bench = Bench(description(), description())
        bench.card.captured.update(changes)
        ids = bench.run(iter_software([ConfigRead(0, 0, 4), ConfigRead(1, 0, 4), ConfigRead(2, 0, 4)]))
        assert ids == [0x1042_1AF4, 0x1042_1AF4, 0xFFFF_FFFF]
        assert len(bench.host.violations) == (rule is not None)
        assert all(rule in text for text in bench.host.violations)
        bench.host.violations.clear()
        bench.run(iter_software([ConfigWrite(0, 0x3C, 1, 5), ConfigWrite(1, 0x3C, 1, 5), ConfigRead(1, 0, 4)]))
        assert bench.host.violations == []
    bench.card.captured[0] = 0x0500
    bench.run(iter_software([ConfigRead(0, 0, 4)]))
    assert len(bench.host.violations) == 1


@pytest.mark.parametrize(("kind", "operands", "old", "new"), [
    (TlpType.FETCHADD, ("01000000",), "ffffffff", "00000000"),
    (TlpType.FETCHADD, ("ff00000001000000",), "0100000000000000", "0001000001000000"),
    (TlpType.SWAP, ("78563412",), "01020304", "78563412"),
    (TlpType.SWAP, ("1122334455667788",), "0000000000000000", "1122334455667788"),
    (TlpType.CAS, ("01020304", "aabbccdd"), "01020304", "aabbccdd"),
    (TlpType.CAS, ("01020305", "aabbccdd"), "01020304", "01020304"),
    (TlpType.CAS, ("0102030400000001", "aa00000000000000"), "0102030400000001", "aa00000000000000"),
    (TlpType.CAS, ("0102030400000000", "aa00000000000000"), "0102030400000001", "0102030400000001"),
])  # fmt: skip
def test_host_atomics(kind, operands, old, new):
    """MODEL-HOST-34: AtomicOps change memory and answer with what it held, in one completion of the operand's size; without permission the
    answer is UR and nothing changes (R17). [PCIe5 2.2.7, 2.2.9, 6.15]"""
    memory = GuestMemory(all_ram=False)
    memory.add_range(0x1000, 0x1000)
    memory.add_range(0x2000, 0x1000, write=False)
    host = make_host(memory)
    host.assume_enabled(0, atomics=True)
    data, size = bytes.fromhex("".join(operands)), len(old) // 2
    memory.write(0x1008, bytes.fromhex(old))
    request = Tlp(kind, requester_id=CARD, tag=7, address=0x1008, length_dw=len(data) // 4, data=data)
    assert decode(encode(request)) == request
    (reply,) = host.receive(request)
    assert (reply.tlp.type, reply.tlp.status, reply.tlp.byte_count, reply.tlp.lower_address) == (TlpType.CPLD, CplStatus.SC, size, 0)
    assert (reply.tlp.tag, reply.tlp.requester_id, reply.tlp.length_dw) == (7, CARD, size // 4)
    assert reply.tlp.data.hex() == old and memory.read(0x1008, size).hex() == new
    host.sent(reply)
    for address in (0x2008, 0x8000):
        (reply,) = host.receive(replace(request, address=address))
        assert reply.tlp.status == CplStatus.UR and reply.tlp.type is TlpType.CPL
        host.sent(reply)
    assert memory.read(0x2008, size) == bytes(size)
    assert not host.violations and host.statistics.atomics == 3


def test_host_device_control_2():
    """MODEL-HOST-35: AtomicOps and tags of 10 bits are against the rules until Device Control 2 allows them; then tags below 256 are;
    while the write is under way either is allowed. [PCIe5 2.2.6.2, 7.5.3.16]"""
    host = make_host()
    host.function(0).pcie = 0x40

    def broken(tag=0, kind=TlpType.MRD):
        host.violations.clear()
        data = bytes(4) if kind is TlpType.FETCHADD else b""
        enables = 0 if data else 15
        for reply in host.receive(Tlp(kind, requester_id=CARD, tag=tag, address=0x1000, length_dw=1, first_be=enables, data=data)):
            host.sent(reply)
        return [text.split(":")[0] for text in host.violations]

    assert broken() == [] and broken(256) == ["tag is wider than enabled"]
    assert broken(kind=TlpType.FETCHADD) == ["AtomicOp is not enabled"]
    pending = host.start(ConfigWrite(0, 0x40 + 0x28, 2, 0x1040))
    assert broken() == broken(300) == broken(1023) == broken(kind=TlpType.FETCHADD) == []
    (write,) = pending.tlps
    host.receive(Tlp(TlpType.CPL, requester_id=0, tag=write.tag, completer_id=CARD, byte_count=4))
    host.function(0).end_grace()
    assert pending.status == "OK"
    assert broken(256) == [] and broken(300, TlpType.FETCHADD) == []
    assert broken(255) == ["tag of 10 bits has 00 in bits 9"]
