"""A whole card that caches the translations of its host's IOMMU; every use of one is judged."""

from dataclasses import replace

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.host import ConfigRead, ConfigWrite, Fault, enable_ats
from ringwall.models.iommu.commands import AtsInval
from ringwall.models.tlp import TRANSLATED, TRANSLATION_REQUEST, UNTRANSLATED, Tlp, TlpType, encode
from ringwall.rtl.core import Activity
from ringwall.rtl.verilog import RawCard
from ringwall.sim.host_ats import FRAME, SECTOR, HostAtsCard, host_ats_config
from ringwall.sim.run import run
from ringwall.sim.stream import reader

OK, IOERR = 0, 1
POWER, EXPRESS, SRIOV, ATS = 0x01, 0x10, 0x10, 0x0F  # capability IDs
CONFIG = host_ats_config()


def test_card(request):
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, sim="verilator")


async def up(dut, *, ats=True, alignment=1):
    """Return a card with its host's IOMMU on, and its disk."""
    card = await HostAtsCard(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=60).begin()
    await card.enable_iommu(ats=ats)
    return card, await card.disk(0, queue_size=64, buffer_pages=90, alignment=alignment)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def disk_works_on_translated_addresses(dut):
    """SYS-ATS-1: a disk reads and writes with ATS enabled: each of its accesses is translated, with an address that the host gave it,
    its interrupts are not; pages are asked for once while they fit."""
    card, disk = await up(dut)
    await card.traffic(disk, 4)
    kinds = card.kinds
    assert kinds[TlpType.MRD, UNTRANSLATED] == 0
    assert kinds[TlpType.MWR, UNTRANSLATED] == card.host.statistics.interrupts > 0
    assert min(kinds[TlpType.MRD, TRANSLATED], kinds[TlpType.MWR, TRANSLATED]) > 100
    assert 20 < kinds[TlpType.MRD, TRANSLATION_REQUEST] == card.host_iommu.requests
    cocotb.log.info("%s", kinds)
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def nothing_stale_is_used(dut):
    """SYS-ATS-2: under load pages are invalidated one by one, all at once, and in floods of 32: no request uses a translation after its
    Invalidate Completion, none of those before it is unanswered by then, all are completed."""
    card, disk = await up(dut)
    rid, run = card.host.bus << 8 | disk.function, card.port.run
    load = cocotb.start_soon(card.traffic(disk, 7))
    rounds = 0
    while not load.done():
        pages = [iova * FRAME for iova in card.rng.sample(sorted(disk.memory.frames), 32)]
        match rounds % 4:
            case 0:
                await card.invalidate(disk)
            case 1 | 2:
                await card.invalidate(disk, pages[0])
            case 3:
                await run(card.iommu.submit([AtsInval(rid, iova) for iova in pages]))
                await run(card.iommu.fence())
        rounds += 1
    await load
    iommu = card.host_iommu
    cocotb.log.info("%d rounds, %d invalidations, %d requests, %d uses", rounds, iommu.invalidated, iommu.requests, iommu.uses)
    assert rounds > 40
    assert iommu.invalidated > 300
    assert iommu.requests > 150
    assert card.kinds[TlpType.MWR, UNTRANSLATED] == card.host.statistics.interrupts
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def pages_move(dut):
    """SYS-ATS-3: between batches buffer pages get other frames, each invalidated: what is read is what was written there."""
    card, disk = await up(dut)
    for _ in range(4):
        await card.traffic(disk, 1)
        for page in card.rng.sample(sorted(disk.memory.frames), 8):
            old, new = disk.memory.frames[page], card._frame
            card._frame += 1
            card.session.memory.write(new * FRAME, card.session.memory.read(old * FRAME, FRAME))
            disk.table.unmap(page * FRAME)
            disk.table.map_page(page * FRAME, new * FRAME)
            await card.invalidate(disk, page * FRAME)
            disk.memory.frames[page] = new
            card.session.memory.write(old * FRAME, b"\xA5" * FRAME)
    assert card.host_iommu.invalidated == 32
    card.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def faults_end_requests(dut):
    """SYS-ATS-4: a page without permission, and translation requests answered by UR, CA, poison or nothing, end the disk's request
    in an error, nothing is sent for it; the next one works."""
    card, disk = await up(dut, alignment=FRAME)
    for kind in ("no read", "no write", "UR", "CA", "POISON", "MISSING"):
        bad = disk.blk.read(0, SECTOR * 8) if kind == "no write" else disk.blk.write(0, bytes(SECTOR * 8))
        page = (bad.writable[0] if kind == "no write" else bad.readable[1])[0] // FRAME * FRAME  # the first of its data
        if kind.startswith("no"):
            disk.table.protect(page, "xu" if kind == "no read" else "ru")
        else:
            card.host.policy.faults.append(Fault(kind, lambda tlp, page=page: (tlp.at, tlp.address) == (TRANSLATION_REQUEST, page)))
        await card.invalidate(disk)
        await disk.done([bad], may_fail=True)
        assert bad.status == IOERR, f"{kind}: status {bad.status}"
        disk.table.protect(page, "rwu")
        good = disk.blk.write(0, bytes(SECTOR * 8))
        await disk.done([good])
        assert good.status == OK, kind
    assert not any(fault.times for fault in card.host.policy.faults)
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def what_waits_is_not_used_later(dut):
    """SYS-ATS-8: ATS Enable of a disk falls under load and rises while the link takes nothing: what waited since before is not sent."""
    card, disk = await up(dut)
    await card.enable_virtual(0, 1)
    other = await card.disk(1, queue_size=64, buffer_pages=90)
    control, perform = card.functions[0].ext_capabilities[ATS][0] + 6, card.port.perform
    card.observers.clear()  # what is dropped leaves its requests half done: the host alone judges
    for _ in range(4):
        for one in (disk, other):
            for sector in range(0, 96, 16):
                one.blk.read(sector, 16 * SECTOR)
            await one.offer()
        await ClockCycles(dut.clk, card.rng.randrange(300, 2500))
        await perform(ConfigWrite(0, control, 2, 0))
        card.link.ready = lambda: False
        on = cocotb.start_soon(perform(ConfigWrite(0, control, 2, 1 << 15)))
        await ClockCycles(dut.clk, 300)
        card.link.ready = None
        await on
        await ClockCycles(dut.clk, 4000)
        for one in (disk, other):
            await one.restart()


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def ends_of_a_function_under_load(dut):
    """SYS-ATS-9: bus master off, D3hot and a function level reset at any moment while pages are asked for and invalidated: nothing is sent
    that may not be, invalidations are completed, the disk works afterwards."""
    card, disk = await up(dut)
    info, perform, run = card.functions[0], card.port.perform, card.port.run
    rid, power = card.host.bus << 8, info.capabilities[POWER][0] + 4
    bars = await card.bars()
    card.observers.clear()  # what is given up leaves its requests half done: the host alone judges
    for n in range(12):
        await run(enable_ats(info))
        for sector in range(0, 96, 16):
            disk.blk.read(sector, 16 * SECTOR)
        await disk.offer()
        await ClockCycles(dut.clk, card.rng.randrange(20, 1500))
        await run(card.iommu.submit([AtsInval(rid, (1 << 63) - FRAME, is_range=True)] * card.rng.randrange(3)))
        match n % 3:
            case 0:
                await perform(ConfigWrite(0, 4, 2, 2))
            case 1:
                await perform(ConfigWrite(0, power, 2, 3))
            case 2:
                await perform(ConfigWrite(0, info.capabilities[EXPRESS][0] + 8, 2, 1 << 15))
        await perform(ConfigRead(0, 0, 4))  # its answer is the end of what the card may still send
        await run(card.iommu.fence())
        await ClockCycles(dut.clk, card.rng.randrange(400))
        if n % 3 == 1:
            await perform(ConfigWrite(0, power, 2, 0))
        await perform(ConfigWrite(0, 4, 2, 6))
        if n % 3:
            await card.put_back(bars)
        await disk.restart()
        data = card.rng.randbytes(16 * SECTOR)
        write = disk.blk.write(0, data)
        await disk.done([write])
        read = disk.blk.read(0, len(data))
        await disk.done([read])
        assert (write.status, read.status, read.data) == (OK, OK, data)
    assert card.host_iommu.invalidated > 6


async def count_misses(dut, pulses):
    """Append to ``pulses`` for each page that the cache does not have."""
    activity, mask = reader(dut.activity), 1 << Activity.as_shape()["iotlb_miss"].offset
    edge = RisingEdge(dut.clk)
    while True:
        await edge
        if activity() & mask:
            pulses.append(1)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def untranslated_until_enabled(dut):
    """SYS-ATS-5: without ATS Enable the IOMMU translates what comes, nothing is asked; enabled, disabled and enabled again the disk
    works, the cache begins empty each time, and so it does after a function level reset."""
    card, disk = await up(dut, ats=False)
    info, kinds, iommu = card.functions[0], card.kinds, card.host_iommu
    run, pulses = card.port.run, []
    cocotb.start_soon(count_misses(dut, pulses))
    for is_on in (None, True, False, True, "reset"):
        if is_on == "reset":
            await card.level_reset(disk)
        elif is_on is not None:
            await run(enable_ats(info, is_on=is_on))
        before, asked = kinds.copy(), iommu.requests
        pulses.clear()
        await card.traffic(disk, 1)
        asked, news = iommu.requests - asked, kinds - before
        assert (asked >= 8) == (is_on is True), f"{is_on}: {asked} requests"
        assert bool(pulses) == (is_on is True), "the cache is not asked without Enable"
        assert bool(news[TlpType.MRD, TRANSLATED]) == bool(news[TlpType.MWR, TRANSLATED]) == (is_on is True)
        assert bool(news[TlpType.MRD, UNTRANSLATED]) == (is_on is not True)
    card.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def hostile_messages_change_nothing(dut):
    """SYS-ATS-7: under load Invalidate Requests of wrong length, without body, to absent functions, routed otherwise, poisoned, malformed,
    and completions and responses that nobody waits for: none is answered, the disk works on, invalidations too."""
    card, disk = await up(dut)
    good = Tlp(TlpType.MSGD, length_dw=2, message_code=1, message_routing=2, address=card.host.bus << 56, data=bytes(8))
    bad = [replace(good, length_dw=n, data=bytes(4 * n)) for n in (1, 3, 32)]
    bad += [replace(good, type=TlpType.MSG, length_dw=0, data=b""), replace(good, message_routing=0), replace(good, poisoned=True),
            replace(good, tc=3), replace(good, address=card.host.bus << 56 | 5 << 48), replace(good, message_code=2),
            replace(good, message_code=5)]  # fmt: skip
    load = cocotb.start_soon(card.traffic(disk, 2))
    while not load.done():
        card.link.send(encode(card.rng.choice(bad)))
        await ClockCycles(dut.clk, card.rng.randrange(200))
        if card.rng.randrange(8) == 0:
            await card.invalidate(disk)
    await load
    assert card.host_iommu.invalidated == card.host.statistics.messages > 3
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def functions_are_apart(dut):
    """SYS-ATS-6: a disk and its virtual function use the same addresses, which lead elsewhere; each has an ATS Enable and invalidations of
    its own; an Invalidate Request for the virtual one, once it is gone, is answered by nobody."""
    card, disk = await up(dut)
    await card.enable_virtual(0, 1)
    other = await card.disk(1, queue_size=64, buffer_pages=90)
    await card.traffic(other, 1)
    assert card.kinds[TlpType.MRD, UNTRANSLATED] > 0
    await card.port.run(enable_ats(card.functions[1]))
    before = card.kinds[TlpType.MRD, UNTRANSLATED]
    loads = [cocotb.start_soon(card.traffic(one, 3)) for one in (disk, other)]
    while not all(load.done() for load in loads):
        one = card.rng.choice((disk, other))
        await card.invalidate(one, card.rng.choice(sorted(one.memory.frames)) * FRAME)
    for load in loads:
        await load
    assert card.kinds[TlpType.MRD, UNTRANSLATED] == before
    assert disk.memory.frames.items().isdisjoint(other.memory.frames.items())
    assert disk.memory.frames.keys() == other.memory.frames.keys()
    sriov = card.functions[0].ext_capabilities[SRIOV][0]
    await card.port.perform(ConfigWrite(0, sriov + 8, 2, 0))
    count = card.host_iommu.invalidated
    await card.port.run(card.iommu.submit([AtsInval(card.host.bus << 8 | n) for n in (1, 0)]))
    await ClockCycles(dut.clk, 1000)
    assert card.host_iommu.invalidated == count + 1
    card.finish()
