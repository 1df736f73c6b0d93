"""Numbers of virtio-net. [VIRTIO1.4 5.1]"""

DEVICE_TYPE = 1  # [VIRTIO1.4 5.1.1]

F_CSUM = 0  # feature bits [VIRTIO1.4 5.1.3]
F_GUEST_CSUM = 1
F_MTU = 3
F_MAC = 5
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_MQ = 22
F_CTRL_MAC_ADDR = 23

CONFIG_BYTES = 12  # mac u8[6], status u16, max_virtqueue_pairs u16, mtu u16 [VIRTIO1.4 5.1.4]
S_LINK_UP = 0  # bit number of status [VIRTIO1.4 5.1.4]
MTU_MIN = 68  # [VIRTIO1.4 5.1.4.1]

HEADER_BYTES = 12  # of a packet in a buffer [VIRTIO1.4 5.1.9]
HDR_NUM_BUFFERS = 10  # offset
HDR_F_NEEDS_CSUM = 0  # bit numbers of its flags [VIRTIO1.4 5.1.9]
HDR_F_DATA_VALID = 1
GSO_NONE = 0

CTRL_RX = 0  # classes of the control queue, and their commands [VIRTIO1.4 5.1.9.5]
CTRL_RX_PROMISC = 0
CTRL_RX_ALLMULTI = 1
CTRL_MAC = 1
CTRL_MAC_TABLE_SET = 0
CTRL_MAC_ADDR_SET = 1
CTRL_MQ = 4
CTRL_MQ_VQ_PAIRS_SET = 0

ACK_OK = 0  # [VIRTIO1.4 5.1.9.5]
ACK_ERR = 1
