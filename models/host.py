"""The host of a card, without a clock: software as generators of operations, and the root complex that performs them.

Software (enumeration, drivers) is a generator that yields operations and receives their results, so that cocotb, the
compiled card and plain Python drive the same software.

The root complex answers in every way that the bus allows, and on demand in ways that it does not; what the card does
against the rules is found and listed, never raised.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .memory import AccessFault
from .tlp import (
    TRANSLATED,
    TRANSLATION_REQUEST,
    UNTRANSLATED,
    CplStatus,
    MalformedTlp,
    Tlp,
    TlpType,
    decode,
    memory_read,
    memory_write,
    stray_bits,
)

if TYPE_CHECKING:
    from .host_iommu import HostIommu


def _check_size(size: int, sizes: tuple[int, ...]) -> None:
    if size not in sizes:
        raise ValueError(f"Size of an access must be one of {', '.join(map(str, sizes))} bytes, not {size!r}")


def _check_register(offset: int, size: int) -> None:
    _check_size(size, (1, 2, 4))
    if not 0 <= offset < 4096 or offset % size:
        raise ValueError(f"Offset of a configuration access must be below 4096 and aligned to its size, not {offset!r}")


def _check_value(value: int, size: int) -> None:
    if not 0 <= value < 1 << 8 * size:
        raise ValueError(f"A value to write must fit in {8 * size} bits without a sign, not {value!r}")


@dataclass(frozen=True, slots=True)
class ConfigRead:
    """Read 1, 2 or 4 aligned bytes of configuration space; result an int, all ones when no function answers."""

    function: int
    offset: int
    size: int

    def __post_init__(self):
        _check_register(self.offset, self.size)


@dataclass(frozen=True, slots=True)
class ConfigWrite:
    """Write 1, 2 or 4 aligned bytes of configuration space; result None."""

    function: int
    offset: int
    size: int
    value: int

    def __post_init__(self):
        _check_register(self.offset, self.size)
        _check_value(self.value, self.size)


@dataclass(frozen=True, slots=True)
class MemoryRead:
    """Read 1, 2, 4 or 8 bytes through the bus (a BAR); result an int, little-endian, all ones when nobody answers."""

    address: int
    size: int

    def __post_init__(self):
        _check_size(self.size, (1, 2, 4, 8))


@dataclass(frozen=True, slots=True)
class MemoryWrite:
    """Write 1, 2, 4 or 8 bytes through the bus (a BAR); posted: the result None comes at once."""

    address: int
    size: int
    value: int

    def __post_init__(self):
        _check_size(self.size, (1, 2, 4, 8))
        _check_value(self.value, self.size)


@dataclass(frozen=True, slots=True)
class Delay:
    """Let ``cycles`` pass; result None."""

    cycles: int


@dataclass(frozen=True, slots=True)
class WaitInterrupt:
    """Wait for one interrupt of a vector that was not waited for yet; result True, or False after the timeout."""

    function: int
    vector: int
    timeout_cycles: int


Operation = ConfigRead | ConfigWrite | MemoryRead | MemoryWrite | Delay | WaitInterrupt
Software = Generator[Operation, Any, Any]
Asked = TypeVar("Asked")


def run(software: Generator[Asked, Any, Any], perform: Callable[[Asked], Any]) -> Any:
    """Drive a generator to its end with ``perform(operation) -> result`` and return what it returns."""
    try:
        operation = next(software)
        while True:
            operation = software.send(perform(operation))
    except StopIteration as end:
        return end.value


# -- the root complex --


class Memory(Protocol):
    """What a host needs of its memory; `GuestMemory` and `AddressSpace` are two. Either call may raise `AccessFault`."""

    def read(self, address: int, length: int, *, source: str = "") -> bytes: ...
    def write(self, address: int, data: bytes, *, source: str = "") -> None: ...


FAULT_KINDS = ("UR", "CA", "POISON", "MISSING", "WRONG_BYTE_COUNT", "DUPLICATE", "WRONG_LOWER_ADDRESS", "WRONG_REQUESTER", "SHORT",
               "LATE")  # fmt: skip


@dataclass(slots=True)
class Fault:
    """One thing that shall go wrong with the answer to a read of the card.

    ``UR``, ``CA``: that status instead of data. ``POISON``: EP=1. ``MISSING``: nothing comes any more.
    ``WRONG_BYTE_COUNT``: 4 too many (or too few, at 4096). ``DUPLICATE``: sent twice. ``WRONG_LOWER_ADDRESS``: off by 4.
    ``WRONG_REQUESTER``: sent to another bus. ``SHORT``: one dword less than announced. ``LATE``: ``cycles`` later.

    Parameters
    ----------
    kind : :class:`str`
        One of `FAULT_KINDS`.
    match : callable
        Whether it concerns this request (a :class:`Tlp`).
    times : :class:`int`
        How many matching requests it strikes.
    at : :class:`int`
        Which completion of the answer it strikes, from 0; the last one, where there are fewer.
    cycles : :class:`int`
        Delay of ``LATE``, cycles.
    """

    kind: str
    match: Callable[[Tlp], bool]
    times: int = 1
    at: int = 0
    cycles: int = 100_000

    def __post_init__(self):
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"Kind of a fault must be one of {', '.join(FAULT_KINDS)}, not {self.kind!r}")


@dataclass
class CompletionPolicy:
    """How the host answers reads.

    Parameters
    ----------
    latency : :class:`int`
        Cycles from a request to its answer.
    jitter : :class:`int`
        Up to so many cycles more, per request.
    split : :class:`str`
        Where answers are cut: ``"max"`` as seldom as the rules allow, ``"rcb"`` at every read completion boundary,
        ``"random"`` at any legal set of boundaries.
    reorder : :class:`bool`
        Answers to different tags overtake each other and interleave; each answer keeps its own order.
    faults : list of :class:`Fault`
        The first that matches a request strikes it.
    """

    latency: int = 250
    jitter: int = 0
    split: str = "max"
    reorder: bool = False
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self):
        if self.latency < 0 or self.jitter < 0:
            raise ValueError(f"Latency and jitter must not be negative, not {self.latency!r} and {self.jitter!r}")
        if self.split not in ("max", "rcb", "random"):
            raise ValueError(f"Splitting must be 'max', 'rcb' or 'random', not {self.split!r}")


@dataclass(frozen=True, slots=True)
class Reply:
    """A TLP for the card, ``delay_cycles`` from now; tell `Host.sent` when the card has it."""

    tlp: Tlp
    delay_cycles: int
    ends: tuple[int, int] | None = None  # (requester ID, tag) of the read that this completion ends


@dataclass(frozen=True, slots=True)
class Interrupt:
    """An interrupt message; ``vector`` is None when no vector of the function asks for this message."""

    function: int
    vector: int | None
    address: int
    data: int


class Pending:
    """An operation under way.

    Attributes
    ----------
    tlps : list of :class:`Tlp`
        To be sent to the card now, in this order.
    done : :class:`bool`
        Nothing more is to come; posted writes are done at once.
    result : :class:`int` or None
        Of reads; all ones unless ``status`` is "OK".
    status : :class:`str`
        "" until done; then "OK", "UR", "CA", "CRS", "POISONED", "MALFORMED" or "TIMEOUT".
    """

    __slots__ = ("_change", "_parts", "done", "operation", "result", "retries", "status", "tlps")

    def __init__(self, operation: Operation):
        self.operation, self.tlps = operation, []
        self.done, self.status, self.retries = False, "", 0
        self.result: int | None = None
        self._parts: list[_Part] = []
        self._change: tuple[int, int] | None = None  # (register, value) of a write that `_Function` follows

    def __repr__(self) -> str:
        return f"Pending({self.operation!r}, {self.status or 'under way'})"


@dataclass(slots=True)
class _Part:
    """One non-posted request of the host and what has come back."""

    pending: Pending
    tlp: Tlp
    start: int  # byte address of the first byte that is still due
    left: int  # bytes that are still due
    completer_id: int | None  # that the function must use
    data: bytearray = field(default_factory=bytearray)
    is_lost: bool = False  # given up: its tag waits for the completion


_RESET_CONTROL = 0x2810  # Device Control after reset: RO and NS enabled, MRRS 512, MPS 128 [PCIe5 7.5.3.4]
_COMMAND, _BUS_MASTER = 0x04, 0x0004  # [PCIe5 7.5.1.1.3]
_DEVICE_CONTROL, _DEVICE_CONTROL_2 = 8, 0x28  # offsets in the PCI Express capability
_EXT_TAG, _FLR = 1 << 8, 1 << 15
_ATS = -2  # stands for Control of the ATS capability [PCIe5 10.5.1.3]
_ATS_CAP, _ATS_ENABLE, _INVALIDATION_COMPLETION = 0x0F, 1 << 15, 0x02  # extended capability; bit of Control; message code
_PRI_CAP, _PRI_ENABLE, _PRI_RESET, _PRI_STOPPED, _PAGE_REQUEST = 0x13, 1 << 0, 1 << 1, 1 << 8, 0x04  # likewise
_PASID = -3  # stands for Control of the PASID capability [PCIe5 7.8.8.3]
_PASID_CAP, _PASID_ENABLE = 0x1B, 1 << 0  # likewise
_VFS, _VF_ENABLE = -1, 1 << 0  # stands for Control of the SR-IOV capability, whose place differs; a bit of it [PCIe5 9.3.3.3]


def _reset_values(control: int = _RESET_CONTROL) -> dict[int, list[int]]:
    """Return the registers that are followed as they are behind a reset, with this Device Control."""
    return {_COMMAND: [0], _DEVICE_CONTROL: [control], _DEVICE_CONTROL_2: [0], _VFS: [0], _ATS: [0], _PASID: [0]}


class _Function:
    """What the host let one function do: Command and Device Control as written, with those writes that are under way.

    While a write is under way the card may act by the old value or by the new one; what either allows is allowed. ``grace``: a
    write ended, and reads that the card made before it may still come, until the next completion. So may writes after the
    completion that a function level reset begins with: the card answers first and resets then. [PCIe5 6.6.2]

    A virtual function is bus master on its own; all else that its requests must keep to is set in its ``physical`` one, whose end of
    VF Enable and whose reset end it as well. [PCIe5 9.2.2, 9.3.5.4]
    """

    __slots__ = ("atomics", "ats", "ats_enabled", "bars", "before", "bus_master", "ext_tag", "grace", "mps", "mrrs", "msix", "name",
                 "no_snoop", "pasid", "pasid_bits", "pasid_enabled", "payload", "pcie", "physical", "relaxed_ordering", "sriov",
                 "ten_bit_tags", "values", "virtual", "was_master")  # fmt: skip

    def __init__(self, name: str):
        self.name = name
        self.pcie = self.sriov = self.ats = self.pasid = 0  # offsets of the capabilities, 0 while they are unknown
        self.pasid_bits = 0
        self.physical: _Function | None = None
        self.virtual: list[_Function] = []
        self.values = _reset_values()
        self.bars: list[tuple[int, int]] = []  # (address, size)
        self.msix: _MsixShadow | None = None
        self.grace = 0
        self.was_master = False  # in front of that reset
        self.before: list[int] = []  # Device Control in front of a function level reset, for the time of grace
        self.refresh()

    @property
    def may_write(self) -> bool:
        return self.bus_master or self.was_master

    def refresh(self) -> None:
        source = self.physical or self
        commands, controls = self.values[_COMMAND], source.values[_DEVICE_CONTROL]
        self.bus_master = any(value & _BUS_MASTER for value in commands)
        self.ats_enabled = any(value & _ATS_ENABLE for value in self.values[_ATS])
        self.pasid_enabled = any(value & _PASID_ENABLE for value in source.values[_PASID])
        sizes = [128 << min(value >> 5 & 7, 5) for value in controls]
        self.mps, self.payload = max(sizes), min(sizes)  # what the card may send; what it surely takes
        controls = controls + source.before
        self.mrrs = max(128 << min(value >> 12 & 7, 5) for value in controls)
        self.relaxed_ordering = any(value >> 4 & 1 for value in controls)
        self.no_snoop = any(value >> 11 & 1 for value in controls)
        self.ext_tag = any(value & _EXT_TAG for value in controls)
        controls = source.values[_DEVICE_CONTROL_2]
        self.atomics = any(value >> 6 & 1 for value in controls)
        self.ten_bit_tags = {bool(value >> 12 & 1) for value in controls}  # two in it: either is allowed
        for function in self.virtual:
            function.refresh()

    def written(self, operation: ConfigWrite) -> tuple[int, int] | None:
        """Return (which register, its new value) when the write concerns one that is followed."""
        places = ((_COMMAND, _COMMAND, True), (_DEVICE_CONTROL, self.pcie + _DEVICE_CONTROL, self.pcie),
                  (_DEVICE_CONTROL_2, self.pcie + _DEVICE_CONTROL_2, self.pcie), (_VFS, self.sriov + 8, self.sriov),
                  (_ATS, self.ats + 6, self.ats), (_PASID, self.pasid + 6, self.pasid))  # fmt: skip
        for which, offset, is_known in places:
            if is_known and operation.offset < offset + 2 and offset < operation.offset + operation.size:
                raw = bytearray(self.values[which][-1].to_bytes(2, "little"))
                data = operation.value.to_bytes(operation.size, "little")
                for n in range(2):
                    if 0 <= offset + n - operation.offset < operation.size:
                        raw[n] = data[offset + n - operation.offset]
                return which, int.from_bytes(raw, "little")
        return None

    def begin(self, change: tuple[int, int]) -> None:
        """A write is under way."""
        self.values[change[0]].append(change[1])
        self.refresh()

    def end(self, change: tuple[int, int], status: str) -> None:
        """A write ended: its value is the one that counts, or never was; after a timeout both may be true."""
        which, value = change
        values = self.values[which]
        n = values.index(value, 1)
        self.before, self.was_master = [], False
        if status == "OK":
            if which == _DEVICE_CONTROL and value & _FLR:  # Max_Payload_Size survives [PCIe5 6.6.2]
                self.before, self.was_master = values[:n], self.bus_master
            del values[:n]
            if self.before:
                self.values = _reset_values(_RESET_CONTROL & ~0xE0 | value & 0xE0)
                self.msix = self.msix and _MsixShadow(self.msix.address, self.msix.count)
            if self.before or (which == _VFS and not value & _VF_ENABLE):
                for function in self.virtual:
                    function.vanish()
        elif status != "TIMEOUT":
            del values[n]
        self.refresh()
        self.grace = 1

    def vanish(self) -> None:
        """A virtual function ends; as after a reset, what it has sent by then may still come."""
        self.was_master, self.grace = self.bus_master, 1
        self.values = _reset_values()
        self.bars, self.msix = [], self.msix and _MsixShadow(self.msix.address, self.msix.count)
        self.refresh()

    def end_grace(self) -> None:
        """The card had time enough."""
        if self.grace:
            self.grace, self.before, self.was_master = 0, [], False
            self.refresh()


class _MsixShadow:
    """What software wrote to an MSI-X table."""

    def __init__(self, address: int, count: int):
        self.address, self.count = address, count
        self.raw = bytearray(16 * count)
        self.exact: dict[tuple[int, int], int] = {}  # message -> vector
        self.by_data: dict[int, int] = {}  # data that only one vector has -> vector

    def write(self, address: int, data: bytes) -> None:
        at = address - self.address
        if not -len(data) < at < len(self.raw):
            return
        for n in range(len(data)):
            if 0 <= at + n < len(self.raw):
                self.raw[at + n] = data[n]
        self.exact.clear()
        self.by_data.clear()
        times: Counter[int] = Counter()
        for vector in range(self.count):
            where, what = (int.from_bytes(self.raw[16 * vector + low : 16 * vector + high], "little") for low, high in ((0, 8), (8, 12)))
            if where:
                self.exact.setdefault((where & ~3, what), vector)
                self.by_data[what] = vector
                times[what] += 1
        for what in [what for what in times if times[what] > 1]:
            del self.by_data[what]

    def find(self, address: int, data: int) -> int | None:
        """Return the vector with this message; by its data alone where the IOMMU changed the address."""
        return self.exact.get((address, data), self.by_data.get(data))


@dataclass(slots=True)
class Statistics:
    """What the card made the host do so far; bytes are payload bytes that were enabled."""

    received: int = 0
    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    atomics: int = 0
    interrupts: int = 0
    messages: int = 0
    completions: int = 0
    unsupported: int = 0
    late_completions: int = 0
    most_outstanding: int = 0


_PADDING = b"\xEE" * 4  # what a completion holds beside the bytes that were asked for: nothing to rely on
_KNOWN_MESSAGES = {0x02, 0x04, 0x10, 0x12, 0x14, 0x18, 0x1B, *range(0x20, 0x28), 0x30, 0x31, 0x33, 0x7E, 0x7F}  # [PCIe5 F]
_CRS_RETRIES = 100
_ACCESSES = frozenset({TlpType.MRD, TlpType.MWR, TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS})


class Host:
    """A root complex with one card, without a clock: TLPs of the card go in, TLPs for the card come out.

    Every request of the card gets its answer in the replies of one `receive`, whatever it is; every operation ends in the
    answers of the card or in `abandon`. Reads see memory as it is when they are received. Answers leave in the order of
    the requests unless the policy reorders; none leaves before ``latency``.

    Parameters
    ----------
    memory : :class:`Memory`
        What the card's requests reach; `AccessFault` makes a read Unsupported Request (EP=1 when "poisoned").
    rng : :class:`random.Random`
        Every choice is drawn from it.
    policy : :class:`CompletionPolicy`
        How reads are answered; may be changed at any time.
    bus : :class:`int`
        Bus number of the card; function n is ``bus:00`` with function number n.
    mps, mrrs, rcb : :class:`int`
        Bytes: what `enumerate` allows the card, and where completions are cut.
    ext_tag : :class:`bool`
        Whether `enumerate` enables tags of 8 bits.
    msi_window : tuple of :class:`int`
        (address, length) of the interrupt controller: writes there are interrupts.
    iommu : :class:`.host_iommu.HostIommu` or None
        In front of memory, behind the interrupt controller; without, only untranslated requests are understood.

    Attributes
    ----------
    violations : list of :class:`str`
        Rules that the card broke, in the order in which that was seen.
    interrupts : list of :class:`Interrupt`
        In the order of their arrival.
    interrupt_counts : :class:`collections.Counter`
        Interrupts per (address, data).
    messages : list of :class:`Tlp`
        Message TLPs of the card.
    outstanding : dict
        (requester ID, tag) of reads whose answer the card does not have yet -> the request.
    statistics : :class:`Statistics`
    """

    ROUTING_ID = 0  # bus 0, device 0, function 0: requester and completer ID of the root complex

    def __init__(self, memory: Memory, *, rng: random.Random, policy: CompletionPolicy | None = None, bus: int = 1, mps: int = 256,
                 mrrs: int = 512, rcb: int = 64, ext_tag: bool = True,
                 msi_window: tuple[int, int] = (0xFEE0_0000, 0x10_0000), iommu: HostIommu | None = None):  # fmt: skip
        for name, value in (("Max_Payload_Size", mps), ("Max_Read_Request_Size", mrrs)):
            if value not in (128, 256, 512, 1024, 2048, 4096):
                raise ValueError(f"{name} must be a power of two between 128 and 4096, not {value!r}")
        if rcb not in (64, 128):
            raise ValueError(f"Read completion boundary must be 64 or 128, not {rcb!r}")
        if not 0 <= bus < 256:
            raise ValueError(f"Bus number must be between 0 and 255, not {bus!r}")
        self.iommu = iommu
        self.memory, self.rng, self.policy = memory, rng, policy or CompletionPolicy()
        self.bus, self.mps, self.mrrs, self.rcb, self.ext_tag, self.msi_window = bus, mps, mrrs, rcb, ext_tag, msi_window
        self.window_32, self.window_64 = [0xE000_0000, 0xFE00_0000], [0x10_0000_0000, 0x20_0000_0000]  # what is left for BARs
        self.violations: list[str] = []
        self.interrupts: list[Interrupt] = []
        self.interrupt_counts: Counter[tuple[int, int]] = Counter()
        self.messages: list[Tlp] = []
        self.outstanding: dict[tuple[int, int], Tlp] = {}
        self.statistics = Statistics()
        self._functions: dict[int, _Function] = {}
        self._arrived: Counter[tuple[int, int | None]] = Counter()  # interrupts that nobody waited for yet
        self._parts: dict[int, _Part] = {}  # by tag
        self._captured: dict[int, int] = {}  # function -> routing ID of its configuration writes [PCIe5 2.2.6.2]
        self._next_tag = 0
        self._last_due = 0

    # -- the host asks the card --

    def start(self, operation: Operation) -> Pending:
        """Begin a configuration or memory operation: ``tlps`` of the answer are to be sent now.

        A memory operation is one TLP unless it crosses 4 KiB. RuntimeError when all 256 tags are in use.
        """
        pending = Pending(operation)
        match operation:
            case ConfigRead(function, offset, size) | ConfigWrite(function, offset, size):
                is_write = isinstance(operation, ConfigWrite)
                data = b""
                if isinstance(operation, ConfigWrite):
                    data = (operation.value << 8 * (offset % 4)).to_bytes(4, "little")
                    pending._change = self.function(function).written(operation)
                    if pending._change:
                        self.function(function).begin(pending._change)
                tlp = Tlp(TlpType.CFGWR0 if is_write else TlpType.CFGRD0, length_dw=1, requester_id=self.ROUTING_ID, tag=self._tag(),
                          first_be=(1 << size) - 1 << offset % 4, completer_id=self.bus << 8 | function, register=offset & ~3,
                          data=data)  # fmt: skip
                if is_write:
                    self._captured[function] = tlp.completer_id
                self._expect(pending, tlp, 0, 4, function)
            case MemoryRead(address, size):
                for at, length in _within_pages(address, size):
                    tlp = memory_read(at, length, requester_id=self.ROUTING_ID, tag=self._tag())
                    self._expect(pending, tlp, at, length, self._owner(at))
            case MemoryWrite(address, size, value):
                data = value.to_bytes(size, "little")
                for at, length in _within_pages(address, size):
                    pending.tlps.append(memory_write(at, data[at - address : at - address + length], requester_id=self.ROUTING_ID))
                for function in self._functions.values():
                    if function.msix is not None:
                        function.msix.write(address, data)
                pending.done, pending.status = True, "OK"
            case _:
                raise TypeError(f"A host starts configuration and memory operations, not {operation!r}")
        return pending

    def abandon(self, pending: Pending) -> None:
        """Give an operation up that the card does not answer: it ends with "TIMEOUT"; its tags wait for their completions."""
        if not pending.done:
            for part in pending._parts:
                part.is_lost = True
            self._finish(pending, "TIMEOUT")

    def _tag(self) -> int:
        for _ in range(256):
            tag = self._next_tag
            self._next_tag = (tag + 1) % 256
            if tag not in self._parts:
                return tag
        raise RuntimeError("All 256 tags of the host are in use")

    def _expect(self, pending: Pending, tlp: Tlp, start: int, length: int, function: int | None) -> None:
        """``function``: that is to answer, None when nobody is known to."""
        part = _Part(pending, tlp, start, length, None if function is None else self._identity(function))
        pending._parts.append(part)
        pending.tlps.append(tlp)
        self._parts[tlp.tag] = part

    def _identity(self, function: int) -> int:
        """Return the routing ID that a function must use: as captured, of a virtual one by its physical one. [PCIe5 2.2.6.2, 9.2.1.2]"""
        this = self._functions.get(function)
        owner = next((n for n, known in self._functions.items() if any(one is this for one in known.virtual)), None)
        return self._captured.get(function, function) if owner is None else self._captured.get(owner, owner) & ~0xFF | function

    def _finish(self, pending: Pending, status: str) -> None:
        operation = pending.operation
        pending.done, pending.status = True, status
        if isinstance(operation, ConfigRead | MemoryRead):
            pending.result = (1 << 8 * operation.size) - 1
            if status == "OK":
                data = b"".join([bytes(part.data) for part in pending._parts])
                if isinstance(operation, ConfigRead):
                    data = data[operation.offset % 4 :][: operation.size]
                pending.result = int.from_bytes(data, "little")
        elif isinstance(operation, ConfigWrite) and pending._change:
            function = self.function(operation.function)
            function.end(pending._change, status)
            for number, known in self._functions.items() if self.iommu is not None else ():
                if not known.ats_enabled and (known is function or known in function.virtual):
                    self.iommu.forget(self.bus << 8 | number)

    def _complete(self, tlp: Tlp) -> list[Reply]:
        """Take a completion of the card. [PCIe5 2.2.9, 2.3.2]"""
        part = self._parts.get(tlp.tag) if tlp.requester_id == self.ROUTING_ID else None
        if part is None:
            self._broken("unexpected completion", tlp)
            return []
        if part.is_lost:
            self.statistics.late_completions += 1
            if tlp.status != CplStatus.SC or tlp.byte_count <= 4 * tlp.length_dw or not tlp.length_dw:
                del self._parts[tlp.tag]
            return []
        request, pending = part.tlp, part.pending
        wanted = request.type in (TlpType.CFGRD0, TlpType.MRD)  # data
        if part.completer_id is not None and tlp.completer_id != part.completer_id:
            is_nobody = tlp.status == CplStatus.UR and request.type is not TlpType.MRD  # no function claims it: any number
            if not is_nobody or tlp.completer_id & ~7 not in {0, *(known & ~7 for known in self._captured.values())}:
                self._broken(f"completer ID is not {part.completer_id:#06x} [PCIe5 2.2.9]", tlp)
        if (tlp.tc, tlp.relaxed_ordering, tlp.no_snoop, tlp.ido) != (request.tc, request.relaxed_ordering, request.no_snoop,
                                                                     request.ido):  # fmt: skip
            self._broken("TC or attributes are not those of the request", tlp)
        is_memory = request.type is TlpType.MRD
        count, low = (part.left, part.start & 0x7F) if is_memory else (4, 0)
        if tlp.status != CplStatus.SC:
            if tlp.type is not TlpType.CPL:
                self._broken("a completion without success carries data", tlp)
            if tlp.status == CplStatus.CRS and not is_memory and pending.retries < _CRS_RETRIES:
                pending.retries += 1
                return [Reply(request, self.policy.latency)]
            if tlp.status not in (CplStatus.UR, CplStatus.CA) and (tlp.status != CplStatus.CRS or is_memory):
                self._broken("status is reserved", tlp)
            del self._parts[tlp.tag]
            status = tlp.status.name if isinstance(tlp.status, CplStatus) else "UR"
            return self._give_up(pending, status)
        if tlp.type is not (TlpType.CPLD if wanted else TlpType.CPL):
            self._broken(f"answer to a {request.type.name} is of the wrong type", tlp)
            return self._malformed(tlp, pending)
        if tlp.byte_count != count or tlp.lower_address != low:
            self._broken(f"byte count and lower address must be {count} and {low:#x}", tlp)
            return self._malformed(tlp, pending)
        if wanted:
            given = 4 * tlp.length_dw - part.start % 4 if is_memory else 4
            if tlp.length_dw * 4 > self.function((part.completer_id or 0) & 0xFF).mps:
                self._broken("payload is longer than Max_Payload_Size", tlp)
            if given >= part.left + 4 or (not is_memory and tlp.length_dw != 1):
                self._broken(f"{tlp.length_dw} dwords for {part.left} bytes", tlp)
                return self._malformed(tlp, pending)
            if given < part.left and (part.start + given) % 128:
                self._broken("a completion that is not the last ends beside a 128-byte boundary", tlp)
            if tlp.poisoned:
                del self._parts[tlp.tag]
                return self._give_up(pending, "POISONED")
            given = min(given, part.left)
            skip = part.start % 4 if is_memory else 0
            part.data += tlp.data[skip : skip + given]
            part.start, part.left = part.start + given, part.left - given
            if part.left:
                return []
        del self._parts[tlp.tag]
        part.left = 0
        for function in self._functions.values():
            function.end_grace()
        if all(other.left == 0 for other in pending._parts):
            self._finish(pending, "OK")
        return []

    def _malformed(self, tlp: Tlp, pending: Pending) -> list[Reply]:
        del self._parts[tlp.tag]
        return self._give_up(pending, "MALFORMED")

    def _give_up(self, pending: Pending, status: str) -> list[Reply]:
        """End an operation of which a part failed; its other parts' tags wait for their completions."""
        for part in pending._parts:
            part.is_lost = True
        self._finish(pending, status)
        return []

    # -- the card asks the host --

    def receive(self, tlp: Tlp | Sequence[int], now: int = 0) -> list[Reply]:
        """Take one TLP of the card (or its dwords) and return what is to be sent in answer, in order.

        ``now``: the cycle; needed only so that answers of requests at different times keep their order under jitter.
        """
        if not isinstance(tlp, Tlp):
            dwords = tlp
            try:
                tlp = decode(dwords)
            except MalformedTlp as error:
                self.violations.append(f"malformed TLP: {error.reason}: {' '.join(f'{dword:08x}' for dword in dwords[:8])}")
                return []
            if stray := stray_bits(dwords, tlp):
                self._broken(f"reserved bits are set: {', '.join(f'dword {n}: {bits:#010x}' for n, bits in stray)}", tlp)
        self.statistics.received += 1
        kind = tlp.type
        if kind.is_completion:
            return self._complete(tlp)
        function = self._functions.get(tlp.requester_id & 0xFF) if tlp.requester_id >> 8 == self.bus else None
        if function is None:
            self._broken("requester ID is of no function of the card", tlp)
            function = _Function("unknown")
            function.bus_master = True  # one broken rule is enough
        if tlp.tc or tlp.at or tlp.ido or tlp.td or tlp.pasid is not None or tlp.relaxed_ordering or tlp.no_snoop or tlp.poisoned:
            self._check_attributes(tlp, function)
        is_refused, asked = False, tlp
        if self.iommu is not None and kind in _ACCESSES and tlp.at != TRANSLATION_REQUEST and not self._is_message(tlp):
            routed, fault = self.iommu.routed(tlp)
            is_refused, tlp = routed is None, routed or tlp
            if fault:
                self._broken(fault, tlp)
        if kind is TlpType.MWR:
            if not is_refused:
                self._write(tlp, function)
            return []
        if kind is TlpType.MSG or kind is TlpType.MSGD:
            self.statistics.messages += 1
            self.messages.append(tlp)
            if tlp.message_code not in _KNOWN_MESSAGES:
                self._broken("message with an unknown code", tlp)
            if tlp.message_code == _INVALIDATION_COMPLETION:
                fault = "nobody asked for it"
                if self.iommu is not None:
                    fault = self.iommu.completed(tlp, self.ROUTING_ID, list(self.outstanding.values()))
                if fault:
                    self._broken(f"Invalidate Completion: {fault}", tlp)
            if tlp.message_code == _PAGE_REQUEST:
                fault = "nobody takes it" if self.iommu is None else self.iommu.page_requested(tlp)
                if fault:
                    self._broken(f"Page Request: {fault}", tlp)
            return []
        key = (tlp.requester_id, tlp.tag)
        if key in self.outstanding:
            self._broken("tag is still in use", tlp)
        if tlp.tag > 255:
            if True not in function.ten_bit_tags and not function.grace:
                self._broken("tag is wider than enabled", tlp)
        elif function.ten_bit_tags == {True} and not function.grace:
            self._broken("tag of 10 bits has 00 in bits 9:8 [PCIe5 2.2.6.2]", tlp)
        elif tlp.tag > 31 and not function.ext_tag:
            self._broken("tag is wider than enabled", tlp)
        self.outstanding[key] = asked
        if len(self.outstanding) > self.statistics.most_outstanding:
            self.statistics.most_outstanding = len(self.outstanding)
        if is_refused:
            start, length = tlp.byte_span()
            self.statistics.unsupported += 1
            completions, late = [self._refusal(tlp, CplStatus.UR, length or 1, start & 0x7F)], None
        elif self.iommu is not None and kind is TlpType.MRD and tlp.at == TRANSLATION_REQUEST:
            completions, late = self._translate(tlp, function)
        elif kind is TlpType.MRD:
            completions, late = self._read(tlp, function)
        elif kind in (TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS):
            completions, late = self._atomic(tlp, function)
        else:
            self._broken("a card does not send this request", tlp)
            completions, late = [self._refusal(tlp, CplStatus.UR, 4, 0)], None
        return self._replies(tlp, completions, late, now)

    def sent(self, reply: Reply) -> None:
        """The card has this reply now: when it ended a read, the tag may be used again."""
        if reply.ends is not None:
            self.outstanding.pop(reply.ends, None)

    def _broken(self, rule: str, tlp: Tlp) -> None:
        self.violations.append(f"{rule}: {tlp}")

    def _check_attributes(self, tlp: Tlp, function: _Function) -> None:
        has_ats = self.iommu is not None and (function.ats_enabled or function.grace)
        for is_broken, rule in (
            (tlp.at and not has_ats, "address type is not 'untranslated'"),
            (tlp.tc, "traffic class is not 0"), (tlp.ido, "IDO is not enabled"),
            (tlp.td, "digest is not enabled"), (tlp.poisoned, "request is poisoned"),
            (tlp.relaxed_ordering and not function.relaxed_ordering, "Relaxed Ordering is not enabled"),
            (tlp.no_snoop and not function.no_snoop, "No Snoop is not enabled"),
        ):  # fmt: skip
            if is_broken:
                self._broken(rule, tlp)
        if tlp.pasid is not None:
            self._check_pasid(tlp, function)

    def _check_pasid(self, tlp: Tlp, function: _Function) -> None:
        """Only untranslated memory requests, translation requests and Page Requests have a PASID. [PCIe5 6.20, 10.2, 10.4.1]"""
        may = tlp.type in _ACCESSES and tlp.at != TRANSLATED and not self._is_message(tlp)
        value, execute, privileged = tlp.pasid or (0, False, False)
        for is_broken, rule in (
            (not function.pasid_enabled and not function.grace, "PASID is not enabled"),
            (not may and (tlp.type is not TlpType.MSG or tlp.message_code != _PAGE_REQUEST), "PASID where there may be none"),
            (value >> (function.physical or function).pasid_bits, "PASID is wider than the capability says"),
            (execute or privileged, "Execute or Privileged Mode is requested without being supported"),
        ):  # fmt: skip
            if is_broken:
                return self._broken(rule, tlp)

    def _write(self, tlp: Tlp, function: _Function) -> None:
        if not function.may_write:
            self._broken("write without bus master", tlp)
        if 4 * tlp.length_dw > function.mps:
            self._broken(f"payload is longer than Max_Payload_Size {function.mps}", tlp)
        start, length = tlp.byte_span()
        window, size = self.msi_window
        if window <= start < window + size or (
            function.msix is not None and tlp.length_dw == 1
            and (tlp.address, int.from_bytes(tlp.data, "little")) in function.msix.exact
        ):  # fmt: skip
            self._interrupt(tlp, function)
            return
        statistics = self.statistics
        statistics.writes += 1
        statistics.written_bytes += length
        try:
            if tlp.poisoned and hasattr(self.memory, "poison"):
                self.memory.write(start, bytes(length), source=function.name)
                self.memory.poison(start, length)
            elif not tlp.poisoned and not tlp.has_gaps:
                at = start - tlp.address
                self.memory.write(start, tlp.data[at : at + length], source=function.name)
            elif not tlp.poisoned:
                for at, byte in tlp.enabled_bytes():
                    self.memory.write(at, bytes([byte]), source=function.name)
        except AccessFault as fault:
            self._broken(f"write refused by memory ({fault.reason})", tlp)

    def _is_message(self, tlp: Tlp) -> bool:
        """Whether a request goes to the interrupt controller, untranslated as it must. [PCIe5 6.1.4]"""
        window, size = self.msi_window
        return tlp.type is TlpType.MWR and tlp.at == UNTRANSLATED and window <= tlp.address < window + size

    def _interrupt(self, tlp: Tlp, function: _Function) -> None:
        """[PCIe5 6.1.4]: one dword, all of it enabled; no other write of the function follows it up or overtakes it."""
        if (tlp.length_dw, tlp.first_be, tlp.last_be) != (1, 15, 0):
            self._broken("interrupt is not one write of one whole dword", tlp)
        if tlp.relaxed_ordering:
            self._broken("interrupt may overtake the writes before it", tlp)
        data = int.from_bytes(tlp.data[:4], "little")
        vector = None
        if function.msix is not None:
            vector = function.msix.find(tlp.address, data)
            if vector is None:
                self._broken(f"interrupt that no vector of {function.name} asks for", tlp)
        number = tlp.requester_id & 0xFF
        self.statistics.interrupts += 1
        self.interrupts.append(Interrupt(number, vector, tlp.address, data))
        self.interrupt_counts[tlp.address, data] += 1
        self._arrived[number, vector] += 1

    def take_interrupt(self, function: int, vector: int) -> bool:
        """Return whether an interrupt of this vector has arrived that was not taken yet, and take it."""
        if not self._arrived[function, vector]:
            return False
        self._arrived[function, vector] -= 1
        return True

    def _read(self, tlp: Tlp, function: _Function) -> tuple[list[Tlp], tuple[int, int] | None]:
        """Return the completions of a read; (index, cycles) from where on they are late."""
        if not function.bus_master and not function.grace:
            self._broken("read without bus master", tlp)
        if 4 * tlp.length_dw > function.mrrs:
            self._broken(f"read is longer than Max_Read_Request_Size {function.mrrs}", tlp)
        start, length = tlp.byte_span()
        statistics = self.statistics
        statistics.reads += 1
        statistics.read_bytes += length
        completions = self._answer(tlp, start, length, min(function.payload, self.mps), function.name)
        for fault in self.policy.faults:
            if fault.times > 0 and fault.match(tlp):
                fault.times -= 1
                return self._spoil(tlp, completions, fault)
        return completions, None

    def _translate(self, tlp: Tlp, function: _Function) -> tuple[list[Tlp], tuple[int, int] | None]:
        """Answer a translation request; returns as `_read`. [PCIe5 10.2.3]"""
        if not function.bus_master and not function.grace:
            self._broken("translation request without bus master", tlp)
        assert self.iommu is not None
        status, data, fault = self.iommu.translated(tlp)
        if fault:
            self._broken(f"translation request: {fault}", tlp)
        if status is not CplStatus.SC:
            return [self._refusal(tlp, status, 4 * tlp.length_dw, 0)], None
        found = [Tlp(TlpType.CPLD, tc=tlp.tc, length_dw=len(data) // 4, requester_id=tlp.requester_id, tag=tlp.tag,
                     completer_id=self.ROUTING_ID, byte_count=len(data), data=data)]  # fmt: skip
        for fault in self.policy.faults:
            if fault.times > 0 and fault.match(tlp):
                fault.times -= 1
                return self._spoil(tlp, found, fault)
        return found, None

    def _atomic(self, tlp: Tlp, function: _Function) -> tuple[list[Tlp], tuple[int, int] | None]:
        """Do an AtomicOp, whose answer is what memory held before; returns as `_read`. [PCIe5 2.2.7, 6.15]"""
        if not function.bus_master and not function.grace:
            self._broken("AtomicOp without bus master", tlp)
        if not function.atomics and not function.grace:
            self._broken("AtomicOp is not enabled", tlp)
        self.statistics.atomics += 1
        is_cas = tlp.type is TlpType.CAS
        size = len(tlp.data) // (2 if is_cas else 1)
        operands = [int.from_bytes(tlp.data[at : at + size], "little") for at in range(0, len(tlp.data), size)]
        try:
            old = self.memory.read(tlp.address, size, source=function.name)
            value = int.from_bytes(old, "little")
            if tlp.type is TlpType.FETCHADD:
                new = (value + operands[0]) % (1 << 8 * size)
            elif is_cas:  # compare value first, then the one to store
                new = operands[1] if value == operands[0] else value
            else:
                new = operands[0]
            if not tlp.poisoned:
                self.memory.write(tlp.address, new.to_bytes(size, "little"), source=function.name)
        except AccessFault:
            self.statistics.unsupported += 1
            return [self._refusal(tlp, CplStatus.UR, size, 0)], None
        answer = Tlp(TlpType.CPLD, tc=tlp.tc, relaxed_ordering=tlp.relaxed_ordering, no_snoop=tlp.no_snoop, ido=tlp.ido,
                     length_dw=size // 4, requester_id=tlp.requester_id, tag=tlp.tag, completer_id=self.ROUTING_ID, byte_count=size,
                     data=old)  # fmt: skip
        for fault in self.policy.faults:
            if fault.times > 0 and fault.match(tlp):
                fault.times -= 1
                return self._spoil(tlp, [answer], fault)
        return [answer], None

    def _answer(self, tlp: Tlp, start: int, length: int, payload: int, source: str) -> list[Tlp]:
        """Return good completions, or the one that refuses. [PCIe5 2.3.1.1]"""
        memory, base = self.memory, tlp.address
        if tlp.at:
            return [self._refusal(tlp, CplStatus.UR, length or 1, start & 0x7F)]
        try:
            raw = memory.read(start, length or 4, source=source)
        except AccessFault as fault:
            if fault.reason != "poisoned":
                self.statistics.unsupported += 1
                return [self._refusal(tlp, CplStatus.UR, length or 1, start & 0x7F)]
            raw = None
        top = base + 4 * tlp.length_dw
        found, at, end = [], base, start + length
        if raw is not None:
            raw = _PADDING[: start - base] + raw + _PADDING[: (top - end) % 4] if length else _PADDING
        while at < top:
            stop = self._cut(at, top, payload)
            if raw is not None:
                data, poisoned = raw[at - base : stop - base], False
            else:
                data, poisoned = self._damaged(max(at, start), min(stop, end), source)
                data = (_PADDING[: max(at, start) - at] + data).ljust(stop - at, b"\xEE")
            first = start if at == base else at
            found.append(Tlp(TlpType.CPLD, tc=tlp.tc, relaxed_ordering=tlp.relaxed_ordering, no_snoop=tlp.no_snoop, ido=tlp.ido,
                             poisoned=poisoned, length_dw=(stop - at) // 4, requester_id=tlp.requester_id, tag=tlp.tag,
                             completer_id=self.ROUTING_ID, byte_count=(end - first) or 1, lower_address=first & 0x7F,
                             data=data))  # fmt: skip
            at = stop
        return found

    def _damaged(self, begin: int, end: int, source: str) -> tuple[bytes, bool]:
        """Return the data of one completion of a read that meets poison somewhere, and whether it is here."""
        try:
            return self.memory.read(begin, end - begin, source=source), False
        except AccessFault:
            return bytes(max(0, end - begin)), True

    def _cut(self, at: int, top: int, payload: int) -> int:
        """Return where the completion that starts at ``at`` ends: at a read completion boundary, or with the request."""
        rcb = self.rcb
        nearest = at - at % rcb + rcb
        farthest = at + payload - (at + payload) % rcb if at + payload < top else top
        if self.policy.split == "max":
            return farthest
        if self.policy.split == "rcb" or farthest <= nearest:
            return min(nearest, top)
        places = [*range(nearest, farthest, rcb), farthest]
        return places[self.rng.randrange(len(places))]

    def _refusal(self, tlp: Tlp, status: CplStatus, byte_count: int, lower_address: int) -> Tlp:
        return Tlp(TlpType.CPLLK if tlp.type is TlpType.MRDLK else TlpType.CPL, tc=tlp.tc, relaxed_ordering=tlp.relaxed_ordering,
                   no_snoop=tlp.no_snoop, ido=tlp.ido, requester_id=tlp.requester_id, tag=tlp.tag, completer_id=self.ROUTING_ID,
                   status=status, byte_count=byte_count, lower_address=lower_address)  # fmt: skip

    def _spoil(self, tlp: Tlp, good: list[Tlp], fault: Fault) -> tuple[list[Tlp], tuple[int, int] | None]:
        """Let ``fault`` strike good completions; returns as `_read`."""
        at = min(fault.at, len(good) - 1)
        struck = good[at]
        match fault.kind:
            case "UR" | "CA":
                return [*good[:at], self._refusal(tlp, CplStatus[fault.kind], struck.byte_count, struck.lower_address)], None
            case "MISSING":
                return good[:at], None
            case "LATE":
                return good, (at, fault.cycles)
            case "DUPLICATE":
                return [*good[: at + 1], *good[at:]], None
            case "POISON":
                struck = replace(struck, poisoned=True)
            case "WRONG_BYTE_COUNT":
                struck = replace(struck, byte_count=struck.byte_count + (4 if struck.byte_count <= 4092 else -4))
            case "WRONG_LOWER_ADDRESS":
                struck = replace(struck, lower_address=struck.lower_address ^ 4)
            case "WRONG_REQUESTER":
                struck = replace(struck, requester_id=struck.requester_id ^ 0x0100)
            case "SHORT" if struck.length_dw > 1:
                struck = replace(struck, length_dw=struck.length_dw - 1, data=struck.data[:-4])
            case "SHORT":
                struck = replace(struck, type=TlpType.CPL, length_dw=0, data=b"")
        return [*good[:at], struck, *good[at + 1 :]], None

    def _replies(self, tlp: Tlp, completions: list[Tlp], late: tuple[int, int] | None, now: int) -> list[Reply]:
        """Return the completions with their delays; the one that ends the read carries its key."""
        policy, rng, key = self.policy, self.rng, (tlp.requester_id, tlp.tag)
        self.statistics.completions += len(completions)
        due = now + policy.latency + (rng.randrange(policy.jitter + 1) if policy.jitter else 0)
        if not policy.reorder:
            due = self._last_due = max(due, self._last_due)
        else:
            due += rng.randrange(policy.latency + 1)
        if not completions:
            del self.outstanding[key]  # nothing will come: when the card uses the tag again is its own affair
            return []
        last = len(completions) - 1
        while last and completions[last] == completions[last - 1]:  # the tag is free with the first of two that are the same
            last -= 1
        found = []
        for n in range(len(completions)):
            if policy.reorder and n:
                due += rng.randrange(32)
            delay = due - now + (late[1] if late is not None and n >= late[0] else 0)
            found.append(Reply(completions[n], delay, key if n == last else None))
        return found

    # -- what the host knows of the card --

    def function(self, number: int) -> _Function:
        """Return what the host knows of a function; made on first use."""
        if number not in self._functions:
            self._functions[number] = _Function(f"{self.bus:02x}:{number >> 3:02x}.{number & 7}")
        return self._functions[number]

    def assume_enabled(self, number: int = 0, *, mps: int | None = None, mrrs: int | None = None, ext_tag: bool | None = None,
                       atomics: bool = False, ten_bit_tags: bool = False, ats: bool = False, pasid_bits: int = 0) -> None:  # fmt: skip
        """Take a function as enumerated and enabled without having done it: for parts of a card that have no configuration space."""
        sizes = [size.bit_length() - 8 for size in (mps or self.mps, mrrs or self.mrrs)]
        function = self.function(number)
        function.values = {_COMMAND: [_BUS_MASTER | 2], _DEVICE_CONTROL: [
            _RESET_CONTROL & 0x0FFF | sizes[0] << 5 | sizes[1] << 12 | (_EXT_TAG if (self.ext_tag if ext_tag is None else ext_tag) else 0)],
            _DEVICE_CONTROL_2: [atomics << 6 | ten_bit_tags << 12], _VFS: [0], _ATS: [ats << 15],
            _PASID: [int(pasid_bits > 0)]}  # fmt: skip
        function.pasid_bits = pasid_bits
        function.refresh()

    def attach(self, number: int, physical: int) -> None:
        """Take note of a virtual function of ``physical``."""
        function = self.function(number)
        function.physical = self.function(physical)
        if function not in function.physical.virtual:
            function.physical.virtual.append(function)
        function.refresh()

    def claim(self, info: FunctionInfo) -> None:
        """Take note of what `enumerate` or `enable_virtual` found out about a function."""
        function = self.function(info.function)
        function.bars = [(bar.address, bar.size) for bar in info.bars.values() if not bar.is_io]
        if info.msix is not None and info.msix.table_bar in info.bars:
            function.msix = _MsixShadow(info.bars[info.msix.table_bar].address + info.msix.table_offset, info.msix.count)

    def allocate(self, size: int, is_64: bool) -> int | None:
        """Return a naturally aligned address for ``size`` bytes of a BAR, None when no room is left."""
        window = self.window_64 if is_64 else self.window_32
        address = -(-window[0] // size) * size
        if address + size > window[1]:
            return None
        window[0] = address + size
        return address

    def _owner(self, address: int) -> int | None:
        """Return the function one of whose BARs holds ``address``."""
        for number, function in self._functions.items():
            for start, size in function.bars:
                if start <= address < start + size:
                    return number
        return None


def _within_pages(address: int, size: int) -> list[tuple[int, int]]:
    """Return the (address, length) pieces of an access that one TLP can carry each."""
    first = min(size, 4096 - address % 4096)
    return [(address, first)] + ([(address + first, size - first)] if first < size else [])


# -- software of the host --


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: where it was put, what it is."""

    address: int
    size: int
    is_64: bool = False
    prefetch: bool = False
    is_io: bool = False


@dataclass(frozen=True, slots=True)
class MsixInfo:
    """A function's MSI-X capability; ``message_address`` is what `enable_msix` puts into the entry of vector 0."""

    offset: int
    count: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int
    message_address: int


@dataclass
class FunctionInfo:
    """What `enumerate` found out about one function.

    Attributes
    ----------
    capabilities, ext_capabilities : dict
        Capability ID -> list of offsets, in the order of the chain.
    problems : list of :class:`str`
        What is wrong with the configuration space: loops, pointers out of place, BARs that are no power of two.
    """

    function: int
    vendor: int
    device: int
    revision: int = 0
    class_code: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    interrupt_pin: int = 0
    is_multi_function: bool = False
    bars: dict[int, Bar] = field(default_factory=dict)
    capabilities: dict[int, list[int]] = field(default_factory=dict)
    ext_capabilities: dict[int, list[int]] = field(default_factory=dict)
    msix: MsixInfo | None = None
    mps_supported: int = 128
    problems: list[str] = field(default_factory=list)


_PCIE_CAP, _MSIX_CAP = 0x10, 0x11
_MSIX_SPAN = 16 * 2048  # addresses that the vectors of one function may use


def enumerate(host: Host) -> Software:
    """Find the functions of the card, place their BARs, set their limits and enable them; returns list of :class:`FunctionInfo`.

    Function 0 decides whether 1 to 7 are looked for. Every function gets the same Max_Payload_Size: the host's or the
    smallest that one of them supports. Memory and bus master are enabled last.
    """
    found: list[FunctionInfo] = []
    for number in range(8):
        identity = yield ConfigRead(number, 0x00, 4)
        if identity & 0xFFFF != 0xFFFF:
            info = FunctionInfo(number, identity & 0xFFFF, identity >> 16)
            yield from _look_at(info, host)
            found.append(info)
        if number == 0 and not (found and found[0].is_multi_function):
            break
    mps = min([host.mps, *(info.mps_supported for info in found)])
    for info in found:
        yield from _set_limits(info, host, mps)
        yield ConfigWrite(info.function, _COMMAND, 2, 0x0006)  # Memory Space Enable, Bus Master Enable
    return found


def _look_at(info: FunctionInfo, host: Host) -> Software:
    """Fill ``info`` from one function's configuration space, and place its BARs."""
    number = info.function
    yield ConfigWrite(number, _COMMAND, 2, 0)
    class_code = yield ConfigRead(number, 0x08, 4)
    info.revision, info.class_code = class_code & 0xFF, class_code >> 8
    header = yield ConfigRead(number, 0x0E, 1)
    info.is_multi_function = bool(header >> 7)
    if header & 0x7F:
        info.problems.append(f"header type must be 0, not {header & 0x7F}")
        return
    subsystem = yield ConfigRead(number, 0x2C, 4)
    info.subsystem_vendor, info.subsystem = subsystem & 0xFFFF, subsystem >> 16
    info.interrupt_pin = yield ConfigRead(number, 0x3D, 1)
    yield from _place_bars(info, host)
    yield from _look_behind(info, host)


def _look_behind(info: FunctionInfo, host: Host) -> Software:
    """Fill ``info`` from the capabilities, and let the host know the function."""
    number = info.function
    yield from _walk_capabilities(info)
    yield from _walk_ext_capabilities(info)
    if _PCIE_CAP in info.capabilities:
        host.function(number).pcie = info.capabilities[_PCIE_CAP][0]
        host.function(number).ats = info.ext_capabilities.get(_ATS_CAP, [0])[0]
        if _PASID_CAP in info.ext_capabilities:
            host.function(number).pasid = at = info.ext_capabilities[_PASID_CAP][0]
            host.function(number).pasid_bits = (yield ConfigRead(number, at + 4, 2)) >> 8 & 0x1F
        device = yield ConfigRead(number, info.capabilities[_PCIE_CAP][0] + 4, 4)
        info.mps_supported = 128 << min(device & 7, 5)
    if _MSIX_CAP in info.capabilities:
        offset = info.capabilities[_MSIX_CAP][0]
        control = yield ConfigRead(number, offset + 2, 2)
        table = yield ConfigRead(number, offset + 4, 4)
        pba = yield ConfigRead(number, offset + 8, 4)
        info.msix = MsixInfo(offset, (control & 0x7FF) + 1, table & 7, table & ~7, pba & 7, pba & ~7,
                             host.msi_window[0] + _MSIX_SPAN * number)  # fmt: skip
        for bar, at, size in ((table & 7, table & ~7, 16 * info.msix.count), (pba & 7, pba & ~7, (info.msix.count + 63) // 64 * 8)):
            if bar not in info.bars or at + size > info.bars[bar].size:
                info.problems.append(f"MSI-X: BAR {bar} does not hold {size} bytes at {at:#x}")
    host.claim(info)


def _place_bars(info: FunctionInfo, host: Host) -> Software:
    """Size each BAR by writing ones, restore it, then give it an address. [PCIe5 7.5.1.2.1]"""
    number, index = info.function, 0
    while index < 6:
        at, this = 0x10 + 4 * index, index
        old, mask = yield from _size(number, at)
        index += 1
        if mask == 0:
            continue
        is_io, is_64 = bool(mask & 1), mask & 7 == 4
        if is_64:
            if this == 5:
                info.problems.append("BAR 5 must not be a 64-bit BAR: it has no upper half")
                continue
            index += 1
            upper_old, upper = yield from _size(number, at + 4)
            writable, width = (upper << 32 | mask) & ~0xF, 64
        else:
            upper_old, writable, width = 0, mask & (~3 if is_io else ~0xF), 32
        size = (1 << width) - writable
        if is_io and not writable >> 16:
            size = (1 << 16) - writable
        if size & (size - 1) or not writable:
            info.problems.append(f"BAR {this} has the writable bits {writable:#x}, which are no power of two")
            continue
        address = None if is_io else host.allocate(size, is_64)
        if address is None:
            yield ConfigWrite(number, at, 4, old)
            if is_64:
                yield ConfigWrite(number, at + 4, 4, upper_old)
            if not is_io:
                info.problems.append(f"BAR {this} of {size:#x} bytes finds no room")
                continue
        else:
            yield ConfigWrite(number, at, 4, address & 0xFFFF_FFFF)
            seen = (yield ConfigRead(number, at, 4)) & ~0xF
            if is_64:
                yield ConfigWrite(number, at + 4, 4, address >> 32)
                seen |= (yield ConfigRead(number, at + 4, 4)) << 32
            if seen != address:
                info.problems.append(f"BAR {this} reads back {seen:#x} where {address:#x} was written")
        info.bars[this] = Bar(address or 0, size, is_64, bool(mask & 8) and not is_io, is_io)


def _size(number: int, at: int) -> Software:
    """Return (old value, value after writing ones) of a BAR register, and restore it."""
    old = yield ConfigRead(number, at, 4)
    yield ConfigWrite(number, at, 4, 0xFFFF_FFFF)
    mask = yield ConfigRead(number, at, 4)
    yield ConfigWrite(number, at, 4, old)
    return old, mask


def _walk_capabilities(info: FunctionInfo) -> Software:
    """Follow the capability list: 48 links at most, each once. [PCIe5 7.5.1.1.11]"""
    if not (yield ConfigRead(info.function, 0x06, 2)) >> 4 & 1:
        return
    at, seen = (yield ConfigRead(info.function, 0x34, 1)) & 0xFC, set()
    while at:
        if at < 0x40:
            info.problems.append(f"capability list leads to {at:#x}, inside the header")
            return
        if at in seen or len(seen) == 48:
            info.problems.append(f"capability list loops at {at:#x}")
            return
        seen.add(at)
        both = yield ConfigRead(info.function, at, 2)
        if both & 0xFF == 0xFF:
            info.problems.append(f"capability list leads to nothing at {at:#x}")
            return
        info.capabilities.setdefault(both & 0xFF, []).append(at)
        at = both >> 8 & 0xFC


def _walk_ext_capabilities(info: FunctionInfo) -> Software:
    """Follow the extended capability list: 960 links at most, each once. [PCIe5 7.6.3]"""
    at, seen = 0x100, set()
    while at:
        if at < 0x100:
            info.problems.append(f"extended capability list leads to {at:#x}, below 0x100")
            return
        if at in seen or len(seen) == 960:
            info.problems.append(f"extended capability list loops at {at:#x}")
            return
        seen.add(at)
        header = yield ConfigRead(info.function, at, 4)
        if header == 0xFFFF_FFFF or header == 0:
            if at != 0x100:
                info.problems.append(f"extended capability list leads to nothing at {at:#x}")
            return
        if header & 0xFFFF:  # ID 0: a place holder
            info.ext_capabilities.setdefault(header & 0xFFFF, []).append(at)
        at = header >> 20 & 0xFFC


def _set_limits(info: FunctionInfo, host: Host, mps: int) -> Software:
    """Write Device Control and the RCB bit of Link Control. [PCIe5 7.5.3.4, 7.5.3.7]"""
    if _PCIE_CAP not in info.capabilities:
        return
    at = info.capabilities[_PCIE_CAP][0]
    supports_ext_tag = (yield ConfigRead(info.function, at + 4, 4)) >> 5 & 1
    old = yield ConfigRead(info.function, at + _DEVICE_CONTROL, 2)
    new = old & 0x0E1F & ~_EXT_TAG | (mps.bit_length() - 8) << 5 | (host.mrrs.bit_length() - 8) << 12
    if host.ext_tag and supports_ext_tag:
        new |= _EXT_TAG
    yield ConfigWrite(info.function, at + _DEVICE_CONTROL, 2, new)
    link = yield ConfigRead(info.function, at + 0x10, 2)
    yield ConfigWrite(info.function, at + 0x10, 2, link & ~8 | (8 if host.rcb == 128 else 0))


@dataclass(frozen=True, slots=True)
class VirtualPlan:
    """What the SR-IOV capability of a physical function says, once software has given its BARs addresses. [PCIe5 9.3.3]

    ``bars`` are those of the first virtual function; each has ``size`` bytes, and those of the others follow it.
    """

    offset: int  # of the capability
    total: int
    device: int
    first_offset: int
    stride: int
    bars: dict[int, Bar]

    def bars_of(self, number: int) -> dict[int, Bar]:
        """Return the BARs of virtual function ``number``, from 0."""
        return {index: replace(bar, address=bar.address + number * bar.size) for index, bar in self.bars.items()}


_EXT_SRIOV = 0x10


def plan_virtual(host: Host, info: FunctionInfo, *, page: int = 4096) -> Software:
    """Choose pages of ``page`` bytes for the virtual functions of ``info`` and place their BARs; returns a :class:`VirtualPlan`.

    Nothing is enabled. ValueError when the function has no SR-IOV capability, or not these pages. [PCIe5 9.2.1, 9.3.3.12 to 9.3.3.14]
    """
    if _EXT_SRIOV not in info.ext_capabilities:
        raise ValueError(f"A function with virtual ones must have an SR-IOV capability, not {sorted(info.ext_capabilities)!r}")
    at, number = info.ext_capabilities[_EXT_SRIOV][0], info.function
    host.function(number).sriov = at
    sizes = yield ConfigRead(number, at + 0x1C, 4)
    if not sizes & page >> 12:
        raise ValueError(f"Pages must be of a size that the card supports ({sizes:#x}), not {page!r}")
    yield ConfigWrite(number, at + 8, 2, 0)
    yield ConfigWrite(number, at + 0x20, 4, page >> 12)
    total = yield ConfigRead(number, at + 0x0E, 2)
    yield ConfigWrite(number, at + 0x10, 2, total)
    places = yield ConfigRead(number, at + 0x14, 4)
    device = yield ConfigRead(number, at + 0x1A, 2)
    bars, index = {}, 0
    while index < 6:
        here, this = at + 0x24 + 4 * index, index
        _, mask = yield from _size(number, here)
        index += 1
        if not mask:
            continue
        is_64 = mask & 6 == 4
        upper = 0xFFFF_FFFF
        if is_64:
            index += 1
            _, upper = yield from _size(number, here + 4)
        size = (1 << 64) - (upper << 32 | mask & ~0xF)
        address = host.allocate(size * total, is_64)
        if size & (size - 1) or size < page or address is None:
            info.problems.append(f"VF BAR {this} of {size:#x} bytes is no power of two, less than a page, or finds no room")
            continue
        yield ConfigWrite(number, here, 4, address & 0xFFFF_FFFF)
        if is_64:
            yield ConfigWrite(number, here + 4, 4, address >> 32)
        bars[this] = Bar(address, size, is_64, bool(mask & 8))
    return VirtualPlan(at, total, device, places & 0xFFFF, places >> 16, bars)


def enable_virtual(host: Host, info: FunctionInfo, plan: VirtualPlan, count: int, *, settle_cycles: int = 100) -> Software:
    """Enable ``count`` virtual functions of ``info`` and look at each; returns list of :class:`FunctionInfo`, memory and bus master on.

    RuntimeError when one of them is of another bus. [PCIe5 9.3.3.3, 9.2.1.2]
    """
    at, number, found = plan.offset, info.function, []
    yield ConfigWrite(number, at + 0x10, 2, count)
    yield ConfigWrite(number, at + 8, 2, 0x0009)  # VF Enable, VF Memory Space Enable
    yield Delay(settle_cycles)
    for n in range(count):
        routing_id = (host.bus << 8 | number) + plan.first_offset + n * plan.stride & 0xFFFF
        if routing_id >> 8 != host.bus:
            raise RuntimeError(f"Virtual function {n} is of another bus: routing ID {routing_id:#06x}")
        virtual = FunctionInfo(routing_id & 0xFF, info.vendor, plan.device, bars=plan.bars_of(n))
        host.attach(virtual.function, number)
        identity = yield ConfigRead(virtual.function, 0x00, 4)
        if identity != 0xFFFF_FFFF:
            virtual.problems.append(f"IDs of a virtual function must read as all ones, not {identity:#x}")
        yield from _look_behind(virtual, host)
        yield ConfigWrite(virtual.function, _COMMAND, 2, 0x0004)
        found.append(virtual)
    return found


def disable_virtual(info: FunctionInfo, plan: VirtualPlan) -> Software:
    """Take the virtual functions of ``info`` away."""
    yield ConfigWrite(info.function, plan.offset + 8, 2, 0)


def enable_msix(info: FunctionInfo, vectors: int, *, message_address: int | None = None) -> Software:
    """Program and unmask the first ``vectors`` entries of the table, mask the others, enable MSI-X; returns [(address, data)].

    ``message_address``: what entry 0 gets instead of its place in the host's window, for a function whose interrupts are
    translated; entry n gets 16 * n more. The data tells function and vector apart.
    """
    msix = info.msix
    if msix is None or not 0 <= vectors <= msix.count:
        raise ValueError(f"Number of vectors must be between 0 and {msix.count if msix else 0}, not {vectors!r}")
    base = msix.message_address if message_address is None else message_address
    messages = [(base + 16 * n, (info.function + 1) << 11 | n) for n in range(vectors)]
    table = info.bars[msix.table_bar].address + msix.table_offset
    yield ConfigWrite(info.function, msix.offset + 2, 2, 0xC000)  # Enable, Function Mask
    for n in range(msix.count):
        if n < vectors:
            address, data = messages[n]
            yield MemoryWrite(table + 16 * n, 4, address & 0xFFFF_FFFF)
            yield MemoryWrite(table + 16 * n + 4, 4, address >> 32)
            yield MemoryWrite(table + 16 * n + 8, 4, data)
        yield MemoryWrite(table + 16 * n + 12, 4, int(n >= vectors))
    yield ConfigWrite(info.function, msix.offset + 2, 2, 0x8000)
    return messages


def enable_ats(info: FunctionInfo, *, is_on: bool = True) -> Software:
    """Let the function cache translations of 4 KiB and more, or no longer; returns how many invalidations it can hold. [PCIe5 10.5.1]"""
    at = info.ext_capabilities[_ATS_CAP][0]
    depth = (yield ConfigRead(info.function, at + 4, 2)) & 0x1F
    yield ConfigWrite(info.function, at + 6, 2, _ATS_ENABLE if is_on else 0)
    return depth or 32


def enable_pasid(info: FunctionInfo, *, is_on: bool = True) -> Software:
    """Let requests of the function carry PASIDs, or no longer; ATS must be off. Returns how many bits they may have. [PCIe5 7.8.8]"""
    at = info.ext_capabilities[_PASID_CAP][0]
    width = (yield ConfigRead(info.function, at + 4, 2)) >> 8 & 0x1F
    yield ConfigWrite(info.function, at + 6, 2, _PASID_ENABLE if is_on else 0)
    return width


def enable_pri(info: FunctionInfo, most: int) -> Software:
    """Let the function have up to ``most`` page requests in flight; returns how many it may have. [PCIe5 10.5.2]

    RuntimeError when it has not stopped.
    """
    at = info.ext_capabilities[_PRI_CAP][0]
    if not (yield ConfigRead(info.function, at + 6, 2)) & _PRI_STOPPED:
        raise RuntimeError("A Page Request Interface must have stopped before it is enabled")
    count = min(most, (yield ConfigRead(info.function, at + 8, 4)))
    yield ConfigWrite(info.function, at + 12, 4, count)
    yield ConfigWrite(info.function, at + 4, 2, _PRI_ENABLE)
    return count


def disable_pri(info: FunctionInfo, *, resets: bool = False) -> Software:
    """Let the function send no more page requests, or have it forget those in flight as well. [PCIe5 10.5.2]"""
    yield ConfigWrite(info.function, info.ext_capabilities[_PRI_CAP][0] + 4, 2, _PRI_RESET if resets else 0)


def pri_status(info: FunctionInfo) -> Software:
    """Return Status of the Page Request Interface. [PCIe5 10.5.2.3]"""
    return (yield ConfigRead(info.function, info.ext_capabilities[_PRI_CAP][0] + 6, 2))
