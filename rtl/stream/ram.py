"""RAM as FPGAs have it."""

from functools import partial

from amaranth.lib.memory import Memory

__all__ = ["Ram"]

Ram = partial(Memory, attrs={"no_rw_check": 1})
"""A memory of whose place nobody uses what is read while it is written, unless the read port is ``transparent_for`` that write port.

A block RAM then does alone what else takes a register and a LUT for each bit. In simulation such a read brings wrong data
(:class:`ringwall.sim.rams.BlockRams`), so that whoever uses it all the same is found.
"""
