"""The register bus: one 64-bit access at a time from the completer to the owner of a BAR range."""

from amaranth import unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out


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
    the card does: no register access waits for DMA.
    """

    def __init__(self):
        super().__init__({
            "request": Out(stream.Signature(RegisterRequest)),
            "response": In(stream.Signature(RegisterResponse)),
        })

    def __repr__(self):
        return "RegisterBus()"
