"""A job in as few passes as memory allows: split by noise sample first, then by cell. Both are exact."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import torch
from torch import distributed

from fasttrace.adapters import Anatomy
from fasttrace.cost import Cost, total
from fasttrace.engines import ENGINES, LAYOUTS, cost_of_job
from fasttrace.engines.job import Job
from fasttrace.errors import PlanError
from fasttrace.readout import Scores

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

MEMORY_SHARE = 0.5
"""Part of the free memory that an automatic budget lets a pack's activations take."""

CPU_TOKENS = 8192
"""Largest pack that an automatic budget makes on a CPU: larger ones leave its caches and run slower per token."""


def run_in_passes(
    engine: str, anatomy: Anatomy, job: Job, budget: int | str = "auto", progress: Progress | None = None
) -> tuple[Scores, Cost]:
    """Runs a job on an engine, in passes whose packs hold at most `budget` tokens.

    Raises:
        PlanError: a budget that is neither "auto" nor a number >= 1.
        NumericsError, EngineError: see the engines.
    """
    passes = _split(engine, anatomy, job, _tokens_allowed(anatomy, budget))
    steps = sum(_steps(engine, anatomy, part) for parts in passes for part in parts)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    target, by_samples = job.target, []
    for parts in passes:
        by_cells = []
        for part in parts:
            by_cells.append(ENGINES[engine](anatomy, replace(part, target=target), tick))
            target = by_cells[0].target
        by_samples.append(replace(by_cells[0], cells=np.concatenate([scores.cells for scores in by_cells])))
    return _joined(by_samples), total(cost_of_job(engine, anatomy, part) for parts in passes for part in parts)


def _joined(by_samples: list[Scores]) -> Scores:
    return replace(
        by_samples[0],
        cells=np.concatenate([scores.cells for scores in by_samples], axis=1),
        corrupted=np.concatenate([scores.corrupted for scores in by_samples]),
    )


def _steps(engine: str, anatomy: Anatomy, job: Job) -> int:
    return anatomy.n_layers if engine in LAYOUTS else len(job.cells) * job.samples


def _split(engine: str, anatomy: Anatomy, job: Job, allowed: int) -> list[list[Job]]:
    """Passes by sample, each a list of parts by cell."""
    if engine not in LAYOUTS:
        return [[job]]
    each = max(1, allowed // _peak_tokens(engine, anatomy, job.part(slice(None), slice(1))))
    chunks = [slice(begin, begin + each) for begin in range(0, job.samples, each)]
    return [_split_cells(engine, anatomy, job.part(slice(None), chunk), allowed) for chunk in chunks]


def _split_cells(engine: str, anatomy: Anatomy, job: Job, allowed: int) -> list[Job]:
    if len(job.cells) < 2 or job.samples > 1 or _peak_tokens(engine, anatomy, job) <= allowed:
        return [job]
    half = len(job.cells) // 2
    halves = (job.part(slice(half), slice(None)), job.part(slice(half, None), slice(None)))
    return [part for piece in halves for part in _split_cells(engine, anatomy, piece, allowed)]


def _peak_tokens(engine: str, anatomy: Anatomy, job: Job) -> int:
    return job.plan(anatomy.n_layers, LAYOUTS[engine]).peak_tokens


def _tokens_allowed(anatomy: Anatomy, budget: int | str) -> int:
    if budget == "auto":
        free = _least_of_ranks(anatomy, min(map(_free_bytes, anatomy.devices)))
        by_memory = max(1, int(MEMORY_SHARE * free / anatomy.bytes_per_token))
        return min(by_memory, CPU_TOKENS) if anatomy.device.type == "cpu" else by_memory
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise PlanError(f'budget is {budget!r}: give "auto", or the largest number of tokens of a pack, >= 1')
    return budget


def _least_of_ranks(anatomy: Anatomy, count: int) -> int:
    """Processes that share the matrix products of one model have to make the same passes, or they wait for ever."""
    if getattr(anatomy.model, "_device_mesh", None) is None:
        return count
    least = torch.tensor(count, device=anatomy.device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return int(least)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
