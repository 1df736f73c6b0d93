"""A compiled card whose network function has a wire: frames come and go through a socket, the driver looks after every write."""

import random
import socket

import pytest

from ringwall.models.events import TlpReceived
from ringwall.models.host import enumerate as enumerate_functions
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.buffers import Buffers, RingUser
from ringwall.models.virtio.driver import Feature, VirtioPciDriver
from ringwall.models.virtio.net import NetDevice, NetDriver, NetFeature
from ringwall.models.virtio.packets import any_packet
from ringwall.models.virtio.virtqueue import make_ring
from ringwall.rtl.virtio.net_layouts import NetBeat
from ringwall.sim.compiled import CompiledCard
from ringwall.sim.linux.wired import CONFIG
from ringwall.sim.looped import WiredCard

RINGS, BUFFERS, ROOM, BEAT, BEAT_BYTES = 0x10_0000, 0x20_0000, 200, NetBeat(CONFIG.width), 12
KINDS = {
    "split": (),
    "split in order": (Feature.IN_ORDER,),
    "packed": (Feature.RING_PACKED,),
    "packed in order": (Feature.RING_PACKED, Feature.IN_ORDER),
}


def beats(frame):
    """Return a frame as what passes on the wire."""
    found = b""
    for at in range(0, len(frame), 8):
        data = frame[at : at + 8]
        beat = BEAT.const({"data": int.from_bytes(data, "little"), "byte_count": len(data), "first": not at, "last": at + 8 >= len(frame)})
        found += beat.as_bits().to_bytes(BEAT_BYTES, "little")
    return found


def frames(raw):
    """Return the frames that these beats are, which must end with one."""
    found, data = [], b""
    for at in range(0, len(raw), BEAT_BYTES):
        beat = BEAT.from_bits(int.from_bytes(raw[at : at + BEAT_BYTES], "little"))
        assert beat.first == (not data)
        data += beat.data.to_bytes(8, "little")[: beat.byte_count]
        if beat.last:
            found.append(data)
            data = b""
    assert not data
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_wire(kind):
    """SYS-WIRE-1: frames over 1 to 8 merged buffers, others leave: behind each write the driver sees all of a frame or none (V155)."""
    rng, came = random.Random(5), []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, CompiledCard(CONFIG, card=WiredCard, seed=5, latency=20, jitter=30, split="random") as card:
        ours.setblocking(False)
        card.wire(theirs)
        card.map(RINGS, 1 << 20)
        card.map(BUFFERS, 1 << 20)
        wanted = sum(1 << bit for bit in (Feature.VERSION_1, NetFeature.MRG_RXBUF, NetFeature.GUEST_CSUM, *KINDS[kind]))
        rings = [make_ring(card.memory, wanted, size=64, base=RINGS + n * 0x1_0000) for n in range(2)]
        buffers = Buffers(card.memory, (BUFFERS, 1 << 20), rng)
        driver = NetDriver(*(RingUser(ring, buffers) for ring in rings), room=ROOM)
        pci = VirtioPciDriver(card.run(enumerate_functions(card.host))[0])
        assert card.run(pci.start([ring.layout for ring in rings], wanted=wanted)) == wanted
        device = NetDevice(1 << NetFeature.MRG_RXBUF | 1 << NetFeature.GUEST_CSUM)

        def look(event, tlp):
            if isinstance(event, TlpReceived) and tlp.type is TlpType.MWR:
                came.extend(driver.received())
                assert not driver.is_between, f"some buffers of a frame are used, others not, behind {tlp} [VIRTIO1.4 5.1.9.4.1]"

        card.observe = look
        sizes = set()
        for _ in range(30):
            driver.receive.fill(40, ROOM)
            out = [any_packet(rng, rng.randrange(82, 1514)).frame for _ in range(rng.randrange(1, 5))]
            back = [any_packet(rng, rng.randrange(82, 1514)).frame for _ in range(rng.randrange(3))]
            for frame in back:
                driver.send(frame)
            for n, ring in enumerate(rings):
                if ring.publish():
                    card.run(pci.notify(n))
            for frame in out:
                ours.send(beats(frame))
            while card.step(10_000):
                pass
            assert [device.problem(frame, packet) for frame, packet in zip(out, came, strict=True)] == [""] * len(out)
            sizes |= {len(packet) for packet in came}
            came.clear()
            if back:
                assert frames(ours.recv(1 << 16)) == back
                assert len(driver.sent()) == len(back)
        assert sizes == set(range(1, 9)) and not driver.receive.damage + driver.transmit.damage
