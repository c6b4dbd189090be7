"""Causal attention of a pack of rows that begin anywhere in their prompts, in one launch.

`AttentionLayout` says which keys a token sees; `reference.suffix_attention` is the specification. On a GPU this is the
Triton kernel of `suffix_attention_kernel.py`, on a CPU the loop of `suffix_attention_cpu.py` where numba is installed,
elsewhere the kernel's tiles in a few torch calls.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fasttrace_kernels import suffix_attention_cpu
from fasttrace_kernels.layout import TILE_FIELDS, AttentionLayout

Backend = Literal["auto", "triton", "numba", "torch"]

CHUNK_BYTES = 32 << 20
"""Keys and values that the torch path gathers at a time."""


@dataclass(frozen=True)
class Config:
    """How the kernel is compiled: (token, head) pairs and keys of a block, warps of a program, blocks in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What is taken by all but torch, which takes float64 too."""

LONG = 256
"""Tokens of a prompt from which on blocks are the larger ones."""

CONFIGS = {
    # (half precision, padded d_head, long prompts)
    (True, 16, False): Config(64, 32, 4, 2),
    (True, 32, False): Config(64, 32, 4, 2),
    (True, 64, False): Config(64, 32, 4, 2),
    (True, 128, False): Config(64, 32, 4, 2),
    (True, 256, False): Config(64, 32, 8, 2),
    (True, 16, True): Config(128, 64, 8, 3),
    (True, 32, True): Config(128, 64, 8, 3),
    (True, 64, True): Config(128, 64, 8, 3),
    (True, 128, True): Config(128, 64, 8, 2),
    (True, 256, True): Config(64, 32, 8, 2),
    (False, 16, False): Config(32, 32, 4, 2),
    (False, 32, False): Config(32, 32, 4, 2),
    (False, 64, False): Config(32, 16, 4, 2),
    (False, 128, False): Config(16, 32, 4, 2),
    (False, 256, False): Config(16, 16, 4, 3),
}
"""Found by compiling for sm_80 and sm_90 without register spills, not by timing; `tests/kernels/compile_*.py` holds
them to that."""

MAX_FOLD = 16
"""Query heads of one key-value head that a program takes together, at most."""


def config_of(dtype: torch.dtype, d_head: int, longest: int) -> Config:
    """The configuration of the kernel for heads of this size and prompts of up to `longest` tokens."""
    half = dtype != torch.float32
    return CONFIGS[half, min(_padded(d_head), 256), half and longest >= LONG]


def tile_tokens(dtype: torch.dtype, d_head: int, heads_per_kv: int, longest: int) -> int:
    """Tokens of a tile that fill one program of the kernel: the `block` to build a layout with for a GPU.

    Any other layout gives the same numbers; smaller tiles leave lanes idle, larger ones are shared by programs.

    Args:
        dtype: of queries, keys and values.
        d_head: the larger of the sizes of keys and values.
        heads_per_kv: query heads per key-value head.
        longest: tokens of the longest prompt.
    """
    return max(1, config_of(dtype, d_head, longest).block_m // _fold(heads_per_kv))


def suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attends from every token of a pack to the prompt before it, [token, head, d_value].

    Args:
        q: [token, head, d_head] float32, float16 or bfloat16, with any strides but 1 for the last.
        k: [token, kv_head, d_head]; the query heads of a key-value head are neighbours.
        v: [token, kv_head, d_value].
        layout: of the pack, on the device of the tensors.
        scale: what scores are multiplied by; None is d_head ** -0.5.
        window: how many tokens a query sees, itself included; None is all of its prompt.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 leaves them.
        sinks: [head] a score per head that takes its share of the softmax and adds nothing.
        out: written to and returned, if given.
        backend: "auto" is "triton" for CUDA tensors, "numba" for those of a CPU that it takes where it can run, and
            "torch" for all others. Only "torch" takes float64 and can be differentiated.

    Raises:
        ValueError: tensors that do not fit each other, the layout or the backend.
        RuntimeError: "triton" or "numba" where it cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: pass 'auto', 'triton', 'numba' or 'torch'")
    _check(q, k, v, layout, window, softcap, sinks)
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    shape = (*q.shape[:2], v.shape[2])
    if out is None:
        out = q.new_empty(shape)
    elif out.shape != shape or out.dtype != q.dtype or out.device != q.device or not _rows_are_dense(out):
        raise ValueError(f"out must be {list(shape)} {q.dtype} on {q.device} with last stride 1, not {_described(out)}")
    chosen = _fastest(q, k, v, sinks) if backend == "auto" else backend
    compute = {"triton": _launch, "numba": _compiled, "torch": _in_tiles}[chosen]
    compute(q, k, v, layout, factor, window, softcap, sinks, out)
    return out


def _fastest(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> str:
    if q.is_cuda:
        return "triton"
    is_taken = q.device.type == "cpu" and q.dtype in KERNEL_DTYPES and not _want_gradient(q, k, v, sinks)
    return "numba" if is_taken and suffix_attention_cpu.is_usable() else "torch"


def _want_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    window: int | None,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    given = f"q {_described(q)}, k {_described(k)}, v {_described(v)}"
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(f"q, k, v must be [token, head, d_head], not {given}")
    if not q.shape[0] == k.shape[0] == v.shape[0] == layout.n_tokens:
        raise ValueError(f"the layout is of {layout.n_tokens} tokens, the tensors are {given}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(f"heads do not fit each other: {given}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v must be of one floating type, not {given}")
    if not q.device == k.device == v.device == layout.tokens.device:
        raise ValueError(f"one device is needed, found {given}, the layout on {layout.tokens.device}")
    if not all(map(_rows_are_dense, (q, k, v))):
        raise ValueError(f"the last stride must be 1: {given}; call .contiguous()")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens: pass window >= 1, or None for all tokens")
    if softcap < 0:
        raise ValueError(f"a soft cap of {softcap}: pass softcap > 0, or 0 for none")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device or sinks.stride() != (1,)):
        raise ValueError(f"sinks must be a contiguous [{q.shape[1]}] on {q.device}, not {_described(sinks)}")


def _compiled(
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
    if q.device.type != "cpu" or q.dtype not in KERNEL_DTYPES:
        raise ValueError(f"the loop for a CPU takes {_names(KERNEL_DTYPES)} there, not {_described(q)}")
    if _want_gradient(q, k, v, sinks):
        raise ValueError("the loop for a CPU has no backward; call it under torch.no_grad() or pass backend='torch'")
    if not suffix_attention_cpu.is_usable():
        raise RuntimeError("numba is not installed here, or ran before a fork: install it or pass backend='torch'")
    suffix_attention_cpu.attend(q, k, v, layout, scale, window, softcap, sinks, out)


def _launch(
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
    if q.dtype not in KERNEL_DTYPES:
        raise ValueError(f"the Triton kernel takes {_names(KERNEL_DTYPES)}, not {q.dtype}; pass backend='torch'")
    if _want_gradient(q, k, v, sinks):
        raise ValueError("the Triton kernel has no backward; call it under torch.no_grad() or pass backend='torch'")
    arguments, grid = launch_arguments(q, k, v, layout, scale, window, softcap, sinks, out)
    if not grid:
        return
    try:
        import triton.knobs

        from fasttrace_kernels.suffix_attention_kernel import suffix_attention_kernel
    except ImportError as error:
        raise RuntimeError("Triton is not installed here; install it or pass backend='torch'") from error
    kernel: Any = suffix_attention_kernel
    if q.is_cuda:
        with torch.cuda.device(q.device):
            kernel[(grid,)](**arguments)
    elif triton.knobs.runtime.interpret:
        del arguments["num_warps"], arguments["num_stages"]
        kernel[(grid,)](**arguments)
    else:
        raise RuntimeError(f"the Triton kernel runs on CUDA tensors, these are on {q.device}; pass backend='torch'")


def launch_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    scale: float,
    window: int | None,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
) -> tuple[dict, int]:
    """What the kernel is called with, and the number of programs."""
    d_key, d_value = q.shape[2], v.shape[2]
    if max(d_key, d_value) > 256:
        raise ValueError(f"heads of {d_key} and {d_value}: the Triton kernel takes up to 256; pass backend='torch'")
    config = config_of(q.dtype, max(d_key, d_value), layout.longest)
    if max(k.stride(0), v.stride(0)) * config.block_n >= 2**31:
        raise ValueError(f"keys or values {k.stride(0)} and {v.stride(0)} elements apart; call .contiguous()")
    group = q.shape[1] // k.shape[1]
    fold = min(_fold(group), config.block_m)
    parts = -(-layout.block // (config.block_m // fold))
    grid = layout.n_tiles * parts * k.shape[1] * -(-group // fold)
    if grid >= 2**31:
        raise ValueError(f"{grid} programs are more than a launch can have; split the pack")
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "sinks": sinks,
        "out": out,
        "tiles": layout.tiles,
        "tokens": layout.tokens,
        "q_token": q.stride(0),
        "q_head": q.stride(1),
        "k_token": k.stride(0),
        "k_head": k.stride(1),
        "v_token": v.stride(0),
        "v_head": v.stride(1),
        "out_token": out.stride(0),
        "out_head": out.stride(1),
        "n_kv_heads": k.shape[1],
        "factor": scale / softcap if softcap else scale * math.log2(math.e),
        "GROUP": group,
        "FOLD": fold,
        "PARTS": parts,
        "WINDOW": window or 0,
        "SOFTCAP": softcap,
        "HAS_SINKS": sinks is not None,
        "TILE_FIELDS": TILE_FIELDS,
        "D_KEY": d_key,
        "D_VALUE": d_value,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": _padded(d_key),
        "BLOCK_V": _padded(d_value),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return arguments, grid


def _fold(group: int) -> int:
    """Query heads of a program: all of a group, or its even parts if there are too many."""
    return -(-group // -(-group // MAX_FOLD))


def _padded(d_head: int) -> int:
    return max(16, 1 << (d_head - 1).bit_length())


def _rows_are_dense(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype)[6:] for dtype in dtypes)


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} strides {list(x.stride())} on {x.device}"


def _in_tiles(
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
    """The torch path: the keys of a few tiles side by side, a mask, one attention call."""
    bytes_per_key = k.shape[1] * (k.shape[2] + v.shape[2]) * k.element_size()
    for chunk in _chunks(layout.key_counts, bytes_per_key):
        tiles = layout.tiles[chunk].long()
        query, used, key, seen = _tokens_of(tiles, layout, int(layout.key_counts[chunk.start]), window)
        queries, keys, values = (x[tokens].transpose(1, 2) for x, tokens in ((q, query), (k, key), (v, key)))
        attended = _attend(queries, keys, values, seen.unsqueeze(1), scale, softcap, sinks).transpose(1, 2)
        out[query[used]] = attended[used].to(out.dtype)


def _chunks(key_counts: np.ndarray, bytes_per_key: int) -> Iterator[slice]:
    """Neighbouring tiles that fit CHUNK_BYTES and whose numbers of keys differ by less than a factor of two."""
    begin = 0
    while begin < len(key_counts):
        fitting = CHUNK_BYTES // int(bytes_per_key * key_counts[begin])
        alike = np.searchsorted(-key_counts, -key_counts[begin] / 2)
        end = min(begin + max(1, fitting), max(begin + 1, int(alike)))
        yield slice(begin, end)
        begin = end


def _tokens_of(
    tiles: Tensor, layout: AttentionLayout, n_keys: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query tokens [tile, query], which of them are used, key tokens [tile, key], mask [tile, query, key])."""
    begin, count, base, prefix = (column[:, None] for column in tiles[:, :4].unbind(1))
    nth = torch.arange(min(layout.block, layout.n_tokens), device=tiles.device)
    query = begin + torch.minimum(nth, count - 1)
    own, held = layout.tokens[query].long().unbind(-1)
    nth_key = torch.arange(n_keys, device=tiles.device)
    in_prefix = nth_key < prefix
    key = torch.where(in_prefix, base + nth_key, own[:, :1] + nth_key - prefix)
    low, high = own, query + 1
    low_prefix, high_prefix = base.expand_as(own), base + held
    if window is not None:
        low = torch.maximum(low, high - window)
        low_prefix = base + held + high - own - window
    seen = torch.where(
        in_prefix[:, None],
        (key[:, None] >= low_prefix[..., None]) & (key[:, None] < high_prefix[..., None]),
        (key[:, None] >= low[..., None]) & (key[:, None] < high[..., None]),
    )
    return query, nth < count, key.clamp(max=layout.n_tokens - 1), seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention over [tile, head, token, d_head] under a mask [tile, 1, query, key]."""
    if not softcap and sinks is None:
        grouped = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
    exact = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(exact).unflatten(1, (k.shape[1], -1))
    scores = queries @ k.to(exact).unsqueeze(2).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.unsqueeze(1), -math.inf).flatten(1, 2)
    if sinks is not None:
        sink = sinks.to(exact)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].unflatten(1, (k.shape[1], -1))
    return (weights @ v.to(exact).unsqueeze(2)).flatten(1, 2)
