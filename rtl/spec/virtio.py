"""Numbers of virtio that every device type shares, and of its PCI transport."""

VENDOR_ID = 0x1AF4  # [VIRTIO1.4 4.1.2]
DEVICE_ID_BASE = 0x1040  # + device type

# Device status bit numbers [VIRTIO1.4 2.1]
S_ACKNOWLEDGE = 0
S_DRIVER = 1
S_DRIVER_OK = 2
S_FEATURES_OK = 3
S_SUSPEND = 4
S_NEEDS_RESET = 6
S_FAILED = 7

# Feature bits [VIRTIO1.4 6]
F_INDIRECT_DESC = 28
F_EVENT_IDX = 29
F_VERSION_1 = 32
F_ACCESS_PLATFORM = 33
F_RING_PACKED = 34
F_IN_ORDER = 35
F_ORDER_PLATFORM = 36
F_SR_IOV = 37
F_NOTIFICATION_DATA = 38
F_NOTIF_CONFIG_DATA = 39
F_RING_RESET = 40
F_SUSPEND = 43
DEVICE_TYPE_FEATURES = (1 << 24) - 1 | 0b11 << 41 | ((1 << 128) - (1 << 50))  # [VIRTIO1.4 2.2]

# cfg_type of the vendor-specific capabilities [VIRTIO1.4 4.1.4]
CFG_COMMON = 1
CFG_NOTIFY = 2
CFG_ISR = 3
CFG_DEVICE = 4
CFG_PCI = 5

# Common configuration, offsets of its 8-byte words [VIRTIO1.4 4.1.4.3]
COMMON_BYTES = 0x40
WORD_DEVICE_FEATURE = 0x00  # device_feature_select u32, device_feature u32
WORD_DRIVER_FEATURE = 0x08  # driver_feature_select u32, driver_feature u32
WORD_DEVICE = 0x10  # config_msix_vector u16, num_queues u16, device_status u8, config_generation u8, queue_select u16
WORD_QUEUE = 0x18  # queue_size u16, queue_msix_vector u16, queue_enable u16, queue_notify_off u16
WORD_DESC = 0x20  # queue_desc u64
WORD_DRIVER = 0x28  # queue_driver u64
WORD_DEVICE_AREA = 0x30  # queue_device u64
WORD_NOTIFY = 0x38  # queue_notif_config_data u16, queue_reset u16, admin_queue_index u16, admin_queue_num u16

NO_VECTOR = 0xFFFF  # [VIRTIO1.4 4.1.5.1.2]
ISR_QUEUE = 0  # bit numbers [VIRTIO1.4 4.1.4.5]
ISR_CONFIG = 1
