"""What a card with host ATS can be."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from ringwall.rtl.config import BlkConfig, EndpointConfig, HostAtsConfig, IommuConfig
from ringwall.rtl.core import Core
from ringwall.rtl.endpoint import descriptions_of
from ringwall.rtl.function.description import AtsCapability, Bar, FunctionDescription, PasidCapability, PcieCapability, PriCapability
from ringwall.rtl.verilog import UltraScaleCard
from ringwall.sim.linux.judge import config_of


def core(pcie, *extended):
    """Return the core of a card of one function with PASIDs of 8 bits."""
    function = FunctionDescription(0x1209, 2, 0x120000, bars=(Bar(0, 4096),), capabilities=(pcie,), extended=extended)
    return Core(width=64, functions=(function,), clients=(), registers=(), iommu=None, host_ats=HostAtsConfig(pasid_bits=8), strict=False,
                tags=32, wall_tags=8, completion_timeout_cycles=3000)  # fmt: skip


def test_parameters():
    """ATS-CONFIG-1: a card has an IOMMU, or a cache for its host's, never both; it is not behind the hard block; sizes out of range are
    refused with a sentence; page requests are a capability of so many, PASIDs one of so many bits of physical functions; the header of a
    log brings it back."""
    for make, message in (
        (lambda: EndpointConfig(host_ats=HostAtsConfig()), "must have none of its own, not IommuConfig"),
        (lambda: EndpointConfig(iommu=IommuConfig(), host_ats=HostAtsConfig()), "must have none of its own, not IommuConfig"),
        (lambda: EndpointConfig(iommu=None, host_ats=HostAtsConfig(), strict=True), "strict card must have an IOMMU, not None"),
        (lambda: UltraScaleCard(EndpointConfig(iommu=None, host_ats=HostAtsConfig())), "no cache for the host's IOMMU, not HostAtsConfig"),
        (lambda: HostAtsConfig(entries=8), "between 16 and 256, not 8"), (lambda: HostAtsConfig(entries=512), "256, not 512"),
        (lambda: HostAtsConfig(ways=3), "1, 2, 4 or 8, not 3"),
        (lambda: HostAtsConfig(requests=17), "between 1 and 16, not 17"),
        (lambda: HostAtsConfig(requests=4, page_requests=4), "fewer than translation requests, not 4"),
        (lambda: HostAtsConfig(pasid_bits=21), "between 0 and 20 bits, not 21"),
        (lambda: core(PcieCapability(has_prefixes=True), AtsCapability(), PasidCapability(7)), "must have a capability of 8 bits"),
        (lambda: core(PcieCapability(has_prefixes=True), AtsCapability()), "must have a capability of 8 bits"),
        (lambda: core(PcieCapability(), AtsCapability(), PasidCapability(8)), "and take prefixes"),
        (lambda: HostAtsConfig(page_patience_cycles=1), "between 2 and 2 \\*\\* 32 - 1 cycles, not 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    config = EndpointConfig(iommu=None, host_ats=HostAtsConfig(entries=32))
    assert config.first_disk == 0
    assert not any(one.name == "pri" for one in config.extended)
    paging = EndpointConfig(iommu=None, host_ats=HostAtsConfig(page_requests=3))
    assert [one.capacity for one in paging.extended if one.name == "pri"] == [3]
    several = EndpointConfig(iommu=None, host_ats=HostAtsConfig(page_requests=3, pasid_bits=9), disks=(BlkConfig(virtual_functions=1),))
    physical, virtual = descriptions_of(several)
    assert (physical.capability(PasidCapability), virtual.capability(PasidCapability)) == (PasidCapability(9), None)
    assert (physical.capability(PriCapability).needs_pasid, physical.capability(AtsCapability).has_global_invalidate) == (True, True)
    assert all(one.capability(PcieCapability).has_prefixes for one in (physical, virtual))
    assert config_of(SimpleNamespace(parameters={"config": repr(asdict(config))})) == config
