"""Where a request of a device goes: host bridge with upstream windows, RAM, and BARs of peers.

A bridge routes by address alone. What lies inside one of its upstream windows goes to memory, what lies outside is
offered to the other devices, and what nobody takes is Unsupported Request. Between the functions of a card, or the ports of a
switch, ACS decides before the bridge does: :class:`PeerRouter`. What an IOMMU must map is told to a :class:`MapListener`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, IntFlag
from typing import Protocol

from .memory import SPACE, AccessFault

__all__ = ["Acs", "AddressSpace", "Container", "Handler", "MapError", "MapListener", "Mmio", "Peer", "PeerRouter", "Platform", "Ram",
           "RamNotMapped", "Route", "Skip", "Window"]  # fmt: skip


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
    """Registers. ``is_pci``: a BAR on this bus, so that other devices may reach it; else some other device of the machine.

    ``is_real``: hardware stands behind it, so that an IOMMU may map it; else a program answers, and no device can be sent there.
    """

    handler: Handler
    is_pci: bool = True
    is_real: bool = True


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
    messages : :class:`Window` or None
        Where an aligned write of 4 bytes is an interrupt, and nothing else goes anywhere; it comes before all the rest. What was written
        there is in ``interrupts``, ``(address, data)`` each.
    """

    def __init__(self, sections: Iterable[Ram | Mmio] = (), *, windows: Iterable[Window] | None = None, messages: Window | None = None):
        self.windows = None if windows is None else tuple(windows)
        self.messages = messages
        self.interrupts: list[tuple[int, int]] = []
        self._sections: list[Ram | Mmio] = []
        self._listeners: list[MapListener] = []
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
        for listener in self._listeners:
            listener.add(section)

    def listen(self, listener: MapListener) -> None:
        """Tell ``listener`` of every section that is here, by address, and from now on of each that comes or goes."""
        self._listeners.append(listener)
        for section in self._sections:
            listener.add(section)

    def remove(self, section: Ram | Mmio) -> None:
        """Let a section disappear; ValueError when it is not here."""
        if section not in self._sections:
            raise ValueError(f"A section to remove must be one of the address space, not {section!r}")
        self._sections.remove(section)
        for listener in self._listeners:
            listener.remove(section)

    def route(self, address: int, length: int) -> Ram | Mmio | None:
        """Return the section that takes such a request, None for Unsupported Request. A length of 0 counts as 1 byte."""
        length = max(length, 1)
        if self.messages and address < self.messages.end and self.messages.start < address + length:
            return None
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
        if self.messages and self.messages.holds(address, 4) and len(data) == 4 and address % 4 == 0:
            self.interrupts.append((address, int.from_bytes(data, "little")))
            return
        match self.route(address, len(data)):
            case Ram(start=start, memory=memory, base=base):
                memory.write(base + address - start, data, source=source)
            case Mmio(start=start, handler=handler):
                handler.write(address - start, data)
            case None:
                raise AccessFault(address, len(data), True, "unmapped")


def _start(section: Window) -> int:
    return section.start


class Platform:
    """One machine in two address spaces, which need not agree: ``cpu`` is what processors address, ``bus`` what devices do.

    A processor reaches every section of its space and knows nothing of the bridge's windows; a device is in ``bus``. Each has listeners
    of its own: who maps RAM for devices listens to one, who cares for processors to the other.

    Parameters
    ----------
    windows, messages
        Of ``bus``, see :class:`AddressSpace`.
    """

    def __init__(self, *, windows: Iterable[Window] | None = None, messages: Window | None = None):
        self.cpu = AddressSpace()
        self.bus = AddressSpace(windows=windows, messages=messages)
        self._bus_places: dict[int, Ram | Mmio] = {}  # address of a section for processors -> the section of the bus

    def add(self, section: Ram | Mmio, *, bus_start: int | None = None, is_on_bus: bool = True) -> None:
        """Let a section appear where processors see it, and for devices at ``bus_start`` (by default at the same address), or not at all.

        ValueError when it overlaps another in either space; then it is in neither.
        """
        self.cpu.add(section)
        if is_on_bus:
            other = section if bus_start is None else replace(section, start=bus_start)
            try:
                self.bus.add(other)
            except ValueError:
                self.cpu.remove(section)
                raise
            self._bus_places[section.start] = other

    def remove(self, section: Ram | Mmio) -> None:
        """Let a section disappear from both; ValueError when it is not here."""
        self.cpu.remove(section)
        other = self._bus_places.pop(section.start, None)
        if other is not None:
            self.bus.remove(other)


# -- peers --


class Acs(IntFlag):
    """Bits of ACS Control. [PCIe5 7.7.8.3]"""

    NONE, SOURCE_VALIDATION, TRANSLATION_BLOCKING, REQUEST_REDIRECT, COMPLETION_REDIRECT = 0, 1, 2, 4, 8
    UPSTREAM_FORWARDING, EGRESS_CONTROL, DIRECT_TRANSLATED = 16, 32, 64


_PORT_ONLY = Acs.SOURCE_VALIDATION | Acs.TRANSLATION_BLOCKING | Acs.UPSTREAM_FORWARDING


class Route(Enum):
    """Where a TLP goes: to a peer without the root complex, up to it, or nowhere.

    An ACS violation is answered with Completer Abort, what a port would send back where it came from with Unsupported Request.
    """

    PEER, UPSTREAM, VIOLATION, UNSUPPORTED = range(4)


@dataclass(frozen=True)
class Peer:
    """A function of a card, or a downstream port of a switch, among which requests may go directly.

    Attributes
    ----------
    bars : tuple of :class:`Window`
        Addresses that it takes.
    routing_ids : range
        Requester IDs behind it: one for a function, those of its buses for a port.
    control : :class:`Acs`
        ACS Control, 0 without the capability.
    egress : :class:`int`
        Egress control vector: bit n forbids, or redirects, what goes to peer n.
    is_port : :class:`bool`
        A downstream port, which alone has source validation, translation blocking and upstream forwarding.
    """

    bars: tuple[Window, ...]
    routing_ids: range
    control: Acs = Acs.NONE
    egress: int = 0
    is_port: bool = False

    def __post_init__(self):
        if not self.is_port and self.control & _PORT_ONLY:
            raise ValueError(f"Only a downstream port must have {(self.control & _PORT_ONLY)!r}, not a function")


class PeerRouter:
    """What becomes of requests and completions of peers, each under the ACS control of where it comes in. [PCIe5 6.12]

    Routing knows addresses, the AT field and IDs, and nothing else: whoever forges the AT field is believed where Direct Translated
    P2P is on.
    """

    def __init__(self, peers: Iterable[Peer]):
        self.peers = list(peers)

    def target(self, address: int, length: int) -> int | None:
        """Return which peer takes these addresses."""
        for n, peer in enumerate(self.peers):
            if any(bar.holds(address, max(length, 1)) for bar in peer.bars):
                return n
        return None

    def request(self, source: int, address: int, length: int, *, at: int = 0, requester_id: int | None = None) -> Route:
        """Return the way of a memory request that peer ``source`` sends; ``at``: 0 untranslated, 1 translation request, 2 translated.

        ``requester_id`` None: one that is its own.
        """
        peer, control = self.peers[source], self.peers[source].control
        # 1. What a port blocks, wherever it would go. [PCIe5 6.12.1.1]
        if requester_id is not None and control & Acs.SOURCE_VALIDATION and requester_id not in peer.routing_ids:
            return Route.VIOLATION
        if at and control & Acs.TRANSLATION_BLOCKING:
            return Route.VIOLATION
        target = self.target(address, length)
        if target is None or at == 1:
            return Route.UPSTREAM  # a translation request is for the root complex
        if target == source and peer.is_port:
            return Route.UPSTREAM if control & Acs.UPSTREAM_FORWARDING else Route.UNSUPPORTED
        # 2. Translated requests may go directly, past both of what follows. [PCIe5 6.12.3]
        if at == 2 and control & Acs.DIRECT_TRANSLATED:
            return Route.PEER
        # 3. Egress control narrows redirection down, and is a violation without it. [PCIe5 6.12.3]
        if control & Acs.EGRESS_CONTROL and not peer.egress >> target & 1:
            return Route.PEER
        if control & Acs.REQUEST_REDIRECT:
            return Route.UPSTREAM
        return Route.VIOLATION if control & Acs.EGRESS_CONTROL else Route.PEER

    def completion(self, source: int, requester_id: int, *, relaxed_ordering: bool = False) -> Route:
        """Return the way of a completion that peer ``source`` sends to ``requester_id``. [PCIe5 6.12.1.1]

        Redirected requests have their completions redirected, but for those with relaxed ordering, which need no order.
        """
        target = next((n for n, peer in enumerate(self.peers) if requester_id in peer.routing_ids), None)
        if target is None:
            return Route.UPSTREAM
        is_redirected = self.peers[source].control & Acs.COMPLETION_REDIRECT and not relaxed_ordering
        return Route.UPSTREAM if is_redirected else Route.PEER


# -- what an IOMMU must map --


class MapError(Exception):
    """An IOMMU does not take a mapping."""


class RamNotMapped(Exception):
    """RAM could not be mapped for devices: they cannot go on without a reset."""


class Container(Protocol):
    """An IOMMU to program. ``page_sizes``: bit n is set when it knows pages of 2^n bytes; either call may raise :exc:`MapError`."""

    page_sizes: int

    def map(self, iova: int, length: int, section: Ram | Mmio, offset: int) -> None: ...
    def unmap(self, iova: int, length: int) -> None: ...


class Skip(Enum):
    """Why something is not mapped."""

    EMULATED = "no hardware behind it"
    HIGH = "beyond 63 bits"
    SMALL = "no whole page of the IOMMU"
    UNALIGNED = "not aligned to the IOMMU's page"
    REFUSED = "the IOMMU does not map it"
    NOT_UNMAPPED = "the IOMMU does not unmap it"


class MapListener:
    """Turns sections that come and go into map and unmap calls, as VFIO's user does.

    Sizes and addresses are multiples of the smallest page of the IOMMU. RAM gives up its ragged ends; registers are mapped whole or
    not at all. Nothing is passed over silently: each section that is not mapped is counted by its reason, and reported, the first
    ``report_limit`` times. What cannot be asked of the IOMMU, and registers that it refuses, stop nothing; RAM that it refuses raises
    :exc:`RamNotMapped`, at once and for whatever comes later, until :meth:`reset`.

    Attributes
    ----------
    counts : :class:`collections.Counter`
        Of :class:`Skip`; ``trimmed_bytes`` of RAM are not mapped because of ragged ends.
    reports : list of :class:`str`
        One sentence each; ``dropped_reports`` counts those beyond the limit.
    mapped : dict
        Address of a section -> (IOVA, bytes) that are mapped for it.
    """

    def __init__(self, container: Container, *, report_limit: int = 16):
        if container.page_sizes <= 0:
            raise ValueError(f"Page sizes of an IOMMU must have at least one bit, not {container.page_sizes!r}")
        self.container, self.report_limit = container, report_limit
        self.counts: Counter[Skip] = Counter()
        self.trimmed_bytes = self.dropped_reports = 0
        self.reports: list[str] = []
        self.mapped: dict[int, tuple[int, int]] = {}
        self.is_broken = False

    @property
    def page(self) -> int:
        """Smallest page of the IOMMU in bytes."""
        return self.container.page_sizes & -self.container.page_sizes

    def add(self, section: Ram | Mmio) -> None:
        """A section came."""
        if self.is_broken:
            raise RamNotMapped("An IOMMU that refused RAM must be reset before it is told of more")
        reason, start, end = self._extent(section)
        if reason is None:
            try:
                self.container.map(start, end - start, section, start - section.start)
            except MapError as error:
                self._skip(Skip.REFUSED, section, str(error))
                if isinstance(section, Ram):
                    self.is_broken = True
                    raise RamNotMapped(f"RAM at {section.start:#x} is not mapped: {error}") from error
                return
            self.mapped[section.start] = start, end - start
            self.trimmed_bytes += section.length - (end - start)
        else:
            self._skip(reason, section)

    def remove(self, section: Ram | Mmio) -> None:
        """A section went; what was never mapped is not unmapped."""
        self._unmap(section.start)

    def reset(self) -> None:
        """Unmap everything and forget what was refused."""
        for start in list(self.mapped):
            self._unmap(start)
        self.is_broken = False

    def _unmap(self, start: int) -> None:
        place = self.mapped.pop(start, None)
        if place is not None:
            try:
                self.container.unmap(*place)
            except MapError as error:
                self._report(Skip.NOT_UNMAPPED, f"{place[0]:#x}+{place[1]:#x}", str(error))

    def _extent(self, section: Ram | Mmio) -> tuple[Skip | None, int, int]:
        """Return why not, or None with the first address and that after the last."""
        mask = self.page - 1
        start, end = section.start + mask & ~mask, section.end & ~mask
        if isinstance(section, Mmio) and not (section.is_real and section.is_pci):
            return Skip.EMULATED, start, end
        if section.start >> 63:
            return Skip.HIGH, start, end
        if isinstance(section, Mmio) and (section.start | section.length) & mask:
            return Skip.UNALIGNED, start, end
        if isinstance(section, Ram) and (section.start - section.base) & mask:
            return Skip.UNALIGNED, start, end  # its pages are not the pages of the memory behind it
        return (None if start < end else Skip.SMALL), start, end

    def _skip(self, reason: Skip, section: Ram | Mmio, detail: str = "") -> None:
        self._report(reason, f"{'RAM' if isinstance(section, Ram) else 'registers'} at {section.start:#x}+{section.length:#x}", detail)

    def _report(self, reason: Skip, what: str, detail: str) -> None:
        self.counts[reason] += 1
        if len(self.reports) < self.report_limit:
            self.reports.append(f"{what}: {reason.value}{f' ({detail})' if detail else ''}")
        else:
            self.dropped_reports += 1
