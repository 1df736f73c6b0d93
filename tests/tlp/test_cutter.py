"""The cutter: every piece legal, the burst covered exactly, one piece per cycle."""

import itertools
import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.rtl.tlp.cutter import Cut, Cutter, Piece
from ringwall.rtl.tlp.layouts import Burst
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack

PAGE = 4096


def limit_of(code, largest):
    """Max_Payload_Size or Max_Read_Request_Size in bytes for a code as the host may write it [PCIe5 7.5.3.4]."""
    return 128 << min(0 if code > 5 else code, largest)


def enabled_bytes(piece):
    """Return the byte addresses that a piece's length and byte enables select."""
    base = piece.burst.address & ~3
    found = []
    for n in range(piece.length_dw):
        if n == 0:
            enables = piece.first_be
        elif n == piece.length_dw - 1:
            enables = piece.last_be
        else:
            enables = 15
        found += [base + 4 * n + k for k in range(4) if enables >> k & 1]
    return found


def faults(address, length, limit, pieces):
    """Return every rule that ``pieces`` break for a burst; the rules are the bus's, the choice of cuts is not one of them."""
    found = []
    for n, piece in enumerate(pieces):
        start, size = piece.burst.address, piece.burst.length_bytes
        if not 1 <= size <= limit:
            found.append(f"piece {n} has {size} bytes, limit {limit}")
        if start // PAGE != (start + size - 1) // PAGE:
            found.append(f"piece {n} crosses 4 KiB")
        if (piece.first, piece.last) != (n == 0, n == len(pieces) - 1):
            found.append(f"piece {n} of {len(pieces)}: first {piece.first} last {piece.last}")
        if (piece.length_dw == 1) != (piece.last_be == 0) or piece.first_be == 0:
            found.append(f"piece {n}: {piece.length_dw} dwords with enables {piece.first_be:04b} {piece.last_be:04b}")
        if enabled_bytes(piece) != list(range(start, start + size)):
            found.append(f"piece {n}: enables do not select {start:#x}+{size}")
    dwords = [{a // 4 for a in enabled_bytes(piece)} for piece in pieces]
    if any(a & b for a, b in itertools.combinations(dwords, 2)):
        found.append("a dword is touched by two pieces")
    if [a for piece in pieces for a in enabled_bytes(piece)] != list(range(address, address + length)):
        found.append("the pieces do not cover the burst exactly, in ascending order")
    return found


def random_burst(rng):
    """Return (address, length) of a legal burst, mostly near a boundary that matters."""
    edge = rng.choice([0, 4, 64, 128, 256, 512, 1024, 2048, 4096])
    offset = (rng.choice([edge, edge - rng.randrange(1, 9), edge + rng.randrange(9), rng.randrange(PAGE)])) % PAGE
    room = PAGE - offset
    length = rng.choice([1, 2, 3, 4, 5, 8, 127, 128, 129, 255, 256, 512, 513, room - 1, room, rng.randrange(1, PAGE + 1)])
    return (rng.getrandbits(52) << 12) + offset, max(1, min(length, room))


@pytest.mark.parametrize("largest", [5, 1])
def test_cutter(request, largest):
    run(Cutter(largest_code=largest), module=__name__, node=request.node.nodeid, params={"largest": largest})


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def pieces_are_legal(dut):
    """TLP-CUT-1: random bursts at every limit, random back-pressure and gaps; each piece and the whole are judged (R05, R18)."""
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    got = []
    cocotb.start_soon(o.watch(got))
    cocotb.start_soon(random_ready(o, rng, p=0.7))
    sent = []
    for _ in range(300):
        address, length = random_burst(rng)
        fields = {"address": address, "length_bytes": length, "cookie": rng.getrandbits(8), "client": rng.getrandbits(4),
                  "pasid": rng.getrandbits(20), "function": rng.getrandbits(8), "is_write": rng.getrandbits(1)}  # fmt: skip
        sent.append((fields, rng.randrange(8)))
    await i.put_many([pack(Cut(), burst=fields, limit_code=code) for fields, code in sent], gaps=lambda: rng.choice([0, 0, 3]))
    await ClockCycles(dut.clk, 300)
    pieces = [unpack(Piece(), piece) for piece in got]
    for n, (fields, code) in enumerate(sent):
        mine = list(itertools.takewhile(lambda p: not p.last, pieces))
        mine.append(pieces[len(mine)])
        del pieces[: len(mine)]
        found = faults(fields["address"], fields["length_bytes"], limit_of(code, params()["largest"]), mine)
        assert not found, f"burst {n} {fields} code {code}: " + "; ".join(found)
        whole = vars(unpack(Burst, pack(Burst, **fields)))
        for piece in mine:
            assert vars(piece.burst) == whole | {"address": piece.burst.address, "length_bytes": piece.burst.length_bytes}
    assert not pieces, "more pieces than bursts asked for"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def aligned_words_are_one_piece(dut):
    """TLP-CUT-2: every naturally aligned access of 1, 2, 4 or 8 bytes in a page's corners is one piece (R05)."""
    i, o = await start(dut, "i", "o")
    got = []
    cocotb.start_soon(o.watch(got))
    o.set_ready(1)
    edges = (0, 128, 1024, PAGE)
    sent = [(a, n) for n in (1, 2, 4, 8) for edge in edges for a in range(edge - 16, edge + 16, n) if 0 <= a < PAGE]
    await i.put_many([pack(Cut(), burst={"address": 0x7000 + a, "length_bytes": n}, limit_code=0) for a, n in sent])
    await ClockCycles(dut.clk, 5)
    assert [(p.burst.address - 0x7000, p.burst.length_bytes, p.first, p.last) for p in (unpack(Piece(), x) for x in got)] == [
        (a, n, 1, 1) for a, n in sent]  # fmt: skip


@cocotb.test(timeout_time=100, timeout_unit="us")
async def a_piece_leaves_in_every_cycle(dut):
    """TLP-CUT-3: long and short bursts back to back: latency 1 cycle, then no cycle without a piece."""
    i, o = await start(dut, "i", "o")
    got, when, taken = [], [], []
    cocotb.start_soon(o.watch(got, when))
    cocotb.start_soon(i.watch([], taken))
    o.set_ready(1)
    bursts = [(0x1000, PAGE), (0x2040, 64), (0x2080, 64), (0x30C1, 700), (0x4000, 4), (0x5000, PAGE)]
    await i.put_many([pack(Cut(), burst={"address": a, "length_bytes": n}, limit_code=0) for a, n in bursts])
    await ClockCycles(dut.clk, 40)
    assert len(got) == 32 + 1 + 1 + 6 + 1 + 32
    assert when == list(range(taken[0] + 1, taken[0] + 1 + len(got)))


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def an_abandoned_burst_ends(dut):
    """TLP-CUT-4: after `abandon` no piece of that burst follows and the next burst starts with its first piece."""
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    sent = [random_burst(rng) for _ in range(200)]
    cuts = [pack(Cut(), burst={"address": a, "length_bytes": n, "cookie": k % 256}, limit_code=0) for k, (a, n) in enumerate(sent)]
    cocotb.start_soon(i.put_many(cuts, gaps=lambda: rng.choice([0, 0, 2])))
    for k in range(len(sent)):
        keep = rng.choice([1, 1, 2, 3, 40])
        count = 0
        while True:
            count += 1
            dut.abandon.value = int(count == keep)
            piece = unpack(Piece(), await o.get())
            assert (piece.burst.cookie, piece.first) == (k % 256, count == 1)
            if piece.last or count == keep:
                break
            if rng.random() < 0.3:
                dut.abandon.value = 1  # without a transfer it means nothing
                await ClockCycles(dut.clk, 2)
    dut.abandon.value = 0
    o.set_ready(1)
    await ClockCycles(dut.clk, 10)
    assert not o.read_valid()


def test_parameters():
    """TLP-CUT-5: a parameter out of range is refused with a sentence."""
    with pytest.raises(ValueError, match="Largest code must be between 0 and 5, not 6"):
        Cutter(largest_code=6)
