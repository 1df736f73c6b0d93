"""The host's end of a tunnel: TLPs over bytes, as "Tunnel" of ``rtl/phy/README.md`` says. No clock: who uses it says what time it is."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Arrived", "Deframer", "Frame", "FrameKind", "Hello", "Peer", "Taken", "WrongVersion", "encode_frame"]

_FLAG, _ESCAPE = b"\x7e", b"\x7d"
_VERSION = 1
_MOST_IN_FLIGHT = 127  # DATA frames: so many numbers lie ahead, the others behind


class FrameKind(IntEnum):
    """First byte of a frame."""

    RESET = 1
    HELLO = 2
    DATA = 3
    ACK = 4
    NAK = 5
    PING = 6


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands between two flags: four bytes and dwords; ``kind`` is a :class:`FrameKind`, or a number without a meaning."""

    kind: int
    seq: int = 0
    ack: int = 0
    freed: int = 0
    body: tuple[int, ...] = ()


def encode_frame(frame: Frame) -> bytes:
    """Return the bytes of ``frame``, flags included."""
    plain = struct.pack(f"<4B{len(frame.body)}I", frame.kind, frame.seq, frame.ack, frame.freed, *frame.body)
    plain += zlib.crc32(plain).to_bytes(4, "little")
    return _FLAG + plain.replace(_ESCAPE, _ESCAPE + b"\x5d").replace(_FLAG, _ESCAPE + b"\x5e") + _FLAG


class Deframer:
    """Finds frames in bytes as they come."""

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, data: bytes) -> list[Frame | None]:
        """Return the frames that end in ``data``, None for each that is damaged."""
        *ended, self._begun = (self._begun + data).split(_FLAG)
        return [_decoded(raw) for raw in ended if raw]


def _decoded(raw: bytes) -> Frame | None:
    """Return the frame between two flags, or None."""
    if raw.endswith(_ESCAPE):
        return None
    first, *others = raw.split(_ESCAPE)
    plain = first + b"".join(bytes([part[0] ^ 0x20]) + part[1:] for part in others if part)  # of two escapes the first counts for nothing
    if len(plain) < 8 or len(plain) % 4 or zlib.crc32(plain[:-4]) != int.from_bytes(plain[-4:], "little"):
        return None
    return Frame(*struct.unpack("<4B", plain[:4]), struct.unpack(f"<{len(plain) // 4 - 2}I", plain[4:-4]))


@dataclass(frozen=True, slots=True)
class Hello:
    """What a card says of itself: ``lanes`` of 32 bits, ``window`` TLPs that it sends unacknowledged, ``room`` dwords of TLPs."""

    lanes: int
    window: int
    room: int


class WrongVersion(Exception):
    """The card speaks another version of the protocol."""

    def __init__(self, version: int):
        super().__init__(f"The card's end of the tunnel has version {version}, this one {_VERSION}: build both from the same source.")


@dataclass
class Statistics:
    """What a :class:`Peer` has seen."""

    frames: int = 0  # that were sent
    again: int = 0  # TLPs that were sent again
    arrived: int = 0  # TLPs
    repeated: int = 0  # TLPs that came again
    damaged: int = 0  # frames


@dataclass(frozen=True, slots=True)
class Taken:
    """A TLP of the host has left the card's buffer: what the card sends from now on, it sends knowing it."""

    dwords: list[int]


@dataclass(frozen=True, slots=True)
class Arrived:
    """A TLP of the card."""

    dwords: list[int]


class Peer:
    """The host's end: numbers, acknowledges and repeats.

    Parameters
    ----------
    session : :class:`int`
        32 bits that no session had that the card may remember.
    patience : :class:`int`
        RESET, and TLPs without an acknowledgement, are sent again when for so long nothing was sent or newly acknowledged, in units of
        ``now``.
    keep_alive : :class:`int`
        After so long without a frame one is sent.
    now : :class:`int`
        The time, as in all calls.

    Attributes
    ----------
    hello : :class:`Hello` or None
        Once the card has answered.
    heard : :class:`int`
        When the last frame came.
    statistics : :class:`Statistics`
    """

    def __init__(self, session: int, *, patience: int, keep_alive: int, now: int = 0):
        if not 0 <= session < 1 << 32:
            raise ValueError(f"A session must be a number of 32 bits, not {session!r}")
        self.session, self.patience, self.keep_alive = session, patience, keep_alive
        self.hello: Hello | None = None
        self.statistics = Statistics()
        self.heard = now
        self._deframer = Deframer()
        self._waiting: deque[list[int]] = deque()  # TLPs that were never sent
        self._sent: deque[list[int]] = deque()  # those without an acknowledgement, from number _acked on
        self._inside: deque[list[int]] = deque()  # those that have not left the card's buffer, from number _freed on
        self._acked = self._freed = self._expected = 0
        self._at = 0  # of _sent: to be sent next
        self._last = now - max(patience, keep_alive)  # when a frame was sent
        self._progress = self._last  # when TLPs were sent or newly acknowledged
        self._owes_ack = self._owes_nak = self._has_missed = False

    @property
    def is_quiet(self) -> bool:
        """Everything that was to be sent has been taken by the card, everything that came is acknowledged."""
        return not (self._waiting or self._inside or self._owes_ack or self._owes_nak)

    def send(self, dwords: Sequence[int]) -> None:
        """Send a TLP, behind those before."""
        self._waiting.append(list(dwords))

    def feed(self, data: bytes, now: int) -> list[Taken | Arrived]:
        """Take bytes of the line; return what happened by them, in order.

        Raises
        ------
        :exc:`WrongVersion`
            When the card has another.
        """
        news: list[Taken | Arrived] = []
        for frame in self._deframer.feed(data):
            if frame is not None:
                self.heard = now
                self._frame(frame, now, news)
            else:
                self.statistics.damaged += 1
                self._miss()
        return news

    def _frame(self, frame: Frame, now: int, news: list[Taken | Arrived]) -> None:
        if frame.kind == FrameKind.HELLO:
            if self.hello is None and len(frame.body) == 3 and frame.body[0] == self.session:
                version, lanes, window, _ = frame.body[1].to_bytes(4, "little")
                if version != _VERSION:
                    raise WrongVersion(version)
                self.hello = Hello(lanes, window, frame.body[2])
                self._has_missed = self._owes_nak = False
        elif self.hello is not None and frame.kind in _BODIES and bool(frame.body) is _BODIES[frame.kind]:
            self._acknowledge(frame, now, news)
            if frame.kind == FrameKind.DATA:
                self._data(frame, news)
            elif frame.kind == FrameKind.NAK:
                self._at = 0
            elif frame.kind == FrameKind.PING:
                self._owes_ack = True

    def _acknowledge(self, frame: Frame, now: int, news: list[Taken | Arrived]) -> None:
        """Both counts only grow, and neither beyond what was sent; TLPs are acknowledged before they leave the card's buffer."""
        acked = (frame.ack - self._acked) % 256
        if acked <= len(self._sent):
            for _ in range(acked):
                self._sent.popleft()
            self._acked, self._at = frame.ack, max(0, self._at - acked)
            self._progress = now if acked else self._progress
        freed = (frame.freed - self._freed) % 256
        if freed <= len(self._inside) - len(self._sent):
            news += [Taken(self._inside.popleft()) for _ in range(freed)]
            self._freed = frame.freed

    def _data(self, frame: Frame, news: list[Taken | Arrived]) -> None:
        if frame.seq == self._expected:
            self._expected = (self._expected + 1) % 256
            self._owes_ack, self._has_missed = True, False
            self.statistics.arrived += 1
            news.append(Arrived(list(frame.body)))
        elif (frame.seq - self._expected) % 256 < 128:
            self._miss()
        else:
            self.statistics.repeated += 1
            self._owes_ack = True

    def _miss(self) -> None:
        """Something is missing: say so, but once until the next TLP comes."""
        self._owes_nak = self._owes_nak or not self._has_missed
        self._has_missed = True

    def output(self, now: int) -> bytes:
        """Return what is to be put on the line now."""
        frames: list[Frame] = []
        if self.hello is None:
            if now - self._last >= self.patience:
                frames.append(Frame(FrameKind.RESET, body=(self.session,)))
        else:
            if self._sent and self._at == len(self._sent) and now - self._progress >= self.patience:
                self._at = 0
            if self._owes_nak:
                frames.append(self._made(FrameKind.NAK))
            self._fill()
            while self._at < len(self._sent):
                frames.append(self._made(FrameKind.DATA, (self._acked + self._at) % 256, tuple(self._sent[self._at])))
                self._at, self._progress = self._at + 1, now
            if not frames and (self._owes_ack or now - self._last >= self.keep_alive):
                frames.append(self._made(FrameKind.ACK if self._owes_ack else FrameKind.PING))
            self._owes_ack = self._owes_nak = False
        if frames:
            self._last = now
            self.statistics.frames += len(frames)
        return b"".join(map(encode_frame, frames))

    def _fill(self) -> None:
        """Let TLPs be sent as there is room for them in the card, whatever has to be sent again."""
        self.statistics.again += len(self._sent) - self._at
        used = sum(map(len, self._inside))
        while self._waiting and len(self._inside) < _MOST_IN_FLIGHT and used + len(self._waiting[0]) <= self.hello.room:
            used += len(self._waiting[0])
            self._inside.append(self._waiting[0])
            self._sent.append(self._waiting.popleft())

    def _made(self, kind: FrameKind, seq: int = 0, body: tuple[int, ...] = ()) -> Frame:
        return Frame(kind, seq, self._expected, self._expected, body)


_BODIES = {FrameKind.DATA: True, FrameKind.ACK: False, FrameKind.NAK: False, FrameKind.PING: False}  # whether there must be one
