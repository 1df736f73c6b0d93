"""What a run moved, when, and how long its parts took: an observer of events, for the table, the plot and the timeline."""

from dataclasses import dataclass

from ..models.events import TlpSent
from ..models.tlp import TlpType, decode
from .report import Span, Timeline

__all__ = ["DATA_READ", "DATA_WRITE", "Figures", "Region", "payload_limit"]

DATA_READ, DATA_WRITE = "data read", "data write"  # lanes of what lies in no region


@dataclass(frozen=True)
class Region:
    """``length`` bytes from ``start`` (bus addresses) whose accesses belong into ``lane``."""

    lane: str
    start: int
    length: int


class Figures:
    """Follows the TLPs of a run.

    A read of the card lasts from its request to its last completion, as seen on the link; writes are instants. What lies in
    no region is data. Writes of the host count only inside of a region (doorbells).

    Parameters
    ----------
    regions : list of :class:`Region`
        Where accesses have a name; the first that holds the first byte counts. May grow.
    interrupts : :class:`int`
        Spans are kept from the first doorbell up to so many interrupts.
    doorbell, interrupt : :class:`str`
        Names of the two lanes that begin and end a request.

    Attributes
    ----------
    reads, writes : list of (cycle, bytes)
        Data that the card has read from and written to the host's memory, when it had crossed the link.
    counts : dict
        Lane -> accesses.
    latencies : dict
        Lane -> cycles that each read of it took.
    spans : list of :class:`ringwall.sim.report.Span`
    """

    def __init__(self, regions=(), *, interrupts=8, doorbell="doorbell", interrupt="MSI-X"):
        self.regions, self.interrupts, self.doorbell, self.interrupt = list(regions), interrupts, doorbell, interrupt
        self.reads, self.writes, self.spans, self.counts, self.latencies = [], [], [], {}, {}
        self._open = {}  # (requester ID, tag) -> (lane, cycle, address, length)
        self._keeps = False

    def take(self, event, tlp):
        """Follow one event; ``tlp`` is the decoded TLP of one that the card sent."""
        if tlp is not None:
            if tlp.type is TlpType.MRD:
                start, length = tlp.byte_span()
                self._open[tlp.requester_id, tlp.tag] = self._lane(start, DATA_READ), event.cycle, start, length
            elif tlp.type is TlpType.MWR:
                start, length = tlp.byte_span()
                lane = self._lane(start, DATA_WRITE)
                if lane is DATA_WRITE:
                    self.writes.append((event.cycle, length))
                self._count(lane, event.cycle, event.cycle, start, length)
        elif type(event) is TlpSent:
            self._sent(event)

    def _sent(self, event):
        tlp = decode(event.dwords)
        if tlp.type is TlpType.MWR:
            lane = self._lane(tlp.address, None)
            if lane is not None:
                self._keeps = self._keeps or (lane == self.doorbell and self.interrupts > 0)
                self._count(lane, event.cycle, event.cycle, *tlp.byte_span())
        elif tlp.type.is_completion:
            key = tlp.requester_id, tlp.tag
            if key not in self._open:
                return
            lane, begin, start, length = self._open[key]
            given = min(4 * tlp.length_dw - tlp.lower_address % 4, tlp.byte_count) if tlp.type is TlpType.CPLD else tlp.byte_count
            if lane is DATA_READ and tlp.type is TlpType.CPLD:
                self.reads.append((event.cycle, given))
            if given >= tlp.byte_count:
                del self._open[key]
                self.latencies.setdefault(lane, []).append(event.cycle - begin)
                self._count(lane, begin, event.cycle, start, length)

    def _lane(self, address, other):
        for region in self.regions:
            if region.start <= address < region.start + region.length:
                return region.lane
        return other

    def _count(self, lane, begin, end, start, length):
        self.counts[lane] = self.counts.get(lane, 0) + 1
        if self._keeps:
            self.spans.append(Span(lane, begin, end, f"{length} bytes at {start:#x}"))
            if lane == self.interrupt:
                self.interrupts -= 1
                self._keeps = self.interrupts > 0

    def timeline(self, title, lanes):
        """Return the spans that were kept, in the order of ``lanes``, from the first doorbell on."""
        spans = [span for span in self.spans if span.lane in lanes]
        return Timeline(title, lanes, spans, min((span.begin for span in spans if span.lane == self.doorbell), default=0))


def payload_limit(width, bytes_per_cycle, payload, header_dwords, overhead_bytes=8):
    """Return what a link can carry: bytes of payload per cycle in TLPs of ``payload`` bytes, the smaller of link and interface.

    ``width`` in bits, the raw rate in bytes per cycle, ``header_dwords`` 3 or 4. [peers: limits]
    """
    whole = payload + 4 * header_dwords
    return min(bytes_per_cycle * payload / (whole + overhead_bytes), payload / -(-whole // (width // 8)))
