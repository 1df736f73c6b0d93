"""Kernels of guests: user-mode Linux built from Debian's source package, Debian's own kernels and QEMU for whole machines."""

import lzma
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from . import cache, initramfs
from .debian import FetchError, fetch, find, versions

__all__ = ["MODULES", "cached", "debian", "headers", "qemu", "uml", "uml_cached", "uml_command"]

_RECIPE = 1  # part of every build's digest: raise it when what is done for a build changes
_SOURCE, _TOOLS = "linux-source-6.12", ("bison", "flex", "m4", "bc")
_CONFIG = Path(__file__).with_name("uml.config")
_LIMIT_S = 3600  # bound of the build
_OBJECTS = 780  # about so many are compiled: only the progress says it
# Code of drivers and architectures that user-mode Linux has no use for; what describes them (Kconfig) is unpacked, configuring reads it.
_DRIVERS = (
    "accel acpi bluetooth clk crypto gpu hid hwmon hwtracing iio infiniband input media md mfd mtd nvme phy pinctrl platform scsi soc "
    "staging thunderbolt tty/serial usb video net/ethernet net/wireless net/usb net/dsa net/can net/phy net/wan net/hamradio net/fddi"
)  # fmt: skip
_ARCHITECTURES = "alpha arc arm arm64 csky hexagon loongarch m68k microblaze mips nios2 openrisc parisc powerpc riscv s390 sh sparc xtensa"
_FILE_SYSTEMS = "bcachefs btrfs ceph f2fs nfs ntfs3 ocfs2 smb xfs"
_LEFT_OUT = (
    [f"*/{folder}/*.[chS]" for folder in ("sound", "samples")]
    + [f"*/drivers/{name}/*.[chS]" for name in _DRIVERS.split()]
    + [f"*/arch/{name}/*.[chS]" for name in _ARCHITECTURES.split()]
    + [f"*/fs/{name}/*.[chS]" for name in _FILE_SYSTEMS.split()]
    + ["*/Documentation/*.[a-z]*", "*/tools/testing/*", "*/tools/perf/*", "*.dts", "*.dtsi", "*.dtso", "*.rst", "*.json"]
)

# Names of the modules that a guest in QEMU needs, with its IOMMUs; those that the kernel has built in are left out.
MODULES = {"amd64": ("virtio_pci", "virtio_blk", "virtio_iommu", "ext4"), "riscv64": ("virtio_pci", "virtio_blk", "ext4")}
_KERNELS = {"amd64": (["linux-image-amd64"], "trixie-backports"), "riscv64": (["linux-image-riscv64", "linux-headers-riscv64"], "sid")}
_KERNEL_PARTS = r"linux-(base|binary|modules|image|headers)-[0-9].*"
_QEMU_SUITE = "trixie-backports"  # QEMU >= 10.1 has vfio-user-pci
_QEMU = {"amd64": ("qemu-system-x86", "qemu-system-x86_64"), "riscv64": ("qemu-system-riscv", "qemu-system-riscv64")}


# -- user-mode Linux --


def uml() -> Path:
    """Return the path of user-mode Linux, built now if this is the first to ask for it.

    The folder it lies in has ``config`` (all options) and ``versions`` (Debian's packages that it was made from), too.
    The build needs a C compiler, make, perl, tar and xz; it takes minutes and says how far it is.

    Raises
    ------
    :exc:`FetchError`
        When Debian's source package is not to be had.
    :exc:`RuntimeError`
        When the build fails; the message has the end of its output.
    """
    return cache.entry("uml", _uml_recipe(), _make_uml) / "linux"


def uml_cached() -> bool:
    """Return whether the cache has user-mode Linux: tests with guests run where it has."""
    return cache.find("uml", _uml_recipe()) is not None


def _uml_recipe():
    return f"user-mode Linux {_RECIPE} {_SOURCE} {' '.join(_TOOLS)}\n" + _CONFIG.read_text() + "\n".join(_LEFT_OUT)


def uml_command(linux: Path, image: Path, sockets: Sequence[Path] = (), *, memory_mb: int = 96, words: Sequence[str] = ()) -> list[str]:
    """Return the command that starts user-mode Linux: one PCI function behind each socket, console on standard input and output."""
    command = [str(linux), f"mem={memory_mb}M", f"initrd={image}", "rdinit=/init", "con0=fd:0,fd:1", "con=null", "panic=-1"]
    command += [f"virtio_uml.device={socket}:1234" for socket in sockets]
    return [*command, *words]


def _make_uml(work):
    for tool in ("gcc", "make", "perl", "tar", "xz"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not installed: building user-mode Linux needs gcc, libc6-dev, make, perl, tar and xz-utils")
    packages = fetch([_SOURCE], only=_SOURCE)
    tools = fetch(_TOOLS, only="|".join(_TOOLS))
    cache.say(f"unpacking {_SOURCE} {versions(packages)[_SOURCE]}")
    source = work / "source"
    source.mkdir()
    (work / "left-out").write_text("\n".join(_LEFT_OUT))
    with subprocess.Popen(["xz", "-dc", "-T2", packages / "usr/src" / f"{_SOURCE}.tar.xz"], stdout=subprocess.PIPE) as reader:
        command = ["tar", "-x", "--strip-components=1", "-C", source, "-X", work / "left-out"]
        done = subprocess.run(command, stdin=reader.stdout, timeout=_LIMIT_S, check=False)
    if reader.returncode or done.returncode:
        raise RuntimeError(f"{_SOURCE} could not be unpacked into {source}: is the disk full?")

    for folder in ["sound", *(f"drivers/{name}" for name in _DRIVERS.split())]:
        (source / folder / "Makefile").write_text("")  # make would look into every folder below it

    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARCH", "CROSS_COMPILE")  # of the make that may have started us
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {
        "PATH": f"{tools}/usr/bin{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "BISON_PKGDATADIR": f"{tools}/usr/share/bison",
        "M4": f"{tools}/usr/bin/m4",
        "KBUILD_BUILD_TIMESTAMP": "@0",
        "KBUILD_BUILD_USER": "ringwall",
        "KBUILD_BUILD_HOST": "ringwall",
        "LC_ALL": "C",
    }
    (source / "card.config").write_text(_CONFIG.read_text())
    _make(["KCONFIG_ALLCONFIG=card.config", "tinyconfig"], source, environment)
    lost = _lost(_CONFIG.read_text(), (source / ".config").read_text())
    if lost:
        raise RuntimeError(f"{_SOURCE} does not take these lines of {_CONFIG.name}: {', '.join(lost)}")
    _make([f"-j{os.cpu_count() or 1}", "linux"], source, environment)
    (source / "linux").rename(work / "linux")
    (source / ".config").rename(work / "config")
    found = versions(packages) | versions(tools)
    (work / "versions").write_text("".join(f"{name} {version}\n" for name, version in found.items()))
    shutil.rmtree(source)
    (work / "left-out").unlink()


def _lost(asked, got):
    """Return the options of ``asked`` that the file ``got`` of the kernel does not have so."""
    options = dict(line.split("=", 1) for line in got.splitlines() if line.startswith("CONFIG_"))
    wanted = dict(line.split("=", 1) for line in asked.splitlines() if line.startswith("CONFIG_"))
    return [f"{name}={value}" for name, value in wanted.items() if options.get(name, "n") != value]


def _make(arguments, source, environment):
    """Run make; tell how many objects are compiled."""
    compiler = [f"CC={shutil.which('ccache')} gcc"] if shutil.which("ccache") else []
    command = ["make", "ARCH=um", *compiler, *arguments]
    made = subprocess.Popen(
        command, cwd=source, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    late = threading.Timer(_LIMIT_S, lambda: os.killpg(made.pid, 15))
    late.start()
    said, objects = [], 0
    try:
        for line in iter(made.stdout.readline, ""):
            said.append(line)
            if line.startswith("  CC "):
                objects += 1
                progress = f"building user-mode Linux: {objects} of about {_OBJECTS} objects"
                if sys.stderr.isatty():
                    print(f"\rringwall: {progress}", end="", file=sys.stderr, flush=True)
                elif objects % 100 == 0:
                    cache.say(progress)
        code = made.wait()
    finally:
        late.cancel()
        if made.poll() is None:
            os.killpg(made.pid, 15)
            made.wait()
    if objects and sys.stderr.isatty():
        print(file=sys.stderr)
    if code:
        raise RuntimeError(f"{' '.join(command)} returned {code}\n{_end(said)}")


def _end(lines):
    """Return the lines with errors, and the last ones."""
    errors = [line for line in lines if re.search(r"\berror\b|No rule|\*\*\*", line, re.IGNORECASE)]
    return "".join([*errors[:20], "--- end of the output\n", *lines[-20:]])


# -- kernels and QEMU of Debian --


def debian(arch: str = "amd64") -> tuple[Path, list[Path]]:
    """Return Debian's kernel and its modules for a guest in QEMU, fetched now if this is the first to ask for them.

    Returns
    -------
    tuple of :class:`pathlib.Path` and list
        The kernel's image, and files of :data:`MODULES` with all that they depend on, in the order in which they are inserted.
    """
    folder = _packages(arch)
    images = [path for pattern in ("boot/vmlinu[xz]-*", "usr/lib/modules/*/vmlinu[xz]") for path in sorted(folder.glob(pattern))]
    trees = sorted((folder / "usr/lib/modules").glob("*"))
    if len(images) != 1 or len(trees) != 1:
        raise FetchError(f"{folder} must have one kernel and its modules, not {[*images, *trees]!r}")
    return images[0], _with_dependencies(trees[0], MODULES[arch])


def headers(arch: str = "riscv64") -> Path:
    """Return the folder of the headers of the kernel that :func:`debian` returns; beside it is the one of its common headers.

    Raises
    ------
    :exc:`ValueError`
        When there are none for ``arch``.
    """
    found = sorted(_packages(arch).glob(f"usr/src/linux-headers-*-{arch}"))
    if len(found) != 1:
        raise ValueError(f"Headers of a kernel are there for riscv64 alone, not {arch!r}")
    return found[0]


def qemu(arch: str = "amd64") -> list[str]:
    """Return how a command begins that starts QEMU for machines of ``arch``, fetched now if this is the first to ask for it.

    It runs on an amd64 host with the loader, libraries and firmware that came with it; nothing of it is installed.
    """
    package, program = _choose(_QEMU, arch)
    folder = fetch([package], _QEMU_SUITE, "amd64")
    libraries = f"{folder}/usr/lib/x86_64-linux-gnu"
    command = [f"{folder}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", libraries, f"{folder}/usr/bin/{program}"]
    for name in ("qemu", "seabios", "ipxe", "opensbi"):
        if (folder / "usr/share" / name).is_dir():
            command += ["-L", f"{folder}/usr/share/{name}"]
        if (folder / "usr/lib" / name).is_dir():
            command += ["-L", f"{folder}/usr/lib/{name}"]
    return command


def cached(arch: str = "amd64") -> bool:
    """Return whether the cache has QEMU and a kernel for guests of ``arch``: tests of whole machines run where it has."""
    package, _ = _choose(_QEMU, arch)
    kernel = find(*_choose(_KERNELS, arch), arch, only=_KERNEL_PARTS)
    return kernel is not None and find([package], _QEMU_SUITE, "amd64") is not None


def _packages(arch):
    return fetch(*_choose(_KERNELS, arch), arch, only=_KERNEL_PARTS)


def _choose(table, arch):
    if arch not in table:
        raise ValueError(f"Architecture must be one of {', '.join(table)}, not {arch!r}")
    return table[arch]


def _with_dependencies(tree, names):
    """Return the files of the modules ``names`` in the folder ``tree``, each behind those that it depends on."""
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in (tree / "kernel").rglob("*.ko*")}
    builtin = {Path(line).stem.replace("-", "_") for line in (tree / "modules.builtin").read_text().split()}
    chosen: dict[str, Path] = {}

    def choose(name, above):
        if name in chosen or name in builtin:
            return
        if name not in files or name in above:
            raise RuntimeError(f"Module {name} is not in {tree}, wanted by {' of '.join(above) or 'a guest'}")
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in filter(None, depends[1].decode().split(",") if depends else []):
            choose(other.replace("-", "_"), [name, *above])
        chosen[name] = files[name]

    for name in names:
        choose(name, [])
    return list(chosen.values())


def main(names: Sequence[str]) -> int:
    """Fill the cache: ``uml`` with its image, or QEMU and kernel of an architecture; return 1 when something is not to be had, else 0."""
    try:
        for name in names:
            if name == "uml":
                uml()
                initramfs.build()
            else:
                debian(name)
                qemu(name)
    except (FetchError, RuntimeError) as error:
        cache.say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
