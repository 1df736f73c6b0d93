"""Gates: what Yosys makes of the RTL for an ECP5, and its simulation beside the RTL.

LUTs, registers and RAM of LUTs are modelled by Yosys' own cells; its block RAM, DP16KD, has no model there, so there is one here.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from amaranth.hdl._ir import PortDirection

from ..rtl.verilog import portable, ports_of, to_rtlil
from .builds import call

__all__ = ["block_ram", "cells", "lockstep", "netlist"]

MODELLED = ("LUT2", "LUT4", "PFUMX", "L6MUX21", "CCU2C", "TRELLIS_FF", "TRELLIS_DPR16X4")  # by Yosys
_YOSYS = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(c, d) for c in sys.argv[1:]]"
_INITIAL = [f"INITVAL_{n:02X}" for n in range(64)]  # each of 16 words of 20 bits, of which the RAM has 18


def _bits(name, count):
    return [f"{name}{n}" for n in range(count)]


def block_ram():
    """Return the Verilog of a DP16KD of ECP5: 512 rows of 36 bits and two ports of 18 bits, or of 36 together.

    As Yosys uses it: one clock, CLKA; no output registers, no reset; port A of 36 bits writes only, port B of 36 bits reads only. The
    outputs are 0 at first. A bit that one port writes while the other reads it reads as the opposite of what it was: what it is there is
    not told. [TN1264 Memory Usage Guide]
    """
    ports = [bit for port in "AB" for bit in (
        f"CE{port}", f"OCE{port}", f"CLK{port}", f"WE{port}", f"RST{port}", *_bits(f"CS{port}", 3), *_bits(f"DI{port}", 18),
        *_bits(f"AD{port}", 14))]  # fmt: skip

    def word(name, count):
        return f"{{{', '.join(reversed(_bits(name, count)))}}}"

    return f"""\
module DP16KD(input {", ".join(ports)}, output {", ".join([*_bits("DOA", 18), *_bits("DOB", 18)])});
  parameter DATA_WIDTH_A = 18, DATA_WIDTH_B = 18, WRITEMODE_A = "NORMAL", WRITEMODE_B = "NORMAL";
  parameter REGMODE_A = "NOREG", REGMODE_B = "NOREG", RESETMODE = "SYNC", ASYNC_RESET_RELEASE = "SYNC", GSR = "ENABLED";
  parameter CSDECODE_A = "0b000", CSDECODE_B = "0b000", CLKAMUX = "CLKA", CLKBMUX = "CLKB";
  parameter [319:0] {", ".join(f"{name} = 0" for name in _INITIAL)};
  localparam [20479:0] INITIAL = {{{", ".join(reversed(_INITIAL))}}};
  wire [13:0] at_a = {word("ADA", 14)}, at_b = {word("ADB", 14)};
  wire [35:0] in_a = {{{word("DIB", 18)}, {word("DIA", 18)}}}, in_b = {{18'd0, {word("DIB", 18)}}};
  reg [35:0] rows [0:511];
  reg [35:0] now_a, now_b, new_a, new_b, mask_a, mask_b, out_a, out_b;
  integer row;

  function [5:0] place(input [13:0] at, input integer width);  // of a word in its row
    place = (width > 18 ? 0 : 18 * at[4]) + (width > 9 ? 0 : 9 * at[3]) + (width > 4 ? 0 : 4 * at[2]) + (width > 2 ? 0 : 2 * at[1])
            + (width > 1 ? 0 : at[0]);
  endfunction
  function [35:0] written(input [13:0] at, input integer width);  // bits of a row; of a wide word the low bits of its address enable bytes
    if (width < 18) written = ((36'd1 << width) - 36'd1) << place(at, width);
    else written = {{{{9{{at[3] & width == 36}}}}, {{9{{at[2] & width == 36}}}}, {{9{{at[1]}}}}, {{9{{at[0]}}}}}} << place(at, width);
  endfunction
  function [35:0] word(input [35:0] bits, input [13:0] at, input integer width);
    word = bits >> place(at, width) & (width == 36 ? ~36'd0 : (36'd1 << width) - 36'd1);
  endfunction

  initial begin
    for (row = 0; row < 512; row = row + 1) rows[row] = {{INITIAL[40 * row + 20 +: 18], INITIAL[40 * row +: 18]}};
    out_a = 0;
    out_b = 0;
  end
  always @(posedge CLKA) begin
    now_a = rows[at_a[13:5]];
    now_b = rows[at_b[13:5]];
    mask_a = CEA & WEA ? written(at_a, DATA_WIDTH_A) : 36'd0;
    mask_b = CEB & WEB ? written(at_b, DATA_WIDTH_B) : 36'd0;
    new_a = now_a & ~mask_a | in_a << place(at_a, DATA_WIDTH_A) & mask_a;
    new_b = now_b & ~mask_b | in_b << place(at_b, DATA_WIDTH_B) & mask_b;
    if (CEA & (!WEA | WRITEMODE_A != "NORMAL"))
      out_a <= word((WRITEMODE_A == "WRITETHROUGH" ? new_a : now_a) ^ (at_a[13:5] == at_b[13:5] ? mask_b : 36'd0), at_a, DATA_WIDTH_A);
    if (CEB & (!WEB | WRITEMODE_B != "NORMAL"))
      out_b <= word((WRITEMODE_B == "WRITETHROUGH" ? new_b : now_b) ^ (at_a[13:5] == at_b[13:5] ? mask_a : 36'd0), at_b, DATA_WIDTH_B);
    if (|mask_a) rows[at_a[13:5]] = new_a;
    if (|mask_b) rows[at_b[13:5]] = rows[at_b[13:5]] & ~mask_b | new_b & mask_b;
  end
  assign {word("DOA", 18)} = DATA_WIDTH_B == 36 ? out_b[17:0] : out_a[17:0];
  assign {word("DOB", 18)} = DATA_WIDTH_B == 36 ? out_b[35:18] : out_b[17:0];
endmodule
"""


def cells():
    """Return the Verilog of the cells that a netlist may have, without their delays."""
    folder = Path(str(find_spec("pyosys").origin)).parent / "share" / "lattice"
    text = "".join((folder / name).read_text() for name in ("common_sim.vh", "ccu2c_sim.vh"))
    text = re.sub(r"^\s*specify\n.*?^\s*endspecify\n", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [re.search(rf"^module {name}\b.*?^endmodule\n", text, re.MULTILINE | re.DOTALL)[0] for name in MODELLED]
    return "\n".join([*found, block_ram()])


_CELL = re.compile(r"^  DP16KD #\(.*?^  \);", re.DOTALL | re.MULTILINE)


def _with_one_clock(match):
    """Return the text of a block RAM, an idle port of which has the clock of the other; RuntimeError for one that is not modelled."""
    text = match[0]
    values = dict(re.findall(r"\.(?!INITVAL)(\w+)\(([^()]*)\)", text))
    for idle, other in ("AB", "BA"):
        clock = values[f"CLK{idle}"]
        if values[f"CE{idle}"] == "1'h0" and clock.startswith("1'h"):
            values[f"CLK{idle}"] = values[f"CLK{other}"]
            text = text.replace(f".CLK{idle}({clock})", f".CLK{idle}({values[f'CLK{other}']})")
    is_modelled = (
        values["CLKA"] == values["CLKB"] and {values[f"REGMODE_{port}"] for port in "AB"} == {'"NOREG"'}
        and {values[f"CLK{port}MUX"] for port in "AB"} == {'"CLKA"', '"CLKB"'}
        and {values[name] for name in ("RSTA", "RSTB", *(f"CS{port}{n}" for port in "AB" for n in range(3)))} == {"1'h0"}
    )  # fmt: skip
    if not is_modelled:
        raise RuntimeError(f"A block RAM must be one that there is a model for, not {values!r}")
    return text


def netlist(verilog, top="top"):
    """Return the Verilog of the module ``top`` of ``verilog`` as gates of an ECP5, without :func:`cells`; its module has the same name.

    Raises
    ------
    :exc:`RuntimeError`
        When Yosys fails, or uses a block RAM in a way that :func:`block_ram` does not model.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "top.v").write_text(verilog)
        passes = ("read_verilog -sv top.v", f"synth_ecp5 -top {top}", "write_verilog -noattr gates.v")
        call([sys.executable, "-c", _YOSYS, *passes], Path(folder), dict(os.environ))
        gates = Path(folder, "gates.v").read_text()
    rams = gates.count("DP16KD #(")
    gates, found = _CELL.subn(_with_one_clock, gates)
    if found != rams:
        raise RuntimeError(f"Every block RAM must be understood, not {found} of {rams}")
    return gates


def lockstep(component, gates, folder, *, cycles, seed):
    """Let ``component`` and ``gates`` (a :func:`netlist` of it, whose module is "gates") have the same random inputs in Icarus.

    Compared is every output in every cycle, where the RTL's is known.

    Raises
    ------
    :exc:`AssertionError`
        At the first cycle in which they differ.
    """
    rtl, ports = portable(to_rtlil(component, "rtl")), ports_of(component)
    inputs = [(name, len(value)) for name, (value, way) in ports.items() if way == PortDirection.Input]
    outputs = [(name, len(value)) for name, (value, way) in ports.items() if way == PortDirection.Output]
    wires = {"in": sum(width for _, width in inputs), "out": sum(width for _, width in outputs)}

    def pins(wire):
        joined = []
        for one, these in (("in", inputs), (wire, outputs)):
            at = 0
            for name, width in these:
                joined.append(f".{name}({one}[{at} +: {width}])")
                at += width
        return ", ".join([".clk(clk)", ".rst(1'b0)", *joined])

    # Half of the words of input are those of the cycle before: so streams stall, and addresses come twice.
    bench = f"""
module bench;
  reg clk = 0;
  reg [{32 * (wires["in"] // 32 + 1) - 1}:0] in = 0;
  wire [{wires["out"] - 1}:0] rtl, gates;
  integer cycle, word, place, seed;
  rtl one ({pins("rtl")});
  gates other ({pins("gates")});
  initial begin
    seed = {random.Random(seed).getrandbits(31)};
    for (cycle = 0; cycle < {cycles}; cycle = cycle + 1) begin
      for (word = 0; word < {wires["in"] // 32 + 1}; word = word + 1)
        if ($random(seed) & 1) in[32 * word +: 32] = $random(seed);
      #1 if (rtl !== gates)
        for (place = 0; place < {wires["out"]}; place = place + 1)
          if (rtl[place] !== 1'bx && rtl[place] !== gates[place]) begin
            $display("cycle %0d: the RTL gives %b, the gates %b", cycle, rtl, gates);
            $finish;
          end
      clk = 1;
      #1 clk = 0;
    end
    $display("equal");
  end
endmodule
"""
    for name, content in (("rtl.v", rtl), ("gates.v", gates + cells()), ("bench.v", bench)):
        (folder / name).write_text(content)
    call(["iverilog", "-g2012", "-s", "bench", "-o", "bench.vvp", "bench.v", "rtl.v", "gates.v"], folder, dict(os.environ))
    said = subprocess.run(["vvp", "-n", "bench.vvp"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    if said != "equal":
        raise AssertionError(said.splitlines()[0])
