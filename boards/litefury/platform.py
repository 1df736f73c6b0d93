"""Pins of the LiteFury; those of the NiteFury II are the same.

Source of every one, and of the places of the transceivers: Sample-Projects/Project-0/FPGA/LiteFury/project/project.srcs/constrs_1/imports/
constraints/early.xdc, and normal.xdc beside it, of github.com/RHSResearchLLC/NiteFury-and-LiteFury, commit 6d1b851; the part: project.xpr.
The NiteFury II's files, under Nitefury-II, have the same lines. amaranth-boards 0.0.21 (nitefury.py) has the same pins of PCIe, but PERST#
as an output, inverted.
"""

from amaranth.build import Attrs, Clock, DiffPairs, Pins, PinsN, Resource, Subsignal
from amaranth.vendor import XilinxPlatform

__all__ = ["CONFIGURATION", "TRANSCEIVERS", "LiteFuryPlatform"]

TRANSCEIVERS = ("GTPE2_CHANNEL_X0Y6", "GTPE2_CHANNEL_X0Y4", "GTPE2_CHANNEL_X0Y5", "GTPE2_CHANNEL_X0Y7")  # of lanes 0 to 3
CONFIGURATION = {  # of the bitstream in its flash
    "CFGBVS": "VCCO", "CONFIG_VOLTAGE": "3.3", "CONFIG_MODE": "SPIx4", "BITSTREAM.CONFIG.OVERTEMPPOWERDOWN": "ENABLE",
    "BITSTREAM.CONFIG.EXTMASTERCCLK_EN": "Div-1", "BITSTREAM.CONFIG.SPI_BUSWIDTH": "4", "BITSTREAM.CONFIG.SPI_FALL_EDGE": "YES",
    "BITSTREAM.GENERAL.COMPRESS": "TRUE",
}  # fmt: skip


class LiteFuryPlatform(XilinxPlatform):
    """An M.2 card with an Artix-7 100T, four lanes at 5 GT/s."""

    device, package, speed = "xc7a100t", "fgg484", "2L"
    connectors = ()
    resources = [
        Resource("pcie", 0,
            Subsignal("perst_n", Pins("J1", dir="i"), Attrs(IOSTANDARD="LVCMOS33")),
            Subsignal("clk", DiffPairs("F6", "E6", dir="i"), Clock(100e6)),
            Subsignal("rx", DiffPairs("B10 B8 D11 D9", "A10 A8 C11 C9", dir="i")),
            Subsignal("tx", DiffPairs("B6 B4 D5 D7", "A6 A4 C5 C7", dir="o"))),
        Resource("clkreq", 0, PinsN("G1", dir="o"), Attrs(IOSTANDARD="LVCMOS33")),
    ]  # fmt: skip
