"""The device tree of a RISC-V guest whose IOMMU is a function of the card."""

import struct

import pytest

from ringwall.sim.linux import device_tree, qemu

IOMMU, PHANDLE = 0x80, 0x8000
FRONT, BACK = b"\xd0\x0d\xfe\xedfront000", b"back" * 3
MAP = struct.pack(">8I", 0, PHANDLE, 0, IOMMU, IOMMU + 1, PHANDLE, IOMMU + 1, 0xFFFF - IOMMU)
TREE = FRONT + MAP + BACK


def test_redirect():
    """LINUX-TREE-1: the map of all functions becomes one of the card's, in its place; trees and endpoints that cannot be are refused."""
    two = struct.pack(">8I", 0x88, PHANDLE, 1, 1, 0x90, PHANDLE, 2, 1)
    assert device_tree.redirect(TREE, IOMMU, {0x88: 1, 0x90: 2}) == FRONT + two + BACK
    one = struct.pack(">4I", 0x88, PHANDLE, 1, 1)
    assert device_tree.redirect(TREE + b"xyz", IOMMU, {0x88: 1}) == FRONT + one + one + BACK + b"xyz"
    for tree, iommu, endpoints, sentence in (
        (TREE, IOMMU, {}, "one or two"), (TREE, IOMMU, {1: 1, 2: 2, 3: 3}, "one or two"), (TREE, 0x88, {1: 1}, "not 0"),
        (TREE + TREE, IOMMU, {1: 1}, "not 2"), (b"", 1, {1: 1}, "not 0")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            device_tree.redirect(tree, iommu, endpoints)


def test_make(tmp_path):
    """LINUX-TREE-2: QEMU is asked for its tree with its own IOMMU in the card's place; what it says when it has none is told."""
    emulator, path, asked = tmp_path / "qemu", tmp_path / "tree", tmp_path / "asked"
    emulator.write_text(f'#!/bin/sh\necho "$@" > {asked}\n[ -e {tmp_path}/source ] || {{ echo no such machine >&2; exit 1; }}\n'
                        f'cp {tmp_path}/source {path}\n')
    emulator.chmod(0o755)
    command = qemu.command([emulator], ["/a", "/b", "/c"], linux="/k", image="/i", arch="riscv64", iommu="card", table_file=path)
    assert command[command.index("-dtb") + 1] == str(path)
    with pytest.raises(RuntimeError, match="no such machine"):
        device_tree.make(command, IOMMU, {0x88: 1, 0x90: 2}, path)
    (tmp_path / "source").write_bytes(TREE)
    device_tree.make(command, IOMMU, {0x88: 1, 0x90: 2}, path)
    assert path.read_bytes() == device_tree.redirect(TREE, IOMMU, {0x88: 1, 0x90: 2})
    words = asked.read_text()
    assert f",dumpdtb={path} " in words and "-device riscv-iommu-pci,addr=0x10" in words
    assert "vfio-user" not in words and "-dtb" not in words
