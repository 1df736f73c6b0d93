"""virtio-net, console and rng: the golden devices by worked examples, what they allow and what not, and their drivers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.buffers import Buffers, RingUser
from ringwall.models.virtio.console import ConsoleDevice, ConsoleDriver, ConsoleFeature
from ringwall.models.virtio.net import HEADER_BYTES, NetDevice, NetDriver, NetFeature, NetHeader, missing_features, pair_of
from ringwall.models.virtio.packets import UDP, any_packet, internet_sum, packet, transport_of
from ringwall.models.virtio.rng import answer_problem
from ringwall.models.virtio.split import RingError, RingFull, SplitDriver, gather, read_chain, scatter

MAC = b"\x02\0\0\0\0\1"
EVERYTHING = sum(1 << bit for bit in NetFeature)


def bits(*features):
    return sum(1 << bit for bit in features)


# -- packets --


def test_packets_by_hand():
    """MODEL-PACKET-1: a UDP packet of RFC 768 and 1071, worked by hand; the partial one has the sum of the pseudo header."""
    made = packet(b"hi", protocol=UDP, ports=(1, 2))
    # Addresses 0.0.0.1 and 0.0.0.2, protocol 17, length 10 twice, ports 1 and 2, "hi" 0x6869.
    pseudo = 1 + 2 + 17 + 10
    assert made.partial[40:42] == pseudo.to_bytes(2, "big")
    assert made.frame[40:42] == (~(pseudo + 10 + 1 + 2 + 0x6869) & 0xFFFF).to_bytes(2, "big")
    assert (made.csum_start, made.csum_offset, len(made.frame)) == (34, 6, 44)
    assert internet_sum(made.frame[14:34]) == 0xFFFF
    assert internet_sum(b"\xff\xff\0\1\x80") == 0x8001
    with pytest.raises(ValueError, match="not 1"):
        packet(b"", protocol=1)
    with pytest.raises(ValueError, match="at least 62 bytes, not 61"):
        any_packet(random.Random(0), 61, protocol=UDP, is_ipv6=True)


@given(st.integers(0, 1 << 32), st.integers(82, 1514), st.booleans(), st.sampled_from([None, 5]))
@settings(max_examples=150, deadline=None)
def test_packets_any(seed, length, damaged, vlan):
    """MODEL-PACKET-2: the reader finds the transport of every packet that is made, and whether its checksum is right."""
    made = any_packet(random.Random(seed), length + 4 * (vlan is not None), damaged=damaged, vlan=vlan)
    assert transport_of(made.frame) == (made.csum_start, made.csum_start + made.csum_offset, not damaged)
    assert transport_of(made.frame[: made.csum_start + 5]) is None
    padded = made.frame + bytes(9)  # what lies behind the network packet's end does not count
    assert transport_of(padded) == transport_of(made.frame)


def test_packets_of_no_kind():
    """MODEL-PACKET-3: a fragment, another protocol, a cut header, UDP without a checksum and ARP have no transport to judge."""
    good = packet(b"x" * 40, protocol=UDP).frame
    assert transport_of(good)

    def changed(at, value):
        return good[:at] + bytes([value]) + good[at + 1 :]

    changes = ((20, 0x20), (21, 1), (23, 1), (14, 0x65), (14, 0x44), (17, 25), (16, 1), (12, 9))
    for frame in (*(changed(*one) for one in changes), good[:40] + b"\0\0" + good[42:], b"", good[:20]):
        assert transport_of(frame) is None


# -- net --


def test_net_features():
    """MODEL-NET-1: a feature without what it needs is named, chains of needs included; every set that the device takes is closed (V005)."""
    assert missing_features(bits(7)) == [(7, (1,))]
    assert missing_features(bits(0, 11, 13)) == []
    assert missing_features(bits(0, 13)) == [(13, (11, 12))]
    assert missing_features(bits(17, 51)) == [(51, (60, 57))]
    assert missing_features(bits(68, 0)) == [(68, (67,))]
    for bit in (18, 19, 21, 22, 23, 52, 53, 60):
        assert missing_features(bits(bit)) == [(bit, (17,))]
        assert not missing_features(bits(bit, 17))
    assert not missing_features(EVERYTHING)
    for bad, sentence in (({"features": bits(18)}, r"\(18, \(17,\)\)"), ({"features": bits(7, 1)}, "known"), ({"mtu": 67}, "not 67"),
                          ({"mac": b"\1" * 6}, "one device"), ({"mtu": 65536}, "not 65536"), ({"pairs": 0}, "not 0"),
                          ({"pairs": 0x8001}, "not 32769")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            NetDevice(**{"features": 0} | bad)


def test_net_config():
    """MODEL-NET-2: mac, status, pairs and mtu stand where 5.1.4 has them, and only with their features; header fields likewise (V150)."""
    device = NetDevice(EVERYTHING, mac=MAC, mtu=1400, pairs=3)
    assert device.config() == MAC + bytes([1, 0, 3, 0]) + (1400).to_bytes(2, "little")
    device.is_up = False
    assert device.config()[6] == 0
    assert NetDevice(0, mac=MAC).config() == bytes(12)
    raw = bytes([1, 0x80, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    header = NetHeader.unpack(raw)
    assert header == NetHeader(1, 0x80, 0x302, 0x504, 0x706, 0x908, 0xB0A)
    assert header.pack() == raw
    with pytest.raises(ValueError, match="not 11"):
        NetHeader.unpack(raw[:11])
    assert [pair_of(n, 2) for n in range(5)] == [("receive", 0), ("transmit", 0), ("receive", 1), ("transmit", 1), ("control", 0)]
    with pytest.raises(ValueError, match="not 5"):
        pair_of(5, 2)


@given(st.integers(0, 1 << 32), st.integers(82, 1514))
@settings(max_examples=100, deadline=None)
def test_net_sent(seed, length):
    """MODEL-NET-3: what leaves is the frame, with NEEDS_CSUM and CSUM with its checksum; unknown flags say nothing (V151, V152)."""
    rng = random.Random(seed)
    made, device = any_packet(rng, length), NetDevice(bits(0), mac=MAC)
    header = NetHeader(flags=1, csum_start=made.csum_start, csum_offset=made.csum_offset)
    assert made.frame in device.sent(header.pack() + made.partial)
    for flags in (0, 0xFE):
        assert device.sent(NetHeader(flags=flags, csum_start=9, csum_offset=9).pack() + made.partial) == (made.partial,)
    assert NetDevice(0, mac=MAC).sent(header.pack() + made.partial) == (made.partial,)


def test_net_sent_wrong():
    """MODEL-NET-4: what no driver may send is dropped or goes as it is: no header, no frame, checksum beyond it, segmentation, too long."""
    device = NetDevice(bits(0), mac=MAC)
    frame = packet(b"x" * 20).frame
    assert device.sent(b"") == (None,)
    assert device.sent(bytes(12)) == (None,)
    assert device.sent(bytes(12) + frame[:13]) == (None, frame[:13])
    assert device.sent(NetHeader(1, csum_start=len(frame) - 1).pack() + frame) == (frame, None)
    assert len(device.sent(NetHeader(1, csum_start=len(frame) - 2).pack() + frame)) == 1
    assert device.sent(NetHeader(gso_type=1, gso_size=9).pack() + frame) == (frame, None)
    assert device.sent(bytes(12) + bytes(1518)) == (bytes(1518),)
    assert device.sent(bytes(12) + bytes(1519)) == (bytes(1519), None)
    zero = device.sent(NetHeader(1, csum_start=20, csum_offset=0).pack() + bytes(20) + b"\0\0\xff\xff")
    assert set(zero) == {bytes(20) + b"\0\0\xff\xff", bytes(20) + b"\xff\xff\xff\xff"}


def into(header, frame, *rooms):
    """Return the buffers that a device fills with header and frame."""
    left, found = header.pack() + frame, []
    for room in rooms:
        found.append((left[:room], room))
        left = left[room:]
    return found


def test_net_received():
    """MODEL-NET-5: what a receive ring may hold, and each wrong thing: num_buffers, full buffers, flags (V153, V154, V156)."""
    frame = packet(b"x" * 200)
    plain, merging = NetDevice(bits(1), mac=MAC), NetDevice(bits(15), mac=MAC)
    one, three = NetHeader(num_buffers=1), NetHeader(num_buffers=3)
    assert plain.problem(frame.frame, into(one, frame.frame, 1526)) == ""
    assert merging.problem(frame.frame, into(three, frame.frame, 100, 100, 100)) == ""
    assert plain.problem(frame.frame, into(NetHeader(2, num_buffers=1), frame.frame, 1526)) == ""
    partial = NetHeader(1, csum_start=frame.csum_start, csum_offset=frame.csum_offset, num_buffers=1)
    assert plain.problem(frame.frame, into(partial, frame.partial, 1526)) == ""
    damaged = packet(b"x" * 200, damaged=True).frame
    short = [(into(three, frame.frame, 100, 100, 100)[0][0][:99], 100), *into(three, frame.frame, 99, 101, 100)[1:]]
    for device, wanted, buffers, why in (
        (plain, frame.frame, into(NetHeader(), frame.frame, 1526), "V153: num_buffers is 0, 1 were used"),
        (plain, frame.frame, into(NetHeader(num_buffers=2), frame.frame, 100, 1526), "V153: 2 buffers without"),
        (merging, frame.frame, into(NetHeader(num_buffers=2), frame.frame, 100, 100, 100), "V153: num_buffers is 2"),
        (merging, frame.frame, short, "V154: buffer 0 of 3 has 99 of 100"),
        (merging, frame.frame, into(NetHeader(2, num_buffers=1), frame.frame, 1526), "V156: flags are 0x2"),
        (plain, frame.frame, into(NetHeader(4, num_buffers=1), frame.frame, 1526), "V156: flags are 0x4"),
        (plain, frame.frame, into(NetHeader(gso_type=1, num_buffers=1), frame.frame, 1526), "V156: gso_type"),
        (plain, damaged, into(NetHeader(2, num_buffers=1), damaged, 1526), "DATA_VALID"),
        (plain, frame.frame, into(one, damaged, 1526), "differ from the frame's"),
        (plain, frame.frame, into(one, frame.frame[:-1], 1526), "differ from the frame's 254 at 253"),
        (plain, damaged, into(partial, frame.partial, 1526), "not the frame"),
        (plain, frame.frame, into(NetHeader(1, csum_start=300, num_buffers=1), frame.frame, 1526), "lies beyond"),
        (plain, frame.frame, [(bytes(11), 1526)], "no whole header"), (plain, frame.frame, [], "no whole header"),
    ):  # fmt: skip
        assert why in device.problem(wanted, buffers)


def test_net_room():
    """MODEL-NET-6: how many buffers a frame needs, with and without MRG_RXBUF; a frame that fits exactly; one that fits nowhere (V154)."""
    plain, merging = NetDevice(0, mac=MAC), NetDevice(bits(15), mac=MAC)
    assert [plain.fits(bytes(88), rooms) for rooms in ([100], [99], [99, 1000], [])] == [1, 0, 0, 0]
    assert [merging.fits(bytes(88), rooms) for rooms in ([100], [99, 1], [12, 12, 76], [12, 12, 75], [])] == [1, 2, 3, 0, 0]


def test_net_wanted():
    """MODEL-NET-7: frames for the device, for all, and for its table must be taken; with MTU none longer may be (V150)."""
    device = NetDevice(EVERYTHING, mac=MAC, mtu=100)
    other, group = b"\x02" * 6, b"\x01\0\x5e\0\0\1"

    def wants(target, length=114):
        return device.wants(target + bytes(length - 6))

    assert [wants(target) for target in (MAC, b"\xff" * 6, other, group)] == [True, True, False, False]
    assert [wants(MAC, length) for length in (13, 14, 114, 115)] == [False, True, True, False]
    assert [device.forbids(bytes(length)) for length in (114, 118, 119)] == [False, False, True]
    assert not NetDevice(0, mac=MAC).forbids(bytes(9000))
    assert device.control(bytes([0, 1, 1]), 1).acks == (0,)
    assert (wants(group), wants(other)) == (True, False)
    assert device.control(bytes([0, 0, 1]), 1).acks == (0,)
    assert wants(other)
    device.is_up = False
    assert not wants(MAC)


def test_net_control():
    """MODEL-NET-8: every command does what it says or ends in ERR and changes nothing: lengths, values, features, classes (V150)."""
    device = NetDevice(EVERYTHING, mac=MAC, pairs=4)
    macs = [bytes([2 * n, 1, 2, 3, 4, 5]) for n in range(3)]
    table = bytes([1, 0]) + (2).to_bytes(4, "little") + macs[0] + macs[1] + (1).to_bytes(4, "little") + b"\1\0\x5e\0\0\1"
    assert device.control(table, 1).acks == (0,)
    assert device.table == {macs[0], macs[1], b"\1\0\x5e\0\0\1"}
    for bad in (table[:-1], table + b"\0", bytes([1, 0]), bytes([1, 0]) + b"\xff" * 4 + bytes(12), bytes([1, 2]), bytes([1, 1]) + bytes(5),
                bytes([0, 0]), bytes([0, 0, 2]), bytes([0, 0, 0, 0]), bytes([0, 2, 1]), bytes([4, 0, 0, 0]), bytes([4, 0, 5, 0]),
                bytes([4, 0, 1]), bytes([4, 1, 1, 0]), bytes([2, 0, 1, 0]), bytes([9]), b""):  # fmt: skip
        before = dict(vars(device))
        assert device.control(bad, 1).acks == (1,), bad
        assert vars(device) == before
    assert device.control(bytes([4, 0, 4, 0]), 1).acks == (0,)
    assert list(device.queues()) == [0, 1, 2, 3]
    assert device.control(bytes([1, 1]) + macs[2], 1).acks == (0,)
    assert device.config()[:6] == macs[2]
    assert device.control(bytes([0, 0, 1]), 0).acks == ()
    assert not device.promiscuous
    device.reset()
    assert (device.table, list(device.queues())) == (frozenset(), [0])
    assert NetDevice(bits(5), mac=MAC).control(bytes([0, 0, 1]), 1).acks == (1,)
    for bit, command in ((18, bytes([0, 0, 1])), (22, bytes([4, 0, 1, 0])), (23, bytes([1, 1]) + macs[0])):
        assert NetDevice(bits(5, 17), mac=MAC).control(command, 1).acks == (1,)
        assert NetDevice(bits(5, 17, bit), mac=MAC).control(command, 1).acks == (0,)


# -- drivers --


class Loop:
    """Two rings in one memory, and a device that hands what it is sent to ``serve(readable)``, which returns what to receive."""

    def __init__(self, seed, pieces=3):
        rng = random.Random(seed)
        self.memory = GuestMemory()
        self.rings = [SplitDriver(self.memory, size=16, base=base, rng=rng) for base in (0x10000, 0x14000)]
        buffers = Buffers(self.memory, (0x20000, 0x70000), rng)
        self.receive, self.transmit = (RingUser(ring, buffers, pieces=pieces) for ring in self.rings)
        self.seen, self.buffers = [0, 0], buffers

    def next(self, n):
        """Take the next chain of a ring; None: there is none."""
        layout = self.rings[n].layout
        if self.seen[n] == self.memory.load_uw_le(layout.avail_idx):
            return None
        head = self.memory.load_uw_le(layout.avail_slot(self.seen[n]))
        self.seen[n] += 1
        return head, read_chain(self.memory, layout, head)

    def use(self, n, head, length):
        layout = self.rings[n].layout
        at = self.memory.load_uw_le(layout.used_idx)
        self.memory.write(layout.used_slot(at), head.to_bytes(4, "little") + length.to_bytes(4, "little"))
        self.memory.store_uw_le(layout.used_idx, at + 1 & 0xFFFF)

    def deliver(self, data):
        """Write data into as many receive buffers as it needs; returns False, and uses none, when there are too few."""
        chains = []
        while sum(chain.writable_bytes for _, chain in chains) < len(data):
            one = self.next(0)
            if one is None:
                self.seen[0] -= len(chains)
                return False
            chains.append(one)
        for head, chain in chains:
            here, data = data[: chain.writable_bytes], data[chain.writable_bytes :]
            scatter(self.memory, chain.writable, here)
            self.use(0, head, len(here))
        return True


@pytest.mark.parametrize("seed", range(4))
def test_net_driver(seed):
    """MODEL-NET-9: frames go round a loop of merged buffers whole and in order, nothing is damaged, all memory comes back (V155)."""
    loop, rng = Loop(seed), random.Random(seed)
    device = NetDevice(bits(15), mac=MAC)
    driver = NetDriver(loop.receive, loop.transmit, room=200)
    waiting, whole, came = [], list(loop.buffers.free), 0
    for _ in range(60):
        driver.receive.fill(rng.randrange(4), 200)
        driver.receive.ring.publish()
        frame = any_packet(rng, rng.randrange(82, 900)).frame
        try:
            driver.send(frame)
            waiting.append(frame)
        except RingFull:
            pass
        driver.transmit.ring.publish()
        while (sent := loop.next(1)) is not None:
            head, chain = sent
            (out,) = device.sent(gather(loop.memory, chain.readable))
            rooms = -(-(HEADER_BYTES + len(out)) // 200)
            if not loop.deliver(NetHeader(num_buffers=rooms).pack() + out):
                loop.seen[1] -= 1
                break
            loop.use(1, head, 0)
        driver.sent()
        for buffers in driver.received():
            assert device.problem(waiting.pop(0), buffers) == ""
            came += 1
        assert not driver.is_between
    assert came > 10
    assert not driver.receive.damage + driver.transmit.damage
    driver.abandon()
    assert loop.buffers.free == whole


def test_net_driver_finds():
    """MODEL-NET-10: a foreign id, written guards and half a packet are found; wrong sizes are refused (V155)."""
    loop = Loop(1, pieces=1)
    driver = NetDriver(loop.receive, loop.transmit, room=100)
    driver.receive.fill(3, 100)
    driver.receive.ring.publish()
    head, chain = loop.next(0)
    scatter(loop.memory, chain.writable, NetHeader(num_buffers=2).pack() + bytes(88))
    loop.use(0, head, 100)
    assert driver.received() == []
    assert driver.is_between
    head, chain = loop.next(0)
    loop.memory.write(chain.writable[0][0] + 100, b"!")
    loop.use(0, head, 100)
    assert len(driver.received()) == 1
    assert ["bytes behind the buffer" in text for text in driver.receive.damage] == [True]
    loop.use(0, 15, 1)
    with pytest.raises(RingError):
        driver.received()
    with pytest.raises(ValueError, match="not 11"):
        NetDriver(loop.receive, loop.transmit, room=11)
    with pytest.raises(ValueError, match="not 0"):
        RingUser(loop.rings[0], loop.buffers, pieces=0)
    with pytest.raises(RingFull):
        driver.transmit.add(bytes(0x90000))


@pytest.mark.parametrize("seed", range(3))
def test_console(seed):
    """MODEL-CONSOLE-1: bytes go round a loop in order, none lost; config has cols and rows with SIZE only; a wrong byte is found."""
    loop, rng = Loop(seed), random.Random(seed)
    device, driver = ConsoleDevice(bits(ConsoleFeature.SIZE), cols=80, rows=25), ConsoleDriver(loop.receive, loop.transmit, room=50)
    assert device.config() == bytes([80, 0, 25, 0]) + bytes(8)
    assert ConsoleDevice(cols=80, rows=25).config() == bytes(12)
    for _ in range(50):
        driver.receive.fill(4, 50)
        driver.receive.ring.publish()
        text = rng.randbytes(rng.randrange(1, 120))
        driver.write(text)
        device.printed(text)
        driver.transmit.ring.publish()
        while (sent := loop.next(1)) is not None:
            head, chain = sent
            out = gather(loop.memory, chain.readable)
            assert device.shown(out) == ""
            device.typed(out)
            loop.use(1, head, 0)
            for n in range(0, len(out), 37):
                loop.deliver(out[n : n + 37])
        driver.written()
        assert device.arrived(driver.read()) == ""
    assert device.missing == (0, 0)
    assert not driver.receive.damage
    device.typed(b"abc")
    assert "b'abc' was typed" in device.arrived(b"abd")
    assert "was printed" in device.shown(b"x")
    driver.receive.fill(1, 50)
    driver.receive.ring.publish()
    loop.use(0, loop.next(0)[0], 0)
    assert driver.read() == b""
    assert len(driver.receive.damage) == 1
    with pytest.raises(ValueError, match="not 2"):
        ConsoleDevice(2)
    with pytest.raises(ValueError, match="not 0"):
        ConsoleDriver(loop.receive, loop.transmit, room=0)


def test_rng():
    """MODEL-RNG-1: one random byte or more, never beyond the buffer; what no driver may offer comes back in any way that fits."""
    assert [answer_problem(0, 64, used) for used in (0, 1, 64)] == ["no random byte", "", ""]
    assert answer_problem(0, 64, 65) == "65 bytes of 64"
    assert [answer_problem(8, 64, 0), answer_problem(0, 0, 0)] == ["", ""]
    assert answer_problem(8, 0, 1) == "1 bytes of 0"
