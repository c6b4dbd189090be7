"""An engine: one way to run cells, and what has to be known of it before a pass."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fasttrace.engines.job import Job, Tick
from fasttrace.engines.memory import Budget
from fasttrace.engines.passes import Progress, run_in_passes, run_together
from fasttrace.engines.readout import Scores
from fasttrace.fusing.choose import fused
from fasttrace.models.anatomy import Anatomy
from fasttrace.planning.cost import Cost, cost_of, full_cost
from fasttrace.planning.packs import peak_tokens
from fasttrace.planning.plan import Layout

__all__ = ["Engine"]


@dataclass(frozen=True)
class Engine:
    """One way to run cells; called as `engine(anatomy, job, tick) -> Scores`, in one pass and with nothing opened.

    Attributes:
        name: by which it is asked for.
        run: all cells of a job.
        layout: what a row of its plans holds; None: it runs no plan, but one restored run after the other, which is
            neither split nor computed with fused operations.
        run_jobs: the jobs of several prompts in one pass, `(anatomy, jobs, tick, ready=None) -> list[Scores]`; None: it
            takes one prompt after the other.
        make_ready: what may be done before their pass, while another is computed, `(anatomy, jobs, fuse) -> ready`.
    """

    name: str
    run: Callable[[Anatomy, Job, Tick], Scores]
    layout: Layout | None = None
    run_jobs: Callable[..., list[Scores]] | None = None
    make_ready: Callable[[Anatomy, Sequence[Job], bool | None], Any] | None = None

    def __call__(self, anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
        """One pass, see `run`."""
        return self.run(anatomy, job, tick)

    @property
    def packs(self) -> bool:
        """Whether several prompts can share a pass."""
        return self.run_jobs is not None

    def fused(self, anatomy: Anatomy, fuse: bool) -> AbstractContextManager[None]:
        """While open, the model computes as it will for this engine; see `fusing.choose.fused`."""
        return fused(anatomy, fuse and self.layout is not None)

    def tokens(self, anatomy: Anatomy, jobs: Sequence[Job]) -> int:
        """Tokens of the largest pack of a pass of these jobs, compiled here if need be; 0 without plans."""
        if self.layout is None:
            return 0
        if len(jobs) == 1:
            return jobs[0].peak_tokens(anatomy.n_layers, self.layout)
        return peak_tokens([job.plan(anatomy.n_layers, self.layout) for job in jobs])

    def cost_of(self, anatomy: Anatomy, job: Job) -> Cost:
        """What running a job costs, from counts alone."""
        if self.layout is None:
            return full_cost(job.shape(anatomy.n_layers), len(job.cells), anatomy.unit_work)
        return cost_of(job.plan(anatomy.n_layers, self.layout), anatomy.unit_work)

    def ready(self, anatomy: Anatomy, jobs: Sequence[Job], budget: Budget, fuse: bool) -> Any:
        """Plans a pass ahead of its turn; None where the engine does the rest when it comes."""
        if len(jobs) > 1 and self.make_ready is not None:
            return self.make_ready(anatomy, jobs, fuse)
        if self.layout is not None and self.tokens(anatomy, jobs[:1]) <= budget.tokens:
            jobs[0].plan(anatomy.n_layers, self.layout)  # into the cache, where the engine looks first
        return None

    def scores(
        self,
        anatomy: Anatomy,
        jobs: Sequence[Job],
        budget: Budget,
        *,
        fuse: bool,
        ready: Any = None,
        progress: Progress | None = None,
    ) -> list[tuple[Scores, Cost]]:
        """Runs jobs in as few passes as memory allows, with fused operations open; see `engines.passes`.

        Args:
            anatomy: the model.
            jobs: a job a prompt.
            budget: lowered when memory runs out.
            fuse: compute with fused operations, where the engine takes them.
            ready: the pass, from `ready`.
            progress: of a single job, called with (steps done, steps in all).

        Raises:
            EngineError: one cell and one noise sample do not fit into memory; or see the engines.
            NumericsError: see the engines.
        """
        with self.fused(anatomy, fuse):
            if len(jobs) == 1:
                return [run_in_passes(self, anatomy, jobs[0], budget, progress)]
            return run_together(self, anatomy, jobs, budget, ready)
