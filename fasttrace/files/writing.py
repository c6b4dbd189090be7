"""Files that are written whole or not at all, and parquet tables that carry JSON."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError
from fasttrace.files.received import NONSENSE, expect, parsed, read_regular, why

__all__ = [
    "FORMAT_VERSION",
    "SCHEMA_KEY",
    "TEMPORARY",
    "as_utf8",
    "atomic_write",
    "clock_of",
    "paths_in",
    "plain_json",
    "read_parquet",
    "remove_stale",
    "set_aside",
    "write_new",
    "write_parquet",
]

FORMAT_VERSION = 2
"""1 had no metric but prob; it is read."""
SCHEMA_KEY = b"fasttrace"
TEMPORARY = ".fasttrace-"
HOUR = 3600.0
WRITABLE = "give a path in a folder you may write to"


@contextmanager
def atomic_write(path: str | os.PathLike[str], advice: str = WRITABLE) -> Iterator[Path]:
    """Lends a temporary path beside ``path`` and renames it to ``path`` once the block has ended well.

    So a reader sees the old file or the whole new one. The folder is made when missing; the temporary file
    keeps the suffix and is removed whatever goes wrong, Ctrl-C included.

    Args:
        path: the file to appear; an existing one is replaced.
        advice: how the message ends when the file cannot be written: what to do.

    Yields:
        The temporary path; the block has to create a file there.

    Raises:
        StoreError: the file cannot be written or renamed.
    """
    path = Path(path)
    with _scratch(path, advice) as temporary:
        yield temporary
        _sync(temporary)
        _rename(temporary, path)
        _sync_folder(path.parent)


def write_new(path: str | os.PathLike[str], content: bytes, advice: str = WRITABLE) -> bool:
    """Writes a file unless there is one, whole or not at all, even when two processes try at once.

    Args:
        path: the file to appear; an existing one stays as it is.
        content: its bytes.
        advice: how the message ends when the file cannot be written: what to do.

    Returns:
        True when this call made the file, False when there was one already.

    Raises:
        StoreError: the file cannot be written.
    """
    path = Path(path)
    with _scratch(path, advice) as temporary:
        temporary.write_bytes(content)
        _sync(temporary)
        made = _link(temporary, path)
        _sync_folder(path.parent)
    return made


@contextmanager
def _scratch(path: Path, advice: str) -> Iterator[Path]:
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error}): {advice}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Without it a power cut after the rename can leave the new name with no content. A descriptor that may
    # write, because Windows syncs no other.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Makes the new name last through a power cut. Some systems open or sync no folders; the file is whole anyway.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(temporary: Path, path: Path) -> None:
    made = os.stat(temporary)
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        # NFS asks again when an answer was lost, and is then told that the file is gone which it renamed before.
        if not _is(path, made):
            raise


def _link(temporary: Path, path: Path) -> bool:
    made = os.stat(temporary)
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Here too the file that is in the way may be this one.
        return _is(path, made)
    except OSError:
        # A file system without hard links, where a rename has to do.
        if path.exists():
            return False
        os.replace(temporary, path)
    return True


def _is(path: Path, made: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), made)
    except OSError:
        return False


def clock_of(folder: Path) -> float | None:
    """What time it is by the clock of a folder's file system, which may be another machine's.

    A file is made for it and removed. By this a listing of the folder that NFS keeps in memory becomes a new one, too.

    Args:
        folder: an existing one.

    Returns:
        Seconds, as in the times of files; None if no file can be made there.
    """
    probe = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        with probe.open("xb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def paths_in(folder: Path, pattern: str) -> list[Path]:
    """Paths in a folder whose names match a pattern, sorted; none where it cannot be listed.

    For files that only help: what is missed there does no harm.
    """
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def remove_stale(folder: Path, age: float = HOUR) -> None:
    """Removes temporary files that killed processes left in a folder.

    Args:
        folder: whose files to look at; not those below it.
        age: seconds since a file was last written, by the file system's clock; a living process is done with one long
            before an hour.
    """
    left = paths_in(folder, f"{TEMPORARY}*")
    now = clock_of(folder) if left else None  # asking leaves a file of its own, should the process be killed now
    if now is None:
        return
    for path in left:
        with suppress(OSError):
            if now - path.stat().st_mtime > age:
                path.unlink()


def set_aside(path: Path, folder: Path) -> Path | None:
    """Moves a damaged file into a folder, where it replaces no other.

    Args:
        path: the file.
        folder: made when missing, on the same disk.

    Returns:
        Where it is now; None when another process had moved it already.

    Raises:
        StoreError: it cannot be moved.
    """
    target = folder / path.name
    if target.exists():
        target = folder / f"{path.stem}-{secrets.token_hex(4)}{path.suffix}"
    try:
        folder.mkdir(exist_ok=True)
        os.replace(path, target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot move the damaged {path} ({error}): move it away, then run again") from error
    return target


def write_parquet(path: str | os.PathLike[str], frame: pd.DataFrame, payload: Mapping[str, Any]) -> None:
    """Writes a frame as parquet, with a payload as JSON in the schema's metadata.

    Args:
        path: the file; an existing one is replaced.
        frame: the table.
        payload: JSON values; the format version is added.

    Raises:
        StoreError: the file cannot be written.
    """
    table = pa.Table.from_pandas(frame, preserve_index=False)
    stored = json.dumps({"format_version": FORMAT_VERSION, **payload}).encode()
    metadata = {**(table.schema.metadata or {}), SCHEMA_KEY: stored}
    with atomic_write(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)


def read_parquet(path: str | os.PathLike[str]) -> tuple[pa.Table, dict[str, Any]]:
    """Reads what `write_parquet` wrote.

    Args:
        path: the file.

    Returns:
        The table and the payload.

    Raises:
        StoreError: no such file, not a file of fasttrace, damaged, or written by a newer fasttrace.
    """
    table = _read_table(Path(path))
    return table, _read_payload(table, Path(path))


def _read_table(path: Path) -> pa.Table:
    try:
        content = read_regular(path)
    except FileNotFoundError as error:
        raise StoreError(f"nothing at {path}: expected a file written by TraceResult.save; check the path") from error
    try:
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True, use_threads=False)
        table.validate(full=True)
        return table
    except (*NONSENSE, OSError, MemoryError) as error:
        raise StoreError(
            f"cannot read {path} ({why(error)}): it is not a parquet file, or is cut short or damaged; "
            "trace again, or take it from a copy"
        ) from error


def _read_payload(table: pa.Table, path: Path) -> dict[str, Any]:
    stored = (table.schema.metadata or {}).get(SCHEMA_KEY)
    if stored is None:
        raise StoreError(f"{path} is a parquet file without fasttrace's metadata: give one from TraceResult.save")
    try:
        payload = parsed(stored)
        version = payload["format_version"]
        expect(type(version) is int and version > 0, f"format version {version!r}: expected a whole number")
    except NONSENSE as error:
        raise StoreError(f"{path} has damaged metadata ({why(error)}): trace again, or take a copy") from error
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this fasttrace reads up to {FORMAT_VERSION}: upgrade fasttrace"
        )
    return payload


def plain_json(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Turns values into what JSON gives back: tuples into lists, numbers of numpy into plain ones.

    Args:
        values: by name.
        name: what they are, for the message.

    Raises:
        StoreError: a value that JSON cannot hold.
    """

    def number(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"found {value!r}")

    try:
        return json.loads(json.dumps(dict(values), default=number))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"the {name} is to be stored as JSON ({error}): give texts, numbers or lists") from error


def as_utf8(text: Any) -> Any:
    """A text, or a list of texts, as Arrow can hold it: lone surrogates become "?"; other values stay."""
    if isinstance(text, list):
        return [as_utf8(item) for item in text]
    # Arrow strings are UTF-8, which has no lone surrogates; the JSON in `details` keeps them.
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else text
