"""The root file system that a guest starts with: a cpio archive of Debian's programs and of the scripts in the folder guest/."""

import lzma
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import cache, debian

__all__ = ["PACKAGES", "archive", "build", "entries"]

PACKAGES = ("busybox-static", "e2fsprogs", "pciutils")
_SUITES = {"amd64": "bookworm", "riscv64": "sid"}
_RECIPE = 1  # part of every image's digest: raise it when what is done here changes
_GUEST = Path(__file__).with_name("guest")
_PROGRAMS = ("usr/bin/busybox", "usr/bin/lspci", "usr/bin/setpci", "usr/sbin/mke2fs", "usr/sbin/e2fsck", "usr/sbin/dumpe2fs")
_FOLDERS = ("dev", "proc", "sys", "tmp", "mnt", "root", "etc", "jobs", "usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64")
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/bin/sh": "busybox"}


def build(jobs: Path | None = None, modules: Sequence[Path] = (), arch: str = "amd64") -> Path:
    """Return the path of an image that the kernel takes as initrd, made now if this is the first to ask for it.

    Its ``/init`` runs the script of the folder ``jobs`` that ``job=`` on the kernel's command line names, prints
    ``RINGWALL done STATUS`` and powers off.

    Parameters
    ----------
    jobs : :class:`pathlib.Path`
        Folder with ``init``, ``lib.sh`` and the jobs; default: the one of this package.
    modules : list of :class:`pathlib.Path`
        Files of kernel modules in the order in which ``/init`` inserts them; they may be compressed (.xz).
    arch : :class:`str`
        ``amd64`` or ``riscv64``.

    Raises
    ------
    :exc:`FetchError`
        When Debian's packages are neither in the cache nor to be had.
    """
    if arch not in _SUITES:
        raise ValueError(f"Architecture must be one of {', '.join(_SUITES)}, not {arch!r}")
    scripts = {path.name: path.read_bytes() for path in sorted((jobs or _GUEST).iterdir()) if path.is_file()}
    for name in ("init", "lib.sh"):
        if name not in scripts:
            raise ValueError(f"Folder of jobs must have a file {name}, not {sorted(scripts)!r}")
    packages = debian.fetch(PACKAGES, _SUITES[arch], arch)
    parts = [f"image {_RECIPE} {arch}", (packages / "versions").read_text()]
    parts += [f"{name}\n{text.hex()}" for name, text in scripts.items()]
    parts += [f"{module}" for module in modules]
    return cache.entry(f"initramfs-{arch}", "\n".join(parts), lambda work: _make(work, packages, scripts, modules, arch)) / "image.cpio"


def archive(found: Sequence[tuple[str, int, bytes]], devices: dict[str, tuple[int, int]] | None = None) -> bytes:
    """Return a cpio archive ("newc") of ``(path, mode, content)``: a link's content is its target, a folder has none.

    Owner is root and time is 0, so that equal files give equal archives. Numbers of devices come from ``devices``.
    """
    devices = devices or {}
    out = bytearray()
    for number, (path, mode, content) in enumerate([*found, ("TRAILER!!!", 0, b"")], 1):
        major, minor = devices.get(path, (0, 0))
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, major, minor, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4)
        out += content
        out += bytes(-len(out) % 4)
    return bytes(out)


def entries(image: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield ``(path, mode, content)`` of a cpio archive ("newc") up to its trailer.

    Raises
    ------
    :exc:`ValueError`
        When it is not one, or ends early.
    """
    at = 0
    while True:
        head = image[at : at + 110]
        if len(head) < 110 or head[:6] != b"070701":
            raise ValueError(f"Archive must have a header at byte {at}, not {head[:6]!r}")
        fields = [int(head[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        begin = at + 110 + fields[11]
        name = image[at + 110 : begin - 1].decode()
        begin += -begin % 4
        end = begin + fields[6]
        if end > len(image):
            raise ValueError(f"Archive must have {end} bytes for {name}, not {len(image)!r}")
        if name == "TRAILER!!!":
            return
        yield name, fields[1], image[begin:end]
        at = end + -end % 4


def _make(work, packages, scripts, modules, arch):
    found = [(name, stat.S_IFDIR | 0o755, b"") for name in _FOLDERS]
    found += [(name, stat.S_IFLNK | 0o777, target.encode()) for name, target in _LINKS.items()]
    found += [("dev/console", stat.S_IFCHR | 0o600, b""), ("dev/null", stat.S_IFCHR | 0o666, b"")]
    found.append(("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/root:/bin/sh\n"))
    triplet = debian.ARCHITECTURES[arch]
    found.append((f"usr/lib/{triplet}", stat.S_IFDIR | 0o755, b""))
    found += [(name, stat.S_IFREG | 0o755, (packages / name).read_bytes()) for name in _PROGRAMS]
    for folder in ("usr/lib", "usr/lib64", f"usr/lib/{triplet}"):
        for path in sorted((packages / folder).glob("*.so*")):
            name = f"{folder}/{path.name}"
            if path.is_symlink():
                found.append((name, stat.S_IFLNK | 0o777, os.readlink(path).encode()))
            elif path.is_file():
                found.append((name, stat.S_IFREG | 0o755, path.read_bytes()))
    found += [("usr/share", stat.S_IFDIR | 0o755, b""), ("usr/share/misc", stat.S_IFDIR | 0o755, b"")]
    found.append(("usr/share/misc/pci.ids", stat.S_IFREG | 0o644, (packages / "usr/share/misc/pci.ids").read_bytes()))
    for name, text in scripts.items():
        found.append(("init" if name == "init" else f"jobs/{name}", stat.S_IFREG | 0o755, text))
    if modules:
        found.append(("modules", stat.S_IFDIR | 0o755, b""))
    for number, module in enumerate(modules):
        content, name = Path(module).read_bytes(), Path(module).name
        if name.endswith(".xz"):
            content, name = lzma.decompress(content), name.removesuffix(".xz")
        found.append((f"modules/{number:02d}-{name}", stat.S_IFREG | 0o644, content))
    (work / "image.cpio").write_bytes(archive(found, {"dev/console": (5, 1), "dev/null": (1, 3)}))
