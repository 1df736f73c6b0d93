"""The whole card against the model host, with the golden model watching every TLP."""

import cocotb
import pytest

from ringwall.sim.card import Card, bench_card, bench_config
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle


@pytest.mark.parametrize("width", [256])
def test_card(request, width, capsys):
    done = run(bench_card(width), module=__name__, node=request.node.nodeid, params={"width": width}, sim="verilator")
    with capsys.disabled():
        print("", *(line.partition("BENCH ")[2] for line in done.log.splitlines() if "BENCH " in line), sep="\n  ")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def translated_disk_reads_what_it_wrote(dut):
    """SYS-CARD-1: enumerate, IOMMU up, virtio-blk with ACCESS_PLATFORM: requests of mixed sizes and framings come back whole (R22, R24)."""
    config = bench_config(params()["width"])
    card = await Card(dut, config, seed=cocotb.RANDOM_SEED).begin()
    assert [info.function for info in card.functions] == [0, 1, 2]
    await card.enable_iommu(levels=2)
    disk = await card.disk(0)
    content = card.rng.randbytes(256 * 1024)
    at, writes = 0, []
    while at < len(content):
        size = min(512 * card.rng.choice([1, 2, 8, 16, 128]), len(content) - at)
        writes.append(disk.blk.write(at // 512, content[at : at + size]))
        at += size
        if len(writes) == 6 or at == len(content):
            await disk.done(writes)
            assert all(request.status == 0 for request in writes)
            writes = []
    reads, at = [], 0
    while at < len(content):
        size = min(512 * card.rng.choice([1, 2, 8, 16, 128]), len(content) - at)
        reads.append((at, disk.blk.read(at // 512, size)))
        at += size
        if len(reads) == 6 or at == len(content):
            await disk.done([request for _, request in reads])
            assert all(request.status == 0 and request.data == content[begin : begin + len(request.data)] for begin, request in reads)
            reads = []

    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def large_requests_fill_the_link(dut):
    """SYS-CARD-2: 64 KiB requests, two in flight, 250 cycles of latency, IOTLB warm: both ways reach 85 % of min(link, interface)."""
    width, size, payload, header = params()["width"], 65536, 256, 16
    card = await Card(dut, bench_config(width), seed=cocotb.RANDOM_SEED).begin()
    await card.enable_iommu()
    disk = await card.disk(0, buffer_pages=120, alignment=4096)  # fewer pages than the IOTLB has entries
    # 4 DW headers; 8 bytes of framing, sequence number and LCRC for each TLP.
    limit = min(width / 8 * 128 / 130 * payload / (payload + header + 8), payload / -(-(payload + header) // (width // 8)))
    for kind in ("write", "read"):
        ends, in_flight, number = [], [], 0
        while len(ends) < 40:  # the first of them warm the IOTLB: the buffers lie in ever other pages of the 120
            while len(in_flight) < 2:
                sector = 128 * (number % 16)
                in_flight.append(disk.blk.write(sector, bytes([number]) * size) if kind == "write" else disk.blk.read(sector, size))
                number += 1
            await disk.done(in_flight[:1])
            assert in_flight.pop(0).status == 0
            ends.append(cycle())
        rate = 8 * size / (ends[-1] - ends[-9])
        dut._log.info("BENCH 64 KiB disk %ss: %.2f bytes per cycle, limit %.2f (%.1f %%)", kind, rate, limit, 100 * rate / limit)
        assert rate >= 0.85 * limit, f"{kind}: {rate:.2f} of {limit:.2f} bytes per cycle"
        await disk.done(in_flight)
    card.finish()
