"""The loop of a process that serves a compiled card to guests: cycles pass while the card is busy, sockets are looked at in between."""

import selectors
import time

__all__ = ["Loop"]

_LONGEST_SLEEP_S = 0.05  # conditions of the caller are looked at so often


class Loop:
    """Steps the card while it is busy, and calls handlers of file descriptors that can be read.

    An idle card costs nothing: the loop then sleeps until a descriptor is readable. What a handler or the card raises ends
    :meth:`run`.

    Parameters
    ----------
    bridge : :class:`.bridge.Bridge`
    cycles : :class:`int`
        How many pass between two looks at the descriptors.

    Attributes
    ----------
    is_paused : :class:`bool`
        No cycle passes while it is set, except in accesses of a guest.
    """

    def __init__(self, bridge, *, cycles=64):
        if not isinstance(cycles, int) or cycles < 1:
            raise ValueError(f"Cycles between two looks must be a positive integer, not {cycles!r}")
        self.bridge, self.cycles, self.is_paused = bridge, cycles, False
        self._selector, self._is_stopped = selectors.DefaultSelector(), False
        self._soon = []

    def add(self, fd, handler):
        """Call ``handler()`` whenever ``fd`` (or an object with fileno) can be read, or its other end is gone."""
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def remove(self, fd):
        """Forget ``fd``, while it is still open; KeyError when it is not known."""
        self._selector.unregister(fd)

    def soon(self, handler):
        """Call ``handler()`` once, in the next round."""
        self._soon.append(handler)

    def stop(self):
        """Let the :meth:`run` under way return False after this round."""
        self._is_stopped = True

    def run(self, until=None, timeout_s=None):
        """Serve until ``until()`` holds: return True. Return False after ``timeout_s`` seconds, or when it was stopped."""
        self._is_stopped = False
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while until is None or not until():
            if self._is_stopped or (end is not None and time.monotonic() >= end):
                return False
            is_busy = not self.is_paused and self.bridge.pump(self.cycles) > 0
            for key, _ in self._selector.select(0 if is_busy or self._soon else _LONGEST_SLEEP_S):
                if self._selector.get_map().get(key.fd) is key:  # no handler before it removed it
                    key.data()
            soon, self._soon = self._soon, []
            for handler in soon:
                handler()
        return True

    def close(self):
        """Forget all descriptors; they stay open."""
        self._selector.close()
