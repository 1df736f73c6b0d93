"""A whole card on the hard block as cocotbext-pcie models it, below its root complex: neither was written by any of us."""

import logging
import random
import struct
from dataclasses import replace

import cocotb
import pytest
from cocotb.triggers import ClockCycles, Event, FallingEdge, RisingEdge, Timer
from cocotbext.axi import AxiStreamBus
from cocotbext.pcie.core import RootComplex
from cocotbext.pcie.core.caps import PciCapId
from cocotbext.pcie.core.tlp import CplStatus, TlpType
from cocotbext.pcie.core.utils import PcieId
from cocotbext.pcie.xilinx.us import UltraScalePlusPcieDevice
from cocotbext.pcie.xilinx.us.interface import UsPcieFrame
from cocotbext.pcie.xilinx.us.tlp import Tlp_us

from ringwall.models.host import Bar, Delay, FunctionInfo
from ringwall.models.virtio.blk import BlkDriver
from ringwall.models.virtio.driver import Feature, Structure, StructureType, VirtioPciDriver
from ringwall.models.virtio.split import SplitDriver
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ringwall.rtl.function.description import Bar as MemoryBar
from ringwall.rtl.function.description import FunctionDescription, Rom
from ringwall.rtl.verilog import UltraScaleCard, mirrored_functions
from ringwall.sim.run import params, ports, run
from ringwall.sim.second_host import PoolMemory, SecondDisk, SecondHost
from ringwall.sim.stream import cycle

OK, IOERR, PAGE = 0, 1, 4096
IOVAS = 0x10_0000_0000  # first of ring and buffers, as SecondHost.disk maps them
NOBODY = 0xB000_0000  # no region of the root complex: Unsupported Request
HOLE = 0x7FFF_0000  # in its pool, but not allocated: Completer Abort
SETTINGS = {
    64: {"pcie_generation": 3, "pcie_link_width": 2},
    128: {"pcie_generation": 3, "pcie_link_width": 4},
    256: {"pcie_generation": 3, "pcie_link_width": 8, "rc_straddle": True},
    512: {"pcie_generation": 3, "pcie_link_width": 16, "rc_straddle": True, "cq_straddle": True},
}

def config(width):
    """One disk; at 128 bits two, at 512 one behind an IOMMU."""
    return EndpointConfig(
        width=width, iommu=IommuConfig(entries=16, ways=1, walks=1) if width == 512 else None, tags=64, completion_timeout_cycles=10_000,
        disks=(BlkConfig(capacity_sectors=64, queue_size=64),) * (2 if width == 128 else 1), read_buffer_bytes=4096)  # fmt: skip


TESTS = {
    64: ["host_sees_what_was_written_before", "configuration_acts", "function_is_reset_by_handshake", "requests_are_answered"],
    128: ["requests_are_answered", "functions_come_and_go"],
    256: ["disk_works", "requests_are_answered"],
    512: ["everything_works_behind_an_iommu"],
}


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_ultrascale_card(request, width):
    straddle = [name for name in ("cq", "rc") if f"{name}_straddle" in SETTINGS[width]]
    card = UltraScaleCard(config(width), straddle=straddle, order_cycles=1000)
    run(card, module=__name__, node=request.node.nodeid, params={"width": width}, testcase=TESTS[width])


def test_parameters_are_checked():
    """PHY-USP-20: a card that the hard block cannot be is refused with a sentence."""
    with pytest.raises(ValueError, match="between 1 and 4, not 5"):
        UltraScaleCard(EndpointConfig(disks=(BlkConfig(),) * 4))
    for card, options, message in (
        (config(64), {"straddle": ("rc",)}, "among"), (config(256), {"straddle": ("rc4",)}, "among"),
        (config(512), {"straddle": ("rc", "rc4")}, "two packets or by four"), (EndpointConfig(tags=257), {}, "no 10-bit tags, not 257"),
        (EndpointConfig(disks=(BlkConfig(virtual_functions=1),)), {}, "no virtual functions, not"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            UltraScaleCard(card, **options)
    good = FunctionDescription(vendor_id=1, device_id=1, class_code=0, bars=(MemoryBar(0, 4096), MemoryBar(4, 4096)))
    assert mirrored_functions([good])[0].bars == (0, 4)
    for bar in (MemoryBar(0, 4096, is_64=False), Rom(4096)):
        with pytest.raises(ValueError, match=f"must be a 64-bit one, not {type(bar).__name__}"):
            mirrored_functions([good, replace(good, bars=(bar,))])


class FixedPlaces(VirtioPciDriver):
    """A driver that knows where the structures lie: no capability says it."""

    def find(self):
        bar = self.info.bars[0].address
        sizes = {StructureType.COMMON: 0x38, StructureType.ISR: 1, StructureType.DEVICE: 60, StructureType.NOTIFY: 4}
        for n, (kind, size) in enumerate(sizes.items()):
            self.structures[kind] = Structure(0, 0, 0x1000 * n, size, bar + 0x1000 * n)
        self.notify_multiplier = 4
        yield Delay(1)


class Complaints(logging.Handler):
    """What cocotbext-pcie warns of."""

    def __init__(self, texts):
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record):
        self.texts.append(record.getMessage())


class HardBlockHost(SecondHost):
    """The root complex with the hard block below it. Its disks are found by no capability: structures lie at fixed places of BAR 0."""

    driver = FixedPlaces

    def __init__(self, dut, width):
        self.dut, self.config, self.rng, self.timeout_ns = dut, config(width), random.Random(cocotb.RANDOM_SEED), 80_000
        self.iommu, self.interrupts, self._taken, self._news, self._next_pscid = None, {}, {}, Event(), 1
        self.devices, self.functions, self.complaints = {}, {}, []
        logger = logging.getLogger("cocotb.pcie")
        logger.propagate, logger.handlers = False, [Complaints(self.complaints)]
        logger.setLevel(logging.WARNING)
        logging.getLogger("cocotb.top").setLevel(logging.WARNING)
        signals = {name: getattr(dut, name) for name in ports() if name.startswith(("pcie_", "cfg_", "user_"))}
        buses = {name[-2:]: AxiStreamBus.from_prefix(dut, name) for name in ("s_axis_rq", "s_axis_cc", "m_axis_cq", "m_axis_rc")}
        disk = {"enable": True, "table_size": 1, "table_bir": 2, "pba_bir": 2, "pba_offset": 0x800}
        iommu = {"enable": True, "table_size": 3, "table_offset": 0x300, "pba_offset": 0x400}
        first = self.config.first_disk
        msix = {f"pf{n}_msix_{name}": value for n in range(4) for name, value in (disk if n >= first else iommu).items()}
        self.block = UltraScalePlusPcieDevice(
            user_clk_frequency=250e6, max_payload_size=512, enable_extended_tag=True, pf_count=self.config.functions, user_clk=dut.clk,
            user_reset=dut.rst, **SETTINGS[width], **{f"{name}_bus": bus for name, bus in buses.items()}, **msix, **signals,
        )  # fmt: skip
        for n, function in enumerate(self.block.functions):
            ids = (0x1AF4, 0x1042, 0x018000) if n >= first else (0x1209, 1, 0x080600)
            function.vendor_id, function.device_id, function.class_code = ids
            function.configure_bar(0, 16384 if n >= first else 4096, True)
            if n >= first:
                function.configure_bar(2, 4096, True)
        queue = self.block.cq_queue
        put = queue.put_nowait

        def put_with_aperture(tlp):
            """cocotbext-pcie 0.2.16 says the aperture of function 0 whatever function is meant."""
            masks = self.block.functions[tlp.completer_id.function].bar_mask
            tlp.bar_aperture = (~(masks[tlp.bar_id] | masks[tlp.bar_id + 1] << 32) & (1 << 64) - 1).bit_length()
            put(tlp)

        queue.put_nowait = put_with_aperture
        self.packets, take = [], self.block.cc_sink.recv

        async def note():
            self.packets.append(await take())
            return self.packets[-1]

        self.block.cc_sink.recv = note
        self.rc = RootComplex()
        self.rc.max_payload_size = 1
        self.root_port = self.rc.make_port()
        self.root_port.connect(self.block)
        self.memory = PoolMemory(self.rc.mem_pool)

    async def begin(self):
        """Let the root complex enumerate, enable what it found."""
        await FallingEdge(self.dut.rst)
        await self.rc.enumerate(timeout=self.timeout_ns, timeout_unit="ns")
        absent = ("Failed to route config type 0", "Function not found")
        self.complaints[:] = [text for text in self.complaints if not text.startswith(absent)]
        for number in range(self.config.functions):
            device = self.devices[number] = self.rc.find_device(PcieId(1, 0, number))
            await device.enable_device()
            await device.set_master()
            info = self.functions[number] = FunctionInfo(number, device.vendor_id, device.device_id)
            for n in (0, 2):
                if device.bar_addr[n] is not None:
                    info.bars[n] = Bar(device.bar_addr[n], device.bar_size[n], is_64=True)

    async def enable_msix(self, function):
        """The second time for a function, write its table again: it was reset."""
        if (function, 0) not in self.interrupts:
            return await super().enable_msix(function)
        table = self.functions[function].bars[2].address
        for n, vector in enumerate(self.devices[function].msi_vectors):
            for offset, word in ((0, vector.addr), (8, vector.data), (12, 0)):
                await self.rc.mem_write(table + 16 * n + offset, word.to_bytes(4, "little"))
        return len(self.devices[function].msi_vectors)

    async def start_disk(self):
        """Reset the disk, set its queue up and begin."""
        base = self.memory.allocate(56 * PAGE)
        driver, ring = FixedPlaces(self.functions[0]), SplitDriver(self.memory, size=16, base=base)
        await self.run(driver.start([ring.layout], wanted=1 << Feature.VERSION_1 | 1 << 9, vectors=[1], config_vector=0))
        assert not driver.problems
        blk = BlkDriver(ring, self.memory, area=(base + 16 * PAGE, 40 * PAGE), rng=self.rng)
        return SecondDisk(self, 0, self.memory, None, ring, driver, blk)


async def host_of(dut, *, with_disk=True):
    """Return the host of a test; with its disk, on a card that has nothing else."""
    for name, (way, _) in ports().items():
        if way == "input":
            getattr(dut, name).value = 0
    await Timer(1, "ns")
    host = HardBlockHost(dut, params()["width"])
    await host.begin()
    if not with_disk:
        return host
    await host.enable_msix(0)
    return host, await host.start_disk()


async def serve(disk, at=0, size=512):
    """Write ``size`` random bytes and read them back."""
    content = disk.host.rng.randbytes(size)
    write = disk.blk.write(at // 512, content)
    await disk.done([write])
    read = disk.blk.read(at // 512, size)
    await disk.done([read])
    assert (write.status, read.status) == (OK, OK) and read.data == content


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def disk_works(dut):
    """PHY-USP-21: a disk on the hard block, driven at fixed places of its BAR, writes and reads back; MSI-X by writes on RQ."""
    host, disk = await host_of(dut)
    assert host.complaints == [] and host.block.functions[0].pcie_cap.max_payload_size == 1
    await serve(disk, size=1024)
    assert host.interrupts[0, 1] == 2 and not host.interrupts[0, 0]
    host.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def host_sees_what_was_written_before(dut):
    """PHY-USP-22: requests take long in the block, completions do not: once the reset disk says 0, none of its writes is to come."""
    host, disk = await host_of(dut)
    take, send, writes = host.block.rq_sink.recv, host.block.send, []

    async def late():
        frame = await take()
        await ClockCycles(dut.clk, host.rng.randrange(100, 140) if writes else 5)
        return frame

    async def note(tlp):
        if tlp.fmt_type in (TlpType.MEM_WRITE, TlpType.MEM_WRITE_64):
            writes.append(cycle())
        await send(tlp)

    host.block.rq_sink.recv, host.block.send = late, note
    for _ in range(3):
        disk.blk.read(0, 4096)
    await disk.ring_doorbell()
    end = cycle() + 5000
    while len(writes) < 2:
        assert cycle() < end
        await ClockCycles(dut.clk, 4)
    await host.run(disk.driver.reset())
    over = cycle()
    await ClockCycles(dut.clk, 500)
    assert writes[-1] < over, f"a write of the disk came in cycle {writes[-1]}, the reset was over in {over}"
    host.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def configuration_acts(dut):
    """PHY-USP-23: Function Mask and Bus Master act as they are set in the block; UR and CA of the host end a request (R03)."""
    host, disk = await host_of(dut)
    device = host.devices[0]
    control = device.get_capability_offset(PciCapId.MSIX) + 2

    async def set_control(value):
        await host.rc.config_write(PcieId(1, 0, 0), control, value.to_bytes(2, "little"), timeout=host.timeout_ns, timeout_unit="ns")

    await set_control(0xC001)
    request = disk.blk.read(0, 512)
    await disk.ring_doorbell()
    end = cycle() + 5000
    while not request.is_done:
        assert cycle() < end
        await ClockCycles(dut.clk, 20)
        disk.blk.poll()
    assert request.status == OK and not await host.interrupt(0, 1, 200), "an interrupt came through the mask"
    await set_control(0x8001)
    assert await host.interrupt(0, 1, 400)

    page = host.memory.allocate(PAGE)
    for address in (NOBODY, HOLE):
        host.memory.write(page, struct.pack("<IIQ", 1, 0, 8) + b"\xff")
        assert await disk.raw([(page, 16), (address, 512)], [(page + 16, 1)]) == 1
        assert host.memory.read(page + 16, 1)[0] == IOERR
    await serve(disk)

    await device.clear_master()
    disk.blk.read(0, 512)
    await disk.ring_doorbell()
    await ClockCycles(dut.clk, 300)
    assert int(dut.s_axis_rq_tvalid.value) == 0
    assert await host.run(disk.driver.status()), "registers are read all the same"
    host.finish("Memory request did not match", "Memory read operation failed", "Bad status")


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def function_is_reset_by_handshake(dut):
    """PHY-USP-24: a function level reset of the block's resets the disk, is told done, and the disk works anew."""
    host, disk = await host_of(dut)
    done = []

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            if int(dut.cfg_flr_done.value):
                done.append(int(dut.cfg_flr_done.value))

    cocotb.start_soon(watch())
    disk.blk.read(0, 512)
    await disk.ring_doorbell()
    dut.cfg_flr_in_process.value = 1
    for _ in range(100):
        await ClockCycles(dut.clk, 10)
        if done:
            break
    dut.cfg_flr_in_process.value = 0
    assert done == [1]
    await ClockCycles(dut.clk, 60)
    assert await host.run(disk.driver.status()) == 0, "the disk is as after power-on"
    await host.enable_msix(0)  # its table is as after power-on, too: all masked
    await serve(await host.start_disk())
    host.finish()


def word(host, function, bar, offset):
    return host.functions[function].bars[bar].address + offset


async def registers_are_reached(host):
    """Read and write 1, 2, 4, 8 bytes and more of all BARs, as one access each."""
    dut, rng, rc, first = host.dut, host.rng, host.rc, host.config.first_disk
    limit = {"timeout": host.timeout_ns, "timeout_unit": "ns"}
    for function in range(first, host.config.functions):
        common, table = word(host, function, 0, 0), word(host, function, 2, 0)
        content = bytes([rng.getrandbits(6) << 2]) + rng.randbytes(11) + bytes(4)  # an entry of the table: address, data, mask
        await rc.mem_write(table, content)  # four dwords in one request
        assert await rc.mem_read(table, 16, **limit) == content
        for size in (1, 2, 4, 8):
            for at in range(0, 12 - size + 1, size):
                assert await rc.mem_read(table + at, size, **limit) == content[at : at + size]
        assert await rc.mem_read(table + 3, 7, **limit) == content[3:10], "bytes of three dwords"
        for at, size in ((0, 8), (4, 4), (8, 4), (8, 2), (2, 2), (5, 1), (7, 1), (0, 12)):
            new = bytes(byte & (0xFC if at + n == 0 else 0xFF) for n, byte in enumerate(rng.randbytes(size)))
            await rc.mem_write(table + at, new)
            content = content[:at] + new + content[at + size :]
            assert await rc.mem_read(table, 16, **limit) == content, f"{size} bytes at {at}"
        await rc.mem_write(common + 0x08, bytes([1]))  # driver_feature_select
        await rc.mem_write(common + 0x0C, bytes([1, 0, 0, 0]))
        words = b"".join([await rc.mem_read(common + at, 4, **limit) for at in range(0, 56, 4)])
        assert words[0x08] == 1 and words[0x12:0x14] == bytes([1, 0]) and words == await rc.mem_read(common, 56, **limit)
        halves = [await rc.mem_read(table + at, 64, **limit) for at in (0, 64)]
        assert await rc.mem_read(table, 128, **limit) == b"".join(halves)
    sent = capture(host, 0xE0)
    for size, status in ((128, CplStatus.SC), (132, CplStatus.CA), (512, CplStatus.CA)):
        tlp = Tlp_us()
        tlp.fmt_type, tlp.address, tlp.length, tlp.first_be, tlp.last_be = TlpType.MEM_READ, 0, size // 4, 15, 15
        await inject(host, aimed(tlp, 0xE0, first, 2, 12).pack_us_cq())
        end = cycle() + 800
        while not sent:
            assert cycle() < end, f"{size} bytes were not answered"
            await ClockCycles(dut.clk, 10)
        assert [(each.status, each.tag) for each in sent] == [(status, 0xE0)], f"{size} bytes"
        sent.clear()
    if first:  # capabilities of the IOMMU
        low, high = [await rc.mem_read(word(host, 0, 0, at), 4, **limit) for at in (0, 4)]
        assert await rc.mem_read(word(host, 0, 0, 0), 8, **limit) == low + high and low[0] == 0x10


def capture(host, tag):
    """Return the list of completions for ``tag`` and above that the card sends from now on; the root complex does not see them."""
    found, send = [], host.block.send

    async def take(tlp):
        if tlp.is_completion() and tlp.tag >= tag:
            found.append(tlp)
        else:
            await send(tlp)

    host.block.send = take
    return found


async def inject(host, frame):
    """Let the block deliver a packet that its model does not know; it has a credit for it."""
    host.block.cq_np_req_count -= 1
    await host.block.cq_source.send(frame)


def aimed(tlp, tag, function, bar, aperture):
    """Return ``tlp`` as the block has it."""
    tlp.tag, tlp.requester_id, tlp.completer_id = tag, PcieId(0, 0, 0), PcieId(1, 0, function)
    tlp.bar_id, tlp.bar_aperture = bar, aperture
    return tlp


def message_frame(code, kind, routing, data=b""):
    """Return the packet of a message on CQ. [PG213]"""
    frame = UsPcieFrame()
    frame.data = [0, 0, len(data) // 4 | kind << 11, 0xEE | code << 8 | routing << 16, *struct.unpack(f"<{len(data) // 4}I", data)]
    frame.byte_en = [0] * 4 + [15] * (len(data) // 4)
    frame.update_parity()
    return frame


async def other_requests_are_answered(host):
    """Let the block deliver what no register serves: each non-posted one gets UR with its request behind it, messages get nothing."""
    dut, rng, first = host.dut, host.rng, host.config.first_disk
    sent, packets, pulses = capture(host, 0xE0), host.packets, []
    packets.clear()

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            pulses.extend(name for name in ("cfg_err_cor_in", "cfg_err_uncor_in", "malformed") if int(getattr(dut, name).value))

    watching = cocotb.start_soon(watch())
    kinds = [
        *[(kind, dwords) for kind in (TlpType.FETCH_ADD, TlpType.SWAP) for dwords in (1, 2)], (TlpType.CAS, 2), (TlpType.CAS, 4),
        (TlpType.IO_READ, 1), (TlpType.IO_WRITE, 1), (TlpType.MEM_READ_LOCKED, 1), (TlpType.MEM_READ_LOCKED, 8), (TlpType.MEM_READ, 1),
    ]  # fmt: skip
    for n, (kind, dwords) in enumerate(kinds):
        for message in (message_frame(0x40 + n % 2, 0b1100, 0), message_frame(0x7F, 0b1101, 2, rng.randbytes(16)),
                        message_frame(0x30, 0b1100, 3), message_frame(0x50, 0b1100, 4, rng.randbytes(4))):  # fmt: skip
            await host.block.cq_source.send(message)
        tlp = Tlp_us()
        tlp.fmt_type, tlp.length, tlp.first_be, tlp.last_be = kind, dwords, 15, 15 if dwords > 1 else 0
        tlp.address = 0x1234_0000 + 16 * rng.randrange(64)
        if kind not in (TlpType.IO_READ, TlpType.MEM_READ_LOCKED, TlpType.MEM_READ):
            tlp.data = bytearray(rng.randbytes(4 * dwords))
        # The read lies in an aperture that the block has made larger than the card's BAR.
        frame = aimed(tlp, 0xE0 + n, first, 0, 12 if kind is not TlpType.MEM_READ else 31).pack_us_cq()
        await inject(host, frame)
        end = cycle() + 400
        while not sent:
            assert cycle() < end, f"{kind.name} was not answered"
            await ClockCycles(dut.clk, 4)
        await ClockCycles(dut.clk, 20)
        answer, = sent
        locked = kind is TlpType.MEM_READ_LOCKED
        assert answer.fmt_type is (TlpType.CPL_LOCKED if locked else TlpType.CPL) and answer.status == CplStatus.UR
        assert (answer.tag, answer.requester_id) == (0xE0 + n, PcieId(0, 0, 0))
        packet, = packets
        assert packet.data[3:] == [tlp.first_be | tlp.last_be << 4, *frame.data[:4]], f"{kind.name}: what is behind the descriptor"
        sent.clear()
        packets.clear()
    for function in range(first, host.config.functions):
        assert await host.rc.mem_read(word(host, function, 0, 0x1000), 1, timeout=host.timeout_ns, timeout_unit="ns") == bytes(1)
    watching.cancel()
    assert not pulses


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def requests_are_answered(dut):
    """PHY-USP-25: 1, 2, 4, 8 bytes and more of BARs are served, above 128 it is Completer Abort; AtomicOps, I/O, locked reads get UR.

    Answers that say so have their request behind them for the block's log, messages go nowhere; no error is reported in another way.
    """
    host = await host_of(dut, with_disk=False)
    await registers_are_reached(host)
    await other_requests_are_answered(host)
    host.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def everything_works_behind_an_iommu(dut):
    """PHY-USP-26: PHY-USP-25, an IOMMU with its disk: translated data both ways, MSI-X of both; a page without leave fails."""
    host = await host_of(dut, with_disk=False)
    await registers_are_reached(host)
    await other_requests_are_answered(host)
    await host.enable_iommu()
    disk = await host.disk(0, queue_size=16, buffer_pages=24)
    await serve(disk, size=1024)
    assert host.interrupts[disk.function, 1] == 2 and disk.memory is not host.memory
    page = IOVAS + 16 * PAGE
    disk.memory.write(page, struct.pack("<IIQ", 1, 0, 8) + b"\xff")
    assert await disk.raw([(page, 16), (IOVAS + 64 * PAGE, 512)], [(page + 16, 1)]) == 1
    assert disk.memory.read(page + 16, 1)[0] == IOERR, "a page that is not mapped"
    assert await host.interrupt(0, 1, 2000), "the fault was not reported"
    host.finish()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def functions_come_and_go(dut):
    """PHY-USP-27: two disks under load: both reset by the block in one cycle, one to D3hot and back, the link down: each works anew."""
    host = await host_of(dut, with_disk=False)
    shape = {"queue_size": 16, "buffer_pages": 24}
    disks, done = [await host.disk(n, **shape) for n in range(2)], []

    async def load():
        for disk in disks:
            disk.blk.read(0, 4096)
            await disk.ring_doorbell()
            assert await host.run(disk.driver.status()) == 0xF  # the writes before it have come

    async def work_anew(numbers):
        for disk in disks:
            assert await host.run(disk.driver.status()) == 0, "as after power-on"
        for n in numbers:
            disks[n] = await host.disk(n, **shape)
            await serve(disks[n])

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            done.extend(n for n in range(4) if int(dut.cfg_flr_done.value) >> n & 1)

    watching = cocotb.start_soon(watch())
    await load()
    dut.cfg_flr_in_process.value = 0b11
    for _ in range(300):
        await ClockCycles(dut.clk, 10)
        if len(done) == 2:
            break
    dut.cfg_flr_in_process.value = 0
    watching.cancel()
    assert sorted(done) == [0, 1]
    await ClockCycles(dut.clk, 100)
    await work_anew([0, 1])

    disks[0].blk.read(0, 4096)
    await disks[0].ring_doorbell()
    for state in (3, 0):
        dut.cfg_function_power_state.value = state
        dut.cfg_power_state_change_interrupt.value = 1
        end = cycle() + 600
        while not int(dut.cfg_power_state_change_ack.value):
            assert cycle() < end, "the change of the power state was not acknowledged"
            await RisingEdge(dut.clk)
        dut.cfg_power_state_change_interrupt.value = 0
        await ClockCycles(dut.clk, 600)
        if state:
            quiet = host.interrupts[0, 1]
            await serve(disks[1])
            assert host.interrupts[0, 1] == quiet, "a function in D3hot is silent"
    assert [await host.run(disk.driver.status()) for disk in disks] == [0, 0xF]

    disks[1].blk.read(0, 4096)
    await disks[1].ring_doorbell()
    await ClockCycles(dut.clk, 100)
    # The block's model writes user_lnk_up in every cycle: as long as it is down the model must not.
    kept, host.block.user_lnk_up = host.block.user_lnk_up, None
    dut.user_lnk_up.value = 0
    await ClockCycles(dut.clk, 4)
    for _ in range(300):
        await RisingEdge(dut.clk)
        assert not int(dut.s_axis_rq_tvalid.value) and not int(dut.s_axis_cc_tvalid.value)
    dut.user_lnk_up.value = 1
    host.block.user_lnk_up = kept
    host.block.active_request[:] = [None] * 256  # it has forgotten them as well
    await ClockCycles(dut.clk, 2000)
    host.complaints.clear()
    await work_anew([0])
    host.finish()
