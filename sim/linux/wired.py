"""Two cards whose network functions are wired to each other, each with a Linux of its own: one card in this process, one in another.

usage: python -m ringwall.sim.linux.wired SOCKET FOLDER SECONDS, which :func:`run` starts.
"""

import json
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from ...rtl.config import EndpointConfig
from ...rtl.virtio.net import NetDevice
from ..looped import WiredCard
from . import initramfs, kernel, uml
from .main import Session
from .vhost_user import Server

__all__ = ["CONFIG", "run"]

CONFIG = EndpointConfig(width=64, iommu=None, disks=(), devices=(NetDevice(),), completion_timeout_cycles=10_000)
_ENDS = ("here", "there")


def run(folder, *, timeout_s=170):
    """Run the job ``link`` on both ends; return the :class:`.uml.GuestRun` of each.

    Parameters
    ----------
    folder : path
        Where the files of both go.
    timeout_s : :class:`float`
        After so many seconds a guest is ended, and its run has a problem.

    Raises
    ------
    :exc:`RuntimeError`
        When the other process ends without a result.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        for made in (kernel.uml, initramfs.build):  # once, by us
            made()
        other = subprocess.Popen([sys.executable, "-m", __name__, str(there.fileno()), str(folder), str(timeout_s)],
                                 pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)  # fmt: skip
        try:
            ours = _end(here, Path(folder), _ENDS[0], timeout_s)
            said, _ = other.communicate(timeout=timeout_s)
        finally:
            other.kill()
            other.wait()
    if other.returncode:
        raise RuntimeError(f"The other card's process returned {other.returncode}: {said}")
    return ours, uml.GuestRun(**json.loads(said))


def _end(wire, folder, end, timeout_s):
    session = Session(CONFIG, judged=False, card=WiredCard, latency=20, jitter=30, split="random", seed=_ENDS.index(end))
    try:
        session.card.wire(wire)
        session.loop.add(wire, lambda: None)  # wakes the loop; the card takes what came
        server = Server(session.loop, session.bridge, folder / f"{end}.socket", 0)
        try:
            return uml.run(session.loop, [server.path], linux=kernel.uml(), image=initramfs.build(), job="link", folder=folder, name=end,
                           words=[f"job_end={end}"], timeout_s=timeout_s)  # fmt: skip
        finally:
            server.close()
    finally:
        session.close()


def main(arguments):
    """Be the other end."""
    with socket.socket(fileno=int(arguments[0])) as wire:
        print(json.dumps(asdict(_end(wire, Path(arguments[1]), _ENDS[1], float(arguments[2])))))


if __name__ == "__main__":
    main(sys.argv[1:])
