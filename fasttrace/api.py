"""The straight line from a prompt to a grid: one call per module."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from fasttrace.adapters import anatomy_of, module_paths
from fasttrace.cells import grid_cells, windows_of
from fasttrace.corruption import Corruption, draw, sigma_of
from fasttrace.cost import Cost
from fasttrace.engines.job import Job
from fasttrace.engines.passes import Progress, run_in_passes
from fasttrace.engines.select import EngineChoice, choose
from fasttrace.errors import NumericsError
from fasttrace.loading import load
from fasttrace.ops import fused
from fasttrace.prompts import Prompt, encode, plain_ids, token_text
from fasttrace.readout import Scores
from fasttrace.results import TraceResult

TOP_TOKENS = 100
"""Next tokens kept of the clean and the corrupted run."""


class Tracer:
    """Traces prompts on one model.

    Attributes:
        model: a decoder-only Hugging Face model; fasttrace leaves it as it is.
        tokenizer: its tokenizer, or None if prompts are given as token ids.
        name, revision: what the results record.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        modules: Mapping[str, str] | None = None,
        fuse: bool = True,
    ):
        """Wraps a loaded model.

        Args:
            model: from AutoModelForCausalLM, on its device(s).
            tokenizer: needed for prompts, subjects and targets given as text.
            name: recorded in results; the model's own name by default.
            revision: recorded in results.
            modules: paths of modules that the rules do not find, or find wrongly: "embedding" and "blocks" (the
                list of transformer blocks) from the model; "attention", "mlp" and "down" (the MLP's down projection)
                from a block. For example {"blocks": "model.layers", "attention": "self_attn", "mlp": "mlp"}.
            fuse: compute activations of several passes over memory in one, while a trace runs.

        Raises:
            ModelError: not a decoder-only language model, or parts that are not found.
        """
        self.model, self.tokenizer, self.fuse = model, tokenizer, fuse
        self._anatomy = anatomy_of(model, modules)
        config: Any = model.config
        self.name = name or config.name_or_path or type(model).__name__
        self.revision = revision or getattr(config, "_commit_hash", None)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        revision: str | None = None,
        modules: Mapping[str, str] | None = None,
        fuse: bool = True,
        device_map: str | Mapping[str, int | str] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
    ) -> "Tracer":
        """Loads a model.

        Args:
            name: Hugging Face id, local folder, or "smollm2", the embedded model.
            dtype: "auto" is float16 on a GPU and float32 on a CPU.
            device: "auto" is the first GPU if there is one.
            revision: of the Hugging Face repository.
            modules: see the constructor.
            fuse: see the constructor.
            device_map: for a model larger than the device: "auto" spreads it over GPUs, main memory and disk.
            max_memory: with a device map, the most to use of each device, such as {0: "20GiB", "cpu": "60GiB"}.
            offload_folder: with a device map, where weights that have to be rewritten are kept on disk.

        Raises:
            ModelError: the model cannot be found, read or traced; an unknown dtype or device.
        """
        places = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        model, tokenizer = load(name, dtype, device, revision, **places)
        return cls(model, tokenizer, name=name, revision=revision, modules=modules, fuse=fuse)

    @property
    def streams(self) -> tuple[str, ...]:
        """The figure's streams, as far as the model has them: without MLP modules no MLP stream."""
        return self._anatomy.streams

    @property
    def modules(self) -> dict[str, str]:
        """Where the parts were found: of every block path that the first block has, from the model."""
        return module_paths(self._anatomy)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self._anatomy.dtype

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return self._anatomy.device

    def choose_engine(self, engine: str = "auto") -> EngineChoice:
        """The engine a trace would get, and why.

        Raises:
            EngineError: an unknown engine, or none that passes the self-check.
        """
        return choose(self._anatomy, engine, self.fuse)

    def trace(
        self,
        prompt: str | Sequence[int],
        *,
        subject: str | tuple[int, int],
        target: str | int | None = None,
        streams: Sequence[str] | None = None,
        window: int = 10,
        noise: float | str = "s3",
        noise_subjects: Sequence[str | Sequence[int]] | None = None,
        samples: int = 10,
        seed: int = 1,
        engine: str = "auto",
        budget: int | str = "auto",
        first_target_token: bool = False,
        progress: Progress | None = None,
    ) -> TraceResult:
        """Causal traces of one prompt: a grid of restored runs per stream.

        Args:
            prompt: text, or token ids.
            subject: text that occurs once in the prompt, or a half-open token span.
            target: text of one token behind the prompt (a space is put before it where two words would meet), a token
                id, or None for the clean run's top token.
            streams: sites whose clean values are restored, one grid each; None: those of the figure that the model
                has, see `streams`.
            window: blocks restored together, except in the residual stream (one block).
            noise: standard deviation of the noise on the subject's embeddings, or "s3" for 3 x that of the
                embedding outputs of the subject's tokens.
            noise_subjects: subjects (text or token ids) to measure for "s3" in place of the prompt's own.
            samples: noise samples, averaged.
            seed: of the noise.
            engine: "auto", "wavefront", "fork", "rows" or "reference".
            budget: largest number of tokens in a pack, or "auto" from free memory.
            first_target_token: of a target of several tokens, score the first.
            progress: called with (steps done, steps in all).

        Raises:
            PromptError: prompt, subject or target cannot be used.
            PlanError: streams, window, noise, samples, seed or budget cannot be used.
            ModelError: the model does not have a stream.
            EngineError: the engine is unknown or wrong for the model.
            NumericsError: inf or NaN, naming the block.

        Source: Meng et al. (2022), "Locating and Editing Factual Associations in GPT", section 2.
        """
        windows = windows_of(self.streams if streams is None else streams, window)
        for site in windows:
            self._anatomy.modules_at(site)
        encoded = self._encode(prompt, subject, target, first_target_token)
        corruption = self._corrupt(encoded, noise, noise_subjects, samples, seed)
        job = Job(torch.tensor(encoded.token_ids), corruption, self._cells(windows, encoded), encoded.target_id)
        choice = self.choose_engine(engine)
        with fused(self._anatomy, self.fuse and choice.name != "reference"):
            scores, cost = run_in_passes(choice.name, self._anatomy, job, budget, progress)
        metadata = self._metadata(encoded, noise, corruption, choice)
        return self._result(encoded, windows, scores, cost, metadata)

    def _encode(self, prompt: Any, subject: Any, target: Any, first_target_token: bool) -> Prompt:
        anatomy = self._anatomy
        return encode(
            self.tokenizer,
            prompt,
            subject,
            target,
            vocabulary=anatomy.vocabulary,
            max_positions=anatomy.max_positions,
            first_target_token=first_target_token,
        )

    def _corrupt(self, prompt: Prompt, noise: Any, subjects: Any, samples: int, seed: int) -> Corruption:
        if subjects is None:
            subjects = [prompt.token_ids[slice(*prompt.span)]]
        ids = [plain_ids(self.tokenizer, item) if isinstance(item, str) else list(item) for item in subjects]
        sigma = sigma_of(noise, self._anatomy.embedding, ids, self.device)
        return draw(prompt.span, self._anatomy.d_model, sigma=sigma, samples=samples, seed=seed)

    def _cells(self, windows: Mapping[str, int], prompt: Prompt) -> tuple:
        n_layers, n_positions = self._anatomy.n_layers, len(prompt.token_ids)
        grids = (grid_cells(stream, width, n_layers, n_positions) for stream, width in windows.items())
        return tuple(cell for grid in grids for cell in grid)

    def _metadata(self, prompt: Prompt, noise: Any, corruption: Corruption, choice: EngineChoice) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.revision,
            "prompt": prompt.text,
            "subject": prompt.subject,
            "notes": list(prompt.notes),
            "noise": noise if isinstance(noise, str) else float(noise),
            "sigma": corruption.sigma,
            "samples": len(corruption.noise),
            "seed": corruption.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "fuse": self.fuse,
            "attention": str(self._anatomy.config._attn_implementation),
            "modules": self.modules,
            "engine": choice.name,
            "engine_reason": choice.reason,
            "self_check_error": choice.self_check_error,
            "versions": _versions(),
        }

    def _result(
        self, prompt: Prompt, windows: Mapping[str, int], scores: Scores, cost: Cost, metadata: dict[str, Any]
    ) -> TraceResult:
        if not np.isfinite(scores.cells).all():
            raise NumericsError(f"probabilities came out as NaN in {self.dtype}; try dtype='bfloat16' or 'float32'")
        grids = scores.cells.reshape(len(windows), self._anatomy.n_layers, len(prompt.token_ids), -1)
        low = scores.corrupted[:, scores.target].astype(np.float64)
        return TraceResult(
            prob=dict(zip(windows, grids.mean(-1), strict=True)),
            prob_std=dict(zip(windows, grids.std(-1), strict=True)),
            clean_prob=float(scores.clean[scores.target]),
            corrupted_prob=float(low.mean()),
            corrupted_std=float(low.std()),
            tokens=prompt.tokens,
            token_ids=prompt.token_ids,
            span=prompt.span,
            target=None if self.tokenizer is None else token_text(self.tokenizer, scores.target),
            target_id=scores.target,
            top={"clean": self._top(scores.clean), "corrupted": self._top(scores.corrupted.mean(0))},
            windows=dict(windows),
            cost=cost,
            metadata=metadata,
        )

    def _top(self, distribution: np.ndarray) -> tuple[tuple[int, str, float], ...]:
        best = np.argsort(-distribution, kind="stable")[:TOP_TOKENS]
        return tuple((int(i), token_text(self.tokenizer, int(i)), float(distribution[i])) for i in best)


def _versions() -> dict[str, str]:
    from fasttrace import __version__

    return {
        "fasttrace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
