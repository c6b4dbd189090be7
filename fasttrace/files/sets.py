"""Sets of files that belong together in a folder: all of one set or all of another, never some of each.

A set is made in a hidden folder and moved into place. One of its files is its mark, which is removed first and written
last: a folder whose writer was killed has no mark, and nothing in it is taken for a whole set. Several writers take
turns.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fasttrace.errors import StoreError
from fasttrace.files.names import is_plain
from fasttrace.files.received import NONSENSE, parsed, read_regular
from fasttrace.files.writing import HOUR, TEMPORARY, remove_stale

try:
    import fcntl
except ImportError:  # Windows has no such locks: there writers do not take turns
    fcntl = None

__all__ = ["check_writable", "one_set"]

JOURNAL = f"{TEMPORARY}names.json"
"""Lists the names of a set that is being moved into place; left behind if the writer was killed."""
SCRATCH = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to. It tries, and leaves nothing behind.

    Raises:
        StoreError: it is a file, or lies in one, or may not be written to.
    """
    folder = folder.absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise StoreError(f"{existing} is a file, expected a folder: give another one with --out")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StoreError(f"{existing} cannot be written to: give another folder with --out")
        with _scratch(existing) as scratch:  # of the kind that the next writer removes, should this one be killed now
            (scratch / os.path.relpath(folder, existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written to ({error.strerror}): give another folder with --out") from error


@contextmanager
def one_set(
    folder: Path,
    mark: str,
    old: Callable[[Path], Iterable[str]],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Lends an empty folder, whose files replace those of an earlier set once the block has ended well.

    Args:
        folder: the set's place, made when missing; files of others in it are left alone.
        mark: name of the file without which there is no set.
        old: called with the folder; names of the files of an earlier set, which are removed.
        check: called when no other writer is at work, before anything is replaced; it may raise.

    Yields:
        The folder to write into. Files in it may lie in folders, one deep.

    Raises:
        StoreError: the folder cannot be written to.
    """
    check_writable(folder)
    target = folder.resolve()
    try:
        with _scratch(target) as scratch:
            yield scratch
            _place(target, scratch, mark, old, check)
    except OSError as error:
        raise StoreError(f"cannot write {folder} ({error}): give another folder with --out") from error


def _place(
    target: Path, scratch: Path, mark: str, old: Callable[[Path], Iterable[str]], check: Callable[[], None]
) -> None:
    if not target.exists():
        try:
            scratch.rename(target)
            return
        except OSError:
            if not target.is_dir():  # another writer has made it meanwhile, or else it cannot be made
                raise
    with _turn(target):
        check()
        _replace(target, scratch, mark, {*old(target), *_unfinished(target)})


def _replace(target: Path, scratch: Path, mark: str, stale: set[str]) -> None:
    names = sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())
    for name in {*stale, *names}:
        if (target / name).parent.is_symlink() and (target / name).parent != target:
            raise StoreError(f"{(target / name).parent} is a link to another folder: give another folder with --out")
    (target / JOURNAL).unlink(missing_ok=True)  # a link, should it be one, and not what it leads to
    with (target / JOURNAL).open("x") as journal:
        json.dump(sorted({*stale, *names}), journal)
    (target / mark).unlink(missing_ok=True)
    for name in stale:
        (target / name).unlink(missing_ok=True)
    for parent in {(target / name).parent for name in stale} - {target}:
        with suppress(OSError):
            parent.rmdir()  # unless others have files in it
    for name in sorted(names, key=lambda name: name == mark):
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(scratch / name, target / name)
    (target / JOURNAL).unlink(missing_ok=True)


def _unfinished(target: Path) -> set[str]:
    """Names of a set whose writer was killed."""
    try:
        names = parsed(read_regular(target / JOURNAL))
        return {name for name in names if all(map(is_plain, name.split("/", 1)))}
    except (*NONSENSE, OSError):
        return set()


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Waits for other writers of a folder; the system ends the turn of a killed one."""
    descriptor = _held(folder, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A hidden folder on the target's disk, removed at the end, together with those of killed writers."""
    home = target if target.is_dir() else target.parent
    home.mkdir(parents=True, exist_ok=True)
    for folder in {home, target.parent}:
        _remove_left(folder)
    scratch, descriptor = _new_scratch(home)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _new_scratch(home: Path) -> tuple[Path, int | None]:
    while True:
        scratch = home / f"{TEMPORARY}{secrets.token_hex(8)}"
        scratch.mkdir()
        descriptor = _held(scratch, wait=True)
        if scratch.exists():
            return scratch, descriptor
        if descriptor is not None:  # another writer took it for one that was left, before it was held
            os.close(descriptor)


def _remove_left(folder: Path) -> None:
    remove_stale(folder)
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if SCRATCH.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left(scratch: Path) -> bool:
    """Whether the writer of a hidden folder is gone: nobody holds it; where folders cannot be held, it is old."""
    if fcntl is not None:
        try:
            descriptor = _held(scratch, wait=False)
        except BlockingIOError:
            return False
        if descriptor is not None:
            os.close(descriptor)
            return True
    with suppress(OSError):
        return time.time() - scratch.stat().st_mtime > HOUR
    return False


def _held(folder: Path, wait: bool) -> int | None:
    """A descriptor that holds a folder until it is closed or the process ends; None where folders cannot be held.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
