"""The leaf tables that the walker knows, of both stages."""

from amaranth import Mux, Signal
from amaranth.lib import data
from amaranth.lib.memory import Memory

WAYS = 2


class LeafTables:
    """A small cache: physical page of the leaf table of a region, by stage, root, mode and GSCID.

    Sets of ``WAYS``, for sequential regions of one root evenly; the low bits of the root spread them.

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
        name = data.StructLayout({
            "root": 44, "region": features.page_bits - 9, **({"mode": 2} if features.levels > 3 else {}),
            **({"is_second": 1, "GV": 1, "GSCID": 16} if two_stages else {}),
        })  # fmt: skip
        sets = count // WAYS
        table = data.StructLayout({"ppn": 44, **({"is_global": 1} if features.ATS else {})})
        self._valid, self._turns = [Signal(sets, name=f"table_valid_{n}") for n in range(WAYS)], Signal(sets)
        self.known, sought, found = Signal(), Signal(name), Signal(table)
        self.ppn, self.is_global = found.ppn, found.is_global if features.ATS else None
        mode = Mux(is_second, context.guest_mode, context.fsc_mode) if two_stages else context.fsc_mode
        m.d.comb += [
            sought.root.eq(Mux(is_second, context.guest_root_ppn, context.root_ppn) if two_stages else context.root_ppn),
            sought.region.eq(work.page[9 : features.page_bits]),
        ]
        if features.levels > 3:
            m.d.comb += sought.mode.eq(mode[:2])
        if two_stages:
            m.d.comb += [sought.is_second.eq(is_second), sought.GV.eq(has_guest), sought.GSCID.eq(Mux(has_guest, context.GSCID, 0))]
        self._at = (sought.region ^ sought.root)[: (sets - 1).bit_length()]
        self._turn = self._turns.bit_select(self._at, 1)
        self._writes, same = [], Signal(WAYS)
        for way, valid in enumerate(self._valid):  # what the names say leads to no second read
            m.submodules[f"table_names_{way}"] = names = Memory(shape=name, depth=sets, init=[])
            m.submodules[f"tables_{way}"] = tables = Memory(shape=table, depth=sets, init=[])
            read, write = names.read_port(domain="comb"), names.write_port()
            read_table, write_table = tables.read_port(domain="comb"), tables.write_port()
            m.d.comb += [
                read.addr.eq(self._at), write.addr.eq(self._at), write.data.eq(sought),
                read_table.addr.eq(self._at), write_table.addr.eq(self._at), write_table.data.ppn.eq(work.next_ppn),
                same[way].eq(valid.bit_select(self._at, 1) & (read.data.as_value() == sought.as_value())),
            ]
            if features.ATS:
                m.d.comb += write_table.data.is_global.eq(work.walk.is_global)
            with m.If(same[way] | (way == 0)):
                m.d.comb += found.eq(read_table.data)
            self._writes.append((write, write_table))
        m.d.comb += self.known.eq(same.any())

    def keep(self, m):
        """Remember that the table of the page at work is ``next_ppn``, in place of the older one of its set."""
        for way, (valid, writes) in enumerate(zip(self._valid, self._writes)):
            with m.If(self._turn == way):
                m.d.comb += [write.en.eq(1) for write in writes]
                m.d.sync += valid.bit_select(self._at, 1).eq(1)
        m.d.sync += self._turn.eq(~self._turn)

    def forget(self, m):
        """Forget all."""
        m.d.sync += [valid.eq(0) for valid in self._valid]
