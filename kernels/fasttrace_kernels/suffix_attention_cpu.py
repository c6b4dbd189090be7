"""`suffix_attention` on a CPU: one compiled loop over rows, heads and tokens, by numba.

A query reads just the keys that it sees, where they lie in the pack: nothing is gathered, padded or masked. torch's
attention needs tiles for that, and in a prompt of 7 tokens nine tenths of a tile are masked.

Everything is computed in float32; half precision is converted before and rounded once behind. Rows are dealt to
threads like cards, so that long and short ones mix. The loop is compiled once per size of a head, in two seconds, and
kept on disk where numba finds a place for it. A process that was forked off one in which it ran cannot run it: OpenMP's
threads do not survive that. Where numba has neither OpenMP nor TBB, its threads take one caller of a process at a time,
so other code of the user's that numba runs in parallel must not run beside a trace.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace_kernels.layout import AttentionLayout

logger = logging.getLogger("fasttrace")

FLAGS = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, so that they are vectors; inf and NaN keep their meaning."""

PARTS_A_THREAD = 4
FEWEST_TOKENS = 64
"""A thread more for so many tokens of a pack."""

_ONE_AT_A_TIME = Lock()
"""Some of numba's ways of running threads do not take two callers."""

_STARTED: set[int] = set()
"""The process in which numba's threads were started; a process forked off it inherits the note, not the threads."""

_CACHE_FAILED = (OSError, EOFError, pickle.UnpicklingError)
_NOT_KEPT: set[tuple[int, int]] = set()
"""Sizes of heads whose loop could not be written to the disk, or read from it."""


@cache
def is_installed() -> bool:
    """Whether numba can be imported; one that cannot, says why once."""
    try:
        import_module("numba")
    except ModuleNotFoundError:
        return False
    except ImportError as error:  # of another version than numpy's, say
        logger.warning("numba is there but cannot be imported, attention does without: %s", error)
        return False
    return True


def is_usable() -> bool:
    """Whether numba can run here: it is installed, and this process was not forked off one in which it ran."""
    return is_installed() and not _STARTED - {os.getpid()}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    scale: float,
    window: int | None,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the attention of a pack to `out`; arguments as in `suffix_attention`, checked there."""
    if not layout.n_tokens:
        return
    queries, keys, values = (_as_float32(x) for x in (q, k, v))
    direct = out.dtype == torch.float32 and out.is_contiguous()
    target = out if direct else torch.empty(out.shape, dtype=torch.float32, device="cpu")
    start, length, first, base_start = layout.rows
    with _ONE_AT_A_TIME, _threads(-(-layout.n_tokens // FEWEST_TOKENS)) as threads:
        _run(
            (q.shape[2], v.shape[2]),
            *map(_flat, (queries, keys, values, target)),
            *(stride for x in (queries, keys, values) for stride in x.stride()[:2]),
            q.shape[1],
            q.shape[1] // k.shape[1],
            start,
            length,
            first,
            base_start,
            layout.longest,
            np.float32(scale),
            window or layout.longest,
            np.float32(softcap),
            np.zeros(0, np.float32) if sinks is None else sinks.detach().float().numpy(),
            threads * PARTS_A_THREAD,
        )
    if not direct:
        out.copy_(target)


@contextmanager
def _threads(most: int) -> Iterator[int]:
    """While open, numba takes as many threads as torch, but no more than `most`; afterwards both have those they had.

    numba's OpenMP may be torch's own, and starting its threads then changes torch's number.
    """
    import numba

    _STARTED.add(os.getpid())
    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    threads = max(1, min(of_torch, most, numba.config.NUMBA_NUM_THREADS))  # pyright: ignore[reportAttributeAccessIssue]
    numba.set_num_threads(threads)
    try:
        yield threads
    finally:
        numba.set_num_threads(of_numba)
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)


def _as_float32(x: Tensor) -> Tensor:
    x = x.detach().float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(x: Tensor) -> np.ndarray:
    """The memory from the first element to the last one, as one row of numbers."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).numpy()


def _run(sizes: tuple[int, int], *arguments: Any) -> None:
    if sizes not in _NOT_KEPT:
        try:
            return _compiled(*sizes, kept=True)(*arguments)
        except _CACHE_FAILED as error:
            logger.warning("numba's folder of compiled code fails, attention is compiled for this process: %s", error)
            _NOT_KEPT.add(sizes)
    return _compiled(*sizes, kept=False)(*arguments)


@cache
def _compiled(d_key: int, d_value: int, kept: bool) -> Callable[..., None]:
    """The loop for one size of heads: with it known, products over a head are a few vector instructions."""
    import numba

    def loop(
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        q_token: int,
        q_head: int,
        k_token: int,
        k_head: int,
        v_token: int,
        v_head: int,
        n_heads: int,
        group: int,
        start: Any,
        length: Any,
        first: Any,
        base_start: Any,
        longest: int,
        scale: Any,
        window: int,
        softcap: Any,
        sinks: Any,
        parts: int,
    ) -> None:
        for part in numba.prange(parts):
            weights = np.empty(longest, dtype=np.float32)
            summed = np.empty(d_value, dtype=np.float32)
            for row in range(part, len(start), parts):
                for head in range(n_heads):
                    # Where key 0 of the prefix and of the row itself would be, were they all there.
                    key_prefix = base_start[row] * k_token + head // group * k_head
                    key_own = (start[row] - first[row]) * k_token + head // group * k_head
                    value_prefix = base_start[row] * v_token + head // group * v_head
                    value_own = (start[row] - first[row]) * v_token + head // group * v_head
                    for nth in range(length[row]):
                        token = start[row] + nth
                        position = first[row] + nth
                        low = max(0, position + 1 - window)
                        begin = token * q_token + head * q_head
                        query = q[begin : begin + d_key]
                        highest = np.float32(-np.inf)
                        total = np.float32(0)
                        if len(sinks):
                            highest = sinks[head]
                        for at in range(low, position + 1):
                            begin = (key_prefix if at < first[row] else key_own) + at * k_token
                            key = k[begin : begin + d_key]
                            score = np.float32(0)
                            for i in range(d_key):
                                score += query[i] * key[i]
                            score *= scale
                            if softcap:
                                score = softcap * np.tanh(score / softcap)
                            weights[at] = score
                            highest = max(highest, score)
                        if len(sinks):
                            total = np.exp(sinks[head] - highest)
                        for i in range(d_value):
                            summed[i] = 0
                        for at in range(low, position + 1):
                            weight = np.exp(weights[at] - highest)
                            total += weight
                            begin = (value_prefix if at < first[row] else value_own) + at * v_token
                            value = v[begin : begin + d_value]
                            for i in range(d_value):
                                summed[i] += weight * value[i]
                        begin = (token * n_heads + head) * d_value
                        result = out[begin : begin + d_value]
                        for i in range(d_value):
                            result[i] = summed[i] / total

    # A file for each size: processes that write to one file at once may mix up what belongs to which size.
    loop.__qualname__ = f"loop_{d_key}_{d_value}"
    options: dict[str, Any] = {"parallel": True, "fastmath": FLAGS, "nogil": True}
    try:
        return numba.njit(loop, cache=kept, **options)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(loop, **options)
