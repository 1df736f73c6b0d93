"""Payloads between request server, translator and event queue."""

from amaranth import unsigned
from amaranth.lib import data

SLOT_BITS = 3  # of a domain: more slots than endpoints, so that there always is a free one
SLOTS = 1 << SLOT_BITS


class Endpoint(data.Struct):
    """Where a function is attached. [VIRTIO1.4 5.13.6.3]"""

    attached: unsigned(1)
    is_bypass: unsigned(1)  # the domain is one that does not translate
    slot: unsigned(SLOT_BITS)  # of the domain; its mappings have keys that begin with it


class Forget(data.Struct):
    """Forget cached translations: all, or at least those of one page."""

    is_page: unsigned(1)
    page: unsigned(52)


class Report(data.Struct):
    """A refused access. [VIRTIO1.4 5.13.6.9]"""

    reason: unsigned(2)
    is_write: unsigned(1)
    endpoint: unsigned(8)
    address: unsigned(64)
