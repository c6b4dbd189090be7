"""What every engine takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from fasttrace.cells import Cell
from fasttrace.corruption import Corruption
from fasttrace.edits import Shape
from fasttrace.plan import Layout, Plan, plan_cells

Tick = Callable[[], None]
"""Called after each block of a pass (after each forward pass of the reference engine)."""


@dataclass(frozen=True)
class Job:
    """One prompt, its noise and its cells.

    Attributes:
        token_ids: int64 [position].
        corruption: the noise, all samples.
        cells: what to restore, one score each.
        target: token id to score; None: the clean run's top token.
    """

    token_ids: Tensor
    corruption: Corruption
    cells: tuple[Cell, ...]
    target: int | None

    @property
    def samples(self) -> int:
        """Noise samples."""
        return len(self.corruption.noise)

    def shape(self, n_layers: int) -> Shape:
        """The counts a plan is compiled for."""
        return Shape(n_layers, len(self.token_ids), self.corruption.span, self.samples)

    def plan(self, n_layers: int, layout: Layout) -> Plan:
        """The compiled cells, from the cache after the first call."""
        return plan_cells(self.shape(n_layers), self.cells, layout)

    def part(self, cells: slice, samples: slice) -> "Job":
        """Some of the cells, for some of the samples."""
        return replace(self, cells=self.cells[cells], corruption=self.corruption.part(samples))
