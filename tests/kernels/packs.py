"""Random packs, tensors and error bounds that the tests of attention share."""

from dataclasses import dataclass

import numpy as np
import torch
from fasttrace_kernels import reference
from fasttrace_kernels.layout import AttentionLayout
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Heads:
    """Sizes of attention heads; d_value None: as d_head."""

    query: int
    kv: int
    d_head: int
    d_value: int | None = None

    def __str__(self) -> str:
        return f"{self.query}to{self.kv}x{self.d_head}" + (f"and{self.d_value}" if self.d_value else "")


def random_rows(n_positions: int, n_base: int, n_rows: int, seed: int = 0, order: str = "base"):
    """(start, length, first, base_start): base rows, and rows that begin anywhere.

    Args:
        n_positions: of every prompt.
        n_base: base rows.
        n_rows: other rows.
        seed: of base rows and first positions.
        order: "base" as the kernel likes it, "first" as fasttrace's planner has it, "random".
    """
    rng = np.random.default_rng(seed)
    base = np.concatenate((np.arange(n_base), rng.integers(0, n_base, n_rows)))
    first = np.concatenate((np.zeros(n_base, dtype=int), rng.integers(0, n_positions, n_rows)))
    number = np.arange(len(base))
    keys = {"base": (number, first, base), "first": (number, base, first), "random": (rng.permutation(number),)}
    others = number >= n_base
    order_of_rows = number[np.lexsort((*keys[order], others if order != "random" else 0 * number))]
    place = np.argsort(order_of_rows)
    length = n_positions - first[order_of_rows]
    start = np.cumsum(length) - length
    return start, length, first[order_of_rows], start[place[base[order_of_rows]]]


def random_tensors(n_tokens: int, heads: Heads, dtype: torch.dtype, seed: int = 0, device: str = "cpu"):
    """(q, k, v) as views of one projection, with the strides that models give them."""
    d_value = heads.d_value or heads.d_head
    sizes = (heads.query * heads.d_head, heads.kv * heads.d_head, heads.kv * d_value)
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(n_tokens, sum(sizes), generator=generator).to(device, dtype)
    q, k, v = projection.split(sizes, dim=1)
    return q.unflatten(1, (-1, heads.d_head)), k.unflatten(1, (-1, heads.d_head)), v.unflatten(1, (-1, d_value))


def random_sinks(heads: Heads, device: str = "cpu") -> Tensor:
    """A score per head, some of them large."""
    return 2 * torch.randn(heads.query, generator=torch.Generator().manual_seed(7)).to(device)


def poisoned(q: Tensor, v: Tensor) -> Tensor:
    """An output that is NaN until it is written."""
    return q.new_full((*q.shape[:2], v.shape[2]), torch.nan)


def assert_attends(out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, **options) -> float:
    """Compares with the reference up to rounding and returns the error as a share of what is allowed.

    Half precision rounds the weights of the values and the output, and nothing else that counts: each may be off by
    half a unit, the weights by that share of sum(weight * |value|). float32 is allowed what its sums lose.
    """
    truth = reference.suffix_attention(q, k, v, layout, **options)
    weighted = reference.suffix_attention(q, k, v.abs(), layout, **options)
    units = 1.1 if out.dtype != torch.float32 else 40
    allowed = units * torch.finfo(out.dtype).eps / 2 * (truth.abs() + weighted) + 1e-7
    share = ((out.double() - truth).abs() / allowed).nan_to_num(nan=torch.inf)
    worst = float(share.max()) if share.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times the rounding error that {out.dtype} may have"
    return worst


def layout_of(n_positions: int, n_base: int, n_rows: int, block: int, **kwargs) -> AttentionLayout:
    """The layout of `random_rows`."""
    return AttentionLayout.build(*random_rows(n_positions, n_base, n_rows, **kwargs), block=block)
