"""`suffix_attention` on a CPU: one compiled loop over rows, heads and tokens, by numba.

A query reads just the keys that it sees, where they lie in the pack: nothing is gathered, padded or masked. torch's
attention needs tiles for that, and in a prompt of 7 tokens nine tenths of a tile are masked.

Everything is computed in float32; half precision is converted before and rounded once behind. Rows are dealt to
threads like cards, so that long and short ones mix. The loop is compiled once per size of a head, in two seconds, and
kept on disk where numba finds a place for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace_kernels.layout import AttentionLayout

FLAGS = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, so that they are vectors; inf and NaN keep their meaning."""

PARTS_A_THREAD = 4
FEWEST_TOKENS = 64
"""A thread more for so many tokens of a pack."""

_ONE_AT_A_TIME = Lock()
"""Some of numba's ways of running threads do not take two callers."""


@cache
def is_installed() -> bool:
    """Whether numba is there."""
    return find_spec("numba") is not None


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
    target = out if direct else torch.empty(out.shape, dtype=torch.float32)
    start, length, first, base_start = layout.rows
    with _ONE_AT_A_TIME, _threads(-(-layout.n_tokens // FEWEST_TOKENS)) as threads:
        _compiled(q.shape[2], v.shape[2])(
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
            np.zeros(0, np.float32) if sinks is None else sinks.float().numpy(),
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


@cache
def _compiled(d_key: int, d_value: int) -> Callable[..., None]:
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

    options: dict[str, Any] = {"parallel": True, "fastmath": FLAGS, "nogil": True}
    try:
        return numba.njit(loop, cache=True, **options)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(loop, **options)
