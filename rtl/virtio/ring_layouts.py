"""Payloads inside the fetch side of the ring engine."""

from amaranth import Cat, Mux
from amaranth.lib import data, enum

from ..tlp.layouts import BurstStatus
from .layouts import RingRules

LINE_BYTES = 64  # ring reads stay inside one aligned block
LINE_DESCRIPTORS = 4
SLOTS = 64  # ring entries of a function between being asked for and being walked
SLOT_BITS = 6


class LineKind(enum.Enum, shape=2):
    """What a ring read is for."""

    LINE = 0  # descriptors
    HEADS = 1  # entries of an available ring
    INDEX = 2  # its index
    LINE_HALF = 3  # descriptors, from the upper half of their first place on


class LineCookie(data.Struct):
    """Cookie of a ring read.

    ``number``: LINE: slot, and in bit 6 whether it is the slot's second line; HEADS: queue, and half of its space in bit 6; INDEX: queue.
    ``place``: LINE: the first descriptor's in the aligned block. LINE_HALF is like LINE.
    """

    number: 7
    place: 2
    kind: LineKind

    def is_line(self):
        """Return whether it is of a line."""
        return (self.kind == LineKind.LINE) | (self.kind == LineKind.LINE_HALF)


def read_descriptors(access, target, rest, *, lead, offset):
    """Make ``access`` a read of a line from place ``target`` (a multiple of 16 bytes), byte ``lead``, on; return it and how many places.

    ``rest``: places that are left of table or ring; its end lies ``offset`` bytes behind the beginning of a place, or at its end when 0.
    """
    block = LINE_DESCRIPTORS - target[:2]
    is_last = ~rest[3:].any() & (rest[:3] <= block)
    places = Mux(is_last, rest, block)[:3]
    return [
        access.iova.eq(Cat(lead, target)),
        access.length_bytes.eq((places << 4) - lead - Mux(is_last, (-offset)[:4], 0)),
        access.cookie.kind.eq(Mux(lead[3], LineKind.LINE_HALF, LineKind.LINE)),
        access.cookie.place.eq(target[:2]),
    ], places


class LineAccess(data.Struct):
    """One ring access of the fetch side: a read inside an aligned 64-byte block, or a write of 2 or 4 naturally aligned bytes.

    A read of descriptors that do not lie at multiples of 16 brings parts of two of them to a place. [VIRTIO1.4 2.7.5.3]
    """

    function: 3
    iova: 64
    length_bytes: 7
    is_write: 1
    cookie: LineCookie
    data: 32


class Slot(data.Struct):
    """One ring entry that was asked for: where it is in its ring, and where its descriptor will be in the line that it shares."""

    queue: 6
    generation: 1  # of the queue; it changes when what was asked for is forgotten
    count: 16  # entries of the ring in front of it (free-running)
    head: 16  # index of its descriptor in table or ring
    wrap: 1  # packed: the wrap counter that makes it available
    line: SLOT_BITS  # whose line it is in
    before: 2  # descriptors of the line in front of it
    length: 3  # descriptors of the line
    place: 2  # in the aligned block


class RingTable(data.Struct):
    """What walking a queue's chains needs of it."""

    base: 60  # descriptor table or ring, in units of 16 bytes
    size: 16
    rules: RingRules


class Position(data.Struct):
    """Behind the last chain that was walked: the next ring entry."""

    count: 16
    head: 16  # packed
    wrap: 1


class Descriptor(data.Struct):
    """An entry of a split table. [VIRTIO1.4 2.7.5] Of a packed ring ``flags`` is the buffer ID and ``next`` the flags. [VIRTIO1.4 2.8.1]"""

    address: 64
    length: 32
    flags: 16
    next: 16


class LineBeat(data.Struct):
    """What goes with a beat of an answer on its way into the store."""

    function: 3
    cookie: LineCookie
    first: 1
    status: BurstStatus
