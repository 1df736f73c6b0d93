"""``make sim``: a disk image through the rings of the card and back; a table in the terminal, a report for the browser.

usage: python -m ringwall.sim.main [--help] [--image FILE] [--width BITS] [--latency CYCLES] [--seed N] [--sim NAME] [--waves]
                                   [--target tunnel:LINE]

Each option has a variable of the same name in capitals, so that ``make sim WIDTH=64`` works.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..rtl.config import BlkConfig
from . import tunnel_light
from .builds import build_root
from .first_light import SECTOR, Settings, card_of
from .run import SIMULATORS, result_folder, run
from .settings import BadSetting, number
from .tunnel import DeadLine

__all__ = ["light", "main", "make_image"]

WIDTHS = (64, 128, 256, 512)
STORE_BYTES = SECTOR * BlkConfig().capacity_sectors
IMAGE_KIB = {"verilator": 4096, "icarus": 512}  # of the image that is made; Icarus is fifty times slower
NODE = "make-sim"
PHASES = {"bring-up": "bring-up", "write": "image to the card", "read": "image from the card"}


def make_image(path, seed, kib):
    """Make an ext4 file system of ``kib`` KiB with a few files at ``path``; the same ``seed`` gives the same bytes."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    tool, editor = (shutil.which(name, path=places) for name in ("mke2fs", "debugfs"))
    if tool is None or editor is None:
        raise BadSetting("mke2fs is not installed: type 'apt-get install e2fsprogs', or give an image with IMAGE=path.")
    rng, path = random.Random(seed), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {"hello.txt": b"Hello from behind the wall.\n", "lost/and/found.bin": rng.randbytes(kib * 128), "text.log": b"".join(
            b"%08d %s\n" % (n, rng.randbytes(12).hex().encode()) for n in range(kib * 2))}  # fmt: skip
        for name, content in files.items():
            file = Path(folder, "tree", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        for place in sorted(Path(folder, "tree").rglob("*"), reverse=True):
            os.utime(place, (1_000_000_000, 1_000_000_000))
        path.unlink(missing_ok=True)
        unique = str(rng.randrange(10**12)).zfill(12)
        command = [
            tool, "-q", "-t", "ext4", "-b", "1024", "-L", "ringwall", "-U", f"00000000-0000-4000-8000-{unique}",
            "-E", f"hash_seed=00000000-0000-4000-9000-{unique},root_owner=0:0", "-d", str(Path(folder, "tree")), str(path), str(kib),
        ]  # fmt: skip
        environment = os.environ | {"E2FSPROGS_FAKE_TIME": "1000000000"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        # When a copied file was changed last is when it was made here, which no option of mke2fs hides.
        names = [place.relative_to(Path(folder, "tree")) for place in Path(folder, "tree").rglob("*")]
        fields = "".join(f"set_inode_field /{name} {field} 1000000000\nset_inode_field /{name} {field}_extra 0\n"
                         for name in ["", *names] for field in ("ctime", "atime", "crtime"))  # fmt: skip
    if not done.returncode:
        done = subprocess.run([editor, "-w", "-f", "-", str(path)], input=fields, env=environment, capture_output=True, text=True,
                              check=False)  # fmt: skip
    if done.returncode:
        raise BadSetting(f"mke2fs did not make an image: {done.stderr.strip()}")
    return path


def _checked_image(path, folder, store_bytes=STORE_BYTES):
    """Return the file of whole sectors that is run with: the one at ``path``, or a copy filled up with zeros."""
    try:
        content = Path(path).read_bytes() if Path(path).stat().st_size <= store_bytes else None
    except OSError as error:
        raise BadSetting(f"IMAGE must be a file that can be read: {path}: {error.strerror}.") from None
    if content is None:
        raise BadSetting(f"IMAGE must fit into the {store_bytes:,} bytes of the card's store: {path} has {Path(path).stat().st_size:,}.")
    if not content:
        raise BadSetting(f"IMAGE must not be empty: {path}.")
    if len(content) % SECTOR == 0:
        return Path(path).resolve()
    padded = Path(folder, "image.padded")
    padded.write_bytes(content + bytes(-len(content) % SECTOR))
    return padded


def _settings(arguments):
    """Return what the command line and the variables ask for, checked, or raise :exc:`BadSetting`."""
    parser = argparse.ArgumentParser(
        prog="python -m ringwall.sim.main", description=__doc__.splitlines()[0],
        epilog="Each option has a variable, in capitals, for make: make sim WIDTH=64. Exit status: 0 equal, 1 different, 2 bad setting.",
    )  # fmt: skip
    parser.add_argument("--image", metavar="FILE", help=f"disk image, up to {STORE_BYTES:,} bytes (default: an ext4 file system)")
    parser.add_argument("--width", metavar="BITS", help="data path: 64, 128, 256 or 512 (default 256)")
    parser.add_argument("--latency", metavar="CYCLES", help="from a read of the card to the host's first completion (default 250)")
    parser.add_argument("--seed", metavar="N", help="of sizes, places and the host's choices (default 1)")
    parser.add_argument("--sim", metavar="NAME", help="verilator or icarus (default verilator)")
    parser.add_argument("--waves", action="store_true", default=None, help="record every signal")
    parser.add_argument("--target", metavar="tunnel:LINE", help="a card at the end of a tunnel: sim, sim-uart, /dev/ttyUSB1@3000000, "
                        "host:port or a Unix socket; of --width (default 64), the others but --image and --seed do not apply")
    given = parser.parse_args(arguments)

    def value(name, default):
        found = getattr(given, name)
        return os.environ.get(name.upper()) or default if found is None else found

    target = value("target", None)
    if target is not None:
        if not target.startswith("tunnel:"):
            raise BadSetting(f"TARGET must begin with tunnel:, not {target!r}.")
        for name in ("sim", "latency", "waves"):
            if value(name, None):
                raise BadSetting(f"{name.upper()} is for the card that make sim simulates itself: leave it out with TARGET.")
    simulator = value("sim", "verilator")
    if simulator not in SIMULATORS:
        raise BadSetting(f"SIM must be verilator or icarus, not {simulator!r}.")
    width = value("width", "256" if target is None else "64")
    if width not in map(str, WIDTHS):
        raise BadSetting(f"WIDTH must be 64, 128, 256 or 512, not {width!r}.")
    waves = given.waves or os.environ.get("WAVES", "")
    if waves not in (True, "", "0", "1"):
        raise BadSetting(f"WAVES must be 0 or 1, not {waves!r}.")
    return argparse.Namespace(
        sim=simulator, width=int(width), latency=number("LATENCY", value("latency", "250"), 1, 100_000),
        seed=number("SEED", value("seed", "1"), 0, 2**32 - 1), image=value("image", None), waves=waves in (True, "1"),
        target=target and target.removeprefix("tunnel:"))  # fmt: skip


def light(settings, *, node=NODE, sim="verilator", seed=1, waves=False, timeout_s=3600):
    """Run the card once as ``settings`` (:class:`.first_light.Settings`) say; return the result folder and what is in ``result.json``.

    Raises :exc:`AssertionError` as :func:`.run.run` does.
    """
    done = run(
        card_of(settings), module="ringwall.sim.first_light", node=node, params=asdict(settings), sim=sim, seed=seed, waves=waves,
        timeout_s=timeout_s,
    )  # fmt: skip
    return done.folder, json.loads((done.folder / "result.json").read_text())


class _Watch:
    """Shows a run's progress while it is under way: a bar on a terminal, else a line for every quarter of a phase."""

    def __init__(self, console, path):
        self.console, self.path, self._end = console, Path(path), threading.Event()
        self._thread, self._said = threading.Thread(target=self._follow, daemon=True), None

    def __enter__(self):
        self.path.unlink(missing_ok=True)
        self._bar = Progress(
            TextColumn("{task.description:>20}"), BarColumn(40), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._bar.start()
        self._tasks = {"build": self._bar.add_task("circuit and compiler", total=None, note="")}
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        self._look()
        self._bar.stop()

    def _follow(self):
        while not self._end.wait(0.1):
            self._look()

    def _look(self):
        try:
            phase, done, total, cycle = self.path.read_text().rstrip("\n").split("\t")
        except (OSError, ValueError):
            return
        done, total = int(done), int(total)
        if phase not in self._tasks:
            for task in self._tasks.values():
                length = next(one.total for one in self._bar.tasks if one.id == task) or 1
                self._bar.update(task, total=length, completed=length)
            self._tasks[phase] = self._bar.add_task(PHASES[phase], total=total, note="")
        self._bar.update(self._tasks[phase], completed=done, total=total, note=f"cycle {int(cycle):,}")
        said = phase, 4 * done // max(total, 1)
        if not self.console.is_terminal and said != self._said:
            self._said = said
            self.console.print(f"{PHASES[phase]:>20} {100 * done // max(total, 1):3d} %  cycle {int(cycle):,}")


def _through_tunnel(console, errors, given, folder, report):
    """Run with a card at the end of a tunnel; return the exit status."""
    begun, where, told = time.monotonic(), build_root() / "tunnel", set()

    def say(phase, part):
        if (quarter := int(4 * part)) and (phase, quarter) not in told:
            told.add((phase, quarter))
            console.print(f"{PHASES[phase]:>20} {25 * quarter:3d} %")

    try:
        made = given.image is None
        kib = tunnel_light.IMAGE_KIB.get(given.target, tunnel_light.STORE_BYTES // 1024)
        store_bytes = tunnel_light.STORE_BYTES
        image = make_image(folder / "tunnel.img", given.seed, kib) if made else _checked_image(given.image, folder, store_bytes)
        size = f"{image.stat().st_size:,} bytes"
        console.print(f"{image.name}, {size}; {given.width} bits, tunnel:{given.target}, seed {given.seed}", markup=False)
        sections = tunnel_light.light(given.target, image, folder=where, report=report, width=given.width, seed=given.seed, say=say,
                                      verify=made and shutil.which("e2fsck") is not None)  # fmt: skip
    except (BadSetting, DeadLine) as error:
        errors.print(str(error), markup=False)
        return 2
    except AssertionError as error:
        errors.print(str(error), markup=False)
        return 1
    console.print()
    _show(console, {"sections": [asdict(section) for section in sections]})
    console.print(f"[green]Every byte and every TLP is what the golden model says.[/green]  {time.monotonic() - begun:.0f} s")
    console.print(f"report:   {report}", soft_wrap=True)
    console.print(f"log:      {where / 'events.jsonl'}  (tests/replay.py judges it again without the card)", soft_wrap=True)
    return 0


def _show(console, result):
    for section in result["sections"]:
        table = Table(title=section["title"], title_justify="left", box=None, show_header=False, pad_edge=False, title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        for figure in section["figures"]:
            table.add_row(figure["name"], figure["value"], figure["note"])
        console.print(table)
        console.print()


def main(arguments=None):
    """Run the command; return its exit status: 0 all equal, 1 a difference, 2 a setting that does not do."""
    width = None if sys.stdout.isatty() else 120
    console, errors = Console(highlight=False, width=width), Console(stderr=True, highlight=False, soft_wrap=True)
    report, folder = build_root() / "report" / "index.html", build_root() / "image"
    begun = time.monotonic()
    try:
        given = _settings(sys.argv[1:] if arguments is None else arguments)
        folder.mkdir(parents=True, exist_ok=True)
        if given.target is not None:
            return _through_tunnel(console, errors, given, folder, report)
        made = given.image is None
        image = make_image(folder / "ext4.img", given.seed, IMAGE_KIB[given.sim]) if made else _checked_image(given.image, folder)
    except BadSetting as error:
        errors.print(str(error), markup=False)
        return 2
    settings = Settings(image=str(image), report=str(report), progress=str(folder / "progress"), width=given.width, latency=given.latency,
                        verify=made and shutil.which("e2fsck") is not None)  # fmt: skip
    size = f"{image.stat().st_size:,} bytes"
    what = f"{image.name}, {size}; {given.width} bits, host latency {given.latency} cycles, {given.sim}, seed {given.seed}"
    console.print(what, markup=False)
    report.unlink(missing_ok=True)
    status = 0
    try:
        with _Watch(console, settings.progress):
            where, result = light(settings, sim=given.sim, seed=given.seed, waves=given.waves)
        console.print()
        _show(console, result)
        taken = f"{result['cycles']:,} cycles, {time.monotonic() - begun:.0f} s"
        console.print(f"[green]Every byte and every TLP is what the golden model says.[/green]  {taken}")
    except AssertionError as error:
        errors.print(str(error), markup=False)
        where, status = result_folder(NODE), 1
    if report.is_file():
        console.print(f"report:   {report}", soft_wrap=True)
    console.print(f"log:      {where / 'events.jsonl'}  (tests/replay.py judges it again without the card)", soft_wrap=True)
    console.print(f"waveform: {where / 'waves.fst' if given.waves else 'none; WAVES=1 records one'}", soft_wrap=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
