"""Kernel modules of ours for guests of riscv64, cross compiled with Debian's compiler and the headers of the guest's kernel."""

import subprocess
import tempfile
from pathlib import Path

from . import cache, kernel
from .debian import fetch, versions

__all__ = ["build"]

_RECIPE = 1  # part of every module's digest: raise it when what is done here changes
_FOLDER = Path(__file__).with_name("modules")
_COMPILER, _PARTS = ["gcc-riscv64-linux-gnu"], r"(?!.*-cross$).*"  # without the libraries of programs
_LIMIT_S = 300  # bound of one call of the compiler
# As the kernel's own makefiles have it for this architecture and Debian's configuration.
_FLAGS = (
    "-D__KERNEL__ -DMODULE -std=gnu11 -fms-extensions -O2 -nostdinc -ffreestanding -fno-common -fno-strict-aliasing -fno-PIE -fshort-wchar "
    "-fno-strict-overflow -fno-delete-null-pointer-checks -fno-asynchronous-unwind-tables -fno-unwind-tables -fno-stack-protector "
    "-march=rv64imac_zicsr_zifencei_zacas_zabha -mabi=lp64 -mcmodel=medany -mno-save-restore -mno-relax -mstrict-align "
    "-Wall -Wno-pointer-sign -Werror"
)  # fmt: skip
_INCLUDED = ("arch/riscv/include", "include", "arch/riscv/include/uapi", "include/uapi")  # and what is generated of each
# What modpost writes beside a module.
_ABOUT = """
#include <linux/module.h>
#define INCLUDE_VERMAGIC
#include <linux/vermagic.h>
MODULE_INFO(vermagic, VERMAGIC_STRING);
MODULE_INFO(name, KBUILD_MODNAME);
MODULE_INFO(depends, "");
__visible struct module __this_module __section(".gnu.linkonce.this_module") = {
\t.name = KBUILD_MODNAME, .init = init_module, .exit = cleanup_module, .arch = MODULE_ARCH_INIT,
};
"""


def build(name: str) -> Path:
    """Return the file of the module ``name`` of the folder modules/, for Debian's kernel of riscv64; built now if this is the first to ask.

    Raises
    ------
    :exc:`FetchError`
        When Debian's packages are neither in the cache nor to be had.
    :exc:`RuntimeError`
        When it does not compile; the compiler's words are in the text.
    """
    source, headers = _FOLDER / f"{name}.c", kernel.headers("riscv64")
    recipe = "\n".join([f"module {_RECIPE} {name}", headers.name, _FLAGS, _ABOUT, source.read_text()])
    return cache.entry(f"module-{name}", recipe, lambda work: _make(work, source, headers)) / f"{name}.ko"


def _make(work, source, headers):
    packages = fetch(_COMPILER, "sid", "amd64", only=_PARTS)
    # What the compiler starts is started as it is itself: with the loader and the libraries that came with it.
    loader = [f"{packages}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{packages}/usr/lib/x86_64-linux-gnu"]
    tool = f"{packages}/usr/bin/riscv64-linux-gnu-"
    common = headers.with_name(headers.name.removesuffix("riscv64") + "common")
    flags = [f'-DKBUILD_MODNAME="{source.stem}"', f"-D__KBUILD_MODNAME=kmod_{source.stem}", *_FLAGS.split()]
    for folder in _INCLUDED:
        flags.append(f"-I{common / folder}")
        flags.append(f"-I{headers / folder.replace('include', 'include/generated', 1)}")
    flags.append(f"-I{headers}/include")
    for name in ("compiler-version", "kconfig", "compiler_types"):
        flags += ["-include", f"{common}/include/linux/{name}.h"]
    about, target = work / "about.c", str(work / f"{source.stem}.ko")
    about.write_text(_ABOUT)
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{one.stem}.o" for one in (source, about)]
        for one, made in zip((source, about), objects):
            _run([*loader, f"{tool}gcc", "-wrapper", ",".join(loader), *flags, "-c", str(one), "-o", made])
        _run([*loader, f"{tool}ld", "-r", "-melf64lriscv", "-T", f"{headers}/arch/riscv/module.lds", "-o", target, *objects])
    (work / "versions").write_text("".join(f"{name} {version}\n" for name, version in versions(packages).items()))


def _run(command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} returned {done.returncode}\n{done.stdout}{done.stderr}")
