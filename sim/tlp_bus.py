"""The raw TLP link in cocotb: driver towards the card, monitor of the card, and the link's own speed.

One coroutine serves both directions, with one wait per cycle and none while nothing can happen. It knows framing
only: what a TLP means is the business of who calls :meth:`RawLink.send` and of ``on_receive``.
"""

import heapq
import sys
from array import array
from dataclasses import dataclass

import cocotb
from cocotb.triggers import Event, First, RisingEdge, Timer

from .run import ports
from .stream import CLOCK_NS, cycle, raw_writer, writer

__all__ = ["Direction", "RawLink"]

_IDLE_CYCLES = 4  # cycles without traffic after which the coroutine sleeps until something can happen


@dataclass
class Direction:
    """What went over one direction of a link so far."""

    tlps: int = 0
    dwords: int = 0
    beats: int = 0
    busy_until: float = 0.0  # cycle at which the link has carried everything that was put on it


class RawLink:
    """The raw link of a card (``rtl/README.md``, contract 1): ports ``to_card`` and ``from_card`` of ``dut``.

    A TLP is a list of dwords: header dwords as drawn in the specification, then payload dwords with the lowest address
    in bits 7:0. Each TLP occupies the link for its dwords and ``overhead_bytes`` at ``bytes_per_cycle``; no TLP starts
    before the link has carried the ones before it, in either direction (the card is held back by ``ready``). Link time is
    counted in fractions of a cycle, so the average rate is exact.

    Whatever the card does against the rules of the stream or of the framing raises AssertionError in the coroutine,
    which fails the test: a withdrawn ``valid``, a stalled beat that changes, ``first`` or ``last`` out of place, lanes
    that are not kept from lane 0 up, a beat before the last that is not full, an unknown bit.

    Parameters
    ----------
    bytes_per_cycle : :class:`float`
        Raw rate of the link; default the width of the port. PCIe 3.0 x8 at 250 MHz is ``8 * 8 * 128 / 130 / 8 * 4``.
    overhead_bytes : :class:`int`
        Bytes of link time per TLP beyond its dwords: framing, sequence number and LCRC.
    gap : callable or None
        Called before each beat to the card with "is it the first of its TLP"; returns idle cycles to insert.
    ready : callable or None
        Called each cycle in which the link could take a beat from the card; returns whether it does.
    on_receive, on_sent : callable or None
        Called with ``(cycle, dwords)`` when the last beat of a TLP has been transferred.
    """

    def __init__(self, dut, *, to_card="i", from_card="o", bytes_per_cycle=None, overhead_bytes=8, gap=None, ready=None,
                 on_receive=None, on_sent=None):  # fmt: skip
        self._clk, known = dut.clk, ports()
        bits = known[f"{to_card}__payload"][1]
        self.width = (bits - 2) // 33 * 32
        if self.width not in (64, 128, 256, 512) or bits != self.width * 33 // 32 + 2:
            raise ValueError(f"Raw link must have a payload of 33/32 of its width and 2 bits, not {bits!r} bits")
        if bytes_per_cycle is not None and not 0 < bytes_per_cycle <= self.width // 8:
            raise ValueError(f"Raw rate must be above 0 and at most {self.width // 8} bytes per cycle, not {bytes_per_cycle!r}")
        self.bytes_per_cycle = bytes_per_cycle or self.width / 8
        self.overhead_bytes, self.gap, self.ready, self.on_receive, self.on_sent = overhead_bytes, gap, ready, on_receive, on_sent
        self.to_card, self.from_card = Direction(), Direction()
        self._names = to_card, from_card
        self._tx = [getattr(dut, f"{to_card}__{part}") for part in ("payload", "valid", "ready")]
        self._rx = [getattr(dut, f"{from_card}__{part}") for part in ("payload", "valid", "ready")]
        self._queue, self._order, self._news = [], 0, Event()
        self._sending = False
        self._drained = Event()
        self._stopped = False

    def start(self):
        """Start to serve the link; after the reset."""
        cocotb.start_soon(self._run())

    def stop(self):
        """Stop to serve the link, whatever is under way; another link may then be started on the same ports."""
        self._stopped = True
        self._news.set()
        writer(self._tx[1])(0)
        writer(self._rx[2])(0)

    def send(self, dwords, due=0, done=None):
        """Queue one TLP to the card, to start at cycle ``due`` or later; equal ``due`` keeps the order of the calls.

        ``done()``, if given, is called when the card has taken it, before ``on_sent``.
        """
        self._order += 1
        heapq.heappush(self._queue, (due, self._order, dwords, done))
        self._drained.clear()
        self._news.set()

    async def drained(self):
        """Wait until every TLP that was queued has been taken by the card."""
        if self._queue or self._sending:
            await self._drained.wait()

    def _beats(self, dwords):
        """Return the beats of one TLP as bit strings of the payload port."""
        lanes, width = self.width // 32, self.width
        found, last = [], (len(dwords) - 1) // lanes
        for n in range(last + 1):
            part = dwords[n * lanes : (n + 1) * lanes]
            data = int.from_bytes(_bytes(part), "little")
            keep = "0" * (lanes - len(part)) + "1" * len(part)
            found.append(f"{int(n == last)}{int(n == 0)}{keep}{data:0{width}b}")
        return found

    def _dwords(self, parts, lanes):
        """Return the dwords of received beats: bit strings of full beats, the last one with ``lanes`` kept."""
        last = parts[-1][-32 * lanes :]
        count = (len(parts) - 1) * (self.width // 32) + lanes
        text = last + "".join(reversed(parts[:-1])) if len(parts) > 1 else last
        try:
            raw = int(text, 2).to_bytes(4 * count, "little")
        except ValueError:
            raise AssertionError(f"{self._names[1]}: the card sends unknown bits in a kept lane") from None
        words = array("I", raw)
        if sys.byteorder == "big":
            words.byteswap()
        return words.tolist()

    async def _run(self):
        edge, news, queue = RisingEdge(self._clk), self._news, self._queue
        tx_payload, tx_valid, tx_ready = raw_writer(self._tx[0]), writer(self._tx[1]), self._tx[2]._handle.get_signal_val_binstr
        rx_payload, rx_valid = (handle._handle.get_signal_val_binstr for handle in self._rx[:2])
        rx_ready, rises = writer(self._rx[2]), RisingEdge(self._rx[1])
        tx, rx, name = self.to_card, self.from_card, self._names[1]
        width, lanes = self.width, self.width // 32
        full = "1" * lanes
        dwords = beats = done = None  # the TLP that is being sent and those of its beats that are not taken yet, last first
        offered, pause = False, 0
        parts, began, stalled, taking, idle = [], 0, None, False, 0
        while True:
            await edge
            if self._stopped:
                return
            now = cycle()
            idle += 1

            # To the card: was the beat taken? What is offered next?
            if beats is not None:
                idle = 0
                if offered:
                    taken = tx_ready()
                    if taken == "1":
                        beats.pop()
                        tx.beats += 1
                        offered = False
                        if not beats:
                            beats = None
                            tx.tlps += 1
                            tx.dwords += len(dwords)
                            if done is not None:
                                done()
                            if self.on_sent is not None:
                                self.on_sent(now, dwords)
                        elif self.gap is not None:
                            pause = self.gap(False)
                    elif taken != "0":
                        raise AssertionError(f"{self._names[0]}: ready is {taken}")
            if beats is None and queue and queue[0][0] <= now + 1 and now + 2 > tx.busy_until:
                _, _, dwords, done = heapq.heappop(queue)
                beats = self._beats(dwords)
                beats.reverse()
                tx.busy_until = max(tx.busy_until, now + 1) + (4 * len(dwords) + self.overhead_bytes) / self.bytes_per_cycle
                pause = 0 if self.gap is None else self.gap(True)
                self._sending = True
            if beats is None:
                if self._sending:
                    tx_valid(0)
                    self._sending = False
                    if not queue:
                        self._drained.set()
            elif not offered:
                if pause:
                    pause -= 1
                    tx_valid(0)
                else:
                    tx_payload(beats[-1])
                    tx_valid(1)
                    offered = True

            # From the card: check and take the beat; is the next one taken?
            valid = rx_valid()
            if valid == "1":
                idle = 0
                beat = rx_payload()
                if stalled is not None and beat != stalled:
                    raise AssertionError(f"{name}: a stalled beat changed")
                if taking:
                    stalled = None
                    rx.beats += 1
                    if not parts:
                        began = now
                    if beat[1] != ("0" if parts else "1"):
                        raise AssertionError(f"{name}: first is {beat[1]} on beat {len(parts)} of a TLP")
                    keep = beat[2 : 2 + lanes]
                    parts.append(beat[-width:])
                    if beat[0] == "1":
                        count = keep.count("1")
                        if keep[-count:] != full[:count] or keep.count("0") != lanes - count:
                            raise AssertionError(f"{name}: keep is {keep} on the last beat of a TLP")
                        words = self._dwords(parts, count)
                        parts = []
                        rx.tlps += 1
                        rx.dwords += len(words)
                        rx.busy_until = max(rx.busy_until, began) + (4 * len(words) + self.overhead_bytes) / self.bytes_per_cycle
                        if self.on_receive is not None:
                            self.on_receive(now, words)
                    elif beat[0] != "0" or keep != full:
                        raise AssertionError(f"{name}: last is {beat[0]} and keep is {keep} on beat {len(parts) - 1} of a TLP")
                else:
                    stalled = beat
            elif valid != "0":
                raise AssertionError(f"{name}: valid is {valid}")
            elif stalled is not None:
                raise AssertionError(f"{name}: valid was withdrawn from a stalled beat")
            take = (bool(parts) or now + 2 > rx.busy_until) and (self.ready is None or self.ready())
            if take is not taking:
                taking = take
                rx_ready(int(take))

            # Sleep while nothing can happen: nothing to send yet, nothing offered by the card, ready as it shall be.
            if idle > _IDLE_CYCLES and beats is None and not parts and stalled is None and (take or self.ready is not None):
                news.clear()
                wait = queue[0][0] - 2 - now if queue else None
                if wait is None:
                    await First(rises, news.wait())
                elif wait > 0:
                    await First(rises, news.wait(), Timer(wait * CLOCK_NS, "ns"))
                idle = 0


def _bytes(dwords):
    words = array("I", dwords)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
