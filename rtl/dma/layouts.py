"""Payloads between whoever has buffers and the engines that move them."""

from functools import cache

from amaranth import unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from ..tlp.layouts import Burst, BurstData, BurstDone, BurstStatus


class Segment(data.Struct):
    """One contiguous IOVA range of a scatter-gather list; ``last`` ends the list. Length 0 is skipped (``last`` still counts)."""

    address: unsigned(64)
    length_bytes: unsigned(32)
    last: unsigned(1)


@cache
def ChainBeat(width):
    """One beat of a packed byte stream: byte 0 in bits 7:0; every beat but the last of a packet is full.

    ``byte_count`` is 0..width/8 (0 only in a beat with ``last``). ``status`` counts with ``last``: not OK means that the
    bytes could not all be fetched and the packet is to be disbelieved.
    """
    return data.StructLayout(
        {"data": width, "byte_count": range(width // 8 + 1), "first": 1, "last": 1, "status": BurstStatus}
    )


class WriterDone(data.Struct):
    """One scatter list is finished: ``length_bytes`` really written before the first failure; ``status`` is that of the first failure
    that the list's own bytes do not tell of, so that whoever reads them would be deceived.

    ``more``: its packet goes on in the next list, so both are to be shown to the driver at once, this one not before. [VIRTIO1.4 5.1.9.4.1]
    """

    length_bytes: unsigned(32)
    status: BurstStatus
    more: unsigned(1)


def client_ports(width):
    """Return the members of a component that is a DMA client of the card, by name: bursts, data both ways, ends of writes."""
    return {
        "bursts": Out(stream.Signature(Burst)),
        "read_data": In(stream.Signature(BurstData(width))),
        "write_data": Out(stream.Signature(BurstData(width))),
        "write_done": In(stream.Signature(BurstDone)),
    }
