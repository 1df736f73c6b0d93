"""A whole IOMMU made of the models: registers, translation, queues and interrupts, without a clock.

What hardware does by itself happens in the calls that say so (`run_commands`, `translate_for_debug`, `send_interrupts`),
so that a test is the clock. [RVIOMMU1.0]
"""

from __future__ import annotations

from ..memory import AccessFault, Iova
from .ats import PageRequest, PageRequestQueue, PrgResponse, TranslationCompletion, napot_page, translation_completion
from .commands import Command, CommandQueue
from .faults import AccessType, Cause, FaultQueue, FaultRecord, TransactionType, TranslationFault
from .msi import Notice
from .registers import Capabilities, InterruptMessage, RegisterFile
from .tables import Memory
from .walk import UNTRANSLATED_SIZE, Implementation, Iommu, Request, Translation

__all__ = ["Unit"]


class Unit:
    """An IOMMU in a system: what requests, messages and software see of it.

    Parameters
    ----------
    memory : :class:`Memory`
        Tables, queues and where interrupts go.
    capabilities : :class:`Capabilities`
    implementation : :class:`Implementation`
    registers : dict
        More options of `RegisterFile`.

    Attributes
    ----------
    registers, iommu, commands, faults, page_requests
        The parts, of `RegisterFile`, `Iommu`, `CommandQueue`, `FaultQueue` and `PageRequestQueue`.
    """

    def __init__(self, memory: Memory, capabilities: Capabilities = Capabilities(), *, implementation: Implementation = Implementation(),
                 **registers):
        self.memory = memory
        self.registers = RegisterFile(capabilities, gxl_writable=implementation.gxl_writable, **registers)
        self.iommu = Iommu(memory, capabilities, registers=self.registers, implementation=implementation)
        self.commands, self.faults = CommandQueue(self.registers, memory), FaultQueue(self.registers, memory)
        self.page_requests = PageRequestQueue(self.registers, memory, self.iommu, self.faults)

    def translate(self, request: Request) -> Translation:
        """Translate a request, record its fault and count its events; raises `TranslationFault` as `Iommu` does."""
        try:
            return self.iommu.translate(request)
        except TranslationFault as fault:
            self._report(self.iommu.record(request, fault))
            raise
        finally:
            self.registers.count(self.iommu.events)

    def write_msi(self, request: Request, data: bytes) -> Notice | None:
        """Do what a write of ``data`` to an interrupt file in memory does, its notice included, which it returns.

        A notice that cannot be written is cause 264 too: no text says more. Errors as of `Iommu.write_msi`, recorded.
        """
        try:
            notice = self.iommu.write_msi(request, data)
            if notice is not None:
                try:
                    self.memory.write(notice.address, notice.data.to_bytes(4, "little"))
                except AccessFault as error:
                    raise TranslationFault(Cause.MRIF_ACCESS_FAULT, request.iova, dtf=self.iommu.context.DTF) from error
            return notice
        except TranslationFault as fault:
            self._report(self.iommu.record(request, fault))
            raise
        finally:
            self.registers.count(self.iommu.events)

    def complete(self, request: Request) -> TranslationCompletion:
        """Answer a translation request (kind ATS), recording and counting likewise. [RVIOMMU1.0 3.6]"""
        completion, record = translation_completion(self.iommu, request)
        self._report(record)
        self.registers.count(self.iommu.events)
        return completion

    def receive(self, message: PageRequest) -> PrgResponse | None:
        """Take a page request, counting its walk of the directory. [RVIOMMU1.0 3.7, 6.23]"""
        response = self.page_requests.receive(message)
        self.registers.count(self.iommu.events)
        return response

    def run_commands(self) -> list[Command]:
        """Process commands until there is none, or the queue stops or waits; return them."""
        done = []
        while command := self.commands.step():
            done.append(command)
        return done

    def translate_for_debug(self) -> bool:
        """Do what tr_req_ctl.Go asks for; False when it asks for nothing. [RVIOMMU1.0 5]

        It is an untranslated request; without NW it is a write, which no entry permits without reading.
        """
        asked = self.registers.debug_request
        if asked is None:
            return False
        iova, ctl = asked
        pid = ctl >> 12 & 0xFFFFF if ctl >> 32 & 1 else None
        access = AccessType.EXEC if ctl >> 2 & 1 else AccessType.READ if ctl >> 3 & 1 else AccessType.WRITE
        request, response = Request(ctl >> 40, Iova(iova), access, pid, bool(ctl >> 1 & 1)), 1
        try:
            found = self.iommu.translate(request)
            if found.mrif is not None:
                raise TranslationFault(Cause.TRANSACTION_TYPE_DISALLOWED, iova, dtf=self.iommu.context.DTF)
            size = self.iommu.implementation.bare_size if found.size == UNTRANSLATED_SIZE else found.size
            page, s = napot_page(found.spa, size)
            response = (page & (1 << 44) - 1) << 10 | s << 9 | found.pbmt << 7
        except TranslationFault as fault:
            self._report(self.iommu.record(request, fault))
        self.registers.count(self.iommu.events)
        self.registers.debug_done(response)
        return True

    def send_interrupts(self) -> list[InterruptMessage]:
        """Write the messages that are due, and return them; one that cannot be written is recorded. [RVIOMMU1.0 6.29]"""
        sent = []
        while self.registers.messages:
            message = self.registers.messages.pop(0)
            sent.append(message)
            try:
                self.memory.write(message.address, message.data.to_bytes(4, "big" if message.order == "big" else "little"))
            except AccessFault:
                self._report(FaultRecord(cause=Cause.IOMMU_MSI_WRITE_ACCESS_FAULT, ttyp=TransactionType.NONE, iotval=message.address))
        return sent

    def _report(self, record: FaultRecord | None) -> None:
        if record is not None:
            self.faults.report(record)
