"""virtio-blk: the golden device by worked examples, what it allows and what not, and requests in every framing."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.blk import FRAMINGS, BlkConfig, BlkDevice, BlkDriver, BlkFeature, BlkStatus, BlkType
from ringwall.models.virtio.split import ARRANGEMENTS, RingError, RingFull, SplitDriver, gather, read_chain, scatter

CAPACITY = 64  # sectors
AREA = (0x100000, 0x100000)


def header(kind, sector=0):
    return kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")


def pattern(length, seed=0):
    return bytes((seed + n * 7 + (n >> 8)) & 0xFF for n in range(length))


def filled(**options):
    device = BlkDevice(CAPACITY, **options)
    device.store[:] = pattern(CAPACITY * 512)
    return device


def answer(device, readable, room):
    """The unique outcome of a request as (bytes, status)."""
    result = device.execute(readable, room)
    assert len(result.outcomes) == 1
    return result.written, result.status


class Server:
    """A device on a ring that serves chains one by one with a `BlkDevice`, as its first outcome says."""

    def __init__(self, memory, ring, device, *, indirect=False):
        self.memory, self.layout, self.device, self.indirect = memory, ring.layout, device, indirect
        self.avail = self.used = 0

    def serve(self, most=1 << 16):
        results = []
        while self.avail != self.memory.load_uw_le(self.layout.avail_idx) and most:
            head = self.memory.load_uw_le(self.layout.avail_slot(self.avail))
            chain = read_chain(self.memory, self.layout, head, indirect=self.indirect)
            assert not chain.error
            before = gather(self.memory, chain.writable)
            result = self.device.execute(gather(self.memory, chain.readable), chain.writable_bytes)
            first = result.outcomes[0]
            length = 0
            if first.status is not None:
                data = first.data.ljust(result.room - 1, b"\0")
                scatter(self.memory, chain.writable, data + bytes([first.status]))
                length = result.room
            assert result.problem(before, gather(self.memory, chain.writable), length) == ""
            self.memory.write(self.layout.used_slot(self.used), head.to_bytes(4, "little") + length.to_bytes(4, "little"))
            self.avail, self.used, most = self.avail + 1 & 0xFFFF, self.used + 1 & 0xFFFF, most - 1
            self.memory.store_uw_le(self.layout.used_idx, self.used)
            results.append(result)
        return results


def test_blk_requests():
    """MODEL-BLK-1: IN, OUT, FLUSH and GET_ID do what their words say, header and status where they must be (R10)."""
    device = filled(serial=b"ringwall-0")
    assert answer(device, header(0, 3), 1025) == (pattern(64 * 512)[1536:2560] + b"\0", BlkStatus.OK)
    assert answer(device, header(1, 3) + bytes(range(256)) * 4, 1) == (b"\0", BlkStatus.OK)
    assert device.store[1536:2560] == bytes(range(256)) * 4
    assert device.store[:1536] + device.store[2560:] == pattern(64 * 512)[:1536] + pattern(64 * 512)[2560:]
    assert answer(device, header(4), 1) == (b"\0", BlkStatus.OK)
    assert answer(device, header(8), 21) == (b"ringwall-0" + bytes(10) + b"\0", BlkStatus.OK)
    assert answer(BlkDevice(1, serial=b"x" * 20), header(8), 21) == (b"x" * 20 + b"\0", BlkStatus.OK)
    assert answer(device, header(0, 0), 1) == (b"\0", BlkStatus.OK)
    # By hand: type 1, reserved that is not 0 and says nothing, sector 2.
    assert answer(device, bytes.fromhex("01000000 efbeadde 0200000000000000") + b"\x11" * 512, 1) == (b"\0", BlkStatus.OK)
    assert device.store[1024:1536] == b"\x11" * 512


@pytest.mark.parametrize("sector, sectors, is_good", [
    (0, CAPACITY, True), (0, CAPACITY + 1, False), (CAPACITY - 1, 1, True), (CAPACITY - 1, 2, False), (CAPACITY, 1, False),
    ((1 << 64) - 1, 1, False), ((1 << 64) - 1, 2, False), ((1 << 55) - 1, 2, False), (1 << 55, 1, False), (1 << 32, 1, False),
])  # fmt: skip
def test_blk_capacity(sector, sectors, is_good):
    """MODEL-BLK-2: an access that leaves the capacity, by a sum that leaves 64 bits too, is IOERR and changes nothing (V148)."""
    device = filled()
    before = bytes(device.store)
    status = BlkStatus.OK if is_good else BlkStatus.IOERR
    assert device.execute(header(0, sector), 512 * sectors + 1).status is status
    assert device.store == before
    assert device.execute(header(1, sector) + b"\x5a" * (512 * sectors), 1).status is status
    assert (device.store == before) is not is_good
    assert len(device.store) == 512 * CAPACITY
    for length in (1, 511, 513):  # no whole sectors
        now = bytes(device.store)
        assert device.execute(header(0), length + 1).status is BlkStatus.IOERR
        assert device.execute(header(1) + bytes(length), 1).status is BlkStatus.IOERR
        assert device.store == now


def test_blk_errors():
    """MODEL-BLK-3: a failed IN leaves bytes as they were or zero, whole or in part; anything else leaks; the reported length covers
    no more than was written (V040, V041, V148)."""
    result = filled().execute(header(0, CAPACITY), 9)
    before = b"abcd\0fgh\xff"
    assert result.written is None
    assert 9 in result.used_len_allowed
    assert 10 not in result.used_len_allowed
    for after, most in [(bytes(8) + b"\1", 9), (before[:8] + b"\1", 0), (b"\0\0cd\0fgh\1", 2), (b"\0\0\0\0\0fgh\1", 5),
                        (b"abcd\0\0\0\0\1", 0)]:  # fmt: skip
        for length in range(11):
            assert (result.problem(before, after, length) == "") is (length <= most), (after, length)
    for after, what in [(b"abcx\0fgh\1", "byte 3 is 0x78"), (bytes(8) + b"\0", "status 0"), (bytes(8) + b"\2", "status 2"),
                        (before, "status 255"), (bytes(7) + b"\1\1", "byte 7 is 0x01")]:  # fmt: skip
        assert what in result.problem(before, after, 0)
    with pytest.raises(ValueError, match="must be 9, not 8 and 9"):
        result.problem(before[:8], before, 0)
    good = filled().execute(header(0, 1), 513)
    data = pattern(1024)[512:]
    for length in (0, 1, 512, 513):
        assert good.problem(b"\xa5" * 513, data + b"\0", length) == ""
    assert "used length 514 of 513" in good.problem(b"\xa5" * 513, data + b"\0", 514)
    assert "byte 5 is" in good.problem(b"\xa5" * 513, data[:5] + bytes([data[5] ^ 1]) + data[6:] + b"\0", 0)
    assert "status 1" in good.problem(b"\xa5" * 513, data + b"\1", 0)


@pytest.mark.parametrize("kind", sorted({*range(32), 1 << 31, 0x0100_0000} - {0, 1, 4, 8}))
def test_blk_unknown(kind):
    """MODEL-BLK-4: types that the device does not carry, discard to zones among them, are UNSUPP and change nothing (V143, V144,
    V147, V148)."""
    device = filled()
    for readable, room in ((header(kind), 1), (header(kind) + bytes(16), 1), (header(kind), 65)):
        result = device.execute(readable, room)
        assert [one.status for one in result.outcomes] == [BlkStatus.UNSUPP]
        assert result.problem(b"\xee" * room, bytes(room - 1) + b"\2", room) == ""
        assert result.problem(b"\xee" * room, b"\xee" * (room - 1) + b"\2", 0) == ""
        assert result.problem(b"\xee" * room, bytes(room), 0) != ""
    assert device.store == pattern(64 * 512)


def test_blk_malformed():
    """MODEL-BLK-5: a short header, no byte for the status, bytes of the wrong direction: bounded answers, nothing changed or leaked,
    the next request works (V148)."""
    device = filled()
    for length in range(16):
        result = device.execute(header(1, 0)[:length], 5)
        assert (result.status, result.written) == (None, None)
        assert result.problem(b"abcd\xff", b"abcd\xff", 0) == ""
        assert "used length 1, must be 0" in result.problem(b"abcd\xff", b"abcd\xff", 1)
        assert result.problem(b"abcd\xff", b"\0\0\0\0\1", 5) == ""
        assert result.problem(b"abcd\xff", b"\0\0\0\0\0", 5) != ""
    for readable in (b"", header(0), header(1) + bytes(512), header(8)):
        result = device.execute(readable, 0)
        assert (result.written, result.status) == (b"", None)
        assert 0 in result.used_len_allowed
        assert 1 not in result.used_len_allowed
        assert result.problem(b"", b"", 0) == ""
    assert answer(device, header(0, 1) + b"surplus", 513)[0] == pattern(1024)[512:] + b"\0"
    result = device.execute(header(1, 1) + bytes(512), 4)
    assert result.status is BlkStatus.OK
    assert result.problem(b"abc\xff", b"abc\0", 0) == result.problem(b"abc\xff", bytes(4), 4) == ""
    assert "used length 1 of 0" in result.problem(b"abc\xff", b"abc\0", 1)
    assert device.store[512:1024] == bytes(512)
    for room in (1, 5, 20, 22):  # GET_ID with other than 20 bytes
        result = device.execute(header(8), room)
        assert {one.status for one in result.outcomes} == {BlkStatus.OK, BlkStatus.IOERR}
    result = device.execute(header(0, CAPACITY + 1), 1)  # no bytes, beyond the capacity
    assert {one.status for one in result.outcomes} == {BlkStatus.OK, BlkStatus.IOERR}
    assert {one.status for one in filled(features=0).execute(header(4), 1).outcomes} == {BlkStatus.OK, BlkStatus.UNSUPP}


def test_blk_read_only():
    """MODEL-BLK-6: with RO every OUT is IOERR, good or not, and nothing is written (V142)."""
    device = filled(read_only=True)
    assert device.features >> BlkFeature.RO & 1
    for sector, length in ((0, 512), (CAPACITY, 512), (0, 5), (0, 0)):
        assert answer(device, header(1, sector) + b"\x77" * length, 1) == (b"\1", BlkStatus.IOERR)
    assert device.store == pattern(64 * 512)
    assert answer(device, header(0, 0), 513)[1] is BlkStatus.OK
    assert answer(device, header(4), 1)[1] is BlkStatus.OK


def test_blk_config():
    """MODEL-BLK-7: the device configuration byte by byte; what is offered is there before FEATURES_OK; padding is 0 (V012, V139 to
    V141)."""
    features = sum(1 << bit for bit in (BlkFeature.SIZE_MAX, BlkFeature.SEG_MAX, BlkFeature.BLK_SIZE, BlkFeature.FLUSH,
                                        BlkFeature.CONFIG_WCE, BlkFeature.MQ))  # fmt: skip
    device = BlkDevice(0x123, features=features, size_max=0x1_0000, seg_max=126, blk_size=4096, num_queues=4)
    assert device.config().hex() == (
        "2301000000000000" "00000100" "7e000000" "00000000" "00100000" "0000000000000000" "01" "00" "0400" + "00" * 24)  # fmt: skip
    assert device.config(features & ~(1 << BlkFeature.FLUSH))[32] == 0
    assert device.config(features & ~(1 << BlkFeature.CONFIG_WCE))[32] == 0
    assert device.config(features) == device.config()
    assert BlkDevice(7).config() == b"\7" + bytes(59)
    assert BlkConfig.unpack(device.config()) == BlkConfig(0x123, 0x1_0000, 126, 4096, 1, 4, bytes(4))
    raw = bytearray(device.config())
    raw[33], raw[57] = 1, 2
    assert BlkConfig.unpack(bytes(raw)).padding == b"\1\2\0\0"
    for arguments, message in [({"features": 1 << 11}, "FLUSH where CONFIG_WCE"), ({"features": 1 << 15 | 1 << 9}, "not 0x8000"),
                               ({"serial": b"x" * 21}, "at most 20 bytes"), ({"num_queues": 0}, "not 0")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            BlkDevice(1, **arguments)
    with pytest.raises(ValueError, match="not -1"):
        BlkDevice(-1)
    with pytest.raises(ValueError, match="at least 60 bytes, not 8"):
        BlkConfig.unpack(bytes(8))


REQUESTS = [(header(0, 5), 513), (header(1, 5) + pattern(512, 9), 1), (header(4), 1), (header(8), 21), (header(0, CAPACITY), 513),
            (header(1, CAPACITY) + pattern(512), 1), (header(99), 33), (header(0, 5)[:9], 4)]  # fmt: skip


def through_ring(readable, room, cuts_in, cuts_out, *, size=8, arrangement="contiguous", direct=None):
    """Serve one request whose bytes are cut at these places; return what is seen of it."""
    memory, device = GuestMemory(), filled(serial=b"id")
    ring = SplitDriver(memory, size=size, base=0x10000, arrangement=arrangement, rng=random.Random(1), indirect=direct is not None)
    spans = []
    for at, total, cuts in ((0x20_0000, len(readable), cuts_in), (0x80_0000, room, cuts_out)):
        edges = [0, *sorted({cut for cut in cuts if 0 < cut < total}), total]
        # Buffers far apart and out of order, so that nothing holds together by chance.
        spans.append([(at + 0x1000 * (600 - n) + 3, edges[n + 1] - edges[n]) for n in range(len(edges) - 1) if edges[n + 1] > edges[n]])
    scatter(memory, spans[0], readable)
    scatter(memory, spans[1], b"\xa5" * room)
    ring.add_chain(*spans, direct=direct)
    ring.publish()
    Server(memory, ring, device, indirect=direct is not None).serve()
    [(_, length)] = ring.poll_used()
    return gather(memory, spans[1]), length, bytes(device.store)


@pytest.mark.parametrize("readable, room", REQUESTS, ids=["in", "out", "flush", "id", "in beyond", "out beyond", "unknown", "short"])
def test_blk_every_cut(readable, room):
    """MODEL-BLK-8: a request cut in two at every single byte, of either side, ends as the uncut one does (V024, R12)."""
    whole = through_ring(readable, room, [], [])
    for cut in range(1, len(readable)):
        assert through_ring(readable, room, [cut], []) == whole, cut
    for cut in range(1, room):
        assert through_ring(readable, room, [], [cut]) == whole, cut
    assert through_ring(readable, room, range(1, len(readable)), range(1, room), size=2048) == whole


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(REQUESTS), st.sets(st.integers(1, 530), max_size=20), st.sets(st.integers(1, 520), max_size=20),
       st.sampled_from(ARRANGEMENTS), st.one_of(st.none(), st.just(0)))  # fmt: skip
def test_blk_any_cuts(request_, cuts_in, cuts_out, arrangement, direct):
    """MODEL-BLK-9: cut at any places, arranged in any order, behind a table or not: the same (V024, V030)."""
    readable, room = request_
    cut = through_ring(readable, room, cuts_in, cuts_out, size=64, arrangement=arrangement, direct=direct)
    assert cut == through_ring(readable, room, [], [])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([4, 16, 64]), st.sampled_from(ARRANGEMENTS), st.sampled_from([1, 4, 512, 4096]))
def test_blk_driver(seed, size, arrangement, alignment):
    """MODEL-BLK-10: random requests in every framing against a plain bytearray; nothing else is touched; buffers all come back
    (V024, R12)."""
    rng = random.Random(seed)
    memory, device, oracle = GuestMemory(), filled(serial=b"serial"), bytearray(pattern(CAPACITY * 512))
    ring = SplitDriver(memory, size=size, base=0x10000, arrangement=arrangement, rng=rng)
    driver = BlkDriver(ring, memory, area=AREA, rng=rng, alignment=alignment)
    server, expected, count = Server(memory, ring, device), {}, 0
    for _ in range(40):
        framing = rng.choice(list(FRAMINGS))
        sectors = rng.choice([0, 1, 1, 2, 9])
        sector = rng.randrange(CAPACITY - sectors + 1)
        try:
            match rng.randrange(6):
                case 0 | 1:
                    made = driver.read(sector, 512 * sectors, framing=framing)
                    expected[made] = (BlkType.IN, sector, sectors)
                case 2 | 3:
                    data = rng.randbytes(512 * sectors)
                    made = driver.write(sector, data, framing=framing)
                    expected[made] = (BlkType.OUT, sector, data)
                case 4:
                    made = driver.flush(framing=framing)
                    expected[made] = (BlkType.FLUSH, 0, b"")
                case 5:
                    made = driver.get_id(framing=framing)
                    expected[made] = (BlkType.GET_ID, 0, b"serial".ljust(20, b"\0"))
            assert all(length and (alignment == 1 or address % alignment == 0) for address, length in made.readable + made.writable)
            assert not made.is_done
        except RingFull:
            assert ring.free_count < size
        driver.publish()
        if rng.random() < 0.6:
            server.serve(rng.randrange(1, 4))
            for done in driver.poll():
                kind, sector, what = expected.pop(done)
                assert (done.is_done, done.status) == (True, BlkStatus.OK)
                match kind:
                    case BlkType.IN:
                        assert done.data == oracle[512 * sector : 512 * (sector + what)]
                    case BlkType.OUT:
                        oracle[512 * sector : 512 * sector + len(what)] = what
                    case _:
                        assert done.data == what
                count += 1
    server.serve()
    driver.poll()
    assert count
    assert driver.damage == []
    assert driver.requests == {}
    assert ring.free_count == size
    assert driver.buffers.free == [AREA]


@pytest.mark.parametrize("framing", list(FRAMINGS))
def test_blk_framings(framing):
    """MODEL-BLK-11: each framing cuts as its name says, within the descriptors that there are (V024)."""
    rng = random.Random(5)
    for most in (1, 2, 3, 8, 40):
        for parts in ([16, 0], [16, 512], [9000, 1], [0, 1], [20, 1], [3, 0]):
            cut = FRAMINGS[framing](parts, rng, most)
            assert sum(cut) == sum(parts)
            assert 1 <= len(cut) <= most
            assert all(cut)
    cut = FRAMINGS[framing]([16, 8192], rng, 8000)
    assert {"parts": cut == [16, 8192], "whole": cut == [8208], "pages": cut == [16, 4096, 4096], "random": len(cut) > 1,
            "bytes": cut == [1] * 7999 + [209]}[framing]  # fmt: skip


def test_blk_driver_damage():
    """MODEL-BLK-12: a write in front of or behind a buffer, or into readable bytes, is found; a status that was not written shows."""
    for where in ("front", "behind", "readable", "nowhere"):
        memory = GuestMemory()
        ring = SplitDriver(memory, size=8, base=0x10000)
        driver = BlkDriver(ring, memory, area=AREA, rng=random.Random(2))
        made = driver.read(0, 512)
        driver.publish()
        address, length = made.writable[0]
        match where:
            case "front":
                memory.store_ub(address - 1, 0)
            case "behind":
                memory.store_ub(address + length, 0)
            case "readable":
                memory.store_ub(made.readable[0][0] + 15, 1)
        memory.write(ring.layout.used_slot(0), made.head.to_bytes(4, "little") + bytes(4))
        memory.store_uw_le(ring.layout.used_idx, 1)
        assert driver.poll() == [made]
        assert (made.status, made.data, made.used_len) == (0xFF, b"\xa5" * 512, 0)
        wanted = {"front": ["in front of the buffer of 512"], "behind": ["behind the buffer of 512"],
                  "readable": ["device-readable bytes"], "nowhere": []}[where]  # fmt: skip
        assert len(driver.damage) == len(wanted)
        assert all(text in found for text, found in zip(wanted, driver.damage))


def test_blk_driver_limits():
    """MODEL-BLK-13: no descriptors or no room: refused, nothing is left behind; strangers in the used ring are told; a reset frees."""
    memory = GuestMemory()
    ring = SplitDriver(memory, size=4, base=0x10000)
    driver = BlkDriver(ring, memory, area=(0x100000, 2048), rng=random.Random(2))
    with pytest.raises(RingFull, match="no room for a buffer of 4096"):
        driver.read(0, 4096)
    assert driver.buffers.free == [(0x100000, 2048)]
    assert ring.free_count == 4
    driver.read(0, 512)
    with pytest.raises(RingFull, match="1 descriptors are free"):
        driver.flush()
    stranger = ring.add_chain([(0, 1)])
    with pytest.raises(RingFull, match="0 descriptors are free"):
        driver.flush()
    driver.publish()
    memory.write(ring.layout.used_slot(0), stranger.to_bytes(4, "little") + bytes(4))
    memory.store_uw_le(ring.layout.used_idx, 1)
    with pytest.raises(RingError, match="none of this driver's requests"):
        driver.poll()
    driver.abandon()
    ring.reset()
    assert driver.buffers.free == [(0x100000, 2048)]
    assert driver.requests == {}
    short = driver.request(BlkType.IN, 0, room=0, header_bytes=5)
    assert (sum(length for _, length in short.readable), short.writable) == (5, ())
    assert driver.request(BlkType.IN, room=3, header_bytes=0).readable == ()
    for arguments, message in [({"framing": "odd"}, "not 'odd'"), ({"alignment": 3}, "not 3"), ({"alignment": 8192}, "not 8192")]:
        with pytest.raises(ValueError, match=message):
            BlkDriver(ring, memory, area=AREA, rng=random.Random(1), **arguments)


def test_blk_forget():
    """MODEL-BLK-14: sectors that a failed OUT may have changed are anything until they are written; their neighbours are not."""
    device = filled()
    device.forget(4, 2)
    device.forget(CAPACITY - 1, 5)
    assert device.unknown == {4, 5, CAPACITY - 1}
    result = device.execute(header(0, 3), 4 * 512 + 1)
    good = bytearray(pattern(64 * 512)[3 * 512 : 7 * 512] + b"\0")
    assert result.written is None
    for at, is_free in ((511, False), (512, True), (1535, True), (1536, False)):
        after = bytearray(good)
        after[at] ^= 0xFF
        assert (result.problem(bytes(2049), bytes(after), 2049) == "") is is_free
    device.execute(header(1, 4) + bytes(1024), 1)
    assert device.unknown == {CAPACITY - 1}
    assert device.execute(header(0, 4), 1025).written == bytes(1025)


def segment(sector, count, flags=0):
    return sector.to_bytes(8, "little") + count.to_bytes(4, "little") + flags.to_bytes(4, "little")


ZEROER = {"features": 1 << BlkFeature.FLUSH | 1 << BlkFeature.TOPOLOGY | 1 << BlkFeature.DISCARD | 1 << BlkFeature.WRITE_ZEROES,
          "topology": (3, 1, 0x0102, 0x0304_0506), "discard": (20, 3), "zeroes": (8, 2), "discard_alignment": 8}  # fmt: skip
DISCARD, ZERO = header(BlkType.DISCARD), header(BlkType.WRITE_ZEROES)


def statuses(device, readable, room=1):
    return {one.status for one in device.execute(readable, room).outcomes}


def test_blk_write_zeroes():
    """MODEL-BLK-15: WRITE_ZEROES makes its sectors zero, with UNMAP or without, nothing else; a discarded sector may hold anything until
    it is zeroed or written (V145)."""
    device = filled(**ZEROER)
    want = bytearray(device.store)
    for spans in (((3, 2),), ((0, 8), (CAPACITY - 1, 1)), ((CAPACITY, 0),)):
        for flags in (0, 1):
            assert answer(device, ZERO + b"".join(segment(*span, flags) for span in spans), 1) == (b"\0", BlkStatus.OK)
            for sector, count in spans:
                want[512 * sector : 512 * (sector + count)] = bytes(512 * count)
            assert device.store == want
    assert statuses(device, DISCARD + segment(10, 3) + segment(20, 1)) == {BlkStatus.OK}
    assert device.unknown == {10, 11, 12, 20}
    assert statuses(device, ZERO + segment(9, 3)) == {BlkStatus.OK}
    assert device.unknown == {12, 20}
    assert device.execute(header(0, 9), 3 * 512 + 1).problem(bytes(1537), bytes(1537), 1537) == ""
    assert device.execute(header(0, 12), 513).problem(bytes(513), b"\x77" * 512 + b"\0", 513) == ""


def test_blk_segments_refused():
    """MODEL-BLK-16: an unknown flag, or UNMAP to discard, is UNSUPP whatever else is wrong; beyond the capacity is IOERR; more than was
    offered, and no whole segments, are open; what may have been done is not known (V142 to V144, V148)."""
    for kind, bad in ((DISCARD, (1, 2, 1 << 31)), (ZERO, (2, 3, 1 << 31))):
        for flags in bad:
            for data in (segment(1, 1, flags), segment(1, 1) + segment(2, 1, flags), segment(CAPACITY, 9, flags) * 5,
                         segment(1, 1, flags) + b"x"):  # fmt: skip
                device = filled(**ZEROER)
                assert statuses(device, kind + data) == {BlkStatus.UNSUPP}
                assert device.store == pattern(CAPACITY * 512)
        for sector, count in ((CAPACITY, 1), (CAPACITY - 1, 2), ((1 << 64) - 1, 2), (0, (1 << 32) - 1)):
            device = filled(**ZEROER)
            assert statuses(device, kind + segment(5, 1) + segment(sector, count)) == {BlkStatus.IOERR}
            assert 5 in device.unknown and 4 not in device.unknown
        everything = {BlkStatus.OK, BlkStatus.IOERR, BlkStatus.UNSUPP}
        assert statuses(filled(**ZEROER), kind + segment(0, 21)) == everything
        assert statuses(filled(**ZEROER), kind + segment(0, 1) * 4) == everything
        assert statuses(filled(**ZEROER), kind) == statuses(filled(**ZEROER), kind + segment(0, 1)[:-1]) == everything - {BlkStatus.OK}
        assert statuses(filled(**ZEROER, read_only=True), kind + segment(0, 1)) == {BlkStatus.IOERR}
        assert statuses(filled(**ZEROER), kind + segment(0, 1), room=0) == {None}


def test_blk_more_config():
    """MODEL-BLK-17: topology and limits of DISCARD and WRITE_ZEROES where they are, only when offered; writeback as said (V012, V140)."""
    raw = BlkDevice(7, **ZEROER).config()
    assert raw[24:36].hex() == "0301" "0201" "06050403" "00000000"
    assert raw[36:].hex() == "14000000" "03000000" "08000000" "08000000" "02000000" "00000000"
    seen = BlkConfig.unpack(raw)
    assert (seen.topology, seen.discard, seen.zeroes) == ((3, 1, 0x0102, 0x0304_0506), (20, 3, 8), (8, 2, 0))
    assert BlkDevice(7, **ZEROER | {"features": 1 << BlkFeature.FLUSH}).config() == BlkDevice(7).config()
    both = 1 << BlkFeature.FLUSH | 1 << BlkFeature.CONFIG_WCE
    assert [BlkDevice(7, features=both, writeback=value).config()[32] for value in (None, 0, 1)] == [1, 0, 1]


def test_blk_driver_zeroes():
    """MODEL-BLK-18: a driver's DISCARD and WRITE_ZEROES through a ring, in every framing (V024)."""
    for framing in FRAMINGS:
        memory, device = GuestMemory(), filled(**ZEROER)
        ring = SplitDriver(memory, size=64, base=0x10000, rng=random.Random(1))
        driver = BlkDriver(ring, memory, area=AREA, rng=random.Random(2), framing=framing)
        requests = [driver.write_zeroes((1, 2), (5, 1), unmap=True), driver.discard((7, 1))]
        driver.publish()
        Server(memory, ring, device).serve()
        driver.poll()
        assert [request.status for request in requests] == [BlkStatus.OK] * 2
        want = bytearray(pattern(CAPACITY * 512))
        want[512:1536], want[2560:3072] = bytes(1024), bytes(512)
        assert (device.store, device.unknown, driver.damage) == (want, {7}, [])
