"""The leaf tables that the walker knows, of both stages."""

from functools import reduce
from operator import or_

from amaranth import Cat, Mux, Signal
from amaranth.lib import data
from amaranth.lib.memory import Memory


class LeafTables:
    """A small cache: physical page of the leaf table of a region, by stage, root, mode and GSCID.

    Attributes
    ----------
    known, ppn
        Signals: whether the table of the page at work is here, and where it lies.
    is_global
        With ATS: an entry that leads to it has G.
    """

    def __init__(self, m, work, count):
        features, context = work.features, work.context
        two_stages, is_second, has_guest = features.has_second_stage, work.is_second, work.has_guest
        place = data.StructLayout({
            "root": 44, "region": features.page_bits - 9, **({"mode": 2} if features.levels > 3 else {}),
            **({"is_second": 1, "GV": 1, "GSCID": 16} if two_stages else {}),
        })  # fmt: skip
        self._places = [Signal(place, name=f"table_{n}") for n in range(count)]
        table = data.StructLayout({"ppn": 44, **({"is_global": 1} if features.ATS else {})})
        m.submodules.tables = tables = Memory(shape=table, depth=count, init=[])
        found, self._write = tables.read_port(domain="comb"), tables.write_port()
        self._valid, self._turn = Signal(count), Signal(range(max(count, 2)))
        self.known, self.ppn, self._sought = Signal(), found.data.ppn, Signal(place)
        self.is_global = found.data.is_global if features.ATS else None
        sought = self._sought
        mode = Mux(is_second, context.guest_mode, context.fsc_mode) if two_stages else context.fsc_mode
        m.d.comb += [
            sought.root.eq(Mux(is_second, context.guest_root_ppn, context.root_ppn) if two_stages else context.root_ppn),
            sought.region.eq(work.page[9 : features.page_bits]),
        ]
        if features.levels > 3:
            m.d.comb += sought.mode.eq(mode[:2])
        if two_stages:
            m.d.comb += [sought.is_second.eq(is_second), sought.GV.eq(has_guest), sought.GSCID.eq(Mux(has_guest, context.GSCID, 0))]
        same = Cat(self._valid[n] & (known.as_value() == sought.as_value()) for n, known in enumerate(self._places))
        m.d.comb += [
            self.known.eq(same.any()), found.addr.eq(reduce(or_, (Mux(is_same, n, 0) for n, is_same in enumerate(same)))),
            self._write.addr.eq(self._turn), self._write.data.ppn.eq(work.next_ppn),
        ]
        if features.ATS:
            m.d.comb += self._write.data.is_global.eq(work.walk.is_global)

    def keep(self, m):
        """Remember that the table of the page at work is ``next_ppn``, in place of the oldest."""
        m.d.comb += self._write.en.eq(1)
        for n, known in enumerate(self._places):
            with m.If(self._turn == n):
                m.d.sync += [known.eq(self._sought), self._valid[n].eq(1)]
        m.d.sync += self._turn.eq(Mux(self._turn == len(self._places) - 1, 0, self._turn + 1))

    def forget(self, m):
        """Forget all."""
        m.d.sync += self._valid.eq(0)
