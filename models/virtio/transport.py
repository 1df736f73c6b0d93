"""The registers of a virtio function over PCI as a driver must find them, learned from the driver's writes alone. [VIRTIO1.4 4.1]

What the specification leaves open is not predicted: it is learned from the first answer, and must stay so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .driver import FIELDS as ALWAYS_THERE
from .driver import NO_VECTOR, OPTIONAL_FIELDS, DeviceStatus, Feature

__all__ = ["PciTransport", "QueueSettings"]

FIELDS = ALWAYS_THERE | OPTIONAL_FIELDS
MOST_SINCE = 4096  # writes behind a reset that nobody waited for: a driver that brings a device up makes some dozens
MAX_WINDOWS = 4  # of 32 feature bits that a driver can accept [VIRTIO1.4 2.2]
SIMPLE = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FAILED
NEEDS_RESET = DeviceStatus.NEEDS_RESET
SETTINGS = ("queue_size", "queue_msix_vector", "queue_desc", "queue_driver", "queue_device")
CONSTANT = ("queue_notify_off", "queue_notif_config_data")  # of a queue, learned from the first answer
PER_QUEUE = (*SETTINGS, *CONSTANT, "queue_enable", "queue_reset")
READ_ONLY = ("device_feature", "num_queues", "config_generation", *CONSTANT)


@dataclass
class QueueSettings:
    """What the driver set of one queue. ``notify_off`` and ``notif_config_data`` are None until the driver read them."""

    max_size: int
    size: int
    vector: int = NO_VECTOR
    enabled: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0
    notify_off: int | None = None
    notif_config_data: int | None = None
    resetting: bool = False
    open: set[str] = field(default_factory=set)  # fields that may hold anything, until they are read


class PciTransport:
    """What the driver wrote, and what its reads may find.

    Give it accesses in the order of the bus: :meth:`write` when it happens, :meth:`problem` with the answer of a read. A driver
    must read 0 from the status after a reset before it goes on [VIRTIO1.4 4.1.4.3.2]; firmware has been seen that does not. What
    is written before that counts only once the status reads as such a write made it and as it was not before the reset. Until
    then, and in front of that write, registers may hold anything; so they may from the 4096th such write on.

    Parameters
    ----------
    offered : :class:`int`
        Feature bits that the device must offer.
    queues : tuple of :class:`int`
        Largest size of each queue.
    vectors : :class:`int`
        MSI-X vectors of the function.
    config : :class:`bytes`
        Device configuration.
    places : dict
        Structure (1 common, 2 notification, 3 ISR, 4 device configuration) -> (offset in the BAR, length).
    multiplier : :class:`int`
        notify_off_multiplier.
    on_live, on_reset : callable
        Called when the driver set DRIVER_OK; when a reset is complete.
    on_kick : callable
        Called with the queue of a doorbell while the device is live.
    on_queue_reset : callable
        Called with the queue when its reset is complete.
    on_isr : callable
        Called with the ISR's answer; returns why it cannot be ("": it can).
    may_need_reset : callable
        Tells whether the device may ask for a reset now.

    Attributes
    ----------
    status, accepted : :class:`int`
        Device status as it surely is, features that the driver accepted.
    is_live : :class:`bool`
        DRIVER_OK is set and no reset was begun.
    is_resetting : :class:`bool`
        The driver wrote 0 to the status, and has not read 0 yet.
    is_suspended : :class:`bool`
        The status showed SUSPEND, and not DRIVER_OK since.
    queues : list of :class:`QueueSettings`
    """

    def __init__(self, *, offered: int, queues: tuple[int, ...], vectors: int, config: bytes, places: dict[int, tuple[int, int]],
                 multiplier: int = 4, on_live: Callable[[], None] = lambda: None, on_reset: Callable[[], None] = lambda: None,
                 on_kick: Callable[[int], None] = lambda queue: None,
                 on_queue_reset: Callable[[int], None] = lambda queue: None, on_isr: Callable[[int], str] = lambda value: "",
                 may_need_reset: Callable[[], bool] = lambda: False):  # fmt: skip
        self.offered, self.vectors, self.config, self.places, self.multiplier = offered, vectors, config, places, multiplier
        self.on_live, self.on_reset, self.on_kick, self.on_isr = on_live, on_reset, on_kick, on_isr
        self.on_queue_reset = on_queue_reset
        self.may_need_reset, self._sizes = may_need_reset, queues
        self.generation: int | None = None
        self._old_generation: int | None = None  # of a configuration that was another
        self._constants: list[dict[str, int]] = [{} for _ in queues]
        self._config_open: set[int] = set()  # bytes that the driver wrote, and nobody read since
        self.clear()

    def clear(self) -> None:
        """As after power-on, or a reset that is complete."""
        self.status, self.is_resetting, self.is_live, self.is_suspended = 0, False, False, False
        self._shifts = False  # between a SUSPEND and a DRIVER_OK, either way
        self.accepted, self.selects = 0, {"device_feature_select": 0, "driver_feature_select": 0, "queue_select": 0}
        self.config_vector, self.beyond = NO_VECTOR, False
        self._open: set[str] = set()  # registers that may hold anything until they are read
        self._since: list[tuple[str, int, bytes]] = []  # writes after the reset was begun, `MOST_SINCE` at most
        self._maybe = 0  # status bits that may be set
        self.queues = [QueueSettings(size, size, **known) for size, known in zip(self._sizes, self._constants)]

    def has(self, feature: Feature) -> bool:
        """Driver and device agreed on a feature."""
        return bool(self.status & DeviceStatus.FEATURES_OK) and bool(self.accepted >> feature & 1)

    def change(self, config: bytes) -> None:
        """The device changed its configuration. (V013)"""
        self.config, self.generation, self._old_generation = config, None, self.generation

    # -- what the driver does --

    def write(self, offset: int, data: bytes) -> None:
        """The driver wrote ``data`` at ``offset`` of the BAR."""
        for kind, (start, length) in self.places.items():
            at = offset - start
            if not 0 <= at < length:
                continue
            if kind == 1:
                for name, low, piece in self._fields(at, data):
                    self._written(name, low, piece)
            elif kind == 2 and self.is_live:
                self._rung(at, data)
            elif kind == 4:
                self._config_open |= set(range(at, at + len(data)))

    def _rung(self, at: int, data: bytes) -> None:
        """A doorbell: its queue's place, the width and the number that were agreed on. [VIRTIO1.4 4.1.5.2]"""
        number = int.from_bytes(data[:2], "little")
        for n, queue in enumerate(self.queues):
            wanted = queue.notif_config_data if self.has(Feature.NOTIF_CONFIG_DATA) else n
            if (queue.enabled and not queue.resetting and number == wanted and at == (queue.notify_off or 0) * self.multiplier
                    and len(data) == (4 if self.has(Feature.NOTIFICATION_DATA) else 2)):  # fmt: skip
                self.on_kick(n)

    def _fields(self, at: int, data: bytes):
        """Yield (name, offset in the field, bytes) of the fields that an access of common configuration touches, in order."""
        for name, (start, size) in FIELDS.items():
            low, high = max(start, at), min(start + size, at + len(data))
            if low < high:
                yield name, low - start, data[low - at : high - at]

    def _written(self, name: str, low: int, data: bytes) -> None:
        size = FIELDS[name][1]
        value = int.from_bytes(data, "little")
        if name in READ_ONLY:
            return
        if self.is_resetting:
            self._leave_open(name)
            if name == "device_status" and value == 0:
                self._since.clear()
            elif len(self._since) < MOST_SINCE:
                self._since.append((name, low, data))
            return
        if len(data) != size and not (size == 8 and len(data) == 4):  # not how a driver may do it [VIRTIO1.4 4.1.3.1]
            self._leave_open(name)
            return
        if self.is_suspended and name != "device_status":  # should be ignored (V018)
            self._leave_open(name)
            return
        if name in self.selects:
            self.selects[name] = value
            self._open.discard(name)
        elif name == "driver_feature":
            self._accept(self.selects["driver_feature_select"], value)
        elif name == "config_msix_vector":
            self.config_vector = value if value < self.vectors else NO_VECTOR
        elif name == "device_status":
            self._set_status(value)
        elif self.selects["queue_select"] < len(self.queues):
            self._set_queue(self.queues[self.selects["queue_select"]], name, low, data)

    def _leave_open(self, name: str) -> None:
        self._open.add(name)
        for queue in self.queues:
            queue.open.add(name)

    def _accept(self, window: int, value: int) -> None:
        if self.status & DeviceStatus.FEATURES_OK:
            self._open.add("driver_feature")
        elif window < MAX_WINDOWS:
            self.accepted = self.accepted & ~(0xFFFF_FFFF << 32 * window) | value << 32 * window
        else:
            self.beyond = self.beyond or bool(value)

    def _set_status(self, value: int) -> None:
        """[VIRTIO1.4 2.1, 2.2, 2.4]"""
        if value == 0:
            self.is_resetting, self.is_live = True, False
            return
        if value & DeviceStatus.SUSPEND and self.status & DeviceStatus.DRIVER_OK and self.has(Feature.SUSPEND):
            self._shifts = True  # with the answer that shows it (V021)
        elif value & DeviceStatus.DRIVER_OK and self.is_suspended:
            self._shifts = True  # (V022)
        cleared = self.status & ~value & ~NEEDS_RESET  # which the driver must not do
        self._maybe |= cleared & ~(DeviceStatus.DRIVER_OK | DeviceStatus.SUSPEND) if self._shifts or self.is_suspended else cleared
        self.status |= value & SIMPLE
        if value & DeviceStatus.FEATURES_OK and not self.status & DeviceStatus.FEATURES_OK:
            good = not self.beyond and not self.accepted & ~self.offered and self.accepted >> Feature.VERSION_1 & 1
            if good:
                self.status |= DeviceStatus.FEATURES_OK
            else:
                self._maybe |= DeviceStatus.FEATURES_OK
        if value & DeviceStatus.DRIVER_OK and not self.status & DeviceStatus.DRIVER_OK and not self.is_suspended:
            if self.status & DeviceStatus.FEATURES_OK:
                self.status |= DeviceStatus.DRIVER_OK
                self._go_live()
            elif self._maybe & DeviceStatus.FEATURES_OK:
                self._maybe |= DeviceStatus.DRIVER_OK

    def _go_live(self) -> None:
        if not self.is_live:
            self.is_live = True
            self.on_live()

    def _set_queue(self, queue: QueueSettings, name: str, low: int, data: bytes) -> None:
        """[VIRTIO1.4 4.1.4.3]"""
        value = int.from_bytes(data, "little")
        if name == "queue_msix_vector":
            queue.vector = value if value < self.vectors else NO_VECTOR
            queue.open.discard(name)
        elif name == "queue_reset":
            if value == 1 and self.has(Feature.RING_RESET):
                queue.resetting = True
            elif value or queue.resetting:
                queue.open.add(name)
        elif queue.resetting:
            queue.open.add(name)
        elif name == "queue_enable":
            if value == 1:
                queue.enabled = True
            elif value or queue.enabled:
                queue.open.add(name)
        elif queue.enabled:
            queue.open.add(name)
        elif name == "queue_size":
            if 0 < value <= queue.max_size and (not value & (value - 1) or self.has(Feature.RING_PACKED)):
                queue.size = value
                queue.open.discard(name)
            else:
                queue.open.add(name)
        else:
            part = name.removeprefix("queue_")
            mask = (1 << 8 * len(data)) - 1 << 8 * low
            setattr(queue, part, getattr(queue, part) & ~mask | value << 8 * low)

    # -- what it may find --

    def problem(self, offset: int, data: bytes) -> str:
        """Return why a read at ``offset`` of the BAR cannot have found ``data`` ("": it can), and take note of what it found."""
        for kind, (start, length) in self.places.items():
            at = offset - start
            if not 0 <= at < length:
                continue
            if kind == 1:
                return next((text for name, low, piece in self._fields(at, data) if (text := self._found(name, low, piece))), "")
            if kind == 3 and at == 0:
                return self.on_isr(data[0])
            if kind == 4:
                for n in self._config_open & set(range(at, min(at + len(data), len(self.config)))):
                    self.config = self.config[:n] + data[n - at : n - at + 1] + self.config[n + 1 :]
                    self._config_open.discard(n)
                wanted = self.config[at : at + len(data)]
                if data[: len(wanted)] != wanted:
                    return f"device configuration from byte {at} on is {wanted.hex()} [VIRTIO1.4 5.2.4]"
        return ""

    def _found(self, name: str, low: int, data: bytes) -> str:
        value, width = int.from_bytes(data, "little"), 8 * len(data)
        if name == "device_status":
            return self._found_status(value)
        if name == "config_generation":
            if self.generation is None and value != self._old_generation:
                self.generation = value
            if self.generation is None:
                return f"config_generation is another than {value} behind a change [VIRTIO1.4 4.1.4.3.1]"
            return "" if value == self.generation else f"config_generation stays {self.generation} [VIRTIO1.4 4.1.4.3.1]"
        queue = None
        if name in PER_QUEUE:
            if self.selects["queue_select"] >= len(self.queues) or "queue_select" in self._open:
                return "queue_size of a queue that is not there is 0 [VIRTIO1.4 4.1.4.3.1]" if (
                    name == "queue_size" and value and "queue_select" not in self._open) else ""
            queue = self.queues[self.selects["queue_select"]]
        is_open = name in (queue.open if queue is not None else self._open)
        if is_open or (name == "device_feature" and "device_feature_select" in self._open):
            self._learn(queue, name, low, value, width)
            return ""
        if name in CONSTANT and queue is not None:
            return self._found_constant(queue, name.removeprefix("queue_"), value)
        if name == "queue_reset" and queue is not None:
            return self._found_reset(queue, value)
        if queue is not None and queue.resetting:
            return ""
        wanted, free = self._value(queue, name)
        wanted, free = wanted >> 8 * low & (1 << width) - 1, free >> 8 * low
        return "" if not (value ^ wanted) & ~free else f"{name} is {wanted:#x} [VIRTIO1.4 4.1.4.3]"

    def _found_constant(self, queue: QueueSettings, name: str, value: int) -> str:
        room = self.places[2][1]
        if name == "notify_off" and value * self.multiplier + (4 if self.offered >> Feature.NOTIFICATION_DATA & 1 else 2) > room:
            return f"queue_notify_off leads beyond the {room} bytes of the notification structure [VIRTIO1.4 4.1.4.4]"
        if name == "notif_config_data" and not self.has(Feature.NOTIF_CONFIG_DATA):
            return ""  # the field is not there
        known = self._constants[self.selects["queue_select"]]
        setattr(queue, name, known.setdefault(name, value))
        return "" if value == known[name] else f"queue_{name} stays {known[name]:#x} [VIRTIO1.4 4.1.4.3]"

    def _found_reset(self, queue: QueueSettings, value: int) -> str:
        """The driver looks whether a reset of the queue is complete. [VIRTIO1.4 4.1.4.3.1]"""
        if not self.has(Feature.RING_RESET):
            return ""  # the field is not there
        if value not in ((0, 1) if queue.resetting else (0,)):
            return f"queue_reset is {1 if queue.resetting else 0}, or 0 when the reset is complete (V083 to V086)"
        if queue.resetting and not value:
            queue.resetting = queue.enabled = False
            queue.open = set(SETTINGS)
            self.on_queue_reset(self.selects["queue_select"])
        return ""

    def _value(self, queue: QueueSettings | None, name: str) -> tuple[int, int]:
        """Return the value of a field, and its bits that may be anything."""
        if name in self.selects:
            return self.selects[name], 0
        if queue is not None:
            part = {"queue_msix_vector": "vector", "queue_enable": "enabled"}.get(name, name.removeprefix("queue_"))
            return int(getattr(queue, part)), 0
        match name:
            case "device_feature":
                window = self.selects["device_feature_select"]
                return (self.offered >> 32 * window & 0xFFFF_FFFF if window < 4 else 0), 0
            case "driver_feature":
                window = self.selects["driver_feature_select"]
                if window >= MAX_WINDOWS:
                    return 0, 0xFFFF_FFFF
                return self.accepted >> 32 * window & 0xFFFF_FFFF, (self.accepted & ~self.offered) >> 32 * window & 0xFFFF_FFFF
            case "config_msix_vector":
                return self.config_vector, 0
            case _:
                return len(self.queues), 0  # num_queues

    def _learn(self, queue: QueueSettings | None, name: str, low: int, value: int, width: int) -> None:
        """Whatever was found is what the register holds."""
        if low or width != 8 * FIELDS[name][1]:
            return
        if queue is not None:
            queue.open.discard(name)
            part = {"queue_msix_vector": "vector", "queue_enable": "enabled"}.get(name, name.removeprefix("queue_"))
            setattr(queue, part, bool(value) if name == "queue_enable" else value)
        elif name in self.selects:
            self.selects[name] = value
            self._open.discard(name)

    def _found_status(self, value: int) -> str:
        if self.is_resetting:
            if value == 0:
                self.clear()
                self.on_reset()
                return ""
            if value in (self.status, self.status | NEEDS_RESET):
                return ""
            if "device_status" in self._open:
                self._catch_up(value)
                return ""
            return f"device_status is {self.status:#x}, or 0 when the reset is complete [VIRTIO1.4 2.4.1]"
        if self._shifts and value & (DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK) == (
                DeviceStatus.DRIVER_OK if self.is_suspended else DeviceStatus.SUSPEND):  # fmt: skip
            self._shifts, self.is_suspended, self.is_live = False, not self.is_suspended, self.is_suspended
            self.status ^= DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK
        odd = value ^ self.status
        if "device_status" in self._open:
            self._open.discard("device_status")
            odd = 0
        if odd & NEEDS_RESET and value & NEEDS_RESET and self.may_need_reset():
            odd &= ~NEEDS_RESET
        if odd & ~self._maybe:
            return f"device_status is {self.status:#x} [VIRTIO1.4 2.1]"
        self.status, self._maybe = value, 0
        if value & DeviceStatus.DRIVER_OK:
            self._go_live()
        return ""

    def _catch_up(self, value: int) -> None:
        """The status is what the driver wrote after a reset whose end it did not wait for: all from that write on counts."""
        since = self._since
        if len(since) == MOST_SINCE:
            return  # until a reset that is waited for
        last = max((n for n, (name, _, data) in enumerate(since) if name == "device_status" and data == bytes([value])), default=None)
        if last is None:
            return
        self.clear()
        self.on_reset()
        for n, write in enumerate(since):
            self._written(*write)
            if n <= last:
                self._leave_open(write[0])
        self._found_status(value)
