"""Readout: last-token hidden states to metrics, through the model's own final norm and head.

The tail of the model is run as the model runs it: its own forward on one-token sequences, with every block
replaced by one that hands over the states that were computed before. Final norm, projection, head, soft cap and
logit scale are therefore the model's, whatever they are. Rows go through it in chunks that are reduced at once,
so that rows x vocabulary never exists. Metrics are in float32 (float64 for a float64 model), means in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrace.engines.metrics import Answers, scored
from fasttrace.errors import NumericsError
from fasttrace.experiment.metrics import FOIL_METRICS
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import forward_pass, replaced_forward

AsOutput = Callable[[Tensor], Any]

CHUNK_BYTES = 128 << 20
"""Largest float32 logits tensor of one chunk of rows."""

CPU_CHUNK = 128
CPU_SLICE = 16
"""Rows that a CPU takes through the head together, and rows whose softmax it then takes together, at most. Larger
tensors of 50,000 tokens are given back to the system when they are freed, and mapped anew for every chunk."""

TOP_TOKENS = 100
"""Next tokens kept of the clean and the corrupted run."""


class PromptAnswers(NamedTuple):
    """What one prompt was scored against, on the host.

    Attributes:
        targets, foils: token ids.
        names: of the metrics that its pass computed.
    """

    targets: tuple[int, ...]
    foils: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What an engine returns.

    Attributes:
        targets, foils: token ids that metrics are of.
        names: of the metrics.
        table: float64 [metric, cell, sample] of each restored run.
        base: float64 [metric, 1 + sample] of the clean run and each corrupted one.
        distributions: [1 + sample, vocab], float32 or float64, their next-token distributions, where they were
            computed; after `with_top` none.
        top: "clean" and "corrupted" -> ids and probabilities of the most probable next tokens, of the mean over
            samples; empty before `with_top`.
        how: what computed them, plain JSON for results.
    """

    targets: tuple[int, ...]
    foils: tuple[int, ...]
    names: tuple[str, ...]
    table: np.ndarray
    base: np.ndarray
    distributions: Tensor
    top: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> int:
        """The first target."""
        return self.targets[0]

    @property
    def cells(self) -> np.ndarray:
        """[cell, sample] p(target), a view."""
        return self.of("prob")

    @property
    def clean(self) -> np.ndarray:
        """[vocab] distribution of the clean run."""
        return self.distributions[0].cpu().numpy()

    @property
    def corrupted(self) -> np.ndarray:
        """[sample, vocab] distributions of the corrupted runs."""
        return self.distributions[1:].cpu().numpy()

    def of(self, metric: str) -> np.ndarray:
        """[cell, sample] of one metric."""
        return self.table[self.names.index(metric)]

    def base_of(self, metric: str) -> np.ndarray:
        """[1 + sample] of one metric: the clean run's, and the corrupted ones'."""
        return self.base[self.names.index(metric)]

    def with_mean(self) -> "Scores":
        """The same with but two distributions, the clean one and the mean of the corrupted ones."""
        clean, corrupted = self.distributions[:1], self.distributions[1:]
        if not len(corrupted):
            return self
        return replace(self, distributions=torch.cat((clean, corrupted.mean(0, keepdim=True))))

    def with_top(self) -> "Scores":
        """The same with the most probable next tokens in place of the distributions."""
        return replace(self, top=_top(self.distributions), distributions=self.distributions[:0])


def _top(distributions: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    probs, ids = (each.cpu().numpy() for each in distributions.topk(min(TOP_TOKENS, distributions.shape[1])))
    order = [np.lexsort((row_ids, -row)) for row_ids, row in zip(ids, probs, strict=True)]
    runs = zip(("clean", "corrupted"), ids, probs, order, strict=False)
    return {run: (row_ids[best], row[best]) for run, row_ids, row, best in runs}


def scores_of_rows(
    anatomy: Anatomy, states: Tensor, prompts: np.ndarray, rows: Tensor, answers: Answers, as_output: AsOutput
) -> Tensor:
    """All metrics of rows, [metric, row], in float32 or better.

    Args:
        anatomy: the model.
        states: last-token outputs of the last block, [..., row, d_model] with the rows on `anatomy.row_axis`.
        prompts: [row] which prompt a row is of, rows of one prompt together.
        rows: the same on a device.
        answers: of the prompts.
        as_output: gives a hidden state the form of a block's output.
    """
    chunk = max(1, CHUNK_BYTES // (4 * anatomy.vocabulary))
    if anatomy.device.type == "cpu":
        chunk = min(chunk, CPU_CHUNK)
    with forward_pass(anatomy.model):
        chunks = states.split(chunk, anatomy.row_axis) if len(prompts) else []
        places = range(0, len(prompts), chunk)
        parts = [
            scored_in_slices(
                _logits(anatomy, part, as_output), answers, prompts[at : at + chunk], rows[at : at + chunk]
            )
            for part, at in zip(chunks, places, strict=True)
        ]
    return torch.cat(parts, -1) if parts else answers.probs.new_zeros(len(answers.names), 0)


def _logits(anatomy: Anatomy, states: Tensor, as_output: AsOutput) -> Tensor:
    axis = anatomy.row_axis
    output = as_output(states.unsqueeze(axis + 1))
    ids = torch.zeros(states.shape[axis], 1, dtype=torch.long, device=anatomy.device)
    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(replaced_forward(block, lambda *_args, **_kwargs: output))
        return anatomy.model(input_ids=ids, use_cache=False).logits[:, -1]


def scored_in_slices(logits: Tensor, answers: Answers, prompts: np.ndarray, rows: Tensor) -> Tensor:
    """`metrics.scored` of [row, vocab] logits, on a CPU a few rows at a time."""
    rows, answers = rows.to(logits.device, non_blocking=True), answers.to(logits.device)
    size = CPU_SLICE if logits.device.type == "cpu" else max(1, len(logits))
    slices = (slice(at, at + size) for at in range(0, len(logits), size))
    return torch.cat([scored(logits[part], answers, prompts[part], rows[part]) for part in slices], -1)


def scores_of_plan(
    rows: np.ndarray, cell_row: np.ndarray, base: np.ndarray, distributions: Tensor, answers: "PromptAnswers"
) -> Scores:
    """Looks up each cell's metrics: from its row, or from a base run if it needs no row.

    Args:
        rows: [metric, sample, row] of restored rows.
        cell_row: [cell] row, or CORRUPTED_CELL, or CLEAN_CELL (`edits.py`).
        base: [metric, 1 + sample] of the base runs.
        distributions: [1 + sample, vocab] of the base runs.
        answers: of the prompt.
    """
    rows, base = rows.astype(np.float64), base.astype(np.float64)
    clean = np.broadcast_to(base[:, :1, None], (*rows.shape[:2], 1))
    # Where there is no corrupted run, no cell is in one.
    corrupted = base[:, 1:, None] if base.shape[1] > 1 else np.full_like(clean, np.nan)
    table = np.concatenate((rows, clean, corrupted), axis=-1)
    cells = table[:, :, cell_row].swapaxes(1, 2)
    kept = [number for number, name in enumerate(answers.names) if answers.foils or name not in FOIL_METRICS]
    names = tuple(answers.names[number] for number in kept)
    return Scores(answers.targets, answers.foils, names, cells[kept], base[kept], distributions)


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
