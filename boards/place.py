"""Fmax of the stand-alone IOMMU on ECP5 and xc7: ``python -m ringwall.boards.place [row ...]`` places, routes and prints a table.

Between the unit and the pins stand a shift register in front and a folded one behind: what is timed is the unit alone.
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from amaranth import Cat, Const, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..rtl.iommu.unit import Iommu
from .nextpnr import ECP5, XC7
from .sizes import ROWS, asked_rows, blocks_of
from .yosys import synthesize

__all__ = ["GOAL", "NETLIST", "Placed", "Shell", "place", "place_netlist", "read_report"]

GOAL = 125  # MHz
NETLIST = "top.json"


class Shell(wiring.Component):
    """A circuit of two pins around ``component``: all that goes in comes from registers, all that comes out goes to some.

    Members
    -------
    si, so : ``In(1)``, ``Out(1)``
        Serial input and output.
    """

    si: In(1)
    so: Out(1)

    def __init__(self, component):
        self.component = component
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.inner = inner = self.component
        members = [(member.flow, Value.cast(value)) for _, member, value in inner.signature.flatten(inner)]
        inputs, outputs = (Cat(value for flow, value in members if flow == one) for one in (In, Out))
        given, kept, folded = Signal(len(inputs)), Signal(len(outputs)), Signal(len(outputs))
        m.d.sync += [given.eq(Cat(self.si, given)), kept.eq(outputs), folded.eq(Cat(Const(0, 1), folded) ^ kept)]
        m.d.comb += [inputs.eq(given), self.so.eq(folded[-1])]
        return m


@dataclass(frozen=True)
class Placed:
    """What nextpnr said.

    Attributes
    ----------
    frequency : :class:`float`
        MHz that the slowest path between two registers or RAMs allows.
    path : tuple of :class:`str`
        The blocks that this path goes through, in order, as far as the names of its cells tell.
    delay, routing : :class:`float`
        Of that path, in ns; the part of it that wires take.
    goal : :class:`float`
        MHz that it was placed and routed for.
    """

    frequency: float
    path: tuple
    delay: float
    routing: float
    goal: float


def place(component, part=ECP5, *, goal=GOAL):
    """Place and route ``component`` in a :class:`Shell` on ``part`` of :mod:`.nextpnr` and return what came of it: minutes for 10,000 LUTs.

    Raises
    ------
    :exc:`RuntimeError`
        If it does not fit or cannot be routed, with what nextpnr says.
    """
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Shell(component), part.synthesis, Path(folder) / NETLIST)
        return place_netlist(Path(folder), part, goal=goal)


def place_netlist(folder: Path, part, *, goal=GOAL, seed=1, seconds=None):
    """As :func:`place`, of the netlist :data:`NETLIST` in ``folder``, which is that of a :class:`Shell`; ``seed`` is the placer's.

    Raises
    ------
    :exc:`TimeoutError`
        If that takes more than ``seconds``: some placements are never routed.
    """
    report = folder / "report.json"
    command = part.command(folder, ("clk", "rst", "si", "so"))
    command += ["--freq", str(goal), "--json", NETLIST, "--report", report.name, "--seed", str(seed), "--timing-allow-fail", "--quiet"]
    try:
        done = subprocess.run(command, cwd=folder, env=part.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              timeout=seconds, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"nextpnr did not end within {seconds} seconds with seed {seed}") from error
    if done.returncode:
        raise RuntimeError(f"nextpnr ended with {done.returncode}: {done.stderr[-2000:]}")
    return read_report(report)


def read_report(file: Path):
    """Return the :class:`Placed` that nextpnr's report in ``file`` says, of a circuit with one clock."""
    found = json.loads(file.read_text())
    (clock,) = found["fmax"].values()
    (slowest,) = [path["path"] for path in found["critical_paths"] if path["from"] == path["to"]]
    cells = [step["to"]["cell"].partition(".")[2] for step in slowest if step["type"] != "routing"]
    routing = sum(step["delay"] for step in slowest if step["type"] == "routing")
    return Placed(clock["achieved"], tuple(blocks_of(cells)), sum(step["delay"] for step in slowest), routing, clock["constraint"])


def main(arguments=None):
    rows = asked_rows("Print the frequency of the stand-alone IOMMU on an ECP5-85 and on an XC7A200T, as a table.", arguments)
    print("| entries | family | MHz | slowest path, ns | of it wires | through |", "|---|---|---|---|---|---|", sep="\n")
    for row in rows:
        for family, part in {"ECP5": ECP5, "xc7": XC7}.items():
            found = place(Iommu(width=64, **ROWS[row]), part)
            times = f"{found.frequency:.0f} | {found.delay:.1f} | {found.routing:.1f}"
            print(f"| {row} | {family} | {times} | {', '.join(found.path)} |", flush=True)


if __name__ == "__main__":
    main()
