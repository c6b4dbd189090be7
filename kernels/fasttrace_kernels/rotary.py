"""Rotary position embedding of queries and keys in one launch, with transformers' rounding.

Maths, for a head x of d_head numbers whose first R are rotated (R = d_head, or less as in GPT-NeoX and Phi), with
h = R / 2 and `r` the rounding to the dtype of x:

    out[i]     = r(r(x[i]     * cos[i])     - r(x[i + h] * sin[i]))        i < h
    out[i + h] = r(r(x[i + h] * cos[i + h]) + r(x[i]     * sin[i + h]))
    out[R:]    = x[R:]

This is apply_rotary_pos_emb bit for bit, also in float32: products are rounded before they are added (the kernel is
compiled without fused multiply-add). Rotation of neighboring pairs (GPT-J, GLM, Cohere) is another function.

Memory: q [batch, head, token, d_head], k likewise, d_head adjacent, other strides any: transformers passes views of
[batch, token, head * d_head]. cos, sin [batch or 1, token, R]. Outputs are such views of new memory too, so that a
token's heads are adjacent. One program takes all heads of q and k of one token, BLOCK_H at a time; cos and sin are
read once. Floor: 2 * (H + Hkv) * d_head + 2 * R numbers a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasttrace_kernels.launch import (
    FLOAT_DTYPES,
    Backend,
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

TILE = 2048
"""Numbers of each half that a program has in registers at a time."""
MAX_HEADS = 16


def tile(heads: int, half: int) -> tuple[int, int, int]:
    """Heads at a time, width of a half, warps: 8 pairs a thread."""
    width = next_power_of_2(half)
    at_a_time = min(MAX_HEADS, next_power_of_2(heads), max(1, TILE // width))
    return at_a_time, width, min(8, max(1, at_a_time * width // 256))


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Rotates the halves of each head by the token's angles.

    Args:
        q: [batch, head, token, d_head], any float dtype.
        k: [batch, key head, token, d_head], same dtype.
        cos: [batch or 1, token, R], same dtype, R even and at most d_head.
        sin: like cos.
        backend: "auto" is "triton" for CUDA tensors and "torch" for all others. Only "torch" takes float64 and can
            be differentiated.

    Returns:
        New q and k; from Triton views of [batch, token, head, d_head].

    Raises:
        ValueError: dtypes, shapes, strides or devices do not fit; the message says which.
        RuntimeError: "triton" where it cannot run.
    """
    _check(q, k, cos, sin)
    return (_rotary_triton if takes_triton(backend, q) else _rotary_torch)(q, k, cos, sin)


def _rotary_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x[..., :width].chunk(2, -1)
        rotated = x[..., :width] * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((rotated, x[..., width:]), -1) if width < x.shape[-1] else rotated

    return turned(q), turned(k)


def _rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    key_heads, rotated = k.shape[1], cos.shape[2]
    out_q, out_k = (x.new_empty(batch, tokens, x.shape[1], dim).transpose(1, 2) for x in (q, k))
    cos, sin = (table.expand(batch, tokens, rotated) for table in (cos, sin))
    at_a_time, width, warps = tile(heads + key_heads, rotated // 2)
    launch(
        _rotary_kernel,
        batch * tokens,
        q,
        k,
        cos,
        sin,
        out_q,
        out_k,
        tokens,
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        HEADS=heads,
        KEY_HEADS=key_heads,
        DIM=dim,
        ROTATED=rotated,
        BLOCK_H=at_a_time,
        BLOCK_HALF=width,
        BLOCK_REST=next_power_of_2(dim - rotated),
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out_q, out_k


def _rotary_kernel(
    q,
    k,
    cos,
    sin,
    out_q,
    out_k,
    n_tokens,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // n_tokens, program % n_tokens
    half: tl.constexpr = ROTATED // 2
    columns = tl.arange(0, BLOCK_HALF)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    cos_1 = tl.load(cos + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    out_q += program * HEADS * DIM
    out_k += program * KEY_HEADS * DIM
    for first in range(0, HEADS + KEY_HEADS, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H)).to(tl.int64)
        is_query = heads < HEADS
        source = tl.where(is_query, q + heads * q_head, k + (heads - HEADS) * k_head)[:, None]
        target = tl.where(is_query, out_q + heads * DIM, out_k + (heads - HEADS) * DIM)[:, None]
        exists = (heads < HEADS + KEY_HEADS)[:, None]
        inside = exists & (columns < half)[None, :]
        loaded_1 = tl.load(source + columns[None, :], mask=inside, other=0.0)
        loaded_2 = tl.load(source + half + columns[None, :], mask=inside, other=0.0)
        x_1, x_2 = loaded_1.to(tl.float32), loaded_2.to(tl.float32)
        dtype = loaded_1.dtype
        y_1 = (x_1 * cos_1).to(dtype).to(tl.float32) - (x_2 * sin_1).to(dtype).to(tl.float32)
        y_2 = (x_2 * cos_2).to(dtype).to(tl.float32) + (x_1 * sin_2).to(dtype).to(tl.float32)
        tl.store(target + columns[None, :], y_1.to(dtype), mask=inside)
        tl.store(target + half + columns[None, :], y_2.to(dtype), mask=inside)
        if ROTATED < DIM:
            rest = ROTATED + tl.arange(0, BLOCK_REST)[None, :]
            passed = tl.load(source + rest, mask=exists & (rest < DIM), other=0.0)
            tl.store(target + rest, passed, mask=exists & (rest < DIM))


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_dtype("q", q, FLOAT_DTYPES)
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}"
        raise ValueError(f"{shapes}: expected q and k [batch, head, token, d_head] and cos [batch or 1, token, R]")
    batch, _, tokens, dim = q.shape
    rotated = cos.shape[2]
    if rotated % 2 or not 2 <= rotated <= dim:
        raise ValueError(f"cos has {rotated} angles, expected an even number from 2 to d_head = {dim}")
    check_shape("k", k, (batch, k.shape[1], tokens, dim))
    check_shape("cos", cos, (1 if cos.shape[0] == 1 else batch, tokens, rotated))
    check_shape("sin", sin, tuple(cos.shape))
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_dtype(name, tensor, (q.dtype,))
        check_last_stride(name, tensor)
        check_beside(name, tensor, "q", q)
