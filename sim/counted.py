"""A card with counters beside it: what its ``activity`` said over a run, without a look at every cycle."""

from amaranth import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from .stream import unpack

__all__ = ["Counted", "read_counts"]

WIDTH = 32


class Counted(wiring.Component):
    """``card`` with its own ports, its ``activity`` replaced by ``counts``.

    Of each field of ``activity`` (a structure): one bit wide: ``counts`` has the number of cycles in which it was 1; wider:
    the highest value so far. Counting begins at reset and never stops; 32 bits, without an end stop.

    Parameters
    ----------
    card : :class:`amaranth.lib.wiring.Component`
        Has ``activity: Out(StructLayout)``.

    Raises
    ------
    :exc:`ValueError`
        When it has no ``activity``.
    """

    def __init__(self, card):
        members = dict(card.signature.members)
        if "activity" not in members:
            raise ValueError(f"The card must have a port 'activity', not {sorted(members)!r}")
        self.card, self.layout = card, data.Layout.cast(members.pop("activity").shape)
        self.counts_layout = data.StructLayout({name: WIDTH for name, _ in self.layout})
        super().__init__(members | {"counts": Out(self.counts_layout)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = self.card
        for name, member in self.signature.members.items():
            if name == "counts":
                continue
            ours, theirs = getattr(self, name), getattr(card, name)
            if member.is_signature:
                connect(m, flipped(ours), theirs)
            else:
                m.d.comb += theirs.eq(ours) if member.flow == In else ours.eq(theirs)
        for name, field in self.layout:
            value, count = card.activity[name], self.counts[name]
            if field.width == 1:
                m.d.sync += count.eq(count + value)
            else:
                with m.If(value > count):
                    m.d.sync += count.eq(value)
        return m


def read_counts(dut, component):
    """Return, inside a simulation of a :class:`Counted` ``component``, the counters as a dict."""
    return vars(unpack(component.counts_layout, int(dut.counts.value)))
