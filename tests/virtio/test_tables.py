"""RingEngine on indirect tables at every place: any byte of a page, across pages, at the end of the address space."""

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.virtio.driver import Feature
from ringwall.models.virtio.ring import SPACE
from ringwall.rtl.virtio.engine import PortDescription, RingEngine
from ringwall.sim.ring_bench import RingBench
from ringwall.sim.run import params, run

SIZE = 8
BLOCK = 64  # ring reads stay inside one


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_tables(request, width):
    dut = RingEngine(width=width, functions=(1,), clients=(1,), ports=[PortDescription(0, (SIZE,))])
    run(dut, module=__name__, node=request.node.nodeid, params={"width": width})


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def tables_lie_anywhere(dut):
    """VIRTIO-RING-19: chains in tables at all 16 offsets, across pages, up to 2^64, are whole; no byte around is read (V030, V059)."""
    bench = await RingBench(dut, params()["width"], ((0, (SIZE,)),), latency=lambda: 12, back_latency=lambda: 2).begin()
    rng, server, back = bench.rng, bench.servers[0], bench.backs[0]
    for features in (1 << Feature.INDIRECT_DESC, 1 << Feature.INDIRECT_DESC | 1 << Feature.RING_PACKED):
        ring = await bench.enable(0, SIZE, features)
        own = [(at, at + length) for at, length in ring.layout.parts]
        for offset in range(16):
            count, page = rng.randrange(2, SIZE + 1), 0x1000_0000 + 0x1000 * rng.randrange(64)
            for table, buffers in (
                (page + 0x800 + rng.randrange(0, BLOCK, 16) + offset, rng.randrange(1, SIZE + 1)),
                (page - 16 * rng.randrange(1, count) - offset, count),
                (SPACE - 16 * count - offset, count),
            ):
                spans = [(rng.randrange(1 << 40), rng.randrange(1, 9000)) for _ in range(buffers)]
                readable, writable = spans[: buffers // 2], spans[buffers // 2 :]
                ring.tables, first = table, len(server.log)
                ring.add_chain(readable, writable, direct=0)  # the only one: its table is the first
                await bench.publish(0, always=True)
                await bench.until(lambda ring=ring: ring.has_used)
                ring.poll_used()
                assert back.chains.pop() == (0, readable, writable), f"{buffers} descriptors at {table:#x}"
                reads = [(burst.address, burst.address + burst.length_bytes) for _, burst, _ in server.log[first:] if not burst.is_write]
                of_table = [(low, high) for low, high in reads if not any(start <= low and high <= end for start, end in own)]
                assert all(table <= low and high <= table + 16 * buffers and low // BLOCK == (high - 1) // BLOCK for low, high in of_table)
                assert len(of_table) <= buffers + 1 + buffers // 3
    assert not bench.broken


@cocotb.test(timeout_time=200, timeout_unit="us")
async def bytes_are_counted(dut):
    """VIRTIO-RING-25: a chain may have 2^32 bytes, but neither as many readable ones nor as many writable ones (V031)."""
    bench = await RingBench(dut, params()["width"], ((0, (SIZE,)),), latency=lambda: 12, back_latency=lambda: 2).begin()
    half, most = (1 << 40, 1 << 31), (1 << 41, (1 << 32) - 1)
    for readable, writable, is_good in (([half] * 2, [], 0), ([], [half] * 2, 0), ([(0, 1)], [most], 1), ([most], [(0, 1)], 1),
                                        ([half], [half], 1)):  # fmt: skip
        await bench.enable(0, SIZE, 0)
        bench.broken.clear()
        bench.rings[0].add_chain(readable, writable)
        await bench.publish(0, always=True)
        await ClockCycles(dut.clk, 200)
        assert (bench.backs[0].chains, bool(bench.broken)) == ([(0, readable, writable)] * is_good, not is_good)
        bench.backs[0].chains.clear()
        await bench.stop(0)
