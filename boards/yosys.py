"""Yosys in a process of its own."""

import subprocess
import sys
from pathlib import Path

from ..rtl.verilog import to_rtlil
from ..rtl.virtio import store

_PASSES = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(c, d) for c in sys.argv[1:]]"


def run(*passes: str):
    """Run ``passes``, one after the other.

    Raises
    ------
    :exc:`RuntimeError`
        If one fails, with what Yosys says.
    """
    done = subprocess.run([sys.executable, "-c", _PASSES, *passes], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"Yosys ended with {done.returncode}: {done.stderr[-2000:]}")


def synthesize(component, command: str, netlist: Path):
    """Write the netlist of ``component`` as JSON, made by ``command`` (such as ``synth_ecp5``)."""
    source, array = netlist.with_suffix(".il"), netlist.with_suffix(".store.v")
    source.write_text(to_rtlil(component))
    array.write_text(store.VERILOG)
    run(f"read_rtlil {source}", f"read_verilog -defer {array}", f"{command} -top top", f"write_json {netlist}")
