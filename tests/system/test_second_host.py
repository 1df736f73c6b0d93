"""The whole card below a root complex that none of us wrote: cocotbext-pcie enumerates it, owns its memory, takes its interrupts."""

import itertools
import random
import struct

import cocotb
import pytest
from cocotbext.axi import AddressSpace
from cocotbext.pcie.core.caps import PciCapId
from cocotbext.pcie.core.tlp import TlpType
from cocotbext.pcie.core.utils import PcieId

from ringwall.models.iommu.faults import Cause, TransactionType
from ringwall.models.virtio.driver import StructureType, VirtioPciDriver
from ringwall.sim.card import bench_card, bench_config
from ringwall.sim.run import run
from ringwall.sim.second_host import PoolMemory, SecondHost, from_dwords
from ringwall.sim.stream import cycle

PAGE = 4096
OK, IOERR = 0, 1
SIZES = [512 * sectors for sectors in (1, 2, 3, 8, 16, 33)]
NOBODY = 0xB000_0000  # no region of the root complex: Unsupported Request
HOLE = 0x7FFF_0000  # in its pool, but not allocated: Completer Abort


def test_second_host(request):
    run(bench_card(), module=__name__, node=request.node.nodeid, sim="verilator")


def test_parameters():
    """SYS-RC-11: what the second host cannot be, and memory that was not allocated, are refused with a sentence."""
    config = bench_config(256)
    for options, message in (({"mps": 1024}, "not 1024"), ({"rcb": 32}, "not 32")):
        with pytest.raises(ValueError, match=message):
            SecondHost(None, config, seed=0, **options)
    memory = PoolMemory(AddressSpace(1 << 32).create_pool(0, 1 << 20))
    address = memory.allocate(1000)
    memory.write(address + 4088, b"ringwall")
    assert memory.read(address + 4080, 16) == bytes(8) + b"ringwall"
    for at, length in ((address + 4089, 8), (address - 1, 1), (address + 4096, 1)):
        with pytest.raises(ValueError, match=f"not {length} bytes at {at:#x}"):
            memory.read(at, length)
        with pytest.raises(ValueError, match=f"not {length} bytes at {at:#x}"):
            memory.write(at, bytes(length))


async def second_host(dut, **options):
    """Return the host of one test, after its enumeration."""
    return await SecondHost(dut, bench_config(256), seed=cocotb.RANDOM_SEED, **options).begin()


async def write_and_read_back(host, disk, size):
    """Write ``size`` random bytes in requests of mixed sizes, read them back in others, and compare."""
    rng = random.Random(host.rng.random())
    content = rng.randbytes(size)
    for is_write in (True, False):
        at, batch = 0, []
        while at < size:
            length = min(rng.choice(SIZES), size - at)
            request = disk.blk.write(at // 512, content[at : at + length]) if is_write else disk.blk.read(at // 512, length)
            batch.append((at, length, request))
            at += length
            if len(batch) == 6 or at == size:
                await disk.done([request for _, _, request in batch])
                for begin, length, request in batch:
                    assert request.status == OK, f"request at {begin} ended with status {request.status}"
                    if not is_write:
                        assert request.data == content[begin : begin + length], f"{length} bytes at {begin} came back wrong"
                batch = []


async def ends_in_an_error(disk, length=4096):
    """Let one write of ``length`` bytes end in IOERR, and the next in OK."""
    bad = disk.blk.write(0, bytes(length))
    await disk.done([bad])
    assert bad.status == IOERR, f"a write whose data did not come ended with status {bad.status}"
    good = disk.blk.write(0, bytes(length))
    await disk.done([good])
    assert good.status == OK, f"the write after it ended with status {good.status}"


def once(condition, change):
    """Return a ``tamper`` that makes ``change(tlp)`` of the first TLP with ``condition(tlp)``, and the list of what it met."""
    met = []

    def tamper(tlp):
        if met or not condition(tlp):
            return tlp
        met.append(tlp)
        return change(tlp)

    return tamper, met


def is_bulk(tlp):
    """Whether it is a completion with more data than an access of a ring or a table has: 64 bytes."""
    return tlp.fmt_type is TlpType.CPL_DATA and tlp.length > 16


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def host_finds_all_functions(dut):
    """SYS-RC-1: the root complex finds three functions, places their BARs, reaches them there; what is nobody's is refused (R02)."""
    host = await second_host(dut)
    config, functions = host.config, host.functions
    assert sorted(functions) == [0, 1, 2] and all(info.is_multi_function for info in functions.values())
    assert [functions[n].class_code for n in (0, 1, 2)] == [0x080600, 0x018000, 0x018000]
    assert (functions[0].vendor, functions[0].device) == (config.iommu.vendor_id, config.iommu.device_id)
    assert all((functions[n].vendor, functions[n].device) == (0x1AF4, 0x1042) for n in (1, 2))
    assert [{n: bar.size for n, bar in functions[number].bars.items()} for number in (0, 1, 2)] == [{0: 4096}, *[{0: 16384, 2: 4096}] * 2]
    for info in functions.values():
        assert {int(PciCapId.EXP), int(PciCapId.MSIX)} <= set(info.capabilities)
    assert not functions[0].capabilities.get(9) and all(len(functions[n].capabilities[9]) == 5 for n in (1, 2))

    places = sorted((bar.address, bar.size) for info in functions.values() for bar in info.bars.values())
    assert all(address % size == 0 for address, size in places)
    assert all(here[0] + here[1] <= there[0] for here, there in itertools.pairwise(places))
    assert host.root_port.mem_base <= places[0][0] and sum(places[-1]) - 1 <= host.root_port.mem_limit
    for number, device in host.devices.items():
        assert await device.get_mps() == 1 and await device.get_readrq() == 2, f"function {number} keeps other limits than it got"
        raw = b"".join([struct.pack("<I", await device.config_read_dword(0x10 + 4 * n)) for n in range(6)])
        for n, bar in functions[number].bars.items():
            assert int.from_bytes(raw[4 * n : 4 * n + 8], "little") & -16 == bar.address

    assert (await host.devices[0].bar_window[0].read_qword(0)) & 0xFF == 0x10  # version 1.0
    for number in (1, 2):
        driver = VirtioPciDriver(functions[number])
        await host.run(driver.find())
        assert not driver.problems and set(driver.structures) == set(StructureType)
        assert await host.run(driver.read_device_config([(0, 8)])) == [config.disks[number - 1].capacity_sectors]

    assert await host.rc.config_read_dword(PcieId(1, 0, 3), 0, "little", host.timeout_ns, "ns") == 0xFFFF_FFFF
    beyond = sum(places[-1])
    assert beyond < host.root_port.mem_limit
    with pytest.raises(Exception, match="Unsuccessful completion"):
        await host.rc.mem_read(beyond, 4, host.timeout_ns, "ns")
    assert (await host.devices[0].bar_window[0].read_qword(0)) & 0xFF == 0x10
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def translated_disk_reads_what_it_wrote(dut):
    """SYS-RC-2: IOMMU with Sv39, virtio-blk with ACCESS_PLATFORM in the root complex's memory; the driver waits for MSI-X (R22, R24)."""
    seen = []
    host = await second_host(dut, bridge={"loss": seen.append})
    await host.enable_iommu()
    disk = await host.disk(0)
    assert disk.driver.features >> 33 & 1
    del seen[:]
    await write_and_read_back(host, disk, 96 * 1024)
    assert host.interrupts[1, 1] > 0 and not any(host.interrupts[0, vector] for vector in range(4))
    bulk = [tlp for tlp in seen if tlp.fmt_type in (TlpType.MEM_WRITE, TlpType.MEM_WRITE_64)]
    assert max(tlp.length for tlp in bulk) == 64  # uses the 256 bytes that it got, and no more
    assert max(tlp.length for tlp in seen if tlp.fmt_type in (TlpType.MEM_READ, TlpType.MEM_READ_64)) == 128
    assert {tlp.requester_id for tlp in seen if not tlp.is_completion()} <= {PcieId(1, 0, 0), PcieId(1, 0, 1)}
    regions = [(base, base + len(mem)) for base, mem in host.memory.regions]
    message = host.devices[1].msi_vectors[0].addr
    for tlp in seen:
        if not tlp.is_completion():
            ends = tlp.address + 4 * tlp.length
            assert tlp.address == message or any(low <= tlp.address and ends <= high for low, high in regions), f"{tlp!r}"
    assert not await host.run(host.iommu.read_faults())
    host.finish()


async def two_disks_at_once(dut, **options):
    """Bring both disks up, one translated and one not, and use them at the same time."""
    host = await second_host(dut, **options)
    await host.enable_iommu(levels=3)
    disks = [await host.disk(0), await host.disk(1, platform=False)]
    tasks = [cocotb.start_soon(write_and_read_back(host, disk, 64 * 1024)) for disk in disks]
    for task in tasks:
        await task
    assert host.interrupts[1, 1] and host.interrupts[2, 1]
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def completions_may_come_cut_and_late(dut):
    """SYS-RC-3: cut at each RCB of 64 bytes, out of order by up to 600 cycles, 128-byte payloads, memory above 4 GiB (R02, R51)."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await two_disks_at_once(dut, mps=128, above=True, rcb=64, bridge={"latency": lambda: rng.randrange(600)})


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def completions_may_come_cut_at_128_bytes(dut):
    """SYS-RC-4: cut at each RCB of 128 bytes, out of order by up to 50 cycles, memory below 4 GiB (R51)."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await two_disks_at_once(dut, mps=512, rcb=128, bridge={"latency": lambda: rng.randrange(50)})


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def host_may_ignore_the_iommu(dut):
    """SYS-RC-5: nobody touches function 0: both disks work with physical addresses, with and without ACCESS_PLATFORM (R22, R25, R26)."""
    seen = []
    host = await second_host(dut, bridge={"loss": seen.append})
    for number, platform in ((0, False), (1, True)):
        disk = await host.disk(number, platform=platform)
        assert disk.driver.features >> 33 & 1 == platform
        await write_and_read_back(host, disk, 64 * 1024)
        assert host.interrupts[disk.function, 1] > 0
    assert {tlp.requester_id for tlp in seen if not tlp.is_completion()} == {PcieId(1, 0, 1), PcieId(1, 0, 2)}
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def unmapped_page_is_reported(dut):
    """SYS-RC-6: a page without mapping: IOERR, a record in the root complex's memory, the fault queue's interrupt; then all works (R03)."""
    host = await second_host(dut)
    await host.enable_iommu()
    disk = await host.disk(0)
    for is_write in (True, False):
        request = disk.blk.write(0, bytes(4 * PAGE)) if is_write else disk.blk.read(0, 4 * PAGE)
        address = next(at for at, length in request.readable + request.writable if length == 4 * PAGE)
        page = (address + PAGE) // PAGE * PAGE  # of data alone
        disk.table.unmap(page)
        await host.run(host.iommu.invalidate(iova=page))
        await disk.done([request])
        assert request.status == IOERR
        assert await host.interrupt(0, 1, 10_000), "the fault queue did not interrupt"
        await host.run(host.iommu.write("ipsr", 0xF))
        records = await host.run(host.iommu.read_faults())
        cause, ttyp = ((Cause.READ_PAGE_FAULT, TransactionType.UNTRANSLATED_READ) if is_write else
                       (Cause.WRITE_PAGE_FAULT, TransactionType.UNTRANSLATED_WRITE))  # fmt: skip
        assert records, "no record was written"
        for record in records:
            assert (record.cause, record.ttyp, record.device_id, record.iotval // PAGE) == (cause, ttyp, 1, page // PAGE), f"{record}"
        disk.table.map_page(page, disk.memory.frames[page // PAGE] * PAGE)
        await host.run(host.iommu.invalidate(iova=page))
        await write_and_read_back(host, disk, 16 * 1024)
        await host.run(host.iommu.read_faults())
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def refusals_of_the_host_end_in_errors(dut):
    """SYS-RC-7: data where the root complex has nothing: its UR and its CA end the request with IOERR, and the next works (R03)."""
    host = await second_host(dut)
    disk = await host.disk(0, platform=False)
    page = host.memory.allocate(PAGE)
    for address in (NOBODY, HOLE, NOBODY, HOLE):
        host.memory.write(page, struct.pack("<IIQ", 1, 0, 8) + b"\xff")
        length = await disk.raw([(page, 16), (address, 1024)], [(page + 16, 1)])
        assert host.memory.read(page + 16, 1)[0] == IOERR and length == 1
        await write_and_read_back(host, disk, 8 * 1024)
    host.finish("Memory request did not match", "Memory read operation failed")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def spoiled_completions_end_in_errors(dut):
    """SYS-RC-8: a completion that gets lost: IOERR after the card's patience; one that is poisoned: IOERR; the next works (R03)."""
    host = await second_host(dut)
    disk = await host.disk(0, platform=False)

    def poisoned(tlp):
        tlp.ep = True
        return tlp

    for change in (lambda tlp: None, poisoned, lambda tlp: None):
        host.bridge.tamper, met = once(is_bulk, change)
        begun = cycle()
        await ends_in_an_error(disk)
        assert len(met) == 1 and (cycle() - begun > host.config.completion_timeout_cycles) == (change is not poisoned)
        await write_and_read_back(host, disk, 16 * 1024)
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def masked_vectors_are_silent(dut):
    """SYS-RC-9: masks of vector and function: no message, its pending bit set; unmasked it comes, once (R19)."""
    seen = []
    host = await second_host(dut, bridge={"loss": seen.append})
    disk = await host.disk(0, platform=False)
    await write_and_read_back(host, disk, 4096)
    device = host.devices[1]
    table = device.bar_window[(await device.capability_read_dword(PciCapId.MSIX, 4)) & 7]
    pba = await device.capability_read_dword(PciCapId.MSIX, 8)
    message = device.msi_vectors[1].addr

    async def mask_vector(is_masked):
        await table.write_dword(16 + 12, int(is_masked))

    async def mask_function(is_masked):
        await device.capability_write_word(PciCapId.MSIX, 2, 0xC000 if is_masked else 0x8000)

    for mask in (mask_vector, mask_function):
        await host.delay(2000)  # messages of requests that an earlier one already told of
        await mask(True)
        await table.read_dword(16 + 12)  # the answer comes after the write took effect
        before = host.interrupts[1, 1]
        del seen[:]
        request = disk.blk.read(0, 4096)
        await disk.ring_doorbell()
        await host.delay(5000)
        assert host.interrupts[1, 1] == before and not any(tlp.address == message for tlp in seen)
        assert disk.blk.poll() == [request] and request.status == OK
        assert (await device.bar_window[pba & 7].read_dword(pba & ~7)) >> 1 & 1
        await mask(False)
        assert await host.interrupt(1, 1, 5000), "the pending message did not come"
        await host.delay(2000)
        assert host.interrupts[1, 1] == before + 1 and not (await device.bar_window[pba & 7].read_dword(pba & ~7)) >> 1 & 1
        await write_and_read_back(host, disk, 4096)
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def the_second_host_finds_what_is_planted(dut):
    """SYS-RC-10: planted in the bridge: one bit of data on the way to the card, a lost message, a bit that no header has: each is found."""
    host = await second_host(dut)
    disk = await host.disk(0, platform=False)

    def flipped(tlp):
        tlp.data[5] ^= 0x10
        return tlp

    host.bridge.tamper, met = once(is_bulk, flipped)
    with pytest.raises(AssertionError, match="came back wrong"):
        await write_and_read_back(host, disk, 64 * 1024)
    assert len(met) == 1
    await write_and_read_back(host, disk, 64 * 1024)

    message = host.devices[1].msi_vectors[0].addr
    host.bridge.loss = lambda tlp: tlp.fmt_type is TlpType.MEM_WRITE and tlp.address == message
    lost = disk.blk.read(0, 512)
    with pytest.raises(AssertionError, match="did not interrupt"):
        await disk.done([lost], cycles=5000)
    host.bridge.loss = None
    assert disk.blk.poll() == [lost]
    await write_and_read_back(host, disk, 4096)

    good = [0x4A00_0001, 0x0100_0004, 0x0000_0500, 0x1234_5678]
    assert from_dwords(good).data == b"\x78\x56\x34\x12"
    for bad in ([*good[:2], good[2] | 1 << 7, good[3]], [0x4A00_0002, *good[1:]]):  # a reserved bit; a length without data
        with pytest.raises(AssertionError, match="does not understand"):
            from_dwords(bad)
    host.finish()
