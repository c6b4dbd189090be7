"""Each operation in a few lines of torch: the specification that kernels and fallbacks are compared with."""

import math

import torch
from torch import Tensor

from fasttrace_kernels.layout import AttentionLayout


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
) -> Tensor:
    """Every row put behind the base row's keys before it, and attended as one prompt, in float64.

    Args:
        q: [token, head, d_head].
        k: [token, kv_head, d_head].
        v: [token, kv_head, d_value].
        layout: of the pack; only its `rows` are read.
        scale: as in `suffix_attention.suffix_attention`, and so are the others.
        window: of a query.
        softcap: of scores.
        sinks: [head].
    """
    q, k, v = (x.double() for x in (q, k, v))
    n_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = q.new_full((*q.shape[:2], v.shape[2]), math.nan)
    for start, length, first, base_start in layout.rows.T.tolist():
        own = torch.arange(start, start + length)
        prompt = torch.cat((torch.arange(base_start, base_start + first), own))
        keys, values = (x[prompt].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[own], keys) * (q.shape[2] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        i, j = torch.arange(first, first + length)[:, None], torch.arange(first + length)
        seen = j <= i if window is None else (j <= i) & (i - j < window)
        scores = scores.masked_fill(~seen.to(scores.device), -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(n_heads, length, 1)), dim=-1)
        out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(prompt)], values)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """The norm in float64, without the rounding between normalization and weight."""
    x = x.double()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * (offset + weight.double())


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The product in float64, without the rounding of the activation."""
    x = gate.double()
    exponent = x if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * torch.sigmoid(exponent) * up.double()


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Halves of the first R numbers of a head as real and imaginary parts, turned in float64."""
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    width = cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        real, imaginary = x[..., :width].chunk(2, -1)
        return torch.cat((x[..., :width] * cos + torch.cat((-imaginary, real), -1) * sin, x[..., width:]), -1)

    return turned(q.double()), turned(k.double())
