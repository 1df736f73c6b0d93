"""The compiled IOMMU beside the golden model: random worlds, every answer, record, register and message compared."""

import random

import pytest

from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.unit import Iommu
from ringwall.sim.iommu_coverage import with_devices
from ringwall.sim.iommu_lockstep import Lockstep

FULL = ("Sv48", "Sv57", "Svpbmt", "Sv39x4", "Sv48x4", "Sv57x4", "PD8", "PD17", "PD20", "MSI_FLAT", "MSI_MRIF",
        "AMO_MRIF", "AMO_HWAD", "HPM")
SECOND = {"entries": 16, "ways": 4, "second_entries": 64, "second_generation_bits": 3}  # numbers end and begin anew
BUILDS = {  # features, parameters, requests
    "default": ((), {}, 45_000), "full": (FULL, SECOND, 85_000),
}  # fmt: skip
DEVICES = (*FULL, "ATS", "T2GPA", "DBG", "NL", "S")


@pytest.mark.parametrize("build", BUILDS)
def test_lockstep(build):
    """IOMMU-LOCK-1 (R02, R24, R27, R38, R41): worlds of all kinds, defects, races: PA, size, PBMT, records, queues; each check is met."""
    features, parameters, requests = BUILDS[build]
    run = Lockstep(Iommu(width=64, features=Features(**dict.fromkeys(features, True)), **parameters), rng=random.Random(1))
    run.play(requests)
    while run.coverage.empty() and run.requests < requests * 3 // 2:
        run.play(1000)
    print(f"\n{run.coverage}\n{run}")
    assert not run.coverage.empty(), f"never met: {', '.join(run.coverage.empty())}"
    assert run.walks > requests // 2
    assert run.iommu.counts.hits > requests // 20


def test_lockstep_with_devices():
    """IOMMU-LOCK-6: worlds of devices that cache translations: completions, translated requests, ATS commands, page requests, races."""
    run = Lockstep(Iommu(width=64, features=Features(**dict.fromkeys(DEVICES, True)), **SECOND), rng=random.Random(1))
    wanted = set(with_devices(run.capabilities))
    run.play(10_000)
    while wanted & set(run.coverage.empty()) and run.requests < 30_000:
        run.play(1000)
    print(f"\n{run.coverage}\n{run}")
    assert not wanted & set(run.coverage.empty())
