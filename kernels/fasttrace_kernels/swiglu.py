"""The product of a gated MLP, act(gate) * up, in one pass over memory.

Maths, everything in float32 up to the rounding `r` to the dtype of gate and up, which transformers does twice:

    out = r(r(act(gate)) * up)
    silu:       act(x) = x / (1 + exp(-x))
    gelu_tanh:  act(x) = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (x + 0.044715 * x^3)

The second is x / 2 * (1 + tanh(u)) without a tanh and without its cancellation where x is far below 0: there it is
closer to the true value than torch's, by up to 2e-7 in float32.

Memory: gate and up [row, n] with rows at any distance (so the two halves of a fused projection need no copy) and
neighbors adjacent; out is contiguous. One program takes BLOCK columns of one row. Floor: 3 * n * itemsize bytes a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fasttrace_kernels.launch import (
    FLOAT_DTYPES,
    Backend,
    as_rows,
    check_beside,
    check_dtype,
    check_shape,
    launch,
    takes_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

ACTIVATIONS = ("silu", "gelu_tanh")
BLOCK = 1024
WARPS = 4


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu", *, backend: Backend = "auto") -> Tensor:
    """The activation of gate, times up.

    Args:
        gate: [..., n], any float dtype.
        up: [..., n], same dtype.
        activation: "silu" or "gelu_tanh".
        backend: "auto" is "triton" for CUDA tensors and "torch" for all others. Only "torch" takes float64 and can
            be differentiated.

    Returns:
        [..., n] of the same dtype, contiguous from Triton.

    Raises:
        ValueError: dtypes, shapes, strides or devices do not fit; the message says which.
        RuntimeError: "triton" where it cannot run.
    """
    _check(gate, up, activation)
    return (_swiglu_triton if takes_triton(backend, gate) else _swiglu_torch)(gate, up, activation)


def _swiglu_torch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def _swiglu_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gates, ups = as_rows("gate", gate), as_rows("up", up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    n_rows, n = gates.shape
    blocks = -(-n // BLOCK)
    launch(
        _swiglu_kernel,
        n_rows * blocks,
        gates,
        ups,
        out,
        gates.stride(0),
        ups.stride(0),
        N=n,
        BLOCK=BLOCK,
        SILU=activation == "silu",
        num_warps=WARPS,
    )
    return out


def _swiglu_kernel(gate, up, out, gate_row, up_row, N: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    loaded = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    exponent = -x if SILU else -1.5957691216057308 * (x + 0.044715 * x * x * x)
    active = tl.div_rn(x, 1.0 + tl.exp(exponent)).to(loaded.dtype).to(tl.float32)
    factor = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + columns, (active * factor).to(out.dtype.element_ty), mask=inside)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    check_dtype("gate", gate, FLOAT_DTYPES)
    check_dtype("up", up, (gate.dtype,))
    as_rows("gate", gate)
    as_rows("up", up)
    check_shape("up", up, tuple(gate.shape))
    check_beside("up", up, "gate", gate)
