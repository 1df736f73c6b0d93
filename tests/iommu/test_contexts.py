"""Device-context cache: it finds exactly what was filled last at a place and not forgotten."""

import random

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.rtl.iommu.contexts import Context, ContextCache
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, start, unpack


@pytest.mark.parametrize("entries", [2, 8])
def test_contexts(request, entries):
    run(ContextCache(entries=entries, ports=2), module=__name__, node=request.node.nodeid, params={"entries": entries})


@pytest.mark.parametrize("bad", [0, 1, 6, 8.0])
def test_parameters_are_checked(bad):
    """IOMMU-CTX-1: sizes that make no sense are refused with a sentence."""
    with pytest.raises(ValueError, match=r"must be .*, not"):
        ContextCache(entries=bad)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def contexts_are_found_exactly(dut):
    """IOMMU-CTX-2: random fills, forgets and lookups in every cycle: tag, content and cycle are exact, a fill in a forget is lost (R27)."""
    await start(dut, "fill")
    rng, entries, kept = random.Random(cocotb.RANDOM_SEED), params()["entries"], {}
    devices = [rng.getrandbits(24) for _ in range(3)]
    devices += [device ^ 1 << rng.randrange(24) for device in devices] + [devices[0] ^ entries]
    hits = 0
    for _ in range(3000):
        asked = [rng.choice(devices) for _ in range(2)]
        for port, device in enumerate(asked):
            getattr(dut, f"device_id__{port}").value = device
        fill = {"device_id": rng.choice(devices), "fsc_mode": rng.getrandbits(4), "root_ppn": rng.getrandbits(44),
                "PSCID": rng.getrandbits(20), "DTF": rng.getrandbits(1), "PDTV": rng.getrandbits(1)}  # fmt: skip
        is_filled, is_forgotten = rng.random() < 0.4, rng.random() < 0.05
        dut.fill__payload.value, dut.fill__valid.value, dut.forget.value = pack(Context, **fill), is_filled, is_forgotten
        await RisingEdge(dut.clk)
        for port, device in enumerate(asked):
            expected = kept.get(device % entries)
            found = int(getattr(dut, f"found__{port}").value)
            assert found == (expected is not None and expected["device_id"] == device)
            if found:
                hits += 1
                assert vars(unpack(Context, int(getattr(dut, f"context__{port}").value))) == expected
        if is_filled:
            kept[fill["device_id"] % entries] = fill
        if is_forgotten:
            kept.clear()
    assert hits > 300
