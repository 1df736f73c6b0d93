"""Linux on a card whose RTL aims some of its DMA beside what it may reach: planted, in a build of its own."""

import re

import pytest

from ringwall.models.events import TlpReceived
from ringwall.models.tlp import TlpType
from ringwall.rtl.config import EndpointConfig
from ringwall.sim.card import bench_config
from ringwall.sim.scoreboard import Difference

from .misaimed import FAR, PERIOD, Misaimed, is_data
from .test_uml import Guests

pytestmark = pytest.mark.guest
CONFIG = EndpointConfig(width=64, iommu=None, disks=bench_config(64).disks[:1])


class Astray:
    """Counts the requests for data that leave a card, and those that lead far away."""

    def __init__(self, card):
        self.all = {TlpType.MRD: 0, TlpType.MWR: 0}
        self.far = dict(self.all)
        self._observe = card.observe
        card.observe = self.observe

    def observe(self, event, tlp):
        if isinstance(event, TlpReceived) and tlp.type in self.all and is_data(tlp):
            self.all[tlp.type] += 1
            self.far[tlp.type] += bool(tlp.address & FAR)
        if self._observe is not None:
            self._observe(event, tlp)


def test_misaimed(tmp_path):
    """LINUX-UML-8: every 80th data request of the RTL goes beside what is mapped: refused, counted; Linux lives, and sees what it lost.

    A refused read fails its request in the guest; a dropped write leaves the guest's page as it was. [PCIe5 2.3.1]
    """
    one = Guests(tmp_path, config=CONFIG, card=Misaimed)
    try:
        astray, count, counts = Astray(one.session.card), 8, one.session.card.counts
        run = one.boot("wrongdma", f"job_count={count}", expect=(r"I/O error, dev vda, sector \d+ op 0x1:\(WRITE\)",))
        assert {kind: number // PERIOD for kind, number in astray.all.items()} == astray.far
        assert counts.refused_reads == astray.far[TlpType.MRD] > 1
        assert counts.dropped_writes == astray.far[TlpType.MWR] > 1
        good, right = (sum(int(number) for kind in ("reads", "writes") for line in run.facts[kind]
                           for number in re.findall(rf"{word}=(\d+)", line)) for word in ("good", "right"))  # fmt: skip
        failed = sum("I/O error" in line for line in run.lines)
        assert 0 < failed <= counts.refused_reads
        assert good == 4 * count - failed
        assert 4 * count - failed - counts.dropped_writes <= right < 4 * count - failed
    finally:
        one.close()


def test_misaimed_is_seen(tmp_path):
    """LINUX-UML-9: the golden model stops the same run at the first of them."""
    one = Guests(tmp_path, config=CONFIG, card=Misaimed, judged=True)
    astray = Astray(one.session.card)
    with pytest.raises(Difference, match="stray write"):
        one.boot("wrongdma")
    assert sum(astray.far.values()) == 1
    with pytest.raises(Difference, match="stray write"):  # nothing moves any more
        one.close()
