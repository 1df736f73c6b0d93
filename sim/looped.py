"""A card whose devices have somebody at their user's side: consoles an echo, networks each other, random numbers a generator."""

from amaranth import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from ..rtl.verilog import RawCard

__all__ = ["LoopedCard"]

_TAPS = 128, 126, 101, 99  # of a maximal sequence, from 1 on


class LoopedCard(wiring.Component):
    """``RawCard(config)`` with its ports but those of the devices.

    A console gets back what it sends. What network function n sends, the next one receives, and the last one's goes to the first, so that two
    are wired to each other. Random numbers are a shift register's, not random at all.
    """

    def __init__(self, config):
        self.card = RawCard(config)
        super().__init__({name: member for name, member in self.card.signature.members.items() if name not in self.card.outside})

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = self.card
        for name in self.signature.members:
            ours, theirs = getattr(self, name), getattr(card, name)
            member = self.signature.members[name]
            if not member.is_port:
                wiring.connect(m, wiring.flipped(ours), theirs)
            else:
                m.d.comb += theirs.eq(ours) if member.flow == In else ours.eq(theirs)

        def named(kind):
            """Return the members ``kind_n`` in the order of their functions."""
            names = [name for name in card.outside if name.rpartition("_")[0] == kind]
            return [getattr(card, name) for name in sorted(names, key=lambda name: int(name.rpartition("_")[2]))]

        for source, sink in zip(named("from_driver"), named("to_driver")):
            wiring.connect(m, source, sink)
        received = named("received")
        for n, source in enumerate(named("sent")):
            wiring.connect(m, source, received[(n + 1) % len(received)])
        for n, sink in enumerate(named("entropy")):
            state = Signal(max(_TAPS), init=n + 1, name=f"random_{n}")
            with m.If(sink.ready):
                bits = state
                for _ in range(max(_TAPS)):
                    feedback = bits[_TAPS[0] - 1] ^ bits[_TAPS[1] - 1] ^ bits[_TAPS[2] - 1] ^ bits[_TAPS[3] - 1]
                    bits = Cat(feedback, bits[:-1])
                m.d.sync += state.eq(bits)
            m.d.comb += [sink.valid.eq(1), sink.payload.eq(state.replicate(4))]
        return m
