"""Write bursts to Memory Write TLPs."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..stream.queue import Queue
from .cutter import Cutter
from .layouts import DIVERTED, BurstData, BurstStatus, ConfigState, Pasid, TlpBeat, burst_layout

WAITING_BURSTS = 8  # of each class
HEADERS = 16  # TLPs whose data is complete and that wait to be sent


class WriteOver(data.Struct):
    """A write burst is over: its last beat was accepted into the transmit order, or it was dropped."""

    client: 6
    function: 3
    epoch: 1
    is_wall: 1
    cookie: 12
    status: BurstStatus


class WritePath(wiring.Component):
    """Turns write bursts into Memory Write TLPs of at most the function's Max_Payload_Size.

    Bursts of a class leave in their order; the wall's go first. A TLP is offered when all its data is there, so it has no gaps. A burst
    that the gate refused, or whose function is not ``live`` when one of its TLPs would start, is dropped from there on: its data is
    taken all the same, and it is over with FAULT (or what the gate said), or RESET. With ``diverts`` one of an aligned dword with verdict
    DIVERTED gives its dword where its TLP would have been sent.

    Latency: 5 cycles from the last beat of data to the first beat of the TLP. Throughput: 1 beat per cycle without gaps between TLPs and
    bursts; a burst that does not start in lane 0 (in dwords) costs one cycle more.

    Parameters
    ----------
    width : :class:`int`
        Bits of data per beat.
    clients, functions : :class:`int`
        Their numbers.
    max_payload_code : :class:`int`
        Largest Max_Payload_Size that is used: 128 << code bytes.
    diverts : :class:`bool`
        The gate may say DIVERTED.
    host_ats : :class:`bool`
        Bursts are :data:`.layouts.AddressedBurst`.
    has_pasid : :class:`bool`
        And their requests may have a PASID.

    Members
    -------
    wall, gate : ``In(stream.Signature(burst_layout(host_ats)))``
        Write bursts of both classes.
    data : ``In(stream.Signature(BurstData(width))).array(clients)``
        Their data.
    config : ``In(ConfigState).array(functions)``
        Of each function.
    live : ``In(functions)``
        1: the function may send requests.
    ats : ``In(functions)``
        With ``host_ats``; 1: the function may send requests that are not untranslated.
    pasid : ``In(functions)``
        With ``has_pasid``; 1: the function may send requests with a PASID.
    posted : ``Out(stream.Signature(TlpBeat(width, has_pasid)))``
        TLPs.
    over : ``Out(stream.Signature(WriteOver, always_ready=True))``
        Ends of bursts, in the order of sending; those that gave their dword are over with DIVERTED.
    diverted, diverted_lost : ``Out(stream.Signature(32))``, ``Out(1)``
        With ``diverts``: dwords, byte 0 in bits 7:0, each to be taken in front of the next; a pulse: one does not come (RESET).
    """

    def __init__(self, *, width, clients, functions, max_payload_code, diverts=False, host_ats=False,
                 has_pasid=False):  # fmt: skip
        self.width, self.clients, self.functions, self.max_payload_code = width, clients, functions, max_payload_code
        self.diverts, self.host_ats, self.has_pasid = diverts, host_ats, has_pasid
        super().__init__({
            "wall": In(stream.Signature(burst_layout(host_ats))),
            "gate": In(stream.Signature(burst_layout(host_ats))),
            "data": In(stream.Signature(BurstData(width))).array(clients),
            "config": In(ConfigState).array(functions),
            "live": In(functions),
            **({"ats": In(functions)} if host_ats else {}),
            **({"pasid": In(functions)} if has_pasid else {}),
            "posted": Out(stream.Signature(TlpBeat(width, has_pasid))),
            "over": Out(stream.Signature(WriteOver, always_ready=True)),
            **({"diverted": Out(stream.Signature(32)), "diverted_lost": Out(1)} if diverts else {}),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 32
        lanes_log2 = lanes.bit_length() - 1
        bursts = burst_layout(self.host_ats)

        # The next burst: the wall's first.
        m.submodules.wall_bursts = wall = Queue(bursts, WAITING_BURSTS)
        m.submodules.gate_bursts = gate = Queue(bursts, WAITING_BURSTS)
        wiring.connect(m, wiring.flipped(self.wall), wall.i)
        wiring.connect(m, wiring.flipped(self.gate), gate.i)
        m.submodules.cutter = cutter = Cutter(largest_code=self.max_payload_code, host_ats=self.host_ats)
        codes = Array(config.mps_code for config in self.config)
        burst = Signal(bursts)
        m.d.comb += [
            burst.eq(Mux(wall.o.valid, wall.o.payload, gate.o.payload)),
            burst.is_wall.eq(wall.o.valid),
            cutter.i.valid.eq(wall.o.valid | gate.o.valid),
            cutter.i.p.burst.eq(burst),
            cutter.i.p.limit_code.eq(codes[burst.function]),
            wall.o.ready.eq(cutter.i.ready),
            gate.o.ready.eq(cutter.i.ready & ~wall.o.valid),
        ]

        # Pull: one slot per row of data, and one more for what is left over of the last row of a turned piece.
        piece = cutter.o.p
        shift = piece.burst.address[2 : 2 + lanes_log2]  # lane of the first dword
        rows = (shift + piece.length_dw + lanes - 1) >> lanes_log2
        beats = (piece.length_dw + lanes - 1) >> lanes_log2
        slots = beats + (shift != 0)
        slot = Signal(range(4096 * 8 // self.width + 2))
        # What the next slot is, so that no sum of this piece decides whether the next one comes.
        is_later, later_is_row, later_is_last = Signal(), Signal(), Signal()
        is_row, last_slot, valid, go = Signal(), Signal(), Signal(), Signal()
        chosen = Signal(self.width)
        has_data = Signal()
        m.d.comb += [
            is_row.eq(~is_later | later_is_row),
            last_slot.eq(Mux(is_later, later_is_last, (shift == 0) & (piece.length_dw <= lanes))),
            has_data.eq(Cat(client.valid for client in self.data).bit_select(piece.burst.client, 1)),
            chosen.eq(Mux(is_row, Array(client.p.data for client in self.data)[piece.burst.client], 0)),
            valid.eq(cutter.o.valid & (has_data | ~is_row)),
            cutter.o.ready.eq(valid & go & last_slot),
        ]
        for n, client in enumerate(self.data):
            m.d.comb += client.ready.eq(cutter.o.valid & is_row & go & (piece.burst.client == n))
        with m.If(valid & go):
            m.d.sync += [
                slot.eq(Mux(last_slot, 0, slot + 1)), is_later.eq(~last_slot), later_is_row.eq(slot + 1 < rows),
                later_is_last.eq(slot + 2 == slots),
            ]

        header_layout = data.StructLayout({
            "over": WriteOver, "address": 64, "length_dw": 11, "first_be": 4, "last_be": 4, "relaxed_ordering": 1, "no_snoop": 1,
            "last": 1, **({"at": 2} if self.host_ats else {}), **({"pasid": Pasid} if self.has_pasid else {}),
        })  # fmt: skip
        pulled = Signal(data.StructLayout({
            "valid": 1, "data": self.width, "shift": lanes_log2, "emit": 1, "last": 1, "header": header_layout,
        }))  # fmt: skip
        with m.If(go):
            m.d.sync += [
                pulled.valid.eq(valid),
                pulled.data.eq(chosen),
                pulled.shift.eq(shift),
                pulled.emit.eq(is_later | (shift == 0)),
                pulled.last.eq(last_slot),
                pulled.header.address.eq(piece.burst.address),
                pulled.header.length_dw.eq(piece.length_dw),
                pulled.header.first_be.eq(piece.first_be),
                pulled.header.last_be.eq(piece.last_be),
                pulled.header.relaxed_ordering.eq(piece.burst.relaxed_ordering),
                pulled.header.no_snoop.eq(piece.burst.no_snoop),
                pulled.header.last.eq(piece.last),
                pulled.header.over.client.eq(piece.burst.client),
                pulled.header.over.function.eq(piece.burst.function),
                pulled.header.over.epoch.eq(piece.burst.epoch),
                pulled.header.over.is_wall.eq(piece.burst.is_wall),
                pulled.header.over.cookie.eq(piece.burst.cookie),
                pulled.header.over.status.eq(piece.burst.verdict),
                *([pulled.header.at.eq(piece.burst.at)] if self.host_ats else []),
                *([pulled.header.pasid.eq(Cat(piece.burst.pasid_valid, piece.burst.pasid))] if self.has_pasid else []),
            ]

        # Turn the first dword to lane 0, and join each row with the next.
        turned = Signal(data.StructLayout({
            "valid": 1, "data": self.width, "shift": lanes_log2, "emit": 1, "last": 1, "header": header_layout,
        }))  # fmt: skip
        before = Signal(self.width)  # the row in front of it
        twice = Cat(pulled.data, pulled.data)
        rotated = Signal(self.width)
        with m.Switch(pulled.shift):
            for n in range(lanes):
                with m.Case(n):
                    m.d.comb += rotated.eq(twice[32 * n : 32 * n + self.width])
        with m.If(go):
            m.d.sync += [turned.eq(pulled), turned.data.eq(rotated)]
            with m.If(turned.valid):
                m.d.sync += before.eq(turned.data)
        joined = Signal(self.width)
        for n in range(lanes):
            own = turned.shift + n >= lanes  # the dword comes from the later row
            lane = slice(32 * n, 32 * n + 32)
            m.d.comb += joined[lane].eq(Mux((turned.shift == 0) | own, turned.data[lane], before[lane]))

        # Complete TLPs wait here: data first, the header with its last beat.
        payload_beats = (128 << self.max_payload_code) * 8 // self.width
        m.submodules.payloads = payloads = Queue(self.width, max(8, 2 * payload_beats))
        m.submodules.headers = headers = Queue(header_layout, HEADERS)
        m.d.comb += [
            go.eq(~turned.valid | (payloads.i.ready & headers.i.ready)),
            payloads.i.valid.eq(turned.valid & turned.emit & headers.i.ready),
            payloads.i.payload.eq(joined),
            headers.i.valid.eq(turned.valid & turned.last & payloads.i.ready),
            headers.i.payload.eq(turned.header),
        ]

        # Send, or drop.
        buses = Array(Cat(Const(0, 3), config.device, config.bus) for config in self.config)
        may_relax = Array(config.relaxed_ordering for config in self.config)
        may_not_snoop = Array(config.no_snoop for config in self.config)
        h = headers.o.p
        sending, dropping = Signal(), Signal()  # a TLP is past its first beat; the burst at work is dropped
        beats_left = Signal(range(payload_beats + 1))
        first_beats = (h.length_dw + lanes - 1) >> lanes_log2
        drop, final_beat, load, offered = Signal(), Signal(), Signal(), Signal()
        status = Signal(BurstStatus)  # of the burst so far
        o = self.posted
        ending, end = Signal(), Signal(WriteOver)
        fate = Signal(BurstStatus)
        with m.If(dropping):
            m.d.comb += fate.eq(status)
        is_refused, is_diverted = h.over.status != BurstStatus.OK, h.over.status == DIVERTED
        with m.Elif(is_refused & ~is_diverted if self.diverts else is_refused):
            m.d.comb += fate.eq(h.over.status)
        with m.Elif(~sending & ~self.live.bit_select(h.over.function, 1)):
            m.d.comb += fate.eq(BurstStatus.RESET)
        if self.host_ats:
            with m.Elif(~sending & h.at.any() & ~self.ats.bit_select(h.over.function, 1)):
                m.d.comb += fate.eq(BurstStatus.RESET)
        if self.has_pasid:
            with m.Elif(~sending & h.pasid.valid & ~self.pasid.bit_select(h.over.function, 1)):
                m.d.comb += fate.eq(BurstStatus.RESET)
        if self.diverts:
            with m.Elif(is_diverted):
                m.d.comb += fate.eq(DIVERTED)
            m.d.comb += self.diverted_lost.eq(load & is_diverted & (fate != DIVERTED))
            with m.If(self.diverted.ready):
                m.d.sync += self.diverted.valid.eq(0)
            with m.If(load & (fate == DIVERTED)):
                m.d.sync += [self.diverted.valid.eq(1), self.diverted.payload.eq(payloads.o.payload)]
        m.d.comb += [
            drop.eq(fate != BurstStatus.OK),
            final_beat.eq(Mux(sending, beats_left == 1, first_beats == 1)),
            load.eq(headers.o.valid & payloads.o.valid & (~o.valid | o.ready)),
            payloads.o.ready.eq(load),
            headers.o.ready.eq(load & final_beat),
            self.over.valid.eq(offered & ending & (~o.valid | o.ready)),
            self.over.payload.eq(end),
        ]
        with m.If(~o.valid | o.ready):
            m.d.sync += [offered.eq(0), o.valid.eq(0)]
        with m.If(load):
            m.d.sync += [
                offered.eq(1),
                o.valid.eq(~drop),
                ending.eq(final_beat & h.last),
                end.eq(h.over),
                end.status.eq(fate),
                sending.eq(~final_beat),
                beats_left.eq(Mux(sending, beats_left, first_beats) - 1),
                dropping.eq(drop & ~(final_beat & h.last)),
                status.eq(fate),
                o.p.first.eq(~sending),
                o.p.last.eq(final_beat),
                o.p.data.eq(payloads.o.payload),
                o.p.dword_count.eq(Mux(final_beat, (h.length_dw - 1)[:lanes_log2] + 1, lanes)),
                o.p.header.eq(0),
                o.p.header.fmt.eq(h.address[32:].any() << pcie.FMT_4DW | 1 << pcie.FMT_DATA),
                o.p.header.type.eq(pcie.TYPE_MEMORY),
                o.p.header.relaxed_ordering.eq(h.relaxed_ordering & may_relax[h.over.function]),
                o.p.header.no_snoop.eq(h.no_snoop & may_not_snoop[h.over.function]),
                o.p.header.length_dw.eq(h.length_dw),
                o.p.header.requester_id.eq(buses[h.over.function] | h.over.function),
                o.p.header.first_be.eq(h.first_be),
                o.p.header.last_be.eq(h.last_be),
                o.p.header.address.eq(Cat(Const(0, 2), h.address[2:])),
                *([o.p.header.at.eq(h.at)] if self.host_ats else []),
                *([o.p.pasid.eq(h.pasid)] if self.has_pasid else []),
            ]
        return m
