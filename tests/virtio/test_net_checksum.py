"""Checksum: sums of frames against a plain reading of RFC 1071."""

import random

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.models.virtio.packets import internet_sum
from ringwall.rtl.virtio.net_checksum import Checksum
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, start


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_net_checksum(request, width):
    run(Checksum(width=width), module=__name__, node=request.node.nodeid, params={"width": width})


@cocotb.test(timeout_time=100, timeout_unit="us")
async def sums_are_right(dut):
    """VIRTIO-NET-15: random frames and kept bytes, back to back and with pauses, up to 64 KiB of FFh: the sum of each, in order, 4 cycles
    behind its last beat at 64 bits, 5 at 128 and 256, 6 at 512."""
    rng, width, sums = random.Random(cocotb.RANDOM_SEED), params()["width"], []
    lanes, delay = width // 8, {64: 4, 128: 5, 256: 5, 512: 6}[params()["width"]]
    await start(dut)

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            if dut.done.value:
                sums.append((int(dut.sum.value), cycle()))

    cocotb.start_soon(watch())
    wanted, layout = [], Checksum(width=width).beat.shape()
    for n in range(60):
        is_full = n in (30, 31)
        content, kept, last = rng.randbytes(lanes * rng.choice([1, 1, 2, rng.randrange(1, 20)])), b"", 0
        if is_full:  # the longest, and one whose carry gives another
            content = b"\xff" * 65536 if n == 30 else b"\xff\xff\xff\xff\0\1".ljust(lanes, b"\0")
        for at in range(0, len(content), lanes):
            row, keep = content[at : at + lanes], (1 << lanes) - 1 if is_full else rng.getrandbits(lanes)
            kept += bytes(byte if keep >> k & 1 else 0 for k, byte in enumerate(row))
            dut.beat.value = pack(layout, data=int.from_bytes(row, "little"), keep=keep, first=at == 0, last=at + lanes == len(content))
            dut.valid.value = 1
            await RisingEdge(dut.clk)
            last = cycle()
            dut.valid.value = 0
            if not is_full and rng.random() < 0.2:
                await RisingEdge(dut.clk)
        wanted.append((internet_sum(kept) % 0xFFFF, last))
    for _ in range(20):
        await RisingEdge(dut.clk)
    assert [value % 0xFFFF for value, _ in sums] == [value for value, _ in wanted]
    assert {at - last for (_, at), (_, last) in zip(sums, wanted, strict=True)} == {delay}
