"""Corruption: seeded Gaussian noise on the subject's embeddings.

The bits are those of the code published with Meng et al. (2022): a fresh generator per prompt, drawn and added
in float64 and rounded once to the model's dtype. The same seed gives the same noise on every device.

Some models look their tokens up a second time (`adapters/second_look.py`), where noise cannot reach: what is read
there may be the number of an expert. There a corrupted run sees a neutral token in place of the subject, so that what
is left of the subject is its noised embedding, as in any other model. The noise keeps its bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fasttrace.errors import PlanError
from fasttrace.experiment.settings import noise_factor, noise_value


@dataclass(frozen=True)
class Corruption:
    """What is done to the subject of a prompt.

    Attributes:
        span: tokens it is done to, half open.
        sigma: standard deviation of the noise, in units of the embedding outputs.
        seed: of numpy's RandomState.
        noise: float64 [sample, position in span, d_model], added to the outputs of the embedding module.
        neutral: token id that stands for the subject wherever else the model looks; None: it looks nowhere else.
    """

    span: tuple[int, int]
    sigma: float
    seed: int
    noise: Tensor
    neutral: int | None = None

    def part(self, samples: slice) -> "Corruption":
        """Some of the noise samples."""
        return replace(self, noise=self.noise[samples])

    def added_to(self, embeddings: Tensor) -> Tensor:
        """Embeddings [1 + sample, position, d_model] with row 0 kept clean and noise added to the others."""
        begin, end = self.span
        corrupted = embeddings.clone()
        clean = (
            embeddings[1:] if self.neutral is None else embeddings[:1]
        )  # the others' ids are no longer the subject's
        subject = clean[:, begin:end].to(torch.float64)
        corrupted[1:, begin:end].copy_(subject + self.noise.to(embeddings.device))
        return corrupted

    def seen_elsewhere(self, ids: Tensor) -> Tensor:
        """[position] token ids of a corrupted run as everything but the input embedding sees them."""
        if self.neutral is None:
            return ids
        begin, end = self.span
        return torch.cat((ids[:begin], torch.full_like(ids[begin:end], self.neutral), ids[end:]))


def draw(
    span: tuple[int, int], d_model: int, *, sigma: float, samples: int, seed: int, neutral: int | None = None
) -> Corruption:
    """Draws the noise of one prompt; its first k samples are those of a k-sample draw.

    Args:
        span: subject tokens, half open.
        d_model: width of the embedding outputs.
        sigma: standard deviation.
        samples: noise samples, >= 1.
        seed: 0 to 2**32 - 1.
        neutral: see `Corruption`; a sigma of 0 corrupts nothing, there neither.

    Raises:
        PlanError: samples below 1, a sigma that is negative or not finite, a seed out of range.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise PlanError(f"samples is {samples!r}: it needs a whole number >= 1 of noise draws")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise PlanError(f"noise has standard deviation {sigma!r}: it must be a finite number >= 0")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise PlanError(f"seed is {seed!r}: it needs a whole number from 0 to 2**32 - 1")
    drawn = np.random.RandomState(seed).randn(samples, span[1] - span[0], d_model) * sigma
    return Corruption(span, sigma, seed, torch.from_numpy(drawn), neutral if sigma else None)


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
