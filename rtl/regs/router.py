"""Register buses: one to the owners of BAR ranges, and several initiators to one."""

from dataclasses import dataclass

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .bus import RegisterBus, RegisterRequest

WORD_BYTES = 8


@dataclass(frozen=True)
class Range:
    """``length`` bytes from ``start`` up of a BAR; both multiples of 8."""

    function: int
    bar: int
    start: int
    length: int

    def __post_init__(self):
        for name, value, top in (("Function", self.function, 256), ("BAR", self.bar, 6)):
            if value not in range(top):
                raise ValueError(f"{name} of a range must be between 0 and {top - 1}, not {value!r}")
        if self.start < 0 or self.length <= 0 or self.start % WORD_BYTES or self.length % WORD_BYTES:
            raise ValueError(f"Start and length of a range must be multiples of {WORD_BYTES}, not {(self.start, self.length)!r}")

    @property
    def end(self):
        return self.start + self.length


class Router(wiring.Component):
    """Hands each access of a register bus to the owner of its range.

    The owner sees the request unchanged: function, BAR, and offset inside the BAR. An access outside all ranges is answered here: reads
    give 0, writes are dropped, neither is an error.

    Latency: 1 cycle to the owner, none back; 2 cycles from request to response outside all ranges.

    Parameters
    ----------
    targets : tuple of tuples of :class:`Range`
        The ranges of each owner.

    Members
    -------
    bus : ``In(RegisterBus())``
        Accesses.
    targets : ``Out(RegisterBus())``, one per owner
        Those of its ranges.

    Raises
    ------
    :exc:`ValueError`
        If ranges overlap, or an owner has none.
    """

    def __init__(self, *, targets):
        self.ranges = tuple(tuple(ranges) for ranges in targets)
        seen = []
        for ranges in self.ranges:
            if not ranges:
                raise ValueError(f"An owner of registers must have at least one range, not {ranges!r}")
            for new in ranges:
                for old in seen:
                    if (new.function, new.bar) == (old.function, old.bar) and new.start < old.end and old.start < new.end:
                        raise ValueError(f"Ranges of registers must not overlap {old!r}, not {new!r}")
                seen.append(new)
        super().__init__({"bus": In(RegisterBus()), "targets": Out(RegisterBus()).array(len(self.ranges))})

    def elaborate(self, platform):
        m = Module()
        request, response = Signal(RegisterRequest), self.bus.response
        chosen = Signal(range(len(self.ranges) + 1))  # the last: nobody
        incoming = self.bus.request.payload
        nobody = len(self.ranges)

        for target in self.targets:
            m.d.comb += target.request.payload.eq(request)
        with m.Switch(chosen):  # what is not valid may be anything: so it needs no gate
            for n, target in enumerate(self.targets):
                with m.Case(n):
                    m.d.comb += response.payload.eq(target.response.payload)
        with m.FSM():
            with m.State("TAKE"):
                m.d.comb += self.bus.request.ready.eq(1)
                m.d.sync += [request.eq(incoming), chosen.eq(nobody)]
                for n, ranges in enumerate(self.ranges):
                    for r in ranges:
                        with m.If((incoming.function == r.function) & (incoming.bar == r.bar)
                                  & (incoming.offset >= r.start) & (incoming.offset < r.end)):  # fmt: skip
                            m.d.sync += chosen.eq(n)
                with m.If(self.bus.request.valid):
                    m.next = "OFFER"
            with m.State("OFFER"):
                with m.Switch(chosen):
                    for n, target in enumerate(self.targets):
                        with m.Case(n):
                            m.d.comb += target.request.valid.eq(1)
                            with m.If(target.request.ready):
                                m.next = "ANSWER"
                    with m.Default():
                        m.next = "ANSWER"
            with m.State("ANSWER"):
                with m.Switch(chosen):
                    for n, target in enumerate(self.targets):
                        with m.Case(n):
                            m.d.comb += [response.valid.eq(target.response.valid), target.response.ready.eq(response.ready)]
                    with m.Default():
                        m.d.comb += response.valid.eq(1)
                with m.If(response.valid & response.ready):
                    m.next = "TAKE"
        return m


class Merger(wiring.Component):
    """Joins the register buses of several initiators; the first has priority, one access is under way at a time.

    Latency: 1 cycle to the owner, none back.

    Parameters
    ----------
    count : :class:`int`
        Initiators: at least 1.

    Members
    -------
    initiators : ``In(RegisterBus())``, one per initiator
        The accesses of each.
    bus : ``Out(RegisterBus())``
        All of them.

    Raises
    ------
    :exc:`ValueError`
        If ``count`` is not positive.
    """

    def __init__(self, *, count):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Initiators must be at least 1, not {count!r}")
        self.count = count
        super().__init__({"initiators": In(RegisterBus()).array(count), "bus": Out(RegisterBus())})

    def elaborate(self, platform):
        m = Module()
        request, owner = Signal(RegisterRequest), Signal(range(max(self.count, 2)))
        m.d.comb += self.bus.request.payload.eq(request)
        for initiator in self.initiators:
            m.d.comb += initiator.response.payload.eq(self.bus.response.payload)
        with m.FSM():
            with m.State("TAKE"):
                for n, initiator in reversed(list(enumerate(self.initiators))):
                    with m.If(initiator.request.valid):
                        m.d.sync += [request.eq(initiator.request.payload), owner.eq(n)]
                        m.next = "OFFER"
                taken = 0
                for initiator in self.initiators:
                    m.d.comb += initiator.request.ready.eq(initiator.request.valid & ~taken)
                    taken = taken | initiator.request.valid
            with m.State("OFFER"):
                m.d.comb += self.bus.request.valid.eq(1)
                with m.If(self.bus.request.ready):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                with m.Switch(owner):
                    for n, initiator in enumerate(self.initiators):
                        with m.Case(n):
                            m.d.comb += [
                                initiator.response.valid.eq(self.bus.response.valid),
                                self.bus.response.ready.eq(initiator.response.ready),
                            ]
                with m.If(self.bus.response.valid & self.bus.response.ready):
                    m.next = "TAKE"
        return m
