"""A whole card on the hard block as cocotbext-pcie models it, below its root complex: neither was written by any of us."""

import logging
import random
import struct

import cocotb
import pytest
from cocotb.triggers import ClockCycles, Event, FallingEdge, RisingEdge, Timer
from cocotbext.axi import AxiStreamBus
from cocotbext.pcie.core import RootComplex
from cocotbext.pcie.core.caps import PciCapId
from cocotbext.pcie.core.tlp import TlpType
from cocotbext.pcie.core.utils import PcieId
from cocotbext.pcie.xilinx.us import UltraScalePlusPcieDevice

from ringwall.models.host import Bar, Delay, FunctionInfo
from ringwall.models.virtio.blk import BlkDriver
from ringwall.models.virtio.driver import Feature, Structure, StructureType, VirtioPciDriver
from ringwall.models.virtio.split import SplitDriver
from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.verilog import UltraScaleCard
from ringwall.sim.run import params, ports, run
from ringwall.sim.second_host import PoolMemory, SecondDisk, SecondHost
from ringwall.sim.stream import cycle

OK, IOERR, PAGE = 0, 1, 4096
NOBODY = 0xB000_0000  # no region of the root complex: Unsupported Request
HOLE = 0x7FFF_0000  # in its pool, but not allocated: Completer Abort
SETTINGS = {
    64: {"pcie_generation": 3, "pcie_link_width": 2},
    256: {"pcie_generation": 3, "pcie_link_width": 8, "rc_straddle": True},
}


def config(width):
    return EndpointConfig(
        width=width, iommu=None, disks=(BlkConfig(capacity_sectors=64, queue_size=64),), tags=64, completion_timeout_cycles=10_000,
        read_buffer_bytes=4096)


TESTS = {64: ["host_sees_what_was_written_before", "configuration_acts", "function_is_reset_by_handshake"], 256: ["disk_works"]}


@pytest.mark.parametrize("width", [64, 256])
def test_ultrascale_card(request, width):
    straddle = ("rc",) if "rc_straddle" in SETTINGS[width] else ()
    card = UltraScaleCard(config(width), straddle=straddle, order_cycles=1000)
    run(card, module=__name__, node=request.node.nodeid, params={"width": width}, testcase=TESTS[width])


def test_parameters_are_checked():
    """PHY-USP-20: a card that the hard block cannot be is refused with a sentence."""
    with pytest.raises(ValueError, match="between 1 and 4, not 5"):
        UltraScaleCard(EndpointConfig(disks=(BlkConfig(),) * 4))
    with pytest.raises(ValueError, match="among"):
        UltraScaleCard(config(64), straddle=("rc",))


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
    """The root complex with the hard block below it. Its disk is found by no capability: structures lie at fixed places of BAR 0."""

    def __init__(self, dut, width):
        self.dut, self.config, self.rng, self.timeout_ns = dut, config(width), random.Random(cocotb.RANDOM_SEED), 80_000
        self.iommu, self.interrupts, self._taken, self._news = None, {}, {}, Event()
        self.devices, self.functions, self.complaints = {}, {}, []
        logger = logging.getLogger("cocotb.pcie")
        logger.propagate, logger.handlers = False, [Complaints(self.complaints)]
        logger.setLevel(logging.WARNING)
        logging.getLogger("cocotb.top").setLevel(logging.WARNING)
        signals = {name: getattr(dut, name) for name in ports() if name.startswith(("pcie_", "cfg_"))}
        buses = {name[-2:]: AxiStreamBus.from_prefix(dut, name) for name in ("s_axis_rq", "s_axis_cc", "m_axis_cq", "m_axis_rc")}
        self.block = UltraScalePlusPcieDevice(
            user_clk_frequency=250e6, max_payload_size=512, enable_extended_tag=True, pf0_msix_enable=True, pf0_msix_table_size=1,
            pf0_msix_table_bir=2, pf0_msix_pba_bir=2, pf0_msix_pba_offset=0x800, user_clk=dut.clk, user_reset=dut.rst, **SETTINGS[width],
            **{f"{name}_bus": bus for name, bus in buses.items()}, **signals,
        )  # fmt: skip
        function = self.block.functions[0]
        function.vendor_id, function.device_id, function.class_code = 0x1AF4, 0x1042, 0x018000
        function.configure_bar(0, 16384, True)
        function.configure_bar(2, 4096, True)
        self.rc = RootComplex()
        self.rc.max_payload_size = 1
        self.root_port = self.rc.make_port()
        self.root_port.connect(self.block)
        self.memory = PoolMemory(self.rc.mem_pool)

    async def begin(self):
        """Let the root complex enumerate, enable what it found, bring the disk up; return the :class:`SecondDisk`."""
        await FallingEdge(self.dut.rst)
        await self.rc.enumerate(timeout=self.timeout_ns, timeout_unit="ns")
        self.complaints[:] = [text for text in self.complaints if not text.startswith("Failed to route config type 0")]
        device = self.devices[0] = self.rc.find_device(PcieId(1, 0, 0))
        await device.enable_device()
        await device.set_master()
        info = self.functions[0] = FunctionInfo(0, device.vendor_id, device.device_id)
        for n in (0, 2):
            info.bars[n] = Bar(device.bar_addr[n], device.bar_size[n], is_64=True)
        await self.enable_msix(0)
        return await self.start_disk()

    async def start_disk(self):
        """Reset the disk, set its queue up and begin."""
        base = self.memory.allocate(56 * PAGE)
        driver, ring = FixedPlaces(self.functions[0]), SplitDriver(self.memory, size=16, base=base)
        await self.run(driver.start([ring.layout], wanted=1 << Feature.VERSION_1 | 1 << 9, vectors=[1], config_vector=0))
        assert not driver.problems
        blk = BlkDriver(ring, self.memory, area=(base + 16 * PAGE, 40 * PAGE), rng=self.rng)
        return SecondDisk(self, 0, self.memory, None, ring, driver, blk)


async def host_of(dut):
    """Return the host of a test and its disk."""
    for name, (way, _) in ports().items():
        if way == "input":
            getattr(dut, name).value = 0
    await Timer(1, "ns")
    host = HardBlockHost(dut, params()["width"])
    return host, await host.begin()


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
    table = host.functions[0].bars[2].address  # it is as after power-on, too: all masked
    for n, vector in enumerate(host.devices[0].msi_vectors):
        for offset, word in ((0, vector.addr), (8, vector.data), (12, 0)):
            await host.rc.mem_write(table + 16 * n + offset, word.to_bytes(4, "little"))
    await serve(await host.start_disk())
    host.finish()
