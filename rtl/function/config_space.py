"""Configuration space of all functions of a card."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..regs.bus import RegisterBus
from ..spec import pcie_config as spec
from ..tlp.layouts import ConfigRequest, ConfigResponse, ConfigState
from .description import STRUCTURES, MsixCapability, PcieCapability, VirtioCapability, VirtioWindow, bars_of, check_functions

WORDS = spec.CAPABILITIES_END // 4  # dwords per function that hold anything
FLR_BIT = 15  # Initiate FLR, of Device Control [PCIe5 7.5.3.4]

# What is constant about a dword. ``is_window``: it is pci_cfg_data of a virtio window.
# ``kept``: bits that a function level reset leaves alone. ``starts_reset``: its bit 15 is Initiate FLR of a function that offers it.
_Rule = data.StructLayout({"reset": 32, "writable": 32, "kept": 32, "is_window": 1, "starts_reset": 1})
# Bytes ``start`` to ``end - 1`` of a BAR; a place without a structure has ``end`` 0.
_Structure = data.StructLayout({"bar": 8, "start": 32, "end": 32})


class ConfigSpace(wiring.Component):
    """Answers configuration accesses of all functions, and shows the card what the host has set.

    One write is one update of one dword: enabled bytes of writable bits change at once, everything else keeps its value.
    BAR size masks apply on write. Registers beyond the last capability read 0. A request for a function that the card does
    not have is answered with ``unsupported``. A write captures the bus and device number for its function, whatever
    its byte enables. [PCIe5 2.2.6.2, 7.5.1]

    An access with any byte enabled to pci_cfg_data of a virtio window performs one access of the BAR through ``registers``:
    reads in front of the answer, writes behind the update. It is left out, and the data stays, when the window's length
    is not 1, 2 or 4, its offset is not a multiple of that, or it does not lie inside one virtio structure. [VIRTIO1.4 4.1.4.9]

    After reset every dword gets its reset value: no request is accepted for 128 cycles per function.

    Function level reset: a 1 written to Initiate FLR of a function that offers it sets the function's ``reset`` from the cycle in
    front of the response on. When the response was taken, the function's dwords get their reset values but for what belongs to the link
    (no request is accepted for 128 cycles), bus and device number stay. ``reset`` falls when that is over and ``busy`` is 0;
    configuration accesses do as always until then. [PCIe5 6.6.2]

    Latency: 2 cycles from request to response; through a window up to 12 more and the owner's time. Throughput: one access at a time.

    Parameters
    ----------
    functions : tuple of :class:`.description.FunctionDescription`
        Function n of the card: 1 to 8.

    Members
    -------
    requests : ``In(stream.Signature(ConfigRequest))``
        Accesses.
    responses : ``Out(stream.Signature(ConfigResponse))``
        One for each, in order; the data of a write's means nothing.
    state : ``Out(ConfigState)``, one per function
        What the host has set, from the cycle in front of the response on.
    bars : ``Out(64)``, one per BAR in the order of :func:`.description.bars_of`
        Base addresses.
    interrupt : ``In(1)``, one per function
        Shown as Interrupt Status.
    pending : ``In(1)``, one per function
        Shown as Transactions Pending.
    reset : ``Out(1)``, one per function
        A function level reset is under way.
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
        super().__init__({
            "requests": In(stream.Signature(ConfigRequest)),
            "responses": Out(stream.Signature(ConfigResponse)),
            "state": Out(ConfigState).array(len(self.functions)),
            "bars": Out(64).array(len(bars_of(self.functions))),
            "interrupt": In(1).array(len(self.functions)),
            "pending": In(1).array(len(self.functions)),
            "reset": Out(1).array(len(self.functions)),
            "busy": In(1).array(len(self.functions)),
            "registers": Out(RegisterBus()),
        })

    def elaborate(self, platform):
        m = Module()
        count = len(self.functions)
        maps = [f.map(is_first=n == 0, is_multifunction=count > 1) for n, f in enumerate(self.functions)]

        m.submodules.rules = rules = Memory(shape=_Rule, depth=count * WORDS, init=self._rules(maps))
        m.submodules.values = values = Memory(shape=32, depth=count * WORDS, init=[])
        rule, value, store = rules.read_port(), values.read_port(), values.write_port()

        request = Signal(ConfigRequest)
        here = Signal(range(count * WORDS))  # dword at work: function and register
        exists, inside, captures = Signal(), Signal(), Signal()
        starts_reset, is_level_reset = Signal(), Signal()  # the request starts one; its dwords are yet to be restored
        result = Signal(32)  # of a read, or what a write made of the dword
        window_bar, window_offset, window_enables = Signal(8), Signal(32), Signal(4)

        # What both memories show in the next cycle; by default the dword at work.
        value_at = Signal.like(here)
        m.d.comb += [value_at.eq(here), value.addr.eq(value_at), rule.addr.eq(value_at), store.addr.eq(here), store.data.eq(result)]

        mask, updated = Signal(32), Signal(32)
        m.d.comb += [
            mask.eq(Mux(request.is_write, rule.data.writable & Cat(b.replicate(8) for b in request.byte_enable), 0)),
            updated.eq((value.data & ~mask) | (request.data & mask)),
        ]
        # With what is not stored: Interrupt Status, Transactions Pending.
        shown = Signal(32)
        m.d.comb += shown.eq(updated)
        for n, function in enumerate(self.functions):
            levels = [(("header", "status", "interrupt"), self.interrupt[n])]
            if function.capability(PcieCapability):
                levels.append((("pcie", "device_status", "transactions_pending"), self.pending[n]))
            for names, level in levels:
                place = maps[n].place(*names)
                with m.If((here == n * WORDS + place.word) & level):
                    m.d.comb += shown[place.low].eq(1)
        kept = Mux(is_level_reset, rule.data.kept, 0)

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
        bus, access = self.registers, self.registers.request.payload
        m.d.comb += [
            answered.eq(bus.response.payload.data >> (lane << 3)),
            access.function.eq(request.function),
            access.bar.eq(window_bar),
            access.offset.eq(Cat(Signal(3), window_offset[3:])),
            access.is_write.eq(request.is_write),
            access.byte_enable.eq(window_enables << lane),
            access.data.eq(result << (lane << 3)),
            self.responses.payload.data.eq(result),
            self.responses.payload.unsupported.eq(~exists),
        ]

        with m.FSM():
            with m.State("FETCH_RESET"):
                m.next = "RESTORE"
            with m.State("RESTORE"):
                m.d.comb += [store.en.eq(1), store.data.eq((rule.data.reset & ~kept) | (value.data & kept))]
                m.d.sync += here.eq(here + 1)
                m.next = "FETCH_RESET"
                with m.If(Mux(is_level_reset, here % WORDS == WORDS - 1, here == count * WORDS - 1)):
                    m.d.sync += is_level_reset.eq(0)
                    m.next = "TAKE"
            with m.State("TAKE"):
                incoming = self.requests.payload
                address = Cat(incoming.register[: (WORDS - 1).bit_length()], incoming.function)[: len(here)]
                m.d.comb += [self.requests.ready.eq(1), value_at.eq(address)]
                m.d.sync += [
                    request.eq(incoming),
                    here.eq(address),
                    exists.eq(incoming.function < count),
                    inside.eq((incoming.function < count) & (incoming.register < WORDS)),
                ]
                with m.If(self.requests.valid):
                    m.next = "UPDATE"
            with m.State("UPDATE"):
                m.d.comb += [store.en.eq(inside & request.is_write), store.data.eq(updated)]
                m.d.comb += captures.eq(request.is_write)
                m.d.comb += starts_reset.eq(
                    inside & request.is_write & rule.data.starts_reset & request.byte_enable[FLR_BIT // 8] & request.data[FLR_BIT])
                m.d.sync += [result.eq(Mux(inside, shown, 0)), is_level_reset.eq(starts_reset)]
                m.next = "ANSWER"
                with m.If(inside & rule.data.is_window & (request.byte_enable != 0)):
                    m.d.comb += value_at.eq(here - 3)
                    m.next = "FETCH_OFFSET"
            with m.State("FETCH_OFFSET"):
                m.d.comb += value_at.eq(here - 2)
                m.d.sync += window_bar.eq(value.data)
                m.next = "FETCH_LENGTH"
            with m.State("FETCH_LENGTH"):
                m.d.comb += value_at.eq(here - 1)
                m.d.sync += window_offset.eq(value.data)
                m.next = "CHECK_LENGTH"
            with m.State("CHECK_LENGTH"):
                m.d.sync += [length.eq(value.data), window_enables.eq(enables), nth.eq(0)]
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
                m.d.comb += self.responses.valid.eq(1)
                with m.If(self.responses.ready):
                    m.next = "TAKE"
                    with m.If(is_level_reset):
                        m.d.sync += here.eq(here & -WORDS)
                        m.next = "FETCH_RESET"

        # Copies of what the card must see at all times, taken when the dword is written.
        def copy(function, *names):
            place = maps[function].place(*names)
            signal = Signal(place.width, init=place.reset, name="_".join((f"f{function}", *names)))
            with m.If(store.en & (store.addr == function * WORDS + place.word)):
                m.d.sync += signal.eq(store.data[place.low : place.low + place.width])
            return signal

        for n, function in enumerate(self.functions):
            state, bus_number, device_number = self.state[n], Signal(8, name=f"f{n}_bus"), Signal(5, name=f"f{n}_device")
            with m.If(starts_reset & (request.function == n)):
                m.d.sync += self.reset[n].eq(1)
            with m.Elif(~self.busy[n] & ~(is_level_reset & (request.function == n))):
                m.d.sync += self.reset[n].eq(0)
            with m.If(captures & (request.function == n)):
                m.d.sync += [bus_number.eq(request.bus), device_number.eq(request.device)]
            m.d.comb += [state.bus.eq(bus_number), state.device.eq(device_number), state.in_reset.eq(self.reset[n])]
            m.d.comb += state.bus_master.eq(copy(n, "header", "command", "bus_master"))
            if function.bars:
                m.d.comb += state.memory_enable.eq(copy(n, "header", "command", "memory_enable"))
            if function.capability(PcieCapability):
                m.d.comb += [
                    state.mps_code.eq(copy(n, "pcie", "device_control", "mps")),
                    state.mrrs_code.eq(copy(n, "pcie", "device_control", "mrrs")),
                    state.extended_tag.eq(copy(n, "pcie", "device_control", "extended_tag")),
                    state.relaxed_ordering.eq(copy(n, "pcie", "device_control", "relaxed_ordering")),
                    state.no_snoop.eq(copy(n, "pcie", "device_control", "no_snoop")),
                ]
            if function.capability(MsixCapability):
                m.d.comb += [
                    state.msix_enable.eq(copy(n, "msix", "control", "enable")),
                    state.msix_mask.eq(copy(n, "msix", "control", "function_mask")),
                ]
        for n, (function, bar) in enumerate(bars_of(self.functions)):
            bases = [copy(function, "header", f"bar_{index}", "base") for index in bar.registers]
            m.d.comb += self.bars[n].eq(Cat(bases) << (bar.size_bytes.bit_length() - 1))
        return m

    def _rules(self, maps):
        rules = []
        for function, function_map in zip(self.functions, maps):
            window = function.capability(VirtioWindow) and function_map.place("virtio_window", "pci_cfg_data", "value").word
            pcie = function.capability(PcieCapability)
            control = pcie and pcie.has_flr and function_map.place("pcie", "device_control", "initiate_flr").word
            for n, word in enumerate(function_map.words()):
                rules.append({"reset": word.reset, "writable": word.writable, "kept": word.kept, "is_window": n == window,
                              "starts_reset": bool(control) and n == control})  # fmt: skip
        return rules

    def _structures(self):
        entries = []
        for function in self.functions:
            found = [c for c in function.capabilities if isinstance(c, VirtioCapability)]
            rows = [{"bar": c.bar, "start": c.offset, "end": c.offset + c.length} for c in found]
            entries += rows + [{"bar": 0, "start": 0, "end": 0}] * (STRUCTURES - len(rows))
        return entries
