"""Device ids beyond the directory: no function number of a card is one, so the IOMMU alone is asked."""

import random

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.faults import AccessType, Cause, FaultRecord
from ringwall.models.iommu.registers import IommuDriver
from ringwall.models.iommu.tables import DEVICE_ID_BITS, Allocator, DeviceContext, PageTable
from ringwall.rtl.iommu.gate import MAX_FUNCTIONS
from ringwall.rtl.iommu.layouts import TranslateRequest, TranslateResponse
from ringwall.rtl.iommu.unit import Iommu
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, unpack


def test_ids_beyond(request):
    run(Iommu(width=64), module=__name__, node=request.node.nodeid)


@cocotb.test(timeout_time=3, timeout_unit="ms")
@cocotb.parametrize(levels=[1, 2])
async def device_id_is_beyond_the_directory(dut, levels):
    """SYS-BAD-16 (R24): an id wider than the directory: refused with 260, recorded, no table read; then the widest good id translates.

    The card's device_id is the function number, below 8 (no bus number enters the gate); the smallest directory reaches 128.
    """
    assert 1 << DEVICE_ID_BITS[1] >= MAX_FUNCTIONS
    rng, width = random.Random(cocotb.RANDOM_SEED), DEVICE_ID_BITS[levels]
    host = await IommuHost(dut, 64).begin()
    request, response = Stream(dut, "translate_request"), Stream(dut, "translate_response")
    driver = IommuDriver(0, host.memory, allocator := Allocator(host.memory, 0x8000_0000, 0x10_0000, rng=rng))
    await host.perform(driver.init(levels))
    good, table = (1 << width) - 1, PageTable(host.memory, allocator)
    table.map_page(0x1000, 0x1_2345_6000)
    driver.directory.set(good, DeviceContext.sv39(table.root, PSCID=1))

    async def ask(device, access):
        await request.put(pack(TranslateRequest, device_id=device, is_write=access is AccessType.WRITE, page=1, offset=0x123, cookie=7))
        return unpack(TranslateResponse, await response.get())

    for device in (1 << width, good + 1 + rng.randrange(1 << width), 1 << 23 | good, 0xFF_FFFF):
        for access in (AccessType.READ, AccessType.WRITE):
            reads = sum(not burst.is_write for _, burst, _ in host.bursts)
            answer = await ask(device, access)
            assert answer.fault and answer.cause == Cause.TRANSACTION_TYPE_DISALLOWED
            await ClockCycles(dut.clk, 300)
            records = await host.perform(driver.read_faults())
            wanted = FaultRecord(Cause.TRANSACTION_TYPE_DISALLOWED, access.ttyp, device_id=device, iotval=0x1123)
            assert len(records) == 1 and not wanted.differences(records[0]), f"{records}"
            assert sum(not burst.is_write for _, burst, _ in host.bursts) == reads, "a table was read"
            answer = await ask(good, access)
            assert not answer.fault and answer.page == 0x1_2345_6
