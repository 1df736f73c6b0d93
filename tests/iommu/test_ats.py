"""Translation requests, translated requests and page-request look-ups at the translator, beside the golden model. [RVIOMMU1.0 3.6, 3.7]"""

from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.iommu.ats import AtsStatus
from ringwall.models.iommu.entries import PTE_G, SV39X4, MsiPte
from ringwall.models.iommu.faults import AccessType
from ringwall.models.iommu.tables import Allocator, DeviceContext, GuestView, MsiTable, PageTable, ProcessContext, ProcessDirectory
from ringwall.models.iommu.walk import Request, RequestKind
from ringwall.rtl.config import IommuConfig
from ringwall.rtl.iommu.features import Features
from ringwall.rtl.iommu.layouts import FaultReport, InvalidateKind, Kind
from ringwall.rtl.iommu.translator import Translator
from ringwall.sim.run import run
from ringwall.sim.stream import unpack
from ringwall.sim.translator_bench import TranslatorBench

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
ATS, TRANSLATED, UNTRANSLATED = RequestKind.ATS, RequestKind.TRANSLATED, RequestKind.UNTRANSLATED
FEATURES = ["Svpbmt", "Sv39x4", "PD8", "MSI_FLAT", "ATS", "T2GPA"]
POOL, GUEST, MSI = 0x20_0000, 0x4000_0000, 0x2800_0000
PID = 5


TESTS = ["permissions_are_collected", "failures_are_classed", "translated_requests", "global_pointers", "contexts_for_messages"]


def test_ats(request):
    run(Translator(features=Features(**dict.fromkeys(FEATURES, True))), module=__name__, node=request.node.nodeid,
        params={"features": FEATURES, "levels": 2}, testcase=TESTS)  # fmt: skip


def test_ats_without_guest_addresses(request):
    run(Translator(features=Features(ATS=True, Sv39x4=True)), module=__name__, node=request.node.nodeid,
        params={"features": ["ATS", "Sv39x4"], "levels": 1}, testcase="bits_of_contexts")  # fmt: skip


def test_ats_is_possible():
    """IOMMU-ATS-7: guest addresses without ATS or a second stage, and ATS of a card, are refused with a sentence."""
    for bad, message in (({"T2GPA": True, "Sv39x4": True}, "ATS must be there for T2GPA"),
                         ({"T2GPA": True, "ATS": True}, "Sv39x4 must be there for T2GPA")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Features(**bad)
    with pytest.raises(ValueError, match=r"ATS of a PCIe function must be off, .* not True"):
        IommuConfig(ATS=True)


class Bench(TranslatorBench):
    """Device 3: a process in a guest, with page 0x1000 to 0x9000 of different permissions, each 4 KiB at GUEST plus the same, and MSIs.

    Device 4: one stage, without processes. ``set`` rewrites the context of device 3.
    """

    PAGES = {0x1000: "rwxu", 0x2000: "ru", 0x3000: "rxu", 0x4000: "xu", 0x5000: "rwx", 0x6000: "rwu"}

    async def enable(self):
        await self.begin()
        self.latency = lambda: 2
        memory, allocator = self.memory, self.allocator
        self.second = PageTable(memory, allocator, scheme=SV39X4, features=self.features)
        for n in range(24):
            self.second.map_page(POOL + (n << 12), allocator.page(), perms="rwxu")
        for n in range(16):
            self.second.map_page(GUEST + (n << 12), 0x77_0000_0000 + (n << 13), perms="rwxu", pbmt=n % 3)
        view = GuestView(memory, self.second)
        guest = Allocator(view, POOL, 24 << 12, rng=self.rng)
        self.first = PageTable(view, guest, features=self.features)
        for iova, perms in self.PAGES.items():
            self.first.map_page(iova, GUEST + iova, perms=perms, g=iova == 0x6000)
        self.first.map_page(0x8000, MSI, perms="rwxu", g=True)
        self.processes = ProcessDirectory(view, guest, levels=1, features=self.features)
        self.process = ProcessContext(ENS=True, SUM=True, PSCID=7, fsc_mode=self.first.scheme.mode, fsc_ppn=self.first.root >> 12)
        self.processes.set(PID, self.process)
        self.messages = MsiTable(memory, allocator, mask=3, pattern=MSI >> 12)
        self.messages.set(MSI, MsiPte(spa=0x9900_0000))
        context = DeviceContext.process_directory(self.processes.pdtp, EN_ATS=True, T2GPA=True)
        self.context = context.with_second_stage(SV39X4, self.second.root, GSCID=9).with_msi_table(
            self.messages.root, mask=3, pattern=MSI >> 12)  # fmt: skip
        self.set()
        self.alone = self.device(4, PSCID=3, EN_ATS=True)
        self.alone.map_page(0x1000, 0x1234_5000, perms="rwu")
        return self

    def set(self, **changes):
        self.directory.set(3, replace(self.context, **changes))

    async def compare(self, device, iova, access=READ, pid=None, priv=False, kind=ATS, **more):
        """Ask; compare answer and report with the golden model; return (cause of the report or 0, golden outcome, answer)."""
        request = Request(device, iova, access, pid, priv, kind, **more)
        self.reports.clear()
        wanted, record = self.outcome(request)
        await self.ask_for(1, request)
        (answer,) = await self.answered(1)
        await ClockCycles(self.dut.clk, 4)
        if kind is ATS:
            self.judge_completion(answer, wanted, request)
        else:
            self.judge(answer, wanted, str(request))
        found = [unpack(FaultReport, report) for report in self.reports]
        assert [(r.cause, r.ttyp, r.iotval, r.iotval2, r.device_id) for r in found] == (
            [] if record is None else [(record.cause, record.ttyp, record.iotval, record.iotval2, device)]), str(request)
        return (int(record.cause) if record else 0), wanted, answer


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def permissions_are_collected(dut):
    """IOMMU-ATS-1: R W X Priv Global CXL.io of each kind of page, privilege, NW, Exe, SUM, with and without T2GPA [RVIOMMU1.0 3.6]."""
    bench = await Bench(dut).enable()
    seen = set()
    for SUM in (True, False):
        bench.processes.set(PID, replace(bench.process, SUM=SUM))
        for T2GPA in (True, False):
            bench.set(T2GPA=T2GPA)
            await bench.forget()
            for iova in (*bench.PAGES, 0x8000, 0x9000):
                for priv, access in ((False, READ), (False, EXEC), (True, READ), (True, EXEC)):
                    _, wanted, answer = await bench.compare(3, iova + 0x18, access, PID, priv, no_write=bool(iova & 0x1000), is_cxl=True)
                    seen.add((wanted.readable, wanted.writable, wanted.executable, wanted.privileged))
                    if wanted.readable:
                        assert (answer.page == GUEST + iova >> 12) == (T2GPA and iova < 0x8000)
    assert {(True, True, True, False), (True, False, True, False), (True, True, False, True), (False, False, False, True)} <= seen
    await bench.compare(3, 0x1234_5000, EXEC, None, True)  # no process: the first stage is Bare, and Priv 0
    await bench.compare(4, 0x1000)
    _, wanted, answer = await bench.compare(4, 0x2000)
    assert wanted.status is AtsStatus.SUCCESS and not answer.readable, "a page that is not there is no failure"


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def failures_are_classed(dut):
    """IOMMU-ATS-2: each class of fault of a translation request: SC without access and no record, UR, CA with one, none with DTF."""
    bench = await Bench(dut).enable()
    good = bench.context
    ddtp, seen = bench.golden.registers.ddtp, {}

    async def ask(*request):
        await bench.forget()
        cause, wanted, _ = await bench.compare(*request)
        seen.setdefault(wanted.status, set()).add(cause)
        return cause

    for DTF in (False, True):
        bench.context = replace(good, DTF=DTF)
        bench.set()
        for mode in (0, 1):
            bench.golden.registers.ddtp, dut.ddtp_mode.value = mode, mode
            assert await ask(3, 0x1000, READ, PID) == (256, 260)[mode]
        bench.golden.registers.ddtp, dut.ddtp_mode.value = ddtp, ddtp & 15
        assert await ask(1 << 20, 0x1000) == 260
        assert await ask(7, 0x1000) == 258
        for changes, cause in (({"EN_ATS": False, "T2GPA": False}, 260), ({"PDTV": False, "fsc_mode": 0}, 260),
                               ({"msiptp_ppn": 0x40}, 261), ({"fsc_ppn": MSI >> 12}, 0)):  # fmt: skip
            bench.set(**changes)
            assert await ask(3, 0x8000, READ, PID) == (0 if DTF else cause)
        bench.set()
        for name in ("TC_EN_PRI_SET", "TC_PRPR_SET", "TC_T2GPA_SET", "TC_T2GPA_WITHOUT_SECOND_STAGE"):
            undo = bench.directory.corrupt(3, name)
            assert await ask(3, 0x1000, READ, PID) == 259
            undo()
        for place, cause in ((bench.second.spa_of(bench.processes.entry_address(PID)), 269),
                             (bench.second.spa_of(bench.first._slot(0x1000, 0)), 274),
                             (bench.messages.entry_address(MSI), 270), (bench.directory.entry_address(3), 268)):  # fmt: skip
            bench.memory.poison(place, 8)
            assert await ask(3, 0x8000 if cause == 270 else 0x1000, READ, PID) == (0 if DTF and cause != 268 else cause)
            bench.memory.unpoison(place, 8)
        bench.messages.set(MSI, MsiPte(V=False))
        assert await ask(3, 0x8000, READ, PID) == 0, "262"
        bench.messages.set(MSI, MsiPte(spa=0x9900_0000))
        bench.processes.set(PID, ProcessContext(V=False))
        assert await ask(3, 0x1000, READ, PID) == 0, "266"
        bench.processes.set(PID, replace(bench.process, ENS=False))
        assert await ask(3, 0x1000, READ, PID, True) == (0 if DTF else 260)
        bench.processes.set(PID, replace(bench.process, fsc_ppn=1 << 40))
        assert await ask(3, 0x1000, EXEC, PID) == 0, "20"
        bench.processes.set(PID, bench.process)
    assert seen[AtsStatus.COMPLETER_ABORT] >= {261, 269, 274, 270, 268} and seen[AtsStatus.UNSUPPORTED_REQUEST] >= {256, 258, 260}
    bench.set()
    await bench.forget()
    await bench.compare(3, 0x1000, READ, PID)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def translated_requests(dut):
    """IOMMU-ATS-3: translated requests pass, or with T2GPA are looked up in the second stage alone; refused without EN_ATS; TTYP 5 to 7."""
    bench = await Bench(dut).enable()
    pages = [bench.rng.getrandbits(52) << 12 for _ in range(40)]
    await bench.compare(4, pages[0], WRITE, kind=TRANSLATED)
    bench.read_count = 0
    bench.times.clear()
    await bench.request.put_many(bench.packed(n, 4, page, WRITE, kind=Kind.TRANSLATED) for n, page in enumerate(pages))
    assert [answer.page << 12 for answer in await bench.answered(40)] == pages and bench.read_count == 0
    assert bench.times[-1] - bench.times[0] == 39, "one per cycle"
    for access in (READ, WRITE, EXEC):
        for iova in (GUEST + 0x2000, GUEST + 0xFFFF_0000, MSI + 8, 1 << 41):
            for pid, priv in ((None, False), (PID, True)):
                await bench.compare(3, iova, access, pid, priv, kind=TRANSLATED)
    bench.read_count = 0
    _, wanted, _ = await bench.compare(3, GUEST + 0x2000, kind=TRANSLATED)
    assert wanted.spa == 0x77_0000_4000 and bench.read_count == 0, "it is remembered"
    await bench.compare(3, GUEST + 0x2000)
    assert bench.read_count, "translation requests ask memory"
    bench.read_count = 0
    await bench.compare(3, GUEST + 0x2000, kind=UNTRANSLATED)
    assert bench.read_count == 0, "without a first stage both go the same way"
    await bench.forget()
    await bench.compare(3, GUEST + 0x3000)
    bench.read_count = 0
    await bench.compare(3, GUEST + 0x3000, kind=UNTRANSLATED)
    assert bench.read_count == 1, "translation requests fill no IOTLB"
    bench.set(T2GPA=False)
    await bench.forget(InvalidateKind.DDT)
    await bench.compare(3, GUEST + 0x3000, kind=UNTRANSLATED)
    for _ in range(2):
        await bench.compare(3, GUEST + 0x3000, kind=TRANSLATED)
    bench.set()
    await bench.forget(InvalidateKind.DDT)
    await bench.compare(3, 0x1000, pid=PID, kind=UNTRANSLATED)
    await bench.compare(3, 0x1000, pid=PID, kind=TRANSLATED)
    await bench.forget()
    await bench.compare(3, 0x1000, pid=0x100, kind=TRANSLATED)
    for device in (3, 4):
        bench.directory.set(device, replace(bench.context, EN_ATS=False, T2GPA=False) if device == 3 else DeviceContext())
        for _ in range(2):
            await bench.forget()
            assert [(await bench.compare(device, GUEST, access, kind=TRANSLATED))[0] for access in (READ, WRITE, EXEC) * 2] == [260] * 6
    for mode, cause in ((0, 256), (1, 260)):
        bench.golden.registers.ddtp, dut.ddtp_mode.value = mode, mode
        assert (await bench.compare(4, 0x1000, WRITE, kind=TRANSLATED))[0] == cause


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def global_pointers(dut):
    """IOMMU-ATS-4: G of an entry that leads to a leaf table makes its pages global, also when the walker remembers the table."""
    bench = await Bench(dut).enable()
    table, pid = bench.first, PID
    for n in range(4):
        table.map_page(0x4000_0000 + (n << 12), GUEST + (n << 12), perms="rwu")
    memory, found = table.memory, []
    for is_global in (False, True, False):
        for level in (1, 2):
            at = table._slot(0x4000_0000, level)
            old = int.from_bytes(memory.read(at, 8), "little")
            memory.write(at, (old | PTE_G * is_global).to_bytes(8, "little"))
            await bench.forget()
            found += [(await bench.compare(3, 0x4000_0000 + (n << 12), READ, pid))[2].is_global for n in range(4)]
            memory.write(at, old.to_bytes(8, "little"))
    assert found == [0] * 8 + [1] * 8 + [0] * 8
    at = table._slot(0x4000_0000, 2)
    memory.write(at, (int.from_bytes(memory.read(at, 8), "little") | PTE_G).to_bytes(8, "little"))
    await bench.forget()
    assert (await bench.compare(3, 0x4000_0000, READ, PID))[2].is_global
    bench.processes.set(PID, replace(bench.process, fsc_mode=0))  # its tables are still remembered
    await bench.forget(InvalidateKind.PDT)
    assert not (await bench.compare(3, 0x4000_0000, READ, PID))[2].is_global
    bench.processes.set(PID, bench.process)
    await bench.forget()
    assert not (await bench.compare(3, 0x1000, READ, PID))[2].is_global


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def contexts_for_messages(dut):
    """IOMMU-ATS-5: whether a device may send page requests: 256 to 260 with TTYP 9 where not; PRPR where it may."""
    bench = await Bench(dut).enable()
    ddtp = bench.golden.registers.ddtp

    async def ask(device, cause, PRPR=0, is_logged=True):
        bench.reports.clear()
        await bench.ask(9, device, 4, pid=PID, priv=True, kind=Kind.MESSAGE)
        (answer,) = await bench.answered(1)
        await ClockCycles(dut.clk, 4)
        assert (answer.kind, answer.fault, answer.PRPR) == (Kind.MESSAGE, cause != 0, PRPR)
        assert not cause or answer.cause == cause
        found = [unpack(FaultReport, report) for report in bench.reports]
        assert [(r.cause, r.ttyp, r.iotval, r.process_id, r.privileged) for r in found] == [(cause, 9, 4, PID, 1)] * (cause and is_logged)

    for mode, cause in ((0, 256), (1, 260)):
        dut.ddtp_mode.value = mode
        await ask(3, cause)
    dut.ddtp_mode.value = ddtp & 15
    await ask(1 << 16, 260)
    await ask(7, 258)
    for fields, cause, PRPR in (({}, 260, 0), ({"EN_PRI": True}, 0, 0), ({"EN_PRI": True, "PRPR": True}, 0, 1), ({"PRPR": True}, 259, 0),
                                ({"EN_PRI": True, "EN_ATS": False, "T2GPA": False}, 259, 0), ({"DTF": True}, 260, 0)):  # fmt: skip
        bench.set(**fields)
        await bench.forget()
        for _ in range(2):
            await ask(3, cause, PRPR, cause != 260 or "DTF" not in fields)
    bench.context = replace(bench.context, PDTV=False, fsc_mode=0, EN_PRI=True)  # process_ids do not matter
    bench.set()
    await bench.forget()
    await ask(3, 0)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def bits_of_contexts(dut):
    """IOMMU-ATS-6: every check of EN_ATS, EN_PRI, PRPR and T2GPA, which is not there, and what passes them [RVIOMMU1.0 3.1.4]."""
    bench = TranslatorBench(dut)
    await bench.begin()
    second = PageTable(bench.memory, bench.allocator, scheme=SV39X4)
    names, seen = ("EN_ATS", "EN_PRI", "T2GPA", "PRPR"), set()
    for bits in range(16):
        fields = {name: bool(bits >> n & 1) for n, name in enumerate(names)}
        for context in (DeviceContext(**fields), DeviceContext(**fields).with_second_stage(SV39X4, second.root, GSCID=1)):
            bench.directory.set(3, context)
            await bench.forget()
            seen.add((bits, await bench.check(3, 0x5000)))
    assert {bits for bits, cause in seen if cause != 259} == {0, 0b0001, 0b0011, 0b1011}
