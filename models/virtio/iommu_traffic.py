"""Random requests to a virtio-iommu and random accesses of its endpoints: mostly what drivers do, and every malformed one by name.

`IommuTraffic.request` and `IommuTraffic.access` look at the state of an :class:`.iommu.IommuDevice` when they are called, so that
most of what they make meets something: a mapping, an edge of one, a full table. The device answers; nothing here judges.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .intervals import Mapping as Interval
from .iommu import IommuDevice
from .iommu_formats import TAIL_BYTES, Attach, AttachFlag, Detach, IommuFeature, Map, MapFlag, Probe, Region, Request, Unmap
from .iommu_rules import ALL_32, MSI_BYTES, Access

__all__ = ["ACCESSES", "MALFORMED", "VALID", "IommuTraffic", "NamedRequest"]

U64 = (1 << 64) - 1
FLAGS = (MapFlag.READ, MapFlag.WRITE, MapFlag.READ | MapFlag.WRITE)


@dataclass(frozen=True, slots=True)
class NamedRequest:
    """A request: what it is for, its device-readable bytes, its number of device-writable ones."""

    name: str
    readable: bytes
    room: int


class IommuTraffic:
    """Makes requests and accesses.

    Parameters
    ----------
    device : :class:`.iommu.IommuDevice`
        Looked at, never changed.
    rng : :class:`random.Random`
    malformed : :class:`float`
        Part of the requests that are one of `MALFORMED`.
    pages : :class:`int`
        Addresses of mappings lie in about so many pages: few make collisions likely.
    base : :class:`int`
        Where these pages begin, in pages.
    domains : :class:`int`
        Numbers of domains that are used, from the first of the range on.
    weights : dict of :class:`str` -> :class:`int`
        Changes of `VALID`, `MALFORMED` and `ACCESSES`.

    Raises
    ------
    :exc:`ValueError`
        For a part outside 0 to 1, and for a name of a weight that nothing has.
    """

    def __init__(self, device: IommuDevice, rng: random.Random, *, malformed: float = 0.25, pages: int = 512, base: int = 0x100,
                 domains: int = 4, weights: Mapping[str, int] | None = None):  # fmt: skip
        if not 0 <= malformed <= 1:
            raise ValueError(f"Part of malformed requests must be between 0 and 1, not {malformed!r}")
        weights = weights or {}
        if unknown := weights.keys() - {*VALID, *MALFORMED, *ACCESSES}:
            raise ValueError(f"Weights must be of requests and accesses that there are, not {sorted(unknown)!r}")
        self.device, self.rng, self.malformed = device, rng, malformed
        self.valid_kinds, self.malformed_kinds, self.access_kinds = (
            {name: weights.get(name, weight) for name, weight in kinds.items()} for kinds in (VALID, MALFORMED, ACCESSES))  # fmt: skip
        self.description = told = device.description
        self.granule, self.page_count = told.granule, pages
        self.base = max(base * self.granule, -(-told.input_range.start // self.granule) * self.granule)
        first = told.domain_range.start
        self.domains = [first + n for n in range(min(domains, told.domain_range.end - first + 1))]
        self.endpoints = list(told.endpoints)

    def request(self, name: str | None = None) -> NamedRequest:
        """Return a request: ``name`` of `VALID` or `MALFORMED`, or any."""
        name = name or self._name(self.malformed_kinds if self.rng.random() < self.malformed else self.valid_kinds)
        made = getattr(self, f"_{name}")()
        if isinstance(made, tuple):
            return NamedRequest(name, *made)
        return NamedRequest(name, made.pack(), self._room(made))

    def access(self, name: str | None = None) -> Access:
        """Return an access: ``name`` of `ACCESSES`, or any."""
        return getattr(self, f"_access_{name or self._name(self.access_kinds)}")()

    # -- choices --

    def _name(self, kinds: Mapping[str, int]) -> str:
        return self.rng.choices(list(kinds), list(kinds.values()))[0]

    def _room(self, request: Request) -> int:
        return TAIL_BYTES + (self.description.probe_size if isinstance(request, Probe) else 0)

    def _pick(self, choices, otherwise):
        choices = list(choices)
        return self.rng.choice(choices) if choices else otherwise

    def _endpoint(self) -> int:
        return self.rng.choice(self.endpoints)

    def _stranger(self) -> int:
        return self._pick((n for n in (0, max(self.endpoints) + 1, 0xFFFFFFFF, self.endpoints[0] | 0x100, self.endpoints[0] | 1 << 16)
                           if n not in self.description.endpoints), 0x1234)  # fmt: skip

    def _live(self, is_bypass: bool = False) -> int:
        """The number of a domain that is there, of the kind; else any."""
        return self._pick((n for n, domain in self.device.state.domains.items() if domain.is_bypass is is_bypass), self.domains[0])

    def _missing(self) -> int:
        return self._pick((n for n in self.domains if n not in self.device.state.domains), self.description.domain_range.end)

    def _mapped(self) -> tuple[int, Interval]:
        """A mapping and its domain; else one that might be."""
        number = self._pick((n for n, domain in self.device.state.domains.items() if domain.mappings), None)
        if number is None:
            return self._live(), Interval(*self._free(), 0, MapFlag.READ)
        return number, self._pick(self.device.state.domains[number].mappings, None)

    def _free(self, pages: int | None = None) -> tuple[int, int]:
        """First and last address of some pages; likely, but not for sure, without a mapping."""
        count = pages or self.rng.choice((1, 1, 1, 2, 3, 8, 17))
        start = self.base + self.rng.randrange(self.page_count) * self.granule
        return start, start + count * self.granule - 1

    def _free_of(self, number: int) -> tuple[int, int]:
        """The same, tried a few times so that nothing of the domain is in the way."""
        domain = self.device.state.domains.get(number)
        span = self._free()
        for _ in range(8):
            if domain is None or not domain.mappings.touched(*span):
                break
            span = self._free()
        return span

    def _phys(self) -> int:
        where = self.rng.choice(self.description.physical)
        most = min(where.end - where.start, (1 << 40) - 1) // self.granule
        return where.start + self.rng.randrange(max(1, most - 64)) * self.granule

    def _flags(self) -> int:
        has_mmio = self.device.state.accepted >> IommuFeature.MMIO & 1
        return self.rng.choice(FLAGS) | (MapFlag.MMIO if has_mmio and self.rng.randrange(4) == 0 else 0)

    def _noise(self, length: int) -> bytes:
        """Bytes that are not all 0."""
        return bytes(self.rng.choice(((1,) + (0,) * (length - 1), (0,) * (length - 1) + (0x80,),
                                      tuple(self.rng.randrange(1, 256) for _ in range(length)))))  # fmt: skip

    # -- what drivers do --

    def _usable(self, is_bypass: bool) -> int:
        """A domain of the kind, or one that is not there."""
        domains = self.device.state.domains
        return self._pick((n for n in self.domains if n not in domains or domains[n].is_bypass is is_bypass), self.domains[0])

    def _attach(self) -> Attach:
        """One that is nowhere, if there is one, to a new or shared domain; else one to where it is."""
        attached = self.device.state.attached
        endpoint = self._pick((one for one in self.endpoints if one not in attached), self._endpoint())
        return Attach(attached.get(endpoint, self._usable(False)), endpoint, self._kind(attached.get(endpoint)))

    def _kind(self, number: int | None) -> int:
        """ATTACH flags that fit a domain."""
        return AttachFlag.BYPASS if number is not None and self.device.state.domains[number].is_bypass else 0

    def _attach_bypass(self) -> Attach:
        return Attach(self._usable(True), self._endpoint(), AttachFlag.BYPASS)

    def _attach_again(self) -> Attach:
        """One to another domain, likely."""
        return Attach(self._usable(False), self._endpoint())

    def _detach(self) -> Detach:
        endpoint, number = self._pick(self.device.state.attached.items(), (self._endpoint(), self.domains[0]))
        return Detach(number, endpoint)

    def _map(self) -> Map:
        number = self._live()
        return Map(number, *self._free_of(number), self._phys(), self._flags())

    def _map_beside(self) -> Map:
        """Directly in front of or behind a mapping, leading to the same place or elsewhere."""
        number, one = self._mapped()
        size = self.granule * self.rng.randrange(1, 4)
        if self.rng.randrange(2) and one.start >= size:
            return Map(number, one.start - size, one.start - 1, self._phys(), self._flags())
        start = min(one.end + 1, U64 - size + 1)
        phys = self.rng.choice((one.phys + one.end + 1 - one.start & U64, self._phys()))
        return Map(number, start, start + size - 1, phys, self._flags())

    def _unmap(self) -> Unmap:
        """One mapping, exactly."""
        number, one = self._mapped()
        return Unmap(number, one.start, one.end)

    def _unmap_many(self) -> Unmap:
        """From the start of one to the end of one behind it."""
        number, one = self._mapped()
        domain = self.device.state.domains.get(number)
        last = self._pick((other for other in domain.mappings if other.start >= one.start) if domain else (), one)
        return Unmap(number, one.start, last.end)

    def _unmap_spill(self) -> Unmap:
        """More than what is mapped, on both sides if nothing is in the way."""
        number, one = self._mapped()
        return Unmap(number, max(0, one.start - self.granule), min(U64, one.end + self.granule))

    def _unmap_all(self) -> Unmap:
        return Unmap(self._live(), self.description.input_range.start, self.description.input_range.end)

    def _unmap_nothing(self) -> Unmap:
        number = self._live()
        return Unmap(number, *self._free_of(number))

    def _probe(self) -> Probe:
        return Probe(self._endpoint())

    # -- what they do not: the form --

    def _unknown_type(self) -> tuple[bytes, int]:
        number = self.rng.choice((0, 6, 7, 0x7F, 0x81, 0xFF))
        return bytes([number]) + self._map().pack()[1:], self.rng.choice((4, 4, 0, 64))

    def _any_valid(self) -> Request:
        return getattr(self, f"_{self._name(self.valid_kinds)}")()

    def _short(self) -> tuple[bytes, int]:
        """Too few readable bytes."""
        made = self._any_valid()
        return made.pack()[: self.rng.choice((0, 1, 3, 4, 8, made.LAYOUT.size - 1, self.rng.randrange(made.LAYOUT.size)))], self._room(made)

    def _no_tail(self) -> tuple[bytes, int]:
        """Too few writable bytes for a tail."""
        return self._any_valid().pack(), self.rng.randrange(TAIL_BYTES)

    def _long(self) -> tuple[bytes, int]:
        """Readable bytes behind the request."""
        made = self._any_valid()
        return made.pack() + self._noise(self.rng.choice((1, 4, 60))), self._room(made)

    def _much_room(self) -> tuple[bytes, int]:
        """Writable bytes in front of the tail that nobody needs."""
        made = self._any_valid()
        return made.pack(), self._room(made) + self.rng.choice((1, 4, 60))

    def _head_reserved(self) -> Request:
        """Reserved bytes of the head: they say nothing."""
        return replace(self._any_valid(), head=self._noise(3))

    # -- ATTACH and DETACH --

    def _attach_reserved(self) -> Attach:
        return replace(self._attach(), reserved=self._noise(4))

    def _attach_flags(self) -> Attach:
        return replace(self._attach(), flags=self.rng.choice((2, 4, 1 << 31, 3, 0xFFFFFFFE)))

    def _attach_stranger(self) -> Attach:
        return Attach(self.rng.choice(self.domains), self._stranger(), self.rng.choice((0, 0, AttachFlag.BYPASS)))

    def _attach_other_kind(self) -> Attach:
        """The BYPASS flag does not fit the domain."""
        number = self._pick(self.device.state.domains, self.domains[0])
        domain = self.device.state.domains.get(number)
        return Attach(number, self._endpoint(), 0 if domain is not None and domain.is_bypass else AttachFlag.BYPASS)

    def _attach_beyond(self) -> Attach:
        """A domain outside the range, if there is one."""
        return Attach(self._beyond(), self._endpoint())

    def _beyond(self) -> int:
        limits = self.description.domain_range
        return self._pick((n for n in (limits.start - 1, limits.end + 1, 0, ALL_32.end) if n in ALL_32 and n not in limits), limits.end)

    def _detach_stranger(self) -> Detach:
        return Detach(self._live(), self._stranger())

    def _detach_elsewhere(self) -> Detach:
        """Not where it is attached, or not attached."""
        return Detach(self.rng.choice((self._missing(), self._live(), self._live(True), self._beyond())), self._endpoint())

    def _detach_reserved(self) -> Detach:
        """Reserved bytes of a DETACH: they say nothing."""
        return replace(self._detach(), reserved=self._noise(8))

    # -- MAP --

    def _odd(self) -> int:
        return self.rng.choice((1, self.granule // 2, self.granule - 1)) if self.granule > 1 else 0

    def _map_start_unaligned(self) -> Map:
        made = self._map()
        return replace(made, virt_start=made.virt_start + self._odd())

    def _map_end_unaligned(self) -> Map:
        made = self._map()
        return replace(made, virt_end=made.virt_end - self._odd())

    def _map_phys_unaligned(self) -> Map:
        made = self._map()
        return replace(made, phys_start=made.phys_start + self._odd())

    def _map_overlap(self) -> Map:
        """Over a mapping: the same, a part, around it, its first page, its last."""
        number, one = self._mapped()
        page = self.granule
        start = self.rng.choice((one.start, max(0, one.start - page), one.end + 1 - page))
        end = self.rng.choice((one.end, min(U64, one.end + page), max(start, one.start) + page - 1))
        return Map(number, start, end, self._phys(), self._flags())

    def _map_flags(self) -> Map:
        unknown = self.rng.choice((8, 0x10, 1 << 31, 0xFFFFFFF8))
        return replace(self._map(), flags=unknown | self._flags())

    def _map_no_flags(self) -> Map:
        """Neither READ nor WRITE: allowed, and good for nothing."""
        return replace(self._map(), flags=0)

    def _map_missing(self) -> Map:
        return replace(self._map(), domain=self._missing())

    def _map_bypass(self) -> Map:
        return replace(self._map(), domain=self._live(True))

    def _map_inverted(self) -> Map:
        made = self._map()
        return replace(made, virt_start=made.virt_end + 1 & U64, virt_end=made.virt_start - 1 & U64)

    def _map_outside(self) -> Map:
        """Partly or wholly outside the input range, if it has an outside."""
        limits, page, made = self.description.input_range, self.granule, self._map()
        edges = [(limits.end + 1 - page, limits.end + page), (limits.end + 1, limits.end + page)] if limits.end + page <= U64 else []
        edges += [(limits.start - page, limits.start + page - 1), (limits.start - page, limits.start - 1)] if limits.start >= page else []
        start, end = self._pick(edges, (made.virt_start, made.virt_end))
        return replace(made, virt_start=start, virt_end=end)

    def _map_region(self) -> Map:
        """Over a reserved region, in part or whole."""
        region, page = self._region(), self.granule
        start, end = region.start // page * page, region.end // page * page + page - 1
        start, end = self.rng.choice(((start, end), (max(0, start - page), start + page - 1), (end + 1 - page, min(U64, end + page))))
        return replace(self._map(), virt_start=start, virt_end=end)

    def _region(self) -> Region:
        return self._pick((one for regions in self.description.endpoints.values() for one in regions), Region(*self._free()))

    def _map_phys_outside(self) -> Map:
        """Physical addresses that are not there, or that leave 64 bits."""
        made, where = self._map(), self.rng.choice(self.description.physical)
        return replace(made, phys_start=where.end + 1 - self.granule, virt_end=made.virt_start + 2 * self.granule - 1)

    # -- UNMAP --

    def _unmap_split(self) -> Unmap:
        """Part of a mapping; of one page no more than bytes of it."""
        number, one = self._mapped()
        cut = self.granule * self.rng.randrange(1, max(2, (one.end + 1 - one.start) // self.granule))
        cut = cut if cut < one.end + 1 - one.start else max(1, cut // 2)
        spans = (one.start, one.end - cut), (one.start + cut, one.end), (0, one.end - cut), (one.start + cut, U64)
        return Unmap(number, *self.rng.choice(spans))

    def _unmap_unaligned(self) -> Unmap:
        """A mapping with some bytes around it: it is removed whole."""
        number, one = self._mapped()
        return Unmap(number, max(0, one.start - self._odd()), min(U64, one.end + self._odd()))

    def _unmap_missing(self) -> Unmap:
        return replace(self._unmap(), domain=self._missing())

    def _unmap_bypass(self) -> Unmap:
        return replace(self._unmap(), domain=self._live(True))

    def _unmap_inverted(self) -> Unmap:
        number, one = self._mapped()
        return Unmap(number, one.end, one.start)

    def _unmap_reserved(self) -> Unmap:
        return replace(self._unmap(), reserved=self._noise(4))

    # -- PROBE --

    def _probe_stranger(self) -> Probe:
        return Probe(self._stranger())

    def _probe_small(self) -> tuple[bytes, int]:
        """Too little room for the properties."""
        size = self.description.probe_size
        return self._probe().pack(), TAIL_BYTES + self.rng.choice((0, 1, size // 2, max(0, size - 1)))

    def _probe_reserved(self) -> Probe:
        """Reserved bytes of a PROBE: they say nothing."""
        return replace(self._probe(), reserved=self._noise(64))

    # -- accesses --

    def _access_mapped(self) -> Access:
        """In a mapping, at its edges more often, by an endpoint of its domain."""
        number, one = self._mapped()
        owners = [endpoint for endpoint, owner in self.device.state.attached.items() if owner == number]
        inside = self.rng.randrange(one.start, one.end + 1)
        address = self.rng.choice((one.start, one.end, inside, inside))
        return self._whole(self._pick(owners, self._endpoint()), address)

    def _access_edge(self) -> Access:
        """Directly in front of or behind a mapping, by any endpoint."""
        _, one = self._mapped()
        return self._whole(self._endpoint(), self.rng.choice((max(0, one.start - 1), min(U64, one.end + 1))))

    def _access_foreign(self) -> Access:
        """In a mapping, by any endpoint. (R27)"""
        return replace(self._access_mapped(), endpoint=self._endpoint())

    def _access_anywhere(self) -> Access:
        return self._whole(self._endpoint(), self.rng.choice((self._free()[0], self.rng.getrandbits(32), self.rng.getrandbits(64))))

    def _access_message(self) -> Access:
        """An interrupt, or what is almost one, in a reserved region."""
        region = self._region()
        length = self.rng.choice((MSI_BYTES, MSI_BYTES, MSI_BYTES, 1, 8))
        address = self.rng.randrange(region.start, region.end + 1) // 8 * 8 + self.rng.choice((0, 0, 4, 1) if length == MSI_BYTES else (0,))
        return Access(self._endpoint(), address, self.rng.randrange(4) > 0, length)

    def _whole(self, endpoint: int, address: int) -> Access:
        """An access in one page of the granularity."""
        room = self.granule - address % self.granule
        return Access(endpoint, address, bool(self.rng.randrange(2)), min(room, self.rng.choice((1, 4, 16, 64, 256))))


# Name of what drivers do -> how often.
VALID: Mapping[str, int] = {
    "attach": 40, "attach_bypass": 2, "attach_again": 3, "detach": 4, "map": 500, "map_beside": 100,
    "unmap": 240, "unmap_many": 2, "unmap_spill": 40, "unmap_all": 1, "unmap_nothing": 20, "probe": 20,
}  # fmt: skip
# Name of what is malformed, or done by no driver -> how often.
MALFORMED: Mapping[str, int] = {
    "unknown_type": 2, "short": 2, "no_tail": 2, "long": 1, "much_room": 1, "head_reserved": 2,
    "attach_reserved": 2, "attach_flags": 2, "attach_stranger": 2, "attach_other_kind": 2, "attach_beyond": 2,
    "detach_stranger": 2, "detach_elsewhere": 2, "detach_reserved": 1,
    "map_start_unaligned": 2, "map_end_unaligned": 2, "map_phys_unaligned": 2, "map_overlap": 4, "map_flags": 2, "map_no_flags": 1,
    "map_missing": 2, "map_bypass": 2, "map_inverted": 2, "map_outside": 2, "map_region": 2, "map_phys_outside": 2,
    "unmap_split": 4, "unmap_unaligned": 2, "unmap_missing": 2, "unmap_bypass": 2, "unmap_inverted": 2, "unmap_reserved": 1,
    "probe_stranger": 2, "probe_small": 2, "probe_reserved": 1,
}  # fmt: skip
# Name of an access -> how often.
ACCESSES: Mapping[str, int] = {"mapped": 10, "edge": 3, "foreign": 2, "anywhere": 2, "message": 2}
