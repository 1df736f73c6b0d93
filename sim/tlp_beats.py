"""TLPs on the streams inside the card (``TlpBeat``), and the far side of the requester's three streams."""

import heapq
import itertools

import cocotb

from ..models.tlp import TRANSLATION_REQUEST, CplStatus, Pasid, Tlp, TlpType
from ..rtl.tlp.layouts import TlpBeat
from .stream import cycle, pack, sleep, unpack

__all__ = ["RequesterLink", "completions_of", "from_beats", "to_beats"]

_MESSAGES = (TlpType.MSG, TlpType.MSGD)
_CODES = {kind.value: kind for kind in TlpType}  # (bits 4:0 of Type, carries data) -> kind


def to_beats(width, tlp, has_pasid=False):
    """Return the ``TlpBeat`` payloads (ints) of ``tlp``."""
    layout, size = TlpBeat(width, has_pasid), width // 8
    prefix = {"pasid": {"valid": 1, "value": tlp.pasid.value}} if tlp.pasid is not None else {}
    header = {
        "fmt": (2 if tlp.type.has_data else 0) | (tlp.address >> 32 != 0 or tlp.type in _MESSAGES),
        "type": tlp.type.value[0] | tlp.message_routing, "tc": tlp.tc, "message_code": tlp.message_code,
        "id_based_ordering": tlp.ido, "relaxed_ordering": tlp.relaxed_ordering, "no_snoop": tlp.no_snoop, "digest": tlp.td,
        "poisoned": tlp.poisoned, "at": tlp.at, "length_dw": tlp.length_dw, "requester_id": tlp.requester_id, "tag": tlp.tag,
        "first_be": tlp.first_be, "last_be": tlp.last_be, "address": tlp.address or tlp.register, "completer_id": tlp.completer_id,
        "status": int(tlp.status), "byte_count_modified": tlp.bcm, "byte_count": tlp.byte_count,
        "lower_address": tlp.lower_address,
    }  # fmt: skip
    chunks = [tlp.data[n : n + size] for n in range(0, len(tlp.data), size)] or [b""]
    return [
        pack(layout, header=header if n == 0 else 0, data=int.from_bytes(chunk, "little"), dword_count=len(chunk) // 4,
             first=n == 0, last=n == len(chunks) - 1, **(prefix if n == 0 else {}))
        for n, chunk in enumerate(chunks)
    ]  # fmt: skip


def from_beats(width, payloads, has_pasid=False):
    """Return the memory request, completion or message that ``payloads`` (ints of ``TlpBeat``) are, judged by their framing alone."""
    layout = TlpBeat(width, has_pasid)
    beats = [unpack(layout, payload) for payload in payloads]
    for n, beat in enumerate(beats):
        if (beat.first, beat.last) != (n == 0, n == len(beats) - 1) or (not beat.last and beat.dword_count != width // 32):
            raise AssertionError(f"beat {n} of {len(beats)}: first {beat.first} last {beat.last} dwords {beat.dword_count}")
    h = beats[0].header
    content = b"".join((beat.data & (1 << 32 * beat.dword_count) - 1).to_bytes(4 * beat.dword_count, "little") for beat in beats)
    if h.fmt & 2 and len(content) != 4 * h.length_dw:
        raise AssertionError(f"{len(content)} bytes of payload, the header says {h.length_dw} dwords")
    routing = h.type & 7 if h.type >> 3 == TlpType.MSG.value[0] >> 3 else 0
    no_write = h.at == TRANSLATION_REQUEST and h.address & 1
    return Tlp(
        _CODES[h.type - routing, bool(h.fmt & 2)], tc=h.tc, relaxed_ordering=bool(h.relaxed_ordering), no_snoop=bool(h.no_snoop),
        ido=bool(h.id_based_ordering), at=h.at, poisoned=bool(h.poisoned), td=bool(h.digest), length_dw=h.length_dw,
        requester_id=h.requester_id, tag=h.tag, first_be=h.first_be, last_be=h.last_be, address=h.address - no_write,
        no_write=bool(no_write), message_code=h.message_code, message_routing=routing, completer_id=h.completer_id, status=h.status,
        bcm=bool(h.byte_count_modified), byte_count=h.byte_count, lower_address=h.lower_address, data=content,
        pasid=Pasid(beats[0].pasid.value) if has_pasid and beats[0].pasid.valid else None,
    )  # fmt: skip


def completions_of(read, content, cuts=(), completer_id=0x0100, **fields):
    """Return the successful completions of ``read`` with ``content`` (its enabled bytes), cut in front of the addresses ``cuts``."""
    start, length = read.byte_span()
    edges = [start, *sorted(cut for cut in set(cuts) if start < cut < start + length), start + length]
    found = []
    for low, high in itertools.pairwise(edges):
        part = bytes(low % 4) + content[low - start : high - start]
        part += bytes(-len(part) % 4)
        found.append(Tlp(TlpType.CPLD, completer_id=completer_id, requester_id=read.requester_id, tag=read.tag,
                         status=CplStatus.SC, byte_count=start + length - low, lower_address=low & 0x7F,
                         length_dw=len(part) // 4, data=part, **fields))  # fmt: skip
    return found


class RequesterLink:
    """Takes what the requester sends and delivers completions.

    ``on_write(tlp)`` and ``on_read(tlp)`` are called when a TLP was taken whole. :meth:`send` queues beats of completions; those that
    are due leave in the order of their due cycles, whole TLPs back to back.

    Attributes
    ----------
    stalls : :class:`int`
        Cycles in which a completion was offered and not taken.
    """

    def __init__(self, width, posted, non_posted, completions, on_write, on_read, *, has_pasid=False):
        self.width, self.completions, self.has_pasid = width, completions, has_pasid
        self.on_write, self.on_read = on_write, on_read
        self.posted_cycles, self.non_posted_cycles = [], []
        self.stalls = 0
        self._queue, self._serial = [], itertools.count()
        self._wake = cocotb.triggers.Event()
        self._streams = posted, non_posted

    def start(self):
        """Begin to watch and to send."""
        posted, non_posted = self._streams
        cocotb.start_soon(posted.watch(_Packets(self.width, self.has_pasid, self.on_write), self.posted_cycles))
        cocotb.start_soon(non_posted.watch(_Packets(self.width, self.has_pasid, self.on_read), self.non_posted_cycles))
        cocotb.start_soon(self._send())
        return self

    def send(self, tlp, delay=0):
        """Send a completion in ``delay`` cycles."""
        self.send_beats(to_beats(self.width, tlp), delay)

    def send_beats(self, beats, delay=0):
        """Send the beats of a completion, right or wrong, in ``delay`` cycles."""
        heapq.heappush(self._queue, (cycle() + delay, next(self._serial), beats))
        self._wake.set()

    @property
    def idle(self):
        """Nothing waits to be sent."""
        return not self._queue

    async def _send(self):
        c = self.completions
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            if self._queue[0][0] > cycle():
                await sleep(c._edge, self._queue[0][0], self._wake)
                continue
            for beat in heapq.heappop(self._queue)[2]:
                c._payload(beat)
                c._valid(1)
                await c._edge
                while not c.read_ready():
                    self.stalls += 1
                    await c._edge
            c._valid(0)


class _Packets:
    """A list's ``append`` that collects beats to whole TLPs."""

    def __init__(self, width, has_pasid, on_tlp):
        self.width, self.has_pasid, self.on_tlp, self.beats = width, has_pasid, on_tlp, []
        self.last = 1 << TlpBeat(width, has_pasid)["last"].offset

    def append(self, payload):
        self.beats.append(payload)
        if payload & self.last:
            beats, self.beats = self.beats, []
            self.on_tlp(from_beats(self.width, beats, self.has_pasid))
