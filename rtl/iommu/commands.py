"""The command queue: commands out of memory, invalidations and fences done in order."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu import EXTENDED_DDI, PDI
from ..spec.riscv_iommu_registers import COMMAND_BYTES, DEVICE_ID_BITS, PAGE_BITS, Ats, Command, Mode, Opcode
from ..stream.ram import Ram
from ..tlp.layouts import BurstStatus
from .ats_messages import AtsMessages
from .features import Features
from .layouts import (
    AtsMessage,
    Invalidate,
    InvalidateKind,
    InvalidationCompletion,
    MemoryRead,
    MemoryReadData,
    MemoryWrite,
    MemoryWriteDone,
)
from .registers import QueueControl

BATCH = 4  # commands that one read of an aligned 64-byte block brings


class Commands(wiring.Component):
    """Fetches and executes commands in order; cqh moves past a command when it is done. [RVIOMMU1.0 4.1, 6.15]

    An invalidation is done when ``invalidate`` took it: it is effective for everything that the translator accepts later. IOFENCE.C is done
    when all that came before it is done, an item at ``fence`` was answered at ``fenced`` (also without PR and PW), and its data, if any,
    is written. A command that this build does not have, with a reserved bit set, or with a device id too wide for ddtp sets cmd_ill,
    a failing read or write cqmf; cqh stays at the command, which is fetched anew when software has cleared the bit. An error on
    a read counts for the first of up to 4 commands that it was to bring.

    With ATS: an ATS command is done when its message was taken; a fence waits for completions of all invalidations first, and if one has
    timed out since the last fence sets cmd_to instead, once.

    A queue that is switched off goes off when the command at work, or the first of those that are being fetched, has ended; it does not
    wait for functions then.

    Latency: 2 cycles from the last word of a read to the first invalidation or fence. Throughput: an invalidation per cycle and a read per
    4 commands.

    Parameters
    ----------
    features : :class:`.features.Features`
        IODIR.INVAL_PDT is there with process directories, for process_ids that fit the largest; device_ids are split as ``MSI_FLAT`` says.
    itags, timeout_cycles
        With ATS: see :class:`.ats_messages.AtsMessages`.

    Members
    -------
    control : ``In(QueueControl())``
        The queue's registers.
    ddtp_mode : ``In(Mode)``
        Bounds device ids.
    read, read_data : ``Out(stream.Signature(MemoryRead))``, ``In(stream.Signature(MemoryReadData))``
        Memory.
    write, write_done : ``Out(stream.Signature(MemoryWrite))``, ``In(stream.Signature(MemoryWriteDone))``
        Memory.
    invalidate : ``Out(stream.Signature(Invalidate))``
        The translator.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        The gate.
    WSI, fence_done : ``In(1)``, ``Out(1)``
        With wires: fctl.WSI; pulse, a fence with WSI is done.
    ats_message, invalidation_completion : ``Out(stream.Signature(AtsMessage))``, ``In(stream.Signature(InvalidationCompletion))``
        With ATS: to and from functions.
    timed_out : ``Out(1)``
        With ATS: pulse, sets cmd_to.
    """

    def __init__(self, *, features=Features(), itags=8, timeout_cycles=1 << 33):
        self.features, self.itags, self.timeout_cycles = features, itags, timeout_cycles
        self._messages = AtsMessages(itags=itags, timeout_cycles=timeout_cycles) if features.ATS else None
        super().__init__({
            "control": In(QueueControl()),
            "ddtp_mode": In(Mode),
            "read": Out(stream.Signature(MemoryRead)),
            "read_data": In(stream.Signature(MemoryReadData)),
            "write": Out(stream.Signature(MemoryWrite)),
            "write_done": In(stream.Signature(MemoryWriteDone)),
            "invalidate": Out(stream.Signature(Invalidate)),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            **({"WSI": In(1), "fence_done": Out(1)} if features.has_wires else {}),
            **({"ats_message": Out(stream.Signature(AtsMessage)), "invalidation_completion": In(stream.Signature(InvalidationCompletion)),
                "timed_out": Out(1)} if features.ATS else {}),
        })

    def elaborate(self, platform):
        m = Module()
        control = self.control
        m.submodules.batch = batch = Ram(shape=data.ArrayLayout(64, 2), depth=BATCH, init=[])
        put, get = batch.write_port(granularity=1), batch.read_port()
        word = Signal(range(2 * BATCH))
        left, after = Signal(range(BATCH + 1)), Signal(range(BATCH))  # commands to do; the one behind ``command``
        command, runs = Signal(Command), Signal()
        m.d.comb += [runs.eq(control.on & control.enable & ~control.stopped), command.eq(get.data)]

        # A read stays inside the queue, inside an aligned block of 64 bytes, and in front of the tail.
        available, room = Signal(16), Signal(range(BATCH + 1))
        m.d.comb += [
            available.eq((control.tail - control.head) & control.mask),
            room.eq(Mux(control.mask[1], BATCH - control.head[:2], 2 - control.head[0])),
            self.read.p.address.eq(Cat(Const(0, PAGE_BITS), control.base) | (control.head << (COMMAND_BYTES - 1).bit_length())),
            self.read.p.length_bytes.eq(left << (COMMAND_BYTES - 1).bit_length()),
        ]

        is_invalidation, is_fence, wide = Signal(), Signal(), Signal()
        if self.features.ATS:
            m.submodules.messages = messages = self._messages
            is_ats, sends = Signal(), messages.command
            wiring.connect(m, messages.message, wiring.flipped(self.ats_message))
            wiring.connect(m, wiring.flipped(self.invalidation_completion), messages.completion)
            m.d.comb += sends.payload.eq(command.raw)
        self._judge(m, command, is_invalidation, is_fence, is_ats if self.features.ATS else None, wide)
        fence = command.iofence
        m.d.comb += [
            self.write.p.address.eq(fence.ADDR << 2), self.write.p.length_bytes.eq(4), self.write.p.data.eq(fence.DATA),
            self.write.p.last.eq(1),
        ]  # fmt: skip
        done, loads = Signal(), Signal()
        m.d.comb += [
            control.step.eq(done), put.addr.eq(word[1:]), put.data.eq(self.read_data.p.data.replicate(2)), get.addr.eq(after),
            get.en.eq(done | loads),
        ]  # fmt: skip
        if self.features.has_wires:
            m.d.comb += self.fence_done.eq(done & is_fence & fence.WSI)
        with m.If(done):
            m.d.sync += left.eq(left - 1)
        with m.If(done | loads):
            m.d.sync += after.eq(after + 1)

        def go_on():
            m.next = "EXECUTE"
            with m.If(~runs | (left == 1)):
                m.next = "AWAIT"

        with m.FSM():
            with m.State("AWAIT"):
                m.d.sync += [
                    control.on.eq(control.enable), word.eq(0), after.eq(0), left.eq(Mux(available < room, available, room)),
                ]  # fmt: skip
                with m.If(runs & (control.head != control.tail)):
                    m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += self.read.valid.eq(1)
                with m.If(self.read.ready):
                    m.next = "COLLECT"
            with m.State("COLLECT"):
                m.d.comb += self.read_data.ready.eq(1)
                with m.If(self.read_data.valid):
                    m.d.comb += put.en.eq(1 << word[0])
                    m.d.sync += word.eq(word + 1)
                    with m.If(self.read_data.p.last):
                        with m.If(self.read_data.p.status == BurstStatus.OK):
                            m.next = "LOAD"
                        with m.Else():
                            m.d.comb += control.memory_fault.eq(1)
                            m.next = "AWAIT"
            with m.State("LOAD"):
                m.d.comb += loads.eq(1)
                m.next = "EXECUTE"
            with m.State("EXECUTE"):
                may_fence = is_fence & ~messages.is_waiting & ~messages.has_timed_out if self.features.ATS else is_fence
                m.d.comb += [self.invalidate.valid.eq(is_invalidation), self.fence.valid.eq(may_fence)]
                with m.If(is_invalidation):
                    m.d.comb += done.eq(self.invalidate.ready)
                    with m.If(self.invalidate.ready):
                        go_on()
                if self.features.ATS:
                    with m.Elif(is_ats):
                        m.d.comb += [sends.valid.eq(messages.has_itag | sends.p.func3[0]), done.eq(sends.valid & sends.ready)]
                        with m.If(done):
                            go_on()
                        with m.Elif(~sends.valid & ~runs):
                            m.next = "AWAIT"
                    with m.Elif(is_fence & messages.is_waiting):
                        with m.If(~runs):
                            m.next = "AWAIT"
                    with m.Elif(is_fence & messages.has_timed_out):
                        m.d.comb += [messages.told.eq(1), self.timed_out.eq(1)]
                        m.next = "AWAIT"
                with m.Elif(is_fence):
                    with m.If(self.fence.ready):
                        m.next = "DRAIN"
                with m.Else():
                    m.d.comb += control.refused.eq(1)
                    m.next = "AWAIT"
            with m.State("DRAIN"):
                m.d.comb += self.fenced.ready.eq(1)
                with m.If(self.fenced.valid):
                    with m.If(fence.AV):
                        m.next = "WRITE"
                    with m.Else():
                        m.d.comb += done.eq(1)
                        go_on()
            with m.State("WRITE"):
                m.d.comb += self.write.valid.eq(1)
                with m.If(self.write.ready):
                    m.next = "WAIT_DONE"
            with m.State("WAIT_DONE"):
                m.d.comb += self.write_done.ready.eq(1)
                with m.If(self.write_done.valid):
                    with m.If(self.write_done.p.status == BurstStatus.OK):
                        m.d.comb += done.eq(1)
                        go_on()
                    with m.Else():
                        m.d.comb += control.memory_fault.eq(1)
                        m.next = "AWAIT"
        return m

    def _judge(self, m, command, is_invalidation, is_fence, is_ats, wide):
        """Tell invalidations, fences and ATS commands; what is none is illegal. Fill the invalidation. [RVIOMMU1.0 4.1.1 to 4.1.4]"""
        tlb, fence, directory, out = command.iotinval, command.iofence, command.iodir, self.invalidate.p
        features, widths = self.features, dict(DEVICE_ID_BITS)
        if features.MSI_FLAT:
            widths = {mode: high for mode, (_, high) in zip(widths, EXTENDED_DDI)}
        with m.Switch(self.ddtp_mode):
            for mode, width in widths.items():
                if width < len(directory.DID):
                    with m.Case(mode):
                        m.d.comb += wide.eq(directory.DV & directory.DID[width:].any())
        m.d.comb += [
            out.av.eq(tlb.AV & ~tlb.NL & ~tlb.S), out.page.eq(tlb.ADDR), out.pscv.eq(tlb.PSCV), out.pscid.eq(tlb.PSCID), out.gv.eq(tlb.GV),
            out.gscid.eq(tlb.GSCID), out.dv.eq(directory.DV), out.device_id.eq(directory.DID),
        ]  # fmt: skip
        process = directory.func3, directory.PID
        if features.has_processes:  # INVAL_PDT: DV is 1, and PID is one that can be
            width = PDI[2 if features.PD20 else 1 if features.PD17 else 0][1]
            is_process = directory.func3[0]
            process = directory.func3[1:], Mux(is_process, ~directory.DV | directory.PID[width:].any(), directory.PID.any())
        reserved = {
            Opcode.IOTINVAL: (tlb.reserved_11, tlb.reserved_35, tlb.reserved_60, tlb.reserved_126, tlb.func3[1:], tlb.func3[0] & tlb.PSCV,
                              tlb.NL & ~features.NL, tlb.S & ~features.S),
            Opcode.IOFENCE: (fence.func3, fence.WSI & (~self.WSI if features.has_wires else 1), fence.reserved_14, fence.reserved_126),
            Opcode.IODIR: (directory.reserved_10, directory.reserved_32, directory.reserved_34, directory.reserved_64, wide, *process),
        }  # fmt: skip
        targets = {Opcode.IOTINVAL: is_invalidation, Opcode.IOFENCE: is_fence, Opcode.IODIR: is_invalidation, Opcode.ATS: is_ats}
        if features.ATS:
            ats = Ats(command.raw)
            reserved[Opcode.ATS] = (ats.reserved_10, ats.reserved_34, ats.func3[1:])
        with m.Switch(tlb.opcode):
            for opcode, bits in reserved.items():
                with m.Case(opcode):
                    m.d.comb += targets[opcode].eq(~Cat(*bits).any())
        with m.If(tlb.opcode == Opcode.IODIR):
            m.d.comb += [out.kind.eq(InvalidateKind.DDT), out.av.eq(0), out.pscv.eq(0), out.gv.eq(0)]
            if features.has_processes:
                with m.If(directory.func3[0]):
                    m.d.comb += out.kind.eq(InvalidateKind.PDT)
        with m.Else():
            m.d.comb += [out.kind.eq(Mux(tlb.func3[0], InvalidateKind.GVMA, InvalidateKind.VMA)), out.dv.eq(0)]
