"""The registers of a virtio function as a driver must find them."""

import pytest

from ringwall.models.virtio.driver import FIELDS, OPTIONAL_FIELDS, Feature
from ringwall.models.virtio.transport import MOST_SINCE, PciTransport

ISR, NOTIFY, CONFIG = 0x100, 0x200, 0x300


class Driver:
    """Accesses registers by name; tells when the model holds the device for live or for reset."""

    def __init__(self):
        self.happened, self.kicks = [], []
        self.transport = PciTransport(
            offered=1 << Feature.VERSION_1, queues=(64,), vectors=2, config=b"", places={1: (0, 0x38), 3: (ISR, 1), 2: (NOTIFY, 4)},
            on_live=lambda: self.happened.append("live"), on_reset=lambda: self.happened.append("reset"),
            on_kick=self.kicks.append)  # fmt: skip

    def write(self, **values):
        for name, value in values.items():
            at, size = (FIELDS | OPTIONAL_FIELDS)[name]
            self.transport.write(at, value.to_bytes(size, "little"))

    def find(self, name, value):
        """Return why ``value`` cannot be found there."""
        at, size = (FIELDS | OPTIONAL_FIELDS)[name]
        return self.transport.problem(at, value.to_bytes(size, "little"))

    def bring_up(self):
        """Everything but DRIVER_OK."""
        self.write(device_status=3, driver_feature_select=1, driver_feature=1)
        self.write(device_status=0xB)


@pytest.fixture
def driver():
    return Driver()


def test_in_order(driver):
    """MODEL-TRANSPORT-1: a driver that reads 0 after its reset, and then brings the device up, is live with DRIVER_OK and not before."""
    driver.write(device_status=0)
    assert not driver.find("device_status", 0)
    driver.bring_up()
    assert not driver.find("device_status", 0xB)
    driver.write(queue_select=0, queue_size=16, queue_desc=0x1000, queue_enable=1)
    assert not driver.find("queue_notify_off", 0)
    driver.transport.write(NOTIFY, b"\0\0")
    assert (driver.happened, driver.kicks) == (["reset"], [])
    driver.write(device_status=0xF)
    driver.transport.write(NOTIFY, b"\0\0")
    assert (driver.happened, driver.kicks) == (["reset", "live"], [0])
    assert (driver.transport.queues[0].size, driver.transport.queues[0].desc) == (16, 0x1000)
    assert "device_status is 0xf" in driver.find("device_status", 0xB)


def test_impatient(driver):
    """MODEL-TRANSPORT-2: firmware that reads another register instead of 0 from the status is followed from the first status that shows it.

    V069 binds the driver; SeaBIOS 1.16 reads the ISR. [VIRTIO1.4 4.1.4.3.2]
    """
    driver.write(device_status=0)
    assert not driver.transport.problem(ISR, b"\0")
    driver.bring_up()
    assert driver.happened == []
    assert not driver.find("device_status", 0xB)
    assert driver.happened == ["reset"]
    driver.write(queue_select=0, queue_enable=1, device_status=0xF)
    assert driver.happened == ["reset", "live"]
    assert driver.find("device_status", 0xB)


def test_before_the_last_status(driver):
    """MODEL-TRANSPORT-3: what was written in front of the status that showed is uncertain: a reset may have come behind it."""
    driver.write(device_status=0)
    driver.write(queue_size=16)
    driver.bring_up()
    driver.write(queue_msix_vector=1)
    assert not driver.find("device_status", 0xB)
    assert "queue_msix_vector is 0x1" in driver.find("queue_msix_vector", 0)
    assert not driver.find("queue_size", 64)
    assert "queue_size is 0x40" in driver.find("queue_size", 16)  # once read, it is known


def test_reset_goes_on(driver):
    """MODEL-TRANSPORT-4: a status that may be the one before the reset shows nothing; one that nobody wrote shows nothing."""
    driver.write(device_status=0)
    assert not driver.find("device_status", 0)
    driver.bring_up()
    driver.write(queue_enable=1, device_status=0xF)
    driver.happened.clear()
    driver.write(device_status=0)
    driver.bring_up()
    driver.write(device_status=0xF)
    assert not driver.find("device_status", 0xF)
    assert driver.happened == []
    assert not driver.find("device_status", 0)
    assert driver.happened == ["reset"]


def test_endless(driver):
    """MODEL-TRANSPORT-5: a driver that writes for ever behind a reset is not followed, nor remembered; a reset that it waits for helps."""
    driver.write(device_status=0)
    for _ in range(MOST_SINCE + 10):
        driver.write(queue_desc=1)
    driver.bring_up()
    assert not driver.find("device_status", 0xB)
    assert driver.happened == []
    assert len(driver.transport._since) == MOST_SINCE
    driver.write(device_status=0)
    assert not driver.find("device_status", 0)
    driver.bring_up()
    driver.write(queue_enable=1, device_status=0xF)
    assert driver.happened == ["reset", "live"]


class Everything(Driver):
    """A device with two queues that offers whatever the transport knows, and its driver."""

    OFFERED = sum(1 << bit for bit in (
        Feature.VERSION_1, Feature.RING_PACKED, Feature.NOTIFICATION_DATA, Feature.NOTIF_CONFIG_DATA, Feature.RING_RESET, Feature.SUSPEND,
        70))  # fmt: skip

    def __init__(self):
        super().__init__()
        self.resets = []
        self.transport = PciTransport(
            offered=self.OFFERED, queues=(64, 64), vectors=2, config=bytes(range(8)),
            places={1: (0, 0x40), 3: (ISR, 1), 2: (NOTIFY, 8), 4: (CONFIG, 8)}, on_live=lambda: self.happened.append("live"),
            on_kick=self.kicks.append, on_queue_reset=self.resets.append)  # fmt: skip

    def run(self, features):
        """All the way to DRIVER_OK, queue 1 enabled."""
        self.write(device_status=0)
        assert not self.find("device_status", 0)
        self.write(device_status=3)
        for window in range(3):
            self.write(driver_feature_select=window, driver_feature=features >> 32 * window & 0xFFFF_FFFF)
            assert not self.find("driver_feature", features >> 32 * window & 0xFFFF_FFFF)
        self.write(device_status=0xB)
        assert not self.find("device_status", 0xB)
        self.write(queue_select=1)
        assert not self.find("queue_notify_off", 1)
        assert not self.find("queue_notif_config_data", 0x77)
        self.write(queue_size=5, queue_msix_vector=1, queue_desc=0x1000, queue_enable=1, device_status=0xF)
        assert not self.find("device_status", 0xF)



def test_doorbells():
    """MODEL-TRANSPORT-6: a doorbell has the width and the number that were agreed on; the number stays (V079, V119)."""
    for is_wide in (False, True):
        for by_data in (False, True):
            driver = Everything()
            driver.run(1 << Feature.VERSION_1 | is_wide << Feature.NOTIFICATION_DATA | by_data << Feature.NOTIF_CONFIG_DATA | 1 << 70)
            for width in (1, 2, 4, 8):
                for at in (0, 4):
                    for number in (0, 1, 0x77):
                        driver.kicks.clear()
                        driver.transport.write(NOTIFY + at, (number | (0xABCD << 16 if width > 2 else 0)).to_bytes(width, "little"))
                        good = width == (4 if is_wide else 2) and at == 4 and number == (0x77 if by_data else 1)
                        assert driver.kicks == [1] * good
            assert bool(driver.find("queue_notif_config_data", 0x78)) == by_data
            assert driver.find("queue_notify_off", 0)


def test_packed_sizes():
    """MODEL-TRANSPORT-7: with RING_PACKED a queue has any size up to the largest, without a power of two (V088)."""
    for packed in (0, 1):
        driver = Everything()
        driver.run(1 << Feature.VERSION_1 | packed << Feature.RING_PACKED)
        assert (driver.transport.queues[1].size == 5) == packed
        assert bool(driver.find("queue_size", 6)) == packed


def test_queue_reset():
    """MODEL-TRANSPORT-8: queue_reset reads 1 until it reads 0, then the queue is disabled and may be enabled with other settings; its
    doorbells are nothing from the write on (V014 to V016, V082 to V086)."""
    driver = Everything()
    driver.run(driver.OFFERED)
    doorbell = (0x77).to_bytes(4, "little")
    assert not driver.find("queue_reset", 0)
    assert driver.find("queue_reset", 1)
    driver.write(queue_reset=1)
    driver.transport.write(NOTIFY + 4, doorbell)
    for _ in range(2):
        assert not driver.find("queue_reset", 1)
        assert not driver.find("queue_enable", 1)
    assert driver.find("queue_reset", 2)
    assert not driver.find("queue_reset", 0)
    assert (driver.resets, driver.kicks) == ([1], [])
    assert driver.find("queue_enable", 1)
    assert driver.find("queue_reset", 1)
    assert not driver.find("queue_msix_vector", 0xFFFF)
    driver.write(queue_size=7, queue_msix_vector=0, queue_desc=0x2000, queue_enable=1)
    assert driver.find("queue_size", 5)
    assert not driver.find("queue_enable", 1)
    driver.transport.write(NOTIFY + 4, doorbell)
    assert driver.kicks == [1]
    other = Everything()
    other.run(1 << Feature.VERSION_1)
    other.write(queue_reset=1)  # not negotiated
    assert other.find("queue_enable", 0)


def test_suspend():
    """MODEL-TRANSPORT-9: SUSPEND shows in place of DRIVER_OK, not without it, and back; meanwhile nothing is live (V017 to V022)."""
    driver = Everything()
    driver.run(driver.OFFERED)
    assert driver.find("device_status", 0x1B)
    driver.write(device_status=0x1F)
    assert not driver.find("device_status", 0xF)
    assert driver.find("device_status", 0x1F)
    assert driver.find("device_status", 0xB)
    assert not driver.find("device_status", 0x1B)
    assert driver.find("device_status", 0xF)
    assert not driver.transport.is_live
    driver.write(queue_msix_vector=0)  # should be ignored
    assert not driver.find("queue_msix_vector", 1)
    driver.write(device_status=0x1F)
    assert not driver.find("device_status", 0x1B)
    assert not driver.find("device_status", 0xF)
    assert driver.find("device_status", 0x1B)
    assert driver.transport.is_live and driver.happened == ["live"]
    other = Everything()
    other.run(1 << Feature.VERSION_1)
    other.write(device_status=0x1F)  # not negotiated
    assert other.find("device_status", 0x1B)


def test_configuration():
    """MODEL-TRANSPORT-10: the configuration stays but where the driver wrote, until the device changes it; then its generation is another
    (V012, V013)."""
    driver = Everything()
    find = driver.transport.problem
    assert not find(CONFIG, bytes(range(8)))
    assert find(CONFIG, bytes(8))
    assert not driver.find("config_generation", 9)
    assert driver.find("config_generation", 10)
    driver.transport.write(CONFIG + 2, b"\xaa")
    assert find(CONFIG + 1, b"\0\xaa")
    assert not find(CONFIG + 2, b"\xaa")
    assert find(CONFIG + 2, b"\2")
    driver.transport.change(bytes(8))
    assert not find(CONFIG, bytes(8))
    assert driver.find("config_generation", 9)
    assert not driver.find("config_generation", 10)
    assert driver.find("config_generation", 9)
