"""Register maps as data: fields, registers and blocks that check themselves, what they come to as dwords and as a document."""

import enum
from dataclasses import dataclass, field

WORD_BYTES = 4


class Access(enum.Enum):
    """What software may do with a field."""

    RO = "read only"
    HWINIT = "read only, set when the card is made"
    RW = "read and write"
    RW1C = "read, and write 1 to clear"
    EVENT = "reads 0; a written 1 is an event"


def _check(condition, sentence, value):
    if not condition:
        raise ValueError(f"{sentence}, not {value!r}")


@dataclass(frozen=True)
class Field:
    """``width`` bits of a register from bit ``low`` up.

    ``is_kept``: a function level reset leaves them alone. ``is_sticky``: a hot reset does so as well. ``accepts``: a write of another
    value leaves the field as it is (all values are accepted when None). ``frozen_by``: ``(block, register, field)`` of a bit; while that is
    1, writes leave this field as it is. ``doc``: what it means, in a few words.

    Raises
    ------
    :exc:`ValueError`
        When ``reset`` does not fit, or ``accepts`` lists what cannot be written or belongs to a field that is not inside one byte.
    """

    name: str
    low: int
    width: int = 1
    access: Access = Access.RO
    reset: int = 0
    is_kept: bool = False
    is_sticky: bool = False
    accepts: tuple[int, ...] | None = None
    frozen_by: tuple[str, str, str] | None = None
    doc: str = ""

    def __post_init__(self):
        _check(self.low >= 0 and self.width > 0,
               f"Place of field {self.name} must be a lowest bit and a positive width", (self.low, self.width))  # fmt: skip
        _check(0 <= self.reset < 1 << self.width, f"Reset value of field {self.name} must fit in {self.width} bits", self.reset)
        _check(self.access is Access.RW or (self.accepts is None and self.frozen_by is None),
               f"Field {self.name} with a rule for writes must be one that is written", self.access)  # fmt: skip
        if self.accepts is not None:
            _check(self.low // 8 == (self.low + self.width - 1) // 8,
                   f"Field {self.name} that accepts some values must lie inside one byte", (self.low, self.width))  # fmt: skip
            _check(self.reset in self.accepts and all(0 <= value < 1 << self.width for value in self.accepts),
                   f"Values that field {self.name} accepts must fit and hold its reset value", self.accepts)  # fmt: skip

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
    """One dword of a map: its value after reset, and bits that software may change, that a function level reset leaves alone, that
    a written 1 clears. ``is_sticky``: a hot reset leaves the ``kept`` bits alone as well."""

    reset: int = 0
    writable: int = 0
    kept: int = 0
    clearable: int = 0
    is_sticky: bool = False


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

    def has(self, block, register, field):
        """Return whether there is a field of these names."""
        return any(name == (block, register, field) for name, _, _ in self._fields())

    def words(self):
        """Return a :class:`Word` for each dword of the space. Raises :exc:`ValueError` where sticky and merely kept bits share one."""
        reset, writable, kept, sticky, clearable = ([0] * (self.size_bytes // WORD_BYTES) for _ in range(5))
        for names, at, item in self._fields():
            word, bits = at // 32, ((1 << item.width) - 1) << at % 32
            reset[word] |= item.reset << at % 32
            for is_set, of in ((item.access is Access.RW, writable), (item.access is Access.RW1C, clearable),
                               (item.is_kept or item.is_sticky, kept), (item.is_sticky, sticky)):  # fmt: skip
                of[word] |= bits * is_set
            _check(sticky[word] in (0, kept[word]), "A dword must not hold sticky bits beside kept ones", ".".join(names))
        return [Word(*numbers[:4], bool(numbers[4])) for numbers in zip(reset, writable, kept, clearable, sticky)]

    def rules(self):
        """Return ``(Place, Field)`` for every field whose writes depend on their value or on another field."""
        found = []
        for _, at, item in self._fields():
            if item.frozen_by is not None:
                _check(self.place(*item.frozen_by).width == 1, f"What freezes field {item.name} must be one bit", item.frozen_by)
            if item.frozen_by is not None or item.accepts is not None:
                found.append((Place(at // 32, at % 32, item.width, item.reset), item))
        return found

    def markdown(self):
        """Return the map as Markdown: a heading for each block, and a table of its fields."""
        lines = []
        for block in self.blocks:
            lines += [f"## {block.name} ({block.offset:#05x}..{block.offset + block.size_bytes - 1:#05x})", "",
                      "| offset | register | bits | field | access | reset | meaning |", "|---|---|---|---|---|---|---|"]  # fmt: skip
            for register in sorted(block.registers, key=lambda register: register.offset):
                for item in sorted(register.fields, key=lambda item: item.low):
                    bits = f"{item.low + item.width - 1}:{item.low}" if item.width > 1 else f"{item.low}"
                    lines.append(f"| {block.offset + register.offset:#05x} | {register.name} | {bits} | {item.name} | {_access(item)} "
                                 f"| {item.reset:#x} | {item.doc} |")  # fmt: skip
            lines.append("")
        return "\n".join(lines)

    def _fields(self):
        for block in self.blocks:
            for register in block.registers:
                for item in register.fields:
                    yield (block.name, register.name, item.name), 8 * (block.offset + register.offset) + item.low, item


def _access(item):
    words = [item.access.name, *(["sticky"] if item.is_sticky else ["kept by FLR"] if item.is_kept else [])]
    if item.accepts is not None:
        words.append(f"only {', '.join(map(str, item.accepts))}")
    if item.frozen_by is not None:
        words.append(f"not while {'.'.join(item.frozen_by)}")
    return ", ".join(words)
