"""What a virtio-iommu is to a card: features, configuration, reserved addresses, queues."""

from dataclasses import dataclass
from itertools import pairwise

from ..iommu.gate import MAX_FUNCTIONS
from ..spec import virtio_iommu as spec
from ..virtio.device import Port
from ..virtio.ports import SMALL_READS
from .layouts import SLOTS
from .translator import FEATURES, PAGE_BITS
from .unit import Viommu

PROBE_STEP_BYTES = 64  # probe_size is a multiple


@dataclass(frozen=True)
class Region:
    """Addresses ``start`` to ``end``, inclusive, that no driver may map; ``is_msi``: there writes of an aligned dword pass untranslated.

    [VIRTIO1.4 5.13.6.8.1]
    """

    start: int
    end: int
    is_msi: bool = False

    def __post_init__(self):
        page = 1 << PAGE_BITS
        if not 0 <= self.start < self.end < 1 << 64 or self.start % page or (self.end + 1) % page:
            raise ValueError(f"Reserved addresses must be whole pages of {page} bytes in 64 bits, not {self!r}")

    def property(self):
        """Return the RESV_MEM property that tells of it."""
        head = spec.PROBE_T_RESV_MEM.to_bytes(2, "little") + spec.RESV_MEM_BYTES.to_bytes(2, "little")
        subtype = spec.RESV_MEM_T_MSI if self.is_msi else spec.RESV_MEM_T_RESERVED
        return head + subtype.to_bytes(4, "little") + self.start.to_bytes(8, "little") + self.end.to_bytes(8, "little")


X86_DOORBELLS = Region(0xFEE0_0000, 0xFEEF_FFFF, is_msi=True)


@dataclass(frozen=True)
class IommuDevice:
    """Choices of who builds a virtio-iommu. [VIRTIO1.4 5.13.4]

    ``input_bits``: of an address that can be mapped. ``page_size_mask``: its lowest bit is the granularity. ``domain_range``: first and
    last domain ID. ``regions``: reserved addresses of all endpoints. ``bypass``: the field at power-on. ``intervals``: mappings that fit,
    of all domains together. ``entries``, ``ways``: of the IOTLB. ``events``: fault records that wait for a buffer. ``endpoints``: the
    functions that it translates for, whose numbers are the endpoint IDs. ``queue_size``: the largest of both queues.
    """

    input_bits: int = 48
    page_size_mask: int = (1 << 64) - (1 << PAGE_BITS)
    domain_range: tuple[int, int] = (0, 0xFFFF_FFFF)
    regions: tuple[Region, ...] = (X86_DOORBELLS,)
    bypass: bool = True
    intervals: int = 4096
    entries: int = 64
    ways: int = 4
    events: int = 16
    endpoints: tuple[int, ...] = (1,)
    queue_size: int = 256

    device_type = spec.DEVICE_TYPE
    class_code = 0x080600  # IOMMU
    config_bytes = spec.CONFIG_BYTES

    def __post_init__(self):
        if self.input_bits not in FEATURES:
            raise ValueError(f"Bits of an address must be 39, 48 or 57, not {self.input_bits!r}")
        if self.page_size_mask not in range(1 << 64) or self.granule_bits not in range(PAGE_BITS, self.input_bits):
            raise ValueError(f"Page sizes must be bits of 64, none below {1 << PAGE_BITS}, not {self.page_size_mask!r}")
        if not 0 <= self.domain_range[0] <= self.domain_range[1] < 1 << 32:
            raise ValueError(f"Domains must be a range of 32-bit numbers, not {self.domain_range!r}")
        if not set(self.endpoints) <= set(range(MAX_FUNCTIONS)) or len(self.endpoints) >= SLOTS:
            raise ValueError(f"Endpoints must be at most {SLOTS - 1} functions, not {self.endpoints!r}")
        if sum(region.is_msi for region in self.regions) > 1:
            raise ValueError(f"Regions for MSI must be at most one, not {self.regions!r}")
        ordered = sorted(self.regions, key=lambda region: region.start)
        if any(one.end >= other.start for one, other in pairwise(ordered)):
            raise ValueError(f"Reserved addresses must not overlap, not {self.regions!r}")

    @property
    def granule_bits(self):
        """Number of the lowest bit of ``page_size_mask``."""
        return (self.page_size_mask & -self.page_size_mask).bit_length() - 1

    @property
    def device_features(self):
        """Bits that are offered; without reserved addresses there is nothing to probe. [VIRTIO1.4 5.13.3]"""
        offered = [spec.F_INPUT_RANGE, spec.F_DOMAIN_RANGE, spec.F_MAP_UNMAP, spec.F_MMIO, spec.F_BYPASS_CONFIG]
        return sum(1 << bit for bit in [*offered, *([spec.F_PROBE] if self.regions else [])])

    @property
    def ports(self):
        """The request queue, the event queue."""
        return tuple(Port((self.queue_size,), waits, SMALL_READS) for waits in (False, True))

    def back_end(self, width):
        """Return the :class:`.unit.Viommu`."""
        return Viommu(width=width, device=self)

    @property
    def window(self):
        """First and last page number of the region for MSI, or None."""
        return next(((r.start >> PAGE_BITS, r.end >> PAGE_BITS) for r in self.regions if r.is_msi), None)

    @property
    def properties(self):
        """The bytes that PROBE answers, probe_size in all. [VIRTIO1.4 5.13.6.7]"""
        content = b"".join(region.property() for region in self.regions)
        return content.ljust(-(-len(content) // PROBE_STEP_BYTES) * PROBE_STEP_BYTES, b"\0")

    @property
    def configuration(self):
        """The configuration bytes, with ``bypass`` 0. [VIRTIO1.4 5.13.4]"""
        words = [(self.page_size_mask, 8), (0, 8), ((1 << self.input_bits) - 1, 8), (self.domain_range[0], 4), (self.domain_range[1], 4),
                 (len(self.properties), 4)]  # fmt: skip
        return b"".join(value.to_bytes(size, "little") for value, size in words).ljust(spec.CONFIG_BYTES, b"\0")
