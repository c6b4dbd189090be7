"""All processes of a start work on one prompt, each on a part of its cells."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fasttrace.engines.job import Job
from fasttrace.engines.readout import Scores
from fasttrace.engines.self_check import confirm
from fasttrace.planning.cost import Cost, total
from fasttrace.runs.processes import Ranks
from fasttrace.study import Study

__all__ = ["SharedCells", "shares_of_cells"]


@dataclass(frozen=True)
class SharedCells:
    """How a study computes a prompt where its cells are dealt out; see `study.Sharing`.

    Attributes:
        ranks: the processes.
    """

    ranks: Ranks

    def scores(self, study: Study, job: Job) -> tuple[Scores, Cost]:
        """All scores of a job, in every process."""
        shares = shares_of_cells(job, study.anatomy.n_layers, self.ranks.world)
        found = self.ranks.all(lambda: self._scores_of(study, job, shares[self.ranks.rank]))
        return _joined([scores for scores, _ in found], shares), total(cost for _, cost in found)

    def _scores_of(self, study: Study, job: Job, share: np.ndarray) -> tuple[Scores, Cost]:
        confirm(study.anatomy, study.choice)
        part = replace(job, cells=tuple(job.cells[number] for number in share))
        return study.scores([part])[0]


def shares_of_cells(job: Job, n_layers: int, world: int) -> list[np.ndarray]:
    """[process] numbers of the cells it computes: about equal work, neighbours in a column together.

    Cells of one position share most of their rows, so that a position is cut as rarely as can be.
    """
    if not job.cells:
        return [np.zeros(0, dtype=np.int64) for _ in range(world)]
    first = np.array([min(cell, key=lambda edit: edit.layer)[1:3] for cell in job.cells])
    order = np.lexsort((first[:, 0], first[:, 1]))
    work = (n_layers - first[:, 0]) * (len(job.token_ids) - first[:, 1])
    before = np.cumsum(work[order]) - work[order] / 2
    return np.split(order, np.searchsorted(before, before[-1] * np.arange(1, world) / world))


def _joined(parts: Sequence[Scores], shares: Sequence[np.ndarray]) -> Scores:
    n_metrics, _, samples = parts[0].table.shape
    table = np.empty((n_metrics, sum(map(len, shares)), samples))
    for part, share in zip(parts, shares, strict=True):
        table[:, share] = part.table
    return replace(parts[0], table=table)
