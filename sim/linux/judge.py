"""The golden model beside a card that a foreign host drives: everything is learned from TLPs, live or from the log.

Nobody tells what software stores in memory, where rings lie, which features were negotiated. Configuration and BAR writes of the
host tell it, and the completions that it gives the card show memory as the card saw it. The wall must stay Bare, as at power-on.
"""

import ast
import struct
import time
from dataclasses import dataclass, field, replace

from ...models.config_space import (
    BarDescription,
    ConfigSpace,
    FunctionDescription,
    acs_capability,
    aer_capability,
    ari_capability,
    ats_capability,
    msix_capability,
    pcie_capability,
    power_capability,
    pri_capability,
    serial_number_capability,
    sriov_capability,
    virtio_capability,
    virtual_function,
)
from ...models.events import TlpReceived, TlpSent
from ...models.tlp import CplStatus, MalformedTlp, TlpType, decode, stray_bits
from ...models.virtio.blk import HEADER_BYTES, BlkFeature, BlkStatus, BlkType
from ...models.virtio.driver import Feature
from ...models.virtio.rules import RULES
from ...models.virtio.split import SplitLayout
from ...models.virtio.transport import PciTransport
from ...models.virtio.wire import KEPT_BYTES, READABLE_LAST, TOO_LONG, WireJudge
from ...rtl.config import BlkConfig, EndpointConfig, HostAtsConfig, IommuConfig
from ..log import read_log
from ..ring_checker import DoubtfulBlkDevice
from ..scoreboard import Checker, Mismatch, Scoreboard

__all__ = ["Judge", "config_of", "describe_functions", "judge_log"]

COMMON, NOTIFY, ISR, DEVICE, PCI_CFG = 1, 2, 3, 4, 5  # virtio structures [VIRTIO1.4 4.1.4]
PLACES = {COMMON: (0x0000, 0x40), ISR: (0x1000, 1), DEVICE: (0x2000, 60), NOTIFY: (0x3000, 4)}  # of BAR 0, as rtl/README.md says
MULTIPLIER = 4
REGISTERS_BAR, MSIX_BAR, MSIX_PBA = 0, 2, 0x800
WALL_VECTORS, WALL_TABLE, WALL_PBA = 4, 0x300, 0x400
DDTP, BARE = 0x10, 1  # the wall's directory pointer; its mode without translation [RVIOMMU1.0 6.5]
OFFERED = 1 << BlkFeature.FLUSH | 1 << Feature.VERSION_1 | 1 << Feature.ACCESS_PLATFORM | 1 << Feature.ORDER_PLATFORM
LINK = {"link_capabilities": 3 | 8 << 4 | 1 << 22, "link_status": 3 | 8 << 4, "link_capabilities_2": 0b1110,
        "timeout_ranges": 1}  # fmt: skip  # 8 GT/s x8, completion timeouts of range A or none [PCIe5 7.5.3]
# Errors that a function reports: none of ECRC, ACS and the like, which it does not have.
REPORTED, CORRECTED = 0x0057_F010, 0x0000_71C1  # bits of Uncorrectable and Correctable Error Status [PCIe5 7.8.4.2, 7.8.4.5]
FATAL = 0x0046_2010  # those that are so from the start [PCIe5 7.8.4.4]
ERROR_STATUS, DEVICE_ERRORS, ERROR_MESSAGES = 0xF900_0000, 0x000F_0000, (0x30, 0x31, 0x33)  # [PCIe5 7.5.1.1.4, 7.5.3.5, 2.2.8.3]
INTERRUPT_STATUS, TRANSACTIONS_PENDING = 1 << 19, 1 << 21  # bits of their dwords [PCIe5 7.5.1.1.4, 7.5.3]
ALONE = 3_000  # cycles after which two notifications that waited for a vector together must be one
PATIENCE = 200_000  # cycles after which at the end everything must have come


def config_of(header):
    """Return the :class:`ringwall.rtl.config.EndpointConfig` of a log's header; :exc:`ValueError` when it has none."""
    text = header.parameters.get("config")
    try:
        parts = ast.literal_eval(text)
        parts["disks"] = tuple(BlkConfig(**disk) for disk in parts["disks"])
        parts["iommu"] = parts["iommu"] and IommuConfig(**parts["iommu"])
        parts["host_ats"] = parts.get("host_ats") and HostAtsConfig(**parts["host_ats"])
        return EndpointConfig(**parts)
    except (ValueError, TypeError, KeyError, SyntaxError) as error:
        raise ValueError(f"The header of a log must tell the configuration of a card, not {text!r}") from error


def describe_functions(config):
    """Return what each physical function of a card must say of itself in configuration space, as rtl/README.md and the standards have it.

    ``virtual`` of a disk's is what each of its virtual functions must say; those have the numbers behind all physical ones, disk by disk.
    """
    found = []
    is_multi = config.physical_functions > 1
    has_several = config.functions > 1
    first_virtual = config.physical_functions

    def extended(is_virtual=False):
        following = len(found) + 1
        aer = aer_capability(uncorrectable=REPORTED, correctable=CORRECTED, severity=FATAL)
        ari = ari_capability(0 if is_virtual or following >= config.physical_functions else following)
        return (aer, *(() if is_virtual else (serial_number_capability(config.serial_number),)),
                *((acs_capability(), ari) if has_several else ()),
                *((ats_capability(queue_depth=32),) if config.host_ats is not None else ()),
                *((pri_capability(config.host_ats.page_requests),)
                  if config.host_ats is not None and config.host_ats.page_requests and not is_virtual else ()))  # fmt: skip

    first = {"link_control_2": 3, "link_control_2_rw": 0xF}  # function 0 speaks for the link
    if config.iommu is not None:
        found.append(FunctionDescription(
            config.iommu.vendor_id, config.iommu.device_id, 0x080600, revision=1, is_multi_function=is_multi,
            bars={0: BarDescription(4096)}, capabilities=(
                pcie_capability(**LINK, **first),
                msix_capability(WALL_VECTORS, table_bar=0, table_offset=WALL_TABLE, pba_bar=0, pba_offset=WALL_PBA),
                power_capability(no_soft_reset=True)), ext_capabilities=extended()))  # fmt: skip
    for disk in config.disks:
        at_link = first if not found else {"link_control_2": 0}
        structures = [virtio_capability(kind, REGISTERS_BAR, *PLACES[kind]) for kind in (COMMON, ISR, DEVICE)]
        bars = {REGISTERS_BAR: BarDescription(0x4000), MSIX_BAR: BarDescription(0x1000)}
        plain = FunctionDescription(0x1AF4, 0x1042, 0x018000, revision=1, subsystem_vendor=0x1AF4, subsystem=0x1042,
                                    is_multi_function=is_multi, bars=bars)  # fmt: skip

        front = (pcie_capability(**LINK, **at_link, flr=True),
                 msix_capability(disk.vectors, table_bar=MSIX_BAR, table_offset=0, pba_bar=MSIX_BAR, pba_offset=MSIX_PBA))  # fmt: skip
        rest = (*structures, virtio_capability(NOTIFY, REGISTERS_BAR, *PLACES[NOTIFY], notify_off_multiplier=MULTIPLIER),
                virtio_capability(PCI_CFG))  # fmt: skip
        own, virtual = extended(), None
        if disk.virtual_functions:
            virtual = virtual_function(plain, capabilities=(*front, *rest), ext_capabilities=extended(is_virtual=True))
            own += (sriov_capability(
                disk.virtual_functions, first_offset=first_virtual - len(found), stride=1, device=0x1042, bars=bars,
                has_ari=first_virtual == config.physical_functions, dependency=len(found)),)
            first_virtual += disk.virtual_functions
        found.append(replace(plain, capabilities=(*front, power_capability(), *rest), ext_capabilities=own, virtual=virtual))
    return found


class _Table:
    """An MSI-X table as the host wrote it: what an entry may be at the moment. [PCIe5 7.7.2]"""

    def __init__(self, count, table, pba):
        self.count, self.table, self.pba = count, table, pba  # (bar, offset)
        self.clear()

    def clear(self):
        """After a reset every vector is masked; the rest of an entry is not known."""
        self.raw = [bytearray(12) + b"\1\0\0\0" for _ in range(self.count)]
        self.unknown = [set(range(12)) for _ in range(self.count)]
        self.stale = []  # (event of the write, vector, entry before it)

    def inside(self, bar, offset):
        return bar == self.table[0] and 0 <= offset - self.table[1] < 16 * self.count

    def write(self, number, offset, data):
        """Returns the vectors whose Mask bit was cleared."""
        unmasked, seen = [], set()
        for n, byte in enumerate(data, offset - self.table[1]):
            vector, at = divmod(n, 16)
            if vector >= self.count:
                break
            if vector not in seen:
                seen.add(vector)
                self.stale.append((number, vector, bytes(self.raw[vector])))
            byte &= 0xFC if at == 0 else 1 if at == 12 else 0 if at > 12 else 0xFF
            if at == 12 and self.raw[vector][12] and not byte:
                unmasked.append(vector)
            self.raw[vector][at] = byte
            self.unknown[vector].discard(at)
        return unmasked

    def flushed(self, number):
        """An answer came to what was sent as event ``number``: earlier writes are there."""
        if self.stale:
            self.stale = [one for one in self.stale if one[0] > number]

    def problem(self, offset, data):
        """Return why a read of the table cannot find ``data``."""
        for n, byte in enumerate(data, offset - self.table[1]):
            vector, at = divmod(n, 16)
            if vector < self.count and at not in self.unknown[vector] and byte != self.raw[vector][at]:
                return f"byte {at} of entry {vector} is {self.raw[vector][at]:#04x} [PCIe5 7.7.2]"
        return ""

    def matches(self, address, data):
        """Yield (vector, is masked) of every entry, as it is or may still be, that has this message."""
        message = struct.pack("<QI", address, data)
        for vector, raw in enumerate(self.raw):
            if raw[:12] == message:
                yield vector, bool(raw[12])
        for _, vector, raw in self.stale:
            if raw[:12] == message:
                yield vector, bool(raw[12])


@dataclass
class _Asked:
    """A request of the host that is not answered."""

    number: int
    tlp: object
    function: object  # or None
    place: tuple[int, int] | None = None  # BAR, offset
    writes: int = 0  # of the function, when it was sent
    completer_id: int = 0  # of the function, as of this request


@dataclass
class _Read:
    """A read of the card that is not answered."""

    cycle: int
    address: int
    left: int
    ring: WireJudge | None
    read: object
    done: int = 0


@dataclass
class _Function:
    """What is known of one function."""

    number: int
    space: ConfigSpace
    table: _Table
    transport: PciTransport | None = None
    device: DoubtfulBlkDevice | None = None
    ring: WireJudge | None = None
    routing_id: int = 0
    writes: int = 0
    drains_until: int = -1  # after a function level reset
    told: int = 0  # broken rules of the ring that were reported
    found: list = field(default_factory=list)
    before: tuple = ()  # Command, Device Control, MSI-X control in front of a write that is under way
    resets: int = 0
    grace: int = -1  # event: what was allowed before may still come until a later request is answered


class Judge(Checker):
    """Judges every TLP of a card against the golden model.

    Configuration space, virtio registers and the MSI-X table where the model knows the answer; each DMA request against the rules of
    the ring it belongs to, the limits that the host set and its tags; what requests move against a golden disk; interrupts
    against the table, masks and used indices. The first difference raises :exc:`ringwall.sim.scoreboard.Difference` with the
    last 20 events.

    A host that sends writes to a function while it waits for a read of the same one makes that answer unjudged; so does a
    read of more than 8 bytes.

    Parameters
    ----------
    card : :class:`ringwall.sim.compiled.CompiledCard` or None
        To be watched live, from its first cycle on. None: give events to :meth:`observe`.
    config : :class:`ringwall.rtl.config.EndpointConfig` or None
        Of the card, when there is none.

    Attributes
    ----------
    board : :class:`ringwall.sim.scoreboard.Scoreboard`
    functions : list
        What is known of each function.
    requests : :class:`int`
        Requests of disks that were compared with the golden ones.
    unjudged : :class:`int`
        Answers that no model determines.
    seconds : :class:`float`
        Time that judging took.
    """

    def __init__(self, card=None, *, config=None, seed=0):
        if card is None and config is None:
            raise ValueError(f"A judge must know a card or its configuration, not {card!r} and {config!r}")
        self.config = config = card.config if config is None else config
        if card is not None and card.cycle:
            raise ValueError(f"A judge must watch from the first cycle on, not from cycle {card.cycle!r}")
        self.board, self.cycle, self.number = Scoreboard([self], seed=seed), 0, 0
        self.comparisons = self.requests = self.unjudged = 0
        self.seconds = 0.0
        self.has_errors = False  # something on the link may have been an error: what the functions say of errors is not judged
        self._asked, self._reads = {}, {}
        self.functions = [self._function(n, one) for n, one in enumerate(describe_functions(config))]
        if card is not None:
            card.observe = self.observe

    def _function(self, number, description):
        space = ConfigSpace(description)
        if number < self.config.first_disk:
            return _Function(number, space, _Table(WALL_VECTORS, (0, WALL_TABLE), (0, WALL_PBA)))
        disk = self.config.disks[number - self.config.first_disk]
        made = _Function(number, space, _Table(disk.vectors, (MSIX_BAR, 0), (MSIX_BAR, MSIX_PBA)))
        made.device = DoubtfulBlkDevice(disk.capacity_sectors, serial=disk.serial)
        made.transport = PciTransport(
            offered=OFFERED, queues=(disk.queue_size,), vectors=disk.vectors, config=made.device.config(), places=PLACES,
            multiplier=MULTIPLIER, on_live=lambda: self._live(made), on_reset=lambda: self._reset(made),
            on_kick=lambda queue: made.ring and made.ring.kicked(self.cycle), on_isr=lambda value: self._isr(made, value),
            may_need_reset=lambda: made.ring is not None and made.ring.erred)  # fmt: skip
        space.window = lambda bar, offset, length, data: self._window(made, bar, offset, data)
        return made

    # -- events --

    def observe(self, event, tlp=None):
        """Take one event; others than TLPs are ignored. Raises :exc:`ringwall.sim.scoreboard.Difference`."""
        begin = time.perf_counter()
        if isinstance(event, (TlpReceived, TlpSent)):
            self.board.take(event, tlp)
        self.cycle = getattr(event, "cycle", self.cycle)
        self.seconds += time.perf_counter() - begin

    def take(self, event, tlp):
        self.number += 1
        self.cycle = event.cycle
        if isinstance(event, TlpSent):
            kind = event.dwords[0] >> 24
            return self._completed(event.dwords) if kind in (0x4A, 0x0A) else self._sent(decode(event.dwords))
        if tlp is None:
            try:
                tlp = decode(event.dwords)
            except MalformedTlp as error:
                return [Mismatch("malformed TLP [PCIe5 2.2]", error.reason, "none is")]
        self.comparisons += 1
        if stray_bits(event.dwords, tlp):
            return [Mismatch("reserved bits are set [PCIe5 2.2.1]", str(tlp), "all are 0")]
        if tlp.type.is_completion:
            return self._answered(tlp)
        if tlp.type in (TlpType.MRD, TlpType.MWR):
            return self._requested(tlp)
        if tlp.type is TlpType.MSG and tlp.message_code in ERROR_MESSAGES:
            return self._reported(tlp)
        return [Mismatch("a card does not send this [PCIe5 2.2]", str(tlp), "memory requests, completions, error messages")]

    def finish(self):
        """Judge what must have come by the end of the run; the host must have been idle for a while."""
        found = []
        for one in self.functions:
            if one.ring is not None:
                if self._is_masked(one):
                    one.ring.duties.clear()
                one.ring.end(self.cycle, is_finished=True, patience=PATIENCE)
                found += self._verdict(one)
        found += [Mismatch("a request of the host is not answered [PCIe5 2.3.1]", "nothing", str(asked.tlp))
                  for asked in self._asked.values() if asked.number + 1 < self.number]  # fmt: skip
        return found

    def end(self):
        """End the run; raises :exc:`ringwall.sim.scoreboard.Difference`."""
        self.board.finish()

    def _reported(self, tlp):
        """[PCIe5 2.2.8.3, 6.2.4]"""
        number = tlp.requester_id & 0xFF
        enable = 1 << ERROR_MESSAGES.index(tlp.message_code)
        if not self.has_errors or number >= len(self.functions) or (tlp.requester_id, tlp.tc, tlp.message_routing) != (
                self.functions[number].routing_id, 0, 0):  # fmt: skip
            return [Mismatch("message about an error [PCIe5 6.2.4]", str(tlp), "an error; a function's, class 0, to the root complex")]
        space = self.functions[number].space
        if not (space.read(space.offsets[0] + 8, 2) & enable or (enable != 1 and space.read(4, 2) & 0x100)):
            return [Mismatch("message about an error [PCIe5 6.2.5]", str(tlp), "none that Device Control or Command do not enable")]
        return []

    # -- the host asks --

    def _sent(self, tlp):
        """The card took a request of the host."""
        function, place = None, None
        if tlp.type in (TlpType.CFGRD0, TlpType.CFGWR0):
            number = tlp.completer_id & 0xFF
            function = self.functions[number] if number < len(self.functions) else None
            if function is not None and tlp.type is TlpType.CFGWR0:
                self._config_written(function, tlp)
        elif tlp.type in (TlpType.MRD, TlpType.MWR):
            function, place = self._decode(tlp.address)
            self.has_errors |= function is None or tlp.poisoned
            if function is not None and tlp.type is TlpType.MWR:
                start, length = tlp.byte_span()
                function.writes += 1
                self._written(function, place[0], place[1] + start - tlp.address, tlp.data[start - tlp.address :][:length])
        if not tlp.type.is_posted:
            self._asked[tlp.tag] = _Asked(self.number, tlp, function, place, *((function.writes, function.routing_id) if function else ()))
        return self._verdict(function) if function is not None else []

    def _decode(self, address):
        for one in self.functions:
            place = one.space.decode(address)
            if place is not None:
                return one, place
        return None, None

    def _config_written(self, function, tlp):
        function.routing_id = tlp.completer_id
        function.before = (*function.before, self._settings(function))
        function.writes += 1
        was_masked = self._is_masked(function)
        function.space.write_dword(tlp.register, tlp.first_be, int.from_bytes(tlp.data, "little"))
        if function.space.resets != function.resets:
            function.resets = function.space.resets
            self._function_reset(function)
        elif was_masked and not self._is_masked(function) and function.ring is not None:
            function.ring.merged(self.cycle - ALONE)

    def _settings(self, function):
        """Return (bus master, Device Control, MSI-X enable, Function Mask)."""
        space = function.space
        control = space.read(space.offsets[1] + 2, 2)
        return space.bus_master, space.read(space.offsets[0] + 8, 2), bool(control & 0x8000), bool(control & 0x4000)

    def _all_settings(self, function):
        """What may be in force: now, and in front of writes that are under way."""
        return [self._settings(function), *function.before]

    def _function_reset(self, function):
        """[PCIe5 6.6.2]"""
        function.table.clear()
        function.drains_until = self.cycle + 2 * self.config.completion_timeout_cycles + 10_000
        if function.transport is not None:
            function.transport.clear()
            self._reset(function)

    def _written(self, function, bar, offset, data):
        """The host wrote to a BAR."""
        if function.table.inside(bar, offset):
            unmasked = function.table.write(self.number, offset, data)
            if function.ring is not None and function.transport.queues[0].vector in unmasked:
                function.ring.merged(self.cycle - ALONE)
        elif function.transport is not None and bar == REGISTERS_BAR:
            function.transport.write(offset, data)
        elif function.transport is None and offset <= DDTP < offset + len(data) and data[DDTP - offset] & 0xF > BARE:
            raise ValueError(f"The wall must stay Bare while a judge learns from TLPs alone, not in mode {data[DDTP - offset] & 0xF!r}")

    def _window(self, function, bar, offset, data):
        """An access through PCI_CFG. [VIRTIO1.4 4.1.4.9]"""
        if data is not None:
            self._written(function, bar, offset, data)

    # -- the card answers --

    def _answered(self, tlp):
        asked = self._asked.pop(tlp.tag, None)
        if asked is None:
            return [Mismatch("answer to nothing [PCIe5 2.3.2]", str(tlp), "no request of the host has this tag")]
        request, function = asked.tlp, asked.function
        self.has_errors |= function is None or tlp.status is not CplStatus.SC
        if function is None:
            return self._differs(asked, tlp, "UR", tlp.status is CplStatus.UR and not tlp.data, "is of nobody [PCIe5 2.3.1]")
        found = self._settled(function, asked, tlp)
        if request.type in (TlpType.CFGRD0, TlpType.CFGWR0) and tlp.status is CplStatus.CRS and self.cycle < function.drains_until:
            return found
        if tlp.status is not CplStatus.SC:
            if request.type is TlpType.MRD and (asked.writes != function.writes or self.cycle < function.drains_until):
                self.unjudged += 1
                return found
            return found + self._differs(asked, tlp, "SC", False, "is of a function that is there [PCIe5 2.3.1]")
        if request.type is TlpType.CFGWR0:
            return found
        size = request.byte_span()[1]
        if asked.writes != function.writes or size > 8 or (request.type is TlpType.MRD and tlp.byte_count > 4 * tlp.length_dw):
            self.unjudged += 1
            return found
        if request.type is TlpType.CFGRD0:
            return found + self._config_answer(function, asked, tlp)
        start = request.byte_span()[0]
        data = tlp.data[start - request.address :][:size]
        text = self._bar_problem(function, asked.place[0], asked.place[1] + start - request.address, data)
        if text:
            found.append(Mismatch(f"register of function {function.number} is read wrong", f"{data[::-1].hex()} for {request}", text))
        return found + self._verdict(function)

    def _settled(self, function, asked, tlp):
        """Whatever was sent before this request is in force; what the card did before it answered was seen before."""
        function.table.flushed(asked.number)
        found = []
        wanted = asked.completer_id or function.number  # bus and device 0 until a write tells them
        if tlp.completer_id != wanted:
            found.append(Mismatch("completer ID [PCIe5 2.2.9]", f"{tlp.completer_id:#06x}: {tlp}", f"{wanted:#06x}"))
        if asked.tlp.type is TlpType.CFGWR0:
            function.before = function.before[1:]
            function.grace = self.number
        elif function.grace < asked.number:
            function.grace = -1
        return found

    def _differs(self, asked, tlp, wanted, is_right, why):
        return [] if is_right else [Mismatch(f"answer to a request that {why}", f"{tlp} for {asked.tlp}", wanted)]

    def _config_answer(self, function, asked, tlp):
        """[PCIe5 7.5]"""
        request, space = asked.tlp, function.space
        card = int.from_bytes(tlp.data, "little")
        if function.transport is not None and request.register == space.offsets[-1] + 16:
            return self._window_answer(function, request, card)
        pcie = space.offsets[0]
        free = {4: INTERRUPT_STATUS, pcie + 8: TRANSACTIONS_PENDING}.get(request.register, 0)
        if self.has_errors:
            at = request.register - space.ext_offsets[0]
            is_log = at in (0x04, 0x10) or 0x18 <= at < 0x2C  # status, pointer, header
            free |= {4: ERROR_STATUS, pcie + 8: DEVICE_ERRORS}.get(request.register, 0xFFFF_FFFF if is_log else 0)
        mask = sum(0xFF << 8 * n for n in range(4) if request.first_be >> n & 1)
        model = space.read_dword(request.register)
        self.comparisons += 1
        if (card ^ model) & mask & ~free:
            return [Mismatch(f"configuration space of function {function.number} at {request.register:#x} [PCIe5 7.5]",
                             f"{card:#010x}", f"{model:#010x}")]  # fmt: skip
        return []

    def _window_answer(self, function, request, card):
        """A read through PCI_CFG is a read of the BAR. [VIRTIO1.4 4.1.4.9]"""
        space = function.space
        bar, at, length = space.read(space.offsets[-1] + 4, 1), *(space.read(space.offsets[-1] + n, 4) for n in (8, 12))
        if length not in (1, 2, 4) or at % length or not request.first_be:
            self.unjudged += 1
            return []
        data = card.to_bytes(4, "little")[:length]
        if not any(bar == REGISTERS_BAR and low <= at and at + length <= low + size for low, size in PLACES.values()):
            self.unjudged += 1
            return []
        text = self._bar_problem(function, bar, at, data)
        return [Mismatch("register is read wrong through PCI_CFG [VIRTIO1.4 4.1.4.9]", data[::-1].hex(), text)] if text else []

    def _bar_problem(self, function, bar, offset, data):
        """Return why a read of a BAR cannot find this."""
        self.comparisons += 1
        table = function.table
        if table.inside(bar, offset):
            return table.problem(offset, data)
        at = offset - table.pba[1]
        if bar == table.pba[0] and 0 <= at < 8:
            bits = int.from_bytes(data, "little") << 8 * at
            return self._pending_problem(function, bits)
        if function.transport is not None and bar == REGISTERS_BAR:
            return function.transport.problem(offset, data)
        self.unjudged += 1
        return ""

    def _pending_problem(self, function, bits):
        """[PCIe5 7.7.2.7]"""
        if bits >> function.table.count:
            return "no pending bit behind the last vector [PCIe5 7.7.2.7]"
        for vector in range(function.table.count):
            if bits >> vector & 1 and not any(True for _ in self._duties(function, vector)):
                return f"vector {vector} is not pending: nothing happened [PCIe5 7.7.2.7]"
        return ""

    def _duties(self, function, vector):
        """Yield what may make a vector pending."""
        transport = function.transport
        if transport is None or function.ring is None:
            return
        if transport.queues[0].vector == vector:
            yield from function.ring.duties
        if transport.config_vector == vector and function.ring.erred:
            yield function.ring

    # -- the card asks --

    def _requested(self, tlp):
        function = self.functions[tlp.requester_id & 0xFF] if tlp.requester_id & 0xFF < len(self.functions) else None
        if function is None or tlp.requester_id != function.routing_id:
            return [Mismatch("requester ID is of no function of the card [PCIe5 2.2.6.2]", str(tlp),
                             " ".join(f"{one.routing_id:#06x}" for one in self.functions))]  # fmt: skip
        found = self._limits(function, tlp)
        if found or (self.cycle < function.drains_until and function.ring is None):
            if tlp.type is TlpType.MRD:
                self._reads[tlp.requester_id, tlp.tag] = _Read(self.cycle, *tlp.byte_span(), None, None)
            return found
        start, length = tlp.byte_span()
        if function.ring is None and not self._is_message(function, tlp):
            rule = RULES["V001"]
            return [Mismatch(f"V001 of function {function.number} [VIRTIO1.4 {rule[1]}]", str(tlp), rule[2])]
        if tlp.type is TlpType.MRD:
            read = function.ring.requested(self.cycle, start, length)
            self._reads[tlp.requester_id, tlp.tag] = _Read(self.cycle, start, length or 1, function.ring, read)
        elif self._is_message(function, tlp):
            found = self._message(function, tlp)
        elif tlp.has_gaps:
            for at, byte in tlp.enabled_bytes():
                function.ring.wrote(self.cycle, at, bytes([byte]))
        else:
            function.ring.wrote(self.cycle, start, tlp.data[start - tlp.address :][:length])
        return found + self._verdict(function)

    def _limits(self, function, tlp):
        """What the host allows the function to send. [PCIe5 2.2.7, 7.5.3.4]"""
        found = []

        def broken(rule, model):
            found.append(Mismatch(rule, str(tlp), model))

        settings = self._all_settings(function)
        controls = [control for _, control, _, _ in settings]
        is_read = tlp.type is TlpType.MRD
        is_quiet = self.cycle >= function.drains_until  # else a function level reset is under way: old requests may come
        if is_quiet and not any(master for master, _, _, _ in settings) and not (is_read and function.grace >= 0):
            broken("request without Bus Master Enable [PCIe5 7.5.1.1.3]", "none while it is 0")
        shift = 12 if is_read else 5
        most = max(128 << (control >> shift & 7) for control in controls)
        if 4 * tlp.length_dw > most and is_quiet:
            broken(f"longer than {'Max_Read_Request_Size' if is_read else 'Max_Payload_Size'} [PCIe5 7.5.3.4]", f"at most {most} bytes")
        if tlp.tc or tlp.at or tlp.ido or tlp.td or tlp.poisoned or tlp.pasid is not None:
            broken("traffic class, address type, IDO, digest, poison or PASID [PCIe5 2.2.6]", "none of them")
        relaxed, no_snoop = (any(control >> bit & 1 for control in controls) for bit in (4, 11))
        if (tlp.relaxed_ordering and not relaxed) or (tlp.no_snoop and not no_snoop):
            broken("attribute that is not enabled [PCIe5 7.5.3.4]", "0")
        if is_read:
            if tlp.tag >= (256 if any(control >> 8 & 1 for control in controls) else 32) and is_quiet:
                broken("tag is wider than enabled [PCIe5 2.2.6.2]", "5 bits")
            old = self._reads.get((tlp.requester_id, tlp.tag))
            if old is not None and self.cycle - old.cycle < self.config.completion_timeout_cycles // 2:
                broken("tag is still in use [PCIe5 2.2.6.2]", f"asked in cycle {old.cycle} for {old.left} bytes at {old.address:#x}")
        return found

    def _completed(self, dwords):
        """The card got an answer. [PCIe5 2.2.9]"""
        key = dwords[2] >> 16, dwords[2] >> 8 & 0xFF
        one = self._reads.get(key)
        self.has_errors |= one is None or bool(dwords[1] >> 13 & 7 or dwords[0] >> 14 & 1)
        if one is None:
            return []  # the card must drop it
        function = self.functions[key[0] & 0xFF]
        if dwords[0] >> 24 == 0x0A or dwords[1] >> 13 & 7 or dwords[0] >> 14 & 1:
            del self._reads[key]
            if one.ring is not None:
                one.ring.refused(self.cycle, one.read)
            return self._verdict(function)
        skip, count = dwords[2] & 3, len(dwords) - 3
        data = struct.pack(f"<{count}I", *dwords[3:])[skip : skip + one.left]
        at, one.done, one.left = one.done, one.done + len(data), one.left - len(data)
        if not one.left:
            del self._reads[key]
        if one.ring is not None:
            one.ring.answered(self.cycle, one.read, at, data, not one.left)
            return self._verdict(function)
        return []

    # -- interrupts --

    def _is_masked(self, function):
        """The queue's vector cannot fire now."""
        if function.transport is None:
            return False
        vector = function.transport.queues[0].vector
        master, _, enabled, mask = self._settings(function)
        return not (master and enabled and not mask and vector < function.table.count and not function.table.raw[vector][12])

    def _is_message(self, function, tlp):
        if tlp.type is not TlpType.MWR or (tlp.length_dw, tlp.first_be) != (1, 15):
            return False
        return any(True for _ in function.table.matches(tlp.address, int.from_bytes(tlp.data, "little")))

    def _message(self, function, tlp):
        """[PCIe5 6.1.4]"""
        self.comparisons += 1
        matches = list(function.table.matches(tlp.address, int.from_bytes(tlp.data, "little")))
        settings = self._all_settings(function)
        if all(is_masked for _, is_masked in matches):
            return [Mismatch("interrupt of a masked vector [PCIe5 6.1.4.5, 7.7.2.6]", str(tlp), f"vector {matches[0][0]} is masked")]
        if not any(enabled and not mask for _, _, enabled, mask in settings):
            return [Mismatch("interrupt while MSI-X is disabled or the function masked [PCIe5 7.7.2.2]", str(tlp), "none")]
        if tlp.relaxed_ordering:
            return [Mismatch("interrupt that may overtake the writes before it [PCIe5 6.1.4]", str(tlp), "relaxed ordering is 0")]
        transport, ring = function.transport, function.ring
        vectors = [vector for vector, is_masked in matches if not is_masked]
        if transport is not None and ring is not None:
            if transport.queues[0].vector in vectors and not (transport.config_vector in vectors and ring.erred and not ring.duties):
                ring.notified(self.cycle)
                return []
            if transport.config_vector in vectors and ring.erred:
                return []
        elif self.cycle < function.drains_until:
            return []
        return [Mismatch("interrupt for which there is no reason [VIRTIO1.4 2.3, 4.1.5.3]", str(tlp), f"vectors {vectors} have none")]

    def _isr(self, function, value):
        """[VIRTIO1.4 4.1.4.5]"""
        ring = function.ring
        if value & ~3:
            return "only bits 0 and 1 exist [VIRTIO1.4 4.1.4.5]"
        if value & 2 and not (ring is not None and ring.erred):
            return "the configuration did not change [VIRTIO1.4 4.1.4.5]"
        if value & 1 and not any(enabled for _, _, enabled, _ in self._all_settings(function)):
            if ring is None:
                return "no queue was live [VIRTIO1.4 4.1.4.5]"
            has_vector, ring.has_vector = ring.has_vector, True
            ring.notified(self.cycle)
            ring.has_vector = has_vector
        return ""

    # -- rings --

    def _live(self, function):
        """The driver set DRIVER_OK."""
        queue, transport = function.transport.queues[0], function.transport
        if not queue.enabled:
            return
        try:
            layout = SplitLayout(queue.size, queue.desc, queue.driver, queue.device)
        except ValueError:
            function.found.append(Mismatch("a queue that no driver may ask for", repr(queue), "not judged"))
            return
        function.ring = WireJudge(
            layout, has_vector=queue.vector < transport.vectors, event_idx=bool(transport.accepted >> Feature.EVENT_IDX & 1),
            indirect=bool(transport.accepted >> Feature.INDIRECT_DESC & 1),
            on_returned=lambda one, length: self._returned(function, one, length),
            on_lost=lambda one: self._lost(function, one))  # fmt: skip
        function.told = 0

    def _reset(self, function):
        """Nothing of its rings goes on."""
        if function.ring is not None:
            function.ring.ended()
            function.found += self._verdict(function)
            function.ring = None

    def _lost(self, function, one):
        """A chain that is out will not come back: what it should have written is in doubt."""
        header = bytes(one.sent[:HEADER_BYTES])
        if one.unfetched(HEADER_BYTES) is None and len(header) == HEADER_BYTES and int.from_bytes(header[:4], "little") == BlkType.OUT:
            function.device.lost(header, one.readable_bytes)

    def _verdict(self, function):
        """Return what was found of a function since last time."""
        found, function.found = function.found, []
        ring = function.ring
        if ring is not None and len(ring.found) > function.told:
            broken, function.told = ring.found[function.told :], len(ring.found)
            found = [Mismatch(f"{one.rule} of function {function.number} [VIRTIO1.4 {RULES[one.rule][1]}]", one.what, RULES[one.rule][2])
                     for one in broken] + found  # fmt: skip
        return found

    def _returned(self, function, one, length):
        """Execute a returned chain on the golden disk and compare. [VIRTIO1.4 5.2.6]"""
        self.comparisons += 1
        head, device, found = one.chain.head, function.device, function.found
        if not one.chain.is_complete:
            if not function.ring.erred:
                return  # a blind return, which the ring's judge tells
            if one.error not in ("", READABLE_LAST, TOO_LONG):
                found.append(Mismatch(f"chain {head} is returned although it has no end [VIRTIO1.4 2.7.5.2]",
                                      f"length {length}", one.error))  # fmt: skip
            self._lost(function, one)
            return
        room, size = one.writable_bytes, one.readable_bytes
        if size > KEPT_BYTES or room > KEPT_BYTES:
            self._lost(function, one)
            return
        self.requests += 1
        after, sent = bytes(one.got.ljust(room, b"\0")), bytes(one.sent.ljust(size, b"\0"))
        spans = one.written.spans
        status = after[-1] if room and spans and spans[-1][1] == room else None
        key = int.from_bytes(sent[:4], "little"), int.from_bytes(sent[8:16], "little")
        is_doubtful = bool(one.lost or (one.pending and status != BlkStatus.OK))  # its answers may have been bad, or none
        gap = one.unfetched(size if key[0] == BlkType.OUT and status == BlkStatus.OK else min(HEADER_BYTES, size))
        if gap is not None:
            if not is_doubtful or status == BlkStatus.OK:
                found.append(Mismatch(f"chain {head} of function {function.number} is carried out unread [VIRTIO1.4 5.2.6]",
                                      f"status {status}", f"readable bytes {gap[0]} to {gap[1]} were not read"))  # fmt: skip
            return
        if is_doubtful:
            device.doubtful.add(key)
        result = device.execute(sent, room)
        if is_doubtful:
            device.doubtful.discard(key)
            if status == BlkStatus.OK:
                device.carry_out(sent)
        problem = result.problem(bytes(room), after, 0)  # the length is judged by V040 and V041
        if not problem and status is None and room and size >= HEADER_BYTES:
            problem = "the status byte was not written"
        if not problem and status == BlkStatus.OK and key[0] == BlkType.IN and one.written.prefix < room:
            problem = f"only {one.written.prefix} of {room} bytes were written"
        if problem:
            longest = max((outcome.data for outcome in getattr(result, "real", result).outcomes), key=len)
            at = next((n for n, (card, model) in enumerate(zip(after, longest)) if card != model), 0)
            found.append(Mismatch(f"chain {head} of function {function.number}: {room} writable bytes are not what the device answers "
                                  "[VIRTIO1.4 5.2.6]", f"from byte {at} on {after[at : at + 32].hex(' ', 4)}", problem))  # fmt: skip


def judge_log(path, *, progress=lambda count: None):
    """Judge a recorded log of a whole run; return the :class:`Judge` when nothing differs.

    ``progress(count)`` is called every thousand events.

    Raises
    ------
    :exc:`ringwall.sim.scoreboard.Difference`
        At the first event that the golden model does not allow.
    :exc:`ValueError`
        When the log is none of a whole run of a compiled card.
    """
    header, events = read_log(path)
    if header.parameters.get("begin") != 0:
        raise ValueError(f"A log to judge must begin at cycle 0, not {header.parameters.get('begin')!r}")
    judge = Judge(config=config_of(header), seed=header.seed)
    for count, event in enumerate(events):
        judge.observe(event)
        if count % 1000 == 0:
            progress(count)
    judge.end()
    return judge
