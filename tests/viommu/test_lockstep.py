"""Random requests and accesses through the card's virtio-iommu and its gate, and through the golden one."""

import lzma
from pathlib import Path

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.virtio.iommu_formats import Probe, Status
from ringwall.models.virtio.iommu_trace import Seen, read_trace
from ringwall.models.virtio.iommu_traffic import MALFORMED, VALID, IommuTraffic
from ringwall.rtl.viommu.device import X86_DOORBELLS, IommuDevice, Region
from ringwall.sim.run import params, run
from ringwall.sim.viommu_bench import EVENTS, RECORD_BYTES, Wall, WallBench

DEVICES = {
    "64": (64, IommuDevice(endpoints=(1, 2, 3), intervals=9, events=4, entries=16)),
    "256": (256, IommuDevice(endpoints=(1, 2), input_bits=39, intervals=7, page_size_mask=0x4021_4000, domain_range=(5, 9), bypass=False,
                             entries=16, regions=(X86_DOORBELLS, Region(0x10_0000, 0x10_7FFF)))),
}  # fmt: skip


LINES = lzma.decompress((Path(__file__).parent.parent / "models/viommu-linux-boot.trace.xz").read_bytes()).decode().splitlines()
BOOT = IommuDevice(intervals=64, entries=16)


@pytest.mark.parametrize("name", DEVICES)
def test_lockstep(request, name):
    width, device = DEVICES[name]
    run(Wall(width=width, device=device), module=__name__, node=request.node.nodeid, params={"name": name, "width": width},
        testcase="both_do_the_same")  # fmt: skip


def test_boot(request):
    run(Wall(width=128, device=BOOT), module=__name__, node=request.node.nodeid, params={"width": 128}, testcase="linux_boots")


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def both_do_the_same(dut):
    """VIOMMU-LOCK-1: random requests, a third of them bad in every named way, while endpoints access memory: answers, where accesses go
    and fault records are the golden device's; nothing old is used behind the answer to UNMAP, DETACH or a second ATTACH."""
    bench = await WallBench(dut, DEVICES[params()["name"]][1]).begin()
    rng, device = bench.rng, bench.device
    bench.latency = lambda: rng.choice([1, 5, 40])
    traffic = IommuTraffic(device, rng, malformed=0.3, pages=24, base=0x40)
    statuses, records, accesses, running = set(), [], 0, True

    async def access_memory():
        nonlocal accesses
        while running:
            await bench.send(traffic.access())
            accesses += 1
            if rng.random() < 0.2:
                access = traffic.access()
                await bench.hint(access.endpoint, access.address, access.is_write)
            await ClockCycles(dut.clk, rng.choice([1, 3, 30, 100]))

    async def offer_buffers():
        while True:
            await bench.give(EVENTS, b"", RECORD_BYTES)
            records.append(await bench.packet(EVENTS))
            await ClockCycles(dut.clk, rng.choice([1, 200]))

    clients = [cocotb.start_soon(access_memory()), cocotb.start_soon(access_memory())]
    cocotb.start_soon(offer_buffers())
    for n, name in enumerate([*VALID, *[None] * 400, *MALFORMED]):
        sent = traffic.request(name)
        written = await bench.serve(sent.readable, sent.room)
        statuses.add(Status(written[-4]) if written else None)
        if n % 40 == 39:
            await bench.write_bypass(rng.getrandbits(1))
    running = False
    for client in clients:
        await client
    await ClockCycles(dut.clk, 4000)
    assert not bench.under_way, "an access never ended"
    for record in records:
        problem = device.reported(record, len(record))
        assert not problem, problem
    problem = device.unreported(int(dut.dropped.value))
    assert not problem, problem
    assert statuses == {None, *Status} - {Status.IOERR, Status.UNSUPP, Status.DEVERR}
    assert accesses > 500 and records and int(dut.dropped.value)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def linux_boots(dut):
    """VIOMMU-LOCK-2 (R24): what Linux did with QEMU's virtio-iommu while it booted from a disk behind it: every request is OK, every access
    goes where it went then."""
    bench = await WallBench(dut, BOOT).begin()
    for event in read_trace(LINES, {16: 1}):
        if isinstance(event, Seen):
            assert (await bench.access(event.access)).phys == event.phys
        else:
            room = bench.device.description.probe_size if isinstance(event, Probe) else 0
            assert (await bench.serve(event.pack(), room + 4))[room:] == bytes(4)
