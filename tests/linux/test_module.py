"""Kernel modules of ours for guests: how they are compiled, without a compiler; a guest of LINUX-QEMU-12 inserts one."""

import pytest

from ringwall.sim.linux import kernel, module

PROGRAM = """#!/bin/sh
shift 2
echo "$@" >> {log}
case "$*" in *{bad}*) echo "{bad}: unknown word" >&2; exit 1 ;; esac
for word; do [ -n "$is_next" ] && touch "$word"; is_next=; [ "$word" = -o ] && is_next=1; done
exit 0
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Packages whose loader notes what it starts and makes what it names; returns how a word is made to be one that does not compile."""
    monkeypatch.setenv("RINGWALL_CACHE", str(tmp_path / "cache"))
    loader, headers = tmp_path / "usr/lib64/ld-linux-x86-64.so.2", tmp_path / "usr/src/linux-headers-9-riscv64"
    for folder in (loader.parent, headers):
        folder.mkdir(parents=True)
    (tmp_path / "versions").write_text("gcc-riscv64-linux-gnu 16\n")
    monkeypatch.setattr(kernel, "fetch", lambda *what, **how: tmp_path)
    monkeypatch.setattr(module, "fetch", lambda *what, **how: tmp_path)

    def fail_at(word):
        loader.write_text(PROGRAM.format(log=tmp_path / "log", bad=word))
        loader.chmod(0o755)

    fail_at("nothing-of-this")
    return fail_at


def test_module(tools, tmp_path):
    """LINUX-MODULE-1: source and what names it are compiled with the kernel's headers by Debian's compiler, and linked by its linker."""
    made = module.build("first_stage")
    first, second, link = (tmp_path / "log").read_text().splitlines()
    assert made.name == "first_stage.ko" and made.exists() and (made.parent / "versions").read_text() == "gcc-riscv64-linux-gnu 16\n"
    for line in (first, second):
        assert line.startswith(f"{tmp_path}/usr/bin/riscv64-linux-gnu-gcc -wrapper {tmp_path}/usr/lib64/ld-linux-x86-64.so.2,--library-p")
        for folder in ("9-common/include", "9-riscv64/include/generated", "9-common/arch/riscv/include/uapi",
                       "9-riscv64/arch/riscv/include/generated/uapi", "9-riscv64/include"):  # fmt: skip
            assert f"-I{tmp_path}/usr/src/linux-headers-{folder} " in line
    assert "/first_stage.c -o " in first and "/about.c -o " in second
    assert link.startswith(f"{tmp_path}/usr/bin/riscv64-linux-gnu-ld -r ") and "9-riscv64/arch/riscv/module.lds" in link
    (tmp_path / "log").unlink()
    assert module.build("first_stage") == made and not (tmp_path / "log").exists()


@pytest.mark.parametrize("word", ["about.c", "module.lds"])
def test_module_fails(tools, word):
    """LINUX-MODULE-2: what the compiler or the linker says is in the error, and nothing is kept; no headers but riscv64's are there."""
    tools(word)
    with pytest.raises(RuntimeError, match=f"{word} .* returned 1\n{word}: unknown word"):
        module.build("first_stage")
    tools("nothing-of-this")
    assert module.build("first_stage").exists()
    with pytest.raises(ValueError, match="not 'amd64'"):
        kernel.headers("amd64")
