"""Debian packages without installing them, and the cache that they lie in."""

import os
import subprocess
import sys
import threading
import time

import pytest

from ringwall.sim.linux import cache, debian, initramfs


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGWALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archive(folder, name, files, links=()):
    """Return a package made here: ``files`` maps paths to texts."""
    tree = folder / f"{name}-tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control)
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    for path, target in links:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).symlink_to(target)
    command = ["dpkg-deb", "--root-owner-group", "--build", tree, folder / f"{name}.deb"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return folder / f"{name}.deb"


def test_debian_cache_folder(monkeypatch, tmp_path):
    """LINUX-CACHE-1: the variables that name the cache, in their order."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("RINGWALL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(cache.folder()) == "/home/someone/.cache/ringwall"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # such a value does not count
    assert str(cache.folder()) == "/home/someone/.cache/ringwall"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert str(cache.folder()) == "/var/cache/ringwall"
    monkeypatch.setenv("RINGWALL_CACHE", str(tmp_path))
    assert cache.folder() == tmp_path


def test_debian_cache_entry(own_cache):
    """LINUX-CACHE-2: an entry is made once; one that failed or was left half made is made anew and never seen."""
    calls = []

    def good(work):
        calls.append("good")
        assert list(work.iterdir()) == []
        (work / "file").write_text("text")

    def bad(work):
        calls.append("bad")
        (work / "half").write_text("x")
        raise RuntimeError("on purpose")

    assert cache.find("thing", "recipe") is None
    with pytest.raises(RuntimeError, match="on purpose"):
        cache.entry("thing", "recipe", bad)
    assert cache.find("thing", "recipe") is None
    assert [path.name for path in own_cache.iterdir()] == ["locks"]
    made = cache.entry("thing", "recipe", good)
    assert (made / "file").read_text() == "text" and not (made / "half").exists()
    assert (made / "recipe").read_text() == "recipe"
    assert cache.entry("thing", "recipe", bad) == made == cache.find("thing", "recipe")
    assert cache.entry("thing", "other recipe", good) != made
    assert calls == ["bad", "good", "good"]
    with pytest.raises(ValueError, match=r"not '\.\./x'"):
        cache.entry("../x", "recipe", good)


def test_debian_cache_race(own_cache):
    """LINUX-CACHE-3: of several that ask at once one makes the entry, and the others get it when it is whole."""
    calls, got = [], []

    def slow(work):
        calls.append(1)
        (work / "first").write_text("1")
        time.sleep(0.2)
        (work / "second").write_text("2")

    def ask():
        found = cache.entry("thing", "recipe", slow)
        got.append(sorted(path.name for path in found.iterdir()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(calls) == 1
    assert got == [["first", "recipe", "second"]] * 4


@pytest.mark.parametrize(
    "arguments",
    [(["a b"],), (["-o=x"],), ([],), ("flex",), (["flex"], "buster"), (["flex"], "sid-backports"), (["flex"], "bookworm", "i386")],
)
def test_debian_arguments(own_cache, arguments):
    """LINUX-DEBIAN-1: names, suites and architectures that are none are refused before anything is started."""
    with pytest.raises((ValueError, TypeError), match=r"not .*(a b|-o=x|\[\]|flex|buster|sid-b|i386)"):
        debian.fetch(*arguments)
    assert not own_cache.exists()


def test_debian_offline(own_cache, monkeypatch):
    """LINUX-DEBIAN-2: without network the message says from where, where to, and what to do; nothing is left in the cache."""
    monkeypatch.setenv("RINGWALL_DEBIAN_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(debian.FetchError, match=r"from http://127\.0\.0\.1:9\. They are needed once") as caught:
        debian.fetch(["flex"])
    assert str(own_cache) in str(caught.value) and "RINGWALL_DEBIAN_MIRROR" in str(caught.value)
    assert debian.find(["flex"]) is None


def test_debian_unpack(tmp_path):
    """LINUX-DEBIAN-3: packages of before and after the merge of / and /usr land in one tree; a broken archive is refused."""
    old = archive(tmp_path, "old", {"lib/x.so.1": "old", "bin/tool": "t"}, [("lib/x.so", "x.so.1")])
    new = archive(tmp_path, "new", {"usr/lib/y.so": "new", "usr/share/doc/new/copyright": "c"})
    tree = tmp_path / "tree"
    debian.unpack([old, new], tree)
    assert (tree / "usr/lib/x.so").read_text() == "old" == (tree / "lib/x.so.1").read_text()
    assert (tree / "lib/y.so").read_text() == "new" and (tree / "usr/bin/tool").read_text() == "t"
    assert all((tree / name).is_symlink() for name in ("bin", "sbin", "lib", "lib64"))
    (tmp_path / "bad.deb").write_bytes(old.read_bytes()[:-60])
    with pytest.raises(debian.FetchError, match=r"bad\.deb could not be unpacked"):
        debian.unpack([tmp_path / "bad.deb"], tmp_path / "tree2")


@pytest.mark.guest
def test_debian_fetch():
    """LINUX-DEBIAN-4: packages of Debian are there, with their versions, run from their folder, and are fetched once."""
    folder = debian.fetch(initramfs.PACKAGES)
    assert debian.versions(folder).keys() >= set(initramfs.PACKAGES) and debian.versions(folder)["e2fsprogs"].startswith("1.4")
    said = subprocess.run([folder / "usr/bin/busybox", "expr", "6", "*", "7"], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert said.stdout == "42\n"
    before = folder.stat().st_mtime_ns
    code = "from ringwall.sim.linux import debian, initramfs; print(debian.fetch(initramfs.PACKAGES), end='')"
    environment = os.environ | {"RINGWALL_DEBIAN_MIRROR": "http://127.0.0.1:9"}
    again = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, check=True, timeout=60)
    assert again.stdout == str(folder) and folder.stat().st_mtime_ns == before
