"""The bitstream of the ECPIX-5 85F: ``python -m ringwall.boards.ecpix5.build --out dir``."""

from ...rtl.verilog import TunnelCard
from ...sim.tunnel import board_config
from .. import ecp5
from .platform import ECPIX585Platform

__all__ = ["build", "config_of", "top_of"]

BOARD, CONFIGURATION = "ecpix5", "RISC-V IOMMU of 64 entries and 4 walks, disk, 64 bits"
CLOCK_MHZ, BAUD = 50, 2_000_000


def config_of():
    """Return the card that ``make sim TARGET=tunnel:...`` expects: a RISC-V IOMMU, and a disk of 256 KiB in block RAM."""
    return board_config()


def top_of():
    """Return the card between the board's clock, serial line and LED."""
    return ecp5.Top(TunnelCard(config_of()), clock_mhz=CLOCK_MHZ, baud=BAUD)


def build(folder, *, synthesize=True, say=lambda text: None):
    """Build the bitstream in ``folder`` and return its result; only write the project unless ``synthesize``."""
    return ecp5.build(BOARD, CONFIGURATION, ECPIX585Platform(), top_of(), folder, synthesize=synthesize, say=say)


if __name__ == "__main__":
    ecp5.main(build, "ringwall.boards.ecpix5.build")
