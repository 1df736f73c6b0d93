"""Doorbells of a virtio function: writes to the notification structure become kicks."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out


class Doorbells(wiring.Component):
    """Remembers doorbells until the ring engine takes them; what rings again meanwhile is one kick. [VIRTIO1.4 4.1.5.2]

    The doorbell of queue n is the dword n of the structure. 16 bits are written to it, or all 32 if ``is_long``, of which the upper half
    is a hint that nobody needs; the lower half is n, or ``first_queue`` + n if ``by_data``. Any other write is nothing.

    Latency: 1 cycle from doorbell to kick, one more per other queue. Throughput: a kick in 2 cycles.

    Parameters
    ----------
    count, first_queue : :class:`int`
        Queues of the function; the card-wide number of the first.

    Members
    -------
    rings : ``In(1)``
        ``enables`` bytes of ``data`` are written to word ``word`` of the structure.
    word, enables, data : ``In(9)``, ``In(8)``, ``In(64)``
        The write, 8 bytes a word.
    is_long, by_data : ``In(1)``
        NOTIFICATION_DATA, NOTIF_CONFIG_DATA was accepted.
    is_live : ``In(1)``
        0: doorbells are nothing, and none is remembered.
    allowed, held : ``In(count)``
        Queues whose doorbells count, and those that wait for something else first.
    kicks : ``Out(stream.Signature(6))``
        Card-wide numbers of queues.
    """

    def __init__(self, *, count, first_queue):
        self.count, self.first_queue = count, first_queue
        super().__init__({
            "rings": In(1), "word": In(9), "enables": In(8), "data": In(64), "is_long": In(1), "by_data": In(1), "is_live": In(1),
            "allowed": In(count), "held": In(count), "kicks": Out(stream.Signature(6)),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        rung, due, taken, here = Signal(self.count), Signal(self.count), Signal(self.count), Signal(self.count)
        turn = Signal(range(max(self.count, 2)))
        for n in range(self.count):
            half = n % 2
            enables, number = self.enables.word_select(half, 4), self.data.word_select(2 * half, 16)
            m.d.comb += rung[n].eq(
                self.rings & (self.word == n // 2) & (enables == Mux(self.is_long, 0b1111, 0b0011))
                & (number == Mux(self.by_data, self.first_queue + n, n)))  # fmt: skip

        m.d.comb += here.eq(1 << turn)
        m.d.sync += turn.eq(Mux(turn == self.count - 1, 0, turn + 1))
        with m.If(self.kicks.ready):
            m.d.sync += self.kicks.valid.eq(0)
        with m.If(~self.kicks.valid & (due & ~self.held & here).any() & self.is_live):
            m.d.comb += taken.eq(here)
            m.d.sync += [self.kicks.valid.eq(1), self.kicks.payload.eq(turn + self.first_queue)]
        m.d.sync += due.eq(Mux(self.is_live, ((due & ~taken) | rung) & self.allowed, 0))
        return m
