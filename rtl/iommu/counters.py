"""Performance counters: of cycles, and of the events that their selectors take."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu_registers import MAX_COUNTERS, OFFSET, EventId, EventSelector
from .layouts import Events
from .registers import Bank

IDT_EVENTS = EventId.TLB_MISS, EventId.FIRST_STAGE_WALK, EventId.SECOND_STAGE_WALK  # may be filtered by GSCID and PSCID [RVIOMMU1.0 6.23]


class Counters(wiring.Component):
    """iocountovf, iocountinh, iohpmcycles, iohpmctr and iohpmevt; the counters have 64 bits, that of cycles 63. [RVIOMMU1.0 6.19 to 6.23]

    An event in cycle n is judged by iocountinh and iohpmevt as they are in cycle n + 1. A counter that is written does not count in that
    cycle; OF is set also when it is being cleared. iohpmevt keeps every eventID; those that are not in ``EventId`` count nothing.

    Latency: an event of cycle n is in its counter in cycle n + 3, ``overflow`` in the same. Throughput: an event of each kind per cycle.

    Parameters
    ----------
    count : :class:`int`
        Counters of events: 1 to 31.

    Members
    -------
    bank : ``In(Bank())``
        The registers.
    requests, walks : ``In(Events)``, ``In(Events)``
        Requests; misses and walks.
    overflow : ``Out(1)``
        Pulse: an OF bit went from 0 to 1 because its counter overflowed.

    Raises
    ------
    :exc:`ValueError`
        If ``count`` is out of range.
    """

    def __init__(self, *, count=7):
        if count not in range(1, MAX_COUNTERS + 1):
            raise ValueError(f"Event counters must be 1 to {MAX_COUNTERS}, not {count!r}")
        self.count = count
        super().__init__({"bank": In(Bank()), "requests": In(Events), "walks": In(Events), "overflow": Out(1)})

    def elaborate(self, platform):
        m = Module()
        bank, count = self.bank, self.count
        inhibit, overflows = Signal(count + 1), Signal(count + 1)
        requests, walks, rises = Signal(Events), Signal(Events), Signal(count + 1)
        m.d.sync += [requests.eq(self.requests), walks.eq(self.walks), self.overflow.eq(rises.any())]

        def written(name):
            """Return the bytes of the word at register ``name`` that are written."""
            return Mux(bank.at == OFFSET[name] // 8, bank.write, 0)

        def keep(register, name):
            """Take what is written to ``register``, which has a word of its own; return whether anything is."""
            enable = Signal(8, name=f"{name}_enable")
            m.d.comb += enable.eq(written(name))
            for n in range(-(-len(register) // 8)):
                with m.If(enable[n]):
                    m.d.sync += register[8 * n : 8 * n + 8].eq(bank.data[8 * n : 8 * n + 8])
            return enable

        words = {"iocountovf": Cat(overflows, Const(0, 31 - count), inhibit)}
        new_inhibit = Cat(Mux(written("iocountinh").bit_select(4 + n // 8, 1), bank.data[32 + n], inhibit[n]) for n in range(count + 1))
        m.d.sync += inhibit.eq(new_inhibit)
        for n in range(count + 1):
            name = f"iohpmctr{n}" if n else "iohpmcycles"
            counter, is_counted, carry = Signal(64 if n else 63, name=name), Signal(name=f"is_counted_{n}"), Signal(name=f"carry_{n}")
            enable = keep(counter, name)
            with m.If(~enable.any()):
                m.d.comb += carry.eq((counter + is_counted)[len(counter)])
                m.d.sync += counter.eq(counter + is_counted)
            if n:
                selector = Signal(EventSelector, name=f"iohpmevt{n}")
                m.d.comb += is_counted.eq(self._judge(m, n, selector, requests, walks, ~inhibit[n]))
                enable = keep(selector.as_value(), f"iohpmevt{n}")
                words |= {name: counter, f"iohpmevt{n}": selector}
                OF = selector.OF
            else:
                OF = Signal(name="OF_0")
                m.d.comb += is_counted.eq(~inhibit[0])
                words[name] = Cat(counter, OF)
            stays = Mux(enable[7], bank.data[63], OF)
            m.d.comb += [overflows[n].eq(OF), rises[n].eq(carry & ~stays)]
            m.d.sync += OF.eq(stays | carry)

        with m.If(bank.access):
            m.d.sync += bank.word.eq(0)
            with m.Switch(bank.at):
                for name, word in words.items():
                    with m.Case(OFFSET[name] // 8):
                        m.d.sync += bank.word.eq(word)
        return m

    def _judge(self, m, number, selector, requests, walks, runs):
        """Return, a cycle later, whether ``selector`` takes what there is. [RVIOMMU1.0 6.23]"""
        happens, device_ok, process_ok = (Signal(name=f"{name}_{number}") for name in ("happens", "device_ok", "process_ok"))
        event, is_walk = selector.eventID, selector.eventID[2:4].any()
        kinds = Cat(requests.kinds[: EventId.TLB_MISS], walks.kinds[EventId.TLB_MISS :])
        may_be_filtered = ~selector.IDT | Cat(event[:4] == one for one in IDT_EVENTS).any()
        # The lowest 0 of DID_GSCID and what is below it do not count with DMASK.
        counts = Cat(~(selector.DMASK & selector.DID_GSCID[:n].all()) for n in range(24))
        process = Mux(selector.IDT, walks.PSCID, Mux(is_walk, walks.process_id, requests.process_id))
        process_valid = Mux(selector.IDT, walks.PSCV, Mux(is_walk, walks.process_id_valid, requests.process_id_valid))
        device = Mux(selector.IDT, walks.GSCID, Mux(is_walk, walks.device_id, requests.device_id))
        m.d.sync += [
            happens.eq(runs & may_be_filtered & ~event[4:].any() & kinds.bit_select(event[:4], 1)),
            process_ok.eq(~selector.PV_PSCV | (process_valid & (process == selector.PID_PSCID))),
            device_ok.eq(~selector.DV_GSCV
                         | ((~selector.IDT | walks.GSCV) & ~((device ^ selector.DID_GSCID) & counts).any())),
        ]  # fmt: skip
        return happens & device_ok & process_ok
