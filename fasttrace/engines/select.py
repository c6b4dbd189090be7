"""Which engine a model gets: the first one that a self-check on this very model finds right.

Packed tracing is silently wrong on a few families, and only a comparison with plain forward passes shows it. So
the check is not optional for "auto", and a named engine must run or raise.
"""

import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from fasttrace.adapters import Anatomy
from fasttrace.cells import STREAMS, Cell, Edit, window_of
from fasttrace.corruption import draw, sigma_of
from fasttrace.engines import ENGINES
from fasttrace.engines.job import Job
from fasttrace.errors import EngineError, FasttraceError
from fasttrace.ops import fused
from fasttrace.readout import Scores

logger = logging.getLogger("fasttrace")

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 0.3
"""Largest difference of a log-probability that the self-check lets pass. Half precision moves by this much when
only the shapes of its matrix products change."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine and why.

    Attributes:
        name: of the engine.
        reason: one sentence.
        self_check_error: largest difference of a log-probability from plain forward passes; None: not checked.
    """

    name: str
    reason: str
    self_check_error: float | None = None


_CHOICES: WeakKeyDictionary[nn.Module, dict[bool, EngineChoice]] = WeakKeyDictionary()


def choose(anatomy: Anatomy, engine: str = "auto", fuse: bool = True) -> EngineChoice:
    """The engine for a model; "auto" checks once per model object, with the fused operations it will run with.

    Raises:
        EngineError: an unknown engine, or none that passes.
    """
    if engine in ENGINES:
        return EngineChoice(engine, "asked for by name")
    if engine != "auto":
        raise EngineError(f"unknown engine {engine!r}; choose from auto, {', '.join(ENGINES)}")
    choices = _CHOICES.setdefault(anatomy.model, {})
    if fuse not in choices:
        choices[fuse] = _first_that_passes(anatomy, fuse)
    return choices[fuse]


def _first_that_passes(anatomy: Anatomy, fuse: bool) -> EngineChoice:
    job = _check_job(anatomy)
    expected = ENGINES["reference"](anatomy, job, _no_tick)
    tolerance = TOLERANCE.get(anatomy.dtype, HALF_TOLERANCE)
    failures: list[str] = []
    for name in ("wavefront", "rows"):
        problem, error = _compare(anatomy, job, name, expected, tolerance, fuse)
        if problem is None:
            reason = "; ".join([*failures, f"{name} passed the self-check"])
            logger.info("engine %s: %s (error %.1e)", name, reason, error)
            return EngineChoice(name, reason, error)
        failures.append(f"{name} {problem}")
        logger.warning("engine %s, stepping down", failures[-1])
    raise EngineError(f"no engine is right for {type(anatomy.model).__name__}: {'; '.join(failures)}")


def _compare(
    anatomy: Anatomy, job: Job, name: str, expected: Scores, tolerance: float, fuse: bool
) -> tuple[str | None, float | None]:
    """(what is wrong with an engine or None, its error)."""
    try:
        with fused(anatomy, fuse):
            error = _distance(ENGINES[name](anatomy, job, _no_tick), expected)
    except (FasttraceError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as raised:
        return f"does not run ({type(raised).__name__}: {raised})", None
    if not error <= tolerance:
        return (
            f"differs from plain forward passes by {error:.1e} in log-probability (allowed {tolerance:.0e})",
            error,
        )
    return None, error


def _distance(scores: Scores, expected: Scores) -> float:
    """Largest difference of log p(target) over base runs and cells."""

    def of_target(given: Scores) -> np.ndarray:
        base = [given.clean[None, expected.target], given.corrupted[:, expected.target], given.cells.ravel()]
        return np.log(np.maximum(np.concatenate(base, dtype=np.float64), 1e-30))

    return float(np.abs(of_target(scores) - of_target(expected)).max())


def _check_job(anatomy: Anatomy) -> Job:
    """A short prompt of arbitrary tokens, two noise samples, a few cells of every stream."""
    n_positions = min(6, anatomy.max_positions or 6)
    ids = (torch.arange(n_positions) * 1013 + 7) % anatomy.vocabulary
    span = (min(1, n_positions - 1), min(3, n_positions))
    sigma = sigma_of("s3", anatomy.embedding, [ids[slice(*span)].tolist()], anatomy.device)
    corruption = draw(span, anatomy.d_model, sigma=sigma, samples=2, seed=0)
    return Job(ids, corruption, _check_cells(anatomy.n_layers, n_positions, span), target=None)


def _check_cells(n_layers: int, n_positions: int, span: tuple[int, int]) -> tuple[Cell, ...]:
    places = ((n_layers // 4, span[0]), (n_layers // 2, n_positions - 1))
    return tuple(
        tuple(
            Edit(stream, block, position) for block in window_of(layer, 1 if stream == "block_output" else 3, n_layers)
        )
        for stream in STREAMS
        for layer, position in places
    )


def _no_tick() -> None:
    pass
