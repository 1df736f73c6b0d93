"""LUTs and registers of each block of a card: ``python -m ringwall.boards.blocks`` prints what changed since they were recorded.

The card is that of :mod:`.ecpix5`, mapped to ECP5 by Yosys; what is recorded lies in ``blocks.json`` beside this file.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from ..rtl.verilog import TunnelCard
from .ecpix5.build import BOARD
from .sizes import LUTS, mapped

__all__ = ["RECORDED", "by_block", "grown"]

RECORDED = Path(__file__).with_name("blocks.json")
DEPTH = 3  # names below the top that make a block
LEAST, TOLERANCE = 500, 0.05  # LUTs or registers of a block that is looked at; growth that is none


def by_block(cells):
    """Return LUTs and registers, by block, of a netlist's ``cells``: a block's hold those of the blocks in it; "" is the whole."""
    found = {"lut": Counter(), "ff": Counter()}
    for name, cell in cells.items():
        kind = cell["type"]
        luts = 1 if kind.startswith("LUT") else LUTS.get(kind, 0)
        path = []
        for part in name.split(".")[:-1]:
            part = part.partition("$")[0]  # behind it a number, where Amaranth had two of the name
            if not part.isidentifier() or len(path) == DEPTH:
                break
            path.append(part)
        for depth in range(len(path) + 1):
            block = ".".join(path[:depth])
            found["lut"][block] += luts
            found["ff"][block] += kind == "TRELLIS_FF"
    return {what: {block: count for block, count in sorted(counts.items()) if count >= LEAST} for what, counts in found.items()}


def grown(now, before):
    """Return a sentence for each block that has over 5 % more than before, the smallest blocks first, as they name the cause best."""
    return [
        f"{block or 'the card'} grew from {before[what][block]} to {count} {what.upper()}s"
        for what, counts in now.items() for block, count in sorted(counts.items(), key=lambda item: item[1])
        if count > before[what].get(block, count) * (1 + TOLERANCE)
    ]  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ringwall.boards.blocks", description="Count LUTs and registers of a card's blocks.")
    parser.add_argument("--record", action="store_true", help="what is found is what later runs are compared with")
    asked = parser.parse_args(arguments)
    print("ringwall: Yosys works, some minutes", file=sys.stderr, flush=True)
    now = by_block(mapped("ECP5, thorough", TunnelCard(BOARD.config)))
    before = json.loads(RECORDED.read_text()) if RECORDED.exists() else now
    print("| block | LUT | was | FF | was |", "|---|---|---|---|---|", sep="\n")
    for block in sorted(set(now["lut"]) | set(now["ff"])):
        counts = [str(side[what].get(block, "-")) for what in ("lut", "ff") for side in (now, before)]
        print(f"| {block or 'all'} | {' | '.join(counts)} |")
    if asked.record:
        RECORDED.write_text(json.dumps(now, indent=1) + "\n")
    elif sentences := grown(now, before):
        sys.exit("\n".join(sentences))


if __name__ == "__main__":
    main()
