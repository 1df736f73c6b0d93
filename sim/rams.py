"""What block RAMs do that Amaranth's memories do not."""

from amaranth import Cat, Module, Mux, Signal, Value
from amaranth.hdl import MemoryInstance

__all__ = ["BlockRams"]


class BlockRams:
    """A platform whose RAMs bring the complement of what was there when a place is read and written at once.

    RAMs are :data:`ringwall.rtl.stream.ram.Ram`. All other memories, and ports that are transparent for the one that writes, are as ever.
    """

    def get_memory(self, memory):
        """Return what stands for ``memory``; Amaranth calls this."""
        m = Module()
        cells = MemoryInstance(data=memory.data, attrs=memory.attrs)
        writes = {port: cells.write_port(domain=port.domain, addr=port.addr, data=port.data, en=port.en) for port in memory.write_ports}
        for port in memory.read_ports:
            hidden = [write for write in writes if write not in port.transparent_for]
            seen = port.data
            if "no_rw_check" in memory.attrs and hidden:
                value, collided = Value.cast(port.data), Signal()
                seen = Signal(len(value))
                m.d.comb += value.eq(Mux(collided, ~seen, seen))
                with m.If(port.en):
                    m.d[port.domain] += collided.eq(Cat(write.en.any() & (write.addr == port.addr) for write in hidden).any())
            cells.read_port(domain=port.domain, addr=port.addr, data=seen, en=port.en,
                            transparent_for=[writes[write] for write in port.transparent_for])  # fmt: skip
        if "no_rw_check" not in memory.attrs:
            return cells
        m.submodules.cells = cells
        return m
