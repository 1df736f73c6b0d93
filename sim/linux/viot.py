"""The ACPI table that tells a guest which PCI functions are behind a virtio-iommu. [VIOT]"""

import struct

__all__ = ["table"]

_HEADER_BYTES = 36  # of every ACPI table
_PCI_RANGE, _VIRTIO_IOMMU_PCI = 1, 3  # kinds of node
_HEAD = struct.Struct("<HH8x")  # nodes, offset of the first
_NODE = struct.Struct("<BxH")  # kind, length
_RANGE = struct.Struct("<IHHHHH6x")  # first endpoint, segments, functions, offset of the IOMMU's node
_IOMMU = struct.Struct("<HH8x")  # segment, function


def table(iommu: int, endpoints: dict[int, int]) -> bytes:
    """Return the table behind its header, for QEMU's ``-acpitable``: what it takes as data.

    Parameters
    ----------
    iommu : :class:`int`
        Bus, device and function of the virtio-iommu, as one number of 16 bits.
    endpoints : dict
        Bus, device and function of each PCI function -> its endpoint ID.

    Raises
    ------
    :exc:`ValueError`
        When a number does not fit, or the IOMMU is its own endpoint.
    """
    if iommu in endpoints or not all(0 <= number < 1 << 16 for number in (iommu, *endpoints)):
        raise ValueError(f"Functions must be numbers of 16 bits, the IOMMU none of its own endpoints, not {iommu!r} and {endpoints!r}")
    if not all(0 <= endpoint < 1 << 32 for endpoint in endpoints.values()):
        raise ValueError(f"Endpoints must be numbers of 32 bits, not {endpoints!r}")
    first = _HEADER_BYTES + _HEAD.size
    found = _HEAD.pack(1 + len(endpoints), first)
    found += _NODE.pack(_VIRTIO_IOMMU_PCI, _NODE.size + _IOMMU.size) + _IOMMU.pack(0, iommu)
    for function, endpoint in endpoints.items():
        found += _NODE.pack(_PCI_RANGE, _NODE.size + _RANGE.size) + _RANGE.pack(endpoint, 0, 0, function, function, first)
    return found
