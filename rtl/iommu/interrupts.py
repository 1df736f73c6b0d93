"""The IOMMU's own interrupts: message signalled, held back while masked, sent exactly once."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu_registers import CAUSE_MSI_WRITE, MSI_ENTRIES
from ..tlp.layouts import BurstStatus, ConfigState
from .layouts import FaultReport, MemoryWrite, MemoryWriteDone

ADDRESS_BITS = 56  # of msi_addr [RVIOMMU1.0 6.29]


class Interrupts(wiring.Component):
    """Sends one 4-byte message for each pulse at ``interrupt``, lowest vector first. [RVIOMMU1.0 6.18, 6.29] [PCIe5 6.1.4]

    A message is held pending while its vector or the function is masked, or MSI-X is off; several pulses while it is pending are one
    message. Its address and data are those of the table when it is sent. A message whose write fails is lost and reported with
    cause 273.

    Throughput: 1 message at a time.

    Members
    -------
    interrupt : ``In(16)``
        Pulses, a bit per vector.
    masked : ``In(16)``
        M of each vector.
    config : ``In(ConfigState)``
        MSI-X Enable and Function Mask of function 0.
    pending : ``Out(16)``
        Messages that wait to be sent.
    word_index, word, word_stays : ``Out(5)``, ``In(64)``, ``In(1)``
        Reads the table: word 2v is the address, 2v+1 the data; one cycle later. ``word_stays``: nothing is read now.
    sending : ``Out(1)``
        A message was decided and has not ended.
    write, write_done : ``Out(stream.Signature(MemoryWrite))``, ``In(stream.Signature(MemoryWriteDone))``
        Memory.
    reports : ``Out(stream.Signature(FaultReport))``
        Messages that failed.
    """

    interrupt: In(MSI_ENTRIES)
    masked: In(MSI_ENTRIES)
    config: In(ConfigState)
    pending: Out(MSI_ENTRIES)
    word_index: Out(range(2 * MSI_ENTRIES))
    word: In(64)
    word_stays: In(1)
    sending: Out(1)
    write: Out(stream.Signature(MemoryWrite))
    write_done: In(stream.Signature(MemoryWriteDone))
    reports: Out(stream.Signature(FaultReport))

    def elaborate(self, platform):
        m = Module()
        due, chosen, taken = Signal(MSI_ENTRIES), Signal(MSI_ENTRIES), Signal(MSI_ENTRIES)
        vector, address = Signal(range(MSI_ENTRIES)), Signal(ADDRESS_BITS)
        m.d.comb += [
            due.eq(Mux(self.config.msix_enable & ~self.config.msix_mask, self.pending & ~self.masked, 0)),
            chosen.eq(due & -due),
        ]
        m.d.sync += self.pending.eq((self.pending & ~taken) | self.interrupt)
        m.d.comb += [
            self.write.p.address.eq(address), self.write.p.length_bytes.eq(4), self.write.p.last.eq(1),
            self.reports.p.cause.eq(CAUSE_MSI_WRITE), self.reports.p.iotval.eq(address),
        ]  # fmt: skip
        with m.FSM() as fsm:
            m.d.comb += self.sending.eq(~fsm.ongoing("CHOOSE"))
            with m.State("CHOOSE"):
                m.d.comb += taken.eq(chosen)
                for n in range(MSI_ENTRIES):
                    with m.If(chosen[n]):
                        m.d.sync += vector.eq(n)
                with m.If(due.any()):
                    m.next = "LOOK_UP"
            with m.State("LOOK_UP"):
                m.d.comb += self.word_index.eq(Cat(Const(0, 1), vector))
                with m.If(~self.word_stays):
                    m.next = "GO_ON"
            with m.State("GO_ON"):
                m.d.comb += self.word_index.eq(Cat(Const(1, 1), vector))
                m.d.sync += address.eq(self.word)
                with m.If(~self.word_stays):
                    m.next = "LOAD"
            with m.State("LOAD"):
                m.d.sync += self.write.p.data.eq(self.word[:32])
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += self.write.valid.eq(1)
                with m.If(self.write.ready):
                    m.next = "WAIT_DONE"
            with m.State("WAIT_DONE"):
                m.d.comb += self.write_done.ready.eq(1)
                with m.If(self.write_done.valid):
                    with m.If(self.write_done.p.status == BurstStatus.OK):
                        m.next = "CHOOSE"
                    with m.Else():
                        m.next = "REPORT"
            with m.State("REPORT"):
                m.d.comb += self.reports.valid.eq(1)
                with m.If(self.reports.ready):
                    m.next = "CHOOSE"
        return m
