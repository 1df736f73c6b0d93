"""Base address registers as data."""

from dataclasses import dataclass

from ..regs.table import Access, Field, Register
from ..spec import pcie_config as spec

__all__ = ["Bar", "Rom", "bar_registers", "check", "check_bars"]


def check(condition, sentence, value):
    """Raise :exc:`ValueError` with ``sentence`` and ``value`` unless ``condition`` is true."""
    if not condition:
        raise ValueError(f"{sentence}, not {value!r}")


@dataclass(frozen=True)
class Bar:
    """A memory BAR of ``size_bytes`` (a power of two) in register ``index``; a 64-bit one takes ``index + 1`` as well. [PCIe5 7.5.1.2.1]"""

    index: int
    size_bytes: int
    is_64: bool = True
    is_prefetchable: bool = False

    def __post_init__(self):
        last = spec.BAR_COUNT - 1 - self.is_64
        check(isinstance(self.index, int) and 0 <= self.index <= last, f"Index of a BAR must be between 0 and {last}", self.index)
        check(self.size_bytes in [1 << n for n in range(spec.BAR_MINIMUM_BYTES.bit_length() - 1, 32)],
              "Size of a BAR must be a power of two between 128 bytes and 2 GiB", self.size_bytes)  # fmt: skip
        check(self.is_64 or not self.is_prefetchable, "A prefetchable BAR must be a 64-bit one", self)

    @property
    def registers(self):
        """Numbers of the BAR registers that it takes."""
        return (self.index, self.index + 1) if self.is_64 else (self.index,)


@dataclass(frozen=True)
class Rom:
    """The Expansion ROM BAR, of ``size_bytes`` (a power of two): decoded as if BAR 6, while its own enable is 1. [PCIe5 7.5.1.2.4]"""

    size_bytes: int
    index = spec.ROM_INDEX
    registers = (spec.ROM_INDEX,)

    def __post_init__(self):
        check(self.size_bytes in spec.ROM_SIZES, "Size of a ROM must be a power of two between 2 KiB and 16 MiB", self.size_bytes)


def check_bars(bars):
    """Raise :exc:`ValueError` when two BARs share a register."""
    taken = [register for bar in bars for register in bar.registers]
    check(len(taken) == len(set(taken)), "BARs must not share a register", taken)


def bar_registers(bars, offset):
    """Return the table's registers of ``bars`` (the first at ``offset``) and of the ROM."""
    found = []
    for bar in bars:
        low = bar.size_bytes.bit_length() - 1
        base = Field("base", low, 32 - low, Access.RW, doc="base address")
        if isinstance(bar, Rom):
            found.append(Register("rom", spec.ROM_BAR, 4, (Field("enable", 0, 1, Access.RW, doc="the ROM is decoded"), base)))
            continue
        found.append(Register(f"bar_{bar.index}", offset + 4 * bar.index, 4, (
            Field("type", 1, 2, reset=spec.BAR_TYPE_64 if bar.is_64 else 0, doc="memory: 0 for 32 bits, 2 for 64 bits"),
            Field("prefetchable", 3, reset=int(bar.is_prefetchable), doc="reads have no side effects"),
            base,
        )))  # fmt: skip
        if bar.is_64:
            found.append(Register(f"bar_{bar.index + 1}", offset + 4 * bar.index + 4, 4, (
                Field("base", 0, 32, Access.RW, doc="base address, bits 63:32"),)))  # fmt: skip
    return tuple(found)
