"""TLPs against hand-made dwords, against a second packer written from the header table, and against their rules."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringwall.models.tlp import (
    CplStatus,
    MalformedTlp,
    Pasid,
    Tlp,
    TlpType,
    decode,
    encode,
    memory_read,
    memory_write,
    stray_bits,
)

# The second packer: name of the field -> (dword, highest bit, lowest bit), as the header is drawn. [PCIe5 2.2.1 to 2.2.9]
DW0 = {"fmt": (0, 31, 29), "type": (0, 28, 24), "t9": (0, 23, 23), "tc": (0, 22, 20), "t8": (0, 19, 19), "ido": (0, 18, 18),
       "td": (0, 15, 15), "poisoned": (0, 14, 14), "relaxed_ordering": (0, 13, 13), "no_snoop": (0, 12, 12), "at": (0, 11, 10),
       "length": (0, 9, 0)}  # fmt: skip
REQUEST = DW0 | {"requester_id": (1, 31, 16), "tag": (1, 15, 8), "last_be": (1, 7, 4), "first_be": (1, 3, 0)}
MEMORY3 = REQUEST | {"low": (2, 31, 0)}
MEMORY4 = REQUEST | {"high": (2, 31, 0), "low": (3, 31, 0)}
CONFIG = REQUEST | {"completer_id": (2, 31, 16), "register": (2, 11, 0)}
MESSAGE = DW0 | {"requester_id": (1, 31, 16), "tag": (1, 15, 8), "message_code": (1, 7, 0), "high": (2, 31, 0), "low": (3, 31, 0)}
COMPLETION = DW0 | {"completer_id": (1, 31, 16), "status": (1, 15, 13), "bcm": (1, 12, 12), "count": (1, 11, 0),
                    "requester_id": (2, 31, 16), "tag": (2, 15, 8), "lower_address": (2, 6, 0)}  # fmt: skip

# Fmt without the size of the header, Type, table of the header of 3 dwords, of 4.
KINDS = {
    TlpType.MRD: (0, 0, MEMORY3, MEMORY4), TlpType.MRDLK: (0, 1, MEMORY3, MEMORY4), TlpType.MWR: (2, 0, MEMORY3, MEMORY4),
    TlpType.IORD: (0, 2, MEMORY3, None), TlpType.IOWR: (2, 2, MEMORY3, None),
    TlpType.CFGRD0: (0, 4, CONFIG, None), TlpType.CFGWR0: (2, 4, CONFIG, None),
    TlpType.CFGRD1: (0, 5, CONFIG, None), TlpType.CFGWR1: (2, 5, CONFIG, None),
    TlpType.MSG: (0, 16, None, MESSAGE), TlpType.MSGD: (2, 16, None, MESSAGE),
    TlpType.CPL: (0, 10, COMPLETION, None), TlpType.CPLD: (2, 10, COMPLETION, None),
    TlpType.CPLLK: (0, 11, COMPLETION, None), TlpType.CPLDLK: (2, 11, COMPLETION, None),
    TlpType.FETCHADD: (2, 12, MEMORY3, MEMORY4), TlpType.SWAP: (2, 13, MEMORY3, MEMORY4), TlpType.CAS: (2, 14, MEMORY3, MEMORY4),
}  # fmt: skip


def second_pack(tlp):
    """Pack a TLP by the tables above."""
    fmt, code, three, four = KINDS[tlp.type]
    table = four if three is None or (tlp.address >> 32 and four is not None) else three
    header = [0] * (4 if table is four else 3)
    values = {name: getattr(tlp, name) for name in table if hasattr(tlp, name)} | {
        "fmt": fmt | (table is four), "type": code | tlp.message_routing, "length": tlp.length_dw % 1024, "t9": tlp.tag >> 9,
        "t8": tlp.tag >> 8 & 1, "tag": tlp.tag & 255, "high": tlp.address >> 32, "low": tlp.address % 2**32,
        "count": tlp.byte_count % 4096}  # fmt: skip
    for name, (dword, high, low) in table.items():
        assert 0 <= values[name] < 2 << high - low, name
        header[dword] |= int(values[name]) << low
    payload = [int.from_bytes(tlp.data[n : n + 4], "little") for n in range(0, len(tlp.data), 4)]
    prefix = [] if tlp.pasid is None else [0x9100_0000 | tlp.pasid[0] | tlp.pasid[1] << 20 | tlp.pasid[2] << 21]
    return prefix + header + payload + ([tlp.digest] if tlp.td else [])


@st.composite
def tlps(draw):
    """Draw a well-formed TLP of any kind."""
    kind = draw(st.sampled_from(TlpType))
    rng = random.Random(draw(st.integers(0, 1 << 32)))  # bits that no rule speaks of
    def flag():
        return rng.random() < 0.3

    values = {"tc": rng.randrange(8), "relaxed_ordering": flag(), "no_snoop": flag(), "ido": flag(), "at": rng.randrange(4),
              "poisoned": flag(), "td": flag(), "requester_id": rng.getrandbits(16), "tag": rng.getrandbits(10)}  # fmt: skip
    values["digest"] = rng.getrandbits(32) if values["td"] else 0
    if kind.is_completion:
        values |= {"completer_id": rng.getrandbits(16), "status": draw(st.sampled_from([*CplStatus, 3, 7])), "bcm": flag(),
                   "byte_count": rng.randrange(1, 4097), "lower_address": rng.getrandbits(7)}  # fmt: skip
        length = draw(st.integers(1, 1024))
    elif kind in (TlpType.MSG, TlpType.MSGD):
        values |= {"message_code": rng.getrandbits(8), "message_routing": rng.randrange(8), "address": rng.getrandbits(64)}
        length = draw(st.integers(1, 1024))
    elif kind in (TlpType.MRD, TlpType.MRDLK, TlpType.MWR):
        page = draw(st.sampled_from([0, 0xF_FFFF, 0x10_0000, (1 << 52) - 1]))
        offset = draw(st.integers(0, 1023))
        length = draw(st.one_of(st.integers(1, 1024 - offset), st.integers(1, min(3, 1024 - offset))))
        first, last = draw(st.integers(0, 15)), draw(st.integers(0, 15)) if length > 1 else 0
        assume(enables_are_legal(4 * offset, length, first, last))
        values |= {"address": page << 12 | offset << 2, "first_be": first, "last_be": last}
    elif kind in (TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS):
        size = draw(st.sampled_from([4, 8, 16] if kind is TlpType.CAS else [4, 8]))
        length = size // 4 * (2 if kind is TlpType.CAS else 1)
        address = draw(st.integers(0, (1 << draw(st.sampled_from([32, 64]))) // size - 1)) * size
        values |= {"address": address, "first_be": rng.getrandbits(4), "last_be": rng.getrandbits(4)}
    else:
        length = 1
        values["first_be"] = draw(st.integers(0, 15))
        if kind in (TlpType.IORD, TlpType.IOWR):
            values["address"] = draw(st.integers(0, (1 << 30) - 1)) * 4
        else:
            values |= {"completer_id": rng.getrandbits(16), "register": draw(st.integers(0, 1023)) * 4}
    if "first_be" in values and "register" not in values and kind not in (TlpType.IORD, TlpType.IOWR) and flag():
        values["pasid"] = Pasid(rng.getrandbits(20), flag(), flag())
    carries_length = kind.has_data or not (kind.is_completion or kind is TlpType.MSG)
    return Tlp(kind, length_dw=length if carries_length else 0, data=rng.randbytes(4 * length) if kind.has_data else b"", **values)


def enables_are_legal(address, length, first, last):
    """Judge byte enables by the bytes that they select. [PCIe5 2.2.5]"""
    if length == 1:
        return last == 0
    if not first or not last:
        return False
    bits = [first >> n & 1 for n in range(4)] + [1] * 4 * (length - 2) + [last >> n & 1 for n in range(4)]
    is_one_run = "01" not in "".join(map(str, bits)).strip("0") and "10" not in "".join(map(str, bits)).strip("0")
    return is_one_run or (length == 2 and address % 8 == 0)


@settings(max_examples=500, deadline=None)
@given(tlps())
def test_tlp_round_trip(tlp):
    """MODEL-TLP-1: any well-formed TLP packs as the header tables say and comes back unchanged, without stray bits."""
    dwords = encode(tlp)
    assert dwords == second_pack(tlp)
    assert decode(dwords) == tlp
    assert stray_bits(dwords) == stray_bits(dwords, tlp) == []
    assert tlp.type.name in str(tlp)


@settings(max_examples=500, deadline=None)
@given(tlps(), st.integers(0, 4), st.integers(0, 31))
def test_tlp_every_bit_counts(tlp, index, bit):
    """MODEL-TLP-2: one flipped header bit is another TLP, a malformed one, or reported as stray; never the same one in silence."""
    dwords = encode(tlp)
    header = len(dwords) - len(tlp.data) // 4 - tlp.td
    index %= header
    dwords[index] ^= 1 << bit
    try:
        other = decode(dwords)
    except MalformedTlp:
        return
    stray = stray_bits(dwords, other)
    if other == tlp:
        assert stray == [(index, 1 << bit)]
    elif other.type is tlp.type:
        assert stray == []
        assert encode(other) == dwords
    else:  # the other type may have reserved what this one used
        assert (index, 1 << bit) not in stray


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=8), st.sampled_from([None, *TlpType]))
def test_tlp_noise(dwords, kind):
    """MODEL-TLP-3: any dwords decode or are malformed, nothing else; what decodes encodes again but for stray bits."""
    if kind and dwords:
        dwords[0] = dwords[0] & 0x00FF_FC00 | encode(Tlp(kind))[0] | len(dwords) - 3 & 1023
    try:
        tlp = decode(dwords)
    except MalformedTlp:
        return
    again = encode(tlp)
    for index, bits in stray_bits(dwords, tlp):
        again[index] ^= bits
    assert again == dwords


@pytest.mark.parametrize("tlp, dwords", [
    # A host writes 0x12345678 to 0xFDAFF040, reads it with tag 0x0C, and gets its answer.
    (memory_write(0xFDAF_F040, b"\x78\x56\x34\x12", requester_id=0), [0x4000_0001, 0x0000_000F, 0xFDAF_F040, 0x1234_5678]),
    (memory_read(0xFDAF_F040, 4, requester_id=0, tag=0x0C), [0x0000_0001, 0x0000_0C0F, 0xFDAF_F040]),
    (Tlp(TlpType.CPLD, length_dw=1, requester_id=0, tag=0x0C, completer_id=0x0100, byte_count=4, lower_address=0x40,
         data=b"\x78\x56\x34\x12"), [0x4A00_0001, 0x0100_0004, 0x0000_0C40, 0x1234_5678]),
    # Above 4 GiB the header has 4 dwords; 4096 bytes are Length 0 and Byte Count 0.
    (memory_read(0x1_2345_6000, 4096, requester_id=0x0102, tag=0x2A5), [0x2080_0000, 0x0102_A5FF, 0x0000_0001, 0x2345_6000]),
    (Tlp(TlpType.CPLD, length_dw=1, requester_id=0x0102, tag=0x2A5, byte_count=4096, data=bytes(4)),
     [0x4A80_0001, 0x0000_0000, 0x0102_A500, 0]),
    (Tlp(TlpType.CPL, requester_id=0x0100, tag=0x1FF, completer_id=0x0200, status=CplStatus.UR, byte_count=4),
     [0x0A08_0000, 0x0200_2004, 0x0100_FF00]),
    # Configuration: bus 1, device 0, function 1, register 0x104, upper half.
    (Tlp(TlpType.CFGWR0, length_dw=1, tag=7, first_be=0b1100, completer_id=0x0101, register=0x104, data=b"\0\0\xCD\xAB"),
     [0x4400_0001, 0x0000_070C, 0x0101_0104, 0xABCD_0000]),
    # 6 bytes from an address that ends in 3: enables 1000, 1111, 0001.
    (memory_write(0x1003, b"abcdef", requester_id=0x0100),
     [0x4000_0003, 0x0100_0018, 0x0000_1000, 0x6100_0000, 0x6564_6362, 0x0000_0066]),
    # ERR_NONFATAL to the root complex; FetchAdd of 8 bytes; a translated read of a process.
    (Tlp(TlpType.MSG, requester_id=0x0100, message_code=0x31), [0x3000_0000, 0x0100_0031, 0, 0]),
    (Tlp(TlpType.FETCHADD, length_dw=2, requester_id=0x0100, tag=1, address=0x2008, data=b"\1" + bytes(7)),
     [0x4C00_0002, 0x0100_0100, 0x2008, 1, 0]),
    (memory_read(0x5000, 64, requester_id=0x0100, tag=1, at=2, pasid=Pasid(0xABCDE, True, True)),
     [0x913A_BCDE, 0x0000_0810, 0x0100_01FF, 0x5000]),
])  # fmt: skip
def test_tlp_worked_examples(tlp, dwords):
    """MODEL-TLP-4: TLPs written out by hand, both ways."""
    assert encode(tlp) == dwords
    assert decode(dwords) == tlp


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("address", [0x1000, 0x1004])
def test_tlp_byte_enables(address, length):
    """MODEL-TLP-5: every pair of byte enables is accepted or refused by the bytes it selects; spans and gaps follow (R14)."""
    for first in range(16):
        for last in range(16):
            tlp = Tlp(TlpType.MWR, length_dw=length, address=address, first_be=first, last_be=last, data=bytes(range(4 * length)))
            dwords = encode(tlp)
            if not enables_are_legal(address, length, first, last):
                with pytest.raises(MalformedTlp, match="byte enables"):
                    decode(dwords)
                continue
            assert decode(dwords) == tlp
            mask = first if length == 1 else first | ((1 << 4 * (length - 2)) - 1) << 4 | last << 4 * (length - 1)
            wanted = [n for n in range(4 * length) if mask >> n & 1]
            assert list(tlp.enabled_bytes()) == [(address + n, n) for n in wanted]
            span = (address + wanted[0], wanted[-1] - wanted[0] + 1) if wanted else (address, 0)
            assert tlp.byte_span() == span
            if wanted:
                assert tlp.has_gaps == (len(wanted) != span[1])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([0, 0xFFFF_F000, 0x1_0000_0000, (1 << 64) - 4096]), st.integers(0, 4095), st.integers(0, 4096), st.data())
def test_tlp_builders(page, offset, length, data):
    """MODEL-TLP-6: any bytes inside one page are one legal request that touches exactly them; others are refused (R05, R14)."""
    address = page + offset
    fill = random.Random(data.draw(st.integers(0, 99))).randbytes(length)
    if offset + length > 4096:
        with pytest.raises(ValueError, match=r"must (not cross 4 KiB|lie within 64 bits), not"):
            memory_read(address, length, requester_id=1, tag=2)
        with pytest.raises(ValueError, match=r"must (not cross 4 KiB|lie within 64 bits), not"):
            memory_write(address, fill, requester_id=1)
        return
    read, write = memory_read(address, length, requester_id=1, tag=2, tc=3), memory_write(address, fill, requester_id=1, at=1)
    assert decode(encode(read)) == read
    assert decode(encode(write)) == write
    assert (read.type, read.tag, read.tc, write.type, write.at) == (TlpType.MRD, 2, 3, TlpType.MWR, 1)
    assert list(write.enabled_bytes()) == [(address + n, fill[n]) for n in range(length)]
    assert read.byte_span() == write.byte_span() == ((address, length) if length else (address & ~3, 0))
    assert read.length_dw == max(1, (address + length + 3) // 4 - address // 4 if length else 1)


@pytest.mark.parametrize("reason, dwords", [
    ("no dword", []),
    ("reserved", [0x0000_0001 | 0x1F << 24, 0xF, 0]),
    ("reserved", [0x2A00_0001, 4, 0, 0]),  # a completion with a header of 4 dwords
    ("reserved", [0x2400_0001, 0xF, 0, 0]),  # a configuration read with one
    ("reserved", [0x0C00_0001, 0xF, 0]),  # FetchAdd without data
    ("reserved", [0x1000_0000, 0, 0]),  # a message with a header of 3 dwords
    ("no prefix that is supported", [0x8000_0000, 0x0000_0001, 0xF, 0]),
    ("no prefix that is supported", [0x9000_0000, 0x0000_0001, 0xF, 0]),  # a TPH prefix
    ("no prefix that is supported", [0xE000_0001, 0xF, 0, 0]),
    ("nothing behind", [0x9100_0000]),
    ("its header says", [0x0000_0001]),
    ("its header says", [0x0000_0001, 0xF]),
    ("its header says", [0x0000_0001, 0xF, 0, 0]),  # a read with data
    ("its header says", [0x4000_0001, 0xF, 0]),
    ("its header says", [0x4000_0001, 0xF, 0, 0, 0]),
    ("its header says", [0x4000_0000, 0xFF, 0, *[0] * 1023]),
    ("its header says", [0x4000_8001, 0xF, 0, 0]),  # digest announced and missing
    ("its header says", [0x0A00_0001, 4, 0, 0]),  # a completion without data and a dword of data
    ("below 4 GiB", [0x2000_0001, 0xF, 0, 0x1000]),
    ("below 4 GiB", [0x6000_0001, 0xF, 0, 0x1000, 0]),
    ("crosses 4 KiB", [0x0000_0002, 0xFF, 0x0FFC]),
    ("crosses 4 KiB", [0x0000_0000, 0xFF, 0x1004]),
    ("crosses 4 KiB", [0x2000_0002, 0xFF, 0xFFFF_FFFF, 0xFFFF_FFFC]),
    ("byte enables", [0x0000_0001, 0xFF, 0x1000]),
    ("byte enables", [0x0000_0002, 0x0F, 0x1000]),
    ("byte enables", [0x0000_0002, 0xF7, 0x1004]),
    ("must be 1 and 0000", [0x0400_0003, 0xFF, 0x0100_0000]),  # the configuration read of 3 dwords
    ("must be 1 and 0000", [0x0400_0001, 0x1F, 0x0100_0000]),
    ("must be 1 and 0000", [0x0200_0002, 0x0F, 0x0000_0100]),
    ("FETCHADD of 3 dwords", [0x4C00_0003, 0, 0x1000, 0, 0, 0]),
    ("CAS of 1 dwords", [0x4E00_0001, 0, 0x1000, 0]),
    ("SWAP of 8 bytes at 0x1004", [0x4D00_0002, 0, 0x1004, 0, 0]),
    ("CAS of 8 bytes at 0x1004", [0x4E00_0004, 0, 0x1004, 0, 0, 0, 0]),
    ("PASID", [0x9100_0001, 0x4A00_0001, 4, 0, 0]),
    ("PASID", [0x9100_0001, 0x0400_0001, 0xF, 0]),
])  # fmt: skip
def test_tlp_malformed(reason, dwords):
    """MODEL-TLP-7: each malformed TLP is refused for its own reason."""
    with pytest.raises(MalformedTlp, match=reason):
        decode(dwords)


@pytest.mark.parametrize("field, bad", [
    ("tag", 1024), ("tag", -1), ("requester_id", 1 << 16), ("tc", 8), ("at", 4), ("length_dw", 1025), ("length_dw", -1),
    ("first_be", 16), ("last_be", -1), ("address", 2), ("address", 1 << 64), ("pasid", Pasid(1 << 20)),
])  # fmt: skip
def test_tlp_misfits(field, bad):
    """MODEL-TLP-8: a value that does not fit its field is refused, never cut; so is a payload that is no whole dwords."""
    with pytest.raises(ValueError, match=f"must fit the header, not .*{field}="):
        encode(Tlp(TlpType.MRD, **{"length_dw": 1, field: bad}))


@pytest.mark.parametrize("kind, field, bad", [
    (TlpType.CPLD, "byte_count", 4097), (TlpType.CPLD, "byte_count", -1), (TlpType.CPL, "lower_address", 128), (TlpType.CPL, "status", 8),
    (TlpType.CPL, "completer_id", 1 << 16), (TlpType.CFGRD0, "register", 4096), (TlpType.CFGRD0, "register", 2),
    (TlpType.CFGRD0, "completer_id", -1), (TlpType.IORD, "address", 1 << 32), (TlpType.MSG, "message_code", 256),
    (TlpType.MSG, "message_routing", 8), (TlpType.MSG, "address", 1 << 64),
])  # fmt: skip
def test_tlp_misfits_by_type(kind, field, bad):
    """MODEL-TLP-9: the same for the fields that only some types have."""
    with pytest.raises(ValueError, match=f"must fit the header, not .*{field}="):
        encode(Tlp(kind, **{field: bad}))
    with pytest.raises(ValueError, match="must be a multiple of 4 bytes, not 3"):
        encode(Tlp(TlpType.MWR, length_dw=1, first_be=7, data=b"abc"))


def test_tlp_text():
    """MODEL-TLP-10: the text of a TLP says who, what and where."""
    assert str(memory_read(0x1003, 6, requester_id=0x0109, tag=5)) == "MRD 01:01.1 tag 5 0x1003+6"
    assert str(memory_write(0x1000, b"abcd", requester_id=0x0100, at=1, relaxed_ordering=True)) == (
        "MWR 01:00.0 tag 0 0x1000+4 relaxed_ordering at=1")
    assert str(Tlp(TlpType.CPL, requester_id=0x0100, tag=9, status=CplStatus.CA, byte_count=4, lower_address=0x10)) == (
        "CPL 01:00.0 tag 9 CA byte count 4 lower address 0x10")
    assert str(Tlp(TlpType.CPL, status=5)) == "CPL 00:00.0 tag 0 status 5 byte count 0 lower address 0x0"
    assert str(Tlp(TlpType.CFGRD0, length_dw=1, completer_id=0x0102, register=0x10, first_be=3)) == (
        "CFGRD0 00:00.0 tag 0 to 01:00.2 register 0x10 enables 0011")
    assert str(Tlp(TlpType.MSG, message_code=0x30)) == "MSG 00:00.0 tag 0 code 0x30 routing 0"
    assert [kind for kind in TlpType if kind.is_posted] == [TlpType.MWR, TlpType.MSG, TlpType.MSGD]
