"""Numbers of the UltraScale+ integrated block for PCI Express (PCIE4), dword-aligned, as the RTL reads them. [PG213]"""

CQ_DWORDS, CC_DWORDS, RQ_DWORDS, RC_DWORDS = 4, 3, 4, 3  # of the descriptors

# Request type, 4 bits of the request descriptors.
READ, WRITE, IO_READ, IO_WRITE = 0b0000, 0b0001, 0b0010, 0b0011
FETCH_ADD, SWAP, CAS, READ_LOCKED = 0b0100, 0b0101, 0b0110, 0b0111
MESSAGE, MESSAGE_VENDOR, MESSAGE_ATS = 0b1100, 0b1101, 0b1110

# Error code, 4 bits of the descriptor of a received completion: those with which the TLP itself says all, and comes whole.
ERROR_NONE, ERROR_POISONED, ERROR_STATUS = 0b0000, 0b0001, 0b0010

# Width of the sideband buses: at 64 to 256 bits, and at 512.
CQ_USER, CC_USER, RQ_USER, RC_USER = (88, 183), (33, 81), (62, 137), (75, 161)

# Places in the sideband buses at 64 to 256 bits.
CQ_FIRST_BE, CQ_LAST_BE, CQ_DISCONTINUE = 0, 4, 41
RQ_FIRST_BE, RQ_LAST_BE, RQ_DISCONTINUE, RQ_SEQ_LOW, RQ_SEQ_HIGH = 0, 4, 11, 24, 60  # seq_num: 4 bits, and 2 more
CC_DISCONTINUE = 0
RC_SOF, RC_EOF_0, RC_EOF_1, RC_DISCONTINUE = 32, 34, 38, 42  # is_eof_n: a flag, then the last dword's lane in 3 bits

# Places in the sideband buses at 512 bits. is_sop: flags, then places in units of 4 lanes; is_eop: flags, then the last dwords' lanes.
CQ512_FIRST_BE, CQ512_LAST_BE, CQ512_DISCONTINUE = 0, 8, 96
CQ512_SOP, CQ512_SOP_AT, CQ512_EOP, CQ512_EOP_AT = 80, 82, 86, 88
CC512_SOP, CC512_EOP, CC512_EOP_AT, CC512_DISCONTINUE = 0, 6, 8, 16
RQ512_FIRST_BE, RQ512_LAST_BE, RQ512_SOP, RQ512_EOP, RQ512_EOP_AT, RQ512_DISCONTINUE, RQ512_SEQ = 0, 8, 20, 26, 28, 36, 61
RC512_SOP, RC512_SOP_AT, RC512_EOP, RC512_EOP_AT, RC512_DISCONTINUE = 64, 68, 76, 80, 96

SEQ_BITS = 6  # of a sequence number
MAX_FUNCTIONS = 4  # physical functions
PCIE_CAPABILITY = 0x70  # where the block has its PCI Express capability, in every function
STATUS_BITS = 4  # of cfg_function_status for each function
STATUS_MASTER = 2  # the bit of Bus Master Enable
POWER_BITS = 3  # of cfg_function_power_state for each function: 0 D0, 1 D1, 3 D3hot
