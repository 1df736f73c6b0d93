"""The device-context cache."""

from amaranth import Array, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out


class Context(data.Struct):
    """What translation needs of a device context. [RVIOMMU1.0 3.1.3]"""

    device_id: 24
    is_bare: 1  # no first stage
    root_ppn: 44
    PSCID: 20
    DTF: 1
    PDTV: 1


class ContextCache(wiring.Component):
    """Keeps valid device contexts, each at the place that the low bits of its device_id say.

    Latency: lookups are combinational; what is filled or forgotten in cycle n shows in cycle n + 1, and a fill in the cycle of a forget
    is forgotten too. Throughput: one lookup per port, one fill, one forget per cycle.

    Parameters
    ----------
    entries : :class:`int`
        A power of two, at least 2.
    ports : :class:`int`
        Lookups per cycle.

    Members
    -------
    device_id : ``In(24)``, one per port
        Sought.
    found, context : ``Out(1)``, ``Out(Context)``, one per port
        Whether it is here, and what it says.
    fill : ``In(stream.Signature(Context))``
        New contexts; always taken.
    forget : ``In(1)``
        Forget all.

    Raises
    ------
    :exc:`ValueError`
        If ``entries`` is not such a number.
    """

    def __init__(self, *, entries=8, ports=1):
        if not isinstance(entries, int) or entries < 2 or entries & (entries - 1):
            raise ValueError(f"Context entries must be a power of two and at least 2, not {entries!r}")
        self.entries, self.ports = entries, ports
        super().__init__({
            "device_id": In(24).array(ports),
            "found": Out(1).array(ports),
            "context": Out(Context).array(ports),
            "fill": In(stream.Signature(Context)),
            "forget": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        bits = self.entries.bit_length() - 1
        places = Array(Signal(Context, name=f"context_{n}") for n in range(self.entries))
        valid = Signal(self.entries)
        m.d.comb += self.fill.ready.eq(1)
        for port in range(self.ports):
            place = self.device_id[port][:bits]
            m.d.comb += [
                self.context[port].eq(places[place]),
                self.found[port].eq(valid.bit_select(place, 1) & (self.context[port].device_id == self.device_id[port])),
            ]
        with m.If(self.fill.valid):
            place = self.fill.payload.device_id[:bits]
            m.d.sync += [places[place].eq(self.fill.payload), valid.bit_select(place, 1).eq(1)]
        with m.If(self.forget):
            m.d.sync += valid.eq(0)
        return m
