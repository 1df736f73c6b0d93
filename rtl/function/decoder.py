"""Memory addresses to functions, BARs and offsets."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..tlp.layouts import ConfigState, DecodeRequest, DecodeResponse
from .bars import Rom
from .description import SriovCapability, bars_of, check_functions, virtual_bars_of, virtual_functions_of
from .layouts import VirtualBar


class AddressDecoder(wiring.Component):
    """Finds the BAR that a memory address lies in.

    Only BARs of functions with memory space enabled count, and a ROM only while its own enable is 1 as well; one of a function that is in
    reset is found and refused (``hit`` is 0).
    Where the host placed several over one address, the first in the order of :func:`.description.bars_of` wins, and those of
    virtual functions come behind all others. These lie one behind the other in the space of one VF BAR; ``state`` of each says whether it
    counts. [PCIe5 9.2.1.1.1]

    Latency: 2 cycles from request to response. Throughput: one address at a time.

    Parameters
    ----------
    functions : tuple of :class:`.description.FunctionDescription`
        As for :class:`.config_space.ConfigSpace`.

    Members
    -------
    requests : ``In(stream.Signature(DecodeRequest))``
        Addresses.
    responses : ``Out(stream.Signature(DecodeResponse))``
        One for each, in order.
    state, bars, virtual_bars
        From :class:`.config_space.ConfigSpace`.

    Raises
    ------
    :exc:`ValueError`, :exc:`TypeError`
        If ``functions`` are not 1 to 8 descriptions.
    """

    def __init__(self, *, functions):
        self.functions = check_functions(functions)
        super().__init__({
            "requests": In(stream.Signature(DecodeRequest)),
            "responses": Out(stream.Signature(DecodeResponse)),
            "state": In(ConfigState).array(len(self.functions)),
            "bars": In(64).array(len(bars_of(self.functions))),
            "virtual_bars": In(VirtualBar).array(len(virtual_bars_of(self.functions))),
        })

    def elaborate(self, platform):
        m = Module()
        bars, virtual, owners = bars_of(self.functions), virtual_bars_of(self.functions), virtual_functions_of(self.functions)
        inside = [Signal(53, name=f"inside_{n}") for n in range(len(virtual))]  # 4 KiB from the base on; very many below it
        hits, address, busy = Signal(max(len(bars), 1)), Signal(32), Signal()
        response, incoming = self.responses, self.requests.payload.address
        m.d.comb += self.requests.ready.eq(~busy & ~response.valid)
        with m.If(self.requests.valid & self.requests.ready):
            m.d.sync += [busy.eq(1), address.eq(incoming)]
            for n, (function, bar) in enumerate(bars):
                low = bar.size_bytes.bit_length() - 1
                enable = self.state[function].memory_enable & (self.bars[n][0] if isinstance(bar, Rom) else 1)
                m.d.sync += hits[n].eq(enable & (incoming[low:] == self.bars[n][low:]))
            for n, bar in enumerate(self.virtual_bars):
                m.d.sync += inside[n].eq(incoming[12:] - bar.base[12:])
        with m.If(busy):
            m.d.sync += [busy.eq(0), response.valid.eq(1), response.payload.eq(0)]
            for n, (physical, bar) in reversed(list(enumerate(virtual))):
                function, hit = Signal(8, name=f"function_{n}"), Signal(name=f"hit_{n}")
                offset, nth = Signal(32, name=f"offset_{n}"), Signal(53, name=f"nth_{n}")
                m.d.comb += [nth.eq(inside[n]), offset.eq(address[:12])]
                with m.Switch(self.virtual_bars[n].page):
                    for page, bits in enumerate(self.functions[physical].capability(SriovCapability).apertures(bar)):
                        with m.Case(page):
                            m.d.comb += [nth.eq(inside[n] >> bits - 12), offset.eq(Cat(address[:12], inside[n][: bits - 12]))]
                for number, (owner, k) in owners.items():
                    with m.If((owner == physical) & (nth == k) & self.state[number].memory_enable):
                        m.d.comb += [hit.eq(1), function.eq(number)]
                with m.If(hit):
                    m.d.sync += [
                        response.payload.hit.eq(~Array(state.in_reset for state in self.state)[function]),
                        response.payload.claimed.eq(1),
                        response.payload.function.eq(function),
                        response.payload.bar.eq(bar.index),
                        response.payload.offset.eq(Cat(Signal(3), offset[3:])),
                    ]
            for n, (function, bar) in reversed(list(enumerate(bars))):
                with m.If(hits[n]):
                    m.d.sync += [
                        response.payload.hit.eq(~self.state[function].in_reset),
                        response.payload.claimed.eq(1),
                        response.payload.function.eq(function),
                        response.payload.bar.eq(bar.index),
                        response.payload.offset.eq(Cat(Signal(3), address[3 : bar.size_bytes.bit_length() - 1])),
                    ]
        with m.If(response.valid & response.ready):
            m.d.sync += response.valid.eq(0)
        return m
