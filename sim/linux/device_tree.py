"""The device tree of a RISC-V guest whose IOMMU is a function of the card: QEMU's own tree, in which that of QEMU stood in its place."""

import struct
import subprocess
from pathlib import Path

__all__ = ["make", "redirect"]

_DUMP_TIMEOUT_S = 60


def redirect(tree: bytes, iommu: int, endpoints: dict[int, int]) -> bytes:
    """Return ``tree``, which maps every function but ``iommu`` to the IOMMU there, with a map of ``endpoints`` alone.

    Parameters
    ----------
    tree : :class:`bytes`
        As QEMU dumps it, with its riscv-iommu-pci at the place ``iommu``.
    iommu : :class:`int`
        Bus, device and function of the IOMMU, as one number of 16 bits.
    endpoints : dict
        Bus, device and function of one or two PCI functions -> the device_id by which the IOMMU knows it.

    Raises
    ------
    :exc:`ValueError`
        When there are more endpoints, or the tree has no such map, or several.
    """
    if len(endpoints) not in (1, 2):
        raise ValueError(f"Endpoints must be one or two, as the map has two entries, not {endpoints!r}")
    words = struct.unpack(f">{len(tree) // 4}I", tree[: len(tree) // 4 * 4])
    # iommu-map: entries of first function, phandle, first device_id, count
    behind = iommu + 1
    at = [n for n in range(len(words) - 7)
          if words[n : n + 8] == (0, words[n + 1], 0, iommu, behind, words[n + 1], behind, 0xFFFF - iommu)]  # fmt: skip
    if len(at) != 1:
        raise ValueError(f"The device tree must have one map of all functions but {iommu:#x}, not {len(at)}")
    phandle = words[at[0] + 1]
    entries = [(function, phandle, device, 1) for function, device in endpoints.items()] * 2
    return tree[: 4 * at[0]] + struct.pack(">8I", *entries[0], *entries[1]) + tree[4 * at[0] + 32 :]


def make(command: list[str], iommu: int, endpoints: dict[int, int], path: Path) -> None:
    """Write to ``path`` the tree of the machine that ``command`` starts with ``-dtb path``.

    Raises
    ------
    :exc:`RuntimeError`
        When QEMU does not tell it within a minute; what it said is in the text.
    """
    words, dump = iter(command), []
    for word in words:
        if word == "-dtb":
            next(words)
        elif word == "-device" and (device := next(words)).startswith("{"):
            continue
        elif word == "-device":
            dump += [word, device]
        elif word == "-machine":
            dump += [word, f"{next(words)},dumpdtb={path}"]
        else:
            dump.append(word)
    dump += ["-device", f"riscv-iommu-pci,addr={iommu >> 3:#x}"]
    try:
        done = subprocess.run(dump, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DUMP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"QEMU did not tell its device tree within {_DUMP_TIMEOUT_S} s:\n{error.stderr or ''}") from None
    if done.returncode or not path.exists():
        raise RuntimeError(f"QEMU did not tell its device tree:\n{done.stderr}")
    path.write_bytes(redirect(path.read_bytes(), iommu, endpoints))
