"""Files that may have been made by anyone and lie anywhere: how they are read, and what may be in them.

Only regular files are read. A read that fails is tried again, because a disk across a network fails now and then, and
is never taken for damage. What a file holds is checked before it is used: a right checksum says that a file is what
was written, not that fasttrace wrote it.
"""

import json
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from fasttrace.errors import StoreError

__all__ = ["NONSENSE", "expect", "parsed", "patiently", "read_regular", "why"]

NONSENSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, pa.ArrowException)
"""What reading a value raises when the value is not what fasttrace writes."""
WAITS = (0.05, 0.2, 0.5)
"""Seconds to wait before a failed read is tried again."""
DEEPEST = 40
"""Levels of nested lists and objects in JSON; files of fasttrace have four."""
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
LARGEST = 2**63
SHOWN = 300
"""Characters of a reason that a message shows."""

Value = TypeVar("Value")


def patiently(read: Callable[[], Value]) -> Value:
    """What `read` gives; when it fails it is tried again a few times, within a second.

    Raises:
        OSError: the last try failed; without a file the first one, because waiting makes none.
    """
    for wait in WAITS:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(wait)
    return read()


def read_regular(path: Path) -> bytes:
    """Reads a whole file, if it is a regular one or a link to one.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is a folder, a FIFO, a socket or a device, or it cannot be read, also when tried again.
    """
    try:
        return patiently(lambda: _content(path))
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from error
    except FileNotFoundError:
        raise
    except MemoryError as error:
        raise StoreError(f"cannot read {path} (it does not fit in memory): free some memory, then try again") from error
    except OSError as error:
        raise StoreError(
            f"cannot read {path} ({error}; tried {len(WAITS) + 1} times): make it readable, or wait until its disk is "
            "there again, then start the same command again"
        ) from error


def _content(path: Path) -> bytes:
    _check_regular(os.stat(path), path)  # before it is opened, because that alone makes some devices do something
    # Not to wait, should it have become a FIFO since.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        _check_regular(os.fstat(file.fileno()), path)
        return file.read()


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "a device")
        raise StoreError(f"{kind} at {path}: expected a regular file; move it away, or check the path")


def parsed(text: str | bytes) -> Any:
    """Reads JSON that is nested no deeper than what fasttrace writes.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value = level = None
    else:
        level = [value]
        for _ in range(DEEPEST):
            level = [item for each in level for item in _items(each)]
    if level is None or level:
        raise ValueError(f"its JSON is nested more than {DEEPEST} deep")
    return value


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def why(error: BaseException) -> str:
    """An error as the reason in a message: short, on one line, whatever a file holds."""
    text = str(error) if isinstance(error, ValueError | OSError) and str(error) else repr(error)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def expect(right: Any, what: str) -> None:
    """Refuses a value that was read.

    Args:
        right: whether the value is acceptable.
        what: says what was found, and what was expected.

    Raises:
        ValueError: it is not.
    """
    if not right:
        raise ValueError(what)
