"""Payloads inside a virtio-net back end, and at its medium."""

from functools import cache

from amaranth import unsigned
from amaranth.lib import data


@cache
def NetBeat(width):
    """One beat of an Ethernet frame, without preamble and checksum (FCS): byte 0 in bits 7:0; every beat but the last of a frame is full.

    ``byte_count`` is 1..width/8. ``error`` counts with ``last``: the frame is damaged.
    """
    return data.StructLayout({"data": width, "byte_count": range(width // 8 + 1), "first": 1, "last": 1, "error": 1})


class Settings(data.Struct):
    """What the driver has said over the control queue. ``table``: a bit for each value of :func:`.net_control.table_hash`."""

    mac: unsigned(48)  # byte 0 in bits 7:0
    promiscuous: unsigned(1)
    all_multicast: unsigned(1)
    table: unsigned(64)
    pairs: unsigned(16)


class Verdict(data.Struct):
    """What becomes of a frame that came: kept for a queue, or dropped."""

    keep: unsigned(1)
    queue: unsigned(8)
    length_bytes: unsigned(16)
    is_valid: unsigned(1)  # its transport checksum was checked and is right
