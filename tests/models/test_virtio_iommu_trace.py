"""What a real guest did with QEMU's virtio-iommu, played on the golden device."""

import lzma
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ringwall.models.virtio.iommu import IommuDevice
from ringwall.models.virtio.iommu_formats import Attach, Map, Unmap
from ringwall.models.virtio.iommu_rules import OFFERED, X86_MSI, IommuDescription
from ringwall.models.virtio.iommu_trace import Seen, play, read_trace

# Linux 6.12 boots in QEMU 7.2, mounts a disk behind a virtio-iommu and reads a MiB of it.
LINES = lzma.decompress((Path(__file__).parent / "viommu-linux-boot.trace.xz").read_bytes()).decode().splitlines()


def device_of(endpoint=16):
    device = IommuDevice(IommuDescription({endpoint: (X86_MSI,)}, bypass=1))
    device.negotiate(OFFERED)
    return device


def test_boot_of_linux():
    """MODEL-VIOMMU-TRACE-1 (R24): a boot of Linux: 1 PROBE, 1 ATTACH, 58 MAP, 57 UNMAP, all OK, and 466 accesses go where they went."""
    events = read_trace(LINES)
    began = time.perf_counter()
    played = play(events, device_of())
    print(f"\n{len(events) / (time.perf_counter() - began):,.0f} requests and accesses per second")
    assert played.problems == []
    assert played.counts == {"Probe": 1, "Attach": 1, "Map": 58, "Unmap": 57, "Seen": 466}
    assert sum(one.phys == one.access.address for one in events if isinstance(one, Seen)) == 8  # interrupts


def test_changed_traces_are_found():
    """MODEL-VIOMMU-TRACE-2: an access that went elsewhere, and one behind its UNMAP, are problems; so is a MAP over another; endpoints can
    have other numbers; a result without its access is refused."""
    events = read_trace(LINES, {16: 3})
    assert play(events, device_of(3)).problems == []
    n = next(n for n, one in enumerate(events) if isinstance(one, Seen))
    moved = [*events[:n], replace(events[n], phys=events[n].phys + 1), *events[n + 1 :]]
    assert len(play(moved, device_of(3)).problems) == 1
    unmapped = next(one for one in events if isinstance(one, Unmap))
    used = next(one for one in events if isinstance(one, Seen) and unmapped.virt_start <= one.access.address <= unmapped.virt_end)
    assert len(play([*events, used], device_of(3)).problems) == 1
    first = next(one for one in events if isinstance(one, Map))
    assert "not OK" in play([Attach(0, 3), first, first], device_of(3)).problems[0]
    with pytest.raises(ValueError, match="Result must follow its access"):
        read_trace(["virtio_iommu_translate mr=x rid=16 addr=0x1000 flag=1", "virtio_iommu_translate_out 0x2000 -> 0x3000 for sid=16"])
