"""What a virtio-blk function is: its size, its features, its device configuration."""

from dataclasses import dataclass

from ..spec import virtio_blk as spec
from .device import Port

MASS_STORAGE = 0x018000  # class code
BLK_CHAINS = 64


@dataclass(frozen=True)
class BlkDevice:
    """A virtio-blk device. Numbers whose default is 0 or None are of features that are then not offered. [VIRTIO1.4 5.2.3, 5.2.4]

    Parameters
    ----------
    capacity_sectors : :class:`int`
        Sectors of 512 bytes.
    serial : :class:`bytes`
        What GET_ID answers: at most 20 bytes, padded with zeros.
    queue_size, queues : :class:`int`
        Largest size of a queue; their number, 1 to 64, more than one with MQ.
    is_read_only : :class:`bool`
        RO: whatever writes ends in IOERR.
    size_max, seg_max : :class:`int`
        SIZE_MAX, SEG_MAX: hints to the driver; a device takes longer and more segments.
    block_bytes : :class:`int`
        BLK_SIZE: a power of two from 512 on, that the capacity is a multiple of.
    topology : tuple of :class:`int` or None
        TOPOLOGY: physical_block_exp, alignment_offset, min_io_size, opt_io_size.
    has_cache_control : :class:`bool`
        CONFIG_WCE: ``writeback`` can be written; writes are stable when they end, whatever it says.
    max_discard_sectors, max_discard_segments, discard_alignment : :class:`int`
        DISCARD, and what one request may ask for.
    max_zero_sectors, max_zero_segments : :class:`int`
        WRITE_ZEROES, and what one request may ask for: so much of the store is written while the other requests wait.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of its range.
    """

    capacity_sectors: int = 16384  # 8 MiB
    serial: bytes = b"ringwall"
    queue_size: int = 256
    queues: int = 1
    is_read_only: bool = False
    size_max: int = 0
    seg_max: int = 0
    block_bytes: int = 0
    topology: tuple[int, int, int, int] | None = None
    has_cache_control: bool = False
    max_discard_sectors: int = 0
    max_discard_segments: int = 1
    discard_alignment: int = 1
    max_zero_sectors: int = 0
    max_zero_segments: int = 1

    def __post_init__(self):
        if not isinstance(self.capacity_sectors, int) or not 2 <= self.capacity_sectors <= 1 << 32:
            raise ValueError(f"Capacity must be between 2 and 2 ** 32 sectors, not {self.capacity_sectors!r}")
        if len(self.serial) > spec.ID_BYTES:
            raise ValueError(f"Serial must have at most {spec.ID_BYTES} bytes, not {self.serial!r}")
        if self.queues not in range(1, 65):
            raise ValueError(f"Queues of a disk must be between 1 and 64, not {self.queues!r}")
        if self.block_bytes and (self.block_bytes not in [512 << n for n in range(8)] or self.capacity_sectors * 512 % self.block_bytes):
            raise ValueError(f"Block must be 512 << 0 to 7 bytes, and the capacity a multiple of it, not {self.block_bytes!r}")
        for name in ("size_max", "seg_max", "max_discard_sectors", "max_discard_segments", "discard_alignment", "max_zero_sectors",
                     "max_zero_segments"):  # fmt: skip
            if getattr(self, name) not in range(1 << 32):
                raise ValueError(f"{name} must be a number of 32 bits, not {getattr(self, name)!r}")
        if 0 in (self.max_discard_segments, self.max_zero_segments):
            raise ValueError("A request to discard or zero must have room for a segment at least, not for 0")
        if self.topology is not None and any(n not in range(1 << bits) for n, bits in zip(self.topology, (8, 8, 16, 32), strict=True)):
            raise ValueError(f"Topology must be numbers of 8, 8, 16 and 32 bits, not {self.topology!r}")
        if self.is_read_only and (self.max_discard_sectors or self.max_zero_sectors or self.has_cache_control):
            raise ValueError("A disk that is read-only must discard and zero nothing, and have no cache control, not such features")

    @property
    def device_type(self):
        """Its number. [VIRTIO1.4 5]"""
        return spec.DEVICE_TYPE

    @property
    def class_code(self):
        """Of its PCI function."""
        return MASS_STORAGE

    @property
    def device_features(self):
        """What it offers. [VIRTIO1.4 5.2.3]"""
        offered = {
            spec.F_SIZE_MAX: self.size_max, spec.F_SEG_MAX: self.seg_max, spec.F_RO: self.is_read_only, spec.F_BLK_SIZE: self.block_bytes,
            spec.F_FLUSH: 1, spec.F_TOPOLOGY: self.topology is not None, spec.F_CONFIG_WCE: self.has_cache_control,
            spec.F_MQ: self.queues > 1, spec.F_DISCARD: self.max_discard_sectors, spec.F_WRITE_ZEROES: self.max_zero_sectors,
        }  # fmt: skip
        return sum(1 << bit for bit, is_there in offered.items() if is_there)

    @property
    def ports(self):
        """One, of all queues."""
        return (Port((self.queue_size,) * self.queues, most_chains=BLK_CHAINS),)

    @property
    def config_bytes(self):
        """Bytes of the device configuration."""
        return spec.CONFIG_BYTES

    def configuration(self):
        """Return the bytes of the device configuration behind the capacity. [VIRTIO1.4 5.2.4]"""
        exponent, offset, least, best = self.topology or (0, 0, 0, 0)
        discards, zeroes = bool(self.max_discard_sectors), bool(self.max_zero_sectors)
        fields = (
            (self.size_max, 4), (self.seg_max, 4), (0, 4), (self.block_bytes, 4), (exponent, 1), (offset, 1), (least, 2), (best, 4),
            (0, 2), (self.queues if self.queues > 1 else 0, 2),
            (self.max_discard_sectors, 4), (discards and self.max_discard_segments, 4), (discards and self.discard_alignment, 4),
            (self.max_zero_sectors, 4), (zeroes and self.max_zero_segments, 4), (0, 4),
        )  # fmt: skip
        return b"".join(int(value).to_bytes(size, "little") for value, size in fields)
