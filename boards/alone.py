"""Fmax of each block of the ECPIX-5's card alone, on ECP5: ``python -m ringwall.boards.alone [block ...]`` prints a table.

A block is cut out of the card's RTLIL, so it has the parameters that the card gives it, and stands in the shell of :mod:`.place`.
Placement is a lottery of some percent: a block that misses its goal is placed anew with the next seed, ``SEEDS`` times; the table has the
fastest, and how often it was tried.
"""

import contextlib
import re
import tempfile
from pathlib import Path

from amaranth import ClockSignal, Instance, ResetSignal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..rtl.verilog import TunnelCard, to_rtlil
from ..rtl.virtio import store
from .ecpix5.build import BOARD
from .nextpnr import ECP5
from .place import GOAL, NETLIST, Shell, place_netlist
from .sizes import COMMANDS, asked_rows
from .yosys import relaxed, run

__all__ = ["BLOCKS", "Block", "alone", "module_of", "ports_of"]

CARD, SEEDS, SECONDS = "card", 6, 600
CLOCK = {"clk": ClockSignal, "rst": ResetSignal}
# Each stands between streams, most of whose ends are registers. What only joins them (routers, mergers, the decoder) is not here.
BLOCKS = (
    "tunnel", "phy", "endpoint.core.receiver", "endpoint.core.transmitter", "endpoint.core.completer", "endpoint.core.config_space",
    "endpoint.core.collector", "endpoint.core.requester", "endpoint.core.gate", "endpoint.core.iommu", "endpoint.engine.dispatcher",
    "endpoint.engine.walker", "endpoint.engine.scout", "endpoint.engine.lines", "endpoint.engine.lane_0", "endpoint.engine.used",
    "endpoint.engine", "endpoint.transport_1", "endpoint.device_1", "endpoint.msix",
)  # fmt: skip


def module_of(rtlil: str, block: str):
    """Return the module that ``block`` is in ``rtlil``; behind it is a number, where Amaranth had two of the name.

    Raises
    ------
    :exc:`ValueError`
        If there is none.
    """
    found = re.search(rf"^module \\({CARD}\.{re.escape(block)}(\$\d+)?)$", rtlil, re.MULTILINE)
    if found is None:
        raise ValueError(f"The card has no block {block!r}")
    return found[1]


def ports_of(rtlil: str, module: str):
    """Return direction and width of each port of ``module``, by name, as ``rtlil`` declares them."""
    found = re.search(rf"^module \\{re.escape(module)}$(.*?)^end$", rtlil, re.MULTILINE | re.DOTALL)
    wires = re.findall(r"^  wire width (\d+) (input|output) \d+ +\\(\S+)$", found[1], re.MULTILINE)
    return {name: (direction, int(width)) for width, direction, name in wires}


class Block(wiring.Component):
    """An instance of ``module`` in the domain ``sync``, its ``ports`` those of :func:`ports_of`; members are ``port0`` and so on."""

    def __init__(self, module, ports):
        self.module, self.ports = module, ports
        super().__init__({f"port{n}": (In if way == "input" else Out)(width)
                          for n, (name, (way, width)) in enumerate(ports.items()) if name not in CLOCK})  # fmt: skip

    def elaborate(self, platform):
        given = (CLOCK[name]() if name in CLOCK else getattr(self, f"port{n}") for n, name in enumerate(self.ports))
        return Instance(self.module, *((way[0], name, value) for (name, (way, _)), value in zip(self.ports.items(), given, strict=True)))


def alone(rtlil, module, part=ECP5, *, goal=GOAL, seeds=SEEDS, seconds=SECONDS):
    """Place and route ``module`` of ``rtlil`` alone, with seed after seed up to ``seeds`` until it reaches ``goal``.

    Returns
    -------
    tuple of :class:`.place.Placed` and :class:`int`
        The fastest, and how many seeds were tried.

    Raises
    ------
    :exc:`TimeoutError`
        If none of them was routed within ``seconds``.
    """
    shell = Shell(Block(module, ports_of(rtlil, module)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in {"card.il": rtlil, "shell.il": to_rtlil(shell), "store.v": store.VERILOG}.items():
            (folder / file).write_text(text)
        run(f"read_rtlil {folder}/card.il", f"read_rtlil {folder}/shell.il", f"read_verilog -defer {folder}/store.v",
            "hierarchy -top top", f"{COMMANDS['ECP5, thorough']} -top top", f"write_json {folder}/{NETLIST}")  # fmt: skip
        found = []
        for seed in range(1, seeds + 1):
            with contextlib.suppress(TimeoutError):  # a block stands alone in minutes or, with this seed, never
                found.append(place_netlist(folder, part, goal=goal, seed=seed, seconds=seconds))
                if found[-1].frequency >= goal:
                    break
        if not found:
            raise TimeoutError(f"{module!r} was placed with {seeds} seeds, and routed with none of them within {seconds} seconds each")
        return max(found, key=lambda placed: placed.frequency), seed


def main(arguments=None):
    blocks = asked_rows("Print the frequency of blocks of the ECPIX-5's card, each alone on an ECP5-85, as a table.", arguments, BLOCKS)
    rtlil = relaxed(to_rtlil(TunnelCard(BOARD.config), CARD))
    print("| block | MHz | seeds tried | slowest path, ns | of it wires | through |", "|---|---|---|---|---|---|", sep="\n")
    for block in blocks:
        found, tried = alone(rtlil, module_of(rtlil, block))
        times = f"{found.frequency:.0f} | {tried} | {found.delay:.1f} | {found.routing:.1f}"
        print(f"| {block} | {times} | {', '.join(found.path)} |", flush=True)


if __name__ == "__main__":
    main()
