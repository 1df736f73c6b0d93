"""What a card is made of: the only place of defaults."""

from dataclasses import dataclass, field, replace

from .function.description import (
    AcsCapability,
    AerCapability,
    AriCapability,
    AtsCapability,
    Bar,
    FunctionDescription,
    MsixCapability,
    PasidCapability,
    PcieCapability,
    PowerCapability,
    PriCapability,
    SerialNumber,
)
from .iommu.features import Features
from .spec.virtio import F_SR_IOV
from .viommu.device import IommuDevice
from .virtio.blk import Blk
from .virtio.blk_device import BlkDevice
from .virtio.device import Device
from .virtio.transport import KNOWN, virtio_function

IOMMU_VECTORS = 4
MSIX_TABLE, MSIX_PBA = 0x300, 0x400  # offsets of msi_cfg_tbl, which is the MSI-X table, and of its pending bits [RVIOMMU1.0 6.29]


@dataclass(frozen=True)
class IommuConfig(Features):
    """The RISC-V IOMMU front end, function 0, with :class:`.iommu.features.Features` by name.

    ``bar``: None, or the BAR of the first disk's function that has its registers: then it has no function of its own, and translates for
    that one too. Its interrupts are messages by its own table, at 0x300 of that BAR, while the function's MSI-X is enabled.
    ``entries``, ``ways``: size of the IOTLB; ``superpage_entries``: those for larger pages, 2 to 32; ``second_entries``: of its second
    level, in block RAM, or 0. ``walks``: walks in flight. The IDs are the user's to choose: the defaults are those that pid.codes sets
    aside for tests. A stock Linux riscv_iommu_pci driver binds to 1b36:0014.
    """

    entries: int = 256
    ways: int = 4
    superpage_entries: int = 8
    second_entries: int = 0
    walks: int = 8
    bar: int | None = None
    vendor_id: int = 0x1209
    device_id: int = 0x0001

    def __post_init__(self):
        super().__post_init__()
        if self.entries not in [1 << n for n in range(4, 9)]:
            raise ValueError(f"IOTLB entries must be a power of two between 16 and 256, more by second_entries, not {self.entries!r}")
        if self.superpage_entries not in range(2, 33):
            raise ValueError(f"IOTLB entries for larger pages must be between 2 and 32, not {self.superpage_entries!r}")
        if self.second_entries not in [0, *(1 << n for n in range(4, 13))]:
            raise ValueError(f"Entries of the second IOTLB must be 0 or a power of two between 16 and 4096, not {self.second_entries!r}")
        if self.bar not in (None, 4):
            raise ValueError(f"BAR of an IOMMU without a function must be 4, which no virtio function has, not {self.bar!r}")
        if self.has_wires:
            raise ValueError(f"IGS of a PCIe function must be 0, its interrupts are messages, not {self.IGS!r}")
        if self.ATS:
            raise ValueError(f"ATS of a PCIe function must be off, no link leads to it from devices behind its IOMMU, not {self.ATS!r}")
        if self.ways not in (1, 2, 4, 8) or self.ways > self.entries:
            raise ValueError(f"IOTLB ways must be 1, 2, 4 or 8, not {self.ways!r}")
        if self.walks not in range(1, 33):
            raise ValueError(f"Walks in flight must be between 1 and 32, not {self.walks!r}")
        if self.AMO_HWAD and self.walks > 16:  # each has room for its read while updates wait
            raise ValueError(f"Walks in flight must be at most 16 with AMO_HWAD, not {self.walks!r}")

    def share(self, description):
        """Return the description of the function that ``bar`` is of. [RVIOMMU1.0 8.1]"""
        return replace(description, bars=(*description.bars, Bar(self.bar, 4096)), capabilities=tuple(
            replace(one, has_atomics=self.has_atomics) if isinstance(one, PcieCapability) else one for one in description.capabilities))

    def description(self, extended=()):
        """Return the :class:`.function.description.FunctionDescription` of function 0. [RVIOMMU1.0 8.1]

        ``extended``: extended capabilities of all functions of the card; with them it reports errors. It keeps its state in D3hot.
        """
        return FunctionDescription(
            vendor_id=self.vendor_id,
            device_id=self.device_id,
            class_code=0x080600,
            bars=(Bar(0, 4096),),
            capabilities=(PcieCapability(has_atomics=self.has_atomics), MsixCapability(IOMMU_VECTORS, 0, MSIX_TABLE, 0, MSIX_PBA),
                          PowerCapability()),
            extended=tuple(extended),
            reports_errors=bool(extended),
        )


@dataclass(frozen=True)
class VirtioIommuConfig(IommuDevice):
    """The virtio-iommu front end, function 0: a :class:`.viommu.device.IommuDevice` whose endpoints are the card's other functions.

    A strict card begins with ``bypass`` 0, whatever it is here.
    """

    def description(self, extended=()):
        """Return the :class:`.function.description.FunctionDescription` of function 0, as :meth:`IommuConfig.description` does."""
        return virtio_function(device_type=self.device_type, class_code=self.class_code, queues=len(self.ports),
                               config_bytes=self.config_bytes, vectors=len(self.ports) + 1, extended=extended)  # fmt: skip


@dataclass(frozen=True)
class HostAtsConfig:
    """An address-translation cache towards the host's IOMMU, for all functions of the card. [PCIe5 10]

    ``entries``, ``ways``: translations of 4 KiB. ``requests``: translation requests in flight. ``page_requests``: page requests in flight,
    below ``requests``; 0: the functions have no Page Request Interface. ``page_patience_cycles``: how long one waits for its response at
    least, and not twice as long; the default is 100 ms at 250 MHz. ``pasid_bits``: width of the PASIDs that DMA may have, 0: none has one.
    """

    entries: int = 64
    ways: int = 4
    requests: int = 8
    page_requests: int = 0
    page_patience_cycles: int = 25_000_000
    pasid_bits: int = 0

    def __post_init__(self):
        if self.entries not in [1 << n for n in range(4, 9)]:
            raise ValueError(f"Entries of a translation cache must be a power of two between 16 and 256, not {self.entries!r}")
        if self.ways not in (1, 2, 4, 8):
            raise ValueError(f"Ways of a translation cache must be 1, 2, 4 or 8, not {self.ways!r}")
        if self.requests not in range(1, 17):
            raise ValueError(f"Translation requests in flight must be between 1 and 16, not {self.requests!r}")
        if self.page_requests not in range(self.requests):
            raise ValueError(f"Page requests in flight must be fewer than translation requests, not {self.page_requests!r}")
        if self.page_patience_cycles not in range(2, 1 << 32):
            raise ValueError(f"Patience for a page must be between 2 and 2 ** 32 - 1 cycles, not {self.page_patience_cycles!r}")
        if self.pasid_bits not in range(21):
            raise ValueError(f"Width of PASIDs must be between 0 and 20 bits, not {self.pasid_bits!r}")

    @property
    def capabilities(self):
        """Extended capabilities that each function has for it; virtual ones leave all but the first to their physical one."""
        has_pasid = self.pasid_bits > 0
        return (AtsCapability(has_global_invalidate=has_pasid),
                *((PriCapability(self.page_requests, needs_pasid=has_pasid),) if self.page_requests else ()),
                *((PasidCapability(self.pasid_bits),) if has_pasid else ()))  # fmt: skip


@dataclass(frozen=True)
class BlkConfig(BlkDevice):
    """A virtio-blk function on a RAM store: a :class:`.virtio.blk_device.BlkDevice` with MSI-X vectors.

    ``virtual_functions``: disks like this one, each with a store of its own, that appear when software enables them. [PCIe5 9]
    """

    vectors: int = 2
    virtual_functions: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.capacity_sectors & (self.capacity_sectors - 1):
            raise ValueError(f"Capacity of a RAM store must be a power of two, not {self.capacity_sectors!r}")
        if self.virtual_functions not in range(8):
            raise ValueError(f"Virtual functions of a disk must be between 0 and 7, not {self.virtual_functions!r}")

    def back_end(self, width):
        """Return the :class:`.virtio.blk.Blk`."""
        return Blk(width=width, device=self)


@dataclass(frozen=True)
class EndpointConfig:
    """A card.

    Parameters
    ----------
    width : :class:`int`
        Bits of the data path: 64, 128, 256 or 512.
    iommu : :class:`IommuConfig` or :class:`VirtioIommuConfig` or None
        With an IOMMU it is function 0, and the disks follow, unless it shares theirs (``bar``); without, the disks begin at 0 and their
        DMA is not translated by the card.
    host_ats : :class:`HostAtsConfig` or None
        Instead of an IOMMU: all functions have the ATS capability, and cache translations of the host's IOMMU while it is enabled.
    disks : tuple of :class:`BlkConfig`
        virtio-blk functions; their virtual functions get the numbers behind all others, disk by disk.
    devices : tuple of :class:`.virtio.device.Device`
        Functions behind the disks: other kinds of device, or the user's own.
    transport_features : :class:`int`
        Bits of rings and transport that all devices offer; by default all that there are: packed rings, indirect descriptors, event index,
        in-order use, queue reset, suspend, doorbells with data. SR_IOV is added where it belongs. [VIRTIO1.4 6]
    strict : :class:`bool`
        False: a host that ignores the IOMMU finds a working card (Bare at power-on; a driver without ACCESS_PLATFORM bypasses). True:
        Off at power-on, and such a driver is refused.
    tags, wall_tags : :class:`int`
        Outstanding reads in all, and those of the wall.
    completion_timeout_cycles : :class:`int`
        When a missing completion is given up; the default is 10 ms at 250 MHz.
    read_buffer_bytes : :class:`int` or None
        Space for each function's bulk reads in flight; by default 16 KiB, 32 KiB at 512 bits: a microsecond of the link.
    virtio_at : :class:`int` or None
        Offset of the virtio capabilities in configuration space; by default behind the others.
    serial_number : :class:`int`
        EUI-64 of the card, that all its functions show; the default is a locally administered one.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range.
    """

    width: int = 256
    iommu: IommuConfig | VirtioIommuConfig | None = field(default_factory=IommuConfig)
    host_ats: HostAtsConfig | None = None
    disks: tuple[BlkConfig, ...] = (BlkConfig(),)
    devices: tuple[Device, ...] = ()
    transport_features: int = KNOWN & ~(1 << F_SR_IOV)
    strict: bool = False
    tags: int = 256
    wall_tags: int = 16
    completion_timeout_cycles: int = 2_500_000
    read_buffer_bytes: int | None = None
    virtio_at: int | None = None
    serial_number: int = 0x0200_0000_0000_0001

    def __post_init__(self):
        if self.width not in (64, 128, 256, 512):
            raise ValueError(f"Width of the data path must be 64, 128, 256 or 512 bits, not {self.width!r}")
        if not self.all_devices or self.functions > 8:
            raise ValueError(f"Functions of a card must be between 1 and 8, with at least one device, not {self.functions!r}")
        if self.strict and self.iommu is None:
            raise ValueError(f"A strict card must have an IOMMU, not {self.iommu!r}")
        if self.host_ats is not None and self.iommu is not None:
            raise ValueError(f"A card with a cache for the host's IOMMU must have none of its own, not {self.iommu!r}")
        if self.read_buffer_bytes is None:
            object.__setattr__(self, "read_buffer_bytes", 32768 if self.width == 512 else 16384)
        if self.serial_number not in range(1 << 64):
            raise ValueError(f"Serial number must be a number of 64 bits, not {self.serial_number!r}")

    @property
    def virtio_iommu(self):
        """The virtio-iommu of the card as it is there, or None."""
        if not isinstance(self.iommu, VirtioIommuConfig):
            return None
        return replace(self.iommu, endpoints=tuple(range(1, self.functions)), bypass=self.iommu.bypass and not self.strict)

    @property
    def functions(self):
        """Number of functions, virtual ones included."""
        return len(self.all_devices) + self.first_disk

    @property
    def physical_functions(self):
        """Number of physical functions."""
        return len(self.disks) + len(self.devices) + self.first_disk

    @property
    def extended(self):
        """Extended capabilities that each function has."""
        return (AerCapability(), SerialNumber(self.serial_number), *((AcsCapability(), AriCapability()) if self.functions > 1 else ()),
                *(self.host_ats.capabilities if self.host_ats is not None else ()))  # fmt: skip

    @property
    def pasid_bits(self):
        """Width of the PASIDs that requests may have; 0: they have none."""
        return 0 if self.host_ats is None else self.host_ats.pasid_bits

    @property
    def all_devices(self):
        """What each function is, from the first disk on: ``disks``, ``devices``, then virtual functions of the disks."""
        virtual = [replace(disk, virtual_functions=0) for disk in self.disks for _ in range(disk.virtual_functions)]
        return (*self.disks, *self.devices, *virtual)

    @property
    def first_disk(self):
        """Function number of the first disk, or of the first device when there is none."""
        return int(self.iommu is not None and self.iommu_bar is None)

    @property
    def iommu_bar(self):
        """BAR of function 0 that has the registers of an IOMMU without a function of its own; None without such an IOMMU."""
        return self.iommu.bar if isinstance(self.iommu, IommuConfig) else None
