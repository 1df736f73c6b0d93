"""Functions as data: identity, BARs and capabilities, from which configuration space is made."""

from dataclasses import dataclass, field, replace

from ..regs.table import Block, Field, Map, Register
from ..spec import pcie_config as spec
from .bars import Bar, Rom, bar_registers, check, check_bars
from .capabilities import (
    HWINIT,
    RO,
    RW,
    RW1C,
    Card,
    MsiCapability,
    MsixCapability,
    PcieCapability,
    PowerCapability,
    VendorCapability,
    VirtioCapability,
    VirtioWindow,
)
from .extended import (
    AcsCapability,
    AerCapability,
    AriCapability,
    AtsCapability,
    DvsecCapability,
    PasidCapability,
    PriCapability,
    SerialNumber,
    SriovCapability,
    VsecCapability,
)

__all__ = [
    "STRUCTURES", "AcsCapability", "AerCapability", "AriCapability", "AtsCapability", "Bar", "Capability", "DvsecCapability",
    "ExtendedCapability", "FunctionDescription", "MsiCapability", "MsixCapability", "PasidCapability", "PcieCapability",
    "PowerCapability", "PriCapability", "Rom", "SerialNumber", "SriovCapability", "VendorCapability", "VirtioCapability", "VirtioWindow",
    "VsecCapability", "bars_of", "check_functions", "physical_count", "virtual_bars_of", "virtual_functions_of",
]  # fmt: skip

STRUCTURES = 4  # virtio structures of one function, at most

Capability = PowerCapability | MsiCapability | PcieCapability | MsixCapability | VendorCapability | VirtioCapability | VirtioWindow
ExtendedCapability = (
    AerCapability | SerialNumber | AtsCapability | PriCapability | PasidCapability | AcsCapability | AriCapability | SriovCapability
    | VsecCapability | DvsecCapability
)  # fmt: skip
_PHYSICAL = (SriovCapability, PriCapability, PasidCapability, SerialNumber)  # what only physical functions have [PCIe5 9.3.6]
_REPEATABLE = (VendorCapability, VirtioCapability, VsecCapability, DvsecCapability)


def _check_bits(name, value, width):
    check(isinstance(value, int) and 0 <= value < 1 << width, f"{name} must be a number of {width} bits", value)


@dataclass(frozen=True)
class FunctionDescription:
    """One function as its configuration space shows it.

    Capabilities appear in the chain in the order given. One without an offset of its own (``at``) follows the one in front of
    it, the first at 0x40. So do ``extended`` capabilities, from 0x100 on. ``reports_errors``: Status and Device Status hold what
    :class:`.errors.Errors` finds. ``is_virtual``: made by :meth:`virtual`; ``bars`` are then those that its physical function's SR-IOV
    capability has for it, and no registers of its own.

    Raises
    ------
    :exc:`ValueError`
        When a number does not fit, BARs or capabilities overlap, a capability names a place that no BAR has, or lacks another
        that it goes with.
    """

    vendor_id: int
    device_id: int
    class_code: int  # 24 bits: class, subclass, programming interface
    bars: tuple[Bar | Rom, ...] = ()
    capabilities: tuple[Capability, ...] = (PcieCapability(),)
    revision: int = 1
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0
    extended: tuple[ExtendedCapability, ...] = field(default=())
    reports_errors: bool = False
    is_virtual: bool = False

    def __post_init__(self):
        for name, value, width in (
            ("Vendor ID", self.vendor_id, 16), ("Device ID", self.device_id, 16), ("Class code", self.class_code, 24),
            ("Revision", self.revision, 8), ("Subsystem vendor ID", self.subsystem_vendor_id, 16), ("Subsystem ID", self.subsystem_id, 16),
        ):  # fmt: skip
            _check_bits(name, value, width)
        check(self.is_virtual or self.vendor_id != 0xFFFF, "Vendor ID must be one that an absent function does not show", self.vendor_id)
        check_bars(self.bars)
        spans = []
        for capability in self.capabilities:
            for index, offset, length in getattr(capability, "spans", ()):
                bar = self.bar(index)
                check(isinstance(bar, Bar), f"Capability {capability.name} must lie in a BAR of the function", index)
                check(offset >= 0 and offset + length <= bar.size_bytes,
                       f"Capability {capability.name} must lie inside the {bar.size_bytes} bytes of BAR {index}", (offset, length))
                for other, start, size in spans:
                    check(other != index or offset >= start + size or start >= offset + length,
                           f"Capability {capability.name} must not share bytes of BAR {index} with another", (offset, length))
                spans.append((index, offset, length))
        for capability in (*self.capabilities, *self.extended):
            kind = type(capability)
            found = [other for other in (*self.capabilities, *self.extended) if isinstance(other, kind)]
            check(len(found) == 1 or kind in _REPEATABLE, f"A function must have at most one {kind.__name__}", found)
        for kind, other in ((AerCapability, PcieCapability), (PriCapability, AtsCapability)):
            check(not self.capability(kind) or self.capability(other), f"A function with {kind.__name__} must have {other.__name__}", None)
        check(not self.extended or self.capability(PcieCapability),
              "Extended capabilities must be with a PcieCapability", self.capabilities)  # fmt: skip
        check(not self.reports_errors or self.capability(PcieCapability),
              "A function that reports errors must have a PcieCapability", self.capabilities)  # fmt: skip
        check(not self.capability(AerCapability) or self.reports_errors,
              "A function with AerCapability must be one that reports errors", self.reports_errors)  # fmt: skip
        structures = [capability for capability in self.capabilities if isinstance(capability, VirtioCapability)]
        check(len(structures) <= STRUCTURES, f"A function must have at most {STRUCTURES} virtio structures", len(structures))
        self.map()

    def bar(self, index):
        """Return the BAR that starts at register ``index``, or None."""
        return next((bar for bar in self.bars if bar.index == index), None)

    def capability(self, kind):
        """Return the capability of class ``kind``, or None."""
        return next((capability for capability in (*self.capabilities, *self.extended) if isinstance(capability, kind)), None)

    def virtual(self):
        """Return the description of each virtual function of this one. [PCIe5 9.3.4, 9.3.5, 9.3.6]

        It has what a virtual function may have of the physical one's capabilities; IDs read FFFF, a function level reset is always there.

        Raises
        ------
        :exc:`ValueError`
            If there is no SriovCapability, or a capability lies in a BAR that virtual functions do not have.
        """
        sriov = self.capability(SriovCapability)
        check(sriov, "A function with virtual ones must have an SriovCapability", sriov)
        capabilities = [c for c in self.capabilities if not isinstance(c, PowerCapability)]
        return replace(
            self, vendor_id=0xFFFF, device_id=0xFFFF, bars=sriov.bars, is_virtual=True,
            capabilities=tuple(replace(c, has_flr=True) if isinstance(c, PcieCapability) else c for c in capabilities),
            extended=tuple(c for c in self.extended if not isinstance(c, _PHYSICAL)))  # fmt: skip

    def map(self, number=0, count=1):
        """Return the :class:`..regs.table.Map` of configuration space as function ``number`` of a card of ``count`` physical ones."""
        card = Card(self, number, count)
        places = self._places(self.capabilities, spec.HEADER_BYTES, spec.CAPABILITIES_END)
        blocks = [self._header(places[0] if places else 0, count > 1)]
        for capability, at, following in zip(self.capabilities, places, (*places[1:], 0)):
            blocks.append(Block(capability.name, at, capability.size_bytes, (
                Register("id", 0, 1, (Field("value", 0, 8, reset=capability.id, doc="capability ID"),)),
                Register("next", 1, 1, (Field("value", 0, 8, reset=following, doc="offset of the next capability; 0 for none"),)),
                *capability.registers(card),
            )))  # fmt: skip
        places = self._places(self.extended, spec.CAPABILITIES_END, spec.SPACE_BYTES)
        check(not places or places[0] == spec.CAPABILITIES_END, "The first extended capability must be at 0x100", places)
        for capability, at, following in zip(self.extended, places, (*places[1:], 0)):
            blocks.append(Block(capability.name, at, capability.size_bytes, (
                Register("extended_header", 0, 4, (
                    Field("id", 0, 16, reset=capability.id, doc="extended capability ID"),
                    Field("version", 16, 4, reset=capability.version, doc="of the capability"),
                    Field("next", 20, 12, reset=following, doc="offset of the next extended capability; 0 for none"),
                )),
                *capability.registers(card),
            )))  # fmt: skip
        return Map(spec.SPACE_BYTES, blocks)

    def markdown(self, number=0, count=1):
        """Return the registers of the function as Markdown; see :meth:`..regs.table.Map.markdown`."""
        title = f"# Function {number}: {self.vendor_id:04x}:{self.device_id:04x}, class {self.class_code:06x}\n\n"
        return title + self.map(number, count).markdown()

    def _places(self, capabilities, start, limit):
        places, end = [], start
        for capability in capabilities:
            at = end if capability.at is None else capability.at
            check(at % 4 == 0, f"Offset of capability {capability.name} must be a multiple of 4", at)
            check(at + capability.size_bytes <= limit, f"Block {capability.name} must lie below {limit:#x}", hex(at))
            what = "header" if start == spec.HEADER_BYTES else "the first 256 bytes"
            check(at >= start, f"Capability {capability.name} must not overlap {what}", hex(at))
            places.append(at)
            end = at + capability.size_bytes + -capability.size_bytes % 4
        return places

    def _header(self, first_capability, is_multifunction):
        def constant(name, offset, size, value, doc, access=RO):
            return Register(name, offset, size, (Field("value", 0, 8 * size, access, value, doc=doc),))

        errors = tuple(Field(name, bit, 1, RW1C, doc="it happened") for name, bit in spec.STATUS_ERRORS) if self.reports_errors else ()
        own = not self.is_virtual  # what a virtual function does not have [PCIe5 9.3.4.1]
        software = RW if own else RO
        physical = (
            *((Field("memory_enable", 1, 1, RW, doc="BARs are decoded"),) if self.bars else ()),
            Field("parity_response", 6, 1, RW, doc="Master Data Parity Error may be set"),
            Field("serr_enable", 8, 1, RW, doc="uncorrectable errors are reported, whatever Device Control says"),
            Field("intx_disable", 10, 1, RW, doc="no INTx"),
        )
        return Block("header", 0, spec.HEADER_BYTES, (
            constant("vendor_id", 0x00, 2, self.vendor_id, "manufacturer"),
            constant("device_id", 0x02, 2, self.device_id, "kind of function"),
            Register("command", 0x04, 2, (
                Field("bus_master", 2, 1, RW, doc="requests may be sent"),
                *(physical if own else ()),
            )),
            Register("status", 0x06, 2, (
                *((Field("interrupt", 3, doc="an interrupt waits"),) if own else ()),
                Field("capabilities", 4, reset=int(bool(self.capabilities)), doc="there is a capability"),
                *errors,
            )),
            constant("revision", 0x08, 1, self.revision, "of the function"),
            constant("programming_interface", 0x09, 1, self.class_code & 0xFF, "class code, bits 7:0"),
            constant("class", 0x0A, 2, self.class_code >> 8, "class code, bits 23:8"),
            constant("cache_line_size", 0x0C, 1, 0, "no effect", software),
            Register("header_type", 0x0E, 1, (Field("multifunction", 7, reset=int(own and is_multifunction), doc="one of several"),)),
            *bar_registers(self.bars if own else (), spec.BAR_0),
            constant("subsystem_vendor_id", 0x2C, 2, self.subsystem_vendor_id, "manufacturer of the card", HWINIT),
            constant("subsystem_id", 0x2E, 2, self.subsystem_id, "kind of card", HWINIT),
            constant("capabilities_pointer", 0x34, 1, first_capability, "offset of the first capability; 0 for none"),
            constant("interrupt_line", 0x3C, 1, 0, "for software", software),
        ))  # fmt: skip


def check_functions(functions):
    """Return ``functions`` as a tuple: physical ones, then virtual ones.

    Raises
    ------
    :exc:`ValueError`, :exc:`TypeError`
        When they are not 1 to 8 descriptions, or one does not fit its card: virtual functions must be where the SR-IOV capability of
        their physical function says, all of them or none.
    """
    functions = tuple(functions)
    check(1 <= len(functions) <= 8, "Functions of a card must be between 1 and 8", len(functions))
    for function in functions:
        if not isinstance(function, FunctionDescription):
            raise TypeError(f"A function must be a FunctionDescription, not {function!r}")
    count = physical_count(functions)
    check(not any(function.is_virtual for function in functions[:count]), "Virtual functions must be behind physical ones", functions)
    places = {}
    for number, function in enumerate(functions[:count]):
        sriov = function.capability(SriovCapability)
        check(count > 1 or sriov or not function.capability(AcsCapability),
              "AcsCapability must not be on a card of one function", count)  # fmt: skip
        if sriov:
            check(number + sriov.first_offset >= count,
                  f"The first virtual function must lie behind the {count} functions", sriov.first_offset)  # fmt: skip
            for place in range(number + sriov.first_offset, number + sriov.first_offset + sriov.total * sriov.stride, sriov.stride):
                check(place not in places, "Virtual functions must have a number each", place)
                places[place] = function
    if count < len(functions):
        found = {number: places[number].virtual() for number in places}
        check(found == dict(enumerate(functions[count:], count)),
              "Virtual functions must be those of the SR-IOV capabilities, all of them", functions[count:])  # fmt: skip
    return functions


def physical_count(functions):
    """Return how many of ``functions`` are physical ones."""
    return sum(not function.is_virtual for function in functions)


def bars_of(functions):
    """Return ``(function, Bar)`` for all BARs of physical functions: the order of every port that carries BAR values."""
    return tuple((number, bar) for number, function in enumerate(functions) if not function.is_virtual for bar in function.bars)


def virtual_functions_of(functions):
    """Return ``{number: (physical function, n)}``: virtual function ``number`` is the one with NumVFs > n of that physical one."""
    found = {}
    for physical, function in enumerate(functions):
        sriov = function.capability(SriovCapability)
        for n in range(sriov.total if sriov else 0):
            number = physical + sriov.first_offset + n * sriov.stride
            if number < len(functions):
                found[number] = physical, n
    return found


def virtual_bars_of(functions):
    """Return ``(physical function, Bar)`` for all BARs of virtual functions: the order of every port that carries those."""
    physical = sorted({owner for owner, _ in virtual_functions_of(functions).values()})
    return tuple((number, bar) for number in physical for bar in functions[number].capability(SriovCapability).bars)
