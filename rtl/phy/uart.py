"""A serial line: a start bit, eight bits with the lowest first, a stop bit; no parity."""

from amaranth import Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out


class Uart(wiring.Component):
    """Bytes to and from a serial line.

    Each bit is looked at in its middle, counted from the start of its start bit. One that is no start bit any more half a bit later is
    none. A byte without a stop bit is dropped, with a pulse of ``framing_error``; the next begins when the line was idle again. ``rx`` goes
    through two registers.

    Latency: half a stop bit before the end of a byte it is received. Throughput: 1 byte in 10 * ``divisor`` cycles.

    Parameters
    ----------
    divisor : :class:`int`
        Cycles per bit: 4 to 65536.

    Members
    -------
    rx, tx : ``In(1)``, ``Out(1)``
        The line.
    received : ``Out(stream.Signature(8))``
        Bytes; one that comes while the last is not taken is dropped, with a pulse of ``overrun``.
    to_send : ``In(stream.Signature(8))``
        Bytes.
    framing_error, overrun : ``Out(1)``
        Pulses.

    Raises
    ------
    :exc:`ValueError`
        If the divisor is none of these.
    """

    def __init__(self, *, divisor):
        if divisor not in range(4, 65537):
            raise ValueError(f"Divisor must be between 4 and 65536 cycles per bit, not {divisor!r}")
        self.divisor = divisor
        super().__init__({
            "rx": In(1, init=1), "tx": Out(1, init=1), "received": Out(stream.Signature(8)), "to_send": In(stream.Signature(8)),
            "framing_error": Out(1), "overrun": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()

        # Out: bits that are yet to be sent, above them a 1 that is none.
        bits, left = Signal(10, init=1), Signal(range(self.divisor))
        m.d.comb += self.to_send.ready.eq((bits == 1) & (left == 0))
        with m.If(left != 0):
            m.d.sync += left.eq(left - 1)
        with m.Elif(bits != 1):
            m.d.sync += [self.tx.eq(bits[0]), bits.eq(bits >> 1), left.eq(self.divisor - 1)]
        with m.Elif(self.to_send.valid):
            m.d.sync += [self.tx.eq(0), bits.eq(Cat(self.to_send.payload, 1, 1)), left.eq(self.divisor - 1)]

        # In.
        line, middle = Signal(2, init=3), Signal(range(self.divisor))
        shift, count = Signal(8), Signal(range(10))  # of bits that are yet to come
        level = line[1]
        m.d.sync += [line.eq(Cat(self.rx, line[0])), self.framing_error.eq(0), self.overrun.eq(0)]
        with m.If(self.received.ready):
            m.d.sync += self.received.valid.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += [middle.eq(self.divisor // 2 - 1), count.eq(9)]
                with m.If(~level):
                    m.next = "BITS"
            with m.State("BITS"):
                m.d.sync += middle.eq(middle - 1)
                with m.If(middle == 0):
                    m.d.sync += [middle.eq(self.divisor - 1), shift.eq(Cat(shift[1:], level)), count.eq(count - 1)]
                    with m.If((count == 9) & level):
                        m.next = "IDLE"
                    with m.If(count == 0):
                        with m.If(level & self.received.valid & ~self.received.ready):
                            m.d.sync += self.overrun.eq(1)
                            m.next = "IDLE"
                        with m.Elif(level):
                            m.d.sync += [self.received.valid.eq(1), self.received.payload.eq(shift)]
                            m.next = "IDLE"
                        with m.Else():
                            m.d.sync += self.framing_error.eq(1)
                            m.next = "BREAK"
            with m.State("BREAK"):
                with m.If(level):
                    m.next = "IDLE"
        return m
