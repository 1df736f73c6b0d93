"""Register maps as data: fields, registers and blocks that check themselves, and what they come to as dwords."""

import enum
from dataclasses import dataclass, field

WORD_BYTES = 4


class Access(enum.Enum):
    """What software may do with a field."""

    RO = "read only"
    RW = "read and write"


def _check(condition, sentence, value):
    if not condition:
        raise ValueError(f"{sentence}, not {value!r}")


@dataclass(frozen=True)
class Field:
    """``width`` bits of a register from bit ``low`` up; ``is_kept``: a function level reset leaves them alone.

    Raises
    ------
    :exc:`ValueError`
        When ``reset`` does not fit.
    """

    name: str
    low: int
    width: int = 1
    access: Access = Access.RO
    reset: int = 0
    is_kept: bool = False

    def __post_init__(self):
        _check(self.low >= 0 and self.width > 0,
               f"Place of field {self.name} must be a lowest bit and a positive width", (self.low, self.width))  # fmt: skip
        _check(0 <= self.reset < 1 << self.width, f"Reset value of field {self.name} must fit in {self.width} bits", self.reset)

    @property
    def mask(self):
        """The field's bits inside its register."""
        return ((1 << self.width) - 1) << self.low


@dataclass(frozen=True)
class Register:
    """1, 2 or 4 bytes at ``offset`` from the start of their block; bits of no field are read-only zeroes.

    Raises
    ------
    :exc:`ValueError`
        When size or alignment is not natural, or a field lies outside or on another.
    """

    name: str
    offset: int
    size_bytes: int
    fields: tuple[Field, ...] = ()

    def __post_init__(self):
        _check(self.size_bytes in (1, 2, 4), f"Size of register {self.name} must be 1, 2 or 4 bytes", self.size_bytes)
        _check(self.offset >= 0 and self.offset % self.size_bytes == 0,
               f"Offset of register {self.name} must be a multiple of its size", self.offset)  # fmt: skip
        used = 0
        for item in self.fields:
            _check(item.mask < 1 << 8 * self.size_bytes, f"Field {item.name} must lie inside register {self.name}", (item.low, item.width))
            _check(not used & item.mask, f"Fields of register {self.name} must not overlap", item.name)
            used |= item.mask


@dataclass(frozen=True)
class Block:
    """Registers that belong together, ``size_bytes`` from ``offset`` up.

    Raises
    ------
    :exc:`ValueError`
        When a register lies outside or on another.
    """

    name: str
    offset: int
    size_bytes: int
    registers: tuple[Register, ...] = field(default=())

    def __post_init__(self):
        used = set()
        for register in self.registers:
            span = set(range(register.offset, register.offset + register.size_bytes))
            _check(register.offset + register.size_bytes <= self.size_bytes,
                   f"Register {register.name} must lie inside the {self.size_bytes} bytes of {self.name}", register.offset)  # fmt: skip
            _check(not used & span, f"Registers of {self.name} must not overlap", register.name)
            used |= span


@dataclass(frozen=True)
class Word:
    """One dword of a map: its value after reset, the bits that software may change, those that a function level reset leaves alone."""

    reset: int = 0
    writable: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Place:
    """Where a field is: bits ``low`` .. ``low + width - 1`` of dword ``word``."""

    word: int
    low: int
    width: int
    reset: int


class Map:
    """Blocks in one space of ``size_bytes``.

    Parameters
    ----------
    size_bytes : :class:`int`
        A multiple of 4.
    blocks : tuple of :class:`Block`
        In any order.

    Raises
    ------
    :exc:`ValueError`
        When a block lies outside or on another.
    """

    def __init__(self, size_bytes, blocks):
        _check(size_bytes > 0 and size_bytes % WORD_BYTES == 0, "Size of a register map must be a positive multiple of 4 bytes", size_bytes)
        self.size_bytes, self.blocks = size_bytes, tuple(sorted(blocks, key=lambda block: block.offset))
        end, before = 0, "its start"
        for block in self.blocks:
            where = f"{block.offset:#x}..{block.offset + block.size_bytes - 1:#x}"
            _check(block.offset >= end, f"Block {block.name} must not overlap {before}, which ends at {end - 1:#x}", where)
            end, before = block.offset + block.size_bytes, block.name
            _check(end <= size_bytes, f"Block {block.name} must lie below {size_bytes:#x}", where)

    def place(self, block, register, field):
        """Return the :class:`Place` of a field by its names. Raises :exc:`KeyError` when there is none."""
        for name, at, item in self._fields():
            if name == (block, register, field):
                return Place(at // 32, at % 32, item.width, item.reset)
        raise KeyError(f"{block}.{register}.{field}")

    def words(self):
        """Return a :class:`Word` for each dword of the space."""
        reset, writable, kept = ([0] * (self.size_bytes // 4) for _ in range(3))
        for _, at, item in self._fields():
            bits = ((1 << item.width) - 1) << at % 32
            reset[at // 32] |= item.reset << at % 32
            if item.access is Access.RW:
                writable[at // 32] |= bits
            if item.is_kept:
                kept[at // 32] |= bits
        return [Word(*numbers) for numbers in zip(reset, writable, kept)]

    def _fields(self):
        for block in self.blocks:
            for register in block.registers:
                for item in register.fields:
                    yield (block.name, register.name, item.name), 8 * (block.offset + register.offset) + item.low, item
