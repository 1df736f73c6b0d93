"""Payloads between PCI transport, ring engine and back ends."""

from functools import cache

from amaranth import unsigned
from amaranth.lib import data, enum


class Chain(data.Struct):
    """One buffer chain handed to a back end, in front of its readable bytes. [VIRTIO1.4 2.7]

    For each chain the back end takes exactly ``readable_bytes`` from its readable stream (one packet ending in ``last``; no
    beat at all when 0) and sends exactly one packet on its writable stream (its last beat may be empty).
    """

    queue: unsigned(16)  # index inside the function
    readable_bytes: unsigned(32)
    writable_bytes: unsigned(32)


class QueueOperation(enum.Enum, shape=1):
    """What the transport asks of the ring engine."""

    ENABLE = 0
    RESET = 1


class RingRules(data.Struct):
    """What driver and device agreed on for all rings of a function. [VIRTIO1.4 6]"""

    packed: unsigned(1)
    indirect: unsigned(1)
    event_index: unsigned(1)
    in_order: unsigned(1)


class QueueCommand(data.Struct):
    """The transport hands a queue to the ring engine, or takes it back. With RESET only ``queue`` counts. [VIRTIO1.4 4.1.4.3]"""

    operation: QueueOperation
    queue: unsigned(6)  # card-wide queue number
    size: unsigned(16)  # 1 to 32768; of split rings a power of two
    rules: RingRules
    descriptor_iova: unsigned(64)
    driver_iova: unsigned(64)
    device_iova: unsigned(64)


class Flight(data.Struct):
    """What the used side must know of a chain that a back end has."""

    queue: unsigned(6)  # card-wide queue number
    id: unsigned(16)  # split: head; packed: buffer ID
    slots: unsigned(16)  # packed: entries of the ring that its list takes, 1 to the queue size
    writable_bytes: unsigned(32)


ANSWER_BITS = 11  # of a ring access' cookie belong to whoever asks


@cache
def RingAccess(width):
    """One ring access of the used side: a read of up to 4 bytes that lie in an aligned dword, or a write.

    ``data`` is a row of memory, ``width`` bits but at least 128, with lanes that follow the address; a write lies in one row. At 64 bits
    a write has one or two beats. A write of 2 bytes brings ``index`` instead. ``cookie`` counts for reads.
    """
    row = max(width, 128)
    return data.StructLayout({
        "iova": 64, "length_bytes": range(row // 8 + 1), "is_write": 1, "cookie": ANSWER_BITS, "index": 16, "data": row,
    })


class Notification(data.Struct):
    """A used buffer notification is due for a queue (card-wide number)."""

    queue: unsigned(6)


class ConfigWrite(data.Struct):
    """The driver writes the enabled bytes of an aligned word of the device configuration; none: no write."""

    enable: unsigned(8)
    word: unsigned(9)
    data: unsigned(64)
