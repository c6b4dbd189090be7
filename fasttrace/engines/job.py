"""What every engine takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fasttrace.engines.metrics import NONE, Metric
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import Cell
from fasttrace.experiment.corruption import Runs
from fasttrace.planning.edits import Shape
from fasttrace.planning.packs import Pack, pack_of
from fasttrace.planning.plan import Layout, Plan, plan_cells

Tick = Callable[[], None]
"""Called after each block of a pass (after each forward pass of the reference engine)."""

FEW_SAMPLES = 32
"""Noise samples up to which a whole plan is made to be measured: most of them are run as they are."""


@dataclass(frozen=True)
class Job:
    """One prompt, its corrupted runs and its cells.

    Attributes:
        token_ids: int64 [position].
        runs: its corrupted runs; there may be none.
        cells: what to restore, one score each.
        target: token id to score, or several; None: the clean run's top token.
        foil: token ids that the target is compared with; none: metrics that need them are left out.
        metrics: a user's own metrics, name and function; see `engines.metrics`.
        reads: positions whose logits are scored, in rising order; none: the last. With several, an answer is read as
            it is written: `target` has one token for each, and metrics are of all of them together.
        hidden_is_all: see `Shape`; where it is known to be so, cells that take whole states cost nothing.
    """

    token_ids: Tensor
    runs: Runs
    cells: tuple[Cell, ...]
    target: int | tuple[int, ...] | None
    foil: tuple[int, ...] = ()
    metrics: tuple[tuple[str, Metric], ...] = ()
    reads: tuple[int, ...] = ()
    hidden_is_all: bool = False

    def __post_init__(self) -> None:
        if len(self.reads) > 1 and (self.foil or (self.targets and len(self.targets) != len(self.reads))):
            raise PlanError(
                f"an answer read at {len(self.reads)} positions has {len(self.targets)} tokens and a foil of "
                f"{len(self.foil)}: give one token for each position, and no foil"
            )

    @property
    def targets(self) -> tuple[int, ...]:
        """Token ids to score; none: the clean run's top token."""
        if self.target is None:
            return ()
        return self.target if isinstance(self.target, tuple) else (self.target,)

    @property
    def targets_at(self) -> list[tuple[int, ...]]:
        """[read] token ids to score there; none: the clean run's top token."""
        if len(self.reads) < 2:
            return [self.targets]
        return [(token,) for token in self.targets] or [()] * len(self.reads)

    @property
    def samples(self) -> int:
        """Restored runs of a cell: one for each corrupted run, one where there is none."""
        return max(1, len(self.runs))

    def shape(self, n_layers: int) -> Shape:
        """The counts a plan is compiled for.

        A model that looks twice may read the subject at later tokens too, by n-grams: there embeddings differ up to the
        end, in the planner's words.
        """
        n_positions, span = len(self.token_ids), self.runs.span
        if self.runs.neutral is not None:
            span = span[0], n_positions
        return Shape(n_layers, n_positions, span, len(self.runs), self.reads, self.hidden_is_all)

    def plan(self, n_layers: int, layout: Layout) -> Plan:
        """The compiled cells, from the cache after the first call."""
        return plan_cells(self.shape(n_layers), self.cells, layout)

    def peak_tokens(self, n_layers: int, layout: Layout) -> int:
        """Tokens of the largest pack of the plan; of many samples told from the plan of one, which is much smaller."""
        if self.samples <= FEW_SAMPLES:
            return self.plan(n_layers, layout).peak_tokens
        length, one = len(self.token_ids), self.part(slice(None), slice(1)).plan(n_layers, layout).peak_tokens
        return length + self.samples * (one - length)

    def on(self, device: torch.device) -> "Job":
        """The same job with its noise on a device; nothing waits for the copy."""
        return replace(self, runs=self.runs.on(device))

    def part(self, cells: slice, samples: slice) -> "Job":
        """Some of the cells, for some of the samples."""
        return replace(self, cells=self.cells[cells], runs=self.runs.part(samples))


def answer_tables(jobs: Sequence[Job]) -> list[np.ndarray]:
    """int64 [read, target] and [read, foil] of several prompts' reads, filled up with `metrics.NONE`."""
    tables = []
    targets = [ids for job in jobs for ids in job.targets_at]
    foils = [job.foil for job in jobs for _ in job.targets_at]
    for sets, least in ((targets, 1), (foils, 0)):
        width = max(least, *map(len, sets))
        tables.append(np.array([[*ids, *[NONE] * (width - len(ids))] for ids in sets], dtype=np.int64))
    return tables


def pack_of_jobs(jobs: Sequence[Job], n_layers: int, layout: Layout) -> Pack:
    """The compiled cells of several prompts, for one pass."""
    return pack_of([job.plan(n_layers, layout) for job in jobs])


def base_ids(jobs: Sequence[Job]) -> Tensor:
    """int64 [base row, width] tokens of the base rows, short prompts filled up with their last token."""
    width = max(len(job.token_ids) for job in jobs)

    def filled(ids: Tensor) -> Tensor:
        return torch.cat((ids, ids[:, -1:].expand(-1, width - ids.shape[1])), dim=1)

    return torch.cat([filled(torch.cat((job.token_ids[None], job.runs.seen(job.token_ids)))) for job in jobs])


def corrupted(jobs: Sequence[Job], embeddings: Tensor) -> Tensor:
    """Hook on the embedding: [base row, width, d_model] with each prompt's runs corrupted."""
    parts = embeddings.split([1 + len(job.runs) for job in jobs])
    return torch.cat([job.runs.embedded(part) for job, part in zip(jobs, parts, strict=True)])
