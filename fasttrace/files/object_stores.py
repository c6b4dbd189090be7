"""Runs in an object store, read from a copy on this machine's disk, by pyarrow's file systems."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import pyarrow as pa
from pyarrow import fs

from fasttrace.errors import StoreError, first_line

__all__ = ["copied", "is_address"]


def is_address(folder: Any) -> TypeGuard[str]:
    """Whether a folder is named by an address, such as s3://bucket/run, and not by a path."""
    return isinstance(folder, str) and "://" in folder


def copied(address: str, file: str, folder: str, ending: str) -> "TemporaryDirectory[str]":
    """A copy of a run on this machine's disk, removed with the object that stands for it.

    Args:
        address: where the run is: s3://, gs://, abfs://, hdfs:// or file:///.
        file: a file of the run.
        folder: a folder of the run.
        ending: how the names of the files end that are copied from the folder.

    Raises:
        StoreError: pyarrow does not know the address, or the run cannot be read or copied.
    """
    try:
        system, root = fs.FileSystem.from_uri(address)
        parts = system.get_file_info(fs.FileSelector(f"{root}/{folder}", allow_not_found=True))
        names = [part.base_name for part in parts if part.is_file and part.base_name.endswith(ending)]
        copy = TemporaryDirectory(prefix="fasttrace-")
        Path(copy.name, folder).mkdir()
        wanted = [file] if system.get_file_info(f"{root}/{file}").is_file else []
        for name in [*wanted, *(f"{folder}/{name}" for name in names)]:
            fs.copy_files(f"{root}/{name}", os.path.join(copy.name, name), system, fs.LocalFileSystem())
    except (OSError, NotImplementedError, pa.ArrowException) as error:
        raise StoreError(
            f"cannot read {address} ({first_line(error)}): check the address and your access to it, or copy the run to "
            "a folder"
        ) from error
    return copy
