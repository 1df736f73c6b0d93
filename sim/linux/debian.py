"""Debian packages without installing them: downloaded by a private apt, unpacked into a folder."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import cache

__all__ = ["ARCHITECTURES", "FetchError", "fetch", "find", "unpack", "versions"]

ARCHITECTURES = {"amd64": "x86_64-linux-gnu", "riscv64": "riscv64-linux-gnu"}  # and the folder of each one's libraries
_RECIPE = 1  # part of every entry's digest: raise it when what is done to packages changes
_MIRROR = "http://deb.debian.org"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_STABLE = {"bookworm", "trixie"}
_MERGED = ("bin", "sbin", "lib", "lib64")  # folders that are links into usr in every Debian of today
_LIMIT_S = 1200  # bound of one call of a tool


class FetchError(RuntimeError):
    """Packages could not be fetched; the message says what to do."""


def fetch(packages: Sequence[str], suite: str = "bookworm", arch: str = "amd64", *, only: str = ".*") -> Path:
    """Return a folder of the cache into which ``packages`` are unpacked, fetched now if this is the first to ask for them.

    Nothing is installed and no right of an administrator is needed. The archive's signature is checked. The file
    ``versions`` in the folder has a line ``package version`` for each package that was unpacked.

    Parameters
    ----------
    packages : list of :class:`str`
        Names; the newest version of the suite is taken.
    suite : :class:`str`
        ``bookworm``, ``trixie`` (security updates included), ``sid``, or ``<suite>-backports``.
    arch : :class:`str`
        Key of :data:`ARCHITECTURES`.
    only : :class:`str`
        Pattern of the names that are unpacked, of the packages and what they depend on (not what they recommend).

    Raises
    ------
    :exc:`FetchError`
        Without network, for a package that the suite does not have, without apt or its keyring.
    """
    name, recipe = _entry(packages, suite, arch, only)
    return cache.entry(name, recipe, lambda work: _fetch(work, list(packages), suite, arch, only))


def find(packages: Sequence[str], suite: str = "bookworm", arch: str = "amd64", *, only: str = ".*") -> Path | None:
    """Return what :func:`fetch` returns for the same arguments if the cache has it, else None; fetches nothing."""
    return cache.find(*_entry(packages, suite, arch, only))


def versions(folder: Path) -> dict[str, str]:
    """Return the version of each package that is unpacked in ``folder``."""
    return dict(line.split() for line in (folder / "versions").read_text().splitlines())


def unpack(archives: Sequence[Path], folder: Path) -> None:
    """Unpack ``archives`` (files of the form .deb) into ``folder``, where bin, sbin, lib and lib64 are links into usr."""
    for name in _MERGED:
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"usr/{name}")
    for archive in archives:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as reader:
            command = ["tar", "-x", "-C", folder, "--keep-directory-symlink", "--no-same-owner", "--exclude=./usr/share/doc/*"]
            written = subprocess.run(command, stdin=reader.stdout, timeout=_LIMIT_S, check=False)
        if reader.returncode or written.returncode:
            raise FetchError(f"{archive} could not be unpacked into {folder}: is the disk full?")


def _entry(packages, suite, arch, only):
    if isinstance(packages, str) or not packages:
        raise TypeError(f"Packages must be a list of names, not {packages!r}")
    for name in packages:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
            raise ValueError(f"Package must be a name of the Debian archive, not {name!r}")
    if suite != "sid" and suite.removesuffix("-backports") not in _STABLE:
        raise ValueError(f"Suite must be sid, {', '.join(sorted(_STABLE))} or one of them with -backports, not {suite!r}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"Architecture must be one of {', '.join(ARCHITECTURES)}, not {arch!r}")
    recipe = f"packages {_RECIPE}\n{suite} {arch} only {only}\n" + "\n".join(sorted(packages)) + "\n"
    return f"debian-{suite}-{arch}", recipe


def _sources(suite, mirror):
    """Return the text of sources.list for ``suite``."""
    base = suite.removesuffix("-backports")
    lines = [f"{mirror}/debian {base}"]
    if base in _STABLE:
        lines.append(f"{mirror}/debian-security {base}-security")
    if suite != base:
        lines.append(f"{mirror}/debian {suite}")
    return "".join(f"deb [signed-by={_KEYRING}] {line} main\n" for line in lines)


def _fetch(work, packages, suite, arch, only):
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not installed: fetching Debian packages needs a Debian or a descendant of it")
    if not os.path.isfile(_KEYRING):
        raise FetchError(f"{_KEYRING} is missing: install the package debian-archive-keyring")
    mirror = os.environ.get("RINGWALL_DEBIAN_MIRROR", _MIRROR).rstrip("/")
    apt = work / "apt"
    for name in ("state/lists/partial", "cache/archives/partial", "parts"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(_sources(suite, mirror))
    (apt / "apt.conf").write_text(_settings(apt, suite, arch))

    cache.say(f"fetching {' '.join(packages)} of Debian {suite} ({arch})")
    _apt(apt, mirror, "update", "--error-on=any")
    archives = apt / "cache" / "archives"
    needed = re.findall(r"^Inst (\S+) \((\S+) ", _apt(apt, mirror, "install", "--simulate", *packages), re.MULTILINE)
    chosen = [f"{name}={version}" for name, version in needed if re.fullmatch(only, name)]
    if not chosen:
        raise FetchError(f"Of what {' '.join(packages)} depends on, no package is called {only}: {' '.join(name for name, _ in needed)}")
    _apt(apt, mirror, "download", *chosen, cwd=archives)
    found = sorted(archives.glob("*.deb"))
    unpack(found, work)
    (work / "versions").write_text("".join(f"{_version(file)}\n" for file in found))
    shutil.rmtree(apt)


def _settings(apt, suite, arch):
    lines = [
        f'Dir "{apt}"',
        f'Dir::State "{apt}/state"',
        f'Dir::State::status "{apt}/status"',
        f'Dir::Cache "{apt}/cache"',
        f'Dir::Etc "{apt}"',
        'Dir::Etc::sourcelist "sources.list"',
        'Dir::Etc::sourceparts "parts"',
        'Dir::Etc::parts "parts"',
        'Dir::Etc::preferencesparts "parts"',
        'Dir::Etc::preferences "none"',
        f'APT::Architecture "{arch}"',
        f'APT::Architectures "{arch}"',
        'APT::Install-Recommends "false"',
        'APT::Sandbox::User "root"',
        'Acquire::Languages "none"',
        'Acquire::Retries "3"',
        'Acquire::http::Timeout "30"',
        'Debug::NoLocking "true"',
        'Acquire::Check-Valid-Until "false"',  # a mirror that is weeks behind serves; signatures are checked all the same
    ]
    if suite.endswith("-backports"):
        lines.append(f'APT::Default-Release "{suite}"')
    # The host's settings do not count, but its way into the network does.
    host = subprocess.run(["apt-config", "dump", "Acquire"], stdout=subprocess.PIPE, text=True, timeout=60, check=False).stdout
    lines += [line.rstrip(";") for line in host.splitlines() if re.match(r"Acquire::https?::Proxy\b", line)]
    return "".join(f"{line};\n" for line in lines)


def _apt(apt, mirror, *arguments, cwd=None):
    environment = os.environ | {"APT_CONFIG": str(apt / "apt.conf"), "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["apt-get", "-q", *arguments], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=_LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return done.stdout
    said = "\n".join(line for line in done.stdout.splitlines() if line.startswith(("E:", "Err:", "W:")))
    if re.search(r"Unable to locate package|has no installation candidate|Couldn't find any package", said):
        raise FetchError(f"The suite does not have what was asked for.\n{said}")
    raise FetchError(
        f"Debian packages could not be fetched from {mirror}. They are needed once, then they stay in {cache.folder()}.\n"
        f"Connect to the network and run the same command again, set http_proxy, or set RINGWALL_DEBIAN_MIRROR to a mirror "
        f"that has /debian and /debian-security.\n{said or done.stdout[-2000:]}"
    )


def _version(archive):
    fields = ["dpkg-deb", "--showformat=${Package} ${Version}", "--show", archive]
    return subprocess.run(fields, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout.strip()
