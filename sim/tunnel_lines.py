"""Lines that a tunnel goes over: a serial device, a socket, or a simulated card with its bytes or its serial line, bit by bit.

A line has ``name`` for messages; ``now``, the time in its ``unit``, of which ``second`` make a second; ``bytes_per_unit``, what it carries
each way, or None; ``patience``, ``idle_after``, ``limit``: after so long what was sent is sent again, nothing more comes, nobody is there;
``keep_alive``: after so long a frame is sent.
:meth:`put` gives bytes to it, :meth:`get` lets time pass, until something comes or so much of it is over, and returns what came.
"""

import contextlib
import ctypes
import functools
import os
import select
import socket
import stat
import termios
import time
import tty
import weakref
from pathlib import Path

from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..rtl.phy.uart import Uart
from ..rtl.verilog import TunnelCard
from .builds import library
from .settings import BadSetting

__all__ = ["SimulatedBoard", "SimulatedLine", "StreamLine", "open_line"]

_SOURCE = Path(__file__).with_name("compiled_tunnel.cpp")
_DIVISOR = 4  # cycles per bit of the simulated serial line
_RATES = {int(name[1:]): getattr(termios, name) for name in dir(termios) if name[0] == "B" and name[1:].isdigit() and name != "B0"}
_WRAPPER = """\
module tunnel (
  input clk, input is_serial, input rx_valid, input [7:0] rx, input rx_pin, output tx_valid, output [7:0] tx, output tx_pin
);
  reg valid = 0, pin = 1, serial = 0;
  reg [7:0] payload = 0;
  always @(posedge clk) begin
    valid <= rx_valid;
    payload <= rx;
    pin <= rx_pin;
    serial <= is_serial;
  end
  top top (
    .clk(clk), .rst(1'b0), .is_serial(serial), .rx_valid(valid), .rx(payload), .rx_pin(pin), .tx_valid(tx_valid), .tx(tx), .tx_pin(tx_pin)
  );
endmodule
"""


class SimulatedBoard(wiring.Component):
    """A :class:`ringwall.rtl.verilog.TunnelCard`, with a serial line of 4 cycles per bit, or (``is_serial`` 0) without.

    Bytes are always taken at ``tx``. Times are short: a host that simulates is there in no time.

    Parameters
    ----------
    config : :class:`ringwall.rtl.config.EndpointConfig`
    """

    def __init__(self, config):
        self.config = config
        super().__init__({"is_serial": In(1), "rx_valid": In(1), "rx": In(8), "rx_pin": In(1, init=1), "tx_valid": Out(1), "tx": Out(8),
                          "tx_pin": Out(1)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = TunnelCard(self.config, patience_cycles=200_000, silence_cycles=20_000_000)
        m.submodules.uart = uart = Uart(divisor=_DIVISOR)
        m.d.comb += [uart.rx.eq(self.rx_pin), self.tx_pin.eq(uart.tx), uart.received.ready.eq(1), uart.to_send.payload.eq(card.tx.payload)]
        m.d.comb += [self.tx.eq(card.tx.payload), self.tx_valid.eq(card.tx.valid & ~self.is_serial)]
        with m.If(self.is_serial):
            m.d.comb += [
                card.rx.valid.eq(uart.received.valid), card.rx.payload.eq(uart.received.payload), uart.to_send.valid.eq(card.tx.valid),
                card.tx.ready.eq(uart.to_send.ready),
            ]  # fmt: skip
        with m.Else():
            m.d.comb += [card.rx.valid.eq(self.rx_valid), card.rx.payload.eq(self.rx), card.tx.ready.eq(1)]
        return m


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("divisor", "seed", "turned", "lost", "twice", "unplugged")]


@functools.cache
def _library(config):
    found = ctypes.CDLL(str(library(SimulatedBoard(config), "tunnel", wrapper=_WRAPPER, harness=_SOURCE)))
    tunnel, u64, data = ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)
    for name, result, arguments in (
        ("open", tunnel, [ctypes.POINTER(_Options)]), ("close", None, [tunnel]), ("options", ctypes.POINTER(_Options), [tunnel]),
        ("cycle", u64, [tunnel]), ("feed", None, [tunnel, ctypes.c_char_p, u64]), ("run", u64, [tunnel, u64, ctypes.c_int]),
        ("bytes", u64, [tunnel, data]), ("forget", None, [tunnel]),
    ):  # fmt: skip
        function = getattr(found, f"tunnel_{name}")
        function.restype, function.argtypes = result, arguments
    return found


class SimulatedLine:
    """The line of a compiled :class:`SimulatedBoard`; its unit of time is the card's cycle.

    Parameters
    ----------
    config : :class:`ringwall.rtl.config.EndpointConfig`
    is_serial : :class:`bool`
        Over the serial line, else a byte in each cycle.
    seed : :class:`int`
        Of what is spoiled.

    Attributes
    ----------
    turned, lost, twice : in ``options``
        In how many of 2 ** 24 bits, bytes, bytes that happens; ``unplugged``: nothing passes.
    """

    unit, second, is_simulated, keep_alive = "cycle", 100_000_000, True, 4_000_000

    def __init__(self, config, *, is_serial=False, seed=0):
        self.name = "the simulated card"
        self.bytes_per_unit = 1 / (10 * _DIVISOR) if is_serial else 1
        self.patience, self.idle_after, self.limit = (400_000, 2_000_000, 4_000_000) if is_serial else (10_000, 500_000, 1_000_000)
        self._library = _library(config)
        options = _Options(_DIVISOR if is_serial else 0, seed)
        self._tunnel = ctypes.c_void_p(self._library.tunnel_open(ctypes.byref(options)))
        self.options = self._library.tunnel_options(self._tunnel).contents
        self.close = weakref.finalize(self, self._library.tunnel_close, self._tunnel)

    @property
    def now(self):
        return self._library.tunnel_cycle(self._tunnel)

    def put(self, data):
        self._library.tunnel_feed(self._tunnel, data, len(data))

    def get(self, time):
        self._library.tunnel_run(self._tunnel, time, 1)
        place = ctypes.c_void_p()
        count = self._library.tunnel_bytes(self._tunnel, ctypes.byref(place))
        found = ctypes.string_at(place, count) if count else b""
        self._library.tunnel_forget(self._tunnel)
        return found


class StreamLine:
    """A file descriptor: of a serial device or a socket; its unit of time is the microsecond.

    What cannot be put at once waits. A line that the other side closed raises :exc:`ConnectionError`.

    Parameters
    ----------
    descriptor : :class:`int`
        Is closed with the line.
    name : :class:`str`
        For messages.
    bytes_per_second : :class:`int` or None
        What it carries each way.
    """

    unit, second, is_simulated = "µs", 1_000_000, False
    limit, keep_alive, idle_after = 5_000_000, 3_000_000, 1_000_000

    def __init__(self, descriptor, name, bytes_per_second=None):
        self.name, self.bytes_per_unit = name, bytes_per_second / self.second if bytes_per_second else None
        # Longer than all takes that may be under way each way, and some more for adapters and operating systems that take their time.
        self.patience = 100_000 + (int(20_000 / self.bytes_per_unit) if bytes_per_second else 0)
        self._descriptor, self._waiting = descriptor, bytearray()
        os.set_blocking(descriptor, False)
        self.close = weakref.finalize(self, os.close, descriptor)

    @property
    def now(self):
        return time.monotonic_ns() // 1000

    def put(self, data):
        self._waiting += data
        self._flush()

    def _flush(self):
        with contextlib.suppress(BlockingIOError):
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]

    def get(self, time):
        writes = [self._descriptor] if self._waiting else []
        readable, writable, _ = select.select([self._descriptor], writes, [], time / self.second)
        if writable:
            self._flush()
        if not readable:
            return b""
        try:
            found = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return b""
        if not found:
            raise ConnectionError("the other side closed it")
        return found


def open_line(target, config, *, seed=0):
    """Return the line that ``target`` names: what stands behind "tunnel:" in ``TARGET``.

    ``sim``, ``sim-uart``: a simulated card of ``config``. ``/dev/ttyUSB1@3000000``: a serial device and its bits per second. ``host:port``,
    or the path of a Unix socket: whoever carries bytes to a card from there.

    Raises
    ------
    :exc:`ringwall.sim.settings.BadSetting`
        When there is no such line.
    """
    if target in ("sim", "sim-uart"):
        return SimulatedLine(config, is_serial=target == "sim-uart", seed=seed)
    path, _, rate = target.partition("@")
    host, _, port = target.rpartition(":")
    try:
        if rate:
            return _serial(path, rate)
        if path.startswith("/"):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise BadSetting(f"TARGET needs the bits per second of a serial device, as in tunnel:{path}@3000000.")
            found = socket.socket(socket.AF_UNIX)
            found.connect(path)
            return StreamLine(found.detach(), path)
        if host and port.isdigit():
            found = socket.create_connection((host, int(port)), timeout=5)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return StreamLine(found.detach(), target)
    except (OSError, OverflowError) as error:
        raise BadSetting(f"TARGET cannot be opened: {target}: {getattr(error, 'strerror', None) or error}.") from None
    raise BadSetting("TARGET must be tunnel:sim, tunnel:sim-uart, tunnel:/dev/tty...@rate, tunnel:host:port or tunnel:/path/of/a/socket, "
                     f"not {target!r}.")  # fmt: skip


def _serial(path, rate):
    """Return the line of a serial device, raw: 8 bits, no parity, 1 stop bit, no flow control."""
    if not rate.isdigit() or int(rate) not in _RATES:
        known = ", ".join(str(one) for one in sorted(_RATES) if one >= 115_200)
        raise BadSetting(f"TARGET must have a rate that the system knows ({known}), not {rate!r}.")
    descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        tty.setraw(descriptor)
        mode = termios.tcgetattr(descriptor)
        mode[2] = mode[2] & ~(termios.PARENB | termios.CSTOPB | termios.CRTSCTS) | termios.CLOCAL | termios.CREAD
        mode[4] = mode[5] = _RATES[int(rate)]
        termios.tcsetattr(descriptor, termios.TCSANOW, mode)
        termios.tcflush(descriptor, termios.TCIOFLUSH)
    except termios.error as error:
        os.close(descriptor)
        raise BadSetting(f"TARGET must be a serial device: {path}: {error.args[-1]}.") from None
    return StreamLine(descriptor, path, int(rate) // 10)
