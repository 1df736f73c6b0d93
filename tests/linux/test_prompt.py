"""``make linux PROMPT=1``: somebody at a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.guest


class Typist:
    """Runs a command on a terminal of its own, types, and reads what it shows."""

    def __init__(self, command, **options):
        self._keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, **options)
        os.close(terminal)
        self.shown = ""

    def until(self, pattern, seconds=150):
        """Read until ``pattern`` was shown, which is then forgotten with all before it; return its match."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            left = deadline - time.monotonic()
            if left < 0 or not select.select([self._keyboard], [], [], left)[0]:
                raise AssertionError(f"{pattern!r} was not shown within {seconds} s: {self.shown[-2000:]}")
            try:
                self.shown += os.read(self._keyboard, 65536).decode(errors="replace")
            except OSError:  # nobody has the terminal open any more
                raise AssertionError(f"it ended before {pattern!r} was shown: {self.shown[-2000:]}") from None
        self.shown = self.shown[found.end() :]
        return found

    def type(self, line):
        os.write(self._keyboard, line.encode() + b"\n")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)


def test_prompt(tmp_path, clean_environment):
    """LINUX-MAIN-7: PROMPT=1 leaves the terminal at a shell of the guest, which has the card's disks; its exit ends all with status 0."""
    settings = {"PROMPT": "1", "TERM": "dumb"}
    typist = Typist([sys.executable, "-m", "ringwall.sim.linux.main"], cwd=tmp_path, env=clean_environment | settings)
    try:
        typist.until(r"The disks of the card: .*vda vdb.*\n")
        typist.until(r"# ")
        typist.type("echo ringwall > /dev/vda; sync; echo $((6 * 7)) $(head -c 8 /dev/vda)")
        typist.until(r"\n42 ringwall\r?\n")
        typist.type("exit")
        assert int(typist.until(r"comparisons, ([\d,]+) requests")[1].replace(",", "")) > 0
        typist.until(r"every TLP is what the golden model says")
        assert typist.process.wait(20) == 0
    finally:
        typist.close()
