"""MSI of one function: requests become writes of one dword, or wait behind masks."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, ConfigState
from .layouts import FunctionSettings

__all__ = ["Msi"]

VECTORS = 32


class Msi(wiring.Component):
    """Sends a message for each request of an MSI vector, once that may be sent.

    A message is one write burst of one dword at an address of 4 bytes: Message Data with the vector in its low bits, zeroes above bit 15.
    A request whose vector is masked, whose function is no bus master, or while another message is under way, waits: its bit of ``pending``
    is 1 until the message is made. So every request is followed by a message of its vector; requests that wait together are one. A
    vector beyond those that software allocated is the one with its low bits. A request while MSI is disabled is dropped; what waits
    then waits on. A message that ended with ``RESET`` (bus master off) waits again; any other end is final. [PCIe5 6.1.4, 7.7.1]

    Latency: at most 34 cycles from a request to its burst when nothing else waits. Throughput: a request per cycle, one message at a
    time; vectors take turns.

    Parameters
    ----------
    function, client : :class:`int`
        Its number, and the requester client of its messages.
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.

    Members
    -------
    requests : ``In(stream.Signature(5, always_ready=True))``
        Vectors to send.
    settings, state : ``In(FunctionSettings)``, ``In(ConfigState)``
        Of the function, from :class:`.config_space.ConfigSpace`.
    pending : ``Out(32)``
        To ``msi_pending`` of :class:`.config_space.ConfigSpace`.
    bursts, write_data, write_done : ``Out`` of Burst and of BurstData, ``In`` of BurstDone
        Messages.
    stop, stopped : ``In(1)``, ``Out(1)``
        See "Stop" in rtl/README.md: what waits is dropped.

    Raises
    ------
    :exc:`ValueError`
        If the width is none of the four, or a number does not fit its field.
    """

    def __init__(self, *, function, client, width):
        if width not in (64, 128, 256, 512):
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        for name, value, limit in (("Function number", function, 256), ("Requester client", client, 64)):
            if value not in range(limit):
                raise ValueError(f"{name} must be between 0 and {limit - 1}, not {value!r}")
        self.function, self.client, self.width = function, client, width
        super().__init__({
            "requests": In(stream.Signature(range(VECTORS), always_ready=True)),
            "settings": In(FunctionSettings), "state": In(ConfigState), "pending": Out(VECTORS),
            "bursts": Out(stream.Signature(Burst)), "write_data": Out(stream.Signature(BurstData(width))),
            "write_done": In(stream.Signature(BurstDone)), "stop": In(1), "stopped": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        settings, burst, write_data, done = self.settings, self.bursts, self.write_data, self.write_done
        in_flight, turn, latest = Signal(), Signal(range(VECTORS)), Signal(range(VECTORS))
        own = Signal(16)  # bits of Message Data that are the function's
        m.d.comb += own.eq((1 << Mux(settings.msi_multiple > 5, 5, settings.msi_multiple)) - 1)
        m.d.sync += turn.eq(turn + 1)

        requested, again, sent, send = Signal(VECTORS), Signal(VECTORS), Signal(VECTORS), Signal()
        with m.If(self.requests.valid & settings.msi_enable):
            m.d.comb += requested.eq(1 << (self.requests.payload & own[:5]))
        with m.If(done.valid & (done.payload.status == BurstStatus.RESET)):
            m.d.comb += again.eq(1 << latest)
        m.d.comb += [
            send.eq((self.pending & ~settings.msi_mask).bit_select(turn, 1) & settings.msi_enable & self.state.bus_master
                    & ~in_flight & ~self.stop),
            sent.eq(send << turn),
        ]  # fmt: skip
        m.d.sync += self.pending.eq(Mux(self.stop, 0, (self.pending & ~sent) | requested | again))

        lanes = self.width // 8
        place = settings.msi_address[2 : (lanes - 1).bit_length()]
        with m.If(send):
            m.d.sync += [
                in_flight.eq(1), latest.eq(turn), burst.valid.eq(1), write_data.valid.eq(1),
                burst.payload.address.eq(Cat(Const(0, 2), settings.msi_address[2:])),
                write_data.payload.data.eq(Cat((settings.msi_data & ~own) | (turn & own), Const(0, 16)).replicate(self.width // 32)),
                write_data.payload.keep.eq(0xF << Cat(Const(0, 2), place)),
            ]  # fmt: skip
        for out in (burst, write_data):
            with m.If(out.valid & out.ready):
                m.d.sync += out.valid.eq(0)
        with m.If(done.valid):
            m.d.sync += in_flight.eq(0)
        m.d.comb += [
            burst.payload.length_bytes.eq(4),
            burst.payload.is_write.eq(1),
            burst.payload.function.eq(self.function),
            burst.payload.client.eq(self.client),
            write_data.payload.first.eq(1),
            write_data.payload.last.eq(1),
            done.ready.eq(1),
            self.stopped.eq(self.stop & ~in_flight & (self.pending == 0)),
        ]
        return m
