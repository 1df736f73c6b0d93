"""What the models know of one run: memory as the card sees it, memory as it should be, translations, the scoreboard, the log.

The same session is fed by a simulation (:class:`Session`) and by a recorded log (:func:`replay`).
"""

from ..models.events import HostStore, Setup, TlpReceived, Told
from ..models.iommu.cache import AllowedTranslations, Outcome
from ..models.iommu.commands import decode as decode_command
from ..models.iommu.entries import DeviceContext, MsiPte, ProcessContext
from ..models.iommu.faults import Cause
from ..models.iommu.registers import Capabilities, IommuMode
from ..models.memory import PAGE, GuestMemory, Iova, Spa
from ..models.tlp import TlpType, decode
from . import ring_checker, scoreboard
from .scoreboard import Scoreboard

CHECKERS = {checker.__name__: checker for checker in (
    scoreboard.AccessChecker, scoreboard.FaultQueueChecker, scoreboard.FenceChecker, scoreboard.MemoryChecker,
    scoreboard.MessageChecker, ring_checker.RingChecker)}  # fmt: skip

__all__ = ["ObservedMemory", "RecordedTranslations", "Session", "replay"]


class ObservedMemory(GuestMemory):
    """Guest memory that tells of every write of software (``source`` empty), after it: ``observe(address, data)``."""

    def __init__(self, observe, **arguments):
        super().__init__(**arguments)
        self.observe = observe

    def write(self, address, data, *, source=""):
        super().write(address, data, source=source)
        if not source:
            self.observe(address, bytes(data))


class RecordedTranslations(AllowedTranslations):
    """:class:`AllowedTranslations` that repeats what it is told to ``record(method, arguments)``, as plain JSON values.

    Besides, a function may be :meth:`bypassed`: a virtio function whose driver did not negotiate ACCESS_PLATFORM uses
    physical addresses. [VIRTIO1.4 6.1]
    """

    def __init__(self, record, mode=IommuMode.BARE):
        super().__init__(mode)
        self._record, self._bypassed = record, set()
        self.capabilities = Capabilities()
        self._found, self._found_at = {}, -1  # answers of iovas per page, good while nothing is told

    def bypassed(self, device_id, is_bypassed):
        """From now on the addresses of this function are not translated, or are."""
        self._record("bypassed", [device_id, is_bypassed])
        self.now += 1
        (self._bypassed.add if is_bypassed else self._bypassed.discard)(device_id)

    def iovas(self, device_id, spa, is_write, *, since=None):
        if device_id in self._bypassed:
            return iter((Iova(spa),))
        if since is not None:
            return super().iovas(device_id, spa, is_write, since=since)
        if self._found_at != self.now:
            self._found.clear()
            self._found_at = self.now
        place = device_id, spa // PAGE, is_write
        if place not in self._found:
            self._found[place] = list(dict.fromkeys(super().iovas(device_id, Spa(spa & -PAGE), is_write)))
        return (Iova(iova + spa % PAGE) for iova in self._found[place])

    def outcomes(self, device_id, iova, access, *, since=None):
        if device_id in self._bypassed:
            return frozenset({Outcome(spa=Spa(iova))})
        return super().outcomes(device_id, iova, access, since=since)

    def offered(self, capabilities):
        self._record("offered", [capabilities.value])
        self.capabilities = capabilities
        super().offered(capabilities)

    def mode_changed(self, mode):
        self._record("mode_changed", [int(mode)])
        super().mode_changed(mode)

    def mode_settled(self):
        self._record("mode_settled", [])
        super().mode_settled()

    def mapped(self, root, iova, spa, size, perms, *, is_global=False):
        self._record("mapped", [root, iova, spa, size, perms, is_global])
        super().mapped(root, iova, spa, size, perms, is_global=is_global)

    def unmapped(self, root, iova):
        self._record("unmapped", [root, iova])
        super().unmapped(root, iova)

    def context_changed(self, device_id, context):
        is_extended = self.capabilities.MSI_FLAT
        self._record("context_changed", [device_id, _written(context, lambda: context.pack(extended=is_extended))])
        super().context_changed(device_id, context)

    def process_context_changed(self, root, process_id, context):
        self._record("process_context_changed", [root, process_id, _written(context, context.pack)])
        super().process_context_changed(root, process_id, context)

    def msi_changed(self, root, gpa, entry):
        self._record("msi_changed", [root, gpa, _written(entry, entry.pack)])
        super().msi_changed(root, gpa, entry)

    def pointer_replaced(self, root, iova, size):
        self._record("pointer_replaced", [root, iova, size])
        super().pointer_replaced(root, iova, size)

    def submitted(self, command):
        self._record("submitted", [command.encode().hex()])
        return super().submitted(command)

    def fence_completed(self, token=None):
        self._record("fence_completed", [token])
        super().fence_completed(token)

    def commands_aborted(self):
        self._record("commands_aborted", [])
        super().commands_aborted()


def _written(entry, pack):
    """Return an entry as a plain value: its bytes, or the number of the fault that it gives."""
    return int(entry) if isinstance(entry, Cause) else pack().hex()


def _read(kind, value):
    """Return the entry of which :func:`_written` made ``value``."""
    if isinstance(value, int):
        return Cause(value)
    raw = bytes.fromhex(value)
    return kind.of_dwords([int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)])


def _tell(session, method, arguments):
    """Repeat one call that :class:`RecordedTranslations` or the golden device of a :class:`RingChecker` recorded."""
    allowed = session.allowed
    match method:
        case "device":
            function, method, arguments = arguments
            session.devices[function].repeat(method, arguments)
        case "mapped":
            allowed.mapped(*arguments[:5], is_global=arguments[5])
        case "context_changed":
            device_id, context = arguments
            allowed.context_changed(device_id, _read(DeviceContext, context))
        case "process_context_changed":
            root, process_id, context = arguments
            allowed.process_context_changed(root, process_id, _read(ProcessContext, context))
        case "msi_changed":
            root, gpa, entry = arguments
            allowed.msi_changed(root, gpa, _read(MsiPte, entry))
        case "offered":
            allowed.offered(Capabilities.from_value(arguments[0]))
        case "submitted":
            allowed.submitted(decode_command(bytes.fromhex(arguments[0]), allowed.capabilities))
        case "mode_changed":
            allowed.mode_changed(IommuMode(arguments[0]))
        case "mode_settled" | "bypassed" | "unmapped" | "pointer_replaced" | "fence_completed" | "commands_aborted":
            getattr(allowed, method)(*arguments)
        case _:
            raise ValueError(f"What models were told must be one of their methods, not {method!r}")


class Session:
    """The models beside one run of a card.

    Software uses ``memory`` and tells ``allowed`` (drivers and table builders do so by themselves); the host port reports to
    :meth:`take`. Both memories get what software writes; ``memory`` gets what the card writes (from the host), ``golden`` what
    the checkers find that it should have written.

    Parameters
    ----------
    seed : :class:`int`
        Of the run.
    log : :class:`ringwall.sim.log.Log` or None
        Gets every event.
    cycle : callable
        Returns the current cycle.

    Attributes
    ----------
    memory : :class:`ObservedMemory`
    golden : :class:`ringwall.models.memory.GuestMemory`
    allowed : :class:`RecordedTranslations`
    board : :class:`ringwall.sim.scoreboard.Scoreboard`
    devices : dict
        Function number -> golden device of a ring.
    """

    def __init__(self, *, seed=0, log=None, cycle=lambda: 0):
        self.log, self.cycle = log, cycle
        self.memory, self.golden = ObservedMemory(self._stored), GuestMemory()
        self.allowed = RecordedTranslations(self.told)
        self.board, self.devices, self.is_replay = Scoreboard(seed=seed), {}, False

    def add(self, checker, **parameters):
        """Let the checker class named ``checker`` judge from now on, made from this session and ``parameters``; returns it.

        The parameters are plain JSON values, so that a replay can do the same.
        """
        self.take(Setup(self.cycle(), checker, parameters))
        return self._add(checker, parameters)

    def _add(self, checker, parameters):
        made = CHECKERS[checker].of_session(self, **parameters)
        self.board.checkers.append(made)
        return made

    def take(self, event, tlp=None):
        """Log one event and let it be judged; ``tlp`` is the decoded TLP of one that the card sent."""
        if self.log is not None:
            self.log.write(event)
        self.board.take(event, tlp)

    def finish(self):
        """Judge what can be judged at the end only."""
        self.board.finish()

    def _stored(self, address, data):
        self.golden.write(address, data)
        self.take(HostStore(self.cycle(), address, data))

    def told(self, method, arguments):
        """Take note of what a model was told, as plain JSON values, before it acts on it."""
        if not self.is_replay:
            self.take(Told(self.cycle(), method, arguments))


def replay(header, events):
    """Judge a recorded log with the models alone; return the :class:`Session` when nothing differs.

    Raises
    ------
    :exc:`ringwall.sim.scoreboard.Difference`
        At the first event where card and model differ, as the run itself would have.
    """
    session = Session(seed=header.seed)
    session.memory.observe = lambda address, data: None
    session.is_replay = True
    for event in events:
        tlp = None
        session.cycle = lambda when=event.cycle: when
        match event:
            case HostStore(address=address, data=data):
                session.memory.write(address, data)
                session.golden.write(address, data)
            case TlpReceived(dwords=dwords):
                tlp = decode(dwords)
                if tlp.type is TlpType.MWR and not _is_message(session, tlp):
                    _store(session.memory, tlp)
        session.take(event, tlp)
        match event:
            case Setup(checker=checker, parameters=parameters):
                session._add(checker, parameters)
            case Told(method=method, arguments=arguments):
                _tell(session, method, arguments)
    session.finish()
    return session


def _is_message(session, tlp):
    """The write is an interrupt: it does not go to memory."""
    return any(isinstance(one, scoreboard.MessageChecker) and one.claims(tlp) for one in session.board.checkers)


def _store(memory, tlp):
    """Do a write of the card."""
    if tlp.poisoned:
        return
    if tlp.has_gaps:
        for at, byte in tlp.enabled_bytes():
            memory.write(at, bytes([byte]), source="card")
    else:
        start, length = tlp.byte_span()
        memory.write(start, tlp.data[start - tlp.address : start - tlp.address + length], source="card")
