"""The ACPI table of a virtio-iommu, byte by byte."""

import pytest

from ringwall.sim.linux import qemu, viot


def test_viot(tmp_path):
    """LINUX-VIOT-1: one IOMMU, one endpoint: 88 bytes with QEMU's header, each field where ACPI has it; wrong numbers refused."""
    made = viot.table(0x0080, {0x0088: 1})
    assert len(made) + 36 == 88
    assert made == bytes.fromhex(
        "0200 3000 0000000000000000"  # two nodes, the first at 48
        "03 00 1000 0000 8000 0000000000000000"  # virtio-iommu on PCI: segment 0, function 00:10.0
        "01 00 1800 01000000 0000 0000 8800 8800 3000 000000000000")  # endpoint 1 on: 00:11.0 to 00:11.0, behind the node at 48
    for iommu, endpoints in ((1 << 16, {}), (0x80, {0x80: 1}), (0x80, {1 << 16: 1}), (0x80, {0x88: 1 << 32}), (-1, {})):
        with pytest.raises(ValueError, match="must be"):
            viot.table(iommu, endpoints)
    command = qemu.command(["qemu"], ["/a", "/b"], linux="/k", image="/i", iommu="card", table_file=tmp_path / "viot")
    assert (tmp_path / "viot").read_bytes() == made
    assert f"sig=VIOT,rev=0,data={tmp_path / 'viot'}" in command
    assert [word for word in command if '"addr": "0x10"' in word and '"/a"' in word]
    assert not [word for word in command if word.startswith("pcie-root-port")]
    with pytest.raises(ValueError, match="must have a file"):
        qemu.command(["qemu"], ["/a"], linux="/k", image="/i", iommu="card")
