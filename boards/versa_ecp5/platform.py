"""Pins of the Lattice ECP5-5G Versa: those of amaranth-boards 0.0.21."""

from amaranth_boards.versa_ecp5_5g import VersaECP55GPlatform

__all__ = ["VersaECP55GPlatform"]
