"""Pins of the Alveo U50.

Source of every one: example/Alveo/fpga/fpga_au50.xdc of github.com/alexforencich/verilog-pcie, commit 25156a9.
"""

from amaranth.build import Attrs, Clock, DiffPairs, Pins, Resource, Subsignal
from amaranth.vendor import XilinxPlatform

__all__ = ["CONFIGURATION", "AlveoU50Platform", "AlveoU50x8Platform"]

_RX_P = "AL2 AM4 AK4 AN2 AP4 AR2 AT4 AU2 AV4 AW2 BA2 BC2 AY4 BB4 BD4 BE6"
_RX_N = "AL1 AM3 AK3 AN1 AP3 AR1 AT3 AU1 AV3 AW1 BA1 BC1 AY3 BB3 BD3 BE5"
_TX_P = "Y5 AA7 AB5 AC7 AD5 AF5 AE7 AH5 AG7 AJ7 AL7 AM9 AN7 AP9 AR7 AT9"
_TX_N = "Y4 AA6 AB4 AC6 AD4 AF4 AE6 AH4 AG6 AJ6 AL6 AM8 AN6 AP8 AR6 AT8"
CONFIGURATION = {  # of the bitstream in its flash
    "CFGBVS": "GND", "CONFIG_VOLTAGE": "1.8", "CONFIG_MODE": "SPIx4", "BITSTREAM.CONFIG.CONFIGFALLBACK": "ENABLE",
    "BITSTREAM.GENERAL.COMPRESS": "TRUE", "BITSTREAM.CONFIG.SPI_BUSWIDTH": "4", "BITSTREAM.CONFIG.CONFIGRATE": "85.0",
    "BITSTREAM.CONFIG.EXTMASTERCCLK_EN": "DISABLE", "BITSTREAM.CONFIG.SPI_FALL_EDGE": "YES", "BITSTREAM.CONFIG.UNUSEDPIN": "PULLUP",
    "BITSTREAM.CONFIG.SPI_32BIT_ADDR": "YES",
}  # fmt: skip


def _resources(lanes):
    """Return what the card uses of its pins: the first ``lanes`` of PCIe, and the output that says that its HBM is not too hot."""
    rx, tx = ((" ".join(pins.split()[:lanes]) for pins in poles) for poles in ((_RX_P, _RX_N), (_TX_P, _TX_N)))
    return [
        Resource("pcie", 0,
            Subsignal("perst_n", Pins("AW27", dir="i"), Attrs(IOSTANDARD="LVCMOS18", PULLUP="TRUE")),
            Subsignal("clk", DiffPairs("AF9", "AF8", dir="i"), Clock(100e6)),
            Subsignal("rx", DiffPairs(*rx, dir="i")),
            Subsignal("tx", DiffPairs(*tx, dir="o"))),
        Resource("hbm_cattrip", 0, Pins("J18", dir="o"), Attrs(IOSTANDARD="LVCMOS18")),
    ]  # fmt: skip


class AlveoU50Platform(XilinxPlatform):
    """The card with all sixteen lanes."""

    device, package, speed = "xcu50", "fsvh2104", "2-e"
    resources, connectors = _resources(16), ()


class AlveoU50x8Platform(AlveoU50Platform):
    """The card with its first eight lanes, in quads 227 and 226. The reference clock is that of all sixteen, of quad 225."""

    resources = _resources(8)
