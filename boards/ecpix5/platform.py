"""Pins of the ECPIX-5 85F: those of amaranth-boards 0.0.21."""

from amaranth_boards.ecpix5 import ECPIX585Platform

__all__ = ["ECPIX585Platform"]
