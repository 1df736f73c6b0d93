"""virtio-iommu: the golden device. What it may answer, where accesses may go meanwhile, and what it must report. [VIRTIO1.4 5.13]

Files beside: `iommu_formats.py` (bytes), `iommu_rules.py` (one request, one access, in a known state), `intervals.py` (mappings),
`iommu_driver.py` (a driver that does as Linux's), `iommu_traffic.py` (random requests and accesses, every malformed one by name),
`iommu_trace.py` (what QEMU recorded of a guest). How a test compares a device under test with it, in lock-step::

    device = IommuDevice(IommuDescription({1: (X86_MSI,), 2: (X86_MSI,)}, capacity=4096))
    device.negotiate(features)                          # at FEATURES_OK
    traffic = IommuTraffic(device, rng)                 # looks at the device to make something that is likely to matter
    sent = traffic.request()                            # sent.name, sent.readable, sent.room
    device.serve(sent.readable, sent.room)              # when the device under test may have fetched it
    ...                                                 # accesses in between: the state before and the one behind are both allowed
    problem = device.settle(before, after, used_len)    # when its used index was published, in the order of the ring
    access = traffic.access()                           # an `Access`
    opened = device.begin(access)                       # when it goes to the gate
    problem = device.judge(opened, verdict)             # when its TLP, or its refusal, is seen
    device.reported(raw, used_len)                      # an event buffer came back
    device.unreported(dropped)                          # at the end, with the device's counter
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .iommu_formats import CONFIG_BYTES, FAULT_BYTES, Fault, FaultFlag, IommuConfig, IommuFeature, Range
from .iommu_rules import KNOWN_FEATURES, Access, IommuDescription, IommuRules, IommuState, Outcome, Verdict

__all__ = ["IommuDevice", "OpenAccess", "Served"]

MOST_STATES = 256  # that a device may be in, as far as its answers tell


@dataclass(eq=False)
class Served:
    """A request that arrived and is not answered.

    Attributes
    ----------
    outcomes : list of :class:`Outcome`
        How it may end, as far as is known; what our card does first.
    """

    readable: bytes
    room: int
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def statuses(self) -> set:
        """Statuses that are allowed; None: unwritten."""
        return {one.status for one in self.outcomes}


@dataclass(eq=False)
class OpenAccess:
    """An access that went to the gate and has not left it.

    Attributes
    ----------
    refusals : set of :class:`Verdict`
        Reasons to refuse it that there were since.
    """

    access: Access
    refusals: set[Verdict] = field(default_factory=set)


class IommuDevice:
    """The golden virtio-iommu.

    A request takes effect at some time between `serve` and `settle`: a mapping that an UNMAP or DETACH ends may be used, or not,
    until then, and not behind it (V180, V213); one that a MAP makes likewise from `serve` on, and for sure behind `settle`. Nothing
    is refused behind `settle` for want of a mapping except accesses that began before. What answers leave open (`IommuRules`)
    makes several states; later answers and accesses tell which it was.

    Parameters
    ----------
    description : :class:`IommuDescription`

    Attributes
    ----------
    fault_count : :class:`int`
        Accesses that were refused.
    """

    def __init__(self, description: IommuDescription):
        self.description, self.rules = description, IommuRules(description)
        self.fault_count = 0
        self._pending: list[Served] = []
        self._open: list[OpenAccess] = []
        self._owed: list[frozenset[Fault]] = []  # records that may come
        self._set([IommuState(self._initial_bypass)])

    @property
    def _initial_bypass(self) -> int:
        return self.description.bypass if self.description.offers(IommuFeature.BYPASS_CONFIG) else 0

    @property
    def state(self) -> IommuState:
        """A state that the device may be in, when nothing is pending; the only one as long as answers leave nothing open."""
        return self._now[0]

    # -- states --

    def _set(self, now: Iterable[IommuState], fading: Iterable[IommuState] = ()) -> None:
        """The device is in one of ``now``; its translator may still be in one of ``fading``."""
        self._remember()
        self._now, self._fading = _distinct(now), _distinct(fading)
        self._reach()

    def _reach(self) -> None:
        """Find the states that the translator may be in, and those that the device may be in behind all pending requests."""
        live, front, fading = self._now + self._fading, self._now, self._fading
        for served in self._pending:
            front, fading = ([one.state for one in self._outcomes(states, served)] for states in (front, fading))
            live = live + front + fading
        self._live, self._front = _distinct(live), _distinct(front)

    def _remember(self) -> None:
        """Accesses under way may be refused for the reasons that there are now."""
        for one in self._open:
            one.refusals.update(verdict for verdict in self._verdicts(one.access) if verdict.phys is None)

    def _verdicts(self, access: Access) -> frozenset[Verdict]:
        return frozenset().union(*(self.rules.verdicts(state, access) for state in self._live))

    # -- requests --

    def serve(self, readable: bytes, room: int) -> Served:
        """A request arrives: ``readable`` bytes, in whatever buffers they lay, and ``room`` writable ones."""
        served = Served(readable, room)
        served.outcomes = self._outcomes(self._front, served)
        self._pending.append(served)
        self._reach()
        return served

    def _outcomes(self, states: Iterable[IommuState], served: Served) -> list[Outcome]:
        return [one for state in states for one in self.rules.outcomes(state, served.readable, served.room)]

    def settle(self, before: bytes, after: bytes, used_len: int) -> str:
        """The oldest request came back: its writable bytes held ``before`` and hold ``after``; return why that is wrong."""
        served = self._pending[0]
        if not len(before) == len(after) == served.room:
            raise ValueError(f"Writable bytes must be {served.room}, not {len(before)!r} and {len(after)!r}")
        served.outcomes = self._outcomes(self._now, served)
        problems = [one.problem(before, after, used_len) for one in served.outcomes]
        fitting = [one for one, text in zip(served.outcomes, problems) if not text] or served.outcomes[:1]
        fading = [one.state for one in self._outcomes(self._fading, served) if not one.problem(before, after, used_len)]
        self._pending.pop(0)
        self._set([one.state for one in fitting], fading)
        if "" in problems:
            return ""
        return "; ".join(dict.fromkeys(f"{'unwritten' if one.status is None else one.status.name}: {text}"
                                       for one, text in zip(served.outcomes, problems)))  # fmt: skip

    def execute(self, readable: bytes, room: int) -> bytes:
        """Serve a request at once, as our card does; return what is written, whose length is the used length."""
        if self._pending:
            raise ValueError(f"Requests must be settled in order, not with {len(self._pending)!r} pending")
        first, before = self.serve(readable, room).outcomes[0], b"\xff" * room
        written = first.written(room)
        self.settle(before, written or before, len(written))
        self._set([first.state], self._fading)
        return written

    # -- features, configuration, reset --

    def negotiate(self, features: int) -> None:
        """The driver's FEATURES_OK was accepted, with ``features``. [VIRTIO1.4 3.1.1]"""
        if features & KNOWN_FEATURES & ~self.description.features:
            raise ValueError(f"Features must be offered, not {features:#x}")
        self._set([replace(state, accepted=features) for state in self._now], self._fading)

    def config(self) -> bytes:
        """Return the device configuration; fields of features that are not offered are 0. [VIRTIO1.4 5.13.4]"""
        return self._config(self.state)

    def _config(self, state: IommuState) -> bytes:
        told, none = self.description, Range(0, 0)
        return IommuConfig(told.page_size_mask, told.input_range if told.offers(IommuFeature.INPUT_RANGE) else none,
                           told.domain_range if told.offers(IommuFeature.DOMAIN_RANGE) else none,
                           told.probe_size if told.offers(IommuFeature.PROBE) else 0, state.bypass).pack()  # fmt: skip

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes device configuration; only ``bypass`` can change. [VIRTIO1.4 5.13.4.1, 5.13.4.2]

        What it must not write (another value, without having accepted the feature) is taken as 0 or 1 or not at all.
        """
        at = IommuConfig.BYPASS_AT - offset
        if not self.description.offers(IommuFeature.BYPASS_CONFIG) or not 0 <= at < len(data):
            return
        value, now = data[at], []
        for state in self._now:
            if value in (0, 1) and state.accepted >> IommuFeature.BYPASS_CONFIG & 1:
                now.append(replace(state, bypass=value))
            else:
                now += [state, *(replace(state, bypass=bit) for bit in ((value,) if value in (0, 1) else (0, 1)))]
        self._set(now, self._now + self._fading)

    def config_read(self, raw: bytes) -> str:
        """The driver has read all of the device configuration; return why it cannot be so. What it wrote before is done then."""
        fitting = [state for state in self._now if self._config(state) == raw[:CONFIG_BYTES]]
        self._set(fitting or self._now)
        return "" if fitting else f"configuration {raw.hex()}, must be {self._config(self.state).hex()}"

    def access_platform(self, endpoint: int, accepted: bool) -> None:
        """The driver of a function accepted ACCESS_PLATFORM, or did not: then nothing of it is translated. [VIRTIO1.4 6.2]"""
        own = frozenset([endpoint])
        self._set([replace(state, untranslated=state.untranslated - own if accepted else state.untranslated | own)
                   for state in self._now], self._fading)  # fmt: skip

    def begin_reset(self) -> None:
        """The driver writes 0 to the device status: requests end unserved, mappings may be gone."""
        self._pending.clear()
        self._set([self._after_reset(state) for state in self._now], self._live)

    def reset(self) -> None:
        """The driver has read 0 from the device status: no endpoint is attached; ``bypass`` is as before. (V161, V162)"""
        self.begin_reset()
        self._set(self._now)

    def system_reset(self) -> None:
        """All is as after power-on."""
        self._pending.clear()
        self._set([IommuState(self._initial_bypass)])

    def _after_reset(self, state: IommuState) -> IommuState:
        return IommuState(state.bypass, untranslated=state.untranslated)

    # -- accesses --

    def translate(self, endpoint: int, address: int, is_write: bool, length: int = 1) -> frozenset[Verdict]:
        """Return what may become of an access that begins and ends now."""
        return self._verdicts(Access(endpoint, address, is_write, length))

    def begin(self, access: Access) -> OpenAccess:
        """An access goes to the gate; give it to `judge` when it leaves it."""
        opened = OpenAccess(access)
        self._open.append(opened)
        return opened

    def allowed(self, opened: OpenAccess) -> frozenset[Verdict]:
        """Return what may become of the access now: what the states allow, and what was a reason to refuse it since it began."""
        return self._verdicts(opened.access) | opened.refusals

    def judge(self, opened: OpenAccess, verdict: Verdict) -> str:
        """The access left the gate with ``verdict``; return why that is wrong. A refusal may be reported from now on."""
        self._open.remove(opened)
        allowed = self.allowed(opened)
        fitting = {one for one in allowed if one.fits(verdict)}
        if fitting and verdict.phys is None:
            self.fault_count += 1
            self._owed.append(frozenset(opened.access.fault(one.reason) for one in fitting if one.reason is not None))
        if fitting and not self._pending and not self._fading and not opened.refusals:
            self._now = [state for state in self._now if self.rules.verdicts(state, opened.access) & fitting]
            self._reach()
        return "" if fitting else f"{opened.access} ends in {verdict}, must be one of {sorted(map(str, allowed))}"

    # -- fault records --

    def reported(self, raw: bytes, used_len: int) -> str:
        """An event buffer came back with ``used_len`` bytes; return why that is no record of a refusal that none told before.

        ADDRESS may be left out. A buffer that is too small for a record tells nothing. [VIRTIO1.4 5.13.6.9.2]
        """
        wanted = FAULT_BYTES if len(raw) >= FAULT_BYTES else 0
        if used_len != wanted:  # V210
            return f"used length {used_len}, must be {wanted}"
        if not wanted:
            return ""
        record = Fault.unpack(raw)
        if any(record.reserved) or record.reserved1:  # V209
            return f"reserved fields of {record} are not 0"
        owed = self._owed
        if not record.flags & FaultFlag.ADDRESS:
            record, owed = replace(record, address=0), [frozenset(map(_without_address, ones)) for ones in owed]
        n = next((n for n, ones in enumerate(owed) if record in ones), None)
        if n is None:
            return f"{record} tells of no refused access"
        del self._owed[n]
        return ""

    def unreported(self, dropped: int) -> str:
        """Nothing is under way any more and the device counted ``dropped`` faults without a record; return why that is wrong. (V211)"""
        return "" if len(self._owed) == dropped else f"{len(self._owed)} faults were not reported, {dropped} were counted as dropped"


def _without_address(fault: Fault) -> Fault:
    return replace(fault, flags=fault.flags & ~int(FaultFlag.ADDRESS), address=0)


def _distinct(states: Iterable[IommuState]) -> list[IommuState]:
    found: list[IommuState] = []
    for state in states:
        if state not in found:
            found.append(state)
    if len(found) > MOST_STATES:
        raise ValueError(f"States must be at most {MOST_STATES}, not {len(found)!r}: too much was left open")
    return found
