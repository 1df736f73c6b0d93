"""Where a request of a device goes: host bridge with upstream windows, RAM, and BARs of peers.

A bridge routes by address alone. What lies inside one of its upstream windows goes to memory, what lies outside is
offered to the other devices, and what nobody takes is Unsupported Request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from .memory import SPACE, AccessFault

__all__ = ["AddressSpace", "Handler", "Mmio", "Ram", "Window"]


class Storage(Protocol):
    """What stands behind RAM; `GuestMemory` is one. Either call may raise `AccessFault`."""

    def read(self, address: int, length: int, *, source: str = "") -> bytes: ...
    def write(self, address: int, data: bytes, *, source: str = "") -> None: ...


class Handler(Protocol):
    """What stands behind MMIO; ``offset`` counts from the start of the section."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...


@dataclass(frozen=True)
class Window:
    """``length`` bytes from ``start``; never empty, never beyond 64 bits."""

    start: int
    length: int

    def __post_init__(self):
        if not 0 <= self.start < SPACE or not 0 < self.length <= SPACE - self.start:
            raise ValueError(f"A window must lie within 64 bits and hold at least one byte, not {self.start!r} and {self.length!r}")

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.start + self.length

    def holds(self, address: int, length: int) -> bool:
        """Return whether all of these bytes lie inside."""
        return self.start <= address and address + length <= self.end


@dataclass(frozen=True)
class Ram(Window):
    """Memory: address ``start`` is address ``base`` of ``memory``."""

    memory: Storage
    base: int = 0


@dataclass(frozen=True)
class Mmio(Window):
    """Registers. ``is_pci``: a BAR on this bus, so that other devices may reach it; else some other device of the machine."""

    handler: Handler
    is_pci: bool = True


class AddressSpace:
    """What the devices below one host bridge see. It stands in for a memory: what goes nowhere raises :exc:`AccessFault`.

    A request belongs to the section that holds all of its bytes. Inside an upstream window that must be RAM; outside of all
    windows it must be a BAR of a peer; anything else, also what lies half in a window, is Unsupported Request.

    Parameters
    ----------
    sections : iterable of :class:`Ram` and :class:`Mmio`
        Anywhere, of any length; they must not overlap.
    windows : iterable of :class:`Window` or None
        What the bridge sends upstream. None: a bridge that decodes everything, RAM and BARs alike.
    """

    def __init__(self, sections: Iterable[Ram | Mmio] = (), *, windows: Iterable[Window] | None = None):
        self.windows = None if windows is None else tuple(windows)
        self._sections: list[Ram | Mmio] = []
        for section in sections:
            self.add(section)

    @property
    def sections(self) -> tuple[Ram | Mmio, ...]:
        """The sections, by address."""
        return tuple(self._sections)

    def add(self, section: Ram | Mmio) -> None:
        """Let a section appear; ValueError when it overlaps another."""
        n = bisect_right(self._sections, section.start, key=_start)
        for other in self._sections[max(0, n - 1) : n + 1]:
            if other.start < section.end and section.start < other.end:
                raise ValueError(f"A section must not overlap {other.start:#x}+{other.length:#x}, "
                                 f"not {section.start:#x}+{section.length:#x}")  # fmt: skip
        self._sections.insert(n, section)

    def remove(self, section: Ram | Mmio) -> None:
        """Let a section disappear; ValueError when it is not here."""
        if section not in self._sections:
            raise ValueError(f"A section to remove must be one of the address space, not {section!r}")
        self._sections.remove(section)

    def route(self, address: int, length: int) -> Ram | Mmio | None:
        """Return the section that takes such a request, None for Unsupported Request. A length of 0 counts as 1 byte."""
        length = max(length, 1)
        n = bisect_right(self._sections, address, key=_start) - 1
        if n < 0 or not self._sections[n].holds(address, length):
            return None
        section = self._sections[n]
        if self.windows is None:
            may_pass = True
        elif any(window.holds(address, length) for window in self.windows):
            may_pass = isinstance(section, Ram)
        else:
            may_pass = isinstance(section, Mmio) and not any(
                window.start < address + length and address < window.end for window in self.windows)  # fmt: skip
        return section if may_pass and (isinstance(section, Ram) or section.is_pci) else None

    def read(self, address: int, length: int, *, source: str = "") -> bytes:
        """Return what a read of a device returns."""
        match self.route(address, length):
            case Ram(start=start, memory=memory, base=base):
                return memory.read(base + address - start, length, source=source)
            case Mmio(start=start, handler=handler):
                return handler.read(address - start, length)
        raise AccessFault(address, length, False, "unmapped")

    def write(self, address: int, data: bytes, *, source: str = "") -> None:
        """Do what a write of a device does."""
        match self.route(address, len(data)):
            case Ram(start=start, memory=memory, base=base):
                memory.write(base + address - start, data, source=source)
            case Mmio(start=start, handler=handler):
                handler.write(address - start, data)
            case None:
                raise AccessFault(address, len(data), True, "unmapped")


def _start(section: Window) -> int:
    return section.start
