"""A card at the far end of a tunnel, with the interface of :class:`.compiled.CompiledCard`: on a real board, or simulated.

Guest memory and the root complex (:mod:`ringwall.models.host`) are here; what the card wants of them comes over the line.
"""

import os
import random
from collections import deque

from ..models.events import HostStore, Operation, TlpReceived, TlpSent
from ..models.host import CompletionPolicy, ConfigRead, ConfigWrite, Delay, Host, WaitInterrupt
from ..models.host import run as run_software
from ..models.memory import GuestMemory
from ..models.tlp import decode, encode
from ..models.tunnel import Arrived, Peer, WrongVersion
from ..rtl.config import BlkConfig, EndpointConfig, IommuConfig
from .compiled import BrokenRule, CardError
from .compiled_bench import CompiledBench
from .log import Log, run_header
from .tunnel_lines import open_line

__all__ = ["DeadLine", "TunnelBench", "TunnelledCard", "board_config"]

_MOST_AT_ONCE = 1 << 20  # units of time that the line is left alone


def board_config(width=64):
    """Return the card that boards without a PCIe PHY have: IOMMU, one disk of 128 KiB; patient, as its host is slow and far away.

    Its 16 reads in flight are, at 512 bytes each, what 64 bits move in 1,024 cycles.
    """
    iommu, disk = IommuConfig(entries=64, superpage_entries=4, walks=4), BlkConfig(capacity_sectors=256)
    return EndpointConfig(width=width, iommu=iommu, disks=(disk,), tags=16, wall_tags=8, completion_timeout_cycles=100_000_000)


class DeadLine(ConnectionError):
    """Nobody answers at the other end, or not in our language; its text says what to do."""


class _Memory(GuestMemory):
    """Guest memory that tells its card of every write of software."""

    def __init__(self, card):
        super().__init__(all_ram=False)
        self._card, self.observe = card, None

    def write(self, address, data, *, source=""):
        super().write(address, data, source=source)
        if not source:
            self._card.log(HostStore(self._card.cycle, address, bytes(data)))
            if self.observe is not None:
                self.observe(address, bytes(data))


class TunnelledCard:
    """The card at the other end of ``target``, with a host at this one.

    The card's reads are answered at once, with memory as it is when they arrive. A rule that the card breaks raises
    :exc:`.compiled.BrokenRule`, a line without an answer :exc:`DeadLine`; no call waits longer than the line's ``limit``.

    Parameters
    ----------
    config : :class:`ringwall.rtl.config.EndpointConfig`
        What is on the board, or is to be simulated.
    target : :class:`str`
        See :func:`.tunnel_lines.open_line`.
    seed : :class:`int`
        Every choice is drawn from it.
    mps, mrrs : :class:`int`
        As those of :class:`ringwall.models.host.Host`.

    Attributes
    ----------
    host, memory, observe
        As those of :class:`.compiled.CompiledCard`. ``TlpSent`` comes when the TLP has left the buffer of the card's end.
    line : a line of :mod:`.tunnel_lines`
    carried : list of :class:`int`
        Bytes put on the line, bytes that came.
    peer : :class:`ringwall.models.tunnel.Peer`
    """

    def __init__(self, config, *, target="sim", seed=0, mps=256, mrrs=512):
        self.config, self.observe, self.target = config, None, target
        self._log, self._interrupts, self._sent, self._seed, self.carried = None, [], deque(), seed, [0, 0]
        self._rng = random.Random(seed)
        self.line = open_line(target, config, seed=seed)
        self.memory = _Memory(self)
        self.host = Host(self.memory, rng=self._rng, policy=CompletionPolicy(latency=0), mps=mps, mrrs=mrrs)
        self._active = self.line.now
        self._connect()

    def _connect(self):
        """Begin a session."""
        line = self.line
        session = self._rng.getrandbits(32) if line.is_simulated else int.from_bytes(os.urandom(4), "little")
        self.peer = Peer(session, patience=line.patience, keep_alive=line.keep_alive, now=line.now)
        end = line.now + line.limit
        while self.peer.hello is None:
            if line.now >= end:
                raise DeadLine(f"No card answers at {line.name}: is the board on, has it the tunnel's bitstream, is the rate the same?")
            self._pump(line.patience)
        lanes = self.config.width // 32
        if self.peer.hello.lanes != lanes:
            raise DeadLine(f"The card at {line.name} has a path of {32 * self.peer.hello.lanes} bits, not {32 * lanes}: give its WIDTH.")

    def close(self):
        """End the log and give the line back."""
        self.record(None)
        self.line.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @property
    def cycle(self):
        """The time, in the line's unit: cycles of a simulated card, else microseconds."""
        return self.line.now

    @property
    def news_cycle(self):
        return self.line.now

    @property
    def is_idle(self):
        """Nothing is to be sent, and for the line's ``idle_after`` nothing came."""
        return self.peer.is_quiet and self.line.now - max(self.peer.heard, self._active) > self.line.idle_after

    def map(self, address, size):
        """Let ``size`` bytes of guest memory from ``address`` be there."""
        self.memory.add_range(address, size)

    # -- the line --

    def _pump(self, time):
        """Put on the line what waits, let up to ``time`` pass until something comes, take it; return whether there was a TLP."""
        line, peer = self.line, self.peer
        any_tlp = False
        try:
            if data := peer.output(line.now):
                line.put(data)
            came = line.get(min(time, _MOST_AT_ONCE, line.patience))
            self.carried[0] += len(data)
            self.carried[1] += len(came)
            for news in peer.feed(came, line.now):
                self._active = line.now
                if isinstance(news, Arrived):
                    any_tlp = True
                    self._arrived(news.dwords)
                else:
                    self._taken(news.dwords)
        except WrongVersion as error:
            raise DeadLine(str(error)) from None
        except OSError as error:
            raise DeadLine(f"The line to the card at {line.name} broke: {error.strerror or error}. Plug it in and begin again.") from None
        if not peer.is_quiet and line.now - max(peer.heard, self._active) > line.limit:
            raise DeadLine(f"The card at {line.name} does not answer any more: is the cable in, is the board on? Then begin again.")
        return any_tlp

    def _send(self, tlp, reply=None):
        dwords = encode(tlp)
        if self.peer.is_quiet:
            self._active = self.line.now
        self._sent.append(reply)
        self.peer.send(dwords)

    def _taken(self, dwords):
        reply = self._sent.popleft()
        if reply is not None:
            self.host.sent(reply)
        self._tell(TlpSent(self.line.now, dwords), None)

    def _arrived(self, dwords):
        host, now = self.host, self.line.now
        replies = host.receive(dwords, now)
        for interrupt in host.interrupts:
            self._interrupts.append((interrupt.address, interrupt.data))
        host.interrupts.clear()
        host.messages.clear()
        if host.violations:
            shown = " ".join(f"{dword:08x}" for dword in dwords[:8])
            raise BrokenRule(f"the card broke a rule at {self.line.unit} {now}: {'; '.join(host.violations)}: TLP {shown}")
        self._tell(TlpReceived(now, dwords), decode(dwords))
        for reply in replies:
            self._send(reply.tlp, reply)

    def _tell(self, event, tlp):
        self.log(event)
        if self.observe is not None:
            self.observe(event, tlp)

    # -- as a compiled card --

    def step(self, time, *, until_news=False):
        """Let ``time`` pass, or less when the card is idle, or (``until_news``) sent a TLP; return how much."""
        begin = self.line.now
        while (left := begin + time - self.line.now) > 0 and not self.is_idle:
            if self._pump(left) and until_news:
                break
        return self.line.now - begin

    def interrupts(self):
        """Return the interrupts since the last call, ``[(address, data)]`` in their order."""
        found, self._interrupts = self._interrupts, []
        return found

    def reset_link(self):
        """Begin anew: what is under way is lost, and ``host`` is another one, that knows nothing. [PCIe5 6.6.1]"""
        old = self.host
        self.host = Host(self.memory, rng=old.rng, policy=old.policy, bus=old.bus, mps=old.mps, mrrs=old.mrrs)
        self._interrupts.clear()
        self._sent.clear()
        self._connect()

    def run(self, software):
        """Perform what the generator ``software`` yields (:mod:`ringwall.models.host`), one after the other; return what it returns."""
        return run_software(software, self.perform)

    def perform(self, operation):
        """Perform one operation and return its result; a read that the card refuses gives all ones."""
        if isinstance(operation, Delay):
            self.step(operation.cycles)
            return self._ended(operation, None)
        if isinstance(operation, WaitInterrupt):
            end = self.line.now + operation.timeout_cycles
            while not (arrived := self.host.take_interrupt(operation.function, operation.vector)) and self.line.now < end:
                self._pump(end - self.line.now)
            return self._ended(operation, arrived)
        return self._ended(operation, self._perform(operation).result)

    def _perform(self, operation):
        """Perform a configuration or memory operation and return its :class:`ringwall.models.host.Pending`."""
        pending = self.host.start(operation)
        for tlp in pending.tlps:
            self._send(tlp)
        end = self.line.now + self.line.limit
        while not pending.done:
            if self.line.now >= end:
                raise BrokenRule(f"the card did not answer {operation} within {self.line.limit} {self.line.unit}")
            self._pump(end - self.line.now)
        return pending

    def _ended(self, operation, result):
        self._tell(Operation(self.line.now, operation, result), None)
        return result

    def config_read(self, function, offset, size):
        """Return 1, 2 or 4 aligned bytes of configuration space; :exc:`.compiled.CardError` when the card refuses."""
        return self._access(ConfigRead(function, offset, size))

    def config_write(self, function, offset, size, value):
        """Write 1, 2 or 4 aligned bytes of configuration space; :exc:`.compiled.CardError` when the card refuses."""
        self._access(ConfigWrite(function, offset, size, value))

    def _access(self, operation):
        pending = self._perform(operation)
        if pending.status != "OK":
            raise CardError(operation, pending.status)
        return self._ended(operation, pending.result)

    def record(self, path):
        """Log every TLP of both directions, operations and writes of software to ``path`` from now on; None ends the log."""
        if self._log is not None:
            self._log.close()
        self._log = None if path is None else Log(path, run_header(self._seed, {"target": self.target}))

    def log(self, event):
        """Append ``event`` (:mod:`ringwall.models.events`) to the log, if there is one."""
        if self._log is not None:
            self._log.write(event)


class TunnelBench(CompiledBench):
    """A card at the end of a tunnel with drivers and, when it is ``judged``, the golden model around it, enumerated.

    Parameters
    ----------
    config, seed, judged, path, parameters
        As those of :class:`.compiled_bench.CompiledBench`, of :class:`TunnelledCard`.
    """

    card_kind = TunnelledCard

    def settle(self):
        """Let the card finish what it is at: until it is idle."""
        while self.compiled.step(self.compiled.line.idle_after):
            pass

    def done(self, disk, requests, *, cycles=None):
        """As that of the base; ``cycles`` is in the line's unit, and by default so long that a card without progress is idle before."""
        super().done(disk, requests, cycles=100 * self.compiled.line.limit if cycles is None else cycles)
