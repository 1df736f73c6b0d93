"""What is around a translator in a simulation: memory with tables, whoever asks, the golden walk beside it."""

import random

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ..models.iommu.ats import AtsStatus, translation_completion
from ..models.iommu.entries import PTE_A, PTE_D, PTE_V
from ..models.iommu.faults import AccessType, TranslationFault
from ..models.iommu.registers import Capabilities
from ..models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, PageTable
from ..models.iommu.walk import Iommu, PlainRegisters, Request, RequestKind
from ..models.memory import AccessFault, GuestMemory
from ..rtl.iommu.features import Features
from ..rtl.iommu.layouts import (
    FaultReport,
    Invalidate,
    InvalidateKind,
    Kind,
    MemoryRead,
    MemoryReadData,
    MemoryUpdate,
    MrifTarget,
    request_layout,
    response_layout,
)
from ..rtl.spec.riscv_iommu import MRIF_LOG2
from ..rtl.tlp.layouts import BurstStatus
from .run import params
from .stream import Stream, cycle, pack, random_ready, start, unpack

__all__ = ["TranslatorBench"]

POOL, POOL_BYTES = 0x8000_0000, 0x400_0000
READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
KINDS = {RequestKind.UNTRANSLATED: Kind.UNTRANSLATED, RequestKind.TRANSLATED: Kind.TRANSLATED, RequestKind.ATS: Kind.TRANSLATION}


class Shadow:
    """Memory as it is, but for what was written here: for a golden walk that sets A and D without doing the circuit's work.

    ``refused``: addresses that cannot be written, with the reason.
    """

    def __init__(self, memory):
        self.memory, self.written, self.refused = memory, {}, {}

    def read(self, address, length):
        content = self.memory.read(address, length)
        words = (self.written.get(at, content[at - address : at - address + 8]) for at in range(address, address + length, 8))
        return b"".join(words)

    def write(self, address, content):
        if address in self.refused:
            raise AccessFault(address, len(content), True, self.refused[address])
        self.memory.check(address, len(content), is_write=True)
        self.written[address] = bytes(content)


class TranslatorBench:
    """Drives a :class:`ringwall.rtl.iommu.translator.Translator` on memory of its own, and compares it with the golden walk.

    ``dut`` is the circuit. Parameters of the run are ``levels``, of the device directory, and ``features``, names of capabilities.
    ``latency`` gives the cycles from a read to its data; ``read_count`` counts reads, ``times`` has the cycles of answers since it was
    cleared. With AMO_HWAD: ``disturb(update)`` comes between the read of an entry and its update and returns the status of the update;
    ``updates`` are the addresses of those that were done, ``update_count`` counts all.
    """

    def __init__(self, dut):
        self.dut, self.latency, self.disturb = dut, lambda: 10, lambda update: BurstStatus.OK

    async def begin(self):
        """Reset; the directory is there and empty."""
        dut = self.dut
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.memory = GuestMemory(all_ram=False)
        self.memory.add_range(POOL, POOL_BYTES)
        self.allocator = Allocator(self.memory, POOL, POOL_BYTES, rng=self.rng)
        self.capabilities = Capabilities(**dict.fromkeys(params().get("features", ()), True))
        self.features = self.capabilities.switched_on()
        features = Features(**dict.fromkeys(params().get("features", ()), True))
        self._request, self._response = request_layout(features), response_layout(features)
        self.directory = DeviceDirectory(self.memory, self.allocator, levels=params()["levels"], features=self.features,
                                         extended=self.capabilities.MSI_FLAT)  # fmt: skip
        self.shadow, self.updates, self.update_count = Shadow(self.memory), [], 0
        self.golden = Iommu(self.shadow, self.capabilities, registers=PlainRegisters(ddtp=self.directory.ddtp))
        self.request, self.response, reads, self.data, faults, self.invalidations = await start(
            dut, "request", "response", "memory_read", "memory_read_data", "faults", "invalidate")
        dut.ddtp_mode.value = self.directory.ddtp & 0xF
        dut.ddtp_ppn.value = self.directory.ddtp >> 10
        if self.capabilities.AMO_HWAD:
            dut.atomics.value = 1
            orders = Stream(dut, "memory_update")
            cocotb.start_soon(random_ready(orders, random.Random(cocotb.RANDOM_SEED), 0.7))
            cocotb.start_soon(orders.watch(self))
        self.files = []
        if self.capabilities.MSI_MRIF:
            files = Stream(dut, "mrif")
            files.set_ready(1)
            cocotb.start_soon(files.watch(self.files))
        self.response.set_ready(1)
        faults.set_ready(1)
        reads.set_ready(1)
        self.answers, self.times, self.reports, self.reads, self.due = [], [], [], [], []
        cocotb.start_soon(self.response.watch(self.answers, self.times))
        cocotb.start_soon(faults.watch(self.reports))
        cocotb.start_soon(reads.watch(self.reads))
        cocotb.start_soon(self.serve())
        self.read_count = 0

    def append(self, payload):
        """Do an update."""
        update = unpack(MemoryUpdate, payload)
        bits = update.swap & ~update.compare
        assert update.compare & PTE_V and update.swap == update.compare | bits and bits in (PTE_A, PTE_D, PTE_A | PTE_D), vars(update)
        self.update_count += 1
        status, found = self.disturb(update), self.memory.load_q_le(update.address)
        if status == BurstStatus.OK and found == update.compare:
            self.memory.store_q_le(update.address, update.swap)
            self.updates.append(update.address)
        self.due.append((cycle() + self.latency(), update, found.to_bytes(8, "little"), status))

    def check_updates(self):
        """Compare what was updated with what the golden walk has updated since the last call.

        Any entry of a NAPOT page may have been the one. [RVPRIV 11]
        """
        found = {address: self.memory.load_q_le(address) for address in self.updates}
        wanted = {address: int.from_bytes(content, "little") for address, content in self.shadow.written.items()}
        for address, entry in list(wanted.items()):
            if entry >> 63 and address not in found:
                block = address & -128
                others = [self.memory.load_q_le(at) for at in range(block, block + 128, 8)]
                assert any(other & ~PTE_D == entry & ~PTE_D and other & entry & PTE_D == entry & PTE_D for other in others), hex(address)
                del wanted[address]
        assert found == wanted, f"{found}, not {wanted}"
        self.updates.clear()
        self.shadow.written.clear()

    async def serve(self):
        """Answer memory reads out of order, each after a latency of its own, with what is there when they come."""
        while True:
            while self.reads:
                read = unpack(MemoryRead, self.reads.pop(0))
                self.read_count += 1
                try:
                    raw, status = self.memory.read(read.address, read.length_bytes), BurstStatus.OK
                except AccessFault as fault:
                    raw, status = bytes(8), BurstStatus.POISONED if fault.reason == "poisoned" else BurstStatus.UR
                self.due.append((cycle() + self.latency(), read, raw, status))
            ready = [item for item in self.due if item[0] <= cycle()]
            if not ready:
                await self.data._edge
                continue
            self.due.remove(ready[0])
            _, order, raw, status = ready[0]
            words = [raw[n : n + 8] for n in range(0, len(raw), 8)]
            await self.data.put_many(
                pack(MemoryReadData, cookie=order.cookie, data=int.from_bytes(word, "little"), last=n == len(words) - 1,
                     status=status if n == len(words) - 1 else BurstStatus.OK)
                for n, word in enumerate(words))

    async def ask(self, *request, **more):
        """Offer a request, as of `packed`, until it is taken."""
        await self.request.put(self.packed(*request, **more))

    def packed(self, cookie, device, iova, access=READ, pid=None, priv=False, **more):
        fields = {"is_write": access is WRITE, "execute": access is EXEC} | more
        return pack(self._request, device_id=device, page=iova >> 12, offset=iova & 0xFFF, cookie=cookie, process_id_valid=pid is not None,
                    process_id=pid or 0, privileged=priv, **fields)  # fmt: skip

    async def ask_for(self, cookie, request):
        """Offer a request of the golden model until it is taken."""
        more = {"kind": KINDS[request.kind], "is_CXL": request.is_cxl} if self.capabilities.ATS else {}
        if request.kind is RequestKind.ATS:
            more["is_write"] = not request.no_write
        await self.ask(cookie, request.device_id, request.iova, request.access, request.pid, request.priv, **more)

    async def forget(self, kind=InvalidateKind.ALL, **operands):
        """Have an invalidation taken."""
        await self.invalidations.put(pack(Invalidate, kind=kind, **operands))

    async def answered(self, count, cycles=4000):
        """Return ``count`` answers or more, in the order in which they come, within ``cycles``."""
        begun = cycle()
        while len(self.answers) < count:
            await RisingEdge(self.dut.clk)
            assert cycle() - begun < cycles, f"{len(self.answers)} of {count} answers"
        found = [unpack(self._response, payload) for payload in self.answers]
        self.answers.clear()
        return found

    def expected(self, device, iova, access, pid=None, priv=False):
        """Return the golden translation, or the fault."""
        try:
            return self.golden.translate(Request(device, iova, access, pid, priv))
        except TranslationFault as fault:
            return fault

    def outcome(self, request):
        """Return the golden translation, the fault or (of a translation request) the completion of ``request``; and its record, or None."""
        if request.kind is RequestKind.ATS:
            return translation_completion(self.golden, request)
        try:
            return self.golden.translate(request), None
        except TranslationFault as fault:
            return fault, self.golden.record(request, fault)

    def judge_completion(self, answer, wanted, request):
        """Check what a translation request was answered against ``wanted``, a result of `outcome`."""
        what = f"{request}: {vars(answer)}, not {wanted}"
        assert answer.status.name == wanted.status.name and answer.fault == (wanted.status is not AtsStatus.SUCCESS), what
        if answer.fault:
            return
        assert answer.readable == wanted.readable and answer.executable == wanted.executable, what
        is_open = self.capabilities.AMO_HWAD and (answer.size_log2 == 16 or answer.writable < wanted.writable)  # others set D, too
        assert answer.writable == wanted.writable or is_open, what
        assert answer.privileged == wanted.privileged, what
        if answer.readable or answer.writable:
            assert answer.size_log2 >= 12 and wanted.size >> answer.size_log2, what
            assert answer.page == (wanted.address | request.iova & wanted.size - 1) >> 12, what
            assert (answer.is_global, answer.CXL_io, answer.untranslated_only) == (
                wanted.is_global, wanted.cxl_io, wanted.untranslated_only), what

    def judge(self, answer, wanted, what):
        """Check ``answer`` against ``wanted``, a result of `expected`."""
        if isinstance(wanted, TranslationFault):
            assert answer.fault and answer.cause == wanted.cause, f"{what}: {vars(answer)}, not {wanted!r}"
            return
        assert not answer.fault, f"{what}: {vars(answer)}, not {wanted!r}"
        assert (answer.size_log2 == MRIF_LOG2) == (wanted.mrif is not None), f"{what}: {vars(answer)}, not {wanted!r}"
        if wanted.mrif:
            file = next(file for file in (unpack(MrifTarget, one) for one in reversed(self.files)) if file.cookie == answer.cookie)
            found = file.address << 9, file.NPPN << 12, file.NID
            assert found == (wanted.mrif.address, wanted.mrif.notice_address, wanted.mrif.nid), what
            assert not (answer.readable or answer.writable), f"{what}: {vars(answer)}"
            return
        assert answer.page == wanted.spa >> 12, f"{what}: {vars(answer)}, not {wanted!r}"
        assert wanted.pbmt == answer.PBMT, f"{what}: {vars(answer)}, not {wanted!r}"
        writable = wanted.writable or (self.capabilities.AMO_HWAD and answer.size_log2 == 16)  # by D of another entry of the NAPOT page
        assert answer.readable <= wanted.readable and answer.writable <= writable, f"{what}: {vars(answer)}, not {wanted!r}"
        assert wanted.size >> answer.size_log2 or answer.size_log2 == 63, f"{what}: {vars(answer)}, not {wanted!r}"

    async def check(self, device, iova, access=READ, pid=None, priv=False, wanted=None):
        """Ask, compare answer, fault report and updates with the golden walk, now or ``wanted``; return the cause or 0."""
        self.reports.clear()
        wanted, what = wanted or self.expected(device, iova, access, pid, priv), f"{device:#x} {iova:#x} {access} {pid} {priv}"
        await self.ask(1, device, iova, access, pid, priv)
        (answer,) = await self.answered(1)
        await ClockCycles(self.dut.clk, 4)
        self.judge(answer, wanted, what)
        self.check_updates()
        is_logged = isinstance(wanted, TranslationFault) and wanted.is_logged
        assert len(self.reports) == is_logged, what
        if is_logged:
            report = unpack(FaultReport, self.reports[0])
            assert (report.cause, report.device_id, report.iotval) == (wanted.cause, device, iova), what
            assert report.iotval2 == wanted.iotval2, f"{what}: {report.iotval2:#x}, not {wanted.iotval2:#x}"
            assert (report.process_id_valid, report.process_id, report.privileged) == (pid is not None, pid or 0, pid is not None and priv)
            assert report.ttyp == {EXEC: 1, READ: 2, WRITE: 3}[access], what
        return int(wanted.cause) if isinstance(wanted, TranslationFault) else 0

    def device(self, number, PSCID, **options):
        """Give a device a first stage of its own; return its table."""
        table = PageTable(self.memory, self.allocator)
        self.directory.set(number, DeviceContext.sv39(table.root, PSCID=PSCID, **options))
        return table
