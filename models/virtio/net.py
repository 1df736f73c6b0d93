"""virtio-net: what a device may do with each packet and each control command, and a driver. [VIRTIO1.4 5.1]

Beyond the features of :class:`NetFeature` nothing is offered: no segmentation, no hash reports, no coalescing; the header has 12 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from .buffers import RingUser
from .packets import ETHERNET_BYTES, internet_sum, transport_of

__all__ = ["HEADER_BYTES", "Control", "NetDevice", "NetDriver", "NetFeature", "NetHeader", "missing_features", "pair_of"]

HEADER_BYTES = 12  # without hash report, tunnels and outer headers [VIRTIO1.4 5.1.9]
CONFIG_BYTES = 12  # mac, status, max_virtqueue_pairs, mtu [VIRTIO1.4 5.1.4]
NEEDS_CSUM, DATA_VALID = 1, 2  # flags of the header
OK, ERR = 0, 1  # ack of a control command [VIRTIO1.4 5.1.9.5]
LINK_UP = 1  # status
BROADCAST = b"\xff" * 6
MAX_PAIRS = 0x8000
VLAN_BYTES = 4


class NetFeature(IntEnum):
    """Feature bits that the golden device can offer. [VIRTIO1.4 5.1.3]"""

    CSUM = 0
    GUEST_CSUM = 1
    MTU = 3
    MAC = 5
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    MQ = 22
    CTRL_MAC_ADDR = 23


# Every feature bit of the device type that needs others: one of each group. [VIRTIO1.4 5.1.3.1]
_REQUIRES: dict[int, tuple[tuple[int, ...], ...]] = {
    7: ((1,),), 8: ((1,),), 9: ((7, 8),), 10: ((1,),), 54: ((1,),), 55: ((1,),), 65: ((7,), (8,), (54,), (55,)), 66: ((65,),),
    11: ((0,),), 12: ((0,),), 13: ((11, 12),), 14: ((0,),), 56: ((0,),), 67: ((11,), (12,), (56,)), 68: ((67,),),
    18: ((17,),), 19: ((17,),), 21: ((17,),), 22: ((17,),), 23: ((17,),), 53: ((17,),), 61: ((11, 12),), 60: ((17,),), 52: ((17,),),
    51: ((17,), (60, 57)), 64: ((17,), (60,)),
}  # fmt: skip


def missing_features(features: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (bit, bits of which it needs one) for each bit of ``features`` whose need is not in ``features``. (V005)"""
    return [(bit, group) for bit, groups in sorted(_REQUIRES.items()) if features >> bit & 1
            for group in groups if not any(features >> other & 1 for other in group)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class NetHeader:
    """struct virtio_net_hdr. [VIRTIO1.4 5.1.9]"""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        """Return its 12 bytes."""
        words = (self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers)
        return bytes([self.flags, self.gso_type]) + b"".join(word.to_bytes(2, "little") for word in words)

    @classmethod
    def unpack(cls, raw: bytes) -> NetHeader:
        """Return the fields of the first 12 bytes."""
        if len(raw) < HEADER_BYTES:
            raise ValueError(f"Header must have {HEADER_BYTES} bytes, not {len(raw)!r}")
        return cls(raw[0], raw[1], *(int.from_bytes(raw[n : n + 2], "little") for n in range(2, HEADER_BYTES, 2)))


@dataclass(frozen=True, slots=True)
class Control:
    """What may become of a control command: ``acks`` that are allowed; empty: the buffer comes back unwritten."""

    acks: tuple[int, ...]


class NetDevice:
    """The golden virtio-net: what may leave for a buffer that the driver sends, and what the driver may find for a frame that came.

    Left open by the specification, and so allowed: what breaks the driver's rules (no whole header, no whole Ethernet header, a
    checksum beyond the packet, segmentation that was not agreed) is dropped or goes out as it is; a computed checksum of 0 may
    stand as 0xFFFF; frames beyond the MTU are sent or dropped; unwanted frames may arrive. (V151, V152)

    Parameters
    ----------
    features : :class:`int`
        What driver and device agreed on, of :class:`NetFeature`.
    mac : :class:`bytes`
        Address of the device.
    mtu : :class:`int`
        68 to 65535, with MTU.
    pairs : :class:`int`
        max_virtqueue_pairs, 1 to 0x8000.

    Attributes
    ----------
    mac, promiscuous, all_multicast, table, active_pairs
        As control commands leave them.
    """

    def __init__(self, features: int, *, mac: bytes = b"\x02\0\0\0\0\1", mtu: int = 1500, pairs: int = 1):
        if features & ~sum(1 << bit for bit in NetFeature):
            raise ValueError(f"Features must be known to this device, not {features!r}")
        if missing_features(features):
            raise ValueError(f"Features must contain what each of them needs, not {features!r}: {missing_features(features)}")
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError(f"Address must be 6 bytes of one device, not {mac!r}")
        if not 68 <= mtu <= 65535:  # V150
            raise ValueError(f"MTU must be between 68 and 65535, not {mtu!r}")
        if not 1 <= pairs <= MAX_PAIRS:  # V150
            raise ValueError(f"Pairs of queues must be between 1 and {MAX_PAIRS}, not {pairs!r}")
        self.features, self.mtu, self.pairs = features, mtu, pairs
        self.mac, self.is_up = mac, True
        self.reset()

    def reset(self) -> None:
        """As after a reset of the device: an empty table, one pair."""
        self.promiscuous, self.all_multicast, self.table, self.active_pairs = False, False, frozenset(), 1

    def has(self, feature: NetFeature) -> bool:
        """The feature was agreed on."""
        return bool(self.features >> feature & 1)

    def config(self) -> bytes:
        """Return the device configuration; fields of features that are not offered are 0. [VIRTIO1.4 5.1.4]"""
        status = LINK_UP * self.is_up if self.has(NetFeature.STATUS) else 0
        pairs = self.pairs if self.has(NetFeature.MQ) else 0
        mtu = self.mtu if self.has(NetFeature.MTU) else 0
        return (self.mac if self.has(NetFeature.MAC) else bytes(6)) + b"".join(n.to_bytes(2, "little") for n in (status, pairs, mtu))

    # -- transmission [VIRTIO1.4 5.1.9.2] --

    def sent(self, readable: bytes) -> tuple[bytes | None, ...]:
        """Return the frames that may leave for the readable bytes of a buffer; None: nothing leaves."""
        if len(readable) < HEADER_BYTES + ETHERNET_BYTES:
            return (None, *([readable[HEADER_BYTES:]] if len(readable) > HEADER_BYTES else []))
        header, frame = NetHeader.unpack(readable), readable[HEADER_BYTES:]
        wrong = header.gso_type != 0  # no segmentation is offered
        outcomes: list[bytes | None] = [frame]
        if header.flags & NEEDS_CSUM and self.has(NetFeature.CSUM):
            place = header.csum_start + header.csum_offset
            if place + 2 > len(frame):
                wrong = True
            else:
                outcomes = [*_completed(frame, header)]
        if wrong or len(frame) > ETHERNET_BYTES + VLAN_BYTES + (self.mtu if self.has(NetFeature.MTU) else 1500):
            outcomes.append(None)
        return tuple(outcomes)

    # -- reception [VIRTIO1.4 5.1.9.4] --

    def wants(self, frame: bytes) -> bool:
        """The frame must be received where there are buffers; others may be. [VIRTIO1.4 5.1.9.5.1, 5.1.9.5.2]"""
        if len(frame) < ETHERNET_BYTES or not self.is_up:
            return False
        if len(frame) > ETHERNET_BYTES + (self.mtu if self.has(NetFeature.MTU) else 1500):
            return False
        target = frame[:6]
        if self.promiscuous or target in (self.mac, BROADCAST) or target in self.table:
            return True
        return bool(target[0] & 1) and self.all_multicast

    def forbids(self, frame: bytes) -> bool:
        """The frame must not be received. [VIRTIO1.4 5.1.4.1]"""
        return self.has(NetFeature.MTU) and len(frame) > ETHERNET_BYTES + VLAN_BYTES + self.mtu

    def fits(self, frame: bytes, rooms: Sequence[int]) -> int:
        """Return how many of the buffers in front, with so many writable bytes each, the frame needs; 0: it does not fit."""
        need = HEADER_BYTES + len(frame)
        if not self.has(NetFeature.MRG_RXBUF):
            return int(bool(rooms) and rooms[0] >= need)
        for n, room in enumerate(rooms):
            need -= room
            if need <= 0:
                return n + 1
        return 0

    def problem(self, frame: bytes, buffers: Sequence[tuple[bytes, int]]) -> str:
        """Return why ``buffers`` (used bytes of each, and its writable length) do not hold ``frame``; empty: they do. (V153, V154, V156)"""
        if not buffers or len(buffers[0][0]) < HEADER_BYTES:
            return "there is no whole header"
        header = NetHeader.unpack(buffers[0][0])
        if header.num_buffers != len(buffers):
            return f"V153: num_buffers is {header.num_buffers}, {len(buffers)} were used"
        if len(buffers) > 1 and not self.has(NetFeature.MRG_RXBUF):
            return f"V153: {len(buffers)} buffers without MRG_RXBUF"
        for n, (used, room) in enumerate(buffers[:-1]):
            if len(used) != room:
                return f"V154: buffer {n} of {len(buffers)} has {len(used)} of {room} bytes"
        if header.gso_type:
            return f"V156: gso_type is {header.gso_type}"
        if header.flags & ~(NEEDS_CSUM | DATA_VALID) or (header.flags and not self.has(NetFeature.GUEST_CSUM)):
            return f"V156: flags are {header.flags:#x}"
        found = b"".join(used for used, _ in buffers)[HEADER_BYTES:]
        if header.flags & NEEDS_CSUM:
            place = header.csum_start + header.csum_offset
            if place + 2 > len(found):
                return f"the checksum at {place} lies beyond {len(found)} bytes"
            return "" if frame in _completed(found, header) else "the packet with its checksum filled in is not the frame"
        if found != frame:
            at = next((n for n in range(min(len(found), len(frame))) if found[n] != frame[n]), min(len(found), len(frame)))
            return f"{len(found)} bytes differ from the frame's {len(frame)} at {at}"
        transport = transport_of(frame)
        if header.flags & DATA_VALID and (transport is None or not transport[2]):
            return "DATA_VALID on a packet whose checksum is not there, or wrong"
        return ""

    def queues(self) -> range:
        """Pairs that a frame may be steered to. [VIRTIO1.4 5.1.9.5.7]"""
        return range(self.active_pairs)

    # -- control [VIRTIO1.4 5.1.9.5] --

    def control(self, readable: bytes, writable_length: int) -> Control:
        """Perform a command; return its possible acks. A command that fails changes nothing."""
        if not writable_length:
            return Control(())
        if len(readable) < 2 or not self.has(NetFeature.CTRL_VQ):
            return Control((ERR,))
        return Control((OK if self._perform(readable[0], readable[1], readable[2:]) else ERR,))

    def _perform(self, kind: int, command: int, data: bytes) -> bool:
        match kind, command:
            case (0, 0 | 1) if self.has(NetFeature.CTRL_RX) and len(data) == 1 and data[0] < 2:
                if command:
                    self.all_multicast = bool(data[0])
                else:
                    self.promiscuous = bool(data[0])
            case (1, 0) if self.has(NetFeature.CTRL_RX):
                addresses = _tables(data)
                if addresses is None:
                    return False
                self.table = frozenset(addresses)
            case (1, 1) if self.has(NetFeature.CTRL_MAC_ADDR) and len(data) == 6:
                self.mac = data
            case (4, 0) if self.has(NetFeature.MQ) and len(data) == 2 and 1 <= int.from_bytes(data, "little") <= self.pairs:
                self.active_pairs = int.from_bytes(data, "little")
            case _:
                return False
        return True


def _completed(frame: bytes, header: NetHeader) -> list[bytes]:
    """Return ``frame`` with the checksum that its header asks for; 0 may stand as 0xFFFF. [VIRTIO1.4 5.1.9.2]"""
    place, total = header.csum_start + header.csum_offset, ~internet_sum(frame[header.csum_start :]) & 0xFFFF
    return [frame[:place] + number.to_bytes(2, "big") + frame[place + 2 :] for number in ([total] if total else [0, 0xFFFF])]


def _tables(data: bytes) -> list[bytes] | None:
    """Return the addresses of the unicast and the multicast table; None: the bytes are no such tables. [VIRTIO1.4 5.1.9.5.2]"""
    found, at = [], 0
    for _ in range(2):
        if len(data) < at + 4:
            return None
        count, at = int.from_bytes(data[at : at + 4], "little"), at + 4
        if len(data) < at + 6 * count:
            return None
        found += [data[at + 6 * n : at + 6 * n + 6] for n in range(count)]
        at += 6 * count
    return found if at == len(data) else None


def pair_of(queue: int, pairs: int) -> tuple[str, int]:
    """Return what queue number ``queue`` is: ("receive" or "transmit", pair), or ("control", 0). [VIRTIO1.4 5.1.2]"""
    if queue not in range(2 * pairs + 1):
        raise ValueError(f"Queue must be below {2 * pairs + 1}, not {queue!r}")
    return ("control", 0) if queue == 2 * pairs else (("receive", "transmit")[queue % 2], queue // 2)


# -- the driver --


class NetDriver:
    """One pair of queues: fills the receive ring with buffers, sends frames, collects both.

    Parameters
    ----------
    receive, transmit : :class:`.buffers.RingUser`
        The queues.
    room : :class:`int`
        Writable bytes of a receive buffer.
    """

    def __init__(self, receive: RingUser, transmit: RingUser, *, room: int = 1526):
        if room < HEADER_BYTES:
            raise ValueError(f"A receive buffer must have {HEADER_BYTES} bytes at least, not {room!r}")
        self.receive, self.transmit, self.room = receive, transmit, room
        self._waiting: list[tuple[bytes, int]] = []  # buffers of a packet that is not whole yet

    def send(self, frame: bytes, header: NetHeader | None = None) -> int:
        """Add a frame; return its buffer's id. The device sees it after ``transmit.ring.publish()``."""
        return self.transmit.add((header or NetHeader()).pack() + frame)

    def sent(self) -> list[int]:
        """Return the ids of frames that the device is done with since."""
        return [number for number, _, _ in self.transmit.taken()]

    def received(self) -> list[list[tuple[bytes, int]]]:
        """Return the packets that came since: of each its buffers, as (used bytes, writable length)."""
        found = []
        for _, made, used in self.receive.taken():
            self._waiting.append((used, made.room))
            first = self._waiting[0][0]
            if len(self._waiting) >= (NetHeader.unpack(first).num_buffers if len(first) >= HEADER_BYTES else 1):
                found.append(self._waiting)
                self._waiting = []
        return found

    @property
    def is_between(self) -> bool:
        """Some, but not all buffers of a packet came: V155 is broken when that is seen behind :meth:`received`."""
        return bool(self._waiting)

    def abandon(self) -> None:
        """Forget what the device has: after a reset of the device and the rings."""
        self.receive.abandon()
        self.transmit.abandon()
        self._waiting = []
