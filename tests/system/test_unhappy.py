"""The unhappy paths of the whole card: each ends as the specifications say, and the next good request works."""

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.host import ConfigWrite, Fault, MemoryWrite, WaitInterrupt
from ringwall.models.iommu.commands import IotinvalVma
from ringwall.models.iommu.faults import AccessType, Cause, FaultRecord, TransactionType
from ringwall.models.iommu.registers import IommuMode, QueueCsr
from ringwall.models.iommu.walk import Iommu as GoldenIommu
from ringwall.models.iommu.walk import PlainRegisters, Request
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.driver import DeviceStatus
from ringwall.models.virtio.split import Malformed
from ringwall.sim.card import FRAMES, IOVAS, Card, bench_card, bench_config
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

PAGE = 4096
OK, IOERR = 0, 1
CONFIG, QUEUE = 0, 1  # vectors of a disk
RUNNING = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
KINDS = ["UR", "CA", "POISON", "MISSING"]
READ, WRITE = TransactionType.UNTRANSLATED_READ, TransactionType.UNTRANSLATED_WRITE
LIMITS = {"timeout_time": 2, "timeout_unit": "ms"}
PARTS = 4  # simulations that the tests are dealt out to


@pytest.mark.parametrize("part", range(PARTS))
def test_unhappy(request, part):
    tests = [name for name, value in globals().items() if type(value).__name__ == "TestGenerator"]
    run(bench_card(), module=__name__, node=request.node.nodeid, sim="verilator", testcase=tests[part::PARTS])


async def begin(dut, *, levels=1, disks=1, page_faults=True):
    """Return card and disks, translated; ``page_faults``: every fault record must be one that the tables explain."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED, latency=60).begin()
    await card.enable_iommu(levels=levels)
    if page_faults:
        card.session.add("FaultQueueChecker", base=card.iommu.fq_base, entries=card.iommu.fq_entries)
    found = [await card.disk(n, buffer_pages=96, spread=True) for n in range(disks)]
    return card, found


class Seen:
    """Memory requests of the card from now on: ``(cycle, tlp)``, of one function."""

    def __init__(self, card, function):
        self.tlps = []
        card.observers.append(lambda event, tlp: self.tlps.append((cycle(), tlp)) if tlp is not None and (
            tlp.type in (TlpType.MRD, TlpType.MWR) and tlp.requester_id & 0xFF == function) else None)

    def at(self, start, length):
        """Return those that touch some of ``length`` bytes from ``start``."""
        spans = [(tlp, *tlp.byte_span()) for _, tlp in self.tlps]
        return [tlp for tlp, at, size in spans if at < start + length and start < at + size]


async def works(disk, *, sizes=(512, 4096, 9 * 512), cycles=60_000):
    """Good requests, one by one, come back whole, each in so many cycles: the golden device judges them, and so do we."""
    rng, base = disk.card.rng, 200 + disk.card.rng.randrange(200)
    contents = [rng.randbytes(size) for size in sizes]
    for n, content in enumerate(contents):
        request = disk.blk.write(base + 64 * n, content, framing=rng.choice(["parts", "pages"]))
        await disk.done([request], cycles=cycles)
        assert request.status == OK
    reads = [disk.blk.read(base + 64 * n, len(content)) for n, content in enumerate(contents)]
    await disk.done(reads, cycles=cycles)
    assert all(request.status == OK for request in reads)
    assert [request.data for request in reads] == contents


async def works_and_rests(disk):
    """A good request, and nothing is under way any more: the last interrupt was sent."""
    await works(disk, sizes=(4096,))
    await ClockCycles(disk.card.dut.clk, 600)


class Traffic:
    """Good requests of a disk, one behind the other, until :meth:`end`; none may take longer than ``cycles``. After each pair a pause.

    Between :meth:`rest` and :meth:`go` there are none: for a fault that would hit this disk as well.
    """

    def __init__(self, disk, *, cycles=3000):
        self.disk, self.count, self.cycles, self._is_ending = disk, 0, cycles, False
        self._is_to_rest = self._rests = False
        self._task = cocotb.start_soon(self._run())

    async def rest(self):
        """Let the request under way finish, then none follows."""
        self._is_to_rest = True
        while not self._rests:
            await ClockCycles(self.disk.card.dut.clk, 50)

    def go(self):
        """Let them go on."""
        self._is_to_rest = False

    async def _run(self):
        while not self._is_ending or self.count < 2:
            while self._is_to_rest:
                self._rests = True
                await ClockCycles(self.disk.card.dut.clk, 50)
            self._rests = False
            await works(self.disk, sizes=(1024,), cycles=self.cycles)
            self.count += 1
            await ClockCycles(self.disk.card.dut.clk, 600)

    async def end(self):
        """Let the last one finish."""
        self._is_ending = True
        await self._task


def torn(old, new, seen, most):
    """Tell whether ``seen`` is the start of ``new``, at most ``most`` bytes, and ``old`` behind."""
    at = next((n for n in range(most) if seen[n] != new[n]), most)
    return seen[at:] == old[at:]


async def faults_of(card, disk, *, cause, ttyp, low, high, first=None):
    """Take the fault records: at least one, all of this cause for a request of the disk at an address from low below high."""
    assert await card.port.perform(WaitInterrupt(0, 1, 20_000)), "no interrupt of the fault queue"
    records = await card.port.run(card.iommu.read_faults())
    assert records, "no fault record"
    for record in records:
        wanted = FaultRecord(cause=cause, ttyp=ttyp, device_id=disk.function, iotval=record.iotval)
        assert not wanted.differences(record), f"{record}: {wanted.differences(record)}"
        assert low <= record.iotval < high, f"{record}: iotval must lie within {low:#x} to {high:#x}"
    if first is not None:
        assert records[0].iotval in (first, first & -PAGE), f"{records[0]}: iotval must be {first:#x}"
    return records


async def no_faults(card):
    """Nothing was recorded."""
    assert await card.port.run(card.iommu.read_faults()) == []


async def status_of(disk):
    return await disk.card.port.run(disk.driver.status())


async def needs_reset(card, disk, *, is_told=True):
    """The device asks for a reset, tells so, and from then on leaves its ring alone."""
    if is_told:
        assert await card.port.perform(WaitInterrupt(disk.function, CONFIG, 30_000)), "no configuration interrupt"
    else:
        begun = cycle()
        while not await status_of(disk) & DeviceStatus.NEEDS_RESET:
            assert cycle() - begun < 30_000, "NEEDS_RESET never comes"
    assert await status_of(disk) == RUNNING | DeviceStatus.NEEDS_RESET
    seen = Seen(card, disk.function)
    await card.port.run(disk.driver.notify())
    await ClockCycles(card.dut.clk, 1000)
    assert not seen.tlps, f"{seen.tlps[0]} although a reset is due"


def strike(card, kind, function, iova_or_spa, length, memory=None, *, times=1):
    """Let the host's answer to the next read of this function of some of these bytes go wrong; ``memory``: the address is an IOVA."""
    spans = list(memory.places(iova_or_spa, length)) if memory else [(iova_or_spa, length)]

    def match(tlp):
        start, size = tlp.byte_span()
        return tlp.requester_id & 0xFF == function and any(low < start + size and start < low + span for low, span in spans)

    fault = Fault(kind, match, times=times)
    card.host.policy.faults.append(fault)
    return fault


def forget_all(disk):
    """Return software that makes the IOMMU forget context and translations of a disk."""
    return disk.card.iommu.invalidate_context(disk.function)


# Translation: buffers and rings that are not there, or read-only.


async def buffer_is_missing(card, disk, *, which, other=None, perms=None):
    """One page of a request's buffers is not mapped (or only as ``perms``): IOERR, a record, nothing beyond; mapped again it works."""
    rng, sector = card.rng, 600
    old, new = rng.randbytes(4 * PAGE), rng.randbytes(4 * PAGE)
    request = disk.blk.write(sector, old)
    await disk.done([request])
    assert request.status == OK
    if which == "read":
        request = disk.blk.read(sector, len(old))
        begin = request.writable[0][0]
    else:
        request = disk.blk.write(sector, new)
        begin = request.readable[which == "write"][0]
    page = begin + (2 * PAGE if which != "header" else 0) & -PAGE
    frame = disk.memory.frames[page // PAGE] * PAGE
    if perms is None:
        disk.table.unmap(page)
    else:
        disk.table.protect(page, perms)
    await card.port.run(card.iommu.invalidate(iova=page))
    before = card.session.memory.read(frame, PAGE)
    traffic = other and Traffic(other)
    seen = Seen(card, disk.function)
    await disk.done([request], may_fail=True)
    assert request.status == IOERR
    assert not seen.at(frame, PAGE), "a request went to the page"
    assert card.session.memory.read(frame, PAGE) == before
    is_write = which == "read"
    cause = Cause.WRITE_PAGE_FAULT if is_write else Cause.READ_PAGE_FAULT
    await faults_of(card, disk, cause=cause, ttyp=WRITE if is_write else READ, low=page, high=page + PAGE, first=max(begin, page))
    assert await status_of(disk) == RUNNING  # an error of one request is none of the device
    if traffic:
        await traffic.end()
    if perms is None:
        disk.table.map_page(page, frame, perms="rwu")
    else:
        disk.table.protect(page, "rwu")
        await card.port.run(card.iommu.invalidate(iova=page))
    again = disk.blk.read(sector, len(old))
    await disk.done([again])
    assert again.status == OK
    if which == "write":
        assert torn(old, new, again.data, page - begin)
    else:
        assert again.data == old
    await works(disk)


@cocotb.test(**LIMITS)
@cocotb.parametrize(which=["read", "write", "header"])
async def buffer_is_not_mapped(dut, which):
    """SYS-BAD-1 (R05, R22, R24): a page of the data or header is not mapped: IOERR, record 13 or 15; the other disk runs on."""
    card, disks = await begin(dut, disks=2)
    await buffer_is_missing(card, disks[0], which=which, other=disks[1])
    card.finish()


@cocotb.test(**LIMITS)
async def buffer_is_read_only(dut):
    """SYS-BAD-2 (R05, R24): a page that the device should write is mapped read-only: IOERR, record 15, the page is untouched."""
    card, disks = await begin(dut, disks=2)
    await buffer_is_missing(card, disks[0], which="read", other=disks[1], perms="ru")
    card.finish()


@cocotb.test(**LIMITS)
@cocotb.parametrize(part=["desc", "avail", "used", "read-only used"])
async def ring_is_not_mapped(dut, part):
    """SYS-BAD-3 (R05, R24): a part of the ring is not mapped, or the used ring read-only: NEEDS_RESET, a record; reset, and all is well."""
    card, disks = await begin(dut, disks=2)
    disk, traffic = disks[0], Traffic(disks[1])
    layout = disk.layout
    await works_and_rests(disk)
    is_write, page = part.endswith("used"), getattr(layout, part.split()[-1])
    frame = disk.memory.frames[page // PAGE] * PAGE
    if part == "read-only used":
        disk.table.protect(page, "ru")
    else:
        disk.table.unmap(page)
    await card.port.run(card.iommu.invalidate(iova=page))
    disk.golden.forget_request(lost := disk.blk.write(40, card.rng.randbytes(512)))
    seen = Seen(card, disk.function)
    await disk.offer()
    await needs_reset(card, disk)
    assert not seen.at(frame, PAGE)
    await faults_of(card, disk, cause=Cause.WRITE_PAGE_FAULT if is_write else Cause.READ_PAGE_FAULT, ttyp=WRITE if is_write else READ,
                    low=page, high=page + PAGE)  # fmt: skip
    assert not lost.is_done
    if part == "read-only used":
        disk.table.protect(page, "rwu")
        await card.port.run(card.iommu.invalidate(iova=page))
    else:
        disk.table.map_page(page, frame, perms="rwu")
    await disk.restart()
    await works(disk)
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
@cocotb.parametrize(what=[
    ("TC_V_CLEAR", Cause.DDT_ENTRY_NOT_VALID), ("TC_RESERVED_12", Cause.DDT_ENTRY_MISCONFIGURED),
    ("IOSATP_MODE_9", Cause.DDT_ENTRY_MISCONFIGURED), ("TC_EN_ATS_SET", Cause.DDT_ENTRY_MISCONFIGURED),
    ("DDTE_V_CLEAR", Cause.DDT_ENTRY_NOT_VALID), ("DDTE_RESERVED_1", Cause.DDT_ENTRY_MISCONFIGURED), ("off", None)])
async def context_is_invalid(dut, what):
    """SYS-BAD-4 (R05, R24): device context or the directory above it invalid, misconfigured, or Off: not one TLP; 258, 259, 256."""
    name, cause = what
    card, (disk,) = await begin(dut, levels=2)
    await works_and_rests(disk)
    if name == "off":
        await card.port.run(card.iommu.set_ddtp(IommuMode.OFF))
        cause = Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED
    else:
        repair = card.iommu.directory.corrupt(disk.function, name)
        await card.port.run(forget_all(disk))
    disk.golden.forget_request(disk.blk.write(40, card.rng.randbytes(512)))
    seen = Seen(card, disk.function)
    await disk.offer()
    await needs_reset(card, disk, is_told=False)  # its interrupts do not get through either
    assert not seen.tlps, f"{seen.tlps[0]} without a context"
    records = await card.port.run(card.iommu.read_faults())
    at = disk.layout.avail_idx
    wanted = FaultRecord(cause=cause, ttyp=READ, device_id=disk.function, iotval=at)
    assert not wanted.differences(records[0]), f"{records[0]}: {wanted.differences(records[0])}"
    message = card.functions[disk.function].msix.message_address
    for record in records[1:]:  # the interrupt
        wanted = FaultRecord(cause=cause, ttyp=WRITE, device_id=disk.function, iotval=message)
        assert not wanted.differences(record), f"{record}: {wanted.differences(record)}"
    if name == "off":
        await card.port.run(card.iommu.set_ddtp(IommuMode.LVL2, card.iommu.directory.root))
    else:
        repair()
        await card.port.run(forget_all(disk))
    await disk.restart()
    await works(disk)
    await no_faults(card)
    card.finish()


# Completions that go wrong.


@cocotb.test(**LIMITS)
@cocotb.parametrize(part=["index", "heads", "descriptors", "flags"], kind=KINDS)
async def ring_read_fails(dut, part, kind):
    """SYS-BAD-5 (R05, R18): UR, CA, poison or no completion on a read of the ring: NEEDS_RESET; reset it works; the other disk runs on."""
    card, (disk, other) = await begin(dut, disks=2)
    layout, traffic = disk.layout, Traffic(other)
    await works_and_rests(disk)
    at, length = {"index": (layout.avail_idx, 2), "heads": (layout.avail + 4, 128), "descriptors": (layout.desc, layout.desc_bytes),
                  "flags": (layout.avail, 2)}[part]  # fmt: skip
    fault = strike(card, kind, disk.function, at, length, disk.memory)
    lost = disk.blk.write(40, card.rng.randbytes(512))
    disk.golden.forget_request(lost)
    await disk.offer()
    await needs_reset(card, disk)
    assert fault.times == 0
    index = int.from_bytes(disk.memory.read(layout.used_idx, 2), "little")
    assert index == (disk.blk.ring.avail_index if part == "flags" else disk.blk.ring.used_index)
    await no_faults(card)
    await disk.restart()
    await works(disk, sizes=(512, 4096))
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
@cocotb.parametrize(part=["header", "data"], kind=KINDS)
async def data_read_fails(dut, part, kind):
    """SYS-BAD-6 (R05, R18): UR, CA, poison or no completion on header or data of an OUT: IOERR, none written behind; the next works."""
    card, (disk, other) = await begin(dut, disks=2)
    old, new = card.rng.randbytes(2 * PAGE), card.rng.randbytes(2 * PAGE)
    first = disk.blk.write(600, old)
    await disk.done([first])
    traffic = Traffic(other)
    request = disk.blk.write(600, new)
    offset = 3000 if part == "data" else 0
    fault = strike(card, kind, disk.function, request.readable[part == "data"][0] + offset, 8, disk.memory)
    await disk.done([request], may_fail=True)
    assert fault.times == 0 and request.status == IOERR
    assert await status_of(disk) == RUNNING
    again = disk.blk.read(600, len(old))
    await disk.done([again])
    assert again.status == OK and torn(old, new, again.data, offset)
    await no_faults(card)
    await works(disk)
    await traffic.end()
    card.finish()


PLACES = ["directory", "context", "root", "middle", "leaf"]  # what a walk reads, in order, with two levels of directory


def entries_of(card, disk, iova):
    """Return the (address, length) that a walk for an IOVA of the disk reads, as the golden IOMMU does it."""
    golden = GoldenIommu(card.session.memory, registers=PlainRegisters(ddtp=card.iommu.directory.ddtp))
    golden.translate(Request(disk.function, iova, AccessType.READ), trace=True)
    found = [(step.address, 8 * len(step.entry)) for step in golden.steps if step.address is not None]
    assert len(found) == len(PLACES)
    return dict(zip(PLACES, found, strict=True))


@cocotb.test(**LIMITS)
@cocotb.parametrize(place=PLACES)
async def walk_for_the_ring_fails(dut, place):
    """SYS-BAD-7 (R05, R18, R24): each entry that a walk for the ring reads meets UR, CA, poison, silence: NEEDS_RESET; 257, 268, 5, 274."""
    card, (disk, other) = await begin(dut, levels=2, disks=2, page_faults=False)
    traffic, at = Traffic(other), disk.layout.avail_idx
    for kind in KINDS:
        await works_and_rests(disk)
        if place == "directory":  # which is that of both disks
            await traffic.rest()
        await card.port.run(forget_all(disk))
        fault = strike(card, kind, 0, *entries_of(card, disk, at)[place])
        lost = disk.blk.write(40, card.rng.randbytes(512))
        disk.golden.forget_request(lost)
        await disk.offer()
        await needs_reset(card, disk)
        traffic.go()
        assert fault.times == 0 and not lost.is_done
        if place in ("directory", "context"):
            cause = Cause.DDT_DATA_CORRUPTION if kind == "POISON" else Cause.DDT_ENTRY_LOAD_ACCESS_FAULT
        else:
            cause = Cause.PT_DATA_CORRUPTION if kind == "POISON" else Cause.READ_ACCESS_FAULT
        await faults_of(card, disk, cause=cause, ttyp=READ, low=at, high=at + 2)
        await disk.restart()
    await works(disk)
    await no_faults(card)
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
@cocotb.parametrize(way=["read", "write"])
async def walk_for_data_fails(dut, way):
    """SYS-BAD-8 (R05, R18, R24): the leaf for a data page meets UR, CA, poison, silence: IOERR; causes 5, 7, 274; again, and it works."""
    card, (disk, other) = await begin(dut, levels=2, disks=2, page_faults=False)
    traffic = Traffic(other)
    for kind in KINDS:
        old, new = card.rng.randbytes(2 * PAGE), card.rng.randbytes(2 * PAGE)
        request = disk.blk.write(600, old)
        await disk.done([request])
        request = disk.blk.read(600, len(old)) if way == "read" else disk.blk.write(600, new)
        begun = request.writable[0][0] if way == "read" else request.readable[1][0]
        page = begun + PAGE & -PAGE
        await card.port.run(card.iommu.invalidate(iova=page))
        fault = strike(card, kind, 0, *entries_of(card, disk, page)["leaf"], times=9)  # prefetches meet it, too, and say nothing
        await disk.done([request], may_fail=True)
        card.host.policy.faults.remove(fault)
        assert fault.times < 9 and request.status == IOERR
        cause = Cause.PT_DATA_CORRUPTION if kind == "POISON" else Cause.WRITE_ACCESS_FAULT if way == "read" else Cause.READ_ACCESS_FAULT
        await faults_of(card, disk, cause=cause, ttyp=WRITE if way == "read" else READ, low=page, high=page + PAGE)
        again = disk.blk.read(600, len(old))
        await disk.done([again])
        assert again.status == OK and (again.data == old if way == "read" else torn(old, new, again.data, page - begun))
    await works(disk)
    await no_faults(card)
    await traffic.end()
    card.finish()


# Software takes back what the device is using.


class Revoked:
    """Physical pages that no function may touch any more; whoever does ends the test."""

    def __init__(self, card):
        self.frames = set()
        card.observers.append(self._look)

    def _look(self, event, tlp):
        if tlp is not None and tlp.type in (TlpType.MRD, TlpType.MWR) and tlp.requester_id & 0xFF:
            start, length = tlp.byte_span()
            touched = self.frames & set(range(start // PAGE, (start + length - 1) // PAGE + 1))
            assert not touched, f"{tlp} touches revoked page {min(touched) * PAGE:#x}"


@cocotb.test(timeout_time=4, timeout_unit="ms")
@cocotb.parametrize(way=["read", "write"])
async def page_is_revoked_under_traffic(dut, way):
    """SYS-BAD-9 (R05, R24): IOTINVAL and IOFENCE race live requests: from the end of the fence no byte moves through the page.

    The way into memory is slow, so that writes which are translated already wait in the card; reads of the page are answered late.
    """
    card, (disk, other) = await begin(dut, disks=2)
    rng, iommu, revoked, traffic = card.rng, card.iommu, Revoked(card), Traffic(other, cycles=12_000)
    fresh, ends = FRAMES // PAGE + 0x10_0000, {OK: 0, IOERR: 0}
    for step in range(12):
        old, new = rng.randbytes(4 * PAGE), rng.randbytes(4 * PAGE)
        request = disk.blk.write(600, old)
        await disk.done([request])
        if way == "read":
            request = disk.blk.read(600, len(old))
            begun = request.writable[0][0]
        else:
            request = disk.blk.write(600, new)
            begun = request.readable[1][0]
        page = begun + PAGE * rng.randrange(1, 4) & -PAGE
        frame = disk.memory.frames[page // PAGE]
        if way == "read":
            card.link.ready = lambda: rng.random() < 0.15
        late = strike(card, "LATE", disk.function, frame * PAGE, PAGE, times=100)
        late.cycles = 2500
        task = cocotb.start_soon(disk.done([request], may_fail=True))
        await ClockCycles(dut.clk, rng.randrange(4000 if way == "read" else 600))
        disk.table.unmap(page)
        pscid = card.iommu.directory.get(disk.function).PSCID
        command = [IotinvalVma(address=page, pscid=pscid), IotinvalVma(address=page), IotinvalVma(pscid=pscid), IotinvalVma()][step % 4]
        await card.port.run(iommu.submit([command]))
        await card.port.run(iommu.fence())
        # The page is software's again: what the device gave is moved, then it holds a secret.
        revoked.frames.add(frame)
        under_way = [tlp for tlp in card.host.outstanding.values() if tlp.byte_span()[0] // PAGE == frame]
        assert not under_way, f"the fence did not wait for {under_way[0]}"
        disk.memory.frames[page // PAGE] = fresh
        card.session.memory.write(fresh * PAGE, card.session.memory.read(frame * PAGE, PAGE))
        secret = rng.randbytes(PAGE)
        card.session.memory.write(frame * PAGE, secret)
        await task
        card.link.ready = None
        card.host.policy.faults.remove(late)
        assert card.session.memory.read(frame * PAGE, PAGE) == secret
        ends[request.status] += 1
        if request.status == OK:
            await no_faults(card)
        else:
            await faults_of(card, disk, low=page, high=page + PAGE, **(
                {"cause": Cause.WRITE_PAGE_FAULT, "ttyp": WRITE} if way == "read" else {"cause": Cause.READ_PAGE_FAULT, "ttyp": READ}))
        assert await status_of(disk) == RUNNING
        if way == "read" and request.status == OK:
            assert request.data == old
        disk.table.map_page(page, fresh * PAGE, perms="rwu")
        fresh += 1
        again = disk.blk.read(600, len(old))
        await disk.done([again])
        assert again.status == OK
        if way == "read":
            assert again.data == old
        else:
            assert again.data == new if request.status == OK else torn(old, new, again.data, page - begun)
    dut._log.info("%s: %d finished before, %d were cut off", way, ends[OK], ends[IOERR])
    assert ends[OK] >= 2 and ends[IOERR] >= 2, f"the race has one winner: {ends}"
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
async def context_is_revoked_under_traffic(dut):
    """SYS-BAD-10 (R05, R24): V=0, IODIR, IOTINVAL, IOFENCE race live requests: then the function moves nothing; the other does."""
    card, (disk, other) = await begin(dut, disks=2)
    traffic, content = Traffic(other), card.rng.randbytes(12 * PAGE)
    await disk.done([disk.blk.write(0, content)])
    for _ in range(4):
        await works(disk, sizes=(512,))
        context = card.iommu.directory.get(disk.function)
        for n in range(3):
            disk.blk.read(32 * n, 4 * PAGE)
        await disk.offer()
        await ClockCycles(dut.clk, card.rng.randrange(1500))
        disk.golden.doubtful |= {(request.kind, request.sector) for request in disk.blk.requests.values()}
        card.iommu.directory.clear(disk.function)
        await card.port.run(forget_all(disk))
        seen = Seen(card, disk.function)
        await needs_reset(card, disk, is_told=False)
        assert not seen.tlps, f"{seen.tlps[0]} without a context"
        records = await card.port.run(card.iommu.read_faults())
        assert records and {(record.cause, record.device_id) for record in records} == {(Cause.DDT_ENTRY_NOT_VALID, disk.function)}
        card.iommu.directory.set(disk.function, context)
        await card.port.run(forget_all(disk))
        await disk.restart()
        disk.golden.doubtful.clear()
    request = disk.blk.read(0, len(content))
    await disk.done([request])
    assert request.status == OK and request.data == content
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
@cocotb.parametrize(what=["page", "context"])
async def walk_is_crossed_by_an_invalidation(dut, what):
    """SYS-BAD-17 (R05, R24): what a walk read before IOTINVAL or IODIR and gets behind it serves nobody after the fence."""
    card, (disk, other) = await begin(dut, disks=2)
    traffic, revoked, page = Traffic(other), Revoked(card), disk.layout.avail
    frame, context = disk.memory.frames[page // PAGE], card.iommu.directory.get(disk.function)
    golden = GoldenIommu(card.session.memory, registers=PlainRegisters(ddtp=card.iommu.directory.ddtp))
    for _ in range(2):
        await works_and_rests(disk)
        await card.port.run(forget_all(disk))
        golden.translate(Request(disk.function, page, AccessType.READ), trace=True)
        read = [step for step in golden.steps if step.address is not None][-1 if what == "page" else 0]
        late = strike(card, "LATE", 0, read.address, 8 * len(read.entry))
        late.cycles = 2500
        disk.golden.forget_request(disk.blk.write(40, card.rng.randbytes(512)))
        await disk.offer()
        begun = cycle()
        while late.times:
            assert cycle() - begun < 5000, "the walk does not come"
            await ClockCycles(dut.clk, 1)
        await ClockCycles(dut.clk, card.rng.randrange(500))
        if what == "page":  # the old entry is on its way to the card
            disk.table.unmap(page)
            await card.port.run(card.iommu.invalidate(iova=page))
        else:
            card.iommu.directory.clear(disk.function)
            await card.port.run(forget_all(disk))
        assert cycle() - begun > 2500, "the fence did not wait for the request that waits for the walk"
        revoked.frames.add(frame)
        await card.port.run(disk.driver.notify())
        await needs_reset(card, disk, is_told=what == "page")
        if what == "page":
            await faults_of(card, disk, cause=Cause.READ_PAGE_FAULT, ttyp=READ, low=page, high=page + PAGE)
            disk.table.map_page(page, frame * PAGE, perms="rwu")
        else:
            records = await card.port.run(card.iommu.read_faults())
            assert records and {(record.cause, record.device_id) for record in records} == {(Cause.DDT_ENTRY_NOT_VALID, disk.function)}
            card.iommu.directory.set(disk.function, context)
            await card.port.run(forget_all(disk))
        revoked.frames.clear()
        await disk.restart()
    await works(disk)
    await traffic.end()
    card.finish()


# What a driver must not do.

MALFORMED = [Malformed.LOOP, Malformed.SELF_LOOP, Malformed.HEAD_OUT_OF_RANGE, Malformed.NEXT_OUT_OF_RANGE, Malformed.AVAIL_JUMP,
             Malformed.READABLE_AFTER_WRITABLE, Malformed.INDIRECT_WITHOUT_FEATURE, Malformed.TOO_MANY_BYTES]  # fmt: skip


@cocotb.test(**LIMITS)
async def ring_is_malformed(dut):
    """SYS-BAD-11 (R05, V031, V032, V047, V048): loops, head or next out of range, index jump ...: bounded reads, no write, NEEDS_RESET."""
    card, (disk, other) = await begin(dut, disks=2)
    traffic, layout = Traffic(other), disk.layout
    ring = [place for part in ("desc", "avail") for place in disk.memory.places(getattr(layout, part), getattr(layout, f"{part}_bytes"))]
    for kind in card.rng.sample(MALFORMED, len(MALFORMED)):
        await works_and_rests(disk)
        area = IOVAS + 0x10_0000
        disk.blk.ring.add_malformed(kind, [(area, 16), (area + PAGE, 512)], [(area + 2 * PAGE, 1)])
        used = disk.memory.read(layout.used, layout.used_bytes)
        seen = Seen(card, disk.function)
        await disk.offer()
        await needs_reset(card, disk)
        reads = [tlp for _, tlp in seen.tlps if tlp.type is TlpType.MRD]
        writes = [tlp for _, tlp in seen.tlps if tlp.type is TlpType.MWR]
        for start, length in (tlp.byte_span() for tlp in reads):
            assert any(low <= start and start + length <= low + size for low, size in ring), f"{kind}: read of {length} at {start:#x}"
        assert len(reads) <= layout.size + 4, f"{kind}: {len(reads)} reads"
        assert len(writes) == 1 and writes[0].address == card.functions[disk.function].msix.message_address, f"{kind}: {writes}"
        assert disk.memory.read(layout.used, layout.used_bytes) == used
        await disk.restart()
    await works(disk)
    await no_faults(card)
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
async def doorbell_before_driver_ok(dut):
    """SYS-BAD-12 (R05, V001): doorbells after the reset and before DRIVER_OK move nothing; after it the request is served, once."""
    card, (disk,) = await begin(dut)
    await works_and_rests(disk)
    content, requests, seen = card.rng.randbytes(PAGE), [], Seen(card, disk.function)
    doorbell = disk.driver.notify_at[0]

    async def too_early():
        requests.append(disk.blk.write(600, content))
        await disk.offer()
        for _ in range(3):
            await card.port.run(disk.driver.notify())
            await ClockCycles(dut.clk, 500)
        assert not seen.tlps, f"{seen.tlps[0]} before DRIVER_OK"
        assert await status_of(disk) == RUNNING & ~DeviceStatus.DRIVER_OK

    await card.port.run(disk.driver.reset())
    await card.port.perform(MemoryWrite(doorbell, 2, 0))
    await ClockCycles(dut.clk, 500)
    assert not seen.tlps, f"{seen.tlps[0]} after the reset"
    await disk.restart(before_ok=too_early)
    await card.port.run(disk.driver.notify())
    await disk.done(requests)
    assert requests[0].status == OK
    again = disk.blk.read(600, PAGE)
    await disk.done([again])
    assert again.status == OK and again.data == content
    assert int.from_bytes(disk.memory.read(disk.layout.used_idx, 2), "little") == 2
    await works(disk)
    card.finish()


# Bus master.


def bus_master(function, is_on):
    """Return the operation that turns Bus Master Enable on or off, Memory Space on. [PCIe5 7.5.1.1.3]"""
    return ConfigWrite(function, 4, 2, 0x0006 if is_on else 0x0002)


@cocotb.test(**LIMITS)
async def bus_master_is_off(dut):
    """SYS-BAD-13 (R05): without Bus Master a disk sends nothing, and asks for a reset; on again it tells so, and works after the reset."""
    card, (disk, other) = await begin(dut, disks=2)
    traffic = Traffic(other)
    await works_and_rests(disk)
    await card.port.perform(bus_master(disk.function, False))
    seen = Seen(card, disk.function)
    disk.golden.forget_request(disk.blk.write(40, card.rng.randbytes(512)))
    await disk.offer()
    await needs_reset(card, disk, is_told=False)
    assert not seen.tlps, f"{seen.tlps[0]} without Bus Master"
    await card.port.perform(bus_master(disk.function, True))
    assert await card.port.perform(WaitInterrupt(disk.function, CONFIG, 5000)), "the interrupt is lost"
    await disk.restart()
    await works(disk)
    # Now while requests are under way: whatever they end in, the next life of the device is good.
    content = card.rng.randbytes(8 * PAGE)
    for _ in range(6):
        await disk.done([disk.blk.write(600, content)])
        for n in range(2):
            disk.blk.read(600 + 8 * n, 6 * PAGE)
        disk.golden.doubtful |= {(request.kind, request.sector) for request in disk.blk.requests.values()}
        await disk.offer()
        await ClockCycles(dut.clk, card.rng.randrange(900))
        await card.port.perform(bus_master(disk.function, False))
        seen = Seen(card, disk.function)
        await ClockCycles(dut.clk, 2000)
        assert not seen.tlps, f"{seen.tlps[0]} without Bus Master"
        await card.port.perform(bus_master(disk.function, True))
        await disk.restart()
        disk.golden.doubtful.clear()
        request = disk.blk.read(600, len(content))
        await disk.done([request])
        assert request.status == OK and request.data == content
    await no_faults(card)
    await traffic.end()
    card.finish()


@cocotb.test(**LIMITS)
async def bus_master_is_off_for_a_moment(dut):
    """SYS-BAD-18 (R05, V002, V040): Bus Master off and on again at any moment of a read: it comes back whole, its status written, or says
    IOERR; else NEEDS_RESET. Both only when what was dropped came behind it: the read that asks whether to interrupt."""
    card, (disk,) = await begin(dut)
    content = card.rng.randbytes(PAGE)
    await disk.done([disk.blk.write(600, content)])
    lost = both = 0
    for moment in range(0, 600, 5):
        request = disk.blk.read(600, 512)
        disk.golden.doubtful.add((request.kind, request.sector))
        await disk.offer()
        await ClockCycles(dut.clk, moment)
        await card.port.perform(bus_master(disk.function, False))
        await card.port.perform(bus_master(disk.function, True))
        await ClockCycles(dut.clk, 800)
        disk.blk.poll()
        needs_reset = bool(await status_of(disk) & DeviceStatus.NEEDS_RESET)
        assert request.is_done or needs_reset
        assert not request.is_done or request.status in (OK, IOERR), "its status was not written"
        if request.is_done and request.status == OK:
            assert request.data == content[:512]
        lost += not request.is_done
        both += request.is_done and needs_reset
        if needs_reset:
            await disk.restart()
        disk.golden.doubtful.clear()
    assert 20 < lost < 100 and both <= 4  # between the write of the index and that read there are some 20 cycles
    await works(disk)
    card.finish()


@cocotb.test(**LIMITS)
async def iommu_may_not_master(dut):
    """SYS-BAD-14 (R05, R24): the IOMMU without Bus Master cannot walk nor record: refused, fqmf; on again all works."""
    card, (disk,) = await begin(dut, page_faults=False)
    await works_and_rests(disk)
    await card.port.run(forget_all(disk))
    await card.port.perform(bus_master(0, False))
    walls, seen = Seen(card, 0), Seen(card, disk.function)
    disk.golden.forget_request(disk.blk.write(40, card.rng.randbytes(512)))
    await disk.offer()
    await needs_reset(card, disk, is_told=False)
    assert not walls.tlps and not seen.tlps
    csr = await card.port.run(card.iommu.read("fqcsr"))
    assert csr & QueueCsr.MF and csr & QueueCsr.ON
    await card.port.perform(bus_master(0, True))
    await no_faults(card)  # none could be written; clears ipsr.fip, which comes back at once [RVIOMMU1.0 6.18], then the error
    assert await card.port.perform(WaitInterrupt(0, 1, 5000)), "no interrupt of the fault queue"
    await no_faults(card)  # as that interrupt's handler would; now fip is 0 for good
    assert card.iommu.fault_overflows == 1
    await disk.restart()
    await works_and_rests(disk)
    await card.port.run(forget_all(disk))
    disk.table.unmap(disk.layout.avail)  # and records are written again
    disk.blk.flush()
    await disk.offer()
    await needs_reset(card, disk)
    await faults_of(card, disk, cause=Cause.READ_PAGE_FAULT, ttyp=READ, low=disk.layout.avail, high=disk.layout.avail + 4)
    card.finish()


# Completions that no host should send.


@cocotb.test(**LIMITS)
@cocotb.parametrize(kind=["WRONG_BYTE_COUNT", "WRONG_LOWER_ADDRESS", "WRONG_REQUESTER", "SHORT", "DUPLICATE", "LATE"])
async def completion_is_strange(dut, kind):
    """SYS-BAD-15 (R05, R18): broken, foreign, doubled, late completions for data: IOERR or the right data, never other bytes."""
    card, (disk, other) = await begin(dut, disks=2)
    traffic = Traffic(other)
    for offset in (100, 5000):
        old, new = card.rng.randbytes(2 * PAGE), card.rng.randbytes(2 * PAGE)
        await disk.done([disk.blk.write(600, old)])
        request = disk.blk.write(600, new)
        fault = strike(card, kind, disk.function, request.readable[1][0] + offset, 8, disk.memory)
        fault.cycles = 14_000  # the card gives up after 1 to 1.25 times its 10,000 cycles
        await disk.done([request], may_fail=True)
        assert fault.times == 0 and request.status in (OK, IOERR)
        assert request.status == (OK if kind == "DUPLICATE" else IOERR)
        for _ in range(3):  # what comes late meets these
            again = disk.blk.read(600, len(old))
            await disk.done([again])
            assert again.status == OK
            assert again.data == new if request.status == OK else torn(old, new, again.data, offset + 8)
            await works(disk)
    assert await status_of(disk) == RUNNING
    await no_faults(card)
    await traffic.end()
    card.finish()
