"""Bursts to the pieces that one Memory Request TLP each may carry."""

from functools import cache

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .layouts import burst_layout

LARGEST_CODE = 5  # Max_Payload_Size and Max_Read_Request_Size: 128 << code; 6 and 7 are reserved [PCIe5 7.5.3.4]


@cache
def Cut(host_ats=False):
    """Layout: a burst to cut and the code of the limit to cut it at: 128 << ``limit_code`` bytes."""
    return data.StructLayout({"burst": burst_layout(host_ats), "limit_code": 3})


@cache
def Piece(host_ats=False):
    """Layout: what one Memory Request TLP asks for; ``burst`` with ``address`` and ``length_bytes`` of this piece.

    ``length_dw``, ``first_be`` and ``last_be`` are the header's fields [PCIe5 2.2.5]: all dwords touched, enables contiguous,
    ``last_be`` 0 in a piece of one dword. ``first`` and ``last`` mark the ends of the burst.
    """
    return data.StructLayout({
        "burst": burst_layout(host_ats), "length_dw": 11, "first_be": 4, "last_be": 4, "first": 1, "last": 1,
    })  # fmt: skip


def header_fields(place, length_bytes):
    """Return ``length_dw``, ``first_be`` and ``last_be`` of a piece whose first byte is byte ``place`` of a dword."""
    end = (place + length_bytes - 1)[:2]  # lane of the last byte in its dword
    length_dw = (place + length_bytes + 3)[2:]
    single = ~length_bytes[3:].any() & (place + length_bytes[:3] <= 4)
    first_be, last_be = (Const(0xF, 4) << place)[:4], Const(0xF, 4) >> ~end
    return length_dw, Mux(single, first_be & last_be, first_be), Mux(single, 0, last_be)


class Wrapper(wiring.Component):
    """Makes each burst the one piece that it is.

    Latency: 1 cycle. Throughput: 1 piece per cycle.

    Members
    -------
    i : ``In(stream.Signature(burst_layout(host_ats)))``
        Bursts of 1 to 64 bytes inside one naturally aligned block of 64, which no limit cuts.
    o : ``Out(stream.Signature(Piece(host_ats)))``
        Pieces.
    """

    def __init__(self, *, host_ats=False):
        self.host_ats = host_ats
        super().__init__({"i": In(stream.Signature(burst_layout(host_ats))), "o": Out(stream.Signature(Piece(host_ats)))})

    def elaborate(self, platform):
        m = Module()
        length_bytes = self.i.p.length_bytes[:7]
        length_dw, first_be, last_be = header_fields(self.i.p.address[:2], length_bytes)
        m.d.comb += self.i.ready.eq(~self.o.valid | self.o.ready)
        with m.If(self.i.ready):
            m.d.sync += [
                self.o.valid.eq(self.i.valid),
                self.o.p.burst.eq(self.i.payload),
                self.o.p.burst.length_bytes.eq(length_bytes),
                self.o.p.length_dw.eq(length_dw),
                self.o.p.first_be.eq(first_be),
                self.o.p.last_be.eq(last_be),
                self.o.p.first.eq(1),
                self.o.p.last.eq(1),
            ]
        return m


class Cutter(wiring.Component):
    """Cuts each burst into pieces that one Memory Request TLP each may carry.

    A cut is made at every address that is a multiple of the limit and nowhere else, so no piece exceeds the limit or crosses
    4 KiB, no dword is touched by two pieces of a burst (R18), a naturally aligned access of 2, 4 or 8 bytes is one piece
    (R05), and every piece but the first starts at a multiple of the limit. Pieces of a burst leave in ascending address
    order and cover it exactly. The limit is 128 << min(``limit_code``, ``largest_code``) bytes; a reserved code counts
    as 0. [PCIe5 2.2.7]

    Latency: 1 cycle from ``i`` accepted to its first piece, 2 if it is cut or stands behind another. Throughput: 1 piece per cycle, also
    across bursts.

    Parameters
    ----------
    largest_code : :class:`int`
        Codes above it are taken as it: 0 to 5.
    host_ats : :class:`bool`
        Bursts are those of a card with host ATS.

    Members
    -------
    i : ``In(stream.Signature(Cut(host_ats)))``
        Bursts of 1 to 4096 bytes that cross no 4 KiB boundary.
    o : ``Out(stream.Signature(Piece(host_ats)))``
        Pieces.
    abandon : ``In(1)``
        In the cycle in which a piece is taken: no further pieces of its burst follow.

    Raises
    ------
    :exc:`ValueError`
        If ``largest_code`` is out of range.
    """

    def __init__(self, *, largest_code=LARGEST_CODE, host_ats=False):
        if largest_code not in range(LARGEST_CODE + 1):
            raise ValueError(f"Largest code must be between 0 and {LARGEST_CODE}, not {largest_code!r}")
        self.largest_code, self.host_ats = largest_code, host_ats
        super().__init__({"i": In(stream.Signature(Cut(host_ats))), "o": Out(stream.Signature(Piece(host_ats))), "abandon": In(1)})

    def elaborate(self, platform):
        m = Module()
        held = Signal(burst_layout(self.host_ats))  # the one at work; its address stays that of the burst
        limit, room = Signal(13), Signal(13)  # room: bytes up to the next multiple of the limit
        offset, left, begun = Signal(12), Signal(13), Signal()

        code = Signal(3)
        m.d.comb += code.eq(self.i.p.limit_code)
        with m.If(self.i.p.limit_code > LARGEST_CODE):
            m.d.comb += code.eq(0)
        with m.Elif(self.i.p.limit_code > self.largest_code):
            m.d.comb += code.eq(self.largest_code)

        # A burst that is one piece passes by the register when that is empty.
        idle, whole = Signal(), Signal()
        new = self.i.p.burst
        new_end = Signal(12)  # its last byte
        m.d.comb += [
            idle.eq(left == 0),
            new_end.eq(new.address[:12] + new.length_bytes - 1),
            whole.eq(((new.address[:12] ^ new_end)[7:] >> code) == 0),
        ]

        burst, place, step = Signal(burst_layout(self.host_ats)), Signal(12), Signal(13)
        final = Signal()
        m.d.comb += final.eq(idle | (left <= room))
        with m.If(idle):
            m.d.comb += [burst.eq(new), place.eq(new.address[:12]), step.eq(new.length_bytes)]
        with m.Else():
            m.d.comb += [burst.eq(held), place.eq(offset), step.eq(Mux(final, left, room))]
        length_dw, first_be, last_be = header_fields(place[:2], step)

        taken, load, dropped = Signal(), Signal(), Signal()
        m.d.comb += [
            taken.eq(self.o.valid & self.o.ready),
            dropped.eq(taken & self.abandon & ~self.o.p.last),
            load.eq((~idle | (self.i.valid & whole)) & ~dropped & (~self.o.valid | self.o.ready)),
            self.i.ready.eq(idle | (load & final) | dropped),
        ]
        with m.If(taken):
            m.d.sync += self.o.valid.eq(0)
        with m.If(load):
            m.d.sync += [
                self.o.valid.eq(1),
                self.o.p.burst.eq(burst),
                self.o.p.burst.address.eq(Cat(place, burst.address[12:])),
                self.o.p.burst.length_bytes.eq(step),
                self.o.p.length_dw.eq(length_dw),
                self.o.p.first_be.eq(first_be),
                self.o.p.last_be.eq(last_be),
                self.o.p.first.eq(~begun),
                self.o.p.last.eq(final),
                offset.eq(offset + step),
                left.eq(left - step),
                room.eq(limit),
                begun.eq(1),
            ]
        with m.If(self.i.ready):
            m.d.sync += [
                held.eq(new),
                offset.eq(new.address[:12]),
                left.eq(Mux(self.i.valid & ~(idle & load), new.length_bytes, 0)),
                limit.eq(128 << code),
                room.eq((~new.address[:12] & ((128 << code) - 1)[:12]) + 1),
                begun.eq(0),
            ]
        return m
