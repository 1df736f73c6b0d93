"""A memory behind burst streams: stands where gate, requester and host stand, for tests of their clients."""

import cocotb
from cocotb.triggers import Event

from ..rtl.tlp.layouts import AtomicKind, Burst, BurstData, BurstDone, BurstStatus
from .stream import cycle, pack, sleep, unpack

__all__ = ["BurstMemory", "data_beats"]


def data_beats(width, address, content, cookie=0, status=BurstStatus.OK):
    """Return the BurstData payloads (ints) of ``content`` at ``address``; lanes follow the address."""
    lanes, layout = width // 8, BurstData(width)
    start, beats = address % lanes, []
    rows = -(-(start + len(content)) // lanes)
    for n in range(rows):
        low, high = max(n * lanes, start), min((n + 1) * lanes, start + len(content))
        keep = ((1 << (high - low)) - 1) << (low - n * lanes)
        value = int.from_bytes(content[low - start : high - start], "little") << 8 * (low - n * lanes)
        beats.append(pack(layout, data=value, keep=keep, first=n == 0, last=n == rows - 1, cookie=cookie,
                          status=status if n == rows - 1 else BurstStatus.OK))
    return beats


class BurstMemory:
    """Serves the bursts of one client from ``memory`` (an object with ``read(address, length)`` and ``write(address, data)``).

    Parameters
    ----------
    bursts, read_data, write_data, write_done, operands : :class:`Stream`
        The client's streams; those that it does not have are None. The only AtomicOp is CAS of 8 bytes; its operands are in front of it.
    latency : callable
        Cycles from a read burst to its data, drawn for each.
    ordered : :class:`bool`
        Reads are answered in burst order; else in the order of their latencies.
    status : callable
        ``status(burst) -> BurstStatus``: how a burst is to end; anything but OK moves nothing.
    gaps : callable
        Idle cycles in front of each data beat.

    Attributes
    ----------
    log : list
        One ``(cycle, burst, data)`` per burst in the order of arrival; ``data`` is None for failed ones.
    """

    def __init__(self, memory, *, width, bursts, read_data=None, write_data=None, write_done=None, operands=None, latency=lambda: 20,
                 ordered=True, status=lambda burst: BurstStatus.OK, gaps=None):
        self.memory, self.width, self.latency, self.ordered, self.status = memory, width, latency, ordered, status
        self.bursts, self.read_data, self.write_data, self.write_done = bursts, read_data, write_data, write_done
        self.gaps, self.operands, self.operand_beats = gaps, operands, []
        self.log, self.reads, self.writes = [], [], []
        self._read, self._written = Event(), Event()

    def start(self):
        """Begin to serve."""
        cocotb.start_soon(self.bursts.watch(self))
        self.bursts.set_ready(1)
        if self.read_data is not None:
            cocotb.start_soon(self._answer_reads())
        if self.operands is not None:
            cocotb.start_soon(self.operands.watch(self.operand_beats))
            self.operands.set_ready(1)
        if self.write_data is not None:
            cocotb.start_soon(self._take_writes())
        return self

    def append(self, payload):
        """A burst was taken."""
        burst = unpack(Burst, payload)
        problem = self._problem(burst)
        if problem:
            raise AssertionError(f"{self.bursts.name}: {problem}")
        if burst.is_write:
            self.writes.append(burst)
            self._written.set()
        else:
            self.reads.append((cycle() + self.latency(), burst, b"" if burst.atomic == AtomicKind.NONE else self._take_operands(burst)))
            self._read.set()

    def _take_operands(self, burst):
        """Return both operands of a CAS."""
        content, last = b"", False
        while not last:
            beat = unpack(BurstData(self.width), self.operand_beats.pop(0))
            if bool(beat.first) != (not content) or beat.keep & (beat.keep + 1):
                raise AssertionError(f"{self.operands.name}: keep {beat.keep:#x} of {burst}")
            content += beat.data.to_bytes(self.width // 8, "little")[: beat.keep.bit_length()]
            last = beat.last
        if burst.atomic != AtomicKind.CAS or burst.length_bytes != 8 or len(content) != 16:
            raise AssertionError(f"{self.bursts.name}: {burst} with operands {content.hex()}")
        return content

    @staticmethod
    def _problem(burst):
        if not 1 <= burst.length_bytes <= 4096:
            return f"burst of {burst.length_bytes} bytes"
        if burst.address // 4096 != (burst.address + burst.length_bytes - 1) // 4096:
            return f"burst crosses 4 KiB: {burst.address:#x}+{burst.length_bytes:#x}"
        return None

    async def _answer_reads(self):
        edge = self.read_data._edge
        while True:
            while not self.reads:
                self._read.clear()
                await self._read.wait()
            now, first = cycle(), self.reads[0] if self.ordered else min(self.reads, key=lambda item: item[0])
            if first[0] > now:
                await sleep(edge, first[0], self._read)
                continue
            self.reads.remove(first)
            _, burst, operands = first
            status = self.status(burst)
            if status == BurstStatus.OK:
                content = self.memory.read(burst.address, burst.length_bytes)
                if operands and content == operands[:8]:
                    self.memory.write(burst.address, operands[8:])
                self.log.append((now, burst, content))
                beats = data_beats(self.width, burst.address, content, burst.cookie)
            else:
                self.log.append((now, burst, None))
                beats = [pack(BurstData(self.width), last=1, first=1, cookie=burst.cookie, status=status)]
            await self.read_data.put_many(beats, self.gaps)

    async def _take_writes(self):
        lanes, layout = self.width // 8, BurstData(self.width)
        while True:
            while not self.writes:
                self._written.clear()
                await self._written.wait()
            burst = self.writes.pop(0)
            content, where = bytearray(), burst.address % lanes
            begun = cycle()
            while True:
                beat = unpack(layout, await self.write_data.get())
                width = beat.keep.bit_count()
                if beat.keep != ((1 << width) - 1) << where or bool(beat.first) != (not content):
                    raise AssertionError(f"{self.write_data.name}: keep {beat.keep:#x} at lane {where} of {burst}")
                content += beat.data.to_bytes(lanes, "little")[where : where + width]
                where = 0
                if beat.last:
                    break
            if len(content) != burst.length_bytes:
                raise AssertionError(f"{self.write_data.name}: {len(content)} bytes for {burst}")
            status = self.status(burst)
            if status == BurstStatus.OK:
                self.memory.write(burst.address, bytes(content))
            self.log.append((begun, burst, bytes(content) if status == BurstStatus.OK else None))
            await self.write_done.put(pack(BurstDone, cookie=burst.cookie, status=status))
