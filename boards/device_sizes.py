"""Sizes of ring engine and devices on ECP5 and xc7: ``python -m ringwall.boards.device_sizes [row ...]`` prints a table.

Each is mapped alone, as in :mod:`.sizes`.
"""

from ..rtl.dma.scatter_gather import ScatterGather
from ..rtl.viommu.device import IommuDevice
from ..rtl.viommu.intervals import Intervals
from ..rtl.viommu.translator import Translator
from ..rtl.viommu.unit import Viommu
from ..rtl.virtio.blk import Blk
from ..rtl.virtio.console import Console, ConsoleDevice
from ..rtl.virtio.engine import PortDescription, RingEngine
from ..rtl.virtio.net import Net, NetDevice
from ..rtl.virtio.rng import Rng
from ..rtl.virtio.used import UsedRings
from .sizes import asked_rows, print_table

DISK = (PortDescription(0, (256,)),)
ROWS = {
    "ring engine": lambda: RingEngine(width=64, functions=(1,), clients=(1,), ports=DISK),
    "ring engine, 256 bits": lambda: RingEngine(width=256, functions=(1,), clients=(1,), ports=DISK),
    "its used side": lambda: UsedRings(width=64, functions=1, ports=DISK),
    "data mover of a port": lambda: ScatterGather(width=64, function=1, client=2),
    "virtio-blk, memory outside": lambda: Blk(width=64, has_memory_port=True),
    "virtio-net": lambda: Net(width=64, device=NetDevice()),
    "virtio-console": lambda: Console(width=64, device=ConsoleDevice()),
    "virtio-rng": lambda: Rng(width=64),
    "virtio-iommu, 256 intervals": lambda: Viommu(width=64, device=IommuDevice(intervals=256)),
    "virtio-iommu, 4,096 intervals, 256 bits": lambda: Viommu(width=256, device=IommuDevice()),
    "its `Intervals`": Intervals,
    "its `Translator`": Translator,
}


def main(arguments=None):
    rows = asked_rows("Print sizes of ring engine and devices as a table; Yosys takes a minute for each row.", arguments, ROWS)
    print_table("block", rows, lambda row: ROWS[row]())


if __name__ == "__main__":
    main()
