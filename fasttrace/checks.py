"""Checks of arguments: a plain value of Python's own comes out, or an error that names the argument.

Most take the argument's name, for the message, the value that was given, and as `error` the class of the error to
raise: a FasttraceError. Scalars of numpy and torch are taken where a number, a flag or a text is meant; True is not a
number. Nothing here imports numpy or torch, so that the command line can check its options before either is loaded.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from decimal import Decimal
from itertools import islice
from math import isfinite
from numbers import Real
from operator import index
from pathlib import Path
from reprlib import Repr
from typing import Any

from fasttrace.errors import EngineError, FasttraceError, PlanError, PromptError, StoreError, first_line

__all__ = [
    "flag",
    "function",
    "instance",
    "is_out_of_memory",
    "items",
    "mapping",
    "memory_for",
    "memory_told",
    "objects",
    "one_of",
    "path_of",
    "real_number",
    "shown",
    "span_of",
    "text",
    "token_ids",
    "whole_number",
]

SHOWN = 80
"""Characters of a wrong value that a message shows."""

LARGEST = 2**63 - 1
"""Largest whole number: those beyond it fit into no array."""

LONGEST_NAME = 255
"""Bytes of a file's name, on all usual file systems."""

MOST_ITEMS = 1_000_000
"""Items that a list may have: an iterator without an end is refused there."""

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "FATAL ERROR :: MALLOC failed",
)
"""What torch says of devices and of the host."""

SMALL_BYTES = 2**28
"""Main memory that is taken to be there without asking."""

Errors = type[FasttraceError]

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    try:
        found = " ".join(_REPR.repr(value).split())
    except Exception:  # an object whose repr fails, or a number of more digits than Python writes
        found = f"an object of type {type(value).__name__}"
    return found if len(found) <= SHOWN else f"{found[: SHOWN - 3]}..."


def whole_number(
    name: str,
    value: Any,
    least: int = -LARGEST,
    most: int = LARGEST,
    *,
    meaning: str = "",
    error: Errors = PlanError,
) -> int:
    """A whole number, also of numpy or torch; neither True nor 3.0 is one.

    Args:
        name: argument's name.
        value: what was given.
        least: smallest number allowed.
        most: largest number allowed.
        meaning: what the number says, such as "noise draws".
        error: class of the error.

    Raises:
        FasttraceError: it is not a whole number, or outside the range.
    """
    number = _plain(value)
    try:
        found = None if isinstance(number, bool) or getattr(number, "ndim", 0) else int(index(number))
    except Exception:  # whatever the object does when it is asked
        found = None
    if found is None or not least <= found <= most:
        kind = "a smaller whole number" if found is not None and found > LARGEST else "a whole number"
        wanted = " ".join(filter(None, (kind, _range(least, most), meaning and f"({meaning})")))
        raise error(f"{name} is {shown(value)}: expected {wanted}")
    return found


def real_number(
    name: str, value: Any, least: float | None = None, *, meaning: str = "", error: Errors = PlanError
) -> float:
    """A finite number, also of numpy or torch; see `whole_number`.

    Raises:
        FasttraceError: it is not a number, not finite, or too small.
    """
    number = _plain(value)
    found = None
    if isinstance(number, Real | Decimal) and not isinstance(number, bool):
        with suppress(OverflowError, ValueError):
            found = float(number)
    if found is None or not isfinite(found) or (least is not None and found < least):
        bound = "" if least is None else f">= {least:g}"
        wanted = " ".join(filter(None, ("a finite number", bound, meaning and f"({meaning})")))
        raise error(f"{name} is {shown(value)}: expected {wanted}")
    return found


def flag(name: str, value: Any, *, error: Errors = PlanError) -> bool:
    """True or False, also of numpy or torch.

    Raises:
        FasttraceError: it is neither; 0, 1 and "no" are neither.
    """
    found = _plain(value)
    if not isinstance(found, bool):
        raise error(f"{name} is {shown(value)}: expected True or False")
    return found


def text(name: str, value: Any, *, error: Errors = PlanError, empty: bool = False) -> str:
    """A text that can be stored: a plain `str`, also from numpy's texts and from enums.

    With `empty` it may be empty, or nothing but white space.

    Raises:
        FasttraceError: it is not text, is empty, or holds half of a character.
    """
    value = _plain(value)
    if not isinstance(value, str):
        raise error(f"{name} is {shown(value)}: expected text")
    found = str.__str__(value)
    if not empty and not found.strip():
        raise error(f"{name} is empty: expected text")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise error(f"{name} is {shown(found)}, with half of a character: expected text that UTF-8 can hold") from None
    return found


def one_of(name: str, value: Any, names: Sequence[str], *, error: Errors = PlanError) -> str:
    """One of some names.

    Raises:
        FasttraceError: it is not among them.
    """
    found = _plain(value)
    if not isinstance(found, str) or str.__str__(found) not in names:
        raise error(f"unknown {name} {shown(value)}: give one of {', '.join(names)}")
    return str.__str__(found)


def path_of(name: str, value: Any, *, file: bool = False, error: Errors = StoreError) -> Path:
    """A path from a text or a path; with `file` one that ends in a name, as that of a file to be written does.

    Raises:
        FasttraceError: it is not a path, is empty, or has a character or a name that no path has.
    """
    try:
        found = os.fspath(value)
        os.fsencode(found)
    except Exception:  # no path, or one that fails when it is asked
        found = None
    if not isinstance(found, str) or not found.strip() or "\0" in found:
        raise error(f"{name} is {shown(value)}: expected a path")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(found).parts):
        raise error(f"{name} is {shown(value)}, with a name of more than {LONGEST_NAME} bytes: expected a shorter one")
    if file and Path(found).name in ("", ".."):
        raise error(f"{name} is {shown(value)}: expected the path of a file")
    return Path(found)


def function(name: str, value: Any) -> Any:
    """Something that can be called, or None.

    Raises:
        PlanError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise PlanError(f"{name} is {shown(value)}: expected a function, or None")
    return value


def instance(name: str, value: Any, kind: type, source: str, *, error: Errors = PlanError) -> Any:
    """An object of one of our classes; `source` tells where to get one.

    Raises:
        FasttraceError: it is of another class.
    """
    if not isinstance(value, kind):
        raise error(f"{name} is {shown(value)}: expected a {kind.__name__}, as from {source}")
    return value


def objects(name: str, value: Any, kind: type, source: str, *, error: Errors = PlanError) -> Iterator[Any]:
    """Objects of one of our classes from any iterable, asked for one by one; see `instance`.

    Raises:
        FasttraceError: it cannot be iterated over, or, once reached, an item is of another class.
    """
    try:
        each = None if isinstance(value, str | bytes | Mapping | type) else iter(value)
    except Exception:  # whatever the object does when it is asked
        each = None
    if each is None:
        raise error(f"{name} is {shown(value)}: expected objects of class {kind.__name__}, as from {source}")
    return (instance(f"{name}[{place}]", item, kind, source, error=error) for place, item in enumerate(each))


def mapping(name: str, value: Any, *, error: Errors = PlanError) -> Mapping[Any, Any]:
    """A dict, or what acts as one.

    Raises:
        FasttraceError: it is not.
    """
    if not isinstance(value, Mapping):
        raise error(f"{name} is {shown(value)}: expected a dict")
    return value


def items(name: str, value: Any, wanted: str, *, error: Errors = PlanError) -> list[Any]:
    """The items of a list, a tuple, an array, a table's column or a generator.

    Sets are refused because their order changes from start to start; text, dicts and bytes because their items are not
    what is meant. `wanted` says in the message what is expected, such as "a list of names".

    Raises:
        FasttraceError: it has no items, no order, or too many items.
    """
    if isinstance(value, Set):
        raise error(f"{name} is {shown(value)}, and a set has no order: expected {wanted}")
    found = None
    if not isinstance(value, str | bytes | bytearray | memoryview | Mapping | type):
        found = _list_of(value)
    if found is None:
        raise error(f"{name} is {shown(value)}: expected {wanted}")
    if len(found) > MOST_ITEMS:
        raise error(f"{name} has more than {MOST_ITEMS:,} items: expected {wanted}")
    return found


def token_ids(name: str, value: Any, *, error: Errors = PromptError) -> list[int]:
    """Token ids from a list, an array or a tensor [token], or [1, token] as tokenizers give it.

    Raises:
        FasttraceError: an id is not a whole number, or there are none.
    """
    if isinstance(value, Mapping) and "input_ids" in value:
        raise error(f"{name} is what a tokenizer returned: give its ['input_ids']")
    ids = items(name, value, "text, or a list of whole token ids", error=error)
    if len(ids) == 1 and isinstance(ids[0], list) and not isinstance(value, list | tuple):
        ids = ids[0]
    if not ids:
        raise error(f"{name} is empty; give at least one token id")
    return [whole_number(f"{name}[{place}]", each, meaning="a token id", error=error) for place, each in enumerate(ids)]


def span_of(name: str, value: Any, *, error: Errors = PromptError) -> tuple[int, int]:
    """A half-open token span from (begin, end), also as a list, array, tensor, range or slice.

    Raises:
        FasttraceError: it is not a span.
    """
    if isinstance(value, range | slice):
        begin, end, step = value.start, value.stop, value.step
        given = [begin, end] if step in (None, 1) else []
    else:
        given = None if isinstance(value, Set | Mapping | str | bytes | bytearray | memoryview) else _list_of(value)
    if given is None or len(given) != 2:
        raise error(f"{name} is {shown(value)}; give its text, or a half-open token span such as (0, 4)")
    begin, end = (whole_number(f"{name}[{place}]", each, error=error) for place, each in enumerate(given))
    return begin, end


def memory_for(name: str, value: int, needed: int, what: str) -> None:
    """Refuses a number whose consequences the free main memory cannot hold.

    Args:
        name: argument's name.
        value: the number.
        needed: bytes that it takes, in proportion to it.
        what: what takes them, for the message.

    Raises:
        PlanError: it is too large, with the largest that will do.
    """
    if needed <= SMALL_BYTES:
        return
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free"
        raise PlanError(f"{name} is {value}: {what} would take {sizes}; give at most {max(1, value * free // needed)}")


@contextmanager
def memory_told(doing: str, advice: str = "lower samples or budget, or free memory") -> Iterator[None]:
    """Turns an out-of-memory error into one that says what to do.

    Raises:
        EngineError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(f"out of memory while {doing} ({first_line(error)}): {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device ran out."""
    if isinstance(error, FasttraceError):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own, anything else as it is."""
    with suppress(Exception):  # a tensor without data, or whatever an object does when it is asked
        item: Callable[[], Any] = value.item
        if value.ndim == 0 and not hasattr(value, "mask"):
            return item()
    return value


def _list_of(value: Any) -> list[Any] | None:
    """The items of anything that has some; arrays and tensors as lists of Python's numbers."""
    with suppress(Exception):  # whatever the object does when it is asked
        if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, Iterable) and not hasattr(value, "columns"):  # a table's items are its columns' names
            return list(islice(value, MOST_ITEMS + 1))
    return None


def _range(least: int, most: int) -> str:
    if most < LARGEST:
        return f"from {least} to {most}"
    return f">= {least}" if least > -LARGEST else ""
