"""Yosys in a process of its own."""

import re
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


def relaxed(rtlil: str) -> str:
    """Return ``rtlil`` with read ports of RAMs (:data:`..rtl.stream.ram.Ram`) that may bring anything of a place that is being written.

    Yosys has that as a parameter of the port; Amaranth writes only the attribute of the memory.
    """
    lines, names, is_marked = rtlil.split("\n"), set(), False
    for n, line in enumerate(lines):
        word, _, rest = line.strip().partition(" ")
        if word == "module":
            names = set()
        elif word == "attribute":
            is_marked |= rest.startswith(r"\no_rw_check ")
            continue
        elif word == "memory" and is_marked:
            names.add(rest.split()[-1])
        elif word == "cell" and rest.startswith("$memrd_v2"):
            end = lines.index("  end", n)
            port = dict(re.findall(r"^ +parameter \\(\w+) (.*)$", "\n".join(lines[n:end]), re.MULTILINE))
            if port["MEMID"].strip('"').replace("\\\\", "\\") in names and port["CLK_ENABLE"] == "1":
                width, _, bits = port["TRANSPARENCY_MASK"].partition("'")
                mask = "".join("10"[int(bit)] for bit in bits)
                at = next(i for i in range(n, end) if r"\COLLISION_X_MASK" in lines[i])
                lines[at] = rf"    parameter \COLLISION_X_MASK {width}'{mask}"
        is_marked = False
    return "\n".join(lines)


def synthesize(component, command: str, netlist: Path):
    """Write the netlist of ``component`` as JSON, made by ``command`` (such as ``synth_ecp5``)."""
    source, array = netlist.with_suffix(".il"), netlist.with_suffix(".store.v")
    source.write_text(relaxed(to_rtlil(component)))
    array.write_text(store.VERILOG)
    run(f"read_rtlil {source}", f"read_verilog -defer {array}", f"{command} -top top", "autoname", f"write_json {netlist}")
