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
    ``last_be`` 0 in a piece of one dword. ``behind_dw`` is one less than ``length_dw``: whoever compares it needs no sum. ``first`` and
    ``last`` mark the ends of the burst.
    """
    return data.StructLayout({
        "burst": burst_layout(host_ats), "length_dw": 11, "behind_dw": 10, "first_be": 4, "last_be": 4, "first": 1, "last": 1,
    })  # fmt: skip


def header_fields(place, length_bytes):
    """Return ``length_dw``, ``behind_dw``, ``first_be`` and ``last_be`` of a piece whose first byte is byte ``place`` of a dword."""
    end = (place + length_bytes - 1)[:2]  # lane of the last byte in its dword
    length_dw, behind_dw = (place + length_bytes + 3)[2:], (place + length_bytes - 1)[2:12]
    single = ~length_bytes[3:].any() & (place + length_bytes[:3] <= 4)
    first_be, last_be = (Const(0xF, 4) << place)[:4], Const(0xF, 4) >> ~end
    return length_dw, behind_dw, Mux(single, first_be & last_be, first_be), Mux(single, 0, last_be)


class Wrapper(wiring.Component):
    """Makes each burst the one piece that it is.

    Latency: 1 cycle. Throughput: 1 piece per cycle. No path leads from ``o.ready`` to ``i.ready``.

    Members
    -------
    i : ``In(stream.Signature(burst_layout(host_ats)))``
        Bursts of 1 to 64 bytes inside one naturally aligned block of 64, which no limit cuts.
    o : ``Out(stream.Signature(Piece(host_ats)))``
        Pieces.
    coming : ``Out(burst_layout(host_ats))``
        As in :class:`Cutter`.
    """

    def __init__(self, *, host_ats=False):
        self.host_ats = host_ats
        super().__init__({
            "i": In(stream.Signature(burst_layout(host_ats))),
            "o": Out(stream.Signature(Piece(host_ats))),
            "coming": Out(burst_layout(host_ats)),
        })

    def elaborate(self, platform):
        m = Module()
        burst, held, full = self.coming, Signal(burst_layout(self.host_ats)), Signal()  # what came while ``o`` was stalled
        length_bytes = burst.length_bytes[:7]
        length_dw, behind_dw, first_be, last_be = header_fields(burst.address[:2], length_bytes)
        m.d.comb += [self.i.ready.eq(~full), burst.eq(Mux(full, held, self.i.payload))]
        with m.If(~full):
            m.d.sync += [held.eq(self.i.payload), full.eq(self.i.valid)]
        with m.If(~self.o.valid | self.o.ready):
            m.d.sync += [
                full.eq(0),
                self.o.valid.eq(full | self.i.valid),
                self.o.p.burst.eq(burst),
                self.o.p.burst.length_bytes.eq(length_bytes),
                self.o.p.length_dw.eq(length_dw),
                self.o.p.behind_dw.eq(behind_dw),
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

    Latency: 1 cycle from ``i`` accepted to its first piece, if ``o`` is free. Throughput: 1 piece per cycle, also across bursts. No path
    leads from ``o.ready`` to ``i.ready``.

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
    coming : ``Out(burst_layout(host_ats))``
        The burst of the next piece, if one comes when ``o`` is free; its address and length mean nothing.
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
        super().__init__({
            "i": In(stream.Signature(Cut(host_ats))), "o": Out(stream.Signature(Piece(host_ats))), "coming": Out(burst_layout(host_ats)),
            "abandon": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        held = Signal(burst_layout(self.host_ats))  # the one at work; its address stays that of the burst
        offset, left, begun = Signal(12), Signal(13), Signal()
        gap, limit = Signal(12), Signal(12)  # bytes between the first one and the next border; at most

        code = Signal(3)
        m.d.comb += code.eq(self.i.p.limit_code)
        with m.If(self.i.p.limit_code > LARGEST_CODE):
            m.d.comb += code.eq(0)
        with m.Elif(self.i.p.limit_code > self.largest_code):
            m.d.comb += code.eq(self.largest_code)

        # The first piece of a burst passes by the register when that is empty.
        idle, is_free = Signal(), Signal()
        new, between, mask = self.i.p.burst, Signal(12), Signal(12)
        m.d.comb += [
            idle.eq(left == 0),
            is_free.eq(~self.o.valid | self.o.ready),
            mask.eq((128 << code) - 1),
            between.eq(~new.address[:12] & mask),
        ]
        first, further = _FirstPiece(m, new.address[:12], new.length_bytes, between), _FirstPiece(m, offset, left, gap)
        burst = Signal(burst_layout(self.host_ats))
        m.d.comb += burst.eq(Mux(idle, new, held))

        taken, load, dropped = Signal(), Signal(), Signal()
        m.d.comb += [
            taken.eq(self.o.valid & self.o.ready),
            dropped.eq(taken & self.abandon & ~self.o.p.last),
            load.eq((~idle | self.i.valid) & ~dropped & is_free),
            self.i.ready.eq(idle),
            self.coming.eq(burst),
        ]
        with m.If(taken):
            m.d.sync += self.o.valid.eq(0)
        with m.If(load):
            m.d.sync += self.o.valid.eq(1)
        with m.If(is_free):  # whether it is a piece only ``valid`` says
            m.d.sync += [
                self.o.p.burst.eq(burst),
                self.o.p.burst.address.eq(Cat(Mux(idle, new.address[:12], offset), burst.address[12:])),
                self.o.p.burst.length_bytes.eq(Mux(idle, first.length_bytes, further.length_bytes)),
                self.o.p.length_dw.eq(Mux(idle, first.length_dw, further.length_dw)),
                self.o.p.behind_dw.eq(Mux(idle, first.behind_dw, further.behind_dw)),
                self.o.p.first_be.eq(Mux(idle, first.first_be, further.first_be)),
                self.o.p.last_be.eq(Mux(idle, first.last_be, further.last_be)),
                self.o.p.first.eq(idle | ~begun),
                self.o.p.last.eq(Mux(idle, first.is_all, further.is_all)),
            ]
        with m.If(idle):
            m.d.sync += [held.eq(new), limit.eq(mask), begun.eq(is_free), left.eq(0)]
            with m.If(is_free):
                m.d.sync += [offset.eq(first.end), gap.eq(mask)]
            with m.Else():
                m.d.sync += [offset.eq(new.address[:12]), gap.eq(between)]
            with m.If(self.i.valid & ~(is_free & first.is_all)):
                m.d.sync += left.eq(Mux(is_free, first.rest, new.length_bytes))
        with m.Elif(load):
            m.d.sync += [offset.eq(further.end), left.eq(Mux(further.is_all, 0, further.rest)), gap.eq(limit), begun.eq(1)]
        with m.Elif(dropped):
            m.d.sync += left.eq(0)
        return m


class _FirstPiece:
    """The first piece of ``length_bytes`` from ``place`` on, with ``gap`` bytes between its first one and the next border: signals.

    No sum follows another one, and none follows ``is_all``.

    Attributes
    ----------
    is_all, rest, end
        Nothing is behind it; else how many bytes, and where they begin.
    length_bytes, length_dw, behind_dw, first_be, last_be
        As in :func:`Piece`.
    """

    def __init__(self, m, place, length_bytes, gap):
        self.is_all, self.rest, self.end = Signal(), Signal(13), Signal(12)
        self.length_bytes, self.length_dw, self.behind_dw = Signal(13), Signal(11), Signal(10)
        self.first_be, self.last_be = Signal(4), Signal(4)
        dwords = gap[2:]  # behind the first one, if it ends at the border
        to_border = dwords + 1, dwords, (Const(0xF, 4) << place[:2])[:4], Mux(dwords == 0, 0, Const(0xF, 4))
        m.d.comb += [
            self.rest.eq(length_bytes + ~Cat(gap, 0)),
            self.is_all.eq(self.rest[-1] | ~self.rest.any()),
            self.end.eq(place + gap + 1),
            self.length_bytes.eq(Mux(self.is_all, length_bytes, gap + 1)),
        ]
        fields = self.length_dw, self.behind_dw, self.first_be, self.last_be
        m.d.comb += [field.eq(Mux(self.is_all, *both)) for field, *both in zip(fields, header_fields(place[:2], length_bytes), to_border)]
