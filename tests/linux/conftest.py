"""Tests with the marker ``guest`` run where the cache has user-mode Linux and its image: `make test` sees to it, or says it cannot."""

import os

import pytest

from ringwall.sim.linux import debian, initramfs, kernel


def pytest_collection_modifyitems(config, items):
    if not kernel.uml_cached() or debian.find(initramfs.PACKAGES) is None:
        guests = [item for item in items if item.get_closest_marker("guest")]
        config.hook.pytest_deselected(items=guests)
        items[:] = [item for item in items if item not in guests]


@pytest.fixture(scope="session")
def clean_environment():
    """The variables of this process without those that are settings of `make linux`."""
    settings = ["GUEST", "IOMMU", "GUEST_ARCH", "PROMPT", "SEED", "LATENCY", "TIMEOUT", "JOB", "TABLE", "WAVES", "RECORD"]
    return {name: value for name, value in os.environ.items() if name not in settings}
