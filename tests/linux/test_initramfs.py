"""The root file system of guests: the archive's format, what it holds, what its scripts do."""

import hashlib
import random
import shutil
import stat
import subprocess

import pytest

from ringwall.sim.linux import debian, initramfs

pytestmark = pytest.mark.guest
FILE, FOLDER, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777


def busybox():
    return debian.fetch(initramfs.PACKAGES) / "usr/bin/busybox"


def sh(script, **how):
    """Return what busybox prints that runs ``script`` as a guest's jobs run: lib.sh is read first."""
    text = f". {initramfs.__file__.removesuffix('initramfs.py')}guest/lib.sh\n{script}"
    return subprocess.run([busybox(), "sh", "-c", text], stdout=subprocess.PIPE, text=True, check=True, timeout=60, **how).stdout


def test_initramfs_format(tmp_path):
    """LINUX-IMAGE-1: names and contents of every alignment, links, rights: busybox's cpio and our reader get back what was put in."""
    rng = random.Random(4)
    found = [("folder", FOLDER, b""), ("folder/link", LINK, b"../there"), ("program", stat.S_IFREG | 0o755, b"#!")]
    found += [(f"folder/{'n' * (1 + n % 4)}{n}", FILE, rng.randbytes(n)) for n in [*range(10), 4095, 4096, 70001]]
    image = initramfs.archive(found)
    assert list(initramfs.entries(image)) == found
    assert initramfs.archive(found) == image
    subprocess.run([busybox(), "cpio", "-id"], input=image, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL, timeout=60)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == sorted(name for name, _, _ in found)
    for name, mode, content in found:
        path = tmp_path / name
        assert path.lstat().st_mode == mode or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)
        if stat.S_ISREG(mode):
            assert path.read_bytes() == content
    assert (tmp_path / "folder/link").readlink().as_posix() == "../there"


def test_initramfs_devices():
    """LINUX-IMAGE-2: numbers of devices stand in their own fields, and in no other entry."""
    image = initramfs.archive([("a", FILE, b"x"), ("dev/console", stat.S_IFCHR | 0o600, b"")], {"dev/console": (5, 1)})
    second = image.index(b"070701", 6)
    fields = [int(image[second + 6 + 8 * n : second + 14 + 8 * n], 16) for n in range(13)]
    assert fields[1] == stat.S_IFCHR | 0o600
    assert fields[9:11] == [5, 1]
    assert image[6 + 8 * 9 : 6 + 8 * 11] == b"0" * 16


@pytest.mark.parametrize("damage", [lambda b: b[:-124], lambda b: b[:50], lambda b: b"070702" + b[6:], lambda b: b"", lambda b: b[:130]])
def test_initramfs_damaged(damage):
    """LINUX-IMAGE-3: an archive that ends early or is none is refused."""
    whole = initramfs.archive([("name", FILE, bytes(range(100)))])
    with pytest.raises(ValueError, match=r"Archive must have"):
        list(initramfs.entries(damage(whole)))
    with pytest.raises(ValueError, match=r"for name, not 130"):
        next(initramfs.entries(whole[:130]))  # half a file is never handed out


def test_initramfs_image(tmp_path):
    """LINUX-IMAGE-4: the image has a first process, a console, all jobs, and every library that its programs name."""
    path = initramfs.build()
    assert initramfs.build() == path
    found = {name: (mode, content) for name, mode, content in initramfs.entries(path.read_bytes())}
    assert found["init"][0] == stat.S_IFREG | 0o755
    assert stat.S_ISCHR(found["dev/console"][0])
    jobs = "tour rebind rescan reset sizes reboot wrongdma shell hello"
    assert {f"jobs/{name}" for name in jobs.split()} <= set(found)
    assert len(path.read_bytes()) < 25_000_000
    assert not [name for name in found if "/" in name and name.rpartition("/")[0] not in found]  # folders come before what is in them

    packages = debian.fetch(initramfs.PACKAGES)
    folder = packages / "usr/lib/x86_64-linux-gnu"
    for name in ("usr/bin/lspci", "usr/sbin/mke2fs", "usr/sbin/e2fsck"):
        loader = [packages / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", folder, "--list", packages / name]
        listed = subprocess.run(loader, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
        libraries = [line.split()[0].rpartition("/")[2] for line in listed.splitlines() if "=>" in line]
        assert "libc.so.6" in libraries
        assert not {f"usr/lib/x86_64-linux-gnu/{library}" for library in libraries} - set(found)
        assert found[name][1] == (packages / name).read_bytes()


def test_initramfs_jobs(tmp_path):
    """LINUX-IMAGE-5: other scripts give another image; a folder without first process, another architecture: refused."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "init").write_text("#!/bin/sh\n")
    with pytest.raises(ValueError, match=r"must have a file lib\.sh, not \['init'\]"):
        initramfs.build(jobs)
    (jobs / "lib.sh").write_text("")
    first = initramfs.build(jobs)
    (jobs / "lib.sh").write_text("# other")
    second = initramfs.build(jobs)
    assert first != second
    assert {name: content for name, _, content in initramfs.entries(second.read_bytes())}["jobs/lib.sh"] == b"# other"
    for path in (first, second):
        shutil.rmtree(path.parent)
    with pytest.raises(ValueError, match=r"not 'i386'"):
        initramfs.build(arch="i386")


def test_initramfs_syntax():
    """LINUX-IMAGE-6: busybox's shell can read every script."""
    image = initramfs.build().read_bytes()
    found = {name: content for name, _, content in initramfs.entries(image) if name == "init" or name.startswith("jobs/")}
    assert len(found) >= 10
    for name, content in found.items():
        done = subprocess.run([busybox(), "sh", "-n", "/dev/stdin"], input=content, stderr=subprocess.PIPE, timeout=60, check=False)
        assert done.returncode == 0 and not done.stderr, (name, done.stderr)
    broken = subprocess.run([busybox(), "sh", "-n", "/dev/stdin"], input=b"if true; then", stderr=subprocess.PIPE, timeout=60, check=False)
    assert broken.returncode


@pytest.mark.parametrize("key", [1, 3, 65521])
def test_initramfs_seed(tmp_path, key):
    """LINUX-IMAGE-7: the text that jobs write to disks is the one that its rule says."""
    sh(f"make_seed {tmp_path}/seed 4 {key}")
    x, lines = key % 65521 + 1, []
    for _ in range(64):
        line = ""
        while len(line) < 63:
            x = (x * 17364 + 11) % 65521
            line += f"{x:x}"
        lines.append(line[:63] + "\n")
    assert len(set(lines)) == 64
    assert hashlib.sha256((tmp_path / "seed").read_bytes()).digest() == hashlib.sha256("".join(lines).encode()).digest()


def test_initramfs_wait(tmp_path):
    """LINUX-IMAGE-8: a job's wait ends: at once when what it waits for is there, with an error when its time is up."""
    assert sh("wait_for 20 true && echo there") == "there\n"
    assert sh(f"( usleep 300000; touch {tmp_path}/late ) & wait_for 20 test -e {tmp_path}/late && echo there") == "there\n"
    assert sh("wait_for 1 false || echo over") == "over\n"
