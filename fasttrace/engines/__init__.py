"""Engines: four ways to run the same cells, held to the same numbers.

`wavefront` runs a sweep in one packed forward pass, `fork` does so for models with attention code of their own,
`rows` runs the same cells as full rows of a growing batch, `reference` one cell at a time.
All are `run(anatomy, job, tick) -> Scores`.
"""

from fasttrace.engines import reference, rows, wavefront
from fasttrace.engines.job import Job, Tick
from fasttrace.models.anatomy import Anatomy
from fasttrace.planning.cost import Cost, cost_of, full_cost
from fasttrace.planning.plan import Layout

__all__ = ["ENGINES", "Job", "Tick", "cost_of_job"]

ENGINES = {"wavefront": wavefront.run, "fork": wavefront.run_fork, "rows": rows.run, "reference": reference.run}
"""In the order in which "auto" tries them."""

PACKING = {"wavefront": wavefront.run_jobs}
"""Engines whose passes several prompts can share: `run_jobs(anatomy, jobs, tick, ready=None) -> list[Scores]`."""

READY = {"wavefront": wavefront.make_ready}
"""What may be done before their pass, while another is computed: `make_ready(anatomy, jobs, fuse) -> ready`."""

LAYOUTS: dict[str, Layout] = {"wavefront": wavefront.LAYOUT, "fork": wavefront.FORK_LAYOUT, "rows": rows.LAYOUT}
"""What a row holds in the engines that run plans."""


def cost_of_job(engine: str, anatomy: Anatomy, job: Job) -> Cost:
    """What running a job on an engine costs, from counts alone."""
    if engine in LAYOUTS:
        return cost_of(job.plan(anatomy.n_layers, LAYOUTS[engine]), anatomy.unit_work)
    return full_cost(job.shape(anatomy.n_layers), len(job.cells), anatomy.unit_work)
