"""Numbers of virtio-rng. [VIRTIO1.4 5.4]"""

DEVICE_TYPE = 4  # [VIRTIO1.4 5.4.1]
