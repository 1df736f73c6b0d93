"""``make linux`` without a Linux: settings, consoles, ends of guests, the table."""

import os
import re
import select
import subprocess
import sys
import time

import pytest

from ringwall.sim.linux import main, uml
from ringwall.sim.linux.loop import Loop


class NoCard:
    """A bridge whose card is always idle."""

    cycle = 7
    card = property(lambda self: self)

    def pump(self, cycles):
        return 0


@pytest.mark.parametrize("arguments, variables, text", [
    (["--guest", "bochs"], {}, "GUEST must be uml or qemu, not 'bochs'."),
    ([], {"IOMMU": "amd"}, "IOMMU must be none, intel, virtio or card, not 'amd'."),
    ([], {"GUEST_ARCH": "arm"}, "GUEST_ARCH must be amd64 or riscv64, not 'arm'."),
    ([], {"WAVES": "on"}, "WAVES must be 0 or 1, not 'on'."),
    ([], {"IOMMU": "card"}, "IOMMU and GUEST_ARCH need GUEST=qemu"),
    ([], {"IOMMU": "intel"}, "IOMMU and GUEST_ARCH need GUEST=qemu"),
    ([], {"GUEST_ARCH": "riscv64"}, "IOMMU and GUEST_ARCH need GUEST=qemu"),
    (["--guest", "qemu", "--iommu", "intel", "--arch", "riscv64"], {}, "IOMMU=intel needs GUEST_ARCH=amd64."),
    ([], {"PROMPT": "yes"}, "PROMPT must be 0 or 1, not 'yes'."), (["--prompt"], {}, "PROMPT=1 needs a terminal"),
    (["--prompt", "--job", "tour"], {}, "PROMPT=1 starts a shell"), ([], {"SEED": "x"}, "SEED must be a whole number"),
    ([], {"LATENCY": "0"}, "LATENCY must be a whole number"), ([], {"TIMEOUT": "0"}, "TIMEOUT must be a whole number"),
    ([], {"JOB": "../init"}, "JOB must be the name of a script"), ([], {"TABLE": "/nowhere"}, "TABLE must be a file that can be read"),
    ([], {"TABLE": __file__}, "TABLE must have the lines"),
])  # fmt: skip
def test_refused_settings(monkeypatch, clean_environment, capsys, arguments, variables, text):
    """LINUX-MAIN-1: a setting that does not do ends the command with one sentence and exit status 2, before anything is built."""
    for name in os.environ.keys() - clean_environment.keys():
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main, "build", None)
    assert main.main(arguments) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert said.err.count("\n") == 1


def guest(tmp_path, script, **serving):
    loop = Loop(NoCard())
    try:
        return uml.serve(loop, ["sh", "-c", script], folder=tmp_path, **serving)
    finally:
        loop.close()


def test_console(tmp_path):
    """LINUX-MAIN-2: marks on a console become facts and moments; colours, carriage returns and endless lines do not matter."""
    seen = []
    run = guest(tmp_path, r"printf 'hello\r\n\033[1;32mRINGWALL ready 1.25\033[0m\r\nRINGWALL disk a\nRINGWALL disk b\n RINGWALL not 1\n';"
                "head -c 100000 /dev/zero | tr '\\0' x; printf '\\nRINGWALL done 0\\nlast'", echo=seen.append)  # fmt: skip
    assert run.is_good
    assert run.facts == {"ready": ["1.25"], "disk": ["a", "b"], "done": ["0"]}
    assert run.fact("disk") == "b"
    assert run.fact("nothing", "else") == "else"
    assert run.moments["ready"][1] == 7
    assert run.lines[0] == "hello"
    assert run.lines[-1] == "last"
    assert sum(line.count("x") for line in run.lines) == 100_000
    assert max(map(len, run.lines)) < 1 << 17
    assert (tmp_path / "guest.log").read_text().splitlines() == run.lines == seen


@pytest.mark.parametrize("script, status, problem", [
    ("echo RINGWALL done 3", 3, ""), ("echo RINGWALL done x", None, "before its job did"),
    ("exit 7", None, r"\(status 7\) before its job did"),
    ("kill -9 $$", None, "status -9"),
    ("echo 'Kernel panic - not syncing: why'; echo RINGWALL done 0", 0, "Kernel panic - not syncing: why"),
    ("echo 'blk: I/O error, dev vda'; echo 'BUG: x'; echo RINGWALL done 0", 0, "BUG: x"),
])  # fmt: skip
def test_bad_ends(tmp_path, script, status, problem):
    """LINUX-MAIN-3: a job that fails, ends early, or a kernel that complains is not good, and the run says why."""
    run = guest(tmp_path, script, expect=("I/O error",))
    assert not run.is_good
    assert run.status == status
    assert re.search(problem, run.problem) if problem else not run.problem


def test_time(tmp_path):
    """LINUX-MAIN-4: a guest that does not end is ended: after its time, when the caller has seen enough, when the loop raises."""
    begin = time.monotonic()
    run = guest(tmp_path, "echo RINGWALL done 0; exec sleep 1000", timeout_s=0.5)
    assert run.problem == "the guest did not end within 0.5 s"
    run = guest(tmp_path, "echo RINGWALL ready 1; exec sleep 1000", until=lambda run: "ready" in run.facts)
    assert (run.status, run.problem) == (None, "")

    def fail(run):
        raise RuntimeError("the card broke a rule")

    with pytest.raises(RuntimeError, match="broke a rule"):
        guest(tmp_path, "exec sleep 1000", until=fail)
    with pytest.raises(OSError):
        uml.serve(Loop(NoCard()), ["/nowhere/linux"], folder=tmp_path)
    assert time.monotonic() - begin < 60


def test_table(tmp_path):
    """LINUX-MAIN-5: the table goes between its marks, in place of the one before; the rest of the file stays."""
    path = tmp_path / "README.md"
    path.write_text("above\n<!-- make linux: begin -->\n<!-- make linux: end -->\nbelow\n")
    for value in ("1", "2"):
        main.write_table(path, "Title", [("requests", value, "note")])
        assert path.read_text() == (
            "above\n<!-- make linux: begin -->\nTitle\n\n| | | |\n|---|---:|---|\n"
            f"| requests | {value} | note |\n<!-- make linux: end -->\nbelow\n")  # fmt: skip


def test_guest_ends_with_its_server(tmp_path):
    """LINUX-MAIN-6: a guest does not outlive the process that serves its disks, not even when that is killed."""
    code = (f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nimport test_main as t, pathlib\n"
            f"t.guest(pathlib.Path({str(tmp_path)!r}), 'echo $$ > pid; exec sleep 1000 > /dev/null')")  # fmt: skip
    server = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline, path = time.monotonic() + 60, tmp_path / "pid"
    while not (path.exists() and path.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    guest_ends = os.pidfd_open(int(path.read_text()))
    server.kill()
    server.wait()
    assert select.select([guest_ends], [], [], 10)[0], "the guest lives on"
    os.close(guest_ends)
