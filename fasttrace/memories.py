"""What a process remembers from one trace to the next, in one place, so that all of it can be forgotten at once.

A memory holds what can be found out again: plans, packs, the parts of a model that were recognized, the engine that
passed its check, the kernel that was measured to be faster. Forgetting costs time; numbers change, by rounding, only
where a measurement between two libraries turns out the other way the next time. What is remembered of a model is weak:
it goes with the model.

No memory is declared elsewhere (`tests/test_memories.py`). What is no memory stays where it is: locks, and what
happens once in a process.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

    from torch import nn

Made = TypeVar("Made")

_CLEAR: dict[str, list[Callable[[], object]]] = {}
"""What empties the memories, by what they are about."""


def by_module(about: str = "models") -> "WeakKeyDictionary[nn.Module, Any]":
    """Makes a memory of what was found out about a module: what is kept for one goes when nobody else holds the module.

    What is kept must not refer to the module, which would then live on.
    """
    memory: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
    _declare(about, memory.clear)
    return memory


def by_case(about: str = "measurements") -> dict[Any, Any]:
    """Makes a memory of what was found out for a case that is a value, such as sizes and a dtype."""
    memory: dict[Any, Any] = {}
    _declare(about, memory.clear)
    return memory


def remembered(
    most: int | None = None, about: str = "values"
) -> Callable[[Callable[..., Made]], "_lru_cache_wrapper[Made]"]:
    """Makes a function remember its results, by its arguments.

    Args:
        most: results that are kept, the last used ones; None: all, for functions of few different arguments.
        about: what they are about, for `clear`.

    Returns:
        A decorator; see `functools.lru_cache` for what it adds to the function.
    """

    def remembering(make: Callable[..., Made]) -> "_lru_cache_wrapper[Made]":
        memory = lru_cache(maxsize=most)(make)
        _declare(about, memory.cache_clear)
        return memory

    return remembering


def clear(*about: str) -> None:
    """Forgets; not while a trace runs in another thread, which may be about to look up what it has just found out.

    Args:
        about: "models", "measurements", "plans", "packs", "warnings" (said once) or "values" (all else); none: all of
            them.

    Raises:
        KeyError: no memory is about that.
    """
    for each in about or tuple(_CLEAR):
        for forget in _CLEAR[each]:
            forget()


def _declare(about: str, forget: Callable[[], object]) -> None:
    _CLEAR.setdefault(about, []).append(forget)
