"""User-mode Linux as a guest of the card: a process that is started, listened to, and ended."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import kernel, vhost_user

__all__ = ["EXPECTED", "Console", "GuestRun", "run", "serve"]

_MARK = re.compile(r"RINGWALL (\S+) ?(.*)")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COMPLAINTS = re.compile(r"Kernel panic|BUG:|Oops|WARNING: CPU|I/O error|virt-pci delay|Call Trace|request timed out|lost interrupt")
EXPECTED = {"reboot": [r"I/O error, dev vd[a-z], sector \d+ op 0x0:\(READ\)"]}  # job -> complaints: reads that the reboot cuts off
_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # of util-linux: a guest is killed when its server is gone, however that ended
_LONGEST_LINE = 4096
_RESTART = "reboot: Restarting system"
_LONGEST_DELAY_US = 1_000_000_000  # for an answer to an access: the kernel's own 40 ms is nothing beside a busy machine


@dataclass
class GuestRun:
    """What a guest's run came to.

    Attributes
    ----------
    status : :class:`int` or None
        With which status its job ended; None when it did not.
    facts : dict
        Key -> list of values, of the lines ``RINGWALL key value`` on its console.
    moments : dict
        Key -> (seconds since the guest was started, card's cycle) of the first such line.
    seconds, cycles : :class:`float`, :class:`int`
        Of the whole run.
    problem : :class:`str`
        Why there is no status, or what the kernel complained about first; "" when all is well.
    lines : list of :class:`str`
        The console.
    """

    status: int | None = None
    facts: dict[str, list[str]] = field(default_factory=dict)
    moments: dict[str, tuple[float, int]] = field(default_factory=dict)
    seconds: float = 0.0
    cycles: int = 0
    problem: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def is_good(self):
        return self.status == 0 and not self.problem

    def fact(self, key, default=""):
        """Return the last value of a key."""
        return self.facts.get(key, [default])[-1]


class Console:
    """Takes a guest's console in, line by line: facts, complaints, and everything to ``echo``.

    Parameters
    ----------
    run : :class:`GuestRun`
        Where lines, facts and moments go.
    now : callable
        Returns (seconds, cycle).
    echo : callable
        Called with each line.
    expect : iterable of :class:`str`
        Regular expressions of complaints that are none.
    """

    def __init__(self, run, *, now, echo=lambda line: None, expect=()):
        self.run, self.now, self.echo, self._rest = run, now, echo, b""
        self._allowed = [re.compile(one) for one in expect]

    def feed(self, data):
        """Take the next bytes in."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._rest) > _LONGEST_LINE:
            self.end()

    def end(self):
        """Take a last line that did not end as one."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""

    def _line(self, raw):
        run, text = self.run, _COLOURS.sub("", raw.decode(errors="replace")).replace("\r", "").rstrip()
        run.lines.append(text)
        self.echo(text)
        if found := _MARK.fullmatch(text):
            key, value = found.groups()
            run.facts.setdefault(key, []).append(value)
            run.moments.setdefault(key, self.now())
            if key == "done":
                run.status = int(value) if re.fullmatch(r"[0-9]{1,9}", value) else None
        elif not run.problem and _COMPLAINTS.search(text) and not any(one.search(text) for one in self._allowed):
            run.problem = text


def run(loop, sockets, *, linux, image, job, folder, memory_mb=96, words=(), name="uml", **serving):
    """Boot user-mode Linux with a device at each of ``sockets``, serve the card until it powers off, return its :class:`GuestRun`.

    The devices are in slots 1, 2 ... of the guest's bus. Slot 0 has a socket, and nothing in it: this kernel ends by removing what it finds
    in slot 0, and in no other one, after it shut all down. A driver there would wait for the end of a reset for ever, and the process would
    neither end nor reboot. A guest that reboots starts its kernel anew in the same process, and connects again.

    Parameters
    ----------
    loop : :class:`.loop.Loop`
    sockets : list of paths
        Of :class:`.vhost_user.Server`.
    linux, image : path
        Kernel and initramfs.
    job : :class:`str`
        What the guest shall do.
    folder : path
        Where its files go; its memory is one of them.
    words : iterable of :class:`str`
        More for the kernel's command line.
    serving
        As for :func:`serve`, which raises what this raises.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    slot = vhost_user.Server(loop, loop.bridge, folder / f"{name}.slot0", None)
    # Its processes take turns, each woken by the one before. On one CPU a tour took 4 s of system time, on two 26 s.
    cpus = sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cpus[os.getpid() % len(cpus)])]
    command += kernel.uml_command(linux, image, [slot.path, *sockets], memory_mb=memory_mb, words=[
        f"job={job}", f"uml_dir={folder}/", f"umid={name}", f"virt_pci.max_delay_us={_LONGEST_DELAY_US}", *words])  # fmt: skip
    serving["expect"] = [*serving.get("expect", ()), *EXPECTED.get(job, ())]
    try:
        return serve(loop, command, folder=folder, name=name, **serving)
    finally:
        slot.close()


def serve(loop, command, *, folder, timeout_s=120, echo=None, prompt=False, expect=(), until=None, name="guest"):
    """Start ``command``, a guest, and serve the card until it ends; return its :class:`GuestRun`.

    Whatever ends this call, the guest is gone afterwards. Its console is in ``folder/name.log``.

    Parameters
    ----------
    loop : :class:`.loop.Loop`
    command : list of :class:`str`
        Its standard output is the guest's console.
    folder : path
        Where its files go.
    timeout_s : :class:`float` or None
        After so many seconds the guest is ended, and the run has a problem.
    echo : callable or None
        Called with every line of the console.
    prompt : :class:`bool`
        The console is this terminal's; nothing is learned from it.
    expect : iterable of :class:`str`
        Regular expressions of complaints of the kernel that this job brings about.
    until : callable or None
        Called in each round with the :class:`GuestRun` so far; the guest is ended, without a problem, once it returns True.

    Raises
    ------
    :exc:`OSError`
        When the guest cannot be started.
    """
    folder, result, card = Path(folder), GuestRun(), loop.bridge.card
    folder.mkdir(parents=True, exist_ok=True)
    begin, first = time.monotonic(), card.cycle
    with (folder / f"{name}.log").open("w", encoding="utf-8", buffering=1) as log:

        def take(line):
            log.write(line + "\n")
            if echo is not None:
                echo(line)
            if line.endswith(_RESTART):  # it leaves O_ASYNC behind: a SIGIO would come before its next kernel can take one
                fcntl.fcntl(theirs, fcntl.F_SETFL, fcntl.fcntl(theirs, fcntl.F_GETFL) & ~os.O_ASYNC)

        console = Console(result, now=lambda: (time.monotonic() - begin, card.cycle), echo=take, expect=expect)
        process, pipe, theirs = _start(command, folder, prompt)
        ended = os.pidfd_open(process.pid)

        def read():
            with suppress(BlockingIOError):
                while True:  # no end of file: `theirs` is open
                    console.feed(os.read(pipe, 1 << 16))

        def is_over():
            return process.poll() is not None or (until is not None and until(result))

        loop.add(pipe, read)
        loop.add(ended, lambda: None)  # wakes the loop
        try:
            if not loop.run(until=is_over, timeout_s=timeout_s):
                result.problem = result.problem or f"the guest did not end within {timeout_s} s"
        finally:
            was_over = process.poll() is not None
            process.kill()
            process.wait()
            read()
            console.end()
            for fd in (pipe, ended):
                loop.remove(fd)
            for fd in (pipe, ended, theirs):
                os.close(fd)
    result.seconds, result.cycles = time.monotonic() - begin, card.cycle - first
    if prompt and process.returncode == 0:
        result.status = 0
    if result.status is None and not result.problem and was_over:
        result.problem = f"the guest ended (status {process.returncode}) before its job did"
    return result


def _start(command, folder, prompt):
    """Return (process, descriptor to read its console from, descriptor that it writes its console to)."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not there, or cannot be started")
    pipe, theirs = os.pipe()
    os.set_blocking(pipe, False)
    try:
        process = subprocess.Popen(
            [*_WITH_US, *command], stdin=sys.stdin if prompt else subprocess.DEVNULL, stdout=sys.stdout if prompt else theirs,
            stderr=subprocess.STDOUT, start_new_session=not prompt, env=os.environ | {"TMPDIR": os.fspath(folder)})  # fmt: skip
    except OSError:
        os.close(pipe)
        os.close(theirs)
        raise
    return process, pipe, theirs
