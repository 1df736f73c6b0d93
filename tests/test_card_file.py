"""Files of cards: what they may say, and what is said of those that do not do."""

import re
from unittest import mock

import pytest

from ringwall.rtl import core
from ringwall.rtl.card_file import BadCard, CardFile, example, read, written
from ringwall.rtl.config import BlkConfig, EndpointConfig, HostAtsConfig, IommuConfig, VirtioIommuConfig
from ringwall.rtl.verilog import to_rtlil
from ringwall.rtl.viommu.device import Region
from ringwall.rtl.virtio.console import ConsoleDevice
from ringwall.rtl.virtio.net import NetDevice
from ringwall.rtl.virtio.rng import RngDevice

CONFIGS = [
    EndpointConfig(disks=(BlkConfig(capacity_sectors=2, serial=b"\0\xff", topology=(1, 2, 3, 4)), BlkConfig(virtual_functions=3))),
    EndpointConfig(iommu=None, disks=(), host_ats=HostAtsConfig(pasid_bits=8), devices=(NetDevice(mac=b"\x02abcde"), RngDevice())),
    EndpointConfig(iommu=VirtioIommuConfig(regions=(), domain_range=(1, 9)), devices=(ConsoleDevice(80, 25, True),), strict=True),
    EndpointConfig(iommu=VirtioIommuConfig(regions=(Region(0x1000, 0x2FFF),)), read_buffer_bytes=4096, serial_number=1 << 63),
    EndpointConfig(iommu=IommuConfig(Sv48=True, HPM=True, counters=31, entries=16), tags=768, completion_timeout_cycles=1),
]


def test_example():
    """GEN-FILE-1: the example is the default card, and so is an empty file; each part of it that is behind # is right as well."""
    text = example()
    assert read(text) == CardFile() == read("")
    parts = [re.sub("^# ", "", part, flags=re.MULTILINE) for part in text.split("\n\n")[1:] if part.startswith("# [")]
    links = [re.search('with (link = ".*")', part) for part in parts]
    found = [read((f"{link[1]}\n" if link else "") + ("" if "[iommu]" in part else "iommu = 'none'\n") + part)
             for part, link in zip(parts, links)]  # fmt: skip
    assert [one.config for one in found] == [
        *(EndpointConfig(iommu=None, devices=(device,)) for device in (ConsoleDevice(), NetDevice(), RngDevice())),
        EndpointConfig(iommu=VirtioIommuConfig()), EndpointConfig(iommu=None, host_ats=HostAtsConfig()),
        EndpointConfig(iommu=None), EndpointConfig(iommu=None),
    ]  # fmt: skip
    assert [one.link for one in found[-2:]] == ["tunnel", "ultrascale"]
    assert found[-2].options == {"room": 1024, "depth": 1024, "window": 31, "patience_cycles": 5_000_000, "silence_cycles": 1_000_000_000}
    assert found[-1].options == {"max_payload": 512, "straddle": (), "pcie_capability": 0x70, "order_cycles": 250_000}


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config):
    """GEN-FILE-2: what is written of a configuration is read as the same."""
    assert read(f'name = "x1"\n{written(config)}') == CardFile(name="x1", config=config)


BAD = {
    "width": "The file must be TOML: ",
    "width = 96": "width: Width of the data path must be 64, 128, 256 or 512 bits, not 96.",
    "widht = 64": "widht must be a parameter of EndpointConfig, which has width, iommu, host_ats, ",
    'width = "64"': "width must be a whole number, not '64'.",
    "width = 64.0": "width must be a whole number, not 64.0.",
    "strict = 1": "strict must be true or false, not 1.",
    "tags = true": "tags must be a whole number, not True.",
    'name = "8bit"': "name must be a name of letters, digits and _ that no digit begins, not '8bit'.",
    "name = 8": "name must be a name of letters, digits and _ that no digit begins, not 8.",
    'link = "cxl"': "link must be one of raw, series7, tunnel, ultrascale",
    "link = []": "link must be one of raw, series7, tunnel, ultrascale",
    "iommu = 3": "iommu must be a table, not 3.",
    "[iommu]\nentries = 16": "iommu.kind must be one of riscv, virtio, not None.",
    "[iommu]\nkind = []": "iommu.kind must be one of riscv, virtio, not [].",
    '[iommu]\nkind = "riscv"\nsuperpage_entries = 1': "iommu.superpage_entries: IOTLB entries for larger pages must be between 2 and 32",
    '[iommu]\nkind = "riscv"\nentries = 5': "iommu.entries: IOTLB entries must be a power of two between 16 and 256",
    '[iommu]\nkind = "riscv"\nSv57 = true': "iommu: Sv48 must be there for Sv57, not False.",
    '[iommu]\nkind = "riscv"\nintervals = 4': "iommu.intervals must be a parameter of IommuConfig, which has Sv48, ",
    '[iommu]\nkind = "virtio"\nendpoints = [1]': "iommu.endpoints must be a parameter of VirtioIommuConfig, which has input_bits, ",
    '[iommu]\nkind = "virtio"\ndomain_range = [1]': "iommu.domain_range must be an array of 2 values, not [1].",
    '[iommu]\nkind = "virtio"\nregions = [{ start = 1 }]': "iommu.regions[0].end must be there.",
    "disks = {}": "disks must be an array, not {}.",
    "disks = [1]": "disks[0] must be a table, not 1.",
    "[[disks]]\n[[disks]]\nserial = 'é'": "disks[1].serial must be a string of ASCII characters or an array of bytes, not 'é'.",
    "[[disks]]\nserial = [256]": "disks[0].serial must be a string of ASCII characters or an array of bytes, not [256].",
    "[[disks]]\nserial = '012345678901234567890'": "disks[0].serial: Serial must have at most 20 bytes",
    "[[disks]]\nqueues = 65": "disks[0].queues: Queues of a disk must be between 1 and 64, not 65.",
    "[[devices]]\nkind = 'gpu'": "devices[0].kind must be one of console, net, rng, not 'gpu'.",
    "[[devices]]\nkind = 'net'\nmac = [1, 2, 3, 4, 5, 6]": "devices[0].mac: MAC address must be 6 bytes of a single station",
    "[options]\nmax_payload = 128": "options.max_payload must be an option of the link 'raw', which has none.",
    "link = 'ultrascale'\n[options]\nlanes = 8": "options.lanes must be an option of the link 'ultrascale', which has max_payload, ",
    "link = 'ultrascale'\n[options]\nstraddle = 'rc'": "options.straddle must be an array, not 'rc'.",
    "options = 1": "options must be a table, not 1.",
    "strict = true\niommu = 'none'": "iommu: A strict card must have an IOMMU, not None.",
    "disks = []": "the card: Functions of a card must be between 1 and 8",
}  # fmt: skip
BAD_CARDS = {  # that only their parts complain of
    "[[disks]]\nqueue_size = 100": "disks[0].queue_size: Queue size must be a power of two up to 32768, not 100.",
    "tags = 0": "tags: ",
    "transport_features = 0": "transport_features: Transport features must be VERSION_1 and bits of 0x9ff30000000, not 0.",
    "link = 'ultrascale'\n[options]\nmax_payload = 64": "options.max_payload: Largest payload must be 128, 256, 512 or 1024 bytes, not 64.",
    "link = 'ultrascale'\ntags = 512": "tags: Tags behind the hard block must be at most 256, it has no 10-bit tags, not 512.",
}  # fmt: skip


@pytest.mark.parametrize("text", [*BAD, *BAD_CARDS])
def test_refused(text):
    """GEN-FILE-3: unknown keys, wrong types, values out of range end in one sentence that names the key and the rule."""
    with pytest.raises(BadCard) as found:
        read(text).checked(to_rtlil if text in BAD_CARDS else lambda card: card)
    sentence = {**BAD, **BAD_CARDS}[text]
    assert str(found.value).startswith(sentence)
    assert str(found.value).endswith(".") and "\n" not in str(found.value)


def test_sizes_arrive():
    """GEN-FILE-4: what a file says of the IOMMU's sizes is what the card's IOMMU is made with."""
    sizes = {"entries": 32, "ways": 2, "superpage_entries": 4, "second_entries": 64, "walks": 3}
    text = "\n".join(["[iommu]", 'kind = "riscv"', *(f"{name} = {value}" for name, value in sizes.items())])
    with mock.patch.object(core, "Iommu", side_effect=core.Iommu) as made:
        read(text).checked(to_rtlil)
    assert {name: made.call_args.kwargs[name] for name in sizes} == sizes
