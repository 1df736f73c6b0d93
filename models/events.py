"""Everything that the log of a run may contain: one JSON object per line, the first a :class:`RunHeader`.

A log holds what a judge needs to come to the same judgement without the card: TLPs of both directions, what software
stored in memory, and what it told the models.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import host

__all__ = ["Event", "HostStore", "Note", "Operation", "RunHeader", "Setup", "TlpReceived", "TlpSent", "Told", "from_json"]


class Event:
    """One line of a log."""

    def to_json(self) -> str:
        """Return the event as one line of JSON, without the end of line."""
        parts = {"event": type(self).__name__}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            parts[field.name] = _CODECS[field.name][0](value) if field.name in _CODECS else value
        return json.dumps(parts, separators=(",", ":"))


@dataclass(frozen=True)
class RunHeader(Event):
    """How to have the same run again; ``parameters`` and ``tools`` are plain JSON values by name."""

    commit: str
    seed: int
    parameters: dict[str, Any]
    tools: dict[str, str]


@dataclass(frozen=True)
class Setup(Event):
    """From now on the checker of this name judges, made from ``parameters`` (plain JSON values)."""

    cycle: int
    checker: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class _Tlp(Event):
    cycle: int
    dwords: list[int]

    def to_json(self) -> str:
        """Return the event as one line of JSON, without the end of line."""
        return f'{{"event":"{type(self).__name__}","cycle":{self.cycle},"dwords":"{_dwords_text(self.dwords)}"}}'


@dataclass(frozen=True)
class TlpSent(_Tlp):
    """The card took the last beat of a TLP of the host."""


@dataclass(frozen=True)
class TlpReceived(_Tlp):
    """The host took the last beat of a TLP of the card."""


@dataclass(frozen=True)
class Operation(Event):
    """Software performed an operation (of :mod:`models.host`), which ended in this cycle."""

    cycle: int
    operation: host.Operation
    result: int | bool | None


@dataclass(frozen=True)
class HostStore(Event):
    """Software wrote ``data`` to memory."""

    cycle: int
    address: int
    data: bytes


@dataclass(frozen=True)
class Told(Event):
    """Software told the models of translations something: a method of `AllowedTranslations` and its plain JSON arguments."""

    cycle: int
    method: str
    arguments: list[Any]


@dataclass(frozen=True)
class Note(Event):
    """Something for the reader."""

    cycle: int
    text: str


_EVENTS = {kind.__name__: kind for kind in (RunHeader, Setup, TlpSent, TlpReceived, Operation, HostStore, Told, Note)}
_OPERATIONS = {kind.__name__: kind for kind in (host.ConfigRead, host.ConfigWrite, host.MemoryRead, host.MemoryWrite, host.Delay,
                                                host.WaitInterrupt)}  # fmt: skip


def _dwords_text(dwords: list[int]) -> str:
    return struct.pack(f">{len(dwords)}I", *dwords).hex(" ", 4)


def _dwords(text: str) -> list[int]:
    raw = bytes.fromhex(text)
    return list(struct.unpack(f">{len(raw) // 4}I", raw))


def _operation_parts(operation: Any) -> dict[str, Any]:
    return {"name": type(operation).__name__} | asdict(operation)


def _operation(parts: dict[str, Any]) -> Any:
    return _OPERATIONS[parts["name"]](**{name: parts[name] for name in parts if name != "name"})


_CODECS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dwords": (_dwords_text, _dwords),
    "data": (bytes.hex, bytes.fromhex),
    "operation": (_operation_parts, _operation),
}


def from_json(line: str) -> Any:
    """Return the event that a line of a log holds.

    Raises
    ------
    :exc:`ValueError`
        When the line is none.
    """
    try:
        parts = json.loads(line)
        kind = _EVENTS[parts.pop("event")]
        if parts.keys() != {field.name for field in fields(kind)}:
            raise ValueError("other fields")
        return kind(**{name: _CODECS[name][1](parts[name]) if name in _CODECS else parts[name] for name in parts})
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"A line of a log must be an event, not {line[:80]!r}") from error
