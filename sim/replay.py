"""``make replay FILE=log``: the TLPs of a recorded run go to the RTL without a guest, and to the golden model.

The RTL must send the same TLPs in the same cycles, and the model must find nothing. Exit status 0 when both hold, 1 when one does
not, 2 when the file is no log that can be replayed.
"""

import argparse
import sys
import time
from pathlib import Path

from .compiled import BrokenRule, replay
from .linux.judge import Judge, config_of
from .log import read_log
from .scoreboard import Difference

__all__ = ["main"]

BAR = 30  # characters of a full bar


class Progress:
    """A line that grows, on a terminal; else nothing. ``show(share)`` with 0 to 1."""

    def __init__(self, label, file=None):
        self.label, self.file, self._next = label, file or sys.stderr, 0.0

    def show(self, share):
        if self.file.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            full = int(BAR * min(share, 1))
            self.file.write(f"\r{self.label} [{'#' * full}{'.' * (BAR - full)}] {100 * min(share, 1):3.0f}%")
            self.file.flush()

    def end(self):
        if self.file.isatty():
            self.file.write("\r" + " " * (BAR + len(self.label) + 9) + "\r")
            self.file.flush()


def _judged(path, config, seed, total):
    """Let the golden model judge the log; return the :class:`.linux.judge.Judge`."""
    judge, progress = Judge(config=config, seed=seed), Progress("golden model")
    try:
        for count, event in enumerate(read_log(path)[1], 1):
            judge.observe(event)
            if count % 1000 == 0:
                progress.show(count / total)
        judge.end()
    finally:
        progress.end()
    return judge


def _replayed(path, config, last):
    """Feed the log to the RTL; return how many TLPs of the card were the same."""
    progress = Progress("RTL")
    try:
        return replay(path, config, progress=lambda cycle: progress.show(cycle / last))
    finally:
        progress.end()


def main(arguments=None):
    """Replay the log that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(prog="make replay", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a log that begins with the run: make linux RECORD=file")
    parser.add_argument("--only", choices=("rtl", "model"), help="one of the two")
    given = parser.parse_args(arguments)
    try:
        header, events = read_log(given.file)
        config = config_of(header)
        if header.parameters.get("begin") != 0:
            raise ValueError(f"A log to replay must begin at cycle 0, not {header.parameters.get('begin')!r}")
        total = last = 0
        for event in events:
            total, last = total + 1, max(last, event.cycle)
    except (OSError, ValueError) as error:
        print(f"{given.file} is no log that can be replayed: {error}", file=sys.stderr)
        return 2
    print(f"{given.file}: {total} events, {last} cycles, recorded by commit {header.commit[:12]} with seed {header.seed}")
    status = 0
    if given.only != "model":
        begin = time.perf_counter()
        try:
            count = _replayed(given.file, config, last + 1)
            print(f"RTL: {count} TLPs of the card are identical, cycle by cycle, in {time.perf_counter() - begin:.1f} s")
        except BrokenRule as difference:
            print(f"RTL: the card does otherwise than in the log\n{difference}")
            status = 1
    if given.only != "rtl":
        try:
            judge = _judged(given.file, config, header.seed, total)
            print(f"golden model: {judge.comparisons} comparisons, {judge.requests} requests, 0 differences, in {judge.seconds:.1f} s")
        except Difference as difference:
            print(f"golden model: {difference}")
            status = 1
    print("the replay agrees with the log" if not status else "the replay DIFFERS")
    return status


if __name__ == "__main__":
    sys.exit(main())
