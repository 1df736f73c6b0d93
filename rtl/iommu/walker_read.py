"""The next memory read of the walk at work."""

from amaranth import Cat, Const, Mux, Signal

from ..spec import riscv_iommu as spec
from .layouts import MemoryRead
from .walker_rules import device_id_parts
from .walker_state import Outcome, Phase


def process_offset(walk):
    """Return where in its page the entry of the process directory lies that ``walk`` is at. [RVIOMMU1.0 3.3.2]"""
    context, *tables = (walk.key.process_id[slice(*place)] for place in spec.PDI)
    return Mux(walk.level == 0, Cat(Const(0, 4), context), Cat(Const(0, 3), Mux(walk.level == 1, *tables)))


class ReadAtWork:
    """Where the walk reads, and what becomes of it if it cannot.

    Attributes
    ----------
    read
        The read, :data:`.layouts.MemoryRead`.
    fault, cause
        How the walk ends if the read fails.
    is_process_read
        It is for a process directory, if only through the second stage.
    msi_number
        Interrupt file whose entry is read.
    """

    def __init__(self, m, work):
        features, walk, key = work.features, work.walk, work.key
        processes, ddis = features.has_processes, device_id_parts(features)
        table_index, ddi = Signal(9), Signal(9)
        with m.Switch(work.level):
            for n in range(features.levels):
                with m.Case(n):
                    m.d.comb += table_index.eq(work.page[9 * n : 9 * n + 9])
        with m.Switch(walk.level):
            for n in range(3):
                with m.Case(n):
                    m.d.comb += ddi.eq(key.device_id[slice(*ddis[n])])

        self.read = read = Signal(MemoryRead)
        offset, self.fault, self.cause = Signal(12), Signal(Outcome), Signal(12)
        self.msi_number = Signal(features.guest_page_bits) if features.MSI_FLAT else Const(0, 8)
        self.is_process_read = (walk.phase == Phase.PROCESS) | (walk.phase == Phase.PROCESS_CONTEXT) if processes else Const(0, 1)
        if processes and features.has_second_stage:
            self.is_process_read |= work.is_second & ((walk.purpose == Phase.PROCESS) | (walk.purpose == Phase.PROCESS_CONTEXT))
        m.d.comb += [
            read.cookie.eq(work.at), read.length_bytes.eq(spec.ENTRY_BYTES), read.address.eq(Cat(offset, work.next_ppn)),
            self.fault.eq(Outcome.FAULT), self.cause.eq(spec.DDT_LOAD_FAULT), offset.eq(Cat(Const(0, 3), table_index)),
        ]
        with m.Switch(walk.phase):
            with m.Case(Phase.DIRECTORY):
                m.d.comb += offset.eq(Cat(Const(0, 3), ddi))
            with m.Case(Phase.CONTEXT):
                size = spec.EXTENDED_DC_BYTES if features.MSI_FLAT else spec.DC_BYTES
                m.d.comb += [offset.eq(key.device_id[: ddis[0][1]] << (size - 1).bit_length()), read.length_bytes.eq(size)]
            with m.Case(Phase.FIRST):
                m.d.comb += self.fault.eq(Outcome.ACCESS_FAULT)
            if features.has_second_stage:
                with m.Case(Phase.SECOND):
                    m.d.comb += self.fault.eq(Outcome.ACCESS_FAULT)
            if processes:
                with m.Case(Phase.PROCESS):
                    m.d.comb += offset.eq(process_offset(walk))
                with m.Case(Phase.PROCESS_CONTEXT):
                    m.d.comb += [offset.eq(process_offset(walk)), read.length_bytes.eq(spec.PC_BYTES)]
            if features.MSI_FLAT:
                with m.Case(Phase.MSI):
                    m.d.comb += [
                        offset.eq(Cat(Const(0, 4), self.msi_number[:8])), read.length_bytes.eq(spec.MSI_PTE_BYTES),
                        self.cause.eq(spec.MSI_LOAD_FAULT),
                    ]
        if processes:
            with m.If(self.is_process_read):
                m.d.comb += [self.fault.eq(Outcome.FAULT), self.cause.eq(spec.PDT_LOAD_FAULT)]
