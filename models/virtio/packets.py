"""Ethernet frames for tests: IPv4 and IPv6 with TCP or UDP, checksums right, wrong, or left to whoever sends. [RFC1071] [RFC768]"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["ETHERNET_BYTES", "Packet", "any_packet", "internet_sum", "packet", "transport_of"]

ETHERNET_BYTES = 14  # destination, source, type
IPV4, IPV6, VLAN = 0x0800, 0x86DD, 0x8100
TCP, UDP = 6, 17
_CHECKSUM = {TCP: 16, UDP: 6}  # where it lies in the transport header
_HEADER = {TCP: 20, UDP: 8}


def internet_sum(data: bytes, start: int = 0) -> int:
    """Return the 16-bit ones' complement sum of ``data``, a last odd byte counting as the upper one. [RFC1071]"""
    total = start + sum(int.from_bytes(data[n : n + 2].ljust(2, b"\0"), "big") for n in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """What a transport's checksum covers of the network header; IPv4's and IPv6's have the same sum for the same fields."""
    return source + destination + length.to_bytes(4, "big") + protocol.to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame, and where the checksum of its transport is.

    Attributes
    ----------
    frame : :class:`bytes`
        From the destination's address to the end of the payload.
    csum_start, csum_offset : :class:`int`
        Transport header in the frame, checksum in the header.
    partial : :class:`bytes`
        The frame with the sum of the pseudo header in place of the checksum: what a driver gives a device that fills it in.
    """

    frame: bytes
    csum_start: int
    csum_offset: int
    partial: bytes


def packet(payload: bytes, *, protocol: int = TCP, is_ipv6: bool = False, vlan: int | None = None, ports: tuple[int, int] = (1000, 2000),
           macs: tuple[bytes, bytes] = (b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2"), damaged: bool = False) -> Packet:  # fmt: skip
    """Return a packet; ``macs``: destination and source; ``damaged``: its transport checksum is wrong."""
    if protocol not in _HEADER:
        raise ValueError(f"Protocol must be TCP ({TCP}) or UDP ({UDP}), not {protocol!r}")
    source, destination = (bytes(15 - 12 * (not is_ipv6)) + bytes([n]) for n in (1, 2))
    length = _HEADER[protocol] + len(payload)
    head = bytearray(_HEADER[protocol])
    head[:4] = ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big")
    if protocol == TCP:
        head[12], head[13] = 5 << 4, 0x10  # words of the header; ACK
    else:
        head[4:6] = length.to_bytes(2, "big")
    at = _CHECKSUM[protocol]
    pseudo = internet_sum(_pseudo_header(source, destination, protocol, length))
    right = ~internet_sum(bytes(head) + payload, pseudo) & 0xFFFF
    if protocol == UDP and right == 0:
        right = 0xFFFF  # 0 says that there is none [RFC768]
    if is_ipv6:
        network = bytes([0x60, 0, 0, 0]) + length.to_bytes(2, "big") + bytes([protocol, 64]) + source + destination
    else:
        network = bytearray(bytes([0x45, 0]) + (20 + length).to_bytes(2, "big") + bytes([0, 0, 0x40, 0, 64, protocol, 0, 0])
                            + source + destination)  # fmt: skip
        network[10:12] = (~internet_sum(bytes(network)) & 0xFFFF).to_bytes(2, "big")
    tag = b"" if vlan is None else VLAN.to_bytes(2, "big") + vlan.to_bytes(2, "big")
    front = macs[0] + macs[1] + tag + (IPV6 if is_ipv6 else IPV4).to_bytes(2, "big") + bytes(network)

    def whole(checksum: int) -> bytes:
        head[at : at + 2] = checksum.to_bytes(2, "big")
        return front + bytes(head) + payload

    partial = whole(pseudo)
    return Packet(whole(right ^ 0x0101 if damaged else right), len(front), at, partial)


def any_packet(rng: random.Random, length: int, **how) -> Packet:
    """Return a random packet whose frame has ``length`` bytes, at least 62 (82 with IPv6) and a VLAN tag's more."""
    ports = rng.randrange(1, 1 << 16), rng.randrange(1, 1 << 16)
    how = {"protocol": rng.choice((TCP, UDP)), "is_ipv6": rng.random() < 0.3, "ports": ports, **how}
    front = len(packet(b"", **how).frame)
    if length < front:
        raise ValueError(f"Frame must have at least {front} bytes, not {length!r}")
    return packet(rng.randbytes(length - front), **how)


def transport_of(frame: bytes) -> tuple[int, int, bool] | None:
    """Return (where the transport begins, its checksum in the frame, whether that is right); None for what is no whole TCP or UDP packet.

    Fragments, IPv6 with extension headers and UDP without a checksum count as none.
    """
    at = 12
    while frame[at : at + 2] == VLAN.to_bytes(2, "big"):
        at += 4
    kind, at = int.from_bytes(frame[at : at + 2], "big"), at + 2
    if kind == IPV4 and len(frame) >= at + 20 and frame[at] >> 4 == 4:
        header, length, protocol = 4 * (frame[at] & 15), int.from_bytes(frame[at + 2 : at + 4], "big"), frame[at + 9]
        fragment = int.from_bytes(frame[at + 6 : at + 8], "big") & 0x3FFF
        source, destination = frame[at + 12 : at + 16], frame[at + 16 : at + 20]
        if header < 20 or fragment:
            return None
    elif kind == IPV6 and len(frame) >= at + 40 and frame[at] >> 4 == 6:
        header, length, protocol = 40, 40 + int.from_bytes(frame[at + 4 : at + 6], "big"), frame[at + 6]
        source, destination = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
    else:
        return None
    start, end = at + header, at + length
    if protocol not in _HEADER or end > len(frame) or end < start + _HEADER[protocol]:
        return None
    place = start + _CHECKSUM[protocol]
    if protocol == UDP and frame[place : place + 2] == b"\0\0":
        return None
    covered = _pseudo_header(source, destination, protocol, end - start) + frame[start:end]
    return start, place, internet_sum(covered) == 0xFFFF
