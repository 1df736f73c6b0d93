"""Frames of the tunnel: bytes to frames and back; see "Tunnel" in rtl/phy/README.md."""

from enum import IntEnum

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.crc.catalog import CRC32_ISO_HDLC
from amaranth.lib.wiring import In, Out

FLAG, ESCAPE, TOGGLE = 0x7E, 0x7D, 0x20  # a byte in a frame that is FLAG or ESCAPE is sent as ESCAPE and itself ^ TOGGLE
VERSION = 1


class Kind(IntEnum):
    """Of a frame."""

    RESET = 1
    HELLO = 2
    DATA = 3
    ACK = 4
    NAK = 5
    PING = 6


class FrameHeader(data.Struct):
    """First dword of a frame, byte 0 lowest.

    ``seq`` numbers DATA frames and is 0 in others; ``ack`` is the number of the next DATA frame that its sender waits for; the TLPs of
    those before ``freed`` have left its buffer.
    """

    kind: 8
    seq: 8
    ack: 8
    freed: 8


TlpDword = data.StructLayout({"data": 32, "last": 1})  # of a TLP, in the order and form of the raw link
LineByte = data.StructLayout({"byte": 8, "is_flag": 1})  # in front of :class:`Stuffer`


class Deframer(wiring.Component):
    """Finds frames in bytes.

    What stands between two flags is a frame when it is whole dwords, at least two, the last of which is the CRC of the others. What is
    empty is nothing; all else, and what ends in an escape, is damaged. The dwords of a DATA frame leave at ``o`` as they come: with
    ``is_frame`` they count, with ``is_damaged`` they do not.

    Latency: 3 cycles from the flag to ``is_frame``, 2 to the last dword. Throughput: 1 byte per cycle.

    Members
    -------
    i : ``In(stream.Signature(8, always_ready=True))``
        Bytes from the line.
    o : ``Out(stream.Signature(TlpDword))``
        Dwords of DATA frames; one that is not taken in the cycle in which it is offered damages its frame.
    is_frame, is_damaged : ``Out(1)``
        Pulses, one for each.
    header : ``Out(FrameHeader)``
        With ``is_frame``.
    length : ``Out(2)``
        With ``is_frame``: dwords between header and CRC; 2 for two or more.
    body : ``Out(32)``
        With ``is_frame``: the last of them.
    """

    i: In(stream.Signature(8, always_ready=True))
    o: Out(stream.Signature(TlpDword))
    is_frame: Out(1)
    is_damaged: Out(1)
    header: Out(FrameHeader)
    length: Out(2)
    body: Out(32)

    def elaborate(self, platform):
        m = Module()
        m.submodules.crc = crc = CRC32_ISO_HDLC(data_width=8).create()

        # Without escapes.
        byte, takes, ends, escaped, cut = Signal(8), Signal(), Signal(), Signal(), Signal()
        is_flag, is_escape = Signal(), Signal()
        m.d.comb += [is_flag.eq(self.i.payload == FLAG), is_escape.eq(self.i.payload == ESCAPE)]
        m.d.sync += [takes.eq(self.i.valid & ~is_flag & ~is_escape), ends.eq(self.i.valid & is_flag)]
        with m.If(self.i.valid):
            m.d.sync += [byte.eq(self.i.payload ^ Mux(escaped, TOGGLE, 0)), escaped.eq(is_escape), cut.eq(escaped)]

        # Dwords: the header, then the last two, which may be the end of the body and the CRC; those in front of them are neither.
        held, word, place, count = Signal(24), Signal(32), Signal(2), Signal(range(5))
        older, newer = Signal(32), Signal(32)
        is_whole, is_over, is_good, overflows = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            word.eq(Cat(held, byte)), is_whole.eq(takes & (place == 3)), crc.data.eq(byte), crc.valid.eq(takes), crc.start.eq(ends),
            self.o.valid.eq((is_whole | ends) & (count >= 3) & (self.header.kind == Kind.DATA)),
            self.o.payload.data.eq(older), self.o.payload.last.eq(ends), self.body.eq(older),
            self.is_frame.eq(is_over & is_good & ~overflows), self.is_damaged.eq(is_over & ~(is_good & ~overflows)),
        ]  # fmt: skip
        with m.If(takes):
            m.d.sync += [place.eq(place + 1), held.eq(word[8:])]
        with m.If(is_whole):
            m.d.sync += [count.eq(Mux(count == 4, 4, count + 1)), newer.eq(word), older.eq(newer)]
            with m.If(count == 0):
                m.d.sync += self.header.eq(word)
        with m.If(ends):
            m.d.sync += [
                place.eq(0), count.eq(0), is_over.eq((place != 0) | (count != 0) | cut), self.length.eq(Mux(count < 2, 0, count - 2)),
                is_good.eq(crc.match_detected & (place == 0) & (count >= 2) & ~cut),
            ]  # fmt: skip
        with m.Else():
            m.d.sync += is_over.eq(0)
        with m.If(self.o.valid & ~self.o.ready):
            m.d.sync += overflows.eq(1)
        with m.Elif(is_over):
            m.d.sync += overflows.eq(0)
        return m


class Stuffer(wiring.Component):
    """Puts escapes in front of bytes of frames.

    Latency: 1 cycle. Throughput: 1 byte of the line per cycle.

    Members
    -------
    i : ``In(stream.Signature(LineByte))``
        Flags and bytes of frames.
    o : ``Out(stream.Signature(8))``
        Bytes to the line.
    """

    i: In(stream.Signature(LineByte))
    o: Out(stream.Signature(8))

    def elaborate(self, platform):
        m = Module()
        byte, is_special = self.i.payload.byte, Signal()
        rest, has_rest = Signal(8), Signal()  # what follows an escape
        m.d.comb += [
            is_special.eq(~self.i.payload.is_flag & ((byte == FLAG) | (byte == ESCAPE))),
            self.i.ready.eq((~self.o.valid | self.o.ready) & ~has_rest),
        ]
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [self.o.valid.eq(has_rest | self.i.valid), has_rest.eq(~has_rest & self.i.valid & is_special)]
            m.d.sync += [self.o.payload.eq(Mux(has_rest, rest, Mux(is_special, ESCAPE, byte))), rest.eq(byte ^ TOGGLE)]
        return m


class Framer(wiring.Component):
    """Makes frames: the one that is wanted most, HELLO, NAK, DATA, ACK in this order, again and again.

    Latency: 2 cycles to the first flag. Throughput: a byte per cycle, but for 3 cycles in each frame.

    Members
    -------
    tlps : ``In(stream.Signature(TlpDword))``
        TLPs for DATA frames; the dwords of one come without gaps.
    seq : ``In(8)``
        Number of the frame of the TLP at ``tlps``.
    ack, freed : ``In(8)``
        For headers.
    hello : ``In(96)``
        Body of HELLO.
    wants_hello, wants_nak, wants_ack : ``In(1)``
        Such a frame is wanted.
    begins : ``Out(1)``
        Pulse: a frame begins, and its header is taken as it is now.
    kind : ``Out(8)``
        With ``begins``.
    o : ``Out(stream.Signature(LineByte))``
        To :class:`Stuffer`.
    """

    tlps: In(stream.Signature(TlpDword))
    seq: In(8)
    ack: In(8)
    freed: In(8)
    hello: In(96)
    wants_hello: In(1)
    wants_nak: In(1)
    wants_ack: In(1)
    begins: Out(1)
    kind: Out(8)
    o: Out(stream.Signature(LineByte))

    def elaborate(self, platform):
        m = Module()
        m.submodules.crc = crc = CRC32_ISO_HDLC(data_width=8).create()
        word, place, at = Signal(32), Signal(2), Signal(2)  # at: dword of HELLO that follows, 3 for none
        is_data, is_last, sent, ends_word = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            sent.eq(self.o.valid & self.o.ready), ends_word.eq(sent & (place == 3)),
            crc.data.eq(word[:8]), self.kind.eq(Kind.ACK), self.o.payload.byte.eq(word[:8]),
        ]  # fmt: skip
        with m.If(self.wants_hello):
            m.d.comb += self.kind.eq(Kind.HELLO)
        with m.Elif(self.wants_nak):
            m.d.comb += self.kind.eq(Kind.NAK)
        with m.Elif(self.tlps.valid):
            m.d.comb += self.kind.eq(Kind.DATA)

        def flag(following):
            m.d.comb += [self.o.valid.eq(1), self.o.payload.byte.eq(FLAG), self.o.payload.is_flag.eq(1)]
            with m.If(self.o.ready):
                m.next = following

        def shift():
            with m.If(sent):
                m.d.sync += [word.eq(word >> 8), place.eq(place + 1)]

        with m.FSM():
            with m.State("IDLE"):
                is_header_data = self.kind == Kind.DATA
                m.d.comb += [self.begins.eq(self.wants_hello | self.wants_nak | self.tlps.valid | self.wants_ack), crc.start.eq(1)]
                m.d.sync += [
                    word.eq(Cat(self.kind, Mux(is_header_data, self.seq, 0), self.ack, self.freed)), is_data.eq(is_header_data),
                    is_last.eq(~is_header_data), at.eq(Mux(self.kind == Kind.HELLO, 0, 3)),
                ]  # fmt: skip
                with m.If(self.begins):
                    m.next = "OPEN"
            with m.State("OPEN"):
                flag("WORDS")
            with m.State("WORDS"):
                m.d.comb += [self.o.valid.eq(1), crc.valid.eq(sent)]
                shift()
                with m.If(ends_word):
                    with m.If(is_data & ~is_last):
                        m.d.comb += self.tlps.ready.eq(1)
                        m.d.sync += [word.eq(self.tlps.payload.data), is_last.eq(self.tlps.payload.last)]
                    with m.Elif(at != 3):
                        m.d.sync += [word.eq(self.hello.word_select(at, 32)), at.eq(at + 1)]
                    with m.Else():
                        m.next = "SUM"
            with m.State("SUM"):
                m.d.sync += word.eq(crc.crc)
                m.next = "CRC"
            with m.State("CRC"):
                m.d.comb += self.o.valid.eq(1)
                shift()
                with m.If(ends_word):
                    m.next = "CLOSE"
            with m.State("CLOSE"):
                flag("IDLE")
        return m
