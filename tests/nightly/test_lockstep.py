"""Ten million random requests to compiled IOMMUs of seven kinds beside the golden model, by new seeds."""

import os
import random
import time

import pytest

from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.unit import Iommu
from ringwall.sim.iommu_lockstep import Lockstep

from ..iommu.test_lockstep import BUILDS, DEVICES, SECOND

FULL = BUILDS["full"][0]
SMALL = {"entries": 8, "ways": 2, "superpage_entries": 2, "walks": 2, "context_entries": 2, "misses": 2}
UNITS = {  # features, parameters, requests
    "default": ((), {}, 2_000_000),
    "full": (FULL, {}, 3_500_000),
    "small": (FULL, {**SMALL, "strict": True}, 1_500_000),
    "guests": (("Sv39x4", "MSI_FLAT", "HPM"), {"entries": 128, "ways": 8}, 1_000_000),
    "processes": (("Sv48", "PD8", "PD17", "HPM"), {"walks": 4, "second_entries": 64}, 1_000_000),
    "devices": (DEVICES, {**SECOND, "itags": 3}, 500_000),
    "types": (("Svpbmt", "Sv48", "Sv39x4", "Sv48x4", "PD20"), {"queue_log2_max": 12}, 500_000),
}  # fmt: skip
PART = 200_000  # requests of a seed


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("unit", UNITS)
def test_lockstep(unit):
    """IOMMU-LOCK-2 (R02, R24, R27, R38, R41): ten million requests to seven builds by new seeds (or from SEED= on), in lock-step."""
    features, parameters, requests = UNITS[unit]
    first = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 30))
    done, begun, missing = 0, time.monotonic(), None
    while done < requests:
        seed = first + done // PART
        run = Lockstep(Iommu(width=64, features=Features(**dict.fromkeys(features, True)), **parameters), rng=random.Random(seed))
        try:
            run.play(min(PART, requests - done))
        except AssertionError as error:
            error.add_note(f"{unit}, SEED={seed}")
            raise
        done += run.requests
        empty = set(run.coverage.empty())
        missing = empty if missing is None else missing & empty
        print(f"{unit}, SEED={seed}: {done:,} of {requests:,}, {done / (time.monotonic() - begun):.0f} per s; {run}", flush=True)
    print(run.coverage)
    assert not missing, f"never met from SEED={first} on: {', '.join(sorted(missing))}"
