"""Any cells and any noise on an engine, run as `Tracer.trace` runs the cells of whole grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from bench.cases import STREAMS, WINDOW, Workload
from fasttrace.engines import ENGINES
from fasttrace.engines.job import Job
from fasttrace.engines.memory import Budget, tokens_allowed
from fasttrace.engines.readout import Scores
from fasttrace.engines.self_check import choose
from fasttrace.experiment.cells import Cell, grid_cells, windows_of
from fasttrace.experiment.corruption import Runs, draw
from fasttrace.models.anatomy import Anatomy, anatomy_of
from fasttrace.planning.cost import Cost


@dataclass(frozen=True)
class Runner:
    """An engine on a workload's model."""

    workload: Workload
    engine: str = "wavefront"

    @cached_property
    def anatomy(self) -> Anatomy:
        """The model's parts."""
        return anatomy_of(self.workload.model)

    @cached_property
    def checked_engine(self) -> str:
        """The engine's name, after the self-check."""
        return choose(self.anatomy, self.engine).name

    def cells(self, streams: Sequence[str] = STREAMS, window: int = WINDOW) -> tuple[Cell, ...]:
        """The cells of whole grids, grid by grid."""
        n_layers, n_positions = self.anatomy.n_layers, self.workload.case.tokens
        grids = windows_of(streams, window).items()
        return tuple(cell for stream, width in grids for cell in grid_cells(stream, width, n_layers, n_positions))

    def runs(self, samples: int | None = None) -> Runs:
        """The case's noise, or another number of samples of it."""
        case = self.workload.case
        samples = case.samples if samples is None else samples
        return draw(case.subject, self.anatomy.d_model, sigma=case.noise, samples=samples, seed=case.seed)

    def job(self, cells: Sequence[Cell] | None = None, runs: Runs | None = None) -> Job:
        """The workload's prompt with some cells (None: all of the case) and some noise (None: the case's)."""
        ids = torch.tensor(self.workload.prompt)
        cells = self.cells() if cells is None else tuple(cells)
        return Job(ids, runs or self.runs(), cells, self.workload.target)

    def run(self, job: Job) -> tuple[Scores, Cost]:
        """Runs a job in as few passes as memory allows."""
        budget = Budget(tokens_allowed(self.anatomy, "auto"))
        return ENGINES[self.checked_engine].scores(self.anatomy, [job], budget, fuse=True)[0]
