"""Numbers of the transaction layer. [PCIe5 2.2]"""

# Type, 5 bits [PCIe5 2.2.1.1]; whether a TLP carries data and has a fourth header dword is in Fmt.
TYPE_MEMORY = 0b00000
TYPE_MEMORY_LOCKED = 0b00001
TYPE_IO = 0b00010
TYPE_CONFIG_0 = 0b00100
TYPE_CONFIG_1 = 0b00101
TYPE_COMPLETION = 0b01010
TYPE_COMPLETION_LOCKED = 0b01011
TYPE_FETCH_ADD = 0b01100
TYPE_SWAP = 0b01101
TYPE_CAS = 0b01110
TYPE_MESSAGE = 0b10000  # the low three bits route it

ROUTED_TO_ROOT, ROUTED_BY_ID = 0b000, 0b010  # low three bits of a message's type [PCIe5 2.2.8]
MESSAGE_VENDOR_0, MESSAGE_VENDOR_1 = 0x7E, 0x7F  # message codes [PCIe5 2.2.8.6]
# Messages that every endpoint accepts: Unlock, PM_Active_State_Nak, PME_Turn_Off, Ignored, Set_Slot_Power_Limit. [PCIe5 2.2.8]
MESSAGES_ACCEPTED = (0x00, 0x14, 0x19, 0x40, 0x41, 0x43, 0x44, 0x45, 0x47, 0x48, 0x50)

MESSAGE_INVALIDATE, MESSAGE_INVALIDATED = 0x01, 0x02  # Invalidate Request, Invalidate Completion [PCIe5 10.3.1, 10.3.2]
MESSAGE_PAGE_REQUEST, MESSAGE_PAGE_RESPONSE = 0x04, 0x05  # Page Request, PRG Response [PCIe5 10.4.1, 10.4.2]
PAGE_SUCCESS, PAGE_INVALID = 0, 1  # response codes; any other is Response Failure [PCIe5 10.4.2.1]

AT_TRANSLATION_REQUEST, AT_TRANSLATED = 0b01, 0b10  # address type; 0 is untranslated [PCIe5 10.2.1]

FMT_4DW = 0  # bit numbers of Fmt [PCIe5 2.2.1]
FMT_DATA = 1
FMT_PREFIX = 2
PASID_PREFIX = 0b100_10001  # Fmt and Type of the PASID TLP prefix [PCIe5 6.20.2]

STATUS_SC = 0b000  # completion status [PCIe5 2.2.9]
STATUS_UR = 0b001
STATUS_CA = 0b100
