"""A ring engine of one function and one port as a shared library: the RTL compiled by Verilator, memory and a back end in C++ around it.

Nothing is judged here: every access of the engine is kept, and every chain that it hands to its back end, which finishes them all.
"""

import ctypes
import functools
import weakref
from pathlib import Path

import numpy as np

from ..models.memory import Access, AccessFault
from ..rtl.virtio.engine import PortDescription, RingEngine
from ..rtl.virtio.layouts import QueueOperation, RingRules
from .builds import library
from .wrapper import wrapper_ports

__all__ = ["BrokenRule", "CompiledRings"]

_SOURCE = Path(__file__).with_name("compiled_rings.cpp")
# As in compiled_rings.cpp.
ACCESS = np.dtype([("cycle", "<u8"), ("address", "<u8"), ("length", "<u4"), ("is_write", "<u4"), ("data", "V64")])
SEGMENT = np.dtype([("address", "<u8"), ("length", "<u4"), ("list", "<u4"), ("is_last", "<u4"), ("padding", "<u4")])
CHAIN = np.dtype([("cycle", "<u8"), ("queue", "<u4"), ("readable", "<u4"), ("writable", "<u4"), ("padding", "<u4")])


class BrokenRule(AssertionError):
    """The engine broke a rule of one of its ports; nothing moves any more."""


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("latency", "jitter", "stalls", "seed", "base", "size")]


class _Command(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_uint64) for name in ("descriptor", "driver", "device")),
                *((name, ctypes.c_uint32) for name in ("operation", "queue", "size", "rules"))]  # fmt: skip


@functools.cache
def _library(size):
    engine = RingEngine(width=64, functions=(1,), clients=(1,), ports=[PortDescription(0, (size,))])
    ports, lines = wrapper_ports(engine, {"stop__0": None})
    body = "\n  ".join(lines)
    text = f"module rings ({', '.join(ports)});\n  {body}\nendmodule\n"
    found = ctypes.CDLL(str(library(engine, "rings", wrapper=text, harness=_SOURCE)))
    rings, u64, u32, array = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.POINTER(ctypes.c_void_p)
    for name, result, arguments in (
        ("open", rings, [ctypes.POINTER(_Options), rings]), ("close", None, [rings]), ("error", ctypes.c_char_p, [rings]),
        ("run", u64, [rings, u64]), ("stop", u64, [rings, u64]), ("command", None, [rings, ctypes.POINTER(_Command)]),
        ("kick", None, [rings, u32]), ("idle", u32, [rings]), ("breaks", u64, [rings]), ("notes", u64, [rings]),
        ("accesses", u64, [rings, array]), ("segments", u64, [rings, array]), ("chains", u64, [rings, array]), ("forget", None, [rings]),
    ):  # fmt: skip
        function = getattr(found, f"rings_{name}")
        function.restype, function.argtypes = result, arguments
    return found


class CompiledRings:
    """A ring engine with one queue of ``size`` descriptors at most, ``length`` bytes of memory from ``base`` on, and a back end.

    ``read`` and ``write`` are software's accesses of that memory. Elsewhere all is 0.

    Parameters
    ----------
    size, base, length, seed : :class:`int`
    latency, jitter : :class:`int`
        Cycles from a read to its answer, and up to so many more: answers overtake each other.
    stalls : :class:`int`
        In how many of 256 cycles nothing is taken or given at each port.
    """

    def __init__(self, *, size, base, length, seed, latency=5, jitter=40, stalls=32):
        self.base, self.bytes = base, np.zeros(length, np.uint8)
        self._view, self._library = self.bytes.data, _library(size)
        options = _Options(latency, jitter, stalls, seed, base, length)
        self._rings = ctypes.c_void_p(self._library.rings_open(ctypes.byref(options), self.bytes.ctypes.data))
        weakref.finalize(self, self._library.rings_close, self._rings)

    def read(self, address, length):
        at = address - self.base
        if not 0 <= at <= len(self.bytes) - length:
            raise AccessFault(address, length, False, "unmapped")
        return self._view[at : at + length].tobytes()

    def write(self, address, data):
        at = address - self.base
        if not 0 <= at <= len(self.bytes) - len(data):
            raise AccessFault(address, len(data), True, "unmapped")
        self._view[at : at + len(data)] = data

    def enable(self, layout, rules):
        """Hand the ring of ``layout`` to the engine; ``rules``: names of ``RingRules`` and their bits."""
        areas = (part[0] for part in layout.parts)
        self._command(_Command(*areas, QueueOperation.ENABLE.value, 0, layout.size, RingRules.const(rules).as_value().value))

    def take_back(self):
        """Take the queue back by RESET."""
        self._command(_Command(operation=QueueOperation.RESET.value))

    def _command(self, command):
        self._library.rings_command(self._rings, ctypes.byref(command))

    def kick(self):
        """Ring the doorbell."""
        self._library.rings_kick(self._rings, 0)

    def settle(self, cycles):
        """Let cycles pass until nothing moves; AssertionError when that takes ``cycles``."""
        passed = self._library.rings_run(self._rings, cycles)
        self._check()
        if passed >= cycles:
            raise AssertionError(f"Something moves after {cycles} cycles")

    def stop(self, cycles):
        """Stop the function and let it go again; AssertionError when that takes ``cycles``."""
        passed = self._library.rings_stop(self._rings, cycles)
        self._check()
        if passed >= cycles:
            raise AssertionError(f"The function is not stopped after {cycles} cycles")

    @property
    def is_idle(self):
        """The queue is not enabled, and nothing of it is under way."""
        return bool(self._library.rings_idle(self._rings))

    def take(self):
        """Return what there was since the last call: accesses, chains (readable, writable spans), breaks, notifications."""
        accesses, segments, chains = (self._taken(*each) for each in (("accesses", ACCESS), ("segments", SEGMENT), ("chains", CHAIN)))
        found = [Access(int(one["address"]), bytes(one["data"])[: one["length"]], bool(one["is_write"]), "engine") for one in accesses]
        lists = [[], []]
        for kind in (0, 1):
            spans = []
            for one in segments[segments["list"] == kind].tolist():
                spans += [one[:2]] if one[1] else []
                if one[3]:
                    lists[kind].append(tuple(spans))
                    spans = []
        queues = [(lists[0].pop(0) if one["readable"] else (), lists[1].pop(0)) for one in chains]
        counts = self._library.rings_breaks(self._rings), self._library.rings_notes(self._rings)
        self._library.rings_forget(self._rings)
        return found, queues, *counts

    def _taken(self, name, kind):
        place = ctypes.c_void_p()
        count = getattr(self._library, f"rings_{name}")(self._rings, ctypes.byref(place))
        return np.frombuffer(ctypes.string_at(place, count * kind.itemsize) if count else b"", kind)

    def _check(self):
        error = self._library.rings_error(self._rings)
        if error:
            raise BrokenRule(error.decode())
