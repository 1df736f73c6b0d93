"""The IOMMU without the card: the example of its README, and what its table of sizes is made of."""

import re
from pathlib import Path

import pytest
from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ringwall.boards import sizes
from ringwall.boards.nextpnr import Ecp5
from ringwall.boards.place import place
from ringwall.rtl import iommu

README = Path(iommu.__file__).with_name("README.md").read_text()


def test_example():
    """IOMMU-ALONE-1: the README's example, as it stands there, builds the unit, runs it and translates one page."""
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(text, names)
    assert names["answers"] == [(5, 0, 0xABCD_E234)]


def cell(kind, **connections):
    """Return a cell as Yosys writes it; ports that are named so are outputs."""
    ways = {port: "output" if port in ("Z", "Q", "DO", "COUT", "S0") else "input" for port in connections}
    return {"type": kind, "port_directions": ways, "connections": connections}


def test_sizes():
    """IOMMU-ALONE-2: cells and LUTs in a row of a netlist by hand: registers and write addresses end a row, carries and muxes are free."""
    cells = {
        "register": cell("TRELLIS_FF", DI=[9], Q=[1]), "first": cell("LUT4", A=[1], B=["0"], Z=[2]),
        "wide": cell("PFUMX", ALUT=[2], BLUT=[1], Z=[3]), "carry": cell("CCU2C", CIN=[3], A0=[1], COUT=[4]),
        "next": cell("CCU2C", CIN=[4], A0=[1], COUT=[5], S0=[6]), "block": cell("DP16KD", ADA0=[8], DOA0=[9]),
        "ram": cell("TRELLIS_DPR16X4", RAD=[6], WAD=[2], DI=[7], WCK=[1], DO=[7]), "last": cell("LUT4", A=[7], Z=[8]),
        "note": {"type": "$scopeinfo", "connections": {}},
    }  # fmt: skip
    assert sizes.size(cells) == (1 + 2 * 2 + 4 + 1, 1, 1, 3)


def test_table():
    """IOMMU-ALONE-3: the README's table of sizes has the rows that the command prints, that of frequencies three of them, and no other."""
    counted, placed = README.split("`python -m ringwall.boards.place 16 64 256`")
    for text, expected in ((counted, sizes.ROWS), (placed, ("16", "64", "256"))):
        rows = re.findall(r"^\| (.*?) \| (ECP5|xc7) \|", text, re.MULTILINE)
        assert rows == [(row, family) for row in expected for family in sizes.FAMILIES]


class Chain(wiring.Component):
    """``count`` multiplications of 8 bits, one behind the other, between two registers."""

    a: In(8)
    o: Out(8)

    def __init__(self, count):
        self.count = count
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.deep = deep = Module()
        value = a = Signal(8, name="a_then")
        m.d.sync += a.eq(self.a)
        for n in range(self.count):
            product = Signal(8, name=f"product_{n}")
            deep.d.comb += product.eq((value * value)[4:12] ^ a)
            value = product
        product = Signal(8)
        deep.d.sync += product.eq(value)
        m.d.sync += self.o.eq(product ^ a)
        return m


def test_place():
    """IOMMU-ALONE-4: frequency of what is placed and routed, and the block of its slowest path; too much for the FPGA is an error."""
    short, long = (place(Chain(count), Ecp5(device="um5g-25k")) for count in (1, 3))
    assert 1000 / short.frequency == pytest.approx(short.delay, rel=0.01)
    assert 2 < short.frequency / long.frequency < 4
    assert long.path[-1] == "deep"
    assert 0 < long.routing < long.delay
    with pytest.raises(RuntimeError, match="nextpnr ended with"):
        place(Chain(40), Ecp5(device="um5g-25k"))  # it has 28 multipliers
