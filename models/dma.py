"""What the bus allows of the bursts and TLPs that serve one transfer: rules, not a second splitter. [PCIe5 2.2.7]

Where an engine cuts is left open by the specification, so it is not predicted; any legal cutting passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tlp import Tlp, TlpType

__all__ = ["PAGE", "BurstRules", "Span", "TlpRules"]

PAGE = 4096  # [PCIe5 2.2.7] a request must not cross a naturally aligned 4 KiB boundary


@dataclass(frozen=True)
class Span:
    """``len`` bytes from the byte address ``addr``."""

    addr: int
    len: int

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.addr + self.len


class BurstRules:
    """What is allowed of the bursts of one transfer: each inside one page and no longer than ``max_burst`` bytes.

    Parameters
    ----------
    max_burst : :class:`int`
        Bytes.
    """

    def __init__(self, *, max_burst: int):
        if max_burst < 1:
            raise ValueError(f"Maximum burst must be at least 1 byte, not {max_burst!r}")
        self.max_burst = max_burst

    def faults(self, transfer: Span, bursts: Sequence[Span]) -> list[str]:
        """Return every rule that ``bursts`` breaks for ``transfer``; empty means legal."""
        found, at = [], transfer.addr
        for n in range(len(bursts)):
            burst = bursts[n]
            if burst.len <= 0:
                found.append(f"burst {n} is empty")
            if burst.len > self.max_burst:
                found.append(f"burst {n}: {burst.len} bytes > {self.max_burst}")
            if burst.len > 0 and burst.addr // PAGE != (burst.end - 1) // PAGE:
                found.append(f"burst {n} crosses 4 KiB: {burst.addr:#x}+{burst.len:#x}")
            if burst.addr != at:
                found.append(f"burst {n} starts at {burst.addr:#x}, expected {at:#x}")
            at = burst.end
        if at != transfer.end:
            found.append(f"bursts end at {at:#x}, transfer ends at {transfer.end:#x}")
        return found


class TlpRules:
    """What is allowed of the memory TLPs that serve one transfer, in the order in which they were sent.

    Each is no longer than Max_Payload_Size (writes) or Max_Read_Request_Size (reads), counted in whole dwords, and stays
    in one page; together they touch each byte of the transfer once, in ascending order, and nothing else. No dword is
    touched by two of them, so that an update is never finer than a dword, and a transfer of 2, 4 or 8 naturally aligned
    bytes is one TLP. An empty transfer is nothing, or one zero-length request.

    Parameters
    ----------
    mps, mrrs : :class:`int`
        Bytes.
    """

    def __init__(self, *, mps: int, mrrs: int):
        for name, value in (("Max_Payload_Size", mps), ("Max_Read_Request_Size", mrrs)):
            if value not in (128, 256, 512, 1024, 2048, 4096):
                raise ValueError(f"{name} must be a power of two between 128 and 4096, not {value!r}")
        self.mps, self.mrrs = mps, mrrs

    def faults(self, transfer: Span, tlps: Sequence[Tlp], data: bytes | None = None) -> list[str]:
        """Return every rule that ``tlps`` break; ``data``: what a write transfer must carry, None for a read."""
        kind, limit = (TlpType.MRD, self.mrrs) if data is None else (TlpType.MWR, self.mps)
        found, at, free = [], transfer.addr, 0
        for n in range(len(tlps)):
            tlp = tlps[n]
            start, length = tlp.byte_span()
            if tlp.type is not kind:
                found.append(f"TLP {n} is {tlp.type.name}, expected {kind.name}")
                continue
            if 4 * tlp.length_dw > limit:
                found.append(f"TLP {n}: {tlp.length_dw} dwords > {limit} bytes")
            if tlp.address % PAGE + 4 * tlp.length_dw > PAGE:
                found.append(f"TLP {n} crosses 4 KiB: {tlp.address:#x}+{4 * tlp.length_dw:#x}")
            if tlp.length_dw > 1 and not (tlp.first_be and tlp.last_be):
                found.append(f"TLP {n}: byte enables {tlp.first_be:04b} and {tlp.last_be:04b} of {tlp.length_dw} dwords")
            if length == 0 and transfer.len:
                found.append(f"TLP {n} touches no byte")
                continue
            if tlp.has_gaps and length:
                found.append(f"TLP {n} leaves out bytes inside {start:#x}+{length:#x}")
            if length == 0:
                continue
            if start != at:
                found.append(f"TLP {n} starts at {start:#x}, expected {at:#x}")
            if n and start // 4 < free:
                found.append(f"TLP {n} touches the dword at {start & ~3:#x} once more")
            at, free = start + length, (start + length + 3) // 4
            if data is not None:
                offset, lead = start - transfer.addr, start - tlp.address
                if tlp.data[lead : lead + length] != data[offset : offset + length] or offset < 0:
                    found.append(f"TLP {n} carries other data for {start:#x}+{length:#x}")
        if at != transfer.end:
            found.append(f"TLPs end at {at:#x}, transfer ends at {transfer.end:#x}")
        if len(tlps) > 1 and transfer.len in (0, 2, 4, 8) and (not transfer.len or transfer.addr % transfer.len == 0):
            found.append(f"{transfer.len} aligned bytes at {transfer.addr:#x} are {len(tlps)} TLPs, must be one")
        return found
