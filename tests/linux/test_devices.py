"""An unmodified Linux drives a card of every kind of device, with all that its rings offer: disk, console, random numbers, network."""

from collections import Counter

import pytest

from ringwall.models.events import TlpSent
from ringwall.models.tlp import TlpType, decode
from ringwall.models.virtio.blk import HEADER_BYTES, BlkType
from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.virtio.console import ConsoleDevice
from ringwall.rtl.virtio.net import NetDevice
from ringwall.rtl.virtio.rng import RngDevice
from ringwall.sim.looped import LoopedCard

from .test_uml import Guests

pytestmark = pytest.mark.guest
# What Linux takes of what is offered: indirect descriptors, event index, VERSION_1, ACCESS_PLATFORM, packed rings, ORDER_PLATFORM.
TAKEN = (28, 29, 32, 33, 34, 36)
CONFIG = EndpointConfig(width=64, disks=(BlkConfig(max_discard_sectors=2048, max_zero_sectors=64),), completion_timeout_cycles=10_000,
                        devices=(ConsoleDevice(), RngDevice(), NetDevice(), NetDevice(mac=b"\x02\0\0\0\0\2")))  # fmt: skip


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    made = Guests(tmp_path_factory.mktemp("devices"), config=CONFIG, card=LoopedCard)
    yield made
    made.close()


def test_console(guests):
    """LINUX-DEV-1: what is written to /dev/hvc0 comes back from the card, byte for byte, in pieces of 1 byte to 64 KiB."""
    run = guests.boot("console")
    assert [int(size) for size in run.facts["echoed"]] == [1, 2, 3, 63, 64, 65, 1000, 4095, 4096, 65536]


def test_network(guests):
    """LINUX-DEV-3: two network functions, wired to each other: pings of 0 to 8,000 bytes, half a megabyte by TCP each way, nothing lost."""
    run = guests.boot("net")
    assert run.fact("pinged") == "28"
    assert run.fact("tcp").startswith("bytes=1048576 ")
    for line in run.facts["net"]:  # CSUM, GUEST_CSUM, MRG_RXBUF
        assert {line.rpartition("features=")[2][bit] for bit in (0, 1, 15, *TAKEN)} == {"1"}


def test_disk(guests):
    """LINUX-DEV-4: a file system on a disk whose ring is packed, with indirect descriptors and event index: all files are read back."""
    run = guests.boot("tour")
    assert run.fact("verified") == "200"
    assert {run.fact("disk").rpartition("features=")[2][bit] for bit in TAKEN} == {"1"}
    assert guests.session.card.counts.refused_reads == guests.session.card.counts.dropped_writes == 0


def test_discard(guests):
    """LINUX-DEV-6: blkdiscard and what mke2fs zeroes come to the disk as DISCARD and WRITE_ZEROES; what lies beside is as before."""
    card, kinds = guests.session.card, Counter()

    def observe(event, tlp):
        if isinstance(event, TlpSent) and (sent := decode(event.dwords)).type is TlpType.CPLD and len(sent.data) == HEADER_BYTES:
            kinds[int.from_bytes(sent.data[:4], "little")] += not any(sent.data[8:])  # the sector of these is 0

    card.observe = observe
    try:
        run = guests.boot("discard")
    finally:
        card.observe = None
    assert run.fact("discarded") == "1 256"
    first, last = (int(block) for block in run.fact("tables").split()[:2])
    assert kinds[BlkType.DISCARD] == 1
    assert kinds[BlkType.WRITE_ZEROES] >= (last - first + 1) * 2 // 64
    assert card.counts.refused_reads == card.counts.dropped_writes == 0


def test_random(guests):
    """LINUX-DEV-2: /dev/hwrng is the card's: 16,000 bytes, no two parts the same, and they cannot be compressed."""
    run = guests.boot("hwrng")
    assert int(run.fact("random").split()[0]) > 8000
