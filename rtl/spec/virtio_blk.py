"""Numbers of virtio-blk. [VIRTIO1.4 5.2]"""

DEVICE_TYPE = 2  # [VIRTIO1.4 5.2.1]

F_SEG_MAX = 2  # feature bits [VIRTIO1.4 5.2.3]
F_BLK_SIZE = 6
F_FLUSH = 9

T_IN = 0  # request types [VIRTIO1.4 5.2.6]
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8

S_OK = 0  # request status [VIRTIO1.4 5.2.6]
S_IOERR = 1
S_UNSUPP = 2

ID_BYTES = 20  # answer of GET_ID [VIRTIO1.4 5.2.6]
