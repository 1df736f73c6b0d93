"""Payloads between the parts of the translation cache."""

from amaranth import unsigned
from amaranth.lib import data

from ..iommu.features import Features

FEATURES = Features(Sv48=True, Sv57=True, PD8=True)  # of the store: the widest addresses, and a bit that says "untranslated only"
PAGE_BITS, FRAME_BITS = FEATURES.page_bits, 44  # page numbers that are cached; what lies above is left to the host
MAX_FUNCTIONS = 8


class Asked(data.Struct):
    """A translation that is wanted, and for whom."""

    function: unsigned(3)
    page: unsigned(52)
    is_write: unsigned(1)
    cookie: unsigned(8)


class PageWanted(data.Struct):
    """A page that the host is to bring in, for the translation request ``slot``."""

    slot: unsigned(4)
    function: unsigned(3)
    page: unsigned(52)
    is_write: unsigned(1)


class PageOver(data.Struct):
    """The end of a :class:`PageWanted`: the host says that the page is there, or will not be."""

    slot: unsigned(4)
    granted: unsigned(1)


class Answer(data.Struct):
    """What the host said about a page; without ``fault`` the rest counts."""

    page: unsigned(52)  # meaningless with ``untranslated``
    readable: unsigned(1)
    writable: unsigned(1)
    untranslated: unsigned(1)  # the page must be accessed untranslated, or nothing is known of it
    fault: unsigned(1)
