"""RingEngine, compiled, on thousands of random hostile rings of every kind."""

import os
import zlib

from ringwall.sim.hostile_rings import HostileRings

RINGS = 10_000


def test_hostile(request):
    """VIRTIO-HOSTILE-1: 10,000 hostile rings touch nothing else, end in bounded reads; the next good ring works (V032, V067)."""
    seed = int(os.environ.get("SEED") or zlib.crc32(request.node.nodeid.encode()))
    campaign = HostileRings(seed)
    campaign.play(0, RINGS)
    assert all(campaign.ends[kind, end] > RINGS // 200 for kind in ("split", "packed") for end in ("refused", "served", "idle"))
