"""A card with a planted fault: some of its DMA goes beside what it was told; what must come of it."""

import re
from dataclasses import replace
from unittest import mock

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring

from ringwall.models.events import TlpReceived
from ringwall.models.tlp import TlpType
from ringwall.rtl.verilog import RawCard
from ringwall.rtl.virtio.device import DeviceFunction
from ringwall.sim.card import bench_config

__all__ = ["CONFIG", "EXPECTED", "EXPECTED_READ", "PERIOD", "Astray", "DataRequests", "Misaimed", "check"]

CONFIG = replace(bench_config(64), iommu=None, disks=bench_config(64).disks[:1])
EXPECTED = r"I/O error, dev vda, sector \d+ op 0x1:\(WRITE\)"  # of the guest
EXPECTED_READ = r"I/O error, dev vda, sector \d+ op 0x0:\(READ\)"

PERIOD = 80  # of the requests for data, one goes wrong
_BURSTS = 10, PERIOD  # of those to read, a page each, and of those to write
_LEAST = 32  # dwords: rings, headers, status and interrupts are shorter
_READ, _WRITE = 0x00, 0x40  # first byte of a memory request with an address of 32 bits [PCIe5 2.2.1]


class Misaimed(wiring.Component):
    """``RawCard(config)`` at 64 bits, whose 80th, 160th ... read and write of at least 32 dwords have bit 31 of the address inverted."""

    def __init__(self, config):
        if config.width != 64:
            raise ValueError(f"Width must be 64 bits, for headers of two beats, not {config.width!r}")
        self.card = RawCard(config)
        super().__init__(self.card.signature)

    def elaborate(self, platform):
        m = Module()
        m.submodules.card = card = self.card
        wiring.connect(m, wiring.flipped(self.i), card.i)
        wiring.connect(m, card.o, wiring.flipped(self.o))
        m.d.comb += [self.activity.eq(card.activity), self.malformed.eq(card.malformed)]

        beat, is_wrong = card.o.payload, Signal()  # of the request whose second beat comes next
        with m.If(card.o.valid & card.o.ready):
            m.d.sync += is_wrong.eq(0)
            for name, first_byte in (("reads", _READ), ("writes", _WRITE)):
                count = Signal(range(PERIOD), name=name)
                with m.If(beat.first & (beat.data[24:32] == first_byte) & (beat.data[:10] >= _LEAST)):
                    m.d.sync += [count.eq(Mux(count == PERIOD - 1, 0, count + 1)), is_wrong.eq(count == PERIOD - 1)]
        with m.If(is_wrong):
            m.d.comb += self.o.payload.data[31].eq(~beat.data[31])
        return m


class DataRequests:
    """Counts the requests of a card that may go wrong, by kind."""

    def __init__(self, card):
        self.count = {TlpType.MRD: 0, TlpType.MWR: 0}
        self._observe = card.observe
        card.observe = self.observe

    def observe(self, event, tlp):
        if isinstance(event, TlpReceived) and tlp.type in self.count and tlp.length_dw >= _LEAST:
            self.count[tlp.type] += 1
        if self._observe is not None:
            self._observe(event, tlp)


def check(run, requests, counts, count):
    """The job wrongdma of ``count`` requests lived on such a card, and lost what it had to; ``counts`` are the card's."""
    assert counts.refused_reads == requests.count[TlpType.MRD] // PERIOD > 1
    assert counts.dropped_writes == requests.count[TlpType.MWR] // PERIOD > 1
    good, right = (sum(int(number) for kind in ("reads", "writes") for line in run.facts[kind]
                       for number in re.findall(rf"{word}=(\d+)", line)) for word in ("good", "right"))  # fmt: skip
    failed = sum("I/O error" in line for line in run.lines)
    assert 0 < failed <= counts.refused_reads
    assert good == 4 * count - failed
    assert 4 * count - failed - counts.dropped_writes <= right < 4 * count - failed


class AstrayFunction(DeviceFunction):
    """A device whose every 10th burst to read, and 80th to write, at least 32 dwords of data has bit 31 of its IOVA inverted."""

    def elaborate(self, platform):
        m = super().elaborate(platform)
        burst = self.bursts[0]
        is_wrong = Signal()
        for is_write, period in enumerate(_BURSTS):
            at = Signal(range(period), name=f"at_{is_write}")
            with m.If((burst.payload.is_write == is_write) & (burst.payload.length_bytes >= 4 * _LEAST)):
                m.d.comb += is_wrong.eq(at == period - 1)
                with m.If(burst.valid & burst.ready):
                    m.d.sync += at.eq(Mux(is_wrong, 0, at + 1))
        with m.If(is_wrong):
            m.d.comb += burst.payload.address[31].eq(~m.submodules.mover_0.bursts.payload.address[31])
        return m


class Astray(RawCard):
    """``RawCard(config)`` whose devices are each an :class:`AstrayFunction`: what is wrong comes to the card's own IOMMU."""

    def __init__(self, config):
        with mock.patch("ringwall.rtl.endpoint.DeviceFunction", AstrayFunction):
            super().__init__(config)
