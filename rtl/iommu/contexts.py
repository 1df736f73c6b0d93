"""The caches of device contexts and process contexts."""

from amaranth import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .features import Features


def context_layout(features):
    """Return the layout of what translation needs of a device context. [RVIOMMU1.0 3.1.3]

    ``root_ppn`` and ``fsc_mode`` are those of iosatp, or with ``PDTV`` those of pdtp.
    """
    return data.StructLayout({
        "device_id": 24, "fsc_mode": 4, "root_ppn": 44, "PSCID": 20, "DTF": 1, "PDTV": 1,
        **({"DPE": 1} if features.has_processes else {}),
        **({"guest_root_ppn": 44, "GSCID": 16, "guest_mode": 4} if features.has_second_stage else {}),
        **({"msi_on": 1, "msi_ppn": 44, "msi_mask": features.guest_page_bits, "msi_pattern": features.guest_page_bits}
           if features.MSI_FLAT else {}),
        **({"SADE": 1, "GADE": 1} if features.AMO_HWAD else {}),
        **({"EN_ATS": 1, "EN_PRI": 1, "PRPR": 1} if features.ATS else {}), **({"T2GPA": 1} if features.T2GPA else {}),
    })  # fmt: skip


Context = context_layout(Features())

# What translation needs of a process context. [RVIOMMU1.0 3.2.2]
Process = data.StructLayout({"device_id": 24, "process_id": 20, "fsc_mode": 4, "root_ppn": 44, "PSCID": 20, "ENS": 1, "SUM": 1})


class ContextCache(wiring.Component):
    """Keeps valid contexts, each at the place that the low bits of its device_id, and of its process_id if it has one, say.

    Latency: lookups are combinational; what is filled or forgotten in cycle n shows in cycle n + 1, and a fill in the cycle of a forget
    is forgotten too. Throughput: one lookup per port, one fill, one forget per cycle.

    Parameters
    ----------
    entries : :class:`int`
        A power of two, at least 2.
    ports : :class:`int`
        Lookups per cycle.
    layout
        One context: ``Process``, or one of :func:`context_layout`.

    Members
    -------
    device_id, process_id : ``In(24)``, ``In(20)``, one per port
        Sought; ``process_id`` is there if it is in the layout.
    found, context : ``Out(1)``, ``Out(layout)``, one per port
        Whether it is here, and what it says.
    fill : ``In(stream.Signature(layout))``
        New contexts; always taken.
    forget : ``In(1)``
        Forget all.

    Raises
    ------
    :exc:`ValueError`
        If ``entries`` is not such a number.
    """

    def __init__(self, *, entries=8, ports=1, layout=Context):
        if not isinstance(entries, int) or entries < 2 or entries & (entries - 1):
            raise ValueError(f"Context entries must be a power of two and at least 2, not {entries!r}")
        self.entries, self.ports, self.layout = entries, ports, layout
        self._keys = [name for name in ("device_id", "process_id") if name in dict(layout)]
        super().__init__({
            **{name: In(layout[name].shape).array(ports) for name in self._keys},
            "found": Out(1).array(ports),
            "context": Out(layout).array(ports),
            "fill": In(stream.Signature(layout)),
            "forget": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        bits = self.entries.bit_length() - 1
        m.submodules.places = places = Memory(shape=self.layout, depth=self.entries, init=[])
        write = places.write_port()
        valid = Signal(self.entries)

        def place(keys):
            result = keys[0][:bits]
            for key in keys[1:]:
                result = result ^ key[:bits]
            return result

        m.d.comb += [
            self.fill.ready.eq(1),
            write.addr.eq(place([self.fill.payload[name] for name in self._keys])),
            write.data.eq(self.fill.payload),
            write.en.eq(self.fill.valid),
        ]
        for port in range(self.ports):
            read, sought = places.read_port(domain="comb"), [getattr(self, name)[port] for name in self._keys]
            same = Signal(len(sought), name=f"same_{port}")
            m.d.comb += [
                read.addr.eq(place(sought)),
                self.context[port].eq(read.data),
                *(same[n].eq(read.data[name] == key) for n, (name, key) in enumerate(zip(self._keys, sought))),
                self.found[port].eq(valid.bit_select(read.addr, 1) & same.all()),
            ]
        with m.If(self.fill.valid):
            m.d.sync += valid.bit_select(write.addr, 1).eq(1)
        with m.If(self.forget):
            m.d.sync += valid.eq(0)
        return m
