"""Kernels of guests: user-mode Linux as it is built here, Debian's kernels in QEMU where the cache has them."""

import lzma
import os
import signal
import subprocess
import time

import pytest

from ringwall.sim.linux import initramfs, kernel

QEMU = [arch for arch in ("amd64", "riscv64") if kernel.cached(arch)]  # `make nightly` sees to it
MACHINES = {"amd64": "q35", "riscv64": "virt,aia=aplic-imsic"}


def boot(command, timeout_s):
    """Run a guest until it ends; return its console's lines and the seconds that it took."""
    begin = time.monotonic()
    guest = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = guest.communicate(timeout=timeout_s)
    finally:
        if guest.poll() is None:
            os.killpg(guest.pid, signal.SIGKILL)
            guest.communicate()
    assert guest.returncode == 0, said[-3000:]
    return said.splitlines(), time.monotonic() - begin


def facts(lines):
    """Return what the guest told the host: ``{key: rest of the line}``."""
    words = [line.split(" ", 2) for line in lines if line.startswith("RINGWALL ")]
    return {key: rest[0] if rest else "" for _, key, *rest in words}


@pytest.mark.guest
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", ["uml", *QEMU])
def test_kernel_boots(machine, capsys):
    """LINUX-KERNEL-1: a guest without card boots, runs a job with Debian's programs, says so, powers off."""
    if machine == "uml":
        command = kernel.uml_command(kernel.uml(), initramfs.build(), words=["job=hello"])
    else:
        linux, modules = kernel.debian(machine)
        image = initramfs.build(modules=modules, arch=machine)
        command = [*kernel.qemu(machine), "-M", MACHINES[machine], "-accel", "tcg", "-m", "512M", "-nodefaults", "-display", "none"]
        command += ["-no-reboot", "-serial", "stdio", "-kernel", str(linux), "-initrd", str(image)]
        command += ["-append", "console=ttyS0 rdinit=/init panic=-1 quiet job=hello"]
    lines, seconds = boot(command, 300)
    found = facts(lines)
    assert found["done"] == "0", "\n".join(lines[-40:])
    assert found["hello"].split()[0] == {"uml": "x86_64", "amd64": "x86_64", "riscv64": "riscv64"}[machine]
    assert found["programs"].startswith("mke2fs 1.4") and "lspci version 3." in found["programs"]
    assert "module_failed" not in found
    with capsys.disabled():
        print(f"\n  {machine}: {found['hello'].split()[1]} booted, ran and powered off in {seconds:.1f} s")


@pytest.mark.guest
@pytest.mark.parametrize(("words", "status"), [(["job=ends", "job_status=7"], "7"), (["job=nothing"], "127"), (["job=../init"], "126"),
                                               (["job=lib.sh"], "126"), (["job=ends", "jobstatus=7", "status=7"], "0"),
                                               (["job=sleeps", "job_timeout=1"], "143")])  # fmt: skip
def test_kernel_job_status(tmp_path, words, status):
    """LINUX-KERNEL-2: the host hears how a job ended, also one that does not exist, must not be run or does not end."""
    for name, text in (initramfs_scripts() | {"ends": "exit ${job_status:-0}\n", "sleeps": "sleep 1000\n"}).items():
        (tmp_path / name).write_text(text)
    lines, _ = boot(kernel.uml_command(kernel.uml(), initramfs.build(tmp_path), words=words), 60)
    assert facts(lines)["done"] == status, "\n".join(lines[-40:])


def initramfs_scripts():
    found = {name: content for name, _, content in initramfs.entries(initramfs.build().read_bytes())}
    return {"init": found["init"].decode(), "lib.sh": found["jobs/lib.sh"].decode()}


def test_kernel_command():
    """LINUX-KERNEL-3: one PCI function behind each socket, in their order; words come last."""
    command = kernel.uml_command("/k", "/i", ["/a", "/b"], memory_mb=64, words=["job=tour"])
    assert command[0] == "/k" and command[-1] == "job=tour" and "mem=64M" in command and "initrd=/i" in command
    assert [word for word in command if word.startswith("virtio_uml")] == ["virtio_uml.device=/a:1234", "virtio_uml.device=/b:1234"]


def test_kernel_lost():
    """LINUX-KERNEL-4: an option that the kernel did not take is found, also one that it took although it was to be left out."""
    got = 'CONFIG_A=y\nCONFIG_N=12\n# CONFIG_B is not set\nCONFIG_S="x=y"\nCONFIG_D=y\n'
    assert kernel._lost('# words\nCONFIG_A=y\nCONFIG_N=12\nCONFIG_B=n\nCONFIG_S="x=y"\nCONFIG_GONE=n\n', got) == []
    wrong = ["CONFIG_A=n", "CONFIG_N=1", "CONFIG_B=y", "CONFIG_C=y"]
    assert kernel._lost("\n".join([*wrong, "CONFIG_D=y"]), got) == wrong


def modules(folder, graph, builtin=()):
    """Return a folder of modules that name what they depend on, every second one compressed."""
    (folder / "kernel/drivers").mkdir(parents=True)
    (folder / "modules.builtin").write_text("".join(f"kernel/drivers/{name}.ko\n" for name in builtin))
    for number, (name, depends) in enumerate(graph.items()):
        content = b"\x7fELF" + b"depends " * 1000 + b"\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=x\0" + b"text " * 999
        path = folder / "kernel/drivers" / (f"{name}.ko" + (".xz" if number % 2 else ""))
        path.write_bytes(lzma.compress(content) if number % 2 else content)
    return folder


def test_kernel_modules(tmp_path):
    """LINUX-KERNEL-5: modules come behind what they depend on, once; nothing that is built in; what is missing or a circle is told."""
    tree = modules(tmp_path / "a", {"top": ["mid-dle", "base"], "mid-dle": ["base"], "base": [], "other": []}, ["inside"])
    found = kernel._with_dependencies(tree, ["inside", "top", "base"])
    assert [path.name.partition(".")[0] for path in found] == ["base", "mid-dle", "top"]
    with pytest.raises(RuntimeError, match=r"Module none is not in .*, wanted by a guest"):
        kernel._with_dependencies(tree, ["none"])
    with pytest.raises(RuntimeError, match=r"Module gone is not in .*, wanted by x"):
        kernel._with_dependencies(modules(tmp_path / "b", {"x": ["gone"]}), ["x"])
    with pytest.raises(RuntimeError, match=r"Module x is not in .*, wanted by y of x"):
        kernel._with_dependencies(modules(tmp_path / "c", {"x": ["y"], "y": ["x"]}), ["x"])


@pytest.mark.parametrize("call", [kernel.debian, kernel.qemu, kernel.cached])
def test_kernel_arguments(call):
    """LINUX-KERNEL-6: an architecture that no guest has is refused."""
    with pytest.raises(ValueError, match=r"not 'sparc'"):
        call("sparc")
