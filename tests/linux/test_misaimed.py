"""Linux on a card whose RTL aims some of its DMA beside what it may reach: planted, in a build of its own."""

import pytest

from ringwall.sim.scoreboard import Difference

from .misaimed import CONFIG, EXPECTED, PERIOD, DataRequests, Misaimed, check
from .test_uml import Guests

pytestmark = pytest.mark.guest


def test_misaimed(tmp_path):
    """LINUX-UML-8: every 80th data request of the RTL goes beside what is mapped: refused, counted; Linux lives, and sees what it lost.

    A refused read fails its request in the guest; a dropped write leaves the guest's page as it was. [PCIe5 2.3.1]
    """
    one = Guests(tmp_path, config=CONFIG, card=Misaimed)
    try:
        requests, count = DataRequests(one.session.card), 8
        run = one.boot("wrongdma", f"job_count={count}", expect=(EXPECTED,))
        check(run, requests, one.session.card.counts, count)
    finally:
        one.close()


def test_misaimed_is_seen(tmp_path):
    """LINUX-UML-9: the golden model stops the same run at the first of them."""
    one = Guests(tmp_path, config=CONFIG, card=Misaimed, judged=True)
    requests = DataRequests(one.session.card)
    with pytest.raises(Difference, match="stray write"):
        one.boot("wrongdma")
    assert max(requests.count.values()) == PERIOD
    with pytest.raises(Difference, match="stray write"):  # nothing moves any more
        one.close()
