"""Amaranth to Verilog: for simulators, for synthesis and for users' own projects."""

import os

from amaranth.back import rtlil, verilog
from amaranth.lib import wiring

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
    _check(component)
    # Amaranth reads the variable at the time of the call; nothing else in this process uses Yosys through it.
    os.environ["AMARANTH_USE_YOSYS"] = "builtin"
    return verilog.convert(component, name=name, emit_src=False)


def to_rtlil(component: wiring.Component, name: str = "top") -> str:
    """Return the RTLIL text of ``component``: what :func:`convert` is a function of, without running Yosys.

    Raises
    ------
    :exc:`TypeError`
        When ``component`` is not a component.
    """
    _check(component)
    return rtlil.convert(component, name=name, emit_src=False)


def _check(component):
    if not isinstance(component, wiring.Component):
        raise TypeError(f"What is converted must be an amaranth.lib.wiring.Component, not {component!r}")
