"""Whole machines under QEMU: collected where the cache has QEMU and a kernel for them, which ``make nightly`` sees to."""

from ringwall.sim.linux import kernel

collect_ignore = [] if kernel.cached("amd64") else ["test_qemu.py"]
