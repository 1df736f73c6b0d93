"""``make linux``: an unmodified Linux whose disks are the RTL, the golden model watching; a table in the terminal.

usage: python -m ringwall.sim.linux.main [--help] [--guest NAME] [--iommu KIND] [--arch NAME] [--prompt] [--record FILE] [--waves]
                                         [--seed N] [--latency CYCLES] [--job NAME] [--table FILE] [--timeout SECONDS]

Each option has a variable in capitals, so that ``make linux PROMPT=1`` works; that of --arch is GUEST_ARCH.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...models.host import ConfigRead
from ...rtl.config import IommuConfig, VirtioIommuConfig
from ..builds import build_root
from ..card import bench_config
from ..compiled import BrokenRule, CompiledCard, build
from ..scoreboard import Difference
from ..settings import BadSetting, number
from . import debian, initramfs, kernel, qemu, uml, vfio_user, vhost_user
from .bridge import Bridge
from .judge import Judge
from .loop import Loop

__all__ = ["Session", "main", "write_table"]

GUESTS = ("uml", "qemu")
_OWN_IOMMU = {"amd64": VirtioIommuConfig(), "riscv64": IommuConfig(vendor_id=0x1B36, device_id=0x0014)}  # for drivers of stock Linux
_BEGIN, _END = "<!-- make linux: begin -->", "<!-- make linux: end -->"
_NOTIFY, _VENDOR_CAP = 2, 0x09  # virtio: kind of the doorbells' structure [VIRTIO1.4 4.1.4]


class Session:
    """A compiled card with bridge, loop, and the golden model when it is ``judged``: what all guests of one process share.

    Parameters
    ----------
    config : :class:`ringwall.rtl.config.EndpointConfig`
    judged : :class:`bool`
    record : path or None
        Log of every TLP.
    parameters
        Of :class:`ringwall.sim.compiled.CompiledCard`.

    Attributes
    ----------
    card, bridge, loop, judge
    doorbells : :class:`collections.Counter`
        Function -> how often the doorbell of its first queue was rung.
    latencies : list of :class:`int`
        Cycles from the last doorbell to an interrupt, for interrupts with one doorbell since the one before.
    """

    def __init__(self, config, *, judged=True, record=None, **parameters):
        self.card = CompiledCard(config, **parameters)
        if record is not None:
            self.card.record(record)
        self.judge = Judge(self.card, seed=parameters.get("seed", 0)) if judged else None
        self.bridge = Bridge(self.card)
        self.loop = Loop(self.bridge)
        self.disks = [n for n in self.bridge.functions if n >= config.first_disk]
        self.latencies, self._rung = [], {}
        self.doorbells = Counter()
        self._doorbells = {n: place for n in self.bridge.functions if (place := self._doorbell(n))}
        self._write, self.bridge.bar_write = self.bridge.bar_write, self._written

    def _doorbell(self, function):
        """Return (BAR, offset) of the first doorbell."""
        for at in self.bridge.functions[function].capabilities.get(_VENDOR_CAP, ()):
            kind, bar = (self.card.perform(ConfigRead(function, at + n, 1)) for n in (3, 4))
            if kind == _NOTIFY:
                return bar, self.card.perform(ConfigRead(function, at + 8, 4))
        return None

    def _written(self, function, bar, offset, data):
        if self._doorbells.get(function) == (bar, offset):
            self.doorbells[function] += 1
            self._rung.setdefault(function, []).append(self.card.cycle)
        self._write(function, bar, offset, data)

    def watch(self, function):
        """Let interrupts of a function that a server listens to say how long requests took."""
        deliver = self.bridge.on_interrupt[function]

        def interrupted(*what):
            rung = self._rung.pop(function, [])
            if len(rung) == 1:
                self.latencies.append(self.card.news_cycle - rung[0])
            deliver(*what)

        self.bridge.on_interrupt[function] = interrupted

    def settle(self):
        """Let the card end what it is at, bounded."""
        for _ in range(1000):
            if not self.bridge.pump(1000):
                return

    def close(self):
        """End the log and the card; raises :exc:`ringwall.sim.scoreboard.Difference` when something that was due did not come."""
        try:
            self.settle()
            if self.judge is not None:
                self.judge.end()
        finally:
            self.loop.close()
            self.card.close()


def _settings(arguments):
    """Return what the command line and the variables ask for, checked, or raise :exc:`BadSetting`."""
    parser = argparse.ArgumentParser(
        prog="make linux", description=__doc__.splitlines()[0].replace("``", ""),
        epilog="Each option has a variable, in capitals, for make: make linux GUEST=qemu IOMMU=intel; GUEST_ARCH for --arch. Exit status: "
               "0 all well, 1 not, 2 bad setting or something missing.")  # fmt: skip
    parser.add_argument("--guest", metavar="NAME", help="uml (user-mode Linux, default) or qemu (a whole machine)")
    parser.add_argument("--iommu", metavar="KIND", help="none (default), or with qemu intel or virtio: QEMU's own, card: the card's own")
    parser.add_argument("--arch", metavar="NAME", help="amd64 (default), or with qemu riscv64")
    parser.add_argument("--job", metavar="NAME", help="what the guest does: tour (default), rebind, rescan, reset, sizes, reboot ...")
    parser.add_argument("--prompt", action="store_true", default=None, help="a shell in the guest, on this terminal")
    parser.add_argument("--record", metavar="FILE", help="log every TLP, for make replay FILE=")
    parser.add_argument("--waves", action="store_true", default=None, help="every signal of every cycle to an FST file: slow, and big")
    parser.add_argument("--seed", metavar="N", help="of the host's choices (default 1)")
    parser.add_argument("--latency", metavar="CYCLES", help="from a read of the card to the host's answer (default 8)")
    parser.add_argument("--timeout", metavar="SECONDS", help="when the guest is given up (default 600; none with a prompt)")
    parser.add_argument("--table", metavar="FILE", help="write the table into FILE too, between its two marks")
    given = parser.parse_args(arguments)

    def value(name, default, variable=None):
        found = getattr(given, name)
        return os.environ.get(variable or name.upper()) or default if found is None else found

    def flag(name):
        found = value(name, "")
        if found not in (True, "", "0", "1"):
            raise BadSetting(f"{name.upper()} must be 0 or 1, not {found!r}.")
        return found in (True, "1")

    def choice(name, among, variable=None):
        found = value(name, among[0], variable)
        if found not in among:
            raise BadSetting(f"{variable or name.upper()} must be {', '.join(among[:-1])} or {among[-1]}, not {found!r}.")
        return found

    settings = argparse.Namespace(
        guest=choice("guest", GUESTS), iommu=choice("iommu", qemu.IOMMUS), arch=choice("arch", qemu.ARCHITECTURES, "GUEST_ARCH"),
        prompt=flag("prompt"), waves=flag("waves"), record=value("record", None), seed=number("SEED", value("seed", "1"), 0, 2**31 - 1),
        latency=number("LATENCY", value("latency", "8"), 1, 100_000), timeout=number("TIMEOUT", value("timeout", "600"), 1, 86_400),
        table=value("table", None), job=value("job", None))  # fmt: skip
    if settings.guest == "uml" and (settings.iommu, settings.arch) != ("none", "amd64"):
        raise BadSetting("IOMMU and GUEST_ARCH need GUEST=qemu: user-mode Linux has no IOMMU and no architecture of its own.")
    if (settings.iommu, settings.arch) == ("intel", "riscv64"):
        raise BadSetting("IOMMU=intel needs GUEST_ARCH=amd64.")
    if settings.prompt and settings.job not in (None, "shell"):
        raise BadSetting(f"PROMPT=1 starts a shell; the job must be shell, not {settings.job!r}.")
    if settings.prompt and not sys.stdin.isatty():
        raise BadSetting("PROMPT=1 needs a terminal at its standard input.")
    settings.job = settings.job or ("shell" if settings.prompt else "tour")
    if not re.fullmatch(r"[a-z0-9_]+", settings.job):
        raise BadSetting(f"JOB must be the name of a script of sim/linux/guest, not {settings.job!r}.")
    if settings.table is not None:
        try:
            text = Path(settings.table).read_text()
        except OSError as error:
            raise BadSetting(f"TABLE must be a file that can be read: {settings.table}: {error.strerror}.") from None
        if text.count(_BEGIN) != 1 or text.count(_END) != 1 or text.index(_BEGIN) > text.index(_END):
            raise BadSetting(f"TABLE must have the lines {_BEGIN} and {_END}, each once: {settings.table}.")
    return settings


def _serve(session, settings, folder, echo):
    """Run the job in the guest that the settings name; return its :class:`.uml.GuestRun`."""
    serving = {"job": settings.job, "folder": folder, "echo": echo, "prompt": settings.prompt,
               "timeout_s": None if settings.prompt else settings.timeout}  # fmt: skip
    if settings.guest == "uml":
        kind, guest = vhost_user, uml.run
        serving |= {"linux": kernel.uml(), "image": initramfs.build()}
        if not os.access(serving["linux"], os.X_OK):
            raise BadSetting(f"{serving['linux']} cannot be started: it is not executable, or its file system is mounted noexec.")
    else:
        kind, guest = vfio_user, qemu.run
        linux, modules = kernel.debian(settings.arch)
        serving |= {"emulator": kernel.qemu(settings.arch), "linux": linux, "image": initramfs.build(modules=modules, arch=settings.arch),
                    "arch": settings.arch, "iommu": settings.iommu}  # fmt: skip
    notes = {"log": lambda line: echo(f"server: {line}")} if kind is vhost_user else {}
    with ExitStack() as stack:
        sockets = []
        for n in [0, *session.disks] if settings.iommu == "card" else session.disks:
            server = kind.Server(session.loop, session.bridge, folder / f"function{n}", n, **notes)
            stack.callback(server.close)
            session.watch(n)
            sockets.append(server.path)
        return guest(session.loop, sockets, **serving)


def _figures(session, run):
    """Return [(name, value, note)] of a run."""
    counts, dma, judge = session.bridge.counts, session.card.counts, session.judge
    found = []

    def moment(key, name):
        if key in run.moments:
            seconds, cycle = run.moments[key]
            inside = run.facts[key][0].split()[0] if run.facts[key][0] else ""
            found.append((name, f"{seconds:.1f} s", f"cycle {cycle:,}" + (f"; {inside} s of the guest's own time" if inside else "")))

    moment("ready", "boot to all disks")
    moment("mounted", "boot to a mounted file system")
    if "written" in run.moments:
        found.append(("files written, unmounted", f"{run.moments['written'][0]:.1f} s", ""))
    found.append(("guest in all", f"{run.seconds:.1f} s", f"{run.cycles:,} cycles of the card; it stands still while it is idle"))
    configuration = counts.config_reads + counts.config_writes
    found.append(("accesses to registers", f"{counts.mmio_reads + counts.mmio_writes:,}",
                  f"{counts.mmio_reads:,} reads, {counts.mmio_writes:,} writes; {configuration:,} to configuration space"))  # fmt: skip
    found.append(("interrupts", f"{counts.interrupts:,}", ""))
    stats = [dict(re.findall(r"(\w+)=(\d+)", line)) for line in run.facts.get("stat", ())]
    if stats:
        requests = {name: sum(int(one.get(name, 0)) for one in stats) for name in ("reads", "writes", "read_sectors", "write_sectors")}
        found.append(("requests of the guest", f"{requests['reads'] + requests['writes']:,}",
                      f"{requests['read_sectors'] // 2:,} KiB read, {requests['write_sectors'] // 2:,} KiB written"))  # fmt: skip
    found.append(("DMA", f"{(dma.read_bytes + dma.written_bytes) >> 10:,} KiB", f"{dma.reads:,} reads, {dma.writes:,} writes"))
    if session.latencies:
        found.append(("doorbell to interrupt", f"{statistics.median(session.latencies):,.0f} cycles",
                      f"median of {len(session.latencies):,} requests that were alone"))  # fmt: skip
    if counts.pumped_seconds:
        own = counts.pumped_seconds - (judge.seconds if judge else 0)
        note = f"{counts.pumped_cycles / own:,.0f} without the model's time" if judge and own > 0 else ""
        found.append(("RTL cycles per second", f"{counts.pumped_cycles / counts.pumped_seconds:,.0f}", note))
    if judge is not None:
        found.append(("model differences", "0", f"{judge.comparisons:,} comparisons, {judge.requests:,} requests"))
    return found


def write_table(path, title, figures):
    """Put the figures between the two marks of a Markdown file."""
    path = Path(path)
    text = path.read_text()
    rows = "\n".join(f"| {name} | {value} | {note} |" for name, value, note in figures)
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    path.write_text(f"{text[:begin]}\n{title}\n\n| | | |\n|---|---:|---|\n{rows}\n{text[end:]}")


def main(arguments=None):
    """Run the command; return its exit status: 0 all well, 1 not, 2 a setting that does not do, or something that is missing."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    begun = time.monotonic()
    try:
        settings = _settings(sys.argv[1:] if arguments is None else arguments)
        config = bench_config(64)
        if settings.iommu == "card":
            config = replace(config, iommu=_OWN_IOMMU[settings.arch])
        with console.status("the card: circuit, Verilator, compiler (80 s the first time)") if console.is_terminal else ExitStack():
            build(config, waves=settings.waves)
        folder = build_root() / "linux"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ringwall-") as sockets:
            return _main(settings, config, Path(sockets), folder, console, errors, begun)
    except (BadSetting, debian.FetchError) as error:
        errors.print(str(error), markup=False)
        return 2
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        errors.print(f"{type(error).__name__}: {error}", markup=False)
        return 2


def _main(settings, config, sockets, folder, console, errors, begun):
    waves = folder / "waves.fst" if settings.waves else None
    session = Session(config, judged=settings.iommu != "card", record=settings.record, seed=settings.seed, latency=settings.latency,
                      waves=waves)  # fmt: skip
    problem, run = "", None

    def echo(line):
        if not settings.prompt:
            console.print(line, markup=False, soft_wrap=True)

    try:
        try:
            run = _serve(session, settings, sockets, echo)
        finally:
            session.close()
        problem = run.problem or ("" if run.status == 0 else f"the job ended with status {run.status}: {run.fact('failed')}")
    except (Difference, BrokenRule) as error:
        problem = f"the card does otherwise than the golden model or the rules say:\n{error}"
    for log in sockets.glob("*.log"):
        (folder / log.name).write_text(log.read_text())
        console.print(f"console: {folder / log.name}", soft_wrap=True)
    if waves:
        console.print(f"waves:   {waves}", soft_wrap=True)
    if settings.record:
        console.print(f"log:     {settings.record}  (make replay FILE={settings.record})", soft_wrap=True)
    if run is not None:
        figures = _figures(session, run)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        for figure in figures:
            table.add_row(*figure)
        console.print()
        console.print(table)
        if settings.table is not None and not problem:
            watched = ", golden model watching" if session.judge else ""
            title = f"`make linux GUEST={settings.guest} JOB={settings.job}`, {os.cpu_count()} cores, no KVM{watched}:"
            write_table(settings.table, title, figures)
    console.print()
    if problem:
        errors.print(problem, markup=False)
        return 1
    judged = ", and every TLP is what the golden model says" if session.judge else "; no golden model watched"
    console.print(f"[green]The guest is content{judged}.[/green]  {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
