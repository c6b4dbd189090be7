"""Other ways to compute the same cells: other packages' and plain ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from bench.cases import Cell, Workload


class Peer(ABC):
    """A way to compute cells.

    Attributes:
        cell_by_cell: whether the time for some cells tells the time for all.
        work: what is computed, in words.
    """

    cell_by_cell = True
    work = "the case"

    def __init__(self, workload: Workload) -> None:
        """Prepares what is not timed.

        Raises:
            MissingError: the package is not installed.
        """
        self.workload = workload

    @abstractmethod
    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The mean probability of the target of each cell."""

    def same_work(self, engine: str) -> Callable[[], list[float]] | None:
        """Fasttrace on this tool's own work, all cells in the case's order; None: the case itself is its work.

        Args:
            engine: of fasttrace, the one that the case was traced with.
        """
        return None


class MissingError(RuntimeError):
    """A peer's package is not installed, or in a version without what is called."""
