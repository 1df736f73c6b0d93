"""The leaf tables that the walker knows, of both stages."""

from amaranth import Mux, Signal
from amaranth.lib import data


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
        table = data.StructLayout({"place": place, "ppn": 44, **({"is_global": 1} if features.ATS else {})})
        self._tables = [Signal(table, name=f"table_{n}") for n in range(count)]
        self._valid, self._turn = Signal(count), Signal(range(max(count, 2)))
        self.known, self.ppn, self._sought = Signal(), Signal(44), Signal(place)
        self.is_global, self._walk = Signal(), work.walk if features.ATS else None
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
        for n, table in enumerate(self._tables):
            with m.If(self._valid[n] & (table.place.as_value() == sought.as_value())):
                m.d.comb += [self.known.eq(1), self.ppn.eq(table.ppn)]
                if features.ATS:
                    m.d.comb += self.is_global.eq(table.is_global)

    def keep(self, m, ppn):
        """Remember that the table of the page at work is ``ppn``, in place of the oldest."""
        for n, table in enumerate(self._tables):
            with m.If(self._turn == n):
                m.d.sync += [table.place.eq(self._sought), table.ppn.eq(ppn), self._valid[n].eq(1)]
                if self._walk is not None:
                    m.d.sync += table.is_global.eq(self._walk.is_global)
        m.d.sync += self._turn.eq(Mux(self._turn == len(self._tables) - 1, 0, self._turn + 1))

    def forget(self, m):
        """Forget all."""
        m.d.sync += self._valid.eq(0)
