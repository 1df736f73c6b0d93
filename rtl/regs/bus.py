"""The register bus: one 64-bit access at a time from the completer to the owner of a BAR range."""

from amaranth import unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

PATIENCE_BITS = 10  # of the cycles that a read of interrupts' tables may wait for a message


class RegisterRequest(data.Struct):
    """One access of 1 to 8 bytes inside an aligned 8-byte word. A write takes effect atomically."""

    function: unsigned(8)
    bar: unsigned(3)
    offset: unsigned(32)  # bytes inside the BAR, bits 2:0 = 0
    is_write: unsigned(1)
    byte_enable: unsigned(8)  # reads: the bytes that were asked for (side effects)
    data: unsigned(64)


class RegisterResponse(data.Struct):
    """Answer to every :class:`RegisterRequest`, reads and writes; ``error`` asks for a Completer Abort."""

    data: unsigned(64)
    error: unsigned(1)


class RegisterBus(wiring.Signature):
    """Requests out, responses in (seen from the initiator).

    At most one request is outstanding. An owner answers each request exactly once, within 16 cycles, whatever the rest of
    the card does: no register access waits for DMA. But for reads of interrupts' tables and pending bits: who masks and reads must have
    all messages that were decided before, so they wait for one under way, at most 1,023 cycles: what comes in behind a read must not
    wait for the card's own requests without end. [PCIe5 6.1.4, 2.4.1]
    """

    def __init__(self):
        super().__init__({
            "request": Out(stream.Signature(RegisterRequest)),
            "response": In(stream.Signature(RegisterResponse)),
        })

    def __repr__(self):
        return "RegisterBus()"
