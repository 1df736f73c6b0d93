"""Virtqueues of the kind that was negotiated, behind one interface. [VIRTIO1.4 2.6, 6]"""

from __future__ import annotations

from .driver import Feature
from .judge import DeviceRules, Readable, RingJudge
from .packed import PackedDriver, PackedLayout
from .packed_rules import PackedDeviceJudge, PackedDeviceRules
from .ring import Memory, RingDriver, RingLayout
from .rules import SplitDeviceJudge, SplitDeviceRules
from .split import SplitDriver, SplitLayout

__all__ = ["is_packed", "make_judge", "make_layout", "make_ring", "make_rules"]


def is_packed(features: int) -> bool:
    """RING_PACKED was negotiated."""
    return bool(features >> Feature.RING_PACKED & 1)


def _options(features: int) -> dict[str, bool]:
    return {name: bool(features >> bit & 1) for name, bit in (
        ("indirect", Feature.INDIRECT_DESC), ("event_idx", Feature.EVENT_IDX), ("in_order", Feature.IN_ORDER))}  # fmt: skip


def make_layout(features: int, size: int, descriptor_area: int, driver_area: int, device_area: int) -> RingLayout:
    """Return where the parts of a queue lie."""
    return (PackedLayout if is_packed(features) else SplitLayout)(size, descriptor_area, driver_area, device_area)


def make_ring(memory: Memory, features: int, *, size: int, **options) -> RingDriver:
    """Return the driver's side of a queue of ``size`` descriptors, by the features that were negotiated.

    ``options``: ``base`` or ``addresses``, and further ones of :class:`.ring.RingDriver`.
    """
    return (PackedDriver if is_packed(features) else SplitDriver)(memory, size=size, **_options(features), **options)


def make_judge(layout: RingLayout, memory: Readable, features: int, **options) -> RingJudge:
    """Return the judge of a device on a queue, by the features that were negotiated; ``options``: of :class:`.judge.RingJudge`."""
    return (PackedDeviceJudge if is_packed(features) else SplitDeviceJudge)(layout, memory, **_options(features), **options)


def make_rules(layout: RingLayout, memory, features: int, **options) -> DeviceRules:
    """Return what judges a log of events on a queue, by the features that were negotiated."""
    return (PackedDeviceRules if is_packed(features) else SplitDeviceRules)(layout, memory, **_options(features), **options)
