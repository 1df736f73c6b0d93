"""A card whose devices have somebody at their user's side: consoles an echo, networks each other, random numbers a generator."""

from amaranth import Module
from amaranth.lib import wiring

from ..rtl.verilog import RawCard
from ..rtl.virtio.device import join
from ..rtl.virtio.rng import XorShift

__all__ = ["LoopedCard", "WiredCard"]


class LoopedCard(wiring.Component):
    """``RawCard(config)`` with its ports but those of the devices.

    A console gets back what it sends. What a network function sends, the next one receives, the last one's goes to the first: two are
    wired to each other.
    """

    def __init__(self, config):
        self.card = RawCard(config)
        super().__init__({name: member for name, member in self.card.signature.members.items() if name not in self.card.outside})

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = self.card
        join(m, self, card, {name: name for name in self.signature.members})

        def named(kind):
            """Return the members ``kind_n`` in the order of their functions."""
            names = [name for name in card.outside if name.rpartition("_")[0] == kind]
            return [getattr(card, name) for name in sorted(names, key=lambda name: int(name.rpartition("_")[2]))]

        for source, sink in zip(named("from_driver"), named("to_driver")):
            wiring.connect(m, source, sink)
        received = named("received")
        for n, source in enumerate(named("transmitted")):
            wiring.connect(m, source, received[(n + 1) % len(received)])
        m.d.comb += [link_up.eq(1) for link_up in named("link_up")]
        for n, sink in enumerate(named("entropy")):
            m.submodules[f"random_{n}"] = random = XorShift(width=self.card.config.width)
            wiring.connect(m, random.o, sink)
        return m


class WiredCard(wiring.Component):
    """``RawCard(config)`` with one network function, whose frames come by ``from_wire`` and leave by ``to_wire``; its link is up."""

    def __init__(self, config):
        self.card = RawCard(config)
        ports = {name: member for name, member in self.card.signature.members.items() if name not in self.card.outside}
        medium = {name.rpartition("_")[0]: name for name in self.card.outside}
        self.received, self.transmitted, self.link_up = (medium[name] for name in ("received", "transmitted", "link_up"))
        members = self.card.signature.members
        super().__init__({**ports, "from_wire": members[self.received], "to_wire": members[self.transmitted]})

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = self.card
        join(m, self, card, {name: name for name in self.card.signature.members if name not in card.outside})
        join(m, self, card, {"from_wire": self.received, "to_wire": self.transmitted})
        m.d.comb += getattr(card, self.link_up).eq(1)
        return m
