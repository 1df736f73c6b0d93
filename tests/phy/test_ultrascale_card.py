"""A whole card on the hard block as cocotbext-pcie models it, below its root complex: neither was written by any of us."""

import logging
import random

import cocotb
import pytest
from cocotb.triggers import Event, FallingEdge, Timer
from cocotbext.axi import AxiStreamBus
from cocotbext.pcie.core import RootComplex
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

OK, PAGE = 0, 4096
SETTINGS = {
    64: {"pcie_generation": 3, "pcie_link_width": 2},
    256: {"pcie_generation": 3, "pcie_link_width": 8, "rc_straddle": True},
}


def config(width):
    return EndpointConfig(
        width=width, iommu=None, disks=(BlkConfig(capacity_sectors=64, queue_size=64),), tags=64, completion_timeout_cycles=10_000,
        read_buffer_bytes=4096)


@pytest.mark.parametrize("width", [64, 256])
def test_ultrascale_card(request, width):
    straddle = ("rc",) if "rc_straddle" in SETTINGS[width] else ()
    card = UltraScaleCard(config(width), straddle=straddle, order_cycles=1000)
    run(card, module=__name__, node=request.node.nodeid, params={"width": width})


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
        buses = {name: AxiStreamBus.from_prefix(dut, f"{prefix}_axis_{name}") for name, prefix in (("rq", "s"), ("cc", "s"), ("cq", "m"), ("rc", "m"))}
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


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def disk_works(dut):
    """PHY-USP-20: a disk behind the hard block, driven at fixed places of its BAR: writes and reads back; MSI-X by writes on RQ (R16, R33)."""
    host, disk = await host_of(dut)
    content = host.rng.randbytes(8192)
    for at, length in ((0, 512), (512, 3584), (4096, 4096)):
        request = disk.blk.write(at // 512, content[at : at + length])
        await disk.done([request])
        assert request.status == OK
    requests = [(at, length, disk.blk.read(at // 512, length)) for at, length in ((0, 4096), (512, 1024), (2048, 6144))]
    await disk.done([request for _, _, request in requests])
    for at, length, request in requests:
        assert request.status == OK and request.data == content[at : at + length]
    host.finish()
