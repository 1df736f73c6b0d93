"""Register maps check themselves when they are made, and come to the right dwords."""

import pytest

from ringwall.rtl.regs.table import Access, Block, Field, Map, Place, Register, Word


def test_words_of_a_map():
    """REGS-1: fields of registers of 1, 2 and 4 bytes land in their bits; reset values and writable bits are theirs only."""
    block = Block("block", 8, 12, (
        Register("low", 0, 1, (Field("all", 0, 8, Access.RW, 0x5A),)),
        Register("high", 2, 2, (Field("bit", 3, reset=1), Field("some", 12, 4, Access.RW, 9))),
        Register("word", 8, 4, (Field("top", 31, 1, Access.RW),)),
    ))  # fmt: skip
    words = Map(24, (block, Block("first", 0, 4))).words()
    assert words == [Word(), Word(), Word(0x5A | 1 << 19 | 9 << 28, 0xF00000FF), Word(), Word(0, 1 << 31), Word()]
    assert Map(24, (block,)).place("block", "high", "some") == Place(2, 28, 4, 9)
    with pytest.raises(KeyError, match=r"block\.high\.none"):
        Map(24, (block,)).place("block", "high", "none")


@pytest.mark.parametrize("make, sentence", [
    (lambda: Field("f", -1), r"lowest bit and a positive width, not \(-1, 1\)"),
    (lambda: Field("f", 0, 0), r"lowest bit and a positive width, not \(0, 0\)"),
    (lambda: Field("f", 0, 2, reset=4), "must fit in 2 bits, not 4"),
    (lambda: Register("r", 0, 3), "must be 1, 2 or 4 bytes, not 3"),
    (lambda: Register("r", 2, 4), "must be a multiple of its size, not 2"),
    (lambda: Register("r", 0, 1, (Field("f", 7, 2),)), r"must lie inside register r, not \(7, 2\)"),
    (lambda: Register("r", 0, 1, (Field("f", 0, 3), Field("g", 2))), "must not overlap, not 'g'"),
    (lambda: Block("b", 0, 4, (Register("r", 4, 4),)), "must lie inside the 4 bytes of b, not 4"),
    (lambda: Block("b", 0, 4, (Register("r", 0, 2), Register("s", 1, 1))), "Registers of b must not overlap, not 's'"),
    (lambda: Map(6, ()), "positive multiple of 4 bytes, not 6"),
    (lambda: Map(16, (Block("b", 12, 8),)), r"must lie below 0x10, not '0xc\.\.0x13'"),
    (lambda: Map(64, (Block("b", 16, 8), Block("c", 20, 8))), r"must not overlap b, which ends at 0x17, not '0x14\.\.0x1b'"),
])  # fmt: skip
def test_contradictions_are_refused(make, sentence):
    """REGS-2 (R69): a field, register or block that is on or outside another, or a value too large, is refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        make()
