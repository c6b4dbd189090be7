"""The attention of `suffix_attention` by torch's own FlashAttention: a second way on a GPU, and a check of the first.

Every row is a sequence whose last `length` tokens ask: its keys are the base row's before `first` and its own behind
them, gathered into memory of their own. torch aligns causal masks of shorter queries to the last key, which is just
what such a row needs. Costs one copy of keys and values (the sum of all prompts instead of the pack) and a tile of 64
or more queries per row and head, so it suits long rows; half precision only, neither soft cap nor sinks.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace_kernels.layout import AttentionLayout, ranges


@dataclass(frozen=True)
class VarlenLayout:
    """The pack as sequences; `build` makes it.

    Attributes:
        keys: [gathered key] the token each is a copy of.
        query_ends: [row + 1] int32, where the queries of a row begin and the last one's end.
        key_ends: [row + 1] int32, the same for gathered keys.
        most_queries: of a row.
        most_keys: of a row.
        n_tokens: of the pack.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    n_tokens: int

    @classmethod
    def build(cls, layout: AttentionLayout) -> "VarlenLayout":
        """The sequences of a layout, on the device of its tables."""
        start, length, first, base_start = layout.rows
        parts = np.stack((base_start, start), axis=1).ravel(), np.stack((first, length), axis=1).ravel()
        tables = ranges(*parts), _ends(length), _ends(first + length)
        keys, query_ends, key_ends = (torch.from_numpy(table).to(layout.tokens.device) for table in tables)
        most = int(length.max(initial=0)), int((first + length).max(initial=0))
        return cls(keys, query_ends, key_ends, *most, layout.n_tokens)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: VarlenLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attends from every token of a pack to the prompt before it, [token, head, d_head].

    Args:
        q: [token, head, d_head] float16 or bfloat16 on a GPU.
        k: [token, kv_head, d_head].
        v: the same.
        layout: of the pack.
        scale: what scores are multiplied by; None is d_head ** -0.5.
        window: how many tokens a query sees, itself included; None is all of its prompt.
        softcap: must be 0.
        sinks: must be None.

    Raises:
        ValueError: something FlashAttention does not compute.
        RuntimeError: this torch has no `varlen_attn`, or no GPU.
    """
    if softcap or sinks is not None:
        raise ValueError("varlen_attn has neither soft caps nor sinks; use suffix_attention")
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"varlen_attn takes float16 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads do not fit each other: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise ValueError(f"varlen_attn takes heads of up to 256 in steps of 8, not {q.shape[2]}")
    if not len(q) == len(k) == layout.n_tokens:
        raise ValueError(f"the layout is of {layout.n_tokens} tokens, the tensors of {len(q)} and {len(k)}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens: pass window >= 1, or None for all tokens")
    if not q.is_cuda:
        raise RuntimeError(f"varlen_attn runs on CUDA tensors, these are on {q.device}")
    if not layout.n_tokens:
        return torch.empty_like(q)
    attend, options = _varlen_attn()
    keys, values = gathered(k, layout), gathered(v, layout)
    if "enable_gqa" in options:
        options = {"enable_gqa": q.shape[1] != k.shape[1]}
    else:
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values))
        options = {}
    return attend(
        q.contiguous(),
        keys,
        values,
        layout.query_ends,
        layout.key_ends,
        layout.most_queries,
        layout.most_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )


def gathered(states: Tensor, layout: VarlenLayout) -> Tensor:
    """Keys or values row by row, each with its prefix before it, [gathered key, kv_head, d_head]."""
    return states.index_select(0, layout.keys)


@cache
def _varlen_attn() -> tuple[Any, frozenset[str]]:
    """The function of this torch and its parameters; 2.11 wants as many key heads as query heads, 2.13 does not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise RuntimeError(f"torch {torch.__version__} has no varlen_attn; use suffix_attention") from error
    parameters = frozenset(inspect.signature(varlen_attn).parameters)
    if not {"scale", "window_size"} <= parameters:
        raise RuntimeError(f"varlen_attn of torch {torch.__version__} has no scale and no windows; torch 2.11 has")
    return varlen_attn, parameters


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
