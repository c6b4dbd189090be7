"""Sees every address an interpreted kernel touches: a stand-in for compute-sanitizer where there is no GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor


def addresses(tensor: Tensor) -> np.ndarray:
    """Of all elements, in order."""
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return tensor.data_ptr() + offsets.ravel() * tensor.element_size()


def beside(found: np.ndarray, allowed: np.ndarray, itemsize: int) -> np.ndarray:
    """The addresses found that are not among the allowed ones; quick where those are few runs of neighbors."""
    breaks = np.flatnonzero(np.diff(allowed) != itemsize)
    firsts, lasts = allowed[np.append(0, breaks + 1)], allowed[np.append(breaks, -1)]
    run = np.searchsorted(firsts, found, side="right") - 1
    return found[(run < 0) | (found > lasts[run]) | ((found - firsts[run]) % itemsize != 0)]


@contextmanager
def touching(reads: list[Tensor], writes: list[Tensor]) -> Iterator[None]:
    """While open, kernels may load these elements and no others, and must store each of those exactly once.

    Raises:
        AssertionError: at the first load or store beside them, or at the end.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    builder: Any = InterpreterBuilder
    readable = {
        size: np.unique(np.concatenate([addresses(x) for x in reads if x.element_size() == size]))
        for size in {x.element_size() for x in reads}
    }
    writable = np.unique(np.concatenate([addresses(x) for x in writes]))
    written = []
    load, store = builder.create_masked_load, builder.create_masked_store

    def unmasked(pointers: Any, mask: Any) -> np.ndarray:
        found, where = np.broadcast_arrays(pointers.data, mask.data)
        return found[where.astype(bool)].astype(np.int64)

    def watched_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        wrong = beside(unmasked(pointers, mask), readable[size], size)
        assert not len(wrong), f"{len(wrong)} loads beside the tensors, the first at {wrong[0]:#x}"
        return load(self, pointers, mask, *args)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        found = unmasked(pointers, mask)
        wrong = beside(found, writable, writes[0].element_size())
        assert not len(wrong), f"{len(wrong)} stores beside the tensors, the first at {wrong[0]:#x}"
        written.append(found)
        return store(self, pointers, value, mask, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        yield
    stored = np.sort(np.concatenate(written)) if written else np.zeros(0, dtype=np.int64)
    assert np.array_equal(stored, writable), f"{len(stored)} stores to {len(writable)} elements"
