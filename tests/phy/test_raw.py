"""RawPhy: headers out of the line and back into it, at full rate; TLPs packed by the golden model."""

import random
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, MalformedTlp, Pasid, Tlp, TlpType, decode, encode, memory_read, memory_write
from ringwall.rtl.phy.raw import RawBeat, RawPhy
from ringwall.rtl.tlp.layouts import Malformed, TlpBeat
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, reader, start, unpack
from ringwall.sim.tlp_beats import to_beats


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_raw(request, width):
    run(RawPhy(width=width), module=__name__, node=request.node.nodeid, params={"width": width, "has_pasid": False})


@pytest.mark.parametrize("width", [64, 128, 512])
def test_pasid(request, width):
    run(RawPhy(width=width, has_pasid=True), module=__name__, node=request.node.nodeid, params={"width": width, "has_pasid": True})


def test_parameters_are_checked():
    """PHY-RAW-5: a link width that does not exist is refused with a sentence."""
    for bad in (0, 32, 1024, "256"):
        with pytest.raises(ValueError, match="64, 128, 256 or 512 bits, not"):
            RawPhy(width=bad)


def random_tlp(rng, longest=256):
    high = rng.choice([0, 0, rng.getrandbits(31) + 1]) << 32
    address = high | rng.randrange(1 << 19) << 12 | rng.randrange(4096 - longest) & ~3
    kind = rng.randrange(7)
    rid, tag = rng.getrandbits(16), rng.getrandbits(8)
    if kind <= 1:
        return memory_write(address, rng.randbytes(rng.choice([1, 4, 8, 12, 32, 60, 64, longest, rng.randrange(1, longest)])),
                            requester_id=rid, tag=tag)
    if kind == 2:
        return memory_read(address, rng.randrange(1, longest), requester_id=rid, tag=tag)
    if kind == 3:
        size = 4 * rng.choice([1, 2, 3, 4, 8, 15, 16, 17, longest // 4])
        return Tlp(TlpType.CPL if kind == 9 else TlpType.CPLD, length_dw=size // 4, completer_id=rng.getrandbits(16), requester_id=rid,
                   tag=tag, byte_count=rng.randrange(1, 4097), lower_address=rng.getrandbits(7), data=rng.randbytes(size))
    if kind == 4:
        return Tlp(TlpType.CPL, completer_id=rng.getrandbits(16), requester_id=rid, tag=tag, byte_count=4, status=CplStatus.UR)
    config = {"requester_id": rid, "tag": tag, "completer_id": rng.getrandbits(16), "register": 4 * rng.randrange(1024), "length_dw": 1,
              "first_be": rng.randrange(1, 16)}
    if kind == 5:
        return Tlp(TlpType.CFGRD0, **config)
    return Tlp(TlpType.CFGWR0, data=rng.randbytes(4), **config)


def random_tlps(rng):
    """Return random TLPs; on a link with PASIDs half of those that may have one do."""
    tlps = [random_tlp(rng) for _ in range(300)]
    if params()["has_pasid"]:
        tlps = [replace(tlp, pasid=Pasid(rng.getrandbits(20))) if tlp.type in (TlpType.MRD, TlpType.MWR) and rng.randrange(2) else tlp
                for tlp in tlps]  # fmt: skip
    return tlps


def tlp_beat(width):
    return TlpBeat(width, params()["has_pasid"])


def beats_of(width, tlp):
    return to_beats(width, tlp, params()["has_pasid"])


def raw_beats(width, dwords):
    lanes, layout = width // 32, RawBeat(width)
    chunks = [dwords[n : n + lanes] for n in range(0, len(dwords), lanes)]
    return [
        pack(layout, data=sum(d << 32 * k for k, d in enumerate(chunk)), keep=(1 << len(chunk)) - 1, first=n == 0,
             last=n == len(chunks) - 1)
        for n, chunk in enumerate(chunks)
    ]


def tlps_of_raw(width, payloads):
    """Return the dword lists of raw beats, having checked their framing."""
    lanes, found, words = width // 32, [], []
    for payload in payloads:
        beat = unpack(RawBeat(width), payload)
        count = beat.keep.bit_count()
        assert beat.first == (not words)
        assert beat.keep == (1 << count) - 1 and count and (beat.last or count == lanes)
        words += [beat.data >> 32 * n & 0xFFFFFFFF for n in range(count)]
        if beat.last:
            found.append(words)
            words = []
    return found


def same(width, payloads, tlp):
    """Whether the TlpBeat ``payloads`` are ``tlp``; lanes that do not count are not compared."""
    want = [unpack(tlp_beat(width), p) for p in beats_of(width, tlp)]
    got = [unpack(tlp_beat(width), p) for p in payloads]
    assert len(got) == len(want), f"{len(got)} beats for {tlp}"
    assert got[0].header == want[0].header, f"{got[0].header} for {tlp}"
    if params()["has_pasid"]:
        assert got[0].pasid.valid == want[0].pasid.valid, f"{got[0].pasid} for {tlp}"
        assert not got[0].pasid.valid or got[0].pasid.value == want[0].pasid.value
    for one, other in zip(got, want):
        mask = (1 << 32 * other.dword_count) - 1
        assert (one.data & mask, one.dword_count, one.first, one.last) == (other.data & mask, other.dword_count, other.first, other.last)


async def bench(dut):
    rng, width = random.Random(cocotb.RANDOM_SEED), params()["width"]
    i, o, received, to_send = await start(dut, "i", "o", "received", "to_send")
    dut.max_payload.value = 2
    beats, cycles = [], []
    cocotb.start_soon(received.watch(beats, cycles))
    raw, raw_cycles = [], []
    cocotb.start_soon(o.watch(raw, raw_cycles))
    return rng, width, i, o, received, to_send, beats, cycles, raw, raw_cycles


def packets(width, layout, payloads):
    found, now = [], []
    for payload in payloads:
        now.append(payload)
        if unpack(layout, payload).last:
            found.append(now)
            now = []
    return found


@cocotb.test(timeout_time=400, timeout_unit="us")
async def received_tlps_are_whole(dut):
    """PHY-RAW-1: random TLPs with gaps and back-pressure arrive field by field, dword by dword; those with PASIDs too, between others."""
    rng, width, i, _, received, _, beats, _, _, _ = await bench(dut)
    cocotb.start_soon(random_ready(received, rng, 0.7))
    tlps = random_tlps(rng)
    await i.put_many((b for tlp in tlps for b in raw_beats(width, encode(tlp))), lambda: rng.choice([0, 0, 0, 0, 2]))
    await ClockCycles(dut.clk, 60)
    found = packets(width, tlp_beat(width), beats)
    assert len(found) == len(tlps)
    for payloads, tlp in zip(found, tlps):
        same(width, payloads, tlp)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def sent_tlps_are_whole(dut):
    """PHY-RAW-2: random TLPs, also with PASIDs, leave as the golden model encodes them, whatever gaps and back-pressure do."""
    rng, width, _, o, _, to_send, _, _, raw, _ = await bench(dut)
    cocotb.start_soon(random_ready(o, rng, 0.7))
    tlps = random_tlps(rng)
    await to_send.put_many((b for tlp in tlps for b in beats_of(width, tlp)), lambda: rng.choice([0, 0, 0, 0, 2]))
    await ClockCycles(dut.clk, 60)
    assert tlps_of_raw(width, raw) == [encode(tlp) for tlp in tlps]


@cocotb.test(timeout_time=400, timeout_unit="us")
async def both_ways_run_at_full_rate(dut):
    """PHY-RAW-3: back to back, a TLP takes ceil((P + H) / lanes) raw beats each way and not a cycle more."""
    rng, width, i, o, received, to_send, beats, _, raw, raw_cycles = await bench(dut)
    o.set_ready(1)
    received.set_ready(1)
    lanes = width // 32
    for high in (0, 1 << 32):
        for size in (64, 128, 256):
            tlps = [memory_write(high + 0x1000 * n, rng.randbytes(size), requester_id=1, tag=0) for n in range(40)]
            expected = 40 * -(-(size // 4 + 3 + (high > 0)) // lanes)
            raw.clear()
            raw_cycles.clear()
            await to_send.put_many(b for tlp in tlps for b in beats_of(width, tlp))
            await ClockCycles(dut.clk, 6)
            assert len(raw) == expected and raw_cycles[-1] - raw_cycles[0] == expected - 1
            beats.clear()
            stalls = []

            async def count(stalls=stalls):
                while True:
                    await RisingEdge(dut.clk)
                    if dut.i__valid.value and not dut.i__ready.value:
                        stalls.append(1)

            counting = cocotb.start_soon(count())
            await i.put_many(b for tlp in tlps for b in raw_beats(width, encode(tlp)))
            await ClockCycles(dut.clk, 6)
            counting.cancel()
            assert not stalls and len(packets(width, tlp_beat(width), beats)) == 40


def logged(dwords):
    """The header of malformed ``dwords`` as it must be told: what came of three or four dwords."""
    count = 4 if dwords[0] >> 29 & 1 else 3
    return sum(dword << 32 * n for n, dword in enumerate(dwords[:count]))


async def pulses_of(dut, found):
    """Append the header of each pulse of ``malformed``, for ever."""
    read = reader(dut.malformed)
    while True:
        await RisingEdge(dut.clk)
        told = unpack(Malformed, read())
        if told.found:
            found.append(told.header)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def malformed_tlps_disturb_nobody(dut):
    """PHY-RAW-4: reserved types, prefixes, cut headers, wrong lengths: a pulse with the header, and the next is whole."""
    rng, width, i, _, received, _, beats, _, _, _ = await bench(dut)
    received.set_ready(1)
    pulses = []
    cocotb.start_soon(pulses_of(dut, pulses))
    write = encode(memory_write(0x1_0000_0000, rng.randbytes(128), requester_id=1, tag=0))
    spoilt = [
        ("reserved type", [0x1F << 24 | write[0] & 0xE0FFFFFF, *write[1:]], True),
        ("locked write", [1 << 24 | write[0], *write[1:]], True),
        ("prefix", [4 << 29 | write[0], *write[1:]], True),
        ("one header dword", write[:1], True),
        ("three of four header dwords", write[:3], True),
        ("no payload", write[:4], False),
        ("short by one", write[:-1], False),
        ("short by many", write[:20], False),
        ("long by one", [*write, 1], False),
        ("long by many", [*write, *range(70)], False),
        ("payload without length", [*encode(memory_read(0x1_0000_0000, 64, requester_id=1, tag=3)), *range(30)], False),
    ]
    for name, dwords, is_dropped in spoilt:
        for _ in range(2):
            beats.clear()
            pulses.clear()
            good = random_tlp(rng)
            await i.put_many(b for words in (dwords, encode(good)) for b in raw_beats(width, words))
            await ClockCycles(dut.clk, 12)
            found = packets(width, tlp_beat(width), beats)
            assert len(found) == (1 if is_dropped else 2), name
            assert all(not unpack(tlp_beat(width), beat).damaged for beat in found[-1])
            if not is_dropped:
                assert unpack(tlp_beat(width), found[0][-1]).damaged, name
            same(width, found[-1], good)
            assert pulses == [logged(dwords)], f"{name}: {pulses}"
            assert len(decode(encode(good)).data) == len(good.data)


def is_malformed(dwords, most):
    """Whether the specification lets a receiver take ``dwords`` for a malformed TLP when payloads are up to ``most`` bytes."""
    try:
        tlp = decode(dwords)
    except MalformedTlp as error:
        return "below 4 GiB" not in error.reason  # it need not
    has_default_class = tlp.type in CONFIGURATION or (tlp.type in (TlpType.MSG, TlpType.MSGD) and tlp.message_code not in (0x7E, 0x7F))
    return len(tlp.data) > most or (has_default_class and tlp.tc != 0)


CONFIGURATION = {TlpType.CFGRD0, TlpType.CFGRD1, TlpType.CFGWR0, TlpType.CFGWR1, TlpType.IORD, TlpType.IOWR}


def doubtful_tlp(rng, kind):
    """A TLP with payload as long as it says, and all else as it comes."""
    is_atomic = kind in (TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS)
    length = rng.choice([1, 1, 2, 3, 4, 8, rng.randrange(1, 40), 63, 64, 65, 127, 128, 129])
    fields = {"type": kind, "requester_id": rng.getrandbits(16), "tag": rng.getrandbits(8), "tc": rng.choice([0, 0, 0, 5])}
    page = 4096 * rng.randrange(1 << 40)
    if kind in (TlpType.MSG, TlpType.MSGD):
        fields |= {"message_code": rng.choice([0x50, 0x7E, 0x7F, 0]), "message_routing": rng.randrange(8)}
    elif kind is TlpType.CPLD:
        fields |= {"byte_count": 4}
    elif kind in CONFIGURATION:
        length = rng.choice([1, 1, 1, 2])
        fields |= {"first_be": 15, "last_be": rng.choice([0, 0, 1])}
    else:
        near = 4096 - 4 * rng.choice([0, 1, length - 1, length, length + 1])
        fields |= {"first_be": rng.choice([15, 12, rng.getrandbits(4)]), "last_be": rng.choice([0, 15, 3, rng.getrandbits(4)]),
                   "address": page + rng.choice([near % 4096, 0, 4, 4 * rng.randrange(1024)])}  # fmt: skip
        if is_atomic:
            fields |= {"first_be": 15, "last_be": 15}
    fields["length_dw"] = 0 if kind is TlpType.MSG else length
    return Tlp(**fields, data=rng.randbytes(4 * length) if kind.has_data else b"")


@cocotb.test(timeout_time=800, timeout_unit="us")
async def rules_of_headers_are_kept(dut):
    """PHY-RAW-6: random byte enables, lengths, 4 KiB, payload limits, traffic classes, AtomicOps: what the model refuses vanishes.

    Each gives a pulse with its header; what it accepts is passed on whole, back to back with the others.
    """
    rng, width, i, _, received, _, beats, _, _, _ = await bench(dut)
    received.set_ready(1)
    pulses = []
    cocotb.start_soon(pulses_of(dut, pulses))
    kinds = [TlpType.MRD, TlpType.MWR, TlpType.MWR, TlpType.MRDLK, TlpType.CPLD, TlpType.CFGWR0, TlpType.CFGRD0, TlpType.IORD, TlpType.MSG,
             TlpType.MSGD, TlpType.FETCHADD, TlpType.SWAP, TlpType.CAS]  # fmt: skip
    for code in (0, 1, 2):
        dut.max_payload.value = code
        await ClockCycles(dut.clk, 2)
        beats.clear()
        pulses.clear()
        tlps = [doubtful_tlp(rng, rng.choice(kinds)) for _ in range(220)]
        refused = [tlp for tlp in tlps if is_malformed(encode(tlp), 128 << code)]
        accepted = [tlp for tlp in tlps if tlp not in refused]
        assert len(refused) > 60
        assert len(accepted) > 60
        await i.put_many(b for tlp in tlps for b in raw_beats(width, encode(tlp)))
        await ClockCycles(dut.clk, 12)
        found = packets(width, tlp_beat(width), beats)
        for payloads, tlp in zip(found, accepted):
            assert unpack(tlp_beat(width), payloads[0]).header.tag == tlp.tag, tlp
            assert sum(unpack(tlp_beat(width), beat).dword_count for beat in payloads) * 4 == len(tlp.data)
        assert len(found) == len(accepted)
        assert pulses == [logged(encode(tlp)) for tlp in refused]
