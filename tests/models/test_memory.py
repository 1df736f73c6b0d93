"""Guest memory against a plain dict of bytes, and what may and may not be torn."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import Access, AccessFault, Gpa, GuestMemory, Iova, Spa

TOP = 1 << 64
ORDERS = {"le": "little", "be": "big"}
SIZES = {"uw": 2, "l": 4, "q": 8}

# Places where pages, words and the space end.
places = st.one_of(
    st.sampled_from([0, 1, 7, 4088, 4095, 4096, (1 << 32) - 5, 1 << 32, (1 << 63) - 3, TOP - 4099, TOP - 8, TOP - 1]),
    st.integers(0, 3 * 4096),
)


class ByteOracle:
    """The same memory as a dict of bytes."""

    def __init__(self):
        self.bytes = {}

    def read(self, address, length):
        return bytes(self.bytes.get(address + n, 0) for n in range(length))

    def write(self, address, data):
        for n in range(len(data)):
            self.bytes[address + n] = data[n]


def fault_of(call, *arguments):
    with pytest.raises(AccessFault) as info:
        call(*arguments)
    return info.value.address, info.value.length, info.value.is_write, info.value.reason


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), places, st.one_of(st.binary(max_size=20), st.integers(4000, 9000).map(bytes)))),
       st.sampled_from([None, lambda *piece: None]))  # fmt: skip
def test_memory_oracle(accesses, interleaver):
    """MODEL-MEM-1: any reads and writes, over pages and up to the last byte of 64 bits, as a dict of bytes has it (R02, R14)."""
    memory, oracle = GuestMemory(log=True), ByteOracle()
    memory.interleaver = interleaver
    done = []
    for is_write, address, data in accesses:
        if address + len(data) > TOP:
            assert fault_of(memory.write, address, data) == (address, len(data), True, "unmapped")
            assert fault_of(memory.read, address, len(data)) == (address, len(data), False, "unmapped")
        elif is_write:
            memory.write(address, data, source="a")
            oracle.write(address, data)
            done.append(Access(address, data, True, "a"))
        else:
            found = memory.read(address, len(data), source="b")
            assert found == oracle.read(address, len(data))
            done.append(Access(address, found, False, "b"))
    assert memory.log == done
    memory.interleaver, memory.is_logged = None, False
    for address in oracle.bytes:
        assert memory.load_ub(address) == oracle.bytes[address]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SIZES)
def test_memory_accessors(name, order):
    """MODEL-MEM-2: each accessor moves its bytes in its stated order, at any alignment, across pages (R04, R09, R11, R14)."""
    size, rng = SIZES[name], random.Random(2)
    memory = GuestMemory()
    load, store = getattr(memory, f"load_{name}_{order}"), getattr(memory, f"store_{name}_{order}")
    for address in [*range(24), *range(4096 - 9, 4096 + 9), TOP - size]:
        value = rng.getrandbits(8 * size)
        store(address, value)
        assert memory.read(address, size) == value.to_bytes(size, ORDERS[order])
        assert load(address) == value
    for bad in (-1, 1 << 8 * size):
        with pytest.raises(ValueError, match=f"must fit in {8 * size} bits without a sign, not {bad}"):
            store(0, bad)
    assert fault_of(load, TOP - size + 1) == (TOP - size + 1, size, False, "unmapped")


def test_memory_accessor_names():
    """MODEL-MEM-3: bytes have one pair of accessors, everything longer states its byte order in the name (R02, R04, R09)."""
    names = {name for name in dir(GuestMemory) if name.startswith(("load_", "store_"))}
    assert names == {f"{verb}_ub" for verb in ("load", "store")} | {
        f"{verb}_{size}_{order}" for verb in ("load", "store") for size in SIZES for order in ORDERS}  # fmt: skip
    assert len({Iova, Gpa, Spa}) == 3  # one type per kind of address (R02)
    memory = GuestMemory()
    memory.store_ub(5, 0xA5)
    assert memory.load_ub(5) == 0xA5
    memory.write(8, b"\x01\x02\x03\x04\x05\x06\x07\x08")  # payload bytes stay where they are (R10)
    assert (memory.load_q_le(8), memory.load_l_be(8), memory.load_uw_le(9)) == (0x0807060504030201, 0x01020304, 0x0302)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_memory_aligned_words_are_never_torn(size):
    """MODEL-MEM-4: another CPU flips the word between pieces; aligned loads and stores stay whole (R05, R06)."""
    name = {2: "uw", 4: "l", 8: "q"}[size]
    memory = GuestMemory()
    values = [bytes(size), b"\xff" * size]
    load, store = getattr(memory, f"load_{name}_le"), getattr(memory, f"store_{name}_le")
    seen, turn = set(), [0]

    def flip(address, length, is_write):
        turn[0] ^= 1
        if is_write:
            seen.add(memory.read(at, size))
        else:
            memory.write(at, values[turn[0]])

    memory.interleaver = flip
    for at in (0x100, 4096 - size, TOP - size):
        for _ in range(4):
            seen.add(load(at).to_bytes(size, "little"))
            store(at, 0)
            store(at, (1 << 8 * size) - 1)
    assert seen == set(values)

    at = 0x201  # unaligned: supported, and torn (R14)
    seen.clear()
    for _ in range(4):
        seen.add(load(at).to_bytes(size, "little"))
    assert seen - set(values), "the interleaver must be able to tear what is not aligned"


@settings(max_examples=200, deadline=None)
@given(places, st.integers(1, 80), st.booleans())
def test_memory_pieces(address, length, is_write):
    """MODEL-MEM-5: a bulk access is cut into naturally aligned pieces of at most 8 bytes, in order, covering it (R05, R06)."""
    length = min(length, TOP - address)
    memory, pieces = GuestMemory(), []
    memory.interleaver = lambda *piece: pieces.append(piece)
    memory.write(address, bytes(length)) if is_write else memory.read(address, length)
    at = address
    for start, size, direction in pieces:
        assert direction is is_write
        assert start == at
        assert size in (1, 2, 4, 8)
        assert start % size == 0
        at += size
    assert at == address + length
    whole = [(start, size) for start, size, _ in pieces if size == 8]
    assert whole == [(start, 8) for start in range(-(-address // 8) * 8, (address + length) // 8 * 8, 8)], "no word is cut"


def test_memory_interleaver_is_not_interleaved():
    """MODEL-MEM-6: what the interleaver does itself is whole; when it takes the memory away, the access ends in a fault."""
    memory, turns = GuestMemory(all_ram=False), []
    memory.add_range(0, 0x1000)
    memory.interleaver = lambda *piece: turns.append(memory.read(0, 64))
    memory.read(0, 32)
    assert len(turns) == 4
    memory.interleaver = lambda address, size, is_write: address == 16 and memory.remove_range(0)
    assert fault_of(memory.write, 0, b"\xff" * 32) == (16, 8, True, "unmapped")
    memory.interleaver = None
    memory.add_range(0, 0x1000)
    assert memory.read(0, 0x1000) == bytes(0x1000)


def test_memory_rights():
    """MODEL-MEM-7: rights hold per byte of an access, over neighbouring ranges; a refused access changes nothing (R03)."""
    memory = GuestMemory(log=True)
    memory.write(0x1000, b"before the first range")
    memory.add_range(0x1000, 0x800, name="ram")
    assert not memory.all_ram
    memory.add_range(0x1800, 0x800, write=False)
    memory.add_range(0x2000, 0x10, read=False)
    memory.add_range(0x2011, 0xF)
    memory.add_range(TOP - 16, 16)
    assert [(r.start, r.end, r.name) for r in memory.ranges][:2] == [(0x1000, 0x1800, "ram"), (0x1800, 0x2000, "")]
    assert memory.read(0x1000, 0x1000) == bytes(0x1000)
    memory.log.clear()
    before = memory.snapshot()
    for address, length, is_write, reason in (
        (0xFFF, 2, True, "unmapped"), (0xFFF, 1, False, "unmapped"), (0x17F8, 9, True, "read-only"),
        (0x1800, 1, True, "read-only"), (0x1FFF, 2, False, "write-only"), (0x200F, 2, True, "unmapped"),
        (0x2010, 1, False, "unmapped"), (0x2020, 1, True, "unmapped"), (TOP - 17, 2, True, "unmapped"),
        (TOP - 1, 2, True, "unmapped"), (-1, 2, False, "unmapped"), (0, 1 << 40, False, "unmapped"),
    ):  # fmt: skip
        if is_write:
            assert fault_of(memory.write, address, b"\xee" * length) == (address, length, True, reason)
        else:
            assert fault_of(memory.read, address, length) == (address, length, False, reason)
    assert memory.differences(before) == []
    assert memory.log == []
    memory.write(0x17F8, bytes(range(8)))
    memory.write(0x2000, b"in")
    memory.write(TOP - 16, bytes(16))
    assert memory.read(0x17F8, 16) == bytes(range(8)) + bytes(8)
    memory.check(0x17F8, 16, False)
    assert memory.read(0, 0) == b""  # nothing is touched, so nothing faults
    memory.write(0, b"")
    assert fault_of(GuestMemory(all_ram=False).read, 0, 1) == (0, 1, False, "unmapped")


def test_memory_hotplug():
    """MODEL-MEM-8: a range that goes takes its content and poison along and nothing else; a new one is zeroes."""
    memory = GuestMemory(all_ram=False)
    for start in (0x1000, 0x1800, 0x3000):
        memory.add_range(start, 0x800)
        memory.write(start, b"\xaa" * 0x800)
    memory.poison(0x17FF, 2)
    memory.remove_range(0x1000)
    assert fault_of(memory.read, 0x1000, 1)[3] == "unmapped"
    memory.add_range(0x1000, 0x800)
    assert memory.read(0x1000, 0x800) == bytes(0x800)
    assert fault_of(memory.read, 0x1800, 1)[3] == "poisoned"
    assert memory.read(0x1801, 0x7FF) == b"\xaa" * 0x7FF
    for start, length in ((0x1000, 0x800), (0x17FF, 2), (0x800, 0x801), (0x2FFF, 0x1000), (0, TOP)):
        with pytest.raises(ValueError, match="must not overlap"):
            memory.add_range(start, length)
    for start, length in ((-1, 2), (0, 0), (TOP - 1, 2), (TOP, 1)):
        with pytest.raises(ValueError, match="within 64 bits and hold at least one byte, not"):
            memory.add_range(start, length)
    with pytest.raises(ValueError, match="must start where one was added, not at 0x1001"):
        memory.remove_range(0x1001)
    for start in (0x1000, 0x1800, 0x3000):
        memory.remove_range(start)
    assert fault_of(memory.write, 0x1000, b"x")[3] == "unmapped", "without its last range the space is empty, not RAM"


def test_memory_poison():
    """MODEL-MEM-9: poisoned bytes fault on reads only, also the last of a long read, until they are healed."""
    memory = GuestMemory()
    memory.write(0xFF0, bytes(range(32)))
    memory.poison(0xFFE, 4)
    for address, length in ((0xFFE, 1), (0x1001, 1), (0xF00, 0xFF), (0x1000, 0x2000)):
        assert fault_of(memory.read, address, length) == (address, length, False, "poisoned")
    assert memory.read(0xFF0, 14) == bytes(range(14))
    assert memory.read(0x1002, 1) == b"\x12"
    memory.write(0xFFE, b"abcd")
    assert fault_of(memory.snapshot().read, 0xFFE, 1)[3] == "poisoned"
    memory.unpoison(0xFFE, 2)
    assert memory.read(0xFF0, 16) == bytes(range(14)) + b"ab"
    assert fault_of(memory.read, 0xFFF, 2)[3] == "poisoned"
    memory.unpoison(0, 0x2000)
    assert memory.read(0xFFE, 4) == b"abcd"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * 4096 - 1), st.integers(1, 5000)), max_size=6))
def test_memory_differences(changes):
    """MODEL-MEM-10: a snapshot is independent of what follows, and the runs that differ are exactly those that were changed."""
    memory = GuestMemory()
    memory.write(100, bytes(range(256)) * 20)
    before = memory.snapshot()
    changed = set()
    for address, length in changes:
        memory.write(address, bytes(b ^ 0x80 for b in before.read(address, length)))
        changed.update(range(address, address + length))
    runs = memory.differences(before)
    assert runs == before.differences(memory)
    assert {at for start, length in runs for at in range(start, start + length)} == changed
    assert all(sum(run) < after[0] for run, after in itertools.pairwise(runs)), "runs are as long as they can be"
    assert before.read(100, 5120) == bytes(range(256)) * 20


def test_memory_parameters():
    """MODEL-MEM-11: a negative length, and an int where bytes are due, are refused."""
    memory = GuestMemory()
    with pytest.raises(ValueError, match="must not be negative, not -1"):
        memory.read(0, -1)
    with pytest.raises(TypeError, match="int"):
        memory.write(0, 4)
    memory.write(0, bytearray(b"ab"))
    memory.write(2, memoryview(b"cd"))
    assert memory.read(0, 5) == b"abcd\0"
