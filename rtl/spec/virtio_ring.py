"""Numbers of virtqueues. [VIRTIO1.4 2.7, 2.8]"""

DESCRIPTOR_BYTES = 16  # address u64, length u32, flags u16, next u16 [VIRTIO1.4 2.7.5]
F_NEXT = 0  # bit numbers of a descriptor's flags [VIRTIO1.4 2.7.5]
F_WRITE = 1
F_INDIRECT = 2

AVAIL_FLAGS = 0  # offsets in the available ring [VIRTIO1.4 2.7.6]
AVAIL_INDEX = 2
AVAIL_RING = 4
AVAIL_F_NO_INTERRUPT = 0  # bit number [VIRTIO1.4 2.7.7]

USED_INDEX = 2  # offsets in the used ring [VIRTIO1.4 2.7.8]
USED_RING = 4
USED_ELEMENT_BYTES = 8  # id u32, len u32

F_AVAIL = 7  # bit numbers of a packed descriptor's flags [VIRTIO1.4 2.8.1]
F_USED = 15
EVENT_DISABLE = 1  # flags of an event suppression structure [VIRTIO1.4 2.8.10]
EVENT_DESC = 2
