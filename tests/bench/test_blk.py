"""How busy requests of 4 KiB keep the link: data, rings, headers, status, interrupts, beside what it carries at most."""

import re
from dataclasses import replace
from math import ceil

import cocotb

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.virtio.blk import BlkStatus
from ringwall.rtl.config import IommuConfig
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import PAGE, Card, bench_config
from ringwall.sim.counted import Counted
from ringwall.sim.run import run

WIDTH, LATENCY = 256, 250
CONFIG = replace(bench_config(WIDTH), iommu=IommuConfig())  # as in test_prefetch.py: one build
REQUESTS = 80
LANES, RAW = WIDTH // 32, WIDTH / 8 * 128 / 130  # dwords of a beat; bytes per cycle of the link [PCIe5 4.2.2]
DATA = 60  # dwords: shorter TLPs are no data
MOST = 1.5  # times as many TLPs as data takes
LEAST = 0.98


def test_requests(request, capsys):
    """BENCH-BLK-1: 256 bits, 250 cycles of latency, translated, IOTLB warm, 4 KiB: the link is 98 % busy either way."""
    done = run(Counted(RawCard(CONFIG)), module=__name__, node=request.node.nodeid, sim="verilator")
    found = [(way, float(busy), float(each), float(tlps))
             for way, busy, each, tlps in re.findall(r"BENCH (\w+): (\S+) busy, (\S+) cycles, (\S+) TLPs", done.log)]  # fmt: skip
    assert len(found) == 2
    with capsys.disabled():
        print()
        for way, busy, each, _ in found:
            print(f"  4 KiB, disk {way:5}: {each:.1f} cycles each, the link {busy:.1%} busy, least {LEAST:.0%}")
    for _, busy, _, tlps in found:
        assert LEAST <= busy <= 1 and tlps <= MOST


class Wire:
    """When TLPs ended, and their dwords, in each direction."""

    def __init__(self):
        self.seen = {TlpSent: [], TlpReceived: []}

    def observe(self, event, tlp):
        if type(event) in self.seen:
            self.seen[type(event)].append((event.cycle, len(event.dwords)))

    def busy(self, kind):
        """Return how much of its time a direction was taken, cycles per 4 KiB, TLPs per data TLP: in the middle half. [PCIe5 2.2.7]"""
        seen = self.seen[kind]
        part = seen[len(seen) // 4 : 3 * len(seen) // 4]
        cycles, sizes = part[-1][0] - part[0][0], [dwords for _, dwords in part[1:]]
        beats, link = sum(ceil(size / LANES) for size in sizes), sum(4 * size + 8 for size in sizes) / RAW
        payload = sum(4 * (size - 3) for size in sizes if size >= DATA)
        return max(beats, link) / cycles, cycles * PAGE / payload, len(sizes) / sum(size >= DATA for size in sizes)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def warm_requests(dut):
    """BENCH-BLK-2: the run of BENCH-BLK-1: every request is OK; what was on the link."""
    card = Card(dut, CONFIG, seed=1, latency=LATENCY)
    card.observers.clear()
    await card.begin()
    await card.enable_iommu()
    disk = await card.disk(0, queue_size=256, buffer_pages=3 * REQUESTS)
    for is_read in (True, False):
        for _ in range(2):  # the first time the IOTLB is cold
            wire = Wire()
            card.observers[:] = [wire.observe]
            batch = [disk.blk.read(0, PAGE, framing="pages") if is_read else disk.blk.write(0, bytes(PAGE), framing="pages")
                     for _ in range(REQUESTS)]  # fmt: skip
            await disk.done(batch)
            assert all(one.status == BlkStatus.OK for one in batch)
        busy, each, tlps = wire.busy(TlpReceived if is_read else TlpSent)
        dut._log.info("BENCH %s: %.4f busy, %.2f cycles, %.3f TLPs", "read" if is_read else "write", busy, each, tlps)
