"""Metrics of rows of logits, all of them from one pass over each chunk.

A metric is a function of (logits, read) that gives a number a row. `logits` is [row, vocab] in the model's dtype;
`read` says what the rows are scored against and has what metrics share, computed once. A user's own function is taken
as the built-in ones are. What each name means: `experiment/metrics.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fasttrace.errors import PlanError
from fasttrace.experiment.metrics import FOIL_METRICS, METRICS

__all__ = ["FUNCTIONS", "Answers", "Metric", "Read", "distributions", "over_reads", "scored", "shifted"]

NONE = -1
"""Fills up the rows of tables of token ids."""


def shifted(logits: Tensor) -> Tensor:
    """Logits less the largest of each row, in float32, or in float64 if they are: a new tensor.

    What is read from it, p = exp(x - log(sum(exp(x)))), has a relative error of at most 2**-23 x (8 + |log p|),
    whatever the vocabulary, because torch adds up in pairs. Its own float32 softmax adds up one exponential after the
    other on a CPU, and is off by 2e-5 to 1e-4 at 262,144 tokens, always to the same side.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.amax(-1, keepdim=True)


def distributions(logits: Tensor) -> Tensor:
    """Probabilities over the last axis, in float32 or better, where the logits are; read as `prob` reads rows."""
    below = shifted(logits)
    return torch.exp(below - below.exp().sum(-1, keepdim=True).log())


@dataclass(frozen=True)
class Answers:
    """What the prompts of a pass are scored against, on the device of their logits.

    Attributes:
        targets: int64 [prompt, target] token ids, filled up with `NONE`.
        foils: int64 [prompt, foil], the same; of no columns where no prompt has a foil.
        probs: [prompt, vocab] next-token probabilities of the clean runs.
        below: [prompt, vocab] their logits, less the largest.
        log_sum: [prompt] logarithm of the sum of the exponentials of `below`.
        own: a user's metrics, name and function.
    """

    targets: Tensor
    foils: Tensor
    probs: Tensor
    below: Tensor
    log_sum: Tensor
    own: "tuple[tuple[str, Metric], ...]" = ()

    @staticmethod
    def of(clean: Tensor, targets: Tensor, foils: Tensor, own: "Sequence[tuple[str, Metric]]" = ()) -> "Answers":
        """The answers of prompts whose clean runs are done.

        Args:
            clean: [prompt, vocab] logits of the clean runs.
            targets: int64 [prompt, target] on the same device; a row of `NONE` alone asks for the clean top token.
            foils: int64 [prompt, foil], there too.
            own: a user's metrics.
        """
        first = torch.where(targets[:, :1] == NONE, clean.argmax(-1, keepdim=True), targets[:, :1])
        below = shifted(clean)
        log_sum = below.exp().sum(-1).log()
        targets, probs = torch.cat((first, targets[:, 1:]), 1), torch.exp(below - log_sum[:, None])
        return Answers(targets, foils, probs, below, log_sum, tuple(own))

    @property
    def metrics(self) -> "Iterator[tuple[str, Metric]]":
        """Name and function of each metric that is computed."""
        for name in METRICS:
            if self.foils.shape[1] or name not in FOIL_METRICS:
                yield name, FUNCTIONS[name]
        yield from self.own

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics that are computed."""
        return tuple(name for name, _ in self.metrics)

    def to(self, device: torch.device) -> "Answers":
        """The same on another device; nothing waits for the copy."""
        if self.targets.device == device:
            return self
        names = ("targets", "foils", "probs", "below", "log_sum")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class Read:
    """What some rows of logits are scored against, and what their metrics share.

    Attributes:
        logits: [row, vocab], as the model gave them.
        below: [row, vocab] the same less the largest of the row, in float32 or better.
        log_sum: [row] logarithm of the sum of the exponentials of `below`.
        targets: int64 [row, target] token ids, filled up with -1 where other prompts have more.
        foils: int64 [row, foil], the same; of no columns where there is no foil.
    """

    def __init__(self, logits: Tensor, answers: Answers, prompts: np.ndarray, rows: Tensor):
        self.logits, self.below = logits, shifted(logits)
        self.log_sum = self.below.exp().sum(-1).log()
        self.targets, self.foils = answers.targets[rows], answers.foils[rows]
        self._answers, self._prompts, self._rows = answers, prompts, rows

    @property
    def clean_log_sum(self) -> Tensor:
        """[row] `log_sum` of the clean run of each row's prompt."""
        return self._answers.log_sum[self._rows]

    @cached_property
    def clean(self) -> Tensor:
        """[row, vocab] next-token probabilities of the clean run of each row's prompt."""
        return self._answers.probs[self._rows]

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities [row, token] of tokens [row, token]; -inf where an id is -1."""
        return self.taken(self.below, ids, -torch.inf) - self.log_sum[:, None]

    def mean_logits(self, ids: Tensor) -> Tensor:
        """Mean logit [row] of tokens [row, token], those of -1 left out."""
        found = self.taken(self.logits, ids, 0).to(self.below.dtype)
        return found.sum(-1) / (ids != NONE).sum(-1)

    def of_prompts(self) -> Iterator[tuple[Tensor, Answers, int]]:
        """Parts of `below` whose rows are of one prompt, with the answers and the prompt's number."""
        ends = (*(np.flatnonzero(np.diff(self._prompts)) + 1), len(self._prompts))
        for begin, end in pairwise((0, *ends)):
            yield self.below[begin:end], self._answers, int(self._prompts[begin])

    @staticmethod
    def taken(values: Tensor, ids: Tensor, missing: float) -> Tensor:
        """Values [row, token] at tokens [row, token] of values [row, vocab]; `missing` where an id is -1."""
        return values.gather(1, ids.clamp(min=0)).masked_fill(ids == NONE, missing)


Metric = Callable[[Tensor, Read], Tensor]
"""(logits [row, vocab], read) -> [row]."""


def prob(_logits: Tensor, read: Read) -> Tensor:
    """p(target), summed over its tokens."""
    return read.log_probs(read.targets).exp().sum(-1)


def log_prob(_logits: Tensor, read: Read) -> Tensor:
    """Natural logarithm of p(target)."""
    return read.log_probs(read.targets).logsumexp(-1)


def logit(_logits: Tensor, read: Read) -> Tensor:
    """Mean logit of the target's tokens."""
    return read.mean_logits(read.targets)


def logit_diff(_logits: Tensor, read: Read) -> Tensor:
    """Mean logit of the target's tokens minus that of the foil's."""
    return read.mean_logits(read.targets) - read.mean_logits(read.foils)


def prob_diff(_logits: Tensor, read: Read) -> Tensor:
    """p(target) minus p(foil), each summed over its tokens."""
    return prob(_logits, read) - read.log_probs(read.foils).exp().sum(-1)


def kl(_logits: Tensor, read: Read) -> Tensor:
    """KL(clean run || row), summed over the vocabulary.

    Logits are subtracted before they are weighted, so that equal rows give 0 and small differences keep their digits.
    """
    parts = [(answers.below[prompt] - below) @ answers.probs[prompt] for below, answers, prompt in read.of_prompts()]
    return (torch.cat(parts) + read.log_sum - read.clean_log_sum).clamp(min=0)


def rank(_logits: Tensor, read: Read) -> Tensor:
    """How many tokens have a larger logit than the best of the target's."""
    best = read.taken(read.below, read.targets, -torch.inf).amax(-1, keepdim=True)
    # Comparing into numbers and adding those up is four times as fast on a CPU as adding up truth values.
    return torch.gt(read.below, best, out=torch.empty_like(read.below)).sum(-1)


def top1(_logits: Tensor, read: Read) -> Tensor:
    """Id of the most probable token."""
    if read.below.device.type == "cpu":  # numpy looks at several numbers at once, twelve times as fast
        return torch.from_numpy(read.below.numpy().argmax(-1))
    return read.below.argmax(-1)


FUNCTIONS: dict[str, Metric] = {
    "prob": prob,
    "log_prob": log_prob,
    "logit": logit,
    "logit_diff": logit_diff,
    "prob_diff": prob_diff,
    "kl": kl,
    "rank": rank,
    "top1": top1,
}


def scored(logits: Tensor, answers: Answers, prompts: np.ndarray, rows: Tensor) -> Tensor:
    """All metrics of rows of logits, [metric, row], in float32 or better.

    Args:
        logits: [row, vocab].
        answers: of all prompts, on the same device.
        prompts: [row] which prompt a row is of, rows of one prompt together.
        rows: the same on the device.

    Raises:
        PlanError: a user's function gives anything but a number a row.
    """
    read = Read(logits, answers, prompts, rows)
    dtype = read.below.dtype
    return torch.stack(
        [_checked(name, metric(logits, read), len(logits)).to(dtype) for name, metric in answers.metrics]
    )


def over_reads(names: Sequence[str], table: np.ndarray) -> np.ndarray:
    """Metrics of an answer that is read token by token, from those of its tokens.

    Probabilities are multiplied; logarithms, logits and divergences are added up. The rank is the worst one, so that 0
    says that every token comes first; `top1` is the first token's. Of a user's own metric it is the mean.

    Args:
        names: of the metrics.
        table: [metric, read, ...].

    Returns:
        [metric, ...].
    """
    if table.shape[1] == 1:
        return table[:, 0]
    how = {"prob": np.prod, "rank": np.max, "top1": _first} | dict.fromkeys(("log_prob", "logit", "kl"), np.sum)
    return np.stack([how.get(name, np.mean)(values, axis=0) for name, values in zip(names, table, strict=True)])


def _first(values: np.ndarray, axis: int) -> np.ndarray:
    return values.take(0, axis)


def _checked(name: str, values: object, n_rows: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (n_rows,):
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise PlanError(f"metric {name!r} gave {found} for {n_rows} rows of logits: return a tensor [row]")
    return values
