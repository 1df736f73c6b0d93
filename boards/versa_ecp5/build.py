"""The bitstream of the Lattice ECP5-5G Versa: ``python -m ringwall.boards.versa_ecp5.build --out dir``."""

from ...rtl.config import BlkConfig, EndpointConfig
from ...rtl.verilog import TunnelCard
from .. import ecp5
from .platform import VersaECP55GPlatform

__all__ = ["build", "config_of", "top_of"]

BOARD, CONFIGURATION = "versa_ecp5", "disk, no IOMMU, 64 bits"
CLOCK_MHZ, BAUD = 50, 2_000_000


def config_of():
    """Return the card: a disk of 64 KiB in block RAM; an IOMMU does not fit beside it. The host is far away and slow."""
    return EndpointConfig(width=64, iommu=None, disks=(BlkConfig(capacity_sectors=128),), tags=32,
                          completion_timeout_cycles=100_000_000)  # fmt: skip


def top_of():
    """Return the card between the board's clock, serial line and LED."""
    return ecp5.Top(TunnelCard(config_of()), clock_mhz=CLOCK_MHZ, baud=BAUD)


def build(folder, *, synthesize=True, say=lambda text: None):
    """Build the bitstream in ``folder`` and return its result; only write the project unless ``synthesize``."""
    return ecp5.build(BOARD, CONFIGURATION, VersaECP55GPlatform(), top_of(), folder, synthesize=synthesize, say=say)


if __name__ == "__main__":
    ecp5.main(build, "ringwall.boards.versa_ecp5.build")
