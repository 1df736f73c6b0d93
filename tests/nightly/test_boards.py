"""FPGAs, where it takes minutes: xc7 placed by Debian's nextpnr, and the size of a whole card's blocks."""

import json

import pytest

from ringwall.boards import blocks
from ringwall.boards.ecpix5.build import BOARD
from ringwall.boards.nextpnr import XC7, Xc7
from ringwall.boards.place import place
from ringwall.boards.sizes import mapped
from ringwall.rtl.phy.uart import Uart
from ringwall.rtl.verilog import TunnelCard


def test_xc7():
    """BOARD-XC7-1: a small circuit is placed and routed on xc7, faster than the IOMMU; a device that does not exist is an error."""
    found = place(Uart(divisor=100), XC7)
    assert 150 < found.frequency < 700
    assert 0 < found.routing < found.delay
    assert 1000 / found.frequency == pytest.approx(found.delay, rel=0.05)
    with pytest.raises(RuntimeError, match="nextpnr ended with"):
        place(Uart(divisor=100), Xc7(device="xc7a35tcpg236-1"))


def test_growth():
    """BOARD-BLOCKS-2: no block of the ECPIX-5's card has over 5 % more LUTs or registers than when they were recorded."""
    found = blocks.grown(blocks.by_block(mapped("ECP5, thorough", TunnelCard(BOARD.config))), json.loads(blocks.RECORDED.read_text()))
    assert not found, "; ".join(found)


def test_bitstream(tmp_path):
    """BOARD-ECPIX5-1: the whole card of the ECPIX-5 goes to its bitstream: at most 30,000 LUTs, no slower than its clock."""
    result = BOARD.build(tmp_path)
    assert (tmp_path / "top.bit").stat().st_size > 100_000
    assert result["lut"] <= 30_000
    assert result["fmax"]["sync"] >= BOARD.clock_mhz
    assert len(result["path"]) > 0
