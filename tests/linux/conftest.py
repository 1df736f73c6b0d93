"""Tests with the marker ``guest`` run where the cache has user-mode Linux and its image: `make test` sees to it, or says it cannot."""

from ringwall.sim.linux import debian, initramfs, kernel


def pytest_collection_modifyitems(config, items):
    if not kernel.uml_cached() or debian.find(initramfs.PACKAGES) is None:
        guests = [item for item in items if item.get_closest_marker("guest")]
        config.hook.pytest_deselected(items=guests)
        items[:] = [item for item in items if item not in guests]
