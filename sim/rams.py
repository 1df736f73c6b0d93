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
        cells, is_ram, wrong = MemoryInstance(data=memory.data, attrs=memory.attrs), "no_rw_check" in memory.attrs, []
        writes = {port: cells.write_port(domain=port.domain, addr=port.addr, data=port.data, en=port.en) for port in memory.write_ports}
        for port in memory.read_ports:
            hidden = [write for write in writes if write not in port.transparent_for]
            data = port.data
            if is_ram and hidden and port.domain != "comb":  # without a clock there is no cycle in which both happen
                data = Signal(len(Value.cast(port.data)))
                wrong.append((port, data, hidden))
            cells.read_port(domain=port.domain, addr=port.addr, data=data, en=port.en,
                            transparent_for=[writes[write] for write in port.transparent_for])  # fmt: skip
        if not wrong:
            return cells
        m = Module()
        m.submodules.cells = cells
        for port, data, hidden in wrong:
            collided = Signal()
            m.d.comb += Value.cast(port.data).eq(Mux(collided, ~data, data))
            with m.If(port.en):
                m.d[port.domain] += collided.eq(Cat(write.en.any() & (write.addr == port.addr) for write in hidden).any())
        return m
