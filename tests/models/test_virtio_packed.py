"""Packed rings, the driver's side: images typed by hand, an oracle of lists, every malformed ring, devices that lie."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.packed import EventFlags, PackedDescriptor, PackedDriver, PackedLayout, PackedMalformed, read_list
from ringwall.models.virtio.ring import ARRANGEMENTS, INDIRECT, NEXT, WRITE, Answer, RingError, RingFull

BASE = 0x10000
AVAIL, USED = 0x80, 0x8000


def make(size=8, **options):
    memory = GuestMemory()
    return memory, PackedDriver(memory, size=size, base=BASE, rng=random.Random(1), **options)


def use(memory, layout, turn, name, length=0, *, write=None):
    """What a device does: one used descriptor, its flags last."""
    wrap = 1 - turn // layout.size % 2
    at = layout.desc + 16 * (turn % layout.size)
    memory.store_l_le(at + 8, length)
    memory.store_uw_le(at + 12, name)
    memory.store_uw_le(at + 14, (AVAIL | USED) * wrap | (WRITE if (length if write is None else write) else 0))


def test_packed_image():
    """MODEL-PACKED-1: bytes of a ring of 3, two laps of it, are those worked out by hand: AVAIL and USED by the wrap counter, the ID in
    the last descriptor of a list (V058, R08)."""
    memory, ring = make(3)
    layout = ring.layout
    assert (layout.desc, layout.driver, layout.device) == (0x10000, 0x10030, 0x10034)
    assert layout.parts == ((0x10000, 48), (0x10030, 4), (0x10034, 4))
    assert memory.read(BASE, 56) == bytes(56)
    assert ring.add_chain([(0x1122_3344_5566_7788, 0x10)], [(0x20_0000, 0x0102_0304)]) == 0
    assert memory.read(BASE + 14, 2) == bytes(2)
    assert ring.publish() is True
    assert memory.read(BASE, 48).hex() == (
        "8877665544332211" "10000000" "ffff" "8100"  # AVAIL, NEXT
        "0000200000000000" "04030201" "0000" "8200"  # AVAIL, WRITE
        + "00" * 16
    )  # fmt: skip
    use(memory, layout, 0, 0, 0x20)
    assert memory.read(BASE + 8, 8).hex() == "20000000" "0000" "8280"
    assert ring.poll_used() == [(0, 0x20)]
    assert ring.free_count == 3
    assert ring.add_chain([(0x5000, 1), (0x6000, 2)]) == 0  # the last descriptor of the first lap and the first one of the second
    ring.publish()
    assert memory.read(BASE + 32, 16).hex() == "0050000000000000" "01000000" "ffff" "8100"
    assert memory.read(BASE, 16).hex() == "0060000000000000" "02000000" "0000" "0080"  # not AVAIL, USED
    use(memory, layout, 2, 0)
    assert ring.poll_used() == [(0, 0)]
    ring.add_chain([(0x7000, 7)])
    ring.publish()
    use(memory, layout, 4, 0)
    assert memory.read(BASE + 16 + 14, 2).hex() == "0000"  # used in a lap of wrap counter 0
    assert ring.poll_used() == [(0, 0)]


@pytest.mark.parametrize("arguments, message", [
    ({"size": 0, "base": 0}, "not 0"),
    ({"size": 32769, "base": 0}, "not 32769"),
    ({"size": 4, "base": 8}, "Descriptor ring .* multiple of 16, not at 8"),
    ({"size": 4, "addresses": (0, 66, 0x80)}, "Driver event area .* multiple of 4, not at 66"),
    ({"size": 4, "addresses": (0, 64, 0x82)}, "Device event area .* multiple of 4, not at 130"),
    ({"size": 4, "base": (1 << 64) - 64}, "within 64 bits"),
    ({"size": 4}, "base or by addresses, not None and None"),
    ({"size": 4, "base": 0, "arrangement": "odd"}, "not 'odd'"),
    ({"size": 4, "base": 0, "arrangement": "scattered", "in_order": True, "rng": random.Random(1)}, "while IN_ORDER is on"),
])  # fmt: skip
def test_packed_parameters(arguments, message):
    """MODEL-PACKED-2: a queue that cannot be is refused with a sentence; 32768 and any number below can."""
    with pytest.raises(ValueError, match=message):
        PackedDriver(GuestMemory(), **arguments)
    assert [PackedLayout.at(0, size).parts[0][1] for size in (1, 7, 32768)] == [16, 112, 524288]


def test_packed_list_parameters():
    """MODEL-PACKED-3: a list that a driver must not make is refused, and nothing is taken for it."""
    _, ring = make(4)
    with pytest.raises(ValueError, match="between 1 and 4 buffers, not 0"):
        ring.add_chain()
    with pytest.raises(ValueError, match="at most 2\\^32 bytes, not 4294967297"):
        ring.add_chain([(0, 0xFFFF_FFFF)], [(0, 2)])
    with pytest.raises(ValueError, match="none while INDIRECT_DESC is on, not 0"):
        ring.add_chain([(0, 1)], direct=0)
    _, indirect = make(4, indirect=True)
    with pytest.raises(ValueError, match="none while INDIRECT_DESC is on, not 1"):
        indirect.add_chain([(0, 1), (0, 1)], direct=1)
    ring.add_chain([(0, 1)] * 3)
    with pytest.raises(RingFull, match="2 descriptors are needed, 1 are free"):
        ring.add_chain([(0, 1)] * 2)
    assert ring.free_count == 1


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3, 5, 8, 13]), st.sampled_from(ARRANGEMENTS), st.booleans(), st.booleans())
def test_packed_lists(data, size, arrangement, indirect, in_order):
    """MODEL-PACKED-4: any traffic, ring sizes and orders of return: a device that polls one place finds each list as it was added;
    all come back (V051, V052, V057, V058, V064, V066, R12)."""
    memory = GuestMemory()
    arrangement = "contiguous" if in_order else arrangement
    ring = PackedDriver(memory, size=size, base=BASE, indirect=indirect, in_order=in_order, arrangement=arrangement,
                        rng=random.Random(size))  # fmt: skip
    out, seen, used, expected = [], 0, 0, []  # (chain); turns of the device; what the driver must be told
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()) and ring.free_count:
            is_table = indirect and data.draw(st.booleans())
            count = data.draw(st.integers(1, size if is_table else ring.free_count))
            buffers = [(data.draw(st.integers(0, (1 << 64) - 4096)), data.draw(st.integers(0, 4096))) for _ in range(count)]
            cut = data.draw(st.integers(0, count))
            before = ring.free_count
            name = ring.add_chain(buffers[:cut], buffers[cut:], direct=0 if is_table else None)
            assert before - ring.free_count == (1 if is_table else count)
            assert read_list(memory, ring.layout, seen, indirect=indirect) is None
            assert ring.publish()
            chain = read_list(memory, ring.layout, seen, indirect=indirect)
            assert (chain.head, chain.error, chain.is_complete) == (name, "", True)
            assert (list(chain.readable), list(chain.writable)) == (buffers[:cut], buffers[cut:])
            assert (chain.table is not None) is is_table
            assert chain.numbers == tuple((seen + n) % size for n in range(1 if is_table else count))
            assert read_list(memory, ring.layout, seen + len(chain.numbers)) is None
            seen += len(chain.numbers)
            assert ring.notification(5) == 5 | seen % size << 16 | (1 - seen // size % 2) << 31
            out.append(chain)
        elif out:
            last = data.draw(st.integers(0, len(out) - 1))
            batch = out[: last + 1] if in_order else [out[last]]
            del out[last - len(batch) + 1 : last + 1]
            length = data.draw(st.integers(0, batch[-1].writable_bytes))
            use(memory, ring.layout, used, batch[-1].head, length)
            used += sum(len(chain.numbers) for chain in batch)
            expected += [(chain.head, chain.writable_bytes) for chain in batch[:-1]] + [(batch[-1].head, length)]
            if data.draw(st.booleans()):
                assert ring.poll_used() == expected
                expected.clear()
        assert len(ring.outstanding) == len(out) + len(expected)
    assert ring.poll_used() == expected
    assert ring.poll_used() == []
    assert ring.outstanding == tuple(chain.head for chain in out)
    assert ring.free_count == size - (seen - used)


def test_packed_order_of_writes():
    """MODEL-PACKED-5: used descriptors may be written in any order once they are begun; the driver sees none before the first one, the
    rest of a request of several buffers before it (V052, V065)."""
    memory, ring = make(5)
    names = [ring.add_chain([], [(0x1000, 64)] * n) for n in (2, 1, 1)]
    ring.publish()
    for turn, name in ((3, names[2]), (2, names[1])):
        use(memory, ring.layout, turn, name, 8)
        assert ring.poll_used() == []
    use(memory, ring.layout, 0, names[0], 9)
    assert ring.poll_used() == [(names[0], 9), (names[1], 8), (names[2], 8)]


def test_packed_used_length():
    """MODEL-PACKED-6: len counts only beside WRITE, NEXT and the address of a used descriptor say nothing (V061)."""
    memory, ring = make(2)
    name = ring.add_chain([], [(0x1000, 64)])
    ring.publish()
    memory.store_q_le(BASE, 0xFFFF_FFFF_FFFF_FFFF)
    use(memory, ring.layout, 0, name, 0xFFFF_FFFF, write=False)
    memory.store_uw_le(BASE + 14, AVAIL | USED | NEXT)
    assert ring.poll_used() == [(name, 0)]


# What reading each malformed ring must end in: (a part of the error, whether all buffers are known).
EXPECTED = {
    PackedMalformed.NOT_AVAILABLE: (None, False),
    PackedMalformed.LIST_TOO_LONG: ("more than 7 descriptors", False),
    PackedMalformed.LIST_OPEN: ("not available", False),
    PackedMalformed.TOO_MANY_BYTES: ("more than 2^32 bytes", True),
    PackedMalformed.ZERO_LENGTH: ("", True),
    PackedMalformed.READABLE_AFTER_WRITABLE: ("readable behind writable", True),
    PackedMalformed.ADDRESS_WRAP: ("a buffer beyond 2^64", False),
    PackedMalformed.INDIRECT_WITHOUT_FEATURE: ("without the feature", False),
    PackedMalformed.INDIRECT_NEXT: ("INDIRECT in a list of several", False),
    PackedMalformed.INDIRECT_BEHIND_DIRECT: ("INDIRECT in a list of several", False),
    PackedMalformed.TABLE_EMPTY: ("indirect table of 0 bytes", False),
    PackedMalformed.TABLE_LENGTH: ("indirect table of 40 bytes", False),
    PackedMalformed.TABLE_WRAP: ("indirect table beyond 2^64", False),
    PackedMalformed.TABLE_TOO_LONG: ("more than 7 descriptors", False),
    PackedMalformed.TABLE_FLAGS: ("", True),
}


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("kind", list(PackedMalformed))
def test_packed_malformed(kind, first):
    """MODEL-PACKED-7: each malformed ring is what its name says, at the start of a lap and over its end, found with bounded reads inside
    ring and tables; a reset mends it (V031, V055, V059, V060, V067)."""
    memory = GuestMemory(log=True)
    ring = PackedDriver(memory, size=7, base=BASE, indirect=kind.needs_indirect is True)
    for turn in range(first):
        use(memory, ring.layout, turn, ring.add_chain([(0, 1)]))
        ring.publish()
        use(memory, ring.layout, turn, 0)
        assert len(ring.poll_used()) == 1
    readable, writable = [(0x5000, 16)], [(0x6000, 512), (0x7000, 1)]
    ring.add_malformed(kind.value, readable, writable)
    ring.publish()
    memory.log.clear()
    chain = read_list(memory, ring.layout, first, indirect=ring.indirect)
    error, is_complete = EXPECTED[kind]
    if error is None:
        assert chain is None
    else:
        assert error in chain.error
        assert bool(error) == bool(chain.error)
        assert chain.is_complete is is_complete
        assert (chain.head == -1) is (kind in (PackedMalformed.LIST_TOO_LONG, PackedMalformed.LIST_OPEN))
    assert len(memory.log) <= ring.layout.size + 1 < ring.read_bound()
    tables = [ring.layout.parts[0]] + ([chain.table] if chain and chain.table else [])
    for access in memory.log:
        assert any(start <= access.address and access.address + len(access.data) <= start + length for start, length in tables)
    if kind is PackedMalformed.TABLE_FLAGS:
        assert (chain.readable, chain.writable) == (tuple(readable), tuple(writable))
    if kind is PackedMalformed.ZERO_LENGTH:
        assert (0x6000, 0) in chain.writable
    ring.reset()
    assert ring.free_count == 7
    ring.add_chain(readable, writable)
    assert ring.publish()
    assert read_list(memory, ring.layout, 0).error == ""


def test_packed_malformed_parameters():
    """MODEL-PACKED-8: a mistake that cannot be made is refused with a sentence; a device may overlook those that leave no doubt, must
    overlook reserved flags of a table, and must not see what is not available."""
    _, ring = make(8)
    _, indirect = make(8, indirect=True)
    with pytest.raises(ValueError, match="must be on for 'indirect table of 0 bytes', not False"):
        ring.add_malformed(PackedMalformed.TABLE_EMPTY, [(0, 1)])
    with pytest.raises(ValueError, match="must be off for 'indirect without the feature', not True"):
        indirect.add_malformed(PackedMalformed.INDIRECT_WITHOUT_FEATURE, [(0, 1)])
    with pytest.raises(ValueError, match="not none"):
        ring.add_malformed(PackedMalformed.LIST_OPEN)
    with pytest.raises(ValueError, match="both kinds, not 1 and 0"):
        ring.add_malformed(PackedMalformed.READABLE_AFTER_WRITABLE, [(0, 1)])
    ring.add_chain([(0, 1)])
    with pytest.raises(ValueError, match="not have 7 of 8 free"):
        ring.add_malformed(PackedMalformed.LIST_TOO_LONG, [(0, 1)])
    with pytest.raises(RingFull, match="8 descriptors are needed, 7 are free"):
        ring.add_malformed(PackedMalformed.LIST_OPEN, [(0, 1)] * 7)
    answers = {answer: {kind for kind in PackedMalformed if answer in kind.allowed} for answer in Answer}
    assert answers[Answer.REFUSED] == set(PackedMalformed) - {PackedMalformed.NOT_AVAILABLE, PackedMalformed.TABLE_FLAGS}
    assert answers[Answer.SERVED] == {PackedMalformed.ZERO_LENGTH, PackedMalformed.READABLE_AFTER_WRITABLE,
                                      PackedMalformed.TABLE_TOO_LONG, PackedMalformed.TABLE_FLAGS}  # fmt: skip
    assert answers[Answer.IDLE] == {PackedMalformed.NOT_AVAILABLE, PackedMalformed.LIST_OPEN}


def test_packed_kick():
    """MODEL-PACKED-9: a doorbell is rung as the device's event area asks: ENABLE, DISABLE, one descriptor of one lap, over the end of
    the ring; the reserved value asks for it (V046, V063)."""
    memory, ring = make(3)
    assert ring.publish() is False
    for flags, event_idx, wanted in [(EventFlags.ENABLE, False, True), (EventFlags.DISABLE, False, False), (3, True, True),
                                     (EventFlags.DESC, False, True), (EventFlags.DISABLE, True, False)]:  # fmt: skip
        memory, ring = make(3, event_idx=event_idx)
        memory.store_uw_le(ring.layout.device, 2)
        memory.store_uw_le(ring.layout.device + 2, flags)
        ring.add_chain([(0, 1)])
        assert ring.publish() is wanted
    # DESC: (turns that came and went, descriptors of the list, offset, wrap counter) -> asked, worked out by hand for a ring of 3.
    for before, count, offset, wrap, wanted in [(0, 1, 0, 1, True), (0, 1, 0, 0, False), (0, 1, 1, 1, False), (0, 3, 2, 1, True),
                                                (2, 1, 2, 1, True), (2, 2, 0, 0, True), (2, 2, 0, 1, False), (2, 3, 1, 0, True),
                                                (3, 3, 2, 0, True), (5, 2, 0, 1, True), (5, 2, 1, 1, False),
                                                (5, 2, 3, 1, False)]:  # fmt: skip
        memory, ring = make(3, event_idx=True)
        for turn in range(before):
            ring.add_chain([(0, 1)])
            ring.publish()
            use(memory, ring.layout, turn, 0)
            ring.poll_used()
        memory.store_uw_le(ring.layout.device, offset | wrap << 15)
        memory.store_uw_le(ring.layout.device + 2, EventFlags.DESC)
        ring.add_chain([(0, 1)] * count)
        assert ring.publish() is wanted, (before, count, offset, wrap)


def test_packed_distrust():
    """MODEL-PACKED-10: used descriptors that cannot be are refused, nothing is taken back, the good ones that follow are."""
    memory, ring = make(8)
    one, two = (ring.add_chain([(0, 1)], [(0x100, 10)]) for _ in range(2))
    ring.publish()
    hidden = ring.add_chain([(0, 1)], [(0x100, 10)])  # not published
    for elements, message in [([(0, one, 11)], "claims 11 bytes of 10"),
                              ([(0, 5, 0)], "names 5, which is not out"),
                              ([(0, hidden, 0)], f"names {hidden}, which is not out"),
                              ([(0, one, 0), (2, one, 0)], f"used descriptor 2 names {one}")]:  # fmt: skip
        for turn, name, length in elements:
            use(memory, ring.layout, turn, name, length)
        with pytest.raises(RingError, match=message):
            ring.poll_used()
        assert ring.outstanding == (one, two)
    use(memory, ring.layout, 0, two, 10)
    use(memory, ring.layout, 2, one, 0)
    assert ring.poll_used() == [(two, 10), (one, 0)]
    use(memory, ring.layout, 4, one, 0)
    with pytest.raises(RingError, match="which is not out"):
        ring.poll_used()
    assert ring.free_count == 6


def test_packed_indirect():
    """MODEL-PACKED-11: a table takes one descriptor of the ring and lies at any address; its descriptors follow each other; WRITE beside
    INDIRECT says nothing (V059, V060)."""
    memory, ring = make(4, indirect=True, tables=0x4_0007)
    readable, writable = [(0x1000 * n, n) for n in range(1, 3)], [(0x1000 * n, n) for n in range(3, 5)]
    names = [ring.add_chain(readable, writable, direct=0) for _ in range(4)]
    ring.publish()
    assert ring.free_count == 0
    for turn, name in enumerate(names):
        at = 0x4_0007 + 16 * 5 * name
        referring = ring.layout.descriptor(turn)
        assert PackedDescriptor.unpack(memory.read(referring, 16)) == PackedDescriptor(at, 64, name, INDIRECT | AVAIL)
        assert memory.read(at, 64) == b"".join(PackedDescriptor(*span).pack() for span in readable) + b"".join(
            PackedDescriptor(*span, flags=WRITE).pack() for span in writable)  # fmt: skip
        memory.store_uw_le(referring + 14, INDIRECT | WRITE | AVAIL)
        chain = read_list(memory, ring.layout, turn, indirect=True)
        assert (chain.readable, chain.writable, chain.table, chain.error) == (tuple(readable), tuple(writable), (at, 64), "")


def test_packed_publish_order():
    """MODEL-PACKED-12: all but the flags of the first descriptor are written before those, which are one aligned write of 2 bytes (V055,
    R05)."""
    memory = GuestMemory(log=True)
    ring = PackedDriver(memory, size=8, base=BASE)
    memory.log.clear()
    ring.add_chain([(0, 1)], [(0, 1)])
    ring.add_chain([(0, 1)])
    assert [(access.address, len(access.data)) for access in memory.log if access.is_write and access.address % 16 == 14] == []
    assert read_list(memory, ring.layout, 0) is read_list(memory, ring.layout, 2) is None
    memory.log.clear()
    ring.publish()
    assert [(access.address, access.data) for access in memory.log if access.is_write] == [
        (BASE + 14, b"\x81\0"), (BASE + 46, b"\x80\0")]  # fmt: skip


def test_packed_interrupts():
    """MODEL-PACKED-13: the driver's event area says what the driver wants; what came meanwhile is told (V062)."""
    memory, ring = make(3)
    name = ring.add_chain([(0, 1)])
    ring.publish()
    ring.disable_interrupts()
    assert memory.read(ring.layout.driver, 4).hex() == "00000100"
    assert ring.enable_interrupts() is False
    assert memory.read(ring.layout.driver, 4).hex() == "00000000"
    use(memory, ring.layout, 0, name)
    assert ring.enable_interrupts() is True
    memory, ring = make(3, event_idx=True)
    ring.enable_interrupts()
    assert memory.read(ring.layout.driver, 4).hex() == "00800200"
    ring.enable_interrupts(ahead=3)
    assert memory.read(ring.layout.driver, 4).hex() == "00000200"
    ring.disable_interrupts()
    assert memory.read(ring.layout.driver, 4).hex() == "00000100"


def test_packed_ids():
    """MODEL-PACKED-14: an ID is any 16 bits that no other list has; a list that came back frees its ID, not its place (V058)."""
    memory, ring = make(4, arrangement="scattered")
    names = [ring.add_chain([(0, 1)]) for _ in range(4)]
    ring.publish()
    assert len(set(names)) == 4 and max(names) > 3
    use(memory, ring.layout, 0, names[3])
    assert ring.poll_used() == [(names[3], 0)]
    assert ring.outstanding == tuple(names[:3])
    again = ring.add_chain([(0, 1)])
    ring.publish()
    assert again not in names[:3]
    assert read_list(memory, ring.layout, 4).numbers == (0,)
