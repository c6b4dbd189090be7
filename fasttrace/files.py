"""Files: written whole or not at all, and parquet tables that carry JSON."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fasttrace.errors import StoreError

__all__ = ["FORMAT_VERSION", "atomic_write", "read_parquet", "write_parquet"]

FORMAT_VERSION = 1
SCHEMA_KEY = b"fasttrace"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Lends a temporary path beside ``path`` and renames it to ``path`` once the block has ended well.

    So a reader sees the old file or the whole new one. The folder is made when missing; the temporary file
    keeps the suffix and is removed whatever goes wrong, Ctrl-C included.

    Args:
        path: the file to appear; an existing one is replaced.

    Yields:
        The temporary path; the block has to create a file there.

    Raises:
        StoreError: the file cannot be written or renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".fasttrace-{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error}): give a path in a folder you may write to") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Without it a power cut after the rename can leave the new name with no content. A descriptor that may
    # write, because Windows syncs no other.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


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
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StoreError(f"{found} at {path}: expected a file written by TraceResult.save; check the path")
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(
            f"cannot read {path} ({reason}): it is no parquet file, or one cut short or damaged; "
            "trace again, or take it from a copy"
        ) from error


def _read_payload(table: pa.Table, path: Path) -> dict[str, Any]:
    stored = (table.schema.metadata or {}).get(SCHEMA_KEY)
    if stored is None:
        raise StoreError(f"{path} is a parquet file without fasttrace's metadata: give one from TraceResult.save")
    try:
        payload = json.loads(stored)
        version = int(payload["format_version"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} has damaged metadata ({error!r}): trace again, or take a copy") from error
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this fasttrace reads up to {FORMAT_VERSION}: upgrade fasttrace"
        )
    return payload
