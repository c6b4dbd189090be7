"""Corruptions: what is done to a prompt to make its corrupted runs.

A corruption is plain data and knows no prompt; `runs` applies it to one and gives its `Runs`, the tensors that engines
take. Run 0 of a prompt is the prompt as it is, runs 1 to N are corrupted.

Noise has the bits of the code published with Meng et al. (2022): a fresh generator per prompt, drawn and added in
float64 and rounded once to the model's dtype. The same seed gives the same noise on every device.

Some models look their tokens up a second time (`models/second_look.py`), where noise cannot reach: what is read
there may be the number of an expert. There a corrupted run sees a neutral token in place of the subject, so that what
is left of the subject is its noised embedding, as in any other model. The noise keeps its bits. A counterfactual is
seen everywhere as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fasttrace.checks import flag, items, one_of, shown, token_ids, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.settings import noise_factor, noise_value

__all__ = [
    "Corruption",
    "Counterfactual",
    "EmbeddingsReplaced",
    "Moments",
    "NoCorruption",
    "Noise",
    "Runs",
    "draw",
    "sigma_of",
]


@dataclass(frozen=True)
class Runs:
    """The corrupted runs of one prompt; as many as `noise` or `ids` have, none if there is neither.

    Attributes:
        span: positions, half open, outside which the embedding outputs of every run are those of the clean run;
            (n_positions, n_positions) where they differ nowhere.
        noise: float64 [run, position in span, d_model], added to the outputs of the embedding module; None: nothing.
        neutral: token id that stands for the span wherever else the model looks; None: it looks nowhere else.
        ids: int64 [run, position] token ids of each run; None: the prompt's.
        replaces: `noise` stands in place of the embeddings.
    """

    span: tuple[int, int]
    noise: Tensor | None = None
    neutral: int | None = None
    ids: Tensor | None = None
    replaces: bool = False

    def __len__(self) -> int:
        """Number of corrupted runs."""
        given = self.noise if self.noise is not None else self.ids
        return 0 if given is None else len(given)

    def part(self, runs: slice) -> "Runs":
        """Some of the runs."""
        noise, ids = (None if each is None else each[runs] for each in (self.noise, self.ids))
        return replace(self, noise=noise, ids=ids)

    def on(self, device: torch.device) -> "Runs":
        """The same with its noise on a device; nothing waits for the copy."""
        if self.noise is None or device.type != "cuda" or self.noise.is_cuda:
            return self
        return replace(self, noise=self.noise.pin_memory().to(device, non_blocking=True))

    def embedded(self, embeddings: Tensor) -> Tensor:
        """Embedding outputs [1 + run, position, d_model] of the runs' token ids, corrupted; row 0 stays clean."""
        if self.noise is None:
            return embeddings
        begin, end = self.span
        corrupted = embeddings.clone()
        # Where a run's ids are a neutral token's, the prompt's own embeddings are the clean run's.
        own = embeddings[:1] if self.neutral is not None and self.ids is None else embeddings[1:]
        noise = self.noise.to(embeddings.device)
        corrupted[1:, begin:end].copy_(noise if self.replaces else own[:, begin:end].to(torch.float64) + noise)
        return corrupted

    def seen(self, token_ids: Tensor) -> Tensor:
        """int64 [run, position] token ids that the runs are fed with.

        Args:
            token_ids: int64 [position] of the prompt.
        """
        if self.ids is not None:
            return self.ids
        seen = token_ids.expand(len(self), -1)
        if self.neutral is None:
            return seen
        begin, end = self.span
        return torch.cat((seen[:, :begin], torch.full_like(seen[:, begin:end], self.neutral), seen[:, end:]), dim=1)


class Embedder(Protocol):
    """What a corruption asks a model; `models.anatomy.Anatomy` is one."""

    @property
    def embedding(self) -> nn.Module:
        """The input embedding."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the embedding outputs."""
        ...

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        ...

    @property
    def neutral_token(self) -> int | None:
        """See `Runs.neutral`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the embedding takes its ids."""
        ...


class Corruption(Protocol):
    """A rule that makes the corrupted runs of any prompt."""

    @property
    def n_runs(self) -> int:
        """How many runs it makes of a prompt."""
        ...

    def runs(self, token_ids: Sequence[int], span: tuple[int, int], model: Embedder) -> Runs:
        """The corrupted runs of one prompt.

        Args:
            token_ids: of the prompt.
            span: its subject's positions, half open; a counterfactual does not look at it.
            model: that the runs are for.

        Raises:
            PlanError: the corruption does not fit the prompt.
        """
        ...


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of embedding outputs over texts of the user's, for noise of their distribution.

    Attributes:
        mean: float64 [d_model].
        covariance: float64 [d_model, d_model].
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, embeddings: Tensor) -> "Moments":
        """Of embedding outputs [token, d_model]."""
        values = embeddings.double()
        return cls(values.mean(0), torch.cov(values.T))

    def shaped(self, noise: Tensor) -> Tensor:
        """Standard normal noise [..., d_model] with these moments."""
        _, variances, axes = torch.linalg.svd(self.covariance.double())
        return noise @ (variances.sqrt()[None, :] * axes.mT).mT + self.mean.double()


@dataclass(frozen=True)
class Noise:
    """Seeded noise on the subject's embeddings, one run a sample; the rules of ROME's code.

    Attributes:
        sigma: standard deviation of Gaussian noise, or half the width of uniform noise; see `sigma_of` for rules.
        samples: noise draws.
        seed: of numpy's RandomState.
        distribution: "gaussian" (ROME's numbers and `s3`) or "uniform" on -sigma..sigma (ROME's `u0.5`).
        replaces: the noise stands in place of the embeddings (ROME's `replace`).
        moments: Gaussian noise has these moments in place of sigma (ROME's `m`).

    Raises:
        PlanError: samples below 1, a sigma that is negative or not finite, a seed out of range.
    """

    sigma: float
    samples: int = 10
    seed: int = 1
    distribution: str = "gaussian"
    replaces: bool = False
    moments: Moments | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise PlanError(f"samples is {self.samples!r}: it needs a whole number >= 1 of noise draws")
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise PlanError(f"noise has standard deviation {self.sigma!r}: it must be a finite number >= 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise PlanError(f"seed is {self.seed!r}: it needs a whole number from 0 to 2**32 - 1")
        one_of("distribution", self.distribution, ("gaussian", "uniform"))
        flag("replaces", self.replaces)

    @property
    def n_runs(self) -> int:
        """See `Corruption`."""
        return self.samples

    def runs(self, token_ids: Sequence[int], span: tuple[int, int], model: Embedder) -> Runs:
        """See `Corruption`."""
        return self.drawn(span, model.d_model, model.neutral_token)

    def drawn(self, span: tuple[int, int], d_model: int, neutral: int | None = None) -> Runs:
        """The noise of one prompt; its first k samples are those of k samples.

        Args:
            span: subject tokens, half open.
            d_model: width of the embedding outputs.
            neutral: see `Runs`; a sigma of 0 corrupts nothing, there neither.
        """
        shape = self.samples, span[1] - span[0], d_model
        generator = np.random.RandomState(self.seed)
        if self.distribution == "uniform":
            noise = torch.from_numpy(generator.uniform(-1, 1, shape) * self.sigma)
        elif self.moments is not None:
            noise = self.moments.shaped(torch.from_numpy(generator.randn(*shape)))
        else:
            noise = torch.from_numpy(generator.randn(*shape) * self.sigma)
        corrupts = self.sigma or self.replaces or self.moments is not None
        return Runs(span, noise, neutral if corrupts else None, replaces=self.replaces)


def draw(
    span: tuple[int, int], d_model: int, *, sigma: float, samples: int, seed: int, neutral: int | None = None
) -> Runs:
    """Gaussian noise on one prompt, see `Noise`."""
    return Noise(sigma, samples, seed).drawn(span, d_model, neutral)


@dataclass(frozen=True)
class Counterfactual:
    """Other prompts of as many tokens, one run each: token replacement.

    Attributes:
        token_ids: of each counterfactual prompt.

    Raises:
        PlanError: no prompt, or no token ids.
    """

    token_ids: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        prompts = items("counterfactual", self.token_ids, "a list of prompts, each a list of token ids")
        if not prompts:
            raise PlanError("counterfactual is empty: give at least one prompt of as many tokens")
        checked = [tuple(token_ids(f"counterfactual[{i}]", ids, error=PlanError)) for i, ids in enumerate(prompts)]
        object.__setattr__(self, "token_ids", tuple(checked))

    @property
    def n_runs(self) -> int:
        """See `Corruption`."""
        return len(self.token_ids)

    def runs(self, token_ids: Sequence[int], span: tuple[int, int], model: Embedder) -> Runs:
        """See `Corruption`."""
        prompt = [int(token) for token in token_ids]
        for ids in self.token_ids:
            self._check(prompt, ids, model)
        ids = torch.tensor(self.token_ids, dtype=torch.long, device="cpu")
        differs = (ids != torch.tensor(prompt, dtype=torch.long, device="cpu")).any(0).nonzero()[:, 0].tolist()
        found = (differs[0], differs[-1] + 1) if differs else (len(prompt), len(prompt))
        return Runs(found, None, model.neutral_token, ids)

    def _check(self, prompt: list[int], ids: Sequence[int], model: Embedder) -> None:
        if len(ids) != len(prompt):
            pairs = zip(prompt, ids, strict=False)
            same = next((i for i, (own, other) in enumerate(pairs) if own != other), min(len(prompt), len(ids)))
            raise PlanError(
                f"the counterfactual has {len(ids)} tokens and the prompt {len(prompt)}; runs are compared position by "
                f"position. They agree in their first {same} tokens, then the prompt goes on with "
                f"{shown(prompt[same:])} and the counterfactual with {shown(list(ids[same:]))}"
            )
        for token in ids:
            whole_number("a token id of the counterfactual", token, 0, model.vocabulary - 1)


@dataclass(frozen=True, eq=False)
class EmbeddingsReplaced:
    """The subject's embeddings replaced by one vector, one run.

    Attributes:
        by: "zero", "mean" (of the embedding outputs of all tokens the model knows), or a vector [d_model].

    Raises:
        PlanError: none of these.
    """

    by: str | Tensor = "zero"

    def __post_init__(self) -> None:
        if not isinstance(self.by, Tensor):
            one_of("by", self.by, ("zero", "mean"))

    @property
    def n_runs(self) -> int:
        """See `Corruption`."""
        return 1

    def runs(self, token_ids: Sequence[int], span: tuple[int, int], model: Embedder) -> Runs:
        """See `Corruption`."""
        value = self._vector(model)
        if value.shape != (model.d_model,):
            raise PlanError(
                f"the vector that replaces embeddings has shape {list(value.shape)}: give [{model.d_model}]"
            )
        noise = value.expand(1, span[1] - span[0], -1).contiguous()
        return Runs(span, noise, model.neutral_token, replaces=True)

    def _vector(self, model: Embedder) -> Tensor:
        if isinstance(self.by, Tensor):
            return self.by.detach().to("cpu", torch.float64)
        if self.by == "zero":
            return torch.zeros(model.d_model, dtype=torch.float64, device="cpu")
        return _mean_embedding(model)


def _mean_embedding(model: Embedder, chunk: int = 8192) -> Tensor:
    ids = torch.arange(model.vocabulary, device=model.device)
    with torch.no_grad():
        sums = [model.embedding(part[None])[0].double().sum(0) for part in ids.split(chunk)]
    return (torch.stack(sums).sum(0) / model.vocabulary).cpu()


@dataclass(frozen=True)
class NoCorruption:
    """No corrupted run at all: what ablations need."""

    @property
    def n_runs(self) -> int:
        """See `Corruption`."""
        return 0

    def runs(self, token_ids: Sequence[int], span: tuple[int, int], model: Embedder) -> Runs:
        """See `Corruption`."""
        return Runs((len(token_ids), len(token_ids)))


def sigma_of(
    noise: float | str, embedding: nn.Module, subjects: Sequence[Sequence[int]], device: torch.device | str
) -> float:
    """The standard deviation that a noise rule stands for.

    Args:
        noise: a number (absolute), or "s3": 3 times the standard deviation of the embedding outputs of the
            subjects' tokens, all together ("s" is "s1", any factor may follow).
        embedding: the model's input embedding module.
        subjects: token ids of each subject.
        device: where the embedding takes its ids.

    Raises:
        PlanError: an unknown rule, or one without subjects to measure.

    Source: the noise rules of the code published with Meng et al. (2022).
    """
    noise = noise_value(noise)
    if isinstance(noise, str):
        return noise_factor(noise) * _embedding_std(embedding, subjects, device)
    return noise


def _embedding_std(embedding: nn.Module, subjects: Sequence[Sequence[int]], device: torch.device | str) -> float:
    if not subjects:
        raise PlanError("noise_subjects is empty, and the noise is measured on them: give at least one subject")
    with torch.no_grad():
        tokens = (torch.tensor([list(ids)], dtype=torch.long, device=device) for ids in subjects)
        outputs = [embedding(ids).float().flatten() for ids in tokens]
    return torch.cat(outputs).std().item()
