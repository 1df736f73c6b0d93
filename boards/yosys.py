"""Yosys in a process of its own."""

import subprocess
import sys
from pathlib import Path

from amaranth.back import rtlil

from ..rtl.virtio import store

ZEROS = "for (row = 0; row < DEPTH; row = row + 1) rows[row] = 0;"  # block RAM begins so by itself; Yosys takes minutes for each 4,096 rows
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
    source, rows, text = netlist.with_suffix(".il"), netlist.with_suffix(".store.v"), rtlil.convert(component, emit_src=False)
    source.write_text(text)
    rows.write_text(store.VERILOG.replace(ZEROS, "") if "ringwall_store" in text else "")
    run(f"read_rtlil {source}", f"read_verilog {rows}", f"{command} -top top", f"write_json {netlist}")
