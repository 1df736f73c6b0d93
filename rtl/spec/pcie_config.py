"""Numbers of PCI configuration space as the RTL reads them."""

HEADER_BYTES = 0x40  # type 0 header [PCIe5 7.5.1]
CAPABILITIES_END = 0x100  # of the part that PCI capabilities live in [PCIe5 7.2]

BAR_0 = 0x10  # first base address register [PCIe5 7.5.1.2.1]
BAR_COUNT = 6
BAR_TYPE_64 = 0b10  # memory type field, bits 2:1 [PCIe5 7.5.1.2.1]
BAR_MINIMUM_BYTES = 128

CAP_VENDOR = 0x09  # capability IDs [PCIe5 7.9.4]
CAP_PCIE = 0x10  # [PCIe5 7.5.3.1]
CAP_MSIX = 0x11  # [PCIe5 7.7.2.1]

PCIE_BYTES = 0x3C  # [PCIe5 7.5.3]
MSIX_BYTES = 12  # [PCIe5 7.7.2]
MSIX_VECTORS_MAX = 2048
MSIX_ENTRY_BYTES = 16  # [PCIe5 7.7.2.6]

MRRS_RESET = 0b010  # 512 bytes [PCIe5 7.5.3.4]
SPEED_MAX = 5  # link speed code of 32 GT/s [PCIe5 7.5.3.6]
WIDTHS = (1, 2, 4, 8, 12, 16, 32)  # lanes [PCIe5 7.5.3.6]
