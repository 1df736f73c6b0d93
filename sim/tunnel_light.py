"""``make sim TARGET=tunnel:...``: the image goes through the disk of a card at the end of a tunnel, on a board or simulated.

What is measured is in the time of the line: cycles of a simulated card, seconds otherwise.
"""

import subprocess
from collections import deque
from pathlib import Path

from ..models.virtio.split import RingFull
from .report import Figure, Report, Section, write_report
from .tunnel import TunnelBench, board_config

__all__ = ["IMAGE_KIB", "STORE_BYTES", "frame_limit", "light"]

SECTOR = 512
SIZES = (512, 1024, 4096, 8192, 16384)  # bytes of a request
IN_FLIGHT, MPS = 8, 256
STORE_BYTES = board_config().disks[0].capacity_sectors * SECTOR
IMAGE_KIB = {"sim-uart": 128}  # of the image that is made; else what the store holds
FRAME_BYTES = 10  # of a frame beside its TLP: two flags, four bytes of header, CRC


def frame_limit(header_dwords, payload=MPS):
    """Return bytes of payload per byte on the line, in TLPs of ``payload`` bytes without escapes."""
    return payload / (payload + 4 * header_dwords + FRAME_BYTES)


class _Passage:
    """One direction of the image: what it took, on the line and of its time."""

    def __init__(self, card):
        self.card, self.requests, self.size = card, 0, 0
        self._begin = card.line.now, *card.carried

    def end(self):
        now = self.card.line.now, *self.card.carried
        self.time, self.down, self.up = (after - before for after, before in zip(now, self._begin))


def _flow(bench, disk, image, make, say):
    """Keep ``IN_FLIGHT`` requests under way until all of ``image`` has passed; return the passage and what the requests brought."""
    passage, at, under_way, back = _Passage(bench.compiled), 0, deque(), []
    while at < len(image) or under_way:
        while at < len(image) and len(under_way) < IN_FLIGHT:
            size = min(bench.rng.choice(SIZES), len(image) - at)
            try:
                under_way.append((make(at, size), size))
            except RingFull:
                break
            at += size
        request, size = under_way.popleft()
        if not request.is_done:
            bench.done(disk, [request])
        if request.status != 0:
            raise AssertionError(f"A request at sector {request.sector} ended with status {request.status}, not 0")
        back.append(request.data)
        passage.requests, passage.size = passage.requests + 1, passage.size + size
        say(passage.size / len(image))
    passage.end()
    return passage, b"".join(back)


def _sections(bench, passages, compared):
    """Return the tables of what there is so far."""
    line, peer = bench.compiled.line, bench.compiled.peer.statistics
    per, unit = (1, "bytes/cycle") if line.is_simulated else (line.second, "bytes/s")
    flows, carried = [], []
    for name, passage in passages.items():
        limit = frame_limit(3 if name == "write" else 4)
        rate, on_line = passage.size / max(1, passage.time), passage.down if name == "write" else passage.up
        note = "what the line carries is not known"
        if line.bytes_per_unit:
            most = limit * line.bytes_per_unit
            note = f"link limit {most * per:,.4g}: {100 * rate / most:.1f} % of it; mixed sizes"
        flows += [Figure(f"{name} requests", f"{passage.requests:,}", f"{passage.size:,} bytes of payload"),
                  Figure(f"{name} throughput", f"{rate * per:,.4g} {unit}", note)]  # fmt: skip
        carried.append(Figure(f"{name}, payload per byte on the line", f"{passage.size / max(1, on_line):.3f}",
                              f"limit {limit:.3f}; {passage.down:,} bytes to the card, {passage.up:,} from it"))  # fmt: skip
    board = bench.session.board
    return [
        Section("Disk", flows),
        Section("Line", [*carried, Figure("TLPs sent again", f"{peer.again:,}", "by the host"),
                         Figure("TLPs that came again", f"{peer.repeated:,}"),
                         Figure("damaged frames", f"{peer.damaged:,}", "as the host saw it")]),
        Section("Golden model", [Figure("comparisons", f"{board.comparisons:,}", f"{board.events:,} events judged"),
                                 *(Figure(f"{name} against the image", f"{size:,} bytes equal") for name, size in compared.items()),
                                 Figure("differences", f"{board.differences:,}")]),
    ]  # fmt: skip


def light(target, image, *, folder, report, width=64, seed=1, verify=False, say=lambda phase, part: None):
    """Bring up the card at ``target``, let the file ``image`` go to its disk and back; return the sections of the table.

    ``folder`` gets the log, ``report`` is the page. ``say(phase, part)`` is told how far it is.

    Raises
    ------
    :exc:`AssertionError`
        At the first difference.
    :exc:`.tunnel.DeadLine`, :exc:`.settings.BadSetting`
        When there is no card at the other end.
    """
    content, passages, compared, fault = Path(image).read_bytes(), {}, {}, "The run ended early."
    Path(folder).mkdir(parents=True, exist_ok=True)
    bench = TunnelBench(board_config(width), seed=seed, target=target, path=Path(folder, "events.jsonl"), mps=MPS)
    try:
        bench.now(bench.enable_iommu(levels=2))
        disk = bench.now(bench.disk(0, buffer_pages=100, framing="pages"))
        blk = disk.blk
        for name, make in (("write", lambda at, size: blk.write(at // SECTOR, content[at : at + size])),
                           ("read", lambda at, size: blk.read(at // SECTOR, size))):  # fmt: skip
            passages[name], back = _flow(bench, disk, content, make, lambda part, name=name: say(name, part))
        for name, found in (("guest memory", back), ("golden model", bytes(disk.golden.store[: len(content)]))):
            if found != content:
                raise AssertionError(f"The {name} differs from the image")
            compared[name] = len(content)
        bench.settle()
        bench.session.finish()
        if verify:
            _verify(Path(folder, "readback.img"), back)
            compared["e2fsck"] = len(content)
        fault = None
    except AssertionError as error:
        fault = str(error)
        raise
    finally:
        sections = _sections(bench, passages, compared)
        facts = {"image": f"{image}, {len(content):,} bytes", "target": target, "seed": seed, "width": f"{width} bits"}
        verdict = fault or "Every byte and every TLP is what the golden model says."
        write_report(report, Report("Ringwall: first light", verdict, not fault, facts, sections))
        bench.compiled.close()
    return sections


def _verify(copy, content):
    copy.write_bytes(content)
    done = subprocess.run(["e2fsck", "-f", "-n", str(copy)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"e2fsck does not accept the image that was read back:\n{done.stdout}{done.stderr}")
