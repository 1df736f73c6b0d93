"""A and D set by the walker: every update is the golden walk's, whatever software and memory do in between. [RVIOMMU1.0 3.4]"""

from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.entries import PTE_A, PTE_D, PTE_R, PTE_U, PTE_V, PTE_W, SV39X4, ProcessContext
from ringwall.models.iommu.faults import AccessType
from ringwall.models.iommu.tables import Allocator, DeviceContext, GuestView, PageTable, ProcessDirectory
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import InvalidateKind, TranslateRequest
from ringwall.rtl.iommu.translator import Translator
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.run import run
from ringwall.sim.stream import cycle, pack
from ringwall.sim.translator_bench import TranslatorBench

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
CARDS = {"least": ["AMO_HWAD"], "guest": ["Sv39x4", "PD8", "AMO_HWAD"]}
GUEST_POOL, GUEST_PAGES = 0x20_0000, 24
PAGE, LARGE, TARGET = 0x7000_3000, 0x4000_0000, 0x6000_3000  # of the first stage: 4 KiB, 2 MiB; where both go


@pytest.mark.parametrize("card", CARDS)
def test_updates(request, card):
    run(Translator(features=Features(**dict.fromkeys(CARDS[card], True))), module=__name__, node=request.node.nodeid,
        params={"features": CARDS[card], "levels": 1})  # fmt: skip


class Place:
    """Device 3: a first stage, on the card with guests that of process 5 in a guest. ``entries`` has the places of leaf entries, by name.

    They are those of the two pages in the first stage (``first``, ``large``), and in the second that of the page itself, of the leaf table
    of the first stage, of its root and of the process directory.
    """

    def __init__(self, bench):
        self.bench, memory, allocator, features = bench, bench.memory, bench.allocator, bench.features
        self.is_guest = "Sv39x4" in features
        self.pid = 5 if self.is_guest else None
        if not self.is_guest:
            self.first = PageTable(memory, allocator)
            self.context, self.entries = DeviceContext.sv39(self.first.root, PSCID=7), {}
        else:
            self.second = PageTable(memory, allocator, scheme=SV39X4, features=features)
            for n in range(GUEST_PAGES):
                self.second.map_page(GUEST_POOL + (n << 12), allocator.page(), perms="rwxu")
            self.second.map_page(TARGET, 0x77_0000_3000, perms="rwxu")
            view = GuestView(memory, self.second)
            allocator = Allocator(view, GUEST_POOL, GUEST_PAGES << 12, rng=bench.rng)
            self.directory = ProcessDirectory(view, allocator, levels=1, features=features)
            self.first = PageTable(view, allocator, features=features)
            self.process = ProcessContext(ENS=True, SUM=True, PSCID=7, fsc_mode=self.first.scheme.mode, fsc_ppn=self.first.root >> 12)
            self.directory.set(self.pid, self.process)
            self.context = DeviceContext.process_directory(self.directory.pdtp).with_second_stage(SV39X4, self.second.root, GSCID=9)
        self.first.map_page(PAGE, TARGET, perms="rwxu")
        self.first.map_page(LARGE, TARGET & -(1 << 21), size=1 << 21, perms="rwxu")
        self.other = allocator.page()  # a leaf table that nothing points to
        self.spa_of = self.second.spa_of if self.is_guest else lambda address: address
        leaf = self.first._slot(PAGE, 0)
        self.entries = {"first": self.spa_of(leaf), "large": self.spa_of(self.first._slot(LARGE, 1))}
        if self.is_guest:
            self.entries |= {"page": self.second._slot(TARGET, 0), "table": self.second._slot(leaf & -4096, 0),
                             "root": self.second._slot(self.first.root, 0), "process": self.second._slot(self.directory.root, 0)}
        self.good = {name: self.load(name) for name in self.entries}
        self.configure()

    def configure(self, SADE=True, GADE=True):
        self.bench.directory.set(3, replace(self.context, SADE=SADE, GADE=GADE and self.is_guest))

    def load(self, name):
        return self.bench.memory.load_q_le(self.entries[name])

    def store(self, name, entry):
        self.bench.memory.store_q_le(self.entries[name], entry)

    def restore(self, **entries):
        """Make all entries good again, but for ``entries``."""
        for name, entry in (self.good | entries).items():
            self.store(name, entry)

    async def ask(self, access, name="first", **options):
        """Ask for the page that the entry ``name`` leads to, with nothing cached; return the cause or 0."""
        await self.bench.forget()
        return await self.bench.check(3, LARGE + (TARGET & 0x1F_F000) if name == "large" else PAGE, access, self.pid, **options)

    async def ask_while(self, access, name, disturb, entry):
        """The same, while ``disturb`` happens; the answer is that for ``entry`` in memory."""
        old = self.load(name)
        self.store(name, entry)
        iova = LARGE + (TARGET & 0x1F_F000) if name == "large" else PAGE
        wanted = self.bench.expected(3, iova, access, self.pid)
        self.store(name, old)
        self.bench.disturb = disturb
        cause = await self.ask(access, name, wanted=wanted)
        self.bench.disturb = lambda update: BurstStatus.OK
        return cause

    def lacking(self, name):
        """Return the good entry without A and D."""
        return self.good[name] & ~(PTE_A | PTE_D)


async def begin(dut):
    bench = TranslatorBench(dut)
    await bench.begin()
    bench.latency = lambda: bench.rng.randrange(1, 6)
    return bench, Place(bench)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def updates_are_the_golden_walk(dut):
    """IOMMU-AD-1: entries of both stages with and without A, D, W, U; SADE, GADE, ENS, SUM: answer, iotval2, updates as the model."""
    bench, place = await begin(dut)
    rng, seen, set_bits = bench.rng, set(), set()
    shares = (PTE_A, 0.4), (PTE_D, 0.5), (PTE_W, 0.08), (PTE_U, 0.04)
    for _ in range(160):
        place.configure(rng.random() < 0.85, rng.random() < 0.85)
        before = {name: entry & ~sum(bit for bit, share in shares if rng.random() < share) for name, entry in place.good.items()}
        place.restore(**before)
        priv = place.is_guest and rng.random() < 0.2
        if place.is_guest:
            place.directory.set(place.pid, replace(place.process, ENS=rng.random() < 0.8, SUM=rng.random() < 0.7))
        seen.add(await place.ask(rng.choice([READ, WRITE, WRITE, EXEC]), rng.choice(["first", "large"]), priv=priv))
        set_bits |= {(name, bit) for name, entry in before.items() for bit in (PTE_A, PTE_D) if (place.load(name) ^ entry) & bit}
    assert seen >= ({0, 12, 13, 15, 20, 21, 23, 260} if place.is_guest else {0, 12, 13, 15}), seen
    assert {*place.entries} == {name for name, bit in set_bits if bit == PTE_A}
    assert {*place.entries} - {"root", "process"} == {name for name, bit in set_bits if bit == PTE_D}, "nothing but leaf tables is written"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def entries_that_change_are_judged_anew(dut):
    """IOMMU-AD-2: software writes the entry between read and update: it is judged as it is then, up to 6 times; then a page fault."""
    bench, place = await begin(dut)

    def writing(*changes):
        """Write ``changes`` over the entry, one in front of each update."""
        left = list(changes)

        def disturb(update):
            if left:
                bench.memory.store_q_le(update.address, left.pop(0))
            return BurstStatus.OK

        return disturb

    for name in place.entries:
        lacking, access = place.lacking(name), WRITE if name in ("first", "large", "page") else READ
        for change in (lacking | PTE_A, lacking | PTE_A | PTE_D, *(lacking ^ bits for bits in (PTE_V, PTE_U, PTE_W, PTE_R | PTE_W))):
            place.restore(**{name: lacking})
            await place.ask_while(access, name, writing(change), change)

    # A page becomes a table; with a guest the second stage must be asked about that one too.
    table = place.other
    pointer, lacking = table >> 2 | PTE_V, place.lacking("first")
    cases = [("rwu", lacking, 0), ("ru", lacking, 23), ("ru", place.good["first"], 0)]  # how the new table may be used, the leaf in it
    for perms, entry, cause in cases if place.is_guest else cases[:1]:
        if place.is_guest:
            place.second.unmap(table)
            place.second.map_page(table, bench.allocator.page(), perms=perms, d=False)
        bench.memory.store_q_le(place.spa_of(table) + (TARGET >> 12 & 0x1FF) * 8, entry)
        place.restore(large=place.lacking("large"))
        assert await place.ask_while(WRITE, "large", writing(pointer), pointer) == cause

    # Bits that software uses change again and again; the model is asked once without that, and once without updates.
    for name in ("first", "page") if place.is_guest else ("first",):
        for times in (6, 7):
            lacking = place.lacking(name)
            place.restore(**{name: lacking})
            bench.golden.implementation, bench.update_count = replace(bench.golden.implementation, atomics=times == 6), 0
            versions = [lacking | n << 8 for n in (1, 2, 3, 1, 2, 3, 1)[:times]]
            cause = await place.ask_while(WRITE, name, writing(*versions), versions[-1])
            assert bool(cause) == (times == 7) and bench.update_count == 7, name
    bench.golden.implementation = replace(bench.golden.implementation, atomics=True)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def failed_updates_fault_exactly(dut):
    """IOMMU-AD-3: updates end with UR, timeout, poison, or are refused: access fault, corruption, page fault; then the next works."""
    bench, place = await begin(dut)
    seen = set()
    for name in place.entries:
        for access in (READ, WRITE, EXEC):
            for status in (BurstStatus.UR, BurstStatus.TIMEOUT, BurstStatus.POISONED, BurstStatus.REFUSED):
                place.restore(**{name: place.lacking(name)})
                if status == BurstStatus.REFUSED:
                    bench.golden.implementation = replace(bench.golden.implementation, atomics=False)
                else:
                    bench.shadow.refused = {place.entries[name]: "poisoned" if status == BurstStatus.POISONED else "bad"}
                cause = await place.ask_while(access, name, lambda update, status=status: status, place.lacking(name))
                seen.add((name, status, cause))
                bench.golden.implementation, bench.shadow.refused = replace(bench.golden.implementation, atomics=True), {}
        assert await place.ask(READ, name) == 0
    assert {("first", BurstStatus.UR, 5), ("first", BurstStatus.TIMEOUT, 7), ("first", BurstStatus.POISONED, 274)} <= seen
    if place.is_guest:
        assert {("process", BurstStatus.UR, 265), ("process", BurstStatus.POISONED, 269), ("page", BurstStatus.REFUSED, 23)} <= seen


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def without_atomics_nothing_is_updated(dut):
    """IOMMU-AD-4: with AtomicOps not enabled what lacks A or D faults as without SADE and GADE, and the rest is served; then it works."""
    bench, place = await begin(dut)
    for name in place.entries:
        for is_on in (0, 1):
            dut.atomics.value = is_on
            bench.golden.implementation = replace(bench.golden.implementation, atomics=bool(is_on))
            for access in (READ, WRITE):
                for lacking in (PTE_A | PTE_D, PTE_D, 0):
                    place.restore(**{name: place.good[name] & ~lacking})
                    bench.update_count = 0
                    cause = await place.ask(access, name)
                    assert (cause == 0 or not is_on) and (is_on or not bench.update_count)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def what_is_cached_sets_no_bit_too_few(dut):
    """IOMMU-AD-5: a page read without D serves no write, cached or walked for; prefetches set nothing; the answer waits for the update."""
    bench, place = await begin(dut)
    entry = "page" if place.is_guest else "first"
    for name in ("first", entry):
        place.restore(**{name: place.lacking(name)})
        assert await place.ask(READ) == 0
        assert place.load(name) == place.lacking(name) | PTE_A
        bench.read_count, reads = 0, []
        for access in (READ, WRITE, WRITE, READ):
            assert await bench.check(3, PAGE, access, place.pid) == 0
            reads.append(bench.read_count > 0)
            bench.read_count = 0
        assert reads == [False, True, False, False] and place.load(name) == place.good[name]

    # Reads and writes at once, in any order.
    for _ in range(4):
        place.restore(**{entry: place.lacking(entry)})
        await bench.forget()
        accesses = [bench.rng.choice([READ, WRITE, EXEC]) for _ in range(11)]
        accesses.insert(bench.rng.randrange(12), WRITE)
        await bench.request.put_many(bench.packed(n, 3, PAGE, access, place.pid) for n, access in enumerate(accesses))
        answers = await bench.answered(12)
        assert not any(answer.fault for answer in answers)
        assert all(answer.writable for answer in answers if accesses[answer.cookie] is WRITE)
        assert place.load(entry) == place.good[entry]

    # A prefetch sets nothing, unless somebody waits for the same walk.
    bench.updates.clear()
    bench.latency = lambda: 40
    for is_write in (0, 1):
        place.restore(**{entry: place.lacking(entry)})
        await bench.forget(InvalidateKind.VMA)
        bench.reports.clear()
        bench.update_count = bench.read_count = 0
        prefetch = pack(TranslateRequest, device_id=3, page=PAGE >> 12, is_prefetch=1, is_write=is_write,
                        process_id_valid=place.is_guest, process_id=place.pid or 0)  # fmt: skip
        await bench.request.put(prefetch)
        await ClockCycles(dut.clk, 900)
        cold = bench.read_count
        assert bench.update_count == 0 and not bench.reports and not bench.answers and cold > 2
        await bench.forget(InvalidateKind.VMA)
        await bench.request.put(prefetch)
        await ClockCycles(dut.clk, 30)
        begun = cycle()
        assert await bench.check(3, PAGE, WRITE if is_write else READ, place.pid) == 0
        assert bench.update_count == 1 and bench.read_count == 2 * cold, "one walk for both"
        assert cycle() - begun > 40 * (cold + 1) - 40


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def cleared_bits_are_set_again(dut):
    """IOMMU-AD-6: software clears A and D and invalidates, under traffic: a request accepted later finds them set when it is answered."""
    bench, place = await begin(dut)
    rng = bench.rng
    bench.latency = lambda: rng.randrange(1, 40)
    pages, slots = [PAGE, PAGE + 0x1000], {}
    for n, page in enumerate(pages):
        if n:
            place.first.map_page(page, TARGET + (n << 12), perms="rwxu")
            if place.is_guest:
                place.second.map_page(TARGET + (n << 12), 0x77_0000_3000 + (n << 12), perms="rwxu")
        slots[page] = [place.spa_of(place.first._slot(page, 0))] + ([place.second._slot(TARGET + (n << 12), 0)] if place.is_guest else [])
    version, wanted, cookie, judged = dict.fromkeys(pages, 0), {}, 0, 0

    async def ask(page, access):
        nonlocal cookie
        wanted[cookie] = page, access, version[page]
        await bench.ask(cookie, 3, page, access, place.pid)
        cookie = (cookie + 1) % 256

    for _ in range(250):
        page = rng.choice(pages)
        if rng.random() < 0.4:
            await ask(page, WRITE)
            await ClockCycles(dut.clk, rng.randrange(180))
            version[page] += 1
            for slot in slots[page]:
                bench.memory.store_q_le(slot, bench.memory.load_q_le(slot) & ~rng.choice([PTE_A | PTE_D, PTE_D, 0]))
            await bench.forget(rng.choice([InvalidateKind.ALL, InvalidateKind.VMA, InvalidateKind.GVMA]))
            await ask(page, WRITE)
        else:
            await ask(page, rng.choice([READ, WRITE, EXEC]))
            await ClockCycles(dut.clk, rng.choice([1, 1, 20, 150]))
        for answer in await bench.answered(max(len(wanted) - 5, 0)):
            page, access, then = wanted.pop(answer.cookie)
            assert not answer.fault, f"{page:#x} {access}: {vars(answer)}"
            bits = PTE_A | PTE_D if access is WRITE else PTE_A
            if version[page] == then:
                judged += 1
                assert all(bench.memory.load_q_le(slot) & bits == bits for slot in slots[page]), f"{page:#x} {access}"
    assert judged > 60 and bench.update_count > 30, f"{judged} {bench.update_count}"
