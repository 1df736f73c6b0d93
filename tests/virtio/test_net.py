"""Net: frames both ways, checksums, merged buffers, filters and queues, judged by the golden model of the device."""

import functools
import operator
import random
import struct

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.net import NetDevice as Golden
from ringwall.models.virtio.net import NetFeature, NetHeader
from ringwall.models.virtio.packets import any_packet, internet_sum, packet, transport_of
from ringwall.rtl.dma.layouts import ChainBeat, Segment, WriterDone
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.device import DeviceFunction
from ringwall.rtl.virtio.layouts import Chain
from ringwall.rtl.virtio.net import Net, NetDevice
from ringwall.rtl.virtio.net_layouts import NetBeat, Verdict
from ringwall.rtl.virtio.net_receive import ReceivePort
from ringwall.sim.back_end import BackEndBench, beats_of, taken_packets
from ringwall.sim.burst_bus import BurstMemory
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, start, unpack

MAC = bytes.fromhex("021122334455")
BUILDS = {"64": (64, 2), "128": (128, 1), "256": (256, 3), "512": (512, 1)}  # width, pairs
DATA_PATH = ["frames_leave", "frames_fill_buffers", "checksums_are_checked", "control_without_pairs", "overload_and_rates"]
REST = ["frames_without_agreed_checksums", "frames_take_one_buffer", "commands_are_answered", "unwanted_frames_stay_out",
        "flows_keep_to_their_queues", "suspend_and_stop"]
EVERY = {feature: 1 << feature for feature in NetFeature}
PLAIN = sum(EVERY.values()) & ~EVERY[NetFeature.MQ]


@pytest.mark.parametrize("build", BUILDS)
def test_net(request, build):
    width, pairs = BUILDS[build]
    mtu = 1500 if width > 64 else 600
    run(Net(width=width, device=NetDevice(mac=MAC, pairs=pairs, mtu=mtu)), module=__name__, node=request.node.nodeid,
        params={"width": width, "pairs": pairs, "mtu": mtu}, testcase=DATA_PATH + (pairs > 1) * REST)


def test_receive_port(request):
    run(ReceivePort(width=64, depth=64, max_buffers=4, patience=100), module=__name__, node=request.node.nodeid,
        testcase="a_frame_waits_only_so_long")


def test_net_function(request):
    net = Net(width=128, device=NetDevice(mac=MAC))
    run(DeviceFunction(width=128, function=1, clients=(3, 4, 5), back_end=net), module=__name__, node=request.node.nodeid,
        params={"width": 128}, testcase="buffers_of_a_frame_end_together")


def test_parameters_are_checked():
    """VIRTIO-NET-10: parameters out of their ranges are refused with a sentence; the device says its features, ports and sizes (V150)."""
    for bad in ({"mac": bytes(5)}, {"mac": b"\x01" * 6}, {"mtu": 67}, {"mtu": 65535}, {"pairs": 0}, {"pairs": 17}):
        with pytest.raises(ValueError, match=r"must .*, not"):
            NetDevice(**bad)
    with pytest.raises(ValueError, match=r"must .*, not"):
        Net(width=96, device=NetDevice())
    one, many = NetDevice(checksums=False), NetDevice(pairs=4, mtu=9000, queue_size=512)
    assert many.device_features == sum(EVERY.values())
    assert one.device_features == many.device_features & ~(EVERY[NetFeature.MQ] | EVERY[NetFeature.CSUM] | EVERY[NetFeature.GUEST_CSUM])
    assert [port.waits for port in many.ports] == [True, False] * 4 + [False] and many.ports[0].sizes == (512,)
    assert (many.device_type, many.config_bytes, many.max_frame, len(one.ports)) == (1, 12, 9018, 3)
    assert isinstance(one.back_end(64), Net)
    assert ReceivePort(width=64, depth=64, max_buffers=8).patience == 65536


class Bench(BackEndBench):
    async def begin(self, features=PLAIN):
        dut, self.pairs, self.mtu = self.dut, params()["pairs"], params()["mtu"]
        self.ports = await super().begin(2 * self.pairs + 1, waiting=range(0, 2 * self.pairs, 2))
        self.layout = NetBeat(self.width)
        self.golden = Golden(features, mac=MAC, mtu=self.mtu, pairs=self.pairs)
        dut.features.value = features
        self.control = self.ports[2 * self.pairs if features >> NetFeature.MQ & 1 else 2]
        self.medium, self.transmitted, self.left = Stream(dut, "received"), Stream(dut, "transmitted"), []
        cocotb.start_soon(self.transmitted.watch(self.left))

    async def arrive(self, frame, gaps=None, error=0):
        """A frame comes from the medium."""
        await self.medium.put_many(beats_of(self.layout, frame, error=error), gaps)

    def sent(self):
        """Frames that left since."""
        return [content for content, _ in taken_packets(self.layout, self.left)]

    async def command(self, kind, command, data, room=1, status=BurstStatus.OK):
        """Give a control command; return what was written."""
        self.control.writable.set_ready(1)
        await self.control.give(bytes([kind, command]) + data, room, status)
        return await self.control.answer()

    async def packets(self, port, count):
        """Return the next ``count`` packets that a receive queue is given."""
        return [await self.ports[port].answer() for _ in range(count)]

    async def quiet(self, cycles=200):
        await ClockCycles(self.dut.clk, cycles)


def header_of(rng, sample, length):
    """Return a header in front of ``sample`` and the packet to send with it: right, or wrong in one of the ways there are."""
    flags = rng.choice([0, 1, 1, 0xFE, 0xFF])  # unknown bits mean nothing
    rest = {"hdr_len": rng.getrandbits(16), "gso_size": rng.getrandbits(16), "num_buffers": rng.choice([0, 7])}
    start, offset = sample.csum_start, sample.csum_offset
    match rng.randrange(6):
        case 0:
            return NetHeader(flags, rng.choice([1, 3, 0x80]), csum_start=start, csum_offset=offset, **rest)
        case 1 | 2:  # anywhere in the frame, and beyond
            start = rng.randrange(length + 2)
            offset = rng.choice([0, 1, max(length - start - 2, 0), max(length - start - 1, 0), 0xFFFF])
            return NetHeader(flags, csum_start=start, csum_offset=offset, **rest)
        case 3:
            return NetHeader(flags & ~1, csum_start=rng.getrandbits(16), csum_offset=rng.getrandbits(16), **rest)
    return NetHeader(flags, csum_start=start, csum_offset=offset, **rest)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def frames_leave(dut):
    """VIRTIO-NET-1: buffers of all sizes, with and without checksums to fill in, right and wrong: what leaves is what may leave, in
    order, whole; each buffer is used with nothing written; each that is no frame is counted (V151, V152)."""
    bench = Bench(dut)
    await bench.begin()
    rng, port, buffers = bench.rng, bench.ports[1], []
    lanes, longest = bench.lanes, bench.mtu + 18
    for length in (14, 15, lanes - 1, lanes, lanes + 1, longest, longest + 1, *(rng.randrange(14, min(longest, 300)) for _ in range(110))):
        length = max(length, 14)
        sample = any_packet(rng, max(length, 82))
        frame = rng.choice([sample.partial, sample.frame])[:length].ljust(length, b"\xee")
        buffers.append((header_of(rng, sample, length).pack() + frame, BurstStatus.OK))
    buffers += [(bytes(n), BurstStatus.OK) for n in (0, 1, 8, 11, 12, 13, 25, 4 * longest)]  # the last one is more than the store holds
    zero = bytes(14) + b"\xff\xff" + bytes(60)  # whose checksum is 0
    buffers.append((NetHeader(1, csum_start=14, csum_offset=2).pack() + zero, BurstStatus.OK))
    buffers += [(bytes(80), status) for status in BurstStatus if status != BurstStatus.OK]
    rng.shuffle(buffers)
    cocotb.start_soon(random_ready(port.writable, rng))
    cocotb.start_soon(random_ready(bench.transmitted, rng, 0.8))

    async def give():
        for content, status in buffers:
            await port.give(content, rng.choice([0, 0, 40]), status)

    cocotb.start_soon(give())
    assert [await port.answer() for _ in buffers] == [b""] * len(buffers)
    await bench.quiet()
    sent, dropped = bench.sent(), 0
    for content, status in buffers:
        header, size = NetHeader.unpack(content.ljust(12, b"\0")), len(content) - 12
        is_beyond = header.flags & 1 and header.csum_start + header.csum_offset + 2 > size
        if status != BurstStatus.OK or not 14 <= size <= longest or header.gso_type or is_beyond:
            dropped += 1
            assert status != BurstStatus.OK or None in bench.golden.sent(content)
        else:
            frame = sent.pop(0)
            assert frame in bench.golden.sent(content), content.hex()
            assert not content.endswith(zero) or frame[16:18] == b"\xff\xff"  # of UDP 0 would say that there is none
    assert not sent and not bench.left
    assert dropped == dut.transmit_drops.value and 20 < dropped < len(buffers) // 2


@cocotb.test(timeout_time=200, timeout_unit="us")
async def frames_without_agreed_checksums(dut):
    """VIRTIO-NET-2: without CSUM and GUEST_CSUM flags mean nothing: frames leave as they are and come with flags 0 (V152, V156)."""
    bench = Bench(dut)
    await bench.begin(PLAIN & ~(EVERY[NetFeature.CSUM] | EVERY[NetFeature.GUEST_CSUM]))
    bench.transmitted.set_ready(1)
    bench.ports[0].writable.set_ready(1)
    bench.ports[1].writable.set_ready(1)
    for length in (80, 200):
        sample = any_packet(bench.rng, length)
        await bench.ports[1].give(NetHeader(1, csum_start=sample.csum_start, csum_offset=sample.csum_offset).pack() + sample.partial)
        await bench.ports[0].give(writable_bytes=1526)
        await bench.arrive(MAC + sample.frame[6:])
        assert await bench.ports[0].answer() == NetHeader(num_buffers=1).pack() + MAC + sample.frame[6:]
        await bench.quiet(60)
        assert bench.sent() == [sample.partial]


async def receive(bench, frames, rooms, *, gaps=None):
    """Let ``frames`` come while buffers of ``rooms`` bytes are there; judge what comes, return how many frames were lost."""
    port, lost = bench.ports[0], 0
    cocotb.start_soon(random_ready(port.writable, bench.rng, 0.8))

    async def give():
        for room in rooms:
            await port.give(bench.rng.choice([b"", b"", b"nonsense" * 9]), room)

    judged = 0

    async def come():
        for n, frame in enumerate(frames):
            while n - judged > 4:  # more than the store holds would be lost
                await bench.quiet(10)
            await bench.arrive(frame, gaps)
            await bench.quiet(bench.rng.choice([1, 30, 100]))

    giving, coming, at = cocotb.start_soon(give()), cocotb.start_soon(come()), 0
    for n, frame in enumerate(frames):
        judged = n
        while True:
            while rooms[at] == 0:  # it cannot hold a header, and takes no packet
                at += 1
            if rooms[at] >= 12:
                break
            assert await port.answer() == b""
            at += 1
        count = bench.golden.fits(frame, rooms[at : at + 8])
        if not count:
            lost += 1
            continue
        content, buffers = await port.answer(), []
        for room in rooms[at : at + count]:
            buffers.append((content[:room], room))
            content = content[room:]
        assert not content
        problem = bench.golden.problem(frame, buffers)
        assert not problem, f"{frame.hex()} in {rooms[at : at + count]}: {problem}"
        at += count
    await coming
    while rooms[at] < 12:  # useless ones come back whether there is a frame or not
        assert rooms[at] == 0 or await port.answer() == b""
        at += 1
    await bench.quiet(2 * bench.mtu // bench.lanes + 200)  # the last frame may be one that is dropped
    giving.cancel()
    assert not port.answers
    return lost


@cocotb.test(timeout_time=200, timeout_unit="us")
async def frames_fill_buffers(dut):
    """VIRTIO-NET-3: random frames over random buffers with MRG_RXBUF, useless ones among them: header, num_buffers, all but the last
    full, in order; a frame that 8 buffers do not hold is dropped and counted, its buffers are used for the next (V153, V154)."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    sizes = [rng.choice([82, 83, 88, 88, 188, rng.randrange(82, bench.mtu + 14), rng.randrange(82, min(700, bench.mtu + 14))])
             for _ in range(60)]  # fmt: skip
    frames = [any_packet(rng, size, macs=(MAC, bytes(6))).frame for size in sizes]
    rooms = [rng.choice([0, 5, 11, 12, 13, bench.lanes, 100, 100, 100, 200, rng.randrange(12, 700)]) for _ in range(800)]
    rooms[::40] = [1 << 17, (1 << 32) - 1] * 10
    lost = await receive(bench, frames, rooms, gaps=lambda: rng.choice([0, 0, 0, 1]))
    assert lost == dut.received_drops.value and lost < 40


@cocotb.test(timeout_time=200, timeout_unit="us")
async def frames_take_one_buffer(dut):
    """VIRTIO-NET-4: without MRG_RXBUF one buffer for a frame, num_buffers 1; one that does not fit is dropped and counted (V153)."""
    bench = Bench(dut)
    await bench.begin(PLAIN & ~EVERY[NetFeature.MRG_RXBUF])
    rng, port = bench.rng, bench.ports[0]
    port.writable.set_ready(1)
    for room in (5, 11):
        await port.give(writable_bytes=room)
        assert await port.answer() == b""  # whether there is a frame or not
    frames = [any_packet(rng, rng.randrange(82, 600), macs=(MAC, bytes(6))).frame for _ in range(30)]
    lost = await receive(bench, frames, [rng.choice([0, 3, 200, 400, 612, 700]) for _ in range(200)])
    assert lost == dut.received_drops.value and lost > 0


def shorter_than_its_header(protocol, is_ipv6, macs):
    """Return a frame whose IP header leaves too few bytes for that of TCP or UDP, the sum over them being right."""
    frame = bytearray(packet(bytes(40), protocol=protocol, is_ipv6=is_ipv6, macs=macs).frame)
    size, start, addresses = 18 if protocol == 6 else 6, 54 if is_ipv6 else 34, 22 if is_ipv6 else 26
    struct.pack_into(">H", frame, 18 if is_ipv6 else 16, size if is_ipv6 else 20 + size)
    struct.pack_into(">HHH", frame, start, 0, 80, size)  # of UDP: ports, length
    total = internet_sum(bytes([0, protocol, 0, size, *frame[addresses : start + size]]))
    struct.pack_into(">H", frame, start, ~total & 0xFFFF)
    return bytes(frame)


def variants(rng):
    """Return frames for MAC, each with whether its checksum is one that we check."""
    found = []
    for protocol in (6, 17):
        for is_ipv6 in (False, True):
            for size in (0, 1, 2, 17, 100, 333):
                how = {"protocol": protocol, "is_ipv6": is_ipv6, "macs": (MAC, rng.randbytes(6))}
                good = packet(rng.randbytes(size), **how)
                found += [(good.frame, True), (packet(rng.randbytes(size), damaged=True, **how).frame, False)]
                found += [(packet(rng.randbytes(size), vlan=5, **how).frame, False)]
                found += [(good.frame + rng.randbytes(7), True)]  # padding counts for nothing
                found += [(good.frame[: rng.randrange(14, len(good.frame))], False)]
                found += [(good.frame[:20] + part + good.frame[22:], False) for part in (b"\x20\0", b"\0\1") if not is_ipv6]  # fragments
                found += [(good.frame[:14] + bytes([first]) + good.frame[15:], False) for first in (0x46, 0x55)]  # options; IP of version 5
                place = good.csum_start + good.csum_offset
                if protocol == 17:  # a length that is another than IP's, yet with the same sum
                    length, checksum = struct.unpack_from(">HH", good.frame, place - 2)
                    other = struct.pack(">HH", length + 1, max(checksum - 1, 1))
                    found += [(good.frame[: place - 2] + other + good.frame[place + 2 :], False)]
                found += [(good.frame[:place] + b"\0\0" + good.frame[place + 2 :], False)]
            found += [(packet(bytes(40), **how).frame[:-4], False)]  # cut, yet with the same sum
            found += [(shorter_than_its_header(**how), False)]
            if protocol == 17:  # a sum that is 0 without a checksum, too
                empty = packet(bytes(2), **how)
                place = empty.csum_start + empty.csum_offset
                full = packet(empty.frame[place : place + 2], **how).frame
                found += [(full, True), (full[:place] + b"\0\0" + full[place + 2 :], False)]
    return found


@cocotb.test(timeout_time=200, timeout_unit="us")
async def checksums_are_checked(dut):
    """VIRTIO-NET-5: DATA_VALID on each frame of TCP or UDP over IPv4 or IPv6 whose checksum is right, padded or not, and on no other:
    wrong, cut, fragments, tagged, none."""
    bench = Bench(dut)
    await bench.begin()
    rng, port = bench.rng, bench.ports[0]
    cases = variants(rng)
    rng.shuffle(cases)
    port.writable.set_ready(1)

    async def give():
        while True:
            await port.give(writable_bytes=1526)

    async def come():
        for n, (frame, _) in enumerate(cases):
            await bench.arrive(frame, lambda: rng.choice([0, 0, 0, 0, 2]))
            if n % 10 == 9:  # what waits for buffers is limited
                await bench.quiet(10 * (14 + 350 // bench.lanes))

    cocotb.start_soon(give())
    cocotb.start_soon(come())
    for frame, is_checked in cases:
        content = await port.answer()
        assert content[12:] == frame
        assert content[:12] == NetHeader(2 if is_checked else 0, num_buffers=1).pack(), frame.hex()
        transport = transport_of(frame)
        assert not is_checked or (transport is not None and transport[2])


def tables(unicast, multicast):
    """Return the data of VIRTIO_NET_CTRL_MAC_TABLE_SET."""
    return b"".join(len(table).to_bytes(4, "little") + b"".join(table) for table in (unicast, multicast))


def hash_of(address):
    """Return the place of an address in the table of the receive filter."""
    number = int.from_bytes(address, "little")
    return functools.reduce(operator.xor, (number >> n & 63 for n in range(0, 48, 6)))


@cocotb.test(timeout_time=200, timeout_unit="us")
async def commands_are_answered(dut):
    """VIRTIO-NET-6: control commands, random, right and wrong ones: answer, address in the configuration and number of pairs as the golden
    device has them; a command that fails changes nothing (V150)."""
    bench = Bench(dut)
    await bench.begin(PLAIN | (EVERY[NetFeature.MQ] if params()["pairs"] > 1 else 0))
    rng, golden = bench.rng, bench.golden
    golden.is_up = False
    cocotb.start_soon(random_ready(bench.control.writable, rng))
    changes = []

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            if dut.config_changed.value:
                changes.append(int(dut.config.value).to_bytes(12, "little"))

    cocotb.start_soon(watch())
    for _ in range(200):
        commands = [
            (0, 0, bytes([rng.randrange(3)])), (0, 1, bytes([rng.randrange(3)])), (0, 2, b"\1"), *[(1, 1, rng.randbytes(6))] * 2,
            (1, 0, tables(*([rng.randbytes(6) for _ in range(rng.randrange(4))] for _ in range(2)))), (1, 2, rng.randbytes(6)),
            (4, 0, bytes([rng.randrange(bench.pairs + 2), 0])), (4, 0, b"\0\1"), (4, 1, b"\1\0"), (5, 0, bytes(8)),
        ]  # fmt: skip
        kind, command, data = rng.choice(commands)
        data = rng.choice([*[data] * 4, data + b"!", data + bytes(4), data + bytes(8), data[:-1], rng.choice(commands)[2]])
        room, status = rng.choice([0, 1, 1, 1, 9]), rng.choice([BurstStatus.OK] * 9 + [BurstStatus.POISONED])
        before, content = int(dut.config.value), bytes([kind, command]) + data
        content = content[: rng.choice([0, 1, 99, 99, 99, 99, 99, 99])]
        await bench.control.give(content, room, status)
        answer = await bench.control.answer()
        if status == BurstStatus.OK or not content:
            assert answer in ({bytes([ack]) for ack in golden.control(content, room).acks} or {b""}), content.hex()
        else:
            assert answer == b"\1"[:room]
        config = int(dut.config.value).to_bytes(12, "little")
        assert config == golden.mac + golden.config()[6:8] + (bench.pairs if bench.pairs > 1 else 0).to_bytes(2, "little") + config[10:]
        assert (changes[-1:] == [config]) or int(dut.config.value) == before
    assert changes
    whole = bytes([1, 0]) + tables([MAC] * 9, [])  # ends with a beat; what follows cannot be fetched
    await bench.control.give(whole + b"!", 1, BurstStatus.UR)
    assert await bench.control.answer() == b"\1"
    dut.stop.value = 1
    await bench.quiet(4)
    dut.stop.value = 0
    assert int(dut.config.value).to_bytes(12, "little")[:6] == MAC  # as after power-on


@cocotb.test(timeout_time=200, timeout_unit="us")
async def unwanted_frames_stay_out(dut):
    """VIRTIO-NET-7: with CTRL_RX what golden wants comes in, under all modes, tables and addresses, and what shares a place in the
    table with it; without it all does; damaged, short and long frames never (the MTU's limit: V150); the link's state is shown."""
    bench = Bench(dut)
    await bench.begin()
    rng, port, golden = bench.rng, bench.ports[0], bench.golden
    port.writable.set_ready(1)

    async def give():
        while True:
            await port.give(writable_bytes=2000)

    cocotb.start_soon(give())
    unicast, multicast = [bytes([2, *rng.randbytes(5)]) for _ in range(3)], [bytes([1, *rng.randbytes(5)]) for _ in range(3)]

    async def come(frames):
        for frame in frames:
            await bench.arrive(frame)
        await bench.quiet(60)
        found = []
        while port._end():
            found.append((await port.answer())[12:])
        return found

    for _ in range(12):
        kind, command, data = rng.choice([
            (0, 0, bytes([rng.randrange(2)])), (0, 1, bytes([rng.randrange(2)])), (1, 1, rng.choice(unicast)),
            (1, 0, tables(unicast[: rng.randrange(3)], multicast[: rng.randrange(3)])), (1, 0, bytes(8)),
        ])
        assert await bench.command(kind, command, data) == b"\0"
        golden.control(bytes([kind, command]) + data, 1)
        frames = [target + rng.randbytes(60) for target in (*unicast, *multicast, MAC, b"\xff" * 6, golden.mac)]
        found = await come(frames)
        for frame in frames:
            has_place = hash_of(frame[:6]) in map(hash_of, golden.table)
            assert (frame in found) == (golden.wants(frame) or has_place), frame[:6].hex()
    dut.features.value = PLAIN & ~EVERY[NetFeature.CTRL_RX]
    frames = [rng.randbytes(6) + rng.randbytes(60) for _ in range(10)]
    assert await come(frames) == frames
    longest, tagged = bytes(12) + b"\x08\0" + bytes(bench.mtu), bytes(12) + b"\x81\0" + bytes(bench.mtu + 4)
    assert await come([bytes(13), bytes(14), longest, longest + b"!", tagged, tagged + b"!", bytes(1 << 16 | 60)]) == [
        bytes(14), longest, tagged]
    await bench.arrive(bytes(100), error=1)
    assert await come([b"\x11" * 14]) == [b"\x11" * 14]
    for is_up in (1, 0, 1):
        dut.link_up.value = is_up
        await bench.quiet(1)
        while not dut.config_changed.value:
            await RisingEdge(dut.clk)
        assert int(dut.config.value).to_bytes(12, "little")[6:8] == bytes([is_up, 0])
    assert dut.received_drops.value == 0


@cocotb.test(timeout_time=200, timeout_unit="us")
async def flows_keep_to_their_queues(dut):
    """VIRTIO-NET-8: a flow that was sent from a queue comes to the queue of that pair; others keep to one; none comes beyond the
    active pairs, and none more once a smaller number was acknowledged; without MQ queue 2 takes commands."""
    bench = Bench(dut)
    await bench.begin(PLAIN | EVERY[NetFeature.MQ])
    rng, pairs = bench.rng, bench.pairs
    bench.transmitted.set_ready(1)
    for port in bench.ports:
        port.writable.set_ready(1)

    async def give(port):
        while True:
            await port.give(writable_bytes=1526)

    for n in range(pairs):
        cocotb.start_soon(give(bench.ports[2 * n]))

    def frame(flow, is_ours):
        ends = (flow, 80)
        return packet(rng.randbytes(9), is_ipv6=bool(flow & 1), protocol=6 + 11 * (flow >> 1 & 1), ports=ends if is_ours else ends[::-1],
                      macs=(bytes(6), MAC) if is_ours else (MAC, bytes(6))).frame  # fmt: skip

    async def queue_of(flow):
        await bench.arrive(frame(flow, False))
        while True:
            for n in range(pairs):
                if bench.ports[2 * n]._end():
                    await bench.ports[2 * n].answer()
                    return n
            await RisingEdge(dut.clk)

    assert {await queue_of(flow) for flow in range(100, 120)} == {0}
    assert await bench.command(4, 0, pairs.to_bytes(2, "little")) == b"\0"
    first = {flow: await queue_of(flow) for flow in range(100, 160)}
    assert set(first.values()) == set(range(pairs))
    assert [await queue_of(flow) for flow in range(100, 160, 7)] == [first[flow] for flow in range(100, 160, 7)]
    for flow in range(300, 330):
        pair = rng.randrange(pairs)
        await bench.ports[2 * pair + 1].give(NetHeader().pack() + frame(flow, True))
        await bench.ports[2 * pair + 1].answer()
        await bench.quiet(20)
        assert await queue_of(flow) == pair
    await bench.quiet()

    # Frames are under way to all queues when the number falls.
    last = bench.ports[2 * pairs - 2]
    last.writable.set_ready(0)
    for flow in range(100, 160):
        await bench.arrive(frame(flow, False))
    asking = cocotb.start_soon(bench.command(4, 0, b"\1\0"))
    await bench.quiet(300)
    assert not asking.done()  # a frame is half in a buffer
    last.writable.set_ready(1)
    assert await asking == b"\0"
    assert len(taken_packets(last.layout, last.answers)) == 1  # the rest was dropped
    counts = [len(port.answers) for port in bench.ports]
    for flow in range(100, 160):
        await bench.arrive(frame(flow, False))
        await bench.quiet(20)
    assert [len(port.answers) for port in bench.ports[2:-1:2]] == counts[2:-1:2]
    assert len(bench.ports[0].answers) >= counts[0] + 60


@cocotb.test(timeout_time=200, timeout_unit="us")
async def control_without_pairs(dut):
    """VIRTIO-NET-12: a driver that did not take MQ has its control queue in the third place, whatever the device has; frames come to
    queue 0."""
    bench = Bench(dut)
    await bench.begin(PLAIN)
    bench.ports[0].writable.set_ready(1)
    for room in (0, 1):
        await bench.control.give(bytes([1, 1]) + MAC[::-1], room)
        bench.control.writable.set_ready(1)
        assert await bench.control.answer() == bytes(room)
        assert int(dut.config.value).to_bytes(12, "little")[:6] == (MAC[::-1] if room else MAC)
    await bench.ports[0].give(writable_bytes=2000)
    await bench.arrive(MAC[::-1] + bytes(60))
    assert (await bench.ports[0].answer())[12:] == MAC[::-1] + bytes(60)
    assert await bench.command(4, 0, b"\1\0") == b"\1"
    assert dut.flows__0.value == 1 and (bench.pairs == 1 or dut.flows__2.value == 0)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def overload_and_rates(dut):
    """VIRTIO-NET-9: without buffers frames are dropped and counted, the medium never waits; those kept come whole when there are buffers;
    a large frame comes and leaves at one beat per cycle; 8 cycles besides for each that leaves, 13 with a checksum."""
    bench = Bench(dut)
    await bench.begin()
    rng, port = bench.rng, bench.ports[0]
    frames = [MAC + rng.randbytes(8) for _ in range(40)] + [MAC + rng.randbytes(rng.choice([60, 400, bench.mtu])) for _ in range(40)]
    begun = cycle()
    for frame in frames:
        await bench.arrive(frame)
    assert cycle() - begun <= sum(-(-len(frame) // bench.lanes) for frame in frames) + 2 * len(frames)
    await bench.quiet(60)
    lost = int(dut.received_drops.value)
    assert 0 < lost <= len(frames) - 2
    port.writable.set_ready(1)

    async def give():
        while True:
            await port.give(writable_bytes=2048)
            await bench.quiet(rng.randrange(1, 2 * bench.mtu // bench.lanes))  # slower than frames come

    cocotb.start_soon(give())
    for frame in frames:  # once more
        await bench.arrive(frame)
    await bench.quiet(50 * bench.mtu // bench.lanes)  # as many as the store keeps, one after the other
    found, remaining = [], iter(frames + frames)
    while port._end():
        found.append((await port.answer())[12:])
    assert all(any(frame == other for other in remaining) for frame in found)  # in order
    assert len(found) + int(dut.received_drops.value) == 2 * len(frames) and len(found) > len(frames) // 4
    beats = -(-bench.mtu // bench.lanes)
    begun = cycle()
    cocotb.start_soon(bench.arrive(MAC + bytes(bench.mtu - 6)))
    await port.answer()
    dut._log.info("in: %d beats in %d cycles", beats, cycle() - begun)
    assert cycle() - begun <= 2 * beats + 32  # stored, then given

    bench.transmitted.set_ready(1)
    sender = bench.ports[1]
    sender.writable.set_ready(1)
    for length, flags, besides in ((bench.mtu, 0, 8), (60, 0, 8), (60, 1, 13)):
        count, rows = 8, -(-(length + 12) // bench.lanes)
        begun = cycle()

        async def send(content=NetHeader(flags, csum_start=20).pack() + rng.randbytes(length)):
            for _ in range(8):
                await sender.give(content)

        cocotb.start_soon(send())
        for _ in range(count):
            await sender.answer()
        dut._log.info("out: %d beats in %d cycles", rows, (cycle() - begun) // count)
        assert cycle() - begun <= count * (rows + besides)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def suspend_and_stop(dut):
    """VIRTIO-NET-11: suspended, no frame is begun and one that was is whole; nothing is lost that the stores hold; a stop empties what was
    not sent, lets what was end, and all is as new; a stop of one port is none of another's."""
    bench = Bench(dut)
    await bench.begin()
    rng, port, sender = bench.rng, bench.ports[0], bench.ports[1]
    frames = [MAC + rng.randbytes(rng.choice([60, 100, 500])) for _ in range(60)]

    async def give():
        while True:
            await port.give(writable_bytes=rng.choice([60, 300, 2048]))

    async def come():
        for frame in frames:
            await bench.arrive(frame)
            await bench.quiet(80)

    feeding, coming, got = cocotb.start_soon(give()), cocotb.start_soon(come()), []
    taking = cocotb.start_soon(random_ready(port.writable, rng, 0.4))

    while not coming.done():
        await bench.quiet(rng.randrange(1, 100))
        dut.suspend.value = 1
        if rng.randrange(2):
            dut.settled__0.value = 0
            await bench.quiet(30)
            assert not dut.suspended.value
            dut.settled__0.value = 1
        while not dut.suspended.value:
            await RisingEdge(dut.clk)
        for _ in range(10):
            assert dut.suspended.value
            await RisingEdge(dut.clk)
        while port._end():
            got.append((await port.answer())[12:])
        assert not port.answers
        dut.suspend.value = 0
    while len(got) + int(dut.received_drops.value) < len(frames):
        got.append((await port.answer())[12:])
    remaining = iter(frames)
    assert all(any(frame == other for other in remaining) for frame in got) and len(got) > 40
    feeding.cancel()
    taking.cancel()
    port.chains._valid(0)

    sender.writable.set_ready(1)
    for stop, stopped, mask in ((dut.stop, dut.stopped, 1), (dut.port_stop, dut.port_stopped, 1)) * 4:
        port.writable.set_ready(0)
        bench.transmitted.set_ready(0)
        sender.answers.clear()
        giving = cocotb.start_soon(port.give(writable_bytes=400))
        coming = cocotb.start_soon(bench.arrive(MAC + bytes(bench.mtu - 10), lambda: 1))
        whole = NetHeader().pack() + rng.randbytes(100)
        await sender.give(whole)
        await sender.answer()
        sending = cocotb.start_soon(sender.give(NetHeader().pack() + bytes(300)))
        await bench.quiet(rng.randrange(2, 60))
        stop.value = mask
        port.writable.set_ready(1)
        await sending
        await giving
        while not int(stopped.value) & mask:
            await RisingEdge(dut.clk)
        await bench.quiet(rng.randrange(1, 5))
        stop.value = 0
        port.answers.clear()
        bench.transmitted.set_ready(1)
        await coming
        await port.give(writable_bytes=2000)
        await bench.arrive(MAC + b"x" * 61)
        content = await port.answer()
        assert content[12:] == MAC + b"x" * 61
        sender.answers.clear()
        await bench.quiet()
        sent = bench.sent()
        assert sent[0] == whole[12:] and not bench.left
        assert len(sent) == 2 if stop is dut.port_stop else len(sent) <= 2


@cocotb.test(timeout_time=20, timeout_unit="us")
async def a_frame_waits_only_so_long(dut):
    """VIRTIO-NET-14: a frame waits without end for its first buffer, 100 cycles for each other one; then it is dropped, and what it had
    goes to the next."""
    chains, writable = await start(dut, "chains", "writable")
    writable.set_ready(1)
    dut.merges.value = dut.enabled.value = 1
    packets, layout = [], NetBeat(64)
    cocotb.start_soon(writable.watch(packets))

    async def come(frame):
        for beat in beats_of(layout, frame):
            dut.beat.value, dut.valid.value = beat, 1
            dut.verdict.value = pack(Verdict, keep=1, length_bytes=len(frame))
            await RisingEdge(dut.clk)
        dut.valid.value = 0

    await come(bytes(100))
    await ClockCycles(dut.clk, 300)
    await chains.put(pack(Chain, writable_bytes=50))
    await ClockCycles(dut.clk, 90)
    await chains.put(pack(Chain, writable_bytes=50))
    await ClockCycles(dut.clk, 90)
    assert not packets and not dut.dropped.value
    for _ in range(40):
        await RisingEdge(dut.clk)
        if dut.dropped.value:
            break
    else:
        raise AssertionError("the frame waits")
    await come(b"y" * 80)
    while not (found := taken_packets(ChainBeat(64), packets)):
        await RisingEdge(dut.clk)
    assert found[0][0] == NetHeader(num_buffers=2).pack() + b"y" * 80


@cocotb.test(timeout_time=200, timeout_unit="us")
async def buffers_of_a_frame_end_together(dut):
    """VIRTIO-NET-13: the function in front of a memory, behind the movers: merged buffers are in memory as golden wants them; each but a
    frame's last is finished with "more", so that they can be shown together (V040, V154, V155)."""
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    await start(dut)
    dut.features.value = PLAIN
    golden, memory, layout = Golden(PLAIN, mac=MAC), GuestMemory(), NetBeat(width)
    port = {name: Stream(dut, f"{name}__0") for name in ("chains", "writable", "finished", "bursts", "write_data", "write_done")}
    BurstMemory(memory, width=width, bursts=port["bursts"], write_data=port["write_data"], write_done=port["write_done"]).start()
    frames = [any_packet(rng, rng.randrange(82, 1500), macs=(MAC, bytes(6))).frame for _ in range(12)]
    buffers = [[(0x10000 * (2 * n + k) + rng.randrange(4096), rng.choice(sizes)) for k, sizes in enumerate(((6, 100, 700), (200, 233)))]
               for n in range(100)]  # fmt: skip

    async def give():
        for segments in buffers:
            await port["chains"].put(pack(Chain, writable_bytes=sum(size for _, size in segments)))

    async def give_segments():
        for segments in buffers:
            await port["writable"].put_many(pack(Segment, address=a, length_bytes=n, last=a == segments[-1][0]) for a, n in segments)

    async def come():
        for frame in frames:
            await Stream(dut, "received").put_many(beats_of(layout, frame))
            await ClockCycles(dut.clk, 150)

    cocotb.start_soon(give())
    cocotb.start_soon(give_segments())
    cocotb.start_soon(come())
    waiting = iter(buffers)
    for frame in frames:
        used, more = [], True
        while more:
            done, segments = unpack(WriterDone, await port["finished"].get()), next(waiting)
            assert done.status == BurstStatus.OK
            content = b"".join(memory.read(address, size) for address, size in segments)
            used.append((content[: done.length_bytes], len(content)))
            more = done.more
        problem = golden.problem(frame, used)
        assert not problem, problem
