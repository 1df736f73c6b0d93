"""Payloads of the raw TLP link."""

from functools import cache

from amaranth.lib import data

from ..tlp.layouts import Pasid, more


@cache
def RawBeat(width):
    """One beat of a TLP on the link: dwords from lane 0, 3 or 4 of header, then payload.

    A header dword has byte 0 in bits 31:24, a payload dword has its lowest address in bits 7:0. ``keep`` has one bit per
    dword: all ones but in the last beat, where it is contiguous from lane 0.
    """
    return data.StructLayout({"data": width, "keep": width // 32, "first": 1, "last": 1})


@cache
def PasidBeat(width):
    """One beat of a TLP whose PASID prefix travels beside it: ``pasid`` is valid with the first beat at least."""
    return more(RawBeat(width), pasid=Pasid)
