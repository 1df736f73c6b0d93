"""The IOTLB: first-stage translations by page, size and address space."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

SUPERPAGES = ((4, 16), (9, 21), (18, 30))  # low page-number bits that the page covers, log2 of its size [RVPRIV 10.4, 11]
VPN_BITS = 27  # Sv39
REGION_BITS = 9  # low page-number bits that number the pages of one leaf table


class Entry(data.Struct):
    """A translation; ``reach`` is 0 for 4 KiB, else 1 + the index in ``SUPERPAGES``."""

    vpn: VPN_BITS
    PSCID: 20
    G: 1
    ppn: 44
    readable: 1
    writable: 1
    reach: 2


class Found(data.Struct):
    """Result of a lookup: physical page for the looked-up page, permissions, size."""

    hit: 1
    ppn: 44
    readable: 1
    writable: 1
    size_log2: 6


class Iotlb(wiring.Component):
    """Looks a page up in every cycle.

    Pages of 4 KiB live in sets of ``ways`` entries: as many sequential pages of a 2 MiB region as there are entries fill every set
    evenly, and regions are spread over the sets. Larger pages live in a small associative array. A new entry takes an empty place of its
    set or a random one, so that a cyclic pattern that is a little too large does not evict all of itself. An entry with G matches every
    PSCID. Several entries for one page may exist: one of them answers, and ``discard`` takes all of them out.

    Latency: ``vpn`` in cycle n, ``PSCID`` in cycle n + 1, ``found`` combinationally in cycle n + 1. Throughput: one lookup, one fill, one
    invalidation per cycle. What is filled in cycle n is found by lookups that begin in cycle n + 1; what is forgotten in cycle n is not
    found by those, and a fill in the same cycle is forgotten too.

    Parameters
    ----------
    entries : :class:`int`
        4 KiB entries: a power of two, at least 2 * ``ways``.
    ways : :class:`int`
        A power of two.
    superpage_entries : :class:`int`
        Larger entries: a power of two, at least 2.

    Members
    -------
    vpn, PSCID, advance : ``In``
        The lookup; ``advance`` moves it from its first to its second cycle.
    found : ``Out(Found)``
        Its result.
    discard : ``In(1)``
        The entries found are of no use: forget them.
    fill : ``In(stream.Signature(Entry))``
        New entries; always taken.
    forget, forget_av, forget_vpn : ``In``
        Forget everything, or with ``forget_av`` at least what translates ``forget_vpn``.

    Raises
    ------
    :exc:`ValueError`
        If a size is out of range.
    """

    def __init__(self, *, entries=64, ways=4, superpage_entries=8):
        for name, value, least in (("IOTLB entries", entries, 4), ("IOTLB ways", ways, 1), ("Superpage entries", superpage_entries, 2)):
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two and at least {least}, not {value!r}")
        if entries < 2 * ways:
            raise ValueError(f"IOTLB entries must be at least twice the {ways} ways, not {entries!r}")
        self.entries, self.ways, self.superpage_entries = entries, ways, superpage_entries
        super().__init__({
            "vpn": In(VPN_BITS),
            "PSCID": In(20),
            "advance": In(1),
            "found": Out(Found),
            "discard": In(1),
            "fill": In(stream.Signature(Entry)),
            "forget": In(1),
            "forget_av": In(1),
            "forget_vpn": In(VPN_BITS),
        })

    def elaborate(self, platform):
        m = Module()
        sets = self.entries // self.ways
        bits = sets.bit_length() - 1

        def place(vpn):
            result = vpn[:bits]
            for low in range(max(REGION_BITS, bits), VPN_BITS, bits):
                result = result ^ vpn[low : low + bits]
            return result[:bits]

        entry = self.fill.payload
        m.d.comb += self.fill.ready.eq(1)
        small = self.fill.valid & (entry.reach == 0)
        looked_up, shown = Signal(bits), Signal(bits)
        sought, forgotten, filled = Signal(VPN_BITS), Signal(bits), Signal(bits)
        m.d.comb += [looked_up.eq(place(self.vpn)), forgotten.eq(place(self.forget_vpn)), filled.eq(place(entry.vpn))]
        noise = Signal(16, init=1)  # x^16 + x^15 + x^13 + x^4 + 1, every state but 0
        with m.If(self.fill.valid):
            m.d.sync += noise.eq(Cat(noise[15] ^ noise[14] ^ noise[12] ^ noise[3], noise))
        with m.If(self.advance):
            m.d.sync += [shown.eq(looked_up), sought.eq(self.vpn)]

        # 4 KiB pages.
        row = data.StructLayout({"vpn": VPN_BITS, "PSCID": 20, "G": 1, "ppn": 44, "readable": 1, "writable": 1})
        hits, rows = [], []
        empty, victim = Signal(self.ways), Signal(range(max(self.ways, 2)))
        for way in range(self.ways):
            m.submodules[f"way_{way}"] = memory = Memory(shape=row, depth=sets, init=[])
            read, write = memory.read_port(), memory.write_port()
            valid, valid_then = Signal(sets, name=f"valid_{way}"), Signal(name=f"valid_then_{way}")
            m.d.comb += [
                read.addr.eq(looked_up), read.en.eq(self.advance), write.addr.eq(filled), write.en.eq(small & (victim == way)),
                empty[way].eq(~valid.bit_select(filled, 1)),
                *(write.data[name].eq(entry[name]) for name in ("vpn", "PSCID", "G", "ppn", "readable", "writable")),
            ]
            with m.If(self.advance):
                m.d.sync += valid_then.eq(valid.bit_select(looked_up, 1) & ~(self.forget & (~self.forget_av | (forgotten == looked_up))))
            with m.If(write.en):
                m.d.sync += valid.bit_select(filled, 1).eq(1)
            rows.append(read.data)
            hits.append(valid_then & (read.data.vpn == sought) & (read.data.G | (read.data.PSCID == self.PSCID)))
            with m.If(self.discard & hits[way]):
                m.d.sync += valid.bit_select(shown, 1).eq(0)
            with m.If(self.forget):
                with m.If(self.forget_av):
                    m.d.sync += valid.bit_select(forgotten, 1).eq(0)
                with m.Else():
                    m.d.sync += valid.eq(0)
        m.d.comb += victim.eq(noise if self.ways > 1 else 0)
        for way in reversed(range(self.ways)):
            with m.If(empty[way]):
                m.d.comb += victim.eq(way)

        # Larger pages.
        large = Array(Signal(Entry, name=f"large_{n}") for n in range(self.superpage_entries))
        large_valid, large_victim = Signal(self.superpage_entries), Signal(range(self.superpage_entries))
        large_hits = []

        def covers(item, vpn):
            same = Signal(len(SUPERPAGES))
            m.d.comb += same.eq(Cat(*[item.vpn[low:] == vpn[low:] for low, _ in SUPERPAGES]))
            return same.bit_select((item.reach - 1)[:2], 1)

        for n in range(self.superpage_entries):
            large_hits.append(large_valid[n] & covers(large[n], sought) & (large[n].G | (large[n].PSCID == self.PSCID)))
        m.d.comb += large_victim.eq(noise)
        for n in reversed(range(self.superpage_entries)):
            with m.If(~large_valid[n]):
                m.d.comb += large_victim.eq(n)
        with m.If(self.fill.valid & (entry.reach != 0)):
            m.d.sync += [large[large_victim].eq(entry), large_valid.bit_select(large_victim, 1).eq(1)]
        with m.If(self.discard):
            m.d.sync += large_valid.eq(large_valid & ~Cat(large_hits))
        with m.If(self.forget):
            m.d.sync += large_valid.eq(0)

        for n in range(self.superpage_entries):
            item = large[n]
            with m.If(large_hits[n]):
                m.d.comb += [
                    self.found.hit.eq(1), self.found.readable.eq(item.readable), self.found.writable.eq(item.writable),
                ]
                with m.Switch(item.reach):
                    for reach, (low, size) in enumerate(SUPERPAGES, 1):
                        with m.Case(reach):
                            m.d.comb += [self.found.ppn.eq(Cat(sought[:low], item.ppn[low:])), self.found.size_log2.eq(size)]
        for hit, found in zip(hits, rows):
            with m.If(hit):
                m.d.comb += [
                    self.found.hit.eq(1), self.found.ppn.eq(found.ppn), self.found.readable.eq(found.readable),
                    self.found.writable.eq(found.writable), self.found.size_log2.eq(12),
                ]
        return m
