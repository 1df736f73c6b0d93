"""Driver of the register bus (``rtl/regs/bus.py``) in cocotb: accesses of 1 to 8 bytes, one at a time."""

import cocotb
from cocotb.triggers import RisingEdge

from ..rtl.regs.bus import RegisterRequest, RegisterResponse
from .stream import Stream, cycle, pack, unpack

__all__ = ["RegisterBus", "RegisterError"]


class RegisterError(Exception):
    """The owner answered an access with ``error``."""


class RegisterBus:
    """The initiator of the register bus port ``name`` of ``dut``.

    It fails the test (AssertionError) when an answer takes more than ``limit`` cycles, and when one comes that nobody
    asked for. ``latencies`` has the cycles from acceptance to answer of each access.

    Parameters
    ----------
    limit : :class:`int`
        Cycles from the acceptance of a request to its answer.
    hold : callable or None
        Called per access; returns for how many cycles the answer is not taken.
    """

    def __init__(self, dut, name="bus", *, limit=16, hold=None):
        self._request, self._response = Stream(dut, f"{name}__request"), Stream(dut, f"{name}__response")
        self._edge, self._limit, self._hold = RisingEdge(dut.clk), limit, hold
        self._waiting = False
        self.latencies = []
        cocotb.start_soon(self._response.watch([]))
        cocotb.start_soon(self._expect_silence())

    async def read(self, offset, size=4, *, function=0, bar=0):
        """Return the ``size`` bytes at ``offset`` as a little-endian number. Raises :exc:`RegisterError`."""
        return await self.access(offset, size, None, function=function, bar=bar)

    async def write(self, offset, value, size=4, *, function=0, bar=0):
        """Write the ``size`` bytes at ``offset``. Raises :exc:`RegisterError`."""
        await self.access(offset, size, value, function=function, bar=bar)

    async def access(self, offset, size, value=None, *, function=0, bar=0):
        """Read (``value`` None) or write 1 to 8 bytes inside one aligned 8-byte word."""
        lane = offset % 8
        if not 1 <= size <= 8 - lane:
            raise ValueError(f"Access must be 1 to 8 bytes inside one 8-byte word, not {(offset, size)!r}")
        enables = ((1 << size) - 1) << lane
        data = await self.raw(offset - lane, enables, None if value is None else value << 8 * lane, function=function, bar=bar)
        return data >> 8 * lane & (1 << 8 * size) - 1

    async def raw(self, offset, byte_enable, data=None, *, function=0, bar=0):
        """One access of an aligned 8-byte word with any byte enables; returns the whole word."""
        if self._waiting:
            raise ValueError("At most one access may be outstanding on the register bus, not a second one")
        self._waiting = True
        await self._request.put(pack(RegisterRequest, function=function, bar=bar, offset=offset, is_write=data is not None,
                                     byte_enable=byte_enable, data=data or 0))  # fmt: skip
        begin, hold = cycle(), self._hold() if self._hold else 0
        self._response.set_ready(int(not hold))
        seen = None
        while True:
            await self._edge
            if self._response.read_valid():
                seen = cycle() if seen is None else seen
                if not hold:
                    break
                hold -= 1
                if not hold:
                    self._response.set_ready(1)
            elif cycle() - begin > self._limit:
                where = f"function {function} BAR {bar} offset {offset:#x}"
                raise AssertionError(f"no answer on the register bus after {self._limit} cycles: {where}")
        answer = unpack(RegisterResponse, self._response.read_payload())
        self._response.set_ready(0)
        self._waiting = False
        self.latencies.append(seen - begin)
        if answer.error:
            raise RegisterError(f"function {function} BAR {bar} offset {offset:#x}")
        return answer.data

    async def _expect_silence(self):
        while True:
            await self._edge
            if not self._waiting and self._response.read_valid():
                await self._edge  # the last answer is still to be seen for the cycle in which it was taken
                if not self._waiting and self._response.read_valid():
                    raise AssertionError("an answer on the register bus that nobody asked for")
