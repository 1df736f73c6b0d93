"""Two readings of the specification: the tables that make the RTL's configuration space, and the golden model's, field for field."""

import pytest

from ringwall.models import config_space as model
from ringwall.models.capabilities import EXT_ARI, EXT_DSN, EXT_PASID, EXT_PRI
from ringwall.rtl.config import BlkConfig, EndpointConfig, HostAtsConfig
from ringwall.rtl.endpoint import descriptions_of
from ringwall.rtl.function import description as rtl
from ringwall.sim.linux.judge import describe_functions

LINK = {"link_capabilities": 3 | 8 << 4 | 1 << 22, "link_status": 3 | 8 << 4, "link_capabilities_2": 0b1110, "link_control_2": 3,
        "link_control_2_rw": 0xF, "timeout_ranges": 1}  # fmt: skip  # 8 GT/s x8, of function 0; timeouts of range A
NO_TIMEOUT_DISABLE = {"device_capabilities_2": 0, "device_control_2_rw": 0}
CORRECTABLE, SEVERITY = 0x71C1, 0x0046_2010  # the card's choice: with internal errors; of the errors that it reports alone
# Where the specification leaves a choice: (block of the RTL's table, offset in it) -> bits.
OPEN = {
    ("pri", 4): 1 << 24,  # Stopped: the RTL shows a port

}


def capabilities():
    """Yield (name, standard capabilities, extended ones) of the RTL, then those of the model."""
    for keeps, pme in ((True, 0), (False, 0), (True, 0b01001), (True, 0b11001)):
        yield f"PM {keeps} {pme}", (rtl.PowerCapability(keeps, pme),), (), (model.power_capability(no_soft_reset=keeps, pme=pme),), ()
    for vectors in (1, 2, 4, 8, 16, 32):
        for is_64 in (False, True):
            for mask in (False, True):
                yield (f"MSI {vectors} {is_64} {mask}", (rtl.MsiCapability(vectors, is_64, mask),), (),
                       (model.msi_capability(vectors, is_64=is_64, has_masks=mask),), ())  # fmt: skip
    yield "MSI-X", (rtl.MsixCapability(4, 0, 0, 0, 0x800),), (), (
        model.msix_capability(4, table_bar=0, table_offset=0, pba_bar=0, pba_offset=0x800),), ()
    for code in range(6):
        yield (f"PCIe payload {code}", (rtl.PcieCapability(mps_code=code),), (),
               (model.pcie_capability(**LINK, mps_supported=128 << code),), ())  # fmt: skip
    for ranges in (0, 1, 2, 3, 6, 7, 14, 15):
        yield (f"PCIe timeout {ranges}", (rtl.PcieCapability(timeout_ranges=ranges, has_timeout_disable=False),), (),
               (model.pcie_capability(**LINK | NO_TIMEOUT_DISABLE | {"timeout_ranges": ranges}),), ())  # fmt: skip
    yield "PCIe", (rtl.PcieCapability(has_flr=True, has_atomics=True, has_ten_bit_tags=True),), (), (
        model.pcie_capability(**LINK, flr=True, atomic_requester=True, tag_10_completer=True, tag_10_requester=True),), ()
    yield ("PCIe prefixes", (rtl.PcieCapability(has_prefixes=True),), (),
           (model.pcie_capability(**LINK, prefixes=1),), ())  # fmt: skip
    pcie = (rtl.PcieCapability(),), (model.pcie_capability(**LINK),)
    for name, ours, theirs in (
        ("AER", (rtl.AerCapability(),), (model.aer_capability(correctable=CORRECTABLE, severity=SEVERITY),)),
        ("serial number", (rtl.SerialNumber(0x0123_4567_89AB_CDEF),), (model.serial_number_capability(0x0123_4567_89AB_CDEF),)),
        ("ATS 32", (rtl.AtsCapability(),), (model.ats_capability(),)),
        ("ATS 5", (rtl.AtsCapability(5, False, True),), (model.ats_capability(queue_depth=5, page_aligned=False, global_invalidate=True),)),
        ("PRI", (rtl.AtsCapability(), rtl.PriCapability(77, True)),
         (model.ats_capability(), model.pri_capability(77, pasid_required=True))),
        ("PASID 0", (rtl.PasidCapability(0),), (model.pasid_capability(0),)),
        ("PASID 20", (rtl.PasidCapability(20, True, True),), (model.pasid_capability(20, execute=True, privileged=True),)),
        ("ACS none", (rtl.AcsCapability(),), (model.acs_capability(),)),
        ("ACS", (rtl.AcsCapability(True, True, True),), (model.acs_capability(0b100_1100),)),
        ("ARI", (rtl.AriCapability(),), (model.ari_capability(1),)),
        ("SR-IOV", (rtl.SriovCapability(9, 0x7777, 8, 2, (rtl.Bar(0, 1 << 22), rtl.Bar(2, 1 << 23, is_64=False))),),
         (model.sriov_capability(9, first_offset=8, stride=2, device=0x7777, has_ari=True, bars={
             0: model.BarDescription(1 << 22), 2: model.BarDescription(1 << 23, is_64=False)}),)),
        ("VSEC", (rtl.VsecCapability(0x123, 12, (), 5),), (model.vsec_capability(0x123, 5, bytes(4)),)),
        ("DVSEC", (rtl.DvsecCapability(0x1234, 0x77, 12, (), 3),), (model.dvsec_capability(0x1234, 0x77, 3, bytes(2)),)),
    ):  # fmt: skip
        yield name, pcie[0], ours, pcie[1], theirs
    yield ("together", pcie[0], (rtl.AerCapability(), rtl.AtsCapability(), rtl.PasidCapability(), rtl.AcsCapability(at=0x400)), pcie[1],
           (model.aer_capability(correctable=CORRECTABLE, severity=SEVERITY), model.ats_capability(), model.pasid_capability(20),
            model.acs_capability(offset=0x400)))  # fmt: skip


def differences(ours, theirs):
    """Return a line for each dword of two configuration spaces whose values or rules are not the same."""
    found, words = [], ours.words()
    blocks = {at: block for block in ours.blocks for at in range(block.offset, block.offset + block.size_bytes)}
    for at in range(0, 4096, 4):
        one = words[at // 4]
        block = blocks.get(at)
        free = OPEN.get((block.name, at - block.offset), 0) if block is not None else 0
        kinds = [theirs.access(at + n) for n in range(4)]

        def bits(*wanted, kinds=kinds):
            return sum(1 << 8 * n + bit for n, byte in enumerate(kinds) for bit, kind in enumerate(byte) if kind in wanted)

        rows = {
            "reset": (one.reset, theirs.read_dword(at)),
            "written": (one.writable, bits(model.Access.RW, model.Access.RWS)),
            "cleared": (one.clearable, bits(model.Access.RW1C, model.Access.RW1CS)),
            "sticky": (one.kept if one.is_sticky else 0, bits(model.Access.RWS, model.Access.RW1CS, model.Access.ROS)),
        }
        found += [f"{block.name if block else 'no block'} at {at:#x}: {what} {got:#x}, must be {wanted:#x}"
                  for what, (got, wanted) in rows.items() if (got ^ wanted) & ~free]  # fmt: skip
    return found


@pytest.mark.parametrize(("ours", "extended", "theirs", "theirs_extended"),
                         [pytest.param(*rest, id=name) for name, *rest in capabilities()])  # fmt: skip
def test_readings(ours, extended, theirs, theirs_extended):
    """FUNC-READ-1 (R57, R58, R60): every capability: reset values, access and stickiness of each bit are the model's. [PCIe5 7]"""
    if not any(isinstance(one, rtl.PcieCapability) for one in ours):
        ours, theirs = (rtl.PcieCapability(), *ours), (model.pcie_capability(**LINK), *theirs)
    identity = {"class_code": 0x018000, "revision": 7}
    one = rtl.FunctionDescription(0x1234, 0x5678, bars=(rtl.Bar(0, 4096), rtl.Bar(2, 256, is_64=False), rtl.Bar(4, 1 << 20, True, True),
                                  rtl.Rom(1 << 16)), reports_errors=True, capabilities=ours, extended=extended, **identity)  # fmt: skip
    other = model.ConfigSpace(model.FunctionDescription(
        0x1234, 0x5678, is_multi_function=True, rom_bytes=1 << 16, capabilities=theirs, ext_capabilities=theirs_extended,
        bars={0: model.BarDescription(4096), 2: model.BarDescription(256, is_64=False), 4: model.BarDescription(1 << 20, prefetch=True)},
        **identity))  # fmt: skip
    assert not differences(one.map(0, 2), other)


@pytest.mark.parametrize(("ours", "extended", "theirs", "theirs_extended"),
                         [pytest.param(*rest, id=name) for name, *rest in capabilities() if name[:3] not in ("PM ", "SR-")])  # fmt: skip
def test_readings_of_virtual_functions(ours, extended, theirs, theirs_extended):
    """FUNC-VF-6 (R54, R57): what a virtual function has of each capability of its physical one, bit by bit the model's. [PCIe5 9.3]"""
    if not any(isinstance(one, rtl.PcieCapability) for one in ours):
        ours, theirs = (rtl.PcieCapability(), *ours), (model.pcie_capability(**LINK), *theirs)
    identity = {"class_code": 0x018000, "revision": 7}
    bars = (rtl.Bar(0, 4096), rtl.Bar(2, 1 << 20))
    one = rtl.FunctionDescription(0x1234, 0x5678, bars=bars[:1], reports_errors=True, subsystem_id=5, subsystem_vendor_id=6,
                                  capabilities=(*ours, *(() if len(ours) > 1 else (rtl.PowerCapability(),))),
                                  extended=(*extended, rtl.SriovCapability(1, 7, 2, bars=bars)), **identity)  # fmt: skip
    physical = model.FunctionDescription(0x1234, 0x5678, bars={0: model.BarDescription(4096)}, is_multi_function=True, subsystem=5,
                                         subsystem_vendor=6, interrupt_pin=1, rom_bytes=1 << 16, **identity)  # fmt: skip
    alone = (EXT_DSN, EXT_PRI, EXT_PASID)  # what only physical functions have [PCIe5 9.3.6]
    virtual = model.virtual_function(physical, capabilities=theirs,
                                     ext_capabilities=tuple(model.ari_capability(0) if each.id == EXT_ARI else each
                                                            for each in theirs_extended if each.id not in alone))  # fmt: skip
    assert not differences(one.virtual().map(2, 2), model.ConfigSpace(virtual, physical=model.ConfigSpace(physical)))


@pytest.mark.parametrize("totals", [(0,), (2,), (0, 2), (1, 3), (2, 0, 1)])
@pytest.mark.parametrize("options", [
    {}, {"iommu": None}, {"iommu": None, "host_ats": HostAtsConfig()}, {"iommu": None, "host_ats": HostAtsConfig(page_requests=3)}],
    ids=["own", "none", "host", "pages"])  # fmt: skip
def test_readings_of_cards(totals, options):
    """FUNC-READ-3 (R54, R57): each function of whole cards, virtual ones too, is what the judge of foreign hosts expects, bit by bit."""
    config = EndpointConfig(**options, disks=tuple(BlkConfig(virtual_functions=n) for n in totals))
    has_iommu = config.first_disk
    ours, spaces = descriptions_of(config), [model.ConfigSpace(one) for one in describe_functions(config)]
    spaces += [model.ConfigSpace(space.description.virtual, physical=space)
               for space, total in zip(spaces[has_iommu:], totals) for _ in range(total)]  # fmt: skip
    assert len(ours) == len(spaces) == has_iommu + len(totals) + sum(totals)
    for number, (one, other) in enumerate(zip(ours, spaces)):
        assert not differences(one.map(number, config.physical_functions), other), number


def test_a_difference_is_seen():
    """FUNC-READ-2: each kind of difference has its line."""
    one = rtl.FunctionDescription(0x1234, 0x5678, 0x018000, reports_errors=True, bars=(rtl.Bar(0, 4096),)).map(0, 1)
    theirs = {"vendor": 0x1234, "class_code": 0x018000, "revision": 1}

    def found(device, size, **link):
        other = model.FunctionDescription(device=device, bars={0: model.BarDescription(size)}, capabilities=(
            model.pcie_capability(**LINK | link),), **theirs)  # fmt: skip
        return [" ".join(line.split()[:4]).rstrip(",") for line in differences(one, model.ConfigSpace(other))]

    assert found(0x5678, 4096) == []
    assert found(0x5679, 4096) == ["header at 0x0: reset"]
    assert found(0x5678, 8192) == ["header at 0x10: written"]
    assert found(0x5678, 4096, link_control_2_rw=7) == ["pcie at 0x70: written", "pcie at 0x70: sticky"]
