"""Messages that ATS commands send to devices, and completions of their invalidations."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu_registers import INVAL_PAYLOAD, PAYLOAD_RID, PRGR_PAYLOAD, Ats, MessageCode
from .layouts import AtsMessage, InvalidationCompletion

ITAG_BITS = 5  # [PCIe5 10.3.1]
LAST_AGE = 2  # half timeouts that an invalidation outlives


class AtsMessages(wiring.Component):
    """Sends the message of each command, and keeps which invalidation requests a function has not completed. [RVIOMMU1.0 4.1.4]

    A completion counts for each of its ITags when all are under way to that function, and in that segment if the command had one; any
    other changes nothing. A request is complete with the last of as many as they say (0: 8). What is not complete when ``timeout_cycles``
    and at most half as many more are over has timed out, and its ITag is free. Whether EN_ATS of a function lets it complete is not asked.

    Latency: a cycle from ATS.INVAL to ``message``, none from ATS.PRGR. Throughput: an ATS.INVAL in 2 cycles, a completion per cycle.

    Parameters
    ----------
    itags : :class:`int`
        Invalidation requests that may be under way, 1 to 32.
    timeout_cycles : :class:`int`
        At least 4.

    Members
    -------
    command : ``In(stream.Signature(Ats))``
        ATS.INVAL, only while ``has_itag``, or ATS.PRGR.
    has_itag : ``Out(1)``
        There is a free one.
    message, completion : ``Out(stream.Signature(AtsMessage))``, ``In(stream.Signature(InvalidationCompletion))``
        To and from functions; completions are always taken.
    is_waiting : ``Out(1)``
        A request is under way.
    has_timed_out, told : ``Out(1)``, ``In(1)``
        One has since ``told`` was 1, also while the command queue was off.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, itags, timeout_cycles):
        if itags not in range(1, (1 << ITAG_BITS) + 1):
            raise ValueError(f"ITags must be 1 to {1 << ITAG_BITS}, not {itags!r}")
        if not isinstance(timeout_cycles, int) or timeout_cycles < 4:
            raise ValueError(f"Timeout must be an integer of at least 4 cycles, not {timeout_cycles!r}")
        self.itags, self.timeout_cycles = itags, timeout_cycles
        super().__init__({
            "command": In(stream.Signature(Ats)),
            "has_itag": Out(1),
            "message": Out(stream.Signature(AtsMessage)),
            "completion": In(stream.Signature(InvalidationCompletion)),
            "is_waiting": Out(1),
            "has_timed_out": Out(1),
            "told": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        command, message, come = self.command.p, self.message.p, self.completion.p
        busy, itag, is_chosen, is_answer = Signal(self.itags), Signal(range(max(self.itags, 2))), Signal(), command.func3[0]
        begins = self.message.valid & self.message.ready & ~is_answer
        m.d.sync += is_chosen.eq(self.command.valid & ~is_answer & ~begins)
        with m.If(~is_chosen):  # the one that is shown stays
            for n in reversed(range(self.itags)):
                with m.If(~busy[n]):
                    m.d.sync += itag.eq(n)
        m.d.comb += [
            self.has_itag.eq(~busy.all()), self.is_waiting.eq(busy.any()), self.completion.ready.eq(1),
            self.message.valid.eq(self.command.valid & (is_answer | is_chosen)),
            self.command.ready.eq(self.message.ready & (is_answer | is_chosen)),
            message.code.eq(Mux(is_answer, MessageCode.GROUP_RESPONSE, MessageCode.INVALIDATION_REQUEST)),
            message.RID.eq(command.RID), message.DSV.eq(command.DSV), message.DSEG.eq(Mux(command.DSV, command.DSEG, 0)),
            message.PV.eq(command.PV), message.PID.eq(Mux(command.PV, command.PID, 0)), message.itag.eq(Mux(is_answer, 0, itag)),
            message.payload.eq(Mux(is_answer, (command.PAYLOAD & PRGR_PAYLOAD) | (command.RID << PAYLOAD_RID),
                                   command.PAYLOAD & INVAL_PAYLOAD)),
        ]

        half = -(-self.timeout_cycles // 2)
        left, tick = Signal(range(half)), Signal()
        m.d.comb += tick.eq(left == 0)
        m.d.sync += left.eq(Mux(tick, half - 1, left - 1))
        strange = [come.itags == 0, come.itags[self.itags :].any()]
        is_counted, timed_out = Signal(), Signal(self.itags)
        for n in range(self.itags):
            owner = Signal(16, name=f"RID_{n}")
            segment_valid, segment = Signal(name=f"DSV_{n}"), Signal(8, name=f"DSEG_{n}")
            count, age = Signal(3, name=f"count_{n}"), Signal(range(LAST_AGE + 1), name=f"age_{n}")
            other_segment = segment_valid & (~come.DSV | (segment != come.DSEG))
            strange.append(come.itags[n] & (~busy[n] | (owner != come.RID) | other_segment))
            now = (count + 1)[:3]
            with m.If(tick):
                m.d.sync += age.eq(age + 1)
                m.d.comb += timed_out[n].eq(busy[n] & (age == LAST_AGE))
            with m.If(timed_out[n]):
                m.d.sync += busy[n].eq(0)
            with m.If(is_counted & come.itags[n]):
                m.d.sync += count.eq(now)
                with m.If(now == come.count):
                    m.d.sync += busy[n].eq(0)
            with m.If(begins & (itag == n)):
                m.d.sync += [
                    busy[n].eq(1), owner.eq(command.RID), segment_valid.eq(command.DSV), segment.eq(command.DSEG), count.eq(0), age.eq(0),
                ]  # fmt: skip
        m.d.comb += is_counted.eq(self.completion.valid & ~Cat(strange).any())
        with m.If(timed_out.any()):
            m.d.sync += self.has_timed_out.eq(1)
        with m.Elif(self.told):
            m.d.sync += self.has_timed_out.eq(0)
        return m
