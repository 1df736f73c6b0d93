"""Messages recorded in memory: the stand-alone unit beside the golden model, whatever memory and software do in between."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.iommu.commands import IofenceC, IotinvalGvma
from ringwall.models.iommu.defects import msi_pte_defects
from ringwall.models.iommu.entries import SV39X4, DeviceContext, MsiPte
from ringwall.models.iommu.faults import AccessType, TranslationFault
from ringwall.models.iommu.msi import store_msi
from ringwall.models.iommu.registers import IommuDriver
from ringwall.models.iommu.tables import Allocator, MsiTable, PageTable
from ringwall.models.iommu.walk import Iommu as Golden
from ringwall.models.iommu.walk import PlainRegisters, Request
from ringwall.models.memory import GuestMemory
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import MrifDone, MrifWrite, TranslateRequest, TranslateResponse
from ringwall.rtl.iommu.mrif import ATTEMPTS
from ringwall.rtl.iommu.unit import Iommu
from ringwall.rtl.spec.riscv_iommu import MRIF_LOG2
from ringwall.rtl.tlp.layouts import AtomicKind, BurstStatus
from ringwall.sim.iommu_host import IommuHost
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, unpack

POOL, FILES, NOTICES = 0x8000_0000, 0x1_2000_0000, 0x2_4000_0000  # tables, interrupt files, where notices go
GUEST_FILES = 0x28_0000  # guest physical pages of interrupt files
IOVA, CTL, RESPONSE = 0x258, 0x260, 0x268  # of tr_req_iova, tr_req_ctl, tr_response
READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
BASE = ("Sv39x4", "MSI_FLAT", "MSI_MRIF")
BUILDS = {"plain": (64, BASE), "atomic": (64, (*BASE, "AMO_MRIF", "DBG")), "wide": (256, (*BASE, "AMO_MRIF", "AMO_HWAD"))}
RACES = ["nothing_of_others_is_lost", "what_always_loses_ends"]
TESTS = ["messages_are_the_golden_ones", "faults_are_recorded", "no_old_entry_behind_a_fence", "stores_and_notices_in_order"]


@pytest.mark.parametrize("build", BUILDS)
def test_mrif(request, build):
    width, features = BUILDS[build]
    more = [*(RACES if "AMO_MRIF" in features else []), *(["debug_requests_are_refused"] if "DBG" in features else [])]
    bits = 36 if build == "wide" else 56
    unit = Iommu(width=width, entries=16, walks=2, physical_address_bits=bits,
                 features=Features(**dict.fromkeys(features, True)))  # fmt: skip
    run(unit, module=__name__, node=request.node.nodeid, params={"width": width, "features": features, "PAS": bits},
        testcase=TESTS + more)  # fmt: skip


@pytest.mark.parametrize("bad", [{"MSI_MRIF": True}, {"Sv39x4": True, "MSI_FLAT": True, "AMO_MRIF": True}])
def test_features_are_checked(bad):
    """IOMMU-MRIF-1: MSI_MRIF without MSI_FLAT, AMO_MRIF without MSI_MRIF are refused with a sentence."""
    with pytest.raises(ValueError, match=r"must be there for \w+, not False"):
        Features(**bad)


class Bench(IommuHost):
    """The unit with devices 0x08 and 0x09, the second of which is silent (DTF); each has a table of four interrupt files.

    ``before(burst)`` is called in front of each access of memory and returns its status.
    """

    def __init__(self, dut, **options):
        self.features = params()["features"]
        super().__init__(dut, params()["width"], atomics="AMO_MRIF" in self.features, **options)
        self.before = lambda burst: BurstStatus.OK

    def _status(self, burst):
        self.broken = {burst.address >> 12: status} if (status := self.before(burst)) != BurstStatus.OK else {}
        return super()._status(burst)

    async def enable(self, rng):
        await self.begin()
        self.rng, dut = rng, self.dut
        self.request, self.response = Stream(dut, "translate_request"), Stream(dut, "translate_response")
        self.handed, self.done = Stream(dut, "mrif_writes"), Stream(dut, "mrif_done")
        self.allocator = Allocator(self.memory, POOL, 0x200_0000, rng=rng)
        self.driver = IommuDriver(0, self.memory, self.allocator)
        await self.perform(self.driver.init(2))
        self.capabilities = self.driver.capabilities
        self.golden = Golden(self.memory, self.capabilities, registers=PlainRegisters(ddtp=self.driver.directory.ddtp))
        self.tables, self.cookie = {}, 0
        for device in (0x08, 0x09):
            second = PageTable(self.memory, self.allocator, scheme=SV39X4)
            self.tables[device] = table = MsiTable(self.memory, self.allocator, mask=3, pattern=GUEST_FILES >> 12)
            context = DeviceContext(DTF=device == 0x09).with_second_stage(SV39X4, second.root, GSCID=device)
            self.driver.directory.set(device, context.with_msi_table(table.root, mask=3, pattern=GUEST_FILES >> 12))
        return self

    def entry(self, number=None):
        """Return an entry in MRIF mode: file ``number``, or one of all."""
        number = self.rng.randrange(16) if number is None else number
        return MsiPte(mrif_address=FILES + 512 * number, notice_address=NOTICES + 4096 * number, nid=self.rng.getrandbits(11))

    async def translate(self, device, iova, access=WRITE):
        """Return cookie and answer of a request."""
        self.cookie = (self.cookie + 1) % 255
        await self.request.put(pack(TranslateRequest, device_id=device, is_write=access is WRITE, execute=access is EXEC, page=iova >> 12,
                                    offset=iova & 0xFFF, cookie=self.cookie))  # fmt: skip
        answer = unpack(TranslateResponse, await self.response.get())
        assert answer.cookie == self.cookie
        return self.cookie, answer

    async def hand_over(self, cookie, data):
        await self.handed.put(pack(MrifWrite, cookie=cookie, data=int.from_bytes(data, "little")))

    async def finish(self, cookie):
        """Return how the message ended that was handed over with ``cookie``."""
        end = unpack(MrifDone, await self.done.get())
        assert end.cookie == cookie
        return end.status

    async def store(self, device, iova, data):
        """Do all that a write of 4 bytes does: return its status, or the cause of a fault of its translation."""
        cookie, answer = await self.translate(device, iova)
        if answer.fault:
            return answer.cause
        assert (answer.size_log2, answer.readable, answer.writable) == (MRIF_LOG2, 0, 0), vars(answer)
        await self.hand_over(cookie, data)
        return await self.finish(cookie)

    async def records(self):
        """Return the faults that were recorded, as tuples."""
        await ClockCycles(self.dut.clk, 200)
        found = await self.perform(self.driver.read_faults())
        return [(one.cause, one.ttyp, one.device_id, one.iotval, one.iotval2) for one in found]


def copied(memory):
    """Return the interrupt files and nothing else, as a memory of its own."""
    files = GuestMemory()
    files.write(FILES, memory.read(FILES, 16 * 512))
    return files


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def messages_are_the_golden_ones(dut):
    """IOMMU-MRIF-2: random dwords, offsets, devices and entries: files and notices are the model's, other bytes are left alone; reads and
    writes are answered alike, executes and entries with reserved bits are refused; NID in all its bits."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, latency=lambda: rng.randrange(5, 40)).enable(rng)
    bench.memory.write(FILES, rng.randbytes(16 * 512))
    for table in bench.tables.values():
        for n in range(4):
            table.set(GUEST_FILES + 4096 * n, bench.entry())
    defects, stored, expected, notices = list(msi_pte_defects(bench.capabilities.switched_on(), is_mrif=True)), 0, [], []
    for step in range(150):
        device, file = rng.choice([*bench.tables]), GUEST_FILES + 4096 * rng.randrange(4)
        iova = file + rng.choice([0, 0, 0, 0, 4, 8, 4 << rng.randrange(10)])
        data = rng.choice([rng.getrandbits(11)] * 5 + [0, 1, 63, 64, 2047, 2048, rng.getrandbits(32), 1 << rng.randrange(32)])
        if step % 15 == 0:
            bench.tables[device].set(file, bench.entry())
        undo = bench.tables[device].corrupt(file, defects.pop(), bench.capabilities.switched_on()) if step % 5 == 4 and defects else None
        model, content = copied(bench.memory), data.to_bytes(4, "big" if iova & 4 and rng.random() < 0.8 else "little")
        try:
            found = bench.golden.translate(Request(device, iova, WRITE))
        except TranslationFault as refusal:
            found, cause = None, refusal.cause
            expected += [(cause, 3, device, iova, 0)] * refusal.is_logged
        if found is None:
            assert await bench.store(device, iova, content) == cause
        else:
            notice = store_msi(model, found.mrif, found.gpa, content) if found.mrif else None
            if found.mrif is None:  # a defect that makes another mode of it
                _, answer = await bench.translate(device, iova)
                assert (answer.fault, answer.page, answer.size_log2) == (0, found.spa >> 12, 12)
            else:
                assert await bench.store(device, iova, content) == BurstStatus.OK
                notices += [(notice.address, notice.data.to_bytes(4, "little"))] if notice else []
                stored += notice is not None
        assert bench.memory.read(FILES, 16 * 512) == model.read(FILES, 16 * 512), f"step {step}: {device:#x} {iova:#x} {data:#x}"
        assert [item[1:] for item in bench.writes(NOTICES, NOTICES + (1 << 20))] == notices, f"step {step}: {device:#x} {iova:#x} {data:#x}"
        if undo:
            undo()
    assert stored > 40 and not defects
    _, answer = await bench.translate(0x08, GUEST_FILES, READ)
    assert (answer.fault, answer.size_log2, answer.readable, answer.writable) == (0, MRIF_LOG2, 0, 0)
    _, answer = await bench.translate(0x08, GUEST_FILES, EXEC)
    assert (answer.fault, answer.cause) == (1, 1)
    assert await bench.records() == [*expected, (1, 1, 0x08, GUEST_FILES, 0)]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def faults_are_recorded(dut):
    """IOMMU-MRIF-3: file or notice out of reach, or beyond PAS, is 264, a poisoned file 271, with the message's IOVA, not with DTF;
    the next message is good."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut).enable(rng)
    atomic = "AMO_MRIF" in bench.features
    kinds = {"read": lambda burst: not burst.is_write and burst.atomic == AtomicKind.NONE,
             "store": lambda burst: burst.atomic != AtomicKind.NONE if atomic else burst.is_write}  # fmt: skip
    for device, table in bench.tables.items():
        entry = bench.entry(3)
        table.set(GUEST_FILES, entry)
        for kind, status, cause in (("read", BurstStatus.UR, 264), ("read", BurstStatus.POISONED, 271), ("read", BurstStatus.TIMEOUT, 264),
                                    ("store", BurstStatus.REFUSED if atomic else BurstStatus.RESET, 264), ("store", BurstStatus.UR, 264),
                                    ("notice", BurstStatus.RESET, 264)):  # fmt: skip

            def broken(burst, entry=entry, kind=kind, status=status):
                if kind == "notice":
                    return status if burst.address == entry.notice_address else BurstStatus.OK
                return status if burst.address >> 9 == entry.mrif_address >> 9 and kinds[kind](burst) else BurstStatus.OK

            bench.memory.write(FILES, bytes(16 * 512))
            bench.before, iova = broken, GUEST_FILES
            assert await bench.store(device, iova, (70).to_bytes(4, "little")) == BurstStatus.FAULT
            bench.before, seen = lambda burst: BurstStatus.OK, len(bench.writes(NOTICES, NOTICES + (1 << 20)))
            assert await bench.records() == [(cause, 3, device, iova, 0)] * (device == 0x08), (kind, status)
            assert any(bench.memory.read(FILES, 16 * 512)) == (kind == "notice")
            assert await bench.store(device, iova, (70).to_bytes(4, "little")) == BurstStatus.OK
            assert bench.memory.load_q_le(entry.mrif_address + 16) == 1 << 6
            assert len(bench.writes(NOTICES, NOTICES + (1 << 20))) == seen + 1
    assert await bench.records() == []
    far = 1 << params()["PAS"]
    assert far == 1 << bench.capabilities.PAS
    beyond = MsiPte(mrif_address=far, notice_address=NOTICES), MsiPte(mrif_address=FILES, notice_address=far)
    for entry in beyond if far < 1 << 56 else ():
        bench.tables[0x08].set(GUEST_FILES, entry)
        assert await bench.store(0x08, GUEST_FILES, bytes(4)) == BurstStatus.FAULT
        assert await bench.records() == [(264, 3, 0x08, GUEST_FILES, 0)]
    assert all(burst.address < far for _, burst, _ in bench.bursts)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def no_old_entry_behind_a_fence(dut):
    """IOMMU-MRIF-4: nothing of a file is cached; a fence behind an invalidation waits for the message under way: then its file is
    as it will be, and a new request finds the new entry."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut).enable(rng)
    table, wall = bench.tables[0x08], FILES + 0x10_0000
    for step in range(6):
        old, new = bench.entry(step), bench.entry(8 + step)
        table.set(GUEST_FILES, old)
        await bench.perform(bench.driver.submit([IotinvalGvma()]))
        await bench.perform(bench.driver.fence())
        cookie, _ = await bench.translate(0x08, GUEST_FILES)
        bench.latency = lambda: 1500  # of the file, not of the commands
        await bench.hand_over(cookie, (5).to_bytes(4, "little"))
        await ClockCycles(dut.clk, 15)
        bench.latency = lambda: 20
        table.set(GUEST_FILES, new)
        if step == 0:  # without an invalidation: what is not cached is what memory says
            assert await bench.finish(cookie) == BurstStatus.OK
            assert await bench.store(0x08, GUEST_FILES, bytes(4)) == BurstStatus.OK
            assert bench.memory.load_q_le(new.mrif_address) == 1
            continue
        ending = cocotb.start_soon(bench.finish(cookie))
        await bench.perform(bench.driver.submit([IotinvalGvma(), IofenceC(address=wall, data=step)]))
        await bench.until(lambda step=step: bench.memory.read(wall, 4) == step.to_bytes(4, "little"), "the fence")
        assert bench.memory.load_q_le(old.mrif_address) == 1 << 5
        assert [data for _, _, data in bench.writes(old.notice_address, old.notice_address + 4)] == [old.nid.to_bytes(4, "little")]
        assert await ending == BurstStatus.OK
        assert await bench.store(0x08, GUEST_FILES, (6).to_bytes(4, "little")) == BurstStatus.OK
        assert bench.memory.load_q_le(new.mrif_address) == 1 << 6


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def stores_and_notices_in_order(dut):
    """IOMMU-MRIF-5: messages handed over while one is under way wait; each file is changed before its notice, each notice before the end,
    and the end comes before the next message; requests are answered meanwhile."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, latency=lambda: 60).enable(rng)
    table, entries = bench.tables[0x08], [bench.entry(n) for n in range(4)]
    for n, entry in enumerate(entries):
        table.set(GUEST_FILES + 4096 * n, entry)
    cookies = [(await bench.translate(0x08, GUEST_FILES + 4096 * n))[0] for n in range(4)]
    begun = len(bench.bursts)
    handing = [cocotb.start_soon(bench.handed.put_many([pack(MrifWrite, cookie=cookie, data=7) for cookie in cookies]))]
    await ClockCycles(dut.clk, 20)
    await bench.translate(0x09, 0x1000, READ)
    ends = []
    for cookie in cookies:
        assert await bench.finish(cookie) == BurstStatus.OK
        ends.append(cycle())
    await handing[0]
    await RisingEdge(dut.clk)
    seen = [(when, burst.address >> 9 << 9) for when, burst, _ in bench.bursts[begun:]]
    places = [(when, address) for when, address in seen if FILES <= address < FILES + 0x1000_0000 or address >= NOTICES]
    order = [address for at, address in enumerate(one for _, one in places) if at == 0 or places[at - 1][1] != address]
    assert order == [address for entry in entries for address in (entry.mrif_address, entry.notice_address)]
    notices = [when for when, address in places if address >= NOTICES]
    assert all(notice < end < later for notice, end, later in zip(notices, ends, [*notices[1:], ends[-1] + 1]))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def nothing_of_others_is_lost(dut):
    """IOMMU-MRIF-6 (AMO_MRIF): another agent sets and clears bits between read and CAS, up to 20 times: what it did and the message are
    both there, enable bits are never touched, no plain write comes."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, latency=lambda: 8).enable(rng)
    entry = bench.entry(2)
    bench.tables[0x08].set(GUEST_FILES, entry)
    for step in range(20):
        identity, left = rng.getrandbits(11), [rng.choice([0, 1, 2, 20])]
        at, bit = entry.mrif_address + identity // 64 * 16, 1 << identity % 64
        others = rng.getrandbits(64)
        bench.memory.store_q_le(at, others)
        state = [others]

        def disturb(burst, at=at, left=left, state=state):
            if burst.atomic == AtomicKind.CAS and left[0]:
                left[0] -= 1
                state[0] ^= 1 << rng.randrange(64)
                bench.memory.store_q_le(at, state[0])
            return BurstStatus.OK

        bench.before = disturb
        assert await bench.store(0x08, GUEST_FILES, identity.to_bytes(4, "little")) == BurstStatus.OK
        assert not left[0] and bench.memory.load_q_le(at) == state[0] | bit, f"step {step}"
    assert len(bench.writes(NOTICES, NOTICES + (1 << 20))) == 20
    assert not bench.writes(FILES, FILES + 0x1000_0000)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def what_always_loses_ends(dut):
    """IOMMU-MRIF-7 (AMO_MRIF): a file that changes in front of every CAS ends in 264 after 255 of them, without a notice."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, latency=lambda: 2).enable(rng)
    entry, count = bench.entry(2), [0]
    bench.tables[0x08].set(GUEST_FILES, entry)

    def disturb(burst):
        if burst.atomic == AtomicKind.CAS:
            count[0] += 1
            bench.memory.store_q_le(entry.mrif_address, 2 * count[0])
        return BurstStatus.OK

    bench.before = disturb
    assert await bench.store(0x08, GUEST_FILES, bytes(4)) == BurstStatus.FAULT
    assert count[0] == ATTEMPTS and bench.memory.load_q_le(entry.mrif_address) == 2 * ATTEMPTS
    assert not bench.writes(NOTICES, NOTICES + (1 << 20))
    assert await bench.records() == [(264, 3, 0x08, GUEST_FILES, 0)]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def debug_requests_are_refused(dut):
    """IOMMU-MRIF-8 (DBG): a debug request to an interrupt file in memory is answered with a fault and recorded with 260."""
    bench = await Bench(dut).enable(random.Random(cocotb.RANDOM_SEED))
    bench.tables[0x08].set(GUEST_FILES, bench.entry())
    bench.tables[0x08].set(GUEST_FILES + 0x1000, MsiPte(spa=0x7000))
    for iova, response in ((GUEST_FILES, 1), (GUEST_FILES + 0x1000, 7 << 10)):
        await bench.bus.write(IOVA, iova, 8)
        await bench.bus.write(CTL, 0x08 << 40 | 1, 8)
        while await bench.bus.read(CTL, 8) & 1:
            pass
        assert await bench.bus.read(RESPONSE, 8) == response
    assert await bench.records() == [(260, 3, 0x08, GUEST_FILES, 0)]
