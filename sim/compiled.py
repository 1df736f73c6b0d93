"""The card as a shared library: the RTL compiled by Verilator, a host bridge in C++ at its link, one Python class over both.

No simulator runs and no coroutine waits: :meth:`CompiledCard.step` lets cycles pass, and the software of
:mod:`ringwall.models.host` runs against the card as it does with :class:`.host_port.HostPort`.
"""

import ctypes
import errno
import functools
import os
import random
import weakref
from dataclasses import asdict
from pathlib import Path

from ..models.events import HostStore, Note, Operation, TlpReceived, TlpSent
from ..models.host import ConfigRead, ConfigWrite, Delay, Host, MemoryRead, MemoryWrite, WaitInterrupt
from ..models.host import run as run_software
from ..models.memory import AccessFault
from ..models.tlp import decode, encode
from ..rtl.spec.virtio_blk import SECTOR_BYTES
from ..rtl.verilog import RawCard
from ..rtl.virtio.net_layouts import NetBeat
from .builds import library
from .log import read_log, run_header

__all__ = ["BrokenRule", "CardError", "CardMemory", "CompiledCard", "build", "pieces", "replay"]

_SOURCE, _WAVES = (Path(__file__).with_name(name) for name in ("compiled_card.cpp", "compiled_waves.h"))
_SPLITS = ("max", "rcb", "random")
_WINDOW = 0xFEE0_0000, 0x10_0000  # writes here are interrupts
_LIMIT_CYCLES = 50_000  # bound of the wait for the answer to one operation
_UNTIL_NEWS, _ALSO_IDLE = 1, 2  # of card_run
_NEWS_DWORDS = 1029
_LINK_RESET = "link reset"  # note in a log


class CardError(Exception):
    """The card refused or did not answer an access.

    Attributes
    ----------
    status : :class:`str`
        "UR", "CA", "CRS", "POISONED", "MALFORMED" or "TIMEOUT".
    """

    def __init__(self, operation, status):
        super().__init__(f"{operation} ended with {status}")
        self.status = status


class BrokenRule(AssertionError):
    """The card broke a rule of the link, of PCI Express or of the run; nothing moves any more."""


# -- the library --


def build(config, *, waves=False, card=RawCard):
    """Return the path of the shared library of ``card(config)``, made now if this is the first to ask for it.

    ``card`` is :class:`ringwall.rtl.verilog.RawCard`, or a component with its ports. A library with ``waves`` can write every
    signal, and leaves nothing out of a cycle. Several processes may ask at once.

    Raises
    ------
    :exc:`RuntimeError`
        When the circuit does not build.
    """
    made = card(config)
    return library(made, "card", **_surroundings(config.width, waves, has_wire="to_wire" in made.signature.members))


def _surroundings(width, waves, *, has_wire=False):
    """Return what a library has beside the circuit."""
    defines = (f"-DCARD_WIDTH={width}", *(["-DCARD_WIRE"] if has_wire else []))
    return {"wrapper": _wrapper(width, has_wire), "harness": _SOURCE, "defines": defines, "waves": _WAVES if waves else None}


def _wrapper(width, has_wire):
    """Return the Verilog around the card: its inputs come from registers, so that one evaluation per cycle is enough.

    It is never reset: registers begin as they are after a reset.
    """
    bits = width + width // 32 + 2
    wire = NetBeat(width).size
    ports, registers, pins = (text if has_wire else "" for text in (
        f"""
  input wire_i_valid, input [{wire - 1}:0] wire_i_payload, output wire_i_ready,
  output wire_o_valid, output [{wire - 1}:0] wire_o_payload, input wire_o_ready,""", f"""
  reg from_valid = 0, to_ready = 0;
  reg [{wire - 1}:0] from_payload = 0;
  always @(posedge clk) begin
    from_valid <= wire_i_valid;
    from_payload <= wire_i_payload;
    to_ready <= wire_o_ready;
  end""", """
    .from_wire__valid(from_valid), .from_wire__payload(from_payload), .from_wire__ready(wire_i_ready),
    .to_wire__valid(wire_o_valid), .to_wire__payload(wire_o_payload), .to_wire__ready(to_ready),"""))  # fmt: skip
    return f"""\
module card ({ports}
  input clk, input i_valid, input [{bits - 1}:0] i_payload, output i_ready,
  output o_valid, output [{bits - 1}:0] o_payload, input o_ready, input link_reset
);
  reg valid = 0, ready = 0, is_down = 0;
  reg [{bits - 1}:0] payload = 0;
  always @(posedge clk) begin
    valid <= i_valid;
    payload <= i_payload;
    ready <= o_ready;
    is_down <= link_reset;
  end{registers}
  top top ({pins}
    .clk(clk), .rst(1'b0), .link_reset(is_down), .i__valid(valid), .i__payload(payload), .i__ready(i_ready),
    .o__valid(o_valid), .o__payload(o_payload), .o__ready(ready)
  );
endmodule
"""


def _fields(kind, names):
    return type("Fields", (ctypes.Structure,), {"_fields_": [(name, kind) for name in names.split()]})


_Options = _fields(ctypes.c_uint64, "latency jitter seed rcb stalls idle_after split replaying late_writes paced window window_size")
_Counts = _fields(ctypes.c_uint64, "sent received sent_dwords received_dwords reads read_bytes writes written_bytes refused_reads "
                  "dropped_writes interrupts lost_pages")  # fmt: skip
_Limits = _fields(ctypes.c_uint32, "known may_read may_write mps payload mrrs tags attributes")
_Observer = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32))


@functools.cache
def _library(path):
    library = ctypes.CDLL(str(path))
    card, u32, u64, number, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p
    for name, result, arguments in (
        ("open", card, [ctypes.POINTER(_Options), u32]), ("close", None, [card]), ("run", u64, [card, u64, u32]), ("cycle", u64, [card]),
        ("is_idle", number, [card]), ("error", text, [card]), ("send", None, [card, ctypes.c_void_p, u32, u64]),
        ("reset_link", None, [card, u64]),
        ("limits", None, [card, u32, ctypes.POINTER(_Limits)]), ("options", ctypes.POINTER(_Options), [card]),
        ("counts", ctypes.POINTER(_Counts), [card]), ("observe", None, [card, ctypes.c_void_p]),
        ("map", number, [card, u64, u64, number, u64, number, number]), ("unmap", u64, [card, u64, u64]),
        ("select", number, [card, number]), ("separate", None, [card, u32, number]),
        ("read", number, [card, u64, ctypes.c_void_p, u64]), ("write", number, [card, u64, text, u64]),
        ("record", number, [card, text]), ("line", None, [card, text]), ("flush", number, [card]),
        ("news", u32, [card, ctypes.POINTER(u64), ctypes.c_void_p]),
    ):  # fmt: skip
        function = getattr(library, f"card_{name}")
        function.restype, function.argtypes = result, arguments
    if hasattr(library, "card_wire"):
        library.card_wire.restype, library.card_wire.argtypes = None, [card, number]
    if hasattr(library, "card_waves"):
        library.card_waves.restype, library.card_waves.argtypes = None, [text]
    return library


# -- the card --


class CardMemory:
    """Guest memory of a :class:`CompiledCard` as the models use memory; tells ``observe(address, data)`` of every write of software.

    Either call raises :exc:`ringwall.models.memory.AccessFault` where nothing is mapped.
    """

    def __init__(self, card, observe=None):
        self._card, self.observe = card, observe

    def read(self, address, length, *, source=""):
        return self._card.read(address, length)

    def write(self, address, data, *, source=""):
        self._card.write(address, data)
        if self.observe is not None:
            self.observe(address, bytes(data))


class CompiledCard:
    """``RawCard(config)`` as a shared library, with a host at its link.

    Guest memory is what was :meth:`map`\\ ped; the card's writes land there in the cycle in which they end, its reads are
    served ``latency`` cycles after they end, with memory as it is then. A read where nothing is mapped gets Unsupported
    Request, a write there is dropped, and ``counts`` has both. Whatever the host sees of the card (an answer to a read, an
    interrupt), it sees after all earlier writes of the card have landed. [PCIe5 2.4.1]

    A rule that the card breaks raises :exc:`BrokenRule`, in this call and in every later one that lets cycles pass. Every wait has
    a bound in cycles.

    Parameters
    ----------
    config : :class:`ringwall.rtl.config.EndpointConfig`
    latency : :class:`int`
        Cycles from the end of a read of the card to the moment in which it is served.
    seed : :class:`int`
        Every choice is drawn from it.
    mps, mrrs, rcb : :class:`int`
        As those of :class:`ringwall.models.host.Host`.
    jitter : :class:`int`
        Up to so many cycles of latency more, per read: answers overtake each other.
    split : :class:`str`
        Where answers are cut, as in :class:`ringwall.models.host.CompletionPolicy`.
    stalls : :class:`int`
        In how many of 256 cycles the host takes nothing from the card, 0 to 255.
    paced : :class:`bool`
        The link is one of 8 GT/s lanes (x2, x4, x8, x16 for 64 to 512 bits at 250 MHz): each direction carries 63/64 of what the card's
        interface does, and 8 bytes more for each TLP. [PCIe5 4.2.2]
    idle_after : :class:`int` or None
        After how many cycles without traffic and outstanding reads the card counts as idle. By default twice the time in which
        a disk moves what its read buffer holds, and what the longest WRITE_ZEROES takes: both happen without the link.
    card : class
        See :func:`build`: a test may give one with a planted fault.
    waves : path or None
        FST file for every signal of every cycle, which makes the card many times slower; complete once the card is closed.

    Attributes
    ----------
    host : :class:`ringwall.models.host.Host`
        Performs operations and judges answers and interrupts; software is given it where it asks for a host.
    memory : :class:`CardMemory`
    observe : callable or None
        Called as ``observe(event, tlp)`` as that of :class:`.host_port.HostPort`: at once for TLPs, so that memory is as it was
        then. What it raises ends the run.
    on_interrupt : callable or None
        Called with each :class:`ringwall.models.host.Interrupt` instead of keeping it for :meth:`interrupts`; must not operate the card.
    message_window : tuple of :class:`int`
        (address, size) in which a write of one dword is an interrupt.
    """

    def __init__(self, config, *, latency=8, seed=0, mps=256, mrrs=512, rcb=64, jitter=0, split="max", stalls=0, paced=False,
                 idle_after=None, card=RawCard, waves=None):  # fmt: skip
        if idle_after is None:
            zeroes = max((disk.max_zero_sectors * disk.max_zero_segments for disk in config.disks), default=0)
            idle_after = max(512, 16 * config.read_buffer_bytes // config.width) + zeroes * 8 * SECTOR_BYTES // config.width
        for name, value, low in (("Latency", latency, 1), ("Jitter", jitter, 0), ("Seed", seed, 0), ("Idle cycles", idle_after, 1)):
            if not isinstance(value, int) or not low <= value < 1 << 31:
                raise ValueError(f"{name} must be an integer between {low} and {(1 << 31) - 1}, not {value!r}")
        if split not in _SPLITS:
            raise ValueError(f"Splitting must be one of {', '.join(_SPLITS)}, not {split!r}")
        if stalls not in range(256):
            raise ValueError(f"Stalls must be between 0 and 255 of 256 cycles, not {stalls!r}")
        self.config, self.observe, self.on_interrupt = config, None, None
        self.memory = CardMemory(self)
        self.host = Host(self.memory, rng=random.Random(seed), mps=mps, mrrs=mrrs, rcb=rcb, msi_window=_WINDOW)
        self._parameters = {"latency": latency, "seed": seed, "mps": mps, "mrrs": mrrs, "rcb": rcb, "jitter": jitter, "split": split,
                            "stalls": stalls, "paced": paced}  # fmt: skip
        self._interrupts, self._failure, self._is_recorded, self._limits = [], None, False, {}
        self._library = library = _library(build(config, waves=waves is not None, card=card))
        if waves is not None:
            Path(waves).open("wb").close()  # tells what is wrong with the path
            library.card_waves(os.fsencode(waves))
        options = _Options(latency, jitter, seed, rcb, stalls, idle_after, _SPLITS.index(split), 0, 0, paced, *_WINDOW)
        self._card = ctypes.c_void_p(library.card_open(ctypes.byref(options), self.host.bus))
        self._close = weakref.finalize(self, library.card_close, self._card)
        self.counts = library.card_counts(self._card).contents
        self._options = library.card_options(self._card).contents
        self._observer = _Observer(self._observed)  # kept alive for the library
        self._news, self._news_cycle = (ctypes.c_uint32 * _NEWS_DWORDS)(), ctypes.c_uint64()

    def close(self):
        """End the card and its log; mapped memory is given back."""
        self._close()
        self._card = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @property
    def news_cycle(self):
        """The cycle in which what the host is told now (a completion, an interrupt) ended on the link."""
        return self._news_cycle.value

    @property
    def message_window(self):
        return self._options.window, self._options.window_size

    @message_window.setter
    def message_window(self, window):
        self._options.window, self._options.window_size = self.host.msi_window = window

    @property
    def cycle(self):
        """The cycles that went by."""
        return self._library.card_cycle(self._handle())

    @property
    def is_idle(self):
        """Nothing was on the link and nothing outstanding for ``idle_after`` cycles, and software did nothing since."""
        return bool(self._library.card_is_idle(self._handle()))

    def _handle(self):
        if self._card is None:
            raise ValueError("A card must not be used after its end, not even to ask it something")
        return self._card

    # -- guest memory --

    def separate(self, function, is_own=True):
        """Let ``function`` reach only what is mapped for it alone from now on, or again (``is_own`` False) what all others share.

        What was mapped for it stays mapped. Software's ``memory`` is the shared one.
        """
        self._library.card_separate(self._handle(), self._select(function), bool(is_own))

    def _select(self, function):
        """Let the library's next calls concern the memory of ``function``, or the shared one (None)."""
        if function is not None and function not in range(256):
            raise ValueError(f"Function must be between 0 and 255, not {function!r}")
        self._library.card_select(self._handle(), -1 if function is None else function)
        return function

    def map(self, address, size, fd=None, offset=0, *, readable=True, writable=True, function=None):
        """Let ``size`` bytes of guest memory from ``address`` be those of the file ``fd`` from ``offset`` on, or fresh zeroes.

        ``readable``, ``writable``: what the card may. ``function``: for that one alone, see :meth:`separate`. Pages of a file that
        shrinks later read as zeroes, are counted (``counts.lost_pages``), and what is written to them is lost.

        Raises
        ------
        :exc:`ValueError`
            When something is mapped there already, or the file ends earlier.
        :exc:`OSError`
            When the file cannot be mapped so.
        """
        if not 0 <= address < 1 << 64 or not 0 < size <= (1 << 64) - address or not 0 <= offset < 1 << 63:
            raise ValueError(f"A mapping must lie within 64 bits and hold at least one byte, not {address!r}, {size!r} and {offset!r}")
        self._select(function)
        code = self._library.card_map(self._handle(), address, size, -1 if fd is None else fd, offset, bool(readable), bool(writable))
        if code == errno.EEXIST:
            raise ValueError(f"A mapping must not overlap another, not {address:#x} and {size:#x}")
        if code == errno.ENXIO:
            raise ValueError(f"A mapping must end within the file, not {offset:#x} and {size:#x}")
        if code:
            raise OSError(code, os.strerror(code))

    def unmap(self, address, size, *, function=None):
        """Take away what is mapped (for ``function`` alone) of ``size`` bytes from ``address``; returns the number of bytes that were."""
        if not 0 <= address < 1 << 64 or not 0 <= size <= (1 << 64) - address:
            raise ValueError(f"A range to unmap must lie within 64 bits, not {address!r} and {size!r}")
        self._select(function)
        return self._library.card_unmap(self._handle(), address, address + size - 1) if size else 0

    def read(self, address, size, *, function=None):
        """Return ``size`` bytes of guest memory; :exc:`ringwall.models.memory.AccessFault` where nothing is mapped."""
        self._select(function)
        found = bytearray(size)
        whole = 0 <= address <= (1 << 64) - size
        if not whole or self._library.card_read(self._handle(), address, (ctypes.c_char * size).from_buffer(found) if size else None, size):
            raise AccessFault(address, size, False, "unmapped")
        return bytes(found)

    def write(self, address, data):
        """Write to guest memory as software; :exc:`ringwall.models.memory.AccessFault` where nothing is mapped, or a read-only file."""
        data = bytes(data)
        self._select(None)
        if not 0 <= address <= (1 << 64) - len(data) or self._library.card_write(self._handle(), address, data, len(data)):
            raise AccessFault(address, len(data), True, "unmapped")
        if self._is_recorded:
            self.log(HostStore(self.cycle, address, data))

    def wire(self, socket):
        """Join the wire of a card with ``from_wire`` and ``to_wire`` to a socket of whole messages, which must not be closed earlier.

        At its other end is another such card, in this process or in another. Frames wait there, none is lost.
        """
        self._library.card_wire(self._handle(), socket.fileno())

    # -- time --

    def step(self, cycles, *, until_news=False):
        """Let ``cycles`` pass, or fewer when the card becomes idle or is, or (``until_news``) told the host something; return how many."""
        done = self._run(cycles, _UNTIL_NEWS if until_news else 0)
        self._take_news()
        return done

    def reset_link(self, cycles=1):
        """Have the link down, or in hot reset, for ``cycles``: what is on it is lost, and ``host`` is another one, that knows nothing.

        No cycle of it counts as idle. For some 1000 cycles more the card answers nothing. [PCIe5 6.6.1]
        """
        if cycles not in range(1, 1 << 31):
            raise ValueError(f"A link must be down for at least one cycle, not {cycles!r}")
        self._take_news()
        self.log(Note(self.cycle, _LINK_RESET))
        old = self.host
        self.host = Host(self.memory, rng=old.rng, bus=old.bus, mps=old.mps, mrrs=old.mrrs, rcb=old.rcb, msi_window=old.msi_window)
        self._library.card_reset_link(self._handle(), cycles)
        self._limits.clear()
        self._interrupts.clear()

    def interrupts(self):
        """Return the interrupts since the last call, ``[(address, data)]`` in their order."""
        found, self._interrupts = self._interrupts, []
        return found

    def _run(self, cycles, flags):
        done = self._library.card_run(self._handle(), cycles, flags)
        error = self._library.card_error(self._card)
        if error is not None:
            self._library.card_flush(self._card)
            if self._failure is not None:
                raise self._failure
            raise BrokenRule(f"the card broke a rule at {error.decode()}")
        return done

    def _take_news(self):
        """Hand completions, interrupts and messages to the host; return whether there was something."""
        library, host, any_news = self._library, self.host, False
        while count := library.card_news(self._card, self._news_cycle, self._news):
            any_news = True
            for reply in host.receive(self._news[:count], self._news_cycle.value):
                self._send(encode(reply.tlp))
            for interrupt in host.interrupts:
                if self.on_interrupt is not None:
                    self.on_interrupt(interrupt)
                else:
                    self._interrupts.append((interrupt.address, interrupt.data))
            host.interrupts.clear()
            host.messages.clear()
            if host.violations:
                raise BrokenRule(f"the card broke a rule at cycle {self._news_cycle.value}: {'; '.join(host.violations)}")
        return any_news

    def _send(self, dwords, due=0):
        self._library.card_send(self._handle(), (ctypes.c_uint32 * len(dwords))(*dwords), len(dwords), due)

    def _follow(self):
        """Tell the library what each function may do now."""
        for number, function in self.host._functions.items():
            new = (1, bool(function.bus_master or function.grace), function.may_write, function.mps,
                   min(function.payload, self.host.mps), function.mrrs, 256 if function.ext_tag else 32,
                   function.relaxed_ordering << 13 | function.no_snoop << 12)  # fmt: skip
            if self._limits.get(number) != new:
                self._limits[number] = new
                self._library.card_limits(self._card, number, _Limits(*new))

    # -- operations --

    def run(self, software):
        """Perform what the generator ``software`` yields (:mod:`ringwall.models.host`), one after the other; return what it returns."""
        return run_software(software, self.perform)

    def perform(self, operation):
        """Perform one operation and return its result; a read that the card refuses gives all ones."""
        if isinstance(operation, Delay):
            self._run(operation.cycles, _ALSO_IDLE)
            self._take_news()
            return self._ended(operation, None)
        if isinstance(operation, WaitInterrupt):
            end = self.cycle + operation.timeout_cycles
            while not (arrived := self.host.take_interrupt(operation.function, operation.vector)):
                if not self._take_news():
                    if self.cycle >= end:
                        break
                    self._run(end - self.cycle, _UNTIL_NEWS | _ALSO_IDLE)
            return self._ended(operation, arrived)
        pending = self._perform(operation)
        if pending.status == "TIMEOUT":
            raise BrokenRule(f"the card did not answer {operation} within {_LIMIT_CYCLES} cycles")
        return self._ended(operation, pending.result)

    def _perform(self, operation):
        """Perform a configuration or memory operation and return its :class:`Pending`."""
        pending = self.host.start(operation)
        self._follow()
        for tlp in pending.tlps:
            self._send(encode(tlp))
        end = self.cycle + _LIMIT_CYCLES
        while not pending.done:
            if not self._take_news():
                left = end - self.cycle
                if left <= 0:
                    self.host.abandon(pending)
                    break
                self._run(left, _UNTIL_NEWS | _ALSO_IDLE)
        self._follow()
        return pending

    def _ended(self, operation, result):
        if self._is_recorded or self.observe is not None:
            event = Operation(self.cycle, operation, result)
            self.log(event)
            if self.observe is not None:
                self.observe(event, None)
        return result

    def _access(self, operation):
        pending = self._perform(operation)
        if pending.status != "OK":
            raise CardError(operation, pending.status)
        return self._ended(operation, pending.result)

    def config_read(self, function, offset, size):
        """Return 1, 2 or 4 aligned bytes of configuration space; :exc:`CardError` when the card refuses."""
        return self._access(ConfigRead(function, offset, size))

    def config_write(self, function, offset, size, value):
        """Write 1, 2 or 4 aligned bytes of configuration space; :exc:`CardError` when the card refuses."""
        self._access(ConfigWrite(function, offset, size, value))

    def memory_read(self, address, size):
        """Return ``size`` bytes of a BAR, read in aligned pieces of at most 8 bytes; :exc:`CardError` when the card refuses one."""
        return b"".join(self._access(MemoryRead(at, piece)).to_bytes(piece, "little") for at, piece in pieces(address, size))

    def memory_write(self, address, data):
        """Write to a BAR in aligned pieces of at most 8 bytes; posted: they leave when cycles pass."""
        for at, piece in pieces(address, len(data)):
            self._access(MemoryWrite(at, piece, int.from_bytes(data[at - address : at - address + piece], "little")))

    # -- the log --

    def record(self, path):
        """Log every TLP of both directions, operations and writes of software to ``path`` from now on; None ends the log.

        A log that begins at cycle 0 can be given to :func:`replay`.
        """
        code = self._library.card_record(self._handle(), None if path is None else os.fsencode(path))
        if code:
            raise OSError(code, os.strerror(code), path)
        self._is_recorded = path is not None
        self._watch()
        if path is not None:
            parameters = self._parameters | {"begin": self.cycle, "config": repr(asdict(self.config))}
            self.log(run_header(self._parameters["seed"], parameters))

    def log(self, event):
        """Append ``event`` (:mod:`ringwall.models.events`) to the log, if there is one."""
        if self._is_recorded:
            self._library.card_line(self._card, event.to_json().encode())

    def flush(self):
        """Have everything so far of the log on disk."""
        code = self._library.card_flush(self._handle())
        if code:
            raise OSError(code, os.strerror(code))

    @property
    def observe(self):
        return self._observe

    @observe.setter
    def observe(self, observe):
        self._observe = observe
        self._watch()

    _card = None

    def _watch(self):
        if self._card is not None:
            self._library.card_observe(self._card, ctypes.cast(self._observer, ctypes.c_void_p) if self._observe is not None else None)

    def _observed(self, is_sent, cycle, count, dwords):
        """The library's call for each TLP."""
        try:
            words = dwords[:count]
            if is_sent:
                self._observe(TlpSent(cycle, words), None)
            else:
                self._observe(TlpReceived(cycle, words), decode(words))
        except Exception as error:
            self._failure = error
            return 1
        return 0


def pieces(address, size, longest=8):
    """Yield (address, size) of the naturally aligned pieces of at most ``longest`` bytes that an access consists of."""
    end = address + size
    while address < end:
        piece = longest
        while address % piece or address + piece > end:
            piece //= 2
        yield address, piece
        address += piece


def replay(path, config, *, progress=lambda cycle: None):
    """Feed what the host sent in the log ``path`` to a fresh card in the same cycles; return how many TLPs of the card were the same.

    Nobody else talks to the card: its reads are answered by the log. ``progress(cycle)`` is called now and then.

    Raises
    ------
    :exc:`BrokenRule`
        At the first TLP of the card that is another one, or in another cycle, or missing.
    :exc:`ValueError`
        When the log is none of a whole run of a :class:`CompiledCard` of ``config``.
    """
    header, events = read_log(path)
    parameters = dict(header.parameters)
    if parameters.pop("begin", None) != 0 or parameters.pop("config", None) != repr(asdict(config)):
        raise ValueError(f"A log to replay must begin at cycle 0 of a card of the same configuration, not {header.parameters!r}")
    beats, offered, wanted, found, last = config.width // 32, None, [], 0, 0
    with CompiledCard(config, **parameters) as card:
        card._options.replaying = 1
        for event in events:
            match event:
                case Note(cycle=cycle, text="offered"):
                    offered = cycle
                case Note(text=text) if text == _LINK_RESET:
                    raise ValueError(f"A log to replay must be one of a link that stays up, not {event!r}")
                case TlpSent(cycle=cycle, dwords=dwords):
                    card._send(dwords, cycle + 1 - -(-len(dwords) // beats) if offered is None else offered)
                    offered = None
                case TlpReceived(cycle=cycle, dwords=dwords):
                    wanted.append((cycle, dwords))
            last = max(last, event.cycle)

        def compare(log, rtl):
            if log != rtl:
                shown = [f"cycle {one[0]}: {' '.join(f'{dword:08x}' for dword in one[1][:8])}" if one else "nothing" for one in (log, rtl)]
                raise BrokenRule(f"TLP {found} of the card differs from the log\n  log:  {shown[0]}\n  card: {shown[1]}")

        def observe(event, tlp):
            nonlocal found
            if isinstance(event, TlpReceived):
                compare(wanted[found] if found < len(wanted) else None, (event.cycle, event.dwords))
                found += 1

        card.observe = observe
        while card.cycle <= last:
            card._run(min(100_000, last + 1 - card.cycle), _ALSO_IDLE)
            progress(card.cycle)
        if found < len(wanted):
            compare(wanted[found], None)
    return found
