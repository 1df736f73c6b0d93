"""Options of every test run, and the order of a run in several processes; nothing else."""

import itertools
import os

import pytest

# Functions whose cases take longest: each process begins with its share of them, so that none is left with one at the end.
LONGEST = {
    "test_compiled", "test_card", "test_image", "test_no_iommu_is_identity", "test_engine", "test_unhappy", "test_misaimed", "test_rows",
    "test_coming_and_going", "test_rebind", "test_second_host", "test_reader", "test_ultrascale_card", "test_requester",
    "test_every_error_ends_its_read", "test_garbage_changes_nothing", "test_strict", "test_icarus", "test_unit",
}  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("ringwall")
    group.addoption("--seed", help="seed of every simulation (default: CRC-32 of the test's own name)")
    group.addoption("--waves", action="store_true", help="record every signal of every simulation")
    group.addoption("--sim", choices=["icarus", "verilator"], help="simulator (default: icarus)")


def pytest_configure(config):
    for option, variable in (("seed", "SEED"), ("sim", "SIM")):
        if config.getoption(option):
            os.environ[variable] = config.getoption(option)
    if config.getoption("waves"):
        os.environ["WAVES"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Each of n processes begins with one n-th of the tests, in order, and takes over from others what is left (worksteal)."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count > 1:
        long = [item for item in items if getattr(item, "originalname", item.name) in LONGEST]
        rest = [item for item in items if getattr(item, "originalname", item.name) not in LONGEST]
        size = len(items) // count
        shares, left = [long[n::count] for n in range(count)], iter(rest)
        for n, share in enumerate(shares):
            wanted = size + (n >= count - len(items) % count)
            share += itertools.islice(left, max(0, wanted - len(share)))
        items[:] = [item for share in shares for item in share] + list(left)
