"""Changes of configuration space by the card itself: what sets the flags of the Page Request Interface, and who goes first."""

from amaranth import Const, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .layouts import Operation, UpdateBus

__all__ = ["PageFlags", "UpdateMerger"]

MAX_FUNCTIONS = 8
RESPONSE_FAILURE, UNEXPECTED_RESPONSE = 16, 17  # bits of Page Request Control and Status [PCIe5 10.5.2.3]


class UpdateMerger(wiring.Component):
    """Lets one of two initiators at a time access configuration space, from its first request to the response to one with ``is_last``.

    Latency: 1 cycle in front of the first request. The first initiator goes before the second.

    Members
    -------
    initiators : ``In(UpdateBus()).array(2)``
        Who changes dwords.
    bus : ``Out(UpdateBus())``
        To :class:`.config_space.ConfigSpace`.
    """

    initiators: In(UpdateBus()).array(2)
    bus: Out(UpdateBus())

    def elaborate(self, platform):
        m = Module()
        busy, owner, is_last = Signal(), Signal(), Signal()
        for n, initiator in enumerate(self.initiators):
            with m.If(busy & (owner == n)):
                wiring.connect(m, wiring.flipped(initiator), wiring.flipped(self.bus))
        first = self.initiators[0].request.valid
        with m.If(~busy):
            m.d.sync += [busy.eq(first | self.initiators[1].request.valid), owner.eq(~first)]
        with m.If(self.bus.request.valid & self.bus.request.ready):
            m.d.sync += is_last.eq(self.bus.request.p.is_last)
        with m.If(self.bus.response.valid & self.bus.response.ready & is_last):
            m.d.sync += busy.eq(0)
        return m


class PageFlags(wiring.Component):
    """Sets Response Failure and Unexpected Response of the Page Request Interface, function after function. [PCIe5 10.5.2.3]

    Flags that are not set yet when their function is reset are forgotten. Latency: 2 cycles to the request.

    Parameters
    ----------
    registers : :class:`dict`
        Of each function that has the interface, the dword of its Control and Status.

    Members
    -------
    failures, surprises : ``In(8)``, ``In(8)``
        Pulses: a flag of each function.
    in_reset : ``In(8)``
        The function is being reset.
    updates : ``Out(UpdateBus())``
        To :class:`.config_space.ConfigSpace`.
    """

    def __init__(self, *, registers):
        self.registers = dict(registers)
        super().__init__({"failures": In(MAX_FUNCTIONS), "surprises": In(MAX_FUNCTIONS), "in_reset": In(MAX_FUNCTIONS),
                          "updates": Out(UpdateBus())})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        request, is_busy, chosen = self.updates.request, Signal(), Const(0)
        m.d.comb += self.updates.response.ready.eq(1)
        with m.If(request.ready):
            m.d.sync += request.valid.eq(0)
        with m.If(self.updates.response.valid):
            m.d.sync += is_busy.eq(0)
        for n, word in self.registers.items():
            failed, surprised, is_chosen = (Signal(name=f"{name}_{n}") for name in ("failed", "surprised", "is_chosen"))
            m.d.comb += is_chosen.eq(~is_busy & (failed | surprised) & ~chosen)
            chosen |= is_chosen
            with m.If(is_chosen):
                m.d.sync += [
                    request.valid.eq(1), is_busy.eq(1), request.p.function.eq(n), request.p.register.eq(word),
                    request.p.operation.eq(Operation.SET), request.p.is_last.eq(1),
                    request.p.data.eq((failed << RESPONSE_FAILURE) | (surprised << UNEXPECTED_RESPONSE)),
                ]  # fmt: skip
            m.d.sync += [
                failed.eq((self.failures[n] | (failed & ~is_chosen)) & ~self.in_reset[n]),
                surprised.eq((self.surprises[n] | (surprised & ~is_chosen)) & ~self.in_reset[n]),
            ]
        return m
