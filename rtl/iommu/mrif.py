"""Messages recorded in memory: the interrupt files of guests that have none in hardware. [RVIOMMU1.0 3.3.3] [AIA1.0 8.5.2]"""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import riscv_iommu as spec
from ..tlp.layouts import BurstStatus
from .gate import COOKIES
from .layouts import (
    FaultReport,
    MemoryRead,
    MemoryReadData,
    MemoryUpdate,
    MemoryWrite,
    MemoryWriteDone,
    MrifDone,
    MrifTarget,
    MrifWrite,
)

ATTEMPTS = 255  # of a CAS


class Mrif(wiring.Component):
    """Sets the pending bit of each message in its interrupt file, then sends the notice.

    A message is a dword of data that was written at offset 0 of the file's page, an identity below 2048, little-endian; any other dword is
    taken and ignored, also what is big-endian (offset 4). The pending doubleword is read and then replaced, with ``atomics`` by CAS, again
    as long as another was faster. When that is visible to all, the notice follows, whatever the file's enable bits say: NID, a
    little-endian dword at the start of its page. A file that cannot be read or written, or after 255 CAS that came too late, is
    reported with cause 264, one that is poisoned with 271; so is a notice that cannot be written, 264, since the interrupt would
    be lost in silence. [RVIOMMU1.0 3.3.3, 4.2] [AIA1.0 8.3.1, 8.5.2]

    Throughput: 1 message at a time.

    Parameters
    ----------
    atomics : :class:`bool`
        AMO_MRIF.
    physical_address_bits : :class:`int`
        What lies beyond cannot be accessed.

    Members
    -------
    targets : ``In(stream.Signature(MrifTarget))``
        What the walker found for each translation request that is answered with an interrupt file, not after the answer; always taken.
    writes : ``In(stream.Signature(MrifWrite))``
        What was written to such a page, by the cookie of that answer, which is free again when the item is taken.
    ended : ``Out(stream.Signature(MrifDone))``
        End of each: FAULT if it was reported or could not be recorded.
    busy : ``Out(1)``
        A write was taken and has not ended.
    read, read_data : ``Out(stream.Signature(MemoryRead))``, ``In(stream.Signature(MemoryReadData))``
        Memory; the answers to updates, too.
    update : ``Out(stream.Signature(MemoryUpdate))``
        With ``atomics``.
    write, write_done : ``Out(stream.Signature(MemoryWrite))``, ``In(stream.Signature(MemoryWriteDone))``
        Memory.
    reports : ``Out(stream.Signature(FaultReport))``
        Faults, those that DTF silences left out.
    """

    def __init__(self, *, atomics=False, physical_address_bits=56):
        self.atomics, self.physical_address_bits = atomics, physical_address_bits
        super().__init__({
            "targets": In(stream.Signature(MrifTarget)),
            "writes": In(stream.Signature(MrifWrite)),
            "ended": Out(stream.Signature(MrifDone)),
            "busy": Out(1),
            "read": Out(stream.Signature(MemoryRead)),
            "read_data": In(stream.Signature(MemoryReadData)),
            **({"update": Out(stream.Signature(MemoryUpdate))} if atomics else {}),
            "write": Out(stream.Signature(MemoryWrite)),
            "write_done": In(stream.Signature(MemoryWriteDone)),
            "reports": Out(stream.Signature(FaultReport)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.known = known = Memory(shape=MrifTarget, depth=COOKIES, init=[])
        learn, recall = known.write_port(), known.read_port()
        message, target, report = Signal(MrifWrite), recall.data, self.reports.payload
        identity = message.data[: spec.MRIF_IDENTITY_BITS]
        address, found, bit, cause = Signal(64), Signal(64), Signal(64), Signal(12)
        is_message, is_notice = Signal(), Signal()
        m.d.comb += [
            self.targets.ready.eq(1), learn.en.eq(self.targets.valid), learn.addr.eq(self.targets.p.cookie),
            learn.data.eq(self.targets.payload), recall.addr.eq(self.writes.p.cookie),
            is_message.eq(~target.iotval[: spec.PAGE_BITS].any() & ~message.data[spec.MRIF_IDENTITY_BITS :].any()),
            # Pairs of doublewords, pending and enable bits of 64 identities.
            address.eq(Cat(Const(0, 4), identity[6:], target.address)),
            self.read.p.address.eq(address), self.read.p.length_bytes.eq(8),
            self.write.p.address.eq(Mux(is_notice, Cat(Const(0, spec.PAGE_BITS), target.NPPN), address)), self.write.p.last.eq(1),
            self.write.p.length_bytes.eq(Mux(is_notice, 4, 8)), self.write.p.data.eq(Mux(is_notice, target.NID, found | bit)),
            report.cause.eq(cause),
            report.ttyp.eq(Mux(target.is_translated, spec.TTYP_TRANSLATED, 0) | spec.TTYP_UNTRANSLATED_WRITE),
            report.device_id.eq(target.device_id),
            report.process_id_valid.eq(target.process_id_valid), report.process_id.eq(target.process_id),
            report.privileged.eq(target.privileged), report.iotval.eq(target.iotval),
            self.ended.p.cookie.eq(message.cookie), self.ended.p.status.eq(Mux(cause != 0, BurstStatus.FAULT, BurstStatus.OK)),
        ]  # fmt: skip
        if self.atomics:
            attempts = Signal(range(ATTEMPTS + 1))
            m.d.comb += [self.update.p.address.eq(address), self.update.p.compare.eq(found), self.update.p.swap.eq(found | bit)]

        def beyond(number):
            return number[self.physical_address_bits :].any()

        def fail(number):
            m.d.sync += cause.eq(number)
            m.next = "REPORT"

        def take(succeed):
            """Take the answer to a read or an update."""
            m.d.comb += self.read_data.ready.eq(1)
            with m.If(self.read_data.valid):
                m.d.sync += found.eq(self.read_data.p.data)
                with m.If(self.read_data.p.status == BurstStatus.POISONED):
                    fail(spec.MRIF_CORRUPTED)
                with m.Elif(self.read_data.p.status != BurstStatus.OK):
                    fail(spec.MRIF_FAULT)
                with m.Else():
                    succeed()

        with m.FSM() as fsm:
            m.d.comb += [self.busy.eq(~fsm.ongoing("TAKE")), recall.en.eq(fsm.ongoing("TAKE"))]
            with m.State("TAKE"):
                m.d.comb += self.writes.ready.eq(1)
                m.d.sync += [message.eq(self.writes.payload), cause.eq(0), is_notice.eq(0)]
                if self.atomics:
                    m.d.sync += attempts.eq(0)
                with m.If(self.writes.valid):
                    m.next = "JUDGE"
            with m.State("JUDGE"):
                m.d.sync += bit.eq(1 << identity[:6])
                m.next = "READ"
                with m.If(~is_message):
                    m.next = "END"
                with m.Elif(beyond(address)):
                    fail(spec.MRIF_FAULT)
            with m.State("READ"):
                m.d.comb += self.read.valid.eq(1)
                with m.If(self.read.ready):
                    m.next = "TAKE_READ"
            with m.State("TAKE_READ"):

                def store():
                    m.next = "UPDATE" if self.atomics else "WRITE"

                take(store)
            if self.atomics:
                with m.State("UPDATE"):
                    m.d.comb += self.update.valid.eq(1)
                    with m.If(self.update.ready):
                        m.d.sync += attempts.eq(attempts + 1)
                        m.next = "TAKE_UPDATE"
                with m.State("TAKE_UPDATE"):

                    def compare():
                        m.next = "UPDATE"
                        with m.If(self.read_data.p.data == found):
                            m.next = "NOTIFY"
                        with m.Elif(attempts == ATTEMPTS):
                            fail(spec.MRIF_FAULT)

                    take(compare)
            with m.State("NOTIFY"):
                m.d.sync += is_notice.eq(1)
                m.next = "WRITE"
                with m.If(beyond(Cat(Const(0, spec.PAGE_BITS), target.NPPN))):
                    fail(spec.MRIF_FAULT)
            with m.State("WRITE"):
                m.d.comb += self.write.valid.eq(1)
                with m.If(self.write.ready):
                    m.next = "AWAIT_DONE"
            with m.State("AWAIT_DONE"):
                m.d.comb += self.write_done.ready.eq(1)
                with m.If(self.write_done.valid):
                    with m.If(self.write_done.p.status != BurstStatus.OK):
                        fail(spec.MRIF_FAULT)
                    with m.Elif(is_notice):
                        m.next = "END"
                    with m.Else():
                        m.next = "NOTIFY"
            with m.State("REPORT"):
                m.d.comb += self.reports.valid.eq(~target.is_silent)
                with m.If(self.reports.ready | target.is_silent):
                    m.next = "END"
            with m.State("END"):
                m.d.comb += self.ended.valid.eq(1)
                with m.If(self.ended.ready):
                    m.next = "TAKE"
        return m
