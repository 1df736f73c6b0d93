"""The cache of everything that is fetched or built once per machine: packages, kernels, images of guests.

It lies outside the checkout, so that fresh clones share it.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ..builds import made_once

__all__ = ["entry", "find", "folder", "say"]


def folder() -> Path:
    """Return the folder of the cache: ``$RINGWALL_CACHE``, or ``ringwall`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    own = os.environ.get("RINGWALL_CACHE")
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ringwall"


def entry(name: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of the cache that ``make`` fills for ``recipe``, filled now if this is the first to ask for it.

    Several processes may ask at once: one makes it, the others wait. What is half made is never seen.

    Parameters
    ----------
    name : :class:`str`
        Beginning of the folder's name, for people.
    recipe : :class:`str`
        Everything that decides what is made; the folder's name ends with its digest, its text lies in the file ``recipe``.
    make : callable
        Is called with an empty folder. That folder is renamed afterwards: what is made must not contain its path.
    """
    final = _place(name, recipe)

    def filled(work):
        try:
            make(work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        (work / "recipe").write_text(recipe)

    return made_once(final, filled, waiting=lambda: say(f"another process makes {final.name}: waiting for it"))


def find(name: str, recipe: str) -> Path | None:
    """Return the folder that :func:`entry` returns for the same arguments if it is there, else None; makes nothing."""
    final = _place(name, recipe)
    return final if final.is_dir() else None


def say(text: str) -> None:
    """Tell the user that something takes a while."""
    print(f"ringwall: {text}", file=sys.stderr, flush=True)


def _place(name: str, recipe: str) -> Path:
    if not name or "/" in name:
        raise ValueError(f"Name of an entry must be the beginning of a file name, not {name!r}")
    return folder() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
