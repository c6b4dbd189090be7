"""Log-probabilities of target tokens from hidden states, without the logits of a row ever leaving float32.

Maths, for a hidden state h, head W [vocabulary, d], bias b, a logit scale and a soft cap c (Gemma 2):

    z = scale * (W h + b),   z = c * tanh(z / c) if there is a cap,   logprob[t] = z[t] - logsumexp(z), at most 0

Logits are sums in float32 that are never rounded to bfloat16 or float16, as a model rounds the ones it returns. That
rounding alone moves log-probabilities by 5e-3 on average, as much as all other rounding to bfloat16 together.

Two backends; "auto" chooses by `prefers_triton`:

* "torch" (any device): rows in chunks, the chunk's logits in memory (CHUNK_BYTES). On CUDA cuBLAS writes float32
  from half-precision inputs (`torch.mm(..., out_dtype=)`, torch >= 2.8); where that is missing, and on the CPU, parts
  of W are converted to float32 first.
* "triton": the logits stay in registers. One program multiplies BLOCK_M rows with BLOCK_N rows of W and reduces the
  product to one logsumexp a row, [tile, row] in memory, 1 / BLOCK_N of the logits; a second kernel takes the direct
  products of the targets, one program each. A logsumexp over tiles in torch ends it. Programs of GROUP row blocks
  share a tile of W while it is in the L2 cache.

Memory: hidden [row, d] and weight [vocabulary, d] with rows at any distance and neighbors adjacent. Both products of
a target, the direct one and the one inside the logsumexp, differ in the last bits of float32: hence the clamp at 0,
and ranks that count the target's own column never but may misplace near-ties within 1e-6.

float64 is computed in float64, by torch. float32 through torch follows its TF32 setting on CUDA; the kernel takes
exact products. Inputs that are not finite give NaN or inf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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

CHUNK_BYTES = 256 << 20
"""Logits of a chunk of rows. Below 64 MiB the matrix products get slow, at 256 MiB a vocabulary of 256k still has
256 rows to a chunk, the fewest that keep an H100 busy multiplying rather than reading W."""
UPCAST_BYTES = 32 << 20
"""Part of W that is converted to float32 at a time."""
HALF = (torch.float16, torch.bfloat16)
LONGEST_FOR_TRITON = 1280
GROUP = 16


class Head(NamedTuple):
    """What is between a hidden state and its logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


class Readout(NamedTuple):
    """What the head says about each row.

    Attributes:
        logprob: [row, target] of the targets, float32 (float64 for float64 inputs).
        rank: int32 [row] number of tokens with a higher logit than the first target; 0 if it is the top token.
        top_id: int64 [row] the token with the highest logit.
        top_logprob: [row] its log-probability.
    """

    logprob: Tensor
    rank: Tensor
    top_id: Tensor
    top_logprob: Tensor


class Tile(NamedTuple):
    """What one program multiplies, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {
    (2, False): Tile(128, 256, 64, 8, 3),
    (2, True): Tile(128, 128, 64, 8, 4),
    (4, False): Tile(32, 64, 32, 4, 2),
    (4, True): Tile(32, 64, 32, 4, 2),
}
"""(itemsize, with much to do per logit) -> default tile. Found by compiling without register spills, not by timing."""
UNALIGNED = Tile(64, 64, 32, 4, 2)
"""For d that is not a multiple of 16, whose rows are read number by number."""


def prefers_triton(d: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is expected to beat chunks through cuBLAS on an H100. Computed, not measured.

    Chunks write and read 8 bytes a logit at 3 TB/s besides 2 * d operations at 700 TFLOP/s; the kernel saves the
    bytes and takes about 1 / 0.7 of the time for the operations. It is then 1.2 times faster at d = 1300 and no
    faster at d = 2200. In float32 it has no tensor cores, and rows that are not aligned it reads slowly.
    """
    return dtype in HALF and d <= LONGEST_FOR_TRITON and d % 16 == 0


def target_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probabilities of target tokens.

    Args:
        hidden: [row, d] after the final norm.
        weight: [vocabulary, d] of the head, same dtype.
        target: int64 [row, target] token ids, or one id for all rows. Ids on CUDA are not looked at; those outside
            the vocabulary give NaN there.
        bias: [vocabulary], any float dtype.
        softcap: largest absolute logit, approached by tanh.
        scale: factor of the logits, before the cap.
        backend: "auto" is "triton" for CUDA tensors where `prefers_triton` and "torch" otherwise. Only "torch" takes
            float64; neither can be differentiated.

    Returns:
        [row, target] ([row, 1] for an int), float32, or float64 for float64 inputs. At most 0.

    Raises:
        ValueError: dtypes, shapes, strides, devices or ids do not fit; the message says which.
        RuntimeError: "triton" where it cannot run.
    """
    return _readout(hidden, Head(weight, bias, softcap, scale), target, backend, full=False)[0]


def target_readout(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Readout:
    """`target_logprob` with the rank of the first target and the top token; takes the same and raises the same."""
    return Readout(*_readout(hidden, Head(weight, bias, softcap, scale), target, backend, full=True))


@torch.no_grad()
def _readout(hidden: Tensor, head: Head, target: Tensor | int, backend: str, full: bool) -> tuple[Tensor, ...]:
    ids = _checked(hidden, head, target, full)
    triton = takes_triton(backend, hidden, prefers_triton(hidden.shape[1], hidden.dtype))
    return (_by_triton if triton else _by_chunks)(hidden, head, ids, full)


def _by_chunks(hidden: Tensor, head: Head, target: Tensor, full: bool) -> tuple[Tensor, ...]:
    vocabulary = head.weight.shape[0]
    exists = (target >= 0) & (target < vocabulary)
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    chunks = zip(hidden.split(rows), torch.where(exists, target, 0).split(rows), strict=True)
    parts = [_of_logits(_logits(part, head), ids, full) for part, ids in chunks]
    logprob, *rest = (torch.cat(values) for values in zip(*parts, strict=True))
    return (logprob.masked_fill(~exists, torch.nan), *rest)


def _of_logits(logits: Tensor, target: Tensor, full: bool) -> tuple[Tensor, ...]:
    lse = logits.logsumexp(-1)
    of_target = logits.gather(1, target)
    logprob = (of_target - lse[:, None]).clamp(max=0)
    if not full:
        return (logprob,)
    top, top_id = logits.max(-1)
    rank = (logits > of_target[:, :1]).sum(-1, dtype=torch.int32)
    return logprob, rank, top_id, (top - lse).clamp(max=0)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    logits = _product(hidden, head.weight)
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Matrix product hidden @ weight.T in float32 or better."""
    if hidden.dtype not in HALF:
        return hidden @ weight.T
    if hidden.is_cuda and torch.__version__ >= "2.8":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    out = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    hidden, columns = hidden.float(), max(1, UPCAST_BYTES // (4 * weight.shape[1]))
    for part, of_part in zip(weight.split(columns), out.split(columns, 1), strict=True):
        torch.mm(hidden, part.float().T, out=of_part)
    return out


def _by_triton(hidden: Tensor, head: Head, target: Tensor, full: bool) -> tuple[Tensor, ...]:
    weight, bias, softcap, scale = head
    (rows, d), vocabulary = hidden.shape, weight.shape[0]
    block = UNALIGNED if d % 16 else TILES[hidden.element_size(), full or softcap is not None]
    tiles = -(-vocabulary // block.columns)
    of_target = hidden.new_empty(target.shape, dtype=torch.float32)
    kinds = (torch.float32, torch.float32, torch.int32, torch.int32) if full else (torch.float32,)
    partial = [hidden.new_empty((tiles, rows), dtype=kind) for kind in kinds]
    shared = {"D": d, "HAS_BIAS": bias is not None, "HAS_CAP": softcap is not None}
    operands = (hidden, weight, bias, target, of_target)
    numbers = (vocabulary, target.shape[1], float(scale), softcap or 1.0, hidden.stride(0), weight.stride(0))
    strides = target.stride()
    width = min(1024, next_power_of_2(d))
    launch(_target_kernel, target.numel(), *operands, *numbers, *strides, **shared, BLOCK_D=width, num_warps=4)
    launch(
        _sweep_kernel,
        tiles * -(-rows // block.rows),
        *operands,
        *(*partial, None, None, None)[:4],
        *numbers,
        strides[0],
        rows,
        **shared,
        FULL=full,
        BLOCK_M=block.rows,
        BLOCK_N=block.columns,
        BLOCK_K=block.depth,
        GROUP=GROUP,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    lse = partial[0].logsumexp(0)
    logprob = (of_target - lse[:, None]).clamp(max=0)
    if not full:
        return (logprob,)
    top, tile = partial[1].max(0)
    top_id = partial[2].gather(0, tile[None])[0].long()
    return logprob, partial[3].sum(0, dtype=torch.int32), top_id, (top - lse).clamp(max=0)


def _target_kernel(
    hidden,
    weight,
    bias,
    target,
    of_target,
    vocabulary,
    n_targets,
    scale,
    softcap,
    hidden_row,
    weight_row,
    target_row,
    target_column,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, column = program // n_targets, program % n_targets
    token = tl.load(target + row * target_row + column * target_column)
    exists = (token >= 0) & (token < vocabulary)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * hidden_row + depth, mask=depth < D, other=0.0).to(tl.float32)
        w = tl.load(weight + token * weight_row + depth, mask=exists & (depth < D), other=0.0).to(tl.float32)
        total += h * w
    logit = tl.sum(total, 0)
    if HAS_BIAS:
        logit += tl.load(bias + token, mask=exists, other=0.0).to(tl.float32)
    logit *= scale
    if HAS_CAP:
        logit = softcap * (2.0 / (1.0 + tl.exp(-2.0 * logit / softcap)) - 1.0)
    tl.store(of_target + program, tl.where(exists, logit, float("nan")))


def _sweep_kernel(
    hidden,
    weight,
    bias,
    target,
    of_target,
    lse,
    top,
    top_id,
    above,
    vocabulary,
    n_targets,
    scale,
    softcap,
    hidden_row,
    weight_row,
    target_row,
    n_rows,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program, blocks = tl.program_id(0), tl.cdiv(n_rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(vocabulary, BLOCK_N)
    first = program // in_group * GROUP
    group = tl.minimum(blocks - first, GROUP)
    tile = program % in_group // group
    rows = ((first + program % in_group % group) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_exists, column_exists = rows < n_rows, columns < vocabulary
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        h_exists, w_exists = row_exists[:, None], column_exists[None, :]
        if D % BLOCK_K != 0:
            h_exists, w_exists = h_exists & (depth < D)[None, :], w_exists & (depth < D)[:, None]
        h = tl.load(hidden + rows[:, None] * hidden_row + depth[None, :], mask=h_exists, other=0.0)
        w = tl.load(weight + columns[None, :] * weight_row + depth[:, None], mask=w_exists, other=0.0)
        logits = tl.dot(h, w, logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + columns, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    if HAS_CAP:
        logits = softcap * (2.0 / (1.0 + tl.exp(-2.0 * logits / softcap)) - 1.0)
    logits = tl.where(column_exists[None, :], logits, float("-inf"))
    largest = tl.max(logits, 1)
    out = tile.to(tl.int64) * n_rows + rows
    tl.store(lse + out, largest + tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1)), mask=row_exists)
    if FULL:
        token = tl.load(target + rows * target_row, mask=row_exists, other=0)
        logit = tl.load(of_target + rows * n_targets, mask=row_exists, other=0.0)
        higher = (logits > logit[:, None]) & (columns[None, :] != token[:, None])
        tl.store(above + out, tl.sum(higher.to(tl.int32), 1), mask=row_exists)
        tl.store(top + out, largest, mask=row_exists)
        tl.store(top_id + out, tile * BLOCK_N + tl.argmax(logits, 1), mask=row_exists)


def _checked(hidden: Tensor, head: Head, target: Tensor | int, full: bool) -> Tensor:
    """Target ids as int64 [row, target], after all checks."""
    weight, bias, softcap, _ = head
    check_dtype("hidden", hidden, FLOAT_DTYPES)
    check_dtype("weight", weight, (hidden.dtype,))
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [row, d] and [vocabulary, d] with one d and neither of them 0")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"a soft cap of {softcap}: expected a positive one, or None")
    vocabulary = weight.shape[0]
    if isinstance(target, int):
        if not 0 <= target < vocabulary:
            raise ValueError(f"target {target} is not in the vocabulary of {vocabulary} tokens")
        ids = torch.full((1, 1), target, device=hidden.device).expand(hidden.shape[0], 1)
    else:
        ids = target
    check_dtype("target", ids, (torch.int64,))
    if ids.ndim != 2:
        raise ValueError(f"target has shape {tuple(ids.shape)}, expected [row, target] or an int")
    check_shape("target", ids, (hidden.shape[0], ids.shape[1]))
    if full and not ids.shape[1]:
        raise ValueError("a rank needs at least one target a row, got none")
    for name, tensor in (("weight", weight), ("target", ids), ("bias", bias)):
        if tensor is not None:
            check_beside(name, tensor, "hidden", hidden)
    check_last_stride("hidden", hidden)
    check_last_stride("weight", weight)
    if bias is not None:
        check_dtype("bias", bias, FLOAT_DTYPES)
        check_shape("bias", bias, (vocabulary,))
        check_last_stride("bias", bias)
    if ids.device.type == "cpu" and ((ids < 0) | (ids >= vocabulary)).any():
        raise ValueError(f"a target is not in the vocabulary of {vocabulary} tokens")
    return ids
