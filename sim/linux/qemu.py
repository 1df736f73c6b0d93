"""QEMU as a guest of the card: a whole machine of which some PCI devices are functions of ours, over vfio-user."""

import json
from pathlib import Path

from . import device_tree, uml, viot

__all__ = ["ARCHITECTURES", "IOMMUS", "command", "run"]

ARCHITECTURES = ("amd64", "riscv64")
IOMMUS = ("none", "intel", "virtio", "card")
_MACHINES = {"amd64": "q35,accel=tcg,memory-backend=memory", "riscv64": "virt,aia=aplic-imsic,accel=tcg,memory-backend=memory"}
_CPUS = {"amd64": "max,la57=off", "riscv64": "max"}
_CONSOLES = {"amd64": "ttyS0", "riscv64": "ttyS0"}
_IOMMU = {
    "none": ((), ()),
    "intel": (("-device", "intel-iommu,caching-mode=on"), ("intel_iommu=on", "iommu.strict=1")),
    "virtio": (("-device", "virtio-iommu-pci"), ("iommu.strict=1",)),
    "card": ((), ("iommu.strict=1",)),
}
_FIRST_SLOT = 0x10  # on the root bus, where the card's functions are when it has the IOMMU
# Where our messages go: where those of the machine's own devices go, so no memory is ever there and a guest maps it for a device.
_MESSAGES = {"amd64": (0xFEE0_0000, 0x10_0000), "riscv64": (0x2800_0000, 0x10_0000)}
_ANSWER_MS = 600_000  # QEMU's patience with an answer; its vCPU stands still meanwhile, so nothing is gained by less
_JOB_TIMEOUT_S = 1_000_000  # of the guest's clock: timeout_s is what counts


def command(emulator, sockets, *, linux, image, arch="amd64", iommu="none", memory_mb=256, words=(), prompt=False, reboots=False,
            table_file=None):  # fmt: skip
    """Return the command that starts QEMU: one PCI Express slot with a ``vfio-user-pci`` for each socket, console on standard output.

    The guest's clock counts its instructions, and is the host's while it waits: a busy host is none to the guest. With a ``prompt`` its
    clock is the host's.

    Parameters
    ----------
    emulator : list of :class:`str`
        How QEMU is started, of version 10.1 or later.
    sockets : list of paths
        Of :class:`.vfio_user.Server`.
    linux, image : path
        Kernel and initramfs.
    arch : :class:`str`
        One of `ARCHITECTURES`.
    iommu : :class:`str`
        One of `IOMMUS`: what QEMU puts in front of all devices; "card": function 0 of the card is the IOMMU of the others, which knows
        them by their places in ``sockets``: a virtio-iommu for amd64, a RISC-V IOMMU (1B36:0014) for riscv64. Then all are on the
        root bus, and `table_file` says so.
    memory_mb : :class:`int`
        The guest's memory, a file that the card reaches.
    words : iterable of :class:`str`
        More for the kernel's command line.
    prompt : :class:`bool`
        Standard input is the console's, too.
    reboots : :class:`bool`
        A reboot boots again; otherwise it ends QEMU.
    table_file : path or None
        With "card". amd64: where the ACPI table is written. riscv64: the device tree, see :func:`.device_tree.make`.

    Raises
    ------
    :exc:`ValueError`
        When there is no such machine.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"Architecture of the guest must be one of {', '.join(ARCHITECTURES)}, not {arch!r}")
    if iommu not in IOMMUS:
        raise ValueError(f"IOMMU in front of the card must be one of {', '.join(IOMMUS)}, not {iommu!r}")
    if iommu == "intel" and arch != "amd64":
        raise ValueError(f"An Intel IOMMU must be in a guest of amd64, not {arch!r}")
    if iommu == "card" and table_file is None:
        raise ValueError("A card that has the IOMMU must have a file for its table, not None")
    if not isinstance(memory_mb, int) or not 64 <= memory_mb <= 2048:
        raise ValueError(f"Memory must be between 64 and 2048 MiB, not {memory_mb!r}")
    devices, more = _IOMMU[iommu]
    found = [
        *map(str, emulator), "-nodefaults", "-no-user-config", "-display", "none", "-machine", _MACHINES[arch], "-cpu", _CPUS[arch],
        "-m", f"{memory_mb}M", "-object", f"memory-backend-memfd,id=memory,size={memory_mb}M,share=on",
        "-serial", "mon:stdio" if prompt else "stdio", *devices,
    ]  # fmt: skip
    if not prompt:
        found += ["-icount", "shift=2,sleep=on"]
    if not reboots:
        found.append("-no-reboot")
    if iommu == "card" and arch == "amd64":
        Path(table_file).write_bytes(viot.table(*_places(sockets)))
        found += ["-acpitable", f"sig=VIOT,rev=0,data={table_file}"]
    elif iommu == "card":
        found += ["-dtb", str(table_file)]
    for n, path in enumerate(sockets):
        device = {"driver": "vfio-user-pci", "bus": f"slot{n}", "socket": {"type": "unix", "path": str(path)}, "x-msg-timeout": _ANSWER_MS}
        if iommu == "card":
            device |= {"bus": "pcie.0", "addr": hex(_FIRST_SLOT + n)}
        else:
            found += ["-device", f"pcie-root-port,id=slot{n},chassis={n}"]
        found += ["-device", json.dumps(device)]
    line = [f"console={_CONSOLES[arch]}", "panic=-1", "rdinit=/init", *more, *words]
    return [*found, "-kernel", str(linux), "-initrd", str(image), "-append", " ".join(line)]


def _places(sockets):
    """Return bus, device and function, as one number, of the card's IOMMU; those of the other functions -> by which it knows them."""
    first, *others = (_FIRST_SLOT + n << 3 for n in range(len(sockets)))
    return first, {place: n for n, place in enumerate(others, 1)}


def run(loop, sockets, *, emulator, linux, image, job, folder, arch="amd64", iommu="none", memory_mb=256, words=(), timeout_s=600,
        echo=None, prompt=False, expect=(), until=None, name="qemu"):  # fmt: skip
    """Boot QEMU with a device at each of ``sockets``, serve the card until it powers off, return its :class:`.uml.GuestRun`.

    Parameters are those of :func:`command` and :func:`.uml.run`; raises what they raise.
    """
    loop.bridge.messages = _MESSAGES.get(arch, loop.bridge.messages)
    table_file = Path(folder) / "table.bin"
    started = command(emulator, sockets, linux=linux, image=image, arch=arch, iommu=iommu, memory_mb=memory_mb,
                      words=[f"job={job}", f"job_timeout={_JOB_TIMEOUT_S}", *words], prompt=prompt, reboots=job == "reboot",
                      table_file=table_file)  # fmt: skip
    if (arch, iommu) == ("riscv64", "card"):
        device_tree.make(started, *_places(sockets), table_file)
    return uml.serve(loop, started, folder=Path(folder), timeout_s=timeout_s, echo=echo, prompt=prompt,
                     expect=(*expect, *uml.EXPECTED.get(job, ())), until=until, name=name)  # fmt: skip
