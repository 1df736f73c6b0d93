"""What the UltraScale+ hard block's configuration space says, written into the card's own."""

from dataclasses import dataclass

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..spec import ultrascale as spec
from ..tlp.layouts import TlpBeat
from .ultrascale_receive import bar_address

MIRROR_TAG = 0x200  # a tag that no request of the block's can have
COMMAND = 1  # dword of the Command register; its bits: [PCIe5 7.5.1.1.3]
COMMAND_MEMORY, COMMAND_MASTER = 1, 2
BAR_0 = 4  # dword of the first base address register
FLR_BIT = 15  # Initiate FLR, of Device Control [PCIe5 7.5.3.4]
ERROR_REPORTING = 0xF  # its enables of error messages, which are the block's to send
CONTROL_2 = 0x5F  # what counts of Device Control 2: completion timeouts, AtomicOp Requester Enable [PCIe5 7.5.3.16]
MSIX_MASK_BIT, MSIX_ENABLE_BIT = 30, 31  # of the dword that Message Control is the upper half of [PCIe5 7.7.2.2]


@dataclass(frozen=True)
class MirroredFunction:
    """Where a function of the card has what :class:`ConfigMirror` writes: indices of dwords of its configuration space.

    ``bars``: indices of its BARs, all of them 64-bit. ``device_control``, ``device_control_2``, ``msix_control``, ``power_control``: None
    without the capability.
    """

    bars: tuple[int, ...]
    device_control: int | None = None
    msix_control: int | None = None
    device_control_2: int | None = None
    power_control: int | None = None

    def __post_init__(self):
        for bar in self.bars:
            if bar not in (0, 2, 4):
                raise ValueError(f"A BAR behind the hard block must be a 64-bit one at 0, 2 or 4, not {bar!r}")


class Seen(data.Struct):
    """What the block says of one function."""

    bus: 8
    master: 1
    msix_enable: 1
    msix_mask: 1
    device_control: 16
    device_control_2: 16
    power: 2


class DeviceControlPoll(wiring.Component):
    """Reads Device Control and Device Control 2 of all functions from the block, one after the other, for ever.

    Parameters
    ----------
    functions : :class:`int`
        1 to 4.
    capability : :class:`int`
        Offset of the block's PCI Express capability.

    Members
    -------
    cfg_mgmt_* : ports
        Of the block's configuration management interface.
    values, values_2 : ``Out(16).array(functions)``
        Device Control and Device Control 2 as they were when last read.
    known : ``Out(functions)``
        1: both were read.
    """

    def __init__(self, *, functions, capability):
        self.functions, self.capability = functions, capability
        super().__init__({
            "cfg_mgmt_addr": Out(10),
            "cfg_mgmt_function_number": Out(8),
            "cfg_mgmt_read": Out(1),
            "cfg_mgmt_read_data": In(32),
            "cfg_mgmt_read_write_done": In(1),
            "values": Out(16).array(functions),
            "values_2": Out(16).array(functions),
            "known": Out(functions),
        })

    def elaborate(self, platform):
        m = Module()
        function, is_second = self.cfg_mgmt_function_number, Signal()
        m.d.comb += self.cfg_mgmt_addr.eq(self.capability // 4 + Mux(is_second, 10, 2))
        with m.If(~self.cfg_mgmt_read):
            m.d.sync += self.cfg_mgmt_read.eq(~self.cfg_mgmt_read_write_done)
        with m.Elif(self.cfg_mgmt_read_write_done):
            m.d.sync += [self.cfg_mgmt_read.eq(0), is_second.eq(~is_second)]
            with m.If(is_second):
                m.d.sync += function.eq(Mux(function == self.functions - 1, 0, function + 1))
            for n in range(self.functions):
                with m.If((function == n) & is_second):
                    m.d.sync += [self.values_2[n].eq(self.cfg_mgmt_read_data[:16]), self.known[n].eq(1)]
                with m.Elif(function == n):
                    m.d.sync += self.values[n].eq(self.cfg_mgmt_read_data[:16])
        return m


class ConfigMirror(wiring.Component):
    """Writes what the block's configuration space says into the card's own, by configuration writes in the stream of received TLPs.

    So the card knows its bus number, Bus Master Enable, Device Control (payload, read request, tags, ordering), of Device Control 2
    completion timeouts and AtomicOp Requester Enable, power state and the two MSI-X bits of each function; its BARs get
    ``address``. Memory space is always enabled in there: what the block delivers it has already judged. When
    any of it changes for a function, and when a reset of it has ended that the card began by itself (on the way from D3hot), all of it
    is written again; ``changing`` is 1 from the cycle of the change until the card has answered the last write, but not for as long as
    a reset takes. A change of the power state that the block asks about is acknowledged when the card knows.

    Function level reset: when ``cfg_flr_in_process`` rises for a function, Initiate FLR is written to it; when its ``in_reset`` has
    fallen, ``cfg_flr_done`` is 1 for a cycle and all of it is written anew. A function that takes no part in this is done at once.

    Latency: 3 cycles from a change to the first write; Device Control is found changed after at most one round of reads.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    functions : tuple of :class:`MirroredFunction`
        1 to 4.
    address : function of a function's number and a BAR's index
        Where the BAR lies inside the card.

    Members
    -------
    cfg_* : ports
        Of the block, by their names.
    device_control, device_control_2, device_control_known : ``In(16).array(n)``, ``In(16).array(n)``, ``In(n)``
        From :class:`DeviceControlPoll`.
    writes : ``Out(stream.Signature(TlpBeat(width)))``
        Configuration writes, one at a time.
    answered : ``In(1)``
        Pulse: the completion of a write came.
    in_reset : ``In(n)``
        A bit per function: the card has it in reset; 1 in front of the answer to the write that begins it.
    changing : ``Out(1)``
        The card does not yet know all.
    """

    def __init__(self, *, width, functions, address=bar_address):
        self.width, self.functions, self.address = width, tuple(functions), address
        count = len(self.functions)
        super().__init__({
            "cfg_bus_number": In(8),
            "cfg_function_status": In(spec.STATUS_BITS * spec.MAX_FUNCTIONS),
            "cfg_interrupt_msix_enable": In(spec.MAX_FUNCTIONS),
            "cfg_interrupt_msix_mask": In(spec.MAX_FUNCTIONS),
            "cfg_flr_in_process": In(spec.MAX_FUNCTIONS),
            "cfg_flr_done": Out(spec.MAX_FUNCTIONS),
            "cfg_function_power_state": In(spec.POWER_BITS * spec.MAX_FUNCTIONS),
            "cfg_power_state_change_interrupt": In(1),
            "cfg_power_state_change_ack": Out(1),
            "device_control": In(16).array(count),
            "device_control_2": In(16).array(count),
            "device_control_known": In(count),
            "writes": Out(stream.Signature(TlpBeat(width))),
            "answered": In(1),
            "in_reset": In(count),
            "changing": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        count = len(self.functions)
        now, seen = [], []
        stale, flr_before, flr_wanted = Signal(count, init=-1), Signal(count), Signal(count)
        resetting, dirty, before = Signal(count), Signal(count), Signal(count)
        for n in range(count):
            status = self.cfg_function_status.word_select(n, spec.STATUS_BITS)
            now.append(says := Signal(Seen, name=f"now_{n}"))
            seen.append(known := Signal(Seen, name=f"seen_{n}"))
            m.d.comb += [
                says.bus.eq(self.cfg_bus_number), says.master.eq(status[spec.STATUS_MASTER]),
                says.msix_enable.eq(self.cfg_interrupt_msix_enable[n]), says.msix_mask.eq(self.cfg_interrupt_msix_mask[n]),
                says.device_control.eq(self.device_control[n]),
                says.device_control_2.eq(self.device_control_2[n] & CONTROL_2),
                says.power.eq(self.cfg_function_power_state.word_select(n, spec.POWER_BITS)),
                dirty[n].eq(self.device_control_known[n] & ~resetting[n] & ~self.in_reset[n]
                            & (stale[n] | (says.as_value() != known.as_value()))),
                self.cfg_flr_done[n].eq(resetting[n] & ~self.in_reset[n]),
            ]  # fmt: skip
            with m.If(self.cfg_flr_done[n]):
                m.d.sync += resetting[n].eq(0)
            m.d.sync += flr_before[n].eq(self.cfg_flr_in_process[n])
            with m.If(self.cfg_flr_in_process[n] & ~flr_before[n]):
                m.d.sync += flr_wanted[n].eq(1)
        m.d.sync += before.eq(self.in_reset)

        is_acknowledged = Signal()
        m.d.comb += self.cfg_power_state_change_ack.eq(self.cfg_power_state_change_interrupt & ~self.changing & ~is_acknowledged)
        m.d.sync += is_acknowledged.eq(self.cfg_power_state_change_interrupt & (is_acknowledged | ~self.changing))

        # All writes of all functions in a row; those of function n begin at ``starts[n]``, the FLR's come last.
        at, function = Signal(8), Signal(range(count))
        register, enables, value = Signal(10), Signal(4), Signal(32)
        final = Signal()
        starts, resets, place = [], [], 0
        with m.Switch(at):
            for n, described in enumerate(self.functions):
                known = seen[n]
                rows = []
                for bar in described.bars:
                    base = self.address(n, bar)
                    rows += [(BAR_0 + bar + half, 0xF, Const(base >> 32 * half & 0xFFFFFFFF, 32)) for half in (0, 1)]
                if described.device_control is not None:
                    rows.append((described.device_control, 0x3, known.device_control & ~(1 << FLR_BIT | ERROR_REPORTING)))
                if described.device_control_2 is not None:
                    rows.append((described.device_control_2, 0x3, known.device_control_2))
                if described.msix_control is not None:
                    rows.append((described.msix_control, 0x8, known.msix_mask << MSIX_MASK_BIT | known.msix_enable << MSIX_ENABLE_BIT))
                rows.append((COMMAND, 0x1, 1 << COMMAND_MEMORY | known.master << COMMAND_MASTER))
                if described.power_control is not None:  # the last of all: on the way from D3hot it forgets the others
                    rows.append((described.power_control, 0x1, known.power))
                starts.append(place)
                for n_row, (word, bytes_enabled, what) in enumerate(rows):
                    with m.Case(place):
                        m.d.comb += [register.eq(word), enables.eq(bytes_enabled), value.eq(what), final.eq(n_row == len(rows) - 1)]
                    place += 1
                resets.append(place)
                with m.Case(place):
                    wanted = known.device_control & ~ERROR_REPORTING | 1 << FLR_BIT
                    m.d.comb += [register.eq(described.device_control or 0), value.eq(wanted)]
                    m.d.comb += enables.eq(0 if described.device_control is None else 0x3)
                place += 1

        beat, header = self.writes.payload, self.writes.payload.header
        bus = Signal(8)
        m.d.comb += [
            header.fmt.eq(1 << pcie.FMT_DATA), header.type.eq(pcie.TYPE_CONFIG_0), header.length_dw.eq(1), header.tag.eq(MIRROR_TAG),
            header.first_be.eq(enables), header.address.eq(Cat(Const(0, 2), register)),
            header.completer_id.eq(Cat(Signal(3), Const(0, 5), bus) | function),
            beat.data.eq(value), beat.dword_count.eq(1), beat.first.eq(1), beat.last.eq(1),
        ]
        is_reset = Signal()
        m.d.comb += self.changing.eq(1)
        with m.FSM():
            with m.State("CHOOSE"):
                m.d.comb += self.changing.eq(dirty.any() | flr_wanted.any())
                for n in reversed(range(count)):
                    with m.If(dirty[n]):
                        m.d.sync += [function.eq(n), at.eq(starts[n]), is_reset.eq(0)]
                for n in reversed(range(count)):
                    with m.If(flr_wanted[n]):
                        m.d.sync += [function.eq(n), at.eq(resets[n]), is_reset.eq(1)]
                with m.If(dirty.any() | flr_wanted.any()):
                    m.next = "LOOK"
            with m.State("LOOK"):
                for n in range(count):
                    with m.If(function == n):
                        m.d.sync += bus.eq(now[n].bus)
                        with m.If(is_reset):
                            m.d.sync += [flr_wanted[n].eq(0), stale[n].eq(1)]
                        with m.Else():
                            m.d.sync += [seen[n].eq(now[n]), stale[n].eq(0)]
                m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += self.writes.valid.eq(1)
                with m.If(self.writes.ready):
                    m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(self.answered):
                    m.d.sync += at.eq(at + 1)
                    m.next = "WRITE"
                    with m.If(is_reset | final):
                        m.next = "CHOOSE"
                    for n in range(count):
                        with m.If(is_reset & (function == n)):
                            m.d.sync += resetting[n].eq(1)
        for n in range(count):
            with m.If(before[n] & ~self.in_reset[n]):
                m.d.sync += stale[n].eq(1)
        return m
