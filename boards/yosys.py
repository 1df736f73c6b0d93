"""Yosys in a process of its own."""

import subprocess
import sys
from pathlib import Path

from amaranth.back import rtlil

_PASSES = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(c, d) for c in sys.argv[1:]]"


def synthesize(component, command: str, netlist: Path):
    """Write the netlist of ``component`` as JSON, made by ``command`` (such as ``synth_ecp5``)."""
    source = netlist.with_suffix(".il")
    source.write_text(rtlil.convert(component, emit_src=False))
    subprocess.run([sys.executable, "-c", _PASSES, f"read_rtlil {source}", f"{command} -top top", f"write_json {netlist}"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
