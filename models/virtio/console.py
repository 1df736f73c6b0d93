"""virtio-console: one port, its two streams of bytes, and a driver. [VIRTIO1.4 5.3]"""

from __future__ import annotations

from enum import IntEnum

from .buffers import RingUser

__all__ = ["CONFIG_BYTES", "ConsoleDevice", "ConsoleDriver", "ConsoleFeature"]

CONFIG_BYTES = 12  # cols, rows, max_nr_ports, emerg_wr [VIRTIO1.4 5.3.4]


class ConsoleFeature(IntEnum):
    """Feature bits that the golden device can offer: one port only. [VIRTIO1.4 5.3.3]"""

    SIZE = 0
    EMERG_WRITE = 2


class ConsoleDevice:
    """The golden console: what must have come, in order and nothing lost, however it is cut into buffers.

    Give it what goes in at one end (:meth:`typed` by the user's side, :meth:`printed` by the driver) and ask of what comes out.

    Parameters
    ----------
    features : :class:`int`
        What is offered.
    cols, rows : :class:`int`
        With SIZE.
    """

    def __init__(self, features: int = 0, *, cols: int = 0, rows: int = 0):
        if features & ~sum(1 << bit for bit in ConsoleFeature):
            raise ValueError(f"Features must be known to this device, not {features!r}")
        self.features, self.cols, self.rows = features, cols, rows
        self._typed, self._printed = bytearray(), bytearray()

    def config(self) -> bytes:
        """Return the device configuration; what is not offered is 0. [VIRTIO1.4 5.3.4]"""
        size = (self.cols, self.rows) if self.features >> ConsoleFeature.SIZE & 1 else (0, 0)
        return b"".join(number.to_bytes(2, "little") for number in size) + bytes(CONFIG_BYTES - 4)

    def typed(self, data: bytes) -> None:
        """The user's side gave bytes for the driver."""
        self._typed += data

    def printed(self, data: bytes) -> None:
        """The driver gave bytes for the user's side."""
        self._printed += data

    def arrived(self, data: bytes) -> str:
        """The driver found bytes; return why they cannot be, or an empty string."""
        return _next(self._typed, data, "typed")

    def shown(self, data: bytes) -> str:
        """The user's side got bytes; return why they cannot be, or an empty string."""
        return _next(self._printed, data, "printed")

    @property
    def missing(self) -> tuple[int, int]:
        """Bytes that did not come out yet: for the driver, for the user's side."""
        return len(self._typed), len(self._printed)


def _next(expected: bytearray, data: bytes, what: str) -> str:
    if expected[: len(data)] != data:
        return f"{bytes(data[:16])!r} came, {bytes(expected[:16])!r} was {what}"
    del expected[: len(data)]
    return ""


class ConsoleDriver:
    """The driver's side of one port: bytes out, bytes in.

    Parameters
    ----------
    receive, transmit : :class:`.buffers.RingUser`
        The queues.
    room : :class:`int`
        Writable bytes of a receive buffer.
    """

    def __init__(self, receive: RingUser, transmit: RingUser, *, room: int = 256):
        if room < 1:
            raise ValueError(f"A receive buffer must have at least 1 byte, not {room!r}")
        self.receive, self.transmit, self.room = receive, transmit, room

    def write(self, data: bytes) -> int:
        """Add bytes; return their buffer's id. The device sees them after ``transmit.ring.publish()``."""
        return self.transmit.add(data)

    def written(self) -> list[int]:
        """Return the ids of buffers that the device is done with since."""
        return [number for number, _, _ in self.transmit.taken()]

    def read(self) -> bytes:
        """Return the bytes that came since. A buffer that comes back empty is noted as damage: it says nothing."""
        found = b""
        for number, _, used in self.receive.taken():
            if not used:
                self.receive.damage.append(f"buffer {number} came back without a byte")
            found += used
        return found
