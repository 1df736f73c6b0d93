"""The stand-alone IOMMU as a shared library: the RTL compiled by Verilator, memory and requesters in C++ at its ports.

Nothing is judged here. Requests go in by the thousand and come back with the cycles in which they were taken and answered; registers are
calls, as for the software of :mod:`ringwall.models.host`, and time goes on while they last.
"""

import ctypes
import functools
import weakref
from pathlib import Path

import numpy as np

from ..models.host import Delay, MemoryRead, MemoryWrite
from ..models.host import run as run_software
from ..models.memory import AccessFault
from ..rtl.iommu.features import Features
from ..rtl.iommu.unit import Iommu
from ..rtl.tlp.layouts import BurstStatus, ConfigState
from .builds import library
from .wrapper import wrapper_ports

__all__ = ["ANSWER", "PAGE_REQUEST", "REQUEST", "STORE", "UPDATE", "BrokenRule", "CompiledIommu", "MarkedMemory", "build"]

_SOURCE = Path(__file__).with_name("compiled_iommu.cpp")
WIDTH = 64  # of the wall port: what C++ takes
# As in compiled_iommu.cpp. ``process`` is -1 without a process_id, ``segment`` without a segment; ``access`` is 0 read, 1 write, 2 execute;
# ``data`` is that of a write. With ATS: ``kind`` is that of ``rtl/iommu/layouts.py``, ``writes`` says that a translation request asks for
# write permission, too.
REQUEST = np.dtype({
    "names": ["iova", "device", "process", "access", "privileged", "kind", "writes", "is_CXL", "data"],
    "formats": ["<u8", "<u4", "<i4", "u1", "u1", "u1", "u1", "u1", "<u4"], "offsets": [0, 8, 12, 16, 17, 18, 19, 20, 24],
    "itemsize": 32})  # fmt: skip
# ``stored``: 1 more than the BurstStatus of a dword that was handed over, else 0.
ANSWER = np.dtype([("page", "<u8"), ("asked", "<u8"), ("answered", "<u8"), ("cause", "<u2"), ("fault", "u1"), ("readable", "u1"),
                   ("writable", "u1"), ("size_log2", "u1"), ("PBMT", "u1"), ("stored", "u1"), ("status", "u1"), ("executable", "u1"),
                   ("privileged", "u1"), ("is_global", "u1"), ("CXL_io", "u1"), ("untranslated_only", "u1"),
                   ("padding", "<u2")])  # fmt: skip
PAGE_REQUEST = np.dtype({
    "names": ["page", "device", "process", "group", "privileged", "execute", "reads", "writes", "is_last"],
    "formats": ["<u8", "<u4", "<i4", "<u2", "u1", "u1", "u1", "u1", "u1"], "offsets": [0, 8, 12, 16, 18, 19, 20, 21, 22],
    "itemsize": 24})  # fmt: skip
GROUP_RESPONSE = np.dtype([("device", "<u4"), ("process", "<i4"), ("group", "<u2"), ("code", "<u2")])
MESSAGE = np.dtype([("payload", "<u8"), ("process", "<i4"), ("segment", "<i4"), ("RID", "<u2"), ("code", "u1"), ("itag", "u1"),
                    ("padding", "<u4")])  # fmt: skip
STORE = np.dtype([("cycle", "<u8"), ("address", "<u8"), ("length", "<u4"), ("status", "<u4"), ("data", "V64")])
UPDATE = np.dtype([(name, "<u8") for name in ("cycle", "address", "compare", "swap", "found")])


class BrokenRule(AssertionError):
    """The IOMMU broke a rule of one of its ports; nothing moves any more."""


def build(unit):
    """Return the path of the shared library of ``unit``, a :class:`ringwall.rtl.iommu.unit.Iommu` of 64 bits, made now if it is the first.

    Raises
    ------
    :exc:`RuntimeError`
        When the circuit does not build.
    :exc:`ValueError`
        When its wall port has another width.
    """
    if unit.width != WIDTH:
        raise ValueError(f"A compiled IOMMU must have a wall port of {WIDTH} bits, not {unit.width!r}")
    return library(unit, "iommu", wrapper=_wrapper(unit), harness=_SOURCE)


def _wrapper(unit):
    """Return the Verilog around ``unit``: a port for each field of each stream, all inputs from registers, never a reset.

    MSI-X and AtomicOps are on; inputs that are no streams and not ``config`` are 0. Ports that a unit with every feature has are there,
    too: nothing ever comes out of them.
    """
    ports, lines = _ports(unit)
    found = {port.split()[-1] for port in ports}
    every = _ports(Iommu(width=WIDTH, features=Features(**dict.fromkeys(Features.flags(), True))))[0]
    more = [port for port in every if port.split()[-1] not in found]
    ports, lines = ports + more, lines + [f"assign {port.split()[-1]} = 0;" for port in more if port.startswith("output")]
    body = "\n  ".join(lines)
    return f"module iommu ({', '.join(ports)});\n  {body}\nendmodule\n"


def _ports(unit):
    return wrapper_ports(unit, {"config": ConfigState.const({"msix_enable": 1, "bus_master": 1, "atomics": 1}).as_value().value})


def _fields(names):
    return type("Fields", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_uint64) for name in names.split()]})


_Options = _fields("latency jitter gaps stalls outstanding seed base size")
_Counts = _fields("hits misses walks merged reads refused_reads writes updates fences")


@functools.cache
def _library(path):
    library, iommu, u64, u32, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
    for name, result, arguments in (
        ("open", iommu, [ctypes.POINTER(_Options), iommu, iommu]), ("close", None, [iommu]), ("cycle", u64, [iommu]),
        ("options", ctypes.POINTER(_Options), [iommu]), ("counts", ctypes.POINTER(_Counts), [iommu]), ("error", ctypes.c_char_p, [iommu]),
        ("run", u64, [iommu, u64, number]), ("access", u64, [iommu, u32, u32, number, u64]), ("ask", None, [iommu, iommu, u64]),
        ("left", u64, [iommu]), ("answers", u64, [iommu, ctypes.POINTER(iommu)]), ("stores", u64, [iommu, ctypes.POINTER(iommu)]),
        ("updates", u64, [iommu, ctypes.POINTER(iommu)]), ("forget", None, [iommu]), ("send", None, [iommu, iommu, u64]),
        ("responses", u64, [iommu, ctypes.POINTER(iommu)]), ("messages", u64, [iommu, ctypes.POINTER(iommu)]),
        ("forget_sent", None, [iommu]),
    ):  # fmt: skip
        function = getattr(library, f"iommu_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class MarkedMemory:
    """``size`` bytes from ``base`` with marks on places that the IOMMU cannot access; nothing is anywhere else.

    ``read`` and ``write`` are software's, which marks do not hinder; they raise :exc:`ringwall.models.memory.AccessFault` outside.

    Attributes
    ----------
    journal : dict or None
        Unless None, the 8 bytes that were there before the first write to each word (a multiple of 8), by address.
    """

    def __init__(self, base, size):
        self.base, self.size, self.journal = base, size, None
        self.bytes, self.marks = np.zeros(size, np.uint8), np.zeros(size // 8, np.uint8)
        self._bytes, self._marks, self._is_marked = self.bytes.data, self.marks.data, False

    def read(self, address, length, *, source=""):
        at = address - self.base
        if not 0 <= at <= self.size - length:
            raise AccessFault(address, length, False, "unmapped")
        return self._bytes[at : at + length].tobytes()

    def write(self, address, data, *, source=""):
        at = address - self.base
        if not 0 <= at <= self.size - len(data):
            raise AccessFault(address, len(data), True, "unmapped")
        if self.journal is not None:
            for word in range(at & -8, at + len(data), 8):
                self.journal.setdefault(self.base + word, self._bytes[word : word + 8].tobytes())
        self._bytes[at : at + len(data)] = data

    def mark(self, address, length, status):
        """Let accesses of these bytes (multiples of 8) end with ``status``: UR, or POISONED, which writes do not; OK takes it away."""
        at = address - self.base
        self.marks[at >> 3 : at + length >> 3] = status.value
        self._is_marked = bool(self.marks.any())

    def check(self, address, length, is_write):
        """Raise the fault that an access of the IOMMU ends with, if it is one."""
        at = address - self.base
        if not 0 <= at <= self.size - length:
            raise AccessFault(address, length, is_write, "unmapped")
        if self._is_marked:
            marks = self._marks[at >> 3 : at + length + 7 >> 3].tolist()
            if BurstStatus.UR.value in marks:
                raise AccessFault(address, length, is_write, "unmapped")
            if any(marks) and not is_write:
                raise AccessFault(address, length, is_write, "poisoned")


class CompiledIommu:
    """An IOMMU of :mod:`ringwall.rtl.iommu.unit` with requesters, a memory, and a gate that drains when told.

    Answers are taken at once; then an aligned dword for an interrupt file in memory is handed over. A fence ends when every request that
    was accepted before it is answered, and its dword taken. With ATS functions complete each invalidation after a while, in one part or
    several.

    Parameters
    ----------
    unit : :class:`ringwall.rtl.iommu.unit.Iommu`
        With a wall port of 64 bits.
    memory : :class:`MarkedMemory`
    seed : :class:`int`
        Every choice is drawn from it.
    latency, jitter : :class:`int`
        Cycles from a read to its answer, and up to so many more: answers overtake each other. What a read brings was in memory at the
        one or the other end of this time.
    gaps, stalls : :class:`int`
        In how many of 256 cycles no request is begun, and nothing is taken or given at the wall port.
    outstanding : :class:`int`
        Requests that wait for their answers at the same time, 1 to 256.

    Attributes
    ----------
    options, counts
        The numbers above, which may be changed at any time; and what was counted (see ``_Counts``).
    """

    def __init__(self, unit, memory, *, seed=0, latency=8, jitter=0, gaps=0, stalls=0, outstanding=256):
        if not 1 <= outstanding <= 256:
            raise ValueError(f"Outstanding requests must be 1 to 256, not {outstanding!r}")
        for name, value in (("Gaps", gaps), ("Stalls", stalls)):
            if value not in range(256):
                raise ValueError(f"{name} must be between 0 and 255 of 256 cycles, not {value!r}")
        self.memory, self._library = memory, _library(build(unit))
        options = _Options(latency, jitter, gaps, stalls, outstanding, seed, memory.base, memory.size)
        self._iommu = ctypes.c_void_p(self._library.iommu_open(ctypes.byref(options), memory.bytes.ctypes.data, memory.marks.ctypes.data))
        weakref.finalize(self, self._library.iommu_close, self._iommu)
        self.options = self._library.iommu_options(self._iommu).contents
        self.counts = self._library.iommu_counts(self._iommu).contents

    @property
    def cycle(self):
        """The cycles that went by."""
        return self._library.iommu_cycle(self._iommu)

    @property
    def left(self):
        """Requests that are not answered."""
        return self._library.iommu_left(self._iommu)

    def ask(self, requests):
        """Let ``requests`` (an array of ``REQUEST``) be asked behind all others, in their order, as time goes on."""
        requests = np.ascontiguousarray(requests, REQUEST)
        self._library.iommu_ask(self._iommu, requests.ctypes.data, len(requests))

    def send(self, page_requests):
        """Let ``page_requests`` (an array of ``PAGE_REQUEST``) be sent behind all others."""
        page_requests = np.ascontiguousarray(page_requests, PAGE_REQUEST)
        self._library.iommu_send(self._iommu, page_requests.ctypes.data, len(page_requests))

    def sent(self):
        """Return group responses of the IOMMU, and messages of commands, since the last call (arrays)."""
        found = [self._taken("responses", GROUP_RESPONSE), self._taken("messages", MESSAGE)]
        self._library.iommu_forget_sent(self._iommu)
        return found

    def _taken(self, name, kind):
        place = ctypes.c_void_p()
        count = getattr(self._library, f"iommu_{name}")(self._iommu, ctypes.byref(place))
        return np.frombuffer(ctypes.string_at(place, count * kind.itemsize) if count else b"", kind)

    def step(self, cycles):
        """Let cycles pass."""
        self._library.iommu_run(self._iommu, cycles, 0)
        self._check()

    def settle(self, cycles=1_000_000):
        """Let cycles pass until all is answered and nothing moves; AssertionError when that takes more than ``cycles``."""
        passed = self._library.iommu_run(self._iommu, cycles, 1)
        self._check()
        if passed == cycles:
            raise AssertionError(f"{self.left} requests are not answered, or something moves, after {cycles} cycles")

    def take(self):
        """Return what there was since the last call: answers to all requests, in their order, stores, and updates (arrays).

        All must be answered.
        """
        found = [self._taken(name, kind) for name, kind in (("answers", ANSWER), ("stores", STORE), ("updates", UPDATE))]
        if self.left:
            raise AssertionError(f"{self.left} requests are not answered")
        self._library.iommu_forget(self._iommu)
        return found

    def access(self, offset, size, value=None):
        """Read (``value`` None) or write ``size`` bytes of registers at ``offset``."""
        shift = offset & 7
        found = self._library.iommu_access(self._iommu, offset - shift, (1 << size) - 1 << shift, value is not None,
                                           (value or 0) << 8 * shift)  # fmt: skip
        self._check()
        return found >> 8 * shift & (1 << 8 * size) - 1

    def perform(self, operation):
        """Perform an operation of ``models.host`` whose BAR is at 0; return its result."""
        match operation:
            case MemoryRead():
                return self.access(operation.address, operation.size)
            case MemoryWrite():
                self.access(operation.address, operation.size, operation.value)
            case Delay():
                self.step(operation.cycles)
            case _:
                raise ValueError(f"Operation must be an access of the BAR or a delay, not {operation!r}")

    def run(self, software):
        """Run a generator over such operations; return what it returns."""
        return run_software(software, self.perform)

    def _check(self):
        error = self._library.iommu_error(self._iommu)
        if error:
            raise BrokenRule(error.decode())
