"""Payloads between functions and the interrupt sender."""

from amaranth import unsigned
from amaranth.lib import data


class MsixRequest(data.Struct):
    """Send (or hold pending) MSI-X vector ``vector`` of ``function``."""

    function: unsigned(8)
    vector: unsigned(11)
