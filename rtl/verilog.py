"""Amaranth to Verilog: for simulators, for synthesis and for users' own projects. As a command it is :mod:`.generate`."""

import os
import sys
from dataclasses import replace

from amaranth._toolchain.yosys import find_yosys
from amaranth.back import rtlil, verilog
from amaranth.hdl import Const, Module, ResetInserter, Value
from amaranth.hdl._ir import PortDirection  # what the back ends take; no public name exists
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .config import EndpointConfig
from .endpoint import Activity, Endpoint, descriptions_of
from .function.description import Bar, MsixCapability, PcieCapability, PowerCapability
from .phy.raw import RawBeat, RawPhy
from .phy.series7 import Series7Phy, block_ports
from .phy.tunnel import Tunnel
from .phy.ultrascale import MirroredFunction, UltraScalePhy, hard_block_ports
from .spec import series7
from .spec.pcie_config import DEVICE_CONTROL, DEVICE_CONTROL_2
from .virtio import store
from .virtio.device import join

__all__ = [
    "RawCard", "Series7Card", "TunnelCard", "UltraScaleCard", "convert", "from_rtlil", "mirrored_functions", "portable", "ports_of",
    "to_rtlil",
]  # fmt: skip


class _Card(wiring.Component):
    """What all cards have: an endpoint, the adapter of its link, and outside ``activity``, ``malformed`` and the user's side of devices."""

    def __init__(self, config, phy, ports):
        self.config, self.endpoint, self._phy = config, Endpoint(config), phy
        self.outside = self.endpoint.outside
        super().__init__({**ports, "activity": Out(Activity), "malformed": Out(1), **self.outside})

    def _join(self, m, *, restarts=False):
        """Add both to ``m`` and join them; the adapter begins anew with the endpoint when it ``restarts``. Return both."""
        m.submodules.endpoint = endpoint = self.endpoint
        phy = self._phy
        m.submodules.phy = ResetInserter({"sync": endpoint.discarding})(phy) if restarts else phy
        join(m, self, endpoint, {name: name for name in self.outside})
        wiring.connect(m, phy.received, endpoint.received)
        wiring.connect(m, endpoint.to_send, phy.to_send)
        m.d.comb += self.activity.eq(endpoint.activity)
        return endpoint, phy

    def _judge(self, m):
        """Join what an adapter that looks at raw TLPs has to tell of them, and needs for it."""
        m.d.comb += [
            self.endpoint.malformed.eq(self._phy.malformed), self._phy.max_payload.eq(self.endpoint.max_payload),
            self.malformed.eq(self._phy.malformed.found),
        ]

    def _lead_out(self, m, ports):
        """Join ports of the adapter to those outside of the same names."""
        for name, member in ports.items():
            ours, theirs = getattr(self, name), getattr(self._phy, name)
            m.d.comb += ours.eq(theirs) if member.flow == wiring.Out else theirs.eq(ours)


class RawCard(_Card):
    """An :class:`.endpoint.Endpoint` on a raw TLP link: what simulations run and what a soft core's wrapper instantiates.

    Parameters
    ----------
    config : :class:`.config.EndpointConfig`
        What the endpoint is made of.

    Members
    -------
    i, o : ``In`` and ``Out(stream.Signature(RawBeat(width)))``
        From and to the link; see "Raw link" in rtl/README.md.
    link_reset : ``In(1)``
        The link is down or in hot reset: what was being sent is broken off, see :class:`.endpoint.Endpoint`.
    activity : ``Out(Activity)``
        For counters.
    malformed : ``Out(1)``
        Pulse: a TLP from the link was malformed, see :class:`.phy.raw.RawReceiver`.
    name_n
        The user's side of devices, see :class:`.endpoint.Endpoint`.
    """

    def __init__(self, config: EndpointConfig):
        raw = stream.Signature(RawBeat(config.width))
        super().__init__(config, RawPhy(width=config.width, has_pasid=config.pasid_bits > 0),
                         {"i": In(raw), "o": Out(raw), "link_reset": In(1)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        endpoint, phy = self._join(m, restarts=True)
        self._judge(m)
        wiring.connect(m, wiring.flipped(self.i), phy.i)
        wiring.connect(m, phy.o, wiring.flipped(self.o))
        m.d.comb += endpoint.link_reset.eq(self.link_reset)
        return m


class TunnelCard(_Card):
    """An :class:`.endpoint.Endpoint` whose raw TLP link goes over bytes: for boards without a PCIe PHY. See "Tunnel" in rtl/phy/README.md.

    Parameters
    ----------
    config : :class:`.config.EndpointConfig`
        What the endpoint is made of.
    options
        ``room``, ``depth``, ``window``, ``patience_cycles``, ``silence_cycles`` of :class:`.phy.tunnel.Tunnel`.

    Members
    -------
    rx, tx : ``In`` and ``Out(stream.Signature(8))``
        Bytes from and to the host; ``rx`` is always ready.
    link_up : ``Out(1)``
        A host is there; for a lamp.
    activity : ``Out(Activity)``
        For counters.
    malformed : ``Out(1)``
        Pulse: a TLP from the host was malformed, see :class:`.phy.raw.RawReceiver`.
    name_n
        The user's side of devices, see :class:`.endpoint.Endpoint`.

    Raises
    ------
    :exc:`ValueError`
        If an option does not do.
    """

    def __init__(self, config: EndpointConfig, **options):
        self._tunnel = Tunnel(width=config.width, **options)
        line = stream.Signature(8)
        super().__init__(config, RawPhy(width=config.width, has_pasid=config.pasid_bits > 0),
                         {"rx": In(line), "tx": Out(line), "link_up": Out(1)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        endpoint, phy = self._join(m, restarts=True)
        self._judge(m)
        m.submodules.tunnel = tunnel = self._tunnel
        wiring.connect(m, wiring.flipped(self.rx), tunnel.rx)
        wiring.connect(m, tunnel.tx, wiring.flipped(self.tx))
        wiring.connect(m, tunnel.o, phy.i)
        wiring.connect(m, phy.o, tunnel.i)
        m.d.comb += [
            endpoint.link_reset.eq(tunnel.link_reset), tunnel.discarding.eq(endpoint.discarding),
            self.link_up.eq(~tunnel.link_reset & ~endpoint.discarding),
        ]
        return m


def mirrored_functions(descriptions):
    """Return the :class:`.phy.ultrascale.MirroredFunction` of each :class:`.function.description.FunctionDescription`.

    Raises
    ------
    :exc:`ValueError`
        When one has a BAR that is not a 64-bit one: a 32-bit one or an expansion ROM.
    """
    functions = []
    for n, description in enumerate(descriptions):
        places = description.map(n, len(descriptions))
        for bar in description.bars:
            if not (isinstance(bar, Bar) and bar.is_64):
                raise ValueError(f"A BAR behind the hard block must be a 64-bit one, not {bar!r}")
        control = places.place("pcie", "device_control", "mps").word if description.capability(PcieCapability) else None
        functions.append(MirroredFunction(
            bars=tuple(bar.index for bar in description.bars),
            device_control=control,
            device_control_2=control + (DEVICE_CONTROL_2 - DEVICE_CONTROL) // 4 if control is not None else None,
            msix_control=places.place("msix", "control", "enable").word if description.capability(MsixCapability) else None,
            power_control=places.place("pm", "control", "power_state").word if description.capability(PowerCapability) else None,
        ))  # fmt: skip
    return functions


class UltraScaleCard(_Card):
    """An :class:`.endpoint.Endpoint` on the Xilinx UltraScale+ hard block: its ports are the block's, by their names.

    How the block must be configured, and what the host then finds, is in "UltraScale+ hard block" of rtl/README.md.

    Parameters
    ----------
    config : :class:`.config.EndpointConfig`
        What the endpoint is made of; at most 4 functions.
    options
        ``max_payload``, ``straddle``, ``pcie_capability``, ``order_cycles`` of :class:`.phy.ultrascale.UltraScalePhy`.

    Members
    -------
    m_axis_cq_*, s_axis_cc_*, s_axis_rq_*, m_axis_rc_*, pcie_*, cfg_*, user_lnk_up : ports
        Of the block, see :func:`.phy.ultrascale.hard_block_ports`.
    activity : ``Out(Activity)``
        For counters.
    malformed, order_lost : ``Out(1)``
        Pulses, see :class:`.phy.ultrascale.UltraScalePhy`.
    name_n
        The user's side of devices, see :class:`.endpoint.Endpoint`.

    Raises
    ------
    :exc:`ValueError`
        If the card or an option does not fit the block.
    """

    def __init__(self, config: EndpointConfig, **options):
        if config.functions != config.physical_functions:
            raise ValueError(f"A card behind the hard block must have no virtual functions, not {config.all_devices!r}")
        if config.host_ats is not None:
            raise ValueError(f"A card behind the hard block must have no cache for the host's IOMMU, not {config.host_ats!r}")
        if config.tags > 256:
            raise ValueError(f"Tags behind the hard block must be at most 256, it has no 10-bit tags, not {config.tags!r}")
        super().__init__(config, UltraScalePhy(width=config.width, functions=mirrored_functions(descriptions_of(config)), **options),
                         {**hard_block_ports(config.width), "order_lost": Out(1)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        endpoint, phy = self._join(m)
        self._lead_out(m, hard_block_ports(self.config.width))
        m.d.comb += [
            endpoint.link_reset.eq(phy.link_reset), phy.discarding.eq(endpoint.discarding), phy.in_reset.eq(endpoint.in_reset),
            self.malformed.eq(phy.malformed), self.order_lost.eq(phy.order_lost),
        ]
        return m


class Series7Card(_Card):
    """An :class:`.endpoint.Endpoint` on the Xilinx 7-series block: its ports are those of the block's wrapper, by their names.

    How the block must be configured, and what the host then finds, is in "7-series block" of rtl/phy/README.md.

    Parameters
    ----------
    config : :class:`.config.EndpointConfig`
        What the endpoint is made of: one function. Its virtio capabilities lie where the block leaves room for them.

    Members
    -------
    m_axis_rx_*, s_axis_tx_*, tx_*, rx_*, cfg_*, user_lnk_up : ports
        Of the block, see :func:`.phy.series7.block_ports`.
    activity : ``Out(Activity)``
        For counters.
    malformed : ``Out(1)``
        Pulse: a TLP from the block was malformed, see :class:`.phy.raw.RawReceiver`.
    name_n
        The user's side of devices, see :class:`.endpoint.Endpoint`.

    Raises
    ------
    :exc:`ValueError`
        If the card does not fit the block.
    """

    def __init__(self, config: EndpointConfig):
        config = replace(config, virtio_at=series7.CAPABILITIES)
        if config.functions != 1:
            raise ValueError(f"A card behind the 7-series block must have one function, not {config.functions!r}")
        if config.host_ats is not None:
            raise ValueError(f"A card behind the 7-series block must have no cache for the host's IOMMU, not {config.host_ats!r}")
        if config.tags > 256:
            raise ValueError(f"Tags behind the 7-series block must be at most 256, it has no 10-bit tags, not {config.tags!r}")
        (description,) = descriptions = descriptions_of(config)
        (function,) = mirrored_functions(descriptions)
        bar_bytes = {bar.index: bar.size_bytes for bar in description.bars}
        super().__init__(config, Series7Phy(width=config.width, function=function, bar_bytes=bar_bytes), block_ports(config.width))

    def elaborate(self, platform):
        m = Module()
        endpoint, phy = self._join(m)
        self._judge(m)
        self._lead_out(m, block_ports(self.config.width))
        m.d.comb += [
            endpoint.link_reset.eq(phy.link_reset), phy.discarding.eq(endpoint.discarding), phy.in_reset.eq(endpoint.in_reset),
        ]  # fmt: skip
        return m


def convert(component: wiring.Component, name: str = "top") -> str:
    """Return the Verilog text of ``component`` with ``name`` as its top module.

    The same component gives the same text in every run and on every machine: source locations are left out, and
    the Yosys that comes with Amaranth is used whatever else is installed.

    Raises
    ------
    :exc:`TypeError`
        When ``component`` is not a component.
    """
    return from_rtlil(to_rtlil(component, name))


def to_rtlil(component: wiring.Component, name: str = "top", platform=None) -> str:
    """Return the first half of :func:`convert`: the circuit in the language of Yosys, elaborated for ``platform``.

    Raises
    ------
    :exc:`TypeError`
        When ``component`` is not a component.
    """
    return rtlil.convert(component, name=name, platform=platform, ports=ports_of(component), emit_src=False)


def from_rtlil(text: str) -> str:
    """Return the second half of :func:`convert`: Verilog, with the store's when the circuit has one."""
    # Amaranth reads the variable at the time of the call; nothing else in this process uses Yosys through it.
    os.environ["AMARANTH_USE_YOSYS"] = "builtin"
    text = verilog._convert_rtlil_text(text)  # as verilog.convert does; no public name exists
    return text + store.VERILOG if "ringwall_store" in text else text


def portable(text: str) -> str:
    """Return Verilog as :func:`from_rtlil` does, but one without processes that have no clock.

    Processes that read nothing but constants leave X behind in simulators that begin as the standard lets them, and in what order others
    run is nobody's promise.
    """
    os.environ["AMARANTH_USE_YOSYS"] = "builtin"
    text = find_yosys(lambda _: True).run(
        ["-q", "-"], f"read_rtlil <<rtlil\n{text}\nrtlil\nproc -norom\nmemory_collect\nwrite_verilog -noattr\n", ignore_warnings=True)
    return text + store.VERILOG if "ringwall_store" in text else text


def ports_of(component):
    """Return the ports of ``component`` as Amaranth's back ends take them, without members that are constant: ``{name: (value, way)}``."""
    if not isinstance(component, wiring.Component):
        raise TypeError(f"What is converted must be an amaranth.lib.wiring.Component, not {component!r}")
    ports = {}
    for path, member, value in component.signature.flatten(component):
        value = Value.cast(value)
        if not isinstance(value, Const):  # ready of an always_ready stream: not a wire
            direction = PortDirection.Input if member.flow == wiring.In else PortDirection.Output
            ports["__".join(map(str, path))] = (value, direction)
    return ports


if __name__ == "__main__":
    from .generate import main

    sys.exit(main())
