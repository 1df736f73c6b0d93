"""virtio-rng: what the entropy device may do with a buffer. [VIRTIO1.4 5.4]"""

from __future__ import annotations

__all__ = ["answer_problem"]


def answer_problem(readable: int, room: int, used: int) -> str:
    """Return why a buffer of ``readable`` and ``room`` writable bytes must not come back with ``used``; empty: it may.

    One random byte or more, not beyond the buffer. A buffer without room, or one with readable bytes, which no driver may make, comes
    back with any length that fits.
    """
    if used > room:
        return f"{used} bytes of {room}"
    if room and not used and not readable:
        return "no random byte"
    return ""
