"""What stands around the IOMMU or its programming interface: registers, memory behind the wall port, a gate that drains when told."""

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ..models.host import Delay, MemoryRead, MemoryWrite
from ..models.iommu.registers import Capabilities, register_list
from ..models.memory import GuestMemory
from ..rtl.tlp.layouts import BurstStatus, ConfigState
from .burst_bus import BurstMemory
from .host_port import drive
from .regs_bus import RegisterBus
from .stream import Stream, cycle, pack, start

__all__ = ["IommuHost"]

_PLACE = {one.name: (one.offset, one.width // 8) for one in register_list(Capabilities(ATS=True))}


class IommuHost:
    """Drives ``dut``, which has the members of ``rtl/iommu/interface.py`` for bus, wall port, fence and config.

    Parameters
    ----------
    latency, fence_latency : callable
        Cycles from a read to its data, and from a fence to its answer.
    atomics : :class:`bool`
        ``dut`` has ``operands``.
    hold, limit
        See :class:`RegisterBus`.

    Attributes
    ----------
    memory : :class:`GuestMemory`
        All RAM.
    broken : dict
        Page number -> BurstStatus of accesses to it, or ``(BurstStatus, is_write)`` for one direction only.
    bursts : list
        ``(cycle, burst, data)`` as :class:`BurstMemory` logs them.
    fences : list
        ``[cycle asked, cycle answered or None]`` of each fence.
    """

    def __init__(self, dut, width, *, latency=lambda: 20, fence_latency=lambda: 5, atomics=False, hold=None, limit=16):
        self.dut, self.width, self.latency, self.fence_latency = dut, width, latency, fence_latency
        self.atomics, self.hold, self.limit = atomics, hold, limit
        self.memory, self.broken, self.fences = GuestMemory(), {}, []

    async def begin(self, **config):
        """Reset and start to serve; ``config`` are fields of ConfigState beside MSI-X Enable, which is 1."""
        await start(self.dut)
        self.configure(**config)
        self.bus = RegisterBus(self.dut, hold=self.hold, limit=self.limit)
        host = BurstMemory(self.memory, width=self.width, bursts=Stream(self.dut, "bursts"), read_data=Stream(self.dut, "read_data"),
                           write_data=Stream(self.dut, "write_data"), write_done=Stream(self.dut, "write_done"), ordered=False,
                           operands=Stream(self.dut, "operands") if self.atomics else None,
                           latency=self._latency, status=self._status)  # fmt: skip
        self.bursts = host.log
        host.start()
        cocotb.start_soon(self._drain())
        return self

    def configure(self, **config):
        """Drive ``config`` with MSI-X Enable = 1 unless told otherwise."""
        self.dut.config.value = pack(ConfigState, **({"msix_enable": 1, "bus_master": 1} | config))

    async def read(self, name):
        """Read a register by name."""
        return await self.bus.read(*_PLACE[name])

    async def write(self, name, value):
        """Write a register by name."""
        offset, size = _PLACE[name]
        await self.bus.write(offset, int(value), size)

    async def perform(self, software):
        """Run a generator over operations of ``models.host`` whose BAR is at 0; return what it returns."""
        return await drive(software, self._perform)

    async def _perform(self, operation):
        match operation:
            case MemoryRead():
                return await self.bus.read(operation.address, operation.size)
            case MemoryWrite():
                await self.bus.write(operation.address, operation.value, operation.size)
            case Delay():
                await ClockCycles(self.dut.clk, operation.cycles)
            case _:
                raise ValueError(f"Operation must be an access of the BAR or a delay, not {operation!r}")

    async def until(self, condition, what, cycles=5000):
        """Wait for ``condition()``; AssertionError when it takes longer than ``cycles``."""
        for _ in range(cycles):
            if condition():
                return
            await RisingEdge(self.dut.clk)
        raise AssertionError(f"waited {cycles} cycles for {what}")

    async def until_register(self, name, condition, what, reads=500):
        """Read a register until ``condition(value)`` and return it; AssertionError after ``reads``."""
        for _ in range(reads):
            value = await self.read(name)
            if condition(value):
                return value
        raise AssertionError(f"read {name} {reads} times for {what}; it is {value:#x}")

    def writes(self, low, high):
        """Return ``(cycle, address, data)`` of the successful writes to addresses from ``low`` below ``high``."""
        return [(when, b.address, data) for when, b, data in self.bursts if b.is_write and data is not None and low <= b.address < high]

    def _latency(self):
        return self.latency()

    def _status(self, burst):
        found = self.broken.get(burst.address >> 12, BurstStatus.OK)
        if isinstance(found, tuple):
            return found[0] if found[1] == burst.is_write else BurstStatus.OK
        return found

    async def _drain(self):
        fence, fenced = Stream(self.dut, "fence"), Stream(self.dut, "fenced")
        while True:
            await fence.get()
            self.fences.append([cycle(), None])
            await ClockCycles(self.dut.clk, max(self.fence_latency(), 1))
            await fenced.put()
            self.fences[-1][1] = cycle()
