"""Readout: last-token hidden states to probabilities, through the model's own final norm and head.

The tail of the model is run as the model runs it: its own forward on one-token sequences, with every block
replaced by one that hands over the states that were computed before. Final norm, projection, head, soft cap and
logit scale are therefore the model's, whatever they are. Rows go through it in chunks that are reduced at once,
so that rows x vocabulary never exists. Probabilities are in float32 (float64 for a float64 model),
means are in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace.errors import NumericsError
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import forward_pass, replaced_forward

CHUNK_BYTES = 128 << 20
"""Largest float32 logits tensor of one chunk of rows."""

CPU_CHUNK = 128
CPU_SLICE = 16
"""Rows that a CPU takes through the head together, and rows whose softmax it then takes together, at most. Larger
tensors of 50,000 tokens are given back to the system when they are freed, and mapped anew for every chunk."""


@dataclass(frozen=True)
class Scores:
    """What an engine returns.

    Attributes:
        target: token id the probabilities are of.
        cells: float64 [cell, sample] p(target) of each restored run.
        clean: [vocab], float32 or float64, next-token distribution of the clean run.
        corrupted: [sample, vocab] of each corrupted run.
        how: what computed them, plain JSON for results.
    """

    target: int
    cells: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray
    how: Mapping[str, Any] = field(default_factory=dict)


def distributions(logits: Tensor) -> np.ndarray:
    """Probabilities over the last axis, in float32 or better, on the host; read as `_probabilities` reads rows."""
    shifted = _shifted(logits)
    return torch.exp(shifted - shifted.exp().sum(-1, keepdim=True).log()).cpu().numpy()


def _shifted(logits: Tensor) -> Tensor:
    """Logits less the largest of each row, in float32, or in float64 if they are: a new tensor.

    What is read from it, p = exp(x - log(sum(exp(x)))), has a relative error of at most 2**-23 x (8 + |log p|),
    whatever the vocabulary, because torch adds up in pairs. Its own float32 softmax adds up one exponential after the
    other on a CPU, and is off by 2e-5 to 1e-4 at 262,144 tokens, always to the same side.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.amax(-1, keepdim=True)


def row_probabilities(anatomy: Anatomy, states: Tensor, targets: Tensor, as_output: Callable[[Tensor], Any]) -> Tensor:
    """p(target) of rows, [row], in float32 or better.

    Args:
        anatomy: the model.
        states: last-token outputs of the last block, [..., row, d_model] with the rows on `anatomy.row_axis`.
        targets: int64 [row] token ids, on any device.
        as_output: gives a hidden state the form of a block's output.
    """
    chunk = max(1, CHUNK_BYTES // (4 * anatomy.vocabulary))
    if anatomy.device.type == "cpu":
        chunk = min(chunk, CPU_CHUNK)
    with forward_pass(anatomy.model):
        chunks = states.split(chunk, anatomy.row_axis) if len(targets) else []
        parts = [_tail(anatomy, *part, as_output) for part in zip(chunks, targets.split(chunk), strict=False)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float32, device=states.device)


def _tail(anatomy: Anatomy, states: Tensor, targets: Tensor, as_output: Callable[[Tensor], Any]) -> Tensor:
    axis = anatomy.row_axis
    output = as_output(states.unsqueeze(axis + 1))
    ids = torch.zeros(states.shape[axis], 1, dtype=torch.long, device=anatomy.device)
    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(replaced_forward(block, lambda *_args, **_kwargs: output))
        logits = anatomy.model(input_ids=ids, use_cache=False).logits[:, -1]
    targets = targets.to(logits.device, non_blocking=True)
    rows = CPU_SLICE if logits.device.type == "cpu" else max(1, len(logits))
    return torch.cat([_probabilities(*part) for part in zip(logits.split(rows), targets.split(rows), strict=True)])


def _probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    shifted = _shifted(logits)
    of_targets = shifted.gather(1, targets[:, None])[:, 0]
    return torch.exp(of_targets - shifted.exp_().sum(-1).log())


def scores_of_rows(rows: np.ndarray, cell_row: np.ndarray, base: np.ndarray, target: int) -> Scores:
    """Puts rows and base runs together.

    Args:
        rows: [sample, row] probabilities of restored rows.
        cell_row: [cell] row, or CORRUPTED_CELL, or CLEAN_CELL (`edits.py`).
        base: [1 + sample, vocab] distributions of the base runs.
        target: token id.
    """
    clean = np.full((len(rows), 1), base[0, target], dtype=np.float64)
    corrupted = base[1:, target, None].astype(np.float64)
    table = np.concatenate((rows.astype(np.float64), clean, corrupted), axis=1)
    return Scores(target, table[:, cell_row].T, base[0], base[1:])


def check_finite(block_sums: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises if the hidden states of a block were not finite.

    Args:
        block_sums: the sum of all outputs of each block.
        dtype: of the model.

    Raises:
        NumericsError: naming the first such block.
    """
    device = block_sums[-1].device
    finite = torch.stack([total.to(device, non_blocking=True) for total in block_sums]).isfinite().cpu().tolist()
    if not all(finite):
        advice = "load the model with dtype='bfloat16'" if dtype == torch.float16 else "look at the weights"
        raise NumericsError(f"block {finite.index(False)} produced inf or NaN in {str(dtype)[6:]}: {advice}")
