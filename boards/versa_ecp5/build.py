"""The bitstream of the Lattice ECP5-5G Versa: ``python -m ringwall.boards.versa_ecp5.build --out dir``."""

from ...rtl.config import BlkConfig, EndpointConfig
from .. import ecp5
from .platform import VersaECP55GPlatform

__all__ = ["BOARD"]

# A disk of 64 KiB in block RAM; with an IOMMU it would not fit into 108 block RAMs. The host is far away and slow.
BOARD = ecp5.Board("versa_ecp5", "disk, no IOMMU, 64 bits", VersaECP55GPlatform, EndpointConfig(
    width=64, iommu=None, disks=(BlkConfig(capacity_sectors=128),), tags=32, completion_timeout_cycles=100_000_000))  # fmt: skip


if __name__ == "__main__":
    ecp5.main(BOARD.build, "ringwall.boards.versa_ecp5.build")
