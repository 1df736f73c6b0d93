"""Amaranth to Verilog: for simulators, for synthesis and for users' own projects."""

import os

from amaranth.back import rtlil, verilog
from amaranth.hdl import Const, Value
from amaranth.hdl._ir import PortDirection  # what the back ends take; no public name exists
from amaranth.lib import wiring

from .virtio import store

__all__ = ["convert", "to_rtlil"]


def convert(component: wiring.Component, name: str = "top") -> str:
    """Return the Verilog text of ``component`` with ``name`` as its top module.

    The same component gives the same text in every run and on every machine: source locations are left out, and
    the Yosys that comes with Amaranth is used whatever else is installed.

    Raises
    ------
    :exc:`TypeError`
        When ``component`` is not a component.
    """
    ports = _ports(component)
    # Amaranth reads the variable at the time of the call; nothing else in this process uses Yosys through it.
    os.environ["AMARANTH_USE_YOSYS"] = "builtin"
    text = verilog.convert(component, name=name, ports=ports, emit_src=False)
    return text + store.VERILOG if "ringwall_store" in text else text


def to_rtlil(component: wiring.Component, name: str = "top") -> str:
    """Return the RTLIL text of ``component``: what :func:`convert` is a function of, without running Yosys.

    Raises
    ------
    :exc:`TypeError`
        When ``component`` is not a component.
    """
    return rtlil.convert(component, name=name, ports=_ports(component), emit_src=False)


def _ports(component):
    """Return the ports of ``component`` as Amaranth's back ends take them, without members that are constant."""
    if not isinstance(component, wiring.Component):
        raise TypeError(f"What is converted must be an amaranth.lib.wiring.Component, not {component!r}")
    ports = {}
    for path, member, value in component.signature.flatten(component):
        value = Value.cast(value)
        if not isinstance(value, Const):  # ready of an always_ready stream: not a wire
            direction = PortDirection.Input if member.flow == wiring.In else PortDirection.Output
            ports["__".join(map(str, path))] = (value, direction)
    return ports
