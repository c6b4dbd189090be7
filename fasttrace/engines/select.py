"""Which engine a model gets: the first one that a self-check on this very model finds right.

Packed tracing is silently wrong on a few families, and only a comparison with plain forward passes shows it. So
the check is not optional: "auto" takes the first engine that passes, and one that is named has to pass too.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from fasttrace.adapters import Anatomy
from fasttrace.adapters.families import NOT_PACKED
from fasttrace.cells import Cell, Edit, window_of
from fasttrace.corruption import draw, sigma_of
from fasttrace.engines import ENGINES, PACKING, reference
from fasttrace.engines.in_float32 import can_be_widened, difference_in_float32
from fasttrace.engines.job import Job
from fasttrace.errors import EngineError, FasttraceError
from fasttrace.ops import fused, fused_attention
from fasttrace.readout import Scores

logger = logging.getLogger("fasttrace")

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 0.3
"""Largest difference of a log-probability that the self-check lets pass. Half precision moves by this much when
only the shapes of its matrix products change."""

ROUNDINGS = 2
"""In half precision, what also passes: so many times what plain passes move by when the noise is rounded otherwise."""

_RAISED = (FasttraceError, RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError)
"""What an engine may raise on a model it is not made for."""

TOP_TOKENS = 20
"""Most likely next tokens of each base run that are compared."""


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


@dataclass
class _Checks:
    """What the self-check of one model found so far.

    Attributes:
        job: what it runs.
        expected: what plain forward passes give.
        tolerance: largest difference of a log-probability from them.
        found: by engine, what is wrong with it (None: nothing) and its error (None: it does not run).
        sharing: by engine, why prompts do not share its passes (None: they do).
    """

    job: Job
    expected: Scores
    tolerance: float
    found: dict[str, tuple[str | None, float | None]] = field(default_factory=dict)
    sharing: dict[str, str | None] = field(default_factory=dict)


_CHECKS: WeakKeyDictionary[nn.Module, dict[tuple, _Checks]] = WeakKeyDictionary()


def choose(anatomy: Anatomy, engine: str = "auto", fuse: bool = True) -> EngineChoice:
    """The engine for a model, checked once per model object with the fused operations it will run with.

    Args:
        anatomy: the model.
        engine: "auto" for the first that passes, or a name; "reference" by name is not checked.
        fuse: whether fused operations are on.

    Raises:
        EngineError: an unknown engine, one that is wrong for this model, or none that is right.
    """
    if engine == "reference":
        return EngineChoice(engine, "asked for by name")
    if engine not in ENGINES and engine != "auto":
        raise EngineError(f"unknown engine {engine!r}; choose from auto, {', '.join(ENGINES)}")
    checks = _checks_of(anatomy, fuse)
    if engine == "auto":
        return _first_that_passes(anatomy, checks, fuse)
    problem, error = _check(anatomy, checks, engine, fuse)
    if problem is not None:
        raise EngineError(f"engine {engine!r} {problem}; use engine='auto'")
    return EngineChoice(engine, f"asked for by name; {engine} passed the self-check", error)


def prompts_share_passes(anatomy: Anatomy, engine: str, fuse: bool = True) -> bool:
    """Whether prompts of several lengths may share an engine's passes, checked once per model object.

    Args:
        anatomy: the model.
        engine: one that `choose` chose.
        fuse: whether fused operations are on.
    """
    if engine not in PACKING:
        return False
    checks = _checks_of(anatomy, fuse)
    if engine not in checks.sharing:
        checks.sharing[engine] = problem = _compare_shared(anatomy, checks, engine, fuse)
        if problem is not None:
            logger.warning("engine %s with several prompts in a pass %s: one prompt at a time", engine, problem)
    return checks.sharing[engine] is None


def order(anatomy: Anatomy) -> tuple[str, ...]:
    """The engines in the order in which "auto" tries them.

    The fork engine calls attention once per group of rows, so it would load offloaded weights as often.
    """
    return ("wavefront", "rows", "fork", "reference") if anatomy.is_offloaded else tuple(ENGINES)


def _checks_of(anatomy: Anatomy, fuse: bool) -> _Checks:
    known = _CHECKS.setdefault(anatomy.model, {})
    key = (fuse, anatomy.parts, str(anatomy.model.config._attn_implementation))
    if key not in known:
        job = _check_job(anatomy)
        expected = _plain_passes(anatomy, job)
        _check_reference(anatomy, expected)
        known[key] = _Checks(job, expected, _allowed(anatomy, job, expected))
    return known[key]


def _plain_passes(anatomy: Anatomy, job: Job) -> Scores:
    try:
        return reference.run(anatomy, job, _no_tick, rows=len(job.cells) * job.samples)
    except _RAISED as raised:
        raise EngineError(
            f"plain forward passes of {type(anatomy.model).__name__} with hooks on its blocks fail "
            f"({type(raised).__name__}: {_first_line(raised)}); look at Tracer(modules=...), or trace another model"
        ) from raised


def _first_that_passes(anatomy: Anatomy, checks: _Checks, fuse: bool) -> EngineChoice:
    failures: list[str] = []
    for name in order(anatomy):
        told = name in checks.found
        problem, error = _check(anatomy, checks, name, fuse)
        if problem is None:
            reason = "; ".join([*failures, f"{name} passed the self-check"])
            if not told:
                logger.info("engine %s: %s (error %.1e)", name, reason, error)
            return EngineChoice(name, reason, error)
        failures.append(f"{name} {problem}")
        if not told:
            logger.warning("engine %s, stepping down", failures[-1])
    raise EngineError(f"no engine is right for {type(anatomy.model).__name__}: {'; '.join(failures)}")


def _check(anatomy: Anatomy, checks: _Checks, name: str, fuse: bool) -> tuple[str | None, float | None]:
    if name not in checks.found:
        checks.found[name] = _compare(anatomy, checks, name, fuse)
    return checks.found[name]


def _tolerance(anatomy: Anatomy) -> float:
    """Half precision's for quantized models too: activations that are rounded to 8 bits jump as far."""
    quantized = getattr(anatomy.model, "quantization_method", None) is not None
    return HALF_TOLERANCE if quantized else TOLERANCE.get(anatomy.dtype, HALF_TOLERANCE)


def _allowed(anatomy: Anatomy, job: Job, expected: Scores) -> float:
    """The tolerance for a job; half precision is asked how far one more rounding of the noise carries."""
    tolerance, corruption = _tolerance(anatomy), job.corruption
    if anatomy.dtype not in (torch.float16, torch.bfloat16):
        return tolerance
    otherwise = replace(corruption, noise=corruption.noise * (1 + torch.finfo(anatomy.dtype).eps))
    moved = _distance(_plain_passes(anatomy, replace(job, corruption=otherwise)), expected)
    return max(tolerance, ROUNDINGS * moved)


def _check_reference(anatomy: Anatomy, expected: Scores) -> None:
    """Raises where plain forward passes do not do what causal tracing takes for granted."""
    name, tolerance = type(anatomy.model).__name__, _tolerance(anatomy)
    if not np.isfinite(expected.cells).all():
        raise EngineError(f"{name} gives NaN for a prompt of arbitrary tokens in {anatomy.dtype}; try dtype='bfloat16'")
    moved = np.abs(_log(expected.cells[0]) - _log(expected.corrupted[:, expected.target])).max()
    if moved > tolerance:
        raise EngineError(
            f"{name} does not read from left to right, or not twice the same: restoring a token before the subject, "
            f"where the runs do not differ, moves log p by {moved:.1e} (allowed {tolerance:.0e}); causal tracing needs "
            "a causal model that repeats its numbers"
        )


def _compare(anatomy: Anatomy, checks: _Checks, name: str, fuse: bool) -> tuple[str | None, float | None]:
    """(what is wrong with an engine or None, its error)."""
    reason = NOT_PACKED.get(anatomy.config.model_type) if name == "wavefront" else None
    if reason is not None:
        return f"is not for {anatomy.config.model_type}: {reason}", None
    tolerance = checks.tolerance
    try:
        with fused(anatomy, fuse):
            error = _distance(ENGINES[name](anatomy, checks.job, _no_tick), checks.expected)
    except _RAISED as raised:
        return f"does not run ({type(raised).__name__}: {_first_line(raised)})", None
    if error <= tolerance:
        return _problem_in_float32(anatomy, checks.job, name, fuse), error
    return f"differs from plain forward passes by {error:.1e} in log-probability (allowed {tolerance:.0e})", error


def _problem_in_float32(anatomy: Anatomy, job: Job, name: str, fuse: bool) -> str | None:
    """What is wrong with an engine that half precision lets pass: in float32 a difference is no rounding."""
    if not can_be_widened(anatomy):
        return None
    try:
        with fused_attention(fuse):
            error = difference_in_float32(
                anatomy, lambda: ENGINES[name](anatomy, job, _no_tick), lambda: _plain_passes(anatomy, job)
            )
    except _RAISED as raised:
        logger.info("engine %s was not checked in float32 (%s)", name, _first_line(raised))
        return None
    tolerance = TOLERANCE[torch.float32]
    if error <= tolerance:
        return None
    return (
        f"does not compute what plain forward passes do: with both in float32 it differs by {error:.1e} in "
        f"log-probability (allowed {tolerance:.0e})"
    )


def _compare_shared(anatomy: Anatomy, checks: _Checks, engine: str, fuse: bool) -> str | None:
    """What is wrong when the self-check's prompt shares a pass with a shorter one, which comes first."""
    short = _check_job(anatomy, n_positions=4)
    expected = [_plain_passes(anatomy, short), checks.expected]
    allowed = [_allowed(anatomy, short, expected[0]), checks.tolerance]
    try:
        with fused(anatomy, fuse):
            scores = PACKING[engine](anatomy, [short, checks.job], _no_tick)
        errors = [_distance(given, wanted) for given, wanted in zip(scores, expected, strict=True)]
    except _RAISED as raised:
        return f"does not run ({type(raised).__name__}: {_first_line(raised)})"
    error, tolerance = max(zip(errors, allowed, strict=True), key=lambda pair: pair[0] / pair[1])
    if error <= tolerance:
        return None
    return f"differs from plain forward passes by {error:.1e} in log-probability (allowed {tolerance:.0e})"


def _distance(scores: Scores, expected: Scores) -> float:
    """Largest difference of log p: of the target over all cells, of the likeliest tokens over the base runs."""
    differences = [np.abs(_log(scores.cells) - _log(expected.cells)).max()]
    for given, wanted in zip(_base_runs(scores), _base_runs(expected), strict=True):
        top = np.argsort(-wanted)[:TOP_TOKENS]
        differences.append(np.abs(_log(given[top]) - _log(wanted[top])).max())
    return float(np.max(differences))


def _base_runs(scores: Scores) -> Iterator[np.ndarray]:
    yield scores.clean
    yield from scores.corrupted


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), 1e-30))


def _check_job(anatomy: Anatomy, n_positions: int = 6) -> Job:
    """A short prompt of arbitrary tokens, two noise samples, a few cells of every stream.

    The noise is strong, so that the runs differ widely and an error shows.
    """
    n_positions = min(n_positions, anatomy.max_positions or n_positions)
    ids = (torch.arange(n_positions, device="cpu") * 1013 + 7) % anatomy.vocabulary
    span = (min(1, n_positions - 1), min(3, n_positions))
    sigma = sigma_of("s10", anatomy.embedding, [ids[slice(*span)].tolist()], anatomy.device)
    corruption = draw(span, anatomy.d_model, sigma=sigma, samples=2, seed=0, neutral=anatomy.neutral_token)
    return Job(ids, corruption, tuple(_check_cells(anatomy, n_positions, span)), target=None)


def _check_cells(anatomy: Anatomy, n_positions: int, span: tuple[int, int]) -> Iterator[Cell]:
    """A cell before the subject (see `_check_reference`), two of every stream, and one in the last block.

    The last one, off the last position, is right only if nothing mixes tokens after it, or the engine knows.
    """
    n_layers = anatomy.n_layers
    yield (Edit("block_output", 0, 0),)
    for stream in anatomy.streams:
        for layer, position in ((n_layers // 4, span[0]), (n_layers // 2, n_positions - 1)):
            blocks = window_of(layer, 1 if stream == "block_output" else 3, n_layers)
            yield tuple(Edit(stream, block, position) for block in blocks)
        yield (Edit(stream, n_layers - 1, max(0, n_positions - 2)),)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _no_tick() -> None:
    pass
