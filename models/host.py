"""The host of a card, without a clock: software as generators of operations, and the root complex that performs them.

Software (enumeration, drivers) is a generator that yields operations and receives their results, so that cocotb, the
compiled card and plain Python drive the same software.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any


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


def run(software: Software, perform: Callable[[Operation], Any]) -> Any:
    """Drive a generator to its end with ``perform(operation) -> result`` and return what it returns."""
    try:
        operation = next(software)
        while True:
            operation = software.send(perform(operation))
    except StopIteration as end:
        return end.value
