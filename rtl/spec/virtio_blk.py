"""Numbers of virtio-blk. [VIRTIO1.4 5.2]"""

DEVICE_TYPE = 2  # [VIRTIO1.4 5.2.1]

F_SIZE_MAX = 1  # feature bits [VIRTIO1.4 5.2.3]
F_SEG_MAX = 2
F_RO = 5
F_BLK_SIZE = 6
F_FLUSH = 9
F_TOPOLOGY = 10
F_CONFIG_WCE = 11
F_MQ = 12
F_DISCARD = 13
F_WRITE_ZEROES = 14

CONFIG_BYTES = 60  # up to what belongs to WRITE_ZEROES [VIRTIO1.4 5.2.4]
CONFIG_WRITEBACK = 32  # offset

T_IN = 0  # request types [VIRTIO1.4 5.2.6]
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13

S_OK = 0  # request status [VIRTIO1.4 5.2.6]
S_IOERR = 1
S_UNSUPP = 2

SECTOR_BYTES = 512  # [VIRTIO1.4 5.2.4]
ID_BYTES = 20  # answer of GET_ID [VIRTIO1.4 5.2.6]
SEGMENT_BYTES = 16  # of DISCARD and WRITE_ZEROES: sector u64, num_sectors u32, flags u32 [VIRTIO1.4 5.2.6]
UNMAP = 0  # bit number of its flags
