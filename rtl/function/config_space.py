"""Configuration space of all functions of a card."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..regs.bus import RegisterBus
from ..regs.table import Word
from ..spec import pcie_config as spec
from ..stream.ram import Ram
from ..tlp.layouts import ConfigRequest, ConfigResponse, ConfigState
from .bars import Rom
from .description import (
    STRUCTURES,
    AcsCapability,
    AtsCapability,
    MsiCapability,
    MsixCapability,
    PasidCapability,
    PcieCapability,
    PowerCapability,
    PriCapability,
    SriovCapability,
    VirtioCapability,
    VirtioWindow,
    bars_of,
    check_functions,
    physical_count,
    virtual_bars_of,
    virtual_functions_of,
)
from .layouts import FunctionSettings, Operation, UpdateBus, VirtualBar

__all__ = ["ConfigSpace"]

WORDS = spec.CAPABILITIES_END // 4  # dwords per function that are stored in any case
ROW_BITS = 3
ROW = 1 << ROW_BITS  # dwords of an extended capability come in rows of so many, and only rows that hold anything are stored

# Bytes ``start`` to ``end - 1`` of a BAR; a place without a structure has ``end`` 0.
_Structure = data.StructLayout({"bar": 8, "start": 32, "end": 32})

# Where the settings of FunctionSettings that are one field come from.
_SETTINGS = {
    "msi_enable": (MsiCapability, "msi", "control", "enable"),
    "msi_multiple": (MsiCapability, "msi", "control", "multiple"),
    "msi_data": (MsiCapability, "msi", "data", "value"),
    "msi_mask": (MsiCapability, "msi", "mask", "bits"),
    "timeout": (PcieCapability, "pcie", "device_control_2", "timeout"),
    "timeout_disable": (PcieCapability, "pcie", "device_control_2", "timeout_disable"),
    "atomics": (PcieCapability, "pcie", "device_control_2", "atomics"),
    "ten_bit_tags": (PcieCapability, "pcie", "device_control_2", "ten_bit_tags"),
    "ats_enable": (AtsCapability, "ats", "control", "enable"),
    "ats_stu": (AtsCapability, "ats", "control", "stu"),
    "pri_enable": (PriCapability, "pri", "control", "enable"),
    "pri_allocation": (PriCapability, "pri", "allocation", "value"),
    "pasid_enable": (PasidCapability, "pasid", "control", "enable"),
    "pasid_execute": (PasidCapability, "pasid", "control", "execute"),
    "pasid_privileged": (PasidCapability, "pasid", "control", "privileged"),
    "request_redirect": (AcsCapability, "acs", "control", "request_redirect"),
    "completion_redirect": (AcsCapability, "acs", "control", "completion_redirect"),
    "direct_translated": (AcsCapability, "acs", "control", "direct_translated"),
    "vf_enable": (SriovCapability, "sriov", "control", "enable"),
    "vf_memory_enable": (SriovCapability, "sriov", "control", "memory_enable"),
    "vf_count": (SriovCapability, "sriov", "count", "value"),
}
# Capabilities whose settings a virtual function takes from its physical one.
_SHARED = (PcieCapability, PriCapability, PasidCapability)


class ConfigSpace(wiring.Component):
    """Answers configuration accesses of all functions, and shows the card what the host has set.

    One write is one update of one dword: enabled bytes of writable bits change at once, everything else keeps its value.
    BAR size masks apply on write. A 1 clears a status bit, if its byte is enabled. A value that a field does not accept, and a field that
    another one freezes, leave the field as it is. Registers that no capability has read 0. A request for a function that the card does
    not have is answered with ``unsupported``. A write captures the bus and device number for its function, whatever
    its byte enables. [PCIe5 2.2.6.2, 7.5.1]

    An access with any byte enabled to pci_cfg_data of a virtio window performs one access of the BAR through ``registers``:
    reads in front of the answer, writes behind the update. It is left out, and the data stays, when the window's length
    is not 1, 2 or 4, its offset is not a multiple of that, or it does not lie inside one virtio structure. [VIRTIO1.4 4.1.4.9]

    After reset every dword gets its reset value: no request is accepted for 128 cycles per function, and 16 per row of 32 bytes of
    extended capabilities. While the link is down or in hot reset (``link_reset``) the same happens to all but sticky bits, bus and
    device number become 0, and every function is in reset as below; software's requests wait. [PCIe5 6.6.1]

    ``updates`` is how the card itself changes a dword, between two accesses of software: no bit of either is lost.
    Both get their turn: of two that wait, the one goes first that did not last time.

    Function level reset: a 1 written to Initiate FLR of a function that offers it sets the function's ``reset`` from the cycle in
    front of the response on. When the response was taken, the function's dwords get their reset values but for what belongs to the link
    (no request is accepted for 128 cycles, and 16 per row), bus and device number stay. ``reset`` falls when that is over and ``busy``
    is 0; configuration accesses do as always until then. [PCIe5 6.6.2] So does the way from D3hot to D0 of a function that does not
    keep its state. In D3hot ``state`` shows neither memory nor bus master enabled. [PCIe5 5.3.1.4.1]

    Virtual functions are there (else ``unsupported``) while VF Enable of their physical function is 1, as many as NumVFs; NumVFs and
    System Page Size do not change meanwhile. A VF BAR keeps no bits below the page size: they are masked when it or the page
    size is written. The end of VF Enable, by a write of 0 or a reset of the physical function, is a reset of all its virtual functions
    (``reset``, ``busy``), of which nothing is kept. ``state`` of one takes bus, device and all settings of requests but bus master and
    MSI-X from its physical function; in that one's D3hot it is not awake either. [PCIe5 9.2.1, 9.2.2, 9.3.3, 9.3.5.4]

    Latency: 2 cycles from request to response, 3 beyond the first 256 bytes; through a window up to 12 more and the owner's time; an update
    in front of it as long as its initiator takes. Throughput: one access at a time.

    Parameters
    ----------
    functions : tuple of :class:`.description.FunctionDescription`
        Function n of the card: 1 to 8, physical ones, then virtual ones.

    Members
    -------
    requests : ``In(stream.Signature(ConfigRequest))``
        Accesses.
    responses : ``Out(stream.Signature(ConfigResponse))``
        One for each, in order; the data of a write's means nothing.
    state : ``Out(ConfigState)``, one per function
        What the host has set, from the cycle in front of the response on.
    bars : ``Out(64)``, one per BAR in the order of :func:`.description.bars_of`
        Base addresses; bit 0 of a ROM's is its enable.
    virtual_bars : ``Out(VirtualBar)``, one per BAR in the order of :func:`.description.virtual_bars_of`
        Where the first virtual function's is, and the size of each.
    settings : ``Out(FunctionSettings)``, one per function
        What the host has set in further capabilities, from the cycle in front of the response on.
    interrupt : ``In(1)``, one per function
        Shown as Interrupt Status.
    pending : ``In(1)``, one per function
        Shown as Transactions Pending.
    msi_pending : ``In(32)``, one per function
        Shown as MSI's pending bits, where there are.
    pri_stopped : ``In(1)``, one per function
        Shown as Stopped of the Page Request Interface.
    updates : ``In(UpdateBus())``
        Accesses of the card itself.
    link_reset : ``In(1)``
        The link is down or in hot reset. A pulse of one cycle is enough.
    reset : ``Out(1)``, one per function
        A reset of the function is under way.
    busy : ``In(1)``, one per function
        The parts of the function have not yet done what the reset asks of them: 1 from the cycle behind the rise of ``reset`` on.
    registers : ``Out(RegisterBus())``
        Accesses through windows.

    Raises
    ------
    :exc:`ValueError`, :exc:`TypeError`
        If ``functions`` are not 1 to 8 descriptions.
    """

    def __init__(self, *, functions):
        self.functions = check_functions(functions)
        count, physical = len(self.functions), physical_count(self.functions)
        self._owners = virtual_functions_of(self.functions)
        self._maps = [f.map(n, physical) for n, f in enumerate(self.functions)]
        self._words = [function_map.words() for function_map in self._maps]
        # Rows of extended capabilities that hold anything, function by function: where each is stored.
        found = [(n, row) for n, words in enumerate(self._words) for row in range(WORDS // ROW, len(words) // ROW)
                 if any(word != Word() for word in words[ROW * row : ROW * row + ROW])]  # fmt: skip
        self._rows = {place: count * WORDS // ROW + n for n, place in enumerate(found)}
        super().__init__({
            "requests": In(stream.Signature(ConfigRequest)),
            "responses": Out(stream.Signature(ConfigResponse)),
            "state": Out(ConfigState).array(len(self.functions)),
            "bars": Out(64).array(len(bars_of(self.functions))),
            "virtual_bars": Out(VirtualBar).array(len(virtual_bars_of(self.functions))),
            "interrupt": In(1).array(len(self.functions)),
            "pending": In(1).array(len(self.functions)),
            "settings": Out(FunctionSettings).array(len(self.functions)),
            "msi_pending": In(32).array(len(self.functions)),
            "pri_stopped": In(1).array(len(self.functions)),
            "updates": In(UpdateBus()),
            "link_reset": In(1),
            "reset": Out(1).array(len(self.functions)),
            "busy": In(1).array(len(self.functions)),
            "registers": Out(RegisterBus()),
        })

    def elaborate(self, platform):
        m = Module()
        count, maps, stored = len(self.functions), self._maps, len(self.functions) * WORDS + len(self._rows) * ROW

        rule_layout, rules_init = self._rules()
        m.submodules.rules = rules = Memory(shape=rule_layout, depth=stored, init=rules_init)
        m.submodules.values = values = Ram(shape=32, depth=stored, init=[])
        rule, value, store = rules.read_port(), values.read_port(), values.write_port()

        request = Signal(ConfigRequest)
        here = Signal(range(stored))  # dword at work: function and register, or a place in a row
        exists, inside, captures = Signal(), Signal(), Signal()
        starts_reset, starts = Signal(), Signal(count)  # the request starts one; of whom
        restoring = Signal(count)  # whose dwords are yet to be restored
        is_level_reset = restoring.any()
        link_waits, is_link_reset = Signal(), Signal()  # one is yet to be done; it is under way
        is_update, is_held, operation = Signal(), Signal(), Signal(Operation)  # the access is the card's; the next one must be
        result = Signal(32)  # of a read, or what a write made of the dword
        trims = Signal(range(6))  # dwords that are yet to follow a page size
        window_bar, window_offset, window_enables = Signal(8), Signal(32), Signal(4)

        # What both memories show in the next cycle; by default the dword at work.
        value_at = Signal.like(here)
        m.d.comb += [value_at.eq(here), value.addr.eq(value_at), rule.addr.eq(value_at), store.addr.eq(here), store.data.eq(result)]

        # Copies of what the card must see at all times, taken when the dword is written.
        copies = {}

        def copy(function, *names):
            place = maps[function].place(*names)
            if (function, names) not in copies:
                signal = copies[function, names] = Signal(place.width, init=place.reset, name="_".join((f"f{function}", *names)))
                with m.If(store.en & (store.addr == self._stored(function, place.word))):
                    m.d.sync += signal.eq(store.data[place.low : place.low + place.width])
            return copies[function, names]

        enabled, mask, updated = Signal(32), Signal(32), Signal(32)
        page_mask, follows = self._pages(m, here, copy)
        m.d.comb += [
            mask.eq(rule.data.writable & enabled & page_mask),
            enabled.eq(Mux(request.is_write, Cat(b.replicate(8) for b in request.byte_enable), 0)),
            updated.eq(((value.data & ~mask) | (request.data & mask)) & ~(rule.data.clearable & enabled & request.data)),
        ]
        for n, function_map in enumerate(maps):
            for place, item in function_map.rules():
                refused = Const(0)
                if item.accepts is not None:
                    refused |= ~Cat(request.data[place.low : place.low + place.width] == value for value in item.accepts).any()
                if item.frozen_by is not None:
                    refused |= copy(n, *item.frozen_by)
                with m.If((here == self._stored(n, place.word)) & refused):
                    m.d.comb += mask[place.low : place.low + place.width].eq(0)
            if function_map.has("pri", "status", "stopped"):  # enabled anew, its flags are 0 [PCIe5 10.5.2.2]
                enable = function_map.place("pri", "control", "enable")
                rises = (request.data & mask & ~value.data)[enable.low] & ~is_update
                for name in ("response_failure", "unexpected_response"):
                    with m.If((here == self._stored(n, enable.word)) & rises):
                        m.d.comb += updated[function_map.place("pri", "status", name).low].eq(0)
        with m.If(is_update):
            m.d.comb += mask.eq(Mux(operation == Operation.SET, request.data, (operation == Operation.WRITE).replicate(32)))
        # With what is not stored: Interrupt Status, Transactions Pending.
        shown = Signal(32)
        m.d.comb += shown.eq(updated)
        for n, function in enumerate(self.functions):
            levels = [
                (not function.is_virtual, ("header", "status", "interrupt"), self.interrupt[n]),
                (function.capability(PcieCapability), ("pcie", "device_status", "transactions_pending"), self.pending[n]),
                (getattr(function.capability(MsiCapability), "has_mask", False), ("msi", "pending", "bits"), self.msi_pending[n]),
                (function.capability(PriCapability), ("pri", "status", "stopped"), self.pri_stopped[n]),
            ]
            for is_there, names, level in levels:
                if is_there:
                    place = maps[n].place(*names)
                    with m.If(here == self._stored(n, place.word)):
                        m.d.comb += shown[place.low : place.low + place.width].eq(level)
        wakes = Const(0)  # a function that does not keep its state, from D3hot to D0
        for n, function in enumerate(self.functions):
            if not getattr(function.capability(PowerCapability), "keeps_state", True):
                place = maps[n].place("pm", "control", "power_state")
                bits = slice(place.low, place.low + place.width)
                wakes |= ((here == self._stored(n, place.word)) & enabled[place.low] & (request.data[bits] == spec.D0)
                          & (value.data[bits] != spec.D0))  # fmt: skip
        # Of a virtual function that goes with its physical one nothing is kept.
        keeps_kept = (restoring >> request.function)[0] | (is_link_reset & rule.data.is_sticky)
        kept = Mux(keeps_kept, rule.data.kept, 0)

        # Virtual functions: which are there, and what takes them away.
        lives, vanishes = self._lives(copy), {}
        for physical in sorted({owner for owner, _ in self._owners.values()}):
            place = maps[physical].place("sriov", "control", "enable")
            vanishes[physical] = ((here == self._stored(physical, place.word)) & request.is_write & value.data[place.low]
                                  & ~updated[place.low])  # fmt: skip
        for n in range(count):
            m.d.comb += starts[n].eq(starts_reset & (request.function == n))
            if n in self._owners:
                owner, _ = self._owners[n]
                gone = Signal(name=f"f{n}_vanishes")
                m.d.comb += gone.eq(vanishes[owner] & inside & captures)
                m.d.comb += starts[n].eq((starts_reset & ((request.function == n) | (request.function == owner))) | gone)

        def whose(bits):  # where the first of these functions begins
            found = Const(0)
            for n in reversed(range(count)):
                found = Mux(bits[n], n * WORDS, found)
            return found

        # Access through a window: natural, inside one structure.
        m.submodules.structures = structures = Memory(shape=_Structure, depth=count * STRUCTURES, init=self._structures())
        structure = structures.read_port()
        length, lane = Signal(32), window_offset[:3]
        nth, fits, enables, legal = Signal(range(STRUCTURES)), Signal(), Signal(4), Signal()
        nth_next = Signal.like(nth)
        m.d.comb += [
            structure.addr.eq(Cat(nth_next, here[(WORDS - 1).bit_length() :])),
            legal.eq((structure.data.bar == window_bar) & (window_offset >= structure.data.start)
                     & (window_offset < structure.data.end) & (structure.data.end - window_offset >= length)),
        ]  # fmt: skip
        with m.Switch(value.data):
            for size in (1, 2, 4):
                with m.Case(size):
                    m.d.comb += [fits.eq((window_offset & (size - 1)) == 0), enables.eq((1 << size) - 1)]
        answered = Signal(32)  # by the owner of the BAR, from lane 0
        answer_mask = Cat(b.replicate(8) for b in window_enables)
        word = Cat(result[:8], Mux(window_enables[1], result[8:16], result[:8]))
        placed = Cat(word, Mux(window_enables[2], result[16:], word))  # what is written, in all lanes where it could belong
        bus, access = self.registers, self.registers.request.payload
        dword = bus.response.payload.data.word_select(lane[2], 32)
        m.d.comb += [
            answered.eq(Cat(dword.word_select(lane[:2], 8), dword.word_select(Cat(1, lane[1]), 8), dword[16:])),
            access.function.eq(request.function),
            access.bar.eq(window_bar),
            access.offset.eq(Cat(Signal(3), window_offset[3:])),
            access.is_write.eq(request.is_write),
            access.byte_enable.eq(window_enables << lane),
            access.data.eq(placed.replicate(2)),
            self.responses.payload.data.eq(result),
            self.responses.payload.unsupported.eq(~exists),
            self.updates.response.payload.data.eq(result),
        ]

        # Where extended capabilities are stored: rows by function and number, 0 for none.
        index, place_in_row, is_indexed = None, Signal(ROW_BITS), Signal()
        if self._rows:
            numbers = 1 << max(row for _, row in self._rows).bit_length()
            m.submodules.index = indices = Memory(
                shape=range(stored // ROW), depth=count * numbers,
                init=[self._rows.get((n, row), 0) for n in range(count) for row in range(numbers)])
            index = indices.read_port()

        with m.FSM():
            with m.State("FETCH_RESET"):
                m.next = "RESTORE"
            with m.State("RESTORE"):
                m.d.comb += [store.en.eq(1), store.data.eq((rule.data.reset & ~kept) | (value.data & kept))]
                m.d.sync += here.eq(here + 1)
                m.next = "FETCH_RESET"
                ends = Signal()  # of what a function level reset restores: the first 256 bytes, then rows
                for n in range(count):
                    rows = [at for (owner, _), at in self._rows.items() if owner == n]
                    with m.If(here == n * WORDS + WORDS - 1):
                        m.d.comb += ends.eq(not rows)
                        if rows:
                            with m.If(is_level_reset):
                                m.d.sync += here.eq(rows[0] * ROW)
                    if rows:
                        with m.If(here == rows[-1] * ROW + ROW - 1):
                            m.d.comb += ends.eq(1)
                with m.If(Mux(is_level_reset, ends, here == stored - 1)):
                    others = restoring & (restoring - 1)
                    m.d.sync += [restoring.eq(others), is_link_reset.eq(0)]
                    m.next = "TAKE"
                    if self._owners:
                        with m.If(others.any()):
                            m.d.sync += here.eq(whose(others))
                            m.next = "FETCH_RESET"
            with m.State("TAKE"):
                theirs, ours = self.requests, self.updates.request
                function, register = Signal(8), Signal(10)
                is_ours = is_held | (ours.valid & ~link_waits & ~(is_update & theirs.valid))
                m.d.comb += [
                    theirs.ready.eq(~is_ours & ~link_waits),
                    ours.ready.eq(is_ours),
                    function.eq(Mux(is_ours, ours.payload.function, theirs.payload.function)),
                    register.eq(Mux(is_ours, ours.payload.register, theirs.payload.register)),
                ]
                is_there = (function < count) & ~Cat((function == n) & ~lives[n] for n in self._owners).any()
                address = Cat(register[: (WORDS - 1).bit_length()], function)[: len(here)]
                m.d.comb += value_at.eq(address)
                m.d.sync += [
                    request.eq(theirs.payload),
                    here.eq(address),
                    exists.eq(is_there),
                    inside.eq(is_there & (register < WORDS)),
                ]
                with m.If(is_ours):
                    m.d.sync += [
                        request.function.eq(ours.payload.function),
                        request.is_write.eq(0),
                        request.byte_enable.eq(0),
                        request.data.eq(ours.payload.data),
                        operation.eq(ours.payload.operation),
                    ]
                with m.If((theirs.valid & theirs.ready) | (ours.valid & ours.ready)):
                    m.d.sync += [is_update.eq(is_ours), is_held.eq(is_ours & ~ours.payload.is_last)]
                    m.next = "UPDATE"
                    if index is not None:
                        with m.If(register >= WORDS):
                            m.next = "LOOK_UP"
                if index is not None:
                    m.d.comb += index.addr.eq(Cat(register[ROW_BITS:][: (numbers - 1).bit_length()], function))
                    m.d.sync += [place_in_row.eq(register), is_indexed.eq(is_there & (register < numbers * ROW))]
                with m.If(link_waits & ~is_held):
                    m.d.sync += [here.eq(0), link_waits.eq(0), is_link_reset.eq(1)]
                    m.next = "FETCH_RESET"
            if index is not None:
                with m.State("LOOK_UP"):
                    m.d.comb += value_at.eq(Cat(place_in_row, index.data))
                    m.d.sync += [here.eq(value_at), inside.eq(is_indexed & index.data.any())]
                    m.next = "UPDATE"
            with m.State("UPDATE"):
                m.d.comb += [store.en.eq(inside & (request.is_write | is_update)), store.data.eq(updated)]
                m.d.comb += captures.eq(request.is_write)
                initiates = rule.data.starts_reset & enabled[spec.FLR_BIT] & request.data[spec.FLR_BIT]
                m.d.comb += starts_reset.eq(inside & (initiates | wakes))
                m.d.sync += [result.eq(Mux(inside, Mux(is_update, value.data, shown), 0)), restoring.eq(starts)]
                m.next = "ANSWER"
                for bars_left, is_page_size in follows:
                    with m.If(inside & request.is_write & is_page_size):
                        m.d.comb += value_at.eq(here + 1)
                        m.d.sync += [here.eq(value_at), trims.eq(bars_left - 1)]
                        m.next = "TRIM"
                with m.If(inside & rule.data.is_window & (request.byte_enable != 0)):
                    m.d.comb += value_at.eq(here - 3)
                    m.d.sync += here.eq(value_at)
                    m.next = "FETCH_OFFSET"
            if follows:
                with m.State("TRIM"):  # BARs, which lie behind the page size
                    m.d.comb += [store.en.eq(1), store.data.eq(value.data & page_mask), value_at.eq(here + 1)]
                    m.d.sync += [here.eq(value_at), trims.eq(trims - 1)]
                    with m.If(trims == 0):
                        m.next = "ANSWER"
            with m.State("FETCH_OFFSET"):
                m.d.comb += value_at.eq(here + 1)
                m.d.sync += [here.eq(value_at), window_bar.eq(value.data)]
                m.next = "FETCH_LENGTH"
            with m.State("FETCH_LENGTH"):
                m.d.comb += value_at.eq(here + 1)
                m.d.sync += [here.eq(value_at), window_offset.eq(value.data)]
                m.next = "CHECK_LENGTH"
            with m.State("CHECK_LENGTH"):
                m.d.sync += [here.eq(here + 1), length.eq(value.data), window_enables.eq(enables), nth.eq(0)]
                m.next = "ANSWER"
                with m.If(fits):
                    m.next = "CHECK_PLACE"
            with m.State("CHECK_PLACE"):
                m.d.comb += nth_next.eq(nth + 1)
                m.d.sync += nth.eq(nth_next)
                with m.If(legal):
                    m.next = "ACCESS"
                with m.Elif(nth == STRUCTURES - 1):
                    m.next = "ANSWER"
            with m.State("ACCESS"):
                m.d.comb += bus.request.valid.eq(1)
                with m.If(bus.request.ready):
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.comb += bus.response.ready.eq(1)
                with m.If(bus.response.valid):
                    m.next = "ANSWER"
                    with m.If(~request.is_write & ~bus.response.payload.error):
                        m.d.sync += result.eq((result & ~answer_mask) | (answered & answer_mask))
                        m.next = "KEEP"
            with m.State("KEEP"):
                m.d.comb += store.en.eq(1)
                m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += [self.responses.valid.eq(~is_update), self.updates.response.valid.eq(is_update)]
                with m.If(Mux(is_update, self.updates.response.ready, self.responses.ready)):
                    m.next = "TAKE"
                    with m.If(is_level_reset):
                        m.d.sync += here.eq(whose(restoring) if self._owners else here & -WORDS)
                        m.next = "FETCH_RESET"

        for n, function in enumerate(self.functions):
            with m.If(starts[n] | is_link_reset):
                m.d.sync += self.reset[n].eq(1)
            with m.Elif(~self.busy[n] & ~restoring[n] & ~link_waits):
                m.d.sync += self.reset[n].eq(0)
            state, owner = self.state[n], self._owners.get(n, (n, None))[0]  # whose settings count
            if owner == n:
                bus_number, device_number = Signal(8, name=f"f{n}_bus"), Signal(5, name=f"f{n}_device")
                with m.If(captures & (request.function == n)):
                    m.d.sync += [bus_number.eq(request.bus), device_number.eq(request.device)]
                with m.If(is_link_reset):
                    m.d.sync += [bus_number.eq(0), device_number.eq(0)]
                m.d.comb += [state.bus.eq(bus_number), state.device.eq(device_number)]
            else:
                m.d.comb += [state.bus.eq(self.state[owner].bus), state.device.eq(self.state[owner].device)]
            m.d.comb += state.in_reset.eq(self.reset[n])
            is_awake = lives.get(n, 1)
            if self.functions[owner].capability(PowerCapability):
                is_on = copy(owner, "pm", "control", "power_state") == spec.D0
                m.d.comb += self.settings[n].is_d3hot.eq(~is_on)
                is_awake &= is_on
            m.d.comb += state.bus_master.eq(copy(n, "header", "command", "bus_master") & is_awake)
            if function.bars:
                enable = ("sriov", "control", "memory_enable") if function.is_virtual else ("header", "command", "memory_enable")
                m.d.comb += state.memory_enable.eq(copy(owner, *enable) & is_awake)
            if function.capability(PcieCapability):
                m.d.comb += [
                    state.mps_code.eq(copy(owner, "pcie", "device_control", "mps")),
                    state.mrrs_code.eq(copy(owner, "pcie", "device_control", "mrrs")),
                    state.extended_tag.eq(copy(owner, "pcie", "device_control", "extended_tag")),
                    state.relaxed_ordering.eq(copy(owner, "pcie", "device_control", "relaxed_ordering")),
                    state.no_snoop.eq(copy(owner, "pcie", "device_control", "no_snoop")),
                ]
            if function.capability(MsixCapability):
                m.d.comb += [
                    state.msix_enable.eq(copy(n, "msix", "control", "enable")),
                    state.msix_mask.eq(copy(n, "msix", "control", "function_mask")),
                ]
            for name, (kind, *names) in _SETTINGS.items():
                source = owner if kind in _SHARED or name == "ats_stu" else n
                if self.functions[source].capability(kind) and maps[source].has(*names):
                    m.d.comb += getattr(self.settings[n], name).eq(copy(source, *names))
            settings = self.settings[n]
            m.d.comb += [
                state.ten_bit_tag.eq(settings.ten_bit_tags),
                state.timeout.eq(settings.timeout),
                state.timeout_disable.eq(settings.timeout_disable),
                state.atomics.eq(settings.atomics),
            ]
            if function.capability(MsiCapability):
                high = copy(n, "msi", "address_high", "value") if function.capability(MsiCapability).is_64 else Const(0, 32)
                m.d.comb += self.settings[n].msi_address.eq(Cat(Const(0, 2), copy(n, "msi", "address", "value"), high))
            if function.capability(PriCapability):
                place = maps[n].place("pri", "control", "reset")
                m.d.comb += self.settings[n].pri_reset.eq(
                    captures & inside & (here == self._stored(n, place.word)) & enabled[place.low] & request.data[place.low])
        for n, (function, bar) in enumerate(bars_of(self.functions)):
            names = ["rom"] if isinstance(bar, Rom) else [f"bar_{index}" for index in bar.registers]
            bases = [copy(function, "header", name, "base") for name in names]
            m.d.comb += self.bars[n].eq(Cat(bases) << (bar.size_bytes.bit_length() - 1))
            if isinstance(bar, Rom):
                m.d.comb += self.bars[n][0].eq(copy(function, "header", "rom", "enable"))
        for n, (physical, bar) in enumerate(virtual_bars_of(self.functions)):
            bases = [copy(physical, "sriov", f"bar_{index}", "base") for index in bar.registers]
            m.d.comb += self.virtual_bars[n].base.eq(Cat(bases) << (bar.size_bytes.bit_length() - 1))
            for nth, page in reversed(list(enumerate(self.functions[physical].capability(SriovCapability).pages))):
                with m.If(copy(physical, "sriov", "page_size", f"page_{page}")):
                    m.d.comb += self.virtual_bars[n].page.eq(nth)
        with m.If(self.link_reset):
            m.d.sync += link_waits.eq(1)
        return m

    def _lives(self, copy):
        """Return, for the number of each virtual function, whether it is there. [PCIe5 9.3.3.3.1, 9.3.3.7]"""
        return {number: copy(physical, "sriov", "control", "enable") & (copy(physical, "sriov", "count", "value") > n)
                for number, (physical, n) in self._owners.items()}  # fmt: skip

    def _pages(self, m, here, copy):
        """Return which bits of the dword at work the page size leaves to a VF BAR, and (dwords behind it, whether it is at work) for
        each page size. [PCIe5 9.3.3.13, 9.3.3.14]"""
        top = max((f.capability(SriovCapability).pages[-1] for f in self.functions if f.capability(SriovCapability)), default=12)
        bits, follows = Signal(top - 12, init=-1, name="page_bits"), []
        for n, function in enumerate(self.functions):
            sriov = function.capability(SriovCapability)
            if not sriov or not sriov.bars:
                continue
            follows.append((max(bar.registers[-1] for bar in sriov.bars) + 1,
                            here == self._stored(n, self._maps[n].place("sriov", "page_size", "page_12").word)))  # fmt: skip
            pages = {page: copy(n, "sriov", "page_size", f"page_{page}") for page in sriov.pages}
            is_set = Cat(pages.values()).any()
            for bar in sriov.bars:
                with m.If(here == self._stored(n, self._maps[n].place("sriov", f"bar_{bar.index}", "base").word)):
                    for bit in range(12, top):
                        m.d.comb += bits[bit - 12].eq(~is_set | Cat(chosen for page, chosen in pages.items() if page <= bit).any())
        return Cat(Const(-1, 12), bits, Const(-1, 32 - top)), follows

    def _stored(self, function, word):
        """Return where dword ``word`` of ``function`` is stored."""
        if word < WORDS:
            return function * WORDS + word
        return self._rows[function, word // ROW] * ROW + word % ROW

    def _rules(self):
        """Return the layout of what is constant about a dword, and all of it.

        ``kept``: bits that a function level reset leaves alone. ``is_window``: the dword is pci_cfg_data of a virtio window.
        ``starts_reset``: its bit 15 is Initiate FLR of a function that offers it. ``clearable`` where there are such bits.
        """
        has_clearable = any(word.clearable for words in self._words for word in words)
        layout = data.StructLayout({
            "reset": 32, "writable": 32, "kept": 32, "clearable": 32 * has_clearable, "is_sticky": 1, "is_window": 1, "starts_reset": 1,
        })  # fmt: skip
        places = [(n, word) for n in range(len(self.functions)) for word in range(WORDS)]
        places += [(n, row * ROW + word) for n, row in self._rows for word in range(ROW)]
        rules = []
        for n, at in places:
            function, word = self.functions[n], self._words[n][at]
            window = function.capability(VirtioWindow) and self._maps[n].place("virtio_window", "pci_cfg_data", "value").word
            pcie = function.capability(PcieCapability)
            control = pcie and pcie.has_flr and self._maps[n].place("pcie", "device_control", "initiate_flr").word
            rules.append({
                "reset": word.reset, "writable": word.writable, "kept": word.kept, "clearable": word.clearable,
                "is_sticky": word.is_sticky and not function.is_virtual, "is_window": at == window,
                "starts_reset": bool(control) and at == control,
            })  # fmt: skip
        return layout, rules

    def _structures(self):
        entries = []
        for function in self.functions:
            found = [c for c in function.capabilities if isinstance(c, VirtioCapability)]
            rows = [{"bar": c.bar, "start": c.offset, "end": c.offset + c.length} for c in found]
            entries += rows + [{"bar": 0, "start": 0, "end": 0}] * (STRUCTURES - len(rows))
        return entries
