"""A whole card that has its host bring pages in when it needs them. [PCIe5 10.4]"""

from dataclasses import replace

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.host import disable_pri, enable_ats, enable_pri, pri_status
from ringwall.models.tlp import Tlp, TlpType, encode
from ringwall.rtl.verilog import RawCard
from ringwall.sim.host_ats import FRAME, SECTOR, HostAtsCard, host_ats_config
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

OK, IOERR = 0, 1
CONFIG = host_ats_config()
FAILED, SURPRISED, STOPPED = 1 << 0, 1 << 1, 1 << 8  # Status [PCIe5 10.5.2.3]
SUCCESS, INVALID, FAILURE = 0, 1, 15
PLACES, PATIENCE = CONFIG.host_ats.page_requests, CONFIG.host_ats.page_patience_cycles


def test_pages(request):
    run(RawCard(CONFIG), module=__name__, node=request.node.nodeid, sim="verilator")


class PagesCard(HostAtsCard):
    """A card whose contexts allow page requests; ``hidden``: (function, page) -> its table and its frame, until it is asked for."""

    context = HostAtsCard.context | {"EN_PRI": True}
    pages_come = answers = True

    async def serve(self):
        """Bring in what is asked for, while it ``answers``; ``seen`` are all requests."""
        self.hidden, self.seen = {}, []
        while True:
            await ClockCycles(self.dut.clk, self.rng.randrange(40, 200))
            if not self.answers:
                continue
            for function, page, group, reads, writes in await self.page_requests():
                self.seen.append((function, page, reads, writes))
                self.show(function, page)
                await self.answer_page(function, group)

    def hide(self, disk, page):
        mapping = disk.table.unmap(page)
        self.hidden[disk.function, page] = disk.table, mapping.spa

    def show(self, function, page):
        if (function, page) in self.hidden:
            table, spa = self.hidden.pop((function, page))
            table.map_page(page, spa)


async def up(dut, *, alignment=FRAME, **pages):
    """Return a card with page requests on, its disk, and software that answers."""
    card = await PagesCard(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=60).begin()
    await card.enable_iommu()
    disk = await card.disk(0, queue_size=64, buffer_pages=90, alignment=alignment)
    await card.enable_pages(**pages)
    cocotb.start_soon(card.serve())
    await ClockCycles(dut.clk, 1)
    return card, disk


async def absent(card, disk):
    """Return a write whose first page of data is not there, and the page."""
    bad = disk.blk.write(0, bytes(SECTOR * 8))
    page = bad.readable[1][0] // FRAME * FRAME
    card.hide(disk, page)
    await card.invalidate(disk, page)
    return bad, page


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def pages_come_on_demand(dut):
    """SYS-PRI-1: a disk works on pages that are not mapped before it asks for them, for reading and for writing, rings too,
    again and again; no more are asked for at a time than are allocated or there is place for."""
    card, disk = await up(dut, alignment=1)
    for _ in range(3):
        for page in sorted(disk.memory.frames):
            if (0, page * FRAME) not in card.hidden:
                card.hide(disk, page * FRAME)
        await card.invalidate(disk)
        await card.traffic(disk, 1)
    cocotb.log.info("%d page requests, %d translation requests", len(card.seen), card.host_iommu.requests)
    assert len(card.seen) == card.host_iommu.paged > 30
    assert {(reads, writes) for *_, reads, writes in card.seen} == {(True, False), (False, True)}
    assert not card.host_iommu.pages
    card.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def invalidations_do_not_wait_for_pages(dut):
    """SYS-PRI-2: while pages are asked for and not answered, behind them bursts of the same client whose translations are known, each
    Invalidate Request completes within 1000 cycles; then the pages come and all is well."""
    card, disk = await up(dut, alignment=1)
    await card.traffic(disk, 1)
    card.answers = False
    for page in sorted(disk.memory.frames)[16::3]:
        card.hide(disk, page * FRAME)
    await card.invalidate(disk)
    load = cocotb.start_soon(card.traffic(disk, 1))
    assert await card.port.until(lambda: len(card.host_iommu.pages) == PLACES, 5000)
    for page in card.rng.sample(sorted(disk.memory.frames), 12):
        before = cycle()
        await card.invalidate(disk, page * FRAME)
        assert cycle() - before < 1000
        assert len(card.host_iommu.pages) == PLACES
    assert not load.done()
    card.answers = True
    await load
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def requests_without_pages_end(dut):
    """SYS-PRI-3: a page that does not come ends its request in an error: Invalid Request, Success for a page that is still not there, no
    response for the patience, Enable or ATS Enable cleared, Response Failure and a reserved code, which stop all until enabled anew; Status
    says so, and the next request works."""
    card, disk = await up(dut)
    run, info = card.port.run, card.functions[0]
    for kind in ("invalid", "still absent", "silence", "disable", "no ATS", FAILURE, 7):
        bad, page = await absent(card, disk)
        card.answers, asked = False, card.host_iommu.paged
        done, start = cocotb.start_soon(disk.done([bad], may_fail=True)), cycle()
        assert await card.port.until(lambda asked=asked: card.host_iommu.paged > asked, 3000)
        (function, place, group, *_), = await card.page_requests()
        assert (function, place) == (0, page)
        status = 0
        match kind:
            case "silence":
                pass
            case "no ATS":
                await run(enable_ats(info, is_on=False))
                await run(enable_ats(info))
            case "disable":
                await run(disable_pri(info))
                assert await run(pri_status(info)) == 0, "stopped though a response is missing"
            case _:
                code = {"invalid": INVALID, "still absent": SUCCESS}.get(kind, kind)
                await card.answer_page(0, group, code)
                status = FAILED if isinstance(kind, int) else 0
        await done
        assert bad.status == IOERR, kind
        assert (cycle() - start > PATIENCE) == (kind == "silence"), kind
        assert await run(pri_status(info)) & ~STOPPED == status
        if kind in ("silence", "disable", "no ATS"):
            await card.answer_page(0, group, SUCCESS)
        card.show(0, page)
        if isinstance(kind, int):
            await card.answer_page(0, group, SUCCESS)  # ignored
            again, page = await absent(card, disk)
            await disk.done([again], may_fail=True)
            assert (again.status, card.host_iommu.paged) == (IOERR, asked + 1)
            assert await run(pri_status(info)) & SURPRISED == 0
            card.show(0, page)
        if status or kind == "disable":
            await run(disable_pri(info))
            assert await run(pri_status(info)) == STOPPED | status
            await run(enable_pri(info, PLACES))
            assert await run(pri_status(info)) == 0, "flags live through Enable"
        card.answers = True
        good, page = await absent(card, disk)
        await disk.done([good])
        assert good.status == OK, kind
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def hostile_responses_change_nothing(dut):
    """SYS-PRI-4: under demand paging with an allocation of 1 a flood of responses with an index that is not in use, for an absent or
    another function, with data, or otherwise routed: Unexpected Response is set, no page comes sooner or later by them, the disk works."""
    card, disk = await up(dut, alignment=1, most=1)
    rid = card.host.bus << 8
    good = Tlp(TlpType.MSG, requester_id=card.host.ROUTING_ID, message_code=5, message_routing=2, address=rid << 48)
    bad = [replace(good, address=rid << 48 | code << 44 | index << 32) for code in (0, 1, 7, 15) for index in (PLACES, 77, 511)]
    bad += [replace(good, address=(rid | 5) << 48), replace(good, message_routing=0), replace(good, address=(rid | 1) << 48),
            replace(good, type=TlpType.MSGD, length_dw=1, data=bytes(4))]  # fmt: skip
    for page in sorted(disk.memory.frames):
        card.hide(disk, page * FRAME)
    await card.invalidate(disk)
    load = cocotb.start_soon(card.traffic(disk, 1))
    while not load.done():
        card.link.send(encode(card.rng.choice(bad)))
        await ClockCycles(dut.clk, card.rng.randrange(60))
    await load
    assert len(card.seen) == card.host_iommu.paged > 8
    assert await card.port.run(pri_status(card.functions[0])) & 3 == SURPRISED
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def resets_end_waiting(dut):
    """SYS-PRI-5: a device reset ends a request that waits for its page long before its patience, whose place stays taken until its
    response; PRI Reset while disabled and a function level reset give places back, after which an old response is unexpected."""
    card, disk = await up(dut)
    run, info = card.port.run, card.functions[0]
    card.answers = False
    _, page = await absent(card, disk)
    await disk.offer()
    assert await card.port.until(lambda: card.host_iommu.paged == 1, 3000)
    before = cycle()
    await disk.restart()
    assert cycle() - before < PATIENCE // 2
    (_, _, group, *_), = await card.page_requests()
    await run(disable_pri(info))
    assert await run(pri_status(info)) == 0
    await run(disable_pri(info, resets=True))
    assert await run(pri_status(info)) == STOPPED
    await card.answer_page(0, group)
    await ClockCycles(dut.clk, 200)
    assert await run(pri_status(info)) == STOPPED | SURPRISED
    card.show(0, page)
    card.answers = True
    await run(enable_pri(info, PLACES))
    good, _ = await absent(card, disk)
    await disk.done([good])
    assert good.status == OK
    card.answers, asked = False, card.host_iommu.paged
    _, page = await absent(card, disk)
    await disk.offer()
    assert await card.port.until(lambda: card.host_iommu.paged > asked, 3000)
    before = cycle()
    await card.level_reset(disk)
    assert cycle() - before < PATIENCE * 3 // 4
    (_, _, group, *_), = await card.page_requests()
    assert await run(pri_status(info)) == STOPPED
    await card.answer_page(0, group)
    await ClockCycles(dut.clk, 200)
    assert await run(pri_status(info)) == STOPPED | SURPRISED
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def virtual_functions_share_the_interface(dut):
    """SYS-PRI-6: a disk and its virtual function, which has no Page Request Interface of its own, both have their pages brought in under
    one allocation; responses for the other one, with an index that is in use, change nothing."""
    card, disk = await up(dut, alignment=1)
    await card.enable_virtual(0, 1)
    other = await card.disk(1, queue_size=64, buffer_pages=90)
    assert 0x13 not in card.functions[1].ext_capabilities
    await card.port.run(enable_ats(card.functions[1]))
    for one in (disk, other):
        for page in sorted(one.memory.frames)[16:]:
            card.hide(one, page * FRAME)
        await card.invalidate(one)
    loads = [cocotb.start_soon(card.traffic(one, 1)) for one in (disk, other)]
    while not all(load.done() for load in loads):
        for rid, group in card.host_iommu.pages:
            card.link.send(encode(Tlp(TlpType.MSG, requester_id=card.host.ROUTING_ID, message_code=5, message_routing=2,
                                      address=(rid ^ 1) << 48 | INVALID << 44 | group << 32)))  # fmt: skip
        await ClockCycles(dut.clk, 50)
    for load in loads:
        await load
    assert {function for function, *_ in card.seen} == {0, 1}
    assert len(card.seen) == card.host_iommu.paged > 12
    card.finish()
