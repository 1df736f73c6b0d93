"""Judges what a card does, event by event, against the rules and the golden model.

A :class:`Scoreboard` hands every event of a run to its checkers. The first difference ends the run with the event, what
the card did, what the model allows, the last events and the seed. Checkers know events and models only, never the
simulation: `tests/replay.py` runs the same ones on a recorded log.
"""

from collections import deque
from dataclasses import dataclass

from ..models.events import Operation, TlpSent, Told
from ..models.host import MemoryWrite
from ..models.iommu.commands import IofenceC
from ..models.iommu.commands import decode as decode_command
from ..models.iommu.faults import AccessType, Cause, FaultRecord, TransactionType, broken_record_rules
from ..models.iommu.registers import REGISTERS, QueueCsr
from ..models.memory import Iova, Spa
from ..models.tlp import CplStatus, MalformedTlp, TlpType, decode

__all__ = ["AccessChecker", "Checker", "Difference", "FaultQueueChecker", "FenceChecker", "MemoryChecker", "MessageChecker", "Mismatch",
           "Scoreboard", "describe"]  # fmt: skip

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


class Checker:
    """What judges one thing of a run. ``comparisons`` is the number of things that it compared."""

    comparisons = 0

    def take(self, event, tlp):
        """Judge one event; ``tlp`` is there for TLPs that the card sent, None for others. Returns a list of :class:`Mismatch`."""
        return []

    def finish(self):
        """Judge what can be judged at the end only. Returns a list of :class:`Mismatch`."""
        return []

    def claims(self, tlp):
        """Tell whether this write of the card is this checker's to judge, so that nobody else need wonder about it."""
        return False


class Scoreboard:
    """Runs ``checkers`` over the events of a run and stops at the first difference.

    Parameters
    ----------
    checkers : list of :class:`Checker`
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

    def is_claimed(self, tlp):
        """Tell whether a checker claims this write of the card."""
        return any(checker.claims(tlp) for checker in self.checkers)

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


class AccessChecker(Checker):
    """No memory request of the card may reach what no allowed translation leads to. [RVIOMMU1.0 3.3, 3.8]

    Every answer is for the moment in which the request is seen on the link, so that nothing may pass that an IOFENCE.C seen
    complete has revoked. The IOMMU's own requests must stay inside what software gave it; its writes may also be those that
    another checker claims.

    Parameters
    ----------
    allowed : :class:`ringwall.models.iommu.cache.AllowedTranslations`
        Is kept up to date by who drives the software.
    iommu_function : :class:`int` or None
        Function number of the IOMMU.
    own : list of [start, length, rights]
        Where the IOMMU's own requests may go; rights "r", "w" or "rw".
    is_claimed : callable
        Tells whether another checker claims a write.
    """

    def __init__(self, allowed, *, iommu_function=0, own=(), is_claimed=lambda tlp: False):
        self.allowed, self.iommu_function, self.own, self.is_claimed = allowed, iommu_function, own, is_claimed

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.allowed, is_claimed=session.board.is_claimed, **parameters)

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
            if is_write and self.is_claimed(tlp):
                return []
            places = ", ".join(f"{low:#x}+{size:#x} {rights}" for low, size, rights in self.own)
            return [Mismatch(f"{way} of the IOMMU outside of its own structures [RVIOMMU1.0 2.1, 4]", str(tlp),
                             f"those are at {places or 'nowhere'}")]  # fmt: skip
        if self.allowed.may_access(function, Spa(start), is_write):
            return []
        page = start & ~(PAGE - 1)
        return [Mismatch(f"{way} that no allowed translation leads to [RVIOMMU1.0 3.3, 3.8]", str(tlp),
                         f"device {function} may not {way} {page:#x}")]  # fmt: skip


class MessageChecker(Checker):
    """An interrupt is one write of one whole dword: address and data of an entry of the MSI-X table. [PCIe5 6.1.4, 7.7.2]

    Every write that touches the address of an entry is judged, and claimed. The table is what software wrote to it.

    Parameters
    ----------
    allowed : :class:`ringwall.models.iommu.cache.AllowedTranslations`
    function : :class:`int`
        Function number, and device_id.
    table, entries : :class:`int`
        Bus address and size of the table.
    is_translated : :class:`bool`
        The function's messages go through the IOMMU: entries hold IOVAs.
    """

    def __init__(self, allowed, *, function, table, entries, is_translated=True):
        self.allowed, self.function, self.table, self.is_translated = allowed, function, table, is_translated
        self._raw = bytearray((bytes(12) + b"\1\0\0\0") * entries)  # Mask bits are set by a reset [PCIe5 7.7.2.5]

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.allowed, **parameters)

    def take(self, event, tlp):
        if tlp is None:
            if isinstance(event, Operation) and isinstance(event.operation, MemoryWrite):
                self._written(event.operation)
            return []
        touched = self._touched(tlp)
        if touched is None:
            return []
        self.comparisons += 1
        if self.vector_of(tlp) is not None:
            return []
        vector, iova = touched
        address, data = self._message(vector)
        enables = f"{tlp.first_be:04b} {tlp.last_be:04b}"
        return [Mismatch("interrupt is not one whole dword of the MSI-X table [PCIe5 6.1.4, 7.7.2]",
                         f"{tlp.length_dw} dwords, byte enables {enables}, at {iova:#x}: {tlp.data[:16].hex(' ', 4)}",
                         f"vector {vector} is {data.to_bytes(4, 'little').hex()} at {address:#x}")]  # fmt: skip

    def claims(self, tlp):
        return self._touched(tlp) is not None

    def vector_of(self, tlp):
        """Return the vector whose message this write is, whole; None: it is none."""
        if (tlp.length_dw, tlp.first_be, tlp.last_be) != (1, 15, 0):
            return None
        data = int.from_bytes(tlp.data, "little")
        return next((vector for vector, _ in self._all_touched(tlp) if self._message(vector)[1] == data), None)

    def is_masked(self, vector):
        """Tell whether the vector's Mask bit is set. [PCIe5 7.7.2.5]"""
        return bool(self._raw[16 * vector + 12] & 1)

    def _written(self, operation):
        at, data = operation.address - self.table, operation.value.to_bytes(operation.size, "little")
        for n in range(len(data)):
            if 0 <= at + n < len(self._raw):
                self._raw[at + n] = data[n]

    def _message(self, vector):
        entry = self._raw[16 * vector : 16 * vector + 12]
        return int.from_bytes(entry[:8], "little") & ~3, int.from_bytes(entry[8:], "little")

    def _touched(self, tlp):
        return next(self._all_touched(tlp), None)

    def _all_touched(self, tlp):
        """Yield (vector, IOVA of the write) of each entry whose address the write touches."""
        if tlp.type is not TlpType.MWR or tlp.requester_id & 0xFF != self.function:
            return
        start, length = tlp.byte_span()
        for iova in self.allowed.iovas(self.function, Spa(start), True) if self.is_translated else (start,):
            for vector in range(len(self._raw) // 16):
                address, _ = self._message(vector)
                if address and iova < address + 4 and address < iova + length:
                    yield vector, iova


class FenceChecker(Checker):
    """An IOFENCE.C with AV=1 writes its 4 bytes of data at its address, once, in the order of the queue, before it is complete.

    [RVIOMMU1.0 4.1.2] Knows the commands that software told of; a write to the address of one that is not due is found.

    Parameters
    ----------
    golden : :class:`ringwall.models.memory.GuestMemory`
        Gets what is written as it must be.
    allowed : :class:`ringwall.models.iommu.cache.AllowedTranslations`
    function : :class:`int`
        Function number of the IOMMU.
    """

    def __init__(self, golden, allowed, *, function=0):
        self.golden, self.allowed, self.function = golden, allowed, function
        self._due, self._lapsed = [], []  # (token, address, data)

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.golden, session.allowed, **parameters)

    def take(self, event, tlp):
        if isinstance(event, Told):
            return self._told(event.method, event.arguments)
        if tlp is None or not self.claims(tlp):
            return []
        self.comparisons += 1
        start, length = tlp.byte_span()
        may = [*self._due[:1], *self._lapsed]
        for one in may:
            _, address, data = one
            if (start, length) == (address, 4) and not tlp.has_gaps and tlp.data[start - tlp.address :][:4] == data:
                (self._lapsed if one in self._lapsed else self._due).remove(one)
                self.golden.write(Spa(start), data)
                return []
        return [Mismatch("IOFENCE.C writes otherwise than its command says [RVIOMMU1.0 4.1.2]", f"{tlp}: {tlp.data[:16].hex(' ', 4)}",
                         " or ".join(f"{data.hex()} at {address:#x}" for _, address, data in may))]  # fmt: skip

    def claims(self, tlp):
        if tlp.type is not TlpType.MWR or tlp.requester_id & 0xFF != self.function:
            return False
        start, length = tlp.byte_span()
        return any(start < address + 4 and address < start + length for _, address, _ in self._due + self._lapsed)

    def _told(self, method, arguments):
        if method == "submitted":
            command = decode_command(bytes.fromhex(arguments[0]), self.allowed.capabilities)
            if isinstance(command, IofenceC) and command.address is not None:
                self._due.append((self.allowed.now + 1, command.address, command.data.to_bytes(4, "little")))
        elif method == "fence_completed":
            last = self.allowed.now + 1 if arguments[0] is None else arguments[0]
            if self._due and self._due[0][0] <= last:
                _, address, data = self._due[0]
                return [Mismatch("IOFENCE.C is complete, its data is not written [RVIOMMU1.0 4.1.2]", "no write",
                                 f"{data.hex()} at {address:#x}")]  # fmt: skip
        elif method == "commands_aborted":
            self._lapsed, self._due = self._lapsed + self._due, []
        return []


FAILED_ACCESS = {Cause.DDT_ENTRY_LOAD_ACCESS_FAULT, Cause.PDT_ENTRY_LOAD_ACCESS_FAULT, Cause.MSI_PTE_LOAD_ACCESS_FAULT,
                 *(one.access_fault for one in AccessType)}  # fmt: skip
CORRUPTED = {Cause.DDT_DATA_CORRUPTION, Cause.PDT_DATA_CORRUPTION, Cause.MSI_PT_DATA_CORRUPTION, Cause.PT_DATA_CORRUPTION}
OFFSETS = {register.name: register.offset for register in REGISTERS}
KINDS = {TransactionType.UNTRANSLATED_READ: AccessType.READ, TransactionType.UNTRANSLATED_WRITE: AccessType.WRITE,
         TransactionType.UNTRANSLATED_EXEC: AccessType.EXEC}  # fmt: skip


class FaultQueueChecker(Checker):
    """Every record that the card writes into the fault queue is well formed, the next one, and tells of a fault that is allowed.

    Page and directory faults must be what the tables say; access faults and corrupt data need a read of the IOMMU that the host
    failed, or left without an answer. [RVIOMMU1.0 4.2]

    Parameters
    ----------
    memory
        What the card sees, with ``read(address, length)``.
    allowed : :class:`AllowedTranslations`
    base, entries : :class:`int`
        Place of the queue.
    function : :class:`int`
        Function number of the IOMMU.
    registers : :class:`int` or None
        Bus address of the IOMMU's registers: software's writes to fqh and fqcsr tell where the queue ends, and restarts.
    golden : object or None
        Memory of the model: gets each record that was found good.
    window : :class:`int`
        A request may have met the tables, and the host's errors, as they were up to so many cycles before its record is seen.
    silence : :class:`int`
        A read that has no answer for so many cycles may be given up.
    """

    def __init__(self, memory, allowed, *, base, entries, function=0, registers=None, golden=None, window=20_000, silence=5_000):
        self.memory, self.allowed, self.base, self.entries, self.golden = memory, allowed, base, entries, golden
        self.registers, self._head = registers, 0
        self.function, self.records, self._window, self._silence = function, [], window, silence
        self._times = deque([(0, 0)])  # (cycle, allowed.now then)
        self._next = 0
        self._reads = {}  # tag -> [cycle, bytes that are missing]: reads of the IOMMU
        self._failed, self._corrupted = -window, -window  # when the last of them did not end well

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.memory, session.allowed, golden=session.golden, **parameters)

    def take(self, event, tlp):
        when = getattr(event, "cycle", None)
        if when is not None and self._times[-1][1] != self.allowed.now:
            self._times.append((when, self.allowed.now))
        if isinstance(event, TlpSent):
            self._answered(event)
        elif self.registers is not None and isinstance(event, Operation) and isinstance(event.operation, MemoryWrite):
            if event.operation.address == self.registers + OFFSETS["fqh"]:
                self._head = event.operation.value % self.entries
            elif event.operation.address == self.registers + OFFSETS["fqcsr"] and not event.operation.value & QueueCsr.EN:
                self._next = 0  # fqt is 0 when the queue is turned on [RVIOMMU1.0 6.16]
        if tlp is None or tlp.requester_id & 0xFF != self.function:
            return []
        if tlp.type is TlpType.MRD:
            lost = self._reads.get(tlp.tag)
            if lost is not None:  # its tag is used again: given up
                self._failed = when
            self._reads[tlp.tag] = [when, tlp.byte_span()[1]]
        return self._judge(when, tlp) if self.claims(tlp) else []

    def claims(self, tlp):
        if tlp.type is not TlpType.MWR or tlp.requester_id & 0xFF != self.function:
            return False
        start, length = tlp.byte_span()
        return start < self.base + 32 * self.entries and self.base < start + length

    def _answered(self, event):
        """The host sent a TLP: is it a completion for the IOMMU, and a good one?"""
        if event.dwords[0] >> 24 & 0x1F != 0x0A or event.dwords[2] >> 16 & 0xFF != self.function:
            return
        completion = decode(event.dwords)
        read = self._reads.get(completion.tag)
        if completion.poisoned:
            self._corrupted = event.cycle
        if read is None or completion.status is not CplStatus.SC or completion.byte_count != read[1] or not completion.data:
            self._failed = event.cycle
            self._reads.pop(completion.tag, None)
            return
        first = completion.lower_address % 4
        read[1] -= min(read[1], len(completion.data) - first)
        if not read[1]:
            del self._reads[completion.tag]

    def _judge(self, when, tlp):
        start, length = tlp.byte_span()
        if start % 32 or length != 32:
            return [Mismatch("fault record is not written as one whole entry [RVIOMMU1.0 4.2]", str(tlp), "32 bytes at a multiple of 32")]
        at = (start - self.base) // 32
        if at != self._next:
            return [Mismatch("fault record is not the next one [RVIOMMU1.0 4.2]", f"entry {at}", f"entry {self._next}")]
        self._next = (at + 1) % self.entries
        if self.registers is not None and self._next == self._head:
            return [Mismatch("fault record is written into a full queue [RVIOMMU1.0 4.2]", f"entry {at}", f"fqh is {self._head}")]
        self.comparisons += 1
        data = self.memory.read(Spa(start), 32)
        if self.golden is not None:
            self.golden.write(Spa(start), data)
        record = FaultRecord.unpack(data)
        self.records.append(record)
        found = [Mismatch("fault record is malformed [RVIOMMU1.0 4.2]", str(record), rule) for rule in broken_record_rules(data)]
        access = KINDS.get(record.ttyp)
        if access is None or found:
            return found
        if record.cause in FAILED_ACCESS:
            is_so = when - self._failed <= self._window or any(when - begun >= self._silence for begun, _ in self._reads.values())
            model = "no read of the IOMMU failed"
        elif record.cause in CORRUPTED:
            is_so, model = when - self._corrupted <= self._window, "no read of the IOMMU was answered with poison"
        else:
            outcomes = self.allowed.outcomes(record.device_id, Iova(record.iotval), access, since=self._since(when))
            is_so = record.cause in {outcome.cause for outcome in outcomes}
            causes = sorted(f"success at {outcome.spa:#x}" if outcome.cause is None else
                            f"{outcome.cause.name} ({int(outcome.cause)})" for outcome in outcomes)  # fmt: skip
            model = f"allowed: {', '.join(causes) or 'nothing'}"
        return [] if is_so else [Mismatch("fault that did not have to be [RVIOMMU1.0 3.3, 4.2]", str(record), model)]

    def _since(self, when):
        while len(self._times) > 1 and self._times[1][0] < when - self._window:
            self._times.popleft()
        return self._times[0][1]


class MemoryChecker(Checker):
    """At the end what the card sees and what the model computed are the same, byte by byte.

    Parameters
    ----------
    memory, golden : :class:`ringwall.models.memory.GuestMemory`
    free : list of [start, length]
        Where no model follows the card: not compared.
    """

    def __init__(self, memory, golden, *, free=()):
        self.memory, self.golden, self.free = memory, golden, free

    @classmethod
    def of_session(cls, session, **parameters):
        """Make it from a session."""
        return cls(session.memory, session.golden, **parameters)

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
