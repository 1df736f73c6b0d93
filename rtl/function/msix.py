"""MSI-X of several functions: vector tables, pending bits, and the writes that messages are."""

from dataclasses import dataclass

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..regs.bus import PATIENCE_BITS, RegisterBus, RegisterRequest
from ..stream.ram import Ram
from ..tlp.layouts import Burst, BurstData, BurstDone, BurstStatus, ConfigState
from .description import MsixCapability
from .layouts import MsixRequest

PBA_BITS = 64  # pending bits per word [PCIe5 7.7.2.7]
CONTROL_MASK = 32  # Mask bit of the second word of an entry [PCIe5 7.7.2.6]


@dataclass(frozen=True)
class MsixFunction:
    """A function whose vectors :class:`Msix` keeps: its number, its capability, the requester client of its messages."""

    function: int
    capability: MsixCapability
    client: int


class Msix(wiring.Component):
    """Keeps MSI-X tables and pending bits, and sends a message for each request that may be sent.

    A message is one write burst of one dword at an address of 4 bytes, without relaxed ordering (R19). A request whose vector or
    function is masked, whose function is no bus master, or whose function has another message under way, sets the pending
    bit; the message leaves, and the bit is cleared, when none of that holds any longer. So every request is followed by a message
    of its vector; requests that wait together are one. A request of a function with MSI-X disabled is dropped, as is one
    for a vector that is not there. A message that ended with ``RESET`` (bus master off) is pending again; any
    other end is final. No message of a function waits for another function's. [PCIe5 6.1.4]

    Table entries can be read and written in any bytes; the pending bits are read-only. After reset all vectors are masked, and
    nothing is accepted until the tables are written (1 cycle per 8 bytes).

    Latency: 5 cycles from request to burst when nothing else is asked. Throughput: one request in 4 cycles, one message of a
    function at a time. Register accesses are answered within 8 cycles; but a read waits for the end of a message of its function that is
    under way, so that who masked a vector and reads has all of its messages. Accesses behind it wait, too; at most 1,023 cycles.

    Parameters
    ----------
    functions : tuple of :class:`MsixFunction`
        At least one. Table and pending bits lie where the capability says.
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.

    Members
    -------
    bus : ``In(RegisterBus())``
        Accesses to tables and pending bits.
    requests : ``In(stream.Signature(MsixRequest))``
        Vectors to send.
    state : ``In(ConfigState)``, one per entry of ``functions``
        Enable, Function Mask and bus master.
    bursts, write_data, write_done : one per entry of ``functions``
        Messages.
    stop, stopped : one per entry of ``functions``
        See "Stop" in rtl/README.md: pending bits are cleared, table entries stay.
    quiet : one per entry of ``functions``
        No message of the function is under way or will be, unless it is asked for or what it waits for comes.
    clear, cleared : one per entry of ``functions``
        When ``clear`` rises, the function's table entries become as after reset; ``cleared`` is 1 when they are and ``clear`` is 1
        still. Meanwhile others are served as always.

    Raises
    ------
    :exc:`ValueError`
        If there is no function, one twice, or the width is none of the four.
    """

    def __init__(self, *, functions, width):
        self.functions, self.width = tuple(functions), width
        numbers = [entry.function for entry in self.functions]
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(f"Functions with MSI-X must be at least one, each once, not {numbers!r}")
        if width not in (64, 128, 256, 512):
            raise ValueError(f"Data width must be 64, 128, 256 or 512 bits, not {width!r}")
        count = len(numbers)
        super().__init__({
            "bus": In(RegisterBus()),
            "requests": In(stream.Signature(MsixRequest)),
            "state": In(ConfigState).array(count),
            "bursts": Out(stream.Signature(Burst)).array(count),
            "write_data": Out(stream.Signature(BurstData(width))).array(count),
            "write_done": In(stream.Signature(BurstDone)).array(count),
            "stop": In(1).array(count),
            "stopped": Out(1).array(count),
            "quiet": Out(1).array(count),
            "clear": In(1).array(count),
            "cleared": Out(1).array(count),
        })

    def elaborate(self, platform):
        m = Module()
        count = len(self.functions)
        totals = [entry.capability.vectors for entry in self.functions]
        # A vector's place: every function begins at a multiple of 64, so that a place is one of a pending bit, too.
        sizes = [-(-total // PBA_BITS) * PBA_BITS for total in totals]
        bases = [sum(sizes[:n]) for n in range(count)]
        places = sum(sizes)
        most = max(totals)
        word_bits, vector_bits = min(PBA_BITS, most), max(1, (most - 1).bit_length())
        word_vectors = min(PBA_BITS, 1 << vector_bits)
        reach = max(start + length for entry in self.functions for _, start, length in entry.capability.spans).bit_length()  # of offsets

        m.submodules.table = table = Ram(shape=64, depth=2 * places, init=[])
        m.submodules.pending = pending = Memory(shape=word_bits, depth=max(places // PBA_BITS, 2), init=[])
        entry, entry_write = table.read_port(), table.write_port(granularity=8)
        bits, bits_write = pending.read_port(), pending.write_port()

        # Per function.
        enabled = Cat(state.msix_enable for state in self.state)
        sendable = Signal(count)
        stop, was_stop, stopping = Cat(self.stop), Signal(count), Signal(count)
        in_flight, retry, free = Signal(count), Signal(count), Signal(count)
        m.d.comb += [
            sendable.eq(Cat(state.msix_enable & ~state.msix_mask & state.bus_master for state in self.state)),
            stopping.eq(stop & was_stop),
            free.eq(~in_flight & ~retry),
        ]
        m.d.sync += was_stop.eq(stop)
        # ``left`` vectors from ``at`` on include all that are pending and not masked: setting a bit and unmasking a vector begin anew.
        total_of = Array(totals)
        left = Array(Signal(range(total + 1), name=f"left_{n}") for n, total in enumerate(totals))
        at = Array(Signal(range(total), name=f"at_{n}") for n, total in enumerate(totals))
        latest = Array(Signal(vector_bits, name=f"latest_{n}") for n in range(count))  # vector of the latest message

        # At work: a request, a step of the search for pending bits, or a register access.
        turn, which = Signal(range(max(count, 2))), Signal(range(max(count, 2)))
        vector, exists, is_search, for_stop = Signal(vector_bits), Signal(), Signal(), Signal()
        place, second = Signal(range(2 * places)), Signal()  # ``second`` of the entry's words: data and mask
        access, is_table, is_pending_bits = Signal(RegisterRequest), Signal(), Signal()
        was_bus, was_request = Signal(), Signal()
        patience = Signal(PATIENCE_BITS)
        data, answer = Signal(32), Signal(64)
        m.d.comb += [
            entry.addr.eq(Cat(second, place)), entry_write.addr.eq(Cat(second, place)),
            bits.addr.eq(place[6:]), bits_write.addr.eq(place[6:]),
        ]  # fmt: skip

        to_search, searchable = Signal(count), Signal()
        others = searchable | self.requests.valid | retry.any()
        m.d.comb += to_search.eq(Cat(n != 0 for n in left) & ((sendable & free & ~stop) | stopping))
        m.d.comb += searchable.eq((to_search >> turn)[0])

        def of(levels):
            return (levels >> which)[0]

        # A step of the search goes on by one vector, or to the next word of pending bits.
        step, next_word = Signal(), Signal()
        distance, following = Signal(vector_bits + 1), Signal(vector_bits + 1)
        mark = Signal(word_bits)
        m.d.comb += [mark.eq(1 << vector[:6]), following.eq(Mux(next_word, (vector | (word_vectors - 1)) + 1, vector + 1))]
        m.d.comb += distance.eq(following - vector)
        with m.If(following >= total_of[which]):
            m.d.comb += distance.eq(total_of[which] - vector)
        with m.If(step):
            m.d.sync += [
                at[which].eq(Mux(following >= total_of[which], 0, following)),
                left[which].eq(Mux(left[which] > distance, left[which] - distance, 0)),
            ]

        # Table entries to be cleared, one word in each cycle of rest.
        clear, was_clear, clear_due = Cat(self.clear), Signal(count), Signal(count)
        is_clearing, clear_which, clear_at = Signal(), Signal(range(max(count, 2))), Signal(range(2 * places))
        clear_ends = Array(2 * (base + size) - 1 for base, size in zip(bases, sizes))
        clear_over = Signal(count)
        m.d.sync += [was_clear.eq(clear), clear_due.eq((clear_due & ~clear_over) | (clear & ~was_clear))]
        m.d.comb += [self.cleared[n].eq(clear[n] & was_clear[n] & ~clear_due[n]) for n in range(count)]

        idle, search_all, load = Signal(), Signal(), Signal()
        with m.FSM():
            with m.State("RESTORE"):
                m.d.comb += [
                    entry_write.addr.eq(place), entry_write.en.eq(-1), entry_write.data.eq(Mux(place[0], 1 << CONTROL_MASK, 0)),
                    bits_write.addr.eq(place[7:]), bits_write.en.eq(1),
                ]  # fmt: skip
                m.d.sync += place.eq(place + 1)
                with m.If(place == 2 * places - 1):
                    m.next = "CHOOSE"
            with m.State("CHOOSE"):
                m.d.comb += idle.eq(1)
                with m.If(is_clearing):
                    m.d.comb += [
                        entry_write.addr.eq(clear_at), entry_write.en.eq(-1),
                        entry_write.data.eq(Mux(clear_at[0], 1 << CONTROL_MASK, 0)),
                    ]  # fmt: skip
                    m.d.sync += clear_at.eq(clear_at + 1)
                    with m.If(clear_at == clear_ends[clear_which]):
                        m.d.comb += clear_over.eq(1 << clear_which)
                        m.d.sync += is_clearing.eq(0)
                with m.Else():
                    for n, base in enumerate(bases):
                        with m.If(clear_due[n]):
                            m.d.sync += [is_clearing.eq(1), clear_which.eq(n), clear_at.eq(2 * base)]
                m.d.sync += [is_search.eq(0), was_bus.eq(0), exists.eq(1)]
                with m.If(to_search.any()):
                    m.d.sync += turn.eq(Mux(turn == count - 1, 0, turn + 1))
                with m.If(self.bus.request.valid & ~(was_bus & others)):
                    m.d.comb += self.bus.request.ready.eq(1)
                    m.d.sync += [access.eq(self.bus.request.payload), was_bus.eq(1)]
                    m.next = "LOCATE"
                with m.Elif(searchable & (was_request | ~(self.requests.valid | retry.any()))):
                    m.d.sync += [which.eq(turn), vector.eq(at[turn]), is_search.eq(1), was_request.eq(0)]
                    m.d.sync += for_stop.eq((stopping >> turn)[0])
                    m.next = "PLACE"
                with m.Elif(retry.any()):
                    for n in reversed(range(count)):
                        with m.If(retry[n]):
                            m.d.sync += [which.eq(n), vector.eq(latest[n]), retry.eq(retry & ~(1 << n))]
                    m.d.sync += was_request.eq(1)
                    m.next = "PLACE"
                with m.Elif(self.requests.valid):
                    request = self.requests.payload
                    m.d.comb += self.requests.ready.eq(1)
                    m.d.sync += [vector.eq(request.vector), exists.eq(0), was_request.eq(1)]
                    for n, (function, total) in enumerate(zip(self.functions, totals)):
                        with m.If(request.function == function.function):
                            m.d.sync += [which.eq(n), exists.eq(request.vector < total)]
                    m.next = "PLACE"

            # A request or a step of the search.
            with m.State("PLACE"):
                m.d.sync += [place.eq(Array(bases)[which] + vector), second.eq(1)]
                m.next = "FETCH"
            with m.State("FETCH"):
                m.d.sync += second.eq(0)
                m.next = "CHECK"
            with m.State("CHECK"):
                is_masked = entry.data[CONTROL_MASK]
                can_send = of(sendable & free & ~stop) & ~is_masked
                m.d.sync += data.eq(entry.data[:32])
                m.next = "CHOOSE"
                with m.If(is_search & (for_stop != of(stopping))):
                    pass  # ``at`` may have been moved since
                with m.Elif(is_search):
                    with m.If(for_stop):
                        m.d.comb += [bits_write.en.eq(1), step.eq(1), next_word.eq(1)]
                    with m.Elif((bits.data >> vector[:6]) == 0):
                        m.d.comb += [step.eq(1), next_word.eq(1)]
                    with m.Elif(~(bits.data & mark).any() | is_masked):
                        m.d.comb += step.eq(1)
                    with m.Elif(can_send):
                        m.d.comb += [bits_write.en.eq(1), bits_write.data.eq(bits.data & ~mark), step.eq(1)]
                        m.next = "SEND"
                with m.Elif(exists & of(enabled & ~stop)):
                    m.d.comb += bits_write.en.eq(1)
                    with m.If(can_send):
                        m.d.comb += bits_write.data.eq(bits.data & ~mark)
                        m.next = "SEND"
                    with m.Else():
                        m.d.comb += [bits_write.data.eq(bits.data | mark), search_all.eq(1)]
            with m.State("SEND"):
                m.d.comb += load.eq(1)
                m.next = "CHOOSE"

            # A register access.
            with m.State("LOCATE"):
                m.d.sync += [is_table.eq(0), is_pending_bits.eq(0)]
                for n, entry_of in enumerate(self.functions):
                    (table_bar, table_start, table_bytes), (pba_bar, pba_start, pba_bytes) = entry_of.capability.spans
                    low, high = access.offset[:reach], access.offset[reach:]
                    with m.If(access.function == entry_of.function):
                        m.d.sync += which.eq(n)
                        with m.If((access.bar == table_bar) & (high == 0) & (low >= table_start) & (low < table_start + table_bytes)):
                            m.d.sync += [is_table.eq(1), place.eq(bases[n] + (low - table_start)[4:16]), second.eq(low[3])]
                        with m.If((access.bar == pba_bar) & (high == 0) & (low >= pba_start) & (low < pba_start + pba_bytes)):
                            m.d.sync += [is_pending_bits.eq(1), place.eq(bases[n] + ((low - pba_start)[3:9] << 6))]
                m.next = "READ"
            with m.State("READ"):
                m.next = "ACCESS"
            with m.State("ACCESS"):
                m.d.sync += answer.eq(Mux(is_table, entry.data, Mux(is_pending_bits, bits.data, 0)))
                with m.If(is_table & access.is_write):
                    legal = Mux(second, (1 << CONTROL_MASK + 1) - 1, (1 << 64) - 4)
                    m.d.comb += [entry_write.en.eq(access.byte_enable), entry_write.data.eq(access.data & legal)]
                    m.d.comb += search_all.eq(second & access.byte_enable[CONTROL_MASK // 8] & ~access.data[CONTROL_MASK])
                m.d.sync += patience.eq(0)
                m.next = "ANSWER"
            with m.State("ANSWER"):
                # Who reads behind a mask must see the end of what was decided in front of it, but no inbound request waits for ever.
                answers = access.is_write | ~of(in_flight) | patience.all()
                m.d.sync += patience.eq(patience + ~patience.all())
                m.d.comb += [self.bus.response.valid.eq(answers), self.bus.response.payload.data.eq(answer)]
                with m.If(answers & self.bus.response.ready):
                    m.next = "CHOOSE"

        for n, (function, burst, write_data, done) in enumerate(zip(self.functions, self.bursts, self.write_data, self.write_done)):
            here = which == n
            with m.If(search_all & here):
                m.d.sync += left[n].eq(totals[n])
            with m.If(stop[n] & ~was_stop[n]):
                m.d.sync += [left[n].eq(totals[n]), at[n].eq(0)]
            at_rest, asked = free[n] & (idle | ~here | was_bus), self.requests.valid & (self.requests.payload.function == function.function)
            m.d.comb += [
                self.stopped[n].eq(stopping[n] & (left[n] == 0) & at_rest),
                self.quiet[n].eq(at_rest & ((left[n] == 0) | ~sendable[n]) & ~asked),
            ]

            # The message: address at SEND, data from the cycle before.
            lanes = self.width // 8
            with m.If(load & here):
                m.d.sync += [
                    in_flight[n].eq(1), latest[n].eq(vector), burst.valid.eq(1), write_data.valid.eq(1),
                    burst.payload.address.eq(Cat(Signal(2), entry.data[2:])),
                    write_data.payload.data.eq(data.replicate(self.width // 32)),
                    write_data.payload.keep.eq(0xF << Cat(Signal(2), entry.data[2 : (lanes - 1).bit_length()])),
                ]  # fmt: skip
            with m.If(burst.valid & burst.ready):
                m.d.sync += burst.valid.eq(0)
            with m.If(write_data.valid & write_data.ready):
                m.d.sync += write_data.valid.eq(0)
            m.d.comb += [
                burst.payload.length_bytes.eq(4),
                burst.payload.is_write.eq(1),
                burst.payload.function.eq(function.function),
                burst.payload.client.eq(function.client),
                write_data.payload.first.eq(1),
                write_data.payload.last.eq(1),
                done.ready.eq(1),
            ]
            with m.If(done.valid & done.ready):
                m.d.sync += in_flight[n].eq(0)
                with m.If((done.payload.status == BurstStatus.RESET) & ~stop[n]):
                    m.d.sync += retry[n].eq(1)
            with m.If(stop[n]):
                m.d.sync += retry[n].eq(0)
        return m
