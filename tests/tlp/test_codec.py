"""Headers to dwords and back, field by field, against the golden model."""

import random

import cocotb
from amaranth import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.models.tlp import CplStatus, Tlp, TlpType, encode
from ringwall.rtl.tlp.codec import decode as decode_rtl
from ringwall.rtl.tlp.codec import encode as encode_rtl
from ringwall.rtl.tlp.layouts import Header, TlpBeat
from ringwall.sim.run import run
from ringwall.sim.stream import pack, start, unpack
from ringwall.sim.tlp_beats import to_beats


class Codec(wiring.Component):
    """Both functions, registered."""

    header: In(Header)
    encoded: Out(128)
    dwords: In(128)
    decoded: Out(Header)

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.encoded.eq(Cat(encode_rtl(m, "encoded", self.header)))
        m.d.sync += self.decoded.eq(decode_rtl(m, "decoded", [self.dwords[32 * n :][:32] for n in range(4)]))
        return m


def test_codec(request):
    run(Codec(), module=__name__, node=request.node.nodeid)


def random_tlp(rng, kind):
    """Return a TLP of ``kind`` with every field that it has at random."""
    fields = {"type": kind, "tc": rng.randrange(8), "relaxed_ordering": rng.random() < 0.5, "no_snoop": rng.random() < 0.5,
              "ido": rng.random() < 0.5, "poisoned": rng.random() < 0.5, "td": rng.random() < 0.5, "at": rng.randrange(4),
              "requester_id": rng.getrandbits(16), "tag": rng.getrandbits(10)}  # fmt: skip
    enables = {"first_be": rng.randrange(16), "last_be": rng.randrange(16)}
    length = rng.choice([1, 2, 255, 256, 1023, 1024, rng.randrange(1, 1025)])
    if kind.is_completion:
        fields |= {"completer_id": rng.getrandbits(16), "status": rng.choice(list(CplStatus)), "bcm": rng.random() < 0.5,
                   "byte_count": rng.choice([1, 4095, 4096, rng.randrange(1, 4097)]), "lower_address": rng.getrandbits(7),
                   "length_dw": length if kind.has_data else 0}  # fmt: skip
    elif kind in (TlpType.MSG, TlpType.MSGD):
        fields |= {"message_code": rng.getrandbits(8), "message_routing": rng.randrange(8), "length_dw": length if kind.has_data else 0}
    elif kind in (TlpType.CFGRD0, TlpType.CFGWR0, TlpType.CFGRD1, TlpType.CFGWR1):
        fields |= enables | {"completer_id": rng.getrandbits(16), "register": 4 * rng.getrandbits(10), "length_dw": 1}
    else:
        high = 0 if kind in (TlpType.IORD, TlpType.IOWR) else rng.choice([0, 1, rng.getrandbits(32)])
        fields |= enables | {"address": high << 32 | rng.getrandbits(30) << 2, "length_dw": length}
    return Tlp(**fields)


def header_of(tlp):
    """Return the header of ``tlp`` as the card has it."""
    header = unpack(TlpBeat(64), to_beats(64, tlp)[0]).header
    if tlp.type in (TlpType.MSG, TlpType.MSGD):
        header.type, header.fmt, header.message_code = 0x10 | tlp.message_routing, header.fmt | 1, tlp.message_code
        header.length_dw = tlp.length_dw or 1024  # a message without data has no length; the field of 0 reads as it does elsewhere
    return header


def stray_bits_of(kind):
    """Return the bits of the last header dword that mean nothing to us: reserved ones, and processing hints."""
    if kind.is_completion:
        return 0x80
    if kind in (TlpType.CFGRD0, TlpType.CFGWR0, TlpType.CFGRD1, TlpType.CFGWR1):
        return 0xF003
    return 0 if kind in (TlpType.MSG, TlpType.MSGD) else 3


@cocotb.test(timeout_time=200, timeout_unit="us")
async def headers_are_the_models(dut):
    """TLP-CODEC-1: every type with random fields: header to dwords and back agree with the golden model; reserved bits are ignored."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut)
    for kind in TlpType:
        for _ in range(40):
            tlp = random_tlp(rng, kind)
            header = header_of(tlp)
            count = 4 if header.fmt & 1 else 3
            dwords = encode(tlp)[:count]
            dut.header.value = pack(Header, **vars(header))
            noisy = [*dwords, rng.getrandbits(32)][:4]
            noisy[0] |= rng.getrandbits(2) << 16
            noisy[count - 1] |= rng.getrandbits(16) & stray_bits_of(kind)
            dut.dwords.value = sum(dword << 32 * n for n, dword in enumerate(noisy))
            await ClockCycles(dut.clk, 2)
            got = [int(dut.encoded.value) >> 32 * n & 0xFFFFFFFF for n in range(count)]
            assert got == dwords, f"{tlp}: {[f'{dword:08x}' for dword in got]}, not {[f'{dword:08x}' for dword in dwords]}"
            assert unpack(Header, int(dut.decoded.value)) == header, tlp
