"""The registers of a virtio function as a driver must find them."""

import pytest

from ringwall.models.virtio.driver import FIELDS, Feature
from ringwall.models.virtio.transport import MOST_SINCE, PciTransport

ISR, NOTIFY = 0x100, 0x200


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
            at, size = FIELDS[name]
            self.transport.write(at, value.to_bytes(size, "little"))

    def find(self, name, value):
        """Return why ``value`` cannot be found there."""
        at, size = FIELDS[name]
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
