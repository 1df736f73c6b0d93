"""The rules of bursts and TLPs: every legal cutting passes, every broken rule is named."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringwall.models.dma import PAGE, BurstRules, Span, TlpRules
from ringwall.models.tlp import TlpType, decode, encode, memory_read, memory_write

offsets = st.one_of(st.sampled_from([0, 1, 3, 4, 127, 128, 2048, 4092, 4095]), st.integers(0, PAGE - 1))
lengths = st.one_of(st.sampled_from([0, 1, 2, 4, 8, 63, 128, 129, 4095, 4096, 4097]), st.integers(0, 9000))


def cut(rng, start, end, limit, grain):
    """Cut [start, end) at random multiples of ``grain``, at most ``limit`` bytes of whole grains, never over a page."""
    edges = [start]
    while edges[-1] < end:
        at = edges[-1]
        farthest = min(end, (at // PAGE + 1) * PAGE, at // grain * grain + limit)
        places = [*range(at // grain * grain + grain, farthest, grain), farthest]
        edges.append(rng.choice([places[-1], rng.choice(places)]))
    return list(itertools.pairwise(edges))


@settings(max_examples=200, deadline=None)
@given(offsets, lengths, st.integers(1, 5000), st.integers(0, 99))
def test_dma_bursts(offset, length, limit, seed):
    """MODEL-DMA-1: any cutting at any bytes that keeps the limit and the pages passes."""
    start = 0x7000 + offset
    bursts = [Span(a, b - a) for a, b in cut(random.Random(seed), start, start + length, limit, 1)]
    assert BurstRules(max_burst=limit).faults(Span(start, length), bursts) == []


@pytest.mark.parametrize("found, bursts", [
    (["bursts end at 0x1f80, transfer ends at 0x2080"], []),
    (["burst 0 crosses 4 KiB: 0x1f80+0x100"], [(0x1F80, 256)]),
    (["burst 1: 272 bytes > 256", "bursts end at 0x2110, transfer ends at 0x2080"], [(0x1F80, 128), (0x2000, 272)]),
    (["burst 1 starts at 0x2010, expected 0x2000"], [(0x1F80, 128), (0x2010, 112)]),
    (["burst 1 is empty"], [(0x1F80, 128), (0x2000, 0), (0x2000, 128)]),
    (["burst 1 starts at 0x1f80, expected 0x2000", "burst 2 starts at 0x2000, expected 0x1f90"],
     [(0x1F80, 128), (0x1F80, 16), (0x2000, 128)]),
    (["bursts end at 0x2081, transfer ends at 0x2080"], [(0x1F80, 128), (0x2000, 129)]),
    (["burst 0 starts at 0x2000, expected 0x1f80", "burst 1 starts at 0x1f80, expected 0x2080",
      "bursts end at 0x2000, transfer ends at 0x2080"], [(0x2000, 128), (0x1F80, 128)]),
    ([], [(0x1F80, 128), (0x2000, 128)]),
])  # fmt: skip
def test_dma_burst_faults(found, bursts):
    """MODEL-DMA-2: each broken rule is named, no other is."""
    assert BurstRules(max_burst=256).faults(Span(0x1F80, 256), [Span(*burst) for burst in bursts]) == found


def tlps_of(rng, start, length, *, mps, mrrs, data):
    """A legal cutting of a transfer into TLPs, at dwords."""
    if length in (2, 4, 8) and start % length == 0:
        pieces = [(start, start + length)]
    else:
        pieces = cut(rng, start, start + length, mrrs if data is None else mps, 4)
    return [memory_read(a, b - a, requester_id=1, tag=0) if data is None else
            memory_write(a, data[a - start : b - start], requester_id=1) for a, b in pieces]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(offsets, lengths, st.sampled_from([128, 256, 512]), st.sampled_from([128, 512, 4096]), st.booleans(), st.integers(0, 99))
def test_dma_tlps(offset, length, mps, mrrs, is_write, seed):
    """MODEL-DMA-3: any cutting at any dwords that keeps MPS, MRRS and the pages passes, at every alignment (R05, R12, R14, R18)."""
    rng, start = random.Random(seed), 0x1_0000_7000 + offset
    data = rng.randbytes(length) if is_write else None
    tlps = tlps_of(rng, start, length, mps=mps, mrrs=mrrs, data=data)
    assert [decode(encode(tlp)) for tlp in tlps] == tlps
    assert TlpRules(mps=mps, mrrs=mrrs).faults(Span(start, length), tlps, data) == []


@settings(max_examples=200, deadline=None)
@given(offsets, st.integers(1, 1200), st.booleans(), st.integers(0, 9999))
def test_dma_spoiled_tlps(offset, length, is_write, seed):
    """MODEL-DMA-4: a legal cutting with one TLP lost, doubled, swapped, moved or changed never passes (R14, R18)."""
    rng, start = random.Random(seed), 0x1_0000_7000 + offset
    data = rng.randbytes(length) if is_write else None
    tlps = tlps_of(rng, start, length, mps=128, mrrs=128, data=data)
    n = rng.randrange(len(tlps))
    one, (at, size) = tlps[n], tlps[n].byte_span()
    spoiled = [[*tlps[:n], *tlps[n + 1 :]], [*tlps[: n + 1], *tlps[n:]], [*tlps[:n], replace(one, address=one.address + 4), *tlps[n + 1 :]],
               [*tlps[:n], replace(one, type=TlpType.MRD if is_write else TlpType.MRDLK, data=b""), *tlps[n + 1 :]]]  # fmt: skip
    if len(tlps) > 1:
        spoiled.append([*tlps[1:], tlps[0]])
    if size > 1:
        shorter = memory_read(at, size - 1, requester_id=1, tag=0) if data is None else memory_write(
            at, data[at - start : at - start + size - 1], requester_id=1)  # fmt: skip
        spoiled.append([*tlps[:n], shorter, *tlps[n + 1 :]])
    if is_write:
        wrong = bytearray(one.data)
        wrong[at - one.address + rng.randrange(size)] ^= 1 << rng.randrange(8)
        spoiled.append([*tlps[:n], replace(one, data=bytes(wrong)), *tlps[n + 1 :]])
    rules = TlpRules(mps=128, mrrs=128)
    for bad in spoiled:
        assert rules.faults(Span(start, length), bad, data), bad


def reads(*spans):
    return [memory_read(at, length, requester_id=1, tag=0) for at, length in spans]


@pytest.mark.parametrize("found, transfer, tlps", [
    (["TLP 0: 65 dwords > 256 bytes"], (0x1000, 257), reads((0x1000, 257))),
    (["TLP 0: 65 dwords > 256 bytes"], (0x1003, 254), reads((0x1003, 254))),
    (["TLP 0 crosses 4 KiB: 0x1ff8+0x10"], (0x1FF8, 16),
     [replace(memory_read(0x1FF8, 8, requester_id=1, tag=0), length_dw=4)]),
    (["TLP 1 touches the dword at 0x1000 once more"], (0x1000, 5), reads((0x1000, 3), (0x1003, 2))),
    (["8 aligned bytes at 0x1008 are 2 TLPs, must be one"], (0x1008, 8), reads((0x1008, 4), (0x100C, 4))),
    (["0 aligned bytes at 0x1008 are 2 TLPs, must be one"], (0x1008, 0), reads((0x1008, 0), (0x1008, 0))),
    ([], (0x1004, 8), reads((0x1004, 4), (0x1008, 4))),
    ([], (0x1008, 0), reads((0x1008, 0))),
    ([], (0x1008, 0), []),
    (["TLP 1 touches no byte"], (0x1008, 12), reads((0x1008, 12), (0x1014, 0))),
    (["TLP 0 starts at 0x1008, expected 0x1000", "TLPs end at 0x1010, transfer ends at 0x1008"], (0x1000, 8), reads((0x1008, 8))),
    (["TLP 0 leaves out bytes inside 0x1000+0x8"], (0x1000, 8),
     [replace(memory_read(0x1000, 8, requester_id=1, tag=0), first_be=0b1011)]),
    (["TLP 0: byte enables 1111 and 0000 of 2 dwords", "TLP 0 leaves out bytes inside 0x1000+0x4"], (0x1000, 4),
     [replace(memory_read(0x1000, 8, requester_id=1, tag=0), last_be=0)]),
    (["TLP 0 is MWR, expected MRD", "TLPs end at 0x1000, transfer ends at 0x1004"], (0x1000, 4),
     [memory_write(0x1000, b"abcd", requester_id=1)]),
])  # fmt: skip
def test_dma_tlp_faults(found, transfer, tlps):
    """MODEL-DMA-5: each broken rule of TLPs is named, no other is (R05, R14, R18)."""
    assert TlpRules(mps=128, mrrs=256).faults(Span(*transfer), tlps) == found


def test_dma_data():
    """MODEL-DMA-6: the bytes of a write are compared where they belong, padding is not (R10)."""
    rules, data = TlpRules(mps=128, mrrs=128), bytes(range(10))
    good = memory_write(0x1003, data, requester_id=1)
    padded = replace(good, data=b"\xee\xee\xee" + data + b"\xee\xee\xee")
    assert rules.faults(Span(0x1003, 10), [good], data) == rules.faults(Span(0x1003, 10), [padded], data) == []
    assert rules.faults(Span(0x1003, 10), [good], data[::-1]) == ["TLP 0 carries other data for 0x1003+0xa"]


def test_dma_parameters():
    """MODEL-DMA-7: limits that cannot be are refused with a sentence."""
    with pytest.raises(ValueError, match="at least 1 byte, not 0"):
        BurstRules(max_burst=0)
    for wrong in ({"mps": 100, "mrrs": 128}, {"mps": 128, "mrrs": 8192}):
        with pytest.raises(ValueError, match=r"power of two between 128 and 4096, not (100|8192)"):
            TlpRules(**wrong)
