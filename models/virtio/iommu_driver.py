"""virtio-iommu: a driver that does what Linux's does: probes, attaches, maps, carves out reserved regions, maps again what a detach lost.

Methods that need the device are generators of `Post` and `Sync`; whoever runs one puts requests on the queue and sends the replies
to a `Sync` back, as `DirectQueue` does. [VIRTIO1.4 5.13.5, 5.13.6]
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from ..host import run
from .intervals import IntervalMap
from .intervals import Mapping as Interval
from .iommu_formats import (
    FAULT_BYTES,
    TAIL_BYTES,
    Attach,
    AttachFlag,
    Detach,
    Fault,
    IommuConfig,
    IommuFeature,
    Map,
    MapFlag,
    Probe,
    Range,
    Region,
    RegionType,
    Request,
    Status,
    Unmap,
    unpack_regions,
)

__all__ = ["SW_MSI", "DirectQueue", "DriverDomain", "IommuDriver", "Post", "Reply", "RequestError", "Sync"]

SW_MSI = Region(0x8000000, 0x80FFFFF, RegionType.MSI)  # where Linux maps doorbells when no region is told
WANTED = sum(1 << bit for bit in IommuFeature if bit is not IommuFeature.BYPASS)
ERRNO = {Status.UNSUPP: "ENOSYS", Status.INVAL: "EINVAL", Status.RANGE: "ERANGE", Status.NOENT: "ENOENT", Status.FAULT: "EFAULT",
         Status.NOMEM: "ENOMEM"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Post:
    """Put a request on the queue; its writable bytes are zeroes."""

    readable: bytes
    room: int


@dataclass(frozen=True, slots=True)
class Sync:
    """Ring the doorbell and wait for all requests; send a list of `Reply` back, one per `Post` since the last, in their order."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Writable bytes of a request that came back, and the length in its used element."""

    after: bytes
    used_len: int


Steps = Generator[Post | Sync, Any, Any]


class RequestError(Exception):
    """A request failed; ``errno`` as Linux names it."""

    def __init__(self, errno: str, request: Request):
        super().__init__(f"{errno}: {request}")
        self.errno, self.request = errno, request


@dataclass(eq=False)
class DriverDomain:
    """A domain as the driver sees it: it may live longer than the device's.

    Attributes
    ----------
    number : :class:`int` or None
        None until an endpoint was attached.
    """

    is_identity: bool = False
    is_bypass: bool = False
    number: int | None = None
    mappings: IntervalMap = field(default_factory=IntervalMap)
    endpoints: set[int] = field(default_factory=set)


class IommuDriver:
    """A driver of one virtio-iommu.

    Parameters
    ----------
    config : :class:`bytes`
        Device configuration.
    features : :class:`int`
        What the device offers.
    in_flight : :class:`int`
        Requests that the queue holds; a `Sync` makes room when it is full.
    page : :class:`int`
        The machine's page size.

    Attributes
    ----------
    features : :class:`int`
        What was accepted.
    regions : dict of :class:`int` -> list of :class:`Region`
        Reserved addresses of each endpoint that was probed.
    problems : list of :class:`str`
        What a device should not have done.
    unseen : list of (request, :class:`Status`)
        Requests that failed and for whose result nobody waits, as Linux does not for MAP and UNMAP.

    Raises
    ------
    :exc:`ValueError`
        For a device that the driver does not take.
    """

    def __init__(self, config: bytes, features: int, *, in_flight: int = 64, page: int = 4096):
        self.features = features & WANTED
        told = IommuConfig.unpack(config)
        if not self._has(IommuFeature.MAP_UNMAP):
            raise ValueError(f"Features must contain MAP_UNMAP, not {features:#x}")
        self.granule = told.page_size_mask & -told.page_size_mask
        if not 0 < self.granule <= page:
            raise ValueError(f"Page size mask must have a page of at most {page} bytes, not {told.page_size_mask:#x}")
        self.input_range = told.input_range if self._has(IommuFeature.INPUT_RANGE) else Range(0, (1 << 64) - 1)
        self.domain_range = told.domain_range if self._has(IommuFeature.DOMAIN_RANGE) else Range(0, (1 << 32) - 1)
        self.probe_size = told.probe_size if self._has(IommuFeature.PROBE) else 0
        self.map_flags = int(MapFlag.READ | MapFlag.WRITE | (MapFlag.MMIO if self._has(IommuFeature.MMIO) else 0))
        self.in_flight = in_flight
        self.regions: dict[int, list[Region]] = {}
        self.problems: list[str] = []
        self.unseen: list[tuple[Request, Status]] = []
        self._numbers: set[int] = set()
        self._domains: dict[int, DriverDomain] = {}  # endpoint -> where it is
        self._posted: list[Request] = []

    def _has(self, bit: IommuFeature) -> bool:
        return bool(self.features >> bit & 1)

    # -- requests --

    def _room(self, request: Request) -> int:
        return TAIL_BYTES + (self.probe_size if isinstance(request, Probe) else 0)

    def _post(self, request: Request) -> Steps:
        """Add a request for which nobody waits."""
        if len(self._posted) == self.in_flight:
            yield from self.sync()
        yield Post(request.pack(), self._room(request))
        self._posted.append(request)

    def sync(self) -> Steps:
        """Wait for all requests under way."""
        done = yield from self._complete()
        self.unseen += [(request, status) for request, status, _ in done if status]

    def _complete(self) -> Steps:
        """Wait for all requests under way; return each with its status and its writable bytes."""
        replies = yield Sync()
        posted, self._posted = self._posted, []
        if len(replies) != len(posted):
            raise ValueError(f"Replies must be as many as requests, {len(posted)}, not {len(replies)!r}")
        return [(request, self._status(request, reply), reply.after) for request, reply in zip(posted, replies)]

    def _status(self, request: Request, reply: Reply) -> Status:
        """What a reply means: one that is not written is IOERR, one of another length is ignored. [VIRTIO1.4 5.13.6.1]"""
        if reply.used_len != self._room(request):
            if reply.used_len:
                self.problems.append(f"{request}: used length {reply.used_len}, must be {self._room(request)}")
            return Status.IOERR
        status = reply.after[-TAIL_BYTES]
        if status > max(Status):
            self.problems.append(f"{request}: status {status}")
            return Status.IOERR
        return Status(status)

    def _send(self, request: Request) -> Steps:
        """Send a request and return its writable bytes."""
        yield from self._post(request)
        *others, (_, status, after) = yield from self._complete()
        self.unseen += [(other, failed) for other, failed, _ in others if failed]
        if status:
            raise RequestError(ERRNO.get(status, "EIO"), request)
        return after

    # -- endpoints and domains --

    def probe(self, endpoint: int) -> Steps:
        """Learn the reserved regions of an endpoint, sorted by address."""
        found: list[Region] = []
        if self.probe_size:
            after = yield from self._send(Probe(endpoint))
            found, problems = unpack_regions(after[:-TAIL_BYTES])
            self.problems += problems
        self.regions[endpoint] = sorted(found, key=lambda one: one.start)

    def reserved(self, endpoint: int) -> list[Region]:
        """Return what must not be mapped, with the window for doorbells if the device told of none."""
        found = self.regions[endpoint]
        return found if any(one.subtype == RegionType.MSI for one in found) else [*found, SW_MSI]

    def attach(self, endpoint: int, domain: DriverDomain) -> Steps:
        """Attach an endpoint; the first one of a domain makes the domain and brings its mappings back."""
        if domain.number is None:
            self._number(endpoint, domain)
        if endpoint in self._domains:
            self._domains.pop(endpoint).endpoints.discard(endpoint)
        yield from self._send(Attach(domain.number, endpoint, AttachFlag.BYPASS if domain.is_bypass else 0))
        if not domain.endpoints:
            for one in domain.mappings:
                yield from self._send(Map(domain.number, one.start, one.end, one.phys, one.flags))
        domain.endpoints.add(endpoint)
        self._domains[endpoint] = domain

    def _number(self, endpoint: int, domain: DriverDomain) -> None:
        numbers = range(self.domain_range.start, self.domain_range.end + 1)
        domain.number = next((n for n in numbers if n not in self._numbers), None)
        if domain.number is None:
            raise ValueError(f"Domains must be at most {len(numbers)}")
        self._numbers.add(domain.number)
        if domain.is_identity:
            domain.is_bypass = self._has(IommuFeature.BYPASS_CONFIG)
            if not domain.is_bypass:
                self._map_identity(endpoint, domain)

    def _map_identity(self, endpoint: int, domain: DriverDomain) -> None:
        """Map all of the input range to itself, without the pages that a reserved region touches."""
        granule, flags = self.granule, MapFlag.READ | MapFlag.WRITE
        start = -(-self.input_range.start // granule) * granule
        end = (self.input_range.end + 1) // granule * granule - 1
        for region in self.regions[endpoint]:
            low, high = region.start // granule * granule, -(-(region.end + 1) // granule) * granule - 1
            if high < start or low > end:
                continue
            if low > start:
                domain.mappings = domain.mappings.insert(Interval(start, low - 1, start, flags))
            if high >= end:
                return
            start = high + 1
        domain.mappings = domain.mappings.insert(Interval(start, end, start, flags))

    def detach(self, endpoint: int) -> Steps:
        """Detach an endpoint from where it is."""
        domain = self._domains.pop(endpoint)
        yield from self._send(Detach(domain.number, endpoint))
        domain.endpoints.discard(endpoint)

    def free(self, domain: DriverDomain) -> None:
        """Give a domain without endpoints up."""
        if domain.endpoints:
            raise ValueError(f"Domain must have no endpoints, not {domain.endpoints!r}")
        self._numbers.discard(domain.number)
        domain.number, domain.mappings = None, IntervalMap()

    # -- mappings --

    def map(self, domain: DriverDomain, iova: int, phys: int, length: int, flags: int) -> Steps:
        """Map some pages; the device knows for sure after `sync`."""
        if flags & ~self.map_flags:
            raise ValueError(f"Flags must be of {self.map_flags!r}, not {flags!r}")
        one = Interval(iova, iova + length - 1, phys, flags)
        domain.mappings = domain.mappings.insert(one)
        if domain.endpoints:
            yield from self._post(Map(domain.number, one.start, one.end, phys, flags))

    def unmap(self, domain: DriverDomain, iova: int, length: int) -> Steps:
        """Unmap some pages; they can be used again after `sync`."""
        domain.mappings = domain.mappings.remove(iova, iova + length - 1)
        if domain.endpoints:
            yield from self._post(Unmap(domain.number, iova, iova + length - 1))

    # -- events --

    def event(self, raw: bytes, used_len: int) -> Fault | None:
        """Return the fault that an event buffer tells of; None: to be ignored. [VIRTIO1.4 5.13.6.9.1]"""
        if used_len > FAULT_BYTES:
            self.problems.append(f"event of {used_len} bytes")
            return None
        record = Fault.unpack(raw)
        return None if any(record.reserved) else record


class DirectQueue:
    """A queue whose device answers each request at once.

    Parameters
    ----------
    serve : callable
        Called with the readable bytes and the number of writable ones; returns a `Reply`.

    Attributes
    ----------
    replies : list of :class:`Reply`
        To requests that no `Sync` has waited for.
    """

    def __init__(self, serve: Callable[[bytes, int], Reply]):
        self.serve = serve
        self.replies: list[Reply] = []

    def run(self, steps: Steps) -> Any:
        """Do what a driver's method asks for; return what it returns."""
        return run(steps, self._perform)

    def _perform(self, step: Post | Sync) -> list[Reply]:
        if isinstance(step, Post):
            self.replies.append(self.serve(step.readable, step.room))
            return []
        found, self.replies = self.replies, []
        return found
