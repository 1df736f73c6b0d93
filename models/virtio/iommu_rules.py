"""virtio-iommu: what one request may end in, and where one access may go, for a device in a known state. [VIRTIO1.4 5.13]

Where several sentences forbid one request, each may give the status; one that says MUST comes before one that says SHOULD.
The first of several outcomes is what our card does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

from .intervals import IntervalMap
from .intervals import Mapping as Interval
from .iommu_formats import (
    REQUESTS,
    TAIL_BYTES,
    Attach,
    AttachFlag,
    Detach,
    Fault,
    FaultFlag,
    FaultReason,
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
    pack_regions,
    unpack_regions,
)

__all__ = ["ALL_32", "ALL_64", "KNOWN_FEATURES", "MSI_BYTES", "OFFERED", "X86_MSI", "Access", "Domain", "IommuDescription", "IommuRules",
           "IommuState", "Outcome", "Verdict"]  # fmt: skip

ALL_64, ALL_32 = Range(0, (1 << 64) - 1), Range(0, (1 << 32) - 1)
X86_MSI = Region(0xFEE00000, 0xFEEFFFFF, RegionType.MSI)  # where x86 machines take interrupts
MSI_BYTES = 4  # a message signaled interrupt is one write of a dword
ATTACH_FLAGS, MAP_FLAGS = int(AttachFlag.BYPASS), int(MapFlag.READ | MapFlag.WRITE | MapFlag.MMIO)
KNOWN_FEATURES = sum(1 << bit for bit in IommuFeature)
OFFERED = KNOWN_FEATURES & ~(1 << IommuFeature.BYPASS)  # V157, V158


@dataclass(frozen=True)
class IommuDescription:
    """A virtio-iommu.

    Parameters
    ----------
    endpoints : dict of :class:`int` -> tuple of :class:`Region`
        What it manages, with the reserved regions of each.
    features : :class:`int`
        Offered bits of the device type.
    page_size_mask : :class:`int`
        Page sizes; the smallest is the granularity.
    input_range, domain_range : :class:`Range`
        Addresses that can be mapped, numbers of domains; each counts when its feature is offered.
    probe_size : :class:`int`
        Bytes of properties in a PROBE.
    bypass : :class:`int`
        config.bypass after a system reset.
    capacity : :class:`int`
        Mappings that it holds for sure; NOMEM is allowed from then on.
    physical : tuple of :class:`Range`
        Physical addresses that there are; nothing else can be mapped.
    shares, reattaches : :class:`bool`
        A domain can have several endpoints; ATTACH can move an endpoint. Else such an ATTACH is UNSUPP.

    Raises
    ------
    :exc:`ValueError`
        A device that the standard does not allow.
    """

    endpoints: Mapping[int, tuple[Region, ...]]
    features: int = OFFERED
    page_size_mask: int = ALL_64.end & ~0xFFF
    input_range: Range = ALL_64
    domain_range: Range = ALL_32
    probe_size: int = 512
    bypass: int = 1
    capacity: int = 4096
    physical: tuple[Range, ...] = (ALL_64,)
    shares: bool = True
    reattaches: bool = True

    def __post_init__(self):
        if self.features & ~KNOWN_FEATURES:
            raise ValueError(f"Features must be those of a virtio-iommu, not {self.features:#x}")
        if self.offers(IommuFeature.BYPASS) and self.offers(IommuFeature.BYPASS_CONFIG):  # V158
            raise ValueError(f"Features must not contain both BYPASS and BYPASS_CONFIG, not {self.features:#x}")
        if not 0 < self.page_size_mask <= ALL_64.end:  # V159
            raise ValueError(f"Page size mask must have 1 to 64 bits, not {self.page_size_mask!r}")
        if self.bypass not in (0, 1):  # V160
            raise ValueError(f"Bypass must be 0 or 1, not {self.bypass!r}")
        for limits in (self.input_range, self.domain_range, *self.physical):
            if limits.end < limits.start:
                raise ValueError(f"Ranges must not be inverted, not {limits!r}")
        if self.capacity < 1:
            raise ValueError(f"Capacity must be at least 1, not {self.capacity!r}")
        for number, regions in self.endpoints.items():
            pairs = combinations(regions, 2)
            if any(one.end < one.start for one in regions) or any(one.overlaps(other.start, other.end) for one, other in pairs):  # V206
                raise ValueError(f"Regions of endpoint {number} must not be inverted or overlap, not {regions!r}")
            if sum(one.subtype == RegionType.MSI for one in regions) > 1:  # V205
                raise ValueError(f"Endpoint {number} must have at most one MSI region, not {regions!r}")
            if self.offers(IommuFeature.PROBE) and len(pack_regions(regions)) > self.probe_size:
                raise ValueError(f"Properties of endpoint {number} must fit in {self.probe_size} bytes, not {regions!r}")

    def offers(self, bit: IommuFeature) -> bool:
        """Tell whether the feature is offered."""
        return bool(self.features >> bit & 1)

    @property
    def granule(self) -> int:
        """Bytes of the smallest page."""
        return self.page_size_mask & -self.page_size_mask


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain that has an endpoint."""

    is_bypass: bool = False
    mappings: IntervalMap = field(default_factory=IntervalMap)


@dataclass(frozen=True, slots=True)
class IommuState:
    """All that a device remembers. It does not change: requests give another.

    Attributes
    ----------
    bypass : :class:`int`
        config.bypass.
    accepted : :class:`int`
        Features that the driver accepted.
    attached : dict of :class:`int` -> :class:`int`
        Endpoint -> domain.
    domains : dict of :class:`int` -> :class:`Domain`
    untranslated : set of :class:`int`
        Endpoints whose own driver did not accept ACCESS_PLATFORM: they use physical addresses. [VIRTIO1.4 6.2]
    """

    bypass: int
    accepted: int = 0
    attached: Mapping[int, int] = field(default_factory=dict)
    domains: Mapping[int, Domain] = field(default_factory=dict)
    untranslated: frozenset[int] = frozenset()

    @property
    def mapping_count(self) -> int:
        """Mappings of all domains."""
        return sum(len(domain.mappings) for domain in self.domains.values())

    def domain_of(self, endpoint: int) -> Domain | None:
        """Return the domain that the endpoint is attached to."""
        return self.domains[self.attached[endpoint]] if endpoint in self.attached else None

    def attach(self, endpoint: int, number: int, is_bypass: bool) -> IommuState:
        """Return the state with an endpoint in a domain, which is made if there is none; it leaves the one where it was. (V174)"""
        before = self if self.attached.get(endpoint, number) == number else self.detach(endpoint)
        return replace(before, attached={**before.attached, endpoint: number},
                       domains={number: Domain(is_bypass), **before.domains})  # fmt: skip

    def detach(self, endpoint: int) -> IommuState:
        """Return the state with an endpoint in no domain; the last one of a domain takes it along. (V181)"""
        attached = {one: domain for one, domain in self.attached.items() if one != endpoint}
        kept = set(attached.values())
        return replace(self, attached=attached, domains={n: domain for n, domain in self.domains.items() if n in kept})

    def with_mappings(self, number: int, mappings: IntervalMap) -> IommuState:
        """Return the state with other mappings in a domain."""
        return replace(self, domains={**self.domains, number: Domain(False, mappings)})


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way in which a request may end.

    Attributes
    ----------
    status : :class:`Status` or None
        What the tail holds; None: nothing is written, and the used length is 0.
    state : :class:`IommuState`
        What the device remembers then.
    regions : tuple of :class:`Region`
        Told in the properties of a PROBE.
    """

    status: Status | None
    state: IommuState
    regions: tuple[Region, ...] = ()

    def written(self, room: int) -> bytes:
        """Return what a device writes into ``room`` bytes: properties, zeroes, and the tail at the end."""
        if self.status is None:
            return b""
        return pack_regions(self.regions).ljust(room - TAIL_BYTES, b"\0") + bytes([self.status, 0, 0, 0])

    def problem(self, before: bytes, after: bytes, used_len: int) -> str:
        """Return in which way writable bytes that held ``before`` and now hold ``after`` are not this outcome; empty: they are."""
        if self.status is None:
            if after != before:
                return "is written, must not be"
            return f"used length {used_len}, must be 0" if used_len else ""
        properties, status, reserved = after[:-TAIL_BYTES], after[-TAIL_BYTES], after[1 - TAIL_BYTES :]
        if status != self.status:
            return f"status {status}"
        if any(reserved):
            return f"reserved bytes of the tail are {reserved.hex()}"  # V166
        if used_len != len(after):
            return f"used length {used_len} of {len(after)} bytes"
        regions, found = unpack_regions(properties)
        if not found and sorted(regions, key=_by_start) != sorted(self.regions, key=_by_start):
            found = [f"regions {regions}"]
        return ", ".join(found)


def _by_start(region: Region) -> int:
    return region.start


@dataclass(frozen=True, slots=True)
class Access:
    """An access of ``length`` bytes; a memory write of four aligned ones is what an interrupt looks like.

    It does not leave a page of the granularity.
    """

    endpoint: int
    address: int
    is_write: bool
    length: int = 1

    def fault(self, reason: FaultReason) -> Fault:
        """Return the record of a fault. (V209, V212)"""
        return Fault(reason, (FaultFlag.WRITE if self.is_write else FaultFlag.READ) | FaultFlag.ADDRESS, self.endpoint, self.address)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of an access: a physical address, or the reason why it is refused.

    ``is_mmio``: it must be neither speculated, buffered, cached, split nor combined. [VIRTIO1.4 5.13.6.5] In a verdict that was seen, a
    ``reason`` or ``is_mmio`` of None was not.
    """

    phys: int | None = None
    reason: FaultReason | None = None
    is_mmio: bool | None = False

    def fits(self, seen: Verdict) -> bool:
        """Tell whether what was seen is this verdict."""
        return (seen.phys == self.phys and seen.reason in (None, self.reason)
                and (seen.phys is None or seen.is_mmio in (None, self.is_mmio)))  # fmt: skip


class IommuRules:
    """What the standard allows a described device to do.

    Parameters
    ----------
    description : :class:`IommuDescription`
    """

    def __init__(self, description: IommuDescription):
        self.description = description
        self._serve: dict[type, Callable[[IommuState, Request, int], list[Outcome]]] = {
            Attach: self._attach, Detach: self._detach, Map: self._map, Unmap: self._unmap, Probe: self._probe}  # fmt: skip

    # -- accesses --

    def verdicts(self, state: IommuState, access: Access) -> frozenset[Verdict]:
        """Return what may become of an access. [VIRTIO1.4 5.13.6]

        Open, and so both allowed: whether what an endpoint without translation does in a reserved region is let through, and
        whether an interrupt of a blocked endpoint is.
        """
        number, address = access.endpoint, access.address
        same, blocked, unmapped = Verdict(address), Verdict(reason=FaultReason.DOMAIN), Verdict(reason=FaultReason.MAPPING)
        if number in state.untranslated:
            return frozenset([same])
        region = next((one for one in self.description.endpoints[number] if address in one), None)
        is_message = access.is_write and access.length == MSI_BYTES and address % MSI_BYTES == 0
        special = same if region is not None and region.subtype == RegionType.MSI and is_message else unmapped
        domain = state.domain_of(number)
        if self.is_bypassed(state, number):
            return frozenset([same] if region is None else [same, special])
        if domain is None:  # V167
            return frozenset([blocked] if region is None else [blocked, special])
        if region is not None:  # V208
            return frozenset([special])
        found = domain.mappings.at(address)
        if found is None or not found.flags & (MapFlag.WRITE if access.is_write else MapFlag.READ):  # V187, V188
            return frozenset([unmapped])
        return frozenset([Verdict(found.leads_to(address), is_mmio=bool(found.flags & MapFlag.MMIO))])

    def is_bypassed(self, state: IommuState, endpoint: int) -> bool:
        """Tell whether the endpoint is in bypass mode. [VIRTIO1.4 5.13.6]"""
        domain = state.domain_of(endpoint)
        if domain is not None:
            return domain.is_bypass
        if self.description.offers(IommuFeature.BYPASS_CONFIG):  # also when the driver did not accept it
            return bool(state.bypass)
        return bool(state.accepted >> IommuFeature.BYPASS & 1)

    # -- requests --

    def outcomes(self, state: IommuState, readable: bytes, room: int) -> list[Outcome]:
        """Return how a request of ``readable`` bytes with ``room`` writable ones may end, what our card does first.

        Too short, or no room for a tail: unwritten [VIRTIO1.4 5.13.6]; INVAL is as good while there is a tail. Too long: served,
        INVAL or unwritten.
        """
        unwritten, invalid = Outcome(None, state), Outcome(Status.INVAL, state)
        kind = REQUESTS.get(readable[0]) if readable else None
        if room < TAIL_BYTES or (readable and kind is None):  # V164
            return [unwritten]
        if kind is Probe and not self.description.offers(IommuFeature.PROBE):  # V199
            return [unwritten]
        if kind is None or len(readable) < kind.LAYOUT.size:  # V168
            return [unwritten, invalid]
        found = self._serve[kind](state, kind.unpack(readable), room)
        fitting = TAIL_BYTES + (self.description.probe_size if kind is Probe else 0)
        return found + [unwritten, invalid] if len(readable) > kind.LAYOUT.size or room > fitting else found

    def _unchanged(self, state: IommuState, statuses: Iterable[Status]) -> list[Outcome]:
        """The outcomes of a request that has done nothing, each status once."""
        return [Outcome(status, state) for status in dict.fromkeys(statuses)]

    def _optional(self, state: IommuState, bit: IommuFeature) -> bool | None:
        """Tell whether what a feature brings is there; None: offered but not accepted, so that no driver may use it."""
        return (None if not state.accepted >> bit & 1 else True) if self.description.offers(bit) else False

    def _domain_faults(self, state: IommuState, number: int) -> list[Status]:
        """What is wrong with the domain of a MAP or UNMAP. (V185, V186, V192, V193)"""
        found = []
        if number not in state.domains:
            found.append(Status.NOENT)
        elif state.domains[number].is_bypass:
            found.append(Status.INVAL)
        return found + self._number_faults(number)

    def _number_faults(self, number: int) -> list[Status]:
        is_good = number in self.description.domain_range or not self.description.offers(IommuFeature.DOMAIN_RANGE)
        return [] if is_good else [Status.RANGE, Status.INVAL]

    def _is_input(self, start: int, end: int) -> bool:
        limits = self.description.input_range
        return not self.description.offers(IommuFeature.INPUT_RANGE) or (limits.start <= start and end <= limits.end)

    def _attach(self, state: IommuState, request: Attach, room: int) -> list[Outcome]:
        """[VIRTIO1.4 5.13.6.3.2]"""
        endpoint, number, is_bypass = request.endpoint, request.domain, bool(request.flags & AttachFlag.BYPASS)
        can_bypass = self._optional(state, IommuFeature.BYPASS_CONFIG)
        musts = []
        if any(request.reserved) or request.flags & ~ATTACH_FLAGS or (is_bypass and can_bypass is False):  # V169, V170
            musts.append(Status.INVAL)
        if endpoint not in self.description.endpoints:  # V171
            musts.append(Status.NOENT)
        if musts:
            return self._unchanged(state, musts)
        current = state.attached.get(endpoint)
        moves = current not in (None, number)
        others = [] if current == number else [one for one, domain in state.attached.items() if domain == number]
        if (others and not self.description.shares) or (moves and not self.description.reattaches):  # V172, V174
            return self._unchanged(state, [Status.UNSUPP])
        if found := self._number_faults(number):
            return self._unchanged(state, found)
        domain = state.domains.get(number)
        shoulds, mays = [], []
        if domain is not None and domain.is_bypass != is_bypass:  # V173
            shoulds.append(Status.INVAL)
        if domain is not None and not domain.is_bypass:
            regions = self.description.endpoints[endpoint]
            if any(domain.mappings.touched(one.start, one.end) for one in regions):  # V175
                shoulds.append(Status.UNSUPP)
            elif any(set(self.description.endpoints[one]) != set(regions) for one in others):
                mays.append(Status.UNSUPP)
        if is_bypass and can_bypass is None:
            mays.append(Status.INVAL)
        if shoulds:
            refused = self._unchanged(state, shoulds)
            # V174: "as if DETACH, then ATTACH" may have done the first half.
            return refused + self._unchanged(state.detach(endpoint), shoulds) if moves else refused
        return [Outcome(Status.OK, state.attach(endpoint, number, is_bypass)), *self._unchanged(state, mays)]

    def _detach(self, state: IommuState, request: Detach, room: int) -> list[Outcome]:
        """[VIRTIO1.4 5.13.6.4.2]"""
        if request.endpoint not in self.description.endpoints:  # V178
            return self._unchanged(state, [Status.NOENT])
        if state.attached.get(request.endpoint) != request.domain:  # V179
            return self._unchanged(state, [Status.INVAL, Status.OK, Status.NOENT, *self._number_faults(request.domain)])
        return [Outcome(Status.OK, state.detach(request.endpoint))]  # V180

    def _map(self, state: IommuState, request: Map, room: int) -> list[Outcome]:
        """[VIRTIO1.4 5.13.6.5.2]"""
        number, start, end, flags = request.domain, request.virt_start, request.virt_end, request.flags
        if not self._optional(state, IommuFeature.MAP_UNMAP):
            return [Outcome(None, state), Outcome(Status.UNSUPP, state)]
        has_mmio = self._optional(state, IommuFeature.MMIO)
        if flags & ~MAP_FLAGS or (flags & MapFlag.MMIO and has_mmio is False):  # V184, V191
            return self._unchanged(state, [Status.INVAL])
        shoulds = self._domain_faults(state, number)
        if any(one % self.description.granule for one in (start, end + 1, request.phys_start)):  # V182
            shoulds.append(Status.RANGE)
        if end < start:  # V189
            shoulds += [Status.INVAL, Status.RANGE]
        if not self._is_input(start, end):  # V190
            shoulds += [Status.RANGE, Status.INVAL]
        phys_end = request.phys_start + end - start
        if end >= start and not any(one.start <= request.phys_start and phys_end <= one.end for one in self.description.physical):
            shoulds += [Status.RANGE, Status.INVAL, Status.FAULT]
        domain = state.domains.get(number, Domain())
        if domain.mappings.touched(start, end):  # V183
            shoulds.append(Status.INVAL)
        regions = (one for endpoint, owner in state.attached.items() if owner == number for one in self.description.endpoints[endpoint])
        if any(one.overlaps(start, end) for one in regions):  # V207
            shoulds += [Status.INVAL, Status.RANGE]
        full = [Status.NOMEM] if state.mapping_count >= self.description.capacity else []
        if shoulds:
            return self._unchanged(state, shoulds + full)
        mays = list(full)
        if not flags & (MapFlag.READ | MapFlag.WRITE) or (flags & MapFlag.MMIO and has_mmio is None):
            mays.append(Status.INVAL)
        if start == end:  # one byte: no driver may, though the granularity allows it
            mays += [Status.INVAL, Status.RANGE]
        mapped = state.with_mappings(number, domain.mappings.insert(Interval(start, end, request.phys_start, flags)))
        return [Outcome(Status.OK, mapped), *self._unchanged(state, mays)]

    def _unmap(self, state: IommuState, request: Unmap, room: int) -> list[Outcome]:
        """[VIRTIO1.4 5.13.6.6.2]"""
        number, start, end = request.domain, request.virt_start, request.virt_end
        if not self._optional(state, IommuFeature.MAP_UNMAP):
            return [Outcome(None, state), Outcome(Status.UNSUPP, state)]
        reserved = [Status.INVAL] if any(request.reserved) else []  # V196
        if found := self._domain_faults(state, number):
            return self._unchanged(state, found + reserved)
        if end < start:
            return self._unchanged(state, [Status.INVAL, Status.RANGE, Status.OK])
        mappings = state.domains[number].mappings
        if mappings.splits(start, end):  # V194
            return self._unchanged(state, [Status.RANGE, *reserved])
        after = state.with_mappings(number, mappings.remove(start, end))  # V195
        refusals = reserved if self._is_input(start, end) else [*reserved, Status.RANGE, Status.INVAL]
        return [Outcome(Status.OK, after), *self._unchanged(state, refusals), *self._unchanged(after, reserved)]

    def _probe(self, state: IommuState, request: Probe, room: int) -> list[Outcome]:
        """[VIRTIO1.4 5.13.6.7.2]"""
        description = self.description
        shoulds = [] if request.endpoint in description.endpoints else [Status.NOENT]  # V198
        if room < description.probe_size + TAIL_BYTES:  # V203
            shoulds.append(Status.INVAL)
        accepted = self._optional(state, IommuFeature.PROBE)
        mays = [] if accepted else [Outcome(None, state), Outcome(Status.UNSUPP, state)]
        return (self._unchanged(state, shoulds) or [Outcome(Status.OK, state, tuple(description.endpoints[request.endpoint]))]) + mays
