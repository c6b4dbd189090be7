"""Readout: last-token hidden states to probabilities, through the model's own final norm and head.

The tail of the model is run as the model runs it: its own forward on one-token sequences, with every block
replaced by one that hands over the states that were computed before. Final norm, projection, head, soft cap and
logit scale are therefore the model's, whatever they are. Rows go through it in chunks that are reduced at once,
so that rows x vocabulary never exists. Softmax and means are in float32 and float64.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace.adapters import Anatomy
from fasttrace.errors import NumericsError
from fasttrace.hooks import evaluating, replaced_forward

CHUNK_BYTES = 128 << 20
"""Largest float32 logits tensor of one chunk of rows."""


@dataclass(frozen=True)
class Scores:
    """What an engine returns.

    Attributes:
        target: token id the probabilities are of.
        cells: float64 [cell, sample] p(target) of each restored run.
        clean: float32 [vocab] next-token distribution of the clean run.
        corrupted: float32 [sample, vocab] of each corrupted run.
    """

    target: int
    cells: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray


def distributions(logits: Tensor) -> np.ndarray:
    """Softmax over the last axis, in float32, on the host."""
    return logits.float().softmax(-1).cpu().numpy()


def row_probabilities(anatomy: Anatomy, states: Tensor, target: int, as_output: Callable[[Tensor], Any]) -> Tensor:
    """p(target) of rows, float32 [row].

    Args:
        anatomy: the model.
        states: [row, d_model] last-token outputs of the last block.
        target: token id.
        as_output: gives a hidden state the form of a block's output.
    """
    chunk = max(1, CHUNK_BYTES // (4 * anatomy.vocabulary))
    with evaluating(anatomy.model):
        parts = [_tail(anatomy, part, target, as_output) for part in states.split(chunk)] if len(states) else []
    return torch.cat(parts) if parts else torch.zeros(0, device=states.device)


def _tail(anatomy: Anatomy, states: Tensor, target: int, as_output: Callable[[Tensor], Any]) -> Tensor:
    output = as_output(states.unsqueeze(1))
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=anatomy.device)
    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(replaced_forward(block, lambda *_args, **_kwargs: output))
        logits = anatomy.model(input_ids=ids, use_cache=False).logits[:, -1].float()
    return torch.exp(logits[:, target] - logits.logsumexp(-1))


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
    finite = torch.stack([total.to("cpu") for total in block_sums]).isfinite().tolist()
    if not all(finite):
        advice = "load the model with dtype='bfloat16'" if dtype == torch.float16 else "look at the weights"
        raise NumericsError(f"block {finite.index(False)} produced inf or NaN in {str(dtype)[6:]}: {advice}")
