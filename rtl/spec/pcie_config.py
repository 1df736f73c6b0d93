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
FLR_BIT = 15  # Initiate FLR, of Device Control [PCIe5 7.5.3.4]

ROM_INDEX = 6  # what the Expansion ROM BAR is called beside BARs 0 to 5
ROM_BAR = 0x30  # [PCIe5 7.5.1.2.4]
ROM_SIZES = tuple(1 << n for n in range(11, 25))

SPACE_BYTES = 4096  # of one function [PCIe5 7.2.2]
EXTENDED_HEADER_BYTES = 4  # ID 15:0, version 19:16, next 31:20 [PCIe5 7.6.3]

CAP_PM = 0x01  # [PCIe5 7.5.2]
CAP_MSI = 0x05  # [PCIe5 7.7.1]
PM_BYTES = 8
MSI_VECTORS = (1, 2, 4, 8, 16, 32)
D0, D3HOT = 0b00, 0b11  # PowerState [PCIe5 7.5.2.2]

EXT_AER = 0x0001  # extended capability IDs [PCIe5 7.8.4]
EXT_DSN = 0x0003  # [PCIe5 7.9.3]
EXT_VSEC = 0x000B  # [PCIe5 7.9.5]
EXT_ACS = 0x000D  # [PCIe5 7.7.8]
EXT_ARI = 0x000E  # [PCIe5 7.8.7]
EXT_ATS = 0x000F  # [PCIe5 10.5.1]
EXT_SRIOV = 0x0010  # [PCIe5 9.3.3]
EXT_PRI = 0x0013  # [PCIe5 10.5.2]
EXT_PASID = 0x001B  # [PCIe5 7.8.8]
EXT_DVSEC = 0x0023  # [PCIe5 7.9.6]

TIMEOUT_RANGES = (0b0000, 0b0001, 0b0010, 0b0011, 0b0110, 0b0111, 0b1110, 0b1111)  # what an encoding may be [PCIe5 7.5.3.15]
PASID_BITS_MAX = 20
PAGE_SIZES = 0x553  # 4 KiB << n of each bit n that a physical function must support [PCIe5 9.3.3.12]

# Uncorrectable errors: name, bit, fatal by default, masked by default [PCIe5 7.8.4.2 to 7.8.4.4]
UNCORRECTABLE = (
    ("data_link", 4, True, False),
    ("poisoned", 12, False, False),
    ("flow_control", 13, True, False),
    ("completion_timeout", 14, False, False),
    ("completer_abort", 15, False, False),
    ("unexpected_completion", 16, False, False),
    ("overflow", 17, True, False),
    ("malformed", 18, True, False),
    ("unsupported", 20, False, False),
    ("internal", 22, True, True),
)
# Correctable errors: name, bit, masked by default [PCIe5 7.8.4.5, 7.8.4.6]
CORRECTABLE = (
    ("receiver", 0, False),
    ("bad_tlp", 6, False),
    ("bad_dllp", 7, False),
    ("replay_rollover", 8, False),
    ("replay_timeout", 12, False),
    ("advisory", 13, True),
    ("internal", 14, True),
)
UNSUPPORTED_BIT, ADVISORY_BIT = 20, 13
# Offsets inside the AER capability [PCIe5 7.8.4]
AER_BYTES = 0x48
AER_UNCORRECTABLE_STATUS, AER_UNCORRECTABLE_MASK, AER_SEVERITY = 0x04, 0x08, 0x0C
AER_CORRECTABLE_STATUS, AER_CORRECTABLE_MASK, AER_CONTROL, AER_HEADER_LOG = 0x10, 0x14, 0x18, 0x1C

# Bits of Command, and of Status as it lies in the dword of both [PCIe5 7.5.1.1.3, 7.5.1.1.4]
COMMAND_PARITY_RESPONSE, COMMAND_SERR = 6, 8
STATUS_ERRORS = (
    ("master_data_parity", 8),
    ("signaled_target_abort", 11),
    ("received_target_abort", 12),
    ("received_master_abort", 13),
    ("signaled_system_error", 14),
    ("detected_parity", 15),
)
DEVICE_CONTROL = 0x08  # with Device Status above it, inside the PCI Express capability [PCIe5 7.5.3]
DEVICE_CONTROL_2 = 0x28
DEVICE_ERRORS = ("correctable", "non_fatal", "fatal", "unsupported")  # bits 0 to 3 of Device Control and Device Status [PCIe5 7.5.3.4]

ERR_COR, ERR_NONFATAL, ERR_FATAL = 0x30, 0x31, 0x33  # message codes [PCIe5 2.2.8.3]
