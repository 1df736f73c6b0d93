"""Sizes of the stand-alone IOMMU on ECP5 and xc7, as Yosys maps it: ``python -m ringwall.boards.sizes [row ...]`` prints a table.

Nothing is placed or routed, so there is no frequency: in its stand is the number of LUTs in a row between two registers or block RAMs.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path

from ..rtl.iommu.features import Features
from ..rtl.iommu.unit import Iommu
from .yosys import synthesize

LEAST = {"entries": 16, "ways": 2, "superpage_entries": 2, "walks": 2, "context_entries": 2, "misses": 4}
ALL = Features(**dict.fromkeys(Features.flags(), True))
ROWS = {  # IOTLB entries, what there is beside the least: parameters
    "16": LEAST, "64": {"entries": 64}, "256": {"entries": 256}, "256, all features": {"entries": 256, "features": ALL},
    "256 + 4096": {"entries": 256, "second_entries": 4096},
}  # fmt: skip
FAMILIES = {"ECP5": "synth_ecp5", "xc7": "synth_xilinx -family xc7 -flatten -noiopad -noclkbuf"}  # of the tables
# Of the scripts that come with Yosys this is the one whose circuits are smallest and no deeper, without wide muxes most of all.
THOROUGH, NO_WIDE_MUXES = "scratchpad -copy abc9.script.flow2 abc9.script", "-nowidelut"
_XCUP = "synth_xilinx -family xcup -flatten -noiopad -noclkbuf"
# Yosys 0.70: lutrams_xcu.txt has a RAM of 16 address bits that its map does not know. So 512 rows and more are block RAM.
COMMANDS = {
    **FAMILIES, "ECP5, thorough": f"{THOROUGH}; synth_ecp5 {NO_WIDE_MUXES}",
    "xcup": f"{_XCUP} -top top -run begin:map_memory; setattr -set ram_style \"block\" t:$mem_v2 r:ABITS>=9 %i; "
            f"{_XCUP} -run map_memory:",
}  # fmt: skip

LUTS = {"CCU2C": 2, "TRELLIS_DPR16X4": 4, "RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2,
        "RAM32M16": 8, "RAM64M8": 8}  # that a cell takes, beside LUT1 to LUT6
BLOCKS = {"DP16KD": 1, "RAMB18E1": 0.5, "RAMB36E1": 1, "RAMB18E2": 0.5, "RAMB36E2": 1}
FREE = ("PFUMX", "L6MUX21", "MUXF7", "MUXF8", "MUXF9", "CARRY4", "CARRY8", "INV")  # logic, but no LUT of its own
READ_ADDRESS = r"RAD|ADDR|DPRA|A\d"  # inputs of RAM in LUTs that its outputs follow
CARRY_IN = ("CIN", "CI")


def mapped(family, component):
    """Return the cells of ``component``, mapped to ``family``: Yosys' JSON, by name."""
    with tempfile.TemporaryDirectory() as folder:
        netlist = Path(folder) / "top.json"
        synthesize(component, COMMANDS[family], netlist)
        return json.loads(netlist.read_text())["modules"]["top"]["cells"]


def arcs(cell):
    """Return the inputs that outputs of ``cell`` follow within a cycle, each with the LUTs on the way; none of a register."""
    kind, inputs = cell["type"], [port for port, way in cell.get("port_directions", {}).items() if way == "input"]
    if kind in LUTS and kind != "CCU2C":
        inputs = [port for port in inputs if re.match(READ_ADDRESS, port)]
    elif not kind.startswith("LUT") and kind not in FREE and kind != "CCU2C":
        return []
    return [(port, int(kind not in FREE and port not in CARRY_IN)) for port in inputs]


def longest(cells):
    """Return the names of LUTs in a row where there are most, the first first."""
    drivers = {bit: name for name, cell in cells.items() if arcs(cell) for port, way in cell["port_directions"].items() if way == "output"
               for bit in cell["connections"][port]}  # fmt: skip
    known, before, waiting = {}, {}, list(dict.fromkeys(drivers.values()))
    while waiting:
        name = waiting[-1]
        cell = cells[name]
        steps = [(luts, drivers.get(bit)) for port, luts in arcs(cell) for bit in cell["connections"][port]]
        unknown = [driver for _, driver in steps if driver is not None and driver not in known]
        if unknown:
            waiting += unknown
        else:
            known[name], before[name] = max(((luts + known.get(driver, 0), driver) for luts, driver in steps), key=lambda step: step[0])
            waiting.pop()
    return _back(max(known, key=lambda name: known[name]), known, before)


def _back(name, known, before):
    found = []
    while name is not None:
        if known[name] > known.get(before[name], 0):
            found.append(name)
        name = before[name]
    return found[::-1]


def blocks_of(names):
    """Return the blocks that the cells ``names``, one after another, are of: names of submodules, as Yosys keeps them when it flattens."""
    blocks = (".".join(part for part in name.split(".")[:-1] if part.isidentifier()) or "top" for name in names)
    return [block for block, _ in groupby(blocks)]


def size(cells):
    """Return LUTs, registers, block RAMs, LUTs in a row."""
    kinds = Counter(cell["type"] for cell in cells.values())
    luts = sum(count * (1 if kind.startswith("LUT") else LUTS.get(kind, 0)) for kind, count in kinds.items())
    registers = sum(count for kind, count in kinds.items() if kind == "TRELLIS_FF" or kind.startswith("FD"))
    return luts, registers, sum(count * BLOCKS.get(kind, 0) for kind, count in kinds.items()), len(longest(cells))


def asked_rows(description, arguments, rows=ROWS):
    """Return which of ``rows`` the command line asks for."""
    parser, names = argparse.ArgumentParser(description=description), ", ".join(repr(row) for row in rows)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"what to build, all by default: {names}")
    asked = parser.parse_args(arguments).rows
    if unknown := [row for row in asked if row not in rows]:
        parser.error(f"a row must be one of {names}, not {unknown[0]!r}")
    return asked or list(rows)


def print_table(heading, rows, make):
    """Print a table of ``rows``, with a line for each family; ``make`` returns the component of a row."""
    print(f"| {heading} | family | LUT | FF | BRAM | LUTs in a row |", "|---|---|---|---|---|---|", sep="\n")
    for row in rows:
        for family in FAMILIES:
            print(f"| {row} | {family} |", " | ".join(f"{number:g}" if isinstance(number, float) else str(number)
                                                      for number in size(mapped(family, make(row)))), "|", flush=True)  # fmt: skip


def main(arguments=None):
    rows = asked_rows("Print sizes of the stand-alone IOMMU as a table; Yosys takes minutes for each row.", arguments)
    print_table("entries", rows, lambda row: Iommu(width=64, **ROWS[row]))


if __name__ == "__main__":
    main()
