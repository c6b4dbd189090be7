"""Shelf: access to the tables of many parts, each read from its file once, with little in memory."""

import io
import mmap
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from fasttrace.errors import StoreError
from fasttrace.runs.parts import read_part

__all__ = ["Shelf"]

IN_MEMORY = 64 * 2**20
"""Bytes of parts that are kept in memory; what is more goes into a temporary file."""
OPEN_TABLES = 16


class Shelf:
    """Tables of parts, in any order.

    Facts are given by id and lie in parts by shape, so that neighbours are in different parts. Read as they come, a
    part would be read for nearly every fact; kept in memory, a large run would not fit. So every part is read and
    checked once and its table put down as it is, in a file that the system maps into memory page by page.

    Args:
        paths: the parts'.

    Raises:
        StoreError: a part is damaged, gone or cannot be read, or there is no room for the temporary file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self.table = lru_cache(OPEN_TABLES)(self._table)
        try:
            self._content = self._filled(paths)
        except OSError as error:
            raise StoreError(
                f"no room for a temporary copy of the parts in {tempfile.gettempdir()} ({error}): free some space, or "
                "name another folder in the environment variable TMPDIR"
            ) from error

    def _filled(self, paths: Sequence[Path]) -> memoryview:
        if _bytes_of(paths) <= IN_MEMORY:
            memory = io.BytesIO()
            self._fill(memory, paths)
            return memory.getbuffer()
        with tempfile.TemporaryFile(prefix="fasttrace-") as file:
            self._fill(file, paths)
            file.flush()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _fill(self, file: Any, paths: Sequence[Path]) -> None:
        for path in paths:
            table, begin = read_part(path)[0], file.tell()
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            self._places[path.name] = begin, file.tell()

    def _table(self, name: str) -> pa.Table:
        begin, end = self._places[name]
        return pa.ipc.open_stream(pa.py_buffer(self._content[begin:end])).read_all()


def _bytes_of(paths: Sequence[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue  # reading it says why
    return total
