"""Rows of the requirements that only the whole card can show: who may send, with and without IOMMU, words, dwords, messages, windows."""

import dataclasses
import functools
import json
import random
import re

import cocotb
import pytest
from amaranth.hdl import Fragment, Value
from amaranth.hdl._ast import Assign
from amaranth.lib.wiring import In
from cocotb.triggers import RisingEdge

from ringwall.models.address_space import AddressSpace, Mmio, Ram, Window
from ringwall.models.dma import Span, TlpRules
from ringwall.models.host import ConfigRead, ConfigWrite, enable_msix
from ringwall.models.iommu.faults import Cause
from ringwall.models.iommu.tables import DeviceContext, PageTable
from ringwall.models.memory import AccessFault
from ringwall.models.tlp import TlpType
from ringwall.models.virtio.blk import BlkDriver
from ringwall.models.virtio.driver import DriverError, Feature, VirtioPciDriver
from ringwall.models.virtio.split import SplitDriver
from ringwall.rtl import endpoint as endpoint_module
from ringwall.rtl.config import BlkConfig
from ringwall.rtl.core import Core
from ringwall.rtl.endpoint import Endpoint
from ringwall.rtl.tlp.layouts import Burst, TlpBeat
from ringwall.rtl.verilog import RawCard
from ringwall.sim.card import FRAMES, IOVAS, OWN, OWN_BYTES, Card, Disk, MappedMemory, bench_card, bench_config
from ringwall.sim.formal import mutant
from ringwall.sim.run import run
from ringwall.sim.stream import cycle

PAGE = 4096
MESSAGES = 0xFEE0_0000, 0x10_0000
RING_BYTES = 16 * PAGE
OK, IOERR, UNSUPP = 0, 1, 2
IN, OUT = 0, 1


def without_iommu():
    return dataclasses.replace(bench_config(64), iommu=None)


class Recorder:
    """Keeps the memory requests that the card sent, in order."""

    def __init__(self, card):
        self.tlps = []
        card.observers.append(self.observe)

    def observe(self, event, tlp):
        if tlp is not None and tlp.type in (TlpType.MRD, TlpType.MWR):
            self.tlps.append(tlp)

    def of(self, function, start, length):
        """Return the requests of a function that touch some of ``length`` bytes from ``start``."""
        mine = [(tlp, tlp.byte_span()) for tlp in self.tlps if tlp.requester_id & 0xFF == function]
        return [tlp for tlp, (at, size) in mine if at < start + length and start < at + size]


async def attach(card, number, *, base, seed, tables=False, platform=True, pages=100):
    """Bring disk ``number`` up with its ring at ``base``, buffers behind it, addresses the same on both sides of the card.

    ``tables``: behind a page table that maps each page to itself. Returns the :class:`Disk`.
    """
    function = card.config.first_disk + number
    info, memory, table = card.functions[function], MappedMemory(card.session.memory), None
    if tables:
        table = PageTable(card.session.memory, card.allocator, observer=card.session.allowed)
        for page in (*range(base, base + RING_BYTES + pages * PAGE, PAGE), info.msix.message_address & -PAGE):
            table.map_page(page, page, perms="rwu")
        card.iommu.directory.set(function, DeviceContext.sv39(table.root, PSCID=function))
        await card.port.run(card.iommu.invalidate_context(function))
    elif card.iommu is not None:
        card.session.allowed.bypassed(function, True)
    await card.port.run(enable_msix(info, 2))
    driver, ring = VirtioPciDriver(info), SplitDriver(memory, size=64, base=base)
    wanted = 1 << Feature.VERSION_1 | 1 << 9 | (1 << Feature.ACCESS_PLATFORM if platform else 0)
    await card.port.run(driver.start([ring.layout], wanted=wanted, vectors=[1], config_vector=0))
    assert bool(driver.features >> Feature.ACCESS_PLATFORM & 1) == platform
    blk = BlkDriver(ring, memory, area=(base + RING_BYTES, pages * PAGE), rng=random.Random(seed))
    disk = card.disks[number] = Disk(card, function, table, memory, 0, driver, blk)
    disk.watch(vector=1, is_running=True)
    return disk


async def fill(disk, rng):
    """Give the first 220 sectors, which the mixed requests use, a content: the store keeps what another test left."""
    for sector in range(0, 220, 20):
        request = disk.blk.write(sector, rng.randbytes(10240), framing="pages")
        await disk.done([request])
        assert request.status == OK


def mixed_requests(disk, rng, count):
    """Add requests good and bad, small and large, in all framings; return them."""
    made = []
    for n in range(count):
        framing = "random" if n == count - 1 else rng.choice(["parts", "whole", "pages"])
        match rng.randrange(8):
            case 0 | 1 | 2:
                made.append(disk.blk.write(rng.randrange(200), rng.randbytes(512 * rng.randrange(1, 20)), framing=framing))
            case 3 | 4 | 5:
                made.append(disk.blk.read(rng.randrange(200), 512 * rng.randrange(1, 20), framing=framing))
            case 6:
                made.append(disk.blk.get_id(framing=framing) if rng.random() < 0.5 else disk.blk.flush(framing=framing))
            case 7:  # beyond the end; a type that there is not
                made.append(disk.blk.read(2047, 1024) if rng.random() < 0.5 else disk.blk.request(99, room=30))
    return made


# R28: one traffic, four ways to reach memory.

WAYS = ("without", "bare", "bypass", "identity")
BASES = 0x3_0000_0000, 0x3_8000_0000


def test_no_iommu_is_identity(request):
    """SYS-ROW-28: R28 (R22): the seeded traffic gives one memory, one used ring, one sequence of data TLPs, whatever the card has."""
    results = {}
    for card, ways in ((RawCard(without_iommu()), WAYS[:1]), (bench_card(64), WAYS[1:])):
        done = run(card, module=__name__, node=f"{request.node.nodeid}[{ways[0]}]", sim="verilator", seed=28,
                   testcase=[f"traffic_{way}" for way in ways])  # fmt: skip
        results |= {way: json.loads((done.folder / f"{way}.json").read_text()) for way in ways}
    wanted = results["without"]
    assert {OK, IOERR, UNSUPP} == {status for disk in wanted for _, status, _, _ in disk["requests"]}
    for way in WAYS[1:]:
        for number, (one, other) in enumerate(zip(wanted, results[way], strict=True)):
            for what in one:
                assert one[what] == other[what], f"disk {number}: {what} with {way} is not that without an IOMMU"


async def same_traffic(dut, way):
    """Do the seeded traffic on two disks at once, judge it, keep the outcome in a file."""
    rng, config = random.Random(28), without_iommu() if way == "without" else bench_config(64)
    card = await Card(dut, config, seed=28).begin()
    recorder = Recorder(card)
    if way in ("bypass", "identity"):
        await card.enable_iommu(levels=2)
    disks = [await attach(card, n, base=BASES[n], seed=n, tables=way == "identity", platform=way != "bypass") for n in (0, 1)]
    requests = [[], []]
    for disk in disks:
        await fill(disk, rng)
    for _ in range(8):
        these = [mixed_requests(disk, rng, 5) for disk in disks]
        for disk in disks:
            if disk.blk.publish():
                await card.port.run(disk.driver.notify())
        for n in (0, 1):
            await disks[n].done(these[n])
            requests[n] += these[n]
    if way != "without":
        walks = sum(tlp.type is TlpType.MRD for tlp in recorder.of(0, 0, 2**64))
        pages = len({tlp.address // PAGE for disk in disks for tlp in recorder.of(disk.function, 0, 2**64)})
        assert walks >= pages if way == "identity" else walks < 10, f"{walks} reads of tables for {pages} pages"
    card.finish()
    result = []
    for disk, base, mine in zip(disks, BASES, requests, strict=True):
        area = base + RING_BYTES, 100 * PAGE
        data = recorder.of(disk.function, *area)
        shown = {kind: [[t.address, t.length_dw, t.first_be, t.last_be, t.data.hex()] for t in data if t.type is kind]
                 for kind in (TlpType.MRD, TlpType.MWR)}  # fmt: skip
        assert shown[TlpType.MRD] and shown[TlpType.MWR]
        result.append({
            "requests": [[r.head, r.status, r.used_len, r.data.hex()] for r in mine],
            "reads": shown[TlpType.MRD], "writes": shown[TlpType.MWR],
            "used ring": disk.memory.read(disk.layout.used, 4 + 8 * 64).hex(),
            "memory": disk.memory.read(base, RING_BYTES + area[1]).hex(),
        })  # fmt: skip
    with open(f"{way}.json", "w") as file:
        json.dump(result, file)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def traffic_without(dut):
    """SYS-ROW-29 (R28): the seeded traffic on a card without an IOMMU is right."""
    await same_traffic(dut, "without")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def traffic_bare(dut):
    """SYS-ROW-30 (R28): the same behind an IOMMU that nobody touched."""
    await same_traffic(dut, "bare")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def traffic_bypass(dut):
    """SYS-ROW-31 (R22, R28): the same beside an IOMMU in use that these drivers do not want."""
    await same_traffic(dut, "bypass")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def traffic_identity(dut):
    """SYS-ROW-32 (R28): the same behind Sv39 tables that map each page to itself."""
    await same_traffic(dut, "identity")


# The other rows of the shared card.


def test_rows(request):
    run(bench_card(), module=__name__, node=request.node.nodeid, sim="verilator", testcase=[
        "first_is_plain", "second_is_plain", "address_spaces_are_apart", "transfers_are_legal", "words_are_whole", "corner_addresses",
        "windows_and_peers", "base_addresses"])  # fmt: skip


async def one_plain_one_translated(dut, plain):
    """Traffic on both disks at once, disk ``plain`` without ACCESS_PLATFORM; judges where the requests of each went."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED).begin()
    recorder = Recorder(card)
    await card.enable_iommu(levels=1)
    disks = [None, None]
    disks[plain] = await attach(card, plain, base=BASES[0], seed=1, platform=False)
    disks[1 - plain] = await card.disk(1 - plain, buffer_pages=100)
    for disk in disks:
        await fill(disk, card.rng)
    for _ in range(4):
        these = [mixed_requests(disk, card.rng, 5) for disk in disks]
        if disks[0].blk.publish():
            await card.port.run(disks[0].driver.notify())
        for n in (1, 0):
            await disks[n].done(these[n])
    spans = {disk.function: [] for disk in disks}
    for tlp in recorder.tlps:
        if tlp.requester_id & 0xFF in spans and not MESSAGES[0] <= tlp.address < sum(MESSAGES):
            spans[tlp.requester_id & 0xFF].append(tlp.byte_span())
    for disk, base in ((disks[plain], BASES[0]), (disks[1 - plain], FRAMES)):
        assert len(spans[disk.function]) > 30
        assert all(base <= at and at + length <= base + RING_BYTES + 100 * PAGE for at, length in spans[disk.function])
    assert not await card.port.run(card.iommu.read_faults())
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def first_is_plain(dut):
    """SYS-ROW-22 (R22, R51): a disk without ACCESS_PLATFORM sends its addresses as they are, beside it the other's are translated."""
    await one_plain_one_translated(dut, 0)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def second_is_plain(dut):
    """SYS-ROW-23 (R22, R51): the other way round."""
    await one_plain_one_translated(dut, 1)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def address_spaces_are_apart(dut):
    """SYS-ROW-27 (R27): the same IOVAs in two address spaces are two memories; an IOVA of the other disk's alone faults, both ways."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED).begin()
    recorder = Recorder(card)
    await card.enable_iommu(levels=2)
    disks = [await card.disk(n, framing="pages", buffer_pages=60, alignment=512) for n in (0, 1)]
    assert disks[0].layout == disks[1].layout
    assert not set(disks[0].memory.frames.values()) & set(disks[1].memory.frames.values())
    contents = [card.rng.randbytes(8192) for _ in disks]
    for disk, content in zip(disks, contents, strict=True):
        disk.blk.write(0, content)
    for disk in disks:
        if disk.blk.publish():
            await card.port.run(disk.driver.notify())
    for disk, content in zip(disks, contents, strict=True):
        await disk.done([*disk.blk.requests.values()])
        request = disk.blk.read(0, 8192)
        await disk.done([request])
        assert (request.status, request.data) == (OK, content)
    # A page that only one of them has, as the other's buffer: written by an IN, read by an OUT.
    for mine, other in (disks, disks[::-1]):
        private = IOVAS + 0x4000_0000 + (mine.function << 20)
        card.map(mine.table, mine.memory, private, 1)
        secret = card.rng.randbytes(PAGE)
        mine.memory.write(private, secret)
        (place, _), = mine.memory.places(private, PAGE)
        for is_write in (False, True):
            sent = len(recorder.tlps)
            request = other.blk.write(16, bytes(512)) if is_write else other.blk.read(16, 512)
            spans = request.readable if is_write else request.writable
            number, = (n for n in range(64) if other.memory.read(other.layout.descriptor(n), 8) == spans[is_write][0].to_bytes(8, "little")
                       and other.memory.read(other.layout.descriptor(n) + 8, 4) == (512).to_bytes(4, "little"))  # fmt: skip
            other.memory.write(other.layout.descriptor(number), private.to_bytes(8, "little"))
            await other.done([request])
            assert request.status == IOERR
            records = await card.port.run(card.iommu.read_faults())
            wanted = Cause.READ_PAGE_FAULT if is_write else Cause.WRITE_PAGE_FAULT
            assert {(record.cause, record.device_id, record.iotval & -PAGE) for record in records} == {(wanted, other.function, private)}
            assert mine.memory.read(private, PAGE) == secret
            touched = [tlp for tlp in recorder.tlps[sent:] if place <= tlp.address < place + PAGE or tlp.address & -PAGE == private]
            assert not touched
            good = mine.blk.read(0, 8192)  # both go on
            await mine.done([good])
            assert (good.status, good.data) == (OK, contents[mine.function - 1])
            good = other.blk.read(0, 8192)
            await other.done([good])
            assert (good.status, good.data) == (OK, contents[other.function - 1])
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def transfers_are_legal(dut):
    """SYS-ROW-18 (R05, R06, R12, R14, R18, R19): translated buffers of any number and place: TLPs keep TlpRules, MSIs are one dword."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED).begin()
    recorder = Recorder(card)
    await card.enable_iommu(levels=2)
    disks = [await card.disk(n, framing="random", buffer_pages=120) for n in (0, 1)]
    for disk in disks:
        await fill(disk, card.rng)
    rules = TlpRules(mps=256, mrrs=512)
    counts, whole = set(), 0
    for step in range(16):
        recorder.tlps.clear()
        these = []
        for disk in disks:
            n, m = card.rng.sample(range(1, 17), 2)
            if step % 4 == 3:
                these.append([disk.blk.read(n, 512, framing="bytes")])
            elif step % 2:
                these.append([disk.blk.read(n, 512 * n, framing="pages"), disk.blk.write(m, card.rng.randbytes(512 * m))])
            else:
                these.append([disk.blk.write(n, card.rng.randbytes(512 * n), framing="whole"), disk.blk.read(m, 512 * m)])
        for disk, mine in zip(disks, these, strict=True):
            await disk.done(mine)
            assert all(request.status == OK for request in mine)
            for request in mine:
                counts.add(len(request.readable + request.writable))
                for spans, is_write in ((request.readable, False), (request.writable, True)):
                    for place in (place for span in spans for place in disk.memory.places(*span)):
                        found = rules.faults(Span(*place), recorder.of(disk.function, *place),
                                             disk.memory.memory.read(*place) if is_write else None)  # fmt: skip
                        assert not found, f"{'write' if is_write else 'read'} of {place[0]:#x}+{place[1]:#x}: " + "; ".join(found)
                        whole += place[1] in (2, 4, 8) and place[0] % place[1] == 0
        # Words of rings and of the IOMMU's tables: no request begins or ends inside one.
        for disk in disks:
            layout = disk.layout
            for start, size, word, entry in ((layout.desc, 16 * 64, 16, 8), (layout.avail, 4 + 2 * 64, 2, 2), (layout.used, 4, 2, 2),
                                             (layout.used + 4, 8 * 64, 8, 4)):  # fmt: skip
                (place, length), = disk.memory.places(start, size)
                assert length == size
                seen = recorder.of(disk.function, place, size)
                assert seen
                for tlp in seen:
                    at, length = tlp.byte_span()
                    assert (at - place) % entry == (at + length - place) % entry == 0 or not place <= at < at + length <= place + size, (
                        f"{tlp} cuts a word of {word} bytes")
        for tlp in recorder.of(0, OWN, OWN_BYTES):
            assert all(n % 8 == 0 for n in (tlp.byte_span()[0], sum(tlp.byte_span()))), f"{tlp} cuts a doubleword of a table"
        messages = recorder.of(1, *MESSAGES) + recorder.of(2, *MESSAGES)
        assert messages
        assert {(t.type, t.length_dw, t.first_be, t.last_be, t.relaxed_ordering) for t in messages} == {(TlpType.MWR, 1, 15, 0, False)}
        for disk in disks:
            base = card.functions[disk.function].msix.message_address
            assert {(t.address, t.data) for t in recorder.of(disk.function, *MESSAGES)} == {
                (base + 16, (disk.function + 1 << 11 | 1).to_bytes(4, "little"))}  # fmt: skip
    assert max(counts) > 10
    assert whole > 0
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def words_are_whole(dut):
    """SYS-ROW-5 (R05, R06): a CPU that acts between any two pieces of a memory access sees no torn index, no half element."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED, latency=60).begin()
    await card.enable_iommu(levels=1)
    disk = await card.disk(0, buffer_pages=40)
    memory, layout, ring = card.session.memory, disk.layout, disk.blk.ring
    (used, _), = disk.memory.places(layout.used, 4 + 8 * 64)
    seen, heads, turns = [0], [], [0]

    def load(at, length):
        return int.from_bytes(memory.read(at, length), "little")

    def other_cpu(address, length, is_write):
        """Take note of what came back, as soon as the index says so: every element below it must be whole."""
        turns[0] += 1
        index = load(used + 2, 2)
        fresh = index - seen[-1] & 0xFFFF
        assert fresh <= len(offered), f"used index {index:#06x} after {seen[-1]:#06x}, {len(offered)} requests are out"
        for n in range(fresh):
            slot = used + 4 + 8 * ((seen[-1] + n) % 64)
            head, count = load(slot, 4), load(slot + 4, 4)
            assert offered.pop(head, None) == count, f"used element {seen[-1] + n}: head {head:#x}, length {count:#x}"
        if fresh:
            seen.append(index)

    offered = {}
    # Lengths and indices pass 0xFF and 0x1FF: a torn one would be far off. FLUSH: 1 byte comes back, GET_ID: 21.
    for n in range(64):
        memory.write(used + 4 + 8 * n, b"\xee" * 8)
    done = 0
    while done < 560:
        batch = [disk.blk.get_id() if card.rng.random() < 0.5 else disk.blk.flush() for _ in range(10)]
        for request in batch:
            offered[request.head] = sum(length for _, length in request.writable)
            heads.append(request.head)
        memory.interleaver = other_cpu
        await disk.done(batch)
        memory.interleaver = None
        assert not offered
        done += len(batch)
        for n in range(64):
            memory.write(used + 4 + 8 * n, b"\xee" * 8)
    assert ring.used_index == seen[-1] == 560
    assert turns[0] > 3000
    assert len(seen) > 60
    card.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def corner_addresses(dut):
    """SYS-ROW-2 (R02): rings and buffers around 4 GiB and below 2^64, not translated: 64 bits arrive, short headers below 4 GiB only."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED).begin()
    recorder = Recorder(card)
    size = RING_BYTES + 32 * PAGE
    for number, base in enumerate((0x1_0000_0000 - RING_BYTES - 4 * PAGE, 2**64 - size)):
        disk = await attach(card, number, base=base, seed=number, pages=32)
        await fill(disk, card.rng)
        for _ in range(4):
            batch = mixed_requests(disk, card.rng, 5)
            await disk.done(batch)
        spans = [tlp.byte_span() for tlp in recorder.of(disk.function, base + RING_BYTES, 32 * PAGE)]
        if number == 0:
            assert min(spans)[0] < 0x1_0000_0000 - 5000
            assert max(spans)[0] > 0x1_0000_0000 + 5000
        assert len(recorder.of(disk.function, base, size)) == len([
            tlp for tlp in recorder.of(disk.function, 0, 2**64) if not MESSAGES[0] <= tlp.address < sum(MESSAGES)])  # fmt: skip
        # Header across the boundary of 4 GiB, data behind it; and the last bytes that there are.
        at = 0x1_0000_0000 - 6 if number == 0 else 2**64 - 2000
        places = (at, at + 24, 0x1_0000_0000 - 7) if number == 0 else (at, 2**64 - 1025, 2**64 - 1)
        content = card.rng.randbytes(1024)
        disk.memory.write(places[1], content)
        assert await one_request(disk, OUT, *places) == OK
        disk.memory.write(places[1], bytes(1024))
        assert await one_request(disk, IN, *places) == OK
        assert disk.memory.read(places[1], 1024) == content
    card.finish()


async def one_request(disk, kind, header, data, status):
    """Do a request of 1024 bytes at sector 8 whose parts lie at these addresses; return its status."""
    ring, memory = disk.blk.ring, disk.memory
    memory.write(header, kind.to_bytes(4, "little") + bytes(4) + (8).to_bytes(8, "little"))
    memory.write(status, b"\xff")
    ring.add_chain([(header, 16)] + [(data, 1024)] * kind, [(data, 1024)] * (not kind) + [(status, 1)])
    if ring.publish():
        await disk.card.port.run(disk.driver.notify())
    begun, found = cycle(), []
    while not found:
        await RisingEdge(disk.card.dut.clk)
        found = ring.poll_used()
        assert cycle() - begun < 20_000
    return memory.read(status, 1)[0]


class Bridge(AddressSpace):
    """A host bridge that drops and counts a posted write to nowhere, as they do."""

    dropped = 0

    def write(self, address, data, *, source=""):
        try:
            super().write(address, data, source=source)
        except AccessFault:
            self.dropped += 1


class Peer:
    """64 KiB of a peer device."""

    def __init__(self):
        self.bytes = bytearray(65536)

    def read(self, offset, length):
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset, data):
        self.bytes[offset : offset + len(data)] = data


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def windows_and_peers(dut):
    """SYS-ROW-37 (R03, R37, R44): a bridge with a window: RAM inside, a peer outside, else UR, told as IOERR; then all is well."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED).begin()
    peer, outside = Peer(), Peer()
    at_peer, at_other, nowhere = 0x20_0000_0000, 0x21_0000_0000, 0x30_0000_0000
    bridge = card.host.memory = Bridge(
        [Ram(0, 0x8_0000_0000, card.session.memory), Mmio(at_peer, 65536, peer), Mmio(at_other, 65536, outside, is_pci=False)],
        windows=[Window(0, 0x8_0000_0000)])
    await card.enable_iommu(levels=1)
    disk = await card.disk(0, buffer_pages=60)
    places = {IOVAS + 0x4000_0000: at_peer, IOVAS + 0x4001_0000: at_other, IOVAS + 0x4002_0000: nowhere}
    for iova, spa in places.items():
        disk.table.map_page(iova, spa, perms="rwu")
    content = card.rng.randbytes(1024)

    card.session.board.checkers.clear()  # they know RAM only

    def through(iova, kind):
        return one_request(disk, kind, IOVAS + 15 * PAGE, iova, IOVAS + 15 * PAGE + 64)

    peer.bytes[:1024] = content
    assert await through(IOVAS + 0x4000_0000, OUT) == OK
    peer.bytes[:1024] = bytes(1024)
    assert await through(IOVAS + 0x4000_0000, IN) == OK
    assert peer.bytes[:1024] == content
    for n, iova in enumerate((IOVAS + 0x4001_0000, IOVAS + 0x4002_0000)):
        before = card.host.statistics.unsupported
        assert await through(iova, OUT) == IOERR
        assert card.host.statistics.unsupported > before
        assert await through(iova, IN) == OK  # a posted write has no answer
        assert bridge.dropped >= 4 * (n + 1)
        good = disk.blk.read(8, 1024)
        await disk.done([good])
        assert (good.status, good.data) == (OK, content)
    assert outside.bytes == bytes(65536)
    card.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def base_addresses(dut):
    """SYS-ROW-57 (R57, R58, R59, R74): base addresses written by 1, 2 and 4 bytes: the very next read is masked to the size of the BAR."""
    card = await Card(dut, bench_config(256), seed=cocotb.RANDOM_SEED).begin()
    rng, disk = card.rng, {0: (16384, 4), 1: (1 << 64, 0), 2: (4096, 4), 3: (1 << 64, 0)}  # BAR: bytes, type; upper halves are all address
    for function, bars in ((0, {0: (4096, 4), 1: (1 << 64, 0)}), (1, disk), (2, disk)):
        for bar in (0, 1, 2, 3, 4, 5, 8):  # 8: expansion ROM, at 0x30
            size, kind = bars.get(bar, (0, 0))
            mask = 0 if not size else 0xFFFF_FFFF & (-size if size < 1 << 32 else -1)
            at = 0x10 + 4 * bar
            value = await card.port.run(one(ConfigRead(function, at, 4)))
            for n in range(12):
                width = 4 if n < 2 else rng.choice([1, 2, 4])
                place, written = rng.randrange(0, 4, width), 0xFFFF_FFFF if n == 0 else rng.getrandbits(32)
                written &= (1 << 8 * width) - 1
                touched = (1 << 8 * width) - 1 << 8 * place
                await card.port.run(one(ConfigWrite(function, at + place, width, written)))
                value = (value & ~touched | written << 8 * place) & mask | kind
                seen = await card.port.run(one(ConfigRead(function, at, 4)))
                assert seen == value, f"function {function} offset {at:#x}: {seen:#x}, must be {value:#x}"
    card.finish()


def one(operation):
    """Software that does one operation."""
    return (yield operation)


# R22: a strict card, which is small and slow: registers only.


def test_strict(request):
    config = dataclasses.replace(bench_config(64), disks=(BlkConfig(capacity_sectors=2048),), strict=True)
    run(RawCard(config), module=__name__, node=request.node.nodeid, sim="icarus", testcase="strict_card_refuses")


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def strict_card_refuses(dut):
    """SYS-ROW-26 (R22, R26): a strict card refuses FEATURES_OK without ACCESS_PLATFORM, and takes them with it afterwards."""
    config = dataclasses.replace(bench_config(64), disks=(BlkConfig(capacity_sectors=2048),), strict=True)
    card = await Card(dut, config, seed=cocotb.RANDOM_SEED, latency=20).begin()
    driver = VirtioPciDriver(card.functions[1])
    layout = SplitDriver(card.session.memory, size=16, base=BASES[0]).layout
    with pytest.raises(DriverError, match="refuses features"):
        await card.port.run(driver.start([layout], wanted=1 << Feature.VERSION_1, vectors=[], config_vector=0xFFFF))
    assert driver.offered >> Feature.ACCESS_PLATFORM & 1
    again = VirtioPciDriver(card.functions[1])
    wanted = 1 << Feature.VERSION_1 | 1 << Feature.ACCESS_PLATFORM
    await card.port.run(again.start([layout], wanted=wanted, vectors=[], config_vector=0xFFFF))
    assert again.features == wanted
    card.finish()


# R01: who drives whom, as elaborated.



def connections(component, fragment, beat):
    """Return {sink: sources} of every stream of bursts or TLPs between the parts of a component, and to its own ports ("link"); by name."""
    parts = {name: part.origins[0] for part, name, _ in fragment.subfragments} | {"link": component}
    names, sinks = {}, {}
    for owner, part in parts.items():
        for path, member, value in part.signature.flatten(part):
            signal, place = Value.cast(value), ".".join(map(str, (owner, *path)))
            names[id(signal)] = place
            payload = functools.reduce(getattr_or_item, path[:-1], part).payload if path[-1] in ("payload", "valid") else None
            is_sink = (member.flow is In) != (owner == "link")
            if payload is not None and is_sink and payload.shape() in (Burst, beat):
                sinks[id(signal)] = place
    found = {place: set() for place in sinks.values()}

    def look(statements):
        for statement in statements:
            if isinstance(statement, Assign):
                for target in statement._lhs_signals():
                    if id(target) in sinks:
                        found[sinks[id(target)]].add(names.get(id(statement.rhs), repr(statement.rhs)))
            else:
                for _, nested, _ in statement.cases:
                    look(nested)

    look(fragment.statements.get("comb", []))
    return found


def getattr_or_item(at, key):
    return at[key] if isinstance(key, int) else getattr(at, key)


def faults_of(endpoint):
    """Return what is wrong with who may ask for TLPs: devices through the gate alone, the IOMMU through the wall alone."""
    fragment, beat = Fragment.get(endpoint, None), TlpBeat(endpoint.config.width)
    core = next(part for part, name, _ in fragment.subfragments if name == "core")
    found = {f"core/{sink}": sources for sink, sources in connections(core.origins[0], core, beat).items()}
    found |= connections(endpoint, fragment, beat)
    faults, asking = [], set()
    wall = "iommu.bursts" if endpoint.config.iommu else None
    wanted = {"core/requester.gate": "gate.o", "core/requester.wall": wall, "core/link.to_send": "transmitter.o",
              "core/transmitter.posted": "requester.posted", "core/transmitter.non_posted": "requester.non_posted",
              "core/transmitter.completions": "completer.completions", "core/transmitter.messages": "errors.messages",
              "link.to_send": "core.to_send"}  # fmt: skip
    for sink, sources in found.items():
        stream, _, signal = sink.rpartition(".")
        if stream == "core/transmitter.messages" and signal == "payload":
            right = {source for source in sources if "." not in source}  # made field by field, of no other stream
        elif stream in wanted:
            right = {f"{wanted[stream]}.{signal}"} if wanted[stream] else set()
        elif stream.startswith("core.bursts."):
            right = {name for name in sources if re.fullmatch(r"(engine|msix)\.bursts\.\d+\.\w+|device_\d+\.bursts\.\d+\.\w+", name)}
            if len(right) != 1 or right & asking:
                faults.append(f"{sink} has {sorted(sources)}, must have one device of its own")
            asking |= right
        elif stream.startswith("core/gate.bursts."):
            right = {f"link.{sink.removeprefix('core/gate.')}"}
        else:
            right = {name for name in sources if name.startswith(("receiver.", "link.received."))}  # what came from the host
        if sources != right:
            faults.append(f"{sink} is driven by {sorted(sources)}, must be by {sorted(right) or 'nobody'}")
    missing = {f"{stream}.{signal}" for stream in wanted for signal in ("valid", "payload")} - set(found)
    if sum(sink.startswith("core/gate.bursts.") for sink in found) != len(asking):
        faults.append("the gate has ports that no device has")
    return faults + [f"{sink} is not there" for sink in sorted(missing)]


@pytest.mark.parametrize("disks, iommu", [(1, True), (2, True), (3, False)])
def test_who_may_send(disks, iommu):
    """SYS-ROW-1: R01: only gate and wall reach the requester, only it, the completer and errors the link; each device has its own way."""
    config = dataclasses.replace(bench_config(64), disks=(BlkConfig(),) * disks, **({} if iommu else {"iommu": None}))
    assert faults_of(Endpoint(config)) == []


@pytest.mark.parametrize("part, old, new, broken", [
    ("Core", "(gate.o, requester.gate)", "(gate.o, gate.bursts[0])", "core/requester.gate.valid is driven by []"),
    ("Core", "(iommu.bursts, requester.wall)", "(gate.o, requester.wall)", "core/requester.wall.valid is driven by ['gate.o.valid']"),
    ("Core", "(gate.bursts[n], self.bursts[n])", "(requester.wall if n == 1 else gate.bursts[n], self.bursts[n])",
     "core/requester.wall.valid"),
    ("Core", "(gate.bursts[n], self.bursts[n])", "(requester.gate if n == 3 else gate.bursts[n], self.bursts[n])",
     "core/requester.gate.valid"),
    ("Core", "(gate.bursts[n], self.bursts[n])", "(gate.bursts[0], self.bursts[n])", "core/gate.bursts.0.valid is driven by"),
    ("Core", "(requester.posted, transmitter.posted)", "(completer.completions, transmitter.posted)", "core/transmitter.posted.valid"),
    ("Core", "(transmitter.o, wiring.flipped(self.to_send))", "(requester.posted, wiring.flipped(self.to_send))",
     "core/link.to_send.valid"),
    ("Core", "message.valid.eq(errors.messages.valid)", "message.valid.eq(completer.completions.valid)", "core/transmitter.messages.valid"),
    ("Endpoint", "getattr(core, name)[at]", "getattr(core, name)[0]", "core.bursts.0.valid has"),
])  # fmt: skip
def test_bypasses_are_found(part, old, new, broken, monkeypatch):
    """SYS-ROW-3: R01: each planted way around the gate is found."""
    build = Endpoint
    if part == "Core":
        monkeypatch.setattr(endpoint_module, "Core", mutant(Core, old, new))
    else:
        build = mutant(Endpoint, old, new)
    found = faults_of(build(dataclasses.replace(bench_config(64), disks=(BlkConfig(),) * 2)))
    assert any(fault.startswith(broken) for fault in found), found
