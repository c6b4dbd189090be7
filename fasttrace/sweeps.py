"""What is done to every prompt of a study, and what becomes of its scores."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import transformers

from fasttrace.engines.job import Job
from fasttrace.engines.readout import Scores
from fasttrace.engines.self_check import EngineChoice
from fasttrace.errors import NumericsError
from fasttrace.experiment.cells import Cell, grid_cells
from fasttrace.experiment.corruption import draw
from fasttrace.fusing.choose import KERNEL_NEEDS
from fasttrace.models.anatomy import Anatomy, module_paths
from fasttrace.models.second_look import second_look_note
from fasttrace.planning.cost import Cost
from fasttrace.prompts.prompt import Prompt, token_text
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.result import BACKGROUND, DIRECTION, TraceResult


@dataclass(frozen=True)
class Sweep:
    """One way to trace prompts.

    Attributes:
        anatomy: the model.
        tokenizer: its tokenizer; None without one.
        windows: stream -> blocks restored together.
        sigma: standard deviation of the noise.
        samples, seed: of the noise.
        choice: the engine.
        about: further metadata of results; its notes go before a prompt's own.
    """

    anatomy: Anatomy
    tokenizer: Any
    windows: Mapping[str, int]
    sigma: float
    samples: int
    seed: int
    choice: EngineChoice
    about: Mapping[str, Any] = field(default_factory=dict)

    def job(self, prompt: Prompt) -> Job:
        """A prompt's cells and noise.

        Raises:
            PlanError: samples, sigma or seed cannot be used.
        """
        drawn = {"sigma": self.sigma, "samples": self.samples, "seed": self.seed, "neutral": self.anatomy.neutral_token}
        noise = draw(prompt.span, self.anatomy.d_model, **drawn)
        ids = torch.tensor(prompt.token_ids, dtype=torch.long, device="cpu")
        return Job(ids, noise, self._cells(len(ids)), prompt.target_id)

    def _cells(self, n_positions: int) -> tuple[Cell, ...]:
        grids = (grid_cells(s, width, self.anatomy.n_layers, n_positions) for s, width in self.windows.items())
        return tuple(cell for grid in grids for cell in grid)

    def result(self, prompt: Prompt, scores: Scores, cost: Cost) -> TraceResult:
        """The grids of a prompt.

        Raises:
            NumericsError: a probability is NaN.
        """
        if not np.isfinite(scores.cells).all():
            raise NumericsError(
                f"probabilities came out as NaN in {self.anatomy.dtype}, with noise of standard deviation "
                f"{self.sigma:g}; try dtype='bfloat16' or 'float32', or less noise"
            )
        shape = (len(self.windows), self.anatomy.n_layers, len(prompt.token_ids), -1)
        metrics = {
            name: MetricGrids.of_samples(
                name, tuple(self.windows), scores.of(name).reshape(shape), scores.base_of(name)
            )
            for name in scores.names
        }
        prob = metrics.pop("prob")
        return TraceResult(
            prob=prob.mean,
            prob_std=prob.std,
            clean_prob=prob.clean,
            corrupted_prob=prob.corrupted,
            corrupted_std=prob.corrupted_std,
            tokens=prompt.tokens,
            token_ids=prompt.token_ids,
            span=prompt.span,
            target=None if self.tokenizer is None else token_text(self.tokenizer, scores.target),
            target_id=scores.target,
            top={run: self._top(*best) for run, best in scores.top.items()},
            windows=dict(self.windows),
            cost=cost,
            metadata={**self._metadata(prompt), **scores.how},
            target_ids=scores.targets,
            foil_ids=scores.foils,
            others=metrics,
        )

    def _top(self, ids: np.ndarray, probs: np.ndarray) -> tuple[tuple[int, str, float], ...]:
        numbers = zip(ids.tolist(), probs.tolist(), strict=True)
        return tuple((token, token_text(self.tokenizer, token), prob) for token, prob in numbers)

    def _metadata(self, prompt: Prompt) -> dict[str, Any]:
        return {
            **self.about,
            "prompt": prompt.text,
            "subject": prompt.subject,
            "notes": [*self.about.get("notes", ()), *prompt.notes, *self._second_look()],
            "sigma": self.sigma,
            "samples": self.samples,
            "seed": self.seed,
            "direction": DIRECTION,
            "background": BACKGROUND,
            "dtype": str(self.anatomy.dtype).removeprefix("torch."),
            "device": str(self.anatomy.device),
            "attention": str(self.anatomy.config._attn_implementation),
            "modules": module_paths(self.anatomy),
            "engine": self.choice.name,
            "engine_reason": self.choice.reason,
            "self_check_error": self.choice.self_check_error,
            "hooks": self.choice.hooks,
            "attention_by": "model",
            "versions": dict(versions()),
        }

    def _second_look(self) -> list[str]:
        """What the corrupted runs see beside noised embeddings, if anything."""
        token = self.anatomy.neutral_token
        return [] if token is None or not self.sigma else [second_look_note(self.anatomy.model, token)]


@cache
def versions() -> Mapping[str, str]:
    """Of what the numbers depend on, or may: what compiles kernels is named where it is installed."""
    from fasttrace import __version__

    found = {
        "fasttrace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for compiler in set(KERNEL_NEEDS.values()):
        with suppress(PackageNotFoundError):
            found[compiler] = version(compiler)
    return found
