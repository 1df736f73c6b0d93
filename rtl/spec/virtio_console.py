"""Numbers of virtio-console. [VIRTIO1.4 5.3]"""

DEVICE_TYPE = 3  # [VIRTIO1.4 5.3.1]

F_SIZE = 0  # feature bits [VIRTIO1.4 5.3.3]
F_EMERG_WRITE = 2

EMERG_WR = 8  # offset in the device configuration [VIRTIO1.4 5.3.4]
