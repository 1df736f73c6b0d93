"""Judges what a card does, event by event, against the rules and the golden model.

A :class:`Scoreboard` hands every event of a run to its checkers. The first difference ends the run with the event, what
the card did, what the model allows, the last events and the seed. Checkers know events and models only, never the
simulation: `tests/replay.py` runs the same ones on a recorded log.
"""

from collections import deque
from dataclasses import dataclass

from ..models.iommu.faults import AccessType, FaultRecord, TransactionType, broken_record_rules
from ..models.memory import Iova, Spa
from ..models.tlp import MalformedTlp, TlpType, decode

__all__ = ["AccessChecker", "Difference", "FaultQueueChecker", "MemoryChecker", "Mismatch", "Scoreboard", "describe"]

PAGE = 4096


@dataclass(frozen=True)
class Mismatch:
    """One thing that the card did otherwise than the model allows."""

    what: str
    card: str
    model: str

    def __str__(self):
        return f"{self.what}\n  card:  {self.card}\n  model: {self.model}"


class Difference(AssertionError):
    """Card and model differ; ``mismatch`` tells where."""

    def __init__(self, mismatch, text):
        super().__init__(text)
        self.mismatch = mismatch


def describe(event):
    """Return one readable line about an event."""
    name, when = type(event).__name__, getattr(event, "cycle", 0)
    if hasattr(event, "dwords"):
        try:
            what = str(decode(event.dwords))
        except MalformedTlp as error:
            what = f"malformed: {error}"
        return f"{name} at {when}: {what} [{' '.join(f'{dword:08x}' for dword in event.dwords[:6])}]"
    fields = vars(event).items() if hasattr(event, "__dict__") else ((key, getattr(event, key)) for key in event.__slots__)
    shown = []
    for key, value in fields:
        if isinstance(value, bytes):
            value = _hex(value, len(value))
        elif isinstance(value, int) and key != "cycle":
            value = hex(value)
        if key != "cycle":
            shown.append(f"{key} {value}")
    text = ", ".join(shown)
    return f"{name} at {when}: {text if len(text) < 300 else text[:300] + '...'}"


class Scoreboard:
    """Runs ``checkers`` over the events of a run and stops at the first difference.

    A checker has ``take(event, tlp)`` and ``finish()``, each returning a list of :class:`Mismatch`, and ``comparisons``, the
    number of things that it compared; ``tlp`` is there for TLPs that the card sent, and None for every other event.

    Parameters
    ----------
    checkers : list
        May grow during the run.
    seed : :class:`int`
        Is printed with a difference.
    history : :class:`int`
        How many events before the one that differs are printed.
    """

    def __init__(self, checkers=(), *, seed=0, history=20):
        self.checkers, self.seed = list(checkers), seed
        self.events, self.differences = 0, 0
        self._history = deque(maxlen=history)

    @property
    def comparisons(self):
        """Number of things compared so far, by all checkers."""
        return sum(checker.comparisons for checker in self.checkers)

    def take(self, event, tlp=None):
        """Judge one event; ``tlp`` is the decoded TLP of one that the card sent. Raises :exc:`Difference`."""
        self.events += 1
        for checker in self.checkers:
            found = checker.take(event, tlp)
            if found:
                self._stop(found, event)
        self._history.append(event)

    def finish(self):
        """Judge what can only be judged at the end of a run. Raises :exc:`Difference`."""
        for checker in self.checkers:
            found = checker.finish()
            if found:
                self._stop(found, None)

    def _stop(self, found, event):
        self.differences += len(found)
        lines = [f"card and model differ (seed {self.seed}, event {self.events}, {self.comparisons} comparisons before)"]
        lines += [str(mismatch) for mismatch in found[:5]]
        lines.append("at the end of the run" if event is None else f"event: {describe(event)}")
        lines.append(f"the {len(self._history)} events before, oldest first:")
        lines += [f"  {describe(one)}" for one in self._history]
        raise Difference(found[0], "\n".join(lines))


def _hex(data, length):
    return data[:32].hex(" ", 4) + (f" ... ({length} bytes)" if length > 32 else "")


class AccessChecker:
    """No memory request of the card may reach what no allowed translation leads to. [RVIOMMU1.0 3.3, 3.8]

    Every answer is for the moment in which the request is seen on the link, so that nothing may pass that an IOFENCE.C seen
    complete has revoked. The IOMMU's own requests must stay inside what software gave it.

    Parameters
    ----------
    allowed : :class:`ringwall.models.iommu.cache.AllowedTranslations`
        Is kept up to date by who drives the software.
    iommu_function : :class:`int` or None
        Function number of the IOMMU.
    own : list of [start, length, rights]
        Where the IOMMU's own requests may go; rights "r", "w" or "rw".
    """

    def __init__(self, allowed, *, iommu_function=0, own=()):
        self.allowed, self.iommu_function, self.own, self.comparisons = allowed, iommu_function, own, 0

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.allowed, **parameters)

    def take(self, event, tlp):
        if tlp is None or tlp.type not in (TlpType.MRD, TlpType.MWR):
            return []
        self.comparisons += 1
        start, length = tlp.byte_span()
        is_write, function = tlp.type is TlpType.MWR, tlp.requester_id & 0xFF
        way = "write" if is_write else "read"
        if function == self.iommu_function:
            if any(low <= start and start + length <= low + size and way[0] in rights for low, size, rights in self.own):
                return []
            places = ", ".join(f"{low:#x}+{size:#x} {rights}" for low, size, rights in self.own)
            return [Mismatch(f"{way} of the IOMMU outside of its own structures", str(tlp), f"those are at {places or 'nowhere'}")]
        if self.allowed.may_access(function, Spa(start), is_write):
            return []
        page = start & ~(PAGE - 1)
        return [Mismatch(f"{way} that no allowed translation leads to", str(tlp), f"device {function} may not {way} {page:#x}")]

    def finish(self):
        return []


class FaultQueueChecker:
    """Every record that the card writes into the fault queue is well formed and tells of a fault that is allowed.

    Parameters
    ----------
    memory
        What the card sees, with ``read(address, length)``.
    allowed : :class:`AllowedTranslations`
    base, entries : :class:`int`
        Place of the queue.
    golden : object or None
        Memory of the model: gets each record that was found good.
    window : :class:`int`
        A request may have met the tables as they were up to so many cycles before its record is seen.
    """

    def __init__(self, memory, allowed, *, base, entries, golden=None, window=20_000):
        self.memory, self.allowed, self.base, self.entries, self.golden = memory, allowed, base, entries, golden
        self.records, self.comparisons, self._window = [], 0, window
        self._times = deque([(0, 0)])  # (cycle, allowed.now then)

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.memory, session.allowed, golden=session.golden, **parameters)

    def take(self, event, tlp):
        when = getattr(event, "cycle", None)
        if when is not None and self._times[-1][1] != self.allowed.now:
            self._times.append((when, self.allowed.now))
        if tlp is None or tlp.type is not TlpType.MWR:
            return []
        start, length = tlp.byte_span()
        if not self.base <= start < self.base + 32 * self.entries:
            return []
        if start % 32 or length != 32:
            return [Mismatch("fault record is not written as one whole entry", str(tlp), "32 bytes at a multiple of 32")]
        self.comparisons += 1
        data = self.memory.read(Spa(start), 32)
        if self.golden is not None:
            self.golden.write(Spa(start), data)
        record = FaultRecord.unpack(data)
        self.records.append(record)
        found = [Mismatch("fault record is malformed", str(record), rule) for rule in broken_record_rules(data)]
        access = {TransactionType.UNTRANSLATED_READ: AccessType.READ, TransactionType.UNTRANSLATED_WRITE: AccessType.WRITE,
                  TransactionType.UNTRANSLATED_EXEC: AccessType.EXEC}.get(record.ttyp)  # fmt: skip
        if access is not None and not found:
            outcomes = self.allowed.outcomes(record.device_id, Iova(record.iotval), access, since=self._since(when))
            if record.cause not in {outcome.cause for outcome in outcomes}:
                causes = sorted(f"success at {outcome.spa:#x}" if outcome.cause is None else
                                f"{outcome.cause.name} ({int(outcome.cause)})" for outcome in outcomes)  # fmt: skip
                found.append(Mismatch("fault that did not have to be", str(record), f"allowed: {', '.join(causes) or 'nothing'}"))
        return found

    def _since(self, when):
        while len(self._times) > 1 and self._times[1][0] < when - self._window:
            self._times.popleft()
        return self._times[0][1]

    def finish(self):
        return []


class MemoryChecker:
    """At the end what the card sees and what the model computed are the same, byte by byte.

    Parameters
    ----------
    memory, golden : :class:`ringwall.models.memory.GuestMemory`
    free : list of [start, length]
        Where no model follows the card: not compared.
    """

    def __init__(self, memory, golden, *, free=()):
        self.memory, self.golden, self.free, self.comparisons = memory, golden, free, 0

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.memory, session.golden, **parameters)

    def take(self, event, tlp):
        return []

    def finish(self):
        self.comparisons += 1
        found = []
        for start, length in self.memory.differences(self.golden):
            for address, end in self._compared(start, start + length):
                size = end - address
                card, model = (_hex(memory.read(address, min(size, 33)), size) for memory in (self.memory, self.golden))
                found.append(Mismatch(f"memory differs at {address:#x}, {size} bytes", card, model))
        return found

    def _compared(self, start, end):
        """Yield the parts of start to end that are not free."""
        for low, size in sorted(self.free):
            if start < low < end:
                yield start, low
            if low < end and low + size > start:
                start = max(start, low + size)
        if start < end:
            yield start, end
