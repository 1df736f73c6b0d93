"""Descriptions of functions refuse what cannot be."""

import pytest

from ringwall.rtl.function.description import (
    Bar,
    FunctionDescription,
    MsixCapability,
    PcieCapability,
    VirtioCapability,
    VirtioWindow,
    bars_of,
    check_functions,
)  # fmt: skip


def describe(**changes):
    return FunctionDescription(**{"vendor_id": 0x1AF4, "device_id": 0x1042, "class_code": 0x018000, "bars": (Bar(0, 4096),), **changes})


@pytest.mark.parametrize("make, sentence", [
    (lambda: Bar(5, 4096), "between 0 and 4, not 5"),
    (lambda: Bar(6, 4096, is_64=False), "between 0 and 5, not 6"),
    (lambda: Bar(0, 4095), "power of two between 128 bytes and 2 GiB, not 4095"),
    (lambda: Bar(0, 64), "power of two between 128 bytes and 2 GiB, not 64"),
    (lambda: Bar(0, 4096, is_64=False, is_prefetchable=True), "prefetchable BAR must be a 64-bit one, not Bar"),
    (lambda: PcieCapability(mps_code=6), "between 0 and 5, not 6"),
    (lambda: PcieCapability(link_speed=0), "between 1 and 5, not 0"),
    (lambda: PcieCapability(link_width=3), "must be one of .* not 3"),
    (lambda: MsixCapability(0, 0, 0, 0, 0x800), "between 1 and 2048, not 0"),
    (lambda: MsixCapability(2049, 0, 0, 0, 0x800), "between 1 and 2048, not 2049"),
    (lambda: MsixCapability(1, 0, 4, 0, 0x800), "start at a multiple of 8, not 4"),
    (lambda: VirtioCapability(5, 0, 0, 4), "must be one of .* not 5"),
    (lambda: VirtioCapability(1, 0, 2, 4), "type 1 must be a multiple of 4, not 2"),
    (lambda: VirtioCapability(2, 0, 1, 4), "type 2 must be a multiple of 2, not 1"),
    (lambda: VirtioCapability(3, 0, 1, 0), "must be positive, not 0"),
    (lambda: VirtioCapability(2, 0, 0, 4, 3), "even power of two, and belongs to notification, not 3"),
    (lambda: VirtioCapability(1, 0, 0, 4, 4), "even power of two, and belongs to notification, not 4"),
    (lambda: describe(device_id=1 << 16), "Device ID must be a number of 16 bits, not 65536"),
    (lambda: describe(vendor_id=0xFFFF), "absent function does not show, not 65535"),
    (lambda: describe(bars=(Bar(0, 4096), Bar(1, 4096))), r"BARs must not share a register, not \[0, 1, 1, 2\]"),
    (lambda: describe(capabilities=(MsixCapability(1, 1, 0, 0, 0x800),)), "must lie in a BAR of the function, not 1"),
    (lambda: describe(capabilities=(MsixCapability(256, 0, 8, 0, 0),)), r"inside the 4096 bytes of BAR 0, not \(8, 4096\)"),
    (lambda: describe(capabilities=(MsixCapability(129, 0, 0, 0, 0x800),)), r"must not share bytes of BAR 0 .* not \(2048, 24\)"),
    (lambda: describe(capabilities=(VirtioCapability(1, 0, 0, 64), VirtioCapability(4, 0, 60, 8))), r"not share bytes .* not \(60, 8\)"),
    (lambda: describe(capabilities=(VirtioWindow(), VirtioWindow())), "at most one VirtioWindow, not"),
    (lambda: describe(capabilities=tuple(VirtioCapability(3, 0, n, 1) for n in range(5))), "at most 4 virtio structures, not 5"),
    (lambda: describe(capabilities=(PcieCapability(at=0x42),)), "must be a multiple of 4, not 66"),
    (lambda: describe(capabilities=(PcieCapability(at=0x3C),)), "must not overlap header"),
    (lambda: describe(capabilities=(PcieCapability(at=0x50), VirtioWindow(at=0x88))), "must not overlap pcie, which ends at 0x8b"),
    (lambda: describe(capabilities=(PcieCapability(at=0xC8),)), "must lie below 0x100"),
    (lambda: check_functions(()), "between 1 and 8, not 0"),
    (lambda: check_functions([describe()] * 9), "between 1 and 8, not 9"),
])  # fmt: skip
def test_contradictions_are_refused(make, sentence):
    """FUNC-CFG-1 (R69, V074, V076, V092, V093, V101): overlaps, places outside, numbers too large are refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        make()


def test_functions_must_be_descriptions():
    """FUNC-CFG-2: a function that is no description is refused; BARs of a card are listed function by function."""
    with pytest.raises(TypeError, match="must be a FunctionDescription, not 5"):
        check_functions([5])
    one, other = describe(), describe(bars=(Bar(2, 256, is_64=False), Bar(3, 128)))
    assert bars_of((one, other)) == ((0, Bar(0, 4096)), (1, Bar(2, 256, is_64=False)), (1, Bar(3, 128)))
