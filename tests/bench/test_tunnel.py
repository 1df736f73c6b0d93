"""Payload per byte on the line of a tunnel, for disk requests of 4 KiB."""

from ringwall.models.virtio.blk import BlkStatus
from ringwall.sim.tunnel import TunnelBench, board_config
from ringwall.sim.tunnel_light import frame_limit

COUNT, SIZE = 16, 4096


def test_tunnel(capsys):
    """BENCH-TUN-1: 4 KiB requests, all at once: payload per byte on the line each way, beside the limit of frames without escapes."""
    bench = TunnelBench(board_config(), seed=1, judged=False)
    bench.now(bench.enable_iommu(levels=2))
    disk, card = bench.now(bench.disk(0, buffer_pages=100, framing="pages")), bench.compiled
    for name, way, header, make in (("write", 0, 3, lambda n: disk.blk.write(8 * n, bench.rng.randbytes(SIZE))),
                                    ("read", 1, 4, lambda n: disk.blk.read(8 * n, SIZE))):  # fmt: skip
        before, begun = list(card.carried), card.cycle
        requests = [make(n) for n in range(COUNT)]
        bench.done(disk, requests)
        assert all(request.status == BlkStatus.OK for request in requests)
        on_line, cycles, limit = card.carried[way] - before[way], card.cycle - begun, frame_limit(header)
        share = COUNT * SIZE / on_line
        assert share <= limit
        with capsys.disabled():
            print(f"\n  {name}: {share:.3f} of the line is payload, limit {limit:.3f}; {COUNT * SIZE / cycles:.3f} bytes per byte time")
    card.close()
