"""Vivado projects written without Vivado: the PCIe core that ``create_ip`` makes, the top that joins it to the card, the files."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

from amaranth import Cat, ClockDomain, ClockSignal, Const, Elaboratable, Instance, Module, ResetSignal, Signal, Value
from amaranth.lib import io
from amaranth.lib.wiring import In
from amaranth.vendor import XilinxPlatform

from .sizes import blocks_of, longest, mapped, size

__all__ = ["CARD", "Core", "Top", "bar_options", "black_box", "build_project", "card_ports", "main", "project", "report", "size_of_bar"]

CARD = "ringwall_card"
INPUT, OUTPUT = "input", "output"
VIVADO = "vivado -mode batch -source top.tcl"


def card_ports(card):
    """Return direction and width of each port of the module that ``card`` becomes, by name, clock and reset included."""
    ports = {"clk": (INPUT, 1), "rst": (INPUT, 1)}
    for path, member, value in card.signature.flatten(card):
        ports["__".join(map(str, path))] = (INPUT if member.flow == In else OUTPUT, len(Value.cast(value)))
    return ports


def black_box(name, ports):
    """Return Verilog that declares a module of ``ports`` and says nothing of what is in it."""
    lines = [f"  {direction} [{width - 1}:0] {port}" for port, (direction, width) in ports.items()]
    return "(* blackbox *)\nmodule {} (\n{}\n);\nendmodule\n".format(name, ",\n".join(lines))


@dataclass(frozen=True)
class Core:
    """A PCIe core as Vivado's ``create_ip`` makes it.

    Parameters
    ----------
    kind : :class:`str`
        Name of the IP; the module is called that with ``_0`` behind it.
    ports : mapping
        Direction and width of each port of the module, by name.
    options : mapping
        What is set of the IP, ``CONFIG.`` left out.
    clock, reset : :class:`str`
        Its outputs that are clock and reset of the card.
    buffer : :class:`str`
        Cell that takes the reference clock from its pins, with ``buffer_outputs``: which of its outputs goes where.
    perst : :class:`str`
        Input that PERST# goes to, active low.
    ties : mapping
        Inputs that are a constant other than 0, and neither the card's nor a pin's.
    """

    kind: str
    ports: Mapping
    options: Mapping
    clock: str
    reset: str
    buffer: str
    buffer_outputs: Mapping
    perst: str
    ties: Mapping = field(default_factory=dict)

    @property
    def module(self):
        """Name of the module."""
        return f"{self.kind}_0"

    def tcl(self):
        """Return commands that make the core and synthesize it."""
        settings = [f"    CONFIG.{name} {{{value}}} \\" for name, value in self.options.items()]
        return "\n".join([
            f"create_ip -vendor xilinx.com -library ip -name {self.kind} -module_name {self.module}",
            "set_property -dict [list \\", *settings, f"] [get_ips {self.module}]",
            f"generate_target all [get_ips {self.module}]", f"synth_ip [get_ips {self.module}]",
        ])  # fmt: skip


def size_of_bar(size):
    """Return how the IPs write the size of a BAR: (scale, number)."""
    for scale, unit in (("Gigabytes", 1 << 30), ("Megabytes", 1 << 20), ("Kilobytes", 1 << 10)):
        if size >= unit:
            return scale, size // unit
    raise ValueError(f"A BAR of the core must have at least a kibibyte, not {size!r}")


def bar_options(description, key):
    """Return what the IPs' options say of the BARs of ``description``, all of 64 bits; ``key`` makes a name of number and what is said."""
    options = {}
    for index in (0, 2, 4):
        bar = next((bar for bar in description.bars if bar.index == index), None)
        options[key(index, "Enabled")] = str(bar is not None).lower()
        if bar is not None:
            scale, number = size_of_bar(bar.size_bytes)
            said = {"Type": "Memory", "64bit": "true", "Scale": scale, "Size": number, "Prefetchable": str(bar.is_prefetchable).lower()}
            options |= {key(index, what): str(value) for what, value in said.items()}
    return options


class Top(Elaboratable):
    """Joins ``card`` and ``core`` by the names of their ports, and the core to the pins of the platform's ``pcie`` resource.

    A port of the core that is wider than the card's takes 0 in the rest, or gives its lowest bits. Inputs of neither are constants.
    Resources named in ``levels`` are pins at a fixed level, 1: active.
    """

    def __init__(self, card, core, *, levels=()):
        self.card, self.core, self.levels = card, core, dict(levels)

    def elaborate(self, platform):
        m = Module()
        core, ports, ours = self.core, self.core.ports, card_ports(self.card)
        pcie = platform.request("pcie", 0, dir="-")
        m.domains.sync = ClockDomain()
        m.submodules.perst = perst = io.Buffer("i", pcie.perst_n)
        clocks = {name: Signal(name=name) for name in core.buffer_outputs.values()}
        m.submodules.refclk = Instance(
            core.buffer, ("i", "I", pcie.clk.p), ("i", "IB", pcie.clk.n), ("i", "CEB", Const(0)),
            *(("o", output, clocks[name]) for output, name in core.buffer_outputs.items()))  # fmt: skip
        given = {**clocks, core.perst: perst.i, core.clock: ClockSignal(), core.reset: ResetSignal(),
                 "pci_exp_rxp": pcie.rx.p, "pci_exp_rxn": pcie.rx.n, "pci_exp_txp": pcie.tx.p, "pci_exp_txn": pcie.tx.n}  # fmt: skip
        theirs, mine = [], [("i", "clk", ClockSignal()), ("i", "rst", ResetSignal())]
        for name, (direction, width) in ours.items():
            if name in ports and name not in given:
                signal = Signal(width, name=name)
                mine.append((direction[0], name, signal))
                wider = ports[name][1] - width
                rest = Signal(wider, name=f"{name}_rest") if direction == INPUT else Const(0, wider)
                given[name] = Cat(signal, rest) if wider else signal
        for name, (direction, width) in ports.items():
            if name in given:
                theirs.append((direction[0], name, given[name]))
            elif direction == INPUT:
                theirs.append(("i", name, Const(core.ties.get(name, 0), width)))
        m.submodules.pcie = Instance(core.module, *theirs)
        m.submodules.card = Instance(CARD, *mine)
        for name, level in self.levels.items():
            m.submodules[name] = buffer = io.Buffer("o", platform.request(name, 0, dir="-"))
            m.d.comb += buffer.o.eq(level)
        return m


def project(platform: XilinxPlatform, top: Top, verilog: str, **overrides):
    """Return the files of a Vivado project, by name: ``verilog`` is the text of the card's module."""
    os.environ["AMARANTH_USE_YOSYS"] = "builtin"  # as in rtl/verilog.py
    platform.add_file(f"{CARD}.v", verilog)
    plan = platform.build(top, do_build=False, emit_src=False, script_after_read=top.core.tcl(), **overrides)
    return {name: text if isinstance(text, str) else text.decode() for name, text in plan.files.items() if "debug" not in name}


def report(board, configuration, family, card):
    """Return what Yosys makes of ``card`` as the result of a board: sizes, the most LUTs in a row and the blocks they are of. Minutes."""
    cells = mapped(family, card)
    luts, registers, rams, levels = size(cells)
    return {
        "board": board, "configuration": configuration, "tool": f"yosys {version('pyosys')}", "date": str(date.today()), "lut": luts,
        "ff": registers, "bram": rams, "dsp": sum(cell["type"].startswith("DSP48") for cell in cells.values()), "levels": levels,
        "path": blocks_of(longest(cells)),
    }  # fmt: skip


def build_project(folder, files, state):
    """Write ``files`` and ``state``, in a file README, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**files, "README": f"{state}\n"}.items():
        (folder / name).write_text(text)


def main(build, module, arguments=None, *, widths=()):
    """The command line of a board: ``build(folder, synthesize=...)`` writes a project and returns a result.

    Where the link may have one of several ``widths``, ``build`` takes ``width``, too, and the first is the default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Write the Vivado project of this card.")
    parser.add_argument("--out", required=True, help="folder to write it to")
    parser.add_argument("--sizes", action="store_true", help="map the card with Yosys, too, and write result.json: some minutes")
    if widths:
        parser.add_argument("--width", type=int, choices=widths, default=widths[0], help="bits of the link's streams (default %(default)s)")
    asked = parser.parse_args(arguments)
    result = build(Path(asked.out), synthesize=asked.sizes, **({"width": asked.width} if widths else {}))
    if asked.sizes:
        (Path(asked.out) / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{asked.out}: written. From here it takes Vivado:\n  cd {asked.out} && {VIVADO}", file=sys.stderr)
