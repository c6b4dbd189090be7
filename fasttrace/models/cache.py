"""Folders that fasttrace makes once and keeps in the user's cache: models that were converted.

A folder is made beside its place and moved there when it is whole. Digests of its files lie in it and are checked at
every use, which takes half a second per gigabyte: neither damage nor another user's file is taken for a model.
"""

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from fasttrace.errors import ModelError

__all__ = ["cache_folder", "is_kept", "kept", "sha256"]

DIGEST_FILE = "digests.json"
STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """The folder in which fasttrace keeps models: `FASTTRACE_CACHE`, else the platform's user cache.

    Raises:
        ModelError: there is no such folder, as nobody's home is known.
    """
    chosen = os.environ.get("FASTTRACE_CACHE")
    try:
        return Path(chosen).expanduser().absolute() if chosen else _user_cache() / "fasttrace"
    except (RuntimeError, OSError) as error:  # no HOME and no entry in passwd; a working directory that is gone
        found = f"FASTTRACE_CACHE is {chosen!r}, which leads nowhere" if chosen else "there is no home folder"
        raise ModelError(
            f"{found} ({error}): set FASTTRACE_CACHE to a folder that can be written, for models that are converted"
        ) from error


def is_kept(name: str) -> bool:
    """Whether the cache has that folder; `kept` checks that it is whole.

    Raises:
        ModelError: see `cache_folder`.
    """
    return os.path.isfile(cache_folder() / name / DIGEST_FILE)


def kept(name: str, what: str, space: int, make: Callable[[Path, Path], None]) -> Path:
    """A folder of the cache, made by the first call.

    Processes may start at the same time: the first to finish moves its folder into place, the others use that one.

    Args:
        name: of the folder.
        what: it holds, for messages: a noun phrase.
        space: bytes that making it takes on the disk.
        make: called with a scratch folder, which is ours alone and will be removed, and with the folder to make.

    Raises:
        ModelError: too little space, or the cache cannot be written; the folder is not as it was made, or others may
            write to it; what `make` raises.
        KeyboardInterrupt: interrupted; as with every other failure nothing is left behind.
    """
    folder = cache_folder() / name
    try:
        _refuse_shared(folder.parent)
        if not is_kept(name):
            _refuse_incomplete(folder, what)
            _build(folder, what, space, make)
        _refuse_altered(folder, what)
    except OSError as error:
        raise ModelError(
            f"{what} cannot be written to or read from {folder.parent} ({error}): free some space (it needs "
            f"{_megabytes(space)}), or set FASTTRACE_CACHE to a folder that can be written"
        ) from error
    return folder


def sha256(path: Path) -> str:
    """Of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _refuse_shared(path: Path) -> None:
    """Raises where others could put another model in the place of this one; Windows itself keeps users apart."""
    if os.name != "posix" or not path.exists():
        return
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise ModelError(
            f"{path} belongs to another user, who can put any model there: set FASTTRACE_CACHE to a folder of your own"
        )
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and not (path.is_dir() and found.st_mode & stat.S_ISVTX):
        raise ModelError(
            f"other users may write to {path} and put any model there: run chmod go-w on it, or set FASTTRACE_CACHE to "
            "a folder of your own"
        )


def _refuse_altered(folder: Path, what: str) -> None:
    """Raises where the folder's files are not those that were made."""
    for path in (folder, *folder.iterdir()):
        _refuse_shared(path)
    try:
        expected = json.loads((folder / DIGEST_FILE).read_text(encoding="utf-8"))
    except ValueError:
        expected = None
    wrong = [DIGEST_FILE] if not isinstance(expected, dict) else _differing(expected, _digests(folder))
    if wrong:
        raise ModelError(
            f"{what}: the folder {folder} is not as it was converted ({', '.join(wrong)}), by damage or by a change: "
            "delete that folder and run again"
        )


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file but the digests' own and hidden ones, which file browsers leave."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != DIGEST_FILE and not path.name.startswith(".")]
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    return sha256(path) if path.is_file() else "not a regular file"


def _differing(expected: dict[str, str], found: dict[str, str]) -> Iterable[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _refuse_incomplete(folder: Path, what: str) -> None:
    if folder.exists():
        raise ModelError(f"{what}: the folder {folder} lacks {DIGEST_FILE}: delete that folder and run again")


def _build(folder: Path, what: str, space: int, make: Callable[[Path, Path], None]) -> None:
    """Makes the folder and moves it into place; all but the last step happens in a folder that is removed."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_stale(cache)
        _refuse_full(cache, what, space)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as scratch:
            made = Path(scratch) / "model"
            make(Path(scratch), made)
            _seal(made)
            _move_into_place(made, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{what} was not finished and nothing of it was kept: run again") from None


def _refuse_full(cache: Path, what: str, space: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < space:
        raise ModelError(
            f"{what} needs {_megabytes(space)} in {cache}, where {_megabytes(free)} are free: free some space, or set "
            "FASTTRACE_CACHE to a folder on another disk"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _seal(folder: Path) -> None:
    """Keeps the digests of what was made, and others from writing to it."""
    (folder / DIGEST_FILE).write_text(json.dumps(_digests(folder), indent=1), encoding="utf-8")
    for path in (folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def _remove_stale(cache: Path) -> None:
    """Drop what a killed process could not clean up."""
    for left in cache.glob(".building-*"):
        with suppress(FileNotFoundError):  # another process may be faster
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _move_into_place(made: Path, folder: Path) -> None:
    """Rename, which is atomic; when another process was faster, its folder stays."""
    try:
        made.rename(folder)
    except OSError:
        if not os.path.isfile(folder / DIGEST_FILE):
            raise
