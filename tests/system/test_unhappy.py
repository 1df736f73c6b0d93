"""The unhappy paths of the whole card: each ends as the specifications say, and the next good request works."""


import cocotb
from cocotb.triggers import ClockCycles

from ringwall.models.host import Fault, WaitInterrupt
from ringwall.models.iommu.faults import Cause, FaultRecord, TransactionType
from ringwall.models.iommu.registers import IommuMode
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.driver import DeviceStatus
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import Card, bench_config
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

PAGE = 4096
OK, IOERR = 0, 1
CONFIG, QUEUE = 0, 1  # vectors of a disk
RUNNING = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
KINDS = ["UR", "CA", "POISON", "MISSING"]
READ, WRITE = TransactionType.UNTRANSLATED_READ, TransactionType.UNTRANSLATED_WRITE
LIMITS = {"timeout_time": 2, "timeout_unit": "ms"}


def test_unhappy(request):
    run(RawCard(bench_config(256)), module=__name__, node=request.node.nodeid, sim="verilator")


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
    rng, base = disk.card.rng, disk.card.rng.randrange(512)
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
    """Good requests, and nothing is under way any more: the last interrupt was sent."""
    await works(disk)
    await ClockCycles(disk.card.dut.clk, 600)


class Traffic:
    """Good requests of a disk, one behind the other, until :meth:`end`; none may take longer than ``cycles``."""

    def __init__(self, disk, *, cycles=3000):
        self.disk, self.count, self.cycles, self._is_ending = disk, 0, cycles, False
        self._task = cocotb.start_soon(self._run())

    async def _run(self):
        while not self._is_ending or self.count < 2:
            await works(self.disk, sizes=(1024,), cycles=self.cycles)
            self.count += 1

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
    await works(disk)
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
