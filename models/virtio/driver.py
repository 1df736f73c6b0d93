"""A virtio driver over PCI, as software of the host: it finds the structures, brings a device up, rings doorbells.

Every method that touches the device is a generator of operations of :mod:`ringwall.models.host`. [VIRTIO1.4 3.1, 4.1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ..host import ConfigRead, ConfigWrite, Delay, FunctionInfo, MemoryRead, MemoryWrite, Software
from .ring import RingDriver, RingLayout

__all__ = ["FIELDS", "NO_VECTOR", "OPTIONAL_FIELDS", "DeviceStatus", "DriverError", "Feature", "Structure", "StructureType",
           "VirtioPciDriver"]  # fmt: skip

VENDOR = 0x1AF4  # [VIRTIO1.4 4.1.2]
DEVICE_BASE = 0x1040  # + device type [VIRTIO1.4 4.1.2]
VENDOR_CAPABILITY = 0x09  # [VIRTIO1.4 4.1.4]
NO_VECTOR = 0xFFFF  # [VIRTIO1.4 4.1.5.1.2]
FEATURE_WINDOWS = 4  # of 32 bits: features up to 127 exist [VIRTIO1.4 2.2]


class DeviceStatus(IntEnum):
    """Bits of the device status. [VIRTIO1.4 2.1]"""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128


class Feature(IntEnum):
    """Numbers of the feature bits that belong to no device type. [VIRTIO1.4 6]"""

    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43


# What no device may offer: UNUSED; bits that are reserved. [VIRTIO1.4 2.2, 6]
NEVER_OFFERED = 1 << 30 | sum(1 << bit for bit in range(44, 50))


class StructureType(IntEnum):
    """cfg_type of a capability. [VIRTIO1.4 4.1.4]"""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_CFG = 5


# Field of the common configuration -> (offset, bytes). [VIRTIO1.4 4.1.4.3]
FIELDS = {
    "device_feature_select": (0x00, 4),
    "device_feature": (0x04, 4),
    "driver_feature_select": (0x08, 4),
    "driver_feature": (0x0C, 4),
    "config_msix_vector": (0x10, 2),
    "num_queues": (0x12, 2),
    "device_status": (0x14, 1),
    "config_generation": (0x15, 1),
    "queue_select": (0x16, 2),
    "queue_size": (0x18, 2),
    "queue_msix_vector": (0x1A, 2),
    "queue_enable": (0x1C, 2),
    "queue_notify_off": (0x1E, 2),
    "queue_desc": (0x20, 8),
    "queue_driver": (0x28, 8),
    "queue_device": (0x30, 8),
}
COMMON_BYTES = 0x38
# Fields that are there with NOTIF_CONFIG_DATA, with RING_RESET.
OPTIONAL_FIELDS = {"queue_notif_config_data": (0x38, 2), "queue_reset": (0x3A, 2)}
NEEDED_BYTES = {StructureType.COMMON: COMMON_BYTES, StructureType.NOTIFY: 2, StructureType.ISR: 1}
ALIGNMENT = {StructureType.COMMON: 4, StructureType.NOTIFY: 2, StructureType.ISR: 1, StructureType.DEVICE: 4}  # V076, V092, V101
CAP_LEN = {StructureType.NOTIFY: 20, StructureType.PCI_CFG: 20}  # others 16 (V074)


class DriverError(Exception):
    """The device does not let the driver go on; says why."""


@dataclass(frozen=True, slots=True)
class Structure:
    """One structure: ``length`` bytes at ``offset`` of a BAR, which is at ``address``; announced at ``capability``."""

    capability: int
    bar: int
    offset: int
    length: int
    address: int


class VirtioPciDriver:
    """Brings up one virtio function that `enumerate` found.

    A device that breaks a rule without stopping the driver is noted in `problems`, by the rule's number; one that stops it raises
    :exc:`DriverError`. Every wait ends.

    Parameters
    ----------
    info : :class:`ringwall.models.host.FunctionInfo`
        The function, its BARs placed.
    polls : :class:`int`
        How often a reset is looked at before the driver gives up.
    poll_cycles : :class:`int`
        Cycles between two looks.

    Attributes
    ----------
    structures : dict of :class:`StructureType` -> :class:`Structure`
        The first usable one of each type; PCI_CFG has no place in a BAR.
    features : :class:`int`
        What was negotiated.
    notify_at : dict of :class:`int`
        Queue -> address of its doorbell.
    notify_value : dict of :class:`int`
        Queue -> what its doorbell is told: its number, or its configuration data with NOTIF_CONFIG_DATA.
    problems : list of :class:`str`
        Rules that the device broke.
    """

    def __init__(self, info: FunctionInfo, *, polls: int = 1000, poll_cycles: int = 16):
        if polls < 1 or poll_cycles < 0:
            raise ValueError(f"A reset must be looked at once at least, after no negative time, not {polls!r} times after {poll_cycles!r}")
        self.info, self.polls, self.poll_cycles = info, polls, poll_cycles
        self.structures: dict[StructureType, Structure] = {}
        self.notify_multiplier = 0
        self.offered = self.features = 0
        self.notify_at: dict[int, int] = {}
        self.notify_value: dict[int, int] = {}
        self.problems: list[str] = []
        self._mapped: set[tuple[str, int]] = set()  # vector fields written since the reset, and of which queue

    # -- structures --

    def find(self) -> Software:
        """Find the structures, best first. [VIRTIO1.4 4.1.4]"""
        info = self.info
        if info.vendor != VENDOR:
            raise DriverError(f"function {info.function} has vendor ID {info.vendor:#06x}, not {VENDOR:#06x}")
        if not DEVICE_BASE <= info.device < DEVICE_BASE + 0x40:
            raise DriverError(f"function {info.function} has device ID {info.device:#06x}, not one of modern virtio")
        if info.revision < 1:
            self.problems.append(f"V071: revision is {info.revision}, should be 1 or more")
        self.structures.clear()
        self.notify_multiplier = 0
        for at in info.capabilities.get(VENDOR_CAPABILITY, []):
            yield from self._look_at(at)
        for kind, rule in ((StructureType.COMMON, "V077"), (StructureType.NOTIFY, "V091"), (StructureType.ISR, "V095")):
            if kind not in self.structures:
                raise DriverError(f"function {info.function} has no {kind.name} structure that can be used ({rule})")
        if StructureType.PCI_CFG not in self.structures:
            self.problems.append("V106: no PCI_CFG capability")

    def _look_at(self, at: int) -> Software:
        """Take note of the structure that one capability announces, if it is the first usable one of its type."""
        number = self.info.function
        head = yield ConfigRead(number, at, 4)
        length, raw_kind = head >> 16 & 0xFF, head >> 24
        if raw_kind not in tuple(StructureType):
            return  # a reserved type must be ignored
        kind = StructureType(raw_kind)
        if length < CAP_LEN.get(kind, 16):
            self.problems.append(f"V074: {kind.name} capability has cap_len {length}, must have at least {CAP_LEN.get(kind, 16)}")
        if kind in self.structures:
            return
        if kind is StructureType.PCI_CFG:
            self.structures[kind] = Structure(at, 0, 0, 0, 0)
            return
        bar = yield ConfigRead(number, at + 4, 1)
        offset = yield ConfigRead(number, at + 8, 4)
        size = yield ConfigRead(number, at + 12, 4)
        if bar > 5:
            return  # a reserved BAR must be ignored
        place = self.info.bars.get(bar)
        if place is None or place.is_io or offset + size > place.size:
            self.problems.append(f"{kind.name} structure of {size:#x} bytes at {offset:#x} does not lie in BAR {bar}")
            return
        if size < NEEDED_BYTES.get(kind, 0):
            self.problems.append(f"{kind.name} structure has {size} bytes, must have at least {NEEDED_BYTES[kind]}")
            return
        if offset % ALIGNMENT[kind]:
            rule = {StructureType.COMMON: "V076", StructureType.NOTIFY: "V092", StructureType.DEVICE: "V101"}[kind]
            self.problems.append(f"{rule}: {kind.name} structure lies at {offset:#x}, must lie on a multiple of {ALIGNMENT[kind]}")
        self.structures[kind] = Structure(at, bar, offset, size, place.address + offset)
        if kind is StructureType.NOTIFY:
            self.notify_multiplier = yield ConfigRead(number, at + 16, 4)
            if self.notify_multiplier & (self.notify_multiplier - 1) or self.notify_multiplier == 1:
                self.problems.append(f"V093: notify_off_multiplier is {self.notify_multiplier}, must be 0 or an even power of two")

    def structure(self, kind: StructureType) -> Structure:
        """Return a structure that was found; :exc:`DriverError` when it was not."""
        if kind not in self.structures:
            raise DriverError(f"function {self.info.function} has no {kind.name} structure that can be used")
        return self.structures[kind]

    def _place(self, field: str) -> tuple[int, int]:
        """Return address and bytes of a field of the common configuration."""
        offset, size = {**FIELDS, **OPTIONAL_FIELDS}[field]
        common = self.structure(StructureType.COMMON)
        if offset + size > common.length:
            raise DriverError(f"common configuration of function {self.info.function} has {common.length:#x} bytes and no {field}")
        return common.address + offset, size

    def load(self, field: str) -> Software:
        """Read a field of the common configuration; 64 bits as two halves. [VIRTIO1.4 4.1.3.1]"""
        at, size = self._place(field)
        if size < 8:
            return (yield MemoryRead(at, size))
        low = yield MemoryRead(at, 4)
        return low | (yield MemoryRead(at + 4, 4)) << 32

    def store(self, field: str, value: int) -> Software:
        """Write a field of the common configuration; 64 bits as two halves. [VIRTIO1.4 4.1.3.1]"""
        at, size = self._place(field)
        if size < 8:
            yield MemoryWrite(at, size, value)
        else:
            yield MemoryWrite(at, 4, value & 0xFFFF_FFFF)
            yield MemoryWrite(at + 4, 4, value >> 32)

    def window_read(self, bar: int, offset: int, size: int) -> Software:
        """Read 1, 2 or 4 bytes of a BAR through configuration space. [VIRTIO1.4 4.1.4.9]"""
        at = yield from self._aim_window(bar, offset, size)
        return (yield ConfigRead(self.info.function, at, size))

    def window_write(self, bar: int, offset: int, size: int, value: int) -> Software:
        """Write 1, 2 or 4 bytes of a BAR through configuration space. [VIRTIO1.4 4.1.4.9]"""
        at = yield from self._aim_window(bar, offset, size)
        yield ConfigWrite(self.info.function, at, size, value)

    def _aim_window(self, bar: int, offset: int, size: int) -> Software:
        at = self.structure(StructureType.PCI_CFG).capability
        yield ConfigWrite(self.info.function, at + 4, 1, bar)
        yield ConfigWrite(self.info.function, at + 8, 4, offset)
        yield ConfigWrite(self.info.function, at + 12, 4, size)
        return at + 16

    # -- status and features --

    def status(self) -> Software:
        """Return the device status."""
        return (yield from self.load("device_status"))

    def add_status(self, bits: int) -> Software:
        """Set bits of the device status, keeping the others. [VIRTIO1.4 2.1.1]"""
        yield from self.store("device_status", (yield from self.status()) | bits)

    def reset(self) -> Software:
        """Write 0 and wait until it reads 0. [VIRTIO1.4 2.4, 4.1.4.3.2]"""
        yield from self.store("device_status", 0)
        for _ in range(self.polls):
            if (yield from self.status()) == 0:
                self.features = 0
                self.notify_at.clear()
                self._mapped.clear()
                return
            yield Delay(self.poll_cycles)
        raise DriverError(f"function {self.info.function} is not reset after {self.polls} looks at its status")

    def acknowledge(self) -> Software:
        """Set ACKNOWLEDGE, then DRIVER. [VIRTIO1.4 3.1.1 steps 2 and 3]"""
        yield from self.add_status(DeviceStatus.ACKNOWLEDGE)
        yield from self.add_status(DeviceStatus.DRIVER)

    def read_features(self) -> Software:
        """Return all bits that the device offers. [VIRTIO1.4 4.1.4.3]"""
        offered = 0
        for window in range(FEATURE_WINDOWS):
            yield from self.store("device_feature_select", window)
            offered |= (yield from self.load("device_feature")) << 32 * window
        yield from self.store("device_feature_select", FEATURE_WINDOWS)
        if (beyond := (yield from self.load("device_feature"))) != 0:
            self.problems.append(f"V078: window {FEATURE_WINDOWS} of the features reads {beyond:#x}, must read 0")
        if offered & NEVER_OFFERED:
            self.problems.append(f"V007: features {offered & NEVER_OFFERED:#x} must never be offered")
        if not offered >> Feature.VERSION_1 & 1:
            self.problems.append("V120: VERSION_1 is not offered")
        self.offered = offered
        return offered

    def negotiate(self, wanted: int, required: int = 0) -> Software:
        """Accept those of ``wanted`` and ``required`` that are offered; return them. [VIRTIO1.4 3.1.1 steps 4 to 6]

        Raises :exc:`DriverError`, and sets FAILED, when one of ``required`` is not offered or the device does not keep FEATURES_OK.
        """
        offered = yield from self.read_features()
        if required & ~offered:
            yield from self.fail()
            raise DriverError(f"function {self.info.function} does not offer features {required & ~offered:#x}, which are required")
        features = offered & (wanted | required)
        for window in range(FEATURE_WINDOWS):
            bits = features >> 32 * window & 0xFFFF_FFFF
            yield from self.store("driver_feature_select", window)
            yield from self.store("driver_feature", bits)
            if (seen := (yield from self.load("driver_feature"))) != bits:
                self.problems.append(f"V079: driver_feature window {window} reads {seen:#x} where {bits:#x} was written")
        yield from self.add_status(DeviceStatus.FEATURES_OK)
        if not (yield from self.status()) & DeviceStatus.FEATURES_OK:
            yield from self.fail()
            raise DriverError(f"function {self.info.function} refuses features {features:#x}")
        self.features = features
        self._check_doorbells(bool(offered >> Feature.NOTIFICATION_DATA & 1))
        return features

    def _check_doorbells(self, is_wide: bool) -> None:
        """Doorbells of 32 bits need room and places of their own. [VIRTIO1.4 4.1.4.4.1]"""
        notify = self.structure(StructureType.NOTIFY)
        if is_wide and (notify.offset % 4 or notify.length < 4):
            self.problems.append(f"V092: NOTIFY structure of {notify.length} bytes at {notify.offset:#x} is not for doorbells of 4 bytes")
        if is_wide and self.notify_multiplier % 4:
            self.problems.append(f"V093: notify_off_multiplier is {self.notify_multiplier}, must be 0 or a multiple of 4")

    def has(self, feature: Feature) -> bool:
        """A feature was negotiated."""
        return bool(self.features >> feature & 1)

    def fail(self) -> Software:
        """Give the device up: FAILED. [VIRTIO1.4 3.1.1]"""
        yield from self.add_status(DeviceStatus.FAILED)

    def driver_ok(self) -> Software:
        """Let the device run. [VIRTIO1.4 3.1.1 step 8]"""
        yield from self.add_status(DeviceStatus.DRIVER_OK)

    def suspend(self) -> Software:
        """Suspend the device; it does nothing until `resume`, nor may software with its queues. [VIRTIO1.4 3.4]"""
        yield from self.add_status(DeviceStatus.SUSPEND)
        yield from self._wait_status(DeviceStatus.SUSPEND, "suspended")

    def resume(self) -> Software:
        """Let a suspended device run again. [VIRTIO1.4 3.4]"""
        yield from self.add_status(DeviceStatus.DRIVER_OK)
        yield from self._wait_status(DeviceStatus.DRIVER_OK, "running again")

    def _wait_status(self, wanted: DeviceStatus, name: str) -> Software:
        """Wait until one of SUSPEND and DRIVER_OK is set and the other is not."""
        for _ in range(self.polls):
            yield from self.check_alive()
            if (yield from self.status()) & (DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK) == wanted:
                return
            yield Delay(self.poll_cycles)
        raise DriverError(f"function {self.info.function} is not {name} after {self.polls} looks at its status")

    def check_alive(self) -> Software:
        """Raise :exc:`DriverError` when the device asks to be reset, or is gone."""
        status = yield from self.status()
        if status == 0xFF:
            raise DriverError(f"function {self.info.function} does not answer")
        if status & DeviceStatus.NEEDS_RESET:
            raise DriverError(f"function {self.info.function} needs a reset: status {status:#x}")

    # -- queues --

    def set_up_queue(self, index: int, layout: RingLayout, *, vector: int = NO_VECTOR) -> Software:
        """Give queue ``index`` its place and vector and enable it. [VIRTIO1.4 4.1.5.1.3]"""
        function = self.info.function
        if index >= (count := (yield from self.load("num_queues"))):
            raise DriverError(f"function {function} has {count} queues, none is {index}")
        yield from self.store("queue_select", index)
        most = yield from self.load("queue_size")
        if most & (most - 1) and not self.has(Feature.RING_PACKED):
            self.problems.append(f"V088: queue {index} has the size {most}, must have a power of two")
        if not layout.size <= most:
            raise DriverError(f"queue {index} of function {function} has at most {most} descriptors, not {layout.size}")
        if (yield from self.load("queue_enable")) != 0:
            raise DriverError(f"queue {index} of function {function} is enabled already (V081)")
        yield from self._keep("queue_size", layout.size, index)
        for field, (address, _) in zip(("queue_desc", "queue_driver", "queue_device"), layout.parts):
            yield from self._keep(field, address, index)
        yield from self._map("queue_msix_vector", vector, index)
        offset = (yield from self.load("queue_notify_off")) * self.notify_multiplier
        notify = self.structure(StructureType.NOTIFY)
        if offset + (4 if self.has(Feature.NOTIFICATION_DATA) else 2) > notify.length:
            raise DriverError(f"doorbell {index} of function {function} lies at {offset:#x} of {notify.length:#x} bytes (V094)")
        self.notify_at[index], self.notify_value[index] = notify.address + offset, index
        if self.has(Feature.NOTIF_CONFIG_DATA):
            self.notify_value[index] = yield from self.load("queue_notif_config_data")
        yield from self._keep("queue_enable", 1, index)

    def _keep(self, field: str, value: int, index: int) -> Software:
        """Write a field of the selected queue and read it back."""
        yield from self.store(field, value)
        if (seen := (yield from self.load(field))) != value:
            raise DriverError(f"{field} of queue {index} of function {self.info.function} reads {seen:#x} where {value:#x} was written")

    def _map(self, field: str, vector: int, index: int) -> Software:
        """Map an event to a vector, or to none. [VIRTIO1.4 4.1.5.1.2]"""
        before = yield from self.load(field)
        if before != NO_VECTOR and (field, index) not in self._mapped:
            self.problems.append(f"V115: {field} is {before:#x} before it is written, must be {NO_VECTOR:#x}")
        self._mapped.add((field, index))
        yield from self.store(field, vector)
        if (seen := (yield from self.load(field))) != vector:
            raise DriverError(f"{field} of function {self.info.function} reads {seen:#x} where {vector:#x} was written (V114, V116)")

    def set_config_vector(self, vector: int) -> Software:
        """Map configuration changes to a vector. [VIRTIO1.4 4.1.5.1.2]"""
        yield from self._map("config_msix_vector", vector, 0)

    def reset_queue(self, index: int) -> Software:
        """Reset one queue and wait until it is; `set_up_queue` may follow. [VIRTIO1.4 2.6.1, 4.1.4.3]"""
        if not self.has(Feature.RING_RESET):
            raise DriverError(f"queues of function {self.info.function} cannot be reset without RING_RESET")
        yield from self.store("queue_select", index)
        if (yield from self.load("queue_reset")) != 0:
            self.problems.append(f"V083: queue_reset of queue {index} is not 0 while the queue is enabled")
        yield from self.store("queue_reset", 1)
        for _ in range(self.polls):
            if (yield from self.load("queue_reset")) == 0:
                if (yield from self.load("queue_enable")) != 0:
                    self.problems.append(f"V086: queue_enable of queue {index} is not 0 after its reset")
                self.notify_at.pop(index, None)
                return
            yield Delay(self.poll_cycles)
        raise DriverError(f"queue {index} of function {self.info.function} is not reset after {self.polls} looks at it")

    def notify(self, index: int = 0, ring: RingDriver | None = None) -> Software:
        """Ring the doorbell of a queue; ``ring``: its driver's side, which knows what NOTIFICATION_DATA tells. [VIRTIO1.4 4.1.5.2]"""
        if index not in self.notify_at:
            raise DriverError(f"queue {index} of function {self.info.function} is not set up")
        value = self.notify_value[index]
        if not self.has(Feature.NOTIFICATION_DATA):
            yield MemoryWrite(self.notify_at[index], 2, value)
        elif ring is not None:
            yield MemoryWrite(self.notify_at[index], 4, ring.notification(value))
        else:
            raise ValueError(f"A doorbell must tell the state of a ring with NOTIFICATION_DATA, not of {ring!r}")

    # -- the rest --

    def read_isr(self) -> Software:
        """Return and clear the ISR status: bit 0 queues, bit 1 configuration. [VIRTIO1.4 4.1.4.5]"""
        return (yield MemoryRead(self.structure(StructureType.ISR).address, 1))

    def read_device_config(self, fields: Sequence[tuple[int, int]], *, tries: int = 16) -> Software:
        """Return the values of (offset, bytes) fields, all of one version of the device configuration. [VIRTIO1.4 2.5.1, 2.5.4]

        Each is read with its own width, 8 bytes as two halves; all again while config_generation changes, ``tries`` times at most.
        """
        device = self.structure(StructureType.DEVICE)
        for offset, size in fields:
            if size not in (1, 2, 4, 8) or offset % min(size, 4) or offset + size > device.length:
                raise ValueError(f"A field must be 1, 2, 4 or 8 aligned bytes within {device.length}, not {size!r} at {offset!r}")
        for _ in range(tries):
            before = yield from self.load("config_generation")
            values = []
            for offset, size in fields:
                value = yield MemoryRead(device.address + offset, min(size, 4))
                if size == 8:
                    value |= (yield MemoryRead(device.address + offset + 4, 4)) << 32
                values.append(value)
            if (yield from self.load("config_generation")) == before:
                return values
        raise DriverError(f"the configuration of function {self.info.function} changed during each of {tries} reads")

    def write_device_config(self, offset: int, size: int, value: int) -> Software:
        """Write 1, 2 or 4 bytes of device configuration."""
        yield MemoryWrite(self.structure(StructureType.DEVICE).address + offset, size, value)

    def start(self, queues: Sequence[RingLayout], *, wanted: int = 0, required: int = 1 << Feature.VERSION_1,
              vectors: Sequence[int] = (), config_vector: int = NO_VECTOR) -> Software:  # fmt: skip
        """Find, reset, negotiate, set up queue 0 and on, DRIVER_OK; return the features. [VIRTIO1.4 3.1.1]

        ``vectors``: of the queues; those without one are polled.
        """
        yield from self.find()
        yield from self.reset()
        yield from self.acknowledge()
        features = yield from self.negotiate(wanted, required)
        yield from self.set_config_vector(config_vector)
        for n in range(len(queues)):
            yield from self.set_up_queue(n, queues[n], vector=vectors[n] if n < len(vectors) else NO_VECTOR)
        yield from self.driver_ok()
        return features
