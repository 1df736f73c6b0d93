"""Payloads between PCI transport, ring engine and back ends."""

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


class Notification(data.Struct):
    """A used buffer notification is due for a queue (card-wide number)."""

    queue: unsigned(6)


class ConfigWrite(data.Struct):
    """The driver writes the enabled bytes of an aligned word of the device configuration; none: no write."""

    enable: unsigned(8)
    word: unsigned(9)
    data: unsigned(64)
