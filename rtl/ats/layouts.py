"""Payloads between the parts of the translation cache."""

from dataclasses import replace

from amaranth import unsigned
from amaranth.lib import data

from ..iommu.features import Features
from ..tlp.layouts import Pasid, more

FEATURES = Features(Sv48=True, Sv57=True, PD8=True)  # of the store: the widest addresses, and a bit that says "untranslated only"
PAGE_BITS, FRAME_BITS = FEATURES.page_bits, 44  # page numbers that are cached; what lies above is left to the host
MAX_FUNCTIONS = 8


class Asked(data.Struct):
    """A translation that is wanted, and for whom."""

    function: unsigned(3)
    page: unsigned(52)
    is_write: unsigned(1)
    cookie: unsigned(8)


def asked_layout(has_pasid):
    """Return the layout of an :class:`Asked`, with ``has_pasid`` one that may have a PASID."""
    return more(Asked, pasid=Pasid) if has_pasid else Asked


class PageWanted(data.Struct):
    """A page that the host is to bring in, for the translation request ``slot``."""

    slot: unsigned(4)
    function: unsigned(3)
    page: unsigned(52)
    is_write: unsigned(1)


def page_wanted_layout(has_pasid):
    """Return the layout of a :class:`PageWanted`, with ``has_pasid`` one that may have a PASID."""
    return more(PageWanted, pasid=Pasid) if has_pasid else PageWanted


def store_features(has_pasid):
    """Return the features of the store, and with ``has_pasid`` an address space for each process of each function."""
    return replace(FEATURES, Sv39x4=True) if has_pasid else FEATURES


def put_space(target, asked, has_pasid):
    """Return the assignments that give ``target``, an entry of the store or a lookup in it, the address space of ``asked``."""
    if not has_pasid:
        return [target.PSCID.eq(asked.function)]
    return [target.PSCID.eq(asked.pasid.value), target.first.eq(asked.pasid.valid), target.GV.eq(1), target.GSCID.eq(asked.function)]


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
