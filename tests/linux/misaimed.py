"""A card with a planted fault: some of its DMA goes beside what it was told."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring

from ringwall.rtl.verilog import RawCard

__all__ = ["FAR", "PERIOD", "Misaimed", "is_data"]

PERIOD = 80  # of the requests for data, one goes wrong
FAR = 1 << 31  # the address bit that it has wrong
_LEAST = 32  # dwords: rings, headers, status and interrupts are shorter
_READ, _WRITE = 0x00, 0x40  # first byte of a memory request with an address of 32 bits [PCIe5 2.2.1]


def is_data(tlp):
    """Tell whether a memory request of the card is one that may go wrong."""
    return tlp.length_dw >= _LEAST


class Misaimed(wiring.Component):
    """``RawCard(config)`` at 64 bits, whose 80th, 160th ... read and write of at least 32 dwords have bit 31 of the address inverted."""

    def __init__(self, config):
        if config.width != 64:
            raise ValueError(f"Width must be 64 bits, for headers of two beats, not {config.width!r}")
        self.card = RawCard(config)
        super().__init__(self.card.signature)

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = self.card
        wiring.connect(m, wiring.flipped(self.i), card.i)
        wiring.connect(m, card.o, wiring.flipped(self.o))
        m.d.comb += [self.activity.eq(card.activity), self.malformed.eq(card.malformed)]

        beat, is_wrong = card.o.payload, Signal()  # of the request whose second beat comes next
        with m.If(card.o.valid & card.o.ready):
            m.d.sync += is_wrong.eq(0)
            for name, first_byte in (("reads", _READ), ("writes", _WRITE)):
                count = Signal(range(PERIOD), name=name)
                with m.If(beat.first & (beat.data[24:32] == first_byte) & (beat.data[:10] >= _LEAST)):
                    m.d.sync += [count.eq(Mux(count == PERIOD - 1, 0, count + 1)), is_wrong.eq(count == PERIOD - 1)]
        with m.If(is_wrong):
            m.d.comb += self.o.payload.data[31].eq(~beat.data[31])
        return m
