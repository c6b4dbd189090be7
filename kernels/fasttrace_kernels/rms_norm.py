"""RMS normalization of rows, with the rounding order of Llama or of Gemma, in one pass over memory.

Maths, for a row x of d numbers, everything in float32 up to the rounding `r` to a dtype:

    y = x * rsqrt(mean(x * x) + eps)
    Llama  (round_before_weight):      out = r(weight * r(y))     transformers' LlamaRMSNorm and most others
    Gemma  (not round_before_weight):  out = r(y * (offset + weight))  offset is 1 in GemmaRMSNorm, 0 in Gemma 3n

Llama's inner rounding is to the dtype of x and its outer one to the wider of x and weight; Gemma's is to that of x.

Memory: x [row, d] with rows at any distance and neighbors adjacent; out is contiguous. One program takes BLOCK_R
whole rows, [BLOCK_R, BLOCK_D] with BLOCK_D the power of two from d on, and keeps them in registers: x is read once
and out written once, which is the floor of 2 * d * itemsize bytes a row. Head norms (d of 64 to 256, as Qwen 3 and
Gemma 3 have them on queries and keys) are rows as well; several share a program.

float64 runs in torch, in float32 between input and output, as in transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fasttrace_kernels.launch import (
    FLOAT_DTYPES,
    TRITON_DTYPES,
    Backend,
    as_rows,
    check_beside,
    check_dtype,
    check_last_stride,
    check_shape,
    launch,
    next_power_of_2,
    takes_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

MAX_COLUMNS = 1 << 16
"""Longest row that one program holds: 64 numbers a thread at 32 warps."""


class Tile(NamedTuple):
    """What one program takes."""

    rows: int
    columns: int
    warps: int


TILES = ((128, 16, 4), (256, 8, 4), (512, 4, 4), (1024, 2, 4), (2048, 1, 4), (4096, 1, 8), (8192, 1, 8))
"""(longest row, rows a program, warps): 16 numbers a thread, 32 from 8192 on. Above, 32 warps."""


def tile(d: int) -> Tile:
    """The default tile for rows of d numbers."""
    for longest, rows, warps in TILES:
        if d <= longest:
            return Tile(rows, next_power_of_2(d), warps)
    return Tile(1, next_power_of_2(d), 16 if d <= 1 << 14 else 32)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    round_before_weight: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """RMS norm over the last axis.

    Args:
        x: [..., d], any float dtype.
        weight: [d] or None for none, any float dtype.
        eps: added to the mean square.
        offset: added to the weight; needs Gemma's rounding order.
        round_before_weight: Llama's rounding order; False is Gemma's.
        backend: "auto" is "triton" for CUDA tensors and "torch" for all others. Only "torch" takes float64 and can
            be differentiated.

    Returns:
        [..., d], contiguous from Triton. In Llama's order the wider dtype of x and weight, else that of x.

    Raises:
        ValueError: dtypes, shapes, strides or devices do not fit; the message says which.
        RuntimeError: "triton" where it cannot run.
    """
    _check(x, weight, offset, round_before_weight)
    compute = _rms_norm_triton if takes_triton(backend, x) else _rms_norm_torch
    return compute(x, weight, eps, offset, round_before_weight)


def _rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    return weight * y.to(x.dtype) if round_before_weight else (y * (offset + weight.float())).to(x.dtype)


def _rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool) -> Tensor:
    rows = as_rows("x", x)
    dtype = x.dtype
    if weight is not None:
        check_dtype("weight", weight, TRITON_DTYPES)
    if weight is not None and round_before_weight:
        dtype = torch.promote_types(dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = tile(rows.shape[1])
    launch(
        _rms_norm_kernel,
        -(-rows.shape[0] // block.rows),
        rows,
        weight,
        out,
        rows.shape[0],
        rows.stride(0),
        float(eps),
        float(offset),
        D=rows.shape[1],
        BLOCK_R=block.rows,
        BLOCK_D=block.columns,
        HAS_WEIGHT=weight is not None,
        ROUND_FIRST=round_before_weight,
        num_warps=block.warps,
    )
    return out


def _rms_norm_kernel(
    x,
    weight,
    out,
    n_rows,
    x_row,
    eps,
    offset,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < n_rows)[:, None] & (columns < D)[None, :]
    loaded = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
    values = loaded.to(tl.float32)
    mean_square = tl.sum(values * values, 1) / D
    values = values * tl.rsqrt(mean_square + eps)[:, None]
    if ROUND_FIRST:
        values = values.to(loaded.dtype).to(tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        if not ROUND_FIRST:
            factor = factor + offset
        values = values * factor[None, :]
    tl.store(out + rows[:, None] * D + columns[None, :], values.to(out.dtype.element_ty), mask=inside)


def _check(x: Tensor, weight: Tensor | None, offset: float, round_before_weight: bool) -> None:
    check_dtype("x", x, FLOAT_DTYPES)
    columns = as_rows("x", x).shape[1]
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"x has rows of {columns} numbers, expected 1 to {MAX_COLUMNS}")
    if weight is not None:
        check_dtype("weight", weight, FLOAT_DTYPES)
        check_shape("weight", weight, (columns,))
        check_last_stride("weight", weight)
        check_beside("weight", weight, "x", x)
    if offset and (round_before_weight or weight is None):
        raise ValueError(f"an offset of {offset} needs a weight and round_before_weight=False, as in GemmaRMSNorm")
