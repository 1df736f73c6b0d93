"""Drivers and monitors of streams (``amaranth.lib.stream``) in cocotb. Protocol rules live here, expectations do not.

All of it acts at the rising edge of the port ``clk``: values are read as they were before the edge, and values that
are written hold from just after it. ``watch`` may run beside ``get`` or a ready pattern; a stream has one driver of
``valid`` (``put``) or of ``ready`` (``get``, :func:`random_ready`, :func:`pattern_ready`) at a time.
"""

import functools
import itertools
from enum import Enum
from types import SimpleNamespace

import cocotb
from amaranth.hdl import Shape
from amaranth.lib import data
from cocotb import handle
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, First, RisingEdge, Timer

from .run import ports

__all__ = [
    "CLOCK_NS", "Stream", "cycle", "pack", "pattern_ready", "random_ready", "raw_writer", "reader", "sleep", "start", "unpack", "writer",
]  # fmt: skip

CLOCK_NS = 4  # period of the clock that start() makes


def reader(signal):
    """Return a function that reads ``signal`` (a cocotb handle) as an int; X or Z raises AssertionError.

    It is the fastest read that cocotb 2.1 has: no LogicArray is made.
    """
    read, path = signal._handle.get_signal_val_binstr, signal._path

    def value():
        bits = read()
        try:
            return int(bits, 2)
        except ValueError:
            raise AssertionError(f"{path} is not 0 or 1 in every bit: {bits}") from None

    return value


def raw_writer(signal):
    """Return a function that writes a string of the signal's width of "0" and "1" to ``signal`` (a cocotb handle).

    As ``signal.value =`` without its checks and conversions. Verilator applies a write after the edge by itself; in
    Icarus it would race with the edge, so cocotb holds it back until the read-write phase.
    """
    return _writer(signal, signal._handle.set_signal_val_binstr)


def writer(signal):
    """Return a function that writes an int, 0 to 2**width-1, to ``signal``; see :func:`raw_writer`."""
    width = len(signal)
    if width <= 32:
        return _writer(signal, signal._handle.set_signal_val_int)
    write, form = raw_writer(signal), f"0{width}b"
    return lambda value: write(format(value, form))


def _writer(signal, put):
    deposit, schedule = handle._GPISetAction.DEPOSIT, handle._schedule_write
    if handle._trust_inertial:
        return functools.partial(put, deposit.value)
    return functools.partial(schedule, signal, put, deposit)


def _zero():
    return 0


def _one():
    return 1


def _nothing(value):
    pass


class Stream:
    """One stream port ``name`` of ``dut``: signals ``name__payload``, ``name__valid``, ``name__ready``.

    A missing ``payload`` (width 0) reads as 0; a missing ``valid`` or ``ready`` (``always_valid``, ``always_ready``)
    reads as 1. Methods that wait return just after the edge at which the transfer happened, so calling them in a loop
    moves one item per cycle.
    """

    def __init__(self, dut, name):
        self.name, self.clk = name, dut.clk
        known = ports()
        path = {part: f"{name}__{part}" for part in ("payload", "valid", "ready")}
        if not known.keys() & path.values():
            raise ValueError(f"Stream must be a port of {dut._name} such as {', '.join(_streams())}, not {name!r}")
        found = {part: getattr(dut, port) if port in known else None for part, port in path.items()}
        self.payload, self.valid, self.ready = found.values()
        self._edge = RisingEdge(self.clk)
        self.read_payload = reader(self.payload) if self.payload is not None else _zero
        self.read_valid = reader(self.valid) if self.valid is not None else _one
        self.read_ready = reader(self.ready) if self.ready is not None else _one
        self._payload, self._valid, self._ready = (_nothing if s is None else writer(s) for s in found.values())

    def set_ready(self, value):
        """Drive ``ready`` from now on."""
        self._ready(value)

    async def put(self, payload=0):
        """Offer ``payload`` until it is taken."""
        self._payload(payload)
        self._valid(1)
        ready, edge = self.read_ready, self._edge
        await edge
        while not ready():
            await edge
        self._valid(0)

    async def put_many(self, payloads, gaps=None):
        """Offer all ``payloads`` in order; before each, ``gaps()`` idle cycles (default none)."""
        ready, edge, drive, valid = self.read_ready, self._edge, self._payload, self._valid
        for payload in payloads:
            if gaps is not None:
                idle = gaps()
                if idle:
                    valid(0)
                    await ClockCycles(self.clk, idle)
            drive(payload)
            valid(1)
            await edge
            while not ready():
                await edge
        valid(0)

    async def get(self):
        """Take one item: return its payload."""
        self._ready(1)
        valid, edge = self.read_valid, self._edge
        await edge
        while not valid():
            await edge
        payload = self.read_payload()
        self._ready(0)
        return payload

    async def watch(self, payloads, cycles=None):
        """Append the payload of every transfer to ``payloads``, for ever; with ``cycles``, its cycle number to that list.

        A payload that changes while it is stalled, or a ``valid`` that is withdrawn, raises AssertionError, which fails
        the test. The cycle number is the time of the edge divided by the clock period.
        """
        read_valid, read_ready, read_payload = self.read_valid, self.read_ready, self.read_payload
        edge = self._edge
        rises = RisingEdge(self.valid) if self.valid is not None else None
        take = payloads.append
        held = None
        while True:
            await edge
            if not read_valid():
                if held is not None:
                    raise AssertionError(f"{self.name}: valid was withdrawn before the transfer of {held:#x}")
                await rises  # nothing can happen at an edge before this
                continue
            payload = read_payload()
            if held is not None and payload != held:
                raise AssertionError(f"{self.name}: payload changed while stalled, from {held:#x} to {payload:#x}")
            if read_ready():
                take(payload)
                if cycles is not None:
                    cycles.append(cycle())
                held = None
            else:
                held = payload


async def sleep(edge, due, news):
    """Let cycles pass: return just after an edge (``edge`` of the clock), at cycle ``due`` or up to 2 before, or once ``news`` is set.

    A coroutine that sleeps costs nothing, while one that looks at every edge is resumed at every edge. Call it in a loop.
    """
    wait = due - cycle() - 2
    if wait > 0:
        news.clear()
        await First(news.wait(), Timer(wait * CLOCK_NS, "ns"))
    await edge


def cycle():
    """Return the number of whole clock periods since the start of the simulation."""
    high, low = cocotb.simulator.get_sim_time()
    return ((high << 32) + low) // _period_steps()


@functools.cache
def _period_steps():
    return CLOCK_NS * 10 ** (-9 - cocotb.simulator.get_precision())


def _streams():
    return sorted(name.removesuffix("__valid") for name in ports() if name.endswith("__valid"))


async def start(dut, *names):
    """Drive every input to 0, start the clock (port ``clk``), reset for 2 cycles; return a Stream for each of ``names``.

    Without names: every stream port that has a ``valid``, in alphabetical order. It returns just after the edge that
    ended the reset (``rst`` reads as 0 at the next edge).
    """
    if "clk" not in ports():
        raise ValueError(f"The component under test has no port 'clk': it must have a sync domain, not {sorted(ports())!r}")
    for name, (way, _) in ports().items():
        if way == "input" and name != "clk":
            getattr(dut, name).value = 0
    streams = tuple(Stream(dut, name) for name in (names or _streams()))
    if "rst" in ports():
        dut.rst.value = 1
    Clock(dut.clk, CLOCK_NS, unit="ns", impl="gpi").start(start_high=False)
    if "rst" in ports():
        await ClockCycles(dut.clk, 2)
        dut.rst.value = 0
    await RisingEdge(dut.clk)
    return streams


async def random_ready(stream, rng, p=0.5):
    """Drive ``ready`` anew in each cycle, for ever: 1 with probability ``p``."""
    write, edge, now, rand = stream.set_ready, stream._edge, None, rng.random
    while True:
        new = rand() < p
        if new is not now:
            now = new
            write(int(new))
        await edge


async def pattern_ready(stream, pattern):
    """Drive ``ready`` with the items of ``pattern`` (0 or 1), one per cycle, again and again."""
    pattern = list(pattern)
    write, edge = stream.set_ready, stream._edge
    if len(set(pattern)) < 2:
        write(pattern[0])
        return
    for value in itertools.cycle(pattern):
        write(value)
        await edge


# Layouts

_codecs = {}  # id of a layout -> (layout, pack, unpack); holding the layout keeps its id from being used again


def pack(layout, /, **fields) -> int:
    """Return the payload of an ``amaranth.lib.data`` layout as an int.

    ``layout`` is a layout or a ``data.Struct`` class. A field that is itself a layout takes a dict, a list (arrays), a
    namespace as :func:`unpack` makes it, or a plain int; one that is an enumeration takes a member. Fields that are
    not named are 0.

    Raises
    ------
    :exc:`ValueError`
        When a value does not fit its field, or a field does not exist.
    """
    return _codec(layout)[1](fields)


def unpack(layout, payload, /):
    """Return the fields of ``payload`` (an int): a namespace for a structure, a list for an array.

    Enumeration fields are members where the value has one, else ints.
    """
    return _codec(layout)[2](payload)


def _codec(shape):
    found = _codecs.get(id(shape))
    if found is None:
        found = _codecs[id(shape)] = (shape, *_make_codec(shape))
    return found


def _make_codec(shape):
    """Return ``(encode, decode)`` between Python values and the bits of ``shape``."""
    if isinstance(shape, type) and issubclass(shape, Enum):
        return _enum_codec(shape)
    if isinstance(shape, data.Layout) or (isinstance(shape, type) and issubclass(shape, (data.Struct, data.Union))):
        layout = data.Layout.cast(shape)
        return _array_codec(layout) if isinstance(layout, data.ArrayLayout) else _struct_codec(layout)
    return _int_codec(Shape.cast(shape))


def _int_codec(shape):
    width, low = shape.width, -(1 << shape.width >> 1) if shape.signed else 0
    mask, top, high = (1 << width) - 1, 1 << width >> 1, low + (1 << width)

    def encode(value):
        value = int(value)
        if not low <= value < high:
            kind = "a signed" if shape.signed else "an unsigned"
            raise ValueError(f"Value must fit {kind} field of {width} bits, not {value!r}")
        return value & mask

    if not shape.signed:
        return encode, int

    def decode(bits):
        return bits - (mask + 1) if bits & top else bits

    return encode, decode


def _enum_codec(enum):
    shape = Shape.cast(enum)
    encode_int, decode_int = _int_codec(shape)
    members = {}
    for member in enum:
        members.setdefault(encode_int(member.value), member)

    def encode(value):
        return encode_int(value.value if isinstance(value, Enum) else value)

    def decode(bits):
        found = members.get(bits)
        return decode_int(bits) if found is None else found

    return encode, decode


def _struct_codec(layout):
    parts = []
    for name, field in layout:
        width = Shape.cast(field.shape).width
        parts.append((name, field.offset, (1 << width) - 1, *_make_codec(field.shape)))
    encoders = {name: (offset, encode) for name, offset, _, encode, _ in parts}
    names = ", ".join(encoders)

    def encode(value):
        if isinstance(value, int):
            return value
        if not isinstance(value, dict):
            value = vars(value)
        bits = 0
        for name, item in value.items():
            try:
                offset, encode_field = encoders[name]
            except KeyError:
                raise ValueError(f"Field must be one of {names}, not {name!r}") from None
            try:
                bits |= encode_field(item) << offset
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return bits

    def decode(bits):
        out = SimpleNamespace()
        fields = out.__dict__
        for name, offset, mask, _, decode_field in parts:
            value = bits >> offset & mask
            fields[name] = value if decode_field is int else decode_field(value)
        return out

    return encode, decode


def _array_codec(layout):
    encode_item, decode_item = _make_codec(layout.elem_shape)
    width, length = Shape.cast(layout.elem_shape).width, layout.length
    mask = (1 << width) - 1

    def encode(value):
        if isinstance(value, int):
            return value
        if len(value) > length:
            raise ValueError(f"Array must have at most {length} items, not {len(value)!r}")
        bits = 0
        for n, item in enumerate(value):
            bits |= encode_item(item) << width * n
        return bits

    def decode(bits):
        items = [bits >> width * n & mask for n in range(length)]
        return items if decode_item is int else [decode_item(item) for item in items]

    return encode, decode
