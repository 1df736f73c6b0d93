"""What becomes of the frames that come: filter, checksum, queue."""

from amaranth import Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..stream.queue import Queue
from .net_checksum import Checksum
from .net_control import table_hash
from .net_headers import Fields, FrontCapture
from .net_layouts import NetBeat, Settings, Verdict
from .net_transmit import FRAME_MIN

DELAY = 16  # beats, and so frames, on the way to their verdict
FLOWS = 256
ETHERNET_BYTES, TAG_BYTES = 14, 4


class ReceiveFront(wiring.Component):
    """Judges each frame that comes, and gives its beats on with the verdict beside the last.

    Dropped is a damaged frame, one shorter than 14 bytes or longer than ``mtu`` and its Ethernet header, and, while ``filters``, one
    that is for nobody here: not broadcast, nor for our address or one of the table, nor let in by a receive mode. The table is a hash,
    so addresses of the same hash come in, too. [VIRTIO1.4 5.1.9.5.1, 5.1.9.5.2]

    The checksum is checked of TCP and UDP in unfragmented IPv6 and IPv4 without VLAN tag, options and extension headers.

    A frame goes to the pair from which a frame of its flow was sent last, if that is in use, else to one that its flow decides (a flow:
    :attr:`.net_headers.Fields.flow`, table of 256). [VIRTIO1.4 5.1.9.5.7]

    Latency: a few cycles. Throughput: one beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    pairs : :class:`int`
        Pairs of queues.
    mtu : :class:`int`
        Bytes of the longest IP packet.
    checksums : :class:`bool`
        Check them.

    Members
    -------
    received : ``In(stream.Signature(NetBeat(width)))``
        Frames; it never waits for the driver.
    sent, sent_beat, sent_queue : ``In(1)``, ``In(NetBeat(width))``, ``In(8)``
        A beat leaves, of that pair.
    settings : ``In(Settings)``
        Of the driver.
    filters : ``In(1)``
        CTRL_RX was agreed on.
    valid, beat, verdict : ``Out(1)``, ``Out(NetBeat(width))``, ``Out(Verdict)``
        A beat goes on; the verdict counts with the last.
    """

    def __init__(self, *, width, pairs, mtu, checksums):
        self.width, self.pairs, self.mtu, self.checksums = width, pairs, mtu, checksums
        beat = NetBeat(width)
        super().__init__({
            "received": In(stream.Signature(beat)), "sent": In(1), "sent_beat": In(beat), "sent_queue": In(8), "settings": In(Settings),
            "filters": In(1), "valid": Out(1), "beat": Out(beat), "verdict": Out(Verdict),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.delay = delay = Queue(NetBeat(self.width), DELAY)
        half = data.StructLayout({"keep": 1, "queue": 8, "length_bytes": 16, "extra": 18, "is_known": 1})
        m.submodules.verdicts = verdicts = Queue(half, DELAY)
        m.submodules.capture = capture = FrontCapture(width=self.width)
        wiring.connect(m, wiring.flipped(self.received), delay.i)
        take = Signal()
        m.d.comb += [
            take.eq(self.received.valid & self.received.ready),
            capture.valid.eq(take),
            capture.beat.eq(self.received.payload),
        ]
        fields = Fields(capture.front)

        # Three steps behind the last beat: what the fields say, what the tables say, the verdict.
        length = Signal(16)
        is_ours, is_broadcast, is_multicast, may_pass, place = Signal(), Signal(), Signal(), Signal(), Signal(6)
        step, wanted, keep, known, extra = Signal(2), Signal(), Signal(), Signal(), Signal(18)
        limit = ETHERNET_BYTES + self.mtu + Mux(fields.is_tagged, TAG_BYTES, 0)
        m.d.sync += [
            step.eq(capture.ended | step << 1),
            length.eq(capture.length_bytes),
            is_ours.eq(fields.target == self.settings.mac),
            is_broadcast.eq(fields.target.all()),
            is_multicast.eq(fields.target[0]),
            place.eq(table_hash(fields.target)),
            may_pass.eq(~capture.error & (capture.length_bytes >= FRAME_MIN) & (capture.length_bytes <= limit)),
            wanted.eq(
                ~self.filters | self.settings.promiscuous | is_ours | is_broadcast | (is_multicast & self.settings.all_multicast)
                | self.settings.table.bit_select(place, 1)),
            keep.eq(may_pass),
            verdicts.i.payload.length_bytes.eq(length),
        ]
        m.d.comb += [
            verdicts.i.valid.eq(step[1]),
            verdicts.i.payload.keep.eq(keep & wanted),
            verdicts.i.payload.queue.eq(self._pair(m, fields.flow) if self.pairs > 1 else 0),
            self.beat.eq(delay.o.payload),
            *(self.verdict[name].eq(verdicts.o.payload[name]) for name in ("keep", "queue", "length_bytes")),
        ]
        is_ready = verdicts.o.valid
        if self.checksums:
            is_sound = (fields.udp_bytes == fields.payload_bytes) & (fields.udp_checksum != 0)  # 0 says "none" [RFC768]
            enough = Mux(fields.is_udp, (fields.payload_bytes >= 8) & is_sound, fields.is_tcp & (fields.payload_bytes >= 20))
            end = Signal(17)
            m.d.comb += end.eq(fields.payload_start + fields.payload_bytes)
            m.d.sync += [
                known.eq(enough & (capture.length_bytes >= end)),
                extra.eq(fields.protocol + fields.payload_bytes),
                verdicts.i.payload.is_known.eq(known),
                verdicts.i.payload.extra.eq(extra),
            ]
            sums = self._sums(m, take, fields.summed_from, end)
            whole = Signal(18)  # with what the sum of a pseudo header has beside the addresses
            m.d.comb += [
                whole.eq(sums.o.payload + verdicts.o.payload.extra),
                self.verdict.is_valid.eq(verdicts.o.payload.is_known & ((whole[:16] + whole[16:]) == 0xFFFF)),
                sums.o.ready.eq(verdicts.o.ready),
            ]
            is_ready &= sums.o.valid
        m.d.comb += [
            self.valid.eq(delay.o.valid & (~delay.o.payload.last | is_ready)),
            delay.o.ready.eq(self.valid),
            verdicts.o.ready.eq(self.valid & delay.o.payload.last),
        ]
        return m

    def _pair(self, m, flow):
        """Return the pair of ``flow``, two cycles behind it."""
        entries = [n * self.pairs // FLOWS for n in range(FLOWS)]
        m.submodules.learned = learned = Memory(shape=range(self.pairs), depth=FLOWS, init=entries)
        m.submodules.sent = sent = FrontCapture(width=self.width)
        write, read = learned.write_port(), learned.read_port()
        queue, key, key_then = Signal(8), Signal(8), Signal(8)
        m.d.comb += [sent.valid.eq(self.sent), sent.beat.eq(self.sent_beat), read.addr.eq(key)]
        m.d.sync += [
            queue.eq(self.sent_queue),
            write.addr.eq(Fields(sent.front).flow), write.data.eq(queue), write.en.eq(sent.ended),
            key.eq(flow), key_then.eq(key),
        ]  # fmt: skip
        return Mux(read.data < self.settings.pairs, read.data, (key_then * self.settings.pairs[:8])[8:])

    def _sums(self, m, take, start, end):
        """Return the queue of the frames' sums over bytes ``start`` to ``end``, which belong to the beat taken in the cycle before."""
        lanes = self.width // 8
        m.submodules.sum = checksum = Checksum(width=self.width)
        m.submodules.sums = sums = Queue(16, DELAY)
        # ``base``: the first byte of a beat. The fields of a beat are there in the cycle behind it.
        base, first_base, valid_then, beat_then = Signal(16), Signal(16), Signal(), Signal(NetBeat(self.width))
        m.d.comb += base.eq(Mux(self.received.payload.first, 0, first_base))
        low, high = Signal(range(lanes + 1)), Signal(range(lanes + 1))
        base_then = Signal(16)
        with m.If(take):
            m.d.sync += first_base.eq(base + lanes)
        m.d.sync += [
            valid_then.eq(take), beat_then.eq(self.received.payload), base_then.eq(base),
            checksum.valid.eq(valid_then), checksum.beat.data.eq(beat_then.data), checksum.beat.first.eq(beat_then.first),
            checksum.beat.last.eq(beat_then.last),
            low.eq(Mux(base_then >= start, 0, Mux(start - base_then > lanes, lanes, start - base_then))),
            high.eq(Mux(base_then >= end, 0, Mux(end - base_then > lanes, lanes, end - base_then))),
        ]  # fmt: skip
        m.d.comb += [
            checksum.beat.keep.eq(((Const(1, 1) << high) - 1) & ~((Const(1, 1) << low) - 1)),
            sums.i.valid.eq(checksum.done),
            sums.i.payload.eq(checksum.sum),
        ]
        return sums
