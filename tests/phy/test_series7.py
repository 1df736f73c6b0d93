"""The 7-series adapter against a model of the block's streams, and a whole card behind it below cocotbext-pcie's root complex."""

import random
import struct
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.tlp import CplStatus, Tlp, TlpType, encode, memory_read, memory_write
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.endpoint import descriptions_of
from ringwall.rtl.function.description import MsixCapability
from ringwall.rtl.phy.series7 import Series7Phy
from ringwall.rtl.phy.series7_axis import FromAxis
from ringwall.rtl.phy.ultrascale_config import MirroredFunction
from ringwall.rtl.tlp.layouts import TlpBeat
from ringwall.rtl.verilog import Series7Card
from ringwall.sim.run import params, run
from ringwall.sim.second_host import SecondHost
from ringwall.sim.series7 import USER, BlockFunction, Series7Block, Series7Streams
from ringwall.sim.stream import cycle, random_ready, start, unpack
from ringwall.sim.tlp_beats import from_beats, to_beats

PAGE, IOVAS = 4096, 0x10_0000_0000  # the first that SecondHost.disk maps
BARS = {0: 16384, 2: 4096}
MIRROR_TAG, LAST = 0x200, 160  # of the mirror's writes: the tag, the register of the last
PLACES = {0: 1 << 28, 2: 3 << 28}  # where the card has them
FUNCTION = MirroredFunction(bars=(0, 2), device_control=18, device_control_2=26, msix_control=31, power_control=40)
STREAM_TESTS = ["tlps_come_whole", "configuration_is_mirrored", "tlps_leave_whole", "non_posted_requests_are_held_back",
                "reset_of_the_link_cuts_tlps"]  # fmt: skip
CARD = EndpointConfig(width=64, iommu=None, disks=(BlkConfig(capacity_sectors=64, queue_size=64),), tags=64, read_buffer_bytes=4096,
                      completion_timeout_cycles=10_000)  # fmt: skip


WALL = IommuConfig(entries=16, ways=1, walks=1, bar=4)


def card(width, iommu=None):
    return replace(CARD, width=width, iommu=iommu)


@pytest.mark.parametrize("width", [64, 128])
def test_streams(request, width):
    run(Series7Phy(width=width, function=FUNCTION, bar_bytes=BARS), module=__name__, node=request.node.nodeid, params={"width": width},
        testcase=STREAM_TESTS)  # fmt: skip


def test_card(request):
    run(Series7Card(card(64)), module=__name__, node=request.node.nodeid, params={"width": 64}, testcase=["disk_works"])


def test_wall_in_a_bar(request):
    run(Series7Card(card(128, WALL)), module=__name__, node=request.node.nodeid, params={"width": 128}, testcase=["wall_is_in_a_bar"])


def test_parameters_are_checked():
    """S7-1: a card that the block cannot be is refused with a sentence."""
    with pytest.raises(ValueError, match="64 or 128 bits, not 256"):
        Series7Card(card(256))
    with pytest.raises(ValueError, match="one function, not 2"):
        Series7Card(EndpointConfig(width=64, iommu=None, disks=(BlkConfig(),) * 2))
    with pytest.raises(ValueError, match="one function, not 2"):
        Series7Card(EndpointConfig(width=64))
    with pytest.raises(ValueError, match="must be 4, which no virtio function has, not 2"):
        IommuConfig(bar=2)
    with pytest.raises(ValueError, match="at most 256, it has no 10-bit tags, not 257"):
        Series7Card(EndpointConfig(width=64, iommu=None, tags=257))
    with pytest.raises(ValueError, match=r"must be those of BARs \[0, 2\], not of \[0\]"):
        Series7Phy(width=64, function=FUNCTION, bar_bytes={0: 4096})
    with pytest.raises(TypeError, match="must be a MirroredFunction, not None"):
        Series7Phy(width=64, function=None, bar_bytes={})
    with pytest.raises(ValueError, match="at most 256 MiB, not 536870912"):
        FromAxis(width=64, bar_bytes={0: 1 << 29})


def to_wire(tlp):
    """Return the bytes of a model's TLP as they are on the wire."""
    dwords = encode(tlp)
    size = 4 if dwords[0] >> 29 & 1 else 3
    return struct.pack(f">{size}I", *dwords[:size]) + struct.pack(f"<{len(dwords) - size}I", *dwords[size:])


def arriving(rng):
    """Return a TLP of the host, the bits of the BARs that it hits, and the address that the card is to see."""
    rid, tag, kind = rng.getrandbits(16), rng.getrandbits(8), rng.randrange(6)
    if kind == 0:
        size = 4 * rng.choice([1, 2, 3, 4, 5, 31, 32])
        return Tlp(TlpType.CPLD, length_dw=size // 4, completer_id=rng.getrandbits(16), requester_id=rid, tag=tag, byte_count=size,
                   data=rng.randbytes(size)), 0, None  # fmt: skip
    if kind == 1:
        return Tlp(TlpType.CPL, completer_id=rng.getrandbits(16), requester_id=rid, tag=tag, byte_count=4, status=CplStatus.UR), 0, None
    if kind == 2:
        return Tlp(TlpType.CFGWR0, data=rng.randbytes(4), requester_id=rid, tag=tag, completer_id=rng.getrandbits(16),
                   register=USER + 4 * rng.randrange(22), length_dw=1, first_be=15), 0, 0  # fmt: skip
    bar, size = rng.choice(list(BARS.items()))
    base = (rng.choice([rng.getrandbits(12), rng.getrandbits(40)]) + 256) * size
    offset, length = rng.randrange(size - 256) & ~3, rng.choice([1, 4, 8, 60, 128])
    address, hits = base + offset, 3 << bar
    place = PLACES[bar] + offset
    if kind == 3:  # no BAR: the card must find none either
        hits, place = 0, address & (1 << 28) - 1
    if kind == 5:
        return memory_read(address, min(length, 64), requester_id=rid, tag=tag), hits, place
    return memory_write(address, rng.randbytes(length), requester_id=rid, tag=tag), hits, place


class Bench:
    """The adapter between the block's streams and a card that answers the mirror's writes, and nothing else."""

    def __init__(self, dut):
        self.dut, self.rng, self.width = dut, random.Random(cocotb.RANDOM_SEED), params()["width"]
        self.sent, self.mirrored, self.received, self._beats, self.malformed = [], [], [], [], 0
        self.block = Series7Streams(dut, self.width, on_receive=self.sent.append, pause=lambda: self.rng.randrange(4) == 0)

    async def begin(self, *, is_cut=False):
        dut = self.dut
        self.received_stream, self.to_send = await start(dut, "received", "to_send")
        dut.user_lnk_up.value, dut.max_payload.value = 1, 2
        self.block.start()
        cocotb.start_soon(self._take() if is_cut else self.received_stream.watch(self._beats))
        cocotb.start_soon(random_ready(self.received_stream, self.rng, 0.8))
        cocotb.start_soon(self._answer())
        return self

    async def _take(self):
        """As a card that forgets what it was offered when all begins anew."""
        while True:
            await RisingEdge(self.dut.clk)
            self.malformed += int(self.dut.malformed.value) & 1
            if int(self.dut.received__valid.value) and int(self.dut.received__ready.value) and not int(self.dut.discarding.value):
                self._beats.append(int(self.dut.received__payload.value))

    async def _answer(self):
        layout, now = TlpBeat(self.width), []
        while True:
            await RisingEdge(self.dut.clk)
            while self._beats:
                beat = self._beats.pop(0)
                now = [beat] if unpack(layout, beat).first else [*now, beat]  # a reset may have cut the one before it
                if not unpack(layout, beat).last:
                    continue
                tlp = from_beats(self.width, now)
                if tlp.tag < MIRROR_TAG:
                    self.received.append(tlp)
                else:
                    self.mirrored.append((len(self.received), tlp))
                    await self.put(Tlp(TlpType.CPL, tag=tlp.tag, byte_count=4))

    async def put(self, tlp):
        await self.to_send.put_many(to_beats(self.width, tlp))

    async def settled(self):
        """Wait until the last of the mirror's writes was answered; they are none of a test's from then on."""
        await self.until(lambda: any(tlp.address == LAST for _, tlp in self.mirrored))
        await ClockCycles(self.dut.clk, 10)
        self.mirrored.clear()

    async def until(self, is_over):
        end = cycle() + 4000
        while not is_over():
            assert cycle() < end
            await ClockCycles(self.dut.clk, 4)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def tlps_come_whole(dut):
    """S7-2: TLPs of all kinds, straddled too, come as they are but for addresses, those of the card's BARs; configuration comes before."""
    bench = await Bench(dut).begin()
    tlps = [arriving(bench.rng) for _ in range(250)]
    for tlp, hits, _ in tlps:
        bench.block.send(to_wire(tlp), hits)
    end = cycle() + 20_000
    while len(bench.received) < len(tlps) and cycle() < end:
        await ClockCycles(dut.clk, 20)
    assert bench.received == [
        tlp if place is None else replace(tlp, address=place or tlp.register, register=0) for tlp, _, place in tlps]
    assert bench.width == 64 or bench.block.straddled > 10
    registers = {tlp.address: int.from_bytes(tlp.data, "little") for _, tlp in bench.mirrored}
    assert [registers[0x10 + 4 * bar] for bar in BARS] == list(PLACES.values()) and not any(place for place, _ in bench.mirrored)

    wire = bytearray(to_wire(memory_read(0x1000, 4, requester_id=1, tag=7)))
    wire[1] |= 0x88  # bits of a longer tag than the block knows
    bench.received.clear()
    bench.block.send(bytes(wire), 3)
    await bench.until(lambda: bench.received)
    assert bench.received[0].tag == 7


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def configuration_is_mirrored(dut):
    """S7-3: what the block says of bus, Command, Device Control, MSI-X and power is written into the card before the next TLP."""
    bench = await Bench(dut).begin()
    await bench.settled()
    written = {}
    for name, value, register, wanted in (
        ("cfg_command", 0x6, 4, lambda v: v & 6 == 6), ("cfg_dcommand", 0x2950, 72, lambda v: v & 0xFFF0 == 0x2950),
        ("cfg_dcommand2", 0x5, 104, lambda v: v == 5), ("cfg_interrupt_msixenable", 1, 124, lambda v: v >> 30 == 2),
        ("cfg_interrupt_msixfm", 1, 124, lambda v: v >> 30 == 3), ("cfg_pmcsr_powerstate", 3, 160, lambda v: v & 3 == 3),
    ):  # fmt: skip
        bench.mirrored.clear()
        bench.received.clear()
        getattr(dut, name).value = value
        await ClockCycles(dut.clk, 1)
        bench.block.send(to_wire(memory_read(0x1000, 4, requester_id=1, tag=1)), 3)
        await bench.until(lambda: bench.received)
        written = {tlp.address: int.from_bytes(tlp.data, "little") for place, tlp in bench.mirrored if place == 0}
        assert wanted(written[register]), f"{name}: {written[register]:#x}"
    dut.cfg_bus_number.value, dut.cfg_device_number.value = 0x5A, 0x1F
    bench.mirrored.clear()
    await bench.until(lambda: bench.mirrored)
    assert bench.mirrored[0][1].completer_id == 0x5AF8
    dut.cfg_to_turnoff.value = 1
    await ClockCycles(dut.clk, 2)
    assert int(dut.cfg_turnoff_ok.value) == int(dut.tx_cfg_gnt.value) == 1


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def tlps_leave_whole(dut):
    """S7-4: requests and completions of all lengths leave in the block's byte order; messages and answers to the mirror do not."""
    bench = await Bench(dut).begin()
    await bench.settled()
    expected = []
    for n in range(120):
        size = bench.rng.choice([1, 4, 8, 12, 16, 60, 64, 128, 256])
        address = bench.rng.choice([0, 1 << 40]) + 4096 * n + bench.rng.randrange(64)
        tlp = bench.rng.choice([
            memory_write(address, bench.rng.randbytes(size), requester_id=n, tag=1), memory_read(address, size, requester_id=n, tag=n),
            Tlp(TlpType.CPLD, length_dw=2, completer_id=n, requester_id=n, tag=3, byte_count=8, data=bench.rng.randbytes(8)),
            Tlp(TlpType.MSG, message_code=0x30, requester_id=n),
        ])  # fmt: skip
        await bench.put(tlp)
        if tlp.type is not TlpType.MSG:
            expected.append(to_wire(tlp))
    await bench.until(lambda: len(bench.sent) >= len(expected))
    assert bench.sent == expected and bench.block.discontinued == 0


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def non_posted_requests_are_held_back(dut):
    """S7-5: with four unanswered requests the block is told to hold others back; posted ones pass; an answer lets the next one in."""
    bench = await Bench(dut).begin()
    await bench.settled()
    for n in range(12):
        bench.block.send(to_wire(memory_read(0x1000, 4, requester_id=1, tag=n)), 3, non_posted=True)
    await bench.until(lambda: bench.block.is_held_back)
    await ClockCycles(dut.clk, 100)
    entered = len(bench.received)
    assert 4 <= entered < 12
    bench.block.send(to_wire(memory_write(0x1000, b"1234", requester_id=1, tag=0)), 3)
    await bench.until(lambda: len(bench.received) == entered + 1)
    assert bench.received[-1].type is TlpType.MWR
    for n in range(12):
        await bench.until(lambda n=n: n in [tlp.tag for tlp in bench.received if tlp.type is TlpType.MRD])
        await bench.put(Tlp(TlpType.CPLD, length_dw=1, requester_id=1, tag=n, byte_count=4, data=bytes(4)))
    assert int(dut.rx_np_ok.value) == 1


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reset_of_the_link_cuts_tlps(dut):
    """S7-6: what the card was sending when the link went ends as discontinued; of what was coming the rest is dropped."""
    bench = await Bench(dut).begin(is_cut=True)
    await bench.settled()
    writes = [to_wire(memory_write(0x1000, bench.rng.randbytes(size), requester_id=1, tag=0)) for size in (512, 256)]
    cuts = 0
    for _ in range(8):
        bench.received.clear()
        bench.sent.clear()
        sending = cocotb.start_soon(bench.put(memory_write(0x2000, bench.rng.randbytes(256), requester_id=1, tag=0)))
        bench.block.send(writes[0], 3)
        await ClockCycles(dut.clk, bench.rng.randrange(8, 24))
        dut.discarding.value = 1
        await ClockCycles(dut.clk, 3)
        await sending
        dut.discarding.value = 0  # while the rest of the long one still comes
        cuts += not bench.sent
        bench.mirrored.clear()
        await bench.settled()
        bench.block.send(writes[1], 3)
        await bench.until(lambda: bench.received)
        assert [to_wire(replace(tlp, address=0x1000)) for tlp in bench.received] == writes[1:]
    assert cuts and bench.block.discontinued and not bench.malformed


class CardHost(SecondHost):
    """The root complex with the block below it. Its driver finds the disk by capabilities, which are the card's."""

    join = Series7Block

    def __init__(self, dut, config):
        (description,) = descriptions_of(config)
        function = BlockFunction(description, description.capability(MsixCapability))
        super().__init__(dut, config, seed=cocotb.RANDOM_SEED, bridge={
            "width": config.width, "function": function, "pause": lambda: self.rng.randrange(8) == 0})  # fmt: skip


@cocotb.test(timeout_time=3, timeout_unit="ms")
async def disk_works(dut):
    """S7-7: a stock driver finds the disk's structures by the 88 bytes of capabilities that are the card's, writes, reads back; MSI-X."""
    host = CardHost(dut, card(params()["width"]))
    await host.begin()
    info = host.functions[0]
    assert (host.devices[0].vendor_id, host.devices[0].device_id) == (0x1AF4, 0x1042) and info.capabilities[9][0] == USER
    disk = await host.disk(0, queue_size=16, buffer_pages=24, platform=False)
    content = host.rng.randbytes(2048)
    write = disk.blk.write(3, content)
    await disk.done([write])
    read = disk.blk.read(3, 2048)
    await disk.done([read])
    assert (write.status, read.status) == (0, 0) and read.data == content and host.interrupts[0, 1] == 2
    assert host.bridge.link.discontinued == 0
    host.finish()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def wall_is_in_a_bar(dut):
    """S7-8: a disk whose function has the registers of its IOMMU in BAR 4: translated; a fault is told by the IOMMU's own table of
    messages; a reset of the disk does not stop the IOMMU."""
    host = CardHost(dut, card(128, WALL))
    await host.begin()
    await host.enable_iommu()
    info, vector = host.functions[0], host.devices[0].msi_vectors[0]
    assert info.bars[4].size == 4096
    for offset, word in ((0, vector.addr), (8, vector.data), (12, 0)):  # entry 1 of msi_cfg_tbl: the fault queue's
        await host.rc.mem_write(info.bars[4].address + 0x310 + offset, word.to_bytes(4, "little"))
    for _ in range(2):
        disk = await host.disk(0, queue_size=16, buffer_pages=24)
        content = host.rng.randbytes(1024)
        write = disk.blk.write(1, content)
        await disk.done([write])
        read = disk.blk.read(1, 1024)
        await disk.done([read])
        assert (write.status, read.status) == (0, 0) and read.data == content and disk.memory is not host.memory
        page = IOVAS + 16 * PAGE
        disk.memory.write(page, struct.pack("<IIQ", 1, 0, 8) + b"\xff")
        before = host.interrupts[0, 0]
        assert await disk.raw([(page, 16), (IOVAS + 64 * PAGE, 512)], [(page + 16, 1)]) == 1
        assert disk.memory.read(page + 16, 1)[0] == 1, "a page that is not mapped"
        (fault,) = await host.run(host.iommu.read_faults())
        assert fault.device_id == 0 and fault.iotval & -PAGE == IOVAS + 64 * PAGE
        assert await host.interrupt(0, 0, 2000) and host.interrupts[0, 0] == before + 1
        walking = disk.blk.read(0, 4096)
        await disk.ring_doorbell()
        await host.run(disk.driver.reset())
        await host.run(host.iommu.fence())
        assert not walking.is_done
    host.finish()
