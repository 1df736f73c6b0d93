"""The second level of the IOTLB: many 4 KiB translations, all that is known of them in block RAM."""

from amaranth import Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..stream.queue import Queue
from .features import Features
from .iotlb import entry_layout, forgets_all, noise, place, same_space, space_layout


class SecondIotlb(wiring.Component):
    """Looks up what the first level does not have.

    Pages of 4 KiB live in sets of ``ways`` entries; larger ones are not taken. An entry lives while the number of its generation is the
    present one. Forgetting everything begins a new generation; when there is no further number all places are cleared, a set per cycle, and
    meanwhile nothing is found or taken, as after a reset. Forgetting a page clears its set. A new entry takes the place of one for its
    page and space, else an empty one or a random one. Some may wait for a turn, more are lost. [RVIOMMU1.0 4.1.1]

    Latency: 2 cycles from ``i`` to ``o``. Throughput: one lookup per cycle, none in the cycle in which a new entry's set is read. What is
    forgotten in cycle n is not found by lookups taken in it or later; entries on their way in are forgotten too, and lookups on their way
    find nothing.

    Parameters
    ----------
    entries : :class:`int`
        A power of two, from 2 * ``ways`` to 4096.
    ways : :class:`int`
        A power of two.
    generation_bits : :class:`int`
        Of a number, 1 to 16: everything can be forgotten 2 ** ``generation_bits`` - 2 times between two clearings.
    waiting : :class:`int`
        New entries that may wait: at least 2.
    features : :class:`.features.Features`
        Decides what an entry has.
    asked : shape-castable
        What a lookup brings back.

    Members
    -------
    i : ``In(stream.Signature(data.StructLayout))``
        Lookups: ``vpn``, ``space`` as :func:`.iotlb.space_layout`, ``asked``.
    o : ``Out(stream.Signature(data.StructLayout))``
        The same lookups: ``asked``, and the ``entry`` that was found.
    found : ``Out(1)``
        Whether one was: of ``o``, but no part of it, since it falls when the entry is forgotten while ``o`` waits.
    fill : ``In(stream.Signature(entry_layout(features)))``
        New entries; always taken.
    forget, forget_av, forget_vpn : ``In``
        See :class:`.iotlb.Iotlb`.

    Raises
    ------
    :exc:`ValueError`
        If a size is out of range.
    """

    def __init__(self, *, entries, ways=4, generation_bits=8, waiting=16, features=Features(), asked=0):
        if ways not in [1 << n for n in range(5)]:
            raise ValueError(f"Ways of the second IOTLB must be 1, 2, 4, 8 or 16, not {ways!r}")
        if entries not in [1 << n for n in range(13)] or entries < 2 * ways:
            raise ValueError(f"Entries of the second IOTLB must be a power of two between {2 * ways} and 4096, not {entries!r}")
        if generation_bits not in range(1, 17):
            raise ValueError(f"Bits of a generation must be between 1 and 16, not {generation_bits!r}")
        self.entries, self.ways, self.generation_bits, self.waiting = entries, ways, generation_bits, waiting
        self.features, self.asked = features, asked
        entry = entry_layout(features)
        self._new = Queue(entry, waiting)
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({"vpn": features.page_bits, "space": space_layout(features), "asked": asked}))),
            "o": Out(stream.Signature(data.StructLayout({"entry": entry, "asked": asked}))),
            "found": Out(1),
            "fill": In(stream.Signature(entry)),
            "forget": In(1),
            "forget_av": In(1),
            "forget_vpn": In(features.page_bits),
        })

    def elaborate(self, platform):
        m = Module()
        layout, space = entry_layout(self.features), space_layout(self.features)
        sets = self.entries // self.ways
        bits = sets.bit_length() - 1
        asks, entry = self.i.payload, self.fill.payload
        m.d.comb += self.fill.ready.eq(1)
        small = self.fill.valid & (entry.reach == 0)

        # Generations: 0 is that of an empty place.
        forget_all = forgets_all(m, self, small & entry.is_fragment if self.features.has_second_stage else 0)
        now, is_off, swept = Signal(self.generation_bits, init=1), Signal(init=1), Signal(bits)
        with m.If(is_off):
            m.d.sync += [swept.eq(swept + 1), is_off.eq(swept != sets - 1)]
        with m.Elif(forget_all):
            m.d.sync += [now.eq(Mux(now.all(), 1, now + 1)), is_off.eq(now.all())]

        # First cycle: a set is read, for an entry that waits to come in or for a lookup.
        new = self._new
        m.submodules.new = ResetInserter(self.forget)(new)
        m.d.comb += [new.i.valid.eq(small), new.i.payload.eq(entry)]
        looks, fills, is_dead = Signal(), Signal(), Signal()  # in the second cycle: for whom; what was read counts no more
        sought = data.StructLayout({"vpn": self.features.page_bits, "space": space})
        key, next_key = Signal(sought), Signal(sought)
        written, asked, row, next_row, moves = Signal(layout), Signal(self.asked), Signal(bits), Signal(bits), Signal()
        m.d.comb += [
            moves.eq(~looks | ~self.o.valid | self.o.ready),
            self.i.ready.eq(moves & ~new.o.valid), new.o.ready.eq(moves),
            next_key.vpn.eq(Mux(new.o.valid, new.o.p.vpn, asks.vpn)), next_row.eq(place(next_key.vpn, bits)),
            *(next_key.space[name].eq(Mux(new.o.valid, new.o.p[name], asks.space[name])) for name, _ in space),
        ]
        dies = self.forget | is_off
        with m.If(moves):
            m.d.sync += [
                looks.eq(self.i.valid & ~new.o.valid), fills.eq(new.o.valid & ~dies), is_dead.eq(dies),
                key.eq(next_key), row.eq(next_row), asked.eq(asks.asked), written.eq(new.o.p),
            ]
        with m.Elif(self.forget):
            m.d.sync += is_dead.eq(1)

        # Second cycle: entries are compared; a new one is written.
        names = [name for name, _ in layout if name != "reach"]
        place_layout = data.StructLayout({"generation": self.generation_bits, **{name: layout[name].shape for name in names}})
        same, empty, found = Signal(self.ways), Signal(self.ways), Signal(place_layout)
        victim = Signal(range(max(self.ways, 2)))
        m.d.comb += victim.eq(noise(m, fills) if self.ways > 1 else 0)
        places = []
        for way in range(self.ways):
            m.submodules[f"way_{way}"] = memory = Memory(shape=place_layout, depth=sets, init=[])
            read, write = memory.read_port(), memory.write_port()
            places.append(read.data)
            is_alive = read.data.generation == now
            m.d.comb += [
                read.addr.eq(next_row), read.en.eq(moves),
                empty[way].eq(~is_alive), same[way].eq(is_alive & (read.data.vpn == key.vpn) & same_space(read.data, key.space)),
                write.en.eq(is_off | self.forget | (fills & (victim == way))),
                write.addr.eq(Mux(is_off, swept, Mux(self.forget, place(self.forget_vpn, bits), row))),
                *(write.data[name].eq(written[name]) for name in names),
                write.data.generation.eq(Mux(fills & ~self.forget & (victim == way), now, 0)),
            ]
        for wanted in (empty, same):
            for way in reversed(range(self.ways)):
                with m.If(wanted[way]):
                    m.d.comb += victim.eq(way)
        for way in reversed(range(self.ways)):
            with m.If(same[way]):
                m.d.comb += found.eq(places[way])

        # Third cycle: the result.
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [
                self.o.valid.eq(looks), self.found.eq(same.any() & ~is_dead & ~self.forget), self.o.payload.asked.eq(asked),
                *(self.o.payload.entry[name].eq(found[name]) for name in names),
            ]
        with m.Elif(self.forget):
            m.d.sync += self.found.eq(0)
        return m
