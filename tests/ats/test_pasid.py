"""A whole card whose functions do DMA for several processes at once; the host's IOMMU has tables for each. [PCIe5 6.20, 10]"""

from collections import Counter
from dataclasses import dataclass, field, replace

import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.host import (
    ConfigRead,
    ConfigWrite,
    MemoryRead,
    MemoryWrite,
    disable_pri,
    enable_ats,
    enable_pasid,
    enable_pri,
    enable_virtual,
    plan_virtual,
    pri_status,
)
from ringwall.models.iommu.commands import AtsInval
from ringwall.models.iommu.entries import SV39, DeviceContext, ProcessContext
from ringwall.models.iommu.registers import Capabilities, IommuDriver
from ringwall.models.iommu.tables import PageTable, ProcessDirectory
from ringwall.models.tlp import TRANSLATED, TRANSLATION_REQUEST, UNTRANSLATED, Pasid, Tlp, TlpType, encode
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.card import MappedMemory
from ringwall.sim.copier import ENGINES, PASIDS, SOURCE, SPAN, START, TARGET, CopyCard, CopyConfig
from ringwall.sim.host_ats import FRAME, REGISTERS, HostAtsCard
from ringwall.sim.run import run

CONFIG = CopyConfig()
BITS = CONFIG.host_ats.pasid_bits
BASE, HALF = 0x40_0000, 4 * FRAME  # IOVAs of every process: sources of one engine and of another, then their targets
TARGETS, PAGES = BASE + 2 * HALF, 4 * HALF // FRAME
EXPRESS, SRIOV = 0x10, 0x10
OK, FAULT = BurstStatus.OK.value, BurstStatus.FAULT.value
LIVE, ANY = (None, 1, 2, 63), "any"  # processes of each function; None: itself


def test_pasid(request):
    run(CopyCard(CONFIG), module=__name__, node=request.node.nodeid, sim="verilator")


@dataclass
class Process:
    """An address space of a function: its table, and its memory as the function addresses it."""

    function: int
    pid: int | None
    table: PageTable
    memory: MappedMemory = field(repr=False)


class ProcessCard(HostAtsCard):
    """The card below an IOMMU with process directories; ``requests`` are counted by (type, address type, PASID)."""

    capabilities = Capabilities(ATS=True, PD8=True)

    async def up(self, *, ats=True, pasid=True):
        """Bring IOMMU, virtual function and processes up."""
        self.requests = Counter()
        await self.begin()
        self.observers.clear()
        run = self.port.run
        self.iommu = IommuDriver(REGISTERS, self.session.memory, self.allocator)
        await run(self.iommu.init(1))
        self.plan = await run(plan_virtual(self.host, self.functions[0]))
        self.functions += await run(enable_virtual(self.host, self.functions[0], self.plan, 1))
        self.processes = {}
        for function in range(2):
            directory = ProcessDirectory(self.session.memory, self.allocator, levels=1)
            for pid in LIVE:
                table, memory = PageTable(self.session.memory, self.allocator), MappedMemory(self.session.memory)
                self.map(table, memory, BASE, PAGES)
                directory.set(pid or 0, ProcessContext.first_stage(SV39, table.root, PSCID=len(self.processes) + 1))
                self.processes[function, pid] = Process(function, pid, table, memory)
            self.iommu.directory.set(function, DeviceContext.process_directory(
                directory.pdtp, EN_ATS=True, EN_PRI=True, PRPR=True, DPE=True))  # fmt: skip
            await run(self.iommu.invalidate_context(function))
        await self.enable(ats=ats, pasid=pasid)
        return self

    async def enable(self, *, ats, pasid=True):
        """Write PASID Enable, which the physical function has for both, and ATS Enable of both."""
        run = self.port.run
        for info in self.functions:
            await run(enable_ats(info, is_on=False))
        assert await run(enable_pasid(self.functions[0], is_on=pasid)) == BITS
        for info in self.functions if ats else ():
            await run(enable_ats(info))

    def _observe(self, event, tlp):
        if tlp is not None:
            self.requests[tlp.type, tlp.at, tlp.pasid and tlp.pasid.value] += 1
        super()._observe(event, tlp)

    async def begin_copy(self, engine, source, target, size, pids):
        """Have an engine copy from the one process to the other."""
        base = self.functions[ENGINES[engine]].bars[0].address + SPAN * ENGINES[:engine].count(ENGINES[engine])
        low, high = (0 if pid is None else pid << 1 | 1 for pid in pids)
        for register, value in ((SOURCE, source), (TARGET, target), (PASIDS, high << 32 | low), (START, size)):
            await self.port.perform(MemoryWrite(base + register, 8, value))
        return base

    async def copy(self, engine, source, target, size, *pids):
        """Copy, and return how reading and writing ended."""
        base = await self.begin_copy(engine, source, target, size, pids)
        for _ in range(400):
            value = await self.port.perform(MemoryRead(base + START, 8))
            if value & 1:
                return value >> 8 & 7, value >> 12 & 7
            await ClockCycles(self.dut.clk, 30)
        raise AssertionError(f"engine {engine} did not end")

    async def good_copy(self, engine, read=ANY, write=ANY):
        """Copy something from one process to another, drawn unless named, and see that it arrived there and nowhere else."""
        rng, function = self.rng, ENGINES[engine]
        pids = [rng.choice(LIVE) if pid is ANY else pid for pid in (read, write)]
        spaces = {pid: self.processes[function, pid].memory for pid in LIVE}
        size = rng.randrange(1, 2 * FRAME)
        source, target = (area + rng.randrange(HALF - size) + engine % 2 * HALF for area in (BASE, TARGETS))
        data = rng.randbytes(size)
        spaces[pids[0]].write(source, data)
        before = {pid: space.read(target, size) for pid, space in spaces.items()}
        assert await self.copy(engine, source, target, size, *pids) == (OK, OK), pids
        for pid, space in spaces.items():
            assert space.read(target, size) == (data if pid == pids[1] else before[pid]), (pid, pids)

    async def load(self, rounds):
        """Let all engines copy at once."""
        async def one(engine):
            for _ in range(rounds):
                await self.good_copy(engine)

        for task in [cocotb.start_soon(one(engine)) for engine in range(len(ENGINES))]:
            await task

    async def forget(self, process, iova=None, **fields):
        """Send Invalidate Requests for a page of a process, or all of it, and wait for the end."""
        rid = self.host.bus << 8 | process.function
        order = AtsInval(rid, (1 << 63) - FRAME if iova is None else iova, is_range=iova is None, pid=process.pid, **fields)
        await self.port.run(self.iommu.submit([order]))
        await self.port.run(self.iommu.fence())

    def move(self, process, iova):
        """Give a page of a process another frame, with the same content; return the old one."""
        old, new = process.memory.frames[iova // FRAME], self._frame
        self._frame += 1
        self.session.memory.write(new * FRAME, self.session.memory.read(old * FRAME, FRAME))
        process.table.unmap(iova)
        process.table.map_page(iova, new * FRAME)
        process.memory.frames[iova // FRAME] = new
        return old


async def up(dut, **enables):
    return await ProcessCard(dut, CONFIG, seed=cocotb.RANDOM_SEED, latency=60).up(**enables)


def total(requests, *, types=(TlpType.MRD, TlpType.MWR), at, pasids):
    """Return how many requests of the card were of this address type and had one of these PASIDs."""
    return sum(count for (kind, its_at, pid), count in requests.items() if kind in types and its_at == at and pid in pasids)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def processes_are_apart(dut):
    """SYS-PASID-1: engines of a physical and a virtual function copy between processes that use the same addresses, all at once: what is
    written is there and nowhere else; translation requests have the PASID, what they gave is used without one."""
    card = await up(dut)
    await card.load(14)
    assert total(card.requests, at=UNTRANSLATED, pasids=(*LIVE, *range(64))) == 0
    assert total(card.requests, at=TRANSLATED, pasids=range(1 << 20)) == 0
    assert min(total(card.requests, types=[kind], at=TRANSLATED, pasids=[None]) for kind in (TlpType.MRD, TlpType.MWR)) > 100
    assert all(total(card.requests, at=TRANSLATION_REQUEST, pasids=[pid]) > 8 for pid in LIVE)
    assert total(card.requests, at=TRANSLATION_REQUEST, pasids=set(range(1 << 20)) - set(LIVE)) == 0


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def invalidations_are_of_processes(dut):
    """SYS-PASID-2: under load pages of one process move, and it alone is told, page by page, all at once, or by Global Invalidate; no
    request uses the old frame after the completion, nobody else loses anything."""
    card = await up(dut)
    load, rounds = cocotb.start_soon(card.load(12)), 0
    while not load.done():
        process = card.processes[card.rng.randrange(2), card.rng.choice(LIVE)]
        iova = BASE + card.rng.randrange(2 * HALF // FRAME) * FRAME
        old = card.move(process, iova)
        match rounds % 3:
            case 0:
                await card.forget(process, iova)
            case 1:
                await card.forget(process)
            case 2:
                await card.forget(process, iova, is_global=process.pid is not None)
        card.session.memory.write(old * FRAME, b"\xA5" * FRAME)
        rounds += 1
    await load
    cocotb.log.info("%d rounds, %d requests, %d uses", rounds, card.host_iommu.requests, card.host_iommu.uses)
    assert card.host_iommu.invalidated == rounds > 30


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def faults_are_of_processes(dut):
    """SYS-PASID-3: a page that one process lacks, or may not write, a process that there is none of, a PASID that is too wide, and any
    while PASID Enable is 0 end that copy in a fault, of which nothing was sent with a PASID that may not be; other processes work."""
    card = await up(dut)
    lacking, reader = card.processes[0, 1], card.processes[0, 2]
    lacking.table.unmap(BASE)
    reader.table.protect(TARGETS, "ru")
    for pids, ends in (((1, 2), (FAULT, OK)), ((None, 2), (OK, FAULT)), ((2, 1), (OK, OK)), ((5, None), (FAULT, OK)),
                       ((1 << BITS | 2, None), (FAULT, OK)), ((None, 1 << 19), (OK, FAULT))):  # fmt: skip
        assert await card.copy(0, BASE, TARGETS, 64, *pids) == ends, pids
    assert total(card.requests, at=TRANSLATION_REQUEST, pasids=range(1 << BITS, 1 << 20)) == 0
    assert total(card.requests, at=TRANSLATION_REQUEST, pasids=[5]) == 1
    for ats in (False, True):
        await card.enable(ats=ats, pasid=False)
        card.requests.clear()
        for pids, ends in (((2, None), (FAULT, OK)), ((None, 1), (OK, FAULT)), ((None, None), (OK, OK))):
            for engine in (0, 2):
                assert await card.copy(engine, BASE, TARGETS, 64, *pids) == ends, (ats, pids)
        assert not any(pid is not None for _, _, pid in card.requests)
    await card.enable(ats=True)
    await card.good_copy(1, read=1)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def untranslated_requests_have_them(dut):
    """SYS-PASID-4: with PASID Enable and without ATS Enable reads and writes carry the PASID untranslated, and the IOMMU leads them to the
    process; with both, a page that may be accessed untranslated only is asked for and accessed so, with its PASID."""
    card = await up(dut, ats=False)
    await card.load(5)
    assert total(card.requests, at=UNTRANSLATED, pasids=[1, 2, 63]) > 50 < total(card.requests, at=UNTRANSLATED, pasids=[None])
    assert total(card.requests, at=TRANSLATED, pasids=[None]) == total(card.requests, at=TRANSLATION_REQUEST, pasids=LIVE) == 0
    await card.enable(ats=True)
    unit, honest = card.host_iommu.unit, card.host_iommu.unit.complete
    unit.complete = lambda request: replace(honest(request), untranslated_only=True)
    card.requests.clear()
    await card.load(3)
    assert total(card.requests, at=TRANSLATION_REQUEST, pasids=[1, 2, 63]) > 5 < total(card.requests, at=UNTRANSLATED, pasids=[1, 2, 63])
    assert total(card.requests, at=TRANSLATED, pasids=[None]) == 0


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def pages_are_of_processes(dut):
    """SYS-PASID-5: a page that a process lacks is asked for with its PASID; Success with it brings the page, and so does one without; one
    of another process is unexpected and changes nothing; Invalid Request and Failure fault; requests for the function have none."""
    card = await up(dut)
    run, info = card.port.run, card.functions[0]
    await card.enable_pages(2)
    for engine, asked, response, code, ends in ((0, 1, 1, 0, (OK, OK)), (0, 63, None, 0, (OK, OK)), (2, 2, 2, 0, (OK, OK)),
                                                (0, None, None, 0, (OK, OK)), (0, 1, 2, 0, None), (0, None, 1, 0, None),
                                                (2, 63, 63, 1, (FAULT, OK)), (0, 2, 2, 15, (FAULT, OK))):  # fmt: skip
        process = card.processes[ENGINES[engine], asked]
        mapping = process.table.unmap(BASE)
        await card.forget(process, BASE)
        task, before = cocotb.start_soon(card.copy(engine, BASE, TARGETS, 64, asked, None)), card.host_iommu.paged
        assert await card.port.until(lambda before=before: card.host_iommu.paged > before, 3000)
        (record,) = await card.page_records()
        assert (record.device_id, record.pid, record.address, record.reads, record.writes) == (ENGINES[engine], asked, BASE, True, False)
        process.table.map_page(BASE, mapping.spa)
        if ends is None:  # what fits no request; only then what does
            card.link.send(encode(Tlp(TlpType.MSG, requester_id=card.host.ROUTING_ID, message_code=5, message_routing=2,
                                      pasid=Pasid(response), address=card.host.bus << 56 | record.group << 32)))  # fmt: skip
            await ClockCycles(dut.clk, 300)
            assert not task.done()
            assert await run(pri_status(info)) & 3 == 2
            await card.answer_page(ENGINES[engine], record.group, pid=asked)
        else:
            await card.answer_page(ENGINES[engine], record.group, code, response)
        assert await task == (ends or (OK, OK)), (asked, response)
        assert await run(pri_status(info)) & 1 == (code == 15)
    await run(disable_pri(info))
    await run(enable_pri(info, 2))
    await card.good_copy(0, 2)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def ends_under_load(dut):
    """SYS-PASID-6: function level reset, VF Enable off, PASID Enable off and on with ATS, and bus master off at any moment of copies
    between processes: nothing is sent that may not be; copies work afterwards."""
    card = await up(dut)
    perform, run, info = card.port.perform, card.port.run, card.functions[0]
    for n in range(16):
        bars = await card.bars()
        for engine in range(len(ENGINES)):
            await card.begin_copy(engine, BASE, TARGETS, HALF, card.rng.choices((1, 2, 63), k=2))
        await ClockCycles(dut.clk, card.rng.randrange(20, 900))
        match n % 4:
            case 0:
                await perform(ConfigWrite(0, info.capabilities[EXPRESS][0] + 8, 2, 1 << 15))
                await perform(ConfigRead(0, 0, 4))
                await ClockCycles(dut.clk, 4000)
                for at, value in zip(range(0x10, 0x20, 4), bars):
                    await perform(ConfigWrite(0, at, 4, value))
                await perform(ConfigWrite(0, 4, 2, 6))
                card.plan = await run(plan_virtual(card.host, info))
            case 1:
                await perform(ConfigWrite(0, info.ext_capabilities[SRIOV][0] + 8, 2, 0))
            case 2:
                await card.enable(ats=False, pasid=False)
            case 3:
                await perform(ConfigWrite(0, 4, 2, 2))
                await perform(ConfigRead(0, 0, 4))
                await perform(ConfigWrite(0, 4, 2, 6))
        await card.enable(ats=n < 8)
        if n % 4 < 2:
            await ClockCycles(dut.clk, 4000)
            card.functions[1:] = await run(enable_virtual(card.host, info, card.plan, 1))
            await card.enable(ats=n < 8)
        await ClockCycles(dut.clk, 10_000)  # what was under way ends
        await card.load(1)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def hostile_prefixes_change_nothing(dut):
    """SYS-PASID-7: prefixes that are unknown, local, two, or all there is, PASIDs on a completion or a configuration request are malformed;
    a memory request with a PASID, and an Invalidate Request while PASID Enable is 0, are unsupported; copies go on."""
    card = await up(dut)
    host, base = card.host, card.functions[0].bars[0].address
    invalidate = Tlp(TlpType.MSGD, length_dw=2, message_code=1, message_routing=2, address=host.bus << 56, data=bytes(8))
    prefix, order = 0x9100_0001, encode(invalidate)
    malformed = [[first, *order] for first in (0x9000_0001, 0x9200_0001, 0x9E00_0000, 0x9F00_0000, 0x8000_0000, 0x8E00_0001, 0xB100_0001)]
    malformed += [[prefix, prefix, *order], [prefix], [prefix, order[0]], [prefix, *order[:3]], [prefix, *order[:-1]], [prefix, *order, 0],
                  [prefix, *encode(Tlp(TlpType.CPLD, length_dw=1, byte_count=4, requester_id=host.bus << 8, data=bytes(4)))],
                  [prefix, *encode(Tlp(TlpType.CFGWR0, length_dw=1, first_be=15, completer_id=host.bus << 8, register=4, data=bytes(4)))]]
    found = []

    async def count():
        while True:
            await ClockCycles(dut.clk, 1)
            if dut.malformed.value:
                found.append(1)

    cocotb.start_soon(count())
    load, sent = cocotb.start_soon(card.load(4)), 0
    while not load.done() or sent < 3 * len(malformed):
        card.link.send(malformed[sent % len(malformed)])
        sent += 1
        await ClockCycles(dut.clk, 100)
    await load
    assert len(found) == sent
    # A request for registers does not get there.
    assert host.function(0).bus_master
    for register in (START, PASIDS):
        card.link.send(encode(Tlp(TlpType.MWR, length_dw=2, first_be=15, last_be=15, address=base + register, data=b"@\0\0\0" * 2,
                                  pasid=Pasid(1))))  # fmt: skip
    card.requests.clear()
    pending = host.start(MemoryRead(base + START, 8))
    card.link.send(encode(replace(pending.tlps[0], pasid=Pasid(2))))
    assert await card.port.until(lambda: pending.done, 1000)
    assert (pending.status, sum(card.requests.values())) == ("UR", 1)
    # Orders with a PASID while there is none to be.
    await card.enable(ats=False, pasid=False)
    card.link.send([prefix, *order])
    await ClockCycles(dut.clk, 500)
    assert host.statistics.messages == card.host_iommu.invalidated == 0
    assert len(found) == sent
    await card.enable(ats=True)
    await card.load(1)
