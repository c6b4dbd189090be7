"""A job in as few passes as memory allows: split by noise sample first, then by cell. Both are exact.

A pass that runs out of memory is split again, and those after it are made smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from fasttrace import memories
from fasttrace.checks import is_out_of_memory
from fasttrace.engines.job import Job
from fasttrace.engines.memory import Budget, shares_passes
from fasttrace.engines.readout import Scores
from fasttrace.errors import EngineError
from fasttrace.fusing.choose import how_computed
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import apart
from fasttrace.planning.cost import Cost, total

if TYPE_CHECKING:
    from fasttrace.engines.engine import Engine

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def run_in_passes(
    engine: "Engine", anatomy: Anatomy, job: Job, budget: Budget, progress: Progress | None = None
) -> tuple[Scores, Cost]:
    """Runs a job on an engine, in passes whose packs hold at most what the budget allows.

    Raises:
        EngineError: one cell and one noise sample do not fit into memory; or see the engines.
        NumericsError: see the engines.
    """
    passes = _Passes(engine, anatomy, budget, progress)
    passes.steps = passes.steps_of(job)
    return passes.run(job).with_top(), total(passes.costs)


def run_together(
    engine: "Engine", anatomy: Anatomy, jobs: Sequence[Job], budget: Budget, ready: Any = None
) -> list[tuple[Scores, Cost]]:
    """Runs the jobs of several prompts, in one pass if it fits; a prompt alone may take several.

    Args:
        engine: one that packs runs several jobs in a pass, another one after the other.
        anatomy: the model.
        jobs: a job a prompt, in any order.
        budget: lowered when memory runs out.
        ready: their pass, if it has been made ready already.

    Raises:
        EngineError: one cell and one noise sample do not fit into memory; or see the engines.
        NumericsError: see the engines.
    """
    if len(jobs) == 1 or engine.run_jobs is None:
        return [run_in_passes(engine, anatomy, job, budget) for job in jobs]
    tokens = engine.tokens(anatomy, jobs)
    if tokens <= budget.tokens:
        try:
            scores = engine.run_jobs(anatomy, jobs, lambda: None, ready)
            costs = [engine.cost_of(anatomy, job) for job in jobs]
            return [(_with_how(each).with_mean().with_top(), cost) for each, cost in zip(scores, costs, strict=True)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or shares_passes(anatomy):
                raise
            budget.lower(tokens)
        _make_room()
    half = len(jobs) // 2
    return [found for part in (jobs[:half], jobs[half:]) for found in run_together(engine, anatomy, part, budget)]


def _make_room() -> None:
    memories.clear("packs")
    clear_device_cache(garbage_collection=True)


class _Passes:
    """The passes of one job.

    Attributes:
        budget: most tokens of a pack.
        done, steps: blocks computed, and to be computed in all (of the reference engine: restored runs).
        costs: of the passes that were finished.
        waiting: parts of the job whose turn has not come.
    """

    def __init__(self, engine: "Engine", anatomy: Anatomy, budget: Budget, progress: Progress | None):
        self.engine, self.anatomy, self.budget, self.progress = engine, anatomy, budget, progress
        self.done = self.steps = 0
        self.costs: list[Cost] = []
        self.waiting: list[Job] = []

    def run(self, job: Job) -> Scores:
        """All passes of a job, one after the other; a loop, because thousands of samples can take thousands of them."""
        before: list[tuple[Scores, bool]] = []
        while True:
            halves = self._split(job)
            if halves is None:
                try:
                    scores = self._pass(job)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or shares_passes(self.anatomy):
                        raise
                    halves = self._split_smaller(job, error)
                _make_room()
                self.steps = self.done + sum(map(self.steps_of, (*halves, *self.waiting)))
            self.waiting.append(halves[1])
            first = self.run(halves[0])
            before.append((first, len(halves[0].cells) < len(job.cells)))
            job = replace(self.waiting.pop(), target=first.targets)
        for first, by_cell in reversed(before):
            scores = _joined(first, scores, by_cell)
        return scores

    def steps_of(self, job: Job) -> int:
        """Steps of all passes that a job will take."""
        if self.engine.layout is None:
            return len(job.cells) * job.samples
        steps = self.anatomy.n_layers
        while (halves := self._split(job)) is not None:
            steps += self.steps_of(halves[0])
            job = halves[1]
        return steps

    def _pass(self, job: Job) -> Scores:
        scores = self.engine(self.anatomy, job, self._tick)
        self.costs.append(self.engine.cost_of(self.anatomy, job))
        return _with_how(scores).with_mean()

    def _tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            with apart():
                self.progress(self.done, self.steps)

    def _split(self, job: Job) -> tuple[Job, Job] | None:
        """A part that fits and the rest, or two halves; None if the job fits or cannot be split."""
        if self.engine.layout is None or self._tokens(job) <= self.budget.tokens:
            return None
        if job.samples > 1:
            fitting = max(1, self.budget.tokens // self._tokens(job.part(slice(None), slice(1))))
            first = min(fitting, job.samples - 1)
            return job.part(slice(None), slice(first)), job.part(slice(None), slice(first, None))
        if len(job.cells) < 2:
            return None
        half = len(job.cells) // 2
        return job.part(slice(half), slice(None)), job.part(slice(half, None), slice(None))

    def _split_smaller(self, job: Job, error: BaseException) -> tuple[Job, Job]:
        """Halves the budget below a pack that did not fit."""
        tokens = self._tokens(job)
        if max(1, len(job.cells)) * job.samples < 2 or self.engine.layout is None:
            raise EngineError(
                f"out of memory on {self.anatomy.device} with one cell and one noise sample, {tokens} tokens: free "
                "memory there, or load the model with device_map='auto'"
            ) from error
        self.budget.lower(tokens)
        halves = self._split(job)
        assert halves is not None, "a job that needs more than the budget can be split"
        return halves

    def _tokens(self, job: Job) -> int:
        return self.engine.tokens(self.anatomy, [job])


def _with_how(scores: Scores) -> Scores:
    """With what the operations around the engine were computed by."""
    return replace(scores, how={**how_computed(), **scores.how})


def _joined(first: Scores, second: Scores, by_cell: bool) -> Scores:
    table = np.concatenate((first.table, second.table), axis=1 if by_cell else 2)
    if first.how != second.how:  # a kernel failed in between
        first = replace(first, how={**first.how, "attention_by": "kernel and groups"})
    if by_cell:
        return replace(first, table=table)
    share = first.table.shape[2] / table.shape[2]
    corrupted = share * first.distributions[1:] + (1 - share) * second.distributions[1:]
    distributions = torch.cat((first.distributions[:1], corrupted))
    base = np.concatenate((first.base, second.base[:, 1:]), axis=1)
    return replace(first, table=table, base=base, distributions=distributions)
