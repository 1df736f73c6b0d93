"""The main run: a disk image goes through the rings of the card and comes back, with the golden model watching every TLP.

:mod:`ringwall.sim.main` is its command line. It runs inside of a simulator; what it found is in ``result.json`` beside the log.
"""

import json
import statistics
import subprocess
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import cocotb

from ..models.host import WaitInterrupt
from ..models.virtio.blk import BlkType
from ..models.virtio.split import RingFull
from ..rtl.config import EndpointConfig
from ..rtl.verilog import RawCard
from .card import OWN, OWN_BYTES, PAGE, Card, bench_card
from .counted import Counted, read_counts
from .figures import DATA_READ, DATA_WRITE, Figures, Region, payload_limit
from .log import Log, run_header
from .report import Figure, Phase, Report, Section, Series, throughput, write_report
from .run import params
from .scoreboard import Difference
from .stream import cycle

__all__ = ["Settings", "card_of"]

SECTOR = 512
SIZES = (512, 1024, 4096, 8192, 16384, 65536, 131072)  # bytes of a request, as file systems and their read-ahead make them
IN_FLIGHT = 16
QUEUE = 256
BUFFER_PAGES = 1024
MPS, MRRS = 256, 512
ANSWER_CYCLES = 400_000
DOORBELL, RING_READ, WALK, USED, INTERRUPT = "doorbell", "ring read", "walk", "used ring", "MSI-X"
LANES = [DOORBELL, RING_READ, WALK, DATA_READ, DATA_WRITE, USED, INTERRUPT]
NOTIFY = 0x3000  # of BAR 0


@dataclass(frozen=True)
class Settings:
    """What a run is made of: ``image`` is a file of whole sectors, ``verify`` lets e2fsck look at what came back.

    ``bench``: not the default card, but the one that tests share (:func:`.card.bench_card`).
    """

    image: str
    report: str
    progress: str
    width: int = 256
    latency: int = 250
    verify: bool = False
    bench: bool = False


def card_of(settings):
    """Return the card that runs, with counters beside it: the IOMMU, and one disk of 8 MiB; or that of tests."""
    return bench_card(settings.width) if settings.bench else Counted(RawCard(EndpointConfig(width=settings.width)))


class Progress:
    """Tells whoever reads the file ``path`` how far a run is: "phase done total cycle" in its only line."""

    def __init__(self, path):
        self.path, self._told = Path(path), 0.0

    def tell(self, phase, done, total):
        """Say it, at most ten times a second, and when the phase is done."""
        now = time.monotonic()
        if now - self._told > 0.1 or done == total:
            self._told = now
            fresh = self.path.with_suffix(".new")
            fresh.write_text(f"{phase}\t{done}\t{total}\t{cycle()}\n")
            fresh.rename(self.path)


@dataclass
class Passage:
    """What one direction did."""

    requests: int = 0
    size: int = 0
    begin: int = 0
    end: int = 0

    @property
    def rate(self):
        """Bytes per cycle."""
        return self.size / max(1, self.end - self.begin)


class Run:
    """One run of the card ``dut`` as ``settings`` say."""

    def __init__(self, dut, settings, seed, log):
        self.settings, self.seed, self.component = settings, seed, card_of(settings)
        self.config = self.component.card.config
        self.card = Card(dut, self.config, seed=seed, latency=settings.latency, log=log, mps=MPS, mrrs=MRRS)
        self.image = Path(settings.image).read_bytes()
        self.progress = Progress(settings.progress)
        self.figures = Figures([Region(WALK, OWN, OWN_BYTES)], interrupts=4, doorbell=DOORBELL, interrupt=INTERRUPT)
        self.card.observers[:] = [self._judge, self.figures.take]
        self.difference = None
        self.written, self.read = Passage(), Passage()
        self.latencies, self.alone, self.compared = [], {}, {}
        self.counts = {}

    def _judge(self, event, tlp):
        """Let the golden model judge; a difference ends the simulation from within the link, so it is kept for the report."""
        try:
            self.card.session.take(event, tlp)
        except Difference as difference:
            self.difference = str(difference)
            raise

    async def go(self):
        """Do all of it."""
        card = self.card
        self.progress.tell("bring-up", 0, 1)
        await card.begin()
        await card.enable_iommu(levels=2)
        self.disk = await card.disk(0, queue_size=QUEUE, buffer_pages=BUFFER_PAGES, framing="pages")
        self._name_places()
        self.progress.tell("bring-up", 1, 1)

        await self._one_by_one()
        self.written.begin = cycle()
        await self._flow("write", self.written, lambda at, size: self.disk.blk.write(at // SECTOR, self.image[at : at + size]))
        flush = self.disk.blk.flush()
        await self._until(flush)
        self.written.end = cycle()
        self.read.begin = cycle()
        back = await self._flow("read", self.read, lambda at, size: self.disk.blk.read(at // SECTOR, size))
        self.read.end = cycle()
        self._compare("guest memory", b"".join(back[at] for at in sorted(back)))
        self._compare("golden model", bytes(self.disk.golden.store[: len(self.image)]))
        self._compare("store of the card", self._stored())
        self.counts = read_counts(card.dut, self.component)
        card.finish()
        if self.settings.verify:
            self._verify(b"".join(back[at] for at in sorted(back)))

    def _name_places(self):
        """Tell the figures what lies where."""
        info, disk, regions = self.card.functions[self.disk.function], self.disk, self.figures.regions
        regions.append(Region(DOORBELL, info.bars[0].address + NOTIFY, PAGE))
        regions.append(Region(INTERRUPT, info.msix.message_address, 16 * self.config.disks[0].vectors))
        used_bytes = 6 + 8 * QUEUE
        regions += [Region(USED, spa, size) for spa, size in disk.memory.places(disk.layout.used, used_bytes)]
        for begin, length in ((disk.layout.desc, 16 * QUEUE), (disk.layout.avail, 6 + 2 * QUEUE)):
            regions += [Region(RING_READ, spa, size) for spa, size in disk.memory.places(begin, length)]

    async def _until(self, *requests):
        """Wait for the end of ``requests``, told by interrupts as a driver is."""
        card, disk = self.card, self.disk
        if disk.blk.publish():
            await card.port.run(disk.driver.notify())
        while not all(request.is_done for request in requests):
            if not await card.port.perform(WaitInterrupt(disk.function, 1, ANSWER_CYCLES)):
                raise AssertionError(f"No interrupt came within {ANSWER_CYCLES} cycles; {len(disk.blk.requests)} requests are under way")
            disk.blk.poll()
        if disk.blk.damage:
            raise AssertionError(disk.blk.damage[0])
        for request in requests:
            if request.status != 0:
                kind, first = BlkType(request.kind).name, request.sector
                raise AssertionError(f"Request {kind} at sector {first} ended with status {request.status}, not 0")

    async def _one_by_one(self):
        """Each kind of request alone: what the timeline shows."""
        blk = self.disk.blk
        await self._until(blk.get_id())
        first = self.image[:4096]
        kinds = {
            f"write of {len(first)}": lambda: blk.write(0, first), f"read of {len(first)}": lambda: blk.read(0, len(first)),
            "flush": blk.flush,
        }  # fmt: skip
        for name, make in kinds.items():
            begun = cycle()
            await self._until(make())
            self.alone[name] = cycle() - begun

    async def _flow(self, phase, passage, make):
        """Keep ``IN_FLIGHT`` requests of mixed sizes under way until all of the image has passed; return the data by place."""
        rng, total = self.card.rng, len(self.image)
        at, under_way, back = 0, deque(), {}
        self.progress.tell(phase, 0, total)
        while at < total or under_way:
            while at < total and len(under_way) < IN_FLIGHT:
                size = min(rng.choice(SIZES), total - at)
                try:
                    under_way.append((at, cycle(), make(at, size)))
                except RingFull:
                    break
                at += size
            await self._until(under_way[0][2])
            while under_way and under_way[0][2].is_done:
                place, begun, request = under_way.popleft()
                back[place] = request.data
                size = len(request.data) or len(request.sent) - 16
                passage.requests, passage.size = passage.requests + 1, passage.size + size
                self.latencies.append(cycle() - begun)
            self.progress.tell(phase, passage.size, total)
        return back

    def _compare(self, name, content):
        if content != self.image:
            at = next((n for n, (a, b) in enumerate(zip(content, self.image)) if a != b), min(len(content), len(self.image)))
            raise AssertionError(f"The {name} differs from the image from byte {at} on")
        self.compared[name] = len(content)

    def _stored(self):
        """Return what the card's store holds where the image is."""
        disk, row_bytes = getattr(self.card.dut.card.endpoint, f"device_{self.disk.function}"), self.settings.width // 8
        rows = disk.back_end.store.array.rows
        count = -(-len(self.image) // row_bytes)
        return b"".join(int(rows[n].value).to_bytes(row_bytes, "little") for n in range(count))[: len(self.image)]

    def _verify(self, content):
        copy = Path("readback.img")
        copy.write_bytes(content)
        done = subprocess.run(["e2fsck", "-f", "-n", str(copy)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"e2fsck does not accept the image that was read back:\n{done.stdout}{done.stderr}")
        self.compared["e2fsck"] = len(content)

    def sections(self):
        """Return the tables of the report, of what there is so far."""
        limits, flows = self._limits(), []
        for name, passage in (("write", self.written), ("read", self.read)):
            flows += [
                Figure(f"{name} requests", f"{passage.requests:,}", f"{passage.size:,} bytes of payload"),
                Figure(f"{name} throughput", f"{passage.rate:.2f} bytes/cycle",
                       f"link limit {limits[name]:.2f}: {100 * passage.rate / limits[name]:.1f} % of it; mixed sizes"),
            ]  # fmt: skip
        found = [Section("Disk", flows)]
        if self.latencies:
            low, middle, high = min(self.latencies), statistics.median(self.latencies), max(self.latencies)
            found[0].figures.append(Figure(
                "latency", f"{low:,} / {middle:,.0f} / {high:,} cycles", f"min / median / max to the interrupt, {IN_FLIGHT} in flight"))
            for name, taken in self.alone.items():
                found[0].figures.append(Figure(f"{name} alone", f"{taken:,} cycles"))
        counts = self.counts
        if counts:
            found.append(Section("IOMMU and link", [
                Figure("IOTLB hits", f"{counts['iotlb_hit']:,}"),
                Figure("IOTLB misses", f"{counts['iotlb_miss']:,}"),
                Figure("reads per walk", f"{counts['walk_read'] / max(1, counts['walk']):.2f}", f"{counts['walk']:,} walks"),
                Figure("most tags in flight", f"{counts['tags_in_flight']:,}", f"of {self.config.tags}"),
                Figure("latency of a page-table read", self._latency_of(WALK)),
                Figure("latency of a ring read", self._latency_of(RING_READ)),
            ]))
        judged = [Figure(f"{name} against the image", f"{size:,} bytes equal") for name, size in self.compared.items()]
        found.append(Section("Golden model", [
            Figure("comparisons", f"{self.card.session.board.comparisons:,}", f"{self.card.session.board.events:,} events judged"),
            *judged,
            Figure("differences", f"{self.card.session.board.differences:,}"),
        ]))
        return found

    def _latency_of(self, lane):
        taken = self.figures.latencies.get(lane)
        return f"{min(taken):,} / {statistics.median(taken):,.0f} / {max(taken):,} cycles" if taken else "-"

    def _limits(self):
        """Return what the link lets through: data of a disk write comes in completions, of a disk read leaves in writes."""
        rate = self.card.link.bytes_per_cycle
        return {name: payload_limit(self.settings.width, rate, MPS, header) for name, header in (("write", 3), ("read", 4))}

    async def judged(self, simulator):
        """Do all of it; write the report and ``result.json``, however it ends."""
        fault = "The run ended early; the simulator's log says why."
        try:
            await self.go()
            fault = None
        except AssertionError as error:
            fault = str(error)
            raise
        finally:
            Path("result.json").write_text(json.dumps(self.report(simulator, self.difference or fault)))

    def report(self, simulator, fault):
        """Write the page and return its figures as plain values."""
        settings, limits, rates = self.settings, self._limits(), {"write": self.written.rate, "read": self.read.rate}
        facts = {
            "image": f"{settings.image}, {len(self.image):,} bytes", "simulator": simulator, "seed": self.seed,
            "width": f"{settings.width} bits", "host latency": f"{settings.latency} cycles", "MPS / MRRS": f"{MPS} / {MRRS}",
            "cycles": f"{cycle():,}",
        }  # fmt: skip
        verdict = fault or "Every byte and every TLP is what the golden model says."
        end = max(self.read.end, self.written.end, 1)
        series = [
            Series("disk write (host to card)", throughput(self.figures.reads, begin=0, end=end), limits["write"]),
            Series("disk read (card to host)", throughput(self.figures.writes, begin=0, end=end), limits["read"]),
        ]
        phases = [Phase(name, one.begin, one.end) for name, one in (("write", self.written), ("read", self.read)) if one.end]
        timeline = self.figures.timeline("The first requests: GET_ID, a write, a read, a flush", LANES)
        sections = self.sections()
        write_report(settings.report, Report("Ringwall: first light", verdict, not fault, facts, sections, series, phases, [timeline]))
        return {
            "good": not fault, "fault": fault, "cycles": cycle(), "sections": [asdict(section) for section in sections], "limits": limits,
            "rates": rates, "counts": self.counts, "lanes": self.figures.counts,
            "comparisons": self.card.session.board.comparisons, "differences": self.card.session.board.differences,
        }  # fmt: skip


@cocotb.test()
async def image_comes_back(dut):
    """The image that was written is read back, byte for byte."""
    settings = Settings(**params())
    with Log("events.jsonl", run_header(cocotb.RANDOM_SEED, params())) as log:
        await Run(dut, settings, cocotb.RANDOM_SEED, log).judged(cocotb.SIM_NAME)
