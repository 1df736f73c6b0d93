"""Boards by name: ``python -m ringwall.boards.build BOARD`` (``make board BOARD=name``) builds as far as the open tools go.

``python -m ringwall.boards.build --report`` makes the table of boards/README.md from every board's ``result.json``.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["BOARDS", "report", "rows"]

HERE = Path(__file__).parent
BOARDS = tuple(sorted(file.parent.name for file in HERE.glob("*/build.py")))
BEGIN, END = "<!-- made by make board-report -->\n", "<!-- end of what make board-report makes -->\n"


def rows(folder: Path = HERE):
    """Return the lines of the table: one for each result in each board's ``result.json`` below ``folder``; a file has one or a list."""
    names = "board", "configuration", "LUT", "FF", "BRAM", "DSP", "MHz", "LUTs in a row", "slowest path through", "tools, date"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for file in sorted(folder.glob("*/result.json")):
        found = json.loads(file.read_text())
        for one in found if isinstance(found, list) else [found]:
            clocks = ", ".join(f"{mhz:.0f}" for mhz in one.get("fmax", {}).values()) or "not placed"
            cells = one["board"], one["configuration"], one["lut"], one["ff"], f"{one['bram']:g}", one["dsp"], clocks, one["levels"]
            cells += (", ".join(block.removeprefix("endpoint.") for block in one["path"]),)
            lines.append(f"| {' | '.join(map(str, cells))} | {one['tool']}, {one['date']} |")
    return lines


def report(text: str, lines) -> str:
    """Return ``text`` of boards/README.md with ``lines`` as its table.

    Raises
    ------
    :exc:`ValueError`
        If it has no place for the table.
    """
    found = re.fullmatch(f"(.*{BEGIN}).*({END}.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"boards/README.md must have the lines {BEGIN.strip()!r} and {END.strip()!r}, the table goes between them")
    return found[1] + "\n".join([*lines, ""]) + found[2]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ringwall.boards.build", description="Build a board's card, as far as open tools go.")
    parser.add_argument("board", nargs="?", help=f"one of {', '.join(BOARDS)}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="options of the board's own command: --help tells them")
    parser.add_argument("--report", action="store_true", help="make the table of boards/README.md from the results that are there")
    asked = parser.parse_args(arguments)
    if asked.report:
        file = HERE / "README.md"
        file.write_text(report(file.read_text(), rows()))
        print(f"{file}: {len(rows()) - 2} results")
        return
    if asked.board not in BOARDS:
        parser.error(f"the board must be one of {', '.join(BOARDS)}, not {asked.board!r}: make board BOARD=name")
    rest = asked.rest if "--out" in asked.rest or "--help" in asked.rest else [*asked.rest, "--out", f"build/boards/{asked.board}"]
    sys.exit(subprocess.run([sys.executable, "-m", f"{__package__}.{asked.board}.build", *rest], check=False).returncode)


if __name__ == "__main__":
    main()
