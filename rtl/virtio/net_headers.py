"""What the first bytes of an Ethernet frame say."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .net_layouts import NetBeat

FRONT_BYTES = 64
TYPE_IPV4, TYPE_IPV6, TYPE_VLAN = 0x0800, 0x86DD, 0x8100
TCP, UDP = 6, 17


class FrontCapture(wiring.Component):
    """Keeps the first 64 bytes of a frame, and its length.

    Latency: 1 cycle. Throughput: one beat per cycle; the values stay until the next frame's first beat.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.

    Members
    -------
    valid, beat : ``In(1)``, ``In(NetBeat(width))``
        There is a beat.
    front : ``Out(512)``
        The first bytes, byte 0 in bits 7:0; those that did not come are anything.
    length_bytes : ``Out(16)``
        Bytes so far; FFFFh stands for more, too.
    ended : ``Out(1)``
        Pulse: the frame is over.
    error : ``Out(1)``
        With ``ended``: it is damaged.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "valid": In(1), "beat": In(NetBeat(width)), "front": Out(8 * FRONT_BYTES), "length_bytes": Out(16), "ended": Out(1),
            "error": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        at, beat = Signal(range(FRONT_BYTES // lanes + 1)), self.beat  # the beat that comes next, as far as it matters
        here, total = Signal.like(at), Signal(17)
        m.d.comb += [
            here.eq(Mux(beat.first, 0, at)),
            total.eq(Mux(beat.first, 0, self.length_bytes) + beat.byte_count),
        ]
        m.d.sync += [self.ended.eq(self.valid & beat.last), self.error.eq(beat.error)]
        with m.If(self.valid):
            m.d.sync += [
                at.eq(Mux(here == FRONT_BYTES // lanes, here, here + 1)),
                self.length_bytes.eq(Mux(total[16], 0xFFFF, total)),
            ]
            for n in range(FRONT_BYTES):
                byte = self.front.word_select(n, 8)
                with m.If(here == n // lanes):
                    m.d.sync += byte.eq(beat.data.word_select(n % lanes, 8))
        return m


class Fields:
    """The fields of a frame whose first bytes are ``front``, as expressions. IP without VLAN tag, IPv4 without options."""

    def __init__(self, front):
        def byte(n, count=1):
            """The number of ``count`` bytes at ``n``, the first one uppermost."""
            return sum(front.word_select(n + k, 8) << 8 * (count - 1 - k) for k in range(count))[: 8 * count]

        kind = byte(12, 2)
        self.target = front[:48]
        self.is_tagged = kind == TYPE_VLAN
        self.is_ipv4 = (kind == TYPE_IPV4) & (byte(14) == 0x45)
        self.is_ipv6 = (kind == TYPE_IPV6) & (byte(14)[4:] == 6)
        self.protocol = Mux(self.is_ipv6, byte(20), byte(23))
        is_whole = self.is_ipv6 | (byte(20, 2)[:14] == 0)  # no fragment: neither "more" nor an offset
        self.is_tcp = (self.is_ipv4 | self.is_ipv6) & is_whole & (self.protocol == TCP)
        self.is_udp = (self.is_ipv4 | self.is_ipv6) & is_whole & (self.protocol == UDP)
        self.payload_bytes = Mux(self.is_ipv6, byte(18, 2), byte(16, 2) - 20)[:16]  # behind the IP header
        self.payload_start = Mux(self.is_ipv6, 54, 34)
        self.summed_from = Mux(self.is_ipv6, 22, 26)  # the addresses, which a transport's checksum covers
        self.udp_bytes = Mux(self.is_ipv6, byte(58, 2), byte(38, 2))
        self.udp_checksum = Mux(self.is_ipv6, byte(60, 2), byte(40, 2))
        words = Mux(self.is_ipv6, sum_of_words(front, 22, 54), Mux(self.is_ipv4, sum_of_words(front, 26, 34), 0))
        ports = Mux(self.is_ipv6, front[8 * 54 : 8 * 58], front[8 * 34 : 8 * 38])
        self._mixed = words ^ Mux(self.is_tcp | self.is_udp, ports[:16] ^ ports[16:], 0)

    @property
    def flow(self):
        """8 bits that are the same for all frames of a flow, in both directions.

        Of IPv4 and IPv6 the exclusive or of the bytes of both addresses and, of unfragmented TCP and UDP, of both ports; of others 0. Its
        lowest bit is uppermost, so that neighbours lie far apart.
        """
        return (self._mixed[:8] ^ self._mixed[8:16])[::-1]


def sum_of_words(front, start, end):
    """The exclusive or of the 16-bit words of bytes ``start`` to ``end``."""
    words = [front[8 * n : 8 * n + 16] for n in range(start, end, 2)]
    while len(words) > 1:
        words = [a ^ b for a, b in zip(words[::2], words[1::2], strict=True)]
    return words[0]
