"""The bitstream of the ECPIX-5 85F: ``python -m ringwall.boards.ecpix5.build --out dir``."""

from ...sim.tunnel import board_config
from .. import ecp5
from .platform import ECPIX585Platform

__all__ = ["BOARD"]

# The card is the one that ``make sim TARGET=tunnel:...`` expects; its disk of 128 KiB is block RAM.
BOARD = ecp5.Board("ecpix5", "RISC-V IOMMU of 64 entries and 4 walks, disk, 64 bits", ECPIX585Platform, board_config(), goal_mhz=80)


if __name__ == "__main__":
    ecp5.main(BOARD.build, "ringwall.boards.ecpix5.build")
