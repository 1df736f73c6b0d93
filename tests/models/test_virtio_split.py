"""Split rings, the driver's side: images typed by hand, an oracle of chains, every malformed ring, devices that lie."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.ring import Answer
from ringwall.models.virtio.split import (
    ARRANGEMENTS,
    INDIRECT,
    NO_NOTIFY,
    WRITE,
    Descriptor,
    Malformed,
    RingError,
    RingFull,
    SplitDriver,
    gather,
    read_chain,
    scatter,
)

BASE = 0x10000


def make(size=8, **options):
    memory = GuestMemory()
    return memory, SplitDriver(memory, size=size, base=BASE, rng=random.Random(1), **options)


def use(memory, layout, index, *elements):
    """What a device does: elements from ``index`` on, then the index."""
    for n in range(len(elements)):
        head, length = elements[n]
        memory.write(layout.used_slot(index + n), head.to_bytes(4, "little") + length.to_bytes(4, "little"))
    memory.store_uw_le(layout.used_idx, index + len(elements) & 0xFFFF)


def test_split_image():
    """MODEL-SPLIT-1: layout and bytes of a ring of 4 are those worked out by hand, whatever the guest's byte order (R08)."""
    memory, ring = make(4)
    layout = ring.layout
    assert (layout.desc, layout.avail, layout.used) == (0x10000, 0x10040, 0x10050)
    assert (layout.desc_bytes, layout.avail_bytes, layout.used_bytes, layout.end) == (64, 14, 38, 0x10076)
    assert (layout.avail_idx, layout.used_event, layout.used_idx, layout.avail_event) == (0x10042, 0x1004C, 0x10052, 0x10074)
    assert [layout.avail_slot(n) for n in (0, 3, 4, 65535)] == [0x10044, 0x1004A, 0x10044, 0x1004A]
    assert [layout.used_slot(n) for n in (0, 3, 6)] == [0x10054, 0x1006C, 0x10064]
    assert ring.add_chain([(0x1122_3344_5566_7788, 0x10)], [(0x20_0000, 0x0102_0304)]) == 0
    assert ring.publish() is True
    assert memory.read(BASE, 0x76).hex() == (
        "8877665544332211" "10000000" "0100" "0100"
        "0000200000000000" "04030201" "0200" "0000"
        + "00" * 32
        + "0000" "0100" "0000" "0000" "0000" "0000" "0000" + "0000"
        + "00" * 38
    )  # fmt: skip
    # The same as a big-endian processor stores it: each number swapped, most significant byte first.
    other = GuestMemory()
    other.store_q_be(BASE, 0x8877_6655_4433_2211)
    other.store_l_be(BASE + 8, 0x1000_0000)
    other.store_uw_be(BASE + 12, 0x0100)
    other.store_uw_be(BASE + 14, 0x0100)
    other.store_q_be(BASE + 16, 0x0000_2000_0000_0000)
    other.store_l_be(BASE + 24, 0x0403_0201)
    other.store_uw_be(BASE + 28, 0x0200)
    other.store_uw_be(layout.avail_idx, 0x0100)
    assert memory.differences(other) == []


@pytest.mark.parametrize("arguments, message", [
    ({"size": 3, "base": 0}, "not 3"),
    ({"size": 0, "base": 0}, "not 0"),
    ({"size": 65536, "base": 0}, "not 65536"),
    ({"size": 4, "base": 8}, "multiple of 16, not at 8"),
    ({"size": 4, "addresses": (0, 65, 0x80)}, "Available ring .* multiple of 2, not at 65"),
    ({"size": 4, "addresses": (0, 64, 0x82)}, "Used ring .* multiple of 4, not at 130"),
    ({"size": 4, "base": (1 << 64) - 64}, "within 64 bits"),
    ({"size": 4}, "base or by addresses, not None and None"),
    ({"size": 4, "base": 0, "addresses": (0, 64, 128)}, "base or by addresses"),
    ({"size": 4, "base": 0, "arrangement": "odd"}, "not 'odd'"),
    ({"size": 4, "base": 0, "arrangement": "scattered"}, "not None"),
    ({"size": 4, "base": 0, "index": 65536}, "not 65536"),
    ({"size": 4, "base": 0, "tables": -16}, "not at -16"),
    ({"size": 4, "base": 0, "arrangement": "reversed", "in_order": True}, "contiguous while IN_ORDER is on, not 'reversed'"),
])  # fmt: skip
def test_split_parameters(arguments, message):
    """MODEL-SPLIT-2: a queue that cannot be is refused with a sentence."""
    with pytest.raises(ValueError, match=message):
        SplitDriver(GuestMemory(), **arguments)


def test_split_chain_parameters():
    """MODEL-SPLIT-12: a chain that a driver must not make is refused, and nothing is taken for it."""
    _, ring = make(4)
    with pytest.raises(ValueError, match="between 1 and 4 buffers, not 0"):
        ring.add_chain()
    with pytest.raises(ValueError, match="between 1 and 4 buffers, not 5"):
        ring.add_chain([(0, 1)] * 5)
    with pytest.raises(ValueError, match="at most 2\\^32 bytes, not 4294967297"):
        ring.add_chain([(0, 0xFFFF_FFFF)], [(0, 2)])
    with pytest.raises(ValueError, match="while INDIRECT_DESC is off, not 0"):
        ring.add_chain([(0, 1)], direct=0)
    _, indirect = make(4, indirect=True)
    with pytest.raises(ValueError, match="fewer than all 1, not 1"):
        indirect.add_chain([(0, 1)], direct=1)
    assert ring.free_count == indirect.free_count == 4
    ring.add_chain([(0, 1)] * 3)
    with pytest.raises(RingFull, match="2 descriptors are needed, 1 are free"):
        ring.add_chain([(0, 1)] * 2)
    assert ring.free_count == 1


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4, 8, 32]), st.sampled_from(ARRANGEMENTS), st.booleans(),
       st.sampled_from([0, 3, 32767, 65530, 65535]))  # fmt: skip
def test_split_chains(data, size, arrangement, indirect, index):
    """MODEL-SPLIT-3: any traffic through any arrangement, over the end of the indices: chains read back as added, no descriptor
    is in two chains, all come back (V024, R12)."""
    memory = GuestMemory()
    ring = SplitDriver(memory, size=size, base=BASE, indirect=indirect, arrangement=arrangement, rng=random.Random(size), index=index)
    out, returned, seen, at = {}, 0, index, index
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()) and ring.free_count:
            count = data.draw(st.integers(1, ring.free_count))
            buffers = [(data.draw(st.integers(0, (1 << 64) - 4096)), data.draw(st.integers(0, 4096))) for _ in range(count)]
            cut = data.draw(st.integers(0, count))
            direct = data.draw(st.integers(0, count - 1)) if indirect and data.draw(st.booleans()) else None
            before = ring.free_count
            head = ring.add_chain(buffers[:cut], buffers[cut:], direct=direct)
            assert before - ring.free_count == (count if direct is None else direct + 1)
            assert head not in out
            assert ring.publish()
            at = at + 1 & 0xFFFF
            assert memory.load_uw_le(ring.layout.avail_idx) == at == ring.avail_index
            assert memory.load_uw_le(ring.layout.avail_slot(at - 1)) == head
            chain = read_chain(memory, ring.layout, head, indirect=indirect)
            assert (chain.error, chain.is_complete) == ("", True)
            assert (list(chain.readable), list(chain.writable)) == (buffers[:cut], buffers[cut:])
            assert chain.table is None or direct is not None
            taken = {number for numbers, _ in out.values() for number in numbers}
            assert not taken & set(chain.numbers)
            out[head] = chain.numbers, chain.writable_bytes
            if arrangement == "reversed" and len(out) == 1 and direct is None and count > 1:
                assert chain.numbers[0] > chain.numbers[-1]
        elif out:
            heads = data.draw(st.permutations(sorted(out)))[: data.draw(st.integers(1, len(out)))]
            elements = [(head, data.draw(st.integers(0, out[head][1]))) for head in heads]
            use(memory, ring.layout, seen, *elements)
            assert ring.poll_used() == elements
            assert ring.poll_used() == []
            seen = seen + len(elements) & 0xFFFF
            assert ring.used_index == seen
            for head in heads:
                del out[head]
            returned += len(heads)
        assert sorted(ring.outstanding) == sorted(out)
        assert ring.free_count == size - sum(len(numbers) for numbers, _ in out.values())


def test_split_wrap():
    """MODEL-SPLIT-4: 66000 chains, so that both indices pass 65535 by themselves."""
    memory, ring = make(256)
    for n in range(0, 66000, 200):
        heads = [ring.add_chain([(0x1000, 16)]) for _ in range(200)]
        assert ring.publish()
        assert ring.avail_index == n + 200 & 0xFFFF
        use(memory, ring.layout, n & 0xFFFF, *[(head, 0) for head in reversed(heads)])
        assert [head for head, _ in ring.poll_used()] == heads[::-1]
    assert ring.used_index == 66000 - 65536
    assert ring.free_count == 256


# What reading each malformed ring must end in: (a part of the error, whether the end of the chain is reached).
EXPECTED = {
    Malformed.LOOP: ("more than 8 descriptors", False),
    Malformed.SELF_LOOP: ("more than 8 descriptors", False),
    Malformed.HEAD_OUT_OF_RANGE: ("head 8 out of a queue of 8", False),
    Malformed.HEAD_TWICE: ("", True),
    Malformed.AVAIL_JUMP: ("", True),
    Malformed.AVAIL_BACK: ("", True),
    Malformed.NEXT_OUT_OF_RANGE: ("next 8 out of a queue of 8", False),
    Malformed.TOO_MANY_DESCRIPTORS: ("more than 8 descriptors", False),
    Malformed.TOO_MANY_BYTES: ("more than 2^32 bytes", True),
    Malformed.ZERO_LENGTH: ("", True),
    Malformed.READABLE_AFTER_WRITABLE: ("readable behind writable", True),
    Malformed.ADDRESS_WRAP: ("beyond 2^64", False),
    Malformed.INDIRECT_WITHOUT_FEATURE: ("without the feature", False),
    Malformed.INDIRECT_NEXT: ("INDIRECT and NEXT", False),
    Malformed.INDIRECT_NESTED: ("inside an indirect table", False),
    Malformed.TABLE_EMPTY: ("indirect table of 0 bytes", False),
    Malformed.TABLE_LENGTH: ("indirect table of 40 bytes", False),
    Malformed.TABLE_WRAP: ("indirect table beyond 2^64", False),
    Malformed.TABLE_NEXT_OUT_OF_RANGE: ("next 3 out of an indirect table of 3", False),
    Malformed.TABLE_LOOP: ("more than 8 descriptors", False),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("kind", list(Malformed))
def test_split_malformed(kind, arrangement):
    """MODEL-SPLIT-5: each malformed ring is what its name says, found with bounded reads inside the tables; a reset mends it
    (V025, V031, V032, V047, V048)."""
    memory = GuestMemory(log=True)
    ring = SplitDriver(memory, size=8, base=BASE, indirect=kind.needs_indirect is True, arrangement=arrangement, rng=random.Random(3))
    readable, writable = [(0x5000, 16)], [(0x6000, 512), (0x7000, 1)]
    head = ring.add_malformed(kind.value, readable, writable)
    assert memory.load_uw_le(ring.layout.avail_idx) == 0
    ring.publish()
    index = memory.load_uw_le(ring.layout.avail_idx)
    assert memory.load_uw_le(ring.layout.avail_slot(0)) == head
    if kind in (Malformed.AVAIL_JUMP, Malformed.AVAIL_BACK):
        assert index > ring.layout.size
    else:
        assert index == (2 if kind is Malformed.HEAD_TWICE else 1)
    if kind is Malformed.HEAD_TWICE:
        assert memory.load_uw_le(ring.layout.avail_slot(1)) == head
    memory.log.clear()
    chain = read_chain(memory, ring.layout, head, indirect=ring.indirect)
    error, is_complete = EXPECTED[kind]
    assert error in chain.error
    assert bool(error) == bool(chain.error)
    assert chain.is_complete is is_complete
    assert len(memory.log) <= ring.layout.size + 1
    tables = [(ring.layout.desc, ring.layout.desc_bytes)] + ([chain.table] if chain.table else [])
    for access in memory.log:
        assert any(start <= access.address and access.address + len(access.data) <= start + length for start, length in tables)
    if kind is Malformed.ZERO_LENGTH:
        assert (0x6000, 0) in chain.writable
        assert len(chain.readable + chain.writable) == 4
    if kind is Malformed.NEXT_OUT_OF_RANGE:
        assert chain.beyond == ring.layout.descriptor(8)
        assert (chain.readable, chain.writable) == (tuple(readable), tuple(writable))
    ring.reset()
    assert ring.free_count == 8
    head = ring.add_chain(readable, writable)
    assert ring.publish()
    assert read_chain(memory, ring.layout, head).error == ""
    assert memory.load_uw_le(ring.layout.avail_idx) == 1


def test_split_malformed_parameters():
    """MODEL-SPLIT-13: a mistake that cannot be made is refused with a sentence."""
    _, ring = make(8)
    _, indirect = make(8, indirect=True)
    with pytest.raises(ValueError, match="must be on for 'indirect table of 0 bytes', not False"):
        ring.add_malformed(Malformed.TABLE_EMPTY, [(0, 1)])
    with pytest.raises(ValueError, match="must be off for 'indirect without the feature', not True"):
        indirect.add_malformed(Malformed.INDIRECT_WITHOUT_FEATURE, [(0, 1)])
    with pytest.raises(ValueError, match="not none"):
        ring.add_malformed(Malformed.LOOP)
    with pytest.raises(ValueError, match="both kinds, not 1 and 0"):
        ring.add_malformed(Malformed.READABLE_AFTER_WRITABLE, [(0, 1)])
    with pytest.raises(ValueError, match="no such"):
        ring.add_malformed("no such")
    assert all(Answer.REFUSED in kind.allowed for kind in Malformed)
    assert {kind for kind in Malformed if Answer.SERVED in kind.allowed} == {
        Malformed.HEAD_TWICE, Malformed.ZERO_LENGTH, Malformed.READABLE_AFTER_WRITABLE, Malformed.TOO_MANY_DESCRIPTORS}  # fmt: skip


def test_split_kick():
    """MODEL-SPLIT-6: a doorbell is rung unless flags or avail_event say otherwise, over the wrap too (V045, V046)."""
    memory, ring = make(8)
    assert ring.publish() is False
    ring.add_chain([(0, 1)])
    memory.store_uw_le(ring.layout.used, NO_NOTIFY)
    assert ring.publish() is False
    assert memory.load_uw_le(ring.layout.avail_idx) == 1
    memory.store_uw_le(ring.layout.used, 0)
    ring.add_chain([(0, 1)])
    assert ring.publish() is True
    # EVENT_IDX: (old, new, avail_event) -> asked, worked out from "the entry at avail_event was added".
    for old, count, event, wanted in [(0, 1, 0, True), (0, 1, 1, False), (0, 3, 2, True), (0, 3, 3, False), (1, 1, 0, False),
                                      (65535, 1, 65535, True), (65535, 2, 0, True), (65535, 2, 1, False), (65534, 3, 65533, False),
                                      (65534, 3, 65534, True)]:  # fmt: skip
        memory, ring = make(8, event_idx=True, index=old)
        memory.store_uw_le(ring.layout.used, NO_NOTIFY)  # says nothing with EVENT_IDX
        memory.store_uw_le(ring.layout.avail_event, event)
        for _ in range(count):
            ring.add_chain([(0, 1)])
        assert ring.publish() is wanted, (old, count, event)


def test_split_distrust():
    """MODEL-SPLIT-7: used elements that cannot be are refused, nothing is taken back, the good ones that follow are."""
    memory, ring = make(8)
    one, two = (ring.add_chain([(0, 1)], [(0x100, 10)]) for _ in range(2))
    ring.publish()
    hidden = ring.add_chain([(0, 1)], [(0x100, 10)])  # not published
    for elements, message in [([(one, 0), (two, 0), (one, 0)], "from 0 to 3 while 2 chains are out"),
                              ([(one, 11)], "claims 11 bytes of 10"),
                              ([(5, 0)], "names 5, which is not out"),
                              ([(one + 65536, 0)], "names 65536, which is not out"),
                              ([(hidden, 0)], f"names {hidden}, which is not out"),
                              ([(one, 0), (one, 0)], f"used element 1 names {one}")]:  # fmt: skip
        use(memory, ring.layout, 0, *elements)
        with pytest.raises(RingError, match=message):
            ring.poll_used()
        assert ring.outstanding == (one, two)
        assert ring.used_index == 0
    memory.store_uw_le(ring.layout.used_idx, 0xFFFF)
    with pytest.raises(RingError, match="from 0 to 65535"):
        ring.poll_used()
    use(memory, ring.layout, 0, (two, 10), (one, 0))
    assert ring.poll_used() == [(two, 10), (one, 0)]
    use(memory, ring.layout, 2, (one, 0))
    with pytest.raises(RingError, match="while 0 chains are out"):
        ring.poll_used()
    assert ring.free_count == 6


@pytest.mark.parametrize("direct", [0, 1, 2, 5])
def test_split_indirect(direct):
    """MODEL-SPLIT-8: none to many direct descriptors and then a table; WRITE beside INDIRECT says nothing (V029, V030)."""
    memory, ring = make(8, indirect=True, tables=0x4_0000)
    readable, writable = [(0x1000 * n, n) for n in range(1, 4)], [(0x1000 * n, n) for n in range(4, 8)]
    head = ring.add_chain(readable, writable, direct=direct)
    assert ring.free_count == 8 - direct - 1
    referring = ring.layout.descriptor(read_chain(memory, ring.layout, head, indirect=True).numbers[-1])
    assert Descriptor.unpack(memory.read(referring, 16)) == Descriptor(0x4_0000 + 16 * 9 * head, 16 * (7 - direct), INDIRECT)
    for flags in (INDIRECT, INDIRECT | WRITE):
        memory.store_uw_le(referring + 12, flags)
        chain = read_chain(memory, ring.layout, head, indirect=True)
        assert (chain.readable, chain.writable, chain.error) == (tuple(readable), tuple(writable), "")
        assert chain.table == (0x4_0000 + 16 * 9 * head, 16 * (7 - direct))


def test_split_publish_order():
    """MODEL-SPLIT-9: descriptors and entry are written before the index, which is one aligned write of 2 bytes (R05)."""
    memory = GuestMemory(log=True)
    ring = SplitDriver(memory, size=8, base=BASE)
    memory.log.clear()
    for _ in range(3):
        ring.add_chain([(0, 1)], [(0, 1)])
    assert all(access.address != ring.layout.avail_idx for access in memory.log)
    assert len([access for access in memory.log if access.is_write]) == 9
    memory.log.clear()
    ring.publish()
    assert [(access.address, access.data) for access in memory.log if access.is_write] == [(ring.layout.avail_idx, b"\3\0")]


def test_split_interrupts():
    """MODEL-SPLIT-10: flags, or used_event, say what the driver wants; what came meanwhile is told (V033, V036)."""
    memory, ring = make(8)
    head = ring.add_chain([(0, 1)])
    ring.publish()
    ring.disable_interrupts()
    assert memory.load_uw_le(ring.layout.avail) == 1
    assert ring.enable_interrupts() is False
    assert memory.load_uw_le(ring.layout.avail) == 0
    use(memory, ring.layout, 0, (head, 0))
    assert ring.enable_interrupts() is True
    memory, ring = make(8, event_idx=True, index=65535)
    assert memory.load_uw_le(ring.layout.used_event) == 65535
    ring.disable_interrupts()
    assert memory.load_uw_le(ring.layout.used_event) == 65534
    assert memory.load_uw_le(ring.layout.avail) == 0
    ring.enable_interrupts()
    assert memory.load_uw_le(ring.layout.used_event) == 65535


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.binary(max_size=120))
def test_split_scatter(lengths, data):
    """MODEL-SPLIT-11: bytes go to and come from buffers in their order; nothing behind the data is touched (R12)."""
    memory = GuestMemory()
    spans = [(0x1000 * (6 - n) - 7, lengths[n]) for n in range(len(lengths))]
    memory.write(0, b"\xee" * 0x7000)
    before = memory.snapshot()
    scatter(memory, spans, data)
    room = sum(lengths)
    assert gather(memory, spans) == data[:room] + b"\xee" * (room - len(data))
    for address, length in memory.differences(before):
        assert any(start <= address and address + length <= start + size for start, size in spans)


def test_split_in_order():
    """MODEL-SPLIT-14: with IN_ORDER descriptors and tables are taken in ring order over the end of the table; a used element returns all
    chains in front of it too, written to their end, and none that the index does not cover (V049, V050)."""
    memory, ring = make(8, in_order=True, indirect=True, index=65533)
    at, turn = 65533, 0
    for count in (3, 3, 4, 1, 5):
        heads = [ring.add_chain([(0, 1)] * (count - 1), [(0x1000, 20)]), ring.add_chain([(0, 1)], [(0x1000, 9)], direct=0)]
        ring.publish()
        assert heads == [turn % 8, (turn + count) % 8]
        for n in range(count - 1):
            assert Descriptor.unpack(memory.read(ring.layout.descriptor((turn + n) % 8), 16)).next == (turn + n + 1) % 8
        assert Descriptor.unpack(memory.read(read_chain(memory, ring.layout, heads[1], indirect=True).table[0], 16)).next == 1
        memory.write(ring.layout.used_slot(at), heads[1].to_bytes(4, "little") + b"\5\0\0\0")
        memory.write(ring.layout.used_slot(at + 1), b"\xff" * 8)  # no element is there
        memory.store_uw_le(ring.layout.used_idx, at + 1 & 0xFFFF)
        with pytest.raises(RingError, match=f"names {heads[1]}, so that 2 came back, not 1"):
            ring.poll_used()
        memory.store_uw_le(ring.layout.used_idx, at + 2 & 0xFFFF)
        assert ring.poll_used() == [(heads[0], 20), (heads[1], 5)]
        at, turn = at + 2 & 0xFFFF, turn + count + 1
    assert ring.free_count == 8


def test_split_notification():
    """MODEL-SPLIT-15: with NOTIFICATION_DATA a notification is queue, 15 bits of the available index, and its bit 15 as wrap counter,
    whether or not anything was added since (V045, V119)."""
    memory, ring = make(4, index=0x7FFF)
    assert ring.notification(3) == 0x7FFF_0003
    ring.add_chain([(0, 1)])
    assert ring.notification(3) == 0x7FFF_0003
    ring.publish()
    assert ring.notification(3) == ring.notification(3) == 0x8000_0003
    assert make(4, index=65535)[1].notification(0xFFFF) == 0xFFFF_FFFF
    assert memory.load_uw_le(ring.layout.avail_idx) == 0x8000


def test_split_tables_anywhere():
    """MODEL-SPLIT-16: nothing says how an indirect table is aligned (V024)."""
    memory, ring = make(8, indirect=True, tables=0x4_0009)
    head = ring.add_chain([(0x1000, 1)], [(0x2000, 2)], direct=0)
    chain = read_chain(memory, ring.layout, head, indirect=True)
    assert (chain.readable, chain.writable, chain.table) == (((0x1000, 1),), ((0x2000, 2),), (0x4_0009 + 144 * head, 32))
