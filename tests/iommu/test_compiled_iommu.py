"""What stands around the compiled IOMMU: memory with marks, times, and rules, each of which a clay IOMMU breaks."""

import numpy as np
import pytest
from amaranth import Module, Mux, Signal

from ringwall.models.iommu.registers import OFFSET, IommuDriver
from ringwall.models.iommu.tables import Allocator
from ringwall.models.memory import AccessFault
from ringwall.rtl.iommu.unit import Iommu
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.compiled_iommu import REQUEST, BrokenRule, CompiledIommu, MarkedMemory, build

BASE, SIZE = 0x8000_0000, 1 << 16


class Clay(Iommu):
    """Has the ports of an IOMMU. A register write of n breaks the n-th rule; the register at 8 does not answer, the one at 16 refuses."""

    def elaborate(self, platform):
        m = Module()
        request, response, kind, refuses, sent = self.bus.request, self.bus.response, Signal(8), Signal(), Signal()
        m.d.comb += [
            request.ready.eq(~response.valid), response.p.error.eq(refuses), self.translate_response.valid.eq(kind == 1),
            self.bursts.valid.eq((kind > 1) & ~(sent & (kind > 4))), self.bursts.p.address.eq(Mux(kind == 2, BASE + 60, BASE)),
            self.bursts.p.length_bytes.eq(Mux(kind == 255, 4, 8)), self.bursts.p.is_wall.eq(kind != 3),
            self.bursts.p.is_write.eq(kind >= 4), self.write_data.valid.eq(kind >= 5), self.write_data.p.first.eq(kind != 6),
            self.write_data.p.last.eq(kind != 7), self.write_data.p.keep.eq(Mux(kind == 5, 0x7F, 0xFF)),
        ]  # fmt: skip
        with m.If(request.valid & request.ready):
            m.d.sync += [response.valid.eq(request.p.offset != 8), refuses.eq(request.p.offset == 16)]
            with m.If(request.p.is_write):
                m.d.sync += kind.eq(request.p.data)
        with m.If(self.bursts.valid & self.bursts.ready):
            m.d.sync += sent.eq(1)
        with m.If(response.valid & response.ready):
            m.d.sync += response.valid.eq(0)
        return m


RULES = {1: "which nobody waits for", 2: "a burst of 8 bytes at 0x8000003c", 3: "not of the wall", 4: "before the end of another",
         5: "keep 0x7f", 6: "first 0", 7: "last 0"}  # fmt: skip


def test_rules():
    """IOMMU-LOCK-3: each rule of a port that is broken ends the run with a sentence; an access without an answer has an end."""
    for kind, text in RULES.items():
        iommu = CompiledIommu(Clay(width=64), MarkedMemory(BASE, SIZE))
        for attempt in (lambda iommu=iommu, kind=kind: (iommu.access(0, 8, kind), iommu.step(50)), lambda iommu=iommu: iommu.step(1)):
            with pytest.raises(BrokenRule, match=text):
                attempt()
    for offset, text in ((8, "no answer of the register at 0x8"), (16, "ended with an error")):
        with pytest.raises(BrokenRule, match=text):
            CompiledIommu(Clay(width=64), MarkedMemory(BASE, SIZE)).access(offset, 8)
    iommu = CompiledIommu(Clay(width=64), MarkedMemory(BASE, SIZE))
    iommu.ask(np.zeros(3, REQUEST))
    with pytest.raises(AssertionError, match="3 requests are not answered"):
        iommu.settle(500)
    with pytest.raises(AssertionError, match="3 requests are not answered"):
        iommu.take()
    for name, value in (("outstanding", 0), ("outstanding", 257), ("gaps", 256), ("stalls", -1)):
        with pytest.raises(ValueError, match=r"must be .*, not"):
            CompiledIommu(Clay(width=64), MarkedMemory(BASE, SIZE), **{name: value})
    with pytest.raises(ValueError, match="64 bits, not 128"):
        build(Iommu(width=128))


def test_times():
    """IOMMU-LOCK-4: in Bare a request per cycle is answered after 2 cycles, each its own; gaps and bounds slow that; a driver works."""
    memory = MarkedMemory(BASE, SIZE)
    iommu = CompiledIommu(Iommu(width=64), memory, seed=1)
    asked = np.zeros(300, REQUEST)
    asked["iova"] = np.arange(300, dtype="<u8") << np.uint64(12)
    asked["process"] = -1
    for options, rate in (({}, 1.0), ({"gaps": 128}, 0.6), ({"outstanding": 1}, 0.4)):
        for name, value in {"gaps": 0, "outstanding": 256, **options}.items():
            setattr(iommu.options, name, value)
        iommu.ask(asked)
        iommu.settle()
        answers, stores, _ = iommu.take()
        assert not len(stores)
        assert (answers["page"] == np.arange(300)).all()
        assert (answers["answered"] - answers["asked"] == 2).all()
        assert (len(asked) - 1) / (answers["asked"][-1] - answers["asked"][0]) <= rate
        assert options or answers["asked"][-1] - answers["asked"][0] == 299
    # The model's driver, and a fence whose data lands.
    driver = IommuDriver(0, memory, Allocator(memory, BASE, SIZE))
    iommu.run(driver.init(1))
    assert iommu.access(OFFSET["ddtp"], 8) == driver.directory.ddtp
    assert iommu.access(OFFSET["ddtp"], 4) == driver.directory.ddtp & 0xFFFF_FFFF


def test_marks():
    """IOMMU-LOCK-5: what is marked or outside cannot be accessed by the IOMMU, software sees none of it; the journal has what was there."""
    memory = MarkedMemory(BASE, SIZE)
    memory.write(BASE + 8, bytes(range(16)))
    memory.mark(BASE + 8, 8, BurstStatus.POISONED)
    memory.mark(BASE + 64, 8, BurstStatus.UR)
    assert memory.read(BASE + 8, 4) == bytes(range(4))
    memory.check(BASE + 8, 8, True)
    for address, length, is_write, reason in (
        (BASE, 16, False, "poisoned"), (BASE + 64, 4, False, "unmapped"), (BASE + 60, 8, True, "unmapped"),
        (BASE + SIZE - 4, 8, False, "unmapped"), (BASE - 8, 8, True, "unmapped"),
    ):  # fmt: skip
        with pytest.raises(AccessFault) as caught:
            memory.check(address, length, is_write)
        assert caught.value.reason == reason
    memory.mark(BASE, SIZE, BurstStatus.OK)
    memory.check(BASE, SIZE, False)
    for access in (lambda: memory.read(BASE + SIZE, 1), lambda: memory.write(BASE - 1, b"x")):
        with pytest.raises(AccessFault):
            access()
    memory.journal = {}
    memory.write(BASE + 12, b"abcdefgh")
    memory.write(BASE + 12, b"ABCDEFGH")
    assert memory.journal == {BASE + 8: bytes(range(8)), BASE + 16: bytes(range(8, 16))}
