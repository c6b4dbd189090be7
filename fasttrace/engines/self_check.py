"""Which engine a model gets: the first one that a self-check on the model itself finds right.

Packed tracing is silently wrong on a few families, and only a comparison with plain forward passes shows it. So
the check is not optional: "auto" takes the first engine that passes, and one that is named has to pass too. It is made
again when the model is no longer what it was (`state.py`): after a hook, another dtype, an adapter.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from fasttrace.checks import is_out_of_memory
from fasttrace.engines import ENGINES, Engine, reference
from fasttrace.engines.in_float32 import can_be_widened, difference_in_float32
from fasttrace.engines.job import Job
from fasttrace.engines.readout import Scores
from fasttrace.engines.state import State, refuse_autocast, state_of
from fasttrace.errors import EngineError, first_line, kind_and_line
from fasttrace.experiment.cells import CLEAN, CORRUPTED, RUNS, ZERO, Cell, Edit, EditsIn, background_of, window_of
from fasttrace.experiment.corruption import draw, sigma_of
from fasttrace.experiment.sites import RESIDUAL, SITE
from fasttrace.fusing.choose import cpu_matmul, failed_kernels, fused_attention, kernel_compiler
from fasttrace.memories import by_module
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import exclusive, refuse_inside_a_pass
from fasttrace.models.names import NOT_PACKED
from fasttrace.models.second_look import LONG_PROMPT

logger = logging.getLogger("fasttrace")

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF_TOLERANCE = 0.3
"""Largest difference of a log-probability that the self-check lets pass. Half precision moves by this much when
only the shapes of its matrix products change."""

ROUNDINGS = 2
"""In half precision, what also passes: so many times what plain passes move by when the noise is rounded otherwise."""

SAME_ALONE = 1e-3
"""How far log p may move with what else is in the batch, where that is no rounding of the model's dtype."""

EIGHT_BITS = 2.0**-8
"""How activations are rounded, at worst, before a quantized product."""

POSITIONS, HOOKED_POSITIONS = 6, 16
"""Tokens of the prompt that is checked: more where others' hooks may edit some positions, in one run at a time."""

KEPT_CHECKS = 4
"""States of a model that are remembered, such as with an adapter and without it."""

TOP_TOKENS = 20
"""Most likely next tokens of each base run that are compared."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine and why.

    Attributes:
        name: of the engine.
        reason: one sentence.
        self_check_error: largest difference of a log-probability from plain forward passes; None: not checked.
        state: of the model that it was chosen for.
    """

    name: str
    reason: str
    self_check_error: float | None = None
    state: State | None = field(default=None, compare=False, repr=False)

    @property
    def hooks(self) -> int:
        """How many hooks and replaced forwards of others the model had."""
        return 0 if self.state is None else self.state.hooks


@dataclass
class _Checks:
    """What the self-check of one model found so far.

    Attributes:
        key: what it holds for.
        job: what it runs.
        expected: what plain forward passes give.
        tolerance: largest difference of a log-probability from them.
        rows: runs in a plain pass, one where others' hooks may tell them apart; None: all.
        by_batch: how far a run moves with what else is in its batch, where only one run at a time is right; else None.
        found: by engine, what is wrong with it (None: nothing) and its error (None: it does not run).
        sharing: by engine, why prompts do not share its passes (None: they do).
    """

    key: tuple[Any, ...]
    job: Job
    expected: Scores
    tolerance: float
    rows: int | None = None
    by_batch: float | None = None
    found: dict[str, tuple[str | None, float | None]] = field(default_factory=dict)
    sharing: dict[str, str | None] = field(default_factory=dict)


_CHECKS = by_module()
"""What was checked on a model: list[_Checks], the last first to go."""


def choose(anatomy: Anatomy, engine: str = "auto", fuse: bool = True, state: State | None = None) -> EngineChoice:
    """The engine for a model as it is now, checked once per state with the fused operations it will run with.

    Args:
        anatomy: the model.
        engine: "auto" for the first that passes, or a name; "reference" by name is not checked.
        fuse: whether fused operations are on.
        state: of the model, if it is known.

    Raises:
        EngineError: an unknown engine, one that is wrong for this model, or none that is right; memory that runs out;
            autocast; or a model that this thread is tracing already.
    """
    if engine not in ENGINES and engine != "auto":
        raise EngineError(f"unknown engine {engine!r}; choose from auto, {', '.join(ENGINES)}")
    refuse_inside_a_pass(anatomy.model)
    refuse_autocast(anatomy)
    with exclusive(anatomy.model):
        state = state or state_of(anatomy.model)
        return replace(_chosen(anatomy, engine, fuse, state), state=state)


def _chosen(anatomy: Anatomy, engine: str, fuse: bool, state: State) -> EngineChoice:
    if engine == "reference":
        return EngineChoice(engine, "asked for by name")
    checks = _checks_of(anatomy, fuse, state)
    if engine == "auto":
        return _first_that_passes(anatomy, checks, fuse)
    problem, error = _check(anatomy, checks, engine, fuse)
    if problem is not None:
        raise EngineError(f"engine {engine!r} {problem}; use engine='auto'")
    return EngineChoice(engine, f"asked for by name; {engine} passed the self-check", error)


def confirm(anatomy: Anatomy, choice: EngineChoice) -> None:
    """Raises if a model is no longer what an engine was chosen for.

    Raises:
        EngineError: hooks, weights' types or places, or settings of torch have changed; or see `refuse_autocast`.
    """
    refuse_autocast(anatomy)
    if choice.state is not None and state_of(anatomy.model) != choice.state:
        raise EngineError(
            f"this {type(anatomy.model).__name__} has changed since its trace began (a hook, a dtype, a device, an "
            "adapter or a setting of torch): start the trace again, and leave the model alone until it is done"
        )


def prompts_share_passes(anatomy: Anatomy, engine: str, fuse: bool = True) -> bool:
    """Whether prompts of several lengths may share an engine's passes, checked once per state of the model.

    Args:
        anatomy: the model.
        engine: one that `choose` chose.
        fuse: whether fused operations are on.
    """
    if not ENGINES[engine].packs:
        return False
    with exclusive(anatomy.model):
        checks = _checks_of(anatomy, fuse, state_of(anatomy.model))
        if engine not in checks.sharing:
            checks.sharing[engine] = problem = _compare_shared(anatomy, checks, ENGINES[engine], fuse)
            if problem is not None:
                logger.warning("engine %s with several prompts in a pass %s: one prompt at a time", engine, problem)
        return checks.sharing[engine] is None


def order(anatomy: Anatomy) -> tuple[str, ...]:
    """The engines in the order in which "auto" tries them.

    The fork engine calls attention once per group of rows, so it would load offloaded weights as often.
    """
    return ("wavefront", "rows", "fork", "reference") if anatomy.is_offloaded else tuple(ENGINES)


def _checks_of(anatomy: Anatomy, fuse: bool, state: State) -> _Checks:
    key = (state, fuse, _places(anatomy), cpu_matmul(anatomy, fuse), kernel_compiler(anatomy), failed_kernels(anatomy))
    known = _CHECKS.setdefault(anatomy.model, [])
    checks = next((checks for checks in known if checks.key == key), None)
    if checks is None:
        known.append(checks := _new_checks(anatomy, key, state))
        del known[:-KEPT_CHECKS]
    return checks


def _places(anatomy: Anatomy) -> tuple[int, ...]:
    """Which modules of the model are hooked."""
    parts = anatomy.parts
    return id(parts.embedding), *map(id, chain(parts.blocks, parts.mixers, parts.attention, parts.mlp, parts.down))


def _new_checks(anatomy: Anatomy, key: tuple[Any, ...], state: State) -> _Checks:
    rows = 1 if state.hooks else None
    job = _check_job(anatomy, HOOKED_POSITIONS if state.hooks else POSITIONS)
    try:
        expected = _plain_passes(anatomy, job, rows)
    except EngineError:
        if not state.hooks:
            raise
        job = _check_job(anatomy, LONG_PROMPT)  # a hook may be made for longer prompts
        expected = _plain_passes(anatomy, job, rows)
    if not np.isfinite(expected.cells).all():  # linears that divide by a token's largest activation take no zeros
        job = replace(job, cells=tuple(map(_without_vectors, job.cells)))
        expected = _plain_passes(anatomy, job, rows)
    allowed = _allowed(anatomy, job, expected, rows)
    effect = None
    if _is_quantized(anatomy) or _moved_by_nothing(expected) > _tolerance(anatomy):
        effect = _effect_of_batch(anatomy, job)
        if effect <= max(SAME_ALONE, ROUNDINGS * _moved_by_rounding(anatomy, job, expected, rows)):
            effect = None
    _check_reference(anatomy, expected, max(_tolerance(anatomy), ROUNDINGS * (effect or 0)))
    return _Checks(key, job, expected, allowed, rows, effect)


def _plain_passes(anatomy: Anatomy, job: Job, rows: int | None = None) -> Scores:
    """What the reference gives, `rows` runs in a pass; None: all of them, or as many as memory holds."""
    rows = rows or max(1, len(job.cells)) * job.samples
    try:
        return reference.run(anatomy, job, _no_tick, rows=rows)
    except Exception as raised:  # a model, or an engine that it is not made for, may raise anything
        if not is_out_of_memory(raised):
            raise EngineError(
                f"plain forward passes of {type(anatomy.model).__name__} with hooks on its blocks fail "
                f"({kind_and_line(raised)}); look at Tracer(modules=...), or trace another model"
            ) from raised
        if rows == 1:
            raise _no_room(anatomy) from raised
    clear_device_cache(garbage_collection=True)
    return _plain_passes(anatomy, job, rows // 2)


def _no_room(anatomy: Anatomy) -> EngineError:
    return EngineError(
        f"out of memory on {anatomy.device} during the self-check, which takes a prompt of {POSITIONS} tokens: free "
        "memory there, or load the model with device_map='auto'"
    )


def _first_that_passes(anatomy: Anatomy, checks: _Checks, fuse: bool) -> EngineChoice:
    failures: list[str] = []
    for name in order(anatomy):
        told = name in checks.found
        problem, error = _check(anatomy, checks, name, fuse)
        if problem is None:
            passed = "passed the self-check" if checks.by_batch is None else "is one plain forward pass after another"
            reason = "; ".join([*failures, f"{name} {passed}"])
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


def _is_quantized(anatomy: Anatomy) -> bool:
    return getattr(anatomy.model, "quantization_method", None) is not None


def _tolerance(anatomy: Anatomy) -> float:
    """Half precision's for quantized models too: activations that are rounded to 8 bits jump as far."""
    return HALF_TOLERANCE if _is_quantized(anatomy) else TOLERANCE.get(anatomy.dtype, HALF_TOLERANCE)


def _allowed(anatomy: Anatomy, job: Job, expected: Scores, rows: int | None) -> float:
    """The tolerance for a job; half precision and 8 bits are asked how far one more rounding of the noise carries."""
    if anatomy.dtype in (torch.float16, torch.bfloat16):
        return max(_tolerance(anatomy), ROUNDINGS * _moved_by_rounding(anatomy, job, expected, rows))
    if _is_quantized(anatomy):
        moved = _moved_by_rounding(anatomy, job, expected, rows, EIGHT_BITS)
        return max(TOLERANCE.get(anatomy.dtype, HALF_TOLERANCE), min(HALF_TOLERANCE, ROUNDINGS * moved))
    return _tolerance(anatomy)


def _moved_by_rounding(
    anatomy: Anatomy, job: Job, expected: Scores, rows: int | None, eps: float | None = None
) -> float:
    """How far plain passes move when the noise is rounded otherwise, to the model's dtype if not told."""
    eps = eps or torch.finfo(anatomy.dtype).eps
    return _distance(_plain_passes(anatomy, _with_noise(job, 1 + eps), rows), expected)


def _with_noise(job: Job, factor: float) -> Job:
    """A job with its noise multiplied."""
    assert job.runs.noise is not None, "the check's runs are noised"
    return replace(job, runs=replace(job.runs, noise=factor * job.runs.noise))


def _effect_of_batch(anatomy: Anatomy, job: Job) -> float:
    """How far the clean run moves when another run beside it does: nothing where runs are computed apart.

    Both batches have the same shape, hence the same products of matrices: this is not their rounding.
    """
    noisy = replace(job, cells=(), runs=job.runs.part(slice(1)))
    quiet = _with_noise(noisy, 0)
    beside_noisy, beside_quiet = (_plain_passes(anatomy, each, rows=2).clean for each in (noisy, quiet))
    top = np.argsort(-beside_quiet)[:TOP_TOKENS]
    return float(np.abs(_log(beside_noisy[top]) - _log(beside_quiet[top])).max())


def _moved_by_nothing(expected: Scores) -> float:
    """How far log p moves in the check's first two cells.

    One restores a token before the subject, where the runs do not differ, one writes a run's own values into it.
    """
    clean, *corrupted = _log(expected.base_of("prob"))
    before, own = _log(expected.cells[:2])
    return float(max(np.abs(before - corrupted).max(), np.abs(own - clean).max()))


def _check_reference(anatomy: Anatomy, expected: Scores, tolerance: float) -> None:
    """Raises where plain forward passes do not do what causal tracing takes for granted."""
    name = type(anatomy.model).__name__
    if not np.isfinite(expected.cells).all():
        raise EngineError(f"{name} gives NaN for a prompt of arbitrary tokens in {anatomy.dtype}; try dtype='bfloat16'")
    moved = _moved_by_nothing(expected)
    if moved > tolerance:
        raise EngineError(
            f"{name} does not read from left to right, or not twice the same: restoring a token before the subject, "
            f"where the runs do not differ, or a run's own values, moves log p by {moved:.1e} (allowed "
            f"{tolerance:.0e}); causal tracing needs a causal model that repeats its numbers"
        )


def _compare(anatomy: Anatomy, checks: _Checks, name: str, fuse: bool) -> tuple[str | None, float | None]:
    """(what is wrong with an engine or None, its error)."""
    reason = NOT_PACKED.get(anatomy.config.model_type) if name == "wavefront" else None
    if reason is not None:
        return f"is not for {anatomy.config.model_type}: {reason}", None
    if checks.by_batch is not None:
        effect = f"what a run gives moves by {checks.by_batch:.1e} in log-probability with what else is in its batch"
        return (None, 0.0) if name == "reference" else (f"is not for this model: {effect}", None)
    tolerance = checks.tolerance
    try:
        with ENGINES[name].fused(anatomy, fuse):
            error = _distance(ENGINES[name](anatomy, checks.job, _no_tick), checks.expected)
    except Exception as raised:  # a model, or an engine that it is not made for, may raise anything
        if is_out_of_memory(raised):
            raise _no_room(anatomy) from raised
        return f"does not run ({kind_and_line(raised)})", None
    if error <= tolerance:
        return _problem_in_float32(anatomy, checks, name, fuse), error
    return f"differs from plain forward passes by {error:.1e} in log-probability (allowed {tolerance:.0e})", error


def _problem_in_float32(anatomy: Anatomy, checks: _Checks, name: str, fuse: bool) -> str | None:
    """What is wrong with an engine that half precision lets pass: in float32 a difference is no rounding."""
    if not can_be_widened(anatomy):
        return None
    try:
        with fused_attention(fuse):
            error = difference_in_float32(
                anatomy,
                lambda: ENGINES[name](anatomy, checks.job, _no_tick),
                lambda: _plain_passes(anatomy, checks.job, checks.rows),
            )
    except Exception as raised:  # what rounds unseen, or memory that does not hold float32
        logger.info("engine %s was not checked in float32 (%s)", name, first_line(raised))
        return None
    tolerance = TOLERANCE[torch.float32]
    if error <= tolerance:
        return None
    return (
        f"does not compute what plain forward passes do: with both in float32 it differs by {error:.1e} in "
        f"log-probability (allowed {tolerance:.0e})"
    )


def _compare_shared(anatomy: Anatomy, checks: _Checks, engine: Engine, fuse: bool) -> str | None:
    """What is wrong when the self-check's prompt shares a pass with a shorter one, which comes first."""
    run_jobs = engine.run_jobs
    assert run_jobs is not None, "it packs"
    short = _check_job(anatomy, n_positions=4)
    expected = [_plain_passes(anatomy, short, checks.rows), checks.expected]
    allowed = [_allowed(anatomy, short, expected[0], checks.rows), checks.tolerance]
    try:
        with engine.fused(anatomy, fuse):
            scores = run_jobs(anatomy, [short, checks.job], _no_tick)
        errors = [_distance(given, wanted) for given, wanted in zip(scores, expected, strict=True)]
    except Exception as raised:  # a model, or an engine that it is not made for, may raise anything
        if is_out_of_memory(raised):
            raise _no_room(anatomy) from raised
        return f"does not run ({kind_and_line(raised)})"
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


def _check_job(anatomy: Anatomy, n_positions: int = POSITIONS) -> Job:
    """A short prompt of arbitrary tokens, two noise samples, a few cells of every stream.

    The noise is strong, so that the runs differ widely and an error shows.
    """
    n_positions = min(n_positions, anatomy.max_positions or n_positions)
    ids = (torch.arange(n_positions, device="cpu") * 1013 + 7) % anatomy.vocabulary
    span = (min(1, n_positions - 1), min(3, n_positions))
    sigma = sigma_of("s10", anatomy.embedding, [ids[slice(*span)].tolist()], anatomy.device)
    runs = draw(span, anatomy.d_model, sigma=sigma, samples=2, seed=0, neutral=anatomy.neutral_token)
    return Job(ids, runs, tuple(_check_cells(anatomy, n_positions, span)), target=None)


def _check_cells(anatomy: Anatomy, n_positions: int, span: tuple[int, int]) -> Iterator[Cell]:
    """Two cells that change nothing (see `_moved_by_nothing`), and four of every stream.

    One of these is in the last block off the last position, which is right only if nothing mixes tokens after it, or
    the engine knows; one is made in the clean run.
    """
    n_layers = anatomy.n_layers
    yield tuple(Edit("block_output", block, 0) for block in range(n_layers))
    yield EditsIn(CLEAN, tuple(Edit(s, block, n_positions - 1) for s in anatomy.streams for block in range(n_layers)))
    for stream in anatomy.streams:
        for layer, position in ((n_layers // 4, span[0]), (n_layers // 2, n_positions - 1)):
            blocks = window_of(layer, 1 if stream == "block_output" else 3, n_layers)
            yield tuple(Edit(stream, block, position) for block in blocks)
        yield (Edit(stream, n_layers - 1, max(0, n_positions - 2)),)
        yield EditsIn(CLEAN, tuple(_clean_run_edited(stream, n_layers, n_positions, span)))


def _clean_run_edited(stream: str, n_layers: int, n_positions: int, span: tuple[int, int]) -> Iterator[Edit]:
    """The corrupted run's value in the clean run, and zeros at a later place, but in the residual stream."""
    yield Edit(stream, n_layers // 4, span[0], CORRUPTED)
    if SITE[stream].stage != RESIDUAL:
        yield Edit(stream, n_layers // 2, n_positions - 1, ZERO)


def _without_vectors(cell: Cell) -> Cell:
    edits = tuple(edit for edit in cell if edit.source in RUNS)
    return EditsIn(background_of(cell), edits)


def _no_tick() -> None:
    pass
