"""The IOMMU without the card: the example of its README, and what its table of sizes is made of."""

import re
from pathlib import Path

from ringwall.boards import sizes
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
    """IOMMU-ALONE-3: the README's table of sizes has the rows that the command prints, and no other."""
    rows = re.findall(r"^\| (.*?) \| (ECP5|xc7) \|", README, re.MULTILINE)
    assert rows == [(row, family) for row in sizes.ROWS for family in sizes.FAMILIES]
