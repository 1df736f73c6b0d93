"""Two cards whose network functions are wired to each other, each with an unmodified Linux of its own."""

import pytest

from ringwall.sim.linux import wired

from .test_devices import TAKEN

pytestmark = pytest.mark.guest


def test_two_cards(tmp_path):
    """LINUX-DEV-5: pings of 0 to 8,000 bytes from card to card, half a megabyte by TCP each way, checksums by the cards; none is bad."""
    here, there = wired.run(tmp_path)
    for run in (here, there):
        assert run.is_good, "\n".join([run.problem, *run.facts.get("failed", []), *run.lines[-30:]])
        assert run.fact("segments").endswith(" bad=0")
        found = run.fact("net").rpartition("features=")[2]
        assert {found[bit] for bit in (0, 1, 15, 17, 23, *TAKEN)} == {"1"}  # CSUM, GUEST_CSUM, MRG_RXBUF, CTRL_VQ, CTRL_MAC_ADDR
    assert [run.fact("net").split()[1] for run in (here, there)] == ["mac=02:00:00:00:0a:01", "mac=02:00:00:00:0a:02"]
    assert here.fact("pinged") == "28"
    assert here.fact("sent") == there.fact("received") != there.fact("sent") == here.fact("received")
    assert here.fact("sent").startswith("bytes=524288 ") and there.fact("sent").startswith("bytes=524288 ")
